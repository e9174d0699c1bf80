"""Desmearing of small-angle scattering, from exposures in Bluesky to results in Tiled.

The names most users need are in the modules of the same subject:
`dsnet_bluesky.data` (curves), `dsnet_bluesky.smearing` (operators),
`dsnet_bluesky.desmearing` (methods), `dsnet_bluesky.plans` (exposures).
"""

from importlib.metadata import version

__version__ = version("dsnet-bluesky")

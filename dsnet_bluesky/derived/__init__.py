"""Writing what is derived from raw runs, through a Tiled client.

``/curves`` and ``/psfs`` hold nodes that the server fills when they are read
(`adapters`): registering one stores only where its frames are. ``/desmeared`` holds
results, each written once, exposure by exposure, by a `ResultWriter`.

A derived node carries the access tags of its raw run.
"""

from dsnet_bluesky.derived.registration import register, register_all, register_curves, register_psf
from dsnet_bluesky.derived.results import AlreadyStored, ResultWriter

__all__ = ["AlreadyStored", "ResultWriter", "register", "register_all", "register_curves", "register_psf"]

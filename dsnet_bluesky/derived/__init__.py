"""Writing what is derived from raw runs, through a Tiled client.

``/curves`` and ``/psfs`` hold nodes that the server fills when they are read
(`adapters`): registering one stores only where its frames are. ``/desmeared`` holds
results, each written once, exposure by exposure, by a `ResultWriter`.

A derived node carries the access tags of its raw run.
"""

from dsnet_bluesky.derived.catalog import access_tags_of, lookup, mount
from dsnet_bluesky.derived.raw import RawFrames, raw_frames, raw_frames_of
from dsnet_bluesky.derived.registration import register, register_all, register_curves, register_psf
from dsnet_bluesky.derived.results import CLAIM_INTERVAL, AlreadyStored, LostClaim, NoRawRun, ResultWriter, is_abandoned
from dsnet_bluesky.derived.together import Finished, store_together

__all__ = [
    "CLAIM_INTERVAL",
    "AlreadyStored",
    "Finished",
    "LostClaim",
    "NoRawRun",
    "RawFrames",
    "ResultWriter",
    "access_tags_of",
    "is_abandoned",
    "lookup",
    "mount",
    "raw_frames",
    "raw_frames_of",
    "register",
    "register_all",
    "register_curves",
    "register_psf",
    "store_together",
]

"""How derived nodes are described, and asked for: what the server's adapters and their clients must agree on.

Clients import this, and nothing of the server (`adapters`): a watcher, a callback in a RunEngine or a notebook has no
use for its catalog, which takes seconds to import.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiled.queries import NoBool
from tiled.query_registration import register
from tiled.structures.core import Spec

from .kinds import Kind

__all__ = ["CURVE_MIMETYPE", "DEPTH", "MASK", "PSF_MIMETYPE", "RESULT_MIMETYPE", "WithinRuns", "specs_of"]

CURVE_MIMETYPE = "application/x-dsnet-curve"
PSF_MIMETYPE = "application/x-dsnet-psf"
RESULT_MIMETYPE = "application/x-dsnet-result"

MASK = "mask"
"""Parameter of the asset that masks frames, beside their ``data_uris``."""

DEPTH = 3
"""Of what lies in a stream, counted from the catalog of runs."""


def specs_of(kind: Kind) -> list[Spec]:
    """Return the specs of results of a kind: Tiled takes the first that a client knows, ours where this package is installed."""
    return [Spec(kind.spec, version="1"), Spec("xarray_dataset")]


@register(name="dsnet_within")
@dataclass(frozen=True)
class WithinRuns(NoBool):
    """Streams of runs, or the arrays in them; for `search_deep` of a catalog of runs, with ``max_depth=DEPTH``.

    Parameters
    ----------
    uids
        Of the runs, whole, separated by commas.
    family
        ``"container"`` for streams, ``"array"``.
    """

    uids: str
    family: str

    def encode(self) -> dict[str, str]:
        """Return what Tiled's client puts into the address."""
        return {"uids": self.uids, "family": self.family}

    @classmethod
    def decode(cls, *, uids: str, family: str) -> WithinRuns:
        """Make the query of what stands in an address."""
        return cls(uids, family)

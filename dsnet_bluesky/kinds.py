"""The kinds of results: what methods make of exposures, where it is stored, and what is said of it there.

One mechanism pairs, batches, stores, replays and finds results of every kind; what differs between them is here. The
method that a configuration or a result names tells the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DESMEARED", "FRAME_MODELS", "MOUNTS", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """A kind of results.

    Attributes
    ----------
    operation
        What is done, as the metadata of a result say it.
    mount
        Under which path of the server its results lie.
    spec
        By which Tiled's client finds what reads them.
    needs_direct_beam
        Whether each run is paired with a direct beam.
    holds_curves
        Whether its results hold desmeared curves, as files for SasView and others do.
    compared
        A variable and its error, by which a result that was computed again is compared with the stored one.
    summary
        What the metadata of a complete result say of its good exposures: by key, the variable and ``median``, ``largest``
        or ``least``.
    desmears_with
        The method that desmears what this one makes, if the option ``method`` names no other; empty where nothing is desmeared
        afterwards.
    """

    operation: str
    mount: str
    spec: str
    needs_direct_beam: bool
    holds_curves: bool
    compared: tuple[str, str]
    summary: Mapping[str, tuple[str, str]] = field(hash=False)
    desmears_with: str = ""


DESMEARED = Kind(
    operation="desmear",
    mount="desmeared",
    spec="dsnet_desmeared",
    needs_direct_beam=True,
    holds_curves=True,
    compared=("I", "Idev"),
    summary={"chi2_median": ("chi2", "median"), "chi2_largest": ("chi2", "largest")},
)
"""Desmeared curves: what every method makes that `FRAME_MODELS` does not name."""

FRAME_MODELS: dict[str, Kind] = {
    "icosahedra": Kind(
        operation="size and orientation",
        mount="analysed",
        spec="dsnet_icosahedra",
        needs_direct_beam=False,
        holds_curves=False,
        compared=("radius", "radius_dev"),
        summary={"radius_median": ("radius", "median"), "score_median": ("score", "median"), "score_least": ("score", "least")},
    ),
    "symmetry-denoiser": Kind(
        operation="denoise",
        mount="analysed",
        spec="dsnet_denoised",
        needs_direct_beam=True,
        holds_curves=True,
        compared=("I", "Idev"),
        summary={
            "chi2_median": ("chi2", "median"),
            "chi2_largest": ("chi2", "largest"),
            "chi2_symmetry_median": ("chi2_symmetry", "median"),
            "chi2_rings_largest": ("chi2_rings", "largest"),
        },
        desmears_with="dsnet",
    ),
}
"""Methods that read frames: models of the registry of the same name answer for them."""

MOUNTS = tuple(dict.fromkeys(kind.mount for kind in (DESMEARED, *FRAME_MODELS.values())))
"""Paths under which results lie."""


def kind_of(method: str) -> Kind:
    """Return the kind of what a method makes, named with or without a version."""
    return FRAME_MODELS.get(method.partition(":")[0], DESMEARED)

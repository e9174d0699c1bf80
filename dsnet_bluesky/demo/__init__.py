"""Experiments on simulated instruments, live: from the plan to the figure.

Each runs against a real Tiled server and reads its results back from the catalog, as any user would.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from dsnet_bluesky.data import BadInput

__all__ = ["EXPERIMENTS", "run"]

EXPERIMENTS: Mapping[str, str] = MappingProxyType(
    {
        "desmearing": "the DSNet paper's silver behenate, desmeared while the plans run",
        "anisotropic": "a scan of weak anisotropic patterns, denoised: frames, orientations and sectors while it goes on",
        "icosahedra": "single shots of single particles: sizes and orientations while the run goes on",
    }
)
"""What there is to be seen, by the name of its module here."""


def run(experiment: str, *arguments: Any, **options: Any) -> Any:
    """Run an experiment; takes what `desmearing.run` takes, and returns what its module says.

    Raises
    ------
    BadInput
        If there is no such experiment.
    """
    if experiment not in EXPERIMENTS:
        raise BadInput(f"There is no experiment {experiment!r}; take {', '.join(EXPERIMENTS)}.")
    return import_module(f".{experiment}", __name__).run(*arguments, **options)

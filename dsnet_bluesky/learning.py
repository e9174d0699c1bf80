"""Training of a denoiser on runs of the catalog: their frames, masks and geometry, with the beam where its exposure shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .callbacks.desmear import MAX_BEAM_AGE
from .callbacks.exposures import exposures_of_documents
from .callbacks.pairing import DirectBeams, summed
from .data import BadInput
from .derived import mount
from .documents import Exposure
from .pipeline import Config
from .questions import Question
from .reduction import integrator
from .reduction.geometry import beam_pixel, static_mask
from .replay.selection import sample_runs
from .training.denoiser import DenoiserRecipe, train_denoiser

__all__ = ["ScanFrames", "frames_of_runs", "train_on_runs"]

NEAR = 0.25
"""In pixels: beam centres that differ by less are one; the network sees no difference."""


class ScanFrames(NamedTuple):
    """Frames of runs of one instrument."""

    counts: NDArray
    """Shape (exposure, y, x); negative where a pixel does not count."""
    centre: tuple[float, float]
    """The beam (y, x) in pixels."""
    mask: NDArray[np.bool_]
    """True where a pixel does not count, shape (y, x)."""
    runs: list[str]
    """Uids."""


def frames_of_runs(client: Any, questions: Sequence[Question] = ()) -> ScanFrames:
    """Read all exposures of the sample runs that fulfil some questions.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    questions
        Of `dsnet_bluesky.questions`: `Sample`, `OfRun`, `Between`.

    Raises
    ------
    BadInput
        If there are no such runs, a run has not ended, has no direct beam or cannot be read, or they are not of one
        detector position.
    """
    beams = DirectBeams(mount(client, "raw"), Config(method="map"), max_age=MAX_BEAM_AGE)
    places: dict[str, _Place] = {}
    frames, runs = [], []
    for uid, run in sample_runs(client, questions).items():
        if run.metadata.get("stop") is None:
            raise BadInput(f"Run {uid} has not ended in the catalog: train when it has, or leave it out of the query.")
        exposures = _of_one_detector(exposures_of_documents(run.documents()))
        for exposure in exposures:
            key = f"{uid} {json.dumps(_instrument(exposure), default=str)}"
            if key not in places:
                places[key] = _place(beams, exposure)
            frames.append(summed(exposure)[0])
        runs += [uid] if exposures else []
    if not frames:
        raise BadInput("The runs hold no exposure; look at client['raw'], or widen the query.")
    place = _only(list(places.values()), {frame.shape for frame in frames})
    return ScanFrames(np.stack(frames), place.centre, place.mask, runs)


def train_on_runs(
    client: Any,
    directory: str | Path,
    *,
    questions: Sequence[Question] = (),
    recipe: DenoiserRecipe | None = None,
    device: str = "cpu",
    notify: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train a denoiser on the frames of runs, and write the folder of the model; its card names the runs.

    Parameters
    ----------
    client, questions
        As of `frames_of_runs`.
    directory, recipe, device, notify
        As of `training.denoiser.train_denoiser`.

    Raises
    ------
    BadInput
        If the frames cannot be read or trained on, see both.
    """
    found = frames_of_runs(client, questions)
    return train_denoiser(
        found.counts,
        directory,
        centre=found.centre,
        mask=found.mask,
        recipe=recipe,
        runs=found.runs,
        device=device,
        notify=notify,
    )


class _Place(NamedTuple):
    """Where the beam meets the detector, and which pixels count."""

    centre: tuple[float, float]
    mask: NDArray[np.bool_]


def _of_one_detector(exposures: list[Exposure]) -> list[Exposure]:
    """Leave out other detectors than the first with images."""
    return [each for each in exposures if (each.stream, each.data_key) == (exposures[0].stream, exposures[0].data_key)]


def _instrument(exposure: Exposure) -> list[Any]:
    if exposure.instrument is None:
        raise BadInput(exposure.problem or f"The run {exposure.run_uid} recorded no geometry.")
    return [exposure.instrument.poni, exposure.instrument.mask]


def _place(beams: DirectBeams, exposure: Exposure) -> _Place:
    pairing, instrument = beams.find(exposure), exposure.instrument
    assert pairing is not None
    assert instrument is not None
    found = beams.exposed(pairing, instrument).found(Config(method="map"))
    ai = integrator(found.poni)
    return _Place(beam_pixel(ai), static_mask(ai, found.mask))


def _only(places: list[_Place], shapes: set[tuple[int, ...]]) -> _Place:
    """Return the one place of all runs; pixels count that count in each."""
    if len(shapes) > 1 or len({place.mask.shape for place in places}) > 1:
        raise BadInput(f"The runs have frames of {len(shapes)} shapes; choose those of one detector by the query.")
    centres = np.array([place.centre for place in places])
    if (np.ptp(centres, axis=0) > NEAR).any():
        low, high = centres.min(axis=0), centres.max(axis=0)
        raise BadInput(
            f"In these runs the beam meets the detector at (y, x) from ({low[0]:.1f}, {low[1]:.1f}) to ({high[0]:.1f}, "
            f"{high[1]:.1f}) pixels; choose those of one detector position by the query (since, until, run)."
        )
    y, x = centres.mean(axis=0)
    return _Place((float(y), float(x)), np.logical_or.reduce([place.mask for place in places]))

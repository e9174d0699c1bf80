"""Training of a denoiser on the frames of a scan: self-supervised, by the symmetry of the frames themselves.

No clean frame is needed (`denoising.likelihood`). Some frames are held out; the last network is kept
unless an earlier one surely makes their kept photons more likely. It becomes a model only if it does that better than a
Gaussian filter whose width was chosen on the same photons: trained too little, or on too few photons, a network is worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.network import check_device
from dsnet_bluesky.training.checkpoints import begin

from .card import write_model
from .recipe import DenoiserRecipe
from .scan import Scan, prepare_scan
from .steps import Training, schedule

__all__ = ["DenoiserRecipe", "Scan", "Training", "prepare_scan", "schedule", "train_denoiser"]

CHECKPOINT = "checkpoint.pt"
EVERY = 100
"""Steps between two looks at the held-out frames, and between two checkpoints."""


def train_denoiser(
    frames: ArrayLike,
    directory: str | Path,
    *,
    centre: tuple[float, float],
    mask: NDArray[np.bool_] | None = None,
    recipe: DenoiserRecipe | None = None,
    seed: int | None = None,
    runs: Sequence[str] = (),
    device: str = "cpu",
    notify: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train a denoiser on the frames of a scan and write the folder of the model.

    A training that was interrupted goes on from the checkpoint in `directory`.

    Parameters
    ----------
    frames
        Counts, shape (exposure, y, x); negative pixels (gaps) do not count.
    directory
        Where to write ``weights.safetensors``, ``model.toml``, ``README.md``, ``recipe.toml``, ``history.csv`` and
        ``history.png``.
    centre
        The beam (y, x) in pixels; the middle of the first pixel is at 0.5.
    mask
        True where a pixel does not count, shape (y, x).
    recipe
        Every number of the training; `DenoiserRecipe.of` gives that of the published variant.
    seed
        In place of the recipe's.
    runs
        Unique ids of the runs that the frames are of, for the card.
    device
        Any device of torch.
    notify
        Called now and then with what is done, how much there is to do, and a word about it.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    BadInput
        If the frames are too few, too weak or not symmetric about the centre, the directory holds a finished model or a
        checkpoint of another training, or the network became no better than a Gaussian filter (then no model is written).
    """
    check_device(device)
    recipe = recipe or DenoiserRecipe()
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    scan = prepare_scan(frames, centre, mask, seed=recipe.seed, held_out=recipe.held_out)
    directory = begin(directory)
    state = Training(recipe, scan, device)
    state.resume(directory / CHECKPOINT)
    while state.step < recipe.steps:
        state.advance(min(EVERY, recipe.steps - state.step))
        state.save(directory / CHECKPOINT)
        if notify is not None:
            look = state.history[-1]
            notify(look.step, recipe.steps, f"loss {look.training:.4g}, held out {look.held_out:.5g}")
    figures = state.judged()
    write_model(directory, state, figures, runs)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return directory

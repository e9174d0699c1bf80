"""Training of the model ``icosahedra``: images are simulated, exposed and augmented, and a network learns to read them.

Images are simulated once and kept (without noise, as the logarithm in half precision). Every epoch turns and mirrors them
anew, draws another dose and other noise, and changes a share of them by one of the eleven augmentations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsnet_bluesky.training.checkpoints import begin

from .card import figures_of, write_model
from .images import SPLITS, Images, make_images
from .recipe import Recipe
from .steps import Progress, Training

__all__ = ["CHECKPOINT", "Images", "Progress", "Recipe", "Training", "figures_of", "make_images", "train"]

CHECKPOINT = "checkpoint.pt"


def train(recipe: Recipe, directory: str | Path, *, device: str = "cpu", notify: Any = None) -> list[Progress]:
    """Train a network by its recipe and write the folder of the model.

    A training that was interrupted goes on from the checkpoint in `directory`; images are kept there too.

    Parameters
    ----------
    recipe
        What to do.
    directory
        Where to write ``weights.safetensors``, ``model.toml``, ``README.md``, ``recipe.toml``, ``history.csv``, ``history.png``.
    device
        Any device of torch.
    notify
        Called now and then with what is done, how much there is to do, and a word about it.

    Returns
    -------
    list of Progress
        The whole history.

    Raises
    ------
    BadInput
        If the directory holds a finished model, or images or a checkpoint of another recipe.
    """
    directory = begin(directory)
    say = notify or (lambda done, total, word: None)
    training, validation, test = (
        make_images(recipe, split, directory, device, lambda done, total, split=split: say(done, total, f"{split} images"))
        for split in SPLITS
    )
    state = Training(recipe, device)
    state.resume(directory / CHECKPOINT)
    words = "loss {:.4g}, validation {:.2%}, modulo the group {:.2%}, misorientation {:.2f} degrees"
    while len(state.history) < recipe.schedule.epochs:
        found = state.epoch(training, validation)
        state.save(directory / CHECKPOINT)
        say(found.epoch, recipe.schedule.epochs, words.format(*found[1:]))
    state.network.eval()
    write_model(directory, state, validation, test)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return state.history

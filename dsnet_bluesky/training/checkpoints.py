"""What all trainings keep on disk: recipes that can be read, a directory that holds no finished model, and checkpoints."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.versions import CARD

__all__ = ["begin", "load_checkpoint", "numbers_of", "reading", "resume_steps", "save_checkpoint", "save_steps"]


@contextmanager
def reading(example: str) -> Iterator[None]:
    """Say of a recipe that is read from TOML what is wrong with it, and which one to compare it with.

    Raises
    ------
    BadInput
        If it is not TOML, or a key is missing or unknown.
    """
    try:
        yield
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"The recipe cannot be read ({error}); compare it with {example}.") from error


def numbers_of(source: str) -> str:
    """Return a recipe without the words for its card: what a checkpoint depends on."""
    return source.partition("[card]")[0]


def begin(directory: str | Path) -> Path:
    """Make the directory of a training.

    Raises
    ------
    BadInput
        If it holds a finished model.
    """
    directory = Path(directory)
    if (directory / CARD).exists():
        raise BadInput(f"{directory} holds a finished model; give another directory, a released model is never changed.")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    with replacing(path) as partial:
        torch.save(content, partial)


def load_checkpoint(path: Path, recipe: str, device: str) -> dict[str, Any] | None:
    """Read a checkpoint, None if there is none.

    Parameters
    ----------
    path
        Of the checkpoint.
    recipe
        What its entry ``recipe`` must be.
    device
        Where its tensors go.

    Raises
    ------
    BadInput
        If the checkpoint was written by another recipe, or learned from other data.
    """
    if not path.exists():
        return None
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved["recipe"] != recipe:
        raise BadInput(f"{path} belongs to another recipe or other data; delete it or give another directory.")
    return saved


def save_steps(path: Path, training: Any, parts: Sequence[str], data: str = "") -> None:
    """Write the checkpoint of a training that counts steps.

    Parameters
    ----------
    path
        Of the checkpoint.
    training
        With `step`, `seconds`, `history` and `recipe`.
    parts
        Names of what of it has a state: networks, optimizers.
    data
        Digest of what it learns from, where the recipe does not say that.
    """
    states = {name: getattr(training, name).state_dict() for name in parts}
    history = [tuple(progress) for progress in training.history]
    about = {"step": training.step, "seconds": training.seconds, "history": history, "recipe": training.recipe.numbers + data}
    save_checkpoint(path, {**states, **about})


def resume_steps(path: Path, training: Any, parts: Sequence[str], progress: Callable[..., Any], data: str = "") -> None:
    """Let a training go on from the checkpoint of `save_steps`, if there is one.

    Parameters
    ----------
    path, training, parts, data
        As for `save_steps`.
    progress
        What an entry of `history` is.

    Raises
    ------
    BadInput
        If the checkpoint was written by another recipe.
    """
    saved = load_checkpoint(path, training.recipe.numbers + data, training.device)
    if saved is None:
        return
    for name in parts:
        getattr(training, name).load_state_dict(saved[name])
    training.step, training.seconds = saved["step"], saved["seconds"]
    training.history = [progress(*entry) for entry in saved["history"]]

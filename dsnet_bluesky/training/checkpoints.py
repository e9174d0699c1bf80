"""What both trainings keep on disk: a directory that holds no finished model, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.versions import CARD

__all__ = ["begin", "load_checkpoint", "save_checkpoint"]


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
        If the checkpoint was written by another recipe.
    """
    if not path.exists():
        return None
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved["recipe"] != recipe:
        raise BadInput(f"{path} belongs to another recipe; delete it or give another directory.")
    return saved

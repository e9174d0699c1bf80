"""Models of one's own, installed beside those that are released."""

from __future__ import annotations

import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dsnet_bluesky.data import BadInput

from .cards import CARD, WEIGHTS, CompleteCard, read_card
from .registry import EXECUTABLE, Model, load_model, open_model
from .shelves import ENVIRONMENT, folders, installation

__all__ = ["Installed", "install_model"]

PARTS = (WEIGHTS, "README.md", "recipe.toml", "history.csv", "history.png", CARD)
"""Files of a model; the card comes last, so that a folder with a card is complete."""

WORKSHOP = ("checkpoint.pt", "library.npz", "origin.json", "sessions")
"""What a training leaves beside its model; it is not installed."""


class Installed(NamedTuple):
    """What became of an installation."""

    model: Model
    """As it is installed."""
    new: bool
    """False if it had been there."""
    left_out: list[str]
    """What lay in the folder and is no part of a model."""


def install_model(path: str | Path) -> Installed:
    """Copy a model's folder to where ``NAME:VERSION`` finds it. It is there whole or not at all.

    Parameters
    ----------
    path
        The folder: card, weights and what a training writes beside them.

    Raises
    ------
    BadInput
        If something is wrong with the model, its version is there with other weights or another card, or it
        cannot be copied.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"{path} is no folder; give that of a model, which holds {CARD} and {WEIGHTS}.")
    model = open_model(path)
    left_out = sorted(entry.name for entry in path.iterdir() if entry.name not in PARTS)
    _refuse_executables(model, left_out)
    if (there := _same(model)) is not None:
        return Installed(there, False, left_out)
    open_model(path, CompleteCard)
    _copy(model)
    return Installed(load_model(model.reference), True, left_out)


def _refuse_executables(model: Model, others: list[str]) -> None:
    strange = [name for name in others if Path(name).suffix.lower() in EXECUTABLE and name not in WORKSHOP]
    if strange:
        raise BadInput(
            f"{model.path} holds {', '.join(strange)}: such files can run code when they are read, and no model needs them. "
            f"Remove them; weights are {WEIGHTS} alone."
        )


def _same(model: Model) -> Model | None:
    """Give the model that is there under this name and version; None if there is none, or a damaged copy that may be replaced."""
    folder = folders().get((model.name, model.version))
    if folder is None or _is_damaged_copy(folder, model):
        return None
    there = load_model(model.reference)
    if there.sha256 == model.sha256 and there.card == model.card:
        return there
    what = "other weights" if there.sha256 != model.sha256 else "another card"
    raise BadInput(
        f"{model.reference} is in {folder} already, with {what}. A version never changes: give the new one a version of its "
        f"own, in its {CARD}."
    )


def _is_damaged_copy(folder: Path, model: Model) -> bool:
    """Whether a folder is damaged, lies in the installation, and was to hold this model, as its card says."""
    try:
        load_model(model.reference)
    except BadInput as error:
        with suppress(BadInput):  # a card that cannot be read shows nothing
            if folder.parent == installation() and read_card(folder) == model.card:
                return True
        raise BadInput(
            f"{model.reference} is in {folder} already, damaged, and nothing shows that it was the same model. Remove that "
            f"folder, then install this one. ({error})"
        ) from error
    return False


def _copy(model: Model) -> None:
    root = installation()
    target = root / f"{model.name}-{model.version}"
    partial = root / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    damaged = partial.with_suffix(".damaged")
    try:
        partial.mkdir(parents=True)
        for name in PARTS:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, partial / name)
                (partial / name).chmod(0o444)  # a version never changes
        open_model(partial, CompleteCard)
        if _same(model) is None:  # nobody was faster
            if target.exists():
                target.rename(damaged)
            partial.rename(target)
    except OSError as error:
        raise BadInput(f"The model cannot be copied to {target} ({error}); {ENVIRONMENT} names another directory.") from error
    finally:
        for rest in (partial, damaged):
            shutil.rmtree(rest, ignore_errors=True)

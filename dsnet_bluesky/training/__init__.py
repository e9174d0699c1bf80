"""Training: from a recipe to the folder of a released model.

A recipe (TOML) holds every number of a training. `train` follows it and writes a folder with
the weights, a card in TOML and in Markdown, the recipe itself and the history. An interrupted
training goes on from its last checkpoint. There are three kinds of recipes: `paper`, for the published
DSNet, `unrolled`, for the network of dsnet 2, which has sessions, and `icosahedra`, which has a simulator.
A denoiser (`denoiser`) learns from the frames of a scan, not by a recipe alone: `denoiser.train_denoiser`.

Making curves needs sasmodels: ``pip install dsnet-bluesky[train]``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.versions import load_model

from . import icosahedra, paper, recipes, unrolled
from .checkpoints import begin
from .machine import hardware

__all__ = ["hardware", "load_recipe", "train"]

Recipe = paper.Recipe | recipes.Recipe | icosahedra.Recipe
Notify = Callable[[int, int, str], None]


def load_recipe(recipe: str | Path) -> Recipe:
    """Read the recipe of a released model (by name, ``"dsnet"``) or of a file.

    Raises
    ------
    BadInput
        If there is no such model or file, or it is not a recipe.
    """
    path = Path(recipe)
    if not path.is_file():
        path = load_model(str(recipe)).path / "recipe.toml"
        if not path.is_file():
            raise BadInput(f"{recipe} was installed without its recipe, {path.name}; give the file of a recipe.")
    text = path.read_text(encoding="utf-8")
    if "[simulator]" in text:
        return icosahedra.Recipe.parse(text)
    return recipes.Recipe.parse(text) if "sessions" in text else paper.Recipe.parse(text)


def train(recipe: Recipe | str | Path, directory: str | Path, *, device: str = "cpu", notify: Notify | None = None) -> Path:
    """Train a network by its recipe and write the folder of the model.

    Parameters
    ----------
    recipe
        A recipe, the name of a released model, or the path of a recipe.
    directory
        Where to write; an interrupted training there goes on.
    device
        ``"cpu"``, ``"cuda"`` or any other device of torch.
    notify
        Called now and then with what is done, how much there is to do, and a word about it.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    BadInput
        If the directory holds a finished model or a checkpoint of another recipe, or sasmodels is not installed.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    directory = begin(directory)
    if isinstance(recipe, paper.Recipe):
        say = notify or (lambda done, total, word: None)
        words = "loss {:.4g}, validation {:.4g}"
        paper.train(
            recipe, directory, device=device, progress=lambda e, n: say(e.epoch, n, words.format(e.training, e.validation))
        )
    elif isinstance(recipe, icosahedra.Recipe):
        icosahedra.train(recipe, directory, device=device, notify=notify)
    else:
        unrolled.train(recipe, directory, device=device, notify=notify)
    return directory

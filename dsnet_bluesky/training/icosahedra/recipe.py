"""Recipes of the model ``icosahedra``: every number of a training."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import Any, Self

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.icosahedra.model import simulator_from
from dsnet_bluesky.icosahedra.network import LOSSES, NetworkConfig
from dsnet_bluesky.training.checkpoints import numbers_of, reading

__all__ = ["DataRecipe", "Recipe", "Schedule"]


@dataclass(frozen=True)
class DataRecipe:
    """Which images to train on.

    Parameters
    ----------
    training, validation, test
        How many images.
    beyond
        How far the radii of training go beyond the range of the model at both ends, in nm.
    peak
        Photons in the brightest pixel, from and to, drawn uniformly in their logarithm; one photon per pixel is background.
    augmented
        Share of training images that are changed by an augmentation.
    """

    training: int
    validation: int
    test: int
    beyond: float
    peak: tuple[float, float]
    augmented: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, the learning rate falling as a cosine."""

    loss: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """Every number of a training, and the words for its card."""

    name: str
    version: str
    licence: str
    seed: int
    architecture: NetworkConfig
    simulator: dict[str, Any]
    data: DataRecipe
    schedule: Schedule
    card: dict[str, Any]
    source: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from TOML.

        Raises
        ------
        BadInput
            If it is not TOML, or a key is missing or unknown.
        """
        with reading("models/icosahedra-1.0.0/recipe.toml"):
            values = tomllib.loads(text)
            data = values.pop("data")
            data["peak"] = tuple(data["peak"])
            recipe = cls(
                architecture=NetworkConfig.from_dict(values.pop("architecture")),
                data=DataRecipe(**data),
                schedule=Schedule(**values.pop("schedule")),
                source=text,
                **values,
            )
        if recipe.schedule.loss not in LOSSES:
            raise BadInput(f"There is no loss {recipe.schedule.loss!r}; take {' or '.join(LOSSES)}.")
        simulator_from(recipe.simulator)
        return recipe

    @property
    def numbers(self) -> str:
        """The recipe without the words for its card: what a checkpoint depends on."""
        return numbers_of(self.source)

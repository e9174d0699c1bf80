"""Recipes of the unrolled network: every number of a training."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import Any, Self

from dsnet_bluesky.unrolled import UnrolledConfig

from .checkpoints import numbers_of, reading

__all__ = ["DataRecipe", "Recipe", "Schedule"]


@dataclass(frozen=True)
class DataRecipe:
    """How many sessions, of how many curves, on how many points."""

    sessions: int
    curves: int
    validation_sessions: int
    validation_curves: int
    repeats: int
    points: tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW: each sees `batch` curves of one session; the step size falls as a cosine to a hundredth."""

    steps: int
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
    architecture: UnrolledConfig
    data: DataRecipe
    schedule: Schedule
    card: dict[str, Any]
    source: str = field(repr=False)
    begin: str = ""
    """Model whose weights are the first, such as ``dsnet:2.0.0``; random ones if not given."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from TOML.

        Raises
        ------
        BadInput
            If it is not TOML, or a key is missing or unknown.
        """
        with reading("models/dsnet-2.0.0/recipe.toml"):
            values = tomllib.loads(text)
            data = values.pop("data")
            data["points"] = tuple(data["points"])
            return cls(
                architecture=UnrolledConfig.from_dict(values.pop("architecture")),
                data=DataRecipe(**data),
                schedule=Schedule(**values.pop("schedule")),
                source=text,
                **values,
            )

    @property
    def numbers(self) -> str:
        """The recipe without the words for its card: what a checkpoint depends on."""
        return numbers_of(self.source)

    @property
    def origin(self) -> dict[str, Any]:
        """What the library and each session depend on; more of them may be made, and others learn from them."""
        data = self.data
        return {
            "seed": self.seed,
            "curves": data.curves,
            "validation_curves": data.validation_curves,
            "points": list(data.points),
        }

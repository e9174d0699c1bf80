"""Recipe of a denoiser: every number of its training."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from dsnet_bluesky.denoising.network import DenoiserConfig
from dsnet_bluesky.training.checkpoints import reading
from dsnet_bluesky.versions.readme import to_toml

__all__ = ["DenoiserRecipe"]


@dataclass(frozen=True)
class DenoiserRecipe:
    """Every number of a training.

    Parameters
    ----------
    name, version, licence
        Of the model.
    seed
        Of everything that is drawn.
    steps, batch, crop
        Steps, frames a step, and rows and columns that are cut out of each.
    learning_rate
        The highest, of Adam; it rises, then falls as a cosine.
    held_out
        Part of the frames that are held out.
    architecture
        Shape of the network, and the variant.
    """

    name: str = "symmetry-denoiser"
    version: str = "1.0.0"
    licence: str = "BSD-3-Clause"
    seed: int = 1
    steps: int = 2400
    batch: int = 8
    crop: int = 96
    learning_rate: float = 3e-3
    held_out: float = 0.15
    architecture: DenoiserConfig = field(default_factory=DenoiserConfig)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from TOML.

        Raises
        ------
        BadInput
            If it is not TOML, or a key is unknown.
        """
        with reading("recipe.toml of a trained denoiser"):
            values = tomllib.loads(text)
            return cls(architecture=DenoiserConfig.from_dict(values.pop("architecture")), **values)

    @property
    def source(self) -> str:
        """The recipe as TOML; it holds no words for a card."""
        plain = {**asdict(self), "architecture": self.architecture.to_dict()}
        return to_toml(plain)

    @property
    def numbers(self) -> str:
        """What a checkpoint depends on."""
        return self.source

    @classmethod
    def of(cls, variant: str, **changes: Any) -> Self:
        """Give the default of a variant, with changes; the published one learns with Adam's 1e-3 from whole halves."""
        architecture = DenoiserConfig.of(variant)  # type: ignore[arg-type]
        published = {"learning_rate": 1e-3, "batch": 8} if variant == "paper" else {}
        return cls(architecture=architecture, **{**published, **changes})

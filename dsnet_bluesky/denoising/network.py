"""The U-Net that denoises frames, in the size that one scan can train and in about the published one.

This module knows tensors only: no frames, no symmetry, no files.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.network import Network

__all__ = ["DenoiserConfig", "UNet", "Variant"]

Variant = Literal["symmetry", "paper"]

ALIVE = 0.1
"""First bias of the published variant's output: a ReLU that is zero everywhere learns nothing."""

SLOPE = 0.1
"""Of the activation below zero."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a network.

    Parameters
    ----------
    channels
        Channels of each level of the U-Net, from full resolution to the bottom; every level has half the rows and columns.
    inputs, outputs
        Channels that it is given, and that it answers.
    variant
        ``"symmetry"``, or ``"paper"`` for the published algorithm (`denoising.paper`).
    product_mask
        Of the published algorithm: whether pixels are left out unless both mates have counts.
    """

    channels: tuple[int, ...] = (16, 24, 32, 48)
    inputs: int = 8
    outputs: int = 7
    variant: Variant = "symmetry"
    product_mask: bool = False

    @classmethod
    def of(cls, variant: Variant) -> Self:
        """Give the default of a variant.

        Raises
        ------
        BadInput
            If there is no such variant.
        """
        if variant not in get_args(Variant):
            raise BadInput(f"There is no variant {variant!r} of the denoiser; they are {', '.join(get_args(Variant))}.")
        if variant == "symmetry":
            return cls()
        return cls(channels=(35, 70, 140, 275), inputs=1, outputs=1, variant="paper", product_mask=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values, as a card or a recipe holds them."""
        named = {name: values[name] for name in ("inputs", "outputs", "variant", "product_mask")}
        return cls(channels=tuple(values["channels"]), **named)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as a card or a recipe holds them."""
        return {**asdict(self), "channels": list(self.channels)}


class UNet(Network):
    """A U-Net: two convolutions of 3 x 3 a level, skips that are joined.

    Parameters
    ----------
    config
        Its shape.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((config.inputs, *widths), widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(widths[0], config.outputs, 1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # a third faster on a CPU
        nn.init.constant_(self.head.bias, ALIVE if config.variant == "paper" else 0.0)  # type: ignore[arg-type]
        if config.variant == "symmetry":
            nn.init.zeros_(self.head.weight)  # the first answer is the mean of its views

    @property
    def stride(self) -> int:
        """What rows and columns are padded to a multiple of."""
        return 2 ** (len(self.config.channels) - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Answer, without an output function.

        Parameters
        ----------
        images
            Shape (batch, inputs, y, x), any y and x; padded with zeros inside.

        Returns
        -------
        Tensor
            Shape (batch, outputs, y, x).
        """
        rows, columns = images.shape[-2:]
        x = functional.pad(images, (0, -columns % self.stride, 0, -rows % self.stride))
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.avg_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in reversed(self.up):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([skips.pop(), x], dim=1))
        return self.head(x)[:, :, :rows, :columns]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.LeakyReLU(SLOPE),
    )

"""The network that reads an image of an icosahedron: a residual network (Stielow et al., 2020).

A convolution of 7 x 7 with stride 2, a maximum over 2 x 2, then 3, 4, 6 and 4 blocks of two convolutions with 64, 128, 256 and
512 filters, shortcuts of 1 x 1 where the size changes, the mean over the image, and five outputs through tanh: the quaternion
in the fundamental domain, and the radius. 26.0 million parameters; at a quarter of the width 1.6 million.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.network import Network

from .rotations import IMAGINARY, REAL, nearest, reduced

__all__ = ["LOSSES", "RADIUS", "Answer", "NetworkConfig", "ResNet", "relative_errors"]

RADIUS = (30.0, 160.0)
"""Range of radii in nm."""

CENTRE = (sum(REAL) / 2, 0.0, 0.0, 0.0, sum(RADIUS) / 2)
RANGE = (REAL[1] - REAL[0], 2 * IMAGINARY, 2 * IMAGINARY, 2 * IMAGINARY, RADIUS[1] - RADIUS[0])

MARGIN = 1.25
"""Range of the outputs in ranges of the parameters: tanh is flat at its ends, and an answer may lie a little outside."""


class Answer(NamedTuple):
    """What a network says of images."""

    radius: Tensor
    """In nm, shape (...)."""
    quaternion: Tensor
    """(w, x, y, z), shape (..., 4), of any length near 1."""


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network.

    Parameters
    ----------
    width
        Factor on the published numbers of filters.
    blocks
        Blocks of each stage; each stage has twice the filters of the one before.
    """

    width: float = 1.0
    blocks: tuple[int, ...] = (3, 4, 6, 4)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values, as a card or a recipe holds them."""
        return cls(width=float(values["width"]), blocks=tuple(values["blocks"]))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as a card or a recipe holds them."""
        return {**asdict(self), "blocks": list(self.blocks)}

    @property
    def filters(self) -> tuple[int, ...]:
        """Filters of each stage.

        Raises
        ------
        BadInput
            If the width leaves no filter.
        """
        first = round(64 * self.width)
        if first < 1:
            raise BadInput(f"A width of {self.width:g} leaves no filter; the published width is 1, the smallest 1/64.")
        return tuple(first * 2**stage for stage in range(len(self.blocks)))


PUBLISHED = NetworkConfig()
"""Shape of the published network."""


class ResNet(Network):
    """Read radius and orientation from images.

    Parameters
    ----------
    config
        Its shape.
    """

    def __init__(self, config: NetworkConfig = PUBLISHED) -> None:
        super().__init__()
        self.config, filters = config, config.filters
        self.stem = nn.Sequential(
            nn.Conv2d(1, filters[0], 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(filters[0]), nn.ReLU(), nn.MaxPool2d(2)
        )
        layers: list[nn.Module] = []
        inputs = filters[0]
        for stage, (outputs, count) in enumerate(zip(filters, config.blocks, strict=True)):
            for number in range(count):
                layers.append(Block(inputs, outputs, 2 if stage and not number else 1))
                inputs = outputs
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, 5)

    def forward(self, image: Tensor) -> Tensor:
        """Answer in units of the outputs.

        Parameters
        ----------
        image
            Standardised logarithms, shape (image, y, x).

        Returns
        -------
        Tensor
            Between -1 and 1, shape (image, 5): w, x, y, z and the radius, each from its centre, in `MARGIN` half ranges.
        """
        return torch.tanh(self.head(self.stages(self.stem(image[:, None])).mean(dim=(-2, -1))))

    def answer(self, image: Tensor) -> Answer:
        """Answer in nm and as quaternions, for standardised logarithms, shape (image, y, x)."""
        return decoded(self(image).float())


class Block(nn.Module):
    """Two convolutions that are added to what came in.

    Parameters
    ----------
    inputs, outputs
        Channels.
    stride
        Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map features, shape (image, channels, y, x)."""
        inner = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


def decoded(output: Tensor) -> Answer:
    """Give outputs, shape (..., 5), in nm and as quaternions."""
    values = output * output.new_tensor(RANGE) * (MARGIN / 2) + output.new_tensor(CENTRE)
    return Answer(values[..., 4], values[..., :4])


def relative_errors(answer: Answer, truth: Answer, *, symmetric: bool = False) -> Tensor:
    """Errors of the five parameters, each in its range, shape (..., 5).

    Parameters
    ----------
    answer
        Of the network.
    truth
        True values.
    symmetric
        Compare with the true quaternion's equivalent that is nearest to the answer, in place of that in the fundamental domain.
    """
    expected = nearest(truth.quaternion, answer.quaternion) if symmetric else reduced(truth.quaternion)
    away = torch.cat([answer.quaternion - expected, (answer.radius - truth.radius)[..., None]], dim=-1)
    return away / away.new_tensor(RANGE)


def paper_loss(answer: Answer, truth: Answer) -> Tensor:
    """Mean squared relative error, the quaternion in the fundamental domain."""
    return relative_errors(answer, truth).square().mean()


def symmetric_loss(answer: Answer, truth: Answer) -> Tensor:
    """Mean absolute error from the nearest equivalent, rounded off at a hundredth: radius and x, y, z in their ranges, w as x.

    On the boundary of the fundamental domain two far quaternions are the same orientation; either is right here. In its own
    range, which is narrow, w would draw answers back into the domain.
    """
    errors = relative_errors(answer, truth, symmetric=True)
    errors = errors * errors.new_tensor([RANGE[0] / RANGE[1], 1, 1, 1, 1])
    return functional.smooth_l1_loss(errors, torch.zeros_like(errors), beta=0.01)


LOSSES = {"paper": paper_loss, "symmetric": symmetric_loss}
"""Losses by name."""

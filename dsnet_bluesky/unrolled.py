"""The network of dsnet 2: U-Nets with the exact operator between them.

The first U-Net sees what classical iterations make of a measurement (`features`) and proposes a
curve. The proposal is smeared with the true R; the second U-Net sees what that leaves over, and what
a further exact step would change, and gives the answer and its error. This is an unrolled
iteration (J. Adler, O. Oktem, IEEE Trans. Med. Imaging 37 (2018) 1322, doi:10.1109/TMI.2018.2799231)
of two steps. A network of one U-Net, which is faster, answers with the proposal. The network works on
q_calc of whatever operator it is handed; it knows no grid and no kernel of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import BadInput
from .features import CHANNELS, CLIP, Features, Operator, residual, step
from .network import Network

__all__ = ["Answer", "Unrolled", "UnrolledConfig"]

BETWEEN = 5
"""Channels that the second U-Net has beyond those of the first, apart from the hidden ones."""

SMALLEST, LARGEST = -9.0, 1.5
"""Range of ln of the error of ln I."""


@dataclass(frozen=True)
class UnrolledConfig:
    """Shape of the network.

    Parameters
    ----------
    channels
        Channels of each level of a U-Net; every level has half the points of the one above.
    kernel
        Width of the convolutions, odd.
    hidden
        Channels that the first U-Net hands to the second, if there is one.
    unets
        How many U-Nets there are, 1 or 2.

    Raises
    ------
    BadInput
        If `unets` is neither 1 nor 2.
    """

    channels: tuple[int, ...] = (32, 48, 64, 96, 128)
    kernel: int = 5
    hidden: int = 8
    unets: int = 2

    def __post_init__(self) -> None:
        if self.unets not in (1, 2):
            raise BadInput(f"A network of dsnet has one U-Net or two, not {self.unets}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values, as a card or a recipe holds them."""
        unets = values.get("unets", 2)  # older cards do not say
        return cls(channels=tuple(values["channels"]), kernel=values["kernel"], hidden=values["hidden"], unets=unets)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as a card or a recipe holds them."""
        return {**asdict(self), "channels": list(self.channels)}


class Answer(NamedTuple):
    """What the network makes of a batch of curves, on q_calc."""

    first: Tensor
    """ln I proposed by the first U-Net, shape (exposure, m)."""
    ln_I: Tensor
    """ln I, shape (exposure, m)."""
    ln_error: Tensor
    """ln of one standard deviation of ln I, shape (exposure, m)."""
    deep: Tensor
    """Activations at the bottom of the last U-Net, averaged over q, shape (exposure, channel)."""
    ln_share: Tensor
    """ln of the part of that standard deviation that the noise of the measurement makes, shape (exposure, m)."""
    ln_resolved: Tensor
    """ln of the resolution that is left, in widths of R and a step, shape (exposure, m)."""


class Unrolled(Network):
    """The network.

    Parameters
    ----------
    config
        Its shape.
    """

    def __init__(self, config: UnrolledConfig | None = None) -> None:
        super().__init__()
        self.config = config or UnrolledConfig()
        two, hidden = self.config.unets == 2, self.config.hidden
        self.propose = UNet(CHANNELS, 2 + hidden if two else 3, self.config)
        self.refine = UNet(CHANNELS + BETWEEN + hidden, 3, self.config) if two else None
        width = self.config.channels[0]
        self.split = nn.Sequential(nn.Conv1d(width + 1, width, 1), nn.SiLU(), nn.Conv1d(width, 2, 1))

    def forward(self, operator: Operator, features: Features) -> Answer:
        """Desmear a batch of curves of one operator."""
        first, answer, ln_error, deep, seen = self._answer(operator, features)
        return Answer(first, answer, ln_error, deep, *self.parts(seen))

    def _answer(self, operator: Operator, features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        start, indirect = features.start, features.indirect
        out, deep, shallow = self.propose(features.channels)
        first = answer = blend(start + out[:, 0], indirect, out[:, 1] - 1)
        if self.refine is not None:
            with torch.autocast(first.device.type, enabled=False):  # residuals of half precision would drown the measurement's
                seen = between(operator, features, first)
            out, deep, shallow = self.refine(torch.cat([features.channels, seen, out[:, 2:]], dim=1))
            answer = blend(first + 0.3 * out[:, 0], indirect, out[:, 1] - 2)
        ln_error = (out[:, 2] - 2).clamp(SMALLEST, LARGEST)
        # What error and resolution are made of is learned last, and must not disturb the answer.
        return first, answer, ln_error, deep, torch.cat([shallow, ln_error[:, None]], dim=1).detach()

    def parts(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Give `ln_share` and `ln_resolved` of an answer from what `seen_by_split` tells."""
        out = self.split(seen)
        return functional.logsigmoid(out[:, 0] + 2), out[:, 1].clamp(-4, 4)

    def seen_by_split(self, operator: Operator, features: Features) -> Tensor:
        """Give the input of the head for parts, shape (exposure, channel, m)."""
        return self._answer(operator, features)[4]


def blend(proposed: Tensor, indirect: Tensor, gate: Tensor) -> Tensor:
    """Go from a proposal to the indirect transform as the gate opens: a finite particle is best left to it."""
    return proposed + torch.sigmoid(2 * gate) * (indirect - proposed)


def between(operator: Operator, features: Features, ln_I: Tensor) -> Tensor:
    """Show a proposal and what the exact operator says of it, shape (exposure, BETWEEN, m)."""
    further = step(operator, step(operator, ln_I, features.I, features.Idev), features.I, features.Idev)
    columns = [
        (ln_I - features.start).clamp(-CLIP, CLIP),
        (ln_I - features.indirect).clamp(-CLIP, CLIP),
        residual(operator, ln_I, features.I, features.Idev),
        (further - ln_I).clamp(-CLIP, CLIP),
        functional.pad(ln_I.diff(n=2), (1, 1)).clamp(-2, 2),
    ]
    return torch.stack(columns, dim=1)


class Conv(nn.Conv1d):
    """A convolution over q of (exposure, channel, 1, m): several images with channels last are faster by a quarter on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        return functional.conv2d(input, self.weight[:, :, None], self.bias, (1, *self.stride), (0, *self.padding))  # type: ignore[arg-type]


class Block(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.one = Conv(channels, channels, kernel, padding=kernel // 2)
        self.two = Conv(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the input what the convolutions make of it."""
        return x + self.two(functional.silu(self.one(functional.silu(x)), inplace=True))


class UNet(nn.Module):
    """A U-Net over q; outputs in single precision, the mean of its bottom, and its last activations."""

    def __init__(self, inputs: int, outputs: int, config: UnrolledConfig) -> None:
        super().__init__()
        widths = config.channels
        pairs = list(itertools.pairwise(widths))
        self.stem = Conv(inputs, widths[0], config.kernel, padding=config.kernel // 2)
        self.down = nn.ModuleList(Block(width, config.kernel) for width in widths)
        self.pool = nn.ModuleList(Conv(upper, lower, 2, stride=2) for upper, lower in pairs)
        self.lift = nn.ModuleList(Conv(lower, upper, 1) for upper, lower in pairs)
        self.up = nn.ModuleList(Block(width, config.kernel) for width in widths[:-1])
        self.out = Conv(widths[0], outputs, 1)
        nn.init.normal_(self.out.weight, std=1e-3)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        self.factor = 2 ** (len(widths) - 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give (exposure, outputs, m), the mean of the bottom (exposure, channel), and what the outputs are made of."""
        points = x.shape[-1]
        x = functional.pad(x, (0, -points % self.factor))[:, :, None]
        x = self.stem(x.contiguous(memory_format=torch.channels_last) if len(x) > 1 else x)
        kept = []
        for down, pool in zip(self.down[:-1], self.pool, strict=True):
            x = down(x)
            kept.append(x)
            x = pool(x)
        x = self.down[-1](x)
        deep = x.float().mean(dim=(2, 3))
        for lift, up, skip in zip(reversed(self.lift), reversed(self.up), reversed(kept), strict=True):
            x = up(skip + functional.interpolate(lift(x), scale_factor=(1.0, 2.0)))
        with torch.autocast(x.device.type, enabled=False):
            last = functional.silu(x.float())[..., :points]
            return self.out(last)[:, :, 0], deep, last[:, :, 0]

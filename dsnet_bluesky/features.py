"""What a network is told about a measurement: everything it knows of the instrument comes from R itself.

A network that is to desmear with any operator must not see its form. It sees what
exact applications of R and of its adjoint make of the curve: the answers of a few classical
iterations, what they leave over when smeared again, the indirect transform, and the local widths.
All of it is free of units: q enters in local steps, I in ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .desmearing.kernels import straightened, widths_below
from .indirect import IndirectLadder
from .smearing import Smearing

__all__ = ["CHANNELS", "INPUTS", "VERSION", "Features", "Operator", "features_of", "residual", "step"]

VERSION = 2
"""Counted up whenever the numbers change: weights know no other features than those that they were trained on."""

CHANNELS = 19
"""Number of channels of `Features.channels`."""

MEANINGS = (
    (1, "ln I after 20 steps of Richardson and Lucy's iteration, less its mean over the measured range, over 4"),
    (4, "what differs from it in ln I: the smoothed measurement, 5 steps, Lake's iteration, the indirect transform"),
    (4, "(I - R exp(ln I)) / Idev of the smoothed measurement, 5 and 20 steps and the indirect transform, inverse sinh, over 2"),
    (1, "ln of the relative noise, over 4"),
    (3, "ln of the indirect transform's deviation and of its chi2, over 4, and its rank"),
    (2, "ln of the standard deviation of R in steps of q_calc, in all and towards lower q, over 2"),
    (2, "ln of the step and of the standard deviation of R over q, over 4"),
    (2, "whether a node is near a measured point, and whether R sees it"),
)
"""Channels of `Features.channels` in their order: how many, and what they hold."""

INPUTS: dict[str, Any] = {
    "summary": "Each node of q_calc is described by what exact applications of the smearing operator R and of its adjoint make "
    "of the measured curve, and by R itself. Nothing has a unit: q enters in local steps, I in ratios.",
    "dims": ["curve", "channel", "node of q_calc"],
    "channels": CHANNELS,
    "meanings": [f"{count}: {words}" for count, words in MEANINGS],
    "units": {"q": "1/nm", "I": "any unit, of any sign", "Idev": "the unit of I (one standard deviation)"},
}
"""What the card of a model says of these features, see `versions.cards.Inputs`."""

RICHARDSON_LUCY = (5, 20)
"""Steps after which the iteration is shown to the network."""

LAKE_STEPS = 3

NOTHING = 1e-20
"""Elements of R below this weigh nothing, and as subnormal numbers make products ten times slower."""

HALVES = (0, 1, 4, 13, 40, 121)
"""Windows of 2 half + 1 points, each three times as wide as the one before."""

CLIP = 8.0
"""Logarithms of ratios are shown up to here."""


TENSORS = ("matrix", "seen", "visible", "left", "fraction", "measured", "beyond", "tail", "local", "unit", "place")
"""Names of what an `Operator` computes."""


class Operator:
    """A smearing operator on a device, with all that depends on it alone.

    Parameters
    ----------
    smearing
        The operator.
    device
        Any device of torch.
    transform
        Whether the indirect transform is prepared too; features need it, a network does not.

    Attributes
    ----------
    matrix
        R for smooth curves (see `desmearing.kernels.straightened`), shape (n, m).
    measured
        1 at nodes of q_calc that a measured point is near, else 0, shape (m,).
    local
        Channels that depend on the instrument only, shape (4, m).
    unit
        Width of R towards lower q (see `desmearing.kernels.widths_below`) with a step of the grid, in 1/nm, shape (m,):
        what resolutions are told in.
    place
        q_calc counted in these units, shape (m,).
    """

    def __init__(self, smearing: Smearing, device: str | torch.device = "cpu", *, transform: bool = True) -> None:
        self.smearing = smearing
        self.device = torch.device(device)
        q, nodes = smearing.q, smearing.q_calc
        matrix = smearing.matrix @ straightened(smearing, np.eye(nodes.size))
        matrix[np.abs(matrix) < NOTHING] = 0.0
        self.matrix = self.tensor(matrix)
        seen = matrix.sum(axis=0)
        self.seen = self.tensor(np.maximum(seen, 1e-3))
        self.visible = self.tensor((seen > 1e-3).astype(float))
        right = np.clip(np.searchsorted(q, nodes), 1, q.size - 1)
        self.left = torch.as_tensor(right - 1, device=self.device)
        self.fraction = self.tensor(np.clip((nodes - q[right - 1]) / (q[right] - q[right - 1]), 0, 1))
        step = np.gradient(nodes)
        near = np.minimum(np.abs(nodes - q[right - 1]), np.abs(nodes - q[right])) < 0.6 * np.maximum(step, 1e-12)
        self.measured = self.tensor(near.astype(float))
        self.beyond = self.tensor(np.log(np.maximum(nodes, q[-1]) / q[-1]))
        last = max(5, q.size // 10)
        self.tail = self.tensor(_slope(np.log(np.maximum(q[-last:], 1e-12))))
        below = np.interp(nodes, q, widths_below(smearing))
        self.local = self.tensor(self._local(below, step))
        unit = np.hypot(below, step)  # a slit's length resolves far better than it is long
        self.unit = self.tensor(unit)
        self.place = self.tensor(np.concatenate([[0.0], np.cumsum(2 * np.diff(nodes) / (unit[1:] + unit[:-1]))]))
        self.ladder = IndirectLadder(q, nodes, matrix, self.device) if transform else None

    @classmethod
    def from_tensors(cls, smearing: Smearing, tensors: Mapping[str, Tensor], device: str | torch.device = "cpu") -> Operator:
        """Build from what `tensors` gave, without the indirect transform: a training loads thousands of operators."""
        operator = cls.__new__(cls)
        operator.smearing, operator.device, operator.ladder = smearing, torch.device(device), None
        for name in TENSORS:
            setattr(operator, name, tensors[name].to(operator.device))
        return operator

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that depends on the operator, but for the indirect transform."""
        return {name: getattr(self, name) for name in TENSORS}

    def _local(self, below: NDArray, step: NDArray) -> NDArray:
        """Widths of R in steps of q_calc, in all and towards lower q, and steps and widths against q."""
        nodes = self.smearing.q_calc
        both = np.interp(nodes, self.smearing.q, self.smearing.widths)
        return np.array(
            [
                np.log(both / step + 0.1) / 2,
                np.log(below / step + 0.1) / 2,
                np.log(step / (nodes + step)) / 4,
                np.log(both / (nodes + step) + 1e-3) / 4,
            ]
        )

    def tensor(self, values: Any) -> Tensor:
        """Copy an array onto the device, in single precision."""
        return torch.tensor(np.asarray(values), dtype=torch.float32, device=self.device)

    def to_nodes(self, values: Tensor) -> Tensor:
        """Interpolate curves on q, shape (..., n), to q_calc, shape (..., m); constant beyond the ends."""
        low, high = values[..., self.left], values[..., self.left + 1]
        return low + (high - low) * self.fraction

    def apply(self, I: Tensor) -> Tensor:
        """Smear curves on q_calc, shape (..., m), to q, shape (..., n)."""
        return I @ self.matrix.T


class Features(NamedTuple):
    """What the network is given for a batch of curves."""

    channels: Tensor
    """Shape (exposure, CHANNELS, m)."""
    start: Tensor
    """ln I on q_calc after the Richardson-Lucy steps, from which corrections are counted, shape (exposure, m)."""
    indirect: Tensor
    """ln I on q_calc by the indirect transform, shape (exposure, m)."""
    I: Tensor
    """Measured curve over `scale`, shape (exposure, n)."""
    Idev: Tensor
    """Its standard deviation over `scale`, shape (exposure, n)."""
    scale: Tensor
    """What intensities were divided by, shape (exposure, 1)."""


def features_of(operator: Operator, I: NDArray | Tensor, Idev: NDArray | Tensor) -> Features:
    """Compute the features of curves.

    Parameters
    ----------
    operator
        The operator that smeared them.
    I, Idev
        Measured curves and their standard deviations, shape (exposure, n), of any sign and scale.
    """
    wide = {"dtype": torch.float64, "device": operator.device}
    I, Idev = torch.as_tensor(I, **wide), torch.as_tensor(Idev, **wide)
    scale = I.abs().mean(dim=-1, keepdim=True) + Idev.mean(dim=-1, keepdim=True)
    assert operator.ladder is not None
    indirect = operator.ladder(I / scale, Idev / scale)
    y, sigma = (I / scale).float(), (Idev / scale).float()
    smooth = start_curve(y, sigma)
    begin = _extended(operator, smooth)
    lake = _lake(operator, begin, y, sigma)
    lucy = _richardson_lucy(operator, begin, y, sigma)
    last = lucy[-1]
    rows = [residual(operator, curve, y, sigma) for curve in (begin, *lucy, indirect.ln_I)]
    level = (last * operator.measured).sum(dim=-1, keepdim=True) / operator.measured.sum()
    noise = operator.to_nodes(torch.log(sigma / torch.exp(smooth) + 1e-5))
    columns = [
        (last - level) / 4,
        *((curve - last).clamp(-CLIP, CLIP) for curve in (begin, lucy[0], lake, indirect.ln_I)),
        *rows,
        noise / 4,
        torch.log(indirect.deviation + 1e-5) / 4,
        (torch.log(indirect.chi2)[:, None] / 4).clamp(-2, 2).expand_as(last),
        indirect.rank[:, None].expand_as(last),
    ]
    local = [*operator.local, operator.measured, operator.visible]
    channels = torch.stack([*columns, *(row.expand_as(last) for row in local)], dim=1)
    return Features(channels, last, indirect.ln_I, y, sigma, scale)


def residual(operator: Operator, ln_I: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
    """Show what an answer leaves over: (I - R exp(ln I)) / Idev on q_calc, compressed, shape (exposure, m)."""
    rest = (I - operator.apply(torch.exp(ln_I))) / Idev
    return operator.to_nodes(_asinh(rest).clamp(-CLIP, CLIP)) / 2 * operator.measured


def _asinh(x: Tensor) -> Tensor:
    """Inverse hyperbolic sine; torch's own is not vectorised on CPUs."""
    size = x.abs().clamp_max(1e6)  # its square must stay a number
    return torch.sign(x) * torch.log1p(size + size.square() / (1 + torch.sqrt(1 + size.square())))


def start_curve(I: Tensor, Idev: Tensor) -> Tensor:
    """Give ln of a positive, mildly smoothed curve: averages over as many points as it takes to rise above the noise.

    Parameters
    ----------
    I, Idev
        Shape (exposure, n), of any sign.
    """
    weight = (Idev.mean(dim=-1, keepdim=True) / Idev) ** 2
    halves = [half for half in HALVES if half < I.shape[-1] // 2]
    beyond = sum(2 * half + 1 for half in halves[:-1])
    # The three sums over each window; nothing counts beyond the ends.
    sums = functional.pad(torch.stack([weight, weight * I, (weight * Idev) ** 2]), (beyond, beyond))
    answer = torch.full_like(I, torch.nan)
    value, error = I, Idev
    for narrower in (None, *halves[:-1]):
        if narrower is not None:
            sums = _thrice(sums, narrower)
        inside = (sums.shape[-1] - I.shape[-1]) // 2
        total, weighted, variance = sums[..., inside : inside + I.shape[-1]]
        value, error = weighted / total, torch.sqrt(variance) / total
        clear = torch.isnan(answer) & (value > 3 * error)
        answer = torch.where(clear, torch.log(value.clamp_min(1e-30)), answer)
    floor = torch.log(torch.maximum(value, 0.5 * error).clamp_min(1e-30))
    return torch.where(torch.isnan(answer), floor, answer)


def _thrice(sums: Tensor, half: int) -> Tensor:
    """From sums over windows of 2 half + 1 points, give those over three times as many."""
    width = 2 * half + 1
    return sums[..., : -2 * width] + sums[..., width:-width] + sums[..., 2 * width :]


def _extended(operator: Operator, ln_I: Tensor) -> Tensor:
    """Continue ln I on q to q_calc: a power law above, constant below."""
    last = operator.tail.shape[0]
    slope = (ln_I[:, -last:] @ operator.tail).clamp(-4.0, 0.0)
    return operator.to_nodes(ln_I) + slope[:, None] * operator.beyond


def step(operator: Operator, ln_I: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
    """Take one step of Richardson and Lucy: ``I R^T(ratio) / R^T 1``."""
    back = _ratio(operator, ln_I, I, Idev) @ operator.matrix
    return torch.addcmul(ln_I, operator.visible, torch.log((back / operator.seen).clamp(1e-3, 1e3)))


def _ratio(operator: Operator, ln_I: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
    """Measured over re-smeared, damped towards 1 where the noise is larger than either; beside sharp peaks R can dip below 0."""
    return (I.clamp_min(0) + Idev) / (operator.apply(torch.exp(ln_I)).clamp_min(0) + Idev)


def _lake(operator: Operator, ln_I: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
    """Lake's iteration, which undoes long slits in a few steps."""
    for _ in range(LAKE_STEPS):
        ln_I = ln_I + operator.to_nodes(torch.log(_ratio(operator, ln_I, I, Idev)))
    return ln_I


def _richardson_lucy(operator: Operator, ln_I: Tensor, I: Tensor, Idev: Tensor) -> list[Tensor]:
    """Richardson and Lucy's iteration (doi:10.1364/JOSA.62.000055), shown after some of its steps."""
    shown = []
    for number in range(1, RICHARDSON_LUCY[-1] + 1):
        ln_I = step(operator, ln_I, I, Idev)
        if number in RICHARDSON_LUCY:
            shown.append(ln_I)
    return shown


def _slope(x: NDArray) -> NDArray:
    """Weights w such that ``y @ w`` is the slope of the least-squares line through (x, y)."""
    centred = x - x.mean()
    return centred / (centred @ centred)

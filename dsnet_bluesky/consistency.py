"""Data consistency: exact proximal steps from a proposed curve towards the measurement.

A network proposes x0 = ln I with an error C. Where its curve, smeared again, does not meet the
measurement, the answer sought is the most probable one under both,

``min_x |(R exp(x) - I_s) / Idev|^2 + (x - x0)^T C^-1 (x - x0)``,

found by Gauss-Newton steps in the space of the measurement (n unknowns however many nodes),
batched over curves. It moves an answer only as far as its own error allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .features import Operator

__all__ = ["CORRELATION_LENGTHS", "Proximal", "correlation", "counted", "proximal"]

STEP_LIMIT = 1.0
"""Largest change of ln I in one step: a linearisation is trusted no further."""

EXACT = 1e-6
"""A curve is taken as no better known than to this part of it: smaller errors leave a matrix without a Cholesky factor."""

CORRELATION_LENGTHS = (0.5, 1.5, 5.0, 16.0)
"""Lengths over which errors of ln I are correlated, in local resolutions."""

OWN = 1e-3
"""Least part of the variance that is a node's own."""


class Proximal(NamedTuple):
    """The answer of the proximal steps, in double precision."""

    ln_I: Tensor
    """Shape (exposure, m)."""
    error: Tensor
    """One standard deviation of ln I under both the proposal and the measurement, shape (exposure, m)."""


def counted(q_calc: Tensor, resolution: Tensor) -> Tensor:
    """Count q in local resolutions from the first node on, shape (..., m)."""
    steps = 2 * q_calc.diff() / (resolution[..., 1:] + resolution[..., :-1])
    return torch.cat([torch.zeros_like(resolution[..., :1]), steps.cumsum(dim=-1)], dim=-1)


def correlation(place: Tensor, shares: Sequence[float]) -> Tensor:
    """Correlation of the errors of ln I between nodes, shape (..., m, m).

    Parameters
    ----------
    place
        q_calc in local resolutions of the answer (`counted`), shape (..., m).
    shares
        Parts of the variance that are correlated over each of `CORRELATION_LENGTHS`; the rest is a node's own.
    """
    square = (place[..., :, None] - place[..., None, :]) ** 2
    total = torch.zeros_like(square)
    for share, length in zip(shares, CORRELATION_LENGTHS, strict=True):
        if share > 0:
            total += share * torch.exp(-0.5 * square / length**2)
    total.diagonal(dim1=-2, dim2=-1).add_(max(1 - sum(shares), OWN))
    return total


def proximal(
    operator: Operator, ln_I: Tensor, error: Tensor, correlated: Tensor, I: Tensor, Idev: Tensor, steps: int = 4
) -> Proximal:
    """Take proximal steps.

    Parameters
    ----------
    operator
        The operator.
    ln_I, error
        Proposal and its standard deviation on q_calc, shape (exposure, m).
    correlated
        Correlation of its errors, shape (exposure, m, m).
    I, Idev
        Measured curves, shape (exposure, n), in the same unit.
    steps
        Gauss-Newton steps.

    Returns
    -------
    Proximal
        NaN for curves on which the steps fail (a matrix that rounding makes indefinite).
    """
    matrix = operator.matrix.double()
    start, spread, I, Idev = (part.double() for part in (ln_I, error, I, Idev))
    prior = spread[:, :, None] * correlated.double() * spread[:, None, :]
    x = start
    back = factor = prior
    for _ in range(steps):
        J = matrix * torch.exp(x)[:, None, :]
        back = prior @ J.mT
        smeared = torch.exp(x) @ matrix.T
        noise = torch.diag_embed(torch.maximum(Idev, EXACT * smeared.abs()) ** 2)
        rest = I - smeared + (J @ (x - start)[..., None])[..., 0]
        factor, failed = torch.linalg.cholesky_ex(J @ back + noise)
        factor = torch.where(failed[:, None, None] > 0, torch.nan, factor)
        move = start + (back @ torch.cholesky_solve(rest[..., None], factor))[..., 0] - x
        x = x + move * (STEP_LIMIT / move.abs().amax(dim=-1, keepdim=True).clamp_min(STEP_LIMIT))
    gain = torch.linalg.solve_triangular(factor, back.mT, upper=False)
    variance = (spread**2 - gain.square().sum(dim=1)).clamp_min(1e-12)
    return Proximal(x, variance.sqrt())

"""Data consistency: exact proximal steps from a proposed curve towards the measurement.

A network proposes x0 = ln I with an error C. Where its curve, smeared again, does not meet the
measurement, the answer sought is the most probable one under both,

``min_x |(R exp(x) - I_s) / Idev|^2 + (x - x0)^T C^-1 (x - x0)``,

found by Gauss-Newton steps in the space of the measurement (n unknowns however many nodes),
batched over curves. It moves an answer only as far as its own error allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import Operator

__all__ = ["Proximal", "correlation", "proximal"]

STEP_LIMIT = 1.0
"""Largest change of ln I in one step: a linearisation is trusted no further."""


class Proximal(NamedTuple):
    """The answer of the proximal steps, in double precision."""

    ln_I: Tensor
    """Shape (exposure, m)."""
    error: Tensor
    """One standard deviation of ln I under both the proposal and the measurement, shape (exposure, m)."""


def correlation(place: Tensor, length: float) -> Tensor:
    """Correlation of the errors of ln I between nodes, shape (m, m).

    Parameters
    ----------
    place
        q_calc in local widths of the answer, shape (m,).
    length
        Distance over which errors are correlated, in those widths.
    """
    return torch.exp(-0.5 * ((place[:, None] - place) / length) ** 2)


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
        Correlation of its errors, shape (m, m).
    I, Idev
        Measured curves, shape (exposure, n), in the same unit.
    steps
        Gauss-Newton steps.
    """
    matrix = operator.matrix.double()
    start, spread, I, Idev = (part.double() for part in (ln_I, error, I, Idev))
    prior = spread[:, :, None] * correlated.double() * spread[:, None, :]
    x = start
    noise = torch.diag_embed(Idev**2)
    back = gain = prior
    for _ in range(steps):
        J = matrix * torch.exp(x)[:, None, :]
        back = prior @ J.mT
        rest = I - torch.exp(x) @ matrix.T + (J @ (x - start)[..., None])[..., 0]
        factor = torch.linalg.cholesky(J @ back + noise)
        move = start + (back @ torch.cholesky_solve(rest[..., None], factor))[..., 0] - x
        x = x + move * (STEP_LIMIT / move.abs().amax(dim=-1, keepdim=True).clamp_min(STEP_LIMIT))
        gain = torch.linalg.solve_triangular(factor, back.mT, upper=False)
    variance = (spread**2 - gain.square().sum(dim=1)).clamp_min(1e-12)
    return Proximal(x, variance.sqrt())

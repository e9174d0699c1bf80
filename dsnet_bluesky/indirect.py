"""The indirect transform for many curves at once: evidence over a ladder of diameters and ridges.

The same series as in `desmearing.ift`, solved by normal equations in double precision,
batched over curves, on any device of torch. It is what a network is told about
the hypothesis "this is a finite particle", not a method by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .desmearing.ift import BEYOND, sine_series

__all__ = ["Indirect", "IndirectLadder"]

LARGEST = 128
"""Largest number of terms of the series."""

RATIO = 1.3
"""Ratio of neighbouring diameters."""

RIDGES = (1e-13, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3)
"""Ridges, in units of the largest diagonal element of the normal matrix."""


class Indirect(NamedTuple):
    """The most evident series for each curve."""

    ln_I: Tensor
    """Shape (exposure, m)."""
    deviation: Tensor
    """One standard deviation of ln I, if the series fits, shape (exposure, m)."""
    chi2: Tensor
    """Mean squared residual, shape (exposure,)."""
    rank: Tensor
    """Where its diameter stands on the ladder, 0 to 1, shape (exposure,)."""


class IndirectLadder:
    """Series of a ladder of diameters, on q_calc and smeared.

    Parameters
    ----------
    q, q_calc
        Grids of the measured and of the ideal curve, in 1/nm.
    matrix
        R, shape (n, m).
    device
        Where it is to run.
    """

    def __init__(self, q: NDArray, q_calc: NDArray, matrix: NDArray, device: torch.device) -> None:
        largest = int(min(LARGEST, max(6, 0.4 * q.size)))
        steps = np.arange(int(np.log(largest / 4) / np.log(RATIO)) + 1)
        self.rungs: list[tuple[Tensor, Tensor]] = []
        for terms in sorted({round(4 * RATIO**k) for k in steps}):
            diameter = (terms - 2) * np.pi / (BEYOND * q[-1])
            order = np.arange(1, terms + 1)
            basis = np.column_stack([sine_series(q_calc, diameter, terms) / order**2, np.ones(q_calc.size)])
            smeared = matrix @ basis
            scale = np.linalg.norm(smeared / smeared.max(axis=0).max(), axis=0).max()
            self.rungs.append(
                tuple(torch.as_tensor(a / scale, dtype=torch.float64, device=device) for a in (basis, smeared))  # type: ignore[arg-type]
            )

    def __call__(self, I: Tensor, Idev: Tensor) -> Indirect:
        """Fit curves, shape (exposure, n), in double precision."""
        weight = 1 / Idev
        target = I * weight
        square = (target**2).sum(dim=-1)
        evidences, answers = [], []
        for _, smeared in self.rungs:
            design = weight[..., None] * smeared
            normal = design.mT @ design
            seen = (design.mT @ target[..., None])[..., 0]
            evidence, factor, solution = _most_evident(normal, seen, square)
            evidences.append(evidence)
            answers.append((factor, solution))
        best = torch.stack(evidences).argmax(dim=0)
        return self._assemble(best, answers, target, weight)

    def _assemble(self, best: Tensor, answers: list[tuple[Tensor, Tensor]], target: Tensor, weight: Tensor) -> Indirect:
        count, nodes = best.shape[0], self.rungs[0][0].shape[0]
        mean, deviation = target.new_zeros(count, nodes), target.new_zeros(count, nodes)
        chi2 = target.new_zeros(count)
        for index, (basis, smeared) in enumerate(self.rungs):
            chosen = (best == index).nonzero()[:, 0]
            if not chosen.numel():
                continue
            factor, solution = (part[chosen] for part in answers[index])
            mean[chosen] = solution @ basis.T
            root = torch.linalg.solve_triangular(factor, basis.T.expand(len(chosen), -1, -1), upper=False)
            deviation[chosen] = root.square().sum(dim=1).sqrt()
            rest = target[chosen] - weight[chosen] * (solution @ smeared.T)
            chi2[chosen] = rest.square().mean(dim=-1)
        mean = _positive_mean(mean, deviation)
        relative = (deviation / mean).clamp(1e-6, 1e2)
        rank = best.double() / max(len(self.rungs) - 1, 1)
        return Indirect(torch.log(mean).float(), relative.float(), chi2.clamp(1e-4, 1e8).float(), rank.float())


def _most_evident(normal: Tensor, seen: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence, Cholesky factor and solution for the best ridge; the last column, the background, has hardly any."""
    size = normal.shape[-1]
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    top = diagonal[..., :-1].amax(dim=-1)
    ridges = top[:, None] * top.new_tensor(RIDGES)
    matrices = normal[:, None].repeat(1, len(RIDGES), 1, 1)
    ridged = matrices.diagonal(dim1=-2, dim2=-1)
    ridged[..., :-1] += ridges[..., None]
    ridged[..., -1] += 1e-14 * diagonal[:, None, -1]
    factor, info = torch.linalg.cholesky_ex(matrices)
    half = torch.linalg.solve_triangular(factor, seen[:, None, :, None].expand(-1, len(RIDGES), -1, -1), upper=False)
    misfit = square[:, None] - half.square().sum(dim=(-2, -1))
    logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).log().sum(dim=-1)
    evidence = -0.5 * (misfit + logdet - (size - 1) * torch.log(ridges))
    evidence = torch.where((info == 0) & torch.isfinite(evidence), evidence, -torch.inf)
    best = evidence.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    factor = factor[rows, best]
    solution = torch.linalg.solve_triangular(factor.mT, half[rows, best], upper=True)[..., 0]
    return evidence[rows, best], factor, solution


def _positive_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    """Mean of a Gaussian cut at zero, see `desmearing.kernels.positive_mean`."""
    deviation = deviation.clamp_min(1e-30)
    z = (mean / deviation).clamp_max(25.0)
    hazard = np.sqrt(2 / np.pi) / torch.special.erfcx(-z / np.sqrt(2))
    return (mean + deviation * hazard).clamp_min(1e-30)

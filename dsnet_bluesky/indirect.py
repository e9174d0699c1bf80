"""The indirect transform for many curves at once: evidence over a ladder of diameters and ridges.

The same series as in `desmearing.ift`, solved by normal equations in double precision,
batched over curves, on any device of torch; a few curves are solved one by one, where batches are too
small for what they cost. It is what a network is told about the hypothesis "this is a finite particle",
not a method by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from .desmearing.ift import BEYOND, sine_series

__all__ = ["Indirect", "IndirectLadder"]

(potrf,) = get_lapack_funcs(("potrf",), dtype=np.float64)

LARGEST = 128
"""Largest number of terms of the series."""

RATIO = 1.14
"""Ratio of neighbouring diameters; every second one is tried first."""

RIDGES = (1e-13, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3)
"""Ridges, in units of the largest diagonal element of the normal matrix."""


PATIENCE = 2
"""The first scan ends for a curve when so many rungs in a row are no better, ..."""

CLEARLY = 10.0
"""... the last of them by this in ln of the evidence, ..."""

FITTING = 2.0
"""... and the best one fits: its chi2 is below this."""

SMALL = 48
"""Up to so many terms all ridges are tried: they cost next to nothing."""

FEW = 2
"""Up to so many curves are solved one by one; but for rounding, the answers are those of a batch."""

FAILED = -1e300
"""Evidence of a matrix without a Cholesky factor; a larger ridge helps."""


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
            smeared = np.column_stack([smeared, np.zeros(q.size)])  # a measurement is to stand in the last column
            self.rungs.append(
                tuple(torch.as_tensor(a / scale, dtype=torch.float64, device=device) for a in (basis, smeared))  # type: ignore[arg-type]
            )
        self._host = [(basis.cpu().numpy(), smeared.cpu().numpy()) for basis, smeared in self.rungs]

    def __call__(self, I: Tensor, Idev: Tensor) -> Indirect:
        """Fit curves, shape (exposure, n), in double precision, whose scale is about 1."""
        mean, deviation, chi2, rung = (self._few if 0 < len(I) <= FEW else self._many)(I, Idev)
        mean = _positive_mean(mean, deviation)
        relative = (deviation / mean).clamp(1e-6, 1e2)
        rank = rung.double() / max(len(self.rungs) - 1, 1)
        return Indirect(torch.log(mean).float(), relative.float(), chi2.clamp(1e-4, 1e8).float(), rank.float())

    def _few(self, I: Tensor, Idev: Tensor) -> tuple[Tensor, ...]:
        """Solve curves one by one, on the host."""
        curves = zip(I.cpu().numpy(), Idev.cpu().numpy(), strict=True)
        with np.errstate(all="ignore"):  # what has no answer is NaN
            found = [_One(self._host, *curve).solve() for curve in curves]
        return tuple(torch.stack(column).to(I.device) for column in zip(*found, strict=True))

    def _many(self, I: Tensor, Idev: Tensor) -> tuple[Tensor, ...]:
        """Solve curves together."""
        scan = _Scan(self.rungs, I, Idev)
        active = torch.arange(len(I), device=I.device)
        ridge = torch.zeros_like(active)
        for place in range(0, len(self.rungs), 2):
            scan.climb(place, active, ridge[active])
            ridge = scan.evidence[:, place].argmax(dim=1)
            active = scan.hopeful(place)
            if not active.numel():
                break
        nearest, ridge = scan.best()
        for place in range(1, len(self.rungs), 2):
            beside = ((nearest - place).abs() == 1).nonzero()[:, 0]
            if beside.numel():
                scan.climb(place, beside, ridge[beside])
        return scan.answer()


class _One:
    """The same as `_Scan`, for one curve: what torch needs to choose among batches takes longer than the arithmetic of one."""

    def __init__(self, rungs: list[tuple[NDArray, NDArray]], I: NDArray, Idev: NDArray) -> None:
        self.rungs, self.weight, self.target = rungs, (1 / Idev)[:, None], I / Idev
        self.evidence = np.full((len(rungs), len(RIDGES)), -np.inf)
        self.misfit = np.zeros_like(self.evidence)
        self.normals: dict[int, NDArray] = {}

    def solve(self) -> tuple[Tensor, ...]:
        """Give the mean and the deviation of the most evident series on q_calc, its chi2, and its rung."""
        ridge = 0
        for place in range(0, len(self.rungs), 2):
            self.climb(place, ridge)
            ridge = int(self.evidence[place].argmax())
            if not self.hopeful(place):
                break
        nearest, ridge = self.best()
        for place in {nearest - 1, nearest + 1} & set(range(1, len(self.rungs), 2)):
            self.climb(place, ridge)
        return self.answer()

    def climb(self, place: int, start: int) -> None:
        """Try one rung, with ridges uphill from the place `start`, or with all where that costs little."""
        design = self.weight * self.rungs[place][1]
        design[:, -1] = self.target
        normal = self.normals[place] = design.T @ design
        diagonal, terms = _diagonal(normal), len(normal) - 2
        loose, square = 1e-14 * diagonal[-2], diagonal[-1] or 1.0
        diagonal[-2] += loose
        diagonal[-1] += square
        reach = 1 if terms > SMALL else len(RIDGES)
        fresh = set(range(len(RIDGES)))
        wanted = {column for column in fresh if abs(column - start) <= reach}
        while wanted:
            fresh -= wanted
            for column in wanted:
                factor, failed, ridge = self._factor(place, column)
                pivots = _diagonal(factor)
                self.misfit[place, column] = misfit = pivots[-1] ** 2 - square
                if failed:
                    self.evidence[place, column] = FAILED / (1 + column)
                else:
                    logdet = 2 * np.log(pivots[:-1]).sum()
                    self.evidence[place, column] = _evidence(misfit, logdet, terms, np.log(ridge), np.log(loose))
            best = int(self.evidence[place].argmax())
            wanted = {best - 1, best, best + 1} & fresh

    def _factor(self, place: int, column: int) -> tuple[NDArray, int, float]:
        """Give the Cholesky factor of a rung's normal matrix with a ridge, whether that failed, and the ridge."""
        normal = self.normals[place].copy(order="F")
        diagonal = _diagonal(normal)[:-2]
        ridge = diagonal.max() * RIDGES[column]
        diagonal += ridge
        return *potrf(normal, lower=True, overwrite_a=True), ridge

    def hopeful(self, place: int) -> bool:
        """Whether a longer series than this rung's may yet fit better."""
        rung, ridge = self.best()
        near = self.evidence[place].max() > self.evidence[rung, ridge] - CLEARLY
        return bool(place - rung < 2 * PATIENCE or near or self.misfit[rung, ridge] > FITTING * len(self.target))

    def best(self) -> tuple[int, int]:
        """Rung and place of the ridge of largest evidence."""
        rung, ridge = divmod(int(self.evidence.argmax()), len(RIDGES))
        return rung, ridge

    def answer(self) -> tuple[Tensor, ...]:
        """Give what `solve` gives."""
        rung, ridge = self.best()
        factor, failed, _ = self._factor(rung, ridge)
        one = (factor[None], np.array([failed]), *self.rungs[rung], self.weight.T, self.target[None])
        return *(part[0] for part in _solved(*map(torch.from_numpy, one))), torch.from_numpy(np.array(rung))


def _diagonal(matrix: NDArray) -> NDArray:
    """Give the diagonal of a matrix, to be written to."""
    return np.einsum("ii->i", matrix)


class _Scan:
    """Evidence of what was tried for a batch of curves, shape (exposure, rung, ridge), and the normal matrices behind it.

    A normal matrix holds, after the terms and the background, the measurement: the last row of its Cholesky
    factor is the half-solved right-hand side, and the last pivot tells the misfit.
    """

    def __init__(self, rungs: list[tuple[Tensor, Tensor]], I: Tensor, Idev: Tensor) -> None:
        self.rungs, self.weight, self.target = rungs, 1 / Idev, I / Idev
        self.evidence = I.new_full((len(I), len(rungs), len(RIDGES)), -torch.inf)
        self.misfit = torch.zeros_like(self.evidence)
        self.ridges, self.places = I.new_tensor(RIDGES), torch.arange(len(RIDGES), device=I.device)
        self.normals: dict[int, tuple[Tensor, Tensor]] = {}

    def climb(self, place: int, curves: Tensor, start: Tensor) -> None:
        """Try one rung for some curves: with ridges uphill from the place `start`, or with all where that costs little."""
        design = self.weight[curves, :, None] * self.rungs[place][1]
        design[..., -1] = self.target[curves]
        normal = design.mT @ design
        self.normals[place] = curves, normal
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        loose, terms = 1e-14 * diagonal[:, -2], diagonal.shape[1] - 2
        square = torch.where(diagonal[:, -1] == 0, 1.0, diagonal[:, -1])
        diagonal[:, -2] += loose  # the background has hardly any ridge
        diagonal[:, -1] += square  # no rounding makes the last pivot vanish
        wanted = (self.places - start[:, None]).abs() <= (1 if terms > SMALL else len(RIDGES))
        fresh = ~wanted
        while wanted.any():
            rows, columns = wanted.nonzero(as_tuple=True)
            factor, info, ridge = self._factor(normal[rows], columns)
            pivots = factor.diagonal(dim1=-2, dim2=-1)
            misfit = pivots[:, -1] ** 2 - square[rows]
            logdet = 2 * pivots[:, :-1].log().sum(dim=1)
            evidence = _evidence(misfit, logdet, terms, ridge.log(), loose[rows].log())
            self.evidence[curves[rows], place, columns] = torch.where(info == 0, evidence, FAILED / (1 + columns.double()))
            self.misfit[curves[rows], place, columns] = misfit
            best = self.evidence[curves, place].argmax(dim=1)
            wanted = ((self.places - best[:, None]).abs() <= 1) & fresh
            fresh &= ~wanted

    def _factor(self, normal: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add ridges, by places in `RIDGES`, to normal matrices in place; give Cholesky factors, failures and the ridges."""
        diagonal = normal.diagonal(dim1=-2, dim2=-1)[:, :-2]
        ridge = diagonal.amax(dim=1) * self.ridges[places]
        diagonal += ridge[:, None]
        return *torch.linalg.cholesky_ex(normal), ridge

    def hopeful(self, place: int) -> Tensor:
        """Curves that a longer series than this rung's may yet fit better."""
        evidence, best = self.evidence.flatten(1).max(dim=1)
        recent = place - best // len(RIDGES) < 2 * PATIENCE
        near = self.evidence[:, place].amax(dim=1) > evidence - CLEARLY
        misfit = self.misfit.flatten(1).gather(1, best[:, None])[:, 0]
        return (recent | near | (misfit > FITTING * self.target.shape[1])).nonzero()[:, 0]

    def best(self) -> tuple[Tensor, Tensor]:
        """Rung and place of the ridge of largest evidence, shape (exposure,)."""
        best = self.evidence.flatten(1).argmax(dim=1)
        return best // len(RIDGES), best % len(RIDGES)

    def answer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give mean and deviation of the most evident series of each curve on q_calc, its chi2, and its rung."""
        best, ridge = self.best()
        count, nodes = len(best), len(self.rungs[0][0])
        mean, deviation = self.target.new_empty(count, nodes), self.target.new_empty(count, nodes)
        chi2 = self.target.new_empty(count)
        for place, (curves, normal) in self.normals.items():
            wins = (best[curves] == place).nonzero()[:, 0]
            if not wins.numel():
                continue
            chosen = curves[wins]
            factor, failed, _ = self._factor(normal[wins], ridge[chosen])
            solved = _solved(factor, failed, *self.rungs[place], self.weight[chosen], self.target[chosen])
            mean[chosen], deviation[chosen], chi2[chosen] = solved
        return mean, deviation, chi2, best


def _solved(
    factor: Tensor, failed: Tensor, basis: Tensor, smeared: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give mean and deviation on q_calc, and chi2, of curves from the Cholesky factors of one rung; NaN where there is none."""
    inner, half = factor[:, :-1, :-1], factor[:, -1, :-1, None]
    inner = torch.where(failed[:, None, None] > 0, torch.nan, inner)
    solution = torch.linalg.solve_triangular(inner.mT, half, upper=True)[..., 0]
    unit = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    root = torch.linalg.solve_triangular(inner, unit.expand_as(inner), upper=False)
    deviation = (root @ basis.T).square().sum(dim=1).sqrt()
    rest = target - weight * (solution @ smeared[:, :-1].T)
    return solution @ basis.T, deviation, rest.square().mean(dim=-1)


def _evidence(misfit: Any, logdet: Any, terms: int, ln_ridge: Any, ln_loose: Any) -> Any:
    """Give ln of the evidence, but for what all rungs have in common."""
    return -0.5 * (misfit + logdet - terms * ln_ridge - ln_loose)


def _positive_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    """Mean of a Gaussian cut at zero, see `desmearing.kernels.positive_mean`."""
    deviation = deviation.clamp_min(1e-30)
    z = (mean / deviation).clamp_max(25.0)
    hazard = np.sqrt(2 / np.pi) / torch.special.erfcx(-z / np.sqrt(2))
    return (mean + deviation * hazard).clamp_min(1e-30)

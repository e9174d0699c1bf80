"""Central moment expansion: the resolution as derivatives, weighted by its moments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import factorial

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import LinAlgError, cho_solve_banded, cholesky_banded

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .kernels import kernel_widths, positive_mean, straightened
from .splines import Splines, bands_of, reaches_zero, units

__all__ = ["CME"]

ORDERS = (4, 8)
"""Where the expansion may end: a Gaussian's, cut after 2 or 6, is zero at a real frequency and cannot be solved."""

TRENDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Widths tried for the trend, in widths of the operator: narrow ones suit peaks, wide ones deep minima."""

LOG10_WEIGHTS = np.arange(-12.0, 10.0)
"""Weights tried for the prior, in units of the mean weight of the data; then in half decades about the best."""

RIDGE = 1e-12
"""What is added to the diagonal of a normal matrix against rounding, as a part of it."""


class CME:
    """Central moment expansion of the resolution, inverted in one linear pass.

    Each row of R is replaced by derivatives of a point at its mean m(q), weighted
    by its central moments mu_k(q):

    ``I_s(q) = sum_{k=0}^{order} mu_k(q) / k! I^(k)(m(q))``, ``mu_0 = 1``, ``mu_1 = 0``.

    That is a linear differential equation for I, solved as a whole by weighted least
    squares for I as a spline. The moments are of the rows themselves: the kernel may
    have any form and change from point to point, and a lopsided one (a slit) acts at
    its mean. No model is assumed.

    G.-R. Huang et al. expanded I and inverted the series, ``I = I_s - mu_2/2 I_s'' + ...`` (J. Appl.
    Cryst. 56 (2023) 1537), and then the resolution instead of I, to be rid of artificial
    oscillations ("Desmearing small-angle scattering data by central moment expansions of instrument
    resolution", J. Appl. Cryst. 58 (2025), https://journals.iucr.org/j/issues/2025/04/00/ge5166; in
    two dimensions: arXiv:2502.13488). Of the latter two we have read the abstracts only, and the first as
    others cite it: the equation above is our reading of what they do, and the following is ours.

    - *Order.* At frequency k a Gaussian of width sigma is ``exp(-x)``, ``x = (k sigma)^2 / 2``, and its expansion
      the series of that. Cut after 4 or 8 derivatives it has no zero, and its inverse fades at high k: the cut
      itself regularises. Half of a wave comes back at k sigma = 1.9 (order 4: 1.6), and nothing far beyond.
    - *Trend.* I is sought as T(q) g(q), where T is a trend of the measured curve (a power law in a Gaussian
      window), and the moments are of the rows times T. Without it the series of a steep curve is of no use.
    - *Smoothness.* g is a spline of degree order + 1, even at q = 0 where the operator reaches there,
      and a prior holds its fourth differences small. The weight of the prior and the window of the trend are those
      of largest evidence, less half of ln n for each degree of freedom of the trend (Schwarz).

    With weight and trend chosen the answer is linear in the measured points, which may be zero or
    negative. Where it comes near zero, I is the mean of what its error leaves positive: an intensity
    cannot be negative. I_resmeared is of the answer as it is, by R itself and not by its
    expansion: where the series fails (peaks far narrower than the beam, a rise towards q = 0, a slit
    longer than what it smears) chi2 tells.

    Idev is the measured Idev propagated through the answer and its trend: it holds the noise, not
    what the prior or the cut does to sharp features. Qdev is from the averaging kernel.

    Parameters
    ----------
    smearing
        The operator.
    order
        Last derivative of the expansion: 4 or 8.
    weight
        Weight of the squared fourth differences of g; by default the data choose it.
    trend
        Standard deviation of the trend's window, in widths of the operator (of the local step, where that
        is wider), at least 1; by default the data choose it.

    Raises
    ------
    BadInput
        If an option is out of range.
    """

    def __init__(self, smearing: Smearing, order: int = 8, weight: float | None = None, trend: float | None = None) -> None:
        if order not in ORDERS:
            raise BadInput(f"order is {order}; the expansion may end after {' or '.join(map(str, ORDERS))} derivatives.")
        if weight is not None and not weight > 0:
            raise BadInput(f"weight is {weight}; it must be positive.")
        if trend is not None and not trend >= 1:
            raise BadInput(f"trend is {trend}; the window must hold at least 1 width.")
        self.smearing = smearing
        self.order = order
        self.weight = weight
        self._matrix = sparse.csr_array(np.where(np.abs(smearing.matrix) > 1e-12, smearing.matrix, 0.0))
        self._rows = _Rows.of(smearing)
        self._splines = Splines(smearing, order)
        self._trends = [_Trend(smearing, width) for width in (TRENDS if trend is None else (trend,))]

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear curves of any sign, one after another."""
        found = [self._solve(measured, sigma) for measured, sigma in zip(I, Idev, strict=True)]
        deviation = np.array([a.Idev for a in found])
        return Solution(
            I_calc=straightened(self.smearing, np.array([a.I_calc for a in found]).T).T,
            I=positive_mean(np.array([a.I for a in found]), deviation),
            Idev=deviation,
            Qdev=np.array([a.Qdev for a in found]),
            flags=np.zeros(len(found), dtype=np.int64),
            diagnostics={name: np.array([float(getattr(a, name)) for a in found]) for name in ("weight", "trend")},
        )

    def _solve(self, measured: NDArray, sigma: NDArray) -> _Answer:
        fits = [_Fit(self._problem(trend, measured, sigma), self.weight) for trend in self._trends]
        return self._describe(min(fits, key=lambda fit: fit.criterion))

    def _problem(self, trend: _Trend, measured: NDArray, sigma: NDArray) -> _Problem:
        level, level_calc = trend(measured, sigma)
        design = self._expansion(level_calc).multiply(1 / sigma[:, None]).tocsr()
        return _Problem(trend, level, level_calc, design, measured, sigma, self._splines)

    def _expansion(self, level_calc: NDArray) -> sparse.csr_array:
        """From the coefficients of g to the smeared curve, shape (n, coefficients)."""
        total, mean, moments = self._rows.moments(level_calc, self.order)
        result = self._splines.design(mean)
        for k in range(2, self.order + 1):
            result += self._splines.design(mean, k).multiply(moments[k][:, None] / factorial(k))
        return result.multiply(total[:, None]).tocsr()

    def _describe(self, fit: _Fit) -> _Answer:
        problem = fit.problem
        response = problem.level[:, None] * (self._splines.at_q @ fit.response())
        return _Answer(
            I=problem.level * (self._splines.at_q @ fit.coefficients),
            I_calc=problem.level_calc * (self._splines.at_q_calc @ fit.coefficients),
            Idev=np.sqrt((response**2) @ problem.sigma**2),
            Qdev=kernel_widths(response @ self._matrix, self.smearing.q_calc),
            weight=fit.weight,
            trend=problem.trend.width,
        )


@dataclass(frozen=True)
class _Answer:
    I: NDArray
    I_calc: NDArray
    Idev: NDArray
    Qdev: NDArray
    weight: float
    trend: float


@dataclass(frozen=True)
class _Rows:
    """The elements of R about its diagonal, made right for smooth curves: values and places, shape (n, longest row)."""

    values: NDArray
    columns: NDArray
    q_calc: NDArray

    @classmethod
    def of(cls, smearing: Smearing) -> _Rows:
        """Take the rows of an operator.

        R takes curves as straight between nodes, which alone widens every row by a sixth of
        the squared step; moments of rows are to be those of the instrument.
        """
        m = smearing.q_calc.size
        matrix = sparse.csr_array(sparse.csr_array(smearing.matrix) @ _straightening(smearing)).toarray()
        used = np.abs(matrix) > 1e-14
        first, last = np.argmax(used, axis=1), m - 1 - np.argmax(used[:, ::-1], axis=1)
        columns = first[:, None] + np.arange(int((last - first).max()) + 1)
        values = np.where(columns < m, np.take_along_axis(matrix, np.minimum(columns, m - 1), axis=1), 0.0)
        columns = np.minimum(columns, m - 1)
        return cls(values, columns, smearing.q_calc[columns])

    def moments(self, level: NDArray, order: int) -> tuple[NDArray, NDArray, list[NDArray]]:
        """Sums, means and central moments 0 to `order` of the rows times `level` (on q_calc); each of shape (n,)."""
        weighted = self.values * level[self.columns]
        total = weighted.sum(axis=1)
        weighted /= total[:, None]
        mean = np.sum(weighted * self.q_calc, axis=1)
        offset = self.q_calc - mean[:, None]
        moments = [np.ones_like(mean)]
        for _ in range(order):
            weighted = weighted * offset
            moments.append(weighted.sum(axis=1))
        return total, mean, moments


def _straightening(smearing: Smearing) -> sparse.csr_array:
    """Return `kernels.straightened`, which looks at neighbours only, as a matrix of shape (m, m)."""
    places = np.arange(smearing.q_calc.size)
    # What every third node gives tells the three diagonals apart.
    found = straightened(smearing, np.equal(places[:, None] % 3, np.arange(3)).astype(float))
    columns = places[:, None] + np.array([-1, 0, 1])
    values = np.take_along_axis(found, columns % 3, axis=1)
    kept = (columns >= 0) & (columns < places.size)
    rows = np.broadcast_to(places[:, None], columns.shape)
    return sparse.csr_array((values[kept], (rows[kept], columns[kept])))


class _Trend:
    """Local power law in a Gaussian window: a straight line through ln I against ln q, about each q.

    ``ln q`` is levelled off below a width of the window, and where the operator reaches q = 0 the
    curve is mirrored there: the trend is even, and smooth enough to be expanded. Beyond the measured range it goes straight on.

    Parameters
    ----------
    smearing
        Gives the grids and the widths.
    width
        Standard deviation of the window, in widths of the operator or steps of q.
    """

    def __init__(self, smearing: Smearing, width: float) -> None:
        self.width = width
        q, q_calc = smearing.q, smearing.q_calc
        even, unit = reaches_zero(smearing), units(smearing)
        inside = np.clip(q_calc, 0.0 if even else q[0], q[-1])
        places = np.concatenate([q, inside])[:, None]
        window = width * np.interp(places, q, unit)
        near = np.exp(-0.5 * ((q - places) / window) ** 2)
        if even:
            near += np.exp(-0.5 * ((q + places) / window) ** 2)
        levelled = (width * np.median(unit)) ** 2
        offset = 0.5 * np.log((q**2 + levelled) / (places**2 + levelled))
        sums = [np.sum(near * offset**power, axis=1, keepdims=True) for power in range(3)]
        determinant = sums[0] * sums[2] - sums[1] ** 2
        values = near * (sums[2] - offset * sums[1]) / determinant
        slopes = near * (sums[0] * offset - sums[1]) / determinant
        beyond = 0.5 * np.log((q_calc**2 + levelled) / (inside**2 + levelled))
        self._at_q = values[: q.size]
        self._at_q_calc = values[q.size :] + beyond[:, None] * slopes[q.size :]
        self.freedom = float(np.trace(self._at_q))

    def __call__(self, measured: NDArray, sigma: NDArray) -> tuple[NDArray, NDArray]:
        """Trend of one curve on q and on q_calc, positive; points below their error are raised to it."""
        logarithm = np.log(np.maximum(measured, sigma))
        return np.exp(self._at_q @ logarithm), np.exp(self._at_q_calc @ logarithm)

    def slope(self, measured: NDArray, sigma: NDArray) -> NDArray:
        """Relative change of the trend on q with each measured point, shape (n, n)."""
        return self._at_q * np.where(measured > sigma, 1 / np.maximum(measured, sigma), 0.0)


@dataclass(frozen=True)
class _Problem:
    """One curve and one trend: the expansion as a design matrix, in units of the errors."""

    trend: _Trend
    level: NDArray
    level_calc: NDArray
    design: sparse.csr_array
    measured: NDArray
    sigma: NDArray
    splines: Splines

    @cached_property
    def normal(self) -> sparse.csr_array:
        return sparse.csr_array(self.design.T @ self.design)

    @cached_property
    def bands(self) -> NDArray:
        return bands_of(self.normal, len(self.splines.roughness))

    @cached_property
    def target(self) -> NDArray:
        return self.measured / self.sigma

    def minimise(self, weight: float) -> _Point:
        """Solve for one weight of the prior.

        Raises
        ------
        LinAlgError
            If rounding makes the normal matrix indefinite.
        """
        normal = self.bands + weight * self.splines.roughness
        normal[0] *= 1 + RIDGE
        factor = cholesky_banded(normal, lower=True, check_finite=False)
        coefficients = cho_solve_banded((factor, True), self.design.T @ self.target, check_finite=False)
        residual = self.target - self.design @ coefficients
        # At the minimum the penalty is what the gradient of the misfit leaves.
        cost = 0.5 * float(residual @ residual + coefficients @ (self.design.T @ residual))
        lack = cost + float(np.log(factor[0]).sum()) - 0.5 * self.splines.rank * np.log(weight)
        return _Point(weight, coefficients, factor, lack + 0.5 * np.log(self.target.size) * self.trend.freedom)


@dataclass(frozen=True)
class _Point:
    """The solution for one weight; `criterion` is minus the log evidence, and the price of the trend."""

    weight: float
    coefficients: NDArray
    factor: NDArray
    criterion: float


class _Fit:
    """The solution for one trend, with the most evident weight or the one that is given."""

    def __init__(self, problem: _Problem, weight: float | None) -> None:
        self.problem = problem
        point = self._most_evident(weight)
        self.weight, self.coefficients, self.criterion = point.weight, point.coefficients, point.criterion
        self._factor = point.factor

    def _most_evident(self, weight: float | None) -> _Point:
        scale = float(self.problem.bands[0].mean())
        points = self._tried(scale * 10.0**LOG10_WEIGHTS if weight is None else np.array([weight]))
        if not points:
            raise BadInput("The expansion cannot be solved for this curve: its errors differ too widely. Use method='map'.")
        best = min(points, key=lambda point: point.criterion)
        finer = [] if weight is not None else self._tried(best.weight * 10.0 ** np.array([-0.5, 0.5]))
        return min([best, *finer], key=lambda point: point.criterion)

    def _tried(self, weights: NDArray) -> list[_Point]:
        points = []
        for weight in weights:
            try:
                points.append(self.problem.minimise(float(weight)))
            except LinAlgError:
                continue
        return points

    def response(self) -> NDArray:
        """Change of the coefficients, and of the trend they multiply, with each measured point.

        Returns
        -------
        ndarray
            In units of coefficients, shape (coefficients, n): times the trend, the change of the answer.
        """
        problem = self.problem
        direct = problem.design.T.toarray() / problem.sigma
        # g undoes what a point changes in the trend, as far as the prior lets it.
        change = self.coefficients[:, None] * (problem.splines.at_centres @ problem.trend.slope(problem.measured, problem.sigma))
        solved = cho_solve_banded((self._factor, True), direct - problem.normal @ change, check_finite=False)
        return solved + change

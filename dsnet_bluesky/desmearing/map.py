"""Maximum a posteriori desmearing of ln I with a curvature prior."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.interpolate import PchipInterpolator
from scipy.linalg import LinAlgError, cho_solve_banded, cholesky_banded, lapack

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .kernels import kernel_widths

__all__ = ["MAP"]

BAND_ENTRIES = 4_000_000
"""Largest table of products of matrix elements that is kept to build banded normal matrices."""

STEP_LIMIT = 2.0
"""Largest change of ln I in one iteration: a Gauss-Newton step is trusted no further."""

LOG10_WEIGHTS = (-6.0, 12.0)
"""Range in which the weight of the prior is looked for."""


class MAP:
    """Most probable curve under Gaussian noise and a prior on the curvature of ln I.

    With x = ln I on q_calc, the answer minimises

    ``J(x) = 1/2 |(R exp(x) - I_s) / Idev|^2 + weight/2 int (d^2 x / du^2)^2 du``

    by Gauss-Newton steps with Levenberg's damping. I is positive by construction
    while the noise stays Gaussian on the linear scale, so that measured points
    that are zero or negative are used as they are. u is q measured in local
    steps of the grid (ln q on a logarithmic grid); above the measured range it
    goes on as ln q, so that the prior continues the curve as a power law.

    The weight maximises the evidence in Laplace's approximation,
    ``ln p(I_s | weight) = -J + (m - 2)/2 ln(weight) - 1/2 ln det H + const``,
    H being the Gauss-Newton Hessian (D. J. C. MacKay, Neural Comput. 4 (1992) 415,
    doi:10.1162/neco.1992.4.3.415). Idev is from H^-1 and holds the noise and the
    prior, not what a wrong prior does to a cusp; Qdev is from the averaging kernel of the last step.

    Parameters
    ----------
    smearing
        The operator.
    weight
        Weight of the prior; by default the data choose it, in half decades.
    student
        Degrees of freedom of a Student-t penalty in place of the quadratic one. A
        small number (1 to 4) forgives a few sharp bends: Bragg peaks, deep minima.
    maximum_iterations
        Limit for each weight; a curve that reaches it is flagged NOT_CONVERGED.
    tolerance
        The iteration stops where no ln I changes by more.

    Raises
    ------
    BadInput
        If an option is out of range.
    """

    def __init__(
        self,
        smearing: Smearing,
        weight: float | None = None,
        student: float | None = None,
        maximum_iterations: int = 60,
        tolerance: float = 1e-3,
    ) -> None:
        for name, value in {"weight": weight, "student": student, "tolerance": tolerance}.items():
            if value is not None and not value > 0:
                raise BadInput(f"{name} is {value}; it must be positive.")
        self.smearing = smearing
        self.weight = weight
        self.student = student
        self.maximum_iterations = maximum_iterations
        self.tolerance = tolerance
        self._bending = _bending(_coordinate(smearing.q, smearing.q_calc))
        self._normal = _NormalMatrix(smearing.matrix)

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear curves of any sign, one after another."""
        found = [self._solve(measured, sigma) for measured, sigma in zip(I, Idev, strict=True)]
        return Solution(
            I_calc=np.array([np.exp(f.x) for f in found]),
            Idev=np.array([f.Idev for f in found]),
            Qdev=np.array([f.Qdev for f in found]),
            flags=np.array([0 if f.converged else int(Flag.NOT_CONVERGED) for f in found]),
            attrs={"weight": [f.weight for f in found], "iterations": [f.iterations for f in found]},
        )

    def _solve(self, measured: NDArray, sigma: NDArray) -> _Answer:
        problem = _Problem(self, measured, sigma)
        point = problem.minimise(self._start(measured, sigma), self.weight or 100.0)
        if self.weight is None:
            point = _most_evident(problem, point)
        return problem.describe(point)

    def _start(self, measured: NDArray, sigma: NDArray) -> NDArray:
        """Logarithm of the measured curve, floored at a tenth of the noise."""
        return np.log(np.interp(self.smearing.q_calc, self.smearing.q, np.maximum(measured, 0.1 * sigma)))


@dataclass
class _Point:
    """A minimum of J for one weight of the prior."""

    x: NDArray
    weight: float
    evidence: float
    iterations: int
    converged: bool


@dataclass
class _Answer:
    x: NDArray
    Idev: NDArray
    Qdev: NDArray
    weight: float
    iterations: int
    converged: bool


def _most_evident(problem: _Problem, point: _Point) -> _Point:
    """Walk the weight in half decades, warm from point to point, to the maximum of the evidence."""
    total = point.iterations
    best = point
    for step in (-0.5, 0.5):
        current = point
        while True:
            exponent = np.log10(current.weight) + step
            if not LOG10_WEIGHTS[0] <= exponent <= LOG10_WEIGHTS[1]:
                break
            current = problem.minimise(current.x, 10**exponent)
            total += current.iterations
            if not current.evidence > best.evidence:
                break
            best = current
        if best is not point:
            break
    best.iterations = total
    return best


class _Problem:
    """One curve: J, its Gauss-Newton steps, and what is known of its minimum."""

    def __init__(self, method: MAP, measured: NDArray, sigma: NDArray) -> None:
        self.method = method
        self.R = method.smearing.matrix
        self.measured, self.sigma = measured, sigma
        self.normal = method._normal(sigma**-2)

    def minimise(self, x: NDArray, weight: float) -> _Point:
        """Damped Gauss-Newton (Levenberg) from `x`."""
        damping, converged, iteration = 1e-3, False, 0
        cost = self.cost(x, weight)
        for iteration in range(1, self.method.maximum_iterations + 1):  # noqa: B007
            bands, gradient = self.hessian(x, weight), self.gradient(x, weight)
            while True:
                step = -_banded_solve(bands, gradient, damping)
                step *= min(1.0, STEP_LIMIT / max(float(np.abs(step).max()), STEP_LIMIT))
                trial = self.cost(x + step, weight)
                if trial <= cost or damping > 1e8:
                    break
                damping *= 10
            converged = bool(np.abs(step).max() < self.method.tolerance)
            if trial <= cost:
                x, cost, damping = x + step, trial, max(damping / 10, 1e-9)
            if converged or damping > 1e8:
                break
        return _Point(x, weight, self.evidence(x, weight), iteration, converged)

    def cost(self, x: NDArray, weight: float) -> float:
        residual = (self.R @ np.exp(x) - self.measured) / self.sigma
        return 0.5 * float(residual @ residual) + self.penalty(x, weight)

    def penalty(self, x: NDArray, weight: float) -> float:
        bend = weight * (self.method._bending @ x) ** 2
        nu = self.method.student
        return 0.5 * float(bend.sum() if nu is None else (nu + 1) * np.log1p(bend / nu).sum())

    def gradient(self, x: NDArray, weight: float) -> NDArray:
        I = np.exp(x)
        residual = (self.R @ I - self.measured) / self.sigma**2
        bend = self.method._bending @ x
        return I * (residual @ self.R) + self.method._bending.T @ (self._weights(x, weight) * bend)

    def hessian(self, x: NDArray, weight: float) -> NDArray:
        """Gauss-Newton Hessian in lower band storage: ``diag(I) R^T R diag(I) / Idev^2 + weight L^T L``."""
        I = np.exp(x)
        bands = self.normal.copy()
        for offset in range(bands.shape[0]):
            bands[offset, : I.size - offset] *= I[: I.size - offset] * I[offset:]
        prior = self.prior(x, weight)
        for offset in range(3):
            bands[offset, : I.size - offset] += prior.diagonal(-offset)
        return bands

    def prior(self, x: NDArray, weight: float) -> sparse.csr_array:
        """Curvature of the penalty (of its quadratic majorant where it is Student's)."""
        L = self.method._bending
        return (L.T @ sparse.diags_array(self._weights(x, weight)) @ L).tocsr()

    def _weights(self, x: NDArray, weight: float) -> NDArray:
        bend = self.method._bending @ x
        nu = self.method.student
        return np.full(bend.shape, weight) if nu is None else weight * (nu + 1) / (nu + weight * bend**2)

    def evidence(self, x: NDArray, weight: float) -> float:
        factor = _banded_factor(self.hessian(x, weight), 0.0)
        half_log_det = float(np.log(factor[0]).sum())
        return -self.cost(x, weight) + 0.5 * (x.size - 2) * np.log(weight) - half_log_det

    def describe(self, point: _Point) -> _Answer:
        """Error bars and averaging kernels at the minimum."""
        smearing = self.method.smearing
        inverse = _inverse(self.hessian(point.x, point.weight))
        kernel = np.eye(point.x.size) - (self.prior(point.x, point.weight) @ inverse).T
        I = np.exp(point.x)
        deviation = I * np.sqrt(np.diagonal(inverse))
        return _Answer(
            point.x,
            smearing.at_q(deviation),
            kernel_widths(smearing.at_q(kernel.T).T, smearing.q_calc),
            point.weight,
            point.iterations,
            point.converged,
        )


class _NormalMatrix:
    """``R^T diag(w) R`` in lower band storage, as fast as the shape of R allows.

    The bands are linear in w. For narrow rows the products of their elements are
    kept in one sparse table, and a normal matrix is one product with it.
    """

    def __init__(self, matrix: NDArray) -> None:
        self._matrix = np.where(np.abs(matrix) > 1e-12, matrix, 0.0)
        n, m = matrix.shape
        used = self._matrix != 0
        first = np.argmax(used, axis=1)
        last = m - 1 - np.argmax(used[:, ::-1], axis=1)
        self.bands = max(int((last - first).max()) + 1, 3)
        self._table = self._products(first, last) if n * self.bands**2 / 2 < BAND_ENTRIES else None

    def __call__(self, weights: NDArray) -> NDArray:
        """Return the bands, shape (bands, m)."""
        m = self._matrix.shape[1]
        if self._table is not None:
            return (self._table @ weights).reshape(self.bands, m)
        full = (self._matrix.T * weights) @ self._matrix
        bands = np.zeros((self.bands, m))
        for offset in range(self.bands):
            bands[offset, : m - offset] = np.diagonal(full, -offset)
        return bands

    def _products(self, first: NDArray, last: NDArray) -> sparse.csr_array:
        n, m = self._matrix.shape
        width = int((last - first).max()) + 1
        columns = np.minimum(first[:, None] + np.arange(width), m - 1)
        values = np.where(first[:, None] + np.arange(width) < m, np.take_along_axis(self._matrix, columns, axis=1), 0.0)
        rows = np.arange(n)
        products, targets, sources = [], [], []
        for offset in range(width):
            product = values[:, : width - offset] * values[:, offset:]
            products.append(product.ravel())
            targets.append((offset * m + columns[:, : width - offset]).ravel())
            sources.append(np.repeat(rows, width - offset))
        entries = np.concatenate(products), (np.concatenate(targets), np.concatenate(sources))
        table = sparse.coo_array(entries, shape=(self.bands * m, n)).tocsr()
        table.eliminate_zeros()
        return table


def _banded_factor(bands: NDArray, damping: float) -> NDArray:
    """Cholesky factor with a damped diagonal; rounding that makes it indefinite is damped away."""
    while True:
        lifted = bands.copy()
        lifted[0] *= 1 + damping + 1e-13
        try:
            return cholesky_banded(lifted, lower=True, check_finite=False)
        except LinAlgError:
            damping = max(10 * damping, 1e-12)


def _banded_solve(bands: NDArray, right: NDArray, damping: float) -> NDArray:
    return cho_solve_banded((_banded_factor(bands, damping), True), right, check_finite=False)


def _inverse(bands: NDArray) -> NDArray:
    """Dense inverse of a symmetric positive definite matrix in lower band storage."""
    size = bands.shape[1]
    dense = np.zeros((size, size), order="F")
    for offset in range(bands.shape[0]):
        index = np.arange(size - offset)
        dense[index + offset, index] = bands[offset, : size - offset]
    dense[np.diag_indices(size)] *= 1 + 1e-13
    factor, failed = lapack.dpotrf(dense, lower=True)
    inverse, failed_too = lapack.dpotri(factor, lower=True)
    if failed or failed_too:
        raise BadInput("The curve does not determine an answer: its Idev differ by too many orders of magnitude.")
    return np.tril(inverse) + np.tril(inverse, -1).T


def _coordinate(q: NDArray, q_calc: NDArray) -> NDArray:
    """Measure q in local steps of the measured grid, smoothly; above it, go on as ln q."""
    knots = np.unique(np.linspace(0, q.size - 1, min(9, max(3, q.size // 4))).astype(int))
    index = PchipInterpolator(q[knots], knots.astype(float), extrapolate=True)
    slope = index.derivative()
    below, above = q_calc < q[0], q_calc > q[-1]
    u = index(np.clip(q_calc, q[0], q[-1]))
    u[below] += slope(q[0]) * (q_calc[below] - q[0])
    u[above] += slope(q[-1]) * q[-1] * np.log(q_calc[above] / q[-1])
    return u


def _bending(u: NDArray) -> sparse.csr_array:
    """Matrix L with ``|L x|^2 = int (d^2 x / du^2)^2 du``, shape (m - 2, m)."""
    step = np.diff(u)
    left, right = step[:-1], step[1:]
    scale = np.sqrt((left + right) / 2) * 2 / (left + right)
    bands = [scale / left, -scale * (1 / left + 1 / right), scale / right]
    return sparse.diags_array(bands, offsets=[0, 1, 2], shape=(u.size - 2, u.size)).tocsr()

"""Maximum a posteriori desmearing of ln I with a curvature prior."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import sparse
from scipy.interpolate import PchipInterpolator
from scipy.linalg import LinAlgError, cho_solve, cho_solve_banded, cholesky, cholesky_banded
from scipy.ndimage import gaussian_filter1d

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .kernels import kernel_widths, thinned
from .tails import Tails

__all__ = ["MAP"]

BAND_ENTRIES = 4_000_000
"""Largest table of products of matrix elements that is kept to build banded normal matrices."""

STEP_LIMIT = 2.0
"""Largest change of ln I in one iteration: a Gauss-Newton step is trusted no further."""

START_STEPS = 4
"""Lake's steps before the first Gauss-Newton step: a slit can hide two decades of the forward peak."""

DAMPING = 1e-9
"""Smallest damping: more would hold back smooth modes, which the prior alone decides."""

GIVE_UP = 1e8
"""Damping at which no step helps any more."""

BUDGET = 5
"""Iterations for all weights of a curve together, in units of the limit for one."""

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

    The cost grows with the cube of the nodes. A q_calc of more than 800 is thinned where
    its step is below a fifth of the operator's width, for finer structure cannot be seen.

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
        Limit for each weight, and five times that for all weights together; a curve that
        reaches it is flagged NOT_CONVERGED.
    tolerance
        The iteration stops where the next step would lower J by less.

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
        maximum_iterations: int = 100,
        tolerance: float = 1e-3,
    ) -> None:
        for name, value in {"weight": weight, "student": student, "tolerance": tolerance}.items():
            if value is not None and not value > 0:
                raise BadInput(f"{name} is {value}; it must be positive.")
        self.smearing = thinned(smearing)
        self._q_calc = smearing.q_calc
        # u counts measured steps; the weight of one curve grows with the cube of their number.
        self._first_weight = 100.0 * (smearing.q_calc.size / self.smearing.q_calc.size) ** 3
        self.weight = weight
        self.student = student
        self.maximum_iterations = maximum_iterations
        self.tolerance = tolerance
        self._tails = Tails(self.smearing)
        self._bending = _Bending(_coordinate(self.smearing.q, self.smearing.q_calc))
        self._normal = _NormalMatrix(self.smearing.matrix)

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear curves of any sign, one after another."""
        found = [self._solve(measured, sigma) for measured, sigma in zip(I, Idev, strict=True)]
        return Solution(
            I_calc=np.array([np.interp(self._q_calc, self.smearing.q_calc, np.exp(f.x)) for f in found]),
            Idev=np.array([f.Idev for f in found]),
            Qdev=np.array([f.Qdev for f in found]),
            flags=np.array([0 if f.converged else int(Flag.NOT_CONVERGED) for f in found]),
            diagnostics={name: np.array([getattr(f, name) for f in found]) for name in ("weight", "iterations")},
        )

    def _solve(self, measured: NDArray, sigma: NDArray) -> _Answer:
        problem = _Problem(self, measured, sigma)
        point = problem.minimise(self._start(measured, sigma), self.weight or self._first_weight)
        if self.weight is None:
            point = _most_evident(problem, point)
        return problem.describe(point)

    def _start(self, measured: NDArray, sigma: NDArray) -> NDArray:
        """A few of Lake's steps from the measured curve, floored at a tenth of the noise."""
        positive = np.maximum(measured, 0.1 * sigma)
        I = positive
        for _ in range(START_STEPS):
            smeared = self.smearing.matrix @ self._tails.fill(I, sigma / positive)
            I = I * np.clip(positive / smeared, 0.2, 5.0)
        # A tail fitted to noise may run away in either direction.
        return np.log(np.clip(self._tails.fill(I, sigma / positive), 1e-12 * I.max(), I.max()))


@dataclass(frozen=True)
class _Point:
    """A minimum of J for one weight of the prior."""

    x: NDArray
    weight: float
    evidence: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class _Answer:
    x: NDArray
    Idev: NDArray
    Qdev: NDArray
    weight: float
    iterations: int
    converged: bool


def _most_evident(problem: _Problem, point: _Point) -> _Point:
    """Walk the weight in half decades, warm from point to point, to the maximum of the evidence."""
    best, iterations = point, point.iterations
    budget = BUDGET * problem.method.maximum_iterations
    for step in (-0.5, 0.5):
        exponent = np.log10(point.weight) + step
        while LOG10_WEIGHTS[0] <= exponent <= LOG10_WEIGHTS[1]:
            trial = problem.minimise(best.x, 10**exponent)
            iterations += trial.iterations
            if iterations >= budget:
                return replace(max(best, trial, key=lambda p: p.evidence), iterations=iterations, converged=False)
            if trial.evidence <= best.evidence:
                break
            best, exponent = trial, exponent + step
        if best is not point:
            break
    return replace(best, iterations=iterations)


class _Problem:
    """One curve: J, its Gauss-Newton steps, and what is known of its minimum."""

    def __init__(self, method: MAP, measured: NDArray, sigma: NDArray) -> None:
        self.method = method
        self.R = method.smearing.matrix
        self.measured, self.sigma = measured, sigma
        self.normal = method._normal(sigma**-2)

    def minimise(self, x: NDArray, weight: float) -> _Point:
        """Damped Gauss-Newton (Levenberg) from `x`."""
        damping, cost, converged, iteration = DAMPING, self.cost(x, weight), False, 0
        while not converged and iteration < self.method.maximum_iterations and damping < GIVE_UP:
            iteration += 1
            bands, gradient = self.hessian(x, weight), self.gradient(x, weight)
            step = -_Cholesky(bands, damping).solve(gradient)
            # What the quadratic model promises; a step that is held back promises too little.
            converged = damping < 1e-3 and -0.5 * float(gradient @ step) < self.method.tolerance
            while (trial := self.cost(x + _bounded(step), weight)) > cost and damping < GIVE_UP and not converged:
                damping *= 10
                step = -_Cholesky(bands, damping).solve(gradient)
            if trial <= cost:
                x, cost, damping = x + _bounded(step), trial, max(damping / 10, DAMPING)
        return _Point(x, weight, self.evidence(x, weight), iteration, converged)

    def cost(self, x: NDArray, weight: float) -> float:
        residual = (self.R @ np.exp(x) - self.measured) / self.sigma
        return 0.5 * float(residual @ residual) + self.penalty(x, weight)

    def penalty(self, x: NDArray, weight: float) -> float:
        bend = weight * self.method._bending(x) ** 2
        nu = self.method.student
        return 0.5 * float(bend.sum() if nu is None else (nu + 1) * np.log1p(bend / nu).sum())

    def gradient(self, x: NDArray, weight: float) -> NDArray:
        I = np.exp(x)
        residual = (self.R @ I - self.measured) / self.sigma**2
        bending = self.method._bending
        return I * (residual @ self.R) + bending.adjoint(self._weights(x, weight) * bending(x))

    def hessian(self, x: NDArray, weight: float) -> NDArray:
        """Gauss-Newton Hessian in lower band storage: ``diag(I) R^T Idev^-2 R diag(I) + L^T weights L``."""
        I = np.exp(x)
        padded = np.concatenate([I, np.zeros(len(self.normal) - 1)])
        bands = self.normal * I * sliding_window_view(padded, I.size)
        bands[:3] += self.method._bending.bands(self._weights(x, weight))
        return bands

    def _weights(self, x: NDArray, weight: float) -> NDArray:
        """Weights of the squared bends; for Student's penalty those of its quadratic majorant."""
        bend = self.method._bending(x)
        nu = self.method.student
        return np.full(bend.shape, weight) if nu is None else weight * (nu + 1) / (nu + weight * bend**2)

    def evidence(self, x: NDArray, weight: float) -> float:
        factor = _Cholesky(self.hessian(x, weight))
        return -self.cost(x, weight) + 0.5 * (x.size - 2) * np.log(weight) - factor.half_log_det

    def describe(self, point: _Point) -> _Answer:
        """Error bars and averaging kernels at the minimum."""
        smearing = self.method.smearing
        inverse = _Cholesky(self.hessian(point.x, point.weight), dense=True).solve(np.eye(point.x.size))
        # H^-1 (H - L^T weights L): what the data say, the rest being the prior.
        bending = self.method._bending
        kernel = np.eye(point.x.size) - bending.adjoint(self._weights(point.x, point.weight) * bending(inverse))
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


def _bounded(step: NDArray) -> NDArray:
    return step * min(1.0, STEP_LIMIT / max(float(np.abs(step).max()), STEP_LIMIT))


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


class _Cholesky:
    """Factor of a symmetric positive definite matrix in lower band storage, with a damped diagonal.

    Rounding may make the matrix indefinite; a little more damping cures that.
    """

    def __init__(self, bands: NDArray, damping: float = 0.0, *, dense: bool = False) -> None:
        self._dense = dense or 3 * bands.shape[0] > bands.shape[1]
        full = _full(bands) if self._dense else bands.copy()
        diagonal = np.diagonal(full) if self._dense else full[0]
        diagonal.setflags(write=True)
        original = bands[0]
        while True:
            diagonal[:] = original * (1 + damping + 1e-13)
            try:
                self._factor = self._factorise(full)
                return
            except LinAlgError:
                damping = max(10 * damping, 1e-12)

    def _factorise(self, full: NDArray) -> NDArray:
        factorise = cholesky if self._dense else cholesky_banded
        return factorise(full, lower=True, check_finite=False)

    def solve(self, right: NDArray) -> NDArray:
        solve = cho_solve if self._dense else cho_solve_banded
        return solve((self._factor, True), right, check_finite=False)

    @property
    def half_log_det(self) -> float:
        return float(np.log(np.diagonal(self._factor) if self._dense else self._factor[0]).sum())


def _full(bands: NDArray) -> NDArray:
    """Lower triangle of a matrix in lower band storage, in Fortran order."""
    count, size = bands.shape
    # Element (j + d, j) lies at j (size + 1) + d: the bands are the columns of one more wide.
    memory = np.zeros((size, size + 1))
    memory[:, :count] = bands.T
    return memory.ravel()[: size * size].reshape(size, size).T


def _coordinate(q: NDArray, q_calc: NDArray) -> NDArray:
    """Measure q in local steps of the measured grid, smoothed; above it, go on as ln q."""
    steps = np.log(np.diff(q))
    reach = max(steps.size // 8, 1)
    # Odd reflection keeps a uniform and a logarithmic grid what they are up to their ends.
    padded = np.pad(steps, reach, mode="reflect", reflect_type="odd")
    local = np.exp(gaussian_filter1d(padded, reach / 3, truncate=3)[reach : reach + steps.size])
    inside = PchipInterpolator(q, np.concatenate([[0.0], np.cumsum(np.diff(q) / local)]))
    below, above = q_calc < q[0], q_calc > q[-1]
    u = inside(np.clip(q_calc, q[0], q[-1]))
    u[below] += (q_calc[below] - q[0]) / local[0]
    u[above] += q[-1] / local[-1] * np.log(q_calc[above] / q[-1])
    return u


class _Bending:
    """The operator L with ``|L x|^2 = int (d^2 x / du^2)^2 du`` for x on the nodes u, shape (m - 2, m)."""

    def __init__(self, u: NDArray) -> None:
        step = np.diff(u)
        left, right = step[:-1], step[1:]
        scale = np.sqrt((left + right) / 2) * 2 / (left + right)
        self._left, self._middle, self._right = scale / left, -scale * (1 / left + 1 / right), scale / right

    def __call__(self, x: NDArray) -> NDArray:
        """Apply L along the last axis."""
        return self._left * x[..., :-2] + self._middle * x[..., 1:-1] + self._right * x[..., 2:]

    def adjoint(self, y: NDArray) -> NDArray:
        """Apply the transpose of L along the last axis."""
        x = np.zeros((*y.shape[:-1], y.shape[-1] + 2))
        x[..., :-2] += self._left * y
        x[..., 1:-1] += self._middle * y
        x[..., 2:] += self._right * y
        return x

    def bands(self, weights: NDArray) -> NDArray:
        """``L^T diag(weights) L`` in lower band storage, shape (3, m)."""
        bands = np.zeros((3, weights.size + 2))
        bands[0, :-2] += weights * self._left**2
        bands[0, 1:-1] += weights * self._middle**2
        bands[0, 2:] += weights * self._right**2
        bands[1, :-2] += weights * self._left * self._middle
        bands[1, 1:-1] += weights * self._middle * self._right
        bands[2, :-2] += weights * self._left * self._right
        return bands

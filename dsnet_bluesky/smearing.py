"""Smearing operators: the matrix R(q, q_calc) by which an instrument blurs a curve.

A measured curve is ``I_s = R @ I(q_calc)``. R is a matrix and not a convolution:
near the beam, at the ends of the record, in sectors and behind masks the kernel
changes from point to point. Every row of R sums to one, and `q_calc` reaches
beyond the measured `q` on both sides, because the instrument does.

Everything that smears or desmears takes one `Smearing`. Between the nodes of
`q_calc` a curve is piecewise linear (hat functions); beyond its ends it is
taken as constant. All constructors integrate hat functions, so R is exact for
curves of that kind whatever the spacing of the nodes.

All lengths in reciprocal space are in 1/nm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ive, ndtr

from .data import BadInput

__all__ = ["Smearing", "extend"]

T = TypeVar("T")
Floats = NDArray[np.floating[Any]]

GAUSSIAN_REACH = 5.0
"""How far, in standard deviations, `q_calc` reaches beyond `q` for Gaussian kernels."""


class Smearing:
    """A linear operator from a curve on `q_calc` to the smeared curve on `q`.

    Parameters
    ----------
    q
        Where the smeared curve is measured, shape (n,), ascending, in 1/nm.
    q_calc
        Where the unsmeared curve must be known, shape (m,), ascending, in 1/nm.
    matrix
        R, shape (n, m); rows sum to one.
    kind
        Name of the constructor, kept for provenance.
    **parameters
        What the constructor was given (numbers and strings), kept for provenance.

    Raises
    ------
    BadInput
        If a grid is not ascending or the shapes do not agree.
    """

    def __init__(self, q: ArrayLike, q_calc: ArrayLike, matrix: ArrayLike, *, kind: str = "matrix", **parameters: Any) -> None:
        self.q = _grid(q, "q")
        self.q_calc = _grid(q_calc, "q_calc")
        self.matrix = _frozen(matrix)
        if self.matrix.shape != (self.q.size, self.q_calc.size):
            raise BadInput(f"The matrix has shape {self.matrix.shape}; q and q_calc ask for ({self.q.size}, {self.q_calc.size}).")
        if not np.isfinite(self.matrix).all():
            raise BadInput("The smearing matrix holds NaN or infinity; check the beam and the widths it was made from.")
        self.kind = kind
        self.parameters: Mapping[str, Any] = MappingProxyType(parameters)
        self._tensors: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<Smearing {self.kind}: {self.q.size} x {self.q_calc.size}, q {self.q[0]:.4g} to {self.q[-1]:.4g} 1/nm>"

    def apply(self, I: T) -> T:
        """Smear curves.

        Parameters
        ----------
        I
            Unsmeared curves on `q_calc`, shape (..., m); numpy array or torch tensor.

        Returns
        -------
        array of the same kind
            Smeared curves on `q`, shape (..., n).
        """
        return I @ self._matrix_for(I).T  # type: ignore[operator]

    def adjoint(self, y: T) -> T:
        """Apply the transpose of R: ``<R x, y> = <x, adjoint(y)>``.

        Parameters
        ----------
        y
            Shape (..., n); numpy array or torch tensor.

        Returns
        -------
        array of the same kind
            Shape (..., m).
        """
        return y @ self._matrix_for(y)  # type: ignore[operator]

    def at_q(self, I: ArrayLike) -> Floats:
        """Interpolate curves on `q_calc`, shape (..., m), to `q`, shape (..., n), linearly as R does."""
        values = np.asarray(I, dtype=float)
        index, fraction = _locate(self.q, self.q_calc)
        return values[..., index] * (1 - fraction) + values[..., index + 1] * fraction

    @cached_property
    def mean(self) -> Floats:
        """Mean of q_calc under each row, shape (n,), in 1/nm."""
        return self.matrix @ self.q_calc

    @cached_property
    def widths(self) -> Floats:
        """Standard deviation of q_calc under each row (`Qdev`), shape (n,), in 1/nm."""
        variance = self.matrix @ self.q_calc**2 - self.mean**2
        return np.sqrt(np.maximum(variance, 0.0))

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of the grids and the matrix: two operators with one digest are the same."""
        sha = hashlib.sha256()
        for array in (self.q, self.q_calc, self.matrix):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def __matmul__(self, other: Smearing) -> Smearing:
        """Compose: ``(A @ B).apply(I) == A.apply(B.apply(I))``; B acts on the curve first.

        Raises
        ------
        BadInput
            If the left operator does not start from the grid where the right one ends.
        """
        if self.q_calc.shape != other.q.shape or not np.allclose(self.q_calc, other.q, rtol=1e-9, atol=1e-12):
            raise BadInput(
                "Cannot compose: build the right operator on the left one's q_calc, e.g. Smearing.wavelength(R.q_calc, spread)."
            )
        return Smearing(
            self.q,
            other.q_calc,
            self.matrix @ other.matrix,
            kind=f"{self.kind} @ {other.kind}",
            **self.parameters,
            **{k: v for k, v in other.parameters.items() if k not in self.parameters},
        )

    def _matrix_for(self, values: Any) -> Any:
        """Give the matrix as the same kind of array as `values`, without importing torch."""
        if not hasattr(values, "new_tensor"):
            return self.matrix
        key = (values.dtype, values.device)
        if key not in self._tensors:
            self._tensors[key] = values.new_tensor(np.array(self.matrix))
        return self._tensors[key]

    # Constructors

    @classmethod
    def identity(cls, q: ArrayLike) -> Smearing:
        """No smearing at all, q_calc = q."""
        q = _grid(q, "q")
        return cls(q, q, np.eye(q.size), kind="identity")

    @classmethod
    def gaussian(cls, q: ArrayLike, sigma: float, *, q_calc: ArrayLike | None = None) -> Smearing:
        """Stationary Gaussian in one dimension, the published DSNet's model of an instrument.

        ``I_s(q) = int I(|q - u|) exp(-u^2 / 2 sigma^2) du / sqrt(2 pi sigma^2)``.

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        sigma
            Standard deviation in 1/nm.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by 5 sigma.
        """
        q = _grid(q, "q")
        _positive(sigma, "sigma")
        return cls._from_normal(q, np.full(q.size, float(sigma)), q_calc, kind="gaussian", sigma=float(sigma))

    @classmethod
    def pinhole(cls, q: ArrayLike, dq: ArrayLike, *, q_calc: ArrayLike | None = None) -> Smearing:
        """Gaussian whose width changes from point to point: the dQ column of a file.

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        dq
            One standard deviation in 1/nm, scalar or shape (n,), not negative.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by 5 dq.
        """
        q = _grid(q, "q")
        try:
            sigma = np.broadcast_to(np.asarray(dq, dtype=float), q.shape)
        except ValueError:
            raise BadInput(f"dQ has shape {np.shape(dq)} and q has shape {q.shape}: they must agree.") from None
        if not np.isfinite(sigma).all() or (sigma < 0).any() or not sigma.any():
            raise BadInput("dQ must be finite, not negative, and not zero everywhere.")
        return cls._from_normal(q, sigma, q_calc, kind="pinhole", dq_mean=float(sigma.mean()))

    @classmethod
    def _from_normal(cls, q: Floats, widths: Floats, q_calc: ArrayLike | None, **attributes: Any) -> Smearing:
        reach = GAUSSIAN_REACH * widths
        nodes = (
            extend(q, float((reach - (q - q[0])).max()), float((reach - (q[-1] - q)).max()))
            if q_calc is None
            else _grid(q_calc, "q_calc")
        )
        # The curve is even in q: what the kernel puts below zero is found at |q|.
        matrix = _normal_hats(q, widths, nodes) + _normal_hats(-q, widths, nodes)
        sharp = widths == 0
        matrix[sharp] = _hats(q[sharp, None], np.ones((int(sharp.sum()), 1)), nodes)
        return cls(q, nodes, _close_rows(matrix), **attributes)

    @classmethod
    def rice(cls, q: ArrayLike, sigma: float, *, q_calc: ArrayLike | None = None) -> Smearing:
        """Isotropic Gaussian beam on a full azimuthal average.

        ``R(q, q') = (q' / s^2) exp(-(q - q')^2 / 2 s^2) ive(0, q q' / s^2)``: the
        distribution of |q + v| with v normal in two dimensions (Rice).

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        sigma
            Standard deviation of the beam along each axis, in 1/nm, so that <rho^2> = 2 sigma^2.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by 5 sigma.
        """
        q = _grid(q, "q")
        _positive(sigma, "sigma")
        reach = GAUSSIAN_REACH * sigma
        nodes = extend(q, reach, reach) if q_calc is None else _grid(q_calc, "q_calc")
        x, w = _quadrature(nodes, sigma)
        density = x / sigma**2 * np.exp(-((q[:, None] - x) ** 2) / (2 * sigma**2)) * ive(0, q[:, None] * x / sigma**2)
        return cls(
            q, nodes, _close_rows(_hats(np.broadcast_to(x, density.shape), density * w, nodes)), kind="rice", sigma=float(sigma)
        )

    @classmethod
    def rings(
        cls, q: ArrayLike, rho: ArrayLike, p: ArrayLike, *, q_calc: ArrayLike | None = None, azimuths: int = 64
    ) -> Smearing:
        """Beam of any shape on a full azimuthal average.

        ``I_s(q) = sum_k p_k (1/pi) int_0^pi I(sqrt(q^2 + rho_k^2 - 2 q rho_k cos(phi))) dphi``.

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        rho
            Radii of the beam's rings about its centre, in 1/nm, shape (k,).
        p
            Ring sums (not means) of the direct beam, shape (k,); normalised here.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by the largest radius.
        azimuths
            Midpoints in phi for each ring.
        """
        q = _grid(q, "q")
        rho, p = np.asarray(rho, dtype=float), np.asarray(p, dtype=float)
        if rho.shape != p.shape or rho.ndim != 1 or not p.sum() > 0 or (rho < 0).any():
            raise BadInput("rho and p must be one-dimensional and of one length, rho >= 0 and the sum of p positive.")
        rho, weight = rho[p != 0], p[p != 0] / p.sum()
        nodes = extend(q, float(rho.max()), float(rho.max())) if q_calc is None else _grid(q_calc, "q_calc")
        cosine = np.cos((np.arange(azimuths) + 0.5) * np.pi / azimuths)
        weights = np.repeat(weight / azimuths, azimuths)
        matrix = np.empty((q.size, nodes.size))
        for rows in _blocks(q.size, weights.size):
            square = q[rows, None, None] ** 2 + rho[:, None] ** 2 - 2 * q[rows, None, None] * rho[:, None] * cosine
            points = np.sqrt(np.maximum(square, 0)).reshape(-1, weights.size)
            matrix[rows] = _hats(points, np.broadcast_to(weights, points.shape), nodes)
        return cls(q, nodes, matrix, kind="rings", rms_radius=float(np.sqrt(weight @ rho**2)))

    @classmethod
    def slit(
        cls,
        q: ArrayLike,
        length: float,
        width: float = 0.0,
        *,
        profile: tuple[ArrayLike, ArrayLike] | None = None,
        q_calc: ArrayLike | None = None,
    ) -> Smearing:
        """Bonse-Hart or Kratky slit.

        ``I_s(q) = int P(l) I(sqrt((q + w)^2 + l^2)) dl dw``, with w uniform on
        [-width, width] and l uniform on [-length, length] unless a profile is
        given (Lake, Acta Cryst. 23 (1967) 191, doi:10.1107/S0365110X67002440).

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        length
            HALF the slit length in 1/nm (`dQl` of a file). Ignored when a profile is given.
        width
            HALF the slit width in 1/nm (`dQw` of a file).
        profile
            Measured slit-length profile: l in 1/nm (ascending) and P(l). Both
            signs of l are folded onto one, since I depends on |l|.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by what the slit reaches.
        """
        q = _grid(q, "q")
        if not (0 <= width < np.inf and 0 <= length < np.inf) or (profile is None and length == 0 and width == 0):
            raise BadInput(
                f"A slit of half-length {length} and half-width {width} 1/nm does not smear; both must be >= 0, one > 0."
            )
        edges, density = _length_profile(length, profile)
        reach = float(edges[-1])
        nodes = (
            extend(q, min(width, q[0]), float(np.hypot(q[-1] + width, reach) - q[-1]))
            if q_calc is None
            else _grid(q_calc, "q_calc")
        )
        centres = np.abs(q[:, None] + width * _midpoints(33)) if width else q[:, None]
        matrix = np.zeros((q.size, nodes.size))
        for column in centres.T:
            matrix += _slit_hats(column, edges, density, nodes) / centres.shape[1]
        return cls(q, nodes, _close_rows(matrix), kind="slit", length=reach, width=float(width))

    @classmethod
    def wavelength(cls, q: ArrayLike, spread: float, *, q_calc: ArrayLike | None = None) -> Smearing:
        """Spread of the wavelength: ``I_s(q) = <I(q / (1 + eps))>``, eps normal.

        It acts on the curve before the beam does: ``beam @ Smearing.wavelength(beam.q_calc, spread)``.

        Parameters
        ----------
        q
            Grid in 1/nm, shape (n,), ascending; may start at 0.
        spread
            Standard deviation of the wavelength over its mean (FWHM / 2.355).
        q_calc
            Grid of the unsmeared curve; by default `q` extended by 5 spreads.
        """
        q = _grid(q, "q")
        _positive(spread, "spread")
        if not spread < 0.2:
            raise BadInput(
                f"A wavelength spread of {spread:g} is not small; give the standard deviation as a fraction, e.g. 0.01."
            )
        epsilon = np.linspace(-GAUSSIAN_REACH, GAUSSIAN_REACH, 201) * spread
        weight = np.exp(-0.5 * (epsilon / spread) ** 2)
        points = q[:, None] / (1 + epsilon)
        nodes = (
            extend(q, float(q[0] - points[0].min()), float(points[-1].max() - q[-1]))
            if q_calc is None
            else _grid(q_calc, "q_calc")
        )
        matrix = _hats(points, np.broadcast_to(weight / weight.sum(), points.shape), nodes)
        return cls(q, nodes, matrix, kind="wavelength", spread=float(spread))

    @classmethod
    def pixel_coverage(
        cls,
        q: ArrayLike,
        y: NDArray,
        x: NDArray,
        beam: NDArray,
        beam_y: ArrayLike,
        beam_x: ArrayLike,
        *,
        distance: float,
        wavelength: float,
        mask: NDArray | None = None,
        bins: NDArray | None = None,
        q_calc: ArrayLike | None = None,
        per_bin: int = 256,
    ) -> Smearing:
        """Exact operator of a masked detector: every pixel of a bin sees the whole beam.

        ``R_ij = mean over pixels of bin i of sum_v beam(v) hat_j(q(|x - v|))``. It holds
        masks, gaps, beamstop and arm, sectors, the detector's corners, the width
        of a bin and the shape of the beam; see docs/explanation/smearing.md.

        Parameters
        ----------
        q
            Centres of the q bins in 1/nm, shape (n,).
        y, x
            Positions of the detector's pixels in m from the beam centre, in the
            plane normal to the beam; any one shape.
        beam
            Direct beam, shape (ny, nx); normalised here.
        beam_y, beam_x
            Positions of the beam's pixels in m from the beam centre, shapes (ny,) and (nx,).
        distance
            Sample to detector in m.
        wavelength
            In nm.
        mask
            True where a pixel does not count, same shape as `y`.
        bins
            Index of each pixel's q bin, negative where it does not count, same shape
            as `y`. By default the edges of the bins lie half-way between their centres.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by the beam's largest radius.
        per_bin
            Pixels used of each bin, evenly in azimuth; more is slower and less noisy.

        Raises
        ------
        BadInput
            If a bin holds no pixel, or the beam no intensity.
        """
        q = _grid(q, "q")
        beam = np.where(np.isfinite(beam), beam, 0.0)
        if not beam.sum() > 0:
            raise BadInput("The direct beam holds no intensity; check its exposure and mask.")
        by, bx = np.meshgrid(np.asarray(beam_y, dtype=float), np.asarray(beam_x, dtype=float), indexing="ij")
        keep = beam != 0
        by, bx, weight = by[keep], bx[keep], beam[keep] / beam.sum()
        reach = float(_q_of(np.hypot(by, bx).max() ** 2, distance, wavelength))
        nodes = extend(q, reach, reach) if q_calc is None else _grid(q_calc, "q_calc")
        bins = _bins_of(q, _q_of(y**2 + x**2, distance, wavelength)) if bins is None else np.asarray(bins)
        if mask is not None:
            bins = np.where(mask, -1, bins)
        pixel_y, pixel_x, rows = _sample_bins(q, y, x, bins, per_bin)
        share = (1.0 / np.bincount(rows, minlength=q.size))[rows]
        offset = rows * nodes.size
        flat = np.zeros(q.size * nodes.size)
        for dy, dx, w in zip(by, bx, weight, strict=True):
            index, fraction = _locate(_q_of((pixel_y - dy) ** 2 + (pixel_x - dx) ** 2, distance, wavelength), nodes)
            index += offset
            right = fraction * (share * w)
            flat += np.bincount(index, share * w - right, minlength=flat.size)
            flat += np.bincount(index + 1, right, minlength=flat.size)
        return cls(
            q, nodes, flat.reshape(q.size, nodes.size), kind="pixel_coverage", per_bin=per_bin, beam_pixels=int(weight.size)
        )


def extend(q: ArrayLike, below: float, above: float) -> Floats:
    """Extend a grid on both sides so that `q` stays part of it.

    The spacing goes on as it was at each end; far out (beyond 200 steps) it widens.
    The grid never goes below zero, and holds zero where it would.

    Parameters
    ----------
    q
        Ascending grid in 1/nm, shape (n,).
    below, above
        How far to go beyond the first and the last point, in 1/nm.

    Returns
    -------
    ndarray
        The extended grid, which contains every point of `q`.
    """
    q = np.asarray(q, dtype=float)
    spacing = np.diff(q)
    step = float(np.median(spacing[:5]))
    low = q[0] - _march(step, below)[::-1]
    if low.size and low[0] < 0.1 * step:
        low = np.append(0.0, low[low >= 0.1 * step])
    return np.concatenate([low[low < q[0]], q, q[-1] + _march(float(np.median(spacing[-5:])), above)])


def _march(step: float, reach: float) -> Floats:
    """Distances step, 2 step ... that just pass `reach`; they widen after 200 steps."""
    if reach <= 1e-9 * step:
        return np.empty(0)
    uniform = step * np.arange(1, min(int(np.ceil(reach / step - 1e-9)), 200) + 1)
    if uniform[-1] >= reach * (1 - 1e-12):
        return uniform
    count = int(np.ceil(np.log(reach / uniform[-1]) / np.log(1.03)))
    return np.concatenate([uniform, uniform[-1] * 1.03 ** np.arange(1, count + 1)])


def _grid(values: ArrayLike, name: str) -> Floats:
    grid = _frozen(values)
    if grid.ndim != 1 or grid.size < 2:
        raise BadInput(f"{name} must be one-dimensional with at least two points; it has shape {grid.shape}.")
    if not np.isfinite(grid).all() or grid[0] < 0 or not (np.diff(grid) > 0).all():
        raise BadInput(f"{name} must be finite, not negative and strictly ascending; sort the points and merge repeated ones.")
    return grid


def _frozen(values: ArrayLike) -> Floats:
    array = np.array(values, dtype=float)
    array.setflags(write=False)
    return array


def _positive(value: float, name: str) -> None:
    if not (np.isfinite(value) and value > 0):
        raise BadInput(f"{name} is {value}; it must be positive.")


def _blocks(rows: int, columns: int, entries: int = 2_000_000) -> list[slice]:
    """Slices of rows that keep a (rows, columns) work array below `entries`."""
    size = max(1, entries // max(columns, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _locate(points: Floats, nodes: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Index of the node to the left of each point and the fraction of the way to the next, clamped."""
    step = (nodes[-1] - nodes[0]) / (nodes.size - 1)
    if np.allclose(np.diff(nodes), step, rtol=1e-6, atol=0):
        position = np.clip((points - nodes[0]) / step, 0, nodes.size - 1)
        index = np.minimum(position.astype(np.intp), nodes.size - 2)
        return index, position - index
    inside = np.clip(points, nodes[0], nodes[-1])
    index = np.clip(np.searchsorted(nodes, inside, side="right") - 1, 0, nodes.size - 2)
    return index, (inside - nodes[index]) / (nodes[index + 1] - nodes[index])


def _hats(points: Floats, weights: Floats, nodes: Floats) -> Floats:
    """Matrix of ``sum_k weights_ik hat_j(points_ik)``, shape (n, m)."""
    rows, size = points.shape[0], nodes.size
    index, fraction = _locate(points, nodes)
    index = (index + size * np.arange(rows)[:, None]).ravel()
    right = (weights * fraction).ravel()
    left = weights.ravel() - right
    flat: Any = np.bincount(index, left, minlength=rows * size) + np.bincount(index + 1, right, minlength=rows * size)
    return flat.reshape(rows, size)


def _from_moments(zeroth: Floats, first: Floats, nodes: Floats) -> Floats:
    """Hat weights from the moments of a kernel over each interval, shapes (n, m - 1)."""
    step = np.diff(nodes)
    matrix = np.zeros((zeroth.shape[0], nodes.size))
    matrix[:, :-1] += (nodes[1:] * zeroth - first) / step
    matrix[:, 1:] += (first - nodes[:-1] * zeroth) / step
    return matrix


def _normal_hats(centre: Floats, sigma: Floats, nodes: Floats) -> Floats:
    """Integrate hats under normal densities over q' >= 0; rows with sigma = 0 mean nothing."""
    scale = np.where(sigma > 0, sigma, 1.0)[:, None]
    z = (nodes - centre[:, None]) / scale
    cumulative = ndtr(z)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    zeroth = np.diff(cumulative, axis=1)
    first = centre[:, None] * zeroth - scale * np.diff(density, axis=1)
    matrix = _from_moments(zeroth, first, nodes)
    matrix[:, 0] += cumulative[:, 0] - ndtr(-centre[:, None] / scale)[:, 0]
    matrix[:, -1] += 1 - cumulative[:, -1]
    return matrix


def _quadrature(nodes: Floats, scale: float) -> tuple[Floats, Floats]:
    """Gauss-Legendre points and weights from 0 to the last node, fine against `scale`."""
    edges = np.unique(np.concatenate([[0.0], nodes]))
    pieces = np.maximum(np.ceil(np.diff(edges) / scale).astype(int), 1)
    fine = np.concatenate([np.linspace(a, b, n, endpoint=False) for a, b, n in zip(edges[:-1], edges[1:], pieces, strict=True)])
    fine = np.append(fine, edges[-1])
    x, w = np.polynomial.legendre.leggauss(8)
    half = np.diff(fine)[:, None] / 2
    return ((fine[:-1, None] + half) + half * x).ravel(), (half * w).ravel()


def _close_rows(matrix: Floats) -> Floats:
    """Give what a kernel leaves beyond the last node to that node: rows then sum to one."""
    rest = 1 - matrix.sum(axis=1)
    assert rest.min() > -1e-6, "a kernel holds more than its whole weight"
    matrix[:, -1] += rest
    return matrix


def _midpoints(count: int) -> Floats:
    """Midpoints of `count` equal parts of [-1, 1]."""
    return (2 * np.arange(count) + 1) / count - 1


def _length_profile(length: float, profile: tuple[ArrayLike, ArrayLike] | None) -> tuple[Floats, Floats]:
    """Edges of cells in |l|, shape (k + 1,), and the weight per length in each, shape (k,)."""
    if profile is None:
        return np.array([0.0, length]), np.array([1.0 / length if length else np.inf])
    l, p = (np.asarray(v, dtype=float) for v in profile)
    if l.ndim != 1 or l.shape != p.shape or l.size < 2 or not (np.diff(l) > 0).all():
        raise BadInput("A slit-length profile needs two columns of one length: l ascending in 1/nm, and its weight.")
    edges = np.linspace(0, np.abs(l).max(), 401)
    centre = (edges[1:] + edges[:-1]) / 2
    density = np.interp(centre, l, p, left=0, right=0) + np.interp(-centre, l, p, left=0, right=0)
    total = float(density @ np.diff(edges))
    if not total > 0:
        raise BadInput("The slit-length profile has no weight.")
    return edges, density / total


def _slit_hats(q: Floats, edges: Floats, density: Floats, nodes: Floats) -> Floats:
    """Integrate hats along a slit: ``sum_k density_k int_{edges_k}^{edges_k+1} hat(sqrt(q^2 + l^2)) dl``."""
    if edges[-1] == 0:
        return _hats(q[:, None], np.ones((q.size, 1)), nodes)
    if density.size == 1:
        return density[0] * _slit_integral(q, float(edges[-1]), nodes)
    x, w = np.polynomial.legendre.leggauss(4)
    half = np.diff(edges)[:, None] / 2
    l, weight = (edges[:-1, None] + half + half * x).ravel(), (density[:, None] * half * w).ravel()
    points = np.hypot(q[:, None], l)
    return _hats(points, np.broadcast_to(weight, points.shape), nodes)


def _slit_integral(q: Floats, length: float, nodes: Floats) -> Floats:
    """``int_0^length hat_j(sqrt(q^2 + l^2)) dl``, shape (n, m), in closed form.

    With Q = sqrt(q^2 + l^2), dl = Q dQ / l; the moments over an interval of Q are
    differences of l and of (Q l + q^2 ln(Q + l)) / 2.
    """
    column = q[:, None]
    Q = np.clip(nodes, column, np.hypot(column, length))
    l = np.sqrt(np.maximum(Q**2 - column**2, 0))
    log = np.log(np.maximum(Q + l, np.finfo(float).tiny))
    zeroth = np.diff(l, axis=1)
    first = np.diff((Q * l + column**2 * log) / 2, axis=1)
    matrix = _from_moments(zeroth, first, nodes)
    matrix[:, 0] += l[:, 0]
    matrix[:, -1] += length - l[:, -1]
    return matrix


def _q_of(radius_squared: Any, distance: float, wavelength: float) -> Any:
    """``q = 4 pi / wavelength sin(theta / 2)`` from the squared radius on the detector, without trigonometry."""
    cosine = distance / np.sqrt(radius_squared + distance**2)
    return 4 * np.pi / wavelength * np.sqrt(np.maximum(0.5 * (1 - cosine), 0))


def _bins_of(q: Floats, values: Floats) -> NDArray[np.intp]:
    """Index of the bin that each value lies in, -1 outside; edges half-way between the centres."""
    edges = np.concatenate([[1.5 * q[0] - 0.5 * q[1]], (q[1:] + q[:-1]) / 2, [1.5 * q[-1] - 0.5 * q[-2]]])
    index = np.searchsorted(edges, values, side="right") - 1
    return np.where(index < q.size, index, -1)


def _sample_bins(q: Floats, y: NDArray, x: NDArray, bins: NDArray, per_bin: int) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Take up to `per_bin` pixels of each bin, evenly in azimuth: their y, x and bin."""
    keep = bins >= 0
    y, x, bins = np.asarray(y, dtype=float)[keep], np.asarray(x, dtype=float)[keep], bins[keep]
    order = np.lexsort((np.arctan2(y, x), bins))
    start = np.searchsorted(bins[order], np.arange(q.size + 1))
    count = np.diff(start)
    if (count == 0).any():
        empty = q[count == 0]
        raise BadInput(f"{empty.size} q bins hold no unmasked pixel (first at {empty[0]:.4g} 1/nm); leave them out of q.")
    picks = [s + (np.arange(min(n, per_bin)) + 0.5) * n / min(n, per_bin) for s, n in zip(start[:-1], count, strict=True)]
    chosen = order[np.concatenate(picks).astype(np.intp)]
    return y[chosen], x[chosen], bins[chosen]

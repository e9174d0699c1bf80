"""Smearing operators: the matrix R(q, q_calc) by which an instrument blurs a curve.

A measured curve is ``I_s = R @ I(q_calc)``. R is a matrix and not a convolution:
near the beam, at the ends of the record, in sectors and behind masks the kernel
changes from point to point. Every row of R sums to one, and `q_calc` reaches
beyond the measured `q` on both sides, because the instrument does.

Everything that smears or desmears takes one `Smearing`. Between the nodes of
`q_calc` a curve is piecewise linear (hat functions); beyond its ends it is
taken as constant. All constructors integrate hat functions; how exactly, for curves
of that kind, depends on the kernel:

- `gaussian`, `pinhole`, and `slit` without a width and a profile are in closed form, `rice`
  is by Gauss-Legendre between the nodes: exact whatever the spacing of the nodes.
- `rings` (azimuths), `wavelength`, the width of a `slit`, its profile and `pixel_coverage`
  (pixels) are sums over samples. They are as good while samples lie closer together than the
  nodes, or the curve is smooth from one sample to the next. The docstrings say how many there
  are; most grow with the kernel's width in steps of q, up to a bound.

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
from scipy.special import ive

from dsnet_bluesky.data import BadInput

from .hats import (
    Floats,
    bins_of,
    blocks,
    close_rows,
    extend,
    frozen,
    grid,
    hats,
    length_profile,
    locate,
    midpoints,
    normal_hats,
    positive,
    q_of,
    quadrature,
    sample_bins,
    samples,
    slit_hats,
    uniform_length,
)

__all__ = ["Smearing", "extend"]

T = TypeVar("T")

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
    dq
        One standard deviation of the instrument at each q, shape (n,), in 1/nm, where the
        operator was built from it; see `resolution`.
    **parameters
        What the constructor was given (numbers and strings), kept for provenance.

    Raises
    ------
    BadInput
        If a grid is not ascending or the shapes do not agree.
    """

    def __init__(
        self,
        q: ArrayLike,
        q_calc: ArrayLike,
        matrix: ArrayLike,
        *,
        kind: str = "matrix",
        dq: ArrayLike | None = None,
        **parameters: Any,
    ) -> None:
        self.q = grid(q, "q")
        self.q_calc = grid(q_calc, "q_calc")
        self.matrix = frozen(matrix)
        if self.matrix.shape != (self.q.size, self.q_calc.size):
            raise BadInput(f"The matrix has shape {self.matrix.shape}; q and q_calc ask for ({self.q.size}, {self.q_calc.size}).")
        if not np.isfinite(self.matrix).all():
            raise BadInput("The smearing matrix holds NaN or infinity; check the beam and the widths it was made from.")
        self.kind = kind
        self.dq = None if dq is None else frozen(dq)
        self.parameters: Mapping[str, Any] = MappingProxyType(parameters)
        self._tensors: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            "arrays": (self.q, self.q_calc, self.matrix),
            "kind": self.kind,
            "dq": self.dq,
            "parameters": dict(self.parameters),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["arrays"], kind=state["kind"], dq=state["dq"], **state["parameters"])  # type: ignore[misc]

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
        index, fraction = locate(self.q, self.q_calc)
        return values[..., index] * (1 - fraction) + values[..., index + 1] * fraction

    @cached_property
    def mean(self) -> Floats:
        """Mean of q_calc under each row, shape (n,), in 1/nm."""
        return self.matrix @ self.q_calc

    @cached_property
    def widths(self) -> Floats:
        """Standard deviation of q_calc under each row, shape (n,), in 1/nm: of the kernel and the hat functions together."""
        return np.sqrt(np.maximum(self._variance, 0.0))

    @cached_property
    def resolution(self) -> Floats:
        """Standard deviation of the instrument at each q (`Qdev` of a file), shape (n,), in 1/nm.

        What the operator was built from, where that was a standard deviation; else `widths`
        without what hat functions add, so that who reads it and builds an operator adds that once.
        """
        if self.dq is not None:
            return self.dq
        # A point of the kernel at t (1 - t) of a step h is shared by the nodes about it, which adds t (1 - t) h^2 to the
        # variance: h^2 / 6 on average. Half of each interval's weight is with the node at either end of it.
        below, above = np.diff(self.q_calc, prepend=self.q_calc[0]), np.diff(self.q_calc, append=self.q_calc[-1])
        shared = (below**3 + above**3) / (6 * (below + above))
        # Kernels narrower than a step may have less than the average, down to none where they sit on a node: never below zero.
        return np.sqrt(np.maximum(self._variance - self.matrix @ shared, 0.0))

    @cached_property
    def _variance(self) -> Floats:
        return self.matrix @ self.q_calc**2 - self.mean**2

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
        q = grid(q, "q")
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
        q = grid(q, "q")
        positive(sigma, "sigma")
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
        q = grid(q, "q")
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
            else grid(q_calc, "q_calc")
        )
        # The curve is even in q: what the kernel puts below zero is found at |q|.
        matrix = normal_hats(q, widths, nodes) + normal_hats(-q, widths, nodes)
        sharp = widths == 0
        matrix[sharp] = hats(q[sharp, None], np.ones((int(sharp.sum()), 1)), nodes)
        return cls(q, nodes, close_rows(matrix), dq=widths, **attributes)

    @classmethod
    def rice(cls, q: ArrayLike, sigma: float, *, q_calc: ArrayLike | None = None) -> Smearing:
        """Isotropic Gaussian beam on a full azimuthal average.

        ``R(q, q') = (q' / s^2) exp(-(q - q')^2 / 2 s^2) ive(0, q q' / s^2)``: the
        distribution of ``|q + v|`` with v normal in two dimensions (Rice).

        Parameters
        ----------
        q
            Measured grid in 1/nm, shape (n,).
        sigma
            Standard deviation of the beam along each axis, in 1/nm, so that <rho^2> = 2 sigma^2.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by 5 sigma.
        """
        q = grid(q, "q")
        positive(sigma, "sigma")
        reach = GAUSSIAN_REACH * sigma
        nodes = extend(q, reach, reach) if q_calc is None else grid(q_calc, "q_calc")
        x, w = quadrature(nodes, sigma)
        density = x / sigma**2 * np.exp(-((q[:, None] - x) ** 2) / (2 * sigma**2)) * ive(0, q[:, None] * x / sigma**2)
        return cls(
            q, nodes, close_rows(hats(np.broadcast_to(x, density.shape), density * w, nodes)), kind="rice", sigma=float(sigma)
        )

    @classmethod
    def rings(
        cls, q: ArrayLike, rho: ArrayLike, p: ArrayLike, *, q_calc: ArrayLike | None = None, azimuths: int | None = None
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
            Midpoints in phi for each ring; they lie up to ``pi rho / azimuths`` apart in q. By
            default 64, and up to 512 where the beam's rms radius is more than 20 steps of q. A peak
            narrower than both, the distance and a step, becomes a comb.
        """
        q = grid(q, "q")
        rho, p = np.asarray(rho, dtype=float), np.asarray(p, dtype=float)
        if rho.shape != p.shape or rho.ndim != 1 or not p.sum() > 0 or (rho < 0).any():
            raise BadInput("rho and p must be one-dimensional and of one length, rho >= 0 and the sum of p positive.")
        rho, weight = rho[p != 0], p[p != 0] / p.sum()
        rms = float(np.sqrt(max(weight @ rho**2, 0.0)))
        azimuths = azimuths or samples(np.pi * rms, np.diff(q), 64, 512)
        nodes = extend(q, float(rho.max()), float(rho.max())) if q_calc is None else grid(q_calc, "q_calc")
        cosine = np.cos((np.arange(azimuths) + 0.5) * np.pi / azimuths)
        weights = np.repeat(weight / azimuths, azimuths)
        matrix = np.empty((q.size, nodes.size))
        for rows in blocks(q.size, weights.size):
            square = q[rows, None, None] ** 2 + rho[:, None] ** 2 - 2 * q[rows, None, None] * rho[:, None] * cosine
            points = np.sqrt(np.maximum(square, 0)).reshape(-1, weights.size)
            matrix[rows] = hats(points, np.broadcast_to(weights, points.shape), nodes)
        return cls(q, nodes, matrix, kind="rings", rms_radius=rms)

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
            HALF the slit width in 1/nm (`dQw` of a file). It is a sum over 33 midpoints, and over
            up to 500, a step of q apart, where the whole width is more than 33 steps. Beyond 500
            steps, and at the fine end of a logarithmic grid, peaks narrower than the distance of two
            midpoints, ``2 width / 33`` at most, become combs.
        profile
            Measured slit-length profile: l in 1/nm (ascending) and P(l). Both
            signs of l are folded onto one, since I depends on ``|l|``. The parameter
            `length`, which files hold as dQl, is then the half-length of the uniform slit
            of the same mean square, ``sqrt(3 <l^2>)``, and `profile_reach` the largest ``|l|``.
            A profile is constant in each of 400 cells from 0 to there (the plain slit is in closed
            form): what is narrower in it is averaged, and where q is far below a cell, steep curves
            come out wrong by a few parts in a thousand.
        q_calc
            Grid of the unsmeared curve; by default `q` extended by what the slit reaches.
        """
        q = grid(q, "q")
        if not (0 <= width < np.inf and 0 <= length < np.inf) or (profile is None and length == 0 and width == 0):
            raise BadInput(
                f"A slit of half-length {length} and half-width {width} 1/nm does not smear; both must be >= 0, one > 0."
            )
        edges, density = length_profile(length, profile)
        reach = float(edges[-1])
        nodes = (
            extend(q, min(width, q[0]), float(np.hypot(q[-1] + width, reach) - q[-1]))
            if q_calc is None
            else grid(q_calc, "q_calc")
        )
        centres = np.abs(q[:, None] + width * midpoints(samples(2 * width, np.diff(q), 33, 500))) if width else q[:, None]
        matrix = np.zeros((q.size, nodes.size))
        for column in centres.T:
            matrix += slit_hats(column, edges, density, nodes) / centres.shape[1]
        measured = {} if profile is None else {"profile_reach": reach}
        uniform = reach if profile is None else uniform_length(edges, density)
        return cls(q, nodes, close_rows(matrix), kind="slit", length=uniform, width=float(width), **measured)

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

        Notes
        -----
        A sum over 201 samples of eps, ``spread q / 20`` apart in q, and up to 1001 where that is
        more than the last steps of q. A peak narrower than both, the distance and a step, becomes a comb.
        """
        q = grid(q, "q")
        positive(spread, "spread")
        if not spread < 0.2:
            raise BadInput(
                f"A wavelength spread of {spread:g} is not small; give the standard deviation as a fraction, e.g. 0.01."
            )
        count = samples(2 * GAUSSIAN_REACH * spread * q[-1], np.diff(q)[-5:], 200, 1000) + 1
        epsilon = np.linspace(-GAUSSIAN_REACH, GAUSSIAN_REACH, count) * spread
        weight = np.exp(-0.5 * (epsilon / spread) ** 2)
        points = q[:, None] / (1 + epsilon)
        nodes = (
            extend(q, float(q[0] - points[0].min()), float(points[-1].max() - q[-1]))
            if q_calc is None
            else grid(q_calc, "q_calc")
        )
        matrix = hats(points, np.broadcast_to(weight / weight.sum(), points.shape), nodes)
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
        q = grid(q, "q")
        beam = np.where(np.isfinite(beam), beam, 0.0)
        if not beam.sum() > 0:
            raise BadInput("The direct beam holds no intensity; check its exposure and mask.")
        by, bx = np.meshgrid(np.asarray(beam_y, dtype=float), np.asarray(beam_x, dtype=float), indexing="ij")
        keep = beam != 0
        by, bx, weight = by[keep], bx[keep], beam[keep] / beam.sum()
        reach = float(q_of(np.hypot(by, bx).max() ** 2, distance, wavelength))
        nodes = extend(q, reach, reach) if q_calc is None else grid(q_calc, "q_calc")
        bins = bins_of(q, q_of(y**2 + x**2, distance, wavelength)) if bins is None else np.asarray(bins)
        if mask is not None:
            bins = np.where(mask, -1, bins)
        pixel_y, pixel_x, rows = sample_bins(q, y, x, bins, per_bin)
        share = (1.0 / np.bincount(rows, minlength=q.size))[rows]
        offset = rows * nodes.size
        flat = np.zeros(q.size * nodes.size)
        for dy, dx, w in zip(by, bx, weight, strict=True):
            index, fraction = locate(q_of((pixel_y - dy) ** 2 + (pixel_x - dx) ** 2, distance, wavelength), nodes)
            index += offset
            right = fraction * (share * w)
            flat += np.bincount(index, share * w - right, minlength=flat.size)
            flat += np.bincount(index + 1, right, minlength=flat.size)
        return cls(
            q, nodes, flat.reshape(q.size, nodes.size), kind="pixel_coverage", per_bin=per_bin, beam_pixels=int(weight.size)
        )

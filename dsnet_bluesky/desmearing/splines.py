"""Smooth curves for methods that need derivatives: splines as fine as an operator lets through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import sparse
from scipy.interpolate import BSpline

from dsnet_bluesky.smearing import Smearing

__all__ = ["Splines", "bands_of", "reaches_zero", "units"]

KNOTS_PER_WIDTH = 1.5
"""Knots of the spline in one width of the operator: what is finer lies beyond the expansion."""

ROUGHNESS = 4
"""Order of the differences that the prior holds small."""

MARGIN = 3.0
"""How far the spline goes on beyond the measured range, in widths of the operator; from there on g is constant."""

UNFOLDED = 3.0
"""Distance of a row from q = 0, in its widths, from which it is not folded there."""


class Splines:
    """B-splines that can hold what an operator lets through, their derivatives and their roughness.

    Knots stand `KNOTS_PER_WIDTH` to a width of the operator, and no closer than the measured points.
    Where the operator reaches q = 0 they are mirrored there, and the splines are even.

    Parameters
    ----------
    smearing
        The operator.
    order
        Highest derivative that is asked for; the degree is one more.

    Attributes
    ----------
    size
        Number of coefficients.
    at_q, at_q_calc
        From coefficients to the spline on the operator's grids, shapes (n, size) and (m, size).
    at_centres
        From values on q to where each coefficient acts (Greville's abscissae), linearly, shape (size, n).
    roughness
        ``D^T D`` in lower band storage, D being the fourth differences of the coefficients: shape (order + 2, size).
    rank
        Of the roughness.
    """

    def __init__(self, smearing: Smearing, order: int) -> None:
        degree = order + 1
        breaks, even = _breaks(smearing, degree)
        below = -breaks[degree:0:-1] if even else breaks[0] - (breaks[1] - breaks[0]) * np.arange(degree, 0, -1)
        above = breaks[-1] + (breaks[-1] - breaks[-2]) * np.arange(1, degree + 1)
        self.knots = np.concatenate([below, breaks, above])
        self.degree = degree
        self._ends = breaks[0], breaks[-1]
        size = self.knots.size - degree - 1
        # The mirror image of spline j is spline degree - 1 - j.
        place = np.maximum(np.arange(size), degree - 1 - np.arange(size)) if even else np.arange(size)
        place = place - place.min()
        self.size = int(place.max()) + 1
        self._fold = sparse.csr_array((np.ones(size), (np.arange(size), place)))
        self._derivatives = [self._fold, *(matrix @ self._fold for matrix in self._differentiate(order))]
        self.at_q = self.design(smearing.q)
        self.at_q_calc = self.design(smearing.q_calc)
        self.at_centres = self._centre(smearing.q)
        differences = sparse.csr_array(np.diff(np.eye(size), n=ROUGHNESS, axis=0)) @ self._fold
        # Even polynomials are half of all.
        self.rank = self.size - ((ROUGHNESS + 1) // 2 if even else ROUGHNESS)
        self.roughness = bands_of(sparse.csr_array(differences.T @ differences), degree + 1)

    def design(self, q: NDArray, derivative: int = 0) -> sparse.csr_array:
        """From coefficients to a derivative at q.

        Parameters
        ----------
        q
            In 1/nm, shape (n,); beyond the last knots the spline is constant.
        derivative
            0 to `order`.

        Returns
        -------
        sparse.csr_array
            Shape (n, size).
        """
        inner = self.knots[derivative : self.knots.size - derivative]
        values = BSpline.design_matrix(np.clip(q, *self._ends), inner, self.degree - derivative)
        return sparse.csr_array(values @ self._derivatives[derivative])

    def _centre(self, q: NDArray) -> NDArray:
        centres = sliding_window_view(self.knots[1:-1], self.degree).mean(axis=1)[-self.size :]
        return np.array([np.interp(centres, q, row) for row in np.eye(q.size)]).T

    def _differentiate(self, order: int) -> Iterator[sparse.csr_array]:
        """Yield matrices from coefficients to those of the 1st, 2nd ... derivative on the inner knots."""
        knots, degree = self.knots, self.degree
        total = sparse.csr_array(np.eye(knots.size - degree - 1))
        for _ in range(order):
            step = degree / (knots[degree + 1 : -1] - knots[1 : -degree - 1])
            shift = sparse.csr_array(np.diff(np.eye(step.size + 1), axis=0) * step[:, None])
            total = sparse.csr_array(shift @ total)
            knots, degree = knots[1:-1], degree - 1
            yield total


def units(smearing: Smearing, parts: float = 1.0) -> NDArray:
    """Length in which an answer can change: a part of the operator's width, or the step of q where that is wider.

    Near q = 0 kernels are folded and look narrower than they are; there it is the width of the first that is not.

    Parameters
    ----------
    smearing
        The operator.
    parts
        Into how many parts its width is divided.

    Returns
    -------
    ndarray
        In 1/nm, shape (n,).
    """
    widths = smearing.widths
    if reaches_zero(smearing):
        whole = smearing.q >= UNFOLDED * widths
        first = int(np.argmax(whole)) if whole.any() else -1
        widths = np.where(smearing.q < smearing.q[first], widths[first], widths)
    return np.maximum(widths / parts, np.gradient(smearing.q))


def reaches_zero(smearing: Smearing) -> bool:
    """Whether the operator sees the curve at q = 0, about which every isotropic curve is even."""
    return bool(smearing.q_calc[0] < smearing.q[1] - smearing.q[0])


def _breaks(smearing: Smearing, degree: int) -> tuple[NDArray, bool]:
    """Knots within the range where I is sought, shape (k,), and whether they start at q = 0 as an even curve does."""
    q, q_calc, widths = smearing.q, smearing.q_calc, smearing.widths
    even = reaches_zero(smearing)
    low = 0.0 if even else max(float(min(q[0], smearing.mean[0]) - MARGIN * widths[0]), float(q_calc[0]))
    high = min(float(max(q[-1], smearing.mean[-1]) + MARGIN * widths[-1]), float(q_calc[-1]))
    between = np.concatenate([[low], q[(q > low) & (q < high)], [high]])
    x = np.interp(np.linspace(0, between.size - 1, 8 * between.size), np.arange(between.size), between)
    density = 1 / np.interp(x, q, units(smearing, KNOTS_PER_WIDTH))
    count = np.concatenate([[0.0], np.cumsum(np.diff(x) * (density[1:] + density[:-1]) / 2)])
    intervals = max(int(np.ceil(count[-1])), degree + 1)
    return np.interp(np.linspace(0, count[-1], intervals + 1), count, x), even


def bands_of(matrix: sparse.csr_array, count: int) -> NDArray:
    """Lower band storage of a symmetric matrix, shape (count, size)."""
    size = len(matrix.diagonal())
    bands = np.zeros((count, size))
    for offset in range(min(count, size)):
        bands[offset, : size - offset] = matrix.diagonal(-offset)
    return bands

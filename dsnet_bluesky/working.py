"""The grid on which a network works: that of the measurement, thinned where it is far finer than the smearing.

Networks are trained on widths of up to some ten steps. A record of 4,000 points under a beam that is
as wide as 200 of them holds nothing between neighbours but noise: such points are averaged
and the operator with them, which is exact. A slit's length does not count: its sharp edge
resolves what its width does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from .desmearing.kernels import widths_below
from .smearing import Smearing

__all__ = ["Working"]

Floats = NDArray[np.floating]

MOST_STEPS = 14.0
"""Width in steps up to which a grid is left as it is."""

STEPS = 8.0
"""Steps in a width where it is thinned."""

LEAST_POINTS = 50
"""Fewer points than this are never averaged into."""


class Working:
    """The operator on the grid that a network works on, and the ways there and back.

    Parameters
    ----------
    smearing
        The operator of the measurement.

    Attributes
    ----------
    smearing
        The operator on the working grid; the same object where nothing is thinned.
    thinned
        Whether points are averaged.
    """

    def __init__(self, smearing: Smearing) -> None:
        self.native = smearing
        below = widths_below(smearing)
        steps = np.gradient(smearing.q)
        wide = float(np.median(below / steps)) > MOST_STEPS
        self.groups = _groups(smearing.q, below) if wide else np.arange(smearing.q.size)
        self.thinned = bool(self.groups[-1] + 1 < smearing.q.size)
        self.smearing = self._thin(below) if self.thinned else smearing

    def _thin(self, below: Floats) -> Smearing:
        native = self.native
        nodes = native.q_calc
        kept = np.flatnonzero(np.diff(_groups(nodes, np.interp(nodes, native.q, below)), prepend=-1))
        if kept[-1] != nodes.size - 1:
            kept = np.append(kept, nodes.size - 1)
        thin = nodes[kept]
        hats = np.array([np.interp(nodes, thin, row) for row in np.eye(thin.size)]).T
        matrix = self._mean(native.matrix.T).T @ hats
        return Smearing(self._mean(native.q), thin, matrix, kind=native.kind)

    def _mean(self, values: Floats) -> Floats:
        """Average over groups along the last axis."""
        starts = np.flatnonzero(np.diff(self.groups, prepend=-1))
        return np.add.reduceat(values, starts, axis=-1) / np.diff(np.append(starts, self.groups.size))

    def curves(self, I: Floats, Idev: Floats) -> tuple[Floats, Floats]:
        """Average measured curves and their errors, shape (exposure, n), over groups of points."""
        if not self.thinned:
            return I, Idev
        counts = np.bincount(self.groups)
        return self._mean(I), np.sqrt(self._mean(Idev**2) / counts)

    def interpolate(self, values: Floats, q: Floats) -> Floats:
        """Take smooth values on the working q_calc, shape (..., m), to any q, by cubic splines; constant beyond its ends."""
        nodes = self.smearing.q_calc
        q = np.clip(q, nodes[0], nodes[-1])
        index = np.clip(np.searchsorted(nodes, q), 0, nodes.size - 1)
        if np.array_equal(nodes[index], q):
            return values[..., index]
        return make_interp_spline(nodes, values, k=3, axis=-1)(q)

    def spread(self, values: Floats) -> Floats:
        """Take errors and widths on the working q_calc to the measured q, linearly."""
        nodes, q = self.smearing.q_calc, self.native.q
        flat = np.atleast_2d(values)
        return np.array([np.interp(q, nodes, row) for row in flat]).reshape(*values.shape[:-1], q.size)


def _groups(q: Floats, widths: Floats) -> NDArray[np.intp]:
    """Number points by groups that span at most a width over `STEPS`."""
    steps = np.diff(q)
    local = (widths[1:] + widths[:-1]) / 2 / STEPS
    count = np.concatenate([[0.0], np.cumsum(steps / np.maximum(steps, local))])
    if count[-1] < LEAST_POINTS:
        return np.arange(q.size)
    return np.unique(np.floor(count + 1e-9).astype(np.intp), return_inverse=True)[1]

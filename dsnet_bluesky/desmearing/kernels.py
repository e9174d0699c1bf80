"""What methods share: averaging kernels, the grid of the operator, and answers near zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx

from dsnet_bluesky.smearing import Smearing

__all__ = ["kernel_widths", "positive_mean", "straightened", "thinned", "widths_below"]

UNEVEN = 3.0
"""Ratio of neighbouring steps up to which a second difference is believed."""

FULL_GRID = 800
"""Up to so many nodes q_calc is used as it is."""

NODES_PER_WIDTH = 5.0
"""What a longer q_calc is thinned to: nodes in one standard deviation of the operator."""


def kernel_widths(kernels: NDArray, q_calc: NDArray) -> NDArray:
    """Standard deviation of the Gaussian with the same width at half height as each averaging kernel.

    The rows of an averaging kernel say how an answer depends on the truth:
    ``answer(q_i) = sum_j K_ij truth(q_calc_j)``. Good kernels have negative lobes
    and long ripples, for which second moments mean nothing; the width of the central
    lobe is what a sharp peak is seen with.

    Parameters
    ----------
    kernels
        K, shape (..., n, m).
    q_calc
        Grid of the truth, shape (m,), in 1/nm.

    Returns
    -------
    ndarray
        Widths in 1/nm, shape (..., n).
    """
    # K holds the width of each cell of q_calc; the density of the kernel does not.
    density = kernels / np.gradient(q_calc)
    peak = density.argmax(axis=-1)[..., None]
    low = density < np.take_along_axis(density, peak, axis=-1) / 2
    place, last = np.arange(q_calc.size), q_calc.size - 1
    left = np.where(low & (place < peak), place, -1).max(axis=-1, keepdims=True)
    right = np.where(low & (place > peak), place, last + 1).min(axis=-1, keepdims=True)
    lower = _crossing(density, q_calc, peak, np.maximum(left, 0), np.maximum(left, 0) + (left >= 0))
    upper = _crossing(density, q_calc, peak, np.minimum(right, last), np.minimum(right, last) - (right <= last))
    return ((upper - lower) / np.sqrt(8 * np.log(2)))[..., 0]


def _crossing(density: NDArray, q_calc: NDArray, peak: NDArray, outer: NDArray, inner: NDArray) -> NDArray:
    """Where a kernel crosses half its height between two neighbouring nodes (at the node, if they are one)."""
    top, above, below = (np.take_along_axis(density, index, axis=-1) for index in (peak, inner, outer))
    drop = np.where(inner == outer, 1.0, above - below)
    part = np.where(inner == outer, 0.0, (above - top / 2) / drop)
    return q_calc[inner] + part * (q_calc[outer] - q_calc[inner])


def widths_below(smearing: Smearing) -> NDArray:
    """Standard deviation of each row of R towards lower q, shape (n,), in 1/nm.

    For a symmetric kernel it is the standard deviation. A slit's length smears towards
    higher q only, from a sharp edge that resolves far better than its second moment
    says; it counts as zero.
    """
    below = np.minimum(smearing.q_calc - smearing.q[:, None], 0.0)
    return np.sqrt(2 * np.sum(smearing.matrix * below**2, axis=1))


def thinned(smearing: Smearing) -> Smearing:
    """Leave out nodes of q_calc that the operator cannot tell from their neighbours, if there are many.

    Between the nodes that stay a curve is straight. An operator of up to `FULL_GRID`
    nodes is returned as it is.
    """
    nodes = smearing.q_calc
    if nodes.size <= FULL_GRID:
        return smearing
    step = np.diff(nodes)
    width = np.interp((nodes[1:] + nodes[:-1]) / 2, smearing.q, widths_below(smearing))
    count = np.concatenate([[0.0], np.cumsum(step / np.maximum(step, width / NODES_PER_WIDTH))])
    kept = np.searchsorted(count, np.arange(count[-1]) - 1e-9)
    thin = nodes[np.append(kept[kept < nodes.size - 1], nodes.size - 1)]
    hats = np.array([np.interp(nodes, thin, row) for row in np.eye(thin.size)]).T
    return Smearing(smearing.q, thin, smearing.matrix @ hats, kind=smearing.kind)


def straightened(smearing: Smearing, curves: NDArray) -> NDArray:
    """Node values with which R, that takes curves as straight between nodes, smears smooth ones right.

    The straight lines lie above a smooth curve by h^2 I''/12 on average (h: local
    step); in the first minimum of the paper's sphere that is 0.9e-3 of 1e-3. Where R
    is as narrow as a cell it sees the nodes themselves, and they stay as they are. So does a node whose
    neighbours are more than `UNEVEN` times as far on one side as on the other, as where points of two detector
    settings nearly coincide: its second difference is noise.

    Parameters
    ----------
    smearing
        The operator.
    curves
        Smooth curves on q_calc, shape (m, ...).

    Returns
    -------
    ndarray
        Same shape.
    """
    q_calc = smearing.q_calc
    step = np.diff(q_calc).reshape(-1, *[1] * (curves.ndim - 1))
    left, right = step[:-1], step[1:]
    bend = np.diff(np.diff(curves, axis=0) / step, axis=0) * 2 / (left + right)
    cell = np.interp(smearing.q, q_calc, np.gradient(q_calc))
    wide = np.interp(q_calc[1:-1], smearing.q, np.minimum(1.0, (smearing.widths / cell) ** 2))
    wide *= (np.maximum(left, right) <= UNEVEN * np.minimum(left, right)).ravel()
    result = curves.copy()
    result[1:-1] -= wide.reshape(left.shape) * bend * (left**2 - left * right + right**2) / 12
    return result


def positive_mean(mean: NDArray, deviation: NDArray) -> NDArray:
    """Mean of a Gaussian cut at zero: ``mean + deviation phi(z) / Phi(z)``, ``z = mean / deviation``.

    An intensity cannot be negative; where a linear answer comes within its error
    of zero, this is what the error leaves.

    Parameters
    ----------
    mean, deviation
        Answers and their standard deviations, any one shape; deviation not negative.
    """
    z = mean / np.maximum(deviation, np.finfo(float).tiny)
    # erfcx keeps the ratio of density and tail where both vanish; far above zero nothing is added.
    hazard = np.sqrt(2 / np.pi) / erfcx(-np.clip(z, None, 25.0) / np.sqrt(2))
    return mean + deviation * hazard

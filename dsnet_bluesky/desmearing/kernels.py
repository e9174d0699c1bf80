"""What the operator's grid and an answer's averaging kernel do to a curve."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.smearing import Smearing

__all__ = ["kernel_widths", "straightened"]


def kernel_widths(kernels: NDArray, q: NDArray, q_calc: NDArray) -> NDArray:
    """Standard deviation of the Gaussian that is as wide as each averaging kernel.

    The rows of an averaging kernel say how an answer depends on the truth:
    ``answer(q_i) = sum_j K_ij truth(q_calc_j)``. Good kernels have negative
    lobes, for which the plain second moment is zero or worse; the rms width of
    K^2, times sqrt(2), is that of a Gaussian again and always positive.

    Parameters
    ----------
    kernels
        K, shape (..., n, m).
    q, q_calc
        Grids of the answer, shape (n,), and of the truth, shape (m,), in 1/nm.

    Returns
    -------
    ndarray
        Widths in 1/nm, shape (..., n).
    """
    # K holds the width of a cell of q_calc; the density of the kernel does not.
    weight = kernels**2 / np.gradient(q_calc)
    total = weight.sum(axis=-1)
    mean = (weight @ q_calc) / total
    variance = (weight @ q_calc**2) / total - 2 * mean * q + q**2
    return np.sqrt(np.maximum(2 * variance, 0.0))


def straightened(smearing: Smearing, curves: NDArray) -> NDArray:
    """Node values with which R, that takes curves as straight between nodes, smears smooth ones right.

    The straight lines lie above a smooth curve by h^2 I''/12 on average (h: local
    step); in the first minimum of the paper's sphere that is 0.9e-3 of 1e-3. Where R
    is as narrow as a cell it sees the nodes themselves, and they stay as they are.

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
    result = curves.copy()
    result[1:-1] -= wide.reshape(left.shape) * bend * (left**2 - left * right + right**2) / 12
    return result

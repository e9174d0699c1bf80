"""Wiener's filter: the stationary limit of desmearing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .kernels import kernel_widths, positive_mean

__all__ = ["Wiener"]

TREND_WIDTH = 4.0
"""Width of the smoothing that gives the trend, in widths of the kernel (at least 4 points)."""

MODEL_ERROR = 0.02
"""What the stationary limit gets wrong, as a part of the curve, and taken for noise."""

WEAKEST = 1e-3
"""Frequencies that the kernel passes less than this are given up."""


class Wiener:
    """Deconvolution of a stationary kernel by the signal-to-noise ratio at each frequency.

    ``G(f) = (1 - N / P(f)) / H(f)``, where P is the power of the measured curve
    (smoothed over neighbouring frequencies), N that of the noise (from Idev) and H the
    transform of the kernel; G is zero where P < N (N. Wiener, Extrapolation,
    Interpolation, and Smoothing of Stationary Time Series, MIT Press 1949).

    The limits. The kernel is the mean over all rows of the operator: what changes
    along q (beams near q = 0, slits, dQ columns) is averaged away. The curve is
    divided by its trend first, or the forward peak would ring through the whole record; that
    is exact only where the trend is straight over the width of the kernel. The record is
    mirrored at both ends. N therefore holds, beside the noise, a fiftieth of the curve for
    what the stationary limit gets wrong. It is here to compare with.

    Where the filtered curve comes near zero, the answer I is the mean of what its error
    leaves positive: an intensity cannot be negative. I_resmeared is of the filtered curve itself.

    Idev follows from the filter, which is linear once G is fixed; Qdev is the width
    of ``G H``, one number for all q.

    Parameters
    ----------
    smearing
        The operator; its q must be uniform.
    spectrum_smoothing
        Number of neighbouring frequencies over which P is averaged.

    Raises
    ------
    BadInput
        If q is not uniform or an option is out of range.
    """

    def __init__(self, smearing: Smearing, spectrum_smoothing: int = 5) -> None:
        step = np.diff(smearing.q)
        if np.ptp(step) > 1e-3 * step.mean():
            raise BadInput(
                f"Wiener's filter needs a uniform q grid; the steps go from {step.min():.4g} to {step.max():.4g} 1/nm. "
                "Use method='map', or rebin the curve."
            )
        if spectrum_smoothing < 1:
            raise BadInput(f"spectrum_smoothing is {spectrum_smoothing}; it must be at least 1.")
        self.smearing = smearing
        self.spectrum_smoothing = spectrum_smoothing
        self._step = float(step.mean())
        self._kernel = np.fft.rfft(_mean_kernel(smearing, self._step))
        self._trend_width = max(TREND_WIDTH * float(np.median(smearing.widths)) / self._step, 4.0)

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear curves of any sign."""
        n = I.shape[-1]
        trend = self._trend(I, Idev)
        filters = self._filters(I / trend, np.hypot(Idev, MODEL_ERROR * np.abs(I)) / trend)
        answer = trend * _filtered(I / trend, filters)
        # The response to each measured point gives the errors: (exposure, point in, point out).
        response = _filtered(np.eye(n), filters[:, None])
        deviation = trend * np.sqrt(np.einsum("eij,ei->ej", response**2, (Idev / trend) ** 2))
        return Solution(
            I_calc=np.array([np.interp(self.smearing.q_calc, self.smearing.q, row) for row in answer]),
            I=positive_mean(answer, deviation),
            Idev=deviation,
            Qdev=np.repeat(self._widths(filters)[:, None], n, axis=1),
            flags=np.zeros(len(I), dtype=np.int64),
        )

    def _trend(self, I: NDArray, Idev: NDArray) -> NDArray:
        return np.exp(gaussian_filter1d(np.log(np.maximum(I, Idev)), self._trend_width, axis=-1, mode="nearest"))

    def _filters(self, flat: NDArray, deviation: NDArray) -> NDArray:
        """G for each exposure, shape (exposure, frequencies)."""
        mirrored = _mirrored(deviation**2)
        power = np.abs(np.fft.rfft(_mirrored(flat))) ** 2
        power = uniform_filter1d(power, self.spectrum_smoothing, axis=-1, mode="mirror")
        # The power of mirrored noise is the sum of its variances, but at the two end frequencies, where it is twice that.
        # The factor 2 elsewhere is a margin: P scatters, and at 5 % of noise frequencies kept without need treble the error.
        noise = 2 * mirrored.sum(axis=-1, keepdims=True)
        passed = np.abs(self._kernel) > WEAKEST
        gain = np.maximum(1 - noise / np.maximum(power, np.finfo(float).tiny), 0.0)
        if not np.where(passed, gain, 0.0).any(axis=-1).all():
            raise BadInput("No frequency of the curve stands above its noise: count longer, or check that Idev is not too large.")
        return np.where(passed, gain, 0.0) / np.where(passed, self._kernel, 1.0)

    def _widths(self, filters: NDArray) -> NDArray:
        """Width of the averaging kernel of each exposure, in 1/nm."""
        kernels = np.fft.fftshift(np.fft.irfft(filters * self._kernel, n=2 * self.smearing.q.size - 2), axes=-1)
        offsets = (np.arange(kernels.shape[-1]) - kernels.shape[-1] // 2) * self._step
        return kernel_widths(kernels, offsets)


def _mirrored(values: NDArray) -> NDArray:
    """Continue records evenly at both ends: one period of length 2 n - 2."""
    return np.concatenate([values, values[..., -2:0:-1]], axis=-1)


def _filtered(values: NDArray, filters: NDArray) -> NDArray:
    n = values.shape[-1]
    return np.fft.irfft(np.fft.rfft(_mirrored(values)) * filters, n=2 * n - 2)[..., :n]


def _mean_kernel(smearing: Smearing, step: float) -> NDArray:
    """Mean of the rows of R about their own q, on one period of 2 n - 2 steps, starting at offset 0."""
    period = 2 * smearing.q.size - 2
    # R smears I(q') into q; as a convolution its kernel is read backwards, from q' to q.
    position = (smearing.q[:, None] - smearing.q_calc) / step
    left = np.floor(position)
    right_share = smearing.matrix * (position - left)
    index = left.astype(np.intp) % period
    kernel = np.bincount(index.ravel(), (smearing.matrix - right_share).ravel(), minlength=period)
    kernel += np.bincount(((index + 1) % period).ravel(), right_share.ravel(), minlength=period)
    return kernel / smearing.q.size

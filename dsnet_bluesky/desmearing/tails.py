"""What a curve does beyond the measured range: the tails that fill q_calc."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.smearing import Smearing

__all__ = ["EXTRAPOLATIONS", "Tails"]

EXTRAPOLATIONS = ("constant", "linear", "power", "porod")
"""Forms of the tail above the measured range; in `porod` a background is added to K q^-4."""


class Tails:
    """Continue positive curves on q to q_calc.

    Within the measured range ln I is interpolated linearly in q. Above it one
    of four forms is fitted to the last points, weighted by their errors:

    ========== ==================
    constant   I = B
    linear     I = B + m q
    power      I = A q^p
    porod      I = B + K q^-4
    ========== ==================

    A tail that would turn negative is cut at zero. Below the measured range the
    curve continues by Guinier's law, ln I = a - b q^2 with b >= 0, which is flat
    at q = 0 as every isotropic pattern is.

    Parameters
    ----------
    smearing
        Gives q and q_calc.
    form
        One of `EXTRAPOLATIONS`.
    start
        Fit the points with q >= start, in 1/nm; by default the last tenth of the points, at
        least 5. A point at q = 0 is never among them.

    Raises
    ------
    BadInput
        If the form is unknown, or fewer than 2 points lie above `start`.
    """

    def __init__(self, smearing: Smearing, form: str = "power", start: float | None = None) -> None:
        if form not in EXTRAPOLATIONS:
            raise BadInput(f"There is no extrapolation {form!r}; choose one of {', '.join(EXTRAPOLATIONS)}.")
        q, q_calc = smearing.q, smearing.q_calc
        self.form = form
        first = q.size - max(5, q.size // 10) if start is None else int(np.searchsorted(q, start))
        self._first = max(first, int(q[0] == 0))  # no power law holds zero
        if q.size - self._first < 2:
            raise BadInput(
                f"extrapolation_start is {start:g} 1/nm and q ends at {q[-1]:.4g}: fewer than 2 points are left to fit."
            )
        self._q = q
        self._below, self._above = q_calc[q_calc < q[0]], q_calc[q_calc > q[-1]]
        inside = q_calc[(q_calc >= q[0]) & (q_calc <= q[-1])]
        self._left = np.clip(np.searchsorted(q, inside, side="right") - 1, 0, q.size - 2)
        self._fraction = (inside - q[self._left]) / np.diff(q)[self._left]

    def fill(self, I: NDArray, relative: NDArray) -> NDArray:
        """Continue curves.

        Parameters
        ----------
        I
            Positive curves on q, shape (..., n).
        relative
            Relative standard deviations of I, same shape.

        Returns
        -------
        ndarray
            Curves on q_calc, shape (..., m), not negative.
        """
        logarithm = np.log(I)
        inside = np.exp(logarithm[..., self._left] * (1 - self._fraction) + logarithm[..., self._left + 1] * self._fraction)
        return np.concatenate([self._guinier(logarithm, relative), inside, self._tail(I, relative)], axis=-1)

    def _guinier(self, logarithm: NDArray, relative: NDArray) -> NDArray:
        if not self._below.size:
            return np.empty((*logarithm.shape[:-1], 0))
        square = self._q[:5] ** 2
        intercept, slope = _line(square, logarithm[..., :5], relative[..., :5] ** -2)
        falling = slope < 0
        level = np.where(falling, intercept, logarithm[..., :1])
        return np.exp(level + np.where(falling, slope, 0.0) * self._below**2)

    def _tail(self, I: NDArray, relative: NDArray) -> NDArray:
        if not self._above.size:
            return np.empty((*I.shape[:-1], 0))
        q, I, relative = self._q[self._first :], I[..., self._first :], relative[..., self._first :]
        if self.form == "power":
            intercept, slope = _line(np.log(q), np.log(I), relative**-2)
            return np.exp(intercept + slope * np.log(self._above))
        weight = (relative * I) ** -2
        if self.form == "constant":
            mean = np.sum(weight * I, axis=-1, keepdims=True) / np.sum(weight, axis=-1, keepdims=True)
            return np.broadcast_to(mean, (*I.shape[:-1], self._above.size))
        exponent = 1.0 if self.form == "linear" else -4.0
        intercept, slope = _line(q**exponent, I, weight)
        return np.maximum(intercept + slope * self._above**exponent, 0.0)


def _line(x: NDArray, y: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    """Weighted straight lines through y(x) along the last axis: intercepts and slopes, last axis kept."""
    total = weight.sum(axis=-1, keepdims=True)
    x_mean = (weight * x).sum(axis=-1, keepdims=True) / total
    y_mean = (weight * y).sum(axis=-1, keepdims=True) / total
    slope = (weight * (x - x_mean) * (y - y_mean)).sum(axis=-1, keepdims=True)
    slope = slope / (weight * (x - x_mean) ** 2).sum(axis=-1, keepdims=True)
    return y_mean - slope * x_mean, slope

"""Measurements: noise as instruments make it, and as they state it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.data import estimate_idev

__all__ = ["Measurement", "Noise", "draw_noise"]

Floats = NDArray[np.floating[Any]]


class Measurement(NamedTuple):
    """A measured curve and its stated standard deviation, shape (n,) or (..., n)."""

    I: Floats
    Idev: Floats


class Noise(NamedTuple):
    """How a curve is measured.

    Attributes
    ----------
    sigma
        True standard deviation, shape (n,).
    uniform
        Whether fluctuations are uniform (the paper's) and not normal.
    correlation
        Share of its neighbours in each point: pixel splitting.
    stated
        What Idev says over the truth; None where it is estimated from the scatter.
    """

    sigma: Floats
    uniform: bool
    correlation: float
    stated: float | None

    def measure(self, rng: np.random.Generator, smeared: Floats) -> Measurement:
        """Draw a measurement of a smeared curve, shape (n,)."""
        z = rng.uniform(-np.sqrt(3), np.sqrt(3), smeared.size + 2) if self.uniform else rng.standard_normal(smeared.size + 2)
        a = self.correlation
        z = (a * z[:-2] + z[1:-1] + a * z[2:]) / np.sqrt(1 + 2 * a * a)
        I = smeared + self.sigma * z
        floor = 1e-4 * np.abs(smeared)
        Idev = estimate_idev(I) if self.stated is None else np.maximum(self.sigma * self.stated, floor)
        return Measurement(I, Idev)


def draw_noise(rng: np.random.Generator, q: Floats, smeared: Floats, level: float | None = None) -> Noise:
    """Draw the noise of a measurement.

    Parameters
    ----------
    rng
        Source of all choices.
    q
        Grid, shape (n,).
    smeared
        The curve without noise, shape (n,).
    level
        Relative noise of the median point; by default anything from none to 30 %.
    """
    none = level is None and rng.random() < 0.1
    level = float(np.exp(rng.uniform(np.log(3e-4), np.log(0.3)))) if level is None else level
    relative = rng.random() < 0.4
    if none:
        sigma = np.full(smeared.size, 1e-12) * smeared
    elif relative:
        sigma = min(level, 0.15) * smeared
    else:
        sigma = _counting(rng, q, smeared, level)
    correlation = rng.uniform(0.1, 0.6) if rng.random() < 0.2 else 0.0
    kind = rng.random()
    stated = None if kind < 0.35 else float(np.exp(rng.normal(0, 0.15))) if kind < 0.85 else rng.uniform(0.5, 0.8)
    return Noise(sigma, bool(relative and rng.random() < 0.5), correlation, stated)


def _counting(rng: np.random.Generator, q: Floats, smeared: Floats, level: float) -> Floats:
    """Poisson counts of pixels on rings, of a scan, or of bins as wide as their step; a subtracted background adds its own."""
    pixels = [np.ones(q.size), q / q[-1], q * np.gradient(q)][rng.integers(3)] + 1e-3
    blank = rng.choice([0.0, 1.0]) * float(np.quantile(smeared, rng.uniform(0, 0.5))) * rng.uniform(0, 2)
    variance = (smeared + blank) / pixels
    variance *= level**2 / np.median(variance / smeared**2)
    systematic = np.exp(rng.uniform(np.log(1e-4), np.log(1e-2))) * smeared
    return np.sqrt(variance + systematic**2)

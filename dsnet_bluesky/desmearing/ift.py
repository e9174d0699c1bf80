"""Indirect transform: the curve of a finite particle, as a band-limited sine series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .kernels import positive_mean, straightened

__all__ = ["IFT", "sine_series"]

RATIO = 1.1
"""Ratio of neighbouring trial diameters: one that is too large costs a few parameters only."""

BEYOND = 1.15
"""The series goes on to this multiple of the last q, since the smearing sees beyond it."""

STRIDE = 3
"""The first scan of the diameters takes every third one."""

PATIENCE = 3
"""The first scan ends when the criterion has not improved this many times in a row."""


class IFT:
    """Weighted least squares in the space of curves that a finite particle can give.

    A particle of largest dimension D has a band-limited q I(q), which is given by its values
    at q_k = k pi / D (P. B. Moore, J. Appl. Cryst. 13 (1980) 168, doi:10.1107/S002188988001179X):

    ``I(q) = sum_k a_k B_k(q) + background``,
    ``B_k(q) = [sinc((q - q_k) D) - sinc((q + q_k) D)] / q``, ``a_k = q_k I(q_k)``.

    The series is smeared by R, and its coefficients are fitted to the measured
    curve. For every trial D a ridge on the curvature of the transform (k^4 a_k^2)
    is weighted by its evidence; D minimises Schwarz's criterion
    ``chi^2 + gamma ln n``, gamma being the effective number of parameters.
    Where the series comes near zero, the answer I is the mean of what its error leaves
    positive: an intensity cannot be negative. I_resmeared is of the series itself.

    It is superb where the scatterer is finite, and wrong for lattices and for particles too
    large for the q range. Both show in chi2, or in the largest D winning; either flags POOR_FIT.

    Idev is from the covariance of the coefficients (times chi2 where that is above
    1) at the D chosen. A global series has no averaging kernel: Qdev is not known.

    Parameters
    ----------
    smearing
        The operator.
    diameter
        Largest dimension D in nm; by default the data choose it.
    maximum_terms
        Largest number of terms of the series: the largest D tried is this times pi / q_max.

    Raises
    ------
    BadInput
        If an option is out of range.
    """

    def __init__(self, smearing: Smearing, diameter: float | None = None, maximum_terms: int = 200) -> None:
        channel = np.pi / float(smearing.q[-1])
        if maximum_terms < 3:
            raise BadInput(f"A series of {maximum_terms} terms is no series; use maximum_terms >= 3.")
        if diameter is not None and not 2 * channel <= diameter <= smearing.q.size * channel:
            raise BadInput(
                f"A diameter of {diameter:g} nm cannot be seen between q = {smearing.q[0]:.4g} and {smearing.q[-1]:.4g} 1/nm; "
                f"it must lie between {2 * channel:.4g} and {smearing.q.size * channel:.4g} nm."
            )
        self.smearing = smearing
        steps = np.arange(int(np.log(maximum_terms / 3) / np.log(RATIO)) + 1)
        diameters = 3 * channel * RATIO**steps if diameter is None else np.array([diameter])
        self._series = [_Series.build(smearing, float(D)) for D in diameters]

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear curves of any sign, one after another."""
        found = [self._best(measured, sigma) for measured, sigma in zip(I, Idev, strict=True)]
        curves = np.array([fit.curve for fit in found])
        deviation = self.smearing.at_q([fit.deviation for fit in found])
        inflation = np.sqrt(np.maximum([fit.chi2 for fit in found], 1.0))[:, None]
        return Solution(
            I_calc=straightened(self.smearing, curves.T).T,
            I=positive_mean(self.smearing.at_q(curves), deviation),
            Idev=deviation * inflation,
            Qdev=None,
            flags=np.array([int(Flag.POOR_FIT) if self._at_limit(fit) else 0 for fit in found]),
            diagnostics={
                "diameter": np.array([fit.series.diameter for fit in found]),
                "parameters": np.array([fit.parameters for fit in found]),
            },
        )

    def _at_limit(self, fit: _Fit) -> bool:
        """Whether the largest D won, of several: then the scatterer is not finite, or not seen whole."""
        return len(self._series) > 1 and fit.series is self._series[-1]

    def _best(self, measured: NDArray, sigma: NDArray) -> _Fit:
        """Scan the diameters upwards in strides, then look between the neighbours of the best."""
        best = 0
        fits = {0: _fit(self._series[0], measured, sigma)}
        for place in range(STRIDE, len(self._series), STRIDE):
            fits[place] = _fit(self._series[place], measured, sigma)
            best = place if fits[place].criterion < fits[best].criterion else best
            if place - best >= PATIENCE * STRIDE and fits[best].chi2 < 2:
                break
        for place in range(max(best - STRIDE + 1, 0), min(best + STRIDE, len(self._series))):
            if place not in fits:
                fits[place] = _fit(self._series[place], measured, sigma)
        return min(fits.values(), key=lambda fit: fit.criterion)


def sine_series(q: NDArray, diameter: float, terms: int) -> NDArray:
    """Band-limited basis of the curves of a particle, shape (len(q), terms).

    Parameters
    ----------
    q
        In 1/nm, shape (n,).
    diameter
        Largest dimension in nm.
    terms
        Number of terms of the series.
    """
    x = np.maximum(q * diameter / np.pi, 1e-4)[:, None]
    k = np.arange(1, terms + 1)
    return (np.sinc(x - k) - np.sinc(x + k)) / (x * np.pi / diameter)


@dataclass(frozen=True)
class _Series:
    """The series for one D, on q_calc and smeared, scaled so that the ridge is the identity."""

    diameter: float
    basis: NDArray
    smeared: NDArray

    @classmethod
    def build(cls, smearing: Smearing, diameter: float) -> _Series:
        terms = int(np.ceil(BEYOND * smearing.q[-1] * diameter / np.pi)) + 2
        basis = sine_series(smearing.q_calc, diameter, terms) / np.arange(1, terms + 1) ** 2
        return cls(diameter, basis, smearing.matrix @ straightened(smearing, basis))


@dataclass(frozen=True)
class _Fit:
    """A series and a background fitted to one curve.

    `root` is a square root of the covariance of (coefficients, background).
    """

    series: _Series
    coefficients: NDArray
    background: float
    root: NDArray
    parameters: float
    chi2: float
    criterion: float

    @property
    def curve(self) -> NDArray:
        """Fitted curve on q_calc, shape (m,)."""
        return self.series.basis @ self.coefficients + self.background

    @property
    def deviation(self) -> NDArray:
        """One standard deviation of the curve on q_calc, shape (m,), if Idev is right and the series fits."""
        rows = self.series.basis @ self.root[:-1] + self.root[-1]
        return np.linalg.norm(rows, axis=1)


def _fit(series: _Series, measured: NDArray, sigma: NDArray) -> _Fit:
    """Least squares with the ridge of largest evidence.

    The background is not penalised: it is projected out of the problem, solved
    for afterwards, and its error put back into `root`.
    """
    length = float(np.linalg.norm(1 / sigma))
    flat = 1 / sigma / length
    design, target = series.smeared / sigma[:, None], measured / sigma
    level, share = float(flat @ target), flat @ design
    U, s, Vt = svd(design - np.outer(flat, share), full_matrices=False)
    rest = target - flat * level
    seen = U.T @ rest
    ridge = _most_evident(s, seen)
    resolved = s**2 / (s**2 + ridge)
    residual = max(float(rest @ rest - seen @ seen), 0.0) + float(np.sum(((1 - resolved) * seen) ** 2))
    coefficients = Vt.T @ (s / (s**2 + ridge) * seen)
    root = Vt.T / np.sqrt(s**2 + ridge)
    parameters = float(resolved.sum()) + 1
    return _Fit(
        series,
        coefficients,
        background=(level - float(share @ coefficients)) / length,
        root=np.block([[root, np.zeros((len(root), 1))], [-(share @ root)[None] / length, np.array([[1 / length]])]]),
        parameters=parameters,
        chi2=residual / measured.size,
        criterion=residual + parameters * np.log(measured.size),
    )


def _most_evident(s: NDArray, seen: NDArray) -> float:
    """Ridge that maximises the evidence of ``seen = s c + noise`` with ``c ~ N(0, 1/ridge)``."""
    ridges = s[0] ** 2 * np.logspace(-20, 0, 121)[:, None]
    variance = 1 + s**2 / ridges
    minus_two_log = np.sum(seen**2 / variance + np.log(variance), axis=1)
    return float(ridges[np.argmin(minus_two_log), 0])

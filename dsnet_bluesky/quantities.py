"""What users report of a curve, with errors: Guinier radius, invariant, positions and widths of peaks.

Errors are those of the curve, propagated to first order: a quantity x with the gradient g towards the intensities has
``var(x) = g^T C g``. C is the covariance that the result states (`desmearing.covariance`); where it states none, points
count as independent, and the errors here are too small by what neighbours share. A quantity that a curve does not have is
NaN, and its `reason` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.signal import find_peaks, peak_widths

from .data import BadInput
from .desmearing.covariance import Covariance, covariance

__all__ = ["Peak", "Quantity", "guinier", "invariant", "peaks"]

GUINIER_LIMIT = 1.3
"""Largest q Rg of the Guinier range."""

LOWEST = 1.0
"""Largest q Rg at the lowest q: beyond it there is hardly a range, and what is measured is no size."""

STRAIGHT = 3.0
"""Largest mean squared residual of ln I over q^2, in units of its error, that counts as a straight line."""

FEWEST = 5
"""Points that a fit of two parameters, or an integral, needs."""

SIGNIFICANCE = 5.0
"""How many errors a peak must rise above the higher of the minima beside it."""

MOST_PEAKS = 8
"""Peaks that are fitted, the most significant ones: a curve with more is a lattice, which a few describe."""

PEAK_POINTS = 8
"""Points that the fit of a peak with its background, six parameters, needs."""

PROFILE = 0.01
"""No real peak follows a profile better than to this part of its height: points with smaller errors count no more in a fit."""

REACH = 2.5
"""Half the window in which a peak is fitted, in its full widths, unless a neighbour is nearer."""


@dataclass(frozen=True)
class Quantity:
    """A number with its error.

    Attributes
    ----------
    name
        What it is.
    value, error
        And one standard deviation; NaN where the curve has no such quantity. The error alone is NaN where
        the curve has no errors.
    units
        Of both.
    reason
        Why there is no value; empty where there is one.
    """

    name: str
    value: float
    error: float
    units: str
    reason: str = ""

    @property
    def valid(self) -> bool:
        """Whether there is a value."""
        return bool(np.isfinite(self.value))


@dataclass(frozen=True)
class Peak:
    """A maximum above its background.

    Attributes
    ----------
    position, height, fwhm
        In 1/nm, in the unit of I, and the full width at half height in 1/nm.
    significance
        Errors by which it rises above the higher of the minima beside it.
    """

    position: Quantity
    height: Quantity
    fwhm: Quantity
    significance: float


class _Inapplicable(Exception):
    """A curve has no such quantity; the message says why."""


class _Points(NamedTuple):
    """Usable points of a curve: shapes (n,)."""

    q: NDArray
    I: NDArray
    Idev: NDArray
    errors: Covariance
    units: str

    def part(self, first: int, last: int) -> _Points:
        """Return the points from `first` to before `last`."""
        chosen = slice(first, last)
        errors = Covariance(self.errors.factor[chosen], self.errors.own[chosen])
        return _Points(self.q[chosen], self.I[chosen], self.Idev[chosen], errors, self.units)

    def propagate(self, gradient: NDArray) -> NDArray:
        """Return the covariance of quantities, shape (k, k), with the gradients (k, n) towards I."""
        shared, own = gradient @ self.errors.factor, gradient * self.errors.own
        return shared @ shared.T + own @ own.T

    @property
    def weights(self) -> NDArray:
        """One over the errors, for fits; all alike where there are no errors."""
        return 1 / self.Idev if np.isfinite(self.Idev).all() else np.full(self.q.shape, 1 / np.abs(self.I).max())


def guinier(curve: xr.Dataset, *, limit: float = GUINIER_LIMIT) -> tuple[Quantity, Quantity]:
    """Fit Guinier's law ``ln I = ln I0 - (q Rg)^2 / 3`` to the lowest q.

    The range ends at q Rg = `limit`, found by repeating the fit. What the law leaves out makes Rg too large or too small:
    of a sphere 2 % too large at the limit 1.3, with points as dense as they usually are.

    Parameters
    ----------
    curve
        One exposure: I and Idev on q in 1/nm; of a desmeared Dataset also with what `desmearing.covariance` needs.
    limit
        Largest q Rg.

    Returns
    -------
    Rg, I0 : Quantity
        In nm and in the unit of I. NaN where the curve does not fall from its lowest q on, has fewer than 5 points in the range,
        begins beyond q Rg = 1, or is not straight there.

    References
    ----------
    A. Guinier, Ann. Phys. (Paris) 11 (1939) 161, doi:10.1051/anphys/193911120161.
    """
    units = _units(curve)
    try:
        points = _points(curve)
        points = points.part(0, _guinier_range(points, limit))
        (level, slope), gradient = _guinier_line(points)
        _check_guinier(points, level, slope)
    except _Inapplicable as reason:
        return _none("Rg", "nm", reason), _none("I0", units, reason)
    deviations = np.sqrt(np.diag(points.propagate(gradient)))
    Rg, I0 = float(np.sqrt(-3 * slope)), float(np.exp(level))
    return (
        Quantity("Rg", Rg, float(1.5 / Rg * deviations[1]), "nm"),
        Quantity("I0", I0, float(I0 * deviations[0]), units),
    )


def invariant(curve: xr.Dataset) -> Quantity:
    """Integrate Porod's invariant ``Q* = integral q^2 I dq`` over the measured range, by the trapezoidal rule.

    Nothing is extrapolated and no background is taken off: compare it between answers to one measurement only.

    Parameters
    ----------
    curve
        One exposure, see `guinier`.

    Returns
    -------
    Quantity
        In the unit of I, over nm^3.

    References
    ----------
    G. Porod, Kolloid-Z. 124 (1951) 83, doi:10.1007/BF01512792.
    """
    units = f"{_units(curve)} / nm**3"
    try:
        points = _points(curve)
    except _Inapplicable as reason:
        return _none("invariant", units, reason)
    steps = np.diff(points.q)
    gradient = 0.5 * (np.append(steps, 0) + np.append(0, steps)) * points.q**2
    error = float(np.sqrt(points.propagate(gradient[None])[0, 0]))
    return Quantity("invariant", float(gradient @ points.I), error, units)


def peaks(curve: xr.Dataset, *, significance: float = SIGNIFICANCE) -> list[Peak]:
    """Find peaks and measure them, each by a fit of its own with its background.

    A peak is a maximum that rises above the higher of the minima beside it by `significance` errors; a shoulder is none. The fit
    is a pseudo-Voigt profile on a power law, in a window that ends at the minima towards the neighbours::

        I(q) = h [(1 - m) exp(-4 ln2 u^2) + m / (1 + 4 u^2)] + b (q / q0)^p,    u = (q - q0) / fwhm,    0 <= m <= 1

    Maxima of a form factor are found as well as those of a lattice.

    Parameters
    ----------
    curve
        One exposure, see `guinier`. Without errors there is no significance, and no peak.
    significance
        Errors by which a peak must rise.

    Returns
    -------
    list of Peak
        In the order of q, the most significant 8 at most; those whose fit does not hold are NaN with a reason.

    References
    ----------
    Profile: G. K. Wertheim et al., Rev. Sci. Instrum. 45 (1974) 1369, doi:10.1063/1.1686503.
    Prominence: `scipy.signal.peak_prominences`.
    """
    _units(curve)
    try:
        points = _points(curve)
    except _Inapplicable:
        return []
    if not np.isfinite(points.Idev).all():
        return []
    tops, found = find_peaks(points.I, prominence=0.0)
    bases = np.where(points.I[found["left_bases"]] > points.I[found["right_bases"]], found["left_bases"], found["right_bases"])
    rises = found["prominences"] / np.hypot(points.Idev[tops], points.Idev[bases])
    kept = np.sort(np.argsort(-rises)[:MOST_PEAKS])
    kept = kept[rises[kept] >= significance]
    return [
        _measured(points, top, window, float(rise))
        for top, window, rise in zip(tops[kept], _windows(points, tops[kept]), rises[kept], strict=True)
    ]


def _units(curve: xr.Dataset) -> str:
    if "exposure" in curve.dims or not {"q", "I", "Idev"} <= set(curve.variables):
        raise BadInput("Give one exposure with q, I and Idev: result.isel(exposure=0).")
    return str(curve["I"].attrs.get("units", "1/cm"))


def _points(curve: xr.Dataset) -> _Points:
    """Take the points that can be used: finite, at q > 0, with an error if any point has one."""
    q, I, Idev = (curve[name].values.astype(float) for name in ("q", "I", "Idev"))
    stated = bool(np.isfinite(Idev).any())
    good = np.isfinite(I) & (q > 0) & ((np.isfinite(Idev) & (Idev > 0)) if stated else True)
    if good.sum() < FEWEST:
        raise _Inapplicable(f"fewer than {FEWEST} points can be used")
    try:
        errors = covariance(curve)
    except BadInput:
        errors = Covariance(np.zeros((q.size, 0)), Idev)
    return _Points(q[good], I[good], Idev[good], Covariance(errors.factor[good], errors.own[good]), _units(curve))


def _none(name: str, units: str, reason: object) -> Quantity:
    return Quantity(name, float("nan"), float("nan"), units, str(reason))


# -- Guinier --


def _guinier_line(points: _Points) -> tuple[NDArray, NDArray]:
    """Fit level and slope of ln I over q^2; return them and their gradients towards I, shape (2, n)."""
    if (points.I <= 0).any():
        raise _Inapplicable("I is not positive throughout the lowest q")
    weights = points.weights * points.I
    columns = np.stack([np.ones_like(points.q), points.q**2], axis=1)
    solve = np.linalg.pinv(columns * weights[:, None]) * weights
    return solve @ np.log(points.I), solve / points.I


def _guinier_range(points: _Points, limit: float) -> int:
    """Find how many points, from the lowest q on, lie below q Rg = `limit`."""
    low = np.median(points.I[:3]) * np.exp(-(limit**2) / 3)
    below = low - points.I > 0
    count = max(int(np.argmax(below)) if below.any() else points.q.size, FEWEST)
    seen: set[int] = set()
    while count not in seen:
        seen.add(count)
        _, slope = _guinier_line(points.part(0, count))[0]
        if slope >= 0:
            raise _Inapplicable("the curve does not fall from its lowest q on")
        count = int(np.searchsorted(points.q, limit / np.sqrt(-3 * slope), side="right"))
        if count < FEWEST:
            raise _Inapplicable(f"fewer than {FEWEST} points lie below q Rg = {limit:g}")
    return count


def _check_guinier(points: _Points, level: float, slope: float) -> None:
    if slope >= 0:
        raise _Inapplicable("the curve does not fall from its lowest q on")
    if (lowest := points.q[0] * np.sqrt(-3 * slope)) > LOWEST:
        raise _Inapplicable(f"the curve begins at q Rg = {lowest:.2g}; it must reach below {LOWEST:g}")
    residuals = (np.log(points.I) - level - slope * points.q**2) * points.I * points.weights
    if (misfit := float(np.mean(residuals**2))) > STRAIGHT and np.isfinite(points.Idev).all():
        raise _Inapplicable(f"ln I over q^2 is not straight at the lowest q (mean squared residual {misfit:.3g})")


# -- peaks --


def _windows(points: _Points, tops: NDArray) -> list[tuple[int, int]]:
    """Return where each peak is fitted: as far as the minima towards its neighbours, or `REACH` widths."""
    ends = [0, *tops, points.q.size - 1]
    minima = [first + int(np.argmin(points.I[first : last + 1])) for first, last in pairwise(ends)]
    place = np.arange(points.q.size)
    _, _, left, right = peak_widths(points.I, tops, rel_height=0.5)
    width = np.interp(right, place, points.q) - np.interp(left, place, points.q)
    first = np.searchsorted(points.q, points.q[tops] - REACH * width)
    last = np.searchsorted(points.q, points.q[tops] + REACH * width, side="right")
    return [
        (max(int(f), low), min(int(l), high + 1)) for f, l, low, high in zip(first, last, minima[:-1], minima[1:], strict=True)
    ]


def _measured(points: _Points, top: int, window: tuple[int, int], significance: float) -> Peak:
    try:
        values, deviations = _fit_peak(points.part(*window), top - window[0])
        reason = ""
    except _Inapplicable as why:
        values = deviations = np.full(3, np.nan)
        reason = str(why)
    position, height, fwhm = (
        Quantity(name, float(value), float(deviation), units, reason)
        for name, units, value, deviation in zip(
            ("position", "height", "fwhm"), ("1/nm", points.units, "1/nm"), values, deviations, strict=True
        )
    )
    return Peak(position, height, fwhm, significance)


def _fit_peak(points: _Points, top: int) -> tuple[NDArray, NDArray]:
    """Fit a peak with its background; return position, height and full width, and their standard deviations."""
    if points.q.size < PEAK_POINTS:
        raise _Inapplicable(f"it has {points.q.size} points, and {PEAK_POINTS} are needed")
    q0, span = points.q[top], points.q[-1] - points.q[0]
    ends = np.where(points.I[[0, -1]] > 0, points.I[[0, -1]], 1e-3 * points.I[top])
    exponent = float(np.clip(np.log(ends[1] / ends[0]) / np.log(points.q[-1] / points.q[0]), -20, 20))
    level = float(np.log(ends[0]) + exponent * np.log(q0 / points.q[0]))
    height = max(points.I[top] - np.exp(level), 0.1 * points.I[top])
    unit = np.array([span, height, 1.0, 1.0, 1.0, 1.0])  # of position, height, ln width, mixing, ln background, exponent

    weights = 1 / np.hypot(points.Idev, PROFILE * height)

    def residuals(parameters: NDArray) -> NDArray:
        return (_profile(points.q, q0, *(parameters * unit)) - points.I) * weights

    start = [0.0, 1.0, np.log(span / 4), 0.3, level, exponent]
    step = float(np.diff(points.q).min())
    low = [-0.5, 1e-3, np.log(step), 0.0, level - 20, -30.0]
    high = [0.5, 100.0, np.log(span), 1.0, level + 5, 30.0]
    fit = least_squares(residuals, start, bounds=(low, high), x_scale="jac", ftol=1e-6, xtol=1e-6, max_nfev=200)
    free = (fit.active_mask == 0) & (np.minimum(fit.x - low, high - fit.x) > 1e-3)
    if not fit.success or not free[:3].all():
        raise _Inapplicable("no profile with a background fits it")
    gradient = np.linalg.pinv(fit.jac[:, free])[:3] * weights
    deviations = np.sqrt(np.diag(points.propagate(gradient)))
    width = np.exp(fit.x[2])
    return np.array([q0 + fit.x[0] * span, fit.x[1] * height, width]), deviations * [span, height, width]


def _profile(
    q: NDArray, q0: float, shift: float, height: float, log_width: float, mixing: float, background: float, exponent: float
) -> NDArray:
    u2 = ((q - q0 - shift) / np.exp(log_width)) ** 2
    shape = (1 - mixing) * np.exp(-4 * np.log(2) * u2) + mixing / (1 + 4 * u2)
    return height * shape + np.exp(background + exponent * np.log(q / q0))

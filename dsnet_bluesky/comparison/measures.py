"""How two answers to one measurement differ; pure functions on Datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky.desmearing.covariance import coverage_factor
from dsnet_bluesky.quantities import Peak, Quantity, guinier, invariant, peaks

__all__ = ["BANDS", "QUANTITIES", "Differences", "differences", "mismatch", "quantity_changes", "rows_of"]

MEASURED_EXPOSURES = 5
"""Exposures of a run whose derived quantities are measured: they take longer than all the rest, and a run is of one sample."""

BANDS = ("b_in_a_68", "b_in_a_95", "a_in_b_68", "a_in_b_95")
"""Shares of points of one answer within the band of the other."""

QUANTITIES = ("Rg", "I0", "invariant", "peak_position", "peak_fwhm", "peak_height")
"""Derived quantities; those of peaks are of the most significant one that both answers have."""

SAME = 0.01
"""Largest difference between two copies of one measurement, in its errors: programs of other versions round in other ways."""


@dataclass(frozen=True)
class Differences:
    """Point by point, each of shape (exposure, n).

    Attributes
    ----------
    d
        ``(I_B - I_A) / sqrt(Idev_A^2 + Idev_B^2)``. Both answers see the same noise, so their errors are correlated: where both
        models are right its standard deviation is well below 1.
    by_a
        ``(I_B - I_A) / Idev_A``.
    relative
        ``(I_B - I_A) / |I_A|``.
    inside
        Whether a point of one answer lies within the band of the other, by `BANDS`; 1, 0, or NaN where the other states no error.
    """

    d: NDArray
    by_a: NDArray
    relative: NDArray
    inside: dict[str, NDArray]


def mismatch(a: xr.Dataset, b: xr.Dataset) -> str:
    """Say why two results are not answers to one measurement, empty if they are.

    Parameters
    ----------
    a, b
        Dims (exposure, q), the same exposures.
    """
    if a.sizes["q"] != b.sizes["q"] or not np.allclose(a["q"].values, b["q"].values, rtol=1e-9, atol=0):
        return f"on another grid of q ({a.sizes['q']} and {b.sizes['q']} points); nothing is interpolated"
    off = np.abs(_values(a, "I_smeared") - _values(b, "I_smeared")) / _values(a, "Idev_smeared")
    if np.nanmax(off, initial=0.0) > SAME:
        return "of another measured curve: the frames were reduced in another way"
    return ""


def differences(a: xr.Dataset, b: xr.Dataset) -> Differences:
    """Compare two answers to one measurement.

    Parameters
    ----------
    a, b
        Desmeared, dims (exposure, q), of the same exposures on one q. Where one of them states no errors, d takes those of the
        other; where neither does, it is NaN.
    """
    change = _values(b, "I") - _values(a, "I")
    mine, theirs = _values(a, "Idev"), _values(b, "Idev")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        both = np.sqrt(np.nansum([mine**2, theirs**2], axis=0))
        parts = change / both, change / mine, change / np.abs(_values(a, "I"))
    d, by_a, relative = (np.where(np.isfinite(part), part, np.nan) for part in parts)
    bands = {
        "b_in_a_68": mine,
        "b_in_a_95": mine * _factors(a)[:, None],
        "a_in_b_68": theirs,
        "a_in_b_95": theirs * _factors(b)[:, None],
    }
    unknown = ~np.isfinite(change)
    near = {name: (np.abs(change) <= np.nan_to_num(band)).astype(float) for name, band in bands.items()}
    inside = {name: np.where(unknown | ~np.isfinite(bands[name]), np.nan, values) for name, values in near.items()}
    return Differences(d, by_a, relative, inside)


def rows_of(a: xr.Dataset, b: xr.Dataset, found: Differences, exposures: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Sum up each exposure in a row of numbers.

    Parameters
    ----------
    a, b, found
        As for `differences`, and its answer.
    exposures
        Their places in the run.
    """
    count = len(exposures)
    measured = set(np.linspace(0, count - 1, min(count, MEASURED_EXPOSURES)).round().astype(int).tolist())
    q = a["q"].values
    for place, exposure in enumerate(exposures):
        one, other = a.isel(exposure=place), b.isel(exposure=place)
        d, by_a = np.abs(found.d[place]), np.abs(found.by_a[place])
        known = bool(np.isfinite(d).any())
        largest = int(np.nanargmax(d)) if known else 0
        yield {
            "exposure": exposure,
            "chi2_a": float(one["chi2"]),
            "chi2_b": float(other["chi2"]),
            "d_rms": _root_mean_square(d),
            "d_largest": float(d[largest]),
            "d_largest_q": float(q[largest]) if known else float("nan"),
            "d_beyond_3": _mean(np.where(np.isnan(d), np.nan, d > 3)),
            "by_a_rms": _root_mean_square(by_a),
            "relative_median": float(np.nanmedian(np.abs(found.relative[place]))) if known else float("nan"),
            **{name: _mean(values[place]) for name, values in found.inside.items()},
            "flags_a": int(one["flags"]),
            "flags_b": int(other["flags"]),
            "answer_a": str(one["answer"].item()) if "answer" in one else "",
            "answer_b": str(other["answer"].item()) if "answer" in other else "",
            **(quantity_changes(one, other) if place in measured else {}),
        }


def quantity_changes(a: xr.Dataset, b: xr.Dataset) -> dict[str, float]:
    """Measure the derived quantities of two answers to one measurement, and how they differ.

    Parameters
    ----------
    a, b
        One exposure.

    Returns
    -------
    dict
        For each of `QUANTITIES` ``X_a``, ``X_a_error``, ``X_b``, ``X_b_error`` and ``X_change``, the difference over the root of
        the sum of the squared errors (correlated, as d is: see `Differences`); numbers of peaks, and of those in both;
        ``peak_largest_shift``, of any peak's position.
    """
    first, second = peaks(a), peaks(b)
    matched = _matched(first, second)
    pairs: dict[str, tuple[Quantity, Quantity]] = {}
    for one, other in zip(guinier(a), guinier(b), strict=True):
        pairs[one.name] = (one, other)
    pairs["invariant"] = (invariant(a), invariant(b))
    if matched:
        one, other = max(matched, key=lambda pair: pair[0].significance)
        pairs |= {f"peak_{name}": (getattr(one, name), getattr(other, name)) for name in ("position", "fwhm", "height")}
    shifts = [abs(_change(one.position, other.position)) for one, other in matched]
    changes: dict[str, float] = {"peaks_a": len(first), "peaks_b": len(second), "peaks_matched": len(matched)}
    changes["peak_largest_shift"] = max(shifts, default=float("nan"))
    for name, (one, other) in pairs.items():
        changes |= {
            f"{name}_a": one.value,
            f"{name}_a_error": one.error,
            f"{name}_b": other.value,
            f"{name}_b_error": other.error,
        }
        changes[f"{name}_change"] = _change(one, other)
    return changes


def _matched(first: Sequence[Peak], second: Sequence[Peak]) -> list[tuple[Peak, Peak]]:
    """Pair peaks that lie within half a width of each other, each with the nearest."""
    pairs = []
    free = [peak for peak in second if peak.position.valid]
    for peak in first:
        if not peak.position.valid or not free:
            continue
        nearest = min(free, key=lambda other: abs(other.position.value - peak.position.value))
        if abs(nearest.position.value - peak.position.value) < max(peak.fwhm.value, nearest.fwhm.value) / 2:
            pairs.append((peak, nearest))
            free.remove(nearest)
    return pairs


def _change(a: Quantity, b: Quantity) -> float:
    error = np.hypot(a.error, b.error)
    return float((b.value - a.value) / error) if error > 0 else float("nan")


def _values(dataset: xr.Dataset, name: str) -> NDArray:
    return dataset[name].transpose("exposure", "q").values


def _factors(dataset: xr.Dataset) -> NDArray:
    """How many Idev make the band of 95 %, for each exposure."""
    return np.array([coverage_factor(dataset.isel(exposure=place)) for place in range(dataset.sizes["exposure"])])


def _mean(values: NDArray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _root_mean_square(values: NDArray) -> float:
    return float(np.sqrt(_mean(values**2)))

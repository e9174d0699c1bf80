"""What a desmeared curve says of its own errors: covariance in low rank, coverage factor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky.data import BadInput, Flag

__all__ = ["Covariance", "covariance", "coverage_factor"]


GAUSSIAN = 1.96
"""Standard deviations that hold 95 % of a Gaussian."""


class Covariance(NamedTuple):
    """``factor @ factor.T + diag(own**2)``, in the unit of I squared.

    Attributes
    ----------
    factor
        Shape (n, k): errors that neighbours share.
    own
        Standard deviation of what each point has for itself, shape (n,).
    """

    factor: NDArray
    own: NDArray

    def dense(self) -> NDArray:
        """Give the whole matrix, shape (n, n)."""
        return self.factor @ self.factor.T + np.diag(self.own**2)

    def whiten(self, residuals: NDArray) -> NDArray:
        """Scale residuals to independent ones of unit variance, so that their squares can be summed.

        Parameters
        ----------
        residuals
            Model minus I, shape (..., n).

        Returns
        -------
        ndarray
            Same shape: ``L^-1 residuals``, L being the Cholesky factor of the matrix.
        """
        return np.linalg.solve(np.linalg.cholesky(self.dense()), np.asarray(residuals)[..., None])[..., 0]


def covariance(result: xr.Dataset) -> Covariance:
    """Give the covariance of one desmeared curve, for fits.

    Errors of neighbours are not independent: an answer is known to about one resolution. Fitting with Idev alone
    makes the errors of parameters too small.

    Parameters
    ----------
    result
        One exposure of a desmeared Dataset: I, Idev and Qdev on q, and the attribute ``diagnostics``. Where the noise was
        found by a bootstrap, its covariance is there too (`noise_factor`, `noise_own`), and is joined with
        what the method does not know.

    Raises
    ------
    BadInput
        If there are several exposures, or the method did not say how its errors are correlated.

    Examples
    --------
    >>> from dsnet_bluesky.data import curve
    >>> from dsnet_bluesky.desmearing import desmear
    >>> from dsnet_bluesky.smearing import Smearing
    >>> q = np.linspace(0.05, 2, 200)
    >>> result = desmear(curve(q, np.exp(-(q**2)) + 0.01), Smearing.gaussian(q, 0.04), method="dsnet")
    >>> found = covariance(result)
    >>> bool(np.allclose(np.sqrt(np.diag(found.dense())), result["Idev"]))
    True
    """
    if "exposure" in result.dims:
        raise BadInput("Give one exposure: covariance(result.isel(exposure=0)).")
    if "noise_factor" in result:
        return _with_noise(result)
    told = json.loads(result.attrs.get("diagnostics", "{}")).get("correlation")
    if not told or _substituted(result) or not np.isfinite(result["Qdev"].values).all():
        raise BadInput(
            f"{result.attrs.get('method', 'The method')} does not say how the errors of this curve are correlated; "
            "only answers of the method dsnet do that are its own."
        )
    return _told(result, result["Idev"].values, told)


def _told(result: xr.Dataset, Idev: NDArray, told: Mapping[str, Any]) -> Covariance:
    """Covariance of errors that are correlated as the method says."""
    q, Qdev = result["q"].values, result["Qdev"].values
    place = np.concatenate([[0.0], np.cumsum(2 * np.diff(q) / (Qdev[1:] + Qdev[:-1]))])
    step = float(np.median(np.diff(place)))
    parts = [
        np.sqrt(share) * _bumps(place, length)
        for length, share in zip(told["lengths"], told["shares"], strict=True)
        if share > 0 and length > step / 2
    ]
    shared = np.hstack([np.zeros((q.size, 1)), *parts])
    own = np.sqrt(np.maximum(1 - (shared**2).sum(axis=1), 1e-6))
    return Covariance(Idev[:, None] * shared, Idev * own)


def _with_noise(result: xr.Dataset) -> Covariance:
    """Join the covariance of the noise with that of what the method does not know, which is independent where it says nothing."""
    factor, own = result["noise_factor"].transpose("q", ...).values, result["noise_own"].values
    rest = np.sqrt(np.maximum(result["Idev"].values ** 2 - (factor**2).sum(axis=1) - own**2, 0.0))
    told = json.loads(result.attrs.get("diagnostics", "{}")).get("correlation")
    if not told or _substituted(result) or not np.isfinite(result["Qdev"].values).all():
        return Covariance(factor, np.hypot(own, rest))
    method = _told(result, rest, told)
    return Covariance(np.hstack([factor, method.factor]), np.hypot(own, method.own))


def coverage_factor(result: xr.Dataset) -> float:
    """How many `Idev` hold 95 % of the truth (JCGM 100:2008, 6.2): what the method says, 1.96 where it says nothing.

    Parameters
    ----------
    result
        A desmeared Dataset.
    """
    if _substituted(result):
        return GAUSSIAN
    return float(json.loads(result.attrs.get("diagnostics", "{}")).get("coverage_factor", GAUSSIAN))


def _substituted(result: xr.Dataset) -> bool:
    """Whether a classical method answered, of whose errors the model knows nothing; of several exposures, all of them."""
    return "flags" in result and bool((result["flags"].values & int(Flag.SUBSTITUTED)).all())


def _bumps(place: NDArray, length: float) -> NDArray:
    """Columns whose products correlate as exp(-d^2 / 2 length^2); rows of unit norm."""
    tops = np.arange(-2 * length, place[-1] + 2 * length + 1e-9, length)
    columns = np.exp(-(((place[:, None] - tops) / length) ** 2))
    return columns / np.linalg.norm(columns, axis=1, keepdims=True)

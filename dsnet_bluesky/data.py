"""The vocabulary: every Dataset that this project passes around is built and checked here.

Units inside are fixed: q in 1/nm, lengths in m, times in s. Intensities keep
the unit they come in. Standard deviations carry the field's names: `Idev`
belongs to `I`, `Qdev` to `q` (one standard deviation of the resolution).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BadInput",
    "Flag",
    "check_curve",
    "check_intensities",
    "concat_exposures",
    "curve",
    "estimate_idev",
    "exposures_of",
    "failed_exposure",
    "join_answers",
]

LONG_NAMES = {
    "q": "scattering vector",
    "I": "intensity",
    "Idev": "standard deviation of the intensity",
    "Idev_noise": "part of Idev that the noise of the measurement makes",
    "Qdev": "standard deviation of the resolution",
    "I_smeared": "measured (smeared) intensity",
    "Idev_smeared": "standard deviation of the measured intensity",
    "I_resmeared": "desmeared intensity, smeared again",
    "chi2": "mean squared residual of the re-smeared curve, in units of Idev",
    "flags": "sum of dsnet_bluesky.data.Flag values",
    "status": "ok or failed",
    "anisotropy": "amplitude of the second harmonic of the ring, in units of its mean",
    "anisotropy_dev": "standard deviation of the anisotropy",
    "answer": "what answered: the network, proximal steps from it, or a classical method in its place",
    "chi2_network": "chi2 of the network's answer, before any step towards the measurement",
    "chi2_rings": "reduced chi2 of the model's ring sums against the measured ones",
    "chi2_symmetry": "reduced chi2 between pixels and their mates across the beam",
    "counts_per_pixel": "mean counts of the pixels that count",
    "denoised": "expected counts",
    "diameter": "largest dimension of the scatterer in nm",
    "image": "counts at normal incidence, on equal steps of the transverse q",
    "iterations": "steps of the iteration",
    "loss_first": "loss of the re-smeared curve before fine-tuning",
    "loss_last": "loss of the re-smeared curve after fine-tuning",
    "misorientation_dev": "68 % of true orientations are within this angle, modulo the icosahedral group",
    "noise_factor": "covariance of I by noise, in low rank: noise_factor @ noise_factor.T + diag(noise_own**2)",
    "noise_own": "standard deviation of what the noise makes in each point for itself",
    "orientation": "azimuth of the strongest scattering of the ring, modulo 180 degrees",
    "orientation_dev": "circular standard deviation of the orientation",
    "parameters": "effective number of parameters",
    "quaternion": "orientation (w, x, y, z), in the fundamental domain of the icosahedral group",
    "radius": "radius of the icosahedron, from its centre to a vertex",
    "radius_dev": "standard deviation of the radius",
    "score": "correlation of the logarithms of the image and of the one simulated from the answer",
    "trend": "width of the trend's window, in widths of the operator",
    "weight": "weight of the prior",
}
"""One line of meaning for each variable, written into `long_name`."""

WORDS = {"status": ("", "ok", "failed"), "answer": ("", "network", "proximal", "map", "ift")}
"""Variables of words, and the words they take: stores that know no strings hold their places here, 0 meaning none."""

RESULT_VARIABLES = ("I", "Idev", "Idev_noise", "Qdev", "I_smeared", "Idev_smeared", "I_resmeared")
"""Variables of a desmeared Dataset with dims (exposure, q)."""


class BadInput(ValueError):
    """Input that cannot be used; the message says what is wrong and what to do.

    Whatever raises this has written nothing. A service turns it into a result
    with `status="failed"` and the message as its reason.
    """


class Flag(enum.IntFlag):
    """What a user should know about a result that is otherwise complete."""

    NOT_CONVERGED = 1
    """The iteration stopped at its limit."""
    POOR_FIT = 2
    """The re-smeared result misses the measurement: chi2 above 2. Of an image: it is unlike that simulated from the answer."""
    NOISE_ESTIMATED = 4
    """Idev was not measured but estimated from the scatter of the curve."""
    EXTRAPOLATED = 8
    """The smearing reaches beyond the measured range by more than a tenth of it."""
    OUT_OF_RANGE = 16
    """The model was not trained for such a curve or operator."""
    SUBSTITUTED = 32
    """The model's answer missed the measurement; a classical method's is given, named by the variable `answer`."""
    ASYMMETRIC = 64
    """The frame breaks the symmetry that the model rests on."""
    BIASED = 128
    """Rings of the model's frame miss the measured ones: their chi2 is above 1.2."""
    FEW_COUNTS = 256
    """The frame holds fewer than 0.1 counts a pixel."""


PER_NM = ("1/nm", "nm^-1", "nm-1", "nm**-1", "1 / nm", "nm^{-1}", "1/nanometer", "1 / nanometer")
"""Spellings of the unit of q."""


def curve(
    q: ArrayLike,
    I: ArrayLike,
    Idev: ArrayLike | None = None,
    *,
    Qdev: ArrayLike | None = None,
    units: str = "1/cm",
    **attrs: Any,
) -> xr.Dataset:
    """Build a curve, or several exposures on one q, as a Dataset.

    Parameters
    ----------
    q
        Scattering vector in 1/nm, shape (n,), ascending.
    I
        Intensity, shape (n,) or (exposure, n).
    Idev
        One standard deviation of `I`, same shape. Without it the noise is
        estimated from the scatter of the points (`estimate_idev`), and the
        attribute ``Idev_estimated`` says so.
    Qdev
        One standard deviation of the resolution in 1/nm, shape (n,).
    units
        Unit of `I` as a string that pint parses.
    **attrs
        Further attributes of the Dataset (``title``, ``sample`` ...).

    Returns
    -------
    xarray.Dataset
        Variables `I`, `Idev` (and `Qdev`) with dims ("q",) or ("exposure", "q").

    Raises
    ------
    BadInput
        If the curve cannot be used (see `check_curve`).
    """
    intensity = _numbers(I)
    if intensity.ndim not in (1, 2):
        raise BadInput(f"I has {intensity.ndim} dimensions; give (q,) or (exposure, q).")
    dims = ("q",) if intensity.ndim == 1 else ("exposure", "q")
    q = _numbers(q)
    if q.ndim != 1 or intensity.shape[-1] != q.size:
        raise BadInput(f"q has shape {q.shape} and I has shape {intensity.shape}: the last axes must agree.")
    if Idev is None:
        attrs["Idev_estimated"] = 1
    idev = estimate_idev(intensity) if Idev is None else _numbers(Idev)
    if idev.shape != intensity.shape:
        raise BadInput(f"Idev has shape {idev.shape} and I has shape {intensity.shape}: they must agree.")
    dataset = xr.Dataset(
        {"I": (dims, intensity, {"units": units, "uncertainties": "Idev"}), "Idev": (dims, idev, {"units": units})},
        coords={"q": ("q", q, {"units": "1/nm"})},
        attrs=attrs,
    )
    if Qdev is not None:
        dataset["Qdev"] = ("q", np.broadcast_to(_numbers(Qdev), q.shape).copy(), {"units": "1/nm"})
        dataset["q"].attrs["resolutions"] = "Qdev"
    return check_curve(describe(dataset))


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    """Copy numbers; what is masked is NaN, which is refused where it matters."""
    return np.array(np.ma.filled(np.ma.asarray(values, dtype=float), np.nan))


def describe(dataset: xr.Dataset) -> xr.Dataset:
    """Write the `long_name` of every variable that the vocabulary knows, in place."""
    for name, variable in dataset.variables.items():
        if name in LONG_NAMES:
            variable.attrs.setdefault("long_name", LONG_NAMES[str(name)])
    return dataset


def check_curve(dataset: xr.Dataset) -> xr.Dataset:
    """Return `dataset` if it is a curve, or one of several exposures is, that can be desmeared.

    Raises
    ------
    BadInput
        If q is not finite, not positive, not strictly ascending or not in 1/nm, if there are fewer than 5 points
        or no exposure, if I and Idev are not of dims q, or exposure and q, or if no exposure has intensities that can
        be used (`check_intensities`).
    """
    missing = {"q", "I", "Idev"} - set(dataset.variables)
    if missing:
        raise BadInput(f"The curve lacks {', '.join(sorted(missing))}; build it with dsnet_bluesky.data.curve(q, I, Idev).")
    if not dataset.sizes.get("exposure", 1):
        raise BadInput("The batch holds no exposure; give at least one curve.")
    dims = [dataset.variables[name].dims for name in ("I", "Idev")]
    if set(dims[0]) != set(dims[1]) or set(dims[0]) not in ({"q"}, {"exposure", "q"}):
        raise BadInput(f"I has the dims {dims[0]} and Idev {dims[1]}; give both (q,), or both (exposure, q).")
    if (units := dataset.variables["q"].attrs.get("units", "1/nm")) not in PER_NM:
        raise BadInput(f"q is in {units!r}; convert it to 1/nm, and say so in its attribute units.")
    q = dataset["q"].values
    if q.size < 5:
        raise BadInput(f"The curve has {q.size} points; at least 5 are needed.")
    if not np.isfinite(q).all() or q[0] < 0:
        raise BadInput("q must be finite and not negative; remove the points where it is not.")
    if not (np.diff(q) > 0).all():
        first = int(np.argmax(np.diff(q) <= 0))
        raise BadInput(
            f"q is not ascending: q[{first}] = {q[first]:.6g} is followed by {q[first + 1]:.6g} 1/nm. "
            "Sort the points and merge repeated ones."
        )
    # Of the arrays, not of their Dataset: this is asked of every exposure of a live scan.
    I, Idev = (dataset.variables[name].transpose(..., "q").values for name in ("I", "Idev"))
    usable = np.isfinite(I) & (Idev > 0) & (Idev < np.inf)
    if not usable.all(axis=-1).any():
        check_intensities(dataset)
    return dataset


def check_intensities(dataset: xr.Dataset) -> None:
    """Check the intensities of a curve, or of all exposures.

    Raises
    ------
    BadInput
        If I or Idev hold NaN or infinity, or an Idev is not positive. Negative intensities are fine:
        some methods refuse them.
    """
    for name in ("I", "Idev"):
        bad = ~np.isfinite(exposures_of(dataset).variables[name].transpose("exposure", "q").values)
        if bad.any():
            where = dataset["q"].values[np.argmax(bad.any(axis=0))]
            raise BadInput(
                f"{name} is not finite at {int(bad.sum())} points (first at q = {where:.4g} 1/nm); remove those points."
            )
    if (dataset["Idev"].values <= 0).any():
        raise BadInput("Idev must be positive at every point; leave it out to have it estimated from the scatter.")


def estimate_idev(I: ArrayLike) -> NDArray:
    """Standard deviation of the noise, from the scatter about a local parabola.

    Third differences of neighbouring points cancel a smooth curve; their
    median in a moving window gives the noise robustly against sharp features.

    Parameters
    ----------
    I
        Intensity, shape (..., n), n >= 5.

    Returns
    -------
    ndarray
        Same shape, positive. Never below 1e-4 of the absolute intensity: a noise-free
        curve has no scatter, and a weight must stay finite. Where a curve is zero (under
        a beamstop) never below a tenth of the median of its other points, and 1 where
        a curve is zero throughout.
    """
    values = np.asarray(I, dtype=float)
    if values.shape[-1] < 5:
        raise BadInput(f"The curve has {values.shape[-1]} points; at least 5 are needed.")
    third = np.abs(np.diff(values, n=3, axis=-1)) / np.sqrt(20.0)
    padded = np.pad(third, [(0, 0)] * (values.ndim - 1) + [(1, 2)], mode="edge")
    half = min(10, values.shape[-1] // 4)
    window = np.pad(padded, [(0, 0)] * (values.ndim - 1) + [(half, half)], mode="reflect")
    views = np.lib.stride_tricks.sliding_window_view(window, 2 * half + 1, axis=-1)
    return _floored(np.median(views, axis=-1) / 0.6745, np.abs(values))


def _floored(sigma: NDArray, size: NDArray) -> NDArray:
    """Keep errors away from zero, by the size of the intensities and by the errors of the other points."""
    sigma = np.maximum(sigma, 1e-4 * size)
    # What is this much smaller than the rest comes from rounding.
    nothing = size <= 1e-15 * size.max(axis=-1, keepdims=True)
    usual = np.ma.median(np.ma.masked_where(nothing, sigma), axis=-1, keepdims=True)
    return np.where(nothing, np.maximum(sigma, 0.1 * np.ma.filled(usual, 10.0)), sigma)


def exposures_of(dataset: xr.Dataset) -> xr.Dataset:
    """Return the Dataset with an `exposure` dimension, added where there was none."""
    return dataset if "exposure" in dataset.dims else dataset.expand_dims("exposure")


def failed_exposure(result: xr.Dataset) -> xr.Dataset:
    """Build the row of a desmeared Dataset that stands for an exposure that failed: NaN, 0 and empty words.

    Parameters
    ----------
    result
        What it is to be a row of: its variables, with q and units, are those of the first exposure.
    """
    row = exposures_of(result).isel(exposure=[0])
    for name in [name for name, values in row.data_vars.items() if "exposure" in values.dims]:
        nothing = np.zeros(row[name].shape, row[name].dtype)
        row[name] = row[name].copy(data=np.full_like(nothing, np.nan) if nothing.dtype.kind == "f" else nothing)
    return row.assign(status=("exposure", ["failed"], row["status"].attrs))


def concat_exposures(datasets: list[xr.Dataset]) -> xr.Dataset:
    """Join Datasets of the same q along `exposure`."""
    return xr.concat(datasets, dim="exposure", combine_attrs="override", data_vars="all", coords="minimal")


def join_answers(answers: Sequence[xr.Dataset | BadInput]) -> xr.Dataset:
    """Put answers in order, rows of `failed_exposure` standing for exposures without one.

    Parameters
    ----------
    answers
        Of one exposure or several each, or why one exposure has none.

    Returns
    -------
    xarray.Dataset
        The attribute ``failures``, where there are some, says why, as JSON: a list of ``{"exposure": ..., "reason": ...}``.

    Raises
    ------
    BadInput
        The first reason, if there is no answer.
    """
    found = [answer for answer in answers if isinstance(answer, xr.Dataset)]
    if not found:
        assert isinstance(answers[0], BadInput)
        raise answers[0]
    if len(found) == len(answers) == 1:
        return found[0]
    rows: list[xr.Dataset] = []
    failures = []
    for answer in answers:
        if isinstance(answer, BadInput):
            failures.append({"exposure": sum(row.sizes["exposure"] for row in rows), "reason": str(answer)})
        rows.append(failed_exposure(found[0]) if isinstance(answer, BadInput) else answer)
    return concat_exposures(rows).assign_attrs({"failures": json.dumps(failures)} if failures else {})

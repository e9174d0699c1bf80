"""The PSF: the direct beam, found in its frame, cut out and centred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.ndimage
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput

from .geometry import beam_pixel, check_shape, counts_ceiling, integrator, invalid_pixels, static_mask

MINIMUM_BEAM_COUNTS = 1e4
"""Fewer counts in the direct beam make the operator itself too noisy to use."""

LARGEST_LOSS = 0.05
"""Share of the direct beam that pixels may miss that do not count."""


def psf(
    frame: ArrayLike, poni: Mapping[str, Any], *, mask: NDArray | None = None, minimum_counts: float = MINIMUM_BEAM_COUNTS
) -> xr.Dataset:
    """Measure the instrument's PSF: the direct beam, cut out and centred.

    Parameters
    ----------
    frame
        Counts of the direct beam, shape (y, x), or (frame, y, x) which is summed.
    poni
        Geometry of that exposure.
    mask
        True where a pixel does not count.
    minimum_counts
        Fewer counts than this in the beam are refused.

    Returns
    -------
    xarray.Dataset
        `beam` (y, x): the beam, background subtracted, sum 1, with offsets `y`, `x`
        in m from its centroid. `p` (rho): sums over rings about the centroid, rho in
        1/nm. `counts`: counts in the beam. `sigma`: equivalent Gaussian width,
        sqrt(<rho^2>/2), in 1/nm. Attributes `centre_y`, `centre_x`: the centroid in pixels.

    Raises
    ------
    BadInput
        If the frame does not fit the geometry, or shows no usable beam.
    """
    ai = integrator(poni)
    stack = np.atleast_3d(np.asarray(frame).T).T
    check_shape(stack, ai)
    bad = invalid_pixels(stack, ai.detector.name).any(axis=0) | static_mask(ai, mask)
    total = np.where(bad, 0.0, stack.sum(axis=0, dtype=float))
    _check_mask(stack, ai, bad)
    _check_counts(total, bad, minimum_counts)
    spot = _spot(total, bad)
    _check_spot(spot)
    rows, columns = scipy.ndimage.find_objects(spot.astype(int))[0]
    background = _background(total, bad, spot)
    beam = np.where(spot, _filled(total, bad) - background, 0.0)
    saturated = (stack >= counts_ceiling(stack.dtype, ai.detector.name)).any(axis=0)
    _check_losses(beam, bad & spot, spot, saturated & spot)
    beam = beam[rows, columns]
    counts = float(beam.sum())
    if counts < minimum_counts:
        raise BadInput(_too_few(counts, minimum_counts))
    y, x = np.arange(rows.start, rows.stop) + 0.5, np.arange(columns.start, columns.stop) + 0.5
    centre_y, centre_x = float(beam.sum(1) @ y / counts), float(beam.sum(0) @ x / counts)
    return _psf_dataset(beam / counts, (y - centre_y) * ai.pixel1, (x - centre_x) * ai.pixel2, ai, counts, (centre_y, centre_x))


def _too_few(counts: float, minimum: float) -> str:
    return f"The direct beam holds {counts:.0f} counts; at least {minimum:.0f} are needed. Expose longer or attenuate less."


def _check_counts(total: NDArray, bad: NDArray, minimum: float) -> None:
    if bad.all():
        raise BadInput("The direct beam has no valid pixel: all are masked, negative, saturated or NaN.")
    if total.sum() < minimum:
        raise BadInput(_too_few(total.sum(), minimum))


def _check_mask(stack: NDArray, ai: Any, bad: NDArray) -> None:
    """Refuse a mask that hides the beam itself, as that of the samples does with its beamstop."""
    counting = ~invalid_pixels(stack, ai.detector.name).any(axis=0)
    counts = np.where(counting, stack.sum(axis=0, dtype=float), 0.0)
    hidden = counts[bad].sum() / max(counts.sum(), 1.0)
    if hidden > 0.5:
        raise BadInput(
            f"{hidden:.0%} of the counts of the direct beam lie under its mask; give it a mask without the beamstop, or none."
        )


def _check_spot(spot: NDArray) -> None:
    rim = np.concatenate([spot[0], spot[-1], spot[:, 0], spot[:, -1]])
    if rim.any() or spot.mean() > 0.1:
        edge = " and reaches its edge" if rim.any() else ""
        raise BadInput(
            f"The direct beam is not a spot: it covers {spot.mean():.1%} of the detector{edge}. "
            "Expose it without a sample, longer, and well inside the detector."
        )


def _check_losses(beam: NDArray, lost: NDArray, spot: NDArray, saturated: NDArray) -> None:
    """Refuse a beam of which so much was not counted that nobody knows its shape."""
    # Pixels that saturate are few, but hold more than those around them, by which they are filled.
    over = float(beam[saturated].sum() / max(beam.sum(), 1.0))
    if over > LARGEST_LOSS:
        raise BadInput(
            f"The direct beam saturates {int(saturated.sum())} pixels, which hold at least {over:.0%} of it: "
            "attenuate it more, or expose it in several shorter frames."
        )
    share = float(lost.sum() / spot.sum())
    if share > LARGEST_LOSS:
        raise BadInput(f"{share:.0%} of the direct beam falls on masked pixels or a gap; move the beam or mend the mask.")


def _spot(total: NDArray, bad: NDArray) -> NDArray[np.bool_]:
    """Find the pixels of the beam: what stands connected, five deviations above the background and a thousandth of the peak.

    Bad pixels that it encloses belong to it: a core that saturates is no hole.
    """
    smooth, level = _local_mean(total, bad, 5), float(np.median(_local_mean(total, bad, 31)[~bad]))
    noise = np.sqrt(max(level, 0.04) / 25)
    labels: Any = scipy.ndimage.label(smooth - level > max(1e-3 * (smooth.max() - level), 5 * noise))[0]  # pyright: ignore
    spot = labels == labels[np.unravel_index(np.argmax(smooth), smooth.shape)]
    return spot | (bad & np.asarray(scipy.ndimage.binary_fill_holes(spot)))


def _local_mean(total: NDArray, bad: NDArray, size: int) -> NDArray:
    """Mean of the good pixels in a square about each pixel."""
    weight = scipy.ndimage.uniform_filter((~bad).astype(float), size)
    return scipy.ndimage.uniform_filter(total, size) / np.maximum(weight, 1 / size**2)


def _filled(total: NDArray, bad: NDArray) -> NDArray:
    """Give each bad pixel the mean of the nearest good ones: a hole in the beam would be a hole in the operator."""
    filled, unknown = total, bad
    for size in (3, 7, 15, 31):
        near = unknown & (scipy.ndimage.uniform_filter((~bad).astype(float), size) > 0.5 / size**2)
        filled = np.where(near, _local_mean(total, bad, size), filled)
        unknown = unknown & ~near
    return filled


def _background(total: NDArray, bad: NDArray, spot: NDArray) -> float:
    """Mean count of a pixel in the surroundings of the beam."""
    far, near = (np.asarray(scipy.ndimage.binary_dilation(spot, iterations=n)) for n in (20, 3))
    around = np.logical_and.reduce([far, np.logical_not(near), np.logical_not(bad)])
    return float(total[around].mean()) if around.any() else 0.0


def _psf_dataset(beam: NDArray, y: NDArray, x: NDArray, ai: Any, counts: float, centre: tuple[float, float]) -> xr.Dataset:
    scale = 4 * np.pi / (ai.wavelength * 1e9)
    rho = scale * np.sin(0.5 * np.arctan(np.hypot(y[:, None], x) / ai.dist))
    step = scale * 0.5 * ai.pixel1 / ai.dist
    ring = np.rint(rho / step).astype(int)
    sums = np.bincount(ring.ravel(), beam.ravel())
    radius = np.bincount(ring.ravel(), (beam * rho).ravel()) / np.where(sums > 0, sums, 1)
    return xr.Dataset(
        {
            "beam": (("y", "x"), beam, {"units": "1", "long_name": "share of the direct beam in a pixel"}),
            "p": ("rho", sums, {"units": "1", "long_name": "share of the direct beam in a ring (sum, not mean)"}),
            "counts": ((), counts, {"units": "1", "long_name": "counts in the direct beam"}),
            "sigma": (
                (),
                np.sqrt((beam * rho**2).sum() / 2),
                {"units": "1/nm", "long_name": "equivalent Gaussian width, sqrt(<rho^2>/2)"},
            ),
        },
        coords={
            "y": ("y", y, {"units": "m", "long_name": "distance from the beam's centroid, up the rows"}),
            "x": ("x", x, {"units": "m", "long_name": "distance from the beam's centroid, along the columns"}),
            "rho": (
                "rho",
                np.where(sums > 0, radius, step * np.arange(sums.size)),
                {"units": "1/nm", "long_name": "mean radius of a ring"},
            ),
        },
        attrs={
            **dict(zip(("centre_y", "centre_x"), centre, strict=True)),
            **dict(zip(("poni_centre_y", "poni_centre_x"), beam_pixel(ai), strict=True)),
            "distance": float(ai.dist),
            "wavelength": float(ai.wavelength),
        },
    )

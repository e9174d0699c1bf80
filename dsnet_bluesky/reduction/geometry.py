"""Geometry, masks and what a detector's pixels can say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fabio
import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from pyFAI.integrator.azimuthal import AzimuthalIntegrator
from pyFAI.io.ponifile import PoniFile

from dsnet_bluesky.data import BadInput

CENTRE_TOLERANCE = 5e-3
"""In m: a direct beam farther than this from the poni's centre means that one of them is wrong."""

PILATUS_CEILING = 2**20 - 1


def load_poni(path: str | Path) -> dict[str, Any]:
    """Read a .poni file.

    Raises
    ------
    BadInput
        If the file is missing or is no geometry that pyFAI understands.
    """
    try:
        return dict(PoniFile(str(path)).as_dict())
    except Exception as error:
        # pyFAI raises many kinds here: every one means that this is no geometry.
        raise BadInput(f"{path} is not a .poni file that pyFAI can read ({type(error).__name__}: {error}).") from error


def load_mask(path: str | Path) -> NDArray[np.bool_]:
    """Read a mask (anything fabio reads, or .npy); non-zero pixels do not count.

    Raises
    ------
    BadInput
        If the file cannot be read.
    """
    try:
        if Path(path).suffix == ".npy":
            return np.load(path).astype(bool)
        with fabio.open(str(path)) as image:
            return np.asarray(image.data).astype(bool)
    except Exception as error:
        raise BadInput(f"The mask {path} cannot be read ({type(error).__name__}: {error}).") from error


def integrator(poni: Mapping[str, Any]) -> Any:
    """Build pyFAI's azimuthal integrator of a geometry.

    Raises
    ------
    BadInput
        If the geometry lacks a detector, a wavelength or a positive distance.
    """
    try:
        file = PoniFile(dict(poni))
        # What a geometry leaves out is zero, as pyFAI.load has it.
        place = [float(getattr(file, name) or 0.0) for name in ("dist", "poni1", "poni2", "rot1", "rot2", "rot3")]
        ai: Any = AzimuthalIntegrator(*place, detector=file.detector, wavelength=file.wavelength)
    except Exception as error:
        raise BadInput(f"The geometry (poni) is not one that pyFAI understands ({type(error).__name__}: {error}).") from error
    ai.auto_gc = False  # it collects garbage at every change otherwise, as pyFAI.load does: 0.3 s in a large process
    if not ai.wavelength or not 1e-12 < ai.wavelength < 1e-7:
        raise BadInput(f"The geometry (poni) gives the wavelength as {ai.wavelength} m; put the right one, in metres, into it.")
    if not ai.dist > 0:
        raise BadInput(f"The geometry (poni) gives the distance as {ai.dist} m; it must be positive.")
    if ai.detector.shape is None:
        raise BadInput("The geometry (poni) names no detector with a known shape; name one (pyFAI-detectors lists them).")
    return ai


def counts_ceiling(dtype: np.dtype, detector_name: str) -> float:
    """Return the largest value a pixel can hold: a pixel that shows it is not counting.

    Floats are no counters: they hold sums or processed frames, without a ceiling.
    """
    if not np.issubdtype(dtype, np.integer):
        return np.inf
    return float(PILATUS_CEILING if "pilatus" in detector_name.lower() else np.iinfo(dtype).max)


def invalid_pixels(frames: NDArray, detector_name: str) -> NDArray[np.bool_]:
    """Find pixels that hold no count: NaN, negative (gaps) or at the counter's ceiling."""
    return ~np.isfinite(frames) | (frames < 0) | (frames >= counts_ceiling(frames.dtype, detector_name))


def sum_frames(frames: NDArray, number: int, detector_name: str) -> NDArray:
    """Sum each `number` frames of one exposure; a pixel that fails in one of them is -1 in the sum.

    Parameters
    ----------
    frames
        Counts, shape (exposure * number, y, x).
    number
        Frames of an exposure.
    detector_name
        As in the geometry, see `counts_ceiling`.

    Returns
    -------
    ndarray
        Shape (exposure, y, x).
    """
    if number == 1:
        return frames
    grouped = frames.reshape(-1, number, *frames.shape[1:])
    return np.where(invalid_pixels(grouped, detector_name).any(axis=1), -1, grouped.sum(axis=1, dtype=float))


def centred(poni: Mapping[str, Any], direct_beam: xr.Dataset) -> dict[str, Any]:
    """Return the geometry, corrected by how far the direct beam was found from where its own geometry puts it.

    Parameters
    ----------
    poni
        Geometry of the sample's exposure; the detector may have been moved since the direct beam.
    direct_beam
        Dataset of `psf`.

    Raises
    ------
    BadInput
        If the direct beam is more than 5 mm from where its geometry puts it.
    """
    ai = integrator(poni)
    attrs = direct_beam.attrs
    rows, columns = (float(attrs[f"centre_{axis}"]) - float(attrs[f"poni_centre_{axis}"]) for axis in "yx")
    shift = np.hypot(rows * ai.pixel1, columns * ai.pixel2)
    if shift > CENTRE_TOLERANCE:
        raise BadInput(
            f"The direct beam is at pixel ({attrs['centre_y']:.1f}, {attrs['centre_x']:.1f}), but its geometry (poni) puts it "
            f"at ({attrs['poni_centre_y']:.1f}, {attrs['poni_centre_x']:.1f}), {shift * 1e3:.1f} mm away. One of them is wrong: "
            "check that the direct beam and the geometry belong to the same detector position."
        )
    # Along each axis, poni counts with or against the pixels: that depends on the detector's orientation.
    first, second, _ = ai.detector.calc_cartesian_positions(np.array([0.5, 1.5]), np.array([0.5, 1.5]), center=False)
    ai.poni1 += rows * float(np.diff(first)[0])
    ai.poni2 += columns * float(np.diff(second)[0])
    return dict(ai.get_config())


def beam_pixel(ai: Any) -> tuple[float, float]:
    """Where a geometry puts the beam: (row, column) at which the detector's plane crosses it."""
    row, column = pixels_hit(ai, (1.0, 0.0, 0.0))
    return float(row), float(column)


def across_beam(ai: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the pixels lie across the beam, along the detector's rows and columns as the pixels of a PSF do.

    In the axes of the laboratory a beam that is no disc would lie another way: rot3 and the orientation turn and mirror
    the detector in them.

    Parameters
    ----------
    ai
        From `integrator`.

    Returns
    -------
    tuple of ndarray
        Offsets from the beam in m, in the plane normal to it at the sample's distance, growing with the number of
        the row, and of the column; each of the detector's shape.
    """
    z, *seen = ai.calc_pos_zyx(corners=False)
    place = np.stack([axis / z for axis in seen], axis=-1) * ai.dist
    rows, columns = _plane(ai)[1][1:].T
    down = rows / np.linalg.norm(rows)
    across = np.array([-down[1], down[0]])
    return place @ down, place @ (across * np.sign(across @ columns))


def pixels_hit(ai: Any, directions: ArrayLike) -> NDArray[np.float64]:
    """Where rays from the sample meet the plane of a flat detector.

    Parameters
    ----------
    ai
        From `integrator`.
    directions
        Of the rays, of any length, shape (..., 3): along the beam (z), y and x of the laboratory.

    Returns
    -------
    ndarray
        Row and column, shape (..., 2), also beyond the detector's edges; NaN where a ray goes away from the plane.
    """
    corner, steps = _plane(ai)
    normal = np.cross(*steps.T)
    rays = np.asarray(directions, dtype=float)
    with np.errstate(divide="ignore"):
        reach = (normal @ corner) / (rays @ normal)
    places = np.where(reach > 0, reach, np.nan)[..., None] * rays - corner
    return places @ np.linalg.pinv(steps).T + 0.5


def _plane(ai: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the first pixel's place and the steps from row to row and from column to column, as (z, y, x): (3,) and (3, 2)."""
    corner, down, across = np.stack(ai.calc_pos_zyx(d1=np.array([0.0, 1e3, 0.0]), d2=np.array([0.0, 0.0, 1e3])), axis=-1)
    return corner, np.stack([down - corner, across - corner], axis=-1) / 1e3


def check_shape(frames: NDArray, ai: Any) -> None:
    """Refuse frames (..., y, x) that are not of the geometry's detector."""
    if frames.shape[-2:] != tuple(ai.detector.shape):
        raise BadInput(
            f"The frames have {frames.shape[-2]} x {frames.shape[-1]} pixels; the geometry (poni) is of a detector "
            f"({ai.detector.name}) with {ai.detector.shape[0]} x {ai.detector.shape[1]}. Give the poni of this detector."
        )


def static_mask(ai: Any, mask: NDArray | None) -> NDArray[np.bool_]:
    """Join a mask with the detector's own."""
    shape = tuple(ai.detector.shape)
    own = ai.detector.mask
    total = np.zeros(shape, dtype=bool) if own is None else np.asarray(own, dtype=bool)
    if mask is None:
        return total
    if mask.shape != shape:
        raise BadInput(
            f"The mask has {mask.shape[0]} x {mask.shape[1]} pixels, the detector {shape[0]} x {shape[1]}; give one that fits."
        )
    return total | np.asarray(mask, dtype=bool)


def divisors(count: int, *, time: ArrayLike, monitor: ArrayLike, transmission: ArrayLike) -> NDArray[np.float64]:
    """What the counts of exposures are divided by, shape (count,).

    Raises
    ------
    BadInput
        If one of them is not positive.
    """
    total = np.ones(count)
    for name, value in (("exposure time", time), ("monitor", monitor), ("transmission", transmission)):
        array = np.asarray(value, dtype=float)
        if not np.isfinite(array).all() or (array <= 0).any():
            raise BadInput(f"The {name} must be positive; it is {value}.")
        total = total * array
    return total

"""From frames to curves and from direct beams to smearing operators, with pyFAI.

pyFAI's geometry and its sparse integration matrix do the work; the variance is
kept exact (Poisson counts through the same matrix), because bins with few counts
decide how well a curve can be desmeared.

The geometry is a plain dict in pyFAI's own words (``ai.get_config()``, the content
of a .poni file), called `poni` everywhere. Masks are True where a pixel does not
count. Pixel coordinates are pyFAI's: the centre of pixel (row, column) is at
(row + 0.5, column + 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fabio
import numpy as np
import scipy.ndimage
import scipy.sparse
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from pyFAI.integrator.azimuthal import AzimuthalIntegrator
from pyFAI.io.ponifile import PoniFile

from .data import BadInput, curve
from .smearing import Smearing

__all__ = ["Reduction", "centred", "counts_ceiling", "invalid_pixels", "load_mask", "load_poni", "psf", "sum_frames"]

METHOD = ("no", "csr", "cython")
"""Pixels are not split between bins: splitting correlates neighbouring points."""

CENTRE_TOLERANCE = 5e-3
"""In m: a direct beam farther than this from the poni's centre means that one of them is wrong."""

MINIMUM_BEAM_COUNTS = 1e4
"""Fewer counts in the direct beam make the operator itself too noisy to use."""

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
        angles = (file.rot1, file.rot2, file.rot3)
        ai: Any = AzimuthalIntegrator(
            file.dist, file.poni1, file.poni2, *angles, detector=file.detector, wavelength=file.wavelength
        )
    except Exception as error:
        raise BadInput(f"The geometry (poni) is not one that pyFAI understands ({type(error).__name__}: {error}).") from error
    ai.auto_gc = False  # it collects garbage at every change otherwise, as pyFAI.load does: 0.3 s in a large process
    if not ai.wavelength or not 1e-12 < ai.wavelength < 1e-8:
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


def _beam_pixel(ai: Any) -> tuple[float, float]:
    """Where a geometry puts the beam: (row, column) at which the detector's plane crosses it."""
    # The plane is flat: three of its pixels give the way from (row, column) to the laboratory and back.
    rows, columns = np.array([0.0, 1000.0, 0.0]), np.array([0.0, 0.0, 1000.0])
    _, y, x = ai.calc_pos_zyx(d1=rows, d2=columns)
    steps = np.array([[p[1] - p[0], p[2] - p[0]] for p in (y, x)]) / 1000
    row, column = np.linalg.solve(steps, -np.array([y[0], x[0]])) + 0.5
    return float(row), float(column)


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
    _check_shape(stack, ai)
    bad = invalid_pixels(stack, ai.detector.name).any(axis=0) | _static_mask(ai, mask)
    total = np.where(bad, 0.0, stack.sum(axis=0, dtype=float))
    _check_mask(stack, ai, bad)
    _check_counts(total, bad, minimum_counts)
    spot = _spot(total, bad)
    _check_spot(spot)
    rows, columns = scipy.ndimage.find_objects(spot.astype(int))[0]
    background = _background(total, bad, spot)
    beam = np.where(spot, _filled(total, bad) - background, 0.0)[rows, columns]
    lost = float((bad & spot).sum() / spot.sum())
    if lost > 0.05:
        raise BadInput(f"{lost:.0%} of the direct beam falls on masked pixels or a gap; move the beam or mend the mask.")
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


def _spot(total: NDArray, bad: NDArray) -> NDArray[np.bool_]:
    """Find the pixels of the beam: what stands connected, five deviations above the background and a thousandth of the peak."""
    smooth, level = _local_mean(total, bad, 5), float(np.median(_local_mean(total, bad, 31)[~bad]))
    noise = np.sqrt(max(level, 0.04) / 25)
    labels: Any = scipy.ndimage.label(smooth - level > max(1e-3 * (smooth.max() - level), 5 * noise))[0]  # pyright: ignore
    return labels == labels[np.unravel_index(np.argmax(smooth), smooth.shape)]


def _local_mean(total: NDArray, bad: NDArray, size: int) -> NDArray:
    """Mean of the good pixels in a square about each pixel."""
    weight = scipy.ndimage.uniform_filter((~bad).astype(float), size)
    return scipy.ndimage.uniform_filter(total, size) / np.maximum(weight, 1 / size**2)


def _filled(total: NDArray, bad: NDArray) -> NDArray:
    """Give each bad pixel the mean of its good neighbours: a hole in the beam would be a hole in the operator."""
    return np.where(bad, _local_mean(total, bad, 3), total)


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
            **dict(zip(("poni_centre_y", "poni_centre_x"), _beam_pixel(ai), strict=True)),
            "distance": float(ai.dist),
            "wavelength": float(ai.wavelength),
        },
    )


def _check_shape(frames: NDArray, ai: Any) -> None:
    if frames.shape[-2:] != tuple(ai.detector.shape):
        raise BadInput(
            f"The frames have {frames.shape[-2]} x {frames.shape[-1]} pixels; the geometry (poni) is of a detector "
            f"({ai.detector.name}) with {ai.detector.shape[0]} x {ai.detector.shape[1]}. Give the poni of this detector."
        )


def _static_mask(ai: Any, mask: NDArray | None) -> NDArray[np.bool_]:
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


class Reduction:
    """Azimuthal integration of one geometry, mask and binning; prepared once, used for many frames.

    Parameters
    ----------
    poni
        Geometry, see the module.
    mask
        True where a pixel does not count; the detector's own mask is added.
    bins
        Number of q bins of equal width; bins without a pixel are left out.
    q_min, q_max
        Range in 1/nm; by default all that the unmasked detector sees.
    sector
        Azimuth (from, to) in degrees; by default the full circle.
    flat
        Relative sensitivity of the pixels.
    dark
        Counts per pixel to subtract from each frame.
    polarisation
        Polarisation factor as pyFAI takes it, None for no correction.

    Attributes
    ----------
    q : ndarray
        Centres of the bins in 1/nm, shape (n,).
    bins : ndarray
        For each pixel (flattened) the index into `q`, -1 where it does not count.

    Raises
    ------
    BadInput
        If the geometry cannot be used or the mask leaves nothing.
    """

    def __init__(
        self,
        poni: Mapping[str, Any],
        *,
        mask: NDArray | None = None,
        bins: int = 500,
        q_min: float | None = None,
        q_max: float | None = None,
        sector: tuple[float, float] | None = None,
        flat: NDArray | None = None,
        dark: NDArray | None = None,
        polarisation: float | None = None,
    ) -> None:
        self.poni = dict(poni)
        self._ai = integrator(poni)
        shape = tuple(self._ai.detector.shape)
        masked = _static_mask(self._ai, mask)
        if masked.all():
            raise BadInput("The mask leaves no pixel of the detector; check that it is not inverted (True means masked).")
        self.mask = masked
        radial = None if q_min is None and q_max is None else (q_min or 0.0, q_max or float(self._q_map().max()))
        result = self._ai.integrate1d(
            np.zeros(shape, dtype=np.float32),
            bins,
            unit="q_nm^-1",
            method=METHOD,
            mask=masked,
            radial_range=radial,
            azimuth_range=sector,
        )
        engine = next(reversed(self._ai.engines.values())).engine
        matrix = scipy.sparse.csr_array((engine.data, engine.indices, engine.indptr), shape=(bins, masked.size))
        filled = np.diff(matrix.indptr) > 0
        if filled.sum() < 5:
            raise BadInput(
                f"Only {int(filled.sum())} q bins hold an unmasked pixel; widen the range or the sector, or mend the mask."
            )
        self.q = np.asarray(result.radial, dtype=float)[filled]
        self._matrix = matrix[np.flatnonzero(filled)].astype(float)
        self.bins = np.full(masked.size, -1)
        self.bins[self._matrix.indices] = np.repeat(np.arange(self.q.size), np.diff(self._matrix.indptr))
        self._dark = np.zeros(masked.size) if dark is None else _pixels(dark, shape, "dark")
        self._normalisation = self._pixel_normalisation(flat, polarisation)
        self._norm = self._matrix @ self._normalisation

    def __repr__(self) -> str:
        return f"<Reduction {self._ai.detector.name}: {self.q.size} bins, q {self.q[0]:.4g} to {self.q[-1]:.4g} 1/nm>"

    def __call__(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Reduce exposures to curves.

        Parameters
        ----------
        frames
            Counts, shape (exposure, y, x) or (y, x).
        time, monitor, transmission
            What to divide by, scalars or shape (exposure,). An exposure's time in s.

        Returns
        -------
        xarray.Dataset
            A curve with dims (exposure, q); I in counts per pixel (at normal
            incidence), per unit of time, monitor and transmission. A bin without
            any count gets the Idev of one count: nothing seen is not certainty.

        Raises
        ------
        BadInput
            If the frames do not fit the detector, a frame holds no valid pixel, or
            a divisor is not positive.
        """
        stack = np.atleast_3d(np.asarray(frames).T).T
        _check_shape(stack, self._ai)
        divisor = np.broadcast_to(
            _positive(time, "exposure time") * _positive(monitor, "monitor") * _positive(transmission, "transmission"),
            (len(stack),),
        )
        intensity, variance = np.empty((len(stack), self.q.size)), np.empty((len(stack), self.q.size))
        for i, frame in enumerate(stack):
            intensity[i], variance[i] = self._integrate(frame, i)
        return curve(self.q, intensity / divisor[:, None], np.sqrt(variance) / divisor[:, None], units="1")

    def smearing(self, direct_beam: xr.Dataset, *, per_bin: int = 256, spread: float = 0.0) -> Smearing:
        """Build the operator that smears what this reduction sees.

        Parameters
        ----------
        direct_beam
            Dataset of `psf`.
        per_bin
            Pixels used of each bin, see `Smearing.pixel_coverage`.
        spread
            Standard deviation of the wavelength over its mean; 0 for none.

        Returns
        -------
        Smearing
            On `self.q`.
        """
        z, y, x = self._ai.calc_pos_zyx(corners=False)
        beam = Smearing.pixel_coverage(
            self.q,
            y / z * self._ai.dist,
            x / z * self._ai.dist,
            direct_beam["beam"].values,
            direct_beam["y"].values,
            direct_beam["x"].values,
            distance=float(self._ai.dist),
            wavelength=float(self._ai.wavelength) * 1e9,
            bins=self.bins.reshape(self.mask.shape),
            per_bin=per_bin,
        )
        return beam @ Smearing.wavelength(beam.q_calc, spread) if spread else beam

    def _integrate(self, frame: NDArray, number: int) -> tuple[NDArray, NDArray]:
        """Intensity and its variance, per pixel, of one frame."""
        counts = frame.ravel().astype(float)
        lost = invalid_pixels(frame, self._ai.detector.name).ravel() & (self.bins >= 0)
        norm = self._norm
        if lost.any():
            counts, norm = np.where(lost, self._dark, counts), self._matrix @ np.where(lost, 0.0, self._normalisation)
            self._check_losses(frame, lost, norm, number)
        intensity = self._matrix @ (counts - self._dark) / norm
        # One count at least: the variance of an empty bin is not zero.
        variance = np.maximum(self._matrix.power(2) @ np.where(lost, 0.0, counts), 1.0) / norm**2
        return intensity, variance

    def _check_losses(self, frame: NDArray, lost: NDArray, norm: NDArray, number: int) -> None:
        share = lost.sum() / (self.bins >= 0).sum()
        if share > 0.5:
            what = "NaN" if np.isnan(frame).any() else "negative or saturated"
            raise BadInput(
                f"{share:.0%} of the unmasked pixels of exposure {number} are {what}: the frame holds no usable image."
            )
        if (norm <= 0).any():
            q = self.q[np.argmax(norm <= 0)]
            raise BadInput(
                f"Exposure {number} has no valid pixel left in {int((norm <= 0).sum())} q bins (first at {q:.4g} 1/nm): "
                "put its gaps, hot pixels and saturated pixels into the mask."
            )

    def _pixel_normalisation(self, flat: NDArray | None, polarisation: float | None) -> NDArray:
        shape = self.mask.shape
        factor = np.asarray(self._ai.solidAngleArray(shape), dtype=float).ravel()
        if polarisation is not None:
            factor = factor * np.asarray(self._ai.polarization(shape, polarisation)).ravel()
        return factor if flat is None else factor * _pixels(flat, shape, "flat")

    def _q_map(self) -> NDArray:
        return np.asarray(self._ai.qArray(self.mask.shape))


def _pixels(image: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray:
    array = np.asarray(image, dtype=float)
    if array.shape != shape or not np.isfinite(array).all():
        raise BadInput(f"The {name} must be finite with {shape[0]} x {shape[1]} pixels; it has shape {array.shape}.")
    return array.ravel()


def _positive(value: ArrayLike, name: str) -> NDArray:
    array = np.asarray(value, dtype=float)
    if not np.isfinite(array).all() or (array <= 0).any():
        raise BadInput(f"The {name} must be positive; it is {value}.")
    return array

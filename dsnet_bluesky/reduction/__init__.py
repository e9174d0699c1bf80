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
from typing import Any

import numpy as np
import scipy.sparse
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.smearing import Smearing

from .direct_beam import MINIMUM_BEAM_COUNTS, psf
from .geometry import (
    across_beam,
    centred,
    check_shape,
    divisors,
    integrator,
    invalid_pixels,
    load_mask,
    load_poni,
    static_mask,
    sum_frames,
)

__all__ = [
    "MINIMUM_BEAM_COUNTS",
    "Reduction",
    "centred",
    "integrator",
    "invalid_pixels",
    "load_mask",
    "load_poni",
    "psf",
    "sum_frames",
]

METHOD = ("no", "csr", "cython")
"""Pixels are not split between bins: splitting correlates neighbouring points."""


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
        Azimuth (from, to) in degrees, counterclockwise from the one to the other, also across 180; by default the full circle.
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
        masked = static_mask(self._ai, mask)
        if masked.all():
            raise BadInput("The mask leaves no pixel of the detector; check that it is not inverted (True means masked).")
        self.mask = masked
        radial = None if q_min is None and q_max is None else (q_min or 0.0, q_max or float(self._q_map().max()))
        result = self._ai.integrate1d(
            np.zeros(shape, dtype=np.float32),
            bins,
            unit="q_nm^-1",
            method=METHOD,
            mask=masked | self._beyond(q_min, q_max, sector),
            radial_range=radial,
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
        check_shape(stack, self._ai)
        divisor = divisors(len(stack), time=time, monitor=monitor, transmission=transmission)
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
        y, x = across_beam(self._ai)
        beam = Smearing.pixel_coverage(
            self.q,
            y,
            x,
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

    def _beyond(self, q_min: float | None, q_max: float | None, sector: tuple[float, float] | None) -> NDArray[np.bool_]:
        """Find the pixels outside the range and the sector: pyFAI's first bin reaches below its range, azimuths end at 180."""
        beyond = np.zeros(self.mask.shape, dtype=bool)
        if q_min is not None or q_max is not None:
            q = self._q_map()
            beyond |= (q < (q_min or 0.0)) | (q > (np.inf if q_max is None else q_max))
        if sector is not None:
            first, last = sector
            width = last - first if last > first else (last - first) % 360.0
            beyond |= (np.degrees(self._ai.chiArray(self.mask.shape)) - first) % 360.0 > width
        return beyond

    def _q_map(self) -> NDArray:
        return np.asarray(self._ai.qArray(self.mask.shape))


def _pixels(image: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray:
    array = np.asarray(image, dtype=float)
    if array.shape != shape or not np.isfinite(array).all():
        raise BadInput(f"The {name} must be finite with {shape[0]} x {shape[1]} pixels; it has shape {array.shape}.")
    return array.ravel()

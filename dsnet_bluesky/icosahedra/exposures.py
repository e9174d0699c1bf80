"""From the frames of an instrument to sizes and orientations.

A flat detector sees equal steps of the tangent of the scattering angle, pixels far from the beam look smaller from the particle,
and the beam is where it is. A model wants equal steps of the transverse q about the beam, and intensities per solid angle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput, describe, join_answers
from dsnet_bluesky.reduction.geometry import check_shape, divisors, integrator, invalid_pixels, pixels_hit, static_mask
from dsnet_bluesky.versions import load_model

from .images import VIEWS
from .model import Icosahedra

__all__ = ["PreparedImages"]

WAVELENGTH_TOLERANCE = 0.01
"""By how much a wavelength may differ from the model's: sizes follow the true one, absorption and depth do not."""

REACH = 0.6
"""Part of the model's detector that an instrument must see: the smallest that images of training were cropped to."""

FINEST = 8
"""Points along a pixel of the model's grid, at the most, at which the frame is read."""

LEAST = 0.5
"""Part of a pixel of the grid that unmasked pixels of the frame must cover."""


class PreparedImages:
    """Ready for any number of images of one instrument.

    Parameters
    ----------
    poni
        Geometry in pyFAI's words, see `dsnet_bluesky.reduction`; it says where the beam is.
    mask
        True where a pixel does not count; the detector's own mask is added.
    model
        Which model answers, ``"icosahedra:1.0.0"``.
    device
        Any device of torch.
    views
        See `Icosahedra`.
    polarisation
        Factor as pyFAI takes it; 0 is a beam without polarisation, None leaves images as they are.

    Attributes
    ----------
    model : versions.Model
        Which answers.
    detector : multislice.Detector
        The model's grid.

    Raises
    ------
    BadInput
        If the model is of another kind, the geometry cannot be used, the detector is not flat or does not reach far enough, the
        wavelength is not the model's, or the mask leaves nothing.
    """

    def __init__(
        self,
        poni: Mapping[str, Any],
        mask: NDArray | None,
        *,
        model: str,
        device: str = "cpu",
        views: int = VIEWS,
        polarisation: float | None = 0.0,
    ) -> None:
        self._reader = Icosahedra(load_model(model), device, views=views)
        self.model, self.detector = self._reader.model, self._reader.simulator.detector
        self._ai = integrator(poni)
        self._check_wavelength()
        self._matrix = self._resampling()
        self._counting = ~static_mask(self._ai, mask).ravel()
        if not self._seen(self._counting).any():
            raise BadInput("The mask leaves no pixel on the model's grid; check that it is not inverted (True means masked).")
        shape = tuple(self._ai.detector.shape)
        self._factor = np.asarray(self._ai.solidAngleArray(shape), dtype=float).ravel()
        if polarisation is not None:
            self._factor = self._factor * np.asarray(self._ai.polarization(shape, polarisation)).ravel()

    def reduce(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Bring frames to the grid of the model.

        Parameters
        ----------
        frames
            Counts, shape (exposure, y, x) or (y, x).
        time, monitor, transmission
            What to divide by, scalars or shape (exposure,).

        Returns
        -------
        xarray.Dataset
            `image`, dims (exposure, qy, qx): mean counts of the pixels there, as at normal incidence and without polarisation,
            NaN where masked or outside of the detector. `qy` and `qx` in 1/nm run along pyFAI's y and x of the laboratory.

        Raises
        ------
        BadInput
            If the frames do not fit the detector, or a divisor is not positive.
        """
        stack = np.atleast_3d(np.asarray(frames).T).T
        check_shape(stack, self._ai)
        divisor = divisors(len(stack), time=time, monitor=monitor, transmission=transmission)
        images = np.stack([self._image(frame) for frame in stack]) / divisor[:, None, None]
        axis = {"units": "1/nm"}
        return describe(
            xr.Dataset(
                {"image": (("exposure", "qy", "qx"), images, {"units": "1"})},
                coords={"qy": ("qy", self.detector.q, axis), "qx": ("qx", self.detector.q, axis)},
            )
        )

    def answer(self, reduced: xr.Dataset) -> xr.Dataset:
        """Read size and orientation from what `reduce` gives.

        Returns
        -------
        xarray.Dataset
            As `Icosahedra` returns it, the orientations in the coordinates of pyFAI's laboratory: x, y, and z along the beam.
            Among others, an exposure without a usable pixel has the status "failed" and holds NaN; the attribute ``failures``
            says why, as JSON.

        Raises
        ------
        BadInput
            If no exposure holds a usable pixel.
        """
        images = reduced["image"].transpose("exposure", "qy", "qx").values
        usable = np.asarray((images > 0).any(axis=(1, 2)))  # NaN is not above 0
        found = self._reader(images[usable]) if usable.any() else xr.Dataset()
        rows = itertools.count()
        empty = BadInput("The image holds no unmasked pixel with a positive count: nothing was hit, or the mask covers it.")
        return join_answers([found.isel(exposure=[next(rows)]) if one else empty for one in usable.tolist()])

    def _check_wavelength(self) -> None:
        wavelength, expected = float(self._ai.wavelength) * 1e9, self.detector.wavelength
        if abs(wavelength / expected - 1) > WAVELENGTH_TOLERANCE:
            raise BadInput(
                f"The geometry (poni) gives the wavelength as {wavelength:.4g} nm; {self.model.reference} reads images at "
                f"{expected:g} nm. Put the right one, in metres, into it, or train a model for yours."
            )

    def _resampling(self) -> scipy.sparse.csr_array:
        """Weights that take a frame to the grid, shape (qy * qx, y * x): linear between pixels, then the mean over a cell."""
        step, pixels = self.detector.step, self.detector.pixels
        k = 2e-9 * math.pi / float(self._ai.wavelength)
        pitch = step / k * float(self._ai.dist) / max(self._ai.pixel1, self._ai.pixel2)
        fine = int(np.clip(math.ceil(2 * pitch), 1, FINEST))
        inside = (np.arange(fine) + 0.5) / fine - 0.5
        cells = np.arange(pixels * pixels).reshape(pixels, pixels)
        matrix = scipy.sparse.csr_array((pixels * pixels, math.prod(self._ai.detector.shape)))
        for part in inside:
            y = np.add.outer(self.detector.q + part * step, np.zeros(pixels * fine)) / k
            x = np.tile(np.add.outer(self.detector.q, inside * step).ravel() / k, (pixels, 1))
            places = pixels_hit(self._ai, np.stack([np.sqrt(1 - x**2 - y**2), y, x], axis=-1))
            matrix = matrix + self._weights(places.reshape(-1, 2), np.repeat(cells, fine, axis=1).ravel()) / fine**2
        self._check_reach(matrix)
        return matrix

    def _weights(self, places: NDArray[np.float64], cells: NDArray[np.int64]) -> scipy.sparse.csr_array:
        """Weights of the four pixels around each place (row, column), for the cells of the grid that want them."""
        rows, columns = self._ai.detector.shape
        first = np.floor(np.nan_to_num(places - 0.5, nan=-10.0)).astype(int)
        beyond = places - 0.5 - first
        parts = []
        for down, across in np.ndindex(2, 2):
            row, column = first[:, 0] + down, first[:, 1] + across
            weight = np.abs(1 - down - beyond[:, 0]) * np.abs(1 - across - beyond[:, 1])
            on = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            parts.append((weight[on], cells[on], (row * columns + column)[on]))
        weight, cell, pixel = (np.concatenate(column) for column in zip(*parts, strict=True))
        return scipy.sparse.coo_array((weight, (cell, pixel)), shape=(self.detector.pixels**2, rows * columns)).tocsr()

    def _check_reach(self, matrix: scipy.sparse.csr_array) -> None:
        if not getattr(self._ai.detector, "IS_FLAT", True):
            raise BadInput(f"The detector ({self._ai.detector.name}) is not flat; bring its images to the model's grid yourself.")
        covered = matrix.sum(axis=1).reshape(self.detector.pixels, -1) > LEAST
        needed = np.abs(self.detector.q) < REACH * self.detector.q[-1]
        if not covered[np.ix_(needed, needed)].all():
            angle = math.degrees(math.asin(REACH * self.detector.q[-1] / self.detector.wave_number))
            raise BadInput(
                f"The detector sees {covered.mean():.0%} of the model's image; it must reach {angle:.0f} degrees on all sides of "
                "the beam. Check the distance and the beam (poni), or move the detector nearer."
            )

    def _seen(self, counting: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Part of each pixel of the grid that pixels of the frame cover, 0 where it is too little, shape (qy * qx,)."""
        share = self._matrix @ counting.astype(float)
        return np.where(share > LEAST, share, 0.0)

    def _image(self, frame: NDArray) -> NDArray[np.float64]:
        """Average a frame's counts over the pixels of the grid, shape (qy, qx)."""
        counting = self._counting & ~invalid_pixels(frame, self._ai.detector.name).ravel()
        share = self._seen(counting)
        sums = self._matrix @ np.where(counting, frame.ravel() / self._factor, 0.0)
        image = np.divide(sums, share, out=np.full(share.shape, np.nan), where=share > 0)
        return image.reshape(self.detector.pixels, -1)

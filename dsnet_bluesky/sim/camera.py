"""Physics of a simulated pinhole SAXS camera: slits, sample, beamstop, counting detector.

A frame of the sample is the ideal pattern convolved, in the detector plane and
in two dimensions, with the image of the direct beam; both are drawn on a grid
finer than the pixels, and only then counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyFAI.detectors
from numpy.typing import ArrayLike, NDArray
from scipy.signal import oaconvolve
from scipy.special import erf

from .samples import Sample

__all__ = ["PAPER_SLITS", "SaxsCamera", "Setting", "SlitSetting"]


@dataclass(frozen=True)
class SlitSetting:
    """A slit configuration of the paper: opening in m, exposure in s, flux in photons/s."""

    width: float
    height: float
    time: float
    flux: float

    @property
    def label(self) -> str:
        """The opening as people say it, in mm."""
        return f"{self.width * 1e3:.1f} x {self.height * 1e3:.1f} mm"


PAPER_SLITS = (
    SlitSetting(4.0e-3, 2.5e-3, 60.0, 1e8),
    SlitSetting(2.5e-3, 1.4e-3, 100.0, 0.6e8),
    SlitSetting(1.6e-3, 0.9e-3, 250.0, 0.24e8),
    SlitSetting(0.8e-3, 0.5e-3, 2500.0, 0.024e8),
)
"""Table 3 of the DSNet paper: exposures chosen so that the photons stay equal."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides how many photons a second each pixel receives."""

    sample: Sample | None
    """What is in the beam; None for nothing."""

    slit_width: float
    """Opening along x in m."""

    slit_height: float
    """Opening along y in m."""

    thickness: float = 1.0
    """Path through the sample, relative to its full thickness."""

    attenuation: float = 1.0
    """Factor by which the attenuator weakens the beam; 1 for none."""

    beamstop: float = 0.0
    """Radius of the beamstop in m; 0 is out of the beam."""


class SaxsCamera:
    """A pinhole camera with a photon-counting pixel detector.

    At 0.8 m and 0.154 nm a Pilatus 300k sees two orders of silver behenate on
    full rings and the third in its corners. The image of the paper's widest
    slit, 4 mm, covers 0.20 1/nm there, that of its narrowest one 0.04 1/nm;
    the fringes of an 8 nm sphere are 0.39 1/nm apart.

    Parameters
    ----------
    detector
        A detector that pyFAI knows, by its name there.
    distance, wavelength
        In m.
    centre
        Beam centre (y, x) in pixels, moved to the nearest point of the fine
        grid: otherwise direct beam and pattern differ by a fraction of a pixel.
    penumbra
        Standard deviation of the blur of the slits' image, in m.
    air
        Photons that air scatters evenly onto the detector for each one in the beam.
    transmission
        Part of the beam that any sample lets through.
    oversampling
        Points of the fine grid along a pixel.
    hot_pixels
        Number of pixels that always read the counter's ceiling.
    seed
        Of everything that is drawn: the hot pixels and the counts.
    """

    ceiling = 2**20 - 1
    """Largest count of the 20-bit counter."""

    arm_width = 1.2e-3
    """Width in m of the arm that holds the beamstop, from the centre downwards (rising y)."""

    def __init__(
        self,
        detector: str = "Pilatus300k",
        *,
        distance: float = 0.8,
        wavelength: float = 1.54e-10,
        centre: tuple[float, float] = (309.3, 243.4),
        penumbra: float = 1.5e-4,
        air: float = 5e-6,
        transmission: float = 0.7,
        oversampling: int = 3,
        hot_pixels: int = 30,
        seed: int = 0,
    ):
        device = pyFAI.detectors.detector_factory(detector)
        self.detector = detector
        self.distance, self.wavelength = distance, wavelength
        self.penumbra, self.air, self.transmission = penumbra, air, transmission
        self.oversampling = oversampling
        self.gaps: NDArray = np.asarray(device.mask).astype(bool)
        self.shape = self.gaps.shape
        self.pixel: float = device.pixel1
        self.centre = tuple(float((np.floor(c * oversampling) + 0.5) / oversampling) for c in centre)
        self._rng = np.random.default_rng(seed)
        self.hot: NDArray = np.zeros(self.shape, dtype=bool)
        self.hot.flat[self._rng.choice(self.hot.size, hot_pixels, replace=False)] = True
        self.hot &= ~self.gaps
        self._pattern = lru_cache(maxsize=16)(self._compute_pattern)

    @property
    def poni(self) -> dict[str, Any]:
        """Geometry as pyFAI writes it (lengths in m)."""
        y, x = self.centre
        return {
            "poni_version": 2.1,
            "dist": self.distance,
            "poni1": y * self.pixel,
            "poni2": x * self.pixel,
            "rot1": 0.0,
            "rot2": 0.0,
            "rot3": 0.0,
            "detector": self.detector,
            "detector_config": {"orientation": 3},
            "wavelength": self.wavelength,
        }

    def q(self, radius: NDArray) -> NDArray:
        """Scattering vector in 1/nm at a distance from the beam centre on the detector, in m."""
        return 4e-9 * np.pi / self.wavelength * np.sin(0.5 * np.arctan2(radius, self.distance))

    def mask(self, beamstop: float = 0.0) -> NDArray:
        """Pixels not to be used, bool (y, x): gaps, hot pixels, and the beamstop with its arm and a margin of two pixels."""
        return self.gaps | self.hot | self._shadow(beamstop, margin=2 * self.pixel)

    def flux(self, slit_width: float, slit_height: float) -> float:
        """Photons/s through the slits: the paper's at its four openings, a power of the area between them."""
        areas = [s.width * s.height for s in reversed(PAPER_SLITS)]
        fluxes = [s.flux for s in reversed(PAPER_SLITS)]
        return float(np.exp(np.interp(np.log(slit_width * slit_height), np.log(areas), np.log(fluxes))))

    def rate(self, setting: Setting) -> NDArray:
        """Expected counts a second in each pixel, float (y, x); gaps and shadow are zero."""
        flux = self.flux(setting.slit_width, setting.slit_height) / setting.attenuation
        rate = flux * self.air / self.gaps.size * np.ones(self.shape)
        through = 1.0
        if setting.sample is not None:
            through = self.transmission
            pattern = self._pattern(setting.sample, setting.slit_width, setting.slit_height)
            rate += flux * through * setting.thickness * setting.sample.fraction * pattern
        rate += flux * through * self._pattern(None, setting.slit_width, setting.slit_height)
        rate[self.gaps | self._shadow(setting.beamstop)] = 0.0
        return rate

    def frame(self, setting: Setting, time: float) -> NDArray:
        """One exposure of `time` seconds: int32 counts (y, x), -1 in gaps, hot and saturated pixels at the ceiling."""
        counts = np.minimum(self._rng.poisson(self.rate(setting) * time), self.ceiling).astype(np.int32)
        counts[self.hot] = self.ceiling
        counts[self.gaps] = -1
        return counts

    def truth(self, setting: Setting, q: ArrayLike) -> NDArray:
        """Exact curve at q (1/nm): counts a second in a pixel at normal incidence, for a beam without width.

        Scattering by air is part of it, as it is part of the frames.
        """
        flux = self.flux(setting.slit_width, setting.slit_height) / setting.attenuation
        air = flux * self.air / self.gaps.size * np.ones(np.shape(q))
        if setting.sample is None:
            return air
        scattered = flux * self.transmission * setting.thickness * setting.sample.fraction
        share = setting.sample.truth(q) * self.oversampling**2 / self._ideal(setting.sample).sum()
        return scattered * share + air

    def _shadow(self, radius: float, margin: float = 0.0) -> NDArray:
        """Pixels behind a beamstop of that radius and its arm, grown by a margin in m."""
        if radius <= 0:
            return np.zeros(self.shape, dtype=bool)
        y, x = ((np.arange(n) + 0.5 - c) * self.pixel for n, c in zip(self.shape, self.centre, strict=True))
        arm = (np.abs(x)[None, :] < self.arm_width / 2 + margin) & (y[:, None] > 0)
        return (np.hypot(y[:, None], x[None, :]) < radius + margin) | arm

    def _compute_pattern(self, sample: Sample | None, width: float, height: float) -> NDArray:
        """Expected share of the photons (scattered ones, or the beam's where there is no sample) in each pixel."""
        beam = self._beam(width, height)
        reach = (beam.shape[0] // 2 // self.oversampling + 1, beam.shape[1] // 2 // self.oversampling + 1)
        if sample is None:
            y, x = (self._fine_axis(axis, reach[axis]) for axis in (0, 1))
            ideal = np.zeros((y.size, x.size))
            ideal[np.argmin(np.abs(y)), np.argmin(np.abs(x))] = 1.0
        else:
            ideal = self._ideal(sample, reach) / self._ideal(sample).sum()
        return self._into_pixels(np.maximum(oaconvolve(ideal, beam, mode="same"), 0.0), reach)

    def _ideal(self, sample: Sample, reach: tuple[int, int] = (0, 0)) -> NDArray:
        """Unsmeared pattern on the fine grid, `reach` pixels beyond the detector."""
        y, x = (self._fine_axis(axis, reach[axis]) for axis in (0, 1))
        radius = np.hypot(y[:, None], x[None, :])
        # a pixel far from the axis sees a smaller solid angle: cos^3 of the scattering angle
        return sample.truth(self.q(radius)) * (1 + (radius / self.distance) ** 2) ** -1.5

    def _beam(self, width: float, height: float) -> NDArray:
        """Image of the slits on the fine grid, centred in an odd array, with sum 1."""
        step = self.pixel / self.oversampling

        def profile(opening: float) -> NDArray:
            n = int((opening / 2 + 5 * self.penumbra) / step) + 1
            u = np.arange(-n, n + 1) * step
            blur = np.sqrt(2) * self.penumbra
            return erf((u + opening / 2) / blur) - erf((u - opening / 2) / blur)

        beam = np.outer(profile(height), profile(width))
        return beam / beam.sum()

    def _fine_axis(self, axis: int, reach: int) -> NDArray:
        """Distances in m from the beam centre of the fine grid's points, `reach` pixels beyond the detector on both sides."""
        n = self.shape[axis]
        points = (np.arange(-reach * self.oversampling, (n + reach) * self.oversampling) + 0.5) / self.oversampling
        return (points - self.centre[axis]) * self.pixel

    def _into_pixels(self, fine: NDArray, reach: tuple[int, int]) -> NDArray:
        """Sum the fine grid over each pixel of the detector."""
        s = self.oversampling
        inner = fine[reach[0] * s : -reach[0] * s, reach[1] * s : -reach[1] * s]
        return inner.reshape(self.shape[0], s, self.shape[1], s).sum(axis=(1, 3))

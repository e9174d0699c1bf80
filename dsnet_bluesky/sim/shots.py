"""Single-shot images of single particles at wide angles, on a flat detector.

Every exposure is one pulse of the source on one particle, which is gone afterwards. The detector has a hole for the beam that
goes through, and stands where it stands: the beam does not meet it in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider
from scipy.ndimage import map_coordinates

from dsnet_bluesky.icosahedra.multislice import ICOSAHEDRON, WAVELENGTH, Absorption, Detector, Simulator, Solid
from dsnet_bluesky.icosahedra.rotations import random_quaternions

from .devices import FrameSource, SimSaxsDetector

__all__ = ["Particle", "SingleShotCamera", "single_shot_detector"]

Floats = NDArray[np.float64]

FINE = 2.5
"""Points of the grid on which images are simulated, along a step of the models' grid."""


@dataclass(frozen=True)
class Particle:
    """One particle."""

    radius: float
    """In nm."""
    quaternion: tuple[float, float, float, float]
    """Orientation (w, x, y, z)."""
    solid: Solid = ICOSAHEDRON

    @classmethod
    def draw(cls, count: int, seed: int, radii: tuple[float, float] = (35.0, 150.0)) -> list[Self]:
        """Draw icosahedra: radii in nm and orientations, uniformly."""
        sizes = np.random.default_rng(seed).uniform(*radii, count)
        turns = random_quaternions(count, seed).tolist()
        return [cls(float(radius), tuple(turn)) for radius, turn in zip(sizes, turns, strict=True)]


class SingleShotCamera:
    """A detector that sees one particle after another.

    Parameters
    ----------
    particles
        In the order in which they come; after the last one the beam is empty.
    shape, pixel, distance
        Rows and columns; size of the pixels and distance in m.
    centre
        Where the beam meets the detector (y, x) in pixels; the middle of the first pixel is at 0.5.
    hole
        Radius in m of the hole in the detector.
    peak
        Photons that the brightest pixel expects, from and to: where in the focus a particle is hit is drawn for each.
    background
        Photons per pixel that do not come from the particle.
    polarisation
        Of the beam, as pyFAI takes it; 0 is none.
    absorption
        See `Simulator`.
    points
        Of the simulation, along the diameter of a particle.
    seed
        Of the counts.
    """

    def __init__(
        self,
        particles: Sequence[Particle],
        *,
        shape: tuple[int, int] = (400, 420),
        pixel: float = 0.2e-3,
        distance: float = 50e-3,
        centre: tuple[float, float] = (193.3, 216.8),
        hole: float = 1.6e-3,
        peak: tuple[float, float] = (1e6, 1e8),
        background: float = 1.0,
        polarisation: float = 0.0,
        absorption: Absorption = "field",
        points: int = 96,
        seed: int = 0,
    ) -> None:
        self.particles = list(particles)
        self.shape, self.pixel, self.distance, self.centre, self.hole = shape, pixel, distance, centre, hole
        self.peak, self.background, self.polarisation = peak, background, polarisation
        self._simulator = Simulator(detector=self._grid, absorption=absorption, slices=points, points=points)
        self._rng = np.random.default_rng(seed)
        self._coming: Iterator[Particle] = iter(self.particles)

    @property
    def poni(self) -> dict[str, Any]:
        """Geometry as pyFAI writes it (lengths in m)."""
        return {
            "poni_version": 2.1,
            "dist": self.distance,
            "poni1": self.centre[0] * self.pixel,
            "poni2": self.centre[1] * self.pixel,
            "rot1": 0.0,
            "rot2": 0.0,
            "rot3": 0.0,
            "detector": "Detector",
            "detector_config": {"pixel1": self.pixel, "pixel2": self.pixel, "max_shape": list(self.shape), "orientation": 3},
            "wavelength": WAVELENGTH * 1e-9,
        }

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """True at the hole, shape (y, x)."""
        y, x, _ = self._directions
        return np.hypot(y, x) < math.sin(math.atan(self.hole / self.distance))

    def frame(self, setting: Any, time: float) -> NDArray[np.int32]:
        """Take the image of the next particle, int32 counts (y, x); a pulse knows neither settings nor an exposure time."""
        particle = next(self._coming, None)
        peak = math.exp(self._rng.uniform(*np.log(self.peak)))
        scattered = 0.0 if particle is None else peak * self.expected(particle)
        return self._rng.poisson(np.where(self.mask, 0.0, scattered + self.background)).astype(np.int32)

    def expected(self, particle: Particle) -> Floats:
        """Relative number of photons that each pixel expects of a particle, 1 in the brightest, shape (y, x)."""
        y, x, z = self._directions
        grid = self._grid
        places = [part * grid.wave_number / grid.step + (grid.pixels - 1) / 2 for part in (y, x)]
        # Of logarithms: the intensity spans many decades, and its fringes are narrow.
        image = np.exp(map_coordinates(np.log(self._image(particle)), places, order=3, mode="nearest"))
        polarised = 0.5 * (1 + z**2 - self.polarisation * (x**2 - y**2))
        expected = image * z**3 * polarised
        return expected / expected.max()

    def _image(self, particle: Particle) -> Floats:
        """Simulate |F|^2 in nm^6 on equal steps of the transverse q."""
        simulator = replace(self._simulator, solid=particle.solid)
        return simulator(torch.tensor([particle.radius]), torch.tensor([particle.quaternion]))[0].double().numpy()

    @cached_property
    def _directions(self) -> tuple[Floats, Floats, Floats]:
        """Unit vectors (y, x, z) from the particle to the pixels, shape (y, x) each."""
        y, x = ((np.arange(n) + 0.5 - c) * self.pixel / self.distance for n, c in zip(self.shape, self.centre, strict=True))
        z = 1 / np.sqrt(1 + np.add.outer(y**2, x**2))
        return y[:, None] * z, x * z, z

    @cached_property
    def _grid(self) -> Detector:
        """Fine grid that reaches as far as the detector does along its sides."""
        y, x, _ = self._directions
        reach = 1.02 * max(np.abs(y).max(), np.abs(x).max())
        pixels = 2 * math.ceil(FINE * reach / Detector().step * Detector().wave_number)
        return Detector(pixels, math.degrees(math.asin(reach)))


def single_shot_detector(directory: Path | str, camera: SingleShotCamera, name: str = "camera") -> SimSaxsDetector:
    """Give an ophyd-async detector that writes the images of a camera into HDF5 files.

    Parameters
    ----------
    directory
        For the files; must exist.
    camera
        The physics.
    name
        Of the detector.
    """

    async def nothing() -> None:
        """What the devices stand at: there are none."""

    provider = StaticPathProvider(UUIDFilenameProvider(), Path(directory).absolute())
    return SimSaxsDetector(FrameSource(camera, nothing), provider, name=name)

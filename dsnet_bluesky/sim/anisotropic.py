"""Weak anisotropic patterns: oriented ellipsoids and the arcs of their stacking, with photons only.

Every pattern is even in q by construction, so it has Friedel's symmetry exactly. Parameters are
drawn from bands of the ellipsoids' radius that belong to training, validation or test alone: no denoiser is judged
on a particle that it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import roots_hermitenorm

__all__ = ["AnisotropicScan", "OrientedEllipsoids", "Split"]

Floats = NDArray[np.float64]
Split = Literal["training", "validation", "test"]

RADII = (4.0, 9.0)
"""Range of the equatorial radius in nm."""

BANDS: dict[Split, tuple[int, ...]] = {"training": (0, 2, 4, 5, 7, 9, 11), "validation": (1, 6), "test": (3, 8, 10)}
"""Of twelve equal bands of the radius, those of each split."""

WAVELENGTH = 1e-10
PIXEL = 172e-6
DISTANCE = 0.72
"""In m: a pixel is 0.015 1/nm wide."""


@dataclass(frozen=True)
class OrientedEllipsoids:
    """Ellipsoids of revolution whose axes lie about one direction in the plane of the detector, partly stacked."""

    radius: float
    """Equatorial, in nm."""
    aspect: float
    """Polar over equatorial radius."""
    angle: float
    """Azimuth of the mean axis in degrees, from x (columns) to y (rows)."""
    spread: float
    """Standard deviation of the axes' azimuth in degrees."""
    spacing: float
    """Of the stacking along the axes, in nm."""
    arc: float
    """Height of its arcs, as part of I(0) of the ellipsoids."""
    background: float
    """Even background, as part of the mean of the pattern."""
    polydispersity: float = 0.12

    @classmethod
    def draw(cls, rng: np.random.Generator, split: Split) -> Self:
        """Draw a sample from the bands of a split."""
        low, high = RADII
        band = rng.choice(BANDS[split])
        return cls(
            radius=low + (band + rng.random()) * (high - low) / 12,
            aspect=rng.uniform(1.3, 3.0),
            angle=rng.uniform(0, 180),
            spread=rng.uniform(6, 22),
            spacing=rng.uniform(9, 18),
            arc=float(np.exp(rng.uniform(np.log(0.003), np.log(0.05)))),
            background=rng.uniform(0.1, 0.4),
        )

    def intensity(self, qy: Floats, qx: Floats) -> Floats:
        """Give I(qy, qx), even in q, in units of the ellipsoids' I(0); q in 1/nm."""
        q, azimuth = np.hypot(qy, qx), np.arctan2(qy, qx)
        total = np.zeros_like(q)
        for turn, share in zip(*_normal(13), strict=True):
            along = np.cos(azimuth - np.deg2rad(self.angle + self.spread * turn))
            total += share * self._particle(q, along)
        return total + self._arcs(q, azimuth)

    def _particle(self, q: Floats, along: Floats) -> Floats:
        """Form factor over sizes; `along` is the cosine between q and the axis."""
        stretched = q * np.sqrt(1 + (self.aspect**2 - 1) * along**2)
        total = np.zeros_like(q)
        for step, share in zip(*_normal(7), strict=True):
            size = self.radius * (1 + self.polydispersity * step)
            x = np.maximum(stretched * size, 1e-3)
            total += share * (size / self.radius) ** 6 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2
        return total

    def _arcs(self, q: Floats, azimuth: Floats) -> Floats:
        first = 2 * np.pi / self.spacing
        turned = (azimuth - np.deg2rad(self.angle) + np.pi / 2) % np.pi - np.pi / 2
        around = np.exp(-0.5 * (turned / np.deg2rad(self.spread)) ** 2)
        return self.arc * around * np.exp(-0.5 * ((q - first) / (0.08 * first)) ** 2)


def _normal(points: int) -> tuple[Floats, Floats]:
    """Nodes and weights of a normal distribution."""
    nodes, weights = roots_hermitenorm(points)
    return np.asarray(nodes), np.asarray(weights) / weights.sum()


@dataclass(frozen=True)
class AnisotropicScan:
    """A scan over samples, all seen by one small detector with a beamstop.

    Parameters
    ----------
    samples
        One for each exposure.
    shape, centre
        Rows and columns, and the beam (y, x) in pixels; the middle of the first pixel is at 0.5.
    beamstop
        Its radius in pixels.
    """

    samples: tuple[OrientedEllipsoids, ...]
    shape: tuple[int, int] = (128, 128)
    centre: tuple[float, float] = (64.0, 64.0)
    beamstop: float = 4.0

    @classmethod
    def draw(cls, number: int, split: Split, seed: int, **changes: Any) -> Self:
        """Draw the samples of a scan."""
        rng = np.random.default_rng([seed, list(BANDS).index(split)])
        return cls(tuple(OrientedEllipsoids.draw(rng, split) for _ in range(number)), **changes)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """True behind the beamstop, shape (y, x)."""
        y, x = self._pixels
        return np.hypot(y, x) < self.beamstop

    @property
    def _pixels(self) -> tuple[Floats, Floats]:
        """Distances (y, x) from the beam in pixels."""
        y, x = (np.arange(n) + 0.5 - c for n, c in zip(self.shape, self.centre, strict=True))
        return np.meshgrid(y, x, indexing="ij")  # type: ignore[return-value]

    @cached_property
    def whole(self) -> Floats:
        """Expected counts at a dose of one count a pixel, as if there were no beamstop, shape (exposure, y, x)."""
        step = 2e-9 * np.pi * PIXEL / (WAVELENGTH * DISTANCE)
        qy, qx = (step * part for part in self._pixels)
        return np.stack([self._rate(sample, qy, qx) for sample in self.samples])

    @cached_property
    def rates(self) -> Floats:
        """The same, zero behind the beamstop."""
        return np.where(self.mask, 0.0, self.whole)

    def _rate(self, sample: OrientedEllipsoids, qy: Floats, qx: Floats) -> Floats:
        pattern = sample.intensity(qy, qx)
        level = pattern[~self.mask].mean()
        return (1 - sample.background) * pattern / level + sample.background

    def frames(self, dose: float, seed: int) -> NDArray[np.int64]:
        """Count photons: `dose` a pixel in the mean, shape (exposure, y, x)."""
        return np.random.default_rng(seed).poisson(dose * self.rates)

    def turned(self, angles: Floats) -> AnisotropicScan:
        """Give the scan of the first sample with its axis turned to each of some azimuths in degrees: a map of orientations."""
        return replace(self, samples=tuple(replace(self.samples[0], angle=float(angle)) for angle in angles))

    @property
    def poni(self) -> dict[str, Any]:
        """Geometry as pyFAI writes it (lengths in m)."""
        return {
            "poni_version": 2.1,
            "dist": DISTANCE,
            "poni1": self.centre[0] * PIXEL,
            "poni2": self.centre[1] * PIXEL,
            "rot1": 0.0,
            "rot2": 0.0,
            "rot3": 0.0,
            "detector": "Detector",
            "detector_config": {"pixel1": PIXEL, "pixel2": PIXEL, "max_shape": list(self.shape), "orientation": 3},
            "wavelength": WAVELENGTH,
        }

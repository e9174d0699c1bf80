"""Samples of the simulated beamline, each with its exact curve.

Nothing here is computed by sasmodels: the truth of a simulation must not share
code with what is tested against it, and a demo must run without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SAMPLES", "GaussianChain", "Sample", "SilverBehenate", "Sphere"]


class Sample(Protocol):
    """Something in the beam whose exact, unsmeared intensity is known."""

    @property
    def fraction(self) -> float:
        """Photons scattered onto the detector for each one that the sample lets through."""
        ...

    def truth(self, q: ArrayLike) -> NDArray:
        """Return the exact intensity at q (1/nm, same shape), in units of its own."""
        ...


@dataclass(frozen=True)
class SilverBehenate:
    """Silver behenate: Bragg peaks of a lamellar powder on a power law.

    The orders stand at n 2 pi / 5.838 1/nm; their width is Scherrer's for
    crystallites of 90 nm (Huang et al. 1993, doi 10.1107/S0021889892009762).
    """

    spacing: float = 5.838
    """Lamellar distance in nm."""

    crystallite: float = 90.0
    """Crystallite size along the stacking, in nm."""

    heights: tuple[float, ...] = (1.0, 0.35, 0.5)
    """Heights of the orders, relative to the first."""

    fraction: float = 2e-3

    @property
    def peaks(self) -> NDArray:
        """Positions of the orders in 1/nm."""
        return 2 * np.pi / self.spacing * np.arange(1, len(self.heights) + 1)

    @property
    def sigma(self) -> float:
        """Standard deviation of each peak in 1/nm, from Scherrer's full width 0.9 * 2 pi / size."""
        return 0.9 * 2 * np.pi / self.crystallite / (2 * np.sqrt(2 * np.log(2)))

    def truth(self, q: ArrayLike) -> NDArray:
        """Return the exact intensity at q in 1/nm."""
        q = np.asarray(q, dtype=float)
        bragg = sum(h * np.exp(-0.5 * ((q - p) / self.sigma) ** 2) for h, p in zip(self.heights, self.peaks, strict=True))
        return bragg + 0.02 / (0.1**2 + q**2) ** 1.5 + 0.02


@dataclass(frozen=True)
class Sphere:
    """Spheres of one radius, dilute, on a flat background (Rayleigh 1911, doi 10.1098/rspa.1911.0005)."""

    radius: float = 8.0
    """Radius in nm."""

    background: float = 1e-5
    """Flat background relative to the intensity at q = 0."""

    fraction: float = 2e-3

    def truth(self, q: ArrayLike) -> NDArray:
        """Return the exact intensity at q in 1/nm."""
        x = np.maximum(np.asarray(q, dtype=float) * self.radius, 1e-3)
        return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + self.background


@dataclass(frozen=True)
class GaussianChain:
    """Flexible polymers in a melt or theta solvent (Debye 1947, doi 10.1021/j150451a002): a curve without features."""

    gyration: float = 10.0
    """Radius of gyration in nm."""

    background: float = 1e-3
    """Flat background relative to the intensity at q = 0."""

    fraction: float = 1e-3

    def truth(self, q: ArrayLike) -> NDArray:
        """Return the exact intensity at q in 1/nm."""
        u = np.maximum((np.asarray(q, dtype=float) * self.gyration) ** 2, 1e-4)
        return 2 * (np.expm1(-u) + u) / u**2 + self.background


SAMPLES: dict[str, Sample] = {"AgBh": SilverBehenate(), "sphere": Sphere(), "chain": GaussianChain()}
"""Samples that the beamline's sample changer holds, by name."""

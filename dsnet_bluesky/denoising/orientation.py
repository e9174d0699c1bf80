"""Orientation of anisotropic patterns: the second harmonic of each ring.

``I(q, chi) = a0 (1 + a cos(2 (chi - theta)) + ...)``: theta is the azimuth of strongest scattering, modulo 180 degrees, and a
the anisotropy, 0 for isotropic rings, as in scanning small-angle scattering (O. Bunk et al., New J. Phys. 11 (2009)
123016, doi:10.1088/1367-2630/11/12/123016, who call it the degree of orientation). Azimuths are pyFAI's, as those of
sectors are. Both are fitted by least squares over the pixels of a ring that count, so a mask does not turn them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.reduction import Reduction, integrator

__all__ = ["Orientation", "Orientations", "scatter"]

Floats = NDArray[np.floating[Any]]

LEAST_PIXELS = 6
"""Pixels that a ring must have for its three numbers."""

FULL = 0.05
"""Least eigenvalue of a ring's normal matrix, in those of a full ring, to know its harmonic: less is a narrow piece of it."""


class Orientation(NamedTuple):
    """Second harmonics of rings, each of shape (exposure, q); NaN where a ring has too few pixels or no counts."""

    azimuth: Floats
    """Of the strongest scattering, in degrees, from 0 to 180."""
    anisotropy: Floats
    """Amplitude in units of the mean."""


class Orientations:
    """Fit the second harmonic to the rings of a reduction, over the full circle.

    Parameters
    ----------
    reduction
        Its q are the middles of the rings, whatever its sector is.
    """

    def __init__(self, reduction: Reduction) -> None:
        ai, shape = integrator(reduction.poni), reduction.mask.shape
        ring = _rings_of(np.asarray(ai.center_array(shape, "q_nm^-1")), reduction)
        self._inside = ring >= 0
        self._ring, self._rings = ring[self._inside], reduction.q.size
        chi = np.asarray(ai.center_array(shape, "chi_rad"))[self._inside]
        self._basis = np.stack([np.ones_like(chi), np.cos(2 * chi), np.sin(2 * chi)])
        normal = np.array([[self._sums(a * b) for b in self._basis] for a in self._basis]).transpose(2, 0, 1)
        number = normal[:, 0, 0]
        known = (number >= LEAST_PIXELS) & (np.linalg.eigvalsh(normal)[:, 0] > FULL * number)
        self._solve = np.full_like(normal, np.nan)
        self._solve[known] = np.linalg.inv(normal[known])

    def __call__(self, frames: Floats) -> Orientation:
        """Find the orientations of frames (exposure, y, x); pixels without a value (NaN) are taken to be as their ring's mean."""
        inside = np.array([self._filled(frame) for frame in np.asarray(frames, dtype=float)[:, self._inside]])
        sums = np.array([[self._sums(frame * wave) for wave in self._basis] for frame in inside])
        mean, cosine, sine = np.einsum("rij,ejr->ier", self._solve, sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            anisotropy = np.where(mean > 0, np.hypot(cosine, sine) / mean, np.nan)
        azimuth = np.where(np.isfinite(anisotropy), np.degrees(np.arctan2(sine, cosine)) / 2 % 180, np.nan)
        return Orientation(azimuth, anisotropy)

    def _filled(self, frame: Floats) -> Floats:
        lost = ~np.isfinite(frame)
        if not lost.any():
            return frame
        mean = self._sums(np.where(lost, 0.0, frame)) / np.maximum(self._sums((~lost).astype(float)), 1.0)
        return np.where(lost, mean[self._ring], frame)

    def _sums(self, values: Floats) -> Floats:
        return np.bincount(self._ring, values, self._rings).astype(float)


def scatter(replicas: Orientation) -> Orientation:
    """Give the scatter of replicas, shape (replica, q): of azimuths the circular standard deviation, of q's own axis.

    An azimuth is known modulo 180 degrees, so its doubles are averaged on the circle: ``sqrt(-2 ln R) / 2``, R being the length
    of their mean (K. V. Mardia, P. E. Jupp, Directional Statistics, 2000, section 2.3).
    """
    length = np.abs(np.exp(2j * np.deg2rad(replicas.azimuth)).mean(axis=0))
    around = np.degrees(np.sqrt(-2 * np.log(np.clip(length, 1e-12, 1.0)))) / 2
    return Orientation(around, replicas.anisotropy.std(axis=0, ddof=1))


def _rings_of(q: Floats, reduction: Reduction) -> NDArray[np.int64]:
    """Number the pixels by the nearest q of a reduction, -1 where none is within half a step or the pixel does not count."""
    edges = np.concatenate([[1.5 * reduction.q[0] - 0.5 * reduction.q[1]], (reduction.q[1:] + reduction.q[:-1]) / 2])
    edges = np.append(edges, 1.5 * reduction.q[-1] - 0.5 * reduction.q[-2])
    number = np.digitize(q, edges) - 1
    return np.where(reduction.mask | (number < 0) | (number >= reduction.q.size), -1, number)

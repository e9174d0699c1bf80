"""Rings of equal q on a frame: their sums are what a full azimuthal integration sees, and what denoising must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.data import BadInput

__all__ = ["check_rings", "conserve", "ring_chi2", "ring_sums", "rings_about"]

Floats = NDArray[np.floating[Any]]

WIDTH = 8.0
"""Of the rings that are conserved, in pixels. Narrow rings bring the photons' noise back: on validation frames of 3 photons a
pixel, a gain of 24.1 dB falls to 20.9 by rings of 1 pixel and to 23.7 by 4, and is 24.2 with 8; sectors do not care."""

LEAST_IN_RINGS = 0.5
"""Least part of the pixels that rings of full circles hold."""


def rings_about(
    centre: tuple[float, float], shape: tuple[int, int], mask: NDArray[np.bool_], width: float = WIDTH
) -> NDArray[np.int64]:
    """Number the rings about the beam: for each pixel its ring, -1 where it is masked.

    Parameters
    ----------
    centre
        The beam (y, x) in pixels; the middle of the first pixel is at 0.5.
    shape
        Rows and columns.
    mask
        True where a pixel does not count, shape (y, x).
    width
        Of a ring in pixels.
    """
    y, x = (np.arange(n) + 0.5 - c for n, c in zip(shape, centre, strict=True))
    return np.where(mask, -1, (np.hypot(y[:, None], x) / width).astype(np.int64))


def check_rings(rings: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Check rings that someone else numbered (`Reduction.bins`), and leave masked pixels out.

    Raises
    ------
    BadInput
        If they do not fit the frames, or are those of a sector.
    """
    rings = np.asarray(rings)
    if rings.size != mask.size or not np.issubdtype(rings.dtype, np.integer):
        raise BadInput(f"The rings have {rings.size} numbers for {mask.size} pixels; give one integer for each, -1 for none.")
    numbered = np.where(mask, -1, rings.reshape(mask.shape)).astype(np.int64)
    if (numbered >= 0).sum() < LEAST_IN_RINGS * (~mask).sum():
        raise BadInput(
            f"The rings hold {(numbered >= 0).sum() / (~mask).sum():.0%} of the pixels: they are those of a sector, and would "
            "give it the noise of the raw frame again. Give the bins of a reduction of the full circle, or none."
        )
    return numbered


def ring_sums(frames: NDArray, rings: NDArray[np.int64]) -> Floats:
    """Sum each ring of frames (exposure, y, x), shape (exposure, ring)."""
    inside = rings >= 0
    numbers, length = rings[inside], int(rings.max()) + 1
    return np.stack([np.bincount(numbers, frame[inside].astype(float), length) for frame in frames]).astype(float)


def conserve(denoised: Floats, counts: NDArray, rings: NDArray[np.int64]) -> Floats:
    """Scale each ring of denoised frames so that its sum is the measured one.

    Integrated over full rings the frames then give the measured curve and its Poisson errors; only
    how the counts of a ring are distributed over it comes from the model.

    Parameters
    ----------
    denoised, counts
        Shape (exposure, y, x).
    rings
        Ring of each pixel, -1 for none, shape (y, x).
    """
    wanted, found = ring_sums(counts, rings), ring_sums(denoised, rings)
    factors = np.where(found > 0, wanted / np.where(found > 0, found, 1.0), 1.0)
    return denoised * np.where(rings >= 0, factors[:, rings.clip(0)], 1.0)


def ring_chi2(denoised: Floats, counts: NDArray, rings: NDArray[np.int64]) -> Floats:
    """Reduced chi2 of ring sums, denoised against measured: a bias of the model shows here without any truth.

    An unbiased model is somewhat below 1, since its rings follow the measured ones.

    Returns
    -------
    ndarray
        Shape (exposure,).
    """
    wanted, found = ring_sums(counts, rings), ring_sums(denoised, rings)
    filled = np.bincount(rings[rings >= 0], minlength=wanted.shape[1]) > 0
    return (((found - wanted) ** 2 / np.maximum(found, 1.0))[:, filled]).mean(axis=1)

"""Frames of a scan, ready to train on: centred, tested for their symmetry, some of them held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising import MINIMUM_COUNTS, tested
from dsnet_bluesky.denoising.symmetry import CentredGrid, SymmetryTest, check_counts, fold

__all__ = ["Scan", "prepare_scan"]

MINIMUM_FRAMES = 12
"""Frames that a scan must have to train on."""

LEAST_HELD_OUT = 3


@dataclass(frozen=True)
class Scan:
    """Frames of a scan, ready to train on."""

    counts: NDArray[np.int64]
    """Centred, shape (exposure, Y, X)."""
    valid: NDArray[np.bool_]
    """Pixels that count, shape (Y, X)."""
    symmetry: SymmetryTest
    counts_per_pixel: NDArray[np.float64]
    """Of each frame."""
    training: NDArray[np.intp]
    held_out: NDArray[np.intp]

    @cached_property
    def folded(self) -> NDArray[np.int32]:
        """Photons of both mates, shape (exposure, Y, X)."""
        return fold(self.counts, self.valid).counts.astype(np.int32)

    @cached_property
    def readings(self) -> NDArray[np.float32]:
        """How many mates count, shape (Y, X)."""
        return fold(self.counts[:1], self.valid).readings.astype(np.float32)

    @property
    def digest(self) -> str:
        """SHA-256 of the centred frames, of the pixels that count and of the split."""
        sha = hashlib.sha256()
        for array in (self.counts, self.valid, self.training, self.held_out):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def prepare_scan(
    frames: ArrayLike, centre: tuple[float, float], mask: NDArray[np.bool_] | None, *, seed: int = 1, held_out: float = 0.15
) -> Scan:
    """Centre the frames of a scan, test their symmetry, and hold some out.

    Parameters
    ----------
    frames, centre, mask
        As of `train_denoiser`.
    seed
        Decides which are held out.
    held_out
        Part of the frames.

    Raises
    ------
    BadInput
        If there are too few frames or counts, or they are not symmetric about the centre.
    """
    counts, masked = check_counts(frames, mask)
    mean = counts.sum(axis=(1, 2)) / (~masked).sum()
    if len(counts) < MINIMUM_FRAMES:
        raise BadInput(
            f"The scan has {len(counts)} frames; {MINIMUM_FRAMES} at least are needed to train a denoiser. Take the frames of "
            "several runs of the same detector and sample system, or a Gaussian filter."
        )
    if mean.mean() < MINIMUM_COUNTS:
        raise BadInput(
            f"The frames hold {mean.mean():.3g} counts a pixel; {MINIMUM_COUNTS:g} at least are needed to train a denoiser. "
            "Expose longer, or sum frames."
        )
    grid = CentredGrid(masked.shape, (float(centre[0]), float(centre[1])))  # type: ignore[arg-type]
    centred, valid = grid.deal(counts), grid.valid(masked)
    symmetry = tested(counts, masked, grid, centred, valid)
    order = np.random.default_rng(seed).permutation(len(counts))
    few = max(LEAST_HELD_OUT, round(held_out * len(counts)))
    return Scan(centred, valid, symmetry, mean, np.sort(order[few:]), np.sort(order[:few]))

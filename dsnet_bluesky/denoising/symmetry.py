"""Friedel's symmetry of a small-angle frame: I(q) = I(-q), so a pixel and its mate count the same signal twice.

The mate of a pixel is found by a rotation through 180 degrees about the beam. That takes pixels to
pixels only if the beam lies on the corner, the edge or the middle of one, so frames are first brought
to a grid that it does (`CentredGrid`). Photons are not interpolated on the way but dealt: each goes to
one of the pixels that its own overlaps, by a draw. Dealt counts stay independent and Poissonian; interpolated
ones are neither, and every likelihood and chi2 here would be wrong.

Masks are True where a pixel does not count. They are geometric: whether a pixel takes part never
depends on what it counted. To ask for counts in both mates, as the published code does
(Zhou et al., J. Appl. Cryst. 57 (2024) 741, doi:10.1107/S1600576724002899), selects upward
fluctuations and biases weak frames.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput

__all__ = ["CentredGrid", "Folded", "SymmetryTest", "check_counts", "find_centre", "fold", "mate", "test_symmetry"]

Floats = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]

NEGLIGIBLE = 0.02
"""In pixels: a beam this near to the grid is on it."""

EXCESS = 0.01
"""Excess of chi2 above 1 that matters: denoising brings the variance down to some hundredth of that of the counts."""

SIGNIFICANT = 4.0
"""Standard errors that an excess must have to be believed."""

LEAST_PAIRS = 0.3
"""Least share of the pixels that count whose mates count too."""


class Folded(NamedTuple):
    """Frames with each pixel's mate added to it."""

    counts: Counts
    """Sum of both readings, shape (exposure, Y, X); symmetric."""
    readings: NDArray[np.int64]
    """How many of the two count, 0, 1 or 2, shape (Y, X)."""


def check_counts(counts: ArrayLike, mask: ArrayLike | None = None) -> tuple[Counts, Mask]:
    """Check frames, and join what cannot count with the mask.

    Parameters
    ----------
    counts
        Photons, shape (exposure, y, x). Negative (gaps) or not finite in any exposure: masked.
    mask
        True where a pixel does not count, shape (y, x).

    Returns
    -------
    counts, mask
        Counts with 0 where masked; mask of shape (y, x).

    Raises
    ------
    BadInput
        If these are no counts, the mask does not fit, or nothing is left.
    """
    frames = np.asarray(counts)
    if frames.ndim != 3 or 0 in frames.shape:
        raise BadInput(f"The frames have shape {frames.shape}; give counts as (exposure, y, x), at least one exposure.")
    masked = np.zeros(frames.shape[1:], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if masked.shape != frames.shape[1:]:
        raise BadInput(f"The mask has shape {masked.shape} and the frames have {frames.shape[1:]} pixels; give one that fits.")
    masked = masked | (~np.isfinite(frames) | (frames < 0)).any(axis=0)
    if masked.all():
        raise BadInput("No pixel counts in all exposures; check that the mask is not inverted (True means masked).")
    kept = np.where(masked, 0, frames)
    whole = kept.astype(np.int64)
    if (whole != kept).any():
        raise BadInput(
            "The frames hold fractions of counts. Denoising rests on the statistics of photons: give the counts as the detector "
            "wrote them, not divided, subtracted or interpolated."
        )
    return whole, masked


@dataclass(frozen=True)
class CentredGrid:
    """A grid of pixels with the beam at its middle, and the way there and back.

    Parameters
    ----------
    shape
        Of the frames, (rows, columns).
    centre
        The beam (y, x) in pixels, as pyFAI counts them: the middle of the first pixel is at 0.5.

    Raises
    ------
    BadInput
        If the beam is not on the frame.
    """

    shape: tuple[int, int]
    centre: tuple[float, float]

    def __post_init__(self) -> None:
        if not all(0 < c < n for c, n in zip(self.centre, self.shape, strict=True)):
            raise BadInput(
                f"The beam centre (y, x) = ({self.centre[0]:.1f}, {self.centre[1]:.1f}) is not on the frame of "
                f"{self.shape[0]} x {self.shape[1]} pixels: without mates there is no symmetry to use. Check the geometry (poni)."
            )

    @cached_property
    def twice(self) -> tuple[int, int]:
        """Twice the centre, rounded: the mate of pixel i is ``twice - 1 - i``."""
        return round(2 * self.centre[0]), round(2 * self.centre[1])

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the centred grid: all pixels and all their mates."""
        rows, columns = (max(k, 2 * n - k) for k, n in zip(self.twice, self.shape, strict=True))
        return rows, columns

    @cached_property
    def shift(self) -> tuple[float, float]:
        """By how much, at most a quarter of a pixel, the frames are shifted."""
        rows, columns = (c - k / 2 for c, k in zip(self.centre, self.twice, strict=True))
        return tuple(0.0 if abs(s) < NEGLIGIBLE else s for s in (rows, columns))  # type: ignore[return-value]

    @cached_property
    def _window(self) -> tuple[slice, slice]:
        """Where the frame lies in the centred grid."""
        first = [(m - k) // 2 for m, k in zip(self.size, self.twice, strict=True)]
        rows, columns = (slice(a, a + n) for a, n in zip(first, self.shape, strict=True))
        return rows, columns

    def deal(self, counts: Counts, seed: int = 0) -> Counts:
        """Deal photons to the centred grid, (exposure, y, x) to (exposure, Y, X).

        A photon's place in its pixel is not known, so it goes to each pixel that its own overlaps with the
        share of the overlap as probability (thinning of a Poisson process).
        """
        rng = np.random.default_rng(seed)
        for axis, shift in zip((-2, -1), self.shift, strict=True):
            if shift:
                moved = rng.binomial(counts, abs(shift))
                counts = counts - moved + _neighbour(moved, axis, shift)
        dealt = np.zeros((len(counts), *self.size), dtype=np.int64)
        dealt[(slice(None), *self._window)] = counts
        return dealt

    def valid(self, mask: Mask) -> Mask:
        """Tell which pixels of the centred grid got all their photons from pixels that count, shape (Y, X)."""
        good = ~mask
        for axis, shift in zip((-2, -1), self.shift, strict=True):
            if shift:
                good = good & _neighbour(good, axis, shift)
        centred = np.zeros(self.size, dtype=bool)
        centred[self._window] = good
        return centred

    def back(self, images: Floats) -> Floats:
        """Bring smooth images from the centred grid, (exposure, Y, X), to the frames', linearly between pixels."""
        for axis, shift in zip((-2, -1), self.shift, strict=True):
            if shift:
                edges = [(0, 0)] * images.ndim
                edges[axis] = (1, 1)
                padded, inner = np.pad(images, edges, mode="edge"), images.shape[axis]
                first = 0 if shift > 0 else 2
                images = (1 - abs(shift)) * images + abs(shift) * np.take(padded, np.arange(first, first + inner), axis)
        return images[(..., *self._window)]


def _neighbour(array: NDArray, axis: int, shift: float) -> NDArray:
    """Value of the next pixel (of the one before, for a negative shift) in each pixel; nothing beyond the edge."""
    rolled = np.roll(array, -1 if shift > 0 else 1, axis)
    edge: list[Any] = [slice(None)] * array.ndim
    edge[axis] = -1 if shift > 0 else 0
    rolled[tuple(edge)] = 0
    return rolled


def mate(frames: NDArray) -> NDArray:
    """Rotate centred frames, shape (..., Y, X), by 180 degrees."""
    return frames[..., ::-1, ::-1]


def fold(counts: Counts, valid: Mask) -> Folded:
    """Add to each pixel of centred frames its mate, where they count.

    Parameters
    ----------
    counts
        Shape (exposure, Y, X).
    valid
        Pixels that count, shape (Y, X).
    """
    kept = counts * valid
    return Folded(kept + mate(kept), valid.astype(np.int64) + mate(valid))


class SymmetryTest(NamedTuple):
    """Reduced chi2 between mates: 1 for a symmetric pattern, whatever its counts."""

    chi2: float
    """Pooled over all exposures."""
    error: float
    """Its standard error for a symmetric pattern."""
    exposures: Floats
    """chi2 of each exposure, shape (exposure,); NaN without a count."""
    errors: Floats
    """Their standard errors, shape (exposure,)."""
    pairs: int
    """Pairs of mates that both count."""

    @property
    def broken(self) -> bool:
        """Whether the symmetry is broken, by more than chance and more than a denoised frame would hide."""
        return _broken(self.chi2, self.error)

    @property
    def broken_exposures(self) -> Mask:
        """The same for each exposure by itself, which is a weaker test, shape (exposure,)."""
        return np.array([_broken(*both) for both in zip(self.exposures, self.errors, strict=True)], dtype=bool)


def _broken(chi2: float, error: float) -> bool:
    return bool(chi2 - 1 > max(EXCESS, SIGNIFICANT * error))


def test_symmetry(counts: Counts, valid: Mask) -> SymmetryTest:
    """Test Friedel's symmetry of centred frames.

    Of S photons in a pair of mates the difference D is that of S coin tosses if both have the same mean:
    ``<D^2> = S`` and ``var(D^2) = 2 S (S - 1)``, whatever the mean. Pooled, ``chi2 = sum(D^2 / S) / pairs`` over
    pairs with a photon, with the exact standard error ``sqrt(sum(2 - 2 / S)) / pairs``. One weak frame says little; the
    frames of a scan together do.

    Parameters
    ----------
    counts
        Shape (exposure, Y, X), centred.
    valid
        Pixels that count, shape (Y, X).

    Raises
    ------
    BadInput
        If too few pixels have mates, or there is no photon.
    """
    first, second, both = _pairs(counts, valid)
    if 2 * both.sum() < LEAST_PAIRS * valid.sum():
        raise BadInput(
            f"Only {2 * both.sum() / max(valid.sum(), 1):.0%} of the pixels have a mate that counts: the beam is near the edge, "
            "or the mask covers one side. Move the detector, or denoise without symmetry."
        )
    total, difference = (first + second)[:, both], (first - second)[:, both]
    seen = total > 0
    if not seen.any():
        raise BadInput("The frames hold no photon where mates count; check the mask and the exposure.")
    square = np.where(seen, difference**2 / np.maximum(total, 1), 0.0).sum(axis=1)
    variance = np.where(seen, 2 - 2 / np.maximum(total, 1), 0.0).sum(axis=1)
    number = seen.sum(axis=1)
    some = np.where(number > 0, number, np.nan)
    return SymmetryTest(
        float(square.sum() / number.sum()),
        float(np.sqrt(variance.sum()) / number.sum()),
        square / some,
        np.sqrt(variance) / some,
        int(both.sum()),
    )


test_symmetry.__test__ = False  # type: ignore[attr-defined]  # it is no test of pytest's


def _pairs(counts: Counts, valid: Mask) -> tuple[Counts, Counts, Mask]:
    """Give each pair of mates once: two arrays (exposure, pair), and which pairs count."""
    half = valid.size // 2  # a pixel that is its own mate, in the middle, is no pair
    flat, good = counts.reshape(len(counts), -1), valid.ravel()
    return flat[:, :half], flat[:, ::-1][:, :half], good[:half] & good[::-1][:half]


def find_centre(counts: Counts, mask: Mask, centre: tuple[float, float], reach: float = 4.0) -> tuple[float, float]:
    """Find the centre, to half a pixel, about which the sum of the frames is most symmetric.

    Parameters
    ----------
    counts, mask
        As `check_counts` gives them.
    centre
        Where to look.
    reach
        How far to look, in pixels.

    Returns
    -------
    tuple
        Centre (y, x) in pixels; as given where no other can be judged.
    """
    total = counts.sum(axis=0)[None]
    steps = np.arange(-round(2 * reach), round(2 * reach) + 1) / 2
    found = {centre: np.inf}
    for dy, dx in itertools.product(steps, steps):
        place = (round(2 * centre[0]) / 2 + float(dy), round(2 * centre[1]) / 2 + float(dx))
        try:
            grid = CentredGrid(mask.shape, place)  # type: ignore[arg-type]
            found[place] = test_symmetry(grid.deal(total), grid.valid(mask)).chi2
        except BadInput:
            continue
    return min(found, key=lambda place: found[place])

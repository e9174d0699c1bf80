"""What a denoiser by symmetry is compared with: filters, BM3D, Noise2Void. Parameters of the filters are tuned on the truth."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray

from dsnet_bluesky.denoising.harmonics import RingHarmonics
from dsnet_bluesky.denoising.likelihood import FLIPS, expected, nearby
from dsnet_bluesky.denoising.likelihood import WIDTHS as SMOOTH
from dsnet_bluesky.denoising.network import DenoiserConfig, UNet
from dsnet_bluesky.denoising.symmetry import fold
from dsnet_bluesky.network import has_bfloat16

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

HAS_BM3D = importlib.util.find_spec("bm3d") is not None
"""BM3D is free for non-commercial use only, so it is no dependency, not even of development: pip install bm3d."""

WIDTHS = (0.7, 1.0, 1.4, 1.8, 2.2, 2.8, 3.5, 4.5)
SIZES = (3, 5, 7, 9, 11)
SIGMAS = (1.0, 1.3, 1.6)
"""Noise that BM3D is told, in units of the Anscombe transform's."""

BLIND = 0.04
"""Part of the pixels that Noise2Void does not see."""


def chi2(frames: NDArray, truth: Floats, mask: Mask) -> float:
    """Mean squared error in units of the Poisson variance."""
    return float(np.mean(((frames - truth) ** 2)[:, ~mask] / truth[:, ~mask]))


def tuned(candidates: Iterable[Floats], truth: Floats, mask: Mask) -> Floats:
    """Give the candidate that is nearest to the truth: no measurement could know it."""
    return min(candidates, key=lambda frames: chi2(frames, truth, mask))


def averaged(counts: NDArray, mask: Mask) -> Floats:
    """Average pixels and mates of centred frames."""
    folded = fold(counts, ~mask)
    return folded.counts / np.maximum(folded.readings, 1)


def gaussians(frames: NDArray, mask: Mask) -> Iterable[Floats]:
    """Filter with Gaussians of several widths, over the pixels that count."""
    for width in WIDTHS:
        weight = scipy.ndimage.gaussian_filter((~mask).astype(float), width, truncate=4)
        smooth = scipy.ndimage.gaussian_filter(np.where(mask, 0, frames).astype(float), (0, width, width), truncate=4)
        yield smooth / np.maximum(weight, 1e-6)


def medians(frames: NDArray, mask: Mask) -> Iterable[Floats]:
    """Filter with medians of several sizes."""
    filled = _filled(frames, mask)
    for size in SIZES:
        yield scipy.ndimage.median_filter(filled, (1, size, size))


def harmonics(counts: NDArray, mask: Mask) -> Iterable[Floats]:
    """Fit each ring of centred frames by even harmonics: what our network is shown, without the network."""
    folded = fold(counts, ~mask)
    weight, photons = (torch.as_tensor(part, dtype=torch.float32) for part in (folded.readings / 2, folded.counts))
    for most in range(0, 10, 2):
        yield RingHarmonics(weight, range(2, most + 1, 2))(photons).double().numpy() / 2


def bm3d(frames: NDArray, mask: Mask, readings: int, sigma: float) -> Floats:
    """Filter with BM3D behind the Anscombe transform of the sum of one or two readings, its inverse exact.

    M. Makitalo, A. Foi, IEEE Trans. Image Process. 20 (2011) 2697, doi:10.1109/TIP.2011.2121085, eq. 19.
    """
    from bm3d import bm3d as filtered  # pyright: ignore[reportMissingImports]

    transformed = 2 * np.sqrt(_filled(frames, mask) * readings + 3 / 8)
    D = np.maximum(np.stack([filtered(frame, sigma) for frame in transformed]), 2 * np.sqrt(3 / 8))
    root = np.sqrt(1.5)
    return np.maximum(D**2 / 4 + root / (4 * D) - 11 / (8 * D**2) + 5 * root / (8 * D**3) - 1 / 8, 0.0) / readings


def _filled(frames: NDArray, mask: Mask) -> Floats:
    """Fill masked pixels from the nearest that counts."""
    places: Any = scipy.ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    return np.asarray(frames, dtype=float)[:, places[0], places[1]]


class Noise2Void:
    """Krull et al., CVPR 2019, doi:10.1109/CVPR.2019.00223, with our network and Poisson's likelihood.

    Parameters
    ----------
    counts, mask
        Frames to train on.
    steps, seed
        Of the training; batch, piece and learning rate are those of the symmetry denoiser.
    """

    def __init__(self, counts: NDArray, mask: Mask, steps: int, seed: int, schedule: Callable[[float], float]) -> None:
        self.weight = torch.as_tensor(~mask, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = UNet(DenoiserConfig(inputs=2 + len(SMOOTH), outputs=1 + len(SMOOTH)))
        optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-3)
        kept = np.where(mask, 0, counts)
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step / steps)
            value = self._loss(kept, mask, np.random.default_rng([seed, step]))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()

    def _loss(self, counts: NDArray, mask: Mask, rng: np.random.Generator, crop: int = 96, batch: int = 8) -> torch.Tensor:
        pieces, valid = [], []
        for number in rng.integers(0, len(counts), batch):
            y, x = (int(rng.integers(0, n - min(crop, n) + 1)) for n in mask.shape)
            turns = int(rng.integers(4))
            pieces.append(np.rot90(counts[number, y : y + crop, x : x + crop], turns))
            valid.append(np.rot90(~mask[y : y + crop, x : x + crop], turns))
        target, readings = np.stack(pieces), np.stack(valid)
        blind = (rng.random(target.shape) < BLIND) & readings
        shown = np.where(blind, _strangers(target, rng), target)
        shown, target, weight = (torch.as_tensor(part.astype(np.float32)) for part in (shown, target, readings))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16("cpu")):
            mean = expected(self.network, nearby(shown, weight))
        chosen = torch.as_tensor(blind)
        return (mean - torch.xlogy(target, mean))[chosen].mean()

    @torch.inference_mode()
    def __call__(self, counts: NDArray) -> Floats:
        """Denoise frames, shape (exposure, y, x)."""
        answers = []
        for frame in counts:
            views = nearby(torch.as_tensor(frame.astype(np.float32))[None] * self.weight, self.weight)
            flipped = [expected(self.network, views.flip(axes)).flip(axes) for axes in FLIPS]
            answers.append(torch.stack(flipped).mean(dim=0)[0].double().numpy())
        return np.stack(answers)


def _strangers(frames: NDArray, rng: np.random.Generator) -> NDArray:
    """Give each pixel the value of a random neighbour, up to two pixels away, never its own."""
    number, rows, columns = np.indices(frames.shape)
    steps = rng.integers(1, 25, frames.shape)
    steps = np.where(steps <= 12, steps - 1, steps)  # of the 25 places of the square that in the middle is left out
    dy, dx = steps // 5 - 2, steps % 5 - 2
    return frames[number, (rows + dy).clip(0, rows.max()), (columns + dx).clip(0, columns.max())]

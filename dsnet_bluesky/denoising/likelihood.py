"""Denoising by Poisson likelihood: the network is shown some of the photons and judged by the others.

A frame is folded: each pixel holds its own photons and its mate's (`symmetry.fold`). Dealing each photon
at random into a shown and a kept part, with probability p and 1 - p, gives two independent Poisson
frames of one pattern; for p = 1/2 these are the two mates, the photons of which symmetry allows to exchange. So every
step of a training sees the same scan as new pairs of mates. The network f answers the expected
counts of what it was given; those of the kept part are ``f (1 - p) / p``, and the likelihood of what was
kept is maximal in expectation for the true pattern. No clean frame is needed.

At the end the network is given all photons of both mates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .network import UNet
from .symmetry import Folded

__all__ = ["FLIPS", "SHARES", "deal_shares", "deviance", "estimate", "expected", "gaussian", "loss"]

SHARES = (0.5, 0.9)
"""Range of p: the upper end is near what the network is given at the end."""

WIDTH = 1.5
"""Standard deviation in pixels of the smooth frame that the network corrects."""

ANSCOMBE = 3 / 8
"""sqrt(x + 3/8) has nearly one variance for all counts x (Anscombe, Biometrika 35 (1948) 246, doi:10.1093/biomet/35.3-4.246)."""

FLOOR = 0.02
"""Counts that are added to the smooth frame, so that the logarithm of an answer exists."""

UNIT = float(np.log(np.e - 1))
"""softplus(UNIT) = 1: an untrained network answers the smooth frame."""

BATCH_PIXELS = 2**18
"""Pixels that are denoised at once on a CPU."""

DEVICE_BATCH_PIXELS = 2**23
"""The same for other devices."""

FLIPS: tuple[list[int], ...] = ([], [-2], [-1], [-2, -1])
"""Axes of a frame's mirror images."""


def deal_shares(
    counts: NDArray[np.integer[Any]], rng: np.random.Generator, shares: tuple[float, float] = SHARES
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]], NDArray[np.float64]]:
    """Deal photons into a shown and a kept part.

    Parameters
    ----------
    counts
        Shape (batch, y, x).
    rng
        Decides.
    shares
        Range of the probability to be shown, drawn for each frame.

    Returns
    -------
    shown, kept, share
        Two frames that add up to `counts`, and the probability, shape (batch, 1, 1).
    """
    share = rng.uniform(*shares, (len(counts), 1, 1))
    shown = rng.binomial(counts, share)
    return shown, counts - shown, share


def gaussian(counts: Tensor, weight: Tensor, width: float) -> Tensor:
    """Smooth counts over the pixels that count, by a Gaussian (normalised convolution).

    Parameters
    ----------
    counts, weight
        Shape (batch, y, x); the answer is counts for a weight of 1.
    width
        Standard deviation in pixels.

    Returns
    -------
    Tensor
        Shape (batch, y, x); far from all pixels that count the mean of the frame.
    """
    reach = int(np.ceil(3 * width))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=counts.device, dtype=counts.dtype) / width) ** 2)
    kernel = kernel / kernel.sum()
    both = torch.stack([counts, weight], dim=1).flatten(0, 1)[:, None]
    both = functional.conv2d(both, kernel[None, None, None], padding=(0, reach))
    both = functional.conv2d(both, kernel[None, None, :, None], padding=(reach, 0))
    above, below = both[:, 0].unflatten(0, (-1, 2)).unbind(1)
    mean = counts.sum(dim=(-2, -1), keepdim=True) / weight.sum(dim=(-2, -1), keepdim=True).clamp_min(1)
    little = 1e-4
    return (above + little * mean) / (below + little)


def expected(network: UNet, counts: Tensor, readings: Tensor) -> Tensor:
    """Answer the expected counts of two readings in each pixel.

    Parameters
    ----------
    network
        With three inputs: the square roots of counts and of smoothed counts, and how many mates count.
    counts
        Of folded frames, or of a part of their photons, shape (batch, y, x).
    readings
        0, 1 or 2, shape (batch, y, x).

    Returns
    -------
    Tensor
        Shape (batch, y, x), positive.
    """
    weight = readings / 2
    smooth = gaussian(counts, weight, WIDTH)
    filled = torch.where(weight > 0, counts / weight.clamp_min(0.5), smooth)
    images = torch.stack([torch.sqrt(filled + ANSCOMBE), torch.sqrt(smooth + ANSCOMBE), weight], dim=1)
    return (smooth + FLOOR) * functional.softplus(network(images) + UNIT)


def loss(answer: Tensor, kept: Tensor, readings: Tensor, share: Tensor) -> Tensor:
    """Poisson negative log-likelihood of the photons that were kept, a pixel, without what does not depend on the answer.

    Parameters
    ----------
    answer
        Of `expected` for the photons that were shown, which are `share` of all, shape (batch, y, x).
    kept, readings
        Photons kept and mates that count, shape (batch, y, x).
    share
        Probability to be shown, shape (batch, 1, 1).
    """
    seen, mean = _kept_mean(answer, readings, share)
    each = torch.where(seen, mean - torch.xlogy(kept, mean), 0.0)
    return each.sum() / seen.sum().clamp_min(1)


def deviance(answer: Tensor, kept: Tensor, readings: Tensor, share: Tensor) -> Tensor:
    """Poisson deviance of the photons that were kept, a pixel, for each frame: shape (batch,)."""
    seen, mean = _kept_mean(answer, readings, share)
    each = torch.xlogy(kept, kept) - torch.xlogy(kept, mean) - kept + mean
    return 2 * torch.where(seen, each, 0.0).sum(dim=(-2, -1)) / seen.sum(dim=(-2, -1)).clamp_min(1)


def _kept_mean(answer: Tensor, readings: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels are seen, and the mean of their photons kept; 1 elsewhere, for a gradient of 0 / 0 would spoil all."""
    seen = readings > 0
    return seen, torch.where(seen, answer * (1 - share) / share * readings / 2, 1.0)


@torch.inference_mode()
def estimate(network: UNet, folded: Folded, device: str = "cpu") -> NDArray[np.float64]:
    """Denoise folded frames: expected counts of one reading, shape (exposure, Y, X), symmetric.

    The answers to the frame and to its mirror images are averaged.
    """
    readings = torch.as_tensor(folded.readings, dtype=torch.float32, device=device)
    most = BATCH_PIXELS if torch.device(device).type == "cpu" else DEVICE_BATCH_PIXELS
    batch = max(1, most // readings.numel())
    answers = []
    for first in range(0, len(folded.counts), batch):
        counts = torch.as_tensor(folded.counts[first : first + batch], dtype=torch.float32, device=device)
        answers.append(_over_flips(network, counts, readings.expand_as(counts)).double().cpu().numpy() / 2)
    return np.concatenate(answers)


def _over_flips(network: UNet, counts: Tensor, readings: Tensor) -> Tensor:
    """Average over mirror images of what the network says."""
    total = torch.zeros_like(counts)
    for axes in FLIPS:
        total += expected(network, counts.flip(axes), readings.flip(axes)).flip(axes)
    return total / len(FLIPS)

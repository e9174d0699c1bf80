"""Denoising by Poisson likelihood: the network is shown some of the photons and judged by the others.

A frame is folded: each pixel holds its own photons and its mate's (`symmetry.fold`). Dealing each photon
at random into a shown and a kept part, with probability p and 1 - p, gives two independent Poisson
frames of one pattern; for p = 1/2 these are the two mates, the photons of which symmetry allows to exchange. So every
step of a training sees the same scan as new pairs of mates. The network f answers the expected
counts of what it was given; those of the kept part are ``f (1 - p) / p``, and the likelihood of what was
kept is maximal in expectation for the true pattern. No clean frame is needed.

The network is not shown the frame alone but several views of it: smooth ones, and fits to its rings, by which all photons of
a ring speak for each of its pixels (`harmonics`). Its answer is a mean of these, with weights and a correction for
each pixel. At the end it is given all photons of both mates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .harmonics import RingHarmonics
from .network import UNet
from .symmetry import Folded

__all__ = [
    "FLIPS",
    "ORDERS",
    "SHARES",
    "WIDTHS",
    "Views",
    "deal_shares",
    "deviance",
    "estimate",
    "expected",
    "gaussian",
    "loss",
    "nearby",
    "turned",
]

SHARES = (0.5, 0.9)
"""Range of p: the upper end is near what the network is given at the end."""

WIDTHS = (1.0, 2.0, 4.0)
"""Standard deviations in pixels of the smooth frames that the network is shown."""

ANSCOMBE = 3 / 8
"""sqrt(x + 3/8) has nearly one variance for all counts x (Anscombe, Biometrika 35 (1948) 246, doi:10.1093/biomet/35.3-4.246)."""

FLOOR = 0.02
"""Counts that are added to the mean of the views, so that the logarithm of an answer exists."""

LEAST = 0.1
"""Counts that are added where views are compared by their ratio."""

UNIT = float(np.log(np.e - 1))
"""softplus(UNIT) = 1: an untrained network answers the mean of the views."""

BATCH_PIXELS = 2**18
"""Pixels that are denoised at once on a CPU."""

DEVICE_BATCH_PIXELS = 2**23
"""The same for other devices."""

FLIPS: tuple[list[int], ...] = ([], [-2], [-1], [-2, -1])
"""Axes of a frame's mirror images."""

ORDERS: tuple[tuple[int, ...], ...] = ((), (2, 4), (2, 4, 6, 8))
"""Harmonics of the fits to rings that the network is shown beside them; none but the mean in the first."""


def deal_shares(
    folded: NDArray[np.integer[Any]], rng: np.random.Generator, shares: tuple[float, float] = SHARES
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]], NDArray[np.float64]]:
    """Deal the photons of folded frames into a shown and a kept part.

    Parameters
    ----------
    folded
        Symmetric, shape (batch, Y, X).
    rng
        Decides.
    shares
        Range of the probability to be shown, drawn for each frame.

    Returns
    -------
    shown, kept, share
        Two symmetric frames that add up to `folded`, and the probability, shape (batch, 1, 1).
    """
    share = rng.uniform(*shares, (len(folded), 1, 1))
    # A pixel and its mate hold the same photons, which are dealt once: dealt twice, the shown ones of a pixel
    # would tell of those that its mate keeps, and a network that sees both would learn the noise.
    flat = folded.reshape(len(folded), -1)
    half = flat.shape[1] // 2
    first = rng.binomial(flat[:, : flat.shape[1] - half], share[..., 0])
    shown = np.concatenate([first, first[:, :half][:, ::-1]], axis=1).reshape(folded.shape)
    return shown, folded - shown, share


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


class Views:
    """Turn photons of folded frames of one detector into what the network is given.

    Parameters
    ----------
    readings
        How many mates count, 0, 1 or 2, shape (y, x), the beam in the middle.
    """

    def __init__(self, readings: Tensor) -> None:
        self.weight = readings / 2
        self._rings = [RingHarmonics(self.weight, orders) for orders in ORDERS]

    def __call__(self, counts: Tensor) -> Tensor:
        """Give views of the same photons, each with its own bias and noise.

        Parameters
        ----------
        counts
            Of folded frames, or of a part of their photons, shape (batch, y, x).

        Returns
        -------
        Tensor
            Shape (batch, 2 + len(WIDTHS) + len(ORDERS), y, x), counts for two readings: of the pixel itself, smooth by each of
            the widths, by each fit to its ring; last, how much of the two count.
        """
        near, rings = nearby(counts, self.weight), [fit(counts) for fit in self._rings]
        return torch.cat([near[:, :-1], torch.stack(rings, dim=1), near[:, -1:]], dim=1)


def nearby(counts: Tensor, weight: Tensor) -> Tensor:
    """Give the views that need no rings: shape (batch, 2 + len(WIDTHS), y, x).

    Parameters
    ----------
    counts
        Shape (batch, y, x).
    weight
        What counts are for a weight of 1, shape (y, x) or (batch, y, x).
    """
    weight = weight.expand_as(counts)
    smooth = [gaussian(counts, weight, width) for width in WIDTHS]
    own = torch.where(weight > 0, counts / weight.clamp_min(0.5), smooth[0])
    return torch.stack([own, *smooth, weight], dim=1)


def expected(network: UNet, views: Tensor) -> Tensor:
    """Answer the expected counts for a weight of 1.

    The network says for each pixel how much of each view to take, and a factor to correct their mean by. So it learns quickly to
    be as good as the best of the views: flat regions take wide means or their ring's, narrow peaks the pixels nearby.

    Parameters
    ----------
    network
        With as many inputs as there are views, and an output less.
    views
        Of `Views` or `nearby`, or pieces of them, shape (batch, view, y, x).

    Returns
    -------
    Tensor
        Shape (batch, y, x), positive.
    """
    said = network(_compared(views)).float()
    mean = (torch.softmax(said[:, :-1], dim=1) * views[:, 1:-1]).sum(dim=1)
    return (mean + FLOOR) * functional.softplus(said[:, -1] + UNIT)


def _compared(views: Tensor) -> Tensor:
    """Compare each view with the second smooth one: alike as they are, what tells them apart would be lost in what they share."""
    own, near, reference, *others, weight = views.unbind(1)
    own = torch.sqrt(own + ANSCOMBE) - torch.sqrt(reference + ANSCOMBE)
    level = torch.log(reference + LEAST)
    ratios = [torch.log(view + LEAST) - level for view in (near, *others)]
    return torch.stack([own, ratios[0], level, *ratios[1:], weight], dim=1)


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
    """Denoise folded frames: expected counts of one reading, shape (exposure, Y, X), symmetric."""
    readings = torch.as_tensor(folded.readings, dtype=torch.float32, device=device)
    views = Views(readings)
    most = BATCH_PIXELS if torch.device(device).type == "cpu" else DEVICE_BATCH_PIXELS
    batch = max(1, most // readings.numel())
    answers = []
    for first in range(0, len(folded.counts), batch):
        counts = torch.as_tensor(folded.counts[first : first + batch], dtype=torch.float32, device=device)
        answer = expected(network, views(counts))
        # What it is given is symmetric, and so is the mean of its answer and of the answer turned around.
        answers.append((answer + answer.flip(-2, -1)).double().cpu().numpy() / 4)
    return np.concatenate(answers)


def turned(images: Tensor, quarters: int, *, mirrored: bool) -> Tensor:
    """Rotate images (..., y, x) by quarters of a circle, then mirror them or not."""
    rotated = torch.rot90(images, quarters, (-2, -1))
    return rotated.flip(-1) if mirrored else rotated

"""What rings of equal q know of a frame: their mean, and how it varies around the beam.

A small-angle pattern varies smoothly with azimuth, so all photons of a ring speak for each of its pixels. Rings are
fitted by even harmonics (odd ones break Friedel's symmetry), by least squares over the pixels that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RingHarmonics"]

WIDTH = 0.7
"""Standard deviation in pixels over which neighbouring rings are joined."""

RIDGE = 1.0
"""Pixels that each harmonic must have more than: rings near the beam have too few for all of them."""


class RingHarmonics:
    """Fit harmonics to the rings about the middle of a grid.

    Parameters
    ----------
    weight
        How much each pixel counts, shape (y, x): 0 where it does not.
    orders
        Even numbers: harmonics that are fitted beside the mean.
    """

    def __init__(self, weight: Tensor, orders: Sequence[int] = ()) -> None:
        y, x = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in weight.shape)
        ring = torch.hypot(y[:, None], x).long().flatten()
        azimuth = torch.atan2(y[:, None], x[None]).flatten()
        waves = [part(m * azimuth) for m in orders for part in (torch.cos, torch.sin)]
        basis = torch.stack([torch.ones_like(azimuth), *waves], dim=1)
        number = torch.arange(int(ring.max()) + 1, dtype=torch.float64)
        joined = torch.exp(-0.5 * ((number[:, None] - number) / WIDTH) ** 2)
        squares = (weight.cpu().double().flatten()[:, None] * basis)[:, :, None] * basis[:, None]
        sums = torch.zeros(len(number), *squares.shape[1:], dtype=torch.float64).index_add_(0, ring, squares)
        normal = torch.einsum("rs,sij->rij", joined, sums)
        ridge = torch.diag(torch.tensor([1e-3] + [RIDGE] * len(waves), dtype=torch.float64))
        device = weight.device
        self._ring, self._basis = ring.to(device), basis.float().to(device)
        self._joined, self._solve = joined.float().to(device), torch.linalg.inv(normal + ridge).float().to(device)

    def __call__(self, counts: Tensor) -> Tensor:
        """Give the fitted frames, not negative, for a weight of 1.

        Parameters
        ----------
        counts
            Shape (batch, y, x); zero where the weight is.
        """
        waves = counts.flatten(1)[:, :, None] * self._basis
        sums = waves.new_zeros(len(counts), len(self._joined), waves.shape[2]).index_add_(1, self._ring, waves)
        found = torch.einsum("rij,brj->bri", self._solve, torch.einsum("rs,bsj->brj", self._joined, sums))
        return (found[:, self._ring] * self._basis).sum(dim=2).clamp_min(0).unflatten(1, counts.shape[1:])

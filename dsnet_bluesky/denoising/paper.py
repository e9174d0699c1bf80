"""The published denoiser, kept for comparison: halves as each other's targets.

Zhou et al., J. Appl. Cryst. 57 (2024) 741, doi:10.1107/S1600576724002899: a centred frame is divided by its
maximum and cut in half; each half, rotated, is the target of the other by mean squared error, with
mirror images; each half is predicted from the opposite one. Both halves are multiplied by a mask that is zero
where either has no count. The paper leaves the network open but for its size, 2,275,593 numbers; ours
is the U-Net of `network` with about as many and a ReLU behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .likelihood import FLIPS
from .network import UNet
from .symmetry import mate

__all__ = ["Halves", "halves", "paper_estimate", "paper_loss"]


class Halves(NamedTuple):
    """Both halves of frames, the right one rotated onto the left."""

    left: NDArray[np.float32]
    """Shape (exposure, Y, X // 2), in maxima of the frames."""
    right: NDArray[np.float32]
    """The same pixels as their mates read them."""
    scale: NDArray[np.float64]
    """Maximum of each frame, shape (exposure, 1, 1)."""


def halves(counts: NDArray[np.int64], valid: NDArray[np.bool_], *, product_mask: bool = True) -> Halves:
    """Cut centred frames in half.

    Parameters
    ----------
    counts
        Shape (exposure, Y, X).
    valid
        Pixels that count, shape (Y, X).
    product_mask
        Whether pixels are left out unless both mates have counts, as published; this biases weak frames.
    """
    kept = counts * valid
    scale = np.maximum(kept.max(axis=(-2, -1), keepdims=True), 1).astype(float)
    half = (valid.shape[1] + 1) // 2  # an odd middle column belongs to both halves
    left, right = kept[..., :half], mate(kept)[..., :half]
    used = (left * right > 0) if product_mask else (valid & mate(valid))[:, :half]
    left, right = ((part * used / scale).astype(np.float32) for part in (left, right))
    return Halves(left, right, scale)


def paper_loss(network: UNet, source: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of one half predicted from the other, shape (batch, y, x)."""
    return functional.mse_loss(torch.relu(network(source[:, None])[:, 0].float()), target)


@torch.inference_mode()
def paper_estimate(network: UNet, parts: Halves, width: int, device: str = "cpu") -> NDArray[np.float64]:
    """Predict each half from the opposite one.

    Parameters
    ----------
    network
        With one input.
    parts
        Of `halves`.
    width
        Columns of the centred frames.
    device
        Where to.

    Returns
    -------
    ndarray
        Denoised frames in counts, shape (exposure, Y, X).
    """
    answers = []
    for source in (parts.right, parts.left):
        images = torch.as_tensor(source, device=device)[:, None]
        total = sum(torch.relu(network(images.flip(axes))[:, 0]).flip(axes) for axes in FLIPS)
        answers.append((torch.as_tensor(total) / len(FLIPS)).double().cpu().numpy() * parts.scale)
    left, right = answers[0], mate(answers[1])
    return np.concatenate([left[..., : width // 2], right[..., right.shape[-1] - (width - width // 2) :]], axis=-1)

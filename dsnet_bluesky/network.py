"""The network of the published DSNet: ln of a smeared curve in, ln of a desmeared one out.

Zhou et al., "Deep-learning-powered desmearing for small-angle scattering",
J. Appl. Cryst. (2025): three one-dimensional U-Nets in a row, 64-128-256-128
channels, max-pooling undone by max-unpooling at the remembered positions, and
skips that add. The paper leaves kernel sizes and the joints between the U-Nets
open; with kernels of 3, two convolutions a block and 64 channels passed from
one U-Net to the next, the network has 1,183,105 parameters.

This module knows tensors only: no files, no curves, no operators.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsnet_bluesky.data import BadInput

__all__ = ["DSNet", "Network", "NetworkConfig", "check_device", "has_bfloat16"]


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network.

    Parameters
    ----------
    channels
        Channels of each level of a U-Net, from full resolution to the bottom.
    unets
        How many U-Nets follow each other.
    kernel
        Width of the convolutions, odd.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    unets: int = 3
    kernel: int = 3

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values, as a card or a recipe holds them."""
        return cls(channels=tuple(values["channels"]), unets=values["unets"], kernel=values["kernel"])

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as a card or a recipe holds them."""
        return {**asdict(self), "channels": list(self.channels)}


def check_device(device: str) -> None:
    """Raise `BadInput` if torch cannot compute on a device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"torch cannot use the device {device!r} ({reason}); try cpu.") from error


def has_bfloat16(device: str) -> bool:
    """Tell whether a device computes in bfloat16 itself; where it is emulated it takes longer than single precision."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


class Network(nn.Module):
    """A network that knows its size."""

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters())


class DSNet(Network):
    """The paper's network.

    Parameters
    ----------
    config
        Its shape; the default is the published one.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        width = self.config.channels[0]
        self.stem = nn.Conv1d(1, width, 1)
        self.unets = nn.Sequential(*(UNet(self.config.channels, self.config.kernel) for _ in range(self.config.unets)))
        self.head = nn.Conv1d(width, 1, 1)

    def forward(self, log_intensity: Tensor) -> Tensor:
        """Desmear.

        Parameters
        ----------
        log_intensity
            Natural logarithm of smeared curves, shape (..., n); any n >= 4, odd or even.

        Returns
        -------
        Tensor
            Natural logarithm of the desmeared curves, same shape.
        """
        curves = log_intensity.reshape(-1, 1, log_intensity.shape[-1])
        return self.head(self.unets(self.stem(curves))).reshape(log_intensity.shape)


class UNet(nn.Module):
    """One U-Net: as many channels and points out as in.

    Parameters
    ----------
    channels
        Channels of each level, from full resolution to the bottom.
    kernel
        Width of the convolutions, odd.
    """

    def __init__(self, channels: tuple[int, ...], kernel: int) -> None:
        super().__init__()
        levels = channels[:-1]
        inputs = (channels[0], *channels)
        self.down = nn.ModuleList(block(a, b, b, kernel) for a, b in zip(inputs, levels, strict=False))
        self.bottom = block(levels[-1], channels[-1], levels[-1], kernel)
        self.up = nn.ModuleList(block(b, b, a, kernel) for a, b in zip(inputs, levels, strict=False))
        self.pool = nn.MaxPool1d(2, return_indices=True)
        self.unpool = nn.MaxUnpool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features, shape (batch, channels, n), to features of the same shape."""
        skips: list[tuple[Tensor, Tensor]] = []
        for down in self.down:
            x = down(x)
            pooled, positions = self.pool(x)
            skips.append((x, positions))
            x = pooled
        x = self.bottom(x)
        for up, (skip, positions) in zip(reversed(self.up), reversed(skips), strict=True):
            # Pooling drops the last point of an odd length; the skip knows the length.
            x = up(self.unpool(x, positions, output_size=skip.shape) + skip)
        return x


def block(inputs: int, middle: int, outputs: int, kernel: int) -> nn.Sequential:
    """Two convolutions, each followed by a ReLU, that keep the number of points."""
    return nn.Sequential(
        nn.Conv1d(inputs, middle, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv1d(middle, outputs, kernel, padding=kernel // 2),
        nn.ReLU(),
    )

"""What a training or a benchmark ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["hardware"]


def hardware(device: str) -> str:
    """Name the processor behind a device of torch, and for a CPU the threads used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor() or platform.machine()
    return f"{processor}, threads: {torch.get_num_threads()}"

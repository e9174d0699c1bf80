"""Images to train on: simulated once and kept, exposed anew whenever they are looked at."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.icosahedra.images import exposed
from dsnet_bluesky.icosahedra.model import simulator_from
from dsnet_bluesky.icosahedra.network import RADIUS, Answer
from dsnet_bluesky.icosahedra.rotations import random_quaternions

from .recipe import Recipe

__all__ = ["SPLITS", "Images", "data_digest", "expose", "generator_of", "make_images"]

SPLITS = ("training", "validation", "test")
DEEPEST = -10.0
"""log10 of the least intensity kept, relative to the brightest pixel: far below one photon."""

CHUNK = 256
"""Images simulated between two reports."""


class Images(NamedTuple):
    """Images without noise, and what they show."""

    depth: Tensor
    """log10 of the intensity, 0 at the brightest pixel, in half precision, shape (image, y, x)."""
    radius: Tensor
    """In nm, shape (image,)."""
    quaternion: Tensor
    """Shape (image, 4)."""

    def batch(self, rows: Any, device: str) -> tuple[Tensor, Answer]:
        """Give intensities, 1 at the brightest pixel, and the truth."""
        depth, radius, quaternion = (part[rows].to(device) for part in self)
        return torch.pow(10.0, depth.float()), Answer(radius, quaternion)


def make_images(
    recipe: Recipe, split: str, directory: Path, device: str = "cpu", notify: Callable[[int, int], None] | None = None
) -> Images:
    """Simulate the images of a split, or read those that are there.

    Parameters
    ----------
    recipe
        Gives the seed, the simulator and the numbers.
    split
        training, validation or test: they share no image.
    directory
        Where they are kept.
    device
        Where to simulate.
    notify
        Called with the number made and the number wanted.

    Raises
    ------
    BadInput
        If those that are there were made by another recipe.
    """
    path = directory / f"{split}.safetensors"
    truth = _drawn(recipe, split)
    if path.exists():
        return _checked(Images(**load_file(path)), truth, path)
    simulator, count = simulator_from(recipe.simulator, device), len(truth.radius)
    depth = torch.empty(count, simulator.detector.pixels, simulator.detector.pixels, dtype=torch.float16)
    for first in range(0, count, CHUNK):
        rows = slice(first, first + CHUNK)
        depth[rows] = _depth(simulator(truth.radius[rows], truth.quaternion[rows])).cpu()
        if notify is not None:
            notify(min(first + CHUNK, count), count)
    images = Images(depth, truth.radius, truth.quaternion)
    with replacing(path) as partial:
        partial.write_bytes(save(images._asdict()))
    return images


def _drawn(recipe: Recipe, split: str) -> Answer:
    """Draw radii and orientations."""
    generator = generator_of(recipe.seed, SPLITS.index(split))
    count, beyond = getattr(recipe.data, split), recipe.data.beyond if split == "training" else 0.0
    low, high = RADIUS[0] - beyond, RADIUS[1] + beyond
    radius = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return Answer(radius.float(), random_quaternions(count, generator).float())


def _depth(intensity: Tensor) -> Tensor:
    relative = intensity / intensity.amax(dim=(-2, -1), keepdim=True)
    return relative.log10().clamp_min(DEEPEST).half()


def _checked(images: Images, truth: Answer, path: Path) -> Images:
    if not (torch.equal(images.radius, truth.radius) and torch.equal(images.quaternion, truth.quaternion)):
        raise BadInput(f"{path} was made by another recipe; delete it or give another directory.")
    return images


def generator_of(*numbers: int, device: str = "cpu") -> torch.Generator:
    """Give a generator that depends on several numbers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def data_digest(recipe: Recipe) -> str:
    """SHA-256 of what the images depend on: the simulator, radii and orientations of all splits."""
    sha = hashlib.sha256(json.dumps([recipe.simulator, asdict(recipe.data)], sort_keys=True).encode())
    for split in SPLITS:
        for part in _drawn(recipe, split):
            sha.update(part.numpy().tobytes())
    return sha.hexdigest()


def expose(intensity: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Draw doses and count photons, shape (image, y, x)."""
    low, high = (math.log(peak) for peak in recipe.data.peak)
    dose = torch.rand(len(intensity), generator=generator, device=intensity.device)
    return exposed(intensity, torch.exp(low + (high - low) * dose), generator)

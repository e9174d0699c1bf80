"""A network on its way: what a step does, how held-out frames judge it, and what is kept between two."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising.likelihood import SHARES, Views, deal_shares, deviance, expected, gaussian, loss, turned
from dsnet_bluesky.denoising.network import UNet
from dsnet_bluesky.denoising.paper import Halves, halves, paper_loss
from dsnet_bluesky.network import has_bfloat16
from dsnet_bluesky.training.checkpoints import resume_steps, save_steps

from .recipe import DenoiserRecipe
from .scan import Scan

__all__ = ["Look", "Training", "schedule"]

PARTS = ("network", "optimizer", "best")
"""Of a training, that a checkpoint holds."""

REPEATS = 4
"""How often the photons of a held-out frame are dealt."""

GAUSSIANS = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Standard deviations in pixels of the Gaussian filters that a network must be better than."""

SURE = 2.0
"""Standard errors, over frames, by which it must be better. Of 288 looks at small networks on their way (0.5, 2 and 8 photons a
pixel, 14 and 32 frames), judged by the truth of validation frames, those 1 to 2 errors better lost against the Gaussian in
8 % (16 % at half a photon), those more than 2 better in 1 %, those less than half an error better in 64 %."""

LEAST = 1e-3
"""Counts that are added to a smooth frame: one that says none would be infinitely surprised by a photon."""

WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""


class Look(NamedTuple):
    """What the held-out frames said after a step."""

    step: int
    training: float
    """Mean loss since the look before."""
    held_out: float
    """Poisson deviance a pixel of the photons kept; mean squared error for the published variant."""


class Training:
    """A network on its way: weights, optimiser, best weights so far, history.

    Parameters
    ----------
    recipe, scan
        What to do, and with what.
    device
        Where to do it. All that is drawn is drawn on the CPU, so that every device starts alike and sees the same.
    """

    def __init__(self, recipe: DenoiserRecipe, scan: Scan, device: str = "cpu") -> None:
        self.recipe, self.scan, self.device, self.half = recipe, scan, device, has_bfloat16(device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(recipe.seed)
            self.network = UNet(recipe.architecture).to(device)
        self.best = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        self.step = 0
        self.seconds = 0.0
        self.history: list[Look] = []

    @property
    def paper(self) -> bool:
        """Whether the published variant is trained."""
        return self.recipe.architecture.variant == "paper"

    @property
    def best_look(self) -> Look:
        """The look at which the held-out frames were met best."""
        return min(self.history, key=lambda look: look.held_out)

    def advance(self, steps: int) -> None:
        """Take steps, look at the held-out frames, and keep the weights if they are the best so far."""
        started = time.perf_counter()
        losses = [self._learn() for _ in range(steps)]
        self.history.append(Look(self.step, float(np.mean(losses)), float(self.held_out(self.network).mean())))
        if self.best_look is self.history[-1]:
            self.best.load_state_dict(self.network.state_dict())
        self.seconds += time.perf_counter() - started

    def _learn(self) -> float:
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * schedule(self.step / self.recipe.steps)
        # Seeded by the step, what is drawn needs no place in the checkpoint.
        rng = np.random.default_rng([self.recipe.seed, self.step])
        value = self._paper_loss(rng) if self.paper else self._loss(rng)
        self.optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return value.item()

    @cached_property
    def _readings(self) -> Tensor:
        return self._tensor(self.scan.readings)

    @cached_property
    def _views(self) -> Views:
        return Views(self._readings)

    def _loss(self, rng: np.random.Generator) -> Tensor:
        chosen = rng.choice(self.scan.training, self.recipe.batch)
        shown, kept, share = (self._tensor(part) for part in deal_shares(self.scan.folded[chosen], rng, SHARES))
        # Rings are of the whole frame, so pieces are cut out of its views.
        whole = torch.cat([self._views(shown), kept[:, None], self._readings.expand_as(kept)[:, None]], dim=1)
        pieces = torch.stack([_piece(frame, self.recipe.crop, rng) for frame in whole])
        with self._autocast():
            answer = expected(self.network, pieces[:, :-2])
        return loss(answer, pieces[:, -2], pieces[:, -1], share)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.half)

    @cached_property
    def _halves(self) -> Halves:
        return halves(self.scan.counts, self.scan.valid, product_mask=self.recipe.architecture.product_mask)

    def _paper_loss(self, rng: np.random.Generator) -> Tensor:
        chosen = rng.choice(self.scan.training, self.recipe.batch)
        both = np.stack([self._halves.left[chosen], self._halves.right[chosen]])
        axes = tuple(axis for axis, flipped in zip((-2, -1), rng.random(2) < 0.5, strict=True) if flipped)
        source, target = np.flip(both[:: rng.choice([-1, 1])], axes)
        with self._autocast():
            return paper_loss(self.network, self._tensor(source), self._tensor(target))

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32), device=self.device)

    def held_out(self, network: UNet) -> NDArray[np.float64]:
        """Judge the held-out frames, shape (frame,): Poisson deviance of the photons kept, or the published loss."""
        if self.paper:
            return self._paper_held_out(network)
        return self._judge(lambda shown: expected(network, self._views(shown)))

    @torch.inference_mode()
    def _paper_held_out(self, network: UNet) -> NDArray[np.float64]:
        left, right = (self._tensor(part[self.scan.held_out]) for part in (self._halves.left, self._halves.right))
        losses = [paper_loss(network, a[None], b[None]) for a, b in zip(left, right, strict=True)]
        return torch.stack(losses).double().cpu().numpy()

    @torch.inference_mode()
    def _judge(self, answer: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
        """Deviance of the kept half of the photons of each held-out frame; the photons are dealt the same way each time."""
        rng = np.random.default_rng(self.recipe.seed)
        found = []
        for number in self.scan.held_out:
            counts = np.repeat(self.scan.folded[number][None], REPEATS, axis=0)
            shown, kept, share = (self._tensor(part) for part in deal_shares(counts, rng, (0.5, 0.5)))
            found.append(deviance(answer(shown), kept, self._readings.expand_as(kept), share).mean())
        return torch.stack(found).double().cpu().numpy()

    def choose(self) -> Look:
        """Choose weights: the last ones, unless the held-out frames surely say that earlier ones were better.

        The learning rate has come to nothing then, and of looks that differ by less than their errors the lowest is so by chance:
        on validation frames of 10 photons a pixel the last weights were 0.02 to 0.13 dB better than those of the best look.
        """
        worse = self.held_out(self.network) - self.held_out(self.best)
        if not worse.mean() <= SURE * worse.std(ddof=1) / math.sqrt(worse.size):  # nor if they have come to NaN
            return self.best_look
        self.best.load_state_dict(self.network.state_dict())
        return self.history[-1]

    def judged(self) -> dict[str, float]:
        """Choose weights and give their figures.

        Raises
        ------
        BadInput
            If they are no better than a Gaussian filter.
        """
        look = self.choose()
        figures = {"steps": self.step, "kept_step": look.step, "training_loss": look.training}
        if self.paper:
            return {**figures, "held_out_mse": look.held_out}
        found = self.held_out(self.best)
        filters = {width: self._judge(lambda shown, w=width: self._smoothed(shown, w)) for width in GAUSSIANS}
        width = min(filters, key=lambda width: filters[width].mean())
        better = filters[width] - found
        error = better.std(ddof=1) / math.sqrt(better.size)
        if not better.mean() > SURE * error:
            raise BadInput(
                f"The network is no better than a Gaussian filter of {width:g} pixels on held-out photons, or not surely: "
                f"deviance {found.mean():.5f} against {filters[width].mean():.5f}, better by {better.mean() / error:.1f} errors, "
                f"and {SURE:g} are asked for. It might make frames worse. Train longer (steps), or on more frames or counts, in "
                "another directory."
            )
        return {
            **figures,
            "deviance": float(found.mean()),
            "deviance_gaussian": float(filters[width].mean()),
            "deviance_gain_error": float(error),
            "gaussian_width": width,
        }

    def _smoothed(self, shown: Tensor, width: float) -> Tensor:
        return gaussian(shown, (self._readings / 2).expand_as(shown), width) + LEAST

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        save_steps(path, self, PARTS, self.scan.digest)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one.

        Raises
        ------
        BadInput
            If the checkpoint was written by another recipe or with other frames.
        """
        resume_steps(path, self, PARTS, Look, self.scan.digest)


def schedule(part: float) -> float:
    """Part of the learning rate after a part of the steps."""
    if part < WARM_UP:
        return part / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (part - WARM_UP) / (1 - WARM_UP)))


def _piece(images: Tensor, crop: int, rng: np.random.Generator) -> Tensor:
    """Cut a square out of images (view, y, x) of one frame, in one of its eight orientations."""
    size = min(crop, *images.shape[-2:])
    y, x = (int(rng.integers(0, n - size + 1)) for n in images.shape[-2:])
    return turned(images[:, y : y + size, x : x + size], int(rng.integers(4)), mirrored=bool(rng.integers(2)))

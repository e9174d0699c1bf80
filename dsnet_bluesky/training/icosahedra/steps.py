"""A network on its way: what an epoch does, and what is kept between two."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsnet_bluesky.icosahedra.answers import answers
from dsnet_bluesky.icosahedra.images import VIEWS, augment, log_image, standardised, view, viewed_from
from dsnet_bluesky.icosahedra.network import LOSSES, Answer, ResNet, relative_errors
from dsnet_bluesky.icosahedra.rotations import misorientation
from dsnet_bluesky.network import has_bfloat16
from dsnet_bluesky.training.checkpoints import resume_steps, save_steps

from .images import Images, expose, generator_of
from .recipe import Recipe

__all__ = ["Progress", "Training"]

PARTS = ("network", "optimizer")
"""Of a training, that a checkpoint holds."""

WARM_UP = 0.03
"""Part of the steps over which the learning rate rises."""


class Progress(NamedTuple):
    """Where a training stands after an epoch, on plain validation images, the network asked once."""

    epoch: int
    loss: float
    validation: float
    """Mean relative error, in the fundamental domain as in the paper."""
    symmetric: float
    """The same, from the nearest equivalent."""
    misorientation: float
    """Median in degrees."""


class Training:
    """A network on its way.

    Parameters
    ----------
    recipe
        What to do.
    device
        Where to do it. The initial weights are drawn on the CPU, so that every device starts alike.
    """

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe, self.device, self.half = recipe, device, has_bfloat16(device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(recipe.seed)
            self.network = ResNet(recipe.architecture).to(device)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        schedule = recipe.schedule
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.steps = -(-recipe.data.training // schedule.batch) * schedule.epochs
        self.step = 0
        self.seconds = 0.0
        self.history: list[Progress] = []

    def epoch(self, training: Images, validation: Images) -> Progress:
        """Train for one epoch and look at the validation images."""
        started, number, schedule = time.perf_counter(), len(self.history) + 1, self.recipe.schedule
        # Seeded by the epoch, order and noise need no place in the checkpoint.
        order = torch.randperm(len(training.radius), generator=generator_of(self.recipe.seed, 10, number))
        generator = generator_of(self.recipe.seed, 11, number, device=self.device)
        self.network.train()
        losses = [self._learn(*self._drawn(training, rows, generator)) for rows in order.split(schedule.batch)]
        self.network.eval()
        self.history.append(Progress(number, float(np.mean(losses)), *self._look(validation)))
        self.seconds += time.perf_counter() - started
        return self.history[-1]

    def _drawn(self, training: Images, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Answer]:
        """Expose images and change them: a whole batch is seen from one side, drawn at random."""
        intensity, truth = training.batch(rows, self.device)
        number = int(torch.randint(VIEWS, (), generator=generator, device=self.device))
        image = view(log_image(expose(intensity, self.recipe, generator)), number)
        image = augment(image, generator, self.recipe.data.augmented)
        return standardised(image), truth._replace(quaternion=viewed_from(truth.quaternion, number))

    def _learn(self, image: Tensor, truth: Answer) -> float:
        schedule = self.recipe.schedule
        rate = min((self.step + 1) / (WARM_UP * self.steps), 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.half):
            answer = self.network.answer(image)
        loss = LOSSES[schedule.loss](answer, truth)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _look(self, validation: Images) -> tuple[float, float, float]:
        intensity, truth = validation.batch(slice(None), self.device)
        answer = answers(self.network, log_image(expose(intensity, self.recipe, generator_of(1, device=self.device))), views=1)
        away = [float(relative_errors(answer, truth, symmetric=symmetric).abs().mean()) for symmetric in (False, True)]
        return away[0], away[1], float(misorientation(answer.quaternion, truth.quaternion).median())

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        save_steps(path, self, PARTS)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one.

        Raises
        ------
        BadInput
            If the checkpoint was written by another recipe.
        """
        resume_steps(path, self, PARTS, Progress)

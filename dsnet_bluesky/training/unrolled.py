"""Training of the unrolled network: a library, sessions with random instruments, and steps through them.

Everything follows from the seed of the recipe. Sessions are written to the directory of the
training as they are made, by several processes, and kept when it is interrupted. The network learns
from those that are there while the others are being made.
"""

from __future__ import annotations

import copy
import csv
import datetime
import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.dsnet import extent
from dsnet_bluesky.features import INPUTS, VERSION
from dsnet_bluesky.library.examples import Session
from dsnet_bluesky.library.samples import digest_of_library, families_of, made_with
from dsnet_bluesky.network import has_bfloat16
from dsnet_bluesky.unrolled import Answer, Unrolled
from dsnet_bluesky.versions import WEIGHTS, load_model, sha256_of, write_card

from .checkpoints import resume_steps, save_steps
from .machine import hardware
from .recipes import Recipe
from .sessions import LIBRARY, make_repeats, prepare
from .uncertainty import calibrate, learn_parts, range_of

__all__ = ["Progress", "Training", "evaluate", "loss_of", "train"]

CHECKPOINT = "checkpoint.pt"

CHECKPOINT_EVERY = 1000
"""Steps between two checkpoints and looks at the validation families."""

SPARSE = 7
"""The range of training is described by one session in so many."""

ARRIVING = 0.75
"""Part of the steps over which sessions come in, evenly: a step sees the one that is new, or returns to one before."""

PARTS = ("network", "average", "optimizer")
"""Of a training, that a checkpoint holds."""

WARM_UP = 200
"""Steps over which the step size rises."""

BEYOND_WEIGHT = 0.1
"""Weight in the loss of nodes that nothing was measured at."""

FAR = 4.0
"""Errors of more than so many standard deviations count linearly."""

AVERAGE = 0.999
"""Weights are averaged over about 1 / (1 - AVERAGE) steps; the average is what is released."""


class Progress(NamedTuple):
    """Where a training stands: geometric means over validation curves of the mean squared error of ln I."""

    step: int
    loss: float
    validation: float
    untreated: float
    indirect: float
    inside: float
    """Share of validation points within one stated error."""
    inside_two: float
    """Within two."""


def loss_of(answer: Answer, ln_truth: Tensor, measured: Tensor) -> Tensor:
    """Loss of a batch.

    The likelihood of the truth under the stated errors, each point weighted with the root of its error (M. Seitzer
    et al., ICLR 2022, arXiv:2203.09168) so that neither hopeless nor easy points rule; far outliers
    count linearly; and, so that every U-Net knows where to go, the absolute error of what each proposes.

    Parameters
    ----------
    answer
        Of the network.
    ln_truth
        Shape (curve, m).
    measured
        1 at nodes near measured points, shape (m,).
    """
    weight = (measured + BEYOND_WEIGHT) / (measured + BEYOND_WEIGHT).sum() / len(ln_truth)
    error = answer.ln_I - ln_truth
    z = (error * torch.exp(-answer.ln_error)).abs()
    surprise = torch.where(z < FAR, 0.5 * z * z, FAR * z - 0.5 * FAR**2) + answer.ln_error
    likelihood = (weight * surprise * torch.exp(0.5 * answer.ln_error.detach())).sum()
    sizes = [(weight * torch.sqrt(e.square() + 1e-5)).sum() for e in (error, answer.first - ln_truth)]
    return likelihood + 0.3 * sizes[0] + 0.3 * sizes[1]


class Training:
    """A network on its way.

    Parameters
    ----------
    recipe
        What to do.
    device
        Where to do it.
    """

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe, self.device, self.half = recipe, device, has_bfloat16(device)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(recipe.seed)
            self.network = _first(recipe).to(device)
        self.average = copy.deepcopy(self.network)
        schedule = recipe.schedule
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.history: list[Progress] = []

    def learn(self, sessions: Sequence[Session], validation: Sequence[Session], directory: Path, notify: Any = None) -> None:
        """Take the steps that are left, with a checkpoint and a look at the validation curves now and then."""
        started, losses = time.perf_counter() - self.seconds, []
        while self.step < self.recipe.schedule.steps:
            losses.append(self._take(sessions[self._number(self.step, len(sessions))]))
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.recipe.schedule.steps:
                self.seconds = time.perf_counter() - started
                self.history.append(Progress(self.step, float(np.mean(losses)), *evaluate(self.average, validation)))
                losses = []
                self.save(directory / CHECKPOINT)
                if notify is not None:
                    notify(self.history[-1])

    def _number(self, step: int, count: int) -> int:
        """Tell which session a step sees; it follows from the seed and the step, and needs no place in the checkpoint."""
        first, last = (min(count, 1 + int(k * count / (ARRIVING * self.recipe.schedule.steps))) for k in (step - 1, step))
        if step == 0 or last > first:
            return last - 1
        return int(np.random.default_rng([self.recipe.seed, step, 3]).integers(last))

    def _take(self, session: Session) -> float:
        schedule = self.recipe.schedule
        rng = np.random.default_rng([self.recipe.seed, self.step, 2])
        chosen = torch.from_numpy(rng.permutation(len(session.ln_truth))[: schedule.batch])
        features, ln_truth = session.batch(chosen, self.device)
        progress = self.step / schedule.steps
        rate = schedule.learning_rate * min(1.0, (self.step + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.half):
            answer = self.network(session.operator, features)
        loss = loss_of(answer, ln_truth, session.operator.measured)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        share = 1 - min(AVERAGE, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            # All parameters in one call: a loop over them would cost a GPU as much time as the rest of the step.
            get_ema_multi_avg_fn(1 - share)(list(self.average.parameters()), list(self.network.parameters()), self.step)
        return loss.item()

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


def _first(recipe: Recipe) -> Unrolled:
    """Give the network of a recipe before its first step."""
    network = Unrolled(recipe.architecture)
    if recipe.begin:
        weights = load_file(load_model(recipe.begin).weights)
        learned = {name: tensor for name, tensor in weights.items() if not name.startswith("range.")}
        try:
            network.load_state_dict(_fitting(learned, network))
        except RuntimeError as error:
            raise BadInput(f"The recipe cannot begin with {recipe.begin}: that is a network of another shape.") from error
    return network


def _fitting(learned: dict[str, Tensor], network: Unrolled) -> dict[str, Tensor]:
    """Give one U-Net the weights of the first of two, which was never asked for an error and learns to state it; else all."""
    if network.refine is not None or not any(name.startswith("refine.") for name in learned):
        return learned
    given = {name: tensor for name, tensor in learned.items() if name.startswith("propose.")}
    fresh = network.state_dict()
    for name in ("propose.out.weight", "propose.out.bias"):
        given[name] = torch.cat([given[name][:2], fresh[name][2:]])
    return {**fresh, **given}


@torch.no_grad()
def evaluate(network: Unrolled, sessions: Iterable[Session]) -> tuple[float, float, float, float, float]:
    """Give the geometric means of the error, before and after, and the shares within one and two stated errors."""
    errors, inside = [], []
    for part in sessions:
        measured = part.operator.measured > 0
        features, ln_truth = part.batch(slice(None), part.operator.device)
        answer = network(part.operator, features)
        z = ((answer.ln_I - ln_truth) * torch.exp(-answer.ln_error))[:, measured].abs()
        inside.append([float((z < k).float().mean()) for k in (1, 2)])
        curves = (answer.ln_I, features.start, features.indirect)
        errors.append(torch.stack([(c - ln_truth)[:, measured].square().mean(dim=1) for c in curves], dim=1))
    means = torch.exp(torch.log(torch.cat(errors) + 1e-9).mean(dim=0)).tolist()
    shares = np.mean(inside, axis=0).tolist()
    return means[0], means[1], means[2], shares[0], shares[1]


def train(recipe: Recipe, directory: Path, *, device: str = "cpu", notify: Callable[[int, int, str], None] | None = None) -> None:
    """Follow a recipe: library, sessions, steps, uncertainty, and the folder of the model.

    Parameters
    ----------
    recipe
        What to do.
    directory
        Where everything is kept while it goes on, and where the model is written.
    device
        Where the network learns.
    notify
        See `training.train`.
    """
    say = notify or (lambda done, total, word: None)
    state = Training(recipe, device)
    state.resume(directory / CHECKPOINT)
    steps = recipe.schedule.steps
    words = "loss {:.3f}, validation {:.2g}"
    with prepare(recipe, directory, device, lambda done, total: say(done, total, "sessions")) as (sessions, validation):
        state.learn(sessions, validation, directory, lambda p: say(p.step, steps, words.format(p.loss, p.validation)))
        finish(recipe, directory, state, sessions, validation)


def finish(recipe: Recipe, directory: Path, state: Training, sessions: Sequence[Session], validation: Sequence[Session]) -> None:
    """Learn what the errors of a trained network are made of, and write the model."""
    started = time.perf_counter()
    network = state.average
    learn_parts(network, make_repeats(directory, recipe), recipe.seed, state.device)
    calibration = calibrate(network, validation)
    seen, farthest = range_of(network, sessions[::SPARSE], validation)
    state.seconds += time.perf_counter() - started
    tensors = {**network.state_dict(), **{f"range.{name}": tensor for name, tensor in seen.items()}}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    (directory / WEIGHTS).write_bytes(save(content))  # save_file would let nobody else read it
    (directory / "recipe.toml").write_text(recipe.source, encoding="utf-8")
    write_history(directory, state.history)
    card = describe(recipe, state, sha256_of(directory / WEIGHTS), sessions, directory)
    write_card(directory, {**card, "calibration": {**calibration, "farthest": round(farthest, 3)}})


def data_digest(directory: Path, recipe: Recipe) -> str:
    """Give the SHA-256 of all that the sessions and repeats of a training depend on, beside the program."""
    made_of = {
        **recipe.origin,
        "sessions": recipe.data.sessions,
        "validation_sessions": recipe.data.validation_sessions,
        "repeats": recipe.data.repeats,
        "features": VERSION,
        "library": digest_of_library(directory / LIBRARY),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def describe(recipe: Recipe, state: Training, sha256: str, sessions: Sequence[Session], directory: Path) -> dict[str, Any]:
    """Compose the card of a trained model, but for its calibration."""
    last = state.history[-1]
    widths, spans = zip(*(extent(part.operator.smearing) for part in sessions[::SPARSE]), strict=True)
    begun = {"begun_from": recipe.begin} if recipe.begin else {}
    return {
        "name": recipe.name,
        "version": recipe.version,
        "licence": recipe.licence,
        "weights_sha256": sha256,
        **recipe.card,
        "features": VERSION,
        "inputs": INPUTS,
        "architecture": {**recipe.architecture.to_dict(), "parameters": state.network.parameter_count},
        "data": {
            "sessions": recipe.data.sessions,
            "curves": sum(len(part.ln_truth) for part in sessions),
            **{split: families_of(split) for split in ("training", "validation", "test")},
            "sha256": data_digest(directory, recipe),
        },
        "ranges": {
            "points": list(recipe.data.points),
            "width_in_steps": round(float(np.quantile(widths, 0.995)), 1),
            "widths_in_range": round(float(np.quantile(spans, 0.005)), 1),
        },
        "figures": {name: float(f"{value:.4g}") for name, value in last._asdict().items()},
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(state.device),
            "seconds": round(state.seconds),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            "sasmodels": made_with(directory / LIBRARY),
            **begun,
        },
    }


def write_history(directory: Path, history: list[Progress]) -> None:
    """Write the progress of a training as CSV and as a figure."""
    with (directory / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Progress._fields)
        writer.writerows([p.step, *(f"{value:.6g}" for value in p[1:])] for p in history)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([p.step for p in history], [p.validation for p in history], label="validation families")
    axes.axhline(history[-1].indirect, color="C2", ls="--", label="the same by the indirect transform")
    axes.axhline(history[-1].untreated, color="0.5", ls="--", label="the same by 20 Richardson-Lucy steps")
    axes.set(xlabel="step", ylabel="geometric mean of the mean squared error of ln I", xlim=(0, history[-1].step * 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(directory / "history.png", dpi=150)

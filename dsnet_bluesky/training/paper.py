"""Pre-training of the published DSNet: the same recipe on the same machine gives the same weights."""

from __future__ import annotations

import copy
import csv
import datetime
import hashlib
import importlib.metadata
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dsnet_bluesky.library.families import form_factor
from dsnet_bluesky.network import DSNet, NetworkConfig
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.versions import WEIGHTS, sha256_of, write_card

from .checkpoints import begin, load_checkpoint, reading, save_checkpoint
from .machine import hardware

__all__ = ["Curves", "Epoch", "Recipe", "make_curves", "train"]

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY = 25
"""Epochs between two checkpoints."""


class Epoch(NamedTuple):
    """Mean losses of one pass over the training curves (mean squared error of ln I)."""

    epoch: int
    training: float
    validation: float


@dataclass(frozen=True)
class Range:
    """Equal steps from `first` to `last`, both included."""

    first: float
    last: float
    count: int

    def values(self) -> NDArray[np.float64]:
        """Give the `count` values."""
        return np.linspace(self.first, self.last, self.count)


@dataclass(frozen=True)
class DataRecipe:
    """Which curves to train on: one form factor of sasmodels, one of its parameters varied."""

    form_factor: str
    parameter: str
    values: Range
    background: float
    q: Range
    sigma: float
    oversampling: int
    validation: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """Every number of a training, and the words for its card."""

    name: str
    version: str
    licence: str
    seed: int
    architecture: NetworkConfig
    data: DataRecipe
    schedule: Schedule
    card: dict[str, Any]
    source: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from TOML.

        Raises
        ------
        BadInput
            If it is not TOML, or a key is missing or unknown.
        """
        with reading("models/dsnet-paper-1.0.0/recipe.toml"):
            values = tomllib.loads(text)
            data = values.pop("data")
            data["values"], data["q"] = Range(**data["values"]), Range(**data["q"])
            return cls(
                architecture=NetworkConfig.from_dict(values.pop("architecture")),
                data=DataRecipe(**data),
                schedule=Schedule(**values.pop("schedule")),
                source=text,
                **values,
            )


@dataclass(frozen=True)
class Curves:
    """Training curves, ln I on the q of the recipe, each of shape (curve, n), split by the seed."""

    smeared: NDArray[np.float32]
    ideal: NDArray[np.float32]
    training: NDArray[np.intp]
    validation: NDArray[np.intp]

    @property
    def digest(self) -> str:
        """SHA-256 of the curves and of their split."""
        sha = hashlib.sha256()
        for array in (self.smeared, self.ideal, self.training, self.validation):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    @property
    def log_range(self) -> list[float]:
        """Least and largest ln I that the network is given."""
        return [round(float(self.smeared.min()), 3), round(float(self.smeared.max()), 3)]

    @property
    def untreated(self) -> float:
        """Loss of the validation curves as they are, smeared."""
        return float(np.mean((self.smeared[self.validation] - self.ideal[self.validation]) ** 2))


def make_curves(recipe: Recipe) -> Curves:
    """Make the curves of a recipe.

    The ideal curve is computed `oversampling` times finer than q and beyond both
    its ends before it is smeared, so that the record's edges carry no error.
    """
    data = recipe.data
    q = data.q.values()
    step = (q[1] - q[0]) / data.oversampling
    fine = np.arange(step, q[-1] + 6 * data.sigma, step)
    smearing = Smearing.gaussian(q, data.sigma, q_calc=fine)
    fixed = {"background": data.background}
    on_fine, on_q = (
        np.array([form_factor(data.form_factor, grid, **fixed, **{data.parameter: value}) for value in data.values.values()])
        for grid in (fine, q)
    )
    order = np.random.default_rng(recipe.seed).permutation(data.values.count)
    held_out = max(1, round(data.validation * data.values.count))
    return Curves(
        smeared=np.log(smearing.apply(on_fine)).astype(np.float32),
        ideal=np.log(on_q).astype(np.float32),
        training=np.sort(order[held_out:]),
        validation=np.sort(order[:held_out]),
    )


def train(
    recipe: Recipe,
    directory: str | Path,
    *,
    device: str = "cpu",
    progress: Callable[[Epoch, int], None] | None = None,
) -> list[Epoch]:
    """Train a network by its recipe and write the folder of the model.

    The weights of the epoch with the least validation loss are kept. A training
    that was interrupted goes on from the checkpoint in `directory`.

    Parameters
    ----------
    recipe
        What to do.
    directory
        Where to write ``weights.safetensors``, ``model.toml``, ``README.md``,
        ``recipe.toml``, ``history.csv`` and ``history.png``.
    device
        ``"cpu"``, ``"cuda"`` or any other device of torch.
    progress
        Called after each epoch with its losses and the number of epochs.

    Returns
    -------
    list of Epoch
        The whole history.

    Raises
    ------
    BadInput
        If the directory holds a finished model or a checkpoint of another recipe,
        or sasmodels is not installed.
    """
    directory = begin(directory)
    curves = make_curves(recipe)
    state = TrainingState(recipe, device)
    state.resume(directory / CHECKPOINT)
    while len(state.history) < recipe.schedule.epochs:
        state.step(curves)
        if progress is not None:
            progress(state.history[-1], recipe.schedule.epochs)
        if len(state.history) % CHECKPOINT_EVERY == 0:
            state.save(directory / CHECKPOINT)
    write_model(directory, recipe, curves, state)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return state.history


class TrainingState:
    """A network on its way: weights, optimiser, best weights so far, history.

    Parameters
    ----------
    recipe
        What to do.
    device
        Where to do it. The initial weights are drawn on the CPU, so that every device starts alike.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe = recipe
        self.device = device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(recipe.seed)
            self.network = DSNet(recipe.architecture).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.schedule.learning_rate)
        self.best = copy.deepcopy(self.network.state_dict())
        self.history: list[Epoch] = []
        self.seconds = 0.0

    @property
    def best_epoch(self) -> Epoch:
        """The epoch whose weights are kept."""
        return min(self.history, key=lambda epoch: epoch.validation)

    def step(self, curves: Curves) -> None:
        """Train for one epoch and keep the weights if they are the best so far."""
        started = time.perf_counter()
        number = len(self.history) + 1
        # Seeded by the epoch, the order needs no place in the checkpoint.
        order = np.random.default_rng([self.recipe.seed, number]).permutation(curves.training)
        losses = [
            self._learn(*self._tensors(curves, order[i : i + self.recipe.schedule.batch]))
            for i in range(0, order.size, self.recipe.schedule.batch)
        ]
        with torch.no_grad():
            validation = float(self._loss(*self._tensors(curves, curves.validation)))
        self.history.append(Epoch(number, float(np.mean(losses)), validation))
        if self.best_epoch.epoch == number:
            self.best = copy.deepcopy(self.network.state_dict())
        self.seconds += time.perf_counter() - started

    def _tensors(self, curves: Curves, which: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(curves.smeared[which]).to(self.device),
            torch.from_numpy(curves.ideal[which]).to(self.device),
        )

    def _loss(self, smeared: Tensor, ideal: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(self.network(smeared), ideal)

    def _learn(self, smeared: Tensor, ideal: Tensor) -> float:
        loss = self._loss(smeared, ideal)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        save_checkpoint(
            path,
            {
                "recipe": self.recipe.source,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "history": [tuple(epoch) for epoch in self.history],
                "seconds": self.seconds,
            },
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one.

        Raises
        ------
        BadInput
            If the checkpoint was written by another recipe.
        """
        saved = load_checkpoint(path, self.recipe.source, self.device)
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        self.history = [Epoch(*epoch) for epoch in saved["history"]]
        self.seconds = saved["seconds"]


def write_model(directory: Path, recipe: Recipe, curves: Curves, state: TrainingState) -> None:
    """Write the folder of a trained model; the card comes last, so a folder with a card is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.best.items()}
    (directory / WEIGHTS).write_bytes(save(weights))  # save_file would let nobody else read it
    (directory / "recipe.toml").write_text(recipe.source, encoding="utf-8")
    write_history(directory, state.history, state.best_epoch, curves.untreated)
    card = describe(recipe, curves, state, sha256_of(directory / WEIGHTS))
    write_card(directory, card)


def describe(recipe: Recipe, curves: Curves, state: TrainingState, sha256: str) -> dict[str, Any]:
    """Compose the card of a trained model as plain values."""
    best = state.best_epoch
    data = asdict(recipe.data)
    return {
        "name": recipe.name,
        "version": recipe.version,
        "licence": recipe.licence,
        "weights_sha256": sha256,
        **recipe.card,
        "inputs": {
            "summary": "ln of the smeared intensity at equal steps of q, and nothing else.",
            "dims": ["curve", "q"],
            "channels": 1,
            "units": {"q": "1/nm", "I": "1/cm"},
        },
        "architecture": {**recipe.architecture.to_dict(), "parameters": state.network.parameter_count},
        "data": {**data, "training": curves.training.size, "validation": curves.validation.size, "sha256": curves.digest},
        "ranges": {
            "q": [recipe.data.q.first, recipe.data.q.last],
            "points": recipe.data.q.count,
            "ln_I": curves.log_range,
            "sigma": recipe.data.sigma,
        },
        "figures": {
            "epoch": best.epoch,
            "epochs": len(state.history),
            "training_loss": float(f"{best.training:.6g}"),
            "validation_loss": float(f"{best.validation:.6g}"),
            "validation_loss_untreated": float(f"{curves.untreated:.6g}"),
        },
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(state.device),
            "seconds": round(state.seconds),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "sasmodels")},
        },
    }


def write_history(directory: Path, history: list[Epoch], best: Epoch, untreated: float) -> None:
    """Write the losses of every epoch as CSV and as a figure."""
    with (directory / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Epoch._fields)
        writer.writerows((e.epoch, f"{e.training:.6g}", f"{e.validation:.6g}") for e in history)
    epochs = [e.epoch for e in history]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(epochs, [e.training for e in history], label="training")
    axes.semilogy(epochs, [e.validation for e in history], label="validation")
    axes.axhline(untreated, color="0.5", ls="--", label="validation curves, left smeared")
    axes.plot(best.epoch, best.validation, "o", color="C1", mfc="none", label=f"kept: epoch {best.epoch}, {best.validation:.3g}")
    axes.set(xlabel="epoch", ylabel="mean squared error of ln I", xlim=(0, epochs[-1] * 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(directory / "history.png", dpi=150)

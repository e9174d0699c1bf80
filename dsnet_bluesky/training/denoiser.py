"""Training of a denoiser on the frames of a scan: self-supervised, by the symmetry of the frames themselves.

No clean frame is needed (`denoising.likelihood`). Some frames are held out; the network of the step that
makes their kept photons most likely is kept. It becomes a model only if it does that better than a
Gaussian filter whose width was chosen on the same photons: trained too little, or on too few photons, a network is worse.
"""

from __future__ import annotations

import copy
import csv
import datetime
import hashlib
import importlib.metadata
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import save
from torch import Tensor

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising import FRIEDEL, MINIMUM_COUNTS, tested
from dsnet_bluesky.denoising.likelihood import SHARES, deal_shares, deviance, expected, gaussian, loss
from dsnet_bluesky.denoising.network import DenoiserConfig, UNet
from dsnet_bluesky.denoising.paper import Halves, halves, paper_loss
from dsnet_bluesky.denoising.symmetry import CentredGrid, SymmetryTest, check_counts, fold
from dsnet_bluesky.network import check_device
from dsnet_bluesky.versions import WEIGHTS, sha256_of, write_card
from dsnet_bluesky.versions.readme import to_toml

from .checkpoints import begin, load_checkpoint, reading, save_checkpoint
from .machine import hardware

__all__ = ["DenoiserRecipe", "Scan", "prepare_scan", "schedule", "train_denoiser"]

CHECKPOINT = "checkpoint.pt"
EVERY = 100
"""Steps between two looks at the held-out frames, and between two checkpoints."""

MINIMUM_FRAMES = 12
"""Frames that a scan must have to train on."""

LEAST_HELD_OUT = 3
REPEATS = 4
"""How often the photons of a held-out frame are dealt."""

WIDTHS = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
"""Standard deviations in pixels of the Gaussian filters that a network must be better than."""

SURE = 1.0
"""Standard errors, over frames, by which it must be better; frames differ by more than their photons do."""

WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""

RANGE = 1.5
"""Frames with so many times more or fewer counts than those of the training are still in its range."""

SUMMARY = "Denoises weak small-angle frames by their symmetry; trained on the frames of one scan, without clean ones."
USE = (
    "Frames of the same detector, sample system and dose: for sectors, orientation maps and display. "
    "Over full rings integrate raw frames."
)
LIMITS = [
    "The pattern must have Friedel's symmetry about the given centre; frames that break it are refused.",
    "Denoised pixels are correlated over several pixels: their errors come from a parametric bootstrap (denoising.sectors), "
    "which cannot see bias.",
    "Structure that is narrower than the network's experience, and fainter than the noise of two mates, is smoothed away.",
]
INPUTS = {
    "symmetry": {
        "summary": "Square roots of the counts of a pixel and its mate and of their Gaussian mean, each plus 3/8; "
        "how many of the two count.",
        "dims": ["exposure", "channel", "y", "x"],
        "channels": 3,
        "units": {"counts": "photons per pixel"},
    },
    "paper": {
        "summary": "One half of a centred frame, divided by the frame's maximum.",
        "dims": ["exposure", "channel", "y", "x"],
        "channels": 1,
        "units": {"counts": "photons per pixel"},
    },
}


class Look(NamedTuple):
    """What the held-out frames said after a step."""

    step: int
    training: float
    """Mean loss since the look before."""
    held_out: float
    """Poisson deviance a pixel of the photons kept; mean squared error for the published variant."""


@dataclass(frozen=True)
class DenoiserRecipe:
    """Every number of a training.

    Parameters
    ----------
    name, version, licence
        Of the model.
    seed
        Of everything that is drawn.
    steps, batch, crop
        Steps, frames a step, and rows and columns that are cut out of each.
    learning_rate
        The highest, of Adam; it rises, then falls as a cosine.
    held_out
        Part of the frames that are held out.
    architecture
        Shape of the network, and the variant.
    """

    name: str = "symmetry-denoiser"
    version: str = "1.0.0"
    licence: str = "BSD-3-Clause"
    seed: int = 1
    steps: int = 1500
    batch: int = 16
    crop: int = 64
    learning_rate: float = 3e-3
    held_out: float = 0.15
    architecture: DenoiserConfig = field(default_factory=DenoiserConfig)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a recipe from TOML.

        Raises
        ------
        BadInput
            If it is not TOML, or a key is unknown.
        """
        with reading("recipe.toml of a trained denoiser"):
            values = tomllib.loads(text)
            return cls(architecture=DenoiserConfig.from_dict(values.pop("architecture")), **values)

    @property
    def source(self) -> str:
        """The recipe as TOML."""
        plain = {**asdict(self), "architecture": self.architecture.to_dict()}
        return to_toml(plain)

    @classmethod
    def of(cls, variant: str, **changes: Any) -> Self:
        """Give the default of a variant, with changes; the published one learns with Adam's 1e-3 from whole halves."""
        architecture = DenoiserConfig.of(variant)  # type: ignore[arg-type]
        published = {"learning_rate": 1e-3, "batch": 8} if variant == "paper" else {}
        return cls(architecture=architecture, **{**published, **changes})


@dataclass(frozen=True)
class Scan:
    """Frames of a scan, ready to train on."""

    counts: NDArray[np.int64]
    """Centred, shape (exposure, Y, X)."""
    valid: NDArray[np.bool_]
    """Pixels that count, shape (Y, X)."""
    symmetry: SymmetryTest
    counts_per_pixel: NDArray[np.float64]
    """Of each frame."""
    training: NDArray[np.intp]
    held_out: NDArray[np.intp]

    @cached_property
    def folded(self) -> NDArray[np.int32]:
        """Photons of both mates, shape (exposure, Y, X)."""
        return fold(self.counts, self.valid).counts.astype(np.int32)

    @cached_property
    def readings(self) -> NDArray[np.float32]:
        """How many mates count, shape (Y, X)."""
        return fold(self.counts[:1], self.valid).readings.astype(np.float32)

    @property
    def digest(self) -> str:
        """SHA-256 of the centred frames, of the pixels that count and of the split."""
        sha = hashlib.sha256()
        for array in (self.counts, self.valid, self.training, self.held_out):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def prepare_scan(
    frames: ArrayLike, centre: tuple[float, float], mask: NDArray[np.bool_] | None, *, seed: int = 1, held_out: float = 0.15
) -> Scan:
    """Centre the frames of a scan, test their symmetry, and hold some out.

    Parameters
    ----------
    frames, centre, mask
        As of `train_denoiser`.
    seed
        Decides which are held out.
    held_out
        Part of the frames.

    Raises
    ------
    BadInput
        If there are too few frames or counts, or they are not symmetric about the centre.
    """
    counts, masked = check_counts(frames, mask)
    mean = counts.sum(axis=(1, 2)) / (~masked).sum()
    if len(counts) < MINIMUM_FRAMES:
        raise BadInput(
            f"The scan has {len(counts)} frames; {MINIMUM_FRAMES} at least are needed to train a denoiser. Take the frames of "
            "several runs of the same detector and sample system, or a Gaussian filter."
        )
    if mean.mean() < MINIMUM_COUNTS:
        raise BadInput(
            f"The frames hold {mean.mean():.3g} counts a pixel; {MINIMUM_COUNTS:g} at least are needed to train a denoiser. "
            "Expose longer, or sum frames."
        )
    grid = CentredGrid(masked.shape, (float(centre[0]), float(centre[1])))  # type: ignore[arg-type]
    centred, valid = grid.deal(counts), grid.valid(masked)
    symmetry = tested(counts, masked, grid, centred, valid)
    order = np.random.default_rng(seed).permutation(len(counts))
    few = max(LEAST_HELD_OUT, round(held_out * len(counts)))
    return Scan(centred, valid, symmetry, mean, np.sort(order[few:]), np.sort(order[:few]))


def train_denoiser(
    frames: ArrayLike,
    directory: str | Path,
    *,
    centre: tuple[float, float],
    mask: NDArray[np.bool_] | None = None,
    recipe: DenoiserRecipe | None = None,
    seed: int | None = None,
    runs: Sequence[str] = (),
    device: str = "cpu",
    notify: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train a denoiser on the frames of a scan and write the folder of the model.

    A training that was interrupted goes on from the checkpoint in `directory`.

    Parameters
    ----------
    frames
        Counts, shape (exposure, y, x); negative pixels (gaps) do not count.
    directory
        Where to write ``weights.safetensors``, ``model.toml``, ``README.md``, ``recipe.toml``, ``history.csv`` and
        ``history.png``.
    centre
        The beam (y, x) in pixels; the middle of the first pixel is at 0.5.
    mask
        True where a pixel does not count, shape (y, x).
    recipe
        Every number of the training; `DenoiserRecipe.of` gives that of the published variant.
    seed
        In place of the recipe's.
    runs
        Unique ids of the runs that the frames are of, for the card.
    device
        Any device of torch.
    notify
        Called now and then with what is done, how much there is to do, and a word about it.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    BadInput
        If the frames are too few, too weak or not symmetric about the centre, the directory holds a finished model or a
        checkpoint of another training, or the network became no better than a Gaussian filter (then no model is written).
    """
    check_device(device)
    recipe = recipe or DenoiserRecipe()
    recipe = recipe if seed is None else replace(recipe, seed=seed)
    scan = prepare_scan(frames, centre, mask, seed=recipe.seed, held_out=recipe.held_out)
    directory = begin(directory)
    state = Training(recipe, scan, device)
    state.resume(directory / CHECKPOINT)
    while state.step < recipe.steps:
        state.advance(min(EVERY, recipe.steps - state.step))
        state.save(directory / CHECKPOINT)
        if notify is not None:
            look = state.history[-1]
            notify(look.step, recipe.steps, f"loss {look.training:.4g}, held out {look.held_out:.5g}")
    figures = state.judged()
    write_model(directory, recipe, scan, state, figures, runs)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return directory


class Training:
    """A network on its way: weights, optimiser, best weights so far, history.

    Parameters
    ----------
    recipe, scan
        What to do, and with what.
    device
        Where to do it. All that is drawn is drawn on the CPU, so that every device starts alike and sees the same.
    """

    def __init__(self, recipe: DenoiserRecipe, scan: Scan, device: str) -> None:
        self.recipe, self.scan, self.device = recipe, scan, device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(recipe.seed)
            self.network = UNet(recipe.architecture).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        self.best = copy.deepcopy(self.network.state_dict())
        self.history: list[Look] = []
        self.seconds = 0.0

    @property
    def paper(self) -> bool:
        """Whether the published variant is trained."""
        return self.recipe.architecture.variant == "paper"

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.history[-1].step if self.history else 0

    @property
    def best_look(self) -> Look:
        """The look whose weights are kept."""
        return min(self.history, key=lambda look: look.held_out)

    def advance(self, steps: int) -> None:
        """Take steps, look at the held-out frames, and keep the weights if they are the best so far."""
        started, first = time.perf_counter(), self.step
        losses = [self._learn(number) for number in range(first + 1, first + steps + 1)]
        self.history.append(Look(first + steps, float(np.mean(losses)), float(self.held_out().mean())))
        if self.best_look is self.history[-1]:
            self.best = copy.deepcopy(self.network.state_dict())
        self.seconds += time.perf_counter() - started

    def _learn(self, number: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * schedule(number / self.recipe.steps)
        # Seeded by the step, what is drawn needs no place in the checkpoint.
        rng = np.random.default_rng([self.recipe.seed, number])
        value = self._paper_loss(rng) if self.paper else self._loss(rng)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return value.item()

    def _loss(self, rng: np.random.Generator) -> Tensor:
        chosen = rng.choice(self.scan.training, self.recipe.batch)
        pieces = [_piece(self.scan.folded[k], self.scan.readings, self.recipe.crop, rng) for k in chosen]
        counts, readings = (np.stack(part) for part in zip(*pieces, strict=True))
        shown, kept, share = deal_shares(counts, rng, SHARES)
        shown, kept, share, readings = (self._tensor(part) for part in (shown, kept, share, readings))
        return loss(expected(self.network, shown, readings), kept, readings, share)

    @cached_property
    def _halves(self) -> Halves:
        return halves(self.scan.counts, self.scan.valid, product_mask=self.recipe.architecture.product_mask)

    def _paper_loss(self, rng: np.random.Generator) -> Tensor:
        chosen = rng.choice(self.scan.training, self.recipe.batch)
        both = np.stack([self._halves.left[chosen], self._halves.right[chosen]])
        axes = tuple(axis for axis, flipped in zip((-2, -1), rng.random(2) < 0.5, strict=True) if flipped)
        source, target = np.flip(both[:: rng.choice([-1, 1])], axes)
        return paper_loss(self.network, self._tensor(source), self._tensor(target))

    def _tensor(self, array: NDArray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, dtype=np.float32), device=self.device)

    def held_out(self) -> NDArray[np.float64]:
        """Judge the held-out frames, shape (frame,): Poisson deviance of the photons kept, or the published loss."""
        if self.paper:
            return self._paper_held_out()
        return self._judge(lambda shown, readings: expected(self.network, shown, readings))

    @torch.inference_mode()
    def _paper_held_out(self) -> NDArray[np.float64]:
        left, right = (self._tensor(part[self.scan.held_out]) for part in (self._halves.left, self._halves.right))
        losses = [paper_loss(self.network, a[None], b[None]) for a, b in zip(left, right, strict=True)]
        return torch.stack(losses).double().cpu().numpy()

    @torch.inference_mode()
    def _judge(self, answer: Callable[[Tensor, Tensor], Tensor]) -> NDArray[np.float64]:
        """Deviance of the kept half of the photons of each held-out frame; the photons are dealt the same way each time."""
        rng = np.random.default_rng(self.recipe.seed)
        found = []
        for number in self.scan.held_out:
            counts = np.repeat(self.scan.folded[number][None], REPEATS, axis=0)
            shown, kept, share = (self._tensor(part) for part in deal_shares(counts, rng, (0.5, 0.5)))
            readings = self._tensor(self.scan.readings).expand_as(shown)
            found.append(deviance(answer(shown, readings), kept, readings, share).mean())
        return torch.stack(found).double().cpu().numpy()

    def judged(self) -> dict[str, float]:
        """Give the figures of the best weights.

        Raises
        ------
        BadInput
            If they are no better than a Gaussian filter.
        """
        best = self.best_look
        figures = {"steps": self.step, "best_step": best.step, "training_loss": best.training}
        if self.paper:
            return {**figures, "held_out_mse": best.held_out}
        self.network.load_state_dict(self.best)
        found = self.held_out()
        filters = {width: self._judge(lambda n, r, w=width: gaussian(n, r / 2, w) + 1e-3) for width in WIDTHS}
        width = min(filters, key=lambda width: filters[width].mean())
        better = filters[width] - found
        error = better.std(ddof=1) / math.sqrt(better.size)
        if not better.mean() > SURE * error:
            raise BadInput(
                f"The network explains held-out photons no better than a Gaussian filter of {width:g} pixels "
                f"(deviance {found.mean():.5f} against {filters[width].mean():.5f}, +- {error:.5f}): it would make the frames "
                "worse. Train longer (steps), or on more frames or counts, in another directory."
            )
        return {
            **figures,
            "deviance": float(found.mean()),
            "deviance_gaussian": float(filters[width].mean()),
            "deviance_gain_error": float(error),
            "gaussian_width": width,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        content = {"recipe": self._identity, "history": [tuple(look) for look in self.history], "seconds": self.seconds}
        content |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        save_checkpoint(path, content)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one.

        Raises
        ------
        BadInput
            If the checkpoint was written by another recipe or with other frames.
        """
        saved = load_checkpoint(path, self._identity, self.device)
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best, self.seconds = saved["best"], saved["seconds"]
        self.history = [Look(*look) for look in saved["history"]]

    @cached_property
    def _identity(self) -> str:
        return f"{self.recipe.source}# frames {self.scan.digest}"


def schedule(part: float) -> float:
    """Part of the learning rate after a part of the steps."""
    if part < WARM_UP:
        return part / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (part - WARM_UP) / (1 - WARM_UP)))


def _piece(counts: NDArray, readings: NDArray, crop: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Cut a piece out of a frame, one of its eight orientations."""
    size = min(crop, *counts.shape)
    y, x = (int(rng.integers(0, n - size + 1)) for n in counts.shape)
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    turned = [np.rot90(part[y : y + size, x : x + size], turns) for part in (counts, readings)]
    first, second = (part[:, ::-1] if mirrored else part for part in turned)
    return first, second


def write_model(
    directory: Path, recipe: DenoiserRecipe, scan: Scan, state: Training, figures: dict[str, float], runs: Sequence[str]
) -> None:
    """Write the folder of a trained model; the card comes last, so a folder with a card is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.best.items()}
    (directory / WEIGHTS).write_bytes(save(weights))
    (directory / "recipe.toml").write_text(recipe.source, encoding="utf-8")
    write_history(directory, state.history, figures.get("deviance_gaussian"))
    write_card(directory, describe(recipe, scan, state, figures, runs, sha256_of(directory / WEIGHTS)))


def describe(
    recipe: DenoiserRecipe, scan: Scan, state: Training, figures: dict[str, float], runs: Sequence[str], sha256: str
) -> dict[str, Any]:
    """Compose the card of a trained model as plain values."""
    mean = scan.counts_per_pixel
    symmetry = {"chi2_symmetry": scan.symmetry.chi2, "chi2_symmetry_error": scan.symmetry.error}
    return {
        "name": recipe.name,
        "version": recipe.version,
        "licence": recipe.licence,
        "weights_sha256": sha256,
        "summary": SUMMARY if not state.paper else f"{SUMMARY} The published algorithm, for comparison.",
        "use": USE,
        "limits": LIMITS,
        "symmetry": {"needs": [FRIEDEL]},
        "inputs": INPUTS[recipe.architecture.variant],
        "architecture": {**recipe.architecture.to_dict(), "parameters": state.network.parameter_count},
        "data": {
            "frames": len(scan.counts),
            "training": int(scan.training.size),
            "held_out": int(scan.held_out.size),
            "pixels": list(scan.valid.shape),
            "runs": list(runs),
            "sha256": scan.digest,
        },
        "ranges": {"counts_per_pixel": [_short(mean.min() / RANGE), _short(mean.max() * RANGE)]},
        "figures": {name: _short(value) for name, value in {**figures, **symmetry}.items()},
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(state.device),
            "seconds": round(state.seconds),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def write_history(directory: Path, history: list[Look], filtered: float | None) -> None:
    """Write the losses as CSV and as a figure."""
    with (directory / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Look._fields)
        writer.writerows((look.step, f"{look.training:.6g}", f"{look.held_out:.6g}") for look in history)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([look.step for look in history], [look.held_out for look in history], "o-", label="held-out frames")
    if filtered is not None:
        axes.axhline(filtered, color="0.5", ls="--", label="best Gaussian filter")
    axes.set(xlabel="step", ylabel="loss of held-out photons, a pixel")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(directory / "history.png", dpi=120)

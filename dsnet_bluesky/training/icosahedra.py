"""Training of the model ``icosahedra``: images are simulated, exposed and augmented, and a network learns to read them.

Images are simulated once and kept (without noise, as the logarithm in half precision). Every epoch turns and mirrors them
anew, draws another dose and other noise, and changes a share of them by one of the eleven augmentations.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import importlib.metadata
import json
import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.icosahedra.answers import answers, score
from dsnet_bluesky.icosahedra.images import VIEWS, augment, exposed, log_image, standardised, view, viewed_from
from dsnet_bluesky.icosahedra.model import Calibration, simulator_from
from dsnet_bluesky.icosahedra.network import LOSSES, RADIUS, Answer, NetworkConfig, ResNet, relative_errors
from dsnet_bluesky.icosahedra.rotations import misorientation, random_quaternions
from dsnet_bluesky.network import has_bfloat16
from dsnet_bluesky.versions import WEIGHTS, sha256_of, write_card

from .checkpoints import begin, load_checkpoint, save_checkpoint
from .machine import hardware

__all__ = ["Images", "Progress", "Recipe", "figures_of", "make_images", "train"]

CHECKPOINT = "checkpoint.pt"
SPLITS = ("training", "validation", "test")
DEEPEST = -10.0
"""log10 of the least intensity kept, relative to the brightest pixel: far below one photon."""
WARM_UP = 0.03
"""Part of the steps over which the learning rate rises."""
CHUNK = 256
"""Images simulated between two reports."""


@dataclass(frozen=True)
class DataRecipe:
    """Which images to train on.

    Parameters
    ----------
    training, validation, test
        How many images.
    beyond
        How far the radii of training go beyond the range of the model at both ends, in nm.
    peak
        Photons in the brightest pixel, from and to, drawn uniformly in their logarithm; one photon per pixel is background.
    augmented
        Share of training images that are changed by an augmentation.
    """

    training: int
    validation: int
    test: int
    beyond: float
    peak: tuple[float, float]
    augmented: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, the learning rate falling as a cosine."""

    loss: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """Every number of a training, and the words for its card."""

    name: str
    version: str
    licence: str
    seed: int
    architecture: NetworkConfig
    simulator: dict[str, Any]
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
        try:
            values = tomllib.loads(text)
            data = values.pop("data")
            data["peak"] = tuple(data["peak"])
            recipe = cls(
                architecture=NetworkConfig.from_dict(values.pop("architecture")),
                data=DataRecipe(**data),
                schedule=Schedule(**values.pop("schedule")),
                source=text,
                **values,
            )
        except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
            raise BadInput(
                f"The recipe cannot be read ({error}); compare it with models/icosahedra-1.0.0/recipe.toml."
            ) from error
        if recipe.schedule.loss not in LOSSES:
            raise BadInput(f"There is no loss {recipe.schedule.loss!r}; take {' or '.join(LOSSES)}.")
        simulator_from(recipe.simulator)
        return recipe

    @property
    def numbers(self) -> str:
        """The recipe without the words for its card: what a checkpoint depends on."""
        return self.source.partition("[card]")[0]


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
    generator = _generator(recipe.seed, SPLITS.index(split))
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


def _generator(*numbers: int, device: str = "cpu") -> torch.Generator:
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
        order = torch.randperm(len(training.radius), generator=_generator(self.recipe.seed, 10, number))
        generator = _generator(self.recipe.seed, 11, number, device=self.device)
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
        answer = answers(self.network, log_image(expose(intensity, self.recipe, _generator(1, device=self.device))), views=1)
        away = [float(relative_errors(answer, truth, symmetric=symmetric).abs().mean()) for symmetric in (False, True)]
        return away[0], away[1], float(misorientation(answer.quaternion, truth.quaternion).median())

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash while writing leaves the one before."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "optimizer")}
        history = [tuple(progress) for progress in self.history]
        save_checkpoint(
            path, {**state, "step": self.step, "seconds": self.seconds, "history": history, "recipe": self.recipe.numbers}
        )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one.

        Raises
        ------
        BadInput
            If the checkpoint was written by another recipe.
        """
        saved = load_checkpoint(path, self.recipe.numbers, self.device)
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.history = [Progress(*progress) for progress in saved["history"]]


def train(recipe: Recipe, directory: str | Path, *, device: str = "cpu", notify: Any = None) -> list[Progress]:
    """Train a network by its recipe and write the folder of the model.

    A training that was interrupted goes on from the checkpoint in `directory`; images are kept there too.

    Parameters
    ----------
    recipe
        What to do.
    directory
        Where to write ``weights.safetensors``, ``model.toml``, ``README.md``, ``recipe.toml``, ``history.csv``, ``history.png``.
    device
        Any device of torch.
    notify
        Called now and then with what is done, how much there is to do, and a word about it.

    Returns
    -------
    list of Progress
        The whole history.

    Raises
    ------
    BadInput
        If the directory holds a finished model, or images or a checkpoint of another recipe.
    """
    directory = begin(directory)
    say = notify or (lambda done, total, word: None)
    training, validation, test = (
        make_images(recipe, split, directory, device, lambda done, total, split=split: say(done, total, f"{split} images"))
        for split in SPLITS
    )
    state = Training(recipe, device)
    state.resume(directory / CHECKPOINT)
    words = "loss {:.4g}, validation {:.2%}, modulo the group {:.2%}, misorientation {:.2f} degrees"
    while len(state.history) < recipe.schedule.epochs:
        found = state.epoch(training, validation)
        state.save(directory / CHECKPOINT)
        say(found.epoch, recipe.schedule.epochs, words.format(*found[1:]))
    state.network.eval()
    write_model(directory, state, validation, test)
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return state.history


def figures_of(answer: Answer, truth: Answer) -> dict[str, float]:
    """Figures of merit.

    The relative errors are those of the paper: of each of the five parameters in its range, their mean and the largest of the
    five, averaged over images, the quaternions in the fundamental domain. Those named symmetric are taken from the equivalent of
    the true quaternion nearest to the answer.
    """
    inside, nearest = (relative_errors(answer, truth, symmetric=symmetric).abs() for symmetric in (False, True))
    angle, away = misorientation(answer.quaternion, truth.quaternion), (answer.radius - truth.radius).abs()
    found = {
        "mean_relative_error": inside.mean(),
        "maximum_relative_error": inside.amax(dim=-1).mean(),
        "median_relative_error": inside.mean(dim=-1).median(),
        "mean_relative_error_symmetric": nearest.mean(),
        "maximum_relative_error_symmetric": nearest.amax(dim=-1).mean(),
        "radius_error": away.mean(),
        "radius_error_95": away.quantile(0.95),
        "misorientation": angle.median(),
        "misorientation_95": angle.quantile(0.95),
    }
    return {name: float(f"{float(value):.4g}") for name, value in found.items()}


def _exposed_split(state: Training, images: Images, seed: int, share: float) -> tuple[Tensor, Tensor, Answer]:
    """Expose images of a split; a share is augmented. Gives counts, the network's images, and the truth."""
    generator = _generator(state.recipe.seed, seed, device=state.device)
    intensity, truth = images.batch(slice(None), state.device)
    counts = expose(intensity, state.recipe, generator)
    return counts, augment(log_image(counts), generator, share) if share else log_image(counts), truth


def write_model(directory: Path, state: Training, validation: Images, test: Images) -> None:
    """Write the folder of a trained model; the card comes last, so a folder with a card is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.network.state_dict().items()}
    (directory / WEIGHTS).write_bytes(save(weights))  # save_file would let nobody else read it
    (directory / "recipe.toml").write_text(state.recipe.source, encoding="utf-8")
    write_history(directory, state.history)
    figures: dict[str, float] = {}
    for split, images, seed in (("validation", validation, 20), ("test", test, 21)):
        _, image, truth = _exposed_split(state, images, seed, 0.0)
        for views in (1, VIEWS):
            found = figures_of(answers(state.network, image, views), truth)
            figures |= {f"{split}_{name}{'_one_view' if views == 1 else ''}": value for name, value in found.items()}
    write_card(directory, describe(state, calibrated(state, validation), figures, sha256_of(directory / WEIGHTS)))


def calibrated(state: Training, validation: Images) -> Calibration:
    """Measure errors by radius and score on validation images that are exposed as those of training were."""
    simulator = simulator_from(state.recipe.simulator, state.device)
    counts, image, truth = _exposed_split(state, validation, 22, 0.0)
    answer = answers(state.network, image)
    return Calibration.measured(answer, truth, score(simulator, counts, answer))


def describe(state: Training, calibration: Calibration, figures: dict[str, float], sha256: str) -> dict[str, Any]:
    """Compose the card of a trained model as plain values."""
    recipe = state.recipe
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe.data).items()}
    return {
        "name": recipe.name,
        "version": recipe.version,
        "licence": recipe.licence,
        "weights_sha256": sha256,
        **recipe.card,
        "symmetry": {"forbids": ["friedel"]},
        "inputs": {
            "summary": "The logarithm of the intensity over its median, plus 0.3, brought to mean 0 and deviation 1 over the "
            "image; on equal steps of the transverse q, centred on the beam.",
            "dims": ["exposure", "y", "x"],
            "channels": 1,
            "units": {"q": "1/nm", "I": "counts, or any other unit"},
        },
        "architecture": {**recipe.architecture.to_dict(), "parameters": state.network.parameter_count},
        "simulator": recipe.simulator,
        "data": {**data, "sha256": data_digest(recipe)},
        "ranges": {"radius": list(RADIUS), "peak": list(recipe.data.peak)},
        "figures": {"loss": state.history[-1].loss, **figures},
        "calibration": calibration._asdict(),
        "made": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": hardware(state.device),
            "seconds": round(state.seconds),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        },
    }


def write_history(directory: Path, history: list[Progress]) -> None:
    """Write every epoch as CSV and as a figure."""
    with (directory / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Progress._fields)
        writer.writerows((each.epoch, *(f"{value:.6g}" for value in each[1:])) for each in history)
    epochs = [each.epoch for each in history]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(epochs, [100 * each.validation for each in history], label="in the fundamental domain")
    axes.semilogy(epochs, [100 * each.symmetric for each in history], label="from the nearest equivalent")
    axes.set(xlabel="epoch", ylabel="mean relative error, validation, one view / %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(directory / "history.png", dpi=150)

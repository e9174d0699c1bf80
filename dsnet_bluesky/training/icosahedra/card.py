"""The folder of a trained model: figures of merit, calibrated errors, card and history."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor

from dsnet_bluesky.icosahedra.answers import answers, score
from dsnet_bluesky.icosahedra.images import VIEWS, augment, log_image
from dsnet_bluesky.icosahedra.model import Calibration, simulator_from
from dsnet_bluesky.icosahedra.network import RADIUS, Answer, relative_errors
from dsnet_bluesky.icosahedra.rotations import misorientation
from dsnet_bluesky.training.machine import hardware
from dsnet_bluesky.versions import WEIGHTS, sha256_of, write_card

from .images import Images, data_digest, expose, generator_of
from .steps import Progress, Training

__all__ = ["calibrated", "describe", "figures_of", "write_history", "write_model"]


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
    generator = generator_of(state.recipe.seed, seed, device=state.device)
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

"""The folder of a trained denoiser: weights, recipe, history and card."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from safetensors.torch import save

from dsnet_bluesky.denoising import FRIEDEL
from dsnet_bluesky.denoising.likelihood import ORDERS, WIDTHS
from dsnet_bluesky.training.machine import hardware
from dsnet_bluesky.versions import WEIGHTS, sha256_of, write_card

from .steps import Look, Training

__all__ = ["describe", "write_history", "write_model"]

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
    "which takes away a third of the bias that it sees; the errors do not hold what is left of it.",
    "Structure that is narrower than the network's experience, and fainter than the noise of two mates, is smoothed away.",
]
INPUTS = {
    "symmetry": {
        "summary": "The counts of a pixel and its mate, three Gaussian means of them, the mean of their ring, and the ring's "
        "harmonics up to the 4th and to the 8th, each compared with the second Gaussian mean; how many of the two count.",
        "dims": ["exposure", "channel", "y", "x"],
        "channels": 2 + len(WIDTHS) + len(ORDERS),
        "units": {"counts": "photons per pixel"},
    },
    "paper": {
        "summary": "One half of a centred frame, divided by the frame's maximum.",
        "dims": ["exposure", "channel", "y", "x"],
        "channels": 1,
        "units": {"counts": "photons per pixel"},
    },
}


def write_model(directory: Path, state: Training, figures: dict[str, float], runs: Sequence[str] = ()) -> None:
    """Write the folder of a trained model; the card comes last, so a folder with a card is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.best.state_dict().items()}
    (directory / WEIGHTS).write_bytes(save(weights))
    (directory / "recipe.toml").write_text(state.recipe.source, encoding="utf-8")
    write_history(directory, state.history, figures.get("deviance_gaussian"))
    write_card(directory, describe(state, figures, runs, sha256_of(directory / WEIGHTS)))


def describe(state: Training, figures: dict[str, float], runs: Sequence[str], sha256: str) -> dict[str, Any]:
    """Compose the card of a trained model as plain values."""
    recipe, scan = state.recipe, state.scan
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

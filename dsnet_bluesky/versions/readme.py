"""Cards written: ``model.toml`` for machines, ``README.md`` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cards import CARD

__all__ = ["to_toml", "write_card"]


def write_card(directory: Path, card: dict[str, Any]) -> None:
    """Write the card of a model for machines (``model.toml``) and for people (``README.md``).

    Parameters
    ----------
    directory
        The model's folder.
    card
        Plain values: strings, numbers, lists and tables of them.
    """
    (directory / "README.md").write_text(_readme(card), encoding="utf-8")
    (directory / CARD).write_text(to_toml(card), encoding="utf-8")


def _readme(card: dict[str, Any]) -> str:
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    made = card["made"]
    return f"""# {card["name"]} {card["version"]}

{card["summary"]}

**Use.** {card["use"]}

**Limits.**

{limits}

{_inputs(card)}{_told(card)}

![Losses over the epochs](history.png)

**Made** on {made["date"]} with torch {made["torch"]} in {made["seconds"] / 60:.0f} minutes on {made["hardware"]}.
{_again(card)}

**Licence.** {card["licence"]}. The SHA-256 of the weights is in `model.toml` and is checked whenever they are loaded.
"""


def _told(card: dict[str, Any]) -> str:
    """Tell data and figures, which each kind of model has of its own."""
    if "simulator" in card:
        return _icosahedra(card)
    if "form_factor" in card["data"]:
        return _published(card)
    return _denoiser(card) if "needs" in card.get("symmetry", {}) else _unrolled(card)


def _again(card: dict[str, Any]) -> str:
    """Tell how the training is repeated."""
    if "runs" in card["data"]:
        return "`recipe.toml` holds every number of the training; the frames are those of the runs named above."
    return f"`dsnet-bluesky train {card['name']}:{card['version']}` repeats it from `recipe.toml`."


def _inputs(card: dict[str, Any]) -> str:
    """Tell what the network is given; nothing where the card does not say it."""
    if "inputs" not in card:
        return ""
    inputs = card["inputs"]
    units = ", ".join(f"{name} in {unit}" for name, unit in inputs["units"].items())
    dims = f"({', '.join(inputs['dims'])})"
    return f"""**Inputs.** {inputs["summary"]}
An array with the dims {dims}, channels: {inputs["channels"]}. Computed from {units}.

"""


def _published(card: dict[str, Any]) -> str:
    """Tell data and figures of the published DSNet."""
    data, figures = card["data"], card["figures"]
    curves, q = data["values"], data["q"]
    return f"""**Training data.** {curves["count"]} curves of the sasmodels form factor `{data["form_factor"]}`,
{data["parameter"]} {curves["first"]:g} to {curves["last"]:g} angstrom, background {data["background"]:g} 1/cm,
q {q["first"]:g} to {q["last"]:g} 1/nm in {q["count"]} points, smeared by a stationary Gaussian of sigma {data["sigma"]:g} 1/nm,
without noise; {data["training"]} for training, {data["validation"]} for validation. No measured data.

**Figures** (mean squared error of ln I). At epoch {figures["epoch"]} of {figures["epochs"]}, whose weights are kept:
training {figures["training_loss"]:.4g}, validation {figures["validation_loss"]:.4g}.
The validation curves as they are, smeared: {figures["validation_loss_untreated"]:.4g}."""


def _denoiser(card: dict[str, Any]) -> str:
    """Tell data and figures of a denoiser by symmetry."""
    data, figures = card["data"], card["figures"]
    least, most = card["ranges"]["counts_per_pixel"]
    runs = f" Runs: {', '.join(data['runs'])}." if data["runs"] else ""
    judged = (
        f"""Poisson deviance a pixel of held-out photons {figures["deviance"]:.5f}, of the best Gaussian filter
({figures["gaussian_width"]:g} pixels) {figures["deviance_gaussian"]:.5f}."""
        if "deviance" in figures
        else f"Mean squared error of held-out halves {figures['held_out_mse']:.3g}."
    )
    return f"""**Training data.** {data["frames"]} measured or simulated frames of one scan, {data["training"]} for training and
{data["held_out"]} held out; no clean frame. In range are {least:g} to {most:g} counts a pixel.{runs}

**Figures.** {judged}
chi2 between mates: {figures["chi2_symmetry"]:.4f} +- {figures["chi2_symmetry_error"]:.4f} (1 for a symmetric pattern)."""


def _unrolled(card: dict[str, Any]) -> str:
    """Tell data and figures of the network of dsnet 2."""
    data, figures, calibration = card["data"], card["figures"], card["calibration"]
    families = {split: ", ".join(data[split]) for split in ("training", "validation", "test")}
    shares = ", ".join(
        f"{share:g} over {length:g}"
        for length, share in zip(calibration["correlation"]["lengths"], calibration["correlation"]["shares"], strict=True)
    )
    return f"""**Training data.** {data["curves"]} curves measured in {data["sessions"]} sessions, each with an instrument of
its own (Gaussian, pinhole and odd kernels, rings and masked sectors of an area detector, slits, wavelength spread; linear,
logarithmic and measured grids, with gaps), counting and relative noise, stated well, badly or not at all. No measured
data. Spheres, cylinders and cubic paracrystals with the dimensionless parameters of the paper's tables are left out by a margin.

- Training families: {families["training"]}; peaks on power laws, gratings, and mixtures of all.
- Validation families, by which choices were made and errors calibrated: {families["validation"]}.
- Test families, which no choice has seen: {families["test"]}.

**Figures** on validation families (geometric mean over curves of the mean squared error of ln I): {figures["validation"]:.2g};
20 steps of Richardson and Lucy's iteration {figures["untreated"]:.2g}, the indirect transform {figures["indirect"]:.2g}.

**Errors.** Correlated, by shares of the variance and lengths in local resolutions: {shares}."""


def _icosahedra(card: dict[str, Any]) -> str:
    """Tell data and figures of a network that reads images of icosahedra."""
    data, figures, simulator, radius = card["data"], card["figures"], card["simulator"], card["ranges"]["radius"]
    rows = "\n".join(
        f"| {words} | {' | '.join(f'{figures[name]:.2%}' for name in _asked(what))} |"
        for words, what in (
            ("mean relative error", "mean_relative_error"),
            ("largest of the five, mean", "maximum_relative_error"),
            ("median", "median_relative_error"),
            ("mean, modulo the group", "mean_relative_error_symmetric"),
        )
    )
    middle, far = _asked("misorientation"), _asked("misorientation_95")
    angles = " | ".join(f"{figures[a]:.2g}, {figures[b]:.2g}" for a, b in zip(middle, far, strict=True))
    return f"""**Data.** {data["training"]} simulated images for training, {data["validation"]} for validation and {data["test"]}
for test, radii {radius[0]:g} to {radius[1]:g} nm, all orientations alike; no measured data. Multi-slice Fourier transform,
{simulator["slices"]} slices of {simulator["points"]} points squared, {simulator["pixels"]} pixels squared up to
{simulator["angle"]:g} degrees, wavelength {simulator["wavelength"]:g} nm, absorption length
{simulator["absorption_length"]:g} nm read as *{simulator["absorption"]}*. From {data["peak"][0]:g} to {data["peak"][1]:g} photons
in the brightest pixel, one per pixel as background.

**Figures.** Errors of the five parameters, each in its range; test images, with the network asked once and for all eight views.

| | one view | eight views |
|---|---|---|
{rows}
| misorientation in degrees, median, 95 % | {angles} |

The radius errs by {figures["test_radius_error"]:.2g} nm in the mean (eight views).

**Symmetry.** Forbids {", ".join(card["symmetry"]["forbids"])}: these images have no centre of symmetry."""


def _asked(what: str) -> tuple[str, str]:
    return f"test_{what}_one_view", f"test_{what}"


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """Write a table of plain values as TOML; `prefix` names the tables that it is in."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}".rstrip("\n"))
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return "[\n" + "".join(f"    {_toml_value(item)},\n" for item in value) + "]"
    # Strings, numbers, booleans and lists of numbers are written alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)

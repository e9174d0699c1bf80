"""From frames to desmeared curves: the four slits of the paper, on the simulated beamline.

Frames (Poisson counts, gaps, beamstop with arm, hot pixels) are reduced by pyFAI and desmeared
with the pixel-coverage operator of the measured direct beam, as the pipeline does it; the
truth is known. Silver behenate through the four slits of Table 3 (consistency as in Table 4),
polydisperse spheres at three doses, and a grating of 125 nm with few counts (as in Table 5).
Writes Markdown and figures:

    python benchmarks/frames.py            # about a minute on one thread
    python benchmarks/frames.py --quick    # a smoke test: two samples, one exposure, coarse

No inverse crime: frames are drawn in two dimensions on a grid three times finer than the
pixels, and the operators see only the noisy frame of the direct beam.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from measured import (
    COLOURS,
    METHODS,
    Answer,
    available,
    coverage,
    desmeared,
    half,
    number,
    plain,
    reason,
    save,
)
from numpy.typing import ArrayLike, NDArray
from provenance import provenance, with_model

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.pipeline import Config, Exposed, PreparedCurves
from dsnet_bluesky.sim import PAPER_SLITS, Sample, SaxsCamera, Setting, SilverBehenate, SlitSetting, Sphere

Floats = NDArray[np.floating[Any]]

BEAMSTOP = 2.8e-3
ATTENUATION = 5000.0
"""Of the direct beam, which then has a million counts."""

DOSE = PAPER_SLITS[0].flux * PAPER_SLITS[0].time
"""Photons on the sample in the paper's exposures, the same through all slits; curves are in counts a pixel at this dose."""

LEAST = 0.1
"""Answers below this part of the least truth are raised to it before the logarithm, and counted."""


@dataclass(frozen=True)
class PolydisperseSpheres:
    """Spheres with a normal distribution of radii, dilute, on a flat background."""

    radius: float = 8.0
    """Mean radius in nm."""

    width: float = 0.1
    """Standard deviation of the radius over its mean."""

    background: float = 1e-5
    """Flat background relative to the intensity at q = 0."""

    fraction: float = 2e-3

    def truth(self, q: ArrayLike) -> Floats:
        """Return the exact intensity at q in 1/nm, from a table a hundred times finer than a pixel."""
        return np.interp(np.asarray(q, dtype=float), *self._table)

    @cached_property
    def _table(self) -> tuple[Floats, Floats]:
        radii = self.radius * (1 + self.width * np.linspace(-4, 4, 81))
        weights = np.exp(-0.5 * ((radii / self.radius - 1) / self.width) ** 2) * radii**6
        q = np.arange(1e-4, 6, 1e-4)
        curves = (Sphere(float(r), background=0.0).truth(q) for r in radii)
        return q, np.sum([w * c for w, c in zip(weights / weights.sum(), curves, strict=True)], axis=0) + self.background


@dataclass(frozen=True)
class Grating:
    """Isotropic analogue of a line grating: the orders of a lattice in one dimension, as rings.

    Lines of width `duty * period`, with a roughness of their edges, on diffuse scattering.
    """

    period: float = 125.0
    """In nm: the orders stand at n 2 pi / period."""

    duty: float = 0.4
    """Width of a line over the period; its fifth order vanishes."""

    roughness: float = 2.0
    """Standard deviation of the edges in nm."""

    sigma: float = 2e-3
    """Standard deviation of each order in 1/nm."""

    background: float = 1e-3
    """Flat background relative to the height of the first order, roughly."""

    fraction: float = 2e-3

    def truth(self, q: ArrayLike) -> Floats:
        """Return the exact intensity at q in 1/nm."""
        q = np.asarray(q, dtype=float)
        total = 5 * self.background / (1 + (q / 0.05) ** 2) ** 2 + self.background
        for n in range(1, 13):  # to 0.6 1/nm, beyond the corners of the detector
            place = 2 * np.pi * n / self.period
            height = np.sinc(n * self.duty) ** 2 * np.exp(-((place * self.roughness) ** 2))
            total = total + height * np.exp(-0.5 * ((q - place) / self.sigma) ** 2)
        return total


@dataclass(frozen=True)
class Experiment:
    """A sample, a camera, and the conditions under which it is exposed.

    Attributes
    ----------
    conditions
        Slits, and the dose as a part of the paper's.
    q_min, q_max, bins
        Of the curve, in 1/nm.
    drawn
        Numbers of the conditions that get a figure.
    """

    title: str
    note: str
    sample: Sample
    conditions: tuple[tuple[SlitSetting, float], ...]
    q_min: float
    q_max: float
    bins: int
    distance: float = 0.8
    drawn: tuple[int, ...] = (0,)

    @property
    def slug(self) -> str:
        """Name for files."""
        return self.title.split(",")[0].lower().replace(" ", "-")


def doses(slits: Iterable[SlitSetting], parts: Iterable[float]) -> tuple[tuple[SlitSetting, float], ...]:
    """Combine all slits with all doses."""
    return tuple((one, part) for one in slits for part in parts)


AGBH = Experiment(
    "AgBh, four slits",
    "Silver behenate through the four slits of the paper's Table 3, with equal photons: two Bragg peaks of sigma 0.027 1/nm on a "
    "power law. The widest slit covers 0.20 x 0.13 1/nm of reciprocal space, the narrowest one 0.04 x 0.026.",
    SilverBehenate(),
    doses(PAPER_SLITS, [1.0]),
    0.17,
    2.8,
    340,
)
EXPERIMENTS = [
    AGBH,
    Experiment(
        "Polydisperse spheres, widest slit",
        "Spheres of 8 nm with a deviation of 10 % in radius, through 4.0 x 2.5 mm, at the paper's dose and at fewer photons. "
        "Towards the end of the curve the flat scattering by air is most of what is left.",
        PolydisperseSpheres(),
        doses(PAPER_SLITS[:1], [1.0, 0.1, 0.01]),
        0.17,
        2.2,
        260,
        drawn=(0, 2),
    ),
    Experiment(
        "Grating, few counts",
        "Orders of a 125 nm period, 0.050 1/nm apart, with the detector at 5 m, where the slits cover 0.033 x 0.020 "
        "(4.0 x 2.5 mm) and 0.013 x 0.007 1/nm (1.6 x 0.9 mm). **An analogue**: the simulated beamline knows isotropic samples "
        "only, so this is the curve of a grating in one dimension, spread over rings as by a powder of gratings. A real grating "
        "gives spots on a line, and its sector would hold other counts. Doses are a hundredth and a thousandth of the paper's.",
        Grating(),
        doses((PAPER_SLITS[0], PAPER_SLITS[2]), [0.01, 0.001]),
        0.027,
        0.42,
        200,
        distance=5.0,
        drawn=(0, 2),
    ),
]


@dataclass(frozen=True)
class Run:
    """One condition: the curves as reduced, the truth, and the answers or what was refused."""

    label: str
    truth: Floats
    curves: xr.Dataset
    answers: dict[str, Answer]
    refused: dict[str, str] = field(default_factory=dict)


# Runs


def expose(
    experiment: Experiment, slits: SlitSetting, dose: float, exposures: int, per_bin: int
) -> tuple[Any, xr.Dataset, Floats]:
    """Take and reduce frames: the operator, the curves, and the truth on their q, in counts a pixel at the full dose."""
    camera = SaxsCamera(distance=experiment.distance, seed=round(1e6 * slits.width * slits.height / dose))
    beam = camera.frame(Setting(None, slits.width, slits.height, attenuation=ATTENUATION), slits.time)
    config = Config("lake", bins=experiment.bins, q_min=experiment.q_min, q_max=experiment.q_max, per_bin=per_bin)
    exposed = Exposed(beam, camera.poni, camera.mask(BEAMSTOP), camera.mask())
    prepared = PreparedCurves(exposed.instrumental(config), config)
    setting = Setting(experiment.sample, slits.width, slits.height, beamstop=BEAMSTOP)
    time = slits.time * dose
    frames = np.stack([camera.frame(setting, time) for _ in range(exposures)])
    curves = prepared.reduce(frames, time=time, monitor=camera.flux(slits.width, slits.height) / DOSE)
    rate = camera.truth(setting, prepared.q)
    return prepared.smearing, curves, rate * DOSE / camera.flux(slits.width, slits.height)


def desmear_all(
    experiment: Experiment,
    slits: SlitSetting,
    dose: float,
    methods: dict[str, tuple[str, dict[str, Any]]],
    exposures: int,
    per_bin: int,
) -> Run:
    """Expose once and desmear with every method."""
    smearing, curves, truth = expose(experiment, slits, dose, exposures, per_bin)
    part = "" if dose == 1 else f", dose {dose:g}"
    found = Run(slits.label + part, truth, curves, {})
    for label, (method, options) in methods.items():
        try:
            found.answers[label] = desmeared(curves, smearing, method, options)
        except BadInput as error:
            found.refused[label] = str(error)
    for label in methods:
        print(f"    {label:8s} {summary(found, label)}", flush=True)
    return found


def summary(run: Run, label: str) -> str:
    """Write one method's figures in a line."""
    if label in run.refused:
        return f"refused: {run.refused[label]}"
    I, result = answer_of(run, label), run.answers[label].result
    shares = ", ".join(f"{band} %: {share.mean():.2f}" for band, share in covered(run, label).items())
    return f"<ln^2> {log_error(I, run.truth).mean():.3g}, chi2 {float(result['chi2'].mean()):.3g}, {shares}"


# Scores


def answer_of(run: Run, label: str) -> Floats:
    """Curves of a method, or as measured; shape (exposure, q)."""
    return run.curves["I"].values if label == "smeared" else run.answers[label].result["I"].values


def floored(I: Floats, truth: Floats) -> Floats:
    """Raise what is negative or next to nothing."""
    return np.maximum(I, LEAST * truth.min())


def log_error(I: Floats, truth: Floats) -> Floats:
    """Mean squared error of ln I of each exposure."""
    return np.mean(np.log(floored(I, truth) / truth) ** 2, axis=-1)


def linear_error(I: Floats, truth: Floats) -> Floats:
    """Mean squared error of I of each exposure, in (counts a pixel)^2."""
    return np.mean((I - truth) ** 2, axis=-1)


def covered(run: Run, label: str) -> dict[int, Floats]:
    """Share of the truths in each band, for each exposure."""
    return coverage(run.answers[label].result, run.truth, np.ones(run.truth.size, dtype=bool))


def consistency(runs: Sequence[Run], label: str, against: str) -> list[Floats]:
    """Mean squared difference of I through each wider slit to that through the narrowest, (counts a pixel)^2, by exposure.

    `against` is what stands for the narrowest slit: "smeared", as measured, or the method itself.
    """
    narrow = answer_of(runs[-1], against)
    return [np.mean((answer_of(run, label) - narrow) ** 2, axis=-1) for run in runs[:-1]]


# Report


def condition_table(run: Run, methods: Sequence[str]) -> str:
    """Lay out all figures of one condition."""
    head = [
        "method",
        "MSE of ln I",
        "MSE of I",
        "chi2",
        "in 68 %",
        "in 95 %",
        "preparation, ms",
        "a curve, ms",
        "raised points",
        "flags",
    ]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*rows, *(condition_row(run, label) for label in ("smeared", *methods))])


def condition_row(run: Run, label: str) -> str:
    """Write the row of one method."""
    if label in run.refused:
        return f"| {label} | refused: {reason(run.refused[label])} |" + " |" * 8
    I = answer_of(run, label)
    raised = int((LEAST * run.truth.min() > I).sum())
    cells = [number(log_error(I, run.truth)), number(linear_error(I, run.truth))]
    if label == "smeared":
        cells += ["-"] * 5 + [str(raised), "-"]
        return f"| {label} | " + " | ".join(cells) + " |"
    answer = run.answers[label]
    bits = int(np.bitwise_or.reduce(answer.result["flags"].values))
    cells += [
        number(answer.result["chi2"].values, digits=3),
        *(number(share, 100) for share in covered(run, label).values()),
        plain(1e3 * answer.preparation, 3),
        plain(1e3 * answer.seconds, 3),
        str(raised),
        ", ".join(str(flag.name).lower() for flag in Flag if bits & flag) or "-",
    ]
    return f"| {label} | " + " | ".join(cells) + " |"


def overview(found: list[tuple[Experiment, list[Run]]], methods: Sequence[str]) -> str:
    """Lay out the error of ln I of all conditions, the best in bold."""
    labels = ["smeared", *methods]
    rows = ["| sample, slits | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for experiment, runs in found:
        for run in runs:
            errors = {label: log_error(answer_of(run, label), run.truth) for label in labels if label not in run.refused}
            best = min(errors, key=lambda label: errors[label].mean())
            cells = [number(errors[label]) if label in errors else "refused" for label in labels]
            cells[labels.index(best)] = f"**{cells[labels.index(best)]}**"
            rows.append(f"| {experiment.title.split(',')[0]}, {run.label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def coverage_overview(found: list[tuple[Experiment, list[Run]]], methods: Sequence[str]) -> str:
    """Lay out the shares of the truths in both bands, in per cent."""
    rows = ["| sample, slits | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for experiment, runs in found:
        for run in runs:
            cells = [
                "refused" if label in run.refused else " / ".join(f"{100 * s.mean():.0f}" for s in covered(run, label).values())
                for label in methods
            ]
            rows.append(f"| {experiment.title.split(',')[0]}, {run.label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def table_4(runs: Sequence[Run], methods: Sequence[str]) -> str:
    """Lay out the consistency of the slits."""
    answered = [label for label in methods if not any(label in run.refused for run in runs)]
    slits = [run.label for run in runs[:-1]]
    rows = ["| " + " | ".join(["", *slits]) + " |", "|---" * (len(slits) + 1) + "|"]
    rows.append("| published: smeared | 278 | 134 | 50 |" if len(slits) == 3 else "")
    rows.append("| published: DSNet | 28.6 (0.10) | 26.2 (0.20) | 25.2 (0.50) |" if len(slits) == 3 else "")
    floor = [np.mean((run.truth - answer_of(runs[-1], "smeared")) ** 2, axis=-1) for run in runs[:-1]]
    measured = consistency(runs, "smeared", "smeared")
    rows.append(consistency_row("smeared, against slit (4) as measured", measured, measured))
    rows.append(consistency_row("truth, against slit (4) as measured", floor, measured))
    for label in answered:
        rows.append(consistency_row(f"{label}, against slit (4) as measured", consistency(runs, label, "smeared"), measured))
    for label in answered:
        rows.append(consistency_row(f"{label}, against its own slit (4)", consistency(runs, label, label), measured))
    return "\n".join(row for row in rows if row)


def consistency_row(label: str, values: list[Floats], measured: list[Floats]) -> str:
    """Write one row, each figure with its ratio to that of the measured curves."""
    cells = [f"{number(v)} ({plain(float(v.mean() / m.mean()))})" for v, m in zip(values, measured, strict=True)]
    return f"| {label} | " + " | ".join(cells) + " |"


PROTOCOL = """\
Simulated beamline (Pilatus 300k, 0.154 nm, the slits and photons of the paper's Table 3): frames with Poisson counts, gaps,
beamstop with arm and hot pixels; a direct beam of 1.2 million counts; reduction by pyFAI; pixel-coverage operator from the direct
beam's frame, {per_bin} pixels a bin. Curves are in counts a pixel at 6e9 photons, the paper's dose. {exposures} exposures of each
condition; ±: standard deviation over them. **MSE of ln I** over all points (answers below a tenth of the least truth are raised
to it first, and counted), **MSE of I** (linear, counts²), **chi2** per point of the re-smeared answer, the share of points whose
truth lies **in the 68 and 95 % bands** (I ± Idev, ± 1.96 Idev,
for dsnet ± its coverage factor times Idev), **time**. All methods have their defaults. Bold: best of the row.
"""

CONSISTENCY = """\
As in the paper's Table 4: mean over q ({q_min:g} to {q_max:g} 1/nm, one grid) of the squared difference between I through slits
(1) to (3) and I through slit (4), in linear I. **Our convention**: curves are per photon (counts a pixel at the paper's dose),
nothing is scaled to fit, and slit (4) is taken twice: as measured, which is smeared and noisy itself, so that even the truth
stands off by the row "truth"; and as desmeared by the same method, which would be zero for a perfect one. In brackets: the ratio
to the row "smeared", which does not hang on units and may be set beside that of the published figures (measured frames, in units
of their own, read by us as against slit (4) as measured).
"""


def report(found: list[tuple[Experiment, list[Run]]], methods: Sequence[str], arguments: argparse.Namespace) -> str:
    """Write the whole Markdown."""
    command = "python benchmarks/frames.py" + (" --quick" if arguments.quick else f" --exposures {arguments.exposures}")
    parts = [
        "# From frames to desmeared curves",
        provenance(with_model(command, arguments.model), ("dsnet-bluesky", "pyFAI", "numpy", "scipy", "torch")),
        PROTOCOL.format(per_bin=arguments.per_bin, exposures=arguments.exposures),
        "## Mean squared error of ln I",
        overview(found, methods),
        "## Truths in the 68 / 95 % bands, per cent",
        coverage_overview(found, methods),
    ]
    for experiment, runs in found:
        name = experiment.slug
        parts += [f"## {experiment.title}", experiment.note]
        if experiment.sample == AGBH.sample:
            convention = CONSISTENCY.format(q_min=experiment.q_min, q_max=experiment.q_max)
            parts += ["### Consistency of the slits", convention, table_4(runs, methods)]
            parts.append(f"![Four slits, one curve](frames/{name}-consistency.png)")
        for run in runs:
            parts += [f"### {run.label}", condition_table(run, methods)]
            if runs.index(run) in experiment.drawn:
                parts.append(f"![{experiment.title}, {run.label}]({figure_name(experiment, run)})")
    return "\n\n".join(parts) + "\n"


# Figures


def figure_name(experiment: Experiment, run: Run) -> str:
    """Name the figure of a condition, from the folder of the report."""
    return f"frames/{experiment.slug}-{re.sub(r'[^a-z0-9.]+', '-', run.label.lower())}.png"


def draw(experiment: Experiment, run: Run, path: Path) -> None:
    """Draw the first exposure: curves at the left, and for each method the distance to the truth and the residuals."""
    q, labels = run.curves["q"].values, list(run.answers)
    figure = Figure(figsize=(12, 1.6 + 0.95 * max(len(labels), 4)), layout="constrained")
    mosaic: Any = [["curves", f"{label} ratio", f"{label} residual"] for label in labels]
    panels = figure.subplot_mosaic(mosaic, width_ratios=[1.25, 1, 1], sharex=True)
    curves = panels["curves"]
    curves.semilogy(q, floored(run.curves["I"].values[0], run.truth), ".", color="0.6", ms=3, label="measured")
    for label in labels:
        curves.semilogy(q, floored(answer_of(run, label)[0], run.truth), color=COLOURS[label], lw=1, label=label)
    curves.semilogy(q, run.truth, "k:", lw=1.2, label="truth")
    curves.set(
        xlabel="q (1/nm)", ylabel="I (counts a pixel)", ylim=(0.3 * run.truth.min(), 2 * run.truth.max()), xlim=(q[0], q[-1])
    )
    curves.set_title(f"{experiment.title.split(',')[0]}, {run.label}", loc="left", fontsize="small")
    curves.legend(frameon=False, fontsize="small")
    for label in labels:
        draw_ratio(panels[f"{label} ratio"], run, label)
        draw_residual(panels[f"{label} residual"], run, label)
    panels[f"{labels[0]} ratio"].set_title("ln(desmeared / truth)", loc="right", fontsize="small", pad=2)
    panels[f"{labels[0]} residual"].set_title("(re-smeared - measured) / Idev", loc="right", fontsize="small", pad=2)
    for kind in ("ratio", "residual"):
        panels[f"{labels[-1]} {kind}"].set_xlabel("q (1/nm)")
    save(figure, path)


def draw_ratio(strip: Any, run: Run, label: str) -> None:
    """Draw ln(desmeared / truth) with its 95 % band, over that of the measured curve."""
    q, result = run.curves["q"].values, run.answers[label].result.isel(exposure=0)
    I = floored(result["I"].values, run.truth)
    ratio, band = np.log(I / run.truth), half(result, 95) * result["Idev"].values / I
    strip.plot(q, np.log(floored(run.curves["I"].values[0], run.truth) / run.truth), color="0.7", lw=0.8)
    strip.fill_between(q, ratio - band, ratio + band, color=COLOURS[label], alpha=0.25, lw=0)
    strip.plot(q, ratio, color=COLOURS[label], lw=1)
    strip.axhline(0, color="k", lw=0.6)
    size = float(np.clip(1.5 * np.quantile(np.abs(ratio), 0.95), 0.1, 1.5))
    strip.set_ylim(-size, size)
    error = log_error(result["I"].values, run.truth)
    strip.set_title(f"{label}: {plain(float(error))}", loc="left", fontsize="small", color=COLOURS[label], pad=2)


def draw_residual(strip: Any, run: Run, label: str) -> None:
    """Draw how far the re-smeared answer is from the measurement, in Idev; what lies outside stands at the edge."""
    result = run.answers[label].result.isel(exposure=0)
    off = ((result["I_resmeared"] - result["I_smeared"]) / result["Idev_smeared"]).values
    strip.plot(result["q"], np.clip(off, -3.9, 3.9), ".", color=COLOURS[label], ms=2)
    strip.axhline(0, color="k", lw=0.6)
    strip.set(ylim=(-4, 4), yticks=[-3, 0, 3])
    strip.set_title(f"chi2 {plain(float(result['chi2']), 3)}", loc="left", fontsize="small", color=COLOURS[label], pad=2)


def draw_consistency(runs: Sequence[Run], methods: Sequence[str], path: Path) -> None:
    """Draw the first peak through all slits, measured and desmeared by each method."""
    labels = ["smeared", *(label for label in methods if not any(label in run.refused for run in runs))]
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    columns = (len(labels) + 1) // 2
    panels = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, label in zip(panels, labels, strict=False):
        for run, colour in zip(runs, ("C3", "C1", "C2", "C0"), strict=False):
            panel.plot(run.curves["q"], answer_of(run, label)[0], color=colour, lw=1, label=run.label)
        panel.plot(runs[0].curves["q"], runs[0].truth, "k:", lw=1, label="truth")
        panel.set(xlim=(0.8, 2.5), ylim=(0, 1.25 * runs[0].truth[runs[0].curves["q"].values > 0.8].max()))
        panel.set_title("as measured" if label == "smeared" else label, fontsize="small")
    for panel in panels[len(labels) :]:
        panel.remove()
    panels[0].legend(frameon=False, fontsize="small")
    figure.supxlabel("q (1/nm)", fontsize="medium")
    figure.supylabel("I (counts a pixel)", fontsize="medium")
    save(figure, path)


def coarse(experiment: Experiment) -> Experiment:
    """Shrink an experiment to a smoke test: two slits of AgBh, one condition of the other."""
    first, last = experiment.conditions[0], experiment.conditions[-1]
    conditions = (first, last) if experiment is AGBH else (first,)
    return replace(experiment, conditions=conditions, bins=experiment.bins // 2, drawn=(0,) if experiment is AGBH else ())


def main() -> None:
    """Run all experiments and write the report."""
    parser = argparse.ArgumentParser(description="From simulated frames to desmeared curves, by every method.")
    parser.add_argument("--quick", action="store_true", help="smoke test: two samples, one exposure, coarse")
    parser.add_argument("--exposures", type=int, default=5, help="exposures of each condition (default: 5)")
    parser.add_argument("--model", default="dsnet", help="released model that answers as dsnet (default: dsnet)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    arguments = parser.parse_args()
    arguments.per_bin = 64 if arguments.quick else 256
    arguments.exposures = 1 if arguments.quick else arguments.exposures
    torch.set_num_threads(1)
    figures = arguments.output / "frames"
    figures.mkdir(parents=True, exist_ok=True)
    methods = available(METHODS | {"dsnet": ("dsnet", {"model": arguments.model})})
    found: list[tuple[Experiment, list[Run]]] = []
    for experiment in [coarse(AGBH), coarse(EXPERIMENTS[-1])] if arguments.quick else EXPERIMENTS:
        print(experiment.title, flush=True)
        runs = []
        for slits, dose in experiment.conditions:
            print(f"  {slits.label}, dose {dose:g}", flush=True)
            runs.append(desmear_all(experiment, slits, dose, methods, arguments.exposures, arguments.per_bin))
        for place in experiment.drawn:
            draw(experiment, runs[place], arguments.output / figure_name(experiment, runs[place]))
        if experiment.sample == AGBH.sample:
            draw_consistency(runs, list(methods), figures / f"{experiment.slug}-consistency.png")
        found.append((experiment, runs))
    (arguments.output / "frames.md").write_text(report(found, list(methods), arguments), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measured curves, desmeared by every method and held against what else is known of them.

Bonse-Hart USAXS of jldesmear (`../shared/realdata`, outside the repository: left out where
it is absent) and the data that come with sasdata: slit USANS beside pinhole SANS of one
latex, an in-situ USAXS series, a laboratory line camera, and spheres smeared by SasView.
Writes Markdown and figures:

    python benchmarks/measured.py            # about a minute on one thread
    python benchmarks/measured.py --quick    # a smoke test: two data sets, two noise draws

It needs sasdata: pip install 'dsnet-bluesky[dev]'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from measured_data import BUNDLED, JLDESMEAR, QUICK, USAXS, DataSet, Measurement, Reference, smeared
from numpy.typing import NDArray
from PIL import Image
from provenance import provenance, with_model

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.desmearing import METHODS as INSTALLED
from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.desmearing.covariance import coverage_factor
from dsnet_bluesky.smearing import Smearing

Floats = NDArray[np.floating[Any]]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lake": ("lake", {}),
    "wiener": ("wiener", {}),
    "map": ("map", {}),
    "ift": ("ift", {}),
    "cme": ("cme", {}),
    "dsnet": ("dsnet", {}),
}
"""By the name in the tables: a method of `dsnet_bluesky.desmearing` and its options. What is not installed is left out."""

COLOURS = {
    "lake": "C1",
    "wiener": "C4",
    "map": "C0",
    "ift": "C2",
    "cme": "C5",
    "dsnet": "C3",
}

SIGNIFICANT = 3.0
"""A point counts where the reference exceeds this many standard deviations."""

BANDS = (68, 95)
"""Percentages of truths that the bands should hold."""


@dataclass(frozen=True)
class Answer:
    """What a method made of curves, and how long it took for one."""

    result: xr.Dataset
    preparation: float
    seconds: float


@dataclass
class Scores:
    """Figures of one method for a data set, one value for each curve; empty where nothing can be said.

    `refused` is the reason why there is no answer.
    """

    chi2: list[float] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    covered: dict[int, list[float]] = field(default_factory=lambda: {band: [] for band in BANDS})
    preparation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flags: int = 0
    refused: str = ""


# Methods


def available(methods: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Leave out what this version of the package does not have, and say so."""
    for label, (method, _) in methods.items():
        if method.partition(":")[0] not in INSTALLED:
            print(f"{label}: left out, dsnet_bluesky.desmearing has no method {method!r}", flush=True)
    return {label: entry for label, entry in methods.items() if entry[0].partition(":")[0] in INSTALLED}


def desmeared(curves: xr.Dataset, smearing: Smearing, method: str, options: dict[str, Any]) -> Answer:
    """Prepare a method, desmear all exposures, and time a single one when everything is warm."""
    started = time.perf_counter()
    prepared = prepare(smearing, method, **options)
    ready = time.perf_counter()
    result = prepared(curves)
    if "failures" in result.attrs:  # means over the exposures that are left would not compare
        raise BadInput(json.loads(result.attrs["failures"])[0]["reason"])
    once = time.perf_counter()
    prepared(curves.isel(exposure=[0]))
    return Answer(result, ready - started, time.perf_counter() - once)


# Scores


def distance(found: Floats, reference: Floats) -> tuple[Floats, Floats]:
    """Mean square and median size of ln(found / reference) of curves, shape (..., k); nothing is below a hundredth of it."""
    ratio = np.log(np.maximum(found, 0.01 * reference) / reference)
    return np.mean(ratio**2, axis=-1), np.median(np.abs(ratio), axis=-1)


def coverage(result: xr.Dataset, truth: Floats, where: NDArray[np.bool_]) -> dict[int, Floats]:
    """Share of the points at which the truth lies in each band, for each exposure."""
    off = np.abs(result["I"].values - truth) / result["Idev"].values
    return {band: np.mean(off[..., where] <= half(result, band), axis=-1) for band in BANDS}


def half(result: xr.Dataset, band: int) -> float:
    """Half-width of a band in Idev: 1, or what the method says of its 95 %."""
    return 1.0 if band == 68 else coverage_factor(result)


def counting(measurement: Measurement, reference: Reference) -> NDArray[np.bool_]:
    """Points at which the reference is significantly positive."""
    q = measurement.curves["q"].values if reference.view is None else reference.view.q
    return (reference.I / reference.Idev > SIGNIFICANT) & (q <= reference.upto)


def seen(I: Floats, reference: Reference) -> Floats:
    """Bring answers, shape (exposure, n), to the points of the reference."""
    return I if reference.view is None else reference.view.apply(I)


def judge(measurement: Measurement, answer: Answer, scores: Scores) -> None:
    """Add the figures of an answer to the scores."""
    result = answer.result
    scores.chi2 += result["chi2"].values.tolist()
    scores.preparation.append(answer.preparation)
    scores.seconds.append(answer.seconds)
    scores.flags |= int(np.bitwise_or.reduce(result["flags"].values))
    reference = measurement.reference
    if reference is None:
        return
    where = counting(measurement, reference)
    mse, ratio = distance(seen(result["I"].values, reference)[..., where], reference.I[where])
    scores.mse += mse.tolist()
    scores.ratio += ratio.tolist()
    if reference.function is not None:
        for band, share in coverage(result, reference.I, where).items():
            scores.covered[band] += share.tolist()


def closure(measurement: Measurement) -> Floats:
    """Chi2 per point of the exactly smeared truth: how far the data are what they claim to be, shape (exposure,)."""
    assert measurement.reference is not None
    assert measurement.reference.function is not None
    exact = smeared(measurement.reference.function, measurement.operator)
    curves = measurement.curves
    return np.mean(((curves["I"].values - exact) / curves["Idev"].values) ** 2, axis=-1)


def score_others(measurement: Measurement, scores: dict[str, Scores]) -> None:
    """Score what needs no desmearing: the smeared curve, the truth, and answers of other programs."""
    reference = measurement.reference
    if reference is None:
        return
    where = counting(measurement, reference)
    curves = {"smeared": measurement.curves["I"].values, **{k: v[None] for k, v in measurement.published.items()}}
    for label, I in curves.items():
        entry = scores.setdefault(label, Scores())
        mse, ratio = distance(seen(I, reference)[..., where], reference.I[where])
        entry.mse += mse.tolist()
        entry.ratio += ratio.tolist()
    if reference.function is not None:
        scores.setdefault("truth, re-smeared", Scores()).chi2 += closure(measurement).tolist()


# Runs


def run(data: DataSet, methods: dict[str, tuple[str, dict[str, Any]]]) -> tuple[dict[str, Scores], dict[str, Answer]]:
    """Desmear a data set with every method: all scores, and the answers to its first measurement."""
    scores: dict[str, Scores] = {}
    shown: dict[str, Answer] = {}
    for measurement in data.measurements:
        score_others(measurement, scores)
        smearing = measurement.operator(None)
        for label, (method, options) in methods.items():
            entry = scores.setdefault(label, Scores())
            try:
                answer = desmeared(measurement.curves, smearing, method, {**options, **measurement.options.get(label, {})})
            except BadInput as error:
                entry.refused = str(error)
                continue
            judge(measurement, answer, entry)
            shown.setdefault(label, answer)
    for label in methods:
        print(f"  {label:8s} {summary(scores[label])}", flush=True)
    return scores, shown


def summary(scores: Scores) -> str:
    """Write one method's figures in a line."""
    if scores.refused:
        return f"refused: {scores.refused}"
    parts = [f"chi2 {np.mean(scores.chi2):.3g}"]
    parts += [f"<ln^2> {np.mean(scores.mse):.3g}, median {np.mean(scores.ratio):.3g}"] if scores.mse else []
    parts += [f"{band} %: {np.mean(share):.2f}" for band, share in scores.covered.items() if share]
    return ", ".join([*parts, f"{np.mean(scores.seconds):.3g} s"])


# Report


def plain(value: float, digits: int = 2) -> str:
    """Write a number with so many digits, and without an exponent where it can be read without."""
    return f"{float(f'{value:.{digits}g}'):g}"


def reason(refusal: str) -> str:
    """Return the first sentence of a message."""
    return refusal.split(". ")[0].split(";")[0]


def number(values: Sequence[float] | Floats, scale: float = 1.0, digits: int = 2) -> str:
    """Write the mean, and the standard deviation where there are several; a dash for none."""
    if not len(values):
        return "-"
    mean = plain(float(np.mean(values)) * scale, digits)
    return mean if len(values) == 1 else f"{mean} ± {plain(float(np.std(values, ddof=1)) * scale, 1)}"


def row(label: str, scores: Scores) -> str:
    """Write the row of one method."""
    if scores.refused:
        return f"| {label} | refused: {reason(scores.refused)} |" + " |" * 7
    flags = ", ".join(str(flag.name).lower() for flag in Flag if scores.flags & flag) or "-"
    cells = [
        number(scores.chi2, digits=3),
        number(scores.mse),
        number(scores.ratio, 100),
        *(number(scores.covered[band], 100) for band in BANDS),
        number([float(np.mean(scores.preparation))] if scores.preparation else [], 1e3, 3),
        number([float(np.mean(scores.seconds))] if scores.seconds else [], 1e3, 3),
        flags if scores.chi2 and scores.seconds else "-",
    ]
    return f"| {label} | " + " | ".join(cells) + " |"


def table(scores: dict[str, Scores]) -> str:
    """Lay out the table of one data set."""
    head = [
        "method",
        "chi2",
        "mean (ln ratio)²",
        "median abs. ln ratio, %",
        "in 68 %",
        "in 95 %",
        "preparation, ms",
        "a curve, ms",
    ]
    rows = ["| " + " | ".join([*head, "flags"]) + " |", "|---" * (len(head) + 1) + "|"]
    order = [*(label for label in scores if label not in METHODS), *(label for label in METHODS if label in scores)]
    return "\n".join([*rows, *(row(label, scores[label]) for label in order)])


def overview(found: list[tuple[DataSet, dict[str, Scores]]], labels: Sequence[str], cell: Callable[[Scores], str]) -> str:
    """Lay out one figure of all data sets and methods; rows without any are left out."""
    rows = ["| data set | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for data, scores in found:
        cells = [cell(scores.get(label, Scores())) for label in labels]
        if set(cells) != {"-"}:
            rows.append(f"| {data.title.split(',')[0]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def overview_cell(scores: Scores) -> str:
    """Write the median distance in per cent, and chi2 in brackets."""
    if scores.refused:
        return "refused"
    chi2 = f" ({plain(float(np.mean(scores.chi2)))})" if scores.chi2 else ""
    return (plain(100 * float(np.mean(scores.ratio))) if scores.ratio else "-") + chi2


def coverage_cell(scores: Scores) -> str:
    """Write which shares of the truths lie in the bands, in per cent."""
    shares = [scores.covered[band] for band in BANDS]
    return " / ".join(f"{100 * np.mean(share):.0f}" for share in shares) if shares[0] else "-"


PROTOCOL = """\
For each data set and method: **chi2** per point of the exactly re-smeared answer (near 1 where Idev is right); the **distance**
of the answer to a reference, mean square of ln(answer / reference) and median of its size in per cent, over the points at which
the reference exceeds three of its standard deviations (an exact one: three Idev of the measurement); the share of points whose
truth lies **in the 68 and 95 % bands** (I ± Idev and ± 1.96 Idev, for dsnet
± its coverage factor times Idev), where there is an exact truth; **time** for preparing the
operator and for one curve. Answers below a hundredth of the reference are raised to it before the logarithm. ±: standard
deviation over the {seeds} noise draws (or the curves of a series). All methods have their defaults, except that lake's tail is
the one that the data's author used. "truth, re-smeared" is the exact curve, smeared on nodes 20 times closer: its chi2 says
how far the data are what they claim to be. "smeared" is the measured curve itself.
"""


def report(found: list[tuple[DataSet, dict[str, Scores]]], methods: Sequence[str], arguments: argparse.Namespace) -> str:
    """Write the whole Markdown."""
    command = "python benchmarks/measured.py" + (" --quick" if arguments.quick else f" --seeds {arguments.seeds}")
    parts = [
        "# Measured curves",
        provenance(with_model(command, arguments.model), ("dsnet-bluesky", "numpy", "scipy", "torch", "sasdata")),
    ]
    if not JLDESMEAR.is_dir():
        parts.append("The reference data of jldesmear (`../shared/realdata`) were absent: only sasdata's were run.")
    parts += [PROTOCOL.format(seeds=arguments.seeds)]
    parts += ["## Median distance to the reference in per cent (chi2 in brackets)"]
    parts += [overview(found, ["smeared", *methods], overview_cell)]
    parts += ["## Truths in the 68 / 95 % bands, per cent", overview(found, methods, coverage_cell)]
    for data, scores in found:
        reference = data.measurements[0].reference
        against = "" if reference is None else f" Reference: {reference.what}."
        parts += [f"## {data.title}", data.note + against, table(scores), f"![{data.title}](measured/{data.slug}.png)"]
    parts.append("The data of jldesmear: this product includes software produced by Pete R. Jemian.")
    return "\n\n".join(parts) + "\n"


# Figures


def save(figure: Figure, path: Path) -> None:
    """Save a figure with few colours, which keeps the file small."""
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        image.convert("RGB").quantize(96).save(path, optimize=True)


def draw(data: DataSet, answers: dict[str, Answer], path: Path) -> None:
    """Draw the first curve: measured, desmeared and reference; ratio to the reference; residuals."""
    measurement = data.measurements[0]
    figure = Figure(figsize=(12, 1.6 + 0.95 * max(len(answers), 4)), layout="constrained")
    mosaic: Any = [["curves", f"{label} ratio", f"{label} residual"] for label in answers]
    panels = figure.subplot_mosaic(mosaic, width_ratios=[1.25, 1, 1])
    draw_curves(panels["curves"], measurement, answers)
    panels["curves"].set_title(data.title, loc="left", fontsize="small")
    for label, answer in answers.items():
        result = answer.result.isel(exposure=0)
        draw_ratio(panels[f"{label} ratio"], measurement, result, label)
        draw_residual(panels[f"{label} residual"], result, label)
    reference = measurement.reference
    compared = "measured" if reference is None or reference.view is not None else "reference"
    finish(panels, list(answers), f"ln(desmeared / {compared})")
    save(figure, path)


def draw_curves(panel: Any, measurement: Measurement, answers: dict[str, Answer]) -> None:
    """Draw what was measured, what is known, and what the methods say."""
    q, I = measurement.curves["q"].values, measurement.curves["I"].values[0]
    panel.loglog(q, I, ".", color="0.6", ms=4, label="measured")
    tops = []
    for label, answer in answers.items():
        found = answer.result["I"].values[0]
        tops.append(found[: q.size // 2].max())
        panel.loglog(q, np.where(found > 0, found, np.nan), color=COLOURS[label], lw=1.1, label=label)
    reference = measurement.reference
    if reference is not None:
        where, smeared_q = reference.I > 0, q if reference.view is None else reference.view.q
        style = "k:" if reference.view is None else "kx"
        label = reference.what if reference.view is None else f"{reference.what} (smeared)"
        panel.loglog(smeared_q[where], reference.I[where], style, lw=1.2, ms=5, label=label)
    panel.set(xlabel="q (1/nm)", ylabel="I", ylim=(0.3 * I[I > 0].min(), 3 * max(I.max(), float(np.median(tops)))))
    panel.legend(frameon=False, fontsize="small")


def draw_ratio(strip: Any, measurement: Measurement, result: xr.Dataset, label: str) -> None:
    """Draw ln(desmeared / reference) with its 95 % band; where nothing is known point by point, what was changed."""
    q, I, reference = result["q"].values, result["I"].values, measurement.reference
    if reference is None or reference.view is not None:
        base = result["I_smeared"].values
        strip.semilogx(q, np.log(np.maximum(I, 1e-3 * base) / base), color=COLOURS[label], lw=1)
    else:
        base = np.where(counting(measurement, reference), reference.I, np.nan)
        kept = np.maximum(I, 0.01 * base)
        ratio, band = np.log(kept / base), half(result, 95) * result["Idev"].values / kept
        strip.fill_between(q, ratio - band, ratio + band, color=COLOURS[label], alpha=0.25, lw=0)
        strip.semilogx(q, ratio, color=COLOURS[label], lw=1)
        size = float(np.clip(1.3 * np.nanquantile(np.abs(ratio), 0.98), 0.05, 2))
        strip.set_ylim(-size, size)
    strip.set_xlim(q[0], q[-1])
    strip.axhline(0, color="k", lw=0.6)
    if reference is not None and reference.view is not None:
        where = counting(measurement, reference)
        off = float(distance(seen(I, reference)[where], reference.I[where])[1])
        label = f"{label} ({plain(100 * off)} % off)"
    strip.set_title(label, loc="left", fontsize="small", pad=2)


def draw_residual(strip: Any, result: xr.Dataset, label: str) -> None:
    """Draw how far the re-smeared answer is from the measurement, in Idev; what lies outside stands at the edge."""
    off = ((result["I_resmeared"] - result["I_smeared"]) / result["Idev_smeared"]).values
    strip.semilogx(result["q"], np.clip(off, -3.9, 3.9), ".", color=COLOURS[label], ms=2)
    strip.axhline(0, color="k", lw=0.6)
    strip.set(ylim=(-4, 4), yticks=[-3, 0, 3], xlim=(float(result["q"][0]), float(result["q"][-1])))
    strip.set_title(f"chi2 {plain(float(result['chi2']), 3)}", loc="left", fontsize="small", color=COLOURS[label], pad=2)


def finish(panels: dict[str, Any], labels: list[str], shown: str) -> None:
    """Label the outer axes only."""
    for label in labels[:-1]:
        for kind in ("ratio", "residual"):
            panels[f"{label} {kind}"].tick_params(labelbottom=False)
    panels[f"{labels[0]} ratio"].set_title(shown, loc="right", fontsize="small", pad=2)
    panels[f"{labels[0]} residual"].set_title("(re-smeared - measured) / Idev", loc="right", fontsize="small", pad=2)
    for kind in ("ratio", "residual"):
        panels[f"{labels[-1]} {kind}"].set_xlabel("q (1/nm)")


def main() -> None:
    """Run all data sets and write the report."""
    parser = argparse.ArgumentParser(description="Measured curves, desmeared by every method.")
    parser.add_argument("--quick", action="store_true", help="smoke test: two data sets, two noise draws")
    parser.add_argument("--seeds", type=int, default=10, help="noise draws where a file is without noise (default: 10)")
    parser.add_argument("--model", default="dsnet", help="released model that answers as dsnet (default: dsnet)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    arguments = parser.parse_args()
    arguments.seeds = 2 if arguments.quick else arguments.seeds
    torch.set_num_threads(1)
    figures = arguments.output / "measured"
    figures.mkdir(parents=True, exist_ok=True)
    methods = available(METHODS | {"dsnet": ("dsnet", {"model": arguments.model})})
    loaders = [*USAXS, *BUNDLED]
    if not JLDESMEAR.is_dir():
        print(f"no reference data of jldesmear at {JLDESMEAR}: only sasdata's are run", flush=True)
        loaders = BUNDLED
    if arguments.quick:
        loaders = QUICK
    found: list[tuple[DataSet, dict[str, Scores]]] = []
    for loader in loaders:
        data = loader(arguments.seeds)
        print(data.title, flush=True)
        scores, answers = run(data, methods)
        draw(data, answers, figures / f"{data.slug}.png")
        found.append((data, scores))
    (arguments.output / "measured.md").write_text(report(found, list(methods), arguments), encoding="utf-8")


if __name__ == "__main__":
    main()

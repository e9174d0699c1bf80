"""What each ingredient of dsnet brings: short trainings without it, judged on validation families; the model without its steps.

The same small network is trained again and again, for as many steps on as many curves, each time with one thing withheld:
what the exact operator says of a curve, families of curves, instruments, or a part of the network. Then the released
model answers validation curves with and without the steps towards the measurement. Test families are not looked at.
Writes Markdown and a figure:

    python benchmarks/ablation.py                       # about 40 minutes on one thread, and 20 for the library the first time
    python benchmarks/ablation.py --part training       # the trainings only; what an interrupted run finished is kept
    python benchmarks/ablation.py --part consistency    # the released model only: 3 minutes
    python benchmarks/ablation.py --quick               # a smoke test

It needs sasmodels: pip install 'dsnet-bluesky[train]'. The library is that of the model's own recipe: where a training has
left one (library.npz), copy it into the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ablation_variants import (
    EVERYTHING,
    POINTS,
    QUICK,
    SEED,
    SETS,
    VARIANTS,
    Scale,
    Trial,
    library_of,
    recipe_of,
    sessions_of,
    smoothed,
)
from families import table
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from measured import plain
from numpy.typing import NDArray
from provenance import provenance, with_model
from torch import Tensor

from dsnet_bluesky.dsnet import MISSED, DSNet
from dsnet_bluesky.features import Features
from dsnet_bluesky.library.examples import Session, draw_instrument_of
from dsnet_bluesky.library.instruments import Instrument
from dsnet_bluesky.library.measurements import draw_noise
from dsnet_bluesky.library.samples import Library, draw_sample, load_library
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.unrolled import Unrolled

Floats = NDArray[np.floating[Any]]

APART = 10_000
"""Number of the first instrument that the released model is tried with: calibration saw those from 0 on."""

PACKAGES = ("dsnet-bluesky", "torch", "numpy", "sasmodels")
OUTCOMES = "{part}.json"


# Trainings


def run_trainings(folder: Path, scale: Scale, command: str, *, quick: bool) -> dict[str, Any]:
    """Train and judge all variants; trainings that were finished before are only judged."""
    library = library_of(folder, quick=quick)

    @cache
    def load(name: str, split: str) -> list[Session]:
        count = scale.sessions if split == "training" else scale.validation_sessions
        return sessions_of(folder, library, name, split, count, scale.curves)

    whole = load("all", "validation")
    trials: dict[str, list[dict[str, Any]]] = {}
    for label, variant in VARIANTS.items():
        sessions = load(variant.sessions, "training")
        sessions = [variant.hide(part) for part in sessions[: max(1, len(sessions) // variant.share)]]
        validation = [variant.hide(part) for part in load(variant.validation, "validation")]
        if [part.levels for part in validation] != [part.levels for part in whole]:
            raise RuntimeError(f"{label} would be judged by other curves than the rest: some of its features are not finite.")
        places = [folder / "trainings" / f"{label}, {seed}" for seed in range(scale.seeds if label == EVERYTHING else 1)]
        trials[label] = [
            trained(place, Trial(recipe_of(scale, SEED + seed), variant.network), sessions, validation)
            for seed, place in enumerate(places)
        ]
    classical: dict[str, Callable[[Session, Features], tuple[Tensor, None]]] = {
        "the smoothed measured curve": lambda part, features: (smoothed(part.operator, features), None),
        "20 Richardson-Lucy steps": lambda part, features: (features.start, None),
        "the indirect transform": lambda part, features: (features.indirect, None),
    }
    return {
        "provenance": provenance(command, PACKAGES),
        "scale": dataclasses.asdict(scale),
        "curves": labels_of(whole),
        "trials": trials,
        "classical": {label: judge(answer, whole) for label, answer in classical.items()},
    }


def trained(place: Path, trial: Trial, sessions: list[Session], validation: list[Session]) -> dict[str, Any]:
    """Take the steps that a trial has not taken yet, and judge it."""
    place.mkdir(parents=True, exist_ok=True)
    trial.resume(place / "checkpoint.pt")
    trial.learn(sessions, validation, place)
    found = judge(partial(answered, trial.average), validation)
    print(f"{place.name}: {geometric(found['mse']):.3g}, {trial.seconds:.0f} s", flush=True)
    return {**found, "parameters": used_parameters(trial.network), "sessions": len(sessions)}


def used_parameters(network: Unrolled) -> int:
    """Count what these trainings learn: the head for parts of errors is not in their loss."""
    return network.parameter_count - sum(parameter.numel() for parameter in network.split.parameters())


def answered(network: Unrolled, part: Session, features: Features) -> tuple[Tensor, Tensor]:
    """Give ln I and ln of its error."""
    answer = network(part.operator, features)
    return answer.ln_I, answer.ln_error


@torch.no_grad()
def judge(answer: Callable[[Session, Features], tuple[Tensor, Tensor | None]], sessions: Sequence[Session]) -> dict[str, Any]:
    """Give the mean squared error of ln I of every curve, and the share of its points within one stated error."""
    errors, shares = [], []
    for part in sessions:
        measured = part.operator.measured > 0
        features, ln_truth = part.batch(slice(None), part.operator.device)
        ln_I, ln_error = answer(part, features)
        off = (ln_I - ln_truth)[:, measured]
        errors += off.square().mean(dim=1).tolist()
        if ln_error is not None:
            shares += (off.abs() < ln_error[:, measured].exp()).float().mean(dim=1).tolist()
    return {"mse": errors, "inside": shares}


def labels_of(sessions: Sequence[Session]) -> dict[str, list[str]]:
    """Name the classes of every curve: kind of operator, noise, kind of family."""
    kinds = [kind_of(part.operator.smearing.kind) for part in sessions for _ in part.levels]
    noises = [noise_of(level) for part in sessions for level in part.levels]
    return {"operator": kinds, "noise": noises, "families": [group_of(name) for part in sessions for name in part.families]}


CLASSES: dict[str, tuple[str, ...]] = {
    "operator": ("Gaussian", "rings, sectors", "other forms", "slit"),
    "noise": ("below 0.3 %", "0.3 to 3 %", "above 3 %"),
    "families": ("particles", "no edges", "order"),
}
"""Classes of curves by which errors are broken down."""


def kind_of(kind: str) -> str:
    """Class of an operator; products of a Gaussian are nearly one."""
    kinds = {"rings": "rings, sectors", "coverage": "rings, sectors", "any_form": "other forms", "slit": "slit"}
    return kinds.get(kind, "Gaussian")


def noise_of(level: float) -> str:
    """Class of the relative noise of the median point."""
    return CLASSES["noise"][int(np.searchsorted((0.003, 0.03), level))]


def group_of(family: str) -> str:
    """Class of a validation family."""
    if family in ("gel_fit", "mass_surface_fractal"):
        return "no edges"
    ordered = ("lamellar_hg_stack_caille", "two_yukawa", "peaks", "grating")
    return "order" if family in ordered else "particles"


# The released model


CONDITIONS: dict[str, tuple[float, float]] = {
    "Idev and R are right": (1.0, 0.0),
    "Idev is half of what it should be": (0.5, 0.0),
    "the instrument is 12 % wider than R": (1.0, 0.5),
}
"""What Idev says over the truth, and a blur that R knows nothing of, in widths of R."""

CHI2 = (1.5, MISSED, 10.0)
"""Limits of the classes of chi2 before any step."""


def run_consistency(folder: Path, scale: Scale, model: str, command: str, *, quick: bool) -> dict[str, Any]:
    """Let the released model answer validation curves without its steps, and with steps for every curve."""
    library = load_library(library_of(folder, quick=quick), "validation")
    found: dict[str, dict[str, list[float]]] = {name: {} for name in CONDITIONS}
    name = ""
    for number in range(APART, APART + scale.instruments):
        instrument = draw_instrument_of([SEED, 1, number], POINTS)
        alone = DSNet(instrument.smearing, consistency=False, fallback=False, model=model)
        stepped = DSNet(instrument.smearing, fallback=False, model=model)
        name = f"{alone.model.name}:{alone.model.version}"
        for condition, (stated, blur) in CONDITIONS.items():
            curves = misstated([SEED, 1, number], instrument, library, scale.tried, stated, blur)
            for key, values in tried(alone, stepped, *curves).items():
                found[condition].setdefault(key, []).extend(values)
        print(f"{number - APART}: {instrument.smearing!r}", flush=True)
    return {"provenance": provenance(command, PACKAGES), "scale": dataclasses.asdict(scale), "model": name, "found": found}


def misstated(
    place: list[int], instrument: Instrument, library: Library, count: int, stated: float, blur: float
) -> tuple[Floats, Floats, Floats]:
    """Measure samples; samples and noise are the same whatever is stated. Give I, Idev and the truth, shape (curve, n)."""
    rng, smearing, fine = np.random.default_rng([*place, 1]), instrument.smearing, instrument.fine
    ideal = np.array([draw_sample(rng, library, instrument.view).I(fine) for _ in range(count)])
    truth = smearing.at_q(ideal[:, :: (fine.size - 1) // (smearing.q_calc.size - 1)])
    if blur:
        ideal = Smearing.gaussian(fine, blur * instrument.view.width, q_calc=fine).apply(ideal)
    smeared = instrument.fine_smearing.apply(ideal)
    noises = [draw_noise(rng, smearing.q, curve)._replace(stated=stated, correlation=0.0) for curve in smeared]
    found = [noise.measure(rng, curve) for noise, curve in zip(noises, smeared, strict=True)]
    return np.array([f.I for f in found]), np.array([f.Idev for f in found]), truth


def tried(alone: DSNet, stepped: DSNet, I: Floats, Idev: Floats, truth: Floats) -> dict[str, list[float]]:
    """Give for every curve chi2, error and coverage, of the network alone and after the steps."""
    with patch("dsnet_bluesky.dsnet.MISSED", 0.0):  # every curve takes the steps: what if is the question
        answers = {"alone": alone(I, Idev), "stepped": stepped(I, Idev)}
    columns: dict[str, list[float]] = {}
    for name, solution in answers.items():
        assert solution.I is not None
        rest = (alone.smearing.apply(solution.I_calc) - I) / Idev
        columns[f"chi2 {name}"] = np.mean(rest**2, axis=1).tolist()
        columns[f"mse {name}"] = np.mean(np.log(solution.I / truth) ** 2, axis=1).tolist()
        columns[f"inside {name}"] = np.mean(np.abs(solution.I - truth) <= solution.Idev, axis=1).tolist()
    return columns


# Report


def geometric(errors: Sequence[float] | Floats) -> float:
    """Geometric mean, as `training.unrolled.evaluate` takes it."""
    return float(np.exp(np.mean(np.log(np.asarray(errors) + 1e-9))))


def masks_of(curves: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Give the classes in order, and the curves in each."""
    for head, names in CLASSES.items():
        for name in names:
            yield name, np.array(curves[head]) == name


def training_table(made: dict[str, Any]) -> str:
    """Lay out the error and the coverage over all validation curves."""
    reference = reference_of(made)
    rows = [
        [label, plain(mean := geometric(found["mse"])), plain(mean / reference), "", "", ""]
        for label, found in made["classical"].items()
    ]
    for label, trials in made["trials"].items():
        for seed, found in enumerate(trials):
            mean, inside = geometric(found["mse"]), 100 * np.mean(found["inside"])
            title = f"**{label}**, seed {seed + 1}" if len(trials) > 1 else label
            numbers = [f"{inside:.0f}", str(found["sessions"]), f"{found['parameters'] / 1e3:.0f}"]
            rows.append([title, plain(mean), plain(mean / reference), *numbers])
    head = ["", "MSE", f"over {EVERYTHING}", "in one error, %", "sessions", "parameters, 10³"]
    return table(head, rows)


def reference_of(made: dict[str, Any], mask: Any = slice(None)) -> float:
    """Error of the complete training on some curves, over its seeds."""
    return geometric([geometric(np.array(found["mse"])[mask]) for found in made["trials"][EVERYTHING]])


def ratios_of(made: dict[str, Any], found: dict[str, Any]) -> list[float]:
    """Error over that of the complete training, in every class."""
    errors = np.array(found["mse"])
    return [geometric(errors[mask]) / reference_of(made, mask) for _, mask in masks_of(made["curves"]) if mask.any()]


def classes_table(made: dict[str, Any]) -> str:
    """Lay out by what factor the error grows, class by class; the first row is the error itself."""
    masks = {name: mask for name, mask in masks_of(made["curves"]) if mask.any()}
    rows = [
        ["curves", *(str(int(mask.sum())) for mask in masks.values())],
        [f"MSE, {EVERYTHING}", *(plain(reference_of(made, mask)) for mask in masks.values())],
        ["its seeds, lowest to highest", *(seeds_range(made, mask) for mask in masks.values())],
        ["the indirect transform", *map(plain, ratios_of(made, made["classical"]["the indirect transform"]))],
    ]
    others = {label: trials[0] for label, trials in made["trials"].items() if label != EVERYTHING}
    rows += [[label, *map(plain, ratios_of(made, found))] for label, found in others.items()]
    return table(["", *masks], rows)


def seeds_range(made: dict[str, Any], mask: NDArray[np.bool_]) -> str:
    """Give the least and the largest factor among the seeds of the complete training."""
    factors = [geometric(np.array(f["mse"])[mask]) / reference_of(made, mask) for f in made["trials"][EVERYTHING]]
    return f"{min(factors):.2f} to {max(factors):.2f}"


def spread_of(made: dict[str, Any]) -> float:
    """Standard deviation of ln of the error over the seeds of the complete training."""
    return float(np.std([np.log(geometric(found["mse"])) for found in made["trials"][EVERYTHING]], ddof=1))


def verdict(made: dict[str, Any]) -> str:
    """Sort the variants by what they cost, and say what the seeds cannot tell apart."""
    reference, spread = reference_of(made), spread_of(made)
    factors = {k: geometric(t[0]["mse"]) / reference for k, t in made["trials"].items() if k != EVERYTHING}
    # A single training against the mean of several; three standard deviations of the difference.
    limit = 3 * spread * np.sqrt(1 + 1 / len(made["trials"][EVERYTHING]))
    ordered = sorted(factors, key=lambda label: -factors[label])
    groups = {
        "It costs to train with": [k for k in ordered if np.log(factors[k]) > limit],
        "No difference that three seeds could tell": [k for k in ordered if abs(np.log(factors[k])) <= limit],
        "It even helps to train with": [k for k in ordered if np.log(factors[k]) < -limit],
    }
    lines = [f"{head}: {', '.join(f'{k} ({plain(factors[k])})' for k in names)}." for head, names in groups.items() if names]
    head = (
        f"In brackets the error over that of {EVERYTHING}, whose own seeds differ by {100 * spread:.1f} % (one standard "
        f"deviation): a factor above {plain(float(np.exp(limit)), 3)} is more than chance."
    )
    return "\n".join([head, "", *(f"- {line}" for line in lines)])


def consistency_table(made: dict[str, Any]) -> str:
    """Lay out what steps do to answers, by what chi2 these had without."""
    rows = []
    limits = [0.0, *CHI2, np.inf]
    for condition, columns in made["found"].items():
        values = {name: np.array(column) for name, column in columns.items()}
        before = values["chi2 alone"]
        for low, high in itertools.pairwise(limits):
            chosen = (before > low) & (before <= high)
            if chosen.any():
                name = f"{low:g} to {high:g}" if np.isfinite(high) else f"above {low:g}"
                rows.append(steps_row(condition, name, {k: v[chosen] for k, v in values.items()}))
        taken = before > MISSED
        kept = {k: np.where(taken, v, values[k.replace("stepped", "alone")]) for k, v in values.items()}
        rows.append(steps_row(condition, "**all, as released**", kept))
    head = [
        "", "chi2 of the network", "curves", "chi2 with steps", "MSE, network", "MSE with steps",
        "nearer to the truth, %", "in one Idev, network, %", "with steps, %",
    ]  # fmt: skip
    return table(head, rows)


def steps_row(condition: str, name: str, values: dict[str, Floats]) -> list[str]:
    """Figures of some curves; nearer: of those that moved."""
    moved = values["mse stepped"] != values["mse alone"]
    nearer = f"{100 * np.mean((values['mse stepped'] < values['mse alone'])[moved]):.0f}" if moved.any() else "-"
    return [
        condition,
        name,
        str(moved.size),
        plain(float(np.median(values["chi2 stepped"]))),
        *(plain(geometric(values[f"mse {k}"])) for k in ("alone", "stepped")),
        nearer,
        *(f"{100 * np.mean(values[f'inside {k}']):.0f}" for k in ("alone", "stepped")),
    ]


PROTOCOL = """\
**Short trainings.** Every row is the network of dsnet 2 with its loss and its optimizer, but small, so that all of it takes a
core less than an hour: channels {channels}, {steps} steps of {batch} curves, sessions of {curves} curves with random
instruments of at most {most} points. The released model is four times as large, and trained ten times as long, on several times
as many curves of up to 600 points: what an ingredient brings to that may differ, most of all the size of the set.
All variants see the same instruments in the same order; what is withheld is zero in their input, so that they keep their size.

**Judged** on {validation} curves of the validation families, by {validation_sessions} random instruments;
no variant was trained on either, and test families were not looked at. MSE: geometric mean over curves of the mean squared
error of ln I at the measured points. In one error: share of the points within the stated error, not calibrated (68 wanted).
The first three rows are no networks.

**Withheld.** *No operator: widths only*: the network starts from the smoothed measured curve and is told its noise, the grid
and the local widths of R, as a dQ column would; no classical iteration, no residual, no indirect transform, no R between the
U-Nets. *No operator in the features*: the same, but R stays between the U-Nets. *A Gaussian in place of R*: everything, but
computed with a Gaussian of R's local widths, in training and validation alike: what a method sees that assumes one.
*One U-Net*: the first alone, or as wide as it takes to have as many weights. *Spheres only*: {spheres},
with sizes, polydispersity, upturns, peaks and backgrounds at random like all.
*Eight families*: {eight}.
What is mixed into a sample is of these families too.
"""

CLASSES_TEXT = """\
The error over that of {everything} (mean of its seeds), by kind of operator, relative noise of the median point and kind of
family. Gaussian: one width or a dQ column, with a wavelength spread or without. No edges: gel_fit, mass_surface_fractal; order:
stacked lamellae, two_yukawa, peaks, gratings; particles: all others.
"""

STEPS = """\
The released model {model} on {instruments} other random instruments with {tried} curves of validation families each,
answered by the network alone, and with steps towards the measurement (`consistency`) for every curve, whatever its chi2; the
release takes them above {missed:g}. Samples and noise are the same in all three conditions; a classical method never takes over.
chi2 with steps: median; nearer: share of the curves that the steps moved; in one Idev: calibrated, 68 wanted; steps leave Idev
as it is.
"""


def report(folder: Path) -> str:
    """Write the whole Markdown, from what both parts left."""
    parts = ["# What each ingredient brings"]
    made, tried_on = (outcomes(folder, part) for part in ("training", "consistency"))
    if made is not None:
        sets = {name: ", ".join(names) for name, names in SETS.items()}
        protocol = PROTOCOL.format(**made["scale"], **sets, most=POINTS[1], validation=len(made["curves"]["noise"]))
        parts += [made["provenance"], protocol, "## Trained without it", verdict(made), training_table(made)]
        parts += ["## For whom it matters", CLASSES_TEXT.format(everything=EVERYTHING), classes_table(made)]
    parts += ["## Steps towards the measurement"]
    if tried_on is not None:
        words = STEPS.format(**tried_on["scale"], model=tried_on["model"], missed=MISSED)
        parts += [tried_on["provenance"], words, consistency_table(tried_on)]
    else:
        parts += ["Not measured yet: `python benchmarks/ablation.py --part consistency`."]
    return "\n\n".join([*parts, "![Factors of the error](ablation.png)"]) + "\n"


def outcomes(folder: Path, part: str) -> dict[str, Any] | None:
    """Read what a part left, None if it has not been run."""
    path = folder / OUTCOMES.format(part=part)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def draw(folder: Path, path: Path) -> None:
    """Draw by what factor the error grows without each ingredient, and how often steps bring answers nearer."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    made, tried_on = (outcomes(folder, part) for part in ("training", "consistency"))
    if made is not None:
        draw_factors(left, made)
    if tried_on is not None:
        draw_steps(right, tried_on)
    else:
        right.axis("off")
    figure.savefig(path, dpi=90)


def draw_factors(panel: Any, made: dict[str, Any]) -> None:
    """One row for each variant: all curves, and every kind of operator."""
    labels = [label for label in made["trials"] if label != EVERYTHING][::-1]
    reference, spread = reference_of(made), spread_of(made)
    panel.axvspan(np.exp(-3 * spread), np.exp(3 * spread), color="0.88", label="± 3 standard deviations of the seeds")
    kinds = [name for name in CLASSES["operator"] if name in made["curves"]["operator"]]
    found = [made["trials"][label][0] for label in labels]
    for number, name in enumerate(kinds):  # the first classes of `ratios_of`
        panel.plot([ratios_of(made, f)[number] for f in found], range(len(labels)), "o", ms=4.5, color=f"C{number}", label=name)
    panel.plot([geometric(f["mse"]) / reference for f in found], range(len(labels)), "kD", mfc="none", ms=8, label="all curves")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_yticks(range(len(labels)), labels)
    panel.set(xlabel=f"mean squared error of ln I over that of {EVERYTHING}", title="trained without it")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def draw_steps(panel: Any, made: dict[str, Any]) -> None:
    """Error with steps over that without, against chi2 without: a dot for each curve."""
    for number, (condition, columns) in enumerate(made["found"].items()):
        chi2, alone, stepped = (np.array(columns[name]) for name in ("chi2 alone", "mse alone", "mse stepped"))
        panel.loglog(chi2, stepped / alone, ".", ms=3, color=f"C{number}", alpha=0.6, label=condition)
    panel.axhline(1, color="k", lw=0.8)
    panel.axvline(MISSED, color="k", ls="--", lw=0.8)
    panel.set(xlabel="chi2 of the network's answer", ylabel="MSE with steps over MSE without", title="steps, released model")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts asked for and write the report."""
    parser = argparse.ArgumentParser(description="What each ingredient of dsnet brings.")
    parser.add_argument("--quick", action="store_true", help="smoke test: a few steps on a few curves")
    parser.add_argument("--part", choices=["training", "consistency"], help="run one part only (default: both)")
    parser.add_argument("--model", default="dsnet", help="released model, or the folder of one (default: dsnet)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    default = Path(__file__).parents[1] / "build" / "benchmarks" / "ablation"
    parser.add_argument("--cache", type=Path, default=default, help="where library, sessions, checkpoints and outcomes are kept")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    quick = arguments.quick
    folder, scale = (arguments.cache / "quick", QUICK) if quick else (arguments.cache, Scale())
    for place in (folder, arguments.output):
        place.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[str], dict[str, Any]]] = {
        "training": lambda command: run_trainings(folder, scale, command, quick=quick),
        "consistency": lambda command: run_consistency(folder, scale, arguments.model, command, quick=quick),
    }
    for part in [arguments.part] if arguments.part else runs:
        command = with_model(f"python benchmarks/ablation.py --part {part}" + " --quick" * quick, arguments.model)
        made = runs[part](command)
        (folder / OUTCOMES.format(part=part)).write_text(json.dumps(made), encoding="utf-8")
    draw(folder, arguments.output / "ablation.png")
    (arguments.output / "ablation.md").write_text(report(folder), encoding="utf-8")


if __name__ == "__main__":
    main()

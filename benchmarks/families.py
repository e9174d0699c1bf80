"""Families that no choice ever saw, measured by random instruments at three doses: every method on the same curves.

Ideal curves of the test families (`dsnet_bluesky.library.families`), alone, polydisperse, mixed and on
backgrounds, are smeared by random instruments on a grid six times finer than the one that they are desmeared on, and get
noise as instruments make it and state it. Neither the shapes nor the instruments have anything in common with
those of training. Writes Markdown and two sheets of figures:

    python benchmarks/families.py            # about 10 minutes on one thread; the first time 5 more for the library
    python benchmarks/families.py --quick    # a smoke test: two instruments, five families

It needs sasmodels and sasdata: pip install 'dsnet-bluesky[dev]'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from measured import COLOURS, available, plain, reason
from numpy.typing import NDArray
from provenance import provenance, with_model

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import Prepared, prepare
from dsnet_bluesky.desmearing.covariance import covariance, coverage_factor
from dsnet_bluesky.library.examples import Measured, draw_instrument_of, measure
from dsnet_bluesky.library.families import FAMILIES, make_shapes
from dsnet_bluesky.library.lattices import FLUIDS, LATTICES, make_structure_factors
from dsnet_bluesky.library.samples import Library, families_of, load_library, save_library
from dsnet_bluesky.smearing import Smearing

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

SEED = 31415
"""Of shapes, instruments and noise: recipes of trainings have others."""

TEST = 2
"""Second number of every list of seeds here; trainings have 0, 1 and 3."""

DOSES = (0.003, 0.02, 0.1)
"""Relative noise of the median point."""

CHEAP = ("multilayer_vesicle", "lamellar_stack_caille", "fractal_core_shell", "adsorbed_layer", "squarewell")
"""Families of the smoke test: their curves take no orientation average."""

CLASSICAL = ("lake", "wiener", "map", "ift", "cme")
BARE = "dsnet, network only"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*CLASSICAL, "dsnet")},
    BARE: ("dsnet", {"consistency": False, "fallback": False}),
}
"""By the name in the tables: a method and its options."""

LEAST = 0.1
"""Answers below this part of the least truth of their curve are raised to it before the logarithm, and counted."""

SEVERITIES = (0.01, 0.1, 1.0)
"""Limits of the classes of curves by the error of ln I before any desmearing."""

WANTED = (0.65, 0.93)
"""Least coverage, of one and of two Idev, of all points together."""

LEAST_COVERAGE = (0.60, 0.88)
"""Of every family, noise and q range."""

WINDOWS = 10
"""Windows of a curve over which averages are held against their errors."""


@dataclass(frozen=True)
class Answer:
    """What one method made of one curve.

    Attributes
    ----------
    I, Idev
        Shape (n,).
    off
        |I - truth| / Idev, shape (n,).
    mse
        Mean squared error of ln I.
    floored
        Number of points that were raised.
    chi2, flags
        As reported.
    by
        For dsnet: what answered.
    windows
        Errors of averages over windows, in three kinds of standard deviations: by the covariance, as if
        points were independent, as if they were one; shape (3, window). Empty where no covariance is known.
    wide
        How many Idev are to hold 95 %: the coverage factor of dsnet, 1.96 of the others.
    """

    I: Floats
    Idev: Floats
    off: Floats
    mse: float
    floored: int
    chi2: float
    flags: int
    by: str
    windows: Floats
    wide: float = 1.96


@dataclass(frozen=True)
class Outcome:
    """A measured curve, and what all methods made of it; None where one refused."""

    kind: str
    family: str
    dose: float
    smearing: Smearing
    I: Floats
    Idev: Floats
    truth: Floats
    answers: dict[str, Answer | None] = field(default_factory=dict)

    @property
    def q(self) -> Floats:
        """In 1/nm, scaled so that the last is 5."""
        return self.smearing.q

    @property
    def ranges(self) -> dict[str, Mask]:
        """Parts of the q range, shape (n,) each."""
        n = self.q.size
        place = np.arange(n)
        later = np.maximum.accumulate(self.truth[::-1])[::-1]
        parts = {"edge": place < max(3, 0.05 * n), "minima": self.truth < 0.5 * later, "high q": place >= 0.9 * n}
        return {**parts, "elsewhere": ~np.logical_or.reduce(list(parts.values()))}


# Curves


def library_of(cache: Path, families: Sequence[str], shapes: int) -> Library:
    """Read the library of test families, or compute it: at most `shapes` of each family."""
    path = cache / f"families-{SEED}-{len(families)}-{shapes}.npz"
    if not path.exists():
        print("computing the library of test families", flush=True)
        made = [
            shape for f in FAMILIES if f.name in families for shape in make_shapes(f, SEED, min(shapes, f.count))
        ]  # fmt: skip
        kinds = [name for name in {**LATTICES, **FLUIDS} if name in families]
        cache.mkdir(parents=True, exist_ok=True)
        save_library(path, Library(made, [factor for name in kinds for factor in make_structure_factors(name, SEED)]))
    return load_library(path)


def measured_by(number: int, library: Library, families: Sequence[str], curves: int) -> list[Outcome]:
    """Measure curves of every family at every dose with one random instrument."""
    place = [SEED, TEST, number]
    instrument = draw_instrument_of(place)
    outcomes: list[Outcome] = []
    for index, family in enumerate(families):
        for dose in DOSES:
            # One seed for all doses: the same samples, and noise that differs in size only.
            rng = np.random.default_rng([*place, index])
            outcomes += outcomes_of(measure(rng, instrument, library, curves, family=family, level=dose), dose)
    return outcomes


def outcomes_of(measured: Measured, dose: float) -> list[Outcome]:
    """Give one outcome for each curve, still without answers."""
    smearing = measured.instrument.smearing
    truth = smearing.at_q(measured.truth)
    return [
        Outcome(measured.instrument.kind, family, dose, smearing, measured.I[i], measured.Idev[i], truth[i])
        for i, family in enumerate(measured.families)
    ]


def is_linear(smearing: Smearing) -> bool:
    """Tell whether a grid has equal steps."""
    steps = np.diff(smearing.q)
    return bool(np.ptp(steps) < 1e-6 * steps.max())


# Answers


def answer_all(label: str, method: str, options: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Desmear curves of one instrument, and add the answers; refusals are None."""
    started, refusals = time.perf_counter(), []
    try:
        prepared = prepare(outcomes[0].smearing, method, **options)
        rows = attempt(prepared, outcomes, refusals)
    except BadInput as error:
        refusals.append(str(error))
        rows = [None] * len(outcomes)
    for outcome, row in zip(outcomes, rows, strict=True):
        outcome.answers[label] = None if row is None else judge(outcome, row)
    seconds = (time.perf_counter() - started) / len(outcomes)
    why = f", {sum(row is None for row in rows)} refused: {reason(refusals[0])}" if refusals else ""
    print(f"  {label:12s} {1e3 * seconds:.3g} ms a curve{why}", flush=True)


def attempt(prepared: Prepared, outcomes: Sequence[Outcome], refusals: list[str]) -> list[xr.Dataset | None]:
    """Desmear curves together; None for those that the method refuses."""
    batch = curve(outcomes[0].q, np.array([o.I for o in outcomes]), np.array([o.Idev for o in outcomes]))
    try:
        result = prepared(batch)
    except BadInput as error:
        refusals.append(str(error))
        return [None] * len(outcomes)
    told = result["answer"].values if "answer" in result else [""] * len(outcomes)
    refusals += [failure["reason"] for failure in json.loads(result.attrs.get("failures", "[]"))]
    good = result["status"].values == "ok"
    return [result.isel(exposure=i).assign_attrs(by=told[i]) if good[i] else None for i in range(len(outcomes))]


def judge(outcome: Outcome, result: xr.Dataset) -> Answer:
    """Hold an answer against the truth."""
    I, Idev = result["I"].values, result["Idev"].values
    least = LEAST * outcome.truth.min()
    mse = np.mean((np.log(np.maximum(I, least)) - np.log(outcome.truth)) ** 2)
    off = np.abs(I - outcome.truth) / Idev
    by = result.attrs["by"]
    own = by in ("network", "proximal")
    windows = window_errors(result, outcome.truth) if own else np.empty((3, 0))
    return Answer(
        I,
        Idev,
        off,
        float(mse),
        int((least > I).sum()),
        float(result["chi2"]),
        int(result["flags"]),
        by,
        windows,
        coverage_factor(result),
    )


def window_errors(result: xr.Dataset, truth: Floats) -> Floats:
    """Give errors of the averages of I / answer over windows, see `Answer.windows`."""
    I, Idev = result["I"].values, result["Idev"].values
    parts = np.array_split(np.arange(I.size), WINDOWS)
    weights = np.array([np.isin(np.arange(I.size), part) / I / part.size for part in parts])
    found = covariance(result)
    told = ((weights @ found.factor) ** 2).sum(axis=1) + (weights**2) @ found.own**2
    deviations = np.sqrt([told, (weights**2) @ Idev**2, (weights @ Idev) ** 2])
    return np.abs(weights @ (I - truth)) / deviations


def fine_tune(outcomes: Sequence[Outcome], families: Sequence[str], iterations: int) -> None:
    """Let dsnet-paper answer one curve of each family that suits it: linear grid, middle dose, positive."""
    for shift, family in enumerate(families):
        suited = [
            o for o in outcomes if o.family == family and o.dose == DOSES[1] and is_linear(o.smearing) and (o.I > 0).all()
        ]  # fmt: skip
        if suited:
            chosen = suited[(2 * shift) % len(suited)]  # not all of one instrument
            answer_all("dsnet-paper", "dsnet-paper", {"iterations": iterations}, [chosen])


# Figures of merit


def answers_of(outcomes: Iterable[Outcome], label: str) -> list[Answer]:
    """Collect what a method answered."""
    return [found for outcome in outcomes if (found := outcome.answers.get(label)) is not None]


def mean_mse(outcomes: Iterable[Outcome], label: str) -> float:
    """Give the geometric mean of the error, NaN without any."""
    errors = [answer.mse for answer in answers_of(outcomes, label)]
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-12))))) if errors else np.nan


def covered(answers: Sequence[Answer], masks: Sequence[Mask] | None = None) -> tuple[float, float]:
    """Share of points in the 68 and 95 % bands, NaN without any."""
    kept = [slice(None)] * len(answers) if masks is None else masks
    one, wide = (
        np.concatenate([*((a.off <= half(a))[mask] for a, mask in zip(answers, kept, strict=True)), []])
        for half in (lambda a: 1.0, lambda a: a.wide)
    )
    return (float(one.mean()), float(wide.mean())) if one.size else (np.nan, np.nan)


def grouped(outcomes: Sequence[Outcome], key: Callable[[Outcome], Any]) -> dict[str, list[Outcome]]:
    """Sort outcomes into groups, in the order of their first members."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(str(key(outcome)), []).append(outcome)
    return groups


def all_groups(outcomes: Sequence[Outcome]) -> dict[str, dict[str, list[Outcome]]]:
    """All ways in which figures are broken down, by what heads their column."""
    return {
        "family": grouped(outcomes, lambda o: o.family),
        "noise": grouped(outcomes, lambda o: f"{o.dose:g}"),
        "instrument": grouped(sorted(outcomes, key=lambda o: o.kind), lambda o: o.kind),
        "smearing did": grouped(sorted(outcomes, key=damage), severity),
    }


def damage(outcome: Outcome) -> float:
    """Error of ln I of the curve as measured, noise included."""
    return error_of(outcome, "smeared")


def severity(outcome: Outcome) -> str:
    """Class of the error of the curve as measured."""
    place = int(np.searchsorted(SEVERITIES, damage(outcome)))
    limits = ["0", *(f"{limit:g}" for limit in SEVERITIES), "more"]
    return f"{limits[place]} to {limits[place + 1]}"


# Report


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(value: float, text: str | None = None, *, bold: bool = False) -> str:
    """Write a number, a dash where there is none."""
    if not np.isfinite(value):
        return "-"
    text = plain(value) if text is None else text
    return f"**{text}**" if bold else text


def titled(head: str, name: str) -> str:
    """Name the row of a group."""
    return name if head == "family" else f"{head} {name}"


def mse_row(title: str, outcomes: Sequence[Outcome], labels: Sequence[str]) -> list[str]:
    """Geometric mean and median of the error of every method; the best mean bold."""
    means = {label: mean_mse(outcomes, label) for label in labels}
    best = min(means, key=lambda label: np.nan_to_num(means[label], nan=np.inf))
    cells = []
    for label, mean in means.items():
        errors = [answer.mse for answer in answers_of(outcomes, label)]
        text = f"{plain(mean)} ({plain(float(np.median(errors)))})" if errors else None
        cells.append(cell(mean, text, bold=label == best))
    return [title, str(len(outcomes)), *cells]


def mse_table(outcomes: Sequence[Outcome], labels: Sequence[str]) -> str:
    """Lay out the error by family, noise and kind of instrument, and over all."""
    rows = [
        mse_row(titled(head, name), group, labels)
        for head, groups in all_groups(outcomes).items()
        for name, group in groups.items()
    ]
    common = [o for o in outcomes if all(o.answers.get(label) is not None for label in labels)]
    rows += [mse_row("**all**", outcomes, labels), mse_row("answered by every method", common, labels)]
    return table(["", "curves", *labels], rows)


def methods_table(outcomes: Sequence[Outcome], labels: Sequence[str]) -> str:
    """Lay out how every method fared in all: refusals, chi2, coverage, and how often it was the best."""
    rivals = [label for label in labels if label != BARE and ":" not in label]
    best = [min(rivals, key=lambda label: error_of(o, label)) for o in outcomes]
    rows = []
    for label in labels:
        answers = answers_of(outcomes, label)
        one, two = covered(answers)
        rows.append(
            [
                label,
                str(sum(o.answers.get(label) is None for o in outcomes)),
                str(sum(a.floored > 0 for a in answers)),
                cell(float(np.median([a.chi2 for a in answers])) if label != "smeared" and answers else np.nan),
                cell(float(np.mean([a.chi2 > 2 for a in answers])) * 100 if label != "smeared" and answers else np.nan),
                cell(100 * one, f"{100 * one:.0f} / {100 * two:.0f}") if label != "smeared" else "-",
                f"{100 * best.count(label) / len(best):.0f}" if label in rivals else "-",
            ]
        )
    head = ["method", "refused", "floored", "chi2, median", "chi2 > 2, %", "in the 68 / 95 % bands, %", "best of the curve, %"]
    return table(head, rows)


def error_of(outcome: Outcome, label: str) -> float:
    """Give the error of an answer; infinite where there is none."""
    answer = outcome.answers.get(label)
    return np.inf if answer is None else answer.mse


def coverage_row(
    title: str, answers: Sequence[Answer], masks: Any = None, least: tuple[float, float] = (0.60, 0.88)
) -> list[str]:
    """Coverage of one group, bold where it is less than it should be."""
    shares = covered(answers, masks)
    return [title, *(cell(100 * s, f"{100 * s:.1f}", bold=s < limit) for s, limit in zip(shares, least, strict=True))]


def coverage_table(outcomes: Sequence[Outcome], label: str) -> str:
    """Coverage of one method in all, by q range, by noise, by kind of instrument and by family."""
    answered = [o for o in outcomes if o.answers.get(label) is not None]
    rows = [coverage_row("**all**", answers_of(answered, label), least=WANTED)]
    regular = [o for o in answered if not trusted_less(o, label)]
    rows.append(coverage_row("all that is not flagged", answers_of(regular, label), least=WANTED))
    masks = [outcome.ranges for outcome in answered]
    rows += [coverage_row(part, answers_of(answered, label), [m[part] for m in masks]) for part in masks[0]]
    for head, groups in all_groups(answered).items():
        rows += [
            coverage_row(f"{name}" if head == "family" else f"{head} {name}", answers_of(g, label)) for name, g in groups.items()
        ]
    return table(["", "in the 68 % band, %", "in the 95 % band, %"], rows)


def windows_table(outcomes: Sequence[Outcome], label: str) -> str:
    """How averages over windows keep within errors that the covariance, and two simpler views, give them."""
    errors = np.concatenate([answer.windows for answer in answers_of(outcomes, label)], axis=1)
    names = ("by the covariance", "as if points were independent", "as if all errors of a window were one")
    return table(
        ["error of the average", "within one, %", "within two, %"],
        (
            [name, f"{100 * np.mean(off <= 1):.1f}", f"{100 * np.mean(off <= 2):.1f}"]
            for name, off in zip(names, errors, strict=True)
        ),
    )


def trusted_less(outcome: Outcome, label: str) -> bool:
    """Tell whether an answer is flagged as one that the model vouches for less."""
    answer = outcome.answers.get(label)
    return answer is not None and bool(answer.flags & (Flag.OUT_OF_RANGE | Flag.SUBSTITUTED | Flag.POOR_FIT))


def flags_table(outcomes: Sequence[Outcome], label: str) -> str:
    """What answered in the name of dsnet, how often it was flagged, and what flagged answers are worth."""
    shown = (Flag.OUT_OF_RANGE, Flag.SUBSTITUTED, Flag.POOR_FIT)
    names = ("network", "proximal", "map", "ift")
    rows = []
    for title, group in {"**all**": list(outcomes), **grouped(outcomes, lambda o: o.family)}.items():
        answers = answers_of(group, label)
        flagged = [o for o in group if trusted_less(o, label)]
        rows.append(
            [
                title,
                *(f"{100 * np.mean([a.by == name for a in answers]):.0f}" for name in names),
                *(f"{100 * np.mean([bool(a.flags & flag) for a in answers]):.0f}" for flag in shown),
                cell(mean_mse(flagged, label)),
                cell(mean_mse([o for o in group if not trusted_less(o, label)], label)),
            ]
        )
    head = [*names, *(str(flag.name).lower() for flag in shown), "MSE, flagged", "MSE, not flagged"]
    return table(["", *head], rows)


def paper_table(tuned: Sequence[Outcome], labels: Sequence[str]) -> str:
    """Lay out the errors on the curves that dsnet-paper was fine-tuned on."""
    labels = [*labels, "dsnet-paper"]
    rows = [mse_row(o.family, [o], labels) for o in tuned]
    return table(["", "curves", *labels], [*rows, mse_row("**all**", tuned, labels)]) if tuned else "None suited it."


def steps_table(outcomes: Sequence[Outcome]) -> str:
    """What proximal steps and substitutes brought to the curves that got them."""
    rows = []
    for by in ("network", "proximal", "map", "ift"):
        group = [o for o in outcomes if (found := o.answers.get("dsnet")) is not None and found.by == by]
        if not group:
            continue
        better = np.mean([error_of(o, "dsnet") < error_of(o, BARE) for o in group])
        shares = [covered(answers_of(group, label)) for label in (BARE, "dsnet")]
        rows.append(
            [
                by,
                str(len(group)),
                *(cell(mean_mse(group, label)) for label in (BARE, "dsnet")),
                "-" if by == "network" else f"{100 * better:.0f}",
                *(cell(100 * one, f"{100 * one:.0f} / {100 * two:.0f}") for one, two in shares),
            ]
        )
    columns = ["MSE, network alone", "MSE, as answered", "nearer, %", "in the bands, network alone, %", "as answered, %"]
    return table(["answered by", "curves", *columns], rows)


PROTOCOL = """\
{count} curves: {instruments} random instruments (50 to 600 points, any spacing, gaps; {kinds}), {families} test families,
three doses (relative noise of the median point {doses}), samples of each family: {curves}, the same at every dose. Shapes have
parameters, sizes, polydispersity, admixtures of other test families, upturns, peaks and backgrounds at random. Noise is
Poisson or relative, sometimes uniform, sometimes correlated between neighbours; Idev is right, wrong by some 15 %, too small
(0.5 to 0.8 of the truth), or estimated from the scatter: all methods are given the same. Curves are smeared on a grid six times
finer than q_calc. Seeds {seed}, in common with no training. All methods have their defaults; dsnet is the model {model}.

Error: mean squared error of ln I over the points of a curve; given are the geometric mean over the curves and, in brackets, their
median. Answers below {least:g} of the least truth of their curve are raised to that before the logarithm ("floored": how many
curves that befell). What a method refuses (lake: intensities that are not positive; wiener: uneven grids) is
missing from its figures, which makes them better than they are; the last row holds only curves that all answered.
"dsnet, network only" leaves out proximal steps and substitutes; it and another release are not counted among the best.
"Smearing did": classes of curves by the error that they have as measured, noise included.
chi2 is of the re-smeared answer against the measurement with its stated Idev, which is often too small.
"""

COVERAGE = """\
Share of the points at which |I - truth| is at most Idev, and the coverage factor times Idev; 68 and 95 % wanted. Bold: less
than 65 and 93 % of all, 60 and 88 % of a part. Edge: the first 5 % of the points. Minima: points whose truth is below half of
what it is anywhere at higher q. High q: the last 10 %. Not flagged: without out_of_range, substituted and poor_fit.
"""

WINDOW_TEXT = """\
Averages of I over each tenth of the points of a curve (weighted by 1 / I), against the errors that `desmearing.covariance` gives
them: curves that the network or its proximal steps answered.
"""


def report(outcomes: list[Outcome], labels: Sequence[str], arguments: argparse.Namespace, model: str) -> str:
    """Write the whole Markdown."""
    every = ["smeared", *labels]
    tuned = [o for o in outcomes if "dsnet-paper" in o.answers]
    options = " --quick" if arguments.quick else f" --instruments {arguments.instruments} --curves {arguments.curves}"
    options += f" --beside {arguments.beside}" if arguments.beside else ""
    command = with_model(f"python benchmarks/families.py{options}", arguments.model)
    kinds = ", ".join(f"{len({id(o.smearing) for o in g})} {k}" for k, g in all_groups(outcomes)["instrument"].items())
    families = len(all_groups(outcomes)["family"])
    protocol = PROTOCOL.format(
        count=len(outcomes), instruments=arguments.instruments, kinds=kinds, families=families, curves=arguments.curves,
        doses=", ".join(f"{dose:g}" for dose in DOSES), seed=f"[{SEED}, {TEST}, k]", least=LEAST, model=model,
    )  # fmt: skip
    return "\n\n".join(
        [
            "# Families that no choice ever saw",
            provenance(command, ("dsnet-bluesky", "numpy", "scipy", "torch", "sasmodels")),
            protocol,
            "## Error of ln I",
            mse_table(outcomes, every),
            "## Methods",
            methods_table(outcomes, every),
            "## dsnet-paper, fine-tuned",
            f"A subsample, since one curve takes {arguments.iterations} steps of fine-tuning: {len(tuned)} curves, one of each "
            f"family that was measured on a linear grid with positive intensities, noise {DOSES[1]:g}.",
            paper_table(tuned, every),
            "## Coverage of dsnet",
            COVERAGE,
            coverage_table(outcomes, "dsnet"),
            "## Averages over windows",
            WINDOW_TEXT,
            windows_table(outcomes, "dsnet"),
            "## What answered, and what was flagged",
            "Per cent of the curves, and the error (geometric mean) of those that are flagged and of those that are not.",
            flags_table(outcomes, "dsnet"),
            "What proximal steps and substitutes brought to the curves that got them (nearer: share of these whose error fell):",
            steps_table(outcomes),
            "## Curves",
            "Of each family the curve with the median error of dsnet, and the one with the largest. "
            "Bands: ± 2 Idev. Beside dsnet the classical method that came nearest to the truth on that curve.",
            "![typical](families/typical.png)",
            "![worst](families/worst.png)",
        ]
    ) + "\n"  # fmt: skip


# Figures


def draw(chosen: Sequence[Outcome], path: Path) -> None:
    """Draw one curve of each family: measured, true, ours with its band, and the best classical answer."""
    columns = 4
    rows = -(-(len(chosen) + 1) // columns)
    figure = Figure(figsize=(14, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns).ravel()
    for panel, outcome in zip(panels, chosen, strict=False):
        draw_curve(panel, outcome)
    for panel in panels[len(chosen) :]:
        panel.axis("off")
    names = {"measured": "0.65", "truth": "k", "dsnet, ± 2 Idev": COLOURS["dsnet"], **{c: COLOURS[c] for c in CLASSICAL}}
    handles = [panels[-1].plot([], [], color=colour, lw=2, label=name)[0] for name, colour in names.items()]
    panels[-1].legend(handles=handles, frameon=False, loc="center")
    figure.savefig(path, dpi=85)


def draw_curve(panel: Any, outcome: Outcome) -> None:
    """Draw one curve."""
    q, truth, ours = outcome.q, outcome.truth, outcome.answers["dsnet"]
    assert ours is not None
    best = min(CLASSICAL, key=lambda label: error_of(outcome, label))
    other = outcome.answers.get(best)
    panel.loglog(q, np.where(outcome.I > 0, outcome.I, np.nan), ".", color="0.65", ms=2.5)
    if other is not None:
        panel.loglog(q, np.where(other.I > 0, other.I, np.nan), color=COLOURS[best], lw=0.9)
    low = np.maximum(ours.I - 2 * ours.Idev, 1e-3 * truth.min())
    panel.fill_between(q, low, ours.I + 2 * ours.Idev, color=COLOURS["dsnet"], alpha=0.25, lw=0)
    panel.loglog(q, ours.I, color=COLOURS["dsnet"], lw=1.1)
    panel.loglog(q, truth, "k:", lw=1)
    panel.set_ylim(0.3 * truth.min(), 3 * truth.max())
    panel.tick_params(labelsize="x-small")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    errors = f"dsnet {plain(ours.mse)}, {best} {plain(error_of(outcome, best))}"
    title = f"{outcome.family}, {outcome.kind}, noise {outcome.dose:g}\n{errors}"
    panel.set_title(title, loc="left", fontsize="x-small", pad=2)


def choose(outcomes: Sequence[Outcome], share: float) -> list[Outcome]:
    """Of each family the curve at a quantile of the error of dsnet."""
    chosen = []
    for group in grouped(outcomes, lambda o: o.family).values():
        answered = sorted((o for o in group if o.answers["dsnet"] is not None), key=lambda o: error_of(o, "dsnet"))
        chosen += answered[round(share * (len(answered) - 1)) :][:1]
    return chosen


def smeared(outcome: Outcome) -> Answer:
    """Take the measured curve itself for an answer."""
    units = {"chi2": np.nan, "flags": 0}
    return judge(outcome, curve(outcome.q, outcome.I, outcome.Idev, by="").assign(units))


def main() -> None:
    """Run all instruments and write the report."""
    parser = argparse.ArgumentParser(description="Test families, random instruments, three doses: all methods.")
    parser.add_argument("--quick", action="store_true", help="smoke test: two instruments, five families, one curve each")
    parser.add_argument("--instruments", type=int, default=10, help="random instruments (default: 10)")
    parser.add_argument("--curves", type=int, default=2, help="samples of each family for each instrument (default: 2)")
    parser.add_argument("--shapes", type=int, default=20, help="shapes of each family in the library (default: 20)")
    parser.add_argument("--model", default="dsnet", help="released model, or the folder of one (default: dsnet)")
    parser.add_argument("--beside", metavar="VERSION", help="another released model in a column of its own: dsnet:2.1.0")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--iterations", type=int, default=500, help="steps of fine-tuning of dsnet-paper (default: 500)")
    cache = Path(__file__).parents[1] / "build" / "benchmarks"
    parser.add_argument("--cache", type=Path, default=cache, help="where the library of curves is kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.instruments, arguments.curves, arguments.shapes, arguments.iterations = 2, 1, 3, 10
    torch.set_num_threads(1)
    (arguments.output / "families").mkdir(parents=True, exist_ok=True)
    families = CHEAP if arguments.quick else families_of("test")
    library = library_of(arguments.cache, families, arguments.shapes)
    methods = available(METHODS | ({arguments.beside: (arguments.beside, {})} if arguments.beside else {}))
    outcomes: list[Outcome] = []
    model = ""
    for number in range(arguments.instruments):
        made = measured_by(number, library, families, arguments.curves)
        print(f"{number}: {made[0].smearing!r}, {len(made)} curves", flush=True)
        for outcome in made:
            outcome.answers["smeared"] = smeared(outcome)
        for label, (method, options) in methods.items():
            answer_all(label, method, {**options, "model": arguments.model} if method == "dsnet" else options, made)
        outcomes += made
    model = prepare(outcomes[0].smearing, "dsnet", model=arguments.model).model
    fine_tune(outcomes, families[:2] if arguments.quick else families, arguments.iterations)
    for name, share in {"typical": 0.5, "worst": 1.0}.items():
        draw(choose(outcomes, share), arguments.output / "families" / f"{name}.png")
    words = f"{model.name}:{model.version}" if model is not None else arguments.model
    (arguments.output / "families.md").write_text(report(outcomes, list(methods), arguments, words), encoding="utf-8")


if __name__ == "__main__":
    main()

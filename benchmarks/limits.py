"""Where the released model must not be trusted: too much smearing, too few counts, too few points, too short a range.

Curves of the test families under a stationary Gaussian, one thing varied at a time. Writes Markdown and a figure:

    python benchmarks/limits.py            # about 2 minutes on one thread
    python benchmarks/limits.py --quick    # a smoke test

It needs sasmodels: pip install 'dsnet-bluesky[train]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from families import SEED, library_of
from matplotlib.figure import Figure
from numpy.typing import NDArray
from provenance import provenance, with_model

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.desmearing.covariance import coverage_factor
from dsnet_bluesky.library.samples import Library
from dsnet_bluesky.smearing import Smearing

Floats = NDArray[np.floating[Any]]

FAMILIES = ("multilayer_vesicle", "fractal_core_shell", "prism", "core_shell_bicelle_elliptical")
PACKAGES = ("dsnet-bluesky", "torch", "numpy", "sasmodels")
CACHE = Path(__file__).parents[1] / "build" / "benchmarks"
HIGHEST = 5.0
FINER = 6
CURVES = 24


@dataclass(frozen=True)
class Setting:
    """One measurement: points, width in 1/nm, relative noise, first q, and width times size of the particles."""

    points: int = 300
    width: float = 0.06
    noise: float = 0.02
    lowest: float = 0.05
    strength: float = 1.0


SWEEPS: dict[str, tuple[str, dict[float, Setting]]] = {
    "smearing": (
        "width times largest dimension (oscillations have a period of 2 pi in these units)",
        {s: Setting(strength=s) for s in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)},
    ),
    "noise": ("relative noise of a point", {n: Setting(noise=n) for n in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)}),
    "points": ("number of points", {n: Setting(points=n) for n in (20, 35, 50, 100, 300, 1000, 4000)}),
    "range": (
        "q range in widths of the smearing",
        {r: Setting(width=HIGHEST / r, lowest=HIGHEST / r) for r in (3.0, 5.0, 8.0, 12.0, 25.0, 50.0)},
    ),
}


@dataclass(frozen=True)
class Row:
    """What came of one setting."""

    smeared: float
    desmeared: float
    inside: tuple[float, float]
    out_of_range: float
    poor: float
    substituted: float


def measure(setting: Setting, library: Library, count: int, model: str) -> Row | str:
    """Desmear curves of the test families measured so; or what `prepare` says against it."""
    q = np.linspace(setting.lowest, HIGHEST, setting.points)
    try:
        prepared = prepare(smearing := Smearing.gaussian(q, setting.width), "dsnet", model=model)
    except BadInput as error:
        return str(error)
    rng = np.random.default_rng(SEED)
    nodes = smearing.q_calc
    fine = np.linspace(nodes[0], nodes[-1], max(FINER * nodes.size, 3000))
    shapes = [library.shape(rng, FAMILIES[k % len(FAMILIES)]) for k in range(count)]
    ideal = np.array([shape(fine * setting.strength / setting.width) + 1e-6 for shape in shapes])
    smeared = Smearing.gaussian(q, setting.width, q_calc=fine).apply(ideal)
    truth = np.array([np.interp(q, fine, I) for I in ideal])
    sigma = setting.noise * smeared
    I = smeared + sigma * rng.standard_normal(sigma.shape)
    result = prepared(curve(q, I, sigma))
    flags, off = result["flags"].values, np.abs(result["I"].values - truth) / result["Idev"].values
    return Row(
        geometric(np.maximum(smeared, 1e-12), truth),
        geometric(result["I"].values, truth),
        (float(np.mean(off <= 1)), float(np.mean(off <= coverage_factor(result)))),
        *(float(np.mean((flags & int(flag)) > 0)) for flag in (Flag.OUT_OF_RANGE, Flag.POOR_FIT, Flag.SUBSTITUTED)),
    )


def geometric(I: Floats, truth: Floats) -> float:
    """Geometric mean over curves of the mean squared error of ln I."""
    return float(np.exp(np.mean(np.log(np.mean(np.log(I / truth) ** 2, axis=1)))))


def table(rows: dict[float, Row | str], label: str) -> str:
    """Lay out one sweep."""
    lines = [
        f"| {label} | smeared | desmeared | in the 68, 95 % bands | out of range | poor fit | substituted |",
        "|---" * 7 + "|",
    ]
    for value, row in rows.items():
        if isinstance(row, str):
            lines.append(f"| {value:g} | refused: {row} | | | | | |")
            continue
        inside = ", ".join(f"{share:.0%}" for share in row.inside)
        shares = " | ".join(f"{share:.0%}" for share in (row.out_of_range, row.poor, row.substituted))
        lines.append(f"| {value:g} | {row.smeared:.2g} | {row.desmeared:.2g} | {inside} | {shares} |")
    return "\n".join(lines)


def draw(sweeps: dict[str, dict[float, Row | str]], path: Path) -> None:
    """Draw the error before and after over each thing varied."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(sweeps), sharey=True), sweeps.items(), strict=True):
        kept = {value: row for value, row in rows.items() if isinstance(row, Row)}
        for label, colour in (("smeared", "0.6"), ("desmeared", "k")):
            axes.loglog(list(kept), [getattr(row, label) for row in kept.values()], "o-", color=colour, label=label)
        flagged = [value for value, row in kept.items() if row.out_of_range > 0.5]
        axes.plot(flagged, [kept[value].desmeared for value in flagged], "o", color="C3", ms=9, mfc="none", label="out of range")
        axes.set(xlabel=SWEEPS[name][0].split(" (")[0], title=name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean squared error of ln I")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


PROTOCOL = """\
{curves} curves of the test families {families}, on a linear grid up to 5 1/nm under a stationary Gaussian; 300 points,
width 0.06 1/nm, noise 2 %, width times largest dimension 1 unless varied. Geometric mean over curves of the mean squared error
of ln I; smeared: without the noise. Shares of the truths in the 68 and 95 % bands, and of the curves with each flag."""


def main(words: Sequence[str] | None = None) -> None:
    """Run all sweeps and write the report."""
    parser = argparse.ArgumentParser(description="Where the released model must not be trusted.")
    parser.add_argument("--quick", action="store_true", help="smoke test: four curves, two settings of each sweep")
    parser.add_argument("--model", default="dsnet", help="released model that answers as dsnet (default: dsnet)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the library of curves is kept")
    arguments = parser.parse_args(words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    families = FAMILIES[:2] if arguments.quick else FAMILIES
    library = library_of(arguments.cache, families, 2 if arguments.quick else 20)
    sweeps: dict[str, dict[float, Row | str]] = {}
    for name, (label, settings) in SWEEPS.items():
        chosen = dict(list(settings.items())[:2]) if arguments.quick else settings
        count = 4 if arguments.quick else CURVES
        sweeps[name] = {value: measure(setting, library, count, arguments.model) for value, setting in chosen.items()}
        print(table(sweeps[name], label), flush=True)
    draw(sweeps, arguments.output / "limits.png")
    command = with_model("python benchmarks/limits.py" + " --quick" * arguments.quick, arguments.model)
    parts = [
        "# Where the model must not be trusted",
        provenance(command, ("dsnet-bluesky", "torch", "numpy", "sasmodels")),
        PROTOCOL.format(curves=CURVES, families=", ".join(FAMILIES)),
        *(f"## {name.capitalize()}\n\n{table(rows, SWEEPS[name][0])}" for name, rows in sweeps.items()),
        "![Errors before and after](limits.png)",
    ]
    (arguments.output / "limits.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

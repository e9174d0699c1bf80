"""Denoising weak anisotropic frames by their symmetry, against filters and other networks.

Simulated frames of oriented ellipsoids; each network is trained on the noisy frames of one scan and judged on frames of other
particles (other bands of the radius), whose truth is known. The parameters of filters are tuned on that
truth, which helps them. Writes Markdown and a figure:

    python benchmarks/denoise.py                      # three doses: an hour on one thread
    python benchmarks/denoise.py --only symmetry-denoiser --only filters
    python benchmarks/denoise.py --quick              # a smoke test
    python benchmarks/denoise.py --longer --only symmetry-denoiser

The last writes denoise-longer.md: networks that learn twice as long, which is what the recipe of a training says by default.

Each part is kept as it is done (build/benchmarks/denoise); what is there is not computed again. BM3D joins in if it is
installed (pip install bm3d: free for non-commercial use only).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from denoise_others import HAS_BM3D
from denoise_parts import AGAIN, BINS, DOSES, GROUPS, HALF_SECTOR, OURS, SECTORS, Part, Size, compute
from matplotlib.figure import Figure
from provenance import provenance

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising.network import DenoiserConfig
from dsnet_bluesky.denoising.sectors import REPLICAS
from dsnet_bluesky.training.denoiser import DenoiserRecipe

CACHE = Path(__file__).parents[1] / "build" / "benchmarks" / "denoise"

Results = dict[Part, dict[str, Any]]


def parts_of(doses: Sequence[float], groups: Sequence[str], size: Size) -> list[Part]:
    """List what is to be computed, what says most first."""
    parts = [Part(group, dose, 1) for group in GROUPS for dose in doses if group in groups]
    wanted = size.another and AGAIN in doses and "symmetry-denoiser" in groups
    again = [Part("symmetry-denoiser", AGAIN, 2)] if wanted else []
    return sorted(parts + again, key=lambda part: (list(GROUPS).index(part.group), part.training))


def mean_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def rows_of(results: Results) -> dict[str, dict[float, list[dict[str, float]]]]:
    """Collect what was judged, by method and dose; a second training is a row of its own."""
    rows: dict[str, dict[float, list[dict[str, float]]]] = {}
    for part, found in results.items():
        for name, judgements in found["rows"].items():
            label = name if part.training == 1 else f"{name.replace('*', '')}, another training"
            rows.setdefault(label, {})[part.dose] = judgements
    return rows


def report(results: Results, size: Size, command: str, name: str) -> str:
    """Compose the report."""
    return "\n\n".join(
        [
            "# Denoising by symmetry",
            provenance(command, ("dsnet-bluesky", "torch", "numpy", "scipy")),
            PROTOCOL.format(**vars(size), others=others_of(results, size)),
            f"![Gain of each method]({name}.png)",
            gain_table(rows_of(results)),
            "## What was asked for\n\n" + goal_table(results),
            "## Sector curves\n\n" + sector_table(results),
            "## Errors by the bootstrap\n\n" + bootstrap_table(results, size),
            "## Full rings\n\n" + ring_words(results),
            "## Time\n\n" + time_table(results),
        ]
    )


def others_of(results: Results, size: Size) -> str:
    """Say how the other methods were tuned or trained, if they are there."""
    if {part.group for part in results} == {"symmetry-denoiser"}:
        return ALONE
    return OTHERS.format(**vars(size), bm3d="" if HAS_BM3D else " BM3D was not installed.")


PROTOCOL = """\
{frames} frames of {pixels} x {pixels} pixels to train on, one training a dose (photons a pixel); to judge, {tests} frames of
other particles in each of {seeds} seeds, which differ in particles and noise. Gain: mean squared error in units of the Poisson
variance, raw over denoised. Bias: of the sum of all pixels; the photons themselves scatter by what the row raw says. ± is
the standard deviation over these seeds. Networks learn in {steps} steps of 8 pieces of 96 x 96. {others}"""

OTHERS = """\
Filters have the parameter that is best on the truth, for each seed; BM3D for the first.{bm3d} The published algorithm
learns in {paper_steps} steps of 8 halves (2.29 million parameters, architecture inferred): as long as ours takes, and it goes on
improving."""

ALONE = "Other methods are in [denoise.md](denoise.md), where all networks learn equally long."


def gain_table(rows: dict[str, dict[float, list[dict[str, float]]]]) -> str:
    """Lay out gain and bias."""
    doses = sorted({dose for found in rows.values() for dose in found})
    head = " | ".join(f"{dose:g} photons: gain, dB | bias, %" for dose in doses)
    lines = [f"| | {head} |", "|---" * (1 + 2 * len(doses)) + "|"]
    noise = {dose: [row["noise"] for row in found] for each in rows.values() for dose, found in each.items()}
    lines.append(f"| raw | {' | '.join(f'0 | ± {np.mean(noise[dose]):.2f}' for dose in doses)} |")
    for name, found in rows.items():
        cells = [mean_of([row[key] for row in found[d]]) if d in found else "" for d in doses for key in ("gain", "bias")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goal_table(results: Results) -> str:
    """Lay out the first training at each dose against what was asked for."""
    lines = [
        "| photons a pixel | gain over the best other, dB | which | bias, % | sector error over raw | bootstrap over true sd |"
    ]
    lines += ["|---" * 6 + "|", "| asked for | at least 0 | | within 0.5 | at most 0.5 | 0.85 to 1.15 |"]
    rows = rows_of(results)
    for part, found in _ours_of(results):
        if part.training > 1:
            continue
        gains = {name: [row["gain"] for row in each[part.dose]] for name, each in rows.items() if part.dose in each}
        other = max(
            (name for name in gains if "symmetry denoiser" not in name), key=lambda name: np.mean(gains[name]), default=""
        )
        ahead = mean_of([a - b for a, b in zip(gains[OURS], gains[other], strict=True)]) if other else ""
        means = {name: np.mean([each[name] for each in found["sectors"]]) for name in ("raw", "denoised")}
        cells = [ahead, other, mean_of([row["bias"] for row in found["rows"][OURS]])]
        cells += [f"{means['denoised'] / means['raw']:.2f}", mean_of([row["ratio"] for row in found["bootstrap"]])]
        lines.append(f"| {part.dose:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sector_table(results: Results) -> str:
    """Lay out the errors of sector curves."""
    names = (*SECTORS, "denoised", "mean of denoised")
    lines = [f"| photons a pixel | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for part, found in _ours_of(results):
        cells = [mean_of([each[name] for each in found["sectors"]]) for name in names]
        lines.append(f"| {_dose_of(part)} | {' | '.join(cells)} |")
    return (
        f"Relative error in per cent, root mean square over {BINS} bins of {2 * HALF_SECTOR:g} degrees along the axis of each "
        "test frame, rings conserved; last, its mean (bias). Denoised curves are corrected for a third of the bias that the "
        "bootstrap sees.\n\n" + "\n".join(lines)
    )


def bootstrap_table(results: Results, size: Size) -> str:
    """Lay out what the bootstrap says against what is."""
    lines = [
        "| photons a pixel | sd of the bootstrap over the true one | its scatter (ln) | bias in true sd | "
        "correlation of neighbours, true | of the bootstrap |",
        "|---" * 6 + "|",
    ]
    for part, found in _ours_of(results):
        keys = ("ratio", "spread", "bias", "correlation", "correlation_bootstrap")
        cells = [mean_of([row[key] for row in found["bootstrap"]]) for key in keys]
        lines.append(f"| {_dose_of(part)} | {' | '.join(cells)} |")
    return (
        f"{REPLICAS} replicas against {size.repeats} exposures of one sample, two samples a seed, two bootstraps each; ± is the "
        f"standard deviation over samples. {REPLICAS} replicas and {size.repeats} exposures alone make the ratio of one bin "
        f"scatter by {np.sqrt(0.5 / (REPLICAS - 1) + 0.5 / (size.repeats - 1)):.2f}. Bias: of the corrected curve.\n\n"
        + "\n".join(lines)
    )


def _ours_of(results: Results) -> list[tuple[Part, dict[str, Any]]]:
    return [(part, found) for part, found in sorted(results.items(), key=lambda item: item[0][1:]) if "sectors" in found]


def _dose_of(part: Part) -> str:
    return f"{part.dose:g}" + ("" if part.training == 1 else ", another training")


def ring_words(results: Results) -> str:
    """Say how far ring curves differ."""
    most = max((found["rings"] for _, found in _ours_of(results)), default=np.nan)
    return f"Largest relative difference between full-ring curves of denoised and raw frames, rings of the reduction: {most:.1e}."


def time_table(results: Results) -> str:
    """Say how long it took."""
    seconds: dict[str, list[float]] = {}
    for found in results.values():
        for name, value in found["seconds"].items():
            seconds.setdefault(name, []).append(value)
    lines = [f"| {name} | {np.mean(values):.0f} |" for name, values in seconds.items()]
    return (
        "All test frames of a dose, and the training unless it was there already, in s, mean over doses, on one thread of a "
        "machine with other work; of filters with the search for the parameter.\n\n| | s |\n|---|---|\n" + "\n".join(lines)
    )


def draw(rows: dict[str, dict[float, list[dict[str, float]]]], path: Path) -> None:
    """Draw the gain of each method over dose."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(rows.items()):
        doses = sorted(found)
        gains = [np.mean([row["gain"] for row in found[dose]]) for dose in doses]
        errors = [np.std([row["gain"] for row in found[dose]]) for dose in doses]
        mine = "symmetry denoiser" in name
        style = {"color": f"C{number % 10}", "lw": 2.2 if mine else 1.0, "marker": "os^Dv"[number % 5], "ms": 6 if mine else 4}
        style["ls"] = "-" if number < 10 else "--"
        axes.errorbar(doses, gains, errors, label=name.replace("*", ""), **style)  # type: ignore[arg-type]
    axes.set(xlabel="photons a pixel", ylabel="gain / dB", xscale="log")
    axes.set_xticks(DOSES, [f"{dose:g}" for dose in DOSES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right", frameon=False, fontsize=7)  # pyright: ignore[reportArgumentType]
    figure.savefig(path, dpi=130)


LONGER = Size(steps=DenoiserRecipe.steps, paper_steps=1000, another=False)
QUICK = Size(
    frames=40,
    tests=2,
    seeds=1,
    pixels=64,
    steps=400,
    paper_steps=8,
    repeats=6,
    recipe=DenoiserRecipe(batch=4, crop=64, held_out=0.4, architecture=DenoiserConfig(channels=(8, 12, 16))),
)


def main(words: Sequence[str] | None = None) -> None:
    """Compute what is not there yet and write the report."""
    parser = argparse.ArgumentParser(description="Denoising of weak anisotropic frames by symmetry.")
    parser.add_argument("--quick", action="store_true", help="smoke test: one dose, few small frames, a small network")
    parser.add_argument("--longer", action="store_true", help="networks that learn as long as the default recipe says")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="methods to compute; repeatable; all if not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where finished parts are kept")
    arguments = parser.parse_args(words)
    for folder in (arguments.output, arguments.cache):
        folder.mkdir(parents=True, exist_ok=True)
    size, doses = (QUICK, DOSES[-1:]) if arguments.quick else (LONGER if arguments.longer else Size(), DOSES)
    chosen = arguments.only or list(GROUPS)
    command = "python benchmarks/denoise.py" + " --quick" * arguments.quick + " --longer" * arguments.longer
    command += "".join(f" --only {group}" for group in arguments.only or ())
    name = "denoise-longer" if arguments.longer else "denoise"
    results: Results = {}
    for part in parts_of(doses, chosen, size):
        results[part] = kept(arguments.cache, part, size)
        (arguments.output / f"{name}.md").write_text(report(results, size, command, name) + "\n", encoding="utf-8")
        draw(rows_of(results), arguments.output / f"{name}.png")
        means = {method: round(float(np.mean([r["gain"] for r in rows])), 2) for method, rows in results[part]["rows"].items()}
        print(*part, means, flush=True)


def kept(cache: Path, part: Part, size: Size) -> dict[str, Any]:
    """Compute a part, unless it is there."""
    path = cache / f"{part.group}-{part.dose:g}-{part.training}-{size.steps}-{size.pixels}.json"
    if not path.exists():
        try:
            found = compute(part, size, cache)
        except BadInput as error:
            raise SystemExit(f"{part.group}, {part.dose:g} photons: {error}") from error
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

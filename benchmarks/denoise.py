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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from denoise_others import HAS_BM3D, SIGMAS, Noise2Void, averaged, bm3d, chi2, gaussians, harmonics, medians
from matplotlib.figure import Figure
from numpy.typing import NDArray
from provenance import provenance

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising import SymmetryDenoiser
from dsnet_bluesky.denoising.network import DenoiserConfig
from dsnet_bluesky.denoising.rings import conserve, rings_about
from dsnet_bluesky.denoising.sectors import REPLICAS, bootstrap, corrected, integrate, redrawn
from dsnet_bluesky.denoising.symmetry import mate
from dsnet_bluesky.reduction import Reduction
from dsnet_bluesky.sim.anisotropic import AnisotropicScan
from dsnet_bluesky.training.denoiser import DenoiserRecipe, schedule, train_denoiser
from dsnet_bluesky.versions import load_model

Floats = NDArray[np.floating[Any]]

DOSES = (1.0, 3.0, 10.0)
AGAIN = 3.0
"""Dose at which a second training shows how much trainings differ."""

CACHE = Path(__file__).parents[1] / "build" / "benchmarks" / "denoise"
HALF_SECTOR = 10.0
"""Degrees on both sides of a sample's mean axis."""

BINS = 24
SECTORS = ("raw", "raw, both opposite sectors", "denoised, not corrected")
FEW = 12
"""Replicas that correct a repeated exposure: with so few its scatter is under 1 % larger than with the product's number."""

OURS, FREE = "**symmetry denoiser**", "symmetry denoiser, rings not conserved"


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    frames: int = 48
    tests: int = 8
    seeds: int = 5
    pixels: int = 128
    steps: int = 1200
    paper_steps: int = 500
    repeats: int = 32
    another: bool = True
    """Whether there is a second training at one dose."""
    recipe: DenoiserRecipe = field(default_factory=DenoiserRecipe)


class Part(NamedTuple):
    """What is computed and kept together."""

    group: str
    dose: float
    training: int
    """Seed of the training."""


class Test(NamedTuple):
    """Frames to judge by."""

    scan: AnisotropicScan
    seen: NDArray[np.int64]
    truth: Floats
    dose: float
    seed: int


Methods = Iterator[tuple[str, Callable[[Test], Floats]]]
"""Names of methods, and how they denoise the frames of a test."""


def scan_of(number: int, split: Any, seed: int, size: Size) -> AnisotropicScan:
    """Draw a scan whose beam is at the middle of the frames."""
    middle = size.pixels / 2
    return AnisotropicScan.draw(number, split, seed, shape=(size.pixels, size.pixels), centre=(middle, middle))


def tests_of(dose: float, size: Size) -> list[Test]:
    """Draw the test frames: for each seed other particles and other noise."""
    scans = [(seed, scan_of(size.tests, "test", seed, size)) for seed in range(1, size.seeds + 1)]
    return [Test(scan, scan.frames(dose, 2000 + seed), dose * scan.rates, dose, seed) for seed, scan in scans]


def training_frames(part: Part, size: Size) -> tuple[AnisotropicScan, NDArray[np.int64]]:
    """Draw the scan that networks learn from."""
    scan = scan_of(size.frames, "training", part.training, size)
    return scan, scan.frames(part.dose, 1000 + part.training)


def compute(part: Part, size: Size, folder: Path) -> dict[str, Any]:
    """Compute a part: gain and bias of each of its methods for each test seed, and how long it took."""
    tests = tests_of(part.dose, size)
    rows: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    for name, method in GROUPS[part.group](part, tests, size, folder):
        rows[name] = [judged(method(test), test) for test in tests]
        seconds[name] = time.perf_counter() - started
        started = time.perf_counter()
    more = about_ours(part, tests, size, folder) if part.group == "symmetry-denoiser" else {}
    return {"rows": rows, "seconds": seconds, **more}


def judged(frames: Floats, test: Test) -> dict[str, float]:
    """Gain in dB of the mean squared error in units of the Poisson variance, and bias of the sum of all pixels in per cent."""
    mask = test.scan.mask
    gain = chi2(test.seen, test.truth, mask) / chi2(frames, test.truth, mask)
    return {
        "gain": 10 * np.log10(gain),
        "bias": 100 * float(frames[:, ~mask].sum() / test.truth[:, ~mask].sum() - 1),
        "noise": 100 / float(np.sqrt(test.truth[:, ~mask].sum())),
    }


def filters(part: Part, tests: list[Test], size: Size, folder: Path) -> Methods:
    """Give filters of the frames as they are, and of pixels averaged with their mates; the best parameter for each seed."""

    def best(test: Test, candidates: Any) -> Floats:
        return min(candidates, key=lambda frames: chi2(frames, test.truth, test.scan.mask))

    yield "Gaussian", lambda test: best(test, gaussians(test.seen, test.scan.mask))
    yield "median", lambda test: best(test, medians(test.seen, test.scan.mask))
    yield "symmetry average alone", lambda test: averaged(test.seen, test.scan.mask)
    yield "symmetry average + Gaussian", lambda test: best(test, gaussians(averaged(test.seen, test.scan.mask), test.scan.mask))
    yield "symmetry average + median", lambda test: best(test, medians(averaged(test.seen, test.scan.mask), test.scan.mask))
    yield "even harmonics of each ring", lambda test: best(test, harmonics(test.seen, test.scan.mask))


def bm3ds(part: Part, tests: list[Test], size: Size, folder: Path) -> Methods:
    """Give BM3D; the noise it is told is the best on the truth of the first seed."""
    if not HAS_BM3D:
        return
    answers: dict[int, Floats] = {}

    def filtered(readings: int, sigma: float, test: Test) -> Floats:
        frames = test.seen if readings == 1 else averaged(test.seen, test.scan.mask)
        return bm3d(frames, test.scan.mask, readings, sigma)

    for readings, name in ((1, "BM3D"), (2, "symmetry average + BM3D")):
        first = tests[0]
        sigma = min(SIGMAS, key=lambda s, r=readings: chi2(filtered(r, s, first), first.truth, first.scan.mask))

        def kept(test: Test, readings: int = readings, sigma: float = sigma) -> Floats:
            answers[test.seed] = filtered(readings, sigma, test)
            return answers[test.seed]

        yield name, kept
    yield "symmetry average + BM3D, ring-conserving", lambda test: conserve(answers[test.seed], test.seen, rings_of(test))


def rings_of(test: Test) -> NDArray[np.int64]:
    """Number the rings that are conserved by default."""
    return rings_about(test.scan.centre, test.scan.shape, test.scan.mask)


def noise2void(part: Part, tests: list[Test], size: Size, folder: Path) -> Methods:
    """Give Noise2Void, alone and averaged over mates."""
    scan, counts = training_frames(part, size)
    network = Noise2Void(counts, scan.mask, size.steps, part.training, schedule)
    answers: dict[int, Floats] = {}

    def kept(test: Test) -> Floats:
        answers[test.seed] = network(test.seen)
        return answers[test.seed]

    yield "Noise2Void", kept
    yield "Noise2Void + symmetry average", lambda test: (answers[test.seed] + mate(answers[test.seed])) / 2


def published(part: Part, tests: list[Test], size: Size, folder: Path) -> Methods:
    """Give the published algorithm with a geometric mask, and at one dose with its own."""
    for product in (False, True) if part.dose == AGAIN else (False,):
        recipe = DenoiserRecipe.of("paper", seed=part.training, steps=size.paper_steps)
        recipe = replace(recipe, architecture=replace(recipe.architecture, product_mask=product))
        name = f"published algorithm, {'product' if product else 'geometric'} mask"
        network = trained(part, recipe, size, folder / f"paper-{product:d}-{part.dose:g}-{part.training}-{size.paper_steps}")
        yield name, lambda test, network=network: ours(network, test, conserving=False)


def symmetry(part: Part, tests: list[Test], size: Size, folder: Path) -> Methods:
    """Give our denoiser."""
    network = our_network(part, size, folder)
    yield FREE, lambda test: ours(network, test, conserving=False)
    yield OURS, lambda test: ours(network, test, conserving=True)


GROUPS: dict[str, Callable[[Part, list[Test], Size, Path], Methods]] = {
    "symmetry-denoiser": symmetry,
    "filters": filters,
    "bm3d": bm3ds,
    "noise2void": noise2void,
    "published": published,
}


def our_network(part: Part, size: Size, folder: Path) -> SymmetryDenoiser:
    """Train our denoiser."""
    recipe = replace(size.recipe, seed=part.training, steps=size.steps)
    return trained(part, recipe, size, folder / f"ours-{part.dose:g}-{part.training}-{size.steps}-{size.pixels}")


def trained(part: Part, recipe: DenoiserRecipe, size: Size, folder: Path) -> SymmetryDenoiser:
    """Train on the frames of a scan, unless that is done."""
    if not (folder / "model.toml").exists():
        scan, counts = training_frames(part, size)
        train_denoiser(counts, folder, centre=scan.centre, mask=scan.mask, recipe=recipe)
    return SymmetryDenoiser(load_model(str(folder)))


def ours(network: SymmetryDenoiser, test: Test, *, conserving: bool) -> Floats:
    """Denoise with a model."""
    return network(test.seen, test.scan.centre, test.scan.mask, conserving=conserving)["denoised"].fillna(0).values


def about_ours(part: Part, tests: list[Test], size: Size, folder: Path) -> dict[str, Any]:
    """Judge what only ours promises: sectors, full rings, errors."""
    network = our_network(part, size, folder)
    return {
        "sectors": [sectors(network, test) for test in tests],
        "rings": max(ring_curves(network, test) for test in tests),
        "bootstrap": [scatter(network, test, number, size) for test in tests for number in (0, 1)],
        "card": network.model.card["figures"],
    }


def along_axis(test: AnisotropicScan, number: int) -> Reduction:
    """Reduce a sector along the axis of a sample."""
    angle = (test.samples[number].angle + 90) % 180 - 90
    ends = (angle - HALF_SECTOR, angle + HALF_SECTOR)
    return Reduction(test.poni, mask=test.mask, bins=BINS, sector=ends, q_max=0.95 * test.shape[0] / 128)


def sectors(network: SymmetryDenoiser, test: Test) -> dict[str, float]:
    """Root mean square of the relative error of sector curves in per cent, and the mean."""
    found: dict[str, list[Floats]] = {name: [] for name in (*SECTORS, "denoised")}
    for number, seen in enumerate(test.seen):
        reduction = along_axis(test.scan, number)
        exact, *raw = integrate(np.stack([test.truth[number], seen, (seen + mate(seen)) / 2]), reduction)
        ours, better = sector_curves(network, seen[None], test, reduction, REPLICAS)
        for name, I in zip(found, (*raw, *ours, *better), strict=True):
            found[name].append(I / exact - 1)
    rms = {name: 100 * float(np.sqrt(np.mean(np.concatenate(rest) ** 2))) for name, rest in found.items()}
    return {**rms, "mean of denoised": 100 * float(np.mean(np.concatenate(found["denoised"])))}


def sector_curves(
    network: SymmetryDenoiser, frames: NDArray, test: Test, reduction: Reduction, replicas: int
) -> tuple[Floats, Floats]:
    """Integrate denoised frames, and correct the curves as `sectors.sector_of` does, without its errors."""
    where, rng = (test.scan.centre, test.scan.mask), np.random.default_rng([test.seed, len(frames)])
    answers = network(frames, *where, test=False)["denoised"].values
    curves = integrate(answers, reduction)
    drawn = (redrawn(network, np.repeat(answer[None], replicas, axis=0), *where, rng) for answer in answers)
    return curves, corrected(curves, np.array([integrate(each, reduction).mean(axis=0) for each in drawn]))


def ring_curves(network: SymmetryDenoiser, test: Test) -> float:
    """Largest relative difference of full-ring curves, denoised and raw, where the rings are the reduction's."""
    reduction = Reduction(test.scan.poni, mask=test.scan.mask, bins=60)
    denoised = network(test.seen, test.scan.centre, test.scan.mask, rings=reduction.bins)["denoised"].values
    raw, found = integrate(test.seen, reduction), integrate(denoised, reduction)
    return float(np.max(np.abs(found - raw) / np.maximum(raw, raw[raw > 0].min())))


def scatter(network: SymmetryDenoiser, test: Test, number: int, size: Size) -> dict[str, float]:
    """Compare the bootstrap's errors of a sector curve with the scatter of repeated exposures."""
    scan, reduction, truth = test.scan, along_axis(test.scan, number), test.truth[number]
    frames = np.random.default_rng([test.seed, number]).poisson(truth, (size.repeats, *truth.shape))
    _, curves = sector_curves(network, frames, test, reduction, FEW)
    sd = curves.std(axis=0, ddof=1)
    found = [bootstrap(network, frames[k], reduction, scan.centre, scan.mask, seed=k, test=False) for k in (0, 1)]
    ratios = [each.curve["Idev"].values / sd for each in found]
    exact = integrate(truth[None], reduction)[0]
    neighbours = [np.mean(np.diag(np.corrcoef(c.T), 1)) for c in (curves, np.concatenate([f.replicas for f in found]))]
    return {
        "ratio": float(np.exp(np.mean(np.log(ratios)))),
        "spread": float(np.std(np.log(ratios))),
        "bias": float(np.sqrt(np.mean(((curves.mean(axis=0) - exact) / sd) ** 2))),
        "correlation": float(neighbours[0]),
        "correlation_bootstrap": float(neighbours[1]),
    }


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

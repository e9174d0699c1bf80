"""Denoising weak anisotropic frames by their symmetry, against filters and other networks.

Simulated frames of oriented ellipsoids; each network is trained on the noisy frames of one scan and judged on frames of other
particles (other bands of the radius), whose truth is known. The parameters of filters are tuned on that
truth, which helps them. Writes Markdown:

    python benchmarks/denoise.py                      # five seeds, three doses: hours on one thread
    python benchmarks/denoise.py --seeds 2 --steps 800
    python benchmarks/denoise.py --quick              # a smoke test

Each seed and dose is kept as it is done (build/benchmarks/denoise); what is there is not computed again. BM3D joins in if it is
installed (pip install bm3d: free for non-commercial use only).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from denoise_others import HAS_BM3D, Noise2Void, averaged, bm3ds, chi2, gaussians, medians, tuned
from numpy.typing import NDArray
from provenance import provenance

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising import SymmetryDenoiser
from dsnet_bluesky.denoising.rings import conserve, rings_about
from dsnet_bluesky.denoising.sectors import bootstrap, integrate
from dsnet_bluesky.denoising.symmetry import mate
from dsnet_bluesky.reduction import Reduction
from dsnet_bluesky.sim.anisotropic import AnisotropicScan
from dsnet_bluesky.training.denoiser import DenoiserRecipe, schedule, train_denoiser
from dsnet_bluesky.versions import load_model

Floats = NDArray[np.floating[Any]]

DOSES = (1.0, 3.0, 10.0)
CACHE = Path(__file__).parents[1] / "build" / "benchmarks" / "denoise"
HALF_SECTOR = 10.0
"""Degrees on both sides of a sample's mean axis."""

BINS = 24
REPEATS = 48
"""Exposures of one sample whose scatter is the true one."""

OURS, OURS_RAW = "**symmetry denoiser**", "symmetry denoiser, rings not conserved"


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    frames: int = 48
    tests: int = 24
    pixels: int = 128
    steps: int = 1500
    paper_steps: int = 500
    repeats: int = REPEATS
    paper: bool = True


def scan_of(number: int, split: Any, seed: int, size: Size) -> AnisotropicScan:
    """Draw a scan whose beam is at the middle of the frames."""
    middle = size.pixels / 2
    return AnisotropicScan.draw(number, split, seed, shape=(size.pixels, size.pixels), centre=(middle, middle))


def run(seed: int, dose: float, size: Size) -> dict[str, Any]:
    """Train and judge at one dose with one seed."""
    scan, test = scan_of(size.frames, "training", seed, size), scan_of(size.tests, "test", seed, size)
    counts, seen = scan.frames(dose, 1000 + seed), test.frames(dose, 2000 + seed)
    started = time.perf_counter()
    denoiser = trained(scan, counts, DenoiserRecipe(seed=seed, steps=size.steps))
    seconds = time.perf_counter() - started
    frames, took = answers(denoiser, scan, counts, test, seen, dose, seed, size)
    truth = dose * test.rates
    before = chi2(seen, truth, test.mask)
    rows = {name: judged(found, truth, before, test) for name, found in frames.items()}
    return {
        "rows": rows,
        "sectors": sectors(frames[OURS], seen, truth, test),
        "rings": ring_curves(denoiser, seen, test),
        "bootstrap": [scatter(denoiser, test, dose, number, seed, size) for number in (0, 1)],
        "card": denoiser.model.card["figures"],
        "seconds": {"training": seconds, **took},
    }


def trained(scan: AnisotropicScan, counts: NDArray, recipe: DenoiserRecipe) -> SymmetryDenoiser:
    """Train on the frames of a scan."""
    with tempfile.TemporaryDirectory() as folder:
        path = train_denoiser(counts, Path(folder) / "model", centre=scan.centre, mask=scan.mask, recipe=recipe)
        return SymmetryDenoiser(load_model(str(path)))


def answers(
    denoiser: SymmetryDenoiser,
    scan: AnisotropicScan,
    counts: NDArray,
    test: AnisotropicScan,
    seen: NDArray,
    dose: float,
    seed: int,
    size: Size,
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Denoise the test frames by every method; and how long that took, networks trained, in s."""
    found: dict[str, Floats] = {}
    took: dict[str, float] = {}

    def add(name: str, compute: Callable[[], Floats]) -> None:
        started = time.perf_counter()
        found[name] = compute()
        took[name] = time.perf_counter() - started

    def ours(network: SymmetryDenoiser, conserving: bool) -> Floats:
        return network(seen, test.centre, test.mask, conserving=conserving)["denoised"].fillna(0).values

    filters(add, test, seen, dose)
    add("Noise2Void", lambda: Noise2Void(counts, scan.mask, size.steps, seed, schedule)(seen))
    add("Noise2Void + symmetry average", lambda: (found["Noise2Void"] + mate(found["Noise2Void"])) / 2)
    for product in (True, False) if size.paper else ():
        label = f"published algorithm, {'product' if product else 'geometric'} mask"
        recipe = DenoiserRecipe.of("paper", seed=seed, steps=size.paper_steps)
        recipe = replace(recipe, architecture=replace(recipe.architecture, product_mask=product))
        add(label, lambda recipe=recipe: ours(trained(scan, counts, recipe), False))
    add(OURS_RAW, lambda: ours(denoiser, False))
    add(OURS, lambda: ours(denoiser, True))
    return found, took


def filters(add: Callable[[str, Callable[[], Floats]], None], test: AnisotropicScan, seen: NDArray, dose: float) -> None:
    """Add the filters, tuned on the truth, of the frames as they are and of pixels averaged with their mates."""
    truth, mask, both = dose * test.rates, test.mask, averaged(seen, test.mask)
    add("symmetry average alone", lambda: both)
    for frames, label, readings in ((seen, "", 1), (both, "symmetry average + ", 2)):
        add(f"{label}Gaussian", lambda f=frames: tuned(gaussians(f, mask), truth, mask))
        add(f"{label}median", lambda f=frames: tuned(medians(f, mask), truth, mask))
        if HAS_BM3D:
            add(f"{label}BM3D", lambda f=frames, r=readings: tuned(bm3ds(f, mask, r), truth, mask))
    best, name = (bm3ds, "BM3D") if HAS_BM3D else (gaussians, "Gaussian")
    rings = rings_about(test.centre, test.shape, mask)
    options = {"readings": 2} if HAS_BM3D else {}
    candidates = lambda: (conserve(f, seen, rings) for f in best(both, mask, **options))  # noqa: E731
    add(f"symmetry average + {name}, ring-conserving", lambda: tuned(candidates(), truth, mask))


def judged(frames: Floats, truth: Floats, before: float, test: AnisotropicScan) -> dict[str, float]:
    """Gain in dB of the mean squared error in units of the Poisson variance, and bias of the whole in per cent."""
    kept = ~test.mask
    return {
        "gain": 10 * np.log10(before / chi2(frames, truth, test.mask)),
        "bias": 100 * float(frames[:, kept].sum() / truth[:, kept].sum() - 1),
    }


def sector_of(test: AnisotropicScan, number: int) -> Reduction:
    """Reduce a sector along the axis of a sample."""
    angle = (test.samples[number].angle + 90) % 180 - 90
    ends = (angle - HALF_SECTOR, angle + HALF_SECTOR)
    return Reduction(test.poni, mask=test.mask, bins=BINS, sector=ends, q_max=0.95 * test.shape[0] / 128)


def sectors(denoised: Floats, seen: NDArray, truth: Floats, test: AnisotropicScan) -> dict[str, float]:
    """Root mean square of the relative error of sector curves in per cent."""
    found: dict[str, list[Floats]] = {"raw": [], "raw, both opposite sectors": [], "denoised": [], "bias": []}
    for number in range(len(seen)):
        reduction = sector_of(test, number)
        exact = integrate(truth[number], reduction)[0]
        raw, opposite, ours = (
            integrate(frame, reduction)[0] for frame in (seen[number], (seen[number] + mate(seen[number])) / 2, denoised[number])
        )
        found["raw"].append(raw / exact - 1)
        found["raw, both opposite sectors"].append(opposite / exact - 1)
        found["denoised"].append(ours / exact - 1)
    rms = {name: 100 * float(np.sqrt(np.mean(np.concatenate(rest) ** 2))) for name, rest in found.items() if rest}
    return {**rms, "mean of denoised": 100 * float(np.mean(np.concatenate(found["denoised"])))}


def ring_curves(denoiser: SymmetryDenoiser, seen: NDArray, test: AnisotropicScan) -> float:
    """Largest relative difference of full-ring curves, denoised and raw, where the rings are the reduction's."""
    reduction = Reduction(test.poni, mask=test.mask, bins=60)
    denoised = denoiser(seen, test.centre, test.mask, rings=reduction.bins)["denoised"].values
    raw, ours = integrate(seen, reduction), integrate(denoised, reduction)
    return float(np.max(np.abs(ours - raw) / np.maximum(raw, raw[raw > 0].min())))


def scatter(
    denoiser: SymmetryDenoiser, test: AnisotropicScan, dose: float, number: int, seed: int, size: Size
) -> dict[str, float]:
    """Compare the bootstrap's errors of a sector curve with the scatter of repeated exposures."""
    reduction = sector_of(test, number)
    truth = dose * test.rates[number]
    frames = np.random.default_rng([seed, number]).poisson(truth, (size.repeats, *truth.shape))
    curves = integrate(denoiser(frames, test.centre, test.mask, test=False)["denoised"].values, reduction)
    sd = curves.std(axis=0, ddof=1)
    found = [bootstrap(denoiser, frame, reduction, test.centre, test.mask, seed=k) for k, frame in enumerate(frames[:2])]
    ratios = [each.curve["Idev"].values / sd for each in found]
    exact = integrate(truth, reduction)[0]
    neighbours = [np.mean(np.diag(np.corrcoef(c.T), 1)) for c in (curves, np.concatenate([f.replicas for f in found]))]
    return {
        "ratio": float(np.exp(np.mean(np.log(ratios)))),
        "spread": float(np.std(np.log(ratios))),
        "bias": float(np.sqrt(np.mean(((curves.mean(axis=0) - exact) / sd) ** 2))),
        "correlation": float(neighbours[0]),
        "correlation_bootstrap": float(neighbours[1]),
    }


def mean_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def report(results: dict[float, dict[int, dict[str, Any]]], size: Size, command: str) -> str:
    """Compose the report."""
    doses = sorted(results)
    head = " | ".join(f"{dose:g} photons: gain, dB | bias, %" for dose in doses)
    lines = [f"| | {head} |", "|---" * (1 + 2 * len(doses)) + "|"]
    for name in next(iter(results[doses[-1]].values()))["rows"]:
        cells = []
        for dose in doses:
            rows = [each["rows"][name] for each in results[dose].values() if name in each["rows"]]
            cells += [
                mean_of([row["gain"] for row in rows]) if rows else "",
                mean_of([row["bias"] for row in rows]) if rows else "",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = ", ".join(f"{dose:g}: {len(results[dose])}" for dose in doses)
    return "\n\n".join(
        [
            "# Denoising by symmetry",
            provenance(command, ("dsnet-bluesky", "torch", "numpy", "scipy")),
            PROTOCOL.format(seeds=seeds, **vars(size), bm3d="" if HAS_BM3D else " BM3D was not installed."),
            "\n".join(lines),
            "## Sector curves\n\n" + sector_table(results),
            "## Errors by the bootstrap\n\n" + bootstrap_table(results),
            "## Full rings\n\n" + ring_words(results),
            "## Time\n\n" + time_words(results),
        ]
    )


PROTOCOL = """\
{frames} frames of {pixels} x {pixels} pixels to train on, {tests} of other particles to judge; seeds at each dose (photons a
pixel): {seeds}. Gain: mean squared error in units of the Poisson variance, raw over denoised. Bias: of the sum of all
pixels. ± is the standard deviation over seeds. Filters have the parameter that is best on the truth.{bm3d} Our training and
Noise2Void's: {steps} steps of 16 pieces of 64 x 64; the published algorithm's: {paper_steps} steps of 8 halves (2.29 million
parameters, architecture inferred)."""


def sector_table(results: dict[float, dict[int, dict[str, Any]]]) -> str:
    """Lay out the errors of sector curves."""
    names = ("raw", "raw, both opposite sectors", "denoised", "mean of denoised")
    lines = [f"| photons a pixel | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for dose, seeds in sorted(results.items()):
        cells = [mean_of([each["sectors"][name] for each in seeds.values()]) for name in names]
        lines.append(f"| {dose:g} | {' | '.join(cells)} |")
    return (
        f"Relative error in per cent, root mean square over {BINS} bins of {2 * HALF_SECTOR:g} degrees along the axis of each "
        "test frame, ring-conserving; last, its mean (bias).\n\n" + "\n".join(lines)
    )


def bootstrap_table(results: dict[float, dict[int, dict[str, Any]]]) -> str:
    """Lay out what the bootstrap says against what is."""
    lines = [
        "| photons a pixel | sd of the bootstrap over the true one | its scatter (ln) | bias in true sd | "
        "correlation of neighbours, true | of the bootstrap |",
        "|---" * 6 + "|",
    ]
    for dose, seeds in sorted(results.items()):
        all_of = [row for each in seeds.values() for row in each["bootstrap"]]
        keys = ("ratio", "spread", "bias", "correlation", "correlation_bootstrap")
        lines.append(f"| {dose:g} | {' | '.join(mean_of([row[key] for row in all_of]) for key in keys)} |")
    return (
        f"32 replicas against {REPEATS} exposures of one sample, two samples a seed, two bootstraps each. 32 replicas and "
        f"{REPEATS} exposures alone make the ratio of one bin scatter by 0.16. Bias: what the bootstrap cannot see.\n\n"
        + "\n".join(lines)
    )


def ring_words(results: dict[float, dict[int, dict[str, Any]]]) -> str:
    """Say how far ring curves differ."""
    most = max(each["rings"] for seeds in results.values() for each in seeds.values())
    return f"Largest relative difference between full-ring curves of denoised and raw frames, rings of the reduction: {most:.1e}."


def time_words(results: dict[float, dict[int, dict[str, Any]]]) -> str:
    """Say how long it took."""
    names = [name for name in next(iter(next(iter(results.values())).values()))["seconds"] if "average" not in name]
    lines = []
    for name in names:
        values = [each["seconds"][name] for seeds in results.values() for each in seeds.values() if name in each["seconds"]]
        lines.append(f"| {name} | {np.mean(values):.1f} |")
    return (
        "Training where there is one, and all test frames, in s on a machine with other work.\n\n| | s |\n|---|---|\n"
        + "\n".join(lines)
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run what is not there yet and write the report."""
    parser = argparse.ArgumentParser(description="Denoising of weak anisotropic frames by symmetry.")
    parser.add_argument("--quick", action="store_true", help="smoke test: one seed and dose, small frames, few steps")
    parser.add_argument("--seeds", type=int, default=5, help="seeds at each dose")
    parser.add_argument("--steps", type=int, default=Size.steps, help="of our training and of Noise2Void's")
    parser.add_argument("--paper-seeds", type=int, default=5, help="seeds with the published algorithm, which is slow")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where finished parts are kept")
    arguments = parser.parse_args(words)
    for folder in (arguments.output, arguments.cache):
        folder.mkdir(parents=True, exist_ok=True)
    size = replace(Size(), steps=arguments.steps)
    doses, seeds = DOSES, arguments.seeds
    if arguments.quick:
        size, doses, seeds = Size(frames=12, tests=4, pixels=64, steps=100, paper_steps=8, repeats=6), DOSES[-1:], 1
    results: dict[float, dict[int, dict[str, Any]]] = {}
    for seed in range(1, seeds + 1):
        for dose in doses:
            here = replace(size, paper=seed <= arguments.paper_seeds)
            results.setdefault(dose, {})[seed] = kept(arguments.cache, seed, dose, here)
            command = " ".join(["python benchmarks/denoise.py", *(words_of(arguments))])
            (arguments.output / "denoise.md").write_text(report(results, size, command) + "\n", encoding="utf-8")
            print(seed, dose, {name: round(row["gain"], 2) for name, row in results[dose][seed]["rows"].items()}, flush=True)


def words_of(arguments: argparse.Namespace) -> list[str]:
    """Give the options that change what is computed."""
    if arguments.quick:
        return ["--quick"]
    named = {"seeds": 5, "steps": Size.steps, "paper_seeds": 5}
    return [
        f"--{name.replace('_', '-')} {value}" for name, usual in named.items() if (value := getattr(arguments, name)) != usual
    ]


def kept(cache: Path, seed: int, dose: float, size: Size) -> dict[str, Any]:
    """Compute a part, unless it is there."""
    path = cache / f"{dose:g}-{seed}-{size.steps}-{size.pixels}.json"
    if not path.exists():
        try:
            found = run(seed, dose, size)
        except BadInput as error:
            raise SystemExit(f"seed {seed}, {dose:g} photons: {error}") from error
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

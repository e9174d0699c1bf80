"""What `denoise.py` computes: frames, trainings and judgements, in parts that are kept.

A part is one group of methods at one dose. Ours is judged by more than its frames: by sectors, full rings and the errors of
the bootstrap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from denoise_others import HAS_BM3D, SIGMAS, Noise2Void, averaged, bm3d, chi2, gaussians, harmonics, medians
from numpy.typing import NDArray

from dsnet_bluesky.denoising import SymmetryDenoiser
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

"""Ideal samples: what stands in a beam. Shapes with sizes, distances, mixtures, peaks, upturns and backgrounds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.atomic import replacing

from .families import FAMILIES, MARGIN, Shape, make_shapes
from .lattices import FLUIDS, LATTICES, StructureFactor, make_structure_factors

__all__ = [
    "Library",
    "Sample",
    "View",
    "digest_of_library",
    "draw_sample",
    "families_of",
    "load_library",
    "make_library",
    "save_library",
]

Floats = NDArray[np.floating[Any]]
Curve = Callable[[Floats], Floats]

PAPER_STRENGTHS = (0.12, 0.24)
"""Width times radius of the spheres of the paper's tables, mild and severe: kept out by `MARGIN`."""

NEAR_SPHERES = ("sphere", "fuzzy_sphere", "core_shell_sphere", "core_multi_shell", "ellipsoid", "raspberry", "polymer_micelle")
"""Families that hold shapes hardly different from spheres: they keep the same margin."""

LINES = 1 / 8
"""Part of all samples that is peaks or gratings: sharp lines come in more forms than one family has, and are hardest."""

LATTICE_SHARE = 2.0
"""How often a lattice is drawn, every other family being drawn once."""

SIZES = 41
"""Number of sizes in a distribution."""


@dataclass(frozen=True)
class View:
    """What an instrument sees, as far as samples are chosen by it: q range, width and step, all in 1/nm."""

    lowest: float
    highest: float
    width: float
    step: float


@dataclass(frozen=True)
class Sample:
    """An ideal sample: its primary family and its curve I(q)."""

    family: str
    I: Curve


class Library:
    """Shapes and structure factors of one set, found by family.

    Parameters
    ----------
    shapes, structure_factors
        All of one set or of several.
    """

    def __init__(self, shapes: Sequence[Shape], structure_factors: Sequence[StructureFactor]) -> None:
        self.shapes: dict[str, list[Shape]] = {}
        for shape in shapes:
            self.shapes.setdefault(shape.family, []).append(shape)
        self.structure_factors: dict[str, list[StructureFactor]] = {}
        for factor in structure_factors:
            self.structure_factors.setdefault(factor.family, []).append(factor)

    @property
    def families(self) -> list[str]:
        """Names of everything that a sample can primarily be."""
        return [*self.shapes, *self.structure_factors]

    def shape(self, rng: np.random.Generator, family: str | None = None) -> Shape:
        """Draw a shape, of any family unless one is named."""
        shapes = self.shapes[family or str(rng.choice(list(self.shapes)))]
        return shapes[rng.integers(len(shapes))]

    def structure_factor(self, rng: np.random.Generator, family: str) -> StructureFactor:
        """Draw a structure factor of a kind."""
        factors = self.structure_factors[family]
        return factors[rng.integers(len(factors))]


def families_of(split: str) -> list[str]:
    """Name everything of one set, shapes and structure factors."""
    shapes = [family.name for family in FAMILIES if family.split == split]
    return shapes + [name for name, own in {**LATTICES, **FLUIDS}.items() if own == split]


def make_library(seed: int, splits: Sequence[str]) -> Library:
    """Compute the library of one or several sets in as many processes as there are cores: minutes, for orientation averages."""
    families = [family.name for family in FAMILIES if family.split in splits]
    kinds = [name for name, split in {**LATTICES, **FLUIDS}.items() if split in splits]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shapes = list(pool.map(_shapes, families, repeat(seed)))
        factors = list(pool.map(make_structure_factors, kinds, repeat(seed)))
    return Library([shape for group in shapes for shape in group], [factor for group in factors for factor in group])


def _shapes(name: str, seed: int) -> list[Shape]:
    return list(make_shapes(next(family for family in FAMILIES if family.name == name), seed))


def save_library(path: Path, library: Library) -> None:
    """Write a library as one npz: curves end to end, and what they are as JSON. A crash while writing leaves what was there."""
    shapes = [shape for group in library.shapes.values() for shape in group]
    factors = [factor for group in library.structure_factors.values() for factor in group]
    about = [
        {"family": s.family, "split": s.split, "parameters": s.parameters, "oscillates": s.oscillates, "points": s.x.size}
        for s in shapes
    ] + [{"family": f.family, "split": f.split, "points": f.x.size} for f in factors]
    x = np.concatenate([*(s.x for s in shapes), *(f.x for f in factors)])
    y = np.concatenate([*(s.I for s in shapes), *(f.S for f in factors)])
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, x=x, y=y, about=np.array(json.dumps(about)), sasmodels=np.array(version("sasmodels")))


def made_with(path: Path) -> str:
    """Read which version of sasmodels computed a library."""
    with np.load(path) as stored:
        return str(stored["sasmodels"])


def load_library(path: Path, split: str | None = None) -> Library:
    """Read a library, or what belongs to one set."""
    with np.load(path) as stored:
        x, y, about = stored["x"], stored["y"], json.loads(str(stored["about"]))
    ends = np.cumsum([entry["points"] for entry in about])[:-1]
    shapes: list[Shape] = []
    factors: list[StructureFactor] = []
    for entry, grid, values in zip(about, np.split(x, ends), np.split(y, ends), strict=True):
        if split not in (None, entry["split"]):
            continue
        if "oscillates" in entry:
            shapes.append(Shape(entry["family"], entry["split"], entry["parameters"], grid, values, entry["oscillates"]))
        else:
            factors.append(StructureFactor(entry["family"], entry["split"], grid, values))
    return Library(shapes, factors)


def digest_of_library(path: Path) -> str:
    """Give the SHA-256 of what a library holds: of its curves and what they are, however they are packed."""
    sha = hashlib.sha256()
    with np.load(path) as stored:
        for name in ("about", "x", "y"):
            sha.update(np.ascontiguousarray(stored[name]).tobytes())
    return sha.hexdigest()


def draw_sample(
    rng: np.random.Generator, library: Library, view: View, family: str | None = None, *, plain: bool = False
) -> Sample:
    """Draw a sample that shows something in the view of an instrument.

    Parameters
    ----------
    rng
        Source of all choices.
    library
        Shapes and structure factors to take from.
    view
        What the instrument sees.
    family
        Primary family; by default any, or peaks or a grating.
    plain
        Leave out mixtures, upturns and peaks; a background stays.
    """
    family = family or _draw_family(rng, library)
    if family == "peaks":
        curve = _add(_power_law(rng, view), _peaks(rng, view), view, _log(rng, 0.1, 30))
    elif family == "grating":
        curve = _grating(rng, view)
    elif family in LATTICES or family in FLUIDS:
        curve = _ordered(rng, library, view, family)
    else:
        curve = _sized(rng, library.shape(rng, family), view)
    if not plain:
        curve = _enrich(rng, library, view, curve)
    return Sample(family, _with_background(rng, curve, view))


def _draw_family(rng: np.random.Generator, library: Library) -> str:
    families = library.families
    weights = np.array([LATTICE_SHARE if name in LATTICES else 1.0 for name in families])
    shares = [*((1 - LINES) * weights / weights.sum()), LINES / 2, LINES / 2]
    return str(rng.choice([*families, "peaks", "grating"], p=shares))


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(max(high, low * 1.0001)))))


def _enrich(rng: np.random.Generator, library: Library, view: View, curve: Curve) -> Curve:
    if rng.random() < 0.25:
        curve = _add(curve, _sized(rng, library.shape(rng), view), view, _log(rng, 1e-3, 1))
    if rng.random() < 0.15:
        curve = _add(curve, _power_law(rng, view), view, _log(rng, 1e-3, 1))
    if rng.random() < 0.08:
        curve = _add(curve, _peaks(rng, view), view, _log(rng, 0.03, 10))
    return curve


def _add(first: Curve, second: Curve, view: View, share: float) -> Curve:
    """Add a curve so that it is `share` of the first one somewhere within the view."""
    q = np.geomspace(max(view.lowest, 1e-3 * view.highest), view.highest, 200)
    a, b = np.maximum(first(q), 1e-300), second(q)
    if b.max() < 1e-30:  # peaks beyond the view
        return first
    # Narrow peaks are nothing at most q: without a floor they would be raised by hundreds of decades.
    factor = share / np.exp(np.median(np.log(np.maximum(b, 1e-9 * b.max())) - np.log(a)))
    return lambda q: first(q) + factor * second(q)


def _sized(rng: np.random.Generator, shape: Shape, view: View) -> Curve:
    """Give a shape a size, or a distribution of sizes."""
    smallest, largest = 3 / view.highest, min(0.8 * shape.x[-1] / view.highest, 30 / max(view.lowest, 1e-3 * view.highest))
    if shape.oscillates:
        largest = min(largest, 3 / view.width, 1.5 / view.step)
    while True:
        size = _log(rng, smallest, max(largest, 1.5 * smallest))
        strength = view.width * size / 2
        if shape.family not in NEAR_SPHERES or all(abs(np.log(strength / paper)) > MARGIN for paper in PAPER_STRENGTHS):
            break
    if rng.random() < 0.55 or not shape.oscillates:
        return lambda q: shape(q * size)
    return _distributed(shape, size, _log(rng, 0.01, 0.3))


def _distributed(shape: Shape, size: float, spread: float) -> Curve:
    """Average over a log-normal distribution of sizes; a scatterer counts with its volume squared."""
    z = np.linspace(-3, 3, SIZES)
    scales = np.exp(spread * z)
    weights = np.exp(-0.5 * z**2) * scales**6
    weights /= weights.sum()

    def curve(q: Floats) -> Floats:
        return sum(w * shape(q * size * s) for w, s in zip(weights, scales, strict=True))  # type: ignore[return-value]

    return curve


def _ordered(rng: np.random.Generator, library: Library, view: View, family: str) -> Curve:
    """Scatterers of one shape in a lattice or a fluid, in the decoupling approximation."""
    factor = library.structure_factor(rng, family)
    shape = library.shape(rng, "sphere" if "sphere" in library.shapes and rng.random() < 0.6 else None)
    distance = _log(rng, 6 / view.highest, min(50 / view.highest, 6 / view.width, 2 / view.step, 30 / max(view.lowest, 1e-9)))
    size = distance * rng.uniform(0.15, 0.95)
    spread = _log(rng, 0.02, 0.3)
    particle = _distributed(shape, size, spread) if rng.random() < 0.5 else (lambda q: shape(q * size))
    return lambda q: particle(q) * factor(q * distance)


def _power_law(rng: np.random.Generator, view: View) -> Curve:
    exponent = rng.uniform(1.5, 4)
    # Nothing is known of an upturn below the record, or within the beam; somewhere it must level off.
    floor = _log(rng, 0.3, 3) * max(view.lowest, view.width, 1e-3 * view.highest)
    return lambda q: (np.maximum(q, 0) ** 2 + floor**2) ** (-exponent / 2) * view.highest**exponent


def _peaks(rng: np.random.Generator, view: View) -> Curve:
    """Several Bragg or correlation peaks: a series of orders, or anywhere."""
    first = rng.uniform(max(0.05 * view.highest, view.lowest), 0.9 * view.highest)
    orders = np.arange(1, 12) if rng.random() < 0.7 else np.sqrt([1, 2, 3, 4, 5, 6, 8, 9, 10])
    places = (
        first * orders[: rng.integers(1, 8)] if rng.random() < 0.7 else rng.uniform(0, 1.05, rng.integers(1, 6)) * view.highest
    )
    width = max(_log(rng, 0.15, 6) * view.width, 0.7 * view.step)
    heights = np.exp(rng.normal(0, 1, len(places))) * np.exp(-rng.uniform(0, 1.5) * np.arange(len(places)))
    mix = rng.choice([0.0, 1.0, rng.random()])

    def curve(q: Floats) -> Floats:
        z = (q[:, None] - places) / width
        return (heights * ((1 - mix) * np.exp(-0.5 * z**2) + mix / (1 + z**2))).sum(axis=1)

    return curve


def _grating(rng: np.random.Generator, view: View) -> Curve:
    """Orders of a line grating under the envelope of its lines, on diffuse scattering."""
    pitch = 2 * np.pi / _log(rng, max(3 * view.step, 0.02 * view.highest, 1.2 * view.width), 0.3 * view.highest)
    duty, roughness, width = rng.uniform(0.2, 0.8), rng.uniform(0, 0.1), max(_log(rng, 0.15, 2) * view.width, 0.7 * view.step)
    orders = np.arange(1, int(1.2 * view.highest * pitch / (2 * np.pi)) + 1)
    places = orders * 2 * np.pi / pitch
    heights = np.sinc(orders * duty) ** 2 * np.exp(-((orders * roughness) ** 2)) + 1e-6
    diffuse, decay = _log(rng, 1e-6, 1e-2), view.highest * rng.uniform(0.05, 0.5)

    def curve(q: Floats) -> Floats:
        z = (q[:, None] - places) / width
        return (heights * np.exp(-0.5 * z**2)).sum(axis=1) + diffuse / (1 + (q / decay) ** 2)

    return curve


def _with_background(rng: np.random.Generator, curve: Curve, view: View) -> Curve:
    """Add a flat background that takes over somewhere, in or beyond the view; one curve in ten has none."""
    q = np.geomspace(max(view.lowest, 1e-3 * view.highest), view.highest, 200)
    values = curve(q)
    least = 1e-9 * values.max()
    level = least if rng.random() < 0.1 else float(np.quantile(values, rng.uniform(0, 0.6))) * _log(rng, 1e-3, 1)
    level = max(level, least)
    return lambda q: curve(q) + level

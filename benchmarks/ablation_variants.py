"""What `ablation.py` trains: variants of the network of dsnet 2 from which something is withheld, and the sessions they see."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsnet_bluesky.features import CHANNELS, Features, Operator, start_curve
from dsnet_bluesky.library.examples import Measured, Session, draw_instrument_of, load_session, measure, save_session, session
from dsnet_bluesky.library.families import FAMILIES, make_shapes
from dsnet_bluesky.library.instruments import Instrument
from dsnet_bluesky.library.samples import Library, load_library, make_library, save_library
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.training.recipes import Recipe
from dsnet_bluesky.training.unrolled import Training
from dsnet_bluesky.unrolled import Unrolled, UnrolledConfig

SEED = 2026
"""Of shapes, instruments, samples and noise: that of the released model's recipe."""

SPLITS = ("training", "validation")
"""Their places are the second number of every list of seeds, as in the package's own trainings."""

POINTS = (50, 300)
"""Least and largest number of q: half of the recipe's, to save time."""

EVERYTHING = "everything"

RECIPE = """\
name = "ablation"
version = "0"
licence = "BSD-3-Clause"
seed = {seed}
[architecture]
channels = {channels}
kernel = 5
hidden = 8
[data]
sessions = {sessions}
curves = {curves}
validation_sessions = {validation_sessions}
validation_curves = {curves}
repeats = 0
points = {points}
[schedule]
steps = {steps}
batch = {batch}
learning_rate = 2e-3
weight_decay = 1e-4
[card]
"""

SETS: dict[str, tuple[str, ...]] = {
    "spheres": ("sphere", "fuzzy_sphere", "core_shell_sphere"),
    "eight": (
        "sphere", "core_shell_sphere", "ellipsoid", "cylinder",
        "flexible_cylinder", "lamellar", "poly_gauss_coil", "fractal",
    ),
}  # fmt: skip
"""Primary families of the sets of sessions that are not made of all."""

CHEAP = (*SETS["eight"], "fuzzy_sphere", "gel_fit", "mass_surface_fractal", "lamellar_hg_stack_caille")
"""Families of the smoke test: their curves take little time."""

FROM_R = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12)
"""Channels of the features that are computed with R itself: what iterations make of a curve and leave over, the transform."""

FROM_INDIRECT = (4, 8, 10, 11, 12)
"""Those of them that the indirect transform makes."""

BETWEEN_FROM_R = (CHANNELS + 2, CHANNELS + 3)
"""Inputs of the second U-Net that are computed with R: what the first one's answer leaves over, and a further step."""


@dataclass(frozen=True)
class Scale:
    """How much is done: sessions, curves, steps and seeds of the trainings; instruments and curves for the released model."""

    sessions: int = 250
    curves: int = 48
    validation_sessions: int = 48
    steps: int = 1000
    batch: int = 32
    seeds: int = 3
    channels: tuple[int, ...] = (16, 24, 32, 48, 64)
    instruments: int = 24
    tried: int = 24


QUICK = Scale(sessions=4, curves=8, validation_sessions=2, steps=4, batch=8, seeds=2, channels=(4, 4, 4), instruments=2, tried=4)


# What is withheld


def without_operator(whole: Session) -> Session:
    """Leave of the features only what needs no R: the smoothed curve, where all starts, its noise, grid and local widths."""
    operator, features = whole.operator, whole.features
    start = smoothed(operator, features)
    level = (start * operator.measured).sum(dim=-1, keepdim=True) / operator.measured.sum()
    channels = hidden(features.channels, FROM_R)
    channels[:, 0] = (start - level) / 4
    return dataclasses.replace(whole, features=features._replace(channels=channels, start=start, indirect=start))


def smoothed(operator: Operator, features: Features) -> Tensor:
    """Give ln of the smoothed measured curve on q_calc, continued as a power law, shape (exposure, m)."""
    curve = start_curve(features.I, features.Idev)
    slope = (curve[:, -operator.tail.shape[0] :] @ operator.tail).clamp(-4.0, 0.0)
    return operator.to_nodes(curve) + slope[:, None] * operator.beyond


def without_indirect(whole: Session) -> Session:
    """Leave out the indirect transform; where the network would turn to it, it finds the Richardson-Lucy curve."""
    features = whole.features
    channels = hidden(features.channels, FROM_INDIRECT)
    return dataclasses.replace(whole, features=features._replace(channels=channels, indirect=features.start))


def hidden(channels: Tensor, withheld: Sequence[int]) -> Tensor:
    """Copy channels with some of them zero: the network keeps its size."""
    channels = channels.clone()
    channels[:, list(withheld)] = 0
    return channels


def between_without_operator(config: UnrolledConfig) -> Unrolled:
    """Build the network without R between its U-Nets: the second sees neither what is left over nor a further step."""
    network = Unrolled(config)
    assert network.refine is not None
    network.refine.register_forward_pre_hook(_hide_between)
    return network


def _hide_between(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (hidden(inputs[0], BETWEEN_FROM_R),)


def alone(config: UnrolledConfig) -> Unrolled:
    """Build the first U-Net alone; it states an error too."""
    return Unrolled(dataclasses.replace(config, unets=1))


def wider(config: UnrolledConfig) -> Unrolled:
    """Build one U-Net with about as many parameters as two have."""
    return alone(dataclasses.replace(config, channels=tuple(round(1.45 * width) for width in config.channels)))


def told_gaussian(instrument: Instrument) -> Instrument:
    """Keep grid and local widths of the operator that curves are desmeared with, but take it for a Gaussian."""
    told = instrument.smearing
    return dataclasses.replace(instrument, smearing=Smearing.pinhole(told.q, told.widths, q_calc=told.q_calc))


@dataclass(frozen=True)
class Variant:
    """A training with something withheld.

    Attributes
    ----------
    sessions
        Set of its sessions: ``all``, ``gaussian``, or one of `SETS`.
    share
        It is given the first of so many parts of them.
    hide
        Takes what is withheld out of a session.
    network
        Builds its network.
    """

    sessions: str = "all"
    share: int = 1
    hide: Callable[[Session], Session] = lambda whole: whole
    network: Callable[[UnrolledConfig], Unrolled] = Unrolled

    @property
    def validation(self) -> str:
        """Set of its validation sessions."""
        return self.sessions if self.sessions == "gaussian" else "all"


VARIANTS: dict[str, Variant] = {
    EVERYTHING: Variant(),
    "no operator: widths only": Variant(hide=without_operator, network=between_without_operator),
    "no operator in the features": Variant(hide=without_operator),
    "no R between the U-Nets": Variant(network=between_without_operator),
    "no indirect transform": Variant(hide=without_indirect),
    "a Gaussian in place of R": Variant("gaussian"),
    "one U-Net": Variant(network=alone),
    "one U-Net, as many parameters": Variant(network=wider),
    "spheres only": Variant("spheres"),
    "eight families": Variant("eight"),
    "a quarter of the sessions": Variant(share=4),
    "a sixteenth of the sessions": Variant(share=16),
}


# Sessions


def library_of(folder: Path, *, quick: bool) -> Path:
    """Find the library, or compute it."""
    path = folder / "library.npz"
    if not path.exists():
        print("computing the library", flush=True)
        families = [family for family in FAMILIES if family.name in CHEAP]
        shapes = [shape for family in families for shape in make_shapes(family, SEED, 3)] if quick else []
        save_library(path, Library(shapes, []) if quick else make_library(SEED, SPLITS))
    return path


def sessions_of(folder: Path, library: Path, name: str, split: str, count: int, curves: int) -> list[Session]:
    """Make the sessions of a set that are not there yet, and load all."""
    paths = [folder / "sessions" / f"{name}-{split}" / f"{number:05d}.safetensors" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"making {len(missing)} {split} sessions of the set {name}", flush=True)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        source = chosen_of(load_library(library, split), SETS.get(name, ()))
        for number in missing:
            measured = measured_by([SEED, SPLITS.index(split), number], source, curves, SETS.get(name, ()))
            if name == "gaussian":
                measured = dataclasses.replace(measured, instrument=told_gaussian(measured.instrument))
            save_session(paths[number], session(measured))
    return [load_session(path) for path in paths]


def chosen_of(library: Library, families: Sequence[str]) -> Library:
    """Keep some families of a library, all where none is named: admixtures come from it too."""
    return Library([shape for name in families for shape in library.shapes[name]], []) if families else library


def measured_by(place: list[int], library: Library, curves: int, families: Sequence[str]) -> Measured:
    """Measure samples of some families, of all where none is named, with the instrument that a list of seeds stands for."""
    instrument, rng = draw_instrument_of(place, POINTS), np.random.default_rng([*place, 1])
    if not families:
        return measure(rng, instrument, library, curves)
    names, counts = np.unique(rng.choice(list(families), curves), return_counts=True)
    parts = [measure(rng, instrument, library, int(k), family=str(name)) for name, k in zip(names, counts, strict=True)]
    I, Idev, truth = (np.concatenate([getattr(part, name) for part in parts]) for name in ("I", "Idev", "truth"))
    levels = [level for part in parts for level in part.levels]
    return Measured(instrument, I, Idev, truth, [family for part in parts for family in part.families], levels)


# Trainings


class Trial(Training):
    """A training of another network than the released one.

    Parameters
    ----------
    recipe
        What to do.
    network
        Builds the network from its shape.
    """

    def __init__(self, recipe: Recipe, network: Callable[[UnrolledConfig], Unrolled]) -> None:
        super().__init__(recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = network(recipe.architecture)
        self.average = copy.deepcopy(self.network)
        self.optimizer.param_groups[0]["params"] = list(self.network.parameters())


def recipe_of(scale: Scale, seed: int) -> Recipe:
    """Write the recipe of a training."""
    values = dataclasses.asdict(scale)
    lists = {"channels": list(scale.channels), "points": list(POINTS)}
    return Recipe.parse(RECIPE.format(**{**values, **lists}, seed=seed))

"""Structure factors: powder averages of paracrystals, and fluids, as functions of x = q d."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .families import Draw, Split, kernel

__all__ = ["FLUIDS", "LATTICES", "StructureFactor", "make_structure_factors"]

Floats = NDArray[np.floating[Any]]

LATTICES: dict[str, Split] = {"sc_paracrystal": "training", "bcc_paracrystal": "training", "fcc_paracrystal": "test"}
"""Paracrystals of sasmodels and the set that each belongs to."""

FLUIDS: dict[str, Split] = {
    "hardsphere": "training",
    "stickyhardsphere": "training",
    "hayter_msa": "training",
    "two_yukawa": "validation",
    "squarewell": "test",
}
"""Structure factors of fluids and their sets."""

LATTICE_SHAPES = 20
FLUID_SHAPES = 60
REACH = 60.0
LOWEST = 1.0
"""Below this x a paracrystal's S(x) is held: sasmodels lets it diverge at x -> 0."""

POINT = 0.01
"""Radius of the scatterers over their distance, small enough that their form factor is 1."""

PAPER_DISORDER = 0.06
"""d_factor of SasView's default cubic paracrystal, which is a test case."""


class StructureFactor:
    """S(x), x = q d: interpolated inside its range, 1 above it.

    Parameters
    ----------
    family, split
        Name and set.
    x, S
        Grid and values.
    """

    def __init__(self, family: str, split: Split, x: Floats, S: Floats) -> None:
        self.family, self.split, self.x, self.S = family, split, x, S

    def __call__(self, x: Floats) -> Floats:
        """Interpolate."""
        return np.interp(x, self.x, self.S, right=1.0)


def make_structure_factors(name: str, seed: int) -> list[StructureFactor]:
    """Compute the structure factors of one kind, with parameters drawn by a seed."""
    draw = Draw(np.random.default_rng([seed, len(name), sum(name.encode())]))
    return _lattice(name, draw) if name in LATTICES else _fluid(name, draw)


def _lattice(name: str, draw: Draw) -> list[StructureFactor]:
    evaluate = kernel(name)
    x = np.concatenate([np.linspace(LOWEST, 30, 900), np.linspace(30, REACH, 301)[1:]])
    made = []
    for _ in range(LATTICE_SHAPES):
        # The margin about the paper's cubic lattice.
        disorder = draw.aside(0.03, 0.25, PAPER_DISORDER) if name == "sc_paracrystal" else draw.log(0.03, 0.25)
        distance = 100.0
        I = evaluate(
            x / distance, {"dnn": distance, "d_factor": disorder, "radius": POINT * distance, "sld": 1, "sld_solvent": 0}
        )
        S = I / np.median(I[-100:])
        made.append(StructureFactor(name, LATTICES[name], x, np.where(np.isfinite(S), S, 1.0)))
    return made


def _fluid(name: str, draw: Draw) -> list[StructureFactor]:
    evaluate = kernel(name)
    x = np.linspace(0.02, REACH, 1500)
    made: list[StructureFactor] = []
    while len(made) < FLUID_SHAPES:
        radius = 50.0
        parameters = {"radius_effective": radius, "volfraction": draw(0.05, 0.5)} | _interaction(name, draw)
        S = evaluate(x / (2 * radius), parameters)
        if np.isfinite(S).all() and S.min() > 0 and S.max() < 30:
            made.append(StructureFactor(name, FLUIDS[name], x, S))
    return made


def _interaction(name: str, draw: Draw) -> dict[str, float]:
    if name == "stickyhardsphere":
        return {"volfraction": draw(0.05, 0.4), "perturb": 0.05, "stickiness": draw(0.15, 0.6)}
    if name == "hayter_msa":
        return {"charge": draw(3, 40), "concentration_salt": draw.log(1e-4, 0.1), "volfraction": draw(0.02, 0.35)}
    if name == "squarewell":
        return {"volfraction": draw(0.02, 0.2), "welldepth": draw(0.2, 1.4), "wellwidth": draw(1.1, 1.4)}
    if name == "two_yukawa":
        return {"volfraction": draw(0.05, 0.3), "k1": draw(1, 6), "k2": draw(-3, -0.5), "z1": draw(4, 12), "z2": draw(1, 4)}
    return {}

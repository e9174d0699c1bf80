"""Families of ideal curves, in units of their own size.

A curve of a family is computed once with sasmodels, on a grid of x = q D (D: the largest
length of the scatterer), and used at any size: I(q; D) = I(x = q D). Every family belongs to one of three
sets. Training families are learned; choices are made by validation families; test
families are looked at when all choices have been made.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from dsnet_bluesky.data import BadInput

__all__ = ["FAMILIES", "Family", "Shape", "form_factor", "make_shapes"]

Floats = NDArray[np.floating[Any]]
Split = Literal["training", "validation", "test"]

UNIT = 100.0
"""The scale, in angstrom, at which parameters are drawn; curves do not depend on it."""

MARGIN = 0.25
"""How far, in ln, dimensionless parameters keep away from those of the paper's test shapes."""


class Draw:
    """Random numbers as parameters are drawn: uniform, or uniform in the logarithm."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, low: float, high: float) -> float:
        """Give a number, uniform between two."""
        return float(self.rng.uniform(low, high))

    def log(self, low: float, high: float) -> float:
        """Give a positive number, uniform in its logarithm."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def whole(self, low: int, high: int) -> int:
        """Give a whole number, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def aside(self, low: float, high: float, *avoided: float) -> float:
        """Give a number uniform in its logarithm that keeps `MARGIN` away from some."""
        while True:
            value = self.log(low, high)
            if all(abs(np.log(value / other)) > MARGIN for other in avoided):
                return value


@dataclass(frozen=True)
class Family:
    """A kind of scatterer.

    Parameters
    ----------
    name
        Its name; the sasmodels form factor, unless `model` says otherwise.
    draw
        From random numbers: parameters of sasmodels and the largest length D in angstrom.
    split
        The set it belongs to.
    count
        How many of its shapes are computed.
    reach
        Largest x = q D.
    points
        Points of the linear part of the x grid; 0 for curves without oscillations, whose grid is logarithmic.
    model
        Name for sasmodels.
    """

    name: str
    draw: Callable[[Draw], tuple[dict[str, float], float]]
    split: Split = "training"
    count: int = 250
    reach: float = 300.0
    points: int = 2400
    model: str = ""


@dataclass(frozen=True)
class Shape:
    """One ideal curve of a family: I(x), x = q D, without background."""

    family: str
    split: Split
    parameters: dict[str, float]
    x: Floats
    I: Floats
    oscillates: bool

    def __call__(self, x: Floats) -> Floats:
        """Interpolate; constant below the grid, a power law above it."""
        x = np.asarray(x)
        inside = np.clip(x, self.x[0], self.x[-1])
        if self.oscillates:
            answer = np.maximum(self._spline(inside), 0.0)
        else:
            answer = np.exp(np.interp(np.log(inside), np.log(self.x), np.log(np.maximum(self.I, 1e-300))))
        beyond = x > self.x[-1]
        if beyond.any():
            answer[beyond] = self._tail(x[beyond])
        return answer

    @cached_property
    def _spline(self) -> CubicSpline:
        return CubicSpline(self.x, self.I)

    def _tail(self, x: Floats) -> Floats:
        half = self.x > self.x[-1] / 2
        slope = np.polyfit(np.log(self.x[half]), np.log(np.maximum(self.I[half], 1e-300)), 1)[0]
        return float(self.I[half].mean()) * (x / self.x[-1]) ** np.clip(slope, -6, 0)


def _sld(d: Draw, *names: str) -> dict[str, float]:
    """Scattering length densities with contrasts of either sign; the solvent is zero."""
    values = {name: d(-3, 6) for name in names}
    values[names[0]] = d(1, 6)
    return {**values, "sld_solvent": 0.0}


def _sphere(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 2, "sld": 1, "sld_solvent": 0}, UNIT


def _core_shell_sphere(d: Draw) -> tuple[dict[str, float], float]:
    core = d(0.2, 0.97)
    return {"radius": UNIT / 2 * core, "thickness": UNIT / 2 * (1 - core), **_sld(d, "sld_core", "sld_shell")}, UNIT


def _fuzzy_sphere(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 2, "fuzziness": UNIT / 2 * d.log(0.01, 0.25), "sld": 1, "sld_solvent": 0}, UNIT


def _vesicle(d: Draw) -> tuple[dict[str, float], float]:
    wall = d.log(0.03, 0.5)
    return {"radius": UNIT / 2 * (1 - wall), "thickness": UNIT / 2 * wall, "volfraction": 0.1, "sld": 1, "sld_solvent": 0}, UNIT


def _multi_shell(d: Draw) -> tuple[dict[str, float], float]:
    parts = d.rng.dirichlet([2, 1, 1, 1]) * UNIT / 2
    shells = {f"thickness{i}": parts[i] for i in (1, 2, 3)} | {f"sld{i}": d(-3, 6) for i in (1, 2, 3)}
    return {"radius": parts[0], "sld_core": d(-3, 6), "sld_solvent": 0, "n": 3, **shells}, UNIT


def _ellipsoid(d: Draw) -> tuple[dict[str, float], float]:
    aspect = d.log(0.12, 8)
    R = UNIT / 2
    polar, equatorial = (R, R / aspect) if aspect > 1 else (R * aspect, R)
    return {"radius_polar": polar, "radius_equatorial": equatorial, "sld": 1, "sld_solvent": 0}, UNIT


def _core_shell_ellipsoid(d: Draw) -> tuple[dict[str, float], float]:
    aspect, shell = d.log(0.3, 4), d(0.1, 0.8)
    return {
        "radius_equat_core": UNIT / 2,
        "x_core": aspect,
        "thick_shell": UNIT / 2 * shell,
        "x_polar_shell": d(0.5, 1.5),
        **_sld(d, "sld_core", "sld_shell"),
    }, UNIT * (max(aspect, 1) + shell)


def _cylinder(d: Draw) -> tuple[dict[str, float], float]:
    aspect = d.aside(0.05, 60, 400 / 85, 20.0)
    return {"radius": UNIT, "length": UNIT * aspect, "sld": 1, "sld_solvent": 0}, UNIT * float(np.hypot(2, aspect))


def _hollow_cylinder(d: Draw) -> tuple[dict[str, float], float]:
    aspect, wall = d.log(0.3, 20), d(0.05, 0.7)
    return {
        "radius": UNIT * (1 - wall),
        "thickness": UNIT * wall,
        "length": UNIT * aspect,
        "sld": 1,
        "sld_solvent": 0,
    }, UNIT * float(np.hypot(2, aspect))


def _core_shell_cylinder(d: Draw) -> tuple[dict[str, float], float]:
    aspect, wall = d.log(0.2, 20), d(0.05, 0.6)
    return {
        "radius": UNIT * (1 - wall),
        "thickness": UNIT * wall,
        "length": UNIT * aspect,
        **_sld(d, "sld_core", "sld_shell"),
    }, UNIT * float(np.hypot(2, aspect + 2 * wall))


def _elliptical_cylinder(d: Draw) -> tuple[dict[str, float], float]:
    ratio, aspect = d(1.1, 5), d.log(0.1, 15)
    return {"radius_minor": UNIT, "axis_ratio": ratio, "length": UNIT * aspect, "sld": 1, "sld_solvent": 0}, UNIT * float(
        np.hypot(2 * ratio, aspect)
    )


def _capped_cylinder(d: Draw) -> tuple[dict[str, float], float]:
    aspect = d.log(0.3, 10)
    return {"radius": UNIT, "radius_cap": UNIT * d(1.02, 3), "length": UNIT * aspect, "sld": 1, "sld_solvent": 0}, UNIT * (
        aspect + 2
    )


def _barbell(d: Draw) -> tuple[dict[str, float], float]:
    aspect, bell = d.log(0.5, 8), d(1.05, 2.5)
    return {"radius": UNIT, "radius_bell": UNIT * bell, "length": UNIT * aspect, "sld": 1, "sld_solvent": 0}, UNIT * (
        aspect + 3.5 * bell
    )


def _bicelle(d: Draw) -> tuple[dict[str, float], float]:
    rim, face, length = d(0.05, 0.5), d(0.05, 0.5), d.log(0.1, 2)
    slds = {name: d(-3, 6) for name in ("sld_core", "sld_face", "sld_rim")}
    return {
        "radius": UNIT,
        "thick_rim": UNIT * rim,
        "thick_face": UNIT * face,
        "length": UNIT * length,
        **slds,
        "sld_solvent": 0,
    }, UNIT * float(np.hypot(2 * (1 + rim), length + 2 * face))


def _bicelle_elliptical(d: Draw) -> tuple[dict[str, float], float]:
    parameters, size = _bicelle(d)
    ratio = d(1.2, 4)
    return {**parameters, "x_core": ratio}, size * ratio


def _box(d: Draw) -> tuple[dict[str, float], float]:
    a, b, c = np.sort(np.exp(d.rng.uniform(np.log(0.1), 0, 3))) * UNIT
    return {"length_a": a, "length_b": b, "length_c": c, "sld": 1, "sld_solvent": 0}, float(np.linalg.norm([a, b, c]))


def _prism_ratios(d: Draw) -> tuple[dict[str, float], float]:
    b, c = d.log(0.3, 3), d.log(0.2, 5)
    return {"length_a": UNIT, "b2a_ratio": b, "c2a_ratio": c, "sld": 1, "sld_solvent": 0}, UNIT * float(np.linalg.norm([1, b, c]))


def _hollow_prism(d: Draw) -> tuple[dict[str, float], float]:
    parameters, size = _prism_ratios(d)
    sides = min(1.0, parameters["b2a_ratio"], parameters["c2a_ratio"])
    return {**parameters, "thickness": UNIT * sides * d(0.05, 0.45)}, size


def _core_shell_box(d: Draw) -> tuple[dict[str, float], float]:
    sides = np.exp(d.rng.uniform(np.log(0.15), 0, 3)) * UNIT
    rims = d.rng.uniform(0.03, 0.3, 3) * UNIT
    slds = {name: d(-3, 6) for name in ("sld_core", "sld_a", "sld_b", "sld_c")}
    names = dict(
        zip(("length_a", "length_b", "length_c", "thick_rim_a", "thick_rim_b", "thick_rim_c"), [*sides, *rims], strict=True)
    )
    return {**names, **slds, "sld_solvent": 0}, float(np.linalg.norm(sides + 2 * rims))


def _polygon_prism(d: Draw) -> tuple[dict[str, float], float]:
    aspect = d.log(0.2, 6)
    return {"n_sides": d.whole(3, 7), "radius_average": UNIT, "length": UNIT * aspect, "sld": 1, "sld_solvent": 0}, UNIT * float(
        np.hypot(2.3, aspect)
    )


def _tetrahedron(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 2, "sld": 1, "sld_solvent": 0}, UNIT


def _triaxial(d: Draw) -> tuple[dict[str, float], float]:
    axes = np.sort(np.exp(d.rng.uniform(np.log(0.15), 0, 3))) * UNIT / 2
    names = ("radius_equat_minor", "radius_equat_major", "radius_polar")
    return {**dict(zip(names, axes, strict=True)), "sld": 1, "sld_solvent": 0}, 2 * float(axes[-1])


def _flexible(d: Draw) -> tuple[dict[str, float], float]:
    kuhn, length = d.log(2, 30), d.log(10, 200)
    return {
        "radius": UNIT / 10,
        "kuhn_length": UNIT / 10 * kuhn,
        "length": UNIT / 10 * max(length, kuhn),
        "sld": 1,
        "sld_solvent": 0,
    }, UNIT / 10 * float(np.sqrt(length * kuhn) + 2)


def _lamellar(d: Draw) -> tuple[dict[str, float], float]:
    return {"thickness": UNIT, "sld": 1, "sld_solvent": 0}, UNIT


def _lamellar_hg(d: Draw) -> tuple[dict[str, float], float]:
    head = d(0.05, 0.4)
    return {
        "length_tail": UNIT / 2 * (1 - head),
        "length_head": UNIT / 2 * head,
        "sld": d(-3, 1),
        "sld_head": d(1, 6),
        "sld_solvent": 0,
    }, UNIT


def _lamellar_paracrystal(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "thickness": UNIT * d(0.05, 0.7),
        "Nlayers": d.whole(3, 40),
        "d_spacing": UNIT,
        "sigma_d": d.log(0.01, 0.3),
        "sld": 1,
        "sld_solvent": 0,
    }, UNIT


def _lamellar_caille(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "thickness": UNIT * d(0.1, 0.7),
        "Nlayers": d.whole(3, 40),
        "d_spacing": UNIT,
        "Caille_parameter": d.log(0.01, 0.6),
        "sld": 1,
        "sld_solvent": 0,
    }, UNIT


def _lamellar_hg_caille(d: Draw) -> tuple[dict[str, float], float]:
    parameters, _ = _lamellar_hg(d)
    stack = {"Nlayers": d.whole(3, 30), "d_spacing": UNIT * d(1.2, 2.5), "Caille_parameter": d.log(0.02, 0.5)}
    return {**parameters, **stack}, stack["d_spacing"]


def _stacked_disks(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "thick_core": UNIT * d(0.1, 0.5),
        "thick_layer": UNIT * d(0.05, 0.4),
        "radius": UNIT * d.log(1, 10),
        "n_stacking": d.whole(1, 8),
        "sigma_d": UNIT * d(0, 0.1),
        "sld_core": d(-3, 6),
        "sld_layer": d(-3, 6),
        "sld_solvent": 0,
    }, 3 * UNIT


def _coil(d: Draw) -> tuple[dict[str, float], float]:
    return {"rg": UNIT, "polydispersity": d(1.02, 3), "i_zero": 1}, UNIT


def _star(d: Draw) -> tuple[dict[str, float], float]:
    return {"rg_squared": UNIT**2, "arms": d.whole(2, 6)}, UNIT


def _excluded_volume(d: Draw) -> tuple[dict[str, float], float]:
    return {"rg": UNIT, "porod_exp": d(1.7, 3.0)}, UNIT


def _micelle(d: Draw) -> tuple[dict[str, float], float]:
    core = UNIT * d(0.2, 0.6)
    volume = 4 / 3 * np.pi * core**3
    chains = d.whole(10, 200)
    return {
        "ndensity": 8.94,
        "v_core": volume / chains,
        "v_corona": volume / chains * d(0.2, 3),
        "sld_solvent": 0,
        "sld_core": d(1, 6),
        "sld_corona": d(-3, 6),
        "radius_core": core,
        "rg": UNIT * d(0.05, 0.3),
        "d_penetration": d(0.8, 1.2),
        "n_aggreg": chains,
    }, 2 * core + 0.6 * UNIT


def _guinier_porod(d: Draw) -> tuple[dict[str, float], float]:
    return {"rg": UNIT, "s": d(0, 1.9), "porod_exp": d(2.2, 4)}, UNIT


def _fractal(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "volfraction": 0.05,
        "radius": UNIT / 4,
        "fractal_dim": d(1.3, 2.9),
        "cor_length": UNIT * d.log(0.5, 20),
        "sld_block": 1,
        "sld_solvent": 0,
    }, UNIT


def _fractal_core_shell(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "radius": UNIT / 4 * d(0.3, 0.9),
        "thickness": UNIT / 4 * d(0.1, 0.6),
        "volfraction": 0.05,
        "fractal_dim": d(1.3, 2.9),
        "cor_length": UNIT * d.log(0.5, 20),
        **_sld(d, "sld_core", "sld_shell"),
    }, UNIT


def _mass_fractal(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 10, "fractal_dim_mass": d(1.1, 2.9), "cutoff_length": UNIT * d.log(1, 30)}, UNIT


def _surface_fractal(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 10, "fractal_dim_surf": d(2.05, 2.9), "cutoff_length": UNIT * d.log(5, 50)}, UNIT


def _mass_surface_fractal(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "fractal_dim_mass": d(1.5, 2.9),
        "fractal_dim_surf": d(2.1, 2.9),
        "rg_cluster": UNIT * d(2, 30),
        "rg_primary": UNIT,
    }, UNIT


def _two_lorentzian(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "lorentz_scale_1": d.log(1, 100),
        "lorentz_length_1": UNIT * d.log(1, 10),
        "lorentz_exp_1": d(2, 4),
        "lorentz_scale_2": 1,
        "lorentz_length_2": UNIT * d.log(0.1, 0.8),
        "lorentz_exp_2": d(1.5, 3),
    }, UNIT


def _correlation_length(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "lorentz_scale": 1,
        "porod_scale": d.log(1e-8, 1e-5),
        "cor_length": UNIT,
        "porod_exp": d(2.5, 4),
        "lorentz_exp": d(1.5, 3),
    }, UNIT


def _dab(d: Draw) -> tuple[dict[str, float], float]:
    return {"cor_length": UNIT}, UNIT


def _teubner_strey(d: Draw) -> tuple[dict[str, float], float]:
    return {"volfraction_a": d(0.2, 0.8), "sld_a": 1, "sld_b": 5, "d": UNIT, "xi": UNIT * d.log(0.15, 3)}, UNIT


def _broad_peak(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "porod_scale": d.log(1e-8, 1e-4),
        "porod_exp": d(2, 4),
        "peak_scale": 10,
        "correlation_length": UNIT * d.log(0.3, 5),
        "peak_pos": 2 * np.pi / UNIT,
        "width_exp": d(1.5, 4),
        "shape_exp": d(0.7, 2),
    }, UNIT


def _linear_pearls(d: Draw) -> tuple[dict[str, float], float]:
    return {"radius": UNIT / 2, "edge_sep": UNIT * d(0, 3), "num_pearls": d.whole(2, 12), "sld": 1, "sld_solvent": 0}, 3 * UNIT


def _pearl_necklace(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "radius": UNIT / 2,
        "edge_sep": UNIT * d(0.5, 4),
        "thick_string": UNIT * d(0.02, 0.2),
        "num_pearls": d.whole(2, 10),
        "sld": 1,
        "sld_string": d(0.2, 1.5),
        "sld_solvent": 0,
    }, 3 * UNIT


def _raspberry(d: Draw) -> tuple[dict[str, float], float]:
    small = d.log(0.03, 0.2)
    return {
        "volfraction_lg": 0.05,
        "volfraction_sm": 0.005,
        "surface_fraction": d(0.1, 0.7),
        "radius_lg": UNIT / 2,
        "radius_sm": UNIT / 2 * small,
        "penetration": d(0, 1),
        "sld_lg": d(-3, 6),
        "sld_sm": d(1, 6),
        "sld_solvent": 0,
    }, UNIT * (1 + small)


def _binary(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "radius_lg": UNIT / 2,
        "radius_sm": UNIT / 2 * d(0.1, 0.7),
        "volfraction_lg": d(0.02, 0.3),
        "volfraction_sm": d(0.02, 0.2),
        "sld_lg": d(1, 6),
        "sld_sm": d(1, 6),
        "sld_solvent": 0,
    }, UNIT


def _multilayer_vesicle(d: Draw) -> tuple[dict[str, float], float]:
    core, shell, gap, shells = d(0.2, 0.6), d(0.05, 0.3), d(0.05, 0.3), d.whole(1, 5)
    return {
        "volfraction": 0.05,
        "radius": UNIT / 2 * core,
        "thick_shell": UNIT / 2 * shell,
        "thick_solvent": UNIT / 2 * gap,
        "n_shells": shells,
        "sld": 1,
        "sld_solvent": 0,
    }, UNIT * (core + shells * (shell + gap))


def _gel_fit(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "guinier_scale": d.log(0.1, 20),
        "lorentz_scale": 1,
        "rg": UNIT * d.log(0.5, 5),
        "fractal_dim": d(1.5, 3),
        "cor_length": UNIT / 3,
    }, UNIT


def _unified(d: Draw) -> tuple[dict[str, float], float]:
    small = UNIT * d.log(0.05, 0.3)
    strength = d.log(1e-4, 1e-1)
    powers = d(2, 4), d(2, 4)
    return {
        "level": 2,
        "rg1": small,
        "power1": powers[0],
        "G1": strength,
        "B1": strength * small ** -powers[0] * d(0.5, 3),
        "rg2": UNIT,
        "power2": powers[1],
        "G2": 1,
        "B2": UNIT ** -powers[1] * d(0.5, 3),
    }, UNIT


def _adsorbed(d: Draw) -> tuple[dict[str, float], float]:
    return {
        "second_moment": UNIT * d(0.05, 0.3),
        "adsorbed_amount": 1.9,
        "density_shell": 0.7,
        "radius": UNIT * d(0.4, 2),
        "volfraction": 0.14,
    }, UNIT


FAMILIES: tuple[Family, ...] = (
    Family("sphere", _sphere, count=1, points=4000),
    Family("core_shell_sphere", _core_shell_sphere),
    Family("fuzzy_sphere", _fuzzy_sphere),
    Family("vesicle", _vesicle),
    Family("core_multi_shell", _multi_shell),
    Family("ellipsoid", _ellipsoid),
    Family("cylinder", _cylinder, count=200),
    Family("core_shell_cylinder", _core_shell_cylinder, count=150),
    Family("elliptical_cylinder", _elliptical_cylinder, count=50),
    Family("capped_cylinder", _capped_cylinder, count=80),
    Family("core_shell_bicelle", _bicelle),
    Family("parallelepiped", _box, count=70),
    Family("hollow_rectangular_prism", _hollow_prism, count=60),
    Family("tetrahedron", _tetrahedron, count=1),
    Family("flexible_cylinder", _flexible),
    Family("lamellar", _lamellar, count=1),
    Family("lamellar_hg", _lamellar_hg),
    Family("lamellar_stack_paracrystal", _lamellar_paracrystal, reach=80),
    Family("stacked_disks", _stacked_disks, count=120),
    Family("poly_gauss_coil", _coil, reach=1000, points=0),
    Family("star_polymer", _star, reach=1000, points=0),
    Family("polymer_excl_volume", _excluded_volume, reach=1000, points=0),
    Family("polymer_micelle", _micelle),
    Family("guinier_porod", _guinier_porod, reach=1000, points=0),
    Family("fractal", _fractal),
    Family("mass_fractal", _mass_fractal),
    Family("surface_fractal", _surface_fractal, reach=100),
    Family("two_lorentzian", _two_lorentzian, reach=1000, points=0),
    Family("correlation_length", _correlation_length, reach=1000, points=0),
    Family("dab", _dab, count=1, reach=1000, points=0),
    Family("teubner_strey", _teubner_strey, reach=100),
    Family("broad_peak", _broad_peak, reach=100),
    Family("linear_pearls", _linear_pearls),
    Family("raspberry", _raspberry),
    Family("binary_hard_sphere", _binary),
    Family("barbell", _barbell, "validation", count=60),
    Family("core_shell_ellipsoid", _core_shell_ellipsoid, "validation", count=100),
    Family("hollow_cylinder", _hollow_cylinder, "validation", count=100),
    Family("pearl_necklace", _pearl_necklace, "validation", count=100),
    Family("lamellar_hg_stack_caille", _lamellar_hg_caille, "validation", count=100, reach=80),
    Family("gel_fit", _gel_fit, "validation", count=100, reach=1000, points=0),
    Family("rectangular_prism", _prism_ratios, "validation", count=60),
    Family("mass_surface_fractal", _mass_surface_fractal, "validation", count=100, reach=1000, points=0),
    Family("triaxial_ellipsoid", _triaxial, "test", count=60),
    Family("core_shell_bicelle_elliptical", _bicelle_elliptical, "test", count=60),
    Family("core_shell_parallelepiped", _core_shell_box, "test", count=40),
    Family("prism", _polygon_prism, "test", count=40),
    Family("multilayer_vesicle", _multilayer_vesicle, "test", count=100),
    Family("lamellar_stack_caille", _lamellar_caille, "test", count=100, reach=80),
    Family("fractal_core_shell", _fractal_core_shell, "test", count=100),
    Family("unified_power_Rg", _unified, "test", count=100, reach=1000, points=0),
    Family("adsorbed_layer", _adsorbed, "test", count=60),
)
"""All families of single scatterers. Order and distances between them are made in `library.samples`."""


def make_shapes(family: Family, seed: int, count: int | None = None) -> Iterator[Shape]:
    """Compute the shapes of a family.

    Parameters
    ----------
    family
        One of `FAMILIES`.
    seed
        Together with the name of the family it fixes every parameter.
    count
        How many; by default what the family says.

    Raises
    ------
    BadInput
        If sasmodels is not installed.
    """
    draw = Draw(np.random.default_rng([seed, zlib.crc32(family.name.encode())]))
    linear = np.linspace(2.0, family.reach, family.points)[1:] if family.points else np.empty(0)
    x = np.concatenate([np.geomspace(1e-3, 2.0 if family.points else family.reach, 200 if family.points else 600), linear])
    evaluate = kernel(family.model or family.name)
    for _ in range(family.count if count is None else count):
        parameters, size = family.draw(draw)
        I = evaluate(x / size, parameters)
        if np.isfinite(I).all() and (I >= 0).all() and I.max() > 0:
            yield Shape(family.name, family.split, parameters, x, I / I.max(), oscillates=family.points > 0)


def kernel(name: str) -> Callable[[Floats, dict[str, Any]], Floats]:
    """Give a function of q (1/angstrom) and parameters that evaluates a form factor of sasmodels, without background."""
    call = _sasmodels(name)
    return lambda q, parameters: call(q, {**parameters, "background": 0.0})


def form_factor(name: str, q: Floats, **parameters: float) -> Floats:
    """Compute a curve with sasmodels.

    Parameters
    ----------
    name
        Model of sasmodels, such as ``"sphere"``.
    q
        In 1/nm, shape (n,). (sasmodels itself counts in 1/angstrom.)
    **parameters
        Parameters of the model in sasmodels' own units (angstrom); SasView's defaults otherwise.

    Returns
    -------
    ndarray
        I in 1/cm, shape (n,).

    Raises
    ------
    BadInput
        If sasmodels is not installed.
    """
    return _sasmodels(name)(np.asarray(q, dtype=float) / 10, parameters)


def _sasmodels(name: str) -> Callable[[Floats, dict[str, Any]], Floats]:
    """Load a form factor of sasmodels as a function of q (1/angstrom) and parameters."""
    try:
        from sasmodels.core import load_model
        from sasmodels.direct_model import call_kernel
    except ModuleNotFoundError as error:
        raise BadInput("Ideal curves need sasmodels: pip install 'dsnet-bluesky[train]'.") from error
    model = load_model(name)
    return lambda q, parameters: np.asarray(call_kernel(model.make_kernel([q]), parameters), dtype=float)

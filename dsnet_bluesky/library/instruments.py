"""Instruments drawn at random: a grid of q, and how it is smeared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet_bluesky.desmearing.kernels import widths_below
from dsnet_bluesky.smearing import Smearing, extend
from dsnet_bluesky.smearing.hats import hats

from .samples import View

__all__ = ["KINDS", "Instrument", "draw_instrument"]

Floats = NDArray[np.floating[Any]]

FINER = 6
"""Ideal curves are smeared on a grid this much finer than the one that they are desmeared on."""

HIGHEST = 5.0
"""Largest q in 1/nm. Nothing depends on it: networks see q in steps and in ratios."""

BOX = 12**-0.5
"""Standard deviation of a box of unit width: a q bin blurs by this, in steps."""

WIDEST = 16.0
"""Largest width in steps; what is wider is thinned before it is desmeared."""


@dataclass(frozen=True)
class Instrument:
    """A grid and an operator.

    Attributes
    ----------
    kind
        One of `KINDS`.
    smearing
        The operator as it is desmeared with.
    build
        Makes the same operator on any grid of the ideal curve.
    """

    kind: str
    smearing: Smearing
    build: Callable[[Floats], Smearing]

    @property
    def fine(self) -> Floats:
        """Grid on which ideal curves are smeared: every `FINER`-th node is one of q_calc."""
        nodes = self.smearing.q_calc
        parts = np.arange(FINER) / FINER
        return np.append((nodes[:-1, None] + np.diff(nodes)[:, None] * parts).ravel(), nodes[-1])

    @cached_property
    def fine_smearing(self) -> Smearing:
        """The operator on the fine grid."""
        return self.build(self.fine)

    @property
    def view(self) -> View:
        """What samples are chosen by."""
        q = self.smearing.q
        step = float(np.median(np.diff(q)))
        # A slit's length hides nothing: its sharp edge resolves what its second moment does not.
        width = float(np.hypot(np.median(widths_below(self.smearing)), BOX * step))
        return View(max(float(q[0]), 1e-6), float(q[-1]), width, step)


def draw_instrument(rng: np.random.Generator, kind: str | None = None, points: tuple[int, int] = (50, 600)) -> Instrument:
    """Draw an instrument.

    Parameters
    ----------
    rng
        Source of all choices.
    kind
        One of `KINDS`; by default any, by the shares given there.
    points
        Least and largest number of q.
    """
    names = list(KINDS)
    shares = np.array([share for share, _ in KINDS.values()])
    kind = kind or str(rng.choice(names, p=shares / shares.sum()))
    q = _grid(rng, kind, points)
    build = KINDS[kind][1](rng, q)
    first = build(None)
    return Instrument(kind, first, build)


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _grid(rng: np.random.Generator, kind: str, points: tuple[int, int]) -> Floats:
    """Linear, logarithmic or measured spacing, and now and then a gap."""
    count = round(_log(rng, *points))
    form = rng.choice(["log", "log", "log", "linear"]) if kind == "slit" else rng.choice(["linear", "linear", "log", "measured"])
    if form == "linear":
        step = HIGHEST / count
        q = step * _log(rng, 0.3, 0.15 * count) + step * np.arange(count)
        q *= HIGHEST / q[-1]
    elif form == "log":
        q = np.geomspace(HIGHEST * 10 ** -rng.uniform(0.7, 3.3), HIGHEST, count)
    else:
        q = _measured(rng, count)
    if rng.random() < 0.25 and count > 80:
        keep = np.ones(count, dtype=bool)
        for _ in range(rng.integers(1, 4)):
            start, length = rng.integers(5, count - 20), rng.integers(2, max(4, count // 25))
            keep[start : start + length] = False
        q = q[keep]
    return q


def _measured(rng: np.random.Generator, count: int) -> Floats:
    """Steps that wander: several detectors joined, or a motor's own choice."""
    knots = rng.normal(0, 0.7, 6).cumsum()
    steps = np.exp(np.interp(np.linspace(0, 1, count), np.linspace(0, 1, 6), knots) + rng.normal(0, rng.choice([0, 0.15]), count))
    q = np.cumsum(steps) + _log(rng, 0.5, 0.1 * count) * steps[0]
    return q * HIGHEST / q[-1]


def _width(rng: np.random.Generator) -> float:
    """Width of an instrument in steps."""
    return _log(rng, 0.4, 12)


Build = Callable[[Floats | None], Smearing]


def _local_steps(q: Floats) -> Floats:
    """Steps about each q, gaps left out."""
    steps = np.gradient(q)
    return np.minimum(steps, 2 * np.median(steps)) if np.ptp(steps) < 1e-3 * steps.max() else np.exp(_median(np.log(steps)))


def _median(values: Floats) -> Floats:
    padded = np.pad(values, 4, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 9), axis=1)


def _gaussian(rng: np.random.Generator, q: Floats) -> Build:
    """One width for all q; on uneven grids at least that of the bins."""
    sigma = float(np.hypot(_width(rng), BOX) * np.median(_local_steps(q)))
    uneven = np.ptp(np.diff(q)) > 1e-6 * q[-1]
    if uneven:
        widths = np.hypot(sigma, BOX * _local_steps(q))
        widths = np.minimum(widths, WIDEST * _local_steps(q))
        return lambda nodes: Smearing.pinhole(q, widths, q_calc=nodes)
    return lambda nodes: Smearing.gaussian(q, sigma, q_calc=nodes)


def _pinhole_widths(rng: np.random.Generator, q: Floats) -> Floats:
    """A beam, and a spread of wavelength: dq^2 = a^2 + (b q)^2."""
    steps = _local_steps(q)
    beam, spread = _width(rng) * np.median(steps), _log(rng, 0.002, 0.08)
    share = rng.choice([0.2, 1.0])
    return np.clip(np.sqrt((share * beam) ** 2 + (spread * q) ** 2), 0.3 * steps, WIDEST * steps)


def _pinhole(rng: np.random.Generator, q: Floats) -> Build:
    widths = _pinhole_widths(rng, q)
    return lambda nodes: Smearing.pinhole(q, widths, q_calc=nodes)


def _any_form(rng: np.random.Generator, q: Floats) -> Build:
    """Kernels of any form: boxes, triangles, two-sided tails, double peaks, lopsided ones."""
    widths = _pinhole_widths(rng, q)
    places, weights = _form(rng)
    points = np.abs(q[:, None] + widths[:, None] * places)

    def build(nodes: Floats | None) -> Smearing:
        if nodes is None:
            nodes = extend(q, float(max((q - points.min(axis=1)).max(), 0)), float(max(points.max() - q[-1], 0)))
        return Smearing(q, nodes, hats(points, np.broadcast_to(weights, points.shape), nodes), kind="any_form")

    return build


def _form(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Give places and weights of a distribution with mean near 0 and standard deviation 1."""
    t = np.linspace(-4, 4, 161)
    forms = (
        (np.abs(t) < 1.7) * 1.0,
        np.maximum(2.4 - np.abs(t), 0),
        np.exp(-1.4 * np.abs(t)),
        np.exp(-0.5 * ((np.abs(t) - 0.9) / 0.4) ** 2),
        np.exp(-0.5 * ((t - 0.6) / 0.5) ** 2) + rng.random() * np.exp(-0.5 * ((t + 0.8) / 0.8) ** 2),
        np.where(t > 0, np.exp(-t / rng.uniform(0.8, 1.5)), np.exp(t / 0.3)),
        np.maximum(1.9 - np.abs(t), 0) ** 0.2 * (np.abs(t) < 1.9),
    )
    weights = forms[rng.integers(len(forms))] + 1e-12
    weights = weights / weights.sum()
    mean = weights @ t
    return (t - rng.choice([0.0, 1.0]) * mean) / np.sqrt(weights @ (t - mean) ** 2), weights


def _beam(rng: np.random.Generator, size: float, count: int) -> tuple[Floats, Floats, Floats]:
    """Draw points of a beam in two dimensions: slits with penumbra, Gaussians, parasitic streaks; rms radius `size`."""
    aspect = _log(rng, 0.12, 1)
    u = rng.uniform(-1, 1, (count, 2)) if rng.random() < 0.6 else rng.normal(0, 0.6, (count, 2))
    u = u + rng.uniform(-1, 1, (count, 2)) * rng.uniform(0, 0.6)
    u[:, 1] *= aspect
    if rng.random() < 0.2:
        streak = rng.random(count) < 0.1
        u[streak, 1] += rng.normal(0, 1, int(streak.sum()))
    u -= u.mean(axis=0)
    u *= size / np.sqrt((u**2).sum(axis=1).mean())
    return u[:, 0], u[:, 1], np.full(count, 1 / count)


def _rings(rng: np.random.Generator, q: Floats) -> Build:
    """Whole rings of an area detector."""
    size = float(np.sqrt(2) * np.hypot(_width(rng), BOX) * np.median(_local_steps(q)))
    x, y, _ = _beam(rng, size, 4000)
    p, edges = np.histogram(np.hypot(x, y), bins=40)
    rho = (edges[1:] + edges[:-1]) / 2
    return lambda nodes: Smearing.rings(q, rho, p.astype(float), q_calc=nodes, azimuths=48)


def _coverage(rng: np.random.Generator, q: Floats) -> Build:
    """Masked detector or sector: each bin sees some azimuths only, and each azimuth the whole beam."""
    size = float(np.sqrt(2) * np.hypot(_width(rng), BOX) * np.median(_local_steps(q)))
    x, y, weight = _beam(rng, size, 64)
    centre, half = rng.uniform(0, np.pi), _log(rng, 0.03, np.pi)
    azimuth = centre + half * np.linspace(-1, 1, 24)
    azimuth = azimuth + np.zeros((q.size, 1))
    if rng.random() < 0.5:  # the arm of a beamstop, modules: other azimuths row by row
        azimuth += 0.3 * half * np.repeat(rng.normal(size=(q.size // 20 + 1, 1)), 20, axis=0)[: q.size]
    step = _local_steps(q)[:, None, None] * np.linspace(-0.4, 0.4, azimuth.shape[1])[:, None]
    radius = q[:, None, None] + step
    points = np.hypot(
        radius * np.cos(azimuth)[:, :, None] - x, radius * np.sin(azimuth)[:, :, None] - y
    ).reshape(q.size, -1)  # fmt: skip
    weights = np.broadcast_to(np.tile(weight, azimuth.shape[1]) / azimuth.shape[1], points.shape)

    def build(nodes: Floats | None) -> Smearing:
        if nodes is None:
            nodes = extend(q, float(max((q - points.min(axis=1)).max(), 0)), float(max((points.max(axis=1) - q).max(), 0)))
        return Smearing(q, nodes, hats(points, weights, nodes), kind="coverage")

    return build


def _slit(rng: np.random.Generator, q: Floats) -> Build:
    """Bonse-Hart and Kratky: from short against the range to far longer than it."""
    length = _log(rng, 0.01, 50) * q[-1]
    width = rng.choice([0.0, 0.5 * float(np.median(_local_steps(q)))])
    if rng.random() < 0.5:
        return lambda nodes: Smearing.slit(q, length, width, q_calc=nodes)
    l = np.linspace(0, 1, 60)
    weight = np.clip((1 - l) / rng.uniform(0.1, 1), 0, 1)
    return lambda nodes: Smearing.slit(q, length, width, profile=(l * length, weight), q_calc=nodes)


def _wavelength(rng: np.random.Generator, q: Floats) -> Build:
    """A beam, and a spread of wavelength behind it, as a product of operators."""
    sigma = float(np.hypot(_width(rng), BOX) * np.median(_local_steps(q)))
    spread = _log(rng, 0.003, 0.08)

    def build(nodes: Floats | None) -> Smearing:
        if nodes is None:
            reach = 5 * sigma + 5 * spread * q[-1]
            nodes = extend(q, reach, reach)
        return Smearing.gaussian(q, sigma, q_calc=nodes) @ Smearing.wavelength(nodes, spread, q_calc=nodes)

    return build


KINDS: dict[str, tuple[float, Callable[[np.random.Generator, Floats], Build]]] = {
    "gaussian": (0.22, _gaussian),
    "pinhole": (0.18, _pinhole),
    "any_form": (0.12, _any_form),
    "rings": (0.16, _rings),
    "coverage": (0.12, _coverage),
    "slit": (0.14, _slit),
    "wavelength": (0.06, _wavelength),
}
"""Kinds of instruments: their share, and what draws one."""

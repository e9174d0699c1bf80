"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from dsnet_bluesky.plots import BLUE, DPI, GREEN, GREY, ORANGE, Q_LABEL, VERMILION

from .measures import QUANTITIES
from .tally import EDGES, Changed, Comparison

__all__ = ["FIGURES"]

WORDS = {
    "Rg": "$R_g$",
    "I0": "$I_0$",
    "invariant": "invariant",
    "peak_position": "peak position",
    "peak_fwhm": "peak width",
    "peak_height": "peak height",
}


def chi2(found: Comparison) -> Figure:
    """Draw chi2 of B against that of A, an exposure each."""
    figure = _figure((4.6, 4.4))
    ax = figure.subplots()
    a, b = (found.column(name) for name in ("chi2_a", "chi2_b"))
    positive = np.concatenate([a, b])[np.concatenate([a, b]) > 0]
    low, high = positive.min(initial=0.63) / 1.4, positive.max(initial=1.8) * 1.4
    ax.plot([low, high], [low, high], color=GREY, lw=0.8)
    ax.plot(a, b, "o", ms=3.5, mew=0, alpha=_alpha(a.size), color=BLUE)
    ax.axhline(2, color=VERMILION, lw=0.8, ls=(0, (4, 2)))
    ax.axvline(2, color=VERMILION, lw=0.8, ls=(0, (4, 2)))
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel=rf"$\chi^2$ per point, {found.a}", ylabel=rf"$\chi^2$ per point, {found.b}")
    ax.set_title("dashed: poor fit beyond", fontsize="small", color=VERMILION, loc="right")
    _inward(ax)
    return figure


def difference(found: Comparison) -> Figure:
    """Draw the histogram of d by q, and over all q beside it."""
    figure = _figure((7.6, 3.8))
    by_q, all_q = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    edges, density = found.by_q.edges(), found.by_q.density()
    width = np.diff(EDGES)[0]
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(density.T / width), 0)
    top = float(shown.max()) if shown.count() else 1.0
    mesh = by_q.pcolormesh(edges, EDGES, shown, norm=LogNorm(1e-3 * top, top), cmap="cividis_r", rasterized=True)
    for level in (-1, 1):
        by_q.axhline(level, color="black", lw=0.8, ls=(0, (4, 2)))
    by_q.set(xscale="log", xlabel=Q_LABEL, xlim=(edges[0], edges[-1]), ylim=(EDGES[0], EDGES[-1]))
    by_q.set_ylabel(r"$d = (I_B - I_A)\,/\,\sqrt{\sigma_A^2 + \sigma_B^2}$")
    figure.colorbar(mesh, ax=by_q, label="density of points", location="left", pad=0.02)
    total = np.sum(list(found.by_q.histogram.values()), axis=0)
    all_q.stairs(total / total.sum() / width, EDGES, orientation="horizontal", color=BLUE, fill=True, alpha=0.4)
    x = np.linspace(-5, 5, 201)
    all_q.plot(np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), x, color=GREY, lw=1, ls=(0, (4, 2)))
    all_q.set(xlabel="density, all $q$", xlim=(0, None))
    all_q.text(0.97, 0.03, "dashed: independent errors", transform=all_q.transAxes, ha="right", fontsize="x-small", color=GREY)
    for ax in (by_q, all_q):
        _inward(ax)
    return figure


def coverage(found: Comparison) -> Figure:
    """Draw the share of points of one answer within the bands of the other, by q."""
    figure = _figure((6.4, 3.8))
    ax = figure.subplots()
    edges, shares = found.by_q.edges(), found.by_q.coverage()
    for side, colour, one, other in (("b_in_a", BLUE, found.b, found.a), ("a_in_b", VERMILION, found.a, found.b)):
        for band, style in (("68", "-"), ("95", (0, (4, 2)))):
            if np.isfinite(shares[f"{side}_{band}"]).any():
                words = f"{one} in the band of {other}, {band} %"
                ax.stairs(shares[f"{side}_{band}"], edges, baseline=None, color=colour, ls=style, lw=1.4, label=words)
    for level in (0.68, 0.95):
        ax.axhline(level, color=GREY, lw=0.7, zorder=0)
        ax.text(edges[0], level, f" {level:.0%}", va="bottom", fontsize="x-small", color=GREY)
    ax.set(xscale="log", xlabel=Q_LABEL, ylabel="share of points", xlim=(edges[0], edges[-1]), ylim=(0, 1.03))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", loc="lower left")
    _inward(ax)
    return figure


def changed(found: Comparison) -> Figure:
    """Draw the runs that changed most: both curves with their bands, the measured one, and d below."""
    kept = found.changed
    columns = min(3, len(kept))
    rows = -(-len(kept) // columns)
    figure = _figure((3.6 * columns + 0.3, 4.1 * rows + 0.5))
    for panel, one in zip(figure.subfigures(rows, columns, squeeze=False).ravel(), kept, strict=False):
        curves, residual = panel.subplots(2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw={"hspace": 0.03})
        _draw_curves(curves, one)
        _draw_difference(residual, one)
    handles = [
        Patch(color=GREY, label="measured"),
        Patch(color=BLUE, label=found.a),
        Patch(color=VERMILION, label=found.b),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def _draw_curves(ax: Axes, one: Changed) -> None:
    curves, q = one.curves, one.curves["q"]
    ax.plot(q, _positive(curves["I_smeared"]), ".", ms=2, color=GREY, alpha=0.6, zorder=1)
    for side, colour, style in (("a", BLUE, "-"), ("b", VERMILION, (0, (4, 1.5)))):
        I, Idev = curves[f"I_{side}"], np.nan_to_num(curves[f"Idev_{side}"])
        ax.fill_between(q, np.maximum(I - Idev, 1e-3 * np.abs(I)), I + Idev, color=colour, alpha=0.22, lw=0, zorder=2)
        ax.plot(q, _positive(I), color=colour, ls=style, lw=1.2, zorder=3)
    values = np.concatenate([curves[name] for name in ("I_a", "I_b", "I_smeared")])
    values = values[np.isfinite(values) & (values > 0)]
    limits = (0.5 * np.percentile(values, 0.5), 2 * values.max()) if values.size else (0.1, 10)
    ax.set(xscale="log", yscale="log", ylim=limits, ylabel="$I$")
    ax.set_xlim(q[q > 0][0], q[-1])
    title = f"{one.row['sample'] or 'no name'}, run {one.row['raw_uid'][:8]}"
    ax.set_title(_drawable(title), fontsize="small", parse_math=False)
    text = rf"rms $d$ = {one.row['d_rms']:.2g}" + "\n" + rf"$\chi^2$ {one.row['chi2_a']:.2g} $\to$ {one.row['chi2_b']:.2g}"
    ax.text(0.97, 0.95, text, transform=ax.transAxes, ha="right", va="top", fontsize="x-small")
    _inward(ax)


def _draw_difference(ax: Axes, one: Changed) -> None:
    q, d = one.curves["q"], one.curves["d"]
    ax.axhspan(-1, 1, color="0.93", zorder=0)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.plot(q, d, color="black", lw=0.8)
    limit = max(1.5, 1.1 * float(np.nanmax(np.abs(d), initial=0.0)))
    ax.set(ylim=(-limit, limit), ylabel="$d$", xlabel=Q_LABEL, xscale="log", xlim=(q[q > 0][0], q[-1]))
    _inward(ax)


def quantities(found: Comparison) -> Figure:
    """Draw how derived quantities changed, relative to A and in their own errors."""
    figure = _figure((7.4, 3.6))
    relative, errors = figure.subplots(1, 2, sharey=True)
    places: list[float] = []
    labels: list[str] = []
    for name in reversed(QUANTITIES):
        a, b, change = (found.column(f"{name}_{part}") for part in ("a", "b", "change"))
        both = np.isfinite(a) & np.isfinite(b)
        if not both.any():
            continue
        place = float(len(places))
        places.append(place)
        labels.append(f"{WORDS[name]}  ({both.sum()})")
        scatter = place + np.random.default_rng(0).uniform(-0.22, 0.22, int(both.sum()))
        for ax, values, colour in ((relative, 100 * (b - a)[both] / np.abs(a[both]), BLUE), (errors, change[both], GREEN)):
            ax.plot(values, scatter, "o", ms=3, mew=0, alpha=_alpha(values.size), color=colour)
            ax.plot([np.nanmedian(values)] * 2, [place - 0.33, place + 0.33], color="black", lw=1.4)
    errors.axvspan(-1, 1, color="0.93", zorder=0)
    for ax, label in ((relative, "change / %"), (errors, "change / combined error")):
        ax.axvline(0, color=GREY, lw=0.8, zorder=0)
        limit = max(float(np.nanmax(np.abs(line.get_xdata()), initial=0.0)) for line in ax.lines) if places else 1.0
        ax.set_xscale("symlog", linthresh=1.0)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(xlabel=label, xlim=(-1.3 * max(limit, 1.0), 1.3 * max(limit, 1.0)))
        _inward(ax)
    relative.set_yticks(places, labels)
    relative.set_ylim(-0.6, max(len(places), 1) - 0.4)
    if not places:
        relative.text(0.5, 0.5, "no curve has any of them", transform=relative.transAxes, ha="center", color=ORANGE)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Comparison], Figure]]] = {
    "chi2": ("How well both answers reproduce their measurement, an exposure each.", chi2),
    "differences": (
        "Differences in units of the combined error. Both answers see the same noise: where both are right, d is well below 1. "
        "What lies beyond 5 is counted at the edge.",
        difference,
    ),
    "coverage": ("How much of one answer lies within the stated band of the other.", coverage),
    "changed": ("The runs that changed most, with bands of one standard deviation; their difference d below.", changed),
    "quantities": ("Changes of derived quantities, with the number of exposures that have them; bars are medians.", quantities),
}
"""By the name of their files: what they show, and what draws them."""


def _figure(size: tuple[float, float]) -> Figure:
    return Figure(figsize=size, dpi=DPI, layout="constrained")


def _inward(ax: Axes) -> None:
    """Draw ticks inwards, with plain numbers at 1, 2, 5 along a short logarithmic axis: others run into each other."""
    ax.tick_params(which="both", direction="in", top=True, right=True)
    for axis, scale, (low, high) in ((ax.xaxis, ax.get_xscale(), ax.get_xlim()), (ax.yaxis, ax.get_yscale(), ax.get_ylim())):
        if scale == "log" and high < 300 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def _alpha(count: int) -> float:
    return float(np.clip(30 / max(count, 1), 0.08, 0.7))


def _positive(values: NDArray) -> NDArray:
    return np.where(values > 0, values, np.nan)


def _drawable(text: str) -> str:
    """Replace what the font cannot draw: matplotlib would warn."""
    font: Any = get_font(findfont(FontProperties()))
    known = font.get_charmap()
    return "".join(letter if ord(letter) in known and letter.isprintable() else "?" for letter in text)

"""Figures of results, operators and direct beams.

Every function builds matplotlib Figures of its own and leaves pyplot alone, so that
services, threads and notebooks can all call it. Colours are those of Okabe and Ito,
which everyone can tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from .data import BadInput, Flag, exposures_of
from .smearing import Smearing

__all__ = ["plot_comparison", "plot_frames", "plot_operator", "plot_psf", "plot_residuals", "plot_result", "plot_sizes"]

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "0.45"
DPI = 150
Q_LABEL = r"$q$ / nm$^{-1}$"


def plot_result(dataset: xr.Dataset, ax: Axes | None = None, *, title: str | None = None) -> Figure:
    """Plot the measured and the desmeared curve, with their residuals below.

    Several exposures are drawn in a sequence of colours, desmeared over measured.

    Parameters
    ----------
    dataset
        Result of `desmear`, dims ("q",) or ("exposure", "q").
    ax
        Axes for the curves alone; by default a new Figure with a panel of residuals.
    title
        By default the `title` of the Dataset's attributes.

    Returns
    -------
    matplotlib.figure.Figure
        The Figure drawn on.

    Raises
    ------
    BadInput
        If no exposure of the result is complete.
    """
    exposures = _complete(dataset)
    figure, curves, residuals = _result_axes(ax)
    if exposures.sizes["exposure"] == 1:
        _draw_single(curves, exposures.isel(exposure=0))
    else:
        _draw_series(figure, curves, exposures)
    _log_axes(curves, exposures)
    curves.set_title(dataset.attrs.get("title", "") if title is None else title)
    if residuals is None:
        curves.set_xlabel(Q_LABEL)
    else:
        plot_residuals(dataset, residuals)
        curves.tick_params(labelbottom=False)
    return figure


def plot_residuals(dataset: xr.Dataset, ax: Axes | None = None) -> Figure:
    """Plot the normalised residuals of the re-smeared curve against the measured one.

    Parameters
    ----------
    dataset
        Result of `desmear`.
    ax
        Axes to draw on; by default a new Figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    exposures = _complete(dataset)
    figure, ax = _axes(ax, (6.4, 2.4))
    values = ((exposures["I_smeared"] - exposures["I_resmeared"]) / exposures["Idev_smeared"]).transpose("exposure", "q").values
    ax.axhspan(-2, 2, color="0.93", zorder=0)
    ax.axhline(0, color=GREY, lw=0.8, zorder=1)
    for row, colour in zip(values, _sequence(len(values)), strict=True):
        ax.plot(exposures["q"], row, ".", ms=2.5, color=colour)
    limit = max(4.0, 1.15 * float(np.nanpercentile(np.abs(values), 99.5)))
    scale = _q_scale(exposures)
    ax.set(xscale=scale, xlim=_limits(exposures["q"].values, scale), ylim=(-limit, limit), xlabel=Q_LABEL)
    ax.set_ylabel(r"residual / $\sigma$")
    _ticks(ax)
    return figure


def plot_operator(smearing: Smearing, *, rows: int = 5) -> Figure:
    """Plot a smearing operator: the matrix as a density, and some of its rows.

    Parameters
    ----------
    smearing
        The operator.
    rows
        How many rows to draw, spread evenly over q.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = _figure((9.2, 3.9))
    left, right = figure.subplots(1, 2)
    density = smearing.matrix / np.gradient(smearing.q_calc)
    peak = float(density.max())
    norm = LogNorm(vmin=1e-5 * peak, vmax=peak)
    shown = np.maximum(density, 1e-5 * peak)
    mesh = left.pcolormesh(smearing.q_calc, smearing.q, shown, norm=norm, cmap="cividis", rasterized=True, shading="nearest")
    left.set(xlabel=r"$q_\mathrm{calc}$ / nm$^{-1}$", ylabel=Q_LABEL, title=f"smearing operator ({smearing.kind})")
    figure.colorbar(mesh, ax=left, label=r"$R(q, q_\mathrm{calc})$ / nm")
    chosen = np.linspace(0, smearing.q.size - 1, rows).astype(int)
    offsets = smearing.q_calc - smearing.q[chosen, None]
    for index, offset, colour in zip(chosen, offsets, _sequence(rows), strict=True):
        right.plot(offset, density[index], color=colour, lw=1.2, label=f"{smearing.q[index]:.3g} nm$^{{-1}}$")
    seen = offsets[density[chosen] > 1e-3 * peak]
    margin = 0.1 * float(np.ptp(seen)) or float(np.ptp(smearing.q)) / smearing.q.size
    right.set(xlim=(seen.min() - margin, seen.max() + margin), title="rows")
    right.set(xlabel=r"$(q_\mathrm{calc} - q)$ / nm$^{-1}$", ylabel=r"$R$ / nm")
    right.legend(title=r"$q$", fontsize="small", frameon=False)
    _ticks(right)
    return figure


def plot_psf(psf: xr.Dataset) -> Figure:
    """Plot a direct beam: its image, and its ring sums against the equivalent Gaussian.

    Parameters
    ----------
    psf
        Dataset of `reduction.psf`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = _figure((9.2, 3.9))
    left, right = figure.subplots(1, 2)
    beam, peak = psf["beam"].values, float(psf["beam"].max())
    x, y = psf["x"].values * 1e3, psf["y"].values * 1e3
    mesh = left.pcolormesh(x, y, np.maximum(beam, 1e-4 * peak), norm=LogNorm(1e-4 * peak, peak), cmap="cividis", rasterized=True)
    left.set(xlabel="x / mm", ylabel="y / mm", aspect="equal", title=f"direct beam, {float(psf['counts']):.3g} counts")
    figure.colorbar(mesh, ax=left, label="share of a pixel")
    rho, sigma = psf["rho"].values, float(psf["sigma"])
    density = psf["p"].values / np.gradient(rho)
    fine = np.linspace(0, rho[-1], 400)
    right.plot(rho, density, ".-", ms=3, lw=0.8, color=BLUE, label="ring sums")
    right.plot(
        fine,
        fine / sigma**2 * np.exp(-(fine**2) / (2 * sigma**2)),
        "--",
        color=VERMILION,
        lw=1.2,
        label=rf"Gaussian, $\sigma$ = {sigma:.3g} nm$^{{-1}}$",
    )
    right.set(xlabel=r"$\rho$ / nm$^{-1}$", ylabel=r"$p(\rho)$ / nm", xlim=(0, rho[-1]), title="point-spread function")
    right.set_ylim(0, 1.3 * density.max())
    right.legend(frameon=False)
    _ticks(right)
    return figure


def plot_comparison(
    curves: Mapping[str, xr.Dataset], truth: xr.Dataset | None = None, *, q_scale: str = "linear", title: str = ""
) -> Figure:
    """Plot several results side by side: all measured curves, and all desmeared ones.

    Parameters
    ----------
    curves
        Results of `desmear` by their labels, e.g. one for each setting of the slits.
    truth
        Curve (`I` on `q`) that the desmeared ones should meet.
    q_scale
        "linear" or "log".
    title
        Of the Figure.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    BadInput
        If there is nothing to compare.
    """
    if not curves:
        raise BadInput("There is no result to compare.")
    rows = {label: _complete(dataset).isel(exposure=0) for label, dataset in curves.items()}
    figure = _figure((9.6, 4.2))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, name, heading in zip(panels, ("I_smeared", "I"), ("measured", "desmeared"), strict=True):
        for (label, row), colour in zip(rows.items(), _colours(len(rows)), strict=True):
            ax.plot(row["q"], _positive(row[name].values), color=colour, lw=1.1, label=label)
        if truth is not None:
            ax.plot(truth["q"], _positive(truth["I"].values), color="black", lw=0.9, ls=(0, (4, 2)), label="truth")
        ax.set(title=heading, xlabel=Q_LABEL, xscale=q_scale, yscale="log")
        _ticks(ax)
    everything = xr.concat([exposures_of(row[["I", "I_smeared"]].drop_vars("q")) for row in _same_length(rows)], "exposure")
    first = next(iter(rows.values()))
    panels[0].set(xlim=_limits(first["q"].values, q_scale), ylim=_intensity_limits(everything), ylabel=_label(first["I"]))
    panels[1].legend(fontsize="small", frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _same_length(rows: Mapping[str, xr.Dataset]) -> list[xr.Dataset]:
    shortest = min(row.sizes["q"] for row in rows.values())
    return [row.isel(q=slice(shortest)) for row in rows.values()]


def plot_sizes(dataset: xr.Dataset, ax: Axes | None = None, *, truth: NDArray | None = None, title: str = "") -> Figure:
    """Plot the radius of each icosahedron with its error, those that are flagged in another colour.

    Parameters
    ----------
    dataset
        Result of the model ``icosahedra``, dims ("exposure",).
    ax
        Axes to draw on; by default a new Figure.
    truth
        True radii in nm, shape (exposure,), where they are known: then radii are drawn over them, in place of the number of
        the exposure; NaN where there is none.
    title
        Of the axes.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, ax = _axes(ax, (6.4, 4.2))
    radius, error, flags = (dataset[name].values for name in ("radius", "radius_dev", "flags"))
    place = np.arange(1, radius.size + 1) if truth is None else np.where(np.isfinite(truth), truth, radius)
    kinds = {
        "not flagged": (flags == 0, BLUE, "o"),
        "unlike any icosahedron": ((flags & int(Flag.POOR_FIT)) > 0, VERMILION, "X"),
        "out of range": (flags == int(Flag.OUT_OF_RANGE), ORANGE, "s"),
    }
    for label, (rows, colour, marker) in kinds.items():
        if (rows & np.isfinite(radius)).any():
            ax.errorbar(place[rows], radius[rows], error[rows], fmt=marker, ms=6, color=colour, capsize=3, lw=1.2, label=label)
    if truth is not None:
        ends = np.array([place.min(), place.max()])
        ax.plot(ends, ends, color=GREY, lw=0.8, zorder=1)
    ax.set(xlabel="exposure" if truth is None else "true radius / nm", ylabel="radius / nm", title=title)
    ax.tick_params(which="both", direction="in", top=True, right=True)
    ax.legend(frameon=False)
    return figure


def plot_frames(dataset: xr.Dataset, *, most: int = 6, title: str = "") -> Figure:
    """Plot denoised frames on a logarithmic scale.

    Parameters
    ----------
    dataset
        Result of the model ``symmetry-denoiser``, dims ("exposure", ...).
    most
        Frames that are drawn, of exposures at equal distances.
    title
        Of the figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    exposures = _complete(dataset)
    count = min(most, exposures.sizes["exposure"])
    chosen = np.linspace(0, exposures.sizes["exposure"] - 1, count).round().astype(int)
    figure = Figure(figsize=(2.4 * count + 0.6, 2.9), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    frames = exposures["denoised"].values[chosen]
    scale = LogNorm(max(np.nanquantile(frames, 0.01), 1e-3), np.nanmax(frames))
    images = [ax.imshow(frame, origin="lower", norm=scale, cmap="magma") for ax, frame in zip(grid, frames, strict=True)]
    for ax, number in zip(grid, chosen, strict=True):
        ax.set(xticks=[], yticks=[], title=f"exposure {number + 1}")
    figure.colorbar(images[0], ax=grid.tolist(), label="expected counts")
    figure.suptitle(title)
    return figure


def _complete(dataset: xr.Dataset) -> xr.Dataset:
    """Return the exposures that hold numbers."""
    exposures = exposures_of(dataset)
    for name in ("I", "I_smeared", "I_resmeared", "Idev_smeared"):
        if name not in exposures:
            raise BadInput(f"The Dataset has no {name}: it is not the result of desmear().")
    good = np.isfinite(exposures["I"].transpose("exposure", "q").values).any(axis=1)
    if not good.any():
        raise BadInput("No exposure of this result is complete: there is nothing to plot.")
    return exposures.isel(exposure=np.flatnonzero(good))


def _figure(size: tuple[float, float]) -> Figure:
    return Figure(figsize=size, dpi=DPI, layout="constrained")


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure = _figure(size)
        return figure, figure.subplots()
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure, ax


def _result_axes(ax: Axes | None) -> tuple[Figure, Axes, Axes | None]:
    if ax is not None:
        return (*_axes(ax, (0, 0)), None)
    figure = _figure((6.4, 5.6))
    curves, residuals = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    return figure, curves, residuals


def _draw_single(ax: Axes, row: xr.Dataset) -> None:
    q, I, Idev = row["q"].values, row["I"].values, row["Idev"].values
    measured, error = row["I_smeared"].values, row["Idev_smeared"].values
    points = ax.errorbar(q, measured, error, fmt=".", ms=3, lw=0.6, color=GREY, zorder=1)
    ax.fill_between(q, np.maximum(I - Idev, 1e-3 * np.abs(I)), I + Idev, color=BLUE, alpha=0.25, lw=0, zorder=2)
    (again,) = ax.plot(q, _positive(row["I_resmeared"].values), color=VERMILION, lw=1.0, zorder=3)
    (answer,) = ax.plot(q, _positive(I), color=BLUE, lw=1.3, zorder=4)
    ax.set_ylabel(_label(row["I"]))
    text = f"$\\chi^2$ = {float(row['chi2']):.2f}" if "chi2" in row else None
    labels = ["measured", r"desmeared $\pm$ 1 $\sigma$", "desmeared, smeared again"]
    ax.legend([points, answer, again], labels, title=text, frameon=False)


def _draw_series(figure: Figure, ax: Axes, exposures: xr.Dataset) -> None:
    count = exposures.sizes["exposure"]
    for index, colour in enumerate(_sequence(count)):
        row = exposures.isel(exposure=index)
        ax.plot(row["q"], _positive(row["I_smeared"].values), ".", ms=2, alpha=0.35, color=colour)
        ax.plot(row["q"], _positive(row["I"].values), lw=1.0, color=colour, label=f"exposure {index + 1}")
    ax.set_ylabel(_label(exposures["I"]))
    if count <= 6:
        ax.legend(title="line: desmeared, dots: measured", fontsize="small", title_fontsize="small", frameon=False)
    else:
        scale = ScalarMappable(Normalize(1, count), _colourmap())
        figure.colorbar(scale, ax=ax, label="exposure (line: desmeared, dots: measured)")


def _log_axes(ax: Axes, exposures: xr.Dataset) -> None:
    scale = _q_scale(exposures)
    ax.set(xscale=scale, yscale="log", xlim=_limits(exposures["q"].values, scale), ylim=_intensity_limits(exposures))
    _ticks(ax)


def _q_scale(dataset: xr.Dataset) -> str:
    return "log" if float(dataset["q"][0]) > 0 else "linear"


def _limits(q: NDArray, scale: str) -> tuple[float, float]:
    if scale == "log":
        margin = (q[-1] / q[0]) ** 0.02
        return float(q[0] / margin), float(q[-1] * margin)
    margin = 0.02 * (q[-1] - q[0])
    return float(q[0] - margin), float(q[-1] + margin)


def _intensity_limits(dataset: xr.Dataset) -> tuple[float, float]:
    """Return limits that show all but the lowest percent: a minimum may go down to nothing."""
    values = np.concatenate([dataset[name].values.ravel() for name in ("I", "I_smeared")])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        raise BadInput("No intensity of this result is positive: there is nothing to plot on a logarithmic axis.")
    return float(0.5 * np.percentile(values, 0.5)), float(2 * values.max())


def _positive(values: NDArray) -> NDArray:
    return np.where(values > 0, values, np.nan)


def _label(variable: xr.DataArray) -> str:
    units = str(variable.attrs.get("units", "1"))
    if units in ("", "1"):
        return "$I$ / arb. units"
    return "$I$ / " + re.sub(r"^1\s*/\s*(\w+)$", r"\1$^{-1}$", units)


def _colourmap() -> ListedColormap:
    """Return viridis without its pale end, which a white page swallows."""
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _sequence(count: int) -> list[Any]:
    """Colours for an ordered set; blue for one alone."""
    return [BLUE] if count == 1 else [_colourmap()(i / (count - 1)) for i in range(count)]


def _colours(count: int) -> list[Any]:
    """Colours for a set without order."""
    return [*CYCLE][:count] if count <= len(CYCLE) else _sequence(count)


def _ticks(ax: Axes) -> None:
    ax.tick_params(which="both", direction="in", top=True, right=True)
    if ax.get_xscale() == "log":
        low, high = ax.get_xlim()
        # Plain numbers at 1, 2, 5: matplotlib's own labels run into each other over a decade or two.
        short = low > 0 and high < 300 * low
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        if short:
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

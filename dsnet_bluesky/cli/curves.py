"""One curve from a file: ``dsnet-bluesky desmear``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import METHOD_HELP, Options, app, finite, parse_options, say

if TYPE_CHECKING:
    import xarray as xr

    from dsnet_bluesky.smearing import Smearing

__all__ = ["FLAG_WORDS", "desmear"]

FLAG_WORDS = {
    "NOT_CONVERGED": "the iteration stopped at its limit",
    "POOR_FIT": "the desmeared curve, smeared again, misses the measurement (chi2 above 2)",
    "NOISE_ESTIMATED": "dI was not in the file and was estimated from the scatter",
    "EXTRAPOLATED": "the smearing reaches beyond the measured range: mind the ends of the curve",
    "OUT_OF_RANGE": "the model was not trained for such a curve or resolution",
    "SUBSTITUTED": "the model's answer missed the measurement; a classical method's is given",
    "ASYMMETRIC": "the frame breaks the symmetry that the model rests on",
    "BIASED": "rings of the model's frame miss the measured ones",
    "FEW_COUNTS": "the frame holds too few counts",
}
"""What each `data.Flag` means to a user."""

OVERFIT = 0.1
"""Below this chi2 the given errors are too large by a factor of three or more."""


@app.command()
def desmear(
    curve: Annotated[Path, typer.Argument(help="canSAS XML, NXcanSAS, or text: Q, I and perhaps dI and dQ.", show_default=False)],
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP)] = "dsnet",
    option: Options = None,
    slit_length: Annotated[
        float | None, typer.Option(help="HALF the slit length in 1/nm.", show_default=False, callback=finite)
    ] = None,
    slit_width: Annotated[
        float | None, typer.Option(help="HALF the slit width in 1/nm.", show_default=False, callback=finite)
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Standard deviation of a Gaussian in 1/nm, for all q.", show_default=False, callback=finite),
    ] = None,
    beam_profile: Annotated[
        Path | None, typer.Option(help="File of a measured slit-length profile: l in 1/nm, weight.", show_default=False)
    ] = None,
    q_units: Annotated[
        str | None, typer.Option(help="1/nm or 1/angstrom; overrides the file. [dim]Text without a word: 1/angstrom[/]")
    ] = None,
    entry: Annotated[str | None, typer.Option(help="Which curve of the file: name or number.", show_default=False)] = None,
    sort: Annotated[bool, typer.Option("--sort", help="Sort the points and average those of one q.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write (.h5, .xml, .txt ...). [dim]Default: CURVE_desmeared.h5 here[/]", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to write (PNG, PDF, SVG ...).", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Desmear one curve from a file; no server is needed."""
    from dsnet_bluesky import export
    from dsnet_bluesky.curvefiles import read_curve, smearing_for
    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.desmearing import desmear as desmear_curve
    from dsnet_bluesky.desmearing import solver_of

    target = output or Path(f"{curve.stem}_desmeared.h5")
    read = [curve, *([] if beam_profile is None else [beam_profile])]
    export.check_target(target, overwrite=overwrite, sources=read)
    if plot is not None:
        _check_figure(plot, target, overwrite, read)
    options = parse_options(option)
    form = export.format_of(target, None)
    measured = read_curve(curve, units=q_units, entry=entry, sort=sort)
    if not export.FORMATS[form].many and measured.sizes.get("exposure", 1) > 1:
        raise BadInput(f"{target.name} can hold one exposure, and {curve} has several; end its name in .h5 or .xml.")
    smearing = smearing_for(measured, slit_length=slit_length, slit_width=slit_width, sigma=sigma, beam_profile=beam_profile)
    solver_of(method.partition(":")[0], options)  # before an option takes the name of a parameter of the next function
    result = desmear_curve(measured, smearing, method, **options)
    process = {"source": measured.attrs["file"], "source_entry": measured.attrs["entry"]}
    contents = export.of_curves(result, process=process, smearing=smearing)
    written = [export.write([contents], target, form, overwrite=overwrite)]
    if plot is not None:
        from dsnet_bluesky.plots import plot_result

        plot_result(result).savefig(plot)
        written.append(plot)
    _report(measured, smearing, result, written)


def _check_figure(path: Path, curves: Path, overwrite: bool, read: list[Path]) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.export import check_target

    if path.resolve() == curves.resolve():
        raise BadInput(f"--plot and --output are one file, {path}; give them two names.")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds:
        raise BadInput(f"{path.name} is no kind of figure that can be written; end its name in one of {', '.join(kinds)}.")
    check_target(path, overwrite=overwrite, sources=read)


def _report(measured: xr.Dataset, smearing: Smearing, result: xr.Dataset, written: list[Path]) -> None:
    """Say what was done, and everything that was assumed on the way."""
    q = measured["q"].values
    origin = {"option": "as told", "file": "says the file", "assumed": "assumed: set it with --q-units"}
    units = f"{measured.attrs['q_units']}, {origin[measured.attrs['q_units_from']]}"
    chi2 = [float(value) for value in result["chi2"].values.ravel()]
    lines = [
        ("curve", measured.attrs["title"] or measured.attrs["file"]),
        ("q", f"{q.size} points, {q[0]:.4g} to {q[-1]:.4g} 1/nm (unit of the file: {units})"),
        ("smearing", _smearing_words(smearing)),
        ("method", _method_words(result)),
        ("chi2", ", ".join(f"{value:.3g}" if math.isfinite(value) else "failed" for value in chi2)),
        *(("note", note) for note in _notes(measured, result, chi2)),
        *(("written", path) for path in written),
    ]
    for label, text in lines:
        say(f"{label:<9} {text}", style="yellow" if label == "note" else None)


def _smearing_words(smearing: Smearing) -> str:
    names = {"length": "half-length", "width": "half-width", "profile_reach": "reach of the profile", "dq_mean": "mean dQ"}
    given = ", ".join(f"{names.get(k, k)} {v:.4g} 1/nm" for k, v in smearing.parameters.items() if isinstance(v, float))
    return f"{smearing.kind}: {given}; standard deviation {smearing.widths.min():.3g} to {smearing.widths.max():.3g} 1/nm"


def _method_words(result: xr.Dataset) -> str:
    options = [f"{name} = {value}" for name, value in json.loads(result.attrs["options"]).items() if name != "model"]
    words = ", ".join(([result.attrs["model"]] if "model" in result.attrs else []) + options)
    return f"{result.attrs['method']} ({words})" if words else str(result.attrs["method"])


def _notes(measured: xr.Dataset, result: xr.Dataset, chi2: list[float]) -> list[str]:
    from dsnet_bluesky.data import Flag

    notes = []
    if dropped := measured.attrs["dropped_points"]:
        notes.append(f"{dropped} points without a finite value and a positive dI were left out")
    raised = 0
    for value in result["flags"].values.ravel():
        raised |= int(value)
    notes += [FLAG_WORDS[str(flag.name)] for flag in Flag if raised & flag]
    failures = json.loads(result.attrs.get("failures", "[]"))
    notes += [f"exposure {failure['exposure'] + 1} failed: {failure['reason']}" for failure in failures]
    if max(filter(math.isfinite, chi2), default=math.inf) < OVERFIT:
        notes.append("chi2 is far below 1: dI is probably too large, and the error bars of the result with it")
    return notes

"""The command line: ``dsnet-bluesky desmear|serve|demo|ingest|train|register|models|spool``.

Everything heavy is imported inside the commands, so that help and completion
answer at once. Input that cannot be used ends in one red line and status 2;
any other error is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    import xarray as xr

    from .smearing import Smearing

__all__ = ["app"]

FLAG_WORDS = {
    "NOT_CONVERGED": "the iteration stopped at its limit",
    "POOR_FIT": "the desmeared curve, smeared again, misses the measurement (chi2 above 2)",
    "NOISE_ESTIMATED": "dI was not in the file and was estimated from the scatter",
    "EXTRAPOLATED": "the smearing reaches beyond the measured range: mind the ends of the curve",
    "OUT_OF_RANGE": "the model was not trained for such a curve or resolution",
    "SUBSTITUTED": "the model's answer missed the measurement; a classical method's is given",
}
"""What each `data.Flag` means to a user."""

METHOD_HELP = "dsnet, map, ift, lake, wiener, cme or dsnet-paper; a version may follow: dsnet:2.0.0."

OVERFIT = 0.1
"""Below this chi2 the given errors are too large by a factor of three or more."""


class Commands(TyperGroup):
    """Commands that answer unusable input with one line on stderr and status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            from .data import BadInput

            if not isinstance(error, BadInput):
                raise
            _say(f"Error: {' '.join(str(error).split())}", style="bold red", stderr=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """Take numbers that are numbers: nan and inf parse as floats too."""
    if value is not None and not math.isfinite(value):
        from .data import BadInput

        raise BadInput(f"{param.opts[0]} is {value}; give a finite number.")
    return value


Uri = Annotated[str, typer.Option(envvar="TILED_URI", help="Address of the Tiled server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="TILED_API_KEY", help="Its API key.", show_default=False)]
LOCAL = "http://127.0.0.1:8000"


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Desmearing of small-angle scattering, from exposures in Bluesky to results in Tiled."""
    if version:
        from . import __version__

        _say(__version__)
        raise typer.Exit


@app.command()
def desmear(
    curve: Annotated[Path, typer.Argument(help="canSAS XML, NXcanSAS, or text: Q, I and perhaps dI and dQ.", show_default=False)],
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP)] = "dsnet",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the method; repeatable.")
    ] = None,
    slit_length: Annotated[
        float | None, typer.Option(help="HALF the slit length in 1/nm.", show_default=False, callback=_finite)
    ] = None,
    slit_width: Annotated[
        float | None, typer.Option(help="HALF the slit width in 1/nm.", show_default=False, callback=_finite)
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(help="Standard deviation of a Gaussian in 1/nm, for all q.", show_default=False, callback=_finite),
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
        Path | None, typer.Option(help="NXcanSAS file to write. [dim]Default: CURVE_desmeared.h5 here[/]", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to write (PNG, PDF, SVG ...).", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Desmear one curve from a file; no server is needed."""
    from . import export
    from .curvefiles import read_curve, smearing_for
    from .desmearing import desmear as desmear_curve

    target = output or Path(f"{curve.stem}_desmeared.h5")
    export.check_target(target, overwrite=overwrite)
    if plot is not None:
        _check_figure(plot, target, overwrite)
    options = dict(_parse_option(text) for text in option or [])
    measured = read_curve(curve, units=q_units, entry=entry, sort=sort)
    smearing = smearing_for(measured, slit_length=slit_length, slit_width=slit_width, sigma=sigma, beam_profile=beam_profile)
    result = desmear_curve(measured, smearing, method, **options)
    process = {"source": measured.attrs["file"], "source_entry": measured.attrs["entry"]}
    written = [export.to_nxcansas(result, target, process=process, smearing=smearing, overwrite=overwrite)]
    if plot is not None:
        from .plots import plot_result

        plot_result(result).savefig(plot)
        written.append(plot)
    _report(measured, smearing, result, written)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Tiled configuration; the embedded one if not given.", show_default=False)
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the embedded server keeps its data.")] = Path("dsnet-data"),
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TILED_SINGLE_USER_API_KEY", help="Drawn and printed if not given.", show_default=False)
    ] = None,
    readable: Annotated[
        list[Path] | None, typer.Option(help="Directory with detector files that may be read; repeatable.")
    ] = None,
) -> None:
    """Run a Tiled server with this project's trees, until Ctrl-C."""
    from . import server

    # What ends the command ends the server too: SIGTERM as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(server.serve(config, data_directory=directory, port=port, api_key=api_key, readable=readable or ()))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up at the end.")] = False,
    directory: Annotated[Path, typer.Option(help="Where data and figures go.")] = Path("dsnet-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Only two of the slits, and two exposures of the spheres.")] = False,
    port: Annotated[int, typer.Option(help="Of the server; 0 takes a free one.")] = 0,
) -> None:
    """Repeat the paper's experiment live on a simulated beamline."""
    from . import demo as demonstration

    demonstration.run(directory, keep=keep, quick=quick, port=port)


@app.command()
def ingest(
    files: Annotated[list[Path], typer.Argument(help="Detector files: EDF, CBF, TIFF, NeXus, HDF5.", show_default=False)],
    purpose: Annotated[str, typer.Option(help="direct_beam, sample, blank or dark.", show_default=False)],
    poni: Annotated[Path, typer.Option(help="Geometry, as pyFAI writes it.", show_default=False)],
    mask: Annotated[Path | None, typer.Option(help="Mask: non-zero pixels do not count.", show_default=False)] = None,
    sample: Annotated[str | None, typer.Option(help="Name of the sample.", show_default=False)] = None,
    direct_beam: Annotated[
        str | None, typer.Option(metavar="UID", help="Run of the direct beam that belongs to it.", show_default=False)
    ] = None,
    exposure_time: Annotated[float, typer.Option(help="In s.", callback=_finite)] = 1.0,
    monitor: Annotated[float, typer.Option(help="Monitor counts to divide by.", callback=_finite)] = 1.0,
    transmission: Annotated[float, typer.Option(help="Of the sample, to divide by.", callback=_finite)] = 1.0,
    dataset: Annotated[str | None, typer.Option(help="Path of the images inside HDF5 files.", show_default=False)] = None,
    desmear: Annotated[bool, typer.Option("--desmear/--no-desmear", help="Desmear samples and store the results.")] = True,
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP)] = "dsnet",
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Register detector files as Bluesky runs in the catalog, without copying them, and desmear samples.

    Prints the runs' uids; what became of the results goes to stderr. Blank and dark
    runs are recorded, but nothing subtracts them yet.
    """
    from .ingest import ingest as ingest_files

    client = _client(uri, api_key)
    uids = ingest_files(
        files,
        client=client,
        purpose=purpose,
        poni=poni,
        mask=mask,
        sample=sample,
        direct_beam=direct_beam,
        dataset=dataset,
        exposure_time=exposure_time,
        monitor=monitor,
        transmission=transmission,
    )
    for uid in uids:
        _say(uid)
    if desmear and purpose == "sample":
        _desmear_runs(client, uids, method)


@app.command()
def register(uri: Uri = LOCAL, api_key: ApiKey = None) -> None:
    """Give every run of the catalog its curves and direct-beam nodes, where they are missing."""
    from .derived import register_all

    for name, count in register_all(_client(uri, api_key)).items():
        _say(f"{name}: {count}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A released model's name (dsnet, dsnet-paper) or a recipe file.")] = "dsnet-paper",
    output: Annotated[Path | None, typer.Option(help="Folder of the new model. [dim]Default: its name here[/]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Train a network by its recipe; an interrupted training goes on where it stopped."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import training
    from .network import check_device

    check_device(device)
    parsed = training.load_recipe(recipe)
    target = output or Path(f"{parsed.name}-{parsed.version}")
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(parsed.name, total=None, word="")
        training.train(
            parsed,
            target,
            device=device,
            notify=lambda done, total, word: progress.update(task, completed=done, total=total, word=word),
        )
    _say(f"Written: {target}")


@app.command()
def models() -> None:
    """List the released models and check their weights."""
    from .data import BadInput
    from .versions import load_model, released_models

    references = released_models()
    damaged = 0
    for reference in references:
        try:
            model = load_model(reference)
            _say(f"{reference}  intact  sha256 {model.sha256[:12]}  {model.path}")
        except BadInput as error:
            damaged += 1
            _say(f"{reference}  damaged: {error}", style="bold red")
    if not references:
        _say("No model is released with this installation.")
    if damaged:
        raise typer.Exit(2)


spool = typer.Typer(help="What `SpooledWriter` has spooled: look at it, deliver it.", no_args_is_help=True)
app.add_typer(spool, name="spool")
SpoolDirectory = Annotated[Path, typer.Argument(help="Directory of the spool.", exists=True, file_okay=False)]


@spool.command()
def status(
    directory: SpoolDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the runs that wait, what went wrong last, and alarms; status 1 if there is an alarm or a refused run."""
    from .spool import read_status

    found = read_status(directory)
    if as_json:
        _say(json.dumps(found.to_dict()))
    else:
        Console().print(found.to_table())
    if found.alarm or len(found.waiting) < len(found.runs):
        raise typer.Exit(1)


@spool.command()
def flush(
    directory: SpoolDirectory,
    refused: Annotated[bool, typer.Option("--refused", help="Try the runs again that the catalog refused.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Deliver open runs too; stay until nobody writes here.")] = False,
    keep: Annotated[float, typer.Option(help="Days for which delivered runs are kept.", callback=_finite)] = 0.0,
    uri: Annotated[str | None, typer.Option(help="Other address than the spool's own.", show_default=False)] = None,
) -> None:
    """Deliver what waits to the catalog; the key is taken from TILED_API_KEY. Status 1 if not all of it was delivered."""
    from .spool import Deliverer, read_status

    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    if follow:
        os.nice(10)  # the RunEngine comes first
    deliverer = Deliverer(directory, uri=uri, keep=keep)
    if refused:
        deliverer.retry_refused()
    delivered = deliverer.run(follow=follow, timeout=timeout)
    found = read_status(directory)
    if not delivered or len(found.waiting) < len(found.runs):
        raise typer.Exit(1)


def _say(text: str, *, style: str | None = None, stderr: bool = False) -> None:
    """Print as it stands: no line is broken, no bracket taken for markup."""
    Console(stderr=stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _parse_option(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is JSON where it is one, else a string."""
    from .data import BadInput

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise BadInput(f"--option {text}: write it as NAME=VALUE, e.g. --option iterations=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _desmear_runs(client: Any, uids: list[str], method: str) -> None:
    """Desmear runs of the catalog and say what became of each; status 1 if one failed."""
    from tiled.queries import Key

    from .callbacks.desmear import desmear_runs
    from .pipeline import Config

    config = Config(method=method)
    desmear_runs(client, uids, config=config)
    failed = False
    for uid in uids:
        found = client["desmeared"].search(Key("raw_uid") == uid).search(Key("method") == config.method_name)
        for result in found.values():
            metadata = result.metadata
            failed |= metadata["status"] != "complete" or bool(metadata["failures"])
            reasons = [metadata["reason"], *(f"exposure {f}" for f in metadata["failures"])]
            why = "; ".join(str(reason) for reason in reasons if reason)
            _say(f"{uid[:8]} {metadata['status']}: /desmeared/{result.item['id']}{f' ({why})' if why else ''}", stderr=True)
    if failed:
        raise typer.Exit(1)


def _check_figure(path: Path, curves: Path, overwrite: bool) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    from .data import BadInput
    from .export import check_target

    if path.resolve() == curves.resolve():
        raise BadInput(f"--plot and --output are one file, {path}; give them two names.")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in kinds:
        raise BadInput(f"{path.name} is no kind of figure that can be written; end its name in one of {', '.join(kinds)}.")
    check_target(path, overwrite=overwrite)


def _client(uri: str, api_key: str | None) -> Any:
    import httpx
    from tiled.client import from_uri

    from .data import BadInput

    try:
        return from_uri(uri, api_key=api_key)
    except httpx.TransportError as error:
        raise BadInput(
            f"No Tiled server answers at {uri} ({error}); start one with `dsnet-bluesky serve`, or give --uri."
        ) from error
    except httpx.HTTPStatusError as error:
        raise BadInput(f"The Tiled server at {uri} refuses ({error.response.status_code}); check --api-key.") from error


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
        ("chi2", ", ".join(f"{value:.3g}" for value in chi2)),
        *(("note", note) for note in _notes(measured, result, chi2)),
        *(("written", path) for path in written),
    ]
    for label, text in lines:
        _say(f"{label:<9} {text}", style="yellow" if label == "note" else None)


def _smearing_words(smearing: Smearing) -> str:
    names = {"length": "half-length", "width": "half-width", "dq_mean": "mean dQ"}
    given = ", ".join(f"{names.get(k, k)} {v:.4g} 1/nm" for k, v in smearing.parameters.items() if isinstance(v, float))
    return f"{smearing.kind}: {given}; standard deviation {smearing.widths.min():.3g} to {smearing.widths.max():.3g} 1/nm"


def _method_words(result: xr.Dataset) -> str:
    options = [f"{name} = {value}" for name, value in json.loads(result.attrs["options"]).items() if name != "model"]
    words = ", ".join(([result.attrs["model"]] if "model" in result.attrs else []) + options)
    return f"{result.attrs['method']} ({words})" if words else str(result.attrs["method"])


def _notes(measured: xr.Dataset, result: xr.Dataset, chi2: list[float]) -> list[str]:
    from .data import Flag

    notes = []
    if dropped := measured.attrs["dropped_points"]:
        notes.append(f"{dropped} points without a finite value and a positive dI were left out")
    raised = 0
    for value in result["flags"].values.ravel():
        raised |= int(value)
    notes += [FLAG_WORDS[str(flag.name)] for flag in Flag if raised & flag]
    if max(chi2) < OVERFIT:
        notes.append("chi2 is far below 1: dI is probably too large, and the error bars of the result with it")
    return notes

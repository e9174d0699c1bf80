"""Runs of the catalog: ``dsnet-bluesky ingest|register|pair``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import LOCAL, METHOD_HELP, ApiKey, Uri, app, checked_config, connect, finite, say

if TYPE_CHECKING:
    from dsnet_bluesky.pipeline import Config

__all__ = ["ingest", "pair", "register"]


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
    exposure_time: Annotated[float, typer.Option(help="In s.", callback=finite)] = 1.0,
    monitor: Annotated[float, typer.Option(help="Monitor counts to divide by.", callback=finite)] = 1.0,
    transmission: Annotated[float, typer.Option(help="Of the sample, to divide by.", callback=finite)] = 1.0,
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
    from dsnet_bluesky.ingest import ingest as ingest_files

    # Before anything is registered: a model that is not there is no half of the work.
    config = checked_config(method) if desmear and purpose == "sample" else None
    client = connect(uri, api_key)
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
        say(uid)
    if config is not None:
        _desmear_runs(client, uids, config)


@app.command()
def register(uri: Uri = LOCAL, api_key: ApiKey = None) -> None:
    """Give every run of the catalog its curves and direct-beam nodes, where they are missing."""
    from dsnet_bluesky.derived import register_all

    for name, count in register_all(connect(uri, api_key)).items():
        say(f"{name}: {count}")


@app.command()
def pair(
    run: Annotated[list[str], typer.Argument(metavar="UID...", help="Sample runs.", show_default=False)],
    direct_beam: Annotated[str, typer.Option(metavar="UID", help="Run of the direct beam to use.", show_default=False)],
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP)] = "dsnet",
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Desmear runs again with another direct beam. That makes new results; those that are there stay."""
    _desmear_runs(connect(uri, api_key), run, checked_config(method), direct_beam=direct_beam)


def _desmear_runs(client: Any, uids: list[str], config: Config, *, direct_beam: str | None = None) -> None:
    """Desmear runs of the catalog and say what became of each; status 1 if one failed."""
    from tiled.queries import Key

    from dsnet_bluesky.callbacks.desmear import desmear_runs
    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.derived import lookup

    model = config.load_model()
    for uid in uids:
        if lookup(client["raw"], uid) is None:
            raise BadInput(f"The catalog holds no run {uid}; give its whole uid.")
    desmear_runs(client, uids, config=config, direct_beam=direct_beam)
    failed = False
    for uid in uids:
        found = client[config.kind.mount].search(Key("raw_uid") == uid).search(Key("method") == config.method_name)
        if model is not None:
            found = found.search(Key("model_sha256") == model.sha256)
        if direct_beam is not None:
            found = found.search(Key("direct_beam_uid") == direct_beam)
        for result in found.values():
            metadata = result.metadata
            failed |= metadata["status"] != "complete" or bool(metadata["failures"])
            reasons = [metadata["reason"], *(f"exposure {f}" for f in metadata["failures"])]
            why = "; ".join(str(reason) for reason in reasons if reason)
            place = f"/{config.kind.mount}/{result.item['id']}"
            say(f"{uid[:8]} {metadata['status']}: {place}{f' ({why})' if why else ''}", stderr=True)
    if failed:
        raise typer.Exit(1)

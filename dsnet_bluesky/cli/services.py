"""What runs for long: ``dsnet-bluesky serve|demo|watch``, and the look at it, ``status``."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import (
    FRAMES_HELP,
    LOCAL,
    METHOD_HELP,
    ApiKey,
    Options,
    Uri,
    app,
    checked_config,
    connect,
    finite,
    parse_options,
    say,
)

__all__ = ["demo", "serve", "show_status", "watch"]


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Tiled configuration; the embedded one if not given.", show_default=False)
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where the embedded server keeps its data.")] = Path("dsnet-data"),
    port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TILED_SINGLE_USER_API_KEY", help="Drawn and printed if not given.", show_default=False)
    ] = None,
    readable: Annotated[
        list[Path] | None, typer.Option(help="Directory with detector files that may be read; repeatable.")
    ] = None,
) -> None:
    """Run a Tiled server with this project's trees, until Ctrl-C."""
    from dsnet_bluesky import server

    # What ends the command ends the server too: SIGTERM as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(server.serve(config, data_directory=directory, port=port, api_key=api_key, readable=readable or ()))


@app.command()
def demo(
    experiment: Annotated[str, typer.Option("--experiment", "-e", help="desmearing, icosahedra or anisotropic.")] = "desmearing",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up at the end.")] = False,
    directory: Annotated[Path, typer.Option(help="Where data and figures go.")] = Path("dsnet-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller experiment: fewer settings and exposures.")] = False,
    port: Annotated[int, typer.Option(help="Of the server; 0 takes a free one.", min=0, max=65535)] = 0,
) -> None:
    """Run an experiment live on a simulated instrument, by default that of the DSNet paper."""
    from dsnet_bluesky import demo as demonstration

    demonstration.run(experiment, directory, keep=keep, quick=quick, port=port)


@app.command()
def watch(
    method: Annotated[str, typer.Option("--method", "-m", help=f"{METHOD_HELP} {FRAMES_HELP}")] = "dsnet",
    option: Options = None,
    device: Annotated[str, typer.Option(help="Of the network: cpu, cuda ...")] = "cpu",
    since: Annotated[float, typer.Option(help="Leave runs alone that began more days ago.", callback=finite)] = 7.0,
    max_beam_age: Annotated[
        float, typer.Option(help="Hours after which a direct beam is not used for a sample that names none.", callback=finite)
    ] = 24.0,
    interval: Annotated[float, typer.Option(help="Seconds between two scans of the catalog.", callback=finite)] = 10.0,
    documents: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Also take documents from a 0MQ proxy of bluesky.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Serve /metrics and /healthz on this port of 127.0.0.1.", min=0, max=65535, show_default=False),
    ] = None,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Desmear what comes into the catalog, or let a model read its frames, until SIGTERM or Ctrl-C.

    Runs are done exposure by exposure while they go on. What was missed, for whatever reason, is found by scans of
    the catalog. Several watchers may share one catalog.
    """
    # Of Tiled's client, before it is imported: the watcher has its own patience, and must hear of SIGTERM in between.
    os.environ.setdefault("TILED_RETRY_ATTEMPTS", "1")
    from dsnet_bluesky.watch import Watcher, follow_documents, serve_metrics

    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("dsnet_bluesky").setLevel("INFO")
    config = checked_config(method, option, device)
    client = connect(uri, api_key)
    watcher = Watcher(client, config=config, max_age=86_400 * since, max_beam_age=3600 * max_beam_age, scan_interval=interval)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: watcher.stop())
    if port is not None:
        serve_metrics(watcher, port)
    with follow_documents(documents, client, config=config, max_beam_age=3600 * max_beam_age):
        say(f"Watching {uri}; SIGTERM or Ctrl-C ends it.", stderr=True)
        watcher.run()


@app.command("status")
def show_status(
    watcher: Annotated[
        list[str] | None, typer.Option(help="Address of a watcher's port, such as http://127.0.0.1:9108; repeatable.")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help=f"{METHOD_HELP} {FRAMES_HELP}")] = "dsnet",
    option: Options = None,
    since: Annotated[float, typer.Option(help="Count runs as waiting that began within these days.", callback=finite)] = 7.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Show how desmearing goes: rates, what waits, failures, last results; status 1 if something failed in the last day."""
    import time

    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.desmearing import METHODS
    from dsnet_bluesky.kinds import FRAME_MODELS
    from dsnet_bluesky.pipeline import Config
    from dsnet_bluesky.watch import read_status

    config = Config(method=method, options=parse_options(option))  # not checked any further: that takes torch
    if config.method_name not in (*METHODS, *FRAME_MODELS):
        raise BadInput(f"There is no method {method!r}; the methods are {', '.join(sorted((*METHODS, *FRAME_MODELS)))}.")
    found = read_status(connect(uri, api_key), config=config, since=time.time() - 86_400 * since, watchers=watcher or ())
    if as_json:
        say(json.dumps(found.to_dict()))
    else:
        Console().print(found.to_table())
    if not found.healthy:
        raise typer.Exit(1)

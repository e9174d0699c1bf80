"""Spools: ``dsnet-bluesky spool status|flush``."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import app, finite, say

__all__ = ["flush", "spool", "status"]

spool = typer.Typer(help="What `SpooledWriter` has spooled: look at it, deliver it.", no_args_is_help=True)
app.add_typer(spool, name="spool")
SpoolDirectory = Annotated[Path, typer.Argument(help="Directory of the spool.", exists=True, file_okay=False)]


@spool.command()
def status(
    directory: SpoolDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the runs that wait, what went wrong last, and alarms; status 1 if there is an alarm or a refused run."""
    from dsnet_bluesky.spool import read_status

    found = read_status(directory)
    if as_json:
        say(json.dumps(found.to_dict()))
    else:
        Console().print(found.to_table())
    if found.alarm or found.refused:
        raise typer.Exit(1)


@spool.command()
def flush(
    directory: SpoolDirectory,
    refused: Annotated[bool, typer.Option("--refused", help="Try the runs again that the catalog refused.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Deliver open runs too; stay until nobody writes here.")] = False,
    keep: Annotated[float, typer.Option(help="Days for which delivered runs are kept.", callback=finite)] = 0.0,
    uri: Annotated[str | None, typer.Option(help="Other address than the spool's own.", show_default=False)] = None,
) -> None:
    """Deliver what waits to the catalog; the key is taken from TILED_API_KEY. Status 1 if not all of it was delivered."""
    from dsnet_bluesky.spool import Deliverer, read_status

    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    if follow:
        os.nice(10)  # the RunEngine comes first
    deliverer = Deliverer(directory, uri=uri, keep=keep)
    if refused:
        deliverer.retry_refused()
    delivered = deliverer.run(follow=follow, timeout=timeout)
    found = read_status(directory)
    if not delivered or found.refused:
        raise typer.Exit(1)

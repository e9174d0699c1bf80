"""Runs recorded before us: ``dsnet-bluesky archive``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .common import LOCAL, ApiKey, Uri, app, connect, say

if TYPE_CHECKING:
    from dsnet_bluesky.archives import Planned, Summary

__all__ = ["archive"]

WORDS = {"new": "brought in", "there": "already there", "refused": "refused"}


@app.command()
def archive(
    source: Annotated[
        str,
        typer.Argument(
            help="http://... of a Tiled server, mongodb://HOST/DATABASE, databroker:NAME, or the name of a Tiled profile.",
            show_default=False,
        ),
    ],
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="Where the documents say what (TOML).", show_default=False)
    ] = None,
    since: Annotated[str | None, typer.Option(help="Runs from this time on, such as 2024-01-31.", show_default=False)] = None,
    until: Annotated[str | None, typer.Option(help="Runs before this time.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Look at no more runs than this.", min=1, show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; show what would be paired with what.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    source_api_key: Annotated[
        str | None, typer.Option(envvar="DSNET_SOURCE_API_KEY", help="API key of the source.", show_default=False)
    ] = None,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Bring runs of an archive into the catalog, by reference and each once; the archive is only read.

    Prints the uids of the sample runs, ready to be desmeared; what became of each run goes to stderr. Status 1 if one was
    refused.
    """
    from dsnet_bluesky.archives import bring_in, load_mapping, open_source, plan

    read = load_mapping(mapping)
    opened = open_source(source, api_key=source_api_key)
    client = connect(uri, api_key)
    if dry_run:
        rows = plan(opened, read, client, since=since, until=until, limit=limit)
        _show(rows, as_json)
        refused = any(row.state == "refused" for row in rows)
    else:
        notify = None if as_json else _tell
        summary = bring_in(opened, read, client, since=since, until=until, limit=limit, notify=notify)
        _sum_up(summary, as_json)
        refused = bool(summary.refused)
    if refused:
        raise typer.Exit(1)


def _show(rows: list[Planned], as_json: bool) -> None:
    if as_json:
        say(json.dumps([row.to_dict() for row in rows]))
        return
    from rich.table import Table

    table = Table("run", "began", "purpose", "sample", "state", "direct beam", "remarks")
    for row in rows:
        began = row.to_dict()["time"][:19].replace("T", " ")
        remarks = "\n".join([row.pairing, *row.problems] if row.direct_beam else row.problems)
        cells: tuple[Any, ...] = (row.uid[:8], began, row.purpose, row.sample, row.state, (row.direct_beam or "")[:8], remarks)
        table.add_row(*cells, style="red" if row.state == "refused" else "yellow" if row.problems else None)
    Console().print(table)


def _tell(row: Planned) -> None:
    why = f" ({' '.join(row.problems)})" if row.problems else ""
    if row.state != "there":
        say(f"{row.uid[:8]} {row.purpose} {row.sample}: {WORDS[row.state]}{why}", stderr=True)


def _sum_up(summary: Summary, as_json: bool) -> None:
    if as_json:
        say(json.dumps(summary.to_dict()))
        return
    for uid in summary.samples:
        say(uid)
    counts = {"brought in": len(summary.new), "already there": len(summary.there), "refused": len(summary.refused)}
    words = ", ".join(f"{number} {word}" for word, number in counts.items())
    say(f"{words}; {summary.left_out} without a purpose left out.", stderr=True)

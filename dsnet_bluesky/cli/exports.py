"""Results as files: ``dsnet-bluesky export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsnet_bluesky.kinds import DESMEARED

from .common import LOCAL, ApiKey, Uri, app, connect, say

__all__ = ["export"]

NAMED = 5
"""Results that are left out of which the reason is printed."""


@app.command()
def export(
    output: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="A file (.h5, .xml, .txt ...) for all results, or a folder for a file each.",
            show_default=False,
        ),
    ],
    result: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RESULT_KEY_OR_RUN_UID]...", help="Results, or runs: all results of them.", show_default=False),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(metavar="QUESTION", help="Such as sample=AgBh, 'chi2<=1.5'; repeatable, all must hold.", show_default=False),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="nxcansas, cansas-xml or columns. [dim]Default: as the file ends, else nxcansas[/]"),
    ] = None,
    exposure: Annotated[
        int | None, typer.Option(metavar="N", help="Only this exposure of each result, from 1.", show_default=False)
    ] = None,
    mount: Annotated[str, typer.Option(help="Where the results lie: desmeared or analysed.")] = DESMEARED.mount,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Write results of the catalog to files that SasView, silx and others read.

    Prints the files. A file is there as a whole or not at all; nothing is written if one of
    them cannot be. Results that failed or are not finished are left out, which is said on stderr.
    """
    from dsnet_bluesky import derived
    from dsnet_bluesky.export import stored
    from dsnet_bluesky.questions import parse_query

    questions = [question for text in query or [] for question in parse_query(text)]
    selection = stored.select(derived.mount(connect(uri, api_key), mount), result or [], questions)
    for path, _ in stored.export(selection, output, format, exposure=exposure, overwrite=overwrite):
        say(str(path))
    for key, why in list(selection.left_out.items())[:NAMED]:
        say(f"left out {key}: {why}", style="yellow", stderr=True)
    if len(selection.left_out) > NAMED:
        say(f"left out {len(selection.left_out) - NAMED} more that failed or are not complete", style="yellow", stderr=True)

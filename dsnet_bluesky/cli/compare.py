"""Two models side by side: ``dsnet-bluesky compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import LOCAL, ApiKey, Uri, app, connect, say

__all__ = ["compare"]


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="What is in use: dsnet:2.0.0, or a method: ift.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="What may replace it.", show_default=False)],
    query: Annotated[
        list[str] | None,
        typer.Option(
            "--query",
            "-q",
            help="What A's results must be, such as sample=AgBh or chi2<=1.5; repeatable.",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Runs that began then or later, such as 2026-11-01.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The newest runs alone, so many.", min=1, show_default=False)] = None,
    minimum_runs: Annotated[int, typer.Option(help="Runs that must be compared to pass.", min=1)] = 20,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, pairs.csv and figures.", file_okay=False, show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Compare results of two models, or methods, for the same runs: status 0 if B may replace A, 1 if not.

    Status 2: there is nothing to compare.
    """
    from rich.progress import MofNCompleteColumn, Progress

    from dsnet_bluesky import comparison, questions
    from dsnet_bluesky.comparison import report

    asked = [question for text in query or [] for question in questions.parse_query(text)]
    if since is not None:
        asked.append(questions.Between(since))
        asked[-1].queries()  # a typing error shall not wait for the search
    client = connect(uri, api_key)
    progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), transient=True)
    with progress:
        task = progress.add_task("results", total=None)
        found = comparison.compare(
            client, a, b, asked, limit=limit, notify=lambda done, total: progress.update(task, completed=done, total=total)
        )
    verdict = comparison.judge(found, comparison.Criteria(minimum_runs=minimum_runs))
    written = report.write(found, verdict, output) if output is not None else []
    if as_json:
        say(json.dumps(report.to_dict(found, verdict), allow_nan=False))
    else:
        Console().print(report.to_tables(found, verdict))
    for path in written:
        say(f"Written: {path}", stderr=True)
    if not verdict.passed:
        raise typer.Exit(1)

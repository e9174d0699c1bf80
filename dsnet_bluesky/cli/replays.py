"""Replay: ``dsnet-bluesky replay``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .common import LOCAL, ApiKey, Options, Uri, app, checked_config, connect, say

if TYPE_CHECKING:
    from dsnet_bluesky.replay import Summary

__all__ = ["replay"]

UNFINISHED = 3
"""Exit status of a replay that was interrupted: the same command goes on."""


@app.command()
def replay(
    model: Annotated[
        str, typer.Option("--model", "-m", help="dsnet:2.1.0, dsnet:production, icosahedra, or a method: map, ift ...")
    ] = "dsnet",
    option: Options = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="Of runs: sample=AgBh, run=UID, until=2026-11-30; repeatable. [dim]Default: all[/]"),
    ] = None,
    since: Annotated[str | None, typer.Option(help="Runs that began at or after this time.", show_default=False)] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Bring runs in from here first, see `dsnet-bluesky archive`, and replay them.", show_default=False),
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="Mapping file for that source.", show_default=False)] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Scheduler of dask. [dim]Default: a cluster of this machine[/]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes on this machine. [dim]Default: one for each core[/]", min=0)
    ] = None,
    batch: Annotated[int, typer.Option(help="Runs that a worker does together.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Do so many runs at most.", min=0, show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compute results again that are there, and compare.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do runs again that failed.")] = False,
    device: Annotated[str, typer.Option(help="Of the network: cpu, cuda ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Desmear runs of the catalog with another model; the results that are there stay.

    Runs that have their result are left alone: a replay that was interrupted goes on when it is started again.
    Exit status: 0 all is done; 1 something failed, or differs; 2 unusable input; 3 interrupted, start it again.
    """
    from dsnet_bluesky import questions
    from dsnet_bluesky.replay import replay as run

    logging.getLogger("distributed").setLevel("ERROR")
    config = checked_config(model, option, device)
    asked = [question for item in query or [] for question in questions.parse_query(item)]
    if since is not None:
        asked += questions.parse_query(f"since={since}")
    client = connect(uri, api_key)
    if source is not None:
        asked = _brought_in(client, source, mapping, asked, since=since, limit=limit, dry_run=dry_run)
        if not asked:
            return
    with _Progress(quiet=as_json or dry_run) as progress:
        found = run(
            client,
            config=config,
            questions=asked,
            limit=limit,
            batch=batch,
            workers=workers,
            dask=dask,
            verify=verify,
            retry_failed=retry_failed,
            dry_run=dry_run,
            notify=progress.show,
        )
    say(json.dumps(found.to_dict()) if as_json else _words(found, dry_run=dry_run))
    if found.interrupted:
        raise typer.Exit(UNFINISHED)
    if not found.complete and not dry_run:
        raise typer.Exit(1)


def _brought_in(
    client: Any, source: str, mapping: Path | None, asked: list[Any], *, since: str | None, limit: int | None, dry_run: bool
) -> list[Any]:
    """Bring runs into the catalog, or say which would be; return what to ask for to replay them."""
    from dsnet_bluesky.archives import bring_in, load_mapping, open_source, plan
    from dsnet_bluesky.questions import OfRun

    archive, rules = open_source(source), load_mapping(mapping)
    if dry_run:
        planned = plan(archive, rules, client, since=since, limit=limit)
        say(f"{len(planned)} runs would be brought in; `dsnet-bluesky archive --dry-run` shows which, and with what direct beam.")
        return []
    summary = bring_in(archive, rules, client, since=since, limit=limit)
    for uid, reason in summary.refused.items():
        say(f"{uid} refused: {reason}", style="yellow", stderr=True)
    if not summary.samples:
        say(f"{source} holds no sample run to replay.", stderr=True)
        return []
    return [*asked, OfRun(*summary.samples)]


class _Progress:
    """A bar with the rate and the time that is left."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[word]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._task: Any = None

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, so_far: Summary) -> None:
        """Show how far a replay is."""
        if self._task is None:
            self._task = self._bar.add_task(so_far.model, total=so_far.found, word="")
        task = self._bar.tasks[0]
        word = f"{task.speed:.0f}/s" if task.speed else ""
        failed = sum(so_far.failed.values())
        self._bar.update(self._task, completed=so_far.done, word=f"{word}  {failed} failed" if failed else word)


def _words(found: Summary, *, dry_run: bool) -> str:
    """Say what became of a replay."""
    if dry_run:
        return f"{found.model}: {found.to_do} of {found.found} runs would be done; {found.before} have their result."
    lines = [
        f"{found.model}: {found.found} runs, {found.before} done before, {found.stored} stored, {found.there} stored by others"
    ]
    if found.same or found.different:
        lines = [f"{found.model}: {found.same} results computed again are equal, {len(found.different)} differ"]
    lines += [f"differs by {difference:.3g} of its error: {key}" for key, difference in found.different.items()]
    lines += [f"{count} failed: {reason}" for reason, count in found.failed.most_common()]
    if found.wall and found.to_do > found.unfinished:
        lines.append(f"{found.wall:.1f} s, {(found.to_do - found.unfinished) / found.wall:.1f} runs a second")
    if found.interrupted:
        lines.append(f"Interrupted, {found.unfinished} runs or more are left: {found.interrupted} The same command goes on.")
    return "\n".join(lines)

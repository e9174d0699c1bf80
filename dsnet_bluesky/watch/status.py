"""How desmearing goes, as the catalog and the watchers tell it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
from rich.console import Group
from rich.table import Table
from tiled.queries import Key

from dsnet_bluesky.derived import mount
from dsnet_bluesky.documents import sample_name
from dsnet_bluesky.pipeline import Config

from .backlog import Backlog

__all__ = ["Result", "Status", "read_status"]

LAST = 10
"""Results that are listed."""

FAILURES = 300
"""Failures whose reasons are counted, at most: a page of what the server gives."""

DAY = 86_400.0
HOUR = 3_600.0


@dataclass(frozen=True)
class Result:
    """A result, in a line."""

    key: str
    raw_uid: str
    sample: str
    model: str
    status: str
    exposures: int
    failed: int
    """Exposures of it that failed."""
    updated: float
    reason: str = ""
    attempts: int = 1
    writer: str = ""

    @classmethod
    def of(cls, key: str, said: Mapping[str, Any]) -> Result:
        """Read a result's metadata."""
        writer = said.get("writer") or {}
        return cls(
            key=key,
            raw_uid=said["raw_uid"],
            sample=sample_name(said),
            model=":".join(filter(None, (said["model_name"], said["model_version"]))) or said["method"],
            status=said["status"],
            exposures=said["exposures"],
            failed=len(said["failures"]),
            updated=said["updated"],
            reason=said.get("reason") or "",
            attempts=said.get("attempts", 1),
            writer=f"{writer.get('host')}:{writer.get('pid')}" if writer else "",
        )


@dataclass(frozen=True)
class Status:
    """How desmearing goes."""

    waiting: int
    """Sample runs of the last days without a result, those excluded that failed for good."""

    running: int
    completed_hour: int
    completed_day: int
    failed_day: int

    failures: Mapping[str, int]
    """Reasons of the last day's failures, and how often."""

    last: tuple[Result, ...]
    """Newest first."""

    watchers: Mapping[str, Mapping[str, Any]]
    """What the watchers that were asked said of themselves, by address."""

    @property
    def healthy(self) -> bool:
        """Whether nothing failed in the last day, and every watcher that was asked is well."""
        return not self.failed_day and all(said.get("healthy") for said in self.watchers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"healthy": self.healthy}

    def to_table(self) -> Group:
        """Return tables for a terminal."""
        counts = Table(title="Desmearing")
        for heading in ("waiting", "running", "done, last hour", "done, last day", "failed, last day"):
            counts.add_column(heading, justify="right")
        counts.add_row(*map(str, (self.waiting, self.running, self.completed_hour, self.completed_day, self.failed_day)))
        return Group(counts, *self._watchers(), *self._failures(), self._results())

    def _watchers(self) -> list[Table]:
        if not self.watchers:
            return []
        table = Table(title="Watchers")
        names = ("healthy", "catalog", "exposures", "failed", "in_hand", "lag")
        for heading in ("address", *(name.replace("_", " ") for name in names)):
            table.add_column(heading)
        for address, said in self.watchers.items():
            table.add_row(address, *(_cell(said.get(name, "")) for name in names))
        return [table]

    def _failures(self) -> list[Table]:
        if not self.failures:
            return []
        table = Table(title="Failures of the last day")
        table.add_column("runs", justify="right")
        table.add_column("reason")
        for reason, number in sorted(self.failures.items(), key=lambda item: -item[1]):
            table.add_row(str(number), reason)
        return [table]

    def _results(self) -> Table:
        table = Table(title="Last results")
        for heading in ("time", "sample", "run", "model", "status", "exposures", "failed"):
            table.add_column(heading, justify="right" if heading in ("exposures", "failed") else "left")
        for result in self.last:
            when = f"{datetime.fromtimestamp(result.updated):%m-%d %H:%M:%S}"
            status = result.status + (f" (attempt {result.attempts})" if result.attempts > 1 else "")
            row = (when, result.sample, result.raw_uid[:8], result.model, status, result.exposures, result.failed or "")
            table.add_row(*map(str, row))
        return table


def read_status(client: Any, *, config: Config | None = None, since: float | None = None, watchers: Sequence[str] = ()) -> Status:
    """Ask the catalog, and watchers, how desmearing goes.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    config
        Of the watchers: what counts as done.
    since
        Runs before this time (seconds since 1970) are not counted as waiting; a week ago if not given.
    watchers
        Addresses of their `/healthz`, without it, such as ``http://127.0.0.1:9108``.
    """
    now = time.time()
    config = config or Config()
    results = mount(client, config.kind.mount)
    done = results.search(Key("status") == "complete")
    failed = results.search(Key("status") == "failed").search(Key("updated") >= now - DAY)
    reasons = Counter(str(node.metadata.get("reason")) for node in failed.values().head(FAILURES))
    last = results.sort(("updated", -1)).items().head(LAST)
    backlog = Backlog(client, config, since=now - 7 * DAY if since is None else since)
    return Status(
        waiting=sum(task.why != "waits for a direct beam" for task in backlog.scan(whole=True)),
        running=len(results.search(Key("status") == "running")),
        completed_hour=len(done.search(Key("updated") >= now - HOUR)),
        completed_day=len(done.search(Key("updated") >= now - DAY)),
        failed_day=len(failed),
        failures=dict(reasons),
        last=tuple(Result.of(key, node.metadata) for key, node in last),
        watchers={address: _ask(address) for address in watchers},
    )


def _ask(address: str) -> dict[str, Any]:
    try:
        return httpx.get(f"{address.rstrip('/')}/healthz", timeout=5.0).json()
    except (httpx.HTTPError, ValueError) as error:
        return {"healthy": False, "catalog": f"no answer: {error}"}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "[red]no[/]"
    if isinstance(value, float):
        return str(timedelta(seconds=round(value)))
    return str(value)

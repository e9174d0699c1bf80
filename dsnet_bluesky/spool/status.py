"""What waits in a spool, for eyes and for programs."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from .files import Spool, count, is_free, noted

__all__ = ["Status", "WaitingRun", "read_status"]


@dataclass(frozen=True)
class WaitingRun:
    """A run in a spool."""

    name: str
    """Of its file: time of its start and uid."""

    state: str
    """open, complete or refused."""

    documents: int
    bytes: int

    age: float
    """Seconds since its last document."""

    attempts: int = 0
    """That failed."""

    error: str = ""
    """Of the last one."""


@dataclass(frozen=True)
class Status:
    """State of a spool."""

    directory: str
    target: str
    """Address that its runs go to."""

    delivering: bool
    """Whether a process delivers."""

    writing: bool
    """Whether a process writes."""

    alarm: str
    """What the writer warns of; empty if nothing."""

    error: str
    """Why no run can be delivered: no answer, a wrong key ...; empty if nothing prevents it."""

    attempts: int
    """To reach the catalog, since a run was last delivered to it."""

    disk_free: int
    """Bytes left on the spool's disk."""

    damaged: int
    """Files that held unreadable bytes, kept as they were found."""

    runs: tuple[WaitingRun, ...]

    @property
    def waiting(self) -> list[WaitingRun]:
        """Runs that are on their way."""
        return [run for run in self.runs if run.state != "refused"]

    @property
    def refused(self) -> list[WaitingRun]:
        """Runs that the catalog refused."""
        return [run for run in self.runs if run.state == "refused"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, and sums over what waits, as plain values."""
        return asdict(self) | {
            "waiting": len(self.waiting),
            "refused": len(self.refused),
            "documents": sum(run.documents for run in self.waiting),
            "bytes": sum(run.bytes for run in self.waiting),
            "oldest": max((run.age for run in self.waiting), default=0.0),
        }

    def to_table(self) -> Table:
        """Return a table of the runs, the rest below it."""
        table = Table(title=f"Spool {self.directory}", caption="\n".join(self._lines()), caption_justify="left")
        for heading in ("run", "state", "documents", "kB", "age", "attempts", "last error"):
            table.add_column(heading, justify="left" if heading in ("run", "state", "last error") else "right")
        for run in self.runs:
            age = timedelta(seconds=round(run.age))
            row = (run.name, run.state, run.documents, f"{run.bytes / 1e3:.1f}", age, run.attempts or "", run.error)
            table.add_row(*map(str, row))
        return table

    def _lines(self) -> list[str]:
        lines = [
            f"to {self.target}; {'delivering' if self.delivering else 'nobody delivers'}; {self.disk_free / 1e9:.1f} GB free"
        ]
        if self.error:
            lines.append(f"Nothing can be delivered, attempt {self.attempts}: {self.error}")
        if self.damaged:
            lines.append(f"{self.damaged} files held unreadable bytes; see damaged/.")
        return [*lines, *([f"ALARM: {self.alarm}"] if self.alarm else [])]


def read_status(directory: str | Path) -> Status:
    """Look into a spool.

    Raises
    ------
    BadInput
        If there is none.
    """
    spool = Spool(directory)
    errors = noted(spool.errors)
    runs = [_look(path, "open" if not is_free(path) else "complete", errors.get(path.name, {})) for path in spool.waiting()]
    for path in sorted(spool.refused.glob("*.run")):
        why = noted(path.with_suffix(".json"))
        runs.append(_look(path, "refused", {"attempts": why.get("attempts", 0), "error": why.get("reason", "")}))
    away = errors.get("", {})
    disk = os.statvfs(spool.directory)
    return Status(
        directory=str(spool.directory),
        target=spool.target.read_text().strip(),
        delivering=not is_free(spool.deliverer_lock),
        writing=not is_free(spool.writers_lock, shared=True),
        alarm=noted(spool.alarm).get("message", ""),
        error=away.get("error", ""),
        attempts=away.get("attempts", 0),
        disk_free=disk.f_bavail * disk.f_frsize,
        damaged=len(list(spool.damaged.glob("*.run"))),
        runs=tuple(run for run in runs if run is not None),
    )


def _look(path: Path, state: str, error: dict[str, Any]) -> WaitingRun | None:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            return WaitingRun(path.stem, state, count(file), stat.st_size, max(0.0, time.time() - stat.st_mtime), **error)
    except FileNotFoundError:
        return None  # delivered meanwhile

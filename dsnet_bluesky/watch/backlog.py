"""What is still to do, as the catalog says it: sample runs without a result of this model and configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiled.client.container import Container
from tiled.queries import Comparison, In, Key

from dsnet_bluesky.derived import is_abandoned, mount
from dsnet_bluesky.pipeline import Config, without_model

__all__ = ["Backlog", "Task"]

PAGE = 100
"""Runs that are looked up together."""

OVERLAP = 500
"""Runs before the last known one that are looked at again: deletions shift what comes after."""

CLOCK_JUMP = 60.0
"""Seconds by which the clock must have been set for everything to be looked at again: what was too old may not be so now."""

INTERNAL_ATTEMPTS = 3
"""Times that a run is tried whose result failed through a fault of the program."""

INTERNAL_WAIT = 60.0
"""Seconds before the second attempt; four times as long before each further one."""


@dataclass(frozen=True)
class Task:
    """A run to desmear.

    Attributes
    ----------
    run_uid
        Of the raw run.
    redo
        Whether its failed result is to be begun again.
    why
        For people.
    """

    run_uid: str
    redo: bool = False
    why: str = "new"


class Backlog:
    """The work that the catalog holds.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    config
        How to reduce and desmear; results of another configuration or model do not count.
    since, max_age
        Runs before this time (seconds since 1970), or longer ago than so many seconds, are not looked at.
    """

    def __init__(self, client: Any, config: Config, *, since: float = 0.0, max_age: float = math.inf):
        self._raw, self._results = mount(client, "raw"), mount(client, config.kind.mount)
        self._config, self._wanted, self._max_age = config, since, max_age
        self._since, self._offset = since, math.inf
        model = config.load_model()
        self._model = model.sha256 if model else ""
        self._beams = -1
        self._looked_at = 0

    def scan(self, *, whole: bool = False) -> Iterator[Task]:
        """Go through the runs that came since the last scan, or through all, and yield what is to do.

        Parameters
        ----------
        whole
            Begin with the first run. Do it at the start and now and then: what was deleted shifts what follows.
        """
        beams = len(Container.search(self._raw.search(Key("purpose") == "direct_beam"), Comparison("gt", "stop.time", 0.0)))
        more_beams = beams != self._beams
        offset = time.time() - time.monotonic()
        if whole := whole or abs(offset - self._offset) > CLOCK_JUMP:
            # Not at every scan: what becomes too old would shift those that follow. Anew each time: clocks jump.
            self._since = max(self._wanted, time.time() - self._max_age)
        samples = self._raw.search(Key("purpose") == "sample").search(Key("time") >= self._since)
        first = 0 if whole or more_beams else max(0, self._looked_at - OVERLAP)
        while page := samples.keys()[first : first + PAGE]:
            yield from self.tasks(list(page), more_beams)
            first += len(page)
        # Only now: a scan that broke down is done again for the same reasons.
        self._looked_at, self._beams = first, beams
        if whole:
            self._offset = offset

    def tasks(self, uids: Sequence[str], more_beams: bool = False, *, failed: bool = False) -> Iterator[Task]:
        """Yield what is to do of these runs.

        Parameters
        ----------
        uids
            Sample runs.
        more_beams
            Whether there are direct beams that were not there before: those that failed for want of one are tried again.
        failed
            Try all again that failed.
        """
        found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for key, node in self._results.search(In("raw_uid", list(uids))).items():
            found.setdefault(node.metadata["raw_uid"], []).append((key, node.metadata))
        for uid in uids:
            task = self._task(uid, found.get(uid, []), more_beams, failed)
            if task is not None:
                yield task

    def _task(self, uid: str, results: Sequence[tuple[str, Mapping[str, Any]]], more_beams: bool, again: bool) -> Task | None:
        mine = [(key, said) for key, said in results if self._is_mine(said)]
        if any(said["status"] == "complete" for _, said in mine):
            return None
        running = [(key, said) for key, said in mine if said["status"] == "running"]
        if running:
            abandoned = all(is_abandoned(key, said) for key, said in running)
            return Task(uid, why="abandoned by another process") if abandoned else None
        failed = [said for _, said in mine]
        if not failed:
            return Task(uid)
        if again:
            return Task(uid, redo=True, why="failed before")
        last = max(failed, key=lambda said: said["updated"])
        kind = (last.get("failure") or {}).get("kind")
        if kind == "direct_beam" and more_beams:
            return Task(uid, why="waits for a direct beam")
        if kind == "internal" and last["attempts"] < INTERNAL_ATTEMPTS and _is_due(last):
            return Task(uid, redo=True, why="failed through a fault of the program")
        return None

    def _is_mine(self, said: Mapping[str, Any]) -> bool:
        """Whether a result is of this model and configuration, whose wavelength spread may be the run's own."""
        if said["model_sha256"] not in ("", self._model):
            return False
        mine, other = self._config.to_dict(), without_model(said["config"])
        if not mine["wavelength_spread"]:
            other["wavelength_spread"] = mine["wavelength_spread"]
        return mine == other


def _is_due(failed: Mapping[str, Any]) -> bool:
    wait = INTERNAL_WAIT * 4 ** (failed["attempts"] - 1)
    # A clock that was wrong must not put it off for years.
    return not 0 <= time.time() - failed["updated"] < wait

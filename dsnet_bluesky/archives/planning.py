"""What would be brought in, and paired with what."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from dsnet_bluesky.callbacks.desmear import MAX_BEAM_AGE
from dsnet_bluesky.callbacks.pairing import DirectBeams, NoDirectBeam
from dsnet_bluesky.callbacks.sample_runs import CATALOG_AWAY
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import lookup, mount
from dsnet_bluesky.documents import Exposure, sample_name
from dsnet_bluesky.frames import HDF5_MIMETYPE, FrameReference, count, path_of
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.questions import Between

from .completing import Completed, complete, purpose_of
from .instruments import Incomplete
from .mapping import ArchiveMapping
from .paths import NotFound, in_start
from .sources import ArchivedRun, Source

__all__ = ["Planned", "Planner", "Time", "plan"]

LOOK_AHEAD = 1000
"""Runs among which the first of each purpose is looked for, to check the mapping by."""

RECENT = 600.0
"""Seconds for which a run that another process is bringing in is left to it; it takes a few."""

Time = float | str | datetime | None
"""Seconds since 1970, ISO 8601, or None for no bound."""


@dataclass
class Planned:
    """A run of the archive, and what becomes of it.

    Attributes
    ----------
    uid, time, purpose, sample
        Of the run; time in s since 1970.
    state
        ``new``: to bring in; ``there``: the catalog has it; ``refused``: `problems` say why.
    direct_beam
        Uid of the direct beam that a sample is paired with, None where there is none.
    pairing
        Why that one, or why none.
    missing
        Whether frames are not here.
    problems
        What is wrong: the reason of a refusal, frames that are missing, no direct beam.
    """

    uid: str
    time: float
    purpose: str
    sample: str
    state: str = "new"
    direct_beam: str | None = None
    pairing: str = ""
    missing: bool = False
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what programs read."""
        return {**asdict(self), "time": datetime.fromtimestamp(self.time, UTC).isoformat()}


def plan(
    source: Source,
    mapping: ArchiveMapping,
    client: Any,
    *,
    since: Time = None,
    until: Time = None,
    limit: int | None = None,
) -> list[Planned]:
    """Say what `bring_in` would do, without writing anything.

    Parameters
    ----------
    source, mapping
        Of the archive.
    client
        Tiled client of our server's root.
    since, until
        Runs that began in this span of time.
    limit
        Look at no more runs than this.

    Raises
    ------
    BadInput
        If the mapping does not fit the archive; the message names the key, the run, and what is there instead.
    """
    return [planned for planned, _ in Planner(source, mapping, client, since=since, until=until, limit=limit)]


class Planner:
    """Go through the runs of an archive in the order of time; see `plan`.

    Iterating yields each run that has a purpose, and its completed documents where it is new. A direct beam
    from outside the span of time comes just before the first sample that it belongs to.

    Attributes
    ----------
    left_out : int
        Runs without a purpose, so far.
    """

    def __init__(
        self,
        source: Source,
        mapping: ArchiveMapping,
        client: Any,
        *,
        since: Time = None,
        until: Time = None,
        limit: int | None = None,
    ):
        self.left_out = 0
        self._source, self._mapping, self._raw = source, mapping, mount(client, "raw")
        self._since, self._until, self._limit = _seconds(since), _seconds(until), limit
        self._beams = DirectBeams(self._raw, Config(), max_age=MAX_BEAM_AGE)
        self._earlier: dict[str, ArchivedRun] = {}
        self._fetched: set[str] = set()

    def __iter__(self) -> Iterator[tuple[Planned, Completed | None]]:
        """Yield runs; see the class."""
        self._check_mapping()
        self._look_for_earlier_beams()
        for run in self._runs():
            if run.uid in self._fetched:
                continue
            purpose = purpose_of(run.start, self._mapping)
            if purpose is None:
                self.left_out += 1
                continue
            planned, completed = self._planned(run, purpose)
            if purpose == "sample" and completed is not None:
                yield from self._paired(planned, completed.exposures[0])
            yield planned, completed

    def _runs(self) -> Iterator[ArchivedRun]:
        return self._source.runs(self._since, self._until, self._limit)

    def _check_mapping(self) -> None:
        """Try the mapping on the first run of each purpose, before anything else.

        Raises
        ------
        BadInput
            If a path leads nowhere there, or no rule fits any run.
        """
        wanted, first = set(self._mapping.purpose), None
        for number, run in enumerate(self._runs()):
            first = first or run
            purpose = purpose_of(run.start, self._mapping)
            if purpose in wanted:
                wanted.discard(purpose)
                self._try(run, purpose)
            if not wanted or number + 1 >= LOOK_AHEAD:
                break
        if first is not None and self._mapping.purpose and wanted == set(self._mapping.purpose):
            self._check_rules(first)

    def _try(self, run: ArchivedRun, purpose: str) -> None:
        try:
            complete(run, purpose, self._mapping, self._source.name)
        except Incomplete as error:
            if error.wrong_path:
                raise BadInput(
                    f"The mapping {self._mapping.name} does not fit the run {run.uid} ({_day(run)}), the first with the purpose "
                    f"{purpose}: {error} Nothing was written. Correct the path, or give it a default for runs without it."
                ) from error
        except Exception:
            return  # not the mapping's fault: said of this run when its turn comes

    def _check_rules(self, run: ArchivedRun) -> None:
        """No run fits a rule: say which path is not there."""
        for purpose, rules in self._mapping.purpose.items():
            for path in {path for rule in rules for path in rule}:
                try:
                    in_start(run.start, path)
                except NotFound as error:
                    raise BadInput(
                        f"No run fits a rule of [purpose] in {self._mapping.name}. purpose.{purpose}: in the run {run.uid} "
                        f"({_day(run)}) {error}. Nothing was written."
                    ) from error

    def _look_for_earlier_beams(self) -> None:
        """Note the direct beams of the day before the span of time: its first samples may need one."""
        if self._since is None:
            return
        for run in self._source.runs(self._since - MAX_BEAM_AGE, self._since):
            if purpose_of(run.start, self._mapping) != "direct_beam" or lookup(self._raw, run.uid) is not None:
                continue
            with suppress(Exception):  # one that cannot be used is passed over
                for exposure in complete(run, "direct_beam", self._mapping, self._source.name).exposures:
                    self._beams.add(exposure)
                self._earlier[run.uid] = run

    def _planned(self, run: ArchivedRun, purpose: str) -> tuple[Planned, Completed | None]:
        planned = Planned(run.uid, float(run.start["time"]), purpose, sample_name(run.start))
        try:
            if self._is_there(run.uid):
                planned.state = "there"
                return planned, None
            completed = complete(run, purpose, self._mapping, self._source.name)
        except CATALOG_AWAY:
            raise
        except Exception as error:  # other people's documents: whatever is wrong with one run stops no other
            planned.state = "refused"
            planned.problems.append(str(error) if isinstance(error, BadInput) else _unforeseen(error))
            return planned, None
        planned.sample = sample_name(completed.start)
        planned.problems += (missing := _missing(completed))
        planned.missing = bool(missing)
        if purpose == "direct_beam":
            for exposure in completed.exposures:
                self._beams.add(exposure)
        return planned, completed

    def _is_there(self, uid: str) -> bool:
        """Whether the catalog has a run; one that we brought in in part does not count.

        Raises
        ------
        BadInput
            If it has the run in part, and another writes it.
        """
        run = lookup(self._raw, uid)
        if run is None or run.metadata.get("stop"):
            return run is not None
        writer = (run.metadata["start"].get("archive") or {}).get("writer")
        if writer is None:
            raise BadInput("It is in the catalog without an end, and not from an archive: it is going on, or waits in a spool.")
        if _is_writing(writer):
            raise BadInput(f"Process {writer['pid']} on {writer['host']} is bringing it in; try again when that has ended.")
        return False

    def _paired(self, planned: Planned, sample: Exposure) -> Iterator[tuple[Planned, Completed | None]]:
        """Pair a sample; yields a direct beam that has to be brought in for it."""
        named = sample.start.get("direct_beam_uid")
        if named and lookup(self._raw, named) is None:
            yield from self._fetch(named)
        try:
            pairing = self._beams.find(sample)
        except NoDirectBeam as error:
            planned.pairing = str(error)
            planned.problems.append(str(error))
            return
        if pairing is None:
            return  # the method needs no direct beam
        planned.direct_beam, planned.pairing = pairing.beam.run_uid, pairing.reason
        if planned.direct_beam in self._earlier:
            yield from self._fetch(planned.direct_beam)

    def _fetch(self, uid: str) -> Iterator[tuple[Planned, Completed | None]]:
        """Yield a direct beam of the archive, once, before its turn or from outside the span of time."""
        run = self._earlier.pop(uid, None) or self._source.run(uid)
        if run is not None and uid not in self._fetched:
            self._fetched.add(uid)
            yield self._planned(run, "direct_beam")


def _seconds(when: Time) -> float | None:
    if when is None:
        return None
    (query,) = Between(begin=when).queries()
    return float(query.value)


def _day(run: ArchivedRun) -> str:
    return datetime.fromtimestamp(float(run.start["time"])).isoformat(sep=" ", timespec="seconds")


def _unforeseen(error: Exception) -> str:
    return f"Its documents cannot be understood ({type(error).__name__}: {' '.join(str(error).split())[:200]})."


def _is_writing(writer: Mapping[str, Any]) -> bool:
    """Whether another process may still be bringing a run in."""
    if time.time() - writer["time"] > RECENT or (writer["host"], writer["pid"]) == (socket.gethostname(), os.getpid()):
        return False
    if writer["host"] != socket.gethostname():
        return True
    try:
        os.kill(writer["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _missing(completed: Completed) -> list[str]:
    """Say which files are not here, or hold fewer frames than the documents say; a sequence of images is not opened for it."""
    last: dict[str, FrameReference] = {exposure.frames.uri: exposure.frames for exposure in completed.exposures}
    problems = []
    for uri, frames in last.items():
        path = path_of(uri)
        if not path.is_file():
            problems.append(f"The file {path} does not exist (or is not visible from this machine).")
        elif frames.mimetype == HDF5_MIMETYPE:
            try:
                number = count(frames)
            except BadInput as error:
                problems.append(str(error))
            else:
                if number < (frames.stop or 0):
                    problems.append(f"{path.name} holds {number} of {frames.stop} frames.")
    if len(problems) > 1:
        problems = [f"{problems[0]} So it is with {len(problems)} of {len(last)} files."]
    return problems

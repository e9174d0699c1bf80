"""Bringing archived runs into our catalog: by reference, each once, whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from bluesky_tiled_plugins import TiledWriter
from tiled.client.utils import ClientError

from dsnet_bluesky import derived
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.callbacks.sample_runs import CATALOG_AWAY
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import lookup, mount
from dsnet_bluesky.spool.arrived import check
from dsnet_bluesky.spool.files import Contents

from .completing import Completed
from .mapping import ArchiveMapping
from .planning import Planned, Planner, Time
from .sources import Source

__all__ = ["Summary", "bring_in"]

logger = logging.getLogger(__name__)

CONFLICT = 409


@dataclass
class Summary:
    """What became of an archive's runs.

    Attributes
    ----------
    new, there
        Uids of runs that were brought in now, and that the catalog had.
    refused
        Why others were not brought in, by uid.
    remarks
        What is to be known of runs that were: missing frames, no direct beam, curves that the server cannot show.
    samples
        Uids of the sample runs that the catalog has now, in the order of time, for replay.
    left_out
        Number of runs without a purpose.
    """

    new: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what programs read."""
        return asdict(self)


def bring_in(
    source: Source,
    mapping: ArchiveMapping,
    client: Any,
    *,
    since: Time = None,
    until: Time = None,
    limit: int | None = None,
    notify: Callable[[Planned], None] | None = None,
) -> Summary:
    """Write runs of an archive into ``/raw``, completed by a mapping; frames stay where they are.

    A run that ``/raw`` has is left as it is, one that was brought in only in part is begun again. The source is only read.

    Parameters
    ----------
    source, mapping
        Of the archive.
    client
        Tiled client of our server's root.
    since, until
        Runs that began in this span of time, and direct beams from before that belong to them.
    limit
        Look at no more runs than this.
    notify
        Called with each run when it is dealt with.

    Raises
    ------
    BadInput
        If the mapping does not fit the archive; nothing was written then.
    CATALOG_AWAY
        If a server does not answer. What was brought in stays; call again for the rest.
    """
    summary = Summary()
    planner = Planner(source, mapping, client, since=since, until=until, limit=limit)
    for planned, completed in planner:
        if completed is not None:
            _write(client, planned, completed)
        _count(summary, planned)
        if notify is not None:
            notify(planned)
    summary.left_out = planner.left_out
    return summary


def _count(summary: Summary, planned: Planned) -> None:
    if planned.state == "refused":
        summary.refused[planned.uid] = " ".join(planned.problems)
        return
    (summary.new if planned.state == "new" else summary.there).append(planned.uid)
    if planned.purpose == "sample":
        summary.samples.append(planned.uid)
    if planned.problems:
        summary.remarks[planned.uid] = planned.problems


def _write(client: Any, planned: Planned, completed: Completed) -> None:
    """Write one run; leave nothing of it if that fails."""
    raw, uid = mount(client, "raw"), planned.uid
    if lookup(raw, uid) is not None:  # in part, and nobody writes it: nothing tells which documents arrived
        logger.info("Run %s is in the catalog in part; it is brought in again.", uid)
        raw.delete_contents(uid, recursive=True, external_only=False)
    writer = TiledWriter(raw, normalizer=None)
    try:
        writer("start", completed.start)
    except ClientError as error:
        again = error.response.status_code == CONFLICT
        _refuse(planned, "Another process is bringing it in now." if again else f"The catalog refuses it ({error}).")
        return
    try:
        for name, doc in completed.documents[1:]:
            writer(name, doc)
        _check(raw, uid, completed)
    except CATALOG_AWAY as error:
        if not isinstance(error, httpx.HTTPStatusError):
            raise  # the server is away: what is there in part is begun again next time
        raw.delete_contents(uid, recursive=True, external_only=False)
        _refuse(planned, f"The catalog refuses it ({error}).")
    except Exception as error:
        raw.delete_contents(uid, recursive=True, external_only=False)
        _refuse(planned, str(error) if isinstance(error, BadInput) else f"It cannot be stored ({type(error).__name__}: {error}).")
    else:
        _register(client, planned, raw[uid])


def _refuse(planned: Planned, reason: str) -> None:
    planned.state = "refused"
    planned.problems = [reason]


def _check(raw: Any, uid: str, completed: Completed) -> None:
    """Make sure that the catalog gives back what was written: the events, and where each exposure's frames are.

    Raises
    ------
    BadInput
        If it does not; a catalog cannot say every arrangement of files.
    """
    sent = Contents()
    for number, (name, doc) in enumerate(completed.documents):
        sent.add(name, doc, number)
    check(raw, sent)
    stored = exposures_of_documents(raw[uid].documents())
    if [_place(exposure) for exposure in stored] != [_place(exposure) for exposure in completed.exposures]:
        raise BadInput(
            "The catalog cannot say where its frames are: they must lie in one file, or in files numbered one after the other. "
            "Read them from the archive and bring them in as files (dsnet-bluesky ingest)."
        )


def _place(exposure: Any) -> tuple[Any, ...]:
    frames = exposure.frames
    return exposure.index, frames.uri, frames.start, frames.stop, frames.parameters.get("dataset"), exposure.instrument


def _register(client: Any, planned: Planned, run: Any) -> None:
    """Let the server show the run's curves; the run counts without them, too."""
    if planned.missing:
        return
    try:
        derived.register(client, run)
    except BadInput as error:
        planned.problems.append(f"Its curves are not shown: {error}")

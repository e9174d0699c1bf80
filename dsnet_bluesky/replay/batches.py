"""What a worker does with a batch of runs: read, desmear what has one operator together, store together.

Whatever is out of the ordinary, from a missing file to a run of a thousand exposures, is done by
`callbacks.sample_runs`, run by run, as live work is; failures become results there.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from cachetools import LRUCache
from tiled.queries import KeysFilter

from dsnet_bluesky.callbacks.desmear import MAX_BEAM_AGE
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.callbacks.pairing import DirectBeams, Pairing
from dsnet_bluesky.callbacks.sample_runs import BATCH, CATALOG_AWAY, KeyRefused, SampleRuns, key_refused, reduced
from dsnet_bluesky.data import BadInput, concat_exposures
from dsnet_bluesky.derived import Finished, RawFrames, access_tags_of, lookup, mount, raw_frames_of, store_together
from dsnet_bluesky.documents import Exposure, Instrument
from dsnet_bluesky.pipeline import Config, PreparedExposures

__all__ = ["Batches", "Done", "Server", "Work", "check", "do"]

logger = logging.getLogger(__name__)

REPLAYED = "Replayed from the catalog."
"""What a result says of why it came later than its run."""

SAME = 1e-3
"""Largest difference, in stated errors, that counts as floating-point noise."""


@dataclass
class Done:
    """What became of a batch."""

    runs: int = 0
    """Runs that are done with."""

    stored: int = 0
    """Results stored complete."""

    there: int = 0
    """Runs whose result was there already, or that others are at."""

    failed: Counter[str] = field(default_factory=Counter)
    """Why runs or exposures could not be desmeared, and how often."""

    same: int = 0
    """Results that were computed again and are equal to what is stored."""

    different: dict[str, float] = field(default_factory=dict)
    """Those that are not: the key, and the largest difference in stated errors (`kinds.Kind.compared`)."""

    seconds: Counter[str] = field(default_factory=Counter)
    """Where the time went."""

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that a block takes."""
        begin = time.perf_counter()
        yield
        self.seconds.update({what: time.perf_counter() - begin})


@dataclass(frozen=True)
class Server:
    """Where the catalog is."""

    uri: str
    api_key: str | None = field(repr=False)


@dataclass(frozen=True)
class Work:
    """What a worker must know of a replay.

    Attributes
    ----------
    server
        Where the catalog is.
    config
        How to reduce and desmear.
    retry_failed
        Begin results again that failed.
    replay
        Name of this replay: workers may outlive it, and what they know of its catalog may not.
    """

    server: Server
    config: Config
    retry_failed: bool
    replay: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class _Reduced:
    """A run whose exposures are all reduced."""

    start: Any
    instrument: Instrument
    pairing: Pairing | None
    prepared: PreparedExposures
    curves: xr.Dataset
    access_tags: list[str] | None


class Batches:
    """What a worker keeps from batch to batch: the operators of the direct beams.

    Two threads may do batches at the same time: one computes while the other waits for the server.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    config
        How to reduce and desmear.
    retry_failed
        Begin results again that failed.
    """

    def __init__(self, client: Any, config: Config, *, retry_failed: bool = False) -> None:
        self._client, self._raw, self._kind = client, mount(client, "raw"), config.kind
        beams = DirectBeams(self._raw, config, max_age=MAX_BEAM_AGE)
        self._runs = SampleRuns(client, config, beams, replace_failed=retry_failed)
        self._lock = threading.Lock()

    def do(self, uids: Sequence[str]) -> Done:
        """Desmear runs and store the results.

        Raises
        ------
        CATALOG_AWAY
            If the catalog does not answer; the runs may be done again, what was stored stays.
        """
        done = Done(runs=len(uids))
        nodes, frames = self._read(uids, done)
        with self._lock:
            finished = self._finished(nodes, frames)
        with done.timed("storing"):
            there = store_together(self._client, finished.values())
        done.stored = len(finished) - len(there)
        # What is in the way may be a failure, or left behind by a worker that is gone.
        again = {uid for uid, result in finished.items() if result.key in there}
        with self._lock:
            for uid, node in nodes.items():
                if uid not in finished or uid in again:
                    self._one(node, done)
            self._settle(done)
        done.there += len(uids) - len(nodes)
        return done

    def check(self, uids: Sequence[str]) -> Done:
        """Desmear runs that were done before, and compare with what is stored; nothing is written."""
        done = Done(runs=len(uids))
        results = mount(self._client, self._kind.mount)
        nodes, frames = self._read(uids, done)
        with self._lock:
            finished = self._finished(nodes, frames)
            self._settle(done)
        for result in finished.values():
            stored = lookup(results, result.key)
            if stored is None or stored.metadata["status"] != "complete":
                continue
            difference = _difference(stored.read(), result.dataset, *self._kind.compared)
            if difference <= SAME:
                done.same += 1
            else:
                done.different[result.key] = difference
        return done

    def _read(self, uids: Sequence[str], done: Done) -> tuple[dict[str, Any], dict[str, RawFrames | BadInput]]:
        """Look runs up together, those that have ended, and where their frames are."""
        with done.timed("preparing"):
            found = self._raw.search(KeysFilter(list(uids))).items()
            nodes = {uid: node for uid, node in found if node.metadata.get("stop") is not None}
            return nodes, raw_frames_of(self._raw, nodes) if nodes else {}

    def _finished(self, nodes: Mapping[str, Any], frames: Mapping[str, RawFrames | BadInput]) -> dict[str, Finished]:
        """Desmear what is in order, by uid."""
        groups: dict[int, list[_Reduced]] = {}
        times = [node.metadata["start"]["time"] for node in nodes.values()]
        if times:
            self._runs.beams.list_once(min(times), max(times))
        for run in (self._reduced(node, frames[uid]) for uid, node in nodes.items()):
            if run is not None:
                groups.setdefault(id(run.prepared), []).append(run)
        return {run.start["uid"]: result for group in groups.values() for run, result in self._desmeared(group)}

    def _reduced(self, node: Any, frames: RawFrames | BadInput) -> _Reduced | None:
        """Read and reduce a run; None if anything is out of the ordinary."""
        timed = self._runs.statistics.timed
        try:
            with timed("preparing"):
                exposures = _exposures(node, frames)
                instrument = exposures[0].instrument if exposures else None
                if instrument is None or len(exposures) > BATCH:
                    return None
                pairing = self._runs.beams.find(exposures[0])
                prepared = self._runs.beams.prepared(pairing, instrument)
            with timed("reducing"):
                curves = concat_exposures([reduced(exposure, instrument, prepared) for exposure in exposures])
        except CATALOG_AWAY:
            raise
        except Exception as error:
            logger.debug("Run %s is done by itself: %s", node.item["id"], error)
            return None
        return _Reduced(node.metadata["start"], instrument, pairing, prepared, curves, access_tags_of(node))

    def _desmeared(self, group: Sequence[_Reduced]) -> Iterator[tuple[_Reduced, Finished]]:
        """Desmear runs of one operator together; leave out those with an exposure that failed."""
        try:
            with self._runs.statistics.timed("desmearing"):
                result = group[0].prepared.answer(concat_exposures([run.curves for run in group]))
        except BadInput as error:
            logger.debug("A batch is done run by run: %s", error)
            return
        first = 0
        for run in group:
            part = result.isel(exposure=slice(first, first + run.curves.sizes["exposure"]))
            first += part.sizes["exposure"]
            if (part["status"] == "ok").all():
                key, metadata = self._runs.identity(run.start, run.instrument, run.pairing, run.prepared, REPLAYED)
                yield run, Finished(key, metadata, part, run.access_tags)

    def _one(self, node: Any, done: Done) -> None:
        """Do a run as live work does."""
        statistics = self._runs.statistics
        there, exposures = statistics.stored_before, statistics.exposures
        uid, start = node.item["id"], node.metadata["start"]
        try:
            found = exposures_of_documents(node.documents())
            self._runs.add(found, patient=False, deferred=REPLAYED)
            if not found:
                self._runs.fail(start, BadInput("The run holds no exposure: no stream with images in files."))
        except CATALOG_AWAY:
            self._runs.release(uid)  # whoever does it next may be another process
            raise
        except Exception as error:
            self._runs.fail(start, error)
        self._runs.finish(uid)
        if statistics.stored_before > there:
            done.there += 1
        elif statistics.exposures > exposures:
            done.stored += 1

    def _settle(self, done: Done) -> None:
        """Move what was counted since the last batch to its account."""
        statistics = self._runs.statistics
        done.failed.update(statistics.reasons)
        statistics.reasons.clear()
        done.seconds.update(statistics.seconds)
        statistics.seconds = dict.fromkeys(statistics.seconds, 0.0)


def _exposures(node: Any, frames: RawFrames | BadInput) -> list[Exposure]:
    """Name the exposures of a run: where its frames lie as usual, as the catalog does, else as its documents do."""
    found = frames.exposures() if isinstance(frames, RawFrames) else None
    return found or exposures_of_documents(node.documents())


def _difference(stored: xr.Dataset, again: xr.Dataset, value: str, error: str) -> float:
    """Return the largest difference of a variable in stated errors; infinite where the two are not alike."""
    if stored[value].shape != again[value].shape:
        return np.inf
    away = np.abs(stored[value].values - again[value].values) / again[error].values
    return float(np.nanmax(away)) if np.isfinite(away).any() else np.inf


_known: LRUCache[str, Batches] = LRUCache(4)
_making = threading.Lock()


def _batches(work: Work) -> Batches:
    """Return what this process keeps for a replay."""
    with _making:
        if work.replay not in _known:
            import torch
            from tiled.client import from_uri

            torch.set_num_threads(1)  # there is a worker for each core
            client = from_uri(work.server.uri, api_key=work.server.api_key)
            _known[work.replay] = Batches(client, work.config, retry_failed=work.retry_failed)
        return _known[work.replay]


def do(work: Work, uids: Sequence[str]) -> Done | KeyRefused:
    """Do a batch in a worker's process; see `Batches.do`."""
    return _unless_refused(lambda: _batches(work).do(uids))


def check(work: Work, uids: Sequence[str]) -> Done | KeyRefused:
    """Check a batch in a worker's process; see `Batches.check`."""
    return _unless_refused(lambda: _batches(work).check(uids))


def _unless_refused(task: Callable[[], Done]) -> Done | KeyRefused:
    """Give a refusal of the key back: the error cannot be pickled, and of one that is raised dask prints a traceback."""
    try:
        return task()
    except CATALOG_AWAY as error:
        if refusal := key_refused(error):
            return refusal
        raise

"""What a worker does with a batch of runs: read, desmear what has one operator together, store together.

Whatever is out of the ordinary, from a missing file to a run of a thousand exposures, is done by
`callbacks.sample_runs`, run by run, as live work is; failures become results there.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from tiled.queries import In

from dsnet_bluesky.callbacks.desmear import MAX_BEAM_AGE
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.callbacks.pairing import DirectBeams, Pairing
from dsnet_bluesky.callbacks.sample_runs import BATCH, CATALOG_AWAY, SampleRuns, reduced
from dsnet_bluesky.data import BadInput, concat_exposures
from dsnet_bluesky.derived import Finished, access_tags_of, lookup, mount, raw_frames, store_together
from dsnet_bluesky.documents import Exposure, Instrument
from dsnet_bluesky.pipeline import Config, PreparedExposures

__all__ = ["Batches", "Done", "Server", "check", "do"]

logger = logging.getLogger(__name__)

REPLAYED = "Replayed from the catalog."
"""What a result says of why it came later than its run."""

SAME = 1e-3
"""Largest difference of I, in stated errors, that counts as floating-point noise."""


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
    """Those that are not: the key, and the largest difference of I in stated errors."""

    seconds: Counter[str] = field(default_factory=Counter)
    """Where the time went."""


@dataclass(frozen=True)
class Server:
    """Where the catalog is."""

    uri: str
    api_key: str | None = field(repr=False)


@dataclass(frozen=True)
class _Reduced:
    """A run whose exposures are all reduced."""

    start: Any
    instrument: Instrument
    pairing: Pairing
    prepared: PreparedExposures
    curves: xr.Dataset
    access_tags: list[str] | None


class Batches:
    """What a worker keeps from batch to batch: the operators of the direct beams.

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
        self._client, self._raw = client, mount(client, "raw")
        beams = DirectBeams(self._raw, config, max_age=MAX_BEAM_AGE)
        self._runs = SampleRuns(client, config, beams, replace_failed=retry_failed)

    def do(self, uids: Sequence[str]) -> Done:
        """Desmear runs and store the results.

        Raises
        ------
        CATALOG_AWAY
            If the catalog does not answer; the runs may be done again, what was stored stays.
        """
        done = Done(runs=len(uids))
        nodes = self._nodes(uids)
        finished = self._finished(list(nodes.values()))
        with self._runs.statistics.timed("storing"):
            there = store_together(self._client, finished.values())
        done.stored = len(finished) - len(there)
        # What is in the way may be a failure, or left behind by a worker that is gone.
        again = {uid for uid, result in finished.items() if result.key in there}
        for uid, node in nodes.items():
            if uid not in finished or uid in again:
                self._one(node, done)
        done.there += len(uids) - len(nodes)
        self._settle(done)
        return done

    def check(self, uids: Sequence[str]) -> Done:
        """Desmear runs that were done before, and compare with what is stored; nothing is written."""
        done = Done(runs=len(uids))
        results = mount(self._client, "desmeared")
        for result in self._finished(list(self._nodes(uids).values())).values():
            stored = lookup(results, result.key)
            if stored is None or stored.metadata["status"] != "complete":
                continue
            difference = _difference(stored.read(), result.dataset)
            if difference <= SAME:
                done.same += 1
            else:
                done.different[result.key] = difference
        self._settle(done)
        return done

    def _nodes(self, uids: Sequence[str]) -> dict[str, Any]:
        """Look runs up together, those that have ended."""
        with self._runs.statistics.timed("preparing"):
            found = self._raw.search(In("uid", list(uids))).items()
            return {uid: node for uid, node in found if node.metadata.get("stop") is not None}

    def _finished(self, nodes: Sequence[Any]) -> dict[str, Finished]:
        """Desmear what is in order, by uid."""
        groups: dict[int, list[_Reduced]] = {}
        times = [node.metadata["start"]["time"] for node in nodes]
        with self._runs.beams.listed(min(times, default=0.0), max(times, default=0.0)):
            for run in filter(None, map(self._reduced, nodes)):
                groups.setdefault(id(run.prepared), []).append(run)
        return {run.start["uid"]: result for group in groups.values() for run, result in self._desmeared(group)}

    def _reduced(self, node: Any) -> _Reduced | None:
        """Read and reduce a run; None if anything is out of the ordinary."""
        timed = self._runs.statistics.timed
        try:
            with timed("preparing"):
                exposures = _exposures(node)
                instrument = exposures[0].instrument if exposures else None
                if instrument is None or len(exposures) > BATCH:
                    return None
                pairing = self._runs.beams.find(exposures[0])
                prepared = self._runs.beams.prepared(pairing.beam, instrument)
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
                result = group[0].prepared.desmear(concat_exposures([run.curves for run in group]))
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
            self._runs.drop(uid)
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


def _exposures(node: Any) -> list[Exposure]:
    """Read the exposures of a run: with two requests where they lie as usual, else from its documents."""
    try:
        found = raw_frames(node).exposures()
    except BadInput:
        found = None
    return found or exposures_of_documents(node.documents())


def _difference(stored: xr.Dataset, again: xr.Dataset) -> float:
    """Return the largest difference of I in stated errors; infinite where the two are not alike."""
    if stored["I"].shape != again["I"].shape:
        return np.inf
    away = np.abs(stored["I"].values - again["I"].values) / again["Idev"].values
    return float(np.nanmax(away)) if np.isfinite(away).any() else np.inf


_known: dict[tuple[Server, str, str, str, bool], Batches] = {}


def _batches(server: Server, config: Config, retry_failed: bool) -> Batches:
    """Return what this process keeps for a catalog and a configuration."""
    model = config.load_model()
    key = (server, config.sha256, model.sha256 if model else "", config.device, retry_failed)
    if key not in _known:
        os.environ.setdefault("TILED_RETRY_ATTEMPTS", "1")  # whoever hands out the batches is patient
        import torch
        from tiled.client import from_uri

        torch.set_num_threads(1)  # there is a worker for each core
        _known[key] = Batches(from_uri(server.uri, api_key=server.api_key), config, retry_failed=retry_failed)
    return _known[key]


def do(server: Server, config: Config, retry_failed: bool, uids: Sequence[str]) -> Done:
    """Do a batch in a worker's process; see `Batches.do`."""
    return _batches(server, config, retry_failed).do(uids)


def check(server: Server, config: Config, retry_failed: bool, uids: Sequence[str]) -> Done:
    """Check a batch in a worker's process; see `Batches.check`."""
    return _batches(server, config, retry_failed).check(uids)

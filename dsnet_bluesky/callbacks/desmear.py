"""Desmear exposures while the plan that takes them runs.

The RunEngine's thread only puts documents into a queue. Everything else, from
reading a frame to writing a result, happens on a worker's thread, and nothing
that goes wrong there reaches the plan: it becomes a result that says what went
wrong. Documents that find the queue full are not lost: their run is done from
the catalog, after its end.
"""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from dsnet_bluesky import derived
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import AlreadyStored, ResultWriter
from dsnet_bluesky.documents import Exposure, Instrument, change_within, purpose, result_key, result_metadata
from dsnet_bluesky.frames import NotYet
from dsnet_bluesky.pipeline import Config, PreparedExposures

from .exposures import ExposureRouter, exposures_of_documents
from .pairing import DirectBeam, DirectBeams, summed
from .worker import Deferred, Worker

__all__ = ["DesmearCallback", "Statistics", "desmear_runs"]

logger = logging.getLogger(__name__)

ATTEMPTS = 40
"""Times that a run is tried from the catalog before it is given up: an outage of some minutes is survived."""

READ_ATTEMPTS = 5
"""Times that a run is tried from the catalog while its files are not there yet; then that is its result."""

RETRY_INTERVAL = 10.0
"""Seconds between two attempts, at most."""

EXIT_TIMEOUT = 20.0
"""Seconds for which a script that ends waits for what is still to do."""

CATALOG_AWAY = (httpx.TransportError, ConnectionError)
"""What a client raises when its server does not answer."""


@dataclass
class Statistics:
    """What a `DesmearCallback` has done so far."""

    runs: int = 0
    """Sample runs finished, failed ones included."""

    exposures: int = 0
    """Exposures desmeared."""

    failed: int = 0
    """Exposures and runs that could not be desmeared."""

    deferred: int = 0
    """Runs done from the catalog, because the queue was full, the catalog did not answer, or their start was missed."""

    stored_before: int = 0
    """Runs whose result was there already."""

    errors: int = 0
    """Errors of this program, not of the input."""

    abandoned: list[str] = field(default_factory=list)
    """Runs that the catalog did not give back; do them later with `desmear_runs`."""


@dataclass
class _Work:
    """A sample run in progress."""

    start: Mapping[str, Any]
    detector: tuple[str, str] | None = None
    beam: DirectBeam | None = None
    instrument: Instrument | None = None
    prepared: PreparedExposures | None = None
    writer: ResultWriter | None = None
    done: int = 0
    closed: bool = False


class DesmearCallback:
    """Pair sample exposures with their direct beam, desmear them and store the results, live.

    Parameters
    ----------
    client
        Tiled client of the server's root, which holds ``/raw`` and ``/desmeared``.
    config
        How to reduce and desmear.
    queue_size
        Documents that may wait; further ones put their run off to its end.
    max_beam_age
        A sample that names no direct beam gets none older than this, in s.
    data_key
        Detector to use; the first one of a run with images if not given.
    retry_interval
        What was put off is tried again and again, at first soon, later at this interval, in s.
    replace_failed
        Do runs again whose result is there and says that it failed.

    Examples
    --------
    >>> desmear = DesmearCallback(client)                  # doctest: +SKIP
    >>> RE.subscribe(TiledWriter(client["raw"], batch_size=1)), RE.subscribe(desmear)   # doctest: +SKIP
    >>> RE(desmearing_scan(...))                           # doctest: +SKIP
    >>> desmear.wait(60), desmear.statistics               # doctest: +SKIP
    """

    def __init__(
        self,
        client: Any,
        *,
        config: Config | None = None,
        queue_size: int = 10_000,
        max_beam_age: float = 86_400.0,
        data_key: str | None = None,
        retry_interval: float = RETRY_INTERVAL,
        replace_failed: bool = False,
    ):
        self.statistics = Statistics()
        self._client = client
        self._raw = client["raw"]
        self._config = config or Config()
        self._data_key = data_key
        self._retry_interval = retry_interval
        self._replace_failed = replace_failed
        self._beams = DirectBeams(self._raw, self._config, max_age=max_beam_age)
        self._router = ExposureRouter(self._take)
        self._work: dict[str, _Work] = {}
        # Shared with the RunEngine's thread; each operation on them is atomic.
        self._open: dict[str, None] = {}
        self._put_off: dict[str, None] = {}
        self._ended: deque[str] = deque()
        self._later: dict[tuple[str, str], Deferred] = {}
        self._worker = Worker(self._handle, self._catch_up, self._settled, size=queue_size, name="desmear")
        atexit.register(self._at_exit)

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document: put it into the queue and return. Never raises, never waits."""
        if name == "start":
            self._open[doc["uid"]] = None
        if not self._worker.offer((name, doc)):
            # Which run a document belongs to is not always written in it: put off all that are open.
            self._put_off.update(self._open)
        if name == "stop":
            self._open.pop(doc["run_start"], None)
            if doc["run_start"] in self._put_off:
                self._ended.append(doc["run_start"])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything handed in so far is desmeared and stored; False when the time is over."""
        return self._worker.wait(timeout)

    def close(self, timeout: float = 60.0) -> bool:
        """Finish what is queued or put off and stop the worker; False if `timeout` seconds do not suffice.

        What is not finished is logged; do it later with `desmear_runs`.
        """
        atexit.unregister(self._at_exit)
        done = self._worker.close(timeout)
        unfinished = self._unfinished()
        if done and not unfinished:
            return True
        logger.warning(
            "Closed with %d documents and these runs unfinished: %s. Do them with desmear_runs.",
            self._worker.pending,
            ", ".join(unfinished) or "none",
        )
        if self._worker.stopped:
            for run_uid in unfinished:
                self._drop(run_uid)
        return False

    def _at_exit(self) -> None:
        """Finish what a script that ends has left to do."""
        if self._worker.pending or not self._settled():
            self.close(EXIT_TIMEOUT)

    def _settled(self) -> bool:
        """Whether nothing is put off any more, except runs that have not ended."""
        return not (self._ended or self._later)

    def _unfinished(self) -> list[str]:
        """Runs whose work is not done, each once."""
        return list(dict.fromkeys([*self._ended, *(uid for _, uid in list(self._later)), *list(self._work)]))

    # -- on the worker's thread --

    def _handle(self, item: tuple[str, Mapping[str, Any]]) -> None:
        name, doc = item
        try:
            self._router(name, dict(doc))
        except KeyError:
            # This document's run began before we listened, or its start was put off.
            logger.debug("A %s document of an unknown run; its run is done from the catalog.", name)
            if name == "stop":
                self._put_off[doc["run_start"]] = None
                self._later.setdefault(("run", doc["run_start"]), Deferred())
            return
        if name == "stop":
            self._stop(doc["run_start"])

    def _stop(self, run_uid: str) -> None:
        try:
            if run_uid not in self._put_off:
                self._finish(run_uid)
        except CATALOG_AWAY as error:
            logger.warning("The catalog does not answer (%s); run %s is put off.", error, run_uid)
            self._put_off[run_uid] = None
        if run_uid in self._put_off:
            self._later.setdefault(("run", run_uid), Deferred())

    def _take(self, exposure: Exposure) -> None:
        """Handle an exposure of a live run."""
        if exposure.run_uid in self._put_off:
            return
        try:
            self._process(exposure, patient=True)
        except (NotYet, *CATALOG_AWAY) as error:
            what = "A file is not there yet" if isinstance(error, NotYet) else "The catalog does not answer"
            logger.warning("%s (%s); run %s is put off.", what, error, exposure.run_uid)
            self._put_off[exposure.run_uid] = None

    def _process(self, exposure: Exposure, *, patient: bool) -> None:
        """Do with an exposure what its run is for; if `patient`, a file that is not there yet raises NotYet."""
        if self._data_key not in (None, exposure.data_key):
            return
        what = purpose(exposure.start)
        if what == "direct_beam":
            self._beams.add(exposure)
        elif what == "sample":
            work = self._work.setdefault(exposure.run_uid, _Work(exposure.start))
            work.detector = work.detector or (exposure.stream, exposure.data_key)
            if work.detector == (exposure.stream, exposure.data_key) and exposure.index >= work.done and not work.closed:
                self._desmear(work, exposure, patient=patient)

    def _desmear(self, work: _Work, exposure: Exposure, *, patient: bool) -> None:
        """Desmear one exposure and store it, or store why not."""
        try:
            self._append(work, exposure)
        except AlreadyStored:
            self.statistics.stored_before += 1
            work.closed = True
        except CATALOG_AWAY:
            raise
        except BadInput as error:
            if patient and isinstance(error, NotYet):
                raise
            self._record_failure(work, str(error))
        except Exception as error:
            logger.exception("Desmearing exposure %d of run %s failed.", exposure.index, exposure.run_uid)
            self.statistics.errors += 1
            self._record_failure(work, f"Internal error, please report it: {type(error).__name__}: {error}")

    def _append(self, work: _Work, exposure: Exposure) -> None:
        state = exposure.instrument
        if state is None:
            raise BadInput(exposure.problem or "The exposure has no geometry.")
        if work.prepared is None:
            work.instrument = state
            work.beam = self._beams.find(exposure)
            work.prepared = self._beams.prepared(work.beam, state)
        assert work.instrument is not None
        changed = change_within(work.instrument, state)
        if changed:
            raise BadInput(f"The instrument was changed within the run ({changed}); expose it in a run of its own.")
        writer = self._writer(work)
        number = (exposure.frames.stop or 1) - exposure.frames.start
        result = work.prepared(
            summed(exposure), time=state.exposure_time * number, monitor=state.monitor, transmission=state.transmission
        )
        writer.append(result)
        work.done += 1
        self.statistics.exposures += 1

    def _record_failure(self, work: _Work, reason: str) -> None:
        """Store why an exposure failed: as a row where the run has an operator, else as the whole result."""
        self.statistics.failed += 1
        try:
            writer = self._writer(work)
            if work.prepared is None:
                writer.fail(reason)
                work.closed = True
            else:
                writer.append_failure(reason)
                work.done += 1
        except AlreadyStored:
            work.closed = True

    def _writer(self, work: _Work) -> ResultWriter:
        """Return the writer of a run's result; the first call creates the node."""
        if work.writer is None:
            work.writer = self._create(work)
        return work.writer

    def _create(self, work: _Work) -> ResultWriter:
        prepared = work.prepared
        beam_uid = work.beam.run_uid if work.beam else work.start.get("direct_beam_uid")
        model = {
            "model_name": prepared.model_name if prepared else "",
            "model_version": prepared.model_version if prepared else "",
            "model_sha256": prepared.model_sha256 if prepared else "",
        }
        config = self._beams.config_for(work.instrument) if work.instrument else self._config
        metadata = result_metadata(
            work.start,
            direct_beam_uid=beam_uid,
            config=config.to_dict(),
            config_sha256=config.sha256,
            method=config.method_name,
            **model,
        )
        return ResultWriter.create(
            self._client,
            result_key(work.start["uid"], beam_uid, config.sha256, model["model_sha256"]),
            metadata,
            access_tags=work.start.get("tiled_access_tags"),
            replace_failed=self._replace_failed,
        )

    def _finish(self, run_uid: str) -> None:
        """Complete the result of a run that has stopped; what is served of the run is registered when it is quiet."""
        self._later[("served", run_uid)] = Deferred()
        work = self._work.get(run_uid)
        if work is None:
            return
        if work.writer is not None and not work.closed:
            work.writer.complete()
        self.statistics.runs += 1
        del self._work[run_uid]

    # -- when the queue is empty: what was put off --

    def _catch_up(self) -> None:
        """Do what was put off: runs that have ended, from the catalog, and the registration of what is served."""
        while self._ended:
            self._later.setdefault(("run", self._ended[0]), Deferred())
            self._ended.popleft()  # last, so that `_settled` never misses it
        for (what, run_uid), deferred in list(self._later.items()):
            if not deferred.due:
                continue
            done = self._attempt(what, run_uid, patient=deferred.attempts + 1 < READ_ATTEMPTS)
            if not done and deferred.again(self._retry_interval) >= ATTEMPTS:
                self._give_up(run_uid)
                done = True
            if done:
                del self._later[what, run_uid]

    def _attempt(self, what: str, run_uid: str, *, patient: bool) -> bool:
        """Do something with a run of the catalog; False if it is worth another attempt."""
        try:
            return self._from_catalog(run_uid, patient=patient) if what == "run" else self._register(run_uid)
        except (KeyError, *CATALOG_AWAY) as error:
            # The run may still be on its way into the catalog, or the catalog away.
            logger.debug("Run %s cannot be had from the catalog yet (%r).", run_uid, error)
            return False
        except BadInput as error:
            if patient and isinstance(error, NotYet):
                return False
            logger.warning("Run %s: %s", run_uid, error)
        except Exception:
            logger.exception("Run %s could not be handled.", run_uid)
            self.statistics.errors += 1
            self._give_up(run_uid)
        return True

    def _give_up(self, run_uid: str) -> None:
        logger.warning("Run %s is given up; do it later with desmear_runs.", run_uid)
        self.statistics.abandoned.append(run_uid)
        self._drop(run_uid)

    def _drop(self, run_uid: str) -> None:
        """Forget a run and leave its result to whoever begins it again."""
        work = self._work.pop(run_uid, None)
        self._put_off.pop(run_uid, None)
        if work is not None and work.writer is not None:
            work.writer.abandon()

    def _register(self, run_uid: str) -> bool:
        run = self._raw[run_uid]
        if run.metadata.get("stop") is None:
            return False
        if purpose(run.metadata["start"]) is not None:
            derived.register(self._client, run)
        return True

    def _from_catalog(self, run_uid: str, *, patient: bool) -> bool:
        """Do a run from the catalog, from where it was left; False if it has not ended there yet."""
        run = self._raw[run_uid]
        if run.metadata.get("stop") is None:
            return False
        for exposure in exposures_of_documents(run.documents()):
            self._process(exposure, patient=patient)
        self._finish(run_uid)
        self._put_off.pop(run_uid, None)
        self.statistics.deferred += 1
        return True


def desmear_runs(client: Any, uids: Iterable[str], *, config: Config | None = None, retry_interval: float = 1.0) -> Statistics:
    """Desmear runs of the catalog as if they were taken now, and wait until they are stored.

    Results that failed, or that were abandoned, are begun again; complete ones stay.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    uids
        Runs of ``/raw``.
    config
        How to reduce and desmear.
    retry_interval
        As for `DesmearCallback`; shorter, because files and runs are not on their way any more.

    Returns
    -------
    Statistics
        What was done; failures are results that say why.
    """
    callback = DesmearCallback(client, config=config, retry_interval=retry_interval, replace_failed=True)
    try:
        for uid in uids:
            for name, doc in client["raw"][uid].documents():
                callback(name, doc)
            callback.wait()  # one run at a time: the queue is bounded, and archived documents come fast
    finally:
        callback.close()
    return callback.statistics

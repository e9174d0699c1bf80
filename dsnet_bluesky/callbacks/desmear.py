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
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from dsnet_bluesky import derived
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Exposure, purpose
from dsnet_bluesky.frames import NotYet
from dsnet_bluesky.pipeline import Config

from .exposures import ExposureRouter, exposures_of_documents
from .pairing import DirectBeams
from .sample_runs import BATCH, CATALOG_AWAY, SampleRuns, Statistics, key_refused
from .worker import Deferred, Worker

__all__ = ["DesmearCallback", "desmear_runs"]

logger = logging.getLogger(__name__)

ATTEMPTS = 40
"""Times that a run is tried from the catalog before it is given up: an outage of some minutes is survived."""

READ_ATTEMPTS = 5
"""Times that a run is tried from the catalog while its files are not there yet; then that is its result."""

RETRY_INTERVAL = 10.0
"""Seconds between two attempts, at most."""

SILENCE = 30.0
"""Seconds without an exposure of a run after which the catalog is asked whether it has ended: a network loses stop documents."""

REFUSED_AFTER = 0.2
"""Seconds between two looks whether the catalog refuses the key of `desmear_runs`."""

EXIT_TIMEOUT = 20.0
"""Seconds for which a script that ends waits for what is still to do."""

MAX_BEAM_AGE = 86_400.0
"""Seconds after which a direct beam is not used for a sample that names none."""

RUN_ENGINE = "bluesky-run-engine"
"""Name of the RunEngine's thread, which is never held up."""


class DesmearCallback:
    """Pair sample exposures with their direct beam, desmear them and store the results, live.

    Parameters
    ----------
    client
        Tiled client of the server's root, which holds ``/raw`` and ``/desmeared``.
    config
        How to reduce and desmear.
    queue_size
        Documents that may wait.
    overflow
        What becomes of further ones: "defer" puts their run off to its end, when it is done from the catalog, whose result
        says so; "block" holds up whoever hands them in, unless that is a RunEngine, whose runs are deferred.
    max_beam_age
        A sample that names no direct beam gets none older than this, in s.
    direct_beam
        Uid of the direct beam that every sample gets, whatever its run names.
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
        overflow: Literal["defer", "block"] = "defer",
        max_beam_age: float = MAX_BEAM_AGE,
        direct_beam: str | None = None,
        data_key: str | None = None,
        retry_interval: float = RETRY_INTERVAL,
        replace_failed: bool = False,
    ):
        if overflow not in ("defer", "block"):
            raise BadInput(f"overflow is {overflow!r}; give 'defer' or 'block'.")
        self._client, self._raw = client, client["raw"]
        self._retry_interval = retry_interval
        self._overflow = overflow
        config = config or Config()
        beams = DirectBeams(self._raw, config, max_age=max_beam_age, by_hand=direct_beam)
        self._runs = SampleRuns(client, config, beams, data_key=data_key, replace_failed=replace_failed)
        self._router = ExposureRouter(self._take)
        self._batch: list[Exposure] = []
        # Shared with the RunEngine's thread; each operation on them is atomic.
        self._open: dict[str, None] = {}
        self._put_off: dict[str, str] = {}
        self._ended: deque[str] = deque()
        self._later: dict[tuple[str, str], Deferred] = {}
        self._refused: BadInput | None = None
        # Of the worker's thread alone: when the runs whose stop has not come were last heard of.
        self._heard: dict[str, float] = {}
        self._worker = Worker(self._handle, self._catch_up, self._settled, size=queue_size, name="desmear")
        atexit.register(self._at_exit)

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        return self._runs.statistics

    @property
    def pending(self) -> int:
        """Documents that wait."""
        return self._worker.pending

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document: put it into the queue and return. Never raises, never holds a RunEngine up."""
        if name == "start":
            self._open[doc["uid"]] = None
        block = self._overflow == "block" and threading.current_thread().name != RUN_ENGINE
        if not self._worker.offer((name, doc), block=block):
            # Which run a document belongs to is not always written in it: put off all that are open.
            self._put_off.update(dict.fromkeys(self._open, f"The queue of documents was full (overflow: {self._overflow})."))
        if name == "stop":
            self._open.pop(doc["run_start"], None)
            if doc["run_start"] in self._put_off:
                self._ended.append(doc["run_start"])

    @property
    def refused(self) -> BadInput | None:
        """Why the catalog does not let this process write, if that was its last answer."""
        return self._refused

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
            told = True
            for run_uid in unfinished:
                told = self._drop(run_uid, tell=told)  # a catalog that is away is asked once
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
        return list(dict.fromkeys([*self._ended, *(uid for _, uid in list(self._later)), *self._runs.open]))

    # -- on the worker's thread --

    def _handle(self, item: tuple[str, Mapping[str, Any]]) -> None:
        name, doc = item
        if name == "start":
            self._heard[doc["uid"]] = time.monotonic()
        try:
            self._router(name, dict(doc))
        except KeyError:
            # This document's run began before we listened, or its start was put off.
            logger.debug("A %s document of an unknown run; its run is done from the catalog.", name)
            if name == "stop":
                self._put_off[doc["run_start"]] = "The run began before anybody listened."
                self._later.setdefault(("run", doc["run_start"]), Deferred())
            return
        # One exposure at once while nothing waits, many together when behind.
        if name == "stop" or self._worker.pending <= 1:
            self._do_batch()
        if name == "stop":
            self._runs.beams.end(doc)
            if self._runs.missing(doc):
                self._put_off.setdefault(doc["run_start"], "Documents were missing.")
            self._stop(doc["run_start"])

    def _take(self, exposure: Exposure) -> None:
        """Put an exposure of a live run to those that are done together."""
        if self._batch and (self._batch[0].run_uid != exposure.run_uid or len(self._batch) >= BATCH):
            self._do_batch()
        self._batch.append(exposure)
        self._heard[exposure.run_uid] = time.monotonic()

    def _do_batch(self) -> None:
        exposures, self._batch = self._batch, []
        if not exposures or exposures[0].run_uid in self._put_off:
            return
        run_uid = exposures[0].run_uid
        try:
            self._runs.add(exposures, patient=True)
        except (NotYet, *CATALOG_AWAY) as error:
            self._put_run_off(run_uid, error)
        except Exception as error:
            logger.exception("Run %s is put off by an error that nothing was prepared for.", run_uid)
            self.statistics.errors += 1
            self._put_off[run_uid] = f"{type(error).__name__}: {error}"

    def _stop(self, run_uid: str) -> None:
        self._heard.pop(run_uid, None)
        try:
            if run_uid not in self._put_off:
                self._runs.finish(run_uid)
                self._later[("served", run_uid)] = Deferred()
        except CATALOG_AWAY as error:
            self._put_run_off(run_uid, error)
        if run_uid in self._put_off:
            self._later.setdefault(("run", run_uid), Deferred())

    def _put_run_off(self, run_uid: str, error: Exception) -> None:
        self._refused = key_refused(error)
        what = "A file was not there yet" if isinstance(error, NotYet) else "The catalog did not answer"
        logger.warning("%s (%s); run %s is put off.", what, error, run_uid)
        self._put_off[run_uid] = f"{what}."

    # -- when the queue is empty: what was put off --

    def _catch_up(self) -> None:
        """Do what was put off: runs that have ended, from the catalog, and the registration of what is served."""
        while self._ended:
            self._later.setdefault(("run", self._ended[0]), Deferred())
            self._ended.popleft()  # last, so that `_settled` never misses it
        self._put_silent_off()
        self._runs.keep_claims()
        for (what, run_uid), deferred in list(self._later.items()):
            if not deferred.due:
                continue
            done = self._attempt(what, run_uid, patient=deferred.attempts + 1 < READ_ATTEMPTS)
            if not done and deferred.again(self._retry_interval) >= ATTEMPTS:
                self._give_up(run_uid)
                done = True
            if done:
                del self._later[what, run_uid]

    def _put_silent_off(self) -> None:
        """Put runs off whose stop document was lost: they have ended in the catalog, or are not there any more."""
        now = time.monotonic()
        for run_uid, heard in list(self._heard.items()):
            if now - heard < SILENCE:
                continue
            self._heard[run_uid] = now
            try:
                run = derived.lookup(self._raw, run_uid)
            except CATALOG_AWAY as error:
                logger.debug("Run %s is not heard of, and the catalog cannot be asked (%r).", run_uid, error)
                return
            # One without a result may still be on its way into the catalog.
            gone = run is None and run_uid in self._runs.open
            if gone or (run is not None and run.metadata.get("stop") is not None):
                del self._heard[run_uid]
                self._open.pop(run_uid, None)
                self._put_off.setdefault(run_uid, "Its stop document did not come.")
                self._later.setdefault(("run", run_uid), Deferred())

    def _attempt(self, what: str, run_uid: str, *, patient: bool) -> bool:
        """Do something with a run of the catalog; False if it is worth another attempt."""
        try:
            if what != "run":
                return self._register(run_uid)
            done = self._from_catalog(run_uid, patient=patient)
            self._refused = None
            return done
        except (KeyError, *CATALOG_AWAY) as error:
            # The run may still be on its way into the catalog, or the catalog away.
            if what == "run":  # what is served of it may be for others to register
                self._refused = key_refused(error)
            logger.debug("Run %s cannot be had from the catalog yet (%r).", run_uid, error)
            return False
        except BadInput as error:
            if patient and isinstance(error, NotYet):
                return False
            logger.warning("Run %s: %s", run_uid, error)
        except Exception:
            if patient:
                return False
            logger.exception("Run %s could not be handled.", run_uid)
            self.statistics.errors += 1
            self._give_up(run_uid)
        return True

    def _give_up(self, run_uid: str) -> None:
        logger.warning("Run %s is given up; do it later with desmear_runs.", run_uid)
        self.statistics.abandoned.append(run_uid)
        self._drop(run_uid)

    def _drop(self, run_uid: str, *, tell: bool = True) -> bool:
        """Forget a run and leave its result to whoever begins it again; whether the catalog, by which others know, was told."""
        self._heard.pop(run_uid, None)
        self._put_off.pop(run_uid, None)
        if tell:
            return self._runs.release(run_uid)
        self._runs.drop(run_uid)
        return False

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
        reason = self._put_off.get(run_uid)
        self._runs.add(exposures_of_documents(run.documents()), patient=patient, deferred=reason)
        self._runs.finish(run_uid)
        self._later[("served", run_uid)] = Deferred()
        self._heard.pop(run_uid, None)
        self._put_off.pop(run_uid, None)
        self.statistics.deferred += 1
        return True


def desmear_runs(
    client: Any,
    uids: Iterable[str],
    *,
    config: Config | None = None,
    direct_beam: str | None = None,
    retry_interval: float = 1.0,
) -> Statistics:
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
    direct_beam
        Uid of the direct beam to use, whatever the runs name. That makes a result of its own; those with others stay.
    retry_interval
        As for `DesmearCallback`; shorter, because files and runs are not on their way any more.

    Returns
    -------
    Statistics
        What was done; failures are results that say why.

    Raises
    ------
    BadInput
        If the catalog does not let the key write; or if runs have not ended, or were cut off, in the catalog, and all
        others are done.
    """
    callback = DesmearCallback(
        client, config=config, direct_beam=direct_beam, retry_interval=retry_interval, replace_failed=True, overflow="block"
    )
    growing = []
    try:
        for uid in uids:
            run = client["raw"][uid]
            if run.metadata.get("stop") is None:
                growing.append(uid)
                continue
            for name, doc in run.documents():
                callback(name, doc)
            # One run at a time: what was put off is tried before the next, unless trying again is of no use.
            while not callback.wait(REFUSED_AFTER):
                if callback.refused is not None:
                    raise callback.refused
    finally:
        callback.close(0.0 if callback.refused is not None else 60.0)
    if growing:
        raise BadInput(
            f"The catalog does not hold these runs to their end: {', '.join(growing)}. Desmear them when they have ended."
        )
    return callback.statistics

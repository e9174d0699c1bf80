"""The watcher: takes runs from the catalog, desmears them exposure by exposure, and stores the results there."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from dsnet_bluesky import derived
from dsnet_bluesky.callbacks.desmear import MAX_BEAM_AGE
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.callbacks.pairing import DirectBeams
from dsnet_bluesky.callbacks.sample_runs import CATALOG_AWAY, SampleRuns, Statistics
from dsnet_bluesky.callbacks.worker import Deferred
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import NoRawRun, RawFrames, lookup, mount, raw_frames
from dsnet_bluesky.documents import purpose
from dsnet_bluesky.frames import NotYet
from dsnet_bluesky.pipeline import Config

from .backlog import Backlog

__all__ = ["Watcher"]

logger = logging.getLogger(__name__)

SCAN_INTERVAL = 10.0
"""Seconds between two scans of what is new in the catalog: the time that a lost hint costs."""

WHOLE_SCAN_INTERVAL = 3600.0
"""Seconds between two scans of everything."""

LOOK_INTERVAL = 0.1
"""Seconds between two looks at a run that grows."""

LOOK_GROWTH = 1.05
"""Ratio of two waits in a row while it does not: an exposure of a minute is found within 2 s, one of 3 s within 0.25 s."""

LONGEST_LOOK = 2.0
"""Seconds between two looks at a run that goes on, but has not grown for a while."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts at a run whose files are not there, or while the catalog is away."""

AWAY_INTERVAL = 0.5
"""Seconds between two attempts to reach the catalog."""

READ_ATTEMPTS = 5
"""Times that a run that has ended is tried while its files are not there; then that is its result."""

RUN_ATTEMPTS = 10
"""Times that a run is tried with which the catalog or this program breaks down; then that is its result."""

UNREACHABLE = (httpx.TransportError, ConnectionError)
"""What a client raises when its server does not answer at all."""


@dataclass
class _InHand:
    """A run that the watcher follows."""

    live: bool
    found: str = ""
    """How it was found, if not by a hint."""
    waiting: float | None = field(default_factory=time.monotonic)
    """Since when it has exposures that are not done, None if it has none."""
    frames: RawFrames | None = None
    quiet: int = 0
    attempts: Deferred = field(default_factory=Deferred)
    next_look: float = 0.0


class Watcher:
    """Desmear what comes into the catalog, until told to stop.

    Several watchers may share a catalog: the result's node, which only one of them can create, is the claim.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    config
        How to reduce and desmear.
    since, max_age
        Runs that began before this time (seconds since 1970), or longer ago than so many seconds, are left alone.
    max_beam_age
        A sample that names no direct beam gets none older than this, in s.
    scan_interval
        Seconds between two scans of the backlog.

    Examples
    --------
    >>> watcher = Watcher(client)                        # doctest: +SKIP
    >>> signal.signal(signal.SIGTERM, lambda *_: watcher.stop())   # doctest: +SKIP
    >>> watcher.run()                                    # doctest: +SKIP
    """

    def __init__(
        self,
        client: Any,
        *,
        config: Config | None = None,
        since: float = 0.0,
        max_age: float = math.inf,
        max_beam_age: float = MAX_BEAM_AGE,
        scan_interval: float = SCAN_INTERVAL,
    ):
        config = config or Config()
        self._client, self._raw = client, mount(client, "raw")
        self._backlog = Backlog(client, config, since=since, max_age=max_age)
        self._runs = SampleRuns(client, config, DirectBeams(self._raw, config, max_age=max_beam_age))
        self._scan_interval = scan_interval
        self._hints: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._in_hand: dict[str, _InHand] = {}
        self._unregistered: dict[str, Deferred] = {}
        self._stopping = threading.Event()
        self._next_scan = self._next_whole_scan = 0.0
        self._subscription: Any = None
        self._listener: threading.Thread | None = None
        self.last_turn = time.monotonic()
        self.away = ""
        """Why the catalog cannot be used now; empty if it can."""

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        return self._runs.statistics

    @property
    def in_hand(self) -> int:
        """Runs that are followed now, or wait for their turn."""
        return len(self._in_hand)

    @property
    def lag(self) -> float:
        """Seconds for which the oldest exposures have waited that are not done."""
        now = time.monotonic()
        return max((now - run.waiting for run in list(self._in_hand.values()) if run.waiting is not None), default=0.0)

    def stop(self) -> None:
        """Finish the exposures in work, give up what is not finished, and let `run` return. May be called from anywhere."""
        self._stopping.set()

    def run(self) -> None:
        """Watch until `stop` is called. Errors of the catalog or of a run never end it."""
        try:
            while not self._stopping.is_set():
                self.turn()
                self._rest()
        finally:
            self._unsubscribe()
            self._release()

    def turn(self) -> None:
        """Look once at everything that is due."""
        self.last_turn = time.monotonic()
        try:
            self._take_hints()
            self._scan()
            self._look()
            self._register()
            self._runs.keep_claims()
        except CATALOG_AWAY as error:
            if not self.away:
                logger.warning("The catalog cannot be used now (%s); tried again until it can.", error)
            self.away = str(error) or type(error).__name__  # a time-out may have nothing to say
            self._unsubscribe()  # it would try to connect again without a rest, and burn a core
            self._stopping.wait(AWAY_INTERVAL)
            return
        except Exception:
            logger.exception("An error that nothing was prepared for; the watcher goes on.")
            self.statistics.errors += 1
            self._next_scan = time.monotonic() + self._scan_interval
            self._stopping.wait(AWAY_INTERVAL)
            return
        if self.away:
            logger.warning("The catalog can be used again.")
            self.away, self._next_scan = "", 0.0  # a scan at once, which subscribes anew: there were no hints meanwhile

    # -- what is to do --

    def _take_hints(self) -> None:
        with suppress(queue.Empty):
            while True:
                uid = self._hints.get_nowait()
                self._in_hand.setdefault(uid, _InHand(live=True)).next_look = 0.0

    def _scan(self) -> None:
        """Take what the catalog says is to do; the truth, where hints were lost."""
        now = time.monotonic()
        if now < self._next_scan:
            return
        if not self.away:
            self._subscribe()
        whole = now >= self._next_whole_scan
        for task in self._backlog.scan(whole=whole):
            if task.redo:
                self._runs.redo.add(task.run_uid)
            if task.run_uid not in self._in_hand:
                logger.info("Run %s: %s.", task.run_uid, task.why)
                self._in_hand[task.run_uid] = _InHand(live=False, found=f"Found in the backlog: {task.why}.")
                if task.why == "new" and not whole:
                    self._unsubscribe()  # there should have been a hint: the server may have forgotten how it counts
        self._next_scan = now + self._scan_interval
        if whole:
            self._next_whole_scan = now + WHOLE_SCAN_INTERVAL

    def _subscribe(self) -> None:
        """Ask for hints. Where there are none, scans find the runs."""
        if self._listener is not None and self._listener.is_alive():
            return
        self._unsubscribe()
        self._subscription = self._raw.subscribe()
        self._subscription.child_created.add_callback(self._on_created)
        self._subscription.child_metadata_updated.add_callback(self._on_updated)
        # Not its start_in_thread, which waits for the connection, however long that takes.
        self._listener = threading.Thread(target=self._listen, args=(self._subscription,), name="hints", daemon=True)
        self._listener.start()

    @staticmethod
    def _listen(subscription: Any) -> None:
        try:
            subscription.start()
        except Exception as error:  # of websockets, of proxies without them, of servers without a streaming cache
            logger.debug("The server gives no hints (%r); scans find the runs.", error)

    def _unsubscribe(self) -> None:
        subscription, self._subscription, self._listener = self._subscription, None, None
        if subscription is not None:
            with suppress(Exception):
                subscription.disconnect(wait=False)

    def _on_created(self, update: Any) -> None:
        if purpose((update.metadata or {}).get("start", {})) == "sample":
            self._hints.put(update.key)

    def _on_updated(self, update: Any) -> None:
        if update.key in self._in_hand:
            self._hints.put(update.key)

    # -- doing it --

    def _look(self) -> None:
        """Look at the live runs whose time has come, and at one other."""
        due = [(uid, run) for uid, run in self._in_hand.items() if time.monotonic() >= run.next_look]
        live, others = [item for item in due if item[1].live], [item for item in due if not item[1].live]
        for uid, run in live + others[:1]:
            if self._stopping.is_set():
                break
            try:
                done = self._advance(uid, run)
            except UNREACHABLE as error:
                if not isinstance(error, NoRawRun):
                    raise
                done = self._failed(uid, run, error)
            except Exception as error:
                done = self._failed(uid, run, error)
            if done:
                self._in_hand.pop(uid, None)

    def _advance(self, uid: str, run: _InHand) -> bool:
        """Do what a run has new; whether it is done with."""
        node = lookup(self._raw, uid)
        if node is None:
            self._runs.release(uid)
            return True  # deleted: a spool sends it again, and then it is new
        if node.metadata.get("stop") is not None:
            return self._end(node, run)
        run.live = True
        run.quiet = 0 if self._grow(node, run) else run.quiet + 1
        run.waiting = None
        run.attempts = Deferred()
        run.next_look = time.monotonic() + min(LOOK_INTERVAL * LOOK_GROWTH**run.quiet, LONGEST_LOOK)
        if self._runs.closed(uid):  # another watcher has it, or it failed as a whole
            self._runs.finish(uid)
            return True
        return False

    def _grow(self, node: Any, run: _InHand) -> bool:
        """Do the exposures that a run has gained while it goes on."""
        try:
            run.frames = raw_frames(node) if run.frames is None else run.frames.refresh()
        except BadInput:
            return False  # no frame yet, or nothing that can be done before the end
        exposures = run.frames.exposures(self._runs.done(run.frames.run_uid))
        if not exposures:
            return False
        run.waiting = run.waiting or time.monotonic()
        self._runs.add(exposures, patient=True, interrupted=self._interrupted)
        return True

    def _end(self, node: Any, run: _InHand) -> bool:
        """Do the rest of a run that has ended; False if that was interrupted."""
        run.waiting = run.waiting or time.monotonic()
        exposures = exposures_of_documents(node.documents())
        patient = run.attempts.attempts + 1 < READ_ATTEMPTS
        deferred = None if run.live else run.found
        self._runs.add(exposures, patient=patient, deferred=deferred, interrupted=self._interrupted)
        if self._stopping.is_set():
            return False
        if not exposures:
            self._runs.fail(node.metadata["start"], BadInput("The run holds no exposure: no stream with images in files."))
        self._runs.finish(node.item["id"])
        self._unregistered[node.item["id"]] = Deferred()
        return True

    def _interrupted(self) -> bool:
        """Whether to leave the rest of a run undone; asked between its batches, so that a long run does not look like hanging."""
        self.last_turn = time.monotonic()
        return self._stopping.is_set()

    def _failed(self, uid: str, run: _InHand, error: Exception) -> bool:
        """Put a run off, or store why it failed; whether it is done with."""
        attempts = run.attempts.again(LONGEST_LOOK if run.live else LONGEST_WAIT)
        run.next_look, run.frames = run.attempts.not_before, None
        if isinstance(error, NotYet) or attempts < RUN_ATTEMPTS:
            logger.info("Run %s is tried again (attempt %d): %s", uid, attempts, error)
            return False
        node = lookup(self._raw, uid)
        if node is not None:
            try:
                self._runs.fail(node.metadata["start"], error)
                self._runs.finish(uid)
            except CATALOG_AWAY as failure:
                logger.warning("Run %s failed (%s), but that cannot be stored now: %s", uid, error, failure)
                return False
        self._runs.release(uid)
        return True

    def _register(self) -> None:
        """Register what is served of runs that are done."""
        for uid, attempts in list(self._unregistered.items()):
            if not attempts.due:
                continue
            try:
                derived.register(self._client, self._raw[uid])
            except UNREACHABLE:
                raise
            except Exception as error:
                if attempts.again(LONGEST_WAIT) < READ_ATTEMPTS:
                    continue
                logger.warning("Run %s: %s", uid, error)
            del self._unregistered[uid]

    def _rest(self) -> None:
        """Wait until the next look is due, a hint comes, or the end."""
        due = min((run.next_look for run in self._in_hand.values()), default=self._next_scan)
        wait = min(due, self._next_scan) - time.monotonic()
        if wait <= 0:
            return
        with suppress(queue.Empty):
            uid = self._hints.get(timeout=min(wait, 0.25))
            self._hints.put(uid)

    def _release(self) -> None:
        """Give back what is not finished."""
        for uid in self._runs.open:
            self._runs.release(uid)

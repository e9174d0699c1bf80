"""The callback that the RunEngine does not feel: it appends documents to files, and sees to it that somebody delivers them."""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dsnet_bluesky.data import BadInput

from .files import Spool, encode, hold, is_free

__all__ = ["SpooledWriter"]

logger = logging.getLogger(__name__)

Sync = Literal["never", "run", "document"]

PERIOD = 0.5
"""Seconds between two looks at what waits in memory, at the spool's size and at the deliverer."""

RESTART_INTERVAL = 5.0
"""Seconds between two starts of a deliverer."""

SIZE_INTERVAL = 10.0
"""Seconds between two looks at the spool's size."""

ALARM_SIZE = 4096
"""Bytes of the alarm's file, written in advance: where the disk is full it can still be overwritten."""

CHUNK = 2**24
"""Bytes written at once: milliseconds of the RunEngine's time, when much has waited."""

FRAME = frozenset({"start", "descriptor", "resource", "stream_resource", "stop"})
"""Documents without which the others have no meaning: kept in memory beyond its bound."""


class _Run:
    """A run's file, and the bytes that it could not take yet."""

    def __init__(self, path: Path, uid: str):
        self.path, self.uid, self.uids = path, uid, {uid}
        self.pending = bytearray()
        self.lost: Counter[str] = Counter()
        self.ended = self.unsynced = False
        self.error = ""
        self._file: int | None = None

    def append(self, record: bytes) -> None:
        """Write behind what waits; what the disk does not take waits on."""
        self.pending += record
        self.flush()

    def flush(self) -> bool:
        """Write some of what waits; whether to go on."""
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                hold(self._file, wait=True)  # tells the deliverer that this run's process lives
            if self.pending:
                del self.pending[: os.write(self._file, self.pending[:CHUNK])]
        except OSError as error:
            self.error = str(error)
            return False
        return bool(self.pending)

    def sync(self) -> None:
        """Have the disk keep what is written, also without power."""
        if self.unsynced and self._file is not None:
            self.unsynced = False
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file and give up its lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class SpooledWriter:
    """Write documents to a local spool, from where another process delivers them to Tiled.

    A callback for the RunEngine in place of ``TiledWriter``. It neither waits for a
    server nor raises: what cannot be written waits in memory, and what is lost in the
    end is logged, shown by ``dsnet-bluesky spool status`` and recorded in the run's
    stop document.

    Parameters
    ----------
    directory
        Of the spool, on a local disk.
    target
        Where runs go: a Tiled client of the container, or its address.
    api_key
        For the address; that of the client, or TILED_API_KEY, if not given. Handed on by the environment.
    sync
        When the disk is told to keep what is written, also without power: "never", at
        start and stop of each "run", or after each "document". The RunEngine does not
        wait for it. Without power nothing is needed: what is written survives any process.
    limit
        Alarm when the spool is larger, in bytes. Nothing is dropped.
    memory
        Bytes kept in memory while the disk is full; further events are lost.
    keep
        Days for which delivered runs stay in ``delivered/``.
    deliver
        Start a deliverer when none is running. Without it use ``dsnet-bluesky spool flush``.

    Examples
    --------
    >>> RE.subscribe(SpooledWriter("/var/spool/saxs", client["raw"]))      # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | Path,
        target: Any,
        *,
        api_key: str | None = None,
        sync: Sync = "run",
        limit: int = 2**30,
        memory: int = 2**28,
        keep: float = 0.0,
        deliver: bool = True,
    ):
        if sync not in ("never", "run", "document"):
            raise BadInput(f"sync is {sync!r}; give 'never', 'run' or 'document'.")
        self.spool = Spool(directory, target=target if isinstance(target, str) else target.uri)
        self._key = api_key or (None if isinstance(target, str) else target.context.api_key)
        self._sync, self._limit, self._memory, self._keep, self._deliver = sync, limit, memory, keep, deliver
        self._lock = threading.Lock()
        self._runs: list[_Run] = []
        self._lost: Counter[str] = Counter()
        self._message = ""
        self._size, self._weighed = 0, -SIZE_INTERVAL
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -RESTART_INTERVAL
        self._open_side_files()
        self._wake, self._closing = threading.Event(), False
        self._keeper = threading.Thread(target=self._keep_watch, name="spool", daemon=True)
        self._keeper.start()
        atexit.register(self.close)
        reference = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (forget := reference()) and forget())

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document: append it to its run's file. Never raises, never waits for a server."""
        try:
            with self._lock:
                self._take(name, doc)
        except Exception:
            self._lost[name] += 1
            logger.exception("A %s document is lost: it cannot be spooled.", name)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the spool is empty; False when the time is over."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._runs or self.spool.waiting():
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Write what waits in memory, if the disk takes it, and stop; delivery goes on without this process."""
        if self._closing:
            return
        atexit.unregister(self.close)
        self._closing = True
        self._wake.set()
        self._keeper.join()
        self._tend()
        for run in self._runs:
            run.close()
        os.close(self._writers)
        os.close(self._alarm)
        if waiting := sum(len(run.pending) for run in self._runs):
            logger.critical("%d bytes of documents are lost with this process: %s", waiting, self._message)

    # -- under the lock --

    def _take(self, name: str, doc: Mapping[str, Any]) -> None:
        if name == "start":
            self._runs.append(_Run(self.spool.new(doc), doc["uid"]))
        runs = self._runs_of(doc)
        if not runs:
            raise KeyError(f"The {name} document belongs to no run whose start was seen.")
        for run in runs:
            if name in ("descriptor", "resource", "stream_resource"):
                run.uids.add(doc["uid"])
            if name not in FRAME and sum(len(r.pending) for r in self._runs) > self._memory:
                run.lost[name] += 1
                self._lost[name] += 1
                continue
            run.append(encode(name, self._marked(doc, run) if name == "stop" else doc))
            run.unsynced |= self._sync == "document" or (self._sync == "run" and name in ("start", "stop"))
            run.ended = name == "stop"
        if self._sync == "document" or name in ("start", "stop"):
            self._wake.set()  # the keeper's thread waits for the disk

    def _runs_of(self, doc: Mapping[str, Any]) -> list[_Run]:
        """Find the runs of a document; old resources do not name theirs and go to all."""
        parents = [doc[key] for key in ("run_start", "descriptor", "stream_resource", "resource") if doc.get(key)]
        uid = parents[0] if parents else doc.get("uid")
        found = [run for run in self._runs if uid in run.uids and not run.ended]
        return found or [run for run in self._runs if not parents and not run.ended]

    @staticmethod
    def _marked(doc: Mapping[str, Any], run: _Run) -> Mapping[str, Any]:
        """Say in the stop document what was lost."""
        if not run.lost:
            return doc
        lost = ", ".join(f"{number} {name}" for name, number in run.lost.items())
        reason = f"{doc.get('reason') or ''} Documents lost, because the spool's disk and memory were full: {lost}.".strip()
        return {**doc, "exit_status": "fail", "reason": reason}

    # -- on the keeper's thread --

    def _keep_watch(self) -> None:
        while not self._closing:
            self._wake.wait(PERIOD)
            self._wake.clear()
            try:
                self._tend()
            except Exception:
                logger.exception("An error that the spool was not prepared for; it goes on.")

    def _tend(self) -> None:
        """Write what waits, close what is complete, raise or end the alarm, and see to the deliverer."""
        runs = self._runs.copy()
        for run in runs:
            going = True
            while going:
                with self._lock:
                    going = run.flush()
            run.sync()
        with self._lock:
            for run in runs:
                if run.ended and not run.pending:
                    run.close()
                    self._runs.remove(run)
        self._raise_alarm(self._trouble())
        # On a busy machine one that was started needs a while until it holds the lock; to poll leaves no zombie.
        starting = self._process is not None and self._process.poll() is None
        due = self._deliver and not starting and time.monotonic() > self._started + RESTART_INTERVAL
        if due and is_free(self.spool.deliverer_lock) and (not self._closing or self.spool.waiting()):
            self._started = time.monotonic()
            self._start_deliverer()

    def _trouble(self) -> str:
        troubles = []
        pending = sum(len(run.pending) for run in self._runs)
        if pending:
            stuck = [run for run in self._runs if run.pending]
            troubles.append(f"{pending} bytes wait in memory ({stuck[0].error}); runs {', '.join(run.uid for run in stuck[:20])}")
        if self._lost:
            troubles.append("documents lost: " + ", ".join(f"{n} {name}" for name, n in self._lost.items()))
        if time.monotonic() > self._weighed + SIZE_INTERVAL:
            self._weighed, self._size = time.monotonic(), self.spool.size()
        if self._size > self._limit:
            troubles.append(f"the spool holds {self._size} bytes, more than its limit of {self._limit}")
        return "; ".join(troubles)

    def _raise_alarm(self, message: str) -> None:
        if message == self._message:
            return
        if message and not self._message:
            logger.error("Spool %s: %s", self.spool.directory, message)
        elif not message:
            logger.warning("Spool %s: the alarm is over.", self.spool.directory)
        self._message = message
        text = json.dumps({"message": message[: ALARM_SIZE // 2], "time": time.time(), "pid": os.getpid()})
        os.pwrite(self._alarm, text.encode().ljust(ALARM_SIZE), 0)

    def _start_deliverer(self) -> None:
        """Start a process of its own, which outlives this one; the key goes by the environment."""
        # -P and cwd: what lies in the session's directory is neither imported nor kept busy.
        command = [sys.executable, "-P", "-m", "dsnet_bluesky", "spool", "flush", str(self.spool.directory)]
        with self.spool.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--follow", "--keep", str(self._keep)],
                env={**os.environ, **({"TILED_API_KEY": self._key} if self._key else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.spool.directory,
            )

    def _open_side_files(self) -> None:
        """Open the alarm's file while the disk still takes it, and show that a writer is here."""
        self._writers = os.open(self.spool.writers_lock, os.O_RDWR | os.O_CREAT, 0o644)
        hold(self._writers, shared=True, wait=True)
        self._alarm = os.open(self.spool.alarm, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self._alarm, b" " * ALARM_SIZE, 0)

    def _forget(self) -> None:
        """In a forked child: let go of files and locks, which belong to the parent."""
        if self._closing:
            return
        for run in self._runs:
            run.close()
        self._runs, self._lock, self._closing = [], threading.Lock(), True
        os.close(self._writers)
        os.close(self._alarm)

"""Bring spooled runs to the catalog: in order, live, as often as it takes, each once."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from dsnet_bluesky.callbacks.worker import Deferred
from dsnet_bluesky.data import BadInput

from .arrived import Unequal, check, lookup
from .files import Contents, Spool, encode, hold, is_free, note, noted, read

__all__ = ["Deliverer"]

logger = logging.getLogger(__name__)

PERIOD = 0.05
"""Seconds between two looks for new documents."""

LONGEST = 30.0
"""Seconds between two attempts, at most."""

PATIENCE = 3
"""Attempts after which a run is set aside that the catalog refuses."""

GRACE = 2.0
"""Seconds for which a file that no process holds is left alone: its writer may be about to."""

UNAVAILABLE = (401, 429, 502, 503, 504)
"""Answers that say nothing about the run: wrong key, too much traffic, a proxy without its server."""

ABANDONED = "The process that took this run ended before its stop document was written."

DAY = 86_400.0


@dataclass
class _Backoff(Deferred):
    """Why something failed, how often, and when it is tried next."""

    error: str = ""
    status: int = 0

    def failed(self, error: Exception) -> None:
        """Wait longer than the last time, and not in step with others."""
        self.error = f"{type(error).__name__}: {error}"
        self.status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
        self.again(LONGEST * random.uniform(0.5, 1))

    def log(self, what: str) -> None:
        """Log the first, second, fourth, eighth ... failure: an outage of months fits into a log."""
        if self.attempts & (self.attempts - 1) == 0:
            logger.warning("%s, attempt %d: %s", what, self.attempts, self.error)


class _Delivery:
    """A run on its way from its file to the catalog."""

    def __init__(self, path: Path):
        self.path = path
        self.backoff = _Backoff()
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._sent = Contents()
        self._unheld_since: float | None = None

    def advance(self, catalog: Any) -> bool:
        """Deliver all that is new; True when the run is complete in the catalog."""
        if self._file is None:
            self._file = self.path.open("rb")
        for name, doc, end in read(self._file, self._sent.end):
            if name == "start" and not self._begin(catalog, doc["uid"]):
                return True
            self._writer(name, doc)
            self._sent.add(name, doc, end)
            if name == "stop":
                check(catalog, self._sent)
                return True
        if self._abandoned():
            self._close_run()
        return False

    def reset(self) -> None:
        """Forget what was sent: next time the run begins anew."""
        if self._file is not None:
            self._file.close()
        self._file, self._writer, self._sent = None, None, Contents()

    def _begin(self, catalog: Any, uid: str) -> bool:
        """Make room for the run in the catalog; False where it is complete already."""
        from bluesky_tiled_plugins import TiledWriter

        if (run := lookup(catalog, uid)) is not None:
            if self._is_there(catalog, run.metadata.get("stop") or {}):
                return False
            # Nothing tells which documents of a partial run arrived, or arrived twice: begin anew.
            logger.info("Run %s is in the catalog in part; it is delivered again.", uid)
            catalog.delete_contents(uid, recursive=True, external_only=False)
        # What is over goes in few requests; what goes on is seen live.
        self._writer = TiledWriter(catalog, batch_size=1) if self._is_held() else TiledWriter(catalog)
        return True

    def _is_there(self, catalog: Any, stop: dict[str, Any]) -> bool:
        """Whether the catalog holds all that the file holds."""
        contents = Contents.of(self.path)
        with suppress(Unequal):
            check(catalog, contents)
            return bool(stop) and stop["uid"] == contents.stop
        return False

    def _is_held(self) -> bool:
        return not is_free(self.path)

    def _abandoned(self) -> bool:
        """Whether the run has no stop document and nobody to write one."""
        if self._is_held():
            self._unheld_since = None
            return False
        self._unheld_since = self._unheld_since or time.monotonic()
        return time.monotonic() > self._unheld_since + GRACE

    def _close_run(self) -> None:
        """End the file of a process that died: drop what is no whole record, keep a copy of it, and write a stop document."""
        with self.path.open("r+b") as file:
            if not hold(file):
                return
            found = Contents.of(self.path)
            if found.stop:
                return  # its writer did it meanwhile
            if not found.uid:
                raise BadInput("The file does not begin with a whole start document.")
            reason, torn = ABANDONED, os.fstat(file.fileno()).st_size - found.end
            if torn:
                shutil.copy2(self.path, self.path.parent / "damaged" / self.path.name)
                reason += f" The last {torn} bytes of its spool file could not be read; a copy is kept in damaged/."
            stop = {
                "uid": str(uuid.uuid4()),
                "time": self.path.stat().st_mtime,
                "run_start": found.uid,
                "exit_status": "fail",
                "reason": reason,
                "num_events": dict(found.events),
            }
            file.truncate(found.end)
            file.seek(found.end)
            file.write(encode("stop", stop))
        logger.warning("%s: %s", self.path.name, reason)


class Deliverer:
    """Deliver what waits in a spool.

    Parameters
    ----------
    directory
        Of the spool.
    uri
        Of the container of runs; what the spool's last writer said if not given.
    api_key
        TILED_API_KEY of the environment if not given.
    keep
        Days for which delivered runs stay in ``delivered/``.

    Raises
    ------
    BadInput
        If there is no spool.
    """

    def __init__(self, directory: str | Path, *, uri: str | None = None, api_key: str | None = None, keep: float = 0.0):
        self.spool = Spool(directory)
        self._uri = uri
        self._connected_to = ""
        self._key = api_key or os.environ.get("TILED_API_KEY")
        self._keep = keep
        self._catalog: Any = None
        self._away = _Backoff()
        self._work: dict[Path, _Delivery] = {}
        self._noted: dict[str, Any] = noted(self.spool.errors)

    def run(self, *, follow: bool = False, timeout: float | None = None) -> bool:
        """Deliver until nothing waits; False if that takes longer than `timeout` seconds.

        Parameters
        ----------
        follow
            Deliver runs that are still open, and stay until no process writes here any
            more. Returns at once where another process delivers already.
        timeout
            In s.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self.spool.deliverer_lock.open("ab") as lock:
            held = hold(lock, wait=False)
            while not self._finished(follow):
                if end is not None and time.monotonic() > end:
                    return False
                held = held or hold(lock)
                if not held and follow:
                    return True
                if follow and self._locked_out:
                    return False  # the writer, whose key may be newer, starts another
                if not (held and self._away.due and self._pass(follow)):
                    time.sleep(PERIOD)
        return True

    def retry_refused(self) -> int:
        """Put the runs that were set aside back into the queue; returns their number."""
        paths = sorted(self.spool.refused.glob("*.run"))
        for path in paths:
            path.replace(self.spool.directory / path.name)
            path.with_suffix(".json").unlink(missing_ok=True)
        return len(paths)

    def _finished(self, follow: bool) -> bool:
        if follow:
            return not self.spool.waiting() and is_free(self.spool.writers_lock, shared=True)
        return not any(is_free(path) for path in self.spool.waiting())

    def _pass(self, follow: bool) -> bool:
        """Advance each run by what is new; whether one came to its end."""
        ended = False
        self._work = {path: self._work.get(path) or _Delivery(path) for path in self.spool.waiting()}
        for path, delivery in list(self._work.items()):
            if not delivery.backoff.due or not (follow or is_free(path)):
                continue
            try:
                complete = delivery.advance(self._connected())
            except Exception as error:
                delivery.reset()
                if self._catalog is None or _is_away(error):
                    self._pause(error)
                    return False
                self._failed(delivery, error)
                continue
            self._away, delivery.backoff = _Backoff(), _Backoff()
            if complete:
                delivery.reset()
                self._archive(self._work.pop(path).path)
                ended = True
        self._note_errors()
        return ended

    def _connected(self) -> Any:
        """Give the catalog; a later writer may have named another one."""
        uri = self._uri or self.spool.target.read_text().strip()
        if self._catalog is None or uri != self._connected_to:
            # Tiled's own retries would only hide from us that the server is away.
            os.environ["TILED_RETRY_ATTEMPTS"] = "1"
            from tiled.client import from_uri

            self._catalog = None
            self._catalog, self._connected_to = from_uri(uri, api_key=self._key), uri
        return self._catalog

    @property
    def _locked_out(self) -> bool:
        return self._away.attempts >= PATIENCE and self._away.status == 401

    def _pause(self, error: Exception) -> None:
        """Leave all runs alone for a while: the server does not answer."""
        self._catalog = None
        self._away.failed(error)
        self._away.log("The catalog does not answer")
        self._note_errors()

    def _failed(self, delivery: _Delivery, error: Exception) -> None:
        """Try a run again later, and let others pass; set it aside where trying again is of no use."""
        delivery.backoff.failed(error)
        delivery.backoff.log(delivery.path.name)
        passing = delivery.backoff.status >= 500 or isinstance(error, httpx.TransportError | OSError)
        if delivery.backoff.attempts < PATIENCE or passing:
            return
        logger.error("%s is set aside in refused/.", delivery.path.name)
        self._work.pop(delivery.path)
        reason = {"reason": delivery.backoff.error, "attempts": delivery.backoff.attempts, "time": time.time()}
        note(self.spool.refused / f"{delivery.path.stem}.json", reason)
        delivery.path.replace(self.spool.refused / delivery.path.name)

    def _archive(self, path: Path) -> None:
        """Remove a delivered run, at once or after some days."""
        if self._keep:
            os.utime(path)  # its days begin now
            path.replace(self.spool.delivered / path.name)
        else:
            path.unlink()
        for old in self.spool.delivered.glob("*.run"):
            if old.stat().st_mtime < time.time() - self._keep * DAY:
                old.unlink()

    def _note_errors(self) -> None:
        """Tell `read_status` what went wrong last."""
        runs = {path.name: d.backoff for path, d in self._work.items() if d.backoff.attempts}
        found = {name: {"attempts": b.attempts, "error": b.error} for name, b in (runs | {"": self._away}).items() if b.attempts}
        if found != self._noted:
            self._noted = found
            with suppress(OSError):  # a full disk
                note(self.spool.errors, found)


def _is_away(error: Exception) -> bool:
    """Whether an error says nothing about the run, but that there is no use in trying others."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in UNAVAILABLE
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)

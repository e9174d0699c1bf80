"""A thread that takes work from a bounded queue, so that whoever offers it never waits, and what it tries again later."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Deferred", "Worker"]

logger = logging.getLogger(__name__)


class Worker:
    """Handle items in order on a daemon thread.

    Parameters
    ----------
    handle
        Called with each item. What it raises is logged, and the worker goes on.
    idle
        Called when the queue has run empty, and now and then while it stays so.
    settled
        Whether `idle` has nothing left to do.
    size
        Items that the queue holds.
    name
        Of the thread.
    """

    period = 0.5
    """Seconds between two calls of `idle`."""

    def __init__(
        self, handle: Callable[[Any], None], idle: Callable[[], None], settled: Callable[[], bool], *, size: int, name: str
    ):
        self._handle, self._idle, self._settled = handle, idle, settled
        self._deadline = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=size)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Items that are not handled yet."""
        return self._queue.unfinished_tasks

    def offer(self, item: Any, *, block: bool = False) -> bool:
        """Put an item into the queue; False where it is full, unless told to wait, or the worker closed."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, block=block, timeout=self.period)
            except queue.Full:
                if not block:
                    return False
            else:
                return True
        return False

    def wait(self, timeout: float | None) -> bool:
        """Wait until every item is handled and all is settled; False when the time is over."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.pending or not self._settled():
            if (end is not None and time.monotonic() > end) or not self._thread.is_alive():
                return False
            time.sleep(0.01)
        return True

    def close(self, timeout: float) -> bool:
        """Stop when the queue is empty and all is settled; False if that takes longer than `timeout` seconds."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout + self.period)  # it stops by itself at the deadline, unless an item holds it up
        return not self._thread.is_alive() and self._settled()

    @property
    def stopped(self) -> bool:
        """Whether the thread has come to its end."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._goes_on():
            try:
                item = self._queue.get(timeout=self.period if not self._closing.is_set() else 0.01)
            except queue.Empty:
                self._guard(self._idle)
                continue
            self._guard(self._handle, item)
            if self._queue.empty():
                self._guard(self._idle)
            self._queue.task_done()

    def _goes_on(self) -> bool:
        if not self._closing.is_set() or not self._queue.empty():
            return True
        return not self._settled() and time.monotonic() < self._deadline

    def _guard(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            logger.exception("An error that nothing was prepared for; the worker goes on.")


@dataclass
class Deferred:
    """How often something was tried, and when it is tried next."""

    attempts: int = 0
    not_before: float = 0.0

    def again(self, longest: float) -> int:
        """Note a failed attempt and wait longer than the last time; returns the number of attempts."""
        self.attempts += 1
        self.not_before = time.monotonic() + min(0.1 * 3 ** min(self.attempts, 16), longest)  # the power must stay a number
        return self.attempts

    @property
    def due(self) -> bool:
        """Whether it is time for the next attempt."""
        return time.monotonic() >= self.not_before

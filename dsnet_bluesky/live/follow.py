"""Following what becomes of runs in the catalog, on a thread of its own.

The results may be made in this process or beside a GPU elsewhere: here they are
only read. Tiled's stream says when to look, and now and then one looks anyhow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import xarray as xr
from tiled.queries import In

from dsnet_bluesky.derived.catalog import mount
from dsnet_bluesky.documents import sample_name

__all__ = ["Follower", "Picture"]

logger = logging.getLogger(__name__)

VARIABLES = ("I", "Idev", "I_smeared", "Idev_smeared", "I_resmeared", "chi2")
"""What a picture is made of."""

WAITING = 10
"""Runs that are followed at once: the newest."""

BETWEEN = 0.2
"""Seconds between two looks, however fast updates come."""

SERVER_TIMEOUT = 5.0
"""Seconds in which a server answers, if it is there."""

CLOSE_TIMEOUT = 2.0
"""Seconds to wait for the threads at the end; they are daemons, nothing is lost with them."""


@dataclass(frozen=True)
class Picture:
    """What there is to see: the newest exposure of the newest run that has one.

    Attributes
    ----------
    title
        The run, the exposure and the model.
    exposure
        Dataset with dims (exposure, q), one exposure; None if no exposure of the result can be shown.
    failure
        Why the result or its newest exposure failed, None if it did not.
    notes
        What is going on besides: runs that wait for their first result, a server that is away.
    """

    title: str = ""
    exposure: xr.Dataset | None = None
    failure: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Run:
    start: Mapping[str, Any]
    ended: bool = field(default=False)

    @property
    def name(self) -> str:
        name, scan = sample_name(self.start) or self.start["uid"][:8], self.start.get("scan_id")
        return name if scan is None else f"{name}, scan {scan}"


class Follower:
    """Look at the results of the newest runs and hand on what there is to see.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    show
        Called on the follower's thread with each new `Picture`.
    interval
        Seconds between two looks if no update comes.
    """

    def __init__(self, client: Any, show: Callable[[Picture], None], *, interval: float):
        self._results = mount(client, "desmeared")
        self._show = show
        self._interval = interval
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._seen: Any = None
        self._picture = Picture()
        self._subscription: Any = None
        # A server in this process has a websocket that can be neither waited on for a while nor closed: none then.
        self._in_process = getattr(client.context.http_client, "app", None) is not None
        self._threads = [
            threading.Thread(target=target, name=f"live {target.__name__.strip('_')}", daemon=True)
            for target in ((self._follow,) if self._in_process else (self._follow, self._listen))
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, start: Mapping[str, Any]) -> None:
        """Follow a run that begins; of more than `WAITING` the oldest is let go."""
        with self._lock:
            self._runs[start["uid"]] = _Run(start)
            for uid in list(self._runs)[:-WAITING]:
                del self._runs[uid]
        self._wake.set()

    def end(self, run_uid: str) -> None:
        """Take note that a run has ended; its result may come later."""
        with self._lock:
            if run_uid in self._runs:
                self._runs[run_uid].ended = True
        self._wake.set()

    def stop(self) -> None:
        """Stop as soon as may be, without waiting for it."""
        self._stopping.set()
        self._wake.set()

    def close(self) -> None:
        """Stop, and wait for the threads for a moment."""
        self.stop()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT)

    # -- on the follower's thread --

    def _follow(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._look()
            except Exception as error:
                logger.debug("The catalog could not be looked at.", exc_info=True)
                self._say(replace(self._picture, notes=(_trouble(error),)))
            self._stopping.wait(BETWEEN)
            self._wake.wait(self._interval)
        if self._subscription is not None:
            self._subscription.disconnect()  # ends the listener

    def _look(self) -> None:
        with self._lock:
            runs = [replace(run) for run in reversed(self._runs.values())]
        if not runs:
            return
        self._check_server()
        found = self._found([run.start["uid"] for run in runs])
        waiting = []
        for run in runs:
            result = found.get(run.start["uid"])
            if result is not None and _is_telling(result.metadata):
                self._take(run, result, tuple(waiting))
                self._forget_before(run.start["uid"])
                return
            waiting.append(f"{run.name}: {'ended, ' if run.ended else ''}no result yet")
        self._say(replace(self._picture, notes=tuple(waiting)))

    def _check_server(self) -> None:
        """Raise at once if the server is away, where Tiled's client would try again for most of a minute."""
        context = self._results.context
        if not self._in_process:
            context.http_client.get(context.api_uri, timeout=SERVER_TIMEOUT).raise_for_status()

    def _found(self, uids: list[str]) -> dict[str, Any]:
        """Results by raw run; of several the one that was touched last."""
        results = self._results.search(In("raw_uid", uids)).values()
        ordered = sorted(results, key=lambda result: result.metadata.get("updated", 0.0))
        return {result.metadata["raw_uid"]: result for result in ordered}

    def _take(self, run: _Run, result: Any, notes: tuple[str, ...]) -> None:
        """Read the newest exposure of a result, if it is not the one that is shown."""
        said = dict(result.metadata)
        state = (result.item["id"], said["exposures"], said["status"])
        if state == self._seen:
            self._say(replace(self._picture, notes=notes))
            return
        failures = {failure["exposure"]: failure["reason"] for failure in said["failures"]}
        index = max(set(range(said["exposures"])) - set(failures), default=None)
        title = run.name if index is None else f"{run.name}, exposure {index + 1}"
        picture = Picture(
            title=f"{title} ({_model(said)})",
            exposure=None if index is None else _read(result, index),
            failure=_failure(said, failures),
            notes=notes,
        )
        self._say(picture)
        self._seen = state

    def _forget_before(self, uid: str) -> None:
        with self._lock:
            for older in list(self._runs)[: list(self._runs).index(uid)] if uid in self._runs else ():
                del self._runs[older]

    def _say(self, picture: Picture) -> None:
        same = picture.exposure is self._picture.exposure and picture.title == self._picture.title
        if same and (picture.failure, picture.notes) == (self._picture.failure, self._picture.notes):
            return
        self._picture = picture
        self._show(picture)

    # -- on the listener's thread --

    def _listen(self) -> None:
        """Wake the follower at every update; connect again for as long as it takes."""
        while not self._stopping.is_set():
            try:
                subscription = self._results.subscribe()
                subscription.child_created.add_callback(self._hint)
                subscription.child_metadata_updated.add_callback(self._hint)
                self._subscription = subscription
                subscription.start()
            except Exception:
                logger.debug("No updates from the server for now.", exc_info=True)
            self._stopping.wait(self._interval)

    def _hint(self, update: Any) -> None:
        self._wake.set()


def _is_telling(said: Mapping[str, Any]) -> bool:
    return said["exposures"] > 0 or said["status"] == "failed"


def _model(said: Mapping[str, Any]) -> str:
    return f"{said['model_name']} {said['model_version']}".strip() or str(said["method"])


def _failure(said: Mapping[str, Any], failures: Mapping[int, str]) -> str | None:
    if said["status"] == "failed":
        return f"The result failed: {said['reason']}"
    last = said["exposures"] - 1
    return f"Exposure {last + 1} failed: {failures[last]}" if last in failures else None


def _read(result: Any, index: int) -> xr.Dataset:
    """Read one exposure; every array holds it, for the number of exposures is written after all of them."""
    arrays = dict(result.items())
    variables = {}
    for name in ("q", *VARIABLES):
        if name in arrays:
            dims = tuple(arrays[name].dims or ())
            part = tuple(slice(index, index + 1) if dim == "exposure" else slice(None) for dim in dims)
            variables[name] = dims, arrays[name].read(part), dict(arrays[name].metadata["attrs"])
    return xr.Dataset(variables, coords={"q": variables.pop("q")})


def _trouble(error: Exception) -> str:
    since = time.strftime("%H:%M:%S")
    if isinstance(error, httpx.TransportError | ConnectionError):
        return f"{since}: the catalog does not answer; trying again"
    return f"{since}: the catalog cannot be read ({type(error).__name__}); trying again"

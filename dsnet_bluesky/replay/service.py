"""Replaying: hand out what is to do in batches, keep count, survive what goes away."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from dsnet_bluesky.callbacks.sample_runs import CATALOG_AWAY, key_refused
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.questions import Question

from .batches import Batches, Done, Server, Work, check, do
from .selection import Selection

__all__ = ["BATCH", "Summary", "replay"]

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # there is a worker for each core
    # Whoever hands out the batches is patient. Read when Tiled's client is imported, before a worker has its first batch.
    "TILED_RETRY_ATTEMPTS": "1",
    # dask lets workers give memory back to the system at once; a third of their time would go into getting it again.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_ARENA_MAX": "1",
}
"""Of the workers of a local cluster."""

BATCH = 128
"""Runs of a batch."""

THREADS = 3
"""Batches that a worker has at the same time: one is computed, one waits for that, one is read or stored."""

AHEAD = 4
"""Batches that each worker has, or that wait for it: enough to keep it busy, and all that is held in memory."""

PATIENCE = 60.0
"""Seconds for which a catalog that went away is waited for."""


@dataclass
class Summary:
    """What became of a replay.

    Attributes
    ----------
    model
        Method, with its version.
    found
        Sample runs that fulfil the query.
    before
        Those that had their result, or were not to be done again.
    to_do
        Those that were handed out.
    stored
        Results stored complete.
    there
        Runs whose result came from elsewhere meanwhile.
    failed
        Why runs or exposures could not be desmeared, and how often.
    same, different
        Of `verify`: results that were computed again and are equal but for floating-point noise, and those
        that are not, with their largest difference of I in stated errors.
    unfinished
        Runs that were handed out and did not come back; the next replay does them.
    interrupted
        Why the replay ended before its time, empty if it did not.
    seconds
        Where the workers' time went, added up: preparing, reducing, desmearing, storing.
    wall
        Seconds from beginning to end.
    """

    model: str
    found: int = 0
    before: int = 0
    to_do: int = 0
    stored: int = 0
    there: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    same: int = 0
    different: dict[str, float] = field(default_factory=dict)
    unfinished: int = 0
    interrupted: str = ""
    seconds: Counter[str] = field(default_factory=Counter)
    wall: float = 0.0

    @property
    def done(self) -> int:
        """Runs that are done with, those of before included."""
        return self.before + self.to_do - self.unfinished

    @property
    def complete(self) -> bool:
        """Whether all that was to do was done, and nothing failed or differs."""
        return not (self.interrupted or self.unfinished or self.failed or self.different)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return {**asdict(self), "failed": dict(self.failed), "seconds": dict(self.seconds), "complete": self.complete}

    def add(self, done: Done) -> None:
        """Count a batch."""
        self.unfinished -= done.runs
        self.stored += done.stored
        self.there += done.there
        self.failed.update(done.failed)
        self.same += done.same
        self.different.update(done.different)
        self.seconds.update(done.seconds)


def replay(
    client: Any,
    *,
    model: str = "dsnet",
    config: Config | None = None,
    questions: Sequence[Question] = (),
    limit: int | None = None,
    batch: int = BATCH,
    workers: int | None = None,
    dask: str | None = None,
    verify: bool = False,
    retry_failed: bool = False,
    dry_run: bool = False,
    notify: Callable[[Summary], None] | None = None,
) -> Summary:
    """Desmear runs of the catalog with a model, beside the results that are there.

    Runs that have a complete result of this model and configuration are left alone: a second replay does nothing, and one
    that was killed goes on. Results of other models are not touched.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    model
        A method, with or without a version or an alias: ``"dsnet:2.1.0"``, ``"dsnet:production"``, ``"map"``.
    config
        How to reduce and desmear, in place of the usual way with `model`.
    questions
        Which runs: `questions.Sample`, `OfRun` and `Between`; all sample runs if not given.
    limit
        Do so many runs at most.
    batch
        Runs that a worker does together.
    workers
        Processes of a local cluster; as many as there are cores if not given. 0: none, all is done here.
    dask
        Address of a scheduler of dask, whose workers must see the detector's files and the server.
    verify
        Compute results again that are there, and compare; nothing is stored.
    retry_failed
        Do runs again that failed.
    dry_run
        Only count what would be done.
    notify
        Called now and then with the summary so far.

    Returns
    -------
    Summary

    Raises
    ------
    BadInput
        If there is no such model, no such run, a number is negative, or the catalog does not let the key write.

    Notes
    -----
    A local cluster starts processes: a script that calls this needs ``if __name__ == "__main__":``.
    """
    config = config or Config(method=model)
    config.check()  # what cannot work is refused before anything is begun
    if batch < 1:
        raise BadInput(f"A batch holds at least one run, not {batch}.")
    for name, number in {"limit": limit, "workers": workers}.items():
        if number is not None and number < 0:
            raise BadInput(f"{name} is {number}; give no negative number.")
    selection = Selection(client, config, questions, retry_failed=retry_failed)
    summary, begin = Summary(config.method, found=selection.count), time.perf_counter()
    chunks = _chunks(selection, summary, batch=batch, limit=limit, verify=verify)
    if dry_run:
        for _ in chunks:
            pass
        return summary
    with ExitStack() as until_done:
        pool = _pool(client, config, retry_failed=retry_failed, verify=verify, workers=workers, dask=dask)
        _run(lambda: until_done.enter_context(pool), chunks, summary, notify or (lambda _: None))
    summary.wall = time.perf_counter() - begin
    return summary


def _chunks(selection: Selection, summary: Summary, *, batch: int, limit: int | None, verify: bool) -> Iterator[list[str]]:
    """Yield what is to do, in batches of runs that follow each other: mostly, they share a direct beam."""
    waiting: list[str] = []
    for page in selection.pages():
        wanted = page.done if verify else page.to_do
        if limit is not None:
            wanted = wanted[: limit - summary.to_do]
        summary.to_do += len(wanted)
        summary.unfinished += len(wanted)
        summary.before += 0 if verify else len(page.done)
        waiting += wanted
        while len(waiting) >= batch:
            yield waiting[:batch]
            waiting = waiting[batch:]
        if limit is not None and summary.to_do >= limit:
            break
    if waiting:
        yield waiting


class _Pool(Protocol):
    """Whoever does batches."""

    @property
    def ahead(self) -> int:
        """Batches that it can hold."""
        ...

    def submit(self, uids: list[str]) -> None:
        """Take a batch."""

    def next(self) -> tuple[list[str], Done | BaseException]:
        """Wait for a batch that is done, or broke down."""
        ...


def _run(begin: Callable[[], _Pool], chunks: Iterator[list[str]], summary: Summary, notify: Callable[[Summary], None]) -> None:
    again: deque[list[str]] = deque()
    pending, patience = 0, _Patience()
    pool: _Pool | None = None
    while True:
        try:
            while (pool is None or pending < pool.ahead) and (chunk := again.popleft() if again else next(chunks, None)):
                pool = pool or begin()  # workers take seconds to start: not where nothing is to do
                pool.submit(chunk)
                pending += 1
        except CATALOG_AWAY as error:  # while looking for more
            if refusal := key_refused(error):
                raise refusal from error
            summary.interrupted = summary.interrupted or f"The catalog does not answer ({error})."
        if pool is None or not pending:
            return
        uids, found = pool.next()
        pending -= 1
        if isinstance(found, Done):
            patience.reset()
            summary.add(found)
        elif refusal := key_refused(found):
            raise refusal from found
        elif isinstance(found, CATALOG_AWAY):
            if patience.wait():
                again.append(uids)
            else:
                summary.interrupted = f"The catalog does not answer ({found})."
        elif type(found).__name__ == "KilledWorker" and len(uids) > 1:
            again.extend([uid] for uid in uids)  # whichever run it is that kills workers, the others are done
        elif isinstance(found, Exception) and type(found).__name__ != "FutureCancelledError":
            logger.error("A batch of %d runs broke down.", len(uids), exc_info=found)
            summary.failed[f"{type(found).__name__}: {found}"] += len(uids)
        else:
            summary.interrupted = f"The cluster went away ({type(found).__name__}: {found})."
        notify(summary)
        if summary.interrupted:
            return


class _Patience:
    """How long a catalog that went away is waited for."""

    def __init__(self) -> None:
        self._since: float | None = None

    def reset(self) -> None:
        """It answers."""
        self._since = None

    def wait(self) -> bool:
        """Wait a little; False if that was long enough."""
        self._since = self._since or time.monotonic()
        time.sleep(1.0)
        return time.monotonic() - self._since < PATIENCE


class _Here:
    """Does batches in this process."""

    ahead = 1

    def __init__(self, client: Any, config: Config, *, retry_failed: bool, verify: bool) -> None:
        batches = Batches(client, config, retry_failed=retry_failed)
        self._do = batches.check if verify else batches.do
        self._waiting: deque[list[str]] = deque()

    def submit(self, uids: list[str]) -> None:
        self._waiting.append(uids)

    def next(self) -> tuple[list[str], Done | BaseException]:
        uids = self._waiting.popleft()
        try:
            return uids, self._do(uids)
        except Exception as error:
            return uids, error


class _Cluster:
    """Hands batches to the workers of a dask cluster."""

    def __init__(self, cluster: Any, work: Work, *, verify: bool) -> None:
        from distributed import as_completed

        from .unprofiled import Unprofiled

        cluster.register_plugin(Unprofiled())
        self._cluster, self._work = cluster, work
        self._do = check if verify else do
        self._batches: dict[Any, list[str]] = {}
        self._done = as_completed()

    @property
    def ahead(self) -> int:
        return max(1, AHEAD * len(self._cluster.scheduler_info(n_workers=-1)["workers"]))

    def submit(self, uids: list[str]) -> None:
        future = self._cluster.submit(self._do, self._work, uids, pure=False, retries=0)
        self._batches[future.key] = uids
        self._done.add(future)

    def next(self) -> tuple[list[str], Done | BaseException]:
        future = next(self._done)
        uids = self._batches.pop(future.key)
        try:
            return uids, future.result()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return uids, error


@contextmanager
def _pool(
    client: Any, config: Config, *, retry_failed: bool, verify: bool, workers: int | None, dask: str | None
) -> Iterator[_Pool]:
    if workers == 0 and dask is None:
        yield _Here(client, config, retry_failed=retry_failed, verify=verify)
        return
    from dask import config as of_dask
    from distributed import Client, LocalCluster

    work = Work(Server(str(client.context.api_uri), client.context.api_key), config, retry_failed)
    if dask is not None:
        try:
            cluster = Client(dask, timeout="10s")
        except (OSError, ValueError) as error:
            raise BadInput(f"No scheduler of dask answers at {dask} ({error}); start one with `dask scheduler`.") from error
        with cluster:
            if not cluster.scheduler_info(n_workers=-1)["workers"]:
                raise BadInput(f"The scheduler at {dask} has no workers; start some with `dask worker {dask}`.")
            yield _Cluster(cluster, work, verify=verify)
        return
    count = workers or os.cpu_count() or 1
    with (
        of_dask.set({"distributed.nanny.pre-spawn-environ": ENVIRONMENT}),
        LocalCluster(n_workers=count, threads_per_worker=THREADS, dashboard_address="127.0.0.1:0") as local,
        Client(local) as cluster,
    ):
        yield _Cluster(cluster, work, verify=verify)

"""Workers of dask that do not look at what their threads are at."""

from __future__ import annotations

from distributed import Worker, WorkerPlugin

__all__ = ["Unprofiled"]


class Unprofiled(WorkerPlugin):
    """Stops the profiler of a worker.

    It asks a hundred times a second for the frames of all threads, and with Python 3.11 that can stop a worker for ever: the
    interpreter holds a lock while it collects garbage (github.com/python/cpython/issues/106883,
    github.com/dask/distributed/issues/8616).
    """

    name = "dsnet-unprofiled"

    def setup(self, worker: Worker) -> None:
        """Take the profiler away before it is started, or stop it."""
        if (profiler := worker.periodic_callbacks.pop("profile", None)) is not None:
            profiler.stop()

"""One thread for each call: threads that share small operations wait for each other at every one.

On a busy machine they can wait a hundred times longer than they compute, and the matrices of a curve mostly gain nothing on
an idle one (docs/decisions/0016-one-thread-for-each-call.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

from threadpoolctl import LibController, ThreadpoolController

__all__ = ["OneThread", "one_blas_thread"]

T = TypeVar("T")


class OneThread(Generic[T]):
    """While it is entered, by one thread or by several, a library computes with one thread; gives how many it has otherwise.

    The number is one for all threads, or for all that are new: only the first to enter can tell what is to be restored,
    and the last to leave restores it.

    Parameters
    ----------
    get
        Asks the library for its number of threads.
    put
        Gives the library a number of threads: what `get` gave, or 1.
    each
        Whether every thread has a number of its own besides, which it must restore itself; it must not enter again inside.
    """

    def __init__(self, get: Callable[[], T], put: Callable[[T | int], None], *, each: bool = False) -> None:
        self._get, self._put, self._each = get, put, each
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> T:
        with self._lock:
            if not self._inside:
                self._number = self._get()
            self._inside += 1
            self._put(1)
            return self._number

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._each or not self._inside:
                self._put(self._number)


@cache
def _blas() -> list[LibController]:
    """Find the libraries behind the linear algebra of numpy and scipy, which bring one each."""
    import scipy.linalg  # noqa: F401 - only what is loaded is found

    return ThreadpoolController().select(user_api="blas").lib_controllers


def _get_blas() -> list[int]:
    return [library.num_threads or 1 for library in _blas()]


def _put_blas(numbers: list[int] | int) -> None:
    for place, library in enumerate(_blas()):
        # Of OpenBLAS threadpoolctl heeds one thread only, the first that asks, lest threads fight; here they count themselves.
        release = getattr(library, "clear_controlling_thread", lambda **_: None)
        release(force=True)
        library.set_num_threads(numbers if isinstance(numbers, int) else numbers[place])
        release(force=True)


one_blas_thread = OneThread(_get_blas, _put_blas)
"""For the linear algebra of numpy and scipy."""

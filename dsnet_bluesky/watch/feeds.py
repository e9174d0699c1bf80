"""Documents from a 0MQ proxy of bluesky: quicker than the catalog, but lossy; the backlog finds what was lost."""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.pipeline import Config

__all__ = ["follow_documents"]

logger = logging.getLogger(__name__)

HARMLESS = {("builtins", name) for name in ("bytearray", "complex", "dict", "frozenset", "list", "set", "slice", "tuple")} | {
    ("collections", "OrderedDict"),
    ("datetime", "datetime"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("_codecs", "encode"),
}
"""What a document may be made of. Anything else in a pickle can be a program."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"A document may not hold a {module}.{name}.")


def load_document(data: bytes) -> Any:
    """Read a document that bluesky's `Publisher` has pickled, without running what is in it.

    Raises
    ------
    pickle.UnpicklingError
        If it holds anything but plain values and NumPy arrays.
    """
    return _Unpickler(io.BytesIO(data)).load()


@contextmanager
def follow_documents(
    address: str | None, client: Any, *, config: Config, max_beam_age: float
) -> Iterator[DesmearCallback | None]:
    """Desmear the runs whose documents a 0MQ proxy hands out, on a thread, as long as the context lasts.

    Parameters
    ----------
    address
        ``HOST:PORT`` of the proxy's output; without one nothing is done.
    client
        Tiled client of the server's root, into which somebody else writes the runs.
    config, max_beam_age
        As for `DesmearCallback`.

    Yields
    ------
    DesmearCallback or None

    Raises
    ------
    BadInput
        If the address is none.
    """
    if address is None:
        yield None
        return
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise BadInput(f"The 0MQ proxy's address is {address!r}; give it as HOST:PORT, such as 127.0.0.1:5578.")
    from bluesky.callbacks.zmq import RemoteDispatcher

    desmear = DesmearCallback(client, config=config, overflow="block", max_beam_age=max_beam_age)
    dispatcher = RemoteDispatcher((host, int(port)), deserializer=load_document)
    dispatcher.subscribe(desmear)  # type: ignore[arg-type]
    thread = threading.Thread(target=_dispatch, args=(dispatcher,), name="documents", daemon=True)
    thread.start()
    try:
        yield desmear
    finally:
        # Its `stop` closes the loop, which cannot be done while it runs: what it awaits is cancelled instead.
        dispatcher.loop.call_soon_threadsafe(lambda: dispatcher._task and dispatcher._task.cancel())
        thread.join(10)
        desmear.close()


def _dispatch(dispatcher: Any) -> None:
    with suppress(asyncio.CancelledError):
        dispatcher.start()

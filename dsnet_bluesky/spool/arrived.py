"""Whether a run arrived in the catalog as it was sent."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from .files import Contents

__all__ = ["Unequal", "check", "lookup"]


class Unequal(RuntimeError):
    """The catalog holds other events than were sent."""


def lookup(catalog: Any, uid: str) -> Any:
    """Find a run by its whole uid, or None: the catalog's own lookup takes the beginning of one too."""
    from tiled.client.container import Container

    with suppress(KeyError):
        return Container.__getitem__(catalog, uid)
    return None


def check(catalog: Any, sent: Contents) -> None:
    """Count the events that arrived: after a forced retry some may be there twice.

    Raises
    ------
    Unequal
        If the catalog holds more or fewer than were sent.
    """
    run = lookup(catalog, sent.uid)
    for stream, number in sent.events.items():
        arrived = 0
        for table in ("internal", "internal_0"):  # a wide one is split
            with suppress(KeyError):
                arrived = len(run.base[stream].base[table].read(["seq_num"]))
                break
        if arrived != number:
            raise Unequal(f"Stream {stream}: {number} events were sent, the catalog holds {arrived}.")

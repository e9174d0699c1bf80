"""Tables in SQLite that several threads write."""

from __future__ import annotations

import threading
from typing import Any

import adbc_driver_manager
import stamina
from tiled.adapters.sql import SQLAdapter

__all__ = ["TableAdapter"]

LOCK_TIMEOUT = 10.0
"""Seconds for which rows wait until others have written theirs."""


class TableAdapter(SQLAdapter):
    """Tables in SQLite: rows wait for their turn, where Tiled would answer 500 because another thread writes."""

    def append_partition(self, *arguments: Any, **options: Any) -> None:
        """Append rows; see Tiled. What was refused has not been written, so it can be tried again."""
        for attempt in stamina.retry_context(_is_locked, attempts=None, timeout=LOCK_TIMEOUT, wait_max=0.2):
            with attempt, _appending:
                super().append_partition(*arguments, **options)


_appending = threading.Lock()


def _is_locked(error: Exception) -> bool:
    return isinstance(error, adbc_driver_manager.Error) and "locked" in str(error)

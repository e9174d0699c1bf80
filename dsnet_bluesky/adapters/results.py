"""Results, stored as rows and served as Datasets.

A result has a hidden child, an array of rows (`dsnet_bluesky.rows`): that is what a writer
appends to, with one request for any number of exposures. Who reads the result sees its variables, as many exposures
as its metadata announce: what is appended, but not announced yet, may be appended again.
Results that are stored together have their rows in the array of one of them, behind what it announces.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import zarr
from cachetools import LRUCache
from numpy.typing import NDArray
from tiled.adapters.xarray import DatasetAdapter

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.rows import COLUMNS, FIRST, ROWS, Column, parse_columns, unpack, width_of

from .serving import MOST_EXPOSURES, DerivedAdapter, confined, explained

__all__ = ["ResultAdapter"]

MOST_BYTES = 2**31
"""Of the rows of a result."""

CACHED_BYTES = 2**28
"""Of the rows of all results that are kept in memory."""

AT_ONCE = 256
"""Rows that are read together: what is not there fills no memory."""


class ResultAdapter(DerivedAdapter):
    """A result: variables with dims (exposure, ...), see `derived.ResultWriter`."""

    @classmethod
    def from_catalog(cls, data_source: Any, node: Any, /, **parameters: Any) -> DatasetAdapter:
        """Build the adapter of a node that `derived.ResultWriter` made.

        Parameters
        ----------
        data_source, node
            Of Tiled's catalog.
        **parameters
            Of the data source: `rows`, the URI of their array, and its `columns`; none before the first exposure.

        Raises
        ------
        fastapi.HTTPException
            With status 422 if the rows cannot be read.
        """
        with explained():
            said = dict(node.metadata_ or {})
            attrs = said.get("attrs")
            if not isinstance(attrs, Mapping):
                raise BadInput("The metadata of a result hold attrs, a mapping; these do not.")
            columns = parse_columns(parameters.get(COLUMNS, []))
            count = _count(said.get("exposures")) if columns else 0
            if not count:
                return cls.of_node(node, unpack(np.empty((0, 0)), [], attrs))
            if FIRST in parameters:
                first = _count(parameters[FIRST])
                rows = _read(_lent(parameters.get(ROWS)), columns, first, first + count)
            else:
                rows = _rows_of(_place(parameters.get(ROWS), node.key), columns, count)
            return cls.of_node(node, unpack(rows, columns, attrs))


def _count(exposures: Any) -> int:
    if type(exposures) is not int or not 0 <= exposures <= MOST_EXPOSURES:
        raise BadInput(f"The result announces {str(exposures)[:60]!r} exposures; at most {MOST_EXPOSURES} are served.")
    return exposures


def _place(uri: Any, key: str) -> Path:
    """Return the path of a result's own rows."""
    path = confined(str(uri))
    if not path.name.startswith(ROWS) or path.parent.name != quote_plus(key):
        raise BadInput(f"A result shows its own rows, not {path}.")
    return path


def _lent(uri: Any) -> Path:
    """Return the path of rows that another result keeps; only who may see that one knows the random part of their name."""
    path = confined(str(uri))
    if not re.fullmatch(rf"{ROWS}-[0-9a-f]{{12}}", path.name):
        raise BadInput(f"There are no rows of results at {path}.")
    return path


def _rows_of(path: Path, columns: Sequence[Column], count: int) -> NDArray[np.float64]:
    """Read the first rows; those that were read before are remembered: what was announced does not change."""
    with _reading[hash(path) % len(_reading)]:
        with _remembering:
            known = _known.get(str(path))
        if known is None or len(known) < count:
            parts = [] if known is None else [known]
            known = np.concatenate([*parts, _read(path, columns, sum(map(len, parts)), count)])
            known.setflags(write=False)
            with _remembering:
                if known.nbytes <= CACHED_BYTES:
                    _known[str(path)] = known
    return known[:count]


def _read(path: Path, columns: Sequence[Column], first: int, stop: int) -> NDArray[np.float64]:
    """Read rows, from number `first` to before `stop`."""
    width = width_of(columns)
    if 8 * (stop - first) * width > MOST_BYTES:
        raise BadInput(f"The result announces {stop - first} exposures of {width} numbers: more than is served.")
    try:
        array = zarr.open_array(path, mode="r")
        if array.ndim != 2 or array.dtype != np.float64 or array.shape[1] != width or array.chunks != (1, width):
            raise BadInput(
                f"The rows have the shape {array.shape} and type {array.dtype}; {width} columns of float64 are announced."
            )
        if array.shape[0] < stop:
            raise BadInput(f"The result announces {stop} exposures, and {array.shape[0]} are stored.")
        return np.concatenate([np.asarray(array[k : min(k + AT_ONCE, stop)]) for k in range(first, stop, AT_ONCE)])
    except BadInput:
        raise
    except Exception as error:  # of zarr, of a codec, of the file system, of JSON
        raise BadInput(f"The rows of this result cannot be read ({type(error).__name__}: {error}).") from None


_known: LRUCache[str, NDArray[np.float64]] = LRUCache(CACHED_BYTES, getsizeof=lambda rows: rows.nbytes)
_remembering = threading.Lock()
_reading = [threading.Lock() for _ in range(16)]
"""So that a result is read once, and does not hold up the others."""

"""Storing results that are finished before anything of them is stored: many with few requests, each complete at once.

What a result needs beside its own node, the rows, is stored for many results with one request: the first of them
keeps the rows of all (`ResultWriter.lend`), and each of the others is then one node, complete when it is there; they are
made with one more request (`adapters.storing`). Whatever is
killed in between leaves whole results, and the first one's node at most, which the backlog finds abandoned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xarray as xr
from tiled.client.utils import handle_error, retry_context
from tiled.utils import safe_json_dump

from dsnet_bluesky.data import BadInput, concat_exposures
from dsnet_bluesky.derived.catalog import NOT_FOUND, mount
from dsnet_bluesky.derived.results import (
    AlreadyStored,
    Lent,
    ResultWriter,
    begun,
    summary,
    summed,
    with_attrs,
)
from dsnet_bluesky.kinds import kind_of
from dsnet_bluesky.rows import COLUMNS, FIRST, GRID, ROWS, ROWS_OF, columns_of, grid_of

__all__ = ["Finished", "store_together"]


@dataclass(frozen=True)
class Finished:
    """A result whose exposures are all there, and all good.

    Attributes
    ----------
    key
        Of `documents.result_key`.
    metadata
        Of `documents.result_metadata`.
    dataset
        Of a method, dims (exposure, ...).
    access_tags
        Of its raw run, see `derived.access_tags_of`.
    """

    key: str
    metadata: Mapping[str, Any]
    dataset: xr.Dataset
    access_tags: list[str] | None


def store_together(client: Any, results: Iterable[Finished]) -> list[str]:
    """Store results whose raw runs are in the catalog.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    results
        Those that share variables, q and access tags are stored together.

    Returns
    -------
    list of str
        Keys of those that were not stored: a result of this identity was there, in whatever state.
    """
    groups: dict[str, list[Finished]] = {}
    for result in results:
        groups.setdefault(_alike(result), []).append(result)
    return [key for group in groups.values() for key in _store(client, group)]


def _alike(result: Finished) -> str:
    """Return a digest of what results must share to be stored together."""
    columns = [column.to_dict() for column in columns_of(result.dataset)]
    text = json.dumps([columns, grid_of(result.dataset), sorted(result.access_tags or [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _store(client: Any, group: Sequence[Finished]) -> list[str]:
    there: list[str] = []
    waiting = list(group)
    while waiting:
        first = waiting.pop(0)
        try:
            writer = ResultWriter.create(client, first.key, first.metadata)
        except AlreadyStored:
            there.append(first.key)
            continue
        try:
            writer.append(first.dataset)
            lent = writer.lend(concat_exposures([result.dataset for result in waiting])) if waiting else None
            writer.complete()
        except Exception:
            with suppress(Exception):  # what went wrong may go wrong again; then it is found when this process has ended
                writer.release()
            raise
        if lent is not None:
            there += _store_others(mount(client, kind_of(first.metadata["method"]).mount), waiting, lent)
        break
    return there


def _store_others(parent: Any, results: Sequence[Finished], lent: Lent) -> list[str]:
    """Make a node for each result, complete, all with one request; return the keys of those that were there.

    Raises
    ------
    BadInput
        If the server has no route for it.
    """
    body, first = [], lent.first
    columns = [column.to_dict() for column in lent.columns]
    for result in results:
        body.append(
            {
                "key": result.key,
                "metadata": _complete(result, lent, first),
                "parameters": {ROWS: lent.place, FIRST: first, COLUMNS: columns},
                "keys": [column.name for column in lent.columns],
                "access_tags": result.access_tags,
            }
        )
        first += result.dataset.sizes["exposure"]
    address = parent.uri.replace("/api/v1/metadata/", "/custom/results/", 1)
    for attempt in retry_context():
        with attempt:
            answer = parent.context.http_client.post(
                address, content=safe_json_dump(body), headers={"Content-Type": "application/json"}
            )
            if answer.status_code == NOT_FOUND:
                raise BadInput(
                    "The server cannot store results together: add dsnet_bluesky.adapters.storing:router to `routers` of its "
                    "configuration, as in tiled_config/embedded.yml."
                )
            handle_error(answer)
            return list(answer.json()["there"])
    raise AssertionError("unreachable: the last attempt returns or raises")


def _complete(result: Finished, lent: Lent, first: int) -> dict[str, Any]:
    said, kind = begun(result.metadata, None), kind_of(result.metadata["method"])
    return {
        **said,
        "status": "complete",
        "exposures": result.dataset.sizes["exposure"],
        ROWS: lent.rows,
        ROWS_OF: lent.of,
        FIRST: first,
        GRID: grid_of(result.dataset),
        **summary(kind, summed(kind, result.dataset)),
        "attrs": with_attrs({**said["attrs"], "status": "complete"}, result.dataset),
    }

"""Writing results under ``/desmeared``: each once, exposure by exposure, complete last."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from tiled.client.utils import ClientError
from tiled.structures.array import ArrayStructure
from tiled.structures.core import Spec, StructureFamily
from tiled.structures.data_source import DataSource

from dsnet_bluesky.data import WORDS, BadInput, concat_exposures, exposures_of, failed_exposure
from dsnet_bluesky.derived.catalog import CONFLICT, access_tags_of, mount

__all__ = ["LEASE", "AlreadyStored", "ResultWriter"]

LEASE = 6 * 3600.0
"""Seconds after which a result that another machine began, and has not touched since, counts as abandoned."""

RESULT_SPECS = [Spec("dsnet_desmeared", version="1"), Spec("xarray_dataset")]
"""Tiled takes the first spec that a client knows: ours, where this package is installed."""


class AlreadyStored(Exception):
    """A result of this identity is there already; results are written once.

    Attributes
    ----------
    key
        Of the node.
    status
        complete, failed, or running: somebody else is writing it now.
    """

    def __init__(self, key: str, status: str):
        self.key, self.status = key, status
        super().__init__(f"The result {key} exists already (status {status}).")


class ResultWriter:
    """One result under ``/desmeared``, filled exposure by exposure; make it with `create`.

    A result is a container of arrays that reads as a Dataset with dims (exposure, q),
    also with a plain Tiled client (there words, `status` and `answer`, are numbers, explained by the
    variable's attributes). Which variables it has, the first exposure settles. Its metadata say `status` (running, complete or
    failed), `reason`, the number of `exposures` and which of them failed (`failures`).
    A result that failed as a whole holds no arrays: it reads as an empty Dataset
    whose attributes hold `status` and `reason`. Nothing is changed after `complete`
    or `fail`.

    While it runs, arrays grow one after the other: the client of `queries` reads the
    exposures that all of them hold.
    """

    def __init__(self, node: Any, access_tags: list[str] | None):
        self.node = node
        self.exposures = 0
        self._access_tags = access_tags
        self._arrays: dict[str, Any] = {}
        self._first: xr.Dataset | None = None
        self._attrs: dict[str, Any] = dict(node.metadata["attrs"])
        self._failures: list[dict[str, Any]] = []
        self._pending: list[str] = []

    @classmethod
    def create(
        cls,
        client: Any,
        key: str,
        metadata: Mapping[str, Any],
        *,
        access_tags: Sequence[str] | None = None,
        replace_failed: bool = False,
    ) -> ResultWriter:
        """Create the node of a result.

        A node that a crash left behind (`running`, and nobody writes it any more) is
        removed and begun again. Nobody does if its writer was a process of this machine
        that is gone, or has not touched it for `LEASE` seconds.

        Parameters
        ----------
        client
            Tiled client of the server's root.
        key
            Of `documents.result_key`.
        metadata
            Of `documents.result_metadata`.
        access_tags
            Those of the raw run if not given.
        replace_failed
            Remove a result that failed, and begin it again: it says why, but is nothing
            that somebody could have used. A complete result is never replaced.

        Raises
        ------
        AlreadyStored
            If the result is there, or being written.
        """
        parent = mount(client, "desmeared")
        tags = list(access_tags) if access_tags else _tags_of_raw(client, metadata["raw_uid"])
        full = {
            **metadata,
            "status": "running",
            "exposures": 0,
            "failures": [],
            "writer": {"host": socket.gethostname(), "pid": os.getpid()},
            "updated": time.time(),
            "attrs": {"status": "running", "raw_uid": metadata["raw_uid"], "method": metadata["method"]},
        }
        for last in (False, True):
            try:
                node = parent.create_container(key=key, metadata=full, specs=RESULT_SPECS, access_tags=tags)
            except ClientError as error:
                if error.response.status_code != CONFLICT:
                    raise
                _make_way(parent, key, () if last else ("failed", "running") if replace_failed else ("running",))
            else:
                writer = cls(node, tags)
                _open_writers[key] = writer
                return writer
        raise AssertionError("unreachable: the second conflict raises AlreadyStored")

    def append(self, dataset: xr.Dataset) -> None:
        """Append exposures; if it raises, the same exposures may be appended again.

        Parameters
        ----------
        dataset
            Of `desmearing.desmear`, with or without the dimension exposure, by one method on one q.

        Raises
        ------
        BadInput
            If its q or its variables are not those of the exposures before.
        """
        rows = exposures_of(dataset)
        if self._first is not None:
            _check_alike(rows, self._first)
        self._attrs |= {name: value for name, value in dataset.attrs.items() if name not in (*self._attrs, "failures")}
        earlier = [failed_exposure(rows)] * len(self._pending)
        failures = dict(enumerate(self._pending))
        for failure in json.loads(dataset.attrs.get("failures", "[]")):
            failures[len(earlier) + failure["exposure"]] = failure["reason"]
        self._write(concat_exposures([*earlier, rows]) if earlier else rows, failures)
        self._pending = []

    def append_failure(self, reason: str) -> None:
        """Append an exposure that failed: a row of NaN, with its status and reason."""
        if self._first is None:
            self._pending.append(reason)  # its row is written when the first good exposure says what a row is
        else:
            self._write(failed_exposure(self._first), {0: reason})

    def complete(self) -> None:
        """Declare the result complete; without a single good exposure it fails, for the reason of the first."""
        if self._first is None:
            self.fail(self._pending[0] if self._pending else "The run holds no exposure.")
        else:
            self._close("complete", None)

    def fail(self, reason: str) -> None:
        """Declare that the result failed as a whole."""
        self._close("failed", reason)

    def abandon(self) -> None:
        """Leave the result as it is, to whoever begins it again."""
        _open_writers.pop(self.node.item["id"], None)

    def _close(self, status: str, reason: str | None) -> None:
        said = {"status": status, **({"reason": reason} if reason else {})}
        self._attrs |= said
        self._update(**said)
        self.abandon()

    def _write(self, rows: xr.Dataset, reasons: Mapping[int, str]) -> None:
        # The status comes last: an exposure without one is not complete.
        names = sorted(map(str, rows.variables), key=lambda name: name == "status")
        for name in names:
            self._put(name, rows[name])
        failures = [{"exposure": self.exposures + i, "reason": reason} for i, reason in reasons.items()]
        self._update(exposures=self.exposures + rows.sizes["exposure"], failures=self._failures + failures)
        self.exposures += rows.sizes["exposure"]
        self._failures += failures
        self._first = rows.isel(exposure=[0]) if self._first is None else self._first

    def _put(self, name: str, values: xr.DataArray) -> None:
        values = _coded(values, WORDS[name]) if name in WORDS else values
        array = values.values
        if name not in self._arrays:
            self._arrays[name] = self._create_array(name, values, array)
        elif "exposure" not in values.dims:
            return  # q is there already
        offset = (self.exposures,) if "exposure" in values.dims else (0,)
        self._arrays[name].patch(array, offset=offset, extend=True)

    def _create_array(self, name: str, values: xr.DataArray, array: np.ndarray) -> Any:
        chunks = tuple((1,) * size if dim == "exposure" else (size,) for dim, size in values.sizes.items())
        structure = ArrayStructure.from_array(array, chunks=chunks, dims=tuple(map(str, values.dims)))
        try:
            return self.node.new(
                StructureFamily.array,
                [DataSource(structure=structure, structure_family=StructureFamily.array)],
                key=name,
                metadata={"attrs": values.attrs},
                specs=[Spec("xarray_coord" if name in values.coords else "xarray_data_var")],
                access_tags=self._access_tags,
            )
        except ClientError as error:
            if error.response.status_code != CONFLICT:
                raise
            return self.node[name]  # an attempt before this one got as far as here

    def _update(self, **changes: Any) -> None:
        changes = {**changes, "updated": time.time(), "attrs": self._attrs}
        self.node.update_metadata(changes, drop_revision=True)


_open_writers: weakref.WeakValueDictionary[str, ResultWriter] = weakref.WeakValueDictionary()
"""Results that this process is writing."""


def _check_alike(rows: xr.Dataset, first: xr.Dataset) -> None:
    """Refuse exposures that are not of one q and one method with the first."""
    q, before = rows["q"].values, first["q"].values
    if not np.array_equal(q, before):
        raise BadInput(f"The exposures of a result share one q; these have {q.size} points, those before {before.size}.")
    if odd := set(rows.variables) ^ set(first.variables):
        raise BadInput(
            f"The exposures of a result share their variables; {', '.join(sorted(map(str, odd)))} is not in all of them: "
            "desmear them with one method."
        )


def _coded(values: xr.DataArray, words: Sequence[str]) -> xr.DataArray:
    """Turn words into numbers, with the CF attributes that explain them: Zarr has no settled format for strings."""
    codes = np.array([words.index(value) for value in values.values], dtype=np.uint8)
    meanings = {"flag_values": list(range(1, len(words))), "flag_meanings": " ".join(words[1:])}
    return values.copy(data=codes).assign_attrs(meanings)


def _tags_of_raw(client: Any, raw_uid: str) -> list[str] | None:
    try:
        return access_tags_of(client["raw"][raw_uid])
    except KeyError:
        return None


def _make_way(parent: Any, key: str, removable: Sequence[str]) -> None:
    """Remove a node of a removable status that nobody writes any more, or raise AlreadyStored."""
    try:
        metadata = parent[key].metadata
    except KeyError:
        return  # removed by somebody else in this moment
    status = metadata["status"]
    if status not in removable or (status == "running" and _is_written(key, metadata)):
        raise AlreadyStored(key, status)
    with contextlib.suppress(ClientError):  # somebody else was faster: the next attempt to create tells
        parent.delete_contents(key, recursive=True, external_only=False)


def _is_written(key: str, metadata: Mapping[str, Any]) -> bool:
    writer = metadata["writer"]
    if writer["host"] != socket.gethostname():
        return time.time() - metadata["updated"] < LEASE
    if writer["pid"] == os.getpid():
        return key in _open_writers
    return _is_alive(writer["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

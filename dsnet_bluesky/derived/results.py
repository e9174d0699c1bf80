"""Writing results: each once, exposure by exposure, complete last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xarray as xr
from tiled.client.utils import ClientError, handle_error, retry_context
from tiled.structures.array import ArrayStructure
from tiled.structures.core import StructureFamily
from tiled.structures.data_source import DataSource, Management

from dsnet_bluesky.data import BadInput, concat_exposures, exposures_of, failed_exposure
from dsnet_bluesky.derived.catalog import CONFLICT, NOT_FOUND, access_tags_of, lookup, mount
from dsnet_bluesky.kinds import Kind, kind_of
from dsnet_bluesky.nodes import RESULT_MIMETYPE, specs_of
from dsnet_bluesky.rows import COLUMNS, GRID, ROWS, Column, columns_of, grid_of, pack

__all__ = [
    "CLAIM_INTERVAL",
    "LEASE",
    "AlreadyStored",
    "Lent",
    "LostClaim",
    "NoRawRun",
    "ResultWriter",
    "begun",
    "is_abandoned",
    "summary",
    "summed",
    "with_attrs",
]

LEASE = 120.0
"""Seconds after which a result that another machine writes, and has not touched since we first looked, counts as abandoned.

By this machine's monotonic clock: that of another machine may be wrong, and any clock may jump.
"""

CLAIM_INTERVAL = LEASE / 4
"""Seconds after which a writer touches its result, though it has nothing to add."""

SUMMARIES: dict[str, Callable[[Sequence[float]], Any]] = {"median": np.median, "largest": max, "least": min}
"""How a summary of exposures is made, see `kinds.Kind.summary`."""

UNSUPPORTED = 415
"""Status of the answer when the server has no adapter for a MIME type."""


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


class NoRawRun(ConnectionError):
    """The raw run of a result is not in the catalog, or not yet."""


class LostClaim(Exception):
    """Another process has taken over the result that this one was writing, because it seemed abandoned, or removed it."""


class ResultWriter:
    """One result under the mount of its kind (`kinds`), filled exposure by exposure; make it with `create`.

    A result reads as a Dataset with dims (exposure, ...), also with a plain Tiled client (there words, `status` and
    `answer`, are numbers, explained by the variable's attributes). Which variables it has, the first exposure settles.
    Its exposures are rows of one array (`dsnet_bluesky.rows`), so that any number of them is stored with one request, and
    the server makes variables of them (`adapters.ResultAdapter`). Its metadata say `status` (running, complete or
    failed), `reason`, the number of `exposures` and which of them failed (`failures`).
    A result that failed as a whole holds no rows: it reads as an empty Dataset
    whose attributes hold `status` and `reason`. Nothing is changed after `complete`
    or `fail`.
    """

    def __init__(self, node: Any, access_tags: list[str] | None, claim: _Claim):
        self.node = node
        self.exposures = 0
        self._claim: _Claim | None = claim
        self._touched = time.monotonic()
        self._access_tags = access_tags
        self._rows: Any = None
        self._columns: list[Column] = []
        self._first: xr.Dataset | None = None
        self._attrs: dict[str, Any] = dict(node.metadata["attrs"])
        self._failures: list[dict[str, Any]] = []
        self._kind = kind_of(node.metadata["method"])
        self._summed: dict[str, list[float]] = {}
        self._pending: list[str] = []

    @classmethod
    def create(
        cls,
        client: Any,
        key: str,
        metadata: Mapping[str, Any],
        *,
        patience: float = 0.0,
        replace_failed: bool = False,
    ) -> ResultWriter:
        """Create the node of a result; it gets the access tags of its raw run.

        A node that a crash left behind (`running`, and nobody writes it any more, see
        `is_abandoned`) is removed and begun again.

        Parameters
        ----------
        client
            Tiled client of the server's root.
        key
            Of `documents.result_key`.
        metadata
            Of `documents.result_metadata`.
        patience
            Seconds to wait until the raw run is in the catalog.
        replace_failed
            Remove a result that failed, and begin it again: it says why, but is nothing
            that somebody could have used. A complete result is never replaced.

        Raises
        ------
        AlreadyStored
            If the result is there, or being written.
        NoRawRun
            If the raw run is not in the catalog. Without its tags, anybody could read the result.
        BadInput
            If the server has no mount for it, or no adapter.
        """
        kind = kind_of(metadata["method"])
        parent = mount(client, kind.mount)
        tags = _tags_of_raw(client, metadata["raw_uid"], patience)
        # Before the node is there: another thread may look at it before this one hears that it was made.
        claim = _Claim()
        full = begun(metadata, claim.id)
        try:
            for last in (False, True):
                try:
                    node = parent.new(
                        StructureFamily.container, [_source()], key=key, metadata=full, specs=specs_of(kind), access_tags=tags
                    )
                except ClientError as error:
                    if error.response.status_code == UNSUPPORTED:
                        raise BadInput(
                            f"The server cannot show results: add adapters_by_mimetype of /{kind.mount}, as in "
                            "tiled_config/embedded.yml, to its configuration."
                        ) from error
                    if error.response.status_code != CONFLICT:
                        raise
                    before = _make_way(parent, key, () if last else ("failed", "running") if replace_failed else ("running",))
                    full["attempts"] = before.get("attempts", 0) + 1
                else:
                    return cls(node, tags, claim)
            raise AssertionError("unreachable: the second conflict raises AlreadyStored")
        except BaseException:
            claim.close()  # the server may have made the node all the same: the next attempt shall find it abandoned
            raise

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
        self._attrs = with_attrs(self._attrs, dataset)
        earlier = [failed_exposure(rows)] * len(self._pending)
        failures = dict(enumerate(self._pending))
        for failure in json.loads(dataset.attrs.get("failures", "[]")):
            failures[len(earlier) + failure["exposure"]] = failure["reason"]
        self._write(concat_exposures([*earlier, rows]) if earlier else rows, failures)
        self._pending = []

    def lend(self, dataset: xr.Dataset) -> Lent:
        """Keep the exposures of other results behind one's own; only before `complete`, and after the last `append`.

        Parameters
        ----------
        dataset
            Exposures like those that were appended.
        """
        assert self._rows is not None
        assert self._first is not None
        _check_alike(dataset, self._first)
        with self._losing():
            self._rows.patch(pack(dataset, self._columns), offset=(self.exposures,), extend=True)
        place = self._rows.data_sources()[0].assets[0].data_uri
        return Lent(self.node.item["id"], self._rows.item["id"], place, self._columns, self.exposures)

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
            self._close("complete", None, **summary(self._kind, self._summed))

    def fail(self, reason: str, kind: str = "input", traceback: str | None = None) -> None:
        """Declare that the result failed as a whole.

        Parameters
        ----------
        reason
            For a user: what is wrong and what to do.
        kind
            ``direct_beam``: none fits yet, worth another attempt when one comes; ``input``: not worth any;
            ``internal``: a fault of the program, worth a few.
        traceback
            Digest of it; the log has the whole.
        """
        self._close("failed", reason, failure={"kind": kind, "traceback": traceback})

    def keep_claim(self) -> None:
        """Touch the result, where that was not done for a while, so that no other process takes it for abandoned.

        Raises
        ------
        LostClaim
            If one has done so.
        """
        if time.monotonic() > self._touched + CLAIM_INTERVAL:
            self._update()

    def release(self) -> None:
        """Give the result up unfinished, so that others may begin it again at once, also where this process lives on."""
        try:
            self._update(writer={**self.node.metadata["writer"], "claim": None})
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leave the result as it is, to whoever begins it again; other processes can do so when this one has ended."""
        if self._claim is not None:
            self._claim.close()
        self._claim = None

    def _close(self, status: str, reason: str | None, **more: Any) -> None:
        said = {"status": status, **({"reason": reason} if reason else {})}
        self._attrs |= said
        self._update(**said, **more)
        self.abandon()

    def _write(self, rows: xr.Dataset, reasons: Mapping[int, str]) -> None:
        self._check_claim()
        with self._losing():
            self._rows = self._begin_rows(rows) if self._rows is None else self._rows
            self._rows.patch(pack(rows, self._columns), offset=(self.exposures,), extend=True)
        # Nobody sees the exposures until they are announced: up to here, all of it may be done again.
        failures = [{"exposure": self.exposures + i, "reason": reason} for i, reason in reasons.items()]
        announced = {"exposures": self.exposures + rows.sizes["exposure"], "failures": self._failures + failures}
        self._update(**announced, **{ROWS: self._rows.item["id"], GRID: grid_of(rows)})
        self.exposures += rows.sizes["exposure"]
        for name, values in summed(self._kind, rows).items():
            self._summed.setdefault(name, []).extend(values)
        self._failures += failures
        self._first = rows.isel(exposure=[0]) if self._first is None else self._first

    def _begin_rows(self, first: xr.Dataset) -> Any:
        """Make the array of rows and tell the server what is in it; may be repeated."""
        self._columns = columns_of(first)
        array = pack(first, self._columns)
        structure = ArrayStructure.from_array(array, chunks=((1,) * len(array), (array.shape[1],)), dims=("exposure", "column"))
        columns = [column.to_dict() for column in self._columns]
        rows = self.node.new(
            StructureFamily.array,
            [DataSource(structure=structure, structure_family=StructureFamily.array)],
            # A name of its own for each attempt: one that broke down may have left files that no node knows.
            key=f"{ROWS}-{uuid.uuid4().hex[:12]}",
            metadata={COLUMNS: columns},
            access_tags=self._access_tags,
        )
        # As a parameter, no asset: deleting the result shall delete the rows by their own node, once.
        place = rows.data_sources()[0].assets[0].data_uri
        (mine,) = self.node.data_sources()
        source = _source({ROWS: place, COLUMNS: columns})
        _put_data_source(self.node, dataclasses.replace(source, id=mine.id, structure={"keys": [c.name for c in self._columns]}))
        return rows

    def _update(self, **changes: Any) -> None:
        self._check_claim()
        # Whole values, so that it may be repeated where an answer was lost: Tiled's update_metadata sends what differs
        # from what this client last heard, which adds to lists once more.
        said = {**changes, "updated": time.time(), "attrs": self._attrs}
        patch = [{"op": "add", "path": f"/{name}", "value": value} for name, value in said.items()]
        with self._losing():
            self.node.patch_metadata(patch, drop_revision=True)
        self._touched = time.monotonic()

    def _check_claim(self) -> None:
        """After a silence that others may have taken for our end, look whether the result is still ours."""
        if time.monotonic() < self._touched + LEASE / 2:
            return
        with self._losing():
            found = self.node.refresh().metadata["writer"]["claim"]
        if self._claim is None or found != self._claim.id:
            raise self._lost()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Say of a node that is gone that it was taken over or removed."""
        try:
            yield
        except ClientError as error:
            if error.response.status_code != NOT_FOUND:
                raise
            raise self._lost() from error

    def _lost(self) -> LostClaim:
        self.abandon()
        return LostClaim(f"The result {self.node.item['id']} was taken over by another process, or removed.")


def begun(metadata: Mapping[str, Any], claim: str | None) -> dict[str, Any]:
    """Return the metadata of a result that holds no exposure yet."""
    return {
        **metadata,
        "status": "running",
        "attempts": 1,
        "exposures": 0,
        ROWS: None,
        "failures": [],
        "writer": {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "claim": claim},
        "updated": time.time(),
        "attrs": {"status": "running", "raw_uid": metadata["raw_uid"], "method": metadata["method"]},
    }


def with_attrs(said: Mapping[str, Any], dataset: xr.Dataset) -> dict[str, Any]:
    """Add to the attributes of a result those of its exposures; what it says already stays, and failures stand elsewhere."""
    return {**{name: value for name, value in dataset.attrs.items() if name != "failures"}, **said}


def summed(kind: Kind, rows: xr.Dataset) -> dict[str, list[float]]:
    """Return the values of the good exposures that a summary is made of, by variable."""
    good = (rows["status"] == "ok").values
    return {name: rows[name].values[good].astype(float).tolist() for name, _ in kind.summary.values()}


def summary(kind: Kind, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return what a complete result says of its good exposures: `kinds.Kind.summary` of what `summed` gave."""
    return {key: float(SUMMARIES[how](values[name])) for key, (name, how) in kind.summary.items()}


@dataclasses.dataclass(frozen=True)
class Lent:
    """Where one result keeps rows for others: its key, that of the rows, their URI and columns, and the first that is free."""

    of: str
    rows: str
    place: str
    columns: list[Column]
    first: int


class _Claim:
    """What a writer holds as long as it writes its result; open until it is closed, or forgotten."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        _open_claims[self.id] = self

    def close(self) -> None:
        """Give it up at once: what holds it besides, such as the traceback of an error, may live on for long."""
        _open_claims.pop(self.id, None)


_open_claims: weakref.WeakValueDictionary[str, _Claim] = weakref.WeakValueDictionary()
"""Claims of this process, by what the results say of them."""


def _check_alike(rows: xr.Dataset, first: xr.Dataset) -> None:
    """Refuse exposures that are not of one q, if they have any, and one method with the first."""
    if grid_of(rows) != grid_of(first):
        sizes = [dataset.sizes.get("q", 0) for dataset in (rows, first)]
        raise BadInput(f"The exposures of a result share one q; these have {sizes[0]} points, those before {sizes[1]}.")
    mine, theirs = ({(c.name, c.dims, c.shape, c.dtype) for c in columns_of(dataset)} for dataset in (rows, first))
    if odd := sorted({name for name, *_ in mine ^ theirs}):
        raise BadInput(
            f"The exposures of a result share their variables; {', '.join(odd)} is not in all of them alike: "
            "answer them with one method."
        )


def _source(parameters: Mapping[str, Any] | None = None) -> DataSource:
    """Say where the server finds the variables of a result."""
    return DataSource(
        structure_family=StructureFamily.container,
        structure=None,
        mimetype=RESULT_MIMETYPE,
        parameters=dict(parameters or {}),
        management=Management.external,
    )


def _put_data_source(node: Any, source: DataSource) -> None:
    """Change a node's data source; Tiled's client has no word for it."""
    address = node.uri.replace("/metadata/", "/data_source/", 1)
    body = {"data_source": dataclasses.asdict(source)}
    for attempt in retry_context():
        with attempt:
            handle_error(node.context.http_client.put(address, json=body))


def _tags_of_raw(client: Any, raw_uid: str, patience: float) -> list[str] | None:
    raw, end = mount(client, "raw"), time.monotonic() + patience
    while (run := lookup(raw, raw_uid)) is None:
        if time.monotonic() > end:
            raise NoRawRun(f"Run {raw_uid} is not in the catalog; a result is stored only beside its raw run.")
        time.sleep(0.05)
    return access_tags_of(run)


def _make_way(parent: Any, key: str, removable: Sequence[str]) -> Mapping[str, Any]:
    """Remove a node of a removable status that nobody writes any more, and return its metadata; else raise AlreadyStored."""
    try:
        metadata = parent[key].metadata
        if metadata["status"] == "running" and is_abandoned(key, metadata):
            # A writer says how its result ended, and only then leaves it: it may have done both since it was read.
            metadata = parent[key].metadata
    except KeyError:
        return {}  # removed by somebody else in this moment
    status = metadata["status"]
    if status not in removable or (status == "running" and not is_abandoned(key, metadata)):
        raise AlreadyStored(key, status)
    with contextlib.suppress(ClientError):  # somebody else was faster: the next attempt to create tells
        parent.delete_contents(key, recursive=True, external_only=False)
    return metadata


_seen: dict[str, tuple[tuple[Any, ...], float]] = {}
"""Results that others write: how they were touched last, and when we first saw that."""


def is_abandoned(key: str, metadata: Mapping[str, Any]) -> bool:
    """Whether nobody writes a running result any more.

    Nobody does if its writer gave it up, or was a process of this machine that is gone, or of before the machine was
    started. One of another machine is known by its silence: `LEASE` seconds without a touch, as seen by this process,
    which must look more than once.
    """
    writer = metadata["writer"]
    if writer.get("claim") is None:
        return True
    if writer["host"] == socket.gethostname():
        if writer.get("boot", _boot()) != _boot():
            return True  # whatever process has that number now
        return writer["claim"] not in _open_claims if writer["pid"] == os.getpid() else not _is_alive(writer["pid"])
    touch, now = (writer["claim"], metadata["updated"]), time.monotonic()
    if _seen.get(key, (None, 0.0))[0] != touch:
        _seen[key] = (touch, now)
    return now - _seen[key][1] > LEASE


@functools.cache
def _boot() -> str:
    """What Linux calls the time since the machine was started; empty elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        # One that was killed, and that nobody has asked how it ended, is still listed.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True

"""The spool's files: one for each run, records with length and checksum, and locks that end with the process that holds them.

::

    20261122T101500.123456-UID.run    documents of a run that waits, named by its start
    refused/ damaged/ delivered/      runs that the catalog refused; as found, before repair; kept for a while
    target deliverer.json alarm       address of the catalog; what the deliverer met; what the writer met
    deliverer.lock writers.lock       held by who delivers; by who writes
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import msgpack
import numpy as np

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput

__all__ = ["Contents", "Spool", "count", "encode", "hold", "is_free", "note", "noted", "read"]

HEADER = struct.Struct(">II")
"""Length and CRC-32 of the record that follows."""

ARRAY = 1
"""Code of NumPy arrays and scalars among msgpack's extensions."""


class Spool:
    """The folder of a spool and what lies in it.

    Parameters
    ----------
    directory
        On a local disk.
    target
        Make a spool there, if need be, whose runs go to this address.

    Raises
    ------
    BadInput
        If there is no spool, and none is to be made.
    """

    def __init__(self, directory: str | Path, *, target: str | None = None):
        self.directory = Path(directory).absolute()
        self.refused, self.damaged, self.delivered = (self.directory / name for name in ("refused", "damaged", "delivered"))
        self.deliverer_lock, self.writers_lock = (self.directory / f"{name}.lock" for name in ("deliverer", "writers"))
        self.target, self.alarm = self.directory / "target", self.directory / "alarm"
        self.errors, self.log = self.directory / "deliverer.json", self.directory / "deliverer.log"
        if target is not None:
            self._make(target)
        elif not self.target.exists():
            raise BadInput(f"{directory} is no spool: no SpooledWriter has written there.")

    def _make(self, target: str) -> None:
        for folder in (self.refused, self.damaged, self.delivered):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.target) as partial:
            partial.write_text(target)

    def new(self, start: Mapping[str, Any]) -> Path:
        """Name the file of a run that begins; names sort by time, none is taken."""
        stem = f"{_stamp(start.get('time'))}-{re.sub(r'[^A-Za-z0-9.-]', '_', start['uid'])[:64]}"
        names = (f"{stem}{f'.{n}' if n else ''}.run" for n in itertools.count())
        return next(path for name in names if not (path := self.directory / name).exists())

    def waiting(self) -> list[Path]:
        """Files of the runs that wait, in the order of their start."""
        return sorted(self.directory.glob("*.run"))

    def size(self) -> int:
        """Bytes of all runs that wait."""
        with os.scandir(self.directory) as entries, suppress(FileNotFoundError):  # one may be delivered meanwhile
            return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".run"))
        return 0


def encode(name: str, doc: Mapping[str, Any]) -> bytes:
    """Make a record of a document."""
    body = cast("bytes", msgpack.packb([name, doc], default=_pack))
    return HEADER.pack(len(body), zlib.crc32(body)) + body


def read(file: IO[bytes], offset: int = 0) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Read the documents after `offset`, each with where it ends, up to the first record that is not whole."""
    size = os.fstat(file.fileno()).st_size
    file.seek(offset)
    while len(header := file.read(HEADER.size)) == HEADER.size:
        length, checksum = HEADER.unpack(header)
        offset += HEADER.size + length
        # Length 0: a power cut may leave zeros at the end, whose checksum is right.
        if not 0 < length <= size - offset + length or zlib.crc32(body := file.read(length)) != checksum:
            return
        name, doc = msgpack.unpackb(body, ext_hook=_unpack, strict_map_key=False)
        yield name, doc, offset


def count(file: IO[bytes]) -> int:
    """Count the records without reading them."""
    size, offset, records = os.fstat(file.fileno()).st_size, 0, 0
    while len(header := os.pread(file.fileno(), HEADER.size, offset)) == HEADER.size:
        offset += HEADER.size + HEADER.unpack(header)[0]
        records += offset <= size
    return records


class Contents:
    """What a run's file holds, or as much of it as was delivered."""

    def __init__(self) -> None:
        self.uid = ""
        self.stop = ""
        self.end = 0
        self.events: Counter[str] = Counter()
        self._streams: dict[str, str] = {}

    @classmethod
    def of(cls, path: Path) -> Contents:
        """Read a whole file."""
        contents = cls()
        with path.open("rb") as file:
            for document in read(file):
                contents.add(*document)
        return contents

    def add(self, name: str, doc: Mapping[str, Any], end: int) -> None:
        """Take a document into account, and where its record ends."""
        self.uid, self.end = self.uid or doc["uid"], end
        if name == "stop":
            self.stop = doc["uid"]
        elif name == "descriptor":
            self._streams[doc["uid"]] = doc["name"]
        elif name in ("event", "event_page"):
            self.events[self._streams[doc["descriptor"]]] += 1 if name == "event" else len(doc["seq_num"])


def hold(file: IO[bytes] | int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock a file until it is closed or this process ends; False where another holds it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_free(path: Path, *, shared: bool = False) -> bool:
    """Whether no process holds the lock of a file; tell it if holders share that lock."""
    try:
        with path.open("rb") as file:
            return hold(file, shared=not shared)  # does not disturb others that look
    except FileNotFoundError:
        return True


def note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def noted(path: Path) -> dict[str, Any]:
    """Read what `note` wrote; empty where there is nothing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _stamp(time: Any) -> str:
    """Write a time so that names sort by it; a clock may say what is none."""
    with suppress(TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(time, UTC).strftime("%Y%m%dT%H%M%S.%f")
    return "undated"


def _pack(value: Any) -> Any:
    """Turn what msgpack does not know into what it knows."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "OV":
            return value.tolist()
        return msgpack.ExtType(ARRAY, msgpack.packb([value.dtype.str, value.shape, value.tobytes()]))
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    return float(value) if isinstance(value, int) else str(value)  # integers beyond 64 bits


def _unpack(code: int, data: bytes) -> Any:
    if code != ARRAY:
        return msgpack.ExtType(code, data)
    dtype, shape, content = msgpack.unpackb(data)
    return np.frombuffer(content, dtype).reshape(shape)[()]

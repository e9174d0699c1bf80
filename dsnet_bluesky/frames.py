"""Reading detector frames from the files that run documents refer to.

Raw files are opened read-only, also while a detector still writes them (HDF5
in single-writer-multiple-reader mode).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import fabio
import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters of area detectors
import numpy as np
from numpy.typing import NDArray

from .data import BadInput

__all__ = ["FABIO_MIMETYPE", "HDF5_MIMETYPE", "FrameReference", "NotYet", "count", "path_of", "read"]

HDF5_MIMETYPE = "application/x-hdf5"

FABIO_MIMETYPE = "application/x-fabio"
"""Of what fabio reads, where a detector says nothing more precise."""


class NotYet(BadInput):
    """A file is missing, locked by its writer or shorter than promised: it may be better in a moment."""


@dataclass(frozen=True)
class FrameReference:
    """Where the frames of an exposure are.

    Attributes
    ----------
    uri
        ``file://`` URI of the file, or of one file of a sequence.
    mimetype
        ``application/x-hdf5``, or anything else (``application/x-fabio``) for what fabio reads.
    parameters
        Of the stream resource: `dataset` is the path inside an HDF5 file.
    start, stop
        Frames [start, stop) of the file.
    """

    uri: str
    mimetype: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None


def path_of(uri: str) -> Path:
    """Return the local path of a ``file://`` URI.

    Raises
    ------
    BadInput
        If the URI does not name a local file.
    """
    parsed = urlparse(uri)
    if parsed.scheme != "file":
        raise BadInput(f"Frames are read from local files; {uri} is not a file:// URI.")
    return Path(unquote(parsed.path))


def read(reference: FrameReference) -> NDArray:
    """Read the frames of a reference.

    Parameters
    ----------
    reference
        What to read.

    Returns
    -------
    ndarray
        Shape (frame, y, x), in the file's own number type.

    Raises
    ------
    NotYet
        If the file is missing, locked, truncated, or holds too few frames.
    BadInput
        If it is not an image.
    """
    path = path_of(reference.uri)
    if not path.is_file():
        raise NotYet(f"The file {path} does not exist (or is not visible from this machine).")
    stack = (
        _read_hdf5(path, reference)
        if reference.mimetype == HDF5_MIMETYPE
        else _read_fabio(path)[reference.start : reference.stop]
    )
    wanted = None if reference.stop is None else reference.stop - reference.start
    if stack.shape[0] == 0 or (wanted is not None and stack.shape[0] < wanted):
        raise NotYet(
            f"{path.name} is truncated: it holds {stack.shape[0]} of the {wanted or 1} frames from number {reference.start} on."
        )
    return stack


def count(reference: FrameReference) -> int:
    """Return how many frames the whole file holds at this moment.

    Raises
    ------
    BadInput
        As `read`.
    """
    path = path_of(reference.uri)
    if reference.mimetype != HDF5_MIMETYPE:
        return _read_fabio(path).shape[0]
    with _open_hdf5(path) as file:
        dataset = _dataset(file, path, reference)
        return int(np.prod(dataset.shape[:-2]))


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", libver="latest", swmr=True)
    except BlockingIOError as error:
        raise NotYet(f"{path.name} is locked by the program that writes it, not in SWMR mode ({error}).") from error
    except OSError as error:
        kind = NotYet if path.stat().st_size == 0 or "truncated" in str(error) else BadInput
        raise kind(f"{path.name} cannot be opened as HDF5: it is truncated, still empty, or not HDF5 ({error}).") from error


def _dataset(file: h5py.File, path: Path, reference: FrameReference) -> h5py.Dataset:
    name = str(reference.parameters.get("dataset") or "/entry/data/data")
    try:
        dataset = file[name]
    except KeyError:
        raise BadInput(f"{path.name} holds no dataset {name}; it may be truncated, or the name is another.") from None
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim < 2:
        raise BadInput(f"{name} in {path.name} is not a stack of images.")
    return dataset


def _read_hdf5(path: Path, reference: FrameReference) -> NDArray:
    with _open_hdf5(path) as file:
        dataset = _dataset(file, path, reference)
        try:
            dataset.refresh()
            if dataset.ndim == 3:
                return np.asarray(dataset[reference.start : reference.stop])
            return np.asarray(dataset[()]).reshape(-1, *dataset.shape[-2:])[reference.start : reference.stop]
        except OSError as error:
            raise NotYet(f"{path.name} is truncated or damaged: its frames cannot be read ({error}).") from error


def _read_fabio(path: Path) -> NDArray:
    try:
        with _fabio_errors() as errors, fabio.open(str(path)) as image:
            stack = np.stack([np.asarray(image.get_frame(i).data) for i in range(image.nframes)])
    except Exception as error:
        # fabio raises whatever its many readers raise: all of it means that the file is no image it knows.
        kind = BadInput if path.stat().st_size else NotYet
        raise kind(f"{path.name} cannot be read as a detector image ({type(error).__name__}: {error}).") from error
    if errors:
        raise NotYet(f"{path.name} is truncated or damaged ({errors[0]}).")
    return stack


@contextmanager
def _fabio_errors() -> Iterator[list[str]]:
    """Collect what fabio only logs: it fills a truncated EDF with zeros and goes on."""
    found: list[str] = []
    thread = threading.get_ident()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage()) if record.thread == thread else None
    logger = logging.getLogger("fabio")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)

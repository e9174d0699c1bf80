"""Reading detector frames from the files that run documents refer to.

Raw files are opened read-only, also while a detector still writes them (HDF5
in single-writer-multiple-reader mode). What a file says of itself is checked before
it is believed: its size, and which other files it refers to.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters of area detectors
import numpy as np
from numpy.typing import NDArray

from .data import BadInput

__all__ = ["FABIO_MIMETYPE", "HDF5_MIMETYPE", "FrameReference", "NotYet", "count", "path_of", "read", "shape_of"]

HDF5_MIMETYPE = "application/x-hdf5"

FABIO_MIMETYPE = "application/x-fabio"
"""Of what fabio reads, where a detector says nothing more precise."""

LARGEST = 2**32
"""Bytes that are read at once: a thousand frames of a Pilatus 1M."""

LINKS = 4
"""Files that an HDF5 file may refer to one after the other."""


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
        return math.prod(dataset.shape[:-2])


def shape_of(reference: FrameReference) -> tuple[int, int]:
    """Return (rows, columns) of the frames of a file, where its format allows without reading one.

    Raises
    ------
    BadInput
        As `read`.
    """
    path = path_of(reference.uri)
    if reference.mimetype != HDF5_MIMETYPE:
        with _open_fabio(path) as (image, _):
            return image.shape
    with _open_hdf5(path) as file:
        return _dataset(file, path, reference).shape[-2:]


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
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.ndim < 2 or dataset.dtype.kind not in "biuf":
        raise BadInput(f"{name} in {path.name} is not a stack of images.")
    _check_links(dataset, path.resolve().parent, path.name)
    return dataset


def _check_links(dataset: h5py.Dataset, folder: Path, name: str, depth: int = LINKS) -> None:
    """Refuse a dataset that lies in a file elsewhere: a master file may refer to the files beside it, and below, only."""
    own = Path(dataset.file.filename).resolve()
    sources = dataset.virtual_sources() if dataset.is_virtual else []
    for other in (
        own,
        *(own.parent / entry[0] for entry in dataset.external or ()),
        *(own.parent / s.file_name for s in sources),
    ):
        if not other.resolve().is_relative_to(folder):
            raise BadInput(f"{name} refers to {other}; frames are read only from the file's own folder, and from below.")
    for source in sources:
        # What "%b" stands for is a number: such names are of one folder, and their first file is like the others.
        target = own.parent / source.file_name.replace("%b", "0").replace("%%", "%")
        if source.file_name != "." and target.is_file():
            if depth == 0:
                raise BadInput(f"{name} refers to a file that refers to a file, and so on; put the frames into fewer files.")
            with _open_hdf5(target) as file:
                nested = file.get(source.dset_name.replace("%b", "0"))
                if isinstance(nested, h5py.Dataset):
                    _check_links(nested, folder, name, depth - 1)


def _check_size(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    size = math.prod(shape) * dtype.itemsize
    if size > LARGEST:
        raise BadInput(
            f"{name} says that {' x '.join(map(str, shape))} pixels are to be read at once, {size / 2**30:.3g} GiB; "
            f"the most is {LARGEST / 2**30:g} GiB."
        )


def _read_hdf5(path: Path, reference: FrameReference) -> NDArray:
    with _open_hdf5(path) as file:
        dataset = _dataset(file, path, reference)
        try:
            dataset.refresh()
            first, last, _ = slice(reference.start, reference.stop).indices(len(dataset))
            at_once = dataset.shape if dataset.ndim != 3 else (max(0, last - first), *dataset.shape[1:])
            _check_size(path.name, at_once, dataset.dtype)
            _check_size(path.name, dataset.chunks or (), dataset.dtype)
            if dataset.ndim == 3:
                return np.asarray(dataset[reference.start : reference.stop])
            return np.asarray(dataset[()]).reshape(-1, *dataset.shape[-2:])[reference.start : reference.stop]
        except OSError as error:
            raise NotYet(f"{path.name} is truncated or damaged: its frames cannot be read ({error}).") from error


def _read_fabio(path: Path) -> NDArray:
    with _open_fabio(path) as (image, errors):
        _check_size(path.name, (image.nframes, *image.shape), np.dtype(image.dtype))
        stack = np.stack([np.asarray(image.get_frame(i).data) for i in range(image.nframes)])
    if errors:
        raise NotYet(f"{path.name} is truncated or damaged ({errors[0]}).")
    return stack


@contextmanager
def _open_fabio(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """Open an image, beside what fabio logs of it; whatever its many readers raise means that it is none that fabio knows."""
    import fabio  # here, for who asks a catalog needs the names of this module but reads no file

    if path.is_file() and h5py.is_hdf5(path):
        raise BadInput(f"{path.name} is an HDF5 file; its MIME type is {HDF5_MIMETYPE}, with the name of the dataset.")
    try:
        with _fabio_errors() as errors, fabio.open(str(path)) as image:
            yield image, errors
    except BadInput:
        raise
    except Exception as error:
        kind = BadInput if path.stat().st_size else NotYet
        raise kind(f"{path.name} cannot be read as a detector image ({type(error).__name__}: {error}).") from error


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

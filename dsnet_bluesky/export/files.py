"""Files of results: one or many, each complete or absent."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py

from dsnet_bluesky.data import BadInput

from . import cansas_xml, columns, nxcansas
from .contents import Contents

__all__ = ["FORMATS", "Format", "check_target", "file_name", "format_of", "write"]


def _write_nxcansas(path: Path, results: Iterable[Contents], exposure: int | None, several: bool) -> None:
    with h5py.File(path, "w") as file:
        nxcansas.fill(file, results, exposure=exposure, several=several)


def _write_xml(path: Path, results: Iterable[Contents], exposure: int | None, several: bool) -> None:
    with path.open("wb") as stream:
        stream.writelines(cansas_xml.lines(results, exposure=exposure))


def _write_columns(path: Path, results: Iterable[Contents], exposure: int | None, several: bool) -> None:
    (contents,) = results
    with path.open("wb") as stream:
        stream.writelines(columns.lines(contents, exposure=exposure))


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes
    ----------
    suffixes
        How its files' names may end; the first is that of names that we give.
    many
        Whether a file holds more than one curve.
    write
        Writes to a path: results, the exposure that is wanted, and whether there are several results.
    """

    suffixes: tuple[str, ...]
    many: bool
    write: Callable[[Path, Iterable[Contents], int | None, bool], None]


FORMATS = {
    "nxcansas": Format((".h5", ".hdf5", ".hdf", ".nxs"), True, _write_nxcansas),
    "cansas-xml": Format((".xml",), True, _write_xml),
    "columns": Format((".txt", ".dat", ".csv"), False, _write_columns),
}
"""What can be written, by name."""


def format_of(path: Path, name: str | None) -> str:
    """Return the name of a format: the one that was named, else the one that the file's name stands for, else NXcanSAS.

    Raises
    ------
    BadInput
        If there is no such format, or the file's name stands for another.
    """
    if name is not None and name not in FORMATS:
        raise BadInput(f"{name!r} is no format that can be written; use one of {', '.join(FORMATS)}.")
    stands_for = next((known for known, form in FORMATS.items() if path.suffix.lower() in form.suffixes), None)
    if name is not None and stands_for not in (None, name):
        raise BadInput(f"{path.name} is the name of a file of the format {stands_for}, and the format {name} was asked for.")
    return name or stands_for or "nxcansas"


def write(
    results: Iterable[Contents],
    path: Path,
    format: str,
    *,
    exposure: int | None = None,
    several: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write results into one file, which is there as a whole or not at all.

    Parameters
    ----------
    results
        Read one after the other, so that many need no more memory than one.
    path
        Of the file.
    format
        A name of `FORMATS`.
    exposure
        The one of each result that is wanted, from 1; all if not given.
    several
        Whether there may be more than one result.
    overwrite
        Replace an existing file.

    Raises
    ------
    BadInput
        If the file cannot be written there, or a result holds no such exposure.
    """
    check_target(path, overwrite=overwrite)
    with _written(path) as temporary:
        FORMATS[format].write(temporary, results, exposure, several)
    return path


def check_target(path: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
    """Check that a file can be written, before any work is done for it.

    Parameters
    ----------
    path
        Of the file.
    overwrite
        Whether an existing file may be replaced.
    sources
        Files that are read for it: these are never written to, whatever may be overwritten.

    Raises
    ------
    BadInput
        If the file exists and may not be overwritten, is a link or a device, or is one of the sources, or its folder
        does not exist or cannot be written to.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the name of a file.")
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise BadInput(f"{path} is what is read, {source}, and is never written to; give another name.")
    if path.is_symlink():
        raise BadInput(f"{path} is a link; give the name of the file that is to be written.")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is a device or the like, no file that can be replaced; give another name.")
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; choose another name, or allow it to be overwritten (--overwrite).")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Check that files can be written into a folder.

    Raises
    ------
    BadInput
        If it does not exist or cannot be written to.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; create it, or write somewhere else.")
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{folder} may not be written to; write somewhere else.")


def file_name(*words: str, suffix: str) -> str:
    """Make the name of a file from words that may hold anything."""
    safe = [re.sub(r"[^\w.+-]+", "-", word).strip("-.") for word in words]
    return "_".join(word[:100] for word in safe if word) + suffix


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a temporary file in the same folder, and put it in place once it is written."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # the rights of an ordinary new file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

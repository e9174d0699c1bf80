"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file that takes the place of `path` once it is written.

    Whoever reads `path` meanwhile, or after a crash, finds what was there before. An
    error removes the temporary file. It lies in the same folder and bears the number of
    this process: several may write one file at a time, and the last one counts.

    Parameters
    ----------
    path
        Of the file to write or to replace.

    Examples
    --------
    >>> with replacing(Path("state.json")) as partial:               # doctest: +SKIP
    ...     partial.write_text("{}")
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

"""Columns of text, with any lines of words around them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dsnet_bluesky.data import BadInput

from .columns import Columns, Floats, choose, present
from .units import per_nm, units_in

HEADING = re.compile(r"\W*[qQ]\b.*\bI(nt\w*)?\b")
"""A line that names the columns of a table: q first, then I."""

SLIT = re.compile(r"^# (dQ[lw]) \(half-\w+ of the slit\): (\d+(?:\.\d*)?(?:e[-+]?\d+)?) (1/angstrom)\s*$", re.MULTILINE)
"""A line of our own export that tells one half-length of the slit; see `export.columns`."""


def read_text(path: Path, entry: str | int | None) -> Columns:
    """Read the columns Q I [dI [dQ]]."""
    choose([path.stem], entry)
    header, table = find_table(decode(path))
    # Anton Paar's .pdh has no room for a unit: it is 1/nm by definition.
    q_units = "1/nm" if path.suffix.lower() == ".pdh" else _units_of_q(header)
    columns = dict(zip(("q", "I", "Idev", "Qdev"), table.T, strict=False))
    per_cm = re.search(r"1/cm|cm\s*\^?\{?[-\u2212]1", header)
    return Columns(
        columns["q"],
        columns["I"],
        present(columns.get("Idev")),
        _text_resolution(present(columns.get("Qdev"))) | _slit_of(header, columns["q"].size, q_units),
        q_units=q_units,
        I_units="1/cm" if per_cm else "1",
        title=path.stem,
        entry=path.stem,
    )


def _units_of_q(header: str) -> str | None:
    """Find the unit of q above a table: its heading knows, other lines may tell of other things (our own do)."""
    headings = [line for line in header.splitlines() if HEADING.match(line)]
    return (units_in(headings[-1]) if headings else None) or units_in(header)


def _text_resolution(column: Floats | None) -> dict[str, Floats]:
    if column is None:
        return {}
    return {"dQl": -column} if (column[np.isfinite(column)] < 0).all() else {"Qdev": column}


def _slit_of(header: str, points: int, q_units: str | None) -> dict[str, Floats]:
    """Slit columns that lines of words tell, in the unit of q."""
    scale = per_nm(q_units or "1/angstrom")
    told = {name: float(value) * per_nm(units) / scale for name, value, units in SLIT.findall(header)}
    return {name: np.full(points, value) for name, value in told.items() if value}


def decode(path: Path) -> str:
    """Return the text of a file in any common encoding.

    Raises
    ------
    BadInput
        If the file is binary.
    """
    raw = path.read_bytes()
    if b"\0" in raw:
        raise BadInput("the file is binary, but neither HDF5 nor XML; curves are canSAS XML, NXcanSAS or columns of text.")
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 decodes every byte")


def find_table(text: str) -> tuple[str, Floats]:
    """Find the longest block of rows of numbers.

    Returns
    -------
    header
        The lines before it.
    table : ndarray
        The numbers, shape (n, columns).

    Raises
    ------
    BadInput
        If no block has 5 rows.
    """
    best: list[list[float]] = []
    block: list[list[float]] = []
    start = best_start = 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        row = _numbers(line)
        if row is None and not line.strip():
            continue
        if row is None or (block and len(row) != len(block[0])):
            block = []
        if row is not None:
            start = number if not block else start
            block.append(row)
        if len(block) > len(best):
            best, best_start = block, start
    if len(best) < 5:
        raise BadInput(
            "no curve found: at least 5 rows of numbers in the columns Q I [dI [dQ]] are needed, "
            f"the longest block has {len(best)}."
        )
    return "\n".join(lines[:best_start]), np.array(best)


def _numbers(line: str) -> list[float] | None:
    """Return the two or more numbers of a row, None for any other line."""
    words = [word for word in re.split(r"[\s,;]+", line.strip()) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if len(numbers) >= 2 else None

"""Columns of text, with any lines of words around them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dsnet_bluesky.data import BadInput

from .columns import RESOLUTIONS, Columns, Floats, choose, present
from .heading import columns_named, heading_of, unit_told
from .table import find_table
from .units import units_in

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
    columns = _columns_of(header, table)
    resolution, slit = _text_resolution(columns), _slit_of(header)
    points = columns["q"].size
    per_cm = re.search(r"1/cm|cm\s*\^?\{?[-\u2212]1", header)
    return Columns(
        columns["q"],
        columns["I"],
        present(columns.get("Idev")),
        resolution | {name: np.full(points, value) for name, (value, _) in slit.items()},
        {name: units for name, (_, units) in slit.items()},
        q_units=q_units,
        I_units="1/cm" if per_cm else "1",
        title=path.stem,
        entry=path.stem,
    )


def _columns_of(header: str, table: Floats) -> dict[str, Floats]:
    """Tell the columns by their names, which know of an index before q, or else by their places."""
    places = columns_named(header, table.shape[1]) or dict(zip(("q", "I", "Idev", "Qdev"), range(table.shape[1]), strict=False))
    columns = {name: table[:, place] for name, place in places.items()}
    # Zeros stand for no column of errors or resolution, as does one that is empty in every row; a curve needs q and I.
    empty = {name for name, column in columns.items() if name not in ("q", "I") and np.isnan(column).all()}
    return {name: np.zeros_like(column) if name in empty else column for name, column in columns.items()}


def _units_of_q(header: str) -> str | None:
    """Find the unit of q above a table: its heading knows, other lines may tell of other things (our own do).

    One that is not understood is returned too, for no other may be assumed in its place.
    """
    headings = [line for line in header.splitlines() if HEADING.match(line)]
    told = unit_told(headings[-1] if headings else heading_of(header))
    if told and not units_in(told):
        return told
    return (units_in(headings[-1]) if headings else None) or units_in(header)


def _text_resolution(columns: dict[str, Floats]) -> dict[str, Floats]:
    found = {name: column for name in RESOLUTIONS if (column := present(columns.get(name))) is not None}
    spread = found.get("Qdev")
    if spread is not None and (spread[np.isfinite(spread)] < 0).all():
        found["dQl"] = -found.pop("Qdev")
    return found


def _slit_of(header: str) -> dict[str, tuple[float, str]]:
    """Values and units of the slit that lines of words tell."""
    told = {name: (float(value), units) for name, value, units in SLIT.findall(header)}
    return {name: (value, units) for name, (value, units) in told.items() if value}


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

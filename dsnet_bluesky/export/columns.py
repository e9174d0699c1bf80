"""Plain columns: q, I, dI and dQ of one exposure, below lines that begin with # and say what they are.

q and dQ are in 1/angstrom, though all else here is in 1/nm: SasView takes columns for that, whatever their head says, and
so do most programs of the field.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky import __version__
from dsnet_bluesky.data import BadInput

from .contents import Contents, one_line

__all__ = ["lines", "the_exposure"]

SLIT = {"dQl": "half-length of the slit", "dQw": "half-width of the slit"}

SAME = 0.01
"""Part of itself by which a slit may change along a curve and be called constant, as in `curvefiles.smearing_for`."""


def lines(contents: Contents, *, exposure: int | None = None) -> Iterator[bytes]:
    """Give the file: a head, then the table.

    Parameters
    ----------
    contents
        Of one result.
    exposure
        Its number, from 1; may be left out if there is but one.

    Raises
    ------
    BadInput
        If there are several exposures and none is named, or none of that number.
    """
    number, row = the_exposure(contents, exposure)
    columns = _columns(row)
    yield "".join(f"# {line}\n" for line in (*_head(contents, number, row), "  ".join(columns))).encode()
    table = io.BytesIO()
    np.savetxt(table, np.column_stack(list(columns.values())), fmt="%.17g")
    yield table.getvalue()


def the_exposure(contents: Contents, exposure: int | None) -> tuple[int, xr.Dataset]:
    """Return the one exposure that a file of columns can hold, and its number.

    Raises
    ------
    BadInput
        See `lines`.
    """
    good = list(contents.exposures(exposure))
    if len(good) > 1:
        numbers = ", ".join(str(number) for number, _ in good[:5]) + (" ..." if len(good) > 5 else "")
        raise BadInput(
            f"A file of columns holds one curve, and the result of {contents.title} holds {len(good)} (exposures {numbers}); "
            "name the one that you want, or take a format that holds all: nxcansas, cansas-xml."
        )
    return good[0]


def _columns(row: xr.Dataset) -> dict[str, NDArray]:
    """Return the columns by their names and units."""
    units = row["I"].attrs.get("units", "1")
    columns = {"q (1/angstrom)": row["q"].values / 10, f"I ({units})": row["I"].values, f"dI ({units})": row["Idev"].values}
    if "Qdev" in row and np.isfinite(row["Qdev"].values).all():
        columns["dQ (1/angstrom)"] = row["Qdev"].values / 10
    return columns


def _head(contents: Contents, number: int, row: xr.Dataset) -> Iterator[str]:
    yield f"{one_line(contents.title_of(number))}"
    yield f"sample: {contents.sample or 'unknown'}"
    yield f"run: {contents.run}"
    for step in contents.steps_of(row):
        for name, value in step.terms.items():
            yield f"{step.name}, {one_line(name)}: {one_line(value)}"
    if "I_smeared" not in row:
        yield from _slit(row)
    yield f"written by dsnet-bluesky {__version__}; dI and dQ are standard deviations"


def _slit(row: xr.Dataset) -> Iterator[str]:
    """Tell the slit of a curve that nobody desmeared, in lines that `curvefiles` reads where it is constant."""
    columns = {name: np.abs(row[name].values) / 10 for name in SLIT if name in row}
    ends = {name: (values.min(), values.max()) for name, values in columns.items() if np.isfinite(values).all()}
    # One that changes makes ranges of both: the other alone would be read as the whole slit.
    constant = all(high - low <= SAME * high for low, high in ends.values())
    for name, (low, high) in ends.items():
        value = f"{np.median(columns[name]):.17g}" if constant else f"{low:.17g} to {high:.17g}"
        yield f"{name} ({SLIT[name]}): {value} 1/angstrom"

"""What every reader returns, and how it becomes a curve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky.data import BadInput, curve

from .units import per_nm

Floats = NDArray[np.floating[Any]]

RESOLUTIONS = {
    "Qdev": "standard deviation of the resolution",
    "dQl": "half-length of the slit",
    "dQw": "half-width of the slit",
}
"""The resolution columns, by their names in NXcanSAS."""


@dataclass
class Columns:
    """What a reader found, in the file's own units.

    Attributes
    ----------
    q
        Shape (n,).
    I, Idev
        Shape (n,) or (exposure, n).
    resolution
        Columns of `RESOLUTIONS`, shape (n,).
    resolution_units
        Units of those columns that have one of their own; the others have that of q.
    q_units
        None where the file does not say.
    """

    q: Floats
    I: Floats
    Idev: Floats | None = None
    resolution: dict[str, Floats] = field(default_factory=dict)
    resolution_units: dict[str, str] = field(default_factory=dict)
    q_units: str | None = None
    I_units: str = "1"
    title: str = ""
    sample: str = ""
    entry: str = ""


def to_curve(columns: Columns, units: str | None, sort: bool) -> xr.Dataset:
    """Build the curve, with q in 1/nm; see `dsnet_bluesky.curvefiles.read_curve`."""
    q_units = units or columns.q_units or "1/angstrom"
    source = "option" if units else "file" if columns.q_units else "assumed"
    scale = per_nm(q_units)
    _check_lengths(columns)
    columns, dropped = _usable(columns)
    columns = _ascending(columns, sort)
    dataset = curve(
        columns.q * scale,
        columns.I,
        columns.Idev,
        units=columns.I_units,
        title=columns.title,
        sample=columns.sample,
        entry=columns.entry,
        q_units=q_units,
        q_units_from=source,
        dropped_points=dropped,
    )
    for name, values in columns.resolution.items():
        # A unit of its own stays, whatever was told of q.
        own = columns.resolution_units.get(name)
        dataset[name] = ("q", values * (per_nm(own) if own else scale), {"units": "1/nm", "long_name": RESOLUTIONS[name]})
    if columns.resolution:
        dataset["q"].attrs["resolutions"] = ",".join(columns.resolution)
    return dataset


def _check_lengths(columns: Columns) -> None:
    if columns.q.ndim != 1 or columns.I.ndim not in (1, 2) or columns.I.shape[-1] != columns.q.size:
        raise BadInput(
            f"Q has shape {columns.q.shape} and I has shape {columns.I.shape}: this is no one-dimensional curve. "
            "Integrate two-dimensional data first."
        )
    if columns.Idev is not None and columns.Idev.shape != columns.I.shape:
        raise BadInput(f"Idev has shape {columns.Idev.shape} and I has shape {columns.I.shape}: they must agree.")
    for name, values in columns.resolution.items():
        if values.shape != columns.q.shape:
            raise BadInput(f"{name} has shape {values.shape} and Q has shape {columns.q.shape}: they must agree.")


def _usable(columns: Columns) -> tuple[Columns, int]:
    """Leave out the points that were not measured, and say how many: NaN or infinity in a column, or Idev <= 0."""
    arrays = [columns.q, columns.I, columns.Idev, *columns.resolution.values()]
    good = np.all([np.isfinite(a) if a.ndim == 1 else np.isfinite(a).all(axis=0) for a in arrays if a is not None], axis=0)
    if columns.Idev is not None:
        good &= (np.atleast_2d(columns.Idev) > 0).all(axis=0)
    lost = int((~good).sum())
    if lost > good.size / 2:
        raise BadInput(
            f"{lost} of {good.size} points hold NaN or infinity, or an Idev that is not positive; "
            "mend the file, or leave Idev out to have it estimated from the scatter."
        )
    return _take(columns, good), lost


def _take(columns: Columns, which: NDArray[Any]) -> Columns:
    return replace(
        columns,
        q=columns.q[which],
        I=columns.I[..., which],
        Idev=None if columns.Idev is None else columns.Idev[..., which],
        resolution={name: values[which] for name, values in columns.resolution.items()},
    )


def _ascending(columns: Columns, sort: bool) -> Columns:
    steps = np.diff(columns.q)
    if (steps > 0).all():
        return columns
    if not sort:
        first = int(np.argmax(steps <= 0))
        raise BadInput(
            f"q is not ascending: {columns.q[first]:.6g} is followed by {columns.q[first + 1]:.6g} (point {first + 2}). "
            "Use --sort to sort the points and average repeated ones."
        )
    return _merge(_take(columns, np.argsort(columns.q, kind="stable")))


def _merge(columns: Columns) -> Columns:
    """Average the points of one q, each with the weight 1/Idev^2."""
    q, first, group = np.unique(columns.q, return_index=True, return_inverse=True)
    merged = _take(columns, first)
    if q.size == columns.q.size:
        return merged
    share = np.equal.outer(np.arange(q.size), group).astype(float)
    weight = np.ones_like(columns.I) if columns.Idev is None else columns.Idev**-2.0
    merged.I = (columns.I * weight) @ share.T / (weight @ share.T)
    merged.Idev = None if columns.Idev is None else 1 / np.sqrt(weight @ share.T)
    return merged


def choose(names: Sequence[str], entry: str | int | None) -> int:
    """Return the index of the wanted curve among `names`.

    Raises
    ------
    BadInput
        If there are several and `entry` is none of them, by name or number from 1, or
        the name of more than one.
    """
    if entry is None and len(names) == 1:
        return 0
    same = [i for i, name in enumerate(names) if name == str(entry)]
    if len(same) > 1:
        numbers = ", ".join(str(i + 1) for i in same[:10]) + (" ..." if len(same) > 10 else "")
        raise BadInput(f"the file holds {len(same)} curves {entry!r}; tell them apart by their numbers, with --entry: {numbers}.")
    if same:
        return same[0]
    if entry is not None and re.fullmatch(r"\d+", str(entry)) and 1 <= int(entry) <= len(names):
        return int(entry) - 1
    listed = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:10], start=1))
    more = "" if len(names) <= 10 else f" ... {len(names)} = {names[-1]}"
    problem = "the file holds several curves" if entry is None else f"the file holds no curve {entry!r}"
    raise BadInput(f"{problem}; name one with --entry (its name or number): {listed}{more}.")


def present(column: Any) -> Floats | None:
    """Return the column as an array; None where there is none, or only zeros stand for it."""
    if column is None or np.size(column) == 0:
        return None
    values = np.asarray(column, dtype=float)
    return values if values.any() else None

"""A Dataset of exposures as rows of numbers, one for each exposure: how results are stored.

A row holds every variable of its exposure, one after the other, in double precision; columns
say which is where. One row is one piece of one file: it is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .data import WORDS, BadInput

__all__ = [
    "COLUMNS",
    "FIRST",
    "GRID",
    "ROWS",
    "ROWS_OF",
    "Column",
    "columns_of",
    "decode_words",
    "grid_of",
    "pack",
    "parse_columns",
    "unpack",
    "width_of",
]

ROWS = "rows"
"""Under which a result's metadata hold the key of its array of rows, and its data source their place."""

ROWS_OF = "rows_of"
"""Under which the metadata of a result whose rows another one keeps hold the key of that result."""

FIRST = "first_row"
"""Under which its metadata, and its data source, hold the number of its first row there."""

COLUMNS = "columns"
"""Under which an array's metadata, and the parameters of a result's data source, hold the columns."""

GRID = "grid"
"""Under which a result's metadata hold the digest of its q; empty if it has none."""

EXPOSURE = "exposure"

Size = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Column:
    """Where a variable is in a row.

    Attributes
    ----------
    name
        Of the variable.
    dims
        Its dimensions; without `exposure` if it is the same for all.
    shape
        Of one exposure.
    dtype
        In which it is given back: any that double precision holds.
    attrs
        Of the variable.
    coordinate
        Whether it is one.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    dims: tuple[str, ...]
    shape: tuple[Size, ...]
    dtype: Literal["<f8", "<f4", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1", "|b1"]
    attrs: dict[str, JsonValue]
    coordinate: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return TypeAdapter(Column).dump_python(self, mode="json")

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)


def columns_of(dataset: xr.Dataset) -> list[Column]:
    """Say how the exposures of a Dataset lie in rows; words (`data.WORDS`) become numbers, with attributes that explain them."""
    return [
        Column(
            name=str(name),
            dims=tuple(map(str, values.dims)),
            shape=tuple(size for dim, size in values.sizes.items() if dim != EXPOSURE),
            dtype="|u1" if name in WORDS else cast(Any, values.dtype.newbyteorder("<").str),
            attrs={**values.attrs, **(_meanings(WORDS[str(name)]) if name in WORDS else {})},
            coordinate=name in dataset.coords,
        )
        for name, values in dataset.variables.items()
    ]


def width_of(columns: Sequence[Column]) -> int:
    """Numbers in a row."""
    return sum(column.size for column in columns)


def parse_columns(values: Any) -> list[Column]:
    """Read columns from plain values.

    Raises
    ------
    BadInput
        If they are none.
    """
    try:
        columns = TypeAdapter(list[Column]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"The columns of a result are wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    if len({column.name for column in columns}) < len(columns):
        raise BadInput("The columns of a result are wrong: a name is there twice.")
    sizes: dict[str, int] = {}
    for column in columns:
        inner = [dim for dim in column.dims if dim != EXPOSURE]
        if len(set(column.dims)) < len(column.dims) or len(inner) != len(column.shape):
            raise BadInput(f"The columns of a result are wrong: dims and shape of {column.name} do not belong together.")
        for dim, size in zip(inner, column.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise BadInput(f"The columns of a result are wrong: {dim} has two sizes, {sizes[dim]} and {size}.")
    return columns


def pack(dataset: xr.Dataset, columns: Sequence[Column]) -> NDArray[np.float64]:
    """Put exposures into rows, shape (exposure, `width_of`)."""
    count = dataset.sizes[EXPOSURE]
    parts = []
    for column in columns:
        values = dataset[column.name]
        if column.name in WORDS:
            words = WORDS[column.name]
            values = values.copy(data=np.array([words.index(word) for word in values.values], dtype=np.uint8))
        if EXPOSURE in column.dims:
            parts.append(values.transpose(EXPOSURE, ...).values.reshape(count, column.size))
        else:
            parts.append(np.broadcast_to(values.values.reshape(1, column.size), (count, column.size)))
    return np.concatenate(parts, axis=1).astype(np.float64)


def unpack(
    rows: NDArray[np.float64], columns: Sequence[Column], attrs: Mapping[str, Any], names: Sequence[str] | None = None
) -> xr.Dataset:
    """Give back the Dataset of rows; words stay numbers.

    Parameters
    ----------
    rows
        Shape (exposure, `width_of`).
    columns
        Of the rows.
    attrs
        Of the Dataset.
    names
        Variables that are wanted; all if not given.
    """
    variables, coordinates, place = {}, {}, 0
    for column in columns:
        part, place = rows[:, place : place + column.size], place + column.size
        if names is not None and column.name not in names:
            continue
        if EXPOSURE in column.dims:
            values = np.moveaxis(part.reshape(len(rows), *column.shape), 0, column.dims.index(EXPOSURE))
        elif not len(rows):
            continue
        else:
            values = part[0].reshape(column.shape)
        if np.dtype(column.dtype).kind != "f":
            values = np.nan_to_num(values, nan=0.0)  # no whole number says that there is none
        entry = (column.dims, values.astype(column.dtype, copy=False), dict(column.attrs))
        (coordinates if column.coordinate else variables)[column.name] = entry
    return xr.Dataset(variables, coordinates, dict(attrs))


def decode_words(dataset: xr.Dataset) -> xr.Dataset:
    """Replace numbers that stand for words (`data.WORDS`), as `columns_of` explains them, by the words."""
    coded = {name: values for name, values in dataset.data_vars.items() if "flag_values" in values.attrs}
    for name, values in coded.items():
        attrs = dict(values.attrs)
        meanings = dict(zip(attrs.pop("flag_values"), attrs.pop("flag_meanings").split(), strict=True))
        words = [meanings.get(int(value), "") for value in values.values]
        dataset = dataset.assign({name: (EXPOSURE, np.array(words, dtype=str), attrs)})
    return dataset


def grid_of(dataset: xr.Dataset) -> str:
    """Return a digest of q, empty if there is none: results of one grid can be put into one array."""
    if "q" not in dataset.coords:
        return ""
    return hashlib.sha256(np.ascontiguousarray(dataset["q"].values, dtype="<f8").tobytes()).hexdigest()[:16]


def _meanings(words: Sequence[str]) -> dict[str, Any]:
    """CF attributes that explain the numbers of words."""
    return {"flag_values": list(range(1, len(words))), "flag_meanings": " ".join(words[1:])}

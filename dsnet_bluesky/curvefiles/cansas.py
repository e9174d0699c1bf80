"""canSAS XML and NXcanSAS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from sasdata.dataloader.data_info import Data1D
from sasdata.dataloader.readers.cansas_reader import Reader

from dsnet_bluesky.data import BadInput

from .columns import RESOLUTIONS, Columns, Floats, choose, present
from .units import intensity_units, per_nm


def read_xml(path: Path, entry: str | int | None) -> Columns:
    """Read canSAS 1D XML with sasdata, the points as they stand in the file."""
    found = _load_xml(path)
    data = found[choose([_xml_name(d) for d in found], entry)]
    slits = {"dQl": present(data.dxl), "dQw": present(data.dxw), "Qdev": present(data.dx)}
    return Columns(
        np.asarray(data.x, dtype=float),
        np.asarray(data.y, dtype=float),
        present(data.dy),
        {name: values for name, values in slits.items() if values is not None},
        q_units=data._xunit or None,
        I_units=intensity_units(data._yunit),
        title=data.title or "",
        sample=str(data.sample.name or ""),
        entry=_xml_name(data),
    )


def _xml_name(data: Any) -> str:
    return (str(data.run[0]) if data.run and data.run[0] else "") or data.title or "entry"


class _AsStored(Reader):
    """sasdata's reader, which leaves the points in the order of the file and NaN among them."""

    def sort_data(self) -> None: ...


def _load_xml(path: Path) -> list[Any]:
    reader = _AsStored()
    try:
        found = [data for data in reader.read(str(path)) if isinstance(data, Data1D)]
    except Exception as error:
        # sasdata raises TypeError, KeyError, lxml's errors and its own: all mean that it cannot read this file.
        raise BadInput(
            f"sasdata cannot read it as canSAS 1D XML: {_reason(reader, error)}; "
            "mend the file, or give the curve as columns of text."
        ) from error
    if not found:
        raise BadInput("the XML file holds no one-dimensional canSAS data (SASentry with SASdata).")
    return found


def _reason(reader: Reader, error: Exception) -> str:
    """Say what the schema objects to, else what the reader said."""
    if reader.xmlroot is not None and reader.schema is not None:
        objection = str(reader.find_invalid_xml() or "").strip()
        if objection:
            return objection
    return f"{type(error).__name__}: {error.__context__ or error}"


def read_nxcansas(path: Path, entry: str | int | None) -> Columns:
    """Read one SASdata group of an HDF5 file."""
    try:
        with h5py.File(path) as file:
            groups = _sasdata_groups(file)
            if not groups:
                raise BadInput("the HDF5 file holds no NXcanSAS data (no group with @canSAS_class = SASdata).")
            names = [str(group.name).lstrip("/") for group in groups]
            return _columns_of(groups[choose(names, entry)])
    except OSError as error:
        raise BadInput(f"the HDF5 file cannot be read; it may be truncated or still being written ({error}).") from error


def _sasdata_groups(file: h5py.File) -> list[Any]:
    found: list[Any] = []

    def collect(_: str, node: Any) -> None:
        if isinstance(node, h5py.Group) and _words(node, "canSAS_class", "NX_class") == ["SASdata"]:
            found.append(node)

    file.visititems(collect)
    return found


def _columns_of(group: Any) -> Columns:
    names = {"q": (_words(group, "I_axes") or ["Q"])[-1], "I": (_words(group, "signal") or ["I"])[0]}
    for name in names.values():
        if not isinstance(group.get(name), h5py.Dataset):
            raise BadInput(f"the group {group.name} has no dataset {name!r}.")
    q, intensity = group[names["q"]], group[names["I"]]
    deviation = (_words(intensity, "uncertainties", "uncertainty") or ["Idev"])[0]
    title = group.parent.get("title")
    return Columns(
        _values(q),
        _values(intensity),
        present(_values(group[deviation])) if deviation in group else None,
        _hdf5_resolution(group, q),
        q_units=(_words(q, "units", "unit") or [None])[0],
        I_units=intensity_units((_words(intensity, "units", "unit") or [None])[0]),
        title="" if title is None else _string(title[()]),
        sample=_sample_name(group.parent),
        entry=str(group.name).lstrip("/"),
    )


def _hdf5_resolution(group: Any, q: Any) -> dict[str, Floats]:
    """Resolution columns by their names; one of another name is the standard deviation."""
    found: dict[str, Floats] = {}
    own_units = (_words(q, "units", "unit") or ["1/angstrom"])[0]
    for name in _words(q, "resolutions") or [n for n in RESOLUTIONS if n in group]:
        values = present(_values(group[name])) if name in group else None
        if values is not None:
            units = (_words(group[name], "units", "unit") or [own_units])[0]
            # A scalar holds for all points.
            spread = np.broadcast_to(values, q.shape[-1:]) if values.size == 1 else values
            found[name if name in RESOLUTIONS else "Qdev"] = spread * (per_nm(units) / per_nm(own_units))
    return found


def _sample_name(entry: Any) -> str:
    for node in entry.values():
        if _words(node, "canSAS_class") == ["SASsample"]:
            for name in ("name", "ID"):
                if name in node:
                    return _string(node[name][()])
    return ""


def _values(dataset: Any) -> Floats:
    values = np.asarray(dataset[()], dtype=float)
    # A stack of one frame is that frame.
    return np.atleast_1d(values[0] if values.ndim == 2 and len(values) == 1 else values)


def _words(node: Any, *names: str) -> list[str]:
    """Return the words of the first attribute present: a string, several with commas, or an array of strings."""
    for name in names:
        if name in node.attrs:
            value = node.attrs[name]
            words = [_string(v) for v in np.atleast_1d(value).ravel()]
            return [part.strip() for word in words for part in word.split(",")]
    return []


def _string(value: Any) -> str:
    first = value.ravel()[0] if isinstance(value, np.ndarray) and value.size else value
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)

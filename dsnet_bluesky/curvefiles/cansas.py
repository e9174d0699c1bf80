"""canSAS XML and NXcanSAS."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import h5py
import numpy as np

from dsnet_bluesky.data import BadInput

from .columns import RESOLUTIONS, Columns, Floats, choose, present
from .units import intensity_units


def read_xml(path: Path, entry: str | int | None) -> Columns:
    """Read one SASdata of a canSAS XML file, of any version."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise BadInput(f"the XML is not well-formed ({error}).") from error
    found = [(owner, data) for owner in _children(root, "SASentry") for data in _children(owner, "SASdata")]
    if not found:
        raise BadInput(f"the XML file holds no canSAS data (SASroot / SASentry / SASdata); its root is <{_tag(root)}>.")
    names = [data.get("name") or _words_of(owner, "Run") or _words_of(owner, "Title") or "entry" for owner, data in found]
    number = choose(names, entry)
    owner, data = found[number]
    rows = list(_children(data, "Idata"))
    if not rows:
        raise BadInput(f"the entry {names[number]!r} holds no Idata.")
    return Columns(
        _xml_column(rows, "Q"),
        _xml_column(rows, "I"),
        present(_xml_column(rows, "Idev")),
        *_xml_resolution(rows),
        q_units=_xml_units(rows, "Q"),
        I_units=intensity_units(_xml_units(rows, "I")),
        title=_words_of(owner, "Title"),
        sample=next((_words_of(node, "ID") or node.get("name", "") for node in _children(owner, "SASsample")), ""),
        entry=names[number],
    )


def _tag(node: Element) -> str:
    """Tag without its namespace, which differs between versions."""
    return node.tag.rpartition("}")[2]


def _children(node: Element, tag: str) -> Iterator[Element]:
    return (child for child in node if _tag(child) == tag)


def _words_of(node: Element, tag: str) -> str:
    child = next(_children(node, tag), None)
    return " ".join((child.text or "").split()) if child is not None else ""


def _xml_column(rows: list[Element], tag: str) -> Floats:
    """Numbers of one kind, NaN where there is none; empty if no row has any."""
    values = np.array([_number(_words_of(row, tag)) for row in rows])
    return values if any(next(_children(row, tag), None) is not None for row in rows) else np.empty(0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _xml_units(rows: list[Element], tag: str) -> str | None:
    units = {node.get("unit", "") for row in rows for node in _children(row, tag)} - {""}
    if len(units) > 1:
        raise BadInput(f"the values of {tag} are given in several units ({', '.join(sorted(units))}).")
    return units.pop() if units else None


def _xml_resolution(rows: list[Element]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return the resolution columns, and the units that they have themselves."""
    columns = {name: column for name in RESOLUTIONS if (column := present(_xml_column(rows, name))) is not None}
    return columns, {name: units for name in columns if (units := _xml_units(rows, name))}


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
        *_hdf5_resolution(group, q),
        q_units=(_words(q, "units", "unit") or [""])[0] or None,
        I_units=intensity_units((_words(intensity, "units", "unit") or [None])[0]),
        title="" if title is None else _string(title[()]),
        sample=_sample_name(group.parent),
        entry=str(group.name).lstrip("/"),
    )


def _hdf5_resolution(group: Any, q: Any) -> tuple[dict[str, Floats], dict[str, str]]:
    """Resolution columns by their names, and their own units; one of another name is the standard deviation."""
    found: dict[str, Floats] = {}
    own: dict[str, str] = {}
    for name in _words(q, "resolutions") or [n for n in RESOLUTIONS if n in group]:
        values = present(_values(group[name])) if name in group else None
        if values is not None:
            kind = name if name in RESOLUTIONS else "Qdev"
            # A scalar holds for all points.
            found[kind] = np.broadcast_to(values, q.shape[-1:]) if values.size == 1 else values
            if units := (_words(group[name], "units", "unit") or [""])[0]:
                own[kind] = units
    return found, own


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
    attributes = getattr(node, "attrs", {})  # a broken link is None
    for name in names:
        if name in attributes:
            value = attributes[name]
            words = [_string(v) for v in np.atleast_1d(value).ravel()]
            return [part.strip() for word in words for part in word.split(",")]
    return []


def _string(value: Any) -> str:
    first = value.ravel()[0] if isinstance(value, np.ndarray) and value.size else value
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)

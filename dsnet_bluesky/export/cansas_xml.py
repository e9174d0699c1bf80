"""canSAS 1D XML, version 1.1: an SASentry for each exposure, with the curve as measured and as desmeared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import xarray as xr

from .contents import Contents, Step

__all__ = ["lines"]

HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<SASroot version="1.1" xmlns="urn:cansas1d:1.1" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
    'xsi:schemaLocation="urn:cansas1d:1.1 http://www.cansas.org/formats/1.1/cansas1d.xsd">\n'
)
FOOT = "</SASroot>\n"


def lines(results: Iterable[Contents], *, exposure: int | None = None) -> Iterator[bytes]:
    """Give the file piece by piece, an exposure at a time.

    Parameters
    ----------
    results
        Read one after the other.
    exposure
        The one of each that is wanted, from 1; all if not given.

    Raises
    ------
    BadInput
        If a result holds no such exposure.
    """
    yield HEAD.encode()
    for contents in results:
        for number, row in contents.exposures(exposure):
            entry = _entry(contents, number, row)
            indent(entry)
            yield tostring(entry, encoding="utf-8") + b"\n"
    yield FOOT.encode()


def _entry(contents: Contents, number: int, row: xr.Dataset) -> Element:
    entry = Element("SASentry", name=f"exposure {number}")
    _text(entry, "Title", contents.title_of(number))
    _text(entry, "Run", contents.run)
    several = contents.curves.sizes["exposure"] > 1
    kinds = [("desmeared", "I", "Idev", "Qdev"), ("smeared", "I_smeared", "Idev_smeared", "")]
    for name, I, Idev, Qdev in kinds if "I_smeared" in row else [("smeared", "I", "Idev", "Qdev")]:
        data = SubElement(entry, "SASdata", name=f"{name}, exposure {number}" if several else name)
        _write_points(data, row, I, Idev, Qdev)
    _text(SubElement(entry, "SASsample"), "ID", contents.sample or "unknown")
    _write_instrument(entry, contents)
    for step in contents.steps_of(row):
        _write_step(entry, step)
    SubElement(entry, "SASnote")
    return entry


def _write_points(data: Element, row: xr.Dataset, I: str, Idev: str, Qdev: str) -> None:
    columns = [("Q", row["q"]), ("I", row[I]), ("Idev", row[Idev])]
    if Qdev in row and np.isfinite(row[Qdev].values).all():
        columns.append(("Qdev", row[Qdev]))
    columns += [(name, row[name]) for name in ("dQw", "dQl") if name in row and I == "I"]
    units = [str(values.attrs.get("units", "1")) for _, values in columns]
    for point in zip(*(values.values.tolist() for _, values in columns), strict=True):
        node = SubElement(data, "Idata")
        for (name, _), value, unit in zip(columns, point, units, strict=True):
            SubElement(node, name, unit=unit).text = _number(value)


def _write_instrument(entry: Element, contents: Contents) -> None:
    """Write what is known; the standard wants the elements even where nothing is."""
    instrument, recorded = SubElement(entry, "SASinstrument"), contents.instrument
    _text(instrument, "name", "unknown")
    source = SubElement(instrument, "SASsource")
    _text(source, "radiation", "unknown")
    if contents.wavelength:
        _length(source, "wavelength", contents.wavelength * 1e9, "nm")
    collimation = SubElement(instrument, "SAScollimation")
    if recorded and (recorded.slit_width or recorded.slit_height):
        size = SubElement(SubElement(collimation, "aperture", type="slit"), "size")
        for name, value in (("x", recorded.slit_width), ("y", recorded.slit_height)):
            if value:
                _length(size, name, value * 1e3, "mm")
    detector = SubElement(instrument, "SASdetector")
    _text(detector, "name", str(recorded.poni.get("detector", "unknown")) if recorded else "unknown")
    if contents.distance:
        _length(detector, "SDD", contents.distance, "m")


def _write_step(entry: Element, step: Step) -> None:
    process = SubElement(entry, "SASprocess", name=step.name)
    _text(process, "name", step.name)
    _text(process, "description", step.description)
    for name, value in step.terms.items():
        SubElement(process, "term", name=name).text = value
    SubElement(process, "SASprocessnote")


def _text(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = text


def _length(parent: Element, tag: str, value: float, unit: str) -> None:
    SubElement(parent, tag, unit=unit).text = _number(value)


def _number(value: float) -> str:
    """Write a number so that it reads back as the same, in the words of XML."""
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "INF" if value > 0 else "-INF"

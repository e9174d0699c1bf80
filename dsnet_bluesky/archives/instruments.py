"""The state of the instrument, read from a run's documents as a mapping says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from pyFAI.detectors import ALL_DETECTORS, detector_factory
from scipy.constants import c, e, h
from tiled.utils import ensure_uri

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Instrument
from dsnet_bluesky.reduction import integrator, load_poni

from .mapping import UNITS, ArchiveMapping, Value, in_unit
from .paths import Found, NotFound, RunDocuments
from .places import moved

__all__ = ["Incomplete", "Reader", "instrument_of"]

DIRECT = ("slit_width", "slit_height", "attenuation", "exposure_time", "monitor", "transmission", "wavelength_spread")
"""Numbers that `documents.Instrument` takes as they are."""


class Incomplete(BadInput):
    """A run lacks what its mapping looks for.

    Attributes
    ----------
    wrong_path
        Whether a path led nowhere: in the first run that is looked at, the mapping is wrong.
    """

    def __init__(self, problems: list[str], *, wrong_path: bool = False):
        self.wrong_path = wrong_path
        super().__init__("; ".join(dict.fromkeys(problems)) + ".")


class Reader:
    """Read values of one run, and collect what is wrong with them.

    Parameters
    ----------
    documents
        Of the run.
    descriptor
        Of the frames, whose state of the instrument is wanted.
    """

    def __init__(self, documents: RunDocuments, descriptor: Mapping[str, Any]):
        self._documents, self._descriptor = documents, descriptor
        self.problems: list[str] = []
        self.wrong_path = False

    def value(self, key: str, where: Value) -> Any | None:
        """Return a value, None where it cannot be had."""
        found = self._found(key, where)
        return None if found is None else self._one(key, where, found.values)

    def number(self, key: str, where: Value) -> float | None:
        """Return a number in what this package counts it in, None where it cannot be had."""
        found = self._found(key, where)
        value = None if found is None else self._one(key, where, found.values)
        if found is None or value is None:
            return None
        try:
            number = _number(value)
            name = key.rpartition(".")[2]
            unit = where.unit or found.unit
            if not UNITS.get(name) and not where.unit:
                return number  # a plain number; what a device calls its unit ("counts") does not matter
            if not unit:
                raise ValueError(f"the documents say no unit of {where.path}; give one: unit = '{UNITS[name]}'")
            return in_unit(number, unit, name) if name in UNITS else number
        except (TypeError, ValueError) as error:
            self.problems.append(f"{key}: {error}")
            return None

    def finish(self) -> None:
        """Raise what was wrong.

        Raises
        ------
        Incomplete
            If anything was.
        """
        if self.problems:
            raise Incomplete(self.problems, wrong_path=self.wrong_path)

    def _found(self, key: str, where: Value) -> Found | None:
        if where.path is None:
            return Found([where.value])
        problem, nowhere = f"{where.path} is empty in this run", False
        try:
            found = self._documents.find(where.path, self._descriptor)
            if not any(value is None for value in found.values):
                return found
        except NotFound as error:
            problem, nowhere = str(error), True
        if where.default is not None:
            return Found([where.default])
        self.problems.append(f"{key}: {problem}")
        self.wrong_path |= nowhere
        return None

    def _one(self, key: str, where: Value, values: list[Any]) -> Any | None:
        if where.take == "first" or all(value == values[0] for value in values):
            return values[0]
        if where.take == "mean":
            return fmean(values)
        self.problems.append(
            f"{key}: {where.path} changes within the run ({values[0]} ... {values[-1]}); choose what counts: "
            f"{{ path = '{where.path}', take = 'first' }} or 'mean'"
        )
        return None


def instrument_of(reader: Reader, mapping: ArchiveMapping, purpose: str, shape: tuple[int, int]) -> Instrument:
    """Read the state of the instrument in a run.

    Parameters
    ----------
    reader
        Of the run and descriptor.
    mapping
        Where things are.
    purpose
        Of the run.
    shape
        (rows, columns) of a frame.

    Raises
    ------
    Incomplete
        If something is not where the mapping says, or is not what it should be; the message names each.
    """
    given = dict(mapping.instrument_for(purpose).items())
    label = {key: _label(mapping, purpose, key) for key in given}
    numbers = {key: reader.number(label[key], where) for key, where in given.items() if key in (*UNITS, "monitor")}
    words = {key: reader.value(label[key], where) for key, where in given.items() if key in ("poni", "detector", "mask")}
    reader.finish()
    try:
        poni = _geometry(words, {key: number for key, number in numbers.items() if number is not None}, mapping, shape)
        _check_shape(poni, shape)
        mask = _file(words["mask"], mapping) if words.get("mask") else None
    except BadInput as error:
        raise Incomplete([f"instrument: {str(error).removesuffix('.')}"]) from error
    known = {key: numbers[key] for key in DIRECT if key in numbers}
    return Instrument(poni=poni, mask=ensure_uri(mask) if mask else None, **known)  # type: ignore[arg-type]


def _label(mapping: ArchiveMapping, purpose: str, key: str) -> str:
    own = purpose == "direct_beam" and getattr(mapping.direct_beam.instrument, key) is not None
    return f"direct_beam.instrument.{key}" if own else f"instrument.{key}"


def _number(value: Any) -> float:
    alone: Any = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(alone, bool) or not math.isfinite(number := float(alone)):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _geometry(
    words: Mapping[str, Any], numbers: Mapping[str, float], mapping: ArchiveMapping, shape: tuple[int, int]
) -> dict[str, Any]:
    """Build a geometry in pyFAI's words.

    The centre of the beam is counted in pixels from the corner of the first one, as in Fit2D; the detector stands
    perpendicular to the beam.
    """
    known: dict[str, float] = {}
    if "distance" in numbers:
        known["dist"] = numbers["distance"]
    if "energy" in numbers:
        known["wavelength"] = h * c / (numbers["energy"] * 1e3 * e) if numbers["energy"] > 0 else 0.0
    if "wavelength" in numbers:
        known["wavelength"] = numbers["wavelength"]
    if "poni" in words:
        return {**_poni(words["poni"], mapping), **known}
    name, configuration, (pixel1, pixel2) = _detector(words.get("detector"), numbers.get("pixel_size"), shape)
    return {
        "poni_version": 2.1,
        "poni1": numbers["beam_centre_y"] * pixel1,
        "poni2": numbers["beam_centre_x"] * pixel2,
        "rot1": 0.0,
        "rot2": 0.0,
        "rot3": 0.0,
        "detector": name,
        "detector_config": configuration,
        **known,
    }


def _detector(
    name: str | None, pixel_size: float | None, shape: tuple[int, int]
) -> tuple[str, dict[str, Any], tuple[float, float]]:
    if name is None:
        assert pixel_size is not None  # or the mapping were refused
        return (
            "Detector",
            {"pixel1": pixel_size, "pixel2": pixel_size, "max_shape": list(shape), "orientation": 3},
            (pixel_size, pixel_size),
        )
    known = str(name).lower().replace(" ", "_")
    if known not in ALL_DETECTORS:
        near = get_close_matches(known, ALL_DETECTORS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "pyFAI-detectors lists those it knows, or give pixel_size"
        raise BadInput(f"pyFAI knows no detector {name!r}; {hint}")
    detector = detector_factory(known)
    configuration = json.loads(json.dumps(detector.get_config(), default=str))
    return type(detector).__name__, configuration, (float(detector.pixel1), float(detector.pixel2))


def _poni(said: Any, mapping: ArchiveMapping) -> dict[str, Any]:
    """Return a geometry that is in the documents, or in a file that they or the mapping name."""
    if isinstance(said, Mapping):
        return dict(said)
    if str(said).lstrip().startswith("{"):
        try:
            return dict(json.loads(said))
        except ValueError as error:
            raise BadInput(f"poni: {str(said)[:60]!r} is not JSON") from error
    path = _file(said, mapping)
    return dict(_loaded(path, path.stat().st_mtime_ns if path.is_file() else 0))


@lru_cache(maxsize=64)
def _loaded(path: Path, version: int) -> dict[str, Any]:
    return json.loads(json.dumps(load_poni(path), default=str))


def _file(name: Any, mapping: ArchiveMapping) -> Path:
    """Return where a file is that the documents or the mapping name."""
    return mapping.folder / moved(str(name).removeprefix("file://"), mapping.files.root_map)


def _check_shape(poni: Mapping[str, Any], shape: tuple[int, int]) -> None:
    expected = _shape_of(json.dumps(poni, sort_keys=True, default=str))
    if expected != shape:
        raise BadInput(
            f"the frames have {shape[0]} x {shape[1]} pixels, the geometry's detector {expected[0]} x {expected[1]}; name "
            "another detector, or the right frames (files.data_key)"
        )


@lru_cache(maxsize=64)
def _shape_of(poni: str) -> tuple[int, int]:
    rows, columns = integrator(json.loads(poni)).detector.shape
    return int(rows), int(columns)

"""The mapping file: where a beamline's documents say what this package must know of a run.

A value is found by a path: ``start.SDD`` (start document, deeper by further dots),
``configuration.pil1M_cam_acquire_time`` (configuration of the stream of frames, by any device), or ``baseline.energy_energy``
(data of a stream, by its name). docs/how-to/archives.md describes every key.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pint
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import PURPOSES, start_metadata

__all__ = ["ArchiveMapping", "InstrumentMapping", "Value", "in_unit", "load_mapping"]

Constant = str | float | int | bool

UNITS = {
    "distance": "m",
    "wavelength": "m",
    "energy": "keV",
    "pixel_size": "m",
    "beam_centre_x": "",
    "beam_centre_y": "",
    "slit_width": "m",
    "slit_height": "m",
    "exposure_time": "s",
    "transmission": "",
    "attenuation": "",
    "wavelength_spread": "",
}
"""What this package counts in; what is not listed is text, or a number of any unit."""

GEOMETRY = ("distance", "wavelength", "energy", "beam_centre_x", "beam_centre_y", "detector", "pixel_size")


def _path(text: str) -> str:
    if "." not in text.strip("."):
        raise ValueError(
            f"{text!r} is no path; begin it with 'start.', 'configuration.' or the name of a stream ('baseline.'), or write a "
            "constant as { value = ... }"
        )
    return text


Path_ = Annotated[str, BeforeValidator(_path)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Value(_Model):
    """Where a value is, or the value itself.

    Attributes
    ----------
    path
        Where it is; or `value`.
    value
        A constant.
    unit
        Of it; what the documents say of their own if not given.
    default
        What counts in runs that lack the path, in `unit`.
    take
        Of values that change within a run: ``same`` refuses that, ``first`` and ``mean`` take one.
    """

    path: Path_ | None = None
    value: Constant | None = None
    unit: str | None = None
    default: Constant | None = None
    take: Literal["same", "first", "mean"] = "same"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"path": given}
        return {"value": given} if isinstance(given, int | float) else given

    @model_validator(mode="after")
    def _one(self) -> Value:
        if (self.path is None) == (self.value is None):
            raise ValueError("give either a path or a value")
        if self.path is None and self.default is not None:
            raise ValueError("a constant needs no default")
        return self


class InstrumentMapping(_Model):
    """Where the state of the instrument is; see `documents.Instrument` for what each is."""

    poni: Value | None = None
    distance: Value | None = None
    wavelength: Value | None = None
    energy: Value | None = None
    beam_centre_x: Value | None = None
    beam_centre_y: Value | None = None
    detector: Value | None = None
    pixel_size: Value | None = None
    mask: Value | None = None
    slit_width: Value | None = None
    slit_height: Value | None = None
    attenuation: Value | None = None
    exposure_time: Value | None = None
    monitor: Value | None = None
    transmission: Value | None = None
    wavelength_spread: Value | None = None

    def items(self) -> Iterator[tuple[str, Value]]:
        """Yield what is given, by its key."""
        for key in type(self).model_fields:
            if (value := getattr(self, key)) is not None:
                yield key, value

    @model_validator(mode="after")
    def _units(self) -> InstrumentMapping:
        for key, value in self.items():
            constant = value.value if value.path is None else value.default
            if key not in UNITS:
                continue
            if value.path is None and value.unit is None and UNITS[key]:
                raise ValueError(f"{key} = {value.value} needs a unit: {{ value = {value.value}, unit = '{UNITS[key]}' }}")
            if value.unit is not None:
                in_unit(1.0, value.unit, key)
            if isinstance(constant, str | bool):
                raise ValueError(f"{key} = {constant!r} is no number")
        return self


class DirectBeamMapping(_Model):
    """How a sample finds its direct beam, and what is other in runs of the direct beam."""

    uid: Path_ | None = None
    instrument: InstrumentMapping = InstrumentMapping()

    @field_validator("uid")
    @classmethod
    def _in_start(cls, path: str | None) -> str | None:
        if path is not None and not path.startswith("start."):
            raise ValueError(f"{path!r} does not begin with 'start.': a direct beam is named by the start document")
        return path


class SampleMapping(_Model):
    """What is measured."""

    name: Value | None = None


class FilesMapping(_Model):
    """Where the frames are."""

    data_key: str | None = None
    root_map: dict[str, str] = Field(default_factory=dict)


class ArchiveMapping(_Model):
    """How runs of an archive are completed; see `load_mapping`."""

    purpose: dict[str, list[dict[str, list[Constant]]]] = Field(default_factory=dict)
    instrument: InstrumentMapping = InstrumentMapping()
    direct_beam: DirectBeamMapping = DirectBeamMapping()
    sample: SampleMapping = SampleMapping()
    metadata: dict[str, Value] = Field(default_factory=dict)
    files: FilesMapping = FilesMapping()

    _path: Path | None = PrivateAttr(None)
    _sha256: str = PrivateAttr(hashlib.sha256(b"").hexdigest())

    @property
    def name(self) -> str:
        """Of the file, for messages."""
        return self._path.name if self._path else "the mapping (none was given)"

    @property
    def folder(self) -> Path:
        """Where relative names of files begin."""
        return self._path.absolute().parent if self._path else Path.cwd()

    @property
    def sha256(self) -> str:
        """Digest of the file, recorded with each run."""
        return self._sha256

    def instrument_for(self, purpose: str) -> InstrumentMapping:
        """Return where the instrument's state is in runs of a purpose.

        In runs of the direct beam, what `direct_beam.instrument` says counts first; the samples' mask, which hides the
        beamstop, does not count.
        """
        if purpose != "direct_beam":
            return self.instrument
        return InstrumentMapping(**{**dict(self.instrument.items()), "mask": None, **dict(self.direct_beam.instrument.items())})

    @field_validator("purpose", mode="before")
    @classmethod
    def _rules(cls, given: Any) -> Any:
        """Write short forms out: one rule for a list of them, one word for a list of them."""
        if not isinstance(given, dict):
            return given
        for name, rules in given.items():
            start_metadata(name)  # or it is unknown
            for rule in rules if isinstance(rules, list) else [rules]:
                if not isinstance(rule, dict) or not rule:
                    raise ValueError(f"{name} = {rule!r} is no rule; write {{ 'start.plan_name' = 'count' }}")
                for path in rule:
                    if not path.startswith("start.") or path == "start.":
                        raise ValueError(f"{name}: {path!r} does not begin with 'start.': what a run is for is told by its start")
        every = {name: rules if isinstance(rules, list) else [rules] for name, rules in given.items()}
        return {
            name: [{path: words if isinstance(words, list) else [words] for path, words in rule.items()} for rule in rules]
            for name, rules in every.items()
        }

    @model_validator(mode="after")
    def _whole(self) -> ArchiveMapping:
        if any(self.instrument.items()):
            _check_geometry(self.instrument)
        for purpose in PURPOSES:
            self.instrument_for(purpose)
        return self


def _check_geometry(given: InstrumentMapping) -> None:
    keys = dict(given.items())
    if "wavelength" in keys and "energy" in keys:
        raise ValueError("instrument: give wavelength or energy, not both")
    if "poni" in keys:
        if wrong := [key for key in ("beam_centre_x", "beam_centre_y", "detector", "pixel_size") if key in keys]:
            raise ValueError(f"instrument: {', '.join(wrong)}: the .poni file says that already; leave it out of the mapping")
        return
    needed = {"distance", "wavelength", "beam_centre_x", "beam_centre_y", "detector"}
    has = keys.keys() | ({"wavelength"} if "energy" in keys else set()) | ({"detector"} if "pixel_size" in keys else set())
    if "detector" in keys and "pixel_size" in keys:
        raise ValueError("instrument: give detector (pyFAI knows its pixels) or pixel_size, not both")
    if lacking := sorted(needed - has):
        hints = {"wavelength": "wavelength or energy", "detector": "detector or pixel_size"}
        words = ", ".join(hints.get(key, key) for key in lacking)
        raise ValueError(f"instrument: the geometry lacks {words}; or give poni, a .poni file, in place of all")


def in_unit(number: float, unit: str, key: str) -> float:
    """Convert a number to what this package counts a key of [instrument] in.

    Raises
    ------
    ValueError
        If the unit is none, or is of another kind.
    """
    return number * _factor(unit, key)


@lru_cache(maxsize=256)
def _factor(unit: str, key: str) -> float:
    try:
        return float(pint.get_application_registry().Quantity(1.0, _pint_word(unit)).to(UNITS[key]).magnitude)
    except Exception as error:
        # pint raises its own errors, tokenize's and AttributeError: all mean that this is no unit of that kind.
        raise ValueError(f"{key}: the unit {unit!r} is none of {UNITS[key] or 'a plain number'}") from error


def _pint_word(unit: str) -> str:
    """Write a unit as pint reads it: in this field A is the angstrom, and pixels are counted."""
    plain = unit.strip()
    return {"A": "angstrom", "\u00c5": "angstrom", "\u212b": "angstrom", "pixel": "", "pixels": "", "px": "", "%": "percent"}.get(
        plain, plain
    )


def load_mapping(path: str | Path | None) -> ArchiveMapping:
    """Read a mapping file, and check all of it that can be checked without a run.

    Parameters
    ----------
    path
        TOML file; None for runs whose documents need nothing, because they were written with this package's plans.

    Raises
    ------
    BadInput
        If it cannot be read, or a key is unknown, missing or of the wrong kind; the message names the key.
    """
    if path is None:
        return ArchiveMapping()
    try:
        content = Path(path).read_bytes()
        mapping = ArchiveMapping.model_validate(tomllib.loads(content.decode()))
    except OSError as error:
        raise BadInput(f"The mapping {path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise BadInput(f"The mapping {path}: {'; '.join(_explained(one) for one in error.errors())}.") from error
    except ValueError as error:  # TOML's and Unicode's
        raise BadInput(f"The mapping {path} is no TOML ({error}).") from error
    mapping._path, mapping._sha256 = Path(path), hashlib.sha256(content).hexdigest()
    return mapping


def _explained(error: Any) -> str:
    """Say what is wrong in a user's words, with the key as it stands in the file."""
    place = ".".join(str(part) for part in error["loc"] if isinstance(part, str) and part not in ("str", "float", "int", "bool"))
    if error["type"] == "extra_forbidden":
        *parents, wrong = error["loc"]
        known = _keys_of([part for part in parents if isinstance(part, str)])
        near = get_close_matches(str(wrong), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        return f"{place} is no key of a mapping; {hint}"
    said = str(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    return f"{place}: {said}" if place else said


def _keys_of(parents: list[str]) -> list[str]:
    """Return the keys below a place of the file."""
    model: Any = ArchiveMapping
    for part in parents:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        annotation = field.annotation if field else None
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), Value)
    return list(model.model_fields)

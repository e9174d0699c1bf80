"""What the run documents mean here: purposes, instrument, pairing, identity and provenance.

The names are those already in use in the field (docs/reference/metadata.md).
"""

from __future__ import annotations

import json
import math
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .data import BadInput
from .frames import FrameReference
from .kinds import kind_of
from .versions import version_order

__all__ = [
    "PURPOSES",
    "Exposure",
    "Instrument",
    "change_within",
    "failures_of",
    "frames_per_exposure",
    "good_exposures",
    "is_image",
    "mismatch",
    "purpose",
    "result_key",
    "result_metadata",
    "sample_name",
    "start_metadata",
]

PURPOSES = ("direct_beam", "sample", "blank", "dark")

NAMESPACE = uuid.UUID("0b0d5d8e-6a0e-5c38-9c63-9a5a5c1f6d9e")
"""Of the results' keys; changing it would give every result a second identity."""

COPIED_FROM_START = ("sample", "data_session", "proposal_id", "operator", "owner", "group", "project")
PACKAGES = ("dsnet-bluesky", "numpy", "scipy", "pyFAI", "torch", "xarray", "bluesky", "tiled")


@dataclass(frozen=True)
class Instrument:
    """The state of the instrument in an exposure, read from the descriptor's configuration.

    Attributes
    ----------
    poni
        Geometry in pyFAI's words.
    mask
        ``file://`` URI of the mask, None for none.
    slit_width, slit_height
        In m, None where not recorded.
    attenuation
        Factor by which the beam was weakened, 1 for none.
    exposure_time
        In s.
    monitor, transmission
        Divisors, 1 where not recorded.
    wavelength_spread
        Standard deviation of the wavelength over its mean.
    """

    poni: Mapping[str, Any]
    mask: str | None = None
    slit_width: float | None = None
    slit_height: float | None = None
    attenuation: float = 1.0
    exposure_time: float = 1.0
    monitor: float = 1.0
    transmission: float = 1.0
    wavelength_spread: float = 0.0

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> Instrument:
        """Read the instrument from ``descriptor["configuration"]``.

        A key counts by its last word, whatever the device is called: `instrument-poni`
        and `det_poni` are both the geometry. What the device `instrument` says comes first; of
        other devices, values of another kind are left out (`det-beam_monitor` may be a switch).

        Raises
        ------
        BadInput
            If no geometry was recorded, or it is not JSON, or the device `instrument`
            records something that is no number (for `mask`: no text).
        """
        found = dict(_last_words(configuration))
        if not found.get("poni"):
            raise BadInput(
                "The run's descriptor holds no geometry: its configuration needs a key that ends in 'poni' with the content of "
                "a .poni file as JSON. Use the plans of dsnet_bluesky.plans, or pass their Instrument to trigger_and_read."
            )
        return cls(**{**found, "poni": _poni(found["poni"]), "mask": found.get("mask") or None})

    def to_configuration(self) -> dict[str, Any]:
        """Return plain values under this class's names, as plans record them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "poni": json.dumps(dict(self.poni)), "mask": self.mask or ""}


def _last_words(configuration: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    # The plans' own device comes last: what it says counts.
    for device, recorded in sorted(configuration.items(), key=lambda item: item[0] == "instrument"):
        for key, value in recorded.get("data", {}).items():
            for name in Instrument.__dataclass_fields__:
                if value is None or not (key == name or key.endswith((f"-{name}", f"_{name}"))):
                    continue
                try:
                    yield name, _converted(name, value)
                except (TypeError, ValueError) as error:
                    if device == "instrument":
                        raise BadInput(f"The instrument recorded {key} = {str(value)[:60]!r}: {error}.") from error


def _converted(name: str, value: Any) -> Any:
    """Return a recorded value as the kind that its name stands for; ValueError or TypeError if it is of another."""
    if name == "poni":
        return value
    if name == "mask":
        if not isinstance(value, str):
            raise TypeError("a mask is the URI of a file")
        return value
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError("it is not a finite number")
    return number


def _poni(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    try:
        return dict(json.loads(value))
    except (TypeError, ValueError) as error:
        raise BadInput(f"The recorded geometry (poni) is not JSON: {str(value)[:60]!r}.") from error


@dataclass(frozen=True)
class Exposure:
    """One exposure of a run: where its frames are and in which state of the instrument it was taken.

    Attributes
    ----------
    run_uid
        Of the run's start document.
    start
        That document.
    stream, data_key
        Which detector.
    index
        Number of the exposure within the run, from 0.
    frames
        Where the frames are; several are summed.
    instrument
        State of the instrument; None if the run recorded none (`problem` says so).
    time
        Seconds since 1970.
    problem
        Why this exposure cannot be used, None if it can.
    """

    run_uid: str
    start: Mapping[str, Any]
    stream: str
    data_key: str
    index: int
    frames: FrameReference
    instrument: Instrument | None
    time: float
    problem: str | None = field(default=None)


def purpose(start: Mapping[str, Any]) -> str | None:
    """Return the purpose of a run, None where it says none that is known here."""
    value = start.get("purpose")
    return value if value in PURPOSES else None


def sample_name(said: Mapping[str, Any]) -> str:
    """Return the name of the sample in a start document or a result's metadata, empty where there is none."""
    sample = said.get("sample") or ""
    return str(sample.get("name", sample) if isinstance(sample, Mapping) else sample)


def failures_of(said: Mapping[str, Any]) -> dict[int, str]:
    """Return why exposures of a result failed, by their number from 0, as its metadata say."""
    return {int(failure["exposure"]): str(failure["reason"]) for failure in said.get("failures") or ()}


def good_exposures(said: Mapping[str, Any]) -> list[int]:
    """Return the numbers, from 0, of the exposures of a result that did not fail."""
    failed = failures_of(said)
    return [number for number in range(said["exposures"]) if number not in failed]


def is_image(shape: Sequence[int | None]) -> bool:
    """Whether data of a shape are images: the last two lengths, where they are known, exceed 1."""
    return len(shape) >= 2 and all(length is None or length > 1 for length in shape[-2:])


def frames_per_exposure(shape: Sequence[Any], parameters: Mapping[str, Any]) -> int:
    """Return how many frames an event holds, by the shape of its data and the parameters of its stream resource."""
    return max(int(shape[-3]) if len(shape) > 2 else 1, int(parameters.get("multiplier") or 1))


def start_metadata(
    purpose: str, *, sample: str | Mapping[str, Any] | None = None, direct_beam_uid: str | None = None, **more: Any
) -> dict[str, Any]:
    """Build what a plan or an ingestion writes into the start document.

    Raises
    ------
    BadInput
        If the purpose is unknown.
    """
    if purpose not in PURPOSES:
        raise BadInput(f"The purpose {purpose!r} is unknown; use one of {', '.join(PURPOSES)}.")
    known = {"purpose": purpose, "sample": sample, "direct_beam_uid": direct_beam_uid}
    return {**{k: v for k, v in known.items() if v is not None}, **more}


def mismatch(sample: Instrument, direct_beam: Instrument) -> str | None:
    """Say why a sample and a direct beam do not belong together, None if they do."""
    if sample.poni.get("detector") != direct_beam.poni.get("detector"):
        return f"the detectors differ ({sample.poni.get('detector')}, direct beam {direct_beam.poni.get('detector')})"
    for name, unit, tolerance in (("dist", "m", 1e-3), ("wavelength", "m", 1e-3)):
        mine, other = float(sample.poni.get(name) or 0), float(direct_beam.poni.get(name) or 0)
        if abs(mine - other) > tolerance * max(abs(mine), abs(other)):
            word = "distance" if name == "dist" else name
            return f"the {word}s differ ({mine:.5g} {unit}, direct beam {other:.5g} {unit})"
    for name in ("slit_width", "slit_height"):
        mine, other = getattr(sample, name), getattr(direct_beam, name)
        if mine is not None and other is not None and abs(mine - other) > 1e-6:
            return f"the slits differ ({name} {mine * 1e3:.3f} mm, direct beam {other * 1e3:.3f} mm)"
    return None


def change_within(first: Instrument, now: Instrument) -> str | None:
    """Say what was changed in a run that one operator cannot describe any more, None if nothing."""
    for name, scale, unit in (("slit_width", 1e3, " mm"), ("slit_height", 1e3, " mm"), ("wavelength_spread", 1.0, "")):
        before, after = getattr(first, name), getattr(now, name)
        if before != after:
            said = ("unknown" if value is None else f"{value * scale:.3f}{unit}" for value in (before, after))
            return f"{name} {' -> '.join(said)}"
    if first.mask != now.mask:
        return f"mask {first.mask} -> {now.mask}"
    keys = [key for key in {**first.poni, **now.poni} if first.poni.get(key) != now.poni.get(key)]
    return f"poni {keys[0]} {first.poni.get(keys[0])} -> {now.poni.get(keys[0])}" if keys else None


def result_key(raw_uid: str, direct_beam_uid: str | None, config_sha256: str, model_sha256: str) -> str:
    """Return the key of a result: the same inputs always give the same key, others another."""
    return str(uuid.uuid5(NAMESPACE, "/".join([raw_uid, direct_beam_uid or "", config_sha256, model_sha256])))


def result_metadata(
    start: Mapping[str, Any],
    *,
    direct_beam_uid: str | None,
    config: Mapping[str, Any],
    config_sha256: str,
    method: str,
    model_name: str = "",
    model_version: str = "",
    model_sha256: str = "",
    pairing: Mapping[str, Any] | None = None,
    deferred: str | None = None,
    status: str = "running",
    reason: str | None = None,
) -> dict[str, Any]:
    """Build the metadata of a result: where it comes from and what made it.

    Parameters
    ----------
    start
        Start document of the raw run.
    direct_beam_uid
        Run of the direct beam, None where there was none.
    config, config_sha256
        Of `pipeline.Config`.
    method, model_name, model_version, model_sha256
        What desmeared.
    pairing
        How and why that direct beam was chosen, and its age in s; None where there was none.
    deferred
        Why the run was done later than it could have been, None if it was not.
    status, reason
        running, complete or failed, and why.

    Returns
    -------
    dict
        JSON-serialisable.
    """
    copied = {key: start[key] for key in COPIED_FROM_START if key in start}
    parents = {"sample": start["uid"], **({"direct_beam": direct_beam_uid} if direct_beam_uid else {})}
    return {
        **copied,
        "sample_name": sample_name(start),
        "analysis_stage": kind_of(method).operation,
        "operation": kind_of(method).operation,
        "original_start_uid": start["uid"],
        "original_start_time": start["time"],
        "original_scan_id": start.get("scan_id"),
        "parent_uids": list(parents.values()),
        "parent_node_map": parents,
        "raw_uid": start["uid"],
        "direct_beam_uid": direct_beam_uid,
        "pairing": dict(pairing) if pairing else None,
        "deferred": deferred,
        "method": method,
        "model_name": model_name,
        "model_version": model_version,
        "model_sha256": model_sha256,
        "model_order": _order_of(model_version),
        "config": dict(config),
        "config_sha256": config_sha256,
        "versions": dict(_versions()),
        "python_environment": f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}",
        "status": status,
        "reason": reason,
    }


def _order_of(model_version: str) -> int | None:
    """Return `versions.version_order`, None where there is no version: a model of one's own may be called anything."""
    try:
        return version_order(model_version)
    except BadInput:
        return None


@cache
def _versions() -> dict[str, str]:
    """Return what is installed; asking for it takes as long as desmearing a curve."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

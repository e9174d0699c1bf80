"""What the run documents mean here: purposes, instrument, pairing, identity and provenance.

The names are those already in use in the field (docs/reference/metadata.md).
"""

from __future__ import annotations

import json
import math
import platform
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .data import BadInput
from .frames import FrameReference

__all__ = [
    "PURPOSES",
    "Exposure",
    "Instrument",
    "change_within",
    "mismatch",
    "purpose",
    "result_key",
    "result_metadata",
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
        "analysis_stage": "desmear",
        "operation": "desmear",
        "original_start_uid": start["uid"],
        "original_start_time": start["time"],
        "original_scan_id": start.get("scan_id"),
        "parent_uids": list(parents.values()),
        "parent_node_map": parents,
        "raw_uid": start["uid"],
        "direct_beam_uid": direct_beam_uid,
        "method": method,
        "model_name": model_name,
        "model_version": model_version,
        "model_sha256": model_sha256,
        "config": dict(config),
        "config_sha256": config_sha256,
        "versions": _versions(),
        "python_environment": f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}",
        "status": status,
        "reason": reason,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

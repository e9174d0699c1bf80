"""Plans that any beamline can call with its own detector.

They write the start metadata and the descriptor configuration by which
everything after them (callbacks, served curves, replay) knows what an exposure
is, how the instrument stood and which direct beam belongs to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from bluesky.protocols import Movable, Readable, Stageable
from bluesky.utils import MsgGenerator
from event_model import DataKey
from ophyd_async.core import StandardDetector, TriggerInfo

from . import documents

__all__ = ["Instrument", "ScanUids", "desmearing_scan", "direct_beam", "expose"]

PlanStub = Callable[[], MsgGenerator]

UNITS = {"slit_width": "m", "slit_height": "m", "exposure_time": "s"}


class Instrument:
    """The state of the instrument, for the record: a device without readings, whose configuration is the geometry.

    Pass it to a plan beside the detector and its values go into the descriptor's
    configuration as ``instrument-poni``, ``instrument-mask``, ``instrument-slit_width``
    and so on. It moves nothing: tell it what changed with `bps.configure`.

    Parameters
    ----------
    poni
        Geometry: a .poni file, or its content as pyFAI's ``ai.get_config()`` gives it.
    mask
        Mask file (anything fabio reads, or .npy; non-zero pixels do not count).
    name
        Of the device; the first part of the keys.
    **state
        Any attribute of `documents.Instrument`: `slit_width` and `slit_height` in m,
        `exposure_time` in s, `attenuation`, `monitor`, `transmission`, `wavelength_spread`.

    Examples
    --------
    >>> instrument = Instrument("saxs.poni", mask="mask.edf", slit_width=4e-3, slit_height=2.5e-3)  # doctest: +SKIP
    >>> RE(bps.configure(instrument, slit_width=0.8e-3, slit_height=0.5e-3))                        # doctest: +SKIP
    """

    parent = None

    def __init__(
        self, poni: Mapping[str, Any] | str | Path, *, mask: str | Path | None = None, name: str = "instrument", **state: float
    ):
        self.name = name
        self.state = documents.Instrument(poni=_geometry(poni), mask=_mask_uri(mask), **state)

    def __repr__(self) -> str:
        return f"<Instrument {self.name}: {self.state}>"

    def configure(self, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Note that the instrument has changed; takes what the constructor takes. Returns the old and the new configuration."""
        unknown = set(changes) - {f.name for f in fields(documents.Instrument)}
        if unknown:
            raise ValueError(f"An instrument has no {', '.join(sorted(unknown))}.")
        old = self.read_configuration()
        if "poni" in changes:
            changes["poni"] = _geometry(changes["poni"])
        if "mask" in changes:
            changes["mask"] = _mask_uri(changes["mask"])
        self.state = replace(self.state, **changes)
        return old, self.read_configuration()

    def read(self) -> dict[str, Any]:
        """Nothing: all that this device knows is configuration."""
        return {}

    def describe(self) -> dict[str, DataKey]:
        """Nothing, see `read`."""
        return {}

    def read_configuration(self) -> dict[str, Any]:
        """Return the state of the instrument as readings."""
        now = time.time()
        return {key: {"value": value, "timestamp": now} for key, value in self._configuration().items()}

    def describe_configuration(self) -> dict[str, DataKey]:
        """Return what `read_configuration` holds."""
        return {key: self._data_key(key, value) for key, value in self._configuration().items()}

    def _configuration(self) -> dict[str, Any]:
        values = self.state.to_configuration()
        return {f"{self.name}-{name}": value for name, value in values.items() if value is not None}

    def _data_key(self, key: str, value: Any) -> DataKey:
        described = DataKey(source=f"dsnet_bluesky.plans:{key}", dtype="string" if isinstance(value, str) else "number", shape=[])
        unit = UNITS.get(key.removeprefix(f"{self.name}-"))
        if unit:
            described["units"] = unit
        return described


def _geometry(poni: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(poni, Mapping):
        return json.loads(json.dumps(dict(poni), default=str))
    from .reduction import load_poni  # pyFAI takes a second to import and a beamline that gives a dict does not need it

    return _geometry(load_poni(poni))


def _mask_uri(mask: str | Path | None) -> str | None:
    if not mask or str(mask).startswith("file:"):
        return str(mask) if mask else None
    return Path(mask).absolute().as_uri()


@dataclass(frozen=True)
class ScanUids:
    """Runs that a scan made."""

    direct_beam: str
    """Of the direct beam."""

    samples: dict[str, str] = field(default_factory=dict)
    """By name of the sample."""


def direct_beam(
    detector: Readable,
    *,
    instrument: Instrument,
    exposure_time: float | None = None,
    exposures: int = 1,
    mask: str | Path | None = None,
    readables: Sequence[Readable] = (),
    md: Mapping[str, Any] | None = None,
) -> MsgGenerator[str]:
    """Expose the direct beam: no sample, no beamstop, attenuated so that no pixel saturates, at least 1e5 counts.

    Parameters
    ----------
    detector
        An ophyd-async `StandardDetector` or an ophyd area detector that writes files.
    instrument
        State of the instrument, for the record.
    exposure_time
        In s; None leaves the detector and the record as they are.
    exposures
        Number of exposures; they are summed.
    mask
        Mask of this frame, recorded for this run alone. By default none but the detector's own: the
        instrument's mask is that of the samples, whose beamstop would cover the beam.
    readables
        Further devices to read at each exposure.
    md
        Further start metadata.

    Returns
    -------
    str
        Uid of the run, for `expose(direct_beam_uid=...)`.

    Examples
    --------
    >>> result = RE(direct_beam(pilatus, instrument=instrument, exposure_time=10))   # doctest: +SKIP
    """
    metadata = documents.start_metadata("direct_beam", plan_name="direct_beam", **(md or {}))
    samples_mask = instrument.state.mask
    yield from bps.configure(instrument, mask=mask)
    run = _run(detector, instrument, exposure_time, exposures, readables, None, metadata)
    return (yield from bpp.finalize_wrapper(run, lambda: bps.configure(instrument, mask=samples_mask)))


def expose(
    detector: Readable,
    *,
    sample: str | Mapping[str, Any],
    instrument: Instrument,
    exposure_time: float | None = None,
    exposures: int = 1,
    motor: Movable | None = None,
    positions: Sequence[Any] | None = None,
    direct_beam_uid: str | None = None,
    purpose: str = "sample",
    readables: Sequence[Readable] = (),
    md: Mapping[str, Any] | None = None,
) -> MsgGenerator[str]:
    """Expose a sample, once or several times, at one place or along a motor, in one run.

    Parameters
    ----------
    detector, instrument, exposure_time, readables, md
        As for `direct_beam`.
    sample
        Name, or a description as a dict.
    exposures
        Number of exposures, at each position.
    motor, positions
        Move there before exposing. Where the motor stood is recorded.
    direct_beam_uid
        Run of the direct beam that belongs to this sample. Without it the
        nearest earlier one of the same instrument is taken.
    purpose
        "sample", "blank" or "dark".

    Returns
    -------
    str
        Uid of the run.

    Examples
    --------
    >>> RE(expose(pilatus, sample="AgBh", instrument=instrument, exposure_time=60))      # doctest: +SKIP
    >>> RE(expose(pilatus, sample="latex", instrument=instrument, motor=x, positions=[-0.5, 0, 0.5]))  # doctest: +SKIP
    """
    metadata = documents.start_metadata(purpose, sample=sample, direct_beam_uid=direct_beam_uid, plan_name="expose", **(md or {}))
    if (motor is None) != (positions is None):
        raise ValueError("Give both motor and positions, or neither.")
    scan = None if motor is None or positions is None else (motor, tuple(positions))
    return (yield from _run(detector, instrument, exposure_time, exposures, readables, scan, metadata))


def desmearing_scan(
    detector: Readable,
    *,
    changer: Movable,
    samples: Mapping[str, Any],
    empty: Any,
    instrument: Instrument,
    exposure_time: float,
    direct_beam_time: float | None = None,
    direct_beam_mask: str | Path | None = None,
    before_direct_beam: PlanStub | None = None,
    before_samples: PlanStub | None = None,
    md: Mapping[str, Any] | None = None,
    **options: Any,
) -> MsgGenerator[ScanUids]:
    """Expose the direct beam, then each sample of a changer, every run tied to that direct beam.

    Parameters
    ----------
    detector, instrument, md
        As for `direct_beam`.
    changer
        What brings a sample into the beam.
    samples
        Position of the changer for each sample, by name. Each becomes a run.
    empty
        Position of the changer with nothing in the beam.
    exposure_time, direct_beam_time
        In s; the direct beam is exposed as long as the samples unless told otherwise.
    direct_beam_mask
        See `direct_beam`.
    before_direct_beam
        Plan that makes the beam safe for the detector: beamstop out, attenuator in.
    before_samples
        Plan that undoes this.
    **options
        Further arguments of `expose` (exposures, motor, positions, readables).

    Returns
    -------
    ScanUids
        Of the runs made.

    Examples
    --------
    >>> RE(desmearing_scan(pilatus, changer=x, samples={"AgBh": 12.5, "latex": 20.0}, empty=0.0,   # doctest: +SKIP
    ...                    instrument=instrument, exposure_time=60,
    ...                    before_direct_beam=attenuate, before_samples=unattenuate))
    """
    yield from bps.mv(changer, empty)
    if before_direct_beam is not None:
        yield from before_direct_beam()
    beam = yield from direct_beam(
        detector,
        instrument=instrument,
        exposure_time=exposure_time if direct_beam_time is None else direct_beam_time,
        mask=direct_beam_mask,
        readables=options.get("readables", ()),
        md=md,
    )
    if before_samples is not None:
        yield from before_samples()
    uids = ScanUids(beam)
    for name, position in samples.items():
        yield from bps.mv(changer, position)
        uids.samples[name] = yield from expose(
            detector, sample=name, instrument=instrument, exposure_time=exposure_time, direct_beam_uid=beam, md=md, **options
        )
    return uids


def _run(
    detector: Readable,
    instrument: Instrument,
    exposure_time: float | None,
    exposures: int,
    readables: Sequence[Readable],
    scan: tuple[Movable, Sequence[Any]] | None,
    metadata: Mapping[str, Any],
) -> MsgGenerator[str]:
    """One run: stage, set the exposure time, then trigger and read at each position."""
    motor, positions = scan or (None, (None,))
    devices = [detector, instrument, *readables, *([motor] if isinstance(motor, Readable) else [])]
    if exposure_time is not None:
        yield from bps.configure(instrument, exposure_time=exposure_time)

    @bpp.stage_decorator([device for device in devices if isinstance(device, Stageable)])
    @bpp.run_decorator(md=dict(metadata))
    def inner() -> MsgGenerator[Any]:  # the decorator returns the uid of the run
        if exposure_time is not None:
            yield from _set_exposure_time(detector, exposure_time)
        for position in positions:
            if motor is not None:
                yield from bps.mv(motor, position)
            for _ in range(exposures):
                yield from bps.checkpoint()
                yield from bps.trigger_and_read(devices)

    return (yield from inner())


def _set_exposure_time(detector: Readable, seconds: float) -> MsgGenerator[None]:
    """Set the exposure time of an ophyd-async detector or of an ophyd area detector."""
    if isinstance(detector, StandardDetector):
        yield from bps.prepare(detector, TriggerInfo(livetime=seconds), wait=True)
    elif hasattr(detector, "cam"):
        yield from bps.mv(detector.cam.acquire_time, seconds)  # type: ignore[attr-defined]
    else:
        raise ValueError(
            f"{detector.name} is neither an ophyd-async StandardDetector nor an area detector with a cam: "
            "set its exposure time yourself, tell the instrument with bps.configure, and leave exposure_time out."
        )

"""Which direct beam belongs to a sample exposure, and the operator made of it."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiled.client.container import Container
from tiled.queries import Comparison, Key

from dsnet_bluesky import frames
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import lookup
from dsnet_bluesky.documents import Exposure, Instrument, mismatch
from dsnet_bluesky.pipeline import Config, Exposed, PreparedExposures, prepare_exposures
from dsnet_bluesky.reduction import load_mask, sum_frames

from .exposures import exposures_of_documents

__all__ = ["DirectBeam", "DirectBeams", "NoDirectBeam", "Pairing", "summed"]

PREPARED = 4
"""Operators kept at hand; `pipeline` keeps more, but must read the frames to find them."""

LOOK_BACK = 20
"""Direct beams of the catalog that are tried, newest first, for a sample that names none."""


class NoDirectBeam(BadInput):
    """No direct beam fits a sample, or not yet: one may still be exposed, or be on its way into the catalog."""


@dataclass
class DirectBeam:
    """A run that exposed the direct beam."""

    run_uid: str
    time: float
    exposures: list[Exposure] = field(default_factory=list)

    @property
    def instrument(self) -> Instrument:
        """State of the instrument in the first exposure.

        Raises
        ------
        BadInput
            If the run recorded none.
        """
        first = self.exposures[0]
        if first.instrument is None:
            raise BadInput(f"The direct beam {self.run_uid} cannot be used. {first.problem}")
        return first.instrument

    def frame(self) -> NDArray:
        """Sum of all frames, (y, x)."""
        return np.concatenate([summed(exposure) for exposure in self.exposures]) if self.exposures else np.empty(0)


@dataclass(frozen=True)
class Pairing:
    """The direct beam of a sample, and why it is that one.

    Attributes
    ----------
    beam
        The direct beam.
    how
        ``by hand``, ``named`` by the sample's start document, or ``nearest`` before the sample.
    reason
        For a user.
    age
        Seconds from the start of the direct beam's run to that of the sample; negative if it was exposed later.
    """

    beam: DirectBeam
    how: str
    reason: str
    age: float

    def to_dict(self) -> dict[str, Any]:
        """Return what is recorded with a result."""
        return {"how": self.how, "reason": self.reason, "age": self.age}


def summed(exposure: Exposure) -> NDArray:
    """Read an exposure as one frame, shape (1, y, x); a pixel that fails in one of its frames is -1 in the sum.

    Raises
    ------
    BadInput
        If the exposure cannot be read.
    """
    if exposure.problem:
        raise BadInput(exposure.problem)
    assert exposure.instrument is not None  # or there were a problem
    stack = frames.read(exposure.frames)
    return sum_frames(stack, len(stack), str(exposure.instrument.poni.get("detector", "")))


@dataclass(frozen=True)
class _Listed:
    """Times and uids of the catalog's direct beams, for samples from one time to another."""

    first: float
    last: float
    beams: list[tuple[float, str]]


class DirectBeams:
    """The direct beams seen so far, and those of the catalog.

    Parameters
    ----------
    raw
        Catalog of runs (``client["raw"]``).
    config
        How to reduce and desmear.
    max_age
        A sample that names no direct beam gets none older than this, in s.
    by_hand
        Uid of the direct beam that every sample gets, whatever its run names.
    """

    def __init__(self, raw: Any, config: Config, *, max_age: float, by_hand: str | None = None):
        self._raw, self._config, self._max_age, self._by_hand = raw, config, max_age, by_hand
        self._seen: OrderedDict[str, DirectBeam] = OrderedDict()
        self._prepared: OrderedDict[tuple, PreparedExposures] = OrderedDict()
        self._listed: _Listed | None = None

    def add(self, exposure: Exposure) -> None:
        """Note an exposure of the direct beam."""
        beam = self._seen.setdefault(exposure.run_uid, DirectBeam(exposure.run_uid, exposure.time))
        if exposure.index >= len(beam.exposures):
            beam.exposures.append(exposure)

    def end(self, stop: Mapping[str, Any]) -> None:
        """Forget the direct beam of a run that had more exposures than came: the catalog has them."""
        beam = self._seen.get(stop["run_start"])
        if beam and len(beam.exposures) < (stop.get("num_events") or {}).get(beam.exposures[0].stream, 0):
            del self._seen[stop["run_start"]]

    def find(self, sample: Exposure) -> Pairing | None:
        """Find the direct beam of a sample exposure: the one its run names, else the nearest earlier one that fits.

        None where the method needs no direct beam.

        Raises
        ------
        NoDirectBeam
            If there is none; the message says why.
        BadInput
            If the sample's run recorded no geometry.
        """
        if sample.instrument is None:
            raise BadInput(sample.problem or "The run recorded no geometry.")
        if not self._config.kind.needs_direct_beam:
            return None
        if uid := self._by_hand:
            beam, how, reason = self._named(uid, sample.instrument), "by hand", "chosen by a user"
        elif uid := sample.start.get("direct_beam_uid"):
            beam, how, reason = self._named(uid, sample.instrument), "named", "named by the start document"
        else:
            beam, passed = self._nearest(sample, sample.instrument)
            how, reason = "nearest", "the nearest before the sample with the same detector, wavelength, distance and slits"
            reason += f"; {passed} nearer ones do not fit" if passed else ""
        return Pairing(beam, how, reason, sample.time - beam.time)

    def config_for(self, sample: Instrument) -> Config:
        """Return the configuration that is used for an instrument, whose wavelength spread counts where none is given."""
        return (
            self._config if self._config.wavelength_spread else replace(self._config, wavelength_spread=sample.wavelength_spread)
        )

    def prepared(self, pairing: Pairing | None, sample: Instrument) -> PreparedExposures:
        """Return what is prepared for samples exposed with an instrument, and with a direct beam if one is needed; made once.

        Raises
        ------
        BadInput
            If beam, geometry or mask cannot be used.
        """
        config = self.config_for(sample)
        poni = json.dumps(sample.poni, sort_keys=True, default=str)
        beam = (pairing.beam.run_uid, len(pairing.beam.exposures)) if pairing else None
        key = (beam, poni, sample.mask, config.wavelength_spread)
        if key not in self._prepared:
            given = _given(pairing.beam) if pairing else {"beam_frame": None}
            self._prepared[key] = prepare_exposures(poni=sample.poni, mask=_mask(sample), config=config, **given)
            while len(self._prepared) > PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def exposed(self, pairing: Pairing, sample: Instrument) -> Exposed:
        """Read what there is to prepare from: the direct beam, geometries and masks.

        Raises
        ------
        BadInput
            If the direct beam or a mask cannot be read.
        """
        return Exposed(poni=sample.poni, mask=_mask(sample), **_given(pairing.beam))

    def _named(self, uid: str, sample: Instrument) -> DirectBeam:
        beam = self._seen.get(uid) or self._fetch(uid)
        if beam is None:
            raise NoDirectBeam(
                f"The direct beam {uid} is named for this run, but the catalog does not hold it, or not to its end."
            )
        if not beam.exposures:
            raise NoDirectBeam(f"The direct beam {uid} is named for this run, but it holds no exposure.")
        reason = mismatch(sample, beam.instrument)
        if reason:
            raise NoDirectBeam(f"The direct beam {uid} does not belong to this sample: {reason}.")
        return beam

    def _nearest(self, sample: Exposure, instrument: Instrument) -> tuple[DirectBeam, int]:
        """Return the nearest direct beam that fits, and how many nearer ones do not."""
        reasons = []
        for beam in self._candidates(sample.time):
            try:
                reason = mismatch(instrument, beam.instrument)
            except BadInput as error:
                reason = str(error)
            if reason is None:
                return beam, len(reasons)
            reasons.append(f"{beam.run_uid[:8]}: {reason}")
        if not reasons:
            raise NoDirectBeam(
                f"No direct beam was exposed in the {self._max_age / 3600:.3g} hours before this sample. Run plans.direct_beam "
                "with the same slits and distance first, or name one in the start document (direct_beam_uid); for a run that is "
                "taken: dsnet-bluesky pair UID --direct-beam UID."
            )
        raise NoDirectBeam(
            f"No direct beam fits this sample ({'; '.join(reasons[:3])}). Expose one with the same slits and distance."
        )

    def _candidates(self, time: float) -> Iterable[DirectBeam]:
        """Yield direct beams before `time`, newest first: those seen, then those of the catalog."""

        def fits(beam: DirectBeam) -> bool:
            return bool(beam.exposures) and 0 <= time - beam.time <= self._max_age

        stored = self._stored(time)
        # One that was seen may still be on its way into the catalog; one of the catalog may be nearer than all that were seen.
        seen = [(beam.time, beam.run_uid) for beam in self._seen.values()]
        for _, uid in sorted({*stored, *seen}, reverse=True):
            beam = self._seen.get(uid) or self._fetch(uid)
            if beam is not None and fits(beam):
                yield beam

    def _stored(self, time: float) -> list[tuple[float, str]]:
        """Return times and uids of the catalog's direct beams before `time`, the newest `LOOK_BACK`."""
        if self._listed and self._listed.first <= time <= self._listed.last:
            return sorted((beam for beam in self._listed.beams if beam[0] <= time), reverse=True)[:LOOK_BACK]
        runs = self._beams_of_catalog().search(Key("time") <= time).sort(("start.time", -1))
        return [(run.metadata["start"]["time"], uid) for uid, run in runs.items().head(LOOK_BACK)]

    def _beams_of_catalog(self) -> Any:
        # Of one that goes on, or was cut off, nobody knows whether it is whole; it must not hide a good one before it.
        return Container.search(self._raw.search(Key("purpose") == "direct_beam"), Comparison("gt", "stop.time", 0.0))

    def list_once(self, first: float, last: float) -> None:
        """List the catalog's direct beams for samples from one time to another, and not again for each of them.

        Direct beams that come into the catalog later are seen by samples that were taken after this call only.

        Parameters
        ----------
        first, last
            Seconds since 1970.
        """
        if self._listed and self._listed.first <= first and last <= self._listed.last:
            return
        now = time.time()
        runs = self._beams_of_catalog().search(Key("time") >= first - self._max_age)
        beams = [(run.metadata["start"]["time"], uid) for uid, run in runs.items()]
        self._listed = _Listed(first, max(last, now), beams)

    def _fetch(self, uid: str) -> DirectBeam | None:
        """Read a direct beam from the catalog; None if it is not there, or has not ended there."""
        run = lookup(self._raw, uid)
        if run is None or run.metadata.get("stop") is None:
            return None
        exposures = exposures_of_documents(run.documents())
        for exposure in exposures:
            self.add(exposure)
        return self._seen.get(uid) or DirectBeam(uid, run.metadata["start"]["time"])


def _given(beam: DirectBeam) -> dict[str, Any]:
    """What `prepare_exposures` takes of a direct beam."""
    frame = beam.frame()
    mask = _mask(beam.instrument, np.zeros(frame.shape[-2:], dtype=bool))
    return {"beam_frame": frame, "beam_mask": mask, "beam_poni": beam.instrument.poni}


def _mask(instrument: Instrument, default: NDArray | None = None) -> NDArray | None:
    return load_mask(frames.path_of(instrument.mask)) if instrument.mask else default

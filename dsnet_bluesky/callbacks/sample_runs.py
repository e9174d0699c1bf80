"""Sample runs on their way to results: what every feed of exposures shares, be it documents or the catalog.

Nothing that goes wrong with an exposure is raised: it becomes a row, or a whole
result, that says what went wrong. Raised is only what says that it is too early
(`NotYet`, `CATALOG_AWAY`); whoever feeds tries such a run again later, from the
exposure at which it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import xarray as xr

from dsnet_bluesky.data import BadInput, concat_exposures
from dsnet_bluesky.derived import CLAIM_INTERVAL, AlreadyStored, LostClaim, ResultWriter
from dsnet_bluesky.documents import Exposure, Instrument, change_within, purpose, result_key, result_metadata
from dsnet_bluesky.frames import NotYet
from dsnet_bluesky.pipeline import Config, PreparedExposures

from .pairing import DirectBeams, NoDirectBeam, Pairing, summed

__all__ = ["BATCH", "CATALOG_AWAY", "KeyRefused", "SampleRuns", "Statistics", "key_refused", "reduced"]

logger = logging.getLogger(__name__)

BATCH = 32
"""Exposures that are desmeared and stored together, at most: what is behind catches up, what waits is not held up."""

RAW_PATIENCE = 5.0
"""Seconds for which a result waits until its raw run is in the catalog; a spool delivers within a fraction of one."""

STAGES = ("preparing", "reducing", "desmearing", "storing")
"""Of the work on an exposure."""

CATALOG_AWAY = (httpx.TransportError, httpx.HTTPStatusError, ConnectionError)
"""What a client raises when its server does not answer, or cannot take what it is given."""


class KeyRefused(BadInput):
    """The catalog refuses the key; unlike what Tiled's client raises, it comes back from another process."""


def key_refused(error: BaseException | None) -> KeyRefused | None:
    """Say what to do about a catalog that refuses the key, which waiting does not help; None if an error is something else."""
    if isinstance(error, KeyRefused):
        return error
    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
    if status not in (401, 403):
        return None
    return KeyRefused(
        f"The catalog refuses the key ({status}): it may not write there. Give one that may write, by --api-key or TILED_API_KEY."
    )


@dataclass
class Statistics:
    """What was done so far."""

    runs: int = 0
    """Sample runs finished, failed ones included."""

    exposures: int = 0
    """Exposures desmeared."""

    failed: int = 0
    """Exposures and runs that could not be desmeared."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Why, and how often."""

    deferred: int = 0
    """Runs done from the catalog, because the queue was full, the catalog did not answer, or their start was missed."""

    stored_before: int = 0
    """Runs whose result was there already, or is being written by another process."""

    errors: int = 0
    """Errors of this program, not of the input."""

    abandoned: list[str] = field(default_factory=list)
    """Runs that the catalog did not give back; do them later with `desmear_runs`."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Where the time went: direct beams, operators and new nodes; frames and their reduction; the method; the catalog."""

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that a block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begin


@dataclass
class _Run:
    """A sample run in progress."""

    start: Mapping[str, Any]
    detector: tuple[str, str]
    pairing: Pairing | None = None
    instrument: Instrument | None = None
    prepared: PreparedExposures | None = None
    writer: ResultWriter | None = None
    done: int = 0
    closed: bool = False


class SampleRuns:
    """Pair exposures with their direct beam, desmear them and store the results.

    Not thread-safe: one thread feeds it.

    Parameters
    ----------
    client
        Tiled client of the server's root, which holds ``/raw`` and ``/desmeared``.
    config
        How to reduce and desmear.
    beams
        Where direct beams are looked up.
    data_key
        Detector to use; the first one of a run with images if not given.
    replace_failed
        Begin results again that are there and say that they failed.

    Attributes
    ----------
    statistics : Statistics
    beams : DirectBeams
    redo : set of str
        Runs whose failed result is begun again, whatever `replace_failed` says.
    """

    def __init__(
        self,
        client: Any,
        config: Config,
        beams: DirectBeams,
        *,
        data_key: str | None = None,
        replace_failed: bool = False,
    ):
        self.statistics = Statistics()
        self.beams = beams
        self.redo: set[str] = set()
        self._client, self._config = client, config
        # Its results name the model also where they failed: one that another model failed with is another result.
        self._model = config.check()
        self._data_key, self._replace_failed = data_key, replace_failed
        self._runs: dict[str, _Run] = {}
        self._each: float | None = None

    @property
    def open(self) -> list[str]:
        """Runs that are begun and not finished."""
        return list(self._runs)

    def done(self, run_uid: str) -> int:
        """Number of exposures of a run that are stored."""
        return self._runs[run_uid].done if run_uid in self._runs else 0

    def closed(self, run_uid: str) -> bool:
        """Whether a run takes no more exposures: it failed as a whole, or another process has it."""
        return run_uid in self._runs and self._runs[run_uid].closed

    def missing(self, stop: Mapping[str, Any]) -> bool:
        """Whether a run had more exposures than are stored, as its stop document counts them: a network loses documents."""
        run = self._runs.get(stop["run_start"])
        if run is None or run.closed:
            return False
        return run.done < (stop.get("num_events") or {}).get(run.detector[0], 0)

    def add(
        self,
        exposures: Sequence[Exposure],
        *,
        patient: bool,
        deferred: str | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take exposures of one run in their order, and do with them what the run is for.

        Parameters
        ----------
        exposures
            Those that were stored already are left out; where one is missing, those after it.
        patient
            Raise where a file is not there yet; else that is the exposure's failure.
        deferred
            Why the run is done later than it could have been; recorded in its result.
        interrupted
            Asked between two batches: whether to leave the rest undone.

        Raises
        ------
        NotYet
            If a file is not there yet, or an exposure is missing; the exposures before it are stored.
        CATALOG_AWAY
            If the catalog does not answer.
        """
        first = 0
        while first < len(exposures) and not interrupted():
            several = exposures[first : first + self._at_once()]
            begin = time.monotonic()
            self._add(several, patient=patient, deferred=deferred)
            self._each = (time.monotonic() - begin) / len(several)
            first += len(several)
            self.keep_claims()

    def finish(self, run_uid: str) -> None:
        """Complete the result of a run that has stopped."""
        run = self._runs.get(run_uid)
        if run is None:
            return
        if run.writer is not None and not run.closed:
            try:
                run.writer.complete()
                logger.info("Run %s: complete with %d exposures.", run_uid, run.done)
            except LostClaim as error:  # whoever has it completes it
                logger.warning("%s", error)
        self.statistics.runs += 1
        self.redo.discard(run_uid)
        del self._runs[run_uid]

    def fail(self, start: Mapping[str, Any], error: Exception) -> None:
        """Store that a run failed as a whole, where not even its exposures could be had."""
        run = self._runs.setdefault(start["uid"], _Run(start, ("", "")))
        if run.closed:
            return
        try:
            run.writer = run.writer or self._create(run, None)
            run.writer.fail(*self._explained(error, run))
        except (AlreadyStored, LostClaim) as reason:
            logger.debug("%s", reason)
        run.closed = True
        self.statistics.failed += 1

    def drop(self, run_uid: str) -> None:
        """Forget a run and leave its result to whoever begins it again: this process, or others when this one has ended."""
        run = self._runs.pop(run_uid, None)
        if run is not None and run.writer is not None:
            run.writer.abandon()

    def release(self, run_uid: str) -> bool:
        """Give a run up, so that another process may do it at once; False where the catalog cannot be told: it is dropped."""
        run = self._runs.pop(run_uid, None)
        if run is None or run.writer is None or run.closed:
            return True
        try:
            run.writer.release()
        except LostClaim as error:
            logger.debug("%s", error)
        except CATALOG_AWAY as error:
            logger.warning("Run %s cannot be given back (%s); others find it abandoned.", run_uid, error)
            return False
        return True

    def keep_claims(self) -> None:
        """Tell other processes that results are still being written, where nothing was for a while."""
        for run in self._runs.values():
            if run.writer is None or run.closed:
                continue
            try:
                run.writer.keep_claim()
            except LostClaim as error:
                logger.warning("%s", error)
                run.closed = True
            except CATALOG_AWAY as error:
                logger.debug("The claims cannot be kept now (%s).", error)
                return

    def _at_once(self) -> int:
        """Exposures of a batch: so few that others do not take us for dead meanwhile; one, before we know how long one takes."""
        return 1 if self._each is None else int(np.clip(CLAIM_INTERVAL / max(self._each, 1e-9), 1, BATCH))

    def _add(self, exposures: Sequence[Exposure], *, patient: bool, deferred: str | None) -> None:
        wanted = [exposure for exposure in exposures if self._data_key in (None, exposure.data_key)]
        if not wanted:
            return
        what = purpose(wanted[0].start)
        if what == "direct_beam":
            for exposure in wanted:
                self.beams.add(exposure)
        elif what == "sample":
            first = wanted[0]
            run = self._runs.setdefault(first.run_uid, _Run(first.start, (first.stream, first.data_key)))
            mine = [e for e in wanted if (e.stream, e.data_key) == run.detector and e.index >= run.done]
            whole = [e for number, e in enumerate(mine, start=run.done) if e.index == number]
            if whole and not run.closed:
                self._desmear(run, whole, patient=patient, deferred=deferred)
            if len(whole) < len(mine) and not run.closed:
                raise NotYet(f"Exposure {run.done} of run {first.run_uid} is missing.")

    def _desmear(self, run: _Run, exposures: Sequence[Exposure], *, patient: bool, deferred: str | None) -> None:
        """Desmear exposures and store them, or store why not."""
        try:
            if run.writer is None:
                with self.statistics.timed("preparing"):
                    self._begin(run, exposures[0], patient, deferred)
            if not run.closed:
                self._store(run, exposures, patient)
        except AlreadyStored:
            self.statistics.stored_before += 1
            run.closed = True
        except LostClaim as error:
            logger.warning("%s", error)
            run.closed = True

    # -- the first exposure --

    def _begin(self, run: _Run, first: Exposure, patient: bool, deferred: str | None) -> None:
        """Find the direct beam, make the operator and the result's node; a run without them fails as a whole."""
        problem: Exception | None = None
        try:
            if first.instrument is None:
                raise BadInput(first.problem or "The exposure has no geometry.")
            run.instrument = first.instrument
            run.pairing = self.beams.find(first)
            run.prepared = self.beams.prepared(run.pairing, first.instrument)
        except CATALOG_AWAY:
            raise
        except Exception as error:
            if patient and isinstance(error, NotYet):
                raise
            problem = error
        run.writer = self._create(run, deferred)
        if problem is not None:
            self.statistics.failed += 1
            run.writer.fail(*self._explained(problem, run))
            run.closed = True

    def _create(self, run: _Run, deferred: str | None) -> ResultWriter:
        key, metadata = self.identity(run.start, run.instrument, run.pairing, run.prepared, deferred)
        return ResultWriter.create(
            self._client,
            key,
            metadata,
            patience=RAW_PATIENCE,
            replace_failed=self._replace_failed or run.start["uid"] in self.redo,
        )

    def identity(
        self,
        start: Mapping[str, Any],
        instrument: Instrument | None,
        pairing: Pairing | None,
        prepared: PreparedExposures | None,
        deferred: str | None,
    ) -> tuple[str, dict[str, Any]]:
        """Return the key and the metadata of the result of a run, as far as they are known before it is desmeared.

        Parameters
        ----------
        start
            Start document of the run.
        instrument, pairing, prepared
            Of its first exposure; None where it has none.
        deferred
            Why the run is done later than it could have been.
        """
        named = start.get("direct_beam_uid") if self._config.kind.needs_direct_beam else None
        beam_uid = pairing.beam.run_uid if pairing else named
        config = self.beams.config_for(instrument) if instrument else self._config
        model = prepared.model if prepared else self._model
        model_sha256 = model.sha256 if model else ""
        metadata = result_metadata(
            start,
            direct_beam_uid=beam_uid,
            pairing=pairing.to_dict() if pairing else None,
            config=config.to_dict(),
            config_sha256=config.sha256,
            method=config.method_name,
            model_name=model.name if model else "",
            model_version=model.version if model else "",
            model_sha256=model_sha256,
            deferred=deferred,
        )
        # A beam that was only named, and not found, is no part of the identity: with it, the result is another.
        return result_key(start["uid"], beam_uid if pairing else None, config.sha256, model_sha256), metadata

    # -- every exposure --

    def _store(self, run: _Run, exposures: Sequence[Exposure], patient: bool) -> None:
        """Store exposures in their order: what can be desmeared together, and each failure by itself."""
        curves: list[xr.Dataset] = []
        for exposure in exposures:
            try:
                with self.statistics.timed("reducing"):
                    curves.append(self._reduce(run, exposure))
            except Exception as error:
                self._store_curves(run, curves)
                curves = []
                if patient and isinstance(error, NotYet):
                    raise
                self._store_failure(run, error)
        self._store_curves(run, curves)

    def _reduce(self, run: _Run, exposure: Exposure) -> xr.Dataset:
        assert run.instrument is not None
        assert run.prepared is not None
        return reduced(exposure, run.instrument, run.prepared)

    def _store_curves(self, run: _Run, curves: Sequence[xr.Dataset]) -> None:
        if not curves:
            return
        assert run.prepared is not None
        assert run.writer is not None
        try:
            with self.statistics.timed("desmearing"):
                result = run.prepared.answer(concat_exposures(list(curves)))
        except Exception as error:
            if len(curves) == 1:
                self._store_failure(run, error)
                return
            for curve in curves:  # whichever it is, it fails alone
                self._store_curves(run, [curve])
            return
        with self.statistics.timed("storing"):
            run.writer.append(result)
        run.done += len(curves)
        self.statistics.exposures += len(curves)

    def _store_failure(self, run: _Run, error: Exception) -> None:
        assert run.writer is not None
        reason, _, _ = self._explained(error, run)
        run.writer.append_failure(reason)
        run.done += 1
        self.statistics.failed += 1

    def _explained(self, error: Exception, run: _Run) -> tuple[str, str, str | None]:
        """Return reason and kind of a failure, and the digest of its traceback, which is in the log."""
        found = self._explain(error, run)
        self.statistics.reasons[found[0]] += 1
        return found

    def _explain(self, error: Exception, run: _Run) -> tuple[str, str, str | None]:
        if isinstance(error, NoDirectBeam):
            return str(error), "direct_beam", None
        if isinstance(error, BadInput):
            return str(error), "input", None
        text = "".join(traceback.format_exception(error))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        logger.error("Desmearing run %s failed (traceback %s).", run.start["uid"], digest, exc_info=error)
        self.statistics.errors += 1
        reason = f"Internal error, please report it: {type(error).__name__}: {error} (traceback {digest})"
        return reason, "internal", digest


def reduced(exposure: Exposure, instrument: Instrument, prepared: PreparedExposures) -> xr.Dataset:
    """Reduce an exposure of a run that began with an instrument in a certain state.

    Raises
    ------
    BadInput
        If it cannot be read or reduced, or the instrument was changed since.
    """
    state = exposure.instrument
    if state is None:
        raise BadInput(exposure.problem or "The exposure has no geometry.")
    changed = change_within(instrument, state)
    if changed:
        raise BadInput(f"The instrument was changed within the run ({changed}); expose it in a run of its own.")
    number = (exposure.frames.stop or 1) - exposure.frames.start
    return prepared.reduce(
        summed(exposure), time=state.exposure_time * number, monitor=state.monitor, transmission=state.transmission
    )

"""From run documents to exposures, as soon as each one is complete.

Documents may come from a RunEngine in this process, from a remote dispatcher or
from a catalog (``run.documents()``), and may be of today's kind (stream
resources) or of yesterday's (resources and datums).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from bluesky_tiled_plugins.writing.consolidators import MultipartRelatedConsolidator, consolidator_factory
from bluesky_tiled_plugins.writing.tiled_writer import RunNormalizer
from event_model import DocumentRouter, RunRouter

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Exposure, Instrument, frames_per_exposure, is_image
from dsnet_bluesky.frames import FrameReference

__all__ = ["ExposureRouter", "exposures_of_documents"]


class ExposureRouter:
    """Turn run documents into exposures.

    Runs may interleave. Old resources and datums are translated as TiledWriter
    translates them, so that what is desmeared live and what is stored agree; this
    happens event by event, except for a datum that comes after its event, whose
    exposure appears when the run stops. Where documents were lost, the numbers of exposures have a gap.

    Parameters
    ----------
    on_exposure
        Called with each `documents.Exposure`. What it raises reaches the caller.

    Examples
    --------
    >>> exposures = []
    >>> router = ExposureRouter(exposures.append)
    >>> RE.subscribe(router)                                # doctest: +SKIP
    """

    def __init__(self, on_exposure: Callable[[Exposure], None]):
        self._on_exposure = on_exposure
        self._open: set[str] = set()
        self._router = RunRouter([self._new_run], filler_class=_Unfilled)  # type: ignore[arg-type]

    def __call__(self, name: str, doc: dict[str, Any]) -> None:
        """Take a document.

        Raises
        ------
        KeyError
            If the document belongs to a run whose start was not seen.
        """
        if name == "start":
            self._open.add(doc["uid"])
        elif name == "stop" and doc["run_start"] not in self._open:
            raise KeyError(f"Run {doc['run_start']} stops here, but its start was not seen.")
        self._router(name, doc)
        if name == "stop":
            self._open.discard(doc["run_start"])

    def _new_run(self, name: str, start: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        return [_NormalisedRun(self._on_exposure)], []


class _Unfilled(DocumentRouter):
    """Leaves events as they are: frames are read later, and a datum may come after its event."""

    def __init__(self, handler_registry: Any, *, root_map: Any = None, inplace: Any = None):
        super().__init__()

    def event_page(self, doc: Any) -> Any:
        return doc


def exposures_of_documents(documents: Iterator[tuple[str, dict[str, Any]]]) -> list[Exposure]:
    """Return the exposures of a finished run, for example of ``run.documents()``; of which none is lost: they are numbered on."""
    found: list[Exposure] = []
    router = ExposureRouter(found.append)
    for name, doc in documents:
        router(name, doc)
    count: Counter[tuple[str, str]] = Counter()
    numbered = []
    for exposure in found:
        detector = exposure.stream, exposure.data_key
        numbered.append(replace(exposure, index=count[detector]))
        count[detector] += 1
    return numbered


class _NormalisedRun:
    """One run: bring its documents up to date, collect its exposures, hand them on.

    The exposures are handed on here and not inside the normaliser, whose
    dispatcher would turn an exception into a warning.
    """

    def __init__(self, on_exposure: Callable[[Exposure], None]):
        self._on_exposure = on_exposure
        self._normalizer = RunNormalizer()
        self._run = _Run()
        self._normalizer.subscribe(self._run)

    def __call__(self, name: str, doc: dict[str, Any]) -> None:
        # The normaliser changes documents in place; others hold them too, and those of a catalog are frozen.
        self._normalizer(name, copy.deepcopy(dict(doc)))
        found, self._run.found = self._run.found, []
        for exposure in found:
            self._on_exposure(exposure)


@dataclass
class _File:
    """A stream resource: where its frames are, and the first index that it holds (-1: none yet)."""

    document: dict[str, Any]
    first: int = -1


class _Run(DocumentRouter):
    """Collect the exposures of one run from documents of today's kind, in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Exposure] = []
        self._start: Mapping[str, Any] = {}
        self._descriptors: dict[str, dict[str, Any]] = {}
        self._files: dict[str, _File] = {}
        self._count: Counter[tuple[str, str]] = Counter()
        self._next: dict[tuple[str, str], tuple[int, int]] = {}

    def start(self, doc: Any) -> None:
        self._start = doc

    def descriptor(self, doc: Any) -> None:
        self._descriptors[doc["uid"]] = doc

    def stream_resource(self, doc: Any) -> None:
        self._files[doc["uid"]] = _File(doc)

    def stream_datum(self, doc: Any) -> None:
        file, descriptor = self._files[doc["stream_resource"]], self._descriptors[doc["descriptor"]]
        data_key = file.document["data_key"]
        if not is_image(descriptor["data_keys"][data_key].get("shape") or ()):
            return
        if file.first < 0:
            # A later file of a run goes on counting where the one before it ended; its own frames start at 0. A sequence
            # of files is numbered as its indices are, which need not begin at 0.
            begins = file.document["parameters"].get("template") and not self._count[descriptor["name"], data_key]
            file.first = 0 if begins else doc["indices"]["start"]
        detector = descriptor["name"], data_key
        self._count[detector] += self._lost(detector, doc)
        instrument, unknown = _instrument(descriptor)
        for index in range(doc["indices"]["start"], doc["indices"]["stop"]):
            number = self._count[detector]
            self._count[detector] += 1
            frames, unreadable = _frames(file.document, descriptor, index - file.first)
            self.found.append(
                Exposure(
                    run_uid=self._start["uid"],
                    start=self._start,
                    stream=descriptor["name"],
                    data_key=data_key,
                    index=number,
                    frames=frames,
                    instrument=instrument,
                    time=float(self._start["time"]),
                    problem=unknown or unreadable,
                )
            )

    def _lost(self, detector: tuple[str, str], doc: Mapping[str, Any]) -> int:
        """How many exposures are missing before a datum: a network loses documents.

        Frames are counted from file to file, events from 1. Counts that begin anew, as after a pause, are no loss.
        """
        frames, events = doc["indices"], doc.get("seq_nums")
        frame, event = self._next.get(detector, (frames["start"], 1))
        if events is None:  # other people's documents
            events = {"start": event, "stop": event + frames["stop"] - frames["start"]}
        self._next[detector] = frames["stop"], events["stop"]
        return max(0, frames["start"] - frame, events["start"] - event)


def _instrument(descriptor: Mapping[str, Any]) -> tuple[Instrument | None, str | None]:
    try:
        return Instrument.from_configuration(descriptor.get("configuration", {})), None
    except BadInput as error:
        return None, str(error)
    except Exception as error:  # other people's documents: an exposure is never lost over them
        return None, f"The recorded configuration cannot be understood ({type(error).__name__}: {error})."


def _frames(resource: dict[str, Any], descriptor: dict[str, Any], position: int) -> tuple[FrameReference, str | None]:
    """Say where the frames of the event at `position` of a resource are, or why they cannot be read."""
    try:
        return _located(resource, descriptor, position)
    except Exception as error:  # as above
        unknown = FrameReference(str(resource.get("uri", "")), str(resource.get("mimetype", "")))
        return unknown, f"The record of the frames' file cannot be understood ({type(error).__name__}: {error})."


def _located(resource: dict[str, Any], descriptor: dict[str, Any], position: int) -> tuple[FrameReference, str | None]:
    shape, parameters = descriptor["data_keys"][resource["data_key"]]["shape"], resource["parameters"]
    number = frames_per_exposure(shape, parameters)
    if not parameters.get("template"):
        return FrameReference(resource["uri"], resource["mimetype"], parameters, position * number, (position + 1) * number), None
    layout = cast(MultipartRelatedConsolidator, consolidator_factory(resource, descriptor))
    files = layout.files_per_datum
    reference = FrameReference(layout.get_datum_uri(position * files), resource["mimetype"], parameters, 0, number)
    return reference, None if files == 1 else f"The exposure is spread over {files} files; write its frames into one."

"""From an archived run to documents that this package understands: normalised, and completed by the mapping."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from bluesky_tiled_plugins.writing.tiled_writer import RunNormalizer
from numpy.typing import NDArray
from tiled.utils import ensure_uri

import dsnet_bluesky.derived  # noqa: F401 - teaches the consolidators a MIME type
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Exposure, Instrument, frames_per_exposure, is_image, start_metadata
from dsnet_bluesky.frames import FABIO_MIMETYPE, HDF5_MIMETYPE, path_of, read
from dsnet_bluesky.ingest import configuration_of

from .instruments import Incomplete, Reader, instrument_of
from .mapping import ArchiveMapping
from .paths import NotFound, RunDocuments, fits, in_start
from .places import moved_resource, moved_stream_resource
from .sources import ArchivedRun

__all__ = ["Completed", "complete", "purpose_of"]

READABLE = (HDF5_MIMETYPE, FABIO_MIMETYPE, "multipart/related;type=image/tiff")
"""MIME types of frames that this package reads."""

Documents = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Completed:
    """An archived run as it is brought in.

    Attributes
    ----------
    documents
        Of today's kind.
    exposures
        Of the detector.
    """

    documents: Documents = field(repr=False)
    exposures: list[Exposure] = field(repr=False)

    @property
    def start(self) -> dict[str, Any]:
        """Its start document."""
        return self.documents[0][1]


def purpose_of(start: Mapping[str, Any], mapping: ArchiveMapping) -> str | None:
    """Return what a run is for: by the first rule that fits, else by what it says itself; None for neither."""
    for purpose, rules in mapping.purpose.items():
        if any(fits(start, rule) for rule in rules):
            return purpose
    said = start.get("purpose")
    with suppress(BadInput):
        return start_metadata(str(said))["purpose"]
    return None


def complete(run: ArchivedRun, purpose: str, mapping: ArchiveMapping, source: str) -> Completed:
    """Complete a run's documents.

    Parameters
    ----------
    run
        Of the archive.
    purpose
        What it is for.
    mapping
        Where things are.
    source
        Name of the archive.

    Raises
    ------
    BadInput
        If the run has not ended, holds no frames that can be read, or lacks something (`Incomplete`).
    """
    documents = _normalised(run, mapping.files.root_map)
    if documents[-1][0] != "stop":
        raise BadInput("It has no stop document: it is still going on, or was cut off.")
    key = _frames_key(documents, mapping.files.data_key)
    documents, left_out = _only(documents, key)
    _check_files(documents)
    shape = _describe_frames(documents, key)
    supplied = _complete_descriptors(documents, key, shape, purpose, mapping)
    found = _found_in(documents, key, purpose, mapping)
    _complete_start(documents[0][1], found, supplied, mapping, source, left_out)
    exposures = exposures_of_documents(iter(documents))
    if problem := next((exposure.problem for exposure in exposures if exposure.problem), None):
        raise BadInput(problem)
    if not exposures:
        raise BadInput("It holds no exposure: its plan ended before the first.")
    return Completed(documents, exposures)


def _normalised(run: ArchivedRun, root_map: Mapping[str, str]) -> Documents:
    """Bring documents up to date: resources and datums become stream resources and stream datums."""
    found: Documents = []
    normalizer = RunNormalizer(
        patches={
            "resource": lambda doc: moved_resource(doc, root_map),
            "stream_resource": lambda doc: moved_stream_resource(doc, root_map),
        }
    )
    normalizer.subscribe(lambda name, doc: found.append((str(getattr(name, "name", name)), doc)))
    for name, doc in run.documents():
        normalizer(name, doc)
    for doc in _of(found, "stream_resource"):
        doc["run_start"] = run.uid  # the normaliser drops it, a router wants it
    return found


def _of(documents: Documents, kind: str) -> Iterator[dict[str, Any]]:
    return (doc for name, doc in documents if name == kind)


def _frames_key(documents: Documents, wanted: str | None) -> str:
    """Find the data key of the frames: the one that is wanted, or the only one with images."""
    external = {
        key: (doc.get("shape") or ())
        for descriptor in _of(documents, "descriptor")
        for key, doc in descriptor["data_keys"].items()
        if "external" in doc
    }
    readable = {doc["data_key"] for doc in _of(documents, "stream_resource") if doc["mimetype"] in READABLE}
    names = ", ".join(sorted(external)) or "none"
    if wanted is not None:
        if wanted in readable:
            return wanted
        if wanted in external:
            raise BadInput(f"The frames of {wanted} are {_kinds(documents, wanted)}; HDF5 and TIFF are read.")
        raise BadInput(f"It has no frames {wanted!r} (files.data_key); data in files are: {names}.")
    images = [key for key in external if key in readable and (is_image(external[key]) or len(readable) == 1)]
    if len(images) == 1:
        return images[0]
    if images:
        raise BadInput(f"It has frames of several detectors: {', '.join(images)}; choose one in the mapping (files.data_key).")
    kinds = "; ".join(f"{key}: {_kinds(documents, key)}" for key in external)
    raise BadInput(f"It holds no frames that can be read (data in files: {kinds or 'none'}).")


def _kinds(documents: Documents, key: str) -> str:
    """Say how the files of a data key are recorded."""
    resources = [doc for doc in _of(documents, "stream_resource") if doc["data_key"] == key]
    return ", ".join(sorted({str(doc["parameters"].get("spec") or doc["mimetype"]) for doc in resources})) or "not recorded"


def _only(documents: Documents, key: str) -> tuple[Documents, list[str]]:
    """Leave out what lies in other files: it stays in the archive."""
    left_out: set[str] = set()
    mine = {doc["uid"] for doc in _of(documents, "stream_resource") if doc["data_key"] == key}
    for descriptor in _of(documents, "descriptor"):
        others = {name for name, doc in descriptor["data_keys"].items() if "external" in doc and name != key}
        left_out |= others
        descriptor["data_keys"] = {name: doc for name, doc in descriptor["data_keys"].items() if name not in others}
        descriptor["object_keys"] = {
            device: [name for name in names if name not in others] for device, names in descriptor.get("object_keys", {}).items()
        }
    for event in _of(documents, "event"):
        for part in ("data", "timestamps"):
            event[part] = {name: value for name, value in event[part].items() if name not in left_out}
    kept = [
        (name, doc)
        for name, doc in documents
        if not (name == "stream_resource" and doc["uid"] not in mine)
        and not (name == "stream_datum" and doc["stream_resource"] not in mine)
    ]
    return kept, sorted(left_out)


def _check_files(documents: Documents) -> None:
    """Refuse names that a catalog cannot refer to: it takes a URI's path as it stands."""
    for doc in _of(documents, "stream_resource"):
        path = path_of(doc["uri"])
        if path_of(ensure_uri(path)) != path:
            raise BadInput(f"The catalog cannot refer to {path}, for a character in its name; move the file (files.root_map).")


def _describe_frames(documents: Documents, key: str) -> tuple[int, int]:
    """Write shape and number type of the frames into the descriptors, as the file has them where it can be read.

    Older documents say them in other ways, or wrongly; with what is written here, the catalog gives the same frames back.
    """
    resource = next(_of(documents, "stream_resource"))
    frame = _first_frame(documents)
    for descriptor in _of(documents, "descriptor"):
        if key not in descriptor["data_keys"]:
            continue
        described = descriptor["data_keys"][key]
        shape = list(described.get("shape") or [])
        if frame is None and not is_image(shape):
            raise BadInput(
                f"The documents give the frames' shape as {shape}, which is no image's, and the file {resource['uri']} "
                "is not here to look."
            )
        number = frames_per_exposure(shape, resource["parameters"]) if is_image(shape) else 1
        size = shape if frame is None else list(frame.shape)
        described["shape"] = [number, int(size[-2]), int(size[-1])]
        described.pop("dims", None)
        if frame is not None:
            described["dtype_numpy"] = frame.dtype.str
    for doc in _of(documents, "stream_resource"):
        doc["parameters"].setdefault("chunk_shape", [1])
    return next(
        (doc["data_keys"][key]["shape"][1], doc["data_keys"][key]["shape"][2])
        for doc in _of(documents, "descriptor")
        if key in doc["data_keys"]
    )


def _first_frame(documents: Documents) -> NDArray | None:
    """Read the first frame, None where it is not here, or not whole: that is said when the run is desmeared."""
    with suppress(BadInput):
        for exposure in exposures_of_documents(iter(documents)):
            return read(replace(exposure.frames, stop=exposure.frames.start + 1))[0]
    return None


def _complete_descriptors(
    documents: Documents, key: str, shape: tuple[int, int], purpose: str, mapping: ArchiveMapping
) -> list[str]:
    """Write the state of the instrument into the descriptors of the frames; returns the keys of the mapping that did."""
    lookup = RunDocuments(documents)
    given = [name for name, _ in mapping.instrument_for(purpose).items()]
    for descriptor in _of(documents, "descriptor"):
        if key not in descriptor["data_keys"]:
            continue
        configuration = descriptor.setdefault("configuration", {})
        if not given:
            _check_complete(configuration, mapping)
            continue
        instrument = instrument_of(Reader(lookup, descriptor), mapping, purpose, shape)
        ours = configuration_of(instrument, descriptor["time"], source="dsnet_bluesky.archives")
        theirs = configuration.get("instrument") or {}
        configuration["instrument"] = {part: {**(theirs.get(part) or {}), **ours[part]} for part in ours}
    return [f"instrument.{name}" for name in given]


def _check_complete(configuration: Mapping[str, Any], mapping: ArchiveMapping) -> None:
    try:
        Instrument.from_configuration(configuration)
    except BadInput as error:
        raise Incomplete(
            [f"instrument: {mapping.name} does not say where the geometry is, and the run has none of its own"]
        ) from error


def _found_in(documents: Documents, key: str, purpose: str, mapping: ArchiveMapping) -> dict[str, Any]:
    """Read what goes into the start document; a direct beam that is not named is found as for live runs."""
    start = documents[0][1]
    reader = Reader(RunDocuments(documents), next(doc for doc in _of(documents, "descriptor") if key in doc["data_keys"]))
    found = {"purpose": purpose}
    found |= {key: reader.value(f"metadata.{key}", where) for key, where in mapping.metadata.items()}
    if mapping.sample.name is not None and purpose == "sample":
        found["sample"] = reader.value("sample.name", mapping.sample.name)
    if mapping.direct_beam.uid is not None and purpose == "sample":
        with suppress(NotFound):
            found["direct_beam_uid"] = in_start(start, mapping.direct_beam.uid)
    reader.finish()
    return {key: value for key, value in found.items() if value not in (None, "")}


def _complete_start(
    start: dict[str, Any],
    found: Mapping[str, Any],
    supplied: Sequence[str],
    mapping: ArchiveMapping,
    source: str,
    left_out: Sequence[str],
) -> None:
    """Write into the start document what was found, and a record of what was not there before."""
    new = {key: value for key, value in found.items() if start.get(key) != value}
    replaced = {key: start[key] for key in new if key in start}
    start.update(new)
    start["archive"] = {
        "source": source,
        "mapping_sha256": mapping.sha256,
        "supplied": sorted([*supplied, *(f"start.{key}" for key in new)]),
        "replaced": replaced,
        "left_out": list(left_out),
        "writer": {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()},
    }

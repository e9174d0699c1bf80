"""Real files in: detector files become Bluesky runs of their own, without being copied.

Each file is one run, whose documents refer to the file where it lies. Every frame in
it is an exposure. What cannot be used is refused before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from numpy.typing import NDArray
from tiled.utils import ensure_uri

from . import derived
from .data import BadInput
from .documents import Instrument, start_metadata
from .frames import FABIO_MIMETYPE, HDF5_MIMETYPE, FrameReference, count, read
from .reduction import integrator, load_mask, load_poni

__all__ = ["DATA_KEY", "configuration_of", "ingest"]

DATA_KEY = "image"
"""Name of the frames in the runs."""


def ingest(
    files: Sequence[str | Path],
    *,
    client: Any,
    purpose: str,
    poni: str | Path | Mapping[str, Any],
    mask: str | Path | None = None,
    sample: str | None = None,
    direct_beam: str | None = None,
    dataset: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    **state: float,
) -> list[str]:
    """Write detector files as runs into ``/raw``, and register their curves and PSFs.

    Parameters
    ----------
    files
        Anything fabio reads (EDF, CBF, TIFF ...), HDF5 or NeXus. They must stay where they are.
    client
        Tiled client of the server's root.
    purpose
        direct_beam, sample, blank or dark.
    poni
        Geometry: a .poni file, or its content.
    mask
        Mask file (anything fabio reads, or .npy; non-zero pixels do not count).
    sample
        Its name.
    direct_beam
        Uid of the direct beam that belongs to these files, or enough of its beginning.
    dataset
        Path of the frames inside HDF5 files; found by itself where there is only one that fits.
    metadata
        Further start metadata.
    **state
        Any number of `documents.Instrument`: `exposure_time` in s, `slit_width` and `slit_height`
        in m, `attenuation`, `monitor`, `transmission`, `wavelength_spread`.

    Returns
    -------
    list of str
        Uids of the runs, in the order of the files.

    Raises
    ------
    BadInput
        If a file, the geometry, the mask or the direct beam cannot be used, or the
        server cannot read the files. Nothing of that file, and of those after it, is left in the catalog;
        what can be checked without the server is checked for all files before the first is written.
    """
    instrument = _instrument(poni, mask, state)
    shape = _detector_shape(instrument)
    if mask:
        _check_mask(load_mask(mask), shape, mask)
    uid = _full_uid(client, direct_beam)
    start = start_metadata(purpose, sample=sample, direct_beam_uid=uid, plan_name="ingest", **(metadata or {}))
    described = [_describe(Path(file), shape, dataset) for file in files]
    return [_write(client, file, instrument, start) for file in described]


@dataclass(frozen=True)
class _File:
    """A file that can be used."""

    reference: FrameReference
    frames: int
    shape: tuple[int, int]
    dtype: np.dtype
    time: float


def _instrument(poni: str | Path | Mapping[str, Any], mask: str | Path | None, state: Mapping[str, float]) -> Instrument:
    unknown = set(state) - set(Instrument.__dataclass_fields__)
    if unknown:
        raise BadInput(f"An instrument has no {', '.join(sorted(unknown))}.")
    geometry = dict(poni) if isinstance(poni, Mapping) else load_poni(poni)
    uri = _uri(Path(mask).absolute()) if mask else None
    return Instrument(poni=json.loads(json.dumps(geometry, default=str)), mask=uri, **state)


def _detector_shape(instrument: Instrument) -> tuple[int, int]:
    shape = integrator(instrument.poni).detector.shape
    return int(shape[0]), int(shape[1])


def _check_mask(mask: NDArray[np.bool_], shape: tuple[int, int], path: str | Path) -> None:
    if mask.shape != shape:
        raise BadInput(
            f"The mask {path} has {' x '.join(map(str, mask.shape))} pixels, the geometry's detector {shape[0]} x {shape[1]}."
        )
    if mask.all():
        raise BadInput(f"The mask {path} leaves no pixel; check that it is not inverted (non-zero means masked).")


def _full_uid(client: Any, direct_beam: str | None) -> str | None:
    if direct_beam is None:
        return None
    try:
        run = client["raw"][direct_beam]
    except (KeyError, ValueError):  # none, or too few letters to choose one
        raise BadInput(
            f"The catalog holds no run {direct_beam}, or several that begin so; ingest the direct beam first and give its uid."
        ) from None
    start = run.metadata["start"]
    if start.get("purpose") != "direct_beam":
        raise BadInput(f"Run {direct_beam} is no direct beam: its purpose is {start.get('purpose')!r}.")
    return start["uid"]


def _describe(path: Path, shape: tuple[int, int], dataset: str | None) -> _File:
    path = path.absolute()
    if not path.is_file():
        raise BadInput(f"The file {path} does not exist.")
    uri = _uri(path)
    if h5py.is_hdf5(path):
        reference = FrameReference(uri, HDF5_MIMETYPE, {"dataset": dataset or _find_dataset(path, shape)})
    else:
        reference = FrameReference(uri, FABIO_MIMETYPE)
    number = count(reference)
    if number == 0:
        raise BadInput(f"{path.name} holds no frame.")
    # The last one: a file that is cut short lacks it.
    frame = read(FrameReference(reference.uri, reference.mimetype, reference.parameters, number - 1, number))[0]
    if frame.shape != shape:
        raise BadInput(
            f"{path.name} has {frame.shape[0]} x {frame.shape[1]} pixels; the geometry (poni) is of a detector with "
            f"{shape[0]} x {shape[1]}. Give the .poni file of this detector."
        )
    return _File(reference, number, shape, frame.dtype, path.stat().st_mtime)


def _uri(path: Path) -> str:
    """Name a file as Tiled does: it takes a URI's path as it stands, and decodes nothing."""
    special = sorted(set("%#?;") & set(str(path)))
    if special:
        raise BadInput(f"The catalog cannot refer to {path}: its name holds {' '.join(special)}. Rename it.")
    return ensure_uri(path)


def _find_dataset(path: Path, shape: tuple[int, int]) -> str:
    """Find the frames in an HDF5 file: the default NXdata's signal, else the only dataset of the detector's shape."""
    try:
        with h5py.File(path, "r") as file:
            found = _candidates(file, shape)
    except OSError as error:
        raise BadInput(f"{path.name} is truncated or damaged ({error}).") from error
    if len(found) == 1:
        return found[0]
    if not found:
        raise BadInput(f"{path.name} holds no dataset of frames with {shape[0]} x {shape[1]} pixels, the geometry's detector.")
    raise BadInput(f"{path.name} holds several datasets that may be the frames: {', '.join(found)}. Choose one (--dataset).")


def _candidates(file: h5py.File, shape: tuple[int, int]) -> list[str]:
    default = _default_signal(file)
    if default is not None and default.shape[-2:] == shape:
        return [str(default.name)]
    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 2 and item.shape[-2:] == shape and item.dtype.kind in "iuf":
            found.append(f"/{name}")

    file.visititems(visit)
    return found


def _default_signal(file: h5py.File) -> h5py.Dataset | None:
    """Follow the NeXus attributes `default` and `signal`; None where they lead nowhere."""
    group: Any = file
    for _ in range(4):
        name = group.attrs.get("signal") or group.attrs.get("default")
        group = group.get(name) if isinstance(name, str) else None
        if group is None or isinstance(group, h5py.Dataset):
            return group
    return None


def _write(client: Any, file: _File, instrument: Instrument, metadata: Mapping[str, Any]) -> str:
    """Write one run and register what is derived from it; leave nothing if that fails."""
    writer = TiledWriter(client["raw"], batch_size=1)
    documents = list(_documents(file, instrument, metadata))
    uid = documents[0][1]["uid"]
    try:
        for name, document in documents:
            writer(name, document)
        derived.register(client, client["raw"][uid])
    except BaseException:
        _remove(client, uid)
        raise
    return uid


def _remove(client: Any, uid: str) -> None:
    for mount in ("psfs", "curves", "raw"):
        if uid in client[mount]:
            client[mount].delete_contents(uid, recursive=True, external_only=False)


def _documents(file: _File, instrument: Instrument, metadata: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    run = compose_run(time=file.time, metadata=dict(metadata))
    yield "start", dict(run.start_doc)
    key = {
        "source": file.reference.uri,
        "dtype": "array",
        "dtype_numpy": file.dtype.str,
        "shape": list(file.shape),
        "external": "STREAM:",
        "object_name": "file",
    }
    stream = run.compose_descriptor(
        name="primary",
        data_keys={DATA_KEY: key},
        object_keys={"file": [DATA_KEY]},
        configuration={"instrument": configuration_of(instrument, file.time)},
        time=file.time,
    )
    yield "descriptor", dict(stream.descriptor_doc)
    parameters = {**file.reference.parameters, "chunk_shape": [1, *file.shape]}
    assert run.compose_stream_resource is not None  # event_model types it as optional
    resource = run.compose_stream_resource(
        mimetype=file.reference.mimetype, uri=file.reference.uri, data_key=DATA_KEY, parameters=parameters
    )
    yield "stream_resource", dict(resource.stream_resource_doc)
    yield (
        "stream_datum",
        dict(
            resource.compose_stream_datum(
                indices={"start": 0, "stop": file.frames},
                seq_nums={"start": 1, "stop": file.frames + 1},
                descriptor=stream.descriptor_doc,
            )
        ),
    )
    for _ in range(file.frames):
        yield "event", dict(stream.compose_event(data={}, timestamps={}, time=file.time))
    yield "stop", dict(run.compose_stop(time=file.time))


def configuration_of(instrument: Instrument, time: float, *, source: str = "dsnet_bluesky.ingest") -> dict[str, Any]:
    """Say the state of the instrument in a descriptor's configuration, as `plans.Instrument` does.

    Parameters
    ----------
    instrument
        The state.
    time
        When, in s since 1970.
    source
        Who says so.
    """
    values = {f"instrument-{name}": value for name, value in instrument.to_configuration().items() if value is not None}
    return {
        "data": values,
        "timestamps": dict.fromkeys(values, time),
        "data_keys": {
            key: {"source": source, "dtype": "string" if isinstance(value, str) else "number", "shape": []}
            for key, value in values.items()
        },
    }

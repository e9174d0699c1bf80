"""What the server reads on demand: curves, PSFs, and frames that Tiled does not know.

A node of ``/curves`` or ``/psfs`` stores nothing but
where the raw frames are and how the instrument stood (`derived.register_curves`);
the curve is computed when somebody reads it, and kept while the file stays as it
is. While a detector still writes, a node shows the exposures that are complete.

Bad data is answered with status 422 and a text that says what is wrong. Whoever may
register a node says what is in its data source, so nothing there is trusted: files
are read only below the server's readable_storage, links followed; a geometry names
no files; sizes are checked before anything is read.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import xarray as xr
from cachetools import LRUCache, cached
from numpy.typing import NDArray
from pyFAI.detectors import ALL_DETECTORS
from tiled.adapters.sequence import FileSequenceAdapter
from tiled.adapters.xarray import DatasetAdapter

from dsnet_bluesky.data import BadInput, concat_exposures
from dsnet_bluesky.documents import Instrument
from dsnet_bluesky.frames import FABIO_MIMETYPE, FrameReference, count, path_of, read, shape_of
from dsnet_bluesky.nodes import MASK
from dsnet_bluesky.reduction import Reduction, integrator, load_mask, psf, sum_frames

from .serving import MOST_EXPOSURES, DerivedAdapter, confined, explained

__all__ = ["CurveAdapter", "FabioAdapter", "PSFAdapter"]

FRAMES_AT_ONCE = 32
"""Frames that are read together: a Pilatus 1M takes 4 MB each."""

MOST_PIXELS = 2**25
"""Of a detector; the largest have 18 million."""

PARAMETERS = ("frames", "instrument")
"""Of the data sources that `derived.register_curves` and `derived.register_psf` make."""

FRAME_PARAMETERS = ("mimetype", "parameters", "per_exposure")

FILE_WORDS = frozenset({"filename", "splinefile", "nexus_file", "flat", "dark", "mask"})
"""Keys of a geometry under which pyFAI would open files."""

Values = Mapping[str, Any]


class CurveAdapter(DerivedAdapter):
    """The curves of a run, reduced from its frames: I and Idev, dims (exposure, q)."""

    @classmethod
    def from_catalog(cls, data_source: Any, node: Any, /, **parameters: Any) -> DatasetAdapter:
        """Build the adapter of a node that `derived.register_curves` made.

        Parameters
        ----------
        data_source, node
            Of Tiled's catalog.
        **parameters
            `frames`: `mimetype` and `parameters` of the raw frames, and how many of them are an exposure
            (`per_exposure`). `instrument`: values of `documents.Instrument`.

        Raises
        ------
        fastapi.HTTPException
            With status 422 if the frames cannot be read or reduced.
        """
        with explained():
            return cls.of_node(node, _curves(*_read_data_source(data_source, parameters)))


class PSFAdapter(DerivedAdapter):
    """The PSF measured in a direct-beam run, see `reduction.psf`; its attributes are served as scalar variables."""

    @classmethod
    def from_catalog(cls, data_source: Any, node: Any, /, **parameters: Any) -> DatasetAdapter:
        """Build the adapter of a node that `derived.register_psf` made; see `CurveAdapter.from_catalog`."""
        with explained():
            return cls.of_node(node, _psf(*_read_data_source(data_source, parameters)))


class FabioAdapter(FileSequenceAdapter):
    """Frames in files that fabio reads (EDF, CBF, TIFF ...): one file with all of them, or a sequence with one each."""

    @classmethod
    def from_catalog(cls, data_source: Any, node: Any, /, **parameters: Any) -> Self:
        """Build the adapter of raw frames that TiledWriter registered; what it recorded of the files' names is not needed."""
        uris = {name: value for name, value in parameters.items() if name == "data_uris" and not isinstance(value, str)}
        with explained():
            return super().from_catalog(data_source, node, **uris)  # pyright: ignore[reportReturnType]

    def _read_one(self, filepath: Any) -> NDArray:
        with explained():
            uri = filepath.as_uri()
            confined(uri)
            stack = read(FrameReference(uri, FABIO_MIMETYPE))
        return stack[0] if len(self.filepaths) > 1 or len(stack) == 1 else stack

    def _load_from_files(self, slice: builtins.slice | int | Iterable[int] = slice(None)) -> NDArray:
        if isinstance(slice, int):
            paths = [self.filepaths[slice]]
        elif isinstance(slice, builtins.slice):
            paths = self.filepaths[slice]
        else:
            paths = [self.filepaths[number] for number in slice]
        return np.stack(self._map_read(paths))


# -- what a node says, as values that can be the key of a cache --


class File(NamedTuple):
    """A file as it was at one moment; another size or time of change is another file."""

    uri: str
    changed: int
    size: int

    @classmethod
    def now(cls, uri: str) -> Self:
        """Look at the file.

        Raises
        ------
        BadInput
            If it is not there.
        """
        path = confined(uri)
        try:
            status = os.stat(path)
        except OSError as error:
            raise BadInput(f"The server cannot see {path} ({error.strerror}).") from None
        return cls(uri, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class Recipe:
    """How the frames of a run become curves."""

    mimetype: str
    parameters: str
    per_exposure: int
    poni: str
    mask: File | None
    time: float
    monitor: float
    transmission: float

    def reference(self, file: File, start: int = 0, stop: int | None = None) -> FrameReference:
        """Say where frames [start, stop) of a file are."""
        return FrameReference(file.uri, self.mimetype, json.loads(self.parameters), start, stop)


def _read_data_source(data_source: Any, parameters: Values) -> tuple[list[File], Recipe]:
    frames, values = (_mapping(parameters.get(name), name) for name in PARAMETERS)
    if odd := {*parameters} - {*PARAMETERS} | {*frames} - {*FRAME_PARAMETERS}:
        raise BadInput(f"The node's data source has parameters that are not known here: {', '.join(sorted(odd))}.")
    instrument = Instrument.from_configuration({"instrument": {"data": {**values, "mask": None}}})
    _check_geometry(instrument.poni)
    per_exposure = frames.get("per_exposure")
    if isinstance(per_exposure, bool) or not isinstance(per_exposure, int) or per_exposure < 1:
        raise BadInput(f"per_exposure is the number of frames of an exposure, 1 or more; the data source says {per_exposure!r}.")
    masks, files = ([asset.data_uri for asset in data_source.assets if asset.parameter == kind] for kind in (MASK, "data_uris"))
    if len(masks) > 1 or len(masks) + len(files) != len(data_source.assets):
        raise BadInput(f"The assets of a node are the files of its frames (data_uris) and at most one {MASK}.")
    recipe = Recipe(
        mimetype=_text(frames.get("mimetype"), "mimetype"),
        parameters=json.dumps(_frame_parameters(frames.get("parameters")), sort_keys=True),
        per_exposure=per_exposure,
        poni=json.dumps(instrument.poni, sort_keys=True),
        mask=File.now(masks[0]) if masks else None,
        time=instrument.exposure_time * per_exposure,
        monitor=instrument.monitor,
        transmission=instrument.transmission,
    )
    return [File.now(uri) for uri in files], recipe


def _mapping(value: Any, name: str) -> Values:
    if not isinstance(value, Mapping):
        raise BadInput(f"The node's data source lacks {name}; register its run again.")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise BadInput(f"The {name} of the frames is a text; the data source says {str(value)[:60]!r}.")
    return value


def _frame_parameters(value: Any) -> dict[str, str]:
    """Return what reading needs of the stream resource's parameters."""
    given = _mapping({} if value is None else value, "the parameters of the frames")
    return {"dataset": _text(given["dataset"], "dataset")} if given.get("dataset") is not None else {}


def _check_geometry(poni: Values) -> None:
    """Refuse a geometry that would make pyFAI open a file, or fill the memory."""
    detector, config = str(poni.get("detector", "Detector")), poni.get("detector_config") or {}
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            raise BadInput("The geometry (poni) has a detector_config that is not JSON.") from None
    names = {detector.lower(), detector.lower().replace(" ", "_")}
    if not names & {*ALL_DETECTORS, "detector"} or "nexusdetector" in names or "poni" in poni:
        raise BadInput(f"The geometry (poni) names the detector {detector[:60]!r}; a server takes one that pyFAI knows by name.")
    words = {str(key).lower(): value for part in (poni, _mapping(config, "detector_config")) for key, value in part.items()}
    if odd := sorted(word for word in FILE_WORDS & {*words} if words[word] not in (None, "", "None", "none")):
        raise BadInput(f"The geometry (poni) names files ({', '.join(odd)}); a server opens none for it.")
    shape = words.get("max_shape")
    if shape is not None and not (_is_shape(shape) and math.prod(shape) <= MOST_PIXELS):
        raise BadInput(f"The geometry (poni) has a detector of {str(shape)[:60]} pixels; at most {MOST_PIXELS} can be served.")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


# -- the work, each piece done once --


@cached(LRUCache(8), condition=threading.Condition())
def _mask(file: File) -> NDArray[np.bool_]:
    path = confined(file.uri)
    shape = np.load(path, mmap_mode="r").shape if path.suffix == ".npy" else shape_of(FrameReference(file.uri, FABIO_MIMETYPE))
    if math.prod(shape) > MOST_PIXELS:
        raise BadInput(
            f"The mask {path.name} says that it has {' x '.join(map(str, shape))} pixels; at most {MOST_PIXELS} are read."
        )
    return load_mask(path)


@cached(LRUCache(8), condition=threading.Condition())
def _reduction(poni: str, mask: File | None) -> Reduction:
    return Reduction(json.loads(poni), mask=_mask(mask) if mask else None)


@cached(LRUCache(256), condition=threading.Condition())
def _curves_of_file(file: File, recipe: Recipe) -> xr.Dataset | None:
    """Reduce the exposures that a file holds; None while it holds none."""
    reduction = _reduction(recipe.poni, recipe.mask)
    _check_frames(file, recipe, reduction.mask.shape)
    exposures = count(recipe.reference(file)) // recipe.per_exposure
    if exposures > MOST_EXPOSURES:
        raise BadInput(f"{path_of(file.uri).name} says that it holds {exposures} exposures; at most {MOST_EXPOSURES} are served.")
    step = max(1, FRAMES_AT_ONCE // recipe.per_exposure)
    parts = []
    for first in range(0, exposures, step):
        last = min(first + step, exposures)
        stack = read(recipe.reference(file, first * recipe.per_exposure, last * recipe.per_exposure))
        frames = sum_frames(stack, recipe.per_exposure, str(reduction.poni.get("detector", "")))
        parts.append(reduction(frames, time=recipe.time, monitor=recipe.monitor, transmission=recipe.transmission))
    return concat_exposures(parts) if parts else None


def _check_frames(file: File, recipe: Recipe, detector: tuple[int, ...]) -> None:
    """Refuse frames of another size than the detector's before reading them."""
    if (shape := shape_of(recipe.reference(file))) != detector:
        raise BadInput(
            f"The frames have {shape[0]} x {shape[1]} pixels; the geometry (poni) is of a detector with "
            f"{detector[0]} x {detector[1]}. Give the poni of this detector."
        )


def _curves(files: list[File], recipe: Recipe) -> xr.Dataset:
    parts = [part for part in (_curves_of_file(file, recipe) for file in files) if part is not None]
    if not parts:
        raise BadInput("The run holds no complete exposure yet.")
    return concat_exposures(parts)


@cached(LRUCache(64), condition=threading.Condition(), key=lambda files, recipe: (*files, recipe))
def _psf(files: list[File], recipe: Recipe) -> xr.Dataset:
    detector = tuple(integrator(json.loads(recipe.poni)).detector.shape)
    for file in files:
        _check_frames(file, recipe, detector)
    if not files:
        raise BadInput("The run holds no frame yet.")
    stack = np.concatenate([read(recipe.reference(file)) for file in files])
    measured = psf(stack, json.loads(recipe.poni), mask=_mask(recipe.mask) if recipe.mask else None)
    # Tiled serves a Dataset's attributes as they were at registration, when nothing was computed yet.
    return measured.assign({name: ((), value) for name, value in measured.attrs.items()})

"""What the server reads on demand: curves, PSFs, and frames that Tiled does not know.

Tiled finds these classes by MIME type (``adapters_by_mimetype`` in
``tiled_config/embedded.yml``). A node of ``/curves`` or ``/psfs`` stores nothing but
where the raw frames are and how the instrument stood (`derived.register_curves`);
the curve is computed when somebody reads it, and kept while the file stays as it
is. While a detector still writes, a node shows the exposures that are complete.

Bad data is answered with status 422 and a text that says what is wrong.
"""

from __future__ import annotations

import builtins
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import xarray as xr
from cachetools import LRUCache, cached
from fastapi import HTTPException
from numpy.typing import NDArray
from tiled.adapters.sequence import FileSequenceAdapter
from tiled.adapters.xarray import DatasetAdapter
from tiled.structures.core import Spec

from .data import BadInput, concat_exposures
from .documents import Instrument
from .frames import FABIO_MIMETYPE, FrameReference, count, path_of, read
from .reduction import Reduction, load_mask, psf, sum_frames

__all__ = ["CURVE_MIMETYPE", "MASK", "PSF_MIMETYPE", "CurveAdapter", "FabioAdapter", "PSFAdapter"]

CURVE_MIMETYPE = "application/x-dsnet-curve"
PSF_MIMETYPE = "application/x-dsnet-psf"

MASK = "mask"
"""Parameter under which a node's assets hold the mask file."""

FRAMES_AT_ONCE = 32
"""Frames that are read together: a Pilatus 1M takes 4 MB each."""

UNPROCESSABLE = 422

Values = Mapping[str, Any]


class CurveAdapter(DatasetAdapter):
    """The curves of a run, reduced from its frames: I and Idev, dims (exposure, q)."""

    @classmethod
    def from_catalog(
        cls, data_source: Any, node: Any, /, *, frames: Mapping[str, Any], instrument: Mapping[str, Any]
    ) -> DatasetAdapter:
        """Build the adapter of a node that `derived.register_curves` made.

        Parameters
        ----------
        data_source, node
            Of Tiled's catalog.
        frames
            `mimetype` and `parameters` of the raw frames, and how many of them are an exposure (`per_exposure`).
        instrument
            Values of `documents.Instrument`.

        Raises
        ------
        fastapi.HTTPException
            With status 422 if the frames cannot be read or reduced.
        """
        with _explained():
            files, recipe = _read_data_source(data_source, frames, instrument)
            dataset = _curves(files, recipe)
        return cls.from_dataset(dataset, specs=_specs(node))


class PSFAdapter(DatasetAdapter):
    """The PSF measured in a direct-beam run, see `reduction.psf`; its attributes are served as scalar variables."""

    @classmethod
    def from_catalog(
        cls, data_source: Any, node: Any, /, *, frames: Mapping[str, Any], instrument: Mapping[str, Any]
    ) -> DatasetAdapter:
        """Build the adapter of a node that `derived.register_psf` made; see `CurveAdapter.from_catalog`."""
        with _explained():
            dataset = _psf(*_read_data_source(data_source, frames, instrument))
        return cls.from_dataset(dataset, specs=_specs(node))


class FabioAdapter(FileSequenceAdapter):
    """Frames in files that fabio reads (EDF, CBF, TIFF ...): one file with all of them, or a sequence with one each."""

    def _read_one(self, filepath: Any) -> NDArray:
        with _explained():
            stack = read(FrameReference(filepath.as_uri(), FABIO_MIMETYPE))
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
        try:
            status = os.stat(path_of(uri))
        except OSError as error:
            raise BadInput(f"The server cannot see {path_of(uri)} ({error.strerror}).") from None
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


def _read_data_source(data_source: Any, frames: Values, values: Values) -> tuple[list[File], Recipe]:
    instrument = Instrument(**{**values, "poni": json.loads(values["poni"]), "mask": None})
    assets = {kind: [a.data_uri for a in data_source.assets if (a.parameter == MASK) == (kind == MASK)] for kind in (MASK, "")}
    recipe = Recipe(
        mimetype=frames["mimetype"],
        parameters=json.dumps(frames["parameters"], sort_keys=True),
        per_exposure=frames["per_exposure"],
        poni=json.dumps(instrument.poni, sort_keys=True),
        mask=File.now(assets[MASK][0]) if assets[MASK] else None,
        time=instrument.exposure_time * frames["per_exposure"],
        monitor=instrument.monitor,
        transmission=instrument.transmission,
    )
    return [File.now(uri) for uri in assets[""]], recipe


# -- the work, each piece done once --


@cached(LRUCache(8), condition=threading.Condition())
def _mask(file: File) -> NDArray[np.bool_]:
    return load_mask(path_of(file.uri))


@cached(LRUCache(8), condition=threading.Condition())
def _reduction(poni: str, mask: File | None) -> Reduction:
    return Reduction(json.loads(poni), mask=_mask(mask) if mask else None)


@cached(LRUCache(256), condition=threading.Condition())
def _curves_of_file(file: File, recipe: Recipe) -> xr.Dataset | None:
    """Reduce the exposures that a file holds; None while it holds none."""
    reduction = _reduction(recipe.poni, recipe.mask)
    exposures = count(recipe.reference(file)) // recipe.per_exposure
    step = max(1, FRAMES_AT_ONCE // recipe.per_exposure)
    parts = []
    for first in range(0, exposures, step):
        last = min(first + step, exposures)
        stack = read(recipe.reference(file, first * recipe.per_exposure, last * recipe.per_exposure))
        frames = sum_frames(stack, recipe.per_exposure, str(reduction.poni.get("detector", "")))
        parts.append(reduction(frames, time=recipe.time, monitor=recipe.monitor, transmission=recipe.transmission))
    return concat_exposures(parts) if parts else None


def _curves(files: list[File], recipe: Recipe) -> xr.Dataset:
    parts = [part for part in (_curves_of_file(file, recipe) for file in files) if part is not None]
    if not parts:
        raise BadInput("The run holds no complete exposure yet.")
    return concat_exposures(parts)


@cached(LRUCache(64), condition=threading.Condition(), key=lambda files, recipe: (*files, recipe))
def _psf(files: list[File], recipe: Recipe) -> xr.Dataset:
    stack = np.concatenate([read(recipe.reference(file)) for file in files])
    measured = psf(stack, json.loads(recipe.poni), mask=_mask(recipe.mask) if recipe.mask else None)
    # Tiled serves a Dataset's attributes as they were at registration, when nothing was computed yet.
    return measured.assign({name: ((), value) for name, value in measured.attrs.items()})


@contextmanager
def _explained() -> Iterator[None]:
    """Answer a request with what is wrong with the data, instead of a bare "internal server error"."""
    try:
        yield
    except BadInput as error:
        raise HTTPException(UNPROCESSABLE, str(error)) from error


def _specs(node: Any) -> list[Spec]:
    return [spec if isinstance(spec, Spec) else Spec(**spec) for spec in node.specs]

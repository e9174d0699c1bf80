"""A beamline of yesterday: an area detector that writes resources and datums, and databroker's MongoDB behind the RunEngine."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bluesky.plans as bp
import h5py
import numpy as np
import tifffile
from bluesky import RunEngine
from bluesky.preprocessors import SupplementalData
from databroker.mongo_normalized import MongoAdapter
from ophyd_async.core import completed_status, soft_signal_rw
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky.sim import SAMPLES, SaxsCamera, Setting

BEAMSTOP = 2.8e-3


class OldAreaDetector:
    """As ophyd's area detectors behave, reduced to what a RunEngine asks of them.

    Parameters
    ----------
    spec
        AD_HDF5, AD_TIFF, or one that nobody reads.
    """

    name, parent, hints = "pil", None, {"fields": ["pil_image"]}

    def __init__(self, folder: Path, camera: SaxsCamera, *, root: str = "/", spec: str = "AD_HDF5"):
        self.folder, self.camera, self.root, self.spec = folder, camera, root, spec
        self.setting, self.seconds = Setting(None, 4e-3, 2.5e-3), 60.0
        self.shape: list[int] = list(camera.shape)
        self.stages_per_point = False
        self._docs: list[tuple[str, Any]] = []

    def stage(self) -> list[Any]:
        self._open()
        return [self]

    def _open(self) -> None:
        name = f"scan_{str(uuid.uuid4())[:8]}"
        tiff = self.spec == "AD_TIFF"
        # ophyd's paths have no "/" at the end, and are relative to the root.
        path = self.folder if tiff else self.folder / f"{name}.h5"
        kwargs = {"template": "%s%s_%6.6d.tiff", "filename": name} if tiff else {}
        self._resource = str(uuid.uuid4())
        self._docs = [
            (
                "resource",
                {
                    "uid": self._resource,
                    "spec": self.spec,
                    "root": self.root,
                    "resource_path": str(path.relative_to(self.root)),
                    "resource_kwargs": {**kwargs, "frame_per_point": 1},
                    "path_semantics": "posix",
                },
            )
        ]
        self._path, self._name, self._points = path, name, itertools.count()

    def unstage(self) -> list[Any]:
        return [self]

    def trigger(self) -> Any:
        if self.stages_per_point:
            self._open()
        point = next(self._points)
        frame = self.camera.frame(self.setting, self.seconds).astype(np.int32)
        if self.spec == "AD_TIFF":
            tifffile.imwrite(self._path / f"{self._name}_{point:06d}.tiff", frame)
        else:
            with h5py.File(self._path, "a") as file:
                if point == 0:
                    file.create_dataset("entry/data/data", (0, *frame.shape), np.int32, maxshape=(None, *frame.shape))
                file["entry/data/data"].resize(point + 1, axis=0)
                file["entry/data/data"][point] = frame
        self._datum = f"{self._resource}/{point}"
        doc = {"resource": self._resource, "datum_id": self._datum, "datum_kwargs": {"point_number": point}}
        self._docs.append(("datum", doc))
        return completed_status()

    def collect_asset_docs(self) -> Iterator[tuple[str, Any]]:
        docs, self._docs = self._docs, []
        yield from docs

    def read(self) -> dict[str, Any]:
        return OrderedDict(pil_image={"value": self._datum, "timestamp": time.time()})

    def describe(self) -> dict[str, Any]:
        return OrderedDict(pil_image={"source": "PV:pil", "dtype": "array", "shape": self.shape, "external": "FILESTORE:"})

    def read_configuration(self) -> dict[str, Any]:
        return OrderedDict(pil_cam_acquire_time={"value": self.seconds, "timestamp": time.time()})

    def describe_configuration(self) -> dict[str, Any]:
        return OrderedDict(pil_cam_acquire_time={"source": "PV:time", "dtype": "number", "shape": [], "units": "s"})


class Ring:
    """The current of a storage ring, read with each frame."""

    name, parent = "ring", None

    def __init__(self) -> None:
        self.readings: Iterator[float] = itertools.repeat(500.0)

    def read(self) -> dict[str, Any]:
        return OrderedDict(ring={"value": next(self.readings), "timestamp": time.time()})

    def describe(self) -> dict[str, Any]:
        return OrderedDict(ring={"source": "PV:ring", "dtype": "number", "shape": [], "units": "mA"})

    def read_configuration(self) -> dict[str, Any]:
        return OrderedDict()

    describe_configuration = read_configuration


class OldBeamline:
    """A RunEngine that writes into a MongoDB (mongomock) as databroker does, and what it scans.

    Its documents say, in the beamline's own words, what a mapping must translate: `SDD` in mm, `energy_energy` in eV in the
    baseline, `sample_name`, and `scan_type` for what a run is for.
    """

    def __init__(self, folder: Path, **detector: Any):
        self.folder = folder
        self.camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self.detector = OldAreaDetector(folder, self.camera, **detector)
        self.ring = Ring()
        self.adapter = MongoAdapter.from_mongomock()
        np.save(folder / "mask.npy", self.camera.mask(BEAMSTOP))
        self.engine = RunEngine({})
        self.energy = soft_signal_rw(float, 1.2398419843320026e-6 / self.camera.wavelength, units="eV", name="energy_energy")
        self.engine.preprocessors.append(SupplementalData(baseline=[self.energy]))
        self.engine.subscribe(self._insert)
        self.engine(ensure_connected(self.energy))

    def _insert(self, name: str, doc: Any) -> None:
        self.adapter.get_serializer()(name, doc)

    def close(self) -> None:
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)
        self.engine._th.join()
        self.engine.loop.close()

    def beam(self, **md: Any) -> str:
        self.detector.setting = Setting(None, slit_width=4e-3, slit_height=2.5e-3, attenuation=5000.0)
        return self._count(1, sample_name="empty", scan_type="empty", att_factor=5000.0, **md)

    def sample(self, name: str = "AgBh", num: int = 1, **md: Any) -> str:
        self.detector.setting = Setting(SAMPLES[name], slit_width=4e-3, slit_height=2.5e-3, beamstop=BEAMSTOP)
        return self._count(num, sample_name=name, scan_type="measure", **md)

    def align(self) -> str:
        """A run without frames, of no purpose here."""
        return self.engine(bp.count([self.energy]), scan_type="align")[0]

    def _count(self, num: int, **md: Any) -> str:
        y, x = self.camera.centre
        md = {"SDD": self.camera.distance * 1e3, "beam_centre": [x, y], "slit_h": 2.5, "slit_w": 4.0, **md}
        return self.engine(bp.count([self.detector, self.ring], num=num), **md)[0]

    def files_of(self, uid: str) -> list[Path]:
        """The detector files of a run, by the handlers' rule."""
        found = []
        for name, doc in self.adapter[uid].documents(fill=False):
            if name == "resource":
                path = Path(doc["root"]) / doc["resource_path"]
                kwargs = doc["resource_kwargs"]
                found += sorted(path.glob(f"{kwargs['filename']}_*")) if "filename" in kwargs else [path]
        return found

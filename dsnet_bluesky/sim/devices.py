"""ophyd-async devices of the simulated beamline.

The detector is a `StandardDetector` composed of the three logics that a real
one has; it writes HDF5 that others may read while it is written (SWMR).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray
from ophyd_async.core import (
    DetectorAcquireLogic,
    DetectorDataLogic,
    DetectorTriggerLogic,
    Device,
    PathProvider,
    StandardDetector,
    StandardReadable,
    StaticPathProvider,
    StreamResourceDataProvider,
    StreamResourceInfo,
    TriggerInfo,
    UUIDFilenameProvider,
    soft_signal_r_and_setter,
    soft_signal_rw,
)
from ophyd_async.core import StandardReadableFormat as Format

from .camera import SaxsCamera, Setting
from .samples import SAMPLES, Sample

__all__ = ["Attenuator", "Beamstop", "SampleChanger", "SimBeamline", "SimSaxsDetector", "Slits"]

DATASET = "/entry/data/data"


class Slits(StandardReadable):
    """Slits that define the beam; openings in m."""

    def __init__(self, width: float = 4e-3, height: float = 2.5e-3, name: str = ""):
        with self.add_children_as_readables(Format.CONFIG_SIGNAL):
            self.width = soft_signal_rw(float, width, units="m")
            self.height = soft_signal_rw(float, height, units="m")
        super().__init__(name=name)


class SampleChanger(StandardReadable):
    """A sample changer with capillaries of 2 mm: the name of the sample, and x across its capillary in mm."""

    radius = 1.0
    """Of the capillaries, in mm."""

    def __init__(self, name: str = ""):
        with self.add_children_as_readables(Format.HINTED_SIGNAL):
            self.x = soft_signal_rw(float, 0.0, units="mm")
        with self.add_children_as_readables(Format.CONFIG_SIGNAL):
            self.sample = soft_signal_rw(str, "")
        super().__init__(name=name)

    @classmethod
    def thickness_at(cls, x: float) -> float:
        """Path of the beam through the capillary at x, relative to its diameter."""
        return float(np.sqrt(max(0.0, 1 - (x / cls.radius) ** 2)))

    async def thickness(self) -> float:
        """Path of the beam through the capillary where it stands."""
        return self.thickness_at(await self.x.get_value())


class Attenuator(StandardReadable):
    """A calibrated attenuator: the factor by which it weakens the beam, 1 for none."""

    def __init__(self, name: str = ""):
        with self.add_children_as_readables(Format.CONFIG_SIGNAL):
            self.factor = soft_signal_rw(float, 1.0)
        super().__init__(name=name)


class Beamstop(StandardReadable):
    """A round beamstop on an arm; radius in m, 0 when it is out of the beam."""

    def __init__(self, name: str = ""):
        with self.add_children_as_readables(Format.CONFIG_SIGNAL):
            self.radius = soft_signal_rw(float, 0.0, units="m")
        super().__init__(name=name)


class Camera(Protocol):
    """The physics behind a detector."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    @property
    def poni(self) -> dict[str, Any]:
        """Geometry as pyFAI writes it."""
        ...

    def frame(self, setting: Any, time: float) -> NDArray:
        """One exposure of `time` seconds: int32 counts (y, x)."""
        ...


class FrameSource:
    """Takes frames from the camera, with the settings of the moment, into an open HDF5 file.

    Parameters
    ----------
    camera
        The physics.
    setting
        Called before each acquisition; answers what the devices stand at, as the camera wants it.
    realtime
        Sleep for the exposure time. Simulated exposures are instant otherwise.
    """

    def __init__(self, camera: Camera, setting: Callable[[], Awaitable[Any]], *, realtime: bool = False):
        self.camera, self.setting, self.realtime = camera, setting, realtime
        self.time = 1.0
        self.number = 1
        self.written, self._set_written = soft_signal_r_and_setter(int)
        self._file: h5py.File | None = None

    def open(self, path: Path) -> None:
        """Create the file, chunked by frame, and let readers in."""
        self._file = h5py.File(path, "w", libver="latest")
        self._file.create_dataset(
            DATASET,
            shape=(0, *self.camera.shape),
            maxshape=(None, *self.camera.shape),
            chunks=(1, *self.camera.shape),
            dtype=np.int32,
            **hdf5plugin.Bitshuffle(cname="lz4"),
        )
        self._file.swmr_mode = True
        self._set_written(0)

    def close(self) -> None:
        """Close the file, if one is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def acquire(self, setting: Any) -> None:
        """Take the frames that were asked for, one after another."""
        for _ in range(self.number):
            if self.realtime:
                await asyncio.sleep(self.time)
            frame = await asyncio.to_thread(self.camera.frame, setting, self.time)
            self._append(frame)

    def _append(self, frame: NDArray) -> None:
        if self._file is None:
            raise RuntimeError("The detector was triggered without a file; prepare it first.")
        dataset = self._file[DATASET]
        assert isinstance(dataset, h5py.Dataset)
        count = len(dataset) + 1
        dataset.resize(count, axis=0)
        dataset[-1] = frame
        dataset.flush()
        self._set_written(count)


class TriggerLogic(DetectorTriggerLogic):
    """Internally timed exposures."""

    def __init__(self, source: FrameSource):
        self.source = source

    async def prepare_internal(self, num: int, livetime: float, deadtime: float) -> None:
        """Set the number of frames and, where given, the exposure time."""
        self.source.number = num
        self.source.time = livetime or self.source.time

    async def default_trigger_info(self) -> TriggerInfo:
        """One exposure as long as the last."""
        return TriggerInfo(livetime=self.source.time)


class AcquireLogic(DetectorAcquireLogic):
    """Acquisition as a task of the event loop."""

    def __init__(self, source: FrameSource):
        self.source = source
        self._task: asyncio.Task | None = None

    async def start_acquiring(self) -> None:
        """Start taking frames; raises at once where the devices stand at something impossible."""
        setting = await self.source.setting()
        self._task = asyncio.create_task(self.source.acquire(setting))

    async def wait_for_idle(self) -> None:
        """Wait for the last frame; raises what the acquisition raised."""
        if self._task:
            await self._task

    async def ensure_stopped(self) -> None:
        """Abandon the frames that were not taken yet."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None


class DataLogic(DetectorDataLogic):
    """One HDF5 file for each stage of the detector."""

    def __init__(self, source: FrameSource, path_provider: PathProvider):
        self.source, self.path_provider = source, path_provider

    async def prepare_unbounded(self, datakey_name: str) -> StreamResourceDataProvider:
        """Open a file and say how its frames are found."""
        path = self.path_provider(datakey_name)
        self.source.open(Path(path.directory_path) / f"{path.filename}.h5")
        shape = self.source.camera.shape
        info = StreamResourceInfo(
            data_key=datakey_name,
            shape=shape,
            chunk_shape=(1, *shape),
            dtype_numpy=np.dtype(np.int32).str,
            parameters={"dataset": DATASET},
        )
        return StreamResourceDataProvider(
            uri=f"{path.directory_uri}{path.filename}.h5",
            resources=[info],
            mimetype="application/x-hdf5",
            collections_written_signal=self.source.written,
        )

    async def stop(self) -> None:
        """Close the file."""
        self.source.close()

    def get_hinted_fields(self, datakey_name: str) -> Sequence[str]:
        """Hint at the frames."""
        return [datakey_name]


class SimSaxsDetector(StandardDetector):
    """A counting detector that sees what the simulated camera computes.

    Its geometry is the configuration signal ``poni`` (JSON, as pyFAI writes it).
    """

    def __init__(self, source: FrameSource, path_provider: PathProvider, name: str = ""):
        self.poni, _ = soft_signal_r_and_setter(str, json.dumps(source.camera.poni))
        self.add_detector_logics(TriggerLogic(source), AcquireLogic(source), DataLogic(source, path_provider))
        self.add_config_signals(self.poni)
        super().__init__(name=name)


class SimBeamline:
    """The devices of a beamline around one camera.

    They are separate devices, not one: bluesky would read a detector that is
    part of a device through that device, and never trigger it.

    Parameters
    ----------
    directory
        Where the detector writes its files; must exist.
    camera
        The physics; a Pilatus 300k at 0.8 m if not given.
    samples
        What the sample changer holds, by name; "" is always the empty beam.
    realtime
        Exposures take the time they say.

    Examples
    --------
    >>> beamline = SimBeamline(directory)                             # doctest: +SKIP
    >>> RE(ensure_connected(*beamline.devices))                       # doctest: +SKIP
    >>> RE(bps.mv(beamline.changer.sample, "AgBh"))                   # doctest: +SKIP
    >>> RE(bp.count([beamline.detector, beamline.changer], num=3))    # doctest: +SKIP
    """

    def __init__(
        self,
        directory: Path | str,
        camera: SaxsCamera | None = None,
        *,
        samples: dict[str, Sample] | None = None,
        realtime: bool = False,
    ):
        self.camera = camera or SaxsCamera()
        self.samples = SAMPLES if samples is None else samples
        self.slits = Slits(name="slits")
        self.attenuator = Attenuator(name="attenuator")
        self.changer = SampleChanger(name="changer")
        self.beamstop = Beamstop(name="beamstop")
        source = FrameSource(self.camera, self.setting, realtime=realtime)
        provider = StaticPathProvider(UUIDFilenameProvider(), Path(directory).absolute())
        self.detector = SimSaxsDetector(source, provider, name="pilatus")

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device, to be connected before the first plan."""
        return self.slits, self.attenuator, self.changer, self.beamstop, self.detector

    async def setting(self) -> Setting:
        """What the devices stand at now, as the camera wants it."""
        name = await self.changer.sample.get_value()
        if name and name not in self.samples:
            raise ValueError(f"The sample changer holds {sorted(self.samples)}, not {name!r}.")
        return Setting(
            sample=self.samples[name] if name else None,
            slit_width=await self.slits.width.get_value(),
            slit_height=await self.slits.height.get_value(),
            thickness=await self.changer.thickness(),
            attenuation=await self.attenuator.factor.get_value(),
            beamstop=await self.beamstop.radius.get_value(),
        )

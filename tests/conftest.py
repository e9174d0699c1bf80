"""Fixtures that more than one test module uses."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Of Tiled's client: a request that fails here fails at once, not after ten attempts.
os.environ.setdefault("TILED_RETRY_ATTEMPTS", "1")
# Models and aliases of whoever runs the tests are none of their business.
os.environ["DSNET_MODELS"] = str(Path(__file__).parent / "no-models")

import fabio.edfimage
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.client import from_context
from tiled.client.context import Context
from tiled.config import Config
from tiled.queries import Key
from tiled.server.app import build_app_from_config
from tiled.structures.core import Spec

from dsnet_bluesky.frames import path_of
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.server import Server, configuration
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.smearing import Smearing

SHAPE = (120, 100)


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection: pyFAI collects at every geometry, half a second each here."""
    gc.collect()
    gc.freeze()


HARDWARE = ("CUDA", "bfloat16")
"""What a machine may lack where nothing shall be skipped."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where DSNET_SKIP_NOTHING is set, as in CI, a test that is skipped for want of a service is a failure."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("DSNET_SKIP_NOTHING") or reporter is None:
        return
    reasons = {str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])}
    if left_out := sorted(reason for reason in reasons if not any(word in reason for word in HARDWARE)):
        reporter.write_line(f"Nothing was to be skipped here, but was: {'; '.join(left_out)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog database without nodes; making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("database") / "catalog.db"
    subprocess.run([sys.executable, "-m", "tiled", "catalog", "init", f"sqlite:///{path}"], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def detector_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files must lie for the servers of a test module to read them."""
    return tmp_path_factory.mktemp("detector")


@pytest.fixture(scope="module")
def make_client(
    tmp_path_factory: pytest.TempPathFactory, detector_directory: Path, empty_database: Path
) -> Iterator[Callable[..., Any]]:
    """Make a client of the embedded configuration's trees, served in this process with a new, empty catalog.

    Arguments change the configuration; `mounts` keeps only those. What breaks in the
    server is raised in the test, or answered with status 500 if `answer_errors`.
    """
    contexts: list[Context] = []

    def make(*, directory: Path | None = None, mounts: Sequence[str] = (), answer_errors: bool = False, **changes: Any) -> Any:
        directory = directory or tmp_path_factory.mktemp("data")
        shutil.copy(empty_database, directory / "catalog.db")
        config = configuration(directory, readable=[detector_directory]) | changes
        config["trees"] = [tree for tree in config["trees"] if not mounts or tree["path"] in mounts]
        for tree in config["trees"]:
            tree["args"].pop("init_if_not_exists", None)
        app = build_app_from_config(Config.model_validate(config))
        context = Context.from_app(app, raise_server_exceptions=not answer_errors)
        contexts.append(context)
        context.__enter__()
        return from_context(context)

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(make_client: Callable[..., Any]) -> Any:
    """Root of the embedded configuration's trees, served in this process; one for a test module, which shares its nodes."""
    return make_client()


@pytest.fixture(scope="session")
def store_raw_run() -> Callable[..., Any]:
    """Store a run without data, if it is not there: results are stored only beside their raw run."""

    def store(client: Any, uid: str, **start: Any) -> Any:
        if uid not in client["raw"]:
            document = {"uid": uid, "time": 1.7e9, "purpose": "sample", **start}
            client["raw"].create_container(key=uid, metadata={"start": document}, specs=[Spec("BlueskyRun", version="3.0")])
        return client["raw"][uid]

    return store


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process with the embedded configuration, shared by all tests: give each run a uid of its own."""
    with Server(tmp_path_factory.mktemp("served"), timeout=200) as server:
        yield server


@pytest.fixture
def RE() -> Iterator[RunEngine]:
    """A RunEngine that halts, and whose loop stops, when the test ends."""
    engine = RunEngine({})
    yield engine
    if engine.state not in ("idle", "panicked"):
        engine.halt()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()


class Line:
    """A small simulated beamline, its RunEngine and its catalog."""

    beamstop = 2.8e-3

    def __init__(self, engine: RunEngine, client: Any, folder: Path, *writers: Any):
        self.engine, self.client, self.folder = engine, client, folder
        self.camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self.beamline = SimBeamline(folder, self.camera)
        np.save(folder / "mask.npy", self.camera.mask(self.beamstop))
        self.instrument = Instrument(self.camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self.docs: list[tuple[str, Any]] = []
        engine(ensure_connected(*self.beamline.devices))
        for writer in writers or (TiledWriter(client["raw"], batch_size=1),):
            engine.subscribe(writer)
        engine.subscribe(lambda name, doc: self.docs.append((name, doc)))

    def beam(self, seconds=60.0, **options):
        def plan():
            line = self.beamline
            yield from bps.mv(line.beamstop.radius, 0.0, line.attenuator.factor, 5000.0, line.changer.sample, "")
            yield from bps.configure(self.instrument, mask=None)
            yield from direct_beam(line.detector, instrument=self.instrument, exposure_time=seconds, **options)

        return self.engine(plan())[0]

    def sample(self, **options):
        return self.engine(self.sample_plan(**options))[0]

    def sample_plan(self, **options):
        line = self.beamline
        yield from bps.mv(line.beamstop.radius, self.beamstop, line.attenuator.factor, 1.0, line.changer.sample, "AgBh")
        yield from bps.configure(self.instrument, mask=self.folder / "mask.npy")
        yield from expose(line.detector, sample="AgBh", instrument=self.instrument, exposure_time=60.0, **options)

    def deliver(self, writer, *, ended=True):
        """Write what was taken since the last time, but for the last stop document where that is still on its way; give that."""
        documents, self.docs[:] = list(self.docs), []
        *most, last = documents
        for name, doc in documents if ended else most:
            writer(name, doc)
        return last

    def file_of(self, uid):
        (uri,) = [doc["uri"] for name, doc in self.docs if name == "stream_resource" and doc["run_start"] == uid]
        return path_of(uri)

    def results(self, uid):
        return list(self.client["desmeared"].search(Key("raw_uid") == uid).values())

    def result(self, uid):
        (node,) = self.results(uid)
        return node


@pytest.fixture
def line(RE: RunEngine, client: Any, detector_directory: Path) -> Line:
    """A small beamline that writes into the catalog served in this process."""
    return Line(RE, client, detector_directory)


@pytest.fixture
def delivered(RE: RunEngine, make_client: Callable[..., Any], detector_directory: Path) -> tuple[Line, TiledWriter]:
    """A small beamline, and the writer of a catalog of its own, which holds only what is delivered with that."""
    client = make_client()
    return Line(RE, client, detector_directory, lambda *_: None), TiledWriter(client["raw"], batch_size=1)


@pytest.fixture
def served_line(RE: RunEngine, served: Server) -> Line:
    """A small beamline that writes into the catalog of the server process."""
    return Line(RE, served.client(), served.data_directory / "detector")


@pytest.fixture
def poni() -> dict[str, Any]:
    """Geometry of a small detector without gaps, the beam in its middle."""
    pixel = 1e-3
    return {
        "poni_version": 2.1,
        "dist": 0.8,
        "poni1": SHAPE[0] / 2 * pixel,
        "poni2": SHAPE[1] / 2 * pixel,
        "rot1": 0.0,
        "rot2": 0.0,
        "rot3": 0.0,
        "detector": "Detector",
        "detector_config": {"pixel1": pixel, "pixel2": pixel, "max_shape": list(SHAPE), "orientation": 3},
        "wavelength": 1.54e-10,
    }


@pytest.fixture
def poni_file(poni: dict[str, Any], tmp_path: Path) -> Path:
    """The geometry of `poni` as a .poni file."""
    import pyFAI

    path = tmp_path / "geometry.poni"
    pyFAI.load(dict(poni)).save(str(path))
    return path


@pytest.fixture
def beam_frame() -> np.ndarray:
    """A direct beam of 2 x 4 mm on the small detector, 8e5 counts on a background of 0.1 a pixel."""
    y, x = (np.abs(np.arange(n) - n / 2 + 0.5) for n in SHAPE)
    spot = ((y[:, None] < 1.5) & (x[None, :] < 2)) * 1e5
    return np.random.default_rng(1).poisson(spot + 0.1).astype(np.int32)


@pytest.fixture
def sample_frames() -> np.ndarray:
    """Three exposures of something isotropic on the small detector, shape (3, y, x)."""
    y, x = (np.arange(n) - n / 2 + 0.5 for n in SHAPE)
    radius = np.hypot(y[:, None], x[None, :])
    return np.random.default_rng(2).poisson(1000 * np.exp(-radius / 20) + 50, size=(3, *SHAPE)).astype(np.int32)


@pytest.fixture
def write_edf(detector_directory: Path) -> Callable[[str, np.ndarray], Path]:
    """Write a frame as EDF where the server may read it."""

    def write(name: str, frame: np.ndarray) -> Path:
        path = detector_directory / f"{name}.edf"
        fabio.edfimage.EdfImage(data=frame).write(str(path))
        return path

    return write


@pytest.fixture(scope="session")
def smearing() -> Smearing:
    """The paper's smearing: a stationary Gaussian of 0.04 1/nm on 501 points."""
    return Smearing.gaussian(0.01 * np.arange(1, 502), 0.04)


@pytest.fixture(scope="session")
def exact(smearing: Smearing) -> Smearing:
    """The operator that makes the data: 20 times finer and wider than the one that desmears them."""
    return Smearing.gaussian(smearing.q, 0.04, q_calc=0.0005 * (np.arange(20 * 545) + 0.5))

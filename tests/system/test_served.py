"""A real server process: started, used by a RunEngine and by ingestion, and stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fabio.edfimage
import httpx
import numpy as np
import pytest
import xarray as xr
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.client import from_uri

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import register_all
from dsnet_bluesky.frames import FrameReference, read
from dsnet_bluesky.ingest import ingest
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.reduction import Reduction, psf
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline

pytestmark = pytest.mark.system


def test_runs_of_a_run_engine_are_served_as_curves_and_psfs(served: Server, RE):
    client = served.client()
    beamline = SimBeamline(served.data_directory / "detector", SaxsCamera(seed=3))
    instrument = Instrument(beamline.camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    RE.subscribe(TiledWriter(client["raw"], batch_size=1))
    RE(ensure_connected(*beamline.devices))
    RE(direct_beam(beamline.detector, instrument=instrument, exposure_time=0.01))
    RE(expose(beamline.detector, sample="AgBh", instrument=instrument, exposures=2, exposure_time=1.0))
    registered = register_all(client)  # of other tests' runs too, which share the server
    assert registered["curves"] >= 2
    assert registered["psfs"] >= 1
    sample, beam = client["raw"].values()[-1], client["raw"].values()[-2]
    frames = sample["primary/pilatus"].read()[:, 0]
    xr.testing.assert_allclose(client["curves"][sample.item["id"]].read(), Reduction(beamline.camera.poni)(frames))
    xr.testing.assert_allclose(
        client["psfs"][beam.item["id"]].read(), psf(beam["primary/pilatus"].read()[:, 0], beamline.camera.poni)
    )
    asset = sample["primary/pilatus"].data_sources()[0].assets[0]
    np.testing.assert_array_equal(read(FrameReference(asset.data_uri, "application/x-hdf5")), frames)


def test_the_server_refuses_files_outside_readable_storage(served: Server, tmp_path: Path, poni, sample_frames):
    outside = write_edf(tmp_path / "outside.edf", sample_frames[0])
    client = served.client()
    before = set(client["raw"])
    with pytest.raises(BadInput, match=rf"--readable {tmp_path}"):
        ingest([outside], client=client, purpose="sample", poni=poni)
    assert set(client["raw"]) == before


def write_edf(path: Path, frame: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    fabio.edfimage.EdfImage(data=frame).write(str(path))
    return path


def healthy(uri: str) -> bool:
    try:
        return httpx.get(f"{uri}/healthz").is_success
    except httpx.TransportError:
        return False


def test_the_server_stops_and_keeps_its_data(tmp_path: Path, poni, sample_frames):
    """Started by `Server`, then by `serve` on the same data."""
    path = write_edf(tmp_path / "frames" / "one.edf", sample_frames[0])
    with Server(tmp_path / "data", api_key="secret", readable=[path.parent]) as server:
        (uid,) = ingest([path], client=server.client(), purpose="sample", poni=poni)
        command_line = Path(f"/proc/{server.pid}/cmdline")
        assert not command_line.exists() or b"secret" not in command_line.read_bytes()
        assert "secret" not in server.config.read_text()
        pid, uri = server.pid, server.uri
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not healthy(uri)

    port = int(uri.rsplit(":", 1)[1])
    arguments = {"data_directory": str(tmp_path / "data"), "port": port, "api_key": "other", "readable": [str(path.parent)]}
    process = subprocess.Popen([sys.executable, "-c", f"from dsnet_bluesky.server import serve; serve(**{arguments})"])
    try:
        deadline = time.monotonic() + 60
        while not healthy(uri) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert from_uri(uri, api_key="other")["curves"][uid].read().sizes["exposure"] == 1
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, -signal.SIGINT)

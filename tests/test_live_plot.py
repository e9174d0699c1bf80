"""LiveDesmear beside real runs: results made live, by others, too late, or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from matplotlib.figure import Figure
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.live.plot import LiveDesmear
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.smearing import Smearing

mpl.use("Agg")

WAIT = 30.0
q = np.geomspace(0.1, 3, 80)


@pytest.fixture(scope="module")
def server(served: Server) -> Server:
    return served


@pytest.fixture
def live(server: Server):
    live = LiveDesmear(server.client(), interval=1.0)
    yield live
    live.close()
    plt.close(live.figure)


@pytest.fixture(scope="module")
def desmeared() -> xr.Dataset:
    """Five exposures, ever brighter, desmeared by a real method."""
    smearing = Smearing.gaussian(q, 0.05)
    I = np.outer(np.arange(1, 6), smearing.apply(1e3 * np.exp(-((smearing.q_calc * 2) ** 2) / 3) + 1))
    return desmear(curve(q, I, 0.02 * I), smearing, method="lake")


def begun(live: LiveDesmear, **metadata: Any) -> Any:
    """Begin a sample run, as a RunEngine would tell; its `compose_stop` ends it."""
    run = compose_run(metadata={"purpose": "sample", "scan_id": 7, **metadata})
    live("start", run.start_doc)
    return run


def writer(client: Any, start: dict[str, Any], method: str = "lake") -> ResultWriter:
    """Begin a result, as a watcher elsewhere would: through a client of its own."""
    if start["uid"] not in client["raw"]:
        TiledWriter(client["raw"], batch_size=1)("start", start)
    said = result_metadata(start, direct_beam_uid=None, config={}, config_sha256="", method=method)
    return ResultWriter.create(client, f"{start['uid']}-{method}", said)


def eventually(holds: Callable[[], Any], what: str = "") -> Any:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if value := holds():
            return value
        time.sleep(0.05)
    raise AssertionError(f"This did not come within {WAIT:g} s: {what}")


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for ax in figure.axes for text in (ax.title, *ax.texts))


def drawn(live: LiveDesmear) -> xr.Dataset:
    assert live.picture.exposure is not None
    return live.picture.exposure


def test_newest_exposure_is_drawn_as_it_arrives(server, live, desmeared):
    run = begun(live, sample="AgBh")
    eventually(lambda: "no result yet" in texts(live.figure), "a run without a result")
    result = writer(server.client(), run.start_doc)
    for number in range(3):
        result.append(desmeared.isel(exposure=number))
        eventually(lambda number=number: f"exposure {number + 1} (lake)" in live.picture.title, f"exposure {number + 1}")
        np.testing.assert_array_equal(drawn(live)["I"][0], desmeared["I"][number])
    assert live.figure.axes[0].get_title() == "AgBh, scan 7, exposure 3 (lake)"
    curves, residuals = live.figure.axes
    assert (curves.get_xscale(), curves.get_yscale()) == ("log", "log")
    line = next(line for line in curves.lines if line.get_linewidth() == 1.3)
    np.testing.assert_array_equal(line.get_ydata(), desmeared["I"][2])
    shown = np.concatenate([line.get_ydata() for line in residuals.lines if line.get_marker() == "."])
    expected = ((desmeared["I_smeared"] - desmeared["I_resmeared"]) / desmeared["Idev_smeared"])[2]
    np.testing.assert_allclose(shown, expected)


def test_updates_come_by_the_stream_long_before_one_looks_anyhow(server, desmeared):
    live = LiveDesmear(server.client(), interval=60.0)
    run = begun(live)
    time.sleep(1.0)  # the stream connects
    result = writer(server.client(), run.start_doc)
    began = time.monotonic()
    result.append(desmeared.isel(exposure=0))
    eventually(lambda: live.picture.exposure is not None, "the first exposure")
    live.close()
    assert time.monotonic() - began < 10


def test_failures_are_shown_with_their_reason(server, live, desmeared):
    run = begun(live, sample="AgBh")
    result = writer(server.client(), run.start_doc)
    result.append(desmeared.isel(exposure=0))
    result.append_failure("The frame holds no usable image.")
    eventually(lambda: "Exposure 2 failed: The frame holds no usable image." in texts(live.figure), "the failed exposure")
    assert "exposure 1" in live.picture.title, "the last good one stays"
    np.testing.assert_array_equal(drawn(live)["I"][0], desmeared["I"][0])
    result.complete()

    run = begun(live, sample="spheres")
    writer(server.client(), run.start_doc).fail("No direct beam was exposed before this sample.")
    eventually(lambda: "No direct beam was exposed" in texts(live.figure), "the failed result")
    assert live.picture.exposure is None
    assert not live.figure.axes[0].lines, "curves of another run would mislead"


def test_another_attempt_takes_the_place_of_a_failure(server, live, desmeared):
    run = begun(live)
    writer(server.client(), run.start_doc, "lake").fail("No direct beam.")
    eventually(lambda: live.picture.failure, "the failure")
    live("stop", run.compose_stop())
    writer(server.client(), run.start_doc, "map").append(desmeared.isel(exposure=0))
    eventually(lambda: "exposure 1 (map)" in live.picture.title and not live.picture.failure, "the second result")


def test_short_runs_are_seen_though_the_next_has_begun(server, live, desmeared):
    first = begun(live, sample="first")
    live("stop", first.compose_stop())
    begun(live, sample="second")
    result = writer(server.client(), first.start_doc)
    result.append(desmeared.isel(exposure=0))
    eventually(lambda: "first, scan 7, exposure 1" in texts(live.figure), "the run before")
    assert "second, scan 7: no result yet" in texts(live.figure)


def test_names_are_drawn_as_they_stand(server, live, desmeared):
    name = r"$\frac{<img src=x onerror=alert(1)>"
    run = begun(live, sample={"name": name})
    result = writer(server.client(), run.start_doc)
    result.append(desmeared.isel(exposure=0))
    result.append_failure(f"What is ${name}?")
    eventually(lambda: "Exposure 2 failed" in texts(live.figure), "the exposures")
    assert name in texts(live.figure)
    live.figure.canvas.draw()


def test_only_sample_runs_are_followed(server, live, desmeared):
    beam = compose_run(metadata={"purpose": "direct_beam"})
    live("start", beam.start_doc)
    live("stop", beam.compose_stop())
    live("start", compose_run().start_doc)
    time.sleep(0.5)
    assert texts(live.figure).strip() == ""


def test_axes_of_ones_own(server, desmeared):
    figure, (left, right) = plt.subplots(1, 2)
    alone, pair = LiveDesmear(server.client(), left), LiveDesmear(server.client(), (right, figure.add_axes((0.6, 0.1, 0.3, 0.1))))
    run = begun(alone)
    pair("start", run.start_doc)
    writer(server.client(), run.start_doc).append(desmeared.isel(exposure=0))
    for live in (alone, pair):
        eventually(lambda live=live: live.picture.exposure is not None, "the exposure")
        live.close()
    assert left.get_xlabel()
    assert not right.get_xlabel(), "q is written below the residuals"
    assert left.lines
    assert right.lines
    plt.close(figure)


def test_documents_never_raise_and_never_wait(live):
    for name, doc in [
        ("start", {}),
        ("stop", {}),
        ("start", {"purpose": ["sample"]}),
        ("stop", {"run_start": object()}),
        ("", {}),
    ]:
        live(name, doc)
    live._follower._results = None  # whatever goes wrong there
    starts = [compose_run(metadata={"purpose": "sample"}).start_doc for _ in range(100)]
    began = time.perf_counter()
    for start in starts:
        live("start", start)
    assert time.perf_counter() - began < 1.0


def test_catalog_without_results(make_client):
    with pytest.raises(BadInput, match="/desmeared"):
        LiveDesmear(make_client(mounts=["/raw"]))


def test_a_server_in_this_process(client, desmeared):
    """A notebook's own catalog has no websocket that could be waited on; then one looks now and then."""
    live = LiveDesmear(client, interval=0.2)
    run = begun(live)
    writer(client, run.start_doc).append(desmeared.isel(exposure=0))
    eventually(lambda: live.picture.exposure is not None, "the exposure")
    began = time.monotonic()
    live.close()
    assert time.monotonic() - began < 10


@pytest.mark.system
def test_a_server_that_is_away_is_noted_and_found_again(tmp_path, desmeared):
    server = Server(tmp_path / "data")
    server.start()
    threads = threading.active_count()
    live = LiveDesmear(server.client(), interval=0.5)
    try:
        run = begun(live, sample="AgBh")
        result = writer(server.client(), run.start_doc)
        result.append(desmeared.isel(exposure=0))
        eventually(lambda: live.picture.exposure is not None, "the first exposure")
        server.stop()
        eventually(lambda: "does not answer" in texts(live.figure), "the note")
        assert "exposure 1" in texts(live.figure), "what was drawn stays"
        server.start()
        result.append(desmeared.isel(exposure=1))
        eventually(lambda: "exposure 2" in texts(live.figure), "the second exposure")
        assert "does not answer" not in texts(live.figure)
    finally:
        live.close()
        server.stop()
    eventually(lambda: threading.active_count() <= threads, "the end of all threads")


@pytest.mark.system
def test_beside_a_run_engine_and_a_desmear_callback(served, RE, desmeared):
    client = served.client()
    folder = served.data_directory / "detector"
    camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
    line = SimBeamline(folder, camera)
    np.save(folder / "live-mask.npy", camera.mask(2.8e-3))
    instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    desmear_callback = DesmearCallback(client, config=Config(bins=60, per_bin=32))
    live = LiveDesmear(client)
    RE(ensure_connected(*line.devices))
    for callback in (TiledWriter(client["raw"], batch_size=1), desmear_callback, live):
        RE.subscribe(callback)

    def plan():
        yield from bps.mv(line.beamstop.radius, 0.0, line.attenuator.factor, 5000.0, line.changer.sample, "")
        yield from direct_beam(line.detector, instrument=instrument, exposure_time=60.0)
        yield from bps.mv(line.beamstop.radius, 2.8e-3, line.attenuator.factor, 1.0, line.changer.sample, "AgBh")
        yield from bps.configure(instrument, mask=folder / "live-mask.npy")
        yield from expose(line.detector, sample="AgBh", instrument=instrument, exposure_time=60.0, exposures=2)

    RE(plan())
    eventually(lambda: "AgBh, scan 2, exposure 2 (dsnet" in live.picture.title, "the second exposure")
    live.close()
    assert desmear_callback.close()
    assert drawn(live)["I"].attrs["units"] == "1"
    plt.close(live.figure)

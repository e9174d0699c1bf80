"""The spool: its files, its writer, and delivery to a real server. What kills processes and fills disks is in faults/."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from event_model import compose_run, pack_event_page
from typer.testing import CliRunner

from dsnet_bluesky.cli import app
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.plans import direct_beam
from dsnet_bluesky.spool import Deliverer, SpooledWriter, deliver, read_status
from dsnet_bluesky.spool.files import Spool, encode, is_free
from tests.faults.spooling import WAIT, Beamline, await_begun, await_true, feed, numbers, run_documents, spooled, whole

NOWHERE = "http://127.0.0.1:9/api/v1/metadata/raw"
EVENTS = 20
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


# -- files --


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype="<u2").reshape(2, 3),
        np.array(["a", "bc"]),
        np.float32(0.1),
        np.int64(-3),
        np.bool_(True),
        [1, {"a": None}],
        "µ",
        b"\x00",
        float("inf"),
    ],
    ids=str,
)
def test_values_come_back_as_they_were(tmp_path, value):
    path = tmp_path / "a.run"
    path.write_bytes(encode("event", {"data": {"x": value}}))
    ((_, doc),) = spooled(path)
    back = doc["data"]["x"]
    np.testing.assert_array_equal(back, value)
    assert type(back) is type(value)
    assert getattr(back, "dtype", None) == getattr(value, "dtype", None)


def test_what_has_no_form_of_its_own_becomes_the_nearest(tmp_path):
    path = tmp_path / "a.run"
    odd = {"path": Path("/a"), "set": {1}, "tuple": (1, 2), "big": 2**70, "objects": np.array([None, "a"], dtype=object)}
    path.write_bytes(encode("start", odd))
    ((_, doc),) = spooled(path)
    assert doc == {"path": "/a", "set": [1], "tuple": [1, 2], "big": float(2**70), "objects": [None, "a"]}


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros", "huge"])
def test_reading_stops_at_the_first_record_that_is_not_whole(tmp_path, damage):
    records = [encode("event", {"n": n}) for n in range(3)]
    last = {
        "cut": records[2][:-1],
        "flipped": records[2][:-1] + bytes([records[2][-1] ^ 1]),
        "zeros": bytes(64),
        "huge": b"\xff" * 64,
    }[damage]
    path = tmp_path / "a.run"
    path.write_bytes(records[0] + records[1] + last)
    assert [doc["n"] for _, doc in spooled(path)] == [0, 1]


# -- the writer --


@pytest.fixture
def writer(tmp_path):
    """A writer that nobody delivers for."""
    made = SpooledWriter(tmp_path / "spool", NOWHERE, deliver=False)
    yield made
    made.close()


def test_each_run_has_its_file_and_files_sort_by_time(writer):
    runs = [list(run_documents(3)) for _ in range(3)]
    for step in range(max(map(len, runs))):
        for run in runs:
            writer(*run[step])
    uids = [run[0][1]["uid"] for run in runs]
    waiting = writer.spool.waiting()
    assert [path.stem.split("-", 1)[1] for path in waiting] == uids
    for path, run in zip(waiting, runs, strict=True):
        assert [name for name, _ in spooled(path)] == [name for name, _ in run]
        assert all(doc["uid"] == sent["uid"] for (_, doc), (_, sent) in zip(spooled(path), run, strict=True))


@pytest.mark.parametrize("time", [1e20, float("nan"), None, "now"])
def test_a_run_without_a_usable_time_is_spooled_all_the_same(writer, time):
    documents = list(run_documents(3))
    documents[0][1]["time"] = time
    feed(writer, documents)
    (path,) = writer.spool.waiting()
    assert len(spooled(path)) == len(documents)


def test_a_run_engine_writes_to_it(RE, writer):
    RE.subscribe(writer)
    (uid,) = RE(bpp.run_wrapper(bps.null()))
    (path,) = writer.spool.waiting()
    assert [(name, doc.get("run_start", doc["uid"])) for name, doc in spooled(path)] == [("start", uid), ("stop", uid)]


def test_resources_without_run_start_and_event_pages_find_their_run(writer):
    run = compose_run()
    writer("start", run.start_doc)
    key = {"source": "PV", "dtype": "array", "shape": [4, 4], "external": "FILESTORE:"}
    stream = run.compose_descriptor(name="primary", data_keys={"image": key})
    writer("descriptor", stream.descriptor_doc)
    resource = run.compose_resource(spec="AD_HDF5", root="/", resource_path="a.h5", resource_kwargs={})
    resource.resource_doc.pop("run_start")
    writer("resource", resource.resource_doc)
    datum = resource.compose_datum(datum_kwargs={"point_number": 0})
    writer("datum", datum)
    event = stream.compose_event(data={"image": datum["datum_id"]}, timestamps={"image": 0.0}, filled={"image": False})
    writer("event_page", pack_event_page(event))
    writer("stop", run.compose_stop())
    (path,) = writer.spool.waiting()
    assert [name for name, _ in spooled(path)] == ["start", "descriptor", "resource", "datum", "event_page", "stop"]


def test_the_writer_never_raises_but_says_what_is_lost(writer, caplog):
    for document in list(run_documents(2))[1:]:  # its start was not seen
        writer(*document)
    assert "is lost" in caplog.text
    deadline = time.monotonic() + 10
    while "documents lost" not in read_status(writer.spool.directory).alarm and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "2 event" in read_status(writer.spool.directory).alarm


def test_a_spool_above_its_limit_raises_an_alarm_and_drops_nothing(tmp_path):
    writer = SpooledWriter(tmp_path, NOWHERE, deliver=False, limit=1000)
    feed(writer, run_documents(50))
    writer._weighed = -np.inf
    writer.close()
    assert "more than its limit of 1000" in read_status(tmp_path).alarm
    assert len(spooled(writer.spool.waiting()[0])) == 53


def test_a_forked_child_does_not_keep_the_run_open(writer):
    for document in run_documents(1, stop=False):
        writer(*document)
    (path,) = writer.spool.waiting()
    mine, its = socket.socketpair()
    if (child := os.fork()) == 0:
        with contextlib.suppress(OSError):
            mine.close()
            its.send(b"x")
            its.recv(1)
        os._exit(0)
    its.close()
    try:
        assert mine.recv(1)  # it lives
        assert not is_free(path)
        writer.close()
        assert is_free(path)
    finally:
        mine.close()
        os.waitpid(child, 0)


def test_unusable_options_and_directories_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'never', 'run' or 'document'"):
        SpooledWriter(tmp_path, NOWHERE, sync="often")
    with pytest.raises(BadInput, match="is no spool"):
        Deliverer(tmp_path)
    assert CliRunner().invoke(app, ["spool", "status", str(tmp_path)]).exit_code == 2
    assert not list(tmp_path.iterdir())


# -- delivery --


@pytest.fixture
def raw(served):
    return served.client()["raw"]


def delivered(directory, raw):
    """Deliver what waits, in this process."""
    return Deliverer(directory, api_key=raw.context.api_key).run(timeout=WAIT)


def comparable(run):
    """Documents without what each writing draws anew."""
    return [(name, {k: v for k, v in doc.items() if k != "uid" or name in ("start", "stop")}) for name, doc in run.documents()]


@pytest.fixture(scope="module")
def beamline_documents(served):
    """Documents of the project's own plans on the simulated beamline, by run."""
    line = Beamline(served.data_directory / "detector")
    plans = direct_beam(line.detector, instrument=line.instrument, exposure_time=1.0), line.exposures(5)
    documents = [line.documents(plan) for plan in plans]
    line.close()
    return documents


@pytest.mark.system
def test_the_catalog_holds_what_a_direct_writer_would_have_written(raw, tmp_path, beamline_documents):
    from bluesky_tiled_plugins import TiledWriter

    direct, through = (raw.create_container(f"{name}-{uuid.uuid4()}", metadata={}) for name in ("direct", "through"))
    runs = [*beamline_documents, list(run_documents(5))]
    tiled, spooling = TiledWriter(direct, batch_size=1), SpooledWriter(tmp_path, through, deliver=False)
    uids = [feed(tiled, run) for run in runs]
    for run in runs:
        feed(spooling, run)
    spooling.close()
    assert delivered(tmp_path, raw)
    assert list(through) == uids, "in the order of their start"
    for uid in uids:
        assert comparable(through[uid]) == comparable(direct[uid])
    for container in (direct, through):
        raw.delete_contents(container.item["id"], recursive=True, external_only=False)


@pytest.mark.system
def test_an_open_run_is_seen_live(raw, tmp_path):
    writer, documents = SpooledWriter(tmp_path, raw), list(run_documents(3))
    feed(writer, documents[:-1])
    uid = documents[0][1]["uid"]
    await_begun(raw, uid)
    time.sleep(1)  # the last two rows arrive; see await_begun
    await_true(lambda: numbers(raw[uid]) == [1, 2, 3])
    assert "stop" not in raw[uid].metadata
    writer(*documents[-1])
    assert writer.wait(WAIT)
    assert whole(raw[uid], 3)
    writer.close()
    await_true(lambda: not read_status(tmp_path).delivering)


class Proxy:
    """A line to the server that can be cut: refuse connections, or pass requests on and lose the answers."""

    def __init__(self, server):
        self._server = int(server.uri.rsplit(":", 1)[1])
        self.mode = "open"
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}/api/v1/metadata/raw"

    def _serve(self):
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near):
        with contextlib.suppress(OSError), near, socket.create_connection(("127.0.0.1", self._server)) as far:
            while True:
                ready, _, _ = select.select([near, far], [], [], 0.1)
                if self.mode == "cut":
                    return
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        return
                    if end is far and self.mode == "deaf":
                        self.lost += 1
                        return
                    (far if end is near else near).sendall(data)


@pytest.mark.system
def test_a_server_that_goes_and_comes_back_has_each_run_once(served, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(deliver, "LONGEST", 0.5)
    proxy = Proxy(served)
    proxy.mode = "cut"
    writer = SpooledWriter(tmp_path, proxy.uri, deliver=False)
    deliverer = Deliverer(tmp_path, api_key=raw.context.api_key)
    following = threading.Thread(target=deliverer.run, kwargs={"follow": True}, daemon=True)
    following.start()
    uids = [feed(writer, run_documents(5)) for _ in range(2)]
    await_true(lambda: read_status(tmp_path).attempts > 1)
    documents = list(run_documents(EVENTS))
    uids.append(documents[0][1]["uid"])
    phases = {
        "open": lambda: await_begun(raw, uids[-1]),
        "cut": lambda: await_true(lambda: read_status(tmp_path).error),
        "deaf": lambda: await_true(lambda: proxy.lost),
    }
    step = len(documents) // 4
    for number, (proxy.mode, until) in enumerate(phases.items()):
        for document in documents[number * step : (number + 1) * step]:
            started = time.thread_time()
            writer(*document)
            assert time.thread_time() - started < 0.05
        until()
    proxy.mode = "open"
    for document in documents[3 * step :]:
        writer(*document)
    assert writer.wait(WAIT)
    assert [whole(raw[uid], n) for uid, n in zip(uids, (5, 5, EVENTS), strict=True)] == [True] * 3
    assert not read_status(tmp_path).error
    writer.close()
    following.join(WAIT)
    assert not following.is_alive()


@pytest.mark.system
def test_doubled_rows_are_found_and_delivered_again(raw, tmp_path, monkeypatch):
    """Whatever doubled them: TiledWriter sends rows again when an answer is lost."""
    from tiled.client.dataframe import DataFrameClient

    append, left = DataFrameClient.append_partition, [1]

    def twice(self, *arguments):
        append(self, *arguments)
        if left:
            left.pop()
            append(self, *arguments)

    monkeypatch.setattr(DataFrameClient, "append_partition", twice)
    writer = SpooledWriter(tmp_path, raw, deliver=False)
    uid = feed(writer, run_documents(5))
    writer.close()
    assert delivered(tmp_path, raw)
    assert not left
    assert whole(raw[uid], 5)


@pytest.mark.system
def test_a_refused_run_is_set_aside_and_later_ones_go_on(raw, tmp_path, monkeypatch):
    writer = SpooledWriter(tmp_path, raw, deliver=False, keep=1)
    bad = list(run_documents(3))
    bad[3][1]["data"] = {}  # no such document can be written ...
    bad[3][1].pop("timestamps")
    feed(writer, bad)
    good = feed(writer, run_documents(3))
    writer.close()
    monkeypatch.setenv("TILED_API_KEY", raw.context.api_key)
    done = CliRunner().invoke(app, ["spool", "flush", str(tmp_path), "--timeout", str(WAIT), "--keep", "1"])
    assert done.exit_code == 1
    assert whole(raw[good], 3)
    shown = CliRunner().invoke(app, ["spool", "status", str(tmp_path), "--json"])
    assert shown.exit_code == 1
    status = json.loads(shown.output)
    assert (status["waiting"], status["refused"]) == (0, 1)
    (run,) = status["runs"]
    assert run["state"] == "refused"
    assert run["attempts"] == deliver.PATIENCE
    assert "timestamps" in run["error"]
    (path,) = Spool(tmp_path).refused.glob("*.run")
    path.write_bytes(b"".join(encode(*document) for document in run_documents(3)))  # ... until somebody repairs it
    uid = spooled(path)[0][1]["uid"]
    assert CliRunner().invoke(app, ["spool", "flush", str(tmp_path), "--refused", "--keep", "1"]).exit_code == 0
    assert whole(raw[uid], 3)
    assert len(list(Spool(tmp_path).delivered.glob("*.run"))) == 2


@pytest.mark.system
def test_deliverers_that_race_deliver_once(raw, tmp_path):
    writer = SpooledWriter(tmp_path, raw, deliver=False)
    uids = [feed(writer, run_documents(20)) for _ in range(5)]
    writer.close()
    environment = {**os.environ, "TILED_API_KEY": raw.context.api_key}
    other = subprocess.Popen([sys.executable, "-m", "dsnet_bluesky", "spool", "flush", str(tmp_path)], env=environment)
    await_true(lambda: read_status(tmp_path).delivering or other.poll() is not None)
    assert delivered(tmp_path, raw)
    assert other.wait(WAIT) == 0
    assert all(whole(raw[uid], 20) for uid in uids)


@pytest.mark.system
def test_a_run_that_is_complete_already_is_left_alone(raw, tmp_path):
    writer = SpooledWriter(tmp_path, raw, deliver=False)
    documents = list(run_documents(3))
    uid = feed(writer, documents)
    while not is_free(writer.spool.waiting()[0]):
        time.sleep(0.01)
    assert delivered(tmp_path, raw)
    before = raw[uid].item["attributes"]
    feed(writer, documents)
    writer.close()
    assert delivered(tmp_path, raw)
    assert raw[uid].item["attributes"] == before


@pytest.mark.system
def test_files_of_detectors_are_never_touched(served, raw, tmp_path, beamline_documents):
    """Nor when a run is removed from the catalog and delivered again."""
    folder = served.data_directory / "detector"
    before = {path: path.read_bytes() for path in folder.rglob("*.h5")}
    beam, seen = beamline_documents[0], []
    for documents in (beam[:-1], beam):  # first without its stop document
        writer = SpooledWriter(tmp_path, raw, deliver=False)
        uid = feed(writer, documents)
        writer.close()
        assert delivered(tmp_path, raw)
        seen.append(raw[uid].metadata["stop"]["exit_status"])
    assert seen == ["fail", "success"]
    assert before
    assert {path: path.read_bytes() for path in folder.rglob("*.h5")} == before


@pytest.mark.slow
@pytest.mark.system
def test_the_benchmark_compares_every_writer_with_none(served, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    live = importlib.import_module("live")
    section = "\n".join(live.runengine(served, tmp_path, rounds=1, exposures=2, events=5))
    names = ("none", "TiledWriter(batch_size=1)", *(f"SpooledWriter, {how}" for how in ("server up", "server down")))
    assert all(section.count(f"| {name} | ") == 2 for name in names)
    assert "nan" not in section

"""The spool under real faults: with real servers, real processes and real full disks; at the end everything is counted."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from event_model import compose_run, pack_event_page
from typer.testing import CliRunner

from dsnet_bluesky.cli import app
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.server import Server
from dsnet_bluesky.spool import Deliverer, SpooledWriter, deliver, read_status
from dsnet_bluesky.spool.files import Spool, encode, is_free, read

NOWHERE = "http://127.0.0.1:9/api/v1/metadata/raw"
WAIT = 120
EVENTS = 40


def run_documents(events=3, *, stop=True, value=float, **start):
    """Documents of a run: a scalar, a short and a long array in each event."""
    run = compose_run(metadata=start)
    yield "start", run.start_doc
    keys = {"x": {"source": "", "dtype": "number", "shape": []}, "spectrum": {"source": "", "dtype": "array", "shape": [32]}}
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    yield "descriptor", stream.descriptor_doc
    for number in range(events):
        data = {"x": value(number), "spectrum": np.arange(32.0) + number}
        yield "event", stream.compose_event(data=data, timestamps={"x": 0.0, "spectrum": 0.0})
    if stop:
        yield "stop", run.compose_stop()


def feed(writer, documents):
    """Give documents to a callback; returns the run's uid."""
    documents = list(documents)
    for name, doc in documents:
        writer(name, doc)
    return documents[0][1]["uid"]


def spooled(path):
    with path.open("rb") as file:
        return [(name, doc) for name, doc, _ in read(file)]


def numbers(run):
    """Sequence numbers of the events that the catalog holds, each as often as it is there."""
    return list(run.base["primary"].base["internal"].read(["seq_num"])["seq_num"])


def whole(run, events):
    return numbers(run) == list(range(1, events + 1)) and run.metadata["stop"]["exit_status"] == "success"


def await_rows(raw, uid, count):
    """Wait for rows; a read beside a write may be answered 500 (seen with DuckDB), and is tried again."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with contextlib.suppress(KeyError, httpx.HTTPStatusError):
            if len(numbers(raw[uid])) >= count:
                return
        time.sleep(0.1)
    raise TimeoutError(f"Run {uid} does not appear.")


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


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("A full disk needs the right to mount a tmpfs.")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def await_alarm(directory, text):
    deadline = time.monotonic() + 10
    while text not in (alarm := read_status(directory).alarm) or bool(alarm) != bool(text):
        assert time.monotonic() < deadline, alarm
        time.sleep(0.05)


def test_on_a_full_disk_documents_wait_in_memory_until_there_is_room(small_disk):
    writer = SpooledWriter(small_disk, NOWHERE, deliver=False)
    first, second = list(run_documents(100)), list(run_documents(100))
    for document in first[:50]:
        writer(*document)
    fill(small_disk)
    feed(writer, first[50:])
    feed(writer, second)  # has no file yet
    await_alarm(small_disk, "wait in memory")
    assert first[0][1]["uid"] in read_status(small_disk).alarm
    (small_disk / "filler").unlink()
    await_alarm(small_disk, "")
    writer.close()
    for path, sent in zip(writer.spool.waiting(), (first, second), strict=True):
        assert [doc["uid"] for _, doc in spooled(path)] == [doc["uid"] for _, doc in sent]


def test_what_memory_cannot_hold_is_lost_and_counted(small_disk):
    writer = SpooledWriter(small_disk, NOWHERE, deliver=False, memory=10_000)
    documents = list(run_documents(100))
    for document in documents[:10]:
        writer(*document)
    fill(small_disk)
    feed(writer, documents[10:])
    await_alarm(small_disk, "documents lost")
    (small_disk / "filler").unlink()
    writer.close()
    kept = spooled(writer.spool.waiting()[0])
    lost = 100 - Counter(name for name, _ in kept)["event"]
    assert 50 < lost < 92
    assert kept[-1][1]["exit_status"] == "fail"
    assert f"{lost} event" in kept[-1][1]["reason"]
    assert f"{lost} event" in read_status(small_disk).alarm


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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server for runs of this module alone."""
    with Server(tmp_path_factory.mktemp("spooled"), timeout=200) as made:
        yield made


@pytest.fixture(scope="module")
def raw(server):
    return server.client()["raw"]


@pytest.fixture
def spool(tmp_path, raw):
    """A spool that a process of its own delivers; empty at the end."""
    writers = []

    def make(target=raw, **options):
        writers.append(SpooledWriter(tmp_path / "spool", target, api_key=raw.context.api_key, **options))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()
    end = time.monotonic() + WAIT
    while read_status(tmp_path / "spool").delivering and time.monotonic() < end:
        time.sleep(0.05)


def comparable(run):
    """Documents without what each writing draws anew."""
    return [(name, {k: v for k, v in doc.items() if k != "uid" or name in ("start", "stop")}) for name, doc in run.documents()]


@pytest.fixture(scope="module")
def beamline_documents(server, tmp_path_factory):
    """Documents of the project's own plans on the simulated beamline, by run."""
    from bluesky import RunEngine
    from ophyd_async.plan_stubs import ensure_connected

    from dsnet_bluesky.plans import Instrument, direct_beam, expose
    from dsnet_bluesky.sim import SaxsCamera, SimBeamline

    engine, documents = RunEngine({}), []
    camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
    line = SimBeamline(server.data_directory / "detector", camera)
    instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    engine.subscribe(lambda name, doc: documents.append((name, doc)))
    engine(ensure_connected(*line.devices))
    engine(direct_beam(line.detector, instrument=instrument, exposure_time=1.0))
    engine(expose(line.detector, sample="AgBh", instrument=instrument, exposures=5, exposure_time=1.0))
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    starts = [i for i, (name, _) in enumerate(documents) if name == "start"]
    return [documents[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.system
def test_the_catalog_holds_what_a_direct_writer_would_have_written(raw, spool, beamline_documents):
    from bluesky_tiled_plugins import TiledWriter

    direct, through = (raw.create_container(name, metadata={}) for name in ("direct", "through"))
    runs = [*beamline_documents, list(run_documents(5))]
    tiled, spooling = TiledWriter(direct, batch_size=1), spool(through)
    uids = [feed(tiled, run) for run in runs]
    for run in runs:
        feed(spooling, run)
    assert spooling.wait(WAIT)
    assert list(through) == uids, "in the order of their start"
    for uid in uids:
        assert comparable(through[uid]) == comparable(direct[uid])


@pytest.mark.system
def test_an_open_run_is_seen_live(raw, spool):
    writer, documents = spool(), list(run_documents(3))
    feed(writer, documents[:-1])
    uid = documents[0][1]["uid"]
    await_rows(raw, uid, 3)
    assert "stop" not in raw[uid].metadata
    writer(*documents[-1])
    assert writer.wait(WAIT)
    assert whole(raw[uid], 3)


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


def await_true(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "It does not happen."
        time.sleep(0.05)


@pytest.mark.system
def test_a_server_that_goes_and_comes_back_has_each_run_once(server, raw, spool):
    proxy = Proxy(server)
    proxy.mode = "cut"
    writer = spool(proxy.uri)
    directory = writer.spool.directory
    uids = [feed(writer, run_documents(5)) for _ in range(2)]
    await_true(lambda: read_status(directory).attempts > 1)
    documents = list(run_documents(EVENTS))
    uids.append(documents[0][1]["uid"])
    phases = {
        "open": lambda: await_rows(raw, uids[-1], 2),
        "cut": lambda: await_true(lambda: read_status(directory).error),
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
    assert not read_status(directory).error


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
    assert Deliverer(tmp_path, api_key=raw.context.api_key).run(timeout=WAIT)
    assert not left
    assert whole(raw[uid], 5)


@pytest.mark.system
def test_a_killed_deliverer_is_replaced(raw, spool):
    writer = spool()
    documents = list(run_documents(EVENTS))
    uid = documents[0][1]["uid"]
    for number, document in enumerate(documents):
        writer(*document)
        if number in (EVENTS // 4, EVENTS // 2):
            await_rows(raw, uid, 2)
            writer._process.kill()  # in the middle of the run, twice
    assert writer.wait(WAIT)
    assert whole(raw[uid], EVENTS)


DYING = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_spool import run_documents
from dsnet_bluesky.spool import SpooledWriter
writer = SpooledWriter(sys.argv[1], sys.argv[2], deliver=False)
for name, doc in run_documents(1000, stop=False):
    writer(name, doc)
    if name == "event" and doc["seq_num"] == 200:
        print(doc["descriptor"], flush=True)
        time.sleep(600)
"""


@pytest.mark.system
def test_the_run_of_a_killed_process_is_delivered_and_closed(raw, tmp_path):
    directory = tmp_path / "spool"
    command = [sys.executable, "-c", DYING, str(directory), raw.uri, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.kill()
    process.wait()
    (path,) = Spool(directory).waiting()
    with path.open("ab") as file:
        file.write(encode("event", {"torn": 1})[:-3])  # it died while it wrote
    uid = path.stem.split("-", 1)[1]
    assert Deliverer(directory, api_key=raw.context.api_key).run(timeout=WAIT)
    stop = raw[uid].metadata["stop"]
    assert numbers(raw[uid]) == list(range(1, 201))
    assert stop["exit_status"] == "fail"
    assert stop["num_events"] == {"primary": 200}
    assert "process that took this run ended" in stop["reason"]
    assert "bytes of its spool file could not be read" in stop["reason"]
    assert (directory / "damaged" / path.name).exists()
    assert read_status(directory).damaged == 1


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
    command = [sys.executable, "-m", "dsnet_bluesky", "spool", "flush", str(tmp_path)]
    racing = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(WAIT) for process in racing] == [0, 0]
    assert all(whole(raw[uid], 20) for uid in uids)


@pytest.mark.system
def test_a_run_that_is_complete_already_is_left_alone(raw, tmp_path):
    writer = SpooledWriter(tmp_path, raw, deliver=False)
    documents = list(run_documents(3))
    uid = feed(writer, documents)
    key = raw.context.api_key
    while not is_free(writer.spool.waiting()[0]):
        time.sleep(0.01)
    assert Deliverer(tmp_path, api_key=key).run(timeout=WAIT)
    before = raw[uid].item["attributes"]
    feed(writer, documents)
    writer.close()
    assert Deliverer(tmp_path, api_key=key).run(timeout=WAIT)
    assert raw[uid].item["attributes"] == before


@pytest.mark.faults
@pytest.mark.system
def test_a_killed_server_loses_nothing(server, raw, spool):
    """A scan goes on while the server is killed and comes back."""
    events = 200
    writer, documents = spool(), list(run_documents(events))
    uid = documents[0][1]["uid"]
    for number, document in enumerate(documents):
        writer(*document)
        if number == events // 2:
            await_rows(raw, uid, 10)
            os.kill(server.pid, signal.SIGKILL)
    uids = [uid, feed(writer, run_documents(7))]
    server.stop()
    server.start()
    assert writer.wait(WAIT)
    assert [whole(raw[uid], n) for uid, n in zip(uids, (events, 7), strict=True)] == [True, True]


@pytest.mark.system
def test_files_of_detectors_are_never_touched(server, raw, tmp_path, beamline_documents):
    """Nor when a run is removed from the catalog and delivered again."""
    folder = server.data_directory / "detector"
    before = {path: path.read_bytes() for path in folder.rglob("*.h5")}
    beam, key = beamline_documents[0], raw.context.api_key
    seen = []
    for documents in (beam[:-1], beam):  # first without its stop document
        writer = SpooledWriter(tmp_path, raw, deliver=False)
        uid = feed(writer, documents)
        writer.close()
        assert Deliverer(tmp_path, api_key=key).run(timeout=WAIT)
        seen.append(raw[uid].metadata["stop"]["exit_status"])
    assert seen == ["fail", "success"]
    assert before
    assert {path: path.read_bytes() for path in folder.rglob("*.h5")} == before

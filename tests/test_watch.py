"""The watcher under a real server: what comes into the catalog is desmeared, once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bluesky.callbacks.zmq import Publisher
from bluesky_tiled_plugins import TiledWriter
from tiled.queries import Key
from typer.testing import CliRunner

from dsnet_bluesky.callbacks.desmear import desmear_runs
from dsnet_bluesky.cli import app
from dsnet_bluesky.derived import ResultWriter, results
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.server import Server
from dsnet_bluesky.watch import Backlog, Watcher, follow_documents, read_status, serve_metrics
from dsnet_bluesky.watch.feeds import load_document

CONFIG = Config(method="lake")
"""The default of `dsnet-bluesky watch --method lake`; quick."""

WAIT = 60.0


def eventually(holds: Callable[[], Any], what: str = "", within: float = WAIT) -> Any:
    """Return what a condition gives as soon as it gives something."""
    end = time.monotonic() + within
    # A result that failed is an empty container, which is false.
    while (found := holds()) is None or found is False:
        assert time.monotonic() < end, what or holds
        time.sleep(0.05)
    return found


@contextmanager
def watching(server: Any, **options: Any) -> Iterator[Watcher]:
    """A watcher with a client of its own, on a thread."""
    watcher = Watcher(server.client(), config=CONFIG, **{"since": time.time() - 5, "scan_interval": 1.0, **options})
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        yield watcher
    finally:
        watcher.stop()
        thread.join(WAIT)
        assert not thread.is_alive()


def complete(line: Any, uid: str) -> Callable[[], Any]:
    """Whether a run's one result is complete; gives it."""

    def holds() -> Any:
        found = line.results(uid)
        return found[0] if found and found[0].metadata["status"] == "complete" else None

    return holds


def test_exposures_are_desmeared_while_the_run_goes_on(served, served_line):
    line = served_line
    line.beam()
    seen = []

    def hold(name: str, doc: Any) -> None:
        # On the RunEngine's thread: the plan waits here, so what is stored now is stored live.
        if name == "event" and watched:
            uid = [start for what, start in line.docs if what == "start"][-1]["uid"]
            eventually(lambda: any(r.metadata["exposures"] >= doc["seq_num"] for r in line.results(uid)))
            seen.append(line.results(uid)[0].metadata["status"])

    watched = True
    line.engine.subscribe(hold)
    with watching(served, since=time.time()) as watcher:  # not what another test left a moment ago
        uid = line.sample(exposures=3)
        node = eventually(complete(line, uid))
        assert seen == ["running"] * 3
        assert watcher.statistics.exposures == 3
    result = node.read()
    assert len(np.unique(result["I_smeared"].values[:, 10])) == 3, "each exposure once"
    assert node.metadata["pairing"]["how"] == "nearest"
    assert node.metadata["deferred"] is None
    assert eventually(lambda: uid in line.client["curves"])


def test_what_was_taken_before_is_found_and_done_once(served, served_line):
    line = served_line
    since = time.time() - 1
    line.beam()
    uids = [line.sample(exposures=2) for _ in range(2)]
    with watching(served, since=since) as watcher:
        for uid in uids:
            eventually(complete(line, uid))
    assert watcher.statistics.exposures == 4
    assert all(line.result(uid).metadata["deferred"] == "Found in the backlog: new." for uid in uids)
    with watching(served, since=since) as again:
        eventually(lambda: again._next_scan > 0)
        eventually(lambda: not again.in_hand)
    assert again.statistics.exposures == again.statistics.stored_before == 0
    assert list(Backlog(line.client, CONFIG, since=since).scan(whole=True)) == []
    other = [task.run_uid for task in Backlog(line.client, Config(method="map"), since=since).scan(whole=True)]
    assert set(other) >= set(uids), "with another configuration all is to do"


def test_sample_without_direct_beam_fails_and_is_done_when_one_arrives(RE, served, served_line):
    """The spool may deliver the direct beam late: until then the result says what is missing."""
    line = served_line
    late: list[tuple[str, Any]] = []
    line.beam()
    beam_uid, documents = line.docs[0][1]["uid"], list(line.docs)
    line.client["raw"].delete_contents(beam_uid, recursive=True, external_only=False)
    late += documents
    with watching(served) as watcher:
        uid = line.sample(direct_beam_uid=beam_uid)
        failed = eventually(lambda: next((r for r in line.results(uid) if r.metadata["status"] == "failed"), None))
        assert f"direct beam {beam_uid} is named for this run, but the catalog does not hold it" in failed.reason
        assert failed.metadata["failure"]["kind"] == "direct_beam"
        writer = TiledWriter(line.client["raw"], batch_size=1)
        for name, doc in late:
            writer(name, doc)
        both = eventually(lambda: found if len(found := line.results(uid)) == 2 else None)
        good = eventually(lambda: next((r for r in line.results(uid) if r.metadata["status"] == "complete"), None))
        assert {r.item["id"] for r in both} == {failed.item["id"], good.item["id"]}, "the failure is kept"
        assert good.metadata["pairing"]["how"] == "named"
        eventually(lambda: not watcher.in_hand)


def test_direct_beam_that_arrives_while_a_request_fails_is_not_overlooked(delivered, monkeypatch):
    line, writer = delivered
    beam, documents = line.beam(), list(line.docs)
    line.docs.clear()
    sample = line.sample(direct_beam_uid=beam)
    line.deliver(writer)
    backlog = Backlog(line.client, CONFIG)
    list(backlog.scan())
    desmear_runs(line.client, [sample], config=CONFIG)
    for name, doc in documents:
        writer(name, doc)
    with monkeypatch.context() as planted:
        planted.setattr(Backlog, "tasks", fails)
        with pytest.raises(httpx.ReadTimeout):
            list(backlog.scan())
    assert [task.why for task in backlog.scan()] == ["waits for a direct beam"]
    assert list(backlog.scan()) == []


def test_clock_that_is_set_while_a_request_fails_is_not_overlooked(make_client, store_raw_run, monkeypatch):
    client = make_client()
    store_raw_run(client, "once-too-old", time=time.time() - 3000)
    store_raw_run(client, "new-enough", time=time.time())
    monkeypatch.setattr("dsnet_bluesky.watch.backlog.OVERLAP", 0)
    backlog, now = Backlog(client, CONFIG, max_age=2000), time.time
    assert "once-too-old" not in [task.run_uid for task in backlog.scan()]
    monkeypatch.setattr("dsnet_bluesky.watch.backlog.time.time", lambda: now() - 2000)
    with monkeypatch.context() as planted:
        planted.setattr(Backlog, "tasks", fails)
        with pytest.raises(httpx.ReadTimeout):
            list(backlog.scan())
    assert "once-too-old" in [task.run_uid for task in backlog.scan()]


def fails(*_: Any, **__: Any) -> Any:
    """What a request does while the server is restarted."""
    raise httpx.ReadTimeout("planted")


def test_two_watchers_share_the_work_and_store_nothing_twice(served, served_line):
    line = served_line
    since = time.time() - 1
    line.beam()
    uids = [line.sample(exposures=2) for _ in range(5)]
    with watching(served, since=since) as one, watching(served, since=since) as other:
        for uid in uids:
            eventually(complete(line, uid))
        eventually(lambda: not one.in_hand + other.in_hand)
    for uid in uids:
        assert line.result(uid).read().sizes["exposure"] == 2
    assert one.statistics.exposures + other.statistics.exposures == 10
    assert one.statistics.failed + other.statistics.failed == 0


def test_a_watcher_that_stops_gives_its_run_back(served, served_line):
    line = served_line
    line.beam()
    since = time.time()
    claims: list[Any] = []

    def change(name: str, doc: Any) -> None:
        # On the RunEngine's thread: the plan waits until the first watcher has gone and the second has come.
        if name == "event" and doc["seq_num"] == 2 and not claims:
            eventually(lambda: first.statistics.exposures == 2)
            watchers.close()
            uid = [start for what, start in line.docs if what == "start"][-1]["uid"]
            claims.append(line.result(uid).metadata["writer"]["claim"])
            seconds.append(watchers.enter_context(watching(served, since=since)))

    seconds: list[Watcher] = []
    with ExitStack() as watchers:
        first = watchers.enter_context(watching(served, since=since))
        line.engine.subscribe(change)
        uid = line.sample(exposures=4)
        node = eventually(complete(line, uid))
    assert claims == [None]
    assert seconds[0].statistics.exposures == 4
    assert len(np.unique(node.read()["I_smeared"].values[:, 10])) == 4


def test_result_of_a_run_that_is_deleted_while_it_goes_on_is_given_up(delivered, monkeypatch):
    line, writer = delivered
    beam = line.beam()
    line.deliver(writer)
    uid = line.sample(exposures=2, direct_beam_uid=beam)
    line.deliver(writer, ended=False)
    monkeypatch.setattr(results, "CLAIM_INTERVAL", 0.1)
    watcher = Watcher(line.client, config=CONFIG, scan_interval=0.2)
    monkeypatch.setattr(watcher, "_subscribe", lambda: None)  # a client within this process has no hints

    def turned(holds: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: (watcher.turn(), holds())[1]

    eventually(turned(lambda: watcher.statistics.exposures == 2))
    line.client["raw"].delete_contents(uid, recursive=True, external_only=False)
    eventually(turned(lambda: watcher.in_hand == 0))
    said = line.result(uid).metadata
    assert (said["status"], said["writer"]["claim"]) == ("running", None), "whoever finds the run again may begin it at once"
    time.sleep(0.3)
    watcher.turn()
    assert line.result(uid).metadata["updated"] == said["updated"]


def test_files_that_come_late_and_files_that_are_broken(served, served_line):
    line = served_line
    since = time.time() - 1
    line.beam()
    late, broken = line.sample(), line.sample(exposures=2)
    away = line.file_of(late).with_suffix(".away")
    line.file_of(late).rename(away)
    line.file_of(broken).write_bytes(b"no HDF5 at all")
    with watching(served, since=since):
        eventually(lambda: any(r.metadata["status"] == "failed" for r in line.results(broken)))
        away.rename(line.file_of(late))
        eventually(complete(line, late))
    said = line.result(broken).metadata
    assert "cannot be opened as HDF5" in said["reason"]
    assert said["failure"]["kind"] == "input"
    assert broken not in {task.run_uid for task in Backlog(line.client, CONFIG, since=since).scan(whole=True)}, "tried once"


def test_sample_without_exposures_fails_once(served, store_raw_run):
    client = served.client()
    uid, now = f"empty-{time.time()}", time.time()
    run = store_raw_run(client, uid, time=now)
    run.update_metadata({"stop": {"uid": "s", "run_start": uid, "time": now, "exit_status": "abort", "num_events": {}}})
    with watching(served) as watcher:
        eventually(lambda: len(client["desmeared"].search(Key("raw_uid") == uid)) == 1)
        eventually(lambda: not watcher.in_hand)
    (node,) = client["desmeared"].search(Key("raw_uid") == uid).values()
    assert "holds no exposure" in node.reason
    assert uid not in {task.run_uid for task in Backlog(client, CONFIG, since=now - 5).scan(whole=True)}


def test_errors_of_the_catalog_do_not_end_the_watcher(served, served_line, monkeypatch):
    line = served_line
    line.beam()
    scan, failures = Backlog.scan, iter([ValueError("planted"), httpx.ReadTimeout("planted"), KeyError("planted")])

    def fail(self: Any, **options: Any) -> Any:
        if error := next(failures, None):
            raise error
        return scan(self, **options)

    monkeypatch.setattr(Backlog, "scan", fail)
    with watching(served) as watcher:
        uid = line.sample()
        eventually(complete(line, uid))
        eventually(lambda: watcher.statistics.errors == 2, "a time-out is no error of ours")


def test_a_server_that_is_away_costs_no_core_and_gives_hints_when_it_is_back(tmp_path, empty_database, store_raw_run):
    shutil.copy(empty_database, tmp_path / "catalog.db")

    def listening() -> bool:
        return any(thread.name == "hints" for thread in threading.enumerate())

    with Server(tmp_path, timeout=200) as server, watching(server, scan_interval=4.0) as watcher:
        eventually(listening)
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: watcher.away != "")
        eventually(lambda: not listening())
        begin = time.process_time()
        for _ in range(30):
            time.sleep(0.1)
            assert not listening(), "not tried again with every look whether the server is back"
        assert time.process_time() - begin < 1.0
        server.stop()
        server.start()
        eventually(lambda: watcher.away == "")
        eventually(listening)
        time.sleep(1.0)  # until it is connected
        store_raw_run(server.client(), "hinted", time=time.time())
        eventually(lambda: watcher.in_hand == 1, within=2.0)


def test_faults_of_the_program_are_tried_three_times(served, served_line, monkeypatch):
    line = served_line
    since = time.time() - 1
    line.beam()
    uid = line.sample()
    monkeypatch.setattr("dsnet_bluesky.watch.backlog.INTERNAL_WAIT", 0.0)
    with monkeypatch.context() as planted, watching(served, since=since) as watcher:
        planted.setattr("dsnet_bluesky.callbacks.pairing.prepare_exposures", lambda *a, **k: 1 / 0)
        eventually(lambda: any(r.metadata["attempts"] == 3 for r in line.results(uid)))
        eventually(lambda: line.result(uid).metadata["status"] == "failed")
        time.sleep(2.5)  # two more scans
        assert watcher.statistics.errors == 3
    said = line.result(uid).metadata
    assert said["failure"]["kind"] == "internal"
    assert re.fullmatch("[0-9a-f]{12}", said["failure"]["traceback"])
    assert said["failure"]["traceback"] in said["reason"]
    assert desmear_runs(line.client, [uid], config=CONFIG).exposures == 1, "a user may still ask for it"


def test_backlog_waits_for_living_writers_only(client, store_raw_run, monkeypatch):
    start = store_raw_run(client, "backlog-run", time=time.time()).metadata["start"]
    backlog = Backlog(client, CONFIG, since=time.time() - 60)
    config = CONFIG.to_dict()
    metadata = result_metadata(start, direct_beam_uid=None, config=config, config_sha256=CONFIG.sha256, method="lake")

    def tasks() -> list[tuple[str, str]]:
        return [(task.run_uid, task.why) for task in backlog.scan(whole=True)]

    assert tasks() == [("backlog-run", "new")]
    writer = ResultWriter.create(client, "backlog-result", metadata)
    assert tasks() == []
    writer.node.update_metadata({"writer": {**writer.node.metadata["writer"], "host": "elsewhere"}})
    monkeypatch.setattr(results, "LEASE", 0.2)
    assert tasks() == []
    time.sleep(0.3)
    assert tasks() == [("backlog-run", "abandoned by another process")]
    other = {**config, "bins": 100}
    assert [t.run_uid for t in Backlog(client, Config(method="lake", bins=100)).scan(whole=True)] == ["backlog-run"], other


def test_health_metrics_and_status(served, served_line):
    line = served_line
    line.beam()
    with watching(served) as watcher:
        server = serve_metrics(watcher, 0)
        address = f"http://127.0.0.1:{server.server_port}"
        uid = line.sample(exposures=2)
        eventually(complete(line, uid))
        said = httpx.get(f"{address}/healthz").json()
        assert (said["healthy"], said["catalog"], said["exposures"]) == (True, "ok", 2)
        metrics = httpx.get(f"{address}/metrics").text
        assert "dsnet_exposures_total 2.0" in metrics
        assert "dsnet_lag_seconds" in metrics
        status = read_status(line.client, config=CONFIG, since=time.time() - 5, watchers=[address, "http://127.0.0.1:9"])
        server.shutdown()
        server.server_close()
    assert status.last[0].raw_uid == uid
    assert status.last[0].exposures == 2
    assert status.completed_hour >= 1
    assert status.watchers[address]["healthy"]
    assert not status.watchers["http://127.0.0.1:9"]["healthy"]
    shown = CliRunner().invoke(app, ["status", "--method", "lake", "--json", "--uri", served.uri, "--api-key", served.api_key])
    assert json.loads(shown.stdout)["last"][0]["raw_uid"] == uid
    table = CliRunner().invoke(app, ["status", "--method", "lake", "--uri", served.uri, "--api-key", served.api_key])
    assert uid[:8] in table.stdout


def test_clients_that_say_nothing_do_not_hide_the_watcher(client, monkeypatch, capfd):
    """A port scanner, or a load balancer that keeps a connection ready."""
    monkeypatch.setattr("dsnet_bluesky.watch.metrics._Quiet.timeout", 4.0)
    with serving(Watcher(client, config=CONFIG)) as (host, port), ExitStack() as silent:
        connections = [silent.enter_context(socket.create_connection((host, port))) for _ in range(3)]
        for path in ("healthz", "metrics"):
            assert httpx.get(f"http://{host}:{port}/{path}", timeout=3.0).status_code == 200
        connections[0].settimeout(WAIT)
        assert connections[0].recv(1) == b"", "after a while they are left"
    assert "Traceback" not in capfd.readouterr().err


@contextmanager
def serving(watcher: Watcher) -> Iterator[tuple[str, int]]:
    """What says how a watcher is, as long as the context lasts."""
    server = serve_metrics(watcher, 0)
    try:
        yield "127.0.0.1", server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_another_direct_beam_makes_another_result(served, served_line):
    line = served_line
    first, second = line.beam(), line.beam()
    uid = line.sample(direct_beam_uid=first)
    desmear_runs(line.client, [uid], config=CONFIG)
    arguments = ["pair", uid, "--direct-beam", second, "--method", "lake", "--uri", served.uri, "--api-key", served.api_key]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    pairings = {r.metadata["direct_beam_uid"]: r.metadata["pairing"]["how"] for r in line.results(uid)}
    assert pairings == {first: "named", second: "by hand"}
    arguments[1] = "no-such-run"
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "holds no run no-such-run" in refused.stderr


@pytest.fixture
def proxy() -> Iterator[tuple[str, str]]:
    """A 0MQ proxy of bluesky in a process of its own: addresses in and out."""
    code = "from bluesky.callbacks.zmq import Proxy; p = Proxy(); print(p.in_port, p.out_port, flush=True); p.start()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ports = [address.rpartition(":")[2] for address in process.stdout.readline().split()]
    yield (f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    process.kill()
    process.wait()
    process.stdout.close()


def test_documents_from_a_proxy_serve_too(served, served_line, proxy):
    """The same callback as beside a RunEngine; what the network loses is done from the catalog."""
    line = served_line
    publisher = Publisher(proxy[0])
    lossy = threading.Event()

    def publish(name: str, doc: Any) -> None:
        if not (lossy.is_set() and name == "stream_datum" and doc["indices"]["start"] == 1):
            publisher(name, doc)

    line.engine.subscribe(publish)
    with follow_documents(proxy[1], served.client(), config=CONFIG, max_beam_age=3600.0) as desmear:
        assert desmear is not None
        time.sleep(1.0)  # a subscriber of 0MQ misses what was sent before it was connected
        beam = line.beam()
        whole = line.sample(exposures=3, direct_beam_uid=beam)
        node = eventually(complete(line, whole))
        assert node.metadata["deferred"] is None
        assert desmear.statistics.deferred == 0
        lossy.set()
        gaps = line.sample(exposures=3, direct_beam_uid=beam)
        node = eventually(complete(line, gaps))
        assert len(np.unique(node.read()["I_smeared"].values, axis=0)) == 3, "each exposure once"
        assert desmear.statistics.deferred == 1
    publisher.close()


def test_documents_are_data_not_programs():
    document = {"data": {"x": np.float64(1.5), "a": np.arange(3.0)}, "seq": [1, (2, None)], "uid": "u"}
    loaded = load_document(pickle.dumps(document))
    assert loaded["data"]["x"] == 1.5
    np.testing.assert_array_equal(loaded["data"]["a"], [0.0, 1.0, 2.0])

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    with pytest.raises(pickle.UnpicklingError, match=r"may not hold a posix\.system"):
        load_document(pickle.dumps({"data": Evil()}))


def start_watcher(server: Any, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start ``dsnet-bluesky watch`` as an operator does."""
    command = [sys.executable, "-m", "dsnet_bluesky", "watch", "--method", "lake", "--interval", "1", *arguments]
    environment = {**os.environ, "TILED_URI": server.uri, "TILED_API_KEY": server.api_key}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def test_service_ends_cleanly_on_sigterm(served, served_line, tmp_path):
    line = served_line
    line.beam()
    process = start_watcher(served, "--since", "0.0001", log=tmp_path / "watch.log")
    eventually(lambda: "Watching" in (tmp_path / "watch.log").read_text())  # or the run may be too old for it
    uid = line.sample(exposures=2)
    eventually(complete(line, uid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, (tmp_path / "watch.log").read_text()
    assert "Traceback" not in (tmp_path / "watch.log").read_text()

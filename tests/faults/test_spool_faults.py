"""What kills, fills or confuses: the spool delivers everything, each event once. With real servers, processes and disks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from dsnet_bluesky.cli import app
from dsnet_bluesky.server import Server
from dsnet_bluesky.spool import Deliverer, SpooledWriter, deliver, read_status
from dsnet_bluesky.spool import writer as spool_writer
from dsnet_bluesky.spool.files import Spool, encode
from tests.faults import spooling
from tests.faults.services import fill
from tests.faults.spooling import WAIT, Beamline, await_begun, await_true, feed, numbers, run_documents, spooled, whole

pytestmark = [pytest.mark.faults, pytest.mark.system]

NOWHERE = "http://127.0.0.1:9/api/v1/metadata/raw"
EVENTS = 200
YEAR = 365 * 86_400.0


@pytest.fixture(scope="module")
def make_server(empty_database):
    """Make a server of raw runs, not started yet; arguments change the arguments of its tree."""

    def make(directory, *, redis=None, **changes):
        made = Server(directory, timeout=WAIT)
        config = yaml.safe_load(made.config.read_text())
        (raw,) = (tree for tree in config["trees"] if tree["path"] == "/raw")
        if "uri" not in changes:
            shutil.copy(empty_database, made.data_directory / "catalog.db")
            del raw["args"]["init_if_not_exists"]
        raw["args"] |= changes
        cache = {"streaming_cache": {"uri": f"redis://127.0.0.1:{redis.port}"}} if redis else {}
        made.config.write_text(yaml.safe_dump(config | {"trees": [raw]} | cache))
        return made

    return make


@pytest.fixture(scope="module")
def server(make_server, tmp_path_factory):
    """A server of this module alone: it may be killed, but runs at the end of each test."""
    with make_server(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def raw(server):
    return server.client()["raw"]


@pytest.fixture
def make_writer(tmp_path, raw, monkeypatch):
    """Make a writer whose deliverer is a process of its own; its spool is empty at the end."""
    monkeypatch.setattr(spool_writer, "RESTART_INTERVAL", 0.5)
    writers = []

    def make(target=raw, **options):
        writers.append(SpooledWriter(tmp_path / "spool", target, **options))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()
    if writers:
        await_true(lambda: not read_status(tmp_path / "spool").delivering)


@pytest.fixture(scope="module")
def line(server):
    """The simulated beamline; its detector writes where the server reads."""
    made = Beamline(server.data_directory / "detector")
    yield made
    made.close()


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.h5")}


def flush(directory, key):
    """Run `spool flush` in a process of its own; returns its status."""
    command = [sys.executable, "-m", "dsnet_bluesky", "spool", "flush", str(directory)]
    return subprocess.run(command, env={**os.environ, "TILED_API_KEY": key}, timeout=WAIT, check=False).returncode


# -- processes that are killed --


def test_a_killed_server_loses_nothing(server, raw, make_writer, line):
    """A scan with files goes on while the server is killed, and another begins, before it comes back."""
    folder = server.data_directory / "detector"
    documents = line.documents(line.exposures(EVENTS))
    before, uid = digests(folder), documents[0][1]["uid"]
    writer = make_writer()
    half = len(documents) // 2
    for document in documents[:half]:
        writer(*document)
    await_begun(raw, uid)
    os.kill(server.pid, signal.SIGKILL)
    for document in documents[half:]:
        writer(*document)
    second = feed(writer, run_documents(EVENTS))
    server.stop()
    server.start()
    assert writer.wait(WAIT)
    assert whole(raw[uid], EVENTS)
    assert whole(raw[second], EVENTS)
    assert raw[uid]["primary"]["pilatus"].shape[0] == EVENTS
    assert digests(folder) == before


def scan_until_killed(server, directory, *options):
    """Take exposures in a process that is killed after EVENTS; returns the uid, how many were taken, and digests of the files."""
    folder = server.data_directory / "detector" / uuid.uuid4().hex
    folder.mkdir()
    command = [sys.executable, spooling.__file__, str(directory), f"{server.uri}/api/v1/metadata/raw", str(folder), *options]
    with subprocess.Popen(command, env={**os.environ, "TILED_API_KEY": server.api_key}, stdout=subprocess.PIPE) as process:
        taken = 0
        while taken < EVENTS:
            taken = int(process.stdout.readline())
        process.kill()
        taken = int((process.stdout.read().split() or [taken])[-1])
    assert len(digests(folder)) == 1
    (path,) = Spool(directory).waiting()
    return path.stem.split("-", 1)[1], taken, folder, digests(folder)


def assert_closed(run, taken):
    """What was taken is there, perhaps one more, whose number was not printed any more; and the run has an end."""
    stop = run.metadata["stop"]
    found = numbers(run)
    assert found in (list(range(1, taken + 1)), list(range(1, taken + 2)))
    assert stop["exit_status"] == "fail"
    assert stop["num_events"]["primary"] == len(found)
    assert "process that took this run ended" in stop["reason"]
    return stop


def test_flush_delivers_what_a_killed_run_engine_took(server, raw, tmp_path):
    directory = tmp_path / "spool"
    uid, taken, folder, before = scan_until_killed(server, directory)
    (path,) = Spool(directory).waiting()
    with path.open("ab") as file:
        file.write(encode("event", {"torn": 1})[:-3])  # it died while it wrote
    assert flush(directory, server.api_key) == 0
    stop = assert_closed(raw[uid], taken)
    assert "bytes of its spool file could not be read" in stop["reason"]
    assert (directory / "damaged" / path.name).exists()
    assert read_status(directory).damaged == 1
    assert digests(folder) == before


def test_the_deliverer_left_behind_delivers_what_a_killed_run_engine_took(server, raw, tmp_path):
    directory = tmp_path / "spool"
    uid, taken, folder, before = scan_until_killed(server, directory, "--deliver")
    await_true(lambda: not read_status(directory).runs and not read_status(directory).delivering)
    assert_closed(raw[uid], taken)
    assert digests(folder) == before


def test_a_killed_deliverer_is_replaced(raw, make_writer):
    writer, documents = make_writer(), list(run_documents(EVENTS))
    uid = documents[0][1]["uid"]
    for document in documents[: EVENTS // 2]:
        writer(*document)
    await_begun(raw, uid)
    writer._process.kill()  # while the run is open
    for document in documents[EVENTS // 2 :]:
        writer(*document)
    killed = writer._process
    await_true(lambda: writer._process is not killed and read_status(writer.spool.directory).delivering)
    writer._process.kill()  # when it is over
    assert writer.wait(WAIT)
    assert whole(raw[uid], EVENTS)


# -- disks that are full --


def await_alarm(directory, text):
    await_true(lambda: text in (alarm := read_status(directory).alarm) and bool(alarm) == bool(text))


def test_on_a_full_disk_documents_wait_in_memory_until_there_is_room(raw, make_disk):
    disk = make_disk("1m")
    writer = SpooledWriter(disk, raw, deliver=False)
    first, second = list(run_documents(EVENTS)), list(run_documents(EVENTS))
    for document in first[:50]:
        writer(*document)
    fill(disk)
    uids = [feed(writer, first[50:]) and first[0][1]["uid"], feed(writer, second)]  # the second has no file yet
    await_alarm(disk, "wait in memory")
    assert uids[0] in read_status(disk).alarm
    (disk / "filler").unlink()
    await_alarm(disk, "")
    writer.close()
    for path, sent in zip(writer.spool.waiting(), (first, second), strict=True):
        assert [doc["uid"] for _, doc in spooled(path)] == [doc["uid"] for _, doc in sent]
    assert Deliverer(disk, api_key=raw.context.api_key).run(timeout=WAIT)
    assert all(whole(raw[uid], EVENTS) for uid in uids)


def test_what_memory_cannot_hold_is_lost_and_counted(raw, make_disk):
    disk = make_disk("1m")
    writer = SpooledWriter(disk, raw, deliver=False, memory=10_000)
    documents = list(run_documents(EVENTS))
    for document in documents[:10]:
        writer(*document)
    fill(disk)
    feed(writer, documents[10:])
    await_alarm(disk, "documents lost")
    (disk / "filler").unlink()
    writer.close()
    kept = Counter(name for name, _ in spooled(writer.spool.waiting()[0]))["event"]
    assert 8 <= kept < EVENTS / 2
    assert f"{EVENTS - kept} event" in read_status(disk).alarm
    assert Deliverer(disk, api_key=raw.context.api_key).run(timeout=WAIT)
    run = raw[documents[0][1]["uid"]]
    assert numbers(run) == list(range(1, kept + 1))
    assert run.metadata["stop"]["exit_status"] == "fail"
    assert f"{EVENTS - kept} event" in run.metadata["stop"]["reason"]


def test_delivery_goes_on_when_the_disk_of_the_server_has_room_again(make_server, make_disk, make_writer):
    disk = make_disk("48m")
    with make_server(disk / "data") as server:
        raw = server.client()["raw"]
        writer, documents = make_writer(raw), list(run_documents(EVENTS))
        uid = documents[0][1]["uid"]
        for document in documents[:50]:
            writer(*document)
        await_begun(raw, uid)
        fill(disk)
        for document in documents[50:]:
            writer(*document)
        second = feed(writer, run_documents(EVENTS))
        await_true(lambda: any(run.attempts for run in read_status(writer.spool.directory).runs))
        (disk / "filler").unlink()
        assert writer.wait(WAIT)
        assert whole(raw[uid], EVENTS)
        assert whole(raw[second], EVENTS)
        writer.close()


# -- services and clocks --


def test_restarts_of_postgresql_and_redis_lose_nothing(make_server, make_writer, postgresql, redis, tmp_path):
    """Redis loses its memory; PostgreSQL ends as by a power failure, and recovers."""
    uri, storage = f"postgresql+asyncpg://{postgresql.address}", [str(tmp_path / "store"), f"postgresql://{postgresql.address}"]
    with make_server(tmp_path / "data", redis=redis, uri=uri, writable_storage=storage) as server:
        raw = server.client()["raw"]
        writer, documents = make_writer(raw), list(run_documents(EVENTS))
        uid = documents[0][1]["uid"]
        for number, document in enumerate(documents):
            writer(*document)
            if number == EVENTS // 4:
                await_begun(raw, uid)
                postgresql.restart()
            elif number == EVENTS // 2:
                redis.stop()
            elif number == EVENTS * 3 // 4:
                time.sleep(1.0)  # events go on without it
                redis.start()
        second = feed(writer, run_documents(EVENTS))
        assert writer.wait(WAIT)
        writer.close()
        await_true(lambda: not read_status(writer.spool.directory).delivering)

        def both_whole():
            with contextlib.suppress(httpx.HTTPStatusError):  # what is left of broken connections
                return whole(raw[uid], EVENTS) and whole(raw[second], EVENTS)

        await_true(both_whole)


def test_clocks_that_jump_change_nothing(raw, tmp_path, monkeypatch):
    """By a year, at every look; runs come from the future and from the past, and so do their files."""
    writer = SpooledWriter(tmp_path, raw, deliver=False)
    now, jumps = time.time, itertools.cycle((0.0, YEAR, -YEAR))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    starts = (now() + 70 * YEAR, 1.0, now())
    uids = [feed(writer, run_documents(EVENTS, begin=start)) for start in starts]
    writer.close()
    for path, age in zip(writer.spool.waiting(), (YEAR, -YEAR, 0.0), strict=True):
        os.utime(path, (now() - age, now() - age))
    assert all(0 <= run.age < 3 * YEAR for run in read_status(tmp_path).runs)
    assert Deliverer(tmp_path, api_key=raw.context.api_key).run(timeout=WAIT)
    assert all(whole(raw[uid], EVENTS) for uid in uids)
    assert [raw[uid].metadata["start"]["time"] for uid in uids] == list(starts)


def test_with_a_wrong_key_runs_wait_and_the_status_says_so(server, raw, make_writer, monkeypatch):
    wrong = make_writer(raw.uri, api_key="wrong")
    uid, directory = feed(wrong, run_documents(EVENTS)), wrong.spool.directory
    await_true(lambda: read_status(directory).attempts >= deliver.PATIENCE)
    wrong.close()
    spool = functools.partial(CliRunner().invoke, app)
    status = json.loads(spool(["spool", "status", str(directory), "--json"]).output)
    assert "401" in status["error"]
    assert (status["waiting"], status["refused"]) == (1, 0)
    monkeypatch.setenv("TILED_API_KEY", "wrong")
    assert spool(["spool", "flush", str(directory), "--timeout", "1"]).exit_code == 1
    monkeypatch.setenv("TILED_API_KEY", server.api_key)
    assert spool(["spool", "flush", str(directory)]).exit_code == 0
    assert whole(raw[uid], EVENTS)
    assert not read_status(directory).error

"""What the watcher depends on is killed with two hundred exposures on their way; counted is at the end."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
import yaml
from tiled.queries import Key

from dsnet_bluesky.ingest import ingest
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.server import Server
from dsnet_bluesky.watch import Watcher
from tests.faults.services import PostgreSQL, Redis, fill

pytestmark = [pytest.mark.faults, pytest.mark.system]

RUNS, EXPOSURES = 5, 40
YEAR = 365 * 86_400.0
WAIT = 200.0


def eventually(holds: Callable[[], bool], what: str, within: float = WAIT) -> None:
    """Wait until a condition holds; an error of a server that is away, or whose connections were broken, does not count."""
    end = time.monotonic() + within
    while True:
        with suppress(httpx.TransportError, httpx.HTTPStatusError):
            if holds():
                return
        assert time.monotonic() < end, what
        time.sleep(0.05)  # watchers are quick


class Archive:
    """Two hundred exposures of samples and their direct beam, in files that a server may read."""

    def __init__(self, folder: Path, frame: np.ndarray, beam: np.ndarray):
        self.folder = folder
        random = np.random.default_rng(3)
        self.files = [self._write(f"sample-{run}", random.poisson(frame + 1, (EXPOSURES, *frame.shape))) for run in range(RUNS)]
        self.beam = self._write("beam", beam[None])
        self.digests = self._digests()
        self.uids: list[str] = []

    def register(self, client: Any, poni: dict[str, Any]) -> None:
        """Make runs of the files."""
        (beam,) = ingest([self.beam], client=client, purpose="direct_beam", poni=poni)
        self.uids = ingest(self.files, client=client, purpose="sample", poni=poni, sample="latex", direct_beam=beam)

    def exposures(self, client: Any) -> int:
        """Exposures that are stored so far."""
        return sum(node.metadata["exposures"] for node in client["desmeared"].values())

    def is_done(self, client: Any) -> bool:
        """Whether every run has a complete result."""
        done = client["desmeared"].search(Key("status") == "complete")
        return {node.metadata["raw_uid"] for node in done.values()} == set(self.uids)

    def check(self, client: Any) -> None:
        """Nothing is lost, nothing is there twice, no raw byte has changed."""
        results = list(client["desmeared"].values())
        assert sorted(node.metadata["raw_uid"] for node in results) == sorted(self.uids)
        for node in results:
            result = node.read()
            assert node.metadata["exposures"] == result.sizes["exposure"] == EXPOSURES
            assert set(result["status"].values) == {"ok"}
            assert len(np.unique(result["I_smeared"].values, axis=0)) == EXPOSURES, "each exposure once"
        assert self._digests() == self.digests

    def _write(self, name: str, frames: np.ndarray) -> Path:
        path = self.folder / f"{name}.h5"
        with h5py.File(path, "w") as file:
            file["entry/data/data"] = frames.astype(np.int32)
        return path

    def _digests(self) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in [*self.files, self.beam]]


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    """A server of one's own, to be killed and started again."""
    (tmp_path / "data").mkdir()
    shutil.copy(empty_database, tmp_path / "data" / "catalog.db")
    with Server(tmp_path / "data") as running:
        yield running


@pytest.fixture
def archive(tmp_path: Path, sample_frames: np.ndarray, beam_frame: np.ndarray) -> Archive:
    (tmp_path / "data" / "detector").mkdir(parents=True, exist_ok=True)
    return Archive(tmp_path / "data" / "detector", sample_frames[0], beam_frame)


@contextmanager
def watcher(server: Server, log: Path, method: str = "lake") -> Iterator[subprocess.Popen[bytes]]:
    """The service as an operator starts it."""
    command = [sys.executable, "-m", "dsnet_bluesky", "watch", "--method", method, "--interval", "1", "--since", "1e5"]
    environment = {**os.environ, "TILED_URI": server.uri, "TILED_API_KEY": server.api_key}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
        if process.returncode is None:  # nobody killed it
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()


def test_a_killed_watcher_is_replaced(server, archive, poni, tmp_path):
    client = server.client()
    archive.register(client, poni)
    with watcher(server, tmp_path / "second.log") as second:
        second.send_signal(signal.SIGSTOP)  # it is there, but does nothing until the first is dead
        command = [*second.args]  # type: ignore[misc]
        environment = {**os.environ, "TILED_URI": server.uri, "TILED_API_KEY": server.api_key}
        with (tmp_path / "first.log").open("ab") as log:
            first = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        eventually(lambda: archive.exposures(client) >= 40, "the first watcher works")
        first.kill()
        first.wait()
        assert not archive.is_done(client)
        second.send_signal(signal.SIGCONT)
        eventually(lambda: archive.is_done(client), "the second watcher finishes")
    archive.check(client)


def test_two_watchers_race(server, archive, poni, tmp_path):
    client = server.client()
    with watcher(server, tmp_path / "one.log"), watcher(server, tmp_path / "other.log"):
        archive.register(client, poni)
        eventually(lambda: archive.is_done(client), "both finish")
    archive.check(client)


def test_a_killed_server_comes_back(server, archive, poni, tmp_path):
    archive.register(server.client(), poni)
    with watcher(server, tmp_path / "watch.log"):
        for least in (20, 100):
            eventually(partial(_has, archive, server.client(), least), "the watcher works")
            os.kill(server.pid, signal.SIGKILL)
            time.sleep(1.0)
            server.stop()
            server.start()
        client = server.client()
        eventually(lambda: archive.is_done(client), "the watcher goes on")
    archive.check(client)


def _has(archive: Archive, client: Any, least: int) -> bool:
    return archive.exposures(client) >= least


def on_services(server: Server, postgresql: PostgreSQL, redis: Redis) -> Server:
    """Let a server that is not started yet use these services."""
    config = yaml.safe_load(server.config.read_text())
    for tree in config["trees"]:
        tree["args"]["uri"] = f"postgresql+asyncpg://{postgresql.address}"
    config["trees"][0]["args"]["writable_storage"][1] = f"postgresql://{postgresql.address}"
    config["streaming_cache"] = {"uri": f"redis://127.0.0.1:{redis.port}"}
    server.config.write_text(yaml.safe_dump(config, sort_keys=False))
    return server


def test_a_watcher_is_killed_and_redis_and_postgresql_restart(postgresql, redis, archive, poni, tmp_path):
    """Another watcher takes over; what Redis knew is lost; PostgreSQL ends as by a power failure."""
    with on_services(Server(tmp_path / "data"), postgresql, redis) as server:
        client = server.client()
        archive.register(client, poni)
        with watcher(server, tmp_path / "first.log") as first:
            eventually(lambda: archive.exposures(client) >= 20, "the first watcher works")
            first.kill()
            first.wait()
        assert not archive.is_done(client)
        with watcher(server, tmp_path / "second.log"):
            eventually(lambda: archive.exposures(client) >= 80, "the second watcher takes over")
            redis.stop()
            postgresql.restart()
            time.sleep(1.0)
            redis.start()
            eventually(lambda: archive.is_done(server.client()), "the second watcher finishes")
            eventually(lambda: archive.check(server.client()) is None, "all can be read")  # a request fails for each connection


def test_the_disk_of_the_server_is_full_for_a_while(make_disk, archive, poni, tmp_path):
    disk = make_disk("64m")
    with Server(disk / "data", readable=[archive.folder]) as server:
        client = server.client()
        archive.register(client, poni)
        with watcher(server, tmp_path / "watch.log", "map") as working:  # slow enough to be caught at work
            eventually(lambda: archive.exposures(client) >= 20, "the watcher works")
            working.send_signal(signal.SIGSTOP)
            fill(disk)
            assert archive.exposures(client) < RUNS * EXPOSURES
            working.send_signal(signal.SIGCONT)
            time.sleep(5.0)
            assert not archive.is_done(client)
            (disk / "filler").unlink()
            eventually(lambda: archive.is_done(client), "the watcher goes on")
        archive.check(client)


def test_a_corrupt_file_costs_its_run_and_no_other(server, archive, poni, tmp_path):
    client = server.client()
    archive.register(client, poni)
    corrupt, path = archive.uids[2], archive.files[2]
    os.truncate(path, path.stat().st_size // 2)
    digests = archive._digests()
    with watcher(server, tmp_path / "watch.log"):
        eventually(lambda: len(client["desmeared"].search(Key("status") != "running")) == RUNS, "every run has its result")
    results = {node.metadata["raw_uid"]: node for node in client["desmeared"].values()}
    assert len(results) == len(client["desmeared"]) == RUNS
    failed = results.pop(corrupt)
    assert failed.status == "failed"
    assert "cannot be opened as HDF5" in failed.reason
    assert failed.metadata["failure"]["kind"] == "input"
    for node in results.values():
        assert len(np.unique(node.read()["I_smeared"].values, axis=0)) == EXPOSURES
    assert archive._digests() == digests


def test_clocks_that_jump_change_nothing(server, archive, poni, monkeypatch):
    """By a year, at every look."""
    archive.register(server.client(), poni)
    now, jumps = time.time, itertools.cycle((0.0, YEAR, -YEAR))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    working = Watcher(server.client(), config=Config(method="lake"), max_age=7 * 86_400.0, scan_interval=1.0)
    thread = threading.Thread(target=working.run)
    thread.start()
    try:
        eventually(lambda: archive.is_done(server.client()), "the watcher finishes")
    finally:
        working.stop()
        thread.join(60)
    monkeypatch.undo()
    archive.check(server.client())
    assert working.statistics.errors == 0

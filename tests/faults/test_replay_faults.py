"""A replay in which something is killed: a second start completes it, each result is there once, and no old one was touched."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bluesky import RunEngine
from tiled.queries import Key

from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.replay import replay
from dsnet_bluesky.server import Server
from tests.conftest import Line
from tests.ports import free_port

pytestmark = pytest.mark.faults

RUNS = 10


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own with runs, and with results of before."""
    with Server(tmp_path_factory.mktemp("archive"), timeout=200) as server:
        engine = RunEngine({})
        line = Line(engine, server.client(), server.data_directory / "detector")
        line.beam()
        for _ in range(RUNS):
            line.sample()
        assert replay(server.client(), config=Config("lake"), workers=0).stored == RUNS
        yield server
        engine.loop.call_soon_threadsafe(engine.loop.stop)
        engine._th.join()
        engine.loop.close()


@contextmanager
def replaying(server: Server, method: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start a replay in a process of its own, a run a batch; wait until it has stored something."""
    command = [sys.executable, "-m", "dsnet_bluesky", "replay", "--model", method, "--batch", "1", *options]
    environment = {**os.environ, "TILED_URI": server.uri, "TILED_API_KEY": server.api_key, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        if not until(lambda: stored(server, method) or process.poll() is not None):
            pytest.fail(f"Nothing was stored for two minutes:\n{where(process)}")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def where(process: subprocess.Popen[str]) -> str:
    """Have a replay and its workers say where they are; it ends them."""
    os.killpg(process.pid, signal.SIGABRT)
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired as error:
        return str(error.output)


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a replay; give what it said."""
    try:
        return process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"It does not end:\n{error.output}\n{where(process)}")


def until(holds: Callable[[], object], seconds: float = 120.0) -> bool:
    """Wait; False if that took too long."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def results(server: Server, method: str) -> list[Any]:
    return list(server.client()["desmeared"].search(Key("method") == method).values())


def stored(server: Server, method: str) -> int:
    return sum(node.metadata["status"] == "complete" for node in results(server, method))


def digest(server: Server) -> str:
    """Of all that the results of before say and hold."""
    sha = hashlib.sha256()
    for node in sorted(results(server, "lake"), key=lambda node: node.item["id"]):
        sha.update(json.dumps(dict(node.metadata), sort_keys=True, default=str).encode())
        sha.update(node.read()["I"].values.tobytes())
    return sha.hexdigest()


def completes(server: Server, method: str, before: str) -> None:
    """Start it again, and look at everything."""
    assert replay(server.client(), config=Config(method), workers=0).complete
    found = results(server, method)
    assert [node.metadata["status"] for node in found] == ["complete"] * RUNS
    assert len({node.metadata["raw_uid"] for node in found}) == RUNS, "none twice"
    assert all(node.read().sizes["exposure"] == 1 for node in found)
    assert digest(server) == before
    assert replay(server.client(), config=Config(method), workers=0).to_do == 0


def test_the_client_is_killed(archive: Server) -> None:
    before = digest(archive)
    with replaying(archive, "wiener", "--workers", "1") as process:
        os.killpg(process.pid, signal.SIGKILL)
    completes(archive, "wiener", before)


def test_a_worker_is_killed(archive: Server) -> None:
    """Another one takes its place, and the same start goes on."""
    before = digest(archive)
    with replaying(archive, "ift", "--workers", "1") as process:
        (worker,) = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in str(child.cmdline())
        ]
        worker.kill()
        output = ended(process)
        assert process.returncode == 0, output
    completes(archive, "ift", before)


def test_the_server_is_killed(archive: Server) -> None:
    """The replay waits for it."""
    before = digest(archive)
    with replaying(archive, "map", "--workers", "1") as process:
        os.kill(archive.pid, signal.SIGKILL)
        archive.stop()
        archive.start()
        output = ended(process)
        assert process.returncode in (0, 3), output
    completes(archive, "map", before)


def test_the_scheduler_is_killed(archive: Server, tmp_path: Path) -> None:
    """The replay says so, and that the same command goes on."""
    before, address = digest(archive), f"tcp://127.0.0.1:{free_port()}"
    dask, port = [sys.executable, "-m", "dask"], address.rpartition(":")[2]
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    listening = ["scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    scheduler = subprocess.Popen([*dask, *listening], **options)
    worker = subprocess.Popen([*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"], **options)
    try:
        time.sleep(10)
        with replaying(archive, "cme", "--dask", address) as process:
            scheduler.kill()
            output = ended(process)
            assert process.returncode in (0, 3), output
            assert process.returncode == 0 or "The same command goes on." in output
    finally:
        for each in (scheduler, worker):
            each.kill()
            each.wait()
    completes(archive, "cme", before)

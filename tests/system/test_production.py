"""The production configuration: a run, its curves and a result come in; Redis and PostgreSQL go away and come back."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.sim import SimMotor
from tiled.config import parse_configs
from tiled.utils import path_from_uri

from dsnet_bluesky.data import curve
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.server import EMBEDDED
from dsnet_bluesky.smearing import Smearing

pytestmark = pytest.mark.system


def take_a_run(production: Any, RE: Any) -> str:
    from bluesky.plans import count

    subscription = RE.subscribe(TiledWriter(production.client("acquisition")["raw"], batch_size=1))
    (uid,) = RE(count([SimMotor(name="motor", instant=True)], num=2), tiled_access_tags=["proposal-1"])
    RE.unsubscribe(subscription)
    return uid


def recovers(production: Any, uid: str, seconds: float = 60.0) -> None:
    """Read a run as Alice, from the catalog and its tables, until that succeeds with every connection of the server's pools."""
    deadline, good = time.monotonic() + seconds, 0
    with production.http("alice") as http:
        while good < 8:
            try:
                answer = http.get(f"/container/full/raw/{uid}", params={"format": "application/json-seq"})
            except httpx.TransportError:
                good = 0  # the server drops a connection on which it broke down
                continue
            assert answer.is_success or answer.status_code >= 500, answer.text
            assert time.monotonic() < deadline, answer.text
            good = good + 1 if answer.is_success else 0


def writes_again(production: Any, seconds: float = 30.0) -> None:
    """Write as the acquisition until that succeeds: Tiled answers the first write after a restart of Redis with status 500."""
    deadline = time.monotonic() + seconds
    body = {"structure_family": "container", "metadata": {}, "specs": [], "data_sources": [], "access_tags": ["proposal-1"]}
    with production.http("acquisition") as http:
        while True:
            try:
                answer = http.post("/metadata/raw", json=body)
            except httpx.TransportError:
                continue  # the server drops a connection on which it broke down
            if answer.is_success:
                return
            assert answer.status_code >= 500, answer.text
            assert time.monotonic() < deadline, answer.text


def test_a_failed_result_is_begun_again(production: Any, RE: Any):
    """On PostgreSQL, which deletes by other statements than SQLite; before other tests break connections."""
    watcher, uid = production.client("watcher"), take_a_run(production, RE)
    q = np.linspace(0.1, 1, 20)
    smearing = Smearing.gaussian(q, 0.02)
    curves = curve(q, smearing.apply(np.exp(-smearing.q_calc)))
    key, folders = f"again-{uid}", []
    for _ in range(2):
        writer = ResultWriter.create(watcher, key, {"raw_uid": uid, "method": "lake"}, replace_failed=True)
        writer.append(desmear(curves, smearing, "lake"))
        node = watcher["desmeared"][key]
        folders.append(Path(path_from_uri(node[node.metadata["rows"]].data_sources()[0].assets[0].data_uri)))
        writer.fail("planted")
    assert [folder.exists() for folder in folders] == [False, True]


def test_every_place_is_from_the_environment(monkeypatch):
    """What the configuration says is read as it is written, with the variables of deploy/server.env."""
    lines = (EMBEDDED.parent.parent / "deploy" / "server.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line.startswith("DSNET_"))
    for name, value in given.items():
        monkeypatch.setenv(name, value or "0" * 64)
    config = parse_configs(EMBEDDED.parent / "production.yml")
    assert config.trees is not None
    assert [tree.path for tree in config.trees] == ["/raw", "/curves", "/psfs", "/desmeared", "/analysed"]
    assert "$" not in str([tree.args for tree in config.trees]) + str(config.authentication) + str(config.database)
    assert not config.expose_raw_assets
    assert config.authentication.allow_anonymous_access is False


def test_redis_loses_its_memory(production, RE):
    uid = take_a_run(production, RE)
    production.stop_redis()
    production.start_redis()
    writes_again(production)
    recovers(production, uid)
    other = take_a_run(production, RE)
    assert np.isfinite(production.client("alice")["raw"][other]["primary/motor"].read()).all()
    assert {uid, other} <= set(production.client("alice")["raw"])


def test_connections_to_postgresql_break(production, RE):
    uid = take_a_run(production, RE)
    names = "','".join(production.environment[f"DSNET_{name}"].rsplit("/", 1)[1] for name in ("CATALOG", "TABLES", "AUTH"))
    terminate = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname IN ('{names}')"
    done = subprocess.run(
        ["psql", "-h", "127.0.0.1", "-U", "postgres", "-Atc", terminate, "postgres"], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 0
    recovers(production, uid)
    other = take_a_run(production, RE)
    assert np.isfinite(production.client("alice")["raw"][other]["primary/motor"].read()).all()

"""A production server: PostgreSQL, Redis, logins and access tags, on databases of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tiled.client import from_uri
from tiled.utils import parse

from dsnet_bluesky.access import define_tags
from dsnet_bluesky.server import EMBEDDED
from tests.ports import answers, free_port

POSTGRESQL = ("127.0.0.1", 5432)
CONFIGURATIONS = EMBEDDED.parent
WRITE_SCOPES = (
    "read:metadata",
    "read:data",
    "create:node",
    "register",
    "write:metadata",
    "write:data",
    "delete:node",
    "delete:revision",
)
PASSWORDS = {"alice": "a-secret", "bob": "b-secret"}


@dataclass
class Production:
    """A server with `tiled_config/production.yml`, and the keys of all who use it."""

    directory: Path
    environment: dict[str, str]
    uri: str
    redis_port: int
    keys: dict[str, str] = field(default_factory=dict)
    redis: subprocess.Popen[bytes] | None = None
    server: subprocess.Popen[bytes] | None = None

    def client(self, who: str) -> Any:
        """Connect as acquisition, watcher, admin, alice or bob."""
        return from_uri(self.uri, api_key=self.keys[who])

    def http(self, who: str) -> httpx.Client:
        """Send bare requests, without Tiled's client."""
        headers = {"Authorization": f"Apikey {self.keys[who]}"}
        return httpx.Client(base_url=f"{self.uri}/api/v1", headers=headers, timeout=30.0, trust_env=False)

    def start_redis(self) -> None:
        """Start a Redis that keeps nothing on disk."""
        log = (self.directory / "redis.log").open("ab")
        command = ["redis-server", "--port", str(self.redis_port), "--save", "", "--bind", "127.0.0.1"]
        self.redis = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        wait_for(lambda: answers("127.0.0.1", self.redis_port), "Redis")

    def stop_redis(self) -> None:
        """Kill Redis: what it held is lost."""
        if self.redis is not None:
            self.redis.kill()
            self.redis.wait()

    def start_server(self) -> None:
        """Start Tiled as the systemd unit does."""
        port = self.uri.rsplit(":", 1)[1]
        config = self.directory / "server.yml"
        command = [sys.executable, "-m", "tiled", "serve", "config", str(config), "--host", "127.0.0.1", "--port", port]
        log = (self.directory / "server.log").open("ab")
        self.server = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=log, stderr=log)
        with httpx.Client(trust_env=False) as http:
            wait_for(lambda: self._healthy(http), "Tiled")

    def stop_server(self) -> None:
        """Stop Tiled as systemd does."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait(20)

    def _healthy(self, http: httpx.Client) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, (self.directory / "server.log").read_text()[-5000:]
        try:
            return http.get(f"{self.uri}/healthz").is_success
        except httpx.TransportError:
            return False


def wait_for(condition: Any, what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come up in {seconds:g} s."
        time.sleep(0.2)


def sql(statement: str) -> None:
    subprocess.run(
        ["psql", "-h", POSTGRESQL[0], "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-q", "-c", statement, "postgres"],
        check=True,
        capture_output=True,
    )


def initialise(environment: dict[str, str]) -> None:
    commands = (("catalog", "init", environment["DSNET_CATALOG"]), ("admin", "initialize-database", environment["DSNET_AUTH"]))
    running = [subprocess.Popen([sys.executable, "-m", "tiled", *command], stderr=subprocess.PIPE) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def service(admin: httpx.Client) -> tuple[str, str]:
    """Make a service; returns the UUID of its principal and a key that writes, and administers nothing."""
    uuid = admin.post("/auth/principal", params={"role": "admin"}).raise_for_status().json()["uuid"]
    wanted = {"scopes": list(WRITE_SCOPES), "expires_in": None}
    answer = admin.post(f"/auth/principal/{uuid}/apikey", json=wanted).raise_for_status()
    return uuid, answer.json()["secret"]


def log_in(uri: str, user: str, password: str) -> str:
    """Return the token of a login."""
    form = {"grant_type": "password", "username": user, "password": password}
    answer = httpx.post(f"{uri}/api/v1/auth/provider/site/token", data=form, timeout=30.0, trust_env=False)
    return answer.raise_for_status().json()["access_token"]


def own_key(uri: str, user: str, password: str) -> str:
    """Make a user's API key, as `tiled api_key create` does."""
    headers = {"Authorization": f"Bearer {log_in(uri, user, password)}"}
    wanted = {"expires_in": None, "scopes": None}
    answer = httpx.post(f"{uri}/api/v1/auth/apikey", json=wanted, headers=headers, timeout=30.0, trust_env=False)
    return answer.raise_for_status().json()["secret"]


@pytest.fixture(scope="session")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """A production server, shared by all tests: give each run a uid of its own."""
    if not answers(*POSTGRESQL):
        pytest.skip("PostgreSQL is not running at 127.0.0.1:5432")
    if missing := [program for program in ("psql", "redis-server") if shutil.which(program) is None]:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    directory, prefix = tmp_path_factory.mktemp("production"), f"dsnet_test_{secrets.token_hex(4)}"
    (directory / "detector").mkdir()
    (directory / "data" / "store").mkdir(parents=True)
    names = {name: f"{prefix}_{name}" for name in ("catalog", "tables", "auth")}
    port = free_port()
    environment = {
        "DSNET_CATALOG": f"postgresql+asyncpg://postgres@127.0.0.1:5432/{names['catalog']}",
        "DSNET_TABLES": f"postgresql://postgres@127.0.0.1:5432/{names['tables']}",
        "DSNET_AUTH": f"postgresql+asyncpg://postgres@127.0.0.1:5432/{names['auth']}",
        "DSNET_REDIS": f"redis://127.0.0.1:{port}/0",
        "DSNET_DATA": str(directory / "data"),
        "DSNET_DETECTOR": str(directory / "detector"),
        "DSNET_SECRET_KEY": secrets.token_hex(32),
        "DSNET_ADMIN_PASSWORD": secrets.token_hex(8),
    }
    here = Production(directory, environment, f"http://127.0.0.1:{free_port()}", port)
    with ExitStack() as stack:
        for name in names.values():
            sql(f'CREATE DATABASE "{name}"')
            stack.callback(sql, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        initialise(environment)
        config = yaml.safe_load((CONFIGURATIONS / "production.yml").read_text())
        config["authentication"]["providers"][0]["args"]["users_to_passwords"] |= PASSWORDS
        (directory / "server.yml").write_text(yaml.safe_dump(config))
        stack.callback(here.stop_redis)
        here.start_redis()
        define_tags(parse(CONFIGURATIONS / "tags.yml"), environment["DSNET_CATALOG"])
        stack.callback(here.stop_server)
        here.start_server()
        _give_keys(here)
        yield here


def _give_keys(here: Production) -> None:
    token = log_in(here.uri, "admin", here.environment["DSNET_ADMIN_PASSWORD"])
    headers = {"Authorization": f"Bearer {token}"}
    ids = {}
    with httpx.Client(base_url=f"{here.uri}/api/v1", headers=headers, timeout=30.0, trust_env=False) as admin:
        for name, variable in (("acquisition", "DSNET_ACQUISITION"), ("watcher", "DSNET_WATCHER")):
            ids[variable], here.keys[name] = service(admin)
    here.keys |= {user: own_key(here.uri, user, password) for user, password in PASSWORDS.items()}
    text = (CONFIGURATIONS / "tags.yml").read_text()
    for variable, uuid in ids.items():
        text = text.replace(f"${{{variable}}}", uuid)
    define_tags(yaml.safe_load(text), here.environment["DSNET_CATALOG"])

"""Services for a server of a benchmark: a database of its own in PostgreSQL, a Redis of its own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import yaml

from dsnet_bluesky.server import Server

__all__ = ["database", "free_port", "on_services"]

POSTGRESQL = {"host": "127.0.0.1", "port": 5432, "user": "postgres"}
"""It must run there."""


@contextmanager
def database() -> Iterator[str]:
    """Create a database in PostgreSQL; gives its address, ``user@host:port/name``, and drops it in the end."""
    name = f"dsnet_{uuid.uuid4().hex}"
    _query(f"CREATE DATABASE {name}")
    try:
        yield f"{POSTGRESQL['user']}@{POSTGRESQL['host']}:{POSTGRESQL['port']}/{name}"
    finally:
        _query(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def on_services(server: Server) -> Iterator[None]:
    """Let a server that is not started yet use a database of its own in PostgreSQL, and a Redis of its own."""
    port = free_port()
    with database() as address:
        config = yaml.safe_load(server.config.read_text())
        for tree in config["trees"]:
            tree["args"]["uri"] = f"postgresql+asyncpg://{address}"
        config["trees"][0]["args"]["writable_storage"][1] = f"postgresql://{address}"
        config["streaming_cache"] = {"uri": f"redis://127.0.0.1:{port}"}
        server.config.write_text(yaml.safe_dump(config, sort_keys=False))
        redis = subprocess.Popen(
            ["redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            redis.terminate()
            redis.wait()


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _query(statement: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(**POSTGRESQL, database="postgres")
        await connection.execute(statement)
        await connection.close()

    asyncio.run(run())

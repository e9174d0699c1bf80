"""Services of one's own, to be broken: PostgreSQL, Redis, and a small disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.ports import answers, free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Debian's place for what only administrators of PostgreSQL call."""


def await_port(port: int) -> None:
    """Wait until somebody listens at a port."""
    end = time.monotonic() + 60
    while not answers("127.0.0.1", port):
        assert time.monotonic() < end, f"Nobody listens at {port}."
        time.sleep(0.05)


class PostgreSQL:
    """A cluster of PostgreSQL with a database ``postgres``, which trusts whoever connects."""

    def __init__(self) -> None:
        # Not where tests keep their files: those are root's alone, and it refuses to run as root.
        self._folder = Path(tempfile.mkdtemp(prefix="dsnet-postgresql-"))
        self.port, self._data = free_port(), self._folder / "data"
        if os.getuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", str(self._data))
        self._control("start")

    @property
    def address(self) -> str:
        """Of its database, without a scheme."""
        return f"postgres@127.0.0.1:{self.port}/postgres"

    def restart(self) -> None:
        """Restart it as after a power failure: every connection breaks, and it recovers from its log."""
        self._control("restart", "-m", "immediate")

    def stop(self) -> None:
        """End it, and remove all that it held."""
        self._control("stop", "-m", "immediate")
        shutil.rmtree(self._folder)

    def _control(self, *command: str) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "--wait", "-D", str(self._data), "-o", options, "-l", str(self._folder / "log"), *command)

    def _run(self, program: str, *arguments: str) -> None:
        become = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*become, str(PROGRAMS[-1] / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder)


class Redis:
    """A Redis that keeps nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Start it, with an empty memory."""
        command = ["redis-server", "--port", str(self.port), "--save", "", "--bind", "127.0.0.1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        await_port(self.port)

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


def fill(folder: Path) -> None:
    """Fill a disk."""
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))

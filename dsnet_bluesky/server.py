"""Tiled's own server with this project's configuration.

Nothing of the server is ours but the YAML and the adapters that it names. It runs
as a process of its own and never imports torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import httpx
import yaml

from .data import BadInput

__all__ = ["EMBEDDED", "Server", "ServerError", "configuration", "serve"]

STARTUP_TIMEOUT = 60.0
SHUTDOWN_TIMEOUT = 10.0
LOG_TAIL = 25


def _configurations() -> Path:
    """Folder of the configurations: of the source tree, or inside an installed wheel."""
    package = Path(__file__).parent
    return next(root for root in (package.parent / "tiled_config", package / "tiled_config") if root.is_dir())


EMBEDDED = _configurations() / "embedded.yml"
"""The configuration that needs no other service."""


class ServerError(RuntimeError):
    """The server did not come up; the message holds the end of its log."""


def configuration(data_directory: str | Path, *, readable: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Fill in the embedded configuration.

    Parameters
    ----------
    data_directory
        Where the server keeps its database and files, and where detectors may
        write (in ``detector``). Created if need be.
    readable
        Further directories whose files the server may read.

    Returns
    -------
    dict
        What Tiled's configuration file holds.

    Raises
    ------
    BadInput
        If a readable directory does not exist, or the server cannot keep its data where it shall.
    """
    root = Path(data_directory).absolute()
    try:
        for name in ("store", "detector"):
            (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"The server cannot keep its data in {root} ({error.strerror}); name a folder that it may make."
        ) from error
    _make_tables(root / "tables.db")
    directories = [_existing(directory) for directory in readable]
    filled = yaml.safe_load(EMBEDDED.read_text().replace("${DSNET_DATA}", str(root)))
    for tree in filled["trees"]:
        storage = tree["args"].get("readable_storage")
        if storage is not None:
            # The file's mounts share one list (a YAML anchor): each gets its own.
            tree["args"]["readable_storage"] = [*storage, *directories]
    return filled


def serve(
    config: str | Path | None = None,
    *,
    data_directory: str | Path = "dsnet-data",
    port: int = 8000,
    api_key: str | None = None,
    readable: Sequence[str | Path] = (),
) -> NoReturn:
    """Become the server: it runs in the foreground, in place of this process, until it is interrupted.

    Parameters
    ----------
    config
        A configuration of your own; the embedded one if not given.
    data_directory, readable
        For the embedded configuration, see `configuration`.
    port
        On 127.0.0.1.
    api_key
        Letters and digits; drawn and printed by the server if not given.

    Raises
    ------
    BadInput
        If the configuration, the API key or a directory cannot be used.
    """
    if config is not None and readable:
        raise BadInput(f"Directories to read from belong into readable_storage in {config}, not on the command line.")
    path = Path(config) if config is not None else _write(configuration(data_directory, readable=readable), data_directory)
    if not path.exists():
        raise BadInput(f"The configuration {path} does not exist.")
    # In place of this process: signals reach the server, and nothing is left between it and whoever started it.
    os.execve(sys.executable, _command(path, port), _environment(api_key))


class Server:
    """A server process of one's own, on a free port of 127.0.0.1.

    Parameters
    ----------
    data_directory, readable
        See `configuration`.
    port
        0 takes a free one.
    api_key
        Letters and digits; drawn if not given.
    timeout
        Seconds to wait for the server to come up.

    Attributes
    ----------
    data_directory : Path
        With the server's log in ``server.log``.
    api_key : str
    uri : str
        For ``tiled.client.from_uri``; without the key.

    Raises
    ------
    BadInput
        If the API key or a directory cannot be used.
    ServerError
        On entering, if the server does not come up.

    Examples
    --------
    >>> with Server("dsnet-data") as server:          # doctest: +SKIP
    ...     client = server.client()
    ...     client["raw"]
    """

    def __init__(
        self,
        data_directory: str | Path,
        *,
        port: int = 0,
        api_key: str | None = None,
        readable: Sequence[str | Path] = (),
        timeout: float = STARTUP_TIMEOUT,
    ):
        self.data_directory = Path(data_directory).absolute()
        self.api_key = _checked_key(api_key or secrets.token_hex(16))
        self._port = port or _free_port()
        self.config = _write(configuration(self.data_directory, readable=readable), self.data_directory)
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def uri(self) -> str:
        """Address of the server's root."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> Path:
        """Everything that the server printed."""
        return self.data_directory / "server.log"

    @property
    def pid(self) -> int:
        """Of the server's process."""
        if self._process is None:
            raise ServerError("The server is not running; enter it with a `with` statement.")
        return self._process.pid

    def client(self) -> Any:
        """Connect to the server's root."""
        from tiled.client import from_uri

        return from_uri(self.uri, api_key=self.api_key)

    def start(self) -> Server:
        """Start the process and wait until it answers."""
        self._log = self.log.open("ab")
        self._process = subprocess.Popen(
            _command(self.config, self._port), env=_environment(self.api_key), stdout=self._log, stderr=subprocess.STDOUT
        )
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the process, gently first; does nothing if it does not run."""
        if self._process is not None:
            _stop(self._process)
        if self._log is not None:
            self._log.close()
        self._process = self._log = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._timeout
        # One client for all attempts: making one loads certificates, which takes longer than the wait between them.
        with httpx.Client(timeout=1.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise ServerError(f"The Tiled server ended with status {process.returncode}. {self._tail()}")
                if _healthy(http, self.uri):
                    return
                time.sleep(0.1)
        raise ServerError(f"The Tiled server did not answer within {self._timeout:g} s at {self.uri}. {self._tail()}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        return f"The end of its log ({self.log}):\n" + "\n".join(lines)


def _make_tables(path: Path) -> None:
    """Make the database of tables, whose readers and writers shall not lock each other out."""
    if not path.exists():
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode=WAL")  # a property of the file, whoever opens it


def _existing(directory: str | Path) -> str:
    path = Path(directory).absolute()
    if not path.is_dir():
        raise BadInput(f"The server cannot read from {path}: there is no such directory.")
    return str(path)


def _checked_key(api_key: str) -> str:
    if not (api_key.isascii() and api_key.isalnum()):
        raise BadInput("The API key may hold only letters and digits: other characters are mangled in addresses.")
    return api_key


def _write(config: dict[str, Any], data_directory: str | Path) -> Path:
    path = Path(data_directory).absolute() / "server.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _command(config: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "tiled", "serve", "config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def _environment(api_key: str | None) -> dict[str, str]:
    # By the environment, so that the key is not seen in the list of processes.
    return {**os.environ, **({"TILED_SINGLE_USER_API_KEY": _checked_key(api_key)} if api_key else {})}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(http: httpx.Client, uri: str) -> bool:
    try:
        return http.get(f"{uri}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SHUTDOWN_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

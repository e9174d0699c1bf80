"""What all demonstrations share: a server, a RunEngine whose exposures are answered on the way, and how to go on afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bluesky import RunEngine
from bluesky.utils import MsgGenerator
from ophyd_async.plan_stubs import ensure_connected
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tiled.queries import Key

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.kinds import Kind
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.server import Server
from dsnet_bluesky.spool import SpooledWriter

__all__ = ["PATIENCE", "Session", "result_of", "say_how_to_go_on", "serving"]

PATIENCE = 90.0
"""Seconds to wait for the last result after the last plan."""


@contextmanager
def serving(directory: Path, port: int, console: Console) -> Iterator[Server]:
    """Run a Tiled server that keeps its data below a directory."""
    with console.status("Starting the Tiled server ..."):
        server = Server(directory / "data", port=port).start()
    try:
        yield server
    finally:
        server.stop()


class Session:
    """A RunEngine that writes to the catalog through a spool, and has its exposures answered on the way.

    Parameters
    ----------
    client
        Root of the server's trees.
    folder
        For the spool.
    console
        Where progress is shown.
    config
        What is done with the exposures; None for nothing.
    """

    def __init__(self, client: Any, folder: Path, console: Console, config: Config | None) -> None:
        self.callback = None if config is None else DesmearCallback(client, config=config)
        self.engine = RunEngine({}, call_returns_result=True)
        self._console = console
        self._writer = SpooledWriter(folder / "spool", client["raw"])
        self.engine.subscribe(self._writer)
        if self.callback:
            self.engine.subscribe(self.callback)

    def run(self, devices: Sequence[Any], plan: MsgGenerator[Any], *, exposures: int, results: tuple[int, str]) -> Any:
        """Run a plan and wait for its results; then the session is over.

        Parameters
        ----------
        devices
            To be connected before.
        plan
            What to do.
        exposures
            How many it takes.
        results
            How many of them are answered, and a word for what becomes of them.

        Returns
        -------
        Any
            What the plan returns.

        Raises
        ------
        TimeoutError
            If results are missing long after the plan.
        """
        self.engine(ensure_connected(*devices))
        with self._progress(exposures, results):
            done: Any = self.engine(plan)
            finished = self._writer.wait(PATIENCE) and (self.callback is None or self.callback.wait(PATIENCE))
        self._writer.close()
        if self.callback:
            self.callback.close()
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)
        if not finished:
            said = self.callback and self.callback.statistics
            raise TimeoutError(f"The results were not complete {PATIENCE:.0f} s after the last exposure: {said}")
        return done.plan_result

    @property
    def failed(self) -> int:
        """Exposures that could not be answered."""
        return self.callback.statistics.failed if self.callback else 0

    @property
    def _answered(self) -> int:
        return self.callback.statistics.exposures if self.callback else 0

    @contextmanager
    def _progress(self, exposures: int, results: tuple[int, str]) -> Iterator[None]:
        """Show how many exposures are taken, and how many are answered already."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        stop = threading.Event()
        with Progress(*columns, console=self._console) as progress:
            taken = progress.add_task("exposures taken by the plans  ", total=exposures)
            done = progress.add_task(f"{results[1]:30s}", total=results[0], visible=self.callback is not None)
            token = self.engine.subscribe(lambda name, doc: progress.advance(taken), name="event")

            def follow() -> None:
                while not stop.wait(0.1):
                    progress.update(done, completed=self._answered)

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                progress.update(done, completed=self._answered)
                self.engine.unsubscribe(token)


def result_of(client: Any, raw_uid: str, kind: Kind) -> Any:
    """Read the result of a run.

    Raises
    ------
    RuntimeError
        If it failed; says why.
    """
    node = client[kind.mount].search(Key("raw_uid") == raw_uid).values().first()
    if node.metadata["status"] != "complete":
        raise RuntimeError(f"Run {raw_uid} was not answered: {node.metadata.get('reason')}")
    return node.read()


def say_how_to_go_on(console: Console, server: Server, query: str, *, keep: bool) -> None:
    """Print the commands that open the catalog and query it; where the server is kept up, wait for an interrupt."""
    uri, key = server.uri, server.api_key
    if keep:
        console.print(f"\nThe server stays up at {uri} until Ctrl-C. In another terminal, in Python:")
    else:
        port, key = 8000, "secret"
        uri = f"http://127.0.0.1:{port}"
        command = f"dsnet-bluesky serve --directory {server.data_directory} --port {port} --api-key {key}"
        console.print("\nThe catalog stays. Open it again, and query it in Python:")
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    lines = (
        "from tiled.client import from_uri",
        "from tiled.queries import Key",
        f'client = from_uri("{uri}", api_key="{key}")',
        query,
    )
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    if keep:
        _wait_for_interrupt()


def _wait_for_interrupt() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return

"""What the spool's tests share: documents to write, and catalogs to count in.

As a script it is a RunEngine's process, to be killed:

    python tests/faults/spooling.py SPOOL ADDRESS FILES [--deliver]

It takes exposures with a detector that writes into FILES, and prints the number of each
when it is spooled. The key is taken from TILED_API_KEY.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bluesky import RunEngine
from event_model import compose_run
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky.plans import Instrument, expose
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.spool import SpooledWriter
from dsnet_bluesky.spool.files import read

Document = tuple[str, dict[str, Any]]

WAIT = 200
"""Seconds after which something does not happen: machines that test are busy."""


def run_documents(events: int = 3, *, stop: bool = True, begin: float | None = None) -> Iterator[Document]:
    """Documents of a run: a scalar and a short array in each event."""
    run = compose_run(time=begin)
    yield "start", run.start_doc
    keys = {"x": {"source": "", "dtype": "number", "shape": []}, "spectrum": {"source": "", "dtype": "array", "shape": [32]}}
    stream = run.compose_descriptor(name="primary", data_keys=keys)
    yield "descriptor", stream.descriptor_doc
    for number in range(events):
        data = {"x": float(number), "spectrum": np.arange(32.0) + number}
        yield "event", stream.compose_event(data=data, timestamps={"x": 0.0, "spectrum": 0.0})
    if stop:
        yield "stop", run.compose_stop()


class Beamline:
    """A RunEngine on the project's simulated beamline; its detector writes files."""

    def __init__(self, folder: Path):
        camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        line = SimBeamline(folder, camera)
        self.detector = line.detector
        self.instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self.engine = RunEngine({})
        self.engine(ensure_connected(*line.devices))

    def documents(self, plan: Any) -> list[Document]:
        """Run a plan; returns its documents."""
        documents: list[Document] = []
        token = self.engine.subscribe(lambda name, doc: documents.append((name, doc)))
        self.engine(plan)
        self.engine.unsubscribe(token)
        return documents

    def exposures(self, number: int) -> Any:
        """Plan a run with a sample."""
        return expose(self.detector, sample="AgBh", instrument=self.instrument, exposures=number, exposure_time=0.01)

    def close(self) -> None:
        """Stop the RunEngine's loop."""
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)


def feed(writer: Callable[[str, Any], object], documents: Any) -> str:
    """Give documents to a callback; returns the run's uid."""
    documents = list(documents)
    for name, doc in documents:
        writer(name, doc)
    return documents[0][1]["uid"]


def spooled(path: Path) -> list[Document]:
    """Read a file of the spool."""
    with path.open("rb") as file:
        return [(name, doc) for name, doc, _ in read(file)]


def numbers(run: Any) -> list[int]:
    """Sequence numbers of the events that the catalog holds, each as often as it is there."""
    return list(run.base["primary"].base["internal"].read(["seq_num"])["seq_num"])


def whole(run: Any, events: int) -> bool:
    """Whether the catalog holds all events of a run once, in order, and its end."""
    return numbers(run) == list(range(1, events + 1)) and run.metadata["stop"]["exit_status"] == "success"


def await_true(condition: Callable[[], object]) -> None:
    """Wait until something happens."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "It does not happen."
        time.sleep(0.3)


def await_begun(raw: Any, uid: str) -> None:
    """Wait until a run's events begin to arrive.

    It looks at no row: to read a table of DuckDB while rows are appended to it is
    answered 500 now and then, and has ended a server by a segmentation fault (tiled 0.2.20).
    """

    def begun() -> bool:
        with contextlib.suppress(KeyError, httpx.HTTPStatusError):
            return "internal" in raw[uid].base["primary"].base
        return False

    await_true(begun)


def main() -> None:
    """Take exposures until somebody kills this process."""
    spool, address, files, *options = sys.argv[1:]
    writer, line = SpooledWriter(spool, address, deliver="--deliver" in options), Beamline(Path(files))
    line.engine.subscribe(writer)
    line.engine.subscribe(lambda name, doc: print(doc["seq_num"], flush=True), name="event")
    line.engine(line.exposures(100_000))


if __name__ == "__main__":
    main()

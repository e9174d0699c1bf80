"""What a RunEngine feels of those who write its documents: nothing, a spool, a spool without its server, Tiled itself.

The same plan (`expose` with ten exposures on the simulated beamline) with each writer in turn,
again and again, so that other load on the machine meets all of them alike; and the time that a
writer takes for a document. Writes Markdown:

    python benchmarks/live.py            # some minutes
    python benchmarks/live.py --quick    # a smoke test
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bluesky import RunEngine
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky.plans import Instrument, expose
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.spool import SpooledWriter

RESULTS = Path(__file__).parent / "results"
NOWHERE = "http://127.0.0.1:9/api/v1/metadata/raw"
EXPOSURES = 10

Writer = Callable[[str, Mapping[str, Any]], None]


class Timed:
    """A writer, and the time it takes for each document."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.seconds: list[float] = []

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Pass a document on."""
        begin = time.perf_counter()
        self.writer(name, doc)
        self.seconds.append(time.perf_counter() - begin)


class Line:
    """The simulated beamline with its RunEngine."""

    def __init__(self, folder: Path):
        camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self._line = SimBeamline(folder, camera)
        self._instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self.engine = RunEngine({})
        self.engine(ensure_connected(*self._line.devices))

    def scan(self, writer: Writer | None) -> float:
        """Run the plan; returns the RunEngine's time in s."""
        token = None if writer is None else self.engine.subscribe(writer)
        begin = time.perf_counter()
        self.engine(
            expose(self._line.detector, sample="AgBh", instrument=self._instrument, exposures=EXPOSURES, exposure_time=0.01)
        )
        seconds = time.perf_counter() - begin
        if token is not None:
            self.engine.unsubscribe(token)
        return seconds


@contextmanager
def writers(raw: Any, folder: Path) -> Iterator[dict[str, Timed | None]]:
    """Make one writer of each kind."""
    spooled = {
        "spool": SpooledWriter(folder / "run", raw),
        "spool, sync after each document": SpooledWriter(folder / "document", raw, sync="document"),
        "spool, server away": SpooledWriter(folder / "away", NOWHERE),
    }
    direct = {"TiledWriter, live": TiledWriter(raw, batch_size=1), "TiledWriter, batch": TiledWriter(raw)}
    yield {"none": None, **{name: Timed(writer) for name, writer in (spooled | direct).items()}}
    for path in spooled["spool, server away"].spool.waiting():
        path.unlink()  # or its deliverer would wait for ever
    for writer in spooled.values():
        writer.close()


def settle(timed: Timed | None) -> None:
    """Let deliveries end, so that they meet no other writer's scan."""
    writer = timed.writer if timed is not None else None
    if isinstance(writer, SpooledWriter) and writer.spool.target.read_text() != NOWHERE and not writer.wait(300):
        sys.exit("The spool did not become empty.")


def measure(repetitions: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measure the RunEngine's time by writer, and the time for each document."""
    with tempfile.TemporaryDirectory() as temporary, Server(Path(temporary) / "data", timeout=300) as server:
        line = Line(server.data_directory / "detector")
        line.scan(None)
        times: dict[str, list[float]] = {}
        with writers(server.client()["raw"], Path(temporary)) as kinds:
            time.sleep(15)  # deliverers start once, not with each scan
            for number in range(repetitions):
                order = list(kinds)
                for name in order[number % len(order) :] + order[: number % len(order)]:
                    times.setdefault(name, []).append(line.scan(kinds[name]))
                    settle(kinds[name])
            documents = {name: timed.seconds for name, timed in kinds.items() if timed is not None}
        line.engine.loop.call_soon_threadsafe(line.engine.loop.stop)
    return times, documents


def report(times: Mapping[str, list[float]], documents: Mapping[str, list[float]], command: str) -> str:
    """Put the figures into Markdown."""
    base = np.array(times["none"])
    lines = [
        "# What the RunEngine feels of its writers",
        "",
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores,"
        f" load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}, bluesky {version('bluesky')},"
        f" bluesky-tiled-plugins {version('bluesky-tiled-plugins')}, tiled {version('tiled')}.",
        "",
        f"`expose` with {EXPOSURES} exposures of a Pilatus 100k on the simulated beamline, {len(base)} times with each writer in",
        "turn; server and deliverers on the same cores. Ratio: median over rounds of the RunEngine's time over that without a",
        "writer in the same round, with quartiles. At the right, the writer's own time for a document, on the RunEngine's",
        "thread: what it adds on a machine with a core to spare.",
        "",
        "| writer | RunEngine, s | ratio | document: median, ms | 99 %, ms | longest, ms | of the scan |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        ratio = np.percentile(np.array(seconds) / base, [50, 25, 75])
        own = 1e3 * np.array(documents.get(name, [0.0]))
        share = own.sum() / 1e3 / len(base) / np.median(base)
        lines.append(
            f"| {name} | {np.median(seconds):.2f} | {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
            f" | {np.median(own):.3f} | {np.percentile(own, 99):.2f} | {own.max():.1f} | {100 * share:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description="Measure what the RunEngine feels of its writers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two rounds")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    text = report(
        *measure(2 if options.quick else options.repetitions),
        "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    (options.output / "live.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

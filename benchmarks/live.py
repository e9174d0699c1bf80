"""What live work costs and how fast it is, measured on the simulated beamline with real servers.

Each section of the report is a function of its own. `runengine`: what a RunEngine feels of those
who write its documents, with a realistic plan and with events back to back. `latency`: from an
exposure's end to its result in another client. `services`: the same with PostgreSQL, which must run at
127.0.0.1:5432, and a Redis of its own. `sustained`: a long scan of large frames, with the
watcher's memory. RunEngine, deliverer, server and watcher share this machine. Writes Markdown:

    python benchmarks/live.py                       # a quarter of an hour
    python benchmarks/live.py --section latency     # one section, into the report that is there
    python benchmarks/live.py --quick               # a smoke test
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from bluesky.utils import MsgGenerator
from bluesky_tiled_plugins import TiledWriter
from databases import free_port, on_services
from ophyd_async.plan_stubs import ensure_connected
from provenance import provenance
from tiled.queries import Key

from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.spool import SpooledWriter, read_status

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("bluesky", "bluesky-tiled-plugins", "ophyd-async", "tiled")

NOWHERE = "http://127.0.0.1:9"
"""Where no server is."""

DELAY = 0.5
"""Seconds by which the slow server answers later."""

EXPOSURE = 0.05
"""Seconds of an exposure in the realistic plan."""

BUSY = 0.5
"""Load per core from which on a machine is too busy for final figures."""

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


@dataclass
class Felt:
    """What a RunEngine felt of a writer."""

    times: list[float] = field(default_factory=list)
    """RunEngine's time in s, by round."""

    documents: list[float] = field(default_factory=list)
    """Writer's own time in s, by document."""


class Counter:
    """A device that answers at once."""

    name, parent = "counter", None

    def __init__(self) -> None:
        self._counts = itertools.count()

    def read(self) -> dict[str, Any]:
        """Read the next number."""
        return {"counter": {"value": float(next(self._counts)), "timestamp": time.time()}}

    def describe(self) -> dict[str, Any]:
        """Describe a number."""
        return {"counter": {"source": "", "dtype": "number", "shape": []}}

    def read_configuration(self) -> dict[str, Any]:
        """Answer that there is none."""
        return {}

    describe_configuration = read_configuration


class Line:
    """The simulated beamline with its RunEngine; exposures take the time they say."""

    def __init__(self, folder: Path):
        camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self._line = SimBeamline(folder, camera, realtime=True)
        self._instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self._counter = Counter()
        self.engine = RunEngine({})
        self.engine(ensure_connected(*self._line.devices))

    def realistic(self, exposures: int) -> MsgGenerator[Any]:
        """Plan a scan as a beamline takes it."""
        return expose(
            self._line.detector, sample="AgBh", instrument=self._instrument, exposures=exposures, exposure_time=EXPOSURE
        )

    @bpp.run_decorator()
    def back_to_back(self, events: int) -> MsgGenerator[Any]:
        """Plan events without anything between them."""
        for _ in range(events):
            yield from bps.create("primary")
            yield from bps.read(self._counter)  # type: ignore[arg-type]
            yield from bps.save()

    def time(self, plan: MsgGenerator[Any], writer: Writer | None) -> float:
        """Run a plan with a writer, or without any; returns the RunEngine's time in s."""
        token = None if writer is None else self.engine.subscribe(writer)
        begin = time.perf_counter()
        self.engine(plan)
        seconds = time.perf_counter() - begin
        if token is not None:
            self.engine.unsubscribe(token)
        return seconds

    def close(self) -> None:
        """Stop the RunEngine's loop."""
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)


@contextmanager
def slowed(uri: str) -> Iterator[str]:
    """Pass on to a server, and hold back each of its answers; gives the address. Its thread wakes up a few times a second."""
    far = int(uri.rsplit(":", 1)[1])

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", far)
        with suppress(asyncio.CancelledError):  # the end
            await asyncio.gather(forward(reader, far_writer, 0.0), forward(far_reader, writer, DELAY))

    async def end() -> None:
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def writers(server: Server, folder: Path) -> Iterator[dict[str, Writer | None]]:
    """Make one writer of each kind."""
    with slowed(server.uri) as slow:
        addresses = {"server up": server.uri, f"answers {DELAY:g} s later": slow, "server down": NOWHERE}
        spooled = {
            f"SpooledWriter, {name}": SpooledWriter(folder / str(n), f"{uri}/api/v1/metadata/raw", api_key=server.api_key)
            for n, (name, uri) in enumerate(addresses.items())
        }
        try:
            for writer in spooled.values():
                _await_deliverer(writer)
            yield {"none": None, "TiledWriter(batch_size=1)": TiledWriter(server.client()["raw"], batch_size=1), **spooled}
        finally:
            for writer in spooled.values():
                writer.close()
                for path in writer.spool.waiting():
                    path.unlink(missing_ok=True)  # or its deliverer would stay


def _await_deliverer(writer: SpooledWriter) -> None:
    """Wait until it is there: it starts once, not with each scan."""
    end = time.monotonic() + 120
    while not read_status(writer.spool.directory).delivering and time.monotonic() < end:
        time.sleep(0.2)


def settle(writer: Writer | None) -> None:
    """Let a delivery end that can end soon, so that it meets no other writer's scan."""
    if isinstance(writer, SpooledWriter) and writer.spool.directory.name == "0" and not writer.wait(300):
        sys.exit("The spool did not become empty.")


def feel(line: Line, kinds: Mapping[str, Writer | None], plan: Callable[[], MsgGenerator[Any]], rounds: int) -> dict[str, Felt]:
    """Run a plan with each writer in turn, beginning with another one in each round: other load meets all of them alike."""
    felt = {name: Felt() for name in kinds}
    line.time(plan(), None)
    names = list(kinds)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            writer = kinds[name]
            timed = None if writer is None else Timed(writer)
            felt[name].times.append(line.time(plan(), timed))
            felt[name].documents += timed.seconds if timed else []
            settle(writer)
    return felt


def table(felt: Mapping[str, Felt]) -> list[str]:
    """Put what was felt into a table."""
    base = np.array(felt["none"].times)
    lines = [
        "| writer | RunEngine, s | ratio | more a document, us | own time: median, us | 99 %, us | longest, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in felt.items():
        times, own = np.array(of.times), 1e6 * np.array(of.documents or [0.0])
        ratio = np.percentile(times / base, [50, 25, 75])
        more = 1e6 * np.median(times - base) / max(1.0, len(of.documents) / len(times))
        cells = f"| {name} | {np.median(times):.3f} | {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}) |"
        rest = f" {more:.0f} | {np.median(own):.0f} | {np.percentile(own, 99):.0f} | {own.max() / 1e3:.1f} |"
        lines.append(cells + (rest if of.documents else " | | | |"))
    return lines


def runengine(server: Server, folder: Path, *, rounds: int = 5, exposures: int = 20, events: int = 60) -> list[str]:
    """Measure what a RunEngine feels of its writers.

    Parameters
    ----------
    server
        That runs; its detectors' folder is written to.
    folder
        For spools.
    rounds
        Number of times that each plan is run with each writer.
    exposures, events
        Of the realistic plan, and of the one without exposures.

    Returns
    -------
    list of str
        The report's section.
    """
    line = Line(server.data_directory / "detector")
    with writers(server, folder) as kinds:
        realistic = feel(line, kinds, lambda: line.realistic(exposures), rounds)
        back_to_back = feel(line, kinds, lambda: line.back_to_back(events), rounds)
    line.close()
    return [
        "## What the RunEngine feels of its writers",
        "",
        f"Each plan {rounds} times with each writer in turn; server and deliverers on the same cores. Ratio: median over rounds",
        "of the RunEngine's time over that without a writer in the same round, with quartiles. More a document: the median",
        "difference of both, for one document. Own time: what the writer takes for a document, on the RunEngine's thread; this",
        "is what it adds on a machine with a core to spare.",
        "",
        f"### A scan: {exposures} exposures of {EXPOSURE:g} s, Pilatus 100k, frames in HDF5",
        "",
        *table(realistic),
        "",
        f"### The worst case: {events} events back to back, one number each",
        "",
        *table(back_to_back),
    ]


class Follower:
    """Another client, which notes when the exposures of results are announced to it as stored, and can read them."""

    def __init__(self, server: Server):
        self._results = server.client()["desmeared"]
        self.announced: dict[tuple[str, int], float] = {}
        self._subscription = self._results.subscribe()
        self._subscription.child_metadata_updated.add_callback(self._note)
        self._subscription.start_in_thread()

    def _note(self, update: Any) -> None:
        for number in range(update.metadata.get("exposures", 0)):
            self.announced.setdefault((update.metadata["raw_uid"], number), time.time())

    def read(self, uid: str) -> float:
        """Read the last desmeared exposure of a run; returns the seconds that it takes."""
        begin = time.perf_counter()
        node = self._results.search(Key("raw_uid") == uid).values().first()
        node.read(["I"])
        return time.perf_counter() - begin

    def close(self) -> None:
        """End the subscription."""
        self._subscription.disconnect(wait=False)


class Scene:
    """A RunEngine on the simulated beamline, its spool, and a watcher in a process of its own."""

    def __init__(self, server: Server, folder: Path, detector: str = "Pilatus100k", method: str = "dsnet"):
        self.server = server
        pixels = {"Pilatus100k": (97.5, 243.5), "Pilatus300k": (309.5, 243.5)}[detector]
        self._camera = SaxsCamera(detector, centre=pixels, hot_pixels=5, oversampling=1, seed=1)
        self._line = SimBeamline(server.data_directory / "detector", self._camera, realtime=True)
        self._instrument = Instrument(self._camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self.ended: dict[tuple[str, int], float] = {}
        self._uid = ""
        self.engine = RunEngine({})
        self.engine(ensure_connected(*self._line.devices))
        self.spool = SpooledWriter(folder / "spool", server.client()["raw"])
        self.engine.subscribe(self.spool)
        self.engine.subscribe(self._note)
        self.port = free_port()
        self.log = folder / "watch.log"
        command = [sys.executable, "-m", "dsnet_bluesky", "watch", "--method", method, "--port", str(self.port)]
        environment = {**os.environ, "TILED_URI": server.uri, "TILED_API_KEY": server.api_key, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.watcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._await(lambda: bool(self.said()), "the watcher answers")

    def _note(self, name: str, doc: Mapping[str, Any]) -> None:
        if name == "start":
            self._uid = doc["uid"]
        elif name == "event":
            self.ended[self._uid, doc["seq_num"] - 1] = time.time()

    def said(self) -> dict[str, Any]:
        """What the watcher says of itself; empty while it does not answer."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/healthz", timeout=60.0).json()
        except httpx.TransportError:
            return {}

    def memory(self) -> float:
        """Memory of the watcher in MB."""
        text = Path(f"/proc/{self.watcher.pid}/status").read_text()
        return float(text.split("VmRSS:")[1].split()[0]) / 1e3

    def beam(self) -> str:
        """Expose the direct beam."""
        line = self._line

        def plan() -> MsgGenerator[Any]:
            yield from bps.mv(line.beamstop.radius, 0.0, line.attenuator.factor, 5e3, line.changer.sample, "")
            yield from direct_beam(line.detector, instrument=self._instrument, exposure_time=1.0)
            yield from bps.mv(line.attenuator.factor, 1.0, line.changer.sample, "AgBh")

        return self.engine(plan())[0]  # type: ignore[index]

    def scan(self, exposures: int, exposure: float) -> str:
        """Take a sample's exposures."""
        plan = expose(
            self._line.detector, sample="AgBh", instrument=self._instrument, exposures=exposures, exposure_time=exposure
        )
        return self.engine(plan)[0]  # type: ignore[index]

    def await_exposures(self, number: int) -> None:
        """Wait until the watcher has desmeared so many."""
        self._await(lambda: self.said().get("exposures", 0) >= number, f"{number} exposures are desmeared")

    def _await(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 900
        while not holds():
            if time.monotonic() > end or self.watcher.poll() is not None:
                sys.exit(f"Waited in vain until {what}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.5)

    def close(self) -> None:
        """Stop all."""
        self.watcher.terminate()
        self.watcher.wait(60)
        self.spool.close()
        self.engine.loop.call_soon_threadsafe(self.engine.loop.stop)


def latency(server: Server, folder: Path, *, scans: int = 6, exposures: int = 10, exposure: float = 3.0) -> list[str]:
    """Measure the time from the end of an exposure until its result is stored, and announced to another client.

    Parameters
    ----------
    server
        That runs; its detectors' folder is written to.
    folder
        For the spool.
    scans, exposures, exposure
        Scans of so many exposures of so many seconds: so slow that none waits for another.

    Returns
    -------
    list of str
        The report's section.
    """
    scene, follower = Scene(server, folder), Follower(server)
    scene.beam()
    scene.scan(2, exposure)  # what is made once is made now
    scene.await_exposures(2)
    before, reads, uids = scene.said()["seconds"], [], []
    for number in range(scans):
        uids.append(scene.scan(exposures, exposure))
        scene.await_exposures(2 + exposures * (number + 1))
        reads.append(follower.read(uids[-1]))
    spent = {stage: (seconds - before[stage]) / (scans * exposures) for stage, seconds in scene.said()["seconds"].items()}
    late = {key: follower.announced.get(key, np.inf) - scene.ended[key] for key in scene.ended if key[0] in uids}
    first, later = ([value for (_, n), value in late.items() if (n == 0) == begin] for begin in (True, False))
    scene.close()
    follower.close()
    lines = [
        "## From the end of an exposure to its result in another client",
        "",
        f"{scans} scans of {exposures} exposures of {exposure:g} s, Pilatus 100k, method dsnet, through the spool. Timed from",
        "the event document to the message that tells another client that it is stored. The first makes node and arrays.",
        "",
        "| exposures | number | median, s | 95 %, s | longest, s |",
        "|---|---|---|---|---|",
    ]
    for name, values in (("first of a scan", first), ("later ones", later), ("all", [*first, *later])):
        cells = " | ".join(f"{np.percentile(values, share):.2f}" for share in (50, 95, 100))
        lines.append(f"| {name} | {len(values)} | {cells} |")
    stages = ", ".join(f"{stage} {1e3 * seconds:.0f}" for stage, seconds in spent.items())
    rest = np.mean([*first, *later]) - sum(spent.values())
    lines += [
        "",
        f"Where it goes, mean in ms an exposure: {stages}; {1e3 * rest:.0f} for spool, delivery, the watcher's look and waiting.",
        f"To find the result and read its last curve takes another {1e3 * np.median(reads):.0f} ms.",
    ]
    return lines


def services(server: Server, folder: Path, **options: Any) -> list[str]:
    """Measure the latency with PostgreSQL and Redis; see `latency`."""
    title, *rest = latency(server, folder, **options)
    return [f"{title}, with PostgreSQL and Redis", *rest]


def sustained(server: Server, folder: Path, *, exposures: int = 1000, exposure: float = 0.05) -> list[str]:
    """Measure a long scan of large frames: rates, memory, and that every exposure is desmeared once.

    Parameters
    ----------
    server
        That runs; its detectors' folder is written to.
    folder
        For the spool.
    exposures, exposure
        Of the scan.

    Returns
    -------
    list of str
        The report's section.
    """
    scene = Scene(server, folder, "Pilatus300k")
    scene.beam()
    scene.scan(2, exposure)
    scene.await_exposures(2)
    memory: list[tuple[int, float]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(2.0):
            if said := scene.said():
                memory.append((said["exposures"], scene.memory()))

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    begin = time.perf_counter()
    uid = scene.scan(exposures, exposure)
    taken = time.perf_counter() - begin
    behind = exposures + 2 - scene.said()["exposures"]
    scene.await_exposures(exposures + 2)
    finished = time.perf_counter() - begin
    done.set()
    sampling.join()
    scene.close()
    nodes = list(server.client()["desmeared"].search(Key("raw_uid") == uid).values())
    result = nodes[0].read()
    each_once = len(nodes) == 1 and len(np.unique(result["I_smeared"].values, axis=0)) == result.sizes["exposure"] == exposures
    half, last = (np.interp(at, *np.transpose(memory)) for at in (exposures / 2, exposures))
    return [
        "## A long scan",
        "",
        f"{exposures} exposures of {exposure:g} s, Pilatus 300k, method dsnet. Simulating a frame costs a core time as well.",
        "",
        f"- Taken in {taken:.0f} s: {exposures / taken:.2f} exposures/s. All desmeared after {finished:.0f} s: "
        f"{exposures / finished:.2f} exposures/s; {behind} were behind when the scan ended.",
        f"- Every exposure desmeared once: {'yes' if each_once else 'NO'}.",
        f"- Memory of the watcher: {memory[0][1]:.0f} MB at the beginning, {half:.0f} MB at half, {last:.0f} MB at the end "
        f"({last - half:+.0f} MB over the last half).",
    ]


SECTIONS: dict[str, tuple[Callable[..., list[str]], dict[str, Any]]] = {
    "runengine": (runengine, {"rounds": 2, "exposures": 3, "events": 20}),
    "latency": (latency, {"scans": 1, "exposures": 3, "exposure": 0.5}),
    "services": (services, {"scans": 1, "exposures": 3, "exposure": 0.5}),
    "sustained": (sustained, {"exposures": 10}),
}
"""What is measured, and how small it is for a smoke test."""


def measure(name: str, command: str, *, quick: bool) -> str:
    """Measure one section on a server of its own; says with what, and warns where the machine was busy when it began."""
    load = os.getloadavg()[1]
    function, small = SECTIONS[name]
    with tempfile.TemporaryDirectory() as temporary:
        server = Server(Path(temporary) / "data", timeout=300)
        with on_services(server) if name == "services" else nullcontext(), server:
            title, *rest = function(server, Path(temporary), **(small if quick else {}))
    lines = [title, "", provenance(command, PACKAGES)]
    if load > BUSY * (os.cpu_count() or 1):
        lines += ["", f"**The machine had a load of {load:.1f} when this began: other work, or the section before.**"]
    return "\n".join([*lines, *rest]) + "\n"


def main() -> None:
    """Measure and write the report; sections that are not measured now stay as they are."""
    parser = argparse.ArgumentParser(description="Measure live work on the simulated beamline.")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; repeatable")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few and short rounds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/live.py", *sys.argv[1:]])
    path = options.output / "live.md"
    before = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.exists() else []
    texts = {f"## {text}".splitlines()[0]: f"## {text}" for text in before}
    for name in options.section or SECTIONS:
        text = measure(name, command, quick=options.quick)
        texts[text.splitlines()[0]] = text
        print(text, flush=True)
        parts = [f"{part.rstrip()}\n" for part in texts.values()]
        path.write_text("\n".join(["# Live: what it costs and how fast it is\n", *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()

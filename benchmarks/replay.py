"""How fast an archive is replayed, on this machine, with a real server; and what more runs would need.

An archive of one-exposure runs: some are exposed on the simulated beamline, the others are copies of their nodes in the
catalog's database, each with a uid and a time of its own; their frames are those of the originals. All are replayed by
`dsnet_bluesky.replay` in a local cluster, server and workers sharing this machine, then once more (nothing is to do), and a
part is computed again and compared. Then the parts by themselves: computing on one and on two processes, and storing.

    python benchmarks/replay.py                          # 10,000 runs on SQLite and on PostgreSQL: a quarter of an hour
    python benchmarks/replay.py --quick                  # a smoke test
    python benchmarks/replay.py --runs 2000 --on sqlite
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator
from bluesky_tiled_plugins import TiledWriter
from databases import on_services
from ophyd_async.plan_stubs import ensure_connected
from provenance import provenance
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tiled.catalog import orm
from tiled.utils import ensure_specified_sql_driver

from dsnet_bluesky.adapters.indexes import create_indexes
from dsnet_bluesky.derived import Finished, store_together
from dsnet_bluesky.pipeline import Config, prepare_exposures
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.questions import Model
from dsnet_bluesky.replay import Summary, replay
from dsnet_bluesky.replay.service import BATCH
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("bluesky", "tiled", "distributed", "torch", "pyFAI")
ORIGINALS = 20
AT_ONCE = 512
COMPUTING = ("reducing", "desmearing")
KEPT = ("raw_uid", "method", "model_version", "model_order", "config", "config_sha256", "model_sha256", "sample_name")
BEAMSTOP = 2.8e-3


class Beamline:
    """The simulated beamline with a small detector, writing into a server's catalog."""

    def __init__(self, server: Server, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mask = folder / "mask.npy"
        self.camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self.line = SimBeamline(folder, self.camera)
        np.save(self.mask, self.camera.mask(BEAMSTOP))
        self.instrument = Instrument(self.camera.poni, slit_width=4e-3, slit_height=2.5e-3)
        self.engine = RunEngine({})
        self.engine(ensure_connected(*self.line.devices))
        self.engine.subscribe(TiledWriter(server.client()["raw"], batch_size=1))

    def expose(self, samples: int) -> list[str]:
        """Expose a direct beam and samples; return the samples' uids."""
        self.engine(self._beam())
        return [self.engine(self._sample(k))[0] for k in range(samples)]  # type: ignore[index]

    def _beam(self) -> MsgGenerator[Any]:
        line = self.line
        yield from bps.mv(line.beamstop.radius, 0.0, line.attenuator.factor, 5000.0, line.changer.sample, "")
        yield from bps.configure(self.instrument, mask=None)
        yield from direct_beam(line.detector, instrument=self.instrument, exposure_time=60.0)

    def _sample(self, number: int) -> MsgGenerator[Any]:
        line, name = self.line, ("AgBh", "sphere")[number % 8 > 0]
        yield from bps.mv(line.beamstop.radius, BEAMSTOP, line.attenuator.factor, 1.0, line.changer.sample, name)
        yield from bps.configure(self.instrument, mask=self.mask)
        yield from expose(line.detector, sample=name, instrument=self.instrument, exposure_time=60.0)


async def multiply(database: str, uids: Sequence[str], count: int) -> None:
    """Copy runs in the catalog's database until there are so many."""
    engine = create_async_engine(database)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        originals = [await _tree(session, uid) for uid in uids]
        for first in range(0, count - len(uids), AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, count - len(uids)))
            await _copy(session, [(originals[number % len(originals)], number) for number in numbers])
            await session.commit()
    await engine.dispose()


async def _tree(session: AsyncSession, uid: str) -> list[tuple[Any, list[Any]]]:
    """Read a run's node, its stream and what lies in it, each with its data sources and their assets."""
    run = (await session.execute(select(orm.Node).where(orm.Node.key == uid))).scalars().one()
    nodes, parents = [run], [run.id]
    while parents:
        children = (await session.execute(select(orm.Node).where(orm.Node.parent.in_(parents)))).scalars().all()
        nodes, parents = [*nodes, *children], [child.id for child in children]
    return [(node, await _sources(session, int(node.id))) for node in nodes]  # type: ignore[arg-type]


async def _sources(session: AsyncSession, node_id: int) -> list[Any]:
    found = (await session.execute(select(orm.DataSource).where(orm.DataSource.node_id == node_id))).scalars().all()
    assets = orm.DataSourceAssetAssociation
    return [(s, (await session.execute(select(assets).where(assets.data_source_id == s.id))).scalars().all()) for s in found]


def _values(row: Any, **changes: Any) -> dict[str, Any]:
    kept = {
        a.key: getattr(row, a.key) for a in row.__mapper__.column_attrs if a.key not in ("id", "time_created", "time_updated")
    }
    return {**kept, **changes}


async def _copy(session: AsyncSession, trees: Sequence[tuple[list[tuple[Any, list[Any]]], int]]) -> None:
    """Copy trees of the same shape, each with a number: all runs, then all streams, then what lies in them."""
    ids: list[dict[int, int]] = [{} for _ in trees]
    for place in range(len(trees[0][0])):
        new = [_node(tree[place][0], number, known) for (tree, number), known in zip(trees, ids, strict=True)]
        session.add_all(new)
        await session.flush()
        sources = []
        for (tree, _), known, node in zip(trees, ids, new, strict=True):
            old, described = tree[place]
            known[old.id] = int(node.id)  # type: ignore[arg-type]
            sources += [(orm.DataSource(**_values(source, node_id=node.id)), assets) for source, assets in described]
        session.add_all([source for source, _ in sources])
        await session.flush()
        rows = [_values(asset, data_source_id=source.id) for source, assets in sources for asset in assets]
        if rows:
            await session.execute(insert(orm.DataSourceAssetAssociation), rows)


def _node(old: Any, number: int, known: dict[int, int]) -> orm.Node:
    changes: dict[str, Any] = {"parent": known.get(old.parent, old.parent)}
    if not known:  # the run itself
        uid, metadata = str(uuid.uuid4()), copy.deepcopy(old.metadata_)
        metadata["start"] |= {"uid": uid, "time": metadata["start"]["time"] + 1e-3 * (number + 1), "scan_id": 1000 + number}
        metadata["stop"] |= {"run_start": uid}
        changes |= {"key": uid, "metadata_": metadata}
    return orm.Node(**_values(old, **changes))


def whole(server: Server, folder: Path, runs: int, workers: int | None) -> tuple[list[str], Cost]:
    """Replay an archive, once and again, with so many workers (by default as many as there are cores)."""
    uids = Beamline(server, folder).expose(min(ORIGINALS, 1 + runs // 10))
    database = yaml.safe_load(server.config.read_text())["trees"][0]["args"]["uri"].replace(
        "${DSNET_DATA}", str(server.data_directory)
    )
    asyncio.run(multiply(ensure_specified_sql_driver(database), uids, runs))
    create_indexes(database)  # as `dsnet-bluesky index` does
    client = server.client()
    assert len(client["raw"]) == runs + 1
    reports: list[tuple[float, int]] = []

    def tell(so_far: Summary) -> None:
        reports.append((time.monotonic(), so_far.stored))
        rate = so_far.stored / (time.monotonic() - started)
        print(f"\r{so_far.stored} of {runs}, {rate:.1f}/s", end="", file=sys.stderr, flush=True)

    started, before = time.monotonic(), _cpu(server.pid)
    first = replay(client, model="dsnet", notify=tell, workers=workers)
    cost = Cost((_cpu(server.pid) - before) / runs, sum(first.seconds[part] for part in COMPUTING) / runs)
    second = replay(client, model="dsnet", workers=workers)
    checked = replay(client, model="dsnet", verify=True, limit=min(256, runs), workers=workers)
    found = client["desmeared"].search(Model("dsnet", "==2.0.0"))
    readable = sum(node.read()["I"].notnull().all().item() for node in found.values()[:50])
    each = {name: f"{1e3 * seconds / runs:.1f}" for name, seconds in first.seconds.items()}
    (begin, done), (end, total) = reports[len(reports) // 4], reports[-1]
    lines = [
        f"- {first.stored} of {runs} runs stored in {first.wall:.0f} s, the start of the workers included: "
        f"**{first.stored / first.wall:.1f} results a second** ({(total - done) / max(end - begin, 1e-9):.1f} once they run); "
        f"{sum(first.failed.values())} failed. `Model('dsnet', '==2.0.0')` finds {len(found)}; of the first {min(50, runs)} "
        f"{readable} were read and are whole.",
        "- Time of the workers for a run, in ms: " + ", ".join(f"{name} {value}" for name, value in each.items()) + "; "
        f"of the server's process: {1e3 * cost.server:.1f}.",
        f"- A second replay: {second.to_do} to do, {second.wall:.1f} s.",
        f"- Computed again and compared: {checked.same} equal, {len(checked.different)} differ.",
        f"- Storing by itself, one client, batches of {BATCH}: {storing(client, found):.0f} results a second.",
    ]
    return lines, cost


@dataclass(frozen=True)
class Cost:
    """Seconds of a processor for a run: of the server, and of a worker that reduces and desmears."""

    server: float
    computing: float


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def storing(client: Any, found: Any) -> float:
    """Give results a second that are stored when nothing is to compute: copies of stored ones, under other keys."""
    nodes = list(found.values()[:AT_ONCE])
    copies = [
        Finished(uuid.uuid4().hex, {name: node.metadata[name] for name in KEPT if name in node.metadata}, node.read(), None)
        for node in nodes
    ]
    begin = time.perf_counter()
    for first in range(0, len(copies), BATCH):
        assert not store_together(client, copies[first : first + BATCH])
    return len(copies) / (time.perf_counter() - begin)


def rate_of(processes: int, frames: Path, seconds: float) -> float:
    """Give runs a second that processes reduce and desmear from frames in memory, without any server."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = [pool.submit(_compute, frames, seconds) for _ in range(processes)]
        return sum(job.result() for job in jobs)


def _compute(frames: Path, seconds: float) -> float:
    import torch

    torch.set_num_threads(1)
    stored = np.load(frames, allow_pickle=False)
    poni = json.loads(str(stored["poni"]))
    mask = stored["mask"]
    prepared = prepare_exposures(stored["beam"], poni, mask=mask, beam_mask=np.zeros_like(mask), config=Config())
    batch = np.repeat(stored["sample"][None], 64, axis=0)
    prepared.answer(prepared.reduce(batch[:8]))
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        prepared.answer(prepared.reduce(batch))
        done += len(batch)
    return done / (time.perf_counter() - begin)


def parts(folder: Path, seconds: float) -> list[str]:
    """Measure computing by itself, on one process and on two."""
    camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
    rng = np.random.default_rng(0)
    y, x = np.indices(camera.mask(0).shape)
    radius = np.hypot(y - 97.5, x - 243.5)
    beam = rng.poisson(1e5 * (radius < 6))
    sample = rng.poisson(200 * np.exp(-radius / 60) + 5)
    frames = folder / "frames.npz"
    np.savez(frames, beam=beam, sample=sample, mask=camera.mask(BEAMSTOP), poni=np.array(json.dumps(dict(camera.poni))))
    one, two = (rate_of(processes, frames, seconds) for processes in (1, 2))
    return [
        f"- Computing by itself (reduction and dsnet, batches of 64, frames in memory; curves that need no "
        f"proximal steps): {one:.0f} runs a second in one process, "
        f"{two:.0f} in two: {two / one:.2f} times."
    ]


def million(cost: Cost) -> list[str]:
    """Work out from the measured times what a million runs would need."""
    most = 1 / cost.server
    servers = 1e6 / 3600 / most
    return [
        "",
        "## A million runs",
        "",
        f"A run takes {1e3 * cost.server:.0f} ms of the server's process, and {1e3 * cost.computing:.0f} ms of a worker for "
        f"reducing and desmearing. One server process is saturated at {most:.0f} results a second: {1e6 / most / 3600:.1f} hours "
        f"for a million, and more than {most * cost.computing + 1:.0f} workers are in vain. In one hour: {servers:.0f} server "
        "processes on one PostgreSQL (as far as it follows: one was measured), and "
        f"{1e6 / 3600 * cost.computing:.0f} cores of workers, beside what PostgreSQL itself and reading the frames take.",
    ]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description="Replay an archive.")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--on", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few runs, on SQLite")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs, databases = (40, ["sqlite"]) if options.quick else (options.runs, options.on or ["sqlite", "postgresql"])
    load = os.getloadavg()[0]
    command = shlex.join(["python", "benchmarks/replay.py", *sys.argv[1:]])
    lines = ["# Replay of an archive", "", provenance(command, PACKAGES), f"Load of the machine before: {load:.1f}."]
    cost = Cost(1.0, 1.0)
    with tempfile.TemporaryDirectory() as temporary:
        for database in databases:
            folder = Path(temporary) / database
            server = Server(folder / "data", timeout=300)
            with on_services(server) if database == "postgresql" else nullcontext(), server:
                found, cost = whole(server, server.data_directory / "detector", runs, 1 if options.quick else None)
            lines += ["", f"## {runs:,} runs of one exposure, Pilatus 100k, on {database}", "", *found]
        lines += ["", "## Parts by themselves", "", *parts(Path(temporary), 1.0 if options.quick else 20.0), *million(cost)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "replay.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""A catalog of many results, as a year of measurements and a replay leave it, without measuring for a year."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sqlalchemy import Connection, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from tiled.catalog import orm
from tiled.structures.core import Spec

from dsnet_bluesky.data import curve
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.versions import version_order

__all__ = ["BEGIN", "SAMPLES", "YEAR", "add_results", "store_one"]

BEGIN, YEAR = 1.76e9, 3.15e7
"""Of the year in which the runs began, and its length, in s."""

SAMPLES = [f"sample {number:03d}" for number in range(200)]

FIRST = (("dsnet", "2.0.0", 0.8), ("dsnet-paper", "1.0.0", 0.1), ("map", "", 0.1))
"""What desmeared a run when it was measured, and for which share of the runs; the replay is by `REPLAY`."""

REPLAY = ("dsnet", "2.1.0")
FAILING = 0.01
CHUNK = 2000
CLOSURE = (
    "INSERT INTO nodes_closure (ancestor, descendant, depth) SELECT id, id, 0 FROM nodes WHERE id >= :first",
    *(
        "INSERT INTO nodes_closure (ancestor, descendant, depth) SELECT c.ancestor, n.id, c.depth + 1 FROM nodes n "
        "JOIN nodes_closure c ON c.descendant = n.parent JOIN nodes p ON p.id = n.parent "
        f"WHERE n.id >= :first AND p.id {of} :first"
        for of in ("<", ">=")
    ),
)
"""What Tiled's trigger does for each new node: first for the results, then for what is below them."""

NODES, SOURCES = (orm.Base.metadata.tables[name] for name in ("nodes", "data_sources"))

Row = dict[str, Any]


def store_one(client: Any) -> str:
    """Store one result as the watcher does, of which the others are copies; returns its key."""
    uid = str(uuid.uuid4())
    start = {"uid": uid, "time": BEGIN, "scan_id": 1, "sample": {"name": SAMPLES[0], "batch": 1}, "proposal_id": "p1"}
    client["raw"].create_container(key=uid, metadata={"start": start}, specs=[Spec("BlueskyRun", version="3.0")])
    config = Config()
    metadata = result_metadata(
        start,
        direct_beam_uid=str(uuid.uuid4()),
        config=config.to_dict(),
        config_sha256=config.sha256,
        method="dsnet",
        model_name="dsnet",
        model_version="2.0.0",
        model_sha256="0" * 64,
        pairing={"how": "nearest", "reason": "nearest in time, 1.2 h before", "age": 4321.0},
    )
    q = np.linspace(0.05, 2, 400)
    smearing = Smearing.gaussian(q, 0.02)
    writer = ResultWriter.create(client, key := str(uuid.uuid4()), metadata)
    writer.append(desmear(curve(q, smearing.apply(np.exp(-smearing.q_calc))), smearing, "lake"))
    writer.complete()
    return key


async def add_results(uri: str, key: str, count: int, seed: int = 0) -> None:
    """Add results to a catalog, in its own tables: half of them measured, half of them the replay of the same runs.

    Parameters
    ----------
    uri
        Of the database.
    key
        Of the result of `store_one`.
    count, seed
        How many results to add, and by which random numbers.
    """
    engine = create_async_engine(uri)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_add, key, count, np.random.default_rng(seed))
            await connection.commit()
        if engine.dialect.name == "postgresql":
            async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await connection.exec_driver_sql("VACUUM ANALYZE")  # as its own service does sooner or later
    finally:
        await engine.dispose()


def _add(connection: Connection, key: str, count: int, random: np.random.Generator) -> None:
    result = _row(connection, NODES, NODES.c.key == key)
    rows = _row(connection, NODES, NODES.c.parent == result["id"])
    sources = [_row(connection, SOURCES, SOURCES.c.node_id == node["id"]) for node in (result, rows)]
    free = {table.name: connection.execute(select(func.max(table.c.id))).scalar_one() + 1 for table in (NODES, SOURCES)}
    first = free["nodes"]
    with _without_triggers(connection):
        for begin in range(0, count, CHUNK):
            said = _texts(result["metadata"], begin, min(begin + CHUNK, count), count // 2, random)
            nodes, places = [], []
            for metadata in said:
                mine, below = free["nodes"], free["nodes"] + 1
                nodes.append({**result, "id": mine, "key": str(uuid.UUID(bytes=random.bytes(16))), "metadata": metadata})
                nodes.append({**rows, "id": below, "parent": mine})
                for node, source in zip((mine, below), sources, strict=True):
                    places.append({**source, "id": free["data_sources"], "node_id": node})
                    free["data_sources"] += 1
                free["nodes"] += 2
            connection.execute(insert(NODES), nodes)
            connection.execute(insert(SOURCES), places)
        for statement in CLOSURE:
            connection.execute(text(statement), {"first": first})
    if connection.dialect.name == "postgresql":
        for name, after in free.items():
            connection.execute(text(f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), {after})"))


@contextmanager
def _without_triggers(connection: Connection) -> Iterator[None]:
    """Tiled's triggers keep the closure and, in SQLite, the words of all metadata; at once is faster than node by node."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET session_replication_role = replica"))
        yield
        connection.execute(text("SET session_replication_role = DEFAULT"))
        return
    triggers = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'nodes'")).all()
    for name, _ in triggers:
        connection.exec_driver_sql(f"DROP TRIGGER {name}")
    yield
    connection.exec_driver_sql("INSERT INTO metadata_fts5(metadata_fts5) VALUES ('rebuild')")
    for _, statement in triggers:
        connection.exec_driver_sql(statement)


def _row(connection: Connection, table: Table, condition: Any) -> Row:
    return dict(connection.execute(select(table).where(condition)).mappings().one())


def _texts(template: Row, begin: int, end: int, runs: int, random: np.random.Generator) -> Iterator[Row]:
    """Give metadata: first of the runs as they were measured, then of their replay."""
    shares = [share for *_, share in FIRST]
    for number in range(begin, end):
        replay, run = divmod(number, runs)
        method, version = REPLAY if replay else FIRST[random.choice(len(FIRST), p=shares)][:2]
        yield _said(template, runs, run, method, version, random)


def _said(template: Row, runs: int, run: int, method: str, version: str, random: np.random.Generator) -> Row:
    """Give the metadata of a result of a run; what is of the run is drawn from the run's own random numbers."""
    own = np.random.default_rng((runs, run))
    uid, beam = (str(uuid.UUID(bytes=own.bytes(16))) for _ in range(2))
    time, sample = BEGIN + YEAR * own.random(), SAMPLES[own.integers(len(SAMPLES))]
    said = copy.deepcopy(template)
    chi2 = float(random.lognormal(0.0, 0.3))
    said |= {
        "raw_uid": uid,
        "original_start_uid": uid,
        "original_start_time": time,
        "original_scan_id": run,
        "parent_uids": [uid, beam],
        "parent_node_map": {"sample": uid, "direct_beam": beam},
        "direct_beam_uid": beam,
        "sample": {"name": sample, "batch": run % 7},
        "sample_name": sample,
        "method": method,
        "model_name": method if version else "",
        "model_version": version,
        "model_order": version_order(version) if version else None,
        "chi2_median": chi2,
        "chi2_largest": chi2 * float(1 + random.exponential(0.2)),
        "updated": time + 60 if version != REPLAY[1] else BEGIN + YEAR + run,
    }
    said["writer"]["claim"] = random.bytes(16).hex()
    said["attrs"] |= {"raw_uid": uid, "method": method}
    if random.random() < FAILING:
        said |= {"status": "failed", "reason": "The direct beam is too weak.", "failure": {"kind": "input", "traceback": None}}
        said |= {"exposures": 0, "chi2_median": None, "chi2_largest": None}
    return said

"""How fast questions about results are answered, in catalogs of up to a hundred thousand results.

A year of runs, each with the result that was made when it was measured and that of a replay, in SQLite and in
PostgreSQL, which must run at 127.0.0.1:5432; behind a real server, asked by a real client. Writes Markdown:

    python benchmarks/queries.py            # ten minutes
    python benchmarks/queries.py --quick    # a smoke test
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import yaml
from databases import database as own_database
from provenance import provenance
from queries_data import BEGIN, SAMPLES, YEAR, add_results, store_one

from dsnet_bluesky.adapters.indexes import create_indexes
from dsnet_bluesky.questions import Between, Complete, Failed, Latest, Model, OfRun, Quality, Question, Sample
from dsnet_bluesky.server import Server

RESULTS = Path(__file__).parent / "results"
SIZES = (1_000, 10_000, 100_000)
BY_TIME = ("original_start_time", -1)
PATIENCE = 1.0
"""Seconds that the repeats of one question may take; one is asked at least once after the first."""

MONTH = Between(BEGIN + YEAR / 2, BEGIN + YEAR * 7 / 12)


def questions(uid: str) -> dict[str, list[Question]]:
    """Return what is asked, by what the report calls it."""
    sample = Sample(SAMPLES[3])
    return {
        "everything": [],
        "`OfRun`": [OfRun(uid)],
        "`Sample`": [sample],
        "`Complete`": [Complete()],
        "`Failed`": [Failed()],
        "`Quality(1.5)`": [Quality(1.5)],
        "`Quality(0.6)`": [Quality(0.6)],
        "`Between`, a month": [MONTH],
        '`Model("dsnet", ">=2,<3")`': [Model("dsnet", ">=2,<3")],
        '`Model("dsnet-paper", "==1.0.0")`': [Model("dsnet-paper", "==1.0.0")],
        "`Latest`": [Latest()],
        "`Latest`, `Sample`": [Latest(), sample],
        "`Latest`, `Between`": [Latest(), MONTH],
        '`Latest("map")`': [Latest("map")],
        "`Latest`, `Sample`, `Model`, `Quality`": [Latest(), sample, Model("dsnet", ">=2"), Quality(1.5)],
    }


ASKED: dict[str, Callable[[Any], Any]] = {
    "first 10": lambda found: found.items()[:10],
    "sorted, first 10": lambda found: found.sort(BY_TIME).items()[:10],
    "sorted, first 100": lambda found: found.sort(BY_TIME).items()[:100],
    "sorted, table of 100": lambda found: found.sort(BY_TIME).to_table(limit=100),
    "`len`": len,
}
"""What is asked of each selection."""

SORTED = [name for name in ASKED if name.startswith("sorted")]


@contextmanager
def catalog(database: str, folder: Path) -> Iterator[tuple[Any, str]]:
    """Serve an empty catalog; gives its client and the URI of its database."""
    server = Server(folder, timeout=200)
    if database == "SQLite":
        with server:
            yield server.client(), f"sqlite+aiosqlite:///{folder}/catalog.db"
        return
    with own_database() as address:
        uri = f"postgresql+asyncpg://{address}"
        config = yaml.safe_load(server.config.read_text())
        for tree in config["trees"]:
            tree["args"]["uri"] = uri
        server.config.write_text(yaml.safe_dump(config, sort_keys=False))
        with server:
            yield server.client(), uri


def milliseconds(ask: Callable[[], Any], repeats: int) -> np.ndarray:
    """Time a question, after a first time that does not count."""
    ask()
    taken: list[float] = []
    while len(taken) < repeats and sum(taken) < 1e3 * PATIENCE:
        begin = time.perf_counter()
        ask()
        taken.append(1e3 * (time.perf_counter() - begin))
    return np.array(taken)


def measure(results: Any, uid: str, repeats: int, only: Sequence[str] = ()) -> dict[str, dict[str, np.ndarray]]:
    """Time every question, or some."""
    found = {}
    for name, parts in questions(uid).items():
        if only and name not in only:
            continue
        selection = results
        for part in parts:
            selection = selection.search(part)
        found[name] = {what: milliseconds(lambda ask=ask, s=selection: ask(s), repeats) for what, ask in ASKED.items()}
    return found


def _table(measured: dict[str, dict[str, np.ndarray]]) -> list[str]:
    lines = [f"| | {' | '.join(ASKED)} |", f"|---|{'---|' * len(ASKED)}"]
    for name, row in measured.items():
        cells = (f"{np.median(taken):.0f} ({np.quantile(taken, 0.95):.0f})" for taken in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def section(database: str, sizes: Sequence[int], repeats: int, folder: Path) -> list[str]:
    """Measure one database at growing sizes; returns the report's section."""
    lines: list[str] = []
    with catalog(database, folder) as (client, uri):
        key, stored = store_one(client), 0
        results = client["desmeared"]
        uid = results[key].metadata["raw_uid"]
        create_indexes(uri)
        for size in sizes:
            begin = time.perf_counter()
            asyncio.run(add_results(uri, key, size - stored, seed=size))
            stored, filled = size, time.perf_counter() - begin
            lines += ["", f"## {database}, {size:,} results", "", *_verdict(measured := measure(results, uid, repeats))]
            lines += ["", *_table(measured), "", f"(Filled in {filled:.0f} s.)"]
            print("\n".join(lines[-len(measured) - 5 :]), flush=True)
        if database == "PostgreSQL":
            lines += _without(uri, results, uid, sizes[-1])
    return lines


def _verdict(measured: dict[str, dict[str, np.ndarray]]) -> list[str]:
    medians = {(name, what): float(np.median(row[what])) for name, row in measured.items() for what in SORTED}
    slow = [f"{name}, {what}: {taken:.0f} ms" for (name, what), taken in medians.items() if taken > 100]
    return [f"Sorted pages above 100 ms: {'; '.join(slow) or 'none'}."]


def _without(uri: str, results: Any, uid: str, size: int) -> list[str]:
    """Measure PostgreSQL once more without our indexes, and how long they take to be made."""

    async def drop() -> None:
        connection = await asyncpg.connect(uri.replace("+asyncpg", ""))
        for (name,) in await connection.fetch("SELECT indexname FROM pg_indexes WHERE indexname LIKE 'dsnet\\_%'"):
            await connection.execute(f"DROP INDEX {name}")
        await connection.close()

    asyncio.run(drop())
    some = ["`OfRun`", "`Sample`", "`Complete`", "`Latest`, `Sample`"]
    lines = ["", f"## PostgreSQL, {size:,} results, without indexes", "", *_table(measure(results, uid, 3, some))]
    begin = time.perf_counter()
    create_indexes(uri)
    return [*lines, "", f"`dsnet-bluesky index` made them within {time.perf_counter() - begin:.0f} s."]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A smoke test: 200 results, SQLite only.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    cases = {"SQLite": (200,)} if chosen.quick else {"PostgreSQL": SIZES, "SQLite": SIZES}
    repeats = 2 if chosen.quick else chosen.repeats
    load = os.getloadavg()[0]
    lines = [
        "# How fast questions are answered",
        "",
        provenance("python benchmarks/queries.py", ("tiled", "sqlalchemy", "asyncpg")),
        f"Load of the machine at the beginning: {load:.1f}; server, database and client share it.",
        "",
        "Milliseconds as a user waits for them: median (95 % of the repeats were faster). `Latest` is the newest result of each "
        "run; half of the results are those of a replay, 1 % failed. Sorted by the begin of the run, the last first.",
    ]
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dsnet-queries-") as folder:
        for database, sizes in cases.items():
            lines += section(database, sizes, repeats, Path(folder) / database)
            (chosen.output / "queries.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Indexes of the catalog's database, which make questions about results fast; answers do not depend on them."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from tiled.utils import ensure_specified_sql_driver

from dsnet_bluesky.data import BadInput

from .comparisons import KEYS, TOGETHER, VALUES
from .latest import WORDINGS

__all__ = ["create_indexes", "definitions"]

PREFIX = "dsnet_"

EXISTING = {
    "postgresql": "SELECT relname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
    "WHERE indrelid = 'nodes'::regclass AND relname LIKE 'dsnet\\_%'",
    "sqlite": "SELECT name, 1 FROM sqlite_master WHERE type = 'index' AND tbl_name = 'nodes' AND name GLOB 'dsnet_*'",
}


def definitions(dialect: str) -> dict[str, str]:
    """Return what the indexes are of, by name; a name holds a digest of what it is of.

    Parameters
    ----------
    dialect
        ``"postgresql"`` or ``"sqlite"``.
    """
    wording = WORDINGS[dialect]
    ranks = ", ".join(f"{rank.format(t='')} DESC" for rank in wording.ranks)
    found = {"latest": f"({wording.run.format(t='')}, {ranks}) WHERE {wording.counts.format(t='')}"}
    for keys in (*((key,) for key in KEYS), *TOGETHER):
        values = ", ".join(VALUES[dialect].format(t="", key=key) for key in keys)
        found["_".join(keys)] = f"(parent, {values}, id)"
    return {f"{PREFIX}{name}_{hashlib.sha256(what.encode()).hexdigest()[:8]}": what for name, what in found.items()}


def create_indexes(uri: str) -> list[str]:
    """Create the indexes that are not there, and remove those that an earlier version made; may be repeated.

    PostgreSQL goes on writing meanwhile; SQLite does not, a second for each ten thousand results or so.

    Parameters
    ----------
    uri
        Of the catalog's database, as in the server's configuration.

    Returns
    -------
    list of str
        Names of those that were created.

    Raises
    ------
    BadInput
        If the database cannot be used, or is no catalog.
    """
    try:
        return asyncio.run(_create(ensure_specified_sql_driver(uri)))
    except BadInput:
        raise
    except (ArgumentError, InvalidRequestError, ImportError, ValueError) as error:  # of another kind, or with a port that is none
        raise BadInput(
            f"That is no uri of a catalog's database ({error}); write it as sqlite:////data/catalog.db or postgresql://host/name."
        ) from error
    except (DBAPIError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise BadInput(f"No catalog can be indexed there ({reason}); give the uri of the catalog's database.") from error


async def _create(uri: str) -> list[str]:
    engine = create_async_engine(uri, isolation_level="AUTOCOMMIT")
    if engine.dialect.name not in WORDINGS:
        raise BadInput(f"A catalog lies in SQLite or PostgreSQL, not in {engine.dialect.name}.")
    path = engine.url.database or ""
    if engine.dialect.name == "sqlite" and not Path(path).is_file():
        raise BadInput(f"There is no file {path}; give the uri of the catalog's database, as in the server's configuration.")
    try:
        async with engine.connect() as connection:
            return await _bring_up_to_date(connection, engine.dialect.name)
    finally:
        await engine.dispose()


async def _bring_up_to_date(connection: AsyncConnection, dialect: str) -> list[str]:
    await connection.execute(text("SELECT id FROM nodes LIMIT 1"))  # or it is no catalog
    wanted = definitions(dialect)
    # One that PostgreSQL could not finish is there, but invalid.
    existing = {row[0]: row[1] for row in await connection.execute(text(EXISTING[dialect]))}
    concurrently = "CONCURRENTLY" if dialect == "postgresql" else ""
    for name, valid in existing.items():
        if name not in wanted or not valid:
            await connection.exec_driver_sql(f"DROP INDEX {concurrently} IF EXISTS {name}")
    created = [name for name in wanted if not existing.get(name)]
    for name in created:
        await connection.exec_driver_sql(f"CREATE INDEX {concurrently} IF NOT EXISTS {name} ON nodes {wanted[name]}")
    if created and dialect == "postgresql":
        # So that it knows what they hold. SQLite would learn that a parent has two children on average, and trust in it.
        await connection.exec_driver_sql("ANALYZE nodes")
    return created

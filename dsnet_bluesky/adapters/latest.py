"""How the catalog answers `questions.Latest`: by SQL, alike on SQLite and PostgreSQL.

For each result that the other conditions leave, the newest result of the same raw run is looked up; it is found if it is
that one. `indexes` make the look-up fast; the answer does not depend on them. The condition is plain SQL because a
database uses an index of an expression only for the very same expression.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Boolean, bindparam, func, literal, select, text, type_coerce
from sqlalchemy.sql.elements import ColumnElement
from tiled.catalog import orm
from tiled.catalog.adapter import CatalogContainerAdapter, CatalogNodeAdapter
from tiled.queries import Eq
from tiled.utils import UnsupportedQueryType

from dsnet_bluesky.questions import Latest

__all__ = ["WORDINGS", "Wording", "latest"]


@dataclass(frozen=True)
class Wording:
    """What a database calls the parts of the question; each is a template with the name of the table before its columns.

    Attributes
    ----------
    run
        The raw run of a result.
    same_run
        Whether ``newest`` is of the same raw run as ``nodes``, in words for which Tiled has an index; empty if it has none.
    counts
        Whether a result may be the newest: complete, and of a released version if of a model.
    ranks
        What comes first, in descending order.
    method
        Whether a result is of the method ``:method``.
    """

    run: str
    same_run: str
    counts: str
    ranks: tuple[str, ...]
    method: str


WORDINGS = {
    # Nothing is cast: what others store in the catalog may be anything, and an index must be able to hold it.
    "postgresql": Wording(
        run="({t}metadata ->> 'raw_uid')",
        same_run="newest.metadata @> jsonb_build_object('raw_uid', nodes.metadata -> 'raw_uid')",
        counts="{t}metadata ->> 'status' = 'complete' AND "
        "(right({t}metadata ->> 'model_order', 3) = '999' OR coalesce({t}metadata ->> 'model_version', '') = '')",
        ranks=(
            """({t}metadata @> '{{"method": "dsnet"}}')""",
            "(coalesce({t}metadata -> 'model_order', 'null'))",  # numbers come after null, as JSON is ordered there
            "{t}id",
        ),
        method="{t}metadata ->> 'method' = :method",
    ),
    "sqlite": Wording(
        run="json_extract({t}metadata, '$.raw_uid')",
        same_run="",
        counts="json_extract({t}metadata, '$.status') = 'complete' AND "
        "(substr(json_extract({t}metadata, '$.model_order'), -3) = '999' OR "
        "coalesce(json_extract({t}metadata, '$.model_version'), '') = '')",
        ranks=(
            "(json_extract({t}metadata, '$.method') IS 'dsnet')",
            "json_extract({t}metadata, '$.model_order')",
            "{t}id",
        ),
        method="json_extract({t}metadata, '$.method') = :method",
    ),
}


def latest(query: Latest, tree: Any) -> Any:
    """Narrow a container of the catalog to the newest result of each raw run.

    Raises
    ------
    UnsupportedQueryType
        If the catalog lies in a database that is neither SQLite nor PostgreSQL.
    """
    wording = WORDINGS.get(tree.context.engine.dialect.name)
    if wording is None:
        raise UnsupportedQueryType("dsnet_latest")
    if tree.context.engine.dialect.name == "sqlite":
        with suppress(sqlite3.OperationalError):  # of a connection that writes just now: the next question tries again
            _index_once(str(tree.context.engine.url.database))
    if query.method:
        tree = tree.search(Eq("method", query.method))
    condition = _condition(wording, query.method)
    return NewestFirst(
        tree.context,
        tree.node,
        conditions=[*tree.conditions, condition],
        queries=tree.queries,
        sorting=tree.sorting,
        deep=tree.deep,
        max_depth=tree.max_depth,
        access_filters=tree.access_filters,
    )


class NewestFirst(CatalogContainerAdapter):
    """A container whose children are counted in the order in which they are asked for, or else from the last one on.

    With every page Tiled counts what it is a page of, up to `exact_count_limit`, in any order. After a replay the
    catalog's first results are all superseded: counting from there would look at half of the catalog.
    """

    async def lbound_len(self, threshold: int) -> int:
        """Count the children up to a threshold, see Tiled's method of this name."""
        some = self._scope_statement(select(literal(1)).select_from(orm.Node))
        order = [orm.Node.id.desc()] if self._is_default_sort else self.order_by_clauses
        some = self.apply_conditions(some).order_by(*order).limit(threshold + 1).cte("some")
        async with self.context.session() as database:
            return (await database.execute(select(func.count()).select_from(some))).scalar_one()


@cache
def _index_once(path: str) -> None:
    """Give an embedded catalog the index without which each result would be compared with all others.

    PostgreSQL has one of Tiled's that serves for that. Nobody administers an embedded catalog, so it is made
    when it is first wanted.

    Raises
    ------
    sqlite3.OperationalError
        If the file is locked.
    """
    from .indexes import definitions

    (name, what), *_ = definitions("sqlite").items()
    with closing(sqlite3.connect(path, timeout=0.5)) as database:
        database.execute(f"CREATE INDEX IF NOT EXISTS {name} ON nodes {what}")


def _condition(wording: Wording, method: str) -> ColumnElement[bool]:
    wanted = [
        # By a sum, so that nobody looks for the run among all children of the parent, for which Tiled has an index.
        "newest.parent + 0 = nodes.parent",
        f"{wording.run.format(t='newest.')} = {wording.run.format(t='nodes.')}",
        *([wording.same_run] if wording.same_run else []),
        wording.counts.format(t="newest."),
        *([wording.method.format(t="newest.")] if method else []),
    ]
    ranks = ", ".join(f"{rank.format(t='newest.')} DESC" for rank in wording.ranks)
    newest = f"SELECT newest.id FROM nodes AS newest WHERE {' AND '.join(wanted)} ORDER BY {ranks} LIMIT 1"
    # As a CASE, PostgreSQL expects it to hold for half of the results; of a bare comparison it would expect one result,
    # and sort the whole catalog for a page rather than walk along an index until the page is full.
    clause = text(f"CASE WHEN nodes.id = ({newest}) THEN true ELSE false END")
    return type_coerce((clause.bindparams(bindparam("method", method, unique=True)) if method else clause).self_group(), Boolean)


CatalogNodeAdapter.register_query(Latest, latest)

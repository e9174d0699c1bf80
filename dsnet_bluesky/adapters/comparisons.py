"""Comparisons of what results are asked for most, in words of which databases keep indexes and statistics.

Tiled asks PostgreSQL whether the metadata contain a mapping. Of mappings the database knows nothing: it takes 1 % of the nodes to
fulfil each such condition, sorts all complete results for a page of ten, and reads the catalog to its end for a run. The same
question about one key, answered by an index of that key (`indexes`), which serves for sorting too, is planned by the numbers.
SQLite uses an index of a key only where the key stands in the question itself. Answers are the same.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, bindparam, text, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from tiled.catalog import adapter
from tiled.queries import Comparison, Eq, In, Operator

__all__ = ["KEYS", "TOGETHER", "VALUES", "compare"]

KEYS = ("raw_uid", "sample_name", "status", "method", "model_order", "original_start_time", "updated", "chi2_largest")
"""Keys of results' metadata that are compared and sorted by; all hold plain words and numbers."""

TOGETHER = (("method", "original_start_time"),)
"""Keys of which the first is compared where the second is sorted by: a rare method's page is not picked out of all results."""

VALUES = {"postgresql": "({t}metadata -> '{key}')", "sqlite": """json_extract({t}metadata, '$."{key}"')"""}
"""What the databases call the value of a key: in PostgreSQL as Tiled sorts by it, in SQLite as it compares with it."""

WORDS = {Operator.lt: "<", Operator.le: "<=", Operator.gt: ">", Operator.ge: ">="}

_tiled = {kind: adapter.CatalogNodeAdapter.query_registry.dispatch(kind) for kind in (Eq, Comparison, In)}


def compare(query: Eq | Comparison | In, tree: Any) -> Any:
    """Narrow a container of the catalog to the children whose metadata compare with a value, or with one of several."""
    dialect = tree.context.engine.dialect.name
    several = isinstance(query, In)
    values = query.value if isinstance(query, In) else [query.value]
    if dialect not in VALUES or query.key not in KEYS or not values or not all(isinstance(v, str | int | float) for v in values):
        return _tiled[type(query)](query, tree)
    word = "IN" if several else WORDS[query.operator] if isinstance(query, Comparison) else "="
    # In PostgreSQL two JSON values are compared, in SQLite what is in them.
    kind = JSONB if dialect == "postgresql" else None
    value = bindparam("value", values if several else values[0], type_=kind, unique=True, expanding=several)
    condition = text(f"{VALUES[dialect].format(t='nodes.', key=query.key)} {word} :value").bindparams(value).self_group()
    return tree.new_variation(conditions=[*tree.conditions, type_coerce(condition, Boolean)])


for _kind in _tiled:
    adapter.CatalogNodeAdapter.register_query(_kind, compare)

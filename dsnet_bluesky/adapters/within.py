"""How the catalog answers `WithinRuns`: what lies in many runs, with one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, any_, func, select
from sqlalchemy.orm import aliased
from tiled.catalog import orm
from tiled.catalog.adapter import CatalogContainerAdapter, CatalogNodeAdapter
from tiled.structures.core import StructureFamily

from dsnet_bluesky.nodes import WithinRuns

__all__ = ["within"]


class _Within(CatalogContainerAdapter):
    """A deep search that looks up the paths of what it found only; Tiled goes through all that lies below, for each page."""

    async def relative_keys_for_ids(self, ids: Sequence[int]) -> dict[int, str]:
        """See Tiled's method of this name."""
        above, root = aliased(orm.NodesClosure), aliased(orm.NodesClosure)
        statement = (
            select(above.descendant, orm.Node.key)
            .join(orm.Node, orm.Node.id == above.ancestor)
            .join(root, and_(root.ancestor == self.node.id, root.descendant == above.ancestor, root.depth >= 1))
            .where(above.descendant.in_(ids))
            .order_by(above.descendant, above.depth.desc())
        )
        segments: dict[int, list[str]] = {}
        async with self.context.session() as database:
            for descendant, key in (await database.execute(statement)).all():
                segments.setdefault(descendant, []).append(key)
        return {descendant: "/".join(keys) for descendant, keys in segments.items()}


def within(query: WithinRuns, tree: Any) -> Any:
    """Narrow a deep search of a catalog of runs to what lies in some of them."""
    run, below = aliased(orm.Node), aliased(orm.NodesClosure)
    inside = select(below.descendant).join(run, run.id == below.ancestor)
    inside = inside.where(run.parent == tree.node.id, run.key.in_(query.uids.split(",")), below.depth >= 1)
    if tree.context.engine.dialect.name == "postgresql":
        # As an array, which is made first: else it may go through all nodes in their order, and look for each in the runs.
        found = orm.Node.id == any_(func.array(inside.scalar_subquery()))
    else:
        found = orm.Node.id.in_(inside)
    wanted = [found, orm.Node.structure_family == StructureFamily(query.family)]
    return _Within(
        tree.context,
        tree.node,
        conditions=[*tree.conditions, *wanted],
        queries=tree.queries,
        sorting=tree.sorting,
        deep=tree.deep,
        max_depth=tree.max_depth,
        access_filters=tree.access_filters,
    )


CatalogNodeAdapter.register_query(WithinRuns, within)

"""Who may do what on a server with many users: access tags say who reads, mounts say who writes.

Tiled's tags belong to nodes, and a curve or a result carries the tags of its raw
run. So a tag alone cannot let the watcher write a result and keep it from writing
the run. The policy here adds one rule, see `MountAccessPolicy`; everything else is
Tiled's ``TagBasedAccessPolicy``.

``python -m dsnet_bluesky.access tags.yml`` brings the definitions of tags into the
catalog database, whose address is in the environment as ``DSNET_CATALOG``.
"""

from __future__ import annotations

import asyncio
import grp
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tiled.access_control.access_policies import TagBasedAccessPolicy
from tiled.access_control.access_tags import AccessTagsCompiler
from tiled.access_control.scopes import ALL_SCOPES
from tiled.server.connection_pool import close_database_connection_pool
from tiled.server.settings import DatabaseSettings
from tiled.server.utils import EMPTY_NODE
from tiled.utils import ensure_specified_sql_driver, parse

from .data import BadInput

__all__ = ["MountAccessPolicy", "define_tags"]


class MountAccessPolicy(TagBasedAccessPolicy):
    """Tiled's tags, and: below a mount, nobody does more than read who may not do the same to the mount itself.

    The tag of the mount's own name says who may. The mount ``/raw`` with
    ``mount_node: raw`` is written by whom the tag `raw` lets write, and of its
    nodes these write those whose tags let them as well.
    """

    async def allowed_scopes(self, node: Any, principal: Any, authn_access_tags: Any, authn_scopes: Any) -> Any:
        """Return what a principal may do with a node; Tiled asks this of the last node on every path."""
        if node is EMPTY_NODE:  # what Tiled puts in the place of a mount that is not to be seen
            return set()
        allowed = set(await super().allowed_scopes(node, principal, authn_access_tags, authn_scopes))
        writing = allowed - self.read_scopes
        if not writing or principal is None or self._is_admin(authn_scopes) or not hasattr(node, "path_segments"):
            return allowed
        mount, *_ = [*await node.path_segments(), ""]
        return (allowed & self.read_scopes) | (writing & await self.get_scopes_from_tag(mount, self._identifier(principal)))

    def _identifier(self, principal: Any) -> str:
        return str(principal.uuid) if principal.type == "service" else self._get_id(principal)


def define_tags(definitions: Mapping[str, Any], database: str) -> None:
    """Bring the definitions of access tags into a catalog database; a running server heeds them at once.

    Parameters
    ----------
    definitions
        `roles`, `tags` and `tag_owners` as Tiled's ``AccessTagsCompiler`` has them.
        Groups are those of this machine.
    database
        URI of the catalog database; one that is empty may be initialised later.

    Raises
    ------
    BadInput
        If the definitions contradict each other.
    """
    settings = DatabaseSettings(uri=ensure_specified_sql_driver(database))
    try:
        asyncio.run(_compile(dict(definitions), settings))
    except (KeyError, ValueError, RuntimeError) as error:
        raise BadInput(f"The access tags cannot be used: {error.__cause__ or error}.") from error


async def _compile(definitions: dict[str, Any], settings: DatabaseSettings) -> None:
    compiler = AccessTagsCompiler({scope.value for scope in ALL_SCOPES}, definitions, settings, _members)
    compiler.load_tag_config()
    try:
        await compiler.compile()
    finally:
        await close_database_connection_pool(settings)


def _members(group: str) -> list[str]:
    return grp.getgrnam(group).gr_mem


def _main() -> None:
    if len(sys.argv) != 2:
        raise BadInput("Give one file with the definitions of access tags, see tiled_config/tags.yml.")
    path, database = Path(sys.argv[1]), os.environ.get("DSNET_CATALOG")
    if not database:
        raise BadInput("DSNET_CATALOG is not set: it holds the URI of the catalog database.")
    try:
        definitions = parse(path)
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from error
    if not isinstance(definitions, dict) or "tags" not in definitions:
        raise BadInput(f"{path} defines no tags.")
    define_tags(definitions, database)
    print(f"{len(definitions['tags'])} access tags are defined.")


if __name__ == "__main__":
    try:
        _main()
    except BadInput as error:
        sys.exit(str(error))

"""What every writer of derived nodes asks of the catalog."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tiled.client.container import Container

from dsnet_bluesky.data import BadInput

__all__ = ["CONFLICT", "NOT_FOUND", "access_tags_of", "lookup", "mount"]

NOT_FOUND = 404
"""Status of the answer when there is no such node."""

CONFLICT = 409
"""Status of the answer when a node of that key exists."""


def mount(client: Any, name: str) -> Any:
    """Return a mount of the server.

    Raises
    ------
    BadInput
        If the server has none of that name.
    """
    try:
        return client[name]
    except KeyError:
        raise BadInput(
            f"The server has no /{name}. Start it with `dsnet-bluesky serve`, or add the mounts of tiled_config/embedded.yml "
            "to its configuration; and connect to its root, not to a node."
        ) from None


def lookup(catalog: Any, uid: str) -> Any | None:
    """Return a run by its whole uid, None if it is not there: a catalog's own lookup takes the beginning of a uid too."""
    with suppress(KeyError):
        return Container.__getitem__(catalog, uid)
    return None


def access_tags_of(node: Any) -> list[str] | None:
    """Tags of a node that may be given to another; a principal's own tag may not."""
    tags = [tag for tag in node.item["attributes"].get("access_tags") or [] if not tag.startswith(("user:", "service:"))]
    return tags or None

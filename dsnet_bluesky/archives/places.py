"""Where an archive's files are now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tiled.utils import ensure_uri

from dsnet_bluesky.frames import path_of

__all__ = ["moved", "moved_resource", "moved_stream_resource"]


def moved(path: str, root_map: Mapping[str, str]) -> str:
    """Return where a path is now: the longest folder of `root_map` that it lies in is replaced."""
    for old in sorted(root_map, key=len, reverse=True):
        root = old.rstrip("/")
        if path == root or path.startswith(f"{root}/"):
            return root_map[old].rstrip("/") + path[len(root) :]
    return path


def moved_resource(doc: dict[str, Any], root_map: Mapping[str, str]) -> dict[str, Any]:
    """Write the whole path of a resource into `resource_path`, as databroker's handlers find it.

    A path that begins with ``/`` stands for itself, whatever the root; a sequence of files lies *in* its path, which
    ophyd writes without a ``/`` at its end.
    """
    path = moved(os.path.join(doc.get("root") or "", doc.get("resource_path") or ""), root_map)
    if (doc.get("resource_kwargs") or {}).get("template"):
        path = f"{path.rstrip('/')}/"
    return {**doc, "root": "", "resource_path": path}


def moved_stream_resource(doc: dict[str, Any], root_map: Mapping[str, str]) -> dict[str, Any]:
    """Write where the files are now into a stream resource, of today's or of an older kind."""
    if "uri" not in doc:
        return moved_resource(doc, root_map)
    if not root_map or not doc["uri"].startswith("file:"):
        return doc
    path = str(path_of(doc["uri"]))
    now = moved(path, root_map)
    tail = "/" if doc["uri"].endswith("/") else ""
    return doc if now == path else {**doc, "uri": ensure_uri(now).rstrip("/") + tail}

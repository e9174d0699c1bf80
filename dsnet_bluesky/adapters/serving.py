"""What all our adapters share: access tags, answers to bad data, and where files may lie.

Whoever may register a node says what is in its data source, so nothing there is trusted: files
are read only below the server's readable_storage, links followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import xarray as xr
from fastapi import HTTPException
from tiled.adapters.xarray import DatasetAdapter
from tiled.queries import AccessTagsFilter
from tiled.storage import FileStorage, get_storage
from tiled.structures.core import Spec
from tiled.utils import ensure_uri

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.frames import path_of

__all__ = ["MOST_EXPOSURES", "DerivedAdapter", "confined", "explained"]

MOST_EXPOSURES = 20_000
"""Of a node: more curves than a client could read at once (Tiled answers with 300 MB at most)."""

UNPROCESSABLE = 422


class DerivedAdapter(DatasetAdapter):
    """A Dataset that is computed when it is read, with the access tags of the node that it stands for."""

    @classmethod
    def of_node(cls, node: Any, dataset: xr.Dataset) -> Self:
        """Build the adapter of a catalog node."""
        tags = frozenset(getattr(tag, "name", tag) for tag in node.access_tags)
        arrays = dict(cls.from_dataset(dataset).items())
        for array in arrays.values():
            # Tiled's access policies take what has no tags for open to whoever may see its parent.
            array.access_tags = tags  # pyright: ignore[reportAttributeAccessIssue]
        adapter = cls(arrays, metadata={"attrs": dataset.attrs}, specs=_specs(node))  # pyright: ignore[reportArgumentType]
        adapter._tags = tags
        return adapter

    def search(self, query: Any) -> Any:
        """Answer a query; one by access tags, which Tiled's policies send and its Datasets do not know, for all arrays alike."""
        if isinstance(query, AccessTagsFilter):
            return self if self._tags & frozenset(query.tags) else self.new_variation(mapping={})
        return super().search(query)

    _tags: frozenset[str] = frozenset()


def confined(uri: str) -> Path:
    """Return the path of a file that the server may read.

    Tiled compares a file's URI, as it stands, with its readable_storage. That leaves
    open `..`, percent-encoding, links that lead out, and assets without a parameter.

    Raises
    ------
    BadInput
        If the URI is no file's, or the file, all links followed, is not below a directory that Tiled was told to read.
    """
    path = path_of(uri)
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a zero byte
        raise BadInput(f"{uri} is not the name of a file ({error}).") from None
    roots = [root for parent in {*path.parents, *real.parents} if (root := _storage(parent)) is not None]
    if not path.is_absolute() or ".." in path.parts or not any(real.is_relative_to(root) for root in roots):
        raise BadInput(f"The server may not read {path}: it is not below any directory of readable_storage, all links followed.")
    return path


def _storage(directory: Path) -> Path | None:
    """Return the real path of a directory if Tiled was told to read there."""
    for spelling in (ensure_uri(str(directory)), f"{ensure_uri(str(directory))}/"):
        try:
            storage = get_storage(spelling)
        except KeyError:
            continue
        if isinstance(storage, FileStorage):
            return directory.resolve()
    return None


@contextmanager
def explained() -> Iterator[None]:
    """Answer a request with what is wrong with the data, instead of a bare "internal server error"."""
    try:
        yield
    except BadInput as error:
        raise HTTPException(UNPROCESSABLE, str(error)) from error
    except MemoryError as error:
        raise HTTPException(UNPROCESSABLE, f"The frames do not fit into the server's memory ({error}).") from error


def _specs(node: Any) -> list[Spec]:
    return [spec if isinstance(spec, Spec) else Spec(**spec) for spec in node.specs]

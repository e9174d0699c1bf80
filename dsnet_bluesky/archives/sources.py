"""Where runs were recorded before: Tiled servers, profiles, databroker's catalogs and its MongoDB archives.

A source is only read. It gives its runs in the order of time, page by page, each with its documents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, cast
from urllib.parse import urlsplit, urlunsplit

from tiled.queries import Comparison

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import lookup

__all__ = ["ArchivedRun", "MongoSource", "Source", "TiledSource", "open_source"]

RUNS = "CatalogOfBlueskyRuns"
"""Spec of the containers of runs."""

INSTALL = "pip install 'dsnet-bluesky[archives]'"


@dataclass(frozen=True)
class ArchivedRun:
    """A run of a source.

    Attributes
    ----------
    uid
        Of its start document.
    start
        That document.
    """

    uid: str
    start: Mapping[str, Any]
    _documents: Callable[[], Iterator[tuple[str, Any]]] = field(repr=False)

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the run's documents, of whichever kind the source holds; they are the caller's own."""
        for name, doc in self._documents():
            yield name, copy.deepcopy(dict(doc))


class Source(Protocol):
    """What every kind of source can do.

    Attributes
    ----------
    name
        What is recorded of it with each run: its address, without anything secret.
    """

    name: str

    def runs(self, since: float | None = None, until: float | None = None, limit: int | None = None) -> Iterator[ArchivedRun]:
        """Yield the runs that began in [since, until), in s since 1970, in the order of time; the first `limit` of them."""
        ...

    def run(self, uid: str) -> ArchivedRun | None:
        """Return a run by its whole uid, None if the source has none."""
        ...


class TiledSource:
    """The runs of a container of a Tiled server.

    Parameters
    ----------
    catalog
        Client of the container.
    name
        See `Source`.
    """

    def __init__(self, catalog: Any, name: str):
        self.name, self._catalog = name, catalog

    def runs(self, since: float | None = None, until: float | None = None, limit: int | None = None) -> Iterator[ArchivedRun]:
        """See `Source.runs`."""
        found = self._catalog
        for operator, bound in (("ge", since), ("lt", until)):
            if bound is not None:
                found = found.search(Comparison(operator, "start.time", bound))
        # A SQL catalog sorts by where the key is, a mounted MongoDB by what the start document calls it.
        found = found.sort(("start.time" if getattr(found, "is_sql", True) else "time", 1))
        for _, run in islice(found.items(), limit):
            yield _of_client(run)

    def run(self, uid: str) -> ArchivedRun | None:
        """See `Source.run`."""
        run = lookup(self._catalog, uid)
        return None if run is None else _of_client(run)


class MongoSource:
    """The runs of a MongoDB of databroker's layout; resources and datums lie beside them.

    Parameters
    ----------
    adapter
        `databroker.mongo_normalized.MongoAdapter`.
    name
        See `Source`.
    """

    def __init__(self, adapter: Any, name: str):
        self.name, self._adapter = name, adapter

    def runs(self, since: float | None = None, until: float | None = None, limit: int | None = None) -> Iterator[ArchivedRun]:
        """See `Source.runs`."""
        found = self._adapter.sort([("time", 1)])
        for operator, bound in (("ge", since), ("lt", until)):
            if bound is not None:
                found = found.search(Comparison(operator, "time", bound))
        for run in islice(found.values(), limit):
            yield _of_adapter(run)

    def run(self, uid: str) -> ArchivedRun | None:
        """See `Source.run`."""
        with suppress(KeyError):
            return _of_adapter(self._adapter[uid])
        return None


def open_source(text: Any, *, api_key: str | None = None) -> Source:
    """Open a source of runs.

    Parameters
    ----------
    text
        ``http(s)://...``: a Tiled server, or the container of runs on it. ``mongodb://HOST/DATABASE``: databroker's archive.
        ``databroker:NAME``: what ``databroker.catalog[NAME]`` is. Anything else: the name of a Tiled profile. A client of
        Tiled, or databroker's `MongoAdapter`, is taken as it is.
    api_key
        Of the Tiled server; what the profile or TILED_API_KEY say if not given.

    Raises
    ------
    BadInput
        If there is no such source, it does not answer, or it holds no runs.
    """
    if not isinstance(text, str):
        is_client = hasattr(text, "context")
        return TiledSource(_runs_of(text, str(text.uri)), text.uri) if is_client else MongoSource(text, type(text).__name__)
    scheme = text.partition(":")[0]
    if scheme in ("mongodb", "mongodb+srv"):
        return _mongo(text)
    if scheme in ("http", "https"):
        from tiled.client import from_uri

        return _tiled(lambda: from_uri(text, api_key=api_key), _without_secrets(text))
    return _profile(text.removeprefix("databroker:"), text, api_key)


def _profile(profile: str, name: str, api_key: str | None) -> Source:
    from tiled.client import from_profile
    from tiled.profiles import list_profiles

    known = sorted(list_profiles())
    if profile not in known:
        raise BadInput(
            f"{profile!r} is no address and no Tiled profile; the profiles are: {', '.join(known) or 'none'}. Give http://..., "
            "mongodb://HOST/DATABASE, or make a profile with `tiled profile create`."
        )
    if name.startswith("databroker:") and api_key is None:
        import databroker

        return _tiled(lambda: databroker.catalog[profile], name)
    return _tiled(lambda: from_profile(profile, **({"api_key": api_key} if api_key else {})), name)


def _tiled(connect: Callable[[], Any], name: str) -> Source:
    import httpx

    try:
        return TiledSource(_runs_of(connect(), name), name)
    except httpx.TransportError as error:
        raise BadInput(f"The archive {name} does not answer ({error}); check its address.") from error
    except httpx.HTTPStatusError as error:
        raise BadInput(f"The archive {name} refuses ({error.response.status_code}); check its API key.") from error


def _runs_of(client: Any, name: str) -> Any:
    """Find the container of runs: the client itself, or the only one directly below it."""
    if _holds_runs(client):
        return client
    found = [key for key in client if _holds_runs(client[key])]
    if len(found) == 1:
        return client[found[0]]
    if found:
        places = " or ".join(f"{client.uri.rstrip('/')}/{key}" for key in found)
        raise BadInput(f"{name} has several catalogs of runs; give the address of one: {places}.")
    raise BadInput(f"{name} holds no catalog of Bluesky runs; give the address of one.")


def _holds_runs(client: Any) -> bool:
    return any(spec.name == RUNS for spec in getattr(client, "specs", None) or ())


def _mongo(uri: str) -> Source:
    try:
        import pymongo.errors
        from databroker.mongo_normalized import MongoAdapter
    except ImportError as error:
        raise BadInput(f"Reading MongoDB needs more packages ({error}): {INSTALL}.") from error
    name = _without_secrets(uri)
    try:
        # Frames are read by this package, not by databroker's handlers.
        adapter = MongoAdapter.from_uri(uri, handler_registry={})
        next(iter(adapter.keys()), None)
    except (pymongo.errors.PyMongoError, ValueError) as error:
        said = str(error).split(", Timeout")[0].replace(uri, name)
        raise BadInput(f"The archive {name} cannot be opened ({said}).") from None
    return MongoSource(adapter, name)


def _without_secrets(uri: str) -> str:
    """Leave out user, password and query: the name is recorded with every run."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _of_client(run: Any) -> ArchivedRun:
    start = copy.deepcopy(run.item["attributes"]["metadata"]["start"])
    return ArchivedRun(start["uid"], start, lambda: run.documents())


def _of_adapter(run: Any) -> ArchivedRun:
    start = cast("dict[str, Any]", copy.deepcopy(run.metadata()["start"]))
    return ArchivedRun(start["uid"], start, lambda: run.documents(fill=False))

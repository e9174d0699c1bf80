"""Clients of what this project stores; Tiled finds them by spec (entry points ``tiled.special_client``).

Importing this module loads neither torch nor pyFAI nor matplotlib: a notebook that
only reads results stays light.

Examples
--------
>>> from tiled.client import from_uri
>>> from tiled.queries import Key
>>> catalog = from_uri("http://127.0.0.1:8000", api_key="secret")                        # doctest: +SKIP
>>> results = catalog["desmeared"].search(Key("sample") == "AgBh").search(Key("status") == "complete")  # doctest: +SKIP
>>> results.values().last().plot()                                                      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlparse

import xarray as xr
from numpy.typing import NDArray
from tiled.client.constructors import from_context
from tiled.client.container import Container
from tiled.client.utils import MSGPACK_MIME_TYPE, client_for_item, handle_error, retry_context
from tiled.client.xarray import DatasetClient
from tiled.query_registration import default_query_registry

from .data import BadInput
from .kinds import kind_of
from .questions import Complete, Question
from .rows import COLUMNS, FIRST, GRID, ROWS, ROWS_OF, decode_words, parse_columns, unpack
from .selections import stacked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CurveClient", "DenoisedClient", "DesmearedClient", "IcosahedraClient", "PSFClient", "ResultClient", "ResultsClient"]

TABLE = (
    "sample_name",
    "raw_uid",
    "original_start_time",
    "method",
    "model_version",
    "status",
    "exposures",
    "chi2_median",
    "reason",
)
"""What a table shows of each result, if nothing else is asked for."""

PAGE = 100
"""Results of which the server tells at once, if nothing else is asked for."""

FIELDS = ["metadata", "structure_family", "specs", "sorting", "access_tags"]
"""What a client of a result is made of: all but the count of the selection, and the structures, which cost a query each."""

ACCEPT = {"Accept": MSGPACK_MIME_TYPE}

VARIABLES = ("I", "Idev", "Qdev", "chi2", "flags")
"""What a selection is read for, if nothing else is asked for."""


class CurveClient(DatasetClient):
    """Curves of a run, which may still be growing: dims (exposure, q)."""

    def read(self, variables: Sequence[str] | None = None, *, optimize_wide_table: bool = True) -> xr.Dataset:
        """Read the exposures that are complete.

        Parameters
        ----------
        variables
            Names; all if not given.
        optimize_wide_table
            Of Tiled's signature; nothing depends on it here.

        Returns
        -------
        xarray.Dataset
            Without a single exposure it is empty, and its attributes say what there is to say.
        """
        arrays = dict(self.items())
        lengths = [a.shape[a.dims.index("exposure")] for a in arrays.values() if a.dims and "exposure" in a.dims]
        complete = min(lengths, default=0)
        wanted = {name: array for name, array in arrays.items() if variables is None or name in variables}
        read = {name: _read_exposures(array, complete) for name, array in wanted.items()}
        coords = {name for name in read if "xarray_coord" in {spec.name for spec in arrays[name].specs}}
        dataset = xr.Dataset(
            {name: value for name, value in read.items() if name not in coords},
            coords={name: value for name, value in read.items() if name in coords},
            attrs=dict(self._said["attrs"]),
        )
        return decode_words(dataset)

    @property
    def raw(self) -> Any:
        """The run that the frames are of."""
        return self._node("raw", self._said["raw_uid"])

    @property
    def _said(self) -> dict[str, Any]:
        """The metadata, as an ordinary dict."""
        return dict(self.metadata)

    def _node(self, *path: str) -> Any:
        return from_context(self.context, structure_clients=self.structure_clients, node_path_parts=list(path))


class PSFClient(CurveClient):
    """PSF of a direct-beam run, see `reduction.psf`."""

    SCALARS = ("centre_y", "centre_x", "poni_centre_y", "poni_centre_x", "distance", "wavelength")

    def read(self, variables: Sequence[str] | None = None, *, optimize_wide_table: bool = True) -> xr.Dataset:
        """Read the PSF as `reduction.psf` gives it: with the centre, the distance and the wavelength as attributes."""
        dataset = super().read(variables)
        scalars = {name: float(dataset[name]) for name in self.SCALARS if name in dataset}
        return dataset.drop_vars(list(scalars)).assign_attrs(scalars)


class ResultsClient(Container):
    """Results, all or those that were searched for: ``client["desmeared"]``, ``client["analysed"]``.

    Examples
    --------
    >>> results = client["desmeared"]                                        # doctest: +SKIP
    >>> good = results.search(Sample("AgBh")).search(Quality(chi2_max=1.5))  # doctest: +SKIP
    >>> good.to_table(), good.to_xarray(["I", "Idev"])                       # doctest: +SKIP
    """

    def search(self, query: Any) -> ResultsClient:
        """Narrow the selection, by a question of `dsnet_bluesky.questions` or by a query of Tiled.

        Raises
        ------
        BadInput
            If the server does not know the query: Tiled would leave it aside, and answer as if nothing had been asked.
        """
        found = self
        for part in query.queries() if isinstance(query, Question) else [query]:
            found._check_known(part)
            found = super(ResultsClient, found).search(part)
        return found

    def __len__(self) -> int:
        """Count the selection in the server."""
        self._cached_len = None  # pages leave a guess there, see `_pages`
        return super().__len__()

    def to_table(self, columns: Sequence[str] = TABLE, *, limit: int | None = None) -> pd.DataFrame:
        """Return metadata of the selection as a table, a row for each result, without reading any curve.

        Parameters
        ----------
        columns
            Keys of the metadata (docs/reference/metadata.md); a dot leads inside: ``"pairing.age"``.
        limit
            Only so many of the first results; all if not given.
        """
        import pandas as pd

        said = self._metadata_by_key(limit)
        rows = {key: [_inside(metadata, column) for column in columns] for key, metadata in said.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).rename_axis("key")

    def to_xarray(self, variables: Sequence[str] = VARIABLES, *, q: NDArray | None = None) -> xr.Dataset:
        """Return the good exposures of the selection's complete results as one Dataset, dims (result, q).

        Curves are read when they are needed (dask): a selection of a year costs the time to list it.

        Parameters
        ----------
        variables
            Those with dims (exposure, q), and others of one value for an exposure.
        q
            Grid in 1/nm to which curves are interpolated (linearly in ln q and, where it is positive, ln of the value); needed
            if the grids of the results differ. NaN beyond a curve's ends.

        Returns
        -------
        xarray.Dataset
            With the coordinates `key`, `exposure`, `raw_uid`, `sample` and `time` along result.

        Raises
        ------
        BadInput
            If the selection is empty, or the grids differ and no q is given.
        """
        nodes = self.search(Complete())._metadata_by_key()
        grids = {said[GRID] for said in nodes.values()}
        if not nodes:
            raise BadInput("Nothing is selected that is complete; widen the search.")
        if q is None and len(grids) > 1:
            raise BadInput(
                f"The {len(nodes)} results have {len(grids)} different grids of q; give the one that you want, such as "
                "to_xarray(q=results.values().first().read()['q'].values), or search for one instrument setting."
            )
        # From the whole catalog: what is selected now is read, though a newer result may come before it is.
        everything: Any = self
        return stacked(everything.new_variation(queries=[]), nodes, variables, q)

    def _metadata_by_key(self, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """Read metadata without structures: for those Tiled asks its database result by result."""
        pages = self._pages(0, limit, 1, {"fields": "metadata", "omit_links": True})
        return {item["id"]: item["attributes"]["metadata"] for item in pages}

    def __iter__(self, _ignore_inlined_contents: bool = False) -> Generator[str, Any, None]:
        return self._keys_slice(0, None, 1)

    def _keys_slice(
        self, start: int, stop: int | None, direction: int, page_size: int | None = None, **_inlined: Any
    ) -> Generator[str, Any, None]:
        for item in self._pages(start, stop, direction, {"fields": ""}, page_size):
            yield item["id"]

    def _items_slice(
        self, start: int, stop: int | None, direction: int, page_size: int | None = None, **_inlined: Any
    ) -> Generator[tuple[str, Any], Any, None]:
        sources = self._include_data_sources
        more = {"fields": FIELDS, **({"include_data_sources": True} if sources else {})}
        for item in self._pages(start, stop, direction, more, page_size):
            item["attributes"]["structure"] = {"contents": None, "count": None}
            yield item["id"], client_for_item(self.context, self.structure_clients, item, include_data_sources=sources)

    def _pages(
        self, start: int, stop: int | None, direction: int, more: dict[str, Any], page_size: int | None = None
    ) -> Generator[dict[str, Any], Any, None]:
        """Give what the server says of the results from `start` to before `stop`, page by page.

        Tiled's own client ends where the server names no next page. Of a sorted selection the server reckons that from a count
        that it breaks off at its `exact_count_limit`, 100: of more than 200 results the rest would be missing.
        """
        sorting = self._sorting_params if direction > 0 else self._reversed_sorting_params
        size = min(page_size or PAGE, PAGE, PAGE if stop is None else max(stop - start, 1))
        place: dict[str, Any] = {"page[offset]": start}
        while stop is None or start < stop:
            answer = self._page({**more, **self._queries_as_params, **sorting, **place, "page[limit]": size})
            found = answer["data"]
            yield from found if stop is None else found[: stop - start]
            if len(found) < size:
                return
            start += size
            cursor = parse_qs(urlparse(answer["links"]["next"] or "").query).get("page[cursor]")
            place = {"page[cursor]": cursor} if cursor else {"page[offset]": start}

    def _page(self, params: dict[str, Any]) -> dict[str, Any]:
        for attempt in retry_context():
            with attempt:
                answer: Any = self.context.http_client.get(self.item["links"]["search"], params=params, headers=ACCEPT)
                handle_error(answer)
                return answer.json()
        raise AssertionError("unreachable: the last attempt raises")

    def _check_known(self, query: Any) -> None:
        name = default_query_registry.query_type_to_name.get(type(query))
        if name is not None and name not in self.context.server_info.queries:
            raise BadInput(
                f"This server cannot answer {query}: it does not know {name}. Install dsnet-bluesky of this version "
                "beside it, with adapters_by_mimetype of its mounts as in tiled_config/embedded.yml, and restart it."
            )


class ResultClient(CurveClient):
    """A result of any kind (`kinds`).

    Examples
    --------
    >>> result = catalog["analysed"].values().last()        # doctest: +SKIP
    >>> result.status, result.read(), result.raw            # doctest: +SKIP
    """

    def __repr__(self) -> str:
        """Say at a glance whether the result can be used."""
        said = self._said
        why = f", {said['reason']!r}" if said.get("reason") else ""
        done = f"{said['status']}, {said['exposures']} exposures"
        return f"<{type(self).__name__} {said.get('sample')!r} by {said['method']}: {done}{why}>"

    @property
    def status(self) -> str:
        """running, complete or failed, as it was when this client was made; see `refresh`."""
        return self._said["status"]

    @property
    def reason(self) -> str | None:
        """Why the result failed, None if it did not."""
        return self._said.get("reason")

    @property
    def direct_beam(self) -> Any:
        """The direct-beam run, None if there was none, or none is needed."""
        uid = self._said.get("direct_beam_uid")
        return self._node("raw", uid) if uid else None

    def read(self, variables: Sequence[str] | None = None, *, optimize_wide_table: bool = True) -> xr.Dataset:
        """Read the exposures that are complete, with two requests, or three while the run goes on; see `CurveClient.read`."""
        said: dict[str, Any] = dict(self.refresh().metadata) if self.status == "running" else self._said
        if not said.get(ROWS):
            return xr.Dataset(attrs=said["attrs"])  # nothing is stored yet, or ever
        lent = said.get(ROWS_OF)
        stored = self._node(kind_of(said["method"]).mount, lent, said[ROWS]) if lent else self[said[ROWS]]
        columns = parse_columns(stored.metadata[COLUMNS])
        # As many as are announced: a writer may have begun the next row, or put those of other results behind.
        first = said.get(FIRST, 0)
        rows = stored.read((slice(first, first + said["exposures"]),))
        return decode_words(unpack(rows, columns, said["attrs"], variables))

    @property
    def _title(self) -> str:
        from .documents import sample_name

        return sample_name(self._said) or self._said["raw_uid"]

    def _read_complete(self) -> xr.Dataset:
        dataset = self.read()
        if not dataset.sizes.get("exposure"):
            raise BadInput(f"This result holds no exposure: {self.reason or f'its status is {self.status}'}.")
        return dataset


class DesmearedClient(ResultClient):
    """A result of desmearing.

    Examples
    --------
    >>> result = catalog["desmeared"].values().last()       # doctest: +SKIP
    >>> result.status, result.read(), result.direct_beam    # doctest: +SKIP
    """

    @property
    def curves(self) -> Any:
        """The measured curves; `KeyError` if they are not registered."""
        return self._node("curves", self._said["raw_uid"])

    @property
    def psf(self) -> Any:
        """The PSF measured in the direct beam; None if there was no direct beam."""
        uid = self._said.get("direct_beam_uid")
        return self._node("psfs", uid) if uid else None

    def plot(self, ax: Axes | None = None) -> Figure:
        """Plot measured and desmeared curves."""
        from .plots import plot_result

        return plot_result(self._read_complete(), ax, title=self._title)

    def to_nxcansas(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the curves, with where they come from, as NXcanSAS.

        Raises
        ------
        BadInput
            If the result failed or is not complete yet, or the file exists.
        """
        from .export import check_target, write
        from .export.stored import contents_of

        check_target(Path(path), overwrite=overwrite)
        return write([contents_of(self, psfs={})], Path(path), "nxcansas", overwrite=overwrite)


class IcosahedraClient(ResultClient):
    """Sizes and orientations of icosahedra, one of each exposure.

    Examples
    --------
    >>> result = catalog["analysed"].values().last()        # doctest: +SKIP
    >>> result.read()["radius"], result.plot()              # doctest: +SKIP
    """

    def plot(self, ax: Axes | None = None) -> Figure:
        """Plot the radius of each exposure with its error, coloured by the score."""
        from .plots import plot_sizes

        return plot_sizes(self._read_complete(), ax, title=self._title)


class DenoisedClient(DesmearedClient):
    """A result of denoising: frames, orientations of their rings, and the desmeared curve of a sector.

    Examples
    --------
    >>> result = catalog["analysed"].values().last()        # doctest: +SKIP
    >>> result.plot_frames(), result.plot()                 # doctest: +SKIP
    """

    def plot_frames(self) -> Figure:
        """Plot the first denoised frames, with the orientation of each."""
        from .plots import plot_frames

        return plot_frames(self._read_complete(), title=self._title)


def _inside(said: dict[str, Any], column: str) -> Any:
    """Look up a key of the metadata, None if it is not there."""
    value: Any = said
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _read_exposures(array: Any, complete: int) -> Any:
    """Read an array as an xarray variable, no further than every array of its Dataset reaches."""
    dims = tuple(array.dims or ())
    part = tuple(slice(0, complete) if dim == "exposure" else slice(None) for dim in dims)
    values = array.read(part) if "exposure" in dims else array.read()
    return dims, values, dict(array.metadata["attrs"])

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

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from tiled.client.constructors import from_context
from tiled.client.xarray import DatasetClient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CurveClient", "DesmearedClient", "PSFClient"]


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
        arrays = self._arrays()
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
        return _decode_words(dataset)

    @property
    def raw(self) -> Any:
        """The run that the frames are of."""
        return self._node("raw", self._said["raw_uid"])

    def _arrays(self) -> dict[str, Any]:
        return dict(self.items())

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


class DesmearedClient(CurveClient):
    """A result of desmearing.

    Examples
    --------
    >>> result = catalog["desmeared"].values().last()       # doctest: +SKIP
    >>> result.status, result.read(), result.direct_beam    # doctest: +SKIP
    """

    def __repr__(self) -> str:
        """Say at a glance whether the result can be used."""
        said = self._said
        why = f", {said['reason']!r}" if said.get("reason") else ""
        return (
            f"<DesmearedClient {said.get('sample')!r} by {said['method']}: {said['status']}, {said['exposures']} exposures{why}>"
        )

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
        """The direct-beam run, None if there was none."""
        uid = self._said.get("direct_beam_uid")
        return self._node("raw", uid) if uid else None

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
            If the result failed, or the file exists.
        """
        from .export import to_nxcansas

        process = {key: value for key, value in self._said.items() if key not in ("attrs", "writer", "failures")}
        return to_nxcansas(
            self._read_complete(),
            path,
            title=self._title,
            sample=self._said.get("sample"),
            process=process,
            overwrite=overwrite,
        )

    def _arrays(self) -> dict[str, Any]:
        arrays = super()._arrays()
        return arrays if "status" in arrays else {}  # it is made last: without it no exposure is complete

    @property
    def _title(self) -> str:
        sample = self._said.get("sample") or self._said["raw_uid"]
        return str(sample.get("name", sample) if isinstance(sample, dict) else sample)

    def _read_complete(self) -> xr.Dataset:
        dataset = self.read()
        if not dataset.sizes.get("exposure"):
            from .data import BadInput

            raise BadInput(f"This result holds no exposure: {self.reason or f'its status is {self.status}'}.")
        return dataset


def _decode_words(dataset: xr.Dataset) -> xr.Dataset:
    """Replace numbers that stand for words (`data.WORDS`), and leave out exposures that are not complete yet."""
    coded = {name: values for name, values in dataset.data_vars.items() if "flag_values" in values.attrs}
    for name, values in coded.items():
        attrs = dict(values.attrs)
        meanings = dict(zip(attrs.pop("flag_values"), attrs.pop("flag_meanings").split(), strict=True))
        words = [meanings.get(int(value), "") for value in values.values]
        dataset = dataset.assign({name: ("exposure", np.array(words, dtype=str), attrs)})
    # An array is made before it is filled: a status that means nothing marks an exposure on its way.
    return dataset.isel(exposure=(dataset["status"] != "").values) if "status" in dataset else dataset


def _read_exposures(array: Any, complete: int) -> Any:
    """Read an array as an xarray variable, no further than every array of its Dataset reaches."""
    dims = tuple(array.dims or ())
    part = tuple(slice(0, complete) if dim == "exposure" else slice(None) for dim in dims)
    values = array.read(part) if "exposure" in dims else array.read()
    return dims, values, dict(array.metadata["attrs"])

"""Many results as one Dataset, read when it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed
from numpy.typing import NDArray

from .data import BadInput
from .documents import good_exposures

__all__ = ["stacked"]


def stacked(results: Any, nodes: Mapping[str, Mapping[str, Any]], variables: Sequence[str], q: NDArray | None) -> xr.Dataset:
    """Put the good exposures of complete results behind each other.

    Parameters
    ----------
    results
        The catalog of results.
    nodes
        Metadata of the results, by key.
    variables, q
        See `queries.ResultsClient.to_xarray`.
    """
    some, *others = nodes
    first = results[some].read()
    if missing := [name for name in variables if name not in first]:
        raise BadInput(f"Results hold no {', '.join(missing)}; they hold {', '.join(map(str, first.data_vars))}.")
    grid = first["q"].values if q is None else np.asarray(q, dtype=float)
    good = {key: good_exposures(said) for key, said in nodes.items()}
    tasks = {some: delayed(_prepared)(first[[*variables, "q"]], good[some], q)}
    tasks |= {key: delayed(_read)(results, key, tuple(variables), good[key], q) for key in others}
    data = {}
    for name in variables:
        inner = (grid.size,) if "q" in first[name].dims else ()
        parts = [
            da.from_delayed(delayed(_pick)(task, name), (len(good[key]), *inner), first[name].dtype)
            for key, task in tasks.items()
        ]
        data[name] = (("result", *(["q"] if inner else [])), da.concatenate(parts), first[name].attrs)
    rows = [(key, place, nodes[key]) for key in nodes for place in good[key]]
    along = {
        "key": [key for key, _, _ in rows],
        "exposure": [place for _, place, _ in rows],
        "raw_uid": [said["raw_uid"] for _, _, said in rows],
        "sample": [said.get("sample_name", "") for _, _, said in rows],
        "time": [said["original_start_time"] for _, _, said in rows],
    }
    coords = {"q": ("q", grid, first["q"].attrs), **{name: ("result", values) for name, values in along.items()}}
    return xr.Dataset(data, coords)


def _read(results: Any, key: str, variables: Sequence[str], good: Sequence[int], q: NDArray | None) -> xr.Dataset:
    return _prepared(results[key].read([*variables, "q"]), good, q)


def _prepared(dataset: xr.Dataset, good: Sequence[int], q: NDArray | None) -> xr.Dataset:
    dataset = dataset.isel(exposure=list(good))
    return dataset if q is None else _interpolated(dataset, np.asarray(q, dtype=float))


def _pick(dataset: xr.Dataset, name: str) -> NDArray:
    return dataset[name].values


def _interpolated(dataset: xr.Dataset, q: NDArray) -> xr.Dataset:
    """Take curves to another grid, linearly in ln q; positive ones in ln of the value, as they run over decades."""
    old = np.log(np.maximum(dataset["q"].values, 1e-12))
    new = np.log(np.maximum(q, 1e-12))
    variables: dict[str, Any] = {}
    for name, values in dataset.data_vars.items():
        if "q" not in values.dims:
            variables[str(name)] = values
            continue
        rows = values.transpose("exposure", "q").values
        positive = (rows > 0).all()
        wanted = np.array([np.interp(new, old, np.log(row) if positive else row, np.nan, np.nan) for row in rows])
        variables[str(name)] = (("exposure", "q"), np.exp(wanted) if positive else wanted)
    return xr.Dataset(variables, {"q": q})

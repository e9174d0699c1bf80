"""Export to NXcanSAS: curves that SasView, silx and every NeXus reader can open.

Written with h5py, because sasdata's own writer swaps the length and the width of a
slit on the way back (it lists dQl first, its reader takes the first for dQw).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from . import __version__
from .data import BadInput, exposures_of
from .smearing import Smearing

__all__ = ["check_target", "to_nxcansas"]


def to_nxcansas(
    dataset: xr.Dataset,
    path: str | Path,
    *,
    title: str = "",
    sample: str | Mapping[str, Any] | None = None,
    process: Mapping[str, Any] | None = None,
    smearing: Smearing | None = None,
    overwrite: bool = False,
) -> Path:
    """Write desmeared curves, and the smeared ones they come from, as NXcanSAS.

    Each exposure becomes an SASentry with two SASdata, `desmeared` (the default
    plot) and `smeared`. Exposures whose status is "failed" are left out.

    Parameters
    ----------
    dataset
        Result of `desmear` (dims ("q",) or ("exposure", "q")), or a plain curve,
        which is written as `smeared` alone.
    path
        File to write. A file of that name is complete or absent, never half-written.
    title
        By default the `title` of the Dataset's attributes.
    sample
        Name, or a mapping with `name`; by default the Dataset's attribute.
    process
        Provenance, written as terms of an SASprocess: names and plain values. `method`
        and `options` of the Dataset are added.
    smearing
        Operator, written beside the smeared curve: its resolution, and R and
        q_calc in full.
    overwrite
        Replace an existing file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    BadInput
        If the file exists, its folder does not, or no exposure can be written.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    exposures = _complete(exposures_of(dataset))
    if smearing is not None and smearing.q.shape != dataset["q"].shape:
        raise BadInput(f"The operator has {smearing.q.size} points, the curve {dataset.sizes['q']}: they do not belong together.")
    attributes = {
        "title": title or str(dataset.attrs.get("title", "")) or "desmeared curve",
        "sample": _sample_name(dataset.attrs.get("sample") if sample is None else sample),
        "terms": _terms(dataset, process or {}, smearing),
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        with h5py.File(temporary, "w") as file:
            _write_root(file, exposures, smearing, attributes)
        _publish(Path(temporary), path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def check_target(path: Path, *, overwrite: bool = False) -> None:
    """Check that a file can be written, before any work is done for it.

    Raises
    ------
    BadInput
        If the file exists and may not be overwritten, or its folder does not exist
        or cannot be written to.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; choose another name, or allow it to be overwritten (--overwrite).")
    if not path.parent.is_dir():
        raise BadInput(f"{path.parent} is no folder; create it, or write somewhere else.")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path.parent} may not be written to; write somewhere else.")


def _publish(temporary: Path, path: Path) -> None:
    """Put the finished file in place, with the rights of an ordinary new file."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)


def _complete(exposures: xr.Dataset) -> dict[int, xr.Dataset]:
    """Return the complete exposures by their numbers, from 1."""
    rows = {i + 1: exposures.isel(exposure=i) for i in range(exposures.sizes["exposure"])}
    complete = {number: row for number, row in rows.items() if "status" not in row or str(row["status"].item()) == "ok"}
    if not complete:
        raise BadInput("No exposure of this result is complete: there is nothing to export.")
    return complete


def _sample_name(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return str(sample.get("name") or json.dumps(dict(sample), default=str))
    return str(sample or "")


def _terms(dataset: xr.Dataset, process: Mapping[str, Any], smearing: Smearing | None) -> dict[str, str]:
    operator = {}
    if smearing is not None:
        operator = {"smearing": smearing.kind, **{f"smearing_{k}": v for k, v in smearing.parameters.items()}}
        operator["smearing_sha256"] = smearing.digest
    own = {
        name: dataset.attrs[name]
        for name in ("method", "model", "model_sha256", "options", "diagnostics")
        if name in dataset.attrs
    }
    everything = {**own, **operator, **process}
    return {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in everything.items()}


def _write_root(
    file: h5py.File, exposures: Mapping[int, xr.Dataset], smearing: Smearing | None, attributes: Mapping[str, Any]
) -> None:
    file.attrs.update(
        NX_class="NXroot", default=f"sasentry{min(exposures):02d}", creator=f"dsnet-bluesky {__version__}", file_time=_now()
    )
    for number, exposure in exposures.items():
        entry = _group(file, f"sasentry{number:02d}", "NXentry", "SASentry", version="1.1")
        title = attributes["title"] if len(exposures) == 1 else f"{attributes['title']}, exposure {number}"
        entry["definition"] = "NXcanSAS"
        entry["title"] = title
        entry["run"] = attributes["terms"].get("raw_uid", title)
        entry.attrs["default"] = _write_curves(entry, exposure, smearing)
        if attributes["sample"]:
            _group(entry, "sample", "NXsample", "SASsample")["name"] = attributes["sample"]
        _write_process(entry, {**_quality(exposure), **attributes["terms"]}, exposure)


def _write_curves(entry: h5py.Group, exposure: xr.Dataset, smearing: Smearing | None) -> str:
    """Write the SASdata groups of one exposure; return the name of the one to plot."""
    if "I_smeared" not in exposure:
        _write_smeared(entry, exposure, "I", "Idev", smearing)
        return "smeared"
    group = _sasdata(entry, "desmeared", exposure, "I", "Idev")
    if "Qdev" in exposure and np.isfinite(exposure["Qdev"].values).all():
        _resolution(group, {"Qdev": exposure["Qdev"].values}, "Gaussian")
    if "Idev_noise" in exposure and np.isfinite(exposure["Idev_noise"].values).all():
        group["Idev_noise"] = exposure["Idev_noise"].values
        group["Idev_noise"].attrs.update(units=_units(exposure["I"]), long_name="part of Idev that the noise makes")
    smeared = _write_smeared(entry, exposure, "I_smeared", "Idev_smeared", smearing)
    if "I_resmeared" in exposure:
        smeared["I_resmeared"] = exposure["I_resmeared"].values
        smeared["I_resmeared"].attrs.update(units=_units(exposure["I_resmeared"]), long_name="desmeared intensity, smeared again")
    return "desmeared"


def _write_smeared(entry: h5py.Group, exposure: xr.Dataset, I: str, Idev: str, smearing: Smearing | None) -> h5py.Group:
    group = _sasdata(entry, "smeared", exposure, I, Idev)
    columns = {name: exposure[name].values for name in ("dQw", "dQl") if name in exposure}
    if smearing is not None and smearing.kind == "slit":
        columns = {f"dQ{side[0]}": np.full(smearing.q.size, smearing.parameters[side]) for side in ("width", "length")}
    if columns:
        # SasView takes half-widths; the order is that in which sasdata reads them.
        both = {name: columns.get(name, np.zeros(exposure.sizes["q"])) for name in ("dQw", "dQl")}
        _resolution(group, both, "Square")
    elif smearing is not None:
        _resolution(group, {"Qdev": smearing.widths}, "Gaussian")
    elif "I_smeared" not in exposure and "Qdev" in exposure:
        _resolution(group, {"Qdev": exposure["Qdev"].values}, "Gaussian")
    if smearing is not None:
        _write_operator(group, smearing)
    return group


def _write_operator(group: h5py.Group, smearing: Smearing) -> None:
    group.create_dataset("R", data=smearing.matrix, compression="gzip", shuffle=True)
    group["R"].attrs.update(units="1", long_name="smearing operator: I(Q) = R @ I(q_calc)")
    group["q_calc"] = smearing.q_calc
    group["q_calc"].attrs.update(units="1/nm", long_name="scattering vector of the unsmeared curve")


def _sasdata(entry: h5py.Group, name: str, exposure: xr.Dataset, I: str, Idev: str) -> h5py.Group:
    group = _group(entry, name, "NXdata", "SASdata", signal="I", I_axes="Q", Q_indices=np.array([0]))
    group.attrs["axes"] = np.array(["Q"], dtype=h5py.string_dtype())
    group["Q"] = exposure["q"].values
    group["Q"].attrs.update(units="1/nm", long_name="scattering vector")
    group["I"] = exposure[I].values
    group["I"].attrs.update(units=_units(exposure[I]), uncertainties="Idev", long_name=f"{name} intensity")
    group["Idev"] = exposure[Idev].values
    group["Idev"].attrs.update(units=_units(exposure[Idev]), long_name="standard deviation of the intensity")
    # silx draws error bars from this name only.
    group["I_errors"] = h5py.SoftLink(f"{group.name}/Idev")
    return group


def _resolution(group: h5py.Group, columns: Mapping[str, Any], description: str) -> None:
    for name, values in columns.items():
        group[name] = np.asarray(values, dtype=float)
        group[name].attrs["units"] = "1/nm"
    # An array of strings: sasdata's reader loses the whole file over "dQw,dQl".
    names = np.array(list(columns), dtype=h5py.string_dtype()) if len(columns) > 1 else next(iter(columns))
    group["Q"].attrs.update(resolutions=names, resolutions_description=description)


def _quality(exposure: xr.Dataset) -> dict[str, str]:
    """Say how it went with one exposure: chi2, flags, and what its method adds."""
    said = {str(name): values.item() for name, values in exposure.data_vars.items() if not values.dims and name != "status"}
    return {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in said.items()}


def _write_process(entry: h5py.Group, terms: Mapping[str, str], exposure: xr.Dataset) -> None:
    group = _group(entry, "sasprocess", "NXprocess", "SASprocess")
    group["name"] = "desmear" if "I_smeared" in exposure else "export"
    group["date"] = _now()
    group["description"] = "Desmearing of small-angle scattering with dsnet-bluesky; every term reads name = value."
    group["program"] = "dsnet-bluesky"
    group["version"] = __version__
    group["sequence_index"] = 1
    for number, (name, value) in enumerate(terms.items(), start=1):
        # Only names of this form come back through sasdata.
        term = group.create_dataset(f"term{number:02d}", data=f"{name} = {value}")
        term.attrs["name"] = name


def _group(parent: h5py.Group, name: str, nexus: str, cansas: str, **attributes: Any) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update(NX_class=nexus, canSAS_class=cansas, **attributes)
    return group


def _units(variable: xr.DataArray) -> str:
    return str(variable.attrs.get("units", "1"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""NXcanSAS: what SasView, silx and every NeXus reader can open.

Each exposure is an SASentry of its own. The standard also allows one SASdata whose I
has a leading dimension of exposures, but sasdata gives every frame of such a stack the
intensities of the last, and silx would plot an image. What exposures share (instrument,
PSF, operator) is stored once and linked.

Written with h5py, because sasdata's own writer swaps the length and the width of a
slit on the way back (it lists dQl first, its reader takes the first for dQw).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import h5py
import numpy as np
import xarray as xr

from dsnet_bluesky import __version__
from dsnet_bluesky.smearing import Smearing

from .contents import Contents, Step

__all__ = ["fill"]

MANY = 4
"""Digits of an entry's number where a file holds more than one result: readers take entries in the order of their names."""


def fill(file: h5py.File, results: Iterable[Contents], *, exposure: int | None = None, several: bool = False) -> None:
    """Write results into an open, empty file.

    Parameters
    ----------
    file
        HDF5, on disk or in memory.
    results
        Read one after the other.
    exposure
        The one of each that is wanted, from 1; all if not given.
    several
        Whether there may be more than one result. Entries are then numbered throughout; those of
        one result bear the numbers of its exposures.

    Raises
    ------
    BadInput
        If a result holds no such exposure.
    """
    file.attrs.update(NX_class="NXroot", creator=f"dsnet-bluesky {__version__}", file_time=_now())
    entries = 0
    for contents in results:
        shared: dict[str, h5py.Group | h5py.Dataset] = {}
        digits = MANY if several else max(2, len(str(contents.curves.sizes["exposure"])))
        for number, row in contents.exposures(exposure):
            entries += 1
            name = f"sasentry{entries if several else number:0{digits}d}"
            file.attrs.setdefault("default", name)
            _write_entry(_group(file, name, "NXentry", "SASentry", version="1.1"), contents, number, row, shared)


def _write_entry(entry: h5py.Group, contents: Contents, number: int, row: xr.Dataset, shared: dict[str, Any]) -> None:
    entry["definition"] = "NXcanSAS"
    entry["title"] = contents.title_of(number)
    entry["run"] = contents.run
    entry.attrs["default"] = _write_curves(entry, row, contents.smearing, shared)
    if contents.sample:
        _group(entry, "sample", "NXsample", "SASsample")["name"] = contents.sample
    if contents.wavelength or contents.psf is not None:
        _once(entry, "sasinstrument", shared, lambda: _write_instrument(entry, contents))
    for place, step in enumerate(contents.steps_of(row), start=1):
        _write_step(entry, step, place, shared)


def _once(parent: h5py.Group, name: str, shared: dict[str, Any], write: Callable[[], Any], value: str = "") -> None:
    """Write what exposures share (the same name and value) for the first of them, and link it for the others."""
    if (known := shared.get(f"{name} {value}")) is not None:
        parent[name] = known
    else:
        write()
        shared[f"{name} {value}"] = parent[name]


# -- curves --


def _write_curves(entry: h5py.Group, exposure: xr.Dataset, smearing: Smearing | None, shared: dict[str, Any]) -> str:
    """Write the SASdata groups of one exposure; return the name of the one to plot."""
    if "I_smeared" not in exposure:
        _write_smeared(entry, exposure, "I", "Idev", smearing, shared)
        return "smeared"
    group = _sasdata(entry, "desmeared", exposure, "I", "Idev")
    if "Qdev" in exposure and np.isfinite(exposure["Qdev"].values).all():
        _resolution(group, {"Qdev": exposure["Qdev"].values}, "Gaussian")
    if "Idev_noise" in exposure and np.isfinite(exposure["Idev_noise"].values).all():
        group["Idev_noise"] = exposure["Idev_noise"].values
        group["Idev_noise"].attrs.update(units=_units(exposure["I"]), long_name="part of Idev that the noise makes")
    smeared = _write_smeared(entry, exposure, "I_smeared", "Idev_smeared", smearing, shared)
    if "I_resmeared" in exposure:
        smeared["I_resmeared"] = exposure["I_resmeared"].values
        smeared["I_resmeared"].attrs.update(units=_units(exposure["I_resmeared"]), long_name="desmeared intensity, smeared again")
    return "desmeared"


def _write_smeared(
    entry: h5py.Group, exposure: xr.Dataset, I: str, Idev: str, smearing: Smearing | None, shared: dict[str, Any]
) -> h5py.Group:
    group = _sasdata(entry, "smeared", exposure, I, Idev)
    columns = {name: exposure[name].values for name in ("dQw", "dQl") if name in exposure}
    if smearing is not None and smearing.kind == "slit":
        # Of a measured profile, `length` is that of the uniform slit which comes nearest: R holds the profile itself.
        columns = {f"dQ{side[0]}": np.full(smearing.q.size, smearing.parameters[side]) for side in ("width", "length")}
    if columns:
        # SasView takes half-widths; the order is that in which sasdata reads them.
        both = {name: columns.get(name, np.zeros(exposure.sizes["q"])) for name in ("dQw", "dQl")}
        _resolution(group, both, "Square")
    elif smearing is not None:
        _resolution(group, {"Qdev": smearing.resolution}, "Gaussian")
    elif "I_smeared" not in exposure and "Qdev" in exposure:
        _resolution(group, {"Qdev": exposure["Qdev"].values}, "Gaussian")
    if smearing is not None:
        _once(group, "R", shared, lambda: _write_matrix(group, smearing))
        _once(group, "q_calc", shared, lambda: _dataset(group, "q_calc", smearing.q_calc, "1/nm", "q of the unsmeared curve"))
    return group


def _write_matrix(group: h5py.Group, smearing: Smearing) -> None:
    group.create_dataset("R", data=smearing.matrix, compression="gzip", shuffle=True)
    group["R"].attrs.update(units="1", long_name="smearing operator: I(Q) = R @ I(q_calc)")


def _sasdata(entry: h5py.Group, name: str, exposure: xr.Dataset, I: str, Idev: str) -> h5py.Group:
    group = _group(entry, name, "NXdata", "SASdata", signal="I", I_axes="Q", Q_indices=np.array([0]))
    group.attrs["axes"] = np.array(["Q"], dtype=h5py.string_dtype())
    _dataset(group, "Q", exposure["q"].values, "1/nm", "scattering vector")
    _dataset(group, "I", exposure[I].values, _units(exposure[I]), f"{name} intensity")
    group["I"].attrs["uncertainties"] = "Idev"
    _dataset(group, "Idev", exposure[Idev].values, _units(exposure[Idev]), "standard deviation of the intensity")
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


# -- where they come from --


def _write_instrument(entry: h5py.Group, contents: Contents) -> None:
    group = _group(entry, "sasinstrument", "NXinstrument", "SASinstrument")
    recorded = contents.instrument
    source = _group(group, "sassource", "NXsource", "SASsource")
    if contents.wavelength:
        _dataset(source, "incident_wavelength", contents.wavelength * 1e9, "nm")
    if recorded and recorded.wavelength_spread and contents.wavelength:
        spread = recorded.wavelength_spread * contents.wavelength * 1e9
        _dataset(source, "incident_wavelength_spread", spread, "nm", "standard deviation of the wavelength")
    detector = _group(group, "sasdetector", "NXdetector", "SASdetector")
    detector["name"] = str(recorded.poni.get("detector", "detector")) if recorded else "detector"
    if contents.distance:
        _dataset(detector, "SDD", contents.distance, "m", "distance from the sample to the detector")
    if recorded and (recorded.slit_width or recorded.slit_height):
        slit = _group(group, "sasaperture", "NXaperture", "SASaperture")
        slit["shape"] = "slit"
        for name, value in (("x_gap", recorded.slit_width), ("y_gap", recorded.slit_height)):
            if value:
                _dataset(slit, name, value, "m")
    if contents.psf is not None:
        _write_psf(group, contents.psf)


def _write_psf(instrument: h5py.Group, psf: xr.Dataset) -> None:
    """Write the direct beam as an image and by its rings; see `reduction.psf`."""
    for name, signal, more in (("psf", "beam", ("counts", "sigma")), ("psf_rings", "p", ())):
        if signal not in psf:
            continue
        group = instrument.create_group(name)
        dims = [str(dim) for dim in psf[signal].dims]
        group.attrs.update(NX_class="NXdata", signal=signal, axes=np.array(dims, dtype=h5py.string_dtype()))
        group.attrs.update({f"{dim}_indices": np.array([place]) for place, dim in enumerate(dims)})
        for variable in (signal, *dims, *(variable for variable in more if variable in psf)):
            values = psf[variable]
            _dataset(group, variable, values.values[()], _units(values), str(values.attrs.get("long_name", variable)))


def _write_step(entry: h5py.Group, step: Step, place: int, shared: dict[str, Any]) -> None:
    group = _group(entry, f"sasprocess{place:02d}", "NXprocess", "SASprocess")
    group["name"] = step.name
    group["date"] = _now()
    group["description"] = step.description
    group["program"] = "dsnet-bluesky"
    group["version"] = __version__
    group["sequence_index"] = place
    for number, (name, value) in enumerate(step.terms.items(), start=1):
        # Only names of this form come back through sasdata.
        _once(group, f"term{number:02d}", shared, partial(_write_term, group, number, name, value), f"{name} = {value}")


def _write_term(group: h5py.Group, number: int, name: str, value: str) -> None:
    term = group.create_dataset(f"term{number:02d}", data=f"{name} = {value}")
    term.attrs["name"] = name


# -- the pieces --


def _group(parent: h5py.Group, name: str, nexus: str, cansas: str, **attributes: Any) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update(NX_class=nexus, canSAS_class=cansas, **attributes)
    return group


def _dataset(group: h5py.Group, name: str, values: Any, units: str, long_name: str = "") -> None:
    group[name] = values
    group[name].attrs.update(units=units, **({"long_name": long_name} if long_name else {}))


def _units(variable: xr.DataArray) -> str:
    return str(variable.attrs.get("units", "1"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""One-dimensional curves from files: canSAS XML, NXcanSAS and columns of text.

Whatever the file's unit, q comes out in 1/nm. Nothing is repaired in silence:
what was dropped, estimated or assumed stands in the curve's attributes.

The readers are our own, and tested against sasdata's: that one turns NaN in XML
into 0, sorts the points, refuses a dQl without a unit, tells dQw from dQl in HDF5
by their order in an attribute, and gives every frame of a stack the intensities of
the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.smearing import Smearing

from .cansas import read_nxcansas, read_xml
from .columns import Floats, to_curve
from .table import find_table
from .text import decode, read_text
from .units import per_nm, units_in

__all__ = ["read_curve", "read_profile", "smearing_for"]

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_curve(path: str | Path, *, units: str | None = None, entry: str | int | None = None, sort: bool = False) -> xr.Dataset:
    """Read a curve from a file.

    Parameters
    ----------
    path
        canSAS XML, NXcanSAS (HDF5), or text with the columns Q I [dI [dQ]] and any
        lines of words around them; a heading with a name for each column tells others.
        A negative dQ is the half-length of a slit, as in NIST's .ABS files.
    units
        Unit of q, "1/nm" or "1/angstrom"; overrides what the file says. Without
        it, and without a word in the file, text is taken as 1/angstrom.
    entry
        Which curve of a file that holds several: its name or its number, from 1.
    sort
        Sort the points by q and average repeated ones (weighted by 1/Idev^2).

    Returns
    -------
    xarray.Dataset
        A curve (`dsnet_bluesky.data.curve`) with q in 1/nm, and `Qdev`, `dQl`, `dQw`
        (q) in 1/nm where the file has them. Attributes: `title`, `sample`, `file`,
        `entry`, `q_units` (of the file), `q_units_from` (option, file or assumed),
        `dropped_points` (rows with NaN, infinity or a missing field, or Idev <= 0), `Idev_estimated`
        if dI was missing.

    Raises
    ------
    BadInput
        If the file is missing, is of none of these kinds, holds several curves and
        `entry` names none, or its curve cannot be used.
    """
    path = Path(path)
    reader = _reader_for(path)
    try:
        columns = reader(path, entry)
        return to_curve(columns, units, sort).assign_attrs(file=path.name)
    except BadInput as error:
        raise BadInput(f"{path.name}: {error}") from error


def smearing_for(
    curve: xr.Dataset,
    *,
    slit_length: float | None = None,
    slit_width: float | None = None,
    sigma: float | None = None,
    beam_profile: str | Path | None = None,
) -> Smearing:
    """Build the smearing operator of a curve, from the options or else from its own columns.

    Parameters
    ----------
    curve
        Dataset of `read_curve`.
    slit_length, slit_width
        HALF the length and width of the slit in 1/nm.
    sigma
        Standard deviation of a Gaussian in 1/nm, the same at all q.
    beam_profile
        File of a measured slit-length profile (`read_profile`), in place of `slit_length`.

    Raises
    ------
    BadInput
        If the options contradict each other, or neither they nor the curve say
        what the resolution is.
    """
    q = curve["q"].values
    slit = slit_length is not None or slit_width is not None or beam_profile is not None
    if sigma is not None and slit:
        raise BadInput("--sigma and a slit were both given; give the one that describes the instrument.")
    if beam_profile is not None and slit_length is not None:
        raise BadInput("--beam-profile and --slit-length both describe the slit's length; give one.")
    if sigma is not None:
        return Smearing.gaussian(q, sigma)
    if slit:
        profile = None if beam_profile is None else read_profile(beam_profile)
        return Smearing.slit(q, slit_length or 0.0, slit_width or 0.0, profile=profile)
    if "dQl" in curve or "dQw" in curve:
        return Smearing.slit(q, _constant(curve, "dQl"), _constant(curve, "dQw"))
    if "Qdev" in curve:
        return Smearing.pinhole(q, curve["Qdev"].values)
    raise BadInput(
        "The curve does not say what smeared it (no dQ, dQl or dQw). Give --slit-length (half the length) and "
        "--slit-width, --sigma, or --beam-profile, in 1/nm."
    )


def read_profile(path: str | Path, *, units: str | None = None) -> tuple[Floats, Floats]:
    """Read a measured slit-length profile.

    Parameters
    ----------
    path
        Text with two or more columns: l and P(l), any lines of words around them. A
        profile from l = 0 on counts for both sides.
    units
        Unit of l; by default what the file says, else 1/nm.

    Returns
    -------
    l, P : ndarray
        Shape (k,), l ascending in 1/nm.

    Raises
    ------
    BadInput
        If the file is missing or holds no such columns.
    """
    path = Path(path)
    _existing(path)
    try:
        header, table = find_table(decode(path))
        l, weight = table[:, 0] * per_nm(units or units_in(header) or "1/nm"), table[:, 1]
        if not np.isfinite(table[:, :2]).all() or (weight < 0).any() or not (np.diff(l) > 0).all():
            raise BadInput("a beam profile needs l ascending and weights that are finite and not negative.")
    except BadInput as error:
        raise BadInput(f"{path.name}: {error}") from error
    return l, weight


def _constant(dataset: xr.Dataset, name: str) -> float:
    """Return the one value of a slit column; 0 where there is none."""
    if name not in dataset:
        return 0.0
    values = np.abs(dataset[name].values)
    low, high = float(values.min()), float(values.max())
    if high - low > 0.01 * high:
        option = "--slit-length" if name == "dQl" else "--slit-width"
        raise BadInput(
            f"{name} changes along the curve, from {low:.4g} to {high:.4g} 1/nm; a slit is taken as constant. "
            f"Give one value with {option}."
        )
    return float(np.median(values))


def _existing(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise BadInput(f"{path.name}: the file is empty.")


def _reader_for(path: Path) -> Any:
    _existing(path)
    with path.open("rb") as stream:
        start = stream.read(1024)
    if start.startswith(HDF5_SIGNATURE):
        return read_nxcansas
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<?xml", b"<SASroot")):
        return read_xml
    return read_text

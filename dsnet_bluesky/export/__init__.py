"""Export of results to files: NXcanSAS, canSAS 1D XML and plain columns.

`contents` says what a file tells of a result, whatever its format; `nxcansas`, `cansas_xml` and `columns`
write it; `files` puts files in place. The command ``dsnet-bluesky export``, the clients and the formats of
the Tiled server (`adapters.exports`) share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from dsnet_bluesky.smearing import Smearing

from .contents import Contents, of_curves, of_result
from .files import FORMATS, check_target, file_name, format_of, write

__all__ = ["FORMATS", "Contents", "check_target", "file_name", "format_of", "of_curves", "of_result", "to_nxcansas", "write"]


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
    plot) and `smeared`. Exposures whose status is "failed" are left out, and said to be.

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
    contents = of_curves(dataset, title=title, sample=sample, process=process, smearing=smearing)
    return write([contents], path, "nxcansas", overwrite=overwrite)

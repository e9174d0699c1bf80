"""Formats in which the server gives results away: ``?format=nxcansas``, ``xml`` and ``txt`` of a result that holds curves.

Tiled finds them by the specs `dsnet_desmeared` and `dsnet_denoised` (`media_types` in tiled_config/). It asks for a node that the
user may read, and hands over that node alone: these files hold what `dsnet-bluesky export` writes,
without the PSF and the instrument, which are other nodes with access tags of their own.

One exposure is asked for by a parameter of the media type: ``?format=text/plain;exposure=2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import h5py
import xarray as xr
from tiled.utils import parse_mimetype

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.export import cansas_xml, columns, nxcansas
from dsnet_bluesky.export.contents import Contents, of_result
from dsnet_bluesky.rows import decode_words

from .serving import explained

__all__ = ["as_cansas_xml", "as_columns", "as_nxcansas"]

MOST_EXPOSURES = 1000
"""Of a file that the server makes: of 500 points, each is some 50 kB of NXcanSAS, which is made in memory, or 180 kB of XML."""


def as_nxcansas(mimetype: str, node: Any, metadata: Mapping[str, Any], filter_for_access: Any) -> bytes:
    """Serialize a result as NXcanSAS; the parameters are Tiled's.

    Raises
    ------
    fastapi.HTTPException
        With status 422 if the result is not complete, or has no such exposure, or too many.
    """
    with explained():
        contents, exposure = _asked(mimetype, node, metadata)
        with h5py.File("result.h5", "w", driver="core", backing_store=False) as file:
            nxcansas.fill(file, [contents], exposure=exposure)
            file.flush()
            return file.id.get_file_image()


def as_cansas_xml(mimetype: str, node: Any, metadata: Mapping[str, Any], filter_for_access: Any) -> Iterator[bytes]:
    """Serialize a result as canSAS 1D XML, an exposure at a time; see `as_nxcansas`."""
    with explained():
        contents, exposure = _asked(mimetype, node, metadata)
        return _begun(cansas_xml.lines([contents], exposure=exposure), pieces=2)


def as_columns(mimetype: str, node: Any, metadata: Mapping[str, Any], filter_for_access: Any) -> bytes:
    """Serialize one exposure of a result as columns; see `as_nxcansas`."""
    with explained():
        contents, exposure = _asked(mimetype, node, metadata)
        return b"".join(columns.lines(contents, exposure=exposure))


def _asked(mimetype: str, node: Any, metadata: Mapping[str, Any]) -> tuple[Contents, int | None]:
    arrays = dict(node.items())
    variables = {name: (array.dims, array.read(), array.metadata().get("attrs", {})) for name, array in arrays.items()}
    missing = {"q", "I", "Idev"} - set(variables)
    if variables and missing:
        raise BadInput(f"Without {', '.join(sorted(missing))} there is no curve to export; leave out the parameter field.")
    coords = [name for name in ("q",) if name in variables]
    curves = xr.Dataset(variables, attrs=dict(metadata.get("attrs", {}))).set_coords(coords)
    contents, exposure = of_result(decode_words(curves), metadata), _exposure(mimetype)
    count = contents.curves.sizes["exposure"] - len(contents.failed)
    if exposure is None and count > MOST_EXPOSURES:
        raise BadInput(
            f"The result holds {count} exposures, and the server exports {MOST_EXPOSURES} at most. Ask for one, as "
            "format=application/x-nxcansas;exposure=1, or use dsnet-bluesky export."
        )
    return contents, exposure


def _exposure(mimetype: str) -> int | None:
    try:
        parameters = parse_mimetype(mimetype)[1]
        return int(parameters["exposure"]) if "exposure" in parameters else None
    except ValueError:
        raise BadInput(f"{mimetype} is not understood; an exposure is asked for as text/plain;exposure=2.") from None


def _begun(pieces_of_file: Iterator[bytes], pieces: int) -> Iterator[bytes]:
    """Make the first pieces now, while what is wrong can still be answered with a status, and the others when they are sent."""
    first = [next(pieces_of_file) for _ in range(pieces)]

    def all_of_them() -> Iterator[bytes]:
        yield from chain(first, pieces_of_file)

    return all_of_them()

"""Registering what the server shows of raw runs on demand: curves and PSFs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiled.client.utils import ClientError
from tiled.queries import Key
from tiled.structures.core import Spec, StructureFamily
from tiled.structures.data_source import Asset, DataSource, Management
from tiled.utils import ensure_uri

import dsnet_bluesky.derived.fabio  # noqa: F401 - teaches TiledWriter a MIME type
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived.catalog import CONFLICT, access_tags_of, mount
from dsnet_bluesky.derived.raw import RawFrames, raw_frames
from dsnet_bluesky.documents import Instrument, purpose
from dsnet_bluesky.frames import FrameReference, count, path_of
from dsnet_bluesky.nodes import CURVE_MIMETYPE, MASK, PSF_MIMETYPE

__all__ = ["register", "register_all", "register_curves", "register_psf"]

INTERNAL_SERVER_ERROR = 500


@dataclass(frozen=True)
class _Kind:
    mimetype: str
    spec: str


KINDS = {"curves": _Kind(CURVE_MIMETYPE, "dsnet_curve"), "psfs": _Kind(PSF_MIMETYPE, "dsnet_psf")}
"""What a mount shows."""


def register_curves(client: Any, run: Any, *, instrument: Instrument | None = None) -> Any:
    """Let the server show a run's curves at ``/curves/<uid>``.

    May be called while the run goes on: frames that a file gains later are shown
    too; files that a run gains later are shown after the next call.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    run
        ``client["raw"][uid]``.
    instrument
        In place of what the run recorded.

    Returns
    -------
    tiled.client.container.Container
        The node; ``.read()`` gives the curves as a Dataset with dims (exposure, q).

    Raises
    ------
    BadInput
        If the run holds no frames or no geometry, or the server cannot read its files.
    """
    return _register(client, run, raw_frames(run, instrument), ["curves"])["curves"]


def register_psf(client: Any, run: Any, *, instrument: Instrument | None = None) -> Any:
    """Let the server show the PSF of a direct-beam run at ``/psfs/<uid>``; see `register_curves`.

    Raises
    ------
    BadInput
        If the run is not a direct beam, or as `register_curves`.
    """
    what = purpose(run.metadata["start"])
    if what != "direct_beam":
        raise BadInput(f"Run {run.item['id']} has the purpose {what!r}; a PSF is measured in runs of purpose 'direct_beam'.")
    return _register(client, run, raw_frames(run, instrument), ["psfs"])["psfs"]


def register(client: Any, run: Any, *, instrument: Instrument | None = None) -> dict[str, Any]:
    """Register all that can be shown of a run: its curves, and its PSF if it is a direct beam; see `register_curves`.

    Returns
    -------
    dict
        The nodes, by mount: curves and psfs.
    """
    beam = purpose(run.metadata["start"]) == "direct_beam"
    return _register(client, run, raw_frames(run, instrument), ["curves", "psfs"] if beam else ["curves"])


def register_all(client: Any) -> dict[str, int]:
    """Register every run of ``/raw`` that lacks its curves or its PSF.

    Parameters
    ----------
    client
        Tiled client of the server's root.

    Returns
    -------
    dict
        Numbers of `curves` and `psfs` registered now, and of runs `skipped`
        because they hold no frames, no geometry, or files that cannot be read.
    """
    counts = {"curves": 0, "psfs": 0, "skipped": 0}
    raw, curves, psfs = mount(client, "raw"), set(mount(client, "curves")), set(mount(client, "psfs"))
    beams = set(raw.search(Key("purpose") == "direct_beam"))
    for uid in raw:
        lacking = [kind for kind, absent in (("curves", uid not in curves), ("psfs", uid in beams - psfs)) if absent]
        if not lacking:
            continue
        try:
            register(client, raw[uid])
        except BadInput:
            counts["skipped"] += 1
        else:
            for kind in lacking:
                counts[kind] += 1
    return counts


def _register(client: Any, run: Any, frames: RawFrames, kinds: Sequence[str]) -> dict[str, Any]:
    mounts = {kind: mount(client, kind) for kind in kinds}
    nodes = {kind: _existing(mounts[kind], run.item["id"], len(frames.source.assets)) for kind in kinds}
    if None in nodes.values():
        _check_readable(frames)
    return {kind: node or _create(mounts[kind], run, frames, KINDS[kind]) for kind, node in nodes.items()}


def _existing(parent: Any, uid: str, files: int) -> Any | None:
    """Return the node if it is there and knows all files; remove one that knows fewer."""
    try:
        node = parent[uid].include_data_sources()
    except KeyError:
        return None
    known = [asset for asset in node.data_sources()[0].assets if asset.parameter != MASK]
    if len(known) >= files:
        return node
    parent.delete_contents(uid)  # the record only: the files are not ours
    return None


def _create(parent: Any, run: Any, frames: RawFrames, kind: _Kind) -> Any:
    uid, start = run.item["id"], run.metadata["start"]
    attrs = {key: start[key] for key in ("sample", "purpose", "scan_id") if key in start}
    try:
        node = parent.new(
            StructureFamily.container,
            [_data_source(frames, kind.mimetype)],
            key=uid,
            metadata={**attrs, "raw_uid": uid, "attrs": {**attrs, "raw_uid": uid}},
            specs=[Spec(kind.spec, version="1"), Spec("xarray_dataset")],
            access_tags=access_tags_of(run),
        )
    except ClientError as error:
        if error.response.status_code != CONFLICT:
            raise
        return parent[uid]  # somebody else registered it in this moment
    if frames.instrument.mask and _fails(node, "search"):
        parent.delete_contents(uid)
        raise BadInput(_unreadable(frames.instrument.mask))
    return node


def _data_source(frames: RawFrames, mimetype: str) -> DataSource:
    raw, mask = frames.source, frames.instrument.mask
    assets = [Asset(asset.data_uri, False, "data_uris", num=number) for number, asset in enumerate(raw.assets)]
    if mask:
        # As Tiled spells it: it compares the path as it stands with its readable_storage.
        assets.append(Asset(ensure_uri(path_of(mask)), False, MASK))
    return DataSource(
        structure_family=StructureFamily.container,
        structure=None,
        mimetype=mimetype,
        parameters={
            "frames": {"mimetype": raw.mimetype, "parameters": raw.parameters, "per_exposure": frames.per_exposure},
            "instrument": frames.instrument.to_configuration(),
        },
        assets=assets,
        management=Management.external,
    )


def _check_readable(frames: RawFrames) -> None:
    """Read one pixel through the server: what it may not read now would be an internal server error later."""
    uri = frames.source.assets[0].data_uri
    if path_of(uri).exists():  # on this machine too, where errors can say more
        count(FrameReference(uri, str(frames.source.mimetype), frames.source.parameters))
    if _fails(frames.node, "full", slice=",".join("0:1" for _ in frames.node.shape)):
        raise BadInput(_unreadable(uri))


def _fails(node: Any, link: str, **params: str) -> bool:
    """Whether the server breaks down over a request; asked once, where Tiled's client would try for 45 s."""
    # The server drops a connection on which it broke down; this request gets one of its own.
    http, headers = node.context.http_client, {"Connection": "close"}
    return http.get(node.item["links"][link], params=params, headers=headers).status_code >= INTERNAL_SERVER_ERROR


def _unreadable(uri: str) -> str:
    folder = path_of(uri).parent
    return (
        f"The server cannot read {uri}. Either it does not see that file, or may not read from there: add {folder} to "
        "readable_storage of /raw, /curves and /psfs in its configuration, or start it with "
        f"`dsnet-bluesky serve --readable {folder}`."
    )

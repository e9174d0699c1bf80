"""What the catalog says of a run's frames: where they are, how many, and how the instrument stood."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tiled.structures.data_source import DataSource

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Exposure, Instrument, frames_per_exposure, is_image
from dsnet_bluesky.frames import HDF5_MIMETYPE, FrameReference
from dsnet_bluesky.nodes import DEPTH, WithinRuns

__all__ = ["RawFrames", "raw_frames", "raw_frames_of"]


@dataclass(frozen=True)
class RawFrames:
    """The frames of a run: their node, where they are, and the state of the instrument."""

    run_uid: str
    start: Mapping[str, Any]
    stream: Any
    """Node of the stream."""

    data_key: str
    node: Any
    source: DataSource
    instrument: Instrument

    @property
    def per_exposure(self) -> int:
        """Frames of an event; they are summed."""
        return int(np.prod(self.node.shape[1:-2]))

    def exposures(self, first: int = 0) -> list[Exposure] | None:
        """Return the exposures from number `first` on that the catalog knows of at this moment.

        None where it does not tell which frame is in which file: the run's documents do, when it has ended.
        """
        shape = self.stream.metadata["data_keys"][self.data_key]["shape"]
        number = frames_per_exposure(shape, self.source.parameters)
        stop = int(np.prod(self.node.shape[:-2])) // number
        uris = [asset.data_uri for asset in self.source.assets]
        mimetype, parameters = str(self.source.mimetype), self.source.parameters
        if len(uris) == 1:
            places = [FrameReference(uris[0], mimetype, parameters, k * number, (k + 1) * number) for k in range(first, stop)]
        elif len(uris) >= stop and mimetype != HDF5_MIMETYPE:
            places = [FrameReference(uris[k], mimetype, parameters, 0, number) for k in range(first, stop)]
        else:
            return None
        return [self._exposure(index, place) for index, place in enumerate(places, start=first)]

    def refresh(self) -> RawFrames:
        """Look again.

        Raises
        ------
        BadInput
            If the instrument was changed since the run began.
        """
        stream = self.stream.refresh()
        node = self.node.refresh().include_data_sources()
        return RawFrames(
            self.run_uid, self.start, stream, self.data_key, node, node.data_sources()[0], _instrument(stream.metadata)
        )

    def _exposure(self, index: int, place: FrameReference) -> Exposure:
        return Exposure(
            run_uid=self.run_uid,
            start=self.start,
            stream=self.stream.item["id"],
            data_key=self.data_key,
            index=index,
            frames=place,
            instrument=self.instrument,
            time=float(self.start["time"]),
        )


def raw_frames(run: Any, instrument: Instrument | None = None) -> RawFrames:
    """Find the frames of a run, which may still be going on.

    Parameters
    ----------
    run
        ``client["raw"][uid]``.
    instrument
        In place of what the run recorded.

    Raises
    ------
    BadInput
        If the run holds no frames, or none yet, or no geometry, or the instrument was changed within it.
    """
    container = run.base.new_variation(include_data_sources=True)
    return _raw_frames(run, _streams(container), container.__getitem__, instrument)


def raw_frames_of(raw: Any, runs: Mapping[str, Any]) -> dict[str, RawFrames | BadInput]:
    """Find the frames of many runs, with two requests for a hundred of them; see `raw_frames`.

    Parameters
    ----------
    raw
        ``client["raw"]``.
    runs
        Of its nodes, by uid.

    Returns
    -------
    dict
        By uid, what `raw_frames` returns or raises of each run.
    """
    inside: dict[str, dict[tuple[str, ...], Any]] = {uid: {} for uid in runs}
    # To list data sources costs the server as much again: only of arrays.
    for family, container in (("container", raw), ("array", raw.new_variation(include_data_sources=True))):
        found = container.search_deep(WithinRuns(",".join(runs), family), max_depth=DEPTH)
        for (uid, *place), node in found.items():
            inside[uid][tuple(place)] = node
    return {uid: _of(run, inside[uid]) for uid, run in runs.items()}


def _of(run: Any, inside: Mapping[tuple[str, ...], Any]) -> RawFrames | BadInput:
    streams = {place[0]: node for place, node in inside.items() if len(place) == 1}
    try:
        return _raw_frames(run, sorted(streams.items(), key=lambda item: item[0] != "primary"), inside.__getitem__, None)
    except BadInput as error:
        return error


def _raw_frames(
    run: Any, streams: Iterable[tuple[str, Any]], node_at: Callable[[tuple[str, str]], Any], instrument: Instrument | None
) -> RawFrames:
    """Take the first image of the first stream that has any."""
    for name, stream in streams:
        for key, described in stream.metadata.get("data_keys", {}).items():
            if "external" in described and is_image(described.get("shape") or ()):
                try:
                    node = node_at((name, key))
                except KeyError:
                    continue  # the stream has begun, but no frame has come yet
                state = instrument or _instrument(stream.metadata)
                return RawFrames(run.item["id"], run.metadata["start"], stream, key, node, node.data_sources()[0], state)
    raise BadInput(f"Run {run.item['id']} holds no frames: no stream with an image that was written to a file.")


def _streams(container: Any) -> Iterator[tuple[str, Any]]:
    """Go through a run's streams, beginning with `primary`, which mostly is the one that is wanted."""
    with contextlib.suppress(KeyError):
        yield "primary", container["primary"]
    for name in container:
        if name != "primary":
            yield name, container[name]


def _instrument(stream: Mapping[str, Any]) -> Instrument:
    """Read the state of the instrument from a stream's metadata, which holds later descriptors as updates."""
    first = Instrument.from_configuration(stream["configuration"])
    for update in stream.get("_config_updates", []):
        if Instrument.from_configuration({**stream["configuration"], **update.get("configuration", {})}) != first:
            raise BadInput("The instrument was changed within the run; curves are shown of runs with one state only.")
    return first

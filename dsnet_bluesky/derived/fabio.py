"""What TiledWriter must know of files that only fabio reads; importing this module tells it."""

from __future__ import annotations

from typing import Any

from bluesky_tiled_plugins.writing.consolidators import CONSOLIDATOR_REGISTRY, ConsolidatorBase, MultipartRelatedConsolidator

from dsnet_bluesky.frames import FABIO_MIMETYPE

__all__ = ["FabioConsolidator", "FabioSequenceConsolidator"]


class FabioConsolidator(ConsolidatorBase):
    """One file with all frames of a stream, for `adapters.FabioAdapter`."""

    supported_mimetypes = {FABIO_MIMETYPE}  # noqa: RUF012 - as the base class has it

    def consume_stream_datum(self, doc: Any) -> Any:
        """Count the frames, and record that all of them are in one file."""
        patch = super().consume_stream_datum(doc)
        self.orig_chunks = ((1,), *((length,) for length in self.shape))
        return patch


class FabioSequenceConsolidator(MultipartRelatedConsolidator):
    """A sequence of files with one frame each, named by the stream resource's `template`."""

    supported_mimetypes = {FABIO_MIMETYPE}  # noqa: RUF012


def _fabio_consolidator(stream_resource: Any, descriptor: Any) -> ConsolidatorBase:
    sequence = stream_resource["parameters"].get("template")
    return (FabioSequenceConsolidator if sequence else FabioConsolidator)(stream_resource, descriptor)


CONSOLIDATOR_REGISTRY[FABIO_MIMETYPE] = _fabio_consolidator  # type: ignore[assignment]

"""Runs recorded before us: from Tiled servers and databroker's archives into our catalog, by reference, for replay.

>>> source = open_source("mongodb://mongo.beamline/smi")                      # doctest: +SKIP
>>> mapping = load_mapping("smi.toml")                                        # doctest: +SKIP
>>> plan(source, mapping, client, since="2024-01-01")                         # doctest: +SKIP
>>> summary = bring_in(source, mapping, client, since="2024-01-01")           # doctest: +SKIP
>>> desmear_runs(client, summary.samples)                                     # doctest: +SKIP
"""

from .bringing import Summary, bring_in
from .mapping import ArchiveMapping, load_mapping
from .planning import Planned, plan
from .sources import ArchivedRun, Source, open_source

__all__ = ["ArchiveMapping", "ArchivedRun", "Planned", "Source", "Summary", "bring_in", "load_mapping", "open_source", "plan"]

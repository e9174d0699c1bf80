"""Replay: desmear what is in the catalog again, with another model, beside the results that are there.

`replay` finds the runs that have no result of a model and configuration yet (`selection`), hands them out in batches to
the workers of a dask cluster (`service`), and each worker desmears and stores its batch (`batches`) with the functions that
live work uses, so that a run has the same result whether it was done live or replayed.
"""

from .service import Summary, replay

__all__ = ["Summary", "replay"]

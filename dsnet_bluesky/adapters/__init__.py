"""What the server reads on demand: curves, PSFs, results, and frames that Tiled does not know.

Tiled finds these classes by MIME type (``adapters_by_mimetype`` in
``tiled_config/embedded.yml``). Whoever finds one of them has taught the server the query `questions.Latest`
(`latest`), that of `within`, and to compare faster (`comparisons`).
"""

import dsnet_bluesky.adapters.numbering  # noqa: F401 - teaches the server about numbered files

from .comparisons import compare
from .frames import CURVE_MIMETYPE, MASK, PSF_MIMETYPE, CurveAdapter, FabioAdapter, PSFAdapter
from .latest import latest
from .results import RESULT_MIMETYPE, ResultAdapter, specs_of
from .tables import TableAdapter
from .within import DEPTH, WithinRuns, within

__all__ = [
    "CURVE_MIMETYPE",
    "DEPTH",
    "MASK",
    "PSF_MIMETYPE",
    "RESULT_MIMETYPE",
    "CurveAdapter",
    "FabioAdapter",
    "PSFAdapter",
    "ResultAdapter",
    "TableAdapter",
    "WithinRuns",
    "compare",
    "latest",
    "specs_of",
    "within",
]

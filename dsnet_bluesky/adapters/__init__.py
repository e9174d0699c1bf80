"""What the server reads on demand: curves, PSFs, results, and frames that Tiled does not know.

Tiled finds these classes by MIME type (``adapters_by_mimetype`` in
``tiled_config/embedded.yml``). Whoever finds one of them has taught the server the query `questions.Latest`
(`latest`), that of `within`, to compare faster (`comparisons`), and to analyse requests once (`dependencies`).
"""

import dsnet_bluesky.adapters.dependencies
import dsnet_bluesky.adapters.numbering  # noqa: F401 - teaches the server about numbered files

from .comparisons import compare
from .frames import CurveAdapter, FabioAdapter, PSFAdapter
from .latest import latest
from .results import ResultAdapter
from .tables import TableAdapter
from .within import within

__all__ = [
    "CurveAdapter",
    "FabioAdapter",
    "PSFAdapter",
    "ResultAdapter",
    "TableAdapter",
    "compare",
    "latest",
    "within",
]

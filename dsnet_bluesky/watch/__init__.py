"""The service that desmears what comes into the catalog, away from the RunEngine.

The catalog is the truth: a run without a result is work to do (`backlog`). What the
server streams is a hint that makes it quick. Nothing is remembered between two
starts but what is in the catalog.
"""

from .backlog import Backlog
from .feeds import follow_documents
from .metrics import serve_metrics
from .service import Watcher
from .status import read_status

__all__ = ["Backlog", "Watcher", "follow_documents", "read_status", "serve_metrics"]

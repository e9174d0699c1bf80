"""The command line, ``dsnet-bluesky``: a module for each kind of command.

Everything heavy is imported inside the commands, so that help and completion
answer at once. Input that cannot be used ends in one red line and status 2;
any other error is a fault of ours and keeps its traceback.
"""

from . import archives, catalog, compare, curves, exports, indexes, models, replays, services, spools
from .common import app

__all__ = ["app", "archives", "catalog", "compare", "curves", "exports", "indexes", "models", "replays", "services", "spools"]

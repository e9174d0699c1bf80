"""A durable spool between the RunEngine and Tiled.

`SpooledWriter` takes the place of ``TiledWriter``: on the RunEngine's thread it only
appends documents to a local file. Another process delivers them to the catalog, in
order and for as long as it takes. See docs/how-to/spool.md.
"""

from .deliver import Deliverer
from .status import Status, read_status
from .writer import SpooledWriter

__all__ = ["Deliverer", "SpooledWriter", "Status", "read_status"]

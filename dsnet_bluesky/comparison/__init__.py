"""Results of two models, or methods, for the same raw runs, side by side: what changed, and whether one may replace the other.

`compare` reads the catalog; `measures` and `verdict` know nothing of one and take Datasets and numbers.
"""

from .runs import compare
from .tally import Comparison
from .verdict import Criteria, Verdict, judge

__all__ = ["Comparison", "Criteria", "Verdict", "compare", "judge"]

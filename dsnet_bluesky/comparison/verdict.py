"""Whether a model may replace another, by criteria that are written down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsnet_bluesky.data import Flag

from .tally import Comparison

__all__ = ["Check", "Criteria", "Verdict", "judge"]


@dataclass(frozen=True)
class Criteria:
    """What a model must fulfil to replace another one.

    Attributes
    ----------
    minimum_runs
        Runs that both did. Of fewer than 20 even a model that fails with one run in ten passes every eighth time.
    new_failures
        Runs or exposures that B could not do and A could: none, because each is a measurement that a user had and has no more.
    chi2_growth
        Growth of the median chi2. 2 % is what another training of the same recipe may differ by without being worse.
    poor_fit_growth
        Growth of the share of exposures flagged POOR_FIT, whose answer contradicts its measurement: none.
    beyond_3
        Share of points that changed by more than 3 of their errors. The errors are correlated, so right models stay far
        below the 0.3 % of independent ones;
        5 % says that at least one of both states its errors too small, or is wrong, for whole curves.
    inside_95
        Share of B's points within A's band of 95 %, which d does not see where B states large errors. Right models have more than
        95 %; below 80 % B says something else than A does, and a person must look.
    """

    minimum_runs: int = 20
    new_failures: int = 0
    chi2_growth: float = 0.02
    poor_fit_growth: float = 0.0
    beyond_3: float = 0.05
    inside_95: float = 0.8


@dataclass(frozen=True)
class Check:
    """One criterion.

    Attributes
    ----------
    name
        What is looked at.
    found, wanted
        In words.
    passed
        Whether it is fulfilled.
    why
        What is wrong, if it is not.
    """

    name: str
    found: str
    wanted: str
    passed: bool
    why: str


@dataclass(frozen=True)
class Verdict:
    """All criteria, and the line that sums them up."""

    passed: bool
    line: str
    checks: tuple[Check, ...]


def judge(comparison: Comparison, criteria: Criteria | None = None) -> Verdict:
    """Judge whether B may replace A."""
    criteria = criteria or Criteria()
    checks = (
        _runs(comparison, criteria),
        _failures(comparison, criteria),
        _chi2(comparison, criteria),
        _poor_fits(comparison, criteria),
        _changes(comparison, criteria),
        _coverage(comparison, criteria),
    )
    wrong = [check.why for check in checks if not check.passed]
    a, b = comparison.a, comparison.b
    line = (
        f"FAIL: {b} may not replace {a} because {'; '.join(wrong)}."
        if wrong
        else f"PASS: {b} may replace {a}, by {comparison.runs} runs compared."
    )
    return Verdict(not wrong, line, checks)


def _runs(found: Comparison, criteria: Criteria) -> Check:
    wanted = criteria.minimum_runs
    why = f"only {found.runs} runs could be compared, and {wanted} are needed"
    return Check("runs compared", str(found.runs), f"at least {wanted}", found.runs >= wanted, why)


def _failures(found: Comparison, criteria: Criteria) -> Check:
    count = len(found.new_failures)
    named = "; ".join(f"{failure.where}: {failure.reason.rstrip('.')}" for failure in found.new_failures[:3])
    more = f" and {count - 3} more" if count > 3 else ""
    why = f"{count} that {found.a} did {'fails' if count == 1 else 'fail'} now ({named}{more})"
    return Check("new failures", str(count), f"at most {criteria.new_failures}", count <= criteria.new_failures, why)


def _chi2(found: Comparison, criteria: Criteria) -> Check:
    a, b = (found.median(name) for name in ("chi2_a", "chi2_b"))
    limit = a * (1 + criteria.chi2_growth)
    why = f"the median chi2 is {b:.4g} instead of {a:.4g}, more than {criteria.chi2_growth:.2g} worse"
    passed = b <= limit or not np.isfinite(limit)
    return Check("median chi2", f"{b:.4g}, was {a:.4g}", f"at most {limit:.4g}", passed, why)


def _poor_fits(found: Comparison, criteria: Criteria) -> Check:
    count = max(len(found.exposures), 1)
    a, b = (found.flagged(name, Flag.POOR_FIT) / count for name in ("flags_a", "flags_b"))
    limit = a + criteria.poor_fit_growth
    why = f"{b:.2%} of the exposures are poor fits, and {a:.2%} were"
    return Check("poor fits", f"{b:.2%}, was {a:.2%}", f"at most {limit:.2%}", b <= limit + 1e-12, why)


def _changes(found: Comparison, criteria: Criteria) -> Check:
    share = found.mean("d_beyond_3")
    limit = criteria.beyond_3
    why = f"{share:.2%} of the points changed by more than three errors"
    if not np.isfinite(share):
        passed, shown = not len(found.exposures), "unknown"
        why = "neither states errors, so that no change can be judged"
    else:
        passed, shown = share < limit, f"{share:.2%}"
    return Check("points with |d| > 3", shown, f"below {limit:.2%}", passed, why)


def _coverage(found: Comparison, criteria: Criteria) -> Check:
    share, limit = found.mean("b_in_a_95"), criteria.inside_95
    why = f"only {share:.2%} of the points lie within the 95 % band of {found.a}"
    shown = f"{share:.2%}" if np.isfinite(share) else "unknown"  # of a method that states no errors, and d has judged
    return Check("points of B within A's 95 % band", shown, f"at least {limit:.2%}", not share < limit, why)

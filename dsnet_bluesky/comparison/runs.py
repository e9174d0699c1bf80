"""Reading the results of two references from the catalog, a pair at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import failures_of, sample_name
from dsnet_bluesky.questions import Question

from .measures import differences, mismatch, rows_of
from .pairing import Pair, pairs_of
from .references import Reference, parse_reference
from .tally import Comparison, Failure

__all__ = ["compare"]


def compare(
    client: Any,
    a: str,
    b: str,
    questions: Sequence[Question] = (),
    *,
    limit: int | None = None,
    notify: Callable[[int, int], object] = lambda done, total: None,
) -> Comparison:
    """Compare results of A and B for the same raw runs, direct beams and exposures.

    Held in memory are the curves of one pair and a row of numbers for each exposure, half a kilobyte.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    a, b
        ``"dsnet:2.0.0"``, ``"dsnet"`` (the version that is used by default) or a classical method, ``"ift"``.
    questions
        That the results of A must answer; those of B are found by their run.
    limit
        Results of A that are looked at, at most, those of the newest runs; all if not given.
    notify
        Called with the results of A that are done, and how many there are.

    Raises
    ------
    BadInput
        If there is no such model or method, both are one, or nothing can be compared.
    """
    first, second = parse_reference(a), parse_reference(b)
    if first == second:
        raise BadInput(f"{a} and {b} are one and the same ({first}); give two that differ.")
    results = client["desmeared"]
    comparison = Comparison(str(first), str(second))
    comparison.results_a = _count(results, first, questions)
    comparison.results_b = _count(results, second)
    _check_counts(comparison, first, second, questions)
    total = min(comparison.results_a, limit or comparison.results_a)
    for done, pair in enumerate(islice(pairs_of(results, first, second, questions), limit), 1):
        _add(comparison, pair)
        notify(done, total)
    _check_pairs(comparison, second)
    return comparison


def _count(results: Any, reference: Reference, questions: Sequence[Question] = ()) -> int:
    total = 0
    for search in reference.searches():
        found = results
        for query in (*search, *questions):
            found = found.search(query)
        total += len(found)
    return total


def _check_counts(found: Comparison, a: Reference, b: Reference, questions: Sequence[Question]) -> None:
    for reference, count in ((a, found.results_a), (b, found.results_b)):
        if not count:
            asked = " that answers what is asked" if reference is a and questions else ""
            raise BadInput(f"The catalog holds no result of {reference}{asked}; {reference.remedy}.")


def _check_pairs(found: Comparison, b: Reference) -> None:
    if found.runs or found.new_failures or found.healed or found.both_failed:
        return
    reasons = [f"{count} are {reason}" for reason, count in found.refused.most_common(3)]
    if found.unpaired:
        reasons.append(f"of {found.unpaired} runs {b} has no result, {b.remedy}")
    raise BadInput(f"No result of {found.a} can be compared with one of {found.b}: {'; '.join(reasons)}.")


def _add(comparison: Comparison, pair: Pair) -> None:
    if pair.b is None:
        comparison.unpaired += 1
    elif pair.refused:
        comparison.refused[pair.refused] += 1
    elif not _note_failures(comparison, pair):
        _add_curves(comparison, pair)


def _note_failures(comparison: Comparison, pair: Pair) -> bool:
    """Note a run that failed as a whole with one of both; whether there are no curves to compare."""
    a, b = (node.metadata["status"] == "failed" for node in (pair.a, pair.b))
    if a and b:
        comparison.both_failed += 1
    elif a or b:
        failed, noted = (pair.a, comparison.healed) if a else (pair.b, comparison.new_failures)
        noted.append(_failure(pair, None, failed.metadata.get("reason") or ""))
    return a or b


def _failure(pair: Pair, exposure: int | None, reason: str) -> Failure:
    return Failure(pair.said["raw_uid"], sample_name(pair.said), exposure, reason)


def _add_curves(comparison: Comparison, pair: Pair) -> None:
    mine, theirs = (failures_of(node.metadata) for node in (pair.a, pair.b))
    counts = [node.metadata["exposures"] for node in (pair.a, pair.b)]
    good = [place for place in range(min(counts)) if place not in mine and place not in theirs]
    a, b = (node.read().isel(exposure=good) for node in (pair.a, pair.b))
    if good and (why := mismatch(a, b)):
        comparison.refused[why] += 1
        return
    comparison.new_failures += [_failure(pair, place, theirs[place]) for place in sorted(theirs.keys() - mine.keys())]
    comparison.healed += [_failure(pair, place, mine[place]) for place in sorted(mine.keys() - theirs.keys())]
    if counts[1] < counts[0]:
        comparison.new_failures.append(_failure(pair, None, f"It holds {counts[1]} of {counts[0]} exposures."))
    if not good:
        return
    said = {
        "sample": sample_name(pair.said),
        "raw_uid": pair.said["raw_uid"],
        "key_a": pair.a.item["id"],
        "key_b": pair.b.item["id"],
        "time": pair.said["original_start_time"],
    }
    found = differences(a, b)
    comparison.add(said, list(rows_of(a, b, found, good)), a, b, found)

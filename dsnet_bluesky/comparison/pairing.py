"""Results of two references for the same raw run and direct beam, page by page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tiled.queries import In, Key

from dsnet_bluesky.questions import Question

from .references import Reference

__all__ = ["Pair", "pairs_of"]

PAGE = 50
"""Runs that are looked up with one request; their uids must fit into an address."""


@dataclass(frozen=True)
class Pair:
    """A result of A, and that of B for the same run and direct beam.

    Attributes
    ----------
    a, b
        Their nodes; `b` is None where there is none.
    refused
        Why they cannot be compared, empty if they can.
    """

    a: Any
    b: Any
    refused: str = ""

    @property
    def said(self) -> Mapping[str, Any]:
        """Metadata of A's result."""
        return self.a.metadata


def pairs_of(results: Any, a: Reference, b: Reference, questions: Sequence[Question]) -> Iterator[Pair]:
    """Pair the results of A, those of the newest runs first, with those of B.

    Nothing is listed as a whole: what is held is a page of nodes and the uids of the runs that were seen. Of several
    results of one reference for one run, direct beam and reduction the last one counts.

    Parameters
    ----------
    results
        Client of ``/desmeared``.
    a, b
        What is compared.
    questions
        That the results of A must answer; those of B are found by their run.
    """
    seen: set[str] = set()
    nodes = (node for search in a.searches() for node in _searched(results, search, questions))
    while page := list(islice(nodes, PAGE)):
        new = [uid for uid in dict.fromkeys(node.metadata["raw_uid"] for node in page) if uid not in seen]
        seen.update(new)
        if new:
            yield from _paired(_of_runs(results, new, {a.name, b.name}), a, b, {node.item["id"] for node in page})


def _searched(results: Any, search: Sequence[Any], questions: Sequence[Question]) -> Iterator[Any]:
    for query in search:
        results = results.search(query)
    for question in questions:
        results = results.search(question)
    yield from results.sort(("original_start_time", -1)).values()


def _of_runs(results: Any, uids: list[str], methods: set[str]) -> dict[str, list[Any]]:
    """Look up all results of runs by these methods, by run."""
    found = results.search(In("raw_uid", uids))
    found = found.search(In("method", sorted(methods)) if len(methods) > 1 else Key("method") == next(iter(methods)))
    of_run: dict[str, list[Any]] = {uid: [] for uid in uids}
    for node in found.values():
        of_run[node.metadata["raw_uid"]].append(node)
    return of_run


def _paired(of_run: Mapping[str, list[Any]], a: Reference, b: Reference, chosen: set[str]) -> Iterator[Pair]:
    for nodes in of_run.values():
        mine: dict[tuple[str | None, str], list[Any]] = defaultdict(list)
        for node in nodes:
            # What the questions did not select has no part; a run has few results, which lie on one page or the next.
            if a.made(node.metadata) and node.item["id"] in chosen:
                mine[node.metadata["direct_beam_uid"], _reduction(node.metadata)].append(node)
        theirs = [node for node in nodes if b.made(node.metadata)]
        for same in mine.values():
            yield _pair(max(same, key=_rank), theirs)


def _pair(a: Any, candidates: Sequence[Any]) -> Pair:
    """Choose what a result of A is compared with."""
    beam, reduction = a.metadata["direct_beam_uid"], _reduction(a.metadata)
    with_beam = [node for node in candidates if node.metadata["direct_beam_uid"] == beam]
    alike = [node for node in with_beam if _reduction(node.metadata) == reduction]
    # A run that failed for want of a direct beam names none.
    without = [node for node in candidates if node.metadata["direct_beam_uid"] is None and node.metadata["status"] == "failed"]
    b = max(alike or without or with_beam or candidates, key=_rank, default=None)
    if b is None:
        return Pair(a, None)
    if b in without:
        return Pair(a, b)
    if b.metadata["direct_beam_uid"] != beam:
        return Pair(a, b, "desmeared with another direct beam")
    if b not in alike:
        return Pair(a, b, f"reduced with another {', '.join(_differences(a.metadata, b.metadata))}")
    return Pair(a, b, "still running" if "running" in (a.metadata["status"], b.metadata["status"]) else "")


def _rank(node: Any) -> tuple[bool, float]:
    return node.metadata["status"] != "running", node.metadata["updated"]


def _reduction(said: Mapping[str, Any]) -> str:
    """What of a configuration decides the measured curve and its operator, as text."""
    return json.dumps(_reducing(said), sort_keys=True)


def _reducing(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said["config"].items() if key not in ("method", "options")}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    mine, theirs = _reducing(a), _reducing(b)
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))

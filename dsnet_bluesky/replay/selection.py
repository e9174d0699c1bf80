"""Which runs a replay is about, and what is to do of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tiled.queries import Comparison, Key, KeysFilter

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import mount
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.questions import Between, OfRun, Question, Sample
from dsnet_bluesky.watch.backlog import PAGE, Backlog

__all__ = ["Page", "Selection", "sample_runs"]


@dataclass(frozen=True)
class Page:
    """Runs that were looked at together: those to do, and those that have their result, or are not to be done."""

    to_do: list[str]
    done: list[str]


class Selection:
    """Sample runs of the catalog.

    Parameters
    ----------
    client
        Tiled client of the server's root.
    config
        How to reduce and desmear; runs with a complete result of it are done.
    questions
        Of `dsnet_bluesky.questions`: `Sample`, `OfRun`, `Between`; a run must fulfil all.
    retry_failed
        Whether runs that failed are to do again.

    Raises
    ------
    BadInput
        If a question cannot be asked of runs, or none fulfils all.
    """

    def __init__(self, client: Any, config: Config, questions: Sequence[Question] = (), *, retry_failed: bool = False) -> None:
        self._backlog = Backlog(client, config)
        self._retry_failed = retry_failed
        self._runs = sample_runs(client, questions)
        self.count = len(self._runs)

    def pages(self) -> Iterator[Page]:
        """Go through the runs, a page at a time."""
        runs = iter(self._runs)  # page after page from where the last one ended: asked by its number, each would count again
        while uids := list(islice(runs, PAGE)):
            to_do = [task.run_uid for task in self._backlog.tasks(uids, failed=self._retry_failed)]
            yield Page(to_do, [uid for uid in uids if uid not in set(to_do)])


def sample_runs(client: Any, questions: Sequence[Question] = ()) -> Any:
    """Return the sample runs of the catalog that fulfil all questions.

    Raises
    ------
    BadInput
        If a question cannot be asked of runs, or none fulfils all.
    """
    runs = mount(client, "raw").search(Key("purpose") == "sample")
    for question in questions:
        runs = _narrowed(runs, question)
    if not len(runs):
        asked = f" that is {', '.join(map(repr, questions))}" if questions else ""
        raise BadInput(f"The catalog holds no sample run{asked}; look at client['raw'], or widen the query.")
    return runs


def _narrowed(runs: Any, question: Question) -> Any:
    """Ask runs what is otherwise asked of results."""
    if isinstance(question, OfRun):
        return runs.search(KeysFilter(list(question.uids)))
    if isinstance(question, Sample):
        named = runs.search(Key("sample") == question.name)  # a start document holds a name, or a table with one
        return named if len(named) else runs.search(Key("sample.name") == question.name)
    if isinstance(question, Between):
        for query in question.queries():
            runs = runs.search(Comparison(query.operator, "time", query.value))
        return runs
    raise BadInput(f"{question!r} is asked of results; runs to replay are chosen by sample, run, since and until.")

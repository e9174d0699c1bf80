"""Questions about results, as one asks them; each is one or several of Tiled's own queries, which the server answers.

>>> from dsnet_bluesky.questions import Between, Model, Quality, Sample
>>> results = client["desmeared"]                                            # doctest: +SKIP
>>> good = results.search(Sample("AgBh")).search(Model("dsnet", ">=2,<3")).search(Quality(chi2_max=1.5))   # doctest: +SKIP
>>> good.search(Between("2026-11-01", "2026-12-01")).to_xarray()             # doctest: +SKIP

`parse_query` reads them as they are written on the command line: ``"model=dsnet>=2,<3"``.

They compose with each other and with Tiled's queries, in any order: a result must fulfil all of them.
`queries.ResultsClient`, which is what ``client["desmeared"]`` is where this package is installed, takes them; any other
client takes the queries of `Question.queries`, one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from packaging.specifiers import InvalidSpecifier, Specifier, SpecifierSet
from packaging.version import Version
from tiled.queries import Comparison, In, Key, NoBool
from tiled.query_registration import register

from .data import BadInput
from .versions import version_order

__all__ = ["Between", "Complete", "Failed", "Latest", "Model", "OfRun", "Quality", "Question", "Sample", "parse_query"]


class Question:
    """What may be asked of results."""

    def queries(self) -> list[Any]:
        """Return Tiled's queries; a result must fulfil all of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class OfRun(Question):
    """Results of these raw runs.

    Parameters
    ----------
    *uids
        Whole uids.

    Raises
    ------
    BadInput
        If none is given, or something else than words.
    """

    uids: tuple[str, ...]

    def __init__(self, *uids: str) -> None:
        if not uids or not all(uids):
            raise BadInput("Give the uid of a run, or several.")
        for uid in uids:
            if not isinstance(uid, str):
                raise BadInput(f"A uid is a word, not {type(uid).__name__}; give several one after the other: OfRun(a, b).")
        object.__setattr__(self, "uids", uids)

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [Key("raw_uid") == self.uids[0] if len(self.uids) == 1 else In("raw_uid", list(self.uids))]


@dataclass(frozen=True)
class Sample(Question):
    """Results of a sample of this name, as it stands in the start document."""

    name: str

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [Key("sample_name") == self.name]


@dataclass(frozen=True)
class Failed(Question):
    """Results that failed as a whole; their `reason` says why."""

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [Key("status") == "failed"]


@dataclass(frozen=True)
class Complete(Question):
    """Results that are complete."""

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [Key("status") == "complete"]


@dataclass(frozen=True)
class Quality(Question):
    """Complete results all of whose good exposures reproduce their measurement.

    Parameters
    ----------
    chi2_max
        Largest chi2 per point of an exposure.
    """

    chi2_max: float

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [Key("status") == "complete", Comparison("le", "chi2_largest", float(self.chi2_max))]


@dataclass(frozen=True)
class Between(Question):
    """Results of runs that began in a span of time.

    Parameters
    ----------
    begin, end
        Seconds since 1970, `datetime`, or ISO 8601 (``"2026-11-27"``); local time where no time zone is given. `end` is
        excluded; None leaves a side open.
    """

    begin: float | str | datetime | None = None
    end: float | str | datetime | None = None

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        sides = (("ge", self.begin), ("lt", self.end))
        return [Comparison(operator, "original_start_time", _seconds(when)) for operator, when in sides if when is not None]


@dataclass(frozen=True)
class Model(Question):
    """Results of a model, or of a classical method.

    Parameters
    ----------
    name
        ``"dsnet"``, or a method without models: ``"map"``.
    versions
        As for pip: ``">=2,<3"``, ``"==2.0.0"``, ``"~=2.1"``; all if not given.
        ``<3`` excludes what comes before the release of 3.

    Raises
    ------
    BadInput
        If the versions cannot be read.
    """

    name: str
    versions: str = ""

    def __post_init__(self) -> None:
        """Read the versions now: a typing error shall not wait for the search."""
        self.queries()

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        try:
            wanted = SpecifierSet(self.versions)
        except InvalidSpecifier as error:
            raise BadInput(f"{self.versions!r} are no versions ({error}); write them as for pip: '>=2,<3', '==2.0.0'.") from None
        return [Key("method") == self.name, *(query for each in wanted for query in _of_version(each))]


@register(name="dsnet_latest")
@dataclass(frozen=True)
class Latest(Question, NoBool):
    """Of each raw run one result: the newest.

    Only complete results count, and of models only released versions: no ``2.2.0rc1``, no model whose version is none. A
    result of dsnet comes before those of other methods, a model before a classical method, a higher version before a lower
    one, and of one version the result that was begun last, by the catalog's own count (of another direct beam or configuration).

    A result must fulfil all that is asked, in whatever order: ``Latest()`` with ``Model("dsnet", "<3")`` finds those
    of the newest results that are older than version 3, not the newest of the older ones; with ``Failed()`` nothing.

    It is a query of its own that `adapters.latest` answers, in the database: a server without this package does not know it.

    Parameters
    ----------
    method
        The newest of this method's results, instead of all: ``Latest("map")``.
    """

    method: str = ""

    def queries(self) -> list[Any]:
        """See `Question.queries`."""
        return [self]

    def encode(self) -> dict[str, str]:
        """Return what Tiled's client puts into the address."""
        return {"method": self.method}

    @classmethod
    def decode(cls, *, method: str) -> Latest:
        """Make the query of what stands in an address."""
        return cls(method)


def _of_version(wanted: Specifier) -> list[Any]:
    """Turn one condition for versions into comparisons of `versions.version_order`."""
    operator, text = wanted.operator, wanted.version
    if operator == "~=" or text.endswith(".*"):
        return _within(operator, text.removesuffix(".*"))
    order = version_order(text)
    if operator in ("==", "==="):
        return [Key("model_order") == order]
    if operator == "!=":
        return [Key("model_order") != order]
    if operator == "<" and not Version(text).is_prerelease:
        order = version_order(f"{text}a0")
    return [_compared({">=": "ge", "<=": "le", ">": "gt", "<": "lt"}[operator], order)]


def _within(operator: str, text: str) -> list[Any]:
    """Versions that begin with the same numbers: all of them (``==2.*``), or from this one on (``~=2.1``)."""
    if operator == "!=":
        raise BadInput(f"Versions other than {text}.* cannot be asked for; ask for those before and those after.")
    release = Version(text).release
    kept, first = (release[:-1], text) if operator == "~=" else (release, f"{text}a0")
    after = ".".join(map(str, (*kept[:-1], kept[-1] + 1)))
    return [_compared("ge", version_order(first)), _compared("lt", version_order(f"{after}a0"))]


def _compared(operator: str, order: int) -> Comparison:
    return Comparison(operator, "model_order", order)


def _seconds(when: float | str | datetime) -> float:
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            raise BadInput(f"{when!r} is no time; write it as 2026-11-27 or 2026-11-27T14:00.") from None
    if isinstance(when, datetime):
        return when.astimezone(UTC).timestamp()
    return float(when)


def parse_query(text: str) -> list[Question]:
    """Read one item of ``--query``; a result must answer all questions of all items.

    Parameters
    ----------
    text
        ``sample=AgBh``, ``run=UID``, ``model=dsnet``, ``model=dsnet>=2,<3`` (versions as for pip), ``model=dsnet:2.0.0``
        (this version alone), ``chi2<=1.5``, ``since=2026-11-01``, ``until=2026-11-30`` (a day alone is included; what
        begins at a time of day is not), ``status=complete`` or ``status=failed``, ``latest``. Blanks at the ends and
        around the sign do not matter.

    Raises
    ------
    BadInput
        If it asks for nothing that is known here; says what can be asked.
    """
    word, sign, value = _pieces(text)
    parse = _asked().get(f"{word}{sign}")
    if parse is None or bool(sign) != bool(value):
        raise _not_asked(text)
    try:
        return [parse(value)]
    except BadInput as error:
        raise _not_asked(text, str(error)) from None


def _pieces(text: str) -> tuple[str, str, str]:
    """Split an item into the word, the first sign and what follows it; without a sign it is a word alone."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:(<=|>=|==|!=|=|<|>)(.*))?", text.rstrip(), re.DOTALL)
    word, sign, value = found.groups() if found else ("", "", "")
    return word, sign or "", (value or "").strip()


def _asked() -> dict[str, Callable[[str], Question]]:
    """What can be asked in words, by the word and the sign."""
    asked: dict[str, Callable[[str], Question]] = {
        "sample=": Sample,
        "run=": OfRun,
        "model=": _parse_model,
        "chi2<=": _parse_quality,
        "since=": _parse_since,
        "until=": _parse_until,
        "status=": _parse_status,
    }
    latest = globals().get("Latest")
    return {**asked, **({"latest": lambda _: latest()} if latest else {})}


EXAMPLES = {
    "sample=": "sample=AgBh",
    "run=": "run=UID",
    "model=": "'model=dsnet>=2,<3' or model=dsnet:2.0.0",
    "chi2<=": "'chi2<=1.5'",
    "since=": "since=2026-11-01",
    "until=": "until=2026-11-30",
    "status=": "status=complete or status=failed",
    "latest": "latest",
}
"""How to ask, for messages; in quotes what a shell would take for something else."""


def _not_asked(text: str, why: str = "") -> BadInput:
    known = ", ".join(EXAMPLES[name] for name in _asked())
    return BadInput(f"The query {text!r} is not understood{f': {why}' if why else '.'} One asks with {known}.")


def _parse_model(value: str) -> Question:
    found = re.fullmatch(r"\s*([^\s:<>=!~]+)\s*(:?)(.*)", value)
    if found is None or (found[2] and not found[3].strip()):
        raise BadInput(f"{value!r} is no model.")
    name, exactly, versions = found.groups()
    return Model(name, f"=={versions.strip()}" if exactly else versions)


def _parse_quality(value: str) -> Question:
    try:
        chi2 = float(value)
    except ValueError:
        chi2 = math.nan
    if not 0 <= chi2 < math.inf:
        raise BadInput(f"{value!r} is no number for chi2.")
    return Quality(chi2_max=chi2)


def _parse_since(value: str) -> Question:
    return _checked(Between(value), value)


def _parse_until(value: str) -> Question:
    """A day is meant as a whole: ``since=2026-11-01`` and ``until=2026-11-30`` are November."""
    try:
        day = date.fromisoformat(value)
    except ValueError:
        return _checked(Between(end=value), value)
    try:
        return _checked(Between(end=datetime(day.year, day.month, day.day) + timedelta(days=1)), value)
    except OverflowError:
        raise BadInput(f"{value!r} is beyond what a calendar holds.") from None


def _checked(span: Between, value: str) -> Between:
    """Read the times now: a typing error shall not wait for the search."""
    try:
        span.queries()
    except BadInput:
        raise
    except (OverflowError, ValueError):
        raise BadInput(f"{value!r} is beyond what a calendar holds.") from None
    return span


def _parse_status(value: str) -> Question:
    known: dict[str, type[Question]] = {"complete": Complete, "failed": Failed}
    if value not in known:
        raise BadInput(f"{value!r} is no status that can be asked for.")
    return known[value]()

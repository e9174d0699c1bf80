"""The line above a table of text that names its columns."""

from __future__ import annotations

import re

from dsnet_bluesky.data import BadInput

from .table import COMMENT, fields_of

NAMES = {
    "dQl": r"dq_?l(?![a-z])",
    "dQw": r"dq_?w(?![a-z])",
    "Qdev": r"(d|delta|sigma|sig|err|error|std|unc)[ _.(]?q(?![a-z])|q[ _]?(dev|err|std|sig|unc|res)",
    "Idev": r"(d|e|delta|sigma|sig|err|error|std|unc)[ _.(]?i(?![a-z])|i(nt[a-z]*)?[ _]?(dev|err|std|sig|unc)"
    r"|err|sigma|std|unc|(sig|dev|sd|e)(?![a-z])",
    "q": r"q(?![a-z])",
    "I": r"(i|int|intens|intensity|counts?)(?![a-z])",
}
"""How the names of columns begin. The first that matches counts: dQ_err is no q."""

UNIT_OF_Q = re.compile(
    r"\W*q[\s>_]*(?:[(\[{]\s*(?:in\s+)?(?P<brackets>[^)\]}]+)"
    r"|(?:in\s+(?!the\b|an?\b)|/\s*)(?P<word>[^\s,;|]+(?:\s[-\u2212]1\b)?)"
    r"|(?P<inverse>1/\w+|[^\W\d]+\^?\{?[-\u2212]1\b))",
    re.IGNORECASE,
)
"""A heading whose q has a unit, whatever that is."""

ANGLE = re.compile(
    r"\W*((?:2|two)?[\s_-]*(?:theta|th|angle)(?![a-z])[^\s,;|]*|tth\S*)(?=.*\b(I|int\w*|counts?)\b)", re.IGNORECASE
)
"""A heading that begins with an angle in place of q."""

UNIT = re.compile(r"[(\[{/]|1/")
"""How a word begins that is the unit of the one before it, and no column."""


def heading_of(header: str) -> str:
    """Return the last line above a table that holds words, without the comment sign; "" if there is none."""
    line = next((line for line in reversed(header.splitlines()) if re.search(r"\w", line)), "").strip()
    return line.lstrip("".join(COMMENT)).strip()


def unit_told(heading: str) -> str | None:
    """Return the words of a heading for the unit of q, understood or not; None if there are none.

    The name of an angle that stands in place of q counts as such a word: it has a unit that is none of q.
    """
    if match := UNIT_OF_Q.match(heading):
        return next(word.strip() for word in match.groups() if word)
    angle = ANGLE.match(heading)
    return angle[1].rstrip(",;|\"'") if angle else None


def columns_named(header: str, width: int) -> dict[str, int]:
    """Find the columns of a table by the names in its heading.

    Parameters
    ----------
    header
        The lines above the table.
    width
        Number of its columns.

    Returns
    -------
    dict
        Positions of q, I and any of Idev, Qdev, dQl, dQw; empty where the heading has
        another number of names, or tells neither q nor I.

    Raises
    ------
    BadInput
        If one of q and I has a name, and stands in another place than usual.
    """
    names = _names(heading_of(header))
    found: dict[str, int] = {}
    for position, name in enumerate(names if len(names) == width else []):
        kind = next((kind for kind, start in NAMES.items() if re.match(rf"\W*({start})", name, re.IGNORECASE)), None)
        if kind is not None:
            found.setdefault(kind, position)
    if {"q", "I"} <= set(found):
        return found
    if found.get("q", 0) != 0 or found.get("I", 1) != 1:
        raise BadInput(
            f"the heading {', '.join(names)} does not name both q and I, and they are not the first two columns; "
            "name the columns q, I, dI, dQ."
        )
    return {}


def _names(heading: str) -> list[str]:
    if re.search("[,;]", heading):
        return fields_of(heading)
    names: list[str] = []
    for word in heading.split():
        if names and UNIT.match(word):
            names[-1] += " " + word
        else:
            names.append(word)
    return names

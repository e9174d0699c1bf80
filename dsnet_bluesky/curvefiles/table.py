"""The table of numbers in a text, with any lines of words around it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dsnet_bluesky.data import BadInput

from .columns import Floats

COMMENT = ("#", "!", "%", "//")
"""Signs that a line of words may begin with."""

GAP = re.compile(r"[^A-Za-z0-9]*|#?n/?a|[-+]?nan\(\w+\)|null|none|missing|[-+]?\d+\.?#\w+", re.IGNORECASE)
"""What programs write where a number is missing; C of Microsoft writes -1.#IND."""


@dataclass(frozen=True)
class _Row:
    line: int
    values: list[float]
    numbers: int
    words: int


def find_table(text: str) -> tuple[str, Floats]:
    """Find the one table of numbers.

    Commented and empty lines do not end it, and fields of its rows that are missing or
    no numbers are NaN. Only a few rows of numbers may stand above it, as the heads of
    some formats have them.

    Returns
    -------
    header
        The lines before it.
    table : ndarray
        The numbers, shape (n, columns).

    Raises
    ------
    BadInput
        If no table has 5 rows, or other rows of numbers remain.
    """
    lines = text.splitlines()
    items = [_row(number, line) for number, line in enumerate(lines) if _counts(line)]
    widths = Counter(len(row.values) for row in items if _complete(row))
    # Of two widths that are equally frequent the shorter one lacks a field.
    width = max(widths, key=lambda n: (widths[n], n), default=0)
    blocks = [_trimmed(list(group), width) for member, group in groupby(items, lambda row: _member(row, width)) if member]
    block = max(blocks, key=len, default=[])
    if len(block) < 5:
        raise BadInput(
            "no curve found: at least 5 rows of numbers (with decimal points) in the columns Q I [dI [dQ]] are needed, "
            f"the longest block has {len(block)}."
        )
    _refuse_others(lines, items, block, width)
    table = np.array([row.values + [math.nan] * (width - len(row.values)) for row in block])
    return "\n".join(lines[: block[0].line]), table


def fields_of(line: str) -> list[str]:
    """Return the fields of a row; between semicolons or commas one may be empty."""
    separator = next((sign for sign in ";," if sign in line), None)
    return [field.strip().strip("\"'") for field in line.strip().split(separator)]


def is_comment(line: str) -> bool:
    """Tell whether a line begins with a comment sign."""
    return line.lstrip().startswith(COMMENT)


def _counts(line: str) -> bool:
    """Tell whether a line can end a table: neither a comment nor one of signs alone, such as a ruler."""
    return not is_comment(line) and re.search(r"\w", line) is not None


def _row(number: int, line: str) -> _Row:
    fields = fields_of(line)
    values = [_number(field) for field in fields]
    known = [value is not None for value in values]
    words = sum(not good and not GAP.fullmatch(field) for good, field in zip(known, fields, strict=True))
    return _Row(number, [math.nan if value is None else value for value in values], sum(known), words)


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _complete(row: _Row) -> bool:
    return row.words == 0 and row.numbers >= 2


def _member(row: _Row, width: int) -> bool:
    """Tell whether a line can be a row inside a table: one word may stand in it, but not for q."""
    if row.words == 0:
        return len(row.values) <= width
    return row.words == 1 and len(row.values) == width and not math.isnan(row.values[0])


def _trimmed(block: list[_Row], width: int) -> list[_Row]:
    """Leave out what only looks like rows above and below a table."""
    full = [i for i, row in enumerate(block) if _complete(row) and len(row.values) == width]
    if not full:
        return []
    first, last = full[0], full[-1]
    while first > 0 and _leads(block[first - 1], block[first], width):
        first -= 1
    while last + 1 < len(block) and block[last + 1].words == 0 and block[last + 1].numbers:
        last += 1
    return block[first : last + 1]


def _leads(row: _Row, following: _Row, width: int) -> bool:
    """Tell an incomplete first row from a line of the head, which hardly continues q."""
    if row.words or not row.numbers:
        return False
    return len(row.values) == width or (row.numbers >= 2 and 0 < row.values[0] < following.values[0])


def _refuse_others(lines: list[str], items: list[_Row], block: list[_Row], width: int) -> None:
    """Refuse a file in which numbers remain outside the table, except for those of a head."""
    start, end = block[0].line, block[-1].line
    others = [*_data_above(items, block[0], width), *(row for row in items if row.line > end and _complete(row))]
    if others:
        line = others[0].line
        raise BadInput(
            f"the table of numbers goes from line {start + 1} to line {end + 1}, and {len(others)} rows of numbers stand "
            f"outside it, the first in line {line + 1} ({lines[line].strip()[:40]!r}). Put a # before lines that are none "
            "of its rows, give each row the same number of columns, and keep each curve in a file of its own."
        )


def _data_above(items: list[_Row], first: _Row, width: int) -> Iterator[_Row]:
    """Rows above a table that are too many for a head, or whose q belongs before that of the table."""
    above = [row for row in items if row.line < first.line]
    for length, group in groupby(above, lambda row: len(row.values) if _complete(row) else 0):
        rows = list(group)
        if length and len(rows) >= 5:
            yield from rows
        elif length and length <= width:
            yield from (row for row in rows if 0 < row.values[0] < first.values[0])

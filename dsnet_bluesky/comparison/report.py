"""A comparison in words, tables and figures: on a terminal, as JSON, and as a page that needs no network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsnet_bluesky.atomic import replacing

from .figures import FIGURES, WORDS
from .tally import Comparison
from .verdict import Verdict

__all__ = ["to_dict", "to_tables", "write"]

LISTED = 10
"""Runs, samples and failures that are listed."""

MEANINGS = {
    "chi2_a": "chi2 per point, A",
    "chi2_b": "chi2 per point, B",
    "d_rms": "rms of d",
    "d_beyond_3": "share of points with |d| > 3",
    "by_a_rms": "rms of (I_B - I_A) / Idev_A",
    "relative_median": "median of |I_B - I_A| / |I_A|",
    "b_in_a_68": "share of B within A's 68 % band",
    "b_in_a_95": "share of B within A's 95 % band",
    "a_in_b_68": "share of A within B's 68 % band",
    "a_in_b_95": "share of A within B's 95 % band",
}


def to_dict(found: Comparison, verdict: Verdict) -> dict[str, Any]:
    """Return everything but rows and curves as plain values, None standing for what is not a number."""
    return _plain(
        {
            "a": found.a,
            "b": found.b,
            "passed": verdict.passed,
            "verdict": verdict.line,
            "checks": [vars(check) for check in verdict.checks],
            "counts": _counts(found),
            "refused": dict(found.refused),
            "new_failures": [vars(failure) for failure in found.new_failures],
            "healed": [vars(failure) for failure in found.healed],
            "quantiles": _records(found.quantiles().rename(columns={q: f"{q:g}" for q in (0.05, 0.5, 0.95, 1.0)})),
            "quantities": _records(found.quantities()),
            "flags": _records(found.flags()),
            "answers": found.answers().to_dict("records"),
            "samples": _records(found.samples()),
            "most_changed": found.most_changed(LISTED).to_dict("records"),
        }
    )


def to_tables(found: Comparison, verdict: Verdict) -> Group:
    """Return tables for a terminal, the verdict last."""
    parts: list[Any] = [_table(title, rows) for title, rows in _sections(found, verdict, uid=8) if rows]
    style = "bold green" if verdict.passed else "bold red"
    return Group(*parts, Text(_printable(verdict.line), style=style))


def write(found: Comparison, verdict: Verdict, directory: Path) -> list[Path]:
    """Write ``report.html``, ``pairs.csv`` and the figures, each whole or not at all; what is there is replaced.

    Parameters
    ----------
    directory
        Made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(found)
    page = _page(found, verdict, pictures)
    written = {f"{name}.png": content for name, content in pictures.items()}
    rows = found.exposures.assign(exposure=found.exposures["exposure"] + 1)  # as the page counts
    written["pairs.csv"] = rows.to_csv(index=False, lineterminator="\n").encode()
    written["report.html"] = page.encode()
    for name, content in written.items():
        with replacing(directory / name) as partial:
            partial.write_bytes(content)
    return [directory / name for name in reversed(written)]


def _pictures(found: Comparison) -> dict[str, bytes]:
    """Draw the figures as PNG; without a curve to compare there are none."""
    pictures = {}
    if found.runs:
        for name, (_, draw) in FIGURES.items():
            buffer = io.BytesIO()
            draw(found).savefig(buffer, format="png")
            pictures[name] = buffer.getvalue()
    return pictures


def _page(found: Comparison, verdict: Verdict, pictures: Mapping[str, bytes]) -> str:
    environment = Environment(
        loader=PackageLoader("dsnet_bluesky.comparison"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        a=found.a,
        b=found.b,
        verdict=verdict,
        line=_printable(verdict.line),
        sections=[(title, rows) for title, rows in _sections(found, verdict) if rows],
        figures=[(FIGURES[name][0], base64.b64encode(picture).decode()) for name, picture in pictures.items()],
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


# -- tables, for both --


def _sections(found: Comparison, verdict: Verdict, uid: int | None = None) -> list[tuple[str, list[list[str]]]]:
    """All tables: a title, and rows of words, headings first; without rows a table is left out. Of uids so many letters."""
    return [
        ("Verdict", _verdict_rows(verdict)),
        ("Results", [["", ""], *([name, str(count)] for name, count in _counts(found).items() if count)]),
        ("Not compared", _listed(["results", "because they are"], ([n, why] for why, n in found.refused.most_common()))),
        ("New failures", _failure_rows(found.new_failures, uid)),
        ("Healed", _failure_rows(found.healed, uid)),
        ("Changes, over exposures", _quantile_rows(found)),
        ("Derived quantities", _quantity_rows(found)),
        ("Flags, exposures", _listed(["flag", "A", "B", "gained", "lost"], found.flags().reset_index().to_numpy().tolist())),
        ("Other parts answered", _listed(["A", "B", "exposures"], found.answers().to_numpy().tolist())),
        ("Samples", _sample_rows(found)),
        ("Runs that changed most", _changed_rows(found, uid)),
    ]


def _listed(headings: list[str], rows: Any) -> list[list[str]]:
    rows = [[_word(value) for value in row] for row in rows]
    return [headings, *rows] if rows else []


def _verdict_rows(verdict: Verdict) -> list[list[str]]:
    rows = ([check.name, check.found, check.wanted, "yes" if check.passed else "NO"] for check in verdict.checks)
    return _listed(["criterion", "found", "wanted", "fulfilled"], rows)


def _counts(found: Comparison) -> dict[str, int]:
    return {
        "runs compared": found.runs,
        "exposures compared": len(found.exposures),
        f"results of {found.a}": found.results_a,
        f"results of {found.b}": found.results_b,
        f"without a result of {found.b}": found.unpaired,
        "not compared": sum(found.refused.values()),
        "new failures": len(found.new_failures),
        "healed": len(found.healed),
        "failed with both": found.both_failed,
    }


def _failure_rows(failures: list[Any], uid: int | None) -> list[list[str]]:
    rows = [[f.sample, f.raw_uid[:uid], "all" if f.exposure is None else f.exposure + 1, f.reason] for f in failures[:LISTED]]
    if len(failures) > LISTED:
        rows.append([f"and {len(failures) - LISTED} more", "", "", ""])
    return _listed(["sample", "run", "exposure", "reason"], rows)


def _quantile_rows(found: Comparison) -> list[list[str]]:
    if not found.runs:
        return []
    rows = ([MEANINGS[str(name)], *values] for name, *values in found.quantiles().reset_index().to_numpy().tolist())
    return _listed(["", "5 %", "median", "95 %", "largest"], rows)


def _quantity_rows(found: Comparison) -> list[list[str]]:
    table = found.quantities()
    rows = [
        [
            _plain_word(str(name)),
            row.both,
            row.lost,
            _percent(row.relative_median),
            _percent(row.relative_95),
            _percent(row.beyond_2),
        ]
        for name, row in table.iterrows()
        if row.both or row.lost
    ]
    return _listed(["quantity", "exposures", "lost", "median change", "95 % change less than", "beyond 2 errors"], rows)


def _plain_word(name: str) -> str:
    return WORDS[name].replace("$", "").replace("_", "")


def _sample_rows(found: Comparison) -> list[list[str]]:
    rows = (
        [name or "(none)", *(int(count) for count in counts), *numbers, _percent(beyond), int(failures)]
        for name, *counts, numbers, beyond, failures in (
            (row[0], row[1], row[2], row[3:6], row[6], row[7])
            for row in found.samples().head(LISTED).reset_index().to_numpy().tolist()
        )
    )
    headings = ["sample", "runs", "exposures", "chi2, A", "chi2, B", "rms d", "|d| > 3", "new failures"]
    return _listed(headings, rows)


def _changed_rows(found: Comparison, uid: int | None) -> list[list[str]]:
    rows = [
        [
            row["sample"],
            row["raw_uid"][:uid],
            row["exposure"] + 1,  # as `export --exposure` counts
            row["d_rms"],
            f"{row['d_largest']:.3g} at {row['d_largest_q']:.3g}/nm",
            f"{row['chi2_a']:.3g} to {row['chi2_b']:.3g}",
            row["flags_a"] if row["flags_a"] == row["flags_b"] else f"{row['flags_a']} to {row['flags_b']}",
            f"{datetime.fromtimestamp(row['time']):%Y-%m-%d %H:%M}",
        ]
        for row in found.most_changed(LISTED).to_dict("records")
    ]
    headings = ["sample", "run", "exposure", "rms d", "largest |d|", "chi2", "flags", "began"]
    shown = slice(None) if uid is None else slice(-2)  # a terminal is narrow
    return _listed(headings[shown], (row[shown] for row in rows))


def _table(title: str, rows: list[list[str]]) -> Table:
    headings, *body = rows
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for place, heading in enumerate(headings):
        numbers = all(_is_number(row[place]) for row in body)
        table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(word) for word in row))
    return table


def _word(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return _printable(str(value))


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.3g} %"


def _is_number(word: str) -> bool:
    return bool(word) and all(letter in "0123456789.+-e% " for letter in word)


def _printable(text: str) -> str:
    """Take the sting out of control characters: names come from whoever wrote the run."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _records(table: pd.DataFrame) -> dict[str, Any]:
    return {str(key): row for key, row in table.to_dict("index").items()}


def _plain(value: Any) -> Any:
    """Turn numpy's numbers into Python's, and what is not finite into None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What is kept of a comparison: a row for each exposure, sums by q, the curves of a few; pure."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky.data import Flag

from .measures import BANDS, QUANTITIES, Differences

__all__ = ["EDGES", "ByQ", "Changed", "Comparison", "Failure"]

PER_DECADE = 10
"""Parts into which a decade of q is cut for sums."""

EDGES = np.linspace(-5, 5, 41)
"""Of the histogram of d; what lies beyond is counted in the outermost parts."""

SHOWN = 6
"""Runs whose curves are kept, those that changed most."""

IDENTITY = ("sample", "raw_uid", "key_a", "key_b", "time", "exposure")


@dataclass(frozen=True)
class Failure:
    """A run, or one exposure of it, that one of both could not do.

    Attributes
    ----------
    raw_uid, sample, exposure, reason
        `exposure`, from 0, is None for a run as a whole.
    """

    raw_uid: str
    sample: str
    exposure: int | None
    reason: str

    @property
    def where(self) -> str:
        """The run, and the exposure, in words, which count from 1."""
        return f"run {self.raw_uid}" + ("" if self.exposure is None else f" exposure {self.exposure + 1}")


@dataclass(frozen=True)
class Changed:
    """The exposure of a run that changed most, with its curves.

    Attributes
    ----------
    row
        Of `Comparison.exposures`.
    curves
        Arrays of shape (n,): q, I_a, Idev_a, I_b, Idev_b, I_smeared, d.
    """

    row: Mapping[str, Any]
    curves: Mapping[str, NDArray]


class ByQ:
    """Sums of differences by q, ten parts for a decade: a few kilobytes, however many runs."""

    def __init__(self) -> None:
        self.histogram: dict[int, NDArray] = {}
        self.inside: dict[int, NDArray] = {}
        """Points that are inside, and points, for each of `measures.BANDS`: shape (4, 2)."""

    def add(self, q: NDArray, found: Differences) -> None:
        """Add the exposures of a run."""
        positive = q > 0
        parts = np.full(q.shape, -1000)
        parts[positive] = np.floor(PER_DECADE * np.log10(q[positive])).astype(int)
        for part in np.unique(parts[positive]).tolist():
            here = parts == part
            d = found.d[:, here]
            counts, _ = np.histogram(np.clip(d[np.isfinite(d)], EDGES[0], EDGES[-1]), EDGES)
            self.histogram[part] = self.histogram.get(part, 0) + counts
            points = np.array(
                [[np.nansum(v[:, here]), np.isfinite(v[:, here]).sum()] for v in (found.inside[name] for name in BANDS)]
            )
            self.inside[part] = self.inside.get(part, 0) + points

    def edges(self) -> NDArray:
        """Limits of the parts from the first to the last, in 1/nm."""
        if not self.histogram:
            return np.array([])
        return 10 ** (np.arange(min(self.histogram), max(self.histogram) + 2) / PER_DECADE)

    def density(self) -> NDArray:
        """Share of points in each part of d, shape (parts of q, parts of d); NaN where there is no point."""
        empty = np.zeros(EDGES.size - 1)
        rows = np.array([self.histogram.get(part, empty) for part in range(min(self.histogram), max(self.histogram) + 1)])
        with np.errstate(invalid="ignore"):
            return rows / rows.sum(axis=1, keepdims=True)

    def coverage(self) -> dict[str, NDArray]:
        """Share of points inside, for each of `measures.BANDS`, by part of q."""
        empty = np.zeros((len(BANDS), 2))
        rows = np.array([self.inside.get(part, empty) for part in range(min(self.inside), max(self.inside) + 1)])
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = rows[..., 0] / rows[..., 1]
        return dict(zip(BANDS, shares.T, strict=True))


@dataclass
class Comparison:
    """What the comparison of A and B found.

    Attributes
    ----------
    a, b
        What is compared, in words: ``dsnet:2.0.0``.
    runs
        Pairs of results that were compared.
    results_a, results_b
        Results that the catalog holds of each; of A, those that were asked for.
    unpaired
        Results of A without one of B.
    refused
        Pairs that cannot be compared, by the reason.
    new_failures, healed
        What A did and B could not, and what B did and A could not.
    both_failed
        Runs that failed with both.
    by_q, changed
        See there; `changed` is sorted, the largest change first.
    """

    a: str
    b: str
    runs: int = 0
    results_a: int = 0
    results_b: int = 0
    unpaired: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    new_failures: list[Failure] = field(default_factory=list)
    healed: list[Failure] = field(default_factory=list)
    both_failed: int = 0
    by_q: ByQ = field(default_factory=ByQ)
    _rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _parts: list[pd.DataFrame] = field(default_factory=list, repr=False)
    _heap: list[tuple[float, int, Changed]] = field(default_factory=list, repr=False)

    def add(self, said: Mapping[str, Any], rows: list[dict[str, Any]], a: xr.Dataset, b: xr.Dataset, found: Differences) -> None:
        """Add the exposures of a run.

        Parameters
        ----------
        said
            `IDENTITY` without `exposure`.
        rows, a, b, found
            See `measures.rows_of`.
        """
        self.runs += 1
        full = [{**said, **row} for row in rows]
        self._rows += full
        if len(self._rows) > 1000:
            self._pack()
        self.by_q.add(a["q"].values, found)
        place = int(np.argmax([np.nan_to_num(row["d_rms"], nan=-1.0) for row in full]))
        key = (float(np.nan_to_num(full[place]["d_rms"], nan=-1.0)), -self.runs)
        if len(self._heap) < SHOWN or key > self._heap[0][:2]:
            kept = Changed(full[place], _curves(a, b, found, place))
            (heapq.heappush if len(self._heap) < SHOWN else heapq.heapreplace)(self._heap, (*key, kept))

    @property
    def changed(self) -> list[Changed]:
        """The runs that changed most, with their curves."""
        return [kept for *_, kept in sorted(self._heap, key=lambda item: item[:2], reverse=True)]

    @property
    def exposures(self) -> pd.DataFrame:
        """A row for each exposure that both did: `IDENTITY` and what `measures.rows_of` says."""
        self._pack()
        return self._parts[0] if self._parts else _frame([])

    def column(self, name: str) -> NDArray:
        """Numbers of all exposures."""
        return np.asarray(self.exposures[name], dtype=float)

    def median(self, name: str) -> float:
        """Median over all exposures that have such a number; NaN if none has."""
        values = self.column(name)
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

    def mean(self, name: str) -> float:
        """Mean over all exposures that have such a number; NaN if none has."""
        values = self.column(name)
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def flagged(self, name: str, flag: Flag) -> int:
        """How many exposures have a flag; `name` is flags_a or flags_b."""
        return int((self.column(name).astype(int) & int(flag) > 0).sum())

    def most_changed(self, count: int) -> pd.DataFrame:
        """The rows of the runs that changed most, one for each run, the largest d_rms first."""
        rows = self.exposures.sort_values("d_rms", ascending=False, kind="stable")
        return rows.drop_duplicates("raw_uid").head(count)

    def _pack(self) -> None:
        """Keep rows as columns of numbers: a tenth of the memory."""
        if self._rows:
            self._parts = [pd.concat([*self._parts, _frame(self._rows)], ignore_index=True)]
            self._rows = []

    # -- what is reported --

    def quantiles(self) -> pd.DataFrame:
        """Quantiles over exposures of what can be summed up so; a row for each."""
        names = ["chi2_a", "chi2_b", "d_rms", "d_beyond_3", "by_a_rms", "relative_median", *BANDS]
        return self.exposures[names].quantile([0.05, 0.5, 0.95, 1.0]).T

    def samples(self) -> pd.DataFrame:
        """What changed, by sample: the largest change first."""
        failures = Counter(failure.sample for failure in self.new_failures)
        groups = self.exposures.groupby("sample", sort=False)
        table = pd.DataFrame(
            {
                "runs": groups["raw_uid"].nunique(),
                "exposures": groups.size(),
                "chi2_a": groups["chi2_a"].median(),
                "chi2_b": groups["chi2_b"].median(),
                "d_rms": groups["d_rms"].median(),
                "d_beyond_3": groups["d_beyond_3"].mean(),
            }
        )
        missing = [sample for sample in failures if sample not in table.index]
        table = table.reindex([*table.index, *missing])
        table[["runs", "exposures"]] = table[["runs", "exposures"]].fillna(0).astype(int)
        table["new_failures"] = [failures[sample] for sample in table.index]
        return table.sort_values("d_rms", ascending=False).rename_axis("sample")

    def flags(self) -> pd.DataFrame:
        """Exposures with each flag: of A, of B, that gained and that lost it."""
        a, b = (self.exposures[name].to_numpy(dtype=int) for name in ("flags_a", "flags_b"))
        rows = {}
        for flag in Flag:
            mine, theirs = (a & flag) > 0, (b & flag) > 0
            if mine.any() or theirs.any():
                counts = mine.sum(), theirs.sum(), (theirs & ~mine).sum(), (mine & ~theirs).sum()
                rows[flag.name] = [int(count) for count in counts]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["a", "b", "gained", "lost"]).rename_axis("flag")

    def answers(self) -> pd.DataFrame:
        """How often which part of a method answered, where that changed."""
        pairs = self.exposures[["answer_a", "answer_b"]].value_counts().reset_index(name="exposures")
        return pairs.loc[pairs["answer_a"] != pairs["answer_b"], :]

    def quantities(self) -> pd.DataFrame:
        """Changes of derived quantities: exposures that have them, median relative change, share beyond two errors."""
        rows = {}
        for name in QUANTITIES:
            part = self.exposures[[f"{name}_a", f"{name}_b", f"{name}_change"]].astype(float)
            a, b, change = part.to_numpy().T
            both = np.isfinite(a) & np.isfinite(b)
            relative = (b[both] - a[both]) / np.abs(a[both])
            known = change[np.isfinite(change)]
            rows[name] = [
                int(both.sum()),
                int((np.isfinite(a) & ~both).sum()),
                float(np.median(relative)) if both.any() else math.nan,
                float(np.percentile(np.abs(relative), 95)) if both.any() else math.nan,
                float(np.mean(np.abs(known) > 2)) if known.size else math.nan,
            ]
        columns = ["both", "lost", "relative_median", "relative_95", "beyond_2"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("quantity")


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    quantities = [f"{name}_{part}" for name in QUANTITIES for part in ("a", "a_error", "b", "b_error", "change")]
    names = [
        *IDENTITY,
        *("chi2_a", "chi2_b", "d_rms", "d_largest", "d_largest_q", "d_beyond_3", "by_a_rms", "relative_median"),
        *BANDS,
        *("flags_a", "flags_b", "answer_a", "answer_b"),
        *("peaks_a", "peaks_b", "peaks_matched", "peak_largest_shift"),
        *quantities,
    ]
    frame = pd.DataFrame(rows, columns=names)
    words = {"sample", "raw_uid", "key_a", "key_b", "answer_a", "answer_b"}
    kinds: dict[str, Any] = {name: "str" if name in words else float for name in names}
    return frame.astype(kinds | {"exposure": int, "flags_a": int, "flags_b": int})


def _curves(a: xr.Dataset, b: xr.Dataset, found: Differences, place: int) -> dict[str, NDArray]:
    one, other = a.isel(exposure=place), b.isel(exposure=place)
    curves = {"q": a["q"].values, "I_a": one["I"].values, "Idev_a": one["Idev"].values, "I_b": other["I"].values}
    curves |= {"Idev_b": other["Idev"].values, "I_smeared": one["I_smeared"].values, "d": found.d[place]}
    return {name: np.array(values) for name, values in curves.items()}

"""Units as files of this field write them, by pint."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pint

from dsnet_bluesky.data import BadInput

# A unit of q stands alone or in brackets, behind no number ("20 nm -1 wt%") and within no word ("AU_20nm-1.SA1").
_START = r"(?<![^\s(\[{_/<,;|:=\"'])(?<!\d[\s_])(?<!\d\s\s)"
_INVERSE = r"\s*(\^?\{?[-\u2212]1\b|\u207b\u00b9)"
PER_NM = re.compile(rf"(?<![A-Za-z0-9.])1/nm|{_START}nm{_INVERSE}", re.IGNORECASE)
PER_ANGSTROM = re.compile(
    r"(?<![A-Za-z0-9.])1/(\u00c5|\u212b|A\b|ang)"
    rf"|{_START}(\u00c5|\u212b|ang(stroms?)?|A(?!\s*[-\u2212])){_INVERSE}"
    # "Sample A-1" is none: these letters need a bracket, q or the start of the line.
    rf"|(^\W*|[(\[{{_/]\s*|\bq(\s+in)?\s*[,:=]?\s*)\bA{_INVERSE}",
    re.IGNORECASE | re.MULTILINE,
)


@lru_cache(maxsize=64)
def per_nm(units: str) -> float:
    """Return the factor from `units` to 1/nm.

    Raises
    ------
    BadInput
        If pint knows no such unit, or it is no inverse length.
    """
    try:
        return float(_registry().Quantity(1.0, _pint_words(units)).to("1/nm").magnitude)
    except Exception as error:
        # pint raises its own errors, tokenize's and AttributeError: all mean that this is no unit of q.
        raise BadInput(f"the unit of q, {units!r}, is not understood; use 1/nm or 1/angstrom (--q-units).") from error


@lru_cache(maxsize=1)
def _registry() -> Any:
    return pint.get_application_registry()


def _pint_words(units: str) -> str:
    """Write a unit as pint reads it: in this field A is the angstrom, not the ampere."""
    plain = re.sub(r"[{}]", "", units).replace("\u207b\u00b9", "^-1").replace("\u2212", "-")
    plain = re.sub(r"\u00c5|\u212b|\bAng\b|\bA\b", "angstrom", plain)
    return re.sub(r"(?<=[A-Za-z])-(?=\d)", "^-", plain)


def intensity_units(units: str | None) -> str:
    """Return a unit of I that pint parses; "1" where the file's word is none ("Counts", "a.u.")."""
    try:
        unit = _registry().Unit(_pint_words(units or "1"))
    except Exception:
        # As above, pint raises errors of many kinds.
        return "1"
    absolute = any(unit.is_compatible_with(known) for known in ("1/cm", "cm^2/g"))
    return f"{unit:~C}" if absolute else "1"


def units_in(text: str) -> str | None:
    """Find the unit of q in words; None if there is none.

    Raises
    ------
    BadInput
        If the words name both.
    """
    nm, angstrom = bool(PER_NM.search(text)), bool(PER_ANGSTROM.search(text))
    if nm and angstrom:
        raise BadInput("its header names both 1/nm and 1/angstrom; say which is the unit of q with --q-units.")
    return "1/nm" if nm else "1/angstrom" if angstrom else None

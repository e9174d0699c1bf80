"""Numbers of versions: what serves as one, and how they are ordered."""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

from dsnet_bluesky.data import BadInput

__all__ = ["SEMANTIC", "is_release", "version_order"]

_NUMBER = r"(?:0|[1-9]\d{0,2})"
SEMANTIC = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:(?:a|b|rc)(?:0|[1-9]\d?))?")
"""A version that the registry takes: ``2.1.0``, or ``2.1.0rc1`` before it. What `version_order` can tell apart."""


def is_release(version: str) -> bool:
    """Whether a version is more than a candidate."""
    return not Version(version).is_prerelease


def version_order(text: str) -> int:
    """Return a number that grows with the version, for servers that compare numbers only.

    Of a version X.Y.Z each part is below 1000; what comes before a release (``2.0.0rc1``) is smaller than the release.
    That of a release, and of nothing else, ends in 999.

    Raises
    ------
    BadInput
        If it is no version.
    """
    try:
        found = Version(text)
    except InvalidVersion as error:
        raise BadInput(f"{text!r} is no version; write it as 2.0.0.") from error
    major, minor, micro = (*found.release, 0, 0)[:3]
    stage, number = found.pre or (("a", 0) if found.is_devrelease else ("", 0))
    before = {"a": 0, "b": 300, "rc": 600, "": 999}[stage] + number
    return ((major * 1000 + minor) * 1000 + micro) * 1000 + before

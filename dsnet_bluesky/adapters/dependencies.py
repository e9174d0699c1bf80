"""What requests depend on, analysed once; importing this module tells FastAPI.

Where an app overrides a dependency, as Tiled's does, FastAPI 0.165 reads the signatures of all that a route depends on
for each request, and at each level again those of all that lies below: a third of the time of a small request. What it
finds follows from what it is asked, so it is remembered (docs/decisions/0015-what-requests-depend-on-is-remembered.md).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any

from fastapi.dependencies import utils
from fastapi.dependencies.models import Dependant

__all__ = ["get_dependant"]

MOST = 16_384
"""Dependencies of routes that are remembered; all routes of Tiled ask for some 2,500."""

_analyse: Callable[..., Dependant] = utils.get_dependant


@lru_cache(maxsize=MOST)
def _remembered(question: tuple[tuple[str, Any], ...]) -> Dependant:
    return _analyse(**{name: list(value) if isinstance(value, tuple) else value for name, value in question})


def get_dependant(**question: Any) -> Dependant:
    """Analyse what a call depends on, or remember it; see FastAPI's function of this name."""
    words = ((name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(question.items()))
    try:
        found = copy(_remembered(tuple(words)))
    except TypeError:  # a callable that cannot be hashed
        return _analyse(**question)
    found.dependencies = list(found.dependencies)  # routes add to theirs
    return found


utils.get_dependant = get_dependant  # type: ignore[assignment]

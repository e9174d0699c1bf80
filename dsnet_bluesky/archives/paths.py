"""Finding values in a run's documents by their paths, and saying what is there where one is not found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["Found", "NotFound", "RunDocuments", "fits", "in_start"]

NEAR = 5
"""Names that a message lists."""


class NotFound(LookupError):
    """A path leads nowhere; the message says from where, and what is there."""


@dataclass(frozen=True)
class Found:
    """Values that a path leads to, and their unit as the documents say."""

    values: list[Any]
    unit: str | None = None


class RunDocuments:
    """The documents of one run, by stream.

    Parameters
    ----------
    documents
        Of today's kind, in their order.
    """

    def __init__(self, documents: Iterable[tuple[str, Mapping[str, Any]]]):
        self.start: Mapping[str, Any] = {}
        self.descriptors: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self._events: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for name, doc in documents:
            if name == "start":
                self.start = doc
            elif name == "descriptor":
                self.descriptors[doc["name"]].append(doc)
            elif name == "event":
                self._events[doc["descriptor"]].append(doc)

    def find(self, path: str, descriptor: Mapping[str, Any]) -> Found:
        """Return what a path leads to, as it counts for the frames of a descriptor.

        Raises
        ------
        NotFound
            If it leads nowhere.
        """
        first, _, rest = path.partition(".")
        if first == "start":
            return Found([in_start(self.start, path)])
        if first == "configuration":
            return self._configured(rest, path, descriptor)
        return self._recorded(first, rest, path, descriptor)

    def _configured(self, key: str, path: str, descriptor: Mapping[str, Any]) -> Found:
        devices = list((descriptor.get("configuration") or {}).values())
        for device in devices:
            if key in device.get("data", {}):
                return Found([device["data"][key]], (device.get("data_keys") or {}).get(key, {}).get("units"))
        known = [name for device in devices for name in device.get("data", {})]
        raise NotFound(_nowhere(path, key, known, f"the configuration of the stream {descriptor['name']}"))

    def _recorded(self, stream: str, key: str, path: str, descriptor: Mapping[str, Any]) -> Found:
        if stream not in self.descriptors:
            known = ["start", "configuration", *self.descriptors]
            raise NotFound(_nowhere(path, stream, known, "the run"))
        # Of the frames' own stream only the events of that descriptor; a baseline is read before and after: its first reading.
        mine = [descriptor] if descriptor["name"] == stream else self.descriptors[stream]
        events = [event for one in mine for event in self._events[one["uid"]]]
        events = events[:1] if stream == "baseline" else events
        values = [event["data"][key] for event in events if key in event["data"]]
        if not values:
            raise NotFound(_nowhere(path, key, mine[0]["data_keys"], f"the stream {stream}"))
        return Found(values, mine[0]["data_keys"].get(key, {}).get("units"))


def in_start(start: Mapping[str, Any], path: str) -> Any:
    """Return what a path that begins with ``start.`` leads to.

    Raises
    ------
    NotFound
        If it leads nowhere.
    """
    place: Any = start
    _, *words = path.split(".")
    for number, word in enumerate(words):
        rest = ".".join(words[number:])
        if isinstance(place, Mapping) and rest in place:
            return place[rest]  # a key that has dots
        if isinstance(place, Mapping) and word in place:
            place = place[word]
        elif isinstance(place, Sequence) and not isinstance(place, str) and word.isdecimal() and int(word) < len(place):
            place = place[int(word)]
        else:
            known = (
                list(place)
                if isinstance(place, Mapping)
                else [str(k) for k in range(len(place))]
                if isinstance(place, list)
                else []
            )
            raise NotFound(_nowhere(path, word, known, ".".join(["start", *words[:number]])))
    return place


def fits(start: Mapping[str, Any], rule: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a start document fulfils every condition of a rule; texts may have the wildcards ``*`` and ``?``."""
    return all(_is_one_of(start, path, words) for path, words in rule.items())


def _is_one_of(start: Mapping[str, Any], path: str, words: Sequence[Any]) -> bool:
    try:
        value = in_start(start, path)
    except NotFound:
        return False
    return any(_is(value, word) for word in words)


def _is(value: Any, word: Any) -> bool:
    if isinstance(value, str) and isinstance(word, str):
        return fnmatchcase(value, word)
    return isinstance(value, bool) == isinstance(word, bool) and value == word


def _nowhere(path: str, word: str, known: Iterable[str], where: str) -> str:
    names = sorted(map(str, known))
    near = get_close_matches(word, names, n=NEAR, cutoff=0.5)
    shown = near or names[:NEAR]
    more = f" and {len(names) - len(shown)} more" if not near and len(names) > len(shown) else ""
    there = f"near it are: {', '.join(near)}" if near else f"there are: {', '.join(shown)}{more}" if shown else "it is empty"
    return f"{path!r} is not there: {where} has no {word!r}; {there}"

"""Sessions to learn from: made by several processes, kept in the directory of a training, handed out as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.library.examples import Session, draw_instrument_of, load_session, measure, save_session, session
from dsnet_bluesky.library.samples import Library, load_library, make_library, save_library

from .recipes import Recipe
from .uncertainty import Repeats, measure_repeats

__all__ = ["LIBRARY", "Sessions", "check_origin", "make_repeats", "make_sessions", "making", "prepare"]

LIBRARY = "library.npz"

SESSIONS = "sessions"

ORIGIN = "origin.json"
"""What the library and the sessions of a directory depend on."""

REPEATED_CURVES = 16
"""Curves of each session of repeats."""


class Sessions(Sequence[Session]):
    """Sessions of a set, some of which are still being made: whoever asks for one waits for it.

    Parameters
    ----------
    paths
        Where they are, or will be.
    loader
        One thread, which reads them in their order as they are made.
    device
        Where they go.
    """

    def __init__(self, paths: Sequence[Future[Path]], loader: ThreadPoolExecutor, device: str) -> None:
        self._sessions = [loader.submit(lambda path=path: load_session(path.result(), device)) for path in paths]

    def __len__(self) -> int:
        """How many there will be."""
        return len(self._sessions)

    def __getitem__(self, number: Any) -> Any:
        """Return a session, or a list of several."""
        if isinstance(number, slice):
            return [session.result() for session in self._sessions[number]]
        return self._sessions[number].result()


@contextmanager
def making(
    directory: Path, recipe: Recipe, split: str, count: int, curves: int, notify: Callable[[int, int], None] | None = None
) -> Iterator[list[Future[Path]]]:
    """Make the sessions of a set that are not there yet, in other processes, as long as the context lasts.

    Parameters
    ----------
    directory
        Of the training; it must hold the library.
    recipe
        Gives the seed and the range of points.
    split
        training, validation or test.
    count, curves
        How many sessions, with how many curves each.
    notify
        Called with the number made and the number wanted.
    """
    folder = directory / SESSIONS / split
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.safetensors" for number in range(count)]
    there = [path.exists() for path in paths]
    done = sum(there)

    def tell(_: Future[Path]) -> None:
        nonlocal done
        done += 1
        if notify is not None:
            notify(done, count)

    context = multiprocessing.get_context("spawn")
    library = (str(directory / LIBRARY), split)
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1), context, _start_worker, library) as pool:
        made: list[Future[Path]] = []
        try:
            for number, path in enumerate(paths):
                made.append(_done(path) if there[number] else pool.submit(_make_session, path, split, recipe, number, curves))
                if not there[number]:
                    made[-1].add_done_callback(tell)
            yield made
        finally:
            for future in made:
                future.cancel()


def _done(path: Path) -> Future[Path]:
    """Give what a process would that has made it."""
    future: Future[Path] = Future()
    future.set_result(path)
    return future


def make_sessions(
    directory: Path, recipe: Recipe, split: str, count: int, curves: int, notify: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Make the sessions of a set that are not there yet, and wait for them; see `making`."""
    with making(directory, recipe, split, count, curves, notify) as made:
        return [path.result() for path in made]


_LIBRARY: Library | None = None


def _start_worker(path: str, split: str) -> None:
    global _LIBRARY
    torch.set_num_threads(1)
    _LIBRARY = load_library(Path(path), split)


def _make_session(path: Path, split: str, recipe: Recipe, number: int, curves: int) -> Path:
    assert _LIBRARY is not None
    place = [recipe.seed, ("training", "validation", "test").index(split), number]
    instrument = draw_instrument_of(place, recipe.data.points)
    measured = measure(np.random.default_rng([*place, 1]), instrument, _LIBRARY, curves)
    save_session(path, session(measured))
    return path


@contextmanager
def prepare(
    recipe: Recipe, directory: Path, device: str = "cpu", notify: Any = None
) -> Iterator[tuple[Sessions, Sequence[Session]]]:
    """Make, or find, the library and the sessions of a recipe; those for training arrive as long as the context lasts.

    Raises
    ------
    BadInput
        If those that are there were made by a recipe with other data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    check_origin(directory, recipe)
    if not (directory / LIBRARY).exists():
        save_library(directory / LIBRARY, make_library(recipe.seed, ("training", "validation")))
    data = recipe.data
    validation = make_sessions(directory, recipe, "validation", data.validation_sessions, data.validation_curves, notify)
    with ExitStack() as stack:
        made = stack.enter_context(making(directory, recipe, "training", data.sessions, data.curves, notify))
        loader = ThreadPoolExecutor(1)
        stack.callback(loader.shutdown, cancel_futures=True)
        yield Sessions(made, loader, device), [load_session(path, device) for path in validation]


def check_origin(directory: Path, recipe: Recipe) -> None:
    """Note what the data of a directory depend on, or see that they belong to the recipe.

    Raises
    ------
    BadInput
        If they do not.
    """
    path = directory / ORIGIN
    if not path.exists():
        path.write_text(json.dumps(recipe.origin), encoding="utf-8")
    elif (noted := json.loads(path.read_text(encoding="utf-8"))) != recipe.origin:
        changes = ", ".join(
            f"{name} {noted[name]} there, {value} here" for name, value in recipe.origin.items() if value != noted[name]
        )
        raise BadInput(
            f"{directory} holds curves of another recipe ({changes}); give another directory, or delete {LIBRARY}, {SESSIONS} "
            f"and {ORIGIN} there."
        )


def make_repeats(directory: Path, recipe: Recipe) -> list[Repeats]:
    """Measure samples of the training families repeatedly, in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _start_worker, (str(directory / LIBRARY), "training")) as pool:
        jobs = [pool.submit(_repeat, recipe.seed, number, recipe.data.points) for number in range(recipe.data.repeats)]
        return [job.result() for job in jobs]


def _repeat(seed: int, number: int, points: tuple[int, int]) -> Repeats:
    assert _LIBRARY is not None
    return measure_repeats([seed, 3, number], _LIBRARY, REPEATED_CURVES, points)

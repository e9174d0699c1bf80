"""Libraries compute with one thread where threads would only wait for each other, and get back what they had."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - its library counts
from threadpoolctl import threadpool_info, threadpool_limits

from dsnet_bluesky.data import curve
from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.threads import one_blas_thread

Q = np.linspace(0.05, 2.0, 60)


def numbers() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two() -> Iterator[None]:
    with threadpool_limits(2, user_api="blas"):
        yield


def test_it_can_be_entered_again():
    with one_blas_thread:
        with one_blas_thread:
            assert numbers() == {1}
        assert numbers() == {1}, "whoever is still inside keeps it"
    assert numbers() == {2}


def test_several_at_the_same_time():
    together, left = Barrier(3, timeout=60), Barrier(3, timeout=60)

    def work(stays: bool) -> set[int]:
        with one_blas_thread:
            together.wait()
            if stays:
                left.wait()
                return numbers()
        left.wait()
        return {1}

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, [False, True, True])) == [{1}] * 3, "one that leaves takes it from nobody"
    assert numbers() == {2}


def test_what_fails_restores_it_too():
    with pytest.raises(ZeroDivisionError), one_blas_thread:
        raise ZeroDivisionError
    assert numbers() == {2}


@pytest.mark.parametrize("method", ["lake", "map", "ift", "dsnet"])
def test_every_method_computes_with_one(method):
    prepared, seen = prepare(Smearing.gaussian(Q, 0.05), method), []
    solver = prepared._solver
    prepared._solver = lambda I, Idev: (seen.append(numbers()), solver(I, Idev))[1]
    prepared(curve(Q, np.exp(-Q), 0.01 * np.exp(-Q)))
    assert (seen, numbers()) == ([{1}], {2})

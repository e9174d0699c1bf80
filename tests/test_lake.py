"""Lake's iteration."""

from __future__ import annotations

import numpy as np
import pytest

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.smearing import Smearing

Q = 0.01 * np.arange(1, 502)
FINE = 0.0005 * (np.arange(20 * 545) + 0.5)
SIGMA = 0.04


def sphere(q, R=3.0):
    x = q * R
    return 282.7433 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 1e-3


@pytest.fixture(scope="module")
def ideal(exact):
    """The paper's sphere, smeared on a grid 20 times finer and wider than the one that desmears it."""
    return exact.apply(sphere(FINE))


def error(result) -> float:
    return float(np.mean((np.log(result["I"].values) - np.log(sphere(Q))) ** 2))


def noisy(ideal, n, seed=0):
    I = ideal * (1 + n * np.random.default_rng(seed).uniform(-1, 1, Q.size))
    return curve(Q, I, I * n / np.sqrt(3))


def iterations(result) -> list[int]:
    return np.atleast_1d(result["iterations"]).tolist()


def test_sphere(ideal, smearing):
    assert error(desmear(curve(Q, ideal), smearing, "lake")) < 0.06
    assert error(desmear(noisy(ideal, 0.05), smearing, "lake")) < 0.06


def test_the_published_iteration(ideal, smearing):
    """With a fixed number of steps it is Lake's formula and nothing else."""
    result = desmear(noisy(ideal, 0.02), smearing, "lake", iterations=2, extrapolation="constant")
    assert iterations(result) == [2]
    I = M = noisy(ideal, 0.02)["I"].values
    inside = np.searchsorted(smearing.q_calc, Q)
    for _ in range(2):
        full = np.interp(smearing.q_calc, Q, I)
        full[smearing.q_calc > Q[-1]] = np.average(I[-50:], weights=(I / M * M)[-50:] ** -2.0)
        full[0] = full[inside[0]]
        I = I * M / (smearing.matrix @ full)
    np.testing.assert_allclose(result["I"].values[5:-30], I[5:-30], rtol=1e-4)


def test_stops_where_chi2_reaches_one(ideal, smearing):
    result = desmear(noisy(ideal, 0.05), smearing, "lake", smoothing=1)
    assert 0.8 < float(result["chi2"]) <= 1
    assert 1 < iterations(result)[0] < 20


def test_each_exposure_stops_by_itself(ideal, smearing):
    batch = curve(
        Q, np.stack([noisy(ideal, n)["I"] for n in (0.02, 0.1)]), np.stack([noisy(ideal, n)["Idev"] for n in (0.02, 0.1)])
    )
    first, second = iterations(desmear(batch, smearing, "lake", smoothing=1))
    assert first > second


def test_limit_is_flagged(ideal, smearing):
    result = desmear(noisy(ideal, 0.01), smearing, "lake", maximum_iterations=2, smoothing=1)
    assert iterations(result) == [2]
    assert int(result["flags"]) & int(Flag.NOT_CONVERGED)


def test_smoothing_holds_the_noise_down(ideal, smearing):
    measured = noisy(ideal, 0.05)
    rough, smooth = (desmear(measured, smearing, "lake", smoothing=s, maximum_iterations=6) for s in (1, 5))
    assert error(smooth) < error(rough)
    assert float(smooth["Idev"].median()) < float(rough["Idev"].median())


def test_error_bars_are_those_of_repeated_measurements(smearing):
    """Idev against the scatter over 60 exposures of one curve, in the smooth part and in the minima."""
    truth = Smearing.gaussian(Q, SIGMA, q_calc=FINE).apply(sphere(FINE))
    rng = np.random.default_rng(1)
    I = truth * (1 + 0.02 * rng.standard_normal((60, Q.size)))
    result = desmear(curve(Q, I, np.broadcast_to(0.02 * truth, I.shape)), smearing, "lake", iterations=3)
    ratio = result["Idev"].mean("exposure") / result["I"].std("exposure")
    assert 0.9 < float(ratio.median()) < 1.1
    assert float(ratio.quantile(0.02)) > 0.5


def test_refuses_what_is_not_positive(ideal, smearing):
    measured = noisy(ideal, 0.02)
    measured["I"][17] = 0.0
    with pytest.raises(BadInput, match=r"1 are not \(first at q = 0.18 1/nm\). Use method='map'"):
        desmear(measured, smearing, "lake")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 4}, "odd"),
        ({"iterations": 0}, "at least 1"),
        ({"extrapolation": "cubic"}, "choose one of constant"),
        ({"extrapolation_start": 9.0}, "fewer than 2 points"),
    ],
)
def test_bad_options(smearing, options, message):
    with pytest.raises(BadInput, match=message):
        prepare(smearing, "lake", **options)

"""Noise: the variance and the correlation it claims, and the errors it states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.library.measurements import Noise, draw_noise

Q = np.linspace(0.05, 5.0, 120)
CURVE = 100 * np.exp(-(Q**2)) + 1e-3


def draws(noise: Noise, count: int = 3000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([noise.measure(rng, CURVE).I for _ in range(count)]) - CURVE


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_variance_and_correlation_are_as_stated(uniform, correlation):
    sigma = 0.02 * CURVE + 1e-3
    z = draws(Noise(sigma, uniform, correlation, 1.0)) / sigma
    assert abs(z.mean()) < 0.01
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.06)
    a, norm = correlation, 1 + 2 * correlation**2
    for lag, expected in enumerate([1, 2 * a / norm, a**2 / norm, 0]):
        found = np.mean(z[:, : Q.size - lag] * z[:, lag:])
        assert found == pytest.approx(expected, abs=0.01)


def test_uniform_noise_is_that_of_the_paper():
    """I (1 + n p), p uniform in [-1, 1]: nothing beyond n, and n / sqrt(3) for a standard deviation."""
    z = draws(Noise(0.05 / np.sqrt(3) * CURVE, True, 0.0, 1.0)) / CURVE
    assert np.abs(z).max() <= 0.05 * (1 + 1e-9)
    assert np.abs(z).max() > 0.0499


@pytest.mark.parametrize("stated", [0.6, 1.0, 1.3])
def test_errors_are_stated_by_a_factor(stated):
    sigma = 0.02 * CURVE
    _, Idev = Noise(sigma, False, 0.0, stated).measure(np.random.default_rng(0), CURVE)
    np.testing.assert_allclose(Idev, stated * sigma)


def test_errors_that_are_not_stated_are_estimated_from_the_scatter():
    rng = np.random.default_rng(0)
    noise = Noise(0.03 * CURVE, False, 0.0, None)
    ratio = [np.median(noise.measure(rng, CURVE).Idev / noise.sigma) for _ in range(30)]
    assert np.median(ratio) == pytest.approx(1, rel=0.25)


def test_without_noise_a_floor_is_stated():
    I, Idev = Noise(1e-12 * CURVE, False, 0.0, 1.0).measure(np.random.default_rng(0), CURVE)
    np.testing.assert_allclose(I, CURVE, rtol=1e-10)
    np.testing.assert_allclose(Idev, 1e-4 * CURVE)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decades=st.floats(-9, 9))
def test_whatever_is_drawn_can_be_measured(seed, decades):
    rng = np.random.default_rng(seed)
    curve = 10**decades * CURVE
    noise = draw_noise(rng, Q, curve)
    assert noise.sigma.shape == Q.shape
    assert (noise.sigma > 0).all()
    assert 0 <= noise.correlation <= 0.6
    assert noise.stated is None or 0.3 < noise.stated < 2.5
    I, Idev = noise.measure(rng, curve)
    assert np.isfinite(I).all()
    assert np.isfinite(Idev).all()
    assert (Idev > 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), level=st.floats(1e-3, 0.1))
def test_level_is_that_of_the_median_point(seed, level):
    found = np.median(draw_noise(np.random.default_rng(seed), Q, CURVE, level).sigma / CURVE)
    assert level * 0.99 <= found <= np.hypot(level, 0.0101)  # a systematic part of up to a hundredth is its own


def test_counting_noise_is_larger_where_less_is_counted():
    rng = np.random.default_rng(3)
    relative = [draw_noise(rng, Q, CURVE, 0.05).sigma / CURVE for _ in range(60)]
    counted = [r for r in relative if np.ptp(r) > 1e-9]
    assert 15 < len(counted) < 55
    assert np.mean([r[Q > 3.5].mean() > 3 * r[Q < 1].mean() for r in counted]) > 0.9


def test_all_sorts_come():
    rng = np.random.default_rng(0)
    noises = [draw_noise(rng, Q, CURVE) for _ in range(300)]
    levels = np.array([np.median(noise.sigma / CURVE) for noise in noises])
    assert 0.04 < np.mean(levels < 1e-9) < 0.2
    assert np.mean(levels > 0.05) > 0.1
    assert 0.25 < np.mean([noise.stated is None for noise in noises]) < 0.45
    assert 0.1 < np.mean([noise.correlation > 0 for noise in noises]) < 0.3
    assert 0.1 < np.mean([noise.uniform for noise in noises]) < 0.35


def test_seeds_reproduce():
    one, again, other = (
        draw_noise(rng, Q, CURVE).measure(rng, CURVE).I for rng in map(np.random.default_rng, (1, 1, 2))
    )  # fmt: skip
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, rtol=1e-9)

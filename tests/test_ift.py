"""The indirect transform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.desmearing.ift import sine_series
from dsnet_bluesky.smearing import Smearing

Q = 0.01 * np.arange(1, 502)
FINE = 0.0005 * (np.arange(20 * 545) + 0.5)


def sphere(q, R=3.0, background=1e-3):
    x = q * R
    return 282.7433 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


@pytest.fixture(scope="module")
def prepared(smearing):
    return prepare(smearing, "ift")


def error(result, truth) -> float:
    return float(np.mean((np.log(result["I"].values) - np.log(truth)) ** 2))


def noisy(ideal, n, seed=0):
    I = ideal * (1 + n * np.random.default_rng(seed).uniform(-1, 1, Q.size))
    return curve(Q, I, I * n / np.sqrt(3))


def diameter(result) -> float:
    return float(result["diameter"])


def test_sphere(exact, prepared):
    ideal = exact.apply(sphere(FINE))
    assert error(prepared(curve(Q, ideal)), sphere(Q)) < 1e-5
    for seed in range(3):
        result = prepared(noisy(ideal, 0.05, seed))
        assert error(result, sphere(Q)) < 0.01
        assert 0.7 < float(result["chi2"]) < 1.3


@settings(max_examples=6, deadline=None)
@given(R=st.floats(1.0, 9.0), seed=st.integers(0, 2**31))
def test_finds_the_diameter(R, seed):
    q = np.linspace(0.05, 5, 200)
    exact = Smearing.gaussian(q, 0.03, q_calc=np.linspace(5e-4, 5.4, 8000))
    ideal = exact.apply(sphere(exact.q_calc, R, 0.05))
    measured = ideal * (1 + 0.01 * np.random.default_rng(seed).standard_normal(q.size))
    result = desmear(curve(q, measured, 0.01 * ideal), Smearing.gaussian(q, 0.03), "ift")
    assert diameter(result) == pytest.approx(2 * R, rel=0.15)
    assert float(result["chi2"]) < 1.4


def test_background_is_found(exact, prepared):
    for background in (0.0, 0.5, 50.0):
        ideal = exact.apply(sphere(FINE, 3.0, background))
        result = prepared(noisy(ideal + 1e-6, 0.02))
        high = result["I"].values[Q > 4.5]
        assert np.median(high) == pytest.approx(np.median(sphere(Q[Q > 4.5], 3.0, background)), rel=0.05, abs=1e-3)


def test_slit(exact):
    """A Kratky slit 30 times longer than the width of a minimum."""
    q = np.linspace(0.05, 3.0, 150)
    slit = Smearing.slit(q, 2.0, q_calc=np.linspace(0.0005, 3.7, 12000))
    ideal = slit.apply(sphere(slit.q_calc))
    result = desmear(curve(q, ideal, 0.01 * ideal), Smearing.slit(q, 2.0), "ift")
    inner = q < 2.6
    assert np.median(np.abs(np.log(result["I"].values / sphere(q)))[inner]) < 0.01


def test_coverage(exact, prepared):
    ideal = exact.apply(sphere(FINE, 3.0, 0.1))
    rng = np.random.default_rng(0)
    sigma = np.tile(0.03 * ideal, (16, 1))
    result = prepared(curve(Q, ideal + sigma * rng.standard_normal(sigma.shape), sigma))
    pull = np.abs(result["I"].values - sphere(Q, 3.0, 0.1)) / result["Idev"].values
    assert 0.55 < np.mean(pull < 1) < 0.85
    assert 0.88 < np.mean(pull < 2) < 0.99


def test_a_lattice_is_flagged():
    """Sharp Bragg peaks have no largest dimension, and a narrow beam shows it."""
    peaks = sum(np.exp(-0.5 * ((FINE - k * 1.076) / 0.003) ** 2) for k in range(1, 5))
    ideal = Smearing.gaussian(Q, 0.01, q_calc=FINE).apply(1 + 100 * peaks)
    result = desmear(noisy(ideal, 0.01), Smearing.gaussian(Q, 0.01), "ift")
    assert int(result["flags"]) & int(Flag.POOR_FIT)


def test_qdev_is_not_known(exact, prepared):
    assert np.isnan(prepared(noisy(exact.apply(sphere(FINE)), 0.02))["Qdev"]).all()


def test_fixed_diameter(exact, smearing):
    result = desmear(noisy(exact.apply(sphere(FINE)), 0.02), smearing, "ift", diameter=7.0)
    assert diameter(result) == 7.0
    assert float(result["chi2"]) < 1.2


def test_bad_options(smearing):
    with pytest.raises(BadInput, match=r"cannot be seen between q = 0.01 and 5.01 1/nm"):
        prepare(smearing, "ift", diameter=0.5)
    with pytest.raises(BadInput, match="maximum_terms >= 3"):
        prepare(smearing, "ift", maximum_terms=2)


def test_series_interpolates_its_own_samples():
    """B_k is 1 / q_k at q_k and 0 at the other samples, and finite at q = 0."""
    D, terms = 6.0, 12
    samples = np.arange(1, terms + 1) * np.pi / D
    np.testing.assert_allclose(sine_series(samples, D, terms) * samples, np.eye(terms), atol=1e-12)
    near, at = sine_series(np.array([1e-3, 0.0]), D, terms)
    np.testing.assert_allclose(near, at, rtol=1e-3)


def test_series_holds_a_sphere():
    D = 6.5
    terms = 200
    samples = np.arange(1, terms + 1) * np.pi / D
    rebuilt = sine_series(Q, D, terms) @ (samples * sphere(samples, 3.0, 0.0))
    np.testing.assert_allclose(rebuilt, sphere(Q, 3.0, 0.0), atol=1e-6)

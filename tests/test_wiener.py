"""Wiener's filter."""

from __future__ import annotations

import numpy as np
import pytest

from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.desmearing.wiener import _filtered, _mean_kernel, _mirrored
from dsnet_bluesky.smearing import Smearing

Q = 0.01 * np.arange(1, 502)
FINE = 0.0005 * (np.arange(20 * 545) + 0.5)


def test_ripples_come_back(exact, smearing):
    """Fringes of period 0.25 1/nm, damped by the beam to 0.6 of their height."""
    truth = lambda q: 10 + 3 * np.sin(2 * np.pi * q / 0.25)  # noqa: E731
    ideal = exact.apply(truth(FINE))
    rng = np.random.default_rng(0)
    result = desmear(curve(Q, ideal + 0.1 * rng.standard_normal(Q.size), np.full(Q.size, 0.1)), smearing, "wiener")
    inner = (Q > 0.3) & (Q < 4.7)
    height = np.ptp(ideal[inner]), np.ptp(result["I"].values[inner]), 6.0
    assert height[0] < 0.65 * height[2]
    assert height[1] == pytest.approx(height[2], rel=0.12)


def test_sphere(exact, smearing):
    sphere = lambda q: 282.7433 * (3 * (np.sin(3 * q) - 3 * q * np.cos(3 * q)) / (3 * q) ** 3) ** 2 + 1e-3  # noqa: E731
    ideal = exact.apply(sphere(FINE))
    for n in (0.0, 0.05):
        I = ideal * (1 + n * np.random.default_rng(0).uniform(-1, 1, Q.size))
        result = desmear(curve(Q, I, I * n / np.sqrt(3) if n else None), smearing, "wiener")
        assert np.mean((np.log(result["I"]) - np.log(sphere(Q))) ** 2) < 0.0928


def test_error_bars_are_those_of_repeated_measurements(exact, smearing):
    ideal = exact.apply(10 + 3 * np.sin(2 * np.pi * FINE / 0.25))
    rng = np.random.default_rng(1)
    I = ideal + 0.1 * rng.standard_normal((80, Q.size))
    result = desmear(curve(Q, I, np.full(I.shape, 0.1)), smearing, "wiener")
    ratio = result["Idev"].mean("exposure") / result["I"].std("exposure")
    assert 0.75 < float(ratio.median()) < 1.15


def test_one_width_for_all_q(exact, smearing):
    ideal = exact.apply(10 + 3 * np.sin(2 * np.pi * FINE / 0.25))
    result = desmear(curve(Q, ideal, np.full(Q.size, 0.1)), smearing, "wiener")
    assert np.ptp(result["Qdev"].values) < 1e-9
    assert 0.01 < float(result["Qdev"][0]) < 0.1


def test_refuses_a_grid_that_is_not_uniform():
    q = np.geomspace(0.01, 1, 100)
    with pytest.raises(BadInput, match=r"needs a uniform q grid; the steps go from 0.00047.* Use method='map'"):
        prepare(Smearing.slit(q, 0.1), "wiener")


def test_bad_options(smearing):
    with pytest.raises(BadInput, match="spectrum_smoothing is 0"):
        prepare(smearing, "wiener", spectrum_smoothing=0)


def test_mean_kernel_is_that_of_the_operator(smearing):
    kernel = _mean_kernel(smearing, 0.01)
    assert kernel.sum() == pytest.approx(1)
    middle = smearing.matrix[250, np.searchsorted(smearing.q_calc, Q[250]) + np.arange(-15, 16)]
    np.testing.assert_allclose(np.roll(kernel, 15)[:31], middle, atol=2e-3)


def test_filter_of_the_kernel_smears(smearing):
    curve_at_q = 10 + np.sin(3 * Q)
    smeared = _filtered(curve_at_q, np.fft.rfft(_mean_kernel(smearing, 0.01)))
    exact = smearing.apply(10 + np.sin(3 * smearing.q_calc))
    np.testing.assert_allclose(smeared[40:-40], exact[40:-40], rtol=5e-4)
    assert _mirrored(np.arange(4)).tolist() == [0, 1, 2, 3, 2, 1]

"""Maximum a posteriori desmearing."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.optimize import curve_fit

from dsnet_bluesky import desmearing
from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.desmearing.kernels import thinned
from dsnet_bluesky.desmearing.map import MAP, _Bending, _Cholesky, _coordinate, _NormalMatrix, _Problem
from dsnet_bluesky.smearing import Smearing

desmear = partial(desmearing.desmear, method="map")


Q = 0.01 * np.arange(1, 502)
FINE = 0.0005 * (np.arange(20 * 545) + 0.5)
FINE_AND_WIDE = np.linspace(1e-3, 6.6, 5000)
SIGMA = 0.04


def sphere(q, R=3.0):
    x = q * R
    return 282.7433 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 1e-3


@pytest.fixture(scope="module")
def cubic():
    """SasView's default cubic paracrystal on FINE.

    It is computed every 0.0025 1/nm and splined; below the first measured point, where the
    model runs to infinity, it is held constant.
    """
    from sasmodels.core import load_model
    from sasmodels.data import empty_data1D
    from sasmodels.direct_model import DirectModel

    q = 0.0025 * np.arange(4, 2200)
    model = DirectModel(empty_data1D(q / 10, resolution=0.0), load_model("sc_paracrystal", dtype="double", platform="dll"))
    spline = CubicSpline(q, np.log(model(background=1e-3)))
    return lambda x: np.exp(spline(np.clip(x, Q[0], q[-1])))


def error(result, truth) -> float:
    return float(np.mean((np.log(result["I"].values) - np.log(truth)) ** 2))


def noisy(ideal, n, seed=0):
    I = ideal * (1 + n * np.random.default_rng(seed).uniform(-1, 1, Q.size))
    return curve(Q, I, I * n / np.sqrt(3))


def test_sphere(exact, smearing):
    ideal = exact.apply(sphere(FINE))
    assert error(desmear(curve(Q, ideal), smearing), sphere(Q)) < 0.035
    assert error(desmear(noisy(ideal, 0.05), smearing), sphere(Q)) < 0.06


def test_cubic_lattice(exact, smearing, cubic):
    ideal = exact.apply(cubic(FINE))
    before = np.mean((np.log(ideal) - np.log(cubic(Q))) ** 2)
    for measured in (curve(Q, ideal), noisy(ideal, 0.05)):
        result = desmear(measured, smearing)
        assert error(result, cubic(Q)) < min(0.05, before / 3)
        assert float(result["chi2"]) < 1.2


def test_peak_narrower_than_the_beam(exact, smearing):
    """A Bragg peak of width 0.02 under a beam of 0.04: its place, its width and Qdev fit together."""
    truth = 1 + 20 * np.exp(-0.5 * ((FINE - 2.0) / 0.02) ** 2)
    ideal = exact.apply(truth)
    result = desmear(noisy(ideal, 0.02), smearing)
    near = np.abs(Q - 2.0) < 0.2
    gauss = lambda q, a, c, s, b: b + a * np.exp(-0.5 * ((q - c) / s) ** 2)  # noqa: E731
    (_, centre, width, _), _ = curve_fit(gauss, Q[near], result["I"].values[near], [10, 2, 0.03, 1])
    assert centre == pytest.approx(2.0, abs=0.001)
    assert abs(width) < 0.6 * np.hypot(0.02, SIGMA)
    assert abs(width) == pytest.approx(np.hypot(0.02, float(result["Qdev"].sel(q=2.0, method="nearest"))), rel=0.25)


def test_student_penalty_forgives_minima(exact, smearing):
    measured = noisy(exact.apply(sphere(FINE)), 0.025)
    assert error(desmear(measured, smearing, student=2.0), sphere(Q)) < error(desmear(measured, smearing), sphere(Q))


def test_negative_intensities_are_data(smearing, exact):
    """A curve that the noise carries below zero at high q."""
    truth = lambda q: 10 * np.exp(-(q**2)) + 1e-3  # noqa: E731
    rng = np.random.default_rng(3)
    sigma = np.full(Q.size, 0.01)
    I = exact.apply(truth(FINE)) + sigma * rng.standard_normal(Q.size)
    assert (I < 0).sum() > 50
    result = desmear(curve(Q, I, sigma), smearing)
    assert (result["I"] > 0).all()
    assert 0.8 < float(result["chi2"]) < 1.2
    pull = (result["I"].values - truth(Q)) / result["Idev"].values
    assert np.abs(pull[Q < 2]).max() < 5
    # Where nothing is seen, the answer stays well below the noise of a point.
    assert result["I"].values[Q > 3.5].max() < 0.01


def test_coverage(exact, smearing):
    """Error bars on a smooth curve hold the truth about as often as they say."""
    truth = lambda q: 50 * np.exp(-(q**2) / 2) + 0.1  # noqa: E731
    rng = np.random.default_rng(2)
    ideal = exact.apply(truth(FINE))
    sigma = np.tile(0.02 * ideal, (12, 1))
    result = desmear(curve(Q, ideal + sigma * rng.standard_normal(sigma.shape), sigma), smearing)
    pull = np.abs(result["I"].values - truth(Q)) / result["Idev"].values
    assert 0.55 < np.mean(pull < 1) < 0.92
    assert np.mean(pull < 2) > 0.88


def test_weight_grows_with_the_noise_and_is_reported(exact, smearing):
    ideal = exact.apply(5 + np.sin(FINE))
    quiet, loud = (desmear(noisy(ideal, n), smearing) for n in (0.01, 0.2))
    fixed = desmear(noisy(ideal, 0.01), smearing, weight=7.0)
    assert fixed["weight"] == 7.0
    assert quiet["weight"] > 0
    assert loud["weight"] > 0
    assert quiet["iterations"] > 1


def test_limit_is_flagged(exact, smearing):
    result = desmear(noisy(exact.apply(sphere(FINE)), 0.02), smearing, maximum_iterations=1)
    assert int(result["flags"]) & int(Flag.NOT_CONVERGED)


def test_weights_share_a_limit(exact, smearing):
    assert desmear(noisy(exact.apply(sphere(FINE)), 0.02), smearing, maximum_iterations=2)["iterations"] <= 5 * 2 + 1


def test_many_points_are_solved_on_fewer_nodes():
    """3000 points with dQ of 5 %: in seconds, and as well as on every node."""
    q = np.linspace(0.01, 5, 3000)
    operator = Smearing.pinhole(q, 0.05 * q)
    ideal = Smearing.pinhole(q, 0.05 * q, q_calc=FINE_AND_WIDE).apply(sphere(FINE_AND_WIDE))
    measured = curve(q, ideal * (1 + 0.02 * np.random.default_rng(0).standard_normal(q.size)), 0.02 * ideal)
    method = MAP(operator)
    assert method.smearing.q_calc.size < 600
    assert method.smearing.q_calc[[0, -1]].tolist() == operator.q_calc[[0, -1]].tolist()
    np.testing.assert_allclose(method.smearing.matrix.sum(axis=1), 1)
    begin = time.process_time()
    result = desmear(measured, operator)
    assert time.process_time() - begin < 20
    assert 0.9 < float(result["chi2"]) < 1.1
    assert not int(result["flags"]) & int(Flag.NOT_CONVERGED)
    truth = sphere(q)
    before = np.mean((np.log(measured["I"].values) - np.log(truth)) ** 2)
    assert np.mean((np.log(result["I"].values) - np.log(truth)) ** 2) < before / 3


@pytest.mark.parametrize("kind", ["slit", "narrow"])
def test_no_node_is_left_out_that_the_operator_sees(kind):
    """A slit's edge is sharp, and a narrow PSF tells every point from the next."""
    q = np.linspace(0.01, 5, 900)
    operator = Smearing.slit(q, 1.0) if kind == "slit" else Smearing.gaussian(q, 0.008)
    assert thinned(operator).q_calc.size == operator.q_calc.size


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"student": -1.0}, {"tolerance": 0.0}])
def test_bad_options(smearing, options):
    with pytest.raises(BadInput, match="must be positive"):
        prepare(smearing, "map", **options)


class TestLinearAlgebra:
    SLIT = Smearing.slit(np.geomspace(0.05, 2, 40), 0.5)
    NARROW = Smearing.gaussian(np.linspace(0.1, 2, 60), 0.03)

    @pytest.mark.parametrize("smearing", [SLIT, NARROW], ids=["wide", "narrow"])
    def test_normal_matrix(self, smearing):
        weights = np.random.default_rng(0).uniform(1, 2, smearing.q.size)
        bands = _NormalMatrix(smearing.matrix)(weights)
        full = smearing.matrix.T @ np.diag(weights) @ smearing.matrix
        for offset, band in enumerate(bands):
            np.testing.assert_allclose(band[: full.shape[0] - offset], np.diagonal(full, -offset), atol=1e-10)

    @pytest.mark.parametrize("dense", [False, True])
    def test_cholesky(self, dense):
        rng = np.random.default_rng(1)
        bands = np.vstack([rng.uniform(5, 6, 30), rng.uniform(-1, 1, (2, 30))])
        bands[1, -1] = bands[2, -2:] = 0
        full = np.diag(bands[0]) + sum(np.diag(bands[k, :-k], -k) + np.diag(bands[k, :-k], k) for k in (1, 2))
        factor = _Cholesky(bands, dense=dense)
        np.testing.assert_allclose(factor.solve(np.eye(30)), np.linalg.inv(full), atol=1e-9)
        assert factor.half_log_det == pytest.approx(np.linalg.slogdet(full)[1] / 2, rel=1e-9)

    def test_bending(self):
        """Straight lines in u are free, parabolas cost their curvature, on any spacing."""
        u = np.sort(np.random.default_rng(2).uniform(0, 10, 50))
        bending = _Bending(u)
        np.testing.assert_allclose(bending(3 * u - 1), 0, atol=1e-9)
        inner = (u[2:] - u[:-2]).sum() / 2
        assert bending(u**2) @ bending(u**2) == pytest.approx(4 * inner)
        L = bending(np.eye(50)).T
        weights = np.random.default_rng(3).uniform(1, 2, 48)
        full = L.T @ np.diag(weights) @ L
        for offset, band in enumerate(bending.bands(weights)):
            np.testing.assert_allclose(band[: 50 - offset], np.diagonal(full, -offset), rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(bending.adjoint(np.eye(48)), L)

    def test_coordinate(self):
        q = np.linspace(0.1, 2, 100)
        np.testing.assert_allclose(np.diff(_coordinate(q, q)), 1, rtol=1e-9)
        q = np.geomspace(0.01, 2, 100)
        above = np.append(q, 4.0)
        step = np.log(q[1] / q[0])
        np.testing.assert_allclose(np.diff(_coordinate(q, above)), np.diff(np.log(above)) / step, rtol=0.03)

    def test_gradient(self):
        measured = self.NARROW.apply(5 + np.sin(self.NARROW.q_calc))
        for student in (None, 2.0):
            problem = _Problem(MAP(self.NARROW, student=student), measured, 0.1 * measured)
            x = np.random.default_rng(4).normal(1, 0.1, self.NARROW.q_calc.size)
            step = 1e-6 * np.eye(x.size)
            slopes = [(problem.cost(x + d, 3.0) - problem.cost(x - d, 3.0)) / 2e-6 for d in step]
            np.testing.assert_allclose(problem.gradient(x, 3.0), slopes, rtol=1e-4, atol=1e-4)

"""Central moment expansion."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.optimize import curve_fit

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.desmearing.cme import CME, _straightening
from dsnet_bluesky.desmearing.kernels import straightened
from dsnet_bluesky.desmearing.splines import Splines, reaches_zero, units
from dsnet_bluesky.smearing import Smearing

SIGMA = 0.05
Q = np.linspace(0.02, 3.0, 150)
FINE = np.arange(0.0005, 3.6, 0.001)


def shell(q, R=2.2, thickness=0.8, background=0.05):
    """A core-shell ball whose core has half the contrast of its shell."""
    amplitude = lambda r: r**3 * (np.sin(q * r) - q * r * np.cos(q * r)) / (q * r) ** 3  # noqa: E731
    return 3 * (amplitude(R + thickness) - 0.5 * amplitude(R)) ** 2 + background


def peak(q, width=SIGMA):
    """A correlation peak on the flank of a power law."""
    return 1 + 10 * np.exp(-0.5 * ((q - 1.5) / width) ** 2) + 0.3 / (q**2 + 0.04)


def smeared(truth, q=Q, sigma=SIGMA):
    """Smear on a grid 20 times finer than q, and wider: no method's own matrix."""
    return Smearing.gaussian(q, sigma, q_calc=FINE).apply(truth(FINE))


def noisy(ideal, noise, seed=0, exposures=1, q=Q):
    sigma = noise * ideal if exposures == 1 else np.tile(noise * ideal, (exposures, 1))
    return curve(q, ideal + sigma * np.random.default_rng(seed).standard_normal(sigma.shape), sigma)


def log_error(I, truth) -> float:
    return float(np.mean((np.log(np.asarray(I)) - np.log(truth)) ** 2))


@pytest.fixture(scope="module")
def operator() -> Smearing:
    return Smearing.gaussian(Q, SIGMA)


@pytest.fixture(scope="module")
def prepared(operator):
    return prepare(operator, "cme")


class TestSeriesThatAreKnown:
    """Curves whose expansion is exact, or whose answer is known in closed form."""

    @pytest.mark.parametrize("order", [4, 8])
    def test_moments_smear_an_even_polynomial(self, operator, order):
        """q^4 becomes q^4 + 6 q^2 s^2 + 3 s^4 at every q, where the kernel is folded at zero too."""
        method = CME(operator, order=order)
        splines = method._splines
        polynomial = np.polynomial.Polynomial([2.0, 0.0, -1.0, 0.0, 0.3])
        q = np.linspace(0, 3.15, 600)
        coefficients = np.linalg.lstsq(splines.design(q).toarray(), polynomial(q), rcond=None)[0]
        exact = 2 - (Q**2 + SIGMA**2) + 0.3 * (Q**4 + 6 * Q**2 * SIGMA**2 + 3 * SIGMA**4)
        design = method._expansion(np.ones(operator.q_calc.size))
        # The operator cuts its Gaussians at 5 widths, which moves the last points.
        np.testing.assert_allclose((design @ coefficients)[:-5], exact[:-5], atol=2e-5)

    def test_a_polynomial_comes_back(self, prepared):
        truth = lambda q: 2 - q**2 / 10 + 0.02 * q**4  # noqa: E731
        exact = 2 - (Q**2 + SIGMA**2) / 10 + 0.02 * (Q**4 + 6 * Q**2 * SIGMA**2 + 3 * SIGMA**4)
        answer = prepared(curve(Q, exact, 1e-5 * exact))["I"]
        np.testing.assert_allclose(answer, truth(Q), rtol=1e-3)
        np.testing.assert_allclose(answer[:-3], truth(Q)[:-3], rtol=1e-4)

    def test_a_gaussian_comes_back(self, prepared):
        """exp(-a^2 q^2 / 2) smears to itself with a^2 / (1 + a^2 s^2), over sqrt(1 + a^2 s^2)."""
        a2 = 4.0
        widened = 1 + a2 * SIGMA**2
        measured = 100 * np.exp(-a2 * Q**2 / 2 / widened) / np.sqrt(widened) + 0.1
        result = prepared(curve(Q, measured, 1e-4 * measured))
        np.testing.assert_allclose(result["I"], 100 * np.exp(-a2 * Q**2 / 2) + 0.1, rtol=3e-3)
        np.testing.assert_allclose(result["I"][:-3], (100 * np.exp(-a2 * Q**2 / 2) + 0.1)[:-3], rtol=5e-4)
        assert float(result["chi2"]) < 1

    @pytest.mark.parametrize(("order", "half"), [(4, 1.62), (8, 1.94)])
    def test_waves_come_back_by_the_quotient_of_the_series(self, operator, order, half):
        """R divided by its series, in x = (k s)^2 / 2: 1 for long waves, a half where the docstring says so."""
        series = [1, -1, 1 / 2, -1 / 6, 1 / 24][: order // 2 + 1]
        inner = (Q > 0.5) & (Q < 2.5)
        for wave in (0.5, 1.0, half):
            x = wave**2 / 2
            measured = 10 + np.exp(-x) * np.cos(wave * Q / SIGMA)
            result = desmear(curve(Q, measured, np.full(Q.size, 1e-3)), operator, "cme", order=order, weight=1e-4, trend=50.0)
            height = np.linalg.lstsq(np.cos(wave * Q / SIGMA)[inner, None], result["I"].values[inner] - 10, rcond=None)[0][0]
            assert height == pytest.approx(np.exp(-x) / np.polynomial.Polynomial(series)(x), abs=0.02)
        assert height == pytest.approx(0.5, abs=0.03)


class TestClosure:
    def test_form_factor(self, prepared):
        ideal = smeared(shell)
        assert log_error(ideal, shell(Q)) > 0.01
        assert log_error(prepared(curve(Q, ideal))["I"], shell(Q)) < 1e-5
        result = prepared(noisy(ideal, 0.03))
        assert log_error(result["I"], shell(Q)) < 5e-4
        assert 0.7 < float(result["chi2"]) < 1.3

    def test_peak_as_wide_as_the_resolution(self, prepared):
        ideal = smeared(peak)
        result = prepared(noisy(ideal, 0.01))
        near = np.abs(Q - 1.5) < 0.25
        error = {name: np.sqrt(np.mean((result[name].values - peak(Q))[near] ** 2)) for name in ("I", "I_smeared")}
        assert error["I"] < error["I_smeared"] / 4
        gauss = lambda q, a, c, s, b: b + a * np.exp(-0.5 * ((q - c) / s) ** 2)  # noqa: E731
        start = [10, 1.5, SIGMA, 1]
        (height, place, width, _), _ = curve_fit(gauss, Q[near], result["I"].values[near], start)
        (before, _, wider, _), _ = curve_fit(gauss, Q[near], ideal[near], start)
        assert before < 7.5
        assert height > 9
        assert place == pytest.approx(1.5, abs=0.003)
        assert abs(wider) > 1.35 * SIGMA
        assert abs(width) < 1.12 * SIGMA

    def test_order_8_sees_sharper_than_order_4(self, operator):
        measured = noisy(smeared(lambda q: peak(q, 0.03)), 0.003)
        tops = [float(desmear(measured, operator, "cme", order=order)["I"].max("q")) for order in (4, 8)]
        assert tops[0] < tops[1] < 1.05 * peak(1.5, 0.03)

    def test_uneven_grids(self):
        random = np.sort(np.random.default_rng(1).uniform(0.03, 3.0, 200))
        for q, width in ((random, np.full(200, SIGMA)), (np.geomspace(0.05, 3.0, 160), 0.04 + 0.02 * np.geomspace(0.05, 3, 160))):
            ideal = Smearing.pinhole(q, width, q_calc=FINE).apply(shell(FINE))
            result = desmear(noisy(ideal, 0.02, q=q), Smearing.pinhole(q, width), "cme")
            assert log_error(result["I"], shell(q)) < 1e-3 < 0.01 < log_error(ideal, shell(q))
            assert 0.7 < float(result["chi2"]) < 1.3

    def test_beam_in_two_dimensions(self):
        """Rice's kernel is lopsided near q = 0, where its mean lies far from q."""
        exact = Smearing.rice(Q, SIGMA, q_calc=FINE[::2])
        ideal = exact.apply(shell(exact.q_calc))
        assert log_error(desmear(noisy(ideal, 0.002), Smearing.rice(Q, SIGMA), "cme")["I"], shell(Q)) < 1e-4

    def test_negative_intensities_are_data(self, prepared):
        """A curve that the noise carries below zero at high q."""
        truth = lambda q: 10 * np.exp(-(q**2)) + 1e-3  # noqa: E731
        sigma = np.full(Q.size, 0.02)
        measured = smeared(truth) + sigma * np.random.default_rng(3).standard_normal(Q.size)
        assert (measured < 0).sum() >= 10
        result = prepared(curve(Q, measured, sigma))
        assert 0.7 < float(result["chi2"]) < 1.3
        assert (result["I"] > 0).all()
        pull = (result["I"].values - truth(Q)) / result["Idev"].values
        assert np.sqrt(np.mean(pull**2)) < 1.5


class TestSlits:
    """A slit acts on one side: its rows have first moments, which are taken where they belong."""

    GRID = np.linspace(0.05, 3.0, 150)

    def measure(self, length, width=0.0, truth=shell, q=GRID):
        fine = np.linspace(q[0] / 20, 1.05 * np.hypot(q[-1] + width, length), 3000)
        ideal = Smearing.slit(q, length, width, q_calc=fine).apply(truth(fine))
        return ideal, desmear(noisy(ideal, 0.01, q=q), Smearing.slit(q, length, width), "cme")

    @pytest.mark.parametrize(("length", "width"), [(0.3, 0.02), (0.7, 0.0)])
    def test_short(self, length, width):
        ideal, result = self.measure(length, width)
        assert log_error(result["I"], shell(self.GRID)) < log_error(ideal, shell(self.GRID)) / 30
        assert 0.6 < float(result["chi2"]) < 1.3

    def test_a_peak_is_put_where_it_belongs(self):
        truth = lambda q: 1 + 10 * np.exp(-0.5 * ((q - 1.5) / 0.05) ** 2)  # noqa: E731
        q = np.linspace(0.3, 3.0, 271)
        ideal, result = self.measure(0.4, truth=truth, q=q)
        assert q[ideal.argmax()] < 1.49
        assert q[np.argmax(result["I"].values)] == pytest.approx(1.5, abs=0.011)

    def test_long_is_flagged(self):
        """Where the series fails, the re-smeared answer misses the measurement."""
        q = np.geomspace(2e-3, 2.0, 150)
        _, result = self.measure(0.5, truth=lambda q: 1e4 / (1 + (q / 0.02) ** 2) ** 1.8 + 0.05, q=q)
        assert int(result["flags"]) & int(Flag.POOR_FIT)


class TestErrors:
    @pytest.mark.parametrize(("truth", "noise"), [(shell, 0.01), (shell, 0.05), (peak, 0.03)])
    def test_idev_is_the_scatter_over_seeds(self, prepared, truth, noise):
        result = prepared(noisy(smeared(truth), noise, exposures=20))
        ratio = result["I"].values.std(axis=0, ddof=1) / result["Idev"].values.mean(axis=0)
        assert 0.85 < np.median(ratio) < 1.15
        assert np.quantile(ratio, 0.9) < 1.6

    def test_noise_that_the_trend_follows_is_not_forgotten(self, operator):
        """A narrow trend under a stiff spline is the answer; its noise counts."""
        ideal = smeared(lambda q: 1 / (1 + q**2) ** 2 + 0.01)
        result = desmear(noisy(ideal, 0.05, exposures=20), operator, "cme", trend=2.0, weight=1e12)
        ratio = result["I"].values.std(axis=0, ddof=1) / result["Idev"].values.mean(axis=0)
        assert 0.8 < np.median(ratio) < 1.2

    def test_coverage(self, prepared):
        """On a form factor the errors hold the truth about as often as they say."""
        result = prepared(noisy(smeared(shell), 0.03, seed=1, exposures=12))
        pull = np.abs(result["I"].values - shell(Q)) / result["Idev"].values
        assert 0.55 < np.mean(pull < 1) < 0.8
        assert 0.85 < np.mean(pull < 2) < 0.99

    def test_qdev_grows_with_the_noise(self, prepared):
        widths = [float(prepared(noisy(smeared(peak), n))["Qdev"].median()) for n in (0.001, 0.01, 0.1)]
        assert 0.3 * SIGMA < widths[0] < widths[1] < widths[2]
        assert widths[0] < SIGMA


def test_no_smearing_leaves_the_curve():
    result = desmear(curve(Q, shell(Q), 1e-3 * shell(Q)), Smearing.identity(Q), "cme")
    np.testing.assert_allclose(result["I"], shell(Q), rtol=3e-3)


def test_few_points():
    for first in (0.0, 0.1):
        q = np.linspace(first, 1.0, 5)
        smearing = Smearing.gaussian(q, 0.1)
        measured = smearing.apply(np.exp(-(smearing.q_calc**2)))
        np.testing.assert_allclose(desmear(curve(q, measured, 0.01 * measured), smearing, "cme")["I"], np.exp(-(q**2)), rtol=0.05)


def test_what_was_chosen_is_told(prepared, operator):
    told = prepared(noisy(smeared(shell), 0.01, exposures=2))
    assert told["weight"].dims == told["trend"].dims == ("exposure",)
    result = desmear(noisy(smeared(shell), 0.01), operator, "cme", weight=3.0, trend=6)
    assert (float(result["weight"]), float(result["trend"])) == (3.0, 6.0)


def test_prepared_once_then_cheap(smearing, exact):
    """501 points take about 40 ms a curve on a free core."""
    ready = prepare(smearing, "cme")
    ideal = exact.apply(shell(exact.q_calc))
    started = time.process_time()
    ready(noisy(ideal, 0.02, exposures=3, q=smearing.q))
    assert (time.process_time() - started) / 3 < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 6}, "order is 6; the expansion may end after 4 or 8 derivatives"),
        ({"order": 4.5}, "order is 4.5; it takes a whole number"),
        ({"weight": 0.0}, "weight is 0.0; it must be positive"),
        ({"weight": "much"}, "weight is 'much'; it takes a finite number or null"),
        ({"trend": 0.3}, "trend is 0.3; the window must hold at least 1 width"),
        ({"moments": 2}, "cme has no option moments; its options are order, weight, trend"),
    ],
)
def test_bad_options(operator, options, message):
    with pytest.raises(BadInput, match=message):
        prepare(operator, "cme", **options)


class TestParts:
    def test_straightening_is_the_function(self):
        for smearing in (Smearing.gaussian(Q[:40], 0.03), Smearing.slit(np.geomspace(0.01, 1, 40), 0.2)):
            np.testing.assert_allclose(_straightening(smearing).toarray(), straightened(smearing, np.eye(smearing.q_calc.size)))

    @pytest.mark.parametrize("first", [0.02, 1.0])
    def test_derivatives_of_splines(self, first):
        smearing = Smearing.gaussian(np.linspace(first, first + 2, 100), 0.04)
        splines = Splines(smearing, 4)
        assert reaches_zero(smearing) == (first < 1)
        q = np.linspace(smearing.q[0], smearing.q[-1] + 0.1, 500)
        coefficients = np.linalg.lstsq(splines.design(q).toarray(), np.cos(2 * q), rcond=None)[0]
        q = smearing.q
        np.testing.assert_allclose(splines.design(q, 2) @ coefficients, -4 * np.cos(2 * q), atol=0.02)
        np.testing.assert_allclose(splines.design(q, 3) @ coefficients, 8 * np.sin(2 * q), atol=0.3)

    def test_even_splines_are_flat_at_zero(self, operator):
        splines = Splines(operator, 8)
        for derivative in (1, 3):
            np.testing.assert_allclose(splines.design(np.zeros(1), derivative).toarray(), 0, atol=1e-6)

    def test_folded_kernels_are_not_taken_for_narrow_ones(self, operator):
        assert operator.widths[0] < 0.7 * SIGMA
        np.testing.assert_allclose(units(operator)[:100], SIGMA, rtol=0.02)

"""Quantities of curves: identities that any measure of a radius, an integral or a peak must fulfil, and honest errors."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.desmearing.covariance import covariance
from dsnet_bluesky.quantities import guinier, invariant, peaks
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.02, 3, 500)


def sphere(q, radius):
    x = q * radius
    return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


def bragg(q, position=1.1, height=5.0, fwhm=0.06):
    """A Gaussian peak on a power law."""
    return height * np.exp(-4 * np.log(2) * ((q - position) / fwhm) ** 2) + 0.02 * q**-3 + 0.3


def noisy(I, share=0.03, floor=0.0, seed=0):
    deviation = share * I + floor
    return curve(Q, I + deviation * np.random.default_rng(seed).normal(size=I.size), deviation)


class TestGuinier:
    @settings(deadline=None)
    @given(radius=st.floats(0.8, 10), level=st.floats(1e-3, 1e6))
    def test_a_guinier_curve_is_exact(self, radius, level):
        I = level * np.exp(-((radius * Q) ** 2) / 3)
        Rg, I0 = guinier(curve(Q, I, 0.01 * I))
        assert Rg.value == pytest.approx(radius, rel=1e-9)
        assert I0.value == pytest.approx(level, rel=1e-9)

    @settings(deadline=None)
    @given(radius=st.floats(1, 12))
    def test_a_sphere_has_three_fifths_of_its_radius_squared(self, radius):
        q = np.geomspace(0.001, 3, 800)
        Rg, _ = guinier(curve(q, sphere(q, radius), 0.01 * sphere(q, radius) + 1e-6), limit=0.2)
        assert Rg.value**2 == pytest.approx(3 / 5 * radius**2, rel=2e-3)
        usual, _ = guinier(curve(q, sphere(q, radius), 0.01 * sphere(q, radius) + 1e-6))
        assert usual.value == pytest.approx(Rg.value, rel=0.03)

    def test_its_errors_hold(self):
        truth = 100 * np.exp(-((4 * Q) ** 2) / 3) + 1e-9
        off = []
        for seed in range(200):
            Rg, I0 = guinier(noisy(truth, 0.02, 0.01, seed))
            off.append([(Rg.value - 4) / Rg.error, (I0.value - 100) / I0.error])
        np.testing.assert_allclose(np.std(off, axis=0), 1, atol=0.15)
        np.testing.assert_allclose(np.mean(np.abs(off) < 1, axis=0), 0.683, atol=0.1)

    @pytest.mark.parametrize(
        ("I", "why"),
        [
            (Q**-2.0, "fewer than 5 points lie below q Rg"),
            (Q**-0.5, "is not straight"),
            (Q**2, "does not fall"),
            (np.exp(-((60 * Q) ** 2) / 3) + 1e-9, "fewer than 5 points|begins at q Rg"),
            (np.where(Q < 0.04, -1.0, 1 / Q), "not positive"),
        ],
    )
    def test_a_curve_without_a_guinier_range_says_why(self, I, why):
        Rg, I0 = guinier(curve(Q, I, np.abs(0.01 * I)))
        assert not Rg.valid
        assert not I0.valid
        assert np.isnan(Rg.error)
        assert any(word in Rg.reason for word in why.split("|")), Rg.reason
        assert Rg.units == "nm"


class TestInvariant:
    @settings(deadline=None)
    @given(level=st.floats(1e-3, 1e3))
    def test_of_a_power_law_it_is_known(self, level):
        found = invariant(curve(Q, level / Q**2, 0.01 / Q**2))
        assert found.value == pytest.approx(level * (Q[-1] - Q[0]), rel=1e-12)
        assert found.units == "1/cm / nm**3"

    def test_of_a_gaussian_it_is_known(self):
        q = np.linspace(0.001, 8, 4000)
        assert invariant(curve(q, np.exp(-(q**2)), 0.01 * np.ones_like(q))).value == pytest.approx(np.sqrt(np.pi) / 4, rel=1e-5)

    def test_its_error_holds(self):
        truth = np.exp(-(Q**2))
        exact = invariant(curve(Q, truth, 0.01 * truth)).value
        off = [(found.value - exact) / found.error for found in (invariant(noisy(truth, 0.05, 0, s)) for s in range(300))]
        assert np.std(off) == pytest.approx(1, abs=0.12)


class TestPeaks:
    @settings(deadline=None, max_examples=25)
    @given(position=st.floats(0.6, 2.5), height=st.floats(1, 100), fwhm=st.floats(0.04, 0.15))
    def test_a_gaussian_on_a_power_law_is_recovered(self, position, height, fwhm):
        I = bragg(Q, position, height, fwhm) - 0.3
        (peak,) = peaks(curve(Q, I, 0.005 * I))
        # Without noise: within the error, or a few per cent where the stated errors are far smaller than a profile can follow.
        for found, truth, share in ((peak.position, position, 1e-3), (peak.height, height, 0.04), (peak.fwhm, fwhm, 0.02)):
            assert found.value == pytest.approx(truth, abs=max(found.error, share * truth))
            assert found.error < 0.02 * truth

    def test_the_width_is_that_of_a_lorentzian_too(self):
        I = 5 / (1 + 4 * ((Q - 1.1) / 0.06) ** 2) + 0.02 * Q**-3 + 0.3
        (peak,) = peaks(curve(Q, I, 0.01 * I))
        assert peak.fwhm.value == pytest.approx(0.06, rel=0.01)

    def test_its_errors_hold(self):
        off = []
        for seed in range(100):
            (peak,) = peaks(noisy(bragg(Q), 0.03, 0, seed))
            pairs = ((peak.position, 1.1), (peak.height, 5.0), (peak.fwhm, 0.06))
            off.append([(found.value - truth) / found.error for found, truth in pairs])
        np.testing.assert_allclose(np.std(off, axis=0), 1, atol=0.2)
        np.testing.assert_allclose(np.mean(np.abs(off) < 1.96, axis=0), 0.95, atol=0.06)

    def test_noise_alone_is_no_peak(self):
        assert sum(len(peaks(noisy(1 / Q + 1, 0.03, 0, seed))) for seed in range(50)) <= 2

    def test_the_orders_of_silver_behenate(self):
        orders = 1.076 * np.arange(1, 3)
        I = sum(bragg(Q, order, 10 / order) for order in orders)
        assert [round(peak.position.value, 3) for peak in peaks(noisy(I, 0.01))] == pytest.approx(list(orders), abs=2e-3)

    def test_a_peak_of_too_few_points_says_so(self):
        q = np.linspace(0.1, 3, 60)
        I = bragg(q, position=q[20], fwhm=0.03)
        (peak,) = peaks(curve(q, I, 0.01 * I))
        assert "points" in peak.position.reason
        assert not peak.fwhm.valid
        assert peak.significance > 5

    def test_many_peaks_are_cut_to_the_strongest(self):
        I = 2 + np.sin(2 * np.pi * Q / 0.2)
        assert len(peaks(curve(Q, I, 0.01 * I))) == 8


class TestErrors:
    def test_errors_that_neighbours_share_count(self):
        """The integral of a desmeared curve is less certain than its points, taken alone, say."""
        q = np.linspace(0.05, 2, 200)
        result = desmear(curve(q, np.exp(-(q**2)) + 0.01, 0.01 * np.ones_like(q)), Smearing.gaussian(q, 0.04), method="dsnet")
        shared, alone = invariant(result), invariant(result.assign_attrs(diagnostics="{}"))
        assert shared.value == alone.value
        steps = np.diff(q)
        gradient = 0.5 * (np.append(steps, 0) + np.append(0, steps)) * q**2
        assert shared.error == pytest.approx(np.sqrt(gradient @ covariance(result).dense() @ gradient), rel=1e-9)
        assert shared.error > 1.5 * alone.error

    def test_a_curve_without_errors_has_values_without_errors(self):
        I = 100 * np.exp(-((4 * Q) ** 2) / 3)
        bare = curve(Q, I, I).assign(Idev=("q", np.full(Q.size, np.nan)))
        Rg, _ = guinier(bare)
        assert Rg.value == pytest.approx(4, rel=1e-6)
        assert np.isnan(Rg.error)
        assert peaks(bare) == []

    def test_points_without_a_value_are_left_out(self):
        I = 100 * np.exp(-((4 * Q) ** 2) / 3) + 1e-9
        gaps = curve(Q, I, 0.01 * I)
        gaps["I"][3:6] = np.nan
        assert guinier(gaps)[0].value == pytest.approx(4, rel=1e-6)
        gaps["I"][:] = np.nan
        assert [found.reason for found in (guinier(gaps)[0], invariant(gaps))] == ["fewer than 5 points can be used"] * 2
        assert peaks(gaps) == []

    def test_several_exposures_are_refused(self):
        several = xr.concat([noisy(bragg(Q)), noisy(bragg(Q), seed=1)], "exposure")
        for measure in (guinier, invariant, peaks):
            with pytest.raises(BadInput, match="one exposure"):
                measure(several)

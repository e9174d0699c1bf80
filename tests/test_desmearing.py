"""What every desmearing method owes its caller."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.data import RESULT_VARIABLES, BadInput, Flag, curve
from dsnet_bluesky.desmearing import METHODS, Prepared, Solution, desmear, prepare
from dsnet_bluesky.desmearing.kernels import kernel_widths, positive_mean, straightened
from dsnet_bluesky.desmearing.tails import Tails
from dsnet_bluesky.smearing import Smearing

CLASSICAL = ["lake", "wiener", "map", "ift"]
Q = np.linspace(0.02, 3.0, 150)
SIGMA = 0.05


def ball(q, R=2.0, background=0.05):
    x = q * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


def smeared_ball(noise: float = 0.02, exposures: int = 3) -> xr.Dataset:
    fine = np.arange(0.0005, 3.6, 0.001)
    ideal = Smearing.gaussian(Q, SIGMA, q_calc=fine).apply(ball(fine))
    rng = np.random.default_rng(5)
    sigma = noise * ideal
    return curve(Q, ideal + sigma * rng.standard_normal((exposures, Q.size)), np.tile(sigma, (exposures, 1)), sample="ball")


@pytest.fixture(scope="module")
def smearing() -> Smearing:
    return Smearing.gaussian(Q, SIGMA)


@pytest.fixture(scope="module")
def curves() -> xr.Dataset:
    return smeared_ball()


@pytest.mark.parametrize("method", CLASSICAL)
class TestEveryMethod:
    def test_result(self, method, smearing, curves):
        result = desmear(curves, smearing, method)
        for name in RESULT_VARIABLES:
            assert result[name].dims == ("exposure", "q")
        assert result["chi2"].dims == result["flags"].dims == result["status"].dims == ("exposure",)
        assert (result["status"] == "ok").all()
        assert np.isfinite(result["I"]).all()
        assert (result["Idev"] > 0).all()
        np.testing.assert_array_equal(result["I_smeared"], curves["I"])
        np.testing.assert_array_equal(result["Idev_smeared"], curves["Idev"])
        assert result.attrs["method"] == method
        assert result.attrs["sample"] == "ball"
        assert json.loads(result.attrs["options"]) == {}
        assert result["I"].attrs["units"] == "1/cm"
        assert result["Qdev"].attrs["units"] == "1/nm"

    def test_how_it_went_is_told_of_each_exposure(self, method, smearing, curves):
        result = desmear(curves, smearing, method)
        told = {"lake": {"iterations"}, "wiener": set(), "map": {"weight", "iterations"}, "ift": {"diameter", "parameters"}}
        assert set(result) - {*RESULT_VARIABLES, "chi2", "flags", "status"} == told[method]
        for name in told[method]:
            assert result[name].dims == ("exposure",)
            assert result[name].attrs["long_name"]
            assert (result[name] > 0).all()
        assert json.loads(result.attrs["diagnostics"]) == {}

    def test_chi2_is_of_the_resmeared_answer(self, method, smearing, curves):
        result = desmear(curves, smearing, method)
        residual = (result["I_resmeared"] - result["I_smeared"]) / result["Idev_smeared"]
        np.testing.assert_allclose(result["chi2"], (residual**2).mean("q"))
        poor = (result["flags"] & int(Flag.POOR_FIT)).astype(bool)
        np.testing.assert_array_equal(poor, result["chi2"] > 2)

    def test_desmearing_comes_nearer_to_the_truth(self, method, smearing, curves):
        result = desmear(curves, smearing, method)
        error = {name: float(((np.log(result[name]) - np.log(ball(Q))) ** 2).mean()) for name in ("I", "I_smeared")}
        assert error["I"] < error["I_smeared"] / 3

    def test_dims_follow_the_input(self, method, smearing, curves):
        one = curves.isel(exposure=1)
        result = desmear(one, smearing, method)
        assert result["I"].dims == ("q",)
        assert result["chi2"].dims == ()
        batch = desmear(curves, smearing, method).isel(exposure=1)
        np.testing.assert_allclose(result["I"], batch["I"], rtol=1e-6)
        turned = desmear(curves.transpose("q", "exposure"), smearing, method)
        np.testing.assert_allclose(turned["I"].transpose("exposure", "q"), desmear(curves, smearing, method)["I"], rtol=1e-6)

    def test_order_of_exposures_does_not_matter(self, method, smearing, curves):
        prepared = prepare(smearing, method)
        order = [2, 0, 1]
        there = prepared(curves.isel(exposure=order))
        back = prepared(curves).isel(exposure=order)
        np.testing.assert_allclose(there["I"], back["I"], rtol=1e-9)
        np.testing.assert_allclose(there["Idev"], back["Idev"], rtol=1e-9)

    @settings(max_examples=5, deadline=None)
    @given(factor=st.floats(1e-6, 1e9))
    def test_scaling(self, method, factor):
        measured = smeared_ball(exposures=1)
        prepared = prepare(Smearing.gaussian(Q, SIGMA), method)
        scaled = prepared(curve(Q, factor * measured["I"].values, factor * measured["Idev"].values))
        plain = prepared(measured)
        np.testing.assert_allclose(scaled["I"], factor * plain["I"], rtol=1e-5)
        np.testing.assert_allclose(scaled["Idev"], factor * plain["Idev"], rtol=1e-3)
        np.testing.assert_allclose(scaled["chi2"], plain["chi2"], rtol=1e-5)

    @settings(max_examples=5, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), noise=st.floats(1e-4, 0.02))
    def test_identity_returns_the_curve(self, method, seed, noise):
        truth = ball(Q)
        measured = truth * (1 + noise * np.random.default_rng(seed).standard_normal(Q.size))
        result = desmear(curve(Q, measured, noise * truth), Smearing.identity(Q), method)
        # Wiener's filter takes a fiftieth of the curve for noise, and spreads it over the minimum.
        bound = 0.3 if method == "wiener" else 6 * noise
        assert (np.abs(result["I"] - truth) <= bound * truth).all()

    def test_unknown_option(self, method, smearing):
        with pytest.raises(BadInput, match=r"has no option wieght; its options are .+"):
            prepare(smearing, method, wieght=1)

    def test_estimated_noise_is_flagged(self, method, smearing, curves):
        result = desmear(curve(Q, curves["I"].values), smearing, method)
        assert (result["flags"] & int(Flag.NOISE_ESTIMATED) > 0).all()

    def test_input_is_left_alone(self, method, smearing, curves):
        before = curves.copy(deep=True)
        desmear(curves, smearing, method)
        xr.testing.assert_identical(before, curves)


class TestBadInput:
    def test_unknown_method(self, smearing):
        with pytest.raises(BadInput, match=r"no method 'lakes'.*dsnet-paper, ift, lake, map, wiener"):
            prepare(smearing, "lakes")

    def test_other_grid(self, smearing):
        other = Q * 1.01
        with pytest.raises(BadInput, match="build it on the curve's q"):
            desmear(curve(other, ball(other), 0.1 * ball(other)), smearing)
        with pytest.raises(BadInput, match=r"has 140 points .* was built for 150"):
            desmear(curve(Q[:140], ball(Q[:140]), 0.1 * ball(Q[:140])), smearing)

    def test_curve_shorter_than_the_psf(self):
        q = np.linspace(1.0, 1.1, 30)
        with pytest.raises(BadInput, match=r"shorter than the PSF: q spans 0.1 1/nm .* width of 0.08\d* 1/nm"):
            prepare(Smearing.gaussian(q, 0.08))

    def test_a_slit_longer_than_the_curve_is_extrapolated(self):
        q = np.geomspace(1e-3, 0.05, 60)
        truth = 1 / (1 + (q / 0.01) ** 2) ** 2
        slit = Smearing.slit(q, 1.0)
        result = desmear(curve(q, slit.apply(1 / (1 + (slit.q_calc / 0.01) ** 2) ** 2), 0.01 * truth), slit)
        assert int(result["flags"]) & int(Flag.EXTRAPOLATED)

    def test_bad_curve(self, smearing, curves):
        broken = curves.isel(exposure=1).copy(deep=True)
        broken["I"][7] = np.nan
        with pytest.raises(BadInput, match="I is not finite at 1 points"):
            desmear(broken, smearing)


HOPELESS = {
    "50 decades": (np.geomspace(1e-25, 1e25, Q.size), 1e-3),
    "a spike of 30 decades": (1e30 ** (np.arange(Q.size) == 70), 1e-3),
    "nothing but NaN": (np.full(Q.size, np.nan), 1.0),
    "infinite errors": (np.ones(Q.size), np.inf),
    "no errors": (np.ones(Q.size), 0.0),
    "negative": (-np.ones(Q.size), 0.1),
    "more than a square can hold": (np.full(Q.size, 1e200), 1e197),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestOneHopelessExposure:
    """It is answered, or failed; the others are answered as if alone."""

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_spares_the_others(self, method, smearing, curves):
        prepared = prepare(smearing, method, **({"iterations": 2} if method == "dsnet-paper" else {}))
        alone = prepared(curves.isel(exposure=[0, 2]))
        for what, (I, Idev) in HOPELESS.items():
            batch = curves.copy(deep=True)
            batch["I"][1], batch["Idev"][1] = I, Idev
            result = prepared(batch)
            others = result.isel(exposure=[0, 2])
            for name in alone.data_vars:
                if alone[name].dtype.kind == "f":
                    np.testing.assert_allclose(others[name], alone[name], rtol=1e-5, err_msg=what)
                else:
                    np.testing.assert_array_equal(others[name], alone[name], what)
            hopeless = result.isel(exposure=1)
            if hopeless["status"] == "ok":
                assert np.isfinite(hopeless["I"]).all(), what
                assert not result.attrs.get("failures")
            else:
                assert np.isnan(hopeless["I"]).all(), what
                (failure,) = json.loads(result.attrs["failures"])
                assert failure["exposure"] == 1
                assert failure["reason"]

    def test_whatever_a_method_raises(self, smearing, curves):
        def choking(I, Idev):
            if (I < 0).any():
                raise np.linalg.LinAlgError("planted")
            return Solution(np.ones((len(I), smearing.q_calc.size)), Idev, None, np.zeros(len(I), dtype=int))

        prepared = Prepared(smearing, "lake", {}, choking)
        batch = curve(Q, np.ones((9, Q.size)), np.ones((9, Q.size)))
        batch["I"][[2, 7]] = -1
        result = prepared(batch)
        assert np.flatnonzero(result["status"] == "failed").tolist() == [2, 7]
        reasons = json.loads(result.attrs["failures"])
        assert [failure["exposure"] for failure in reasons] == [2, 7]
        assert reasons[0]["reason"].startswith("lake found no finite answer for this curve (planted): leave out points")
        with pytest.raises(BadInput, match="planted"):
            prepared(batch.isel(exposure=[2, 7]))


class TestAnswersAreFinite:
    @pytest.mark.parametrize("method", ["lake", "map"])
    def test_a_curve_from_zero(self, method):
        """Five points from q = 0: the power law above them is fitted to the other four."""
        q = np.linspace(0, 1, 5)
        operator = Smearing.gaussian(q, 0.1)
        measured = operator.apply(np.exp(-(operator.q_calc**2)))
        result = desmear(curve(q, measured, 0.01 * measured), operator, method)
        np.testing.assert_allclose(result["I"], np.exp(-(q**2)), rtol=0.1)

    def test_zeros_under_the_beamstop(self, smearing, curves):
        I = curves["I"].values[0].copy()
        I[:8] = 0
        result = desmear(curve(Q, I), smearing)
        assert np.isfinite(result["chi2"])
        assert np.isfinite(result["I"]).all()

    @pytest.mark.parametrize("where", ["I_calc", "Idev"])
    def test_what_is_not_finite_is_refused(self, smearing, curves, where):
        def diverging(I, Idev):
            solution = Solution(np.ones((len(I), smearing.q_calc.size)), Idev.copy(), None, np.zeros(len(I), dtype=int))
            getattr(solution, where)[:, -1] = np.inf
            return solution

        prepared = Prepared(smearing, "lake", {}, diverging)
        with pytest.raises(BadInput, match=r"lake found no finite answer for this curve: .* try another method"):
            prepared(curves)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("map", {"weight": "abc"}, "map: weight is 'abc'; it takes a finite number or null"),
        ("map", {"weight": float("nan")}, "weight is nan"),
        ("map", {"tolerance": None}, "tolerance is None; it takes a finite number"),
        ("lake", {"iterations": 1.5}, "lake: iterations is 1.5; it takes a whole number or null"),
        ("lake", {"iterations": True}, "iterations is True"),
        ("lake", {"extrapolation": 3}, "extrapolation is 3; it takes a word"),
        ("dsnet-paper", {"fine_tune": 1}, "fine_tune is 1; it takes true or false"),
        ("dsnet-paper", {"psf": 1}, "psf is 1; it takes a word"),
    ],
)
def test_options_have_types(method, options, message, smearing):
    with pytest.raises(BadInput, match=message):
        prepare(smearing, method, **options)


def test_a_whole_number_serves_as_a_number(smearing):
    assert prepare(smearing, "map", weight=7, student=None).options == {"weight": 7, "student": None}


def test_methods_resolve_by_name_only():
    assert set(CLASSICAL) < set(METHODS)
    script = "import sys, dsnet_bluesky.desmearing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_non_stationary_operator_on_any_grid():
    """A dQ column on a logarithmic grid: MAP and the indirect transform take it as it is."""
    q = np.geomspace(0.05, 3.0, 160)
    fine = np.linspace(1e-3, 4.5, 20000)
    dq = 0.04 + 0.02 * q
    ideal = Smearing.pinhole(q, dq, q_calc=fine).apply(ball(fine))
    measured = curve(q, ideal, 0.01 * ideal)
    operator = Smearing.pinhole(q, dq)
    before = np.mean((np.log(ideal) - np.log(ball(q))) ** 2)
    for method in ("lake", "map", "ift"):
        result = desmear(measured, operator, method)
        assert np.mean((np.log(result["I"]) - np.log(ball(q))) ** 2) < before / 4
        assert float(result["chi2"]) < 2


class TestKernels:
    @given(width=st.floats(0.03, 0.2))
    @settings(max_examples=10, deadline=None)
    def test_gaussian_keeps_its_width(self, width):
        x = np.arange(0, 3, 0.01)
        rows = np.exp(-0.5 * ((x[100:200, None] - x) / width) ** 2)
        np.testing.assert_allclose(kernel_widths(rows, x), width, rtol=0.01)

    def test_identity_is_narrower_than_a_step(self):
        x = np.arange(0, 1, 0.01)
        assert (kernel_widths(np.eye(x.size), x) < 0.005).all()

    def test_positive_mean(self):
        means = positive_mean(np.array([0.0, 5.0, 1e6]), np.ones(3))
        np.testing.assert_allclose(means, [np.sqrt(2 / np.pi), 5.0, 1e6], rtol=1e-5)
        far_below = positive_mean(np.array([-1e3]), np.ones(1))
        np.testing.assert_allclose(far_below, 1e-3, rtol=1e-2)

    @pytest.mark.parametrize("apart", [1e-6, 1e-4, 0.02, 0.2])
    def test_points_that_nearly_coincide_leave_the_operator_an_average(self, apart):
        """Two detector settings that overlap, point beside point."""
        first = np.linspace(0.02, 1.0, 150)
        step = first[1] - first[0]
        q = np.sort(np.concatenate([first, first[60] + step * (apart + np.arange(200))]))
        smearing = Smearing.pinhole(q, 0.02)
        matrix = smearing.matrix @ straightened(smearing, np.eye(smearing.q_calc.size))
        assert abs(matrix).sum(axis=1).max() < 1.3
        fine = np.linspace(0, 3, 6001)
        truth, ideal = (1 / (1 + (3 * at) ** 2) ** 2 + 1e-3 for at in (q, fine))
        measured = Smearing.pinhole(q, 0.02, q_calc=fine).apply(ideal)
        noisy = measured * (1 + 0.02 * np.random.default_rng(1).standard_normal((8, q.size)))
        answer = desmear(curve(q, noisy, np.broadcast_to(0.02 * measured, noisy.shape)), smearing, "dsnet")
        assert np.sqrt(np.mean((answer["I"].values / truth - 1) ** 2)) < 0.012

    def test_straightened_curves_smear_right(self):
        exact = Smearing.gaussian(Q, SIGMA, q_calc=np.arange(0.0005, 3.6, 0.001))
        coarse = Smearing.gaussian(Q, SIGMA)
        truth = exact.apply(ball(exact.q_calc))
        plain = coarse.apply(ball(coarse.q_calc + 1e-12))
        straight = coarse.apply(straightened(coarse, ball(coarse.q_calc + 1e-12)))
        inner = slice(10, -10)
        assert np.abs(straight / truth - 1)[inner].max() < 0.1 * np.abs(plain / truth - 1)[inner].max()


class TestTails:
    GRID = np.linspace(0.1, 1.0, 91)

    @pytest.mark.parametrize(
        ("form", "law"),
        [
            ("constant", lambda q: 3.0 + 0 * q),
            ("linear", lambda q: 5.0 - 0.5 * q),
            ("power", lambda q: 2.0 * q**-3.2),
            ("porod", lambda q: 0.3 * q**-4.0 + 1.5),
        ],
    )
    def test_each_form_continues_its_law(self, form, law):
        slit = Smearing.slit(self.GRID, 1.0)
        filled = Tails(slit, form).fill(law(self.GRID), np.full(self.GRID.size, 0.01))
        np.testing.assert_allclose(filled, law(slit.q_calc), rtol=1e-8)

    def test_guinier_below(self):
        smearing = Smearing.gaussian(self.GRID, 0.04)
        law = lambda q: 7.0 * np.exp(-3.0 * q**2)  # noqa: E731
        filled = Tails(smearing).fill(law(self.GRID), np.full(self.GRID.size, 0.01))
        below = smearing.q_calc < self.GRID[0]
        assert below.sum() >= 5
        np.testing.assert_allclose(filled[below], law(smearing.q_calc)[below], rtol=1e-9)

    def test_a_tail_is_never_negative(self):
        slit = Smearing.slit(self.GRID, 5.0)
        filled = Tails(slit, "linear").fill(1.02 - self.GRID, np.full(self.GRID.size, 0.01))
        assert (filled >= 0).all()
        assert filled[-1] == 0

    def test_bad_options(self):
        smearing = Smearing.identity(self.GRID)
        with pytest.raises(BadInput, match="constant, linear, power, porod"):
            Tails(smearing, "cubic")
        with pytest.raises(BadInput, match="fewer than 2 points"):
            Tails(smearing, "linear", 2.0)


@pytest.mark.parametrize("sigma", [2.0, 10.0, 50.0, 1000.0])
def test_a_kernel_far_wider_than_the_curve_is_refused(sigma):
    """Folded at q = 0 and cut at the end of q_calc it looks narrower."""
    q = np.linspace(0.02, 3, 150)
    with pytest.raises(BadInput, match="shorter than the PSF"):
        prepare(Smearing.gaussian(q, sigma), "map")
    with pytest.raises(BadInput, match="shorter than the PSF"):
        prepare(Smearing.slit(q, 0.01, 2 * sigma), "map")


def test_wiener_gives_no_curve_of_zeros_for_noise():
    q = np.linspace(0.02, 3, 150)
    noise = curve(q, np.random.default_rng(1).normal(size=150), np.full(150, 3.0))
    with pytest.raises(BadInput, match="No frequency of the curve stands above its noise"):
        desmear(noise, Smearing.gaussian(q, 0.05), "wiener")


def test_dsnet_states_no_resolution_that_the_grid_cannot_show():
    q = np.arange(1, 301) * 0.01
    smearing = Smearing.slit(q, 0.3)
    I = smearing.apply(1 / (1 + (3 * smearing.q_calc) ** 2) ** 2 + 1e-3)
    assert desmear(curve(q, I, 0.02 * I), smearing, "dsnet")["Qdev"].min() >= 0.01 / np.sqrt(6) * (1 - 1e-9)

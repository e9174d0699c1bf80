"""What the network of dsnet 2 is told: invariant to units, finite for every curve, and exact where it claims to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.features import CHANNELS, INPUTS, MEANINGS, Operator, features_of, residual, start_curve, step
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.05, 3.0, 80)
SIGMA = 0.06
FINE = np.arange(0.0005, 3.8, 0.001)


def ball(q, R=3.0, background=0.05):
    x = q * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


def smeared_ball() -> np.ndarray:
    """Smeared on a grid far finer and wider than the one of the operator."""
    return Smearing.gaussian(Q, SIGMA, q_calc=FINE).apply(ball(FINE))


def test_cards_give_a_meaning_to_every_channel():
    assert sum(count for count, _ in MEANINGS) == CHANNELS == INPUTS["channels"]


@pytest.fixture(scope="module")
def operator() -> Operator:
    return Operator(Smearing.gaussian(Q, SIGMA))


def measured(noise: float = 0.03, exposures: int = 3) -> tuple[np.ndarray, np.ndarray]:
    ideal = smeared_ball()
    rng = np.random.default_rng(4)
    return ideal + noise * ideal * rng.standard_normal((exposures, Q.size)), np.tile(noise * ideal, (exposures, 1))


def curves_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Curves that only a detector could love: noise, negative values, zeros, peaks, steps, six decades."""
    rng = np.random.default_rng(seed)
    I = rng.standard_normal(Q.size) * 10 ** rng.uniform(-3, 3)
    form = rng.integers(6)
    if form == 1:
        I = -np.abs(I)
    elif form == 2:
        I[rng.random(Q.size) < 0.8] = 0
    elif form == 3:
        I[rng.integers(Q.size)] = 1e6
    elif form == 4:
        I = np.where(rng.uniform(0.5, 2.5) < Q, 1e-3, 1e3)
    elif form == 5:
        I = 1e3 * np.exp(-rng.uniform(1, 5) * Q)
    Idev = np.maximum(np.abs(I) * 10 ** rng.uniform(-4, 1), np.abs(I).max() * 10 ** rng.uniform(-8, -1)) + 1e-12
    return I, Idev


class TestOperator:
    def test_smooth_curves_are_smeared_better_than_by_hats(self, operator):
        """What lies between nodes is no straight line: `Operator` knows that of smooth curves."""
        smearing = operator.smearing
        truth = smeared_ball()
        inner = slice(5, -5)
        with_hats = smearing.apply(ball(smearing.q_calc + 1e-9))
        smooth = operator.apply(operator.tensor(ball(smearing.q_calc + 1e-9))).numpy()
        error, plain = (np.abs(np.log(curve / truth))[inner].max() for curve in (smooth, with_hats))
        assert error < 0.2 * plain

    def test_rows_sum_to_one(self, operator):
        np.testing.assert_allclose(operator.apply(torch.ones(operator.smearing.q_calc.size)), 1.0, rtol=1e-5)

    def test_nodes_hold_the_measured_points(self, operator):
        """A curve on q is found again at the nodes that are points of q, and held constant beyond."""
        smearing = operator.smearing
        nodes = operator.to_nodes(operator.tensor(Q)).numpy()
        np.testing.assert_allclose(nodes, np.clip(smearing.q_calc, Q[0], Q[-1]), rtol=1e-5)
        np.testing.assert_array_equal(operator.measured.numpy() > 0, np.isin(smearing.q_calc, Q))

    def test_nothing_is_called_measured_within_a_gap(self):
        q = np.delete(Q, slice(30, 40))
        operator = Operator(Smearing.gaussian(q, SIGMA), transform=False)
        nodes = operator.smearing.q_calc
        within = (nodes > Q[29] + 1e-9) & (nodes < Q[40] - 1e-9)
        assert within.sum() >= 9
        assert (operator.measured.numpy()[within] == 0).all()

    def test_resolutions_are_told_in_what_can_be_resolved(self):
        """A Gaussian's width; a slit's step, since its edge is sharp however long it is."""
        beam, slit = (Operator(smearing, transform=False) for smearing in (Smearing.gaussian(Q, 0.3), Smearing.slit(Q, 30.0)))
        inner = (beam.smearing.q_calc > 1) & (beam.smearing.q_calc < 2)
        np.testing.assert_allclose(beam.unit[inner], np.hypot(0.3, Q[1] - Q[0]), rtol=0.01)
        measured = slit.measured > 0
        np.testing.assert_allclose(slit.unit[measured], Q[1] - Q[0], rtol=0.05)
        assert slit.place[measured].diff().min() > 0.9

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_knows_q_in_steps_and_ratios_only(self, scale):
        """The same measurement in other units of length is the same measurement."""
        one, other = Operator(Smearing.gaussian(Q, SIGMA)), Operator(Smearing.gaussian(scale * Q, scale * SIGMA))
        torch.testing.assert_close(other.local, one.local, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.place, one.place, rtol=1e-4, atol=1e-4)
        I, Idev = measured()
        torch.testing.assert_close(features_of(other, I, Idev).channels, features_of(one, I, Idev).channels, rtol=1e-2, atol=1e-2)


class TestFeatures:
    def test_shapes(self, operator):
        features = features_of(operator, *measured())
        nodes = operator.smearing.q_calc.size
        assert features.channels.shape == (3, CHANNELS, nodes)
        assert features.start.shape == features.indirect.shape == (3, nodes)
        assert features.I.shape == features.Idev.shape == (3, Q.size)
        assert features.channels.dtype == torch.float32

    @settings(max_examples=12, deadline=None)
    @given(decades=st.floats(-6, 6), noise=st.sampled_from([1e-3, 0.03, 0.5]))
    def test_no_factor_on_the_intensity_is_seen(self, operator, decades, noise):
        I, Idev = measured(noise)
        one, other = features_of(operator, I, Idev), features_of(operator, 10**decades * I, 10**decades * Idev)
        torch.testing.assert_close(other.channels, one.channels, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.start, one.start, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.indirect, one.indirect, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(other.scale, 10**decades * one.scale, rtol=1e-9)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_finite_for_every_curve(self, operator, seed):
        I, Idev = curves_of(seed)
        features = features_of(operator, I[None], Idev[None])
        for part in features:
            assert torch.isfinite(part).all()
        assert features.channels.abs().max() < 100

    def test_nothing_measured_at_all(self, operator):
        assert torch.isfinite(features_of(operator, np.zeros((1, Q.size)), np.ones((1, Q.size))).channels).all()

    def test_sharp_peaks_beside_sharp_kernels(self):
        """R for smooth curves has small negative entries: a Bragg peak at the edge of a box must not turn a ratio negative."""
        width, rows = 0.2, []
        nodes = np.linspace(0.0, 3.4, 160)
        for q in Q:
            inside = np.abs(nodes - q) <= width
            rows.append(inside / inside.sum())
        box = Smearing(Q, nodes, np.array(rows))
        assert Operator(box, transform=False).matrix.min() < -1e-3
        peaks = 1e5 * np.exp(-0.5 * ((nodes[:, None] - [0.9, 1.8]) / 0.02) ** 2).sum(axis=1) + 1
        I = box.apply(peaks)[None]
        assert torch.isfinite(features_of(Operator(box), I, 1e-4 * I).channels).all()

    def test_a_curve_is_alone_in_its_batch(self, operator):
        """Nothing of one curve may leak into another, whatever its size and noise."""
        I, Idev = (np.array(part) for part in zip(*(curves_of(seed) for seed in range(8)), strict=True))
        together = features_of(operator, I, Idev)
        for k in range(8):
            alone = features_of(operator, I[k : k + 1], Idev[k : k + 1])
            torch.testing.assert_close(alone.channels[0], together.channels[k], rtol=1e-2, atol=1e-3)

    def test_the_truth_leaves_nothing_over(self, operator):
        ln_truth = operator.tensor(np.log(ball(operator.smearing.q_calc + 1e-9)))[None]
        I = operator.tensor(smeared_ball())[None]
        rest = residual(operator, ln_truth, I, 0.02 * I)
        nodes = operator.smearing.q_calc
        assert rest[:, nodes > 0.25].abs().max() < 0.02
        assert rest.abs().max() < 0.2  # at the lowest q, where the curve is even and the grid ends
        assert residual(operator, ln_truth + 0.1, I, 0.02 * I)[:, operator.measured > 0].abs().min() > 0.5

    def test_residuals_are_shown_where_something_was_measured(self, operator):
        ln_I = torch.zeros(1, operator.smearing.q_calc.size)
        I = operator.tensor(measured(exposures=1)[0])
        assert (residual(operator, ln_I, I, 0.01 * I)[:, operator.measured == 0] == 0).all()


class TestRichardsonLucy:
    """The multiplicative step: EM for counts I + Idev on a known background Idev."""

    @staticmethod
    def likelihood(R: Operator, ln_I: torch.Tensor, I: torch.Tensor, Idev: torch.Tensor) -> torch.Tensor:
        expected = R.apply(torch.exp(ln_I)) + Idev
        return ((I + Idev) * torch.log(expected) - expected).double().sum(dim=-1)

    @settings(max_examples=10, deadline=None)
    @given(noise=st.sampled_from([1e-3, 0.02, 0.3]), seed=st.integers(0, 99))
    def test_a_step_never_lowers_the_likelihood(self, operator, noise, seed):
        rng = np.random.default_rng(seed)
        ideal = smeared_ball()
        Idev = operator.tensor(noise * ideal)[None]
        I = operator.tensor(ideal * np.clip(1 + noise * rng.standard_normal(Q.size), 0.01, None))[None]
        ln_I = operator.to_nodes(torch.log(I))
        before = self.likelihood(operator, ln_I, I, Idev)
        for _ in range(10):
            ln_I = step(operator, ln_I, I, Idev)
            after = self.likelihood(operator, ln_I, I, Idev)
            assert after >= before - 1e-6 * before.abs()
            before = after

    def test_an_exact_solution_stays(self, operator):
        ln_truth = operator.tensor(np.log(ball(operator.smearing.q_calc + 1e-9)))[None]
        I = operator.apply(torch.exp(ln_truth))
        torch.testing.assert_close(step(operator, ln_truth, I, 0.01 * I), ln_truth, rtol=1e-4, atol=1e-4)

    def test_nodes_that_nothing_sees_stay(self):
        nodes = np.linspace(0.0, 6.0, 240)
        operator = Operator(Smearing.gaussian(Q, SIGMA, q_calc=nodes), transform=False)
        ln_I = torch.zeros(1, nodes.size)
        I = operator.tensor(measured(exposures=1)[0])
        moved = step(operator, ln_I, I, 0.01 * I)[0]
        assert (moved[operator.visible == 0] == 0).all()
        assert (operator.visible == 0).sum() > 50
        assert moved[operator.measured > 0].abs().min() > 0

    def test_it_desmears(self, operator):
        """Twenty steps come nearer to the truth than the measurement is, and so does what the network is shown."""
        features = features_of(operator, smeared_ball()[None], 1e-3 * smeared_ball()[None])
        nodes = operator.measured > 0
        truth = operator.tensor(np.log(ball(operator.smearing.q_calc + 1e-9)))[nodes]
        start = (features.start[0] + torch.log(features.scale[0]))[nodes]
        error = [((ln_I - truth) ** 2).mean() for ln_I in (start, operator.tensor(np.log(smeared_ball())))]
        assert error[0] < error[1] / 2


class TestStartCurve:
    def test_what_is_clear_is_left_as_it_is(self):
        I = torch.tensor(smeared_ball(), dtype=torch.float32)[None]
        torch.testing.assert_close(start_curve(I, 0.05 * I), torch.log(I))

    def test_always_finite(self):
        for I in (torch.zeros(1, 50), -torch.ones(1, 50), torch.full((1, 50), 1e-20)):
            assert torch.isfinite(start_curve(I, torch.ones(1, 50))).all()

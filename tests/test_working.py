"""The grid that a network works on: thinned where points are far closer than the smearing is wide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.desmearing.kernels import straightened, widths_below
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.working import LEAST_POINTS, MOST_STEPS, STEPS, Working

Q = np.linspace(0.1, 5.0, 1000)
SIGMA = 0.15


def ball(q, R=3.0, background=0.05):
    x = np.maximum(q, 1e-6) * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


@pytest.fixture(scope="module")
def working() -> Working:
    return Working(Smearing.gaussian(Q, SIGMA))


def test_thousands_of_points_become_hundreds():
    """A record of 4,000 points under a beam as wide as 200 of them."""
    q = np.linspace(0.002, 4.0, 4000)
    working = Working(Smearing.gaussian(q, 0.2))
    assert working.thinned
    assert LEAST_POINTS <= working.smearing.q.size < 400
    assert working.smearing.q_calc.size < 500
    assert working.smearing.q_calc[[0, -1]].tolist() == working.native.q_calc[[0, -1]].tolist()
    steps = widths_below(working.smearing) / np.gradient(working.smearing.q)
    assert np.median(steps) < MOST_STEPS


def test_what_is_left_alone_is_the_same_object():
    smearing = Smearing.gaussian(np.linspace(0.1, 5.0, 200), 0.1)
    working = Working(smearing)
    assert not working.thinned
    assert working.smearing is smearing
    I = np.ones((2, 200))
    assert working.curves(I, I)[0] is I
    ln_I = np.random.default_rng(0).standard_normal((2, smearing.q_calc.size))
    np.testing.assert_array_equal(working.interpolate(ln_I, smearing.q_calc), ln_I)
    np.testing.assert_array_equal(working.interpolate(ln_I, smearing.q), ln_I[:, np.isin(smearing.q_calc, smearing.q)])


@pytest.mark.parametrize("R", [0.5, 3.0])
def test_thinning_is_exact_for_smooth_curves(working, R):
    """Averages of a smeared curve are what the operator on the working grid makes of the ideal one."""
    fine = np.arange(0.001, 6.0, 0.002)
    native = Smearing.gaussian(Q, SIGMA, q_calc=fine).apply(ball(fine, R))
    averaged, _ = working.curves(native[None], native[None])
    nodes = working.smearing.q_calc
    thin = working.smearing.apply(straightened(working.smearing, ball(nodes, R)))
    np.testing.assert_allclose(thin[3:-3], averaged[0, 3:-3], rtol=2e-3)
    np.testing.assert_allclose(thin, averaged[0], rtol=0.02)


def test_rows_still_sum_to_one(working):
    np.testing.assert_allclose(working.smearing.matrix.sum(axis=1), 1.0, rtol=1e-9)
    assert (working.smearing.matrix >= -1e-12).all()


def test_errors_of_averages(working):
    """Independent errors fall with the root of the number, whether they are alike or not; measured against draws."""
    rng = np.random.default_rng(0)
    Idev = 0.1 * (1 + Q)[None]
    draws = rng.standard_normal((2000, Q.size)) * Idev
    averages, stated = working.curves(draws, np.broadcast_to(Idev, draws.shape))
    np.testing.assert_allclose(stated[0], averages.std(axis=0), rtol=0.12)
    _, counts = np.unique(working.groups, return_counts=True)
    assert counts.min() >= 1
    assert counts.max() >= 4


def test_averages_of_a_straight_line_lie_on_it(working):
    I, _ = working.curves(2 + 3 * Q[None], np.ones((1, Q.size)))
    np.testing.assert_allclose(I[0], 2 + 3 * working.smearing.q, rtol=1e-12)


def test_groups_are_narrower_than_the_smearing_resolves(working):
    widest = max(np.ptp(Q[working.groups == k]) for k in range(working.groups[-1] + 1))
    assert widest <= SIGMA / STEPS * 1.001
    assert (np.diff(working.groups) >= 0).all()


def test_gaps_are_not_bridged():
    """Points on both sides of a dead module are never averaged, however wide the smearing."""
    q = np.delete(Q, slice(350, 390))
    working = Working(Smearing.gaussian(q, SIGMA))
    assert working.thinned
    assert working.groups[349] < working.groups[350]
    assert not ((working.smearing.q > Q[349]) & (working.smearing.q < Q[390])).any()
    assert np.diff(working.smearing.q).max() == pytest.approx(Q[390] - Q[349], rel=0.15)


@pytest.mark.parametrize("width", [0.0, 0.005])
def test_slits_are_not_thinned(width):
    """A slit's sharp edge resolves what its length does not."""
    q = np.linspace(0.1, 5.0, 300)
    assert not Working(Smearing.slit(q, 2.0, width)).thinned


def test_never_below_the_least_points():
    """Ten widths in the record: averaged into widths over STEPS they would be too few to be a curve."""
    q = np.linspace(0.5, 1.5, 600)
    working = Working(Smearing.gaussian(q, 0.25))
    assert working.smearing.q.size >= LEAST_POINTS


@settings(max_examples=15, deadline=None)
@given(n=st.integers(60, 800), sigma=st.floats(0.005, 0.4), log=st.booleans(), gap=st.booleans())
def test_every_grid(n, sigma, log, gap):
    q = np.geomspace(0.02, 5.0, n) if log else np.linspace(0.02, 5.0, n)
    q = np.delete(q, slice(n // 3, n // 3 + n // 10)) if gap else q
    working = Working(Smearing.gaussian(q, sigma))
    thin = working.smearing
    assert (np.diff(thin.q) > 0).all()
    assert min(LEAST_POINTS, q.size) <= thin.q.size <= q.size
    np.testing.assert_allclose(thin.matrix.sum(axis=1), 1.0, rtol=1e-9)
    I, Idev = working.curves(np.ones((2, q.size)), np.ones((2, q.size)))
    assert I.shape == Idev.shape == (2, thin.q.size)
    np.testing.assert_allclose(I, 1.0)
    assert (Idev <= 1 + 1e-12).all()


class TestBack:
    def test_smooth_answers_come_back(self, working):
        nodes = working.smearing.q_calc
        ln_I = np.log(ball(nodes, 2.0))[None]
        back = working.interpolate(np.concatenate([ln_I, 2 * ln_I]), Q)
        np.testing.assert_allclose(back[0], np.log(ball(Q, 2.0)), atol=2e-3)
        np.testing.assert_allclose(back[1], 2 * back[0])

    def test_errors_stay_positive_and_straight(self, working):
        nodes = working.smearing.q_calc
        spiky = 1e-3 + (np.arange(nodes.size) % 7 == 0) * 1.0
        spread = working.spread(np.array([spiky, nodes]))
        assert spread.shape == (2, Q.size)
        assert (spread > 0).all()
        np.testing.assert_allclose(spread[1], Q, rtol=1e-9)
        assert working.spread(nodes).shape == (Q.size,)

    def test_an_operator_whose_nodes_are_not_the_points(self):
        """A matrix from elsewhere may have any q_calc."""
        q, nodes = np.linspace(0.1, 3.0, 100), np.linspace(0.0, 3.5, 333)
        working = Working(Smearing.gaussian(q, 0.05, q_calc=nodes))
        np.testing.assert_allclose(working.interpolate(np.sin(nodes), q), np.sin(q), atol=1e-6)

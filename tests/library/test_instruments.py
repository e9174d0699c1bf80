"""Random instruments: operators that keep what operators must, on the grid that desmears and on the one that measures."""

from __future__ import annotations

import numpy as np
import pytest

from dsnet_bluesky.desmearing.kernels import straightened, widths_below
from dsnet_bluesky.library.instruments import FINER, HIGHEST, KINDS, Instrument, draw_instrument

POINTS = (50, 100)
DRAWS = range(4)


@pytest.fixture(scope="module", params=KINDS)
def drawn(request) -> list[Instrument]:
    return [draw_instrument(np.random.default_rng(seed), request.param, POINTS) for seed in DRAWS]


def test_rows_sum_to_one_on_both_grids(drawn):
    for instrument in drawn:
        for smearing in (instrument.smearing, instrument.fine_smearing):
            np.testing.assert_allclose(smearing.matrix.sum(axis=1), 1.0, rtol=1e-6)
            assert smearing.matrix.min() > -1e-9


def test_truth_is_measured_on_a_finer_grid(drawn):
    """No inverse crime: each node of the operator that desmears is one of six of the one that measures."""
    for instrument in drawn:
        fine, nodes = instrument.fine, instrument.smearing.q_calc
        np.testing.assert_array_equal(fine[::FINER], nodes)
        assert (np.diff(fine) > 0).all()
        np.testing.assert_array_equal(instrument.fine_smearing.q, instrument.smearing.q)


def test_both_grids_smear_a_smooth_curve_alike(drawn):
    """The coarse operator is the fine one, but for what happens within a cell."""
    for instrument in drawn:
        width = 10 * np.hypot(widths_below(instrument.smearing).max(), np.gradient(instrument.smearing.q).max())

        def smooth(q, width=width):
            return 1 / (1 + (q / width) ** 2)

        nodes = instrument.smearing.q_calc
        coarse = instrument.smearing.apply(straightened(instrument.smearing, smooth(nodes)))
        np.testing.assert_allclose(coarse, instrument.fine_smearing.apply(smooth(instrument.fine)), rtol=2e-3)


def test_the_grid_covers_what_is_smeared_in(drawn):
    """The last nodes hold hardly any weight: what a kernel leaves beyond them would pile up there."""
    for instrument in drawn:
        q, nodes = instrument.smearing.q, instrument.smearing.q_calc
        assert nodes[0] <= q[0]
        assert nodes[-1] >= q[-1]
        if instrument.kind != "slit":  # it ends where it ends: the last point's last node is the end of the slit
            assert instrument.smearing.matrix[:-3, -1].max() < 0.05
        assert q[-1] == pytest.approx(HIGHEST)
        assert q[0] > 0


def test_neighbours_of_the_working_grid(drawn):
    """What a network is shown is not much wider than what `working` leaves it: 16 steps, and a wide step or two."""
    for instrument in drawn:
        steps = np.gradient(instrument.smearing.q)
        assert np.median(widths_below(instrument.smearing) / steps) < 30


def test_seeds_reproduce(drawn):
    for seed, instrument in zip(DRAWS, drawn, strict=True):
        again = draw_instrument(np.random.default_rng(seed), instrument.kind, POINTS)
        assert again.smearing.digest == instrument.smearing.digest
    assert len({instrument.smearing.digest for instrument in drawn}) == len(drawn)


def test_the_view_is_of_the_record(drawn):
    for instrument in drawn:
        q, view = instrument.smearing.q, instrument.view
        assert (view.lowest, view.highest) == (q[0], q[-1])
        assert view.step == pytest.approx(np.median(np.diff(q)))
        assert view.width >= 0


def test_kinds_come_by_their_shares():
    assert sum(share for share, _ in KINDS.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    kinds = {draw_instrument(rng, points=(50, 52)).kind for _ in range(12)}
    assert len(kinds) > 3
    assert kinds <= set(KINDS)


def test_gaps_and_spacings_occur():
    rng = np.random.default_rng(1)
    grids = [draw_instrument(rng, "gaussian", (100, 140)).smearing.q for _ in range(30)]
    uniform = [np.ptp(np.diff(q)) < 1e-6 for q in grids]
    gaps = [(np.diff(q)[5:-5] > 1.9 * np.minimum(np.diff(q)[4:-6], np.diff(q)[6:-4])).any() for q in grids]
    assert 5 < sum(uniform) < 25
    assert 2 < sum(gaps) < 20

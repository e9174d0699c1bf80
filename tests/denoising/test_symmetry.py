"""Frames come to their centre without a change of statistics, mates are mates, and broken symmetry is seen."""

import numpy as np
import pytest

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.denoising.rings import check_rings, conserve, ring_chi2, ring_sums, rings_about
from dsnet_bluesky.denoising.symmetry import CentredGrid, check_counts, find_centre, fold, mate, test_symmetry
from dsnet_bluesky.sim.anisotropic import AnisotropicScan

SHAPE = (40, 50)


def gradient(centre, shape=SHAPE):
    y, x = (np.arange(n) + 0.5 - c for n, c in zip(shape, centre, strict=True))
    return 20 + 0.3 * y[:, None] + 0.2 * x


@pytest.mark.parametrize("centre", [(20.0, 25.0), (18.5, 25.0), (13.0, 31.5), (20.0, 3.0)])
def test_a_pixel_and_its_mate_are_opposite_about_the_beam(centre):
    """Of a linear pattern the mean of both is its value at the beam, wherever that is."""
    grid = CentredGrid(SHAPE, centre)
    linear = (100 * gradient(centre)).round().astype(int)
    folded = fold(grid.deal(linear[None]), grid.valid(np.zeros(SHAPE, bool)))
    both = folded.readings == 2
    assert both.any()
    np.testing.assert_allclose(folded.counts[0][both] / 2, 2000, atol=1)


@pytest.mark.parametrize("centre", [(20.2, 24.9), (19.83, 25.25), (20.5, 25.01)])
def test_dealing_keeps_photons_poissonian_and_independent(centre):
    """Means are shifted by the fraction, variances equal means, neighbours do not correlate."""
    grid = CentredGrid(SHAPE, centre)
    mean = gradient(centre) / 5
    frames = grid.deal(np.random.default_rng(1).poisson(mean, (3000, *SHAPE)), seed=2)
    valid = grid.valid(np.zeros(SHAPE, bool))
    inside = frames[:, valid]
    y, x = ((np.arange(n) + 0.5 - n / 2) for n in grid.size)
    wanted = (20 + 0.3 * y[:, None] + 0.2 * x)[valid] / 5
    np.testing.assert_allclose(inside.mean(axis=0), wanted, atol=6 * np.sqrt(wanted.max() / 3000))
    assert inside.var(axis=0).mean() / inside.mean() == pytest.approx(1, abs=0.005)
    rest = frames - frames.mean(axis=0)
    assert abs((rest[:, 5:-5, 5:-6] * rest[:, 5:-5, 6:-5]).mean()) < 0.02 * inside.mean()


def test_no_photon_is_lost_on_the_way():
    grid = CentredGrid(SHAPE, (20.2, 24.8))
    counts = np.zeros((1, *SHAPE), int)
    counts[0, 5:-5, 5:-5] = 7
    assert grid.deal(counts).sum() == counts.sum()


@pytest.mark.parametrize("centre", [(20.0, 25.0), (20.2, 24.9), (11.77, 31.3)])
def test_the_way_back_undoes_the_way_there(centre):
    grid = CentredGrid(SHAPE, centre)
    y, x = (np.arange(n) + 0.5 - n / 2 for n in grid.size)
    centred = 20 + 0.3 * y[:, None] + 0.2 * x
    np.testing.assert_allclose(grid.back(centred[None])[0][1:-1, 1:-1], gradient(centre)[1:-1, 1:-1], atol=1e-9)


def test_a_mask_takes_away_what_it_touches_and_nothing_by_counts():
    mask = np.zeros(SHAPE, bool)
    mask[10, 10] = True
    grid = CentredGrid(SHAPE, (20.2, 25.0))
    valid = grid.valid(mask)
    assert (~valid[: SHAPE[0] - 1, :]).sum() == 2  # the pixel, and the one that gets a part of its photons
    whole = CentredGrid(SHAPE, (20.0, 25.0))
    readings = fold(np.zeros((1, *SHAPE), int), whole.valid(mask)).readings
    assert (readings == 1).sum() == 2
    assert readings[10, 10] == readings[mate(np.arange(2000).reshape(SHAPE))[10, 10] // 50, 39] == 1


@pytest.mark.parametrize("dose", [0.3, 3.0, 50.0])
def test_chi2_of_a_symmetric_pattern_is_one_within_its_error(dose):
    scan = AnisotropicScan.draw(2, "training", 5)
    found = np.array(
        [(t.chi2, t.error, t.broken) for t in (test_symmetry(scan.frames(dose, seed), ~scan.mask) for seed in range(40))]
    )
    pulls = (found[:, 0] - 1) / found[:, 1]
    assert abs(pulls.mean()) < 0.6
    assert 0.7 < pulls.std() < 1.35
    assert not found[:, 2].any()


def test_a_pixel_off_centre_is_seen_in_a_scan():
    """The trial: 1 px off at 3 photons gives an excess of some hundredths, lost in one frame and plain in a scan."""
    scan = AnisotropicScan.draw(24, "training", 3, centre=(64.0, 65.0))
    wrong = CentredGrid(scan.shape, (64.0, 64.0))
    found = test_symmetry(wrong.deal(scan.frames(3.0, 1)), wrong.valid(scan.mask))
    assert found.broken
    assert 1.01 < found.chi2 < 1.3
    assert find_centre(scan.frames(3.0, 1), scan.mask, (64.0, 64.0)) == (64.0, 65.0)


def test_pairs_far_from_a_mate_are_refused():
    with pytest.raises(BadInput, match="have a mate"):
        test_symmetry(np.ones((1, *SHAPE), int), np.arange(2000).reshape(SHAPE) < 900)
    with pytest.raises(BadInput, match="not on the frame"):
        CentredGrid(SHAPE, (41.0, 3.0))


@pytest.mark.parametrize(
    ("counts", "mask", "said"),
    [
        (np.ones(SHAPE), None, "exposure, y, x"),
        (np.ones((1, *SHAPE)), np.zeros((3, 3)), "shape"),
        (np.full((1, *SHAPE), 0.5), None, "fractions of counts"),
        (np.full((1, *SHAPE), -1), None, "not inverted"),
    ],
)
def test_what_are_no_counts_is_refused(counts, mask, said):
    with pytest.raises(BadInput, match=said):
        check_counts(counts, mask)


def test_rings_keep_their_sums_exactly():
    rng = np.random.default_rng(0)
    counts, mask = rng.poisson(2.0, (3, *SHAPE)), rng.random(SHAPE) < 0.1
    rings = rings_about((20.3, 24.1), SHAPE, mask)
    kept = conserve(rng.uniform(0.5, 3, (3, *SHAPE)), counts, rings)
    np.testing.assert_allclose(ring_sums(kept, rings), ring_sums(counts, rings), rtol=1e-12, atol=1e-12)


def test_ring_chi2_is_one_for_an_independent_frame_and_grows_with_bias():
    mean = np.full((400, *SHAPE), 3.0)
    rings = rings_about((20.0, 25.0), SHAPE, np.zeros(SHAPE, bool))
    counts = np.random.default_rng(0).poisson(mean)
    assert ring_chi2(mean, counts, rings).mean() == pytest.approx(1, abs=0.05)
    assert ring_chi2(1.1 * mean, counts, rings).mean() > 1.5
    with pytest.raises(BadInput, match="one integer for each"):
        check_rings(np.zeros(3, int), np.zeros(SHAPE, bool))
    with pytest.raises(BadInput, match="of a sector"):
        check_rings(np.where(np.arange(SHAPE[1]) < 10, rings, -1), np.zeros(SHAPE, bool))

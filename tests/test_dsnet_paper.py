import numpy as np
import pytest
import torch

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.dsnet_paper import DSNetPaper, interpolation, stationary_kernel
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.01, 5.01, 501)
SIGMA = 0.04
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def sphere(q, radius=3.0):
    x = np.maximum(q, 1e-3) * radius
    return 0.25 * 4 / 3 * np.pi * radius**3 * 10 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 0.001


def measure(q, sigma=SIGMA, scale=1.0):
    """Smear on a finer and wider grid than the one used to desmear."""
    fine = np.linspace(0, q[-1] + 6 * sigma, 12001)
    return scale * Smearing.gaussian(q, sigma, q_calc=fine).apply(sphere(fine))[None]


def log_error(smearing, I_calc, truth):
    return np.mean((np.log(smearing.at_q(I_calc)) - np.log(truth)) ** 2)


@pytest.fixture(scope="module")
def smearing():
    return Smearing.gaussian(Q, SIGMA)


@pytest.mark.parametrize("psf", ["operator", "stationary"])
def test_fine_tuning_brings_the_answer_back_to_the_measurement(smearing, psf):
    I = measure(Q)
    solution = DSNetPaper(smearing, iterations=40, psf=psf)(I, 0.01 * I)
    told = solution.diagnostics
    assert told["loss_last"][0] < 0.5 * told["loss_first"][0]
    assert solution.I_calc.shape == (1, smearing.q_calc.size)
    assert log_error(smearing, solution.I_calc, sphere(Q)) < 0.7 * np.mean((np.log(I) - np.log(sphere(Q))) ** 2)
    assert np.isnan(solution.Idev).all()
    assert list(solution.flags) == [0]


def test_network_desmears_what_it_was_trained_for():
    smearing = Smearing.gaussian(Q, 0.02)
    I = measure(Q, 0.02)
    solution = DSNetPaper(smearing, fine_tune=False)(I, I)
    assert log_error(smearing, solution.I_calc, sphere(Q)) < np.mean((np.log(I) - np.log(sphere(Q))) ** 2)
    assert list(solution.flags) == [0]


def test_each_curve_starts_from_the_released_weights(smearing):
    I = np.concatenate([measure(Q), 2 * measure(Q, 0.05)])
    method = DSNetPaper(smearing, iterations=3)
    together = method(I, I).I_calc
    np.testing.assert_array_equal(method(I, I).I_calc, together)
    np.testing.assert_allclose(method(I[1:], I[1:]).I_calc[0], together[1], rtol=1e-12)


@pytest.mark.parametrize("q", [np.linspace(0.05, 3, 301), np.geomspace(0.02, 4, 700), np.linspace(0.01, 5.01, 1001)])
def test_other_grids(q):
    smearing = Smearing.gaussian(q, SIGMA)
    I = measure(q)
    solution = DSNetPaper(smearing, iterations=5)(I, I)
    assert solution.I_calc.shape == (1, smearing.q_calc.size)
    assert np.isfinite(solution.I_calc).all()
    assert log_error(smearing, solution.I_calc, sphere(q)) < 1
    assert bool(solution.flags[0] & Flag.OUT_OF_RANGE) == (q[-1] < 5)


def test_other_units_are_moved_into_the_trained_range_and_flagged(smearing):
    I = measure(Q, scale=1e7)
    solution = DSNetPaper(smearing, iterations=5)(I, I)
    assert solution.flags[0] & Flag.OUT_OF_RANGE
    assert log_error(smearing, solution.I_calc, 1e7 * sphere(Q)) < 1


def test_operator_that_was_not_trained_is_flagged_without_fine_tuning(smearing):
    I = measure(Q)
    assert DSNetPaper(smearing, fine_tune=False)(I, I).flags[0] & Flag.OUT_OF_RANGE


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_intensity_without_a_logarithm_is_refused(smearing, value):
    I = measure(Q)
    I[0, 30] = value
    with pytest.raises(BadInput, match=r"1 intensities are zero or negative \(first at q = 0\.31 1/nm\).*map"):
        DSNetPaper(smearing)(I, np.ones_like(I))


@pytest.mark.parametrize("options", [{"psf": "gaussian"}, {"iterations": 0}, {"learning_rate": 0.0}, {"model": "nothing"}])
def test_wrong_options_are_refused(smearing, options):
    with pytest.raises(BadInput):
        DSNetPaper(smearing, **options)


def test_divergence_is_an_error(smearing):
    I = measure(Q)
    with pytest.raises(BadInput, match="learning_rate"):
        DSNetPaper(smearing, iterations=3, learning_rate=1e6)(I, I)


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_is_respected(smearing, device):
    I = measure(Q)
    with torch.device("meta"):
        solutions = [DSNetPaper(smearing, iterations=2, device=device, psf=psf)(I, I) for psf in ("operator", "stationary")]
    assert all(np.isfinite(s.I_calc).all() for s in solutions)


def test_interpolation_keeps_points_and_continues_guinier_and_power_laws():
    wide = np.linspace(0.0, 8.0, 801)
    matrix = interpolation(Q, wide)
    inside = (wide >= Q[0]) & (wide <= Q[-1])
    np.testing.assert_allclose(matrix[inside] @ np.sin(Q), np.interp(wide[inside], Q, np.sin(Q)), atol=1e-12)
    np.testing.assert_allclose(matrix[wide < Q[0]] @ (2 - 3 * Q**2), 2 - 3 * wide[wide < Q[0]] ** 2, atol=1e-9)
    np.testing.assert_allclose(matrix[wide > Q[-1]] @ (1 - 4 * np.log(Q)), 1 - 4 * np.log(wide[wide > Q[-1]]), atol=1e-9)
    np.testing.assert_allclose(interpolation(Q, Q), np.eye(Q.size), atol=1e-12)


def test_stationary_kernel_is_the_gaussian(smearing):
    kernel = stationary_kernel(smearing, 0.01)
    offsets = 0.01 * (np.arange(kernel.size) - kernel.size // 2)
    expected = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=2e-3)

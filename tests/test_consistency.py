"""Proximal steps: towards the measurement, and no further than the answer's own error allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.consistency import CORRELATION_LENGTHS, correlation, counted, proximal
from dsnet_bluesky.features import Operator
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.05, 3.0, 80)
FINE = np.arange(0.0005, 3.8, 0.001)
SHARES = (0.3, 0.5, 0.1, 0.0)


def ball(q, R=3.0, background=0.5):
    x = np.maximum(q, 1e-6) * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


@pytest.fixture(scope="module")
def operator() -> Operator:
    return Operator(Smearing.gaussian(Q, 0.06), transform=False)


@pytest.fixture(scope="module")
def correlated(operator) -> torch.Tensor:
    return correlation(operator.place.double(), SHARES)


@pytest.fixture(scope="module")
def truth(operator) -> torch.Tensor:
    return torch.tensor(np.log(ball(operator.smearing.q_calc)))[None]


def measured(noise: float = 0.02, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ideal = Smearing.gaussian(Q, 0.06, q_calc=FINE).apply(ball(FINE))
    I = ideal * (1 + noise * np.random.default_rng(seed).standard_normal(Q.size))
    return torch.tensor(I)[None], torch.tensor(noise * ideal)[None]


def chi2(operator: Operator, ln_I: torch.Tensor, I: torch.Tensor, Idev: torch.Tensor) -> float:
    rest = (torch.exp(ln_I.double()) @ operator.matrix.double().T - I) / Idev
    return float(rest.square().mean())


def wrong(operator: Operator, size: float) -> torch.Tensor:
    """An error as a network makes it: smooth over a few resolutions."""
    return size * torch.sin(2 * operator.place.double() / 3)[None]


def ones(operator: Operator) -> torch.Tensor:
    return torch.ones(1, operator.smearing.q_calc.size, dtype=torch.float64)


@settings(max_examples=10, deadline=None)
@given(size=st.floats(0.1, 1.0), noise=st.sampled_from([0.003, 0.02, 0.1]), seed=st.integers(0, 99))
def test_the_answer_comes_to_meet_the_measurement(operator, correlated, truth, size, noise, seed):
    I, Idev = measured(noise, seed)
    start = truth + wrong(operator, size)
    moved = proximal(operator, start, size * ones(operator), correlated, I, Idev)
    before, after = chi2(operator, start, I, Idev), chi2(operator, moved.ln_I, I, Idev)
    assert after < before
    assert after < 1.5
    seen = operator.measured > 0
    error = [float((ln_I - truth)[:, seen].square().mean()) for ln_I in (start, moved.ln_I)]
    assert error[1] < error[0]


def test_an_answer_within_its_error_stays(operator, correlated, truth):
    """Where smeared again it is the measurement, nothing pulls."""
    I = torch.exp(truth) @ operator.matrix.double().T
    moved = proximal(operator, truth, 0.3 * ones(operator), correlated, I, 0.02 * I)
    torch.testing.assert_close(moved.ln_I, truth, rtol=0, atol=1e-9)


def test_chance_moves_it_by_less_than_its_error(operator, correlated, truth):
    I, Idev = measured(0.02, seed=5)
    error = 0.05 * ones(operator)
    moved = proximal(operator, truth, error, correlated, I, Idev)
    assert ((moved.ln_I - truth).abs() < 2 * error).all()
    assert (moved.ln_I - truth).square().mean().sqrt() < 0.6 * error.mean()


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_the_measurement_makes_the_error_smaller(operator, correlated, truth, size):
    I, Idev = measured(0.005)
    error = size * ones(operator)
    moved = proximal(operator, truth + wrong(operator, size / 2), error, correlated, I, Idev)
    assert (moved.error <= error * (1 + 1e-9)).all()
    assert (moved.error > 0).all()
    seen = operator.measured > 0
    assert moved.error[:, seen].mean() < 0.9 * error.mean()


def test_the_error_is_that_of_the_truth(operator, correlated, truth):
    """Proposals drawn from their stated error: what is returned holds the truth as often as it says."""
    rng = np.random.default_rng(1)
    root = torch.linalg.cholesky(correlated + 1e-9 * torch.eye(len(correlated)))
    z = []
    for seed in range(40):
        I, Idev = measured(0.02, seed)
        start = truth + 0.1 * torch.tensor(rng.standard_normal(len(root))) @ root.T
        moved = proximal(operator, start, 0.1 * ones(operator), correlated, I, Idev)
        z.append((moved.ln_I - truth) / moved.error)
    seen = operator.measured > 0
    assert 0.85 < torch.cat(z)[:, seen].square().mean().sqrt() < 1.15


def test_nearly_linear_problem_has_the_closed_answer(operator, correlated, truth):
    """Small errors: the posterior of a linear model with Gaussian prior and noise, written down in two lines."""
    size = 1e-3
    I, Idev = measured(2e-3)
    start = truth + wrong(operator, size)
    J = operator.matrix.double().numpy() * np.exp(start[0].numpy())
    prior = size**2 * correlated.numpy()
    gain = prior @ J.T @ np.linalg.inv(J @ prior @ J.T + np.diag(Idev[0].numpy() ** 2))
    mean = start[0].numpy() + gain @ (I[0].numpy() - J.sum(axis=1))
    error = np.sqrt(np.diag(prior - gain @ J @ prior))
    moved = proximal(operator, start, size * ones(operator), correlated, I, Idev)
    np.testing.assert_allclose(moved.ln_I[0], mean, atol=2e-5)
    np.testing.assert_allclose(moved.error[0], error, rtol=5e-3)


def test_what_is_known_is_not_moved(operator, correlated, truth):
    """Half the curve with an error of nearly nothing, half of a third."""
    left = torch.tensor(operator.smearing.q_calc < 1.5)[None]
    error = torch.where(left, 1e-5, 0.3).double()
    I, Idev = measured(0.01)
    start = truth + wrong(operator, 0.2)
    moved = proximal(operator, start, error, correlated, I, Idev)
    assert (moved.ln_I - start)[left].abs().max() < 1e-3
    assert (moved.ln_I - start)[~left].abs().max() > 0.1


def test_curves_are_alone_in_their_batch(operator, correlated, truth):
    I, Idev = (torch.cat(part) for part in zip(measured(0.02, 0), measured(0.2, 1), strict=True))
    start = torch.cat([truth + wrong(operator, 0.2), truth - wrong(operator, 0.5)])
    error = 0.2 * torch.cat([ones(operator)] * 2)
    together = proximal(operator, start, error, torch.stack([correlated] * 2), I, Idev)
    for k in range(2):
        row = slice(k, k + 1)
        alone = proximal(operator, start[row], error[row], correlated[None], I[row], Idev[row])
        torch.testing.assert_close(alone.ln_I[0], together.ln_I[k])
        torch.testing.assert_close(alone.error[0], together.error[k])


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1e200])
def test_a_hopeless_curve_leaves_the_others_alone(operator, correlated, truth, error):
    I, Idev = (torch.cat([part, part]) for part in measured())
    start, errors = torch.cat([truth, truth]) + wrong(operator, 0.2), 0.2 * torch.cat([ones(operator)] * 2)
    errors[1] = error
    found = proximal(operator, start, errors, torch.stack([correlated] * 2), I, Idev).ln_I
    alone = proximal(operator, start[:1], errors[:1], correlated[None], I[:1], Idev[:1]).ln_I
    torch.testing.assert_close(found[:1], alone)
    assert found[1].isnan().all()


def test_no_step_is_larger_than_can_be_trusted(operator, correlated, truth):
    """A measurement a million times off: four steps of at most 1 in ln I."""
    I, Idev = measured()
    moved = proximal(operator, truth, 3.0 * ones(operator), correlated, 1e6 * I, 1e6 * Idev)
    assert (moved.ln_I - truth).abs().max() <= 4 + 1e-9
    assert torch.isfinite(moved.error).all()


@pytest.mark.parametrize("relative", [1e-6, 1e-9, 1e-14])
def test_errors_of_nearly_nothing(operator, correlated, truth, relative):
    """Simulated curves come with such errors; an answer is owed all the same."""
    I, _ = measured(0.0)
    start = truth + wrong(operator, 0.3)
    moved = proximal(operator, start, 0.3 * ones(operator), correlated, I, relative * I)
    assert torch.isfinite(moved.ln_I).all()
    assert chi2(operator, moved.ln_I, I, I) < 1e-4 * chi2(operator, start, I, I)


class TestCorrelation:
    @settings(max_examples=20, deadline=None)
    @given(shares=st.lists(st.floats(0, 1), min_size=4, max_size=4), seed=st.integers(0, 99))
    def test_is_a_correlation(self, shares, seed):
        total = sum(shares)
        shares = [share / total for share in shares] if total > 1 else shares
        place = torch.tensor(np.random.default_rng(seed).uniform(0, 0.5, 60).cumsum())
        found = correlation(place, shares)
        torch.testing.assert_close(found, found.mT)
        torch.testing.assert_close(found.diagonal(), torch.ones(60, dtype=torch.float64), rtol=0, atol=2e-3)
        assert torch.linalg.eigvalsh(found).min() > 0
        assert found.abs().max() < 1.002

    def test_falls_with_the_distance(self):
        found = correlation(torch.arange(50, dtype=torch.float64), (0.0, 1.0, 0.0, 0.0))
        np.testing.assert_allclose(found[0, 3], np.exp(-0.5 * (3 / CORRELATION_LENGTHS[1]) ** 2), rtol=1e-9)

    def test_counts_in_resolutions(self):
        q = torch.linspace(0, 1, 101, dtype=torch.float64)
        torch.testing.assert_close(counted(q, torch.full_like(q, 0.05)), 20 * q)
        uneven = counted(q, 0.05 * (1 + q)).diff()
        assert (uneven.diff() < 0).all()  # the same step is less where the resolution is worse

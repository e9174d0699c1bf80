"""The indirect transform for many curves at once, against the truth and against the method `ift`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky import indirect
from dsnet_bluesky.data import curve
from dsnet_bluesky.desmearing import prepare
from dsnet_bluesky.features import Operator
from dsnet_bluesky.indirect import Indirect
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.05, 4.0, 160)
SIGMA = 0.05
FINE = np.arange(0.0005, 4.6, 0.001)


def ball(q, R=3.0, background=0.05):
    x = q * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


def peaks(q):
    """Orders of a lattice: sharper than any finite particle of the range would have them."""
    return 1 + 100 * np.exp(-0.5 * ((q[:, None] - 0.83 * np.arange(1, 5)) / 0.004) ** 2).sum(axis=1)


def smeared(ideal, sigma=SIGMA):
    """Smeared on a grid far finer and wider than the one of the operator."""
    return Smearing.gaussian(Q, sigma, q_calc=FINE).apply(ideal(FINE))


def tensors(*arrays) -> list[torch.Tensor]:
    return [torch.tensor(np.atleast_2d(array), dtype=torch.float64) for array in arrays]


@pytest.fixture(scope="module")
def smearing() -> Smearing:
    return Smearing.gaussian(Q, SIGMA)


@pytest.fixture(scope="module")
def operator(smearing) -> Operator:
    return Operator(smearing)


@pytest.fixture(scope="module")
def method(smearing):
    return prepare(smearing, "ift")


@pytest.fixture(autouse=True, scope="module", params=[0, 1000], ids=["together", "one by one"])
def few(request) -> Iterator[None]:
    """All go both ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indirect, "FEW", request.param)
        yield


def fit(operator: Operator, I: torch.Tensor, Idev: torch.Tensor) -> Indirect:
    assert operator.ladder is not None
    return operator.ladder(I, Idev)


def at_q(operator: Operator, values: torch.Tensor) -> np.ndarray:
    return values.numpy()[..., np.isin(operator.smearing.q_calc, Q)]


def test_sphere_without_noise(operator):
    ideal = smeared(ball)
    found = fit(operator, *tensors(ideal, 1e-4 * ideal))
    np.testing.assert_allclose(at_q(operator, found.ln_I)[0], np.log(ball(Q)), atol=1e-3)
    assert found.chi2 < 1


@settings(max_examples=8, deadline=None)
@given(R=st.floats(1.0, 8.0), seed=st.integers(0, 2**31))
def test_spheres_with_noise(operator, R, seed):
    """Fitted as well as the noise allows, with an error that holds the truth."""
    ideal = smeared(lambda q: ball(q, R, 0.5))
    measured = ideal * (1 + 0.02 * np.random.default_rng(seed).standard_normal(Q.size))
    found = fit(operator, *tensors(measured, 0.02 * ideal))
    assert 0.6 < found.chi2 < 1.4
    z = (at_q(operator, found.ln_I)[0] - np.log(ball(Q, R, 0.5))) / at_q(operator, found.deviation)[0]
    assert 0.3 < np.sqrt(np.mean(z**2)) < 2.5


def test_rank_is_the_diameter(operator):
    curves = np.array([smeared(lambda q, R=R: ball(q, R, 0.5)) for R in (0.8, 2.0, 5.0)])
    found = fit(operator, *tensors(curves, 1e-3 * curves))
    assert (found.rank.diff() > 0).all()
    assert 0 <= found.rank.min() <= found.rank.max() <= 1


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_agrees_with_the_method(operator, method, noise):
    ideal = smeared(ball)
    measured = ideal * (1 + noise * np.random.default_rng(3).standard_normal((4, Q.size)))
    Idev = np.tile(noise * ideal, (4, 1))
    found, result = fit(operator, *tensors(measured, Idev)), method(curve(Q, measured, Idev))
    ln_I, deviation = at_q(operator, found.ln_I), at_q(operator, found.deviation)
    # Both of one series and one prior; they differ in how finely diameters and ridges are tried.
    apart = np.abs(ln_I - np.log(result["I"].values))
    assert np.median(apart / deviation) < 0.5
    np.testing.assert_allclose(found.chi2.numpy(), result["chi2"].values, rtol=0.1)
    truth = np.log(ball(Q))
    assert ((ln_I - truth) ** 2).mean() < 1.5 * ((np.log(result["I"].values) - truth) ** 2).mean()


def test_a_lattice_is_no_particle():
    """What tells the network to look elsewhere: a misfit far beyond chance."""
    ideal = smeared(peaks, 0.02)
    operator = Operator(Smearing.gaussian(Q, 0.02))
    found = fit(operator, *tensors(ideal, 0.01 * ideal))
    assert found.chi2 > 10


def test_the_scan_misses_nothing(operator, monkeypatch):
    """Diameters and ridges that are left out would not have been chosen."""
    ideals = np.array([smeared(lambda q, R=R: ball(q, R, 0.5)) for R in (0.5, 1.0, 2.0, 4.0, 8.0)] + [smeared(peaks, 0.02)])
    curves = ideals * (1 + 0.01 * np.random.default_rng(5).standard_normal(ideals.shape))
    quick = fit(operator, *tensors(curves, 0.01 * ideals))
    monkeypatch.setattr(indirect, "PATIENCE", 1000)
    monkeypatch.setattr(indirect, "SMALL", 1000)
    for part, whole in zip(quick, fit(operator, *tensors(curves, 0.01 * ideals)), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [1e-3, 0.02, 0.3])
def test_one_by_one_is_as_together(operator, monkeypatch, noise):
    """Few curves go another way to the same answer; what has no answer has none either way."""
    balls = [smeared(lambda q, R=R: ball(q, R, 0.5)) for R in (0.5, 2.0, 8.0)]
    ideals = np.array([*balls, smeared(peaks, 0.02), np.ones(Q.size), np.ones(Q.size)])
    curves = ideals * (1 + noise * np.random.default_rng(8).standard_normal(ideals.shape))
    curves[-2], curves[-1, 3] = 0.0, np.nan
    I, Idev = tensors(curves, noise * ideals)
    monkeypatch.setattr(indirect, "FEW", len(curves))
    alone = fit(operator, I, Idev)
    monkeypatch.setattr(indirect, "FEW", 0)
    for part, whole in zip(alone, fit(operator, I, Idev), strict=True):
        torch.testing.assert_close(part[:-1], whole[:-1], rtol=1e-5, atol=1e-6)
    assert alone.ln_I[-1].isnan().all()


def test_no_factor_is_no_answer_of_others(operator):
    """Curves whose matrices have no Cholesky factor leave the rest of their batch alone."""
    ideal = smeared(ball)
    I = np.array([ideal, np.full_like(ideal, np.nan)])
    alone, together = fit(operator, *tensors(ideal, 0.01 * ideal)), fit(operator, *tensors(I, 0.01 * np.tile(ideal, (2, 1))))
    torch.testing.assert_close(together.ln_I[:1], alone.ln_I, rtol=1e-4, atol=1e-5)
    assert together.ln_I[1].isnan().all()


def test_curves_are_alone_in_their_batch(operator):
    curves = np.array([smeared(lambda q, R=R: ball(q, R)) for R in (1.0, 3.0, 7.0)]) * [[1e-3], [1.0], [1e3]]
    together = fit(operator, *tensors(curves, 0.01 * curves))
    for k in range(3):
        alone = fit(operator, *tensors(curves[k], 0.01 * curves[k]))
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], whole[k], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_no_unit_of_intensity(operator, factor):
    I = smeared(ball)
    one, other = fit(operator, *tensors(I, 0.01 * I)), fit(operator, *tensors(factor * I, factor * 0.01 * I))
    torch.testing.assert_close(other.ln_I, one.ln_I + np.log(factor), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(other.deviation, one.deviation, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.chi2, one.chi2, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decades=st.floats(-8, 2))
def test_finite_for_noise(operator, seed, decades):
    rng = np.random.default_rng(seed)
    I = rng.standard_normal((2, Q.size)) + rng.uniform(-1, 1)
    found = fit(operator, *tensors(I, 10**decades * (0.1 + rng.random((2, Q.size)))))
    for part in found:
        assert torch.isfinite(part).all()
    assert (found.deviation > 0).all()


def test_nothing_but_zeros_is_next_to_nothing(operator):
    found = fit(operator, *tensors(np.zeros((2, Q.size)), np.ones((2, Q.size))))
    assert torch.isfinite(found.ln_I).all()
    assert (found.ln_I.exp() < 2).all()
    assert found.chi2.max() < 0.01


def test_no_curves_have_no_answers(operator):
    assert [len(part) for part in fit(operator, *tensors(np.zeros((0, Q.size)), np.ones((0, Q.size))))] == [0] * 4


@pytest.mark.parametrize("points", [5, 12])
def test_short_records(points):
    q = np.linspace(0.1, 1.0, points)
    operator = Operator(Smearing.gaussian(q, 0.1))
    I = operator.smearing.apply(ball(operator.smearing.q_calc + 1e-9, 2.0))
    found = fit(operator, *tensors(I, 0.01 * I))
    assert torch.isfinite(found.ln_I).all()
    assert found.chi2 < 2

"""The network of dsnet 2, untrained: where it starts from, what it must take, and what it must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.features import CHANNELS, Operator, features_of, residual
from dsnet_bluesky.library.instruments import KINDS, draw_instrument
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.unrolled import BETWEEN, LARGEST, SMALLEST, Answer, Unrolled, UnrolledConfig, between, blend

TINY = UnrolledConfig(channels=(4, 6), kernel=3, hidden=2)
ALONE = UnrolledConfig(channels=(4, 6), kernel=3, hidden=0, unets=1)
Q = np.linspace(0.05, 3.0, 80)


def ball(q, R=3.0, background=0.05):
    x = np.maximum(q, 1e-6) * R
    return 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


def measure(fine_smearing: Smearing, seed: int = 0, noise: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
    ideal = fine_smearing.apply(ball(fine_smearing.q_calc))
    return (ideal * (1 + noise * np.random.default_rng(seed).standard_normal((2, ideal.size))), np.tile(noise * ideal, (2, 1)))


def seeded(config: UnrolledConfig = TINY, seed: int = 0) -> Unrolled:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Unrolled(config).eval().requires_grad_(False)


def with_heads_at_zero() -> Unrolled:
    network = seeded()
    for unet in (network.propose, network.refine):
        for parameter in unet.out.parameters():
            parameter.zero_()
    return network


@pytest.fixture(scope="module")
def operator() -> Operator:
    return Operator(Smearing.gaussian(Q, 0.06))


@pytest.fixture(scope="module")
def features(operator):
    fine = np.arange(0.0005, 3.8, 0.001)
    return features_of(operator, *measure(Smearing.gaussian(Q, 0.06, q_calc=fine)))


def test_it_starts_from_the_classical_answers(operator, features):
    """Before training nothing is proposed: twenty Richardson-Lucy steps, a little of the indirect transform in them."""
    answer = with_heads_at_zero()(operator, features)
    first = blend(features.start, features.indirect, torch.tensor(-1.0))
    torch.testing.assert_close(answer.first, first)
    torch.testing.assert_close(answer.ln_I, blend(first, features.indirect, torch.tensor(-2.0)))
    apart = (features.indirect - features.start).abs()
    assert ((answer.ln_I - features.start).abs() <= 0.15 * apart + 1e-5).all()


def test_random_heads_change_hardly_anything(operator, features):
    quiet, fresh = with_heads_at_zero()(operator, features), seeded()(operator, features)
    assert (quiet.ln_I - fresh.ln_I).abs().max() < 0.1


@pytest.mark.parametrize("gate", [-50.0, 50.0])
def test_the_gate_chooses(gate):
    proposed, indirect = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(blend(proposed, indirect, torch.tensor(gate)), indirect if gate > 0 else proposed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_instrument_is_taken(kind):
    """Whatever the grid and the kernel: the network knows none of its own."""
    for seed in range(2):
        instrument = draw_instrument(np.random.default_rng(seed), kind, points=(50, 80))
        operator = Operator(instrument.smearing)
        features = features_of(operator, *measure(instrument.fine_smearing, seed))
        answer = seeded()(operator, features)
        nodes = instrument.smearing.q_calc.size
        assert answer.ln_I.shape == answer.ln_error.shape == answer.ln_share.shape == answer.ln_resolved.shape == (2, nodes)
        for part in answer:
            assert torch.isfinite(part).all()


@pytest.mark.parametrize("unets", [1, 2])
@pytest.mark.parametrize("points", [5, 51, 64, 83])
def test_any_number_of_points(points, unets):
    q = np.linspace(0.1, 3.0, points)
    operator = Operator(Smearing.gaussian(q, 1.2 * (q[1] - q[0])))
    features = features_of(operator, *measure(operator.smearing))
    deep = UnrolledConfig(channels=(4, 4, 4, 4, 6), kernel=5, hidden=2, unets=unets)
    answer = seeded(deep)(operator, features)
    assert answer.ln_I.shape == (2, operator.smearing.q_calc.size)
    assert torch.isfinite(answer.ln_I).all()


@pytest.mark.parametrize("config", [ALONE, TINY])
def test_answers_do_not_depend_on_the_batch(operator, features, config):
    network = seeded(config)
    together = network(operator, features)
    for k in range(2):
        alone = network(operator, type(features)(*(part[k : k + 1] for part in features)))
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], whole[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [ALONE, TINY])
def test_errors_and_shares_stay_within_bounds(operator, features, config):
    network = seeded(config)
    for sign in (-1, 1):
        for parameter in (network.refine or network.propose).out.parameters():
            parameter.fill_(sign * 1e3)
        answer = network(operator, features)
        assert (answer.ln_error >= SMALLEST).all()
        assert (answer.ln_error <= LARGEST).all()
        assert (answer.ln_share <= 0).all()  # noise is part of the error


@pytest.mark.parametrize("config", [ALONE, TINY])
def test_parts_of_the_error_cannot_disturb_the_answer(operator, features, config):
    """The head for parts learns last: its loss must reach no other weight."""
    network = seeded(config).requires_grad_(True)
    answer = network(operator, features)
    (answer.ln_share.sum() + answer.ln_resolved.sum()).backward()
    touched = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert touched == {"split"}
    seen = network.seen_by_split(operator, features)
    for part, again in zip(network.parts(seen), (answer.ln_share, answer.ln_resolved), strict=True):
        torch.testing.assert_close(part, again)


class TestBetween:
    """What the second U-Net is shown of the first one's proposal."""

    def test_shape(self, operator, features):
        assert between(operator, features, features.start).shape == (2, BETWEEN, operator.smearing.q_calc.size)
        assert features.channels.shape[1] == CHANNELS

    def test_the_truth_has_small_residuals(self, operator, features):
        ln_truth = (operator.tensor(np.log(ball(operator.smearing.q_calc))) - torch.log(features.scale)).float()
        shown, started = (between(operator, features, ln_I)[:, 2] for ln_I in (ln_truth, ln_truth + 0.5))
        assert shown.abs().mean() < 0.6
        assert started[:, operator.measured > 0].abs().mean() > 1

    def test_half_precision_does_not_reach_the_operator(self, operator, features):
        """Training runs the convolutions in bfloat16, of three digits; of small errors they would leave nothing."""
        network, seen = seeded(), []
        sharp = features._replace(Idev=1e-3 * features.I.abs())
        network.refine.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0][:, CHANNELS + 2], inputs[0])))
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                first = network(operator, sharp).first
            expected = residual(operator, first.float(), sharp.I, sharp.Idev)
            torch.testing.assert_close(seen[-1][0].float(), expected, rtol=1e-3, atol=1e-3)


def test_one_unet_answers_with_what_it_proposes(operator, features):
    network = seeded(ALONE)
    answer = network(operator, features)
    assert network.refine is None
    torch.testing.assert_close(answer.ln_I, answer.first)


@pytest.mark.parametrize("unets", [0, 3])
def test_other_numbers_of_unets_are_refused(unets):
    with pytest.raises(BadInput, match="one U-Net or two"):
        UnrolledConfig(unets=unets)


def test_configuration_survives_a_card():
    for config in (TINY, ALONE):
        assert UnrolledConfig.from_dict(config.to_dict()) == config
    older = {"channels": [4, 6], "kernel": 3, "hidden": 2}  # a card without `unets`
    assert UnrolledConfig.from_dict(older) == TINY
    assert type(TINY.to_dict()["channels"]) is list
    assert Unrolled().config == UnrolledConfig()
    assert 1_000_000 < Unrolled().parameter_count < 1_300_000


def test_answer_is_told_in_logarithms_of_one_scale(operator, features):
    """A factor on the curve is a factor on the answer, and leaves its error alone."""
    network = seeded()
    I, Idev = (np.asarray(part * features.scale) for part in (features.I, features.Idev))
    one, other = (network(operator, features_of(operator, f * I, f * Idev)) for f in (1.0, 1e4))
    for name in Answer._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-3)

"""The network and its losses."""

import pytest
import torch

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.icosahedra.network import (
    LOSSES,
    RADIUS,
    Answer,
    NetworkConfig,
    ResNet,
    decoded,
    relative_errors,
)
from dsnet_bluesky.icosahedra.rotations import REAL, group, multiply, random_quaternions, reduced

SMALL = NetworkConfig(width=1 / 16, blocks=(1, 1, 1, 1))


def truths(count=50, seed=0):
    low, high = RADIUS
    radius = low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Answer(radius, random_quaternions(count, seed))


def test_published_network_has_its_parameters():
    with torch.device("meta"):
        assert ResNet().parameter_count == pytest.approx(26.0e6, rel=0.005)
        assert ResNet(NetworkConfig(width=0.25)).parameter_count == pytest.approx(1.63e6, rel=0.005)


def test_outputs_reach_the_whole_range_and_a_little_beyond():
    low, high = (decoded(torch.full((5,), end)) for end in (-1.0, 1.0))
    assert low.radius < RADIUS[0] < RADIUS[1] < high.radius
    assert low.quaternion[0] < REAL[0]
    assert float(decoded(torch.zeros(5)).radius) == pytest.approx(sum(RADIUS) / 2)


def test_images_of_a_batch_do_not_mix_when_it_answers():
    network, images = ResNet(SMALL).eval(), torch.randn(3, 128, 128)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


def test_every_parameter_learns():
    torch.manual_seed(0)
    network = ResNet(SMALL)
    network(torch.randn(8, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_config_survives_its_dictionary():
    assert NetworkConfig.from_dict(SMALL.to_dict()) == SMALL


def test_no_filter_is_refused():
    with pytest.raises(BadInput, match="leaves no filter"):
        ResNet(NetworkConfig(width=0.001))


def test_a_right_answer_has_no_error():
    truth = truths()
    answer = truth._replace(quaternion=reduced(truth.quaternion))
    for symmetric in (False, True):
        torch.testing.assert_close(relative_errors(answer, truth, symmetric=symmetric), torch.zeros(50, 5).double())
    for loss in LOSSES.values():
        assert float(loss(answer, truth)) < 1e-12


def test_errors_are_parts_of_the_range():
    truth = truths()
    off = Answer(truth.radius + 13, reduced(truth.quaternion))
    torch.testing.assert_close(relative_errors(off, truth)[:, 4], torch.full((50,), 0.1).double())


def test_the_symmetric_loss_takes_any_equivalent_the_papers_only_one():
    truth = truths()
    answer = truth._replace(quaternion=multiply(reduced(truth.quaternion), group()[23]))
    assert float(LOSSES["symmetric"](answer, truth)) < 1e-12
    assert float(LOSSES["paper"](answer, truth)) > 0.1


def test_the_symmetric_loss_pulls_to_the_nearer_equivalent():
    """Just beyond the boundary of the domain it is continuous where the paper's jumps."""
    inside = torch.tensor([[REAL[0] + 0.02, 0.30, 0.10, 0.05]]).double()
    inside = inside / inside.norm()
    line = [inside + t * torch.tensor([[0.0, 1.0, 0.0, 0.0]]).double() for t in torch.linspace(0, 0.2, 41).tolist()]
    here = Answer(torch.tensor([90.0]).double(), torch.stack([q / q.norm() for q in line])[20])
    losses = {name: torch.stack([loss(here, Answer(here.radius, q / q.norm())) for q in line]) for name, loss in LOSSES.items()}
    steps = {name: values.diff().abs().max() / values.max() for name, values in losses.items()}
    assert steps["symmetric"] < 0.2 < steps["paper"]

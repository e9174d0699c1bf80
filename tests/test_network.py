import pytest
import torch

from dsnet_bluesky.network import DSNet, NetworkConfig, UNet

SMALL = NetworkConfig(channels=(4, 8, 16), unets=2)


def test_published_network_has_its_parameters():
    assert DSNet().parameter_count == 1_183_105


@pytest.mark.parametrize("points", [4, 5, 6, 7, 37, 250, 501])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_shape_is_kept_for_odd_and_even_lengths(points, batch):
    assert DSNet(SMALL)(torch.randn(*batch, points)).shape == (*batch, points)


def test_curves_of_a_batch_do_not_mix():
    network = DSNet(SMALL)
    curves = torch.randn(3, 41)
    torch.testing.assert_close(network(curves)[1], network(curves[1]))


def test_last_point_of_an_odd_length_passes_by_the_skip():
    # Pooling drops it, so unpooling gives zero there: what arrives is the skip alone.
    unet = UNet((4, 8), kernel=1)
    features = torch.randn(1, 4, 5)
    expected = unet.up[0](unet.down[0](features))[..., -1]
    torch.testing.assert_close(unet(features)[..., -1], expected)


def test_every_parameter_learns():
    torch.manual_seed(0)
    network = DSNet(SMALL)
    network(torch.randn(8, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_config_survives_its_dictionary():
    assert NetworkConfig.from_dict(SMALL.to_dict()) == SMALL


def test_network_runs_on_another_device():
    assert DSNet(SMALL).to("meta")(torch.empty(2, 33, device="meta")).shape == (2, 33)

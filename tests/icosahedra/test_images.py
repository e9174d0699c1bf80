"""Counts, logarithms, views, and the eleven augmentations."""

import numpy as np
import pytest
import torch

from dsnet_bluesky.icosahedra.images import (
    AUGMENTATIONS,
    VIEWS,
    augment,
    exposed,
    log_image,
    standardised,
    view,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    """Rings around the beam, between 0 and 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    radius = (x**2 + (0.8 * y) ** 2).sqrt()
    rings = torch.stack([torch.exp(-3 * radius) * (1.2 + torch.cos(k * radius)) for k in (12.0, 20.0, 31.0, 9.0)])
    return log_image(rings * 1e4)


def test_counts_have_the_mean_and_the_scatter_of_photons():
    flat = torch.ones(1, 200, 200)
    for photons in (3.0, 30.0, 3000.0):
        counts = exposed(flat, torch.tensor([photons]), seeded())
        assert float(counts.mean()) == pytest.approx(photons + 1, rel=0.02, abs=0.3)
        assert float(counts.var() / counts.mean()) == pytest.approx(1, abs=0.06)


def test_neither_dose_nor_unit_matters(images):
    intensity = torch.exp(5 * images)
    torch.testing.assert_close(log_image(1e-7 * intensity), log_image(intensity), atol=1e-5, rtol=0)
    assert log_image(intensity).amin() == 0
    assert log_image(intensity).amax() == 1


def test_masked_pixels_are_dark_and_empty_ones_do_no_harm(images):
    intensity = torch.exp(5 * images)
    intensity[:, 10:20] = torch.nan
    seen = log_image(intensity)
    assert (seen[:, 10:20] == 0).all()
    sparse = torch.zeros(1, 32, 32)
    sparse[0, 3, 4] = 7
    assert log_image(sparse).isfinite().all()
    assert standardised(log_image(torch.zeros(1, 32, 32))).isfinite().all()


def test_views_are_the_eight_symmetries_of_a_square():
    image = torch.arange(16.0).reshape(4, 4)
    assert len({tuple(view(image, number).flatten().tolist()) for number in range(VIEWS)}) == 8
    # From x to y: what lay along +x lies along +y.
    along_x = torch.zeros(3, 3)
    along_x[1, 2] = 1
    assert view(along_x, 1)[2, 1] == 1


def test_there_are_eleven_augmentations():
    assert len(AUGMENTATIONS) == 11


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_follow_the_seed_keep_the_shape_and_change_little(name, images):
    change = AUGMENTATIONS[name]
    first = change(images, seeded(1))
    assert torch.equal(first, change(images, seeded(1)))
    assert first.shape == images.shape
    assert first.isfinite().all()
    assert torch.equal(first, images) == (name == "plain")
    stacked = torch.stack([first.flatten(), images.flatten()])
    assert np.corrcoef(stacked)[0, 1] > 0.5


def test_noise_has_its_limits(images):
    assert (AUGMENTATIONS["uniform_noise"](images, seeded()) - images).abs().max() <= 0.1
    changed = AUGMENTATIONS["salt_and_pepper"](images, seeded()) != images
    assert 0 < changed.double().mean() < 0.04
    jittered = AUGMENTATIONS["jitter"](images, seeded())
    assert 0 < (jittered != images).double().mean() <= 0.5


def test_blur_keeps_what_is_linear():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    blurred = AUGMENTATIONS["blur"](ramp, seeded())
    torch.testing.assert_close(blurred[:, 8:-8, 8:-8], ramp[:, 8:-8, 8:-8])


def test_hole_and_crop_hide_the_centre_and_the_edge(images):
    bright = images + 1
    hole = AUGMENTATIONS["central_hole"](bright, seeded())
    assert (hole[:, 31:33, 31:33] == 0).all()
    assert (hole[:, 0] > 0).all()
    crop = AUGMENTATIONS["centre_crop"](bright, seeded())
    assert (crop[:, 20:44, 20:44] > 0).all()
    assert (crop[:, 0] == 0).any()


def test_shift_moves_by_at_most_two_pixels():
    point = torch.zeros(200, 33, 33)
    point[:, 16, 16] = 1
    places = AUGMENTATIONS["shift"](point, seeded()).nonzero()[:, 1:] - 16
    assert len(places) == 200
    assert places.abs().max() == 2
    assert (places == 0).all(dim=1).double().mean() < 0.2


def test_sensitivity_is_smooth_and_never_gone():
    flat = torch.ones(200, 32, 32)
    changed = AUGMENTATIONS["uneven_sensitivity"](flat, seeded())
    assert changed.min() > 0
    assert changed.diff(dim=-1).abs().max() < 0.06


def test_a_share_of_images_is_changed():
    images = torch.rand(400, 16, 16, generator=seeded())
    same = (augment(images, seeded(), 0.5) == images).all(dim=(1, 2)).double().mean()
    # A half, an eleventh of the other half, and shifts by nothing.
    assert 0.5 < same < 0.62
    assert torch.equal(augment(images, seeded(), 0.0), images)

"""A denoiser that all tests of a process share."""

import pytest

from dsnet_bluesky.training.denoiser import train_denoiser
from tests.denoising import small


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a model."""
    directory = tmp_path_factory.mktemp("models") / "symmetry-denoiser-1.0.0"
    frames = small.SCAN.frames(small.DOSE, 1)
    return train_denoiser(frames, directory, centre=small.SCAN.centre, mask=small.SCAN.mask, recipe=small.RECIPE, runs=["abc"])

"""Training of the model icosahedra: reproducible, continued after a break, and a card that tells what it must."""

import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.icosahedra import Icosahedra
from dsnet_bluesky.icosahedra.multislice import Detector, Simulator
from dsnet_bluesky.icosahedra.network import RADIUS
from dsnet_bluesky.icosahedra.rotations import random_quaternions
from dsnet_bluesky.training import load_recipe
from dsnet_bluesky.training.icosahedra import CHECKPOINT, Recipe, Training, make_images, train
from dsnet_bluesky.versions import install_model, load_model

# Not narrower: with 4 filters the backward convolutions of torch 2.13 corrupt the heap on processors with AVX2 only.
TINY = """
name = "tiny"
version = "0.1.0"
licence = "BSD-3-Clause"
seed = 7
[architecture]
width = 0.125
blocks = [1, 1, 1, 1]
[simulator]
solid = "icosahedron"
absorption = "intensity"
absorption_length = 12.5
refraction = 0.11
wavelength = 13.5
angle = 30.0
pixels = 32
slices = 16
points = 32
[data]
training = 256
validation = 128
test = 64
beyond = 5.0
peak = [1e5, 1e7]
augmented = 0.5
[schedule]
loss = "symmetric"
epochs = 3
batch = 32
learning_rate = 3e-3
weight_decay = 1e-4
[card]
summary = "A tiny model."
use = "Tests."
limits = ["It is \\"tiny\\"."]
"""


@pytest.fixture(scope="module")
def recipe():
    return Recipe.parse(TINY)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-0.1.0"
    return directory, train(recipe, directory)


def test_splits_share_no_image_and_follow_the_seed(recipe, trained):
    directory, _ = trained
    splits = [make_images(recipe, split, directory) for split in ("training", "validation", "test")]
    radii = torch.cat([images.radius for images in splits])
    assert radii.unique().numel() == 256 + 128 + 64
    assert RADIUS[0] - 5 <= splits[0].radius.min() < RADIUS[0]
    assert all(RADIUS[0] <= images.radius.min() <= images.radius.max() <= RADIUS[1] for images in splits[1:])
    images = splits[2]
    again = Simulator(detector=Detector(pixels=32), slices=16, points=32)(images.radius[:2], images.quaternion[:2])
    intensity, _ = images.batch(slice(2), "cpu")
    torch.testing.assert_close(intensity, again / again.amax(dim=(1, 2), keepdim=True), rtol=0.02, atol=1e-9)


def test_the_network_learns(trained):
    """Guessing the middle errs by some 20 %."""
    history = trained[1]
    assert [each.epoch for each in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss
    assert history[-1].validation < 0.35


def test_the_same_recipe_makes_the_same_weights_also_after_a_break(recipe, trained, tmp_path):
    directory, history = trained
    training, validation = (make_images(recipe, split, directory) for split in ("training", "validation"))
    begun = Training(recipe)
    begun.epoch(training, validation)
    begun.save(tmp_path / CHECKPOINT)
    found = train(recipe, tmp_path)
    np.testing.assert_allclose(np.array(found), np.array(history), rtol=1e-5)
    first, second = (load_file(path / "weights.safetensors") for path in (directory, tmp_path))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / CHECKPOINT).exists()


def test_images_and_checkpoints_of_another_recipe_are_refused(recipe, trained, tmp_path):
    directory, _ = trained
    other = Recipe.parse(TINY.replace("seed = 7", "seed = 8"))
    with pytest.raises(BadInput, match="another recipe"):
        make_images(other, "test", directory)
    Training(recipe).save(tmp_path / CHECKPOINT)
    with pytest.raises(BadInput, match="another recipe"):
        Training(other).resume(tmp_path / CHECKPOINT)
    with pytest.raises(BadInput, match="finished model"):
        train(recipe, directory)


def test_the_model_can_be_installed_and_says_what_it_must(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("DSNET_MODELS", str(tmp_path))
    installed = install_model(trained[0])
    assert installed.model.reference == "tiny:0.1.0"
    assert "training.safetensors" in installed.left_out
    card = load_model("tiny").card
    assert card["symmetry"]["forbids"] == ["friedel"]
    assert card["ranges"]["radius"] == list(RADIUS)
    assert card["simulator"]["absorption"] == "intensity"
    assert 0 < card["figures"]["test_mean_relative_error"] < card["figures"]["test_maximum_relative_error"]
    readme = (trained[0] / "README.md").read_text(encoding="utf-8")
    assert "Forbids friedel" in readme
    assert isinstance(load_recipe(trained[0] / "recipe.toml"), Recipe)
    with (trained[0] / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


class TestAnswers:
    @pytest.fixture(scope="class")
    def reader(self, trained):
        return Icosahedra(load_model(str(trained[0])))

    @pytest.fixture(scope="class")
    def frames(self, reader):
        quaternion = random_quaternions(4, 1)
        return reader.simulator(torch.tensor([50.0, 80, 110, 140]), quaternion).numpy()

    def test_a_dataset_with_units_and_meaning(self, reader, frames):
        result = reader(frames)
        assert dict(result.sizes) == {"exposure": 4, "component": 4}
        assert result["radius"].attrs["units"] == "nm"
        assert all(result[name].attrs["long_name"] for name in result.data_vars)
        np.testing.assert_allclose((result["quaternion"] ** 2).sum("component"), 1, rtol=1e-6)
        assert (result["radius_dev"] > 0).all()
        assert (result["misorientation_dev"] > 0).all()
        assert (result["score"] <= 1).all()

    def test_the_unit_of_the_intensity_does_not_matter(self, reader, frames):
        first, second = reader(frames), reader(1e-3 * frames)
        np.testing.assert_allclose(first["radius"], second["radius"], rtol=1e-4)
        np.testing.assert_allclose(first["score"], second["score"], rtol=1e-4)

    def test_masked_pixels_are_left_out_of_the_score(self, reader, frames):
        masked = frames.copy()
        masked[:, 14:18] = np.nan
        assert np.isfinite(reader(masked)["score"]).all()

    def test_what_is_no_icosahedron_is_flagged(self, reader):
        noise = np.random.default_rng(0).poisson(5, (3, 32, 32))
        assert (reader(noise)["flags"] & int(Flag.POOR_FIT)).all()

    @pytest.mark.parametrize(
        ("frames", "words"),
        [
            (np.ones((2, 64, 64)), "cannot be read; give"),
            (np.ones(32), "cannot be read; give"),
            (np.zeros((1, 32, 32)), "no pixel with a positive intensity"),
            (np.full((1, 32, 32), np.nan), "no pixel with a positive intensity"),
        ],
    )
    def test_bad_frames_are_refused(self, reader, frames, words):
        with pytest.raises(BadInput, match=words):
            reader(frames)

    def test_bad_options_are_refused(self, trained):
        model = load_model(str(trained[0]))
        with pytest.raises(BadInput, match="8 views"):
            Icosahedra(model, views=9)
        with pytest.raises(BadInput, match="cannot use the device"):
            Icosahedra(model, "nonsense")
        with pytest.raises(BadInput, match="no model of icosahedra"):
            Icosahedra(load_model("dsnet:2.0.0"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('loss = "symmetric"', 'loss = "best"', "no loss 'best'"),
        ("epochs = 3", "epoch = 3", "cannot be read"),
        ("wavelength = 13.5", "", "without 'wavelength'"),
        ('absorption = "intensity"', 'absorption = "any"', "no reading 'any'"),
    ],
)
def test_bad_recipes_are_refused(old, new, words):
    with pytest.raises(BadInput, match=words):
        Recipe.parse(TINY.replace(old, new))

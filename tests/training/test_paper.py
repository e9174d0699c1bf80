import csv
import itertools

import numpy as np
import pytest
import torch

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.library.families import form_factor
from dsnet_bluesky.training import load_recipe, paper
from dsnet_bluesky.training.paper import Recipe, make_curves, train
from dsnet_bluesky.versions import install_model, load_model

TINY = """
name = "tiny"
version = "0.1.0"
licence = "BSD-3-Clause"
seed = 7
[architecture]
channels = [4, 8]
unets = 1
kernel = 3
[data]
form_factor = "sphere"
parameter = "radius"
values = { first = 5.0, last = 50.0, count = 10 }
background = 0.001
q = { first = 0.05, last = 3.05, count = 61 }
sigma = 0.04
oversampling = 4
validation = 0.2
[schedule]
epochs = 30
batch = 3
learning_rate = 2e-2
[card]
summary = "A tiny model."
use = "Tests."
limits = ["It is \\"tiny\\".", "It knows no µm."]
"""

pytest.importorskip("sasmodels")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.fixture(scope="module")
def recipe():
    return Recipe.parse(TINY)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny-0.1.0"
    return directory, train(recipe, directory)


def test_published_recipe():
    recipe = load_recipe("dsnet-paper")
    assert isinstance(recipe, Recipe)
    np.testing.assert_allclose(np.diff(recipe.data.q.values()), 0.01)
    np.testing.assert_allclose(2 * recipe.data.values.values(), np.arange(1, 101))
    assert (recipe.data.sigma, recipe.data.background, recipe.data.validation) == (0.02, 0.001, 0.1)
    assert (recipe.schedule.epochs, recipe.schedule.batch, recipe.schedule.learning_rate) == (500, 90, 1e-4)


def test_form_factor_takes_q_in_reciprocal_nanometres():
    # Analytic sphere, R = 3 nm, contrast 5e-6 per square angstrom.
    x = np.array([0.5, 2.0]) * 3
    amplitude = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    expected = 1e-4 * (4 / 3 * np.pi * 30**3) * 5**2 * amplitude**2 + 0.001
    np.testing.assert_allclose(form_factor("sphere", x / 3, radius=30.0, background=0.001), expected, rtol=1e-5)


def test_curves_are_split_without_overlap_and_smearing_fills_minima(recipe):
    curves = make_curves(recipe)
    assert curves.training.size == 8
    assert sorted([*curves.training, *curves.validation]) == list(range(10))
    deep = curves.ideal < np.log(0.0012)
    assert deep.any()
    assert (curves.smeared[deep] > curves.ideal[deep] + 0.3).all()
    assert make_curves(recipe).digest == curves.digest


def test_loss_falls(trained):
    _, history = trained
    assert history[-1].training < 0.3 * history[0].training
    assert min(e.validation for e in history) < 0.3 * history[0].validation


def test_folder_is_a_model_that_loads(trained, recipe):
    directory, history = trained
    model = load_model(str(directory))
    assert (model.name, model.version) == ("tiny", "0.1.0")
    assert model.card["limits"] == recipe.card["limits"]
    assert model.card["figures"]["validation_loss"] == pytest.approx(min(e.validation for e in history), rel=1e-5)
    assert model.card["data"]["sha256"] == make_curves(recipe).digest
    assert (model.card["inputs"]["dims"], model.card["inputs"]["channels"]) == (["curve", "q"], 1)
    assert "**Inputs.** ln of the smeared intensity" in (directory / "README.md").read_text(encoding="utf-8")
    assert (directory / "recipe.toml").read_text(encoding="utf-8") == TINY
    assert len(list(csv.DictReader((directory / "history.csv").open()))) == 30
    assert {p.name for p in directory.iterdir()} == {
        "weights.safetensors", "model.toml", "README.md", "recipe.toml", "history.csv", "history.png",
    }  # fmt: skip


def test_what_was_trained_can_be_installed(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("DSNET_MODELS", str(tmp_path))
    assert install_model(trained[0]).left_out == []
    assert load_model("tiny").sha256 == load_model(str(trained[0])).sha256


def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(trained, recipe, tmp_path):
    directory, history = trained
    before = torch.get_rng_state()
    assert train(recipe, tmp_path / "again") == history
    assert torch.equal(torch.get_rng_state(), before)
    assert load_model(str(tmp_path / "again")).sha256 == load_model(str(directory)).sha256
    other = Recipe.parse(TINY.replace("seed = 7", "seed = 8"))
    assert train(other, tmp_path / "other") != history


def test_interrupted_training_goes_on_where_it_stopped(trained, recipe, tmp_path):
    directory, history = trained

    def interrupt(epoch, epochs):
        if epoch.epoch == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, progress=interrupt)
    assert not (tmp_path / "model.toml").exists()
    seen = []
    assert train(recipe, tmp_path, progress=lambda epoch, epochs: seen.append(epoch.epoch)) == history
    assert seen == [26, 27, 28, 29, 30]
    assert load_model(str(tmp_path)).sha256 == load_model(str(directory)).sha256
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoint_of_another_recipe_is_refused(recipe, tmp_path):
    paper.TrainingState(recipe, "cpu").save(tmp_path / "checkpoint.pt")
    other = Recipe.parse(TINY.replace("seed = 7", "seed = 8"))
    with pytest.raises(BadInput, match="another recipe"):
        train(other, tmp_path)


def test_finished_model_is_not_overwritten(trained, recipe):
    with pytest.raises(BadInput, match="finished model"):
        train(recipe, trained[0])


@pytest.mark.parametrize(
    "text",
    ["not toml", TINY.replace("sigma", "sigmma"), TINY.replace("[schedule]", "[plan]"), TINY.replace("seed = 7", "")],
)
def test_unreadable_recipe_is_refused(text):
    with pytest.raises(BadInput, match="recipe cannot be read"):
        Recipe.parse(text)


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_is_respected(recipe, tmp_path, device):
    # With another default device, whatever forgets to name its own ends up elsewhere and raises.
    short = Recipe.parse(TINY.replace("epochs = 30", "epochs = 2"))
    with torch.device("meta"):
        history = train(short, tmp_path, device=device)
    assert len(history) == 2
    assert all(np.isfinite(list(itertools.chain.from_iterable(history))))

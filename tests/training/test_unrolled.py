"""Training of the unrolled network: it learns, goes on where it stopped, and ends in a model that loads."""

from __future__ import annotations

import csv
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from dsnet_bluesky import training
from dsnet_bluesky.data import BadInput, curve
from dsnet_bluesky.desmearing import desmear, prepare
from dsnet_bluesky.dsnet import load_network
from dsnet_bluesky.features import CHANNELS, INPUTS, Operator
from dsnet_bluesky.library.examples import load_session
from dsnet_bluesky.library.families import FAMILIES, make_shapes
from dsnet_bluesky.library.samples import Library, families_of, load_library, save_library
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.training import paper, uncertainty, unrolled
from dsnet_bluesky.training import sessions as sessions_module
from dsnet_bluesky.training.recipes import Recipe
from dsnet_bluesky.training.sessions import make_sessions
from dsnet_bluesky.training.unrolled import Training, data_digest, evaluate, loss_of
from dsnet_bluesky.unrolled import Answer, Unrolled
from dsnet_bluesky.versions import install_model, load_model

pytest.importorskip("sasmodels")

TINY = """
name = "tiny"
version = "0.1.0"
licence = "BSD-3-Clause"
seed = 11
[architecture]
channels = [4, 6]
kernel = 3
hidden = 2
[data]
sessions = 4
curves = 8
validation_sessions = 3
validation_curves = 6
repeats = 2
points = [50, 60]
[schedule]
steps = 60
batch = 6
learning_rate = 2e-2
weight_decay = 1e-4
[card]
summary = "A tiny model."
use = "Tests."
limits = ["It is \\"tiny\\".", "It knows no µm."]
"""

CHEAP = {"training": ("sphere", "fuzzy_sphere", "dab"), "validation": ("pearl_necklace", "gel_fit")}


class InProcess:
    """A pool of no processes: spawned ones take seconds each to import torch."""

    def __init__(self, workers, context, start, arguments) -> None:
        start(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def submit(self, work, *arguments) -> Future:
        job: Future = Future()
        job.set_result(work(*arguments))
        return job


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.parse(TINY)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Trainings of seconds: few repeats, few steps between checkpoints, and all in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unrolled, "CHECKPOINT_EVERY", 20)
        patch.setattr(sessions_module, "REPEATED_CURVES", 4)
        patch.setattr(unrolled, "WARM_UP", 5)
        patch.setattr(uncertainty, "STEPS", 20)
        patch.setattr(sessions_module, "ProcessPoolExecutor", InProcess)
        yield patch


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library that a directory of training is given, so that it need not compute the whole."""
    shapes = [s for family in FAMILIES if family.name in sum(CHEAP.values(), ()) for s in make_shapes(family, 1, 2)]
    path = tmp_path_factory.mktemp("library") / "library.npz"
    save_library(path, Library(shapes, []))
    return path


def workshop(tmp_path: Path, library: Path) -> Path:
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "library.npz").write_bytes(library.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def trained(recipe, library, tmp_path_factory):
    """A finished training, what it said on the way, and the generator's state before and after."""
    directory, said = workshop(tmp_path_factory.mktemp("models") / "tiny-0.1.0", library), []
    before = torch.get_rng_state()
    assert training.train(recipe, directory, notify=lambda *words: said.append(words)) == directory
    assert torch.equal(torch.get_rng_state(), before)
    return directory, said


@pytest.fixture(scope="module")
def sessions(trained):
    return [load_session(path) for path in sorted((trained[0] / "sessions" / "training").glob("*.safetensors"))]


@pytest.fixture(scope="module")
def validation(trained):
    return [load_session(path) for path in sorted((trained[0] / "sessions" / "validation").glob("*.safetensors"))]


def history_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestTrain:
    def test_loss_falls(self, trained):
        directory, said = trained
        history = history_of(directory)
        assert [int(row["step"]) for row in history] == [20, 40, 60]
        assert float(history[-1]["loss"]) < float(history[0]["loss"]) - 0.2
        assert {words[2] for words in said[:7]} == {"sessions"}
        assert [words[:2] for words in said[7:]] == [(20, 60), (40, 60), (60, 60)]

    def test_it_learns_what_it_is_shown(self, recipe, sessions):
        """Held against the curves that it is trained on, and without averages of weights."""
        state = Training(recipe)

        def loss() -> float:
            batches = [(part, *part.batch(slice(None), "cpu")) for part in sessions]
            return sum(loss_of(state.network(p.operator, f), t, p.operator.measured).item() for p, f, t in batches)

        before = loss()
        for _ in range(150):
            state._take(sessions[state.step % len(sessions)])
        assert loss() < 0.3 * before

    def test_finished_folder_is_a_model_that_loads(self, trained, recipe):
        directory, _ = trained
        model = load_model(str(directory))
        assert (model.name, model.version) == ("tiny", "0.1.0")
        assert model.card["limits"] == recipe.card["limits"]
        assert model.card["architecture"]["channels"] == [4, 6]
        assert model.card["ranges"]["points"] == [50, 60]
        assert (directory / "recipe.toml").read_text(encoding="utf-8") == TINY
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert "A tiny model." in card
        assert "fuzzy_sphere" in card
        assert model.card["inputs"] == INPUTS
        assert f"channels: {CHANNELS}." in card
        network, seen = load_network(model)
        assert network.config == recipe.architecture
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {name: part.shape for name, part in seen.items()} == {"mean": (6,), "whitening": (6, 6)}
        for tensor in (*network.state_dict().values(), *seen.values()):
            assert torch.isfinite(tensor).all()

    def test_card_tells_the_data_by_their_digest(self, trained, recipe, tmp_path):
        directory, _ = trained
        digest = load_model(str(directory)).card["data"]["sha256"]
        assert data_digest(directory, recipe) == digest
        assert data_digest(directory, Recipe.parse(TINY.replace("A tiny model.", "Else."))) == digest
        for here, there in (("seed = 11", "seed = 12"), ("repeats = 2", "repeats = 3"), ("[50, 60]", "[50, 61]")):
            assert data_digest(directory, Recipe.parse(TINY.replace(here, there))) != digest
        other = workshop(tmp_path, directory / "library.npz")
        save_library(other / "library.npz", load_library(directory / "library.npz", "training"))
        assert data_digest(other, recipe) != digest

    def test_finished_model_can_be_installed_and_used_by_its_version(self, trained, tmp_path, monkeypatch):
        """Beside it lie library, sessions and checkpoint: they stay where they are."""
        monkeypatch.setenv("DSNET_MODELS", str(tmp_path))
        assert set(install_model(trained[0]).left_out) == {"checkpoint.pt", "library.npz", "origin.json", "sessions"}
        q = np.linspace(0.05, 3.0, 80)
        result = desmear(curve(q, np.exp(-(q**2)), 0.01 + 0 * q), Smearing.gaussian(q, 0.05), "dsnet", model="tiny:latest")
        assert result.attrs["model"] == "tiny:0.1.0"

    def test_finished_model_desmears(self, trained):
        """Through the front door, as a released one."""
        q = np.linspace(0.05, 3.0, 80)
        fine = np.arange(0.0005, 3.5, 0.001)
        x = 3 * fine
        ideal = 300 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 0.05
        I = Smearing.gaussian(q, 0.05, q_calc=fine).apply(ideal)
        smearing = Smearing.gaussian(q, 0.05)
        result = prepare(smearing, "dsnet", model=str(trained[0]), fallback=False)(curve(q, I, 0.02 * I))
        truth = np.log(np.interp(q, fine, ideal))
        errors = [float(((np.log(values) - truth) ** 2).mean()) for values in (result["I"].values, I)]
        assert errors[0] < errors[1]
        assert np.isfinite(result["Idev"]).all()
        assert (result["Idev"] > 0).all()
        assert (result["Idev_noise"] <= result["Idev"] * (1 + 1e-6)).all()
        assert (result["Qdev"] > 0).all()

    def test_finished_model_is_not_overwritten(self, trained, recipe):
        with pytest.raises(BadInput, match="finished model"):
            training.train(recipe, trained[0])

    def test_interrupted_training_goes_on_where_it_stopped(self, trained, recipe, library, tmp_path):
        """Between two checkpoints, and then while errors are learned: the same weights in the end."""
        directory, _ = trained
        workshop(tmp_path, library)

        def interrupt(done, total, word):
            if (done, total) == (40, 60):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(recipe, tmp_path, notify=interrupt)
        assert (tmp_path / "checkpoint.pt").exists()
        assert not (tmp_path / "model.toml").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unrolled, "calibrate", lambda network, validation: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                training.train(recipe, tmp_path)
        steps = []
        training.train(recipe, tmp_path, notify=lambda done, total, word: steps.append((done, total)))
        assert steps == []  # all was done but the end
        assert load_model(str(tmp_path)).sha256 == load_model(str(directory)).sha256
        assert [row["validation"] for row in history_of(tmp_path)] == [row["validation"] for row in history_of(directory)]

    def test_checkpoint_of_another_recipe_is_refused(self, recipe, tmp_path):
        Training(recipe).save(tmp_path / "checkpoint.pt")
        with pytest.raises(BadInput, match="another recipe"):
            Training(Recipe.parse(TINY.replace("seed = 11", "seed = 12"))).resume(tmp_path / "checkpoint.pt")
        # The words of its card may still be changed.
        reworded = Training(Recipe.parse(TINY.replace("A tiny model.", "A very tiny model.")))
        reworded.resume(tmp_path / "checkpoint.pt")

    def test_the_seed_decides(self, recipe):
        one, again = Training(recipe), Training(recipe)
        other = Training(Recipe.parse(TINY.replace("seed = 11", "seed = 12")))
        weights = [state.network.propose.stem.weight for state in (one, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_the_device_is_respected(self, recipe, sessions, validation):
        """With another default device, whatever forgets to name its own ends up elsewhere and raises."""

        def first_step() -> list[float]:
            state = Training(recipe, "cpu")
            return [state._take(sessions[0]), *evaluate(state.average, validation)]

        with torch.device("meta"):
            found = first_step()
        assert found == first_step()


class TestSessions:
    def test_processes_make_what_this_one_makes(self, trained, recipe, library, tmp_path, monkeypatch):
        """The only test here that spawns a process, as all real trainings do."""
        monkeypatch.undo()
        from concurrent.futures import ProcessPoolExecutor

        monkeypatch.setattr(sessions_module, "ProcessPoolExecutor", ProcessPoolExecutor)
        monkeypatch.setattr(sessions_module.os, "cpu_count", lambda: 1)
        (made,) = make_sessions(workshop(tmp_path, library), recipe, "training", 1, recipe.data.curves)
        assert made.read_bytes() == (trained[0] / "sessions" / "training" / made.name).read_bytes()

    def test_what_is_there_is_not_made_again(self, trained, recipe):
        paths = sorted((trained[0] / "sessions" / "training").glob("*.safetensors"))
        before = [path.stat().st_mtime_ns for path in paths]
        said = []
        found = make_sessions(trained[0], recipe, "training", 4, recipe.data.curves, lambda *words: said.append(words))
        assert found == paths
        assert [path.stat().st_mtime_ns for path in paths] == before
        assert said == []

    @pytest.mark.parametrize("change", ["seed = 12", "curves = 9", "points = [50, 61]"])
    def test_those_of_another_recipe_are_refused(self, trained, change):
        name = change.split(" =")[0]
        line = next(line for line in TINY.splitlines() if line.startswith(f"{name} ="))
        with pytest.raises(BadInput, match=rf"curves of another recipe \({name} .* there, .* here\); give another"):
            sessions_module.check_origin(trained[0], Recipe.parse(TINY.replace(f"\n{line}\n", f"\n{change}\n", 1)))

    def test_those_of_a_recipe_with_other_steps_are_used(self, trained):
        longer = Recipe.parse(TINY.replace("steps = 60", "steps = 61"))
        with sessions_module.prepare(longer, trained[0]) as (sessions, _):
            assert len(sessions) == longer.data.sessions
            assert sessions[3].operator.smearing.digest == sessions[:][3].operator.smearing.digest

    def test_sets_do_not_mix(self, sessions, validation):
        """No sample of training is made of what choices are made by, nor the other way."""
        for split, group in (("training", sessions), ("validation", validation)):
            families = {name for part in group for name in part.families} - {"peaks", "grating"}
            assert families
            assert families <= set(families_of(split)) & set(CHEAP[split])

    def test_each_session_is_another_instrument(self, sessions, validation):
        digests = [part.operator.smearing.digest for part in (*sessions, *validation)]
        assert len(set(digests)) == len(digests) == 7


class TestLoss:
    MEASURED = torch.tensor([1.0, 1.0, 1.0, 0.0])

    @staticmethod
    def answer(ln_I: torch.Tensor, ln_error: float = -3.0, first: torch.Tensor | None = None) -> Answer:
        flat = torch.zeros_like(ln_I)
        return Answer(ln_I if first is None else first, ln_I, torch.full_like(ln_I, ln_error), flat, flat, flat)

    def loss(self, *arguments, truth: torch.Tensor | None = None, **options) -> float:
        answer = self.answer(*arguments, **options)
        return float(loss_of(answer, torch.zeros_like(answer.ln_I) if truth is None else truth, self.MEASURED))

    def test_the_truth_is_best(self):
        nothing, noise = torch.zeros(2, 4), 0.3 * torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        assert self.loss(nothing) < self.loss(noise)
        assert self.loss(nothing, first=noise) > self.loss(nothing)

    def test_the_right_error_is_best(self):
        """Of all errors stated alike, the one that errors have is the most probable (under weights held fixed)."""
        errors = 0.1 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        stated = np.linspace(-4, -1, 31)
        weighed = [self.loss(errors, value) for value in stated]
        slopes = []
        for value in stated:
            ln_error = torch.full_like(errors, value, requires_grad=True)
            answer = self.answer(errors)._replace(ln_error=ln_error)
            loss_of(answer, torch.zeros_like(errors), self.MEASURED).backward()
            assert ln_error.grad is not None
            slopes.append(float(ln_error.grad.sum()))
        assert np.isfinite(weighed).all()
        crossing = stated[np.flatnonzero(np.array(slopes) > 0)[0]]
        assert crossing == pytest.approx(np.log(0.1), abs=0.15)

    def test_points_that_nobody_measured_count_little(self):
        off = torch.zeros(1, 4)
        inside, outside = off.clone(), off.clone()
        inside[0, 1], outside[0, 3] = 0.5, 0.5
        assert self.loss(outside) - self.loss(off) < 0.15 * (self.loss(inside) - self.loss(off))

    def test_outliers_count_linearly(self):
        losses = [self.loss(torch.full((1, 4), size)) for size in (10.0, 20.0, 30.0)]
        assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


class TestEvaluate:
    def test_classical_answers_need_no_network(self, validation):
        network = Unrolled(Recipe.parse(TINY).architecture)
        found = evaluate(network, validation)
        errors = []
        for part in validation:
            features, truth = part.batch(slice(None), "cpu")
            errors.append((features.start - truth)[:, part.operator.measured > 0].square().mean(dim=1))
        assert found[1] == pytest.approx(float(torch.exp(torch.log(torch.cat(errors) + 1e-9).mean())), rel=1e-4)
        assert 0 <= found[3] <= found[4] <= 1


class TestRecipe:
    def test_kinds_are_told_apart(self, tmp_path):
        (tmp_path / "recipe.toml").write_text(TINY, encoding="utf-8")
        assert training.load_recipe(tmp_path / "recipe.toml") == Recipe.parse(TINY)
        assert isinstance(training.load_recipe("dsnet-paper"), paper.Recipe)

    @pytest.mark.parametrize(
        "text",
        ["not toml", TINY.replace("curves", "courves"), TINY.replace("[schedule]", "[plan]"), TINY.replace("seed = 11", "")],
    )
    def test_unreadable_recipe_is_refused(self, text):
        with pytest.raises(BadInput, match="recipe cannot be read"):
            Recipe.parse(text)


class TestBeginning:
    """A training that goes on from a released model."""

    def begun(self, trained, changes: dict[str, str]) -> Unrolled:
        text = TINY.replace("seed = 11", f'seed = 11\nbegin = "{trained[0]}"')
        for old, new in changes.items():
            text = text.replace(old, new)
        return Training(Recipe.parse(text)).network

    def test_all_weights_are_those_of_the_model(self, trained, sessions):
        network, _ = load_network(load_model(str(trained[0])))
        begun = self.begun(trained, {})
        assert evaluate(begun, sessions) == pytest.approx(evaluate(network, sessions))

    def test_one_unet_begins_as_the_first_of_two(self, trained, sessions):
        network, _ = load_network(load_model(str(trained[0])))
        begun = self.begun(trained, {"hidden = 2": "hidden = 0\nunets = 1"})
        features, _ = sessions[0].batch(slice(None), "cpu")
        proposed, answer = network(sessions[0].operator, features).first, begun(sessions[0].operator, features)
        torch.testing.assert_close(answer.ln_I, proposed)
        assert answer.ln_error.std() < 0.1  # nobody has asked it for an error yet

    def test_a_network_of_another_shape_is_refused(self, trained):
        with pytest.raises(BadInput, match="is a network of another shape"):
            self.begun(trained, {"channels = [4, 6]": "channels = [4, 8]"})


def test_one_unet_becomes_a_model(library, tmp_path):
    recipe = Recipe.parse(TINY.replace("hidden = 2", "hidden = 0\nunets = 1").replace("steps = 60", "steps = 20"))
    directory = training.train(recipe, workshop(tmp_path / "tiny-0.1.0", library))
    model = load_model(str(directory))
    network, _ = load_network(model)
    assert network.config == recipe.architecture
    assert network.parameter_count == model.card["architecture"]["parameters"]
    q = np.linspace(0.1, 3, 60)
    answer = desmear(curve(q, 1 / (1 + q**4), 0.01 / (1 + q**4)), Smearing.gaussian(q, 0.1), method="dsnet", model=str(directory))
    assert np.isfinite(answer["I"]).all()
    assert (answer["Idev"] > 0).all()


def test_training_sees_the_operator_in_full_precision(recipe, sessions):
    """Half precision of the convolutions must not reach R: of small residuals it would leave nothing."""
    state, seen = Training(recipe), []
    apply = Operator.apply

    def watched(self, I):
        smeared = apply(self, I)
        seen.append((I.dtype, smeared.dtype))
        return smeared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operator, "apply", watched)
        state._take(sessions[0])
    assert set(seen) == {(torch.float32, torch.float32)}

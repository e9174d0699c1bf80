"""The denoiser: what its likelihood rests on, what it refuses, what a short training brings, and sectors with errors."""

import numpy as np
import pytest
import torch
import xarray as xr

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.denoising import SymmetryDenoiser
from dsnet_bluesky.denoising.harmonics import RingHarmonics
from dsnet_bluesky.denoising.likelihood import Views, deal_shares, deviance, estimate, expected, gaussian, loss
from dsnet_bluesky.denoising.network import DenoiserConfig, UNet
from dsnet_bluesky.denoising.paper import halves, paper_estimate
from dsnet_bluesky.denoising.rings import ring_sums, rings_about
from dsnet_bluesky.denoising.sectors import Resampled, bootstrap, desmear_sector, integrate, low_rank, sector_of
from dsnet_bluesky.denoising.symmetry import fold, mate
from dsnet_bluesky.reduction import Reduction
from dsnet_bluesky.sim.anisotropic import AnisotropicScan
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.training.denoiser import DenoiserRecipe, Training, prepare_scan, train_denoiser
from dsnet_bluesky.versions import Model, install_model, load_model
from tests.denoising import small

NETWORK, RECIPE, SCAN, DOSE = small.NETWORK, small.RECIPE, small.SCAN, small.DOSE
TEST = AnisotropicScan.draw(6, "test", 1, shape=(64, 64), centre=(32.0, 32.0))


@pytest.fixture(scope="module")
def denoiser(trained):
    return SymmetryDenoiser(load_model(str(trained)))


def error(frames, scan=TEST, dose=DOSE):
    """Mean squared error in units of the Poisson variance."""
    truth = dose * scan.rates[:, ~scan.mask]
    return float(np.mean((frames[:, ~scan.mask] - truth) ** 2 / truth))


def test_shown_and_kept_photons_are_independent_poissonian_frames():
    counts = fold(np.random.default_rng(0).poisson(2.0, (2000, 6, 6)), np.ones((6, 6), bool)).counts
    shown, kept, share = deal_shares(counts, np.random.default_rng(1), (0.7, 0.7))
    np.testing.assert_array_equal(shown + kept, counts)
    np.testing.assert_array_equal(shown, mate(shown))
    assert np.mean(kept) == pytest.approx(4 * (1 - share[0, 0, 0]), rel=0.01)
    assert np.var(kept) / np.mean(kept) == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(shown.ravel(), kept.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(mate(shown).ravel(), kept.ravel())[0, 1]) < 0.01  # what a pixel shows says nothing of its mate


def test_the_likelihood_is_highest_for_the_truth():
    readings = torch.full((1, 60, 60), 2.0)
    truth = torch.linspace(1, 9, 3600).reshape(1, 60, 60)
    share = torch.full((1, 1, 1), 0.5)
    kept = torch.poisson(truth / 2, generator=torch.Generator().manual_seed(1))
    losses = [float(loss(truth / 2 * factor, kept, readings, share)) for factor in (0.9, 1.0, 1.1)]
    assert losses[1] == min(losses)
    assert float(deviance(truth / 2, kept, readings, share)) == pytest.approx(1.1, abs=0.15)


def test_smoothing_ignores_what_does_not_count():
    weight = torch.ones(1, 30, 30)
    weight[0, 10:14] = 0
    smooth = gaussian(3.0 * weight, weight, 1.5)
    np.testing.assert_allclose(smooth, 3.0, rtol=1e-3)


def test_sizes_of_the_networks_are_those_of_the_description():
    assert UNet(DenoiserConfig()).parameter_count == pytest.approx(121e3, rel=0.02)
    assert UNet(DenoiserConfig.of("paper")).parameter_count == pytest.approx(2_275_593, rel=0.01)


def test_answers_are_positive_symmetric_and_know_which_mates_count():
    network = UNet(DenoiserConfig(channels=(4, 4)))
    valid = ~SCAN.mask
    valid[5:9] = False
    frames = SCAN.frames(DOSE, 2)[:3]
    answers = estimate(network, fold(frames, valid))
    assert (answers > 0).all()
    np.testing.assert_allclose(answers, mate(answers), rtol=1e-4)
    # Untrained, it answers about the smooth frame: a masked stripe whose mates count does not make it darker.
    assert answers[:, 5:9, 10:-10].mean() == pytest.approx(frames[:, ::-1, ::-1][:, 5:9, 10:-10].mean(), rel=0.35)


def test_training_on_other_samples_beats_a_gaussian_filter(denoiser):
    frames = TEST.frames(DOSE, 3)
    result = denoiser(frames, TEST.centre, TEST.mask)
    readings = torch.as_tensor(~TEST.mask, dtype=torch.float32).expand(len(frames), -1, -1)
    filtered = [error(gaussian(torch.as_tensor(frames, dtype=torch.float32), readings, w).numpy()) for w in (1, 1.5, 2, 3)]
    assert error(result["denoised"].values) < 0.8 * min(filtered)
    assert error(frames) == pytest.approx(1, abs=0.1)
    assert result["chi2_rings"].values.mean() < 1.5
    assert not (result["flags"].values & int(Flag.ASYMMETRIC | Flag.FEW_COUNTS | Flag.OUT_OF_RANGE)).any()
    assert result["denoised"].attrs == {"units": "counts", "long_name": "expected counts"}
    assert result.attrs["model"] == "symmetry-denoiser:1.0.0"


def test_ring_curves_are_the_raw_ones(denoiser):
    """Also those of a reduction, whose bins the rings may be."""
    frames = TEST.frames(DOSE, 4)
    rings = rings_about(TEST.centre, TEST.shape, TEST.mask)
    kept = denoiser(frames, TEST.centre, TEST.mask)["denoised"].values
    np.testing.assert_allclose(ring_sums(kept, rings), ring_sums(frames, rings), rtol=1e-9)
    reduction = Reduction(TEST.poni, mask=TEST.mask, bins=40)
    kept = denoiser(frames, TEST.centre, TEST.mask, rings=reduction.bins)["denoised"].values
    np.testing.assert_allclose(reduction(kept)["I"], reduction(frames)["I"], rtol=1e-9)


def test_a_frame_on_a_detector_with_gaps_off_the_middle_is_denoised_everywhere(denoiser):
    scan = AnisotropicScan.draw(3, "test", 2, shape=(60, 66), centre=(27.3, 35.6))
    frames = scan.frames(DOSE, 5)
    frames[:, :, 40:43] = -1
    kept = denoiser(frames, scan.centre, scan.mask)["denoised"].values
    gap = kept[:, 10:50, 40:43]
    assert np.isfinite(gap).all()  # their mates count
    assert gap.mean() == pytest.approx(DOSE * scan.rates[:, 10:50, 40:43].mean(), rel=0.2)
    outside = scan.mask.copy()
    outside[:, 40:43] = True
    truth = DOSE * scan.rates[:, ~outside]
    assert np.mean((kept[:, ~outside] - truth) ** 2 / truth) < 0.25


@pytest.mark.parametrize("dose", [0.02, 40.0])
def test_what_it_was_not_trained_for_is_flagged(denoiser, dose):
    flags = denoiser(TEST.frames(dose, 6), TEST.centre, TEST.mask)["flags"].values
    assert (flags & int(Flag.OUT_OF_RANGE)).all()
    assert ((flags & int(Flag.FEW_COUNTS)) > 0).all() == (dose < 0.1)


def test_wrong_centres_and_asymmetric_patterns_are_refused(denoiser):
    frames = AnisotropicScan.draw(20, "test", 2, shape=(64, 64), centre=(32.0, 33.0)).frames(DOSE, 7)
    with pytest.raises(BadInput, match=r"about \(32.0, 33.0\)"):
        denoiser(frames, (32.0, 32.0))
    skewed = np.random.default_rng(0).poisson(DOSE * TEST.rates * np.linspace(0.5, 1.5, 64))
    with pytest.raises(BadInput, match="does not have Friedel's symmetry"):
        denoiser(skewed, TEST.centre, TEST.mask)


def test_models_that_forbid_or_do_not_need_the_symmetry_are_refused(denoiser):
    model = denoiser.model
    for symmetry, said in (({"forbids": ["friedel"]}, "forbids"), ({}, "no denoiser")):
        card = {**model.card, "symmetry": symmetry}
        with pytest.raises(BadInput, match=said):
            SymmetryDenoiser(Model(model.name, model.version, model.sha256, model.path, card))


def test_the_folder_is_a_model_that_can_be_installed(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("DSNET_MODELS", str(tmp_path))
    assert install_model(trained).left_out == []
    model = load_model("symmetry-denoiser:1.0.0")
    assert model.card["symmetry"] == {"needs": ["friedel"]}
    assert model.card["data"]["runs"] == ["abc"]
    assert model.card["figures"]["deviance"] < model.card["figures"]["deviance_gaussian"]
    assert "Poisson deviance" in (model.path / "README.md").read_text(encoding="utf-8")
    assert DenoiserRecipe.parse((model.path / "recipe.toml").read_text(encoding="utf-8")) == RECIPE


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    recipe = DenoiserRecipe(steps=201, batch=2, crop=16, architecture=DenoiserConfig(channels=(4, 4)), learning_rate=1e-2)
    frames = AnisotropicScan.draw(12, "training", 4, shape=(32, 32), centre=(16.0, 16.0), beamstop=2.0)
    arguments = {"centre": frames.centre, "mask": frames.mask, "recipe": recipe}

    def stop(done, total, word):
        if done == 100:
            raise KeyboardInterrupt

    counts = frames.frames(10.0, 1)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser(counts, tmp_path / "a", notify=stop, **arguments)
    with pytest.raises(BadInput, match="another recipe"):
        train_denoiser(counts, tmp_path / "a", seed=2, **arguments)
    found = []
    for name in "ab":
        try:
            train_denoiser(counts, tmp_path / name, **arguments)
            found.append(load_model(str(tmp_path / name)).sha256)
        except BadInput as refused:  # so short a training may fail the gate: then alike
            found.append(str(refused))
    assert found[0] == found[1]


def test_the_last_weights_are_kept_unless_earlier_ones_were_surely_better():
    recipe = DenoiserRecipe(steps=40, batch=2, crop=32, architecture=DenoiserConfig(channels=(4, 4)))
    state = Training(recipe, prepare_scan(SCAN.frames(10.0, 1), SCAN.centre, SCAN.mask, held_out=0.25))
    for _ in range(2):
        state.advance(20)
    last = state.network.head.bias.detach().clone()
    assert state.choose() is state.history[-1]
    assert torch.equal(state.best.head.bias, last)
    with torch.no_grad():
        state.network.head.bias += 3.0  # answers three times as much
    state.history.append(state.history[-1]._replace(step=41, held_out=99.0))
    assert state.choose() is min(state.history, key=lambda look: look.held_out)
    assert torch.equal(state.best.head.bias, last)
    with torch.no_grad():
        state.network.head.bias *= torch.nan
    assert state.choose() is not state.history[-1]
    assert torch.equal(state.best.head.bias, last)


def test_an_undertrained_network_becomes_no_model(tmp_path):
    recipe = DenoiserRecipe(steps=1, batch=1, crop=16, architecture=DenoiserConfig(channels=(4, 4)))
    with pytest.raises(BadInput, match="no better than a Gaussian"):
        train_denoiser(SCAN.frames(0.5, 1), tmp_path / "m", centre=SCAN.centre, mask=SCAN.mask, recipe=recipe)
    assert not (tmp_path / "m" / "model.toml").exists()


@pytest.mark.parametrize(("number", "dose", "said"), [(5, 3.0, "has 5 frames"), (24, 0.01, "counts a pixel")])
def test_too_little_to_train_on_is_refused(number, dose, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        train_denoiser(SCAN.frames(dose, 1)[:number], tmp_path / "m", centre=SCAN.centre, mask=SCAN.mask, recipe=RECIPE)


def test_the_published_variant_learns_one_half_from_the_other(tmp_path):
    architecture = DenoiserConfig(channels=(6, 8), inputs=1, outputs=1, variant="paper", product_mask=True)
    recipe = DenoiserRecipe(steps=150, batch=8, learning_rate=3e-3, architecture=architecture)
    folder = train_denoiser(SCAN.frames(10.0, 1), tmp_path / "m", centre=SCAN.centre, mask=SCAN.mask, recipe=recipe)
    frames = TEST.frames(10.0, 3)
    result = SymmetryDenoiser(load_model(str(folder)))(frames, TEST.centre, TEST.mask, conserving=False)
    assert error(result["denoised"].values, dose=10.0) < 0.8
    parts = halves(frames, ~TEST.mask, product_mask=False)
    identity = UNet(DenoiserConfig(channels=(2,), inputs=1, outputs=1, variant="paper"))
    identity.forward = lambda images: images  # type: ignore[method-assign]
    swapped = paper_estimate(identity, parts, 64)
    np.testing.assert_allclose(swapped, mate(frames * ~TEST.mask), rtol=1e-6)


def test_sector_curves_are_nearer_to_the_truth_and_know_their_errors(denoiser):
    angle = TEST.samples[0].angle
    sector = (angle - 12, angle + 12) if angle < 168 else (angle - 192, angle - 168)
    reduction = Reduction(TEST.poni, mask=TEST.mask, bins=20, sector=sector)
    repeated = np.random.default_rng(1).poisson(DOSE * TEST.rates[0], (24, 64, 64))
    truth = integrate(DOSE * TEST.rates[:1], reduction)[0]
    curves = integrate(denoiser(repeated, TEST.centre, TEST.mask)["denoised"].values, reduction)
    raw = reduction(repeated)["I"].values
    far = truth < np.quantile(truth, 0.8)
    assert np.sqrt(np.mean((curves / truth - 1)[:, far] ** 2)) < 0.6 * np.sqrt(np.mean((raw / truth - 1)[:, far] ** 2))
    found = bootstrap(denoiser, repeated[0], reduction, TEST.centre, TEST.mask, seed=2)
    ratio = found.curve["Idev"].values / curves.std(axis=0, ddof=1)
    assert np.median(ratio) == pytest.approx(1, abs=0.3)
    np.testing.assert_allclose(np.sqrt(np.diag(found.covariance.dense())), found.curve["Idev"], rtol=1e-6)


def test_a_third_of_what_replicas_lack_is_given_back():
    reduction = Reduction(TEST.poni, mask=TEST.mask, bins=10, sector=(-30, 30))
    denoised = np.full((64, 64), 8.0)
    # A denoiser that answers 7/8 of what it should, passes 0.6 of a deviation on, and has noise of 1.
    rng = np.random.default_rng(3)
    again = 7 + rng.normal(size=(500, 1, 1))
    twice = 7 / 8 * 7 + 0.6 * (again - 7) + rng.normal(size=again.shape)
    frames = [part * np.ones((1, 64, 64)) for part in (again, twice)]
    found = sector_of(Resampled(xr.Dataset({"denoised": (("y", "x"), denoised)}), *frames), reduction)
    unit = integrate(np.ones((1, 64, 64)), reduction)[0]
    np.testing.assert_allclose(found.curve["I"], (8 + (8 - again.mean()) / 3) * unit)
    np.testing.assert_allclose(found.replicas.mean(axis=0), found.curve["I"])
    np.testing.assert_allclose(found.curve["Idev"], (4 / 3 - 0.6 / 3) * unit, rtol=0.1)  # (4 d - 0.6 d) / 3


def test_low_rank_keeps_the_variances_and_the_strongest_correlation():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((400, 1)) * np.linspace(1, 2, 30) + 0.1 * rng.standard_normal((400, 30))
    found = low_rank(samples, 2).dense()
    np.testing.assert_allclose(np.diag(found), samples.var(axis=0, ddof=1), rtol=1e-9)
    assert found[0, -1] == pytest.approx(2, rel=0.15)


def test_a_sector_is_desmeared_with_its_covariance(denoiser):
    reduction = Reduction(TEST.poni, mask=TEST.mask, bins=25, sector=(-20, 20))
    sector = bootstrap(denoiser, TEST.frames(DOSE, 8)[0], reduction, TEST.centre, TEST.mask, replicas=8)
    smearing = Smearing.gaussian(reduction.q, 0.02)
    result, covariance = desmear_sector(sector, smearing, "map")
    assert (result["Idev"] >= result["Idev_noise"]).all()
    np.testing.assert_allclose(np.sqrt(np.diag(covariance.dense())), result["Idev_noise"], rtol=1e-6)
    assert float(np.median(result["I"] / sector.curve["I"])) == pytest.approx(1, abs=0.2)
    with pytest.raises(BadInput, match="not that of this sector"):
        desmear_sector(sector, Smearing.gaussian(reduction.q[1:], 0.02), "map")


def test_expected_counts_scale_with_what_is_shown():
    """An untrained network answers the mean of its views: half the photons, half the answer."""
    network, views = UNet(DenoiserConfig(channels=(4, 4))), Views(torch.full((20, 20), 2.0))
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    counts = torch.full((1, 20, 20), 6.0)
    # Rings of few pixels do not know their harmonics, and their fits are held a little too low.
    np.testing.assert_allclose(expected(network, views(counts)).detach(), 6.02, rtol=0.02)
    np.testing.assert_allclose(expected(network, views(counts / 2)).detach(), 3.02, rtol=0.02)


def test_fits_to_rings_find_their_harmonics_through_a_mask():
    y, x = (np.arange(60) + 0.5 - 30 for _ in range(2))
    pattern = 5 + 2 * np.cos(2 * (np.arctan2(y[:, None], x) - 0.3))
    weight = torch.ones(60, 60)
    weight[20:25] = 0
    weight = torch.minimum(weight, weight.flip(0, 1))
    found = RingHarmonics(weight, (2, 4))(torch.as_tensor(pattern[None], dtype=torch.float32) * weight)[0].numpy()
    far = np.hypot(y[:, None], x) > 12
    np.testing.assert_allclose(found[far], pattern[far], rtol=0.08)

"""Weak exposures of an instrument: each answered by itself, with orientations and a desmeared sector; live and by replay."""

import json

import numpy as np
import pytest
from bluesky import plan_stubs as bps
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.queries import Key

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.denoising.exposures import PreparedPatterns
from dsnet_bluesky.denoising.orientation import Orientation, Orientations, scatter
from dsnet_bluesky.desmearing.covariance import covariance
from dsnet_bluesky.learning import frames_of_runs, train_on_runs
from dsnet_bluesky.pipeline import Config, prepare_exposures
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.questions import OfRun, Sample
from dsnet_bluesky.reduction import Reduction, psf
from dsnet_bluesky.replay import replay
from dsnet_bluesky.rows import columns_of, pack
from dsnet_bluesky.sim.anisotropic import AnisotropicScan
from dsnet_bluesky.sim.patterns import EMPTY, PatternCamera, ScanStage, pattern_detector
from dsnet_bluesky.versions import load_model
from tests.denoising.small import DOSE

TEST = AnisotropicScan.draw(1, "test", 1, shape=(64, 64), centre=(31.6, 32.3)).turned([20.0, 80.0, 140.0])
CAMERA = PatternCamera(TEST, DOSE, seed=3)
FRAMES = np.stack([CAMERA.frame(place, 1.0) for place in range(3)])
OPTIONS = {"sector": [20.0, 30.0], "replicas": 9, "method": "map"}


@pytest.fixture(scope="module")
def reduction():
    return Reduction(TEST.poni, mask=TEST.mask, bins=25, sector=(5, 35))


@pytest.fixture(scope="module")
def prepared(trained, reduction):
    smearing = reduction.smearing(psf(CAMERA.frame(EMPTY, 1.0), TEST.poni))
    return PreparedPatterns(reduction, smearing, model=str(trained), replicas=9, method="map")


@pytest.fixture(scope="module")
def answer(prepared):
    return prepared.answer(prepared.reduce(FRAMES, time=2.0, transmission=[0.5, 0.5, 1.0]))


def test_exposures_are_answered_alike_together_and_alone(prepared, answer):
    alone = prepared.answer(prepared.reduce(FRAMES[1], time=2.0, transmission=0.5))
    for name, values in alone.data_vars.items():
        np.testing.assert_array_equal(values.isel(exposure=0), answer[name].isel(exposure=1), err_msg=name)


def test_an_answer_holds_frames_orientations_and_a_desmeared_sector(answer, prepared):
    assert dict(answer.sizes) == {"exposure": 3, "y": 64, "x": 64, "q": prepared.reduction.q.size, "component": 8}
    assert (answer["status"] == "ok").all()
    truth = CAMERA.smeared[:, ~TEST.mask]
    raw, denoised = (np.mean((f[:, ~TEST.mask] - truth) ** 2 / truth) for f in (FRAMES, answer["denoised"].values))
    assert denoised < 0.12 * raw
    assert not (answer["flags"].values & int(Flag.ASYMMETRIC | Flag.BIASED | Flag.FEW_COUNTS)).any()
    # Divided as a reduction does: the third exposure has twice the transmission.
    level = answer["I_smeared"].mean("q").values / answer["denoised"].mean(("y", "x")).values
    np.testing.assert_allclose(level[2] / level[:2], 0.5, rtol=0.6)
    assert (answer["Idev"] >= answer["Idev_noise"] * (1 - 1e-9)).all()
    assert answer.attrs["model"] == "symmetry-denoiser:1.0.0"
    assert pack(answer, columns_of(answer)).shape[0] == 3


def test_orientations_follow_the_sample_within_their_errors(answer, reduction):
    exact = Orientations(reduction)(CAMERA.smeared)
    strong = (exact.anisotropy > 0.3) & np.isfinite(answer["orientation"].values)
    assert strong.sum() > 10
    away = (answer["orientation"].values - exact.azimuth + 90) % 180 - 90
    pulls = away[strong] / answer["orientation_dev"].values[strong]
    assert np.sqrt(np.mean(away[strong] ** 2)) < 6
    assert np.median(np.abs(pulls)) < 2


def test_orientations_are_exact_for_a_cosine_behind_a_mask(reduction):
    y, x = (np.arange(64) + 0.5 - c for c in TEST.centre)
    chi = np.arctan2(y[:, None], x)
    found = Orientations(reduction)((1 + 0.4 * np.cos(2 * (chi - np.deg2rad(150))))[None])
    known = np.isfinite(found.azimuth[0])
    assert known.sum() > 15
    np.testing.assert_allclose(found.azimuth[0][known], 150, atol=1e-6)
    np.testing.assert_allclose(found.anisotropy[0][known], 0.4, atol=1e-9)


def test_the_scatter_of_azimuths_knows_that_they_are_axes():
    azimuth = (180 + np.random.default_rng(1).normal(0, 3, (400, 1))) % 180
    found = scatter(Orientation(azimuth, np.ones_like(azimuth)))
    assert found.azimuth[0] == pytest.approx(3, rel=0.15)


def test_the_covariance_of_a_sector_is_that_of_its_errors(answer):
    one = answer.isel(exposure=0)
    found = covariance(one).dense()
    np.testing.assert_allclose(np.sqrt(np.diag(found)), one["Idev"], rtol=1e-6)
    correlated = found / np.sqrt(np.outer(np.diag(found), np.diag(found)))
    assert np.median(np.diag(correlated, 1)) > 0.2


def test_an_empty_exposure_fails_by_itself(prepared):
    empty = np.zeros_like(FRAMES[:1])
    with pytest.raises(BadInput, match="no photon"):
        prepared.answer(prepared.reduce(empty))
    found = prepared.answer(prepared.reduce(np.concatenate([empty, FRAMES[:1]])))
    assert found["status"].values.tolist() == ["failed", "ok"]
    assert np.isnan(found["denoised"].values[0]).all()
    assert "no photon" in json.loads(found.attrs["failures"])[0]["reason"]


def test_an_asymmetric_exposure_is_flagged_alone(prepared):
    skewed = np.random.default_rng(0).poisson(CAMERA.smeared[:1] * np.linspace(0.4, 1.6, 64))
    found = prepared.answer(prepared.reduce(np.concatenate([skewed, FRAMES[:1]])))
    assert ((found["flags"].values & int(Flag.ASYMMETRIC)) > 0).tolist() == [True, False]


def test_frames_and_divisors_are_checked(prepared):
    with pytest.raises(BadInput, match="fractions"):
        prepared.reduce(FRAMES * 0.5)
    with pytest.raises(BadInput, match="must be positive"):
        prepared.reduce(FRAMES, time=0.0)
    with pytest.raises(BadInput, match="64 x 64"):
        prepared.reduce(FRAMES[:, 1:])


@pytest.mark.parametrize(("options", "said"), [({"sector": 20.0}, "The sector is"), ({"views": 2}, "has no option views")])
def test_options_are_checked(trained, options, said):
    config = Config(method="symmetry-denoiser", options={"model": str(trained), **options}, bins=25)
    with pytest.raises(BadInput, match=said):
        prepare_exposures(CAMERA.direct.astype(int), TEST.poni, mask=TEST.mask, beam_mask=np.zeros_like(TEST.mask), config=config)


def test_what_desmears_afterwards_is_part_of_the_identity(trained):
    config, other = (
        Config(method="symmetry-denoiser", options={"model": str(trained), **options}) for options in ({}, {"method": "map"})
    )
    assert config.options["method"] == load_model("dsnet").reference
    assert config.sha256 != other.sha256


def test_weak_exposures_are_answered_live_and_verified_by_replay(RE, client, detector_directory, trained):
    config = Config(method="symmetry-denoiser", options={"model": str(trained), **OPTIONS}, bins=25)
    np.save(detector_directory / "mask-patterns.npy", TEST.mask)
    instrument = Instrument(TEST.poni, mask=detector_directory / "mask-patterns.npy")
    stage = ScanStage(name="stage")
    detector = pattern_detector(detector_directory, PatternCamera(TEST, DOSE, seed=5), stage)
    callback = DesmearCallback(client, config=config)
    RE(ensure_connected(detector, stage))
    RE.subscribe(TiledWriter(client["raw"], batch_size=1))
    RE.subscribe(callback)

    def plan():
        yield from bps.mv(stage.place, EMPTY)
        yield from direct_beam(detector, instrument=instrument)
        scan = expose(detector, sample="fibres", instrument=instrument, motor=stage.place, positions=[0.0, 1.0, 2.0])
        return (yield from scan)

    beam, sample = RE(plan())
    assert callback.wait(60)
    assert callback.close()
    (node,) = client["analysed"].search(Key("raw_uid") == sample).values()
    assert (node.metadata["status"], node.metadata["operation"]) == ("complete", "denoise")
    assert node.metadata["direct_beam_uid"] == beam
    result = node.read()
    assert result["denoised"].shape == (3, 64, 64)
    assert covariance(result.isel(exposure=1)).factor.shape[1] == 8
    assert node.plot().axes
    assert node.plot_frames().axes
    checked = replay(client, config=config, questions=[OfRun(sample)], workers=0, verify=True)
    assert (checked.same, checked.different, checked.complete) == (1, {}, True)
    check_learning(client, sample, detector_directory)


def check_learning(client, sample, directory):
    """The same run to learn from: its frames, the beam where it was exposed; and three frames are too few."""
    found = frames_of_runs(client, [OfRun(sample)])
    assert found.counts.shape == (3, 64, 64)
    assert found.runs == [sample]
    np.testing.assert_allclose(found.centre, TEST.centre, atol=0.05)
    np.testing.assert_array_equal(found.mask, TEST.mask)
    with pytest.raises(BadInput, match="has 3 frames"):
        train_on_runs(client, directory / "model", questions=[OfRun(sample)])
    with pytest.raises(BadInput, match="no sample run"):
        frames_of_runs(client, [Sample("nylon")])


def test_a_run_that_has_not_ended_is_not_learned_from(delivered):
    line, writer = delivered
    line.beam()
    line.deliver(writer)
    line.sample(exposures=2)
    line.deliver(writer, ended=False)
    with pytest.raises(BadInput, match="has not ended in the catalog"):
        frames_of_runs(line.client, [Sample("AgBh")])

"""The simulated beamline against exact relations, and the closure of the whole chain on its frames."""

import asyncio

import h5py
import numpy as np
import pytest

from dsnet_bluesky.frames import FrameReference, read
from dsnet_bluesky.reduction import Reduction, centred, psf
from dsnet_bluesky.sim import PAPER_SLITS, SAMPLES, SaxsCamera, Setting, SilverBehenate, SimBeamline, Sphere

BEAMSTOP = 2.8e-3
ATTENUATION = 5000.0


@pytest.fixture(scope="module")
def camera():
    return SaxsCamera(seed=11)


def closure(camera, sample, slits):
    """chi2 per point of the re-smeared truth with free scale and flat background, and without smearing."""
    beam = camera.frame(Setting(None, slits.width, slits.height, attenuation=ATTENUATION), slits.time)
    direct_beam = psf(beam, camera.poni, mask=camera.mask())
    setting = Setting(sample, slits.width, slits.height, beamstop=BEAMSTOP)
    frame = camera.frame(setting, slits.time)
    reduction = Reduction(centred(camera.poni, direct_beam), mask=camera.mask(BEAMSTOP))
    smearing = reduction.smearing(direct_beam)
    curve = reduction(frame, time=slits.time)
    smeared = smearing.apply(camera.truth(setting, smearing.q_calc))
    return [chi2(curve, model) for model in (smeared, camera.truth(setting, reduction.q))], float(direct_beam["counts"])


def chi2(curve, model):
    I, Idev = curve["I"].values[0], curve["Idev"].values[0]
    columns = np.stack([model, np.ones_like(model)], axis=1) / Idev[:, None]
    residual = columns @ np.linalg.lstsq(columns, I / Idev, rcond=None)[0] - I / Idev
    return np.mean(residual**2)


@pytest.mark.parametrize("sample", [SilverBehenate(), Sphere()], ids=["AgBh", "sphere"])
@pytest.mark.parametrize("slits", [PAPER_SLITS[0], PAPER_SLITS[-1]], ids=lambda s: s.label)
def test_the_truth_closes_through_frames_reduction_and_operator(camera, sample, slits):
    (smeared, unsmeared), counts = closure(camera, sample, slits)
    assert counts >= 1e5
    assert 0.8 < smeared < 1.3
    assert unsmeared > 2.5 * smeared, "this slit must smear visibly, or the test shows nothing"


def test_direct_beam_is_where_the_geometry_says_and_never_saturates(camera):
    for slits in PAPER_SLITS:
        frame = camera.frame(Setting(None, slits.width, slits.height, attenuation=ATTENUATION), slits.time)
        valid = frame[~camera.mask()]
        assert valid.sum() >= 1e5
        assert valid.max() < camera.ceiling / 10
        centre = psf(frame, camera.poni, mask=camera.mask()).attrs
        assert (centre["centre_y"], centre["centre_x"]) == pytest.approx(camera.centre, abs=0.05)


def test_unattenuated_beam_stops_at_the_counters_ceiling(camera):
    frame = camera.frame(Setting(None, 0.8e-3, 0.5e-3), 2500.0)
    assert frame.max() == camera.ceiling == 2**20 - 1
    assert (frame == camera.ceiling).sum() > camera.hot.sum(), "the beam itself saturates"


def test_gaps_hot_pixels_and_beamstop(camera):
    frame = camera.frame(Setting(Sphere(), 4e-3, 2.5e-3, beamstop=BEAMSTOP), 60.0)
    assert (frame[camera.gaps] == -1).all()
    assert (frame[camera.hot] == camera.ceiling).all()
    y, x = (int(c) for c in camera.centre)
    arm = frame[y + 100 : y + 140, x - 2 : x + 3]
    assert (arm[~(camera.gaps | camera.hot)[y + 100 : y + 140, x - 2 : x + 3]] == 0).all()
    assert frame[y - 100 : y - 60, x - 2 : x + 3].max() > 0, "the arm is on one side only"


def test_photons_stay_equal_over_the_papers_slits(camera):
    photons = [s.time * camera.flux(s.width, s.height) for s in PAPER_SLITS]
    assert photons == pytest.approx([6e9] * 4)
    assert camera.flux(2e-3, 1.2e-3) == pytest.approx(0.4e8, rel=0.3)


def test_noise_is_poisson_and_follows_the_seed():
    setting = Setting(SilverBehenate(), 4e-3, 2.5e-3)
    frames = [SaxsCamera(seed=seed).frame(setting, 60.0) for seed in (1, 1, 2)]
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    camera = SaxsCamera(seed=3)
    rate = camera.rate(setting) * 60.0
    valid = ~camera.mask() & (rate > 1) & (rate < camera.ceiling / 10)
    z = (camera.frame(setting, 60.0) - rate)[valid] / np.sqrt(rate[valid])
    assert z.var() == pytest.approx(1.0, abs=0.01)
    assert z.mean() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("name", SAMPLES)
def test_truths_are_finite_positive_and_smooth_at_zero(name):
    truth = SAMPLES[name].truth
    values = truth(np.linspace(0, 4, 2001))
    assert np.isfinite(values).all()
    assert (values > 0).all()
    assert truth(0.0) == pytest.approx(truth(1e-4), rel=1e-3)


def test_silver_behenate_peaks_where_it_should():
    sample = SilverBehenate()
    assert sample.peaks[0] == pytest.approx(2 * np.pi / 5.838)
    q = np.linspace(0.9, 1.3, 4001)
    assert q[np.argmax(sample.truth(q))] == pytest.approx(sample.peaks[0], abs=2e-3)
    assert 2.3548 * sample.sigma == pytest.approx(0.0628, abs=1e-3)


def test_sphere_vanishes_at_its_first_minimum():
    sample = Sphere(radius=8.0, background=0.0)
    assert sample.truth(4.493409458 / 8.0) < 1e-15
    assert sample.truth(0.0) == pytest.approx(1.0)


def test_detector_writes_frames_that_others_read_while_it_writes(tmp_path):
    beamline = SimBeamline(tmp_path, SaxsCamera(seed=5))

    async def take():
        for device in beamline.devices:
            await device.connect()
        await beamline.changer.sample.set("AgBh")
        await beamline.detector.stage()
        await beamline.detector.trigger()
        docs = [doc async for doc in beamline.detector.collect_asset_docs()]
        resource = docs[0][1]
        first = read(FrameReference(resource["uri"], resource["mimetype"], resource["parameters"], 0, 1))
        await beamline.detector.trigger()
        second = read(FrameReference(resource["uri"], resource["mimetype"], resource["parameters"], 1, 2))
        await beamline.detector.unstage()
        return resource["parameters"]["dataset"], first, second

    dataset, first, second = asyncio.run(take())
    assert first.shape == (1, *beamline.camera.shape)
    assert not np.array_equal(first, second)
    (path,) = tmp_path.glob("*.h5")
    with h5py.File(path) as file:
        stored = file[dataset]
        assert stored.shape == (2, *beamline.camera.shape)
        assert stored.chunks == (1, *beamline.camera.shape)
        assert stored.dtype == np.int32
        assert stored.id.get_create_plist().get_filter(0)[0] == 32008  # bitshuffle


def test_unknown_sample_is_named(tmp_path):
    beamline = SimBeamline(tmp_path)

    async def take():
        for device in beamline.devices:
            await device.connect()
        await beamline.changer.sample.set("gold")
        return await beamline.setting()

    with pytest.raises(ValueError, match="not 'gold'"):
        asyncio.run(take())

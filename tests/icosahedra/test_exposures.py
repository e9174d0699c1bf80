"""Images of an instrument, brought to the model's grid and read."""

import json
import math

import numpy as np
import pytest
import torch

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.icosahedra import Icosahedra
from dsnet_bluesky.icosahedra.exposures import PreparedImages
from dsnet_bluesky.icosahedra.images import exposed
from dsnet_bluesky.icosahedra.multislice import SPHERE, WAVELENGTH
from dsnet_bluesky.icosahedra.rotations import misorientation
from dsnet_bluesky.rows import columns_of, decode_words, pack, unpack
from dsnet_bluesky.sim.shots import Particle, SingleShotCamera
from dsnet_bluesky.versions import load_model

MODEL = "icosahedra:1.0.0"
SHAPE = (220, 260)


def geometry(**changes):
    """A flat detector with other pixels along y than along x, the beam off its middle."""
    config = {"pixel1": 0.4e-3, "pixel2": 0.34e-3, "max_shape": list(SHAPE), "orientation": 3}
    values = {"dist": 0.05, "poni1": 0.043, "poni2": 0.0455, "rot1": 0.0, "rot2": 0.0, "rot3": 0.0}
    return {"poni_version": 2.1, **values, "detector": "Detector", "detector_config": config, "wavelength": 1.35e-8, **changes}


@pytest.fixture(scope="module")
def prepared():
    return PreparedImages(geometry(), None, model=MODEL)


@pytest.fixture(scope="module")
def camera():
    return SingleShotCamera([*Particle.draw(5, seed=8), Particle(80.0, (1.0, 0, 0, 0), SPHERE)], seed=2)


@pytest.fixture(scope="module")
def of_camera(camera):
    return PreparedImages(camera.poni, camera.mask, model=MODEL)


@pytest.fixture(scope="module")
def frames(camera):
    return np.stack([camera.frame(None, 1.0) for _ in camera.particles])


@pytest.fixture(scope="module")
def reduced(of_camera, frames):
    return of_camera.reduce(frames)


@pytest.fixture(scope="module")
def result(of_camera, reduced):
    return of_camera.answer(reduced)


class TestReduce:
    def test_an_even_intensity_stays_even(self, prepared):
        """Pixels of one intensity per solid angle, without polarisation."""
        ai = prepared._ai
        frame = 7.0 * ai.solidAngleArray(SHAPE) * ai.polarization(SHAPE, 0.0)
        image = prepared.reduce(frame[None], time=2.0)["image"].values
        assert image.shape == (1, 128, 128)
        np.testing.assert_allclose(image[np.isfinite(image)], 3.5, rtol=1e-6)
        assert np.isfinite(image).mean() > 0.98

    @pytest.mark.parametrize("turned", [{}, {"rot1": 0.05, "rot2": -0.03, "poni1": 0.045, "poni2": 0.043}])
    def test_a_known_function_of_q_comes_out_on_the_grid(self, turned):
        """Also where the detector is tilted: pyFAI's map of q is a way of its own."""
        prepared = PreparedImages(geometry(**turned), None, model=MODEL, polarisation=None)
        z, y, x = prepared._ai.calc_pos_zyx(corners=False)
        k, length = 2 * math.pi / WAVELENGTH, np.sqrt(x**2 + y**2 + z**2)
        smooth = lambda qy, qx: 300 + 300 * qy - 200 * qx + 500 * qx * qy  # noqa: E731
        frame = smooth(k * y / length, k * x / length) * prepared._ai.solidAngleArray(SHAPE)
        image = prepared.reduce(frame[None])["image"].isel(exposure=0)
        expected = smooth(image["qy"], image["qx"]).transpose("qy", "qx").values
        known = np.isfinite(image.values)
        assert known.mean() > 0.9
        away = np.abs(image.values / expected - 1)[known]
        assert np.quantile(away, 0.98) < 1e-3, "but for the edge, which lies within pixels of the grid"
        assert away.max() < 0.02

    def test_masked_and_failing_pixels_do_not_count(self, prepared):
        mask = np.zeros(SHAPE, dtype=bool)
        mask[80:90, 60:75] = True
        frame = np.full(SHAPE, 50, dtype=np.int32)
        plain = prepared.reduce(frame[None])["image"].values
        frame[mask] = 999_999
        frame[150, 160:170] = -1
        masked = PreparedImages(geometry(), mask, model=MODEL).reduce(frame[None])["image"].values
        lost = np.isnan(masked) & np.isfinite(plain)
        assert 30 < lost.sum() < 200
        np.testing.assert_allclose(masked[~np.isnan(masked)], plain[~np.isnan(masked)], rtol=0.02)

    def test_frames_of_another_detector_are_refused(self, prepared):
        with pytest.raises(BadInput, match="220 x 260"):
            prepared.reduce(np.ones((1, 64, 64)))
        with pytest.raises(BadInput, match="monitor must be positive"):
            prepared.reduce(np.ones((1, *SHAPE)), monitor=0.0)


class TestAnswer:
    def test_a_flat_detector_with_the_beam_off_its_middle_gives_what_the_grid_gives(self, camera, result):
        reader = Icosahedra(load_model(MODEL))
        radius, quaternion = (torch.tensor([getattr(p, name) for p in camera.particles[:5]]) for name in ("radius", "quaternion"))
        images = reader.simulator(radius, quaternion)
        on_grid = reader(exposed(images, torch.full((5,), 1e7), torch.Generator().manual_seed(0)).numpy())
        found = result.isel(exposure=slice(5))
        for expected in (on_grid["radius"].values, radius.numpy()):
            away = np.abs(found["radius"].values - expected)
            assert np.median(away) < 3.0
            assert away.max() < 6.0
        for expected in (torch.tensor(on_grid["quaternion"].values), quaternion.double()):
            assert misorientation(torch.tensor(found["quaternion"].values), expected).max() < 4.0

    def test_a_sphere_is_flagged(self, result):
        assert (result["flags"].values & int(Flag.POOR_FIT)).astype(bool).tolist() == [False] * 5 + [True]

    def test_exposures_do_not_depend_on_each_other(self, of_camera, frames, result):
        for number in (1, 4):
            alone = of_camera.answer(of_camera.reduce(frames[number]))
            for name in ("radius", "quaternion", "score", "radius_dev", "misorientation_dev", "flags"):
                np.testing.assert_allclose(alone[name][0], result[name][number], rtol=1e-4, atol=1e-4)

    def test_results_are_rows_of_numbers(self, result):
        columns = columns_of(result)
        again = decode_words(unpack(pack(result, columns), columns, result.attrs))
        assert again["status"].values.tolist() == ["ok"] * 6
        assert again["quaternion"].attrs["components"] == "w x y z"
        np.testing.assert_array_equal(again["quaternion"], result["quaternion"])

    def test_an_exposure_without_light_fails_alone(self, of_camera, frames, result):
        found = of_camera.answer(of_camera.reduce(np.stack([frames[0], 0 * frames[0], frames[2]])))
        assert found["status"].values.tolist() == ["ok", "failed", "ok"]
        assert np.isnan(found["radius"].values).tolist() == [False, True, False]
        (failure,) = json.loads(found.attrs["failures"])
        assert failure["exposure"] == 1
        np.testing.assert_allclose(found["radius"][2], result["radius"][2], rtol=1e-4)
        with pytest.raises(BadInput, match="no unmasked pixel with a positive count"):
            of_camera.answer(of_camera.reduce(0 * frames[:1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wavelength": 1.54e-10}, "reads images at 13.5 nm"),
        ({"dist": 0.2}, "must reach 17 degrees on all sides"),
        ({"poni1": 0.08}, "must reach 17 degrees on all sides"),
        ({"detector": "Aarhus", "detector_config": {}, "dist": 0.3}, "not flat"),
    ],
)
def test_instruments_that_cannot_serve_are_refused(changes, words):
    with pytest.raises(BadInput, match=words):
        PreparedImages(geometry(**changes), None, model=MODEL)


def test_a_mask_that_leaves_nothing_is_refused():
    with pytest.raises(BadInput, match="leaves no pixel"):
        PreparedImages(geometry(), np.ones(SHAPE, dtype=bool), model=MODEL)


def test_another_model_is_refused():
    with pytest.raises(BadInput, match="no model of icosahedra"):
        PreparedImages(geometry(), None, model="dsnet:2.0.0")

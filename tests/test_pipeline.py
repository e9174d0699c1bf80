"""From frames to a desmeared Dataset, on simulated counts with known truth."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyFAI
import pytest

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.pipeline import Config, prepare_exposures
from dsnet_bluesky.versions import load_model
from tests.models import own_model

PIXEL = 172e-6
SHAPE = (195, 487)
PONI = {
    "poni_version": 2.1,
    "dist": 1.5,
    "poni1": 100.5 * PIXEL,
    "poni2": 100.5 * PIXEL,
    "rot1": 0.0,
    "rot2": 0.0,
    "rot3": 0.0,
    "detector": "Pilatus100k",
    "detector_config": {"orientation": 3},
    "wavelength": 1.54e-10,
}
Y = (np.arange(SHAPE[0]) + 0.5 - 100.5) * PIXEL
X = (np.arange(SHAPE[1]) + 0.5 - 100.5) * PIXEL
CONFIG = Config(bins=150, q_min=0.1, per_bin=64)


def beam() -> np.ndarray:
    inside = (abs(Y)[:, None] < 1.3e-3) & (abs(X) < 0.8e-3)
    return np.random.default_rng(0).poisson(3e5 * inside / inside.sum()).astype(np.int32)


def frames(count: int = 2) -> np.ndarray:
    ai = pyFAI.load(PONI)
    q = ai.qArray(SHAPE)
    rate = 200 * np.exp(-((2.5 * q) ** 2) / 3) + 0.5
    return np.random.default_rng(1).poisson(rate * ai.solidAngleArray(SHAPE), (count, *SHAPE)).astype(np.int32)


def test_frames_become_a_desmeared_dataset():
    prepared = prepare_exposures(beam(), PONI, config=CONFIG)
    result = prepared(frames(), time=[1.0, 2.0])
    assert result["I"].dims == ("exposure", "q")
    assert list(result["status"].values) == ["ok", "ok"]
    np.testing.assert_allclose(result["chi2"], 1, atol=0.4)
    np.testing.assert_allclose(result["I_smeared"].mean(), result["I_smeared"][0].mean() * 0.75, rtol=0.05)
    for name in ("I", "Idev", "I_smeared", "Idev_smeared", "I_resmeared"):
        assert np.isfinite(result[name]).all(), name


def test_the_same_beam_is_prepared_once():
    assert prepare_exposures(beam(), PONI, config=CONFIG) is prepare_exposures(beam(), PONI, config=CONFIG)
    other = Config(bins=150, q_min=0.1, per_bin=65)
    assert prepare_exposures(beam(), PONI, config=other) is not prepare_exposures(beam(), PONI, config=CONFIG)


def test_threads_share_one_preparation():
    config = Config(bins=120, q_min=0.1, per_bin=64)
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(prepare_exposures(beam(), PONI, config=config))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1


def test_what_is_dead_in_the_direct_beam_is_masked():
    dead = beam()
    dead[:, 250:260] = -1
    assert prepare_exposures(dead, PONI, config=CONFIG).reduction.mask[:, 250:260].all()


@pytest.mark.parametrize(
    ("frame", "config", "message"),
    [
        (np.zeros(SHAPE, np.int32), CONFIG, "0 counts"),
        (beam(), Config(bins=150, minimum_beam_counts=1e7), "at least 10000000"),
        (beam(), Config(method="magic"), "magic"),
    ],
)
def test_what_cannot_be_prepared_is_named(frame: np.ndarray, config: Config, message: str):
    with pytest.raises(BadInput, match=message):
        prepare_exposures(frame, PONI, config=config)


class TestRanges:
    """What the card of a model says it was trained on decides what is flagged."""

    def flags(self, **changes: Any) -> np.ndarray:
        config = Config(**{"bins": 150, "q_min": 0.1, "per_bin": 64, "options": {"fallback": False}, **changes})
        return prepare_exposures(beam(), PONI, config=config)(frames())["flags"].values & int(Flag.OUT_OF_RANGE)

    def test_curve_inside_the_ranges_is_not_flagged(self):
        assert not self.flags().any()

    def test_fewer_points_and_wider_smearing_are_flagged(self):
        assert load_model("dsnet").card["ranges"]["points"][0] == 50
        assert self.flags(bins=45).all()
        assert not self.flags(q_min=1.0).any()
        assert self.flags(q_min=1.0, wavelength_spread=0.15).all()

    @pytest.mark.parametrize(
        "ranges",
        [
            {"points": [151, 600], "width_in_steps": 14.6, "widths_in_range": 6.8},
            {"points": [50, 600], "width_in_steps": 1.0, "widths_in_range": 6.8},
            {"points": [50, 600], "width_in_steps": 14.6, "widths_in_range": 500.0},
        ],
    )
    def test_a_model_that_was_trained_on_less_flags_more(self, tmp_path: Path, ranges: dict):
        narrow = own_model(tmp_path / "narrow", retrained=False, ranges=ranges)
        assert self.flags(options={"fallback": False, "model": str(narrow)}).all()


def test_the_digest_of_a_configuration_is_stable():
    assert Config().sha256 == Config().sha256
    assert Config(options={"a": 1}).sha256 != Config(options={"a": 2}).sha256
    assert Config(bins=400).to_dict()["bins"] == 400

"""Icosahedra through the whole mechanism: a plan, live answers beside the raw run, and the same by replay."""

from typing import Any

import numpy as np
import pytest
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.queries import Key

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.icosahedra.multislice import SPHERE
from dsnet_bluesky.pipeline import Config, prepare_exposures
from dsnet_bluesky.plans import Instrument, expose
from dsnet_bluesky.queries import IcosahedraClient
from dsnet_bluesky.questions import OfRun
from dsnet_bluesky.replay import replay
from dsnet_bluesky.sim.shots import Particle, SingleShotCamera, single_shot_detector
from dsnet_bluesky.versions import load_model

CONFIG = Config(method="icosahedra")


@pytest.fixture
def camera():
    return SingleShotCamera([*Particle.draw(2, seed=11), Particle(90.0, (1.0, 0, 0, 0), SPHERE)], seed=5)


@pytest.fixture
def shoot(RE, client, detector_directory, camera):
    """Take the shots as a run, with or without answers on the way."""
    detector = single_shot_detector(detector_directory, camera)
    np.save(detector_directory / "mask-shots.npy", camera.mask)
    RE(ensure_connected(detector))
    RE.subscribe(TiledWriter(client["raw"], batch_size=1))

    def shoot(*, live, **poni):
        instrument = Instrument({**camera.poni, **poni}, mask=detector_directory / "mask-shots.npy")
        callback = DesmearCallback(client, config=CONFIG) if live else None
        token = RE.subscribe(callback) if callback else None
        (uid,) = RE(expose(detector, sample="silver", instrument=instrument, exposures=3))
        if callback:
            assert callback.wait(60)
            RE.unsubscribe(token)
            assert callback.close()
        return uid

    return shoot


def result_of(client, uid):
    (node,) = client["analysed"].search(Key("raw_uid") == uid).values()
    return node


def test_shots_are_answered_live_and_verified_by_replay(client, camera, shoot):
    uid = shoot(live=True)
    node = result_of(client, uid)
    assert isinstance(node, IcosahedraClient)
    said: dict[str, Any] = dict(node.metadata)
    assert (said["status"], said["method"], said["operation"]) == ("complete", "icosahedra", "size and orientation")
    assert said["model_sha256"] == load_model("icosahedra:1.0.0").sha256
    assert said["score_least"] <= said["score_median"]
    assert node.direct_beam is None
    result = node.read()
    assert dict(result.sizes) == {"exposure": 3, "component": 4}
    assert (result["status"] == "ok").all()
    np.testing.assert_allclose(result["radius"][:2], [particle.radius for particle in camera.particles[:2]], atol=6)
    assert (result["flags"].values & int(Flag.POOR_FIT)).astype(bool).tolist() == [False, False, True]
    assert node.plot().axes
    checked = replay(client, config=CONFIG, questions=[OfRun(uid)], workers=0, verify=True)
    assert (checked.same, checked.different, checked.complete) == (1, {}, True)


def test_replay_answers_what_was_not_live(client, camera, shoot):
    uid = shoot(live=False)
    found = replay(client, config=CONFIG, questions=[OfRun(uid)], workers=0)
    assert (found.to_do, found.stored, found.complete) == (1, 1, True)
    np.testing.assert_allclose(result_of(client, uid).read()["radius"][:2], [p.radius for p in camera.particles[:2]], atol=6)
    assert replay(client, config=CONFIG, questions=[OfRun(uid)], workers=0).to_do == 0


def test_another_wavelength_fails_with_its_reason(client, shoot):
    node = result_of(client, shoot(live=True, wavelength=1.54e-10))
    assert node.status == "failed"
    assert "reads images at 13.5 nm" in node.reason


def test_options_are_checked(camera):
    config = Config(method="icosahedra", options={"windows": 3})
    with pytest.raises(BadInput, match="icosahedra has no option windows; its options are model, views, polarisation"):
        prepare_exposures(None, camera.poni, config=config)

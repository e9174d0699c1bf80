"""The simulated single-shot instrument against exact relations."""

import asyncio
import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from dsnet_bluesky.frames import FrameReference, read
from dsnet_bluesky.icosahedra.multislice import SPHERE, WAVELENGTH
from dsnet_bluesky.reduction.geometry import beam_pixel, integrator
from dsnet_bluesky.sim.shots import Particle, SingleShotCamera, single_shot_detector

SHAPE = (200, 210)
K = 2 * math.pi / WAVELENGTH


def camera(particles=(), **options):
    """Coarse pixels: tests are quick."""
    return SingleShotCamera(particles, **{"shape": SHAPE, "pixel": 0.4e-3, "centre": (96.3, 108.8), "seed": 1, **options})


def test_a_transparent_sphere_scatters_as_born_says(monkeypatch):
    """Geometry, solid angle and polarisation, from pyFAI's own maps."""
    simulated = camera(points=128)
    monkeypatch.setattr(simulated, "_simulator", dataclasses.replace(simulated._simulator, length=math.inf))
    found = simulated.expected(Particle(40.0, (1.0, 0.0, 0.0, 0.0), SPHERE))
    ai = integrator(simulated.poni)
    x = 40.0 * ai.qArray(SHAPE)
    expected = ((np.sin(x) - x * np.cos(x)) / x**3) ** 2 * ai.solidAngleArray(SHAPE) * ai.polarization(SHAPE, 0.0)
    bright = expected > 1e-4 * expected.max()
    away = np.abs(found / expected * expected.max() - 1)[bright]
    assert np.quantile(away, 0.98) < 0.02, "but for the middles of the minima, where the way between points of the grid counts"


def test_the_beam_is_where_the_geometry_says():
    simulated = camera()
    assert beam_pixel(integrator(simulated.poni)) == pytest.approx(simulated.centre)
    y, x = np.nonzero(simulated.mask)
    assert (y.mean() + 0.5, x.mean() + 0.5) == pytest.approx(simulated.centre, abs=0.3)


def test_every_shot_is_another_particle_and_then_there_is_none():
    particles = Particle.draw(2, seed=3)
    simulated = camera(particles)
    first, second, empty = (simulated.frame(None, 1.0) for _ in range(3))
    assert first.dtype == np.int32
    assert not first[simulated.mask].any()
    assert all(1e5 < frame.max() < 1.1e8 for frame in (first, second))
    assert empty[~simulated.mask].mean() == pytest.approx(1.0, abs=0.02)
    assert np.array_equal(camera(particles).frame(None, 1.0), first)
    assert np.corrcoef(np.log(first.ravel() + 1), np.log(second.ravel() + 1))[0, 1] < 0.95


def test_the_detector_writes_every_shot(tmp_path):
    simulated = camera(Particle.draw(2, seed=4))
    detector = single_shot_detector(tmp_path, simulated)

    async def take():
        await detector.connect()
        await detector.stage()
        for _ in range(2):
            await detector.trigger()
        documents: list[Any] = [document async for document in detector.collect_asset_docs()]
        await detector.unstage()
        return documents[0][1]

    resource = asyncio.run(take())
    frames = read(FrameReference(resource["uri"], resource["mimetype"], resource["parameters"], 0, 2))
    assert frames.shape == (2, *SHAPE)
    again = camera(simulated.particles)
    assert all(np.array_equal(frame, again.frame(None, 1.0)) for frame in frames)

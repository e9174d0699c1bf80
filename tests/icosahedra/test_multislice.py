"""The simulator against what is known exactly, and against itself."""

import math

import numpy as np
import pytest
import torch

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.icosahedra.images import VIEWS, view, viewed_from
from dsnet_bluesky.icosahedra.multislice import ICOSAHEDRON, SPHERE, Detector, Simulator
from dsnet_bluesky.icosahedra.rotations import GOLDEN, group, multiply, random_quaternions

from .mie import amplitudes, coefficients

ONE = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
VOLUME = 5 * (3 + math.sqrt(5)) / 12 * (math.hypot(1, GOLDEN) / 2) ** -3
GYRATION = 3 * GOLDEN**2 / 20 * (math.hypot(1, GOLDEN) / 2) ** -2
"""Of an icosahedron of radius 1: volume and square of the radius of gyration."""

SMALL = Detector(pixels=64)


def image(radius, quaternion=ONE, **options):
    return Simulator(**{"detector": SMALL, **options})(torch.tensor([float(radius)]), quaternion)[0].double().numpy()


def apart(a, b):
    """Root mean square of the difference of the decadic logarithms, where there is light."""
    lit = b > 1e-6 * b.max()
    return float(np.sqrt(np.mean(np.log10(a[lit] / b[lit]) ** 2)))


def born(radius, q=SMALL.modulus):
    x = radius * q
    return (4 * np.pi * radius**3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


def mie(radius, index, detector=SMALL):
    """Perpendicular to the plane of scattering, |S1|^2: there Born's amplitude has no factor of its own."""
    k = detector.wave_number
    cosine = 1 - detector.modulus.ravel() ** 2 / (2 * k**2)
    first, _ = amplitudes(k * radius, index, cosine)
    return np.abs(first.reshape(detector.modulus.shape)) ** 2


class TestMie:
    def test_small_spheres_are_dipoles(self):
        first, second = amplitudes(0.01, 1.5, np.array([0.0, 0.5, 1.0]))
        expected = first[0]
        assert abs(expected) == pytest.approx(0.01**3 * (1.5**2 - 1) / (1.5**2 + 2), rel=1e-3)
        np.testing.assert_allclose(first, np.full(3, expected), rtol=1e-3, atol=1e-10)
        np.testing.assert_allclose(second, expected * np.array([0.0, 0.5, 1.0]), rtol=1e-3, atol=1e-10)

    def test_forward_scattering_obeys_the_optical_theorem(self):
        """Without absorption what is lost is what is scattered."""
        n = np.arange(1, 40)
        a, b = coefficients(12.0, 1.3, 39)
        scattered = np.sum((2 * n + 1) * (abs(a) ** 2 + abs(b) ** 2))
        assert np.sum((2 * n + 1) * np.real(a + b)) == pytest.approx(scattered, rel=1e-10)


def test_detector_lies_on_the_ewald_sphere():
    detector = Detector()
    assert detector.q[64] == pytest.approx(detector.step / 2)
    angle = np.arcsin(detector.q[-1] / detector.wave_number)
    on_axis = np.hypot(detector.q[-1], detector.wave_number * (1 - np.cos(angle)))
    assert on_axis == pytest.approx(2 * detector.wave_number * np.sin(angle / 2))
    np.testing.assert_allclose(detector.modulus[64, -1], np.hypot(on_axis, detector.step / 2), rtol=2e-3)
    # Fringes of the largest particle, 2 pi / (2 R), are wider than four pixels.
    assert 2 * np.pi / 320 > 4 * detector.step


@pytest.mark.parametrize(("radius", "limit"), [(30, 0.005), (70, 0.012), (160, 0.03)])
def test_spheres_scatter_as_born_says(radius, limit):
    """A quarter of the error for half of the step."""
    expected = born(radius)
    errors = [apart(image(radius, solid=SPHERE, length=math.inf, points=n, slices=n), expected) for n in (96, 192)]
    assert errors[0] < limit
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("radius", [30, 70])
def test_weak_spheres_scatter_as_mie_says(radius):
    found, expected = image(radius, solid=SPHERE, length=math.inf), mie(radius, 1.001)
    lit = expected > 1e-6 * expected.max()  # the phase of 1.001 fills Born's minima
    assert np.corrcoef(np.log(found[lit]), np.log(expected[lit]))[0, 1] > 0.9996


def test_propagation_fills_minima_as_mie_says():
    found = image(70, solid=SPHERE, length=math.inf, absorption="propagating", refraction=-0.001)
    expected = np.log(mie(70, 1.001).ravel())
    assert np.corrcoef(np.log(found.ravel()), expected)[0, 1] > 0.9996
    assert np.corrcoef(np.log(born(70).ravel()), expected)[0, 1] < 0.9985


def test_silver_spheres_scatter_as_mie_says_if_the_wave_propagates():
    """And better than by either reading of absorption along straight rays."""
    errors = {}
    for absorption in ("intensity", "field", "propagating"):
        simulator = Simulator(detector=SMALL, solid=SPHERE, absorption=absorption)
        found = simulator(torch.tensor([60.0]), ONE)[0].double().numpy()
        difference = np.log10(found / mie(60, 1 + simulator.index))
        errors[absorption] = float(np.std(difference))
    assert errors["propagating"] < 0.03
    assert errors["propagating"] < 0.2 * errors["field"] < 0.2 * errors["intensity"]


def test_guinier_and_volume():
    found = image(30, random_quaternions(1, 0).float(), length=math.inf)
    near = SMALL.modulus < 0.4 / 30
    slope, ln_0 = np.polyfit(SMALL.modulus[near] ** 2, np.log(found[near]), 1)
    assert -3 * slope / 30**2 == pytest.approx(GYRATION, rel=0.02)
    assert np.exp(ln_0 / 2) == pytest.approx(VOLUME * 30**3, rel=5e-3)


def test_faces_of_the_icosahedron():
    normals = np.array(ICOSAHEDRON.normals)
    assert normals.shape == (20, 3)
    assert ICOSAHEDRON.inradius == pytest.approx(GOLDEN**2 / math.sqrt(3) / math.hypot(1, GOLDEN))
    np.testing.assert_allclose(normals.sum(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("absorption", ["intensity", "field", "propagating"])
def test_rotations_of_the_group_leave_the_image(absorption):
    q = random_quaternions(1, 1)
    first = image(60, q, absorption=absorption, points=48, slices=48)
    for number in (7, 31, 59):
        assert apart(image(60, multiply(q, group()[number]), absorption=absorption, points=48, slices=48), first) < 5e-3


@pytest.mark.parametrize("absorption", ["intensity", "propagating"])
def test_turned_and_mirrored_particles_make_turned_and_mirrored_images(absorption):
    q = random_quaternions(1, 2).float()
    options = {"absorption": absorption, "points": 48, "slices": 48}
    first = torch.tensor(image(60, q, **options))
    for number in range(VIEWS):
        assert apart(image(60, viewed_from(q, number), **options), view(first, number).numpy()) < 5e-3


def test_images_are_centrosymmetric_at_small_angles_only():
    """Friedel's law holds between q and -q; on the Ewald sphere opposite pixels share the component along the beam."""
    q = random_quaternions(1, 3).float()
    wide = image(80, q)
    assert apart(wide[::-1, ::-1], wide) > 0.3
    small = image(80, q, detector=Detector(64, angle=2.0))
    assert apart(small[::-1, ::-1], small) < 0.02


def test_straight_rays_and_propagation_agree_where_matter_is_thin():
    """Same sense of depth, same scale."""
    q = random_quaternions(1, 4).float()
    weak = image(60, q, absorption="propagating", length=1e5, refraction=0.0)
    assert apart(weak, image(60, q, length=1e5)) < 0.01


@pytest.mark.parametrize("absorption", ["intensity", "propagating"])
def test_finer_grids_change_little(absorption):
    q = random_quaternions(1, 5).float()
    fine = image(100, q, absorption=absorption, slices=128, points=128)
    errors = [apart(image(100, q, absorption=absorption, slices=n, points=n), fine) for n in (48, 96)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.01


def test_small_changes_of_the_radius_are_seen_smoothly():
    q = random_quaternions(1, 6).float()
    radius = torch.tensor([90.0, 90.01, 90.02])
    ln_I = torch.log(Simulator(detector=SMALL)(radius, q.expand(3, 4)).double())
    change, bend = (ln_I[2] - ln_I[0]) / 2, ln_I[2] + ln_I[0] - 2 * ln_I[1]
    assert bend.square().mean().sqrt() < 0.2 * change.square().mean().sqrt()


def test_particles_of_a_batch_do_not_mix():
    q, radius = random_quaternions(3, 7).float(), torch.tensor([40.0, 90.0, 150.0])
    simulator = Simulator(detector=SMALL, points=32, slices=32)
    torch.testing.assert_close(simulator(radius, q)[1], simulator(radius[1:2], q[1:2])[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"absorption": "amplitude"}, "no reading 'amplitude'"),
        ({"points": 33}, "even number of points"),
        ({"length": 0.0}, "positive absorption length"),
    ],
)
def test_bad_simulators_are_refused(options, words):
    with pytest.raises(BadInput, match=words):
        Simulator(**options)


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="corners scatter forward"):
        Detector(angle=50)
    with pytest.raises(BadInput, match="do not go together"):
        Simulator()(torch.ones(2), ONE)

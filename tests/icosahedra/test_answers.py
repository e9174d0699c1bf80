"""Answers of eight views, and the score."""

import pytest
import torch

from dsnet_bluesky.icosahedra.answers import agreed, answers, filled, score
from dsnet_bluesky.icosahedra.images import VIEWS, exposed, standardised, view, viewed_from
from dsnet_bluesky.icosahedra.multislice import SPHERE, Detector, Simulator
from dsnet_bluesky.icosahedra.network import Answer
from dsnet_bluesky.icosahedra.rotations import group, misorientation, multiply, random_quaternions

SIMULATOR = Simulator(detector=Detector(pixels=64), slices=48, points=48)


class Knowing:
    """In the place of a network: knows which view of which image it is shown."""

    def __init__(self, images, truth, wrong=()):
        self.images, self.truth, self.wrong = images, truth, wrong

    def answer(self, image):
        for number in range(VIEWS):
            if torch.allclose(view(self.images, number), image):
                quaternion = viewed_from(self.truth.quaternion, number)
                if number in self.wrong:
                    quaternion = torch.nn.functional.normalize(quaternion + 0.3, dim=-1)
                return Answer(self.truth.radius + number, 1.1 * multiply(quaternion, group(quaternion)[number * 7]))
        raise AssertionError("an image that is no view")


@pytest.mark.parametrize("wrong", [(), (0, 3, 6)])
def test_views_are_turned_back_and_outvote_wrong_ones(wrong):
    images = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    truth = Answer(torch.linspace(40.0, 140.0, 5), random_quaternions(5, 1).float())
    found = answers(Knowing(standardised(images), truth, wrong), images)  # pyright: ignore[reportArgumentType]
    assert misorientation(found.quaternion, truth.quaternion).max() < 0.1
    torch.testing.assert_close(found.radius, truth.radius + 3.5)


def test_agreement_of_one_view_is_that_view():
    q = random_quaternions(6, 2)
    found = agreed(Answer(torch.arange(6.0)[:, None], q[:, None]))
    assert misorientation(found.quaternion, q).max() < 1e-5


def test_the_score_is_best_for_the_truth_and_blind_to_dose_and_background():
    truth = Answer(torch.tensor([60.0, 110.0]), random_quaternions(2, 3).float())
    images = SIMULATOR(*truth)
    assert score(SIMULATOR, images, truth).min() > 0.999
    assert score(SIMULATOR, 1e-9 * images, truth).min() > 0.999
    counts = exposed(images, torch.tensor([1e6, 1e6]), torch.Generator().manual_seed(0))
    right = score(SIMULATOR, counts, truth)
    assert right.min() > 0.9
    for off in (truth._replace(radius=truth.radius * 1.1), truth._replace(quaternion=random_quaternions(2, 4).float())):
        assert (score(SIMULATOR, counts, off) < right).all()


def test_a_sphere_is_no_icosahedron():
    sphere = Simulator(detector=SIMULATOR.detector, solid=SPHERE)(torch.tensor([80.0]), torch.tensor([[1.0, 0, 0, 0]]))
    best = max(
        float(score(SIMULATOR, sphere, Answer(torch.tensor([r]), random_quaternions(1, k).float())))
        for r in (80.0, 85.0, 90.0)
        for k in range(3)
    )
    assert best < 0.95


def test_masked_pixels_do_not_count():
    truth = Answer(torch.tensor([90.0]), random_quaternions(1, 5).float())
    image = SIMULATOR(*truth)
    image[:, 28:36, 28:36] = torch.nan
    assert float(score(SIMULATOR, image, truth)) > 0.999


def test_masked_pixels_are_filled_on_the_scale_of_the_others():
    truth = Answer(torch.tensor([90.0, 60.0]), random_quaternions(2, 6).float())
    image = 3e-9 * SIMULATOR(*truth)
    masked = image.clone()
    masked[0, 28:36, 28:36] = torch.nan
    found = filled(SIMULATOR, masked, truth)
    torch.testing.assert_close(found, image, rtol=1e-3, atol=float(1e-6 * image.max()))
    assert torch.equal(found[1], image[1])

"""From images to answers, and from answers back to images.

A network that is continuous must jump somewhere: on the boundary of the fundamental domain it says something between two far
quaternions. Quarter turns and mirrors of an image are images of an icosahedron too, whose orientation lies elsewhere in the
domain: asked for all eight, the network is near a boundary in few of them, and the answer is what most of them agree on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .images import OFFSET, VIEWS, floor_of, standardised, view, viewed_from
from .multislice import Simulator
from .network import Answer, ResNet
from .rotations import conjugate, misorientation, multiply, nearest, reduced

__all__ = ["agreed", "answers", "filled", "score"]

AGREEING = 10.0
"""Misorientation in degrees up to which views are averaged with the one that the others are nearest to."""

BRIGHT = 0.9
"""Quantile of a measured image above which its scale is taken."""


@torch.no_grad()
def answers(network: ResNet, image: Tensor, views: int = VIEWS, batch: int = 64) -> Answer:
    """Ask a network for radius and orientation.

    Parameters
    ----------
    network
        In evaluation mode.
    image
        Logarithms between 0 and 1 (`log_image`), shape (image, y, x).
    views
        How many of the eight quarter turns and mirrors to ask for: 1 is the image alone.
    batch
        Images that go through the network at once.

    Returns
    -------
    Answer
        Radius in nm, shape (image,), and unit quaternions in the fundamental domain, shape (image, 4).
    """
    parts = [_asked(network, part, views) for part in standardised(image).split(batch)]
    return agreed(Answer(*(torch.cat(column) for column in zip(*parts, strict=True))))


def _asked(network: ResNet, image: Tensor, views: int) -> Answer:
    """Ask for every view and turn the answers back, shapes (image, view) and (image, view, 4)."""
    found = [network.answer(view(image, number)) for number in range(views)]
    quaternions = [_turned_back(functional.normalize(each.quaternion, dim=-1), number) for number, each in enumerate(found)]
    return Answer(torch.stack([each.radius for each in found], dim=1), torch.stack(quaternions, dim=1))


def _turned_back(quaternion: Tensor, number: int) -> Tensor:
    """Undo `viewed_from`."""
    one = quaternion.new_tensor([1.0, 0.0, 0.0, 0.0])
    return multiply(conjugate(viewed_from(one, number)).expand_as(quaternion), quaternion)


def agreed(answer: Answer) -> Answer:
    """Take what most views agree on.

    Parameters
    ----------
    answer
        Of every view, shapes (image, view) and (image, view, 4), unit quaternions.

    Returns
    -------
    Answer
        Median of the radii. Of the orientations, the one with the least sum of (capped) misorientations from the others, averaged
        with those within `AGREEING` degrees, in the fundamental domain.
    """
    quaternion = answer.quaternion
    apart = misorientation(quaternion[:, :, None], quaternion[:, None])
    middle = apart.clamp(max=AGREEING).sum(dim=-1).argmin(dim=-1)
    rows = torch.arange(len(quaternion), device=quaternion.device)
    chosen = quaternion[rows, middle]
    near = nearest(quaternion, chosen[:, None].expand_as(quaternion))
    weight = (apart[rows, middle] <= AGREEING).to(quaternion)[..., None]
    mean = functional.normalize((weight * near).sum(dim=1), dim=-1)
    return Answer(answer.radius.quantile(0.5, dim=1), reduced(mean))


def score(simulator: Simulator, intensity: Tensor, answer: Answer) -> Tensor:
    """Say how well images agree with those simulated from the answers.

    Parameters
    ----------
    simulator
        With the geometry of the images.
    intensity
        Measured counts or intensities in any unit, shape (image, y, x); NaN where masked.
    answer
        Of the network.

    Returns
    -------
    Tensor
        Correlation of the logarithms, averaged over 2 x 2 pixels, shape (image,): 1 is perfect. Scale and background of the image
        are fitted to it, so that neither matters.
    """
    simulated = simulator(answer.radius, answer.quaternion).to(intensity)
    measured, simulated = _binned(intensity, intensity), _binned(simulated, intensity)
    floor = floor_of(measured)
    expected = _scaled(measured, simulated)
    a, b = (torch.log(part.clamp_min(0) / floor + OFFSET).flatten(1) for part in (measured, expected))
    return _correlation(a, b)


def filled(simulator: Simulator, intensity: Tensor, answer: Answer) -> Tensor:
    """Put what is simulated from an answer where images are masked.

    A network takes a dark hole for a part of the image, and its radius suffers; it is best asked again after this.

    Parameters
    ----------
    simulator, intensity, answer
        As of `score`.

    Returns
    -------
    Tensor
        Shape (image, y, x), without NaN.
    """
    expected = _scaled(intensity, simulator(answer.radius, answer.quaternion).to(intensity))
    return torch.where(intensity.isnan(), expected, intensity)


def _binned(values: Tensor, mask: Tensor) -> Tensor:
    """Average over 2 x 2 pixels; NaN where any of them is masked."""
    return functional.avg_pool2d(torch.where(mask.isnan(), torch.nan, values)[:, None], 2)[:, 0]


def _scaled(measured: Tensor, simulated: Tensor) -> Tensor:
    """Bring simulated images to the scale and the background of measured ones."""
    flat, model = measured.flatten(1), simulated.flatten(1)
    bright = flat >= flat.nanquantile(BRIGHT, dim=1, keepdim=True)
    ratio = torch.where(bright, flat / model.clamp_min(1e-30), torch.nan).nanmedian(dim=1, keepdim=True).values
    rest = (flat - ratio * model).nanquantile(0.5, dim=1, keepdim=True).clamp_min(0)
    return (ratio * model + rest).reshape(measured.shape)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over what is no NaN in either, shape (image,)."""
    a, b = a - (a + 0 * b).nanmean(dim=1, keepdim=True), b - (b + 0 * a).nanmean(dim=1, keepdim=True)
    covariance, first, second = ((x * y).nansum(dim=1) for x, y in ((a, b), (a, a), (b, b)))
    return covariance / (first * second).sqrt().clamp_min(1e-12)

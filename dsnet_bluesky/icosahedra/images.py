"""What a detector makes of an intensity, and what a network is given of that.

The network sees the logarithm of the counts, between 0 and 1, standardised: neither the dose nor the unit of the intensity
matters. Eleven augmentations after Stielow et al. (2020) teach it what else does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .rotations import mirrored, turned

__all__ = ["AUGMENTATIONS", "VIEWS", "augment", "exposed", "floor_of", "log_image", "standardised", "view", "viewed_from"]

VIEWS = 8
"""Quarter turns and mirrors of an image, each of which is the image of an icosahedron too."""

OFFSET = 0.3
"""What is added to intensities before the logarithm, in units of their median: below it there is little but background."""


def exposed(intensity: Tensor, peak: Tensor, generator: torch.Generator, background: float = 1.0) -> Tensor:
    """Count photons, on a background.

    Parameters
    ----------
    intensity
        In any unit, shape (image, y, x).
    peak
        Photons that the brightest pixel expects, shape (image,).
    generator
        Of random numbers, on the device of the images.
    background
        Photons per pixel that do not come from the particle.

    Returns
    -------
    Tensor
        Counts, not rounded: the square of a normal number about the root of the expectation with a deviation of 1/2, which is a
        Poisson number to within its skewness, and much faster to draw.
    """
    expected = intensity * (peak / intensity.amax(dim=(-2, -1)))[:, None, None] + background
    return (expected.sqrt() + 0.5 * _normal(expected, generator)).square()


def floor_of(intensity: Tensor) -> Tensor:
    """Median of the pixels that count, shape (..., 1, 1): where most of them are empty, the least that is not."""
    flat = intensity.flatten(-2)
    least = torch.where(flat > 0, flat, torch.inf).amin(dim=-1)
    floor = torch.maximum(flat.nanmedian(dim=-1).values, least)
    return torch.where(floor.isfinite(), floor, 1.0)[..., None, None]


def log_image(intensity: Tensor) -> Tensor:
    """Logarithm of an intensity between 0 and 1, shape (..., y, x).

    Parameters
    ----------
    intensity
        Counts or an intensity in any unit; negative ones count as 0, NaN (masked pixels) become the lowest value.
    """
    intensity = intensity.clamp_min(0)
    values = torch.log(intensity / floor_of(intensity) + OFFSET)
    low, high = (torch.where(values.isnan(), end, values) for end in (torch.inf, -torch.inf))
    low, high = low.amin(dim=(-2, -1), keepdim=True), high.amax(dim=(-2, -1), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-6)).nan_to_num(0.0)


def standardised(image: Tensor) -> Tensor:
    """Bring every image to mean 0 and deviation 1, shape (..., y, x)."""
    mean, deviation = image.mean(dim=(-2, -1), keepdim=True), image.std(dim=(-2, -1), keepdim=True)
    return (image - mean) / deviation.clamp_min(1e-6)


def view(image: Tensor, number: int) -> Tensor:
    """Turn an image by quarters from x to y after mirroring it, for number 4 and above, shape (..., y, x)."""
    image = image.flip(-1) if number >= 4 else image
    return torch.rot90(image, -(number % 4), (-2, -1)) if number % 4 else image


def viewed_from(quaternion: Tensor, number: int) -> Tensor:
    """Orientation whose image is `view` number of that of another, shape (..., 4)."""
    quaternion = mirrored(quaternion) if number >= 4 else quaternion
    return turned(quaternion, torch.full(quaternion.shape[:-1], number % 4, device=quaternion.device))


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(tuple(shape), generator=generator, device=like.device, dtype=like.dtype)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _each(image: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw one number per image, shape (image, 1, 1)."""
    return _uniform((len(image), 1, 1), image, generator, low, high)


def _axes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Places of pixels along y and x, from -1 to 1, shapes (y, 1) and (x,)."""
    y, x = (torch.linspace(-1, 1, size, device=image.device, dtype=image.dtype) for size in image.shape[-2:])
    return y[:, None], x


def plain(image: Tensor, generator: torch.Generator) -> Tensor:
    """Leave images as they are."""
    return image


def uniform_noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise between -a and a, a up to 0.1."""
    return image + _each(image, generator, 0, 0.1) * _uniform(image.shape, image, generator, -1, 1)


def salt_and_pepper(image: Tensor, generator: torch.Generator) -> Tensor:
    """Set up to 4 % of the pixels to 0 or 1."""
    drawn, share = _uniform(image.shape, image, generator), _each(image, generator, 0, 0.04)
    return torch.where(drawn < share, (drawn < share / 2).to(image), image)


def blur(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a Gaussian with a deviation of up to 1.2 pixels."""
    offsets = torch.arange(-4, 5, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / _each(image, generator, 0.2, 1.2)[:, 0]) ** 2)
    kernel = (kernel / kernel.sum(dim=-1, keepdim=True))[:, None]
    padded = functional.pad(image[None], (4, 4, 4, 4), mode="replicate")
    across = functional.conv2d(padded, kernel[:, :, None], groups=len(image))
    return functional.conv2d(across, kernel[..., None], groups=len(image))[0]


def jitter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Let some pixels, up to half, take the value of one beside them."""
    moved = _uniform(image.shape, image, generator) < _each(image, generator, 0, 0.5)
    step = (_uniform(image.shape, image, generator) * 4).long()
    around = torch.stack([torch.roll(image, shift, dim) for shift, dim in ((1, -1), (-1, -1), (1, -2), (-1, -2))])
    return torch.where(moved, around.gather(0, step[None])[0], image)


def centre_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Let the detector be smaller: nothing is seen beyond a square of 60 to 100 % of its sides."""
    y, x = _axes(image)
    return torch.where(torch.maximum(y.abs(), x.abs()) <= _each(image, generator, 0.6, 1.0), image, 0.0)


def central_hole(image: Tensor, generator: torch.Generator) -> Tensor:
    """See nothing within 3 to 15 % of the edge's scattering angle."""
    y, x = _axes(image)
    return torch.where(y**2 + x**2 >= _each(image, generator, 0.03, 0.15) ** 2, image, 0.0)


def shift(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move the beam by up to 2 pixels."""
    by = (_uniform((2, len(image)), image, generator) * 5).long() - 2
    y, x = (
        (torch.arange(size, device=image.device) - step[:, None]).clamp(0, size - 1)
        for size, step in zip(image.shape[-2:], by, strict=True)
    )
    rows = torch.arange(len(image), device=image.device)[:, None, None]
    return image[rows, y[:, :, None], x[:, None, :]]


def uneven_sensitivity(image: Tensor, generator: torch.Generator) -> Tensor:
    """Let the sensitivity fall by up to half across the detector, in any direction, and towards its edge."""
    y, x = _axes(image)
    slope_x, slope_y, bend = (_each(image, generator, low, 0.25) for low in (-0.25, -0.25, 0.0))
    return image * (1 + slope_x * x + slope_y * y - bend * (x**2 + y**2))


_SINGLE: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    uniform_noise,
    salt_and_pepper,
    blur,
    jitter,
    centre_crop,
    central_hole,
    shift,
    uneven_sensitivity,
)


def random_combination(image: Tensor, generator: torch.Generator) -> Tensor:
    """Each of the single augmentations with a probability of 1/2, in their order."""
    for change in _SINGLE:
        image = torch.where(_each(image, generator, 0, 1) < 0.5, change(image, generator), image)
    return image


def all_in_order(image: Tensor, generator: torch.Generator) -> Tensor:
    """All single augmentations one after another."""
    for change in _SINGLE:
        image = change(image, generator)
    return image


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    change.__name__: change for change in (plain, *_SINGLE, random_combination, all_in_order)
}
"""The eleven: images between 0 and 1, shape (image, y, x), and a generator on their device, to images."""


def augment(image: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Change each image by one of the eleven, drawn at random.

    Parameters
    ----------
    image
        Between 0 and 1, shape (image, y, x).
    generator
        Of random numbers, on the device of the images.
    share
        Part of the images that are changed at all.
    """
    drawn = torch.rand(len(image), generator=generator, device=image.device)
    kind = (drawn / max(share, 1e-12) * len(AUGMENTATIONS)).long().tolist()
    result = image.clone()
    for number, change in enumerate(AUGMENTATIONS.values()):
        rows = [row for row, chosen in enumerate(kind) if chosen == number]
        if rows and change is not plain:
            result[rows] = change(image[rows], generator)
    return result

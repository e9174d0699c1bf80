"""Orientations of an icosahedron: unit quaternions (w, x, y, z), modulo its 60 rotations.

A quaternion q turns the particle into the laboratory, r_lab = q r q*. The particle's own rotations s act first, so q and
q s are one orientation for every s of the group, as are q and -q. The body has the vertices (0, +-1, +-phi) and their cyclic
permutations; to these belong the even permutations of (phi, 1/phi, 1, 0)/2. The odd ones belong to a body turned by 90 degrees.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

__all__ = [
    "GOLDEN",
    "IMAGINARY",
    "REAL",
    "conjugate",
    "group",
    "matrices",
    "mirrored",
    "misorientation",
    "multiply",
    "nearest",
    "random_quaternions",
    "reduced",
    "turned",
]

GOLDEN = (1 + math.sqrt(5)) / 2
"""phi, the golden ratio."""

REAL = (1 / math.sqrt(1 + 3 / GOLDEN**6), 1.0)
"""Range of w in the fundamental domain: a dodecahedron in tan(angle / 2), whose corners are at (1, 1, 1) / phi^3."""

IMAGINARY = 1 / math.sqrt(1 + GOLDEN**4)
"""Largest x, y or z in the fundamental domain: the middle of an edge, at 1 / phi^2 on an axis."""


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply quaternions, shapes (..., 4) that broadcast."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def conjugate(quaternion: Tensor) -> Tensor:
    """Invert rotations, shape (..., 4)."""
    return quaternion * quaternion.new_tensor([1.0, -1.0, -1.0, -1.0])


def matrices(quaternion: Tensor) -> Tensor:
    """Give the rotation matrices of unit quaternions, shape (..., 3, 3): r_lab = matrix @ r."""
    axes = torch.eye(3, dtype=quaternion.dtype, device=quaternion.device)
    pure = torch.cat([torch.zeros_like(axes[:, :1]), axes], dim=1)
    turned_axes = multiply(multiply(quaternion[..., None, :], pure), conjugate(quaternion)[..., None, :])
    return turned_axes[..., 1:].mT


@functools.lru_cache(maxsize=8)
def _group(dtype: torch.dtype, device: torch.device) -> Tensor:
    units = [*torch.eye(4, dtype=torch.float64), *(torch.tensor((1.0, *s)) / 2 for s in itertools.product((1.0, -1.0), repeat=3))]
    for order in itertools.permutations(range(4)):
        if _is_even(order):
            for signs in itertools.product((1.0, -1.0), repeat=2):
                # Signs of two of three parts suffice: q and -q are one rotation.
                values = torch.tensor([GOLDEN, signs[0] / GOLDEN, signs[1], 0.0], dtype=torch.float64) / 2
                units.append(values[list(order)])
    return torch.stack([unit.double() for unit in units]).to(device=device, dtype=dtype)


def _is_even(order: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 0


def group(like: Tensor | None = None) -> Tensor:
    """Give the 60 rotations of the icosahedron, shape (60, 4), one of q and -q each; the first does nothing.

    Parameters
    ----------
    like
        Whose type and device they take; double precision on the CPU by default.
    """
    return _group(torch.float64, torch.device("cpu")) if like is None else _group(like.dtype, like.device)


def _equivalents(quaternion: Tensor) -> Tensor:
    return multiply(quaternion[..., None, :], group(quaternion))


def nearest(quaternion: Tensor, to: Tensor) -> Tensor:
    """Of the 120 quaternions of an orientation give the one nearest to another, shape (..., 4).

    Parameters
    ----------
    quaternion
        Whose equivalents are looked at, shape (..., 4).
    to
        To which they shall be near; any length.
    """
    equivalents = _equivalents(quaternion)
    overlap = (equivalents * to[..., None, :]).sum(dim=-1)
    best = overlap.abs().argmax(dim=-1, keepdim=True)
    chosen = equivalents.gather(-2, best[..., None].expand(*best.shape, 4))[..., 0, :]
    return torch.where(overlap.gather(-1, best) < 0, -chosen, chosen)


def reduced(quaternion: Tensor) -> Tensor:
    """Bring quaternions into the fundamental domain: the equivalent with the largest w, shape (..., 4)."""
    one = quaternion.new_tensor([1.0, 0.0, 0.0, 0.0])
    return nearest(quaternion, one.expand_as(quaternion))


def misorientation(a: Tensor, b: Tensor) -> Tensor:
    """Smallest angle in degrees between two orientations of an icosahedron, shape (...).

    From the sine and the cosine of its half, so that it is exact for small angles too.
    """
    between = reduced(multiply(conjugate(a), b))
    return torch.rad2deg(2 * torch.atan2(between[..., 1:].norm(dim=-1), between[..., 0]))


def random_quaternions(count: int, seed: int | torch.Generator) -> Tensor:
    """Draw orientations uniformly (Haar measure), shape (count, 4), double precision.

    Four independent normal numbers point in every direction of four dimensions alike.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 4, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def turned(quaternion: Tensor, quarters: Tensor) -> Tensor:
    """Turn particles by quarters of a turn about the beam (z), from x to y, shape (..., 4)."""
    half = quarters.to(quaternion) * (math.pi / 4)
    zero = torch.zeros_like(half)
    return multiply(torch.stack([half.cos(), zero, zero, half.sin()], dim=-1), quaternion)


def mirrored(quaternion: Tensor) -> Tensor:
    """Orientation whose image is the mirror image, x to -x, shape (..., 4).

    The icosahedron has a centre of inversion: a mirror is a half turn about x after an inversion that it does not notice.
    """
    return multiply(quaternion.new_tensor([0.0, 1.0, 0.0, 0.0]).expand_as(quaternion), quaternion)

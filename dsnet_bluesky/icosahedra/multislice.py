r"""Images of a single particle at wide angles: the multi-slice Fourier transform.

The beam runs along +z with the wave number k = 2 pi / wavelength. Elastic scattering into the transverse (q_x, q_y) leaves
``k_z = sqrt(k^2 - q_x^2 - q_y^2)``, so that the detector lies on the Ewald sphere and sees the depth of the particle too:

``F(q_x, q_y) = sum_j exp(i (k - k_z) z_j) int int a(x, y, z_j) exp(-i (q_x x + q_y y)) dx dy``,   I = ``|F|^2``.

What a slice at z_j contributes depends on the reading of absorption over the length t of matter that the beam has gone through:

intensity
    a = exp(-t / (2 L)): L is the length after which the beam's intensity falls to 1/e, L = wavelength / (4 pi beta).
field
    a = exp(-t / L): the field falls to 1/e over L. The wave that is scattered is also absorbed on its way out, which the sum
    leaves out; this reading makes up for it.
propagating
    The wave itself goes through the slices: each multiplies it by exp(i k (n - 1) t), between them it propagates in vacuum.
    Scattering more than once, refraction and absorption both ways are in it (P. Tuemmler et al., doi:10.1002/lpor.202502001).

The same sum without absorption is Born's approximation. Neither polarisation nor the solid angle of a pixel are in it.

Grids are measured in the particle's radius and rays through convex particles enter and leave at exact heights, which each slice
averages over: there are no voxels at the surface, and I changes smoothly with the radius.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet_bluesky.data import BadInput

from .rotations import GOLDEN, matrices

__all__ = [
    "ABSORPTION_LENGTH",
    "ICOSAHEDRON",
    "REFRACTION",
    "SPHERE",
    "WAVELENGTH",
    "Absorption",
    "Detector",
    "Simulator",
    "Solid",
]

Floats = NDArray[np.floating[Any]]

WAVELENGTH = 13.5
"""Wavelength in nm."""

ABSORPTION_LENGTH = 12.5
"""Absorption length of silver at 13.5 nm in nm, as the paper gives it."""

REFRACTION = 0.11
"""delta of silver at 13.5 nm, about: n = 1 - delta + i beta. Only the propagating reading needs it."""

PADDING = 2
"""Width of the field that propagates, in widths of the particle."""

CHUNK = 40_000_000
"""Elements of the slices of all particles that are worked on at once on a GPU."""

CPU_CHUNK = 1_000_000
"""The same on a CPU."""

Absorption = Literal["intensity", "field", "propagating"]
"""How the absorption length is read."""


@dataclass(frozen=True)
class Solid:
    """A convex particle of radius 1 about its centre.

    Parameters
    ----------
    name
        Its name.
    normals
        Outward unit normals of its faces; none for a sphere.
    inradius
        Distance of every face from the centre.
    """

    name: str
    normals: tuple[tuple[float, float, float], ...]
    inradius: float

    def rays(self, quaternion: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Find where rays along z enter and leave the particle.

        Parameters
        ----------
        quaternion
            Orientations, shape (particle, 4).
        places
            x and y of the rays in radii, shape (n,).

        Returns
        -------
        tuple of Tensor
            z of entry and of exit in radii, shape (particle, y, x); equal where a ray misses.
        """
        if not self.normals:
            half = (1 - places**2 - places[:, None] ** 2).clamp_min(0).sqrt().expand(len(quaternion), -1, -1)
            return -half, half
        normals = torch.tensor(self.normals, dtype=places.dtype, device=places.device)
        facing = normals @ matrices(quaternion.to(places)).mT
        a, b, c = facing[..., None, None].unbind(2)
        # A face along the beam bounds x and y: a ray beyond it is pushed out by the steepest slope that a number holds.
        slope = torch.where(c < 0, c.clamp(max=-1e-6), c.clamp(min=1e-6))
        height = (self.inradius - a * places - b * places[:, None]) / slope
        entry = torch.where(c < 0, height, -torch.inf).amax(dim=1).clamp(-1, 1)
        leave = torch.where(c < 0, torch.inf, height).amin(dim=1).clamp(-1, 1)
        return entry, torch.maximum(entry, leave)


def _icosahedron() -> Solid:
    """Find the faces: triples of vertices that are all neighbours."""
    corners = np.array(
        [np.roll((0.0, s, t * GOLDEN), k) for k, s, t in itertools.product(range(3), (1, -1), (1, -1))]
    ) / math.hypot(1, GOLDEN)
    edge = min(np.linalg.norm(corners[0] - corner) for corner in corners[1:])
    middles = [
        np.mean(three, axis=0)
        for three in itertools.combinations(corners, 3)
        if all(np.linalg.norm(p - q) < 1.01 * edge for p, q in itertools.combinations(three, 2))
    ]
    inradius = float(np.linalg.norm(middles[0]))
    return Solid("icosahedron", tuple(tuple(float(x) for x in middle / inradius) for middle in middles), inradius)  # pyright: ignore[reportArgumentType]


ICOSAHEDRON = _icosahedron()
"""Regular, vertices along (0, +-1, +-phi) and cyclic permutations; its radius is that of the sphere through its vertices."""

SPHERE = Solid("sphere", (), 1.0)
"""A sphere, with which the simulator can be checked."""


@dataclass(frozen=True)
class Detector:
    """Where intensities are wanted: equal steps of the transverse q, centred on the beam.

    That is the Ewald sphere seen along the beam. A pixel i has ``q = (i - (pixels - 1) / 2) step``: the beam passes between the
    four pixels in the middle. An image of a flat detector at the distance D, where ``tan(angle) = r / D``, must be brought to
    ``q = k sin(angle)`` first.

    Parameters
    ----------
    pixels
        Pixels along each side; even.
    angle
        Scattering angle at the middle of an edge, in degrees, below 90.
    wavelength
        In nm.
    """

    pixels: int = 128
    angle: float = 30.0
    wavelength: float = WAVELENGTH

    def __post_init__(self) -> None:
        corner = math.sqrt(2) * math.sin(math.radians(self.angle))
        if self.pixels < 2 or self.pixels % 2 or not 0 < self.angle < 90 or corner >= 1 or self.wavelength <= 0:
            raise BadInput(
                f"A detector of {self.pixels} pixels up to {self.angle:g} degrees at {self.wavelength:g} nm cannot be: give an "
                "even number of pixels, a wavelength, and an angle whose corners scatter forward (below 45 degrees)."
            )

    @property
    def wave_number(self) -> float:
        """Length k of the wave vector in 1/nm."""
        return 2 * math.pi / self.wavelength

    @property
    def step(self) -> float:
        """Step of q from one pixel to the next in 1/nm."""
        return 2 * self.wave_number * math.sin(math.radians(self.angle)) / self.pixels

    @property
    def q(self) -> Floats:
        """Transverse q of the pixels along one side in 1/nm, shape (pixels,)."""
        return (np.arange(self.pixels) - (self.pixels - 1) / 2) * self.step

    @property
    def depth(self) -> Floats:
        """Part of q along the beam, k - k_z, in 1/nm, shape (pixels, pixels)."""
        square = np.add.outer(self.q**2, self.q**2)
        return square / (self.wave_number + np.sqrt(self.wave_number**2 - square))

    @property
    def modulus(self) -> Floats:
        """Length of q, 2 k sin(angle / 2), in 1/nm, shape (pixels, pixels)."""
        return np.sqrt(self.q**2 + self.q[:, None] ** 2 + self.depth**2)


class _Quarter(NamedTuple):
    """One quarter of the detector, from the beam outward; the others follow by symmetry of sine and cosine."""

    q: Tensor
    depth: Tensor


@dataclass(frozen=True)
class Simulator:
    """Simulate images of particles.

    Parameters
    ----------
    detector
        Where intensities are wanted.
    solid
        What scatters.
    absorption
        How the absorption length is read.
    length
        Absorption length in nm; infinite for Born's approximation.
    slices
        Slices along the beam over the particle's diameter.
    points
        Rays along each side of the particle's diameter; even.
    refraction
        delta of the refractive index, for the propagating reading.
    device
        Any device of torch.

    Raises
    ------
    BadInput
        If one of these cannot be.
    """

    detector: Detector = Detector()
    solid: Solid = ICOSAHEDRON
    absorption: Absorption = "intensity"
    length: float = ABSORPTION_LENGTH
    slices: int = 96
    points: int = 96
    refraction: float = REFRACTION
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.absorption not in get_args(Absorption):
            raise BadInput(f"There is no reading {self.absorption!r} of absorption; take {', '.join(get_args(Absorption))}.")
        if self.slices < 1 or self.points < 2 or self.points % 2 or not self.length > 0:
            raise BadInput("Give at least one slice, an even number of points and a positive absorption length.")

    @property
    def index(self) -> complex:
        """Refractive index less 1, that of the propagating reading: -delta + i wavelength / (4 pi L)."""
        return complex(-self.refraction, self.detector.wavelength / (4 * math.pi * self.length))

    def to_dict(self) -> dict[str, str | float]:
        """Give plain values, as a card or a recipe holds them."""
        return {
            "solid": self.solid.name,
            "absorption": self.absorption,
            "absorption_length": self.length,
            "refraction": self.refraction,
            "wavelength": self.detector.wavelength,
            "angle": self.detector.angle,
            "pixels": self.detector.pixels,
            "slices": self.slices,
            "points": self.points,
        }

    @torch.no_grad()
    def __call__(self, radius: Tensor, quaternion: Tensor) -> Tensor:
        """Simulate.

        Parameters
        ----------
        radius
            Radii in nm, shape (particle,).
        quaternion
            Unit quaternions (w, x, y, z), shape (particle, 4).

        Returns
        -------
        Tensor
            |F|^2 in nm^6, shape (particle, y, x), in single precision on the device: at the beam, without absorption, the
            square of the volume.
        """
        radius, quaternion = (part.to(self.device, torch.float32) for part in (radius, quaternion))
        if radius.ndim != 1 or quaternion.shape != (*radius.shape, 4):
            raise BadInput(
                f"Radii of shape {tuple(radius.shape)} and quaternions of shape {tuple(quaternion.shape)} do not go together; "
                "give (particle,) and (particle, 4)."
            )
        most = CPU_CHUNK if radius.device.type == "cpu" else CHUNK
        few = max(1, most // (self.slices * self.points**2))
        return torch.cat([self._image(*part) for part in zip(radius.split(few), quaternion.split(few), strict=True)])

    @property
    def _decay(self) -> float:
        """Length over which the field falls to 1/e."""
        return self.length * (2 if self.absorption == "intensity" else 1)

    @functools.cached_property
    def _places(self) -> Tensor:
        """Rays along one side, in radii."""
        return (torch.arange(self.points, device=self.device) + 0.5) * (2 / self.points) - 1

    @functools.cached_property
    def _quarter(self) -> _Quarter:
        half = self.detector.pixels // 2
        q, depth = self.detector.q[half:], self.detector.depth[half:, half:]
        return _Quarter(*(torch.tensor(part, dtype=torch.float32, device=self.device) for part in (q, depth)))

    def _image(self, radius: Tensor, quaternion: Tensor) -> Tensor:
        """Sum what the slices scatter."""
        slices = self._slices(radius, quaternion)
        middles = (torch.arange(self.slices, device=self.device) + 0.5) * (2 / self.slices) - 1
        phase = radius[:, None, None, None] * middles[:, None, None] * self._quarter.depth
        if self.absorption == "propagating":
            slices = self._sources(radius, slices)
            parts = torch.complex(*(self._transforms(radius, part) for part in (slices.real, slices.imag)))
            sums = (parts * torch.polar(torch.ones_like(phase), phase)[:, None]).sum(dim=2)
        else:
            parts = self._transforms(radius, slices)
            sums = torch.complex(*((parts * wave[:, None]).sum(dim=2) for wave in (phase.cos(), phase.sin())))
        return self._quarters(sums) * (radius[:, None, None] * (2 / self.points)) ** 4

    def _slices(self, radius: Tensor, quaternion: Tensor) -> Tensor:
        """Integrate the field over each ray in each slice, in nm, shape (particle, slice, y, x)."""
        entry, leave = self.solid.rays(quaternion, self._places)
        bounds = torch.linspace(-1, 1, self.slices + 1, device=self.device)[:, None, None]
        inside = torch.minimum((bounds - entry[:, None]).clamp_(min=0), (leave - entry)[:, None])
        depth = inside.mul_(radius[:, None, None, None])
        if math.isfinite(self._decay) and self.absorption != "propagating":
            depth = depth.div_(-self._decay).expm1_().mul_(-self._decay)
        return depth.diff(dim=1)

    def _transforms(self, radius: Tensor, slices: Tensor) -> Tensor:
        """Transform slices by cosines and sines along x and y, shape (particle, 4, slice, q_y, q_x).

        The four are cos cos, cos sin, sin cos, sin sin of y and x. Each takes the even or odd part of a slice about its
        middle, so that half of the rays and a quarter of the detector are enough.
        """
        places = self._places[self.points // 2 :]
        angle = radius[:, None, None] * self._quarter.q * places[:, None]
        waves = torch.stack([angle.cos(), angle.sin()], dim=1)
        along_x = _folded(slices, -1) @ waves[:, :, None]
        return (waves.mT[:, :, None, None] @ _folded(along_x, -2)).flatten(1, 2)

    def _quarters(self, parts: Tensor) -> Tensor:
        """Put the detector together from the four transforms of its quarter, shape (particle, y, x)."""
        cc, cs, sc, ss = parts.unbind(1)
        even, odd = cc - ss, 1j * (cs + sc)
        other_even, other_odd = cc + ss, 1j * (cs - sc)
        right = torch.cat([(other_even - other_odd).flip(-2), even - odd], dim=-2)
        left = torch.cat([(even + odd).flip(-2), other_even + other_odd], dim=-2).flip(-1)
        return torch.cat([left, right], dim=-1).abs().square()

    def _sources(self, radius: Tensor, slices: Tensor) -> Tensor:
        """Let the wave go through the slices: what each adds to it is what it scatters, in nm, shape (particle, slice, y, x).

        Far away these sources add up as the slices of the other readings do; the field on its periodic grid, where waves at
        large angles leave on one side and come back on the other, only serves to find the wave inside the particle.
        """
        width = 2 * round(self.points * PADDING / 2)
        inner = slice((width - self.points) // 2, (width + self.points) // 2)
        propagator = self._propagator(radius * (2 / self.points), width, radius * (2 / self.slices))
        scattered = torch.zeros(len(radius), width, width, dtype=torch.complex64, device=self.device)
        factor = 1j * self.detector.wave_number * self.index
        sources = []
        for thickness in slices.unbind(1):
            sources.append(torch.expm1(factor * thickness) * (scattered[:, inner, inner] + 1))
            scattered[:, inner, inner] += sources[-1]
            scattered = torch.fft.ifft2(torch.fft.fft2(scattered) * propagator)
        return torch.stack(sources, dim=1) / factor

    def _propagator(self, step: Tensor, width: int, thickness: Tensor) -> Tensor:
        """Propagate by one slice in vacuum, relative to the incident wave, shape (particle, width, width)."""
        k = self.detector.wave_number
        q = 2 * math.pi * torch.fft.fftfreq(width, device=self.device) / step[:, None]
        along = torch.sqrt((k**2 - q[:, None, :] ** 2 - q[:, :, None] ** 2).to(torch.complex64))
        return torch.exp(1j * (along - k) * thickness[:, None, None])


def _folded(values: Tensor, dim: int) -> Tensor:
    """Give the even and the odd part about the middle of an axis, over its upper half, along a new axis 1."""
    lower, upper = values.chunk(2, dim=dim)
    lower = lower.flip(dim)
    return torch.stack([upper + lower, upper - lower], dim=1)

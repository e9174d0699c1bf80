"""A small detector behind a scanned sample: weak anisotropic patterns, smeared by the beam, and the direct beam itself."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ophyd_async.core import StandardReadable, StaticPathProvider, UUIDFilenameProvider, soft_signal_rw
from ophyd_async.core import StandardReadableFormat as Format
from scipy.ndimage import gaussian_filter

from .anisotropic import AnisotropicScan
from .devices import FrameSource, SimSaxsDetector

__all__ = ["EMPTY", "PatternCamera", "ScanStage", "pattern_detector"]

Floats = NDArray[np.float64]

EMPTY = -1.0
"""Where the stage stands for the direct beam, its attenuator in and the beamstop out."""

BEAM = 3e5
"""Photons of the direct beam."""


class PatternCamera:
    """Takes the patterns of a scan, each at its place of the stage.

    Parameters
    ----------
    scan
        What is at each place.
    dose
        Photons a pixel and second in the mean.
    beam
        Standard deviation in pixels of the beam on the detector, a Gaussian: it smears the patterns.
    seed
        Of the counts.
    """

    def __init__(self, scan: AnisotropicScan, dose: float, *, beam: float = 1.5, seed: int = 0) -> None:
        self.scan, self.dose, self.beam = scan, dose, beam
        self._rng = np.random.default_rng(seed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.scan.shape

    @property
    def poni(self) -> dict[str, Any]:
        """Geometry as pyFAI writes it."""
        return self.scan.poni

    @cached_property
    def smeared(self) -> Floats:
        """Expected counts of a second at each place, shape (place, y, x); zero behind the beamstop."""
        whole = self.dose * self.scan.whole
        return np.where(self.scan.mask, 0.0, gaussian_filter(whole, (0, self.beam, self.beam), mode="nearest"))

    @cached_property
    def direct(self) -> Floats:
        """Expected counts of the direct beam, shape (y, x)."""
        y, x = (np.arange(n) + 0.5 - c for n, c in zip(self.shape, self.scan.centre, strict=True))
        spot = np.exp(-0.5 * (y[:, None] ** 2 + x**2) / self.beam**2)
        return BEAM * spot / spot.sum()

    def frame(self, setting: float, time: float) -> NDArray[np.int32]:
        """Count photons at a place of the stage, (y, x)."""
        expected = self.direct if setting == EMPTY else self.smeared[round(setting)] * time
        return self._rng.poisson(expected).astype(np.int32)


class ScanStage(StandardReadable):
    """Moves the sample: the number of the place that the beam meets, `EMPTY` for none."""

    def __init__(self, name: str = "") -> None:
        with self.add_children_as_readables(Format.HINTED_SIGNAL):
            self.place = soft_signal_rw(float, EMPTY)
        super().__init__(name=name)


def pattern_detector(directory: Path | str, camera: PatternCamera, stage: ScanStage, name: str = "detector") -> SimSaxsDetector:
    """Give an ophyd-async detector that writes what a camera sees into HDF5 files.

    Parameters
    ----------
    directory
        For the files; must exist.
    camera
        The physics.
    stage
        Says where the sample is.
    name
        Of the detector.
    """
    provider = StaticPathProvider(UUIDFilenameProvider(), Path(directory).absolute())
    return SimSaxsDetector(FrameSource(camera, stage.place.get_value), provider, name=name)

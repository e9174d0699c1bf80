"""From weak frames of one instrument to what is stored of them: denoised frames, orientations, a desmeared sector with errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from dsnet_bluesky.data import BadInput, describe, join_answers
from dsnet_bluesky.desmearing import LEARNED, prepare
from dsnet_bluesky.reduction import Reduction, integrator, invalid_pixels
from dsnet_bluesky.reduction.geometry import beam_pixel, check_shape, divisors
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.versions import Model, load_model

from . import SymmetryDenoiser
from .orientation import Orientations, scatter
from .sectors import CORRECTED, RANK, REPLICAS, DesmearedSector, Resampled, desmeared, resample, sector_of
from .symmetry import check_counts

__all__ = ["PreparedPatterns"]

SEED = 0
"""Of every exposure's replicas: answers do not depend on what is denoised beside it."""

KEPT = ("denoised", "counts_per_pixel", "chi2_symmetry", "chi2_rings")
"""Of what the denoiser says."""


class PreparedPatterns:
    """Ready for any number of weak frames of one instrument.

    Every exposure is answered by itself, live as in a replay. So its symmetry is tested alone, and it is flagged (ASYMMETRIC)
    where that is broken; the sharper test, over all frames of a scan, belongs to the training.

    Parameters
    ----------
    reduction
        With the sector, the mask, and the beam centre where the direct beam is.
    smearing
        Operator of the sector: ``reduction.smearing(direct_beam)``.
    model
        A trained denoiser, ``"symmetry-denoiser:1.0.0"``, or the path of its folder.
    device
        Of both networks: ``"cpu"``, ``"cuda"``.
    replicas
        Frames by which the errors of each exposure are found (`sectors`).
    method
        By which the sector is desmeared.
    rank
        Columns of the stored covariance's factor.
    **options
        Of that method.

    Attributes
    ----------
    model : versions.Model
        The denoiser.

    Raises
    ------
    BadInput
        If the model is no denoiser, the operator is not that of the sector, or the method has no such options.
    """

    def __init__(
        self,
        reduction: Reduction,
        smearing: Smearing,
        *,
        model: str,
        device: str = "cpu",
        replicas: int = REPLICAS,
        method: str = "dsnet",
        rank: int = RANK,
        **options: Any,
    ) -> None:
        if replicas <= rank:
            raise BadInput(f"{replicas} replicas do not fix a covariance of rank {rank}; take {REPLICAS} and {RANK}.")
        self.model: Model = load_model(model)
        self.reduction, self.replicas, self.rank = reduction, replicas, rank
        self._denoiser = SymmetryDenoiser(self.model, device)
        placed = {"device": device} if device != "cpu" and method.partition(":")[0] in LEARNED else {}
        self._desmear = prepare(smearing, method, **placed, **options)
        self._ai = integrator(reduction.poni)
        self._centre = beam_pixel(self._ai)
        self._orientations = Orientations(reduction)

    def __repr__(self) -> str:
        return f"<PreparedPatterns {self.model.reference}, {self._desmear!r}>"

    def reduce(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Check counts, and keep them with their divisor.

        Parameters
        ----------
        frames
            Counts, shape (exposure, y, x) or (y, x); negative or saturated pixels do not count.
        time, monitor, transmission
            What intensities are divided by, scalars or shape (exposure,).

        Returns
        -------
        xarray.Dataset
            `counts` (exposure, y, x), -1 where a pixel does not count, and `divisor` (exposure).

        Raises
        ------
        BadInput
            If the frames do not fit the detector or are no counts, or a divisor is not positive.
        """
        stack = np.atleast_3d(np.asarray(frames).T).T
        check_shape(stack, self._ai)
        counts = np.where(invalid_pixels(stack, self._ai.detector.name), -1, stack)
        for frame in counts:
            check_counts(frame[None], self.reduction.mask)
        divisor = divisors(len(stack), time=time, monitor=monitor, transmission=transmission)
        return xr.Dataset(
            {
                "counts": (("exposure", "y", "x"), counts.astype(np.int64), {"units": "counts"}),
                "divisor": ("exposure", divisor, {"long_name": "exposure time, monitor and transmission, multiplied"}),
            }
        )

    def answer(self, reduced: xr.Dataset) -> xr.Dataset:
        """Denoise exposures, find the orientation of their rings, and desmear the sector of each.

        Parameters
        ----------
        reduced
            Of `reduce`.

        Returns
        -------
        xarray.Dataset
            Per exposure `denoised` (y, x), `counts_per_pixel`, `chi2_symmetry`, `chi2_rings`; on q `orientation` and
            `anisotropy` of the whole rings with their errors (`orientation`), and what `desmearing.desmear` gives for the
            sector, with the covariance of its noise (`noise_factor`, `noise_own`; `desmearing.covariance` reads it). The sector
            is corrected for a third of the bias that the bootstrap sees (`sectors.CORRECTED`), frames and orientations are not.
            `flags` of both, and `status`. An exposure that cannot be denoised among others that can is a row of NaN.

        Raises
        ------
        BadInput
            If none can be denoised.
        """
        return join_answers([self._answered(reduced.isel(exposure=[number])) for number in range(reduced.sizes["exposure"])])

    def _answered(self, reduced: xr.Dataset) -> xr.Dataset | BadInput:
        try:
            return self._answer(reduced["counts"].values[0], float(reduced["divisor"].values[0]))
        except BadInput as error:
            return error

    def _answer(self, counts: NDArray, divisor: float) -> xr.Dataset:
        mask = self.reduction.mask
        resampled = resample(self._denoiser, counts, self._centre, mask, replicas=self.replicas, seed=SEED, test=False)
        sector = sector_of(resampled, self.reduction, rank=self.rank, divisor=divisor)
        return self._joined(resampled, desmeared(sector, self._desmear, rank=self.rank))

    def _joined(self, resampled: Resampled, sector: DesmearedSector) -> xr.Dataset:
        """Put together what was found of one exposure."""
        found, result, noise = resampled.found, sector.result, sector.covariance
        around, spread = self._orientations(found["denoised"].values[None]), scatter(self._orientations(resampled.again))
        lacking = self.rank - noise.factor.shape[1]  # where replicas were lost, fewer columns are known
        units = {"units": result["I"].attrs["units"]}
        columns: dict[str, Any] = {
            **{name: found[name].variable for name in KEPT},
            "orientation": ("q", around.azimuth[0], {"units": "degree"}),
            "orientation_dev": ("q", spread.azimuth, {"units": "degree"}),
            "anisotropy": ("q", around.anisotropy[0], {"units": "1"}),
            "anisotropy_dev": ("q", spread.anisotropy, {"units": "1"}),
            "noise_factor": (("q", "component"), np.pad(noise.factor, ((0, 0), (0, lacking))), units),
            "noise_own": ("q", noise.own, units),
            "flags": ((), int(result["flags"]) | int(found["flags"]), result["flags"].attrs),
        }
        about = {
            "model": self.model.reference,
            "model_sha256": self.model.sha256,
            "desmeared_by": result.attrs.get("model", result.attrs["method"]),
            "replicas": self.replicas,
            "bias_corrected": CORRECTED,
        }
        return describe(result.assign(columns).assign_attrs(about)).expand_dims("exposure")

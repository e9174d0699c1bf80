"""Denoising of weak frames by the symmetry of small-angle patterns, without any clean frame.

What frames go through:

1. they are brought to a grid with the beam at its middle, where each pixel has a mate (`symmetry`);
2. the symmetry is tested over all of them, and frames that break it are refused;
3. a network that was trained on such frames (`training.denoiser`) answers from the photons of both mates
   (`likelihood`; `paper` is the published algorithm);
4. its rings of equal q are compared with the measured ones, then scaled to their sums (`rings`).

Over full rings denoising gains nothing and biases: integrate the raw frames there. It is for sectors
(`sectors`), orientation maps and display.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file

from dsnet_bluesky.data import BadInput, Flag, describe
from dsnet_bluesky.network import check_device
from dsnet_bluesky.versions import Model

from .likelihood import estimate
from .network import DenoiserConfig, UNet
from .paper import halves, paper_estimate
from .rings import check_rings, conserve, ring_chi2, rings_about
from .symmetry import CentredGrid, Counts, Mask, SymmetryTest, check_counts, find_centre, fold, test_symmetry

__all__ = ["BIAS_LIMIT", "FRIEDEL", "MINIMUM_COUNTS", "SymmetryDenoiser", "check_model", "denoise_centred", "tested"]

FRIEDEL = "friedel"
"""Name of the symmetry I(q) = I(-q) in cards."""

BIAS_LIMIT = 1.2
"""chi2 of the rings above which an answer is flagged as biased."""

MINIMUM_COUNTS = 0.1
"""Counts a pixel below which a frame is flagged."""


class SymmetryDenoiser:
    """Denoise frames with a model that was trained on such frames.

    Parameters
    ----------
    model
        Of a training (`training.denoiser.train_denoiser`), as `versions.load_model` gives it.
    device
        Any device of torch: ``"cpu"``, ``"cuda"``.

    Raises
    ------
    BadInput
        If the model is no denoiser, its card forbids the symmetry, or torch cannot use the device.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        check_device(device)
        check_model(model)
        self.model, self.device = model, device
        self.network = UNet(DenoiserConfig.from_dict(model.card["architecture"]))
        self.network.load_state_dict(load_file(model.weights))
        self.network.eval().requires_grad_(False).to(device)

    def __repr__(self) -> str:
        return f"<SymmetryDenoiser {self.model.reference} on {self.device}>"

    def __call__(
        self,
        counts: ArrayLike,
        centre: tuple[float, float],
        mask: NDArray[np.bool_] | None = None,
        *,
        rings: NDArray | None = None,
        conserving: bool = True,
        test: bool = True,
    ) -> xr.Dataset:
        """Denoise the exposures of one scan.

        Parameters
        ----------
        counts
            Photons, shape (exposure, y, x); negative pixels (gaps) do not count.
        centre
            The beam (y, x) in pixels, as pyFAI counts them (the middle of the first pixel is at 0.5):
            ``reduction.geometry.beam_pixel`` gives it from a poni.
        mask
            True where a pixel does not count, shape (y, x).
        rings
            Ring of each pixel, -1 for none, whose sums are kept; by default of 8 pixels' width. With ``Reduction.bins``
            curves of full rings are the raw ones exactly; but bins as narrow as pixels bring some of the noise back.
        conserving
            Whether each ring is scaled to the measured sum.
        test
            Whether frames that break the symmetry are refused. For simulations that know what they do: answers
            to asymmetric patterns are wrong.

        Returns
        -------
        xarray.Dataset
            `denoised` (exposure, y, x), expected counts; NaN where neither the pixel nor its mate counts. Per exposure
            `counts_per_pixel`, `chi2_symmetry`, `chi2_rings` (of rings a pixel wide, before any is scaled) and `flags` (sum of
            `data.Flag`: ASYMMETRIC, BIASED, FEW_COUNTS, OUT_OF_RANGE). Attributes: the model, the pooled chi2 of the symmetry
            and its error.

        Raises
        ------
        BadInput
            If these are no counts, the beam is not on the frames, or the pattern is off-centre or not symmetric.
        """
        frames, masked = check_counts(counts, mask)
        grid = CentredGrid(masked.shape, (float(centre[0]), float(centre[1])))  # type: ignore[arg-type]
        centred, valid = grid.deal(frames), grid.valid(masked)
        symmetry = tested(frames, masked, grid, centred, valid) if test else test_symmetry(centred, valid)
        denoised = grid.back(denoise_centred(self.network, centred, valid, self.device))
        numbered = rings_about(grid.centre, grid.shape, masked) if rings is None else check_rings(rings, masked)
        chi2 = ring_chi2(denoised, frames, rings_about(grid.centre, grid.shape, masked, width=1.0))
        if conserving:
            denoised = conserve(denoised, frames, numbered)
        seen = ~masked | (grid.back(fold(centred[:1], valid).readings[None].astype(float))[0] > 0)
        mean = frames.sum(axis=(1, 2)) / (~masked).sum()
        return self._dataset(np.where(seen, denoised, np.nan), mean, chi2, symmetry, grid)

    def _dataset(self, denoised: NDArray, mean: NDArray, chi2: NDArray, symmetry: SymmetryTest, grid: CentredGrid) -> xr.Dataset:
        dataset = xr.Dataset(
            {
                "denoised": (("exposure", "y", "x"), denoised, {"units": "counts"}),
                "counts_per_pixel": ("exposure", mean, {"units": "counts"}),
                "chi2_symmetry": ("exposure", symmetry.exposures, {"units": "1"}),
                "chi2_rings": ("exposure", chi2, {"units": "1"}),
                "flags": ("exposure", self._flags(mean, chi2, symmetry)),
            },
            attrs={
                "model": self.model.reference,
                "model_sha256": self.model.sha256,
                "chi2_symmetry": symmetry.chi2,
                "chi2_symmetry_error": symmetry.error,
                "centre_y": grid.centre[0],
                "centre_x": grid.centre[1],
            },
        )
        return describe(dataset)

    def _flags(self, mean: NDArray, chi2: NDArray, symmetry: SymmetryTest) -> NDArray[np.int64]:
        least, most = self.model.card["ranges"]["counts_per_pixel"]
        raised = {
            Flag.OUT_OF_RANGE: (mean < least) | (mean > most),
            Flag.ASYMMETRIC: symmetry.broken_exposures,
            Flag.BIASED: chi2 > BIAS_LIMIT,
            Flag.FEW_COUNTS: mean < MINIMUM_COUNTS,
        }
        return np.sum([int(flag) * where.astype(np.int64) for flag, where in raised.items()], axis=0)


def check_model(model: Model) -> None:
    """Refuse a model that does not denoise by Friedel's symmetry.

    Raises
    ------
    BadInput
        If its card forbids the symmetry, or does not need it.
    """
    symmetry = model.card.get("symmetry", {})
    if FRIEDEL in symmetry.get("forbids", ()):
        raise BadInput(
            f"{model.reference} forbids Friedel's symmetry: what it is for is not symmetric, and denoising by symmetry would "
            "ruin it. Give it the raw frames."
        )
    if FRIEDEL not in symmetry.get("needs", ()):
        raise BadInput(f"{model.reference} is no denoiser by symmetry; train one on the frames of a scan (train_denoiser).")


def tested(frames: Counts, masked: Mask, grid: CentredGrid, centred: Counts, valid: Mask) -> SymmetryTest:
    """Test the symmetry of frames, and refuse those that break it.

    Parameters
    ----------
    frames, masked
        As they are.
    grid, centred, valid
        The same, centred.

    Raises
    ------
    BadInput
        If they break it; the message says whether another centre would help.
    """
    symmetry = test_symmetry(centred, valid)
    if not symmetry.broken:
        return symmetry
    pooled = f"{symmetry.chi2:.3f} +- {symmetry.error:.3f}, pooled over {len(frames)} exposures"
    said = f"chi2 between the pixels and their mates is {pooled}"
    better = find_centre(frames, masked, grid.centre)
    other = CentredGrid(grid.shape, better)
    if not test_symmetry(other.deal(frames), other.valid(masked)).broken:
        raise BadInput(
            f"The pattern is not symmetric about ({grid.centre[0]:.2f}, {grid.centre[1]:.2f}) ({said}), but it is about "
            f"({better[0]:.1f}, {better[1]:.1f}): the beam centre is wrong. Take it from the direct beam of this detector "
            "position."
        )
    raise BadInput(
        f"The pattern does not have Friedel's symmetry ({said}), and no centre nearby mends that. Mask parasitic scattering and "
        "shadows; wide-angle and single-particle images have no such symmetry and must not be denoised by it."
    )


def denoise_centred(network: UNet, centred: Counts, valid: Mask, device: str = "cpu") -> NDArray[np.float64]:
    """Denoise centred frames: expected counts, shape (exposure, Y, X).

    Parameters
    ----------
    network
        Of either variant.
    centred, valid
        Frames (exposure, Y, X) and pixels that count.
    device
        Where the network is.
    """
    with torch.backends.cudnn.flags(allow_tf32=False):
        if network.config.variant == "symmetry":
            return estimate(network, fold(centred, valid), device)
        parts = halves(centred, valid, product_mask=network.config.product_mask)
        return paper_estimate(network, parts, valid.shape[1], device)

"""The model ``icosahedra``: size and orientation of single icosahedra from their images at wide angles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from torch import Tensor

from dsnet_bluesky.data import BadInput, Flag, describe
from dsnet_bluesky.network import check_device
from dsnet_bluesky.versions import Model

from .answers import answers, filled, score
from .images import VIEWS, log_image
from .multislice import Detector, Simulator
from .network import RADIUS, Answer, NetworkConfig, ResNet
from .rotations import misorientation

__all__ = ["Calibration", "Icosahedra", "simulator_from"]


REPEATED = 3
"""How often the network is asked again, masked pixels filled with what its last answer says of them."""


class Calibration(NamedTuple):
    """Errors as they were on validation images, by radius and score.

    Each is the 68 % quantile of the errors of the images in a bin.
    """

    radius_edges: list[float]
    """Inner edges of the bins of the radius in nm."""
    score_edges: list[float]
    """Inner edges of the bins of the score."""
    radius_dev: list[list[float]]
    """In nm, for each bin of the radius and of the score."""
    misorientation_dev: list[list[float]]
    """In degrees."""
    least_score: float
    """What fewer than 1 % of validation images fall below: below it an image is flagged."""

    @classmethod
    def measured(cls, answer: Answer, truth: Answer, scores: Tensor, bins: tuple[int, int] = (5, 4)) -> Calibration:
        """Measure errors, in bins of as many images each.

        Parameters
        ----------
        answer, truth
            Found and true values.
        scores
            Of the answers.
        bins
            Of the radius and of the score; bins of the score are those of all radii.
        """
        radius, rated = (part.double().cpu().numpy() for part in (answer.radius, scores))
        edges = [np.quantile(values, np.arange(1, n) / n).tolist() for values, n in zip((radius, rated), bins, strict=True)]
        away = (answer.radius - truth.radius).abs().double().cpu().numpy()
        turned = misorientation(answer.quaternion.double(), truth.quaternion.double()).cpu().numpy()
        place = np.digitize(radius, edges[0]), np.digitize(rated, edges[1])
        tables = [_table(errors, place, bins) for errors in (away, turned)]
        values = dict(zip(cls._fields, (_rounded(each) for each in (*edges, *tables, np.quantile(rated, 0.01))), strict=True))
        return cls(**values)

    def devs(self, radius: NDArray[Any], scores: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Look up radius_dev in nm and misorientation_dev in degrees, shape (exposure,) each."""
        place = np.digitize(radius, self.radius_edges), np.digitize(scores, self.score_edges)
        return np.array(self.radius_dev)[place], np.array(self.misorientation_dev)[place]


def _table(errors: NDArray[Any], place: tuple[NDArray[Any], NDArray[Any]], bins: tuple[int, int]) -> NDArray[np.float64]:
    """Take the 68 % quantile in each bin; of all where a bin holds few."""
    table = np.full(bins, np.quantile(errors, 0.6827))
    for i, j in np.ndindex(*bins):
        inside = errors[(place[0] == i) & (place[1] == j)]
        if inside.size >= 20:
            table[i, j] = np.quantile(inside, 0.6827)
    return table


def _rounded(values: Any) -> Any:
    return np.round(values, 4).tolist()


def simulator_from(values: dict[str, Any], device: str = "cpu") -> Simulator:
    """Build the simulator that a card or a recipe describes (`Simulator.to_dict`)."""
    try:
        return Simulator(
            detector=Detector(values["pixels"], values["angle"], values["wavelength"]),
            absorption=values["absorption"],
            length=values["absorption_length"],
            refraction=values["refraction"],
            slices=values["slices"],
            points=values["points"],
            device=device,
        )
    except KeyError as error:
        raise BadInput(f"The simulator is described without {error}; compare it with models/icosahedra-1.0.0.") from error


class Icosahedra:
    """Read images of single icosahedra with a released model.

    Parameters
    ----------
    model
        What `dsnet_bluesky.versions.load_model` returns.
    device
        Any device of torch.
    views
        How many of the eight quarter turns and mirrors of an image the network is asked for; 1 is the fastest.

    Raises
    ------
    BadInput
        If the model is of another kind, or torch cannot use the device.
    """

    def __init__(self, model: Model, device: str = "cpu", *, views: int = VIEWS) -> None:
        card = model.card
        if "simulator" not in card or "score_edges" not in card.get("calibration", {}):
            raise BadInput(f"{model.reference} is no model of icosahedra; give icosahedra, or a model that its training wrote.")
        if not 1 <= views <= VIEWS:
            raise BadInput(f"There are {VIEWS} views of an image; give 1 to {VIEWS}, not {views}.")
        check_device(device)
        self.model, self.device, self.views = model, device, views
        self.simulator = simulator_from(card["simulator"], device)
        self.calibration = Calibration(**card["calibration"])
        self.network = ResNet(NetworkConfig.from_dict(card["architecture"]))
        self.network.load_state_dict(load_file(model.weights))
        self.network.eval().requires_grad_(False).to(device)

    def __call__(self, frames: ArrayLike) -> xr.Dataset:
        """Read size and orientation.

        Parameters
        ----------
        frames
            Counts or intensities in any unit, shape (exposure, y, x) or (y, x), on the detector of the card: equal steps of the
            transverse q, centred on the beam. NaN where masked.

        Returns
        -------
        xarray.Dataset
            With the dimension exposure: `radius`, `radius_dev` (nm), `quaternion` (also component: w, x, y, z),
            `misorientation_dev` (degrees), `score`, `status` (ok) and `flags`: OUT_OF_RANGE where the radius is outside of what
            the model was trained for, POOR_FIT where the image is unlike the one simulated from the answer, perhaps no
            icosahedron.

        Raises
        ------
        BadInput
            If the frames have another shape, or one has no usable pixel.
        """
        intensity = self._intensity(frames)
        answer = answers(self.network, log_image(intensity), self.views)
        for _ in range(REPEATED if intensity.isnan().any() else 0):
            answer = answers(self.network, log_image(filled(self.simulator, intensity, answer)), self.views)
        rated = score(self.simulator, intensity, answer)
        return self._result(*(part.double().cpu().numpy() for part in (*answer, rated)))

    def _intensity(self, frames: ArrayLike) -> Tensor:
        values = np.asarray(frames, dtype=np.float32)
        values = values[None] if values.ndim == 2 else values
        pixels = self.simulator.detector.pixels
        if values.ndim != 3 or values.shape[1:] != (pixels, pixels) or not len(values):
            raise BadInput(
                f"Frames of shape {values.shape} cannot be read; give (exposure, {pixels}, {pixels}), brought to equal steps of "
                f"the transverse q of {self.simulator.detector.step:.4g} 1/nm and centred on the beam."
            )
        usable = np.isfinite(values) & (values > 0)
        empty = np.flatnonzero(~usable.any(axis=(1, 2)))
        if empty.size:
            raise BadInput(f"Exposure {empty[0]} holds no pixel with a positive intensity; leave empty frames out.")
        return torch.from_numpy(np.where(np.isfinite(values), values, np.nan)).to(self.device)

    def _result(self, radius: NDArray[Any], quaternion: NDArray[Any], scores: NDArray[Any]) -> xr.Dataset:
        radius_dev, misorientation_dev = self.calibration.devs(radius, scores)
        lowest, highest = self.model.card["ranges"].get("radius", RADIUS)
        flags = np.where((radius < lowest) | (radius > highest), int(Flag.OUT_OF_RANGE), 0)
        flags |= np.where(scores < self.calibration.least_score, int(Flag.POOR_FIT), 0)
        variables = {
            "radius": ("exposure", radius, {"units": "nm"}),
            "radius_dev": ("exposure", radius_dev, {"units": "nm"}),
            "quaternion": (("exposure", "component"), quaternion, {"components": "w x y z"}),
            "misorientation_dev": ("exposure", misorientation_dev, {"units": "degree"}),
            "score": ("exposure", scores),
            "flags": ("exposure", flags.astype(np.int64)),
            "status": ("exposure", np.full(radius.shape, "ok")),
        }
        return describe(xr.Dataset(variables, attrs={"model": self.model.reference, "model_sha256": self.model.sha256}))

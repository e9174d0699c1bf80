"""Examples: ideal curves measured by random instruments, as a network is trained on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.features import Features, Operator, features_of
from dsnet_bluesky.smearing import Smearing

from .instruments import Instrument, draw_instrument
from .measurements import draw_noise
from .samples import Library, draw_sample

__all__ = ["Measured", "Session", "draw_instrument_of", "load_session", "measure", "save_session", "session"]

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Measured:
    """Curves measured with one instrument, and the truth.

    Attributes
    ----------
    instrument
        What measured them.
    I, Idev
        As measured and as stated, shape (curve, n).
    truth
        Ideal curves on q_calc, shape (curve, m).
    families
        Primary family of each sample.
    levels
        Median of the true relative noise of each curve.
    """

    instrument: Instrument
    I: Floats
    Idev: Floats
    truth: Floats
    families: list[str]
    levels: list[float]


@dataclass
class Session:
    """Examples of one instrument, ready for a network.

    Attributes
    ----------
    operator
        The operator that the curves are desmeared with.
    features
        Of every curve; channels in half precision, to save room.
    ln_truth
        ln of the ideal curves over their scale, on q_calc, shape (curve, m).
    families, levels
        As in `Measured`.
    """

    operator: Operator
    features: Features
    ln_truth: Tensor
    families: list[str]
    levels: list[float]

    def batch(self, chosen: Any, device: str | torch.device) -> tuple[Features, Tensor]:
        """Give the features and the truth of some curves, in single precision, on a device."""
        features = Features(*(part[chosen].to(device, torch.float32) for part in self.features))
        return features, self.ln_truth[chosen].to(device)


def draw_instrument_of(place: list[int], points: tuple[int, int] = (50, 600)) -> Instrument:
    """Draw the instrument that a list of seeds stands for; one that cannot be built is drawn again."""
    rng = np.random.default_rng(place)
    while True:
        try:
            return draw_instrument(rng, points=points)
        except BadInput:
            continue


def measure(
    rng: np.random.Generator,
    instrument: Instrument,
    library: Library,
    count: int,
    *,
    family: str | None = None,
    level: float | None = None,
    plain: bool = False,
) -> Measured:
    """Measure samples with an instrument.

    Parameters
    ----------
    rng
        Source of all choices.
    instrument
        It smears on its fine grid; its own operator is for desmearing only.
    library
        What samples are made of.
    count
        How many.
    family, plain
        See `draw_sample`.
    level
        See `draw_noise`.
    """
    fine, q = instrument.fine, instrument.smearing.q
    samples = [draw_sample(rng, library, instrument.view, family, plain=plain) for _ in range(count)]
    ideal = np.array([sample.I(fine) for sample in samples])
    smeared = instrument.fine_smearing.apply(ideal)
    noises = [draw_noise(rng, q, curve, level) for curve in smeared]
    found = [noise.measure(rng, curve) for noise, curve in zip(noises, smeared, strict=True)]
    factor = (fine.size - 1) // (instrument.smearing.q_calc.size - 1)
    return Measured(
        instrument,
        np.array([f.I for f in found]),
        np.array([f.Idev for f in found]),
        ideal[:, ::factor],
        [sample.family for sample in samples],
        [float(np.median(noise.sigma / curve)) for noise, curve in zip(noises, smeared, strict=True)],
    )


def session(measured: Measured, device: str = "cpu") -> Session:
    """Compute the features of measured curves; examples without finite ones are left out."""
    operator = Operator(measured.instrument.smearing, device)
    features = features_of(operator, measured.I, measured.Idev)
    ln_truth = torch.log(operator.tensor(np.maximum(measured.truth, 1e-300) / features.scale.cpu().numpy()).clamp_min(1e-30))
    good = torch.isfinite(features.channels).all(dim=(1, 2)) & torch.isfinite(ln_truth).all(dim=1)
    kept = Features(*(part[good] for part in features))
    rows = good.nonzero()[:, 0].tolist()
    families, levels = [measured.families[i] for i in rows], [measured.levels[i] for i in rows]
    return Session(operator, kept._replace(channels=kept.channels.half()), ln_truth[good], families, levels)


def save_session(path: Path, made: Session) -> None:
    """Write a session; a crash while writing leaves nothing behind that looks like one."""
    smearing = made.operator.smearing
    arrays = (smearing.q, smearing.q_calc, smearing.matrix)
    content = {
        "kind": smearing.kind,
        "smearing": [torch.from_numpy(np.array(array)) for array in arrays],
        "features": list(made.features),
        "ln_truth": made.ln_truth,
        "families": made.families,
        "levels": made.levels,
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_session(path: Path, device: str = "cpu") -> Session:
    """Read a session."""
    content = torch.load(path, weights_only=True)
    smearing = Smearing(*(part.numpy() for part in content["smearing"]), kind=content["kind"])
    operator = Operator(smearing, device, transform=False)
    features = Features(*content["features"])
    return Session(operator, features, content["ln_truth"], content["families"], content["levels"])

"""Examples: ideal curves measured by random instruments, as a network is trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsnet_bluesky.atomic import replacing
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
    arrays = {"q": smearing.q, "q_calc": smearing.q_calc, "matrix": smearing.matrix}
    content = {
        **{f"smearing.{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()},
        **{f"operator.{name}": tensor for name, tensor in made.operator.tensors.items()},
        **{f"features.{name}": tensor for name, tensor in made.features._asdict().items()},
        "ln_truth": made.ln_truth,
    }
    about = {"kind": smearing.kind, "families": made.families, "levels": made.levels}
    with replacing(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in content.items()}, partial, {"about": json.dumps(about)})


def load_session(path: Path, device: str = "cpu") -> Session:
    """Read a session."""
    with safe_open(path, "pt") as stored:
        names = stored.keys()
        content = {name: stored.get_tensor(name) for name in names}
        about = json.loads(stored.metadata()["about"])

    def part(kind: str) -> dict[str, Tensor]:
        return {name.partition(".")[2]: tensor for name, tensor in content.items() if name.startswith(f"{kind}.")}

    smearing = Smearing(**{name: array.numpy() for name, array in part("smearing").items()}, kind=about["kind"])
    operator = Operator.from_tensors(smearing, part("operator"), device)
    features = Features(**{name: tensor.to(device) for name, tensor in part("features").items()})
    return Session(operator, features, content["ln_truth"].to(device), about["families"], about["levels"])

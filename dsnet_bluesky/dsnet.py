"""The methods ``dsnet`` and ``dsnet-fast``: one pass of a released network that is told the operator, with calibrated errors.

What a curve goes through:

1. points much closer than the smearing is wide are averaged (`working`);
2. `features` are computed with the exact operator, and the network (`unrolled`) answers;
3. where that answer, smeared again, misses the measurement clearly, exact proximal
   steps move it there as far as its error allows (`consistency`);
4. where even that misses, the result is flagged; and where the curve is also like none that the network was
   trained on, a classical method that meets the measurement takes its place.

Uncertainty
    `Idev` is the network's error, scaled on validation families until one of it held 68 % of the
    truth. Its tails are heavier than a Gaussian's: 95 % are within `coverage_factor` of it, given in the
    diagnostics. Of it the noise of the measurement makes `Idev_noise`; the rest,
    ``sqrt(Idev^2 - Idev_noise^2)``, is what the network does not know. Errors of neighbours are
    correlated: see `desmearing.covariance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from .consistency import EXACT, correlation, counted, proximal
from .data import BadInput, Flag
from .desmearing import Solution
from .desmearing.ift import IFT
from .desmearing.kernels import straightened, widths_below
from .desmearing.map import MAP
from .features import VERSION, Operator, features_of
from .network import check_device, has_bfloat16
from .smearing import Smearing
from .threads import OneThread
from .unrolled import Unrolled, UnrolledConfig
from .versions import Model, load_model
from .working import Working

__all__ = ["DSNet", "extent"]

Floats = NDArray[np.floating[Any]]

BATCH_NODES = 20_000
"""Nodes of all curves that are worked on at once on a CPU: they stay in its caches."""

DEVICE_BATCH_NODES = 2_000_000
"""The same for other devices: enough work to fill them, in some 3 GB."""

PROXIMAL_ENTRIES = 400_000
"""Elements of the matrices that proximal steps work on at once on a CPU: each curve has its own, and they stay in its caches."""

DEVICE_PROXIMAL_ENTRIES = 4_000_000
"""The same for other devices."""

SILENT = 0.3
"""A curve whose mean squared signal is below this, in units of its noise, is less than noise: empty, or its errors are wrong."""

MISSED = 3.0
"""chi2 above which an answer takes proximal steps: below it they hurt as often as they help (docs/explanation/dsnet.md)."""

POOR = 2.0
"""chi2 above which the classical methods are asked."""

HAT = 1 / np.sqrt(6)
"""Standard deviation of a hat function in steps: a curve that is straight between its points shows nothing narrower."""

one_torch_thread = OneThread(torch.get_num_threads, torch.set_num_threads, each=True)


class DSNet:
    """Desmear with a released network.

    Parameters
    ----------
    smearing
        The operator R.
    consistency
        Whether answers that miss the measurement take proximal steps towards it.
    fallback
        Whether a classical method (`map`, `ift`) answers where the network cannot.
    device
        Any device of torch: ``"cpu"``, ``"cuda"``.
    half
        Let the convolutions compute in bfloat16, for speed (benchmarks/speed.py): I changes by much less than its error.
    model
        Released model, ``"NAME"`` or ``"NAME:VERSION"``, or the path of its folder.

    Raises
    ------
    BadInput
        If the model cannot be loaded, or the device does not compute in bfloat16 as `half` wants it.
    """

    def __init__(
        self,
        smearing: Smearing,
        *,
        consistency: bool = True,
        fallback: bool = True,
        device: str = "cpu",
        half: bool = False,
        model: str = "dsnet",
    ) -> None:
        self.smearing = smearing
        self.consistency, self.fallback, self.device, self.half = consistency, fallback, device, half
        check_device(device)
        if half and not has_bfloat16(device):
            raise BadInput(f"The device {device!r} does not compute in bfloat16: half=True would be slow, leave it out.")
        self.model = load_model(model)
        if "calibration" not in self.model.card:
            raise BadInput(f"{self.model.name} {self.model.version} is no model of the method dsnet; leave out the option model.")
        if self.model.card.get("features") != VERSION:
            raise BadInput(
                f"{self.model.name} {self.model.version} was trained on other features than this dsnet-bluesky computes; "
                "take a newer model, or the version of the package that the model came with."
            )
        self.network, self.range = load_network(self.model, device)
        self.working = Working(smearing)
        self.operator = Operator(self.working.smearing, device)
        self.calibration = Calibration(self.model.card["calibration"], device)
        self._unusual = unusual_operator(self.working.smearing, self.model.card["ranges"])
        self._nodes = torch.tensor(np.array(self.working.smearing.q_calc), device=self.operator.device)
        self._matrix = self.operator.matrix.double()
        self._classical: dict[str, Any] = {}

    def __call__(self, I: Floats, Idev: Floats) -> Solution:
        """Desmear curves of any sign.

        Parameters
        ----------
        I, Idev
            Measured curves and their standard deviations, shape (exposure, n).

        Returns
        -------
        Solution
            `diagnostics` hold for every exposure what answered (``network``, ``proximal``, ``map``
            or ``ift``) and the network's chi2 before any step, `attrs` how errors are correlated.
        """
        on_cpu = self.operator.device.type == "cpu"
        with one_torch_thread as threads:
            most, beside = (BATCH_NODES, threads) if on_cpu else (DEVICE_BATCH_NODES, 1)
            batch = max(1, min(most // self.operator.smearing.q_calc.size, -(-len(I) // beside)))
            parts = _side_by_side(lambda i: self._pass(I[i : i + batch], Idev[i : i + batch]), range(0, len(I), batch), beside)
        found = _Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        solution = self._solution(found)
        if self.fallback:
            self._substitute(solution, I, Idev, found.after)
        return solution

    @torch.inference_mode()
    def _pass(self, I: Floats, Idev: Floats) -> _Found:
        """Answer one batch on the working grid."""
        I, Idev = self.working.curves(np.asarray(I, dtype=float), np.asarray(Idev, dtype=float))
        Idev = np.maximum(Idev, EXACT * np.abs(I))
        silent = torch.as_tensor(np.mean((I / Idev) ** 2, axis=-1) < SILENT, device=self.operator.device)
        features = features_of(self.operator, I, Idev)
        kind = self.operator.device.type
        # Without half, convolutions in full single precision: cuDNN's default (TF32) would change ln I by more than 1e-4.
        with torch.backends.cudnn.flags(allow_tf32=False), torch.autocast(kind, dtype=torch.bfloat16, enabled=self.half):
            answer = self.network(self.operator, features)
        ln_I, error = answer.ln_I.double(), self.calibration(answer.ln_error).double()
        before = self._chi2(ln_I, features.I, features.Idev)
        width = torch.exp(answer.ln_resolved) * self.operator.unit
        after, moved = before.clone(), torch.zeros_like(before, dtype=torch.bool)
        for rows in self._missed(before):
            nearer = self._proximal(ln_I[rows], error[rows], width[rows], features.I[rows], features.Idev[rows])
            reached = self._chi2(nearer, features.I[rows], features.Idev[rows])
            kept = reached < before[rows]
            ln_I[rows[kept]], after[rows[kept]], moved[rows[kept]] = nearer[kept], reached[kept], True
        columns = (ln_I + torch.log(features.scale), error, error * answer.ln_share.exp(), width, before, after, moved)
        strange = silent | (self._distance(answer.deep) > self.calibration.farthest)
        flags = torch.where(strange, int(Flag.OUT_OF_RANGE), 0) | self._unusual
        return _Found(*(column.cpu().numpy() for column in (*columns, flags)))

    def _missed(self, chi2: Tensor) -> tuple[Tensor, ...]:
        """Rows of answers that are to take proximal steps, a few at a time: each needs matrices of its own."""
        rows = (chi2 > MISSED).nonzero()[:, 0]
        entries = PROXIMAL_ENTRIES if chi2.device.type == "cpu" else DEVICE_PROXIMAL_ENTRIES
        few = max(1, entries // self.operator.smearing.q_calc.size**2)
        return rows.split(few) if self.consistency and rows.numel() else ()

    def _chi2(self, ln_I: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
        rest = (torch.exp(ln_I) @ self._matrix.T - I) / Idev
        return rest.square().mean(dim=-1)

    def _proximal(self, ln_I: Tensor, error: Tensor, width: Tensor, I: Tensor, Idev: Tensor) -> Tensor:
        """Move answers towards the measurement; their errors stay, which is on the safe side."""
        correlated = correlation(counted(self._nodes, width.double()), self.calibration.correlation["shares"])
        return proximal(self.operator, ln_I, error, correlated, I, Idev).ln_I

    def _distance(self, deep: Tensor) -> Tensor:
        """Mahalanobis distance of the bottom of the network from what training showed it."""
        return ((deep - self.range["mean"]) @ self.range["whitening"]).square().mean(dim=-1).sqrt()

    def _solution(self, found: _Found) -> Solution:
        """Take answers from the working grid to q and to q_calc."""
        smearing, working = self.smearing, self.working
        I = np.exp(working.interpolate(found.ln_I, smearing.q))
        ideal = np.exp(working.interpolate(found.ln_I, smearing.q_calc))
        return Solution(
            I_calc=straightened(smearing, ideal.T).T,
            I=I,
            Idev=I * working.spread(found.error),
            Idev_noise=I * working.spread(found.noise),
            Qdev=np.maximum(working.spread(found.width), np.gradient(smearing.q) * HAT),
            flags=found.flags.astype(np.int64),
            diagnostics={"answer": np.where(found.moved, "proximal", "network"), "chi2_network": found.before},
            attrs={"correlation": self.calibration.correlation, "coverage_factor": self.calibration.coverage_factor},
        )

    def _substitute(self, solution: Solution, I: Floats, Idev: Floats, chi2: Floats) -> None:
        """Give a classical answer where the curve is out of range, the network's answer misses it and theirs does not."""
        strange = (solution.flags & int(Flag.OUT_OF_RANGE)) > 0
        hopeless = ~np.isfinite(chi2)
        for row in np.flatnonzero(hopeless | ((chi2 > POOR) & strange)):
            found = self._best_classical(I[row : row + 1], Idev[row : row + 1])
            if found is not None:
                solution.diagnostics["answer"][row] = found[0]
                _replace(solution, int(row), self.smearing, found[1])

    def _best_classical(self, I: Floats, Idev: Floats) -> tuple[str, Solution] | None:
        """Of the classical answers that meet the measurement the one that claims the smaller error, if any does."""
        if not self._classical:
            self._classical = {"ift": IFT(self.smearing), "map": MAP(self.smearing)}
        answers = {name: method(I, Idev) for name, method in self._classical.items()}
        fitting = {
            name: answer
            for name, answer in answers.items()
            if not answer.flags[0] and np.mean(((self.smearing.apply(answer.I_calc[0]) - I[0]) / Idev[0]) ** 2) < POOR
        }
        if not fitting:
            return None
        claims = {
            name: float(np.median(answer.Idev[0] / np.abs(_on_q(self.smearing, answer)[0]))) for name, answer in fitting.items()
        }
        best = min(claims, key=lambda name: claims[name])
        return best, fitting[best]


def _side_by_side(answer: Callable[[int], _Found], places: Sequence[int], most: int) -> list[_Found]:
    """Answer batches, so many at the same time at most, each in one thread."""
    if min(len(places), most) < 2:
        return [answer(place) for place in places]
    with ThreadPoolExecutor(most, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(answer, places))


def _on_q(smearing: Smearing, solution: Solution) -> Floats:
    return smearing.at_q(solution.I_calc) if solution.I is None else solution.I


def _replace(solution: Solution, row: int, smearing: Smearing, other: Solution) -> None:
    """Put the answer of another method in the place of one."""
    solution.I_calc[row] = other.I_calc[0]
    columns = (
        (solution.I, _on_q(smearing, other)[0]),
        (solution.Idev, other.Idev[0]),
        (solution.Idev_noise, np.nan),
        (solution.Qdev, np.nan if other.Qdev is None else other.Qdev[0]),
    )
    for column, values in columns:
        assert column is not None
        column[row] = values
    solution.flags[row] |= int(other.flags[0]) | int(Flag.SUBSTITUTED)


class _Found(NamedTuple):
    """Answers of a batch on the working grid: ln I, its error in all and by noise, the resolution, and how it went."""

    ln_I: Floats
    error: Floats
    noise: Floats
    width: Floats
    before: Floats
    after: Floats
    moved: NDArray[np.bool_]
    flags: NDArray[np.integer[Any]]


class Calibration:
    """How stated errors follow from those of the network: settled on validation families, kept in the card.

    Parameters
    ----------
    card
        The table ``calibration`` of a model's card: ``ln_error``, where the factor is known;
        ``ln_factor``, its logarithm there; ``coverage_factor``, how many errors hold 95 %; ``correlation``, lengths
        in resolutions and shares of the variance; ``farthest``, the largest distance of a curve like those of training.
    device
        Where errors live.
    """

    def __init__(self, card: dict[str, Any], device: str) -> None:
        self.correlation = dict(card["correlation"])
        self.coverage_factor = float(card["coverage_factor"])
        self.farthest = float(card["farthest"])
        self._knots = torch.tensor(card["ln_error"], dtype=torch.float32, device=device)
        self._values = torch.tensor(card["ln_factor"], dtype=torch.float32, device=device)

    def __call__(self, ln_error: Tensor) -> Tensor:
        """Give the error of ln I."""
        right = torch.searchsorted(self._knots, ln_error.contiguous()).clamp(1, len(self._knots) - 1)
        low, high = self._knots[right - 1], self._knots[right]
        part = ((ln_error - low) / (high - low)).clamp(0, 1)
        return torch.exp(ln_error + self._values[right - 1] * (1 - part) + self._values[right] * part)


def load_network(model: Model, device: str = "cpu") -> tuple[Unrolled, dict[str, Tensor]]:
    """Build the network of a released model with its weights, and the range of its training."""
    with torch.device("meta"):  # no weights are drawn in vain
        network = Unrolled(UnrolledConfig.from_dict(model.card["architecture"]))
    weights = load_file(model.weights)
    seen = {name.removeprefix("range."): weights.pop(name).to(device) for name in list(weights) if name.startswith("range.")}
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False).to(device), seen


def unusual_operator(smearing: Smearing, ranges: dict[str, Any]) -> int:
    """OUT_OF_RANGE for an operator that training knew nothing like, else 0."""
    width, span = extent(smearing)
    outside = smearing.q.size < ranges["points"][0] or width > ranges["width_in_steps"] or span < ranges["widths_in_range"]
    return int(Flag.OUT_OF_RANGE) if outside else 0


def extent(smearing: Smearing) -> tuple[float, float]:
    """Give the median width of R in steps of q, and the range of q in widths of R where it is wide, as a card names its range."""
    below = widths_below(smearing)
    # Not their median: a beam as wide as the range is cut off by the direct beam at most q.
    wide = max(float(np.quantile(below, 0.9)), 1e-12)
    return float(np.median(below / np.gradient(smearing.q))), float(np.ptp(smearing.q)) / wide

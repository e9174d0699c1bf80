"""What a trained network's errors are worth: their parts, their resolution, their calibration, their range.

All of it is learned when the answers are settled and does not change them. Repeated
measurements of one sample tell which part of an error is noise; a comb of small bumps, put on the truth,
tells what is left of each; validation families tell how much of the truth is within a
stated error.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from dsnet_bluesky.consistency import CORRELATION_LENGTHS, counted
from dsnet_bluesky.features import Features, Operator, features_of
from dsnet_bluesky.library.examples import Session, draw_instrument_of
from dsnet_bluesky.library.instruments import Instrument
from dsnet_bluesky.library.measurements import Measurement, draw_noise
from dsnet_bluesky.library.samples import Library, draw_sample
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.unrolled import Unrolled

__all__ = ["Repeats", "calibrate", "learn_parts", "measure_repeats", "range_of"]

Floats = NDArray[np.floating[Any]]

TOOTH = 0.7
"""Standard deviation of a tooth of the comb, in units of the operator (`Operator.unit`)."""

SPACING = 8.0
"""Distance of the teeth, in the same units."""

HEIGHT = 0.15
"""Height of a tooth in ln I."""

DIRECTIONS = 16
"""Principal directions in which the bottom of the network is compared with that of training."""

WITHIN = 0.68
"""Share of the truth that one stated error is to hold."""

LAGS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60)
"""Distances in nodes at which the correlation of errors is looked at."""

STEPS = 3000
"""Steps in which the parts are learned."""


@dataclass
class Repeats:
    """Curves measured twice, and once more with the first noise on a truth that carries a comb.

    Attributes
    ----------
    smearing
        The operator.
    once, again, combed
        Features of the three measurements.
    comb
        Addition to ln I of the third truth on q_calc, shape (curve, m), and where its teeth are.
    teeth
        1 at the top of each tooth, shape (curve, m).
    """

    smearing: Smearing
    once: Features
    again: Features
    combed: Features
    comb: Tensor
    teeth: Tensor

    def operator(self, device: str) -> Operator:
        """Give the operator on a device."""
        return Operator(self.smearing, device, transform=False)


def measure_repeats(place: list[int], library: Library, count: int, points: tuple[int, int]) -> Repeats:
    """Measure samples three times with a random instrument.

    Parameters
    ----------
    place
        Seeds of the instrument and of all that is measured.
    library
        What samples are made of.
    count
        How many.
    points
        Least and largest number of q.
    """
    instrument = draw_instrument_of(place, points)
    rng = np.random.default_rng([*place, 1])
    operator = Operator(instrument.smearing)
    combs = [_comb(rng, instrument, operator) for _ in range(count)]
    rows = [_thrice(rng, instrument, library, comb[0]) for comb in combs]
    made = [features_of(operator, np.array([r[k].I for r in rows]), np.array([r[k].Idev for r in rows])) for k in range(3)]
    good = torch.stack([torch.isfinite(features.channels).all(dim=(1, 2)) for features in made]).all(dim=0)
    once, again, combed = (Features(*(part[good] for part in features)) for features in made)
    nodes = instrument.smearing.q_calc.size
    factor = (instrument.fine.size - 1) // (nodes - 1)
    comb = torch.tensor(np.array([c[0][::factor] for c in combs]), dtype=torch.float32)
    teeth = torch.tensor(np.array([c[1] for c in combs]), dtype=torch.float32)
    return Repeats(instrument.smearing, once, again, combed, comb[good], teeth[good])


def _comb(rng: np.random.Generator, instrument: Instrument, operator: Operator) -> tuple[Floats, Floats]:
    """Give bumps on the fine grid, and where on q_calc their tops are."""
    place = operator.place.numpy().astype(float)
    fine = np.interp(instrument.fine, instrument.smearing.q_calc, place)
    tops = np.arange(rng.uniform(0, SPACING), place[-1], SPACING)
    bumps = HEIGHT * np.exp(-0.5 * ((fine[:, None] - tops) / TOOTH) ** 2).sum(axis=1)
    teeth = np.zeros(place.size)
    teeth[np.abs(place[:, None] - tops).argmin(axis=0)] = 1
    return bumps, teeth


def _thrice(rng: np.random.Generator, instrument: Instrument, library: Library, comb: Floats) -> list[Measurement]:
    fine = instrument.fine
    ideal = draw_sample(rng, library, instrument.view).I(fine)
    smeared, combed = instrument.fine_smearing.apply(np.array([ideal, ideal * np.exp(comb)]))
    noise = draw_noise(rng, instrument.smearing.q, smeared)
    first, second = noise.measure(rng, smeared), noise.measure(rng, smeared)
    # The same noise on the combed curve: what changes in the answer is the answer to the comb.
    return [first, second, Measurement(first.I + combed - smeared, first.Idev)]


def learn_parts(network: Unrolled, repeats: Sequence[Repeats], seed: int, device: str) -> None:
    """Teach a trained network which part of its error is noise, and what it resolves; in place.

    Parameters
    ----------
    network
        Only its head `split` changes.
    repeats
        From `measure_repeats`.
    seed, device
        Of the order, and where to work.
    """
    cases = [_case(network, part, device) for part in repeats]
    optimizer = torch.optim.Adam(network.split.parameters(), lr=3e-3)
    rng = np.random.default_rng([seed, 4])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        loss = _parts_loss(network, cases[rng.integers(len(cases))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass
class _Case:
    """Answers of the settled network to repeats, and what its head for parts sees."""

    seen: Tensor
    ln_error: Tensor
    scatter: Tensor
    left: Tensor
    teeth: Tensor
    measured: Tensor


@torch.no_grad()
def _case(network: Unrolled, part: Repeats, device: str) -> _Case:
    operator = part.operator(device)
    batches = [Features(*(column.to(device) for column in features)) for features in (part.once, part.again, part.combed)]
    answers = [network(operator, features) for features in batches]
    levels = [answer.ln_I + torch.log(features.scale) for answer, features in zip(answers, batches, strict=True)]
    left = (levels[2] - levels[0]) / part.comb.to(device).clamp_min(0.3 * HEIGHT)
    seen = network.seen_by_split(operator, batches[0])
    teeth = part.teeth.to(device) * operator.measured
    return _Case(seen, answers[0].ln_error, (levels[0] - levels[1]) / 2**0.5, left.clamp(0, 1), teeth, operator.measured)


def _parts_loss(network: Unrolled, case: _Case) -> Tensor:
    """Likelihood of the scatter of repeats, and the distance of predicted from seen heights of teeth."""
    ln_share, ln_resolved = network.parts(case.seen)
    ln_noise = case.ln_error + ln_share
    z = (case.scatter * torch.exp(-ln_noise)).abs()
    surprise = torch.where(z < 4, 0.5 * z * z, 4 * z - 8) + ln_noise
    likelihood = (surprise * case.measured).sum() / (case.measured.sum() * len(z))
    height = TOOTH / torch.sqrt(TOOTH**2 + torch.exp(2 * ln_resolved))
    misses = ((height - case.left).abs() * case.teeth).sum() / case.teeth.sum().clamp_min(1)
    return likelihood + 3 * misses


@torch.no_grad()
def calibrate(network: Unrolled, sessions: Sequence[Session], knots: int = 8) -> dict[str, Any]:
    """Find by how much stated errors must be multiplied for one of them to hold 68 % of the truth, and how many hold 95 %.

    The factor is a function of the stated error itself. Errors have heavier tails than a Gaussian's: the coverage factor of
    95 % (in the sense of the GUM, JCGM 100:2008, 6.2) is more than 2.

    Parameters
    ----------
    network
        Settled.
    sessions
        Of validation families.
    knots
        Number of stated errors at which the factor is given.

    Returns
    -------
    dict
        ``ln_error``, ``ln_factor``, ``coverage_factor``, ``correlation``: the table ``calibration`` of a card.
    """
    stated, missed, products = [], [], []
    for part in sessions:
        features, ln_truth = part.batch(slice(None), part.operator.device)
        answer = network(part.operator, features)
        measured = part.operator.measured > 0
        # A band is I - Idev to I + Idev: what counts is the error of I against that of the answer.
        miss = torch.expm1(ln_truth - answer.ln_I).abs()
        stated.append(answer.ln_error[:, measured].flatten())
        missed.append(miss[:, measured].flatten())
        z = ((ln_truth - answer.ln_I) * torch.exp(-answer.ln_error)).clamp(-3, 3)
        z = z / z[:, measured].square().mean().sqrt()
        products.append(_products(z, answer.ln_resolved, part.operator))
    ln_error, miss = torch.cat(stated), torch.cat(missed)
    # Many errors may be the least that can be stated: two knots in one place would divide by zero.
    edges = torch.quantile(
        ln_error[:: max(1, len(ln_error) // 100_000)], torch.linspace(0, 1, knots + 1, device=ln_error.device)
    ).unique()
    centres, factors, ratios = [], [], []
    for low, high in itertools.pairwise(edges):
        inside = (ln_error >= low) & (ln_error <= high)
        ratio = miss[inside] * torch.exp(-ln_error[inside])
        factor = _quantile(ratio, WITHIN)
        centres.append(float(ln_error[inside].median()))
        factors.append(float(torch.log(factor)))
        ratios.append(ratio / factor)
    return {
        "ln_error": [round(value, 4) for value in centres],
        "ln_factor": [round(value, 4) for value in factors],
        "coverage_factor": round(float(_quantile(torch.cat(ratios), 0.95)), 2),
        "correlation": {"lengths": list(CORRELATION_LENGTHS), "shares": _correlation(torch.cat(products))},
    }


def _quantile(values: Tensor, share: float) -> Tensor:
    """Quantile of any number of values."""
    return values.kthvalue(max(1, round(share * len(values)))).values


def _products(z: Tensor, ln_resolved: Tensor, operator: Operator) -> Tensor:
    """Distances in resolutions, and products of scaled errors, of pairs of nodes at several lags, shape (pair, 2)."""
    nodes = operator.tensor(operator.smearing.q_calc)
    place = counted(nodes, torch.exp(ln_resolved) * operator.unit)
    rows = []
    for lag in LAGS:
        both = (operator.measured[lag:] * operator.measured[:-lag]) > 0
        distance, product = place[:, lag:] - place[:, :-lag], z[:, lag:] * z[:, :-lag]
        rows.append(torch.stack([distance[:, both].flatten(), product[:, both].flatten()], dim=1))
    return torch.cat(rows)


def _correlation(products: Tensor) -> list[float]:
    """Shares of the variance that are correlated over each of `CORRELATION_LENGTHS`, by non-negative least squares."""
    edges = np.geomspace(0.1, 40, 25)
    distance, product = products.cpu().numpy().T
    place = np.digitize(distance, edges)
    inside = [place == k for k in range(1, len(edges)) if (place == k).sum() > 100]
    centres = np.array([distance[k].mean() for k in inside])
    means = np.array([product[k].mean() for k in inside])
    kernels = np.exp(-0.5 * (centres[:, None] / np.array(CORRELATION_LENGTHS)) ** 2)
    shares, _ = nnls(kernels, means)
    return [round(float(share), 3) for share in shares / max(1.0, shares.sum())]


@torch.no_grad()
def range_of(network: Unrolled, training: Sequence[Session], validation: Sequence[Session]) -> tuple[dict[str, Tensor], float]:
    """Describe what the network saw in training: mean and whitening of its bottom, and the largest usual distance.

    Returns
    -------
    dict of Tensor, float
        ``mean`` (channel,) and ``whitening`` (channel, direction) of training; the distance
        that one validation curve in a thousand exceeds.
    """
    deep = torch.cat([_bottom(network, part) for part in training])
    mean = deep.mean(dim=0)
    _, scales, directions = torch.linalg.svd(deep - mean, full_matrices=False)
    whitening = directions[:DIRECTIONS].T / (scales[:DIRECTIONS] / len(deep) ** 0.5)
    distances = torch.cat([((_bottom(network, part) - mean) @ whitening).square().mean(dim=1).sqrt() for part in validation])
    return {"mean": mean, "whitening": whitening.contiguous()}, float(torch.quantile(distances, 0.999))


def _bottom(network: Unrolled, part: Session) -> Tensor:
    features, _ = part.batch(slice(None), part.operator.device)
    return network(part.operator, features).deep

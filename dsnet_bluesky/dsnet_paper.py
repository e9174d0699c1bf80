"""The method ``dsnet-paper``: the published DSNet, pre-trained and fine-tuned on each curve.

Zhou et al., "Deep-learning-powered desmearing for small-angle scattering",
J. Appl. Cryst. (2025). For each measured curve a copy of the pre-trained network
is trained for some hundred steps until its answer, smeared again, meets the
measurement. The paper smears with a zero-padded stationary convolution; here the
true operator R takes its place, and the published one is the option
``psf="stationary"``.

The grid
    The network lives on 501 equal steps. ln I of any other grid is interpolated
    linearly onto as many points of its own range, as users of the published code
    must do, and back. Beyond the measured range, where R reaches, ln I goes on
    from its end points: as a line in q^2 at low q (Guinier), as a line in ln q
    at high q (a power law), each with the slope of the tenth of the points next to it.

The units
    The published network is given ln I as it is, in 1/cm, and is not indifferent to
    a factor. A curve that leaves the trained range of ln I by more than a quarter of
    it (counts, other units) is moved to its middle and back, and flagged OUT_OF_RANGE.

Uncertainty
    The paper gives none, and a network that has been fitted to one curve until
    its re-smeared answer agrees knows nothing of its own error. `Idev` is NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from .data import BadInput, Flag
from .desmearing import Solution
from .network import DSNet, NetworkConfig, check_device
from .smearing import GAUSSIAN_REACH, Smearing
from .versions import Model, load_model

__all__ = ["DSNetPaper"]

Floats = NDArray[np.floating[Any]]
Smear = Callable[[Tensor], Tensor]

NEAR = 0.25
"""How far ln I may leave the trained range, as a share of it, before the curve is moved."""

END_SHARE = 0.1
"""Share of the points at each end whose slope is carried on beyond it."""


class DSNetPaper:
    """The published DSNet as a method of desmearing.

    Parameters
    ----------
    smearing
        The operator R.
    fine_tune
        Whether to fine-tune a copy of the network on each curve.
    iterations
        Steps of fine-tuning for each curve.
    learning_rate
        Of Adam, in fine-tuning.
    psf
        What smears the answer in fine-tuning: ``"operator"``, R itself, or
        ``"stationary"``, the published zero-padded convolution, with the middle
        row of R as its kernel.
    device
        Any device of torch: ``"cpu"``, ``"cuda"``.
    model
        Released model, ``"NAME"`` or ``"NAME:VERSION"``, or the path of its folder.

    Raises
    ------
    BadInput
        If the model cannot be loaded or an option is not one of the above.
    """

    def __init__(
        self,
        smearing: Smearing,
        *,
        fine_tune: bool = True,
        iterations: int = 500,
        learning_rate: float = 1e-5,
        psf: Literal["operator", "stationary"] = "operator",
        device: str = "cpu",
        model: str = "dsnet-paper:1.0.0",
    ) -> None:
        if psf not in ("operator", "stationary"):
            raise BadInput(f'psf is {psf!r}; it must be "operator" (R itself) or "stationary" (as published).')
        if iterations < 1 or learning_rate <= 0:
            raise BadInput(f"iterations is {iterations} and learning_rate {learning_rate}; both must be positive.")
        self.smearing = smearing
        check_device(device)
        self.model = load_model(model)
        if "form_factor" not in self.model.card["data"]:
            raise BadInput(
                f"{self.model.name} {self.model.version} is no model of the method dsnet-paper; leave out the option model."
            )
        self.device = device
        self.iterations = iterations if fine_tune else 0
        self.learning_rate = learning_rate
        self.network = load_network(self.model).to(device)
        self.grid = np.linspace(smearing.q[0], smearing.q[-1], self.model.card["ranges"]["points"])
        self._to_grid = interpolation(smearing.q, self.grid)
        self._to_calc = interpolation(self.grid, smearing.q_calc)
        self._as_published = psf == "stationary"
        self._smear = self._convolution() if self._as_published else self._operator()

    def __call__(self, I: NDArray[np.floating[Any]], Idev: NDArray[np.floating[Any]]) -> Solution:
        """Desmear curves.

        Parameters
        ----------
        I
            Measured curves, shape (exposure, n); positive.
        Idev
            Not used: the published loss weighs all points alike.

        Returns
        -------
        Solution
            ``I_calc`` on q_calc, shape (exposure, m); ``Idev`` NaN, shape (exposure, n);
            `diagnostics` with the first and last loss of each fine-tuning.

        Raises
        ------
        BadInput
            If an intensity is zero or negative, or fine-tuning diverges.
        """
        I = np.asarray(I, dtype=float)
        refuse_not_positive(I, self.smearing.q)
        log_measured = np.log(I)
        offsets = np.array([self._offset(curve) for curve in log_measured])
        answers, losses = zip(*(self._desmear(curve) for curve in log_measured + offsets[:, None]), strict=True)
        I_calc = np.exp((np.array(answers) - offsets[:, None]) @ self._to_calc.T)
        if not np.isfinite(I_calc).all():
            raise BadInput("Fine-tuning diverged; lower learning_rate, or use the methods map or ift.")
        flags = np.array([self._flags(bool(offset)) for offset in offsets], dtype=np.int64)
        first, last = np.array(losses).T
        return Solution(
            I_calc=I_calc,
            Idev=np.full(I.shape, np.nan),
            Qdev=None,
            flags=flags,
            diagnostics={"loss_first": first, "loss_last": last},
        )

    def _offset(self, log_measured: Floats) -> float:
        """What to add to ln I to bring it to where the network was trained; zero for curves near there."""
        low, high = self.model.card["ranges"]["ln_I"]
        least, most = float(log_measured.min()), float(log_measured.max())
        margin = NEAR * (high - low)
        if least >= low - margin and most <= high + margin:
            return 0.0
        return (low + high) / 2 - (least + most) / 2

    def _flags(self, moved: bool) -> Flag:
        """OUT_OF_RANGE for grids and intensities that were not trained, and for operators where nothing adapts to them."""
        ranges = self.model.card["ranges"]
        low, high = ranges["q"]
        tolerance = 0.01 * (high - low)
        elsewhere = abs(self.grid[0] - low) > tolerance or abs(self.grid[-1] - high) > tolerance
        width = float(np.median(self.smearing.widths))
        unadapted = self.iterations == 0 and abs(width / ranges["sigma"] - 1) > 0.1
        return Flag.OUT_OF_RANGE if moved or elsewhere or unadapted else Flag(0)

    def _desmear(self, log_measured: Floats) -> tuple[Floats, tuple[float, float]]:
        """Desmear one curve on q: ln I on the network's grid, and the first and last re-smear loss."""
        given = self._tensor(self._to_grid @ log_measured)
        target = given if self._as_published else self._tensor(log_measured)

        def loss(answer: Tensor) -> Tensor:
            return nn.functional.mse_loss(torch.log(self._smear(torch.exp(answer))), target)

        network = copy.deepcopy(self.network)
        first = fine_tune(network, given, loss, self.iterations, self.learning_rate)
        with torch.no_grad():
            answer = network(given)
            last = float(loss(answer))
        return answer.cpu().numpy().astype(float), (last if first is None else first, last)

    def _operator(self) -> Smear:
        """R on the network's grid: what is between and beyond its points is interpolated in ln I."""
        to_calc, matrix = self._tensor(self._to_calc), self._tensor(self.smearing.matrix)
        return lambda I: matrix @ torch.exp(to_calc @ torch.log(I))

    def _convolution(self) -> Smear:
        """Smear as the published code does: one kernel for all q, zeros beyond the record."""
        kernel = self._tensor(stationary_kernel(self.smearing, float(self.grid[1] - self.grid[0])))
        return lambda I: nn.functional.conv1d(I[None, None], kernel[None, None], padding="same")[0, 0]

    def _tensor(self, values: Floats) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


def load_network(model: Model) -> DSNet:
    """Build the network of a released model with its weights."""
    with torch.device("cpu"):  # whatever the default device: the caller moves it
        network = DSNet(NetworkConfig.from_dict(model.card["architecture"]))
    network.load_state_dict(load_file(model.weights))
    return network.eval()


def fine_tune(
    network: DSNet, given: Tensor, loss: Callable[[Tensor], Tensor], iterations: int, learning_rate: float
) -> float | None:
    """Train a network on one curve, in place.

    Parameters
    ----------
    network
        Changed in place.
    given
        ln I of the measured curve on the network's grid.
    loss
        Of the network's answer to `given`.
    iterations, learning_rate
        Steps of Adam, and their size.

    Returns
    -------
    float or None
        Loss before the first step; None without steps.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    first = None
    for _ in range(iterations):
        value = loss(network(given))
        first = value if first is None else first
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return None if first is None else first.item()


def interpolation(source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]) -> Floats:
    """Matrix that takes ln I on one grid to another: linear inside, smooth beyond.

    Parameters
    ----------
    source
        q where ln I is known, shape (k,), ascending, in 1/nm.
    target
        q where it is wanted, shape (m,), ascending, in 1/nm.

    Returns
    -------
    ndarray
        Shape (m, k). Below the source ln I is a line in q^2, above it a line in
        ln q, from the end point and with the slope fitted to the nearest tenth.
    """
    matrix = np.zeros((target.size, source.size))
    right = np.clip(np.searchsorted(source, target), 1, source.size - 1)
    fraction = np.clip((target - source[right - 1]) / (source[right] - source[right - 1]), 0, 1)
    rows = np.arange(target.size)
    matrix[rows, right - 1] = 1 - fraction
    matrix[rows, right] += fraction
    near = max(3, round(END_SHARE * source.size))
    below, above = target < source[0], target > source[-1]
    matrix[below, :near] += np.outer(target[below] ** 2 - source[0] ** 2, slope(source[:near] ** 2))
    matrix[above, -near:] += np.outer(np.log(target[above] / source[-1]), slope(np.log(source[-near:])))
    return matrix


def slope(x: Floats) -> Floats:
    """Weights w such that ``w @ y`` is the slope of the least-squares line through (x, y)."""
    centred = x - x.mean()
    return centred / (centred @ centred)


def stationary_kernel(smearing: Smearing, step: float) -> Floats:
    """One kernel for all q, on equal steps: the middle row of R about its own q.

    Parameters
    ----------
    smearing
        The operator.
    step
        Spacing of the network's grid in 1/nm.

    Returns
    -------
    ndarray
        Odd number of points, sum 1.
    """
    middle = smearing.q.size // 2
    density = smearing.matrix[middle] / np.gradient(smearing.q_calc)
    reach = int(np.ceil(GAUSSIAN_REACH * smearing.widths[middle] / step))
    offsets = step * np.arange(-reach, reach + 1)
    kernel = np.interp(smearing.q[middle] + offsets, smearing.q_calc, density, left=0, right=0)
    return kernel / kernel.sum()


def refuse_not_positive(I: NDArray[np.floating[Any]], q: NDArray[np.floating[Any]]) -> None:
    """Raise `BadInput` if an intensity has no logarithm."""
    bad = I <= 0
    if bad.any():
        where = q[np.argmax(bad.any(axis=0))]
        raise BadInput(
            f"{int(bad.sum())} intensities are zero or negative (first at q = {where:.4g} 1/nm), and dsnet-paper works on ln I. "
            'Use method "map" or "ift", or leave these points out.'
        )

"""Lake's iteration, with the smoothing and the stop of Vad and Sager."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.smearing import Smearing

from . import Solution
from .tails import Tails

__all__ = ["Lake"]

STAGNATION = 0.01
"""The iteration stops where a step lowers chi2 by a smaller part than this."""

PROBES = 32
"""Random directions by which the errors are propagated (Idev is then good to 12 %)."""


class Lake:
    """Iterative desmearing by a ratio: ``I_{k+1} = I_k M / (R I_k)``, ``I_0 = M``.

    J. A. Lake, Acta Cryst. 23 (1967) 191, doi:10.1107/S0365110X67002440. After each
    step the correction ``I_{k+1} / M`` is smoothed by a moving average, and the
    iteration stops by chi2 (T. Vad, W. F. C. Sager, J. Appl. Cryst. 44 (2011) 32,
    doi:10.1107/S0021889810049721): where the mean squared residual reaches 1, or
    stops falling. The stop is the regularisation: more steps sharpen and amplify noise.

    Idev is propagated to first order: a set of small random disturbances of the
    measured curve, scaled by its Idev, is iterated along with it and compared.
    The iteration is not linear, and Qdev is not known.

    Parameters
    ----------
    smearing
        The operator.
    iterations
        Fixed number of steps, as Lake has it; by default the stop rule decides.
    maximum_iterations
        Limit for the stop rule; a curve that reaches it is flagged NOT_CONVERGED.
    smoothing
        Width of the moving average in points, odd; 1 does not smooth. By default 3
        with the stop rule, and 1 with a fixed number of iterations.
    extrapolation
        Tail above the measured range: constant, linear, power or porod (see `Tails`).
    extrapolation_start
        Fit the tail to the points above this q, in 1/nm; by default the last tenth.

    Raises
    ------
    BadInput
        If an option is out of range.
    """

    def __init__(
        self,
        smearing: Smearing,
        iterations: int | None = None,
        maximum_iterations: int = 100,
        smoothing: int | None = None,
        extrapolation: str = "power",
        extrapolation_start: float | None = None,
    ) -> None:
        if smoothing is None:
            smoothing = 3 if iterations is None else 1
        if smoothing < 1 or smoothing % 2 == 0:
            raise BadInput(f"smoothing is {smoothing}; it is a number of points, odd, and 1 does not smooth.")
        if iterations is not None and iterations < 1:
            raise BadInput(f"iterations is {iterations}; at least 1 is needed.")
        self.smearing = smearing
        self.fixed = iterations is not None
        self.limit = maximum_iterations if iterations is None else iterations
        self.smoothing = smoothing
        self.tails = Tails(smearing, extrapolation, extrapolation_start)

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear positive curves.

        Raises
        ------
        BadInput
            If an intensity is zero or negative.
        """
        self._check(I)
        relative = Idev / I
        epsilon = 1e-3 / np.maximum(relative.max(axis=-1), 1e-3)[:, None, None]
        noise = np.random.default_rng(0).standard_normal((PROBES, I.shape[-1]))
        disturbed = I[:, None] * (1 + epsilon * relative[:, None] * np.clip(noise, -4, 4))
        measured = np.concatenate([I[:, None], disturbed], axis=1)
        answer, steps, converged = self._iterate(measured, relative[:, None])
        spread = (answer[:, 1:] - answer[:, :1]) / epsilon
        return Solution(
            I_calc=self.tails.fill(answer[:, 0], relative),
            Idev=np.sqrt(np.mean(spread**2, axis=1)),
            Qdev=None,
            flags=np.where(converged, 0, int(Flag.NOT_CONVERGED)),
            diagnostics={"iterations": steps},
        )

    def _check(self, I: NDArray) -> None:
        bad = I <= 0
        if bad.any():
            raise BadInput(
                f"Lake's method needs positive intensities and {int(bad.sum())} are not (first at q = "
                f"{self.smearing.q[np.argmax(bad.any(axis=0))]:.4g} 1/nm). Use method='map', which takes them as they are, "
                "or leave these points out."
            )

    def _iterate(self, measured: NDArray, relative: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Iterate curves (exposure, probe, n); the first probe of an exposure decides where it stops."""
        count = measured.shape[0]
        answer = measured.copy()
        steps, converged = np.zeros(count, dtype=int), np.full(count, self.fixed)
        chi2, active = np.full(count, np.inf), np.arange(count)
        for _ in range(self.limit + (not self.fixed)):
            now, target, errors = answer[active], measured[active], relative[active]
            smeared = self.smearing.apply(self.tails.fill(now, np.broadcast_to(errors, now.shape)))
            if not self.fixed:
                value = np.mean(((smeared[:, 0] / target[:, 0] - 1) / errors[:, 0]) ** 2, axis=-1)
                done = (value <= 1) | (value > (1 - STAGNATION) * chi2[active])
                converged[active[done]] = True
                chi2[active] = value
                keep = ~done & (steps[active] < self.limit)
                active, now, target, smeared = active[keep], now[keep], target[keep], smeared[keep]
            if not active.size:
                break
            answer[active] = self._step(now, target, smeared)
            steps[active] += 1
        return answer, steps, converged

    def _step(self, now: NDArray, target: NDArray, smeared: NDArray) -> NDArray:
        ratio = now / np.maximum(smeared, np.finfo(float).tiny)
        if self.smoothing > 1:
            ratio = uniform_filter1d(ratio, self.smoothing, axis=-1, mode="nearest")
        return target * ratio

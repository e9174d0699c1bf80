"""Desmearing: one call for every method, `desmear(curves, smearing, method=...)`.

A method is a class that takes a `Smearing` and named options, pays once for what
depends on the operator alone, and is then called with batches of curves (`Method`).
`prepare` finds it by name, checks the input and puts the result together; methods
know nothing of Datasets. They are resolved by name, so that importing this package
does not import torch.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from dsnet_bluesky.data import (
    BadInput,
    Flag,
    check_curve,
    check_intensities,
    describe,
    exposures_of,
    join_answers,
)
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.threads import one_blas_thread
from dsnet_bluesky.versions import resolve

from .kernels import widths_below

__all__ = ["LEARNED", "METHODS", "Method", "Prepared", "Solution", "check_options", "desmear", "prepare", "settled", "solver_of"]

METHODS: dict[str, str] = {
    "lake": "dsnet_bluesky.desmearing.lake:Lake",
    "wiener": "dsnet_bluesky.desmearing.wiener:Wiener",
    "map": "dsnet_bluesky.desmearing.map:MAP",
    "ift": "dsnet_bluesky.desmearing.ift:IFT",
    "cme": "dsnet_bluesky.desmearing.cme:CME",
    "dsnet": "dsnet_bluesky.dsnet:DSNet",
    "dsnet-fast": "dsnet_bluesky.dsnet:DSNet",
    "dsnet-paper": "dsnet_bluesky.dsnet_paper:DSNetPaper",
}
"""Where each method lives, as `module:class`."""

LEARNED = ("dsnet", "dsnet-fast", "dsnet-paper")
"""Methods that models of the registry answer for: those of the same name, unless the option ``model`` names another."""

MINIMUM_RANGE = 2.0
"""The shortest curve that can be desmeared, in widths of the operator."""


@dataclass
class Solution:
    """What a method found for a batch of curves.

    Attributes
    ----------
    I_calc
        Desmeared curves on `smearing.q_calc`, shape (exposure, m).
    Idev
        One standard deviation of the desmeared curves on `smearing.q`, shape (exposure, n).
    Qdev
        Width that is left in the answer, in 1/nm, shape (exposure, n): one standard
        deviation of the averaging kernel. None where the method cannot tell.
    flags
        Sums of `data.Flag`, shape (exposure,).
    diagnostics
        How it went with each exposure (iterations, weight ...), each of shape (exposure,): variables of the
        result. A method gives the same ones for every batch, and `data.LONG_NAMES` says what they mean.
    attrs
        What holds for all exposures: JSON-serialisable.
    I
        Desmeared curves on `smearing.q`, shape (exposure, n), from a method that knows
        them better than `smearing.at_q(I_calc)`, which is taken by default.
    Idev_noise
        Part of Idev that the noise of the measurement makes, shape (exposure, n); the rest is what
        the method does not know. None where it cannot tell them apart.
    """

    I_calc: NDArray
    Idev: NDArray
    Qdev: NDArray | None
    flags: NDArray
    diagnostics: dict[str, NDArray] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    I: NDArray | None = None
    Idev_noise: NDArray | None = None


class Method(Protocol):
    """A desmearing method: built for one operator, called with batches of curves."""

    def __init__(self, smearing: Smearing, **options: Any) -> None: ...

    def __call__(self, I: NDArray, Idev: NDArray) -> Solution:
        """Desmear `I`, shape (exposure, n), finite, with `Idev` positive."""
        ...


def desmear(curves: xr.Dataset, smearing: Smearing, method: str = "dsnet", **options: Any) -> xr.Dataset:
    """Desmear curves that share one q grid and one smearing operator.

    Parameters
    ----------
    curves
        From `data.curve`: I and Idev with dims ("q",) or ("exposure", "q").
    smearing
        The operator that smeared them, on the same q.
    method
        A key of `METHODS`; of one with released models a version may be asked for, as in ``"dsnet:2.0.0"``, or an
        alias, ``"dsnet:latest"``; ``"dsnet"`` is the version in production.
    **options
        Keyword arguments of the method's class.

    Returns
    -------
    xarray.Dataset
        With the dims of `curves`: I, Idev, Qdev, I_smeared, Idev_smeared, I_resmeared;
        per exposure chi2, flags (sum of `data.Flag`), status and what the method says of how it went.
        An exposure that cannot be desmeared, among others that can, has the status "failed" and holds NaN;
        the attribute ``failures`` says why, as JSON: a list of ``{"exposure": ..., "reason": ...}``.

    Raises
    ------
    BadInput
        If the curves, the operator and the method do not go together, or no exposure can be desmeared.

    Examples
    --------
    >>> from dsnet_bluesky.data import curve
    >>> q = np.linspace(0.01, 2, 200)
    >>> result = desmear(curve(q, np.exp(-(q**2))), Smearing.gaussian(q, 0.04))
    >>> result.sizes["q"], result["status"].item()
    (200, 'ok')
    """
    return prepare(smearing, method, **options)(curves)


def prepare(smearing: Smearing, method: str = "dsnet", **options: Any) -> Prepared:
    """Pay for an operator once, to desmear many curves.

    Parameters
    ----------
    smearing
        The operator of the measurement.
    method
        A key of `METHODS`, with or without a version or an alias, see `desmear`.
    **options
        Keyword arguments of the method's class.

    Raises
    ------
    BadInput
        If the method or an option is unknown, an option has a value of the wrong type,
        or the operator is wider than half its q range.
    """
    method, options = settled(method, options)
    name = method.partition(":")[0]
    solver = solver_of(name, options)
    _check_range(smearing)
    model = {"model": method} if name in LEARNED and "model" not in options else {}
    return Prepared(smearing, name, options, solver(smearing, **options, **model))


def solver_of(name: str, options: Mapping[str, Any]) -> type[Method]:
    """Find the class behind a method.

    Parameters
    ----------
    name
        The method, without a version.
    options
        What it is to be made with.

    Raises
    ------
    BadInput
        If the method or an option is unknown, or an option has a value of the wrong type.
    """
    if name not in METHODS:
        raise BadInput(f"There is no method {name!r}; the methods are {', '.join(sorted(METHODS))}.")
    solver = pkgutil.resolve_name(METHODS[name])
    check_options(name, solver, options, given=("smearing",))
    return solver


def settled(method: str, options: Mapping[str, Any], learned: Sequence[str] = LEARNED) -> tuple[str, dict[str, Any]]:
    """Say which version of which model answers, before work begins: names and aliases become versions.

    Parameters
    ----------
    method, options
        As of `desmear`; an unknown method is left as it is.
    learned
        Methods that models of the registry answer for.

    Returns
    -------
    method, options
        ``"dsnet:2.0.0"`` for ``"dsnet"``, and without the option ``model`` where that names a model of the method.

    Raises
    ------
    BadInput
        If there is no such model, or a version makes no sense there.
    """
    name, colon, _ = method.partition(":")
    options = dict(options)
    if name not in learned:
        if name in METHODS and colon:
            raise BadInput(f"{name} has no released models, so there is no {method!r}; leave out the version.")
        return method, options
    model = options.get("model", method)
    if not isinstance(model, str):
        return method, options  # which is refused where the other options are
    if colon and "model" in options:
        raise BadInput(f"{method!r} names a version and model={model!r} another; give one of them.")
    resolved = resolve(model)
    if resolved.partition(":")[0] == name:
        options.pop("model", None)
        return resolved, options
    return name, {**options, "model": resolved}


class Prepared:
    """A method made ready for one operator; call it with curves.

    Attributes
    ----------
    smearing
        The operator.
    method, options
        What it was prepared with.
    model
        The released model behind the method (`versions.Model`), or None.
    """

    def __init__(self, smearing: Smearing, method: str, options: dict[str, Any], solver: Method) -> None:
        self.smearing = smearing
        self.method = method
        self.options = dict(options)
        self.model = getattr(solver, "model", None)
        self._solver = solver
        self._extrapolated = _reach(smearing) > 0.1

    def __repr__(self) -> str:
        return f"<Prepared {self.method} for {self.smearing!r}>"

    def __call__(self, curves: xr.Dataset) -> xr.Dataset:
        """Desmear curves, see `desmear`."""
        check_curve(curves)
        self._check_grid(curves["q"].values)
        with one_blas_thread:
            result = join_answers(self._answers(exposures_of(curves)))
        return result if "exposure" in curves.dims else result.isel(exposure=0, drop=True)

    def _answers(self, batch: xr.Dataset) -> list[xr.Dataset | BadInput]:
        """Answer exposures together; where that cannot be, in halves, down to the one that is to blame."""
        count = batch.sizes["exposure"]
        try:
            return [self._answer(batch)]
        except (ValueError, ArithmeticError) as error:  # BadInput and LinAlgError are ValueErrors
            if count == 1:
                return [error if isinstance(error, BadInput) else self._no_answer(str(error))]
        halves = (slice(count // 2), slice(count // 2, None))
        return [answer for half in halves for answer in self._answers(batch.isel(exposure=half))]

    def _answer(self, batch: xr.Dataset) -> xr.Dataset:
        check_intensities(batch)
        I, Idev = (batch.variables[name].transpose("exposure", "q").values for name in ("I", "Idev"))
        return self._assemble(batch, I, Idev, self._solver(I, Idev))

    def _check_grid(self, q: NDArray) -> None:
        if q.shape != self.smearing.q.shape or not np.allclose(q, self.smearing.q, rtol=1e-6, atol=1e-9):
            raise BadInput(
                f"The curve has {q.size} points from {q[0]:.6g} to {q[-1]:.6g} 1/nm and the operator was built for "
                f"{self.smearing.q.size} from {self.smearing.q[0]:.6g} to {self.smearing.q[-1]:.6g}; build it on the curve's q."
            )

    def _assemble(self, batch: xr.Dataset, I: NDArray, Idev: NDArray, solution: Solution) -> xr.Dataset:
        with np.errstate(over="ignore", invalid="ignore"):
            resmeared = self.smearing.apply(solution.I_calc)
            answer = self.smearing.at_q(solution.I_calc) if solution.I is None else solution.I
            chi2 = np.mean(((resmeared - I) / Idev) ** 2, axis=-1)
        no_errors = np.isnan(solution.Idev).all(axis=-1)  # of a method that states none
        known = np.isfinite(solution.Idev).all(axis=-1) | no_errors
        if not all(np.isfinite(values).all() for values in (answer, resmeared, chi2)) or not known.all():
            raise self._no_answer()  # it must never be stored as one
        unknown = np.full(I.shape, np.nan)
        columns = {
            "I": answer,
            "Idev": solution.Idev,
            "Idev_noise": unknown if solution.Idev_noise is None else solution.Idev_noise,
            "Qdev": unknown if solution.Qdev is None else solution.Qdev,
            "I_smeared": I,
            "Idev_smeared": Idev,
            "I_resmeared": resmeared,
        }
        units = batch["I"].attrs.get("units", "1/cm")
        variables: dict[str, Any] = {
            name: (("exposure", "q"), values, {"units": "1/nm" if name == "Qdev" else units}) for name, values in columns.items()
        }
        variables["chi2"] = ("exposure", chi2)
        variables["flags"] = ("exposure", self._flags(batch, chi2, solution))
        variables["status"] = ("exposure", np.full(chi2.shape, "ok"))
        variables |= {name: ("exposure", values) for name, values in solution.diagnostics.items()}
        result = xr.Dataset(variables, coords=batch.coords, attrs=batch.attrs | self._attrs(solution))
        result.variables["I"].attrs["uncertainties"] = "Idev"
        result.variables["q"].attrs["resolutions"] = "Qdev"
        return describe(result)

    def _no_answer(self, why: str = "") -> BadInput:
        found = f"{self.method} found no finite answer for this curve{why and f' ({why})'}"
        return BadInput(f"{found}: leave out points without signal, give Idev, or try another method.")

    def _flags(self, batch: xr.Dataset, chi2: NDArray, solution: Solution) -> NDArray:
        flags = np.asarray(solution.flags, dtype=np.int64) | np.where(chi2 > 2, int(Flag.POOR_FIT), 0)
        if batch.attrs.get("Idev_estimated"):
            flags = flags | int(Flag.NOISE_ESTIMATED)
        if self._extrapolated:
            flags = flags | int(Flag.EXTRAPOLATED)
        return flags

    def _attrs(self, solution: Solution) -> dict[str, Any]:
        return {
            "method": self.method,
            "options": json.dumps(self.options, sort_keys=True, default=str),
            "diagnostics": json.dumps(solution.attrs, sort_keys=True),
            "smearing": self.smearing.kind,
            **(
                {}
                if self.model is None
                else {"model": f"{self.model.name}:{self.model.version}", "model_sha256": self.model.sha256}
            ),
        }


KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a word"),
    type(None): (type(None), "null"),
}
"""For each type that an option may have: what serves as it, and its name in messages."""


def check_options(method: str, solver: type, options: Mapping[str, Any], *, given: Sequence[str]) -> None:
    """Refuse options that a method does not have, or values that they do not take.

    Parameters
    ----------
    method
        For the message.
    solver
        The class whose parameters are the options.
    options
        What a user gave.
    given
        Parameters that are no options.

    Raises
    ------
    BadInput
        If there is one.
    """
    valid = [name for name in inspect.signature(solver).parameters if name not in given]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise BadInput(f"{method} has no option {', '.join(unknown)}; its options are {', '.join(valid) or 'none'}.")
    hints = get_type_hints(solver.__init__)
    for name, value in options.items():
        kinds = _kinds(hints[name])
        if not any(_serves(value, kind) for kind in kinds):
            raise BadInput(f"{method}: {name} is {value!r}; it takes {' or '.join(KINDS[kind][1] for kind in kinds)}.")


def _kinds(hint: Any) -> list[type]:
    """Plain types that an annotation allows; the words of a Literal are left to the method."""
    if get_origin(hint) is Literal:
        return sorted({type(word) for word in get_args(hint)}, key=str)
    return list(get_args(hint)) or [hint]


def _serves(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, KINDS[kind][0]):
        return kind is bool and isinstance(value, bool)
    return kind is not float or bool(np.isfinite(value))


def _check_range(smearing: Smearing) -> None:
    """Refuse a curve that is shorter than the PSF.

    A slit's length smears towards higher q only, and what lies there is
    extrapolated (that is how all Bonse-Hart data are desmeared). What counts is
    how far the operator reaches down: for a symmetric kernel its standard deviation.
    """
    # R is folded at q = 0 and ends with q_calc: a kernel wider than all that looks narrower in it than it is.
    nominal = [0.0 if smearing.dq is None else smearing.dq.max(), smearing.parameters.get("width", 0.0) / np.sqrt(3)]
    width = float(max(widths_below(smearing).max(), *nominal))
    span = float(smearing.q[-1] - smearing.q[0])
    if span < MINIMUM_RANGE * width:
        raise BadInput(
            f"The curve is shorter than the PSF: q spans {span:.4g} 1/nm and the smearing has a width of {width:.4g} 1/nm; "
            f"at least {MINIMUM_RANGE:g} widths are needed. Measure a wider range or use a narrower beam."
        )


def _reach(smearing: Smearing) -> float:
    """How far the smearing reaches beyond the measured range, as a part of that range."""
    seen = smearing.q_calc[smearing.matrix.max(axis=0) > 1e-4]
    outside = max(float(seen[-1] - smearing.q[-1]), float(smearing.q[0] - seen[0]), 0.0)
    return outside / float(smearing.q[-1] - smearing.q[0])

"""What a file tells of one result, whatever its format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from dsnet_bluesky.data import BadInput, Flag, exposures_of
from dsnet_bluesky.documents import Instrument, failures_of, sample_name
from dsnet_bluesky.kinds import kind_of
from dsnet_bluesky.smearing import Smearing

__all__ = ["Contents", "Step", "of_curves", "of_result", "one_line", "reduction_of", "text_of"]

INTERNAL = (
    *(
        "attrs",
        "writer",
        "failures",
        "rows",
        "rows_of",
        "first_row",
        "grid",
        "updated",
        "attempts",
        "exposures",
        "chi2_median",
        "chi2_largest",
    ),
    *("analysis_stage", "operation", "sample_name", "model_order", "original_start_uid", "parent_uids", "parent_node_map"),
)
"""Metadata of a result that say nothing of where its curves come from, or what others say too."""


NAMED_FAILURES = 20
"""Failed exposures of which a file gives the reasons."""


@dataclass(frozen=True)
class Step:
    """One step of the work: what an SASprocess tells.

    Attributes
    ----------
    name
        ``"reduce"``, ``"desmear"``, or ``"export"`` of curves that nobody desmeared.
    description
        In a sentence.
    terms
        Names and values as text.
    """

    name: str
    description: str
    terms: Mapping[str, str]


@dataclass(frozen=True)
class Contents:
    """What a file tells of one result.

    Attributes
    ----------
    curves
        Dims (exposure, q); words are words (`rows.decode_words`).
    title, sample, run
        Of the whole; `run` is the uid of the raw run, or what else names the measurement.
    steps
        Done before the desmearing; without the terms that differ between exposures.
    terms
        Of the desmearing, the same for all exposures.
    failed
        Exposures that hold no curve, by their numbers from 1, and why.
    instrument
        As the raw run recorded it.
    psf
        Of the direct beam (`reduction.psf`).
    smearing
        Operator, where it is at hand.
    """

    curves: xr.Dataset
    title: str
    sample: str = ""
    run: str = ""
    steps: tuple[Step, ...] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    instrument: Instrument | None = None
    psf: xr.Dataset | None = None
    smearing: Smearing | None = None

    def exposures(self, number: int | None = None) -> Iterator[tuple[int, xr.Dataset]]:
        """Give the exposures that hold a curve, each with its number, from 1.

        Parameters
        ----------
        number
            The one that is wanted; all if not given.

        Raises
        ------
        BadInput
            If there is none, or none of that number.
        """
        count = self.curves.sizes["exposure"]
        if number is not None and not 1 <= number <= count:
            raise BadInput(f"The result of {self.title} holds the exposures 1 to {count}; there is no exposure {number}.")
        wanted = range(1, count + 1) if number is None else [number]
        good = [n for n in wanted if n not in self.failed]
        if not good:
            why = next((reason for n in wanted if (reason := self.failed.get(n))), "")
            which = "No exposure of this result is" if number is None else f"Exposure {number} of this result is not"
            raise BadInput(f"{which} complete: there is nothing to export{f' ({why})' if why else ''}.")
        return ((n, self.curves.isel(exposure=n - 1)) for n in good)

    def title_of(self, number: int) -> str:
        """Title of an exposure."""
        return self.title if self.curves.sizes["exposure"] == 1 else f"{self.title}, exposure {number}"

    def steps_of(self, exposure: xr.Dataset) -> Iterator[Step]:
        """Say what was done, in order, and how it went with one exposure."""
        yield from self.steps
        desmeared = "I_smeared" in exposure
        yield Step(
            "desmear" if desmeared else "export",
            "Desmearing of small-angle scattering with dsnet-bluesky; every term reads name = value.",
            {**_quality(exposure), **self.terms, **self._failures()},
        )

    def _failures(self) -> dict[str, str]:
        """Name the exposures that failed; the first of them, as each of the others tells this."""
        if not self.failed:
            return {}
        named = [
            f"{number} ({reason or 'no reason was recorded'})" for number, reason in list(self.failed.items())[:NAMED_FAILURES]
        ]
        more = len(self.failed) - len(named)
        return {"failed_exposures": ", ".join(named) + (f" and {more} more" if more else "")}

    @property
    def wavelength(self) -> float | None:
        """In m; None where nothing says it."""
        return self._geometry("wavelength", "wavelength")

    @property
    def distance(self) -> float | None:
        """From sample to detector in m; None where nothing says it."""
        return self._geometry("dist", "distance")

    def _geometry(self, poni: str, psf: str) -> float | None:
        recorded = self.instrument.poni.get(poni) if self.instrument else None
        value = recorded or (self.psf.attrs.get(psf) if self.psf is not None else None)
        return float(value) if value else None


def of_curves(
    dataset: xr.Dataset,
    *,
    title: str = "",
    sample: str | Mapping[str, Any] | None = None,
    process: Mapping[str, Any] | None = None,
    smearing: Smearing | None = None,
) -> Contents:
    """Build the contents of a file of a Dataset that is in no catalog; see `to_nxcansas`.

    Raises
    ------
    BadInput
        If the operator is of another grid.
    """
    if smearing is not None and smearing.q.shape != dataset["q"].shape:
        raise BadInput(f"The operator has {smearing.q.size} points, the curve {dataset.sizes['q']}: they do not belong together.")
    curves = exposures_of(dataset)
    terms = _texts({**_of_attributes(dataset), **_of_operator(smearing), **(process or {})})
    named = dataset.attrs.get("sample") if sample is None else sample
    title = one_line(title or dataset.attrs.get("title", "")) or "desmeared curve"
    return Contents(
        curves,
        title=title,
        sample=one_line(sample_name({"sample": named})),
        run=terms.get("raw_uid", title),
        terms=terms,
        failed=_failed(curves, _reasons(curves)),
        smearing=smearing,
    )


def of_result(
    curves: xr.Dataset,
    said: Mapping[str, Any],
    *,
    key: str = "",
    instrument: Instrument | None = None,
    psf: xr.Dataset | None = None,
) -> Contents:
    """Build the contents of a file of a stored result.

    Parameters
    ----------
    curves
        As `queries.DesmearedClient.read` gives it.
    said
        Metadata of the result.
    key
        Of the result.
    instrument, psf
        See `Contents`.

    Raises
    ------
    BadInput
        If the result is not complete, or holds no exposure.
    """
    check_complete(said)
    if not curves.sizes.get("exposure"):
        raise BadInput("This result holds no exposure.")
    reasons = {number + 1: reason for number, reason in failures_of(said).items()}
    told = {name: value for name, value in said.items() if name not in INTERNAL and value is not None}
    return Contents(
        curves,
        title=one_line(sample_name(said) or said["raw_uid"]),
        sample=one_line(sample_name(said)),
        run=one_line(said["raw_uid"]),
        steps=(reduction_of(said, instrument),),
        terms=_texts({**({"result": key} if key else {}), **_of_attributes(curves), **told}),
        failed=_failed(curves, reasons),
        instrument=instrument,
        psf=psf,
    )


def check_complete(said: Mapping[str, Any]) -> None:
    """Check that a result may be exported: nothing that may still change leaves the catalog as a file.

    Raises
    ------
    BadInput
        If it failed, is being written, or holds no curve; says why.
    """
    if not kind_of(str(said.get("method"))).holds_curves:
        raise BadInput(
            f"This result is by {said['method']} and holds no curve; give it away with result.read().to_netcdf(...), or from the "
            "server with ?format=netcdf or csv."
        )
    status = said.get("status")
    if status == "failed":
        raise BadInput(f"This result failed, there is nothing to export: {one_line(said.get('reason') or 'it does not say why')}")
    if status != "complete":
        raise BadInput(f"This result is {status}: it can be exported once it is complete.")


def reduction_of(said: Mapping[str, Any], instrument: Instrument | None) -> Step:
    """Say how exposures became curves."""
    config = said.get("config") or {}
    binning = {name: config[name] for name in ("bins", "q_min", "q_max") if config.get(name) is not None}
    recorded = instrument.to_configuration() if instrument else {}
    terms = {**binning, **{name: value for name, value in recorded.items() if value not in (None, "")}}
    return Step("reduce", "Azimuthal integration of the frames with pyFAI; the curves called smeared.", _texts(terms))


def _of_attributes(dataset: xr.Dataset) -> dict[str, Any]:
    names = ("method", "model", "model_sha256", "options", "diagnostics")
    return {name: dataset.attrs[name] for name in names if name in dataset.attrs}


def _of_operator(smearing: Smearing | None) -> dict[str, Any]:
    if smearing is None:
        return {}
    parameters = {f"smearing_{name}": value for name, value in smearing.parameters.items()}
    return {"smearing": smearing.kind, **parameters, "smearing_sha256": smearing.digest}


def _reasons(curves: xr.Dataset) -> dict[int, str]:
    """Return why exposures failed, by their numbers from 1, as the Dataset itself says (`data.join_answers`).

    What it says counts only if it is of the exposures whose status says so: of some of the exposures of a
    Dataset, or some that were joined, xarray keeps the words and not the numbers.
    """
    said = failures_of({"failures": json.loads(curves.attrs.get("failures", "[]"))})
    reasons = {number + 1: reason for number, reason in said.items()}
    return reasons if "status" in curves and set(reasons) == set(_failed(curves, {})) else {}


def _failed(curves: xr.Dataset, reasons: Mapping[int, str]) -> dict[int, str]:
    if "status" not in curves:
        return dict(reasons)
    status = np.broadcast_to(curves["status"].values, curves.sizes["exposure"])
    bad = {number for number, word in enumerate(status, start=1) if str(word) != "ok"}
    return {number: one_line(reasons.get(number, "")) for number in sorted(bad | set(reasons))}


def _quality(exposure: xr.Dataset) -> dict[str, str]:
    """Say how it went with one exposure: chi2, flags, and what its method adds."""
    scalars = {str(name): values.item() for name, values in exposure.data_vars.items() if not values.dims and name != "status"}
    said = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in scalars.items()}
    raised = [str(flag.name) for flag in Flag if int(scalars.get("flags", 0)) & flag]
    return {**said, **({"flags_meaning": " ".join(raised)} if raised else {})}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: text_of(value) for name, value in values.items()}


def text_of(value: Any) -> str:
    """Write a value of any kind as text without characters that XML or HDF5 refuse; JSON where it is no text."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def one_line(value: Any) -> str:
    """Write a value as text in one line."""
    return " ".join(text_of(str(value)).split())

"""The paper's silver behenate experiment, live, on the simulated beamline.

Four slit configurations, each with its direct beam, then spheres as a scan of
several exposures; every exposure is desmeared while the plans run. The curves come
back from the catalog for the table and the figures, as any user would read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator
from numpy.typing import NDArray
from ophyd_async.core import Device
from rich.console import Console
from rich.table import Table

from dsnet_bluesky import plots
from dsnet_bluesky.kinds import DESMEARED
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.plans import Instrument, desmearing_scan, expose
from dsnet_bluesky.reduction import Reduction, centred
from dsnet_bluesky.sim import PAPER_SLITS, SampleChanger, SaxsCamera, Setting, SilverBehenate, SimBeamline, SlitSetting, Sphere
from dsnet_bluesky.smearing import Smearing

from .session import Session, result_of, say_how_to_go_on, serving

__all__ = ["Distances", "Outcome", "distances", "run"]

BEAMSTOP = 2.8e-3
"""Radius of the beamstop in m: just larger than the widest beam."""

ATTENUATION = 5000.0
"""Of the direct beam: 1.2e6 counts in every configuration, the brightest pixel far below the counter's ceiling."""

POSITIONS = (-0.8, -0.4, 0.0, 0.4, 0.8)
"""Of the scan across the capillary with spheres, in mm."""

QUERY = 'client["desmeared"].search(Key("sample") == "AgBh").search(Key("status") == "complete").values().first().read()'
"""A first question to the catalog."""


@dataclass(frozen=True)
class Distances:
    """Mean squared differences of curves that were each divided by their mean over the common q range."""

    measured_to_narrowest: float
    """Of the measured curve to that of the narrowest slits, as measured."""

    desmeared_to_narrowest: float
    """Of the desmeared curve to the same."""

    measured_to_truth: float
    """Of the measured curve to the exact one."""

    desmeared_to_truth: float
    """Of the desmeared curve to the exact one."""


@dataclass
class Outcome:
    """What a demonstration made."""

    directory: Path
    results: dict[str, xr.Dataset] = field(default_factory=dict)
    """Desmeared silver behenate, by slits."""

    table: dict[str, Distances] = field(default_factory=dict)
    """Distances, by slits."""

    spheres: tuple[float, float] = (np.nan, np.nan)
    """Mean squared difference of ln I from the exact one, over all exposures of the spheres: measured, desmeared."""

    figures: list[Path] = field(default_factory=list)
    failed: int = 0
    """Exposures that could not be desmeared."""


def run(
    directory: str | Path, *, keep: bool = False, quick: bool = False, port: int = 0, console: Console | None = None
) -> Outcome:
    """Run the demonstration.

    Parameters
    ----------
    directory
        For the catalog's data and the figures; created if need be.
    keep
        Leave the server up at the end, until it is interrupted.
    quick
        Only the widest and the narrowest slits, and two exposures of the spheres.
    port
        Of the server; 0 takes a free one.
    console
        Where progress and the table are shown.

    Returns
    -------
    Outcome
    """
    console = console or Console()
    directory = Path(directory).absolute()
    slits = PAPER_SLITS[:: len(PAPER_SLITS) - 1] if quick else PAPER_SLITS
    positions = POSITIONS[:2] if quick else POSITIONS
    console.print(f"[bold]A SAXS beamline, simulated.[/bold] Data and figures go to {directory}")
    with serving(directory, port, console) as server:
        client = server.client()
        experiment = _Experiment(server.data_directory / "detector")
        session = Session(client, server.data_directory, console, Config())
        plan, runs = experiment.plan(slits, positions), experiment.runs
        results = len(slits) + len(positions)
        session.run(experiment.devices, plan, exposures=len(slits) + results, results=(results, "curves desmeared and stored"))
        outcome = _evaluate(client, experiment.camera, slits, positions, runs, directory)
        outcome.failed = session.failed
        _show(console, outcome)
        say_how_to_go_on(console, server, QUERY, keep=keep)
    return outcome


@dataclass
class _Runs:
    """Uids of the runs taken."""

    beams: list[str] = field(default_factory=list)
    behenate: list[str] = field(default_factory=list)
    spheres: str = ""


class _Experiment:
    """The simulated beamline and what is done on it."""

    def __init__(self, folder: Path) -> None:
        self.camera, self.runs = SaxsCamera(seed=2026), _Runs()
        self._beamline = SimBeamline(folder, self.camera)
        self._masks = {"beam": folder / "mask-direct-beam.npy", "sample": folder / "mask-sample.npy"}
        np.save(self._masks["beam"], self.camera.mask())
        np.save(self._masks["sample"], self.camera.mask(BEAMSTOP))
        self._instrument = Instrument(self.camera.poni, mask=self._masks["sample"])

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device, to be connected before the plan."""
        return self._beamline.devices

    def plan(self, slits: Sequence[SlitSetting], positions: Sequence[float]) -> MsgGenerator[None]:
        """Take all exposures, and remember their runs."""
        line, runs = self._beamline, self.runs
        for setting in slits:
            yield from self._set_slits(setting)
            uids = yield from desmearing_scan(
                line.detector,
                changer=line.changer.sample,
                samples={"AgBh": "AgBh"},
                empty="",
                instrument=self._instrument,
                exposure_time=setting.time,
                direct_beam_mask=self._masks["beam"],
                before_direct_beam=self._direct_beam_position,
                before_samples=self._sample_position,
            )
            runs.beams.append(uids.direct_beam)
            runs.behenate.append(uids.samples["AgBh"])
        widest = slits[0]
        yield from self._set_slits(widest)
        yield from bps.mv(line.changer.sample, "sphere")
        runs.spheres = yield from expose(
            line.detector,
            sample="sphere",
            instrument=self._instrument,
            exposure_time=widest.time,
            motor=line.changer.x,
            positions=positions,
            direct_beam_uid=runs.beams[0],
        )

    def _set_slits(self, setting: SlitSetting) -> MsgGenerator[None]:
        slits = self._beamline.slits
        yield from bps.mv(slits.width, setting.width, slits.height, setting.height)
        yield from bps.configure(self._instrument, slit_width=setting.width, slit_height=setting.height, monitor=setting.flux)

    def _direct_beam_position(self) -> MsgGenerator[None]:
        """Make the beam safe for the detector: beamstop out, attenuator in."""
        line = self._beamline
        yield from bps.mv(line.attenuator.factor, ATTENUATION, line.beamstop.radius, 0.0)
        yield from bps.configure(self._instrument, attenuation=ATTENUATION, transmission=1.0)

    def _sample_position(self) -> MsgGenerator[None]:
        """Block the direct beam and take the attenuator out."""
        line = self._beamline
        yield from bps.mv(line.beamstop.radius, BEAMSTOP, line.attenuator.factor, 1.0)
        transmission = self.camera.transmission
        yield from bps.configure(self._instrument, attenuation=1.0, transmission=transmission)


def distances(results: Mapping[str, xr.Dataset], truths: Mapping[str, Any]) -> dict[str, Distances]:
    """Compare desmeared exposures with the narrowest slits' measured curve and with the truth.

    Curves are interpolated to a common grid (linearly) and divided by their mean
    there, so that only their form counts.

    Parameters
    ----------
    results
        Desmeared Datasets by slits, dims ("q",); the last is that of the narrowest slits.
    truths
        Exact curve as a function of q in 1/nm, by slits.

    Returns
    -------
    dict
        Distances by slits.
    """
    low = max(float(result["q"][0]) for result in results.values())
    high = min(float(result["q"][-1]) for result in results.values())
    grid = np.linspace(low, high, 500)

    def normalised(q: NDArray, I: NDArray) -> NDArray:
        values = np.interp(grid, q, I)
        return values / values.mean()

    curves = {
        slits: [normalised(result["q"].values, result[name].values) for name in ("I_smeared", "I")]
        for slits, result in results.items()
    }
    narrowest = list(curves.values())[-1][0]
    table = {}
    for slits, (measured, desmeared) in curves.items():
        truth = normalised(grid, truths[slits](grid))
        table[slits] = Distances(
            *(float(np.mean((curve - other) ** 2)) for other in (narrowest, truth) for curve in (measured, desmeared))
        )
    return table


def _evaluate(
    client: Any, camera: SaxsCamera, slits: Sequence[SlitSetting], positions: Sequence[float], runs: _Runs, directory: Path
) -> Outcome:
    """Read the results back from the catalog; make the table and the figures."""
    outcome = Outcome(directory)
    found = {s.label: result_of(client, uid, DESMEARED) for s, uid in zip(slits, runs.behenate, strict=True)}
    outcome.results = {label: result.isel(exposure=0) for label, result in found.items()}
    truths = {s.label: _truth(camera, Setting(SilverBehenate(), s.width, s.height)) for s in slits}
    outcome.table = distances(outcome.results, truths)
    spheres = result_of(client, runs.spheres, DESMEARED)
    outcome.spheres = _sphere_errors(spheres, camera, slits[0], positions)
    smearing = _operator(client, camera, runs.beams[0])
    q = outcome.results[slits[0].label]["q"].values
    figures = {
        "agbh": plots.plot_comparison(outcome.results, truth=_as_curve(q, truths[slits[0].label]), title="Silver behenate"),
        "agbh-residuals": plots.plot_residuals(outcome.results[slits[0].label]),
        "spheres": plots.plot_result(spheres, title="Spheres, R = 8 nm, scanned across a capillary"),
        "operator": plots.plot_operator(smearing),
        "direct-beam": plots.plot_psf(client["psfs"][runs.beams[0]].read()),
    }
    for name, figure in figures.items():
        outcome.figures.append(directory / f"{name}.png")
        figure.savefig(outcome.figures[-1])
    return outcome


def _sphere_errors(result: xr.Dataset, camera: SaxsCamera, slits: SlitSetting, positions: Sequence[float]) -> tuple[float, float]:
    """Mean squared difference of ln I from the truth where I is positive: measured, desmeared."""
    errors: dict[str, list[NDArray]] = {"I_smeared": [], "I": []}
    for number, x in enumerate(positions):
        setting = Setting(Sphere(), slits.width, slits.height, thickness=SampleChanger.thickness_at(x))
        truth = _truth(camera, setting)(result["q"].values)
        for name, found in errors.items():
            I = result[name].isel(exposure=number).values
            found.append(np.log(I[I > 0] / truth[I > 0]) ** 2)
    measured, desmeared = (float(np.concatenate(found).mean()) for found in errors.values())
    return measured, desmeared


def _truth(camera: SaxsCamera, setting: Setting) -> Any:
    """The exact curve in the units of the measured ones: counts per pixel, photon of the beam and transmission."""
    scale = camera.flux(setting.slit_width, setting.slit_height) * camera.transmission
    return lambda q: camera.truth(setting, q) / scale


def _as_curve(q: NDArray, truth: Any) -> xr.Dataset:
    return xr.Dataset({"I": ("q", truth(q))}, coords={"q": q})


def _operator(client: Any, camera: SaxsCamera, beam_uid: str) -> Smearing:
    """The operator of a direct beam, made of what the catalog serves."""
    psf = client["psfs"][beam_uid].read()
    return Reduction(centred(camera.poni, psf), mask=camera.mask(BEAMSTOP)).smearing(psf)


def _show(console: Console, outcome: Outcome) -> None:
    table = Table(title="Silver behenate: 1000 x mean squared difference of I / <I>")
    table.add_column("slits")
    for heading in ("measured", "desmeared"):
        table.add_column(f"{heading} to narrowest", justify="right")
    for heading in ("measured", "desmeared"):
        table.add_column(f"{heading} to truth", justify="right")
    for slits, row in outcome.table.items():
        values = (row.measured_to_narrowest, row.desmeared_to_narrowest, row.measured_to_truth, row.desmeared_to_truth)
        table.add_row(slits, *(f"{1000 * value:.2f}" for value in values))
    console.print(table)
    console.print(
        "The narrowest slits' curve is the measured one, which is smeared itself; the truth is known only in a simulation."
    )
    measured, desmeared = outcome.spheres
    console.print(
        f"Spheres, widest slits: mean squared difference of ln I from the truth {measured:.3f}, desmeared {desmeared:.3f}."
    )
    if outcome.failed:
        console.print(f"[red]{outcome.failed} exposures could not be desmeared; their results say why.[/red]")
    console.print("Figures: " + ", ".join(path.name for path in outcome.figures) + f" in {outcome.directory}")

"""Weak anisotropic patterns of a scanned sample, denoised live on a simulated detector.

A first scan, of other samples, teaches a denoiser; no clean frame is needed. A second scan is a map over which the
orientation of the sample turns; each of its exposures is denoised, and a sector of it desmeared, while the scan goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from rich.console import Console

from dsnet_bluesky.denoising.network import DenoiserConfig
from dsnet_bluesky.denoising.orientation import Orientation, Orientations
from dsnet_bluesky.kinds import kind_of
from dsnet_bluesky.learning import train_on_runs
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.questions import OfRun
from dsnet_bluesky.reduction import Reduction
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim.anisotropic import AnisotropicScan, OrientedEllipsoids
from dsnet_bluesky.sim.patterns import EMPTY, PatternCamera, ScanStage, pattern_detector
from dsnet_bluesky.training.denoiser import DenoiserRecipe

from .session import Session, result_of, say_how_to_go_on, serving

__all__ = ["Outcome", "run"]

Floats = NDArray[np.floating[Any]]

DOSE = 3.0
"""Photons a pixel in the mean."""

SIDE = 6
"""Exposures along each side of the map."""

WIDTH = 20.0
"""Of the sector in degrees; it lies along the orientation of the sample in the middle of the map."""

SEED = 2026
NAMES = ("raw", "denoised", "true")

FIBRE = OrientedEllipsoids(radius=5.4, aspect=2.2, angle=0.0, spread=9.0, spacing=11.0, arc=0.03, background=0.2)
"""What the map is of: its radius is in none of the bands that the first scan is drawn from."""

QUERY = 'client["analysed"].search(Key("method") == "symmetry-denoiser").values().first().read()'
"""A first question to the catalog."""


class Size(NamedTuple):
    """How much is done."""

    pixels: int = 96
    first: int = 36
    """Exposures to learn from."""
    side: int = SIDE
    replicas: int = 16
    bins: int = 40
    recipe: DenoiserRecipe = DenoiserRecipe(steps=500, batch=6, crop=80)


QUICK = Size(
    pixels=64,
    first=24,
    side=3,
    replicas=9,
    bins=28,
    recipe=DenoiserRecipe(steps=300, batch=4, crop=64, held_out=0.2, architecture=DenoiserConfig(channels=(8, 12, 16))),
)


@dataclass
class Outcome:
    """What a demonstration made."""

    directory: Path
    result: xr.Dataset = field(default_factory=xr.Dataset)
    """What was found, as it is in the catalog."""

    error: tuple[float, float] = (np.nan, np.nan)
    """Mean squared error of frames in units of the Poisson variance: raw, denoised."""

    turned: tuple[float, float] = (np.nan, np.nan)
    """Root mean square error of the orientation of `ring`, in degrees: raw, denoised."""

    ring: int = 0
    """Place on q of the ring whose orientations are mapped."""

    sector: tuple[float, float] = (np.nan, np.nan)
    """Root mean square relative error of the sector curve in per cent: raw against the smeared truth, desmeared against it."""

    figures: list[Path] = field(default_factory=list)
    failed: int = 0
    """Exposures that could not be denoised."""


def run(
    directory: str | Path, *, keep: bool = False, quick: bool = False, port: int = 0, console: Console | None = None
) -> Outcome:
    """Run the demonstration.

    Parameters
    ----------
    directory
        For the catalog's data, the model and the figures; created if need be.
    keep
        Leave the server up at the end, until it is interrupted.
    quick
        Smaller frames and scans, and a small network.
    port
        Of the server; 0 takes a free one.
    console
        Where progress and figures of merit are shown.

    Returns
    -------
    Outcome
    """
    console, directory, size = console or Console(), Path(directory).absolute(), QUICK if quick else Size()
    console.print(f"[bold]Weak anisotropic patterns, simulated.[/bold] Data and figures go to {directory}")
    with serving(directory, port, console) as server:
        first = _Experiment(server, PatternCamera(_samples(size), DOSE, seed=SEED), size)
        uid = first.run(console, None)
        model = directory / "model" / "symmetry-denoiser-1.0.0"
        _learn(server, uid, model, size, console)
        second = _Experiment(server, PatternCamera(_map(size), DOSE, seed=SEED + 1), size)
        outcome = Outcome(directory)
        uid = second.run(console, second.config(model), outcome)
        _evaluate(outcome, server.client(), uid, second)
        _show(console, outcome)
        say_how_to_go_on(console, server, QUERY, keep=keep)
    return outcome


def _samples(size: Size) -> AnisotropicScan:
    """Draw what is learned from."""
    middle = (size.pixels / 2 - 0.8, size.pixels / 2 + 1.3)
    return AnisotropicScan.draw(size.first, "training", SEED, shape=(size.pixels, size.pixels), centre=middle)


def _map(size: Size) -> AnisotropicScan:
    """Let one sample, unlike all those, turn over a map."""
    middle = (size.pixels / 2 - 0.8, size.pixels / 2 + 1.3)
    y, x = np.mgrid[: size.side, : size.side] / max(size.side - 1, 1)
    return AnisotropicScan((FIBRE,), (size.pixels, size.pixels), middle).turned((20 + 90 * x + 60 * y**2).ravel())


class _Experiment:
    """A detector, a stage and a scan, on a server."""

    def __init__(self, server: Server, camera: PatternCamera, size: Size) -> None:
        self.server, self.camera, self.size = server, camera, size
        folder = server.data_directory / "detector"
        np.save(folder / "mask.npy", camera.scan.mask)
        self.instrument = Instrument(camera.poni, mask=folder / "mask.npy")
        self.stage = ScanStage(name="stage")
        self.detector = pattern_detector(folder, camera, self.stage)

    @property
    def azimuth(self) -> float:
        """Of the sector, in degrees."""
        samples = self.camera.scan.samples
        return float((samples[len(samples) // 2].angle + 90) % 180 - 90)

    def config(self, model: Path) -> Config:
        """Say what is done with the exposures."""
        options = {"model": str(model), "sector": [self.azimuth, WIDTH], "replicas": self.size.replicas}
        return Config(method="symmetry-denoiser", options=options, bins=self.size.bins)

    def run(self, console: Console, config: Config | None, outcome: Outcome | None = None) -> str:
        """Take the direct beam and the scan; return the uid of the scan's run, when all results are there."""
        places = len(self.camera.scan.samples)
        session = Session(self.server.client(), self.server.data_directory, console, config)
        results = (places if config else 0, "exposures denoised and stored")
        uid = session.run([self.detector, self.stage], self._plan(places), exposures=places + 1, results=results)
        if outcome is not None:
            outcome.failed = session.failed
        return uid

    def _plan(self, places: int) -> MsgGenerator[str]:
        yield from bps.mv(self.stage.place, EMPTY)
        beam = yield from direct_beam(self.detector, instrument=self.instrument)
        return (
            yield from expose(
                self.detector,
                sample="fibres",
                instrument=self.instrument,
                motor=self.stage.place,
                positions=[float(place) for place in range(places)],
                direct_beam_uid=beam,
            )
        )


def _learn(server: Server, uid: str, folder: Path, size: Size, console: Console) -> None:
    """Train on the first scan, as it is in the catalog."""
    with console.status("Learning from the first scan ...") as status:
        train_on_runs(
            server.client(),
            folder,
            questions=[OfRun(uid)],
            recipe=size.recipe,
            notify=lambda done, total, word: status.update(f"Learning from the first scan: step {done} of {total}, {word}"),
        )
    console.print(f"A denoiser learned from {size.first} exposures of other samples: {folder}")


class _Truth(NamedTuple):
    """What the simulation knows, and the raw frames."""

    raw: Floats
    smeared: Floats
    """Expected frames, shape (exposure, y, x)."""
    around: Orientation
    """Of the expected frames."""
    raw_around: Orientation
    curves: Floats
    """Of the sector without any smearing, shape (exposure, q)."""
    smeared_curves: Floats
    raw_curves: Floats


def _evaluate(outcome: Outcome, client: Any, uid: str, experiment: _Experiment) -> None:
    """Read results and frames back from the catalog; compare with the truth and draw."""
    outcome.result = result_of(client, uid, kind_of("symmetry-denoiser"))
    frames = client["raw"][uid]["primary"].read(["detector"])["detector"].values
    truth = _truth_of(experiment, frames.reshape(-1, *frames.shape[-2:]).astype(float))
    counted = ~experiment.camera.scan.mask
    outcome.error = (
        _chi2(truth.raw[:, counted], truth.smeared[:, counted]),
        _chi2(outcome.result["denoised"].values[:, counted], truth.smeared[:, counted]),
    )
    outcome.ring = _weakest_oriented(truth.around)
    found = outcome.result["orientation"].values
    exact = truth.around.azimuth[:, outcome.ring]
    outcome.turned = (
        _apart(truth.raw_around.azimuth[:, outcome.ring], exact),
        _apart(found[:, outcome.ring], exact),
    )
    outcome.sector = (
        _relative(truth.raw_curves, truth.smeared_curves),
        _relative(outcome.result["I"].values, truth.curves),
    )
    figure = _draw(outcome, truth, experiment)
    outcome.figures.append(outcome.directory / "anisotropic.png")
    figure.savefig(outcome.figures[-1], dpi=130)


def _truth_of(experiment: _Experiment, raw: Floats) -> _Truth:
    camera, half = experiment.camera, WIDTH / 2
    ends = (experiment.azimuth - half, experiment.azimuth + half)
    reduction = Reduction(camera.poni, mask=camera.scan.mask, bins=experiment.size.bins, sector=ends)
    around = Orientations(reduction)
    ideal = DOSE * camera.scan.rates
    curves = (reduction(frames)["I"].values for frames in (ideal, camera.smeared, raw))
    return _Truth(raw, camera.smeared, around(camera.smeared), around(raw), *curves)


def _chi2(frames: Floats, truth: Floats) -> float:
    return float(np.mean((frames - truth) ** 2 / truth))


def _weakest_oriented(around: Orientation) -> int:
    """Choose the outermost ring that is clearly oriented everywhere: where few photons tell of an orientation."""
    clear = (around.anisotropy > 0.25).all(axis=0)
    return int(np.flatnonzero(clear)[-1]) if clear.any() else int(np.nanargmax(around.anisotropy.min(axis=0)))


def _apart(found: Floats, exact: Floats) -> float:
    """Root mean square of angles between axes, in degrees."""
    return float(np.sqrt(np.nanmean(((found - exact + 90) % 180 - 90) ** 2)))


def _relative(found: Floats, exact: Floats) -> float:
    return 100 * float(np.sqrt(np.nanmean((found / exact - 1) ** 2)))


def _draw(outcome: Outcome, truth: _Truth, experiment: _Experiment) -> Figure:
    """Draw the map of orientations, one frame, and its sector."""
    figure = Figure(figsize=(10, 10.5), layout="constrained")
    ring, number = outcome.ring, len(outcome.result["exposure"]) // 2
    parts: Any = figure.subfigures(3, 1, height_ratios=(1, 1, 1.1))
    azimuths = (truth.raw_around.azimuth, outcome.result["orientation"].values, truth.around.azimuth)
    side = experiment.size.side
    maps = [each[:, ring].reshape(side, side) for each in azimuths]
    axes = parts[0].subplots(1, 3)
    images = [_draw_map(ax, found, maps[-1]) for ax, found in zip(axes, maps, strict=True)]
    for ax, name, error in zip(axes, NAMES, (*outcome.turned, None), strict=True):
        ax.set_title(name if error is None else f"{name}, wrong by {error:.1f}°")
    q = float(outcome.result["q"][ring])
    parts[0].colorbar(images[0], ax=axes.tolist(), label=f"orientation at q = {q:.2f} 1/nm / degrees")
    frames = (truth.raw[number], outcome.result["denoised"].values[number], truth.smeared[number])
    _draw_frames(parts[1], [np.where(experiment.camera.scan.mask, np.nan, frame) for frame in frames])
    _draw_sector(parts[2].subplots(), outcome.result.isel(exposure=number), truth, number)
    return figure


def _draw_frames(figure: SubFigure, frames: list[Floats]) -> None:
    """Draw frames on the scale of the last one."""
    least = max(float(np.nanquantile(frames[-1], 0.01)) / 2, 0.1)
    scale, axes = LogNorm(least, float(np.nanmax(frames[-1]))), figure.subplots(1, len(frames))
    images = [
        ax.imshow(frame.clip(least), norm=scale, origin="lower", cmap="magma") for ax, frame in zip(axes, frames, strict=True)
    ]
    for ax, name in zip(axes, NAMES, strict=True):
        ax.set(xticks=[], yticks=[], title=f"one frame, {name}")
    figure.colorbar(images[0], ax=axes.tolist(), label="counts")


def _draw_map(ax: Axes, azimuths: Floats, exact: Floats) -> Any:
    """Draw azimuths as colours and as rods, the true ones as thin lines."""
    image = ax.imshow(azimuths, cmap="twilight", vmin=0, vmax=180, origin="lower")
    y, x = np.mgrid[: len(azimuths), : len(azimuths)]
    for angles, style in ((exact, {"color": "white", "lw": 1.0}), (azimuths, {"color": "black", "lw": 2.2})):
        dy, dx = 0.35 * np.sin(np.deg2rad(angles)), 0.35 * np.cos(np.deg2rad(angles))
        ax.plot(np.stack([x - dx, x + dx]).reshape(2, -1), np.stack([y - dy, y + dy]).reshape(2, -1), **style)
    ax.set(xticks=[], yticks=[])
    return image


def _draw_sector(ax: Axes, result: xr.Dataset, truth: _Truth, number: int) -> None:
    q = result["q"].values
    ax.plot(q, truth.raw_curves[number], "o", ms=3, color="0.6", label="raw sector")
    ax.errorbar(q, result["I"], result["Idev"], fmt="s", ms=3, color="C1", lw=1, label="denoised and desmeared")
    ax.plot(q, truth.curves[number], color="black", lw=1, label="true, not smeared")
    ax.plot(q, truth.smeared_curves[number], color="black", lw=1, ls=":", label="true, smeared")
    ax.set(yscale="log", xlabel="q / (1/nm)", ylabel="counts a pixel", title="the sector of this frame")
    ax.set_ylim(0.5 * truth.curves[number].min(), 2 * truth.curves[number].max())
    ax.legend(frameon=False)


def _show(console: Console, outcome: Outcome) -> None:
    """Print how good it is."""
    raw, denoised = outcome.error
    console.print(
        f"Frames: mean squared error {raw:.3f} raw, {denoised:.4f} denoised, in units of the photons' variance: "
        f"{10 * np.log10(raw / denoised):.1f} dB."
    )
    q = float(outcome.result["q"][outcome.ring])
    console.print(
        f"Orientation at q = {q:.2f} 1/nm: wrong by {outcome.turned[0]:.1f} degrees raw, {outcome.turned[1]:.1f} denoised; "
        f"stated error {float(outcome.result['orientation_dev'][:, outcome.ring].median()):.1f}."
    )
    console.print(
        f"Sector of {WIDTH:g} degrees: wrong by {outcome.sector[0]:.1f} % raw (smeared), {outcome.sector[1]:.1f} % denoised and "
        f"desmeared; stated error {100 * float((outcome.result['Idev'] / outcome.result['I']).median()):.1f} %."
    )
    console.print(
        "The stated errors are those of noise; they do not see that faint arcs, weaker than the noise of two mates, are smoothed."
    )
    console.print("The truth is the simulation's; over full rings raw frames are integrated, denoising gains nothing there.")
    if outcome.failed:
        console.print(f"[red]{outcome.failed} exposures could not be denoised; their results say why.[/red]")
    console.print("Figures: " + ", ".join(path.name for path in outcome.figures) + f" in {outcome.directory}")

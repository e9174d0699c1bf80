"""Single shots of single silver particles, live, on a simulated detector.

A run of many exposures, each of another particle: sizes and orientations are results while it goes on. One of the particles is
a sphere, and the model is not told. Images are simulated anew from the answers, and drawn beside those measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dsnet_bluesky.data import Flag
from dsnet_bluesky.icosahedra.exposures import PreparedImages
from dsnet_bluesky.icosahedra.model import simulator_from
from dsnet_bluesky.icosahedra.multislice import ICOSAHEDRON, SPHERE
from dsnet_bluesky.icosahedra.rotations import misorientation
from dsnet_bluesky.kinds import kind_of
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.plans import Instrument, expose
from dsnet_bluesky.plots import plot_sizes
from dsnet_bluesky.sim.shots import Particle, SingleShotCamera, single_shot_detector

from .session import Session, result_of, say_how_to_go_on, serving

__all__ = ["Outcome", "run"]

SHOTS = 24
"""Particles, one of them a sphere."""

SEED = 2026

SHOWN = 4
"""Images that are drawn, beside that of the sphere."""

QUERY = 'client["analysed"].search(Key("method") == "icosahedra").values().first().read()'
"""A first question to the catalog."""


@dataclass
class Outcome:
    """What a demonstration made."""

    directory: Path
    particles: list[Particle] = field(default_factory=list)
    """What was in the beam, known to the simulation only."""

    result: xr.Dataset = field(default_factory=xr.Dataset)
    """What was found, as it is in the catalog."""

    misorientation: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """In degrees, modulo the icosahedral group; NaN for the sphere."""

    figures: list[Path] = field(default_factory=list)
    failed: int = 0
    """Exposures that could not be read."""

    @property
    def radii(self) -> NDArray[np.float64]:
        """True radii in nm."""
        return np.array([particle.radius for particle in self.particles])

    @property
    def spheres(self) -> NDArray[np.bool_]:
        """Where the particle was none of those that the model knows."""
        return np.array([particle.solid is not ICOSAHEDRON for particle in self.particles])


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
        Only five particles.
    port
        Of the server; 0 takes a free one.
    console
        Where progress and the table are shown.

    Returns
    -------
    Outcome
    """
    console, directory = console or Console(), Path(directory).absolute()
    outcome = Outcome(directory, _particles(5 if quick else SHOTS))
    camera, config = SingleShotCamera(outcome.particles, seed=SEED), Config(method="icosahedra")
    console.print(f"[bold]Single shots of silver particles, simulated.[/bold] Data and figures go to {directory}")
    with serving(directory, port, console) as server:
        client, folder = server.client(), server.data_directory
        np.save(folder / "detector" / "mask.npy", camera.mask)
        instrument = Instrument(camera.poni, mask=folder / "detector" / "mask.npy")
        detector = single_shot_detector(folder / "detector", camera)
        session = Session(client, folder, console, config)
        shots = len(outcome.particles)
        plan = expose(detector, sample="silver particles", instrument=instrument, exposures=shots)
        uid = session.run([detector], plan, exposures=shots, results=(shots, "particles read and stored"))
        outcome.failed = session.failed
        _evaluate(outcome, client, uid, PreparedImages(camera.poni, camera.mask, model=config.method))
        _show(console, outcome)
        say_how_to_go_on(console, server, QUERY, keep=keep)
    return outcome


def _particles(count: int) -> list[Particle]:
    """Draw icosahedra, and put a sphere among them."""
    particles = Particle.draw(count, SEED)
    odd = count // 2
    particles[odd] = Particle(particles[odd].radius, particles[odd].quaternion, SPHERE)
    return particles


def _evaluate(outcome: Outcome, client: Any, uid: str, prepared: PreparedImages) -> None:
    """Read results and frames back from the catalog; compare with the truth and draw."""
    outcome.result = result_of(client, uid, kind_of("icosahedra"))
    frames = client["raw"][uid]["primary"].read(["camera"])["camera"].values
    measured = prepared.reduce(frames.reshape(-1, *frames.shape[-2:]))["image"].values
    true = torch.tensor([particle.quaternion for particle in outcome.particles]).double()
    found = torch.tensor(outcome.result["quaternion"].values)
    outcome.misorientation = np.where(outcome.spheres, np.nan, misorientation(found, true).numpy())
    again = simulator_from(prepared.model.card["simulator"])(torch.tensor(outcome.result["radius"].values), found)
    sizes = plot_sizes(outcome.result, truth=outcome.radii, title="Single shots: radius found against the true one")
    figures = {"icosahedra-images": _draw_images(outcome, measured, again.numpy()), "icosahedra-sizes": sizes}
    for name, figure in figures.items():
        outcome.figures.append(outcome.directory / f"{name}.png")
        figure.savefig(outcome.figures[-1], dpi=130)


def _draw_images(outcome: Outcome, measured: NDArray[np.float64], again: NDArray[np.float64]) -> Figure:
    """Draw measured images over those that are simulated from what was found."""
    icosahedra = np.flatnonzero(~outcome.spheres)
    some = icosahedra[np.argsort(outcome.radii[icosahedra])][np.linspace(0, len(icosahedra) - 1, SHOWN).astype(int)]
    chosen = [*some, *np.flatnonzero(outcome.spheres)]
    figure = Figure(figsize=(2.3 * len(chosen), 5.2), layout="constrained")
    for number, column in zip(chosen, figure.subplots(2, len(chosen)).T, strict=True):
        image, radius = measured[number], float(outcome.result["radius"][number])
        # One scale for both, from the bright pixels: the unit of an image does not matter.
        bright = image >= np.nanquantile(image, 0.9)
        scale = np.median(image[bright] / again[number][bright])
        for ax, values in zip(column, (image, scale * again[number]), strict=True):
            _draw_image(ax, values, float(np.nanmax([image, scale * again[number]])))
        what = "sphere" if outcome.spheres[number] else "icosahedron"
        column[0].set_title(f"{what}, {outcome.radii[number]:.1f} nm", fontsize="medium")
        said = f"score {float(outcome.result['score'][number]):.3f}{', flagged' if int(outcome.result['flags'][number]) else ''}"
        column[1].set_title(f"found {radius:.1f} nm, {said}", fontsize="small")
        if number == chosen[0]:
            column[0].set_ylabel("measured")
            column[1].set_ylabel("simulated from the answer")
    return figure


def _draw_image(ax: Axes, values: NDArray[np.float64], brightest: float) -> None:
    ax.imshow(np.clip(values, 0.5, None), origin="lower", norm=LogNorm(0.5, brightest), cmap="magma")
    ax.set(xticks=[], yticks=[])


def _show(console: Console, outcome: Outcome) -> None:
    """Print what was found beside what was there, and how good it is."""
    table = Table(title="Single shots: true radius, what was found, and the misorientation")
    for heading in ("shot", "particle", "true / nm", "found / nm", "angle / °", "score", "flags"):
        table.add_column(heading, justify="left" if heading in ("particle", "flags") else "right", no_wrap=True)
    result = outcome.result
    for i, sphere in enumerate(outcome.spheres):
        angle = "" if sphere else f"{outcome.misorientation[i]:.1f} ({result['misorientation_dev'].values[i]:.1f})"
        table.add_row(
            str(i + 1),
            "sphere" if sphere else "icosahedron",
            f"{outcome.radii[i]:.1f}",
            f"{result['radius'].values[i]:.1f} +- {result['radius_dev'].values[i]:.1f}",
            angle,
            f"{result['score'].values[i]:.3f}",
            _words(int(result["flags"].values[i])),
        )
    console.print(table)
    away = np.abs(result["radius"].values - outcome.radii)[~outcome.spheres]
    console.print(
        f"Icosahedra: radius wrong by {np.nanmean(away):.2f} nm in the mean, {np.nanmax(away):.2f} nm at the most; "
        f"misorientation modulo the icosahedral group {np.nanmedian(outcome.misorientation):.1f} degrees in the median, "
        f"{np.nanmax(outcome.misorientation):.1f} at the most. In brackets and behind +-: the errors that the model states."
    )
    console.print("The truth is the simulation's; its images follow the same physics as those that the model was trained on.")
    if outcome.failed:
        console.print(f"[red]{outcome.failed} exposures could not be read; their results say why.[/red]")
    console.print("Figures: " + ", ".join(path.name for path in outcome.figures) + f" in {outcome.directory}")


def _words(flags: int) -> str:
    return ", ".join(str(flag.name).lower().replace("_", " ") for flag in Flag if flag & flags)

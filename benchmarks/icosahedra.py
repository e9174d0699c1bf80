"""How well icosahedra are read from one image: errors as in the paper, modulo the group, off the model, against forward fitting.

Images are simulated anew, with another seed than those of the training. Writes Markdown and a figure:

    python benchmarks/icosahedra.py             # about 25 minutes on one thread, most of it for forward fitting
    python benchmarks/icosahedra.py --losses    # with a network that learns by the paper's loss: 35 minutes more, once
    python benchmarks/icosahedra.py --quick     # a smoke test

The network with the paper's loss is kept in build/benchmarks/icosahedra-paper-loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from provenance import provenance
from scipy.optimize import minimize
from torch import Tensor

from dsnet_bluesky.data import Flag
from dsnet_bluesky.icosahedra import Icosahedra, Simulator
from dsnet_bluesky.icosahedra.answers import answers, score
from dsnet_bluesky.icosahedra.images import AUGMENTATIONS, VIEWS, exposed, log_image
from dsnet_bluesky.icosahedra.multislice import SPHERE
from dsnet_bluesky.icosahedra.network import RADIUS, Answer, relative_errors
from dsnet_bluesky.icosahedra.rotations import group, misorientation, multiply, random_quaternions, reduced
from dsnet_bluesky.training.icosahedra import Recipe, figures_of, train
from dsnet_bluesky.versions import load_model
from dsnet_bluesky.versions.readme import to_toml

SEED = 977
PEAK = 1e6
BOUNDARY = 2.0
"""Degrees from the boundary of the fundamental domain within which an orientation is near it."""
STEPS = 50
"""Simulations of one simplex, as in the paper."""
ASKED = {"one view": 1, "eight views": VIEWS}
PAPER_LOSS = Path(__file__).parents[1] / "build" / "benchmarks" / "icosahedra-paper-loss"
READINGS = ("intensity", "field", "propagating")


class Case(NamedTuple):
    """Counts, and what they show."""

    counts: Tensor
    truth: Answer

    def first(self, count: int) -> Case:
        """Give the first of them."""
        return Case(self.counts[:count], _first(self.truth, count))


def drawn(count: int, seed: int = SEED) -> Answer:
    """Draw radii and orientations."""
    generator = torch.Generator().manual_seed(seed)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(count, generator=generator)
    return Answer(radius, random_quaternions(count, generator).float())


def _first(answer: Answer, count: int) -> Answer:
    return Answer(*(part[:count] for part in answer))


def measured(simulator: Simulator, truth: Answer, peak: float = PEAK) -> Case:
    """Simulate and expose."""
    images = simulator(*truth)
    return Case(exposed(images, torch.full((len(images),), peak), torch.Generator().manual_seed(SEED)), truth)


def boundary_distance(quaternion: Tensor) -> Tensor:
    """Angle in degrees by which an orientation must turn, at least, to reach the boundary of the fundamental domain, about.

    Half of the difference between the angles to the nearest and to the second nearest of the 60 equivalents of no rotation.
    """
    overlap = multiply(reduced(quaternion)[:, None], group(quaternion))[..., 0].abs().clamp(max=1)
    angles = torch.rad2deg(2 * torch.arccos(overlap)).sort(dim=1).values
    return (angles[:, 1] - angles[:, 0]) / 2


def line(name: str, answer: Answer, truth: Answer, more: str = "") -> str:
    """Lay out the figures of one set of answers."""
    found = figures_of(answer, truth)
    errors = " | ".join(
        f"{100 * found[f'{kind}_relative_error{which}']:.2f}" for which in ("", "_symmetric") for kind in ("mean", "maximum")
    )
    angles = f"{found['misorientation']:.2f}, {found['misorientation_95']:.2f}"
    return f"| {name} | {errors} | {found['radius_error']:.2f} | {angles} |{more}"


HEADER = """\
| {} | mean | maximum | mean, group | maximum, group | radius | misorientation |
|---|---|---|---|---|---|---|"""


def table(label: str, lines: Sequence[str], more: Sequence[str] = ()) -> str:
    """Lay out a table of errors."""
    head = HEADER.format(label).split("\n")
    head = [head[0] + "".join(f" {word} |" for word in more), head[1] + "---|" * len(more)]
    return "\n".join([*head, *lines])


def accuracy(reader: Icosahedra, case: Case) -> tuple[list[str], dict[str, Answer]]:
    """Ask once and for all views; near the boundary of the fundamental domain and inside."""
    image = log_image(case.counts)
    found = {asked: answers(reader.network, image, views) for asked, views in ASKED.items()}
    near = boundary_distance(case.truth.quaternion) < BOUNDARY
    lines = []
    for name, answer in found.items():
        lines.append(line(f"all, {name}", answer, case.truth))
        for where, rows in (("near the boundary", near), ("inside", ~near)):
            if not rows.any():
                continue
            inside, truth = (Answer(*(part[rows] for part in each)) for each in (answer, case.truth))
            lines.append(line(f"{where} ({float(rows.double().mean()):.0%}), {name}", inside, truth))
    return lines, found


def losses(reader: Icosahedra, case: Case, folder: Path, quick: bool) -> list[str]:
    """Compare with a network that learned by the paper's loss, otherwise by the same recipe; it is trained if it is not there."""
    if not (folder / "model.toml").exists():
        values = tomllib.loads((reader.model.path / "recipe.toml").read_text(encoding="utf-8"))
        values["schedule"]["loss"] = "paper"
        if quick:
            values["schedule"]["epochs"] = 1
            values["data"].update(dict.fromkeys(("training", "validation", "test"), 64))
        train(Recipe.parse(to_toml(values)), folder)
    image = log_image(case.counts)
    readers = {"symmetric (released)": reader, "the paper's": Icosahedra(load_model(str(folder)))}
    return [
        line(f"{name}, {asked}", answers(each.network, image, views), case.truth)
        for asked, views in ASKED.items()
        for name, each in readers.items()
    ]


def robustness(reader: Icosahedra, case: Case) -> list[str]:
    """Change the images by each augmentation."""
    image, lines = log_image(case.counts), []
    for name, change in AUGMENTATIONS.items():
        answer = answers(reader.network, change(image, torch.Generator().manual_seed(SEED)))
        lines.append(line(name.replace("_", " "), answer, case.truth))
    return lines


def off_model(reader: Icosahedra, truth: Answer) -> list[str]:
    """Simulate with another absorption, on a finer grid, at other doses; and make the images centrosymmetric."""
    base = reader.simulator
    cases = {
        "as trained": measured(base, truth),
        **{f"absorption read as {name}": measured(dataclasses.replace(base, absorption=name), truth) for name in READINGS},
        **{f"absorption length {x:g} nm": measured(dataclasses.replace(base, length=x), truth) for x in (10.0, 15.0)},
        "grid of 128 points, 128 slices": measured(dataclasses.replace(base, points=128, slices=128), truth),
        **{f"{peak:.0e} photons at the peak": measured(base, truth, peak) for peak in (1e4, 1e5, 1e8)},
    }
    turned = torch.rot90(cases["as trained"].counts, 2, (-2, -1))
    cases |= {f"hole of {part:.0%} of the width, masked": holed(cases["as trained"], part) for part in (0.06, 0.12)}
    cases["averaged with opposite pixels"] = Case((cases["as trained"].counts + turned) / 2, truth)
    return [line(name, *_read(reader, case)) for name, case in cases.items()]


def holed(case: Case, part: float) -> Case:
    """Mask a round hole about the beam, its diameter a part of the image's width."""
    place = torch.linspace(-1, 1, case.counts.shape[-1])
    hole = place**2 + place[:, None] ** 2 < part**2
    return case._replace(counts=torch.where(hole, torch.nan, case.counts))


def _read(reader: Icosahedra, case: Case) -> tuple[Answer, Answer, str]:
    result = reader(case.counts.numpy())
    answer = Answer(torch.tensor(result["radius"].values).float(), torch.tensor(result["quaternion"].values).float())
    poor = float(np.mean((result["flags"].values & int(Flag.POOR_FIT)) > 0))
    return answer, case.truth, f" {float(result['score'].median()):.3f} | {poor:.0%} |"


def honesty(reader: Icosahedra, case: Case) -> str:
    """Say how many truths lie within the stated errors, and what becomes of spheres."""
    result = reader(case.counts.numpy())
    away = np.abs(result["radius"].values - case.truth.radius.numpy()) / result["radius_dev"].values
    angle = misorientation(torch.tensor(result["quaternion"].values), case.truth.quaternion.double()).numpy()
    angle = angle / result["misorientation_dev"].values
    shares = [f"{np.mean(each <= k):.0%}" for each in (away, angle) for k in (1, 2)]
    spheres = measured(dataclasses.replace(reader.simulator, solid=SPHERE), case.truth)
    flagged = np.mean((reader(spheres.counts.numpy())["flags"].values & int(Flag.POOR_FIT)) > 0)
    return (
        f"Within one and two `radius_dev`: {shares[0]} and {shares[1]}; within one and two `misorientation_dev`: {shares[2]} and "
        f"{shares[3]} (68 % wanted within one). Of {len(away)} spheres {flagged:.0%} are flagged POOR_FIT."
    )


def fitted(simulator: Simulator, case: Case, starts: int) -> list[Answer]:
    """Fit each image by simplexes (Nelder-Mead) from random starts; gives the best answer after each start."""
    best = [Answer(torch.zeros(len(case.counts)), torch.zeros(len(case.counts), 4)) for _ in range(starts)]
    for number, counts in enumerate(case.counts):
        least, kept = np.inf, np.zeros(4)
        begin = drawn(starts, SEED + 1 + number)
        for start in range(starts):
            value, found = simplex(simulator, counts[None], begin.radius[start], begin.quaternion[start])
            least, kept = min((least, kept), (value, found), key=lambda pair: pair[0])
            answer = _unpacked(kept)
            best[start].radius[number], best[start].quaternion[number] = answer.radius[0], answer.quaternion[0]
    return best


def simplex(simulator: Simulator, counts: Tensor, radius: Tensor, quaternion: Tensor) -> tuple[float, Any]:
    """Minimise 1 - score by one simplex over ln of the radius and the rotation vector from the start."""
    first = np.array([float(radius.log()), *(0.0,) * 3])

    def misfit(x: Any) -> float:
        moved = np.concatenate([x, quaternion.numpy()])
        return 1 - float(score(simulator, counts, _unpacked(moved)))

    corners = np.vstack([first, first + np.diag([0.1, 0.2, 0.2, 0.2])])
    result = minimize(misfit, first, method="Nelder-Mead", options={"maxfev": STEPS, "initial_simplex": corners})
    return float(result.fun), np.concatenate([result.x, quaternion.numpy()])


def _unpacked(x: Any) -> Answer:
    """Give ln of the radius, a rotation vector and the quaternion that it turns as an answer."""
    values = torch.tensor(x, dtype=torch.float32)
    half = values[1:4] / 2
    turn = torch.cat([torch.ones(1), half])
    return Answer(values[:1].exp(), reduced(multiply(turn / turn.norm(), values[4:])[None]))


def comparison(reader: Icosahedra, count: int, starts: int, path: Path) -> list[str]:
    """Compare with forward fitting, on the coarser grid that the fit simulates with as well; draw the errors."""
    coarse = dataclasses.replace(reader.simulator, points=48, slices=48)
    case = measured(coarse, drawn(count, SEED + 500))
    network = answers(reader.network, log_image(case.counts))
    begun = simplex_from(coarse, case, network)
    started = time.perf_counter()
    best = fitted(coarse, case, starts)
    seconds = (time.perf_counter() - started) / count / starts
    draw_fits(network, best, case.truth, path)
    lines = [
        line("network", network, case.truth, " 8 views |"),
        line("1 start, at the network's answer", begun, case.truth, f" {STEPS} simulations, {seconds:.1f} s |"),
    ]
    for number in sorted({n for n in (1, 2, 5, 10, 20, 50) if n <= starts} | {starts}):
        cost = f" {number * STEPS} simulations, {number * seconds:.1f} s |"
        lines.append(line(f"{number} random start{'s' * (number > 1)}", best[number - 1], case.truth, cost))
    return lines


def simplex_from(simulator: Simulator, case: Case, start: Answer) -> Answer:
    """Fit each image by one simplex from a start."""
    begin = (case.counts[:, None], start.radius, start.quaternion)
    found = [_unpacked(simplex(simulator, *each)[1]) for each in zip(*begin, strict=True)]
    return Answer(*(torch.cat(column) for column in zip(*found, strict=True)))


def draw_fits(network: Answer, best: Sequence[Answer], truth: Answer, path: Path) -> None:
    """Draw the errors of forward fitting against the number of simulations, as in the paper's Fig. 4b."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    simulations = STEPS * np.arange(1, len(best) + 1)

    def errors(answer: Answer) -> tuple[float, float]:
        away = 100 * relative_errors(answer, truth, symmetric=True).abs().mean(dim=1)
        return float(away.mean()), float(misorientation(answer.quaternion, truth.quaternion).median())

    labels = "mean relative error, nearest equivalent / %", "median misorientation / degrees"
    for axes, label, found, wanted in zip(
        figure.subplots(1, 2), labels, zip(*map(errors, best), strict=True), errors(network), strict=True
    ):
        axes.loglog(simulations, found, "o-", ms=3, label="simplexes from random starts")
        axes.axhline(wanted, color="C1", label="network")
        axes.set(xlabel="simulations for one image", ylabel=label)
        axes.set_xticks([50, 100, 250, 500, 1000, 2500], minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def draw(found: dict[str, Answer], truth: Answer, path: Path) -> None:
    """Draw the errors as in the paper's Fig. 4a, and the misorientations."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.geomspace(1e-2, 100, 60)
    for (name, answer), style in zip(found.items(), (":", "-"), strict=True):
        errors = 100 * relative_errors(answer, truth).abs().numpy()
        for kind, values, colour in (("mean", errors.mean(axis=1), "C0"), ("maximum", errors.max(axis=1), "C1")):
            left.hist(values, bins, histtype="step", color=colour, ls=style, label=f"{kind}, {name}")
        right.hist(
            misorientation(answer.quaternion, truth.quaternion).numpy(), bins, histtype="step", color="k", ls=style, label=name
        )
    left.set(xscale="log", xlabel="relative error of the five parameters / %", ylabel="images")
    right.set(xscale="log", xlabel="misorientation modulo the group / degrees")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def speed(reader: Icosahedra, case: Case) -> str:
    """Time one image, and the parts of it."""
    image, counts = log_image(case.counts[:1]), case.counts[:1].numpy()
    times = {
        "the network, one view": lambda: answers(reader.network, image, 1),
        "eight views": lambda: answers(reader.network, image),
        "the whole call with the score": lambda: reader(counts),
    }
    words = []
    for name, work in times.items():
        work()
        taken = []
        for _ in range(9):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        words.append(f"{name} {1e3 * float(np.median(taken)):.1f} ms")
    return f"One image: {', '.join(words)}."


LOSSES = """\
## Losses

The same images, read by two networks that differ in the loss they learned by; one training each.

"""

PROTOCOL = """\
{count} images of {model}, radii 30 to 160 nm, all orientations alike, {peak:.0e} photons in the brightest pixel and one per pixel
as background. Relative errors in per cent: of the five parameters, each in its range, the mean and the maximum, averaged over
images; the quaternion in the fundamental domain as in the paper, or (group) from the equivalent nearest to the answer. Radius:
mean error in nm. Misorientation modulo the group: median and 95 % quantile in degrees."""


def main(words: Sequence[str] | None = None) -> None:
    """Run all parts and write the report."""
    parser = argparse.ArgumentParser(description="How well icosahedra are read from one image.")
    parser.add_argument("--quick", action="store_true", help="smoke test: a few images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--model", default="icosahedra", help="a released model, or the folder of one")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--fits", type=int, default=30, help="images that are fitted")
    parser.add_argument("--starts", type=int, default=50, help="starts of a fit")
    parser.add_argument("--losses", action="store_true", help="compare with a network that learns by the paper's loss")
    parser.add_argument("--paper-loss", type=Path, help=f"where that network is kept (default: {PAPER_LOSS.name} in build/)")
    arguments = parser.parse_args(words)
    count, fits, starts = (8, 1, 1) if arguments.quick else (arguments.images, arguments.fits, arguments.starts)
    paper = arguments.paper_loss or (arguments.output / "paper-loss" if arguments.quick else PAPER_LOSS)
    arguments.output.mkdir(parents=True, exist_ok=True)
    reader = Icosahedra(load_model(arguments.model))
    case = measured(reader.simulator, drawn(count))
    lines, found = accuracy(reader, case)
    draw(found, case.truth, arguments.output / "icosahedra.png")
    some, few = case.first(max(4, count // 2)), _first(case.truth, max(4, count // 4))
    command = "python benchmarks/icosahedra.py" + " --quick" * arguments.quick + " --losses" * arguments.losses
    parts = [
        "# Icosahedra from one image",
        provenance(command, ("dsnet-bluesky", "torch", "numpy", "scipy")),
        PROTOCOL.format(count=count, model=reader.model.reference, peak=PEAK),
        f"## Errors\n\n{table('images', lines)}\n\n![Histograms of errors](icosahedra.png)",
        *([LOSSES + table("loss", losses(reader, case, paper, arguments.quick))] if arguments.losses else []),
        f"## Stated errors and flags\n\n{honesty(reader, case)}\n\n{speed(reader, case)}",
        f"## Augmentations\n\n{len(some.counts)} images, eight views.\n\n{table('change', robustness(reader, some))}",
        f"## Off the model\n\n{len(few.radius)} images, eight views; the median of the score and the share flagged POOR_FIT.\n\n"
        + table("images", off_model(reader, few), ("score", "flagged")),
        f"## Forward fitting\n\n{fits} images; simplexes of {STEPS} simulations from random starts, the best by the score; "
        "48 points, 48 slices for images and fit. "
        "The fit knows exactly how images are made, the network learned on a finer grid.\n\n"
        + table("method", comparison(reader, fits, starts, arguments.output / "icosahedra-fits.png"), ("cost",))
        + "\n\n![Errors of forward fitting](icosahedra-fits.png)",
    ]
    (arguments.output / "icosahedra.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

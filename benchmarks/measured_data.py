"""Data sets of `measured.py`: measurements, their operators, and what else is known of them.

Each function that returns a `DataSet` takes the number of noise draws for data that come without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.interpolate import make_smoothing_spline

from dsnet_bluesky.curvefiles import read_curve, read_profile
from dsnet_bluesky.data import curve, exposures_of
from dsnet_bluesky.smearing import Smearing

Floats = NDArray[np.floating[Any]]

JLDESMEAR = Path(__file__).parents[2] / "shared" / "realdata" / "jldesmear"
SASDATA = Path(str(resources.files("sasdata") / "example_data" / "1d_data"))

OVERSAMPLING = 20
"""A known curve is smeared on nodes closer than those of the methods by this."""

SERIES = 8
"""Curves taken of the in-situ series, evenly over its hours."""


@dataclass(frozen=True)
class Reference:
    """What a desmeared curve is compared with.

    Attributes
    ----------
    what
        Whose curve it is, in words.
    I
        Shape (k,).
    Idev
        One standard deviation of I, shape (k,): I counts where it exceeds three of them.
    function
        The exact curve at any q in 1/nm; None where nobody knows it.
    view
        What smears an answer before it is compared; None compares it point by point.
    upto
        Points above this q (1/nm) do not count.
    """

    what: str
    I: Floats
    Idev: Floats
    function: Callable[[Floats], Floats] | None = None
    view: Smearing | None = None
    upto: float = np.inf


@dataclass(frozen=True)
class Measurement:
    """Curves that share one operator, and what is known of them.

    Attributes
    ----------
    curves
        Dims (exposure, q): the measurement, or several draws of its noise.
    operator
        Builds the smearing operator, on a given q_calc or on its own (None).
    reference
        None where nothing is known: then only the re-smeared curve is judged.
    published
        Answers of other programs that come with the data, on the same q.
    options
        Of a method, by its name: what the file asks for.
    """

    curves: xr.Dataset
    operator: Callable[[Floats | None], Smearing]
    reference: Reference | None = None
    published: dict[str, Floats] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """Measurements that make one table."""

    title: str
    note: str
    measurements: list[Measurement]

    @property
    def slug(self) -> str:
        """Name for files."""
        return self.title.split(",")[0].lower().replace(" ", "-")


def smeared(function: Callable[[Floats], Floats], operator: Callable[[Floats | None], Smearing]) -> Floats:
    """Smear a known curve on nodes much closer than those that the methods invert with."""
    nodes = operator(None).q_calc
    steps = np.arange(OVERSAMPLING) / OVERSAMPLING
    fine = np.append((nodes[:-1, None] + np.diff(nodes)[:, None] * steps).ravel(), nodes[-1])
    return operator(fine).apply(function(fine))


def draws(q: Floats, I: Floats, Idev: Floats, count: int, first: int = 0) -> xr.Dataset:
    """Add normal noise of the stated size to a curve without noise, `count` times."""
    noise = np.array([np.random.default_rng(first + i).standard_normal(q.size) for i in range(count)])
    return curve(q, I + Idev * noise, np.broadcast_to(Idev, noise.shape))


def slit(q: Floats, length: float) -> Callable[[Floats | None], Smearing]:
    """Build operators of a slit of this half-length (1/nm)."""
    return lambda q_calc: Smearing.slit(q, length, q_calc=q_calc)


def pinhole(q: Floats, dq: Floats) -> Callable[[Floats | None], Smearing]:
    """Build operators of a pinhole whose standard deviation is dq (1/nm)."""
    return lambda q_calc: Smearing.pinhole(q, dq, q_calc=q_calc)


def exact(function: Callable[[Floats], Floats], q: Floats, Idev: Floats) -> Reference:
    """Make a reference of a curve that is known exactly; it counts where it exceeds the noise of the measurement."""
    return Reference("the exact curve", function(q), Idev, function)


def columns(name: str) -> tuple[Floats, Floats, Floats]:
    """Read a file of jldesmear: q in 1/nm, I, Idev."""
    q, I, Idev = np.loadtxt(JLDESMEAR / name, unpack=True)
    return 10 * q, I, Idev


def test1(seeds: int) -> DataSet:
    q, I, Idev = columns("test1.smr")
    _, I_reference, Idev_reference = columns("test1.dsm")
    reference = Reference("jldesmear's answer", I_reference, Idev_reference, upto=float(q[int(0.8 * q.size) - 1]))
    tail = {"extrapolation": "linear", "extrapolation_start": 0.8}
    note = (
        "Bonse-Hart USAXS, 250 points, slit of half-length 0.8 1/nm. The reference is no truth: it is Lake's method, 20 steps, "
        "as jldesmear published it with the data, with the noise of that, and lake is near it by kinship; the last fifth of the "
        "points hangs on its extrapolation and does not count. lake has jldesmear's tail (linear from 0.8 1/nm)."
    )
    one = Measurement(exposures_of(curve(q, I, Idev)), slit(q, 0.8), reference, options={"lake": tail})
    return DataSet("test1, measured USAXS (jldesmear)", note, [one])


def computed(name: str, own: bool, seeds: int) -> DataSet:
    """Take one of jldesmear's computed models as its file has it, or smear the same model exactly; draw the stated noise."""
    what, function, length, tail, note = MODELS[name]
    q, I, Idev = columns(f"{name}.smr")
    q_answer, I_answer, _ = columns(f"{name}.dl")
    operator = slit(q, length)
    if own:
        I = smeared(function, operator)
        Idev = I / 250
    one = Measurement(
        draws(q, I, Idev, seeds),
        operator,
        exact(function, q, Idev),
        published={} if own else {"jldesmear (.dl)": np.interp(q, q_answer, I_answer)},
        options={"lake": {"extrapolation": "power", "extrapolation_start": tail}},
    )
    how = OWN if own else "Smeared in 1989, not exactly: see chi2 of the re-smeared truth, and the next table."
    title = f"{name}{'-exact' if own else ''}, {what}{', smeared exactly' if own else ''} (jldesmear)"
    return DataSet(title, f"{note} Without noise in the file: its stated Idev (0.4 %) is drawn. {how}", [one])


def fringes(q: Floats) -> Floats:
    """Model 1 of jldesmear."""
    return np.sinc(4.4 * q / np.pi) ** 2


def power_law(q: Floats) -> Floats:
    """Model 2 of jldesmear."""
    return 1 / (1 + (20 * q) ** 4)


OWN = f"The truth is smeared by us, on nodes {OVERSAMPLING} times closer than any method's."

MODELS: dict[str, tuple[str, Callable[[Floats], Floats], float, float, str]] = {
    "model1": (
        "computed fringes",
        fringes,
        2.138,
        2.135,
        "(sin qr / qr)^2, r = 4.4 nm, 250 points, through a slit of half-length 2.138 1/nm (three fringes). Minima are zeros: "
        "what counts lies above three Idev of the smeared curve.",
    ),
    "model2": (
        "computed power law",
        power_law,
        3.75,
        2.25,
        "1 / (1 + (qr)^4), r = 20 nm, 64 points on a logarithmic grid, through a slit of half-length 3.75 1/nm, longer than the "
        "record.",
    ),
}
"""Title, curve, half-length of the slit, start of Lake's tail (1/nm, from model.txt) and a word about it."""


def alumina(size: str, seeds: int) -> DataSet:
    q, I, Idev = columns(f"al2o3_{size}.smr")
    keep = (q > 1e-3) & (I > 0) & (Idev > 0)
    measured = exposures_of(curve(q[keep], I[keep], Idev[keep]))
    note = "Measured USAXS of alumina powder, slit of half-length 0.3865 1/nm. No reference."
    if size == "1um":
        note += (
            " sasdata's Alumina_usaxs.csv looks like its desmeared counterpart (the same q, shifted by 7e-5 1/nm) and is none: "
            "smeared by this slit it misses the measurement by 19 % rms after a free scale and background."
        )
    return DataSet(f"al2o3-{size}, measured USAXS (jldesmear)", note, [Measurement(measured, slit(q[keep], 0.3865))])


def latex() -> tuple[xr.Dataset, xr.Dataset]:
    """Read the two curves of one latex, by slit USANS and by pinhole SANS."""
    path = SASDATA / "latex_smeared.xml"
    usans, sans = read_curve(path, entry="latex_usans"), read_curve(path, entry="latex_sans", sort=True)
    return exposures_of(usans), exposures_of(sans)


def latex_usans(seeds: int) -> DataSet:
    usans, sans = latex()
    q, both = usans["q"].values, sans.isel(q=sans["q"].values < usans["q"].values[-1])
    view = Smearing.pinhole(both["q"].values, both["Qdev"].values[0], q_calc=q)
    reference = Reference("the SANS curve", both["I"].values[0], both["Idev"].values[0], view=view)
    note = (
        f"Latex of 0.5 um by slit USANS (half-length 1.17 1/nm). The reference is the pinhole SANS curve of the same latex where "
        f"both see it, {both.sizes['q']} points from {both['q'].values[0]:.3g} to {both['q'].values[-1]:.3g} 1/nm: the desmeared "
        "curve is smeared by the pinhole's own dQ (a fifth to a quarter of q there) and then compared, so that no method's "
        "answer to the SANS curve is preferred. The errors of the USANS points there are 20 %. Methods as different as lake, map "
        "and ift agree with each other and stand off the SANS curve in the same direction at all points: that says more about "
        "the data next to the pinhole's beamstop (its dQ taken as a Gaussian, the two calibrations) than about the methods."
    )
    return DataSet("latex-usans, measured, against pinhole SANS (sasdata)", note, [Measurement(usans, slit(q, 1.17), reference)])


def latex_sans(seeds: int) -> DataSet:
    usans, sans = latex()
    q, both = sans["q"].values, usans.isel(q=usans["q"].values > sans["q"].values[0])
    view = Smearing.slit(both["q"].values, 1.17, q_calc=q)
    reference = Reference("the USANS curve", both["I"].values[0], both["Idev"].values[0], view=view)
    note = (
        f"The other way round: the pinhole SANS curve (dQ from its file), desmeared, then smeared by the slit and compared with "
        f"the {both.sizes['q']} USANS points that it reaches. Two points out of order were merged."
    )
    operator = pinhole(q, sans["Qdev"].values[0])
    return DataSet("latex-sans, measured, against slit USANS (sasdata)", note, [Measurement(sans, operator, reference)])


def series(seeds: int) -> DataSet:
    with h5py.File(SASDATA / "VTMA.h5") as file:
        names = sorted((str(name) for name in file if str(name).endswith("_mrg")), key=minutes)
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, SERIES).astype(int)]
        found = [series_curve(file[name], seed) for seed, name in enumerate(chosen)]
    note = (
        "In-situ USAXS of a sample held at 870 C (VTMA.h5, 240 curves). Its metadata (Wname DSM_Int, SlitLength 0.02343 "
        f"1/angstrom) say that these curves were desmeared before they were stored. So {SERIES} of its 70 curves that are merged "
        "with pinhole SAXS, evenly over five hours, are made smooth (a spline of ln I over ln q, within their stated errors), "
        "serve as the truth, are smeared by the slit they came through (half-length 0.2343 1/nm) and get 1 % of noise; the record"
        " ends at 2.6 1/nm, and the truth goes on. Nine decades of intensity."
    )
    return DataSet("vtma, in-situ USAXS smeared again (sasdata)", note, found)


def minutes(name: str) -> int:
    """How long after the start of the series a curve was taken."""
    return int(name.split("_")[3].removesuffix("min"))


def series_curve(entry: Any, seed: int) -> Measurement:
    """Smear one merged curve of the series by the slit that its own half was measured with."""
    group = next(iter(entry[name] for name in entry if name.startswith("VTMA")))
    q, I = 10 * group["Q"][()], group["I"][()]
    spline = make_smoothing_spline(np.log(q[I > 0]), np.log(I[I > 0]), lam=3e-4)

    def function(x: Floats) -> Floats:
        return np.exp(spline(np.log(np.clip(x, q[0], q[-1]))))

    measured = q[q < 2.6]
    operator = slit(measured, 0.2343)
    ideal = smeared(function, operator)
    noisy = draws(measured, ideal, 0.01 * ideal, 1, first=seed)
    return Measurement(noisy, operator, exact(function, measured, 0.01 * ideal))


def saxsess(seeds: int) -> DataSet:
    lines = read_curve(SASDATA / "saxess_example.pdh")
    keep = lines.sizes["q"] // 4 * 4
    q, I = (lines[name].values[:keep].reshape(-1, 4).mean(axis=1) for name in ("q", "I"))
    q = np.linspace(q[0], q[-1], q.size)  # even to the digits of the file, which Wiener's filter asks for
    profile = read_profile(SASDATA / "beam profile.DAT")

    def operator(q_calc: Floats | None) -> Smearing:
        return Smearing.slit(q, 0.0, profile=profile, q_calc=q_calc)

    note = (
        "A laboratory line camera (SAXSess) with its measured slit-length profile, to 3.6 1/nm. Points of its image plate are "
        "interpolated: four are averaged, and Idev is estimated from the scatter (the file's is 85 % of every point). No "
        "reference."
    )
    options = {"lake": {"extrapolation": "constant"}}
    measured = exposures_of(curve(q, I, units="1"))
    return DataSet("saxsess, measured with a line camera (sasdata)", note, [Measurement(measured, operator, options=options)])


def spheres(q: Floats, radius: float) -> Floats:
    """Silica in heavy water as SasView's files have it, in 1/cm: 1 % by volume, contrast 2.2e-6 / angstrom^2; radius in nm."""
    x = np.maximum(q * radius, 1e-3)
    volume = 4 / 3 * np.pi * (10 * radius) ** 3
    return 1e8 * 0.01 * volume * 2.2e-6**2 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


def sasview(name: str, radius: float, own: bool, seeds: int) -> DataSet:
    """Take SasView's smeared spheres as the file has them, or smear the same spheres exactly, and draw the stated noise."""
    file = read_curve(SASDATA / name)
    q, I, Idev = (file[column].values for column in ("q", "I", "Idev"))
    operator = slit(q, 1.17) if "dQl" in file else pinhole(q, file["Qdev"].values)
    function = partial(spheres, radius=radius)
    if own:
        I = smeared(function, operator)
        Idev = 0.01 * I
    how = "a slit of half-length 1.17 1/nm" if "dQl" in file else "a pinhole with dQ/Q = 0.15"
    note = f"Silica spheres of radius {radius:g} nm through {how}, 150 points on a logarithmic grid, 1 % errors, drawn. " + (
        OWN
        if own
        else "Smeared by SasView 5.0.1, whose own integral is not exact: see chi2 of the re-smeared truth, and the next table."
    )
    title = f"sphere-{2 * radius:g}nm{'-exact' if own else ''}, {'smeared exactly' if own else f'{name} as it is'} (sasdata)"
    return DataSet(title, note, [Measurement(draws(q, I, Idev, seeds), operator, exact(function, q, Idev))])


USAXS: list[Callable[[int], DataSet]] = [
    test1,
    *(partial(computed, name, own) for name in MODELS for own in (False, True)),
    partial(alumina, "1um"),
    partial(alumina, "50nm"),
]
"""Data of `../shared/realdata`."""

SPHERES = [("1umSlitSmearSphere.ABS", 500.0), ("100nmPinholeSphere.txt", 50.0)]

BUNDLED: list[Callable[[int], DataSet]] = [
    latex_usans,
    latex_sans,
    series,
    saxsess,
    *(partial(sasview, name, radius, own) for name, radius in SPHERES for own in (False, True)),
]
"""Data of the sasdata wheel."""

QUICK = [latex_usans, BUNDLED[-1]]
"""For a smoke test."""

"""Figures: what is drawn is what is in the Dataset, and pyplot is left alone."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from dsnet_bluesky import plots
from dsnet_bluesky.data import BadInput, concat_exposures, curve, failed_exposure
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.05, 3, 80)


def result(scale=1.0, q=Q):
    truth = scale * (np.exp(-(q**2)) + 1e-3)
    values = {"I": truth, "Idev": 0.05 * truth, "I_smeared": 1.1 * truth, "Idev_smeared": 0.1 * truth, "I_resmeared": truth}
    dataset = xr.Dataset({name: ("q", v, {"units": "1/cm"}) for name, v in values.items()}, coords={"q": q})
    dataset["chi2"], dataset["status"] = 1.0, "ok"
    return dataset.assign_attrs(title="a sphere")


def series(count):
    return concat_exposures([result(k + 1.0).expand_dims("exposure") for k in range(count)])


def psf():
    y = x = np.linspace(-1e-3, 1e-3, 21)
    beam = np.exp(-(y[:, None] ** 2 + x**2) / 2e-7)
    rho = np.linspace(0.001, 0.1, 30)
    return xr.Dataset(
        {"beam": (("y", "x"), beam / beam.sum()), "p": ("rho", rho * np.exp(-(rho**2) / 8e-4)), "counts": 1e6, "sigma": 0.02},
        coords={"y": y, "x": x, "rho": rho},
    )


FIGURES = {
    "result": lambda: plots.plot_result(result()),
    "series": lambda: plots.plot_result(series(3)),
    "long series": lambda: plots.plot_result(series(9)),
    "residuals": lambda: plots.plot_residuals(series(2)),
    "operator": lambda: plots.plot_operator(Smearing.rice(Q, 0.05)),
    "slit": lambda: plots.plot_operator(Smearing.slit(Q, 0.4)),
    "identity": lambda: plots.plot_operator(Smearing.identity(Q)),
    "psf": lambda: plots.plot_psf(psf()),
    "comparison": lambda: plots.plot_comparison(
        {"4.0 x 2.5 mm": result(), "0.8 x 0.5 mm": result(1.1)}, truth=result(), title="AgBh"
    ),
    "comparison of grids": lambda: plots.plot_comparison({"a": result(), "b": result(q=Q[5:])}, q_scale="log"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_written_and_has_its_labels(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert figure.dpi == 150
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    bottom = [ax for ax in figure.axes if ax.get_xlabel()]
    assert bottom
    assert all("nm" in ax.get_xlabel() or "mm" in ax.get_xlabel() for ax in bottom)


def test_the_curves_are_those_of_the_dataset():
    dataset = result()
    curves, residuals = plots.plot_result(dataset).axes
    drawn = [line.get_ydata() for line in curves.get_lines()]
    for name in ("I", "I_smeared", "I_resmeared"):
        assert any(len(y) == len(Q) and np.allclose(y, dataset[name]) for y in drawn)
    assert (curves.get_xscale(), curves.get_yscale()) == ("log", "log")
    assert curves.get_legend().get_texts()[0].get_text() == "measured"
    assert "1.00" in curves.get_legend().get_title().get_text()
    points = next(line for line in residuals.get_lines() if len(line.get_ydata()) == len(Q))
    assert_allclose(points.get_ydata(), 1.0)


def test_units_are_written_as_powers():
    curves = plots.plot_result(result()).axes[0]
    assert curves.get_ylabel() == "$I$ / cm$^{-1}$"
    dataset = result()
    dataset["I"].attrs["units"] = "1"
    assert plots.plot_result(dataset).axes[0].get_ylabel() == "$I$ / arb. units"


def test_it_draws_on_given_axes():
    figure = Figure()
    ax = figure.subplots()
    assert plots.plot_result(result(), ax, title="mine") is figure
    assert figure.axes == [ax]
    assert (ax.get_title(), ax.get_xlabel()) == ("mine", plots.Q_LABEL)


def test_colours_can_be_told_apart_and_truth_is_black():
    left, right = plots.plot_comparison({str(k): result(k + 1.0) for k in range(4)}, truth=result()).axes
    colours = [line.get_color() for line in right.get_lines()]
    assert colours[:4] == list(plots.CYCLE[:4])
    assert same_color(colours[4], "black")
    assert [line.get_color() for line in left.get_lines()] == colours


def test_failed_exposures_are_left_out():
    dataset = concat_exposures([result().expand_dims("exposure"), failed_exposure(result())])
    assert len(plots.plot_result(dataset).axes) == 2
    with pytest.raises(BadInput, match="nothing to plot"):
        plots.plot_result(failed_exposure(result()))


def test_negative_intensities_and_zero_q(tmp_path):
    dataset = result(q=np.linspace(0, 3, 50))
    dataset["I"][10:12] = -1.0
    dataset["I_smeared"][20] = 0.0
    figure = plots.plot_result(dataset)
    assert figure.axes[0].get_xscale() == "linear"
    figure.savefig(tmp_path / "figure.png")
    dataset["I"][:], dataset["I_smeared"][:] = -1.0, -1.0
    with pytest.raises(BadInput, match="logarithmic"):
        plots.plot_result(dataset)


def test_what_cannot_be_plotted():
    with pytest.raises(BadInput, match="not the result of desmear"):
        plots.plot_result(curve(Q, np.exp(-Q), np.ones(80)))
    with pytest.raises(BadInput, match="no result to compare"):
        plots.plot_comparison({})


def test_pyplot_is_not_imported():
    code = "import dsnet_bluesky.plots, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

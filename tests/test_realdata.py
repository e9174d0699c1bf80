"""Measured data, and data of other programs, desmeared.

The files of jldesmear (P. R. Jemian, Argonne) lie outside the repository, in
`<repository>/../shared/realdata`; those tests are skipped where it is absent. The files
that come with sasdata are always there. Files are in 1/angstrom unless said otherwise.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dsnet_bluesky.data import BadInput, Flag, curve
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.smearing import Smearing

JLDESMEAR = Path(__file__).parents[2] / "shared" / "realdata" / "jldesmear"
SASDATA = resources.files("sasdata") / "example_data" / "1d_data"

needs_jldesmear = pytest.mark.skipif(not JLDESMEAR.is_dir(), reason=f"no reference data of jldesmear at {JLDESMEAR}")


def spheres(q, radius, volume_fraction=0.01, contrast=2.2e-6):
    """Dilute spheres in 1/cm: q in 1/nm, radius in nm, contrast in 1/angstrom^2."""
    x = q * radius
    volume = 4 / 3 * np.pi * (10 * radius) ** 3
    return 1e8 * volume_fraction * volume * contrast**2 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


def minima(q, I, count):
    """Where a curve has its first `count` local minima."""
    inner = (I[1:-1] < I[:-2]) & (I[1:-1] < I[2:])
    return q[1:-1][inner][:count]


def log_ratio(result: xr.Dataset, truth) -> np.ndarray:
    return np.abs(np.log(result["I"].values / truth))


@needs_jldesmear
class TestJLdesmear:
    LENGTH, START = 0.8, 0.8
    OPTIONS = {"iterations": 20, "extrapolation": "linear", "extrapolation_start": START}  # noqa: RUF012

    @pytest.fixture(scope="class")
    def measured(self) -> xr.Dataset:
        """Bonse-Hart USAXS; its q is ascending, with neighbours from overlapping scans as close as 4e-6."""
        q, I, Idev = np.loadtxt(JLDESMEAR / "test1.smr", unpack=True)
        return curve(10 * q, I, Idev)

    @pytest.fixture(scope="class")
    def reference(self):
        return np.loadtxt(JLDESMEAR / "test1.dsm", usecols=1)

    def test_lake_with_the_exact_slit(self, measured, reference):
        """Same iteration, better integral: neighbouring noisy points differ, and the curve does not."""
        result = desmear(measured, Smearing.slit(measured["q"], self.LENGTH), "lake", **self.OPTIONS)
        ratio = result["I"].values / reference
        first = slice(0, int(0.8 * ratio.size))
        assert np.median(ratio) == pytest.approx(1, abs=0.002)
        assert np.quantile(np.abs(ratio[first] - 1), 0.9) < 0.03
        assert np.abs(ratio[first] - 1).max() < 0.08
        # Over five points the noise averages out.
        smooth = np.convolve(ratio[first] - 1, np.full(5, 0.2), mode="valid")
        assert np.abs(smooth).max() < 0.03
        # jldesmear's chi2 at its 19th step, printed in its documentation, is 46.9 for 250 points.
        nineteen = desmear(measured, Smearing.slit(measured["q"], self.LENGTH), "lake", **{**self.OPTIONS, "iterations": 19})
        assert float(nineteen["chi2"]) == pytest.approx(46.9 / 250, rel=0.1)

    def test_lake_with_the_integral_of_jldesmear(self, measured, reference):
        """With its own trapezoids over 250 points of l the published result comes out, point by point."""
        q = measured["q"].values
        result = desmear(measured, jldesmear_slit(q, self.LENGTH), "lake", **self.OPTIONS)
        ratio = result["I"].values / reference
        first = slice(0, int(0.8 * ratio.size))
        assert np.median(ratio) == pytest.approx(1, abs=0.0005)
        assert np.abs(ratio[first] - 1).max() < 0.005

    def test_other_methods_agree(self, measured, reference):
        result = desmear(measured, Smearing.slit(measured["q"], self.LENGTH), "map")
        ratio = result["I"].values / reference
        assert np.median(ratio) == pytest.approx(1, abs=0.01)
        assert float(result["chi2"]) < 2

    def test_model1_against_its_truth(self):
        """(sin x / x)^2 through a slit seven fringes long."""
        q, I, Idev = np.loadtxt(JLDESMEAR / "model1.smr", unpack=True)
        truth = np.loadtxt(JLDESMEAR / "model1.pin", usecols=1)
        radius, q = 4.4, 10 * q
        slit = Smearing.slit(q, 2.138)
        high = truth > 0.1 / (1 + (q * radius) ** 2)
        cases = [
            ("lake", {"smoothing": 1, "extrapolation_start": 2.135}, 0.08),
            ("map", {}, 0.06),
            ("ift", {}, 0.01),
        ]
        for method, options, tolerance in cases:
            result = desmear(curve(q, I, Idev), slit, method, **options)
            error = log_ratio(result, np.maximum(truth, 1e-6))[high]
            assert np.quantile(error, 0.75) < tolerance, method
            found = minima(q, result["I"].values, 3) * radius / np.pi
            np.testing.assert_allclose(found, [1, 2, 3], atol=0.04, err_msg=method)

    @pytest.mark.parametrize("name", ["al2o3_1um", "al2o3_50nm"])
    def test_alumina(self, name):
        """Measured over five decades; below 1e-3 1/nm the direct beam is part of it."""
        q, I, Idev = np.loadtxt(JLDESMEAR / f"{name}.smr", unpack=True)
        keep = (q > 1e-4) & (I > 0) & (Idev > 0)
        measured = curve(10 * q[keep], I[keep], Idev[keep])
        result = desmear(measured, Smearing.slit(measured["q"], 0.3865), "map")
        assert (result["I"] > 0).all()
        assert np.isfinite(result["Idev"]).all()
        assert float(result["I"][5]) > 10 * float(measured["I"][5])


def jldesmear_slit(q, length) -> Smearing:
    """Build jldesmear's integral: trapezoids over as many l as there are points, spaced like them."""
    l = length * (q - q[0]) / (q[-1] - q[0])
    weights = np.concatenate([[np.diff(l)[0]], l[2:] - l[:-2], [np.diff(l)[-1]]]) / (2 * length)
    u = np.hypot(q[:, None], l)
    fine = np.interp(np.arange(8 * q.size - 7) / 8, np.arange(q.size), q)
    nodes = np.concatenate([fine, np.linspace(q[-1], u.max() * 1.001, 60)[1:]])
    left = np.searchsorted(nodes, u, side="right") - 1
    share = (u - nodes[left]) / (nodes[left + 1] - nodes[left])
    matrix = np.zeros((q.size, nodes.size))
    rows = np.arange(q.size)[:, None]
    np.add.at(matrix, (rows, left), weights * (1 - share))
    np.add.at(matrix, (rows, left + 1), weights * share)
    return Smearing(q, nodes, matrix, kind="jldesmear")


class TestLatex:
    """The same 0.5 um latex by pinhole SANS and by slit USANS (dQl = 0.117 1/angstrom)."""

    @pytest.fixture(scope="class")
    def entries(self):
        from sasdata.dataloader.loader import Loader

        return Loader().load(str(SASDATA / "latex_smeared.xml"))

    @pytest.fixture(scope="class")
    def usans(self, entries):
        data = entries[1]
        assert data.dxl[0] == pytest.approx(0.117)
        return curve(10 * data.x, data.y, data.dy)

    @pytest.fixture(scope="class")
    def slit(self, usans):
        return Smearing.slit(usans["q"], 1.17)

    @pytest.fixture(scope="class")
    def sans(self, entries):
        """The SANS curve joins two settings that overlap: the points are out of order, and two q occur twice."""
        data = entries[0]
        with pytest.raises(BadInput, match="Sort the points and merge repeated ones"):
            curve(10 * data.x, data.y, data.dy)
        _, first = np.unique(data.x, return_index=True)
        return curve(10 * data.x[first], data.y[first], data.dy[first], Qdev=10 * data.dx[first])

    def test_usans(self, usans, slit):
        result = desmear(usans, slit, "map")
        assert float(result["chi2"]) < 1.3
        assert int(result["flags"]) == Flag.EXTRAPOLATED
        # Guinier's radius of a sphere of 0.25 um is 0.194 um.
        q, I, Idev = (result[name].values for name in ("q", "I", "Idev"))
        low = (q > 0.001) & (q < 0.005)
        slope = np.polyfit(q[low] ** 2, np.log(I[low]), 1, w=I[low] / Idev[low])[0]
        assert np.sqrt(-3 * slope) == pytest.approx(np.sqrt(3 / 5) * 250, rel=0.1)

    def test_ift_finds_its_size(self, usans, slit):
        """The latex is not monodisperse: its largest dimension lies above the mean diameter of 500 nm."""
        result = desmear(usans, slit, "ift")
        assert float(result["chi2"]) < 1.5
        assert 480 < result["diameter"] < 720

    def test_slit_and_pinhole_agree(self, usans, slit, sans):
        """Where both see the latex, the measured curves differ fifty times, and the desmeared ones do not."""
        by_slit = desmear(usans, slit, "map")
        by_pinhole = desmear(sans, Smearing.pinhole(sans["q"], sans["Qdev"]), "map")
        both = np.geomspace(0.045, 0.055, 20)
        logs = {
            (name, variable): np.interp(both, result["q"], np.log(result[variable]))
            for name, result in {"slit": by_slit, "pinhole": by_pinhole}.items()
            for variable in ("I", "I_smeared")
        }
        measured = np.mean(logs["pinhole", "I_smeared"] - logs["slit", "I_smeared"])
        desmeared = np.mean(logs["pinhole", "I"] - logs["slit", "I"])
        assert measured > np.log(30)
        assert abs(desmeared) < np.log(1.4)

    def test_sans_resmears(self, sans):
        result = desmear(sans, Smearing.pinhole(sans["q"], sans["Qdev"]), "map")
        assert float(result["chi2"]) < 1.3
        assert float(result["I"][0]) < float(sans["I"][0])


class TestComputedBySasView:
    """Silica spheres, smeared by SasView, with 1 % errors: the truth is known."""

    def test_slit_of_usans(self):
        """1 um, half-length 0.117 1/angstrom: desmearing spans three decades of intensity."""
        q, I, Idev = np.loadtxt(SASDATA / "1umSlitSmearSphere.ABS", skiprows=12, usecols=(0, 1, 2)).T
        q = 10 * q
        truth = spheres(q, 500.0)
        slit = Smearing.slit(q, 1.17)
        assert np.median(np.log(truth / I)[:40]) > np.log(100)
        for method, tolerance in (("map", 0.04), ("ift", 0.02)):
            result = desmear(curve(q, I, Idev), slit, method)
            assert np.median(log_ratio(result, truth)) < tolerance
            assert float(result["chi2"]) < 1.3
        # Its minima fall on the points of the grid that are nearest to the roots of tan x = x.
        np.testing.assert_allclose(minima(q, result["I"].values, 5), minima(q, truth, 5))
        assert result["diameter"] == pytest.approx(1000, rel=0.05)
        assert minima(q, I, 1)[0] < minima(q, truth, 1)[0]

    def test_pinhole_of_15_per_cent(self):
        """100 nm at dQ/Q = 0.15: the beam leaves two of some fifty minima, and the size is still found."""
        q, I, Idev, dq = np.loadtxt(SASDATA / "100nmPinholeSphere.txt", skiprows=12, unpack=True)
        q, dq = 10 * q, 10 * dq
        pinhole = Smearing.pinhole(q, dq)
        result = desmear(curve(q, I, Idev), pinhole, "ift")
        assert float(result["chi2"]) < 1.3
        assert result["diameter"] == pytest.approx(100, rel=0.07)
        np.testing.assert_allclose(minima(q, result["I"].values, 3) * 50, [4.493, 7.725, 10.904], rtol=0.04)
        by_map = desmear(curve(q, I, Idev), pinhole, "map")
        assert float(by_map["chi2"]) < 1.3
        beyond = q > 0.06
        assert minima(q[beyond], by_map["I"].values[beyond], 1)[0] * 50 == pytest.approx(4.493, rel=0.04)


class TestSAXSess:
    """A laboratory line camera: curve and slit-length profile as measured, in 1/nm."""

    REBIN = 4

    @pytest.fixture(scope="class")
    def profile(self):
        lines = (SASDATA / "beam profile.DAT").read_text().split("\n")
        rows = [line.split() for line in lines if line.strip()]
        count = int(rows[1][0])
        l, weight = np.array([row[:2] for row in rows[4 : 4 + count]], dtype=float).T
        assert weight[0] == 1
        assert l[-1] == pytest.approx(3.6211)
        return l, weight

    @pytest.fixture(scope="class")
    def measured(self):
        """The points of the image plate are interpolated and their noise is correlated: average four.

        The errors in the file (85 % of every point) are not those of the scatter, which is 5 to 10 %.
        """
        lines = (SASDATA / "saxess_example.pdh").read_text().splitlines()
        count = int(lines[2].split()[0])
        q, I, _ = np.array([line.split() for line in lines[5 : 5 + count]], dtype=float).reshape(-1, self.REBIN, 3).mean(1).T
        return curve(q, I, units="")

    @pytest.mark.parametrize("method", ["lake", "map"])
    def test_profile_desmears(self, measured, profile, method):
        options = {"extrapolation": "constant"} if method == "lake" else {}
        result = desmear(measured, Smearing.slit(measured["q"], 0, profile=profile), method, **options)
        assert float(result["chi2"]) < 1.5
        assert int(result["flags"]) & int(Flag.NOISE_ESTIMATED)
        gain = (result["I"] / result["I_smeared"]).values
        q = measured["q"].values
        # A slit does not change a flat background, and it hides most of the primary beam's foot.
        assert np.median(gain[(q > 1) & (q < 4.5)]) == pytest.approx(1, abs=0.1)
        assert np.median(gain[(q > 0.1) & (q < 0.2)]) > 5

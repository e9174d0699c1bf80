"""NXcanSAS files: what sasdata, silx and we ourselves read back."""

import json
import re

import h5py
import numpy as np
import pytest
import silx.io
import silx.io.nxdata
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from sasdata.dataloader.loader import Loader

from dsnet_bluesky.curvefiles import read_curve, smearing_for
from dsnet_bluesky.data import RESULT_VARIABLES, BadInput, concat_exposures, curve, failed_exposure, join_answers
from dsnet_bluesky.export import check_target, of_curves, to_nxcansas, write
from dsnet_bluesky.smearing import Smearing

Q = np.linspace(0.05, 2, 60)


def result(scale=1.0, **attrs):
    """A desmeared Dataset with a value of its own in every variable."""
    values = {name: scale * (index + 1 + np.exp(-(Q**2))) for index, name in enumerate(RESULT_VARIABLES)}
    variables = {name: ("q", v, {"units": "1/nm" if name == "Qdev" else "1/cm"}) for name, v in values.items()}
    dataset = xr.Dataset(variables, coords={"q": ("q", Q, {"units": "1/nm"})})
    dataset["chi2"], dataset["flags"], dataset["status"] = 1.25, 4, "ok"
    return dataset.assign_attrs({"method": "lake", "options": '{"iterations": 3}', "title": "latex", **attrs})


def text(dataset):
    return dataset[()].decode()


class TestRoundTrip:
    def test_sasdata(self, tmp_path):
        dataset = result()
        path = to_nxcansas(dataset, tmp_path / "out.h5", sample="spheres", smearing=Smearing.gaussian(Q, 0.02))
        desmeared, smeared = Loader().load(str(path))
        for data, I, Idev in ((desmeared, "I", "Idev"), (smeared, "I_smeared", "Idev_smeared")):
            assert not data.errors
            assert data.x_unit == "A^{-1}"
            assert data.y_unit == "cm^{-1}"
            assert_allclose(data.x, Q / 10)
            assert_allclose(data.y, dataset[I])
            assert_allclose(data.dy, dataset[Idev])
        assert_allclose(desmeared.dx, dataset["Qdev"] / 10)
        assert_allclose(smeared.dx, 0.02 / 10)
        assert smeared.title == "latex"
        assert smeared.sample.name == "spheres"

    def test_terms_come_back(self, tmp_path):
        process = {"raw_uid": "abc", "versions": {"numpy": "2"}, "config": {"bins": 500}, "note": None}
        path = to_nxcansas(result(), tmp_path / "out.h5", process=process)
        (step,) = Loader().load(str(path))[0].process
        assert step.name == "desmear"
        assert step.term == [
            "chi2 = 1.25",
            "flags = 4",
            "flags_meaning = NOISE_ESTIMATED",
            "method = lake",
            'options = {"iterations": 3}',
            "raw_uid = abc",
            'versions = {"numpy": "2"}',
            'config = {"bins": 500}',
            "note = null",
        ]
        with h5py.File(path) as file:
            assert text(file["sasentry01/run"]) == "abc"
            assert file["sasentry01/sasprocess01/term04"].attrs["name"] == "method"
            assert text(file["sasentry01/sasprocess01/program"]) == "dsnet-bluesky"
            assert file["sasentry01/sasprocess01/sequence_index"][()] == 1

    def test_how_it_went_is_told_for_each_exposure(self, tmp_path):
        rows = [result().assign(answer=word, chi2_network=chi2) for word, chi2 in (("ift", 12.5), ("network", 1.0))]
        path = to_nxcansas(concat_exposures([row.expand_dims("exposure") for row in rows]), tmp_path / "out.h5")
        for entry, told in zip(
            Loader().load(str(path))[::2],
            (["answer = ift", "chi2_network = 12.5"], ["answer = network", "chi2_network = 1"]),
            strict=True,
        ):
            assert entry.process[0].term[2:4] == told

    def test_slit_length_and_width_are_not_swapped(self, tmp_path):
        path = to_nxcansas(result(), tmp_path / "out.h5", smearing=Smearing.slit(Q, 0.4, 0.03))
        smeared = Loader().load(str(path))[1]
        assert_allclose(smeared.dxl, 0.04)
        assert_allclose(smeared.dxw, 0.003)
        again = read_curve(path, entry="sasentry01/smeared")
        assert_allclose(again["dQl"], 0.4)
        assert smearing_for(again).digest == Smearing.slit(Q, 0.4, 0.03).digest
        with h5py.File(path) as file:
            assert list(file["sasentry01/smeared/Q"].attrs["resolutions"].astype(str)) == ["dQw", "dQl"]

    @pytest.mark.parametrize("form", ["normal", "trapezium"])
    def test_a_measured_profile_comes_back_as_the_uniform_slit_nearest_to_it(self, tmp_path, form):
        l = np.linspace(-1, 1, 201)
        weight = np.exp(-(l**2) / (2 * 0.1**2)) if form == "normal" else np.clip(1.5 - np.abs(l) / 0.2, 0, 1)
        smearing = Smearing.slit(Q, 0, profile=(l, weight))
        path = to_nxcansas(result(), tmp_path / "out.h5", smearing=smearing)
        again = smearing_for(read_curve(path, entry="sasentry01/smeared"))
        assert_allclose(again.parameters["length"], np.sqrt(3 * weight @ l**2 / weight.sum()), rtol=1e-3)
        for truth in (lambda q: q**2, lambda q: np.exp(-(q**2)), lambda q: 1 / (1 + (3 * q) ** 2) ** 2):
            assert_allclose(again.apply(truth(again.q_calc)), smearing.apply(truth(smearing.q_calc)), rtol=0.02)
        with h5py.File(path) as file:
            assert_array_equal(file["sasentry01/smeared/R"][()], smearing.matrix)

    @pytest.mark.parametrize("q", [np.linspace(0.02, 3, 250), np.geomspace(0.01, 3, 120)], ids=["linear", "log"])
    @pytest.mark.parametrize("dq", [lambda q: np.full_like(q, 0.001), lambda q: 0.02 * q, lambda q: 0.05 * q])
    def test_the_resolution_of_a_file_that_was_desmeared_stays_what_it_was(self, tmp_path, q, dq):
        measured = curve(q, np.exp(-q), np.full(q.size, 0.1), Qdev=dq(q))
        path = to_nxcansas(measured, tmp_path / "out.h5", smearing=smearing_for(measured))
        assert_allclose(read_curve(path)["Qdev"], dq(q), rtol=0.01)

    def test_the_grid_is_not_part_of_a_resolution_that_follows_from_the_operator(self, tmp_path):
        beam = Smearing.gaussian(Q, 0.04)

        def again(smearing):
            return read_curve(to_nxcansas(result(), tmp_path / "out.h5", smearing=smearing, overwrite=True), entry=2)

        for smearing in (Smearing.rice(Q, 0.04), beam @ Smearing.identity(beam.q_calc)):
            assert_allclose(again(smearing)["Qdev"][10:], 0.04, rtol=0.01)
        assert_allclose(again(Smearing.wavelength(Q, 0.05))["Qdev"][20:], 0.05 * Q[20:], rtol=0.03)
        # A beam far below a step leaves zeros, which stand for no column.
        assert "Qdev" not in again(Smearing.rice(Q, 0.001))

    def test_our_own_reader(self, tmp_path):
        path = to_nxcansas(result(sample={"name": "latex"}), tmp_path / "out.h5")
        with pytest.raises(BadInput, match="1 = sasentry01/desmeared, 2 = sasentry01/smeared"):
            read_curve(path)
        again = read_curve(path, entry=1)
        assert_array_equal(again["q"], Q)
        assert_array_equal(again["I"], result()["I"])
        assert_array_equal(again["Qdev"], result()["Qdev"])
        assert again["I"].attrs["units"] == "1/cm"
        assert (again.attrs["title"], again.attrs["sample"]) == ("latex", "latex")

    def test_columns_come_back_whatever_their_head_tells(self, tmp_path):
        why = "I is not finite at 1 points (first at q = 0.1038 1/nm); remove those points."
        contents = of_curves(result(), process={"note": "sigma 0.04 1/nm", "failed_exposures": f"2 ({why})"})
        again = read_curve(write([contents], tmp_path / "out.txt", "columns"))
        assert again.attrs["q_units_from"] == "file"
        for name in ("q", "I", "Idev", "Qdev"):
            assert_allclose(again[name], result()[name], rtol=1e-14)

    @pytest.mark.parametrize("slit", [{"dQl": 0.4}, {"dQl": 0.4, "dQw": 0.03}, {"dQw": 0.03}])
    def test_columns_keep_the_slit_of_a_curve_that_nobody_desmeared(self, tmp_path, slit):
        plain = curve(Q, np.exp(-Q), np.full(60, 0.1)).assign({name: ("q", np.full(60, value)) for name, value in slit.items()})
        again = read_curve(write([of_curves(plain)], tmp_path / "out.txt", "columns"))
        assert_allclose([again[name][0] for name in slit], list(slit.values()))
        told = smearing_for(again).parameters
        assert (told["length"], told["width"]) == pytest.approx((slit.get("dQl", 0), slit.get("dQw", 0)))

    def test_columns_only_tell_of_a_slit_that_changes(self, tmp_path):
        plain = curve(Q, np.exp(-Q), np.full(60, 0.1)).assign(dQl=("q", np.full(60, 0.4)), dQw=("q", 0.1 * Q))
        path = write([of_curves(plain)], tmp_path / "out.txt", "columns")
        assert re.search(r"# dQw .*: 0\.0005\d* to 0\.02\d* 1/angstrom", path.read_text())
        assert not {"dQl", "dQw"} & set(read_curve(path))

    def test_silx_draws_the_desmeared_curve(self, tmp_path):
        path = to_nxcansas(result(), tmp_path / "out.h5")
        with silx.io.open(str(path)) as file:
            plot = silx.io.nxdata.get_default(file)
            assert plot.is_valid
            assert plot.group.name == "/sasentry01/desmeared"
            assert_array_equal(plot.signal[()], result()["I"])
            assert_array_equal(plot.axes[0][()], Q)
            assert_array_equal(plot.errors[()], result()["Idev"])


class TestStructure:
    def test_classes_and_attributes(self, tmp_path):
        path = to_nxcansas(result(), tmp_path / "out.h5", title="another")
        with h5py.File(path) as file:
            entry = file[file.attrs["default"]]
            assert (entry.attrs["NX_class"], entry.attrs["canSAS_class"], entry.attrs["version"]) == (
                "NXentry",
                "SASentry",
                "1.1",
            )
            assert (text(entry["definition"]), text(entry["title"])) == ("NXcanSAS", "another")
            data = entry[entry.attrs["default"]]
            assert (data.attrs["NX_class"], data.attrs["canSAS_class"]) == ("NXdata", "SASdata")
            assert (data.attrs["signal"], data.attrs["I_axes"]) == ("I", "Q")
            assert_array_equal(data.attrs["Q_indices"], [0])
            assert list(data.attrs["axes"]) == ["Q"]
            assert data["I"].attrs["uncertainties"] == "Idev"
            assert data["Q"].attrs["resolutions"] == "Qdev"
            assert data["Q"].attrs["units"] == data["Qdev"].attrs["units"] == "1/nm"
            assert isinstance(data.get("I_errors", getlink=True), h5py.SoftLink)
            assert "I_resmeared" in entry["smeared"]

    def test_the_operator_is_kept(self, tmp_path):
        smearing = Smearing.rice(Q, 0.03)
        with h5py.File(to_nxcansas(result(), tmp_path / "out.h5", smearing=smearing)) as file:
            group = file["sasentry01/smeared"]
            kept = Smearing(group["Q"][()], group["q_calc"][()], group["R"][()])
            terms = [text(value) for name, value in file["sasentry01/sasprocess01"].items() if name.startswith("term")]
        assert kept.digest == smearing.digest
        assert f"smearing_sha256 = {smearing.digest}" in terms

    def test_an_entry_for_each_complete_exposure(self, tmp_path):
        rows = [result(s).expand_dims("exposure") for s in (1.0, 2.0)]
        dataset = concat_exposures([rows[0], failed_exposure(result()), rows[1]])
        path = to_nxcansas(dataset, tmp_path / "out.h5")
        with h5py.File(path) as file:
            assert sorted(file) == ["sasentry01", "sasentry03"]
            assert text(file["sasentry03/title"]) == "latex, exposure 3"
            assert_array_equal(file["sasentry03/desmeared/I"][()], result(2.0)["I"])
        assert len(Loader().load(str(path))) == 4

    def test_why_an_exposure_failed_is_told(self, tmp_path):
        rows = [result(s).expand_dims("exposure") for s in (1.0, 2.0)]
        dataset = join_answers([rows[0], BadInput("I is not finite at q = 0.1 1/nm."), rows[1]])
        assert of_curves(dataset).failed == {2: "I is not finite at q = 0.1 1/nm."}
        with h5py.File(to_nxcansas(dataset, tmp_path / "out.h5")) as file:
            terms = [text(value) for name, value in file["sasentry03/sasprocess01"].items() if name.startswith("term")]
        assert "failed_exposures = 2 (I is not finite at q = 0.1 1/nm.)" in terms
        # Words of exposures that are counted otherwise are not believed.
        assert of_curves(dataset.isel(exposure=[0, 2])).failed == {}
        assert of_curves(dataset.isel(exposure=[1, 2])).failed == {1: ""}

    def test_a_width_that_is_not_known_is_left_out(self, tmp_path):
        dataset = result()
        dataset["Qdev"][:] = np.nan
        with h5py.File(to_nxcansas(dataset, tmp_path / "out.h5")) as file:
            assert "Qdev" not in file["sasentry01/desmeared"]
            assert "resolutions" not in file["sasentry01/desmeared/Q"].attrs

    def test_a_plain_curve(self, tmp_path):
        plain = curve(Q, np.exp(-Q), np.full(60, 0.1), Qdev=0.02)
        path = to_nxcansas(plain, tmp_path / "out.h5")
        again = read_curve(path)
        for name in ("I", "Idev", "Qdev", "q"):
            assert_array_equal(again[name], plain[name])

    def test_provenance_of_any_kind_is_json(self, tmp_path):
        process = {"path": tmp_path, "array": [1, 2]}
        with h5py.File(to_nxcansas(result(), tmp_path / "out.h5", process=process)) as file:
            assert json.loads(text(file["sasentry01/sasprocess01/term07"]).partition(" = ")[2]) == [1, 2]


class TestTarget:
    def test_nothing_is_overwritten_unasked(self, tmp_path):
        path = to_nxcansas(result(), tmp_path / "out.h5")
        before = path.read_bytes()
        with pytest.raises(BadInput, match="exists"):
            to_nxcansas(result(2.0), path)
        assert path.read_bytes() == before
        to_nxcansas(result(2.0), path, overwrite=True)
        assert path.read_bytes() != before

    def test_nothing_half_written_is_left(self, tmp_path):
        class Unprintable:
            def __str__(self):
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            to_nxcansas(result(), tmp_path / "out.h5", process={"x": Unprintable()})
        broken = result()
        broken["I"] = broken["I"].astype(object)
        with pytest.raises(TypeError):
            to_nxcansas(broken, tmp_path / "out.h5")
        assert list(tmp_path.iterdir()) == []

    def test_an_ordinary_file_with_ordinary_rights(self, tmp_path):
        (tmp_path / "plain").touch()
        path = to_nxcansas(result(), tmp_path / "out.h5")
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.h5", "plain"]

    def test_places_that_cannot_be_written(self, tmp_path):
        with pytest.raises(BadInput, match="is no folder"):
            check_target(tmp_path / "nowhere" / "out.h5")
        with pytest.raises(BadInput, match="is a folder"):
            check_target(tmp_path, overwrite=True)

    def test_failed_results_and_foreign_operators(self, tmp_path):
        with pytest.raises(BadInput, match="No exposure"):
            to_nxcansas(failed_exposure(result()), tmp_path / "out.h5")
        with pytest.raises(BadInput, match="do not belong together"):
            to_nxcansas(result(), tmp_path / "out.h5", smearing=Smearing.identity(Q[:-1]))
        assert list(tmp_path.iterdir()) == []

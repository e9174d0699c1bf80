"""Curves from files: real ones of many makers, and every way in which one can be bad."""

from importlib.resources import files
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.testing import assert_allclose
from sasdata.dataloader.loader import Loader

from dsnet_bluesky.curvefiles import read_curve, read_profile, smearing_for
from dsnet_bluesky.curvefiles.units import intensity_units, per_nm, units_in
from dsnet_bluesky.data import BadInput, check_curve

EXAMPLES = Path(str(files("sasdata"))) / "example_data" / "1d_data"
XML = EXAMPLES / "latex_smeared.xml"


def columns(n=20, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linspace(0.01, 0.2, n)
    I = 10 * np.exp(-((10 * q) ** 2)) + rng.normal(size=n) * 0.01
    return q, I, np.full(n, 0.01), 0.05 * q


def write(path, rows, header="", separator=" "):
    lines = [separator.join(f"{value:.8g}" for value in row) for row in rows]
    path.write_text(header + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def text(tmp_path):
    def make(*arrays, header="", separator=" "):
        return write(tmp_path / "curve.txt", np.transpose(arrays), header, separator)

    return make


class TestText:
    def test_three_columns_are_taken_as_per_angstrom(self, text):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI))
        assert_allclose(dataset["q"], 10 * q, rtol=1e-7)
        assert_allclose(dataset["I"], I, rtol=1e-7)
        assert_allclose(dataset["Idev"], dI)
        assert dataset["q"].attrs["units"] == "1/nm"
        assert dataset.attrs["q_units_from"] == "assumed"
        assert dataset.attrs["dropped_points"] == 0
        assert "Idev_estimated" not in dataset.attrs
        check_curve(dataset)

    def test_two_columns_have_their_noise_estimated(self, text):
        dataset = read_curve(text(*columns()[:2]))
        assert dataset.attrs["Idev_estimated"] == 1
        assert (dataset["Idev"] > 0).all()

    def test_a_fourth_column_is_the_resolution(self, text):
        q, I, dI, dQ = columns()
        dataset = read_curve(text(q, I, dI, dQ))
        assert_allclose(dataset["Qdev"], 10 * dQ, rtol=1e-6)
        assert dataset["Qdev"].attrs["units"] == "1/nm"

    @pytest.mark.parametrize(
        ("header", "factor"),
        [
            ("Q (1/nm)  I  dI\n", 1),
            ("# q [nm^-1], I [1/cm]\n", 1),
            ("# q / nm-1\n", 1),
            ("q_nm^{-1} I\n", 1),
            ("<Q> 1/A <I> 1/cm\n", 10),
            ("Q(A^-1) I(cm^-1)\n", 10),
            ("Q in Å⁻¹\n", 10),
            ("q [1/angstrom]\n", 10),
            ("no unit here\n", 10),
        ],
    )
    def test_the_header_tells_the_unit(self, text, header, factor):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI, header=header))
        assert_allclose(dataset["q"], factor * q, rtol=1e-7)
        assert dataset.attrs["q_units_from"] == ("assumed" if "no unit" in header else "file")

    @pytest.mark.parametrize(
        ("heading", "factor"),
        [("q (1/angstrom)  I (1/cm)  dI", 10), ("# Q[1/A], I(Q), err", 10), ("q(nm-1) Intensity Error\n-----", 1)],
    )
    def test_the_heading_of_the_table_decides_before_other_lines(self, text, heading, factor):
        q, I, dI, _ = columns()
        other = "1/nm" if factor == 10 else "1/A"
        dataset = read_curve(text(q, I, dI, header=f"# I was not finite at q = 0.1 {other}\n{heading}\n"))
        assert_allclose(dataset["q"], factor * q)
        # A line that names no columns is no heading.
        with pytest.raises(BadInput, match="names both"):
            read_curve(text(q, I, dI, header="q in 1/nm\nfirst at q = 0.1 1/A\n"))

    @pytest.mark.parametrize(
        ("header", "source"),
        [
            ("# Silica 20 nm -1 wt%\nQ I dI\n", "assumed"),
            ("FILE: AU_20nm-1.SA1\nQ I dI\n", "assumed"),
            ("# Sample A-1\n", "assumed"),
        ],
    )
    def test_words_above_the_heading_tell_no_unit(self, text, header, source):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI, header=header))
        assert_allclose(dataset["q"], 10 * q, rtol=1e-7)
        assert dataset.attrs["q_units_from"] == source

    @pytest.mark.parametrize(
        ("heading", "unit"),
        [
            ("q (deg), I, dI", "deg"),
            ("# q [deg]  I  dI", "deg"),
            ("q in Angstrom, I, dI", "Angstrom"),
            ("2th_deg I dI", "2th_deg"),
            ("2theta,I,dI", "2theta"),
            ("q/px I dI", "px"),
        ],
    )
    def test_a_unit_that_is_not_understood_is_not_assumed_to_be_another(self, text, heading, unit):
        q, I, dI, _ = columns()
        path = text(q, I, dI, header=heading + "\n", separator="," if "," in heading else " ")
        with pytest.raises(BadInput, match=rf"the unit of q, '{unit}', is not understood.*--q-units"):
            read_curve(path)
        assert_allclose(read_curve(path, units="1/nm")["q"], q, rtol=1e-7)

    @pytest.mark.parametrize("heading", ["q (um^-1)  I  dI", "q um^-1 I dI", "q_um^-1 I dI", "q [1/um],I,dI", "q in um-1, I"])
    def test_any_inverse_length_is_converted(self, text, heading):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI, header=heading + "\n"))
        assert_allclose(dataset["q"], q / 1000, rtol=1e-7)
        assert dataset.attrs["q_units_from"] == "file"

    def test_the_option_overrides_the_header(self, text):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI, header="q (1/A)\n"), units="1/nm")
        assert_allclose(dataset["q"], q, rtol=1e-7)
        assert dataset.attrs["q_units_from"] == "option"

    @pytest.mark.parametrize("separator", [" ", "\t", ",", ";", "  "])
    def test_separators(self, text, separator):
        q, I, dI, _ = columns()
        assert_allclose(read_curve(text(q, I, dI, separator=separator))["I"], I, rtol=1e-7)

    def test_words_and_numbers_around_the_table_do_not_matter(self, tmp_path):
        q, I, dI, _ = columns()
        body = "\n".join(f"{a:.8g} {b:.8g} {c:.8g}" for a, b, c in zip(q, I, dI, strict=True))
        path = tmp_path / "curve.dat"
        path.write_text(f"a title\n2 numbers 3\n7 8 9 10\n1 2\n# -0.1 3 4\n{body}\n\nend of file\n<xml/>\n")
        assert_allclose(read_curve(path)["q"], 10 * q, rtol=1e-7)

    @pytest.mark.parametrize(
        ("line", "dropped"),
        [
            ("# second detector", 0),
            ("#", 0),
            ("", 0),
            ("-----", 0),
            ("0.0805 N/A 0.01", 1),
            ("0.0805 --- 0.01", 1),
            ("0.0805 -1.#IND 0.01", 1),
            ("0.0805 BAD 0.01", 1),
            ("0.0805 5.0", 1),
            ("N/A", 1),
        ],
    )
    @pytest.mark.parametrize("separator", [" ", ","])
    def test_no_line_cuts_a_table_in_silence(self, text, line, dropped, separator):
        q, I, dI, _ = columns(200)
        path = text(q, I, dI, separator=separator)
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:80], line.replace(" ", separator) if dropped else line, *rows[80:]]))
        dataset = read_curve(path)
        assert_allclose(dataset["q"], 10 * q, rtol=1e-7)
        assert dataset.attrs["dropped_points"] == dropped

    @pytest.mark.parametrize("separator", [",", ";"])
    @pytest.mark.parametrize("column", [1, 2])
    def test_empty_cells_are_dropped_and_counted(self, text, separator, column):
        path = text(*columns(200)[:3], separator=separator)
        rows = [line.split(separator) for line in path.read_text().splitlines()]
        for row in rows[::7]:
            row[column] = ""
        path.write_text("\n".join(separator.join(row) for row in rows))
        dataset = read_curve(path)
        assert (dataset.sizes["q"], dataset.attrs["dropped_points"]) == (171, 29)

    @pytest.mark.parametrize("where", [0, 199])
    def test_a_short_row_at_an_end_is_counted(self, text, where):
        path = text(*columns(200)[:3])
        rows = path.read_text().splitlines()
        rows[where] = rows[where].rpartition(" ")[0]
        path.write_text("\n".join(rows))
        assert read_curve(path).attrs["dropped_points"] == 1

    def test_empty_columns_are_no_columns(self, text):
        q, I, dI, dQ = columns()
        path = text(q, I, dI)
        path.write_text("".join(f"{line},,\n" for line in text(q, I, dI, separator=",").read_text().splitlines()))
        dataset = read_curve(path)
        assert (dataset.sizes["q"], "Qdev" in dataset, "Idev_estimated" in dataset.attrs) == (20, False, False)
        path.write_text("".join(f"{a},{b},,{c}\n" for a, b, c in zip(q, I, dQ, strict=True)))
        assert_allclose(read_curve(path)["Qdev"], 10 * dQ)
        assert "Idev_estimated" in read_curve(path).attrs

    @pytest.mark.parametrize("line", ["second curve, at 20 degrees", "q I dI dQ extra", "0.0805 5 0.01 3 4"])
    def test_rows_outside_the_table_are_refused(self, text, line):
        path = text(*columns(200)[:3])
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:80], line, *rows[80:]]))
        with pytest.raises(BadInput, match=r"from line 82 to line 201, and (80|81) rows of numbers stand outside it, .* line 1 "):
            read_curve(path)
        path.write_text("\n".join([*rows[:120], line, *rows[120:]]))
        with pytest.raises(BadInput, match=r"from line 1 to line 120, and (80|81) rows .* line 12[12] "):
            read_curve(path)

    @pytest.mark.parametrize(
        ("heading", "order", "separator"),
        [
            (",q,I,dI", "nqIe", ","),
            ('"";"Q";"Intensity";"Error";"dQ"', "nqIed", ";"),
            ("# q (1/angstrom)  I (1/cm)  dI (1/cm)  dQ (1/angstrom)", "qIed", " "),
            ("#I q sigma_q sigma", "Iqde", " "),
            ("q[1/A] I(Q) dQ I_err n\n------", "qIden", " "),
            ("<X> <Y> <Z>", "qIe", " "),
            ("no names here", "qIe", " "),
            ("Q(1/A),Int.,Idev,Qdev,", "qIedn", ","),
            ("q I Int_err Qerr meanQ shadow", "qIednn", " "),
        ],
    )
    def test_names_of_columns_come_before_their_places(self, text, heading, order, separator):
        q, I, dI, dQ = columns()
        arrays = {"n": np.arange(20), "q": q, "I": I, "e": dI, "d": dQ}
        dataset = read_curve(text(*(arrays[sign] for sign in order), header=heading + "\n", separator=separator))
        assert_allclose(dataset["q"], 10 * q, rtol=1e-7)
        assert_allclose(dataset["I"], I, rtol=1e-7)
        assert_allclose(dataset["Idev"], dI)
        assert ("Qdev" in dataset) == ("d" in order)
        if "d" in order:
            assert_allclose(dataset["Qdev"], 10 * dQ, rtol=1e-7)

    def test_a_column_of_another_name_is_left_out(self, text):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, dI, np.full(20, 0.1), np.arange(20), header="q I dI dQl T\n"))
        assert_allclose(dataset["dQl"], 1)
        assert "Qdev" not in read_curve(text(q, I, dI, q, header="q I dI fit\n"))

    def test_a_slit_that_the_head_tells_keeps_its_unit(self, text):
        path = text(*columns()[:3], header="# dQl (half-length of the slit): 0.1 1/angstrom\n")
        assert_allclose(read_curve(path, units="1/nm")["dQl"], 1)

    @pytest.mark.parametrize("heading", [",q,value,err", ",angle,I,err"])
    def test_names_that_do_not_tell_where_q_and_I_are(self, text, heading):
        with pytest.raises(BadInput, match="does not name both q and I"):
            read_curve(text(np.arange(20), *columns()[:3], header=heading + "\n", separator=","))

    def test_decimal_commas_are_refused(self, text):
        for separator in (" ", ";"):
            path = text(*columns()[:3], separator=separator)
            path.write_text(path.read_text().replace(".", ","))
            with pytest.raises(BadInput, match="with decimal points"):
                read_curve(path)

    def test_other_encodings_and_line_ends(self, tmp_path):
        q, I, dI, _ = columns()
        body = "\r".join(f"{a:.8g} {b:.8g} {c:.8g}" for a, b, c in zip(q, I, dI, strict=True))
        path = tmp_path / "curve.dat"
        path.write_bytes("Prüfung bei 20 °C\r".encode("latin-1") + body.encode())
        assert_allclose(read_curve(path)["I"], I, rtol=1e-7)

    def test_a_negative_fourth_column_is_a_slit(self):
        dataset = read_curve(EXAMPLES / "1umSlitSmearSphere.ABS")
        assert_allclose(dataset["dQl"], 1.17)
        assert dataset["I"].attrs["units"] == "1/cm"
        assert smearing_for(dataset).kind == "slit"


class TestPoints:
    def test_rows_that_are_not_finite_are_dropped_and_counted(self, text):
        q, I, dI, _ = columns()
        I[3], dI[7], I[11] = np.nan, np.inf, -np.inf
        dataset = read_curve(text(q, I, dI))
        assert dataset.attrs["dropped_points"] == 3
        assert dataset.sizes["q"] == 17

    def test_points_without_an_error_are_dropped_and_counted(self, text):
        q, I, dI, _ = columns()
        dI[4] = 0
        assert read_curve(text(q, I, dI)).attrs["dropped_points"] == 1

    def test_zeros_alone_stand_for_no_column(self, text):
        q, I, dI, _ = columns()
        dataset = read_curve(text(q, I, 0 * dI, 0 * q))
        assert dataset.attrs["Idev_estimated"] == 1
        assert "Qdev" not in dataset

    def test_too_many_bad_rows_are_an_error(self, text):
        q, I, dI, _ = columns()
        I[:12] = np.nan
        with pytest.raises(BadInput, match="12 of 20 points hold NaN"):
            read_curve(text(q, I, dI))

    def test_q_must_ascend(self, text):
        q, I, dI, _ = columns()
        q[[5, 6]] = q[[6, 5]]
        with pytest.raises(BadInput, match=r"0.07 is followed by 0.06 \(point 7\).*--sort"):
            read_curve(text(q, I, dI))

    def test_sorting_averages_repeated_points(self, text):
        q, I, dI, dQ = columns()
        order = np.random.default_rng(1).permutation(20)
        once = read_curve(text(q, I, dI, dQ))
        q, I, dI, dQ = (np.append(a[order], [a[2]]) for a in (q, I, dI, dQ))
        I[-1] += 0.02
        dataset = read_curve(text(q, I, dI, dQ), sort=True)
        assert_allclose(dataset["q"], once["q"])
        assert_allclose(dataset["I"][2], once["I"][2] + 0.01, rtol=1e-5)
        assert_allclose(dataset["Idev"][2], 0.01 / np.sqrt(2), rtol=1e-6)
        assert_allclose(np.delete(dataset["I"].values, 2), np.delete(once["I"].values, 2))
        assert_allclose(dataset["Qdev"], once["Qdev"])

    def test_negative_intensities_are_fine_and_negative_q_is_not(self, text):
        q, I, dI, _ = columns()
        assert (read_curve(text(q, I - 20, dI))["I"] < 0).all()
        with pytest.raises(BadInput, match="not negative"):
            read_curve(text(q - 0.05, I, dI))


class TestBadFiles:
    def test_missing_empty_and_binary(self, tmp_path):
        with pytest.raises(BadInput, match="no such file"):
            read_curve(tmp_path / "nothing.dat")
        (tmp_path / "empty.dat").touch()
        with pytest.raises(BadInput, match="empty"):
            read_curve(tmp_path / "empty.dat")
        (tmp_path / "noise.dat").write_bytes(np.random.default_rng(0).bytes(5000))
        with pytest.raises(BadInput, match=r"noise\.dat: the file is binary"):
            read_curve(tmp_path / "noise.dat")

    def test_words_only(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("nothing but words\n1 2\n3 4\n")
        with pytest.raises(BadInput, match="longest block has 2"):
            read_curve(path)

    def test_truncated_hdf5(self, tmp_path):
        whole = (EXAMPLES / "33837rear_1D_1.75_16.5_NXcanSAS_v3.h5").read_bytes()
        path = tmp_path / "half.h5"
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadInput, match=r"half\.h5: the HDF5 file cannot be read; it may be truncated"):
            read_curve(path)

    def test_hdf5_of_another_kind(self, tmp_path):
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["data"] = np.arange(10)
        with pytest.raises(BadInput, match="no NXcanSAS data"):
            read_curve(tmp_path / "other.h5")

    def test_two_dimensional_data(self):
        with pytest.raises(BadInput, match="no one-dimensional curve"):
            read_curve(EXAMPLES.parent / "2d_data" / "BAM_2D.h5")

    def test_bad_xml(self, tmp_path):
        (tmp_path / "broken.xml").write_text('<?xml version="1.0"?><SASroot><SASentry>')
        with pytest.raises(BadInput, match=r"broken\.xml: the XML is not well-formed .*line 1"):
            read_curve(tmp_path / "broken.xml")
        (tmp_path / "page.xml").write_text('<?xml version="1.0"?><html><body/></html>')
        with pytest.raises(BadInput, match=r"no canSAS data .* its root is <html>"):
            read_curve(tmp_path / "page.xml")
        (tmp_path / "units.xml").write_text(XML.read_text().replace('<Q unit="1/A">0.003797', '<Q unit="1/nm">0.003797'))
        with pytest.raises(BadInput, match=r"Q are given in several units \(1/A, 1/nm\)"):
            read_curve(tmp_path / "units.xml", entry=1)

    def test_a_unit_that_is_none(self, text):
        with pytest.raises(BadInput, match="'furlong', is not understood"):
            read_curve(text(*columns()[:3]), units="furlong")
        with pytest.raises(BadInput, match="names both"):
            read_curve(text(*columns()[:3], header="q in 1/nm (not 1/A)\n"))


class TestXML:
    def test_entries_are_chosen_by_name_or_number(self):
        with pytest.raises(BadInput, match=r"several curves.*1 = latex_sans, 2 = latex_usans"):
            read_curve(XML)
        with pytest.raises(BadInput, match="no curve 'latex'"):
            read_curve(XML, entry="latex")
        assert read_curve(XML, entry="latex_usans").identical(read_curve(XML, entry=2))

    def test_a_name_that_is_there_more_than_once_is_refused(self, tmp_path):
        path = tmp_path / "same.xml"
        path.write_text(XML.read_text().replace("latex_usans", "latex_sans"))
        with pytest.raises(BadInput, match="holds 2 curves 'latex_sans'; tell them apart by their numbers, with --entry: 1, 2"):
            read_curve(path, entry="latex_sans")
        assert read_curve(path, entry=2)["I"].identical(read_curve(XML, entry=2)["I"])

    def test_pinhole_entry(self):
        dataset = read_curve(XML, entry="latex_sans", sort=True)
        assert dataset.sizes["q"] == 299
        assert_allclose([dataset["q"][0], dataset["I"][0], dataset["Qdev"][0]], [0.03797, 4006.05896, 0.0109], rtol=1e-6)
        assert dataset["I"].attrs["units"] == "1/cm"
        assert "dQl" not in dataset
        assert dataset.attrs["title"].startswith("latex particles")

    def test_overlapping_detector_settings_are_not_sorted_in_silence(self):
        with pytest.raises(BadInput, match="not ascending"):
            read_curve(XML, entry="latex_sans")

    def test_slit_entry(self):
        dataset = read_curve(XML, entry="latex_usans")
        assert_allclose(dataset["dQl"], 1.17)
        assert "dQw" not in dataset
        smearing = smearing_for(dataset)
        assert (smearing.kind, smearing.parameters["length"]) == ("slit", pytest.approx(1.17))

    def test_a_slit_length_without_a_unit_has_that_of_q(self):
        dataset = read_curve(EXAMPLES.parent / "other_formats" / "1000A_sphere_sm.xml")
        assert_allclose(dataset["dQl"], 1.17)
        assert_allclose(dataset["I"][0], 2.7793e5)

    @pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.xml")) + sorted(EXAMPLES.glob("[!V]*.h*")), ids=lambda p: p.name)
    def test_against_sasdata(self, path):
        theirs = Loader().load(str(path))[0]
        ours = read_curve(path, entry=1, sort=True)
        good = theirs.dy > 0
        q = np.unique(theirs.x[good])
        assert_allclose(ours["q"], 10 * q, rtol=1e-6)
        if q.size == good.size:
            assert_allclose(ours["I"], theirs.y, rtol=1e-6)
            assert_allclose(ours["Idev"], theirs.dy, rtol=1e-6)
        assert ("Qdev" in ours) == (theirs.dx is not None and bool(theirs.dx.any()))

    @pytest.mark.parametrize("own", [None, "1/nm", "1/A"])
    @pytest.mark.parametrize("told", [None, "1/nm"])
    def test_a_resolution_has_its_own_unit_or_that_of_q(self, tmp_path, own, told):
        unit = f' unit="{own}"' if own else ""
        rows = "".join(
            f"<Idata><Q>{q}</Q><I>{i}</I><Idev>0.1</Idev><Qdev{unit}>0.05</Qdev></Idata>" for q, i in np.transpose(columns()[:2])
        )
        path = tmp_path / "own.xml"
        path.write_text(f'<?xml version="1.0"?><SASroot><SASentry><SASdata>{rows}</SASdata></SASentry></SASroot>')
        assert_allclose(read_curve(path, units=told)["Qdev"], 0.05 * per_nm(own or told or "1/angstrom"))

    def test_nan_in_xml_is_dropped_and_counted(self, tmp_path):
        text = XML.read_text().replace(">1.64212795226675<", ">NaN<").replace("491.192789065555", "NaN")
        (tmp_path / "nan.xml").write_text(text)
        assert read_curve(tmp_path / "nan.xml", entry=1, sort=True).attrs["dropped_points"] == 1


class TestNXcanSAS:
    @pytest.mark.parametrize("name", ["33837rear_1D_1.75_16.5_NXcanSAS.h5", "33837rear_1D_1.75_16.5_NXcanSAS_v3.h5"])
    def test_against_the_same_data_in_xml(self, name):
        expected = read_curve(EXAMPLES / "33837rear_1D_1.75_16.5_CanSAS1D.xml")
        dataset = read_curve(EXAMPLES / name)
        for variable in ("q", "I", "Idev"):
            assert_allclose(dataset[variable], expected[variable], rtol=1e-5)

    def test_nika_and_irena(self):
        nika = read_curve(EXAMPLES / "FK403_0006_Nika.hdf")
        assert nika.sizes["q"] == 118
        assert "Qdev" in nika
        series = EXAMPLES / "VTMA.h5"
        with pytest.raises(BadInput, match=r"1 = VTMA13b_2_30C.*\.\.\. 240 = "):
            read_curve(series)
        assert read_curve(series, entry=2).sizes["q"] > 300

    def test_slits_are_told_apart_by_name(self, tmp_path):
        path = nxcansas(tmp_path / "slit.h5", resolutions=["dQl", "dQw"], dQl=np.full(20, 0.1), dQw=np.full(20, 0.001))
        dataset = read_curve(path)
        assert_allclose(dataset["dQl"], 1.0)
        assert_allclose(dataset["dQw"], 0.01)
        assert smearing_for(dataset).parameters["width"] == pytest.approx(0.01)

    @pytest.mark.parametrize("resolutions", ["dQw,dQl", "dQl"])
    def test_attributes_that_sasdata_cannot_take(self, tmp_path, resolutions):
        path = nxcansas(tmp_path / "slit.h5", resolutions=resolutions, dQl=np.full(20, 0.1), dQw=np.zeros(20))
        assert smearing_for(read_curve(path)).parameters["length"] == pytest.approx(1.0)

    def test_a_scalar_resolution_in_another_unit(self, tmp_path):
        path = nxcansas(tmp_path / "scalar.h5", resolutions="dq", dq=0.02)
        with h5py.File(path, "a") as file:
            file["entry/data/dq"].attrs["units"] = "1/nm"
        assert_allclose(read_curve(path)["Qdev"], np.full(20, 0.02))

    @pytest.mark.parametrize("q_units", [None, "", "1/angstrom"])
    @pytest.mark.parametrize("own", [None, "1/nm", "1/angstrom"])
    @pytest.mark.parametrize("told", [None, "1/nm"])
    def test_a_resolution_has_its_own_unit_or_that_of_q(self, tmp_path, q_units, own, told):
        path = nxcansas(tmp_path / "own.h5", resolutions="Qdev", Qdev=np.full(20, 0.05))
        with h5py.File(path, "a") as file:
            if q_units is None:
                del file["entry/data/Q"].attrs["units"]
            else:
                file["entry/data/Q"].attrs["units"] = q_units
            if own:
                file["entry/data/Qdev"].attrs["units"] = own
        dataset = read_curve(path, units=told)
        assert_allclose(dataset["q"], columns()[0] * (1 if told else 10))
        assert_allclose(dataset["Qdev"], 0.05 * per_nm(own or told or "1/angstrom"))

    def test_frames_become_exposures(self, tmp_path):
        stack = np.stack([columns(seed=seed)[1] for seed in range(3)])
        path = nxcansas(tmp_path / "stack.h5", I=stack, Idev=np.full(stack.shape, 0.01))
        dataset = read_curve(path)
        assert dataset["I"].dims == ("exposure", "q")
        assert_allclose(dataset["I"], stack)

    def test_a_missing_dataset_is_named(self, tmp_path):
        path = nxcansas(tmp_path / "bad.h5")
        with h5py.File(path, "a") as file:
            del file["entry/data/I"]
            file["entry/gone"] = h5py.SoftLink("/nowhere")
        with pytest.raises(BadInput, match="no dataset 'I'"):
            read_curve(path)


def nxcansas(path, *, resolutions=None, I=None, Idev=None, **more):
    q, intensity, deviation, _ = columns()
    with h5py.File(path, "w") as file:
        entry = file.create_group("entry")
        entry.attrs["canSAS_class"] = "SASentry"
        data = entry.create_group("data")
        data.attrs.update(canSAS_class="SASdata", signal="I", I_axes="Q")
        data["Q"], data["I"] = q, intensity if I is None else I
        data["Idev"] = deviation if Idev is None else Idev
        data["Q"].attrs["units"] = "1/angstrom"
        for name, values in more.items():
            data[name] = values
        if resolutions is not None:
            data["Q"].attrs["resolutions"] = resolutions
    return path


class TestSmearing:
    @pytest.fixture
    def plain(self, text):
        return read_curve(text(*columns()[:3]))

    @pytest.fixture
    def profile(self, tmp_path):
        l = np.linspace(0, 0.5, 21)
        return write(tmp_path / "profile.txt", np.transpose([l, np.ones(21)]))

    def test_nothing_known(self, plain):
        with pytest.raises(BadInput, match=r"--slit-length .* --sigma, or --beam-profile"):
            smearing_for(plain)

    def test_options(self, plain, profile):
        slit = smearing_for(plain, slit_length=0.5, slit_width=0.01)
        assert (slit.parameters["length"], slit.parameters["width"]) == (0.5, 0.01)
        assert smearing_for(plain, sigma=0.02).kind == "gaussian"
        # A flat profile is the slit itself.
        flat = smearing_for(plain, beam_profile=profile)
        curve = np.exp(-(np.linspace(0, 2, 400) ** 2))
        both = [s.apply(np.interp(s.q_calc, np.linspace(0, 2, 400), curve)) for s in (flat, smearing_for(plain, slit_length=0.5))]
        assert_allclose(*both, rtol=2e-3)

    def test_options_come_before_the_file(self, text):
        dataset = read_curve(text(*columns()))
        assert smearing_for(dataset).kind == "pinhole"
        assert smearing_for(dataset, sigma=0.02).kind == "gaussian"

    def test_contradictions(self, plain, profile):
        with pytest.raises(BadInput, match="--sigma and a slit"):
            smearing_for(plain, sigma=0.1, slit_length=0.5)
        with pytest.raises(BadInput, match="give one"):
            smearing_for(plain, beam_profile=profile, slit_length=0.5)
        with pytest.raises(BadInput):
            smearing_for(plain, slit_length=-1)

    def test_a_slit_that_changes_is_refused(self, tmp_path):
        path = nxcansas(tmp_path / "slit.h5", resolutions=["dQw", "dQl"], dQl=np.linspace(0.1, 0.2, 20), dQw=np.zeros(20))
        with pytest.raises(BadInput, match=r"dQl changes along the curve, from 1 to 2 1/nm.*--slit-length"):
            smearing_for(read_curve(path))

    def test_the_measured_profile_of_sasdata(self):
        l, weight = read_profile(EXAMPLES / "beam profile.DAT")
        assert (l.size, l[0], l[-1]) == (49, 0, pytest.approx(3.621, abs=1e-3))
        assert weight.argmax() < 40
        dataset = read_curve(EXAMPLES / "saxess_example.pdh")
        assert dataset.attrs["q_units"] == "1/nm"
        smearing = smearing_for(dataset.isel(q=slice(None, None, 10)), beam_profile=EXAMPLES / "beam profile.DAT")
        assert_allclose(smearing.matrix.sum(1), 1)

    def test_a_bad_profile(self, tmp_path):
        path = write(tmp_path / "profile.txt", [[0, 1], [1, 2], [1, 3], [2, 3], [3, 4]])
        with pytest.raises(BadInput, match=r"profile\.txt: a beam profile needs l ascending"):
            read_profile(path)
        with pytest.raises(BadInput, match="no such file"):
            read_profile(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("units", "factor"),
    [("1/nm", 1), ("1/A", 10), ("1/angstrom", 10), ("A^{-1}", 10), ("nm-1", 1), ("1/Å", 10), ("1/m", 1e-9), ("Ang^-1", 10)],
)
def test_units_of_q(units, factor):
    assert per_nm(units) == pytest.approx(factor)


def test_units_of_intensity():
    assert intensity_units("1/cm") == "1/cm"
    assert intensity_units("Counts") == intensity_units(None) == intensity_units("a.u.") == "1"


@pytest.mark.parametrize(
    "words",
    [
        "Silica 20 nm -1 wt% , q in Angstrom, I, dI",
        "FILE: AU_20nm-1.SA1",
        "FILE: AU_20_nm-1.SA1",
        "# Sample A-1",
        "a shift of 5  nm -1 pixel",
        "Sample BA-1",
        "version 2.1/nm",
    ],
)
def test_words_with_a_unit_that_is_not_of_q(words):
    assert units_in(words) is None


@pytest.mark.parametrize(
    ("words", "unit"),
    [
        ("q nm-1 I", "1/nm"),
        ("nm-1 cm-1 cm-1", "1/nm"),
        ("q_nm-1", "1/nm"),
        ("q [nm -1]", "1/nm"),
        ("q/nm^-1", "1/nm"),
        ("# A-1 cm-1", "1/angstrom"),
        ("q A-1 I", "1/angstrom"),
        ("q / A-1 I", "1/angstrom"),
        ("q, A -1", "1/angstrom"),
        ("q_A^-1", "1/angstrom"),
        ("Q [A-1]", "1/angstrom"),
        ("momentum transfer A^-1", "1/angstrom"),
        ("q in Angstrom^-1", "1/angstrom"),
        ("q (1/Ang)", "1/angstrom"),
    ],
)
def test_units_in_words(words, unit):
    assert units_in(words) == unit


def test_words_that_look_like_units_but_are_none():
    assert units_in("Radius=5000A, Cp=1.8e-8 cm^-1/1A^-4, 650 nm laser") is None

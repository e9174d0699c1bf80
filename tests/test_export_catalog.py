"""Results of the catalog as files: by the command line, and as formats of the server."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fabio.edfimage
import h5py
import numpy as np
import pytest
import sasdata.dataloader.readers
import silx.io
import silx.io.nxdata
import xarray as xr
from fastapi import HTTPException
from lxml import etree
from numpy.testing import assert_allclose, assert_array_equal
from sasdata.dataloader.loader import Loader
from tiled.adapters.xarray import DatasetAdapter
from tiled.client import from_uri
from tiled.client.container import Container
from typer.testing import CliRunner

from dsnet_bluesky.adapters.exports import as_nxcansas
from dsnet_bluesky.cli import app
from dsnet_bluesky.curvefiles import read_curve
from dsnet_bluesky.data import concat_exposures, describe
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.export import columns, of_result
from dsnet_bluesky.ingest import ingest

HOW_TO = Path(__file__).parent.parent / "docs/how-to/export.md"
SCHEMA = Path(sasdata.dataloader.readers.__file__).parent / "schema/cansas1d_v1_1.xsd"
Q = np.linspace(0.1, 3, 50)
TIME = 1795000000.0
"""In November 2026."""


def exposure(scale: float, flags: int = 0) -> xr.Dataset:
    values = scale * np.exp(-Q)[None] / 3
    names = {"I": 1.0, "I_smeared": 0.9, "I_resmeared": 0.91, "Idev": 0.01, "Idev_noise": 0.003, "Idev_smeared": 0.02}
    variables = {name: (("exposure", "q"), factor * values, {"units": "1/cm"}) for name, factor in names.items()}
    variables |= {
        "Qdev": (("exposure", "q"), np.full_like(values, 0.01 / 3), {"units": "1/nm"}),
        "chi2": ("exposure", [1.1]),
        "flags": ("exposure", np.array([flags])),
        "status": ("exposure", ["ok"]),
        "answer": ("exposure", ["network"]),
    }
    return describe(xr.Dataset(variables, {"q": ("q", Q, {"units": "1/nm"})}, {"method": "dsnet", "model": "dsnet:2.0.0"}))


def exposures(*scales: float) -> xr.Dataset:
    return concat_exposures([exposure(scale, flags=12) for scale in scales])


class Catalog:
    """A server with a run of a sample, its direct beam, and results of it."""

    def __init__(self, served):
        self.uri, self.api_key, self.client = served.uri, served.api_key, served.client()
        self.beam, self.run = self.ingest(served.data_directory / "detector")
        self.key = self.store("2.0.0", 2.0, None, 3.0)
        self.other = self.store("2.1.0", 5.0)
        self.failed = self.begin("1.0.0")
        self.failed.fail("too few counts")
        self.running = self.begin("3.0.0")
        self.running.append(exposure(1.0))

    def ingest(self, folder: Path) -> tuple[str, str]:
        pixel, shape = 1e-3, (60, 50)
        poni = {"dist": 0.8, "poni1": 30 * pixel, "poni2": 25 * pixel, "wavelength": 1.54e-10, "detector": "Detector"}
        poni["detector_config"] = {"pixel1": pixel, "pixel2": pixel, "max_shape": list(shape), "orientation": 3}
        beam = np.zeros(shape, dtype=np.int32)
        beam[29:31, 24:26] = 10_000
        uids: list[str] = []
        for name, frame, purpose in (("x_beam", beam, "direct_beam"), ("x_sample", np.full(shape, 100, np.int32), "sample")):
            path = folder / f"{name}.edf"
            fabio.edfimage.EdfImage(data=frame).write(str(path))
            link = {"sample": "opal", "direct_beam": uids[0]} if uids else {}
            uids += ingest([path], client=self.client, purpose=purpose, poni=poni, exposure_time=2.0, **link)
        return uids[0], uids[1]

    def begin(self, version: str, sample: str = "opal") -> ResultWriter:
        start = {**self.client["raw"][self.run].metadata["start"], "time": TIME, "sample": sample}
        metadata = result_metadata(
            start,
            direct_beam_uid=self.beam,
            config={"bins": 50},
            config_sha256="c" * 64,
            method="dsnet",
            model_name="dsnet",
            model_version=version,
            model_sha256="d" * 64,
            pairing={"how": "named", "reason": "named by the start document", "age": 3.0},
        )
        return ResultWriter.create(self.client, str(uuid.uuid4()), metadata)

    def store(self, version: str, *scales: float | None, sample: str = "opal") -> str:
        writer = self.begin(version, sample)
        for scale in scales:
            if scale is None:
                writer.append_failure("NaN in the frame")
            else:
                writer.append(exposure(scale, flags=12))
        writer.complete()
        return writer.node.item["id"]

    def result(self, key: str, number: int) -> xr.Dataset:
        return self.client["desmeared"][key].read().isel(exposure=number - 1)


@pytest.fixture(scope="module")
def catalog(served) -> Catalog:
    return Catalog(served)


@pytest.fixture
def run(catalog, tmp_path, monkeypatch):
    """Run a command in an empty directory, against the server."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"TILED_URI": catalog.uri, "TILED_API_KEY": catalog.api_key})

    def command(*words, status=0):
        done = runner.invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        return done

    return command


@pytest.fixture
def export(run, tmp_path):
    """Export, and give the files that are there afterwards, which are those that were printed."""

    def command(*words):
        printed = run("export", *words).stdout.split()
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        assert sorted(Path(name).resolve() for name in printed) == files
        return files

    return command


@pytest.fixture
def fails(run, tmp_path):
    """Ask for something that cannot be exported: one line on stderr, status 2, nothing written."""

    def command(*words, match):
        before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
        done = run("export", *words, status=2)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert re.search(match, line), line
        assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before

    return command


def texts(group: h5py.Group) -> list[str]:
    return [value[()].decode() for name, value in group.items() if name.startswith("term")]


class TestOneResult:
    def test_nxcansas_holds_all_that_is_known(self, catalog, export):
        (path,) = export(catalog.key, "--output", "opal.h5")
        expected = catalog.result(catalog.key, 3)
        with h5py.File(path) as file:
            assert sorted(file) == ["sasentry01", "sasentry03"], "the second exposure failed"
            entry = file["sasentry03"]
            for name in ("I", "Idev", "Qdev", "Idev_noise"):
                assert_array_equal(entry[f"desmeared/{name}"], expected[name])
            for name, variable in (("I", "I_smeared"), ("Idev", "Idev_smeared"), ("I_resmeared", "I_resmeared")):
                assert_array_equal(entry[f"smeared/{name}"], expected[variable])
            assert entry["title"][()].decode() == "opal, exposure 3"
            assert entry["run"][()].decode() == catalog.run
            assert entry["sasinstrument/sassource/incident_wavelength"][()] == pytest.approx(0.154)
            assert entry["sasinstrument/sasdetector/SDD"][()] == 0.8
            psf = catalog.client["psfs"][catalog.beam].read()
            assert_array_equal(entry["sasinstrument/psf/beam"], psf["beam"])
            assert entry["sasinstrument/psf/sigma"][()] == psf["sigma"]
            assert_array_equal(entry["sasinstrument/psf_rings/p"], psf["p"])
            assert file["sasentry01/sasinstrument"] == entry["sasinstrument"], "stored once"
            reduced, desmeared = texts(entry["sasprocess01"]), texts(entry["sasprocess02"])
        assert {"exposure_time = 2.0", "bins = 50"} <= set(reduced)
        assert {
            "chi2 = 1.1",
            "flags = 12",
            "flags_meaning = NOISE_ESTIMATED EXTRAPOLATED",
            "answer = network",
            f"result = {catalog.key}",
            f"raw_uid = {catalog.run}",
            f"direct_beam_uid = {catalog.beam}",
            "model_version = 2.0.0",
            f"model_sha256 = {'d' * 64}",
            'config = {"bins": 50}',
            'pairing = {"how": "named", "reason": "named by the start document", "age": 3.0}',
            "failed_exposures = 2 (NaN in the frame)",
        } <= set(desmeared)
        assert any(term.startswith('versions = {"dsnet-bluesky"') for term in desmeared)

    @pytest.mark.parametrize("name", ["opal.h5", "opal.xml"])
    def test_sasdata_reads_it(self, catalog, export, name):
        (path,) = export(catalog.key, "--output", name)
        curves = Loader().load(str(path))
        assert [curve.title for curve in curves] == [f"opal, exposure {n}" for n in (1, 1, 3, 3)]
        for curve, number, I in zip(curves, (1, 1, 3, 3), ("I", "I_smeared") * 2, strict=True):
            expected = catalog.result(catalog.key, number)
            assert not curve.errors
            assert (curve.x_unit, curve.y_unit) == ("A^{-1}", "cm^{-1}")
            assert_allclose(curve.x, Q / 10)
            assert_allclose(curve.y, expected[I])
            assert_allclose(curve.dy, expected[I.replace("I", "Idev")])
            assert curve.run == [catalog.run]
            assert [step.name for step in curve.process] == ["reduce", "desmear"]
            assert {"nm": 0.154, "A": 1.54}[curve.source.wavelength_unit] == pytest.approx(curve.source.wavelength)
            assert {"m": 0.8, "mm": 800}[curve.detector[0].distance_unit] == curve.detector[0].distance
        assert_allclose(curves[0].dx, expected["Qdev"] / 10)

    def test_silx_plots_the_desmeared_curve_and_the_direct_beam(self, catalog, export):
        (path,) = export(catalog.key, "--output", "opal.h5")
        with silx.io.open(str(path)) as file:
            plot = silx.io.nxdata.get_default(file)
            assert plot.group.name == "/sasentry01/desmeared"
            assert plot.signal.attrs["units"] == "1/cm"
            assert_array_equal(plot.signal[()], catalog.result(catalog.key, 1)["I"])
            assert_array_equal(plot.errors[()], catalog.result(catalog.key, 1)["Idev"])
            beam = silx.io.nxdata.NXdata(file["sasentry03/sasinstrument/psf"])
            assert beam.is_valid
            assert beam.signal.shape == tuple(len(axis) for axis in beam.axes)

    def test_xml_obeys_the_schema(self, catalog, export):
        (path,) = export(catalog.key, "--output", "opal.xml")
        schema = etree.XMLSchema(etree.parse(SCHEMA))
        assert schema.validate(etree.parse(path)), schema.error_log

    @pytest.mark.parametrize(("name", "exact"), [("opal.h5", True), ("opal.xml", True), ("opal.txt", False)])
    def test_our_own_reader_gives_the_same_curve(self, catalog, export, name, exact):
        (path,) = export(catalog.key, "--exposure", 3, "--output", name)
        again, expected = read_curve(path, entry=1), catalog.result(catalog.key, 3)
        for variable in ("q", "I", "Idev", "Qdev"):
            assert_allclose(again[variable], expected[variable], rtol=0 if exact else 4e-16)
        assert again["I"].attrs["units"] == "1/cm"
        assert again.attrs["q_units_from"] == "file"

    def test_sasview_takes_columns_for_angstroms(self, catalog, export):
        (path,) = export(catalog.key, "--exposure", 1, "--output", "opal.txt")
        (curve,) = Loader().load(str(path))
        assert curve.x_unit == "A^{-1}"
        assert_allclose(curve.x, Q / 10)
        assert_allclose(curve.dx, catalog.result(catalog.key, 1)["Qdev"] / 10)
        head = path.read_text().split("\n")
        assert "# q (1/angstrom)  I (1/cm)  dI (1/cm)  dQ (1/angstrom)" in head
        assert f"# desmear, raw_uid: {catalog.run}" in head

    def test_a_result_outlives_the_frames_of_its_direct_beam(self, catalog, export, served):
        frame = served.data_directory / "detector/x_beam.edf"
        kept = frame.rename(frame.with_suffix(".kept"))
        try:
            (path,) = export(catalog.key, "--output", "opal.h5")
        finally:
            kept.rename(frame)
        with h5py.File(path) as file:
            told = [term for term in texts(file["sasentry01/sasprocess02"]) if term.startswith("psf")]
            if not told:  # the server had the PSF in its memory
                assert "psf" in file["sasentry01/sasinstrument"]


class TestSelections:
    def test_one_file_of_several_results(self, catalog, run, tmp_path):
        done = run("export", "--query", "sample=opal", "--query", "chi2<=1.5", "--output", "opals.h5")
        with h5py.File(tmp_path / "opals.h5") as file:
            assert sorted(file) == ["sasentry0001", "sasentry0002", "sasentry0003"]
            terms = [texts(file[f"{name}/sasprocess02"]) for name in sorted(file)]
        assert [f"result = {key}" in term for key, term in zip((catalog.key,) * 2 + (catalog.other,), terms, strict=True)]
        assert done.stderr == "", "what failed does not answer the question"
        assert len(Loader().load(str(tmp_path / "opals.h5"))) == 6

    def test_a_run_stands_for_its_results(self, catalog, run, tmp_path):
        done = run("export", catalog.run, "--output", "all.xml")
        assert [entry.get("name") for entry in etree.parse(tmp_path / "all.xml").getroot()] == [
            f"exposure {n}" for n in (1, 3, 1)
        ]
        left_out = done.stderr
        assert "This result failed, there is nothing to export: too few counts" in left_out
        assert "This result is running: it can be exported once it is complete." in left_out

    def test_a_folder_of_files(self, catalog, export):
        files = export("--query", f"run={catalog.run}", "--query", "status=complete", "--output", "folder")
        assert [path.name for path in files] == [f"opal_dsnet-2.0.0_{catalog.key}.h5", f"opal_dsnet-2.1.0_{catalog.other}.h5"]
        assert_array_equal(read_curve(files[1], entry=1)["I"], catalog.result(catalog.other, 1)["I"])

    def test_columns_are_a_file_for_each_exposure(self, catalog, export):
        files = export(catalog.run, "--query", "model=dsnet<3", "--format", "columns", "--output", "folder")
        names = [f"opal_dsnet-2.0.0_{catalog.key}_exposure{n}.txt" for n in (1, 3)] + [f"opal_dsnet-2.1.0_{catalog.other}.txt"]
        assert [path.name for path in files] == names
        assert_allclose(read_curve(files[1])["I"], catalog.result(catalog.key, 3)["I"], rtol=4e-16)

    def test_names_of_samples_that_no_file_could_have(self, catalog, run):
        key = catalog.store("2.0.0", 1.0, sample="../a/b\n1 2 3 \x01<&\"'>\U0001f48e")
        for format in ("nxcansas", "cansas-xml", "columns"):
            run("export", key, "--format", format, "--output", "folder")
        h5, txt, xml = sorted(Path("folder").iterdir())
        assert h5.name == f"a-b-1-2-3_dsnet-2.0.0_{key}.h5"
        for path in (h5, xml):
            assert read_curve(path, entry=1).attrs["sample"] == "../a/b 1 2 3 \ufffd<&\"'>\U0001f48e"
        assert_allclose(read_curve(txt)["q"], Q)


class TestRefused:
    def test_what_cannot_be_found(self, catalog, fails):
        fails("--output", "x.h5", match="Say what to export")
        fails("--query", "sample=nothing", "--output", "x.h5", match="No result answers the query")
        fails("--query", "sample=opal", "--query", "status=failed", "--output", "x.h5", match="complete; .*: .*too few counts")
        fails("--query", "sampel=opal", "--output", "x.h5", match="'sampel=opal' is not understood.*sample=AgBh")
        fails("nonsense", "--output", "x.h5", match="There is no result nonsense, nor one of a run")
        fails(catalog.key, "--query", "chi2<=1", "--output", "x.h5", match=f"no result {catalog.key} that answers the query")
        fails(catalog.failed.node.item["id"], catalog.key, "--output", "x.h5", match="too few counts")
        fails(catalog.running.node.item["id"], "--output", "x.h5", match="is running: it can be exported once")

    def test_exposures_that_are_not_there(self, catalog, fails):
        fails(catalog.key, "--exposure", 2, "--output", "x.h5", match="no exposure 2 to export: it failed")
        fails(catalog.key, "--exposure", 0, "--output", "x.h5", match="no exposure 0 to export: it holds 3, counted from 1")
        fails(catalog.run, "--exposure", 3, "--output", "folder", match=f"{catalog.other} has no exposure 3")
        fails(catalog.key, "--output", "x.txt", match="A file of columns holds one curve, and 2 are selected")

    def test_places_where_nothing_can_be_written(self, catalog, fails, export, tmp_path):
        fails(catalog.key, "--output", "no/x.h5", match="no is no folder; create it")
        fails(catalog.key, "--output", "no/folder", match="no is no folder; create it")
        fails(catalog.key, "--format", "columns", "--output", "x.h5", match="x.h5 is the name of a file of the format nxcansas")
        fails(catalog.key, "--format", "pdf", "--output", "x.h5", match="'pdf' is no format.*nxcansas, cansas-xml, columns")
        (path,) = export(catalog.other, "--output", "folder")
        before = path.read_bytes()
        fails(catalog.key, catalog.other, "--output", "folder", match=r"2\.1\.0_.*\.h5 exists; choose another name")
        fails(catalog.other, "--output", path, match="exists; choose another name")
        assert path.read_bytes() == before
        export(catalog.key, catalog.key, "--output", path, "--overwrite")
        assert path.read_bytes() != before

    def test_a_kill_leaves_no_half_a_file(self, catalog, tmp_path):
        """At any time: a file of the name is complete."""
        writer, target = catalog.begin("2.0.0", "much opal"), tmp_path / "opal.h5"
        writer.append(exposures(*([1.0] * 40)))
        writer.complete()
        environment = {**os.environ, "TILED_URI": catalog.uri, "TILED_API_KEY": catalog.api_key}
        command = [sys.executable, "-m", "dsnet_bluesky", "export", writer.node.item["id"], "--output", str(target)]
        process = subprocess.Popen(command, env=environment)
        while not list(tmp_path.glob(".opal.h5.*.part")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not target.exists()


FORMATS = ["nxcansas", "nxcansas.h5", "nxs", "application/x-nxcansas", "xml", "text/xml", "application/xml", "txt", "text/plain"]


class TestServed:
    def get(self, catalog, key: str, format: str):
        http = catalog.client.context.http_client
        return http.get(f"{catalog.uri}/api/v1/container/full/desmeared/{key}", params={"format": format})

    @pytest.mark.parametrize("format", FORMATS)
    def test_every_format_reads_back(self, catalog, tmp_path, format):
        answer = self.get(catalog, catalog.other, format)
        assert answer.status_code == 200, answer.text
        (path := tmp_path / "result").write_bytes(answer.read())
        again, expected = read_curve(path, entry=1), catalog.result(catalog.other, 1)
        for variable in ("q", "I", "Idev", "Qdev"):
            assert_allclose(again[variable], expected[variable], rtol=4e-16)

    def test_it_is_the_file_of_the_command(self, catalog, export):
        (path,) = export(catalog.key, "--output", "opal.h5")
        with h5py.File(io.BytesIO(self.get(catalog, catalog.key, "nxcansas").read())) as served, h5py.File(path) as file:
            assert sorted(served) == sorted(file)
            for name in ("desmeared/I", "smeared/Idev"):
                assert_array_equal(served[f"sasentry03/{name}"], file[f"sasentry03/{name}"])
            told, ours = (set(texts(each["sasentry01/sasprocess02"])) for each in (served, file))
            assert "answer = network" in told, "words, not numbers"
            assert ours - told == {f"result = {catalog.key}"}

    def test_one_exposure(self, catalog, tmp_path):
        answer = self.get(catalog, catalog.key, "text/plain;exposure=3")
        (path := tmp_path / "opal.txt").write_bytes(answer.read())
        assert_allclose(read_curve(path)["I"], catalog.result(catalog.key, 3)["I"])

    @pytest.mark.parametrize("format", ["nxcansas", "xml", "text/plain"])
    def test_what_cannot_be_exported_is_explained(self, catalog, format):
        said = {
            catalog.failed.node.item["id"]: "failed, there is nothing to export: too few counts",
            catalog.running.node.item["id"]: "is running",
        }
        for key, words in said.items():
            answer = self.get(catalog, key, format)
            assert (answer.status_code, words in answer.json()["detail"]) == (422, True)

    @pytest.mark.parametrize(
        ("format", "words"),
        [
            ("txt", "holds one curve, and the result of opal holds 2"),
            ("text/plain;exposure=2", "Exposure 2 of this result is not complete"),
            ("application/xml;exposure=9", "there is no exposure 9"),
            ("application/x-nxcansas;exposure=two", "is not understood; an exposure is asked for as"),
        ],
    )
    def test_exposures_that_are_not_there(self, catalog, format, words):
        answer = self.get(catalog, catalog.key, format)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]

    def test_no_more_than_fits_into_memory(self, monkeypatch):
        monkeypatch.setattr("dsnet_bluesky.adapters.exports.MOST_EXPOSURES", 1)
        node = DatasetAdapter.from_dataset(exposures(1.0, 2.0).drop_vars(["status", "answer"]))
        said = {"status": "complete", "raw_uid": "run"}
        with pytest.raises(HTTPException, match="422: The result holds 2 exposures, and the server exports 1 at most"):
            as_nxcansas("application/x-nxcansas", node, said, None)
        assert as_nxcansas("application/x-nxcansas;exposure=2", node, said, None)

    def test_any_client_exports(self, catalog, tmp_path):
        node = catalog.client["desmeared"][catalog.other]
        bare = Container(node.context, item=node.item, structure_clients=node.structure_clients)
        for name in ("opal.nxcansas.h5", "opal.xml", "opal.txt"):
            bare.export(tmp_path / name)
            assert_allclose(read_curve(tmp_path / name, entry=1)["I"], catalog.result(catalog.other, 1)["I"])


def test_the_how_to_is_right(catalog, run, tmp_path, monkeypatch):
    """Every command and line of it."""
    commands, python = (re.search(rf"```{name}\n(.*?)```", HOW_TO.read_text(), re.DOTALL)[1] for name in ("bash", "python"))
    words = [
        shlex.split(line, comments=True)
        for line in commands.replace("$KEY", catalog.key).replace("$RUN", catalog.run).splitlines()
    ]
    done = [run(*line[1:]) for line in words if line and line[0] == "dsnet-bluesky"]
    assert len(done) == 6
    assert all(each.stdout for each in done)
    assert len(list((tmp_path / "columns").iterdir())) == 3
    monkeypatch.setattr("tiled.client.from_uri", lambda uri, api_key: from_uri(catalog.uri, api_key=catalog.api_key))
    exec(python, {"key": catalog.key})
    for name in ("opal.h5", "opal.xml", "opal.txt", "opals.h5", "opal.nxcansas.h5"):
        assert read_curve(tmp_path / name, entry=1)["q"].size == Q.size


def test_columns_of_failures_tell_no_numbers(catalog):
    """A head may hold anything: it is never taken for the table."""
    said = {"status": "complete", "raw_uid": "run", "sample": "1 2\n3 4\n5 6", "failures": [], "note": "1 2 3\n4 5 6\n"}
    contents = of_result(exposure(1.0), said)
    assert all(line.startswith(b"# ") for line in next(columns.lines(contents)).splitlines())

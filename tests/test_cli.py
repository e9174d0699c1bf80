"""The command line, end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiled.client import from_uri
from typer.testing import CliRunner

import dsnet_bluesky
from dsnet_bluesky.cli import app
from dsnet_bluesky.cli.curves import FLAG_WORDS
from dsnet_bluesky.curvefiles import read_curve
from dsnet_bluesky.data import Flag
from dsnet_bluesky.smearing import Smearing
from tests.ports import free_port

EXAMPLES = Path(str(files("sasdata"))) / "example_data" / "1d_data"
HEAVY = ("torch", "pyFAI", "tiled", "numpy", "xarray", "matplotlib", "bluesky")


@pytest.fixture
def dsnet(tmp_path, monkeypatch):
    """Run a command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"TILED_API_KEY": None, "TILED_URI": None})

    def run(*words, status=0):
        done = runner.invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        return done

    return run


@pytest.fixture
def fails(dsnet, tmp_path):
    """Run a command on unusable input: one line on stderr, status 2, nothing written, nothing on stdout."""

    def run(*words, match):
        before = sorted(tmp_path.rglob("*"))
        done = dsnet(*words, status=2)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ")
        assert re.search(match, line), line
        assert sorted(tmp_path.rglob("*")) == before

    return run


def smeared_curve(sigma=0.03, noise=0.01, seed=1):
    """A sphere smeared on a finer and wider grid than that of the inversion."""
    q = np.linspace(0.03, 2.0, 150)
    operator = Smearing.rice(q, sigma, q_calc=np.linspace(0, 2.5, 4000))
    x = np.maximum(operator.q_calc, 1e-6) * 4
    truth = 100 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 0.1
    I = operator.apply(truth)
    rng = np.random.default_rng(seed)
    return q, I * (1 + noise * rng.normal(size=q.size)), noise * I


def write(path, *arrays, header="q (1/nm) I dI\n"):
    np.savetxt(path, np.transpose(arrays), header=header, comments="")
    return path


def stack(path, *, factors, errors=1):
    """NXcanSAS of one curve in several exposures, each multiplied."""
    q, I, dI = smeared_curve()
    with h5py.File(path, "w") as file:
        entry = file.create_group("entry")
        entry.attrs["canSAS_class"] = "SASentry"
        data = entry.create_group("data")
        data.attrs.update(canSAS_class="SASdata", signal="I", I_axes="Time,Q", Q_indices=[1])
        columns = {"Q": q, "I": np.outer(factors, I), "Idev": np.tile(errors * dI, (len(factors), 1))}
        for name, values in columns.items():
            data[name] = values
            data[name].attrs["units"] = "1/nm" if name == "Q" else "1/cm"
        data["I"].attrs["uncertainties"] = "Idev"
    return path


class TestStart:
    def test_help_names_every_command(self, dsnet):
        text = dsnet("--help").output
        for command in ("desmear", "serve", "demo", "ingest", "train", "register", "models"):
            assert command in text
            assert "--help" in dsnet(command, "--help").output

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys\nfrom dsnet_bluesky.cli import app\n"
            "try:\n    app(['desmear', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"

    def test_help_says_what_is_not_subtracted(self, dsnet):
        assert "subtracts them yet" in " ".join(dsnet("ingest", "--help").output.split())

    def test_version(self, dsnet):
        assert dsnet("--version").stdout.strip() == dsnet_bluesky.__version__

    def test_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "dsnet_bluesky", "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == dsnet_bluesky.__version__

    def test_a_fault_of_ours_keeps_its_traceback(self, dsnet, monkeypatch):
        def faulty(*_, **__):
            raise ValueError("a fault")

        monkeypatch.setattr("dsnet_bluesky.versions.list_models", faulty)
        with pytest.raises(ValueError, match="a fault"):
            dsnet("models", "list")

    def test_every_flag_has_its_words(self):
        assert set(FLAG_WORDS) == {flag.name for flag in Flag}


class TestDesmear:
    def test_text_with_an_option(self, dsnet, tmp_path):
        write(tmp_path / "sphere.dat", *smeared_curve())
        done = dsnet("desmear", "sphere.dat", "--sigma", 0.03, "--plot", "sphere.png")
        assert re.search(r"chi2 +(0\.[5-9]|1\.[0-5])", done.stdout)
        assert "150 points, 0.03 to 2 1/nm (unit of the file: 1/nm, says the file)" in done.stdout
        assert "gaussian: sigma 0.03 1/nm" in done.stdout
        assert "written   sphere_desmeared.h5" in done.stdout
        assert (tmp_path / "sphere.png").read_bytes().startswith(b"\x89PNG")
        desmeared = read_curve(tmp_path / "sphere_desmeared.h5", entry="sasentry01/desmeared")
        smeared = read_curve(tmp_path / "sphere_desmeared.h5", entry="sasentry01/smeared")
        assert_allclose(smeared["I"], smeared_curve()[1])
        # The first minimum is deeper than it was measured.
        minimum = slice(60, 110)
        assert desmeared["I"][minimum].min() < 0.8 * smeared["I"][minimum].min()

    def test_slits_of_a_real_file(self, dsnet, tmp_path):
        done = dsnet("desmear", EXAMPLES / "latex_smeared.xml", "--entry", "latex_usans", "--output", "usans.h5")
        assert "slit: half-length 1.17 1/nm" in done.stdout
        assert "says the file" in done.stdout
        assert FLAG_WORDS["EXTRAPOLATED"] in done.stdout
        with h5py.File(tmp_path / "usans.h5") as file:
            assert_allclose(file["sasentry01/smeared/dQl"], 1.17)
            assert file["sasentry01/desmeared/I"][0] > 20 * file["sasentry01/smeared/I"][0]
            terms = [v[()].decode() for k, v in file["sasentry01/sasprocess01"].items() if k.startswith("term")]
        assert {"source = latex_smeared.xml", "source_entry = latex_usans", "method = dsnet"} <= set(terms)

    def test_methods_and_their_options(self, dsnet, tmp_path):
        write(tmp_path / "sphere.dat", *smeared_curve())
        done = dsnet("desmear", "sphere.dat", "--sigma", 0.03, "-m", "lake", "-o", "iterations=3", "-o", "extrapolation=porod")
        assert "lake (extrapolation = porod, iterations = 3)" in done.stdout
        with h5py.File(tmp_path / "sphere_desmeared.h5") as file:
            terms = [term[()].decode() for name, term in file["sasentry01/sasprocess01"].items() if name.startswith("term")]
        options = next(term for term in terms if term.startswith("options = "))
        assert json.loads(options.removeprefix("options = ")) == {"iterations": 3, "extrapolation": "porod"}

    def test_what_was_assumed_is_said(self, dsnet, tmp_path):
        q, I, _ = smeared_curve()
        I[[3, 50]] = np.nan
        write(tmp_path / "sphere.dat", q / 10, I, header="")
        done = dsnet("desmear", "sphere.dat", "--sigma", 0.03)
        assert "1/angstrom, assumed: set it with --q-units" in done.stdout
        assert "2 points without a finite value" in done.stdout
        assert FLAG_WORDS["NOISE_ESTIMATED"] in done.stdout

    def test_errors_that_are_too_large_are_said(self, dsnet, tmp_path):
        q, I, dI = smeared_curve()
        write(tmp_path / "sphere.dat", q, I, 20 * dI)
        assert "chi2 is far below 1" in dsnet("desmear", "sphere.dat", "--sigma", 0.03).stdout

    @pytest.mark.parametrize(
        ("name", "begins"), [("x.txt", b"# "), ("x.xml", b"<?xml"), ("x.nxs", b"\x89HDF"), ("x", b"\x89HDF")]
    )
    def test_the_output_is_what_its_name_says(self, dsnet, tmp_path, name, begins):
        q, I, dI = smeared_curve()
        write(tmp_path / "sphere.dat", q, I, dI)
        dsnet("desmear", "sphere.dat", "--sigma", 0.03, "-m", "wiener", "--output", name)
        assert (tmp_path / name).read_bytes().startswith(begins)
        entry = {"x.txt": None, "x.xml": "1"}.get(name, "sasentry01/desmeared")
        assert_allclose(read_curve(tmp_path / name, entry=entry)["q"], q)

    def test_columns_hold_one_exposure(self, fails, tmp_path):
        stack(tmp_path / "stack.h5", factors=(1, 1))
        known = ("desmear", "stack.h5", "--sigma", 0.03, "--output", "x.txt")
        fails(*known, match=r"x\.txt can hold one exposure, and stack\.h5 has several; end its name in \.h5 or \.xml")

    def test_exposures_that_fail_are_named(self, dsnet, tmp_path):
        stack(tmp_path / "stack.h5", factors=(1, -1, 1), errors=20)
        done = dsnet("desmear", "stack.h5", "--sigma", 0.03, "-m", "lake")
        assert re.search(r"chi2 +0\.\d+, failed, 0\.\d+", done.stdout)
        assert re.search(r"note +exposure 2 failed: .*positive", done.stdout)
        assert "chi2 is far below 1" in done.stdout, "by the exposures that have one"

    def test_sorting_and_overwriting(self, dsnet, fails, tmp_path):
        q, I, dI = (a[::-1] for a in smeared_curve())
        write(tmp_path / "sphere.dat", q, I, dI)
        fails("desmear", "sphere.dat", "--sigma", 0.03, match=r"sphere\.dat: q is not ascending.*--sort")
        dsnet("desmear", "sphere.dat", "--sigma", 0.03, "--sort")
        fails("desmear", "sphere.dat", "--sigma", 0.03, "--sort", match="sphere_desmeared.h5 exists")
        dsnet("desmear", "sphere.dat", "--sigma", 0.03, "--sort", "--overwrite")


class TestBadInput:
    def test_files(self, fails, tmp_path):
        (tmp_path / "empty.dat").touch()
        (tmp_path / "noise.bin").write_bytes(np.random.default_rng(0).bytes(9999))
        (tmp_path / "half.h5").write_bytes((EXAMPLES / "FK403_0006_Nika.hdf").read_bytes()[:20000])
        fails("desmear", "nothing.dat", match="no such file")
        fails("desmear", "empty.dat", match="empty")
        fails("desmear", "noise.bin", match="binary")
        fails("desmear", "half.h5", match="truncated")
        fails("desmear", EXAMPLES / "latex_smeared.xml", match="1 = latex_sans, 2 = latex_usans")
        fails("desmear", EXAMPLES / "latex_smeared.xml", "--entry", 3, match="no curve '3'")

    def test_curves(self, fails, tmp_path):
        q, I, dI = smeared_curve()
        write(tmp_path / "curve.dat", q, I, dI)
        write(tmp_path / "negative.dat", q, I - 50, dI)
        write(tmp_path / "nan.dat", q, np.full(150, np.nan), dI)
        fails("desmear", "curve.dat", match="Give --slit-length")
        fails("desmear", "curve.dat", "--sigma", 1.5, match="shorter than the PSF")
        fails("desmear", "curve.dat", "--sigma", -0.1, match="sigma is -0.1; it must be positive")
        fails("desmear", "curve.dat", "--sigma", 0.1, "--slit-length", 1, match="give the one")
        fails("desmear", "nan.dat", "--sigma", 0.03, match="150 of 150 points hold NaN")
        fails("desmear", "negative.dat", "--sigma", 0.03, "--method", "lake", match="(?i)positive|negative")

    def test_options(self, fails, tmp_path):
        write(tmp_path / "curve.dat", *smeared_curve())
        known = ("desmear", "curve.dat", "--sigma", 0.03)
        fails(*known, "--method", "magic", match="There is no method 'magic'; the methods are .*lake")
        fails(*known, "-o", "magic=1", match="dsnet has no option magic; its options are")
        fails(*known, "-o", "magic", match="NAME=VALUE")
        for name in ("method", "smearing", "curves"):
            fails(*known, "-o", f"{name}=1", match=f"dsnet has no option {name}; its options are")
            fails("replay", "-m", "lake", "-o", f"{name}=1", match=f"lake has no option {name}; its options are")
            fails("watch", "-m", "icosahedra", "-o", f"{name}=1", match=f"icosahedra has no option {name}; its options are")
        for command in ("replay", "watch", "status"):
            fails(command, "-o", "magic", match="NAME=VALUE")
        fails("status", "--method", "magic", match="There is no method 'magic'; the methods are .*icosahedra, ift, lake")
        for command in ("replay", "watch"):
            fails(command, "-o", "magic=1", match="dsnet has no option magic; its options are")
        fails(*known, "-m", "map", "-o", "weight=abc", match="map: weight is 'abc'; it takes a finite number or null")
        fails(*known, "-m", "map", "-o", "weight=NaN", match="weight is nan")
        fails(*known, "-m", "lake", "-o", "iterations=1.5", match="iterations is 1.5; it takes a whole number or null")
        fails(*known, "--q-units", "furlong", match="1/nm or 1/angstrom")
        fails(*known, "--output", "nowhere/out.h5", match="nowhere is no folder")
        fails(*known, "--plot", "figure.xyz", match="end its name in one of .*png")
        fails("desmear", "curve.dat", "--beam-profile", "nothing.dat", match="no such file")

    @pytest.mark.parametrize("option", ["--slit-length", "--slit-width", "--sigma"])
    def test_numbers_that_are_none(self, fails, tmp_path, option):
        write(tmp_path / "curve.dat", *smeared_curve())
        for number in ("nan", "inf", "-inf"):
            fails("desmear", "curve.dat", option, number, match=f"{option} is {number}; give a finite number")

    def test_exposures_have_finite_numbers(self, fails):
        known = ("ingest", "frame.edf", "--purpose", "sample", "--poni", "saxs.poni")
        for option in ("--exposure-time", "--monitor", "--transmission"):
            fails(*known, option, "nan", match=f"{option} is nan")

    def test_figure_and_curves_in_one_file(self, fails, tmp_path):
        write(tmp_path / "curve.dat", *smeared_curve())
        names = ("--output", "x.png", "--plot", tmp_path / "x.png", "--overwrite")
        fails("desmear", "curve.dat", "--sigma", 0.03, *names, match="--plot and --output are one file")

    @pytest.mark.parametrize("option", ["--output", "--plot"])
    def test_what_is_read_is_never_written_to(self, fails, tmp_path, option):
        own = write(tmp_path / "own.dat", *smeared_curve())
        figure = write(tmp_path / "own.png", *smeared_curve())
        profile = write(tmp_path / "beam.png", [0, 0.1, 0.2], [1, 1, 0.5], header="")
        (tmp_path / "same.png").hardlink_to(figure)
        before = {path: path.read_bytes() for path in (own, figure, profile)}
        for name in ("own.png", "./own.png", "same.png"):
            fails("desmear", "own.png", "--sigma", 0.03, option, name, "--overwrite", match="is what is read.*give another name")
        fails("desmear", "own.png", "--sigma", 0.03, option, "own.png", match="is what is read")
        fails("desmear", "own.dat", "--beam-profile", "beam.png", option, "beam.png", "--overwrite", match="is what is read")
        assert before == {path: path.read_bytes() for path in before}

    @pytest.mark.parametrize("option", ["--output", "--plot"])
    def test_only_files_are_overwritten(self, fails, tmp_path, option):
        known = ("desmear", write(tmp_path / "own.dat", *smeared_curve()), "--sigma", 0.03, "--overwrite", option)
        (tmp_path / "target.png").write_text("kept")
        (tmp_path / "link.png").symlink_to("target.png")
        (tmp_path / "lost.png").symlink_to("nothing.png")
        os.mkfifo(tmp_path / "pipe.png")
        for name, why in {"link": "is a link", "lost": "is a link", "pipe": "no file that can be replaced"}.items():
            fails(*known, f"{name}.png", match=why)
        assert (tmp_path / "link.png").is_symlink()
        assert (tmp_path / "target.png").read_text() == "kept"

    def test_other_commands(self, fails, tmp_path):
        fails("serve", "nothing.yml", match=r"nothing\.yml does not exist")
        fails("train", "nothing", match="nothing")
        fails("train", "symmetry-denoiser", match="Say which runs to learn from")
        fails("train", "dsnet", "--query", "sample=gold", match="does not learn from runs")
        fails("train", "--device", "abacus", match="torch cannot use the device 'abacus' .*try cpu")
        nobody = ("--uri", "http://127.0.0.1:9")
        fails("register", *nobody, match="No Tiled server answers at http://127.0.0.1:9 .*dsnet-bluesky serve")
        fails("ingest", "a.edf", "--purpose", "sample", "--poni", "a.poni", *nobody, match="No Tiled server answers")

    @pytest.mark.parametrize("words", [("--limit", -1), ("--workers", -1), ("--batch", 0)])
    def test_replay_takes_no_negative_numbers(self, dsnet, words):
        assert f"Invalid value for '{words[0]}'" in dsnet("replay", *words, status=2).stderr

    def test_ports_that_are_none(self, dsnet):
        for command in ("serve", "demo", "watch"):
            assert "Invalid value for '--port'" in dsnet(command, "--port", 99999, status=2).stderr

    def test_a_server_needs_a_folder(self, fails, tmp_path):
        (tmp_path / "file").touch()
        for directory in ("file", "file/below"):
            fails("serve", "--directory", directory, match="cannot keep its data in .*name a folder")

    @pytest.mark.parametrize("uri", ["http://x", "mysql://x", "postgresql://u:p@h:abc/x"])
    def test_databases_that_are_none(self, fails, uri):
        fails("index", uri, match="is no uri of a catalog's database|not in mysql")

    def test_typer_names_what_is_missing(self, dsnet):
        assert "Missing option '--purpose'" in dsnet("ingest", "a.edf", "--poni", "a.poni", status=2).stderr


@pytest.fixture
def answering():
    """Begin a server that answers everything with a page of this status; give its address."""
    servers = []

    def begin(status):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"<html>")

            def log_message(self, *_):
                pass

        servers.append(server := HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


class TestServer:
    def test_ingest_and_register(self, dsnet, served, poni_file, beam_frame, sample_frames):
        fabio = pytest.importorskip("fabio.edfimage")
        names = [served.data_directory / "detector" / f"{name}.edf" for name in ("cli_beam", "cli_sample")]
        for name, frame in zip(names, (beam_frame, sample_frames[0]), strict=True):
            fabio.EdfImage(data=frame).write(str(name))
        server = ("--uri", served.uri, "--api-key", served.api_key)
        geometry = ("--poni", poni_file, *server)
        (beam,) = dsnet("ingest", names[0], "--purpose", "direct_beam", *geometry).stdout.split()
        sample = ("--purpose", "sample", "--sample", "AgBh", "--direct-beam", beam, "--exposure-time", 2)
        done = dsnet("ingest", names[1], *sample, *geometry)
        (uid,) = done.stdout.split()
        client = served.client()
        (key,) = re.findall(rf"{uid[:8]} complete: /desmeared/(\S+)", done.stderr)
        assert client["desmeared"][key].read()["chi2"].values == pytest.approx([1], abs=0.4)
        start = client["raw"][uid].metadata["start"]
        assert (start["sample"], start["direct_beam_uid"]) == ("AgBh", beam)
        assert client["curves"][uid].read().sizes["exposure"] == 1
        assert float(client["psfs"][beam].read()["counts"]) > 1e5
        dsnet("register", *server)  # perhaps what other tests have left on this server
        assert "curves: 0" in dsnet("register", *server).stdout

    def test_ingest_says_why_a_sample_could_not_be_desmeared(self, dsnet, served, poni_file, sample_frames):
        fabio = pytest.importorskip("fabio.edfimage")
        names = [served.data_directory / "detector" / f"{name}.edf" for name in ("closed_shutter", "no_beam")]
        for name, frame in zip(names, (0 * sample_frames[0], sample_frames[0]), strict=True):
            fabio.EdfImage(data=frame).write(str(name))
        server = ("--uri", served.uri, "--api-key", served.api_key, "--poni", poni_file)
        (beam,) = dsnet("ingest", names[0], "--purpose", "direct_beam", *server).stdout.split()
        done = dsnet("ingest", names[1], "--purpose", "sample", "--direct-beam", beam, *server, status=1)
        assert re.search(r"failed: /desmeared/\S+ \(The direct beam holds 0 counts; at least 10000", done.stderr)

    def test_a_wrong_key_is_said(self, fails, served):
        fails("register", "--uri", served.uri, "--api-key", "wrong", match="refuses .*--api-key")

    @pytest.mark.parametrize(
        "command", [("status",), ("export", "--output", "x.h5"), ("replay",), ("register",), ("compare", "a", "b")]
    )
    def test_a_missing_key_is_said(self, fails, served, command):
        fails(*command, "--uri", served.uri, match="wants an API key; give --api-key, or set TILED_API_KEY")

    def test_a_key_that_cannot_be_one_is_said_and_not_shown(self, fails, served):
        for key in ("schl\u00fcssel", "two\nlines", "xyz abc"):
            fails("register", "--uri", served.uri, "--api-key", key, match=f"^(?!.*{key[:3]}).*check --api-key or TILED_API_KEY")

    def test_a_wrong_path_of_the_server_is_said(self, fails, served):
        server = ("--uri", f"{served.uri}/api/v1/metadata/nowhere", "--api-key", served.api_key)
        fails("register", *server, match=r"has nothing there \(404\); check the path in --uri")

    @pytest.mark.parametrize(
        ("status", "why"),
        [
            (200, "is no Tiled server; check --uri"),
            (401, r"refuses the key \(401\); check --api-key"),
            (403, r"refuses the key \(403\); check --api-key"),
            (404, r"nothing there \(404\); check the path in --uri"),
            (500, r"is in trouble \(500\): try again later"),
            (503, r"is in trouble \(503\): try again later"),
        ],
    )
    def test_servers_that_do_not_serve(self, fails, answering, status, why):
        fails("register", "--uri", answering(status), "--api-key", "secret", match=why)

    @pytest.mark.parametrize("uri", ["http://127.0.0.1:abc", "http://[::1", "nowhere", "ftp://127.0.0.1"])
    def test_addresses_that_are_none(self, fails, uri):
        fails("register", "--uri", uri, "--api-key", "secret", match="is no address of a server .*write --uri as http")

    def test_serve_until_interrupted(self, tmp_path):
        environment = {**os.environ, "TILED_SINGLE_USER_API_KEY": "secret"}
        command = [sys.executable, "-m", "dsnet_bluesky", "serve", "--directory", "data", "--port", str(free_port())]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            client = wait_for(f"http://127.0.0.1:{command[-1]}", process)
            assert sorted(client) == ["analysed", "curves", "desmeared", "psfs", "raw"]
        finally:
            process.send_signal(signal.SIGTERM)
            # Ends only when the server, which holds the other end of the pipe, has ended too.
            process.communicate(timeout=30)


def wait_for(uri, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return from_uri(uri, api_key="secret")
        except Exception:
            time.sleep(0.3)
    raise AssertionError("the server did not come up")

"""Runs recorded before us: brought in by reference, completed by a mapping, and desmeared."""

import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
import xarray as xr
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from numpy.testing import assert_allclose
from tiled.client import from_context, from_uri
from tiled.client.context import Context
from tiled.config import Authentication
from tiled.queries import Key
from tiled.server.app import build_app
from typer.testing import CliRunner

from dsnet_bluesky.archives import bring_in, load_mapping, open_source, plan
from dsnet_bluesky.archives.completing import complete
from dsnet_bluesky.callbacks.desmear import desmear_runs
from dsnet_bluesky.cli import app
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Instrument
from dsnet_bluesky.pipeline import Config
from tests.archived import OldBeamline
from tests.ports import free_port

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to" / "archives.md"
QUICK = Config(method="lake", bins=100)
(MAPPING,) = re.findall(r"```toml\n(.*?)```", HOW_TO.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def client(make_client):
    """A catalog whose server answers, with status 500, where it cannot read a file."""
    return make_client(answer_errors=True)


@pytest.fixture
def make_line(detector_directory):
    """Make beamlines of yesterday, each with a MongoDB of its own."""
    lines = []

    def make(**options):
        line = OldBeamline(detector_directory, **options)
        lines.append(line)
        return line

    yield make
    for line in lines:
        line.close()


@pytest.fixture
def line(make_line):
    return make_line()


@pytest.fixture
def write_mapping(detector_directory):
    """Write the mapping of the how-to, changed by replacements, beside the detector's files."""

    def write(**changes):
        text = MAPPING
        for old, new in changes.pop("replace", {}).items():
            assert old in text
            text = text.replace(old, new)
        path = detector_directory / "smi.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def mapping(write_mapping):
    return load_mapping(write_mapping())


def results(client, uid):
    return list(client["desmeared"].search(Key("raw_uid") == uid).values())


class TestSources:
    """Where runs come from."""

    @pytest.fixture(scope="class")
    def many(self):
        """230 runs, two in each second, as databroker stores them; inserted out of order."""
        from databroker.mongo_normalized import MongoAdapter

        adapter = MongoAdapter.from_mongomock()
        for number in [*range(100, 230), *range(100)]:
            run = compose_run(time=1000.0 + number // 2, metadata={"number": number})
            adapter.get_serializer()("start", run.start_doc)
            adapter.get_serializer()("stop", run.compose_stop())
        return adapter

    def test_mongodb_gives_runs_in_order_and_bounds(self, many):
        source = open_source(many)
        times = [run.start["time"] for run in source.runs()]
        assert len(times) == 230
        assert times == sorted(times)
        assert {run.start["number"] for run in source.runs(1010, 1012)} == {20, 21, 22, 23}
        assert [run.start["time"] for run in source.runs(1100, limit=3)] == [1100, 1100, 1101]

    def test_one_run_by_its_uid(self, many):
        source = open_source(many)
        run = next(source.runs())
        found = source.run(run.uid)
        assert found is not None
        assert found.start == run.start
        assert source.run("none") is None

    def test_a_mongodb_that_a_tiled_server_mounts(self, many):
        with Context.from_app(build_app(many)) as context:
            source = open_source(from_context(context))
            times = [run.start["time"] for run in source.runs(1020)]
            assert times == sorted(times)
            assert len(times) == 190
            run = next(source.runs())
            assert [name for name, _ in run.documents()] == ["start", "stop"]

    def test_a_tiled_catalog(self, make_client):
        client = make_client(mounts=["/raw"])
        writer = TiledWriter(client["raw"])
        for when in (3.0, 1.0, 2.0):
            run = compose_run(time=when)
            writer("start", run.start_doc)
            writer("stop", run.compose_stop())
        source = open_source(client)
        assert [run.start["time"] for run in source.runs()] == [1.0, 2.0, 3.0]
        assert [run.start["time"] for run in source.runs(2.0, limit=1)] == [2.0]
        run = next(source.runs())
        assert [name for name, _ in run.documents()] == ["start", "stop"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("nonsense", r"'nonsense' is no address and no Tiled profile; the profiles are: .*mongodb://HOST/DATABASE"),
            ("databroker:nonsense", "'nonsense' is no address and no Tiled profile"),
            ("http://127.0.0.1:1", r"The archive http://127\.0\.0\.1:1 does not answer"),
            ("mongodb://user:secret@127.0.0.1:1/", r"mongodb://127\.0\.0\.1:1/ cannot be opened .*include a database"),
            ("mongodb://127.0.0.1:1/smi?serverSelectionTimeoutMS=50", r"mongodb://127\.0\.0\.1:1/smi cannot be opened"),
        ],
    )
    def test_a_source_that_is_none_is_refused(self, text, message):
        with pytest.raises(BadInput, match=message) as caught:
            open_source(text)
        assert "secret" not in str(caught.value)


class TestMapping:
    """What may be in the file."""

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("[sample]", "[sample", "is no TOML"),
            ("distance =", "distanc =", r"instrument\.distanc is no key of a mapping; did you mean distance\?"),
            ("[sample]", "[samples]", r"samples is no key of a mapping; did you mean sample\?"),
            ('unit = "mm"', 'unit = "kg"', r"instrument: distance: the unit 'kg' is none of m"),
            ('unit = "mm"', 'unit = "parsnip"', "the unit 'parsnip' is none of m"),
            ('path = "start.SDD", unit = "mm"', "value = 800", "distance = 800 needs a unit"),
            ('"start.SDD"', '"SDD"', r"instrument\.distance\.path: 'SDD' is no path; begin it with 'start\.'"),
            ('energy = "baseline.energy_energy"', "", "the geometry lacks wavelength or energy"),
            ('detector = { value = "Pilatus100k" }', "", "the geometry lacks detector or pixel_size"),
            (
                "[instrument]",
                '[instrument]\npixel_size = { value = 172, unit = "um" }',
                "give detector .* or pixel_size, not both",
            ),
            ("[instrument]", '[instrument]\nponi = { value = "a.poni" }', "beam_centre_x, .*: the .poni file says that already"),
            ("direct_beam = {", "beam = {", "The purpose 'beam' is unknown; use one of direct_beam"),
            ('"start.scan_type" = "empty"', '"scan_type" = "empty"', r"'scan_type' does not begin with 'start\.'"),
            (
                'uid = "start.beam_uid"',
                'uid = "baseline.beam"',
                r"direct_beam\.uid: 'baseline\.beam' does not begin with 'start\.'",
            ),
            ('path = "start.SDD", unit', 'path = "start.SDD", take = "last", unit', r"instrument\.distance\.take: .*'mean'"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_with_its_key(self, write_mapping, old, new, message):
        with pytest.raises(BadInput, match=message):
            load_mapping(write_mapping(replace={old: new}))

    def test_a_file_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(BadInput, match=r"none\.toml cannot be read"):
            load_mapping(tmp_path / "none.toml")

    def test_every_key_is_documented(self):
        from dsnet_bluesky.archives.mapping import ArchiveMapping, InstrumentMapping, Value

        text = HOW_TO.read_text()
        for model in (ArchiveMapping, InstrumentMapping, Value):
            assert all(key in text for key in model.model_fields)

    def test_values_are_read_in_our_units(self, line, mapping):
        """The geometry is that of the camera which took the frames, though the documents say it in mm and eV."""
        uid = line.beam()
        source = open_source(line.adapter)
        run = source.run(uid)
        (exposure,) = complete(run, "direct_beam", mapping, source.name).exposures
        known = line.camera.poni
        assert {key: exposure.instrument.poni[key] for key in known if key not in ("wavelength", "detector_config")} == {
            key: value for key, value in known.items() if key not in ("wavelength", "detector_config")
        }
        assert_allclose(exposure.instrument.poni["wavelength"], known["wavelength"], rtol=1e-9)
        assert exposure.instrument == Instrument(
            exposure.instrument.poni, slit_width=4e-3, slit_height=2.5e-3, attenuation=5000.0, exposure_time=60.0
        )

    def test_a_poni_file_pixels_and_defaults(self, line, write_mapping, detector_directory):
        import pyFAI

        pyFAI.load(dict(line.camera.poni)).save(str(detector_directory / "geometry.poni"))
        uid, source = line.sample(), open_source(line.adapter)
        text = """
            [instrument]
            poni = { value = "geometry.poni" }
            distance = { path = "start.nowhere", default = 2.5, unit = "m" }
            monitor = 12
        """
        path = write_mapping()
        path.write_text(text)
        (exposure,) = complete(source.run(uid), "sample", load_mapping(path), source.name).exposures
        assert exposure.instrument.poni["dist"] == 2.5
        assert exposure.instrument.poni["poni1"] == line.camera.poni["poni1"]
        assert exposure.instrument.monitor == 12

    def test_what_changes_within_a_run_is_not_guessed(self, line, write_mapping):
        source = open_source(line.adapter)
        moving = {'transmission = { path = "start.transmission", default = 1.0 }': 'monitor = "primary.ring"'}
        line.ring.readings = iter([10.0, 30.0])
        uid = line.sample(num=2)
        mapping = load_mapping(write_mapping(replace=moving))
        with pytest.raises(BadInput, match=r"instrument\.monitor: primary\.ring changes within the run \(10\.0 \.\.\. 30\.0\)"):
            complete(source.run(uid), "sample", mapping, source.name)
        moving = dict.fromkeys(moving, 'monitor = { path = "primary.ring", take = "mean" }')
        exposures = complete(source.run(uid), "sample", load_mapping(write_mapping(replace=moving)), source.name).exposures
        assert [exposure.instrument.monitor for exposure in exposures] == [20.0, 20.0]


class TestBringingIn:
    """From databroker's MongoDB to results."""

    @pytest.mark.parametrize("spec", ["AD_HDF5", "AD_TIFF"])
    def test_an_archive_is_brought_in_and_desmeared(self, client, make_line, mapping, spec):
        line = make_line(spec=spec)
        beam, sample, _ = line.beam(), line.sample(num=2, proposal={"proposal_id": "p7"}), line.align()
        source = open_source(line.adapter)
        summary = bring_in(source, mapping, client)
        assert (summary.new, summary.samples, summary.left_out, summary.refused) == ([beam, sample], [sample], 1, {})
        assert summary.remarks == {}
        statistics = desmear_runs(client, summary.samples, config=QUICK)
        assert statistics.errors == 0
        (result,) = results(client, sample)
        metadata = result.metadata
        assert (metadata["status"], metadata["exposures"], dict(metadata["failures"] or {})) == ("complete", 2, {})
        assert metadata["parent_node_map"] == {"sample": sample, "direct_beam": beam}
        assert metadata["pairing"]["how"] == "nearest"
        assert (metadata["sample_name"], metadata["proposal_id"]) == ("AgBh", "p7")
        curve = result.read().isel(exposure=0)
        ring = curve.sel(q=slice(0.8, 1.4))
        assert_allclose(
            ring["q"][int(ring["I"].values.argmax())], 2 * np.pi / 5.838, atol=0.03
        )  # silver behenate, in the right units
        start = client["raw"][sample].metadata["start"]
        assert start["archive"]["mapping_sha256"] == mapping.sha256
        assert {"instrument.energy", "start.purpose", "start.sample"} <= set(start["archive"]["supplied"])
        assert start["scan_type"] == "measure"
        self.check_served(client, line, beam, sample)

    def check_served(self, client, line, beam, sample):
        """The frames are the detector's, read where they lie; curves and the PSF are shown."""
        frames = client["raw"][sample]["primary"]["pil_image"].read()
        assert frames.shape == (2, 1, *line.camera.shape)
        node = client["raw"].include_data_sources()[sample]["primary"].base["pil_image"]
        assets = {Path(asset.data_uri.removeprefix("file://localhost")) for asset in node.data_sources()[0].assets}
        assert assets == set(line.files_of(sample))
        assert {sample, beam} <= set(client["curves"])
        assert beam in client["psfs"]

    def test_a_second_time_nothing_happens(self, client, line, mapping):
        uids = [line.beam(), line.sample()]
        source = open_source(line.adapter)
        bring_in(source, mapping, client)
        before = client["raw"][uids[1]].item
        again = bring_in(source, mapping, client)
        assert (again.new, again.there, again.samples) == ([], uids, uids[1:])
        assert client["raw"][uids[1]].item == before

    def test_what_was_interrupted_is_begun_again(self, client, line, mapping):
        """As after a crash: a start document and the first descriptor, of a process that is gone."""
        line.beam()
        uid, source = line.sample(), open_source(line.adapter)
        completed = complete(source.run(uid), "sample", mapping, source.name)
        completed.start["archive"]["writer"]["pid"] = 2**22 - 3
        writer = TiledWriter(client["raw"], normalizer=None)
        for name, doc in completed.documents[:3]:
            writer(name, doc)
        assert client["raw"][uid].metadata.get("stop") is None
        assert bring_in(source, mapping, client).refused == {}
        assert client["raw"][uid].metadata["stop"]["exit_status"] == "success"
        assert len(client["raw"][uid]["primary"]["pil_image"].read()) == 1

    @pytest.mark.parametrize("ours", [True, False])
    def test_what_another_process_writes_is_left_alone(self, client, line, mapping, ours):
        line.beam()
        uid, source = line.sample(), open_source(line.adapter)
        completed = complete(source.run(uid), "sample", mapping, source.name)
        if ours:
            completed.start["archive"]["writer"] = {"host": socket.gethostname(), "pid": 1, "time": time.time()}
        else:
            del completed.start["archive"]
        TiledWriter(client["raw"], normalizer=None)("start", completed.start)
        reason = bring_in(source, mapping, client).refused[uid]
        assert ("Process 1 on" if ours else "not from an archive") in reason
        assert uid in client["raw"]

    def test_a_missing_frame_is_a_failed_result_with_a_reason(self, client, line, mapping):
        line.beam()
        uid, source = line.sample(), open_source(line.adapter)
        (path,) = line.files_of(uid)
        path.unlink()
        planned = plan(source, mapping, client)[-1]
        assert (planned.state, planned.missing) == ("new", True)
        assert f"{path} does not exist" in planned.problems[0]
        summary = bring_in(source, mapping, client)
        assert summary.remarks[uid] == planned.problems
        desmear_runs(client, [uid], config=QUICK, retry_interval=0.01)
        (result,) = results(client, uid)
        assert (result.metadata["status"], result.metadata["reason"]) == ("failed", planned.problems[0])
        assert not result.read().get("I", xr.DataArray([])).notnull().any()

    def test_frames_that_a_file_lacks_are_named(self, client, line, mapping):
        import h5py

        line.beam()
        uid = line.sample(num=2)
        with h5py.File(line.files_of(uid)[0], "a") as file:
            file["entry/data/data"].resize(1, axis=0)
        planned = plan(open_source(line.adapter), mapping, client)[-1]
        assert "holds 1 of 2 frames" in planned.problems[0]

    def test_moved_directories(self, client, make_line, write_mapping, detector_directory, tmp_path):
        """The root of the resources is another now."""
        then, now = tmp_path / "then", detector_directory / "now"
        then.mkdir()
        line = OldBeamline(then, root=str(tmp_path))
        try:
            uids = [line.beam(), line.sample()]
        finally:
            line.close()
        shutil.move(then, now)
        shutil.copy(now / "mask.npy", detector_directory)
        moved = {"[files]": f'[files]\nroot_map = {{ "{then}" = "{now}" }}'}
        mapping = load_mapping(write_mapping(replace=moved))
        summary = bring_in(open_source(line.adapter), mapping, client)
        assert (summary.new, summary.remarks) == (uids, {})
        desmear_runs(client, summary.samples, config=QUICK)
        assert results(client, uids[1])[0].metadata["status"] == "complete"


class TestPairing:
    """What is paired with what, before anything is written."""

    def test_the_dry_run_tells_what_replay_does(self, client, line, mapping):
        first, second = line.beam(), line.beam(slit_w=1.0)
        third = line.beam()
        uids = [line.sample(), line.sample(slit_w=1.0), line.sample(beam_uid=first), line.sample(SDD=2000.0)]
        source, before = open_source(line.adapter), set(client["raw"])
        rows = {row.uid: row for row in plan(source, mapping, client)}
        assert [rows[uid].direct_beam for uid in uids] == [third, second, first, None]
        assert "named by the start document" in rows[uids[2]].pairing
        assert "the distances differ" in rows[uids[3]].problems[0]
        assert set(client["raw"]) == before
        desmear_runs(client, bring_in(source, mapping, client).samples[:3], config=QUICK)
        assert [results(client, uid)[0].metadata["direct_beam_uid"] for uid in uids[:3]] == [third, second, first]

    def test_beams_from_before_come_along_where_they_are_needed(self, client, line, mapping):
        named, unused, nearest = line.beam(), line.beam(), line.beam()
        since = time.time()
        uids = [line.sample(), line.sample(beam_uid=named)]
        summary = bring_in(open_source(line.adapter), mapping, client, since=since)
        assert summary.new == [nearest, uids[0], named, uids[1]]
        assert unused not in client["raw"]

    def test_a_beam_that_is_named_before_it_was_exposed_is_brought_in_once(self, client, line, mapping):
        line.beam()
        later = "11111111-2222-4333-8444-555555555555"
        line.sample(beam_uid=later)
        summary = bring_in(open_source(line.adapter), mapping, client)
        (reason,) = summary.remarks.values()
        assert f"The direct beam {later} is named" in reason[0]

    def test_many_beams_later_in_the_catalog_do_not_hide_the_nearest(self, client, store_raw_run, line, mapping):
        """The catalog looks at the newest by time, not at those that were stored first."""
        for number in range(25):
            run = store_raw_run(client, f"old-beam-{number}", purpose="direct_beam", time=1e9 + number)
            run.update_metadata({"stop": {"run_start": f"old-beam-{number}", "time": 1e9 + number + 0.5}})
        source = open_source(line.adapter)
        beam, sample = line.beam(), line.sample()
        bring_in(source, mapping, client)
        desmear_runs(client, [sample], config=QUICK)
        assert results(client, sample)[0].metadata["direct_beam_uid"] == beam


class TestBadInput:
    """What is wrong is said with what to do, and nothing partial is visible."""

    def test_a_wrong_path_is_refused_before_anything_is_written(self, client, line, write_mapping):
        line.beam()
        uid, before = line.sample(), set(client["raw"])
        mapping = load_mapping(write_mapping(replace={'"start.sample_name"': '"start.sampl_name"'}))
        message = (
            rf"The mapping smi\.toml does not fit the run {uid} \(.*\), the first with the purpose sample: sample\.name: "
            r"'start\.sampl_name' is not there: start has no 'sampl_name'; near it are: sample_name.*Nothing was written"
        )
        for function in (plan, bring_in):
            with pytest.raises(BadInput, match=message):
                function(open_source(line.adapter), mapping, client)
        assert set(client["raw"]) == before

    def test_rules_that_fit_nothing_are_refused(self, client, line, write_mapping):
        uid = line.sample()
        mapping = load_mapping(write_mapping(replace={"start.scan_type": "start.scan_typ"}))
        with pytest.raises(
            BadInput, match=rf"No run fits a rule .*purpose\.direct_beam: in the run {uid} .*near it are: scan_type"
        ):
            bring_in(open_source(line.adapter), mapping, client)

    def test_one_run_that_cannot_be_used_stops_no_other(self, client, line, mapping):
        """A run that lacks a value, one of another detector's shape, and one that was cut off."""
        line.beam()
        good = line.sample()
        lacking = line.sample(SDD=None)
        line.detector.spec = "AD_EIGER2"
        other = line.sample()
        line.detector.spec = "AD_HDF5"
        cut_off = line.sample()
        line.adapter.database["run_stop"].delete_one({"run_start": cut_off})
        last = line.sample()
        summary = bring_in(open_source(line.adapter), mapping, client)
        assert summary.samples == [good, last]
        assert "instrument.distance" in summary.refused[lacking]
        assert "The frames of pil_image are AD_EIGER2; HDF5 and TIFF are read" in summary.refused[other]
        assert "no stop document" in summary.refused[cut_off]
        assert not {lacking, other, cut_off} & set(client["raw"])

    def test_files_that_the_catalog_cannot_name_leave_nothing(self, client, line, mapping):
        """Two files with names of their own in one run: the catalog would know only the first."""
        line.beam()
        line.detector.stages_per_point = True
        uid = line.sample(num=2)
        line.detector.stages_per_point = False
        summary = bring_in(open_source(line.adapter), mapping, client)
        assert "cannot say where its frames are" in summary.refused[uid]
        assert uid not in client["raw"]

    def test_without_mapping_the_geometry_is_missed(self, client, line):
        uid = line.sample(purpose="sample")
        summary = bring_in(open_source(line.adapter), load_mapping(None), client)
        assert "does not say where the geometry is, and the run has none of its own" in summary.refused[uid]

    def test_a_server_that_may_not_read_the_files_is_told(self, make_client, line, mapping, tmp_path):
        line.beam()
        server = make_client(answer_errors=True)
        elsewhere = OldBeamline(tmp_path)
        try:
            shutil.copy(tmp_path / "mask.npy", line.folder)
            elsewhere.beam()
            summary = bring_in(open_source(elsewhere.adapter), mapping, server)
        finally:
            elsewhere.close()
        (remark,) = summary.remarks.values()
        assert f"--readable {tmp_path}" in remark[0]


# Before those that start servers of another key in this process: Tiled has one for all of them.
def test_runs_of_a_second_server_of_ours_need_no_mapping(served_line, served, client):
    since = time.time()
    beam, sample = served_line.beam(), served_line.sample()
    source = open_source(from_uri(served.uri, api_key=served.api_key))
    summary = bring_in(source, load_mapping(None), client, since=since)
    assert summary.new == [beam, sample]
    desmear_runs(client, summary.samples, config=QUICK)
    assert results(client, sample)[0].metadata["status"] == "complete"


@pytest.fixture
def archive_uri(served, make_line):
    """A second server process's stand-in: databroker's catalog behind Tiled on a port of its own."""
    line = OldBeamline(served.data_directory / "detector")
    port = free_port()
    served_archive = build_app(line.adapter, authentication=Authentication(single_user_api_key="archive"))
    server = uvicorn.Server(uvicorn.Config(served_archive, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield line, f"http://127.0.0.1:{port}"
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)
    line.close()


@pytest.mark.system
class TestCommand:
    """`dsnet-bluesky archive`, from one real server to another."""

    @pytest.fixture
    def archive(self, served):
        def run(*words, status=0, key=("--source-api-key", "archive"), **env):
            runner = CliRunner(env={"TILED_API_KEY": None, "TILED_URI": None, **env})
            options = ["--uri", served.uri, "--api-key", served.api_key, *key]
            done = runner.invoke(app, ["archive", *map(str, words), *options])
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            assert done.exit_code == status, done.output
            return done

        return run

    def test_dry_run_bring_in_and_again(self, archive, archive_uri, served):
        line, uri = archive_uri
        mapping = line.folder / "smi.toml"
        mapping.write_text(MAPPING)
        beam, sample = line.beam(), line.sample()
        rows = json.loads(archive(uri, "--mapping", mapping, "--dry-run", "--json").stdout)
        assert [(row["uid"], row["direct_beam"], row["state"]) for row in rows] == [(beam, None, "new"), (sample, beam, "new")]
        assert sample[:8] in archive(uri, "--mapping", mapping, "--dry-run").stdout
        assert sample not in served.client()["raw"]
        done = archive(uri, "--mapping", mapping)
        assert done.stdout.split() == [sample]
        assert "2 brought in, 0 already there, 0 refused" in done.stderr
        assert served.client()["raw"][sample].metadata["start"]["archive"]["source"] == uri
        again = json.loads(archive(uri, "--mapping", mapping, "--json").stdout)
        assert (again["new"], again["there"]) == ([], [beam, sample])

    def test_what_is_refused_is_status_1_and_bad_input_2(self, archive, archive_uri):
        line, uri = archive_uri
        mapping = line.folder / "smi.toml"
        mapping.write_text(MAPPING)
        line.beam(), line.sample()
        refused = line.sample(SDD="far")
        done = archive(uri, "--mapping", mapping, status=1)
        assert re.search(rf"{refused[:8]} sample .*refused \(instrument\.distance: ", done.stderr)
        done = archive(uri, "--mapping", line.folder / "none.toml", status=2)
        assert done.stderr.startswith("Error: The mapping")
        done = archive(uri, "--mapping", mapping, "--since", "yesterday", status=2)
        assert "'yesterday' is no time" in done.stderr

    def test_a_profile_by_both_its_names(self, archive, archive_uri, tmp_path, monkeypatch):
        line, uri = archive_uri
        mapping = line.folder / "smi.toml"
        mapping.write_text(MAPPING)
        line.beam()
        sample = line.sample()
        (tmp_path / "profiles.yml").write_text(f"smi:\n  uri: {uri}\n")
        monkeypatch.setattr("tiled.profiles.paths", [tmp_path])
        assert archive("smi", "--mapping", mapping).stdout.split() == [sample]
        again = archive("databroker:smi", "--mapping", mapping, key=(), TILED_API_KEY="archive")
        assert again.stdout.split() == [sample]

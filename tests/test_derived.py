"""What is derived is written once, exposure by exposure, and says what became of it."""

import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiled.client.xarray import DatasetClient
from tiled.queries import Key

from dsnet_bluesky.data import RESULT_VARIABLES, BadInput, concat_exposures, describe, failed_exposure
from dsnet_bluesky.derived import AlreadyStored, ResultWriter, register_all, register_curves, register_psf, results
from dsnet_bluesky.documents import Instrument, result_metadata
from dsnet_bluesky.ingest import ingest

START = {"uid": "raw-1", "time": 1.7e9, "sample": "latex", "scan_id": 7}
METADATA = result_metadata(START, direct_beam_uid="beam-1", config={"method": "map"}, config_sha256="0" * 64, method="map")


@pytest.fixture
def key() -> str:
    """Of a result that no other test writes."""
    return str(uuid.uuid4())


def exposure(level: float, n: int = 20, names: Sequence[str] = RESULT_VARIABLES) -> xr.Dataset:
    """A result of one exposure, as the pipeline gives it."""
    units = {"units": "1/cm"}
    variables: dict[str, Any] = {name: (("exposure", "q"), np.full((1, n), level + i), units) for i, name in enumerate(names)}
    variables |= {"chi2": ("exposure", [1.0]), "flags": ("exposure", np.array([3])), "status": ("exposure", ["ok"])}
    coords = {"q": ("q", np.linspace(0.1, 2, n), {"units": "1/nm"})}
    return describe(xr.Dataset(variables, coords, {"method": "map", "options": "{}"}))


def short(level: float, n: int = 20) -> xr.Dataset:
    """A result with fewer variables: each costs two requests."""
    return exposure(level, n, ["I", "Idev"])


def plain(node: Any) -> DatasetClient:
    """The client that somebody without this package gets."""
    return DatasetClient(node.context, item=node.item, structure_clients=node.structure_clients)


def test_a_result_grows_and_reads_as_a_dataset(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    for number, level in enumerate((1.0, 10.0, 100.0), start=1):
        writer.append(exposure(level))
        assert client["desmeared"][key].read().sizes == {"exposure": number, "q": 20}
    assert client["desmeared"][key].status == "running"
    writer.complete()
    expected = concat_exposures([exposure(level) for level in (1.0, 10.0, 100.0)])
    node = client["desmeared"][key]
    xr.testing.assert_equal(node.read(), expected)
    xr.testing.assert_equal(plain(node).read().drop_vars("status"), expected.drop_vars("status"))
    status = plain(node).read().status
    assert (status.values.tolist(), status.flag_values, status.flag_meanings) == ([1, 1, 1], [1, 2], "ok failed")
    for read in (node.read(), plain(node).read()):
        assert read.I.attrs == expected.I.attrs
        assert read.attrs == {"status": "complete", "raw_uid": "raw-1", "method": "map", "options": "{}"}
    assert node.metadata["exposures"] == 3
    assert node["I"].chunks == ((1, 1, 1), (20,))


def test_results_are_found_by_their_metadata(make_client):
    client = make_client()
    ResultWriter.create(client, "one", METADATA).fail("too few counts")
    ResultWriter.create(client, "two", {**METADATA, "sample": "AgBh", "raw_uid": "raw-2"})
    found = client["desmeared"]
    assert list(found.search(Key("sample") == "AgBh")) == ["two"]
    assert list(found.search(Key("raw_uid") == "raw-1")) == ["one"]
    assert list(found.search(Key("status") == "failed")) == ["one"]
    assert list(found.search(Key("parent_node_map.direct_beam") == "beam-1").search(Key("method") == "map")) == ["one", "two"]


def test_failed_exposures_are_rows_with_a_reason(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append_failure("all pixels are masked")  # before q is known
    writer.append(exposure(1.0))
    writer.append_failure("NaN in the frame")
    writer.complete()
    node = client["desmeared"][key]
    read = node.read()
    assert read.status.values.tolist() == ["failed", "ok", "failed"]
    assert np.isnan(read.I[0]).all()
    assert np.isfinite(read.I[1]).all()
    reasons = {failure["exposure"]: failure["reason"] for failure in node.metadata["failures"]}
    assert reasons == {0: "all pixels are masked", 2: "NaN in the frame"}
    assert node.status == "complete"


def test_how_it_went_is_kept_for_each_exposure(client, key):
    """As variables like chi2: the attributes of a result are those of its first exposure only."""
    writer = ResultWriter.create(client, key, METADATA)
    told = [("network", 1.5), ("ift", 40.0), ("proximal", 6.0)]
    for place, (answer, chi2) in enumerate(told):
        writer.append(short(1.0).assign(answer=("exposure", [answer]), chi2_network=("exposure", [chi2])))
        if place == 1:
            writer.append_failure("NaN in the frame")
    writer.complete()
    read, bare = client["desmeared"][key].read(), plain(client["desmeared"][key]).read()
    assert read.answer.values.tolist() == ["network", "ift", "", "proximal"]
    np.testing.assert_array_equal(read.chi2_network, [1.5, 40.0, np.nan, 6.0])
    assert bare.answer.values.tolist() == [1, 4, 0, 2]
    assert bare.answer.flag_values == [1, 2, 3, 4]
    assert bare.answer.flag_meanings == "network proximal map ift"


def test_failed_exposures_of_a_batch_keep_their_reasons(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append_failure("all pixels are masked")
    good = short(1.0)
    batch = concat_exposures([good, failed_exposure(good), good])
    for _ in range(2):
        writer.append(batch.assign_attrs(failures='[{"exposure": 1, "reason": "50 decades"}]'))
    writer.complete()
    node = client["desmeared"][key]
    assert node.read().status.values.tolist() == ["failed", "ok", "failed", "ok", "ok", "failed", "ok"]
    reasons = {failure["exposure"]: failure["reason"] for failure in node.metadata["failures"]}
    assert reasons == {0: "all pixels are masked", 2: "50 decades", 5: "50 decades"}
    assert "failures" not in node.read().attrs


def test_the_first_exposure_settles_the_variables(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0).assign(weight=("exposure", [3.0])))
    with pytest.raises(BadInput, match="share their variables; diameter, weight is not in all of them: desmear them with one"):
        writer.append(short(1.0).assign(diameter=("exposure", [12.0])))


def test_a_result_without_a_good_exposure_fails(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append_failure("all pixels are masked")
    writer.complete()
    node = client["desmeared"][key]
    assert (node.status, node.reason) == ("failed", "all pixels are masked")
    for read in (node.read(), plain(node).read()):
        assert not read.variables
        assert read.attrs["reason"] == "all pixels are masked"


def test_a_result_is_written_once(client):
    for key, end in (("complete", ResultWriter.complete), ("failed", lambda writer: writer.fail("no direct beam"))):
        writer = ResultWriter.create(client, key, METADATA)
        writer.append(short(1.0))
        end(writer)
        with pytest.raises(AlreadyStored, match=key) as caught:
            ResultWriter.create(client, key, METADATA)
        assert caught.value.status == key


def test_a_failed_result_may_be_begun_again_a_complete_one_never(client, key):
    ResultWriter.create(client, key, METADATA).fail("no direct beam")
    again = ResultWriter.create(client, key, METADATA, replace_failed=True)
    with pytest.raises(AlreadyStored, match="running"):
        ResultWriter.create(client, key, METADATA, replace_failed=True)
    again.append(short(1.0))
    again.complete()
    with pytest.raises(AlreadyStored, match="complete"):
        ResultWriter.create(client, key, METADATA, replace_failed=True)


def test_an_abandoned_result_is_begun_again(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.abandon()
    assert ResultWriter.create(client, key, METADATA) is not writer


def test_a_result_that_is_being_written_is_left_alone(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    with pytest.raises(AlreadyStored, match="running"):
        ResultWriter.create(client, key, METADATA)
    del writer  # abandoned within this process
    ResultWriter.create(client, key, METADATA)


@pytest.mark.parametrize(
    ("host", "pid", "age", "abandoned"),
    [
        ("here", "dead", 0.0, True),
        ("here", "alive", 1e6, False),
        ("elsewhere", "alive", 60.0, False),
        ("elsewhere", "alive", results.LEASE + 60, True),
    ],
)
def test_what_a_crash_left_behind_is_begun_again(client, key, host: str, pid: str, age: float, abandoned: bool):
    first = ResultWriter.create(client, key, METADATA)
    first.append(short(1.0))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {
        "host": first.node.metadata["writer"]["host"] if host == "here" else host,
        "pid": dead.pid if pid == "dead" else os.getppid(),
    }
    first.node.update_metadata({"writer": owner, "updated": time.time() - age})
    if not abandoned:
        with pytest.raises(AlreadyStored):
            ResultWriter.create(client, key, METADATA)
        return
    second = ResultWriter.create(client, key, METADATA)
    second.append(short(5.0))
    second.complete()
    assert client["desmeared"][key].read().I.values[:, 0].tolist() == [5.0]


def test_an_interrupted_append_can_be_repeated(client, key, monkeypatch):
    writer = ResultWriter.create(client, key, METADATA)
    put = ResultWriter._put

    def fails_at(name: str):
        def broken(self: ResultWriter, variable: str, values: xr.DataArray) -> None:
            if variable == name:
                raise ConnectionError("planted")
            put(self, variable, values)

        return broken

    for level, name in ((1.0, "Idev"), (2.0, "flags")):
        before = writer.exposures
        monkeypatch.setattr(ResultWriter, "_put", fails_at(name))
        with pytest.raises(ConnectionError):
            writer.append(short(level))
        assert client["desmeared"][key].read().sizes.get("exposure", 0) == before
        monkeypatch.setattr(ResultWriter, "_put", put)
        writer.append(short(level))
    writer.complete()
    read = client["desmeared"][key].read()
    assert read.I.values[:, 0].tolist() == [1.0, 2.0]
    assert read.chi2.values.tolist() == [1.0, 1.0]


def test_exposures_of_another_q_are_refused(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    with pytest.raises(BadInput, match="these have 21 points, those before 20"):
        writer.append(short(1.0, n=21))


def test_registering_again_gives_the_same_node(client, write_edf, poni, sample_frames, beam_frame):
    (uid,) = ingest([write_edf("beam", beam_frame)], client=client, purpose="direct_beam", poni=poni)
    run = client["raw"][uid]
    before = client["curves"][uid].item
    assert register_curves(client, run).item["id"] == register_psf(client, run).item["id"] == uid
    assert client["curves"][uid].item == before


def test_the_backlog_is_registered(make_client, write_edf, poni, beam_frame, sample_frames):
    client = make_client()
    (beam,) = ingest([write_edf("beam", beam_frame)], client=client, purpose="direct_beam", poni=poni)
    (sample,) = ingest([write_edf("sample", sample_frames[0])], client=client, purpose="sample", poni=poni)
    client["raw"].create_container(
        key="empty", metadata={"start": {"uid": "empty", "time": 0.0}}, specs=list(client["raw"][beam].specs)
    )
    assert register_all(client) == {"curves": 0, "psfs": 0, "skipped": 1}
    client["curves"].delete_contents([beam, sample])
    client["psfs"].delete_contents(beam)
    assert register_all(client) == {"curves": 2, "psfs": 1, "skipped": 1}
    assert client["curves"][sample].read().sizes["exposure"] == 1


def test_a_psf_belongs_to_a_direct_beam(client, write_edf, poni, sample_frames):
    (uid,) = ingest([write_edf("sample", sample_frames[0])], client=client, purpose="sample", poni=poni)
    with pytest.raises(BadInput, match="purpose 'sample'"):
        register_psf(client, client["raw"][uid])


def test_another_instrument_may_be_given(client, write_edf, poni, sample_frames):
    (uid,) = ingest([write_edf("sample", sample_frames[0])], client=client, purpose="sample", poni=poni)
    recorded = client["curves"][uid].read()
    client["curves"].delete_contents(uid)
    register_curves(client, client["raw"][uid], instrument=Instrument(poni={**poni, "dist": 1.6}, exposure_time=2.0))
    other = client["curves"][uid].read()
    assert float(other.q[-1]) == pytest.approx(float(recorded.q[-1]) / 2, rel=0.01)
    assert float(other.I.mean()) == pytest.approx(float(recorded.I.mean()) / 2, rel=0.05)


def test_a_server_without_our_mounts_is_named(make_client, key):
    raw = make_client(mounts=["/raw"])
    with pytest.raises(BadInput, match="no /desmeared"):
        ResultWriter.create(raw, key, METADATA)


def test_derived_nodes_carry_the_tags_of_their_run(make_client, key, tmp_path: Path, write_edf, poni, beam_frame):
    policy = "tiled.access_control.access_policies:DummyAccessPolicy"
    client = make_client(directory=tmp_path, access_control={"access_policy": policy, "args": {}})
    with sqlite3.connect(tmp_path / "catalog.db") as database:
        database.execute("INSERT INTO access_tags (name) VALUES ('proposal-1')")
    tags = {"tiled_access_tags": ["proposal-1"]}
    (uid,) = ingest([write_edf("beam", beam_frame)], client=client, purpose="direct_beam", poni=poni, metadata=tags)
    writer = ResultWriter.create(client, key, {**METADATA, "raw_uid": uid})
    writer.append(short(1.0))
    nodes = [client["raw"][uid], client["curves"][uid], client["psfs"][uid], client["desmeared"][key]]
    nodes.append(client["desmeared"][key, "I"])
    assert [list(node.access_tags) for node in nodes] == [["proposal-1"]] * 5

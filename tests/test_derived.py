"""What is derived is written once, exposure by exposure, and says what became of it."""

import dataclasses
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xarray as xr
from tiled.client import record_history, utils
from tiled.client.array import ArrayClient
from tiled.client.utils import ClientError
from tiled.client.xarray import DatasetClient
from tiled.queries import Key
from tiled.utils import path_from_uri

from dsnet_bluesky.data import RESULT_VARIABLES, BadInput, concat_exposures, describe, failed_exposure
from dsnet_bluesky.derived import (
    AlreadyStored,
    Finished,
    LostClaim,
    NoRawRun,
    ResultWriter,
    is_abandoned,
    raw_frames,
    raw_frames_of,
    register_all,
    register_curves,
    register_psf,
    results,
    store_together,
)
from dsnet_bluesky.documents import Instrument, result_metadata
from dsnet_bluesky.export.stored import contents_of
from dsnet_bluesky.ingest import ingest

START = {"uid": "raw-1", "time": 1.7e9, "sample": "latex", "scan_id": 7}
METADATA = result_metadata(START, direct_beam_uid="beam-1", config={"method": "map"}, config_sha256="0" * 64, method="map")


@pytest.fixture(scope="module", autouse=True)
def raw_runs(client, store_raw_run) -> None:
    """Store the runs that the results of this module are of."""
    for uid in ("raw-1", "raw-2"):
        store_raw_run(client, uid)


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
    """A result with fewer variables."""
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
    assert node[node.metadata["rows"]].chunks[0] == (1, 1, 1), "an exposure is a file of its own, there as a whole or not at all"


def test_results_are_found_by_their_metadata(make_client, store_raw_run):
    client = make_client()
    for uid in ("raw-1", "raw-2"):
        store_raw_run(client, uid)
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
    with pytest.raises(
        BadInput, match="share their variables; diameter, weight is not in all of them alike: answer them with one"
    ):
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


def test_a_result_belongs_to_its_writer_as_soon_as_the_server_has_it(client, key):
    class Slow(ResultWriter):
        def __init__(self, *args: Any):
            # Another thread looks at the node while its writer still waits to hear that it was made.
            with pytest.raises(AlreadyStored, match="running"):
                ResultWriter.create(client, key, METADATA)
            super().__init__(*args)

    writer = Slow.create(client, key, METADATA)
    writer.append(exposure(1.0))
    writer.complete()
    assert client["desmeared"][key].read().sizes["exposure"] == 1


def test_a_result_that_is_completed_while_it_is_looked_at_is_kept(client, key, monkeypatch):
    """Its writer is read, as it were, a moment before it completes its result and leaves it."""
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))

    def completed_before(*arguments: Any) -> bool:
        monkeypatch.undo()
        writer.complete()
        return is_abandoned(*arguments)

    monkeypatch.setattr(results, "is_abandoned", completed_before)
    with pytest.raises(AlreadyStored, match="complete"):
        ResultWriter.create(client, key, METADATA)
    assert client["desmeared"][key].read().I.values[:, 0].tolist() == [1.0]


@contextmanager
def losing_one_answer(client: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server does what it is asked, and its answer is lost."""
    ask = getattr(client.context.http_client, method)

    def lose(url: Any, **more: Any) -> Any:
        answer = ask(url, **more)
        if "/metadata/" not in str(url):
            return answer
        monkeypatch.undo()
        raise httpx.ReadTimeout("lost", request=answer.request)

    monkeypatch.setattr(utils, "TILED_RETRY_ATTEMPTS", 1)
    monkeypatch.setattr(client.context.http_client, method, lose)
    with pytest.raises(httpx.ReadTimeout) as caught:
        yield
    kept.append(caught.value)


kept: list[BaseException] = []
"""Errors that somebody still looks at, with all that their tracebacks hold."""


def test_a_failure_that_was_announced_without_an_answer_is_announced_once(client, key, monkeypatch):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    writer.append_failure("file 1 vanished")
    with losing_one_answer(client, "patch", monkeypatch):
        writer.append_failure("file 2 vanished")
    writer.append_failure("file 2 vanished")
    writer.append(short(2.0))
    writer.complete()
    failures = client["desmeared"][key].metadata["failures"]
    assert [(failure["exposure"], failure["reason"][:6]) for failure in failures] == [(1, "file 1"), (2, "file 2")]


def test_a_result_that_was_made_without_an_answer_is_begun_again_at_once(client, key, monkeypatch):
    with losing_one_answer(client, "post", monkeypatch):
        ResultWriter.create(client, key, METADATA)
    assert client["desmeared"][key].metadata["status"] == "running"
    ResultWriter.create(client, key, METADATA).fail("no direct beam")


def foreign(writer: ResultWriter, **owner: Any) -> None:
    """Make a result look as if another process, perhaps of another machine, wrote it."""
    before = writer.node.metadata["writer"]
    writer.node.update_metadata({"writer": {**before, **owner}})


def dead_process() -> int:
    """Pid of a process that is gone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return dead.pid


def test_what_a_process_that_is_gone_left_behind_is_begun_again(client, key):
    first = ResultWriter.create(client, key, METADATA)
    first.append(short(1.0))
    foreign(first, pid=dead_process())
    second = ResultWriter.create(client, key, METADATA)
    second.append(short(5.0))
    second.complete()
    assert client["desmeared"][key].read().I.values[:, 0].tolist() == [5.0]
    assert client["desmeared"][key].metadata["attempts"] == 2


def test_what_was_left_before_the_machine_was_started_is_begun_again(client, key):
    """Another process may have the number of its writer now."""
    foreign(ResultWriter.create(client, key, METADATA), pid=os.getppid(), boot="before")
    ResultWriter.create(client, key, METADATA)


def test_what_a_living_process_writes_is_left_alone(client, key, monkeypatch):
    foreign(ResultWriter.create(client, key, METADATA), pid=os.getppid())
    monkeypatch.setattr(results, "LEASE", 0.0)  # its silence does not matter, because it is known to live
    for _ in range(2):
        with pytest.raises(AlreadyStored):
            ResultWriter.create(client, key, METADATA)


def test_a_process_that_was_killed_writes_no_more_though_it_is_still_listed():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # it has ended, and nobody has asked how
    writer = {"host": results.socket.gethostname(), "pid": process.pid, "claim": "1"}
    deadline = time.monotonic() + 20
    while not (gone := is_abandoned("key", {"writer": writer, "updated": 0.0})) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone
    process.wait()


def test_another_machine_is_known_by_its_silence_whatever_its_clock_says(client, key, monkeypatch):
    monkeypatch.setattr(results, "LEASE", 0.5)
    first = ResultWriter.create(client, key, METADATA)
    foreign(first, host="elsewhere")
    first.node.update_metadata({"updated": time.time() - 1e9})
    with pytest.raises(AlreadyStored):
        ResultWriter.create(client, key, METADATA)  # the first look begins the wait
    time.sleep(0.6)
    first.node.update_metadata({"updated": time.time() + 1e9})
    with pytest.raises(AlreadyStored):
        ResultWriter.create(client, key, METADATA)  # it was touched
    time.sleep(0.6)
    assert ResultWriter.create(client, key, METADATA) is not first


def test_a_writer_that_was_taken_for_dead_writes_nothing_more(client, key, monkeypatch):
    first = ResultWriter.create(client, key, METADATA)
    first.append(short(1.0))
    foreign(first, pid=dead_process())
    second = ResultWriter.create(client, key, METADATA)
    second.append(short(5.0))
    monkeypatch.setattr(results, "LEASE", 0.0)  # the first one was silent for longer than half of it
    for late in (lambda: first.append(short(1.0)), first.complete, lambda: first.fail("late")):
        with pytest.raises(LostClaim):
            late()
    monkeypatch.undo()
    second.complete()
    assert client["desmeared"][key].read().I.values[:, 0].tolist() == [5.0]


def test_a_writer_keeps_its_claim_while_nothing_comes(client, key, monkeypatch):
    writer = ResultWriter.create(client, key, METADATA)
    before = client["desmeared"][key].metadata["updated"]
    writer.keep_claim()
    assert client["desmeared"][key].metadata["updated"] == before, "it was touched a moment ago"
    monkeypatch.setattr(results, "CLAIM_INTERVAL", 0.0)
    writer.keep_claim()
    assert client["desmeared"][key].metadata["updated"] > before


def test_result_of_a_run_that_is_removed_meanwhile(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    client["desmeared"].delete_contents(key, recursive=True, external_only=False)
    with pytest.raises(LostClaim, match=key):
        writer.append(short(2.0))


def test_no_result_without_its_raw_run(client, key, store_raw_run):
    uid = f"late-{key}"
    with pytest.raises(NoRawRun, match=uid):
        ResultWriter.create(client, key, {**METADATA, "raw_uid": uid})
    assert key not in client["desmeared"]
    threading.Timer(0.3, store_raw_run, (client, uid)).start()
    assert ResultWriter.create(client, key, {**METADATA, "raw_uid": uid}, patience=20.0)


@pytest.mark.parametrize("step", ["_put_data_source", "pack"])
def test_an_interrupted_append_can_be_repeated(client, key, monkeypatch, step):
    writer = ResultWriter.create(client, key, METADATA)

    def broken(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("planted")

    monkeypatch.setattr(results, step, broken)
    with pytest.raises(ConnectionError):
        writer.append(short(1.0))
    for read in (client["desmeared"][key].read(), plain(client["desmeared"][key]).read()):
        assert read.sizes.get("exposure", 0) == 0
    monkeypatch.undo()
    writer.append(short(1.0))
    with monkeypatch.context() as planted:
        planted.setattr(ArrayClient, "patch", broken)
        with pytest.raises(ConnectionError):
            writer.append(short(2.0))
    writer.append(short(2.0))
    writer.complete()
    read = client["desmeared"][key].read()
    assert read.I.values[:, 0].tolist() == [1.0, 2.0]
    assert read.chi2.values.tolist() == [1.0, 1.0]


def test_an_exposure_costs_two_requests(client, key, monkeypatch):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(exposure(1.0))
    sent: list[str] = []
    send = client.context.http_client.send
    monkeypatch.setattr(
        client.context.http_client, "send", lambda r, **o: sent.append(f"{r.method} {r.url.path}") or send(r, **o)
    )
    writer.append(exposure(2.0))
    place = f"{key}/{writer.node.metadata['rows']}"
    assert sent == [f"PATCH /api/v1/array/full/desmeared/{place}", f"PATCH /api/v1/metadata/desmeared/{key}"]


def test_what_is_begun_again_shows_nothing_of_before(client, key):
    for level in (1.0, 5.0):
        writer = ResultWriter.create(client, key, METADATA, replace_failed=True)
        writer.append(short(level))
        assert plain(client["desmeared"][key]).read(["I"]).I.values[:, 0].tolist() == [level]
        folder = folder_of_rows(client["desmeared"][key])
        assert folder.is_dir()
        if level == 1.0:
            first = folder
        writer.fail("planted")
    client["desmeared"].delete_contents(key, recursive=True, external_only=False)
    assert not first.exists(), "the rows go with their result"
    assert not folder.exists()


def test_rows_that_no_node_knows_are_in_nobodys_way(client, key):
    """A server that is killed at the wrong moment leaves a folder behind."""
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    folder = folder_of_rows(client["desmeared"][key])
    shutil.copytree(folder, folder.with_name("kept"))
    client["desmeared"].delete_contents(key, recursive=True, external_only=False)
    folder.with_name("kept").rename(folder)
    again = ResultWriter.create(client, key, METADATA)
    again.append(short(5.0))
    assert client["desmeared"][key].read().I.values[:, 0].tolist() == [5.0]


def folder_of_rows(node: Any) -> Path:
    rows = node[node.metadata["rows"]]
    return Path(path_from_uri(rows.data_sources()[0].assets[0].data_uri))


def test_what_is_not_announced_is_not_shown(client, key, monkeypatch):
    """An append whose answer was lost may be repeated with something else."""
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    with monkeypatch.context() as planted:
        planted.setattr(ResultWriter, "_update", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("planted")))
        with pytest.raises(ConnectionError):
            writer.append(short(2.0))
    node = client["desmeared"][key]
    assert node.read().sizes["exposure"] == plain(node).read().sizes["exposure"] == 1
    writer.append_failure("the file vanished")
    for read in (node.read(), plain(node).read()):
        assert np.isnan(read.I.values[1]).all()
    assert node.read().status.values.tolist() == ["ok", "failed"]


def test_rows_that_come_while_a_client_reads_do_no_harm(client, key):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    node = client["desmeared"][key]
    stored = node[node.metadata["rows"]]
    writer.append(short(2.0))
    assert stored.shape[0] == 1
    assert stored.read((slice(0, 1),)).shape[0] == 1


def test_more_rows_than_the_server_remembers(client, key, monkeypatch):
    monkeypatch.setattr("dsnet_bluesky.adapters.results.CACHED_BYTES", 100)
    writer = ResultWriter.create(client, key, METADATA)
    for level in (1.0, 2.0):
        writer.append(short(level))
        assert plain(client["desmeared"][key]).read().I.values[-1, 0] == level


@pytest.mark.parametrize("change", [{"extra": ("exposure", [1.0])}, {"chi2": ("exposure", np.array([1]))}])
def test_an_exposure_of_another_kind_is_refused(client, key, change):
    writer = ResultWriter.create(client, key, METADATA)
    writer.append(short(1.0))
    with pytest.raises(BadInput, match="is not in all of them alike"):
        writer.append(short(1.0).assign(change))


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


def test_a_server_without_our_adapter_is_told_what_it_lacks(make_client, key, store_raw_run, monkeypatch):
    described = results._source
    monkeypatch.setattr(results, "_source", lambda *a: dataclasses.replace(described(*a), mimetype="application/x-unknown"))
    client = make_client()
    store_raw_run(client, "raw-1")
    with pytest.raises(BadInput, match="add adapters_by_mimetype of /desmeared"):
        ResultWriter.create(client, key, METADATA)


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


def test_frames_of_many_runs_are_found_with_two_requests(client, store_raw_run, tmp_path: Path, write_edf, poni, beam_frame):
    files = [write_edf(f"many-{number}", beam_frame) for number in range(3)]
    uids = [ingest([file], client=client, purpose="direct_beam", poni=poni)[0] for file in files]
    store_raw_run(client, empty := str(uuid.uuid4()))
    runs = {uid: client["raw"][uid] for uid in [*uids[:2], empty]}
    raw = client["raw"]
    with record_history() as history:
        found = raw_frames_of(raw, runs)
    assert len(history.requests) == 2
    assert list(found) == list(runs), "and no others"
    assert str(found.pop(empty)) == f"Run {empty} holds no frames: no stream with an image that was written to a file."
    for uid, frames in found.items():
        assert frames.exposures() == raw_frames(runs[uid]).exposures()


class TestStoredTogether:
    """Results that are finished before they are stored share the rows of the first of them."""

    def finished(self, client, store_raw_run, count: int, *, tags: list[str] | None = None) -> list[Finished]:
        made = []
        for number in range(count):
            uid = str(uuid.uuid4())
            store_raw_run(client, uid)
            dataset = concat_exposures([exposure(10.0 * number + k + 1) for k in range(1 + number % 2)])
            made.append(Finished(str(uuid.uuid4()), {**METADATA, "raw_uid": uid}, dataset, tags))
        return made

    def test_each_reads_as_its_own(self, client, store_raw_run):
        results = self.finished(client, store_raw_run, 4)
        assert store_together(client, results) == []
        for result in results:
            node = client["desmeared"][result.key]
            assert node.metadata["status"] == "complete"
            assert node.metadata["attrs"]["status"] == "complete"
            for read in (node.read(), plain(node).read()):
                assert np.array_equal(read["I"].values, result.dataset["I"].values)
                assert read.attrs["raw_uid"] == result.metadata["raw_uid"]
            told = contents_of(node).terms
            assert told["raw_uid"] == result.metadata["raw_uid"]
            assert not {"rows", "rows_of", "first_row"} & set(told), "where rows lie is of no use in a file"

    def test_what_is_there_stays(self, client, store_raw_run):
        results = self.finished(client, store_raw_run, 3)
        assert store_together(client, results[:1]) == []
        assert store_together(client, results[1:2]) == []
        before = dict(client["desmeared"][results[0].key].metadata)
        assert store_together(client, results) == [results[0].key, results[1].key]
        assert dict(client["desmeared"][results[0].key].metadata) == before
        assert len(client["desmeared"].search(Key("raw_uid") == results[2].metadata["raw_uid"])) == 1

    def test_one_that_is_there_does_not_keep_the_others_away(self, client, store_raw_run):
        results = self.finished(client, store_raw_run, 4)
        assert store_together(client, results[2:3]) == []
        assert store_together(client, results) == [results[2].key]
        for result in results:
            assert np.array_equal(client["desmeared"][result.key].read()["I"].values, result.dataset["I"].values)

    def test_subscribers_hear_of_each(self, served, store_raw_run):
        client, told = served.client(), {}
        heard = client["desmeared"].subscribe()

        def hear(news):  # by name: Tiled holds on to it weakly
            told[news.key] = news.model_dump(exclude={"subscription"})

        heard.child_created.add_callback(hear)
        with heard.start_in_thread():
            results = self.finished(client, store_raw_run, 3)
            store_together(client, results)
            deadline = time.monotonic() + 20
            while len(told) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
        assert set(told) == {result.key for result in results}
        first, *others = (told[result.key] for result in results)
        for other, result in zip(others, results[1:], strict=True):
            assert set(other) == set(first), "Tiled's own words"
            assert {key: other[key] for key in ("type", "structure_family", "specs")} == {
                key: first[key] for key in ("type", "structure_family", "specs")
            }
            assert other["metadata"]["raw_uid"] == result.metadata["raw_uid"]
            assert set(other["data_sources"][0]) == set(first["data_sources"][0])

    def test_a_server_without_the_route_is_told_what_it_lacks(self, make_client, store_raw_run):
        client = make_client(routers=[])
        with pytest.raises(BadInput, match="storing:router"):
            store_together(client, self.finished(client, store_raw_run, 2))

    def test_other_grids_are_stored_by_themselves(self, client, store_raw_run):
        one, other = self.finished(client, store_raw_run, 2)
        other = dataclasses.replace(other, dataset=exposure(3.0, n=7))
        assert store_together(client, [one, other]) == []
        assert client["desmeared"][other.key].read().sizes["q"] == 7

    def test_rows_of_others_are_found_by_their_whole_name_only(self, client, store_raw_run):
        """Who writes a result can show in it only what he knows the random name of."""
        one, other = self.finished(client, store_raw_run, 2)
        store_together(client, [one, other])
        node = client["desmeared"][other.key]
        (source,) = node.data_sources()
        source.parameters["rows"] = source.parameters["rows"].rpartition("/")[0] + "/rows-1"
        results._put_data_source(node, source)
        with pytest.raises(ClientError, match="no rows of results"):
            plain(node).read()

"""DesmearCallback under a real RunEngine and a real catalog, with planted faults."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import h5py
import httpx
import numpy as np
import pytest
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky.utils import FailedStatus
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from ophyd_async.core import TriggerInfo

from dsnet_bluesky.callbacks import desmear as desmear_module
from dsnet_bluesky.callbacks import pairing, sample_runs
from dsnet_bluesky.callbacks.desmear import DesmearCallback, desmear_runs
from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import ResultWriter, is_abandoned
from dsnet_bluesky.documents import result_key
from dsnet_bluesky.pipeline import Config, PreparedCurves
from dsnet_bluesky.versions import load_model
from dsnet_bluesky.watch import Backlog

CONFIG = Config(bins=60, per_bin=32)
WAIT = 60


def subscribe(line, **options):
    callback = DesmearCallback(line.client, config=CONFIG, **options)
    line.engine.subscribe(callback)
    return callback


@pytest.fixture
def desmear(line):
    callback = subscribe(line)
    yield callback
    assert callback.close()


def test_results_appear_exposure_by_exposure_while_the_plan_runs(line, desmear):
    seen = []

    def watch(name, doc):
        # On the RunEngine's thread, after the event: waiting here holds the plan, so what is stored now is stored live.
        if name == "event" and purpose_of(line.docs) == "sample":
            end = time.monotonic() + WAIT
            while desmear.statistics.exposures < doc["seq_num"] and time.monotonic() < end:
                time.sleep(0.02)
            seen.append((desmear.statistics.exposures, desmear.statistics.runs))

    def purpose_of(docs):
        return [doc for name, doc in docs if name == "start"][-1]["purpose"]

    line.engine.subscribe(watch)
    beam = line.beam()
    sample = line.sample(exposures=3, direct_beam_uid=beam)
    assert [exposures for exposures, _ in seen] == [1, 2, 3]
    assert {runs for _, runs in seen} == {0}, "all before the run had ended"
    assert desmear.wait(WAIT)
    node = line.result(sample)
    assert node.metadata["status"] == "complete"
    assert node.metadata["parent_node_map"] == {"sample": sample, "direct_beam": beam}
    result = node.read()
    assert dict(result.sizes) == {"exposure": 3, "q": result.sizes["q"]}
    assert (result["status"] == "ok").all()
    assert np.isfinite(result["I"]).all()
    assert line.client["curves"][sample].read().sizes["exposure"] == 3
    assert float(line.client["psfs"][beam].read()["counts"]) > 1e5


def test_without_a_direct_beam_the_result_says_so(line):
    desmear = subscribe(line, max_beam_age=0.0)  # other tests share this catalog
    sample = line.sample()
    assert desmear.wait(WAIT)
    desmear.close()
    assert line.result(sample).metadata["status"] == "failed"
    assert "No direct beam was exposed in the 0 hours before this sample" in line.result(sample).metadata["reason"]


def test_direct_beam_of_other_slits_is_refused_by_name(line, desmear):
    beam = line.beam()
    line.engine(bps.configure(line.instrument, slit_width=0.8e-3))
    sample = line.sample(direct_beam_uid=beam)
    assert desmear.wait(WAIT)
    assert line.result(sample).metadata["status"] == "failed"
    assert "slit_width 0.800 mm, direct beam 4.000 mm" in line.result(sample).metadata["reason"]


def test_direct_beam_that_nobody_knows(line, desmear):
    sample = line.sample(direct_beam_uid="not-there")
    assert desmear.wait(WAIT)
    assert (
        "The direct beam not-there is named for this run, but the catalog does not hold it"
        in line.result(sample).metadata["reason"]
    )


def test_too_few_counts_in_the_direct_beam(line, desmear):
    line.beam(seconds=0.02)
    sample = line.sample()
    assert desmear.wait(WAIT)
    assert "counts; at least 10000 are needed" in line.result(sample).metadata["reason"]


def test_nearest_earlier_direct_beam_that_fits_is_taken(line, desmear):
    first = line.beam()
    fitting = line.beam()
    line.engine(bps.configure(line.instrument, slit_height=1e-3))
    line.beam()
    line.engine(bps.configure(line.instrument, slit_height=2.5e-3))
    sample = line.sample()
    assert desmear.wait(WAIT)
    assert line.result(sample).metadata["direct_beam_uid"] == fitting != first


def test_fresh_callback_finds_the_direct_beam_in_the_catalog(line):
    beam = line.beam()
    callback = subscribe(line)
    named, nearest = line.sample(direct_beam_uid=beam), line.sample()
    assert callback.wait(WAIT)
    callback.close()
    assert [line.result(uid).metadata["status"] for uid in (named, nearest)] == ["complete", "complete"]
    assert line.result(nearest).metadata["direct_beam_uid"] == beam


def test_direct_beam_that_has_not_ended_is_passed_over(delivered):
    line, writer = delivered
    good = line.beam()
    line.deliver(writer)
    line.beam()
    line.deliver(writer, ended=False)
    sample = line.sample()
    line.deliver(writer)
    assert desmear_runs(line.client, [sample], config=CONFIG).errors == 0
    assert line.result(sample).metadata["status"] == "complete"
    assert line.result(sample).metadata["direct_beam_uid"] == good
    beams = pairing.DirectBeams(line.client["raw"], CONFIG, max_age=3600.0)
    beams.list_once(time.time() - 60, time.time())
    (exposure,) = exposures_of_documents(line.client["raw"][sample].documents())
    assert beams.find(exposure).beam.run_uid == good, "also where they are listed once, as a replay does"


def test_named_direct_beam_is_waited_for_until_it_has_ended(delivered):
    line, writer = delivered
    beam = line.beam()
    stop = line.deliver(writer, ended=False)
    sample = line.sample(direct_beam_uid=beam)
    line.deliver(writer)
    backlog = Backlog(line.client, CONFIG)
    assert [task.run_uid for task in backlog.scan()] == [sample]
    desmear_runs(line.client, [sample], config=CONFIG)
    (failed,) = line.results(sample)
    assert failed.metadata["failure"]["kind"] == "direct_beam"
    assert f"The direct beam {beam} is named for this run, but the catalog does not hold it, or not to its end" in failed.reason
    assert list(backlog.scan()) == []
    writer(*stop)
    assert [(task.run_uid, task.why) for task in backlog.scan()] == [(sample, "waits for a direct beam")]
    desmear_runs(line.client, [sample], config=CONFIG)
    assert {node.metadata["status"] for node in line.results(sample)} == {"failed", "complete"}


def test_runs_that_have_not_ended_are_refused_and_the_others_done(delivered):
    line, writer = delivered
    line.beam()
    line.deliver(writer)
    growing = line.sample()
    line.deliver(writer, ended=False)
    ended = line.sample()
    line.deliver(writer)
    with pytest.raises(BadInput, match=f"not hold these runs to their end: {growing}"):
        desmear_runs(line.client, [growing, ended], config=CONFIG)
    assert line.result(ended).metadata["status"] == "complete"
    assert line.results(growing) == []


def test_one_bad_frame_costs_one_row(line, desmear, monkeypatch):
    line.beam()
    frame, count = line.camera.frame, iter(range(3))
    monkeypatch.setattr(line.camera, "frame", lambda *a: frame(*a) if next(count) != 1 else np.full(line.camera.shape, -1, "i4"))
    sample = line.sample(exposures=3)
    assert desmear.wait(WAIT)
    node = line.result(sample)
    assert node.read()["status"].values.tolist() == ["ok", "failed", "ok"]
    assert np.isnan(node.read()["I"][1]).all()
    (failure,) = node.metadata["failures"]
    assert failure["exposure"] == 1
    assert "no usable image" in failure["reason"]


def test_exposure_of_a_changed_instrument_costs_its_row(line, desmear):
    beam = line.beam()

    def plan():
        yield from bps.open_run({"purpose": "sample", "sample": "AgBh", "direct_beam_uid": beam})
        for change in ({}, {"slit_width": 0.8e-3}, {"slit_width": 4e-3, "transmission": 0.5}):
            yield from bps.configure(line.instrument, **change)
            yield from bps.prepare(line.beamline.detector, TriggerInfo(livetime=60.0), wait=True)
            yield from bps.trigger_and_read([line.beamline.detector, line.instrument])
        yield from bps.close_run()

    def staged():
        yield from bps.mv(line.beamline.beamstop.radius, line.beamstop, line.beamline.changer.sample, "AgBh")
        yield from bps.configure(line.instrument, mask=line.folder / "mask.npy")
        yield from bps.stage(line.beamline.detector)
        yield from plan()
        yield from bps.unstage(line.beamline.detector)

    (sample,) = line.engine(staged())
    assert desmear.wait(WAIT)
    node = line.result(sample)
    assert node.read()["status"].values.tolist() == ["ok", "failed", "ok"]
    assert "(slit_width 4.000 mm -> 0.800 mm); expose it in a run of its own" in node.metadata["failures"][0]["reason"]


def test_file_that_vanished(line):
    line.beam()
    sample = line.sample()
    line.file_of(sample).unlink()
    callback = DesmearCallback(line.client, config=CONFIG, retry_interval=0.1)
    for name, doc in line.docs:
        callback(name, doc)
    assert callback.wait(WAIT)
    callback.close()
    assert line.result(sample).metadata["status"] == "failed"
    assert "does not exist" in line.result(sample).metadata["reason"]


def test_error_of_ours_becomes_a_failed_row_and_the_worker_goes_on(line, desmear, monkeypatch):
    line.beam()
    with monkeypatch.context() as planted:
        planted.setattr(PreparedCurves, "answer", lambda *a, **k: 1 / 0)
        failing = line.sample(exposures=2)
        assert desmear.wait(WAIT)
    assert [doc["exit_status"] for name, doc in line.docs if name == "stop"] == ["success", "success"]
    assert line.result(failing).metadata["status"] == "failed"
    assert "Internal error, please report it: ZeroDivisionError" in line.result(failing).metadata["reason"]
    assert desmear.statistics.errors == 2
    working = line.sample()
    assert desmear.wait(WAIT)
    assert line.result(working).metadata["status"] == "complete"


def test_worker_that_hangs_does_not_slow_the_plan_and_finishes_later(line, monkeypatch):
    line.beam()

    def duration():
        start = time.perf_counter()
        line.sample(exposures=3)
        return time.perf_counter() - start

    line.sample()  # what is computed once is computed now
    without = min(duration() for _ in range(2))
    release, prepare = threading.Event(), pairing.prepare_exposures
    monkeypatch.setattr(pairing, "prepare_exposures", lambda *a, **k: (release.wait(WAIT), prepare(*a, **k))[1])
    callback = subscribe(line)
    hanging = min(duration() for _ in range(2))
    assert hanging < 1.5 * without + 0.5
    assert callback.statistics.exposures == 0, "the worker does hang"
    assert not callback.wait(0.1)
    release.set()
    assert callback.wait(WAIT)
    callback.close()
    assert callback.statistics.exposures == 6


def test_full_queue_puts_the_run_off_and_loses_nothing(line, monkeypatch):
    beam = line.beam()
    release, prepare = threading.Event(), pairing.prepare_exposures
    monkeypatch.setattr(pairing, "prepare_exposures", lambda *a, **k: (release.wait(WAIT), prepare(*a, **k))[1])
    callback = subscribe(line, queue_size=6)
    first = line.sample(exposures=4, direct_beam_uid=beam)
    second = line.sample(exposures=2, direct_beam_uid=beam)
    assert callback.statistics.exposures == 0
    release.set()
    assert callback.wait(WAIT)
    callback.close()
    assert callback.statistics.deferred == 2
    for uid, exposures in ((first, 4), (second, 2)):
        assert line.result(uid).metadata["status"] == "complete"
        result = line.result(uid).read()
        assert result.sizes["exposure"] == exposures
        assert len(np.unique(result["I_smeared"].values[:, 10])) == exposures, "each exposure once"


def test_catalog_that_does_not_answer_puts_the_run_off(line, desmear, monkeypatch):
    line.beam()
    append, attempts = ResultWriter.append, iter(range(100))

    def outage(writer, dataset):
        if next(attempts) in (1, 2):
            raise httpx.ConnectError("planted")
        append(writer, dataset)

    monkeypatch.setattr(ResultWriter, "append", outage)
    sample = line.sample(exposures=3)
    assert desmear.wait(WAIT)
    assert desmear.statistics.deferred == 1
    node = line.result(sample)
    assert node.metadata["status"] == "complete"
    assert node.read()["status"].values.tolist() == ["ok", "ok", "ok"]


@pytest.fixture
def outage(monkeypatch):
    """Nothing is stored while it is set."""
    away, append = threading.Event(), ResultWriter.append

    def fail(writer, dataset):
        if away.is_set():
            raise httpx.ConnectError("planted")
        append(writer, dataset)

    monkeypatch.setattr(ResultWriter, "append", fail)
    away.set()
    return away


def test_run_that_was_given_up_can_be_done_later_in_the_same_process(line, outage, monkeypatch):
    beam = line.beam()
    monkeypatch.setattr(desmear_module, "ATTEMPTS", 3)
    callback = subscribe(line, retry_interval=0.1)
    sample = line.sample(direct_beam_uid=beam)
    assert callback.wait(WAIT)
    assert callback.close()
    assert callback.statistics.abandoned == [sample]
    assert line.result(sample).metadata["status"] == "running"
    outage.clear()
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 1
    assert line.result(sample).metadata["status"] == "complete"


def test_close_finishes_what_was_put_off(line, outage):
    beam = line.beam()
    callback = subscribe(line, retry_interval=0.1)
    sample = line.sample(direct_beam_uid=beam)
    threading.Timer(1.0, outage.clear).start()
    assert callback.close(WAIT)
    assert line.result(sample).metadata["status"] == "complete"


def test_close_names_what_it_could_not_finish(line, outage, caplog):
    beam = line.beam()
    callback = subscribe(line, retry_interval=0.1)
    sample = line.sample(direct_beam_uid=beam)
    assert not callback.close(3.0)
    assert f"these runs unfinished: {sample}" in caplog.text
    outage.clear()
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 1


def test_a_slow_method_does_so_few_exposures_at_once_that_nobody_takes_it_for_dead(line, monkeypatch):
    sizes, answer = [], PreparedCurves.answer

    def slow(self: PreparedCurves, curves: xr.Dataset) -> xr.Dataset:
        sizes.append(curves.sizes["exposure"])
        time.sleep(0.2 * sizes[-1])
        return answer(self, curves)

    line.beam()
    sample = line.sample(exposures=12)
    monkeypatch.setattr(PreparedCurves, "answer", slow)
    monkeypatch.setattr(sample_runs, "CLAIM_INTERVAL", 1.0)
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 12
    assert max(sizes) <= 5
    assert sum(sizes) == 12


def test_a_result_that_another_process_took_over_before_its_end_is_left_to_it(line):
    line.beam()
    line.docs.clear()
    sample = line.sample()
    callback = DesmearCallback(line.client, config=CONFIG)
    for name, doc in line.docs[:-1]:
        callback(name, doc)
    assert callback.wait(WAIT)
    line.client["desmeared"].delete_contents(line.result(sample).item["id"], recursive=True, external_only=False)
    callback(*line.docs[-1])
    assert callback.close(WAIT)
    assert (callback.statistics.runs, callback.statistics.errors) == (1, 0)
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 1


def from_the_catalog(line, sample: str) -> xr.Dataset:
    """What a run gives when all of it is there, in place of what it gave live."""
    line.client["desmeared"].delete_contents(line.result(sample).item["id"], recursive=True, external_only=False)
    assert desmear_runs(line.client, [sample], config=CONFIG).runs == 1
    return line.result(sample).read()


@pytest.mark.parametrize("lost", [0, 2, 4])
def test_a_document_that_is_lost_costs_no_exposure(line, lost):
    """Each row is of its own frame: the first, one between others, or the last came over a network that lost its document."""
    beam = line.beam()
    line.docs.clear()
    sample = line.sample(exposures=5, direct_beam_uid=beam)
    callback = DesmearCallback(line.client, config=CONFIG, retry_interval=0.1)
    for name, doc in line.docs:
        if name != "stream_datum" or doc["indices"]["start"] != lost:
            callback(name, doc)
    assert callback.close(WAIT)
    assert callback.statistics.deferred == 1
    xr.testing.assert_identical(line.result(sample).read()["I_smeared"], from_the_catalog(line, sample)["I_smeared"])


def test_a_direct_beam_of_which_a_document_was_lost_is_read_from_the_catalog(line):
    beam = line.beam(exposures=4)
    sample = line.sample(direct_beam_uid=beam)
    callback = DesmearCallback(line.client, config=CONFIG, retry_interval=0.1)
    datums = 0
    for name, doc in line.docs:
        datums += name == "stream_datum"
        if name != "stream_datum" or datums != 3:
            callback(name, doc)
    assert callback.close(WAIT)
    xr.testing.assert_identical(line.result(sample).read()["I"], from_the_catalog(line, sample)["I"])


def test_a_run_that_goes_on_is_given_back_when_the_callback_is_closed(line):
    """The session lives on; another process must not wait for its end."""
    beam = line.beam()
    line.docs.clear()
    sample = line.sample(exposures=3, direct_beam_uid=beam)
    callback = DesmearCallback(line.client, config=CONFIG)
    for name, doc in line.docs[:-1]:  # its stop is still to come
        callback(name, doc)
    assert callback.wait(WAIT)
    assert not callback.close(3.0)
    assert line.result(sample).metadata["writer"]["claim"] is None
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 3


def test_script_that_ends_finishes_its_work():
    script = """
import time
from dsnet_bluesky.callbacks.desmear import DesmearCallback

class Slow(DesmearCallback):
    def _handle(self, item):
        time.sleep(0.3)
        print(item[0])

callback = Slow({"raw": {}})
callback("start", {"uid": "a"})
callback("stop", {"run_start": "a"})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT, check=True)
    assert done.stdout.split() == ["start", "stop"]


def test_file_that_comes_late(line):
    line.beam()
    sample = line.sample()
    path = line.file_of(sample)
    path.rename(path.with_suffix(".late"))
    callback = DesmearCallback(line.client, config=CONFIG, retry_interval=1.0)
    for name, doc in line.docs:
        callback(name, doc)
    assert not callback.wait(1.0)
    path.with_suffix(".late").rename(path)
    assert callback.wait(WAIT)
    assert callback.close()
    assert callback.statistics.deferred == 1
    assert line.result(sample).metadata["status"] == "complete"


def test_failed_result_is_begun_again_on_request(line):
    line.beam()
    sample = line.sample()
    path = line.file_of(sample)
    path.rename(path.with_suffix(".away"))
    desmear_runs(line.client, [sample], config=CONFIG, retry_interval=0.05)
    assert line.result(sample).metadata["status"] == "failed"
    path.with_suffix(".away").rename(path)
    assert desmear_runs(line.client, [sample], config=CONFIG).exposures == 1
    assert line.result(sample).metadata["status"] == "complete"
    assert desmear_runs(line.client, [sample], config=CONFIG).stored_before == 1


def test_configuration_that_was_used_is_recorded(line, desmear):
    line.engine(bps.configure(line.instrument, wavelength_spread=0.05))
    beam = line.beam()
    sample = line.sample(direct_beam_uid=beam)
    assert desmear.wait(WAIT)
    used, metadata = replace(CONFIG, wavelength_spread=0.05), line.result(sample).metadata
    assert metadata["config"] == used.to_dict()
    assert metadata["config_sha256"] == used.sha256
    assert metadata["model_sha256"] == load_model("dsnet").sha256
    assert line.result(sample).item["id"] == result_key(sample, beam, used.sha256, metadata["model_sha256"])


def test_listener_that_comes_in_the_middle_of_a_run(line):
    line.beam()
    sample = line.sample(exposures=2)
    half = len(line.docs) - 5
    callback = DesmearCallback(line.client, config=CONFIG)
    for name, doc in line.docs[half:]:
        callback(name, doc)
    assert callback.wait(WAIT)
    callback.close()
    assert callback.statistics.deferred == 1
    assert line.result(sample).read().sizes["exposure"] == 2


def test_run_whose_stop_document_is_lost_is_done_when_it_has_ended_in_the_catalog(delivered, monkeypatch):
    """Its RunEngine's process was killed, or a network lost the document; a spool ends the run in the catalog."""
    line, writer = delivered
    monkeypatch.setattr(desmear_module, "SILENCE", 0.2)
    beam = line.beam()
    line.deliver(writer)
    sample = line.sample(exposures=4, direct_beam_uid=beam)
    heard = [item for item in line.docs if not (item[0] == "stream_datum" and item[1]["indices"]["start"] >= 2)][:-1]
    late = [item for item in line.docs if item[0] == "stream_datum" and item not in heard]
    stop = line.deliver(writer, ended=False)
    callback = DesmearCallback(line.client, config=CONFIG)
    for name, doc in heard:
        callback(name, doc)
    time.sleep(2.0)
    assert callback.wait(WAIT)
    assert (callback.statistics.exposures, callback.statistics.deferred) == (2, 0), "silent, but it goes on"
    writer(*stop)
    until(lambda: callback.statistics.deferred == 1)
    for name, doc in [*late, stop]:
        callback(name, doc)  # after all
    assert callback.close()
    node = line.result(sample)
    assert (node.metadata["status"], node.metadata["exposures"]) == ("complete", 4)
    assert len(np.unique(node.read()["I_smeared"].values[:, 10])) == 4, "each exposure once"


def test_run_that_was_deleted_before_its_stop_document_came_is_given_up(delivered, monkeypatch):
    line, writer = delivered
    monkeypatch.setattr(desmear_module, "SILENCE", 0.2)
    monkeypatch.setattr(desmear_module, "ATTEMPTS", 3)
    beam = line.beam()
    line.deliver(writer)
    sample = line.sample(direct_beam_uid=beam)
    heard = line.docs[:-1]
    line.deliver(writer, ended=False)
    callback = DesmearCallback(line.client, config=CONFIG, retry_interval=0.1)
    for name, doc in heard:
        callback(name, doc)
    until(lambda: callback.statistics.exposures == 1)
    line.client["raw"].delete_contents(sample, recursive=True, external_only=False)
    until(lambda: callback.statistics.abandoned == [sample])
    assert callback.close(), "nothing is left to do"
    node = line.result(sample)
    assert is_abandoned(node.item["id"], node.metadata)


def until(holds):
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_same_documents_twice_give_one_result(line, desmear):
    line.beam()
    sample = line.sample()
    assert desmear.wait(WAIT)
    again = DesmearCallback(line.client, config=CONFIG)
    for name, doc in line.docs:
        again(name, json.loads(json.dumps(doc)))
    assert again.wait(WAIT)
    again.close()
    assert again.statistics.stored_before == 1
    assert line.result(sample).read().sizes["exposure"] == 1


def test_run_that_fails_keeps_what_was_taken(line, desmear):
    line.beam()
    with pytest.raises(FailedStatus):
        line.sample(motor=line.beamline.changer.sample, positions=["AgBh", "not in the changer"])
    stop = line.docs[-1][1]
    assert stop["exit_status"] == "fail"
    assert desmear.wait(WAIT)
    assert line.result(stop["run_start"]).metadata["status"] == "complete"
    assert line.result(stop["run_start"]).read().sizes["exposure"] == 1


def test_documents_of_yesterdays_kind(line, desmear):
    """Resource and datum, as ophyd's area detectors write them, with real files."""
    writer = TiledWriter(line.client["raw"], batch_size=1)
    uids = []
    for purpose in ("direct_beam", "sample"):
        frames = [read_last(line.folder, line.beam() if purpose == "direct_beam" else line.sample())]
        for name, doc in old_run(line, purpose, np.concatenate(frames)):
            writer(name, json.loads(json.dumps(doc)))
            desmear(name, doc)
            uids += [doc["uid"]] if name == "start" else []
    assert desmear.wait(WAIT)
    assert line.result(uids[1]).metadata["status"] == "complete"
    assert line.result(uids[1]).metadata["direct_beam_uid"] == uids[0]


def read_last(folder, uid):
    newest = max(folder.glob("*.h5"), key=lambda path: path.stat().st_mtime_ns)
    with h5py.File(newest) as file:
        return file["entry/data/data"][()]


def old_run(line, purpose, frames):
    run = compose_run(metadata={"purpose": purpose, "sample": "old"})
    yield "start", run.start_doc
    path = line.folder / f"old-{purpose}.h5"
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = frames
    mask = (line.folder / "mask.npy").as_uri() if purpose == "sample" else ""
    values = {"det_poni": json.dumps(line.camera.poni), "det_mask": mask, "det_slit_width": 4e-3, "det_exposure_time": 60.0}
    kinds = {key: "string" if isinstance(value, str) else "number" for key, value in values.items()}
    configuration = {
        "data": values,
        "timestamps": dict.fromkeys(values, 0.0),
        "data_keys": {key: {"source": "PV", "dtype": kind, "shape": []} for key, kind in kinds.items()},
    }
    key = {"source": "PV", "dtype": "array", "dtype_numpy": "<i4", "shape": [1, *line.camera.shape], "external": "FILESTORE:"}
    stream = run.compose_descriptor(name="primary", data_keys={"det_image": key}, configuration={"det": configuration})
    yield "descriptor", stream.descriptor_doc
    resource = run.compose_resource(spec="AD_HDF5", root="/", resource_path=str(path).lstrip("/"), resource_kwargs={})
    yield "resource", resource.resource_doc
    datum = resource.compose_datum(datum_kwargs={"point_number": 0})
    yield "datum", datum
    yield (
        "event",
        stream.compose_event(data={"det_image": datum["datum_id"]}, timestamps={"det_image": 0.0}, filled={"det_image": False}),
    )
    yield "stop", run.compose_stop()

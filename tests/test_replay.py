"""Replay makes what is missing, once, beside what is there; and what live work would have made."""

import dataclasses
import json
import pickle
import time
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster, Worker
from tiled.client.utils import ClientError
from tiled.queries import Key
from typer.testing import CliRunner

from dsnet_bluesky.callbacks.desmear import desmear_runs
from dsnet_bluesky.callbacks.sample_runs import KeyRefused, key_refused
from dsnet_bluesky.cli import app
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.questions import Between, OfRun, Quality, Sample
from dsnet_bluesky.replay import batches, replay, service
from dsnet_bluesky.replay.batches import Server, Work
from dsnet_bluesky.replay.service import _Cluster, _pool
from dsnet_bluesky.replay.unprofiled import Unprofiled

LAKE = Config(method="lake", bins=100, per_bin=64)
WIENER = dataclasses.replace(LAKE, method="wiener")


@pytest.fixture
def uids(line) -> list[str]:
    """Three runs, of one, two and one exposures."""
    line.beam()
    return [line.sample(), line.sample(exposures=2), line.sample()]


def state_of(line, uid: str, method: str) -> dict[str, Any]:
    (node,) = line.client["desmeared"].search(Key("raw_uid") == uid).search(Key("method") == method).values()
    return {"key": node.item["id"], **dict(node.metadata)}


def test_what_is_missing_is_made_once(line, uids):
    asked = [OfRun(*uids)]
    found = replay(line.client, config=LAKE, questions=asked, workers=0, batch=2)
    assert (found.found, found.before, found.to_do, found.stored, found.complete) == (3, 0, 3, 3, True)
    before = [state_of(line, uid, "lake") for uid in uids]
    again = replay(line.client, config=LAKE, questions=asked, workers=0)
    assert (again.before, again.to_do, again.stored) == (3, 0, 0)
    other = replay(line.client, config=WIENER, questions=asked, workers=0)
    assert other.stored == 3
    assert [state_of(line, uid, "lake") for uid in uids] == before, "old results are not touched"
    assert [len(line.results(uid)) for uid in uids] == [2, 2, 2]


def test_no_workers_start_where_nothing_is_to_do(line, uids, monkeypatch):
    """They take seconds to start, and a replay may run every hour."""
    replay(line.client, config=LAKE, questions=[OfRun(*uids)], workers=0)
    monkeypatch.setattr("distributed.LocalCluster", None)
    found = replay(line.client, config=LAKE, questions=[OfRun(*uids)])
    assert (found.before, found.to_do, found.complete) == (3, 0, True)


def test_a_request_that_fails_once_leaves_no_result_unfinished(line, uids, monkeypatch):
    """The batch is tried again, and must not take its own first attempt for somebody else's work."""

    def once(*_: Any) -> None:
        monkeypatch.undo()
        raise httpx.ReadTimeout("planted: the server is slow for a moment")

    monkeypatch.setattr(ResultWriter, "append", once)
    found = replay(line.client, config=LAKE, questions=[OfRun(*uids)], workers=0)
    assert (found.stored, found.there, found.complete) == (3, 0, True)
    assert [line.result(uid).metadata["status"] for uid in uids] == ["complete"] * 3


def test_live_and_replay_are_one(line, uids):
    """Live work finds what was replayed, replay finds what was live, and both compute the same."""
    desmear_runs(line.client, uids[:2], config=LAKE)
    found = replay(line.client, config=LAKE, questions=[OfRun(*uids)], workers=0)
    assert (found.before, found.stored) == (2, 1)
    assert desmear_runs(line.client, uids, config=LAKE).stored_before == 3
    checked = replay(line.client, config=LAKE, questions=[OfRun(*uids)], workers=0, verify=True)
    assert (checked.same, checked.different, checked.complete) == (3, {}, True)
    live, replayed = (state_of(line, uid, "lake") for uid in uids[1:])
    differ = {name for name in live if name in replayed and live[name] != replayed[name]}
    own = {"key", "raw_uid", "original_start_uid", "original_start_time", "original_scan_id", "parent_uids", "parent_node_map"}
    assert differ <= own | {
        "pairing",
        "deferred",
        "exposures",
        "rows",
        "writer",
        "updated",
        "chi2_median",
        "chi2_largest",
        "attrs",
    }
    assert replayed["deferred"] == "Replayed from the catalog."


def test_what_differs_is_named(line, uids):
    """A result that was stored by another program, as it were."""
    replay(line.client, config=LAKE, questions=[OfRun(uids[0])], workers=0)
    node = line.result(uids[0])
    rows = node[node.metadata["rows"]]
    values = rows.read()
    rows.patch(np.where(values > 0, 1.5 * values, values), offset=(0,))
    found = replay(line.client, config=LAKE, questions=[OfRun(uids[0])], workers=0, verify=True)
    assert list(found.different) == [node.item["id"]]
    assert not found.complete


def test_failures_are_results_with_reasons(line):
    """A broken file, a file that is gone: each run fails by itself, and the others of the batch do not."""
    line.beam()
    good, broken, gone = line.sample(), line.sample(exposures=2), line.sample()
    line.file_of(broken).write_bytes(b"no HDF5 at all")
    line.file_of(gone).unlink()
    asked = [OfRun(good, broken, gone)]
    found = replay(line.client, config=LAKE, questions=asked, workers=0)
    assert (found.stored, found.to_do) == (1, 3)
    assert not found.complete
    assert sum("cannot be opened as HDF5" in reason for reason in found.failed) == 1
    assert {line.result(uid).metadata["status"] for uid in (broken, gone)} == {"failed"}
    assert replay(line.client, config=LAKE, questions=asked, workers=0).to_do == 0, "not for ever"
    assert replay(line.client, config=LAKE, questions=asked, workers=0, retry_failed=True).to_do == 2
    assert line.result(good).read().sizes["exposure"] == 1


def test_no_direct_beam(line):
    uid = line.sample(direct_beam_uid="not-there")
    found = replay(line.client, config=LAKE, questions=[OfRun(uid)], workers=0)
    assert "the catalog does not hold it" in next(iter(found.failed))
    assert line.result(uid).metadata["failure"]["kind"] == "direct_beam"


def test_a_dry_run_and_limits(line, uids):
    asked = [OfRun(*uids)]
    dry = replay(line.client, config=LAKE, questions=asked, workers=0, dry_run=True)
    assert (dry.to_do, dry.stored) == (3, 0)
    assert not any(line.results(uid) for uid in uids)
    assert replay(line.client, config=LAKE, questions=asked, workers=0, limit=2, batch=1).stored == 2
    assert replay(line.client, config=LAKE, questions=asked, workers=0).stored == 1


def test_questions_choose_runs(line, uids):
    times = [line.client["raw"][uid].metadata["start"]["time"] for uid in uids]
    chosen = [OfRun(*uids), Sample("AgBh"), Between(times[1], times[2])]
    assert replay(line.client, config=LAKE, questions=chosen, workers=0, dry_run=True).to_do == 1
    with pytest.raises(BadInput, match=r"asked of results; runs to replay are chosen by sample, run"):
        replay(line.client, config=LAKE, questions=[Quality(2.0)], workers=0)
    with pytest.raises(BadInput, match=r"holds no sample run that is Sample\(name='gold'\)"):
        replay(line.client, config=LAKE, questions=[Sample("gold")], workers=0)


def test_unusable_input_is_refused_before_anything_is_begun(line):
    with pytest.raises(BadInput, match=r"no model 'dsnet:9\.0\.0'"):
        replay(line.client, model="dsnet:9.0.0")
    with pytest.raises(BadInput, match="A batch holds at least one run"):
        replay(line.client, config=LAKE, batch=0)
    for numbers in ({"limit": -1}, {"workers": -1}):
        with pytest.raises(BadInput, match=r"is -1; give no negative number"):
            replay(line.client, config=LAKE, **numbers)
    asked = [OfRun(line.sample(direct_beam_uid="any"))]
    with pytest.raises(BadInput, match=r"No scheduler of dask answers at tcp://127\.0\.0\.1:9 .*start one with `dask scheduler`"):
        replay(line.client, config=LAKE, questions=asked, dask="tcp://127.0.0.1:9")


@pytest.fixture
def reading_only(monkeypatch):
    """Let a client's key only read."""

    def change(client, status=403):
        def refuse(request):
            if request.method != "GET":
                raise httpx.HTTPStatusError("planted", request=request, response=httpx.Response(status, request=request))

        hooks = client.context.http_client.event_hooks
        monkeypatch.setattr(client.context.http_client, "event_hooks", {**hooks, "request": [refuse]})
        return client

    return change


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_only_read_ends_it_at_once(line, uids, reading_only, status):
    reading_only(line.client, status)
    begin = time.monotonic()
    with pytest.raises(BadInput, match=rf"refuses the key \({status}\): it may not write there\. Give one that may"):
        replay(line.client, config=LAKE, questions=[OfRun(*uids)], workers=0)
    with pytest.raises(BadInput, match=rf"refuses the key \({status}\): it may not write there\. Give one that may"):
        desmear_runs(line.client, uids, config=LAKE)
    assert time.monotonic() - begin < 20
    assert not any(line.results(uid) for uid in uids)


def test_that_a_key_may_only_read_comes_back_from_a_worker(monkeypatch):
    """What Tiled's client raises cannot be pickled."""

    class Refused:
        def do(self, uids):
            request = httpx.Request("POST", "http://127.0.0.1/")
            raise ClientError("planted", request, httpx.Response(403, request=request))

        check = do

    monkeypatch.setattr("dsnet_bluesky.replay.batches._batches", lambda work: Refused())
    for function in (batches.do, batches.check):
        refusal = function(Work(Server("http://127.0.0.1", "key"), LAKE, False), ["any"])
        assert isinstance(key_refused(pickle.loads(pickle.dumps(refusal))), KeyRefused)


def test_the_commands_say_that_a_key_may_only_read(served, served_line, reading_only, monkeypatch):
    beam, uid = served_line.beam(), served_line.sample()
    for module in ("catalog", "replays"):
        monkeypatch.setattr(f"dsnet_bluesky.cli.{module}.connect", lambda *_: reading_only(served.client()))
    for words in (
        ["pair", uid, "--direct-beam", beam, "--method", "lake"],
        ["replay", "--model", "lake", "--query", f"run={uid}", "--workers", "0"],
        ["register"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, done.output
        assert "Error: The catalog refuses the key (403): it may not write there." in done.stderr
        assert done.stdout == ""


def test_a_cluster_of_its_own_listens_on_this_machine_only(line):
    def listening() -> set[str]:
        return {seen.laddr.ip for seen in psutil.Process().net_connections() if seen.status == psutil.CONN_LISTEN}

    before = listening()
    with service._pool(line.client, LAKE, retry_failed=False, verify=False, workers=1, dask=None):
        assert listening() - before <= {"127.0.0.1"}


def test_workers_are_not_profiled():
    """With Python 3.11 a profiler can stop one for ever; one that was restarted has none either."""
    with LocalCluster(n_workers=1, dashboard_address="127.0.0.1:0") as local, Client(local) as cluster:
        assert list(cluster.run(profiled).values()) == [True]
        cluster.register_plugin(Unprofiled())
        assert list(cluster.run(profiled).values()) == [False]
        cluster.restart()
        assert list(cluster.run(profiled).values()) == [False]


def profiled(dask_worker: Worker) -> bool:
    return "profile" in dask_worker.periodic_callbacks


def test_workers_do_not_hide_that_the_catalog_is_away(client, monkeypatch):
    """Whoever hands out the batches is patient; ten attempts of each request would hold a batch up for minutes."""
    monkeypatch.delenv("TILED_RETRY_ATTEMPTS")  # of the tests themselves
    with _pool(client, LAKE, retry_failed=False, verify=False, workers=1, dask=None) as pool:
        assert isinstance(pool, _Cluster)
        assert list(pool._cluster.run(attempts_of_tiled).values()) == [1]


def attempts_of_tiled() -> int:
    # The worker has imported this module, and with it what it imports for its first batch.
    from tiled.client.utils import TILED_RETRY_ATTEMPTS

    return TILED_RETRY_ATTEMPTS


def test_the_command_in_a_cluster_of_its_own(served, served_line):
    """Real processes, a real server; a second start does nothing."""
    served_line.beam()
    uids = [served_line.sample() for _ in range(3)]
    server = ["--uri", served.uri, "--api-key", served.api_key]
    command = ["replay", "--model", "lake", "--workers", "2", "--batch", "2", *server, "--json"]
    command += [part for uid in uids for part in ("--query", f"run={uid}")][:2]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout.splitlines()[-1])
    assert (found["to_do"], found["stored"], found["complete"]) == (1, 1, True)
    second = CliRunner().invoke(app, [*command[:-3], "--verify", *command[-2:]])
    assert second.exit_code == 0, second.output
    assert "1 results computed again are equal, 0 differ" in second.output

"""The newest result of each raw run: alike on SQLite and PostgreSQL, with and without indexes."""

import contextlib
import secrets
import shutil
import sqlite3
import subprocess

import numpy as np
import pytest
import yaml
from tiled.client.container import Container
from tiled.queries import Comparison, Key
from typer.testing import CliRunner

from dsnet_bluesky.adapters.indexes import create_indexes, definitions
from dsnet_bluesky.cli import app
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.queries import ResultsClient
from dsnet_bluesky.questions import Between, Failed, Latest, Model, OfRun, Quality, Sample
from dsnet_bluesky.server import Server
from tests.ports import answers
from tests.test_questions import DAY, exposures, result_metadata, store

STORED = {
    # two released versions, side by side, and what is tried out
    1: [("2.0.0", "dsnet"), ("2.1.0", "dsnet"), ("2.2.0rc1", "dsnet"), ("", "map")],
    # a classical method alone; one that came before it
    2: [("", "map"), ("", "ift")],
    # an older version that came after the newer one, and the model of the paper, with a higher version
    3: [("2.1.0", "dsnet"), ("2.0.0", "dsnet"), ("3.0.0", "dsnet-paper")],
    # the newer version failed
    4: [("2.0.0", "dsnet"), ("2.1.0", "dsnet", "failed")],
    # nothing but what does not count
    5: [("2.2.0.dev1", "dsnet"), ("my own", "dsnet"), ("2.1.0", "dsnet", "failed")],
    # versions are numbers, not words
    6: [("2.9.0", "dsnet"), ("2.10.0", "dsnet")],
}

NEWEST = {"run-1-dsnet-2.1.0", "run-2-ift-", "run-3-dsnet-2.1.0", "run-4-dsnet-2.0.0", "run-6-dsnet-2.10.0"}


def psql(statement):
    subprocess.run(["psql", "-h", "127.0.0.1", "-U", "postgres", "-qc", statement, "postgres"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def postgresql():
    """URI of an empty catalog in a database of its own."""
    if not answers("127.0.0.1", 5432) or shutil.which("psql") is None:
        pytest.skip("PostgreSQL is not running at 127.0.0.1:5432")
    name = f"dsnet_test_{secrets.token_hex(4)}"
    uri = f"postgresql+asyncpg://postgres@127.0.0.1:5432/{name}"
    psql(f"CREATE DATABASE {name}")
    try:
        yield uri
    finally:
        psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def catalog(request, tmp_path_factory):
    """A client of a catalog, and the URI of its database."""
    if request.param == "sqlite":
        directory = tmp_path_factory.mktemp("latest")
        client = request.getfixturevalue("make_client")(directory=directory)
        yield client, f"sqlite:///{directory}/catalog.db"
        return
    uri = request.getfixturevalue("postgresql")
    # A process of its own: connections to PostgreSQL belong to the event loop that opened them.
    server = Server(tmp_path_factory.mktemp("served"), timeout=200)
    config = yaml.safe_load(server.config.read_text())
    for tree in config["trees"]:
        tree["args"]["uri"] = uri
    server.config.write_text(yaml.safe_dump(config, sort_keys=False))
    with server:
        yield server.client(), uri


@pytest.fixture(scope="module")
def results(catalog, store_raw_run):
    client, _ = catalog
    for number, stored in STORED.items():
        for model, method, *failed in stored:
            sample = "AgBh" if number % 2 else "latex"
            store(client, store_raw_run, number, sample=sample, model=model, method=method, failed=bool(failed))
    return client["desmeared"]


@pytest.fixture(scope="module")
def asked(catalog, results):
    create_indexes(catalog[1])
    return results


def test_of_each_run_the_newest_without_indexes(results):
    """First of all tests: here there are none yet."""
    assert set(results.search(Latest()).sort(("original_start_time", -1))) == NEWEST


def test_of_each_run_the_newest_released_version(asked):
    found = asked.search(Latest())
    assert type(found) is ResultsClient
    assert set(found) == NEWEST
    assert len(found) == len(NEWEST)


def test_two_versions_of_a_run_side_by_side(asked):
    run = asked.search(OfRun("run-1"))
    assert list(run.search(Model("dsnet", "==2.0.0"))) == ["run-1-dsnet-2.0.0"]
    assert list(run.search(Model("dsnet", "==2.1.0"))) == ["run-1-dsnet-2.1.0"]
    assert set(run.search(Model("dsnet", ">=2,<3"))) == {"run-1-dsnet-2.0.0", "run-1-dsnet-2.1.0", "run-1-dsnet-2.2.0rc1"}
    assert list(run.search(Latest())) == ["run-1-dsnet-2.1.0"]


def test_the_newest_of_one_method(asked):
    assert set(asked.search(Latest("map"))) == {"run-1-map-", "run-2-map-"}
    assert set(asked.search(Latest("dsnet-paper"))) == {"run-3-dsnet-paper-3.0.0"}
    assert len(asked.search(Latest("map' OR '1'='1"))) == 0


COMPOSED = [
    (Sample("AgBh"), {1, 3}),
    (Between(DAY + 1.5 * 86_400, DAY + 4.5 * 86_400), {2, 3, 4}),
    (Model("dsnet", "<2.1"), {4}),  # not the newest of the older ones
    (Failed(), set()),
    (Quality(1.5), {1, 2, 3, 4, 6}),
    (Key("sample_name") == "latex", {2, 4, 6}),
    (Comparison("gt", "original_scan_id", 7), set()),
]


def test_it_composes_in_any_order(asked):
    for question, answer in COMPOSED:
        for found in (asked.search(Latest()).search(question), asked.search(question).search(Latest())):
            assert {int(key.split("-")[1]) for key in found} == answer, question


def test_it_composes_with_sort_page_and_key(asked):
    found = asked.search(Latest()).sort(("original_start_time", -1))
    assert [key[:5] for key in found.keys()[:3]] == ["run-6", "run-4", "run-3"]
    assert found.keys().last() == "run-1-dsnet-2.1.0"
    assert found.to_table(["method"], limit=2)["method"].to_dict() == {
        "run-6-dsnet-2.10.0": "dsnet",
        "run-4-dsnet-2.0.0": "dsnet",
    }
    assert found["run-2-ift-"].metadata["method"] == "ift"
    with pytest.raises(KeyError):
        found["run-1-dsnet-2.0.0"]
    assert found.search(Model("dsnet")).to_xarray(["I"]).compute()["raw_uid"].values.tolist() == [
        "run-6",
        "run-4",
        "run-3",
        "run-1",
    ]


def begin(client, key, uid, version, direct_beam_uid=None):
    metadata = result_metadata(
        {"uid": uid, "time": DAY},
        direct_beam_uid=direct_beam_uid,
        config={},
        config_sha256="0" * 64,
        method="dsnet",
        model_version=version,
    )
    return ResultWriter.create(client, key, metadata)


def test_of_one_version_the_one_that_was_begun_last(catalog, store_raw_run):
    """With another direct beam or configuration; by the catalog's count, whatever the clocks say."""
    client, _ = catalog
    store_raw_run(client, "run-tied")
    for key in ("tied-b", "tied-a"):
        start = {"uid": "run-tied", "time": DAY}
        metadata = result_metadata(
            start,
            direct_beam_uid=key,
            config={},
            config_sha256="0" * 64,
            method="dsnet",
            model_name="dsnet",
            model_version="2.1.0",
        )
        writer = ResultWriter.create(client, key, metadata)
        writer.append(exposures(np.array([1.0]), [1.0]))
        writer.complete()
        assert list(client["desmeared"].search(OfRun("run-tied")).search(Latest())) == [key]
    client["desmeared"].delete_contents(["tied-a", "tied-b"], recursive=True, external_only=False)


def test_nothing_but_the_newest_is_hidden_while_a_newer_one_is_written(catalog, store_raw_run):
    client, _ = catalog
    store_raw_run(client, "written")
    keys = []
    for version in ("2.0.0", "2.1.0"):
        keys.append(f"written-{version}")
        writer = begin(client, keys[-1], "written", version)
        writer.append(exposures(np.array([1.0]), [1.0]))
        newest = client["desmeared"].search(OfRun("written")).search(Latest())
        before = dict(newest.values().first().metadata) if keys[1:] else None
        assert list(newest) == keys[:-1]
        writer.complete()
        assert list(newest) == keys[-1:]
    assert dict(client["desmeared"]["written-2.0.0"].metadata) == before
    client["desmeared"].delete_contents(keys, recursive=True, external_only=False)


def test_any_client_with_this_package_may_ask(asked):
    bare = Container(asked.context, item=asked.item, structure_clients=asked.structure_clients)
    assert set(bare.search(Latest())) == NEWEST


def test_a_server_that_does_not_know_the_question_is_not_asked(results, monkeypatch):
    """It would leave the question aside, and answer with all results."""
    info = results.context.server_info
    monkeypatch.setattr(info, "queries", [name for name in info.queries if name != "dsnet_latest"])
    with pytest.raises(BadInput, match=r"does not know dsnet_latest\. Install dsnet-bluesky"):
        results.search(Latest())


def test_indexes_are_made_once(catalog, results):
    _, uri = catalog
    create_indexes(uri)
    assert create_indexes(uri) == []
    run = CliRunner().invoke(app, ["index", uri])
    assert (run.exit_code, run.output) == (0, "The indexes are there.\n")


def test_what_an_earlier_version_made_is_removed(empty_database, tmp_path):
    path = shutil.copy(empty_database, tmp_path / "catalog.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE INDEX dsnet_latest_0 ON nodes (parent)")
        assert create_indexes(f"sqlite:///{path}") == list(definitions("sqlite"))
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE name GLOB 'dsnet_*'")}
    assert names == set(definitions("sqlite"))


def test_what_is_no_catalog_cannot_be_indexed(tmp_path):
    (tmp_path / "empty.db").touch()
    for uri, why in (
        (f"sqlite:///{tmp_path}/empty.db", "no such table: nodes"),
        (f"sqlite:///{tmp_path}/no/such.db", "There is no file"),
        ("postgresql://postgres@127.0.0.1:9/none", "Connect call failed"),
        ("nonsense", "There is no file nonsense"),
    ):
        run = CliRunner().invoke(app, ["index", uri])
        assert run.exit_code == 2
        assert why in run.output


def test_more_than_two_pages_of_a_sorted_selection(results, monkeypatch):
    """Tiled counts to 100 and names no page after the second: what follows would be missing."""
    monkeypatch.setattr("dsnet_bluesky.queries.PAGE", 1)
    found = results.sort(("original_start_time", 1))
    count = sum(map(len, STORED.values()))
    assert len(set(found)) == len(set(found.keys())) == len(found.to_table()) == len(dict(found.items())) == count
    assert len(found.items()[1:4]) == 3

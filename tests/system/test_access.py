"""Many users on one server: nobody sees what belongs to another proposal, and each service writes its own trees.

Every route of the server's OpenAPI is asked, so that a route that Tiled or we add later is asked too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.client.utils import ClientError
from tiled.queries import FullText, Key
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dsnet_bluesky.curvefiles import read_curve
from dsnet_bluesky.derived import ResultWriter, register_all
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.export import to_nxcansas
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.questions import Latest
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.smearing import Smearing

pytestmark = pytest.mark.system

SECRET = "unobtainium"
"""Alice's sample: Bob's answers never hold this word."""

MOUNTS = ("raw", "curves", "psfs", "desmeared")
REFUSED = (401, 403, 404)


@dataclass
class Filled:
    """A server with runs of Alice and Bob, their curves, PSFs and results."""

    server: Any
    beam: str
    sample: str
    result: str
    rows: str
    other: str

    @property
    def nodes(self) -> list[str]:
        """Paths of what is Alice's, of every kind."""
        raw = [f"raw/{self.sample}{rest}" for rest in ("", "/primary", "/primary/pilatus")]
        derived = [f"curves/{self.sample}", f"curves/{self.sample}/I", f"psfs/{self.beam}", f"psfs/{self.beam}/beam"]
        result = [f"desmeared/{self.result}{rest}" for rest in ("", "/I", f"/{self.rows}")]
        return [*raw, f"raw/{self.beam}", *derived, *result]


def acquire(production: Any, engine: RunEngine, tags: list[str], sample: str) -> tuple[str, str]:
    """Take a direct beam and a scan as the beamline does: with the key of the acquisition, and tags from the RunEngine."""
    beamline = SimBeamline(production.directory / "detector", SaxsCamera(seed=3))
    instrument = Instrument(beamline.camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    engine.md["tiled_access_tags"] = tags
    subscription = engine.subscribe(TiledWriter(production.client("acquisition")["raw"], batch_size=1))
    engine(ensure_connected(*beamline.devices))
    (beam,) = engine(direct_beam(beamline.detector, instrument=instrument, exposure_time=0.01))
    (uid,) = engine(
        expose(beamline.detector, sample=sample, instrument=instrument, exposures=2, exposure_time=1.0, direct_beam_uid=beam)
    )
    engine.unsubscribe(subscription)
    return beam, uid


def store_result(client: Any, uid: str) -> str:
    """Desmear the curves of a run and store them, as the watcher does; returns the key of the result."""
    curves = client["curves"][uid].read()
    key = f"result-{uid}"
    writer = ResultWriter.create(
        client, key, {"raw_uid": uid, "method": "map", "sample": client["curves"][uid].metadata["sample"]}
    )
    writer.append(desmear(curves, Smearing.gaussian(curves["q"].values, 0.02), "map"))
    writer.complete()
    return key


@pytest.fixture(scope="module")
def filled(production) -> Iterator[Filled]:
    engine = RunEngine({})
    beam, sample = acquire(production, engine, ["proposal-1"], SECRET)
    _, other = acquire(production, engine, ["proposal-2"], "lead")
    watcher = production.client("watcher")
    assert register_all(watcher) == {"curves": 4, "psfs": 2, "skipped": 0}
    store_result(watcher, other)
    result = store_result(watcher, sample)
    rows = watcher["desmeared"][result].metadata["rows"]
    yield Filled(production, beam, sample, result, rows, other)
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()
    engine.loop.close()


# -- reading --


def test_users_read_what_their_tags_permit(filled: Filled, tmp_path: Path):
    alice, bob = filled.server.client("alice"), filled.server.client("bob")
    mine, others = {filled.beam, filled.sample}, {filled.other}
    for client, seen, unseen in ((alice, mine, others), (bob, others, mine)):
        for mount in ("raw", "curves"):
            assert seen <= set(client[mount])
            assert not unseen & set(client[mount])
        assert len(client["psfs"]) == len(client["desmeared"]) == 1
    assert alice["raw"][filled.sample]["primary/pilatus"].read().shape[0] == 2
    assert alice["curves"][filled.sample].read().sizes["exposure"] == 2
    assert alice["psfs"][filled.beam].read()["counts"] > 0
    assert len(list(alice["raw"][filled.sample].documents())) > 4
    result = alice["desmeared"][filled.result].read()
    assert np.isfinite(result["I"]).any()
    to_nxcansas(result, tmp_path / "result.h5")


def test_files_of_results_go_to_those_who_may_read_them(filled: Filled, tmp_path: Path):
    """By ?format=, as a browser asks."""
    formats = ("nxcansas", "nxs", "xml", "text/plain;exposure=1")
    with filled.server.http("alice") as alice, filled.server.http("bob") as bob:
        for format in formats:
            question = {"url": f"/container/full/desmeared/{filled.result}", "params": {"format": format}}
            (path := tmp_path / "file").write_bytes(alice.get(**question).raise_for_status().content)
            assert np.isfinite(read_curve(path, entry=1)["I"]).all()
            refused = bob.get(**question)
            assert refused.status_code in REFUSED
            assert SECRET not in refused.text
    filled.server.client("alice")["desmeared"][filled.result].export(tmp_path / "result.nxcansas.h5")
    assert read_curve(tmp_path / "result.nxcansas.h5", entry=1).attrs["sample"] == SECRET


def test_derived_nodes_carry_the_tags_of_their_run(filled: Filled):
    watcher = filled.server.client("watcher")
    for path in filled.nodes:
        if not path.startswith(("curves", "psfs")) or path.count("/") == 1:
            assert watcher[path].item["attributes"]["access_tags"] == ["proposal-1"], path


def parameters(route: str) -> list[dict[str, Any]]:
    """Query parameters that a route may need, in the formats that export."""
    common = {"block": "0", "partition": 0, "id": 1, "number": 1, "include_data_sources": True, "metadata": "start.sample"}
    formats = (None, "application/json", "application/x-hdf5", "application/json-seq", "application/octet-stream", "text/csv")
    return [{**common, **({"format": name} if name else {})} for name in (formats if "/full/" in route else (None,))]


def routes_with_a_path(http: httpx.Client, method: str) -> list[str]:
    paths = http.get(str(http.base_url).replace("/api/v1/", "/openapi.json")).raise_for_status().json()["paths"]
    return [route for route, methods in paths.items() if method in methods and "{path}" in route and not route.startswith("/ui")]


def root(http: httpx.Client, route: str) -> str:
    return str(http.base_url).replace("/api/v1/", "") + route


def test_no_route_shows_another_users_nodes(filled: Filled):
    """By their path, which Bob may have overheard."""
    with filled.server.http("bob") as bob, filled.server.http("alice") as alice:
        routes = routes_with_a_path(bob, "get")
        assert len(routes) > 12
        shown = 0
        for route, path in itertools.product(routes, filled.nodes):
            for query in parameters(route):
                answer = bob.get(root(bob, route.replace("{path}", path)), params=query)
                assert answer.status_code in REFUSED, (route, path, answer.status_code, answer.text[:200])
                assert SECRET not in answer.text
            shown += alice.get(root(alice, route.replace("{path}", path)), params=parameters(route)[0]).is_success
        assert shown > len(filled.nodes)  # the questions are good ones: Alice gets answers


@pytest.mark.parametrize("mount", ["", *MOUNTS])
def test_no_list_search_or_count_shows_another_users_nodes(filled: Filled, mount: str):
    text = {"filter[fulltext][condition][text]": SECRET}
    equal = {"filter[eq][condition][key]": "start.sample", "filter[eq][condition][value]": json.dumps(SECRET)}
    key = {"filter[eq][condition][key]": "raw_uid", "filter[eq][condition][value]": json.dumps(filled.sample)}
    tags = {"filter[access_tags_filter][condition][tags]": json.dumps(["proposal-1"])}
    newest = {"filter[dsnet_latest][condition][method]": ""}
    selected = {"select_metadata": "start.sample", "sort": "start.sample", "include_data_sources": True}
    ours = (SECRET, filled.sample, filled.beam, filled.result)
    with filled.server.http("bob") as bob, filled.server.http("alice") as alice:
        for route, query in itertools.product(("search", "search-deep"), ({}, text, equal, key, tags, newest, selected)):
            answer = bob.get(f"/{route}/{mount}", params=query)
            assert answer.is_success or "not supported" in answer.json()["detail"], (route, query, answer.text)
            found = json.dumps(answer.json().get("data"))  # the links repeat the question
            assert not [word for word in ours if word in found], (route, query)
        for route in ("search", "search-deep"):  # a good question: Alice gets an answer
            found = alice.get(f"/{route}/{mount}").raise_for_status().text
            assert [word for word in ours if word in found] or (not mount and route == "search"), route
        for field in ("start.sample", "sample", "raw_uid", "start.uid"):
            answer = bob.get(f"/distinct/{mount}", params={"metadata": field, "counts": True, "specs": True})
            assert SECRET not in answer.text
            assert filled.sample not in answer.text
        for format in ("application/json", "application/x-hdf5"):
            answer = bob.get(f"/container/full/{mount}", params={"format": format})
            # The root itself is open; what is exported of its mounts is filtered like a list.
            assert answer.status_code in (403, 404, 406) or not mount, answer.text[:200]
            for word in (SECRET, filled.sample, filled.beam, filled.result):
                assert word.encode() not in answer.content, format


def test_queries_of_the_client_find_only_ones_own(filled: Filled):
    alice, bob = filled.server.client("alice"), filled.server.client("bob")
    assert len(alice["raw"].search(FullText(SECRET))) == len(alice["raw"].search(Key("sample") == SECRET)) == 1
    assert len(bob["raw"].search(FullText(SECRET))) == len(bob["raw"].search(Key("sample") == SECRET)) == 0
    assert [entry["value"] for entry in bob["raw"].distinct("start.sample")["metadata"]["start.sample"] if entry["value"]] == [
        "lead"
    ]
    assert list(alice["desmeared"].search(Latest())) == [filled.result]
    assert list(bob["desmeared"].search(Latest())) == [f"result-{filled.other}"]
    for path in filled.nodes:
        with pytest.raises(KeyError):
            bob[path]


def stream(filled: Filled, who: str, path: str, **extra: Any) -> Any:
    address = filled.server.uri.replace("http", "ws") + f"/api/v1/stream/single/{path}?envelope_format=json&start=0"
    headers = {"Authorization": f"Apikey {filled.server.keys[who]}"} if who else {}
    return connect(address, additional_headers=headers, open_timeout=20, proxy=None, **extra)


def test_nothing_is_streamed_to_another_user(filled: Filled):
    """Nor may a user subscribe to a mount: it tells of every new node below, with its metadata, whatever its tags."""
    for path in (*MOUNTS, *filled.nodes):
        with pytest.raises(InvalidStatus) as caught, stream(filled, "bob", path):
            pass
        assert caught.value.response.status_code in REFUSED
    for mount in MOUNTS:
        with pytest.raises(InvalidStatus), stream(filled, "alice", mount):
            pass
    with stream(filled, "alice", f"raw/{filled.sample}") as socket:
        assert socket.recv(20)
    with stream(filled, "watcher", "raw") as socket:
        while SECRET not in str(socket.recv(20)):  # times out if it never comes
            pass


def test_a_key_that_comes_after_the_connection_opens_no_more(filled: Filled):
    with stream(filled, "", f"raw/{filled.sample}") as socket:
        socket.send(json.dumps({"type": "auth", "api_key": filled.server.keys["bob"]}))
        with pytest.raises(ConnectionClosed):
            socket.recv(20)


def test_without_a_login_nothing_is_seen(filled: Filled):
    with httpx.Client(base_url=f"{filled.server.uri}/api/v1", trust_env=False) as anyone:
        for path in ("", *MOUNTS, *filled.nodes):
            for route in ("search", "metadata"):
                assert anyone.get(f"/{route}/{path}").status_code in REFUSED


def test_files_are_not_handed_out(filled: Filled):
    """Not even to those who may read the frames: the route does not ask whether a file is in readable_storage."""
    node = filled.server.client("alice")[f"raw/{filled.sample}/primary/pilatus"].include_data_sources()
    (asset,) = node.data_sources()[0].assets
    for who in ("alice", "watcher", "acquisition"):
        with filled.server.http(who) as http:
            for route in ("bytes", "manifest"):
                answer = http.get(f"/asset/{route}/raw/{filled.sample}/primary/pilatus", params={"id": asset.id})
                assert answer.status_code == 403
            assert http.delete(f"/asset/raw/{filled.sample}/primary/pilatus", params={"id": asset.id}).status_code in (403, 404)


# -- writing --


RESULT = {"key": "spoiled", "metadata": {}, "parameters": {}, "keys": [], "access_tags": ["proposal-1"]}
"""For the route that stores many results at once."""


def writes(path: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests that would change a node, or what is below."""
    container = {"structure_family": "container", "metadata": {}, "specs": [], "data_sources": []}
    asset = {"data_uri": "file:///etc/passwd", "is_directory": False, "parameter": "data_uris", "num": 0}
    structure = {"data_type": {"endianness": "little", "kind": "i", "itemsize": 1}, "chunks": [[1]], "shape": [1]}
    structure |= {"dims": None, "resizable": False}
    source = {"structure_family": "array", "structure": structure, "assets": [asset], "mimetype": "application/x-fabio"}
    source |= {"management": "external", "parameters": {}, "properties": {}, "id": 1}
    external = {**container, "structure_family": "array", "data_sources": [source]}
    numbers = {"content": b"\0" * 8, "headers": {"Content-Type": "application/octet-stream"}}
    patch = {"content-type": "application/merge-patch+json", "metadata": {"spoiled": True}, "specs": [], "access_tags": []}
    return [
        ("POST", f"/metadata/{path}", {"json": container}),
        ("POST", f"/metadata/{path}", {"json": {**container, "access_tags": ["proposal-1"]}}),
        ("POST", f"/register/{path}", {"json": {**external, "access_tags": ["proposal-1"]}}),
        ("POST", f"/results/{path}", {"json": [RESULT]}),
        ("PUT", f"/metadata/{path}", {"json": {"metadata": {"spoiled": True}, "specs": []}}),
        ("PUT", f"/metadata/{path}", {"json": {"access_tags": ["proposal-2"]}}),
        ("PATCH", f"/metadata/{path}", {"json": patch}),
        ("DELETE", f"/metadata/{path}", {"params": {"recursive": True, "external_only": False}}),
        ("DELETE", f"/revisions/{path}", {"params": {"number": 1}}),
        ("PUT", f"/array/full/{path}", numbers),
        ("PUT", f"/array/block/{path}?block=0,0", numbers),
        ("PATCH", f"/array/full/{path}?offset=0,0&shape=1,1&extend=true", numbers),
        ("PUT", f"/data_source/{path}", {"json": {"data_source": source}}),
        ("DELETE", f"/stream/close/{path}", {}),
    ]


@pytest.mark.parametrize(
    ("who", "trees"),
    [("alice", MOUNTS), ("bob", MOUNTS), ("acquisition", ("curves", "psfs", "desmeared")), ("watcher", ("raw",))],
)
def test_nobody_writes_where_others_do(filled: Filled, who: str, trees: tuple[str, ...]):
    admin = filled.server.client("watcher")
    paths = [path for path in (*MOUNTS, *filled.nodes) if path.split("/")[0] in trees]
    before = {path: (admin[path].item["attributes"], set(admin[path])) for path in paths if path.count("/") < 2}
    with filled.server.http(who) as http:
        for path in paths:
            for method, route, content in writes(path):
                answer = http.request(method, route, **content)
                # 405: the node has nothing that could be written, whoever asks.
                assert answer.status_code in (*REFUSED, 405), (method, route, answer.status_code, answer.text[:300])
    assert {path: (admin[path].item["attributes"], set(admin[path])) for path in before} == before


def test_services_write_their_own_trees(filled: Filled):
    """What the refusals above are measured against: the same requests, where they are permitted."""
    node = {"structure_family": "container", "metadata": {}, "specs": [], "data_sources": [], "access_tags": ["proposal-1"]}
    for who, trees in (("acquisition", ("raw",)), ("watcher", ("curves", "psfs", "desmeared"))):
        with filled.server.http(who) as http:
            for tree in trees:
                key = http.post(f"/metadata/{tree}", json=node).raise_for_status().json()["id"]
                http.put(f"/metadata/{tree}/{key}", json={"metadata": {"touched": True}}).raise_for_status()
                http.delete(f"/metadata/{tree}/{key}", params={"recursive": True, "external_only": False}).raise_for_status()


def test_results_that_are_stored_together_have_their_tags(filled: Filled):
    alike = [{**RESULT, "key": f"together-{number}"} for number in range(2)]
    with filled.server.http("watcher") as http:
        assert http.post("/results/desmeared", json=alike).raise_for_status().json() == {"there": []}
        assert http.post("/results/desmeared", json=alike).raise_for_status().json() == {"there": ["together-0", "together-1"]}
        refused = http.post("/results/desmeared", json=[{**RESULT, "key": "other", "access_tags": ["everybody"]}])
        assert refused.status_code == 403
        assert http.post("/results/curves", json=alike).status_code == 405
        try:
            for who, sees in (("alice", True), ("bob", False)):
                results = filled.server.client(who)["desmeared"]
                assert [key in results for key in ("together-0", "together-1", "other")] == [sees, sees, False]
        finally:
            for result in alike:
                http.delete(f"/metadata/desmeared/{result['key']}").raise_for_status()


def test_the_keys_of_services_administer_nothing(filled: Filled):
    for who in ("acquisition", "watcher", "alice"):
        with filled.server.http(who) as http:
            assert http.get("/auth/principal").status_code in REFUSED
            assert http.post("/auth/principal", params={"role": "admin"}).status_code in REFUSED
            assert http.get("/metrics").status_code in REFUSED
            if who != "alice":  # users make keys of their own, with no more rights than they have
                assert http.post("/auth/apikey", json={"expires_in": None, "scopes": None}).status_code in REFUSED


def test_a_run_without_tags_is_seen_by_its_writer_only(filled: Filled):
    with filled.server.http("acquisition") as http:
        body = {"id": "untagged", "structure_family": "container", "metadata": {}, "specs": [], "data_sources": []}
        answer = http.post("/metadata/raw", json=body).raise_for_status()
        assert answer.json()["access_tags"][0].startswith("service:")
        for who in ("alice", "bob", "watcher"):
            assert "untagged" not in filled.server.client(who)["raw"]
        http.delete("/metadata/raw/untagged").raise_for_status()


def test_tags_that_one_does_not_own_are_refused(filled: Filled):
    with pytest.raises(ClientError, match=r"not an owner|not defined"):
        filled.server.client("acquisition")["raw"].create_container(access_tags=["everybody"])

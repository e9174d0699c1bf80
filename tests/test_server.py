"""The server's configuration and process; what needs a running one is in system/."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from fastapi import Depends, FastAPI, Security
from fastapi.security import SecurityScopes
from fastapi.testclient import TestClient
from tiled.config import Config, parse_configs

from dsnet_bluesky.adapters import dependencies
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.server import EMBEDDED, Server, ServerError, configuration, serve


def test_the_embedded_configuration_is_valid(tmp_path: Path, monkeypatch):
    """By hand with an environment variable, and filled in by `configuration`: the same."""
    monkeypatch.setenv("DSNET_DATA", str(tmp_path))
    by_hand = parse_configs(EMBEDDED)
    filled = Config.model_validate(configuration(tmp_path))
    assert by_hand.trees is not None
    assert filled.trees is not None
    assert [tree.path for tree in by_hand.trees] == ["/raw", "/curves", "/psfs", "/desmeared", "/analysed"]
    assert [tree.args for tree in by_hand.trees] == [tree.args for tree in filled.trees]


def test_readable_directories_reach_every_mount_that_reads_files(tmp_path: Path):
    (tmp_path / "beamline").mkdir()
    trees = {tree["path"]: tree["args"] for tree in configuration(tmp_path, readable=[tmp_path / "beamline"])["trees"]}
    for mount in ("/raw", "/curves", "/psfs"):
        assert trees[mount]["readable_storage"] == [f"{tmp_path}/detector", f"{tmp_path}/beamline"]
    assert "readable_storage" not in trees["/desmeared"]


def test_the_configuration_is_plain_yaml(tmp_path: Path):
    """No anchors are left that would be hard to edit, and no key is in it."""
    text = yaml.safe_dump(configuration(tmp_path))
    assert "api_key" not in text
    assert yaml.safe_load(text) == configuration(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"readable": ["/no/such/directory"]}, "no such directory"),
        ({"api_key": "with-dash"}, "only letters and digits"),
        ({"config": "mine.yml", "readable": ["."]}, "readable_storage in mine.yml"),
        ({"config": "/no/such.yml"}, "does not exist"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(BadInput, match=message):
        serve(data_directory=tmp_path, **arguments)


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path: Path):
    server = Server(tmp_path)
    server.config.write_text("trees: [{path: /raw, tree: no.such:tree}]")
    with pytest.raises(ServerError, match=r"ended with status 1.*server\.log[\s\S]*no\.such"):
        server.start()


def test_a_server_that_is_not_running_has_no_process(tmp_path: Path):
    server = Server(tmp_path)
    with pytest.raises(ServerError, match="not running"):
        _ = server.pid
    server.stop()


SERVE_AND_READ = """
import sys
from tiled.client import from_context
from tiled.client.context import Context
from tiled.config import parse_configs
from tiled.server.app import build_app_from_config

with Context.from_app(build_app_from_config(parse_configs(sys.argv[1]))) as context:
    client = from_context(context)
    assert client["curves"][sys.argv[2]].read().sizes["exposure"] == 1
    assert client["psfs"][sys.argv[2]].read()["counts"] > 0
print([module for module in ("torch", "matplotlib", "ophyd_async") if module in sys.modules])
"""


def test_the_serving_process_never_imports_torch(make_client, tmp_path: Path, detector_directory, write_edf, poni, beam_frame):
    from dsnet_bluesky.ingest import ingest

    client = make_client(directory=tmp_path)
    (uid,) = ingest([write_edf("torch", beam_frame)], client=client, purpose="direct_beam", poni=poni)
    path = tmp_path / "server.yml"
    path.write_text(yaml.safe_dump(configuration(tmp_path, readable=[detector_directory])))
    done = subprocess.run([sys.executable, "-c", SERVE_AND_READ, str(path), uid], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


class TestDependencies:
    """What a request depends on is analysed once, and means the same as before."""

    @pytest.fixture
    def app(self):
        app = FastAPI()

        def settings() -> str:
            return "as built"

        def greeting(words: Annotated[str, Depends(settings)], scopes: SecurityScopes, name: str = "nobody") -> str:
            return f"{name}: {words} {sorted(scopes.scopes)}"

        @app.get("/read")
        def read(said: Annotated[str, Security(greeting, scopes=["read"])]) -> str:
            return said

        @app.get("/write")
        def write(said: Annotated[str, Security(greeting, scopes=["write"])]) -> str:
            return said

        app.state.settings = settings
        return app

    def test_overrides_and_scopes_are_kept_apart(self, app):
        client = TestClient(app)
        for words in ("as built", "one", "other", "as built"):
            app.dependency_overrides = {} if words == "as built" else {app.state.settings: lambda words=words: words}
            assert client.get("/read").json() == f"nobody: {words} ['read']"
            assert client.get("/write", params={"name": "Ada"}).json() == f"Ada: {words} ['write']"

    def test_the_second_request_analyses_nothing(self, app, monkeypatch):
        analysed = []
        analyse = dependencies._analyse
        monkeypatch.setattr(dependencies, "_analyse", lambda **question: analysed.append(question) or analyse(**question))
        client, other = TestClient(app), lambda: "other"
        app.dependency_overrides[app.state.settings] = other
        assert client.get("/read").json() == client.get("/read").json() == "nobody: other ['read']"
        first = len(analysed)
        assert first > 0
        client.get("/read")
        assert len(analysed) == first

    def test_what_one_route_adds_does_not_reach_another(self, app):
        first, second = (dependencies.get_dependant(path="/read", call=app.routes[-1].endpoint) for _ in range(2))
        first.dependencies.insert(0, second)
        assert len(second.dependencies) == 1

    def test_what_cannot_be_hashed_is_analysed_as_before(self):
        class Unhashable:
            __hash__ = None

            def __call__(self, name: str) -> str:
                return name

        assert [field.name for field in dependencies.get_dependant(path="/", call=Unhashable()).query_params] == ["name"]

    def test_wrong_requests_are_still_refused(self, app):
        @app.get("/number")
        def number(value: int) -> int:
            return value

        app.dependency_overrides[app.state.settings] = lambda: "other"
        assert TestClient(app).get("/number", params={"value": "many"}).status_code == 422

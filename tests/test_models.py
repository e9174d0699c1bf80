"""`dsnet-bluesky models` as an instrument scientist uses it, and what becomes of results when models change."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dsnet_bluesky.callbacks.desmear import DesmearCallback, desmear_runs
from dsnet_bluesky.cli import app
from dsnet_bluesky.documents import result_key
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.versions import install_model, load_model, set_alias, shelves
from dsnet_bluesky.watch import Backlog
from tests.models import own_model, small_model

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "models.md"


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """An empty directory of models of one's own, which is not there yet."""
    path = tmp_path / "installation"
    monkeypatch.setenv("DSNET_MODELS", str(path))
    return path


@pytest.fixture
def dsnet(installation, tmp_path, monkeypatch):
    """Run a command in an empty directory, with an installation of its own."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"TILED_API_KEY": None, "TILED_URI": None, "COLUMNS": "200"})

    def run(*words, status=0):
        done = runner.invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        return done

    return run


@pytest.fixture
def fails(dsnet):
    """Run a command on unusable input: one line on stderr, status 2, nothing on stdout."""

    def run(*words, match):
        done = dsnet(*words, status=2)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ")
        assert re.search(match, line), line

    return run


class TestCommands:
    def test_every_command_of_the_page_works_in_its_order(self, dsnet, tmp_path):
        own_model(tmp_path / "dsnet-2.2.0")
        q = np.linspace(0.03, 2.0, 150)
        I = Smearing.gaussian(q, 0.03).apply(np.exp(-(Smearing.gaussian(q, 0.03).q_calc ** 2)))
        np.savetxt("sphere.dat", np.transpose([q, I, 0.01 * I]), header="q (1/nm) I dI", comments="")
        blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
        commands = [line for block in blocks for line in block.splitlines()]
        said = {command: dsnet(*shlex.split(command, comments=True)[1:]).stdout for command in commands}
        assert len(said) == len(commands) == 12
        assert "(dsnet:2.2.0)" in said[next(c for c in commands if " desmear " in c)]
        promoted = next(c for c in commands if "production 2.2.0" in c)
        assert said[promoted] == "dsnet:production is dsnet:2.2.0 from now on\n"
        shown = said[commands[-1]]
        assert "dsnet:production is dsnet:2.0.0" in shown, "as released"
        assert "dsnet:trial is dsnet:2.2.0" in shown

    def test_list_says_what_is_there_for_people_and_programs(self, dsnet, tmp_path, installation):
        dsnet("models", "install", small_model(tmp_path / "made", "net", "1.2.0"))
        line = next(line for line in dsnet("models", "list").stdout.splitlines() if "1.2.0" in line)
        assert re.search(rf"net +1\.2\.0 +production, latest +[0-9a-f]{{12}} +intact +{installation}", line)
        found = {model["reference"]: model for model in json.loads(dsnet("models", "list", "--json").stdout)}
        assert found["net:1.2.0"] == {
            "reference": "net:1.2.0",
            "aliases": ["production", "latest"],
            "sha256": load_model("net").sha256,
            "problem": "",
            "state": "intact",
            "origin": "installed",
            "path": str(installation / "net-1.2.0"),
        }
        assert found["dsnet:2.0.0"]["origin"] == "released"

    def test_show_says_all_of_the_card(self, dsnet, tmp_path):
        folder = small_model(tmp_path / "made")
        shown = dsnet("models", "show", folder).stdout
        for words in ("Nothing but a test.", "It does nothing.", "points: 50 to 600", "loss: 0.1", "0" * 64, "BSD-3-Clause"):
            assert words in shown
        assert "q 1/nm" in shown, "units of the inputs"
        said = json.loads(dsnet("models", "show", folder, "--json").stdout)
        assert said["card"] == tomllib.loads((folder / "model.toml").read_text(encoding="utf-8"))
        assert said["sha256"] == said["card"]["weights_sha256"]

    def test_show_says_what_an_older_card_does_not(self, dsnet):
        assert len(re.findall("not stated", dsnet("models", "show", "dsnet:2.0.0").stdout)) == 2
        assert re.search(r"data sha256 +bf8826c9", dsnet("models", "show", "dsnet-paper:production").stdout)

    def test_verify_finds_damage_and_says_what_to_do(self, dsnet, tmp_path):
        dsnet("models", "install", small_model(tmp_path / "made"))
        assert dsnet("models", "verify").stdout.count("intact") == 6
        (card := load_model("net").path / "model.toml").chmod(0o644)
        card.write_text(card.read_text().replace('licence = "BSD-3-Clause"\n', ""))
        done = dsnet("models", "verify", status=2)
        assert "net:1.0.0  damaged: The card" in done.stdout
        assert "licence is missing" in done.stdout
        assert "install the model again" in done.stdout
        assert done.stdout.count("intact") == 5
        dsnet("models", "verify", "net", status=2)
        dsnet("models", "verify", "dsnet:latest", tmp_path / "made")
        assert "damaged" in dsnet("models", "list").stdout

    def test_bad_input_is_one_line_and_nothing_is_left(self, fails, tmp_path, installation):
        fails("models", "show", "nothing", match="no model 'nothing'.*models install PATH")
        fails("models", "verify", "dsnet:9.9.9", match="no model 'dsnet:9.9.9'")
        fails("models", "install", "nowhere", match="nowhere is no folder")
        fails("models", "install", small_model(tmp_path / "a", weights_sha256="1" * 64), match="altered")
        fails("models", "install", small_model(tmp_path / "b", inputs=None), match="inputs is missing")
        fails("models", "alias", "dsnet:production", "dsnet:2.0.0", match="write it alone")
        fails("models", "alias", "dsnet:production", "2.0.9", match="no model 'dsnet:2.0.9'")
        fails("models", "alias", "dsnet:stable", match="neither a version nor an alias")
        fails("models", "alias", "dsnet:stable", "--remove", match="is not set")
        assert not installation.exists()

    def test_nothing_damaged_is_promoted(self, fails, dsnet, tmp_path):
        dsnet("models", "install", small_model(tmp_path / "made"))
        (weights := load_model("net").weights).chmod(0o644)
        weights.write_bytes(b"")
        fails("models", "alias", "net:production", "1.0.0", match="altered")

    def test_work_with_an_unknown_model_does_not_begin(self, fails, served, tmp_path):
        server = ("--uri", served.uri, "--api-key", served.api_key)
        before = len(served.client()["raw"])
        (tmp_path / "a.edf").touch()
        (tmp_path / "a.poni").touch()
        files = ("a.edf", "--purpose", "sample", "--poni", "a.poni")
        fails("ingest", *files, "--method", "dsnet:9.9.9", *server, match="no model 'dsnet:9.9.9'")
        fails("watch", "--method", "dsnet:stable", *server, match="neither a version nor an alias")
        assert len(served.client()["raw"]) == before


class TestIdentity:
    def test_what_a_model_is_called_is_no_part_of_a_configuration(self, installation, tmp_path):
        named = [Config(method) for method in ("dsnet", "dsnet:2.0.0", "dsnet:production")]
        named += [Config("dsnet", {"model": model}) for model in ("dsnet", "dsnet:2.0.0", "dsnet:production")]
        assert all(config == named[0] for config in named)
        assert named[0].method == "dsnet:2.0.0"
        path = Config("dsnet", {"model": str(own_model(tmp_path / "made", retrained=False))})
        assert path.sha256 == named[0].sha256
        assert Config("dsnet", {"fallback": False}).sha256 != named[0].sha256

    @pytest.mark.parametrize(
        ("method", "sha256"),
        [
            ("dsnet", "c4251cf5867076dc108675f5e20994947cd12f6007171e84a0efa42d26345ad1"),
            ("dsnet-paper", "fd43418bfd4d4815f881c54087d87c673ecb085afe670d6b33162208fb9d6ab2"),
            ("map", "619e3f15aa0608f3a9fd1854fd1a6f39e99009c4dfb54f48cb8afe92f7f65230"),
        ],
    )
    def test_results_of_before_keep_their_key(self, method, sha256):
        """Digests of dsnet-bluesky 0.1.0, before versions were resolved."""
        assert Config(method).sha256 == sha256

    def test_live_result_is_that_of_a_replay_with_the_explicit_version(self, line, installation):
        beam = line.beam()
        with_alias = DesmearCallback(line.client, config=Config("dsnet", bins=60, per_bin=32))
        line.engine.subscribe(with_alias)
        sample = line.sample()
        assert with_alias.wait(60)
        with_alias.close()
        explicit = Config("dsnet:2.0.0", bins=60, per_bin=32)
        node = line.result(sample)
        model = load_model("dsnet:2.0.0")
        assert node.item["id"] == result_key(sample, beam, explicit.sha256, model.sha256)
        assert (node.metadata["model_name"], node.metadata["model_version"]) == ("dsnet", "2.0.0")
        assert node.metadata["model_sha256"] == model.sha256
        assert node.metadata["config"]["method"] == node.metadata["method"] == "dsnet"
        assert desmear_runs(line.client, [sample], config=explicit).stored_before == 1
        assert sample not in [task.run_uid for task in Backlog(line.client, explicit).scan(whole=True)]
        assert len(line.results(sample)) == 1

    def test_another_version_makes_a_result_beside_it_and_who_has_begun_keeps_his(self, line, installation, tmp_path):
        line.beam()
        begun = Config("dsnet", bins=60, per_bin=32)
        install_model(own_model(tmp_path / "made"))
        set_alias("dsnet:production", "2.2.0")
        promoted = Config("dsnet", bins=60, per_bin=32)
        assert (begun.method, promoted.method) == ("dsnet:2.0.0", "dsnet:2.2.0")
        sample = line.sample()
        desmear_runs(line.client, [sample], config=begun)
        assert sample in [task.run_uid for task in Backlog(line.client, promoted).scan(whole=True)]
        desmear_runs(line.client, [sample], config=promoted)
        made = {node.metadata["model_version"]: node for node in line.results(sample)}
        assert set(made) == {"2.0.0", "2.2.0"}
        curves = [made[version].read()["I"].values for version in ("2.0.0", "2.2.0")]
        assert not np.array_equal(*curves), "prepared operators are not taken for those of another model"
        np.testing.assert_allclose(*curves, rtol=0.05)
        assert [made[version].read().attrs["model"] for version in made] == [f"dsnet:{version}" for version in made]

    def test_failed_result_names_its_model_too(self, line, installation, tmp_path):
        """Without that, a run that failed with one model would count as done for the next one."""
        install_model(own_model(tmp_path / "made"))
        sample = line.sample(direct_beam_uid="nothing")
        for version in ("2.0.0", "2.2.0"):
            desmear_runs(line.client, [sample], config=Config(f"dsnet:{version}", bins=60, per_bin=32))
        found = {node.metadata["model_version"]: node.metadata for node in line.results(sample)}
        assert {version: said["status"] for version, said in found.items()} == {"2.0.0": "failed", "2.2.0": "failed"}
        assert found["2.2.0"]["model_sha256"] == load_model("dsnet:2.2.0").sha256

    def test_model_that_is_damaged_begins_nothing(self, line, installation, tmp_path):
        (weights := install_model(own_model(tmp_path / "made")).model.weights).chmod(0o644)
        shutil.copyfile(load_model("dsnet-paper").weights, weights)
        with pytest.raises(ValueError, match=r"dsnet 2\.2\.0 were altered"):
            DesmearCallback(line.client, config=Config("dsnet:2.2.0", bins=60, per_bin=32))


def test_new_version_of_a_package_does_not_change_what_was_promoted(installation, tmp_path, monkeypatch):
    root = tmp_path / "released"
    monkeypatch.setattr(shelves, "model_roots", lambda: [root])
    small_model(root / "dsnet-2.0.0", "dsnet", "2.0.0")
    set_alias("dsnet:production", "2.0.0")
    small_model(root / "dsnet-3.0.0", "dsnet", "3.0.0")
    assert (Config("dsnet").method, Config("dsnet:latest").method) == ("dsnet:2.0.0", "dsnet:3.0.0")

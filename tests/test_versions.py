"""The registry of models: found by name, version or alias; refused when anything of them has changed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.versions import (
    aliases_of,
    install_model,
    list_models,
    load_model,
    released_models,
    remove_alias,
    resolve,
    set_alias,
    sha256_of,
    shelves,
    write_card,
)
from tests.models import small_model


@pytest.fixture
def copied(tmp_path):
    path = tmp_path / "dsnet-paper-1.0.0"
    shutil.copytree(load_model("dsnet-paper").path, path)
    return path


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """An empty directory of models of one's own, which is not there yet."""
    path = tmp_path / "installation"
    monkeypatch.setenv("DSNET_MODELS", str(path))
    return path


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Release models, in the place of those that are."""
    root = tmp_path / "released"
    root.mkdir()
    monkeypatch.setattr(shelves, "model_roots", lambda: [root])
    return lambda name, version, **changes: small_model(root / f"{name}-{version}", name, version, **changes)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_released_weights_are_those_of_the_card():
    model = load_model("dsnet-paper:1.0.0")
    assert (model.name, model.version) == ("dsnet-paper", "1.0.0")
    assert model.sha256 == model.card["weights_sha256"]
    assert model.card["licence"] == "BSD-3-Clause"
    assert model.card["architecture"]["parameters"] == 1_183_105
    assert "dsnet-paper:1.0.0" in released_models()


def test_all_that_is_released_is_intact():
    assert {(model.reference, model.problem, model.origin) for model in list_models()} == {
        ("dsnet:2.0.0", "", "released"),
        ("dsnet:2.1.0", "", "released"),
        ("dsnet-fast:1.0.0", "", "released"),
        ("dsnet-paper:1.0.0", "", "released"),
        ("icosahedra:1.0.0", "", "released"),
    }


def test_what_is_in_production_is_part_of_the_release(installation):
    """Not simply the newest: a version is promoted when it was compared."""
    assert [resolve(name) for name in ("dsnet", "dsnet:production", "dsnet:latest")] == ["dsnet:2.0.0"] * 2 + ["dsnet:2.1.0"]


class TestReferences:
    def test_explicit_version_bare_name_and_aliases(self, shelf, installation):
        for version in ("1.9.0", "1.10.0", "0.11.0", "2.0.0rc1"):
            shelf("net", version)
        shelf("net-wide", "2.0.0")
        assert released_models() == ["net:0.11.0", "net:1.9.0", "net:1.10.0", "net:2.0.0rc1", "net-wide:2.0.0"]
        assert load_model("net:1.9.0").version == "1.9.0"
        assert load_model("net").version == "1.10.0", "a candidate is used by those only who name it"
        assert [resolve(f"net:{word}") for word in ("latest", "production", "2.0.0rc1")] == [
            "net:1.10.0",
            "net:1.10.0",
            "net:2.0.0rc1",
        ]
        assert resolve("net-wide") == "net-wide:2.0.0"

    def test_promoted_version_is_meant_until_it_is_no_more(self, shelf, installation):
        for version in ("1.0.0", "1.1.0", "1.2.0"):
            shelf("net", version)
        assert set_alias("net:production", "1.1.0") == "net:1.1.0"
        assert set_alias("net:trial", "latest") == "net:1.2.0"
        assert load_model("net").version == load_model("net:production").version == "1.1.0"
        assert aliases_of("net") == {"production": "1.1.0", "trial": "1.2.0", "latest": "1.2.0"}
        shelf("net", "1.3.0")
        assert [resolve(f"net:{word}") for word in ("production", "trial", "latest")] == ["net:1.1.0", "net:1.2.0", "net:1.3.0"]
        remove_alias("net:production")
        assert resolve("net") == "net:1.3.0"
        assert files(installation) == ["aliases.toml"]

    def test_path_of_a_folder(self, tmp_path):
        folder = small_model(tmp_path / "somewhere", version="anything goes")
        assert resolve(str(folder)) == str(folder)
        assert load_model(str(folder)).version == "anything goes"

    def test_folder_here_does_not_take_the_place_of_a_name(self, tmp_path, monkeypatch):
        small_model(tmp_path / "dsnet", "dsnet", "9.0.0")
        monkeypatch.chdir(tmp_path)
        assert load_model("dsnet").version == "2.0.0"

    @pytest.mark.parametrize("reference", ["nothing", "dsnet-paper:9.9.9", "", "dsnet-", "nothing:latest"])
    def test_unknown_model_names_the_known_ones_and_what_to_do(self, reference):
        with pytest.raises(BadInput, match=r"Released models: dsnet.*, icosahedra:1\.0\.0; install another .*models install"):
            load_model(reference)

    def test_unknown_alias_names_the_known_ones_and_what_to_do(self):
        with pytest.raises(BadInput, match=r"neither a version nor an alias.*production \(2\.0\.0\).*alias dsnet:stable VERSION"):
            resolve("dsnet:stable")

    def test_alias_of_a_version_that_is_gone_is_not_replaced_by_another(self, shelf, installation):
        shelf("net", "1.0.0")
        gone = shelf("net", "1.1.0")
        set_alias("net:production", "1.1.0")
        shutil.rmtree(gone)
        for reference in ("net", "net:production"):
            with pytest.raises(BadInput, match=r"net:production stands for 1\.1\.0, which is not here; there are 1\.0\.0"):
                resolve(reference)

    def test_candidates_alone_are_used_by_name_only(self, shelf, installation):
        shelf("net", "1.0.0rc1")
        assert resolve("net:1.0.0rc1") == "net:1.0.0rc1"
        for reference in ("net", "net:latest"):
            with pytest.raises(BadInput, match="No version of net is released yet"):
                resolve(reference)

    @pytest.mark.parametrize(
        ("reference", "version", "words"),
        [
            ("dsnet:latest", "2.0.0", "always the newest"),
            ("dsnet:2.0.0", "2.0.0", "no alias"),
            ("dsnet", "2.0.0", "no alias"),
            ("dsnet:production", "2.0.1", "no model 'dsnet:2.0.1'"),
            ("nothing:production", "2.0.0", "no model 'nothing:2.0.0'"),
        ],
    )
    def test_what_cannot_be_an_alias_changes_nothing(self, installation, reference, version, words):
        with pytest.raises(BadInput, match=words):
            set_alias(reference, version)
        assert not installation.exists()

    @pytest.mark.parametrize("text", ["[dsnet", "dsnet = 2\n", "[dsnet]\nproduction = 2.0\n"])
    def test_damaged_aliases_are_named(self, installation, text):
        installation.mkdir()
        (installation / "aliases.toml").write_text(text)
        with pytest.raises(BadInput, match=r"aliases in .*aliases\.toml cannot be read"):
            resolve("dsnet")
        assert resolve("dsnet:2.0.0") == "dsnet:2.0.0"

    def test_alias_that_cannot_be_written_is_said(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("DSNET_MODELS", str(tmp_path / "file"))
        with pytest.raises(BadInput, match=r"cannot be written .*DSNET_MODELS names another directory"):
            set_alias("dsnet:production", "2.0.0")


class TestInstall:
    def test_installed_model_is_found_and_cannot_be_written(self, installation, tmp_path):
        folder = small_model(tmp_path / "trained", "net", "1.1.0")
        (folder / "README.md").write_text("A net.")
        model, new, left_out = install_model(folder)
        assert (model.reference, new, left_out) == ("net:1.1.0", True, [])
        assert files(installation) == [
            "net-1.1.0",
            *(f"net-1.1.0/{f}" for f in ("README.md", "model.toml", "weights.safetensors")),
        ]
        assert load_model("net:1.1.0").sha256 == sha256_of(folder / "weights.safetensors")
        assert load_model("net").path == installation / "net-1.1.0"
        assert not (model.weights.stat().st_mode & 0o222)
        assert [found.origin for found in list_models() if found.reference == "net:1.1.0"] == ["installed"]

    def test_the_same_again_changes_nothing(self, installation, tmp_path):
        folder = small_model(tmp_path / "trained")
        install_model(folder)
        before = (installation / "net-1.0.0").stat().st_ino
        assert not install_model(folder).new
        assert not install_model(load_model("dsnet:2.0.0").path).new
        assert (installation / "net-1.0.0").stat().st_ino == before

    @pytest.mark.parametrize(("change", "what"), [({"weight": 1.0}, "weights"), ({"use": "Else."}, "card")])
    def test_version_never_changes(self, installation, tmp_path, change, what):
        install_model(small_model(tmp_path / "one"))
        kept = load_model("net:1.0.0")
        with pytest.raises(BadInput, match=rf"net:1\.0\.0 is in .* already, with (other|another) {what}.*a version of its own"):
            install_model(small_model(tmp_path / "two", **change))
        assert load_model("net:1.0.0") == kept

    def test_released_version_cannot_be_taken(self, shelf, installation, tmp_path):
        shelf("net", "1.0.0")
        with pytest.raises(BadInput, match="already, with other weights"):
            install_model(small_model(tmp_path / "own", weight=1.0))
        assert not installation.exists()

    def test_damaged_copy_is_repaired(self, installation, tmp_path):
        folder = small_model(tmp_path / "trained")
        weights = install_model(folder).model.weights
        weights.chmod(0o644)
        weights.write_bytes(b"")
        with pytest.raises(BadInput, match=r"altered.*Install the model again"):
            load_model("net")
        assert install_model(folder).new
        assert load_model("net").sha256 == sha256_of(folder / "weights.safetensors")
        assert files(installation) == ["net-1.0.0", "net-1.0.0/model.toml", "net-1.0.0/weights.safetensors"]

    def test_damage_that_hides_what_it_was_is_not_overwritten(self, installation, tmp_path):
        folder = small_model(tmp_path / "trained")
        card = install_model(folder).model.path / "model.toml"
        card.chmod(0o644)
        card.write_text("name = ")
        with pytest.raises(BadInput, match=r"already, damaged, and nothing shows.*Remove that folder, then install"):
            install_model(folder)
        assert card.read_text() == "name = "
        shutil.rmtree(card.parent)
        assert install_model(folder).new

    def test_of_two_who_install_at_once_the_first_counts(self, installation, tmp_path, monkeypatch):
        first, second = small_model(tmp_path / "one"), small_model(tmp_path / "two", weight=1.0)
        copyfile = shutil.copyfile

        def slow(source, target):
            monkeypatch.setattr(shutil, "copyfile", copyfile)
            install_model(first)
            return copyfile(source, target)

        monkeypatch.setattr(shutil, "copyfile", slow)
        with pytest.raises(BadInput, match="already, with other weights"):
            install_model(second)
        assert load_model("net").sha256 == sha256_of(first / "weights.safetensors")
        assert files(installation)[0] == "net-1.0.0", "nothing half done is left"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"version": "2.1"}, "version: '2.1' is no semantic version; write it as 2.1.0"),
            ({"version": "01.0.0"}, "no semantic version"),
            ({"version": "1.0.0.dev1"}, "no semantic version"),
            ({"version": 2}, "version: input should be a valid string"),
            ({"name": "My Net"}, "name: 'My Net' is no name"),
            ({"inputs": None}, "inputs is missing"),
            ({"inputs": {"summary": "All."}}, "inputs.dims is missing; inputs.channels is missing; inputs.units is missing"),
            ({"data": {"curves": 3}}, "data.sha256 is missing"),
            ({"data": {"sha256": "abc"}}, "data.sha256: it must be a SHA-256"),
            ({"ranges": None}, "ranges is missing"),
            ({"ranges": {"points": [50, 60, 70]}}, "ranges.points: "),
            ({"figures": {"loss": "good"}}, "figures.loss: "),
            ({"licence": " "}, "licence: "),
            ({"limits": "none"}, "limits: "),
            ({"weights_sha256": "0" * 64}, "were altered: SHA-256 .*, the card says 000000000000"),
        ],
    )
    def test_incomplete_cards_and_wrong_digests_are_named(self, installation, tmp_path, change, words):
        name, version = change.pop("name", "net"), change.pop("version", "1.0.0")
        with pytest.raises(BadInput, match=words):
            install_model(small_model(tmp_path / "trained", name, version, **change))
        assert not installation.exists()

    def test_what_a_training_leaves_is_left_out_and_what_can_run_code_refused(self, installation, tmp_path):
        folder = small_model(tmp_path / "trained")
        (folder / "checkpoint.pt").touch()
        (folder / "sessions").mkdir()
        (folder / "extra.pkl").touch()
        with pytest.raises(BadInput, match=r"holds extra\.pkl: such files can run code"):
            install_model(folder)
        assert not installation.exists()
        (folder / "extra.pkl").unlink()
        assert install_model(folder).left_out == ["checkpoint.pt", "sessions"]
        assert files(installation / "net-1.0.0") == ["model.toml", "weights.safetensors"]

    @pytest.mark.parametrize("content", [pickle.dumps({"w": 1}), b"", b"\x08\0\0\0\0\0\0\0{}      "])
    def test_what_only_bears_the_name_of_safetensors_is_refused(self, tmp_path, content):
        folder = small_model(tmp_path / "net-1.0.0")
        before = sha256_of(folder / "weights.safetensors")
        (folder / "weights.safetensors").write_bytes(content)
        card = (folder / "model.toml").read_text()
        (folder / "model.toml").write_text(card.replace(before, sha256_of(folder / "weights.safetensors")))
        with pytest.raises(BadInput, match="holds no safetensors"):
            load_model(str(folder))

    def test_bytes_behind_the_tensors_are_refused(self, tmp_path):
        folder = small_model(tmp_path / "net-1.0.0")
        before = sha256_of(folder / "weights.safetensors")
        with (folder / "weights.safetensors").open("ab") as file:
            file.write(pickle.dumps("more"))
        card = (folder / "model.toml").read_text()
        (folder / "model.toml").write_text(card.replace(before, sha256_of(folder / "weights.safetensors")))
        with pytest.raises(BadInput, match="holds no safetensors"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("path", "words"), [("nowhere", "nowhere is no folder"), (".", r"There is no model in .*model\.toml")]
    )
    def test_what_is_no_model_is_said(self, installation, tmp_path, monkeypatch, path, words):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BadInput, match=words):
            install_model(path)

    def test_nothing_is_left_of_an_installation_that_fails(self, installation, tmp_path, monkeypatch):
        folder = small_model(tmp_path / "trained")

        def full(source, target):
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", full)
        with pytest.raises(BadInput, match=r"cannot be copied .*No space left on device.*DSNET_MODELS"):
            install_model(folder)
        assert files(installation) == []
        with pytest.raises(BadInput, match="no model 'net'"):
            load_model("net")


class TestDamage:
    def test_altered_weights_are_refused(self, copied):
        weights = copied / "weights.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(BadInput, match="altered"):
            load_model(str(copied))

    def test_nothing_but_safetensors_is_read(self, copied):
        (copied / "weights.safetensors").rename(copied / "weights.pt")
        with pytest.raises(BadInput, match=r"no weights\.safetensors.*weights\.pt will not be read"):
            load_model(str(copied))

    @pytest.mark.parametrize("card", ["name = ", 'name = "dsnet-paper"\n'])
    def test_broken_card_is_refused(self, copied, card):
        (copied / "model.toml").write_text(card)
        with pytest.raises(BadInput, match="cannot be read"):
            load_model(str(copied))

    def test_folder_that_was_renamed_by_hand_is_no_version(self, shelf, installation):
        shelf("net", "1.0.0").rename(shelves.model_roots()[0] / "net-1.1.0")
        with pytest.raises(BadInput, match=r"net-1\.1\.0 holds net:1\.0\.0; a version is never renamed"):
            load_model("net")

    def test_own_version_that_was_released_since_with_other_weights_is_found(self, shelf, installation, tmp_path):
        install_model(small_model(tmp_path / "own", weight=1.0))
        shelf("net", "1.0.0")
        (found,) = list_models()
        assert load_model("net").path == found.path == shelves.model_roots()[0] / "net-1.0.0"
        assert "There are two models net:1.0.0" in found.problem


class TestCards:
    def test_card_survives_writing(self, copied):
        card = load_model(str(copied)).card
        (copied / "model.toml").unlink()
        write_card(copied, card)
        assert load_model(str(copied)).card == card

    def test_released_readme_is_that_of_its_card(self, copied):
        released = (copied / "README.md").read_text(encoding="utf-8")
        write_card(copied, load_model(str(copied)).card)
        assert (copied / "README.md").read_text(encoding="utf-8") == released


def test_default_installation_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("DSNET_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert shelves.installation().name == "models"
    if sys.platform == "linux":
        assert shelves.installation() == tmp_path / "dsnet-bluesky" / "models"


@pytest.mark.parametrize("text", ["2.0.0", "2.0.0rc1", "10.0.3b2", "0.1.0a0"])
def test_versions_that_are_taken_are_versions(text):
    assert shelves.SEMANTIC.fullmatch(text)
    assert str(Version(text)) == text


def test_torch_is_not_needed():
    code = (
        "import json, sys, dsnet_bluesky.versions as v; v.load_model('dsnet-paper'); v.list_models()\n"
        "print(json.dumps([name for name in ('torch', 'tiled', 'bluesky') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert json.loads(done.stdout) == []

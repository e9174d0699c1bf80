import shutil
import subprocess
import sys

import pytest

from dsnet_bluesky import versions
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.versions import load_model, released_models, write_card


@pytest.fixture
def copied(tmp_path):
    path = tmp_path / "dsnet-paper-1.0.0"
    shutil.copytree(load_model("dsnet-paper").path, path)
    return path


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Make a folder of released models of which each version has its own weights."""
    monkeypatch.setattr(versions, "model_roots", lambda: [tmp_path])

    def add(name, version):
        folder = tmp_path / f"{name}-{version}"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(version.encode())
        sha256 = versions.sha256_of(folder / "weights.safetensors")
        (folder / "model.toml").write_text(f'name = "{name}"\nversion = "{version}"\nweights_sha256 = "{sha256}"\n')

    return add


def test_released_weights_are_those_of_the_card():
    model = load_model("dsnet-paper:1.0.0")
    assert (model.name, model.version) == ("dsnet-paper", "1.0.0")
    assert model.sha256 == model.card["weights_sha256"]
    assert model.card["licence"] == "BSD-3-Clause"
    assert model.card["architecture"]["parameters"] == 1_183_105
    assert "dsnet-paper:1.0.0" in released_models()


def test_card_survives_writing(copied):
    card = load_model(str(copied)).card
    (copied / "model.toml").unlink()
    write_card(copied, card)
    assert load_model(str(copied)).card == card


def test_released_readme_is_that_of_its_card(copied):
    released = (copied / "README.md").read_text(encoding="utf-8")
    write_card(copied, load_model(str(copied)).card)
    assert (copied / "README.md").read_text(encoding="utf-8") == released


def test_without_a_version_the_latest_is_meant(shelf):
    for version in ("1.9.0", "1.10.0", "0.11.0"):
        shelf("net", version)
    shelf("net-wide", "2.0.0")
    assert load_model("net").version == "1.10.0"
    assert load_model("net:1.9.0").version == "1.9.0"
    assert load_model("net-wide").version == "2.0.0"
    assert released_models() == ["net:0.11.0", "net:1.9.0", "net:1.10.0", "net-wide:2.0.0"]


@pytest.mark.parametrize("reference", ["nothing", "dsnet-paper:9.9.9", "", "dsnet-"])
def test_unknown_model_names_the_known_ones(reference):
    with pytest.raises(BadInput, match=r"Released models: .*dsnet-paper:1\.0\.0"):
        load_model(reference)


def test_altered_weights_are_refused(copied):
    weights = copied / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match="altered"):
        load_model(str(copied))


def test_nothing_but_safetensors_is_read(copied):
    (copied / "weights.safetensors").rename(copied / "weights.pt")
    with pytest.raises(BadInput, match=r"no weights\.safetensors.*weights\.pt will not be read"):
        load_model(str(copied))


@pytest.mark.parametrize("card", ["name = ", 'name = "dsnet-paper"\n'])
def test_broken_card_is_refused(copied, card):
    (copied / "model.toml").write_text(card)
    with pytest.raises(BadInput, match="cannot be read"):
        load_model(str(copied))


def test_torch_is_not_needed():
    code = "import sys, dsnet_bluesky.versions as v; v.load_model('dsnet-paper'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

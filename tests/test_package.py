"""What a user installs holds what the source tree holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as a package index would."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_models_and_configurations(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"dsnet_bluesky/{path.relative_to(ROOT)}"
        for folder in ("models", "tiled_config")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "dsnet_bluesky").rglob("*.py")}
    expected = {name for name in expected if not name.endswith(".pyc")}
    assert expected
    assert expected <= names


def test_an_installed_wheel_finds_its_model_and_configuration(wheel: Path, tmp_path: Path):
    """Installed beside the dependencies of this environment, run from elsewhere."""
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import dsnet_bluesky; from dsnet_bluesky import server, versions\n"
        "print(dsnet_bluesky.__file__)\n"
        "print(versions.load_model('dsnet-paper').path)\n"
        "print(server.EMBEDDED)\n"
    )
    # -P and -I would hide the editable install too, but not its .pth file: the inserted path wins.
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = done.stdout.split()
    assert len(lines) == 3
    assert all(line.startswith(str(target)) for line in lines)


def test_the_import_contracts_hold():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_clients_do_not_import_the_server():
    """Its catalog takes seconds, which a watcher, a replay's workers and a session at the beamline have no use for."""
    code = (
        "import sys, dsnet_bluesky.watch.service, dsnet_bluesky.replay.service, dsnet_bluesky.callbacks.desmear\n"
        "print([name for name in ('tiled.catalog', 'tiled.server', 'fastapi', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"

"""Services of one's own that tests may break."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.services import PROGRAMS, PostgreSQL, Redis


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL of one's own."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed in /usr/lib/postgresql.")
    running = PostgreSQL()
    yield running
    running.stop()


@pytest.fixture
def redis() -> Iterator[Redis]:
    """A Redis of one's own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed.")
    running = Redis()
    yield running
    running.stop()


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a small disk of its own."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("A full disk needs the right to mount a tmpfs.")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)

"""The notebooks, run cell by cell in this process; the build of the site runs them once more, in a kernel, for their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.pages import ROOT, blocks

NOTEBOOKS = ROOT / "docs" / "notebooks"

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run all cells of a notebook, as a kernel does; return its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mpl.use("Agg")

    def run(name: str) -> dict[str, Any]:
        page, variables = NOTEBOOKS / f"{name}.md", {"__name__": "__main__"}
        for cell in blocks(page):
            assert cell.language == "{code-cell}", cell
            # Empty lines before, so that errors name the line of the page.
            exec(compile("\n" * (cell.line - 1) + cell.text, str(page), "exec"), variables)
        plt.close("all")
        return variables

    return run


def test_all_notebooks_are_tested() -> None:
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert {page.stem for page in NOTEBOOKS.glob("*.md")} <= tested


def test_first_query(run: Any) -> None:
    found = run("first-query")
    assert found["minimum"] == pytest.approx(4.493 / 8, abs=0.01)
    assert "No direct beam" in found["failed"].metadata["reason"]
    assert found["places"]["I"][0] == pytest.approx(2 * np.pi / 5.838, abs=0.005)
    assert found["places"]["I"][1] < found["places"]["I_smeared"][1] / 2
    assert list(found["data"].sizes.values()) == [4, 250]


def test_frames_to_fit(run: Any) -> None:
    found = run("frames-to-fit")
    fits = found["fits"].groupby(["dose", "way"])[["radius", "width"]].mean()
    best = fits.xs("measured, with resolution", level="way")
    assert best["radius"].to_numpy() == pytest.approx(8.0, rel=3e-3)
    assert best["width"].to_numpy() == pytest.approx(0.1, rel=3e-2)
    assert fits["radius"].to_numpy() == pytest.approx(8.0, rel=2e-2)


def test_replay_and_compare(run: Any) -> None:
    found = run("replay-and-compare")
    assert (found["old"].stored, found["new"].stored, found["again"].to_do) == (6, 6, 0)
    exposures = found["found"].exposures
    assert len(exposures) == 6
    assert exposures["d_rms"].median() < 1.5
    first, second = (curve["I"].values[0] for curve in found["curves"].values())
    assert not np.array_equal(first, second)
    assert found["verdict"].line.split(":")[0] in ("PASS", "FAIL")

"""The benchmarks on frames and on measured data still run, and their reports are whole."""

import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "samples"), [("measured", ["latex-usans", "sphere-100nm-exact"]), ("frames", ["AgBh", "Grating"])]
)
def test_a_quick_run_writes_a_whole_report(name, samples, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--output", str(tmp_path)])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    report = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"## {sample}, " in report for sample in samples)
    assert re.search(r"^\| map \| [0-9]", report, re.MULTILINE)
    assert "nan" not in report.lower()
    links = re.findall(r"\]\(([^)]+\.png)\)", report)
    assert links
    assert all(0 < (tmp_path / link).stat().st_size < 150_000 for link in links)

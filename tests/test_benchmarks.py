"""The benchmarks on frames, questions, replay and measured data and the ablation still run, and their reports are whole."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsnet_bluesky.features import Operator, features_of
from dsnet_bluesky.indirect import Indirect
from dsnet_bluesky.library.examples import Session
from dsnet_bluesky.smearing import Smearing
from dsnet_bluesky.unrolled import Unrolled, UnrolledConfig

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


def test_a_quick_run_reads_icosahedra(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    # By its path: the tests have a package of that name.
    runpy.run_path(str(BENCHMARKS / "icosahedra.py"))["main"](["--quick", "--losses", "--output", str(tmp_path)])
    report = (tmp_path / "icosahedra.md").read_text(encoding="utf-8")
    rows = ("all, eight views", "the paper's, one view", "central hole", "as trained", "averaged with opposite pixels", "network")
    for row in (*rows, "1 random start"):
        assert re.search(rf"^\| {row} \| [0-9.]+ \|", report, re.MULTILINE), row
    assert "nan" not in report.lower()
    assert all(0 < (tmp_path / link).stat().st_size < 150_000 for link in re.findall(r"\]\(([^)]+\.png)\)", report))


def test_a_quick_run_asks_every_question(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    importlib.import_module("queries").main(["--quick", "--output", str(tmp_path)])
    report = (tmp_path / "queries.md").read_text(encoding="utf-8")
    assert "## SQLite, 200 results" in report
    assert all(
        re.search(rf"^\| `{name}`(?: \| [0-9]+ \([0-9]+\)){{5}} \|$", report, re.MULTILINE) for name in ("OfRun", "Latest")
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # several servers and clusters start one after the other: 280 s on a slow, loaded machine
def test_a_quick_replay_stores_every_run(tmp_path):
    """In a process of its own: it starts further ones."""
    command = [sys.executable, str(BENCHMARKS / "replay.py"), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    report = (tmp_path / "replay.md").read_text(encoding="utf-8")
    assert "- 40 of 40 runs stored in " in report
    assert "finds 40; of the first 40 40 were read and are whole." in report
    assert "- A second replay: 0 to do, " in report
    assert "- Computed again and compared: 40 equal, 0 differ." in report


def test_the_quick_ablation_writes_a_whole_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    ablation = importlib.import_module("ablation")
    for part in ("training", "consistency"):
        ablation.main(["--quick", "--part", part, "--output", str(tmp_path), "--cache", str(tmp_path / "cache")])
    report = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert all(report.count(f"| {name} | ") == 2 for name in ablation.VARIANTS if name != "everything")
    assert all(f"| {condition} | **all, as released** | 8 | " in report for condition in ablation.CONDITIONS)
    assert "nan" not in report.lower()
    assert 0 < (tmp_path / "ablation.png").stat().st_size < 150_000


@pytest.mark.slow
def test_the_quick_denoising_writes_a_whole_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    denoise = importlib.import_module("denoise")
    monkeypatch.setitem(denoise.GROUPS, "bm3d", lambda *arguments: iter(()))  # not free for all uses, and slow
    denoise.main(["--quick", "--output", str(tmp_path), "--cache", str(tmp_path / "cache")])
    report = (tmp_path / "denoise.md").read_text(encoding="utf-8")
    gains = {name: float(gain) for name, gain in re.findall(r"^\| ([^|]+) \| (-?[0-9.]+) \| -?[0-9.]+ \|$", report, re.MULTILINE)}
    assert gains["**symmetry denoiser**"] > gains["symmetry average + Gaussian"] > gains["Gaussian"] > 0
    assert {"Noise2Void", "published algorithm, geometric mask"} <= set(gains)
    assert "nan" not in report.lower()
    assert 0 < (tmp_path / "denoise.png").stat().st_size < 150_000


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ablation_variants")


@pytest.fixture
def operators():
    """Two operators on the same grids, one sharp, one wide."""
    q = np.linspace(0.1, 5, 80)
    wide = Smearing.gaussian(q, 0.3)
    return Operator(wide), Operator(Smearing.gaussian(q, 0.1, q_calc=wide.q_calc))


def seen_by(operator):
    q = operator.smearing.q
    I = 1 / (q**4 + 0.1) * (1 + 0.02 * np.random.default_rng(1).standard_normal((3, q.size)))
    features = features_of(operator, I, 0.02 * I)
    return Session(operator, features, torch.zeros_like(features.start), ["sphere"] * 3, [0.02] * 3)


def assert_same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_the_operator_only_local_widths_tell_two_operators_apart(variants, operators):
    sharp, wide = (variants.without_operator(seen_by(operator)).features for operator in operators)
    widths = slice(13, None)
    assert not torch.equal(sharp.channels[:, widths], wide.channels[:, widths])
    sharp.channels[:, widths] = wide.channels[:, widths]
    assert_same(sharp, wide)


def test_without_the_indirect_transform_it_may_say_what_it_likes(variants, operators):
    operator = operators[0]
    first = variants.without_indirect(seen_by(operator)).features
    ladder = operator.ladder
    operator.ladder = lambda I, Idev: Indirect(*(1 + 2 * part for part in ladder(I, Idev)))
    assert_same(first, variants.without_indirect(seen_by(operator)).features)


@pytest.mark.parametrize("name", ["between_without_operator", "alone", "wider"])
def test_networks_without_the_operator_answer_by_features_alone(name, variants, operators):
    build, config = getattr(variants, name), UnrolledConfig(channels=(4, 4, 4))
    features, network = seen_by(operators[0]).features, build(config)
    assert_same(*(network(operator, features) for operator in operators))
    complete = Unrolled(config)
    assert not torch.equal(*(complete(operator, features).ln_I for operator in operators))


def test_stages_of_a_pass_are_timed_on_any_device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    path = tmp_path / "stages.md"
    importlib.import_module("gpu").main(["--stages", "--device", "cpu", "--curves", "4", "--output", str(path)])
    text = path.read_text(encoding="utf-8")
    times = dict(re.findall(r"^\| ([a-z 0-9A-Z]+) \| ([0-9,.]+) \|$", text, re.MULTILINE))
    assert float(times["whole pass"].replace(",", "")) > float(times["network"].replace(",", "")) > 0
    assert "| aten::" in text


def test_factors_by_blocks_are_cholesky_factors(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    by_blocks = importlib.import_module("gpu").by_blocks
    tall = torch.randn(5, 70, 53, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normal = tall.mT @ tall
    assert torch.allclose(by_blocks(normal), torch.linalg.cholesky(normal), rtol=1e-9, atol=1e-10)

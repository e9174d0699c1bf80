"""``dsnet-bluesky compare`` against a real server."""

import json
import re
import shlex
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from dsnet_bluesky.cli import app
from dsnet_bluesky.data import describe
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.documents import result_metadata

GUIDE = Path(__file__).parent.parent / "docs" / "how-to" / "compare.md"
Q = np.linspace(0.05, 3, 120)
SAMPLE = "AgBh [red]"
MADE = (("dsnet", "2.0.0", 1.0), ("dsnet", "2.1.0", 1.01), ("dsnet", "2.2.0", 1.02), ("ift", "", 1.5))


def result(factor):
    I = factor * (0.02 * Q**-3 + 5 * np.exp(-(((Q - 1.1) / 0.08) ** 2)))[None]
    names = {"I": I, "Idev": 0.02 * I, "I_smeared": I / factor, "Idev_smeared": 0.02 * I / factor, "I_resmeared": I / factor}
    variables = {name: (("exposure", "q"), values, {"units": "1/cm"}) for name, values in names.items()}
    variables |= {"chi2": ("exposure", [1.0]), "flags": ("exposure", [0]), "status": ("exposure", ["ok"])}
    return describe(xr.Dataset(variables, {"q": ("q", Q, {"units": "1/nm"})}))


@pytest.fixture(scope="module")
def stored(served, store_raw_run):
    """Two runs by dsnet 2.0.0, 2.1.0 (much the same, with a failure) and ift (far off)."""
    client = served.client()
    for number in range(3):
        store_raw_run(client, uid := f"compared-{number}", sample="AgBh")
        start = {"uid": uid, "time": datetime(2026, 11, 20).timestamp() + number, "sample": "AgBh" if number else SAMPLE}
        for method, version, factor in (
            ("dsnet", "2.0.0", 1.0),
            ("dsnet", "2.1.0", 1.01),
            ("dsnet", "2.2.0", 1.02),
            ("ift", "", 1.5),
        ):
            said = {"direct_beam_uid": None, "config": {"method": method}, "config_sha256": "0" * 64, "method": method}
            writer = ResultWriter.create(
                client, f"{uid}-{method}-{version}", result_metadata(start, model_version=version, **said)
            )
            if version == "2.2.0" and not number:
                writer.fail("No finite answer.")
                continue
            writer.append(result(factor))
            writer.complete()
    return served


@pytest.fixture
def run(stored, tmp_path, monkeypatch):
    """Run a command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"TILED_API_KEY": stored.api_key, "TILED_URI": stored.uri, "COLUMNS": "200"})

    def run(*words, status):
        done = runner.invoke(app, ["compare", *words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.output
        return done

    return run


def test_a_model_that_passes_has_status_0_and_the_verdict_last(run):
    done = run("dsnet:2.0.0", "dsnet:2.1.0", "--minimum-runs", "3", status=0)
    assert done.stdout.splitlines()[-1] == "PASS: dsnet:2.1.0 may replace dsnet:2.0.0, by 3 runs compared."
    assert SAMPLE in done.stdout, "no bracket is taken for markup"
    assert "\n" not in done.stderr.strip()


def test_a_failure_has_status_1_and_names_the_run(run):
    done = run("dsnet:2.0.0", "dsnet:2.2.0", "--minimum-runs", "2", status=1)
    line = " ".join(done.stdout.split())
    assert "FAIL: dsnet:2.2.0 may not replace dsnet:2.0.0 because 1 that dsnet:2.0.0 did fails now (run compared-0" in line
    assert "No finite answer" in line


def test_for_programs_there_is_json(run):
    said = json.loads(run("dsnet:2.0.0", "ift", "--query", "sample=AgBh", "--json", status=1).stdout)
    assert said["passed"] is False
    assert said["counts"]["runs compared"] == 2
    assert "100.00% of the points changed" in said["verdict"]
    assert said["quantities"]["peak_position"]["both"] == 2
    assert said["quantities"]["Rg"]["relative_median"] is None


def test_a_report_is_written_and_replaced(run, tmp_path):
    for _ in range(2):
        of_ours = ("--query", "until=2026-11-20", "--limit", "1")  # other tests share the server
        done = run("dsnet:2.0.0", "dsnet:2.1.0", "--minimum-runs", "1", *of_ours, "--output", "out", status=0)
    assert "Written: out/report.html" in done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"report.html", "pairs.csv", "changed.png"}
    assert not any("partial" in name for name in names)
    headings, row = (line.split(",") for line in (tmp_path / "out" / "pairs.csv").read_text().splitlines())
    assert dict(zip(headings, row, strict=True))["exposure"] == "1", "counted from 1, as export does"
    page = (tmp_path / "out" / "report.html").read_text()
    table = page[page.index("Runs that changed most") :]
    assert re.search(r"<td[^>]*>compared-\d</td>\s*<td[^>]*>1</td>", table), table[:2000]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("dsnt", "ift"), "There is no method 'dsnt'"),
        (("dsnet:9", "ift"), "no result of dsnet:9; there is no such model here: there are dsnet:2.0.0, dsnet:2.1.0"),
        (("dsnet:2.0.0", "dsnet:8.0.0"), "no result of dsnet:8.0.0; there is no such model here: there are dsnet:2.0.0"),
        (("dsnet:2.0.0", "cme"), "no result of cme; make them with `dsnet-bluesky replay --model cme`"),
        (("dsnet:2.0.0", "ift", "--since", "2031-01-01"), "no result of dsnet:2.0.0 that answers what is asked"),
        (("dsnet:2.0.0", "ift", "--since", "yesterday"), "'yesterday' is no time"),
        (("dsnet:2.0.0", "ift", "--query", "colour=red"), "colour"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, words, why):
    done = run(*words, "--output", "out", status=2)
    assert done.stdout == ""
    assert done.stderr.strip().startswith("Error: ")
    assert why in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_guide_run(run, tmp_path):
    (block,) = re.findall(r"```\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert command[:2] == ["dsnet-bluesky", "compare"]
        run(*command[2:], status=1)  # there are fewer runs than a verdict needs
    assert (tmp_path / "report" / "report.html").exists()

"""Two models side by side: real results of a simulated beamline, and what the numbers must fulfil."""

import json
import re
import shutil
import tomllib
import uuid

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from bluesky import RunEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file
from tiled.queries import Key

from dsnet_bluesky.callbacks.desmear import desmear_runs
from dsnet_bluesky.comparison import Criteria, compare, judge
from dsnet_bluesky.comparison.measures import BANDS, differences, mismatch, quantity_changes, rows_of
from dsnet_bluesky.comparison.references import Reference, parse_reference
from dsnet_bluesky.comparison.report import to_dict, write
from dsnet_bluesky.comparison.tally import Comparison, Failure
from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.questions import Sample
from dsnet_bluesky.versions import load_model, sha256_of, write_card
from tests.conftest import Line

FEW = Criteria(minimum_runs=2)
BINS = {"bins": 60, "per_bin": 32}


def another_version(folder, version, noise=0.0):
    """Copy the released model as a version of its own, its weights changed by a part of themselves."""
    released = load_model("dsnet:2.0.0")
    path = folder / f"dsnet-{version}"
    shutil.copytree(released.path, path)
    weights = load_file(path / "weights.safetensors")
    rng = np.random.default_rng(0)
    for name, values in weights.items():
        weights[name] = values * (1 + noise * rng.normal(size=values.shape)).astype(values.dtype)
    # A file of its own, even with the same weights: results are known by its digest.
    save_file(weights, path / "weights.safetensors", {"version": version})
    card = tomllib.loads((path / "model.toml").read_text())
    write_card(path, card | {"version": version, "weights_sha256": sha256_of(path / "weights.safetensors")})
    return path


@pytest.fixture(scope="module")
def runs(client, detector_directory, tmp_path_factory):
    """Three runs of a simulated beamline, desmeared by dsnet 2.0.0, 2.0.1 (another), 2.0.2 (the same) and ift."""
    engine = RunEngine({})
    line = Line(engine, client, detector_directory)
    beam = line.beam()
    uids = [line.sample(exposures=count, direct_beam_uid=beam) for count in (1, 2, 1)]
    models = tmp_path_factory.mktemp("models")
    configs = [Config(method="dsnet:2.0.0", **BINS), Config(method="ift", **BINS)]
    for version, noise in (("2.0.1", 0.01), ("2.0.2", 0.0)):
        configs.append(Config(options={"model": str(another_version(models, version, noise))}, **BINS))
    for config in configs:
        desmear_runs(client, uids, config=config)
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    return uids


def test_the_same_weights_change_nothing_and_pass(client, runs):
    found = compare(client, "dsnet:2.0.0", "dsnet:2.0.2")
    assert (found.runs, len(found.exposures), found.unpaired) == (3, 4, 0)
    assert found.exposures["raw_uid"].tolist() == [runs[2], runs[1], runs[1], runs[0]], "the newest run first"
    assert (found.exposures["d_rms"] == 0).all()
    assert (found.exposures[list(BANDS)] == 1).all(axis=None)
    verdict = judge(found, FEW)
    assert verdict.passed
    assert verdict.line == "PASS: dsnet:2.0.2 may replace dsnet:2.0.0, by 3 runs compared."


def test_another_model_changes_numbers_flags_and_quantities(client, runs):
    found = compare(client, "dsnet:2.0.0", "dsnet:2.0.1")
    assert found.runs == 3
    rows = found.exposures
    assert (rows["d_rms"] > 0).all()
    assert ((rows[list(BANDS)] >= 0) & (rows[list(BANDS)] <= 1)).all(axis=None)
    stored = {
        node.metadata["model_version"]: node.read() for node in client["desmeared"].search(Key("raw_uid") == runs[1]).values()
    }
    a, b = stored["2.0.0"].isel(exposure=0), stored["2.0.1"].isel(exposure=0)
    row = rows[(rows["raw_uid"] == runs[1]) & (rows["exposure"] == 0)].iloc[0]
    d = (b["I"] - a["I"]) / np.hypot(a["Idev"], b["Idev"])
    assert row["d_rms"] == pytest.approx(float(np.sqrt((d**2).mean())))
    assert row["b_in_a_68"] == pytest.approx(float((abs(b["I"] - a["I"]) <= a["Idev"]).mean()))
    assert row["chi2_b"] == pytest.approx(float(b["chi2"]))
    assert row["key_a"] != row["key_b"]
    assert np.isfinite(row["invariant_change"])


def test_a_classical_method_is_compared_as_well(client, runs):
    found = compare(client, "dsnet:2.0.0", "ift", [Sample("AgBh")], limit=2)
    assert (found.a, found.b, found.runs) == ("dsnet:2.0.0", "ift", 2)
    assert set(found.exposures["answer_b"]) == {""}
    assert len(found.changed) == 2
    assert found.changed[0].row["d_rms"] >= found.changed[1].row["d_rms"]


def failed_result(client, uid, reason="No finite answer.", **changes):
    """A result of dsnet 2.0.1 that failed as a whole."""
    node = next(n for n in client["desmeared"].search(Key("raw_uid") == uid).values() if n.metadata["model_version"] == "2.0.1")
    said = node.metadata
    start = client["raw"][uid].metadata["start"]
    metadata = result_metadata(
        start,
        direct_beam_uid=said["direct_beam_uid"],
        config=dict(said["config"]),
        config_sha256=said["config_sha256"],
        method="dsnet",
        model_name="dsnet",
        **{"model_version": "3.0.0"} | changes,
    )
    ResultWriter.create(client, str(uuid.uuid4()), metadata).fail(reason)


def test_words_count_exposures_from_1():
    assert Failure("a", "AgBh", 0, "No.").where == "run a exposure 1"
    assert Failure("a", "AgBh", None, "No.").where == "run a"


def test_a_new_failure_fails_and_is_named(client, runs):
    failed_result(client, runs[0], "No finite answer for <b>this</b>.")
    found = compare(client, "dsnet:2.0.0", "dsnet:3.0.0")
    assert found.new_failures == [Failure(runs[0], "AgBh", None, "No finite answer for <b>this</b>.")]
    assert (found.runs, found.unpaired) == (0, 2)
    verdict = judge(found, FEW)
    assert not verdict.passed
    assert f"1 that dsnet:2.0.0 did fails now (run {runs[0]}: No finite answer" in verdict.line
    assert "only 0 runs could be compared, and 2 are needed" in verdict.line
    back = compare(client, "dsnet:3.0.0", "dsnet:2.0.0")
    assert [failure.raw_uid for failure in back.healed] == [runs[0]]
    assert not back.new_failures


def test_a_failure_before_the_model_was_loaded_counts_where_the_configuration_named_it(client, runs):
    said = next(iter(client["desmeared"].search(Key("raw_uid") == runs[0]).values())).metadata
    config = {**said["config"], "method": "dsnet:4.0.0"}
    metadata = result_metadata(
        client["raw"][runs[0]].metadata["start"], direct_beam_uid=None, config=config, config_sha256="4", method="dsnet"
    )
    ResultWriter.create(client, str(uuid.uuid4()), metadata).fail("No direct beam.", kind="direct_beam")
    found = compare(client, "dsnet:2.0.0", "dsnet:4.0.0")
    assert [failure.reason for failure in found.new_failures] == ["No direct beam."]


def test_results_reduced_in_another_way_are_refused_and_counted(client, runs):
    desmear_runs(client, runs[:1], config=Config(method="lake", bins=80, per_bin=32))
    with pytest.raises(BadInput, match="1 are reduced with another bins; of 2 runs lake has no result, make them with `dsnet-b"):
        compare(client, "dsnet:2.0.0", "lake")


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ("dsnt", "ift", "There is no method 'dsnt'; the methods are .*dsnet"),
        ("icosahedra", "ift", "reads frames"),
        ("dsnet:2.0.0", "ift:1.0", "ift has no released models"),
        ("dsnet:next", "ift", "dsnet:next is neither a version nor an alias"),
        ("dsnet:2.0.0", "dsnet", "one and the same"),
        ("dsnet:9.9.9", "ift", "no result of dsnet:9.9.9; there is no such model here: there are dsnet:2.0.0"),
        ("ift", "cme", "no result of cme; make them with"),
    ],
)
def test_what_cannot_be_compared_says_why(client, runs, a, b, why):
    with pytest.raises(BadInput, match=why):
        compare(client, a, b)


def test_a_query_without_results_says_so(client, runs):
    with pytest.raises(BadInput, match=r"no result of dsnet:2\.0\.0 that answers what is asked"):
        compare(client, "dsnet:2.0.0", "ift", [Sample("gold")])


def test_references():
    assert parse_reference("dsnet:2.0") == Reference("dsnet", "2.0")
    assert str(parse_reference("dsnet")) == f"dsnet:{load_model('dsnet').version}"
    assert str(parse_reference("lake")) == "lake"


# -- pure functions --

Q = np.linspace(0.1, 2, 40)


def answer(I, Idev, **attrs):
    """Answers of one exposure each, dims (exposure, q)."""
    I = np.atleast_2d(I)
    values = {"I": I, "Idev": np.broadcast_to(Idev, I.shape), "I_smeared": np.ones_like(I), "Idev_smeared": 0.1 * np.ones_like(I)}
    variables = {name: (("exposure", "q"), array) for name, array in values.items()}
    variables |= {"chi2": ("exposure", np.ones(len(I))), "flags": ("exposure", np.zeros(len(I), int))}
    return xr.Dataset(variables, {"q": Q}, attrs)


curves = arrays(float, (2, Q.size), elements=st.floats(-1e3, 1e3))
errors = arrays(float, (2, Q.size), elements=st.floats(1e-3, 1e2))


@settings(deadline=None, max_examples=40)
@given(I=curves, J=curves, s=errors, t=errors, scale=st.floats(1e-3, 1e3))
def test_differences_change_sign_with_the_order_and_not_with_the_unit(I, J, s, t, scale):
    found, back = differences(answer(I, s), answer(J, t)), differences(answer(J, t), answer(I, s))
    np.testing.assert_allclose(found.d, -back.d)
    np.testing.assert_allclose(
        found.d, differences(answer(scale * I, scale * s), answer(scale * J, scale * t)).d, rtol=1e-6, atol=1e-9
    )
    assert (np.abs(found.d) <= np.abs(found.by_a) + 1e-12).all()
    np.testing.assert_array_equal(found.inside["b_in_a_68"], back.inside["a_in_b_68"])
    assert (found.inside["b_in_a_95"] >= found.inside["b_in_a_68"]).all()


def test_answers_that_scatter_independently_have_d_of_one():
    rng = np.random.default_rng(0)
    a, b = (answer(5 + rng.normal(size=(500, Q.size)) * s, s) for s in (0.3, 0.7))
    assert np.std(differences(a, b).d) == pytest.approx(1, abs=0.02)


def test_bands_are_as_wide_as_the_method_says():
    a = answer(np.zeros(Q.size), 1.0, diagnostics=json.dumps({"coverage_factor": 3.0}))
    found = differences(a, answer(np.full(Q.size, 2.5), 1.0))
    assert {name: values.mean() for name, values in found.inside.items()} == {
        "b_in_a_68": 0,
        "b_in_a_95": 1,
        "a_in_b_68": 0,
        "a_in_b_95": 0,
    }


def test_without_errors_of_one_those_of_the_other_serve():
    found = differences(answer(np.zeros(Q.size), np.nan), answer(np.ones(Q.size), 0.5))
    np.testing.assert_allclose(found.d, 2)
    assert np.isnan(found.by_a).all()
    assert np.isnan(found.inside["b_in_a_95"]).all()
    assert np.isnan(differences(answer(np.zeros(Q.size), np.nan), answer(np.ones(Q.size), np.nan)).d).all()


def test_other_grids_and_other_measurements_are_no_pair():
    a = answer(np.ones(Q.size), 0.1)
    assert mismatch(a, a) == ""
    assert "another grid of q" in mismatch(a, a.assign_coords(q=Q * 1.001))
    assert "another grid of q" in mismatch(a, a.isel(q=slice(20)))
    assert "another measured curve" in mismatch(a, a.assign(I_smeared=a["I_smeared"] * 1.01))


def test_quantities_of_one_curve_have_not_changed():
    q = np.linspace(0.02, 3, 300)
    I = 100 * np.exp(-((4 * q) ** 2) / 3) + 3 * np.exp(-(((q - 1.5) / 0.05) ** 2)) + 0.01
    curve = xr.Dataset({"I": ("q", I), "Idev": ("q", 0.01 * I)}, {"q": q})
    same = quantity_changes(curve, curve)
    assert {same[f"{name}_change"] for name in ("Rg", "I0", "invariant", "peak_position", "peak_fwhm", "peak_height")} == {0.0}
    assert same["peaks_matched"] == same["peaks_a"] == 1
    higher = quantity_changes(curve, curve.assign(I=curve["I"] * 1.05))
    assert higher["I0_b"] == pytest.approx(1.05 * higher["I0_a"])
    assert higher["I0_change"] > 5
    assert abs(higher["Rg_change"]) < 0.1


def tally(chi2=(1.0, 1.0), poor=(0, 0), shift=0.0, error=0.1, runs=30):
    """A comparison of runs that are all alike."""
    found = Comparison("dsnet:2.0.0", "dsnet:2.1.0")
    a, b = answer(np.ones(Q.size), 0.1), answer(np.ones(Q.size) + shift, error)
    a["chi2"][:], b["chi2"][:] = chi2
    seen = differences(a, b)
    (row,) = rows_of(a, b, seen, [0])
    for number in range(runs):
        said = {"sample": "gold", "raw_uid": f"run-{number}", "key_a": "a", "key_b": "b", "time": 1.7e9 + number}
        flags = {f"flags_{side}": int(Flag.POOR_FIT) * (number < count) for side, count in zip("ab", poor, strict=True)}
        found.add(said, [row | flags], a, b, seen)
    return found


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chi2": (1.0, 1.03)}, "the median chi2 is 1.03 instead of 1, more than 0.02 worse"),
        ({"poor": (1, 2)}, "6.67% of the exposures are poor fits, and 3.33% were"),
        ({"shift": 0.5 * (np.arange(Q.size) < 4)}, "10.00% of the points changed by more than three errors"),
        ({"shift": 0.5, "error": 10.0}, "only 0.00% of the points lie within the 95 % band of dsnet:2.0.0"),
        ({"runs": 19}, "only 19 runs could be compared, and 20 are needed"),
    ],
)
def test_each_criterion_fails_alone(changes, why):
    assert judge(tally()).passed
    verdict = judge(tally(**changes))
    assert verdict.line == f"FAIL: dsnet:2.1.0 may not replace dsnet:2.0.0 because {why}."
    assert [check.passed for check in verdict.checks].count(False) == 1


@pytest.mark.parametrize("changes", [{"chi2": (1.0, 1.01)}, {"chi2": (1.0, 0.5)}, {"poor": (2, 1)}, {"shift": 0.15}])
def test_what_is_better_or_hardly_other_passes(changes):
    assert judge(tally(**changes)).passed


HOSTILE = '<script>alert(1)</script> & "q" [bold red]$\\frac{$ \x1b[31m\u2603\U0001f4a5'


def test_the_report_escapes_what_comes_from_the_catalog(tmp_path):
    found = tally(shift=0.2)
    a = answer(np.ones(Q.size), 0.1)
    seen = differences(a, answer(np.ones(Q.size) + 0.25, 0.1))
    said = {"sample": HOSTILE, "raw_uid": HOSTILE, "key_a": "a", "key_b": "b", "time": 1.7e9}
    found.add(said, list(rows_of(a, a, seen, [0])), a, a, seen)
    found.new_failures.append(Failure(HOSTILE, HOSTILE, 0, HOSTILE))
    verdict = judge(found)
    written = write(found, verdict, tmp_path / "report")
    assert {path.name for path in written} == {
        "report.html",
        "pairs.csv",
        *(f"{name}.png" for name in ("chi2", "differences", "coverage", "changed", "quantities")),
    }
    assert sorted(tmp_path.joinpath("report").iterdir()) == sorted(written), "nothing half-written is left"
    page = written[0].read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "it needs no network"
    assert page.count("data:image/png;base64,") == 5
    table = pd.read_csv(tmp_path / "report" / "pairs.csv")
    assert len(table) == 31
    assert HOSTILE in set(table["sample"])
    json.dumps(to_dict(found, verdict), allow_nan=False)


def test_memory_does_not_grow_with_curves():
    """A row for each exposure and the curves of six runs are all that is kept."""
    found = tally(runs=1200)
    assert len(found.exposures) == 1200
    assert len(found.changed) == 6
    assert found.exposures.memory_usage(deep=True).sum() / 1200 < 1500

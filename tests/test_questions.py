"""Questions about results: the server answers them, alike on SQLite and PostgreSQL."""

from datetime import UTC, datetime

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tiled.client.container import Container
from tiled.queries import Comparison, Key

from dsnet_bluesky.data import BadInput, describe
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.queries import ResultsClient
from dsnet_bluesky.questions import Between, Complete, Failed, Model, OfRun, Quality, Sample, parse_query
from dsnet_bluesky.versions import version_order

DAY = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
Q = np.linspace(0.1, 1, 20)


def exposures(levels, chi2, q=Q):
    values = np.outer(levels, np.exp(-q))
    variables = {name: (("exposure", "q"), values * factor) for name, factor in (("I", 1), ("Idev", 0.1), ("Qdev", 0.01))}
    count = len(levels)
    variables |= {"chi2": ("exposure", chi2), "flags": ("exposure", np.zeros(count, int)), "status": ("exposure", ["ok"] * count)}
    return describe(xr.Dataset(variables, {"q": ("q", q, {"units": "1/nm"})}, {"method": "dsnet"}))


def store(client, store_raw_run, number, *, sample, model="2.0.0", method="dsnet", chi2=(1.0,), failed=False, q=Q):
    uid = f"run-{number}"
    store_raw_run(client, uid)
    start = {"uid": uid, "time": DAY + 86_400 * number, "sample": sample}
    metadata = result_metadata(
        start,
        direct_beam_uid=None,
        config={},
        config_sha256="0" * 64,
        method=method,
        model_name=method if model else "",
        model_version=model,
    )
    writer = ResultWriter.create(client, f"{uid}-{method}-{model}", metadata)
    if failed:
        return writer.fail("too few counts")
    writer.append(exposures(np.arange(len(chi2)) + 10.0 * number, list(chi2), q))
    if number == 2:
        writer.append_failure("NaN in the frame")
    return writer.complete()


def fill(client, store_raw_run):
    store(client, store_raw_run, 1, sample="AgBh", chi2=(1.0, 1.4))
    store(client, store_raw_run, 2, sample={"name": "AgBh", "batch": 7}, model="2.1.0", chi2=(1.2,))
    store(client, store_raw_run, 3, sample="latex", model="3.0.0rc1", chi2=(0.9, 9.0))
    store(client, store_raw_run, 3, sample="latex", model="", method="map")
    store(client, store_raw_run, 4, sample="latex", failed=True)


@pytest.fixture(scope="module")
def results(client, store_raw_run):
    fill(client, store_raw_run)
    return client["desmeared"]


ASKED = [
    (OfRun("run-3"), {3.0, 3.5}),
    (OfRun("run-1", "run-4"), {1.0, 4.0}),
    (Sample("AgBh"), {1.0, 2.0}),
    (Failed(), {4.0}),
    (Complete(), {1.0, 2.0, 3.0, 3.5}),
    (Quality(chi2_max=1.5), {1.0, 2.0, 3.5}),
    (Quality(chi2_max=1.3), {2.0, 3.5}),
    (Between("2026-11-03T00:00+00:00", "2026-11-05T00:00+00:00"), {2.0, 3.0, 3.5}),
    (Between(end=DAY + 86_400 * 2), {1.0}),
    (Between(datetime(2026, 11, 4, tzinfo=UTC)), {3.0, 3.5, 4.0}),
    (Between(), {1.0, 2.0, 3.0, 3.5, 4.0}),
    (Model("dsnet"), {1.0, 2.0, 3.0, 4.0}),
    (Model("map"), {3.5}),
    (Model("dsnet", ">=2,<3"), {1.0, 2.0, 4.0}),
    (Model("dsnet", ">2.0.0"), {2.0, 3.0}),
    (Model("dsnet", "==2.0.0"), {1.0, 4.0}),
    (Model("dsnet", "==2.*"), {1.0, 2.0, 4.0}),
    (Model("dsnet", "~=2.1"), {2.0}),
    (Model("dsnet", "!=2.0.0"), {2.0, 3.0}),
]


def told(results):
    """Numbers of the runs; a half more for the classical method."""
    return {float(said["raw_uid"][4:]) + 0.5 * (said["method"] == "map") for said in (n.metadata for n in results.values())}


@pytest.mark.parametrize(("question", "answer"), ASKED, ids=lambda value: repr(value))
def test_the_server_answers(results, question, answer):
    assert type(results) is ResultsClient
    found = results.search(question)
    assert told(found) == answer
    assert len(found) == len(answer)


def test_questions_compose_with_each_other_and_with_queries(results):
    found = results.search(Sample("AgBh")).search(Key("exposures") == 2).search(Model("dsnet", "<3")).search(Quality(1.5))
    assert told(found) == {1.0, 2.0}
    newest = found.sort(("original_start_time", -1)).search(Comparison("gt", "exposures", 0))
    assert newest.keys().first() == "run-2-dsnet-2.1.0"


def test_any_client_may_ask(results):
    """One without this package's clients, query by query."""
    bare = Container(results.context, item=results.item, structure_clients=results.structure_clients)
    for query in Model("dsnet", ">=2,<3").queries():
        bare = bare.search(query)
    assert told(bare) == {1.0, 2.0, 4.0}


@pytest.mark.parametrize("uids", [(["run-1", "run-4"],), (("run-1",),), ("run-1", 4)])
def test_uids_are_words(uids):
    with pytest.raises(BadInput, match=r"A uid is a word, not (list|tuple|int); .*OfRun\(a, b\)"):
        OfRun(*uids)


@pytest.mark.parametrize("asked", [lambda: Model("dsnet", "new"), lambda: OfRun(), lambda: Between("soon").queries()])
def test_what_cannot_be_asked_is_explained(asked):
    with pytest.raises(BadInput):
        asked()


WORDS = [
    ("sample=AgBh", Sample("AgBh")),
    ("sample = silver behenate, batch=7", Sample("silver behenate, batch=7")),
    ("run=run-3", OfRun("run-3")),
    ("model=map", Model("map")),
    ("model=dsnet>=2,<3", Model("dsnet", ">=2,<3")),
    (" model = dsnet ~= 2.1 ", Model("dsnet", "~= 2.1")),
    ("model=dsnet:2.0.0", Model("dsnet", "==2.0.0")),
    ("model=dsnet:3.0.0rc1", Model("dsnet", "==3.0.0rc1")),
    ("chi2<=1.5", Quality(1.5)),
    ("chi2 <= 1", Quality(1.0)),
    ("since=2026-11-03T00:00+00:00", Between("2026-11-03T00:00+00:00")),
    ("since=2026-11-03", Between("2026-11-03")),
    ("until=2026-11-30", Between(end=datetime(2026, 12, 1))),
    ("until=2026-11-30T14:00", Between(end="2026-11-30T14:00")),
    ("status=complete", Complete()),
    ("status=failed", Failed()),
]


@pytest.mark.parametrize(("text", "question"), WORDS)
def test_questions_are_read_from_the_command_line(text, question):
    assert parse_query(text) == [question]


def test_what_is_read_is_answered(results):
    found = results
    for text in ("model=dsnet>=2,<3", "chi2<=1.5", "since=2026-11-01", "until=2026-11-30"):
        for question in parse_query(text):
            found = found.search(question)
    assert told(found) == {1.0, 2.0}


BAD_WORDS = [
    ("", "The query '' is not understood"),
    ("AgBh", "One asks with sample=AgBh, run=UID, .*'chi2<=1.5', since=2026-11-01"),
    ("sample=", "The query 'sample=' is not understood"),
    ("sampel=AgBh", "The query 'sampel=AgBh' is not understood"),
    ("sample>AgBh", "is not understood"),
    ("run=  ", "is not understood"),
    ("model=dsnet>=new", "no versions"),
    ("model=dsnet:", "'dsnet:' is no model"),
    ("model=>=2", "'>=2' is no model"),
    ("chi2<1.5", "'chi2<=1.5'"),
    ("chi2<=good", "'good' is no number for chi2"),
    ("chi2<=nan", "'nan' is no number for chi2"),
    ("since=soon", "'soon' is no time"),
    ("until=2026-13-01", "'2026-13-01' is no time"),
    ("until=9999-12-31", "beyond what a calendar holds"),
    ("since=0001-01-01T00:00+14:00", "beyond what a calendar holds"),
    ("status=running", "'running' is no status"),
    ("latest=3", "is not understood"),
]


@pytest.mark.parametrize(("text", "message"), BAD_WORDS)
def test_a_query_that_is_not_understood_is_explained(text, message):
    with pytest.raises(BadInput, match=message):
        parse_query(text)


@given(
    st.text(max_size=30)
    | st.sampled_from(["since", "until", "chi2<=", "status"]).flatmap(
        lambda word: st.text("<>=!~: ", min_size=1).map(word.__add__)
    )
)
def test_any_other_text_is_explained(text):
    with pytest.raises(BadInput, match="One asks with"):
        parse_query(text)


WANTED = [">=2,<3", "~=2.1", "==2.*", ">1.5", "<=2.0.0", "!=2.0.0"]
releases = st.builds("{}.{}.{}{}".format, *[st.integers(0, 20)] * 3, st.sampled_from(["", ".dev1", "a1", "b2", "rc1", "rc10"]))


@given(releases, releases)
def test_numbers_of_versions_grow_with_them(one, other):
    assert (version_order(one) < version_order(other)) == (Version(one) < Version(other))


@given(
    releases.filter(lambda text: not Version(text).is_prerelease),
    st.sampled_from(WANTED),
)
def test_versions_are_understood_as_pip_does(text, wanted):
    order, operators = version_order(text), {"ge": "__ge__", "gt": "__gt__", "le": "__le__", "lt": "__lt__"}
    holds = True
    for query in Model("dsnet", wanted).queries()[1:]:
        value = query.value
        if isinstance(query, Comparison):
            holds &= getattr(order, operators[query.operator.value])(value)
        else:
            holds &= (order == value) != (type(query).__name__ == "NotEq")
    assert holds == (text in SpecifierSet(wanted))


def test_a_table_of_what_was_found(results):
    table = results.search(Sample("AgBh")).to_table()
    assert table["model_version"].tolist() == ["2.0.0", "2.1.0"]
    assert table["chi2_median"].tolist() == [1.2, 1.2]
    assert table.index.name == "key"
    assert results.search(Failed()).to_table(["reason", "writer.pid", "no.such"]).iloc[0]["reason"] == "too few counts"


def test_a_selection_is_one_dataset_that_is_read_when_needed(results):
    found = results.search(Model("dsnet")).to_xarray(["I", "chi2"])
    assert found["I"].chunks is not None, "nothing is read yet"
    assert found["I"].dims == ("result", "q")
    loaded = found.compute()
    assert loaded["raw_uid"].values.tolist() == ["run-1", "run-1", "run-2", "run-3", "run-3"]
    assert loaded["exposure"].values.tolist() == [0, 1, 0, 0, 1], "failed exposures are left out"
    np.testing.assert_allclose(loaded["I"].values[:, 0], np.array([10, 11, 20, 30, 31]) * np.exp(-0.1))
    np.testing.assert_allclose(loaded["chi2"], [1.0, 1.4, 1.2, 0.9, 9.0])
    assert loaded["q"].attrs["units"] == "1/nm"


def test_different_grids_want_a_common_one(make_client, store_raw_run):
    client = make_client()
    store(client, store_raw_run, 1, sample="AgBh")
    store(client, store_raw_run, 5, sample="AgBh", q=np.linspace(0.2, 2, 30))
    results = client["desmeared"]
    with pytest.raises(BadInput, match=r"2 different grids of q; give the one that you want, such as to_xarray\(q="):
        results.to_xarray()
    found = results.to_xarray(["I"], q=np.array([0.15, 0.5, 1.5])).compute()
    np.testing.assert_allclose(found["I"][0, :2], 10 * np.exp([-0.15, -0.5]), rtol=1e-3)
    assert np.isnan(found["I"].values).tolist() == [[False, False, True], [True, False, False]]
    with pytest.raises(BadInput, match="hold no J; they hold"):
        results.to_xarray(["J"], q=Q)
    with pytest.raises(BadInput, match="Nothing is selected"):
        results.search(Sample("none")).to_xarray()

"""Crafted data sources and files: answered with a reason, nothing outside readable_storage is read, memory stays small."""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import schemathesis
import zarr
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiled.storage import FileStorage, register_storage
from tiled.utils import ensure_uri

from dsnet_bluesky.adapters import CurveAdapter, PSFAdapter, ResultAdapter
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.frames import FABIO_MIMETYPE, HDF5_MIMETYPE, FrameReference, read
from dsnet_bluesky.nodes import MASK

DATASET = "/entry/data/data"
ADAPTERS = [CurveAdapter, PSFAdapter]


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that Tiled was told to read."""
    directory = tmp_path_factory.mktemp("readable").resolve()
    register_storage(FileStorage(ensure_uri(str(directory))))
    return directory


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what must not be read: frames that would do."""
    directory = tmp_path_factory.mktemp("outside").resolve()
    write_frames(directory / "frames.h5")
    np.save(directory / "mask.npy", np.zeros((120, 100), dtype=bool))
    return directory


def write_frames(path: Path, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(DATASET, **{"data": np.full((2, 120, 100), 7, dtype=np.int32), **options})
    return path


def asset(uri: str, parameter: str | None = "data_uris") -> SimpleNamespace:
    return SimpleNamespace(data_uri=uri, parameter=parameter, num=0)


def answer(adapter: Any, assets: list[SimpleNamespace], poni: Any, **changes: Any) -> Any:
    """Build the adapter as Tiled does; returns the text of a refusal, or the adapter."""
    instrument = {"poni": json.dumps(poni) if isinstance(poni, dict) else poni}
    frames = {"mimetype": HDF5_MIMETYPE, "parameters": {"dataset": DATASET}, "per_exposure": 1}
    frames |= changes.pop("frames", {})
    parameters = {"frames": frames, "instrument": instrument | changes.pop("instrument", {}), **changes}
    node = SimpleNamespace(specs=[], access_tags=[], metadata_={})
    try:
        return adapter.from_catalog(SimpleNamespace(assets=assets, parameters=parameters), node, **parameters)
    except HTTPException as error:
        if error.status_code != 422:
            raise
        return error.detail


def refused(*args: Any, **kwargs: Any) -> str:
    text = answer(*args, **kwargs)
    assert isinstance(text, str), "it was served"
    return text


# -- files --


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    "spelling",
    [
        "file://localhost{outside}/frames.h5",
        "file://localhost{readable}/../{name}/frames.h5",
        "file://localhost{readable}/%2e%2e/{name}/frames.h5",
        "file://localhost{readable}/%2E%2E%2F{name}%2Fframes.h5",
        "file://elsewhere{outside}/frames.h5",
        "file://localhost{readable}/link.h5",
        "file://localhost{readable}/folder/frames.h5",
        "file://localhost{readable}/nul%00.h5",
        "file:{outside}/frames.h5",
        "http://localhost{outside}/frames.h5",
        "{outside}/frames.h5",
        "file://",
        "",
    ],
)
def test_no_file_outside_readable_storage_is_read(adapter, spelling: str, readable: Path, outside: Path, poni):
    for name, target in (("link.h5", outside / "frames.h5"), ("folder", outside)):
        if not (readable / name).is_symlink():
            (readable / name).symlink_to(target)
    uri = spelling.format(outside=outside, readable=readable, name=outside.name)
    good = asset(write_frames(readable / "good.h5").as_uri())
    for parameter in ("data_uris", None):  # Tiled does not look at assets without a parameter
        refused(adapter, [asset(uri, parameter)], poni)
    mask = asset(uri.replace("frames.h5", "mask.npy"), MASK)
    refused(adapter, [good, mask], poni)


def test_links_within_readable_storage_are_followed(readable: Path, poni):
    write_frames(readable / "real.h5")
    (readable / "latest.h5").symlink_to("real.h5")
    assert not isinstance(answer(CurveAdapter, [asset((readable / "latest.h5").as_uri())], poni), str)


def test_assets_of_other_kinds_are_refused(readable: Path, poni):
    good = write_frames(readable / "kinds.h5").as_uri()
    for assets in ([asset(good), asset(good, "other")], [asset(good), asset(good, MASK), asset(good, MASK)]):
        assert "at most one mask" in refused(CurveAdapter, assets, poni)


def external_link(path: Path, target: Path) -> None:
    with h5py.File(path, "w") as file:
        file[DATASET] = h5py.ExternalLink(str(target), DATASET)


def virtual(path: Path, target: Path) -> None:
    layout = h5py.VirtualLayout(shape=(2, 120, 100), dtype=np.int32)
    layout[:] = h5py.VirtualSource(str(target), DATASET, shape=(2, 120, 100))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset(DATASET, layout)


def raw_bytes(path: Path, target: Path) -> None:
    """The bytes of any file, as if they were pixels."""
    with h5py.File(path, "w") as file:
        file.create_dataset(DATASET, shape=(2, 120, 100), dtype=np.uint8, external=[(str(target), 0, h5py.h5f.UNLIMITED)])


@pytest.mark.parametrize("refer", [external_link, virtual, raw_bytes])
def test_an_hdf5_file_refers_to_no_file_elsewhere(refer, readable: Path, outside: Path, poni):
    refer(readable / "master.h5", outside / "frames.h5")
    assert "own folder" in refused(CurveAdapter, [asset((readable / "master.h5").as_uri())], poni)
    with pytest.raises(BadInput, match="own folder"):
        read(FrameReference((readable / "master.h5").as_uri(), HDF5_MIMETYPE))
    virtual(readable / "second.h5", readable / "master.h5")  # a file beside it that refers to the outside
    assert isinstance(answer(CurveAdapter, [asset((readable / "second.h5").as_uri())], poni), str)


@pytest.mark.parametrize("refer", [external_link, virtual])
def test_a_master_file_refers_to_the_files_beside_it(refer, readable: Path, poni):
    write_frames(readable / "data_000001.h5")
    refer(readable / "beside.h5", Path("data_000001.h5"))
    assert not isinstance(answer(CurveAdapter, [asset((readable / "beside.h5").as_uri())], poni), str)


# -- parameters --


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frames": {"per_exposure": 0}}, "per_exposure"),
        ({"frames": {"per_exposure": -3}}, "per_exposure"),
        ({"frames": {"per_exposure": True}}, "per_exposure"),
        ({"frames": {"per_exposure": "2"}}, "per_exposure"),
        ({"frames": {"per_exposure": 10**30}}, "no complete exposure"),
        ({"frames": {"mimetype": None}}, "mimetype"),
        ({"frames": {"mimetype": "text/x-python"}}, "HDF5"),
        ({"frames": {"parameters": {"dataset": "/no/such"}}}, "no dataset"),
        ({"frames": {"parameters": {"dataset": "../../etc/passwd"}}}, "no dataset"),
        ({"frames": {"parameters": {"dataset": "/entry"}}}, "not a stack"),
        ({"frames": {"parameters": {"dataset": ["/entry"]}}}, "dataset"),
        ({"frames": {"parameters": {"dataset": "/entry\0"}}}, "dataset"),
        ({"frames": {"parameters": "{}"}}, "parameters"),
        ({"frames": {"swmr": False}}, "swmr"),
        ({"frames": {"template": "../../%s"}}, "template"),
        ({"data_uris": ["file:///etc/passwd"]}, "data_uris"),
        ({"instrument": {"exposure_time": -1.0}}, "exposure time"),
        ({"instrument": {"monitor": "many"}}, "monitor"),
        ({"instrument": {"transmission": 1e400}}, "transmission"),
        ({"instrument": {"exposure_time": [1, 2]}}, "exposure_time"),
    ],
)
def test_parameters_that_make_no_sense_are_explained(changes: dict, text: str, readable: Path, poni):
    good = asset(write_frames(readable / "parameters.h5").as_uri())
    assert text in refused(CurveAdapter, [good], poni, **changes)


@pytest.mark.parametrize(
    "change",
    [
        {"detector": "/etc/passwd"},
        {"detector": "{outside}/frames.h5"},
        {"detector": "NexusDetector", "detector_config": {"filename": "{outside}/frames.h5"}},
        {"detector": "__import__('os').system('touch {outside}/owned')"},
        {"detector": "logger"},
        {"detector_config": {"pixel1": 1e-3, "pixel2": 1e-3, "max_shape": [120, 100], "splineFile": "{outside}/frames.h5"}},
        {"detector_config": {"pixel1": 1e-3, "pixel2": 1e-3, "max_shape": [10**6, 10**6], "orientation": 3}},
        {"detector_config": {"pixel1": 1e-3, "pixel2": 1e-3, "max_shape": [-1, 5], "orientation": 3}},
        {"detector_config": {"pixel1": 1e-3, "pixel2": 1e-3, "max_shape": "120", "orientation": 3}},
        {"detector_config": "{{"},
        {"detector_config": [1]},
        {"splinefile": "{outside}/frames.h5", "poni_version": 1},
        {"version": 4, "poni": {"detector": "{outside}/frames.h5"}},
        {"dist": "far"},
        {"dist": -1.0},
        {"wavelength": 1e300},
    ],
)
def test_a_geometry_opens_no_files_and_runs_nothing(change: dict, readable: Path, outside: Path, poni):
    filled = json.loads(json.dumps(change).replace("{outside}", str(outside)))
    opened = record_opened(outside)
    good = asset(write_frames(readable / "geometry.h5").as_uri())
    for adapter in ADAPTERS:
        refused(adapter, [good], poni | filled)
    assert not opened
    assert not (outside / "owned").exists()


@pytest.mark.parametrize("value", ["", "not JSON", "[1, 2]", "null", None, 3])
def test_a_geometry_that_is_none_is_explained(value: Any, readable: Path):
    good = asset(write_frames(readable / "none.h5").as_uri())
    for adapter in ADAPTERS:
        assert "geometry" in refused(adapter, [good], value)


_watched: dict[str, list[str]] = {}


def record_opened(directory: Path) -> list[str]:
    """List the files below a directory that this process opens from now on, as far as Python sees it."""
    if not _watched:
        sys.addaudithook(_note)
    return _watched.setdefault(str(directory), []) if not _watched.get(str(directory)) else _watched[str(directory)]


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str):
        for directory, found in _watched.items():
            if args[0].startswith(directory):
                found.append(args[0])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["/etc/passwd", DATASET, "data"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
instruments = st.dictionaries(st.sampled_from(["poni", "exposure_time", "monitor", "transmission", "mask", "other"]), values)
frame_parameters = st.dictionaries(st.sampled_from(["mimetype", "parameters", "per_exposure", "dataset"]), values)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=frame_parameters | values,
    instrument=instruments | values,
    more=st.dictionaries(st.text(max_size=5), values, max_size=1),
)
def test_whatever_is_in_a_data_source_is_answered(readable: Path, frames: Any, instrument: Any, more: dict):
    path = readable / "anything.h5"
    assets = [asset((path if path.exists() else write_frames(path)).as_uri())]
    node = SimpleNamespace(specs=[], access_tags=[], metadata_={})
    parameters = {**more, "frames": frames, "instrument": instrument}
    for adapter in ADAPTERS:
        with pytest.raises(HTTPException) as caught:
            adapter.from_catalog(SimpleNamespace(assets=assets, parameters=parameters), node, **parameters)
        assert caught.value.status_code == 422


# -- size --


def claims_a_billion_frames(path: Path) -> str:
    write_frames(path, data=None, shape=(10**9, 120, 100), chunks=(1, 120, 100), dtype=np.int32)
    return HDF5_MIMETYPE


def one_huge_chunk(path: Path) -> str:
    write_frames(path, data=None, shape=(1, 30_000, 30_000), chunks=(1, 30_000, 30_000), dtype=np.float32, compression="gzip")
    return HDF5_MIMETYPE


def huge_frame_without_data(path: Path) -> str:
    write_frames(path, data=None, shape=(1, 10**6, 10**6), chunks=(1, 1000, 1000), dtype=np.float64)
    return HDF5_MIMETYPE


def edf_that_claims_more_than_it_holds(path: Path) -> str:
    header = "{\nEDF_DataBlockID = 0.Image.Psd ;\nByteOrder = LowByteFirst ;\nDataType = SignedInteger ;\nDim_1 = 100000 ;\n"
    header += "Dim_2 = 100000 ;\nSize = 40000000000 ;\n"
    path.write_bytes(header.ljust(510).encode() + b"}\n" + b"\0" * 1000)
    return FABIO_MIMETYPE


def cbf_that_claims_more_than_it_holds(path: Path) -> str:
    header = (
        "###CBF: VERSION 1.5\r\n\r\ndata_x\r\n\r\n_array_data.data\r\n;\r\n--CIF-BINARY-FORMAT-SECTION--\r\n"
        'Content-Type: application/octet-stream;\r\n     conversions="x-CBF_BYTE_OFFSET"\r\nContent-Transfer-Encoding: BINARY\r\n'
        'X-Binary-Size: 1000\r\nX-Binary-ID: 1\r\nX-Binary-Element-Type: "signed 32-bit integer"\r\n'
        "X-Binary-Element-Byte-Order: LITTLE_ENDIAN\r\nX-Binary-Number-of-Elements: 10000000000\r\n"
        "X-Binary-Size-Fastest-Dimension: 100000\r\nX-Binary-Size-Second-Dimension: 100000\r\nX-Binary-Size-Padding: 0\r\n\r\n"
    )
    path.write_bytes(header.encode() + b"\x0c\x1a\x04\xd5" + b"\0" * 1000)
    return FABIO_MIMETYPE


def edf_that_inflates(path: Path) -> str:
    header = "{\nEDF_DataBlockID = 0.Image.Psd ;\nByteOrder = LowByteFirst ;\nDataType = SignedInteger ;\nDim_1 = 20000 ;\n"
    with gzip.open(path.with_suffix(".edf.gz"), "wb", compresslevel=1) as file:
        file.write((header + "Dim_2 = 60000 ;\nSize = 4800000000 ;\n").ljust(510).encode() + b"}\n")
        for _ in range(100):
            file.write(bytes(2**20))
    os.replace(path.with_suffix(".edf.gz"), path)
    return FABIO_MIMETYPE


CLAIMS = [
    claims_a_billion_frames,
    one_huge_chunk,
    huge_frame_without_data,
    edf_that_claims_more_than_it_holds,
    cbf_that_claims_more_than_it_holds,
    edf_that_inflates,
]
MEMORY = 2 * 2**30
"""Bytes that reading a file of a few kB may take at most, everything included that the process had before."""


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_that_claims_to_be_huge_takes_no_memory(claim, readable: Path, poni):
    suffix = {"edf_that_inflates": ".edf.gz", "edf_that_claims_more_than_it_holds": ".edf"}.get(claim.__name__, ".cbf")
    path = readable / f"{claim.__name__}{suffix}"
    mimetype = claim(path)
    before = peak()
    for adapter in ADAPTERS:
        refused(adapter, [asset(path.as_uri())], poni, frames={"mimetype": mimetype})
    if mimetype == FABIO_MIMETYPE:
        good = write_frames(readable / "good.h5").as_uri()
        refused(CurveAdapter, [asset(good), asset(path.as_uri(), MASK)], poni)
    assert peak() - before < MEMORY / 4


# -- results --


def write_rows(folder: Path, key: str, shape: tuple[int, int] = (2, 9), **options: Any) -> Path:
    path = folder / key / "rows-1"
    array = zarr.create_array(path, shape=shape, dtype=np.float64, overwrite=True, **{"chunks": (1, shape[1]), **options})
    if shape[0] < 10:
        array[:] = 1.0
    return path


def column(name: str, dims: tuple[str, ...] = ("exposure", "q"), shape: tuple[int, ...] = (4,), **more: Any) -> dict[str, Any]:
    return {"name": name, "dims": dims, "shape": shape, "dtype": "<f8", "attrs": {}, **more}


COLUMNS = [
    column("q", ("q",), coordinate=True),
    column("I"),
    column("status", ("exposure",), (), dtype="|u1", attrs={"flag_values": [1, 2], "flag_meanings": "ok failed"}),
]


def result(key: str, rows: str, columns: Any = COLUMNS, *, exposures: Any = 2, attrs: Any = None) -> Any:
    """Build the adapter of a result as Tiled does; returns the text of a refusal, or the adapter."""
    said = {"exposures": exposures, "attrs": {} if attrs is None else attrs}
    node = SimpleNamespace(key=key, specs=[], access_tags=[], metadata_=said)
    try:
        return ResultAdapter.from_catalog(SimpleNamespace(assets=[]), node, rows=rows, columns=columns)
    except HTTPException as error:
        if error.status_code != 422:
            raise
        return error.detail


def test_a_result_is_read_from_its_own_rows(readable: Path, outside: Path):
    mine, other = (write_rows(readable, key) for key in ("mine", "other"))
    assert result("mine", mine.as_uri())["I"].read().tolist() == [[1.0] * 4] * 2
    assert "its own rows" in result("mine", other.as_uri())
    (readable / "linked").mkdir()
    (readable / "linked" / "rows-1").symlink_to(write_rows(outside, "linked"))
    assert "may not read" in result("linked", (readable / "linked" / "rows-1").as_uri())
    for place in (write_rows(outside, "mine").as_uri(), "", "http://elsewhere/rows", None):
        assert isinstance(result("mine", place), str), place


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ("many", "list"),
        ([column("I"), column("I")], "twice"),
        ([column("I", dtype="<f1")], "dtype"),
        ([column("I", dtype="O")], "dtype"),
        ([column("I", ("q", "q"), (4, 4))], "dims and shape"),
        ([column("I", ("exposure", "q"), ())], "dims and shape"),
        ([column("I"), column("J", shape=(5,))], "two sizes"),
        ([column("I", shape=(-1,))], "greater than"),
        ([column("I", shape=(10**12,))], "less than"),
        ([column("I", shape=(10**6,)), *(column(str(n), shape=(10**6,)) for n in range(200))], "more than is served"),
        ([column("I", code="1/0")], "unexpected"),
        ([column("I", shape=(3,))], "are announced"),
    ],
)
def test_columns_that_make_no_sense_are_explained(columns: Any, text: str, readable: Path):
    assert text.lower() in result("columns", write_rows(readable, "columns").as_uri(), columns).lower()


@pytest.mark.parametrize("exposures", [-1, 10**9, True, "2", None, 2.0])
def test_exposures_that_cannot_be_are_explained(exposures: Any, readable: Path):
    assert "exposures" in result("count", write_rows(readable, "count").as_uri(), exposures=exposures)


def test_rows_that_are_broken_are_explained(readable: Path):
    place = write_rows(readable, "broken")
    assert "2 are stored" in result("broken", place.as_uri(), exposures=3)
    (chunk,) = [path for path in place.rglob("*") if path.is_file() and path.parent.name == "1"]
    chunk.write_bytes(b"no numbers")
    assert "cannot be read" in result("broken", place.as_uri())
    (place / "zarr.json").write_text("{")
    assert "cannot be read" in result("broken", place.as_uri())
    assert "attrs" in result("broken", place.as_uri(), attrs=[1])


def test_rows_that_claim_to_be_huge_take_no_memory(readable: Path):
    before = peak()
    wide = write_rows(readable, "wide", (20_000, 9), chunks=(20_000, 9))
    assert "are announced" in result("wide", wide.as_uri(), exposures=20_000)
    long = write_rows(readable, "long", (10**9, 9))
    assert isinstance(result("long", long.as_uri(), exposures=10**9), str)
    assert peak() - before < MEMORY / 4


def test_no_number_in_a_column_of_whole_numbers_is_none(readable: Path):
    place = write_rows(readable, "none")
    zarr.open_array(place)[0, 8] = np.nan
    assert result("none", place.as_uri())["status"].read().tolist() == [0, 1]


# -- the routes that this project adds --


def test_our_routes_answer_whatever_is_asked(make_client):
    """Those of the server's OpenAPI that Tiled does not bring: the validator of runs and the live page."""
    http = make_client(answer_errors=True).context.http_client
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").raise_for_status().json())
    ours = schema.include(path_regex=r"^/(custom|api/v1)/(validate|live)")
    asked = set()

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=ours.as_strategy())
    def ask(case: Any) -> None:
        body = case.body if isinstance(case.body, (dict, list, str, int, float, bool)) else None
        # Tiled itself breaks down over a key that is not ASCII, on every route.
        query = {name: value for name, value in (case.query or {}).items() if name != "api_key"}
        answer = http.request(case.method, case.formatted_path, params=query, json=body)
        asked.add(case.operation.label)
        assert answer.status_code < 500, (case.method, case.formatted_path, answer.text[:200])

    ask()
    assert {label.split("/")[2 if "custom" in label else 3] for label in asked} == {"validate", "live"}

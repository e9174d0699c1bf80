"""Curves, PSFs and frames are read through the server, from real files."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fabio.edfimage
import h5py
import numpy as np
import pyarrow
import pytest
import xarray as xr
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from tiled.client.utils import ClientError
from tiled.mimetypes import TILED_SQL_TABLE_MIMETYPE

from dsnet_bluesky import documents
from dsnet_bluesky.derived import register_curves
from dsnet_bluesky.frames import FABIO_MIMETYPE, HDF5_MIMETYPE
from dsnet_bluesky.ingest import ingest
from dsnet_bluesky.nodes import CURVE_MIMETYPE, PSF_MIMETYPE
from dsnet_bluesky.reduction import Reduction, centred, psf

DATASET = "/entry/data/data"


@pytest.fixture
def growing(detector_directory: Path):
    """An HDF5 file that a detector is still writing: append(frame) makes it longer."""
    path = detector_directory / "growing.h5"
    with h5py.File(path, "w", libver="latest") as file:
        dataset = file.create_dataset(
            DATASET, shape=(0, 120, 100), maxshape=(None, 120, 100), chunks=(1, 120, 100), dtype=np.int32
        )
        file.swmr_mode = True

        def append(frame: np.ndarray) -> Path:
            dataset.resize(len(dataset) + 1, axis=0)
            dataset[-1] = frame
            dataset.flush()
            return path

        yield append


def open_run(client: Any, uri: str, mimetype: str, parameters: dict, poni: dict, *, shape=(120, 100), purpose="sample", **state):
    """Write the documents of a run by hand; returns its uid and expose(), which tells that `number` more events are there."""
    writer = TiledWriter(client["raw"], batch_size=1)
    run = compose_run(metadata={"purpose": purpose})
    writer("start", dict(run.start_doc))
    key = {"source": "PV", "dtype": "array", "dtype_numpy": "<i4", "shape": list(shape), "external": "STREAM:"}
    values = {
        f"instrument-{k}": v for k, v in documents.Instrument(poni=poni, **state).to_configuration().items() if v is not None
    }
    kinds = {k: {"source": "PV", "dtype": "string" if isinstance(v, str) else "number", "shape": []} for k, v in values.items()}
    configuration = {"instrument": {"data": values, "timestamps": dict.fromkeys(values, 0.0), "data_keys": kinds}}
    stream = run.compose_descriptor(name="primary", data_keys={"det": key}, configuration=configuration)
    writer("descriptor", dict(stream.descriptor_doc))
    assert run.compose_stream_resource is not None
    resource = run.compose_stream_resource(mimetype=mimetype, uri=uri, data_key="det", parameters=parameters)
    writer("stream_resource", dict(resource.stream_resource_doc))
    count = 0

    def expose(number: int = 1) -> None:
        nonlocal count
        where = {"start": count, "stop": count + number}, {"start": count + 1, "stop": count + number + 1}
        writer("stream_datum", dict(resource.compose_stream_datum(*where, descriptor=stream.descriptor_doc)))
        count += number

    return run.start_doc["uid"], expose


def test_a_curve_is_the_reduction_of_its_frames(client, detector_directory, poni, sample_frames):
    with h5py.File(detector_directory / "three.h5", "w") as file:
        file[DATASET] = sample_frames
    state = {"exposure_time": 10.0, "monitor": 2.0, "transmission": 0.5}
    (uid,) = ingest([detector_directory / "three.h5"], client=client, purpose="sample", poni=poni, **state)
    expected = Reduction(poni)(sample_frames, time=10.0, monitor=2.0, transmission=0.5)
    read = client["curves"][uid].read()
    xr.testing.assert_equal(read, expected)
    assert {name: read[name].attrs for name in read.variables} == {name: expected[name].attrs for name in read.variables}


def test_a_psf_is_served_whole(client, write_edf, poni, beam_frame):
    (uid,) = ingest([write_edf("beam", beam_frame)], client=client, purpose="direct_beam", poni=poni)
    read, expected = client["psfs"][uid].read(), psf(beam_frame, poni)
    xr.testing.assert_equal(read, expected)
    assert centred(poni, read) == centred(poni, expected)


def test_curves_grow_with_the_file(client, growing, poni, sample_frames):
    path = growing(sample_frames[0])
    uid, expose = open_run(client, path.as_uri(), HDF5_MIMETYPE, {"dataset": DATASET, "chunk_shape": [1, 120, 100]}, poni)
    expose()
    register_curves(client, client["raw"][uid])
    node = client["curves"][uid]
    for number in (1, 2, 3):
        xr.testing.assert_equal(node.read(), Reduction(poni)(sample_frames[:number]))
        if number < 3:
            growing(sample_frames[number])


def test_a_curve_is_computed_once(client, write_edf, poni, sample_frames, monkeypatch):
    calls = []
    integrate = Reduction.__call__
    monkeypatch.setattr(Reduction, "__call__", lambda self, *args, **kwargs: calls.append(1) or integrate(self, *args, **kwargs))
    path = write_edf("once", sample_frames[0])
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: client["curves"][uid].read(), range(4)))
    assert len(calls) == 1
    write_edf("once", sample_frames[1])  # the same name, another content
    xr.testing.assert_equal(client["curves"][uid].read(), Reduction(poni)(sample_frames[1]))
    assert len(calls) == 3  # the one for the comparison is the third


def test_frames_of_one_event_are_summed(client, detector_directory, poni, sample_frames):
    stack = np.concatenate([sample_frames, sample_frames[:1]])
    stack[0, 5, 5] = -1
    with h5py.File(detector_directory / "pairs.h5", "w") as file:
        file[DATASET] = stack
    uri, parameters = (detector_directory / "pairs.h5").as_uri(), {"dataset": DATASET, "chunk_shape": [1, 120, 100]}
    uid, expose = open_run(client, uri, HDF5_MIMETYPE, parameters, poni, shape=(2, 120, 100), exposure_time=3.0)
    expose(2)
    register_curves(client, client["raw"][uid])
    sums = stack.reshape(2, 2, 120, 100).sum(axis=1)
    sums[0, 5, 5] = -1
    xr.testing.assert_allclose(client["curves"][uid].read(), Reduction(poni)(sums, time=6.0))


def test_a_mask_is_applied(client, detector_directory, write_edf, poni, sample_frames):
    mask = np.zeros((120, 100), dtype=bool)
    mask[:, :50] = True
    np.save(detector_directory / "mask.npy", mask)
    path = write_edf("masked", sample_frames[0])
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni, mask=detector_directory / "mask.npy")
    xr.testing.assert_equal(client["curves"][uid].read(), Reduction(poni, mask=mask)(sample_frames[0]))


@pytest.mark.parametrize("files", [1, 3])
def test_fabio_frames_are_arrays(client, detector_directory, poni, sample_frames, files: int):
    """A file with three frames, and three files with one each."""
    images = [fabio.edfimage.EdfImage(data=frame) for frame in sample_frames]
    if files == 1:
        for image in images[1:]:
            images[0].append_frame(data=image.data)
        images[0].write(str(detector_directory / "frame.edf"))
        uri, parameters = (detector_directory / "frame.edf").as_uri(), {"chunk_shape": [1, 120, 100]}
    else:
        for number, image in enumerate(images):
            image.write(str(detector_directory / f"part_{number:03d}.edf"))
        uri, parameters = detector_directory.as_uri() + "/", {"template": "part_%03d.edf", "chunk_shape": [1]}
    uid, expose = open_run(client, uri, FABIO_MIMETYPE, parameters, poni)
    expose(3)
    array = client["raw"][uid]["primary/det"]
    np.testing.assert_array_equal(array.read(), sample_frames)
    np.testing.assert_array_equal(array[1, 10:20, 5], sample_frames[1, 10:20, 5])
    np.testing.assert_array_equal(array.read_block((2, 0, 0)), sample_frames[2:])
    register_curves(client, client["raw"][uid])
    xr.testing.assert_equal(client["curves"][uid].read(), Reduction(poni)(sample_frames))


def test_files_that_a_run_gains_are_shown_after_registering_again(client, write_edf, detector_directory, poni, sample_frames):
    uri, parameters = detector_directory.as_uri() + "/", {"template": "frame_%d.edf", "chunk_shape": [1]}
    uid, expose = open_run(client, uri, FABIO_MIMETYPE, parameters, poni)
    for number in (0, 1):
        write_edf(f"frame_{number}", sample_frames[number])
        expose()
        register_curves(client, client["raw"][uid])
        assert client["curves"][uid].read().sizes["exposure"] == number + 1


def test_a_change_of_the_instrument_within_a_run_is_refused(client, growing, poni, sample_frames):
    path = growing(sample_frames[0])
    uid, expose = open_run(client, path.as_uri(), HDF5_MIMETYPE, {"dataset": DATASET}, poni)
    expose()
    stream = client["raw"][uid].base["primary"]
    changed = {
        "instrument": {"data": {**stream.metadata["configuration"]["instrument"]["data"], "instrument-exposure_time": 9.0}}
    }
    stream.update_metadata({"_config_updates": [{"uid": "x", "time": 0.0, "configuration": changed}]})
    with pytest.raises(ValueError, match="changed within the run"):
        register_curves(client, client["raw"][uid])


def damage(path: Path, how: str) -> None:
    """Spoil the frames of an HDF5 file after it was registered."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "gone":
        path.unlink()
    else:
        with h5py.File(path, "r+") as file:
            file[DATASET][:] = np.nan if how == "NaN" else -1


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("truncated", "truncated"),
        ("gone", "cannot see"),
        ("NaN", "100% of the unmasked pixels of exposure 0 are NaN"),
        ("masked", "are negative or saturated"),
    ],
)
def test_what_is_wrong_with_the_data_reaches_the_reader(client, detector_directory, poni, sample_frames, how: str, text: str):
    path = detector_directory / "bad.h5"
    with h5py.File(path, "w") as file:
        file[DATASET] = sample_frames.astype(float)
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni)
    damage(path, how)
    with pytest.raises(ClientError, match=text) as caught:
        client["curves"][uid].read()
    assert caught.value.response.status_code == 422
    assert uid in client["curves"].keys()  # noqa: SIM118 - listing still works


def test_a_beam_without_counts_is_explained(client, write_edf, poni, beam_frame):
    (uid,) = ingest([write_edf("faint", beam_frame // 1000)], client=client, purpose="direct_beam", poni=poni)
    with pytest.raises(ClientError, match="at least 10000 are needed"):
        client["psfs"][uid].read()


def test_a_frame_that_cannot_be_read_is_explained(client, write_edf, poni, sample_frames):
    path = write_edf("short", sample_frames[0])
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ClientError, match=r"short\.edf"):
        client["raw"][uid]["primary/image"].read()


def test_the_mask_must_be_readable_too(make_client, tmp_path, write_edf, poni, sample_frames):
    """Outside readable_storage: the server must not be led to read any file it is told."""
    client = make_client(answer_errors=True)
    np.save(tmp_path / "mask.npy", np.zeros((120, 100), dtype=bool))
    path = write_edf("masked", sample_frames[0])
    with pytest.raises(ValueError, match=r"mask\.npy.*--readable"):
        ingest([path], client=client, purpose="sample", poni=poni, mask=tmp_path / "mask.npy")
    assert not len(client["raw"])
    assert not len(client["curves"])


def test_adapters_are_found_by_the_names_in_the_configuration(client):
    names = {
        mimetype: cls.__name__
        for mount in ("raw", "curves", "psfs")
        for mimetype, cls in client.context.http_client.app.state.root_tree[mount].context.adapters_by_mimetype.maps[0].items()
    }
    assert names == {
        FABIO_MIMETYPE: "FabioAdapter",
        TILED_SQL_TABLE_MIMETYPE: "TableAdapter",
        CURVE_MIMETYPE: "CurveAdapter",
        PSF_MIMETYPE: "PSFAdapter",
    }


def test_rows_of_several_writers_wait_for_their_turn(served):
    """SQLite refuses a second writer at once; without waiting, Tiled answers 500."""
    client = served.client()
    schema = pyarrow.schema([("x", pyarrow.float64())])
    raw, keys = client["raw"], [str(uuid.uuid4()) for _ in range(4)]
    tables = [raw.create_appendable_table(schema, key=key) for key in keys]

    def write(table):
        for number in range(15):
            table.append_partition(0, pyarrow.table({"x": [float(number)]}))

    with ThreadPoolExecutor(len(tables)) as pool:
        for done in [pool.submit(write, table) for table in tables]:
            done.result()
    assert [len(table.read()) for table in tables] == [15] * 4
    raw.delete_contents(keys, external_only=False)  # others look for runs there

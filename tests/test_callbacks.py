"""Run documents to exposures, of every kind and from everywhere."""

import json

import h5py
import msgpack
import numpy as np
import pytest
from bluesky import RunEngine
from event_model import compose_run, pack_event_page
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky.callbacks.exposures import ExposureRouter, _Run, exposures_of_documents
from dsnet_bluesky.frames import read
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.sim import SaxsCamera, SimBeamline

SHAPE = (3, 5)
PONI = {"dist": 1.0, "poni1": 0.0, "poni2": 0.0, "detector": "Pilatus300k", "wavelength": 1.54e-10}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Documents of two runs of the simulated beamline: a direct beam, and a sample with three exposures."""
    engine = RunEngine({})
    beamline = SimBeamline(tmp_path_factory.mktemp("raw"), SaxsCamera(seed=1))
    instrument = Instrument(beamline.camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    docs = []
    engine.subscribe(lambda name, doc: docs.append((name, doc)))
    engine(ensure_connected(*beamline.devices))
    engine(direct_beam(beamline.detector, instrument=instrument, exposure_time=1.0))
    engine(expose(beamline.detector, sample="AgBh", instrument=instrument, exposures=3, exposure_time=1.0))
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    return docs


def files_of(folder, count, frames=1):
    """Write `count` HDF5 files; pixel values tell file and frame."""
    paths = [folder / f"old_{i}.h5" for i in range(count)]
    for i, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file["entry/data/data"] = 100 * i + np.arange(frames)[:, None, None] + np.zeros(SHAPE)
    return paths


def old_run(paths, *, frames_per_event=1, late_datum=False, purpose="sample"):
    """Documents as ophyd's area detectors write them: one file per event, resource and datum."""
    run = compose_run(metadata={"purpose": purpose, "sample": "old"})
    yield "start", run.start_doc
    key = {"source": "PV", "dtype": "array", "shape": [frames_per_event, *SHAPE], "external": "FILESTORE:"}
    data = {"data": {"det_poni": json.dumps(PONI)}, "timestamps": {"det_poni": 0.0}}
    data["data_keys"] = {"det_poni": {"source": "PV", "dtype": "string", "shape": []}}
    stream = run.compose_descriptor(name="primary", data_keys={"det_image": key}, configuration={"det": data})
    yield "descriptor", stream.descriptor_doc
    for path in paths:
        resource = run.compose_resource(
            spec="AD_HDF5",
            root="/",
            resource_path=str(path).lstrip("/"),
            resource_kwargs={"frame_per_point": frames_per_event} if frames_per_event > 1 else {},
        )
        yield "resource", resource.resource_doc
        datum = resource.compose_datum(datum_kwargs={"point_number": 0})
        event = stream.compose_event(
            data={"det_image": datum["datum_id"]}, timestamps={"det_image": 0.0}, filled={"det_image": False}
        )
        yield from [("event", event), ("datum", datum)] if late_datum else [("datum", datum), ("event", event)]
    yield "stop", run.compose_stop()


def test_each_exposure_appears_as_soon_as_it_is_complete(recorded):
    found, seen = [], []
    router = ExposureRouter(found.append)
    for name, doc in recorded:
        before = len(found)
        router(name, doc)
        if len(found) > before:
            seen.append(name)
    assert seen == ["stream_datum"] * 4
    assert [(e.start["purpose"], e.index) for e in found] == [("direct_beam", 0), ("sample", 0), ("sample", 1), ("sample", 2)]
    sample = found[2]
    assert (sample.stream, sample.data_key, sample.problem) == ("primary", "pilatus", None)
    assert sample.instrument.slit_width == 4e-3
    assert read(sample.frames).shape == (1, 619, 487)


def test_old_documents_appear_event_by_event_and_point_to_their_own_file(tmp_path):
    found, after = [], []
    router = ExposureRouter(found.append)
    for name, doc in old_run(files_of(tmp_path, 3)):
        router(name, doc)
        after.append((name, len(found)))
    assert [n for name, n in after if name == "event"] == [1, 2, 3]
    assert [read(e.frames)[0, 0, 0] for e in found] == [0, 100, 200]
    assert [e.index for e in found] == [0, 1, 2]
    assert found[0].instrument.poni == PONI


def test_old_documents_with_many_frames_in_an_event(tmp_path):
    (exposure,) = exposures_of_documents(old_run(files_of(tmp_path, 1, frames=4), frames_per_event=4))
    assert read(exposure.frames)[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_datum_after_its_event_is_not_lost(tmp_path):
    found = exposures_of_documents(old_run(files_of(tmp_path, 2), late_datum=True))
    assert [read(e.frames)[0, 0, 0] for e in found] == [0, 100]


def test_event_pages_serve_as_events_do(tmp_path):
    pages = [
        ("event_page", pack_event_page(doc)) if name == "event" else (name, doc) for name, doc in old_run(files_of(tmp_path, 2))
    ]
    assert [read(e.frames)[0, 0, 0] for e in exposures_of_documents(iter(pages))] == [0, 100]


def test_interleaved_runs_are_kept_apart(tmp_path, recorded):
    (tmp_path / "b").mkdir()
    runs = [
        list(old_run(files_of(tmp_path, 2))),
        list(old_run(files_of(tmp_path / "b", 2))),
        recorded[[name for name, _ in recorded].index("stop") + 1 :],
    ]
    found = []
    router = ExposureRouter(found.append)
    for step in range(max(map(len, runs))):
        for run in runs:
            if step < len(run):
                router(*run[step])
    for run in runs:
        uid = run[0][1]["uid"]
        assert [e.index for e in found if e.run_uid == uid] == list(range(3 if run is runs[2] else 2))


@pytest.mark.parametrize("codec", [(json.dumps, json.loads), (msgpack.packb, msgpack.unpackb)], ids=["json", "msgpack"])
def test_documents_may_have_travelled(recorded, codec):
    """As from a remote dispatcher (ZeroMQ, Kafka): plain values, tuples become lists."""
    pack, unpack = codec
    travelled = [(name, unpack(pack(doc))) for name, doc in recorded]
    assert [e.frames.uri for e in exposures_of_documents(iter(travelled))] == [
        e.frames.uri for e in exposures_of_documents(iter(recorded))
    ]


def test_run_without_geometry_says_so():
    run = compose_run(metadata={"purpose": "sample"})
    key = {"source": "PV", "dtype": "array", "shape": [1, *SHAPE], "external": "STREAM:"}
    stream = run.compose_descriptor(name="primary", data_keys={"det": key})
    resource = run.compose_stream_resource(
        mimetype="application/x-hdf5", uri="file://localhost/tmp/a.h5", data_key="det", parameters={"dataset": "d"}
    )
    datum = resource.compose_stream_datum({"start": 0, "stop": 2})
    docs = [
        ("start", run.start_doc),
        ("descriptor", stream.descriptor_doc),
        ("stream_resource", resource.stream_resource_doc),
        ("stream_datum", {**datum, "descriptor": stream.descriptor_doc["uid"], "seq_nums": {"start": 1, "stop": 3}}),
        ("stop", run.compose_stop()),
    ]
    found = exposures_of_documents(iter(docs))
    assert [(e.frames.start, e.frames.stop) for e in found] == [(0, 1), (1, 2)]
    assert all("no geometry" in e.problem for e in found)


@pytest.mark.parametrize(
    ("configuration", "parameters", "said"),
    [
        ({"odd": {"data": None}}, {"dataset": "d"}, "configuration cannot be understood"),
        ({"det": {"data": {"det_poni": json.dumps(PONI)}}}, {"template": "{", "chunk_shape": "?"}, "file cannot be understood"),
    ],
)
def test_strange_documents_are_exposures_with_a_problem(configuration, parameters, said):
    descriptor = {"uid": "d", "name": "primary", "run_start": "r", "time": 0.0, "configuration": configuration}
    docs = [
        ("start", {"uid": "r", "time": 0.0}),
        ("descriptor", {**descriptor, "data_keys": {"det": {"source": "", "dtype": "array", "shape": [1, *SHAPE]}}}),
        ("stream_resource", {"uid": "f", "run_start": "r", "mimetype": "application/x-hdf5", "uri": "file:///a.h5"}),
        ("stream_datum", {"uid": "f/0", "stream_resource": "f", "descriptor": "d", "indices": {"start": 0, "stop": 1}}),
    ]
    docs[2][1].update(data_key="det", parameters=parameters)
    (exposure,) = _raw_exposures(docs)
    assert said in exposure.problem


def _raw_exposures(docs):
    """Past the normaliser, which is stricter than some writers of documents."""
    run = _Run()
    [getattr(run, name)(doc) for name, doc in docs]
    return run.found


def test_what_is_no_image_is_no_exposure():
    run = compose_run(metadata={"purpose": "sample"})
    key = {"source": "PV", "dtype": "array", "shape": [1, 1024], "external": "STREAM:"}
    stream = run.compose_descriptor(name="primary", data_keys={"spectrum": key})
    resource = run.compose_stream_resource(
        mimetype="application/x-hdf5", uri="file://localhost/tmp/a.h5", data_key="spectrum", parameters={"dataset": "d"}
    )
    datum = resource.compose_stream_datum({"start": 0, "stop": 1})
    docs = [
        ("start", run.start_doc),
        ("descriptor", stream.descriptor_doc),
        ("stream_resource", resource.stream_resource_doc),
        ("stream_datum", {**datum, "descriptor": stream.descriptor_doc["uid"], "seq_nums": {"start": 1, "stop": 2}}),
    ]
    assert exposures_of_documents(iter(docs)) == []


def test_what_the_receiver_raises_reaches_the_caller(recorded):
    def fail(exposure):
        raise RuntimeError("no room")

    router = ExposureRouter(fail)
    with pytest.raises(RuntimeError, match="no room"):
        [router(name, doc) for name, doc in recorded]

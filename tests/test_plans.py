"""Plans under a real RunEngine: what they write into the documents."""

import json
from types import SimpleNamespace

import pytest
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from ophyd_async.core import soft_signal_rw
from ophyd_async.plan_stubs import ensure_connected

from dsnet_bluesky import documents
from dsnet_bluesky.plans import Instrument, desmearing_scan, direct_beam, expose
from dsnet_bluesky.sim import SaxsCamera, SimBeamline


@pytest.fixture(scope="module")
def camera():
    return SaxsCamera(seed=1)


@pytest.fixture
def engine():
    engine = RunEngine({}, call_returns_result=True)
    yield engine
    if engine.state not in ("idle", "panicked"):
        engine.halt()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()


@pytest.fixture
def beamline(engine, camera, tmp_path):
    beamline = SimBeamline(tmp_path, camera)
    engine(ensure_connected(*beamline.devices))
    return beamline


@pytest.fixture
def instrument(camera):
    return Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)


@pytest.fixture
def docs(engine):
    collected = []
    engine.subscribe(lambda name, doc: collected.append((name, doc)))
    return collected


def of(docs, wanted):
    return [doc for name, doc in docs if name == wanted]


def test_direct_beam_says_what_it_is_and_returns_its_uid(engine, beamline, instrument, docs):
    result = engine(direct_beam(beamline.detector, instrument=instrument, exposure_time=10.0, md={"operator": "Ada"}))
    (start,) = of(docs, "start")
    assert (start["purpose"], start["plan_name"], start["operator"]) == ("direct_beam", "direct_beam", "Ada")
    assert result.plan_result == start["uid"]
    assert of(docs, "stop")[0]["exit_status"] == "success"


def test_instrument_lands_in_the_descriptors_configuration(engine, beamline, instrument, docs, camera, tmp_path):
    mask = tmp_path / "mask.npy"
    engine(bps.configure(instrument, mask=mask, transmission=0.7))
    engine(expose(beamline.detector, sample="AgBh", instrument=instrument, exposure_time=60.0))
    (descriptor,) = of(docs, "descriptor")
    state = documents.Instrument.from_configuration(descriptor["configuration"])
    assert dict(state.poni) == json.loads(json.dumps(camera.poni))
    assert (state.slit_width, state.slit_height, state.exposure_time, state.transmission) == (4e-3, 2.5e-3, 60.0, 0.7)
    assert state.mask == mask.as_uri()
    assert "instrument-poni" not in descriptor["data_keys"], "configuration is not read at every exposure"


def test_the_beamstops_mask_is_not_that_of_the_direct_beam(engine, beamline, instrument, docs, tmp_path):
    engine(bps.configure(instrument, mask=tmp_path / "beamstop.npy"))
    engine(direct_beam(beamline.detector, instrument=instrument, exposure_time=1.0))
    engine(direct_beam(beamline.detector, instrument=instrument, exposure_time=1.0, mask=tmp_path / "hot.npy"))
    engine(expose(beamline.detector, sample="AgBh", instrument=instrument, exposure_time=1.0))
    masks = [documents.Instrument.from_configuration(d["configuration"]).mask for d in of(docs, "descriptor")]
    assert masks == [None, (tmp_path / "hot.npy").as_uri(), (tmp_path / "beamstop.npy").as_uri()]


def test_exposure_time_reaches_the_detector(engine, beamline, instrument, docs):
    engine(expose(beamline.detector, sample="AgBh", instrument=instrument, exposure_time=17.0))
    assert beamline.detector._trigger_logic.source.time == 17.0


def test_exposures_and_positions_multiply_in_one_run(engine, beamline, instrument, docs):
    engine(
        expose(
            beamline.detector,
            sample={"name": "silica", "concentration": 1.0},
            instrument=instrument,
            exposures=2,
            motor=beamline.changer.x,
            positions=[-0.5, 0.0, 0.5],
            direct_beam_uid="abc",
            exposure_time=1.0,
        )
    )
    (start,) = of(docs, "start")
    assert start["sample"] == {"name": "silica", "concentration": 1.0}
    assert start["direct_beam_uid"] == "abc"
    assert [event["data"]["changer-x"] for event in of(docs, "event")] == [-0.5, -0.5, 0.0, 0.0, 0.5, 0.5]
    assert sum(d["indices"]["stop"] - d["indices"]["start"] for d in of(docs, "stream_datum")) == 6


def test_scan_exposes_the_direct_beam_first_and_ties_the_samples_to_it(engine, beamline, instrument, docs):
    def attenuate():
        yield from bps.mv(beamline.attenuator.factor, 5000.0, beamline.beamstop.radius, 0.0)
        yield from bps.configure(instrument, attenuation=5000.0)

    def block():
        yield from bps.mv(beamline.attenuator.factor, 1.0, beamline.beamstop.radius, 2.8e-3)
        yield from bps.configure(instrument, attenuation=1.0)

    uids = engine(
        desmearing_scan(
            beamline.detector,
            changer=beamline.changer.sample,
            samples={"AgBh": "AgBh", "spheres of 8 nm": "sphere"},
            empty="",
            instrument=instrument,
            exposure_time=60.0,
            direct_beam_time=10.0,
            before_direct_beam=attenuate,
            before_samples=block,
            exposures=2,
            readables=[beamline.attenuator, beamline.changer],
        )
    ).plan_result
    starts, descriptors = of(docs, "start"), of(docs, "descriptor")
    assert [start["purpose"] for start in starts] == ["direct_beam", "sample", "sample"]
    assert uids.direct_beam == starts[0]["uid"]
    assert uids.samples == {start["sample"]: start["uid"] for start in starts[1:]}
    assert {start["direct_beam_uid"] for start in starts[1:]} == {uids.direct_beam}
    states = [documents.Instrument.from_configuration(d["configuration"]) for d in descriptors]
    assert [(s.attenuation, s.exposure_time) for s in states] == [(5000.0, 10.0), (1.0, 60.0), (1.0, 60.0)]
    assert [d["configuration"]["changer"]["data"]["changer-sample"] for d in descriptors] == ["", "AgBh", "sphere"]


def test_area_detector_of_ophyd_gets_its_exposure_time_through_the_cam(engine, beamline, instrument, docs):
    """Only the way to the exposure time differs; the rest is bluesky's own protocol."""
    acquire_time = soft_signal_rw(float, 0.0, name="cam-acquire_time")
    engine(ensure_connected(acquire_time))

    class AreaDetector:
        name, parent = "area", None
        cam = SimpleNamespace(acquire_time=acquire_time)

        def read(self):
            return {"area-total": {"value": 1.0, "timestamp": 0.0}}

        def describe(self):
            return {"area-total": {"source": "test", "dtype": "number", "shape": []}}

    engine(expose(AreaDetector(), sample="AgBh", instrument=instrument, exposure_time=3.0))
    assert of(docs, "stop")[0]["exit_status"] == "success"
    assert engine(bps.rd(acquire_time)).plan_result == 3.0


def test_detector_without_exposure_time_is_told_what_to_do(engine, instrument):
    class Bare:
        name, parent = "bare", None

        def read(self):
            return {}

        def describe(self):
            return {}

    with pytest.raises(ValueError, match="leave exposure_time out"):
        engine(expose(Bare(), sample="AgBh", instrument=instrument, exposure_time=3.0))


def test_motor_needs_positions(engine, beamline, instrument):
    with pytest.raises(ValueError, match="both motor and positions"):
        engine(expose(beamline.detector, sample="AgBh", instrument=instrument, motor=beamline.changer.x))


def test_instrument_reads_a_poni_file(camera, tmp_path):
    import pyFAI

    pyFAI.load(camera.poni).save(str(tmp_path / "saxs.poni"))
    state = Instrument(tmp_path / "saxs.poni").state
    assert state.poni["dist"] == camera.distance
    assert state.poni["wavelength"] == camera.wavelength


def test_instrument_refuses_what_it_does_not_know(instrument):
    with pytest.raises(ValueError, match="no slit_widht"):
        instrument.configure(slit_widht=1.0)


def test_purpose_must_be_known(engine, beamline, instrument):
    with pytest.raises(ValueError, match="unknown"):
        engine(expose(beamline.detector, sample="AgBh", instrument=instrument, purpose="flat"))

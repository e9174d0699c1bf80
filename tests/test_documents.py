"""Identity, provenance and pairing."""

import json

import pytest

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Instrument, change_within, mismatch, purpose, result_key, result_metadata, start_metadata

PONI = {"dist": 1.0, "wavelength": 1.54e-10, "detector": "Pilatus300k"}
START = {
    "uid": "raw-1",
    "time": 1.0,
    "scan_id": 7,
    "sample": "AgBh",
    "proposal_id": "p1",
    "plan_name": "expose",
    "purpose": "sample",
}


def test_an_instrument_survives_its_configuration():
    instrument = Instrument(
        poni=PONI, mask="file:///m.edf", slit_width=4e-3, slit_height=2.5e-3, exposure_time=60, attenuation=1e-3
    )
    data = {f"instrument-{name}": value for name, value in instrument.to_configuration().items() if value is not None}
    assert Instrument.from_configuration({"instrument": {"data": data}}) == instrument


def test_the_plans_instrument_outweighs_a_detectors_own_geometry():
    configuration = {
        "instrument": {"data": {"instrument-poni": json.dumps(PONI)}},
        "saxs": {"data": {"saxs_poni": json.dumps({**PONI, "dist": 9.0}), "saxs_exposure_time": 3.0}},
    }
    instrument = Instrument.from_configuration(configuration)
    assert instrument.poni["dist"] == 1.0
    assert instrument.exposure_time == 3.0


@pytest.mark.parametrize(("data", "message"), [({}, "no geometry"), ({"det-poni": "{"}, "not JSON")])
def test_missing_geometry_is_named(data: dict, message: str):
    with pytest.raises(BadInput, match=message):
        Instrument.from_configuration({"det": {"data": data}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"poni": {**PONI, "dist": 1.01}}, "distances differ"),
        ({"poni": {**PONI, "wavelength": 1.0e-10}}, "wavelengths differ"),
        ({"poni": {**PONI, "detector": "Eiger4M"}}, "detectors differ"),
        ({"slit_width": 2.5e-3}, "slit_width"),
        ({"slit_width": None}, None),
        ({"attenuation": 1e-4, "exposure_time": 5.0}, None),
        ({"poni": {**PONI, "poni1": 0.1}}, None),
    ],
)
def test_pairing(change: dict, reason: str | None):
    sample = Instrument(poni=PONI, slit_width=4e-3, slit_height=2.5e-3)
    other = Instrument(**{"poni": PONI, "slit_width": 4e-3, "slit_height": 2.5e-3, **change})
    found = mismatch(sample, other)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_other_devices_do_not_get_in_the_way():
    other = {"det-beam_monitor": "on", "det-pixel_mask": True, "det-slit_width": [1, 2], "det_transmission": "0.5"}
    ours = {"instrument-poni": json.dumps(PONI), "instrument-monitor": 3}
    instrument = Instrument.from_configuration({"det": {"data": other}, "instrument": {"data": ours}})
    assert instrument == Instrument(poni=PONI, monitor=3.0, transmission=0.5)


@pytest.mark.parametrize(
    "wrong", [{"instrument-monitor": "on"}, {"instrument-mask": True}, {"instrument-slit_width": float("nan")}]
)
def test_what_the_instrument_itself_records_must_be_right(wrong: dict):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Instrument.from_configuration({"instrument": {"data": {"instrument-poni": json.dumps(PONI), **wrong}}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exposure_time": 5.0, "monitor": 2.0, "transmission": 0.5, "attenuation": 1e-4}, None),
        ({"slit_width": 0.8e-3}, "slit_width 4.000 mm -> 0.800 mm"),
        ({"slit_width": None}, "slit_width 4.000 mm -> unknown"),
        ({"wavelength_spread": 0.1}, "wavelength_spread 0.000 -> 0.100"),
        ({"mask": "file:///m.npy"}, "mask None -> file:///m.npy"),
        ({"poni": {**PONI, "dist": 2.0}}, "poni dist 1.0 -> 2.0"),
    ],
)
def test_changes_within_a_run(change: dict, said: str | None):
    assert (
        change_within(Instrument(poni=PONI, slit_width=4e-3), Instrument(**{"poni": PONI, "slit_width": 4e-3, **change})) == said
    )


def test_identity():
    key = result_key("raw", "beam", "config", "")
    assert key == result_key("raw", "beam", "config", "")
    others = [
        ("raw2", "beam", "config", ""),
        ("raw", None, "config", ""),
        ("raw", "beam", "c2", ""),
        ("raw", "beam", "config", "model"),
    ]
    assert len({key, *(result_key(*other) for other in others)}) == 5
    # a stored catalog relies on this very value
    assert key == "0bc46790-7609-5db7-8f8d-0eaa296a6ee9"


def test_metadata_says_where_a_result_comes_from():
    metadata = result_metadata(START, direct_beam_uid="beam-1", config={"method": "map"}, config_sha256="c", method="map")
    assert metadata["parent_node_map"] == {"sample": "raw-1", "direct_beam": "beam-1"}
    assert metadata["sample"] == "AgBh"
    assert metadata["proposal_id"] == "p1"
    assert metadata["original_scan_id"] == 7
    assert metadata["analysis_stage"] == "desmear"
    assert metadata["versions"]["pyFAI"]
    assert json.loads(json.dumps(metadata)) == metadata


def test_start_metadata():
    assert start_metadata("sample", sample="AgBh", operator="me") == {"purpose": "sample", "sample": "AgBh", "operator": "me"}
    assert purpose({"purpose": "direct_beam"}) == "direct_beam"
    assert purpose({"purpose": "lunch"}) is None
    assert purpose({}) is None
    with pytest.raises(BadInput, match="direct_beam, sample, blank, dark"):
        start_metadata("lunch")


@pytest.mark.parametrize(("version", "order"), [("2.0.0", 2_000_000_999), ("", None), ("of-my-own", None)])
def test_a_model_may_be_called_anything(version, order):
    start = {"uid": "u", "time": 0.0}
    said = result_metadata(
        start, direct_beam_uid=None, config={}, config_sha256="", method="dsnet", model_name="dsnet", model_version=version
    )
    assert (said["model_version"], said["model_order"]) == (version, order)

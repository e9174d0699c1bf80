"""The demonstration as a user runs it, and the closure of the chain through the catalog."""

import io
import json

import numpy as np
import pytest
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from rich.console import Console
from tiled.queries import Key

from dsnet_bluesky.data import BadInput, Flag
from dsnet_bluesky.demo import desmearing as demo
from dsnet_bluesky.demo import run as run_experiment
from dsnet_bluesky.demo.session import result_of
from dsnet_bluesky.derived import register_curves, register_psf
from dsnet_bluesky.kinds import DESMEARED
from dsnet_bluesky.plans import Instrument, desmearing_scan
from dsnet_bluesky.reduction import Reduction
from dsnet_bluesky.replay import replay
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import PAPER_SLITS, SaxsCamera, Setting, SilverBehenate, SimBeamline


@pytest.mark.system
@pytest.mark.slow
def test_demo_desmears_live_and_comes_closer_to_the_truth(tmp_path):
    output = io.StringIO()
    outcome = demo.run(tmp_path, quick=True, console=Console(file=output, width=120))
    assert outcome.failed == 0
    assert list(outcome.table) == ["4.0 x 2.5 mm", "0.8 x 0.5 mm"]
    for row in outcome.table.values():
        assert row.desmeared_to_truth < row.measured_to_truth / 4
    assert outcome.table["4.0 x 2.5 mm"].desmeared_to_narrowest < outcome.table["4.0 x 2.5 mm"].measured_to_narrowest / 4
    assert outcome.spheres[1] < outcome.spheres[0] / 2
    for figure in outcome.figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 20_000
    text = output.getvalue()
    assert "0.8 x 0.5 mm" in text
    assert f"dsnet-bluesky serve --directory {tmp_path / 'data'}" in text
    assert "from_uri(" in text
    _check_replay(tmp_path / "data")


def _check_replay(data):
    """Live and replay are one pipeline: what the demonstration desmeared is there, and would come out the same."""
    with Server(data, timeout=200) as server:
        client = server.client()
        runs = len(client["raw"].search(Key("purpose") == "sample"))
        before = {key: node.metadata["updated"] for key, node in client["desmeared"].items()}
        summary = replay(client, model="dsnet", workers=0)
        assert (summary.to_do, summary.before) == (0, runs)
        checked = replay(client, model="dsnet", workers=0, verify=True)
        assert (checked.same, checked.different) == (runs, {})
        assert {key: node.metadata["updated"] for key, node in client["desmeared"].items()} == before


def test_closure_through_the_catalog(RE, client, detector_directory):
    """Raw frames written by a plan, read back as the served curve and the served PSF: the smeared truth fits."""
    slits, beamstop, camera = PAPER_SLITS[0], 2.8e-3, SaxsCamera(seed=7)
    masks = {name: detector_directory / f"closure-{name}.npy" for name in ("beam", "sample")}
    np.save(masks["beam"], camera.mask())
    np.save(masks["sample"], camera.mask(beamstop))
    line = SimBeamline(detector_directory, camera)
    instrument = Instrument(camera.poni, slit_width=slits.width, slit_height=slits.height, monitor=slits.flux)

    def stand(radius, attenuation, mask):
        yield from bps.mv(line.beamstop.radius, radius, line.attenuator.factor, attenuation)
        yield from bps.configure(instrument, mask=masks[mask], attenuation=attenuation)

    RE(ensure_connected(*line.devices))
    RE.subscribe(TiledWriter(client["raw"], batch_size=1))
    beam, sample = RE(
        desmearing_scan(
            line.detector,
            changer=line.changer.sample,
            samples={"AgBh": "AgBh"},
            empty="",
            instrument=instrument,
            exposure_time=slits.time,
            before_direct_beam=lambda: stand(0.0, 5000.0, "beam"),
            before_samples=lambda: stand(beamstop, 1.0, "sample"),
        )
    )
    register_curves(client, client["raw"][sample])
    register_psf(client, client["raw"][beam])
    curve, psf = client["curves"][sample].read(), client["psfs"][beam].read()
    assert float(psf["counts"]) >= 1e5
    state = client["raw"][sample].base["primary"].metadata["configuration"]["instrument"]["data"]
    poni = json.loads(state["instrument-poni"])
    smearing = Reduction(poni, mask=np.load(masks["sample"])).smearing(psf)
    np.testing.assert_allclose(smearing.q, curve["q"])
    truth = camera.truth(Setting(SilverBehenate(), slits.width, slits.height), smearing.q_calc)
    assert 0.8 < chi2(curve, smearing.apply(truth)) < 1.3


def chi2(curve, model):
    """Per point, with free scale and flat background."""
    I, Idev = curve["I"].values[0], curve["Idev"].values[0]
    columns = np.stack([model, np.ones_like(model)], axis=1) / Idev[:, None]
    return np.mean((columns @ np.linalg.lstsq(columns, I / Idev, rcond=None)[0] - I / Idev) ** 2)


def test_distances_see_only_the_form():
    q = np.linspace(0.1, 3, 200)
    form = np.exp(-q)
    results = {
        "wide": xr.Dataset({"I": ("q", 5 * form), "I_smeared": ("q", 5 * (form + 0.1))}, coords={"q": q}),
        "narrow": xr.Dataset({"I": ("q", form), "I_smeared": ("q", 2 * form)}, coords={"q": q}),
    }
    table = demo.distances(results, {name: lambda q: 7 * np.exp(-q) for name in results})
    assert table["wide"].measured_to_truth > 1e-3
    assert table["wide"].desmeared_to_truth == pytest.approx(0, abs=1e-6)
    assert table["wide"].desmeared_to_narrowest == pytest.approx(0, abs=1e-9)
    assert table["narrow"].measured_to_narrowest == 0


def test_result_that_failed_is_named_by_its_reason(client, store_raw_run):
    from dsnet_bluesky.derived import ResultWriter
    from dsnet_bluesky.documents import result_metadata

    start = {"uid": "a-run", "time": 0.0}
    metadata = result_metadata(start, direct_beam_uid=None, config={}, config_sha256="", method="map")
    store_raw_run(client, "a-run")
    ResultWriter.create(client, "demo-failed", metadata).fail("no direct beam")
    with pytest.raises(RuntimeError, match="no direct beam"):
        result_of(client, "a-run", DESMEARED)


@pytest.mark.system
@pytest.mark.slow
def test_single_shots_are_read_live(tmp_path):
    output = io.StringIO()
    outcome = run_experiment("icosahedra", tmp_path, quick=True, console=Console(file=output, width=140))
    assert outcome.failed == 0
    assert outcome.result.sizes["exposure"] == 5
    flagged = (outcome.result["flags"].values & int(Flag.POOR_FIT)) > 0
    assert flagged.tolist() == outcome.spheres.tolist()
    away = np.abs(outcome.result["radius"].values - outcome.radii)[~outcome.spheres]
    assert away.max() < 8
    assert np.nanmax(outcome.misorientation) < 8
    for figure in outcome.figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 20_000
    text = output.getvalue()
    assert "misorientation" in text
    assert 'client["analysed"]' in text


@pytest.mark.system
@pytest.mark.slow
def test_weak_patterns_are_denoised_live(tmp_path):
    output = io.StringIO()
    outcome = run_experiment("anisotropic", tmp_path, quick=True, console=Console(file=output, width=140))
    assert outcome.failed == 0
    assert (outcome.result["status"] == "ok").all()
    assert outcome.error[1] < outcome.error[0] / 30
    assert outcome.turned[1] < outcome.turned[0]
    assert outcome.sector[1] < outcome.sector[0] / 2
    for figure in outcome.figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 20_000
    text = output.getvalue()
    assert "degrees raw" in text
    assert 'client["analysed"]' in text


def test_unknown_experiments_are_named():
    with pytest.raises(BadInput, match="no experiment 'gold'; take desmearing, anisotropic, icosahedra"):
        run_experiment("gold")

"""The special clients: what a notebook does with a result."""

import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiled.client.xarray import DatasetClient

from dsnet_bluesky.curvefiles import read_curve
from dsnet_bluesky.data import BadInput, describe
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.ingest import ingest
from dsnet_bluesky.queries import CurveClient, DesmearedClient, PSFClient


def result(q: np.ndarray) -> xr.Dataset:
    values = np.exp(-q)[None]
    names = ("I", "I_smeared", "I_resmeared", "Idev", "Idev_smeared")
    variables = {name: (("exposure", "q"), values * (0.01 if "dev" in name else 1), {"units": "1"}) for name in names}
    variables |= {
        "Qdev": (("exposure", "q"), np.full_like(values, 0.01), {"units": "1/nm"}),
        "chi2": ("exposure", [1.1]),
        "flags": ("exposure", np.array([0])),
        "status": ("exposure", ["ok"]),
    }
    return describe(xr.Dataset(variables, {"q": ("q", q, {"units": "1/nm"})}, {"method": "map", "options": "{}"}))


@pytest.fixture(scope="module")
def stored(client, detector_directory, beam_and_sample) -> tuple[str, str, str]:
    """Key of a complete result, and the uids of its runs."""
    beam, sample = beam_and_sample
    start = client["raw"][sample].metadata["start"]
    metadata = result_metadata(start, direct_beam_uid=beam, config={}, config_sha256="0" * 64, method="map")
    writer = ResultWriter.create(client, key := str(uuid.uuid4()), metadata)
    writer.append(result(np.linspace(0.1, 3, 50)))
    writer.complete()
    return key, beam, sample


@pytest.fixture(scope="module")
def beam_and_sample(client, detector_directory) -> tuple[str, str]:
    import fabio.edfimage

    pixel = 1e-3
    shape = (60, 50)
    poni = {"dist": 0.8, "poni1": 30 * pixel, "poni2": 25 * pixel, "wavelength": 1.54e-10, "detector": "Detector"}
    poni["detector_config"] = {"pixel1": pixel, "pixel2": pixel, "max_shape": list(shape), "orientation": 3}
    beam = np.zeros(shape, dtype=np.int32)
    beam[29:31, 24:26] = 10_000
    uids: list[str] = []
    for name, frame, purpose in (("q_beam", beam, "direct_beam"), ("q_sample", np.full(shape, 100, np.int32), "sample")):
        path = detector_directory / f"{name}.edf"
        fabio.edfimage.EdfImage(data=frame).write(str(path))
        link = {"sample": "latex", "direct_beam": uids[0]} if uids else {}
        uids += ingest([path], client=client, purpose=purpose, poni=poni, **link)
    return uids[0], uids[1]


def test_tiled_finds_the_clients(client, stored):
    key, beam, sample = stored
    assert type(client["desmeared"][key]) is DesmearedClient
    assert type(client["curves"][sample]) is CurveClient
    assert type(client["psfs"][beam]) is PSFClient


def test_a_result_knows_where_it_comes_from(client, stored):
    key, beam, sample = stored
    node = client["desmeared"][key]
    assert node.raw.metadata["start"]["uid"] == sample
    assert node.direct_beam.metadata["start"]["uid"] == beam
    assert node.curves.item["id"] == node.curves.raw.metadata["start"]["uid"] == sample
    assert node.psf.read().attrs["distance"] == 0.8
    assert (node.status, node.reason) == ("complete", None)
    assert repr(node) == "<DesmearedClient 'latex' by map: complete, 1 exposures>"


def test_a_result_plots(client, stored):
    figure = client["desmeared"][stored[0]].plot()
    assert figure.axes[0].lines


def test_a_result_is_exported(client, stored, tmp_path: Path):
    path = client["desmeared"][stored[0]].to_nxcansas(tmp_path / "out.h5")
    assert path == tmp_path / "out.h5"
    np.testing.assert_allclose(read_curve(path, entry=1).q, np.linspace(0.1, 3, 50))


def test_what_failed_says_so_instead_of_plotting(client, stored, store_raw_run, tmp_path: Path):
    store_raw_run(client, uid := str(uuid.uuid4()))
    metadata = {**client["desmeared"][stored[0]].metadata, "raw_uid": uid, "direct_beam_uid": None}
    ResultWriter.create(client, key := str(uuid.uuid4()), metadata).fail("too few counts")
    node = client["desmeared"][key]
    assert node.direct_beam is node.psf is None
    assert repr(node).endswith("failed, 0 exposures, 'too few counts'>")
    with pytest.raises(BadInput, match="holds no exposure: too few counts"):
        node.plot()
    with pytest.raises(BadInput, match="failed, there is nothing to export: too few counts"):
        node.to_nxcansas(tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_some_variables_are_read_alone(client, stored):
    assert set(client["desmeared"][stored[0]].read(["I", "q"]).variables) == {"I", "q"}


def test_an_exposure_on_its_way_is_left_out(client, stored, store_raw_run):
    """Its row is made before it is filled."""
    start = {"uid": str(uuid.uuid4()), "time": 0.0}
    store_raw_run(client, start["uid"])
    metadata = result_metadata(start, direct_beam_uid=None, config={}, config_sha256="0" * 64, method="map")
    writer = ResultWriter.create(client, key := str(uuid.uuid4()), metadata)
    writer.append(result(np.linspace(0.1, 3, 50)))
    node = client["desmeared"][key]
    rows = node[node.metadata["rows"]]
    rows.patch(np.zeros((1, rows.shape[1])), offset=(1,), extend=True)
    assert client["desmeared"][key].read().sizes["exposure"] == 1
    assert DatasetClient(node.context, item=node.item, structure_clients=node.structure_clients).read().sizes["exposure"] == 1


HEAVY = """
import sys
import dsnet_bluesky.queries
print([name for name in ("torch", "pyFAI", "fabio", "matplotlib", "bluesky") if name in sys.modules])
"""


def test_the_clients_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HEAVY], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

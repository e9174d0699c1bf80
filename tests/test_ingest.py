"""Detector files become runs where they lie; what cannot be used leaves nothing behind."""

from pathlib import Path
from typing import Any

import fabio.cbfimage
import fabio.tifimage
import h5py
import numpy as np
import pytest

from dsnet_bluesky.callbacks.exposures import exposures_of_documents
from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import Instrument
from dsnet_bluesky.frames import path_of, read
from dsnet_bluesky.ingest import ingest


def write(path: Path, frames: np.ndarray) -> Path:
    """Write frames in the format that the suffix says."""
    if path.suffix in (".h5", ".nxs"):
        with h5py.File(path, "w") as file:
            file["entry/instrument/detector/data"] = frames
    else:
        image = {".cbf": fabio.cbfimage.CbfImage, ".tif": fabio.tifimage.TifImage}[path.suffix]
        image(data=frames[0]).write(str(path))
    return path


@pytest.mark.parametrize(("suffix", "number"), [("cbf", 1), ("tif", 1), ("h5", 3)])
def test_a_file_becomes_a_run(client, detector_directory, poni_file, sample_frames, suffix: str, number: int):
    path = write(detector_directory / f"with space.{suffix}", sample_frames)
    before, content = path.stat().st_mtime, path.read_bytes()
    (uid,) = ingest([path], client=client, purpose="sample", sample="latex", poni=poni_file, exposure_time=5.0, slit_width=4e-3)
    run = client["raw"][uid]
    np.testing.assert_array_equal(run["primary/image"].read(), sample_frames[:number])
    assert path_of(run["primary/image"].data_sources()[0].assets[0].data_uri) == path
    assert (path.stat().st_mtime, path.read_bytes()) == (before, content)
    start = run.metadata["start"]
    assert (start["purpose"], start["sample"], start["plan_name"], start["time"]) == (
        "sample",
        "latex",
        "ingest",
        before,
    )
    assert run.metadata["stop"]["exit_status"] == "success"
    assert client["curves"][uid].read().sizes["exposure"] == number


def test_ingested_runs_replay_as_exposures(client, detector_directory, poni, poni_file, sample_frames):
    """What a callback sees of an ingested run, and what the catalog gives back, is what was put in."""
    path = write(detector_directory / "replay.h5", sample_frames)
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni_file, exposure_time=5.0, attenuation=2.0)
    exposures = exposures_of_documents(client["raw"][uid].documents())
    assert [exposure.index for exposure in exposures] == [0, 1, 2]
    assert [exposure.problem for exposure in exposures] == [None] * 3
    np.testing.assert_array_equal(read(exposures[1].frames)[0], sample_frames[1])
    instrument = exposures[0].instrument
    assert isinstance(instrument, Instrument)
    assert (instrument.exposure_time, instrument.attenuation) == (5.0, 2.0)
    assert {key: instrument.poni[key] for key in ("dist", "wavelength", "poni1")} == pytest.approx(
        {key: poni[key] for key in ("dist", "wavelength", "poni1")}
    )


def test_a_sample_is_tied_to_its_direct_beam(client, write_edf, poni_file, beam_frame, sample_frames):
    common: dict[str, Any] = {"client": client, "poni": poni_file}
    (beam,) = ingest([write_edf("tied_beam", beam_frame)], purpose="direct_beam", **common)
    paths = [write_edf(f"tied_{i}", frame) for i, frame in enumerate(sample_frames[:2])]
    uids = ingest(paths, purpose="sample", direct_beam=beam[:8], **common)
    assert len(set(uids)) == 2
    assert {client["raw"][uid].metadata["start"]["direct_beam_uid"] for uid in uids} == {beam}
    assert beam in client["psfs"].keys()  # noqa: SIM118 - a request, not a dict
    for uid in ("no-such-run", "x", uids[0]):
        with pytest.raises(BadInput, match=r"holds no run|is no direct beam"):
            ingest(paths[:1], purpose="sample", direct_beam=uid, **common)


def test_frames_are_found_in_nexus_files(client, detector_directory, poni_file, sample_frames):
    path = detector_directory / "default.nxs"
    with h5py.File(path, "w") as file:
        file.attrs["default"] = "entry"
        entry = file.create_group("entry")
        entry.attrs["default"] = "plot"
        plot = entry.create_group("plot")
        plot.attrs["signal"] = "counts"
        plot["counts"] = sample_frames
        entry["flat"] = np.ones((120, 100))
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni_file)
    np.testing.assert_array_equal(client["raw"][uid]["primary/image"].read(), sample_frames)
    with h5py.File(path, "r+") as file:
        del file.attrs["default"]
    with pytest.raises(BadInput, match=r"several datasets.*/entry/flat, /entry/plot/counts"):
        ingest([path], client=client, purpose="sample", poni=poni_file)
    (uid,) = ingest([path], client=client, purpose="sample", poni=poni_file, dataset="/entry/flat")
    assert client["curves"][uid].read().sizes["exposure"] == 1


@pytest.fixture
def bad_files(detector_directory: Path, sample_frames: np.ndarray) -> dict[str, Path]:
    """A file for each thing that can be wrong with one."""
    cut = write(detector_directory / "cut.h5", sample_frames)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    cut_image = write(detector_directory / "cut.cbf", sample_frames)
    cut_image.write_bytes(cut_image.read_bytes()[: cut_image.stat().st_size // 2])
    text = detector_directory / "notes.edf"
    text.write_text("not an image")
    return {
        "name": write(detector_directory / "50%.tif", sample_frames),
        "missing": detector_directory / "missing.edf",
        "cut": cut,
        "cut image": cut_image,
        "text": text,
        "small": write(detector_directory / "small.tif", sample_frames[:, :50, :50]),
        "other": write(detector_directory / "other.h5", sample_frames[:, :50, :50]),
        "empty": write(detector_directory / "empty.h5", sample_frames[:0]),
    }


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("name", "holds %. Rename it"),
        ("missing", "does not exist"),
        ("cut", "truncated"),
        ("cut image", r"cut\.cbf"),
        ("text", "cannot be read as a detector image"),
        ("small", r"50 x 50 pixels; .* with 120 x 100"),
        ("other", "no dataset of frames with 120 x 100"),
        ("empty", "holds no frame"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_nothing(client, bad_files, write_edf, poni_file, sample_frames, which, message):
    """Nor does the good file before it: all are checked before the first is written."""
    before = set(client["raw"])
    with pytest.raises(BadInput, match=message):
        ingest([write_edf("good", sample_frames[0]), bad_files[which]], client=client, purpose="sample", poni=poni_file)
    assert set(client["raw"]) == before


def test_bad_geometry_mask_or_purpose_is_refused(client, tmp_path, write_edf, poni, poni_file, sample_frames):
    np.save(tmp_path / "all.npy", np.ones((120, 100)))
    np.save(tmp_path / "small.npy", np.zeros((50, 50)))
    (tmp_path / "bad.poni").write_text("nonsense")
    path, before = write_edf("good", sample_frames[0]), set(client["raw"])
    for change, message in (
        ({"poni": tmp_path / "bad.poni"}, "wavelength as None"),
        ({"poni": {**poni, "dist": 0.0}}, "distance"),
        ({"poni": {**poni, "detector": "Pilatus100k", "detector_config": {}}}, "195 x 487"),
        ({"mask": tmp_path / "all.npy"}, "leaves no pixel"),
        ({"mask": tmp_path / "small.npy"}, "50 x 50"),
        ({"mask": tmp_path / "none.npy"}, "cannot be read"),
        ({"purpose": "tea"}, "'tea' is unknown"),
        ({"slit": 1.0}, "no slit"),
    ):
        with pytest.raises(BadInput, match=message):
            ingest([path], **{"client": client, "purpose": "sample", "poni": poni_file, **change})
    assert set(client["raw"]) == before


def test_a_file_that_the_server_may_not_read_leaves_nothing(make_client, tmp_path, poni_file, sample_frames):
    client = make_client(answer_errors=True)
    outside = write(tmp_path / "outside.tif", sample_frames)
    with pytest.raises(BadInput, match=rf"cannot read .*outside\.tif.*readable_storage.*--readable {tmp_path}"):
        ingest([outside], client=client, purpose="sample", poni=poni_file)
    assert [len(client[mount]) for mount in ("raw", "curves", "psfs")] == [0, 0, 0]

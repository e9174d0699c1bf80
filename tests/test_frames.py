"""Frames are read from real files; damaged ones are named."""

import fcntl
from pathlib import Path

import fabio.cbfimage
import fabio.edfimage
import h5py
import hdf5plugin
import numpy as np
import pytest

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.frames import HDF5_MIMETYPE, FrameReference, NotYet, count, path_of, read

STACK = np.arange(4 * 30 * 20, dtype=np.int32).reshape(4, 30, 20)


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    path = tmp_path / "with space.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("entry/data/data", data=STACK, chunks=(1, 30, 20), **hdf5plugin.Bitshuffle(cname="lz4"))
    return path


def test_hdf5_slices(hdf5: Path):
    reference = FrameReference(hdf5.as_uri(), HDF5_MIMETYPE, {"dataset": "/entry/data/data"}, 1, 3)
    np.testing.assert_array_equal(read(reference), STACK[1:3])
    assert count(reference) == 4
    assert path_of(hdf5.as_uri()) == hdf5


def test_frames_appear_while_the_file_is_written(tmp_path: Path):
    path = tmp_path / "live.h5"
    with h5py.File(path, "w", libver="latest") as file:
        dataset = file.create_dataset(
            "entry/data/data", shape=(0, 30, 20), maxshape=(None, 30, 20), chunks=(1, 30, 20), dtype="i4"
        )
        file.swmr_mode = True
        for number in (1, 2):
            dataset.resize(number, axis=0)
            dataset[number - 1] = STACK[number - 1]
            dataset.flush()
            np.testing.assert_array_equal(read(FrameReference(path.as_uri(), HDF5_MIMETYPE)), STACK[:number])


@pytest.mark.parametrize(("image", "suffix"), [(fabio.edfimage.EdfImage, "edf"), (fabio.cbfimage.CbfImage, "cbf")])
def test_fabio_formats(tmp_path: Path, image, suffix: str):
    path = tmp_path / f"frame.{suffix}"
    image(data=STACK[0]).write(str(path))
    np.testing.assert_array_equal(read(FrameReference(path.as_uri(), "application/x-fabio"))[0], STACK[0])


def test_damaged_files_are_named(tmp_path: Path, hdf5: Path):
    whole = hdf5.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 3000):
        short = tmp_path / f"short{size}.h5"
        short.write_bytes(whole[:size])
        with pytest.raises(BadInput, match=f"short{size}.h5"):
            read(FrameReference(short.as_uri(), HDF5_MIMETYPE, {"dataset": "/entry/data/data"}))


@pytest.mark.parametrize("suffix", ["edf", "cbf", "tif"])
def test_truncated_images_are_named(tmp_path: Path, suffix: str):
    path = tmp_path / f"whole.{suffix}"
    images = {
        "edf": fabio.edfimage.EdfImage,
        "cbf": fabio.cbfimage.CbfImage,
        "tif": __import__("fabio.tifimage").tifimage.TifImage,
    }
    images[suffix](data=np.random.default_rng(0).integers(0, 1000, (300, 200)).astype(np.int32)).write(str(path))
    short = tmp_path / f"short.{suffix}"
    short.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadInput, match="short"):
        read(FrameReference(short.as_uri(), "application/x-fabio"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uri": "file:///nowhere/a.h5"}, "does not exist"),
        ({"uri": "https://example.org/a.h5"}, "not a file"),
        ({"parameters": {"dataset": "/no/such"}}, "holds no dataset /no/such"),
        ({"parameters": {"dataset": "/entry"}}, "not a stack"),
        ({"start": 3, "stop": 6}, "holds 1 of the 3"),
    ],
)
def test_what_is_missing_is_named(hdf5: Path, change: dict, message: str):
    reference = FrameReference(**{"uri": hdf5.as_uri(), "mimetype": HDF5_MIMETYPE, **change})
    with pytest.raises(BadInput, match=message):
        read(reference)


def test_what_may_come_is_told_from_what_is_wrong(hdf5: Path, tmp_path: Path):
    empty, text = tmp_path / "empty.h5", tmp_path / "text.h5"
    empty.touch()
    text.write_text("not HDF5")
    for uri, stop in ((hdf5.as_uri(), 5), (empty.as_uri(), None), ((tmp_path / "missing.h5").as_uri(), None)):
        with pytest.raises(NotYet):
            read(FrameReference(uri, HDF5_MIMETYPE, stop=stop))
    with pytest.raises(BadInput) as caught:
        read(FrameReference(text.as_uri(), HDF5_MIMETYPE))
    assert not isinstance(caught.value, NotYet)


def test_a_file_that_its_writer_locks_is_not_there_yet(hdf5: Path):
    with hdf5.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as HDF5 does for a writer without SWMR
        with pytest.raises(NotYet, match="locked"):
            read(FrameReference(hdf5.as_uri(), HDF5_MIMETYPE))
    assert read(FrameReference(hdf5.as_uri(), HDF5_MIMETYPE)).shape == STACK.shape


def test_text_is_no_image(tmp_path: Path):
    path = tmp_path / "notes.edf"
    path.write_text("not an image")
    with pytest.raises(BadInput, match="cannot be read as a detector image"):
        read(FrameReference(path.as_uri(), "application/x-fabio"))

"""Movies are read lazily by frame, channel and box, whatever holds them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dask.array
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from jaxbkgd._movies.movie import ArrayMovie, Channel, MovieError, one_line
from jaxbkgd._movies.open import open_movie


FRAMES = np.random.default_rng(0).integers(0, 4000, (7, 3, 12, 10)).astype(np.uint16)


class _Counted:
    """An array that says how many pixels were read from it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.pixels_read = 0

    def __getitem__(self, index: Any) -> np.ndarray:
        read = self._array[index]
        self.pixels_read += read.size
        return read


every_array = pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        jnp.asarray,
        lambda frames: dask.array.from_array(frames).rechunk({0: 2}),
        lambda frames: zarr.array(frames, chunks=(2, *frames.shape[1:])),
        lambda frames: frames.astype(">u2"),
    ],
    ids=["numpy", "jax", "dask", "zarr", "big-endian"],
)


@every_array
def test_any_array_of_several_channels_is_read_by_channel(make, tmp_path):
    with open_movie(make(FRAMES)) as movie:
        assert movie.shape == FRAMES.shape
        assert movie.dtype == np.uint16
        assert movie.dtype.isnative
        for index, channel in enumerate(movie.channels):
            for part in (slice(None), slice(0, 3), slice(6, 99), slice(5, 2)):
                read = channel[part]
                assert type(read) is np.ndarray
                assert read.dtype.isnative
                np.testing.assert_array_equal(read, FRAMES[part, index])


@every_array
def test_any_array_of_frames_has_one_channel(make):
    movie = open_movie(make(FRAMES[:, 0]))
    assert movie.shape == (7, 1, 12, 10)
    assert len(movie.channels[0]) == 7
    np.testing.assert_array_equal(movie.channels[0][2:5], FRAMES[2:5, 0])


def test_only_what_is_asked_for_is_read():
    array = _Counted(FRAMES)
    movie = ArrayMovie(array)
    assert array.pixels_read == 0
    movie.read(2, 5, 1)
    assert array.pixels_read == 3 * 12 * 10


def test_a_box_is_cut_from_each_frame():
    channel = Channel(ArrayMovie(FRAMES), 1, (2, 3, 9, 5))
    assert channel.shape == (7, 2, 7)
    assert channel[1:4].flags.c_contiguous
    np.testing.assert_array_equal(channel[1:4], FRAMES[1:4, 1, 3:5, 2:9])


@pytest.mark.parametrize(
    "box", [(0, 0, 11, 12), (0, 0, 10, 13), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 9, 5, 3)]
)
def test_a_box_outside_the_frames_is_refused(box):
    with pytest.raises(MovieError, match="is not inside its frames; give x0, y0, x1, y1"):
        Channel(ArrayMovie(FRAMES), 0, box)


def test_what_is_no_slice_of_frames_is_refused(as_installed):
    channel = ArrayMovie(FRAMES).channels[0]
    with pytest.raises(ValueError, match="not with step 2"):
        channel[::2]
    for index in (3, (slice(1, 3), 5)):
        with pytest.raises(TypeError, match="sliced by frame, as channel"):
            channel.__getitem__(cast(Any, index))


def test_a_fingerprint_is_of_the_pixels_their_type_and_their_shape():
    fingerprint = ArrayMovie(FRAMES).fingerprint()
    assert ArrayMovie(FRAMES.copy(), "another name").fingerprint() == fingerprint
    changed = FRAMES.copy()
    changed[-1, -1, -1, -1] += 1
    others = [changed, FRAMES.astype(np.int16), FRAMES[:-1], FRAMES.swapaxes(2, 3)]
    fingerprints = {ArrayMovie(other).fingerprint() for other in others}
    assert len(fingerprints) == len(others)
    assert fingerprint not in fingerprints


def test_a_fingerprint_of_a_long_movie_reads_few_frames():
    # Of what is not in memory.
    array = _Counted(np.zeros((10_000, 4, 4), np.uint8))
    ArrayMovie(array).fingerprint()
    assert array.pixels_read <= 8 * 4 * 4


def test_a_file_that_is_written_to_has_another_state_and_fingerprint(tmp_path):
    path = tmp_path / "movie.npy"
    np.save(path, FRAMES)
    with open_movie(path) as movie:
        state, fingerprint = movie.state(), movie.fingerprint()
        assert (movie.state(), movie.fingerprint()) == (state, fingerprint)
        os.utime(path, ns=(0, 0))
        assert movie.state() != state == movie.opened_state
    with open_movie(path) as movie:
        assert movie.fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([[1, 2], [3, 4]], "the array: is a list; give a path, or an array"),
        (np.zeros((12, 10)), r"has shape \(12, 10\); give frames of shape"),
        (np.zeros((1, 2, 3, 4, 5)), r"has shape \(1, 2, 3, 4, 5\); give frames of shape"),
        (np.zeros((7, 12, 10), complex), "has pixels of complex128; convert them"),
        (np.zeros((7, 12, 10), np.longdouble), "has pixels of float128; convert them"),
        (np.zeros((7, 12, 10), object), "has pixels of object; convert them"),
        (np.ma.masked_array(np.zeros((7, 12, 10))), "is masked, .*; fill it"),
        (np.zeros((0, 12, 10)), "says 0 frames of 1 channels of 12 x 10 px"),
        (np.zeros((7, 0, 12, 10)), "says 7 frames of 0 channels"),
        (np.zeros((7, 12, 0)), "12 x 0 px"),
        (np.broadcast_to(np.uint8(0), (7, 2**20, 2**20)), "1048576 x 1048576 px"),
    ],
)
def test_what_has_no_frames_is_refused(source, message):
    with pytest.raises(MovieError, match=f"^the array: .*{message}|^{message}"):
        open_movie(source)


def test_a_movie_is_opened_as_it_is():
    movie = ArrayMovie(FRAMES)
    assert open_movie(movie) is movie


def _write_nothing(path: Path) -> None:
    path.touch()


def _write_a_folder(path: Path) -> None:
    path.mkdir()


def _write_text(path: Path) -> None:
    path.write_text("no pixels")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("movie.tif", None, "no such file"),
        ("movie.npy", _write_nothing, "is empty"),
        ("movie.npy", os.mkfifo, "is not a regular file; copy the movie to one"),
        ("movie.npy", _write_text, "broken NumPy header"),
        ("movie.nd2", _write_text, "is of no format that is read; those are TIFF, .*DAX"),
        ("movie", _write_text, "is of no format that is read; those are TIFF, .*DAX"),
        ("movie.dax", _write_text, "its movie.inf is missing"),
        ("movie.raw", _write_text, "its movie.yaml is missing"),
        ("movie", _write_a_folder, ""),
    ],
)
def test_a_path_that_is_no_movie_is_refused_in_one_line(
    name: str, write: Callable[[Path], None] | None, message: str, tmp_path
):
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(MovieError) as caught:
        open_movie(path)
    assert caught.match(rf"^{path}: .*{message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "movie.npy"
    np.save(path, FRAMES)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        MovieError, match=r"movie\.npy: cannot be read \(Permission denied\)"
    ):
        open_movie(path)


def test_a_package_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "movie.raw").write_bytes(b"0")
    (tmp_path / "movie.yaml").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(
        MovieError, match=r"package yaml; .*pip install 'jaxbkgd\[movies\]'"
    ):
        open_movie(tmp_path / "movie.raw")


def test_what_is_read_with_numpy_alone_needs_no_other_package(tmp_path, monkeypatch):
    for module in ("_tiff", "_zarr"):
        monkeypatch.setitem(sys.modules, f"jaxbkgd.{module}", None)
        monkeypatch.delattr(f"jaxbkgd.{module}", raising=False)
    np.save(tmp_path / "movie.npy", FRAMES)
    with open_movie(tmp_path / "movie.npy") as movie:
        np.testing.assert_array_equal(movie.read(0, 7, 2), FRAMES[:, 2])


def test_an_error_of_many_lines_is_told_in_one():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 200

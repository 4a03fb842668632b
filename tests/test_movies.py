"""Movies are read lazily by frame, channel and box, whatever holds them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dask.array
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

import jaxbkgd
from jaxbkgd import Channel, Movie, MovieError, open_movie
from jaxbkgd._movies.movie import one_line
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import Layout


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
    movie = open_movie(make(FRAMES[:, 0]))
    assert movie.shape == (7, 1, 12, 10)
    np.testing.assert_array_equal(movie.channels[0][2:5], FRAMES[2:5, 0])


def test_a_box_is_cut_from_each_frame():
    channel = Channel(open_movie(FRAMES), 1, (2, 3, 9, 5))
    assert channel.shape == (7, 2, 7)
    assert channel[1:4].flags.c_contiguous
    np.testing.assert_array_equal(channel[1:4], FRAMES[1:4, 1, 3:5, 2:9])


def test_some_frames_of_a_channel_are_read_and_no_others():
    pixels = _Counted(FRAMES)
    channel = Channel(
        Movie(pixels, name="mine", format="my own"), 1, (2, 3, 9, 5), slice(1, None, 2)
    )
    expected = FRAMES[1::2, 1, 3:5, 2:9]
    assert (channel.frames, channel.shape) == (range(1, 7, 2), expected.shape)
    np.testing.assert_array_equal(channel[1:], expected[1:])
    assert pixels.pixels_read == 2 * 12 * 10
    for index in (0, -1, slice(None), slice(None, None, 2), slice(None, None, -1)):
        np.testing.assert_array_equal(channel[index], expected[index])
    np.testing.assert_array_equal(channel.part(slice(1, 9))[:], expected[1:])


@pytest.mark.parametrize(
    "frames",
    [slice(-3, None), slice(5, 2), slice(7, None), slice(0, 4, -1), slice(0, 4, 0)],
)
def test_frames_that_are_negative_or_none_are_refused(frames, as_installed):
    with pytest.raises(TypeError, match=r"must be a slice.*\(0, 5\)"):
        Channel(open_movie(FRAMES), 0, None, cast(Any, (0, 5)))
    with pytest.raises(MovieError, match="negative, or hold none of it; give a slice with"):
        Channel(open_movie(FRAMES), 0, None, frames)


@pytest.mark.parametrize(
    "box", [(0, 0, 11, 12), (0, 0, 10, 13), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 9, 5, 3)]
)
def test_a_box_outside_the_frames_is_refused(box):
    with pytest.raises(MovieError, match="is not inside its frames; give x0, y0, x1, y1"):
        Channel(open_movie(FRAMES), 0, box)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_channel_that_a_movie_does_not_have_is_refused(index):
    with pytest.raises(MovieError, match=f"channels 0 to 2, and none of the .* {index}"):
        Channel(open_movie(FRAMES), index)


def test_a_channel_is_indexed_as_an_array_of_frames(as_installed):
    channel = open_movie(FRAMES).channels[1]
    expected = FRAMES[:, 1]
    within = ((slice(1, 3), 5), (2, slice(4, 9)), (3, 4, 5))
    for index in (0, 3, -1, np.int64(2), slice(1, 6, 2), slice(None, None, -3), *within):
        np.testing.assert_array_equal(channel[index], expected[index])
    np.testing.assert_array_equal(np.asarray(channel), expected)
    np.testing.assert_array_equal(np.asarray(channel, np.float32), expected)
    np.testing.assert_array_equal(np.stack(list(channel)), expected)
    assert channel[5:2:2].shape == (0, 12, 10)
    for beyond in (7, -8):
        with pytest.raises(IndexError, match=f"no frame {beyond}; the channel has 7"):
            channel[beyond]
    for index in (1.0, (None, 5), None):
        with pytest.raises(TypeError, match="be interpreted as an integer"):
            channel.__getitem__(cast(Any, index))


@every_array
def test_a_movie_is_an_array_of_frames_and_channels(make):
    movie = open_movie(make(FRAMES))
    np.testing.assert_array_equal(np.asarray(movie), FRAMES)
    assert np.asarray(movie, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="no array without a copy"):
        np.array(movie, copy=False)


def test_a_movie_and_a_channel_describe_themselves():
    movie = open_movie(FRAMES)
    about = "format='numpy array', shape=(7, 3, 12, 10), dtype=uint16)"
    assert repr(movie) == f"Movie('the array', {about}"
    assert "index=2, box=(0, 0, 10, 12), shape=(7, 12, 10)" in repr(movie.channels[2])


def test_anything_that_is_sliced_is_a_movie_and_only_what_is_asked_for_is_read():
    closed = []
    pixels = _Counted(FRAMES)
    about: Any = {"name": "mine", "format": "my own", "frame_interval_s": 0.1}
    made = Movie(pixels, **about, close=lambda: closed.append(True))
    with open_movie(made) as movie:
        assert movie is made
        assert pixels.pixels_read == 0
        np.testing.assert_array_equal(movie.channels[2][1:3], FRAMES[1:3, 2])
        assert pixels.pixels_read == 2 * 12 * 10
        assert (movie.frame_interval_s, movie.paths, movie.state()) == (0.1, (), None)
    assert closed == [True]
    with pytest.raises(MovieError, match="mine: is closed; open it again"):
        made.read(0, 1)


def test_a_fingerprint_is_of_the_pixels_their_type_and_their_shape():
    fingerprint = open_movie(FRAMES).fingerprint()
    assert open_movie(FRAMES.copy()).fingerprint() == fingerprint
    changed = FRAMES.copy()
    changed[-1, -1, -1, -1] += 1
    others = [changed, FRAMES.astype(np.int16), FRAMES[:-1], FRAMES.swapaxes(2, 3)]
    fingerprints = {open_movie(other).fingerprint() for other in others}
    assert len(fingerprints) == len(others)
    assert fingerprint not in fingerprints


def test_a_fingerprint_of_a_long_movie_reads_few_frames():
    # Of what is not in memory.
    array = _Counted(np.zeros((10_000, 4, 4), np.uint8))
    open_movie(array).fingerprint()
    assert array.pixels_read <= 8 * 4 * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_a_memory_map_is_told_from_others_by_its_file_and_few_frames(channels, tmp_path):
    shape = (10_000, channels, 64, 64)
    # Sparse: it takes no space on disk.
    written = np.lib.format.open_memmap(tmp_path / "m.npy", "w+", np.uint16, shape)
    written[-1] = 7
    del written
    mapped = np.load(tmp_path / "m.npy", mmap_mode="r")
    if channels == 1:
        mapped = mapped[:, 0]
    read = []

    class Watched(np.memmap):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    movie = open_movie(mapped.view(Watched))
    assert movie.paths == (tmp_path / "m.npy",)
    fingerprint = movie.fingerprint()
    assert len(read) <= 8 * channels + 1
    assert open_movie(np.asarray(mapped)).fingerprint() == fingerprint
    assert open_movie(mapped[1:]).fingerprint() != fingerprint
    assert open_movie(mapped[:-1]).fingerprint() != fingerprint
    state = movie.state()
    os.utime(tmp_path / "m.npy", ns=(0, 0))
    assert movie.state() != state == movie.opened_state
    assert movie.fingerprint() == fingerprint
    # What is computed from it is in memory.
    assert open_movie(mapped[:9] + 1).paths == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([[1, 2], [3, 4]], "the array: is a list; give a path, or an array"),
        (np.zeros((12, 10)), r"has shape \(12, 10\); give \(frames"),
        (np.zeros((1, 2, 3, 4, 5)), r"has shape \(1, 2, 3, 4, 5\); give \(frames"),
        (np.zeros((7, 12, 10), complex), "has pixels of complex128; convert them"),
        (np.zeros((7, 12, 10), object), "has pixels of object; convert them"),
        (np.ma.masked_array(np.zeros((7, 12, 10))), "is masked; fill it"),
        (np.zeros((0, 12, 10)), "has no frames"),
        (np.zeros((7, 0, 12, 10)), "says 7 frames of 0 channels"),
        (np.zeros((7, 12, 0)), "12 x 0 px"),
        (np.broadcast_to(np.uint8(0), (7, 2**20, 2**20)), "1048576 x 1048576 px"),
    ],
)
def test_what_has_no_frames_is_refused(source, message):
    with pytest.raises(MovieError, match=f"^the array: .*{message}|^{message}"):
        open_movie(source)


def _write_a_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes have names on Windows")
    os.mkfifo(path)


def _write_text(path: Path) -> None:
    path.write_text("no pixels")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("movie.tif", None, "no such file"),
        ("movie.npy", Path.touch, "is empty"),
        ("movie.npy", _write_a_pipe, "is empty, or not a regular file"),
        ("movie.npy", _write_text, "broken NumPy header"),
        ("movie.avi", _write_text, "is of no format that is read; those are TIFF .*DAX"),
        ("movie", _write_text, "is of no format that is read; those are TIFF .*DAX"),
        ("movie.dax", _write_text, "its movie.inf is missing"),
        ("movie.raw", _write_text, "its movie.yaml is missing"),
        ("movie", Path.mkdir, ""),
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
    assert caught.match(rf"^{re.escape(str(path))}: .*{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [("movie.raw", "yaml"), ("movie.tif", "tifffile"), ("movie.zarr.zip", "zarr")],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(
    name, package, tmp_path, monkeypatch
):
    (tmp_path / name).write_bytes(b"0")
    (tmp_path / "movie.yaml").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, package, None)
    for module in [
        module for module in sys.modules if module.startswith("jaxbkgd._movies.")
    ]:
        if module.rpartition(".")[2] not in ("movie", "open", "sinks", "journal"):
            monkeypatch.delitem(sys.modules, module)
            monkeypatch.delattr(module)
    message = rf"needs a Python package \(.*{package}.*; .*pip install 'jaxbkgd\[movies\]'"
    with pytest.raises(MovieError, match=message):
        open_movie(tmp_path / name)
    if package != "yaml":
        layout = Layout((1, 1, 4, 4), np.dtype(np.float32), 1)
        with pytest.raises(MovieError, match=message):
            open_sink(tmp_path / f"out{Path(name).suffixes[0]}", layout)


def test_files_are_read_with_numpy_alone_without_the_other_packages(tmp_path):
    """In a process of its own, where the packages were not imported before."""
    np.save(tmp_path / "movie.npy", FRAMES)
    code = f"""
import sys
for package in ("jax", "tifffile", "zarr", "numcodecs", "yaml", "filelock"):
    sys.modules[package] = None
sys.path.insert(0, {str(Path(jaxbkgd.__file__).parent)!r})
from _movies.open import open_movie
with open_movie({str(tmp_path / "movie.npy")!r}) as movie:
    assert movie.read(0, 7, 2).sum() == {FRAMES[:, 2].sum()}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_of_many_lines_is_told_in_one():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 200

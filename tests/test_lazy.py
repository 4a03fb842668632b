"""A lazy estimate is an array, has the bits of a movie's, and estimates each chunk once."""

import re
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.array as da
import jax
import numpy as np
import pytest
from conftest import MovingSum

from jaxbkgd import (
    Camera,
    estimate_movie,
    lazy_estimate,
    LazyEstimate,
    LocalMean,
    Movie,
    MovieError,
    simulate_movie,
    SpatialMean,
)


FRAMES = np.random.default_rng(0).poisson(500, (24, 12, 17)).astype(np.uint16)
TWO_CHANNELS = np.stack([FRAMES, FRAMES[::-1]], axis=1)
MASK = np.arange(12 * 17).reshape(12, 17) % 5 > 0
CAMERA = Camera(100.0, 0.46)
MAPS = Camera(100.0, np.linspace(0.3, 0.6, 12 * 17).reshape(12, 17), 1.5)
MEAN = SpatialMean(1.0, max_radius_pix=1.1)
# What a clip and a light add is compiled for long, and shown in tests of estimate_movie.
OVER_TIME = LocalMean(1.0, 1.0, clip=None, illumination_rank=0, max_radius_frames=2)


class CountingMovie(Movie):
    """Knows how often each frame was read."""

    def __init__(self, frames: np.ndarray = FRAMES) -> None:
        super().__init__(frames[:, None], name="the movie", format="array")
        self.counts = np.zeros(len(frames), int)

    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        self.counts[start:stop] += 1
        return super().read(start, stop, channel)


def _estimated(source: Any, estimator: Any, shape: tuple[int, ...], **options: Any):
    """What `estimate_movie` writes."""
    out = np.empty(shape, options.get("dtype", np.float32))
    estimate_movie(source, estimator, out, progress=False, **options)
    return out


def _lazy(**options: Any) -> LazyEstimate:
    return lazy_estimate(FRAMES, MEAN, chunk_frames=5, **options)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [MEAN, OVER_TIME, MovingSum(3)])
@pytest.mark.parametrize("chunk_frames", [None, 1, 6])
def test_frames_are_those_of_estimate_movie_to_the_bit(estimator, chunk_frames):
    expected = _estimated(FRAMES, estimator, FRAMES.shape)
    lazy = lazy_estimate(FRAMES, estimator, chunk_frames=chunk_frames)
    # In an order of its own.
    for frame in np.random.default_rng(1).permutation(24):
        np.testing.assert_array_equal(lazy[frame], expected[frame])
    np.testing.assert_array_equal(lazy, expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"quantity": "residual", "camera": CAMERA},
        {"quantity": "residual", "dtype": "uint16", "pedestal": 100, "camera": CAMERA},
        {"quantity": "snr", "camera": CAMERA},
        {"quantity": "snr", "camera": MAPS},
        {"dtype": "uint16"},
        {"frames": slice(3, 20, 2)},
        {"weights": MASK},
        {"weights": np.random.default_rng(2).uniform(0, 1, FRAMES.shape)},
    ],
    ids=lambda options: "-".join(options),
)
def test_it_takes_what_estimate_movie_takes(options):
    shape = FRAMES[options.get("frames", slice(None))].shape
    estimator = OVER_TIME if "weights" in options else MEAN
    expected = _estimated(FRAMES, estimator, shape, **options)
    lazy = lazy_estimate(FRAMES, estimator, chunk_frames=4, **options)
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(lazy, expected)


@pytest.mark.long
def test_boxes_and_channels_are_an_axis_behind_the_frames():
    cameras = [Camera(100.0), Camera(90.0)]
    expected = _estimated(TWO_CHANNELS, MEAN, TWO_CHANNELS.shape, camera=cameras)
    for source in (TWO_CHANNELS, [FRAMES, FRAMES[::-1]]):
        lazy = lazy_estimate(source, MEAN, chunk_frames=5, camera=cameras)
        np.testing.assert_array_equal(lazy, expected)
    boxes = [(0, 0, 8, 12), (9, 0, 17, 12)]
    lazy = lazy_estimate(FRAMES, MEAN, boxes=boxes)
    expected = [MEAN(FRAMES[..., :8]).bkgds, MEAN(FRAMES[..., 9:]).bkgds]
    np.testing.assert_array_equal(lazy, np.stack(expected, axis=1))
    of_one = lazy_estimate(FRAMES, MEAN, boxes=boxes[:1])
    np.testing.assert_array_equal(of_one, expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("source", [FRAMES, TWO_CHANNELS], ids=["one", "two channels"])
def test_it_is_indexed_as_an_array(source):
    lazy = lazy_estimate(source, MEAN, chunk_frames=5)
    array = np.asarray(lazy)
    assert len(lazy) == 24
    assert (lazy.ndim, lazy.size, lazy.nbytes) == (array.ndim, array.size, array.nbytes)
    within = {3: (3, slice(4, 9)), 4: (1, 3, slice(4, 9))}[source.ndim]
    for index in (
        *(0, -1, np.int64(7), np.uint16(22), slice(3, 8), slice(-7, None, 3)),
        *(slice(20, 2, -4), slice(5, 5), slice(None), [4, 4, -2, 19], np.arange(24) > 11),
        *([], np.array([[1, 2], [9, 3]]), ..., (), (..., 0), (3, ..., 4), (slice(2, 9), 1)),
        *(((3, 1),), ((3, 1), 0)),
        *((7, *within), (slice(None), *within), (..., *within), (slice(4, 19, 5), ..., -1)),
        *(([2, 8, 3], ..., slice(3, 7)), (..., 5, *within[:-1], 3), (5, *within[:-1], 3)),
    ):
        read = lazy[index]
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, array[index], strict=True)
    np.testing.assert_array_equal(np.stack([*lazy]), array)
    # What was read is the reader's own.
    lazy[0][...] = lazy[2:4][...] = 0
    np.testing.assert_array_equal(lazy, array)
    assert np.asarray(lazy, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="is no array without a copy"):
        np.asarray(lazy, copy=False)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (24, "index 24 is out of bounds for axis 0 with size 24"),
        (-25, "index -25 is out of bounds"),
        ([0, 40], "index 40 is out of bounds"),
        (np.ones(22, bool), "boolean index did not match"),
        ((0, 12), "index 12 is out of bounds"),
        ((0, 0, 0, 0), "too many indices"),
        (1.5, "only integers, slices"),
        ((None, 1), "None is no index of its frames"),
        ((0, [1, 2]), r"within a frame, \[1, 2\] is no integer or slice; use it on"),
    ],
)
def test_an_index_outside_or_of_another_kind_is_an_error(index, message):
    with pytest.raises(IndexError, match=message):
        _lazy()[index]


@pytest.mark.slow
def test_each_frame_is_estimated_once_while_scrolling():
    movie = CountingMovie(np.repeat(FRAMES, 44, 0)[:1000])
    lazy = lazy_estimate(movie, MEAN, chunk_frames=8, cache_bytes=1)
    assert (movie.counts == 0).all()
    for frame in range(1000):
        lazy[frame]
    assert (movie.counts == 1).all()
    # With a neighbour on either side, as a temporal filter reads them.
    movie.counts[:] = 0
    for frame in range(1, 999):
        lazy[frame - 1 : frame + 2]
    assert (movie.counts <= 1).all()
    # One chunk is all that a frame costs, and its halo.
    movie = CountingMovie()
    lazy_estimate(movie, MovingSum(1), chunk_frames=6)[13]
    assert movie.counts.nonzero()[0].tolist() == list(range(11, 19))


def test_a_long_halo_has_long_chunks():
    frames = np.zeros((1000, 8, 8), np.uint16)
    assert lazy_estimate(frames, MovingSum(25)).chunks == (1000, 8, 8)
    assert lazy_estimate(np.zeros((100, 512, 512)), MovingSum(5)).chunks[0] == 20


def test_the_cache_is_as_large_as_asked_and_keeps_what_was_used_last():
    movie = CountingMovie()
    # Chunks of five frames.
    lazy = lazy_estimate(movie, MEAN, chunk_frames=5, cache_bytes=3 * 5 * 12 * 17 * 4)
    for frame in (0, 5, 10, 0, 15, 0, 10, 15):
        lazy[frame]
    assert movie.counts[[0, 5, 10, 15]].tolist() == [1, 1, 1, 1]
    lazy[5]
    assert movie.counts[[0, 5, 10, 15]].tolist() == [1, 2, 1, 1]
    lazy[0]
    assert movie.counts[0] == 2


@pytest.mark.slow
def test_scrolling_takes_the_memory_of_the_cache_and_of_a_chunk():
    frames = np.zeros((400, 64, 64), np.uint16)
    chunk_bytes = 20 * 64 * 64 * 4
    lazy = lazy_estimate(frames, MEAN, chunk_frames=20, cache_bytes=4 * chunk_bytes)
    lazy[0]
    tracemalloc.start()
    for frame in range(400):
        lazy[frame]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Four chunks, one that is estimated with its frames, and a frame.
    assert peak < 6.5 * chunk_bytes


@pytest.mark.slow
def test_threads_that_need_one_chunk_estimate_it_once():
    movie = CountingMovie()
    lazy = lazy_estimate(movie, MEAN, chunk_frames=4, cache_bytes=2**20)
    together = threading.Barrier(8)

    def read_all(start: int) -> np.ndarray:
        together.wait(60)
        frames = {frame % 24: lazy[frame % 24] for frame in range(start, start + 24)}
        return np.stack([frames[frame] for frame in range(24)])

    with ThreadPoolExecutor(8) as pool:
        read = [*pool.map(read_all, [0, 0, 3, 3, 7, 7, 12, 20])]
    assert (movie.counts == 1).all()
    expected = _estimated(FRAMES, MEAN, FRAMES.shape)
    for frames in read:
        np.testing.assert_array_equal(frames, expected)


def test_every_thread_has_the_precision_of_the_call():
    class Precise(MovingSum):
        def estimate_stack(self, frames: Any) -> Any:
            is_64_bit.append(jax.enable_x64.value)
            return super().estimate_stack(frames)

    is_64_bit: list[bool] = []
    with jax.enable_x64(True):
        lazy = lazy_estimate(FRAMES, Precise(1))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lazy.__getitem__, 3).result()
    assert set(is_64_bit) == {True}


@pytest.mark.slow
def test_a_frame_that_cannot_be_read_is_named_and_tried_again():
    class Failing(CountingMovie):
        is_broken = True

        def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
            if self.is_broken:
                raise MovieError("the movie: frame 3 cannot be read")
            return super().read(start, stop, channel)

    movie = Failing()
    lazy = lazy_estimate(movie, MEAN)
    for _ in range(2):
        with pytest.raises(MovieError, match="frame 3 cannot be read"):
            lazy[3]
    movie.is_broken = False
    np.testing.assert_array_equal(lazy[3], MEAN(FRAMES).bkgds[3])


def test_its_file_is_closed_with_it(tmp_path):
    np.save(tmp_path / "movie.npy", FRAMES)
    with lazy_estimate(tmp_path / "movie.npy", MEAN) as lazy:
        np.testing.assert_array_equal(lazy[22], MEAN(FRAMES).bkgds[22])
        assert "movie.npy" in repr(lazy)
    with pytest.raises(MovieError, match=r"movie\.npy: is closed; open it again"):
        lazy[22]
    # A movie that was open stays so.
    movie = CountingMovie()
    lazy_estimate(movie, MEAN).close()
    assert movie.read(0, 1).shape == (1, 12, 17)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("source", "estimator", "options", "message"),
    [
        ("none.tif", MEAN, {}, "none.tif: no such file"),
        (FRAMES, None, {}, "An estimator is needed"),
        (FRAMES, MEAN, {"weights": MASK}, "SpatialMean takes no weights"),
        (FRAMES, MEAN, {"quantity": "mean"}, "quantity must be"),
        (FRAMES, MEAN, {"quantity": "snr"}, "An SNR needs"),
        (FRAMES, MEAN, {"quantity": "residual", "dtype": "uint16"}, "give a pedestal"),
        (FRAMES, MEAN, {"chunk_frames": 0}, "chunk_frames must be"),
        (FRAMES, MEAN, {"cache_bytes": 0}, "cache_bytes must be a whole number from 1 on"),
        (FRAMES, MEAN, {"frames": slice(40, 50)}, "hold none of it"),
        (FRAMES, MEAN, {"boxes": [(0, 0, 5, 5), (0, 0, 9, 9)]}, "one source or box a call"),
        ([FRAMES, FRAMES[1:]], MEAN, {}, "give movies of the same length"),
        (TWO_CHANNELS, SpatialMean([1.0, 2.0, 3.0]), {}, "3"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_frame_is_read(
    source, estimator, options, message
):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        lazy_estimate(source, estimator, **options)


@pytest.mark.slow
def test_dask_takes_it_as_it_is():
    movie = CountingMovie()
    lazy = lazy_estimate(movie, MEAN, chunk_frames=6)
    from_array: Any = da.from_array  # Its annotation says less than it takes.
    array = from_array(lazy, chunks=(6, -1, -1))
    assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype)
    assert (movie.counts == 0).all()
    expected = _estimated(FRAMES, MEAN, FRAMES.shape)
    np.testing.assert_array_equal(array[3:9, 2].compute(), expected[3:9, 2])
    np.testing.assert_array_equal(array.compute(), expected)
    np.testing.assert_array_equal(array[[3, 19, 4]].compute(), expected[[3, 19, 4]])
    assert (movie.counts == 1).all()
    # Its chunks are those of dask where nothing else is asked for.
    assert from_array(lazy, chunks={1: -1, 2: -1}).chunks[0][0] % 6 == 0


# napari, ndv, Picasso and SMAPpy are large, and no part of what the tests install. Where
# they are installed, these tests show that they take a lazy estimate as it is.
ignore_theirs = pytest.mark.filterwarnings("ignore")


@ignore_theirs
def test_napari_shows_it():
    components = pytest.importorskip("napari.components")
    lazy = _lazy()
    # The viewer without its window, which needs OpenGL.
    viewer = components.ViewerModel()
    layer = viewer.add_image(lazy)
    assert layer.data is lazy
    for frame in (0, 7, 20):
        viewer.dims.set_current_step(0, frame)
        assert layer.get_value((frame, 3, 4)) == lazy[frame, 3, 4]


@ignore_theirs
def test_ndv_shows_it():
    ndv = pytest.importorskip("ndv")
    lazy = _lazy()
    wrapper = ndv.DataWrapper.create(lazy)
    assert wrapper.data is lazy
    np.testing.assert_array_equal(wrapper.isel({0: 7}), lazy[7])
    np.testing.assert_array_equal(wrapper.isel({0: 7, 1: slice(2, 5)}), lazy[7, 2:5])


@ignore_theirs
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_picasso_finds_and_fits_molecules_in_it(dtype):
    picasso_io = pytest.importorskip("picasso.io")
    picasso = pytest.importorskip("picasso.localize")
    frames, _ = simulate_movie(
        jax.random.key(0), frame_count=24, height_pix=64, width_pix=64
    )
    pedestal = {"pedestal": 100, "camera": CAMERA}
    lazy = lazy_estimate(
        frames, SpatialMean(7.0), quantity="residual", dtype=dtype, **pedestal
    )
    camera = {"Baseline": 100, "Sensitivity": 0.46, "Gain": 1, "Pixelsize": 100}
    limits = {"Min. Net Gradient": 400, "Box Size": 7}
    whole = picasso.localize_frames(np.asarray(lazy), [camera], limits)
    assert len(whole) > 50
    # This reads all frames at once.
    assert whole.equals(picasso.localize_frames(lazy, [camera], limits))
    # Picasso reads frame by frame what is registered as one of its movies.
    picasso_io.AbstractPicassoMovie.register(LazyEstimate)
    found, _ = picasso.localize(lazy, camera_info=camera, identification_parameters=limits)
    assert whole.equals(found)


@ignore_theirs
def test_smappy_fits_its_slices():
    smappy = pytest.importorskip("smappy")
    frames, _ = simulate_movie(
        jax.random.key(0), frame_count=24, height_pix=64, width_pix=64
    )
    lazy = lazy_estimate(frames, SpatialMean(7.0), quantity="residual", chunk_frames=8)
    camera = {"conversion": 0.46, "offset": 0.0, "pixelsize_um": 0.1}
    slices = ((start, lazy[start : start + 5]) for start in range(0, 24, 5))
    of_lazy = smappy.fit(slices, camera=camera)
    of_array = smappy.fit(np.asarray(lazy), camera=camera)
    assert len(of_lazy) > 50
    np.testing.assert_array_equal(of_lazy["x_nm"], of_array["x_nm"])

"""Movies in chunks, on threads and devices, and what is left of them by an error."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import tifffile
from conftest import MovingSum
from jax.errors import JaxRuntimeError

from jaxbkgd import (
    AbstractEstimator,
    Background,
    Camera,
    estimate_movie,
    LocalMean,
    Movie,
    MovieError,
    open_movie,
    SpatialMean,
)
from jaxbkgd._batch import compute, plan, run as _run
from jaxbkgd._batch.compute import OutOfMemory
from jaxbkgd._batch.names import paths_beside
from jaxbkgd._batch.plan import plan_chunks
from jaxbkgd._batch.stream import Plan
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import Journal, Layout, Sink
from jaxbkgd._movies.tiff_pages import TiffSink
from jaxbkgd._workers import free_bytes


FRAMES = np.random.default_rng(0).integers(0, 65536, (23, 20, 31)).astype(np.uint16)
ESTIMATOR = SpatialMean((1.0, 2.0))
CAMERA = Camera(100, 0.5)
BKGDS = np.asarray(ESTIMATOR(FRAMES).bkgds)


class CountingMovie(Movie):
    """Knows how often each frame was read."""

    def __init__(self, array):
        super().__init__(array[:, None], name="the movie", format="array")
        self.counts = np.zeros(len(array), int)

    def read(self, start, stop, channel=0):
        # A fingerprint reads single frames, chunks here are of more.
        self.counts[start:stop] += stop - start > 1
        return super().read(start, stop, channel)


class Weighted(MovingSum):
    """The sum of frames that are each multiplied by their weights."""

    takes_weights: ClassVar[bool] = True

    def estimate_stack(self, frames: Any, weights: Any = None) -> Background:
        factors = 1 if weights is None else weights
        return super().estimate_stack(frames.astype(jnp.float32) * factors)


def _written(source: Any, estimator: AbstractEstimator = ESTIMATOR, **options: Any):
    out = np.empty(np.shape(source), options.get("dtype", np.float32))
    estimate_movie(source, estimator, out, progress=False, **options)
    return out


@pytest.mark.long
@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize(("chunk_frames", "workers"), [(None, None), (4, 3), (22, 1)])
def test_a_movie_is_estimated_as_a_whole_to_the_bit(chunk_frames, workers):
    options = {"chunk_frames": chunk_frames, "workers": workers}
    np.testing.assert_array_equal(_written(FRAMES, **options), BKGDS)
    # Border frames differ from those inside, so that a missing halo would show.
    for reach in (2, 30):
        expected = [FRAMES[max(0, t - reach) : t + reach + 1].sum(0) for t in range(23)]
        written = _written(FRAMES, MovingSum(reach), **options)
        np.testing.assert_array_equal(written, expected)


@pytest.mark.slow
def test_frames_of_any_real_dtype_are_converted():
    np.testing.assert_array_equal(_written(FRAMES.astype(">u2")), BKGDS)
    np.testing.assert_array_equal(_written(FRAMES.astype(np.int64)), BKGDS)
    frames = FRAMES % 2 == 0
    np.testing.assert_array_equal(_written(frames), ESTIMATOR(frames).bkgds)


@pytest.mark.slow
def test_chunks_of_any_alignment_give_the_same():
    memory = np.empty(FRAMES.nbytes + 64, np.uint8)
    for offset in (2, 16):
        frames = memory[offset : offset + FRAMES.nbytes].view(np.uint16)
        frames = frames.reshape(FRAMES.shape)
        frames[...] = FRAMES
        np.testing.assert_array_equal(_written(frames, chunk_frames=4), BKGDS)


@pytest.mark.slow
def test_only_halos_are_read_twice():
    movie = CountingMovie(FRAMES)
    estimate_movie(movie, MovingSum(1), np.empty_like(BKGDS), chunk_frames=6)
    # Chunks of 6 with a frame on either side; the last window begins earlier instead.
    assert movie.counts.max() == 2
    movie = CountingMovie(FRAMES[:20])
    estimate_movie(movie, ESTIMATOR, np.empty_like(BKGDS[:20]), chunk_frames=5)
    assert (movie.counts == 1).all()


@pytest.mark.long
def test_a_mean_over_time_is_that_of_the_whole_movie_and_reads_the_halo_of_its_radii():
    movie = CountingMovie(np.maximum(FRAMES, 1000))
    weights = np.zeros((20, 31), bool)
    weights[:, :5] = True
    weights[3, 4] = False
    # What a clip adds is compiled for long, and shown in test_stream.py.
    bounds: Any = {"clip": None, "illumination_rank": 0, "max_radius_frames": 4}
    estimator = LocalMean(1.0, 1.0, **bounds)
    expected = estimator(np.maximum(FRAMES, 1000), weights).bkgds
    out = np.empty_like(BKGDS)
    summary = estimate_movie(movie, estimator, out, weights=weights, chunk_frames=6)
    np.testing.assert_array_equal(out, expected)
    # Where nothing counts, nothing is finite.
    assert summary.nonfinite_frames == 23
    assert np.isfinite(out[:, :, :5]).all()
    # Four windows of 6 frames and a few on either side, and not those of the bound.
    halo_frames = estimator.for_inference().halo_frames
    assert halo_frames < estimator.halo_frames
    assert movie.counts.sum() == 4 * (6 + 2 * halo_frames)


@pytest.mark.parametrize(
    ("held", "given", "chosen"),
    [
        # Enough for all of the movie, as often as there are workers.
        (1000, (None, 3), (23, 3)),
        # Windows of 20 frames, 3 of them on either side: two as long as each other.
        (20, (None, 1), (12, 1)),
        # One worker with room for the halo does more than many without.
        (20, (None, None), (12, 1)),
        (40, (None, 2), (12, 2)),
        (1, (5, None), (5, 1)),
        (1, (5, 8), (5, 8)),
    ],
)
def test_memory_is_shared_among_as_many_workers_as_it_serves(
    held, given, chosen, monkeypatch
):
    """Where so many frames can be held."""
    _let_memory_hold(held, monkeypatch)
    monkeypatch.setattr("jaxbkgd._batch.plan.core_count", lambda: 2)
    chunk_frames, workers = given
    channels, devices = open_movie(FRAMES).channels, jax.local_devices()
    options = {"chunk_frames": chunk_frames, "workers": workers}
    assert plan_chunks(channels, 3, devices, **options) == chosen


def _let_memory_hold(frames, monkeypatch):
    """Of an estimator with a halo, which takes 64 bytes a pixel."""
    free = SimpleNamespace(available=frames * 64 * FRAMES[0].size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def test_a_halo_that_memory_does_not_hold_is_refused_with_a_remedy(monkeypatch):
    _let_memory_hold(8, monkeypatch)
    with pytest.raises(MovieError, match=r"memory is short.*can hold 8,.*sees 4 .*chunk_"):
        _written(FRAMES, MovingSum(4))
    expected = [FRAMES[max(0, t - 4) : t + 5].sum(0) for t in range(23)]
    np.testing.assert_array_equal(_written(FRAMES, MovingSum(4), chunk_frames=2), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_ends_at_the_limit_of_a_control_group_around_the_process(version, tmp_path):
    group, kinds, limit, usage = {
        1: ("sys/fs/cgroup/memory", "memory", "limit_in_bytes", "usage_in_bytes"),
        2: ("sys/fs/cgroup", "", "max", "current"),
    }[version]
    inner = tmp_path / group / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/x\n4:{kinds}:/job/step\n")
    for folder, bytes_allowed in ((inner, "max"), (inner.parent, 4096 + 1000)):
        (folder / f"memory.{limit}").write_text(f"{bytes_allowed}\n")
        (folder / f"memory.{usage}").write_text("4096\n")
        (folder / "memory.stat").write_text("anon 4000\ninactive_file 80\nactive_file 16\n")
    # What is cached of files can be taken, too.
    assert free_bytes(tmp_path) == 1000 + 96


def test_windows_fit_in_the_memory_of_a_gpu():
    stats = {"bytes_limit": 600 * 10**6, "bytes_in_use": 88 * 10**6}
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    channels = open_movie(np.zeros((1000, 256, 256), np.uint16)).channels
    for halo_frames in (0, 5):
        for gpus in ([gpu], [gpu, gpu]):
            chunk_frames, workers = plan_chunks(channels, halo_frames, gpus)
            assert workers == 2 * len(gpus)
            # A dozen float32 images and more of a window, for both windows on a GPU.
            window_bytes = (chunk_frames + 2 * halo_frames) * 256**2 * 4 * 12
            assert 2 * window_bytes < 512 * 10**6
    # Of one that does not say, that of the machine holds.
    silent = SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert plan_chunks(channels, 0, [silent])[1] <= 2


@pytest.fixture
def limit_frames(monkeypatch):
    """Sets the most frames for which the device has memory."""

    def limit(most):
        def compile_estimate(*arguments):
            estimate = compiled(*arguments)

            def limited(frames, *others):
                if len(frames[0]) > most:
                    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                return estimate(frames, *others)

            return limited

        monkeypatch.setattr(compute, "compile_estimate", compile_estimate)

    compiled = compute.compile_estimate
    return limit


@pytest.mark.slow
def test_a_device_without_memory_gets_smaller_chunks(limit_frames, tmp_path):
    # Chunks of 23 and 11 frames, of which the shorter ones see two more on either side.
    limit_frames(15)
    path = tmp_path / "bkgd.tif"
    with pytest.warns(
        UserWarning, match="EXHAUSTED.*; starting over, with chunks of 11 frames"
    ):
        estimate_movie(FRAMES, MovingSum(2), path)
    expected = np.asarray(MovingSum(2)(FRAMES).bkgds)
    np.testing.assert_array_equal(tifffile.imread(path), expected)


@pytest.mark.filterwarnings("ignore:.*starting over")
@pytest.mark.parametrize("chunk_frames", [None, 16])
def test_chunks_get_smaller_once_unless_they_are_given(
    chunk_frames, limit_frames, tmp_path
):
    limit_frames(6)
    options: Any = {"chunk_frames": chunk_frames}
    with pytest.raises(MovieError, match="EXHAUSTED: Out of memory"):
        estimate_movie(FRAMES, MovingSum(2), tmp_path / "bkgd.tif", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*starting over")
def test_smaller_chunks_are_resumed_and_kept(limit_frames, monkeypatch, tmp_path):
    path, options = tmp_path / "bkgd.tif", dict[str, Any](workers=1)

    def end(chunk: int) -> None:
        if chunk == 1:
            raise KeyboardInterrupt

    limit_frames(15)
    with monkeypatch.context() as patched:
        note = TiffSink.note
        patched.setattr(TiffSink, "note", lambda sink, n: (note(sink, n), end(n)))
        with pytest.raises(KeyboardInterrupt):
            estimate_movie(FRAMES, MovingSum(2), path, **options)
    limit_frames(6)
    with pytest.raises(MovieError, match="EXHAUSTED: Out of memory"):
        estimate_movie(FRAMES, MovingSum(2), path, **options)
    limit_frames(15)
    summary = estimate_movie(FRAMES, MovingSum(2), path, **options)
    assert (summary.chunk_frames, summary.resumed_frames) == (11, 22)
    expected = np.asarray(MovingSum(2)(FRAMES).bkgds)
    np.testing.assert_array_equal(tifffile.imread(path), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*starting over")
def test_a_short_last_chunk_without_memory_makes_all_smaller(monkeypatch):
    sink, errors = np.empty(FRAMES.shape, np.float32), [OutOfMemory("no memory")]
    run_window = compute.run_window

    def limited(name, estimate, chunks, window, *others):
        # The last one of 23 frames.
        if window.start == 16 and errors:
            raise errors.pop()
        return run_window(name, estimate, chunks, window, *others)

    monkeypatch.setattr(compute, "run_window", limited)
    monkeypatch.setattr(plan, "_CACHED_PIXELS", 11 * FRAMES[0].size)
    summary = estimate_movie(FRAMES, MovingSum(2), sink)
    assert summary.chunk_frames == 4
    np.testing.assert_array_equal(sink, MovingSum(2)(FRAMES).bkgds)


def test_half_of_a_chunk_is_a_multiple_of_the_shortest():
    halves = {96: 64, 64: 32, 32: 0}
    for frames, half in halves.items():
        assert Plan([], frames, 1, unit_frames=32).shorter_frames == half
    assert [Plan(None, frames, 1).shorter_frames for frames in (5, 2, 1)] == [2, 1, 0]


MASK = np.random.default_rng(3).integers(0, 3, FRAMES.shape).astype(np.uint8)


@pytest.mark.slow
def test_weights_are_cut_as_the_frames_are(tmp_path):
    boxes = [(0, 0, 16, 20), (15, 0, 31, 20)]
    path = tmp_path / "mask.npy"
    np.save(path, MASK)
    for weights, masks in (
        (MASK[0], [MASK[0], MASK[0]]),
        (path, [MASK, MASK]),
        ([MASK[0], None], [MASK[0], np.ones_like(MASK)]),
    ):
        sinks = [np.empty((23, 20, 16), np.float32) for _ in boxes]
        options = {"boxes": boxes, "weights": weights, "chunk_frames": 4}
        estimate_movie(FRAMES, Weighted(2), sinks, **options)
        for (x0, _, x1, _), mask, written in zip(boxes, masks, sinks, strict=True):
            # Whole numbers, whose sums are exact.
            frames = (FRAMES * mask.astype(float))[..., x0:x1]
            whole = [frames[max(0, t - 2) : t + 3].sum(0) for t in range(23)]
            np.testing.assert_array_equal(written, whole)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (MASK[:, :19], r"\(23, 1, 19, 31\).*1 or 23 frames, one channel, and 20 x 31"),
        (MASK[:4], "1 or 23 frames"),
        (np.stack([MASK, MASK], 1), "one channel"),
        ([MASK, MASK], "1 channels, but weights for 2"),
        (MASK[0] - 1.0, "negative or not finite"),
        (np.where(MASK, np.nan, 1), "negative or not finite"),
        (0.5, "the weights: is a float"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        estimate_movie(FRAMES, Weighted(0), tmp_path / "bkgd.tif", weights=weights)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="SpatialMean takes no weights"):
        estimate_movie(FRAMES, ESTIMATOR, tmp_path / "bkgd.tif", weights=weights)


@pytest.mark.slow
def test_residuals_and_snr_are_those_of_the_background_above_the_offset():
    above = FRAMES - np.float32(100)
    background = ESTIMATOR(above)
    for quantity, expected in (
        ("residual", background.residuals(above)),
        ("snr", background.snr(above, CAMERA)),
    ):
        written = _written(FRAMES, quantity=quantity, camera=CAMERA)
        # Fused otherwise than one by one: a rounding each.
        np.testing.assert_allclose(written, expected, rtol=1e-6, atol=1e-6 * 65536)
    np.testing.assert_array_equal(_written(FRAMES, camera=CAMERA), background.bkgds)


@pytest.mark.slow
def test_uint16_is_rounded_to_the_nearest_number_and_clipped():
    bkgds = np.asarray(ESTIMATOR(FRAMES - np.float32(30000)).bkgds)
    expected = np.clip(np.rint(bkgds), 0, 65535)
    written = np.empty(FRAMES.shape, np.uint16)
    summary = estimate_movie(
        FRAMES, ESTIMATOR, written, camera=Camera(30000), dtype="uint16"
    )
    np.testing.assert_array_equal(written, expected)
    is_clipped = (expected != np.rint(bkgds)).any((1, 2))
    assert summary.clipped_frames == is_clipped.sum() > 0


@pytest.mark.slow
def test_residuals_with_a_pedestal_are_written_as_uint16():
    above = FRAMES - np.float32(100)
    residuals = np.asarray(ESTIMATOR(above).residuals(above))
    options = {"quantity": "residual", "camera": CAMERA, "pedestal": 30000}
    written = _written(FRAMES, **options, dtype="uint16")
    # Where a residual is a half, another rounding of float32 may be another number.
    error = np.abs(written - np.clip(np.rint(residuals + 30000), 0, 65535))
    assert error.max() <= 1
    assert (error > 0).mean() < 0.01
    np.testing.assert_allclose(_written(FRAMES, **options), residuals + 30000, atol=0.01)


@pytest.mark.parametrize("frames", [slice(5, 12), slice(1, None, 4)])
def test_some_frames_are_estimated_as_a_movie_of_their_own(frames):
    movie = CountingMovie(FRAMES)
    options = {"weights": MASK, "chunk_frames": 3}
    own = _written(FRAMES[frames], Weighted(2), **options | {"weights": MASK[frames]})
    out = np.empty_like(own)
    estimate_movie(movie, Weighted(2), out, frames=frames, **options, progress=False)
    np.testing.assert_array_equal(out, own)
    # Frames far apart are read one by one, which is not counted.
    assert movie.counts[12:].sum() == movie.counts[:5].sum() == 0


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("x.ome.tif", "x-snr.tif"),
        ("x.1.dax", "x.1-snr.tif"),
        ("x.zarr/", "x-snr.tif"),
        ("run.1/", "run.1-snr.tif"),
        ("movie_*.tif", "movie-snr.tif"),
    ],
)
def test_a_result_has_a_name_beside_its_movie(name, beside, tmp_path):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
        (path / ("zarr.json" if "zarr" in name else "frame.tif")).touch()
    elif "*" not in name:
        path.touch()
    assert paths_beside(path, "snr") == [tmp_path / beside]
    boxes = [(0, 0, 1, 1), (1, 0, 2, 1)]
    first = tmp_path / beside.replace(".tif", "-1.tif")
    assert paths_beside(path, "snr", boxes)[0] == first
    assert paths_beside([path, "y.tif"], "snr")[1].name == "y-snr.tif"


@pytest.mark.slow
def test_a_path_is_enough_to_estimate_a_movie(movie_path, tmp_path, monkeypatch):
    seen = []

    def calibrate(source, *, boxes, frames, **options):
        seen.append((source.name, boxes, frames, options["camera"]))
        return ESTIMATOR, None

    monkeypatch.setattr(_run, "calibrate", calibrate)
    frames, sink = slice(0, 22), tmp_path / "movie-background.tif"
    summary = estimate_movie(movie_path, frames=frames)
    assert summary.paths == (sink,)
    assert summary.estimator.to_json() == ESTIMATOR.to_json()
    assert seen == [(str(movie_path), None, frames, None)]
    with open_movie(sink) as written:
        np.testing.assert_array_equal(written.channels[0][:], BKGDS[:22])
    # Before the calibration.
    for source, message in ((movie_path, "exists already"), (FRAMES, "give a sink")):
        with pytest.raises(MovieError, match=message):
            estimate_movie(source)
    assert len(seen) == 1


@pytest.mark.long
def test_the_light_is_that_of_the_whole_movie():
    frames = np.maximum(FRAMES, 1000)
    estimator = LocalMean(1.0, 1.0, clip=None, max_radius_frames=4)
    out = np.empty_like(BKGDS)
    (light,) = estimate_movie(frames, estimator, out, chunk_frames=6).lights
    # Chunks begin at blocks of frames, and their light is to the bit the same.
    np.testing.assert_array_equal(light, estimator(frames).illumination)
    assert estimate_movie(FRAMES, ESTIMATOR, out).lights == (None,)


@pytest.mark.slow
def test_channels_have_their_own_radii_offsets_and_noise_factors():
    boxes = [(0, 0, 16, 20), (15, 0, 31, 20)]
    estimator = SpatialMean([[1.0, 2.0], [1.5, 1.5]])
    parts = [FRAMES[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
    above = [parts[0] - np.float32(100), parts[1] - np.float32(200)]
    background, cameras = estimator(above), [Camera(100), Camera(200)]
    stacked = np.empty((23, 2, 20, 16), np.float32)
    sinks = [np.empty(part.shape, np.float32) for part in parts]
    for source, sink, cut in (
        (parts, [np.empty_like(sinks[0]), np.empty_like(sinks[0])], None),
        (FRAMES, sinks, boxes),
        (np.stack(parts, axis=1), stacked, None),
    ):
        summary = estimate_movie(source, estimator, sink, camera=cameras, boxes=cut)
        written = sink if isinstance(sink, list) else np.moveaxis(sink, 1, 0)
        np.testing.assert_array_equal(np.stack([*written]), np.stack(background.bkgds))
        np.testing.assert_allclose(
            summary.noise_corrections, background.noise_corrections, rtol=1e-6
        )


@pytest.mark.slow
def test_frames_that_are_not_finite_are_counted():
    frames = FRAMES.astype(np.float32)
    frames[5, 3, 3], frames[17, 0, 0] = np.nan, np.inf
    out = np.empty_like(frames)
    summary = estimate_movie(frames, ESTIMATOR, out)
    assert summary.nonfinite_frames == 2
    assert np.isfinite(out).all((1, 2)).sum() == 21
    with pytest.raises(MovieError, match="frame 5 is not finite"):
        _written(frames, dtype="uint16", chunk_frames=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "mean"}, "quantity must be one of.*'mean'"),
        ({"dtype": "int8"}, "dtype must be one of.*'int8'"),
        ({"quantity": "snr"}, "needs the gain of the camera"),
        ({"camera": 2 * [Camera()]}, "1 channels, but 2 cameras"),
        ({"camera": Camera(np.zeros((20, 30)))}, r"\(20, 30\), but frames are 20 x 31"),
        ({"quantity": "residual", "dtype": "uint16"}, "uint16 is not; give a pedestal"),
        (
            {"quantity": "snr", "camera": CAMERA, "dtype": "uint16", "pedestal": 9},
            "uint16 is not",
        ),
        ({"pedestal": np.inf}, "pedestal must be finite.*inf"),
        ({"pedestal": "100"}, "pedestal must be a number of ADU, but is '100'"),
        ({"frames": slice(23, None)}, "23::.*hold none"),
        ({"chunk_frames": 0}, "chunk_frames must be a whole number from 1.*0"),
        ({"workers": -1}, "workers must be a whole number from 1.*-1"),
        ({"workers": 1.5}, r"workers must be a whole number from 1.*1\.5"),
        ({"boxes": []}, "at least one"),
        ({"boxes": [(0, 0, 32, 20)]}, r"\(0, 0, 32, 20\) is not inside"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    options, message, tmp_path, as_installed
):
    with pytest.raises((TypeError, ValueError), match=message):
        estimate_movie(FRAMES, ESTIMATOR, tmp_path / "bkgd.tif", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def movie_path(tmp_path):
    path = tmp_path / "movie.npy"
    np.save(path, FRAMES)
    return path


def _before_frame(frame, monkeypatch, do):
    """Lets something happen when a chunk is read that holds this frame."""
    read = Movie.read

    def reading(self, start, stop, channel=0):
        # A fingerprint reads single frames, chunks here are of more.
        if start <= frame < stop and stop - start > 1:
            do()
        return read(self, start, stop, channel)

    monkeypatch.setattr(Movie, "read", reading)


def _fail_at(frame, monkeypatch):
    def fail():
        raise MovieError(f"movie.npy: frame {frame} cannot be read")

    _before_frame(frame, monkeypatch, fail)


OPTIONS = {"chunk_frames": 3, "workers": 1, "progress": False}


def _leave_unfinished(source, sink, monkeypatch, **options):
    """Ends an estimate in the middle, and gives the error."""
    with monkeypatch.context() as failing:
        _fail_at(12, failing)
        with pytest.raises(MovieError, match="frame 12") as raised:
            estimate_movie(source, ESTIMATOR, sink, **OPTIONS, **options)
    return raised.value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.ome.tif", "bkgd.zarr", "bkgd.ome.zarr"])
def test_what_an_error_leaves_is_gone_on_with(name, movie_path, tmp_path, monkeypatch):
    sink = tmp_path / name
    error = _leave_unfinished(movie_path, sink, monkeypatch)
    assert error.__notes__ == [
        f"the finished part is kept in {sink}.part; run the same again to resume"
    ]
    assert not sink.exists()
    done = len((tmp_path / f"{name}.part.journal").read_text().splitlines()) - 1
    assert done == 4
    # The length of the chunks is that of the run before.
    summary = estimate_movie(movie_path, ESTIMATOR, sink, workers=2)
    assert (summary.resumed_frames, summary.chunk_frames) == (3 * done, 3)
    with open_movie(sink) as written:
        np.testing.assert_array_equal(written.channels[0][:], BKGDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "movie.npy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"camera": Camera(3)}, "camera"),
        ({"pedestal": 3.0}, "pedestal 0.0, not 3.0"),
        ({"frames": slice(0, 22)}, "frames"),
        ({"chunk_frames": 4}, "chunk_frames 3, not 4"),
        ({"estimator": SpatialMean((1.0, 2.1))}, "estimator"),
        ({"source": FRAMES + 1}, "source"),
        ({"estimator": Weighted(0), "weights": MASK[0]}, "weights"),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(
    change, name, movie_path, tmp_path, monkeypatch
):
    sink = tmp_path / "bkgd.tif"
    _leave_unfinished(movie_path, sink, monkeypatch)
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = {"source": movie_path, "estimator": ESTIMATOR, "sink": sink} | OPTIONS
    with pytest.raises(MovieError, match=rf"begun with other settings \(.*{name}.*--fresh"):
        estimate_movie(**arguments | change)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left
    if name == "source":
        estimate_movie(**arguments | change, resume=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bkgd.tif", "movie.npy"]


def _content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.zarr", None])
def test_ctrl_c_waits_for_no_thread_and_nothing_is_written_after_it(
    name, presses, movie_path, tmp_path, monkeypatch
):
    sink = np.zeros_like(BKGDS) if name is None else tmp_path / name
    may_go_on, threads = threading.Event(), []

    def interrupt():
        threads.append(threading.current_thread())
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        # As in a call of XLA, until the test has seen that nobody waits for it.
        may_go_on.wait()

    with monkeypatch.context() as interrupting:
        _before_frame(12, interrupting, interrupt)
        with pytest.raises(KeyboardInterrupt):
            estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
        left = sink.copy() if name is None else _content(tmp_path)
        may_go_on.set()
        for thread in threads:
            thread.join()
    if name is None:
        np.testing.assert_array_equal(sink, left)
        np.testing.assert_array_equal(sink[:12], BKGDS[:12])
        return
    assert _content(tmp_path) == left
    assert not (tmp_path / name).exists()
    assert estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS).resumed_frames == 12
    with open_movie(sink) as written:
        np.testing.assert_array_equal(written.channels[0][:], BKGDS)


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_calibrate_again(movie_path, tmp_path, monkeypatch):
    calibrations = []

    def calibrate(source, **_):
        calibrations.append(source)
        # A radius of which a text may not give the last digit.
        return SpatialMean(1.5 + 1 / 3), None

    monkeypatch.setattr(_run, "calibrate", calibrate)
    sink = tmp_path / "bkgd.tif"
    with monkeypatch.context() as failing:
        _fail_at(12, failing)
        with pytest.raises(MovieError, match="frame 12"):
            estimate_movie(movie_path, None, sink, **OPTIONS)
    # Another estimator is still another job.
    with pytest.raises(MovieError, match=r"other settings \(calibration; estimator"):
        estimate_movie(movie_path, SpatialMean(1.5), sink, **OPTIONS)
    summary = estimate_movie(movie_path, None, sink, **OPTIONS)
    assert (summary.resumed_frames, len(calibrations)) == (12, 1)
    with open_movie(movie_path) as movie, open_movie(sink) as written:
        frames = movie.channels[0][:]
        bkgds = summary.estimator(frames).bkgds
        np.testing.assert_array_equal(written.channels[0][:], bkgds)
    estimate_movie(movie_path, None, sink, resume=False, overwrite=True, **OPTIONS)
    assert len(calibrations) == 2


def test_a_source_whose_time_alone_changes_is_the_same(movie_path, tmp_path, monkeypatch):
    sink = tmp_path / "bkgd.tif"
    _leave_unfinished(movie_path, sink, monkeypatch)
    os.utime(movie_path, (1, 1))
    _before_frame(12, monkeypatch, lambda: os.utime(movie_path, (2, 2)))
    with pytest.warns(
        UserWarning, match=r"movie\.npy: its time of modification has changed"
    ):
        summary = estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
    assert summary.resumed_frames == 12
    with open_movie(sink) as written:
        np.testing.assert_array_equal(written.channels[0][:], BKGDS)


def test_a_source_that_changes_meanwhile_is_no_result(movie_path, tmp_path, monkeypatch):
    _before_frame(12, monkeypatch, lambda: np.save(movie_path, FRAMES[::-1]))
    with pytest.raises(MovieError, match="changed since it was opened"):
        estimate_movie(movie_path, ESTIMATOR, tmp_path / "bkgd.tif", **OPTIONS)
    assert not (tmp_path / "bkgd.tif").exists()


def test_a_source_is_never_written_to(movie_path, tmp_path):
    (tmp_path / "link.tif").symlink_to(movie_path)
    with pytest.raises(MovieError, match="is the movie itself"):
        estimate_movie(movie_path, ESTIMATOR, tmp_path / "link.tif", overwrite=True)
    with pytest.raises(MovieError, match="two channels"):
        estimate_movie(
            [FRAMES, FRAMES], ESTIMATOR, [tmp_path / "b.tif", tmp_path / "b.tif"]
        )


@pytest.mark.parametrize("source", ["movie", "movie/*.tif"])
def test_a_result_does_not_become_a_part_of_its_movie(source, tmp_path):
    (tmp_path / "movie").mkdir()
    for index, frame in enumerate(FRAMES[:3]):
        tifffile.imwrite(tmp_path / "movie" / f"{index}.tif", frame)
    with pytest.raises(MovieError, match="would be a part of it"):
        estimate_movie(tmp_path / source, ESTIMATOR, tmp_path / "movie" / "bkgd.tif")
    estimate_movie(tmp_path / source, ESTIMATOR, tmp_path / "bkgd.tif")


def test_a_draft_that_is_broken_is_said_to_be(movie_path, tmp_path, monkeypatch):
    sink = tmp_path / "bkgd.tif"
    _leave_unfinished(movie_path, sink, monkeypatch)
    (tmp_path / "bkgd.tif.part").write_bytes(b"II*")
    with pytest.raises(MovieError, match=r"run is broken; start over .*--fresh") as raised:
        estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
    assert not hasattr(raised.value, "__notes__")


def test_what_is_no_estimator_is_refused(as_installed):
    with pytest.raises(TypeError, match=r"SpatialMean\(7\.0\), but got 7\.0"):
        estimate_movie(FRAMES, cast(Any, 7.0), np.empty_like(BKGDS))
    with pytest.raises(ValueError, match=r"MovingSum\.halo_frames must be a whole.*-1"):
        estimate_movie(FRAMES, MovingSum(-1), np.empty_like(BKGDS))


def test_a_result_is_replaced_only_when_asked_and_only_in_the_end(
    movie_path, tmp_path, monkeypatch
):
    sink = tmp_path / "bkgd.tif"
    sink.write_text("precious")
    with pytest.raises(MovieError, match="exists already"):
        estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
    _leave_unfinished(movie_path, sink, monkeypatch, overwrite=True)
    assert sink.read_text() == "precious"
    estimate_movie(movie_path, ESTIMATOR, sink, overwrite=True, **OPTIONS)
    np.testing.assert_array_equal(open_movie(sink).channels[0][:], BKGDS)


def _kill_at(kind, method, folder, monkeypatch, run):
    """Leaves the folder as it is when the process is killed as it calls this method."""
    aside = folder.with_name("aside")
    with monkeypatch.context() as killed:

        def copy_and_end(self, *arguments):
            shutil.copytree(folder, aside)
            raise ZeroDivisionError

        killed.setattr(kind, method, copy_and_end)
        with pytest.raises(ZeroDivisionError):
            run()
    shutil.rmtree(folder)
    aside.rename(folder)


def test_a_new_draft_never_passes_for_an_old_one(movie_path, tmp_path, monkeypatch):
    """As if the process was killed after it had begun anew, before it noted that."""
    sink = tmp_path / "bkgd.tif"
    _leave_unfinished(movie_path, sink, monkeypatch)
    _kill_at(
        *(Journal, "begin", tmp_path, monkeypatch),
        lambda: estimate_movie(movie_path, ESTIMATOR, sink, resume=False, **OPTIONS),
    )
    assert estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS).resumed_frames == 0


def test_two_runs_do_not_write_the_same_result(movie_path, tmp_path):
    journal = Journal(tmp_path / "b.tif.part.journal")
    journal.clear()
    sinks = [tmp_path / "a.tif", tmp_path / "b.tif"]
    with pytest.raises(MovieError, match=r"b\.tif\.part\.journal: is in use"):
        estimate_movie([movie_path, movie_path], ESTIMATOR, sinks)
    journal.close()


@pytest.mark.slow
def test_each_result_is_gone_on_with_by_its_own_journal(movie_path, tmp_path, monkeypatch):
    """Another job may have begun one of the results anew since."""
    a, b = tmp_path / "a.tif", tmp_path / "b.tif"
    np.save(tmp_path / "other.npy", FRAMES[::-1])
    _leave_unfinished([movie_path, movie_path], [a, b], monkeypatch)
    _leave_unfinished([tmp_path / "other.npy"], [b], monkeypatch, resume=False)
    with pytest.raises(MovieError, match=r"b\.tif.*begun with other settings .*source"):
        estimate_movie([movie_path, movie_path], ESTIMATOR, [a, b], **OPTIONS)


@pytest.mark.parametrize("kept", [True, False])
def test_a_result_that_was_given_its_name_is_believed_if_it_is_there(
    kept, movie_path, tmp_path, monkeypatch
):
    """As if the process was killed after the last step but one."""
    sink = tmp_path / "bkgd.zarr"
    _kill_at(
        *(Journal, "remove", tmp_path, monkeypatch),
        lambda: estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS),
    )
    if not kept:
        shutil.rmtree(sink)
    summary = estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
    assert summary.resumed_frames == (23 if kept else 0)
    np.testing.assert_array_equal(open_movie(sink).channels[0][:], BKGDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bkgd.zarr", "movie.npy"]


def test_a_job_that_ends_between_two_names_is_gone_on_with(
    movie_path, tmp_path, monkeypatch
):
    sinks, give_name = [tmp_path / "a.tif", tmp_path / "b.zarr"], Sink.give_name

    def fail_at_zarr(self):
        assert self.path.suffix != ".zarr"
        give_name(self)

    with monkeypatch.context() as killed:
        killed.setattr(Sink, "give_name", fail_at_zarr)
        # The second run finds the first result with its name, and ends there, too.
        for _ in range(2):
            with pytest.raises(AssertionError):
                estimate_movie([movie_path, movie_path], ESTIMATOR, sinks, **OPTIONS)
            assert [sink.exists() for sink in sinks] == [True, False]
    estimate_movie([movie_path, movie_path], ESTIMATOR, sinks, **OPTIONS)
    for sink in sinks:
        np.testing.assert_array_equal(open_movie(sink).channels[0][:], BKGDS)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.tif", "b.zarr", "movie.npy"]


@pytest.mark.parametrize("end", [b"1", b"\x00\x00", b'{"a', b"[]\n", b"13\nnull\n"])
def test_the_torn_end_of_a_journal_is_not_believed(end, tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.clear()
    journal.begin({"a": 1})
    journal.add(12)
    journal.close()
    path.write_bytes(path.read_bytes() + end)
    journal = Journal(path)
    # Either what is whole is believed, or nothing.
    assert (journal.settings, journal.done) in (({"a": 1}, {12}), (None, set()))
    if journal.settings:
        journal.add(3)
        journal.close()
        journal = Journal(path)
        assert journal.done == {12, 3}
    journal.close()


def test_a_line_for_which_there_is_no_room_is_an_error_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    journal = Journal(tmp_path / "journal")
    journal.clear()
    journal.begin({})
    journal.add(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space|too large"):
            journal.add(234)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.add(5)
    journal.close()
    journal = Journal(tmp_path / "journal")
    assert journal.done == {1, 5}
    journal.close()


def test_an_array_is_not_written_over_while_it_is_read():
    frames = FRAMES.astype(np.float32)
    with pytest.raises(ValueError, match="shares memory"):
        estimate_movie(frames, MovingSum(2), frames)


@pytest.mark.slow
def test_64_bit_mode_is_that_of_the_call():
    frames = FRAMES.astype(np.float64) + 1e-7
    with jax.enable_x64(True):
        expected = np.asarray(SpatialMean(1.5)(frames).bkgds, np.float32)
        written = np.empty(frames.shape, np.float32)
        estimate_movie(frames, SpatialMean(1.5), written, chunk_frames=4)
    np.testing.assert_array_equal(written, expected)


def test_a_full_disk_is_said_in_one_line_and_what_is_done_is_kept(
    movie_path, tmp_path, monkeypatch
):
    sink = tmp_path / "bkgd.tif"
    kind: Any = type(open_sink(sink, Layout((1, 1, 1, 1), np.dtype("f4"), 1)))
    write = kind._write

    def writing(self, start, frames):
        if start >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, start, frames)

    with monkeypatch.context() as full:
        full.setattr(kind, "_write", writing)
        with pytest.raises(MovieError, match=r"bkgd\.tif: .*No space left on device"):
            estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS)
    assert estimate_movie(movie_path, ESTIMATOR, sink, **OPTIONS).resumed_frames >= 12
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(MovieError, match=r"bkgd\.zarr: needs 0\.00 GB"):
        estimate_movie(movie_path, ESTIMATOR, tmp_path / "bkgd.zarr", **OPTIONS)


def test_a_folder_that_is_removed_meanwhile_is_said(movie_path, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    _before_frame(12, monkeypatch, lambda: shutil.rmtree(folder))
    with pytest.raises(MovieError, match=r"bkgd\.tif\.part has been removed"):
        estimate_movie(movie_path, ESTIMATOR, folder / "bkgd.tif", **OPTIONS)


# Imports jaxbkgd once, forks for each run, and kills it at a random moment of the time that
# a whole run takes.
_KILLING = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from jaxbkgd import estimate_movie, SpatialMean

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
source, names = folder / "movie.npy", ("bkgd.tif", "bkgd.ome.zarr")

def started(to):
    child = os.fork()
    if child == 0:
        sinks = [folder / to / name for name in names]
        estimate_movie([source, source], SpatialMean(1.5), sinks, chunk_frames=1)
        os._exit(0)
    return child

def contents(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(file.relative_to(path), file.read_bytes()) for file in files if file.is_file()]

# The first one fills the cache of compiled programs.
for to in ("first", "whole"):
    (folder / to).mkdir()
    clock = time.monotonic()
    assert os.waitpid(started(to), 0)[1] == 0
    seconds = time.monotonic() - clock

random, killed, ended = random.Random(1), 0, 0
while killed < kills or not ended:
    (folder / "killed").mkdir(exist_ok=True)
    child = started("killed")
    if killed < kills:
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    there = [name for name in names if (folder / "killed" / name).exists()]
    for name in there:
        assert contents(folder / "killed" / name) == contents(folder / "whole" / name)
    left = sorted(path.name for path in (folder / "killed").iterdir())
    if status == 0:
        assert left == sorted(names)
    # A run may be killed when it has ended but for the process.
    if status == 0 or (len(there) == 2 and "bkgd.tif.part.journal" not in left):
        shutil.rmtree(folder / "killed")
    ended += status == 0
    killed += status == signal.SIGKILL
print(killed, "killed,", ended, "ended")
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_files(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4000, (150, 32, 40)).astype(np.uint16)
    np.save(tmp_path / "movie.npy", frames)
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", _KILLING, str(tmp_path), "3"]
    run = subprocess.run(
        command, env=os.environ | caching, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("3 killed")


# An estimator of a user's, with fields whose text holds addresses.
_OF_A_USER = """
import os, signal, sys
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from jaxbkgd import AbstractEstimator, Background, estimate_movie, Movie

class Scale:
    def __init__(self, factor):
        self.factor, self.itself = factor, self

class OfUser(AbstractEstimator):
    log: object = eqx.field(static=True)
    scale: object = eqx.field(static=True)
    jitted: object = eqx.field(static=True, default=jax.jit(jnp.exp))
    function: object = eqx.field(static=True, default=jax.nn.relu)

    @property
    def halo_frames(self):
        return 0

    def estimate_stack(self, frames):
        bkgds = self.function(frames.astype(float) + self.scale.factor) * 0.5
        return Background(bkgds, jnp.ones(()))

source, sink, kill_at, factor = sys.argv[1:]
read = Movie.read

def reading(self, start, stop, channel=0):
    if start <= int(kill_at) < stop and stop - start > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, start, stop, channel)

Movie.read = reading
estimator = OfUser(np.log, Scale(float(factor)))
options = {"chunk_frames": 3, "workers": 1}
print(estimate_movie(source, estimator, sink, **options).resumed_frames)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_an_estimator_of_a_user_is_known_again_in_another_process(movie_path, tmp_path):
    sink = tmp_path / "bkgd.tif"

    def run(kill_at, factor):
        command = [sys.executable, "-c", _OF_A_USER, movie_path, sink, kill_at, factor]
        # With one device, where there are two in the process of these tests.
        environment = os.environ | {"XLA_FLAGS": ""}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )

    killed = run("12", "1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run("-1", "1")
    assert resumed.stdout.strip() == "12", resumed.stderr
    with open_movie(sink) as written:
        expected = (FRAMES + np.float32(1)) * np.float32(0.5)
        np.testing.assert_array_equal(written.channels[0][:], expected)


def test_an_estimator_that_no_other_run_could_know_again_is_refused(tmp_path):
    class Holding(MovingSum):
        held: Any = eqx.field(static=True, default_factory=threading.Lock)

    for held in (threading.Lock(), lambda: 1):
        with pytest.raises(TypeError, match=r"Holding holds .*could not be resumed"):
            estimate_movie(FRAMES, Holding(0, held), tmp_path / "bkgd.tif", progress=False)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(_written(FRAMES, Holding(0)), FRAMES)


@pytest.mark.slow
def test_two_threads_may_estimate_at_once():
    with ThreadPoolExecutor(2) as threads:
        for written in threads.map(_written, [FRAMES, FRAMES[::-1]] * 2):
            is_forward = written[0, 0, 0] == BKGDS[0, 0, 0]
            np.testing.assert_array_equal(written, BKGDS if is_forward else BKGDS[::-1])


class TwoColours(Movie):
    """A reader of a user's: the second channel is the first one backwards."""

    def __init__(self):
        super().__init__(np.stack([FRAMES] * 2, axis=1), name="two", format="mine")

    def read(self, start, stop, channel=0):
        return (FRAMES[::-1] if channel else FRAMES)[start:stop]


@pytest.mark.slow
def test_a_reader_of_a_user_with_several_channels_is_a_source():
    out = np.empty((23, 2, 20, 31), np.float32)
    estimate_movie(TwoColours(), ESTIMATOR, out, chunk_frames=4, progress=False)
    np.testing.assert_array_equal(out, np.stack([BKGDS, BKGDS[::-1]], axis=1))
    # And so is a list of its channels, or one of them.
    outs = [np.empty_like(BKGDS) for _ in range(2)]
    estimate_movie(TwoColours().channels, ESTIMATOR, outs, progress=False)
    np.testing.assert_array_equal(np.stack(outs, axis=1), out)
    second = TwoColours().channels[1]
    np.testing.assert_array_equal(_written(second), BKGDS[::-1])


def test_a_movie_without_frames_is_refused_in_one_line():
    with pytest.raises(MovieError, match=r"the array: has no frames$"):
        _written(FRAMES[:0])


# Frames of more pixels than stay in cache.
LARGE = np.random.default_rng(2).normal(100, 10, (3, 1100, 1000)).astype(np.float32)
WITH_NAN = LARGE.copy()
WITH_NAN[1, [10, 549, 551, 1090], 20] = np.nan, np.nan, np.inf, np.nan


@pytest.mark.long
@pytest.mark.parametrize(
    ("radius_pix", "source", "boxes"),
    [
        (1.0, WITH_NAN, None),
        (1.0, LARGE, [(0, 0, 500, 1100), (500, 0, 1000, 1100)]),
        (1.0, [LARGE, WITH_NAN[:, :1080]], None),
        (60.0, WITH_NAN, None),
    ],
)
def test_large_frames_between_arrays_are_estimated_as_a_whole_to_the_bit(
    radius_pix, source, boxes
):
    estimator = SpatialMean(radius_pix)
    frames = source if isinstance(source, list) else [source]
    if boxes is not None:
        frames = [LARGE[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
    out = [np.empty(channel.shape, np.float32) for channel in frames]
    sink = out if len(out) > 1 else out[0]
    options = {"boxes": boxes, "camera": Camera(5.0), "progress": False}
    summary = estimate_movie(source, estimator, sink, **options)
    assert summary.nonfinite_frames == sum(
        any(not np.isfinite(channel[frame]).all() for channel in out) for frame in range(3)
    )
    for written, channel in zip(out, frames, strict=True):
        expected = estimator(channel - np.float32(5.0)).bkgds
        np.testing.assert_array_equal(written, expected)

"""Memory that is used for chunk after chunk."""

import functools as ft

import jax
import numpy as np
import pytest

from jaxbkgd import estimate_movie, LocalMean, open_movie, SpatialMean
from jaxbkgd._batch import plan, run
from jaxbkgd._batch.compute import Buffers
from jaxbkgd._movies.sinks import ArraySink


FRAMES = np.random.default_rng(0).integers(0, 65536, (23, 20, 31)).astype(np.uint16)
ESTIMATOR = SpatialMean((1.0, 2.0))


def _is_read_in_place(array):
    return jax.device_put(array, may_alias=True).unsafe_buffer_pointer() == (
        array.ctypes.data
    )


@pytest.mark.parametrize("offset", range(0, 64, 8))
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_chunks_are_held_where_jax_reads_them_in_place(offset, dtype):
    memory = np.random.default_rng(1).integers(0, 100, 64 + 8000).astype(np.uint8)
    chunk = memory[offset : offset + 960 * np.dtype(dtype).itemsize].view(dtype)
    chunks = [chunk.reshape(4, 8, 30), chunk.reshape(4, 30, 8)[:, 1:-1]]
    buffers = Buffers(is_on_cpu=True, can_reuse=False)
    held = buffers.place(chunks)
    for one, other in zip(held, chunks, strict=True):
        assert _is_read_in_place(one)
        np.testing.assert_array_equal(one, other)
    again = buffers.place(chunks)
    assert [a.ctypes.data for a in again] == [h.ctypes.data for h in held]


def test_a_chunk_that_is_read_in_place_is_not_copied():
    (aligned,) = Buffers(is_on_cpu=True, can_reuse=False).place([FRAMES[:1, 1:]])
    assert Buffers(is_on_cpu=True, can_reuse=False).place([aligned])[0] is aligned


@pytest.fixture
def written_over(monkeypatch):
    """For each chunk that is estimated over a result, whether it lies where that did."""
    seen = []
    compile_estimate = run.compile_estimate

    def watched(estimate, channels, weights, donated):
        places = [image.unsafe_buffer_pointer() for image in donated or []]
        images, *flags = estimate(channels, weights, donated)
        if donated is not None:
            # By chance, it may be in memory that was given back.
            was_donated = all(image.is_deleted() for image in donated)
            new_places = [image.unsafe_buffer_pointer() for image in images]
            seen.append(was_donated and new_places == places)
        return images, *flags

    monkeypatch.setattr(
        run,
        "compile_estimate",
        lambda *arguments: ft.partial(watched, compile_estimate(*arguments)),
    )
    return seen


@pytest.mark.parametrize("source", [FRAMES, [FRAMES, FRAMES[:, :7]]])
def test_a_chunk_is_estimated_where_the_one_before_was(source, written_over):
    is_list = isinstance(source, list)
    out = [np.empty(s.shape, np.float32) for s in (source if is_list else [source])]
    sink = out if is_list else out[0]
    estimate_movie(source, ESTIMATOR, sink, chunk_frames=4, workers=1, progress=False)
    assert written_over == [True] * 6
    for written, frames in zip(out, source if is_list else [source], strict=True):
        np.testing.assert_array_equal(written, ESTIMATOR(frames).bkgds)


def test_what_a_sink_keeps_is_not_written_over(monkeypatch):
    kept = {}
    monkeypatch.setattr(ArraySink, "write", lambda _, *chunk: kept.update([chunk]))
    out = np.empty(FRAMES.shape, np.float32)
    estimate_movie(FRAMES, ESTIMATOR, out, chunk_frames=4, workers=1, progress=False)
    bkgds = np.concatenate([kept[start][:, 0] for start in sorted(kept)])
    np.testing.assert_array_equal(bkgds, ESTIMATOR(FRAMES).bkgds)


LARGE = np.random.default_rng(2).normal(100, 10, (3, 300, 70)).astype(np.float32)
WITH_NAN = LARGE.copy()
WITH_NAN[1, [149, 151, 290], 20] = np.nan, np.inf, np.nan


@pytest.mark.parametrize(
    ("source", "strips"),
    [
        (LARGE, 2),
        (WITH_NAN, 2),
        (LARGE.astype(np.uint16), 2),
        ([LARGE, WITH_NAN[..., ::-1]], 4),
        # The strips of these would not be the same.
        ([LARGE, LARGE[:, :280]], 1),
    ],
)
def test_large_frames_are_estimated_in_strips(source, strips, monkeypatch, written_over):
    monkeypatch.setattr(plan, "_CACHED_PIXELS", 10_000)
    is_list = isinstance(source, list)
    out = [np.empty(s.shape, np.float32) for s in (source if is_list else [source])]
    sink = out if is_list else out[0]
    summary = estimate_movie(source, ESTIMATOR, sink, progress=False)
    assert written_over == [True] * (3 * strips)
    sources = source if is_list else [source]
    assert summary.nonfinite_frames == (not all(np.isfinite(s).all() for s in sources))
    for written, frames in zip(out, sources, strict=True):
        np.testing.assert_array_equal(written, ESTIMATOR(frames).bkgds)


def test_strips_of_boxes_above_an_offset_fill_an_array_each(monkeypatch, written_over):
    monkeypatch.setattr(plan, "_CACHED_PIXELS", 5_000)
    boxes = [(0, 0, 35, 300), (35, 0, 70, 300)]
    out = [np.empty((3, 300, 35), np.float32) for _ in boxes]
    estimate_movie(LARGE, ESTIMATOR, out, boxes=boxes, offsets=5.0, progress=False)
    assert written_over == [True] * (3 * 4)
    for written, (left, _, right, _) in zip(out, boxes, strict=True):
        frames = LARGE[..., left:right] - np.float32(5.0)
        np.testing.assert_array_equal(written, ESTIMATOR(frames).bkgds)


@pytest.mark.parametrize(("radii_pix", "strips"), [((7.0, 15.0), 5), ((7.0, 30.0), 1)])
def test_frames_go_in_strips_where_the_engine_is_that_of_the_whole(
    radii_pix, strips, monkeypatch, written_over
):
    monkeypatch.setattr(plan, "_CACHED_PIXELS", 10_000)
    estimator = SpatialMean(radii_pix)
    frames = np.tile(LARGE, (1, 3, 1))
    out = np.empty(frames.shape, np.float32)
    estimate_movie(frames, estimator, out, progress=False)
    assert written_over == [True] * (3 * strips)
    np.testing.assert_array_equal(out, estimator(frames).bkgds)


def test_files_are_written_by_whole_frames(monkeypatch, written_over, tmp_path):
    monkeypatch.setattr(plan, "_CACHED_PIXELS", 10_000)
    path = tmp_path / "bkgd.tif"
    estimate_movie(LARGE, ESTIMATOR, path, chunk_frames=1, workers=1, progress=False)
    assert written_over == [True] * 3
    with open_movie(path) as written:
        np.testing.assert_array_equal(written.channels[0][:], ESTIMATOR(LARGE).bkgds)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (ESTIMATOR, {"quantity": "residual"}),
        (ESTIMATOR, {"dtype": "uint16"}),
        (LocalMean(2.0, 1.0), {}),
    ],
)
def test_other_results_have_memory_of_their_own(estimator, options, written_over):
    out = np.empty(FRAMES.shape, options.get("dtype", np.float32))
    estimate_movie(
        *(FRAMES, estimator, out), chunk_frames=4, workers=1, progress=False, **options
    )
    assert not written_over
    estimate_movie(
        *(FRAMES, estimator, expected := np.empty_like(out)), progress=False, **options
    )
    np.testing.assert_array_equal(out, expected)


def test_frames_of_64_bits_give_what_they_do_by_themselves(x64):
    frames = FRAMES / 7
    out = np.empty(frames.shape, np.float32)
    estimate_movie(frames, ESTIMATOR, out, chunk_frames=4, workers=1, progress=False)
    expected = np.asarray(ESTIMATOR(frames).bkgds)
    assert expected.dtype == np.float64
    np.testing.assert_array_equal(out, expected.astype(np.float32))

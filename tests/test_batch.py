"""Chunks of frames on a pool of threads."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbkgd import spatial_mean
from jaxbkgd._batch import map_frames


FRAMES = np.random.default_rng(0).integers(0, 65536, (23, 20, 31)).astype(np.uint16)


@jax.jit
def estimate(chunk):
    return spatial_mean(chunk, (3.0, 5.0))


@pytest.mark.parametrize("chunk_frames", [None, 1, 4, 22, 23, 1000])
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_the_result_is_the_same_to_the_bit_whatever_the_chunks(chunk_frames, workers):
    bkgds = map_frames(estimate, FRAMES, chunk_frames=chunk_frames, workers=workers)
    assert bkgds.dtype == np.float32
    np.testing.assert_array_equal(bkgds, estimate(FRAMES))


def test_results_are_written_to_the_array_that_is_given():
    out = np.full(FRAMES.shape, np.nan, np.float32)
    assert map_frames(estimate, FRAMES, out, chunk_frames=5) is out
    np.testing.assert_array_equal(out, estimate(FRAMES))
    with pytest.raises(ValueError, match=r"\(23, 20, 31\).*\(22, 20, 31\)"):
        map_frames(estimate, FRAMES, out[:22])


@pytest.mark.parametrize("dtype", [">u2", ">f4", np.int64, np.float64, bool])
def test_frames_of_any_real_dtype_are_converted(dtype):
    frames = (FRAMES % 2 if dtype is bool else FRAMES).astype(dtype)
    expected = estimate(frames.astype(np.float32))
    # Each chunk is a program of its own shape.
    np.testing.assert_allclose(map_frames(estimate, frames), expected, rtol=1e-6)
    with pytest.raises(TypeError, match="masked"):
        map_frames(estimate, np.ma.array(frames))


def test_what_does_not_fit_together_is_refused():
    out = np.zeros((23, 20, 31), np.float32)
    for frames, message in (
        (FRAMES[0], r"\(20, 31\)"),
        (FRAMES[:, :0], r"\(1, 0, 31\)"),
        (out, "memory"),
    ):
        with pytest.raises(ValueError, match=message):
            map_frames(estimate, frames, out)
    with pytest.raises(ValueError, match=r"chunk_frames.*0"):
        map_frames(estimate, FRAMES, chunk_frames=0)
    with pytest.raises(ValueError, match=r"workers.*-1"):
        map_frames(estimate, FRAMES, workers=-1)
    with pytest.raises(ValueError, match=r"keep the shape.*\(20, 31\)"):
        map_frames(lambda chunk: chunk.mean(0), FRAMES)


def test_a_memory_map_is_read_in_place(tmp_path):
    np.save(tmp_path / "movie.npy", FRAMES)
    movie = np.load(tmp_path / "movie.npy", mmap_mode="r")
    np.testing.assert_array_equal(map_frames(estimate, movie), estimate(FRAMES))


def test_a_movie_without_frames_gives_none():
    assert map_frames(estimate, FRAMES[:0]).shape == (0, 20, 31)


def test_no_chunk_is_compiled_twice():
    traced = []

    @jax.jit
    def count(chunk):
        traced.append(chunk.shape)
        return chunk.astype(jnp.float32)

    map_frames(count, FRAMES, chunk_frames=5, workers=1)
    assert traced == [(5, 20, 31)]


def test_an_error_is_raised_and_ends_the_work():
    begun = []

    def fail_at_first(chunk):
        begun.append(chunk)
        if len(begun) == 1:
            raise RuntimeError("no more memory")
        time.sleep(0.01)
        return chunk

    with pytest.raises(RuntimeError, match="no more memory"):
        map_frames(fail_at_first, np.zeros((1000, 2, 2), np.uint16), chunk_frames=1)
    assert len(begun) < 1000

"""Chunks of frames on a pool of threads."""

import threading

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
    lock = threading.Lock()

    def fail(chunk):
        with lock:
            begun.append(chunk)
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        map_frames(fail, np.zeros((1000, 2, 2), np.uint16), chunk_frames=1, workers=2)
    assert len(begun) < 1000

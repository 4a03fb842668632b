"""Whole movies with LocalMean, whose chunks follow each other through its rounds."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from jaxbkgd import (
    Camera,
    estimate_movie,
    LocalMean,
    Movie,
    MovieError,
    open_movie,
    SoftClip,
)


SHAPE = (300, 20, 22)
_RNG = np.random.default_rng(0)
Y, X = np.mgrid[:20, :22]
# Background in a flickering light, molecules, and a blank frame.
FRAMES = _RNG.poisson((60 + 2 * Y - X) * _RNG.uniform(0.7, 1.4, (300, 1, 1)))
FRAMES[
    _RNG.integers(0, 300, 200), _RNG.integers(0, 20, 200), _RNG.integers(0, 22, 200)
] += 90
FRAMES[170] = 0
FRAMES = FRAMES.astype(np.uint16)
WITH_NAN = FRAMES.astype(np.float32)
WITH_NAN[[140, 299], 3, 4] = [np.nan, np.inf]
MASK = _RNG.random(SHAPE) > 0.1
MASK[40:80] = False

ESTIMATOR = LocalMean((2.0, 1.5), 6.0)
# And another number of rounds.
SECOND_ORDER = LocalMean(2.0, 9.0, clip=SoftClip(rounds=2), kernel_order=2, skips_nan=True)
# Chunks are made longer, so that no round sees farther than the chunks next to one.
OPTIONS = {"chunk_frames": 7, "progress": False}


@pytest.mark.long
@pytest.mark.parametrize(
    ("frames", "estimator", "weights", "workers"),
    [
        (WITH_NAN, ESTIMATOR, None, 2),
        (FRAMES, ESTIMATOR, MASK, 1),
        (WITH_NAN, SECOND_ORDER, None, 2),
        (FRAMES, LocalMean(2.0, 9.0, clip=None, illumination_rank=0), None, 3),
        (FRAMES, LocalMean(2.0, 0.0, clip=None), None, 2),
    ],
    ids=["NaN", "weights", "second order", "steady light without a clip", "one frame"],
)
def test_a_movie_has_the_bits_of_a_plain_call(frames, estimator, weights, workers):
    expected = estimator(frames, weights)
    out = np.empty(SHAPE, np.float32)
    summary = estimate_movie(
        frames, estimator, out, weights=weights, workers=workers, **OPTIONS
    )
    assert summary.chunk_frames < 100
    np.testing.assert_array_equal(out, expected.bkgds)
    is_finite = np.isfinite(expected.bkgds)
    assert summary.nonfinite_frames == (~is_finite.all((1, 2))).sum()
    if estimator.illumination_rank:
        np.testing.assert_array_equal(summary.lights[0], expected.illumination)


@pytest.mark.long
def test_channels_and_cameras_have_the_bits_of_one_window():
    frames = np.stack([FRAMES, FRAMES[::-1]], axis=1)
    gain = _RNG.uniform(0.4, 0.6, SHAPE[1:])
    camera = Camera(1.0, gain, 1.0 + gain)
    whole, out = np.empty((2, *frames.shape), np.float32)
    assert estimate_movie(frames, ESTIMATOR, whole, camera=camera).chunk_frames == len(
        frames
    )
    assert (
        estimate_movie(frames, ESTIMATOR, out, camera=camera, **OPTIONS).chunk_frames < 100
    )
    np.testing.assert_array_equal(out, whole)


@pytest.mark.long
def test_what_is_left_of_an_earlier_run_is_gone_on_with(tmp_path, monkeypatch):
    path, sink = tmp_path / "movie.npy", tmp_path / "bkgd.tif"
    # In float32, for which programs are compiled already.
    frames = FRAMES.astype(np.float32)
    np.save(path, frames)
    read = Movie.read

    def reading(self, start, stop, channel=0):
        # A fingerprint reads single frames.
        if start <= 250 < stop and stop - start > 1:
            raise MovieError("frame 250 cannot be read")
        return read(self, start, stop, channel)

    with monkeypatch.context() as failing:
        failing.setattr(Movie, "read", reading)
        with pytest.raises(MovieError, match="frame 250"):
            estimate_movie(path, ESTIMATOR, sink, workers=1, **OPTIONS)
    summary = estimate_movie(path, ESTIMATOR, sink, workers=2)
    assert 0 < summary.resumed_frames < 250
    with open_movie(sink) as written:
        np.testing.assert_array_equal(written.channels[0][:], ESTIMATOR(frames).bkgds)


@pytest.mark.long
def test_short_memory_makes_short_chunks_and_few_workers(monkeypatch):
    def summary(bytes_of_a_pixel):
        available = 2 * bytes_of_a_pixel * FRAMES[0].size
        free = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        return estimate_movie(FRAMES, ESTIMATOR, np.empty(SHAPE, np.float32), **OPTIONS)

    # A worker takes some 7 kB for each pixel of a frame.
    assert summary(8_000).workers == 1
    with pytest.raises(MovieError, match=r"memory is short: chunks of 48 .*radius"):
        summary(1_000)

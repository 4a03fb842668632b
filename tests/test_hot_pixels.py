"""Pixels that are far off in all frames are found, and left out where nothing is given."""

from typing import Any

import numpy as np
import pytest

from jaxbkgd import calibrate, estimate_movie, find_hot_pixels, LocalMean, SpatialMean
from jaxbkgd._batch import run as _run


pytestmark = pytest.mark.usefixtures("quickly_compiled")

RNG = np.random.default_rng(5)
SHAPE = 60, 64
LIGHT = 60 + 18 * np.sin(np.mgrid[: SHAPE[0], : SHAPE[1]][1] / 15)
FRAMES = RNG.poisson(LIGHT, (30, *SHAPE)).astype(np.uint16)
# Alone, at an edge, in a corner, side by side, in a corner of three, and a dead one.
HOT = [(20, 20), (0, 30), (59, 63), (40, 10), (40, 11), (10, 50), (10, 51), (11, 50)]
DEAD = [(30, 40)]
OVER_TIME = LocalMean(3.0, 2.0, clip=None)

HISTORY = calibrate(FRAMES[:2], progress=False)[1]


def with_hot_pixels() -> np.ndarray:
    frames = FRAMES.copy()
    for y, x in HOT:
        frames[:, y, x] += 400
    for y, x in DEAD:
        frames[:, y, x] = 0
    return frames


def test_pixels_that_are_far_off_are_found_and_no_others():
    assert not find_hot_pixels(FRAMES).any()
    found = find_hot_pixels(with_hot_pixels())
    assert sorted(map(tuple, np.argwhere(found).tolist())) == sorted(HOT + DEAD)


@pytest.mark.parametrize("sigma_pix", [0.9, 1.3])
def test_molecules_that_never_go_off_are_no_hot_pixels(sigma_pix):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    light, rng = LIGHT.copy(), np.random.default_rng(6)
    for _ in range(15):
        y0, x0 = rng.uniform(4, 56, 2)
        square = ((y - y0) ** 2 + (x - x0) ** 2) / (2 * sigma_pix**2)
        light += 2000 / (2 * np.pi * sigma_pix**2) * np.exp(-square)
    assert not find_hot_pixels(rng.poisson(light, (30, *SHAPE))).any()


def test_a_short_movie_shows_none():
    assert not find_hot_pixels(with_hot_pixels()[:20]).any()


@pytest.mark.long
@pytest.mark.parametrize("weights", ["none", "image", "frames"])
def test_they_are_left_out_where_the_estimator_is_found(monkeypatch, weights):
    """As if they had been given as weights, to the bit."""
    estimator, frames = OVER_TIME, with_hot_pixels()
    monkeypatch.setattr(_run, "calibrate", lambda *_, **__: (estimator, HISTORY))
    counts = ~find_hot_pixels(frames)
    given: Any = {
        "none": None,
        "image": np.arange(SHAPE[1]) > 5 * np.ones(SHAPE),
        "frames": np.ones(frames.shape, np.float32),
    }[weights]
    options: dict[str, Any] = {"progress": False, "chunk_frames": 11}
    found, expected = np.empty((2, *frames.shape), np.float32)
    summary = estimate_movie(frames, None, found, weights=given, **options)
    product = counts if given is None else given * counts
    estimate_movie(frames, estimator, expected, weights=product, **options)
    np.testing.assert_array_equal(found, expected)
    assert summary.hot_pixels == (len(HOT + DEAD),)
    # Beside them, the error is that of the noise: below a tenth of a hot pixel's share.
    assert np.nanmax(np.abs(found - LIGHT)[:, :, 8:]) < 12


@pytest.mark.long
def test_a_given_estimator_sees_all_pixels_unless_told_otherwise():
    frames = with_hot_pixels()
    options: dict[str, Any] = {"progress": False, "chunk_frames": 11}
    out = np.empty(frames.shape, np.float32)
    for estimator, skips, count in (
        (OVER_TIME, None, 0),
        (OVER_TIME, True, 9),
        (SpatialMean(3.0), True, 0),
    ):
        options["skips_hot_pixels"] = skips
        assert estimate_movie(frames, estimator, out, **options).hot_pixels == (count,)

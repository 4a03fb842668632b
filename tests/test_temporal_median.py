from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxbkgd import estimate_movie, TemporalMedian


RNG = np.random.default_rng(7)
# Low counts, of which many are equal.
FRAMES = RNG.poisson(4, (14, 5, 6)).astype(np.uint16)


def _by_definition(frames: np.ndarray, radius: int) -> np.ndarray:
    windows = [
        frames[max(0, time - radius) : time + radius + 1] for time in range(len(frames))
    ]
    return np.stack([np.median(window, axis=0) for window in windows])


# Of the movie's 14 frames: the frame itself, windows inside, windows that reach over both
# ends at once, and windows that always do.
@pytest.mark.slow
@pytest.mark.parametrize("radius", [0, 4, 8, 10**9])
def test_each_frame_has_the_median_of_the_frames_that_there_are(radius):
    background = TemporalMedian(radius)(FRAMES)
    assert background.bkgds.dtype == jnp.float32
    np.testing.assert_array_equal(background.bkgds, _by_definition(FRAMES, radius))


@pytest.mark.slow
def test_movies_of_few_frames_have_a_median():
    assert TemporalMedian(1)(FRAMES[:0]).bkgds.shape == (0, 5, 6)
    for length in (1, 2):
        bkgds = TemporalMedian(1)(FRAMES[:length]).bkgds
        np.testing.assert_array_equal(bkgds, [FRAMES[:length].mean(axis=0)] * length)


def test_nan_and_infinity_reach_no_further_than_the_window():
    frames = FRAMES.astype(np.float32)
    frames[6, 2, 2], frames[3, 0, 0], frames[4:6, 1, 1] = np.nan, np.inf, -np.inf
    bkgds = np.asarray(TemporalMedian(2)(frames).bkgds)
    np.testing.assert_array_equal(bkgds, _by_definition(frames, 2))
    assert np.isnan(bkgds).sum() == 5


@pytest.mark.parametrize(("radius", "chunk_frames"), [(2, 5), (30, 13)])
def test_a_movie_in_chunks_is_the_movie_as_a_whole_to_the_bit(radius, chunk_frames):
    written = np.empty(FRAMES.shape, np.float32)
    estimate_movie(FRAMES, TemporalMedian(radius), written, chunk_frames=chunk_frames)
    np.testing.assert_array_equal(written, TemporalMedian(radius)(FRAMES).bkgds)


@pytest.mark.slow
def test_channels_batches_and_single_frames_keep_their_shape():
    channels = [FRAMES, FRAMES[:3, :4], np.stack([FRAMES, FRAMES[::-1]]), FRAMES[0]]
    background = jax.jit(lambda stacks: TemporalMedian(2)(stacks))(channels)
    assert [factor.shape for factor in background.noise_corrections] == 4 * [()]
    for bkgd, expected in zip(
        background.bkgds,
        [
            _by_definition(FRAMES, 2),
            _by_definition(FRAMES[:3, :4], 2),
            np.stack([_by_definition(FRAMES, 2), _by_definition(FRAMES[::-1], 2)]),
            FRAMES[0],
        ],
        strict=True,
    ):
        np.testing.assert_array_equal(bkgd, expected)


@pytest.mark.slow
def test_its_derivatives_are_those_of_finite_differences(x64):
    # All values differ, by more than the step, so that their order stays.
    frames = jnp.asarray(RNG.permutation(7 * 2 * 2).reshape(7, 2, 2) / 10)
    assert TemporalMedian(2)(frames).bkgds.dtype == jnp.float64
    check_grads(lambda f: TemporalMedian(2)(f).bkgds, (frames,), 1, modes=("fwd", "rev"))


@pytest.mark.slow
def test_equal_frames_share_the_gradient_and_no_others_have_any():
    frames = jnp.array([5.0, 1.0, 1.0, 9.0, 1.0])[:, None, None]

    def bkgd_of_third(frames):
        return TemporalMedian(1)(frames).bkgds[2, 0, 0]

    # Its window holds 1, 1 and 9; the other 1 is outside.
    gradient = jax.grad(bkgd_of_third)(frames)[:, 0, 0]
    np.testing.assert_array_equal(gradient, [0, 0.5, 0.5, 0, 0])
    gradient = jax.grad(bkgd_of_third)(frames.at[2].set(jnp.nan))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("radius", [1, 4, 25])
def test_the_noise_factor_is_that_of_simulated_noise(radius):
    windows = RNG.standard_normal((50_000, 2 * radius + 1))
    residual = windows[:, radius] - np.median(windows, axis=1)
    # Of a deviation from 50 000 values: 0.3 %, three times.
    expected = pytest.approx(np.std(residual), rel=0.01)
    assert TemporalMedian(radius)(FRAMES).noise_corrections == expected


def test_one_frame_leaves_no_noise_and_smlmlp_says_1():
    assert TemporalMedian(0)(FRAMES).noise_corrections == pytest.approx(0, abs=1e-3)
    assert TemporalMedian(1, noise="unit")(FRAMES).noise_corrections == 1


@pytest.mark.parametrize("radius", [-1, 2.5, 25.0, True, "25", None])
def test_a_radius_that_is_no_number_of_frames_is_refused(radius: Any, as_installed):
    with pytest.raises(ValueError, match=r"whole number from 0.*but is"):
        TemporalMedian(radius)


def test_an_unknown_noise_is_refused(as_installed):
    with pytest.raises(ValueError, match=r"'exact', 'unit'.*'one'"):
        TemporalMedian(noise=cast(Any, "one"))

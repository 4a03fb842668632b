from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from reference import dense_mean

from jaxbkgd import (
    Chained,
    estimate_movie,
    LocalMean,
    SpatialMean,
    SpatialOpening,
    TemporalMedian,
)


RNG = np.random.default_rng(9)
FRAMES = RNG.poisson(60, (17, 12, 15)).astype(np.uint16)
MEDIAN, MEAN = TemporalMedian(2), SpatialMean(3.0)


@pytest.mark.long
def test_each_sees_what_those_before_it_have_left():
    # Its second frame is far below its background: differences of counts must not wrap.
    dim = FRAMES.copy()
    dim[1] = 10
    channels = (FRAMES, dim)
    background = Chained(MEDIAN, MEAN)(channels)
    assert isinstance(background.bkgds, tuple)
    for bkgd, factor, frames in zip(
        background.bkgds, background.noise_corrections, channels, strict=True
    ):
        median = np.asarray(MEDIAN(frames).bkgds)
        expected = median + dense_mean(frames - median, 3.0, "smooth")
        # float32: a few roundings of the frames.
        np.testing.assert_allclose(bkgd, expected, rtol=0, atol=1e-6 * frames.max())
        factors = MEDIAN(frames).noise_corrections * MEAN(frames).noise_corrections
        np.testing.assert_allclose(factor, factors, rtol=1e-6)


@pytest.mark.slow
def test_a_movie_in_chunks_is_the_movie_as_a_whole_to_the_bit():
    estimator = Chained(SpatialOpening(1.0), Chained(MEDIAN, TemporalMedian(1)), MEAN)
    assert estimator.halo_frames == 3
    written = np.empty(FRAMES.shape, np.float32)
    estimate_movie(FRAMES, estimator, written, chunk_frames=4)
    np.testing.assert_array_equal(written, estimator(FRAMES).bkgds)


@pytest.mark.slow
def test_the_noise_factors_of_median_and_mean_multiply():
    noise = RNG.standard_normal((60, 96, 96)).astype(np.float32)
    background = Chained(MEDIAN, SpatialMean(2.0))(noise)
    # Away from the borders, where the windows are whole.
    residual = np.asarray(background.residuals(noise))[2:-2, 5:-5, 5:-5]
    # 4e5 pixels, of which neighbours go together.
    assert background.noise_corrections == pytest.approx(np.std(residual), rel=0.01)


@pytest.mark.long
def test_what_is_learned_is_what_each_one_learns():
    @eqx.filter_grad
    def gradient(estimator):
        return jnp.mean(estimator(FRAMES).residuals(FRAMES) ** 2)

    gradients = gradient(Chained(MEDIAN, MEAN)).estimators
    assert jnp.all(jnp.isfinite(gradients[1].unbounded_radii))
    assert jnp.all(gradients[1].unbounded_radii != 0)


def test_what_is_left_is_not_proportional_to_the_light():
    module = LocalMean(2.0, 2.0)
    with pytest.raises(ValueError, match="give illumination_rank=0"):
        Chained(MEDIAN, module)
    assert Chained(module, MEAN).estimators == (module, MEAN)


def test_what_is_no_estimator_is_refused(as_installed):
    for wrong in ((), ([MEDIAN, MEAN],), (SpatialMean,)):
        with pytest.raises(TypeError, match="one AbstractEstimator or more"):
            Chained(*cast(Any, wrong))
    with pytest.raises(TypeError, match="Chained takes no weights"):
        Chained(MEDIAN)(FRAMES, FRAMES)

import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import reference_mean
from scipy.ndimage import gaussian_filter

from jaxbkgd import (
    AbstractEstimator,
    Background,
    FramePairLoss,
    LocalMean,
    SpatialMean,
    TruthLoss,
)
from jaxbkgd._calibration.prediction_error import _SECOND_OF_FOUR_VARIANCE


pytestmark = pytest.mark.usefixtures("quickly_compiled")

# One size and one bound for most tests, which so share what was compiled.
FRAME_COUNT, SIZE_PIX, BOUND_PIX = 12, 64, 16.0
Y, X = np.mgrid[:SIZE_PIX, :SIZE_PIX] + 0.5


def waves(period_pix):
    return np.sin(2 * np.pi * Y / period_pix) * np.sin(2 * np.pi * X / period_pix)


def noisy(bkgds, rng):
    """Frames in photons, with shot noise."""
    return rng.poisson(bkgds).astype(np.float32)


def reference_loss(frames, bkgds, lag):
    """The definition, frame by frame."""
    frames = np.asarray(frames, np.float64)
    squares = [
        np.mean((frames[t + lag] - bkgds[t]) * (frames[t - lag] - bkgds[t]))
        for t in range(lag, len(frames) - lag)
    ]
    variance = np.mean((frames[lag:] - frames[:-lag]) ** 2) / 2
    return float(np.mean(squares) / variance) if variance > 0 else 0.0


@eqx.filter_jit
def loss_and_gradient(estimator, frames, lag):
    objective = FramePairLoss(lag)
    return eqx.filter_value_and_grad(lambda estimator: objective(estimator, frames))(
        estimator
    )


def loss_at(radius_pix, frames):
    pair = tuple(np.broadcast_to(radius_pix, 2).tolist())
    estimator = SpatialMean(pair, max_radius_pix=BOUND_PIX)
    return float(loss_and_gradient(estimator, frames, 1)[0])


@pytest.fixture(scope="module")
def frames():
    """40 to 160 photons a pixel."""
    rng = np.random.default_rng(20241122)
    bkgd = 100 * (1 + 0.6 * waves(30))
    return noisy(np.broadcast_to(bkgd, (FRAME_COUNT, *bkgd.shape)), rng)


class Scaled(AbstractEstimator):
    """The mean of each frame times a number, which costs no compilation."""

    factor: jax.Array

    @property
    def halo_frames(self):
        return 0

    def estimate_stack(self, frames):
        frames = frames.astype(float)
        mean = self.factor * frames.mean((1, 2), keepdims=True)
        return Background(jnp.broadcast_to(mean, frames.shape), jnp.ones(()))


MEAN = Scaled(jnp.array(0.9))


def scaled_mean(frames):
    frames = np.asarray(frames, np.float64)
    return np.broadcast_to(0.9 * frames.mean((1, 2), keepdims=True), frames.shape)


class TestFramePairLoss:
    @pytest.mark.slow
    def test_it_is_its_definition(self, frames):
        radius_pix = (2.5, 7.0)
        bkgds = reference_mean(frames, radius_pix, "smooth")
        expected = reference_loss(frames, bkgds, 1)
        # float32: of the frames, over their noise.
        np.testing.assert_allclose(
            loss_at(radius_pix, frames), expected, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("lag", [2, 4])
    def test_it_is_its_definition_at_any_lag(self, frames, lag):
        loss, _ = loss_and_gradient(MEAN, frames, lag)
        expected = reference_loss(frames, scaled_mean(frames), lag)
        # float32.
        np.testing.assert_allclose(loss, expected, rtol=1e-4)

    @pytest.mark.long
    def test_dark_frames_do_not_count(self, rng):
        frames = rng.poisson(100, (48, 48, 48)).astype(np.float32)
        estimator = LocalMean(3.0, 6.0, clip=None, block_frames=2)
        loss_of = eqx.filter_jit(FramePairLoss(1))
        expected = loss_of(estimator, frames)
        # The noise of a camera, of which a little light is left by chance.
        frames[5::12] = rng.normal(0.05, 1, frames[5::12].shape)
        loss = loss_of(estimator, frames)
        # Of four movies it moves by up to 12 %, and by 60 % where these frames count.
        np.testing.assert_allclose(loss, expected, rtol=0.25)

    def test_channels_count_alike(self, frames):
        channels = (frames, 3 * frames[:, :20])
        parts = [reference_loss(channel, scaled_mean(channel), 2) for channel in channels]
        loss = eqx.filter_jit(FramePairLoss(2))(MEAN, channels)
        # float32.
        np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-4)

    @pytest.mark.slow
    def test_it_estimates_the_error_over_the_variance_of_a_frame_without_bias(self):
        rng = np.random.default_rng(20241122)
        radii_pix = (1.5, 4.0, 10.0)
        bkgd, density, photons = 60 * (1 + 0.3 * waves(32)), 0.005, 300
        # The mean light of molecules counts as background, and its shot noise as noise.
        # Of molecules, the variance is that of a sum of spots (Campbell's theorem).
        truth = bkgd + density * photons
        spot = gaussian_filter(np.pad([[1.0]], 15), 1.3)
        variance = truth.mean() + density * photons**2 * np.sum(spot**2)
        differences, errors = [], []
        for _ in range(16):
            # Each is on in one frame, anywhere in a field without borders.
            molecules = rng.poisson(density, (FRAME_COUNT, *bkgd.shape)).astype(float)
            signal = photons * gaussian_filter(molecules, (0, 1.3, 1.3), mode="wrap")
            frames = noisy(bkgd + signal, rng)
            means = [reference_mean(frames, radius, "smooth") for radius in radii_pix]
            errors.append([np.mean((mean - truth) ** 2) / variance for mean in means])
            losses = [loss_at(radius, frames) for radius in radii_pix]
            differences.append(np.subtract(losses, errors[-1]))
        standard_error = np.std(differences, 0, ddof=1) / np.sqrt(len(differences))
        assert np.all(np.abs(np.mean(differences, 0)) < 4 * standard_error)
        # Sharp enough to see a bias of a tenth.
        assert np.all(standard_error < 0.025 * np.mean(errors, 0))

    @pytest.mark.slow
    def test_its_minimum_is_the_oracle_where_noise_is_uneven_and_the_movie_bleaches(self):
        rng = np.random.default_rng(20241122)
        # From dark to forty times as bright, and rough where it is dark.
        level = 10 + 390 * X / SIZE_PIX + 5 * waves(16) * (X < SIZE_PIX / 2)
        bkgds = level * np.linspace(1, 0.5, FRAME_COUNT)[:, None, None]
        frames = noisy(bkgds, rng)
        radii_pix = np.geomspace(2, 10, 28)
        means = [reference_mean(frames, radius, "smooth") for radius in radii_pix]
        errors = np.array([np.mean((mean - bkgds) ** 2) for mean in means])
        oracle = errors.argmin()
        learned = np.argmin([loss_at(radius, frames) for radius in radii_pix])
        # A step is 6 %, and the minimum is flat.
        assert abs(learned - oracle) <= 2
        assert errors[learned] < 1.01 * errors[oracle]
        # A weight of each pixel, one over its variance, asks for something else.
        weighted = [
            np.mean((frames[1:] - mean[:-1]) ** 2 / bkgds[1:])
            + np.mean((frames[:-1] - mean[1:]) ** 2 / bkgds[:-1])
            for mean in means
        ]
        assert np.argmin(weighted) < oracle - 4
        assert errors[np.argmin(weighted)] > 1.2 * errors[oracle]

    @pytest.mark.slow
    def test_time_offset_and_gain_change_nothing(self, frames):
        drifting = frames * np.linspace(1, 0.3, FRAME_COUNT, dtype="f4")[:, None, None]
        for other in (drifting[::-1], 2 * drifting + 1000):
            # float32: of 1000, over noise of 20.
            np.testing.assert_allclose(
                loss_at(4.0, other), loss_at(4.0, drifting), rtol=1e-5, atol=1e-4
            )

    @pytest.mark.long
    def test_frames_that_are_equal_say_nothing(self, frames):
        estimator = SpatialMean((4.0, 4.0), max_radius_pix=BOUND_PIX)
        value, gradient = loss_and_gradient(estimator, np.full_like(frames, 7), 1)
        assert value == 0
        assert np.all(gradient.unbounded_radii == 0)
        # A shutter that was closed for some frames.
        partly = frames * (np.arange(FRAME_COUNT) < 8)[:, None, None]
        value, gradient = loss_and_gradient(estimator, partly, 1)
        bkgds = reference_mean(partly, 4.0, "smooth")
        np.testing.assert_allclose(value, reference_loss(partly, bkgds, 1), rtol=1e-4)
        assert np.all(np.isfinite(gradient.unbounded_radii))
        assert np.all(gradient.unbounded_radii != 0)

    def test_too_few_frames_are_refused(self, frames):
        with pytest.raises(ValueError, match=r"lag of 6 .* 13 frames.*\(12, 64, 64\)"):
            FramePairLoss(6)(MEAN, frames)

    @pytest.mark.usefixtures("as_installed")
    def test_a_lag_is_a_whole_number_of_frames(self):
        lags: list[Any] = [0, -3, 1.5, 2.0, True, "1", np.nan, [1]]
        for lag in lags:
            with pytest.raises(
                ValueError, match=r"lag must be a whole number from 1 on, but is .*found"
            ):
                FramePairLoss(lag)
        lag: Any = np.int64(3)
        assert FramePairLoss(lag).lag == 3


def blinking(on_frames, frame_count, rng, molecules_per_frame=60):
    """The light of molecules that stay on for so many frames, each from one of its own."""
    starts = np.arange(1 - on_frames, frame_count)
    starts = np.repeat(starts, round(molecules_per_frame / on_frames))
    y, x = rng.integers(0, SIZE_PIX, (2, starts.size))
    stack = np.zeros((frame_count, SIZE_PIX, SIZE_PIX))
    for age in range(on_frames):
        is_seen = (starts + age >= 0) & (starts + age < frame_count)
        np.add.at(stack, (starts[is_seen] + age, y[is_seen], x[is_seen]), 600)
    return gaussian_filter(stack, (0, 1.3, 1.3))


def found_lag(channels):
    lag = FramePairLoss().fitted(channels).lag
    assert lag is not None
    return lag


def is_lag_of(on_frames, lag):
    """Half as long again as molecules stay on, found to a frame where the numbers of
    molecules happen to differ. Nothing is added where not even neighbours correlate."""
    return lag in {
        math.ceil(1.5 * found) if found > 1 else 1 for found in (on_frames, on_frames + 1)
    }


class TestLag:
    @pytest.mark.parametrize("on_frames", [1, 6])
    def test_it_is_as_long_as_molecules_stay_on(self, on_frames, rng):
        frames = noisy(40 + blinking(on_frames, 64, rng), rng)
        assert is_lag_of(on_frames, found_lag(frames))

    def test_what_never_changes_does_not_count(self, rng):
        signal = 40 + blinking(3, 64, rng)
        steady = 600 * gaussian_filter(rng.poisson(0.02, Y.shape).astype(float), 1.3)
        assert is_lag_of(3, found_lag(noisy(signal + steady, rng)))

    def test_slow_bleaching_hardly_counts(self, rng):
        bleaching = np.linspace(1, 0.5, 64)[:, None, None]
        rough = 60 * (1 + 0.3 * waves(16)) * bleaching
        assert is_lag_of(3, found_lag(noisy(rough + blinking(3, 64, rng), rng)))

    def test_the_channel_with_the_longest_decides(self, rng):
        channels = [noisy(40 + blinking(on_frames, 64, rng), rng) for on_frames in (4, 1)]
        assert is_lag_of(4, found_lag(channels))

    @pytest.mark.slow
    def test_it_is_found_in_a_call_but_not_kept(self, frames):
        objective = FramePairLoss()
        loss = FramePairLoss(1)(MEAN, frames)
        np.testing.assert_array_equal(objective(MEAN, frames), loss)
        assert objective.lag is None
        objective = FramePairLoss(7)
        assert objective.fitted(frames) is objective

    def test_molecules_that_hardly_vanish_give_a_warning(self, rng):
        frames = noisy(40 + blinking(20, 32, rng), rng)
        with pytest.warns(UserWarning, match=r"long in the frames .* lag of 15, .*longer"):
            # Half of the movie, beyond which nothing can be compared.
            assert found_lag(frames) == 15

    @pytest.mark.slow
    def test_where_it_cannot_be_decided_there_is_an_error(self, frames):
        with pytest.raises(ValueError, match=r"nothing changes"):
            found_lag(np.full_like(frames, 100))
        for count in (1, 2):
            with pytest.raises(ValueError, match=rf"{count} frames.*longer movie"):
                found_lag(frames[:count])
        with pytest.raises(
            ValueError, match=r"shape \(64, 64\); .*\(frames, height, width\)"
        ):
            found_lag(frames[0])
        with pytest.raises(ValueError, match=r"traced.*lag=1"):
            jax.jit(lambda frames: FramePairLoss()(MEAN, frames))(frames)


class TestTruthLoss:
    def test_it_is_the_mean_square_error(self, frames, rng):
        truth = rng.uniform(50, 150, frames.shape)
        # An image serves all frames.
        for bkgds in (truth, truth[0]):
            expected = np.mean((scaled_mean(frames) - bkgds) ** 2)
            # float32.
            np.testing.assert_allclose(TruthLoss(bkgds)(MEAN, frames), expected, rtol=1e-5)

    def test_frames_are_compared_with_the_truth_of_their_place(self, frames, rng):
        truth = rng.uniform(50, 150, frames.shape)
        indices = jnp.array([3, 4, 5])
        expected = np.mean((scaled_mean(frames)[3:6] - truth[3:6]) ** 2)
        for bkgds in (truth, [truth]):
            channels = frames[3:6] if bkgds is truth else [frames[3:6]]
            loss = eqx.filter_jit(TruthLoss(bkgds))(MEAN, channels, indices)
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
        loss = TruthLoss(truth[0])(MEAN, frames[3:6], indices)
        expected = np.mean((scaled_mean(frames)[3:6] - truth[0]) ** 2)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def test_each_channel_has_its_truth(self, frames, rng):
        other = frames[:, :20].astype(np.uint16)
        truths = rng.uniform(50, 150, frames.shape), np.full((20, SIZE_PIX), 80)
        parts = [
            np.mean((scaled_mean(channel) - truth) ** 2)
            for channel, truth in zip((frames, other), truths, strict=True)
        ]
        loss = TruthLoss(truths)(MEAN, (frames, other))
        np.testing.assert_allclose(loss, np.mean(parts), rtol=1e-5)

    def test_a_truth_of_another_shape_or_that_is_none_of_the_channels_is_refused(
        self, frames
    ):
        for shape in ((11, 64, 64), (64, 63), (1, 1, 64, 64)):
            text = re.escape(f"but their true background has {shape}")
            with pytest.raises(ValueError, match=text):
                TruthLoss(np.ones(shape))(MEAN, frames)
        truth = np.ones(frames.shape)
        for truths, channels in [
            ([truth], frames),
            (truth, [frames]),
            ([truth, truth], [frames]),
            ((truth,), [frames, frames]),
        ]:
            with pytest.raises(ValueError, match=r"channels|stack"):
                TruthLoss(truths)(MEAN, channels)
        with pytest.raises(ValueError, match=r"\(64,\)"):
            TruthLoss(truth[0, 0])


def test_the_second_smallest_of_four_deviations_varies_as_it_is_said_to():
    four = np.random.default_rng(0).standard_normal((400_000, 4))
    variance = np.sort(four)[:, 1].var()
    # Of so many, a standard error of 0.3 %.
    np.testing.assert_allclose(variance, _SECOND_OF_FOUR_VARIANCE, rtol=0.01)

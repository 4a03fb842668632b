from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import reference_mean

from jaxbkgd import AbstractEstimator, Background, snr, SpatialMean


RNG = np.random.default_rng(5)
STACK = RNG.uniform(50, 150, (3, 8, 9)).astype(np.float32)
OTHER = RNG.integers(0, 60000, (2, 8, 11)).astype(np.uint16)


class TestStructure:
    def test_one_stack_gives_one_of_each(self):
        for stack in (STACK, jnp.asarray(STACK)[0], STACK[:0]):
            background = SpatialMean(2.0)(stack)
            assert background.bkgds.shape == stack.shape
            assert background.noise_corrections.shape == ()
            assert background.residuals(stack).shape == stack.shape
            assert background.snr(stack, 2.0).shape == stack.shape

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_a_sequence_gives_its_like(self, kind):
        channels = kind([STACK, OTHER, STACK[0]])
        background = SpatialMean(2.0)(channels)
        for answer in (
            background.bkgds,
            background.residuals(channels),
            background.snr(channels, 2.0),
        ):
            assert type(answer) is kind
            assert [entry.shape for entry in answer] == [c.shape for c in channels]
        assert type(background.noise_corrections) is kind
        assert [factor.shape for factor in background.noise_corrections] == 3 * [()]

    def test_a_sequence_of_one_stays_a_sequence(self):
        background = SpatialMean(2.0)([STACK])
        (bkgd,) = background.bkgds
        assert bkgd.shape == STACK.shape

    def test_it_passes_through_transformations(self):
        background = eqx.filter_jit(SpatialMean(2.0))((STACK, STACK[0]))
        assert isinstance(background, Background)
        assert isinstance(background.bkgds, tuple)
        assert len(jax.tree.leaves(background)) == 4
        mapped = eqx.filter_vmap(SpatialMean(2.0))(STACK)
        np.testing.assert_allclose(mapped.bkgds, background.bkgds[0], rtol=1e-6)


class TestResiduals:
    def test_they_are_the_frames_less_their_background(self):
        channels = [STACK, OTHER]
        background = SpatialMean(2.0)(channels)
        for residual, channel in zip(background.residuals(channels), channels, strict=True):
            assert residual.dtype == jnp.float32
            expected = channel - reference_mean(channel, 2.0, "smooth")
            # float32: of the frames, from which the residuals are small.
            rounding = 1e-6 * channel.max()
            np.testing.assert_allclose(residual, expected, rtol=0, atol=rounding)
        # Below the background counts are negative: they must not wrap.
        assert background.residuals(channels)[1].min() < -1000


class TestSnr:
    def test_it_is_the_signal_over_the_noise_expected(self):
        # 100 ADU at 4 e-/ADU are 400 e-, whose noise is 20 e- or 5 ADU.
        np.testing.assert_allclose(snr(30.0, 100.0, noise_correction=0.5, gain=4.0), 30 / (0.5 * 5), rtol=1e-6)
        np.testing.assert_allclose(
            snr(np.ones((2, 3)), np.full((2, 1), 16.0), 1.0, np.array([1.0, 4.0, 16.0])),
            np.tile([0.25, 0.5, 1.0], (2, 1)),
            rtol=1e-6,
        )
        assert snr(30, 100, 1, 4) == 6.0

    def test_its_gradient_is_that_of_the_formula(self):
        gradient = jax.grad(snr, (0, 1, 2, 3))(30.0, 100.0, 0.5, 4.0)
        ratio = 12.0
        expected = (ratio / 30, -ratio / 200, -ratio / 0.5, ratio / 8)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    @pytest.mark.parametrize("gain", [0.5, 2.2])
    def test_a_movie_without_molecules_has_unit_noise(self, gain):
        rng = np.random.default_rng(20241122)
        electrons = 400.0
        frames = rng.poisson(electrons, (48, 96, 96)).astype(np.float32) / gain
        background = SpatialMean(5.0, noise="exact")(frames)
        ratios = np.asarray(background.snr(frames, gain), np.float64)
        # Away from the borders; the half-width at 5 px is 6.
        variances = np.mean(ratios[:, 6:-6, 6:-6] ** 2, axis=(1, 2))
        standard_error = variances.std(ddof=1) / np.sqrt(variances.size)
        # The background's own noise adds less than 1e-4, a tenth of a standard error.
        assert abs(variances.mean() - 1) < 4 * standard_error
        # The factor of smlmlp is too small, and so its ratios are too large.
        background = SpatialMean(5.0, noise="separable")(frames)
        ratios = np.asarray(background.snr(frames, gain))[:, 6:-6, 6:-6]
        assert ratios.std() > 1.2

    def test_gains_are_for_all_channels_or_one_for_each(self):
        channels = [STACK, OTHER]
        background = SpatialMean(2.0)(channels)
        shared = background.snr(channels, 4.0)
        each = background.snr(channels, [4.0, 1.0])
        np.testing.assert_allclose(each[0], shared[0], rtol=1e-6)
        # The noise in ADU goes with one over the root of the gain.
        np.testing.assert_allclose(2 * each[1], shared[1], rtol=1e-6)
        traced = jax.jit(lambda gain: background.snr(channels, gain))(4.0)
        for got, expected in zip(traced, shared, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


class MeanOverTime(AbstractEstimator):
    """What a user may write: the mean of all frames, times a factor that is learned."""

    factor: jax.Array

    @property
    def halo_frames(self) -> int:
        return 2

    def __call__(self, channels):
        stack = jnp.asarray(channels)
        bkgd = self.factor * jnp.broadcast_to(stack.mean(0), stack.shape)
        return Background(bkgd, jnp.sqrt(1 - 1 / len(stack)))


class TestAbstractEstimator:
    def test_a_user_may_write_one(self):
        estimator = MeanOverTime(jnp.array(1.0))
        background = eqx.filter_jit(estimator)(STACK)
        expected = STACK - STACK.mean(0)
        np.testing.assert_allclose(background.residuals(STACK), expected, atol=1e-4)
        assert background.snr(STACK, 2.0).shape == STACK.shape
        assert estimator.halo_frames == 2

        @eqx.filter_grad
        def gradient(estimator):
            return jnp.sum(estimator(STACK).residuals(STACK))

        np.testing.assert_allclose(
            gradient(estimator).factor, -STACK.sum(dtype=float), rtol=1e-6
        )

    def test_one_without_its_parts_cannot_be_made(self):
        class WithoutCall(AbstractEstimator):
            @property
            def halo_frames(self) -> int:
                return 0

        class WithoutHalo(AbstractEstimator):
            def __call__(self, channels):
                return Background(channels, 1.0)

        kinds: list[Any] = [AbstractEstimator, WithoutCall, WithoutHalo]
        for incomplete in kinds:
            with pytest.raises(TypeError, match="abstract"):
                incomplete()


@pytest.mark.usefixtures("as_installed")
class TestBadInput:
    def test_no_channels(self):
        for empty in ([], ()):
            with pytest.raises(ValueError, match="empty"):
                SpatialMean(2.0)(empty)

    @pytest.mark.parametrize(
        ("channels", "name"),
        [
            ([STACK, "frames"], "<U6"),
            ([STACK, None], "object"),
            ([STACK, STACK + 1j], "complex64"),
            ([STACK, STACK[0, 0]], r"\(9,\)"),
            ((STACK, np.ma.masked_array(STACK)), "masked"),
            ({"first": STACK}, "object"),
            ((stack for stack in (STACK, STACK)), "object"),
            ("frames", "<U6"),
            (None, "object"),
        ],
    )
    def test_channels_that_are_no_frames(self, channels, name):
        with pytest.raises((TypeError, ValueError), match=name):
            SpatialMean(2.0)(channels)

    @pytest.mark.parametrize(
        ("radii_pix", "channels", "counts"),
        [
            ([2.0, 3.0, 4.0], [STACK, OTHER], "3.*2"),
            ([(2.0, 3.0), (4.0, 5.0)], [STACK], "2.*1"),
            ([(2.0, 3.0), (4.0, 5.0)], STACK, "2.*1"),
        ],
    )
    def test_a_channel_count_that_does_not_fit(self, radii_pix, channels, counts):
        module = SpatialMean(radii_pix)
        with pytest.raises(ValueError, match=counts):
            module(channels)
        with pytest.raises(ValueError, match=counts):
            eqx.filter_jit(module)(channels)

    def test_channels_other_than_those_estimated(self):
        background = SpatialMean(2.0)([STACK, OTHER])
        for channels in ([STACK], [STACK, OTHER, STACK]):
            with pytest.raises(ValueError, match=rf"{len(channels)}.*2"):
                background.residuals(channels)
            with pytest.raises(ValueError, match=rf"{len(channels)}.*2"):
                background.snr(channels, 1.0)
        with pytest.raises(ValueError, match="channels"):
            SpatialMean(2.0)(STACK).residuals([STACK])
        with pytest.raises((TypeError, ValueError)):
            background.residuals(STACK)

    def test_frames_of_another_shape_than_the_background(self):
        background = SpatialMean(2.0)(STACK)
        for frames in (STACK[:2], STACK[0], STACK[:, :4], STACK[:, :1]):
            with pytest.raises((TypeError, ValueError), match="shape"):
                background.residuals(frames)

    def test_gains_that_are_none(self):
        background = SpatialMean(2.0)([STACK, OTHER])
        for gains in (0.0, -1.0, [1.0, np.nan], np.float64(0)):
            with pytest.raises(ValueError, match="gains must be positive and finite"):
                background.snr([STACK, OTHER], gains)

    def test_gains_that_are_not_as_many_as_the_channels(self):
        background = SpatialMean(2.0)([STACK, OTHER])
        for gains in ([1.0], [1.0, 2.0, 3.0], []):
            with pytest.raises(ValueError, match=rf"2 channels.*{len(gains)}"):
                background.snr([STACK, OTHER], gains)
        with pytest.raises((TypeError, ValueError)):
            SpatialMean(2.0)(STACK).snr(STACK, [1.0, 2.0])

import contextlib
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from reference import dense_mean

from jaxbkgd import (
    AbstractEstimator,
    Background,
    Camera,
    Chained,
    estimate_movie,
    lazy_estimate,
    LocalMean,
    snr,
    SoftClip,
    SpatialMean,
    SpatialOpening,
    TemporalMedian,
)


pytestmark = pytest.mark.usefixtures("quickly_compiled")

RNG = np.random.default_rng(5)
STACK = RNG.poisson(60, (6, 8, 10)).astype(np.float32)
CAMERA = Camera(0.0, 2.0)
OTHER = RNG.integers(0, 60000, (2, 8, 11)).astype(np.uint16)


def over_time():
    """As few taps and rounds as show what is shown here."""
    bounds: Any = {"max_radius_pix": 3.0, "max_radius_frames": 2.0}
    return LocalMean(2.0, 1.0, clip=SoftClip(rounds=1), **bounds)


class TestStructure:
    @pytest.mark.slow
    def test_one_stack_gives_one_of_each(self):
        for stack in (STACK, jnp.asarray(STACK)[0], STACK[:0]):
            background = SpatialMean(2.0)(stack)
            assert background.bkgds.shape == stack.shape
            assert background.noise_corrections.shape == ()
            assert background.residuals(stack).shape == stack.shape
            assert background.snr(stack, CAMERA).shape == stack.shape

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_a_sequence_gives_its_like(self, kind):
        for channels in (kind([STACK, OTHER, STACK[0]]), kind([STACK])):
            background = SpatialMean(2.0)(channels)
            for answer in (
                background.bkgds,
                background.residuals(channels),
                background.snr(channels, CAMERA),
            ):
                assert type(answer) is kind
                assert [entry.shape for entry in answer] == [c.shape for c in channels]
            assert type(background.noise_corrections) is kind
            assert all(factor.shape == () for factor in background.noise_corrections)

    def test_residuals_are_the_frames_less_their_background(self):
        channels = [STACK, OTHER]
        background = SpatialMean(2.0)(channels)
        for residual, channel in zip(background.residuals(channels), channels, strict=True):
            assert residual.dtype == jnp.float32
            expected = channel - dense_mean(channel, 2.0, "smooth")
            # float32: of the frames, from which the residuals are small.
            rounding = 1e-6 * channel.max()
            np.testing.assert_allclose(residual, expected, rtol=0, atol=rounding)
        # Below the background counts are negative: they must not wrap.
        assert background.residuals(channels)[1].min() < -1000


def ratio_of(signal, bkgd, noise_correction, gain):
    return snr(signal, bkgd, noise_correction=noise_correction, gain=gain)


class TestSnr:
    def test_it_is_the_signal_over_the_noise_expected(self):
        # 100 ADU at 4 e-/ADU are 400 e-, whose noise is 20 e- or 5 ADU.
        np.testing.assert_allclose(ratio_of(30.0, 100.0, 0.5, 4.0), 12, rtol=1e-6)
        gains = np.array([1.0, 4.0, 16.0])
        np.testing.assert_allclose(
            ratio_of(np.ones((2, 3)), np.full((2, 1), 16.0), 1.0, gains),
            np.tile([0.25, 0.5, 1.0], (2, 1)),
            rtol=1e-6,
        )
        assert ratio_of(30, 100, 1, 4) == 6.0

    def test_its_gradient_is_that_of_the_formula(self):
        gradient = jax.grad(ratio_of, (0, 1, 2, 3))(30.0, 100.0, 0.5, 4.0)
        ratio = 12.0
        expected = (ratio / 30, -ratio / 200, -ratio / 0.5, ratio / 8)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    @pytest.mark.slow
    def test_pixels_that_a_loss_leaves_out_leave_its_gradient_finite(self):
        """No light, a dead pixel, light below the offset, an unknown pixel."""
        signal = jnp.array([1.0, 1.0, 1.0, jnp.nan, 30.0])
        bkgd, gain = jnp.array([0.0, 9.0, -4.0, 9.0, 100.0]), jnp.array([4.0, 0, 4, 4, 4])
        is_good = np.arange(5) == 4

        def loss(*arguments):
            return jnp.sum(jnp.where(is_good, ratio_of(*arguments), 0))

        slopes = jax.grad(loss, (0, 1, 2, 3))(signal, bkgd, 0.5, gain)
        expected = jax.grad(ratio_of, (0, 1, 2, 3))(30.0, 100.0, 0.5, 4.0)
        for slope, alone in zip(slopes, expected, strict=True):
            entries = np.where(is_good, alone, 0) if slope.ndim else alone
            np.testing.assert_allclose(slope, entries, rtol=1e-6)
        ratios = ratio_of(signal, bkgd, 0.5, gain)
        np.testing.assert_array_equal(ratios, [np.inf, np.nan, np.nan, np.nan, 12])

    @pytest.mark.long
    @pytest.mark.parametrize(
        "estimator",
        [SpatialMean(2.0, max_radius_pix=3.0), over_time()],
        ids=["spatial", "local"],
    )
    def test_frames_that_are_padded_with_zeros_leave_gradients_finite(self, estimator):
        padded = np.where(np.arange(6)[:, None, None] < 3, STACK, 0)

        @eqx.filter_jit
        @eqx.filter_grad
        def gradient(estimator):
            ratios = estimator(padded).snr(padded, Camera(0.0, 0.5))
            return jnp.mean(jnp.where(padded > 0, ratios, 0) ** 2)

        slopes = gradient(estimator).unbounded_radii
        assert np.all(np.isfinite(slopes))
        assert np.all(slopes != 0)

    @pytest.mark.slow
    def test_a_movie_without_molecules_has_unit_noise(self):
        rng = np.random.default_rng(20241122)
        electrons, gain = 400.0, 2.2
        frames = rng.poisson(electrons, (48, 96, 96)).astype(np.float32) / gain
        background = SpatialMean(5.0, noise="exact")(frames)
        ratios = np.asarray(background.snr(frames, Camera(0.0, gain)), np.float64)
        # Away from the borders; the half-width at 5 px is 6.
        variances = np.mean(ratios[:, 6:-6, 6:-6] ** 2, axis=(1, 2))
        standard_error = variances.std(ddof=1) / np.sqrt(variances.size)
        # The background's own noise adds less than 1e-4, a tenth of a standard error.
        assert abs(variances.mean() - 1) < 4 * standard_error

    def test_cameras_are_for_all_channels_or_one_for_each(self):
        channels = [STACK, OTHER]
        background = SpatialMean(2.0)(channels)
        shared = background.snr(channels, Camera(0.0, 4.0))
        each = background.snr(channels, [Camera(0.0, 4.0), Camera(0.0, 1.0)])
        np.testing.assert_allclose(each[0], shared[0], rtol=1e-6)
        # The noise in ADU goes with one over the root of the gain.
        np.testing.assert_allclose(2 * each[1], shared[1], rtol=1e-6)
        traced = jax.jit(lambda gain: background.snr(channels, Camera(0.0, gain)))(4.0)
        for got, expected in zip(traced, shared, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


class MeanOverTime(AbstractEstimator):
    """What a user may write: the mean of all frames, times a factor that is learned."""

    factor: jax.Array

    @property
    def halo_frames(self) -> int:
        return 2

    def estimate_stack(self, frames):
        bkgd = self.factor * jnp.broadcast_to(frames.mean(0), frames.shape)
        return Background(bkgd, jnp.sqrt(1 - 1 / frames.shape[0]))


class WeightedLevel(AbstractEstimator):
    """The weighted mean of each stack."""

    takes_weights = True

    @property
    def halo_frames(self) -> int:
        return 0

    def estimate_stack(self, frames, weights=1.0):
        weights = jnp.broadcast_to(weights, frames.shape)
        level = jnp.sum(frames * weights) / jnp.sum(weights)
        return Background(jnp.full(frames.shape, level), jnp.ones(()))


class TestAbstractEstimator:
    def test_a_user_may_write_one(self):
        estimator = MeanOverTime(jnp.array(1.0))
        background = eqx.filter_jit(estimator)(STACK)
        expected = STACK - STACK.mean(0)
        np.testing.assert_allclose(background.residuals(STACK), expected, atol=1e-4)
        assert background.snr(STACK, CAMERA).shape == STACK.shape
        assert estimator.halo_frames == 2

        @eqx.filter_grad
        def gradient(estimator):
            return jnp.sum(estimator(STACK).residuals(STACK))

        np.testing.assert_allclose(
            gradient(estimator).factor, -STACK.sum(dtype=float), rtol=1e-6
        )

    def test_it_then_takes_lists_of_channels(self):
        background = MeanOverTime(jnp.array(1.0))((STACK, OTHER))
        assert isinstance(background.bkgds, tuple)
        for bkgd, stack in zip(background.bkgds, (STACK, OTHER), strict=True):
            np.testing.assert_allclose(bkgd - stack.mean(0), 0, atol=1e-2)

    def test_it_then_takes_weights_if_it_says_so(self):
        weights = [STACK > 80, np.array([True, False])[:, None, None]]
        background = WeightedLevel()([STACK, OTHER], weights)
        for bkgd, stack, wanted in zip(
            background.bkgds, [STACK, OTHER], weights, strict=True
        ):
            wanted = np.broadcast_to(wanted, stack.shape)
            np.testing.assert_allclose(bkgd, stack[wanted].mean(dtype=float), rtol=1e-5)
        with pytest.raises(ValueError, match="zero or positive, and finite"):
            WeightedLevel()(STACK, -STACK)

    def test_one_without_its_parts_cannot_be_made(self):
        class WithoutEstimate(AbstractEstimator):
            @property
            def halo_frames(self) -> int:
                return 0

        class WithoutHalo(AbstractEstimator):
            def estimate_stack(self, frames):
                return Background(frames, 1.0)

        kinds: list[Any] = [AbstractEstimator, WithoutEstimate, WithoutHalo]
        for incomplete in kinds:
            with pytest.raises(TypeError, match="abstract"):
                incomplete()

    def test_what_it_gives_is_checked(self):
        class Wrong(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                return Background(frames[0], 1.0)

        with pytest.raises(ValueError, match=r"Wrong\.estimate_stack must .*\(6, 8, 10\)"):
            Wrong()(STACK)

        class Bare(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                return frames

        with pytest.raises(TypeError, match=r"estimate_stack must give a Background"):
            Bare()(STACK)

        class Complex(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                return Background(1j * frames, 1.0)

        with pytest.raises(ValueError, match=r"real bkgds, but they are complex64"):
            Complex()(STACK)

        class Listed(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                return Background([1.0, 2.0], 1.0)

        with pytest.raises(ValueError, match=r"bkgds of shape.*their shape is \(2,\)"):
            Listed()(STACK)

        class OfEachFrame(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                return Background(frames, np.ones(len(frames)))

        with pytest.raises(ValueError, match=r"one number as noise_corr.*shape is \(6,\)"):
            OfEachFrame()(STACK)

    def test_frames_less_a_number_have_the_dtype_of_others(self):
        class Recording(WeightedLevel):
            def estimate_stack(self, frames, weights=1.0):
                seen.append(jax.typeof(frames))
                return super().estimate_stack(frames, weights)

        seen = []
        difference = jnp.asarray(OTHER) - 100.0
        for frames in (difference, np.asarray(difference)):
            Recording()(frames)
        assert seen[0] == seen[1]
        assert not seen[0].weak_type

    def test_what_it_cannot_do_is_said(self):
        estimator = MeanOverTime(jnp.array(1.0))
        with pytest.raises(
            TypeError, match="MeanOverTime takes no weights; LocalMean does"
        ):
            estimator(STACK, weights=STACK)
        with pytest.raises(ValueError, match="MeanOverTime has no predict"):
            estimator.predict(STACK, 1)
        assert estimator.molecule_radius_pix is None


ALL: dict[str, Any] = {
    "spatial": SpatialMean(2.0, max_radius_pix=3.0),
    "local": over_time(),
    "median": TemporalMedian(1),
    "opening": SpatialOpening(1.0),
    "chained": Chained(TemporalMedian(1), SpatialMean(2.0)),
    "of a user": MeanOverTime(jnp.array(1.0)),
}
# The chain has a median and a spatial mean.
EACH_ONCE = ["local", "opening", "chained"]


class TestTransformations:
    @pytest.mark.long
    @pytest.mark.parametrize("name", ["local", "opening", "of a user"])
    def test_it_may_be_given_to_jit_and_vmap(self, name):
        estimator = ALL[name]
        expected = estimator(STACK).bkgds
        # Sums in another order, in float32.
        close = ft.partial(np.testing.assert_allclose, rtol=1e-5)
        close(jax.jit(estimator)(STACK).bkgds, expected)
        if name != "local":
            close(jax.vmap(estimator)(np.stack([STACK, STACK])).bkgds[1], expected)

    def test_equal_ones_have_one_hash(self):
        for estimator in ALL.values():
            same = jax.tree.map(lambda leaf: leaf + 0, estimator)
            assert same == estimator
            assert hash(same) == hash(estimator)

    @pytest.mark.parametrize("name", ["spatial", "local"])
    def test_its_form_for_inference_is_of_its_class_and_has_its_radii(self, name):
        estimator = ALL[name]
        fast = estimator.for_inference()
        assert type(fast) is type(estimator)
        assert fast.for_inference().radii.tolist() == fast.radii.tolist()
        np.testing.assert_array_equal(fast.radii, estimator.radii)

    @pytest.mark.slow
    def test_its_form_for_inference_has_fixed_radii(self):
        estimator = ALL["spatial"]
        fast = estimator.for_inference()
        slopes = eqx.filter_grad(lambda e: jnp.sum(e(STACK).bkgds ** 2))(fast)
        assert np.all(slopes.unbounded_radii == 0)
        assert jax.jit(lambda e: e.for_inference().radii)(fast).shape == fast.radii.shape
        match = r"for_inference\(\) needs known radii.*outside"
        with pytest.raises(ValueError, match=match):
            jax.jit(lambda e: e.for_inference().radii)(estimator)


# Several at once, since each is compiled for anew.
MODES: dict[str, Callable[[], list[Any]]] = {
    "without jit": lambda: [jax.disable_jit()],
    "strict": lambda: [
        jax.enable_x64(True),
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.checking_leaks(),
        jax.enable_checks(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", EACH_ONCE)
def test_it_works_in_the_strict_modes_of_jax(name, mode):
    estimator = ALL[name]
    frames = jnp.asarray(STACK)
    expected = estimator(frames).snr(frames, CAMERA)
    with contextlib.ExitStack() as modes:
        for context in MODES[mode]():
            modes.enter_context(context)
        ratios = jax.block_until_ready(estimator(frames).snr(frames, CAMERA))
    # Sums in another order, in float32, of ratios of order one.
    np.testing.assert_allclose(ratios, expected, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("local", "bfloat16"), ("opening", "bool"), ("chained", "bfloat16")],
)
def test_frames_of_any_real_dtype_are_float32_ones(name, dtype):
    frames = jnp.asarray(STACK, dtype)
    background = ALL[name](frames)
    assert background.bkgds.dtype == jnp.float32
    assert background.residuals(frames).dtype == jnp.float32
    expected = ALL[name](frames.astype(jnp.float32)).bkgds
    # Sums in another order, in float32.
    np.testing.assert_allclose(background.bkgds, expected, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", EACH_ONCE)
def test_sharded_frames_come_back_as_they_were_sharded(name):
    estimator, expected = ALL[name], ALL[name](STACK)
    shardings = [
        (AxisType.Explicit, P("devices")),
        (AxisType.Explicit, P(None, "devices")),
        (AxisType.Auto, P("devices")),
    ]
    # Where JAX itself finds the shardings, the others show that it does.
    for axis_type, spec in shardings[: 2 if name == "local" else 3]:
        mesh = jax.make_mesh((2,), ("devices",), axis_types=(axis_type,))
        frames = jax.device_put(STACK, NamedSharding(mesh, spec))
        background = estimator(frames)
        assert background.bkgds.sharding.is_equivalent_to(frames.sharding, 3)
        # Sums in another order, in float32.
        np.testing.assert_allclose(background.bkgds, expected.bkgds, rtol=1e-5)
        if name == "chained":
            ratios = expected.snr(STACK, CAMERA)
            np.testing.assert_allclose(background.snr(frames, CAMERA), ratios, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_within_a_mesh_estimators_are_made_called_and_learn(axis_type):
    expected = SpatialMean(2.0)(STACK).bkgds
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        # Its radii are on all devices.
        estimator = SpatialMean(2.0)
        frames = jax.device_put(STACK, NamedSharding(mesh, P("devices")))
        for bkgds in (
            estimator(frames).bkgds,
            eqx.filter_jit(lambda e, f: e(f).bkgds)(estimator, frames),
            estimator((frames, STACK)).bkgds[0],
        ):
            assert bkgds.sharding.is_equivalent_to(frames.sharding, 3)
            # Sums in another order, in float32.
            np.testing.assert_allclose(bkgds, expected, rtol=1e-6)
        gradient = eqx.filter_grad(lambda e, f: jnp.sum(e(f).bkgds ** 2))(estimator, frames)
        assert jnp.all(gradient.unbounded_radii != 0)
        written = np.empty(STACK.shape, np.float32)
        estimate_movie(STACK, estimator, written, progress=False)
        read = lazy_estimate(STACK, estimator)[:]
    np.testing.assert_array_equal(written, read)
    np.testing.assert_allclose(written, expected, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", EACH_ONCE)
def test_programs_are_exported_with_symbolic_numbers_and_sizes_of_frames(name):
    estimator = ALL[name]
    sizes = "frames, height, width"
    shape = jax.export.symbolic_shape(sizes, constraints=["height >= 5", "width >= 5"])
    program = jax.export.export(jax.jit(lambda frames: estimator(frames).bkgds))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    # Sums in another order, in float32.
    expected = estimator(STACK).bkgds
    np.testing.assert_allclose(program.call(STACK), expected, rtol=1e-5)


@pytest.mark.usefixtures("as_installed")
class TestBadInput:
    def test_a_list_of_frames_is_no_list_of_channels(self):
        with pytest.raises(ValueError, match=r"6 images would be 6 channels.*numpy\.stack"):
            SpatialMean(2.0)(list(STACK))
        with pytest.raises(ValueError, match="2 images would be 2 channels"):
            Chained(SpatialMean(2.0))((STACK[0], OTHER[0]))
        single = SpatialMean(2.0)([STACK[:1], OTHER[:1]])
        assert [bkgd.shape[0] for bkgd in single.bkgds] == [1, 1]

    @pytest.mark.parametrize(
        ("channels", "name"),
        [
            ([STACK, STACK + 1j], "complex64"),
            ([STACK, STACK[0, 0]], r"\(10,\)"),
            ((STACK, np.ma.masked_array(STACK)), "masked"),
            ({"first": STACK}, "object"),
            ((stack for stack in (STACK, STACK)), "object"),
            ([], "empty"),
            ((), "empty"),
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
                background.snr(channels, CAMERA)
        with pytest.raises(ValueError, match="channels"):
            SpatialMean(2.0)(STACK).residuals([STACK])
        with pytest.raises(ValueError, match="one stack of frames, but a list of channels"):
            background.residuals(STACK)

    def test_frames_of_another_shape_than_the_background(self):
        background = SpatialMean(2.0)(STACK)
        for frames in (STACK[:2], STACK[0], STACK[:, :4], STACK[:, :1]):
            with pytest.raises((TypeError, ValueError), match="shape"):
                background.residuals(frames)

    def test_gains_that_are_none(self):
        background = SpatialMean(2.0)(STACK)
        with pytest.raises(ValueError, match="An SNR needs the gain of the camera"):
            background.snr(STACK, Camera(100.0))
        with pytest.raises(TypeError, match=r"camera must be a jaxbkgd.Camera.*0.46"):
            background.snr(STACK, 0.46)
        for gain in (0, -1.0, np.nan, np.inf, jnp.zeros(())):
            with pytest.raises(ValueError, match="gain must be positive and f"):
                snr(STACK, STACK, noise_correction=1.0, gain=gain)

    def test_cameras_that_are_not_as_many_as_the_channels(self):
        background = SpatialMean(2.0)([STACK, OTHER])
        for count in (1, 3, 0):
            with pytest.raises(ValueError, match=rf"2 channels, but {count} cameras"):
                background.snr([STACK, OTHER], count * [CAMERA])
        with pytest.raises(ValueError, match="one stack of frames; give one camera"):
            SpatialMean(2.0)(STACK).snr(STACK, [CAMERA])

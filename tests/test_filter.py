"""The filter's values and derivatives, and that all of JAX's transformations keep them."""

import contextlib
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import central_difference
from hypothesis import given, settings, strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import dense_mean, dense_mean_over_time

from jaxbkgd import estimate_movie, smlmlp, spatial_mean, SpatialMean
from jaxbkgd._filter.kernels import GaussianKernel, half_width, Truncation
from jaxbkgd._filter.primitive import separable_filter, temporal_filter


pytestmark = pytest.mark.usefixtures("quickly_compiled")

# Few taps, so that little is compiled.
BOUND = 2.5
LONG_BOUND = 24.0


@ft.cache
def mean(truncation: Truncation = "smooth", bound: float = BOUND):
    """A jitted filter whose radii (y, x) are traced."""
    return jax.jit(
        lambda frames, radii: spatial_mean(
            frames, radii, max_radius_pix=bound, truncation=truncation
        )
    )


def close(rtol=1e-12):
    """Roundings of sums of some hundred terms of 64 bits; zeros may be roundings too."""
    return ft.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13)


class TestValues:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("radius_pix", "truncation"),
        # With few taps, and with more than the frames have pixels.
        [(0.3, "hard"), ((30.0, 1.7), "hard"), (2.0, "smooth")],
    )
    def test_a_filtered_frame_is_its_float64_mean(self, radius_pix, truncation, rng, x64):
        frames = rng.uniform(50, 150, (2, 33, 26))
        expected = dense_mean(frames, radius_pix, truncation)
        got = spatial_mean(frames, radius_pix, truncation=truncation)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        bounded = mean(truncation, bound=30.0)
        radii = np.broadcast_to(np.float64(radius_pix), 2)
        np.testing.assert_allclose(bounded(frames, radii), expected, rtol=1e-12)

    @pytest.mark.parametrize(("shape", "radius_pix"), [((1, 1), 2.0), ((5, 7), 21.0)])
    def test_a_frame_smaller_than_the_kernel_repeats_its_edge(
        self, shape, radius_pix, rng, x64
    ):
        frame = rng.uniform(50, 150, shape)
        got = spatial_mean(frame, radius_pix)
        np.testing.assert_allclose(got, dense_mean(frame, radius_pix), rtol=1e-12)

    @pytest.mark.slow
    def test_axes_before_the_frames_are_kept(self, rng):
        frames = rng.uniform(50, 150, (2, 3, 8, 9)).astype(np.float32)
        expected = dense_mean(frames, 3.0)
        for first in [(0, 0), (0,), ()]:
            got = spatial_mean(frames[first], 3.0)
            # float32, of some ten terms.
            np.testing.assert_allclose(got, expected[first], rtol=1e-6)
        assert spatial_mean(frames[:0], 3.0).shape == (0, 3, 8, 9)
        assert spatial_mean(frames[:, :0], 30.0).shape == (2, 0, 8, 9)

    @pytest.mark.parametrize(
        ("radius_pix", "truncation"),
        [(7.0, "smooth"), (300.0, "hard"), (1e3, "smooth")],
    )
    def test_a_constant_frame_comes_back(self, radius_pix, truncation):
        frame = np.full((12, 17), 1234.5, np.float32)
        got = spatial_mean(frame, radius_pix, truncation=truncation)
        np.testing.assert_allclose(got, frame, rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["?", "i2", ">u2", "i8", "u8", "f2", "f8"])
    def test_frames_of_any_real_dtype_have_a_mean_in_float32(self, dtype, rng):
        frames = rng.uniform(0, 2, (2, 9, 8)) * np.linspace(1, 50, 8)
        frames = frames.astype(dtype)
        got = spatial_mean(frames, 3.0)
        assert got.dtype == jnp.float32
        # float32, of some ten terms.
        np.testing.assert_allclose(got, dense_mean(frames, 3.0), rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
    def test_large_integers_do_not_wrap(self, dtype):
        frame = np.full((2, 9, 8), np.iinfo(dtype).max - 5, dtype)
        got = spatial_mean(frame, 3.0)
        np.testing.assert_allclose(got, frame.astype(float), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("radius_pix", "truncation"), [(2.0, "hard"), ((30.0, 1.7), "smooth")]
)
def test_the_transpose_is_the_adjoint(radius_pix, truncation, rng, x64):
    frames, cotangent = rng.normal(size=(2, 3, 33, 26))
    kernels = tuple(
        GaussianKernel(half_width(float(radius), truncation), truncation)
        for radius in np.broadcast_to(radius_pix, 2)
    )
    radii = [jnp.float64(radius) for radius in np.broadcast_to(radius_pix, 2)]

    @jax.jit
    def both(frames, cotangent):
        image, pull = jax.vjp(lambda f: separable_filter(f, radii, kernels), frames)
        return image, pull(cotangent)[0]

    image, pulled = both(frames, cotangent)
    scale = np.linalg.norm(frames) * np.linalg.norm(cotangent)
    products = np.vdot(image, cotangent), np.vdot(frames, pulled)
    assert abs(products[0] - products[1]) < 1e-12 * scale


def test_a_gradient_keeps_no_image_but_the_frames():
    frames = np.random.default_rng(0).normal(100, 10, (2, 8, 9)).astype(np.float32)

    def background(frames, radii):
        return mean()(frames, radii)

    _, pull = jax.vjp(background, frames, np.array([2.0, 2.4], np.float32))
    kept = [leaf for leaf in jax.tree.leaves(pull) if np.size(leaf) >= frames.size]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], frames)


@pytest.mark.slow
def test_gradients_in_the_radii_of_integer_frames_are_those_of_floats(rng):
    frames = rng.integers(100, 200, (2, 9, 8)).astype(np.uint16)
    # Differences to the first pixel are negative.
    frames[:, 0, 0] = 1000

    @jax.jit
    def gradient(frames):
        return jax.grad(lambda radii: jnp.sum(mean()(frames, radii) ** 2))(jnp.ones(2))

    got = gradient(frames)
    # A few roundings, in another order.
    np.testing.assert_allclose(got, gradient(frames.astype(np.float32)), rtol=1e-6)
    assert np.all(got < 0)


# A loss that is linear neither in the frames nor in the radii, and a point for it.
WEIGHTS = np.random.default_rng(1).normal(size=(8, 9)).astype(np.float32)
FRAMES = np.random.default_rng(2).normal(size=(4, 8, 9))
PAIR = np.array([1.4, 2.4])


def loss(frames, radii, weights=WEIGHTS):
    return jnp.sum(weights * jnp.sin(mean()(frames, radii)))


value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))


class TestTransformations:
    """Each transformation gives what a plain loop over its calls gives."""

    RADII = np.array([(2.0, 2.0), (1.0, 2.3), (2.4, 0.3), (1.9, 2.5)])

    @pytest.mark.slow
    def test_vmap_over_frames_radii_and_both(self, x64):
        stacks = FRAMES[:, None] + np.arange(2)[:, None, None]
        each = [
            [dense_mean(stack, tuple(pair), "smooth") for pair in self.RADII]
            for stack in stacks
        ]
        by_frames = jax.vmap(mean(), (0, None))(stacks, self.RADII[0])
        close()(by_frames, [row[0] for row in each])
        moved = jax.vmap(mean(), (2, None), 1)(np.moveaxis(stacks, 0, 2), self.RADII[0])
        close()(moved, np.stack([row[0] for row in each], 1))
        by_radii = jax.vmap(mean(), (None, 0))(stacks[0], self.RADII)
        close()(by_radii, each[0])
        by_both = jax.vmap(mean())(stacks, self.RADII)
        close()(by_both, [row[i] for i, row in enumerate(each)])
        nested = jax.vmap(jax.vmap(mean(), (None, 0)), (0, None))(stacks, self.RADII)
        close()(nested, each)

    @pytest.mark.slow
    def test_reverse_mode_equals_forward_mode(self, rng, x64):
        d_frames, d_radii = rng.normal(size=FRAMES.shape), rng.normal(size=2)

        @jax.jit
        def forward(*tangents):
            value, linear = jax.linearize(loss, FRAMES, PAIR)
            return value, jax.jvp(loss, (FRAMES, PAIR), tangents)[1], linear(*tangents)

        value, *slopes = forward(d_frames, d_radii)
        expected, gradients = value_and_gradients(FRAMES, PAIR)
        close()(value, expected)
        for slope in slopes:
            close()(
                slope,
                np.vdot(gradients[0], d_frames) + np.vdot(gradients[1], d_radii),
            )

    @pytest.mark.slow
    def test_jacobians_agree(self, x64):
        frames = FRAMES[:, :3, :2]
        forward = jax.jit(jax.jacfwd(mean(), (0, 1)))(frames, PAIR)
        reverse = jax.jit(jax.jacrev(mean(), (0, 1)))(frames, PAIR)
        jax.tree.map(close(), forward, reverse)
        # The filter is linear: its Jacobian's columns are the images of the basis.
        basis = np.eye(frames.size).reshape(-1, *frames.shape)
        images = dense_mean(basis, tuple(PAIR), "smooth")
        close()(np.moveaxis(images, 0, -1).reshape(forward[0].shape), forward[0])

    @pytest.mark.long
    def test_checkpoint_scan_and_filter_jit_change_nothing(self, x64):
        def of_frames(frames, radii):
            def add(total, frame):
                return total + loss(frame[None], radii), None

            return jax.lax.scan(add, 0.0, frames)[0]

        expected = value_and_gradients(FRAMES, PAIR)
        policy = jax.checkpoint_policies.nothing_saveable
        for function in (loss, of_frames):
            saved = jax.checkpoint(function, policy=policy)
            got = jax.jit(jax.value_and_grad(saved, (0, 1)))(FRAMES, PAIR)
            jax.tree.map(close(), got, expected)
        close()(eqx.filter_jit(loss)(FRAMES, PAIR), expected[0])

    @pytest.mark.long
    def test_hessians_agree_in_all_orders_of_modes(self, x64):
        modes = jax.jacfwd, jax.jacrev
        functions = [outer(inner(loss, 1), 1) for outer in modes for inner in modes]
        first, *others = jax.jit(lambda *at: [f(*at) for f in functions])(FRAMES, PAIR)
        assert np.linalg.norm(first) > 1e-3
        for hessian in others:
            close()(hessian, first)

    @pytest.mark.long
    def test_mixed_derivatives_agree_in_both_orders(self, x64):
        blocks = jax.jit(jax.jacfwd(jax.grad(loss, (0, 1)), (0, 1)))(FRAMES[:1], PAIR)
        (by_frames, rows), (columns, by_radii) = blocks
        close()(rows, np.moveaxis(columns, 0, -1))
        close()(by_radii, by_radii.T)
        close()(by_frames, np.transpose(by_frames, (3, 4, 5, 0, 1, 2)))

    @pytest.mark.slow
    @pytest.mark.parametrize("in_axes", [(0, None), (0, 0)])
    def test_gradients_under_vmap_equal_a_loop(self, in_axes, x64):
        stacks, pairs = np.stack([FRAMES, 2 * FRAMES]), np.stack([PAIR, PAIR[::-1]])

        def inputs(index):
            return [
                values[index] if axis == 0 else values[0]
                for values, axis in zip((stacks, pairs), in_axes, strict=True)
            ]

        mapped = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), in_axes))(
            *inputs(slice(None))
        )
        for index in range(2):
            jax.tree.map(
                lambda got, expected, index=index: close()(got[index], expected),
                mapped,
                value_and_gradients(*inputs(index)),
            )


@pytest.mark.parametrize("edges", ["repeated", "empty"])
class TestTime:
    """Along time, radii are traced: (4, 8, 9) frames, and taps for 6 frames on a side."""

    KERNEL = GaussianKernel(half_width(5.0, "smooth"), "smooth", is_bound=True)

    @classmethod
    def mean(cls, edges):
        return jax.jit(lambda frames, r: temporal_filter(frames, r, cls.KERNEL, edges))

    @pytest.mark.slow
    def test_values_and_slopes_are_those_of_the_reference(self, edges, x64):
        function, radius = self.mean(edges), jnp.float64(3.0)
        got, slope = jax.jvp(lambda r: function(FRAMES, r), (radius,), (1.0 + 0 * radius,))
        close()(got, dense_mean_over_time(FRAMES, 3.0, edges=edges))
        expected = central_difference(
            lambda r: dense_mean_over_time(FRAMES, r, edges=edges), 3.0, 1e-5
        )
        # The step squared, and roundings over the step.
        np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-9)

    @pytest.mark.slow
    def test_the_transpose_is_the_adjoint_and_reverse_is_forward(self, edges, rng, x64):
        function, radius = self.mean(edges), jnp.float64(3.0)
        cotangent, d_frames = rng.normal(size=(2, *FRAMES.shape))
        image, pull = jax.vjp(function, FRAMES, radius)
        bar, radius_bar = pull(cotangent)
        _, moved = jax.jvp(function, (FRAMES, radius), (d_frames, 0 * radius + 0.7))
        # Products of some hundred terms of order one.
        close_sums = ft.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
        close_sums(np.vdot(image, cotangent), np.vdot(FRAMES, bar))
        close_sums(np.vdot(moved, cotangent), np.vdot(bar, d_frames) + 0.7 * radius_bar)

    @pytest.mark.slow
    def test_vmap_over_frames_radii_and_both_equals_a_loop(self, edges, x64):
        function = self.mean(edges)
        stacks, radii = np.stack([FRAMES, FRAMES[::-1]]), np.array([0.3, 4.0])
        for in_axes, places in [((0, None), (0, 0)), ((None, 0), (0, 1)), ((0, 0), (0, 1))]:
            at = [
                values if axis == 0 else values[0]
                for values, axis in zip((stacks, radii), in_axes, strict=True)
            ]
            expected = [
                dense_mean_over_time(
                    stacks[index if in_axes[0] == 0 else 0],
                    radii[places[index]],
                    edges=edges,
                )
                for index in range(2)
            ]
            close()(jax.vmap(function, in_axes)(*at), expected)


class TestManyDevices:
    """Two CPU devices, each with half of the frames, lines or columns, or with all."""

    EACH, ALL = PartitionSpec("frames"), PartitionSpec()

    @staticmethod
    def mesh(kind=AxisType.Auto):
        return jax.make_mesh((2,), ("frames",), axis_types=(kind,))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.parametrize(
        ("place", "is_compiled"), [(0, False), (1, True), (2, False), (None, True)]
    )
    def test_frames_come_back_as_they_were_sharded(self, kind, is_compiled, place, x64):
        spec = PartitionSpec(*("frames" if axis == place else None for axis in range(3)))
        sharding = NamedSharding(self.mesh(kind), spec)
        frames = jax.device_put(FRAMES[:, :8, :8], sharding)

        def background(frames):
            return spatial_mean(frames, 2.0)

        got = (jax.jit(background) if is_compiled else background)(frames)
        assert got.sharding.is_equivalent_to(sharding, 3)
        close()(got, dense_mean(FRAMES[:, :8, :8], 2.0))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_gradients_of_frames_on_a_mesh_are_the_same(self, kind, x64):
        sharding = NamedSharding(self.mesh(kind), PartitionSpec(None, "frames"))
        frames = jax.device_put(FRAMES.reshape(2, 2, 8, 9), sharding)
        value, (d_frames, d_radii) = value_and_gradients(frames, PAIR)
        assert d_frames.sharding.is_equivalent_to(sharding, 4)
        got = value, (np.asarray(d_frames).reshape(FRAMES.shape), d_radii)
        jax.tree.map(close(), got, value_and_gradients(FRAMES, PAIR))

    @pytest.mark.parametrize(
        ("kind", "place"), [(AxisType.Auto, 1), (AxisType.Explicit, 0)]
    )
    def test_movies_on_a_mesh_are_filtered_over_time(self, kind, place, x64):
        spec = PartitionSpec(*("frames" if axis == place else None for axis in range(3)))
        sharding = NamedSharding(self.mesh(kind), spec)
        kernel = GaussianKernel(half_width(3.0, "smooth"), "smooth")
        function = jax.jit(
            lambda frames: temporal_filter(frames, jnp.float64(3.0), kernel, "empty")
        )
        got = function(jax.device_put(FRAMES, sharding))
        assert got.sharding.is_equivalent_to(sharding, 3)
        close()(got, dense_mean_over_time(FRAMES, 3.0, edges="empty"))

    def shard(self, function, in_specs, out_specs):
        return jax.jit(
            jax.shard_map(
                function, mesh=self.mesh(), in_specs=in_specs, out_specs=out_specs
            )
        )

    @staticmethod
    def total_loss(frames, radii):
        return jax.lax.psum(loss(frames, radii), "frames")

    @pytest.mark.long
    def test_shards_give_the_same_value_and_gradients(self, x64):
        in_specs = (self.EACH, self.ALL)
        expected = value_and_gradients(FRAMES, PAIR)
        sharded = self.shard(self.total_loss, in_specs, self.ALL)
        jax.tree.map(close(), jax.value_and_grad(sharded, (0, 1))(FRAMES, PAIR), expected)
        inside = jax.value_and_grad(self.total_loss, (0, 1))
        inside = self.shard(inside, in_specs, (self.ALL, in_specs))
        jax.tree.map(close(), inside(FRAMES, PAIR), expected)

    @pytest.mark.slow
    def test_sharded_radii_filter_shared_frames(self, x64):
        pairs = np.stack([PAIR, PAIR[::-1]])

        def total_loss(frames, pairs):
            return jax.lax.psum(loss(frames, pairs[0]), "frames")

        total_loss = self.shard(total_loss, (self.ALL, self.EACH), self.ALL)
        value, gradients = jax.value_and_grad(total_loss, (0, 1))(FRAMES, pairs)
        each = [value_and_gradients(FRAMES, pair) for pair in pairs]
        close()(value, each[0][0] + each[1][0])
        close()(gradients[0], each[0][1][0] + each[1][1][0])
        close()(gradients[1], np.stack([each[0][1][1], each[1][1][1]]))


def revived(function, *arguments, platforms=("cpu", "cuda", "tpu")):
    """The function exported and read again."""
    exported = export.export(function, platforms=platforms)(*arguments)
    exported = export.deserialize(exported.serialize())
    assert exported.platforms == platforms
    return exported.call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimensions", "radius_pix"), [("t, 24, 28", 2.0), ("t, h, w", 60.0)]
)
def test_exported_sizes_may_be_symbolic(dimensions, radius_pix, rng, x64):
    """With a few taps, and with more than frames have pixels."""
    frames = jax.ShapeDtypeStruct(export.symbolic_shape(dimensions), jnp.float64)
    module = SpatialMean(radius_pix)
    call = revived(jax.jit(lambda frames: module(frames).bkgds), frames)
    for size in [(3, 24, 28), *[(2, 5, 40)] * ("h" in dimensions)]:
        stack = rng.normal(100, 10, size)
        stack[0, 1, 2] = np.inf
        # The module's radius went through a logit and back.
        expected = dense_mean(stack, radius_pix, "smooth")
        np.testing.assert_allclose(call(stack), expected, rtol=1e-10)


@pytest.mark.long
def test_one_exported_program_serves_cpu_cuda_and_tpu(x64):
    call = revived(value_and_gradients, FRAMES, PAIR)
    jax.tree.map(close(), call(FRAMES, PAIR), value_and_gradients(FRAMES, PAIR))


@pytest.mark.slow
def test_gradients_are_exported_with_symbolic_sizes(x64):
    """In one program for CPU, CUDA and TPU."""
    frames = jax.ShapeDtypeStruct(export.symbolic_shape("t, h, w"), jnp.float64)
    radii = jax.ShapeDtypeStruct((2,), jnp.float64)
    weights = jax.ShapeDtypeStruct(frames.shape[1:], jnp.float32)
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    call = revived(gradients, frames, radii, weights)
    jax.tree.map(close(), call(FRAMES, PAIR, WEIGHTS), value_and_gradients(FRAMES, PAIR))


@contextlib.contextmanager
def all_checks():
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.enable_checks(True),
        jax.checking_leaks(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


@pytest.mark.long
@pytest.mark.parametrize("mode", [all_checks, jax.disable_jit])
def test_strict_modes_of_jax_change_nothing(mode):
    def squares(frames, radii):
        # With taps that may be zero.
        bkgds = spatial_mean(frames, radii, max_radius_pix=40.0, truncation="smooth")
        return jnp.sum(bkgds**2)

    point = jnp.asarray(FRAMES, jnp.float32), jnp.array([2.0, 3.0], jnp.float32)
    expected = jax.value_and_grad(squares, (0, 1))(*point)
    with mode():
        got = jax.value_and_grad(squares, (0, 1))(*point)
    # float32, in another order.
    check = ft.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(check, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimate",
    [
        lambda frames: smlmlp.bkgd_spatial_mean([frames], 2.0)[0][0],
        lambda frames: movie_estimate(frames),
    ],
    ids=["drop-in", "estimate_movie"],
)
def test_nothing_needs_jit(estimate):
    frames = np.float32(100 + FRAMES)
    expected = estimate(frames)
    with jax.disable_jit():
        got = estimate(frames)
    # float32, in another order.
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def movie_estimate(frames):
    bkgds = np.empty((len(frames), 1, *frames.shape[1:]), np.float32)
    estimate_movie(frames, SpatialMean(2.0), bkgds)
    return bkgds


def movie_with_what_is_not_finite(rng):
    """Frames with none, one and several pixels that are not finite, in the middle, at
    borders and in corners."""
    frames = rng.uniform(50, 150, (8, 23, 31))
    frames[1, 11, 15] = np.nan
    frames[2, 0, 0] = np.inf
    frames[3, 22, 13] = -np.inf
    frames[3, 2, 30] = np.inf
    frames[4, 22, 30] = np.nan
    frames[4, 9, 0] = np.inf
    frames[6, 10, 10] = np.inf
    frames[6, 12, 11] = -np.inf
    frames[7] = np.nan
    return frames


# NaN and infinities are equal where they are in the same places.
same_where_not_finite = ft.partial(np.testing.assert_allclose, rtol=1e-12)


class TestNotFinite:
    """The reference sums over the taps that are not zero, and no others."""

    SETTINGS = (
        (2.0, None, "hard"),  # few taps
        (2.0, 12.0, "smooth"),  # few taps under a bound much larger
        ((0.3, 20.0), None, "smooth"),  # one tap along y, more than frames have along x
        ((3.0, 20.0), 60.0, "hard"),
    )

    @pytest.mark.slow
    @pytest.mark.parametrize(("radius_pix", "bound", "truncation"), SETTINGS)
    def test_reaches_exactly_what_its_kernel_covers(
        self, radius_pix, bound, truncation, rng, x64
    ):
        frames = movie_with_what_is_not_finite(rng)
        got = spatial_mean(frames, radius_pix, max_radius_pix=bound, truncation=truncation)
        expected = dense_mean(frames, radius_pix, truncation)
        same_where_not_finite(got, expected)

    @pytest.mark.slow
    def test_reaches_the_same_pixels_under_vmap(self, rng, x64):
        truncation, frames = "hard", movie_with_what_is_not_finite(rng)
        pairs = np.array([(2.0, 2.0), (0.3, 2.5)])
        function = mean(truncation)
        by_radii = jax.vmap(function, (None, 0))(frames, pairs)
        by_frames = jax.vmap(function, (1, None))(frames.swapaxes(0, 1), pairs[0])
        for got, pair in [(by_radii[0], 0), (by_radii[1], 1), (by_frames, 0)]:
            expected = dense_mean(frames, tuple(pairs[pair]), truncation)
            same_where_not_finite(got, expected)

    @pytest.mark.slow
    def test_stays_out_of_derivatives_elsewhere(self, rng, x64):
        frames = movie_with_what_is_not_finite(rng)
        clean = np.where(np.isfinite(frames), frames, 0.0)
        radii = np.array([2.0, 3.0])
        function = mean("smooth", LONG_BOUND)

        @jax.jit
        def derivatives(frames, cotangent):
            _, slopes = jax.jvp(lambda r: function(frames, r), (radii,), (radii,))
            _, pull = jax.vjp(lambda f: function(f, radii), frames)
            return *pull(cotangent), slopes

        is_finite = np.isfinite(dense_mean(frames, tuple(radii), "smooth"))
        cotangent = rng.normal(size=frames.shape) * is_finite
        d_frames, slopes = derivatives(frames, cotangent)
        clean_d_frames, clean_slopes = derivatives(clean, cotangent)
        close()(d_frames, clean_d_frames)
        close()(slopes[is_finite], clean_slopes[is_finite])


# Frames of one size, so that the compilations are few.
frames_of_any_content = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(100, 50, (6, 5)).astype(np.float32)
)
any_radii = st.tuples(st.floats(0.125, BOUND, width=32), st.floats(0.125, BOUND, width=32))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    frame=frames_of_any_content,
    radii=any_radii,
    scale=st.floats(-10, 10, width=32),
    shift=st.floats(-100, 100, width=32),
)
def test_a_mean_is_a_mean(frame, radii, scale, shift):
    function = mean()
    radii = np.array(radii, np.float32)
    image = np.asarray(function(frame, radii))
    largest = np.abs(frame).max()
    # float32, of some hundred terms whose weights sum to one.
    rounding = 1e-6 * largest
    assert image.min() >= frame.min() - rounding
    assert image.max() <= frame.max() + rounding
    moved = function(np.float32(scale) * frame + np.float32(shift), radii)
    # Products below the smallest normal number are zero.
    least = 4 * np.finfo(np.float32).tiny
    rounding = 2e-6 * (abs(scale) * largest + abs(shift)) + least
    np.testing.assert_allclose(moved, scale * image + shift, rtol=0, atol=rounding)
    mirrored = function(frame[::-1, ::-1], radii)
    np.testing.assert_allclose(mirrored[::-1, ::-1], image, rtol=0, atol=1e-6 * largest)


@pytest.mark.slow
def test_another_radius_under_the_same_bound_is_not_compiled_again():
    traced = []

    @jax.jit
    def mean(frames, radius_pix):
        traced.append(radius_pix)
        return spatial_mean(frames, radius_pix, max_radius_pix=9.0)

    frames = jnp.ones((2, 16, 16))
    for radius in (2.0, 7.0):
        mean(frames, radius)
    assert len(traced) == 1

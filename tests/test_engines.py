"""Every engine of the filter, forced one by one, against a dense matrix in float64."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec

from jaxbkgd import spatial_mean
from jaxbkgd._estimators import spatial_mean as _spatial_mean
from jaxbkgd._filter import engines as _engines, primitive as _filter
from jaxbkgd._filter.kernels import GapKernel, GaussianKernel, half_width


# Several strips and bands, with a rest; strips narrower than a block; fewer pixels than a
# band; a single line.
SHAPES = [(2, 90, 140), (1, 90, 26), (1, 33, 26), (1, 1, 130)]
# Few taps, so that little is compiled.
RADII, BOUND = (1.5, 4.0), 5.0
ENGINES = [
    "shifts in strips",
    "shifts in blocks",
    "products in strips",
    "shifts",
    "products",
]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Filters with one engine only: `engine(frames, radii, outputs, edges)`."""
    most_taps = 0 if request.param.startswith("products") else 10**6
    monkeypatch.setattr(_engines, "_MOST_TAPS", most_taps)
    monkeypatch.setattr(_engines, "_MOST_TAPS_OF_LONG_AXES", most_taps)
    # Two pieces of a product along y, and a loop over them.
    monkeypatch.setattr(_engines, "_STRIP_LINES", 80)
    monkeypatch.setattr(_engines, "_BANDED_STRIP_BYTES", 0)
    monkeypatch.setattr(_engines, "_BANDED_COLUMNS", 64)
    monkeypatch.setattr(_engines, "_MOST_PIECES", 1)
    if request.param == "shifts in blocks":
        force_blocks(monkeypatch)
    # What no piece writes is seen.
    monkeypatch.setattr(_engines, "_unwritten", full_of_nan)
    is_in_strips = request.param.endswith(("strips", "blocks"))
    walk = _filter._filter_in_pieces if is_in_strips else _filter._filter_at_once
    over = _filter._filter_over_in_pieces if is_in_strips else _filter._filter_over_at_once

    def run(frames, radii, outputs, edges="repeated", spent=None):
        arguments = [frames, *(jnp.asarray(r, jnp.float64) for r in radii)]
        if spent is not None:
            arguments.insert(0, spent)
        call = walk if spent is None else over
        call = ft.partial(call, outputs=outputs, edges=edges, is_finite=False)
        return jax.jit(call)(*arguments)

    return run


def full_of_nan(stack, radii, number):
    del number
    return jnp.full_like(stack, jnp.nan, radii[0].dtype)


def force_blocks(monkeypatch):
    """As if no line fitted into the nearest cache."""
    monkeypatch.setattr(_engines, "_COLUMNS", 32)
    monkeypatch.setattr(_engines, "_L1_BYTES", 0)
    monkeypatch.setattr(_engines, "_L1_WAYS", 0)


def kernels_for(radii, is_bound):
    """The kernels (y, x), of their own width or of that of a bound."""
    return tuple(
        GaussianKernel(
            half_width(BOUND if is_bound else r, "smooth"), "smooth", 0, is_bound
        )
        for r in radii
    )


def matrix(kernel, radius, size, edges="repeated"):
    """The filter along an axis as a dense matrix."""
    taps = np.asarray(kernel.taps(jnp.asarray(radius, jnp.float64)))
    dense, lines = np.zeros((size, size)), np.arange(size)
    for distance in range(1 - taps.size, taps.size):
        read = lines + distance
        is_read = (read >= 0) & (read < size) | (edges != "empty")
        np.add.at(
            dense, (lines[is_read], read.clip(0, size - 1)[is_read]), taps[abs(distance)]
        )
    return dense.T if edges == "folded" else dense


@pytest.mark.parametrize("shape", SHAPES)
def test_values_slopes_and_adjoints_are_those_of_a_dense_matrix(
    engine, shape, request, rng, x64
):
    # Compiling is slow: not every combination of three, but every pair of two.
    engine_index = ENGINES.index(request.node.callspec.params["engine"])
    is_bound = (engine_index + SHAPES.index(shape)) % 2 == 1
    frames = rng.normal(100, 10, shape)
    y, x = kernels_for(RADII, is_bound)
    outputs = ((y, x), (y.derivative(), x), (y, x.derivative()))
    expected = [
        (matrix(k_y, RADII[0], shape[1]), matrix(k_x, RADII[1], shape[2]))
        for k_y, k_x in outputs
    ]
    # Some hundred roundings of 64 bits, of the largest input.
    close = ft.partial(
        np.testing.assert_allclose, rtol=0, atol=1e-12 * np.abs(frames).max()
    )
    for got, (a_y, a_x) in zip(engine(frames, RADII, outputs), expected, strict=True):
        close(got, a_y @ frames @ a_x.T)
    adjoints = engine(frames, RADII, outputs, edges="folded")
    for got, (a_y, a_x) in zip(adjoints, expected, strict=True):
        close(got, a_y.T @ frames @ a_x)


@pytest.mark.parametrize("edges", ["repeated", "folded"])
def test_a_single_tap_changes_nothing(engine, edges, rng, x64):
    frames = rng.normal(100, 10, (2, 70, 40))
    kernels = tuple(GaussianKernel(half_width(0.3, "smooth"), "smooth") for _ in "yx")
    (image,) = engine(frames, (0.3, 0.3), (kernels,), edges)
    # The tap is a sum of twelve terms, over itself.
    np.testing.assert_allclose(image, frames, rtol=1e-15)


@pytest.fixture(params=["in pieces", "at once"])
def derivatives(request):
    """The derivative of an image, and its transpose, worked out in one way only."""
    if request.param == "in pieces":
        return _filter._pushforward_in_pieces, _filter._pullback_in_pieces
    return _filter._pushforward, _filter._pullback


@pytest.mark.parametrize("edges", ["repeated", "empty"])
@pytest.mark.parametrize("has_products", [False, True])
def test_a_derivative_and_its_transpose_are_those_of_dense_matrices(
    derivatives, edges, has_products, monkeypatch, rng, x64
):
    monkeypatch.setattr(_engines, "_MOST_TAPS", 0 if has_products else 10**6)
    pushforward, pullback = derivatives
    # Two strips of lines, of which some are in both.
    frames, moved, cotangent = rng.normal(100, 10, (3, 2, 90, 40))
    dots = np.array([0.7, -1.3])
    y, x = kernels = kernels_for(RADII, is_bound=True)
    outputs = ((y.derivative(), x), (y, x.derivative()), (y, x))
    matrices = [
        (matrix(k_y, RADII[0], 90, edges), matrix(k_x, RADII[1], 40, edges))
        for k_y, k_x in outputs
    ]
    *slopes, image = (a_y @ frames @ a_x.T for a_y, a_x in matrices)
    a_y, a_x = matrices[-1]
    # Some hundred roundings of 64 bits, of the largest input or sum.
    close = ft.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-10)

    options = {"kernels": kernels, "outputs": outputs, "is_finite": False}
    push = jax.jit(ft.partial(pushforward, edges=edges, **options))
    got_tangent, got_image = push(frames, *map(jnp.float64, RADII), *dots, moved)
    close(got_image, image)
    close(got_tangent, np.tensordot(dots, slopes, 1) + a_y @ moved @ a_x.T)

    pull = jax.jit(ft.partial(pullback, edges=_filter._ADJOINT[edges], **options))
    *sums, back = pull(cotangent, frames, *map(jnp.float64, RADII))
    close(back, a_y.T @ cotangent @ a_x)
    # Of a thousand terms of 10^4.
    np.testing.assert_allclose(sums, [np.vdot(cotangent, each) for each in slopes], 1e-9)


@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_a_derivative_in_time_and_its_transpose_are_those_of_dense_matrices(
    derivatives, edges, rng, x64
):
    pushforward, pullback = derivatives
    # Two blocks of columns, of which some are in both.
    courses, cotangent = rng.normal(100, 10, (2, 2, 20, 300))
    kernel, radius = time_kernel(is_bound=False), jnp.float64(5.0)
    slope = matrix(kernel.derivative(), 5.0, 20, edges) @ courses
    options = {
        "kernels": (kernel,),
        "outputs": ((kernel.derivative(),),),
        "is_finite": False,
    }
    push = jax.jit(ft.partial(pushforward, edges=edges, **options))
    (tangent,) = push(courses, radius, 0.7)
    # Some ten roundings of 64 bits, of the largest input.
    np.testing.assert_allclose(tangent, 0.7 * slope, rtol=0, atol=1e-11)
    pull = jax.jit(ft.partial(pullback, edges=_filter._ADJOINT[edges], **options))
    (total,) = pull(cotangent, courses, radius)
    np.testing.assert_allclose(total, np.vdot(cotangent, slope), rtol=1e-9)


@pytest.mark.parametrize("place", ["frames", "cotangent"])
def test_no_gradient_in_the_radii_comes_of_what_is_not_finite(derivatives, place, rng):
    _, pullback = derivatives
    arrays = {"frames": rng.normal(size=(1, 70, 9)), "cotangent": np.ones((1, 70, 9))}
    arrays[place][0, 69, 8] = np.nan
    y, x = kernels_for(RADII, is_bound=True)
    sums = pullback(
        *(jnp.asarray(arrays["cotangent"]), jnp.asarray(arrays["frames"])),
        *map(jnp.float32, RADII),
        kernels=(y, x),
        outputs=((y.derivative(), x), (y, x.derivative())),
        edges="folded",
        is_finite=False,
    )
    assert np.all(np.isnan(sums))


@pytest.mark.parametrize("dtype", [np.bool_, np.uint16, np.int32])
def test_frames_of_any_real_dtype_are_converted(engine, dtype, rng, x64):
    frames = rng.integers(0, 2 if dtype is np.bool_ else 200, (2, 70, 40)).astype(dtype)
    kernels = kernels_for(RADII, is_bound=False)
    (got,) = engine(frames, RADII, (kernels,))
    a_y, a_x = matrix(kernels[0], RADII[0], 70), matrix(kernels[1], RADII[1], 40)
    np.testing.assert_allclose(got, a_y @ frames.astype(float) @ a_x.T, atol=1e-10)


@pytest.mark.parametrize("is_bound", [False, True])
def test_of_an_image_that_is_written_over_nothing_is_left(engine, is_bound, rng, x64):
    frames = rng.normal(100, 10, (3, 90, 140))
    frames[1, 40, 0] = np.nan
    kernels = kernels_for(RADII, is_bound)
    got = engine(frames, RADII, (kernels,), spent=np.full(frames.shape, np.nan))
    np.testing.assert_array_equal(got, engine(frames, RADII, (kernels,)))


def one(call, frames, radii):
    return call(frames, radii)


def two_of_a_shape(call, frames, radii):
    return call(frames, radii), call(frames[::-1], radii)


def one_in_each_turn(call, frames, radii):
    return jax.lax.map(lambda radii: call(frames, radii), jnp.stack([radii, radii + 1]))


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("program", [one, two_of_a_shape, one_in_each_turn])
def test_pixels_of_an_image_are_written_once(program, is_bound):
    makers = makers_of_images(ft.partial(program, calls(is_bound)))
    # Nothing but the loop over pieces. (Where it is known that all is finite, there is no
    # loop that adds what is not.)
    assert makers - {"reverse"} == {"custom-call", "dynamic-update-slice"}


def test_an_image_that_is_written_over_is_not_made():
    makers = makers_of_images(calls(is_bound=True), is_written_over=True)
    assert makers == {"dynamic-update-slice"}


def calls(is_bound):
    kernels = kernels_for(RADII, is_bound)
    return lambda frames, radii, *spent: _spatial_mean.filtered(
        frames, radii, kernels, *spent
    )


def makers_of_images(call, is_written_over=False):
    """The steps of the compiled program that give an image, but for those that hand on
    what is there."""
    frames = jax.ShapeDtypeStruct((3, 90, 140), jnp.float32)
    radii = jax.ShapeDtypeStruct((2,), jnp.float32)
    spent = [frames] * is_written_over
    jitted = jax.jit(call, donate_argnums=(2,) * is_written_over)
    text = jitted.trace(frames, radii, *spent).lower().compile().as_text()
    assert text is not None
    makers = set(re.findall(r" = f32\[3,90,140\]\S* ([a-z-]+)\(", text))
    return makers - {"parameter", "get-tuple-element", "fusion", "bitcast"}


@pytest.fixture
def lapack_that_refuses(monkeypatch):
    """Asked for no equations, as that of a later version might."""

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("37800 pixels of no equations")

    monkeypatch.setattr(_engines, "_solution_of_no_equations", refuse)
    _engines._can_be_unwritten.cache_clear()
    yield
    _engines._can_be_unwritten.cache_clear()


@pytest.mark.usefixtures("lapack_that_refuses")
def test_where_lapack_refuses_images_are_filled(rng, x64):
    frames = rng.normal(100, 10, (3, 90, 140)).astype(np.float32)
    filled = _filtered(frames)
    assert not _engines._can_be_unwritten()
    kernels = kernels_for(RADII, is_bound=False)
    a_y, a_x = matrix(kernels[0], RADII[0], 90), matrix(kernels[1], RADII[1], 140)
    # In float32, whose steps are 1e-7, sums of up to 13 taps.
    np.testing.assert_allclose(filled, a_y @ frames @ a_x.T, rtol=1e-6)


def test_exported_programs_call_nothing_that_may_be_refused(rng):
    frames = rng.normal(100, 10, (3, 90, 140)).astype(np.float32)
    exported = jax.export.export(jax.jit(_filtered), platforms=["cpu"])(frames)
    assert "lapack" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(frames), _filtered(frames))


def _filtered(frames):
    """By a program that is compiled now."""
    kernels = kernels_for(RADII, is_bound=False)
    call = jax.jit(lambda frames: _spatial_mean.filtered(frames, jnp.array(RADII), kernels))
    return call(frames)


@pytest.mark.parametrize("is_bound", [False, True])
def test_what_is_not_finite_reaches_the_pixels_that_a_dense_matrix_reads(
    engine, is_bound, rng, x64
):
    frames = rng.normal(100, 10, (3, 80, 70))
    frames[0, 40, 0], frames[0, 45, 3], frames[2, 79, 69] = np.nan, np.inf, -np.inf
    kernels = kernels_for(RADII, is_bound)
    (got,) = engine(frames, RADII, (kernels,))
    a_y, a_x = (
        matrix(kernel, radius, size) != 0
        for kernel, radius, size in zip(kernels, RADII, frames.shape[1:], strict=True)
    )

    def reached(values):
        return a_y @ values.astype(int) @ a_x.T > 0

    nan, up, down = map(reached, (np.isnan(frames), frames == np.inf, frames == -np.inf))
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got == np.inf, up & ~nan)
    np.testing.assert_array_equal(got == -np.inf, down & ~nan)
    assert np.all(np.isfinite(got[1]))


# Courses in time (batch, frames, pixels): blocks of 256 pixels with a rest, fewer frames
# than the kernel is wide, a single frame.
COURSES = [(2, 40, 300), (1, 9, 256), (2, 1, 7)]


def time_kernel(is_bound):
    """For a radius of 5 frames, or for any below 12."""
    width = half_width(12.0 if is_bound else 5.0, "smooth")
    return GaussianKernel(width, "smooth", is_bound=is_bound)


@pytest.fixture(params=["in pieces", "in pieces, by groups of taps", "at once"])
def filter_courses(request, monkeypatch):
    """Filters along time in one way only."""
    if request.param.endswith("groups of taps"):
        monkeypatch.setattr(_engines, "_MOST_SHIFTS", 3)
        monkeypatch.setattr(_engines, "_SHIFT_GROUP", 4)
    is_at_once = request.param == "at once"
    way = _filter._filter_at_once if is_at_once else _filter._filter_in_pieces

    def run(courses, kernels, edges):
        outputs = tuple((kernel,) for kernel in kernels)
        walk = ft.partial(way, is_finite=False)
        walk = ft.partial(walk, outputs=outputs, edges=edges)
        return jax.jit(walk)(courses, jnp.asarray(5.0, courses.dtype))

    return run


@pytest.mark.parametrize("shape", COURSES)
@pytest.mark.parametrize("edges", ["repeated", "folded", "empty"])
def test_courses_in_time_are_filtered_by_a_dense_matrix(
    filter_courses, shape, edges, rng, x64
):
    courses = rng.normal(100, 10, shape)
    kernel = time_kernel(is_bound=COURSES.index(shape) == 1)
    kernels = (kernel, kernel.derivative(), GapKernel(kernel, 2))
    images = filter_courses(courses, kernels, edges)
    for got, kernel in zip(images, kernels, strict=True):
        expected = matrix(kernel, 5.0, shape[1], edges) @ courses
        # Some ten roundings of 64 bits, of the largest input.
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * courses.max())


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_what_is_not_finite_stays_near_in_time(filter_courses, is_bound, edges, rng, x64):
    courses = rng.normal(100, 10, (1, 40, 300))
    courses[0, 20, 7], courses[0, 0, 8], courses[0, 39, 299] = np.nan, np.inf, -np.inf
    (got,) = filter_courses(courses, [time_kernel(is_bound)], edges)
    reads = matrix(time_kernel(is_bound), 5.0, 40, edges) != 0
    for test in (np.isnan, np.isposinf, np.isneginf):
        reached = reads @ test(courses).astype(int) > 0
        np.testing.assert_array_equal(test(got), reached)


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_what_is_not_finite_reaches_across_a_gap(filter_courses, is_bound, edges, rng, x64):
    """It makes what lies in the gap not finite either, but no number that is wrong."""
    courses = rng.normal(100, 10, (1, 40, 300))
    courses[0, 20, 7], courses[0, 0, 8], courses[0, 39, 299] = np.nan, np.inf, -np.inf
    kernel = time_kernel(is_bound)
    (got,) = filter_courses(courses, [GapKernel(kernel, 2)], edges)
    reads = matrix(kernel, 5.0, 40, edges) != 0
    reached = reads @ ~np.isfinite(courses)
    np.testing.assert_array_equal(~np.isfinite(got), reached)


@pytest.mark.bits
@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_a_frame_has_the_same_bits_in_every_chunk(filter_courses, edges, rng):
    courses = rng.normal(100, 10, (1, 60, 300)).astype(np.float32)
    kernel = time_kernel(is_bound=False)
    halo = kernel.half_width
    (whole,) = filter_courses(courses, [kernel], edges)
    for first, last in [(0, 20), (25, 26), (23, 37), (51, 60)]:
        start, stop = max(0, first - halo), min(60, last + halo)
        (got,) = filter_courses(courses[:, start:stop], [kernel], edges)
        np.testing.assert_array_equal(
            got[:, first - start : last - start], whole[:, first:last]
        )


@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_there_is_no_loop_over_pixels_on_gpu(edges):
    frames = jax.ShapeDtypeStruct((30, 40, 40), jnp.float32)
    call = jax.jit(
        lambda frames: _filter.temporal_filter(
            frames, jnp.float32(5.0), time_kernel(is_bound=False), edges
        )
    )
    program = export.export(call, platforms=["cuda"])(frames).mlir_module()
    assert "stablehlo.while" not in program
    on_cpu = export.export(call, platforms=["cpu"])(frames).mlir_module()
    assert "stablehlo.while" in on_cpu


@pytest.mark.parametrize("radius_pix", [3.0, 60.0])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_there_is_no_loop_over_frames_on_gpu_and_tpu(radius_pix, platform):
    # So wide that on CPU the products of an axis go through a loop, too.
    frames = jax.ShapeDtypeStruct((5, 64, 400), jnp.float32)
    call = jax.jit(lambda frames: spatial_mean(frames, radius_pix))
    program = export.export(call, platforms=[platform])(frames).mlir_module()
    assert "stablehlo.while" not in program
    on_cpu = export.export(call, platforms=["cpu"])(frames).mlir_module()
    assert "stablehlo.while" in on_cpu


def assert_sharded(loss, frames, radii):
    """That value and gradients are the same where each device has frames of its own."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("frames",))
    each, everywhere = PartitionSpec("frames"), PartitionSpec()
    sharded = jax.shard_map(
        lambda frames, radii: jax.lax.psum(loss(frames, radii), "frames"),
        mesh=mesh,
        in_specs=(each, everywhere),
        out_specs=everywhere,
    )
    got, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(frames, radii)
        for function in (sharded, loss)
    )
    jax.tree.map(close_in_sums, got, expected)


# Roundings of sums of some thousand terms of 64 bits.
close_in_sums = ft.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


def loss_up_to(bound):
    def loss(frames, radii):
        bkgds = spatial_mean(frames, radii, max_radius_pix=bound, truncation="smooth")
        return jnp.sum(jnp.sin(bkgds))

    return loss


def test_blocks_of_columns_are_sharded(rng, monkeypatch, x64):
    force_blocks(monkeypatch)
    # Two strips of lines.
    frames, radii = rng.normal(100, 10, (2, 70, 40)), np.array([1.5, 2.0])
    assert_sharded(loss_up_to(2.5), frames, radii)


def test_products_are_sharded_and_exported(rng, x64):
    """In one program with shifts: at 24 px a kernel has 32 taps, at 2 px it has 3."""
    frames, radii = rng.normal(100, 10, (2, 48, 40)), np.array([24.0, 2.0])
    assert_sharded(loss_up_to(25.0), frames, radii)
    call = jax.jit(jax.value_and_grad(loss_up_to(25.0), (0, 1)))
    program = export.export(call, platforms=["cpu", "cuda", "tpu"])(frames, radii)
    assert "stablehlo.dot_general" in program.mlir_module()
    jax.tree.map(close_in_sums, program.call(frames, radii), call(frames, radii))


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

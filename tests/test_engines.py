"""Every engine of the filter, forced one by one, against a dense matrix in float64."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec
from reference import apply_matrices, axis_matrix

from jaxbkgd import LocalMean, spatial_mean, SpatialOpening
from jaxbkgd._filter import correlation, engines
from jaxbkgd._filter.correlation import Edges, Settings
from jaxbkgd._filter.kernels import GaussianKernel, half_width


# Several strips and bands, with a rest; fewer pixels than a band; a single line.
SHAPES = [(2, 90, 140), (1, 33, 26), (1, 1, 130)]
# Few taps, so that little is compiled.
RADII, BOUND = (1.5, 4.0), 5.0
WAYS = [
    "shifts in strips",
    "shifts in strips and blocks",
    "products in strips",
    "shifts at once",
    "products at once",
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A function that filters in one way only, compiled: `way(frames, images, edges)`."""
    force(monkeypatch, products="products" in request.param)
    if "blocks" in request.param:
        force_blocks(monkeypatch)
    in_strips = "strips" in request.param
    function = engines.filter_in_pieces if in_strips else engines.filter_at_once

    @ft.partial(jax.jit, static_argnames=("images", "edges"))
    def run(frames, images, edges: Edges = "repeated"):
        settings = Settings("space", edges, is_finite=False)
        return function(frames, *map(jnp.float64, RADII), images=images, settings=settings)

    return run


def force(monkeypatch, *, products):
    """Products or shifts, whatever the number of taps, in strips of several pieces."""
    most_taps = 0 if products else 10**6
    monkeypatch.setattr(correlation, "_MOST_TAPS", most_taps)
    monkeypatch.setattr(correlation, "_MOST_TAPS_OF_LONG_AXES", most_taps)
    # Two products along y, and a loop over them.
    monkeypatch.setattr(correlation, "_MOST_PRODUCTS", 1)
    monkeypatch.setattr(engines, "_STRIP_LINES", 80)
    monkeypatch.setattr(engines, "_BANDED_STRIP_BYTES", 0)
    monkeypatch.setattr(engines, "_BANDED_COLUMNS", 64)
    # A pixel that no strip writes is seen.
    monkeypatch.setattr(
        engines, "_empty", lambda pieces, *_: jnp.full_like(pieces.stack, jnp.nan, float)
    )


def force_blocks(monkeypatch):
    """As if no line fitted into the nearest cache."""
    monkeypatch.setattr(engines, "_COLUMNS", 32)
    monkeypatch.setattr(engines, "_L1_BYTES", 0)
    monkeypatch.setattr(engines, "_L1_WAYS", 0)


def kernels_for(*, is_bound):
    """The kernels (y, x), of their own width or of that of a bound."""
    return tuple(
        GaussianKernel(
            half_width(BOUND if is_bound else radius, "smooth"), "smooth", 0, is_bound
        )
        for radius in RADII
    )


def matrix(kernel, radius, size, edges="repeated"):
    """The filter along an axis as a dense matrix."""
    return axis_matrix(np.asarray(kernel.taps(jnp.float64(radius))), size, edges)


def images_by_matrices(frames, images, edges="repeated"):
    return [
        apply_matrices(
            frames,
            {
                -2: matrix(y, RADII[0], frames.shape[-2], edges),
                -1: matrix(x, RADII[1], frames.shape[-1], edges),
            },
        )
        for y, x in images
    ]


def with_slopes(y, x):
    return ((y, x), (y.derivative(), x), (y, x.derivative()))


# Roundings of 64 bits, of inputs of some hundred.
close = ft.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("is_small", [False, True])
def test_values_slopes_and_adjoints_are_those_of_a_dense_matrix(
    way, is_small, request, rng, x64
):
    # Compiling is slow: not every combination.
    place = WAYS.index(request.node.callspec.params["way"]) + is_small
    shape = SHAPES[is_small * (1 + place % 2)]
    images = with_slopes(*kernels_for(is_bound=place % 2 == 1))
    frames, edges = rng.normal(100, 10, shape), "folded" if is_small else "repeated"
    expected = images_by_matrices(frames, images, edges)
    for got, right in zip(way(frames, images, edges), expected, strict=True):
        close(got, right)


@pytest.mark.slow
def test_a_single_tap_changes_nothing(way, rng, x64):
    frames = rng.normal(100, 10, (2, 70, 40))
    kernels = (GaussianKernel(0, "smooth"), GaussianKernel(0, "smooth"))
    # The tap is a sum of twelve terms, over itself.
    np.testing.assert_allclose(way(frames, (kernels,), "folded")[0], frames, rtol=1e-15)


@pytest.mark.slow
def test_frames_of_any_real_dtype_are_converted(way, request, rng, x64):
    dtypes = ("bool", "uint16", "int32", "uint16", "bool")
    dtype = dtypes[WAYS.index(request.node.callspec.params["way"])]
    frames = rng.integers(0, 2 if dtype == "bool" else 200, (2, 90, 40)).astype(dtype)
    images = (kernels_for(is_bound=False),)
    close(way(frames, images)[0], images_by_matrices(frames.astype(float), images)[0])


@pytest.mark.slow
@pytest.mark.parametrize("is_bound", [False, True])
def test_what_is_not_finite_reaches_the_pixels_that_a_dense_matrix_reads(
    way, is_bound, rng, x64
):
    frames = rng.normal(100, 10, (3, 90, 70))
    frames[0, 40, 0], frames[0, 45, 3], frames[2, 89, 69] = np.nan, np.inf, -np.inf
    images = (kernels_for(is_bound=is_bound),)
    close(way(frames, images)[0], images_by_matrices(frames, images)[0])


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("edges", "products"), [("repeated", False), ("empty", False), ("repeated", True)]
)
def test_sums_of_slopes_and_of_products_are_those_of_dense_matrices(
    edges, products, monkeypatch, rng, x64
):
    force(monkeypatch, products=products)
    # Two strips of lines, of which some are in both.
    frames, cotangent = map(jnp.asarray, rng.normal(100, 10, (2, 2, 90, 40)))
    kernels, radii = kernels_for(is_bound=True), list(map(jnp.float64, RADII))
    settings, tangents = (
        Settings("space", edges, is_finite=False),
        list(jnp.array([0.7, -1.3])),
    )
    image, *slopes = images_by_matrices(frames, with_slopes(*kernels), edges)

    @jax.jit
    def both(frames, cotangent):
        total = engines.slope_in_pieces(frames, radii, tangents, (0, 1), kernels, settings)
        return total, *engines.products_in_pieces(
            cotangent,
            frames,
            *radii,
            kernels=kernels,
            axes=(0, 1),
            is_image_kept=True,
            settings=settings.adjoint(),
        )

    total, *sums, back = both(frames, cotangent)
    close(total, np.tensordot([0.7, -1.3], slopes, 1))
    # Sums of a thousand terms of 10^4.
    np.testing.assert_allclose(sums, [np.vdot(cotangent, each) for each in slopes], 1e-9)
    np.testing.assert_allclose(np.vdot(back, frames), np.vdot(cotangent, image), 1e-12)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("place", ["frames", "cotangent"])
def test_no_gradient_in_the_radii_comes_of_what_is_not_finite(place, rng):
    arrays = {"frames": rng.normal(size=(1, 70, 9)), "cotangent": np.ones((1, 70, 9))}
    arrays[place][0, 69, 8] = np.nan
    sums = engines.products_in_pieces(
        jnp.asarray(arrays["cotangent"]),
        jnp.asarray(arrays["frames"]),
        *map(jnp.float32, RADII),
        kernels=kernels_for(is_bound=True),
        axes=(0, 1),
        is_image_kept=False,
        settings=Settings("space", "folded", is_finite=False),
    )
    assert np.all(np.isnan(sums))


@pytest.mark.slow
@pytest.mark.parametrize("is_bound", [False, True])
def test_nothing_is_left_of_an_image_that_is_written_over(is_bound, rng, monkeypatch, x64):
    force(monkeypatch, products=False)
    frames = rng.normal(100, 10, (3, 90, 40))
    frames[1, 40, 0] = np.nan
    kernels = kernels_for(is_bound=is_bound)
    settings = Settings("space", "repeated", is_finite=False)
    over = jax.jit(ft.partial(engines.filter_onto, kernels=kernels, settings=settings))
    got = over(frames, *map(jnp.float64, RADII), np.full_like(frames, np.nan))
    close(got, images_by_matrices(frames, [kernels])[0])


# In time: (batch, frames, height, width), with blocks of 256 pixels and a rest, with fewer
# frames than the kernel is wide, and with a single frame.
MOVIES = [(2, 40, 3, 100), (1, 9, 16, 16), (2, 1, 1, 7)]


def time_kernel(*, is_bound):
    """For a radius of 5 frames, or for any below 12."""
    width = half_width(12.0 if is_bound else 5.0, "smooth")
    return GaussianKernel(width, "smooth", is_bound=is_bound)


@pytest.fixture(params=["in blocks", "in blocks, by groups of taps", "at once"])
def way_in_time(request, monkeypatch):
    """A function that filters along time in one way only."""
    if request.param.endswith("groups of taps"):
        monkeypatch.setattr(correlation, "_MOST_SHIFTS", 3)
        monkeypatch.setattr(correlation, "_SHIFT_GROUP", 4)
    at_once = request.param == "at once"
    function = engines.filter_at_once if at_once else engines.filter_in_pieces

    @ft.partial(jax.jit, static_argnums=(1, 2))
    def run(movie, kernels, edges):
        images = tuple((kernel,) for kernel in kernels)
        settings = Settings("time", edges, is_finite=False)
        return function(movie, jnp.asarray(5.0, float), images=images, settings=settings)

    return run


def over_time(movie, kernel, edges):
    return apply_matrices(movie, {-3: matrix(kernel, 5.0, movie.shape[-3], edges)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "edges"), list(zip(MOVIES, ("repeated", "folded", "empty"), strict=True))
)
def test_movies_are_filtered_over_time_by_a_dense_matrix(
    way_in_time, shape, edges, rng, x64
):
    movie = rng.normal(100, 10, shape)
    kernel = time_kernel(is_bound=MOVIES.index(shape) == 1)
    kernels = (kernel, kernel.derivative())
    for got, each in zip(way_in_time(movie, kernels, edges), kernels, strict=True):
        close(got, over_time(movie, each, edges))


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["repeated", "empty"])
def test_sums_over_time_are_those_of_dense_matrices(edges, rng, x64):
    # Two blocks of columns, of which some are in both.
    movie, cotangent = map(jnp.asarray, rng.normal(100, 10, (2, 2, 20, 3, 100)))
    kernel, radius = time_kernel(is_bound=False), jnp.float64(5.0)
    settings = Settings("time", edges, is_finite=False)
    slope = over_time(movie, kernel.derivative(), edges)
    got = engines.slope_in_pieces(
        movie, [radius], [0.7 * radius], (0,), (kernel,), settings
    )
    close(got, 3.5 * slope)
    (total,) = engines.products_in_pieces(
        cotangent,
        movie,
        radius,
        kernels=(kernel,),
        axes=(0,),
        is_image_kept=False,
        settings=settings.adjoint(),
    )
    np.testing.assert_allclose(total, np.vdot(cotangent, slope), rtol=1e-9)


def movie_with_what_is_not_finite(rng):
    movie = rng.normal(100, 10, (1, 40, 3, 100))
    movie[0, 20, 0, 7], movie[0, 0, 0, 8], movie[0, 39, 2, 99] = np.nan, np.inf, -np.inf
    return movie


@pytest.mark.slow
@pytest.mark.parametrize(("is_bound", "edges"), [(False, "empty"), (True, "repeated")])
def test_what_is_not_finite_stays_near_in_time(way_in_time, is_bound, edges, rng, x64):
    movie, kernel = movie_with_what_is_not_finite(rng), time_kernel(is_bound=is_bound)
    (got,) = way_in_time(movie, (kernel,), edges)
    close(got, over_time(movie, kernel, edges))


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["repeated"])
def test_a_frame_has_the_same_bits_in_every_chunk(way_in_time, edges, rng):
    movie = rng.normal(100, 10, (1, 60, 3, 100)).astype(np.float32)
    kernel = time_kernel(is_bound=False)
    (whole,) = way_in_time(movie, (kernel,), edges)
    for first, last in [(0, 20), (25, 26)]:
        start = max(0, first - kernel.half_width)
        stop = min(60, last + kernel.half_width)
        (got,) = way_in_time(movie[:, start:stop], (kernel,), edges)
        np.testing.assert_array_equal(
            got[:, first - start : last - start], whole[:, first:last]
        )


@pytest.mark.long
def test_programs_for_gpu_and_tpu_have_no_loop_over_pieces():
    """There, a loop would take the frames in turn. On CPU there is one, and is seen."""
    # So wide that on CPU the products of an axis go through a loop, too.
    frames = jax.ShapeDtypeStruct((5, 64, 400), jnp.float32)
    over_time, opening = LocalMean(60.0, 5.0, clip=None), SpatialOpening()
    # An opening is a loop over offsets, twice.
    functions = (
        (lambda f: spatial_mean(f, 3.0), 0),
        (lambda f: over_time(f).bkgds, 0),
        (lambda f: opening(f).bkgds, 2),
    )
    for function, loops in functions:
        for platform, has_loop in (("cuda", False), ("tpu", False), ("cpu", True)):
            program = export.export(jax.jit(function), platforms=[platform])(frames)
            count = program.mlir_module().count("stablehlo.while")
            assert (count > loops) if has_loop else (count == loops)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_blocks_of_columns_are_sharded(rng, monkeypatch, x64):
    """Values and gradients are the same where each device has frames of its own."""
    force_blocks(monkeypatch)
    # Two strips of lines.
    frames, radii = rng.normal(100, 10, (2, 70, 40)), np.array([1.5, 2.0])

    def loss(frames, radii):
        bkgds = spatial_mean(frames, radii, max_radius_pix=2.5, truncation="smooth")
        return jnp.sum(jnp.sin(bkgds))

    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("frames",))
    split, everywhere = PartitionSpec("frames"), PartitionSpec()
    sharded = jax.shard_map(
        lambda frames, radii: jax.lax.psum(loss(frames, radii), "frames"),
        mesh=mesh,
        in_specs=(split, everywhere),
        out_specs=everywhere,
    )
    got, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(frames, radii)
        for function in (sharded, loss)
    )
    jax.tree.map(close, got, expected)

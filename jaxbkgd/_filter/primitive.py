"""The separable filter as JAX primitives: what they compute, on which platform how.

All take frames and traced radii, in the order of the kernels: (y, x) in px, or (t,) in
frames. `filter_p` gives images, each of them the frames filtered with kernels of its own,
and `filter_onto_p` one image, written over another one. `pushforward_p` gives the
derivative of one image along tangents of radii and frames, and `pullback_p` is its
transpose: they are primitives so that on CPU the images which they add up, or multiply
with the frames, are not kept. The rules of all are in `rules.py`.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import auto_axes, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from . import engines
from .correlation import Edges, Settings
from .kernels import differentiate, Frames, GaussianKernel, Image, Kernels, Radii, Radius
from .vectors import compiler_options


def separable_filter(
    frames: Frames,
    radii: Radii,
    kernels: Kernels,
    *,
    is_finite: bool = False,
    donated: Image | None = None,
) -> Image:
    """The frames correlated with the outer product of two kernels (y, x), edges repeated:
    an image in the dtype of the radii, sharded as the frames are.

    `is_finite` says that the frames are known to be finite, so that less is compiled. On
    CPU the result is written over `donated`, an image of its shape and dtype, where the
    call is compiled with this image donated to it. There are no derivatives then.
    """
    settings = Settings("space", "repeated", is_finite)
    if donated is None:
        return _filter(frames, radii, kernels, settings)
    return filter_onto_p.bind(frames, *radii, donated, kernels=kernels, settings=settings)


def temporal_filter(
    frames: Frames,
    radius: Radius,
    kernel: GaussianKernel,
    edges: Edges,
    *,
    is_finite: bool = False,
) -> Image:
    """The course in time of each pixel, `*batch frames height width`, correlated with a
    kernel. To the bit, a filtered frame depends on no frames but those under the kernel,
    nor on how many others there are."""
    return _filter(frames, [radius], (kernel,), Settings("time", edges, is_finite))


def _filter(frames: Frames, radii: Radii, kernels: Kernels, settings: Settings) -> Image:
    for radius in radii:
        if isinstance(radius, Tracer):
            # Under `shard_map`, frames that all devices share vary as the radii do.
            frames = frames + jnp.zeros_like(radius, frames.dtype)
    (image,) = filter_p.bind(frames, *radii, images=(kernels,), settings=settings)
    return image


filter_p = Primitive("separable_filter")
filter_onto_p = Primitive("separable_filter_onto")
pushforward_p = Primitive("separable_filter_pushforward")
pullback_p = Primitive("separable_filter_pullback")
filter_p.multiple_results = pullback_p.multiple_results = True
_PARAMETERS = ("images", "kernels", "axes", "is_image_kept", "settings")


def pushforward(
    frames: Frames,
    *radii_and_tangents: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    settings: Settings,
    in_pieces: bool = False,
) -> Image:
    """What `pushforward_p` computes. After the radii come the tangents of the radii of
    `axes`, and that of the frames if there is one."""
    radii, tangents, frames_tangents = split_tangents(radii_and_tangents, kernels, axes)
    if in_pieces:
        total = engines.slope_in_pieces(frames, radii, tangents, axes, kernels, settings)
    else:
        images = tuple(differentiate(kernels, axis) for axis in axes)
        slopes = filter_p.bind(frames, *radii, images=images, settings=settings)
        total = engines.weighted_sum(tangents, slopes)
    for tangent in frames_tangents:
        (moved,) = filter_p.bind(tangent, *radii, images=(kernels,), settings=settings)
        total += moved
    return total


def pullback(
    cotangent: Image,
    frames: Frames,
    *radii: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    is_image_kept: bool,
    settings: Settings,
) -> list[Float[Array, "..."]]:
    """What `pullback_p` computes: for each of `axes` the sum of products of the frames and
    the filtered cotangent's derivative in that radius; then the filtered cotangent, if it
    is to be kept."""
    slopes = tuple(differentiate(kernels, axis) for axis in axes)
    images = (*slopes, kernels) if is_image_kept else slopes
    filtered = filter_p.bind(cotangent, *radii, images=images, settings=settings)
    factor = frames.astype(cotangent.dtype)
    sums = [jnp.sum(image * factor) for image in filtered[: len(axes)]]
    return [*sums, *filtered[len(axes) :]]


def split_tangents(
    radii_and_tangents: Sequence[Any], kernels: Kernels, axes: Sequence[int]
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The arguments of `pushforward_p` after the frames: the radii, the tangents of the
    radii of `axes`, and no or one tangent of the frames."""
    first, last = len(kernels), len(kernels) + len(axes)
    tangents = radii_and_tangents[first:last]
    return radii_and_tangents[:first], tangents, radii_and_tangents[last:]


def _onto_at_once(
    frames: Frames, *radii_and_donated: Any, kernels: Kernels, settings: Settings
) -> Image:
    radii = radii_and_donated[: len(kernels)]
    return engines.filter_at_once(frames, *radii, images=[kernels], settings=settings)[0]


def _image_type(
    frames: ShapedArray, radius: ShapedArray, *_: Any, **__: Any
) -> ShapedArray:
    return frames.update(dtype=radius.dtype, weak_type=False)


def _image_types(
    *arguments: ShapedArray, images: Sequence[Kernels], settings: Settings
) -> list[ShapedArray]:
    return [_image_type(*arguments) for _ in images]


def _pullback_types(
    cotangent: ShapedArray, *_: Any, axes: Sequence[int], is_image_kept: bool, **__: Any
) -> list[ShapedArray]:
    replicated = NamedSharding(cotangent.sharding.mesh, PartitionSpec())
    total = cotangent.update(shape=(), sharding=replicated, weak_type=False)
    return [total] * len(axes) + [cotangent] * is_image_kept


def _define(
    primitive: Primitive, in_pieces: Callable, at_once: Callable, abstract_eval: Callable
) -> None:
    """Makes a primitive of a function for CPU and one for other platforms, which also
    serves symbolic sizes, since loops over pieces need numbers, and empty stacks."""

    @ft.cache
    def compiled() -> Callable:
        names, options = _PARAMETERS, compiler_options()
        return jax.jit(primitive.bind, static_argnames=names, compiler_options=options)

    @primitive.def_impl
    def call(*arguments, **parameters):
        # Outside of all programs a primitive is compiled, also under `jax.disable_jit`.
        with jax.disable_jit(False):
            return compiled()(*arguments, **parameters)

    primitive.def_abstract_eval(abstract_eval)

    def lower(function: Callable, platform: str | None) -> None:
        on_any_mesh = ft.partial(_on_any_mesh, function, abstract_eval)
        is_list = primitive.multiple_results
        rule = mlir.lower_fun(on_any_mesh, multiple_results=is_list)
        mlir.register_lowering(primitive, rule, platform)

    def on_cpu(*arguments, **parameters):
        shape, is_in_space = arguments[0].shape, parameters["settings"].dimension == "space"
        is_symbolic = any(map(export.is_symbolic_dim, shape[-2 if is_in_space else -3 :]))
        return (at_once if is_symbolic or 0 in shape else in_pieces)(
            *arguments, **parameters
        )

    lower(on_cpu, "cpu")
    lower(at_once, None)


def _on_any_mesh(
    function: Callable, abstract_eval: Callable, *arguments: Any, **parameters: Any
) -> Any:
    """Images sharded as the first argument is; explicit axes of a mesh are automatic
    within."""

    def compute(*arguments):
        results = function(*arguments, **parameters)
        # On a mesh with automatic axes, XLA shards operands and result of an elementwise
        # operation alike. This one changes nothing, and XLA removes it afterwards.
        first, never = arguments[0], jnp.zeros_like(arguments[0], bool)
        return jax.tree.map(
            lambda r: jnp.where(never, first.astype(r.dtype), r) if r.ndim else r, results
        )

    mesh = jax.typeof(arguments[0]).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return compute(*arguments)
    types = abstract_eval(*map(jax.typeof, arguments), **parameters)
    shardings = jax.tree.map(lambda result: result.sharding, types)
    return auto_axes(compute, axes=explicit, out_sharding=shardings)(*arguments)


_pushforward_in_pieces = ft.partial(pushforward, in_pieces=True)
_define(filter_p, engines.filter_in_pieces, engines.filter_at_once, _image_types)
_define(filter_onto_p, engines.filter_onto, _onto_at_once, _image_type)
_define(pushforward_p, _pushforward_in_pieces, pushforward, _image_type)
_define(pullback_p, engines.products_in_pieces, pullback, _pullback_types)

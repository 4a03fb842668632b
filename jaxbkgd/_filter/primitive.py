"""The separable filter as JAX primitives: what they compute, on which platform how.

Four primitives make it up. All take frames `*batch height width`, or in time `*batch frames
height width`, and traced radii, scalars in the order of the kernels: (y, x) in px, or (t,)
in frames. Results have the frames' shape and the radii's dtype.

- `filter_p` gives images, each of them the frames filtered with kernels of its own.
- `filter_onto_p` gives one image, written over another one.
- `pushforward_p` gives the derivative of one image along tangents of radii and frames.
- `pullback_p` is its transpose.

The last two are primitives so that on CPU the images which they add up, or multiply with
the frames, are not kept. The rules of all are in `rules.py`.
"""

import functools as ft
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import auto_axes, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from . import engines
from .correlation import Edges
from .engines import Settings
from .kernels import differentiated, Kernel, Kernels


def separable_filter(
    frames: Shaped[Array, "*batch height width"],
    radii: Sequence[Float[Array, ""]],
    kernels: Kernels,
    *,
    is_finite: bool = False,
    donated: Float[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch height width"]:
    """The frames correlated with the outer product of two kernels, edges repeated.

    **Arguments:**

    - `frames`: of any real dtype; they are converted to that of the radii.
    - `radii`, `kernels`: (y, x), the radii in px.
    - `is_finite`: whether the frames are known to be finite, so that less is compiled.
    - `donated`: an image of the result's shape and dtype that is not needed any longer. On
        CPU the result is written over it where the call is compiled with this image donated
        to it. There are no derivatives then.

    **Returns:**

    The filtered frames, in the dtype of the radii and sharded as the frames are.
    """
    settings = Settings("space", "repeated", is_finite)
    if donated is None:
        return _filtered(frames, radii, kernels, settings)
    return filter_onto_p.bind(donated, frames, *radii, kernels=kernels, settings=settings)


def temporal_filter(
    frames: Shaped[Array, "*batch frames height width"],
    radius: Float[Array, ""],
    kernel: Kernel,
    edges: Edges,
    *,
    is_finite: bool = False,
) -> Float[Array, "*batch frames height width"]:
    """The course in time of each pixel correlated with a kernel, whose radius is in frames.

    To the bit, a filtered frame depends on no frames but those under the kernel, nor on how
    many others there are. Arguments and result are as for `separable_filter`.
    """
    return _filtered(frames, [radius], (kernel,), Settings("time", edges, is_finite))


def _filtered(
    frames: Shaped[Array, "*shape"],
    radii: Sequence[Float[Array, ""]],
    kernels: Kernels,
    settings: Settings,
) -> Float[Array, "*shape"]:
    for radius in radii:
        # Under `shard_map`, frames that all devices share vary as the radii do. Compiled,
        # nothing is added.
        frames = frames + jnp.zeros_like(radius, frames.dtype)
    (image,) = filter_p.bind(frames, *radii, images=(kernels,), settings=settings)
    return image


filter_p = Primitive("separable_filter")
filter_onto_p = Primitive("separable_filter_onto")
pushforward_p = Primitive("separable_filter_pushforward")
pullback_p = Primitive("separable_filter_pullback")
filter_p.multiple_results = pullback_p.multiple_results = True


# What each one computes.


def _filter(
    frames: Shaped[Array, "*shape"],
    *radii: Float[Array, ""],
    images: tuple[Kernels, ...],
    settings: Settings,
) -> list[Float[Array, "*shape"]]:
    options = {"images": images, "settings": settings}
    in_pieces = ft.partial(engines.filter_in_pieces, **options)
    at_once = ft.partial(engines.filter_at_once, **options)
    return _by_platform(
        in_pieces, at_once, settings, frames, radii, image_count=len(images)
    )


def _filter_onto(
    donated: Float[Array, "*shape"],
    frames: Shaped[Array, "*shape"],
    *radii: Float[Array, ""],
    kernels: Kernels,
    settings: Settings,
) -> Float[Array, "*shape"]:
    in_pieces = ft.partial(engines.filter_onto, kernels=kernels, settings=settings)

    def at_once(donated, frames, radii):
        del donated
        return engines.filter_at_once(frames, radii, [kernels], settings)

    (image,) = _by_platform(in_pieces, at_once, settings, donated, frames, radii)
    return image


def _pushforward(
    frames: Shaped[Array, "*shape"],
    *radii_and_tangents: Float[Array, "..."],
    kernels: Kernels,
    axes: tuple[int, ...],
    settings: Settings,
) -> Float[Array, "*shape"]:
    """After the radii come the tangents of the radii of `axes`, and that of the frames if
    there is one."""
    radii, tangents, frames_tangents = split_tangents(radii_and_tangents, kernels, axes)
    images = tuple(differentiated(kernels, axis) for axis in axes)
    at_once = ft.partial(engines.weighted_sum_at_once, images=images, settings=settings)
    in_pieces = ft.partial(
        engines.weighted_sum_in_pieces, images=images, settings=settings, kernels=kernels
    )
    (total,) = _by_platform(in_pieces, at_once, settings, frames, radii, tangents)
    for tangent in frames_tangents:
        (moved,) = _filter(tangent, *radii, images=(kernels,), settings=settings)
        total += moved
    return total


def _pullback(
    cotangent: Float[Array, "*shape"],
    frames: Shaped[Array, "*shape"],
    *radii: Float[Array, ""],
    kernels: Kernels,
    axes: tuple[int, ...],
    is_image_kept: bool,
    settings: Settings,
) -> list[Float[Array, "..."]]:
    """For each of `axes` the sum of products of the frames and the filtered cotangent's
    derivative in that radius; then the filtered cotangent, if it is to be kept."""
    options = {
        "images": tuple(differentiated(kernels, axis) for axis in axes),
        "kept": (kernels,) if is_image_kept else (),
        "settings": settings,
    }
    at_once = ft.partial(engines.products_at_once, **options)
    in_pieces = ft.partial(engines.products_in_pieces, **options, kernels=kernels)
    counts = {"sum_count": len(axes), "image_count": int(is_image_kept)}
    return _by_platform(in_pieces, at_once, settings, cotangent, frames, radii, **counts)


def split_tangents(
    radii_and_tangents: Sequence[Any], kernels: Kernels, axes: Sequence[int]
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The arguments of `pushforward_p` after the frames: the radii, the tangents of the
    radii of some axes, and none or one tangent of the frames."""
    first, last = len(kernels), len(kernels) + len(axes)
    return (
        radii_and_tangents[:first],
        radii_and_tangents[first:last],
        radii_and_tangents[last:],
    )


def _by_platform(
    in_pieces: Callable,
    at_once: Callable,
    settings: Settings,
    like: Shaped[Array, "*shape"],
    *others: Any,
    sum_count: int = 0,
    image_count: int = 1,
) -> list[Float[Array, "..."]]:
    """The sums, which are scalars, and the images that a function makes of `like` and
    others: on CPU the function in pieces, elsewhere the one at once. The latter also where
    sizes are symbolic, since loops over pieces need numbers.

    Images are sharded as `like` is.
    """

    def compute(like, *others):
        sizes = like.shape[-2:] if settings.dimension == "space" else like.shape[-3:]
        if any(export.is_symbolic_dim(size) for size in sizes):
            results = at_once(like, *others)
        else:
            results = lax.platform_dependent(like, *others, cpu=in_pieces, default=at_once)
        # On a mesh with automatic axes, XLA shards operands and result of an elementwise
        # operation alike. This one changes nothing, and XLA removes it afterwards.
        never = jnp.zeros_like(like, bool)
        return [
            jnp.where(never, like.astype(result.dtype), result) if result.ndim else result
            for result in jax.tree.leaves(results)
        ]

    # On a mesh with explicit axes, these are automatic within.
    sharding = jax.typeof(like).sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    shardings = [replicated] * sum_count + [sharding] * image_count
    sharded: Callable = auto_axes(compute, out_sharding=shardings)
    return sharded(like, *others)


def _image_type(
    frames: ShapedArray, radius: ShapedArray, *_: ShapedArray, **__: Any
) -> ShapedArray:
    return frames.update(dtype=radius.dtype, weak_type=False)


def _image_types(
    *arguments: ShapedArray, images: tuple[Kernels, ...], **_: Any
) -> list[ShapedArray]:
    return [_image_type(*arguments) for _ in images]


def _pullback_types(
    cotangent: ShapedArray,
    *_: ShapedArray,
    axes: tuple[int, ...],
    is_image_kept: bool,
    **__: Any,
) -> list[ShapedArray]:
    replicated = NamedSharding(cotangent.sharding.mesh, PartitionSpec())
    total = cotangent.update(shape=(), sharding=replicated, weak_type=False)
    return [total] * len(axes) + [cotangent] * is_image_kept


def _define(primitive: Primitive, compute: Callable, abstract_eval: Callable) -> None:
    """Outside of all programs a primitive is compiled, also under `jax.disable_jit`."""
    parameters = inspect.getfullargspec(compute).kwonlyargs
    compiled = jax.jit(compute, static_argnames=parameters)

    @primitive.def_impl
    def call(*arguments, **parameters):
        with jax.disable_jit(False):
            return compiled(*arguments, **parameters)

    primitive.def_abstract_eval(abstract_eval)
    lowering = mlir.lower_fun(compute, multiple_results=primitive.multiple_results)
    mlir.register_lowering(primitive, lowering)


_define(filter_p, _filter, _image_types)
_define(filter_onto_p, _filter_onto, lambda _, *arguments, **__: _image_type(*arguments))
_define(pushforward_p, _pushforward, _image_type)
_define(pullback_p, _pullback, _pullback_types)

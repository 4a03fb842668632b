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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import auto_axes, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from . import engines
from .correlation import Edges, Settings
from .engines import weighted_sum
from .kernels import differentiated, Kernel, Kernels, Radii
from .vectors import compiler_options


def separable_filter(
    frames: Shaped[Array, "*batch height width"],
    radii: Radii,
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
    radii: Radii,
    kernels: Kernels,
    settings: Settings,
) -> Float[Array, "*shape"]:
    for radius in radii:
        if isinstance(radius, Tracer):
            # Under `shard_map`, frames that all devices share vary as the radii do.
            # Compiled, nothing is added.
            frames = frames + jnp.zeros_like(radius, frames.dtype)
    (image,) = filter_p.bind(frames, *radii, images=(kernels,), settings=settings)
    return image


filter_p = Primitive("separable_filter")
filter_onto_p = Primitive("separable_filter_onto")
pushforward_p = Primitive("separable_filter_pushforward")
pullback_p = Primitive("separable_filter_pullback")
filter_p.multiple_results = pullback_p.multiple_results = True


def pushforward(
    frames: Shaped[Array, "*shape"],
    *radii_and_tangents: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    settings: Settings,
) -> Float[Array, "*shape"]:
    """What `pushforward_p` computes. After the radii come the tangents of the radii of
    `axes`, and that of the frames if there is one."""
    radii, tangents, frames_tangents = split_tangents(radii_and_tangents, kernels, axes)
    images = tuple(differentiated(kernels, axis) for axis in axes)
    slopes = filter_p.bind(frames, *radii, images=images, settings=settings)
    total = weighted_sum(tangents, slopes)
    return _with_moved(total, frames_tangents, radii, kernels, settings)


def _pushforward_in_pieces(
    frames: Array,
    *radii_and_tangents: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    settings: Settings,
) -> Array:
    radii, tangents, frames_tangents = split_tangents(radii_and_tangents, kernels, axes)
    total = engines.slope_in_pieces(frames, radii, tangents, axes, kernels, settings)
    return _with_moved(total, frames_tangents, radii, kernels, settings)


def _with_moved(
    total: Array,
    frames_tangents: Sequence[Array],
    radii: Radii,
    kernels: Kernels,
    settings: Settings,
) -> Array:
    """With the images of what tangents of the frames there are."""
    for tangent in frames_tangents:
        (moved,) = filter_p.bind(tangent, *radii, images=(kernels,), settings=settings)
        total += moved
    return total


def pullback(
    cotangent: Float[Array, "*shape"],
    frames: Shaped[Array, "*shape"],
    *radii: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    is_image_kept: bool,
    settings: Settings,
) -> list[Float[Array, "..."]]:
    """What `pullback_p` computes: for each of `axes` the sum of products of the frames and
    the filtered cotangent's derivative in that radius; then the filtered cotangent, if it
    is to be kept."""
    slopes = tuple(differentiated(kernels, axis) for axis in axes)
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
    donated: Array, *arguments: Array, kernels: Kernels, settings: Settings
) -> Array:
    del donated
    return engines.filter_at_once(*arguments, images=[kernels], settings=settings)[0]


def _image_type(
    frames: ShapedArray, radius: ShapedArray, *_: ShapedArray, **__: Any
) -> ShapedArray:
    return frames.update(dtype=radius.dtype, weak_type=False)


def _image_types(
    *arguments: ShapedArray, images: Sequence[Kernels], **_: Any
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


def _define(
    primitive: Primitive,
    parameter_names: str,
    in_pieces: Callable,
    at_once: Callable,
    abstract_eval: Callable,
) -> None:
    """Makes a primitive of a function for CPU and one for other platforms.

    The latter also serves symbolic sizes, since loops over pieces need numbers, and empty
    stacks. Images are sharded as the first argument is, and explicit axes of a mesh are
    automatic within.
    """

    def compute(*arguments, **parameters):
        is_in_space = parameters["settings"].dimension == "space"
        sizes = arguments[0].shape[-2 if is_in_space else -3 :]
        is_symbolic = any(export.is_symbolic_dim(size) for size in sizes)
        if is_symbolic or 0 in arguments[0].shape:
            results = at_once(*arguments, **parameters)
        else:
            results = lax.platform_dependent(
                *arguments,
                cpu=ft.partial(in_pieces, **parameters),
                default=ft.partial(at_once, **parameters),
            )
        # On a mesh with automatic axes, XLA shards operands and result of an elementwise
        # operation alike. This one changes nothing, and XLA removes it afterwards.
        never = jnp.zeros_like(arguments[0], bool)
        return jax.tree.map(
            lambda result: (
                jnp.where(never, arguments[0].astype(result.dtype), result)
                if result.ndim
                else result
            ),
            results,
        )

    def compute_on_any_mesh(*arguments, **parameters):
        types = abstract_eval(*map(jax.typeof, arguments), **parameters)
        mesh = jax.typeof(arguments[0]).sharding.mesh
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if not explicit:
            return compute(*arguments, **parameters)
        shardings = jax.tree.map(lambda result: result.sharding, types)
        automatic = auto_axes(compute, axes=explicit, out_sharding=shardings)
        return automatic(*arguments, **parameters)

    @ft.cache
    def compiled() -> Callable:
        names, options = parameter_names.split(), compiler_options()
        return jax.jit(compute_on_any_mesh, static_argnames=names, compiler_options=options)

    @primitive.def_impl
    def call(*arguments, **parameters):
        # Outside of all programs a primitive is compiled, also under `jax.disable_jit`.
        with jax.disable_jit(False):
            return compiled()(*arguments, **parameters)

    primitive.def_abstract_eval(abstract_eval)
    is_list = primitive.multiple_results
    lowering = mlir.lower_fun(compute_on_any_mesh, multiple_results=is_list)
    mlir.register_lowering(primitive, lowering)


def _onto_type(_: ShapedArray, *arguments: ShapedArray, **__: Any) -> ShapedArray:
    return _image_type(*arguments)


_define(
    filter_p,
    "images settings",
    engines.filter_in_pieces,
    engines.filter_at_once,
    _image_types,
)
_define(filter_onto_p, "kernels settings", engines.filter_onto, _onto_at_once, _onto_type)
_define(
    pushforward_p,
    "kernels axes settings",
    _pushforward_in_pieces,
    pushforward,
    _image_type,
)
_define(
    pullback_p,
    "kernels axes is_image_kept settings",
    engines.products_in_pieces,
    pullback,
    _pullback_types,
)

"""How JAX differentiates, transposes and maps the primitives of the filter.

The filter is linear in the frames, and its transpose is the filter with adjoint edges. A
gradient in the radii is the sum of products of the frames with what the adjoint filter of
differentiated kernels makes of the cotangent; no images are kept for it.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from .correlation import Settings
from .kernels import Frames, Image, Kernels
from .primitive import (
    filter_p,
    pullback,
    pullback_p,
    pushforward,
    pushforward_p,
    split_tangents,
)


Args = Sequence[Any]


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _filter_jvp(
    primals: Args, tangents: Args, *, images: tuple[Kernels, ...], settings: Settings
) -> tuple[list[Image], list[Image]]:
    """The images and, one after the other, their derivatives. JAX takes the two apart where
    it knows the primals before the tangents."""
    (frames, *radii), (frames_tangent, *radii_tangents) = primals, tangents
    bind = ft.partial(filter_p.bind, images=images, settings=settings)
    results = bind(frames, *radii)
    axes = tuple(axis for axis, dot in enumerate(radii_tangents) if not _is_zero(dot))
    is_moved = not _is_zero(frames_tangent)
    if not axes:
        return results, bind(frames_tangent, *radii)
    # Under `shard_map`, each device has a gradient in the radii of its own.
    zero = jnp.zeros_like(frames, radii[0].dtype, shape=())
    dots = [radii_tangents[axis] + zero for axis in axes]
    dots += [frames_tangent] if is_moved else []
    push = ft.partial(pushforward_p.bind, frames, *radii, *dots, axes=axes)
    return results, [push(kernels=kernels, settings=settings) for kernels in images]


def _filter_transpose(
    cotangents: Args,
    frames: Any,
    *radii: Any,
    images: Sequence[Kernels],
    settings: Settings,
) -> list[Image | None]:
    """The cotangent of the frames, as of all images together."""
    assert ad.is_undefined_primal(frames)
    bars = [
        filter_p.bind(cotangent, *radii, images=(kernels,), settings=settings.adjoint())[0]
        for cotangent, kernels in zip(cotangents, images, strict=True)
        if not _is_zero(cotangent)
    ]
    return [ft.reduce(jnp.add, bars) if bars else None, *(None for _ in radii)]


def _filter_batch(
    arguments: Args, dims: Sequence[int | None], **parameters: Any
) -> tuple[list[Image], list[int]]:
    """The images of mapped frames, mapped radii or both, mapped along their first axis."""
    frames, *radii = arguments
    bind = ft.partial(filter_p.bind, **parameters)
    if dims[0] is not None:
        frames = jnp.moveaxis(frames, dims[0], 0)
    # Mapped radii have one axis, others none.
    shape = jnp.broadcast_shapes(*(radius.shape for radius in radii))
    radii = [jnp.broadcast_to(radius, shape) for radius in radii]
    if not shape:
        images = bind(frames, *radii)
    elif dims[0] is None:
        images = lax.map(lambda radii: bind(frames, *radii), radii)
    else:
        images = lax.map(lambda mapped: bind(*mapped), [frames, *radii])
    return images, [0] * len(images)


def _pushforward_transpose(
    cotangent: Any,
    frames: Frames,
    *radii_and_tangents: Any,
    kernels: Kernels,
    axes: tuple[int, ...],
    settings: Settings,
) -> list[Any]:
    """The cotangents of the tangents, of radii and frames together."""
    radii, dots, frames_dots = split_tangents(radii_and_tangents, kernels, axes)
    if _is_zero(cotangent):
        return [None] * (1 + len(radii_and_tangents))
    bars = pullback_p.bind(
        cotangent,
        frames,
        *radii,
        kernels=kernels,
        axes=axes,
        is_image_kept=len(frames_dots) > 0,
        settings=settings.adjoint(),
    )
    tangents = zip(bars, [*dots, *frames_dots], strict=True)
    return [
        *[None] * (1 + len(radii)),
        *(bar if ad.is_undefined_primal(dot) else None for bar, dot in tangents),
    ]


def _jvp_of(function: Callable) -> Callable:
    """A jvp rule that differentiates a function."""

    def jvp(primals, tangents, **parameters):
        moving = [i for i, dot in enumerate(tangents) if not _is_zero(dot)]

        def of_moving(*values):
            arguments = list(primals)
            for index, value in zip(moving, values, strict=True):
                arguments[index] = value
            return function(*arguments, **parameters)

        at, dots = ([values[i] for i in moving] for values in (primals, tangents))
        return jax.jvp(of_moving, at, dots)

    return jvp


def _batch_of(function: Callable) -> Callable:
    """A batching rule that maps a function."""

    def batch(arguments, dims, **parameters):
        mapped = jax.vmap(ft.partial(function, **parameters), in_axes=tuple(dims))
        results = mapped(*arguments)
        return results, jax.tree.map(lambda _: 0, results)

    return batch


ad.primitive_jvps[filter_p] = _filter_jvp
ad.primitive_transposes[filter_p] = _filter_transpose
batching.primitive_batchers[filter_p] = _filter_batch

ad.primitive_jvps[pushforward_p] = _jvp_of(pushforward)
ad.primitive_transposes[pushforward_p] = _pushforward_transpose
batching.primitive_batchers[pushforward_p] = _batch_of(pushforward)

ad.primitive_jvps[pullback_p] = _jvp_of(pullback)
batching.primitive_batchers[pullback_p] = _batch_of(pullback)

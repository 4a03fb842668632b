"""The separable filter: symmetric kernels along the last axes, edges repeated.

The filter is a JAX primitive of its own, so that each of its rules is written once:

- It is linear in the frames. Its transpose is the adjoint filter: pad with zeros,
  filter, and fold what fell outside back onto the edge.
- Its derivative in a radius is the same filter with the derivative of that axis'
  kernel. All images that a derivative needs come out of one call and share passes.
- Under `vmap`, mapped frames become one larger stack, and mapped radii a loop.
- Each platform has a lowering of its own: a loop over frames that stay in cache on CPU,
  the whole stack at once elsewhere.
"""

import functools as ft
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Shaped


class Kernel(Protocol):
    """A symmetric row of taps that depends on one number. Hashable."""

    @property
    def half_width(self) -> int: ...

    @property
    def is_bound(self) -> bool: ...

    def taps(self, radius_pix: Float[Array, ""]) -> Float[Array, " half_width_plus_1"]: ...

    def derivative(self) -> "Kernel": ...


# The kernels of one output image, an axis each.
Kernels = tuple[Kernel, ...]


def separable_filter(
    frames: Shaped[Array, "*batch height width"],
    radii: Sequence[Float[Array, ""]],
    kernels: Kernels,
) -> Float[Array, "*batch height width"]:
    """Correlates each frame with the outer product of `kernels`, repeating its edges.

    The last axes of `frames` are filtered, as many as there are kernels. The result has
    the dtype of the radii; frames of any real dtype are converted frame by frame.
    """
    (image,) = _filter_p.bind(frames, *radii, outputs=(kernels,), is_adjoint=False)
    return image


_filter_p = Primitive("separable_filter")
_filter_p.multiple_results = True


@_filter_p.def_impl
@ft.partial(jax.jit, static_argnames=("outputs", "is_adjoint"))
def _impl(*arguments, **parameters):
    return _filter_p.bind(*arguments, **parameters)


@_filter_p.def_abstract_eval
def _abstract_eval(frames, *radii, outputs, is_adjoint):
    del is_adjoint
    return [frames.update(dtype=radii[0].dtype, weak_type=False) for _ in outputs]


def _jvp(primals, tangents, *, outputs, is_adjoint):
    (frames, *radii), (frames_dot, *radii_dot) = primals, tangents
    bind = ft.partial(_filter_p.bind, is_adjoint=is_adjoint)
    derivatives = {
        (index, axis): (
            *kernels[:axis],
            kernels[axis].derivative(),
            *kernels[axis + 1 :],
        )
        for index, kernels in enumerate(outputs)
        for axis, radius_dot in enumerate(radii_dot)
        if not isinstance(radius_dot, ad.Zero)
    }
    images = bind(frames, *radii, outputs=(*outputs, *derivatives.values()))
    images, slopes = images[: len(outputs)], images[len(outputs) :]
    terms = [[] for _ in outputs]
    for (index, axis), slope in zip(derivatives, slopes, strict=True):
        terms[index].append(radii_dot[axis] * slope)
    if not isinstance(frames_dot, ad.Zero):
        for term, image in zip(
            terms, bind(frames_dot, *radii, outputs=outputs), strict=True
        ):
            term.append(image)
    return images, [ft.reduce(jnp.add, term) for term in terms]


def _transpose(cotangents, frames, *radii, outputs, is_adjoint):
    assert ad.is_undefined_primal(frames)
    bars = [
        _filter_p.bind(cotangent, *radii, outputs=(kernels,), is_adjoint=not is_adjoint)
        for cotangent, kernels in zip(cotangents, outputs, strict=True)
        if not isinstance(cotangent, ad.Zero)
    ]
    frames_bar = ft.reduce(jnp.add, [bar for (bar,) in bars]) if bars else None
    return [frames_bar, *(None for _ in radii)]


def _batch(arguments, dims, **parameters):
    (frames, *radii), (frames_dim, *radii_dims) = arguments, dims
    bind = ft.partial(_filter_p.bind, **parameters)
    if frames_dim is not None:
        frames = jnp.moveaxis(frames, frames_dim, 0)
    sizes = {
        radius.shape[0]
        for radius, dim in zip(radii, radii_dims, strict=True)
        if dim is not None
    }
    if not sizes:
        images = bind(frames, *radii)
    else:
        radii = [jnp.broadcast_to(radius, tuple(sizes)) for radius in radii]
        if frames_dim is None:
            images = lax.map(lambda radii: bind(frames, *radii), radii)
        else:
            images = lax.map(lambda args: bind(*args), [frames, *radii])
    return images, [0] * len(images)


ad.primitive_jvps[_filter_p] = _jvp
ad.primitive_transposes[_filter_p] = _transpose
batching.primitive_batchers[_filter_p] = _batch


def _filter_frame_by_frame(frames, *radii, outputs, is_adjoint):
    shape = frames.shape[-len(radii) :]
    taps = _taps_of(outputs, radii)
    images = lax.map(
        lambda frame: _filter_block(frame, taps, outputs, is_adjoint),
        frames.reshape((math.prod(frames.shape[: -len(shape)]), *shape)),
    )
    return [image.reshape(frames.shape) for image in images]


def _filter_at_once(frames, *radii, outputs, is_adjoint):
    return _filter_block(frames, _taps_of(outputs, radii), outputs, is_adjoint)


mlir.register_lowering(_filter_p, mlir.lower_fun(_filter_at_once, multiple_results=True))
mlir.register_lowering(
    _filter_p,
    mlir.lower_fun(_filter_frame_by_frame, multiple_results=True),
    platform="cpu",
)


def _taps_of(outputs: Sequence[Kernels], radii) -> dict[tuple[int, Kernel], Array]:
    return {
        (axis, kernel): kernel.taps(radii[axis])
        for kernels in outputs
        for axis, kernel in enumerate(kernels)
    }


def _filter_block(block, taps, outputs, is_adjoint):
    """Filters a block that is small enough to be worked on at once."""
    apply = ft.partial(_filter_finite, taps=taps, outputs=outputs, is_adjoint=is_adjoint)
    dtype = next(iter(taps.values())).dtype
    is_exact = all(
        _is_short(kernel) and not kernel.is_bound for _, kernel in taps
    ) or not jnp.issubdtype(block.dtype, jnp.floating)
    block = block.astype(dtype)
    if is_exact:
        return apply(block)
    # A zero times a NaN is a NaN: what is not finite takes a way of its own.
    is_finite = jnp.isfinite(block)
    rest = jnp.where(is_finite, 0, block)
    return lax.cond(
        jnp.all(is_finite),
        lambda: apply(block),
        lambda: [
            image + _spread(rest, taps, kernels)
            for image, kernels in zip(
                apply(jnp.where(is_finite, block, 0)), outputs, strict=True
            )
        ],
    )


def _filter_finite(block, taps, outputs, is_adjoint):
    # Images that begin with the same kernels share these passes.
    images = {(): block}
    for axis in range(len(outputs[0])):
        branches = dict.fromkeys(kernels[: axis + 1] for kernels in outputs)
        images = {
            branch: _filter_axis(
                images[branch[:-1]],
                taps[axis, branch[-1]],
                axis - len(outputs[0]),
                is_adjoint,
            )
            for branch in branches
        }
    return [images[kernels] for kernels in outputs]


def _filter_axis(image, taps, axis, is_adjoint):
    half_width, size = taps.size - 1, image.shape[axis]
    padded = lax.optimization_barrier(_pad(image, half_width, axis, is_adjoint))
    engine = _sum_of_shifts if half_width <= _SHORT else _banded_product
    filtered = engine(padded, taps, size, axis)
    return _fold_edges(filtered, image, taps, axis) if is_adjoint else filtered


def _pad(image, half_width, axis, is_adjoint):
    widths = [(0, 0)] * image.ndim
    widths[axis] = (half_width, half_width)
    return jnp.pad(image, widths, mode="constant" if is_adjoint else "edge")


def _fold_edges(filtered, image, taps, axis):
    """Adds to each edge pixel what its copies outside the frame would have received."""
    size = image.shape[axis]
    reach = min(taps.size - 1, size)
    # The weight with which the pixel at a distance from the edge reads beyond it.
    beyond = (jnp.sum(taps) - jnp.cumsum(taps))[:reach]
    for edge, nearest in ((0, 0), (size - 1, size - reach)):
        near = lax.slice_in_dim(image, nearest, nearest + reach, axis=axis)
        weights = beyond if edge == 0 else beyond[::-1]
        folded = jnp.sum(near * _column(weights, axis), axis=axis, keepdims=True)
        line = lax.slice_in_dim(filtered, edge, edge + 1, axis=axis)
        filtered = lax.dynamic_update_slice_in_dim(filtered, line + folded, edge, axis=axis)
    return filtered


def _column(weights, axis):
    return weights.reshape((-1, *(1 for _ in range(-1 - axis))))


# Engines: each correlates `padded` along an axis and gives `size` pixels.

_SHORT = 24  # the half-width up to which shifted slices are the faster engine
_BAND_ROWS = 128  # pixels that one product of the banded engine gives


def _sum_of_shifts(padded, taps, size, axis):
    half_width = taps.size - 1

    def shifted(offset):
        return lax.slice_in_dim(padded, offset, offset + size, axis=axis)

    # From the outside in: small terms first. A tap serves both of its sides.
    total = 0
    for distance in range(half_width, 0, -1):
        pair = shifted(half_width - distance) + shifted(half_width + distance)
        total += taps[distance] * pair
    return total + taps[0] * shifted(half_width)


def _banded_product(padded, taps, size, axis):
    half_width = taps.size - 1
    rows = min(_BAND_ROWS, size)
    distance = jnp.abs(
        jnp.arange(rows + 2 * half_width) - half_width - jnp.arange(rows)[:, None]
    )
    band = jnp.where(distance <= half_width, taps[jnp.minimum(distance, half_width)], 0)
    pieces = []
    for start in range(0, size, rows):
        count = min(rows, size - start)
        stop = start + count + 2 * half_width
        piece = lax.slice_in_dim(padded, start, stop, axis=axis)
        product = jnp.tensordot(
            band[:count, : count + 2 * half_width],
            piece,
            axes=(1, piece.ndim + axis),
            precision=lax.Precision.HIGHEST,
        )
        pieces.append(jnp.moveaxis(product, 0, axis))
    return jnp.concatenate(pieces, axis=axis)


def _is_short(kernel: Kernel) -> bool:
    return kernel.half_width <= _SHORT


def _spread(rest, taps, kernels):
    """Carries what is not finite to every pixel whose kernel covers it."""
    for axis, kernel in enumerate(kernels):
        row = taps[axis, kernel]
        covers = (row != 0) if kernel.is_bound else jnp.ones_like(row, bool)
        rest = _spread_axis(rest, covers, axis - len(kernels))
    return rest


def _spread_axis(rest, covers, axis):
    half_width = covers.size - 1
    padded = _pad(rest, half_width, axis, is_adjoint=False)

    def add(offset, total):
        shifted = lax.dynamic_slice_in_dim(padded, offset, rest.shape[axis], axis=axis)
        return total + jnp.where(covers[jnp.abs(offset - half_width)], shifted, 0)

    return lax.fori_loop(0, 2 * half_width + 1, add, jnp.zeros_like(rest))

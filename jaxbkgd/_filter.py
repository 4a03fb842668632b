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
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Shaped


@runtime_checkable
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

    The result has the dtype of the radii; frames of any real dtype are converted as they
    are filtered.
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


# How a stack is walked: in strips that stay in cache on CPU, at once elsewhere.

_STRIP_ROWS = 64


def _filter_in_strips(frames, *radii, outputs, is_adjoint):
    *batch, height, width = frames.shape
    stack = frames.reshape((math.prod(batch), height, width))
    taps = _all_taps(outputs, radii, (height, width))
    rows = min(_STRIP_ROWS, height)
    must_spread = _must_spread(frames, taps)

    def filter_frame(images, index_and_frame):
        index, frame = index_and_frame
        is_finite = jnp.isfinite(frame)
        finite = jnp.where(is_finite, frame, 0) if must_spread else frame

        def filter_strip(strip, images):
            # The last strip overlaps the one before.
            start = jnp.minimum(strip * rows, height - rows)
            filter_y = ft.partial(_filter_rows, finite, start, rows)
            filtered = _filter_both(filter_y, taps, outputs, is_adjoint)
            return [
                lax.dynamic_update_slice(image, new[None], (index, start, 0))
                for image, new in zip(images, filtered, strict=True)
            ]

        def add_spread(_, images):
            return [
                image.at[index].add(_spread(frame, taps, kernels))
                for image, kernels in zip(images, outputs, strict=True)
            ]

        images = lax.fori_loop(0, -(-height // rows), filter_strip, images)
        if must_spread:
            # A loop of one round or none leaves the images where they are.
            rounds = 1 - jnp.all(is_finite).astype(int)
            images = lax.fori_loop(0, rounds, add_spread, images)
        return images, None

    images = [jnp.zeros_like(stack, radii[0].dtype) for _ in outputs]
    if not frames.size:
        return [image.reshape(frames.shape) for image in images]
    images, _ = lax.scan(filter_frame, images, (jnp.arange(len(stack)), stack))
    return [image.reshape(frames.shape) for image in images]


def _filter_at_once(frames, *radii, outputs, is_adjoint):
    taps = _all_taps(outputs, radii, frames.shape[-2:])

    def filter_finite(frames):
        filter_y = ft.partial(_filter_axis, frames, axis=-2)
        return _filter_both(filter_y, taps, outputs, is_adjoint)

    if not _must_spread(frames, taps):
        return filter_finite(frames)
    is_finite = jnp.isfinite(frames)
    return lax.cond(
        jnp.all(is_finite),
        lambda: filter_finite(frames),
        lambda: [
            image + _spread(frames, taps, kernels)
            for image, kernels in zip(
                filter_finite(jnp.where(is_finite, frames, 0)), outputs, strict=True
            )
        ],
    )


mlir.register_lowering(_filter_p, mlir.lower_fun(_filter_at_once, multiple_results=True))
mlir.register_lowering(
    _filter_p, mlir.lower_fun(_filter_in_strips, multiple_results=True), platform="cpu"
)


def _all_taps(outputs, radii, shape) -> dict[tuple[int, Kernel], Array]:
    """The taps of each axis and kernel, no wider than the frame.

    A tap that reaches across the whole axis reads an edge pixel, whatever its distance:
    the last tap of a kernel that is wider takes the weight of all beyond.
    """
    taps = {}
    for kernels in outputs:
        for axis, kernel in enumerate(kernels):
            row = kernel.taps(radii[axis])
            reach = min(kernel.half_width, shape[axis] - 1)
            beyond = jnp.sum(row[reach + 1 :])
            # Of the centre there is one, of every other tap there are two.
            beyond = beyond if reach else 2 * beyond
            taps[axis, kernel] = row[: reach + 1].at[reach].add(beyond)
    return taps


def _filter_both(filter_y, taps, outputs, is_adjoint):
    """Filters along y, then x. Images with the same kernel along y share that pass."""
    images = {
        kernel: lax.optimization_barrier(
            filter_y(taps=taps[0, kernel], is_adjoint=is_adjoint)
        )
        for kernel in dict.fromkeys(kernel for kernel, _ in outputs)
    }
    return [
        _filter_axis(images[kernel_y], taps[1, kernel_x], is_adjoint, axis=-1)
        for kernel_y, kernel_x in outputs
    ]


def _filter_rows(frame, start, count, taps, is_adjoint):
    """The rows from `start` of the frame filtered along y."""
    height, half_width = frame.shape[0], taps.size - 1
    rows = start - half_width + jnp.arange(count + 2 * half_width)
    padded = frame.at[jnp.clip(rows, 0, height - 1)].get(mode="promise_in_bounds")
    padded = padded.astype(taps.dtype)
    if is_adjoint:
        is_inside = (rows >= 0) & (rows < height)
        padded = jnp.where(is_inside[:, None], padded, 0)
    # Rows whose pitch is a power of two would compete for the same lines of the cache.
    padded = lax.optimization_barrier(jnp.pad(padded, ((0, 0), (0, 16))))
    filtered = _correlate(padded, taps, count, axis=0)[:, : frame.shape[1]]
    if not is_adjoint:
        return filtered
    return _fold_edges(filtered, frame.astype(taps.dtype), taps, 0, start)


def _filter_axis(image, taps, is_adjoint, axis):
    image = image.astype(taps.dtype)
    widths = [(0, 0)] * image.ndim
    widths[axis] = (taps.size - 1, taps.size - 1)
    padded = jnp.pad(image, widths, mode="constant" if is_adjoint else "edge")
    padded = lax.optimization_barrier(padded)
    filtered = _correlate(padded, taps, image.shape[axis], axis)
    return _fold_edges(filtered, image, taps, axis) if is_adjoint else filtered


def _fold_edges(filtered, image, taps, axis, start=0):
    """Adds to the edge pixels what their copies beyond the edge would have received.

    `filtered` holds the pixels from `start` along the axis.
    """
    size, reach = image.shape[axis], taps.size - 1
    # The weight with which the pixel at a distance from the edge reads beyond it.
    beyond = (jnp.sum(taps) - jnp.cumsum(taps))[:reach]
    positions = _along(start + jnp.arange(filtered.shape[axis]), axis)
    for edge, first, weights in (
        (0, 0, beyond),
        (size - 1, size - reach, beyond[::-1]),
    ):
        near = lax.slice_in_dim(image, first, first + reach, axis=axis)
        folded = jnp.sum(near * _along(weights, axis), axis=axis, keepdims=True)
        filtered = filtered + jnp.where(positions == edge, folded, 0)
    return filtered


def _along(row, axis):
    return row.reshape((-1, *(1 for _ in range(-1 - axis)))) if axis < 0 else row[:, None]


# Engines: ways to correlate `padded` with taps, giving `count` pixels along the axis.

_MOST_SHIFTS = 24  # the half-width up to which shifted slices are the faster engine
_BAND_PIXELS = 64  # how many pixels one product of the banded engine gives


def _correlate(padded, taps, count, axis):
    engine = _sum_of_shifts if taps.size <= _MOST_SHIFTS else _banded_products
    return engine(padded, taps, count, axis)


def _sum_of_shifts(padded, taps, count, axis):
    def shifted(offset):
        return lax.slice_in_dim(padded, offset, offset + count, axis=axis)

    # From the outside in, small terms first. A tap serves both of its sides.
    centre, total = taps.size - 1, 0
    for distance in range(centre, 0, -1):
        pair = shifted(centre - distance) + shifted(centre + distance)
        total += taps[distance] * pair
    return total + taps[0] * shifted(centre)


def _banded_products(padded, taps, count, axis):
    """Products with a banded matrix, whose cost is nearly flat in the number of taps.

    The matrix is the same upside down and back to front. So the sum and the difference
    of a piece and its mirror image have a product of half the size each.
    """
    half_width = taps.size - 1
    pixels = min(_BAND_PIXELS, count + count % 2)
    half = pixels // 2 + half_width
    distance = jnp.abs(jnp.arange(2 * half) - half_width - jnp.arange(pixels // 2)[:, None])
    band = jnp.where(distance <= half_width, taps[jnp.minimum(distance, half_width)], 0)
    near, far = band[:, :half], band[:, : half - 1 : -1]

    def multiply(matrix, piece):
        product = jnp.tensordot(
            matrix, piece, (1, axis % piece.ndim), precision=lax.Precision.HIGHEST
        )
        return jnp.moveaxis(product, 0, axis)

    def filtered(start):
        piece = lax.slice_in_dim(padded, start, start + 2 * half, axis=axis)
        first = lax.slice_in_dim(piece, 0, half, axis=axis)
        last = jnp.flip(lax.slice_in_dim(piece, half, 2 * half, axis=axis), axis)
        even = multiply((near + far) / 2, first + last)
        odd = multiply((near - far) / 2, first - last)
        return jnp.concatenate([even + odd, jnp.flip(even - odd, axis)], axis=axis)

    if count % 2:
        widths = [(0, 0)] * padded.ndim
        widths[axis] = (0, 1)
        padded = jnp.pad(padded, widths)
    whole, rest = divmod(count, pixels)
    pieces = [filtered(index * pixels) for index in range(whole)]
    if rest:
        last = filtered(count + count % 2 - pixels)
        pieces.append(
            lax.slice_in_dim(last, pixels - rest - count % 2, pixels - count % 2, axis=axis)
        )
    return jnp.concatenate(pieces, axis=axis)


def _must_spread(frames, taps) -> bool:
    """Whether what is not finite would not reach just the pixels it should: a product
    spreads it over its rows and columns, and a zero tap times infinity is a NaN."""
    return jnp.issubdtype(frames.dtype, jnp.floating) and any(
        kernel.is_bound or row.size > _MOST_SHIFTS for (_, kernel), row in taps.items()
    )


def _spread(frames, taps, kernels):
    """NaN or infinity where a kernel covers one, and zero elsewhere."""

    def reaches(values):
        for axis, kernel in enumerate(kernels):
            row = taps[axis, kernel]
            covers = (row != 0) if kernel.is_bound else jnp.ones_like(row)
            count = _filter_axis(values, covers.astype(row.dtype), False, axis - 2)
            values = count > 0.5
        return values

    nan, up, down = map(reaches, (jnp.isnan(frames), frames == jnp.inf, frames == -jnp.inf))
    spread = jnp.where(up, jnp.inf, jnp.where(down, -jnp.inf, 0))
    return jnp.where(nan | (up & down), jnp.nan, spread).astype(frames.dtype)

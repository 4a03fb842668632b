"""NaN and infinity: where they are, and the pixels that kernels spread them to."""

import functools as ft
from collections.abc import Callable

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Int, Shaped

from .correlation import pad, Rows
from .kernels import Frames, Image, Kernels


Distance = Int[Array, ""]

# Flags, so that one number holds all kinds that reach a pixel.
_UP, _DOWN, _NAN = 1, 2, 4


def zeros_for_nonfinite(image: Frames) -> Frames:
    return jnp.where(jnp.isfinite(image), image, 0)


def zeros_of(images: Frames) -> Shaped[Array, "*batch eighth width"]:
    """Zeros, and NaN where one of eight lines is not finite. On CPU this is fast, while
    XLA's own reductions over all pixels take as long as the filter."""
    slice_lines = ft.partial(lax.dynamic_slice_in_dim, images, axis=-2)
    return zeros_of_lines(slice_lines, images.shape[-2])


def zeros_of_lines(lines_from: Callable[[int, int], Frames], height: int) -> Frames:
    """As `zeros_of`, for lines that a function reads, `lines_from(first, count)`."""
    count = -(-height // 8)
    # Eight reads, since parts of one read are slower in a loop. They may overlap.
    firsts = [min(first, height - count) for first in range(0, 8 * count, count)]
    return ft.reduce(jnp.add, [lines_from(first, count) * 0 for first in firsts])


def must_spread(frames: Frames, rows: Rows) -> bool:
    """Whether correlation would spread what is not finite further than the kernels reach: a
    product spreads it over lines of pixels, and a zero tap times infinity is NaN."""
    return jnp.issubdtype(frames.dtype, jnp.floating) and any(
        kernel.is_bound or row.bands is not None for (_, kernel), row in rows.items()
    )


def spread_nonfinite(
    frames: Image, rows: Rows, kernels: Kernels, *, in_loop: bool
) -> Image:
    """NaN or infinity where the kernels cover one, and zero elsewhere: also for derivatives
    in the radii, which are not finite where the image is not. A loop takes less memory on
    CPU; GPU and TPU do without loops."""
    infinite = jnp.where(frames > 0, jnp.uint8(_UP), jnp.uint8(_DOWN))
    flags = jnp.where(jnp.isinf(frames), infinite, jnp.uint8(0))
    flags = jnp.where(jnp.isnan(frames), jnp.uint8(_NAN), flags)
    # Infinities of one sign, under taps of one sign, add up to infinity.
    has_one_sign = jnp.asarray(True)
    for axis, kernel in enumerate(kernels):
        taps = rows[axis, kernel].all_taps
        most = taps.size - 1
        between = ft.partial(_flags_between, most=most, axis=axis - 2, in_loop=in_loop)
        distance = jnp.asarray(most - kernel.zero_taps)
        if kernel.is_bound:
            # To the last tap that is not zero: nearer ones may be zero, too.
            distance = jnp.max(jnp.where(taps != 0, jnp.arange(taps.size), 0))
        near = between(flags, -distance, distance)
        if kernel.zero_taps:
            # Zero times infinity is not a number.
            before = between(flags, jnp.asarray(-most), -distance - 1)
            after = between(flags, distance + 1, jnp.asarray(most))
            near |= jnp.where(before | after, jnp.uint8(_NAN), jnp.uint8(0))
        flags = near
        has_one_sign &= jnp.all(taps >= 0)
    infinite = jnp.where(flags == _UP, jnp.inf, -jnp.inf)
    is_infinite = has_one_sign & ((flags == _UP) | (flags == _DOWN))
    spread = jnp.where(is_infinite, infinite, jnp.nan)
    return jnp.where(flags == 0, 0, spread).astype(frames.dtype)


def _flags_between(
    flags: Frames, first: Distance, last: Distance, *, most: int, axis: int, in_loop: bool
) -> Frames:
    """For each pixel all flags of the pixels from `first` to `last` beyond it, edges
    repeated. Neither is farther than `most`."""
    size = flags.shape[axis]
    if not export.is_symbolic_dim(flags.shape[axis]):
        # All that lies farther away than this is the edge.
        most = min(most, size)
    first, last = (jnp.clip(distance, -most, most) for distance in (first, last))
    count, doublings = last - first + 1, (2 * most + 1).bit_length() - 1
    padded = pad(flags, (most, most), axis, "edge")
    near = jnp.where(count > 0, padded, jnp.zeros_like(padded))
    length = near.shape[axis]

    # Flags of 1, 2, 4, ... pixels, until two such ranges cover all. They may overlap.
    def double(number, near):
        beyond = pad(near, (0, 2**doublings // 2), axis)
        both = near | lax.dynamic_slice_in_dim(beyond, 1 << number, length, axis)
        # Else more than two of the doubled images would be kept.
        return lax.optimization_barrier(jnp.where(2 << number <= count, both, near))

    near = lax.fori_loop(0, doublings, double, near, unroll=not in_loop)
    width = 1 << jnp.sum(2 << jnp.arange(doublings) <= count)
    left = lax.dynamic_slice_in_dim(near, most + first, size, axis)
    right = lax.dynamic_slice_in_dim(near, most + last + 1 - width, size, axis)
    return left | right

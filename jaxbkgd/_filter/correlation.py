"""Correlation with symmetric rows of taps along one axis of an image: by sums of shifted
slices for few taps, by products with banded matrices for many."""

import dataclasses
import functools as ft
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float, Shaped

from .kernels import Frames, GaussianKernel, Image, Kernels, Radii


# What lies beyond an edge: the edge pixel repeated, or zeros. "folded" is the adjoint of
# "repeated": zeros lie beyond, and what the filter would write there is added to the edge.
Edges = Literal["repeated", "folded", "empty"]

Padded = Shaped[Array, "*batch padded_height padded_width"]

# A number of pixels, or a symbolic one of `jax.export`, which has no public type.
Size = Any

# The most taps, centre and one side, for which shifted slices are faster (jax 0.12, Zen 5).
_MOST_TAPS = 28
_MOST_TAPS_OF_LONG_AXES = 48
_LONG_AXIS_PIXELS = 512
# The most taps on one side that are written out. More, which occur in time only, go
# through a loop over groups, since a long program compiles slowly.
_MOST_SHIFTS, _SHIFT_GROUP = _MOST_TAPS_OF_LONG_AXES - 1, 16
# Pixels that one product of the banded engine gives.
_BAND_PIXELS = 64
# On CPU more products than these go through a loop: written out, they compile slowly.
_MOST_PRODUCTS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all images of a call share."""

    # Kernels (y, x) along the last two axes, or one along the last axis but two.
    dimension: Literal["space", "time"]
    edges: Edges
    # Whether the frames are known to be finite, so that less is compiled.
    is_finite: bool

    def adjoint(self) -> "Settings":
        adjoints = {"repeated": "folded", "folded": "repeated", "empty": "empty"}
        return dataclasses.replace(self, edges=adjoints[self.edges])


class Row(NamedTuple):
    """A kernel's taps from the centre outwards, and what is derived of them for an axis."""

    all_taps: Float[Array, " all_taps"]
    taps: Float[Array, " taps"]  # no more than the axis has pixels
    bands: Float[Array, "2 band reach"] | None  # of the banded engine


# By axis (0: y or t, 1: x) and kernel.
Rows = dict[tuple[int, GaussianKernel], Row]


def rows_of(
    images: Sequence[Kernels], radii: Radii, sizes: Sequence[Size], settings: Settings
) -> Rows:
    """The rows of all kernels of some images, for axes of these sizes."""
    rows: Rows = {}
    for axis, kernel in (pair for kernels in images for pair in enumerate(kernels)):
        if (axis, kernel) not in rows:
            taps = kernel.taps(radii[axis])
            rows[axis, kernel] = _row(taps, sizes[axis], settings)
    return rows


def _row(all_taps: Float[Array, " all_taps"], size: Size, settings: Settings) -> Row:
    if export.is_symbolic_dim(size):
        return Row(all_taps, all_taps, None)
    # A tap that reaches across the whole axis reads the edge pixel, whatever its distance.
    reach = min(all_taps.size, size) - 1
    taps = all_taps[: reach + 1]
    if settings.edges != "empty":
        beyond = jnp.sum(all_taps[reach + 1 :])
        # There is one centre, and two of every other tap.
        taps = taps.at[reach].add(beyond if reach else 2 * beyond)
    is_long = size > _LONG_AXIS_PIXELS
    most_taps = _MOST_TAPS_OF_LONG_AXES if is_long else _MOST_TAPS
    # The order of a product's sum depends on the place along the axis, and in time the
    # bits must not.
    is_banded = taps.size > most_taps and settings.dimension == "space"
    return Row(all_taps, taps, _bands(taps) if is_banded else None)


def correlate_axis(
    image: Frames, rows: Sequence[Row], edges: Edges, axis: int, *, on_cpu: bool
) -> list[Image]:
    """The image correlated with each row along a whole axis, -2 or -1."""
    image = image.astype(rows[0].taps.dtype)
    half_width, size = rows[0].taps.size - 1, image.shape[axis]
    if edges == "repeated":
        padded = pad(image, (half_width, half_width), axis, "edge")
    else:
        # On CPU this copies lines, where a constant pad asks at each pixel.
        shape = list(image.shape)
        shape[axis] = half_width
        beyond = jnp.zeros_like(image, shape=shape)
        padded = jnp.concatenate([beyond, image, beyond], axis)
    padded = lax.optimization_barrier(padded)  # else XLA would pad anew for each tap
    images = correlate(padded, rows, size, axis, on_cpu=on_cpu)
    if edges != "folded":
        return images
    # Of an image smaller than the taps, these have zeros from beyond the other edge.
    first = lax.slice_in_dim(padded, half_width, 2 * half_width, axis=axis)
    last = lax.slice_in_dim(padded, size, size + half_width, axis=axis)
    return [
        fold_edges(image, first, last, row.taps, axis, 0, size)
        for image, row in zip(images, rows, strict=True)
    ]


def pad(
    image: Shaped[Array, "..."],
    widths: tuple[Size, Size],
    axis: int,
    mode: str = "constant",
) -> Shaped[Array, "..."]:
    """The image, padded along one axis."""
    all_widths = [(0, 0)] * image.ndim
    all_widths[axis] = widths
    return jnp.pad(image, all_widths, mode)


def fold_edges(
    image: Image,
    first: Float[Array, "*batch first_height first_width"],
    last: Float[Array, "*batch last_height last_width"],
    taps: Float[Array, " taps"],
    axis: int,
    start: int | Shaped[Array, ""],
    size: Size,
) -> Image:
    """Adds to the edge pixels what pixels beyond them would have received. `image` holds
    the correlated pixels from `start` on, along an axis of `size` pixels; `first` and
    `last` are the pixels within reach of the edges, not correlated."""
    # The weight with which a pixel at a distance from the edge writes beyond it.
    beyond = (jnp.sum(taps) - jnp.cumsum(taps))[:-1]
    others = [other for other in range(-image.ndim, 0) if other != axis]
    along = ft.partial(jnp.expand_dims, axis=others)
    positions = along(start + jnp.arange(image.shape[axis]))
    for edge, near, weights in ((0, first, beyond), (size - 1, last, beyond[::-1])):
        folded = jnp.sum(near * along(weights), axis=axis, keepdims=True)
        image = image + jnp.where(positions == edge, folded, 0)
    return image


def correlate(
    padded: Padded, rows: Sequence[Row], count: Size, axis: int, *, on_cpu: bool
) -> list[Image]:
    """The `count` pixels along the axis that the padding surrounds, for each row. The rows
    have equally many taps."""
    bands = [row.bands for row in rows if row.bands is not None]
    if bands:
        return [_banded_products(padded, b, count, axis, on_cpu=on_cpu) for b in bands]
    images = []
    rows_at_once = 2 if on_cpu else 1
    for first in range(0, len(rows), rows_at_once):
        taps = [row.taps for row in rows[first : first + rows_at_once]]
        total = _sum_of_shifts(padded, taps, count, axis)
        if axis == -2 or len(taps) == 2:
            # Else XLA would sum anew for each tap along x, or for both parts.
            total = lax.optimization_barrier(total)
        images += [jnp.real(total), jnp.imag(total)] if len(taps) == 2 else [total]
    return images


def _sum_of_shifts(
    padded: Padded, rows: Sequence[Float[Array, " taps"]], count: Size, axis: int
) -> Frames:
    """The sum of shifted slices with the weights of one row of taps. With two rows, the two
    sums are real and imaginary part: XLA's loops on CPU have one result, and so the two
    share what is read."""
    centre = rows[0].size - 1
    grouped = centre // _SHIFT_GROUP * _SHIFT_GROUP if centre > _MOST_SHIFTS else 0

    def joined(sums):
        return lax.complex(*sums) if len(sums) == 2 else sums[0]

    def sum_of_pairs(left, right, rows):
        # From the outside in, small terms first. A tap serves both of its sides.
        totals: list = [0] * len(rows)
        for start in range(rows[0].size - 1, -1, -1):
            index = rows[0].size - 1 - start
            outer = lax.slice_in_dim(left, index, index + count, axis=axis)
            inner = lax.slice_in_dim(right, start, start + count, axis=axis)
            both = outer + inner
            totals = [s + taps[start] * both for s, taps in zip(totals, rows, strict=True)]
        return joined(totals)

    def add_group(group, total):
        first, size = group * _SHIFT_GROUP, count + _SHIFT_GROUP - 1
        nearest = centre - first - _SHIFT_GROUP + 1
        left = lax.dynamic_slice_in_dim(padded, first, size, axis)
        right = lax.dynamic_slice_in_dim(padded, centre + nearest, size, axis)
        near = [lax.dynamic_slice_in_dim(taps, nearest, _SHIFT_GROUP) for taps in rows]
        return total + sum_of_pairs(left, right, near)

    sums = []
    middle = lax.slice_in_dim(padded, centre, centre + count, axis=axis)
    middle = joined([taps[0] * middle for taps in rows])
    if grouped:
        zeros = jnp.zeros_like(middle)
        sums.append(lax.fori_loop(0, grouped // _SHIFT_GROUP, add_group, zeros))
    if grouped < centre:
        left = lax.slice_in_dim(padded, grouped, centre - 1 + count, axis=axis)
        stop = 2 * centre - grouped + count
        right = lax.slice_in_dim(padded, centre + 1, stop, axis=axis)
        near = [taps[1 : centre - grouped + 1] for taps in rows]
        sums.append(sum_of_pairs(left, right, near))
    return ft.reduce(jnp.add, [*sums, middle])


def _bands(taps: Float[Array, " taps"]) -> Float[Array, "2 band reach"]:
    """The matrices that make `_BAND_PIXELS` pixels from a piece of an axis. The banded
    matrix of a symmetric kernel is the same upside down and back to front. So the sum and
    the difference of a piece and its mirror image each have a product of their own, with
    half of the rows and half of the columns."""
    half_width = taps.size - 1
    half = _BAND_PIXELS // 2 + half_width
    pixels = jnp.arange(_BAND_PIXELS // 2)[:, None]
    distance = jnp.abs(jnp.arange(2 * half)[None] - half_width - pixels)
    band = jnp.where(distance <= half_width, taps[jnp.minimum(distance, half_width)], 0)
    first, last = band[:, :half], band[:, : half - 1 : -1]
    return jnp.stack([first + last, first - last]) / 2


def _banded_products(
    padded: Padded,
    bands: Float[Array, "2 band reach"],
    count: Size,
    axis: int,
    *,
    on_cpu: bool,
) -> Image:
    """As `correlate`, by products, at nearly the same cost for any number of taps."""
    half, result_count = bands.shape[-1], count
    count = max(result_count, _BAND_PIXELS)
    padded = pad(padded, (0, count - result_count), axis)

    def multiply(matrix, piece):
        left, right = (matrix, piece) if axis == -2 else (piece, matrix.T)
        return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)

    def products(start):
        first = lax.dynamic_slice_in_dim(padded, start, half, axis)
        last = jnp.flip(lax.dynamic_slice_in_dim(padded, start + half, half, axis), axis)
        # The barriers keep XLA from fusing these with the products, which is slower.
        folded = lax.optimization_barrier((first + last, first - last))
        even, odd = lax.optimization_barrier(tuple(map(multiply, bands, folded)))
        return lax.optimization_barrier((even + odd, jnp.flip(even - odd, axis)))

    def add_products(piece, image):
        # The last piece overlaps the one before.
        start = jnp.minimum(piece * _BAND_PIXELS, count - _BAND_PIXELS)
        for index, half_piece in enumerate(products(start)):
            corner = start + index * _BAND_PIXELS // 2
            image = lax.dynamic_update_slice_in_dim(image, half_piece, corner, axis)
        return image

    piece_count = -(-count // _BAND_PIXELS)
    if on_cpu and piece_count > _MOST_PRODUCTS:
        image = lax.slice_in_dim(jnp.zeros_like(padded), 0, count, axis=axis)
        image = lax.fori_loop(0, piece_count, add_products, image)
    else:
        starts = [*range(0, count - _BAND_PIXELS, _BAND_PIXELS), count - _BAND_PIXELS]
        pieces = [piece for start in starts[:-1] for piece in products(start)]
        last = jnp.concatenate(products(starts[-1]), axis=axis)
        overlap = (piece_count - 1) * _BAND_PIXELS - starts[-1]
        pieces.append(lax.slice_in_dim(last, overlap, _BAND_PIXELS, axis=axis))
        image = jnp.concatenate(pieces, axis=axis)
    return lax.slice_in_dim(image, 0, result_count, axis=axis)

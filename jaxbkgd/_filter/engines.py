"""The separable filter of a stack: on CPU in pieces, which stay in cache on their way
through both axes, elsewhere the whole stack at once. In time, a stack is an image frames
high and as wide as a frame has pixels, filtered along its height alone."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .correlation import (
    correlate,
    correlate_axis,
    Edges,
    fold_edges,
    Row,
    Rows,
    rows_of,
    Settings,
)
from .kernels import differentiate, Frames, GaussianKernel, Image, Kernels, Radii, Radius
from .nonfinite import must_spread, spread_nonfinite, zeros_for_nonfinite, zeros_of_lines


Stack = Float[Array, "count height width"]
Strip = Float[Array, "lines columns"]
_Index = int | Int[Array, ""]
_Flag = Bool[Array, ""]

# Height of a strip, and width of a block in time. Products take taller strips of at most
# 1 MB: XLA copies larger buffers in threads, for which concurrent calls would wait.
_STRIP_LINES = 32
_BANDED_STRIP_BYTES = 2**20
_TEMPORAL_COLUMNS = 256
# Where the lines under the taps do not fit into the nearest cache, a strip is filtered
# along y in blocks of columns that do. As many lines as the cache has ways need none.
_COLUMNS = 128
_BANDED_COLUMNS = 256
_L1_BYTES, _L1_WAYS = 2**15, 8


def filter_at_once(
    frames: Frames, *radii: Radius, images: Sequence[Kernels], settings: Settings
) -> list[Image]:
    """The frames filtered with the kernels of each image."""
    stack = _as_images(frames, settings)
    rows = rows_of(images, radii, stack.shape[-2:], settings)

    def filter_finite(stack):
        filter_y = ft.partial(correlate_axis, stack, edges=settings.edges, axis=-2)
        return _filter_axes(filter_y, rows, images, settings.edges, on_cpu=False)

    def filter_others(stack):
        spread = spread_nonfinite(stack, rows, images[0], in_loop=False)
        return [image + spread for image in filter_finite(zeros_for_nonfinite(stack))]

    if settings.is_finite or not must_spread(stack, rows):
        filtered = filter_finite(stack)
    else:
        all_finite = jnp.all(jnp.isfinite(stack))
        filtered = lax.cond(all_finite, filter_finite, filter_others, stack)
    return [image.reshape(frames.shape) for image in filtered]


def filter_in_pieces(
    frames: Frames, *radii: Radius, images: Sequence[Kernels], settings: Settings
) -> list[Image]:
    """As `filter_at_once`."""
    pieces = _pieces(frames, radii, images, images[0], settings)
    results = [_empty(pieces, radii[0].dtype, number) for number in range(len(images))]
    results, _ = _filter_pieces(pieces, results, [], lambda strips, sums, _: (strips, sums))
    return [result.reshape(frames.shape) for result in results]


def filter_onto(
    frames: Frames, *radii_and_donated: Any, kernels: Kernels, settings: Settings
) -> Image:
    """As `filter_in_pieces`, for one image that is written over the donated one."""
    *radii, donated = radii_and_donated
    pieces = _pieces(frames, radii, [kernels], kernels, settings)
    onto = [donated.reshape(pieces.stack.shape)]
    onto, _ = _filter_pieces(pieces, onto, [], lambda strips, sums, _: (strips, sums))
    return onto[0].reshape(frames.shape)


def slope_in_pieces(
    frames: Frames,
    radii: Radii,
    tangents: Radii,
    axes: Sequence[int],
    kernels: Kernels,
    settings: Settings,
) -> Image:
    """The derivative of an image along tangents of the radii of `axes`: the weighted sum of
    images, none of which is kept."""
    images = [differentiate(kernels, axis) for axis in axes]
    pieces = _pieces(frames, radii, images, kernels, settings)
    total = [_empty(pieces, radii[0].dtype, len(axes))]
    (total,), _ = _filter_pieces(
        pieces, total, [], lambda strips, sums, _: ([weighted_sum(tangents, strips)], sums)
    )
    return total.reshape(frames.shape)


def weighted_sum(weights: Radii, images: Sequence[Image]) -> Image:
    return ft.reduce(jnp.add, map(jnp.multiply, weights, images))


def products_in_pieces(
    frames: Image,
    factor: Frames,
    *radii: Radius,
    kernels: Kernels,
    axes: Sequence[int],
    is_image_kept: bool,
    settings: Settings,
) -> list[Float[Array, "..."]]:
    """For each of `axes` the sum of products of the factor and an image's derivative in
    that radius, none of which is kept; then the image itself, if it is to be kept."""
    images = [differentiate(kernels, axis) for axis in axes]
    kept = [kernels] if is_image_kept else []
    pieces = _pieces(frames, radii, [*images, *kept], kernels, settings)
    factors, dtype = factor.reshape(pieces.stack.shape), radii[0].dtype

    def add_products(strips, sums, place):
        near = _factor_of_strip(factors, pieces, place, dtype)
        pairs = zip(sums, strips[: len(images)], strict=True)
        return strips[len(images) :], [total + near * strip for total, strip in pairs]

    # A sum for each pixel of a strip is faster and more exact than XLA's over all pixels.
    shape = pieces.lines, pieces.columns
    sums = [jnp.zeros_like(pieces.stack, dtype, shape) for _ in images]
    results = [_empty(pieces, dtype, 0) for _ in kept]
    results, sums = _filter_pieces(pieces, results, sums, add_products)
    return [*map(jnp.sum, sums), *(result.reshape(frames.shape) for result in results)]


class _Pieces(NamedTuple):
    """A stack of images and how it is divided: each image into blocks of columns, each
    block into strips of lines. In space a block is as wide as the frames."""

    stack: Shaped[Array, "count height width"]
    rows: Rows
    images: tuple[Kernels, ...]
    kernels: Kernels  # whose reach what is not finite has
    settings: Settings
    lines: int
    columns: int
    block_count: int
    must_spread: bool

    def read(self, index: _Index, left: _Index, first: _Index, count: int) -> Frames:
        """Lines of one block of one image."""
        size = (1, count, self.columns)
        return lax.dynamic_slice(self.stack, (index, first, left), size)[0]


class _Place(NamedTuple):
    """Where a strip is. The last strip and the last block overlap those before."""

    number: _Index  # of the image in the stack
    top: _Index
    left: _Index
    first_new_line: _Index  # no strip before has it
    first_new_column: _Index


def _as_images(
    frames: Frames, settings: Settings
) -> Shaped[Array, "*images image_height image_width"]:
    """In time, one image with a line for each frame."""
    if settings.dimension == "space":
        return frames
    *batch, count, height, width = frames.shape
    return frames.reshape((*batch, count, height * width))


def _pieces(
    frames: Frames,
    radii: Radii,
    images: Sequence[Kernels],
    kernels: Kernels,
    settings: Settings,
) -> _Pieces:
    stack = _as_images(frames, settings)
    *batch, height, width = stack.shape
    # Else a pixel of the stack would be read from what the stack is made of.
    stack = lax.optimization_barrier(stack.reshape((math.prod(batch), height, width)))
    rows = rows_of([kernels, *images], radii, (height, width), settings)
    if settings.dimension == "time":
        lines, columns = height, min(_TEMPORAL_COLUMNS, width)
    else:
        is_banded = any(row.bands is not None for row in rows.values())
        strip_bytes = _BANDED_STRIP_BYTES if is_banded else 0
        banded_lines = strip_bytes // max(1, width * radii[0].dtype.itemsize)
        lines, columns = min(max(_STRIP_LINES, banded_lines), height), width
    spreads = not settings.is_finite and must_spread(stack, rows)
    sizes = lines, columns, -(-width // columns)
    return _Pieces(stack, rows, tuple(images), kernels, settings, *sizes, spreads)


def _empty(pieces: _Pieces, dtype: jnp.dtype, number: int) -> Stack:
    """An image for a loop to write to. On CPU `lax.empty` is filled with zeros, and XLA
    would make one image of all that are equal, and copy it. So a number and a pixel of the
    stack are in it: the pixel also keeps XLA from filling it, and using memory, before
    there is a stack, and makes it vary under `shard_map` as the stack does."""
    pixel = 0 * pieces.stack[0, 0, 0].astype(dtype) + number
    return lax.empty(pieces.stack.shape, dtype) + pixel


def _filter_pieces(
    pieces: _Pieces, images: list[Stack], sums: list[Strip], use_strips: Callable
) -> tuple[list[Stack], list[Strip]]:
    """Writes to the images, and adds to the sums, what `use_strips` makes of the filtered
    strips of all images, the sums so far and the place."""
    filter_block = ft.partial(_filter_block, pieces, use_strips)
    blocks = jnp.arange(pieces.stack.shape[0] * pieces.block_count)
    carry, _ = lax.scan(filter_block, (images, sums), blocks)
    return carry


def _filter_block(
    pieces: _Pieces, use_strips: Callable, images_and_sums: tuple, number: _Index
) -> tuple[tuple[list[Stack], list[Strip]], None]:
    """One step of a scan over all blocks."""
    (images, sums), (_, height, width) = images_and_sums, pieces.stack.shape
    index, block = number // pieces.block_count, number % pieces.block_count
    first_column = block * pieces.columns
    # XLA copies whole lines faster where it knows that they are whole.
    is_whole = pieces.columns == width
    left = 0 if is_whole else jnp.minimum(first_column, width - pieces.columns)
    read = ft.partial(pieces.read, index, left)

    def filter_strip(strip, carry):
        images, sums, zeros = carry
        first_line = strip * pieces.lines
        top = jnp.minimum(first_line, height - pieces.lines)
        place = _Place(index, top, left, first_line, first_column)
        if pieces.must_spread:
            zeros += zeros_of_lines(lambda i, count: read(top + i, count), pieces.lines)
        kept, sums = use_strips(_filter_strip(pieces, place), sums, place)
        images = [
            lax.dynamic_update_slice(image, strip[None], (index, top, left))
            for image, strip in zip(images, kept, strict=True)
        ]
        return images, sums, zeros

    carry = images, sums, jnp.zeros_like(zeros_of_lines(read, pieces.lines))
    strip_count = -(-height // pieces.lines)
    images, sums, zeros = lax.fori_loop(0, strip_count, filter_strip, carry)
    if pieces.must_spread:
        is_finite = jnp.all(jnp.isfinite(zeros))
        sums = [jnp.where(is_finite, total, jnp.nan) for total in sums]
        images = _add_nonfinite(pieces, images, index, left, is_finite)
    return (images, sums), None


def _add_nonfinite(
    pieces: _Pieces, images: list[Stack], index: _Index, left: _Index, is_finite: _Flag
) -> list[Stack]:
    """Adds what is not finite to one block of the images, if there is any."""

    def add(turn, images):
        # What depends on the turn, which is 0, is not moved out of the loop over blocks,
        # where it would be made for every block.
        pixels = pieces.read(index + turn, left, 0, pieces.stack.shape[1])
        if pieces.stack.shape[0] == 1:
            # Here XLA knows the index, and that a turn changes nothing.
            pixels, _ = lax.optimization_barrier((pixels, turn))
        spread = spread_nonfinite(pixels, pieces.rows, pieces.kernels, in_loop=True)
        corner, shape = (index, 0, left), (1, *spread.shape)
        return [
            lax.dynamic_update_slice(
                image, lax.dynamic_slice(image, corner, shape) + spread[None], corner
            )
            for image in images
        ]

    # A loop of one turn or none leaves the images where they are; a `cond` copies them.
    return lax.fori_loop(0, 1 - is_finite.astype(jnp.int32), add, images)


def _factor_of_strip(
    factors: Frames, pieces: _Pieces, place: _Place, dtype: jnp.dtype
) -> Strip:
    """The factor at a strip, and zero where another strip was before."""
    corner, size = (place.number, place.top, place.left), (1, pieces.lines, pieces.columns)
    near = lax.dynamic_slice(factors, corner, size)[0].astype(dtype)
    if pieces.settings.edges == "folded":
        # Products with a constant add up to rounding alone, and less so if it is small.
        near -= factors[place.number, 0, 0].astype(dtype)
    lines = place.top + jnp.arange(pieces.lines)
    is_new = (lines >= place.first_new_line)[:, None]
    if pieces.columns < factors.shape[2]:
        columns = place.left + jnp.arange(pieces.columns)
        is_new &= (columns >= place.first_new_column)[None]
    return jnp.where(is_new, near, 0)


def _filter_strip(pieces: _Pieces, place: _Place) -> list[Strip]:
    """A strip filtered with the kernels of each image."""
    edges = pieces.settings.edges
    if pieces.lines == pieces.stack.shape[1]:
        image = pieces.read(place.number, place.left, 0, pieces.lines)
        image = zeros_for_nonfinite(image) if pieces.must_spread else image
        filter_y = ft.partial(correlate_axis, image, edges=edges, axis=-2)
    else:
        filter_y = ft.partial(_correlate_strip, pieces, place)
    return _filter_axes(filter_y, pieces.rows, pieces.images, edges, on_cpu=True)


def _filter_axes(
    filter_y: Callable[..., list[Image]],
    rows: Rows,
    images: Sequence[Kernels],
    edges: Edges,
    *,
    on_cpu: bool,
) -> list[Image]:
    """Filters along y, then along x where there is a kernel for it. Images with the same
    kernel along y share that pass, and the rows of a pass are correlated together."""
    kernels_x: dict[GaussianKernel, list[GaussianKernel]] = {}
    for first, *others in images:
        kernels_x.setdefault(first, []).extend(others)
    passes = filter_y([rows[0, first] for first in kernels_x], on_cpu=on_cpu)
    filtered: dict[Kernels, Array] = {}
    for (first, others), image in zip(kernels_x.items(), passes, strict=True):
        filtered[first,] = image
        if others:
            rows_x = [rows[1, other] for other in others]
            lines = correlate_axis(image, rows_x, edges, -1, on_cpu=on_cpu)
            filtered |= {(first, x): line for x, line in zip(others, lines, strict=True)}
    return [filtered[kernels] for kernels in images]


def _correlate_strip(
    pieces: _Pieces, place: _Place, rows: Sequence[Row], *, on_cpu: bool
) -> list[Strip]:
    """A strip correlated with each row along y, its halo read from the stack."""
    (_, height, width), dtype = pieces.stack.shape, rows[0].taps.dtype
    half_width, edges = rows[0].taps.size - 1, pieces.settings.edges
    lines = place.top - half_width + jnp.arange(pieces.lines + 2 * half_width)
    inside = jnp.clip(lines, 0, height - 1)

    def read(numbers, left=0, columns=width):
        def read_line(line):
            corner, size = (place.number, line, left), (1, 1, columns)
            return lax.dynamic_slice(pieces.stack, corner, size)[0, 0]

        pixels = jax.vmap(read_line)(numbers).astype(dtype)
        return zeros_for_nonfinite(pixels) if pieces.must_spread else pixels

    def correlate_columns(left, columns):
        padded = read(inside, left, columns)
        if edges != "repeated":
            is_inside = (lines >= 0) & (lines < height)
            padded = jnp.where(is_inside[:, None], padded, 0)
        # Else XLA would read and convert anew for each tap.
        padded = lax.optimization_barrier(padded)
        return correlate(padded, rows, pieces.lines, -2, on_cpu=on_cpu)

    is_banded = rows[0].bands is not None
    columns = min(_BANDED_COLUMNS if is_banded else _COLUMNS, width)

    def add_block(block, images):
        left = jnp.minimum(block * columns, width - columns)
        strips = correlate_columns(left, columns)
        return [
            lax.dynamic_update_slice(image, strip, (0, left))
            for image, strip in zip(images, strips, strict=True)
        ]

    line_count = 2 * half_width + 1
    is_near = line_count <= _L1_WAYS or line_count * width * dtype.itemsize <= _L1_BYTES
    if columns == width or (is_near and not is_banded):
        images = correlate_columns(0, width)
    else:
        shape = pieces.lines, width
        # Of different numbers, since XLA would make one image of two equal ones, and copy.
        images = [
            jnp.full_like(pieces.stack, number, dtype, shape) for number in range(len(rows))
        ]
        images = lax.fori_loop(0, -(-width // columns), add_block, images)
    if edges != "folded":
        return images
    first = read(jnp.arange(half_width))
    last = read(height - half_width + jnp.arange(half_width))
    return [
        fold_edges(image, first, last, row.taps, -2, place.top, height)
        for image, row in zip(images, rows, strict=True)
    ]

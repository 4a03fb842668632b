"""How a stack is filtered: in pieces, or at once, by shifted slices or by products.

On CPU a stack is walked in pieces, which stay in cache on their way through both axes.
Elsewhere all of it goes through at once. What is not finite takes a way of its own.
"""

import functools as ft
import math
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@runtime_checkable
class Kernel(Protocol):
    """A symmetric row of taps that depends on one number. Hashable."""

    @property
    def is_bound(self) -> bool: ...

    @property
    def zero_taps(self) -> int: ...

    def taps(self, radius_pix: Float[Array, ""]) -> Float[Array, " taps"]: ...

    def derivative(self) -> "Kernel": ...


# The kernels of one output image, an axis each: y and x, or y alone.
Kernels = tuple[Kernel, ...]

# What lies beyond an edge: the edge again, or nothing. "folded" is the adjoint of
# "repeated"; "empty" is its own.
Edges = Literal["repeated", "folded", "empty"]

# The pieces: lines of a strip, and columns of what is filtered together along time. Halos
# of products are wider, and so are their strips. But what is larger than 1 MB, XLA copies
# in another thread, where it then goes on: calls in several threads would wait for it.
_STRIP_LINES = 32
_BANDED_STRIP_BYTES = 2**20
_COURSES = 256
# Along y a line is read again for each tap. Where the lines under the taps do not fit into
# the nearest cache, a strip goes along y in blocks of columns that do. As many lines as the
# cache has ways are read side by side without that, however long they are.
_COLUMNS = 128
_BANDED_COLUMNS = 256
_L1_BYTES, _L1_WAYS = 2**15, 8


def filter_in_pieces(
    frames,
    radii,
    outputs,
    *,
    kernels,
    edges,
    is_finite,
    weights=None,
    factor=None,
    spent=None,
    is_exported=False,
):
    """The images of the outputs.

    With weights, the first of them are added up. With a factor, they are the sums of the
    products with it, but for the image of `kernels`, the last. Where there is one image, it
    may be written over a spent one, for which there is no further use. A program that is
    exported makes no calls that a later version might refuse.
    """
    *batch, height, width = frames.shape
    stack = frames.reshape((math.prod(batch), height, width))
    rows = _all_rows((kernels, *outputs), radii, (height, width), edges, _MOST_PIECES)
    is_temporal = len(radii) == 1
    is_banded = any(row.bands is not None for row in rows.values())
    strip_bytes = _BANDED_STRIP_BYTES if is_banded else 0
    strip_lines = max(_STRIP_LINES, strip_bytes // (width * radii[0].dtype.itemsize))
    lines = height if is_temporal else min(strip_lines, height)
    columns = min(_COURSES, width) if is_temporal else width
    must_spread = not is_finite and _must_spread(frames, rows)
    strip_count, block_count = -(-height // lines), -(-width // columns)
    multiplied = [] if factor is None else without(kernels, outputs)
    image_count = len(outputs) - len(multiplied)
    if weights:
        image_count -= len(weights) - 1
    factors = stack if factor is None else factor.reshape(stack.shape)

    def add_products(sums, images, index, strip, start, block, left):
        """Of pixels that no strip or block before has had."""
        near = lax.dynamic_slice(factors, (index, start, left), (1, lines, columns))[0]
        near = near.astype(images[0].dtype)
        if edges == "folded":
            # Whatever the level, the products with it add up to nothing but rounding.
            near -= factors[index, 0, 0].astype(near.dtype)
        is_new = (start + jnp.arange(lines) >= strip * lines)[:, None]
        if columns < width:
            is_new &= left + jnp.arange(columns) >= block * columns
        near = jnp.where(is_new, near, 0)
        return [total + near * image for total, image in zip(sums, images, strict=True)]

    def filter_block(images_and_sums, number):
        images, sums = images_and_sums
        index, block = number // block_count, number % block_count
        # The last block overlaps the one before, as the last strip does. Whole lines are
        # copied far faster where it is known that they are.
        left = 0 if columns == width else jnp.minimum(block * columns, width - columns)

        def lines_from(start, count, index=index):
            return lax.dynamic_slice(stack, (index, start, left), (1, count, columns))[0]

        def filter_strip(strip, carry):
            images, sums, zeros = carry
            start = jnp.minimum(strip * lines, height - lines)
            if must_spread:
                zeros += _zeros_of(lambda first, n: lines_from(start + first, n), lines)
            if lines == height:
                frame = lines_from(0, height)
                finite = _finite(frame) if must_spread else frame
                filter_y = ft.partial(_filter_axis, finite, edges=edges, axis=-2)
            else:
                filter_y = ft.partial(
                    _filter_strip,
                    stack,
                    edges=edges,
                    index=index,
                    start=start,
                    count=lines,
                    must_clean=must_spread,
                )
            filtered = _filter_axes(filter_y, rows, outputs, edges)
            if weights:
                filtered = weighted(filtered, weights)
            products, kept = filtered[: len(multiplied)], filtered[len(multiplied) :]
            images = [
                lax.dynamic_update_slice(image, new[None], (index, start, left))
                for image, new in zip(images, kept, strict=True)
            ]
            if products:
                sums = add_products(sums, products, index, strip, start, block, left)
            return images, sums, zeros

        def add_spread(turn, images):
            # The turn is 0. What depends on it is not moved out of the loop, where it would
            # be made for every frame.
            pixels = lines_from(0, height, index + turn)
            if len(stack) == 1:
                # Here XLA knows the index.
                pixels, _ = lax.optimization_barrier((pixels, turn))
            spread = _spread(pixels, rows, kernels, in_loop=True)
            corner = (index, 0, left)
            shape = (1, *spread.shape)
            return [
                lax.dynamic_update_slice(
                    image, lax.dynamic_slice(image, corner, shape) + spread, corner
                )
                for image in images
            ]

        zeros = jnp.zeros_like(_zeros_of(lines_from, lines))
        carry = images, sums, zeros
        images, sums, zeros = lax.fori_loop(0, strip_count, filter_strip, carry)
        if must_spread:
            is_finite = jnp.all(jnp.isfinite(zeros))
            sums = [jnp.where(is_finite, each, jnp.nan) for each in sums]
            # A loop of one turn or none leaves the images where they are.
            turns = 1 - is_finite.astype(int)
            images = lax.fori_loop(0, turns, add_spread, images)
        return (images, sums), None

    if spent is not None:
        images = [spent.reshape(stack.shape)]
    else:
        image = _filled if is_exported or not stack.size else _unwritten
        images = [image(stack, radii, number) for number in range(image_count)]
    # A sum for each pixel of a strip: XLA's own over pixels are slow, and less exact.
    sums = [jnp.zeros_like(stack, radii[0].dtype, shape=(lines, columns))] * len(multiplied)
    if frames.size:
        blocks = jnp.arange(len(stack) * block_count)
        (images, sums), _ = lax.scan(filter_block, (images, sums), blocks)
    return [
        *(jnp.sum(each) for each in sums),
        *(image.reshape(frames.shape) for image in images),
    ]


def _filled(stack, radii, number):
    # Of a number of its own, or XLA would make one image of several and copy it.
    return jnp.full_like(stack, number, radii[0].dtype)


def _unwritten(stack, radii, number):
    """An image for a loop to write to, whose pixels are whatever was in its memory.

    Otherwise XLA writes each pixel before the loop does, which takes as long as to filter
    with few taps. On CPU it has no call of its own that does not. One that JAX keeps stable
    is LAPACK's solution of triangular equations: if there are none, it writes none.
    """
    if not _can_be_unwritten():
        return _filled(stack, radii, number)
    dtype = radii[0].dtype
    # LAPACK reads no number where there are no equations. But by this one XLA takes each
    # call for another, for each image and in each turn of a loop, and makes no copies.
    mark = number + stack[0, 0, 0].astype(dtype) + sum(radii)
    image = _solution_of_no_equations(mark, stack.shape)
    # Under `shard_map`, it is each device's own, as the stack is. Compiled, nothing is
    # added.
    return image + jnp.zeros_like(stack, dtype, shape=())


def _solution_of_no_equations(mark, shape):
    left, lower, as_it_is = (np.uint8(ord(letter)) for letter in "LLN")
    return jax.ffi.ffi_call(
        {"float32": "lapack_strsm_ffi", "float64": "lapack_dtrsm_ffi"}[mark.dtype.name],
        jax.ShapeDtypeStruct(shape, mark.dtype),
    )(
        mark.reshape(1, 1),
        jnp.zeros((0, 1, 1), mark.dtype),
        side=left,
        uplo=lower,
        trans_x=as_it_is,
        diag=as_it_is,
    )


@ft.cache
def _can_be_unwritten():
    """Whether LAPACK gives an image of any size for no equations, which that of a later
    version may refuse."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.ensure_compile_time_eval(), jax.default_device(cpu):
            solve = jax.jit(lambda: _solution_of_no_equations(jnp.float32(0), (3,)))
            solve().block_until_ready()
    except RuntimeError:
        return False
    return True


def without(kernels, outputs):
    return [each for each in outputs if each != kernels]


def weighted(images, weights):
    """The sum of as many images as there are weights, and the others."""
    terms = [weight * image for weight, image in zip(weights, images, strict=False)]
    return [ft.reduce(jnp.add, terms), *images[len(weights) :]]


def filter_at_once(frames, radii, outputs, *, edges, is_finite):
    rows = _all_rows(outputs, radii, frames.shape[-2:], edges)

    def filter_finite(frames):
        filter_y = ft.partial(_filter_axis, frames, edges=edges, axis=-2)
        return _filter_axes(filter_y, rows, outputs, edges)

    if is_finite or not _must_spread(frames, rows):
        return filter_finite(frames)

    def filter_rest():
        spread = _spread(frames, rows, outputs[0], in_loop=False)
        return [image + spread for image in filter_finite(_finite(frames))]

    is_finite = jnp.all(jnp.isfinite(frames))
    return lax.cond(is_finite, lambda: filter_finite(frames), filter_rest)


class _Row(NamedTuple):
    """A kernel's taps from the centre outwards, and what is made of them for an axis."""

    all_taps: Array
    taps: Array
    bands: Array | None
    most_pieces: float  # of a product that are written out


def _row(all_taps, size, is_temporal, edges, most_pieces) -> _Row:
    """A tap that reaches across the whole axis reads an edge pixel, whatever its distance:
    in a kernel that is wider, the last of these takes the weight of all beyond."""
    reach = min(all_taps.size, size) - 1
    taps = all_taps[: reach + 1]
    if edges != "empty":
        beyond = jnp.sum(all_taps[reach + 1 :])
        # Of the centre there is one, of every other tap there are two.
        taps = taps.at[reach].add(beyond if reach else 2 * beyond)
    most_taps = _MOST_TAPS if size <= 512 else _MOST_TAPS_OF_LONG_AXES
    # In a product, the order of a sum depends on where in the axis a pixel lies.
    is_banded = taps.size > most_taps and not is_temporal
    return _Row(all_taps, taps, _bands(taps) if is_banded else None, most_pieces)


def halo_lines(half_width) -> int | None:
    """The lines above and below a strip of a frame without which it is not filtered to the
    same bit, or None where the engine depends on how many there are."""
    return half_width if half_width < _MOST_TAPS else None


def _all_rows(
    outputs, radii, shape, edges, most_pieces=math.inf
) -> dict[tuple[int, Kernel], _Row]:
    # Each once, though outputs share kernels.
    needed = {
        (axis, kernel): len(kernels) == 1
        for kernels in outputs
        for axis, kernel in enumerate(kernels)
    }
    return {
        (axis, kernel): _row(
            kernel.taps(radii[axis]), shape[axis], is_temporal, edges, most_pieces
        )
        for (axis, kernel), is_temporal in needed.items()
    }


def _filter_axes(filter_y, rows, outputs, edges):
    """Filters along y, then x if it has a kernel. Images with the same kernel along y share
    that pass, and those of one pass are filtered together."""
    wanted: dict[Kernel, list[Kernel]] = {}
    for first, *others in outputs:
        wanted.setdefault(first, []).extend(others)
    filtered = filter_y([rows[0, first] for first in wanted])
    images = {}
    for (first, others), image in zip(wanted.items(), filtered, strict=True):
        images[first,] = image
        if others:
            lines = _filter_axis(image, [rows[1, other] for other in others], edges, -1)
            images |= {
                (first, other): line for other, line in zip(others, lines, strict=True)
            }
    return [images[kernels] for kernels in outputs]


def _filter_strip(stack, rows, edges, index, start, count, must_clean):
    """The lines from `start` of a frame filtered along y, by each row."""
    (_, height, width), dtype = stack.shape, rows[0].taps.dtype
    half_width = rows[0].taps.size - 1
    lines = start - half_width + jnp.arange(count + 2 * half_width)
    inside = jnp.clip(lines, 0, height - 1)

    def pixels_of(numbers, left=0, columns=width):
        def pixels(line):
            return lax.dynamic_slice(stack, (index, line, left), (1, 1, columns))[0, 0]

        read = jax.vmap(pixels)(numbers).astype(dtype)
        return _finite(read) if must_clean else read

    def filter_columns(left, columns):
        padded = pixels_of(inside, left, columns)
        if edges != "repeated":
            is_inside = (lines >= 0) & (lines < height)
            padded = jnp.where(is_inside[:, None], padded, 0)
        return _correlate(lax.optimization_barrier(padded), rows, count, axis=-2)

    is_banded = rows[0].bands is not None
    columns = min(_BANDED_COLUMNS if is_banded else _COLUMNS, width)

    def filter_block(block, images):
        # The last one overlaps the one before.
        left = jnp.minimum(block * columns, width - columns)
        return [
            lax.dynamic_update_slice(image, new, (0, left))
            for image, new in zip(images, filter_columns(left, columns), strict=True)
        ]

    line_count = 2 * half_width + 1
    is_near = line_count <= _L1_WAYS or line_count * width * dtype.itemsize <= _L1_BYTES
    if columns == width or (is_near and not is_banded):
        images = filter_columns(0, width)
    else:
        # Under `shard_map`, they are each device's own, as the stack is.
        shape = count, width
        images = [jnp.full_like(stack, row, dtype, shape) for row in range(len(rows))]
        images = lax.fori_loop(0, -(-width // columns), filter_block, images)
    if edges != "folded":
        return images
    first = pixels_of(jnp.arange(half_width))
    last = pixels_of(height - half_width + jnp.arange(half_width))
    return [
        _fold_edges(image, first, last, row.taps, -2, start, height)
        for image, row in zip(images, rows, strict=True)
    ]


def _filter_axis(image, rows, edges, axis):
    """The image filtered along the axis, by each row."""
    image = image.astype(rows[0].taps.dtype)
    half_width, size = rows[0].taps.size - 1, image.shape[axis]
    first = lax.slice_in_dim(image, 0, half_width, axis=axis)
    last = lax.slice_in_dim(image, size - half_width, size, axis=axis)
    if edges == "repeated":
        padded = _pad(image, (half_width, half_width), axis, "edge")
    else:
        # On CPU this copies lines, where a constant pad asks at each pixel.
        beyond = jnp.zeros_like(first)
        padded = jnp.concatenate([beyond, image, beyond], axis)
    padded = lax.optimization_barrier(padded)
    filtered = _correlate(padded, rows, size, axis)
    if edges != "folded":
        return filtered
    return [
        _fold_edges(one, first, last, row.taps, axis, 0, size)
        for one, row in zip(filtered, rows, strict=True)
    ]


def _pad(image, widths, axis, mode="constant"):
    all_widths = [(0, 0)] * image.ndim
    all_widths[axis] = widths
    return jnp.pad(image, all_widths, mode)


def _fold_edges(filtered, first, last, taps, axis, start, size):
    """Adds to the edge pixels what their copies beyond the edge would have received.

    `filtered` holds the pixels from `start` along an axis of this size, `first` and `last`
    what was filtered, as far from the edges as the taps reach.
    """
    # The weight with which the pixel at a distance from the edge reads beyond it.
    beyond = (jnp.sum(taps) - jnp.cumsum(taps))[:-1]
    positions = _along(start + jnp.arange(filtered.shape[axis]), axis)
    for edge, near, weights in ((0, first, beyond), (size - 1, last, beyond[::-1])):
        folded = jnp.sum(near * _along(weights, axis), axis=axis, keepdims=True)
        filtered = filtered + jnp.where(positions == edge, folded, 0)
    return filtered


def _along(row, axis):
    return row[:, None] if axis == -2 else row


# Engines: ways to correlate `padded` with a row, giving `count` pixels along the axis.

# The most taps, the centre and one side, for which shifted slices are the faster, as found
# with jax 0.12 on a Zen 5 machine; along long axes the products are slower.
_MOST_TAPS = 28
_MOST_TAPS_OF_LONG_AXES = 48
# The most taps on one side that are written out, as all in space are. Of more, in time,
# groups go through a loop: it costs half as much again, but a long program compiles long.
_MOST_SHIFTS, _SHIFT_GROUP = _MOST_TAPS_OF_LONG_AXES - 1, 16
_BAND_PIXELS = 64  # what one product of the banded engine gives
# Of more, the products go through a loop on CPU: written out, they take long to compile.
_MOST_PIECES = 4


def _correlate(padded, rows, count, axis):
    """An image for each row; rows of one axis have as many taps."""
    if rows[0].bands is not None:
        return [_banded_products(padded, row, count, axis) for row in rows]
    images = []
    for first in range(0, len(rows), 2):
        taps = [row.taps for row in rows[first : first + 2]]
        total = _sum_of_shifts(padded, taps, count, axis)
        if len(taps) == 2:
            total = lax.optimization_barrier(total)
            images += [jnp.real(total), jnp.imag(total)]
        else:
            images.append(lax.optimization_barrier(total) if axis == -2 else total)
    return images


def _sum_of_shifts(padded, rows, count, axis):
    """Those of two rows are the real and the imaginary part of one image: XLA's programs on
    CPU have one result each, and so both are made from the same loads."""
    centre = rows[0].size - 1
    grouped = centre // _SHIFT_GROUP * _SHIFT_GROUP if centre > _MOST_SHIFTS else 0

    def joined(terms):
        return lax.complex(*terms) if len(terms) == 2 else terms[0]

    def pairs(left, right, rows):
        # From the outside in, small terms first. A tap serves both of its sides.
        totals = [0] * len(rows)
        for start in range(rows[0].size - 1, -1, -1):
            index = rows[0].size - 1 - start
            outer = lax.slice_in_dim(left, index, index + count, axis=axis)
            inner = lax.slice_in_dim(right, start, start + count, axis=axis)
            both = outer + inner
            totals = [
                total + taps[start] * both for total, taps in zip(totals, rows, strict=True)
            ]
        return joined(totals)

    def add_group(group, total):
        first, size = group * _SHIFT_GROUP, count + _SHIFT_GROUP - 1
        nearest = centre - first - _SHIFT_GROUP + 1
        left = lax.dynamic_slice_in_dim(padded, first, size, axis)
        right = lax.dynamic_slice_in_dim(padded, centre + nearest, size, axis)
        near = [lax.dynamic_slice_in_dim(taps, nearest, _SHIFT_GROUP) for taps in rows]
        return total + pairs(left, right, near)

    middle = lax.slice_in_dim(padded, centre, centre + count, axis=axis)
    middle = joined([taps[0] * middle for taps in rows])
    total = 0
    if grouped:
        total = lax.fori_loop(0, grouped // _SHIFT_GROUP, add_group, jnp.zeros_like(middle))
    left = lax.slice_in_dim(padded, grouped, max(centre - 1, grouped) + count, axis=axis)
    right = lax.slice_in_dim(
        padded,
        min(centre + 1, 2 * centre - grouped),
        2 * centre - grouped + count,
        axis=axis,
    )
    near = [taps[1 : centre - grouped + 1] for taps in rows]
    return total + (pairs(left, right, near) if near[0].size else 0) + middle


def _bands(taps):
    """The matrices that make `_BAND_PIXELS` pixels from a piece of an axis.

    The banded matrix of a symmetric kernel is the same upside down and back to front.
    So the sum and the difference of a piece and its mirror image each have a product of
    their own, with half of the rows and half of the columns.
    """
    half_width = taps.size - 1
    half = _BAND_PIXELS // 2 + half_width
    distance = jnp.arange(2 * half) - half_width - jnp.arange(_BAND_PIXELS // 2)[:, None]
    distance = jnp.abs(distance)
    band = jnp.where(distance <= half_width, taps[jnp.minimum(distance, half_width)], 0)
    first, last = band[:, :half], band[:, : half - 1 : -1]
    return jnp.stack([first + last, first - last]) / 2


def _banded_products(padded, row, count, axis):
    """Costs nearly the same for any number of taps."""
    half, wanted = row.bands.shape[-1], count
    count = max(wanted, _BAND_PIXELS)
    padded = _pad(padded, (0, count - wanted), axis)

    def multiply(matrix, piece):
        left, right = (matrix, piece) if axis == -2 else (piece, matrix.T)
        return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)

    def pixels(start):
        first = lax.dynamic_slice_in_dim(padded, start, half, axis)
        last = jnp.flip(lax.dynamic_slice_in_dim(padded, start + half, half, axis), axis)
        # The barriers keep XLA from fusing these with the products, and losing time.
        folded = lax.optimization_barrier((first + last, first - last))
        even, odd = lax.optimization_barrier(tuple(map(multiply, row.bands, folded)))
        return lax.optimization_barrier((even + odd, jnp.flip(even - odd, axis)))

    def add_piece(piece, image):
        # The last piece overlaps the one before.
        start = jnp.minimum(piece * _BAND_PIXELS, count - _BAND_PIXELS)
        for index, half_piece in enumerate(pixels(start)):
            corner = start + index * _BAND_PIXELS // 2
            image = lax.dynamic_update_slice_in_dim(image, half_piece, corner, axis)
        return image

    piece_count = -(-count // _BAND_PIXELS)
    if piece_count > row.most_pieces:
        image = lax.slice_in_dim(jnp.zeros_like(padded), 0, count, axis=axis)
        image = lax.fori_loop(0, piece_count, add_piece, image)
    else:
        starts = [*range(0, count - _BAND_PIXELS, _BAND_PIXELS), count - _BAND_PIXELS]
        pieces = [piece for start in starts[:-1] for piece in pixels(start)]
        last = jnp.concatenate(pixels(starts[-1]), axis=axis)
        known = (piece_count - 1) * _BAND_PIXELS - starts[-1]
        pieces.append(lax.slice_in_dim(last, known, _BAND_PIXELS, axis=axis))
        image = jnp.concatenate(pieces, axis=axis)
    return lax.slice_in_dim(image, 0, wanted, axis=axis)


def _finite(image):
    return jnp.where(jnp.isfinite(image), image, 0)


def zeros_of(images):
    """Zeros, and NaN where one of eight lines is not finite. On CPU this is quick, while
    XLA's own sums over all pixels take as long as the filter."""

    def lines_from(first, count):
        return lax.slice_in_dim(images, first, first + count, axis=-2)

    return _zeros_of(lines_from, images.shape[-2])


def _zeros_of(lines_from, height):
    count = -(-height // 8)
    # Each read by itself, since parts of what is read at once are slower in a loop. They
    # may overlap.
    firsts = [min(first, height - count) for first in range(0, 8 * count, count)]
    return sum(lines_from(first, count) * 0 for first in firsts)


def _must_spread(frames, rows) -> bool:
    """Whether what is not finite would reach more than the pixels it should: a product
    spreads it over lines of pixels, and a zero tap times infinity is a NaN."""
    return jnp.issubdtype(frames.dtype, jnp.floating) and any(
        kernel.is_bound or row.bands is not None for (_, kernel), row in rows.items()
    )


# What is not finite, as flags, so that several are together in one number.
_UP, _DOWN, _NAN = 1, 2, 4


def _spread(frames, rows, kernels, *, in_loop):
    """NaN or infinity where the kernels cover one, and zero elsewhere. What is not finite
    in an image is not finite in its derivatives: they all get the same.

    On CPU a loop takes less memory than what is written out; GPU and TPU do without loops.
    """
    infinite = jnp.where(frames > 0, _UP, _DOWN)
    flags = jnp.where(jnp.isnan(frames), _NAN, jnp.where(jnp.isinf(frames), infinite, 0))
    flags = flags.astype(jnp.uint8)
    # Infinities of one sign, under taps of one sign, add up to infinity.
    has_one_sign = True
    flags_between = ft.partial(_flags_between, in_loop=in_loop)
    for axis, kernel in enumerate(kernels):
        taps = rows[axis, kernel].all_taps
        most = taps.size - 1
        if kernel.is_bound:
            # To the last that is not zero: nearer ones may be zero, too.
            distance = jnp.max(jnp.where(taps != 0, jnp.arange(taps.size), 0))
        else:
            distance = jnp.asarray(most - kernel.zero_taps)
        near = flags_between(flags, -distance, distance, most, axis - 2)
        if kernel.zero_taps:
            # Zero times infinity is not a number.
            before = flags_between(flags, -most, -distance - 1, most, axis - 2)
            after = flags_between(flags, distance + 1, most, most, axis - 2)
            near |= jnp.where(before | after, jnp.uint8(_NAN), 0)
        flags = near
        has_one_sign &= jnp.all(taps >= 0)
    infinite = jnp.where(flags == _UP, jnp.inf, -jnp.inf)
    is_infinite = has_one_sign & ((flags == _UP) | (flags == _DOWN))
    spread = jnp.where(is_infinite, infinite, jnp.nan)
    return jnp.where(flags == 0, 0, spread).astype(frames.dtype)


def _flags_between(flags, first, last, most, axis, *, in_loop):
    """All flags of the pixels that lie from `first` to `last` beyond each, edges repeated.
    Neither is farther than `most`."""
    size = flags.shape[axis]
    # All that lies farther away than this is the edge.
    most = min(most, size)
    first, last = (jnp.clip(distance, -most, most) for distance in (first, last))
    count, doublings = last - first + 1, (2 * most + 1).bit_length() - 1
    near = jnp.where(count > 0, _pad(flags, (most, most), axis, "edge"), 0)
    length = near.shape[axis]

    # Of 1, 2, 4, ... pixels each, until two of them cover all; they may overlap.
    def double(number, near):
        beyond = _pad(near, (0, 2**doublings // 2), axis)
        both = near | lax.dynamic_slice_in_dim(beyond, 1 << number, length, axis)
        # In this order, no more than two of them are kept.
        return lax.optimization_barrier(jnp.where(2 << number <= count, both, near))

    near = lax.fori_loop(0, doublings, double, near, unroll=not in_loop)
    width = 1 << jnp.sum(2 << jnp.arange(doublings) <= count)
    start, stop = most + first, most + last + 1
    left = lax.dynamic_slice_in_dim(near, start, size, axis)
    right = lax.dynamic_slice_in_dim(near, stop - width, size, axis)
    return left | right

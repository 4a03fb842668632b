"""Coarse patterns of light, learned from frames: what one light for each frame, and slow
changes, do not explain."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from .._filter.kernels import GaussianKernel, half_width
from .._filter.primitive import temporal_filter
from .block_sums import halved_frames, zero_uncounted
from .channels import working_dtype
from .checks import is_traced, real_array
from .smoothing import halve_size, ratio, root


# Patterns consist of squares of 16 pixels, or of twice that and so on in larger frames, so
# that there are at most so many along an axis.
_SQUARE_HALVINGS, _MOST_SQUARES = 4, 32
# The radius in frames of what is slow.
_SLOW_FRAMES = 30.0
# More patterns than this, counted by "auto", are a background that moves.
_MOST_PATTERNS = 4
# A pattern that stands out by less costs more than it saves.
_MARGIN = 1.6
# Only the ratios of a pattern's numbers matter.
_LARGEST = 2**15 - 1

_Squares = Float[Array, "*runs frames rows columns"]


def coarse(
    images: Float[Array, "*batch half_height half_width"], size: tuple[int, int]
) -> Float[Array, "*batch rows columns"]:
    """The means over squares of frames of this size, from those of half the size."""
    for _ in range(_halvings(size) - 1):
        images = halve_size(images)
    return images


def _halvings(size: tuple[int, int]) -> int:
    squares = max(size) / 2**_SQUARE_HALVINGS / _MOST_SQUARES
    return _SQUARE_HALVINGS + max(0, math.ceil(math.log2(squares)))


@ft.partial(jax.jit, static_argnames="skips_nan")
def square_levels(
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
    skips_nan: bool,
) -> Float[Array, "*batch rows columns"]:
    """The light in each square, with little of that of molecules: the mean over 16 x 16
    pixels of medians of pixels of twice the size. Zero where no pixel counts."""
    dtype, size = working_dtype(frames), (frames.shape[-2], frames.shape[-1])
    edge = 2 ** (_SQUARE_HALVINGS - 1)

    def of_frame(arguments: tuple[Any, Any]) -> Float[Array, "rows columns"]:
        frames, weights = jax.tree.map(lambda image: image[None, None], arguments)
        small, counts = halved_frames(*zero_uncounted(frames, weights, skips_nan, dtype))
        small = small if counts is None else jnp.where(counts > 0, small, jnp.nan)
        small = small[0, 0]
        ends = [(0, -length % edge) for length in small.shape]
        small = jnp.pad(small, ends, constant_values=jnp.nan)
        rows, columns = (length // edge for length in small.shape)
        medians = jnp.nanmedian(small.reshape(rows, edge, columns, edge), (1, 3))
        is_seen = jnp.isfinite(medians).astype(dtype)
        medians = jnp.where(is_seen > 0, medians, 0)
        for _ in range(_halvings(size) - _SQUARE_HALVINGS):
            medians, is_seen = halve_size(medians), halve_size(is_seen)
        return ratio(medians, is_seen)

    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(dtype), frames.shape)
    stacks = jax.tree.map(lambda a: a.reshape(-1, *size), (frames, weights))
    # Some frames at a time, since sorting takes memory.
    levels = lax.map(of_frame, stacks, batch_size=16)
    return levels.reshape(*frames.shape[:-2], *levels.shape[1:])


@ft.partial(jax.jit, static_argnames="rank")
def patterns_of(
    squares: Float[Array, "runs frames rows columns"], rank: int
) -> tuple[Int[Array, "rank rows columns"], Float[Array, " others"]]:
    """Patterns of runs of frames: the mean light, and the principal components of what that
    and its slow changes leave; and the singular value of each of these, as a multiple of
    the median of those that are not larger."""
    kernel = GaussianKernel(half_width(_SLOW_FRAMES, "smooth"), "smooth")
    light = jnp.maximum(jnp.mean(squares, (-2, -1), keepdims=True), 0)

    def smooth(images: _Squares) -> _Squares:
        radius = jnp.asarray(_SLOW_FRAMES, images.dtype)
        return temporal_filter(images, radius, kernel, "empty", is_finite=True)

    left = squares - light * ratio(smooth(squares), smooth(light))
    profile = ratio(jnp.sum(squares, (0, 1)), jnp.sum(light, (0, 1)))
    # The noise of light is as the root of its mean, but not zero in the dark, and a square
    # has its own.
    growth = root(jnp.maximum(light, jnp.mean(light) / 10))
    left = ratio(left, growth).reshape(-1, profile.size)

    def next_pattern(left: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
        noise = jnp.median(jnp.abs(left), 0)
        white = ratio(left, noise)
        squared, vectors = jnp.linalg.eigh(white.T @ white)
        vector = vectors[:, -1]
        # The values ascend. Squares without light, and patterns found before, have none.
        count = jnp.minimum(len(white), jnp.sum(noise > 0)) - number
        median = squared[-1 - jnp.maximum(count, 1) // 2]
        multiple = root(ratio(squared[-1], median))
        left = (white - jnp.outer(white @ vector, vector)) * noise
        return left, ((vector * noise).reshape(profile.shape), multiple)

    if rank == 1:
        return _whole(profile[None]), jnp.zeros(0, squares.dtype)
    # In a loop, since an `eigh` takes a second to compile.
    _, (others, multiples) = lax.scan(next_pattern, left, jnp.arange(rank - 1))
    return _whole(jnp.concatenate([profile[None], others])), multiples


def learned_patterns(
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
    rank: Any,
    skips_nan: bool,
    illumination: Any = None,
) -> Int[Array, "rank rows columns"]:
    """So many patterns, or with "auto" as many as are above the noise; or those that fit a
    known illumination (rank, frames)."""
    if is_traced(frames):
        raise ValueError(
            "Patterns are learned from known frames, but these are traced; call "
            "estimator.with_patterns(frames) outside of jax.jit first, and use its result."
        )
    check_squares(frames.shape, rank)
    squares = square_levels(frames, weights, skips_nan)
    squares = squares.reshape(-1, *(1, *squares.shape)[-3:])
    if illumination is not None:
        return _patterns_of_light(squares[0], illumination, rank)
    return chosen_patterns(squares, rank)


def chosen_patterns(
    squares: Float[Array, "runs frames rows columns"], rank: Any
) -> Int[Array, "rank rows columns"]:
    """So many, or those of which the singular value, in a matrix of frames and squares, is
    above the noise (Gavish and Donoho, IEEE Trans. Inf. Theory 60, 5040, 2014, eq. 11)."""
    # As many patterns as squares would explain all.
    most = max(1, min(_MOST_PATTERNS, squares[0, 0].size - 1))
    patterns, multiples = patterns_of(squares, most if rank == "auto" else rank)
    if rank == "auto":
        sizes = squares[..., 0, 0].size, int(jnp.count_nonzero(patterns[0]))
        aspect = min(sizes) / max(sizes)
        factor = ((0.56 * aspect - 0.95) * aspect + 1.82) * aspect + 1.43
        is_noise = np.append(np.asarray(multiples) < _MARGIN * factor, True)
        patterns = patterns[: 1 + np.argmax(is_noise)]
    return patterns


def _patterns_of_light(
    squares: Float[Array, "frames rows columns"], illumination: Any, rank: Any
) -> Int[Array, "rank rows columns"]:
    light = real_array("illumination", illumination, minimum=-math.inf)
    if light.ndim != 2 or light.shape[1] != len(squares):
        rule = f"illumination must have shape (rank, frames), with {len(squares)} frames"
        raise ValueError(f"{rule}, but has {light.shape}.")
    if not 1 <= np.linalg.matrix_rank(light) == len(light) <= _MOST_PATTERNS:
        raise ValueError(
            f"illumination has {len(light)} rows; give 1 to {_MOST_PATTERNS}, of which "
            "none is a sum of the others."
        )
    if rank not in ("auto", len(light)):
        raise ValueError(
            f"illumination has {len(light)} patterns, but illumination_rank is {rank}; "
            "give the same number."
        )
    of_frames = np.asarray(squares, np.float64).reshape(len(squares), -1)
    patterns, *_ = np.linalg.lstsq(light.T, of_frames)
    return _whole(jnp.asarray(patterns.reshape(-1, *squares.shape[1:]), squares.dtype))


def checked_patterns(
    patterns: Any, rank: Any
) -> tuple[Int[Array, "rank rows columns"], ...] | None:
    """Those of each channel."""
    if patterns is None:
        return None
    of_each = tuple(patterns) if isinstance(patterns, list | tuple) else (patterns,)
    if not of_each:
        raise ValueError("patterns is empty; give None, or what with_patterns learns.")
    for of_one in of_each:
        is_whole = np.asarray(of_one).dtype.kind in "iu" if not is_traced(of_one) else True
        is_fitting = np.ndim(of_one) == 3 and 0 not in np.shape(of_one)
        if not is_whole or not is_fitting or rank not in ("auto", len(of_one)):
            raise ValueError(
                f"patterns must be whole numbers (rank, rows, columns), with {rank} as "
                "rank, or a sequence with these for each channel: see with_patterns; but "
                f"there is an array of {np.asarray(of_one).dtype} of shape "
                f"{np.shape(of_one)}."
            )
    return tuple(map(jnp.asarray, of_each))


def check_squares(shape: tuple[int, ...], rank: Any, patterns: Any = None) -> None:
    """Raises `ValueError` unless frames of this shape have the squares of the patterns, and
    enough to tell them apart."""
    size = shape[-2], shape[-1]
    squares = tuple(-(-pixels // 2 ** _halvings(size)) for pixels in size)
    if rank != "auto" and rank >= math.prod(squares) and rank > 1:
        raise ValueError(
            f"Of frames of shape {shape}, {rank} patterns cannot be told from "
            f"{math.prod(squares)} squares of them, of 16 x 16 px or more; give larger "
            "frames, or illumination_rank=1."
        )
    if patterns is not None and patterns.shape[1:] != squares:
        raise ValueError(
            f"The patterns have {patterns.shape[1:]} rows and columns, but frames of shape "
            f"{shape} have {squares}; learn them from such frames, with_patterns(frames)."
        )


def _whole(patterns: Float[Array, "rank rows columns"]) -> Int[Array, "rank rows columns"]:
    scale = jnp.max(jnp.abs(patterns), (-2, -1), keepdims=True)
    return jnp.round(_LARGEST * ratio(patterns, scale)).astype(jnp.int16)

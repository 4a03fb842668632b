"""Sums of frames over blocks of time, for several patterns of light; see `patterns`."""

import functools as ft
import itertools as it
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from .block_sums import (
    Around,
    around_pixels,
    bad_blocks,
    halved_frames,
    molecule_taps,
    noise_squares,
    ROUNDING,
    squares_below,
    sum_around,
    sum_frames,
    zero_uncounted,
)
from .coarse_patterns import coarse
from .smoothing import double_size, ratio, root
from .soft_clip import SoftClip


# Of the light of a pattern around a pixel, what is added so that patterns that hardly
# differ there are shared out evenly.
_RIDGE = 1e-5

_Blocks = Float[Array, "blocks frames _height _width"]
_Images = Float[Array, "blocks _height _width"]
_Light = Float[Array, "blocks frames"]


class MixtureSums(NamedTuple):
    """Of each block, or of each of its frames.

    **Attributes:**

    - `sums`: of `w a_i f / |a|`, one for each pattern.
    - `totals`: of `w a_i a_j / |a|`, one for each pair of patterns.
    - `counts`: of the weights w.
    - `squares`, `square_totals`: sums of squares, and of what they are the squares of.
    - `light`: of each frame.
    """

    sums: list[_Images]
    totals: list[_Images]
    counts: _Images
    squares: _Images
    square_totals: _Images
    light: list[_Light]


def first_sums(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    is_frame: Bool[Array, "blocks frames"],
    *,
    patterns: Sequence[Int[Array, "rows columns"]],
    skips_nan: bool,
    dtype: Any,
) -> tuple[MixtureSums, Bool[Array, " blocks"]]:
    """The sums at half size with the light by the coarse patterns, and the squared noise of
    the first frame of each block; and whether a pixel that counts is not finite."""
    is_bad = bad_blocks(frames, weights, skips_nan)
    frames, weights = zero_uncounted(frames, weights, skips_nan, dtype)
    small, small_weights = halved_frames(frames, weights)
    if small_weights is None:
        small_weights = jnp.ones_like(small)
    squares, square_totals = noise_squares(small, weights, jnp.maximum(small[:, 0], 0))
    size = (frames.shape[-2], frames.shape[-1])
    received, counts = coarse(small * small_weights, size), coarse(small_weights, size)
    floats = [pattern.astype(dtype)[None, None] for pattern in patterns]
    # Each pattern has a mean square of 1, so that its light is in the unit of the frames.
    basis = [ratio(pattern, root(jnp.mean(pattern**2))) for pattern in floats]
    light = [a * is_frame for a in _fit_light(basis, received, counts)]
    sums = _block_sums(light, small, small_weights)
    return MixtureSums(*sums, squares, square_totals, light), is_bad


def clipped_sums(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    light: list[_Light],
    rates: list[_Images],
    deviations: _Images,
    *,
    clip: SoftClip | None,
    around_all: Around | None,
    is_last: bool,
    skips_nan: bool,
) -> MixtureSums:
    """The sums in which pixels are clipped by the background of the round before, with the
    squared deviations below it; of full size in the last round, else of half the size.

    **Arguments:**

    - `light`, `rates`: the background is the sum of their products. Rates are of half size.
    - `deviations`: of a pixel of half the size, by the root of its background.
    - `around_all`: what there is around a pixel where all pixels count.
    """
    frames, weights = zero_uncounted(frames, weights, skips_nan, deviations.dtype)
    small, small_weights = halved_frames(frames, weights)
    bkgds = lax.optimization_barrier(mix(light, rates))
    images, image_weights = (frames, weights) if is_last else (small, small_weights)
    squares = square_totals = jnp.zeros_like(deviations)
    clipped = jnp.ones_like(images)
    if clip is not None and around_all is not None:
        radius_pix = clip.molecule_radius_pix / 2
        above, around = small - bkgds, around_all
        if small_weights is not None:
            above = above * small_weights
            around = around_pixels(radius_pix, small_weights)
        # As photon noise goes with the light, but not to zero.
        mean = jnp.mean(jnp.abs(bkgds), 1, keepdims=True)
        growth = root(jnp.maximum(bkgds, mean / 10))
        least = ROUNDING * root(mean)
        noise = jnp.maximum(deviations[:, None], least) * growth
        noise = noise * (around.pixel_norms if is_last else around.norms)
        per_noise = ratio(jnp.ones_like(noise), noise)
        excess = sum_around(above, radius_pix)
        if is_last:
            # But for the pixel itself, a quarter of one of half the size.
            own = molecule_taps(radius_pix)[0] ** 2
            z = lax.optimization_barrier((excess + own * above) * per_noise)
            per_noise = lax.optimization_barrier(own / 4 * per_noise)
            part = frames - double_size(bkgds, frames.shape)
            part = part if weights is None else part * weights
            z = double_size(z, frames.shape) - double_size(per_noise, frames.shape) * part
        else:
            z = lax.optimization_barrier(excess * per_noise)
        clipped = lax.optimization_barrier(clip.weights(z))
        if not is_last:
            squares, square_totals = squares_below(z, small_weights, bkgds)
    if image_weights is not None:
        clipped = clipped * image_weights
    if is_last:
        rates = [double_size(rate, frames.shape) for rate in rates]
    received = clipped * images
    light = _fit_light([rate[:, None] for rate in rates], received, clipped)
    return MixtureSums(*_block_sums(light, images, clipped), squares, square_totals, light)


def _fit_light(
    basis: Sequence[Float[Array, "#blocks 1 _height _width"]],
    received: _Blocks,
    counts: _Blocks,
) -> list[_Light]:
    """The light of each frame that fits what its pixels receive, which count so much."""
    totals = [
        jnp.sum(counts * (basis[i] * basis[j]), (-2, -1)) for i, j in _pairs(len(basis))
    ]
    sums = [jnp.sum(received * pattern, (-2, -1)) for pattern in basis]
    return solve(totals, sums)


def _block_sums(
    light: Sequence[_Light], images: _Blocks, weights: _Blocks
) -> tuple[list[_Images], list[_Images], _Images]:
    """The sums, totals and counts of blocks."""
    # By its photon noise, a frame counts the less, the brighter it is.
    norm = root(ft.reduce(jnp.add, (a**2 for a in light)))
    shares = [ratio(a, norm)[..., None, None] for a in light]
    pairs = [(shares[i] * light[j][..., None, None]) for i, j in _pairs(len(light))]
    received = weights * images
    sums = [sum_frames(share * received) for share in shares]
    return sums, [sum_frames(pair * weights) for pair in pairs], sum_frames(weights)


def mix(light: Any, rates: Sequence[_Images]) -> _Blocks:
    """The background: the sum of the products."""
    products = (a[..., None, None] * m[:, None] for a, m in zip(light, rates, strict=True))
    return ft.reduce(jnp.add, products)


def solve(
    totals: Sequence[Float[Array, "..."]], sums: Sequence[Float[Array, "..."]]
) -> list[Float[Array, "..."]]:
    """The solutions x of `A x = b` by elimination, with the upper triangle of A row by row,
    and b; zero for a pattern of which there is no light."""
    rank = len(sums)
    a = dict(zip(_pairs(rank), totals, strict=True))
    b = list(sums)
    for i in range(rank):
        a[i, i] = (1 + _RIDGE) * a[i, i]
    for i, j in it.combinations(range(rank), 2):
        share = ratio(a[i, j], a[i, i])
        b[j] = b[j] - share * b[i]
        for n in range(j, rank):
            a[j, n] = a[j, n] - share * a[i, n]
    found = b
    for i in reversed(range(rank)):
        known = sum(a[i, j] * found[j] for j in range(i + 1, rank))
        found[i] = ratio(b[i] - known, a[i, i])
    return found


def residual_sums(
    sums: Sequence[_Images], totals: Sequence[_Images], rates: Sequence[_Images]
) -> list[_Images]:
    """What rates leave of the sums: `b - A x`."""
    left = list(sums)
    for (i, j), total in zip(_pairs(len(rates)), totals, strict=True):
        left[i] = left[i] - total * rates[j]
        if i != j:
            left[j] = left[j] - total * rates[i]
    return left


def _pairs(rank: int) -> list[tuple[int, int]]:
    return list(it.combinations_with_replacement(range(rank), 2))

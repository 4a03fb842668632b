"""Sums of frames over blocks of time, in which molecules count less.

A block is a number of successive frames. What is made of it depends on it alone.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._filter.correlation import pad
from .._filter.kernels import GaussianKernel, half_width
from .smoothing import double_size, halve_size, ratio, root
from .soft_clip import SoftClip, squared_noise


# The share of the background below which a deviation is rounding, not noise.
ROUNDING = 1e-5

_Frames = Float[Array, "*batch height width"]
_Blocks = Float[Array, "blocks frames height width"]
_Small = Float[Array, "blocks frames half_height half_width"]
_Images = Float[Array, "blocks _height _width"]
_Light = Float[Array, "blocks frames"]


class BlockSums(NamedTuple):
    """Of each block, or of each of its frames.

    **Attributes:**

    - `sums`, `totals`: weighted sums of the frames, and of their light.
    - `squares`, `square_totals`: sums of squares, and of what they are the squares of.
    - `light`: of each frame.
    """

    sums: _Images
    totals: _Images
    squares: _Images
    square_totals: _Images
    light: _Light


def over_blocks(function: Callable, step: int, *stacks: Any) -> Any:
    """`function` of arrays whose first axis is of blocks, in a loop with so many blocks a
    step on a CPU, and all at once elsewhere."""
    function = jax.checkpoint(function)

    def in_steps(*stacks: Any) -> Any:
        stacks = jax.tree.map(lambda a: a.reshape(-1, step, *a.shape[1:]), stacks)
        results = lax.map(lambda stacks: function(*stacks), stacks)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)

    return lax.platform_dependent(*stacks, cpu=in_steps, default=function)


def frame_means(step: int, *images: _Images) -> list[Float[Array, "blocks 1 1"]]:
    """The means of images of blocks, rounded alike in all parts of a movie."""

    def means(*images: _Images) -> list[Float[Array, "blocks 1 1"]]:
        return [jnp.mean(image, (-2, -1), keepdims=True) for image in images]

    return over_blocks(means, step, *images)


def first_sums(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    is_frame: Bool[Array, "blocks frames"],
    *,
    is_steady: bool,
    skips_nan: bool,
    dtype: Any,
) -> tuple[BlockSums, Bool[Array, " blocks"]]:
    """The sums at half size with the mean of a frame as its light, and the squared noise of
    the first frame of each block; and whether a pixel that counts is not finite."""
    is_bad = bad_blocks(frames, weights, skips_nan)
    frames, weights = zero_uncounted(frames, weights, skips_nan, dtype)
    small, small_weights = halved_frames(frames, weights)
    counts = jnp.ones((1, 1, 1, 1), dtype) if small_weights is None else small_weights
    received = small if small_weights is None else small * small_weights
    light = is_frame.astype(dtype)
    if not is_steady:
        mean_counts = jnp.mean(counts, (-2, -1))
        light = light * ratio(jnp.mean(received, (-2, -1)), mean_counts)
    shares = jnp.maximum(light, 0)[..., None, None] * counts
    sums = sum_frames(jnp.where(shares > 0, received, 0))
    totals = jnp.broadcast_to(sum_frames(shares), sums.shape)
    lit = jnp.maximum(light[:, 0], 0)[:, None, None]
    squares = noise_squares(small, weights, jnp.broadcast_to(lit, sums.shape))
    return BlockSums(sums, totals, *squares, light), is_bad


def bad_blocks(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    skips_nan: bool,
) -> Bool[Array, " blocks"]:
    """Whether a pixel that counts is not finite."""
    if skips_nan:
        return jnp.zeros(len(frames), bool)
    is_bad = ~jnp.isfinite(frames)
    if weights is not None:
        is_bad = is_bad & (weights > 0)
    return is_bad.any((1, 2, 3))


def noise_squares(
    small: _Small, weights: _Blocks | None, totals: _Images
) -> tuple[_Images, _Images]:
    """The squared noise of the first frame of each block, and what of `totals` it is the
    square of: both are zero next to a pixel that is left out, where it is not of noise
    alone."""
    if weights is not None:
        is_noise = halve_size((weights[:, 0] > 0).astype(small.dtype))
        is_noise = lax.reduce_window(
            is_noise, np.inf, lax.min, (1, 3, 3), (1, 1, 1), "SAME"
        )
        totals = jnp.where(is_noise == 1, totals, 0)
    return jnp.where(totals > 0, squared_noise(small[:, 0]), 0), totals


def zero_uncounted(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    skips_nan: bool,
    dtype: Any,
) -> tuple[_Blocks, _Blocks | None]:
    """Frames and weights without what does not count, which may hold anything."""
    is_number = jnp.isfinite(frames)
    if skips_nan:
        is_finite = is_number.astype(dtype)
        weights = is_finite if weights is None else weights * is_finite
    frames = jnp.where(is_number, frames.astype(dtype), 0)
    return (frames if weights is None else jnp.where(weights > 0, frames, 0)), weights


def halved_frames(frames: _Blocks, weights: _Blocks | None) -> tuple[_Small, _Small | None]:
    # Kept in memory: made again for each tap, they would take three times as long.
    if weights is None:
        return lax.optimization_barrier(halve_size(frames)), None
    small_weights = lax.optimization_barrier(halve_size(weights))
    small = ratio(halve_size(frames * weights), small_weights)
    return lax.optimization_barrier(small), small_weights


class Around(NamedTuple):
    """What there is around a pixel, under a Gaussian as wide as a molecule without that
    pixel: the total weight, and the deviation of a sum of white noise.

    `pixel_norms` is that with three of the four pixels that a pixel of half the size is
    made of, so without one of these.
    """

    totals: Float[Array, "..."]
    norms: Float[Array, "..."]
    pixel_norms: Float[Array, "..."]


def around_pixels(radius_pix: float, weights: _Frames) -> Around:
    """For pixels that count by `weights`."""
    taps = molecule_taps(radius_pix)
    squares = _around(weights**2, [tap**2 for tap in taps])
    own = 3 / 4 * (taps[0] ** 2 * weights) ** 2
    return Around(_around(weights, taps), root(squares), root(squares + own))


def sum_around(images: _Frames, radius_pix: float) -> _Frames:
    """The weighted sum of the pixels around each one, without that one."""
    return _around(images, molecule_taps(radius_pix))


def molecule_taps(radius_pix: float) -> list[float]:
    kernel = GaussianKernel(half_width(radius_pix, "smooth"), "smooth")
    with jax.ensure_compile_time_eval():
        return np.asarray(kernel.taps(jnp.asarray(radius_pix)), float).tolist()


def clipped_sums(
    frames: Shaped[Array, "blocks frames height width"],
    weights: _Blocks | None,
    light: _Light,
    rates: _Images,
    deviations: _Images,
    *,
    clip: SoftClip | None,
    around_all: Around | None,
    is_last: bool,
    is_steady: bool,
    skips_nan: bool,
) -> BlockSums:
    """The sums in which pixels are clipped by the background of the round before, with the
    squared deviations below it.

    **Arguments:**

    - `light`, `rates`: the background is their product. Rates are of half the size.
    - `deviations`: of the noise of a pixel of half the size, in a light of one.
    - `around_all`: what there is around a pixel where all pixels count.
    - `is_last`: whether sums are of full size. Otherwise, they are of half the size.
    """
    frames, weights = zero_uncounted(frames, weights, skips_nan, rates.dtype)
    small, small_weights = halved_frames(frames, weights)
    if not is_last:
        frames, weights = small, small_weights
    squares = square_totals = jnp.zeros_like(rates)
    # Kept in memory, so that sums are rounded alike in every program.
    clipped = lax.optimization_barrier(jnp.ones_like(frames))
    if clip is not None and around_all is not None:
        radius_pix = clip.molecule_radius_pix / 2
        weighted, around = small, around_all
        if small_weights is not None:
            weighted = small * small_weights
            around = around_pixels(radius_pix, small_weights)
        # As photon noise goes with the light, but not to zero.
        mean_light = jnp.mean(jnp.abs(light), 1)
        growth = root(jnp.maximum(light, mean_light[:, None] / 10))
        per_growth = ratio(jnp.ones_like(growth), growth)[..., None, None]
        least = ROUNDING * jnp.abs(rates) * root(mean_light)[:, None, None]
        noise = jnp.maximum(deviations, least)[:, None] * (
            around.pixel_norms if is_last else around.norms
        )
        per_noise = ratio(jnp.ones_like(noise), noise)
        excess = sum_around(weighted, radius_pix)
        totals = around.totals
        # Its own pixel of half the size, a quarter of which a pixel of full size is.
        own = molecule_taps(radius_pix)[0] ** 2
        if is_last:
            excess = excess + own * weighted
            totals = totals + own * (1.0 if small_weights is None else small_weights)
        bkgd_share = totals * rates[:, None] * per_noise
        z = per_growth * (excess * per_noise - light[..., None, None] * bkgd_share)
        # What many sums need is kept in memory: made again for each of them, it would take
        # three times as long.
        z = lax.optimization_barrier(z)
        if is_last:
            rates = lax.optimization_barrier(double_size(rates, frames.shape))
            per_noise = lax.optimization_barrier(
                double_size(own / 4 * per_noise, frames.shape)
            )
            part = frames - light[..., None, None] * rates[:, None]
            part = part if weights is None else part * weights
            z = double_size(z, frames.shape) - per_growth * per_noise * part
        clipped = lax.optimization_barrier(clip.weights(z))
        if not is_last:
            squares, square_totals = squares_below(z, weights, light[..., None, None])
    elif is_last:
        rates = double_size(rates, frames.shape)
    if weights is not None:
        clipped = clipped * weights
    if not is_steady:
        received = jnp.sum(clipped * frames, (-2, -1))
        light = ratio(received, jnp.sum(clipped * rates[:, None], (-2, -1)))
    counts = jnp.maximum(light, 0)[..., None, None]
    sums = sum_frames(jnp.where(counts > 0, clipped * frames, 0))
    return BlockSums(sums, sum_frames(clipped * counts), squares, square_totals, light)


def squares_below(
    z: _Blocks, weights: _Blocks | None, light: Float[Array, "blocks frames _ _"]
) -> tuple[_Images, _Images]:
    """The squared deviations of what is below the background, and what these are the
    squares of. They count by their light, since dark frames have the noise of reading
    alone."""
    is_below = z < 0 if weights is None else (z < 0) & (weights > 0)
    below = jnp.where(is_below, jnp.maximum(light, 0), 0)
    return sum_frames(below * z * z), sum_frames(below)


def sum_frames(images: _Blocks) -> _Images:
    """The sum over the frames of each block, one frame after the other: XLA's own sum over
    an axis in the middle is a hundred times slower."""
    of_frame = ft.partial(lax.index_in_dim, images, axis=1, keepdims=False)
    return ft.reduce(jnp.add, map(of_frame, range(images.shape[1])))


def _around(images: _Frames, taps: list[float]) -> _Frames:
    """The sum under taps along y and x without the centre; beyond the edges is nothing."""
    reach = len(taps) - 1

    def add_neighbours(total: _Frames, padded: Any, axis: int) -> _Frames:
        for i in range(1, reach + 1):
            before, after = (
                lax.slice_in_dim(padded, start, start + images.shape[axis], axis=axis)
                for start in (reach - i, reach + i)
            )
            total = total + taps[i] * (before + after)
        return total

    tall = pad(images, (reach, reach), -2)
    lines = add_neighbours(taps[0] * images, tall, -2)
    wide = lax.optimization_barrier(pad(lines, (reach, reach), -1))
    return add_neighbours(taps[0] * lines - taps[0] ** 2 * images, wide, -1)

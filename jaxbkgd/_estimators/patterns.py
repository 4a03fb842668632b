"""Several patterns of light, of which each frame has its own mixture.

`f_t(x) = sum_k a_k(t) M_k(t, x) + molecules + noise`: a_k is free from frame to frame, and
M_k is smooth in space and slow in time. Around each pixel and block of frames, M is the
least squares fit to the frames under the kernel of LocalMean (normalised convolution with a
basis: Knutsson and Westin, CVPR 1993, 515), and a_k(t) is that of the patterns to frame t:
first of coarse ones, which the estimator holds, and then of M. Since the light of a frame
depends on that frame and on M alone, parts of a movie give what the whole one gives.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._filter.kernels import GaussianKernel
from .background import Background
from .block_sums import frame_means, over_blocks
from .coarse_patterns import patterns_of, square_levels
from .illumination import means_over_time
from .light_model import (
    around_all_pixels,
    estimate_batch,
    in_blocks,
    in_rounds,
    LightModel,
    rates_with_gaps,
    spread_bad_blocks,
    structure_share,
)
from .pattern_sums import clipped_sums, first_sums, mix, MixtureSums, residual_sums, solve
from .smoothing import LEAST_TOTAL_WEIGHT, ratio, root, Smoothing


_Images = Float[Array, "blocks _height _width"]
_Light = Float[Array, "rank blocks frames"]


class _Rates(NamedTuple):
    """What a round knows of blocks, as that of one pattern."""

    light: list[Float[Array, "blocks frames"]]
    rates: list[_Images]
    deviations: _Images
    unclipped: list[_Images]
    counts: _Images


@eqx.filter_jit
def estimate_mixtures(
    model: LightModel,
    patterns: Int[Array, "rank rows columns"] | None,
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
    gaps: tuple[int, ...] = (),
) -> Background:
    """The background of one channel, as that of one pattern. Without patterns, they are
    learned from each stack of frames, and have no gradient."""
    of_stack = ft.partial(_estimate_stack, patterns)
    return estimate_batch(of_stack, model, frames, weights, gaps)


def _estimate_stack(
    patterns: Int[Array, "rank rows columns"] | None,
    model: LightModel,
    gaps: tuple[int, ...],
    frames: Shaped[Array, "frames height width"],
    weights: Float[Array, "frames height width"] | None,
) -> tuple[Float[Array, "images frames height width"], Float[Array, "rank frames"]]:
    """The backgrounds and the light of each frame."""
    smoothing, dtype = model.smoothing, model.smoothing.radii.dtype
    count, height, width = frames.shape
    basis = patterns
    if basis is None:
        # Whole numbers have no gradient.
        squares = square_levels(frames, weights, model.skips_nan)
        basis = patterns_of(squares[None], model.illumination_rank)[0]
    step = model.step_blocks(frames.shape)
    length = step * model.block_frames
    blocks = in_blocks(model, frames, weights, -(-count // length) * step)
    stacks = blocks[:2]
    first = ft.partial(
        first_sums, patterns=list(basis), skips_nan=model.skips_nan, dtype=dtype
    )
    first_of_all, is_bad = over_blocks(first, step, *blocks)
    around = around_all_pixels(model.clip, first_of_all.sums[0])
    clipped = ft.partial(
        clipped_sums, clip=model.clip, around_all=around, skips_nan=model.skips_nan
    )

    def next_rates(before: _Rates, sums: MixtureSums, is_first: Any) -> _Rates:
        return _rates_of_round(smoothing.halved(), before, sums, is_first, step)

    def sums_with(rates: _Rates) -> MixtureSums:
        inner = ft.partial(clipped, is_last=False)
        return over_blocks(inner, step, *stacks, *rates[:3])

    zeros = jax.tree.map(jnp.zeros_like, first_of_all)
    none = zeros.counts
    before = _Rates(zeros.light, zeros.sums, none, zeros.sums, none)
    rates = in_rounds(model.rounds, next_rates, before, first_of_all, sums_with)
    sums = over_blocks(ft.partial(clipped, is_last=True), step, *stacks, *rates[:3])
    light = jnp.stack(sums.light)
    is_nan = spread_bad_blocks(is_bad, model.halo_blocks)[:, None, None]
    if blocks.mean_weights is not None:
        shares = smoothing.sums(blocks.mean_weights)
        is_nan = is_nan | (shares <= LEAST_TOTAL_WEIGHT)
    if blocks.mean_weights is not None or model.skips_nan:
        is_seen = blocks.is_seen(model.skips_nan)
        light = _fill_unseen(
            light, is_seen, model.illumination_radius, model.illumination_kernel
        )
    images = []
    for rates in _rates_with_gaps(smoothing, sums, step, gaps):
        bkgds = over_blocks(mix, step, list(light), rates)
        # In the end, since a derivative would pass a NaN on.
        bkgds = jnp.where(is_nan[:, None], jnp.nan, bkgds)
        images.append(bkgds.reshape(-1, height, width)[:count])
    return jnp.stack(images), light.reshape(len(light), -1)[:, :count]


def _smooth_sums(
    smoothing: Smoothing, sums: MixtureSums, step: int
) -> tuple[list[_Images], list[_Images], _Images, _Images]:
    """The totals, sums and counts of `MixtureSums` around each pixel, and the root of the
    mean square."""
    squares = sums.squares, sums.square_totals
    # In one stack, so that less is compiled.
    stack = jnp.stack([*sums.totals, *sums.sums, sums.counts, *squares])
    *near, counts, near_squares, near_totals = smoothing.sums(stack)
    whole = ratio(*frame_means(step, *squares))
    mean = jnp.where(near_totals > 0, ratio(near_squares, near_totals), whole)
    pairs = len(sums.totals)
    return near[:pairs], near[pairs:], counts, root(mean)


def _rates_of_round(
    small: Smoothing, before: _Rates, sums: MixtureSums, is_first: Any, step: int
) -> _Rates:
    """As `LightModel.rates_of_round`."""
    near_totals, near_sums, counts, deviations = _smooth_sums(small, sums, step)
    fit = _rates(small, sums, near_totals, near_sums, step)
    plain = _rates(small.with_order(2), sums, near_totals, near_sums, step)
    first = _Rates(sums.light, plain, deviations, fit, counts)
    is_structure = structure_share(ratio(counts, before.counts))
    rates = [
        new + is_structure * (old - new)
        for new, old in zip(fit, before.unclipped, strict=True)
    ]
    deviations = before.deviations * deviations
    later = before._replace(light=sums.light, rates=rates, deviations=deviations)
    return jax.tree.map(ft.partial(jnp.where, is_first), first, later)


def _rates(
    smoothing: Smoothing,
    sums: MixtureSums,
    near_totals: list[_Images],
    near_sums: list[_Images],
    step: int,
) -> list[_Images]:
    """M, from sums that are smoothed already; for order 4, with the fit to what it leaves
    added ("twicing": Tukey, Exploratory Data Analysis, 1977, 16)."""
    # In loops of their own: joined with others, products are rounded as the program has it.
    rates = over_blocks(solve, step, near_totals, near_sums)
    if smoothing.order == 4:
        left = over_blocks(residual_sums, step, sums.sums, sums.totals, rates)
        near_left = list(smoothing.sums(jnp.stack(left)))
        more = over_blocks(solve, step, near_totals, near_left)
        rates = [rate + extra for rate, extra in zip(rates, more, strict=True)]
    return rates


def _rates_with_gaps(
    smoothing: Smoothing, sums: MixtureSums, step: int, gaps: tuple[int, ...]
) -> list[list[_Images]]:
    """M, and for each gap M without the blocks that are nearer."""
    stack, pairs = jnp.stack([*sums.totals, *sums.sums]), len(sums.totals)

    def completed(smoothing: Smoothing, smooth: Any, *_: Any) -> list[_Images]:
        near = list(smooth)
        return _rates(smoothing, sums, near[:pairs], near[pairs:], step)

    means = ft.partial(completed, smoothing.with_order(2))
    return rates_with_gaps(smoothing, stack, ft.partial(completed, smoothing), means, gaps)


def _fill_unseen(
    light: _Light,
    is_seen: Bool[Array, "blocks frames"],
    radius_frames: Float[Array, ""],
    kernel: GaussianKernel,
) -> _Light:
    """The light, of frames of which no pixel counts the mean of that around them."""
    seen = is_seen.reshape(-1).astype(light.dtype)
    rows = light.reshape(len(light), -1)
    means = jnp.stack(means_over_time(seen, radius_frames, kernel, *rows))
    return jnp.where(is_seen, light, means.reshape(light.shape))

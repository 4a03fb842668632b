"""The rounds of LocalMean: light and rates, from sums over blocks of frames."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._filter.kernels import GaussianKernel
from .background import Background
from .block_sums import (
    around_pixels,
    BlockSums,
    clipped_sums,
    first_sums,
    frame_means,
    over_blocks,
    step_blocks,
)
from .channels import working_dtype
from .checks import is_known
from .illumination import steadied
from .residual_noise import ResidualNoise
from .smoothing import LEAST_TOTAL_WEIGHT, ratio, root, Smoothing
from .soft_clip import SoftClip


# The share of weights around a pixel below which it is not molecules that are clipped, and
# above it the range in which that is in doubt. Molecules that are dense leave 0.7.
MOST_CLIPPED, CLIPPED_RANGE = 0.35, 0.25


class LightModel(eqx.Module):
    """The parameters of LocalMean for one channel."""

    smoothing: Smoothing
    clip: SoftClip | None
    illumination_radius: Float[Array, ""]
    illumination_kernel: GaussianKernel = eqx.field(static=True)
    illumination_rank: int = eqx.field(static=True)
    block_frames: int = eqx.field(static=True)
    skips_nan: bool = eqx.field(static=True)

    @property
    def rounds(self) -> int:
        return 1 if self.clip is None else self.clip.rounds

    @property
    def halo_blocks(self) -> int:
        """Blocks that the rates of one depend on, on either side of it: what the kernel
        reaches, once for the first rates and composed in each round."""
        time = self.smoothing.kernels.time
        once = 0 if time is None else time.half_width
        return once + self.rounds * once * self.smoothing.order // 2

    @property
    def halo_frames(self) -> int:
        """Frames that count on either side of one."""
        # Whole blocks, whichever frame of a block it is.
        halo = (self.halo_blocks + 1) * self.block_frames - 1
        # The light needs the rates of its own block only.
        return halo + self.illumination_kernel.half_width * min(self.illumination_rank, 1)


@eqx.filter_jit
def estimate(
    model: LightModel,
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
    gaps: tuple[int, ...] = (),
) -> Background:
    """The background of one channel; see `estimate_batch`."""
    return estimate_batch(_estimate_stack, model, frames, weights, gaps)


def estimate_batch(
    estimate_stack: Callable[..., Any],
    model: LightModel,
    frames: Shaped[Array, "*batch height width"],
    weights: Shaped[Array, "..."] | None,
    gaps: tuple[int, ...] = (),
) -> Background:
    """The background of one channel, of which `estimate_stack` estimates each stack. With
    gaps in blocks, it has an axis before the others: for the background itself, and for
    each gap with the blocks that are nearer replaced by those at that distance."""
    shape = frames.shape
    if model.clip is not None and any(is_known(n) and n < 5 for n in shape[-2:]):
        raise ValueError(
            "Noise is measured in frames of 5 x 5 pixels or more, but these have the shape "
            f"{shape}; give clip=None."
        )
    dtype = working_dtype(frames)
    rank = model.illumination_rank
    # A fit of k patterns has k times the noise of a mean, averaged over frames.
    averaged = model.block_frames / rank if rank > 1 else model.block_frames
    correction = model.smoothing.noise_correction(averaged)
    noise = ResidualNoise(
        model.smoothing.taps(),
        clip=model.clip,
        order=model.smoothing.order,
        block_frames=model.block_frames,
    )
    if 0 in shape:
        of_frames = [rank] * (rank > 1) + list(shape[-3:-2])
        light = jnp.zeros((*shape[:-3], *of_frames), dtype)
        return Background(jnp.zeros(shape, dtype), correction, light, noise)
    model = jax.tree.map(lambda parameters: parameters.astype(dtype), model)
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(dtype), shape)
    if frames.ndim == 2:
        frames, weights = frames[None], None if weights is None else weights[None]
    of_stack = ft.partial(estimate_stack, model, gaps)
    for _ in frames.shape[:-3]:
        of_stack = jax.vmap(of_stack, (0, None if weights is None else 0), (1, 0))
    bkgds, light = of_stack(frames, weights)
    bkgds = bkgds.reshape(-1, *shape)
    # Of one frame, it has no axis of frames.
    light = light.reshape(*light.shape[:-1], *shape[-3:-2])
    return Background(bkgds if gaps else bkgds[0], correction, light, noise)


def _estimate_stack(
    model: LightModel,
    gaps: tuple[int, ...],
    frames: Shaped[Array, "frames height width"],
    weights: Float[Array, "frames height width"] | None,
) -> tuple[Float[Array, "images frames height width"], Float[Array, " frames"]]:
    """The backgrounds and the light of each frame."""
    smoothing, dtype = model.smoothing, model.smoothing.radii.dtype
    count, height, width = frames.shape
    length = model.block_frames
    step = step_blocks(length, height, width)
    blocks = -(-count // (length * step)) * step

    def in_blocks(stack: Array) -> Array:
        widths = [(0, blocks * length - count), *[(0, 0)] * (stack.ndim - 1)]
        return jnp.pad(stack, widths).reshape(blocks, length, *stack.shape[1:])

    weight_blocks = None if weights is None else in_blocks(weights)
    stacks = in_blocks(frames), weight_blocks
    is_frame = in_blocks(jnp.ones(count, bool))
    options = {"is_steady": model.illumination_rank == 0, "skips_nan": model.skips_nan}
    first = ft.partial(first_sums, dtype=dtype, **options)
    sums, is_bad = over_blocks(first, step, *stacks, is_frame)
    small = smoothing.halved()
    near_sums, totals, deviations = _smoothed(small, sums, step)
    both = sums.sums, sums.totals, near_sums, totals
    unclipped = small.completed(*both)
    # Of order 2, the first rates are good enough for weights, and seen from fewer frames.
    rates = small.with_order(2).completed(*both)
    around = None
    if model.clip is not None:
        # Not known to the compiler, which would work all this out itself, slowly.
        ones = lax.optimization_barrier(jnp.ones((1, 1, *rates.shape[1:]), dtype))
        around = around_pixels(model.clip.molecule_radius_pix / 2, ones)
    clipped = ft.partial(clipped_sums, clip=model.clip, around_all=around, **options)
    light = sums.light

    def next_round(carried: tuple, _: Any) -> tuple[tuple, None]:
        *_, deviations = carried
        in_round = ft.partial(clipped, is_last=False)
        sums = over_blocks(in_round, step, *stacks, *carried)
        near_sums, near_totals, growth = _smoothed(small, sums, step)
        rates = small.completed(sums.sums, sums.totals, near_sums, near_totals)
        # Where most is clipped, it is no molecules, but a background that is finer or
        # brighter than the rates of the round before.
        share = ratio(near_totals, totals)
        is_structure = jnp.clip((MOST_CLIPPED - share) / CLIPPED_RANGE + 1, 0, 1)
        scale = ratio(*frame_means(step, rates, unclipped))
        rates = rates + is_structure * (scale * unclipped - rates)
        return (sums.light, rates, deviations * growth), None

    if model.rounds > 1:
        # A scan of no turn would not work under `jax.disable_jit`.
        carried = light, rates, deviations
        carried, _ = lax.scan(next_round, carried, length=model.rounds - 1)
        light, rates, deviations = carried
    # Of the light, which is a mean over the frame.
    square, mean = frame_means(step, deviations**2, rates)
    pixels = deviations.shape[-2] * deviations.shape[-1]
    variance = ratio(square, pixels * mean**2)[..., 0]
    in_round = ft.partial(clipped, is_last=True)
    sums = over_blocks(in_round, step, *stacks, light, rates, deviations)
    light = sums.light
    if model.illumination_rank:
        is_seen = is_frame
        if weight_blocks is not None:
            is_seen = is_frame & (weight_blocks > 0).any((-2, -1))
        if model.skips_nan:
            is_seen = is_seen & jnp.isfinite(stacks[0]).any((-2, -1))
        light = steadied(
            light.reshape(-1),
            (light * variance).reshape(-1),
            is_seen.reshape(-1),
            model.illumination_radius,
            model.illumination_kernel,
        ).reshape(light.shape)
    is_nan = spread(is_bad, model.halo_blocks)[:, None, None]
    if weight_blocks is not None:
        shares = smoothing.sums(jnp.mean(weight_blocks, 1))
        is_nan = is_nan | (shares <= LEAST_TOTAL_WEIGHT)
    images = []
    for rates in _rates(smoothing, sums, gaps):
        # In the end, since a derivative would pass a NaN on.
        bkgds = jnp.where(is_nan[:, None], jnp.nan, light[..., None, None] * rates[:, None])
        images.append(bkgds.reshape(-1, height, width)[:count])
    return jnp.stack(images), light.reshape(-1)[:count]


def _smoothed(
    smoothing: Smoothing, sums: BlockSums, step: int
) -> tuple[Float[Array, "blocks height width"], ...]:
    """Sums and totals around each pixel, and the root of the mean square there or, where
    there are no squares, in the frame."""
    images = jnp.stack([sums.sums, sums.totals, sums.squares, sums.square_totals])
    # In one stack, so that less is compiled.
    near_sums, near_totals, squares, square_totals = smoothing.sums(images)
    whole = ratio(*frame_means(step, sums.squares, sums.square_totals))
    near = ratio(squares, square_totals)
    return near_sums, near_totals, root(jnp.where(square_totals > 0, near, whole))


def _rates(
    smoothing: Smoothing, sums: BlockSums, gaps: tuple[int, ...]
) -> list[Float[Array, "blocks height width"]]:
    """The background in a light of one."""
    if not gaps:
        return [smoothing.means(sums.sums, sums.totals)]
    # As a difference of two Gaussians, in which a gap keeps all of a block's own noise out.
    plain = smoothing.with_order(2)
    wide = plain.widened()

    def rates(gap: int) -> Float[Array, "blocks height width"]:
        means = plain.means(sums.sums, sums.totals, gap)
        if smoothing.order == 2:
            return means
        return 2 * means - wide.means(sums.sums, sums.totals, gap)

    return [rates(gap) for gap in (0, *gaps)]


def spread(is_bad: Bool[Array, " blocks"], reach: int) -> Bool[Array, " blocks"]:
    """Which blocks have a bad one within reach."""
    return lax.reduce_window(is_bad, False, lax.bitwise_or, (2 * reach + 1,), (1,), "SAME")

"""The rounds of LocalMean: light and rates, from sums over blocks of frames."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._filter.kernels import GaussianKernel
from .background import Background
from .block_sums import (
    Around,
    around_pixels,
    BlockSums,
    clipped_sums,
    first_sums,
    frame_means,
    over_blocks,
    ROUNDING,
)
from .channels import working_dtype
from .checks import is_known
from .illumination import average_steady_light
from .residual_noise import ResidualNoise
from .smoothing import LEAST_TOTAL_WEIGHT, ratio, root, Smoothing
from .soft_clip import SoftClip


# At half their size, these are the smallest frames whose noise can be measured.
LEAST_FRAME_PIX = 5

# The share of weights around a pixel below which it is not molecules that are clipped, and
# above it the range in which that is in doubt. Molecules that are dense leave 0.7.
_MOST_CLIPPED, _CLIPPED_RANGE = 0.35, 0.25
# Pixels that one step of a CPU's loop over blocks handles, enough for two threads, and the
# most blocks, since whole steps are done.
_STEP_PIXELS, _STEP_BLOCKS = 2**18, 8

_Images = Float[Array, "blocks _height _width"]
_Both = Float[Array, "2 blocks _height _width"]
_Smooth = Float[Array, "_images blocks _height _width"]
_Rates = TypeVar("_Rates")
_Sums = TypeVar("_Sums")


class FrameBlocks(NamedTuple):
    """Successive frames in blocks, the weights of their pixels, and which ones there are:
    blocks are filled up at the end of the movie."""

    frames: Shaped[Array, "blocks frames height width"]
    weights: Float[Array, "blocks frames height width"] | None
    is_frame: Bool[Array, "blocks frames"]

    def is_seen(self, skips_nan: bool) -> Bool[Array, "blocks frames"]:
        """Whether any pixel of a frame counts."""
        is_seen = self.is_frame
        if self.weights is not None:
            is_seen = is_seen & (self.weights > 0).any((-2, -1))
        if skips_nan:
            is_seen = is_seen & jnp.isfinite(self.frames).any((-2, -1))
        return is_seen

    @property
    def mean_weights(self) -> Float[Array, "blocks height width"] | None:
        """Those of each block, if there are any."""
        return None if self.weights is None else jnp.mean(self.weights, 1)


class Rates(NamedTuple):
    """What a round knows of blocks, in images of half the size.

    **Attributes:**

    - `light`: of each frame.
    - `rates`, `deviations`: the background and its noise in a light of one.
    - `unclipped`, `totals`: the rates without a clip, and the weights around each pixel.
    """

    light: Float[Array, "blocks frames"]
    rates: _Images
    deviations: _Images
    unclipped: _Images
    totals: _Images

    @classmethod
    def before(cls, sums: BlockSums) -> "Rates":
        """Those before the first round, which do not count."""
        zeros = jnp.zeros_like(sums.sums)
        return cls(jnp.zeros_like(sums.light), zeros, zeros, zeros, zeros)


class LastSums(NamedTuple):
    """The sums of the last round, what is known of the light of each frame, and the mean
    weights of each block, if there are any."""

    sums: _Images
    totals: _Images
    shares: _Images | None
    light: "Light"


class Light(NamedTuple):
    """The light of frames as it was measured, the variance of its noise, and whether any
    pixel of a frame counts."""

    light: Float[Array, "blocks frames"]
    variance: Float[Array, "blocks frames"]
    is_seen: Bool[Array, "blocks frames"]


class LightModel(eqx.Module):
    """LocalMean for one channel: its parameters, and the steps of an estimate.

    Steps with frames are sums over each block by itself. Those between them smooth sums
    over blocks: they take `margin` blocks more on either side than they give.
    """

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
    def reach_blocks(self) -> int:
        """Blocks that the rates of one are made of in one round, on either side of it."""
        time = self.smoothing.kernels.time
        return 0 if time is None else time.half_width * self.smoothing.order // 2

    @property
    def reach_light(self) -> int:
        """Frames that the light of one is averaged over, on either side of it."""
        return self.illumination_kernel.half_width * min(self.illumination_rank, 1)

    @property
    def halo_blocks(self) -> int:
        """Blocks that the rates of one depend on, on either side of it: what the kernel
        reaches, once for the first rates and composed in each round."""
        time = self.smoothing.kernels.time
        return (0 if time is None else time.half_width) + self.rounds * self.reach_blocks

    @property
    def halo_frames(self) -> int:
        """Frames that count on either side of one."""
        # Whole blocks, whichever frame of a block it is. The light needs the rates of its
        # own block only.
        return (self.halo_blocks + 1) * self.block_frames - 1 + self.reach_light

    @property
    def is_steady(self) -> bool:
        return self.illumination_rank == 0

    def step_blocks(self, shape: tuple[Any, ...]) -> int:
        """The blocks of frames (..., height, width) in a step of the loop over blocks. A
        sum over a frame is rounded by their number, which must be the same in all parts of
        a movie."""
        if not all(map(is_known, shape[-2:])):
            return 1
        block_pixels = self.block_frames * math.prod(shape[-2:])
        return max(1, min(_STEP_BLOCKS, _STEP_PIXELS // block_pixels))

    def of_dtype(self, dtype: Any) -> "LightModel":
        """The same with parameters of this dtype, in which it computes."""
        return jax.tree.map(lambda parameters: parameters.astype(dtype), self)

    def background(self, bkgds: Any, light: Any) -> Background:
        """The `Background` with these images and this light."""
        smoothing, length = self.smoothing, self.block_frames
        noise = ResidualNoise(
            smoothing.taps(), clip=self.clip, order=smoothing.order, block_frames=length
        )
        # A fit of k patterns has k times the noise of a mean, averaged over frames.
        rank = self.illumination_rank
        correction = smoothing.noise_correction(length / rank if rank > 1 else length)
        return Background(bkgds, correction, light, noise)

    def first_sums(self, blocks: FrameBlocks) -> tuple[BlockSums, Bool[Array, " blocks"]]:
        """Sums in which all pixels count, and which blocks have a NaN that counts."""
        first = ft.partial(
            first_sums,
            is_steady=self.is_steady,
            skips_nan=self.skips_nan,
            dtype=self.smoothing.radii.dtype,
        )
        return over_blocks(first, self.step_blocks(blocks.frames.shape), *blocks)

    def clipped_sums(
        self, blocks: FrameBlocks, rates: Rates, *, is_last: bool = False
    ) -> BlockSums:
        """Sums in which molecules are clipped; of full size in the last round."""
        clipped = ft.partial(
            clipped_sums,
            clip=self.clip,
            around_all=around_all_pixels(self.clip, rates.rates),
            is_last=is_last,
            is_steady=self.is_steady,
            skips_nan=self.skips_nan,
        )
        step = self.step_blocks(blocks.frames.shape)
        return over_blocks(clipped, step, *blocks[:2], *rates[:3])

    def rates_of_round(
        self,
        before: Rates,
        sums: BlockSums,
        is_first: Any,
        step: int,
        margin: int = 0,
    ) -> Rates:
        """The rates of a round, from those before it and its sums; of the first one, in
        which nothing is clipped and nothing is before it, from its sums alone."""
        small, inner = self.smoothing.halved(), _inner(margin)
        near_sums, near_totals, deviations = _smooth_sums(small, sums, step, margin)
        both = sums.sums, sums.totals, near_sums, near_totals
        light, totals = sums.light[inner], near_totals[inner]
        means = small.completed(*both)[inner]
        # Of order 2, the first rates are good enough for weights, and seen from fewer
        # frames.
        plain = small.with_order(2).completed(*both)[inner]
        first = Rates(light, plain, deviations, means, totals)
        # Where most is clipped, it is no molecules, but a background that is finer or
        # brighter than the rates of the round before.
        is_structure = structure_share(ratio(totals, before.totals))
        scale = ratio(*frame_means(step, means, before.unclipped))
        means = means + is_structure * (scale * before.unclipped - means)
        deviations = before.deviations * deviations
        later = Rates(light, means, deviations, before.unclipped, before.totals)
        return jax.tree.map(ft.partial(jnp.where, is_first), first, later)

    def last_sums(self, blocks: FrameBlocks, rates: Rates) -> LastSums:
        """The sums of which the background is made, and the light."""
        step = self.step_blocks(blocks.frames.shape)
        # Of the light, which is a mean over the frame.
        square, mean = frame_means(step, rates.deviations**2, rates.rates)
        pixels = math.prod(rates.rates.shape[1:])
        variance = ratio(square, pixels * mean**2)[..., 0]
        sums = self.clipped_sums(blocks, rates, is_last=True)
        is_seen = blocks.is_seen(self.skips_nan)
        light = Light(sums.light, sums.light * variance, is_seen)
        return LastSums(sums.sums, sums.totals, blocks.mean_weights, light)

    def steady_light(self, light: Light) -> Float[Array, "blocks frames"]:
        """The light, averaged over time where it is seen to be steady."""
        if self.is_steady:
            return light.light
        return average_steady_light(
            light.light.reshape(-1),
            light.variance.reshape(-1),
            light.is_seen.reshape(-1),
            self.illumination_radius,
            self.illumination_kernel,
        ).reshape(light.light.shape)

    def backgrounds(
        self,
        last: LastSums,
        light: Float[Array, "blocks frames"],
        is_bad: Bool[Array, " blocks"],
        gaps: tuple[int, ...] = (),
        margin: int = 0,
    ) -> list[Float[Array, "blocks frames height width"]]:
        """The background, and for each gap that without the nearer blocks; NaN where a bad
        block is seen, or nothing."""
        is_nan = is_bad[:, None, None]
        if last.shares is not None:
            shares = self.smoothing.sums(last.shares)[_inner(margin)]
            is_nan = is_nan | (shares <= LEAST_TOTAL_WEIGHT)
        # In the end, since a derivative would pass a NaN on.
        return [
            jnp.where(
                is_nan[:, None],
                jnp.nan,
                light[..., None, None] * rates[_inner(margin), None],
            )
            for rates in _rates(self.smoothing, last, gaps)
        ]


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
    if any(is_known(n) and n < LEAST_FRAME_PIX for n in shape[-2:]):
        raise ValueError(
            f"LocalMean measures noise in frames of {LEAST_FRAME_PIX} x {LEAST_FRAME_PIX} "
            f"pixels or more, but these have the shape {shape}; SpatialMean takes smaller "
            "ones."
        )
    dtype = working_dtype(frames)
    if 0 in shape:
        rank = model.illumination_rank
        of_frame = [rank] if rank > 1 else []
        light = jnp.zeros((*shape[:-3], *of_frame, *shape[-3:-2]), dtype)
        return model.background(jnp.zeros(shape, dtype), light)
    model = model.of_dtype(dtype)
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
    return model.background(bkgds if gaps else bkgds[0], light)


def _estimate_stack(
    model: LightModel,
    gaps: tuple[int, ...],
    frames: Shaped[Array, "frames height width"],
    weights: Float[Array, "frames height width"] | None,
) -> tuple[Float[Array, "images frames height width"], Float[Array, " frames"]]:
    """The backgrounds and the light of each frame."""
    count, height, width = frames.shape
    step = model.step_blocks(frames.shape)
    length = step * model.block_frames
    blocks = in_blocks(model, frames, weights, -(-count // length) * step)
    sums, is_bad = model.first_sums(blocks)

    rates = in_rounds(
        model.rounds,
        lambda *given: model.rates_of_round(*given, step=step),
        Rates.before(sums),
        sums,
        ft.partial(model.clipped_sums, blocks),
    )
    last = model.last_sums(blocks, rates)
    light = model.steady_light(last.light)
    is_bad = spread_bad_blocks(is_bad, model.halo_blocks)
    bkgds = model.backgrounds(last, light, is_bad, gaps)
    images = [bkgd.reshape(-1, height, width)[:count] for bkgd in bkgds]
    return jnp.stack(images), light.reshape(-1)[:count]


def in_rounds(
    rounds: int,
    rates_of_round: Callable[[_Rates, _Sums, Any], _Rates],
    before: _Rates,
    first: _Sums,
    clipped: Callable[[_Rates], _Sums],
) -> _Rates:
    """The rates after all rounds but the last, of which the first takes the first sums, and
    each other one those that are clipped by the rates before it. It is one program for all
    of them, since smoothing takes long to compile."""
    if rounds == 1:
        return rates_of_round(before, first, True)

    def turn(rates: _Rates, is_first: Bool[Array, ""]) -> tuple[_Rates, None]:
        sums = lax.cond(is_first, lambda: first, lambda: clipped(rates))
        return rates_of_round(rates, sums, is_first), None

    rates, _ = lax.scan(turn, before, jnp.arange(rounds) == 0)
    return rates


def in_blocks(
    model: LightModel,
    frames: Shaped[Array, "frames height width"],
    weights: Float[Array, "frames height width"] | None,
    blocks: Any,
) -> FrameBlocks:
    """Frames in so many blocks, of which the last ones are filled up."""
    count, length = frames.shape[0], model.block_frames

    def blocked(stack: Array) -> Array:
        widths = [(0, blocks * length - count), *[(0, 0)] * (stack.ndim - 1)]
        return jnp.pad(stack, widths).reshape(blocks, length, *stack.shape[1:])

    weight_blocks = None if weights is None else blocked(weights)
    return FrameBlocks(blocked(frames), weight_blocks, blocked(jnp.ones(count, bool)))


def _inner(margin: int) -> slice:
    return slice(margin, -margin if margin else None)


def _smooth_sums(
    smoothing: Smoothing, sums: BlockSums, step: int, margin: int
) -> tuple[Float[Array, "_blocks height width"], ...]:
    """Sums and totals around each pixel and, without the margin, the root of the mean
    square there or, where there are no squares, in the frame."""
    images = jnp.stack([sums.sums, sums.totals, sums.squares, sums.square_totals])
    # In one stack, so that less is compiled.
    near_sums, near_totals, squares, square_totals = smoothing.sums(images)
    inner = _inner(margin)
    squares, square_totals = squares[inner], square_totals[inner]
    whole = ratio(*frame_means(step, sums.squares[inner], sums.square_totals[inner]))
    near = ratio(squares, square_totals)
    return near_sums, near_totals, root(jnp.where(square_totals > 0, near, whole))


def _rates(
    smoothing: Smoothing, sums: LastSums, gaps: tuple[int, ...]
) -> list[Float[Array, "blocks height width"]]:
    """The background in a light of one, and for each gap that without the nearer blocks."""
    both = sums.sums, sums.totals

    def means(near: _Both, seeing_all: _Both) -> Float[Array, "blocks height width"]:
        # Less is rounding of what the gap has taken away.
        is_seen = near[1] > ROUNDING * seeing_all[1]
        return jnp.where(is_seen, ratio(*near), 1)

    def completed(near: _Both) -> Float[Array, "blocks height width"]:
        return smoothing.completed(*both, *near)

    return rates_with_gaps(smoothing, jnp.stack(both), completed, means, gaps)


def rates_with_gaps(
    smoothing: Smoothing,
    images: _Smooth,
    completed: Callable[[_Smooth], _Rates],
    means: Callable[[_Smooth, _Smooth], _Rates],
    gaps: tuple[int, ...],
) -> list[_Rates]:
    """What `completed` makes of the smooth images, and for each gap that without the nearer
    blocks. `means` are those of order 2, of images with a gap and without one.

    A gap keeps a block's own noise out of G and of G∘G, but not out of what is smoothed
    twice. So what it changes is that of their difference, which beside clipped pixels is
    not the same as the background itself.
    """
    in_space = smoothing.sums_in_space(images)
    near = smoothing.sums_in_time(in_space)
    rates = completed(near)
    if not gaps:
        return [rates]
    wide, wide_in_space, wide_near = smoothing.widened(), in_space, near
    if smoothing.order == 4:
        wide_in_space = wide.sums_in_space(images)
        wide_near = wide.sums_in_time(wide_in_space)

    def of_difference(gap: int) -> _Rates:
        narrow = means(smoothing.with_gap(near, in_space, gap), near)
        if smoothing.order == 2:
            return narrow
        others = means(wide.with_gap(wide_near, wide_in_space, gap), wide_near)
        return jax.tree.map(lambda a, b: 2 * a - b, narrow, others)

    def changed(gap: int) -> _Rates:
        parts = rates, of_difference(gap), seeing_all
        return jax.tree.map(lambda rate, a, b: rate + a - b, *parts)

    seeing_all = of_difference(0)
    return [rates, *map(changed, gaps)]


def around_all_pixels(
    clip: SoftClip | None, like: Float[Array, "blocks height width"]
) -> Around | None:
    """What there is around pixels of frames like these, where all of them count."""
    if clip is None:
        return None
    # Not known to the compiler, which would work all this out itself, slowly.
    ones = lax.optimization_barrier(jnp.ones((1, 1, *like.shape[1:]), like.dtype))
    return around_pixels(clip.molecule_radius_pix / 2, ones)


def structure_share(kept: Float[Array, "..."]) -> Float[Array, "..."]:
    """How far pixels are structure of the background, and no molecules, by the share of
    weights that the clip leaves around them."""
    return jnp.clip((_MOST_CLIPPED - kept) / _CLIPPED_RANGE + 1, 0, 1)


def spread_bad_blocks(is_bad: Bool[Array, " blocks"], reach: int) -> Bool[Array, " blocks"]:
    """Which blocks have a bad one within reach."""
    return lax.reduce_window(is_bad, False, lax.bitwise_or, (2 * reach + 1,), (1,), "SAME")

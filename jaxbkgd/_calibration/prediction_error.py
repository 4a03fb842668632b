"""The error of a background, measured against frames that it has not seen."""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._estimators.background import Background
from .._estimators.base import AbstractEstimator, Prediction
from .._estimators.block_sums import around_pixels, sum_around, sum_frames
from .._estimators.channels import as_frames, Channels, is_sequence, map_channels
from .._estimators.smoothing import ratio
from .._estimators.soft_clip import SoftClip, squared_noise
from .._estimators.spatial_mean import spatial_mean


# The side of the squares of which means are compared with predictions.
REGION_PIX = 16
# The radius over which each frame's squared noise is averaged.
_NOISE_RADIUS_PIX = 14.0
# The variance of the second smallest of four standard normal numbers.
_SECOND_OF_FOUR_VARIANCE = 0.36
# A pixel's difference from other frames is limited to so many standard deviations before
# it is averaged over the frame, so that the mean does not follow molecules.
_LARGEST_DEVIATION = 3.0
# Above so many deviations of the noise a pixel is left out where frames are compared. Since
# that does not shift their mean, there may be many.
_TARGET_THRESHOLD = 1.5
# The light of a frame, as a share of the mean, below which it does not count.
_LEAST_LIGHT = 0.03

_Frames = Float[Array, "frames height width"]
_Light = Float[Array, " frames"]


class PredictionError(NamedTuple):
    """Of one channel: the mean square error of its background in each block of frames, and
    the variance of a frame's noise, both in the squared unit of the frames; and how much a
    pixel counts, from 0 to 1, in the frames that were compared."""

    squares: Float[Array, " blocks"]
    variance: Float[Array, ""]
    weights: _Frames


def prediction_errors(
    estimator: AbstractEstimator,
    channels: Channels,
    lag: int,
    molecule_radius_pix: float | None,
) -> tuple[list[PredictionError], Background]:
    """The error of each channel, and the background. Frames that are nearer than `lag`
    share molecules, which are left out if their radius is given.

    With the truth t, a prediction q (`far`) and two frames f and g in the light of one, all
    with independent noise, the mean of `(f - q)(g - q)` is `(q - t)^2`. With another
    prediction p (`near`) that has not seen f, `(p - t)^2` is more than that by
    `(p - q)(p + q - 2 t)`, in which f stands for t; and the background b, which has seen f,
    by `(b - p)(b + p - 2 t)`, in which q stands for t.
    """
    if estimator.sees_one_frame:
        background = estimator(channels)
        prediction = Prediction(background, background.bkgds, background.bkgds)
    else:
        prediction = estimator.predict(channels, lag)
    background, near, far, block_frames, compared_blocks = prediction
    light = map_channels(_known_light, background.bkgds, background.illumination)
    background = dataclasses.replace(background, illumination=light)
    error = ft.partial(
        _prediction_error,
        lag=lag,
        block_frames=block_frames,
        compared_blocks=compared_blocks,
        sees_one_frame=estimator.sees_one_frame,
        molecule_radius_pix=molecule_radius_pix,
    )
    errors = map_channels(error, channels, background.bkgds, near, far, light)
    return list(errors) if is_sequence(channels) else [errors], background


def _known_light(bkgds: _Frames, light: Float[Array, "*rank frames"] | None) -> _Light:
    if light is None:
        return jnp.ones(bkgds.shape[:1], bkgds.dtype)
    # Several patterns are one light on average.
    return light if light.ndim == 1 else jnp.mean(jnp.nan_to_num(bkgds), (1, 2))


def _prediction_error(
    channel: Any,
    bkgds: _Frames,
    near: _Frames,
    far: _Frames,
    light: _Light,
    *,
    lag: int,
    block_frames: int,
    compared_blocks: int,
    sees_one_frame: bool,
    molecule_radius_pix: float | None,
) -> PredictionError:
    """The mean square error of a channel's background."""
    frames = as_frames(channel).astype(bkgds.dtype)
    fewest = 2 * lag + 1 if sees_one_frame else lag + 1
    if frames.ndim != 3 or len(frames) < fewest:
        raise ValueError(
            f"A lag of {lag} frames needs at least {fewest} frames, in shape (frames, "
            f"height, width), but the shape is {frames.shape}; give more, or a shorter lag."
        )
    # Frames that are nearly dark are compared with none, which would be a noise over zero.
    is_lit = light > _LEAST_LIGHT * jnp.mean(jnp.maximum(light, 0))
    light = lax.stop_gradient(jnp.where(is_lit, light, 0))
    is_number = jnp.isfinite(frames) & jnp.isfinite(bkgds) & (light > 0)[:, None, None]
    frames, bkgds, near, far = (
        jnp.where(is_number, images, 0) for images in (frames, bkgds, near, far)
    )
    weights = is_number.astype(frames.dtype)
    if molecule_radius_pix is not None:
        weights = weights * _target_weights(frames, light, lag, molecule_radius_pix)
    # The variance of photons goes with the light.
    gains = _gains(light[:-lag], light[lag:])
    noise = jnp.square(frames[:-lag] - gains * frames[lag:]) / (1 + gains)
    both = weights[:-lag] * weights[lag:]
    variance = ratio(jnp.sum(noise * both), jnp.sum(both))
    if sees_one_frame:
        squares = _errors_beside(frames, weights, bkgds, light, lag)
    else:
        far = lax.stop_gradient(far)
        target = _Blocks(frames, weights, is_number, light, block_frames)
        squares = _errors_of_prediction(target, far, variance, lag, compared_blocks)
        nearer, change = near - far, bkgds - near
        added = nearer * (nearer - 2 * (frames - far))
        squares = squares + target.means(added, weights)
        added = change * (bkgds + near - 2 * far)
        squares = squares + target.means(added, is_number.astype(far.dtype))
    return PredictionError(squares, variance, weights)


def _errors_beside(
    frames: _Frames, weights: _Frames, bkgds: _Frames, light: _Light, lag: int
) -> Float[Array, " inner"]:
    """The squared error of backgrounds b, each of its frame alone: the mean of
    `(f - b)(g - b)`, in which f and g are frames at the lag before and after."""
    count = len(frames)
    inner = slice(lag, count - lag)
    missed = []
    for others in (slice(2 * lag, None), slice(count - 2 * lag)):
        gains = _gains(light[inner], light[others])
        above = gains * frames[others] - bkgds[inner]
        missed.append([weights[others] * above, weights[others]])
    return _product(*missed)


class _Blocks:
    """Sums of the frames that predictions are compared with, over blocks of them."""

    def __init__(
        self,
        frames: _Frames,
        weights: _Frames,
        is_number: Bool[Array, "frames height width"],
        light: _Light,
        length: int,
    ):
        self.length, self.light = length, light[:, None, None]
        self.lit = jnp.where(self.light > 0, self.light, 1)
        self.counts = self.sums(is_number.astype(frames.dtype))
        self.received = self.sums(weights * frames)
        self.exposed = self.sums(weights * jnp.maximum(self.light, 0))
        growth = self.light / jnp.mean(light)
        self.noise = jnp.sum(self.sums(growth * weights**2), (-2, -1))

    def sums(
        self, images: Float[Array, "frames _height _width"]
    ) -> Float[Array, "blocks _height _width"]:
        whole = images[: len(images) // self.length * self.length]
        return sum_frames(whole.reshape(-1, self.length, *images.shape[1:]))

    def means(self, images: _Frames, weights: _Frames) -> Float[Array, " blocks"]:
        """Of the pixels of each frame, and of these."""
        sums = jnp.sum(images * weights, (-2, -1)), jnp.sum(weights, (-2, -1))
        return self.sums(ratio(*sums)[:, None, None])[:, 0, 0] / self.length


def _errors_of_prediction(
    target: _Blocks,
    predictions: _Frames,
    variance: Float[Array, ""],
    lag: int,
    compared_blocks: int,
) -> Float[Array, " blocks"]:
    """The squared error of predictions q: the mean of `(f - q)(g - q)`, in which f is the
    mean of a block in the light of one, and g that of some others, so far away that they
    share neither noise nor molecules, and not seen by q either. Means over blocks make
    noise times noise small."""
    rates = ratio(target.sums(predictions / target.lit), target.counts)

    def missed(places: Any) -> list[Array]:
        exposed = target.exposed[places]
        return [target.received[places] - exposed * rates, exposed]

    count, length = len(rates), target.length
    # Blocks that are so far apart have no two frames that are nearer than the lag.
    gap = (lag + length - 2) // length + 1
    times = np.arange(count)
    steps = range(gap, gap + compared_blocks)

    def missed_by_others(sign: int) -> list[Array]:
        parts = [missed(_mirror(times + sign * step, times, count)) for step in steps]
        return [ft.reduce(jnp.add, images) for images in zip(*parts, strict=True)]

    own, later, earlier = missed(times), missed_by_others(1), missed_by_others(-1)
    squares = (_product(own, later) + _product(own, earlier)) / 2
    # Between regions, the noise of a block is small enough to be subtracted. So steps
    # count, which blocks before and after them see with opposite signs.
    own, later, earlier = (
        [region_sums(images) for images in block] for block in (own, later, earlier)
    )
    squares = squares - (_product(own, later) + _product(own, earlier)) / 2
    own_noise = ratio(variance * target.noise, jnp.sum(own[1] ** 2, (-2, -1)))
    squares = squares + _product(own, own) - own_noise
    return squares * target.sums(target.light**2)[:, 0, 0] / length


def _product(one: list[Array], other: list[Array]) -> Float[Array, " images"]:
    """The mean product of two means, which are given as sums and total weights."""
    sums, totals = (jnp.sum(a * b, (-2, -1)) for a, b in zip(one, other, strict=True))
    return ratio(sums, totals)


def region_sums(images: _Frames) -> Float[Array, "frames rows columns"]:
    """Sums over squares of 16 x 16 pixels, of which the last ones may be cut."""
    size_pix = REGION_PIX
    sizes = [-(-size // size_pix) for size in images.shape[1:]]
    ends = [n * size_pix - size for n, size in zip(sizes, images.shape[1:], strict=True)]
    images = jnp.pad(images, [(0, 0), (0, ends[0]), (0, ends[1])])
    parts = images.reshape(-1, sizes[0], size_pix, sizes[1], size_pix)
    return jnp.sum(jnp.sum(parts, 4), 2)


def _mirror(
    places: Int[np.ndarray, " count"], centres: Int[np.ndarray, " count"], length: int
) -> Int[np.ndarray, " count"]:
    """Places, or where there are none, those as far on the other side of their centres."""
    is_inside = (places >= 0) & (places < length)
    return np.where(is_inside, places, 2 * centres - places).clip(0, length - 1)


def _gains(light: _Light, others: _Light) -> Float[Array, "frames 1 1"]:
    """The light of frames over that of others, 1 where either is dark."""
    is_lit = (light > 0) & (others > 0)
    return jnp.where(is_lit, light / jnp.where(is_lit, others, 1), 1)[:, None, None]


def second_of_four(a: _Frames, b: _Frames, c: _Frames, d: _Frames) -> _Frames:
    """The second smallest, which a sort finds more slowly."""
    highest_low = jnp.maximum(jnp.minimum(a, b), jnp.minimum(c, d))
    lowest_high = jnp.minimum(jnp.maximum(a, b), jnp.maximum(c, d))
    return jnp.minimum(highest_low, lowest_high)


def _target_weights(
    frames: _Frames, light: _Light, lag: int, molecule_radius_pix: float
) -> _Frames:
    """Weights that leave molecules out of the frames.

    They do not depend on the estimator, whose errors would look like molecules. A molecule
    is brighter than at least three of the frames one and two lags before and after, once
    the change of the whole frame is subtracted.
    """
    ones = jnp.ones((1, *frames.shape[1:]), frames.dtype)
    around = around_pixels(molecule_radius_pix, ones)
    average = sum_around(frames, molecule_radius_pix) / around.totals
    times = np.arange(len(frames))
    others = []
    for step in (-2 * lag, -lag, lag, 2 * lag):
        places = _mirror(times + step, times, len(frames))
        others.append(_gains(light, light[places]) * average[places])
    second = second_of_four(*others)
    variance = spatial_mean(squared_noise(frames), _NOISE_RADIUS_PIX)
    variance = jnp.maximum(variance, jnp.finfo(frames.dtype).tiny)
    surplus = 1 + _SECOND_OF_FOUR_VARIANCE
    largest = _LARGEST_DEVIATION * jnp.sqrt(variance)
    change = jnp.clip(average - second, -largest, largest)
    reference = second + jnp.mean(change, (-2, -1), keepdims=True)
    deviations = around.norms / around.totals * jnp.sqrt(surplus * variance)
    clip = SoftClip(_TARGET_THRESHOLD)
    return clip.weights((average - reference) / deviations)

"""The error of a background, measured against frames that it has not seen."""

import functools as ft
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .._estimators.background import Background
from .._estimators.base import AbstractEstimator, Prediction
from .._estimators.block_sums import around_pixels, sum_around
from .._estimators.channels import as_frames, Channels, map_channels
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
# Twice the standard deviation of the image of a molecule, where the estimator has none.
_MOLECULE_RADIUS_PIX = 2.6

_Frames = Float[Array, "frames height width"]


class PredictionError(NamedTuple):
    """Of one channel: the mean square error of its background in each block of frames, and
    the variance of a frame's noise, both in the squared unit of the frames; and how much a
    pixel counts, from 0 to 1, in the frames that were compared."""

    squares: Float[Array, " blocks"]
    variance: Float[Array, ""]
    weights: _Frames


def prediction_errors(
    estimator: AbstractEstimator, channels: Channels, lag: int
) -> tuple[list[PredictionError], Background]:
    """The error of each channel, and the background. Frames that are nearer than `lag`
    share molecules."""
    if estimator.sees_one_frame:
        background = estimator(channels)
        light = map_channels(_mean_light, background.bkgds)
        background = Background(background.bkgds, background.noise_corrections, light)
        prediction = Prediction(background, background.bkgds, background.bkgds)
    else:
        prediction = estimator.predict(channels, lag)
    background, near, far, block_frames = prediction
    light = background.illumination
    if light is None:
        light = map_channels(lambda bkgds: jnp.ones(bkgds.shape[:1]), background.bkgds)
        background = Background(background.bkgds, background.noise_corrections, light)
    radius_pix = estimator.molecule_radius_pix
    error = ft.partial(
        prediction_error,
        lag=lag,
        block_frames=block_frames,
        sees_one_frame=estimator.sees_one_frame,
        molecule_radius_pix=_MOLECULE_RADIUS_PIX if radius_pix is None else radius_pix,
    )
    errors: list[PredictionError] = []
    images = background.bkgds, near, far, light
    map_channels(lambda *of_one: errors.append(error(*of_one)), channels, *images)
    return errors, background


def _mean_light(bkgds: _Frames) -> Float[Array, " frames"]:
    return lax.stop_gradient(jnp.mean(bkgds, (-2, -1)))


def prediction_error(
    channel: Any,
    bkgds: _Frames,
    near: _Frames,
    far: _Frames,
    light: Float[Array, " frames"],
    *,
    lag: int,
    block_frames: int,
    sees_one_frame: bool,
    molecule_radius_pix: float,
) -> PredictionError:
    """The mean square error of a channel's background, which molecules are left out of.

    With the truth t, a prediction q (`far`) and two frames f and g in the light of one, all
    with independent noise, the mean of `(f - q)(g - q)` is `(q - t)^2`. With another
    prediction p (`near`) that has not seen f, `(p - t)^2` is more than that by
    `(p - q)(p + q - 2 t)`, in which f stands for t; and the background b, which has seen f,
    by `(b - p)(b + p - 2 t)`, in which q stands for t. The first term is of sums over
    blocks of frames, so that noise times noise is small. Where the estimator sees
    a frame alone, p = q = b, and f and g are earlier and later frames.
    """
    frames = as_frames(channel).astype(bkgds.dtype)
    count, length = len(frames), block_frames
    light, far = lax.stop_gradient(light), lax.stop_gradient(far)
    is_lit = (light > 0)[:, None, None]
    is_number = jnp.isfinite(frames) & jnp.isfinite(bkgds) & is_lit
    frames, bkgds, near, far = (
        jnp.where(is_number, images, 0) for images in (frames, bkgds, near, far)
    )
    weights = is_number.astype(frames.dtype)
    weights = weights * _target_weights(frames, light, lag, molecule_radius_pix)
    shares = weights * jnp.where(is_lit, light[:, None, None], 0)
    lit = jnp.where(light > 0, light, 1)[:, None, None]

    def in_blocks(images: Array) -> Array:
        whole = images[: count // length * length]
        return jnp.sum(whole.reshape(-1, length, *images.shape[1:]), 1)

    received, exposed = in_blocks(weights * frames), in_blocks(shares)
    rates = ratio(in_blocks(far / lit), in_blocks(is_number.astype(far.dtype)))

    def missed(places: Any) -> list[Array]:
        """What other blocks have above the prediction, and their exposure."""
        return [received[places] - exposed[places] * rates, exposed[places]]

    def product(one: list[Array], other: list[Array]) -> Array:
        return ratio(*(jnp.sum(a * b, (-2, -1)) for a, b in zip(one, other, strict=True)))

    def in_regions(sums: list[Array]) -> list[Array]:
        return [region_sums(images) for images in sums]

    # Blocks that are so far apart have no two frames that are nearer than the lag.
    gap = (lag + length - 2) // length + 1
    later, earlier = (
        missed(_places(len(received), step, sees_one_frame)) for step in (gap, -gap)
    )
    # The variance of photons goes with the light.
    partner = _places(count, lag, sees_one_frame)
    gains = _gains(light, partner)
    noise = jnp.square(frames - gains * frames[partner]) / (1 + gains)
    both = weights * weights[partner]
    variance = ratio(jnp.sum(noise * both), jnp.sum(both))
    if sees_one_frame:
        squares = product(later, earlier)
    else:
        own = missed(slice(None))
        squares = (product(own, later) + product(own, earlier)) / 2
        # Between regions, the noise of a block is small enough to be subtracted. So steps
        # count, which blocks before and after them see with opposite signs.
        own, later, earlier = map(in_regions, (own, later, earlier))
        squares = squares - (product(own, later) + product(own, earlier)) / 2
        growth = (light / jnp.mean(light))[:, None, None]
        noise = variance * jnp.sum(in_blocks(growth * weights**2), (-2, -1))
        own_noise = ratio(noise, jnp.sum(own[1] ** 2, (-2, -1)))
        squares = squares + product(own, own) - own_noise
    squares = squares * in_blocks(jnp.square(light)[:, None, None])[:, 0, 0] / length

    def mean(images: Array, weights: Array) -> Array:
        return ratio(jnp.sum(images * weights, (-2, -1)), jnp.sum(weights, (-2, -1)))

    nearer = near - far
    added = mean(nearer * (nearer - 2 * (frames - far)), weights)
    change = bkgds - near
    added = added + mean(change * (bkgds + near - 2 * far), is_number.astype(far.dtype))
    squares = squares + in_blocks(added) / length
    return PredictionError(squares, variance, weights)


def region_sums(
    images: Float[Array, "frames height width"],
) -> Float[Array, "frames rows columns"]:
    """Sums over squares of 16 x 16 pixels, of which the last ones may be cut."""
    size_pix = REGION_PIX
    sizes = [-(-size // size_pix) for size in images.shape[1:]]
    ends = [n * size_pix - size for n, size in zip(sizes, images.shape[1:], strict=True)]
    images = jnp.pad(images, [(0, 0), (0, ends[0]), (0, ends[1])])
    parts = images.reshape(-1, sizes[0], size_pix, sizes[1], size_pix)
    return jnp.sum(jnp.sum(parts, 4), 2)


def _places(count: int, step: int, is_far: bool) -> Int[np.ndarray, " count"]:
    """The place `step` later for each of `count`; where there is none, as far on the other
    side, or twice as far."""
    times = np.arange(count)
    later = times + step
    is_inside = (later >= 0) & (later < count)
    return np.where(is_inside, later, times - (1 + is_far) * step).clip(0, count - 1)


def _gains(light: Float[Array, " frames"], others: Any) -> Float[Array, "frames 1 1"]:
    """The light of frames over that of others, 1 where either is dark."""
    is_lit = (light > 0) & (light[others] > 0)
    return jnp.where(is_lit, light / jnp.where(is_lit, light[others], 1), 1)[:, None, None]


def _target_weights(
    frames: _Frames, light: Float[Array, " frames"], lag: int, molecule_radius_pix: float
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
        is_inside = (times + step >= 0) & (times + step < len(frames))
        places = np.where(is_inside, times + step, times - step).clip(0, len(frames) - 1)
        others.append(_gains(light, places) * average[places])
    second = jnp.sort(jnp.stack(others), axis=0)[1]
    variance = spatial_mean(squared_noise(frames), _NOISE_RADIUS_PIX)
    variance = jnp.maximum(variance, jnp.finfo(frames.dtype).tiny)
    surplus = 1 + _SECOND_OF_FOUR_VARIANCE
    largest = _LARGEST_DEVIATION * jnp.sqrt(variance)
    change = jnp.clip(average - second, -largest, largest)
    reference = second + jnp.mean(change, (-2, -1), keepdims=True)
    deviations = around.norms / around.totals * jnp.sqrt(surplus * variance)
    clip = SoftClip(_TARGET_THRESHOLD)
    return clip.weights((average - reference) / deviations)

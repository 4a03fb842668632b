"""The loss of an estimator that sees several frames: its predictions of each frame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._estimators.base import AbstractEstimator, as_frames, Channels, map_channels
from .._estimators.soft_clip import SoftClip, squared_noise
from .._estimators.spatial_mean import spatial_mean


# The radius over which each frame's squared noise is averaged.
_NOISE_RADIUS_PIX = 14.0
# The variance of the second smallest of four standard normal numbers.
_SECOND_OF_FOUR_VARIANCE = 0.36
# A pixel's difference from other frames is limited to so many standard deviations before
# it is averaged over the frame, so that the mean does not follow molecules.
_LARGEST_DEVIATION = 3.0


def prediction_losses(
    estimator: AbstractEstimator, channels: Channels, lag: int
) -> Float[Array, " frames"]:
    """[`jaxbkgd.FramePairLoss`][] of each frame, averaged over channels.

    **Raises:**

    `ValueError` for an estimator that cannot predict, frames that are not `(frames, height,
    width)`, and fewer than `2 * lag + 2` of them.
    """
    if not estimator.can_predict:
        raise ValueError(
            "FramePairLoss needs an estimator that sees one frame at a time, or can "
            f"predict as LocalMean can, but {type(estimator).__name__} sees "
            f"{estimator.halo_frames} on either side; give another objective."
        )
    radius_pix = estimator.molecule_radius_pix
    clip = None if radius_pix is None else SoftClip(molecule_radius_pix=radius_pix)
    background, near, far = estimator.predict(channels, lag)

    def losses(channel: Any, bkgds: Array, near: Array, far: Array) -> Array:
        frames = as_frames(channel)
        if frames.ndim != 3:
            raise ValueError(
                "Frames must be (frames, height, width), but their shape is "
                f"{frames.shape}."
            )
        frames = frames.astype(bkgds.dtype)
        return _frame_prediction_losses(frames, bkgds, near, far, lag, clip)

    every = map_channels(losses, channels, background.bkgds, near, far)
    return jnp.mean(jnp.stack(jax.tree.leaves(every)), axis=0)


def _frame_prediction_losses(
    frames: Float[Array, "frames height width"],
    bkgds: Float[Array, "frames height width"],
    near: Float[Array, "frames height width"],
    far: Float[Array, "frames height width"],
    lag: int,
    clip: SoftClip | None,
) -> Float[Array, " frames"]:
    """For each frame, the mean square error of its background over the variance of its
    pixels, both weighted by a clip of their own.

    With the truth t, the prediction p (`near`) and `change = bkgd - p`, the squared error
    `(bkgd - t)^2` is `(p - t)^2 + change (bkgd + p - 2 t)`. In the first term the frame
    stands for the truth, since the prediction has not seen its noise. In the second term
    the prediction from farther frames does, which has seen none of the frames that the
    change comes from.
    """
    # The frame `lag` later, or earlier where there is none.
    partner = np.arange(len(frames)) + lag
    partner = np.where(partner < len(frames), partner, partner - 2 * lag)
    weights, targets = jnp.ones_like(frames), frames
    if clip is not None:
        weights, bias = _target_weights(frames, lag, clip)
        targets = frames - bias

    def mean(images: Array, weights: Array) -> Array:
        return jnp.sum(images * weights, (-2, -1)) / jnp.sum(weights, (-2, -1))

    change = bkgds - near
    missed = mean(jnp.square(targets - near), weights)
    changed = jnp.mean(change * (bkgds + near - 2 * lax.stop_gradient(far)), (-2, -1))
    noise = mean(jnp.square(targets - targets[partner]) / 2, weights * weights[partner])
    is_noisy = noise > 0
    losses = (missed - noise + changed) / jnp.where(is_noisy, noise, 1)
    return jnp.where(is_noisy, losses, 0)


def _target_weights(
    frames: Float[Array, "frames height width"], lag: int, clip: SoftClip
) -> tuple[Float[Array, "frames height width"], Float[Array, "frames height width"]]:
    """Weights that leave molecules out of the frames, and the shift that they cause in pure
    noise, in the unit of the frames.

    They do not depend on the estimator, whose errors would look like molecules. A molecule
    is brighter than at least three of the frames one and two lags before and after, once
    the change of the whole frame is subtracted.
    """
    average = clip.molecule_average(frames)
    times, last = np.arange(len(frames)), len(frames) - 1
    others = []
    for step in (-2 * lag, -lag, lag, 2 * lag):
        is_inside = (times + step >= 0) & (times + step <= last)
        places = np.where(is_inside, times + step, times - step).clip(0, last)
        others.append(average[places])
    lower = jnp.minimum(others[0], others[1]), jnp.minimum(others[2], others[3])
    upper = jnp.maximum(others[0], others[1]), jnp.maximum(others[2], others[3])
    second = jnp.minimum(jnp.maximum(*lower), jnp.minimum(*upper))

    variance = spatial_mean(squared_noise(frames), _NOISE_RADIUS_PIX)
    variance = jnp.maximum(variance, jnp.finfo(frames.dtype).tiny)
    surplus = 1 + _SECOND_OF_FOUR_VARIANCE
    largest = _LARGEST_DEVIATION * jnp.sqrt(variance)
    change = jnp.clip(average - second, -largest, largest)
    reference = second + jnp.mean(change, (-2, -1), keepdims=True)
    correlation, deviation = (
        jnp.asarray(image, frames.dtype)[None]
        for image in clip.average_response(*frames.shape[1:])
    )
    weights = clip.weights(average, reference, surplus * variance, deviation)
    bias = clip.noise_bias() * correlation * jnp.sqrt(variance / surplus)
    return weights, bias.astype(frames.dtype)

"""Objectives: what calibration minimises, a function of an estimator and some frames."""

import functools as ft
from typing import Any, Protocol, runtime_checkable, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .._estimators.base import AbstractEstimator
from .._estimators.block_sums import around_pixels, sum_around
from .._estimators.channels import as_frames, Channels, map_channels
from .._estimators.checks import checked_count
from .._estimators.soft_clip import SoftClip, squared_noise
from .._estimators.spatial_mean import spatial_mean
from .lag import decorrelation_lag


# Blocks of frames whose losses count as independent, where each is predicted from many.
_PREDICTION_BLOCKS = 16

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

_Frames = Float[Array, "frames height width"]


@runtime_checkable
class Objective(Protocol):
    """What [`jaxbkgd.calibrate`][] minimises: any callable of this signature, which JAX can
    differentiate with respect to the estimator.

    Its arrays are best kept in an `equinox.Module`; all else in it must be hashable.

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import jaxbkgd
        >>> def roughness(estimator, channels, frame_indices):
        ...     residuals = estimator(channels).residuals(channels)
        ...     return jnp.mean(jnp.square(jnp.diff(residuals, axis=-1)))
        >>> isinstance(roughness, jaxbkgd.Objective)
        True

        ```
    """

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"],
    ) -> Float[Array, ""]:
        """The loss of a window, one real number, from the estimator with its present
        parameters, the window's frames, in the structure that `calibrate` was given, and
        their places in the movie. `calibrate` averages it over windows."""
        ...


class FramePairLoss(eqx.Module):
    """The error of the background against frames `lag` later and earlier: no truth needed.

    Noise and molecules of two frames are independent if the lag exceeds the time that
    molecules stay on. Then the mean square of `frames[t + lag] - bkgds[t]`, less half that
    of `frames[t + lag] - frames[t]`, is the mean square error of the background. The loss
    is this over the second term, a frame's variance, averaged over all pairs and both
    directions of time. (The mean light of the molecules counts as background.) See
    [Calibration](calibration.md#why-it-needs-no-truth).

    For an estimator that sees several frames, as [`jaxbkgd.LocalMean`][], a frame is
    compared with what its method `predict` makes of the frames that are at least `lag`
    away; the background is taken to be steady over about the lag. If the estimator clips
    molecules, they are clipped in the frame, too; threshold and softness are not learned.

    **Arguments:**

    - `lag`: frames between the two of a pair, a whole number from 1 on. By default it is
        found from the movie, so that its molecules no longer correlate.
    """

    lag: int | None = eqx.field(static=True)

    def __init__(self, lag: SupportsIndex | None = None):
        remedy = "leave it out to have it found from the movie"
        self.lag = None if lag is None else checked_count("lag", lag, remedy=remedy)

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, ""]:
        """The loss without unit; see [`jaxbkgd.Objective`][]. Without `frame_indices`, the
        frames are consecutive; without a lag, `fitted` finds it. `ValueError` for too few
        frames, and an estimator that sees other frames and cannot predict."""
        return jnp.mean(self._losses(estimator, channels, frame_indices))

    def independent_losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"],
    ) -> Float[Array, " blocks"]:
        """Losses of blocks of pairs, from whose scatter the uncertainty of radii follows.

        The noise of the frames as targets moves the minimum away from that of the true
        error. The noise of the same frames as sources moves both minima, with the opposite
        effect. So a block has pairs of one direction and is no longer than the lag: no
        frame is both. The other direction adds nothing, since its products of noise and
        background are the same.
        """
        forward, *_ = self._losses(estimator, channels, frame_indices)
        lag = self.lag or decorrelation_lag(channels)
        is_of_pairs = not estimator.halo_frames
        count = -(-len(forward) // lag) if is_of_pairs else _PREDICTION_BLOCKS
        count = min(count, len(forward))
        blocks = np.arange(len(forward)) * count // len(forward)
        sums = jax.ops.segment_sum(forward, blocks, count)
        return sums / np.bincount(blocks).astype(forward.dtype)

    def _losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None,
    ) -> Float[Array, "directions pairs"]:
        """The losses of all pairs forward and backward in time, or of all predictions."""
        lag = self.lag or decorrelation_lag(channels)
        if not estimator.halo_frames:

            def loss(channel: Any, bkgds: Array) -> Array:
                is_run = frame_indices is None or len(channel) > 2 * lag
                distance = lag if is_run else len(channel) // 2
                return _pair_losses(as_frames(channel).astype(bkgds.dtype), bkgds, distance)

            return _channel_mean(map_channels(loss, channels, estimator(channels).bkgds))
        if not estimator.can_predict:
            raise ValueError(
                f"{type(estimator).__name__} has no predict, which FramePairLoss needs of "
                f"estimators that see other frames ({estimator.halo_frames} on either side)"
                "; LocalMean has. Give another objective."
            )
        radius_pix = estimator.molecule_radius_pix
        clip = None
        if radius_pix is not None:
            clip = SoftClip(_TARGET_THRESHOLD, molecule_radius_pix=radius_pix)
        background, near, far = estimator.predict(channels, lag)
        light = background.illumination
        if light is None:
            light = map_channels(lambda bkgd: jnp.ones(bkgd.shape[:1]), background.bkgds)
        losses = ft.partial(_prediction_losses, lag=lag, clip=clip)
        losses = map_channels(losses, channels, background.bkgds, near, far, light)
        return _channel_mean(losses)[None]

    def fitted(self, source: Any) -> "FramePairLoss":
        """This objective with the lag of a movie, as [`jaxbkgd.calibrate`][] takes it,
        unless it has a lag already. `ValueError` where none can be found; it warns where
        molecules stay on for long."""
        return self if self.lag is not None else type(self)(decorrelation_lag(source))


class TruthLoss(eqx.Module):
    """The mean square error against a known background, over all channels.

    **Arguments:**

    - `bkgds`: the true background in the unit of the frames, `(frames, height, width)`, or
        `(height, width)` where it is steady; or a list or tuple of them, one a channel.
    """

    bkgds: Array | list[Array] | tuple[Array, ...]

    def __init__(self, bkgds: Channels):
        self.bkgds = map_channels(as_frames, bkgds)

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, ""]:
        """The loss in the squared unit of the frames; see [`jaxbkgd.Objective`][]. Without
        `frame_indices`, the channels are the whole movie. `ValueError` for a truth of
        another shape, or for other channels."""

        def loss(bkgd: Array, truth: Array) -> Array:
            if truth.ndim == 3 and frame_indices is not None:
                truth = truth[frame_indices]
            if truth.shape not in (bkgd.shape, bkgd.shape[1:]):
                raise ValueError(
                    f"The frames have shape {bkgd.shape}, but their true background has "
                    f"{truth.shape}; give one image, or one for each frame."
                )
            truth = jnp.broadcast_to(truth, bkgd.shape).astype(bkgd.dtype)
            return jnp.mean(jnp.square(bkgd - truth))

        return _channel_mean(map_channels(loss, estimator(channels).bkgds, self.bkgds))


def _channel_mean(losses: Any) -> Array:
    return jnp.mean(jnp.stack(jax.tree.leaves(losses)), axis=0)


def _pair_losses(frames: _Frames, bkgds: _Frames, distance: int) -> Float[Array, "2 pairs"]:
    """Forward and backward losses of frames that are `distance` places apart."""
    if frames.ndim != 3 or not 0 < distance < len(frames):
        raise ValueError(
            f"Frames {distance} apart make no pair in shape {frames.shape}; give (frames, "
            f"height, width) with at least {distance + 1} frames, or a shorter lag."
        )
    before, after = frames[:-distance], frames[distance:]
    # Half the square is subtracted pixel by pixel: the loss is a small part of both sums,
    # and would be lost in their rounding.
    noise = jnp.square(after - before) / 2
    forward = jnp.square(after - bkgds[:-distance]) - noise
    backward = jnp.square(before - bkgds[distance:]) - noise
    variance = jnp.mean(noise, axis=(-2, -1))
    # Two equal frames, such as blank ones, carry no information.
    weights = jnp.where(variance > 0, 1 / jnp.where(variance > 0, variance, 1), 0)
    return weights[None] * jnp.mean(jnp.stack([forward, backward]), axis=(-2, -1))


def _prediction_losses(
    channel: Any,
    bkgds: _Frames,
    near: _Frames,
    far: _Frames,
    light: Float[Array, " frames"],
    *,
    lag: int,
    clip: SoftClip | None,
) -> Float[Array, " frames"]:
    """The mean square error of each background over the variance of the frame's pixels,
    both weighted by a clip of their own.

    With the truth t, the prediction p (`near`) and `change = bkgd - p`, the squared error
    `(bkgd - t)^2` is `(p - t)^2 + change (bkgd + p - 2 t)`. In the first term the frame
    stands for the truth, since the prediction has not seen its noise. In the second term
    the prediction from farther frames does, which has not seen those that change it.
    """
    frames = as_frames(channel).astype(bkgds.dtype)
    light = lax.stop_gradient(light)
    # The frame `lag` later, or earlier where there is none, in the light of this one.
    partner = np.arange(len(frames)) + lag
    partner = np.where(partner < len(frames), partner, partner - 2 * lag)
    gain = _gains(light, partner)
    weights = jnp.ones_like(frames)
    if clip is not None:
        weights = _target_weights(frames, light, lag, clip)

    def mean(images: Array, weights: Array) -> Array:
        return jnp.sum(images * weights, (-2, -1)) / jnp.sum(weights, (-2, -1))

    change = bkgds - near
    missed = mean(jnp.square(frames - near), weights)
    changed = jnp.mean(change * (bkgds + near - 2 * lax.stop_gradient(far)), (-2, -1))
    # The variance of photons goes with the light.
    pairs = jnp.square(frames - gain * frames[partner]) / (1 + gain)
    noise = mean(pairs, weights * weights[partner])
    losses = (missed - noise + changed) / jnp.where(noise > 0, noise, 1)
    return jnp.where(noise > 0, losses, 0)


def _gains(light: Float[Array, " frames"], others: Any) -> Float[Array, "frames 1 1"]:
    """The light of frames over that of others, 1 where either is dark."""
    is_lit = (light > 0) & (light[others] > 0)
    return jnp.where(is_lit, light / jnp.where(is_lit, light[others], 1), 1)[:, None, None]


def _target_weights(
    frames: _Frames, light: Float[Array, " frames"], lag: int, clip: SoftClip
) -> _Frames:
    """Weights that leave molecules out of the frames.

    They do not depend on the estimator, whose errors would look like molecules. A molecule
    is brighter than at least three of the frames one and two lags before and after, once
    the change of the whole frame is subtracted.
    """
    ones = jnp.ones((1, *frames.shape[1:]), frames.dtype)
    around = around_pixels(clip.molecule_radius_pix, ones)
    average = sum_around(frames, clip.molecule_radius_pix) / around.totals
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
    return clip.weights((average - reference) / deviations)

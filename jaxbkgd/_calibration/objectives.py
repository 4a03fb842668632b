"""Objectives: what calibration minimises, a function of an estimator and some frames."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from .._estimators.base import AbstractEstimator, as_frames, Channels, map_channels
from .._estimators.checks import checked_count
from .._movies.movie import Channel
from .lag import decorrelation_lag
from .predictions import prediction_losses


# Blocks of frames in a window whose losses count as independent, where each frame is
# predicted from many.
_PREDICTION_BLOCKS = 16


@runtime_checkable
class Objective(Protocol):
    """What [`jaxbkgd.calibrate`][] minimises: any callable of this signature, which JAX can
    differentiate with respect to the estimator.

    Arrays that belong to it are best kept in an `equinox.Module`; a plain function works,
    too. All else that it holds must be hashable.

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
        """**Arguments:**

        - `estimator`: the estimator with its present parameters.
        - `channels`: a window of the movie, `(frames, height, width)`; for several
            channels, a list or tuple of these, as `calibrate` was given them.
        - `frame_indices`: the places of these frames in the movie, `(frames,)`.

        **Returns:**

        The loss of this window, one real number, shape `()`. `calibrate` averages it over
        all windows.
        """
        ...


class FramePairLoss(eqx.Module):
    """The error of the background against frames `lag` later and earlier: no truth needed.

    A frame is the sum of its background, its molecules and noise. The noise of two frames
    is independent, and so are their molecules if the lag exceeds the time that they stay
    on. Then the mean square of `frames[t + lag] - bkgds[t]` is that of `bkgds[t]` less the
    true background, plus the variance of a frame about it. This variance does not depend
    on the estimator, and is half the mean square of `frames[t + lag] - frames[t]`. The loss
    is the first less the second, over the second, averaged over all pairs and both
    directions of time: the mean square error of the background over the variance of a
    frame. (The mean light of the molecules counts as background.) It is derived in
    [Calibration](calibration.md#why-it-needs-no-truth).

    A pair is weighted by its noise, with one number for all of its pixels. A weight for
    each pixel would move the minimum to another radius.

    An estimator that sees several frames has seen the later one, too. Of such an estimator,
    as [`jaxbkgd.LocalMean`][], a frame is compared with what its method `predict` makes of
    the frames that are at least `lag` away, and the background is taken to be steady over
    about the lag. If the estimator clips molecules, they are clipped in the frame, too, so
    that they do not count as background; threshold and softness are not learned, since
    clipped pixels are not compared.

    **Arguments:**

    - `lag`: frames between the two of a pair. By default it is found from the movie, so
        that its molecules no longer correlate.

    **Raises:**

    `ValueError` for a lag that is not a whole number from 1.
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
        """See [`jaxbkgd.Objective`][] for the arguments. Without `frame_indices`, the
        frames are consecutive.

        **Returns:**

        The loss, a number without unit.

        **Raises:**

        `ValueError` for frames that are not `(frames, height, width)`, or too few for the
        lag, and for an estimator that sees other frames and cannot predict. Without a lag,
        as `fitted` does.
        """
        if estimator.halo_frames:
            return jnp.mean(
                prediction_losses(estimator, channels, _lag_for(self, channels))
            )
        forward, backward = _pair_losses(self, estimator, channels, frame_indices)
        return jnp.mean(forward + backward) / 2

    def fitted(self, source: Any) -> "FramePairLoss":
        """This objective with the lag of a movie, unless it has a lag already.

        **Arguments:**

        - `source`: the movie, as [`jaxbkgd.calibrate`][] takes it.

        **Raises:**

        `ValueError` for frames that are traced, fewer than 3, or not finite, and where
        nothing changes from one to the next. It warns where molecules stay on for long.
        """
        return self if self.lag is not None else type(self)(decorrelation_lag(source))


class TruthLoss(eqx.Module):
    """The mean square error against a known background, over all channels.

    For simulations, and for slides whose background was recorded without molecules.

    **Arguments:**

    - `bkgds`: the true background in the unit of the frames, `(frames, height, width)`, or
        `(height, width)` where it is steady; or a list or tuple of them, one a channel.

    **Raises:**

    `TypeError` or `ValueError` for backgrounds that are not real images.
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
        """See [`jaxbkgd.Objective`][] for the arguments. Without `frame_indices`, the
        channels are the whole movie.

        **Returns:**

        The loss, a number in the squared unit of the frames.

        **Raises:**

        `ValueError` for a truth of another shape, or for other channels. An index beyond
        its last frame is not noticed; `calibrate` asks for one truth for each frame.
        """

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


def objective_for(channels: Sequence[Channel], objective: Objective) -> Objective:
    """The objective for a movie, with its lag if it has none.

    **Raises:**

    `ValueError` for a movie of which no lag is found, and for a truth that is not as long:
    within `jax.jit`, an index beyond the last frame is not noticed.
    """
    if isinstance(objective, FramePairLoss):
        return objective.fitted(channels)
    if isinstance(objective, TruthLoss):
        for truth in jax.tree.leaves(objective.bkgds):
            if truth.ndim == 3 and len(truth) != len(channels[0]):
                raise ValueError(
                    f"The movie has {len(channels[0])} frames, but the true background "
                    f"{len(truth)}; give one image, or one for each frame."
                )
    return objective


def block_losses(
    objective: FramePairLoss,
    estimator: AbstractEstimator,
    channels: Channels,
    frame_indices: Int[Array, " frames"],
) -> Float[Array, " blocks"]:
    """Losses of blocks of pairs, from whose scatter the uncertainty of the radii follows.

    What moves the minimum away from that of the true error is the noise of the frames as
    targets. The noise of the same frames as sources, which moves both minima, has the
    opposite effect. So a block has pairs of one direction and is no longer than the lag: no
    frame is both. The other direction adds nothing, since its products of noise and
    background are the same.
    """
    if estimator.halo_frames:
        forward = prediction_losses(estimator, channels, _lag_for(objective, channels))
        count = min(_PREDICTION_BLOCKS, len(forward))
    else:
        forward, _ = _pair_losses(objective, estimator, channels, frame_indices)
        count = -(-len(forward) // _lag_for(objective, channels))
    # Blocks as equal as possible; one segment sum compiles faster than a sum for each.
    block_of_pair = np.arange(len(forward)) * count // len(forward)
    sums = jax.ops.segment_sum(forward, block_of_pair, count)
    return sums / np.bincount(block_of_pair).astype(forward.dtype)


def _lag_for(objective: FramePairLoss, channels: Channels) -> int:
    return decorrelation_lag(channels) if objective.lag is None else objective.lag


def _channel_mean(losses: Any) -> Array:
    return jnp.mean(jnp.stack(jax.tree.leaves(losses)), axis=0)


def _pair_losses(
    objective: FramePairLoss,
    estimator: AbstractEstimator,
    channels: Channels,
    frame_indices: Int[Array, " frames"] | None,
) -> Float[Array, "2 pairs"]:
    """Losses of all pairs, forward and backward in time, averaged over channels."""
    lag = _lag_for(objective, channels)

    def losses(channel: Any, bkgds: Array) -> Array:
        frames = as_frames(channel)
        if frames.ndim != 3 or len(frames) <= (1 if frame_indices is not None else lag):
            raise ValueError(
                f"Frames {lag} apart make no pair in frames of shape {frames.shape}; "
                f"give (frames, height, width) with at least {lag + 1} frames, or a "
                "shorter lag."
            )
        is_run = frame_indices is None or len(frames) > 2 * lag
        return _frame_pair_losses(frames, bkgds, lag if is_run else len(frames) // 2)

    return _channel_mean(map_channels(losses, channels, estimator(channels).bkgds))


def _frame_pair_losses(
    frames: Shaped[Array, "frames height width"],
    bkgds: Float[Array, "frames height width"],
    distance: int,
) -> Float[Array, "2 pairs"]:
    """Forward and backward losses of frames that are `distance` places apart."""
    frames = frames.astype(bkgds.dtype)
    before, after = frames[:-distance], frames[distance:]
    # Half the square is subtracted pixel by pixel: the loss is a small part of both sums,
    # and would be lost in their rounding.
    noise = jnp.square(after - before) / 2
    forward = jnp.square(after - bkgds[:-distance]) - noise
    backward = jnp.square(before - bkgds[distance:]) - noise
    variance = jnp.mean(noise, axis=(-2, -1))
    # Two equal frames, such as blank ones, carry no information.
    weights = jnp.where(variance > 0, 1 / jnp.where(variance > 0, variance, 1), 0)
    means = [jnp.mean(images, axis=(-2, -1)) for images in (forward, backward)]
    return weights[None] * jnp.stack(means)

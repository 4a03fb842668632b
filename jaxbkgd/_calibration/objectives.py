"""What calibration minimises: functions of an estimator and some frames of a movie."""

import functools as ft
import math
import warnings
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from .._estimators.base import AbstractEstimator
from .._estimators.channels import as_frames, Channels, map_channels
from .._estimators.soft_clip import SoftClip, squared_noise
from .._estimators.spatial_mean import spatial_mean


# Blocks of frames whose losses are told apart, where each is predicted from many.
_PREDICTION_BLOCKS = 16


@runtime_checkable
class Objective(Protocol):
    """A loss that calibration minimises: any callable with this signature.

    An objective that compares frames with those `lag` frames later has an attribute `lag`.
    Then a window has some frames and, after them, as many that are `lag` frames later;
    where the two overlap, and for an estimator with a halo, it is one run of consecutive
    frames.
    """

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"],
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `estimator`: the estimator as it is learned.
        - `channels`: a window of the movie, `(frames, height, width)`, in the structure
            that `calibrate` was given.
        - `frame_indices`: the places of these frames in the movie.

        **Returns:**

        One real number.
        """
        ...


class FramePairLoss(eqx.Module):
    """The error of the background against frames `lag` later and earlier: no truth needed.

    A frame is its background, its molecules and noise. The noise of two frames is
    independent, and so are their molecules if the lag exceeds the time that they stay on.
    Then the mean square of `frames[t + lag] - bkgds[t]` is that of `bkgds[t]` less the true
    background, plus the variance of a frame about it. That does not depend on the
    estimator, and is half the mean square of `frames[t + lag] - frames[t]`. The loss is the
    first less the second, over the second, averaged over all pairs and both directions of
    time: the mean square error of the background over the variance of a frame. (The mean
    light of the molecules counts as background.) It is derived in
    [Calibration](calibration.md#why-it-needs-no-truth).

    So a pair is weighted by its noise, with one number for all of its pixels. A weight of
    each pixel's own would move the minimum to another radius.

    An estimator that sees many frames has seen the later one too. Of such a one, as
    [`jaxbkgd.LocalMean`][], a frame is compared with what its method `predict` makes of
    the frames that are at least `lag` away, and the background is taken to be steady over
    about the lag. If it clips molecules, they are clipped in what it is compared with, too,
    so that they do not count as background; threshold and softness are not learned, since
    what is clipped is not compared.

    **Arguments:**

    - `lag`: frames between the two of a pair. By default it is found from the movie, so
        that its molecules no longer correlate.

    **Raises:**

    `ValueError` for a lag that is not a whole number from 1.
    """

    lag: int | None = eqx.field(static=True)

    def __init__(self, lag: Any = None):
        is_count = isinstance(lag, int | np.integer) and not isinstance(lag, bool)
        if lag is not None and not (is_count and lag >= 1):
            raise ValueError(
                f"lag must be a whole number of frames, at least 1, but is {lag!r}; leave "
                "it out to have it found from the movie."
            )
        self.lag = None if lag is None else int(lag)

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, ""]:
        """See [`jaxbkgd.calibrate`][] for the arguments. Without `frame_indices`, the
        frames are consecutive.

        **Returns:**

        The loss, a number without unit.

        **Raises:**

        `ValueError` for frames that are not `(frames, height, width)`, or too few for the
        lag, and for an estimator that sees other frames and has no `predict`. Without a
        lag, as `fitted` does.
        """
        if estimator.halo_frames:
            return jnp.mean(self._prediction_losses(estimator, channels))
        forward, backward = self._pair_losses(estimator, channels, frame_indices)
        return jnp.mean(forward + backward) / 2

    def independent_losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"],
    ) -> Float[Array, " blocks"]:
        """Losses of blocks of pairs, from whose scatter `calibrate` has its uncertainty.

        What moves the minimum away from that of the true error is the noise of the frames
        as targets. The noise of the same frames as sources, which moves both minima, goes
        the other way. So a block has pairs of one direction and is no longer than the lag:
        no frame is both. The other direction adds nothing, since its products of noise and
        background are the same.
        """
        assert self.lag is not None
        if estimator.halo_frames:
            forward = self._prediction_losses(estimator, channels)
            count = min(_PREDICTION_BLOCKS, len(forward))
        else:
            forward, _ = self._pair_losses(estimator, channels, frame_indices)
            count = -(-len(forward) // self.lag)
        # As even as they can be, and one sum: a program of each block compiles for long.
        block_of_pair = np.arange(len(forward)) * count // len(forward)
        sums = jax.ops.segment_sum(forward, block_of_pair, count)
        return sums / np.bincount(block_of_pair).astype(forward.dtype)

    def fitted(self, channels: Any) -> "FramePairLoss":
        """This objective with the lag of the movie, if it has none of its own.

        **Arguments:**

        - `channels`: the movie `(frames, height, width)`, or a list or tuple, one a
            channel.

        **Raises:**

        `ValueError` for frames that are traced, fewer than 3, or not finite, and where
        nothing changes from one to the next. It warns where molecules stay on for long.
        """
        return self if self.lag is not None else type(self)(decorrelation_lag(channels))

    def _prediction_losses(
        self, estimator: AbstractEstimator, channels: Channels
    ) -> Float[Array, " frames"]:
        """Of each frame, the mean over channels."""
        lag = self.lag
        if lag is None:
            lag = decorrelation_lag(channels)
        if not estimator.can_predict:
            raise ValueError(
                "FramePairLoss needs an estimator that sees one frame at a time, or has a "
                f"method `predict` as LocalMean has, but {type(estimator).__name__} sees "
                f"{estimator.halo_frames} on either side; give another objective."
            )
        radius_pix = estimator.molecule_radius_pix
        clip = None if radius_pix is None else SoftClip(molecule_radius_pix=radius_pix)

        def checked(channel):
            frames = as_frames(channel)
            if frames.ndim != 3:
                raise ValueError(
                    f"Frames must be (frames, height, width), but their shape is "
                    f"{frames.shape}."
                )
            return frames

        channels = map_channels(checked, channels)
        background, prediction, farther = estimator.predict(channels, lag)

        def losses(frames, bkgds, prediction, farther):
            frames = frames.astype(bkgds.dtype)
            return _frame_prediction_losses(frames, bkgds, prediction, farther, lag, clip)

        every = map_channels(losses, channels, background.bkgds, prediction, farther)
        return jnp.mean(jnp.stack(jax.tree.leaves(every)), axis=0)

    def _pair_losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None,
    ) -> Float[Array, "2 pairs"]:
        """Of each pair, forward and backward in time, the mean over channels."""
        lag = self.lag
        if lag is None:
            lag = decorrelation_lag(channels)

        def losses(channel, bkgds):
            frames = as_frames(channel)
            if frames.ndim != 3 or len(frames) <= (1 if frame_indices is not None else lag):
                raise ValueError(
                    f"Frames {lag} apart make no pair in frames of shape {frames.shape}; "
                    f"give (frames, height, width) with at least {lag + 1} frames, or a "
                    "shorter lag."
                )
            is_run = frame_indices is None or len(frames) > 2 * lag
            return _frame_pair_losses(frames, bkgds, lag if is_run else len(frames) // 2)

        every = map_channels(losses, channels, estimator(channels).bkgds)
        return jnp.mean(jnp.stack(jax.tree.leaves(every)), axis=0)


class TruthLoss(eqx.Module):
    """The mean square error against a background that is known, over all channels.

    For simulations, and for slides whose background was recorded without molecules.

    **Arguments:**

    - `bkgds`: the true background in the unit of the frames, `(frames, height, width)`, or
        `(height, width)` where it is steady; or a list or tuple of them, one a channel.

    **Raises:**

    `TypeError` or `ValueError` for backgrounds that are not real images.
    """

    bkgds: Any

    def __init__(self, bkgds: Any):
        self.bkgds = map_channels(as_frames, bkgds)

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, ""]:
        """See [`jaxbkgd.calibrate`][] for the arguments. Without `frame_indices`, the
        channels are the whole movie.

        **Returns:**

        The loss, a number in the squared unit of the frames.

        **Raises:**

        `ValueError` for a truth of another shape, or for other channels. An index beyond
        its last frame is not noticed; `calibrate` asks for one truth for each frame.
        """

        def loss(bkgd, truth):
            if truth.ndim == 3 and frame_indices is not None:
                truth = truth[frame_indices]
            if truth.shape not in (bkgd.shape, bkgd.shape[1:]):
                raise ValueError(
                    f"The frames have shape {bkgd.shape}, but their true background has "
                    f"{truth.shape}; give one image, or one for each frame."
                )
            return jnp.mean(jnp.square(bkgd - truth))

        losses = map_channels(loss, estimator(channels).bkgds, self.bkgds)
        return jnp.mean(jnp.stack(jax.tree.leaves(losses)))

    def check_frames(self, frame_count: int) -> None:
        """Raises `ValueError` unless there is a truth for each frame of the movie: within
        `jax.jit`, an index beyond the last is not noticed."""
        for truth in jax.tree.leaves(self.bkgds):
            if truth.ndim == 3 and len(truth) != frame_count:
                raise ValueError(
                    f"The movie has {frame_count} frames, but the true background "
                    f"{len(truth)}; give one image, or one for each frame."
                )


def _frame_pair_losses(
    frames: Shaped[Array, "frames y x"], bkgds: Float[Array, "frames y x"], places: int
) -> Float[Array, "2 pairs"]:
    """Forward and backward, of frames so many places apart."""
    frames = frames.astype(bkgds.dtype)
    before, after = frames[:-places], frames[places:]
    # Half the square is subtracted pixel by pixel, while it is of the size of the rest:
    # what is sought is a small part of both, and their sums would be rounded.
    noise = jnp.square(after - before) / 2
    forward = jnp.square(after - bkgds[:-places]) - noise
    backward = jnp.square(before - bkgds[places:]) - noise
    variance = jnp.mean(noise, axis=(-2, -1))
    # Two frames that are equal, as blank ones are, say nothing.
    weights = jnp.where(variance > 0, 1 / jnp.where(variance > 0, variance, 1), 0)
    means = [jnp.mean(images, axis=(-2, -1)) for images in (forward, backward)]
    return weights * jnp.stack(means)


def _frame_prediction_losses(
    frames: Float[Array, "frames y x"],
    bkgds: Float[Array, "frames y x"],
    predictions: Float[Array, "frames y x"],
    farther: Float[Array, "frames y x"],
    lag: int,
    clip: SoftClip | None,
) -> Float[Array, " frames"]:
    """Of each frame, the mean square error of its background over the variance of its
    pixels, which are weighted for that by a clip of their own.

    With the truth t, `(bkgd - t)^2` is `(prediction - t)^2 + change (bkgd + prediction -
    2 t)`, where the change is that of the background from the prediction. In the first
    term the frame stands for the truth, whose noise the prediction has not seen. In the
    second one it is the farther prediction, which has nothing of the frames that the
    change comes from.
    """
    # The frames `lag` later, or earlier where there are none.
    pair = np.arange(len(frames)) + lag
    pair = np.where(pair < len(frames), pair, pair - 2 * lag)
    weights, targets = jnp.ones_like(frames), frames
    if clip is not None:
        weights, bias = _target_weights(frames, lag, clip)
        targets = frames - bias

    def mean(images, weights):
        return jnp.sum(images * weights, (-2, -1)) / jnp.sum(weights, (-2, -1))

    change = bkgds - predictions
    missed = mean(jnp.square(targets - predictions), weights)
    changed = jnp.mean(
        change * (bkgds + predictions - 2 * lax.stop_gradient(farther)), (-2, -1)
    )
    noise = mean(jnp.square(targets - targets[pair]) / 2, weights * weights[pair])
    is_noisy = noise > 0
    losses = (missed - noise + changed) / jnp.where(is_noisy, noise, 1)
    return jnp.where(is_noisy, losses, 0)


# The radius under which the squared noise of each frame is averaged.
_NOISE_RADIUS_PIX = 14.0
# The variance of the second smallest of four normal deviations; that of a fifth one, which
# it is compared with, is 1.
_SECOND_OF_FOUR_VARIANCE = 0.36
# In deviations of a pixel: a mean over a frame of how it differs from others is not to
# follow molecules.
_MOST_DEVIATIONS = 3.0


def _target_weights(
    frames: Float[Array, "frames y x"], lag: int, clip: SoftClip
) -> tuple[Float[Array, "frames y x"], Float[Array, "frames y x"]]:
    """Weights that leave molecules out of the frames, and what they do to pure noise, in
    ADU.

    They do not depend on an estimator, whose errors would look like molecules. Molecules
    are what is brighter than in most of the frames at once and twice the lag before and
    after, and not as bright as the frame has become over all.
    """
    averaged = clip.molecule_average(frames)
    times, last = np.arange(len(frames)), len(frames) - 1
    others = []
    for step in (-2 * lag, -lag, lag, 2 * lag):
        is_inside = (times + step >= 0) & (times + step <= last)
        others.append(
            averaged[np.where(is_inside, times + step, times - step).clip(0, last)]
        )
    lower = jnp.minimum(others[0], others[1]), jnp.minimum(others[2], others[3])
    upper = jnp.maximum(others[0], others[1]), jnp.maximum(others[2], others[3])
    second = jnp.minimum(jnp.maximum(*lower), jnp.minimum(*upper))

    variance = spatial_mean(squared_noise(frames), _NOISE_RADIUS_PIX)
    variance = jnp.maximum(variance, jnp.finfo(frames.dtype).tiny)
    surplus = 1 + _SECOND_OF_FOUR_VARIANCE
    most = _MOST_DEVIATIONS * jnp.sqrt(variance)
    change = jnp.clip(averaged - second, -most, most)
    reference = second + jnp.mean(change, (-2, -1), keepdims=True)
    shares, norms = (
        jnp.asarray(image, frames.dtype)
        for image in clip.average_response(*frames.shape[1:])
    )
    weights = clip.weights(averaged, reference, surplus * variance, norms)
    return weights, clip.noise_bias() * shares * jnp.sqrt(variance / surplus)


# How a lag is found.

# Two Gaussian means, one as wide as the image of a molecule and one far wider: what lies
# between them shows molecules best.
_NARROW_RADIUS_PIX, _WIDE_RADIUS_PIX = 2.6, 7.0
# What may be left of the molecules' correlation, over the variance of a frame.
_MOST_CORRELATION = 0.005
# A movie that can't tell so little is believed if it finds no more than this.
_MOST_DOUBT = 0.03
# As many frames, and pixels on a lattice over all of them, are looked at.
_MOST_FRAMES, _MOST_PIXELS, _CHUNK_PIXELS = 512, 2**22, 2**21


def decorrelation_lag(channels: Any) -> int:
    """A lag in frames at which molecules no longer correlate, in any channel.

    The structure function `D(lag)`, half the mean square of the residuals' change over
    `lag` frames, rises with the part of the molecules that have vanished or appeared, and
    then stays. Where `D(2 lag)` is above `D(lag)` by no more than 0.5 %, or twice the
    standard error of the difference if that is more, up to 3 %, little is left, and half as
    much again is the lag that is given. What is steady does not count, and what drifts over
    many frames hardly does.
    """
    lags = map_channels(_decorrelation_lag, channels)
    return max(lags) if isinstance(lags, list | tuple) else lags


def _decorrelation_lag(channel: Any) -> int:
    if any(isinstance(part, Tracer) for part in jax.tree.leaves(channel)):
        raise ValueError(
            "A lag can't be found from traced frames; give one, as FramePairLoss(lag=1)."
        )
    if len(channel.shape) != 3:
        raise ValueError(
            "A lag is found from frames (frames, height, width), but their shape is "
            f"{channel.shape}."
        )
    if channel.shape[0] < 3:
        raise ValueError(
            f"A lag can't be found from {channel.shape[0]} frames, which may hold the same "
            "molecules; give a longer movie, or a lag that molecules do not stay on for."
        )
    residuals = _molecule_residuals(channel)

    @ft.cache
    def changes(lag):
        squares = np.square(residuals[lag:] - residuals[:-lag])
        return np.array([np.mean(image, dtype=np.float64) / 2 for image in squares])

    if not changes(1).any():
        raise ValueError(
            "A lag can't be found from a movie in which nothing changes from one frame to "
            "the next; is it a movie?"
        )

    def remaining_correlation(lag):
        """What is left over the variance of a frame, and its standard error."""
        rises = changes(2 * lag) - changes(lag)[: len(residuals) - 2 * lag]
        variance = np.mean(changes(lag))
        return np.mean(rises) / variance, _standard_error(rises, lag) / variance

    # A frame in the middle has others beyond the lag.
    longest = max((len(residuals) - 2) // 2, 1)
    for lag in range(1, longest + 1):
        share, error = remaining_correlation(lag)
        if share <= max(_MOST_CORRELATION, min(2 * error, _MOST_DOUBT)):
            # What is left falls off as it did so far: go on until it is far less.
            return min(math.ceil(1.5 * lag), longest) if lag > 1 else 1
    share, _ = remaining_correlation(longest)
    warnings.warn(
        f"Molecules stay on for long in the {len(residuals)} frames that were looked at: "
        f"at a lag of {longest}, they still correlate by {share:.1%} of the variance, so "
        "that the learned radii may be too small; give a lag, or a longer movie.",
        stacklevel=2,
    )
    return longest


def _standard_error(series: np.ndarray, reach: int) -> float:
    """Of the mean of a series in which numbers up to `reach` apart may correlate."""
    deviations = series - np.mean(series)
    products = [
        deviations[distance:] @ deviations[: len(series) - distance]
        for distance in range(min(reach + 1, len(series)))
    ]
    # Estimates may add up to less than if there were no correlation at all.
    total = max(2 * sum(products) - products[0], products[0])
    return float(np.sqrt(total)) / len(series)


def _molecule_residuals(channel: Any) -> Float[np.ndarray, "frames y x"]:
    """Frames from the middle of a movie, filtered for molecules, at a lattice of pixels."""
    count, height, width = channel.shape
    used = min(count, _MOST_FRAMES)
    first = (count - used) // 2
    stride = int(np.ceil(np.sqrt(used * height * width / _MOST_PIXELS)))
    chunk = max(1, min(used, _CHUNK_PIXELS // (height * width)))

    lattice = np.empty((used, -(-height // stride), -(-width // stride)), np.float32)
    for start in range(0, used, chunk):
        # The last chunk overlaps the one before.
        start = min(start, used - chunk)
        frames = read_frames(channel, first + start, first + start + chunk)
        lattice[start : start + chunk] = _lattice(frames, stride)
    return lattice


@ft.partial(jax.jit, static_argnames="stride")
def _lattice(frames, stride):
    narrow = spatial_mean(frames, _NARROW_RADIUS_PIX)
    wide = spatial_mean(frames, _WIDE_RADIUS_PIX)
    return (narrow - wide)[:, ::stride, ::stride]


def read_frames(
    channel: Any, start: int, stop: int, name: str = ""
) -> Shaped[Array, "frames y x"]:
    """Frames `start` to `stop` of an array or movie, which must be finite."""
    frames = as_frames(channel[start:stop])
    is_finite = jnp.isfinite(frames)
    if not jnp.all(is_finite):
        frame, y, x = np.argwhere(~np.asarray(is_finite))[0]
        raise ValueError(
            f"Frame {start + frame}{name} holds {frames[frame, y, x]} at y = {y}, x = {x}, "
            "and calibration needs finite frames; replace such pixels, for example by "
            "their neighbours' median, or leave these frames out."
        )
    return frames

"""Objectives: what calibration minimises, a function of an estimator and some frames."""

from typing import Any, Protocol, runtime_checkable, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._estimators.base import AbstractEstimator
from .._estimators.channels import as_frames, Channels, map_channels, working_dtype
from .._estimators.checks import checked_count, checked_number
from .._estimators.smoothing import ratio
from .lag import decorrelation_lag
from .prediction_error import prediction_errors
from .spikes import add_spikes, fitted_light, spread_spikes


# Blocks of frames whose losses count as independent, where each is predicted from many.
_PREDICTION_BLOCKS = 16


@runtime_checkable
class Objective(Protocol):
    """The loss that [`jaxbkgd.calibrate`][] minimises: any callable of this signature that
    JAX can differentiate with respect to the estimator.

    Keep its arrays in an `equinox.Module`; the other fields must be hashable.

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
        """The loss of a window, one real number, which `calibrate` averages over windows.
        The estimator has its present parameters, and `channels` are the window's frames in
        the structure that `calibrate` was given. `frame_indices` are their places in the
        movie."""
        ...


class FramePairLoss(eqx.Module):
    """The error of the background against frames it has not seen: no truth needed.

    Noise and molecules of two frames are independent if they are farther apart than
    molecules stay on. Then `(f - bkgd) (g - bkgd)` is on average the squared error of a
    background that has seen neither of the frames f and g. For an estimator that sees one
    frame, these are `lag` frames earlier and later. For one that sees several, such as
    [`jaxbkgd.LocalMean`][], a frame is compared with what the method `predict` makes from
    frames at least `lag` away. The loss is the mean of this over the variance of a frame's
    noise. See [Calibration](calibration.md#why-it-needs-no-truth).

    If the estimator clips molecules, they are left out of the frames f and g, too;
    otherwise their mean light counts as background. The background is assumed to be steady
    over about the lag, apart from the light of each frame. The clip of an estimator is not
    learned.

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
        frames are consecutive; with them, and an estimator that sees one frame, they are
        three runs as far apart as the lag if that is more than a third of them. Without a
        lag, `fitted` finds it. `ValueError` for too few frames, and an estimator that sees
        other frames and cannot predict."""
        return jnp.mean(self._losses(estimator, channels, frame_indices))

    def independent_losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, " blocks"]:
        """Losses of blocks of frames, from whose scatter the uncertainty of radii follows.

        The noise of the frames as targets moves the minimum away from that of the true
        error. The noise of the same frames as sources moves both minima, with the opposite
        effect. So blocks are no longer than the lag where an estimator sees one frame: no
        frame is both.
        """
        losses = self._losses(estimator, channels, frame_indices)
        lag = self.lag or decorrelation_lag(channels)
        sees_one = estimator.sees_one_frame
        count = -(-len(losses) // lag) if sees_one else _PREDICTION_BLOCKS
        count = min(count, len(losses))
        blocks = np.arange(len(losses)) * count // len(losses)
        sums = jax.ops.segment_sum(losses, blocks, count)
        return sums / np.bincount(blocks).astype(losses.dtype)

    def _losses(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None,
    ) -> Float[Array, " blocks"]:
        """The losses of blocks of frames that the estimator predicts as one."""
        lag = self.lag or decorrelation_lag(channels)
        if estimator.sees_one_frame and (frame_indices is not None or self.lag is None):
            # Up to three times the lag, these are three runs that far apart.
            count = min(map(len, jax.tree.leaves(map_channels(as_frames, channels))))
            lag = min(lag, max(1, count // 3))
        radius_pix = estimator.molecule_radius_pix
        errors, _ = prediction_errors(estimator, channels, lag, radius_pix)
        return _channel_mean([ratio(error.squares, error.variance) for error in errors])

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


class SpikeInLoss(eqx.Module):
    """The light of molecules that an estimator takes for background. Molecules of known
    light are added to the movie, and the loss is the mean square of the share that a fit
    misses.

    The background is estimated with and without them; the fit is by least squares in 7 x 7
    pixels. Neither noise nor the molecules of the movie count, and no truth is needed. It
    is a [`jaxbkgd.Objective`][], and in training a term to add to another loss.

    **Arguments:**

    - `light`: the light of a molecule in one frame, in the unit of the frames.
    - `on_frames`: how long a molecule stays on.
    - `psf_sigma_pix`: the standard deviation of the image of a molecule, in pixels.

    ```python
    >>> import jax
    >>> import jaxbkgd
    >>> frames, _ = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
    >>> loss = jaxbkgd.SpikeInLoss(light=1500.0)
    >>> losses = [loss(jaxbkgd.SpatialMean(radius), frames) for radius in (2.0, 7.0)]
    >>> bool(losses[0] > losses[1])
    True

    ```
    """

    light: float = eqx.field(static=True)
    on_frames: float = eqx.field(static=True)
    psf_sigma_pix: float = eqx.field(static=True)

    def __init__(self, light: float, *, on_frames: float = 1.0, psf_sigma_pix: float = 1.3):
        self.light = checked_number("light", light, unit="the unit of the frames")
        self.on_frames = checked_number("on_frames", on_frames, unit="frames")
        self.psf_sigma_pix = checked_number("psf_sigma_pix", psf_sigma_pix, unit="pixels")

    def __call__(
        self,
        estimator: AbstractEstimator,
        channels: Channels,
        frame_indices: Int[Array, " frames"] | None = None,
    ) -> Float[Array, ""]:
        """The loss without unit; see [`jaxbkgd.Objective`][]."""

        def added(frames: Array) -> Array:
            spikes = spread_spikes(frames.shape, self.on_frames)
            return add_spikes(frames, spikes, self.light, self.psf_sigma_pix)

        def missed(before: Array, after: Array) -> Array:
            spikes = spread_spikes(before.shape, self.on_frames)
            taken = fitted_light(after - before, spikes, self.psf_sigma_pix) / self.light
            return jnp.sum(jnp.square(taken)) / np.sum(np.square(spikes.shares))

        frames = map_channels(_float_frames, channels)
        before, after = (
            estimator(given).bkgds for given in (frames, map_channels(added, frames))
        )
        return _channel_mean(map_channels(missed, before, after))


def _float_frames(channel: Any) -> Float[Array, "frames height width"]:
    frames = as_frames(channel)
    return frames.astype(working_dtype(frames))


def _channel_mean(losses: Any) -> Array:
    return jnp.mean(jnp.stack(jax.tree.leaves(losses)), axis=0)

"""How many frames apart molecules no longer correlate, found from the movie."""

import contextlib
import functools as ft
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._estimators.channels import checked_frames
from .._estimators.checks import is_traced
from .._estimators.spatial_mean import spatial_mean
from .._movies.movie import Channel
from .._movies.open import open_channels


# The difference of Gaussian means as wide as a molecule and much wider shows molecules.
_RADII_PIX = 2.6, 7.0
# The molecules' correlation, over the variance of a frame, that may be left at the lag, and
# the largest that is accepted where the movie is too short to measure less.
_LARGEST_CORRELATION, _LARGEST_UNCERTAIN_CORRELATION = 0.005, 0.03
# Frames, and pixels on a lattice over all of them, that are used.
_MOST_FRAMES, _MOST_PIXELS, _CHUNK_PIXELS = 512, 2**22, 2**21


def decorrelation_lag(source: Any) -> int:
    """A lag in frames at which molecules no longer correlate, in any channel of a movie.

    The structure function `D(lag)`, half the mean square of the residuals' change over
    `lag` frames, rises while molecules vanish and appear. The lag is 1.5 times that where
    `D(2 lag)` exceeds `D(lag)` by at most 0.5 %, or twice the standard error of the
    difference if that is more, up to 3 %.
    """
    if any(map(is_traced, jax.tree.leaves(source))):
        raise ValueError(
            "No lag can be found from traced frames; give FramePairLoss(lag=1)."
        )
    with contextlib.ExitStack() as files:
        return max(map(_channel_lag, open_channels(source, files=files)))


def _channel_lag(channel: Channel) -> int:
    residuals = _molecule_residuals(channel)
    count = len(residuals)
    if count < 3 or not np.ptp(residuals, axis=0).any():
        raise ValueError(
            f"A lag can't be found from {count} frames, if it is fewer than 3 or nothing "
            "changes; give a longer movie, or a lag that molecules do not stay on for."
        )

    @ft.cache
    def structure(lag: int) -> Float[np.ndarray, " pairs"]:
        squares = np.square(residuals[lag:] - residuals[:-lag])
        return squares.mean(axis=(1, 2), dtype=np.float64) / 2

    share = 0.0
    # A frame in the middle needs frames beyond the lag on one side.
    longest = max((count - 2) // 2, 1)
    for lag in range(1, longest + 1):
        rises = structure(2 * lag) - structure(lag)[: count - 2 * lag]
        variance = float(np.mean(structure(lag)))
        share = np.mean(rises) / variance
        # Up to `lag` apart, entries may correlate.
        error = np.std(rises) * np.sqrt((2 * lag + 1) / len(rises)) / variance
        uncertain = min(2 * error, _LARGEST_UNCERTAIN_CORRELATION)
        if share <= max(_LARGEST_CORRELATION, uncertain):
            # At 1.5 times the lag, far less is left.
            return min(math.ceil(1.5 * lag), longest) if lag > 1 else 1
    warnings.warn(
        f"Molecules stay on for long in the {count} frames that were looked at: at a lag "
        f"of {longest}, they still correlate by {share:.1%} of the variance, so that the "
        "learned radii may be too small; give a lag, or a longer movie.",
        stacklevel=2,
    )
    return longest


def _molecule_residuals(channel: Channel) -> Float[np.ndarray, "frames rows columns"]:
    """Frames from the middle of a movie, filtered for molecules, on a lattice of pixels."""
    count, height, width = channel.shape
    used = min(count, _MOST_FRAMES)
    stride = math.ceil(math.sqrt(used * height * width / _MOST_PIXELS))
    chunk = max(1, _CHUNK_PIXELS // (height * width))
    first, last = (count - used) // 2, (count + used) // 2
    return np.concatenate(
        [
            _lattice(read_frames(channel, "", [(start, min(start + chunk, last))]), stride)
            for start in range(first, last, chunk)
        ]
    )


@ft.partial(jax.jit, static_argnames="stride")
def _lattice(
    frames: Shaped[Array, "frames height width"], stride: int
) -> Float[Array, "frames rows columns"]:
    narrow, wide = (spatial_mean(frames, radius) for radius in _RADII_PIX)
    return (narrow - wide)[:, ::stride, ::stride]


def read_frames(
    channel: Channel, name: str, runs: list[tuple[int, int]]
) -> Shaped[Array, "frames height width"]:
    """The frames of runs (start, stop), all finite; an error calls the channel `name`."""
    frames = np.concatenate([checked_frames(channel[slice(*run)]) for run in runs])
    # In NumPy: JAX itself would raise where it is set to find NaNs.
    is_finite = np.isfinite(frames)
    if not is_finite.all():
        frame, y, x = np.argwhere(~is_finite)[0]
        index = np.concatenate([np.arange(*run) for run in runs])[frame]
        raise ValueError(
            f"Frame {index}{name} holds {frames[frame, y, x]} at y = {y}, x = {x}, and "
            "calibration needs finite frames; replace such pixels, for example by their "
            "neighbours' median, or leave these frames out."
        )
    return jnp.asarray(frames)

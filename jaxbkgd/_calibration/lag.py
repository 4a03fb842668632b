"""How many frames apart molecules no longer correlate, found from the movie."""

import contextlib
import functools as ft
import math
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._estimators.checks import is_traced
from .._estimators.spatial_mean import spatial_mean
from .._movies.movie import Channel
from .._movies.open import open_channels
from .sample import read_frames


# The difference of Gaussian means as wide as a molecule and much wider shows molecules.
_RADII_PIX = 2.6, 7.0
# The molecules' correlation, over the variance of a frame, that may be left at the lag, and
# the largest that is accepted where the movie is too short to measure less.
_LARGEST_CORRELATION, _LARGEST_UNCERTAIN_CORRELATION = 0.005, 0.03
# Frames, and pixels on a lattice over all of them, that are used.
_MOST_FRAMES, _MOST_PIXELS, _CHUNK_PIXELS = 512, 2**22, 2**21


class Blinking(NamedTuple):
    """How long molecules correlate: a lag in frames at which they no longer do, whether
    there is one, and for how many frames they are on."""

    lag: int
    is_found: bool
    on_frames: float


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
        found = [
            blinking_of(_channel_residuals(channel))
            for channel in open_channels(source, files=files)
        ]
    longest = max(found, key=lambda blinking: blinking.lag)
    if not longest.is_found:
        warnings.warn(
            f"Molecules stay on for long: at a lag of {longest.lag} frames, they still "
            "correlate, so that the learned radii may be too small; give a lag, or a "
            "longer movie.",
            stacklevel=2,
        )
    return longest.lag


def blinking_of(molecule_residuals: Float[Any, "frames rows columns"]) -> Blinking:
    """Of frames that are filtered for molecules; see `decorrelation_lag`."""
    residuals = np.asarray(molecule_residuals)
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

    # An estimator that sees one frame needs frames at the lag on both sides of it.
    longest = max((count - 2) // 3, 1)
    for lag in range(1, longest + 1):
        rises = structure(2 * lag) - structure(lag)[: count - 2 * lag]
        variance = float(np.mean(structure(lag)))
        share = np.mean(rises) / variance
        # Up to `lag` apart, entries may correlate.
        error = np.std(rises) * np.sqrt((2 * lag + 1) / len(rises)) / variance
        uncertain = min(2 * error, _LARGEST_UNCERTAIN_CORRELATION)
        if share <= max(_LARGEST_CORRELATION, uncertain):
            # What two frames share falls exponentially with the time between them.
            first, second = (float(np.mean(structure(n))) for n in (1, min(2, lag)))
            shared, later = variance - first, variance - second
            on_frames = 1.0
            if 0 < later < shared:
                on_frames = max(-1 / math.log(later / shared), 1.0)
            # At 1.5 times the lag, far less is left.
            lag = min(math.ceil(1.5 * lag), longest) if lag > 1 else 1
            return Blinking(lag, True, min(on_frames, lag))
    return Blinking(longest, False, float(count))


def _channel_residuals(channel: Channel) -> Float[np.ndarray, "frames rows columns"]:
    """Frames from the middle of a movie, filtered for molecules, on a lattice of pixels."""
    count, height, width = channel.shape
    used = min(count, _MOST_FRAMES)
    stride = math.ceil(math.sqrt(used * height * width / _MOST_PIXELS))
    chunk = max(1, _CHUNK_PIXELS // (height * width))
    first, last = (count - used) // 2, (count + used) // 2
    return np.concatenate(
        [
            molecule_residuals(
                read_frames(channel, "", start, min(start + chunk, last)), stride
            )
            for start in range(first, last, chunk)
        ]
    )


@ft.partial(jax.jit, static_argnames="stride")
def molecule_residuals(
    frames: Shaped[Array, "frames height width"], stride: int = 1
) -> Float[Array, "frames rows columns"]:
    """Frames filtered for molecules, on a lattice of pixels."""
    narrow, wide = (spatial_mean(frames, radius) for radius in _RADII_PIX)
    return (narrow - wide)[:, ::stride, ::stride]

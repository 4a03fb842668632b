"""How long molecules stay on, from how frames correlate in time."""

import functools as ft
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._estimators.spatial_mean import spatial_mean


# The difference of Gaussian means as wide as a molecule and much wider shows molecules.
_RADII_PIX = 2.6, 7.0
# The molecules' correlation, over the variance of a frame, that may be left at the lag, and
# the largest that is accepted where the movie is too short to measure less.
_LARGEST_CORRELATION, _LARGEST_UNCERTAIN_CORRELATION = 0.005, 0.03


class UnlearnableError(ValueError):
    """Nothing can be learned of a movie; the text says why, and what to give."""


class Blinking(NamedTuple):
    """How long molecules correlate: a lag in frames at which they no longer do, whether
    there is one, and for how many frames they are on."""

    lag: int
    is_found: bool
    on_frames: float


def blinking_of(filtered: Float[Any, "frames rows columns"]) -> Blinking:
    """Of frames that are filtered for molecules; see `decorrelation_lag`."""
    residuals = np.asarray(filtered)
    count = len(residuals)
    if count < 3 or not np.ptp(residuals, axis=0).any():
        raise UnlearnableError(
            f"A lag can't be found from {count} frames, if it is fewer than 3 or nothing "
            "changes; give a longer movie, or a lag that molecules do not stay on for."
        )

    @ft.cache
    def structure(lag: int) -> Float[np.ndarray, " pairs"]:
        squares = np.square(residuals[lag:] - residuals[:-lag])
        return squares.mean(axis=(1, 2), dtype=np.float64) / 2

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


@ft.partial(jax.jit, static_argnames="stride")
def molecule_residuals(
    frames: Shaped[Array, "frames height width"], stride: int
) -> Float[Array, "frames rows columns"]:
    """Frames filtered for molecules, on a lattice of pixels."""
    narrow, wide = (spatial_mean(frames, radius) for radius in _RADII_PIX)
    return (narrow - wide)[:, ::stride, ::stride]

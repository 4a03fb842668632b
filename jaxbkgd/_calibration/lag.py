"""How many frames apart molecules no longer correlate, found from the movie."""

import contextlib
import math
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from .._estimators.camera import Camera
from .._estimators.checks import is_traced
from .._movies.movie import Channel
from .._movies.open import open_channels
from .blinking import blinking_of, molecule_residuals
from .sample import read_frames


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
        found = [
            blinking_of(_channel_residuals(channel))
            for channel in open_channels(source, files=files)
        ]
    longest = max(found, key=lambda blinking: blinking.lag)
    if not longest.is_found:
        warnings.warn(
            "Molecules stay on for long in the frames that were looked at: at a lag of "
            f"{longest.lag}, they still correlate, so that the learned radii may be too "
            "small; give a lag, or a longer movie.",
            stacklevel=2,
        )
    return longest.lag


def _channel_residuals(channel: Channel) -> Float[np.ndarray, "frames rows columns"]:
    """Frames from the middle of a movie, filtered for molecules, on a lattice of pixels."""
    count, height, width = channel.shape
    used = min(count, _MOST_FRAMES)
    stride = math.ceil(math.sqrt(used * height * width / _MOST_PIXELS))
    chunk = max(1, _CHUNK_PIXELS // (height * width))
    first, last = (count - used) // 2, (count + used) // 2
    runs = [(start, min(start + chunk, last)) for start in range(first, last, chunk)]
    return np.concatenate(
        [
            molecule_residuals(read_frames(channel, "", Camera(), [run]), stride)
            for run in runs
        ]
    )

"""Windows of a movie: the frames that calibration averages its loss over."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from .._estimators.base import Channels, checked_frames, map_channels
from .._movies.movie import Channel


# Pixels of all windows and channels together, unless the fewest windows need more.
_SAMPLE_PIXELS = 2**25
_MOST_WINDOWS, _FEWEST_WINDOWS = 16, 8
# Size of a window for an estimator that sees several frames at a time.
_RUN_PIXELS, _SHORTEST_RUN_FRAMES = 2**24, 64

# Consecutive frames, from the first up to the second. A window has one or two runs.
_Run = tuple[int, int]


class Window(NamedTuple):
    """Frames of all channels, and their places in the movie."""

    channels: Channels
    frame_indices: Int[Array, " frames"]


def draw_windows(channels: Any, lag: int, *, is_halo_seen: bool) -> list[Window]:
    """Windows of equal length, spread evenly over the movie.

    **Arguments:**

    - `channels`: a channel of a movie, or a list or tuple of them, all of one length.
    - `lag`: frames between the two of a pair, or 0 for an objective without pairs.
    - `is_halo_seen`: whether the estimator sees other frames than the one it estimates.

    **Raises:**

    `ValueError` for fewer frames than the lag needs, and pixels that are not finite.
    """
    all_channels: list[Channel] = jax.tree.leaves(channels)
    frame_count = len(all_channels[0])
    # With a halo, a frame in the middle needs frames beyond the lag on one side.
    fewest = 2 * lag + 2 if lag and is_halo_seen else lag + 1
    if frame_count < fewest:
        raise ValueError(
            f"The movie has {frame_count} frames, but at least {fewest} are needed for a "
            f"lag of {lag} frames; give a longer movie, or a shorter lag."
        )
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in all_channels)
    select = _long_runs if is_halo_seen else _runs_and_partners
    return [_window(channels, runs) for runs in select(frame_count, frame_pixels, lag)]


def _long_runs(frame_count: int, frame_pixels: int, lag: int) -> list[list[_Run]]:
    """Few windows, each one long run, since frames near its ends lack their neighbours."""
    length = max(_RUN_PIXELS // frame_pixels, _SHORTEST_RUN_FRAMES, 4 * lag)
    length = min(length, frame_count)
    fitting = max(_SAMPLE_PIXELS // (length * frame_pixels), 1)
    starts = _spread_starts(frame_count - length, min(frame_count // length, fitting))
    return [[(start, start + length)] for start in starts]


def _runs_and_partners(frame_count: int, frame_pixels: int, lag: int) -> list[list[_Run]]:
    """Many windows, each a short run and its partners `lag` frames later. The two are one
    run where they overlap."""
    most_frames = _SAMPLE_PIXELS // frame_pixels
    pair_count = frame_count - lag
    length = math.ceil(pair_count / _MOST_WINDOWS)
    while length > 1 and length + min(length, lag) > most_frames // _MOST_WINDOWS:
        length -= 1
    window_frames = length + min(length, lag)
    fitting = max(most_frames // window_frames, _FEWEST_WINDOWS)
    count = min(math.ceil(pair_count / length), fitting, _MOST_WINDOWS)
    starts = _spread_starts(pair_count - length, count)
    if length > lag:
        return [[(start, start + window_frames)] for start in starts]
    return [
        [(start, start + length), (start + lag, start + lag + length)] for start in starts
    ]


def _spread_starts(last: int, count: int) -> list[int]:
    return np.linspace(0, last, count).round().astype(int).tolist()


def _window(channels: Any, runs: list[_Run]) -> Window:
    def read(channel: Channel, name: str) -> Array:
        return jnp.concatenate([read_frames(channel, *run, name) for run in runs])

    names: Any = ""
    if isinstance(channels, list | tuple):
        names = [f" of channel {number}" for number in range(1, len(channels) + 1)]
    indices = jnp.concatenate([jnp.arange(*run) for run in runs])
    return Window(map_channels(read, channels, names), indices)


def read_frames(
    channel: Channel, start: int, stop: int, name: str = ""
) -> Shaped[Array, "frames height width"]:
    """Frames `start` to `stop` of a channel; `name` says in the error which it is.

    **Raises:**

    `ValueError` for a pixel that is not finite.
    """
    frames = checked_frames(channel[start:stop])
    # In NumPy: JAX itself would raise where it is set to find NaNs.
    is_finite = np.isfinite(np.asarray(frames))
    if not is_finite.all():
        frame, y, x = np.argwhere(~is_finite)[0]
        raise ValueError(
            f"Frame {start + frame}{name} holds {np.asarray(frames)[frame, y, x]} at "
            f"y = {y}, x = {x}, and calibration needs finite frames; replace such pixels, "
            "for example by their neighbours' median, or leave these frames out."
        )
    return jnp.asarray(frames)

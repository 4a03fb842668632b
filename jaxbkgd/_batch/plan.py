"""Frames that are estimated together: chunks, their halos, and the memory they take."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._movies.movie import Channel, MovieError
from .._workers import core_count, free_bytes


# Pixels of all channels in a chunk; and between arrays on CPU, where it stays in cache.
_CHUNK_PIXELS, _CACHED_PIXELS = 2**20, 2**19

# On a GPU or TPU, one thread moves frames while the other one computes.
_WORKERS_PER_ACCELERATOR = 2


class Window(NamedTuple):
    """Frames `start` to `stop` are estimated, and `kept`, of those `seen`."""

    number: int
    start: int
    stop: int
    seen: slice
    kept: slice


def windows(
    length: int, chunk_frames: int, halo_frames: int, aligned_frames: int = 1
) -> Iterator[Window]:
    """The chunks of a movie. All see as many frames, so that nothing is compiled twice,
    from a multiple of `aligned_frames` on."""
    count = chunk_frames + 2 * halo_frames + aligned_frames - 1
    count = min(length, count + (length - count) % aligned_frames)
    for number, start in enumerate(range(0, length, chunk_frames)):
        low = max(0, start - halo_frames) // aligned_frames * aligned_frames
        low, stop = min(low, length - count), min(start + chunk_frames, length)
        yield Window(
            number, start, stop, slice(low, low + count), slice(start - low, stop - low)
        )


def read_window(
    window: Window,
    channels: Sequence[Channel],
    weights: Sequence[Channel | None],
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The frames that a window sees of each channel, and their weights."""
    frames = [channel[window.seen] for channel in channels]
    # One frame of weights stands for all.
    masks = [
        None if w is None else w[window.seen if len(w) > 1 else slice(1)] for w in weights
    ]
    return frames, masks


def plan_chunks(
    channels: Sequence[Channel],
    halo_frames: int,
    devices: Sequence[Any],
    *,
    pixel_bytes: int = 32,
    chunk_frames: int | None = None,
    workers: int | None = None,
    is_between_arrays: bool = False,
    is_growing: bool = False,
) -> tuple[int, int]:
    """The frames in a chunk and the number of workers, where they are not given: as many
    workers as there is memory for, and then the chunk."""
    frame_count = sys.maxsize if is_growing else len(channels[0])
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in channels)
    is_on_cpu = devices[0].platform == "cpu"
    # Frames that all workers together may hold.
    held = usable_bytes(devices) // (pixel_bytes * frame_pixels)
    if workers is None:
        most = most_workers(devices)
        # With chunks shorter than twice the halo, more workers would do less.
        length = min(frame_count, (chunk_frames or 2 * halo_frames or 1) + 2 * halo_frames)
        workers = max(1, min(most, held // length))
    if chunk_frames is not None:
        return chunk_frames, workers
    pixels = _CACHED_PIXELS if is_between_arrays and is_on_cpu else _CHUNK_PIXELS
    frames = min(frame_count, max(1, pixels // frame_pixels, 4 * halo_frames))
    longest = held // workers
    if longest < frame_count:
        frames = min(frames, longest - 2 * halo_frames)
        if 2 * frames < halo_frames:
            raise MovieError(
                f"{channels[0].movie.name}: memory is short: each of {workers} threads can "
                f"hold {longest}, but the estimator sees {halo_frames} on either side of a "
                "frame; give fewer workers, a smaller radius, boxes or chunk_frames"
            )
    # As long as each other.
    number = -(-frame_count // max(1, frames))
    return -(-frame_count // number), workers


def most_workers(devices: Sequence[Any]) -> int:
    """The threads that keep all cores or devices busy."""
    is_on_cpu = devices[0].platform == "cpu"
    return core_count() if is_on_cpu else _WORKERS_PER_ACCELERATOR * len(devices)


def usable_bytes(devices: Sequence[Any]) -> int:
    """What all workers together may take: half of what is free, also on the devices, to
    which work goes in turns."""
    free = [free_bytes()]
    for device in devices:
        stats = (device.platform != "cpu" and device.memory_stats()) or {}
        if "bytes_limit" in stats:
            free.append(len(devices) * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return min(free) // 2

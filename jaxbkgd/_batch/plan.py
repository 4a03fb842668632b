"""Frames that are estimated together: chunks, their halos, and the memory they take."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from .._movies.movie import Channel, MovieError
from .._workers import core_count


# Pixels of all channels in a chunk; and between arrays on CPU, where it stays in cache from
# one to the other. With fewer, each call costs more than that saves.
_CHUNK_PIXELS, _CACHED_PIXELS = 2**20, 2**19

# A larger frame goes in strips, with at least this many lines for each line of their halo,
# which is filtered twice.
_STRIP_LINES_PER_HALO_LINE = 8

# Bytes that a pixel takes as it is read, converted, filtered and written; and with a halo,
# where an estimator may hold a dozen images of many frames. Twice that must be free.
_PIXEL_BYTES, _PIXEL_BYTES_WITH_HALO = 32, 64

# On a GPU or TPU, one thread moves frames while the other one computes.
_WORKERS_PER_ACCELERATOR = 2


class Window(NamedTuple):
    """Frames `start` to `stop`, or lines of a frame, are estimated from `low` to `high`."""

    number: int
    start: int
    stop: int
    low: int
    high: int

    @property
    def kept(self) -> slice:
        """The frames `start` to `stop` among those from `low` to `high`."""
        return slice(self.start - self.low, self.stop - self.low)


def windows(frame_count: int, chunk_frames: int, halo_frames: int) -> Iterator[Window]:
    """The chunks of a movie with the frames that must be seen to estimate them. All windows
    are of one length, so that nothing is compiled twice."""
    length = min(frame_count, chunk_frames + 2 * halo_frames)
    for number, start in enumerate(range(0, frame_count, chunk_frames)):
        low = min(max(0, start - halo_frames), frame_count - length)
        stop = min(start + chunk_frames, frame_count)
        yield Window(number, start, stop, low, low + length)


def strips(channels: Sequence[Channel], halo_lines: int | None) -> list[Window] | None:
    """Strips of a large frame, which stay in cache, or None for whole frames."""
    sizes = {channel.shape[1:] for channel in channels}
    if halo_lines is None or len(sizes) > 1:
        return None
    height, width = sizes.pop()
    most = height // (_STRIP_LINES_PER_HALO_LINE * max(1, halo_lines))
    count = min(len(channels) * height * width // _CACHED_PIXELS, most)
    return (
        list(windows(height, math.ceil(height / count), halo_lines)) if count > 1 else None
    )


def plan_chunks(
    channels: Sequence[Channel],
    halo_frames: int,
    devices: Sequence[Any],
    *,
    chunk_frames: int | None = None,
    workers: int | None = None,
    is_between_arrays: bool = False,
) -> tuple[int, int]:
    """The frames in a chunk and the number of workers, where they are not given: as many
    workers as there is memory for, and then the chunk.

    **Raises:**

    `ValueError` for numbers below 1, and `MovieError` if memory does not hold the halo.
    """
    for name, value in (("chunk_frames", chunk_frames), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}.")
    frame_count = len(channels[0])
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in channels)
    pixel_bytes = _PIXEL_BYTES_WITH_HALO if halo_frames else _PIXEL_BYTES
    # Frames that all workers together may hold.
    held = _free_bytes_for(devices) // (2 * pixel_bytes * frame_pixels)
    is_on_cpu = devices[0].platform == "cpu"
    if workers is None:
        most = core_count() if is_on_cpu else _WORKERS_PER_ACCELERATOR * len(devices)
        # With chunks shorter than twice the halo, more workers would do less.
        length = min(frame_count, (chunk_frames or 2 * halo_frames or 1) + 2 * halo_frames)
        workers = max(1, min(most, held // length))
    if chunk_frames is None:
        is_cached = is_between_arrays and is_on_cpu
        frames = max(1, (_CACHED_PIXELS if is_cached else _CHUNK_PIXELS) // frame_pixels)
        longest = held // workers
        chunk_frames = (
            _chunk_frames_beside_halo(channels[0], halo_frames, frames, longest, workers)
            if halo_frames
            else max(1, min(frames, longest, frame_count))
        )
    return chunk_frames, workers


def _chunk_frames_beside_halo(
    channel: Channel, halo_frames: int, frames: int, longest: int, workers: int
) -> int:
    """At least `frames` and four times the halo, if windows of `longest` frames hold it."""
    frame_count = len(channel)
    frames = min(max(frames, 4 * halo_frames), frame_count)
    if longest < frame_count:
        frames = min(frames, longest - 2 * halo_frames)
        if 2 * frames < halo_frames:
            raise MovieError(
                f"{channel.movie.name}: memory is short: of its frames, each of {workers} "
                f"threads can hold {longest}, but the estimator sees {halo_frames} on "
                "either side of one; take fewer workers, a smaller radius in frames or a "
                "part of the frames (boxes), or, for a slow run, give chunk_frames"
            )
    # All windows are of one length, the last one too.
    return math.ceil(frame_count / math.ceil(frame_count / frames))


def _free_bytes_for(devices: Sequence[Any]) -> int:
    """The memory of this machine that is free, and at most that of its GPUs or TPUs, to
    which windows go in turns."""
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if "bytes_limit" in s]
    return min([free_bytes(), *([len(devices) * min(free)] if free else [])])


def free_bytes(root: Path = Path("/")) -> int:
    """The memory that this process may still take: of the machine, and within the limits
    of its control groups, as in a container or a job of SLURM."""
    free = psutil.virtual_memory().available
    for folder, limit_name, usage_name in _control_groups(root):
        # Without a limit, there is no such file, or no number in it.
        with contextlib.suppress(OSError, ValueError):
            limit, usage = (
                int((folder / name).read_text()) for name in (limit_name, usage_name)
            )
            lines = (folder / "memory.stat").read_text().splitlines()
            stats = dict(line.split(maxsplit=1) for line in lines)
            # Cached files, which the system drops before it refuses memory.
            cached = int(stats.get("active_file", 0)) + int(stats.get("inactive_file", 0))
            free = min(free, max(0, limit - usage + cached))
    return free


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The groups of this process and those that hold them, each with the names of its
    limit and usage: of version 2, and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield base / folder, limit, usage

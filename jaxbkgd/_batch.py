"""Frames in host memory, a chunk at a time on every core."""

import os
from collections.abc import Callable
from concurrent.futures import as_completed, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped

from ._estimator import as_frames


# Of an output so small, the allocator hands out the same memory again; one that is larger
# is new to the process, and each of its pages costs a fault.
_CHUNK_PIXELS = 2**18


def map_frames(
    function: Callable[[Array], Array],
    frames: Shaped[np.ndarray, "..."],
    out: Float[np.ndarray, "..."] | None = None,
    *,
    chunk_frames: int | None = None,
    workers: int | None = None,
) -> Float[np.ndarray, "frames height width"]:
    """Applies `function` to chunks of frames on a pool of threads.

    XLA works on one chunk in one thread, and Python's lock is free meanwhile. So this is
    how to use all cores. Chunks have one length, the last one filled up with zeros, so that
    nothing is compiled twice.

    **Arguments:**

    - `function`: takes a chunk and gives an array of its shape, each frame by itself,
        best jitted, as `jax.jit(lambda chunk: jaxbkgd.spatial_mean(chunk, 7.0))`.
    - `frames`: (frames, height, width), a NumPy array or memory map of any real dtype.
    - `out`: where to write the results; by default a new float32 array.
    - `chunk_frames`: frames in a chunk, by default a quarter of a megapixel.
    - `workers`: the number of threads, by default the cores of this process.

    **Returns:**

    `out`.

    **Raises:**

    `TypeError` or `ValueError` for frames that are not real, or have no pixels, and for
    arguments that do not fit together. What `function` raises is raised,
    and chunks not yet begun are dropped.
    """
    if frames.ndim != 3:
        raise ValueError(
            f"frames must have shape (frames, height, width), but their shape is "
            f"{frames.shape}."
        )
    # Refuses what has no background, before anything is begun.
    as_frames(frames[:1])
    for name, value in (("chunk_frames", chunk_frames), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}.")
    out = _checked_output(out, frames)
    if chunk_frames is None:
        # The same for every stack of these frames, so that another is not compiled again.
        chunk_frames = max(1, _CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]))

    def run(start: int) -> None:
        chunk = frames[start : start + chunk_frames]
        count = len(chunk)
        if count < chunk_frames:
            chunk = np.pad(chunk, ((0, chunk_frames - count), (0, 0), (0, 0)))
        result = np.asarray(function(as_frames(chunk)))
        if result.shape != chunk.shape:
            raise ValueError(
                f"The function must keep the shape {chunk.shape} of its chunk, but gave "
                f"{result.shape}."
            )
        np.copyto(out[start : start + count], result[:count])

    pool = ThreadPoolExecutor(workers or core_count())
    try:
        starts = range(0, len(frames), chunk_frames)
        for future in as_completed([pool.submit(run, start) for start in starts]):
            future.result()
    finally:
        # After an error or Ctrl-C, only the chunks that have begun are waited for.
        pool.shutdown(cancel_futures=True)
    return out


def _checked_output(out: Any, frames: np.ndarray) -> np.ndarray:
    if out is None:
        return np.empty(frames.shape, np.float32)
    if out.shape != frames.shape:
        raise ValueError(
            f"out must have the shape {frames.shape} of the frames, but has {out.shape}."
        )
    if np.may_share_memory(out, frames):
        raise ValueError("out shares memory with the frames; give an array of its own.")
    return out


def core_count() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

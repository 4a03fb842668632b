"""Frames in host memory, a chunk at a time on every core."""

import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped


# Of an output so small, the allocator hands out the same memory again; one that is larger
# is new to the process, and each of its pages costs a fault.
_CHUNK_PIXELS = 2**18


def map_frames(
    function: Callable[[Any], Any],
    frames: Shaped[np.ndarray, "frames height width"],
    out: Float[np.ndarray, "_ height width"] | None = None,
    *,
    chunk_frames: int | None = None,
    workers: int | None = None,
) -> Float[np.ndarray, "frames height width"]:
    """Applies `function` to chunks of frames on a pool of threads.

    XLA works on one chunk in one thread, and Python's lock is free meanwhile. So this is
    how to use all cores. Chunks have one length, so that nothing is compiled twice: the
    last one overlaps the one before.

    **Arguments:**

    - `function`: takes a chunk and gives an array of its shape, each frame by itself,
        best jitted, as `jax.jit(lambda chunk: jaxbkgd.spatial_mean(chunk, 7.0))`.
    - `frames`: a NumPy array or memory map of any real dtype.
    - `out`: where to write the results; by default a new float32 array.
    - `chunk_frames`: frames in a chunk, by default a quarter of a megapixel.
    - `workers`: the number of threads, by default the cores of this process.

    **Returns:**

    `out`. What `function` raises is raised, and chunks not yet begun are dropped.
    """
    count, height, width = frames.shape
    if out is None:
        out = np.empty(frames.shape, np.float32)
    if out.shape != frames.shape:
        raise ValueError(
            f"out must have the shape {frames.shape} of the frames, but has {out.shape}."
        )
    length = chunk_frames or max(1, _CHUNK_PIXELS // (height * width))
    length = max(1, min(length, count))
    written = out

    def run(start: int) -> None:
        stop = start + length
        np.copyto(written[start:stop], np.asarray(function(frames[start:stop])))

    starts = [min(start, count - length) for start in range(0, count, length)]
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(run, start) for start in starts]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()
    return out

"""The background of a dask array, on as many machines as dask has."""

import functools as ft
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._calibration.cameras import cameras_of
from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.channels import as_frames
from .._movies.movie import movie_of_array
from . import compute
from .compute import Dtype, Output, Quantity
from .plan import Window


_COMPILING = threading.Lock()


def estimate_dask(
    array: Any,
    estimator: AbstractEstimator,
    *,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
) -> Any:
    """The background of a movie that is a dask array, as a dask array of the same shape.

    Nothing is read before one of dask's schedulers computes the result. The result is that
    of the estimator on the whole movie, to the bit for the estimators of this package. Its
    chunks are those of `array`, unless these cut a frame, or are shorter than
    `halo_frames`.

    **Arguments:**

    - `array`: a dask array (frames, height, width) or (frames, channels, height, width).
    - `estimator`: any estimator; it is sent to each worker once, and compiled there once
        for each length of chunks.
    - `quantity`, `dtype`, `camera`: as in [`jaxbkgd.estimate_movie`][].
    - `weights`: how much a pixel counts, for estimators that take weights: a NumPy or dask
        array whose shape broadcasts to that of `array`, as (height, width).

    **Raises:**

    `TypeError` or `ValueError` for an array or arguments that do not fit and, when it is
    computed, [`jaxbkgd.MovieError`][] for frames that cannot be estimated.

    !!! example

        ```python
        >>> import dask.array as da
        >>> import jaxbkgd
        >>> movie = da.random.poisson(100, (1000, 64, 64), chunks=(100, 64, 64))
        >>> bkgds = jaxbkgd.estimate_dask(movie, jaxbkgd.SpatialMean(7.0))
        >>> bkgds.shape, bkgds.dtype, bkgds.numblocks
        ((1000, 64, 64), dtype('float32'), (10, 1, 1))

        ```
    """
    try:
        import cloudpickle
        import dask.array as da
        from dask.array.overlap import ensure_minimum_chunksize
        from dask.base import tokenize
        from dask.delayed import delayed
    except ModuleNotFoundError as error:
        what = f"estimate_dask needs the Python package {error.name}"
        remedy = "install it with: pip install 'jaxbkgd[cluster]'"
        raise ImportError(f"{what}; {remedy}") from error

    if not isinstance(array, da.Array):
        kind = type(array).__name__
        raise TypeError(f"{kind} is no dask array; make it one with dask.array.from_array.")
    if np.isnan(array.size):
        what = f"The array has shape {array.shape}, of which a part is not known"
        raise ValueError(f"{what}; call its compute_chunk_sizes() first.")
    channels = movie_of_array(array).channels
    compute.check_estimator(estimator, weights)
    cameras, count = cameras_of(camera, channels), len(channels)
    output = compute.make_output(quantity, dtype, cameras)
    if estimator.learns_patterns:
        raise ValueError(
            "The estimator has patterns of light to learn, which all chunks share; call "
            "its with_patterns(frames) with some hundred frames, and use what it gives."
        )
    estimator, cameras = compute.on_one_device((estimator, cameras))
    estimator = estimator.for_inference()
    aligned_frames = estimator.aligned_frames
    halo_frames = min(estimator.halo_frames + aligned_frames - 1, len(array))
    movie: Any = array
    # Chunks that cut a frame are joined.
    frames = "auto" if max(movie.numblocks[1:]) > 1 else movie.chunks[0]
    movie = movie.rechunk({0: frames, **dict.fromkeys(range(1, movie.ndim), -1)})
    array = movie.rechunk({0: ensure_minimum_chunksize(halo_frames, movie.chunks[0])})
    masks = []
    if weights is not None:
        masks = [da.broadcast_to(weights, array.shape).rechunk(array.chunks)]
    shape = min(max(array.chunks[0]) + 2 * halo_frames, len(array)), *array.shape[-2:]
    # Masked arrays and those of other libraries are refused.
    kind = as_frames(np.zeros_like(array._meta, shape=(1, 1, 1))).dtype
    weighted = [shape] * count * len(masks)
    compute.check_fit(estimator, output, cameras, [(shape, kind)] * count, weighted)
    # A key of its own, on which all tasks depend. As bytes, it is nothing to the scheduler,
    # which needs no JAX device.
    sent = estimator, cameras
    name, pickled = f"estimator-{tokenize(sent)}", cloudpickle.dumps(sent)
    return da.map_overlap(
        ft.partial(
            _estimate_chunk,
            output=output,
            halo_frames=halo_frames,
            aligned_frames=aligned_frames,
        ),
        array,
        *masks,
        depth={0: halo_frames},
        boundary="none",
        trim=False,
        pickled=delayed(pickled, name=name, traverse=False),
        token=f"estimate-{quantity}",
        chunks=array.chunks,
        meta=np.empty((0,) * array.ndim, output.dtype),
    )


def _estimate_chunk(
    *stacks: Any,
    pickled: bytes,
    output: Output,
    halo_frames: int,
    aligned_frames: int,
    block_info: Any,
) -> np.ndarray:
    """Estimates a chunk, which comes with its halo, and its weights if there are any."""
    start, stop = block_info[None]["array-location"][0]
    low = start - min(halo_frames, start)
    # From a multiple of the aligned frames on.
    left_out = -low % aligned_frames
    low, stacks = low + left_out, tuple(stack[left_out:] for stack in stacks)
    window = Window(0, start, stop, slice(None), slice(start - low, stop - low))
    of_each: list[Any] = [[s] if s.ndim == 3 else [*np.moveaxis(s, 1, 0)] for s in stacks]
    with _COMPILING:
        estimate = _compiled_from(pickled, output)
    estimated = compute.run_window("the array", estimate, of_each[0], window, *of_each[1:])
    images = estimated.images
    return np.stack(images, axis=1) if stacks[0].ndim == 4 else images[0]


@ft.lru_cache(maxsize=8)
def _compiled_from(pickled: bytes, output: Output) -> Callable[..., compute.Estimates]:
    """One for all tasks of a process, for which the estimator is unpickled once."""
    estimator, cameras = pickle.loads(pickled)
    return compute.compile_estimate(estimator, output, cameras)

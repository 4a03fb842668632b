"""The background of a dask array, on as many machines as dask has."""

import functools as ft
import pickle
import threading
import warnings
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._estimators.base import AbstractEstimator
from .._estimators.channels import as_frames
from .._movies.movie import ArrayMovie
from .run import (
    check_takes_weights,
    check_wanted,
    check_weights,
    checked_choice,
    compiled,
    Dtype,
    estimate_window,
    estimated,
    one_for_each,
    Quantity,
    Wanted,
    Window,
)


_UNPICKLING = threading.Lock()


def estimate_dask(
    array: Any,
    estimator: AbstractEstimator,
    *,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    offsets: Any = 0.0,
    gains: Any = None,
    weights: Any = None,
) -> Any:
    """The background of a movie that is a dask array, as another dask array.

    Nothing is read before the result is computed, by any of dask's schedulers: threads,
    processes, or a cluster. It is that of the estimator on the whole movie, to the bit for
    those of this package. The estimator is sent to each worker once, and compiled there
    once for chunks of frames of one length; with `halo_frames`, also for the first and the
    last chunk, which see less.

    Chunks are as those of `array`, unless these cut a frame, or are shorter than
    `halo_frames`.

    **Arguments:**

    - `array`: a dask array (frames, height, width) or (frames, channels, height, width).
    - `estimator`: any estimator.
    - `quantity`, `dtype`, `offsets`, `gains`: as in [`jaxbkgd.estimate_movie`][].
    - `weights`: how much a pixel counts, for estimators that take weights: a NumPy or dask
        array whose shape broadcasts to that of `array`, as (height, width).

    **Returns:**

    A dask array of the shape of `array`.

    **Raises:**

    `TypeError` or `ValueError` for an array that is not as above, and for arguments that do
    not fit the estimator or each other. When it is computed, [`jaxbkgd.MovieError`][] for
    frames that cannot be estimated, and for a background that is not finite, for which
    uint16 has no number.

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
    import cloudpickle
    import dask.array as da
    from dask.base import tokenize
    from dask.delayed import delayed

    if not isinstance(array, da.Array):
        raise TypeError(
            f"{type(array).__name__} is no dask array; make it one, for example with "
            "dask.array.from_array, or use jaxbkgd.estimate_movie."
        )
    if np.isnan(array.size):
        raise ValueError(
            f"The array has shape {array.shape}, of which a part is not known; call its "
            "compute_chunk_sizes() first."
        )
    channels = ArrayMovie(array, "the array").channels
    blank = as_frames(np.zeros_like(array._meta, shape=(1, 1, 1)))
    wanted = Wanted(
        checked_choice("quantity", quantity, Quantity),
        checked_choice("dtype", dtype, Dtype),
        one_for_each("offsets", offsets, channels),
        one_for_each("gains", gains, channels),
        is_one_stack=len(channels) == 1,
    )
    check_wanted(wanted)
    if weights is not None:
        check_takes_weights(estimator)

    estimator = estimator.for_inference()
    halo_frames = min(estimator.halo_frames, len(array))
    array = _with_whole_windows(array, halo_frames)
    stacks = [array]
    if weights is not None:
        stacks.append(da.broadcast_to(weights, array.shape).rechunk(array.chunks))
    depth = {axis: 0 if axis else halo_frames for axis in range(array.ndim)}
    if halo_frames:
        stacks = [da.overlap.overlap(stack, depth, "none") for stack in stacks]
    window_frames = max(stacks[0].chunks[0])
    window = (window_frames, *array.shape[-2:])
    frames = [jax.ShapeDtypeStruct(window, blank.dtype)] * len(channels)
    masks = [jax.ShapeDtypeStruct(window, np.float32)] * len(channels)
    # Raises what would be raised in the middle of the work, too.
    eqx.filter_eval_shape(
        estimate_window, estimator, frames, wanted, [] if weights is None else masks
    )

    function = ft.partial(
        _estimate_chunk,
        wanted=wanted,
        halo_frames=halo_frames,
        # Frames that are estimated from others can't have any beside them that are not.
        padded_frames=0 if halo_frames else window_frames,
    )
    return da.map_blocks(
        function,
        *stacks,
        # A key of its own, on which all tasks depend. As bytes, it is nothing to the
        # scheduler, which needs no JAX device.
        pickled=delayed(
            cloudpickle.dumps(estimator),
            name=f"estimator-{tokenize(estimator)}",
            traverse=False,
        ),
        token=f"estimate-{quantity}",
        chunks=array.chunks,
        meta=np.empty((0,) * array.ndim, wanted.dtype),
    )


def _with_whole_windows(array: Any, halo_frames: int) -> Any:
    """In chunks that do not cut a frame, and are not shorter than the halo."""
    from dask.array.overlap import ensure_minimum_chunksize

    if max(array.numblocks[1:]) > 1:
        whole = array.rechunk({0: "auto", **dict.fromkeys(range(1, array.ndim), -1)})
        warnings.warn(
            f"chunks of {array.chunksize} cut a frame; they are rechunked to "
            f"{whole.chunksize}, which costs memory and time. Store the movie in chunks of "
            "whole frames.",
            UserWarning,
            stacklevel=3,
        )
        array = whole
    return array.rechunk({0: ensure_minimum_chunksize(halo_frames, array.chunks[0])})


def _estimate_chunk(
    chunk: Any,
    weights: Any = None,
    *,
    pickled: bytes,
    wanted: Wanted,
    halo_frames: int,
    padded_frames: int,
    block_info: Any,
) -> np.ndarray:
    """What is wanted of the frames of a chunk, which comes with its halo."""
    start, stop = block_info[None]["array-location"][0]
    low = start - min(halo_frames, start)
    window = Window(0, start, stop, low, low + len(chunk))
    stacks = _channels(chunk, padded_frames)
    masks = []
    if weights is not None:
        check_weights("the weights", weights)
        masks = _channels(weights, padded_frames)
    with _UNPICKLING:
        estimate = compiled(_unpickled(pickled), wanted)
    images, _ = estimated("the array", estimate, stacks, window, masks)
    images = [np.asarray(image)[window.kept] for image in images]
    return np.stack(images, axis=1) if chunk.ndim == 4 else images[0]


def _channels(chunk: Any, padded_frames: int) -> list[Any]:
    """All chunks are of one length, so that nothing is compiled twice."""
    missing = max(0, padded_frames - len(chunk))
    if missing:
        chunk = np.pad(chunk, ((0, missing), *[(0, 0)] * (chunk.ndim - 1)))
    return list(np.moveaxis(chunk, 1, 0)) if chunk.ndim == 4 else [chunk]


@ft.lru_cache(maxsize=8)
def _unpickled(pickled: bytes) -> AbstractEstimator:
    """One for all tasks of a process: of another, what is no array might not be equal, and
    would be compiled again."""
    return pickle.loads(pickled)

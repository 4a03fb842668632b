"""The background of a movie as an array whose frames are estimated when they are read."""

import contextlib
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from .._calibration.cameras import cameras_of
from .._calibration.movie_patterns import with_movie_patterns
from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.checks import checked_count
from .._movies.movie import Box, Channel, MovieError
from .._movies.open import open_channels, open_weights
from . import compute
from .compute import Dtype, Output, Quantity
from .plan import plan_chunks, read_window, Window, windows


class LazyEstimate(contextlib.AbstractContextManager["LazyEstimate"]):
    """A movie's background, residuals or SNR map as an array, estimated as it is read.

    [`jaxbkgd.lazy_estimate`][] makes one. `estimate[10]` is a frame, `estimate[10:20]` are
    ten, `estimate[[3, 8], 50:60]` is a part of two, and `numpy.asarray(estimate)` is all of
    it. Each is a new NumPy array. The first axis takes an integer, a slice, or a list or
    array of integers or booleans; the others take integers and slices.

    Any number of threads may read it. The first thread that needs a chunk estimates it, and
    the others wait. As a context manager it closes the files that it has opened.

    **Attributes:**

    - `shape`: (frames, height, width), or (frames, channels, height, width) of several
        channels; with `dtype`, `ndim`, `size` and `nbytes` as NumPy has them.
    - `chunks`: the shape of the parts that are estimated and kept together.
    - `name`: the name of the movie, for messages.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        chunks: Sequence[Window],
        estimate_chunk: Callable[[Window], Shaped[np.ndarray, "frames ..."]],
        cache_bytes: int,
        close: Callable[[], object],
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.chunks = (chunks[0].stop, *shape[1:])
        self._windows = chunks
        self._estimate_chunk = estimate_chunk
        self._close = close
        # Frames on either side of a boundary need two chunks, in turns.
        chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        self._most_chunks = max(2, cache_bytes // chunk_bytes)
        # That which was used last comes last.
        self._cache: dict[int, Future[np.ndarray]] = {}
        self._changing = threading.Lock()

    def __repr__(self) -> str:
        about = f"shape={self.shape}, dtype={self.dtype}, chunks={self.chunks}"
        return f"{type(self).__name__}({self.name!r}, {about})"

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Shaped[np.ndarray, "..."]]:
        return (self[frame] for frame in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        frames, rest = self._split(index)
        # NumPy knows all that an index may be, and says what is wrong with it.
        numbers = np.arange(len(self))[frames]
        a_frame = np.broadcast_to(np.empty((), self.dtype), self.shape[1:])[rest]
        read = np.empty((numbers.size, *a_frame.shape), self.dtype)
        in_chunk, in_it = np.divmod(numbers.ravel(), self.chunks[0])
        order = np.argsort(in_chunk, kind="stable")
        starts = np.flatnonzero(np.diff(in_chunk[order])) + 1
        for places in np.split(order, starts) if len(order) else []:
            chunk = self._chunk(int(in_chunk[places[0]]))
            read[places] = chunk[:, *rest][in_it[places]]
        # Of no axes, a number.
        return read.reshape(numbers.shape + a_frame.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.name}: its estimate is no array without a copy")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def close(self) -> None:
        """Closes the files that were opened for it, and forgets its chunks."""
        with self._changing:
            self._cache.clear()
        self._close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _split(self, index: Any) -> tuple[Any, tuple[Any, ...]]:
        """The index of the frames, and that of what is within them."""
        entries = list(index) if isinstance(index, tuple) else [index]
        if not entries:
            entries = [...]
        if entries[0] is ...:
            # It stands for the frames, unless there is an entry for each axis.
            entries[:1] = [] if len(entries) > self.ndim else [slice(None), ...]
        frames, rest = entries[0], entries[1:]
        # To NumPy, a tuple within an index is a list.
        frames = list(frames) if isinstance(frames, tuple) else frames
        if frames is None:
            raise IndexError(f"{self.name}: None is no index of its frames; use it later")
        for entry in rest:
            if not (entry is ... or isinstance(entry, slice)):
                try:
                    operator.index(entry)
                except TypeError:
                    what = f"within a frame, {entry!r} is no integer or slice"
                    remedy = "use it on the array that is read"
                    raise IndexError(f"{self.name}: {what}; {remedy}") from None
        return frames, tuple(rest)

    def _chunk(self, number: int) -> Shaped[np.ndarray, "frames ..."]:
        with self._changing:
            chunk = self._cache.pop(number, None)
            is_missing = chunk is None
            chunk = Future() if chunk is None else chunk
            self._cache[number] = chunk
        if is_missing:
            try:
                chunk.set_result(self._estimate_chunk(self._windows[number]))
            except BaseException as error:
                # A later call tries again.
                with self._changing:
                    self._cache.pop(number, None)
                chunk.set_exception(error)
            with self._changing:
                done = [n for n, chunk in self._cache.items() if chunk.done()]
                for old in done[: -self._most_chunks]:
                    del self._cache[old]
        return chunk.result()


def lazy_estimate(
    source: Any,
    estimator: AbstractEstimator,
    *,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    pedestal: int | float = 0.0,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
    chunk_frames: int | None = None,
    cache_bytes: int = 2**28,
) -> LazyEstimate:
    """The background of a movie as an array whose frames are estimated when they are read.

    Viewers and programs that slice frames, as napari, ndv, dask and Picasso, take it as it
    is. Frames are those of [`jaxbkgd.estimate_movie`][], to the bit. Those of a chunk are
    estimated together: a frame costs no more than a chunk, and reading all of them in order
    estimates each one once.

    **Arguments:**

    - `source`, `estimator`, `quantity`, `dtype`, `pedestal`, `boxes`, `frames`, `camera`,
        `weights`: as in [`jaxbkgd.estimate_movie`][]. A list of sources, or boxes, are the
        channels of one array, and have frames of one size.
    - `chunk_frames`: the frames in a chunk, by default a megapixel or four halos.
    - `cache_bytes`: the memory for chunks that are kept, those that were read last. At
        least two are kept.

    **Raises:**

    [`jaxbkgd.MovieError`][] if a movie cannot be read; `ValueError` or `TypeError` for
    arguments that do not fit the estimator or each other. Reading frames raises
    `MovieError` for those that cannot be estimated, and `IndexError` for an index that is
    outside or of another kind.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> import numpy as np
        >>> movie = np.random.default_rng(0).poisson(100, (1000, 64, 64)).astype("uint16")
        >>> residuals = jaxbkgd.lazy_estimate(
        ...     movie, jaxbkgd.SpatialMean(7.0), quantity="residual"
        ... )
        >>> residuals.shape, residuals[10:20, 5].shape
        ((1000, 64, 64), (10, 64))

        ```
    """
    compute.check_estimator(estimator, weights)
    checked_count("cache_bytes", cache_bytes)
    with contextlib.ExitStack() as files:
        channels = open_channels(source, boxes, frames, files=files)
        count = len(channels)
        cameras = cameras_of(camera, channels)
        output = compute.make_output(quantity, dtype, cameras, pedestal)
        masks = open_weights(weights, channels, files)
        (frame, *others) = dict.fromkeys(channel.shape[1:] for channel in channels)
        name = channels[0].movie.name
        if others:
            what = f"frames of {frame} and {others[0]} (height, width) pixels are no array"
            raise MovieError(f"{name}: {what}; give one source or box a call")
        estimator = with_movie_patterns(estimator, channels, masks, cameras)
        estimator, cameras = compute.on_one_device((estimator, cameras))
        fast = estimator.for_inference()
        if chunk_frames is not None:
            chunk_frames = checked_count("chunk_frames", chunk_frames)
        chunk_frames, _ = plan_chunks(
            channels,
            fast.halo_frames,
            jax.local_devices(),
            pixel_bytes=fast.pixel_bytes,
            chunk_frames=chunk_frames,
            workers=1,
        )
        length = len(channels[0])
        chunks = [*windows(length, chunk_frames, fast.halo_frames, fast.aligned_frames)]
        seen = chunks[0].seen.stop
        stacks = [((seen, *channel.shape[1:]), channel.dtype) for channel in channels]
        weighted = [
            None if mask is None else (min(seen, len(mask)), *mask.shape[1:])
            for mask in masks
        ]
        compute.check_fit(fast, output, cameras, stacks, weighted)
        # From here on, the files are closed by the estimate.
        close = files.pop_all().close
    return LazyEstimate(
        name,
        (length, *([count] if count > 1 else []), *frame),
        dtype,
        chunks,
        _chunk_estimator(fast, output, cameras, channels, masks),
        cache_bytes,
        close,
    )


def _chunk_estimator(
    estimator: AbstractEstimator,
    output: Output,
    cameras: Sequence[Camera],
    channels: Sequence[Channel],
    masks: Sequence[Channel | None],
) -> Callable[[Window], Shaped[np.ndarray, "frames ..."]]:
    """A function that estimates a window, in any thread as in this one."""
    estimate = compute.compile_estimate(estimator, output, cameras)
    is_64_bit, device = jax.enable_x64.value, jax.default_device.value
    name, is_one = channels[0].movie.name, len(channels) == 1

    def estimate_chunk(window: Window) -> Shaped[np.ndarray, "frames ..."]:
        frames, weights = read_window(window, channels, masks)
        with jax.enable_x64(is_64_bit), jax.default_device(device):
            images = compute.run_window(name, estimate, frames, window, weights).images
        # A copy, which does not hold the memory of the halo.
        return images[0].copy() if is_one else np.stack(images, axis=1)

    return estimate_chunk

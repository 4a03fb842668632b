"""A movie in, its background out: by chunks, on every core and device, resumed after
whatever goes wrong."""

import contextlib
import functools as ft
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._estimators.base import AbstractEstimator
from .._movies.movie import Box, Channel, Movie, movie_of_array, MovieError
from .._movies.open import open_movie
from .._movies.sources import is_split, open_channels
from .._workers import Gate, on_threads, progress_bar, run_interruptibly
from .compute import (
    Buffers,
    check_takes_weights,
    check_weights,
    compile_estimate,
    Counts,
    Dtype,
    make_output,
    Output,
    Quantity,
    run_window,
)
from .plan import plan_chunks, strips, Window, windows
from .results import as_path, begun_chunk_frames, check_targets, group_targets, Results
from .settings import settings_of, Sources


@dataclass(frozen=True)
class MovieSummary:
    """What [`jaxbkgd.estimate_movie`][] has done.

    **Attributes:**

    - `frames`: of the movie.
    - `resumed_frames`: those that earlier runs had done.
    - `seconds`: that this run took, compilation included.
    - `megapixels_per_second`: of all channels, in this run.
    - `noise_corrections`: of each channel, see [`jaxbkgd.Background`][].
    - `chunk_frames`, `workers`: what was chosen.
    - `nonfinite_frames`: frames whose result has a NaN or an infinity.
    - `clipped_frames`: frames with a background that uint16 could not hold.
    """

    frames: int
    resumed_frames: int
    seconds: float
    megapixels_per_second: float
    noise_corrections: tuple[float, ...]
    chunk_frames: int
    workers: int
    nonfinite_frames: int
    clipped_frames: int


def estimate_movie(
    source: Any,
    estimator: AbstractEstimator,
    sink: Any,
    *,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    boxes: Sequence[Box] | None = None,
    offsets: Any = 0.0,
    gains: Any = None,
    weights: Any = None,
    chunk_frames: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> MovieSummary:
    """Estimates the background of a whole movie, and writes it as it goes.

    Memory is bounded by the chunks that are worked on, not by the movie. A result has its
    name only when it is complete. Until then it lies beside it as `NAME.part`, with
    `NAME.part.journal`; the same call goes on from there, whatever has ended the one
    before. The result is that of `estimator(frames)` on the whole movie, to the bit, for
    the estimators of this package. (In a function that is compiled with the estimator as
    an argument, the last digit may differ.)

    **Arguments:**

    - `source`: a path, an array or memory map (frames, height, width), or an open movie;
        see [`jaxbkgd.open_movie`][]. One with several channels is estimated as such. A
        list or tuple of sources holds a channel each.
    - `estimator`: any estimator; each chunk is read with its `halo_frames`.
    - `sink`: where to write, by the suffix of the name `.tif`, `.ome.tif`, `.zarr` or
        `.ome.zarr`, or a NumPy array to fill; a list of these for a list of sources, or
        for boxes. Several channels of one source are written to one sink.
    - `quantity`: `"background"` or `"residual"`, in the unit of the frames, or `"snr"`, see
        [`jaxbkgd.snr`][].
    - `dtype`: `"float32"`, or `"uint16"` for a background that is rounded to the nearest
        number (to the even one of two) and clipped to 0 and 65535.
    - `boxes`: parts (x0, y0, x1, y1) of the frames, in pixels, up to and without x1 and
        y1, which are estimated as channels.
    - `offsets`: the camera's offset in ADU that is subtracted from the frames, a number
        for all channels or one for each.
    - `gains`: electrons per ADU, a number for all channels or one for each; for `"snr"`.
    - `weights`: how much a pixel counts, zero or positive, or booleans that are False for
        pixels to leave out; for estimators that take weights, as [`jaxbkgd.LocalMean`][].
        An array (height, width), or a source (frames, height, width), for all channels, or
        a list with one for each, which may be `None`. With boxes, weights are of the whole
        frame.
    - `chunk_frames`: frames in a chunk, by default a megapixel, half of that between arrays
        on CPU, or less where memory is short; with `halo_frames`, at least four times
        these.
    - `workers`: the number of threads, by default the cores of this process, or fewer
        where memory is short.
    - `progress`: whether to show a progress bar, where there is a terminal.
    - `resume`: whether to go on with what an earlier call has left; otherwise it is begun
        anew.
    - `overwrite`: whether a result that has the name already is replaced, in the end.

    **Returns:**

    A [`jaxbkgd.MovieSummary`][].

    **Raises:**

    [`jaxbkgd.MovieError`][], a `ValueError`, if a movie cannot be read or written, or what
    an earlier call has left was begun with other settings; `ValueError` or `TypeError` for
    arguments that do not fit the estimator or each other. What is done by then is kept.
    """
    clock = time.perf_counter()
    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(
            f"An estimator is needed, as jaxbkgd.SpatialMean(7.0), but got {estimator!r}."
        )
    if weights is not None:
        check_takes_weights(estimator)
    gate = Gate()
    with contextlib.ExitStack() as files:
        channels = open_channels(source, boxes, files=files)
        is_list = is_split(source, boxes)
        output = make_output(
            quantity,
            dtype,
            offsets,
            gains,
            channel_count=len(channels),
            is_one_stack=len(channels) == 1 and not is_list,
        )
        masks = _open_weights(weights, channels, files)
        movies = list({c.movie: None for c in (*channels, *masks) if c is not None})
        targets = group_targets(sink, len(channels), is_list)
        check_targets(targets, movies)
        fast, noise_corrections = run_interruptibly(_prepare, estimator, channels, output)
        if chunk_frames is None and resume:
            chunk_frames = begun_chunk_frames(targets)
        is_to_arrays = not any(as_path(target) for target, _ in targets)
        chunk_frames, workers = plan_chunks(
            channels,
            fast.halo_frames,
            jax.local_devices(),
            chunk_frames=chunk_frames,
            workers=workers,
            is_between_arrays=is_to_arrays and not any(movie.paths for movie in movies),
        )
        sources = Sources(movies)
        settings = ft.partial(
            settings_of, sources, channels, masks, estimator, output, chunk_frames
        )
        results = files.enter_context(Results(gate))
        results.open(
            targets,
            channels,
            dtype,
            chunk_frames,
            ft.cache(settings),
            resume=resume,
            overwrite=overwrite,
        )
        has_strips = is_to_arrays and chunk_frames == 1
        work = _Work(channels, masks, fast, output, results, gate, has_strips)
        frame_count = len(channels[0])
        todo = results.missing(windows(frame_count, chunk_frames, fast.halo_frames))
        resumed_frames = frame_count - sum(w.stop - w.start for w in todo)
        counts = _run(work, todo, workers, gate, progress, resumed_frames)
        try:
            sources.check()
        except MovieError:
            results.forbid_resuming()
            raise
        results.commit()

    seconds = time.perf_counter() - clock
    return MovieSummary(
        frames=frame_count,
        resumed_frames=resumed_frames,
        seconds=seconds,
        megapixels_per_second=(frame_count - resumed_frames) * work.megapixels / seconds,
        noise_corrections=noise_corrections,
        chunk_frames=chunk_frames,
        workers=workers,
        nonfinite_frames=counts.nonfinite_frames,
        clipped_frames=counts.clipped_frames,
    )


def _prepare(
    estimator: AbstractEstimator, channels: Sequence[Channel], output: Output
) -> tuple[AbstractEstimator, tuple[float, ...]]:
    """The estimator for inference, and the noise corrections of the given one. Raises what
    would else be raised in the middle of the work."""
    fast = estimator.for_inference()
    frames = min(len(channels[0]), 2 * fast.halo_frames + 1)
    shapes = [(frames, *channel.shape[1:]) for channel in channels]
    corrections = _noise_corrections(estimator, shapes, output.is_one_stack)
    return fast, tuple(float(value) for value in corrections)


@eqx.filter_jit
def _noise_corrections(
    estimator: AbstractEstimator, shapes: Sequence[tuple[int, ...]], is_one_stack: bool
) -> list[Float[Array, ""]]:
    # Where they do not depend on the frames, the compiled program makes no frames.
    frames = [jnp.zeros(shape) for shape in shapes]
    background = estimator(frames[0] if is_one_stack else frames)
    return jax.tree.leaves(background.noise_corrections)


class _Work:
    """Reads, estimates and writes a window, in any number of threads.

    **Attributes:**

    - `megapixels`: of a frame of all channels.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        weights: Sequence[Channel | None],
        fast: AbstractEstimator,
        output: Output,
        results: Results,
        gate: Gate,
        has_strips: bool,
    ) -> None:
        self.megapixels = sum(math.prod(channel.shape[1:]) for channel in channels) / 1e6
        self._channels = channels
        self._weights = weights
        self._estimate = ft.partial(
            run_window, channels[0].movie.name, compile_estimate(fast, output)
        )
        self._results = results
        self._gate = gate
        self._devices = jax.local_devices()
        self._is_on_cpu = self._devices[0].platform == "cpu"
        is_background = (output.quantity, output.dtype) == ("background", "float32")
        self._can_reuse = self._is_on_cpu and is_background and fast.takes_donated
        lines = (
            strips(channels, fast.halo_lines) if has_strips and self._can_reuse else None
        )
        self._strips: Sequence[Window | None] = lines or [None]
        # Those that no thread uses now, on each device.
        self._buffers = {device: SimpleQueue[Buffers]() for device in self._devices}
        # Threads have settings of their own.
        self._is_64_bit = jax.config.read("jax_enable_x64")

    def __call__(self, window: Window) -> tuple[Window, Counts]:
        # Each device has windows of its own: none waits for another.
        device = self._devices[window.number % len(self._devices)]
        with jax.enable_x64(self._is_64_bit), jax.default_device(device):
            try:
                buffers = self._buffers[device].get_nowait()
            except Empty:
                buffers = Buffers(self._is_on_cpu, self._can_reuse)
            counts = self._run(window, buffers)
            self._buffers[device].put(buffers)
        return window, counts

    def _run(self, window: Window, buffers: Buffers) -> Counts:
        self._gate.check()
        chunks = [channel[window.low : window.high] for channel in self._channels]
        masks = [None if w is None else _read_weights(w, window) for w in self._weights]
        counts = []
        for strip in self._strips:
            self._gate.check()
            seen = slice(None) if strip is None else slice(strip.low, strip.high)
            images, of_strip = self._estimate(
                [chunk[:, seen] for chunk in chunks],
                window,
                [None if mask is None else mask[:, seen] for mask in masks],
                buffers,
            )
            self._results.write(window, strip, buffers.as_numpy(images))
            counts.append(of_strip)
        self._results.note(window)
        # Several strips are of one frame.
        return Counts(*map(max, zip(*counts, strict=True)))


def _run(
    work: _Work,
    todo: Sequence[Window],
    workers: int,
    gate: Gate,
    progress: bool,
    done_frames: int,
) -> Counts:
    """Works on windows and shows the progress."""
    begun, megapixels, counts = time.perf_counter(), 0.0, Counts(0, 0)
    total = done_frames + sum(window.stop - window.start for window in todo)
    with progress_bar(total, progress, done_frames) as report:
        for window, more in on_threads(work, todo, workers, gate):
            counts = Counts(*map(sum, zip(counts, more, strict=True)))
            done_frames += window.stop - window.start
            megapixels += (window.stop - window.start) * work.megapixels
            rate = megapixels / (time.perf_counter() - begun)
            report(done_frames, f"{rate:.0f} Mpx/s")
    return counts


def _open_weights(
    weights: Any, channels: Sequence[Channel], files: contextlib.ExitStack
) -> list[Channel | None]:
    """The weights of each channel, cut as the channel is."""
    if isinstance(weights, list | tuple):
        movies = [_open_mask(mask, files) for mask in weights]
    else:
        movies = [_open_mask(weights, files)] * len(channels)
    if len(movies) != len(channels):
        raise ValueError(
            f"There are {len(channels)} channels, but weights for {len(movies)}; give one "
            "for all, or a list with one for each."
        )
    return [
        None if movie is None else _fitting_weights(movie, channel)
        for movie, channel in zip(movies, channels, strict=True)
    ]


def _open_mask(mask: Any, files: contextlib.ExitStack) -> Movie | None:
    if mask is None or isinstance(mask, Movie):
        return mask
    if as_path(mask):
        return files.enter_context(open_movie(mask))
    frames = np.asarray(mask)[None] if np.ndim(mask) == 2 else mask
    return movie_of_array(frames, "the weights")


def _fitting_weights(movie: Movie, channel: Channel) -> Channel:
    frames, count, *size = movie.shape
    _, _, *frame_size = channel.movie.shape
    if count > 1 or size != frame_size or frames not in (1, len(channel)):
        height, width = frame_size
        raise MovieError(
            f"{movie.name}: has the shape (frames, channels, height, width) {movie.shape}; "
            f"as weights of these frames it must have 1 or {len(channel)} frames, one "
            f"channel, and {height} x {width} pixels"
        )
    return Channel(movie, 0, channel.box)


def _read_weights(
    weights: Channel, window: Window
) -> Shaped[np.ndarray, "frames height width"]:
    """The weights of a window's frames, or of one frame that stands for all."""
    values = weights[window.low : window.high] if len(weights) > 1 else weights[:1]
    check_weights(weights.movie.name, values)
    return values

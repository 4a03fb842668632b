"""A movie in, its background out: by chunks, on every core and device, resumed after
whatever goes wrong."""

import collections
import contextlib
import functools as ft
import hashlib
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_args, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._estimators.base import AbstractEstimator
from .._estimators.channels import as_frames, checked_frames
from .._filter.nonfinite import zeros_of
from .._filter.vectors import compiler_options
from .._movies.journal import Journal
from .._movies.movie import ArrayMovie, Box, Channel, Movie, MovieError, one_line
from .._movies.open import open_movie, open_sink
from .._movies.sinks import (
    ArraySink,
    draft_of,
    DRAFT_SUFFIXES,
    JOURNAL_SUFFIX,
    Layout,
    Sink,
)
from .._workers import core_count, on_threads, progress_bar
from .buffers import Buffers


# What is written of each frame.
Quantity = Literal["background", "residual", "snr"]

# Of uint16, the background is rounded to the nearest number, to the even one of two.
Dtype = Literal["float32", "uint16"]

# Pixels of all channels in a chunk; and between arrays on CPU, where it stays in cache from
# one to the other. Of fewer, each call costs more than that saves.
_CHUNK_PIXELS, _CACHED_PIXELS = 2**20, 2**19

# A frame that is larger than that goes in strips, with no fewer lines than this for each
# one in their halo, which is filtered twice.
_STRIP_LINES_PER_HALO_LINE = 8

# Bytes that a pixel takes on its way, as it is read, converted, filtered and written; and
# where an estimator sees many frames at a time, of which it may hold a dozen images.
_PIXEL_BYTES, _PIXEL_BYTES_WITH_HALO = 32, 64


@dataclass(frozen=True)
class MovieSummary:
    """What [`jaxbkgd.estimate_movie`][] has done.

    **Attributes:**

    - `frames`: of the movie.
    - `resumed_frames`: of these, what earlier runs had done.
    - `seconds`: that this run took, compilation included.
    - `megapixels_per_second`: of all channels, in this run.
    - `noise_corrections`: of each channel, see [`jaxbkgd.Background`][].
    - `chunk_frames`, `workers`: what was chosen.
    - `nonfinite_frames`: frames in whose result a NaN or an infinity stands.
    - `clipped_frames`: frames in which uint16 could not hold a background.
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


class Wanted(NamedTuple):
    """What is made of the frames; offsets and gains are those of each channel."""

    quantity: Quantity
    dtype: Dtype
    offsets: tuple[float, ...]
    gains: tuple[float, ...]
    # Whether the estimator is called with one stack of frames, or with a list of them.
    is_one_stack: bool


class Counts(NamedTuple):
    """Of frames whose result is not what it should be."""

    nonfinite_frames: int
    clipped_frames: int


class Window(NamedTuple):
    """Frames `start` to `stop`, or lines of a frame, are estimated from `low` to `high`."""

    number: int
    start: int
    stop: int
    low: int
    high: int

    @property
    def kept(self) -> slice:
        """Of what is estimated."""
        return slice(self.start - self.low, self.stop - self.low)


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
    with contextlib.ExitStack() as files:
        channels = _opened_channels(source, boxes, files)
        is_split = _is_list(source) or boxes is not None
        wanted = Wanted(
            checked_choice("quantity", quantity, Quantity),
            checked_choice("dtype", dtype, Dtype),
            one_for_each("offsets", offsets, channels),
            one_for_each("gains", gains, channels),
            is_one_stack=len(channels) == 1 and not is_split,
        )
        check_wanted(wanted)
        fast = estimator.for_inference()
        halo_frames = fast.halo_frames
        noise_corrections = _checked_noise_corrections(
            estimator, channels, wanted, halo_frames
        )
        masks = _opened_weights(weights, channels, files)
        targets = _grouped(sink, channels, is_split)
        _check_targets([target for target, _ in targets], _movies(channels, masks))
        chunk_frames, workers = _chunk_frames_and_workers(
            channels,
            halo_frames,
            _chunk_pixels(channels, [target for target, _ in targets]),
            _at_least_1("chunk_frames", chunk_frames)
            or (_begun_chunk_frames(targets) if resume else None),
            _at_least_1("workers", workers),
        )
        job = _Job(channels, masks, estimator, fast, wanted, chunk_frames)
        files.enter_context(job)
        job.open(targets, resume=resume, overwrite=overwrite)
        frame_count = len(channels[0])
        resumed_frames = frame_count - sum(w.stop - w.start for w in job.todo())
        counts = job.run(workers, progress=progress, done_frames=resumed_frames)
        job.commit()

    seconds = time.perf_counter() - clock
    return MovieSummary(
        frames=frame_count,
        resumed_frames=resumed_frames,
        seconds=seconds,
        megapixels_per_second=(frame_count - resumed_frames) * job.megapixels / seconds,
        noise_corrections=noise_corrections,
        chunk_frames=chunk_frames,
        workers=workers,
        nonfinite_frames=counts.nonfinite_frames,
        clipped_frames=counts.clipped_frames,
    )


class _Job(contextlib.AbstractContextManager):
    """Windows of a movie's channels on their way to sinks, each for some of the channels.

    What ends the job early leaves drafts for a later one, if there is anything in them.

    **Attributes:**

    - `megapixels`: of a frame of all channels.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        weights: Sequence[Channel | None],
        estimator: AbstractEstimator,
        fast: AbstractEstimator,
        wanted: Wanted,
        chunk_frames: int,
    ) -> None:
        self.megapixels = sum(math.prod(channel.shape[1:]) for channel in channels) / 1e6
        self._channels = channels
        self._weights = weights
        self._halo_frames = fast.halo_frames
        self._halo_lines = fast.halo_lines
        self._chunk_frames = chunk_frames
        # Asked for only by files: the fingerprint of an array reads all of it.
        self._settings = ft.cache(
            lambda: _settings(channels, weights, estimator, wanted, chunk_frames)
        )
        estimate = compiled(fast, wanted)
        self._estimate = ft.partial(estimated, channels[0].movie.name, estimate)
        self._wanted = wanted
        is_background = (wanted.quantity, wanted.dtype) == ("background", "float32")
        self._can_reuse = is_background and fast.takes_donated
        # Lines of a frame that are estimated by themselves, or None for whole frames.
        self._strips: list[Window | None] = [None]
        # What no thread uses, on each device.
        self._buffers: dict[Any, list[Buffers]] = collections.defaultdict(list)
        self._sinks: dict[Sink | ArraySink, list[int]] = {}
        # Those that an earlier run has given their names.
        self._named_sinks: list[Sink | ArraySink] = []
        self._new_sinks: set[Sink | ArraySink] = set()
        self._can_go_on = False

    def open(
        self,
        targets: Sequence[tuple[Any, list[int]]],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Open the sink of each group of channels: one that an earlier job with these
        settings has left, or a new one."""
        for target, group in targets:
            of_sink = [self._channels[index] for index in group]
            layout = _layout(of_sink, self._wanted.dtype, self._chunk_frames)
            self._sinks[open_sink(target, layout, overwrite=overwrite)] = group
        self._named_sinks = [s for s in self._sinks if resume and s.is_committed]
        for sink, group in list(self._sinks.items()):
            is_begun = resume and (sink.is_begun or sink.is_committed)
            before = sink.journal.settings or {}
            if is_begun and (names := _difference(before, self._settings_of(group))):
                raise MovieError(
                    f"{sink.journal.path}: was begun with other settings ({names}); give "
                    "the same again, or begin anew (resume=False, in the command line "
                    "--fresh)"
                )
            if sink not in self._named_sinks:
                sink.check()
        for sink, group in list(self._sinks.items()):
            if sink in self._named_sinks:
                del self._sinks[sink]
            elif resume and sink.is_begun:
                sink.resume()
            else:
                self._new_sinks.add(sink)
                sink.begin(self._settings_of(group) if isinstance(sink, Sink) else None)
        # Files are written by whole frames.
        if self._can_reuse and all(isinstance(sink, ArraySink) for sink in self._sinks):
            self._strips = _strips(self._channels, self._chunk_frames, self._halo_lines)
        self._can_go_on = True

    def _settings_of(self, group: list[int]) -> dict[str, Any]:
        return self._settings() | {"channels": group}

    def todo(self) -> Iterator[Window]:
        """The windows that a sink lacks."""
        frames = len(self._channels[0])
        done = [sink.journal.done for sink in self._sinks]
        for window in windows(frames, self._chunk_frames, self._halo_frames):
            if not all(window.number in numbers for numbers in done):
                yield window

    def run(self, workers: int, *, progress: bool, done_frames: int) -> Counts:
        """Works on what is to do."""
        begun, megapixels, counts = time.perf_counter(), 0.0, Counts(0, 0)
        # Threads have settings of their own.
        is_64_bit = jax.config.read("jax_enable_x64")
        devices = jax.local_devices()

        def run(window: Window) -> tuple[Window, Counts]:
            # Each device has windows of its own: none waits for another.
            device = devices[window.number % len(devices)]
            with jax.enable_x64(is_64_bit), jax.default_device(device):
                return window, self._do(window, device)

        with progress_bar(len(self._channels[0]), progress, done_frames) as report:
            for window, more in on_threads(run, self.todo(), workers):
                counts = Counts(*map(sum, zip(counts, more, strict=True)))
                done_frames += window.stop - window.start
                megapixels += (window.stop - window.start) * self.megapixels
                rate = megapixels / (time.perf_counter() - begun)
                report(done_frames, f"{rate:.0f} Mpx/s")
        return counts

    def _do(self, window: Window, device: Any) -> Counts:
        chunks = [channel[window.low : window.high] for channel in self._channels]
        weights = [
            None if each is None else _read_weights(each, window) for each in self._weights
        ]
        if device.platform != "cpu":
            images, counts = self._estimate(chunks, window, weights)
            self._write(window, None, [np.asarray(image) for image in images])
        else:
            counts = self._do_in_strips(chunks, window, weights, self._buffers[device])
        for sink in self._sinks:
            sink.note(window.number)
        return counts

    def _do_in_strips(
        self,
        chunks: Sequence[np.ndarray],
        window: Window,
        weights: Sequence[np.ndarray | None],
        free: list[Buffers],
    ) -> Counts:
        buffers = free.pop() if free else Buffers(self._can_reuse)
        counts = []
        for strip in self._strips:
            seen = slice(None) if strip is None else slice(strip.low, strip.high)
            images, of_strip = self._estimate(
                [chunk[:, seen] for chunk in chunks],
                window,
                [None if each is None else each[:, seen] for each in weights],
                buffers,
            )
            self._write(window, strip, buffers.as_numpy(images))
            counts.append(of_strip)
        free.append(buffers)
        # If there are several, they are of one and the same frame.
        return Counts(*map(max, zip(*counts, strict=True)))

    def _write(
        self, window: Window, strip: Window | None, images: Sequence[np.ndarray]
    ) -> None:
        for sink, group in self._sinks.items():
            parts = [images[index][window.kept, None] for index in group]
            frames = parts[0] if len(parts) == 1 else np.hstack(parts)
            if strip is None:
                sink.write(window.start, frames)
            else:
                assert isinstance(sink, ArraySink)
                sink.write(window.start, frames[..., strip.kept, :], strip.start)

    def commit(self) -> None:
        self._check_sources()
        for sink in self._sinks:
            sink.give_name()
        # Not before all have their names: of a job that ends earlier, a later run would not
        # know the first ones for its own. (One that ends here is whole.)
        for sink in (*self._named_sinks, *self._sinks):
            sink.finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        kept = []
        for sink in self._named_sinks:
            sink.close()
        for sink in self._sinks:
            if error is not None and sink in self._new_sinks and not sink.journal.done:
                sink.discard()
                continue
            if isinstance(sink, Sink) and sink.journal.done and sink.draft.exists():
                kept.append(str(sink.draft))
            sink.close()
        if error is not None and kept and self._can_go_on:
            error.add_note(
                f"what is done is kept in {', '.join(kept)}; run the same again to go on"
            )

    def _check_sources(self) -> None:
        for movie in _movies(self._channels, self._weights):
            try:
                has_changed = movie.state() != movie.opened_state
            except OSError:
                has_changed = True
            if has_changed:
                self._can_go_on = False
                raise MovieError(
                    f"{movie.name}: has changed since it was opened; begin anew once it is "
                    "whole (resume=False, in the command line --fresh)"
                )


# Images, one a channel, and which frames are finite, and which are clipped, in any of them,
# where either can happen.
Estimates = tuple[list[Array], Bool[Array, " frames"] | None, Bool[Array, " frames"] | None]


def estimate_window(
    estimator: AbstractEstimator,
    channels: Sequence[Any],
    wanted: Wanted,
    weights: Sequence[Any] = (),
    spent: Sequence[Array] | None = None,
) -> Estimates:
    """What is wanted of each channel's frames."""
    stacks = [
        as_frames(channel) - np.float32(offset) if offset else as_frames(channel)
        for channel, offset in zip(channels, wanted.offsets, strict=True)
    ]
    frames = stacks[0] if wanted.is_one_stack else stacks
    given = {}
    if any(each is not None for each in weights):
        given["weights"] = weights[0] if wanted.is_one_stack else weights
    if spent is not None:
        given["donated"] = spent[0] if wanted.is_one_stack else list(spent)
    background = estimator(frames, **given)
    match wanted.quantity:
        case "background":
            images = background.bkgds
        case "residual":
            images = background.residuals(frames)
        case "snr":
            gains = list(wanted.gains)
            images = background.snr(frames, gains[0] if wanted.is_one_stack else gains)
    images = [images] if wanted.is_one_stack else list(images)
    is_finite = is_clipped = None
    # Where no pixel counts, there is no background.
    if (
        "weights" in given
        or wanted.quantity == "snr"
        or any(jnp.issubdtype(stack.dtype, jnp.floating) for stack in stacks)
    ):
        finite = [jnp.isfinite(zeros_of(image)).all((-2, -1)) for image in images]
        is_finite = jnp.stack(finite).all(0)
    if wanted.dtype == "uint16":
        rounded = [jnp.round(image) for image in images]
        images = [jnp.clip(image, 0, 2**16 - 1) for image in rounded]
        clipped = [
            (image != whole).any((-2, -1))
            for image, whole in zip(images, rounded, strict=True)
        ]
        is_clipped = jnp.stack(clipped).any(0)
    return [image.astype(wanted.dtype) for image in images], is_finite, is_clipped


def compiled(estimator: AbstractEstimator, wanted: Wanted) -> Callable[..., Estimates]:
    """`estimate_window` as a function of channels, weights and `spent`, which it gives up.

    As `eqx.filter_jit`, but looks at the estimator now and not in each call, which would
    take as long as to filter some 10^5 pixels.
    """
    arrays, rest = eqx.partition(estimator, eqx.is_array)
    return ft.partial(_compiled(rest, wanted), arrays)


@ft.lru_cache
def _compiled(rest: AbstractEstimator, wanted: Wanted) -> Callable[..., Estimates]:
    def estimate(arrays, channels, weights, spent):
        estimator = eqx.combine(arrays, rest)
        return estimate_window(estimator, channels, wanted, weights, spent)

    options = compiler_options()
    return jax.jit(estimate, donate_argnames="spent", compiler_options=options)


def windows(frame_count: int, chunk_frames: int, halo_frames: int) -> Iterator[Window]:
    """The chunks of a movie, each with what must be seen to estimate it. All are of one
    length, so that nothing is compiled twice."""
    length = min(frame_count, chunk_frames + 2 * halo_frames)
    for number, start in enumerate(range(0, frame_count, chunk_frames)):
        low = min(max(0, start - halo_frames), frame_count - length)
        stop = min(start + chunk_frames, frame_count)
        yield Window(number, start, stop, low, low + length)


def _strips(
    channels: Sequence[Channel], chunk_frames: int, halo_lines: int | None
) -> list[Window | None]:
    """The strips of large frames, if there is one in a chunk, and an estimator that needs
    no more than some lines around one."""
    sizes = {channel.shape[1:] for channel in channels}
    if halo_lines is None or chunk_frames > 1 or len(sizes) > 1:
        return [None]
    height, width = sizes.pop()
    most = height // (_STRIP_LINES_PER_HALO_LINE * max(1, halo_lines))
    count = min(len(channels) * height * width // _CACHED_PIXELS, most)
    if count < 2:
        return [None]
    return list(windows(height, math.ceil(height / count), halo_lines))


def estimated(
    name: str,
    estimate: Callable[..., Estimates],
    chunks: Sequence[np.ndarray],
    window: Window,
    weights: Sequence[np.ndarray | None] = (),
    buffers: Buffers | None = None,
) -> tuple[list[Array], Counts]:
    """What is wanted of the frames `low` to `high` of a window, which the chunks hold, and
    weights if there are any. The counts are of those that are kept."""
    try:
        frames = [checked_frames(chunk) for chunk in chunks]
        masks = [None if each is None else checked_frames(each) for each in weights]
        if buffers is not None:
            frames = buffers.holding(frames)
        images, *flags = estimate(frames, masks, buffers and buffers.spent)
        # Nothing that comes after may find that it was not possible.
        jax.block_until_ready(images)
        is_finite, is_clipped = (
            None if each is None else np.asarray(each)[window.kept] for each in flags
        )
    except Exception as error:
        raise MovieError(
            f"{name}: frames {window.start} to {window.stop - 1} cannot be estimated "
            f"({one_line(error)})"
        ) from error
    nonfinite = [] if is_finite is None else np.flatnonzero(~is_finite)
    if len(nonfinite) and images[0].dtype == np.uint16:
        raise MovieError(
            f"{name}: the background of frame {window.start + nonfinite[0]} is not finite, "
            "and uint16 has no number for that; write float32"
        )
    clipped_frames = 0 if is_clipped is None else int(is_clipped.sum())
    return images, Counts(len(nonfinite), clipped_frames)


def _opened_channels(
    source: Any, boxes: Sequence[Box] | None, files: contextlib.ExitStack
) -> list[Channel]:
    movies = []
    for one in source if _is_list(source) else [source]:
        movies.append(open_movie(one))
        if not isinstance(one, Movie):
            files.enter_context(movies[-1])
    if not movies:
        raise ValueError("There is no source; give a path or an array, or a list of them.")
    if not _is_list(source) and boxes is None:
        return movies[0].channels
    for movie in movies:
        if movie.shape[1] > 1:
            raise MovieError(
                f"{movie.name}: holds {movie.shape[1]} channels; estimate it by itself, "
                "without a list of sources or boxes"
            )
    if boxes is not None:
        if _is_list(source) or not boxes:
            raise ValueError(
                f"boxes are {boxes} of {len(movies)} sources; give at least one, of the "
                "frames of one source."
            )
        return [Channel(movies[0], 0, box) for box in boxes]
    lengths = [movie.shape[0] for movie in movies]
    if len(set(lengths)) > 1:
        raise MovieError(
            f"{movies[0].name}: the channels have {', '.join(map(str, lengths))} frames; "
            "give movies of the same length"
        )
    return [Channel(movie, 0) for movie in movies]


def check_takes_weights(estimator: AbstractEstimator) -> None:
    if not estimator.takes_weights:
        raise TypeError(
            f"{type(estimator).__name__} takes no weights; leave them out, or use an "
            "estimator that does, as LocalMean."
        )


def _opened_weights(
    weights: Any, channels: Sequence[Channel], files: contextlib.ExitStack
) -> list[Channel | None]:
    """Those of each channel, cut as the channel is."""

    def opened(one: Any) -> Movie | None:
        if one is None or isinstance(one, Movie):
            return one
        if _is_path(one):
            return files.enter_context(open_movie(one))
        return ArrayMovie(
            np.asarray(one)[None] if np.ndim(one) == 2 else one, "the weights"
        )

    if not _is_list(weights):
        weights = len(channels) * [opened(weights)]
    if len(weights) != len(channels):
        raise ValueError(
            f"There are {len(channels)} channels, but weights for {len(weights)}; give one "
            "for all, or a list with one for each."
        )
    return [
        None if movie is None else _fitting_weights(movie, channel)
        for movie, channel in zip(map(opened, weights), channels, strict=True)
    ]


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


def _read_weights(weights: Channel, window: Window) -> np.ndarray:
    """Of the frames of a window, or of one that stands for all."""
    values = weights[window.low : window.high] if len(weights) > 1 else weights[:1]
    check_weights(weights.movie.name, values)
    return values


def check_weights(name: str, values: np.ndarray) -> None:
    if not np.all((values >= 0) & (values < np.inf)):
        raise MovieError(
            f"{name}: a weight is negative or not finite; give booleans, or numbers from 0"
        )


def check_wanted(wanted: Wanted) -> None:
    if wanted.quantity == "snr" and not wanted.gains:
        raise ValueError("An SNR needs gains, in electrons per ADU.")
    if wanted.quantity != "background" and wanted.dtype == "uint16":
        raise ValueError(
            f"A {wanted.quantity} is negative in places, and uint16 is not; write float32."
        )
    for name, values in (("offsets", wanted.offsets), ("gains", wanted.gains)):
        for value in values:
            if not math.isfinite(value) or (name == "gains" and value <= 0):
                rule = "positive and finite" if name == "gains" else "finite"
                raise ValueError(f"{name} must be {rule}, but one is {value}.")


@eqx.filter_jit
def _noise_corrections(
    estimator: AbstractEstimator, shapes: Sequence[tuple[int, ...]], is_one_stack: bool
) -> list[Array]:
    # Where they do not depend on the frames, there are none in the compiled program.
    frames = [jnp.zeros(shape) for shape in shapes]
    background = estimator(frames[0] if is_one_stack else frames)
    return jax.tree.leaves(background.noise_corrections)


def _checked_noise_corrections(
    estimator: AbstractEstimator,
    channels: Sequence[Channel],
    wanted: Wanted,
    halo_frames: int,
) -> tuple[float, ...]:
    """Raises what would be raised in the middle of the work, too."""
    frames = min(len(channels[0]), 2 * halo_frames + 1)
    shapes = [(frames, *channel.shape[1:]) for channel in channels]
    corrections = _noise_corrections(estimator, shapes, wanted.is_one_stack)
    return tuple(float(value) for value in corrections)


def _settings(
    channels: Sequence[Channel],
    weights: Sequence[Channel | None],
    estimator: AbstractEstimator,
    wanted: Wanted,
    chunk_frames: int,
) -> dict[str, Any]:
    """What the result depends on, to the bit, in terms of JSON."""
    numbers = hashlib.sha256()
    for array in jax.tree.leaves(eqx.filter(estimator, eqx.is_array)):
        numbers.update(np.asarray(array).tobytes())
    prints = {movie: movie.fingerprint() for movie in _movies(channels, weights)}
    return {
        "source": [[prints[c.movie], c.index, list(c.box)] for c in channels],
        "weights": [None if each is None else prints[each.movie] for each in weights],
        "estimator": [eqx.tree_pformat(estimator), numbers.hexdigest()],
        "quantity": wanted.quantity,
        "dtype": wanted.dtype,
        "offsets": list(wanted.offsets),
        "gains": list(wanted.gains),
        "chunk_frames": chunk_frames,
        "version of jaxbkgd": installed_version(),
        "version of jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
        "64-bit mode": jax.config.read("jax_enable_x64"),
    }


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words."""
    said = []
    for name in sorted(before | now):
        if before.get(name) != now.get(name):
            # What these are is long, and says nothing.
            is_short = name not in ("source", "weights", "estimator")
            values = f" {before.get(name)}, not {now.get(name)}" if is_short else ""
            said.append(f"{name}{values}")
    return "; ".join(said)


def _layout(channels: Sequence[Channel], dtype: Dtype, chunk_frames: int) -> Layout:
    """Of the channels of one sink, which are of one size."""
    frames, height, width = channels[0].shape
    movie = channels[0].movie
    return Layout(
        (frames, len(channels), height, width),
        np.dtype(dtype),
        chunk_frames,
        movie.pixel_size_um,
        movie.frame_interval_s,
    )


def _grouped(
    sink: Any, channels: Sequence[Channel], is_split: bool
) -> list[tuple[Any, list[int]]]:
    """Each target, with the numbers of the channels that go there."""
    indices = list(range(len(channels)))
    groups = [[index] for index in indices] if is_split else [indices]
    targets = list(sink) if is_split and _is_list(sink) else [sink]
    if len(targets) != len(groups):
        raise ValueError(
            f"There are {len(channels)} channels, but {len(targets)} sinks; give a list "
            "with a sink for each channel."
        )
    return list(zip(targets, groups, strict=True))


def _movies(channels: Sequence[Channel], weights: Sequence[Channel | None]) -> set[Movie]:
    """All that are read."""
    return {each.movie for each in (*channels, *weights) if each is not None}


def _check_targets(targets: Sequence[Any], movies: set[Movie]) -> None:
    _check_arrays([target for target in targets if isinstance(target, np.ndarray)], movies)
    _check_paths([Path(target) for target in targets if _is_path(target)], movies)


def _check_arrays(arrays: Sequence[np.ndarray], movies: set[Movie]) -> None:
    sources = [movie for movie in movies if isinstance(movie, ArrayMovie)]
    for number, array in enumerate(arrays):
        others = arrays[:number]
        if any(source.shares_memory(array) for source in sources) or any(
            np.may_share_memory(array, other) for other in others
        ):
            raise ValueError(
                "An array to fill shares memory with the movie or with another one; give "
                "an array of its own."
            )


def _check_paths(paths: Sequence[Path], movies: set[Movie]) -> None:
    """Nothing that is read may be written to, or removed."""
    real_paths = [path.resolve() for path in paths]
    for path in real_paths:
        if real_paths.count(path) > 1:
            raise MovieError(f"{path}: is given for two channels; give each a name")
        touched = [path, *(draft_of(path, suffix) for suffix in DRAFT_SUFFIXES)]
        if any(movie.includes(one) for movie in movies for one in touched):
            raise MovieError(
                f"{path}: is the movie itself, or would be a part of it when it is read "
                "again; give a name elsewhere"
            )


def _begun_chunk_frames(targets: Sequence[tuple[Any, list[int]]]) -> int | None:
    """Of an earlier job, whose drafts have its chunks."""
    for target, _ in targets:
        if _is_path(target):
            with contextlib.closing(Journal(draft_of(Path(target), JOURNAL_SUFFIX))) as old:
                if old.settings is not None and "chunk_frames" in old.settings:
                    return old.settings["chunk_frames"]
    return None


def _chunk_pixels(channels: Sequence[Channel], targets: Sequence[Any]) -> int:
    is_between_arrays = all(
        isinstance(each.movie, ArrayMovie) for each in channels
    ) and all(isinstance(target, np.ndarray) for target in targets)
    is_on_cpu = jax.local_devices()[0].platform == "cpu"
    return _CACHED_PIXELS if is_between_arrays and is_on_cpu else _CHUNK_PIXELS


def _chunk_frames_and_workers(
    channels: Sequence[Channel],
    halo_frames: int,
    chunk_pixels: int,
    chunk_frames: int | None,
    workers: int | None,
) -> tuple[int, int]:
    """What is not given is chosen: as many workers as there is memory for, and then the
    chunk."""
    frame_count = len(channels[0])
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in channels)
    pixel_bytes = _PIXEL_BYTES_WITH_HALO if halo_frames else _PIXEL_BYTES
    # Frames that all workers may hold.
    held = _free_bytes() // (2 * pixel_bytes * frame_pixels)
    if workers is None:
        # Of chunks that are shorter than twice the halo, more workers would do less.
        length = min(frame_count, (chunk_frames or 2 * halo_frames or 1) + 2 * halo_frames)
        workers = max(1, min(core_count(), held // length))
    if chunk_frames is None:
        frames = max(1, chunk_pixels // frame_pixels)
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
    """Four times the halo if that is more than `frames`, in windows not longer than
    `longest`."""
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


def _free_bytes() -> int:
    """The memory that this machine has free, or half of it where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def one_for_each(name: str, value: Any, channels: Sequence[Channel]) -> tuple[float, ...]:
    if value is None:
        return ()
    values = [value] * len(channels) if np.ndim(value) == 0 else list(value)
    if len(values) != len(channels):
        raise ValueError(
            f"There are {len(channels)} channels, but {len(values)} {name}; give a number "
            "for all, or one for each."
        )
    return tuple(float(one) for one in values)


def checked_choice(name: str, value: Any, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, but is {value!r}.")
    return value


def _at_least_1(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def installed_version() -> str:
    """Of this package, which may be run from where it is written."""
    try:
        return importlib.metadata.version("jaxbkgd")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"

"""The background of a whole movie, by chunks, on every core and device."""

import contextlib
import functools as ft
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._calibration.calibrate import calibrate
from .._calibration.cameras import cameras_of
from .._calibration.history import CalibrationHistory
from .._calibration.hot_pixels import hot_pixels_of, without_pixels
from .._calibration.movie_patterns import with_movie_patterns
from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.checks import checked_count
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Box, Channel, Movie
from .._movies.open import is_split, open_channels, open_sources, open_weights
from .._workers import progress_bar, run_interruptibly
from . import compute, stream
from .compute import Dtype, Quantity
from .follow import begun_frames, CALIBRATION_FRAMES, Follower, open_followed
from .names import paths_beside
from .plan import plan_chunks, Window, windows
from .results import (
    as_path,
    begun_settings,
    check_targets,
    group_targets,
    Job,
    open_results,
    Results,
)
from .work import Counts, joined_lights, Lights, Work, work_of


@dataclass(frozen=True)
class MovieSummary:
    """The report of [`jaxbkgd.estimate_movie`][]. `resumed_frames` were done by earlier
    runs; `seconds` include compilation; `megapixels_per_second` count all channels.
    `noise_corrections` has one for each channel, see [`jaxbkgd.Background`][].
    `nonfinite_frames` and `clipped_frames` count results that are not finite, or that
    uint16 could not hold. `paths` are the files written. `history` is that of the
    calibration, if no `estimator` was given and no earlier run had made one. For each
    channel, `lights` has the light of each frame, see [`jaxbkgd.Background`][], NaN in
    resumed frames, or `None`; `hot_pixels` counts the hot pixels that were left out."""

    frames: int
    resumed_frames: int
    seconds: float
    megapixels_per_second: float
    noise_corrections: tuple[float, ...]
    chunk_frames: int
    workers: int
    nonfinite_frames: int
    clipped_frames: int
    estimator: AbstractEstimator
    paths: tuple[Path, ...]
    history: CalibrationHistory | None = field(default=None, repr=False)
    lights: tuple[Float[np.ndarray, "*rank frames"] | None, ...] = field(
        default=(), repr=False, compare=False
    )
    hot_pixels: tuple[int, ...] = ()


def estimate_movie(
    source: Any,
    estimator: AbstractEstimator | None = None,
    sink: Any = None,
    *,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    pedestal: int | float = 0.0,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
    skips_hot_pixels: bool | None = None,
    chunk_frames: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    follow: bool | float = False,
    look_ahead_frames: int | None = None,
) -> MovieSummary:
    """Estimates the background of a whole movie, and writes it as it goes.

    Memory is bounded by the chunks in progress. A file gets its name when it is complete;
    until then it is called `NAME.part`, and the same call resumes it, whatever ended the
    previous one. The result is that of `estimator(frames)` on the whole movie, to the bit
    for the estimators of this package. Returns a [`jaxbkgd.MovieSummary`][].

    **Arguments:**

    - `source`: a path, an array (frames, height, width) or (frames, channels, height,
        width), an open movie or a channel; see [`jaxbkgd.open_movie`][]. A list or tuple of
        sources has one for each channel.
    - `estimator`: any estimator; each chunk is read with its `halo_frames`. By default,
        one is calibrated on a sample of the movie first, see [`jaxbkgd.calibrate`][].
    - `sink`: a name that ends in `.tif`, `.ome.tif`, `.zarr`, `.ome.zarr` or, for Picasso,
        `.raw`, or a NumPy array to fill; for a list of sources, or for boxes, a list of
        these. Several channels of one source are written to one sink. By default, the
        result of a path is written beside it, as `movie-background.tif`.
    - `quantity`: `"background"` or `"residual"`, in the unit of the frames, or `"snr"`, see
        [`jaxbkgd.snr`][].
    - `dtype`: `"float32"`, or `"uint16"` for numbers that are rounded to the nearest one
        (halves to the even one) and clipped to 0 and 65535.
    - `pedestal`: is added to what is written. Residuals need one as uint16.
    - `boxes`: parts (x0, y0, x1, y1) of the frames, in pixels, without x1 and y1. Each is
        estimated as a channel.
    - `frames`: the frames to estimate and write, as `slice(1000, 5000)` or
        `slice(1, None, 4)`, as if they were the movie. By default all.
    - `camera`: a [`jaxbkgd.Camera`][] for all channels, or one for each. Its offset is
        subtracted, and `"snr"` needs its gain. If its pixels differ, the light is estimated
        in electrons, noisy pixels count less, and the result is in ADU again. Maps cover
        the whole frame.
    - `weights`: how much a pixel counts, 0 or more, or booleans that are False for pixels
        to leave out; for estimators that take weights, such as [`jaxbkgd.LocalMean`][]. An
        array (height, width) or a source (frames, height, width) for all channels, or a
        list with one or `None` for each. With boxes, weights cover the whole frame, and
        with `frames` the whole movie.
    - `skips_hot_pixels`: whether an estimator that takes weights leaves out pixels that are
        far off in all frames, see [`jaxbkgd.find_hot_pixels`][]. By default, only if no
        `estimator` is given.
    - `chunk_frames`: the frames in a chunk, by default a megapixel or four halos, or fewer
        where memory is short. Those of a [`jaxbkgd.LocalMean`][] are a multiple of the
        frames that one of its rounds sees. Where they are not given, and a device runs out
        of memory, the movie is started over with half of them, once, with a warning.
    - `workers`: the number of threads, by default the cores, or fewer where memory is
        short.
    - `progress`: whether to show a progress bar, where there is a terminal.
    - `resume`: whether to continue an interrupted run, or start over.
    - `overwrite`: whether to replace an existing result, once the new one is complete.
    - `follow`: whether the movie is still being written, as TIFF, NDTiff, Zarr or DAX. It
        is complete when nothing has arrived for this number of seconds, 10 if `True`.
        Without an `estimator`, one is calibrated on the first 300 frames.
    - `look_ahead_frames`: with `follow`, the number of frames that a chunk waits for after
        its end, if it is not to see all of `halo_frames`.

    **Raises:**

    [`jaxbkgd.MovieError`][], a `ValueError`, if a movie cannot be read or written, or was
    begun with other settings; `ValueError` or `TypeError` for arguments that do not fit the
    estimator or each other. Chunks that are done are kept.
    """
    clock = time.perf_counter()
    if estimator is not None:
        compute.check_estimator(estimator, weights)
    # As whole numbers of Python, which a journal can hold.
    chunk_frames = _checked_option("chunk_frames", chunk_frames, 1)
    workers = _checked_option("workers", workers, 1)
    look_ahead_frames = _checked_option("look_ahead_frames", look_ahead_frames, 0)
    if follow is False and look_ahead_frames is not None:
        raise ValueError("look_ahead_frames is for a movie with follow=True.")
    with contextlib.ExitStack() as files:
        least = _sampled_frames(estimator, skips_hot_pixels)
        inputs = _open_inputs(
            files, source, boxes, frames, camera, weights, follow=follow, least=least
        )
        channels = inputs.channels
        output = compute.make_output(quantity, dtype, inputs.cameras, pedestal)
        if sink is None:
            beside = paths_beside(source, quantity, boxes)
            sink = beside if inputs.is_list else beside[0]
        targets = group_targets(sink, len(channels), inputs.is_list, inputs.movies)
        begun = begun_settings(targets) if resume else {}
        history = calibration = None
        if estimator is None:
            check_targets(targets, channels, dtype, overwrite=overwrite)
            calibration = begun.get("calibration")
            if calibration is None:
                found, history = calibrate(
                    inputs.opened,
                    boxes=boxes,
                    frames=frames,
                    camera=camera,
                    weights=weights,
                    progress=progress,
                )
                calibration = found.to_json()
            # From the text, whose numbers a later run has, too.
            estimator = RadiiEstimator.from_json(calibration)
        hot = [np.zeros(channel.shape[1:], bool) for channel in channels]
        if skips_hot_pixels is None:
            skips_hot_pixels = calibration is not None
        if skips_hot_pixels and estimator.takes_weights:
            hot = [hot_pixels_of(channel) for channel in channels]
            masks = [*map(without_pixels, inputs.masks, hot)]
            inputs = inputs._replace(masks=masks)
        estimator, cameras = compute.on_one_device((estimator, inputs.cameras))
        inputs = inputs._replace(cameras=cameras)
        whole: AbstractEstimator = run_interruptibly(
            with_movie_patterns, estimator, channels, inputs.masks, inputs.cameras
        )
        fast = run_interruptibly(whole.for_inference)
        # Raises now what would be raised in the middle of the work.
        seen = 2 * fast.halo_frames + 1
        if not inputs.follower:
            seen = min(len(channels[0]), seen)
        shapes = [(seen, *channel.shape[1:]) for channel in channels]
        corrections = run_interruptibly(_noise_corrections, whole, shapes)
        is_to_arrays = not any(as_path(target) for target, _ in targets)

        plan_of = ft.partial(
            _plan, fast, inputs, output, workers=workers, is_to_arrays=is_to_arrays
        )

        def run(plan: stream.Plan, *, resume: bool) -> tuple[Job, Lights, int, Counts]:
            job = Job(
                channels,
                inputs.masks,
                inputs.cameras,
                whole,
                output,
                plan.chunk_frames,
                look_ahead_frames,
                calibration,
            )
            with open_results(job, targets, resume=resume, overwrite=overwrite) as results:
                batches, resumed_frames = _batches(inputs, job, fast, plan, results)
                lights: Lights = []
                work = work_of(job, fast, plan, results, lights)
                worked = _work_on(job, work, batches, resumed_frames, progress)
                job.check_sources()
                results.commit()
            return job, lights, *worked

        begun_frames = begun.get("chunk_frames") if chunk_frames is None else None
        plan, done = plan_of(chunk_frames=chunk_frames, begun_frames=begun_frames), None
        try:
            done = run(plan, resume=resume)
        except compute.OutOfMemory as error:
            shorter, is_chosen = plan.shorter_frames, chunk_frames is None and not begun
            if not (shorter and is_chosen) or inputs.follower:
                error.add_note("with smaller chunk_frames, start over (resume=False)")
                raise
            plan = plan_of(chunk_frames=shorter, begun_frames=None)
            what = f"starting over, with chunks of {plan.chunk_frames} frames"
            warnings.warn(f"{error}; {what}", stacklevel=2)
        # Not while the error holds on to what fills the memory.
        if done is None:
            done = run(plan, resume=False)
        job, lights, worked_frames, counts = done

    frame_count = len(job.channels[0])
    seconds = time.perf_counter() - clock
    return MovieSummary(
        frames=frame_count,
        resumed_frames=frame_count - worked_frames,
        seconds=seconds,
        megapixels_per_second=worked_frames * job.frame_megapixels / seconds,
        noise_corrections=tuple(map(float, corrections)),
        chunk_frames=plan.chunk_frames,
        workers=plan.workers,
        nonfinite_frames=int(counts[0]),
        clipped_frames=int(counts[1]),
        estimator=whole,
        paths=tuple(path for target, _ in targets if (path := as_path(target))),
        history=history,
        lights=joined_lights(lights, len(channels), frame_count),
        hot_pixels=tuple(int(is_hot.sum()) for is_hot in hot),
    )


class _Inputs(NamedTuple):
    """What is read: a source with open movies, its channels, and of each its weights and
    its camera. `is_list` is whether each channel has a sink of its own."""

    opened: Any
    channels: list[Channel]
    masks: list[Channel | None]
    cameras: list[Camera]
    follower: Follower | None
    is_list: bool
    reopen: Callable[[], list[Channel]]

    @property
    def movies(self) -> list[Movie]:
        both = *self.channels, *self.masks
        return list({c.movie: None for c in both if c is not None})


def _checked_option(name: str, value: Any, least: int) -> int | None:
    return None if value is None else checked_count(name, value, least)


def _sampled_frames(
    estimator: AbstractEstimator | None, skips_hot_pixels: bool | None
) -> int:
    """The frames of a growing movie that are looked at before it is estimated."""
    is_sampled = estimator is None or estimator.learns_patterns
    if estimator is not None and estimator.takes_weights:
        is_sampled |= bool(skips_hot_pixels)
    return CALIBRATION_FRAMES if is_sampled else 1


def _open_inputs(
    files: contextlib.ExitStack,
    source: Any,
    boxes: Sequence[Box] | None,
    frames: slice | None,
    camera: Camera | Sequence[Camera] | None,
    weights: Any,
    *,
    follow: bool | float,
    least: int,
) -> _Inputs:
    """Opens all that is read, and waits for so many frames of a movie that grows."""
    is_list = is_split(source, boxes)
    if follow is False:
        opened, follower = open_sources(source, files), None
    else:
        opened, follower = open_followed(source, follow, files, least, frames)
    reopen = ft.partial(open_channels, opened, boxes, frames, files=files)
    channels = reopen()
    cameras = cameras_of(camera, channels)
    masks = open_weights(weights, channels, files)
    if follower and any(mask and mask.movie.shape[0] > 1 for mask in masks):
        rule = "give one image, as nobody knows how many there will be"
        raise ValueError(f"Weights of each frame are not followed; {rule}.")
    return _Inputs(opened, channels, masks, cameras, follower, is_list, reopen)


def _plan(
    fast: AbstractEstimator,
    inputs: _Inputs,
    output: compute.Output,
    *,
    chunk_frames: int | None,
    begun_frames: int | None,
    workers: int | None,
    is_to_arrays: bool,
) -> stream.Plan:
    """Chunks that follow each other, or windows."""
    devices = jax.local_devices()
    if not inputs.follower:
        plan = stream.plan(
            fast,
            inputs.channels,
            inputs.cameras,
            devices,
            output,
            is_masked=any(mask is not None for mask in inputs.masks),
            chunk_frames=chunk_frames,
            begun_frames=begun_frames,
            workers=workers,
        )
        if plan is not None:
            return plan
    sizes = plan_chunks(
        inputs.channels,
        fast.halo_frames,
        devices,
        pixel_bytes=fast.pixel_bytes,
        chunk_frames=begun_frames if chunk_frames is None else chunk_frames,
        workers=workers,
        is_growing=inputs.follower is not None,
        is_between_arrays=is_to_arrays and not any(m.paths for m in inputs.movies),
    )
    return stream.Plan(None, *sizes)


def _batches(
    inputs: _Inputs,
    job: Job,
    fast: AbstractEstimator,
    plan: stream.Plan,
    results: Results,
) -> tuple[Iterable[list[Window]], int]:
    """The windows that are to be done, as they come, and the frames of those done by
    earlier runs."""
    if inputs.follower:
        batches = inputs.follower.batches(job, results, fast, inputs.reopen)
        return batches, begun_frames(job, results)
    count, length = len(job.channels[0]), plan.chunk_frames
    if plan.models is None:
        chunks = windows(count, length, fast.halo_frames, fast.aligned_frames)
    else:
        chunks = stream.chunks_of(count, length)
    missing = results.missing(chunks)
    return [missing], count - _frame_count(missing)


def _work_on(
    job: Job,
    work: Work,
    batches: Iterable[list[Window]],
    resumed_frames: int,
    progress: bool,
) -> tuple[int, Counts]:
    """Works on all batches, with a progress bar. Returns the frames that were done, and the
    sums of their counts."""
    counts, begun, worked_frames = np.zeros(2, int), time.perf_counter(), 0
    total = None if job.is_growing else len(job.channels[0])
    with progress_bar(total, progress, resumed_frames, "frames") as report:
        for batch in batches:
            frames_in_batch = _frame_count(batch)
            for number, of_window in enumerate(work(batch), 1):
                counts += of_window
                done = worked_frames + frames_in_batch * number // len(batch)
                rate = done * job.frame_megapixels / (time.perf_counter() - begun)
                report(resumed_frames + done, f"{rate:.0f} Mpx/s")
            worked_frames += frames_in_batch
    return worked_frames, counts


def _frame_count(windows: Sequence[Window]) -> int:
    return sum(window.stop - window.start for window in windows)


@eqx.filter_jit
def _noise_corrections(
    estimator: AbstractEstimator, shapes: Sequence[tuple[int, ...]]
) -> list[Float[Array, ""]]:
    # Where they do not depend on the frames, the compiled program makes no frames.
    background = estimator([jnp.zeros(shape) for shape in shapes])
    return background.noise_corrections

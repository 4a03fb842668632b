"""Long movies with an estimator whose chunks follow each other, as LocalMean's do."""

import functools as ft
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._estimators.background import joined
from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.channels import as_frames, checked_frames, working_dtype
from .._estimators.light_model import FrameBlocks, in_blocks, LightModel
from .._estimators.streamed import least_blocks, Piece, pieces
from .._movies.movie import Channel, MovieError
from .compute import (
    as_estimated,
    checked_mask,
    Estimated,
    Estimates,
    make_estimates,
    naming_errors,
    Output,
    prepared_by,
)
from .plan import most_workers, read_window, usable_bytes, Window
from .results import Job


# Windows of so many halos are faster, where memory holds one for each thread.
_HALOS_OF_WINDOW = 6
# Chunks that are done in a row, and those that two runs both do, in part.
_LEAST_RUN, _SHARED_CHUNKS = 3, 2.5
# The quantity and the pedestal of what is the background alone.
_PLAIN = "background", 0.0


class Plan(NamedTuple):
    """How a whole movie is estimated: with `models` of its channels, chunks follow each
    other; otherwise each is estimated by itself. Chunks are multiples of `unit_frames`."""

    models: Sequence[LightModel] | None
    chunk_frames: int
    workers: int
    unit_frames: int = 1

    @property
    def shorter_frames(self) -> int:
        """Those of a chunk of about half the length, or 0 if there is none."""
        half = -(-(self.chunk_frames // 2) // self.unit_frames) * self.unit_frames
        return half if half < self.chunk_frames else 0


def plan(
    estimator: AbstractEstimator,
    channels: Sequence[Channel],
    cameras: Sequence[Camera],
    devices: Sequence[Any],
    output: Output,
    *,
    is_masked: bool,
    chunk_frames: int | None = None,
    begun_frames: int | None = None,
    workers: int | None = None,
) -> Plan | None:
    """Chunks that follow each other, or `None` where windows are to be taken: where the
    estimator has no light models, and where memory holds windows. A given `chunk_frames` is
    rounded up; `begun_frames` is that of an earlier run. `MovieError` where memory is
    short."""
    models = estimator.light_models(len(channels))
    # With maps, jax 0.10 rounds what is made of frames and backgrounds by the program.
    has_maps = any(camera.shape for camera in cameras)
    if models is None or (has_maps and (output.quantity, output.pedestal) != _PLAIN):
        return None
    shapes = [channel.shape[1:] for channel in channels]
    count, pixels = len(channels[0]), sum(map(math.prod, shapes))
    unit = _unit_frames(models, shapes)
    usable, item_bytes = usable_bytes(devices), max(c.dtype.itemsize for c in channels)
    seen = min(count, _HALOS_OF_WINDOW * estimator.halo_frames)
    at_work = (workers or most_workers(devices)) * seen * pixels
    holds_windows = at_work * estimator.pixel_bytes <= usable
    if chunk_frames is not None:
        if count <= 2 * unit:
            return None
        lengths = [-(-min(chunk_frames, count) // unit) * unit]
    elif begun_frames is not None:
        if begun_frames % unit:
            return None
        lengths = [begun_frames]
    elif holds_windows:
        return None
    else:
        lengths = list(range(unit, count + unit, unit))
    has_weights = is_masked or has_maps
    margin = max(model.reach_blocks * model.block_frames for model in models)

    def worker_bytes(length: int) -> int:
        """As measured: frames that are stored, those at work and results; sums of all
        rounds, and smoothing."""
        rounds, block_frames = models[0].rounds, models[0].block_frames
        frames = length * ((rounds + 4) * item_bytes + 4 * has_weights + 8)
        sums = (24 * rounds + 90) * (length + margin) // block_frames
        return pixels * (frames + sums)

    def cost(length: int, worker_count: int) -> float:
        """The time, in frames that a worker handles, sums and smoothing of sums."""
        chunks = -(-count // length)
        shared = _SHARED_CHUNKS if worker_count > 1 else 0
        done = min(chunks, -(-chunks // worker_count) + shared)
        return done * (length + (length + 2 * margin) / 3)

    options = [workers] if workers else [*range(most_workers(devices), 0, -1)]
    for number in options:
        fitting = [n for n in lengths if number * worker_bytes(n) <= usable]
        if fitting:
            best = min(fitting, key=lambda length: cost(length, number))
            return Plan(models, best, number, unit)
    if begun_frames is not None and holds_windows:
        return None
    needed = options[-1] * worker_bytes(lengths[0])
    what = f"chunks of {lengths[0]} frames in {options[-1]} threads"
    raise MovieError(
        f"{channels[0].movie.name}: memory is short: {what} take {needed / 2**30:.1f} GB, "
        f"of which {usable / 2**30:.1f} GB may be taken; give a smaller radius in frames, "
        "boxes, fewer workers or shorter chunks"
    )


def _unit_frames(models: Sequence[LightModel], shapes: Sequence[tuple[int, ...]]) -> int:
    """The frames of the shortest chunk of channels (height, width)."""
    of_channels = list(zip(models, shapes, strict=True))
    least = max(least_blocks(model, shape) for model, shape in of_channels)
    step = math.lcm(*(model.step_blocks(shape) for model, shape in of_channels))
    return -(-least // step) * step * models[0].block_frames


def chunks_of(count: int, chunk_frames: int) -> list[Window]:
    """All chunks of a movie, which see their own frames."""
    starts = range(0, count, chunk_frames)
    stops = [min(start + chunk_frames, count) for start in starts]
    return [
        Window(number, start, stop, slice(start, stop), slice(stop - start))
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def runs(chunks: Sequence[Window], workers: int) -> list[list[Window]]:
    """Successive chunks for each worker. At its ends, a run does some chunks that belong to
    its neighbours, and so there are few runs."""
    longest = max(_LEAST_RUN, math.ceil(len(chunks) / workers))
    found: list[list[Window]] = []
    for chunk in chunks:
        last = found[-1] if found else []
        if last and chunk.number == last[-1].number + 1 and len(last) < longest:
            last.append(chunk)
        else:
            found.append([chunk])
    return found


def estimate_run(
    job: Job, models: Sequence[LightModel], run: Sequence[Window]
) -> Iterator[tuple[Window, Estimated]]:
    """Estimates successive chunks of a movie, each of which is read once."""
    name = job.channels[0].movie.name
    streams = [_channel(job, model, index, run) for index, model in enumerate(models)]
    for window in run:
        with naming_errors(name, window):
            estimates = [next(stream) for stream in streams]
            images, lights, *flags = zip(*estimates, strict=True)
            # Of one channel each.
            images = [np.asarray(image) for (image,) in images]
            flags = [_in_any(of_channels) for of_channels in flags]
        yield (
            window,
            as_estimated(name, window, images, [light for (light,) in lights], flags),
        )


def _channel(
    job: Job, model: LightModel, index: int, run: Sequence[Window]
) -> Iterator[Estimates]:
    """The estimates of one channel, chunk after chunk."""
    channel, mask, camera = job.channels[index], job.weights[index], job.cameras[index]
    chunks = chunks_of(len(channel), job.chunk_frames)
    blocks = job.chunk_frames // model.block_frames
    step = model.step_blocks(channel.shape[1:])

    # Between the first sums of a chunk and its result, others are read.
    @ft.lru_cache(maxsize=model.rounds + 3)
    def stored(number: int) -> tuple[Any, Any]:
        (frames,), (weights,) = read_window(chunks[number], [channel], [mask])
        with naming_errors(channel.movie.name, chunks[number]):
            weights = None if weights is None else checked_mask(weights)
            return checked_frames(frames), weights

    def read(number: int) -> FrameBlocks:
        return _chunk_blocks(model, *stored(number), camera, blocks)

    one = as_frames(np.zeros((1, *channel.shape[1:]), channel.dtype))
    model = model.of_dtype(working_dtype(camera.even_light(one)))
    numbers = range(run[0].number, run[-1].number + 1)
    for number, piece in pieces(model, read, numbers, len(chunks), step):
        yield _chunk_estimates(model, piece, read(number), camera, job.output)


@eqx.filter_jit
def _chunk_blocks(
    model: LightModel,
    frames: Shaped[Array | np.ndarray, "frames height width"],
    weights: Shaped[Array | np.ndarray, "..."] | None,
    camera: Camera,
    blocks: int,
) -> FrameBlocks:
    stack, counts = prepared_by(camera, jnp.asarray(frames), weights)
    if counts is not None:
        counts = jnp.asarray(counts, working_dtype(stack))
        counts = jnp.broadcast_to(counts, stack.shape)
    return in_blocks(model, stack, counts, blocks)


@eqx.filter_jit
def _chunk_estimates(
    model: LightModel, piece: Piece, blocks: FrameBlocks, camera: Camera, output: Output
) -> Estimates:
    frames = blocks.frames.reshape(-1, *blocks.frames.shape[2:])
    is_weighted = blocks.weights is not None
    background = joined([piece.background(model)])
    return make_estimates(background, [frames], output, [camera], is_weighted=is_weighted)


def _in_any(flags: Sequence[Any]) -> Any:
    known = [flag for flag in flags if flag is not None]
    return np.any(known, axis=0) if known else None

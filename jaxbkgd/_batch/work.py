"""The work on a movie in threads: each reads, estimates and writes frames."""

import functools as ft
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import jax
import numpy as np
from jaxtyping import Float, Int

from .._estimators.base import AbstractEstimator
from .._estimators.light_model import LightModel
from .._workers import each_on_threads, on_threads
from . import compute, stream
from .plan import read_window, Window
from .results import Job, Results


# The frames that are not finite, and that are clipped.
Counts = Int[np.ndarray, "2"]
# Estimates windows, and gives the counts of each one that is written.
Work = Callable[[Sequence[Window]], Iterator[Counts]]
_Light = Float[np.ndarray, "*rank _frames"] | None


# The light of each channel in the frames of windows, as threads find it.
Lights = list[tuple[Window, Sequence[_Light]]]


def joined_lights(
    lights: Lights, channel_count: int, frame_count: int
) -> tuple[_Light, ...]:
    """The light of each channel, NaN in frames that have none, or `None`."""
    joined: list[_Light] = [None] * channel_count
    for window, of_channels in lights:
        for number, light in enumerate(of_channels):
            if light is None:
                continue
            whole = joined[number]
            if whole is None:
                shape = *light.shape[:-1], frame_count
                joined[number] = whole = np.full(shape, np.nan, np.float32)
            whole[..., window.start : window.stop] = light
    return tuple(joined)


def work_of(
    job: Job,
    fast: AbstractEstimator,
    plan: stream.Plan,
    results: Results,
    lights: Lights,
) -> Work:
    """A function that estimates windows as planned."""
    if plan.models is None:
        work = _of_windows(job, fast, results, lights)
        return lambda windows: on_threads(work, windows, plan.workers)
    work_in_order = ft.partial(_work_in_order, job, plan.models, results, lights)

    def work_on_runs(windows: Sequence[Window]) -> Iterator[Counts]:
        runs = list(enumerate(stream.runs(windows, plan.workers)))
        return each_on_threads(work_in_order, runs, plan.workers)

    return work_on_runs


def _of_windows(
    job: Job, fast: AbstractEstimator, results: Results, lights: Lights
) -> Callable[[Window], Counts]:
    """A function that reads, estimates and writes a window."""
    estimate = compute.compile_estimate(fast, job.output, job.cameras)
    can_donate = compute.can_donate(fast, job.output, job.cameras)
    devices = jax.local_devices()
    is_on_cpu = devices[0].platform == "cpu"
    name = job.channels[0].movie.name
    # Buffers that no thread uses now.
    unused = {device: SimpleQueue[compute.Buffers | None]() for device in devices}

    def work(window: Window) -> Counts:
        # Each device has windows of its own: none waits for another.
        device = devices[window.number % len(devices)]
        try:
            buffers = unused[device].get_nowait()
        except Empty:
            buffers = compute.Buffers(can_donate) if is_on_cpu else None
        chunks, masks = read_window(window, job.channels, job.weights)
        with jax.default_device(device):
            estimated = compute.run_window(name, estimate, chunks, window, masks, buffers)
        results.write(window, estimated.images)
        lights.append((window, estimated.lights))
        counts = estimated.counts
        # The images are views of what the next window may write over.
        del estimated
        unused[device].put(buffers)
        return counts

    return work


def _work_in_order(
    job: Job,
    models: Sequence[LightModel],
    results: Results,
    lights: Lights,
    numbered: tuple[int, Sequence[Window]],
) -> Iterator[Counts]:
    """Reads, estimates and writes the chunks of a run, given with its number, one after the
    other."""
    number, run = numbered
    devices = jax.local_devices()
    with jax.default_device(devices[number % len(devices)]):
        for window, estimated in stream.estimate_run(job, models, run):
            results.write(window, estimated.images)
            lights.append((window, estimated.lights))
            yield estimated.counts

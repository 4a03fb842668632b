"""Calibration: an estimator's radii are learned from the movie that it is for."""

import contextlib
import functools as ft
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from .._estimators.base import AbstractEstimator
from .._estimators.channels import map_channels
from .._estimators.checks import checked_count
from .._movies.movie import Channel, Movie, Pixels
from .._movies.open import is_split, open_channels
from .._workers import progress_bar
from .descent import descend, point_of, Problem, secant_descent, Window
from .lag import read_frames
from .objectives import FramePairLoss, Objective, TruthLoss


Estimator = TypeVar("Estimator", bound=AbstractEstimator)

# A movie: a path, an open movie or a channel of it, or an array that is sliced by frame.
Source = str | os.PathLike[str] | Movie | Channel | Pixels

# One object, so that a later calibration finds its compiled steps.
_SECANT = secant_descent()
# Pixels of all windows and channels together, unless the fewest windows need more.
_SAMPLE_PIXELS, _MOST_WINDOWS, _FEWEST_WINDOWS = 2**25, 16, 8
# Size of a window for an estimator that sees several frames at a time.
_RUN_PIXELS, _SHORTEST_RUN_FRAMES = 2**24, 64


class CalibrationHistory(eqx.Module):
    """How a calibration went.

    **Attributes:**

    - `losses`: the objective before each step, in its unit.
    - `radii`: the radii at each of these: y and x in pixels, for [`jaxbkgd.LocalMean`][]
        after time in frames; without radii, the learnable parameters in one row.
    - `radii_std`: the standard deviation of the learned radii, from the scatter of
        gradients between blocks of frames and the curvature of the loss. Infinite at the
        bound and where the loss does not curve upwards; NaN for frozen radii, from fewer
        than 8 blocks, and for more than 32 parameters.
    - `is_at_bound`: whether a radius is as large as its bound allows.
    - `is_converged`, `stop_reason`: whether the radii have settled, and why it ended.
    - `objective`, `lag`: what was minimised, and the lag of a [`jaxbkgd.FramePairLoss`][].
    """

    losses: Float[np.ndarray, " steps"]
    radii: Float[np.ndarray, "steps channels axes"]
    radii_std: Float[np.ndarray, "channels axes"]
    is_at_bound: Bool[np.ndarray, "channels axes"]
    is_converged: bool
    stop_reason: str
    objective: Objective

    @property
    def lag(self) -> int | None:
        return self.objective.lag if isinstance(self.objective, FramePairLoss) else None


def calibrate(
    channels: Source | Sequence[Source],
    estimator: Estimator,
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    progress: bool = True,
) -> tuple[Estimator, CalibrationHistory]:
    """Learns an estimator's radii from a movie.

    The loss is averaged over up to 16 windows of frames, spread evenly over the movie, of
    about 32 megapixels in all; for an estimator that sees many frames at a time, over one
    or two long runs. Calibration ends when the radii of 4 successive steps are within a
    thousandth, when the steps are used up, or on Ctrl-C, which before the end of the first
    step raises `KeyboardInterrupt`. The radii with the lowest loss are kept.

    **Arguments:**

    - `channels`: the movie, as [`jaxbkgd.estimate_movie`][] takes it: a path, an open
        movie or a channel of it, an array (frames, height, width) or (frames, channels,
        height, width); or a list or tuple of these, one a channel and of equal length.
    - `estimator`: what to calibrate. All its inexact arrays are learned, from their present
        values.
    - `objective`: the loss, see [`jaxbkgd.Objective`][]. By default
        [`jaxbkgd.FramePairLoss`][], with a lag found from the movie.
    - `optimizer`: from optax, which moves all that is learned as one vector. By default
        Newton's steps along each number, with the curvature from the last two gradients.
    - `steps`: the most steps to take.
    - `progress`: whether to show loss and radii in a progress bar.

    **Returns:** the calibrated estimator, of the same type, and a
    [`jaxbkgd.CalibrationHistory`][].

    **Raises:** `TypeError` or `ValueError` for channels that are no movies of one length,
    too short, or not finite, and for an objective that does not give one finite number at
    the first radii. If it fails later, it stops with a warning.

    ```python
    >>> import jax
    >>> import jaxbkgd
    >>> key, objective = jax.random.key(0), jaxbkgd.FramePairLoss(lag=8)
    >>> frames, _ = jaxbkgd.simulate_movie(key, frame_count=20, bkgd_length_scale_pix=8.0)
    >>> start = jaxbkgd.SpatialMean(7.0, max_radius_pix=20.0)
    >>> estimator, history = jaxbkgd.calibrate(frames, start, objective=objective)
    >>> history.radii.shape == (len(history.losses), 1, 2)
    True

    ```
    """
    checked_count("steps", steps)
    problem = _pose_problem(channels, estimator, objective or FramePairLoss())
    with progress_bar(steps, progress) as report:
        descent = descend(problem, optimizer or _SECANT, steps, report)
    visits, is_converged, stop_reason = descent
    best = min(visits, key=lambda visit: visit.loss)
    radii_std = np.full_like(best.radii, np.nan)
    if not stop_reason.startswith("interrupted"):
        try:
            radii_std = problem.standard_deviations(best.point)
        except KeyboardInterrupt:
            stop_reason = f"interrupted after {len(visits)} steps"
    radii = np.stack([visit.radii for visit in visits])
    # What has not moved is frozen there.
    is_at_bound = problem.is_at_bound(best.point) & (np.ptp(radii, axis=0) > 0)
    if is_at_bound.any():
        text = (
            f"{is_at_bound.sum()} of {is_at_bound.size} radii went to their bound: the "
            "background is even, or max_radius_pix or max_radius_frames too small, in "
            f"bounds of {problem.bounds}."
        )
        warnings.warn(text, stacklevel=2)
    return problem.estimator_at(best.point), CalibrationHistory(
        losses=np.array([visit.loss for visit in visits]),
        radii=radii,
        radii_std=np.where(is_at_bound, np.inf, radii_std),
        is_at_bound=is_at_bound,
        is_converged=is_converged,
        stop_reason=stop_reason,
        objective=problem.objective,
    )


def losses_at(
    estimators: Sequence[AbstractEstimator],
    channels: Source | Sequence[Source],
    objective: Objective,
) -> Float[np.ndarray, " estimators"]:
    """The loss of each estimator on the windows that `calibrate` draws of these channels;
    they differ in their inexact arrays alone. Ctrl-C interrupts it within a step."""
    problem = _pose_problem(channels, estimators[0], objective)
    points = map(point_of, estimators)
    return np.array([problem.losses_and_gradients(point)[0].mean() for point in points])


def _pose_problem(
    source: Source | Sequence[Source], estimator: AbstractEstimator, objective: Objective
) -> Problem:
    if not isinstance(estimator, AbstractEstimator):
        rule = "calibrate(movie, estimator) needs an AbstractEstimator, as SpatialMean(7.0)"
        raise TypeError(f"{rule}, but was given {estimator!r}.")
    if not jax.tree.leaves(eqx.filter(estimator, eqx.is_inexact_array)):
        raise ValueError(f"{estimator!r} has nothing to learn; give one that has radii.")
    with contextlib.ExitStack() as files:
        opened = open_channels(source, files=files)
        if isinstance(objective, FramePairLoss):
            objective = objective.fitted(opened)
        elif isinstance(objective, TruthLoss):
            # Within `jax.jit`, an index beyond the last frame would not be noticed.
            for truth in jax.tree.leaves(objective.bkgds):
                if truth.ndim == 3 and len(truth) != len(opened[0]):
                    raise ValueError(
                        f"The movie has {len(opened[0])} frames, but the true background "
                        f"{len(truth)}; give one image, or one for each frame."
                    )
        channels: Any = tuple(opened) if isinstance(source, tuple) else opened
        if len(opened) == 1 and not is_split(source):
            (channels,) = opened
        lag = objective.lag or 0 if isinstance(objective, FramePairLoss) else 0
        windows = _draw_windows(channels, lag, estimator.halo_frames > 0)
    return Problem(estimator, objective, windows)


def _draw_windows(channels: Any, lag: int, has_halo: bool) -> list[Window]:
    """Windows of equal length, spread evenly: runs of frames, and partners `lag` later."""
    opened: list[Channel] = jax.tree.leaves(channels)
    frame_count = len(opened[0])
    # With a halo, a frame in the middle needs frames beyond the lag on one side.
    fewest = 2 * lag + 2 if lag and has_halo else lag + 1
    if frame_count < fewest:
        raise ValueError(
            f"The movie has {frame_count} frames, but at least {fewest} are needed for a "
            f"lag of {lag} frames; give a longer movie, or a shorter lag."
        )
    frame_pixels = sum(math.prod(channel.shape[1:]) for channel in opened)
    most_frames = _SAMPLE_PIXELS // frame_pixels
    if has_halo:
        # Few windows of one long run, since frames near its ends lack their neighbours.
        length = max(_RUN_PIXELS // frame_pixels, _SHORTEST_RUN_FRAMES, 4 * lag)
        length = min(length, frame_count)
        count = min(frame_count // length, max(most_frames // length, 1))
        last, offsets = frame_count - length, [0]
    else:
        # Many windows of a short run and its partners, which are one run if they overlap.
        pair_count, share = frame_count - lag, most_frames // _MOST_WINDOWS
        fitting = max(share // 2, share - lag, 1)
        length = min(math.ceil(pair_count / _MOST_WINDOWS), fitting)
        fitting = max(most_frames // (length + min(length, lag)), _FEWEST_WINDOWS)
        count = min(math.ceil(pair_count / length), fitting, _MOST_WINDOWS)
        last, offsets = pair_count - length, [0, lag]
        if length > lag:
            length, offsets = length + lag, [0]
    names: Any = ""
    if isinstance(channels, list | tuple):
        names = [f" of channel {i + 1}" for i in range(len(channels))]
    windows = []
    for start in np.linspace(0, last, count).round().astype(int).tolist():
        runs = [(start + offset, start + offset + length) for offset in offsets]
        read = ft.partial(read_frames, runs=runs)
        indices = jnp.concatenate([jnp.arange(*run) for run in runs])
        windows.append(Window(map_channels(read, channels, names), indices))
    return windows

"""Calibration: an estimator's radii are learned from the movie that it is for."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Bool, Float

from .._estimators.base import AbstractEstimator
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel, Movie, Pixels
from .._movies.sources import is_split, open_channels
from .._workers import progress_bar
from .descent import descend, secant_descent
from .objectives import FramePairLoss, Objective, objective_for
from .problem import Problem, standard_deviations
from .windows import draw_windows


Estimator = TypeVar("Estimator", bound=AbstractEstimator)

# A movie: a path, an open movie or a channel of it, or an array that is sliced by frame.
Source = str | os.PathLike[str] | Movie | Channel | Pixels

# One object, so that a later calibration finds its compiled steps.
_SECANT_DESCENT = secant_descent()


class CalibrationHistory(eqx.Module):
    """How a calibration went.

    **Attributes:**

    - `losses`: the objective before each step, `(steps,)`, in its unit: none for
        [`jaxbkgd.FramePairLoss`][], the frames' squared for [`jaxbkgd.TruthLoss`][].
    - `radii`: the radii at each of these, `(steps, channels, axes)`. For
        [`jaxbkgd.SpatialMean`][] the axes are y and x in pixels, for
        [`jaxbkgd.LocalMean`][] time in frames, y and x in pixels. For an estimator without
        radii, its learnable parameters in one row.
    - `radii_std`: the standard deviation of the learned radii about the best ones for the
        movie, `(channels, axes)`, in the same units, from the scatter of gradients between
        blocks of frames and the curvature of the loss (Huber, Proc. 5th Berkeley Symp. 1,
        221, 1967). It is infinite at the bound and where the loss does not curve upwards;
        NaN for frozen radii, from fewer than 8 blocks, and for an estimator with more than
        32 parameters.
    - `is_at_bound`: whether a radius is as large as its bound allows, `(channels, axes)`.
    - `is_converged`: whether the radii have settled.
    - `stop_reason`: why the calibration ended, in words.
    - `objective`: what was minimised.
    - `lag`: frames between the two of a pair, for [`jaxbkgd.FramePairLoss`][]; else None.
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
        return _lag_of(self.objective)


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

    The loss is averaged over up to 16 windows of frames, spread evenly over the movie. They
    hold about 32 megapixels in all, or 16 frames if these are more; a short movie is used
    whole. For an estimator that sees many frames at a time, windows are one or two runs of
    about 16 megapixels, or 64 frames if these are more, whose ends count as the movie's.
    Every step sees all windows, so that losses can be compared between steps.

    The calibration ends when the radii of 4 successive steps are within a thousandth (at
    once, therefore, with a very small learning rate), when the steps are used up, or on
    Ctrl-C. The radii with the lowest loss are kept. Ctrl-C before the end of the first step
    raises `KeyboardInterrupt`; a step that is being computed ends in the background.

    Another calibration with the same shapes, static settings and objective is not compiled
    again.

    **Arguments:**

    - `channels`: the movie, as [`jaxbkgd.estimate_movie`][] takes it: a path, an open
        [`jaxbkgd.Movie`][] or a channel of it, an array or memory map (frames, height,
        width) or (frames, channels, height, width); or a list or tuple of these, one a
        channel and of equal length.
    - `estimator`: the estimator to calibrate, as `SpatialMean(7.0, max_radius_pix=60)`. All
        its inexact arrays are learned, from their present values.
    - `objective`: the loss, see [`jaxbkgd.Objective`][]. By default
        [`jaxbkgd.FramePairLoss`][], with a lag found from the movie.
    - `optimizer`: from optax. By default the secant method along each parameter: Newton's
        steps, with the curvature from the last two gradients.
    - `steps`: the most steps to take.
    - `progress`: whether to show loss and radii in a progress bar.

    **Returns:**

    The calibrated estimator, of the same type, and a [`jaxbkgd.CalibrationHistory`][].

    **Raises:**

    `TypeError` or `ValueError` for channels that are no movies of one length, or are
    shorter than the objective's lag asks for; for pixels of the windows that are not
    finite; and for an objective that does not give one finite number at the first radii. If
    it gives none later, or raises, calibration stops with a warning and keeps the best
    radii so far.

    !!! example

        ```python
        >>> import jax
        >>> import jaxbkgd
        >>> frames, _ = jaxbkgd.simulate_movie(
        ...     jax.random.key(0), frame_count=20, bkgd_length_scale_pix=8.0
        ... )
        >>> start = jaxbkgd.SpatialMean(7.0, max_radius_pix=20.0)
        >>> objective = jaxbkgd.FramePairLoss(lag=8)
        >>> estimator, history = jaxbkgd.calibrate(frames, start, objective=objective)
        >>> history.is_converged
        True
        >>> bool(3 < estimator.radii_pix[0, 0] < 6)
        True

        ```
    """
    if not steps >= 1:
        raise ValueError(f"steps must be at least 1, but is {steps}.")
    problem = _pose_problem(channels, estimator, objective or FramePairLoss())
    with progress_bar(steps, progress) as report:
        path = descend(problem, optimizer or _SECANT_DESCENT, steps, report)
    best = min(path.visits, key=lambda visit: visit.loss)
    calibrated: Estimator = problem.estimator_at(best.point)
    stop_reason = path.stop_reason
    radii_std = np.full_like(best.radii, np.nan)
    if not stop_reason.startswith("interrupted"):
        try:
            radii_std = standard_deviations(problem, best.point)
        except KeyboardInterrupt:
            stop_reason = f"interrupted after {len(path.visits)} steps"
    radii = np.stack([visit.radii for visit in path.visits])
    # What has not moved is frozen there.
    is_at_bound = problem.is_at_bound(best.point) & (np.ptp(radii, axis=0) > 0)
    if isinstance(calibrated, RadiiEstimator) and is_at_bound.any():
        names = {"px": "max_radius_pix", "frames": "max_radius_frames"}
        bounds = dict(zip(problem.units, calibrated.max_radii, strict=True))
        described = [f"{names[unit]} is {bounds[unit]:g} {unit}" for unit in bounds]
        warnings.warn(
            f"{is_at_bound.sum()} of {is_at_bound.size} radii went to their bound: the "
            f"background is even, or the bound too small ({', '.join(described)}).",
            stacklevel=2,
        )
    return calibrated, CalibrationHistory(
        losses=np.array([visit.loss for visit in path.visits]),
        radii=radii,
        radii_std=np.where(is_at_bound, np.inf, radii_std),
        is_at_bound=is_at_bound,
        is_converged=path.is_converged,
        stop_reason=stop_reason,
        objective=problem.objective,
    )


def losses_at(
    estimators: Sequence[AbstractEstimator],
    channels: Source | Sequence[Source],
    objective: Objective,
) -> Float[np.ndarray, " estimators"]:
    """The loss of each estimator on the windows that `calibrate` draws of these channels.

    The estimators differ in their inexact arrays alone. Ctrl-C raises `KeyboardInterrupt`
    without waiting for a step.
    """
    problem = _pose_problem(channels, estimators[0], objective)
    points = [eqx.filter(estimator, eqx.is_inexact_array) for estimator in estimators]
    return np.array([problem.losses_and_gradients(point)[0].mean() for point in points])


def _lag_of(objective: Objective) -> int | None:
    return objective.lag if isinstance(objective, FramePairLoss) else None


def _pose_problem(
    source: Source | Sequence[Source], estimator: AbstractEstimator, objective: Objective
) -> Problem:
    if isinstance(source, AbstractEstimator):
        raise TypeError("calibrate takes the movie first: calibrate(movie, estimator).")
    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(
            f"calibrate needs an AbstractEstimator, but was given {estimator!r}; give one "
            "as SpatialMean(7.0)."
        )
    if estimator.is_for_inference:
        raise ValueError(
            "The radii of what for_inference() gives are fixed; calibrate the estimator "
            "that it was made from."
        )
    if not jax.tree.leaves(eqx.filter(estimator, eqx.is_inexact_array)):
        raise ValueError(f"{estimator!r} has nothing to learn; give one that has radii.")
    with contextlib.ExitStack() as files:
        opened = open_channels(source, files=files)
        objective = objective_for(opened, objective)
        channels: Any = tuple(opened) if isinstance(source, tuple) else opened
        if len(opened) == 1 and not is_split(source):
            (channels,) = opened
        lag = _lag_of(objective) or 0
        windows = draw_windows(channels, lag, is_halo_seen=estimator.halo_frames > 0)
    return Problem(estimator, objective, windows)

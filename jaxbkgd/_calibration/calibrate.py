"""Calibration: an estimator's radii are learned from the movie that it is for."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, overload, TypeVar

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array

from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera, camera_of_each
from .._estimators.channels import is_sequence, map_channels
from .._estimators.checks import checked_count, checked_number
from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.saved import with_fields
from .._movies.movie import Box, Channel, Movie, Pixels
from .._movies.open import is_split, open_channels, open_weights
from .._workers import progress_bar
from .best import find_best, MOST_CHECKED
from .blinking import UnlearnableError
from .cameras import cameras_of
from .descent import descend, Problem, secant_descent, Visit
from .findings import blinking_molecules, doubts_of, Findings, findings_of
from .history import CalibrationHistory
from .hot_pixels import hot_pixels_of, without_pixels
from .movie_patterns import with_movie_patterns
from .objectives import FramePairLoss, Objective, TruthLoss
from .sample import draw_sample, draw_windows


Estimator = TypeVar("Estimator", bound=AbstractEstimator)

# A movie: a path, an open movie or a channel of it, or an array that is sliced by frame.
Source = str | os.PathLike[str] | Movie | Channel | Pixels

# An estimator that clips no molecules always takes some of their light, but not so much.
_LEAST_KEPT, _CLOSE = 0.5, 1.1
# One object, so that a later calibration finds its compiled steps.
_SECANT = secant_descent()


@overload
def calibrate(
    channels: Source | Sequence[Source],
    estimator: None = None,
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
    psf_sigma_pix: float | None = None,
    progress: bool = True,
) -> tuple[RadiiEstimator, CalibrationHistory]: ...


@overload
def calibrate(
    channels: Source | Sequence[Source],
    estimator: Estimator,
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
    psf_sigma_pix: float | None = None,
    progress: bool = True,
) -> tuple[Estimator, CalibrationHistory]: ...


def calibrate(
    channels: Source | Sequence[Source],
    estimator: AbstractEstimator | None = None,
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    camera: Camera | Sequence[Camera] | None = None,
    weights: Any = None,
    psf_sigma_pix: float | None = None,
    progress: bool = True,
) -> tuple[Any, CalibrationHistory]:
    """Finds the best estimator of a movie, or learns the radii of a given one.

    Without an estimator, radii are tried on runs of up to 300 frames, spread over the
    movie, in a part of the field: those of a [`jaxbkgd.LocalMean`][] of slow changes first,
    then of fast ones, of each frame alone and of the mean over each frame, where these
    might be better. The error is measured against frames that a background has not seen
    ([`jaxbkgd.FramePairLoss`][]), and molecules of known light are added, of which the
    estimator must leave 98 %. Pixels that are far off in all frames are left out
    ([`jaxbkgd.find_hot_pixels`][]). A movie of fewer than 30 frames gets `LocalMean()`.

    With an estimator, its parameters are learned by gradient descent. The loss is averaged
    over up to 16 windows of frames, spread evenly over the movie, of about 32 megapixels in
    all; for an estimator that sees many frames at a time, over one or two long runs.
    Calibration ends when the radii of 4 successive steps are within two thousandths, when
    the steps are used up, or on Ctrl-C, which before the end of the first step raises
    `KeyboardInterrupt`. The radii with the lowest loss are kept that leave molecules 98 %
    of their light, or half of it if the estimator does not clip them.

    **Arguments:**

    - `channels`: the movie, as [`jaxbkgd.estimate_movie`][] takes it: a path, an open
        movie or a channel of it, an array (frames, height, width) or (frames, channels,
        height, width); or a list or tuple of these, one a channel and of equal length.
    - `estimator`: an estimator to start from; by default, the best one is found. All its
        floating-point arrays are learned, from their present values.
    - `objective`: for a given estimator, the loss, see [`jaxbkgd.Objective`][]; by default
        [`jaxbkgd.FramePairLoss`][] with a lag found from the movie.
    - `optimizer`: for a given estimator, any of optax; it moves all learned numbers as one
        vector. By default, Newton's method along each number, with the curvature from the
        last two gradients.
    - `steps`: for a given estimator, the largest number of steps.
    - `boxes`, `frames`, `camera`: as [`jaxbkgd.estimate_movie`][] takes them. Where the
        gain of the camera is known, findings are in electrons.
    - `weights`: without an estimator, as `estimate_movie` takes them; pixels whose weight
        is zero are left out.
    - `psf_sigma_pix`: the standard deviation of the image of a molecule, in pixels; by
        default that of the bright spots of the movie.
    - `progress`: whether to show loss and radii in a progress bar.

    **Returns:** the calibrated estimator, of the type of a given one, and a
    [`jaxbkgd.CalibrationHistory`][], whose `doubts` say what not to believe.

    **Raises:** `TypeError` or `ValueError` for channels that are no movies of one length,
    too short, or not finite, and for an objective that does not give one finite number at
    the first radii. If it fails later, it stops with a warning.

    ```python
    >>> import jax
    >>> import jaxbkgd
    >>> frames, _ = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
    >>> few, camera = frames[:20], jaxbkgd.Camera(100.0)
    >>> estimator, history = jaxbkgd.calibrate(few, camera=camera)
    >>> history.doubts[0].startswith("the movie has 20 frames")
    True

    ```
    """
    checked_count("steps", steps)
    if psf_sigma_pix is not None:
        psf_sigma_pix = checked_number("psf_sigma_pix", psf_sigma_pix, unit="pixels")
    if estimator is not None:
        _check_estimator(estimator)
    if objective is not None and not callable(objective):
        rule = "objective must be an Objective, as FramePairLoss()"
        raise TypeError(f"{rule}, but is {objective!r}.")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        rule = "optimizer must be of optax, as optax.adam(0.1)"
        raise TypeError(f"{rule}, but is {optimizer!r}.")
    if estimator is not None and weights is not None:
        raise TypeError(
            "weights are for a search without an estimator; give boxes without what is to "
            "be left out, or leave the estimator out."
        )
    if estimator is None and (objective is not None or optimizer is not None):
        raise TypeError(
            "objective and optimizer are for an estimator to begin with; give one, as "
            "calibrate(movie, LocalMean()), or leave them out."
        )
    # JAX's strict modes watch what users call, and not what is called here.
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        contextlib.ExitStack() as files,
    ):
        opened = open_channels(channels, boxes, frames, files=files)
        masks = open_weights(weights, opened, files)
        cameras = cameras_of(camera, opened)
        if estimator is None:
            masks = [
                without_pixels(mask, hot_pixels_of(channel))
                for mask, channel in zip(masks, opened, strict=True)
            ]
            return find_best(opened, masks, cameras, psf_sigma_pix, progress)
        structured: Any = tuple(opened) if isinstance(channels, tuple) else opened
        if len(opened) == 1 and not is_split(channels, boxes):
            (structured,) = opened
        estimator = with_movie_patterns(estimator, opened, masks, cameras)
        start, kept = estimator, {}
        if isinstance(estimator, LocalMean) and estimator.patterns:
            # Parts of the field have patterns of their own.
            rank = max(map(len, estimator.patterns))
            start = with_fields(estimator, patterns=None, illumination_rank=rank)
            kept = {
                "patterns": estimator.patterns,
                "illumination_rank": estimator.illumination_rank,
            }
        problem = _pose_problem(structured, cameras, start, objective or FramePairLoss())
        with progress_bar(steps, progress) as report:
            descent = descend(problem, optimizer or _SECANT, steps, report)
        learned, history = _describe_descent(
            opened, cameras, problem, descent, psf_sigma_pix
        )
        return with_fields(learned, **kept), history


def _check_estimator(estimator: Any) -> None:
    if not isinstance(estimator, AbstractEstimator):
        rule = "calibrate(movie, estimator) needs an AbstractEstimator, as SpatialMean(7.0)"
        raise TypeError(f"{rule}, but was given {estimator!r}.")
    if not jax.tree.leaves(eqx.filter(estimator, eqx.is_inexact_array)):
        raise ValueError(f"{estimator!r} has nothing to learn; give one that has radii.")


def _describe_descent(
    channels: Sequence[Channel],
    cameras: Sequence[Camera],
    problem: Problem,
    descent: tuple[list[Visit], bool, str],
    psf_sigma_pix: float | None,
) -> tuple[Any, CalibrationHistory]:
    """The best of what was visited, and what is to be believed of it."""
    visits, is_converged, stop_reason = descent
    best = min(visits, key=lambda visit: visit.loss)
    findings: list[Findings] = []
    radii_std = np.full_like(best.radii, np.nan)
    if not stop_reason.startswith("interrupted"):
        try:
            if isinstance(problem.objective, FramePairLoss):
                best, findings = _guard(channels, cameras, problem, visits, psf_sigma_pix)
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
        warnings.warn(text, stacklevel=3)
    doubts = doubts_of(findings)
    lowest = min(visits, key=lambda visit: visit.loss)
    takes_molecules = _takes_molecules(problem.estimator_at(best.point), findings)
    if best is not lowest or takes_molecules:
        radii_text = np.array2string(lowest.radii, precision=3, separator=", ")
        taken = f"at the lowest loss, radii {radii_text}, molecules are background"
        doubts.append(f"{taken}; are there some that never go off? cut them off")
        warnings.warn(doubts[-1], stacklevel=3)
    if not is_converged:
        doubts.append(f"the search had not ended: {stop_reason}; give more steps")
    elif best.loss > visits[0].loss:
        doubts.append("the search ended above its start; begin from other radii")
    return problem.estimator_at(best.point), CalibrationHistory(
        losses=np.array([visit.loss for visit in visits]),
        radii=radii,
        findings=tuple(findings),
        doubts=tuple(doubts),
        radii_std=np.where(is_at_bound, np.inf, radii_std),
        is_at_bound=is_at_bound,
        is_converged=is_converged,
        stop_reason=stop_reason,
        objective=problem.objective,
    )


def _guard(
    channels: Sequence[Channel],
    cameras: Sequence[Camera],
    problem: Problem,
    visits: list[Visit],
    psf_sigma_pix: float | None,
) -> tuple[Visit, list[Findings]]:
    """The visit with the lowest loss that does not take molecules for background, or if
    all do, that with the lowest loss; and what is found with it, if the movie is long
    enough."""
    ranked = sorted(visits, key=lambda visit: visit.loss)
    try:
        sample = draw_sample(channels, [None] * len(channels), cameras, keeps_dark=True)
    except UnlearnableError:
        return ranked[0], []
    molecules = blinking_molecules(sample, psf_sigma_pix)
    failed: list[tuple[Visit, list[Findings]]] = []
    for visit in ranked:
        # Radii below those that take molecules, and hardly above, take them, too.
        if any(np.all(visit.radii < _CLOSE * other.radii) for other, _ in failed):
            continue
        estimator = problem.estimator_at(visit.point)
        findings = findings_of(estimator, sample, molecules)
        if not _takes_molecules(estimator, findings):
            return visit, findings
        failed.append((visit, findings))
        if len(failed) == MOST_CHECKED:
            break
    return failed[0]


def _takes_molecules(estimator: AbstractEstimator, findings: Sequence[Findings]) -> bool:
    """Whether molecules that are seen lose too much of their light to the background."""
    is_clipped = estimator.molecule_radius_pix is not None
    return any(
        of.molecules.is_measured
        and (of.takes_molecules if is_clipped else of.kept < _LEAST_KEPT)
        for of in findings
    )


def _pose_problem(
    channels: Any,
    cameras: Sequence[Camera],
    estimator: AbstractEstimator,
    objective: Objective,
) -> Problem:
    """The loss on windows of channels, which are one, or a list or tuple of them."""
    opened: list[Channel] = jax.tree.leaves(channels)
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
        of_each = camera_of_each(cameras if is_sequence(channels) else cameras[0], channels)

        def in_estimated_unit(truth: Array, camera: Camera) -> Array:
            return truth if camera.is_even else truth * camera.known_gain("A truth")

        objective = TruthLoss(map_channels(in_estimated_unit, objective.bkgds, of_each))
    lag = objective.lag or 0 if isinstance(objective, FramePairLoss) else 0
    windows = draw_windows(channels, cameras, lag, estimator.sees_one_frame)
    return Problem(estimator, objective, windows)

"""Calibration: an estimator's radii are learned from the movie that it is for."""

import contextlib
import itertools as it
import os
import warnings
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._estimators.base import AbstractEstimator
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel, Movie, Pixels
from .._movies.sources import is_split, open_channels
from .._workers import core_count, on_threads, progress_bar, Report, run_interruptibly
from .descent import secant_descent
from .objectives import block_losses, FramePairLoss, Objective, objective_for
from .windows import draw_windows, Window


Estimator = TypeVar("Estimator", bound=AbstractEstimator)

# A movie: a path, an open movie or a channel of it, or an array that is sliced by frame.
Source = str | os.PathLike[str] | Movie | Channel | Pixels

# Radii have settled if they agree within so much, relatively, at so many successive steps.
_SETTLED, _SETTLED_STEPS = 1e-3, 4
# A radius above this share of its bound is at its bound.
_AT_BOUND = 0.98
# The step in a parameter, nearly relative in the radius, for the second derivative.
_CURVATURE_STEP = 0.05
# Fewer gradients do not show how they scatter; more parameters cost too much.
_FEWEST_GRADIENTS, _MOST_PARAMETERS = 8, 32
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
        path = _descend(problem, optimizer or _SECANT_DESCENT, steps, report)
    best = min(path.visits, key=lambda visit: visit.loss)
    calibrated = problem.estimator_at(best.point)
    try:
        radii_std = _standard_deviations(problem, best.point)
    except KeyboardInterrupt:
        radii_std = np.full_like(best.radii, np.nan)
    radii = np.stack([visit.radii for visit in path.visits])
    is_at_bound = _is_at_bound(calibrated) & (np.ptp(radii, axis=0) > 0)
    if isinstance(calibrated, RadiiEstimator) and is_at_bound.any():
        names = {"px": "max_radius_pix", "frames": "max_radius_frames"}
        bounds = dict(zip(_units(calibrated), calibrated.max_radii, strict=True))
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
        stop_reason=path.stop_reason,
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


def _radii_of(estimator: AbstractEstimator) -> Float[Array, "channels axes"]:
    if isinstance(estimator, RadiiEstimator):
        return estimator.radii
    return ravel_pytree(eqx.filter(estimator, eqx.is_inexact_array))[0][None]


def _units(estimator: RadiiEstimator) -> tuple[str, ...]:
    return ("frames", "px", "px")[-len(estimator.max_radii) :]


def _is_at_bound(estimator: AbstractEstimator) -> Bool[np.ndarray, "channels axes"]:
    bounds = estimator.max_radii if isinstance(estimator, RadiiEstimator) else np.inf
    return np.asarray(_radii_of(estimator)) > _AT_BOUND * bounds


def _pose_problem(
    source: Source | Sequence[Source], estimator: AbstractEstimator, objective: Objective
) -> "_Problem":
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
    return _Problem(estimator, objective, windows)


class _MeanLoss(eqx.Module):
    """The loss, averaged over windows, as a function of what is learned of an estimator."""

    rest: AbstractEstimator
    objective: Objective
    windows: list[Window]

    def __call__(self, point: PyTree) -> Float[Array, ""]:
        windows = jax.tree.map(lambda *parts: jnp.stack(parts), *self.windows)
        estimator = eqx.combine(point, self.rest)
        return jnp.mean(lax.map(lambda window: self.objective(estimator, *window), windows))


class _Problem:
    """The loss of each window as a function of a point, what is learned of an estimator."""

    def __init__(
        self, estimator: AbstractEstimator, objective: Objective, windows: list[Window]
    ):
        self.objective = objective
        self._windows = windows
        self.start, self._rest = eqx.partition(estimator, eqx.is_inexact_array)
        # JAX may be configured otherwise in other threads, where NumPy arrays would get
        # other dtypes, and a program would be compiled anew.
        self._arguments = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf,
            (self._rest, objective),
        )
        lowered = _value_and_gradient.lower(self.start, *self._arguments, windows[0])
        self._value_and_gradient = run_interruptibly(lowered.compile)
        self.mean_loss = _MeanLoss(*self._arguments, windows)

    def estimator_at(self, point: PyTree) -> Any:
        return eqx.combine(point, self._rest)

    def losses_and_gradients(self, point: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each window, `(windows,)`, and its gradient, `(windows, numbers)`.

        Ctrl-C raises `KeyboardInterrupt` at once, and windows in flight are dropped.
        """

        def evaluate(index: int) -> tuple[int, float, np.ndarray]:
            value, gradient = self._value_and_gradient(
                point, *self._arguments, self._windows[index]
            )
            numbers = [np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
            return index, float(value), np.concatenate(numbers, dtype=np.float64)

        indices = range(len(self._windows))
        done = sorted(on_threads(evaluate, indices, core_count()), key=itemgetter(0))
        _, values, gradients = zip(*done, strict=True)
        return np.array(values), np.stack(gradients)

    def block_gradients(self, point: PyTree) -> np.ndarray:
        """Gradients of independent blocks of frames, `(blocks, numbers)`."""
        lowered = _block_gradients.lower(point, *self._arguments, self._windows[0])
        compiled = run_interruptibly(lowered.compile)

        def evaluate() -> list[np.ndarray]:
            return [
                np.asarray(compiled(point, *self._arguments, window), np.float64)
                for window in self._windows
            ]

        return np.concatenate(run_interruptibly(evaluate))


# These are compiled once for all calibrations of the same shapes and static values.


@eqx.filter_jit
def _value_and_gradient(
    point: PyTree, rest: AbstractEstimator, objective: Objective, window: Window
) -> tuple[Array, PyTree]:
    def loss(point: PyTree) -> Array:
        value = objective(eqx.combine(point, rest), *window)
        is_number = isinstance(value, jax.Array) and value.shape == ()
        if not (is_number and jnp.issubdtype(value.dtype, jnp.floating)):
            raise TypeError(
                f"The objective must give one real number, but gives {value}; take the "
                "mean over frames, pixels and channels."
            )
        return value

    return jax.value_and_grad(loss)(point)


@eqx.filter_jit
def _block_gradients(
    point: PyTree, rest: AbstractEstimator, objective: Objective, window: Window
) -> Float[Array, "blocks numbers"]:
    flat, unravel = ravel_pytree(point)

    def losses(flat: Array) -> Array:
        return block_losses(objective, eqx.combine(unravel(flat), rest), *window)

    return jax.jacfwd(losses)(flat)


@eqx.filter_jit
def _next_point(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    point: PyTree,
    loss: Array,
    mean_loss: _MeanLoss,
) -> tuple[PyTree, PyTree]:
    # The arguments of optimizers that search along a line, beside those of all.
    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient, state, point, value=loss, grad=gradient, value_fn=mean_loss
    )
    return eqx.apply_updates(point, updates), state


class _Visit(NamedTuple):
    """A point, its loss and radii, and all its numbers."""

    point: PyTree
    loss: float
    radii: Float[np.ndarray, "channels axes"]
    numbers: Float[np.ndarray, " numbers"]


class _Path(NamedTuple):
    visits: list[_Visit]
    is_converged: bool
    stop_reason: str


def _descend(
    problem: _Problem, optimizer: optax.GradientTransformation, steps: int, report: Report
) -> _Path:
    """Follows the optimizer until the radii have settled or something stops it."""
    visits: list[_Visit] = []
    try:
        for visit in it.islice(_visits(problem, optimizer), steps):
            # In one step, between whose parts Ctrl-C cannot come.
            visits.append(visit)
            estimator = problem.estimator_at(visit.point)
            report(len(visits), f"loss {visit.loss:.4g}, {_described(estimator)}")
            if _have_settled([visit.radii for visit in visits]) and (
                # There, the parameter of a radius goes on to infinity.
                _is_at_bound(estimator).any()
                or _have_settled([visit.numbers for visit in visits])
            ):
                return _Path(visits, True, f"the radii had settled after {len(visits)} steps")
        return _Path(visits, False, f"all {steps} steps were used up")
    except KeyboardInterrupt:
        if not visits:
            raise
        return _Path(visits, False, f"interrupted after {len(visits)} steps")
    except Exception as error:
        if not visits:
            raise
        first_line, *_ = [*str(error).splitlines(), ""]
        stop_reason = f"at step {len(visits)}: {first_line}"
        warnings.warn(
            f"Calibration stopped {stop_reason}; the best radii before it are kept.",
            stacklevel=3,
        )
        return _Path(visits, False, stop_reason)


def _visits(problem: _Problem, optimizer: optax.GradientTransformation) -> Iterator[_Visit]:
    """The points that the optimizer leads to, without an end."""
    point, state = problem.start, optimizer.init(problem.start)
    flat, unravel = ravel_pytree(point)
    for step in it.count():
        losses, gradients = problem.losses_and_gradients(point)
        loss, gradient = float(losses.mean()), gradients.mean(axis=0)
        if not np.isfinite([loss, *(gradients if step == 0 else gradient).ravel()]).all():
            found = f"the loss is {loss:g}, its gradient {gradient.tolist()}"
            if step == 0:
                raise ValueError(f"At the first radii {found}; they must be finite.")
            raise FloatingPointError(found)
        if step == 0 and not gradients.any():
            raise ValueError(
                "There is nothing to learn, since the objective does not depend on the "
                "radii: are they frozen, or is the movie constant?"
            )
        radii = np.asarray(_radii_of(problem.estimator_at(point)))
        yield _Visit(point, loss, radii, np.asarray(ravel_pytree(point)[0]))
        point, state = _next_point(
            optimizer,
            unravel(jnp.asarray(gradient, flat.dtype)),
            state,
            point,
            jnp.asarray(loss, flat.dtype),
            problem.mean_loss,
        )


def _described(estimator: AbstractEstimator) -> str:
    """The radii with their units, or the parameters."""
    if not isinstance(estimator, RadiiEstimator):
        numbers = np.ravel(_radii_of(estimator))
        return f"parameters {', '.join(f'{number:.3g}' for number in numbers)}"
    units = _units(estimator)
    rows = [
        ", ".join(f"{radius:.3g} {unit}" for radius, unit in zip(row, units, strict=True))
        for row in np.asarray(estimator.radii)
    ]
    return f"radii {'; '.join(rows)}"


def _have_settled(numbers: list[np.ndarray]) -> bool:
    recent = np.stack(numbers[-_SETTLED_STEPS:])
    moved = np.ptp(recent, axis=0)
    return len(recent) == _SETTLED_STEPS and bool(
        np.all(moved <= _SETTLED * np.abs(recent[-1]))
    )


def _standard_deviations(
    problem: _Problem, point: PyTree
) -> Float[np.ndarray, "channels axes"]:
    """The uncertainty of the radii, from the scatter of gradients between blocks of frames.

    The parameters at which a mean of independent losses is minimal have the covariance
    `H^-1 S H^-1`, where `S` is that of the mean's gradient and `H` its second derivative
    (Huber, Proc. 5th Berkeley Symp. 1, 221, 1967).
    """
    flat, unravel = ravel_pytree(point)

    def radii(flat: Array) -> Array:
        return _radii_of(problem.estimator_at(unravel(flat)))

    unknown = np.full(np.shape(radii(flat)), np.nan)
    if flat.size > _MOST_PARAMETERS:
        return unknown
    gradients = problem.block_gradients(point)
    if len(gradients) < _FEWEST_GRADIENTS:
        return unknown
    jacobian = np.asarray(jax.jacobian(radii)(flat), np.float64)
    scatter = np.atleast_2d(np.cov(gradients, rowvar=False)) / len(gradients)

    def mean_gradient(flat: Array) -> np.ndarray:
        return problem.losses_and_gradients(unravel(flat))[1].mean(axis=0)

    steps = _CURVATURE_STEP * jnp.eye(flat.size, dtype=flat.dtype)
    curvature = np.stack(
        [mean_gradient(flat + step) - mean_gradient(flat - step) for step in steps]
    ) / (2 * _CURVATURE_STEP)
    curvature = (curvature + curvature.T) / 2
    is_frozen = ~gradients.any(axis=0)
    is_curved = np.diag(curvature) > 0
    kept = np.ix_(is_curved, is_curved)
    inverse = np.linalg.pinv(curvature[kept])
    slopes = jacobian[..., is_curved]
    covariance = inverse @ scatter[kept] @ inverse
    variances = np.einsum("cai,ij,caj->ca", slopes, covariance, slopes)
    is_flat = jacobian[..., ~is_curved].any(axis=-1)
    # A frozen parameter has no gradient, and no learned radius depends on it.
    is_learned = jacobian[..., ~is_frozen].any(axis=-1)
    return np.where(is_learned, np.where(is_flat, np.inf, np.sqrt(variances)), np.nan)

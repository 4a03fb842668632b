"""Calibration: an estimator's radii learned from the movie that it is for."""

import functools as ft
import math
import warnings
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._estimators.base import AbstractEstimator
from .._estimators.channels import map_channels
from .._workers import core_count, on_threads, progress_bar
from .objectives import FramePairLoss, Objective, read_frames, TruthLoss


# Windows of frames that the loss is averaged over, and pixels of all of them and all
# channels together, unless the least number of windows needs more.
_MOST_WINDOWS, _LEAST_WINDOWS, _SAMPLE_PIXELS = 16, 8, 2**25
# Of an estimator that sees many frames at a time, pixels and frames of a window.
_RUN_PIXELS, _LEAST_RUN_FRAMES = 2**24, 64

# Radii have settled if they are so close to each other, relatively, at so many points.
_SETTLED, _SETTLED_POINTS = 1e-3, 4
# From here on a radius is as large as it may be.
_AT_BOUND = 0.98
# The step in a parameter, about relative in the radius, over which gradients are compared.
_CURVATURE_STEP = 0.05
# Fewer gradients say too little of how they scatter, and more numbers cost too much.
_LEAST_GRADIENTS, _MOST_NUMBERS = 8, 32


class CalibrationHistory(eqx.Module):
    """How a calibration went.

    **Attributes:**

    - `losses`: the objective before each step, `(steps,)`, in its unit: none for
        [`jaxbkgd.FramePairLoss`][], the frames' squared for [`jaxbkgd.TruthLoss`][].
    - `radii_pix`: the radii that it belongs to, `(steps, channels, 2)`. Of
        [`jaxbkgd.LocalMean`][] there are three, in frames, y and x, here and below. Of an
        estimator without radii, its learnable numbers in one row.
    - `radii_std_pix`: the standard deviation of the learned radii about the best ones for
        the movie, `(channels, 2)`, from the scatter of gradients between blocks of frames
        and the curvature of the loss (Huber, Proc. 5th Berkeley Symp. 1, 221, 1967). It is
        infinite at the bound and where the loss does not curve upwards; NaN for frozen
        radii, from fewer than 8 blocks, and of an estimator with more than 32 numbers.
    - `is_at_bound`: whether a radius is as large as its bound allows, `(channels, 2)`.
    - `is_converged`: whether the radii have settled.
    - `stop_reason`: why it ended, in words.
    - `objective`: what was minimised, with the lag that was found.
    """

    losses: Float[np.ndarray, " steps"]
    radii_pix: Float[np.ndarray, "steps channels axes"]
    radii_std_pix: Float[np.ndarray, "channels axes"]
    is_at_bound: Bool[np.ndarray, "channels axes"]
    is_converged: bool
    stop_reason: str
    objective: Any


def calibrate(
    channels: Any,
    estimator: AbstractEstimator,
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    progress: bool = True,
) -> tuple[Any, CalibrationHistory]:
    """Learns an estimator's radii from a movie.

    The loss is averaged over up to 16 windows of frames, spread evenly over the movie. They
    hold about 32 megapixels in all, or 16 frames if these are more; a short movie is used
    whole. For an estimator that sees many frames at a time, windows are one or two runs of
    about 16 megapixels, or 64 frames if these are more, whose ends count as the movie's.
    Every step sees all windows, so that the loss can be compared between steps. It ends
    when the radii of 4 successive steps are within a thousandth (at once, therefore, with a
    very small learning rate), when the steps are used up, or on Ctrl-C. The radii with the
    lowest loss are kept.

    **Arguments:**

    - `channels`: one movie (frames, height, width), or a list or tuple of them, one a
        channel and of equal length: arrays, memory maps, or whatever has a shape and
        is sliced by frame.
    - `estimator`: what to calibrate, as `SpatialMean(7.0, max_radius_pix=60)`. All its
        inexact arrays are learned, from where they are.
    - `objective`: the loss, called as `objective(estimator, channels, frame_indices)` with
        a window of frames and their places in the movie. By default
        [`jaxbkgd.FramePairLoss`][], with a lag found from the movie.
    - `optimizer`: from optax. By default the secant method along each number by itself:
        Newton's, with the curvature from the last two gradients.
    - `steps`: the most steps to take.
    - `progress`: whether to show loss and radii in a progress bar, at a terminal with
        rich installed.

    **Returns:**

    The calibrated estimator and a [`jaxbkgd.CalibrationHistory`][].

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
    if objective is None:
        objective = FramePairLoss()
    problem = _posed_problem(estimator, channels, objective)
    path = _descend(problem, optimizer or secant_descent(), steps, progress)
    best = path.points[int(np.argmin(path.losses))]
    calibrated = problem.estimator(best)
    try:
        radii_std_pix = _standard_deviations(problem, best)
    except KeyboardInterrupt:
        radii_std_pix = np.full_like(radii_of(calibrated), np.nan)
    is_at_bound = _is_at_bound(calibrated) & np.ptp(path.radii, axis=0).astype(bool)
    if is_at_bound.any():
        warnings.warn(
            f"{is_at_bound.sum()} of {is_at_bound.size} radii went to their bound: the "
            "background is even, or the bound too small (max_radius_pix is "
            f"{calibrated.max_radius_pix:g} px{_frames_bound(calibrated)}).",
            stacklevel=2,
        )
    return calibrated, CalibrationHistory(
        losses=np.array(path.losses),
        radii_pix=np.stack(path.radii),
        radii_std_pix=np.where(is_at_bound, np.inf, radii_std_pix),
        is_at_bound=is_at_bound,
        is_converged=path.is_converged,
        stop_reason=path.stop_reason,
        objective=problem.objective,
    )


def losses_at(
    estimators: Sequence[AbstractEstimator], channels: Any, objective: Objective
) -> Float[np.ndarray, " estimators"]:
    """The loss of each estimator, on the windows that `calibrate` draws of these channels.

    They differ in what they learn, and have the rest of the first.
    """
    problem = _posed_problem(estimators[0], channels, objective)
    points = [eqx.filter(estimator, eqx.is_inexact_array) for estimator in estimators]
    losses = [problem.window_values_and_gradients(point)[0].mean() for point in points]
    return np.array(losses)


def radii_of(estimator: AbstractEstimator) -> Float[np.ndarray, "channels axes"]:
    """The radii, or all that is learned of an estimator without radii, in one row."""
    return np.asarray(_traced_radii(estimator))


def _traced_radii(estimator):
    for name in ("radii", "radii_pix"):
        if hasattr(estimator, name):
            return getattr(estimator, name)
    return ravel_pytree(eqx.filter(estimator, eqx.is_inexact_array))[0][None]


def _frames_bound(estimator: Any) -> str:
    bound = getattr(estimator, "max_radius_frames", None)
    return "" if bound is None else f", max_radius_frames {bound:g} frames"


def _is_at_bound(estimator: AbstractEstimator) -> Bool[np.ndarray, "channels axes"]:
    bounds = [getattr(estimator, name, None) for name in ("max_radii", "max_radius_pix")]
    bound = next((bound for bound in bounds if bound is not None), np.inf)
    return radii_of(estimator) > _AT_BOUND * bound


# The movie, and the windows of it that the loss is averaged over.


class Window(NamedTuple):
    """Frames of all channels, and their places in the movie."""

    channels: Any
    frame_indices: Int[Array, " frames"]


def _checked_movie(channel: Any) -> Any:
    movie = channel if hasattr(channel, "shape") else np.asarray(channel)
    if len(movie.shape) != 3 or 0 in movie.shape:
        raise ValueError(
            "A movie to calibrate with must have shape (frames, height, width), but its "
            f"shape is {tuple(movie.shape)}."
        )
    return movie


def _common_length(movies: Any) -> int:
    lengths = jax.tree.leaves(map_channels(lambda movie: movie.shape[0], movies))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The channels have {', '.join(map(str, lengths))} frames; give channels of "
            "the same length, or calibrate each by itself."
        )
    return lengths[0]


def _draw_windows(
    movies: Any, frame_count: int, estimator: AbstractEstimator, objective: Objective
) -> list[Window]:
    lag = getattr(objective, "lag", None) or 0
    # Where the lag leaves out what is near, a frame in the middle needs others beyond it.
    least = 2 * lag + 2 if lag and estimator.halo_frames else lag + 1
    if frame_count < least:
        raise ValueError(
            f"The movie has {frame_count} frames, but at least {least} are needed for a "
            f"lag of {lag} frames; give a longer movie, or a shorter lag."
        )
    sizes = map_channels(lambda movie: math.prod(movie.shape[1:]), movies)
    frame_pixels = sum(jax.tree.leaves(sizes))
    if estimator.halo_frames:
        runs = _long_runs(frame_count, frame_pixels, lag)
    else:
        runs = _frames_and_partners(frame_count, frame_pixels, lag)
    return [_window(movies, some) for some in runs]


# Frames from one up to another; a window has one or more of these.
_Run = tuple[int, int]


def _long_runs(frame_count: int, frame_pixels: int, lag: int) -> list[list[_Run]]:
    """For an estimator that sees many frames at a time: few windows, as long as they can be
    at once."""
    length = max(_RUN_PIXELS // frame_pixels, _LEAST_RUN_FRAMES, 4 * lag)
    length = min(length, frame_count)
    fitting = max(_SAMPLE_PIXELS // (length * frame_pixels), 1)
    count = min(frame_count // length, fitting)
    starts = np.linspace(0, frame_count - length, count).round().astype(int)
    return [[(start, start + length)] for start in starts.tolist()]


def _frames_and_partners(frame_count: int, frame_pixels: int, lag: int) -> list[list[_Run]]:
    """For an estimator that sees one frame at a time: many windows, of some frames and as
    many that are `lag` later, of which some may be the same."""
    most_frames = _SAMPLE_PIXELS // frame_pixels
    counted = frame_count - lag
    length = math.ceil(counted / _MOST_WINDOWS)
    while length > 1 and length + min(length, lag) > most_frames // _MOST_WINDOWS:
        length -= 1
    window_frames = length + min(length, lag)
    fitting = max(most_frames // window_frames, _LEAST_WINDOWS)
    count = min(math.ceil(counted / length), fitting, _MOST_WINDOWS)
    starts = np.linspace(0, counted - length, count).round().astype(int)
    if length > lag:
        return [[(start, start + window_frames)] for start in starts.tolist()]
    return [
        [(start, start + length), (start + lag, start + lag + length)]
        for start in starts.tolist()
    ]


def _window(movies: Any, runs: list[_Run]) -> Window:
    def read(movie, name):
        return jnp.concatenate([read_frames(movie, *run, name) for run in runs])

    names: Any = ""
    if isinstance(movies, list | tuple):
        names = [f" of channel {number}" for number in range(1, len(movies) + 1)]
    indices = jnp.concatenate([jnp.arange(*run) for run in runs])
    return Window(map_channels(read, movies, names), indices)


def _posed_problem(
    estimator: AbstractEstimator, channels: Any, objective: Objective
) -> "_Problem":
    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(
            f"What is calibrated must be an AbstractEstimator, but is {estimator!r}; give "
            "one as SpatialMean(7.0)."
        )
    if not jax.tree.leaves(eqx.filter(estimator, eqx.is_inexact_array)):
        raise ValueError(f"{estimator!r} has nothing to learn; give one that has radii.")
    movies = map_channels(_checked_movie, channels)
    frame_count = _common_length(movies)
    if isinstance(objective, FramePairLoss):
        objective = objective.fitted(movies)
    if isinstance(objective, TruthLoss):
        objective.check_frames(frame_count)
    windows = _draw_windows(movies, frame_count, estimator, objective)
    return _Problem(estimator, objective, windows)


class _Problem:
    """The loss as a function of what is learned of the estimator, a point."""

    def __init__(
        self, estimator: AbstractEstimator, objective: Objective, windows: list[Window]
    ):
        self.objective = objective
        self.start, self._rest = eqx.partition(estimator, eqx.is_inexact_array)
        self._windows = windows
        # Arrays are arguments of the compiled loss, not constants in it.
        self._arrays, self._others = eqx.partition((self._rest, objective), eqx.is_array)

        def loss(point, arrays, window):
            rest, objective = eqx.combine(arrays, self._others)
            return objective(eqx.combine(point, rest), *window)

        arguments = self.start, self._arrays, windows[0]
        answer = jax.eval_shape(loss, *arguments)
        is_number = isinstance(answer, jax.ShapeDtypeStruct) and answer.shape == ()
        if not (is_number and jnp.issubdtype(answer.dtype, jnp.floating)):
            raise TypeError(
                f"The objective must give one real number, but gives {answer}; take the "
                "mean over frames, pixels and channels."
            )
        # Here, where JAX is configured as it is for the caller.
        self._evaluate = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        self._loss = loss

    def estimator(self, point: PyTree) -> Any:
        return eqx.combine(point, self._rest)

    def window_values_and_gradients(self, point: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each window, `(windows,)`, and its gradient, `(windows, numbers)`."""

        def evaluate(index):
            window = self._windows[index]
            value, gradient = self._evaluate(point, self._arrays, window)
            # With NumPy, since JAX has another configuration in other threads.
            numbers = [np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
            return index, float(value), np.concatenate(numbers, dtype=np.float64)

        # A window is worked on in one thread.
        indices = range(len(self._windows))
        done = sorted(on_threads(evaluate, indices, core_count()), key=itemgetter(0))
        _, values, gradients = zip(*done, strict=True)
        return np.array(values), np.stack(gradients)

    def independent_gradients(self, point: PyTree) -> np.ndarray:
        """Gradients whose scatter is that of their mean, `(blocks, numbers)`.

        Those of the windows, unless the objective knows better.
        """
        if not isinstance(self.objective, FramePairLoss):
            return self.window_values_and_gradients(point)[1]
        flat, unravel = ravel_pytree(point)

        @jax.jit
        @jax.jacfwd
        def gradients(flat, arrays, window):
            rest, objective = eqx.combine(arrays, self._others)
            estimator = eqx.combine(unravel(flat), rest)
            return objective.independent_losses(estimator, *window)

        every = [gradients(flat, self._arrays, window) for window in self._windows]
        return np.concatenate(every).astype(np.float64)

    def mean(self, point: PyTree) -> Float[Array, ""]:
        """The loss, for optimizers that search along a line."""
        windows = jax.tree.map(lambda *parts: jnp.stack(parts), *self._windows)
        loss = ft.partial(self._loss, point, self._arrays)
        return jnp.mean(lax.map(loss, windows))


# The way down.


class _SecantState(NamedTuple):
    """Number by number: how long the last step was, its gradient, and whether there were
    gradients of both signs."""

    length: PyTree
    gradient: PyTree
    has_turned: PyTree


_FIRST_STEP, _LONGEST_STEP, _MOST_GROWTH = 0.3, 1.0, 2.0


def secant_descent() -> optax.GradientTransformation:
    """Newton's steps along each number, its curvature from the last two gradients.

    Where the loss does not curve upwards, and wherever that step would be long, it follows
    the sign of the gradient, with steps that grow until they have passed a minimum. For few
    numbers that hardly depend on each other, such as the logarithms of radii, and gradients
    without noise.
    """

    def init(params):
        return _SecantState(
            jax.tree.map(lambda number: jnp.full_like(number, _FIRST_STEP), params),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda number: jnp.zeros_like(number, bool), params),
        )

    def next_length(gradient, length, before, has_turned):
        # The last step was of this length, against the gradient before.
        curvature = (gradient - before) / (-jnp.sign(before) * length)
        is_curved = (before != 0) & (curvature > 0)
        growth = jnp.where((before == 0) | (has_turned & ~is_curved), 1.0, _MOST_GROWTH)
        limit = jnp.minimum(growth * length, _LONGEST_STEP)
        newton = jnp.abs(gradient) / jnp.where(is_curved, curvature, 1)
        step = jnp.where(is_curved, jnp.minimum(newton, limit), limit)
        return jnp.where(gradient == 0, length, step)

    def update(updates, state, params=None):
        del params
        has_turned = jax.tree.map(
            lambda gradient, before, has_turned: has_turned | (gradient * before < 0),
            *(updates, state.gradient, state.has_turned),
        )
        lengths = jax.tree.map(
            next_length, updates, state.length, state.gradient, has_turned
        )
        steps = jax.tree.map(
            lambda gradient, length: -jnp.sign(gradient) * length, updates, lengths
        )
        return steps, _SecantState(lengths, updates, has_turned)

    return optax.GradientTransformation(init, update)


class _Path(NamedTuple):
    """Points that were visited, with their losses and radii, and why there are no more."""

    points: list[PyTree]
    losses: list[float]
    radii: list[np.ndarray]
    is_converged: bool
    stop_reason: str


def _descend(
    problem: _Problem, optimizer: optax.GradientTransformation, steps: int, progress: bool
) -> _Path:
    optimizer = optax.with_extra_args_support(optimizer)
    point, state = problem.start, optimizer.init(problem.start)
    flat, unravel = ravel_pytree(point)
    points, losses, radii, numbers = [], [], [], []
    is_converged, stop_reason = False, f"all {steps} steps were used up"
    try:
        with progress_bar(steps, progress) as report:
            for step in range(steps):
                values, gradients = problem.window_values_and_gradients(point)
                loss, gradient = values.mean(), gradients.mean(axis=0)
                found = f"the loss is {loss:g}, its gradient {gradient.tolist()}"
                if step == 0:
                    _check_start(loss, gradients, found)
                elif not np.isfinite([loss, *gradient]).all():
                    raise FloatingPointError(found)
                points.append(point)
                losses.append(float(loss))
                radii.append(radii_of(problem.estimator(point)))
                text = ", ".join(f"{radius:.3g}" for radius in radii[-1].ravel())
                report(step + 1, f"loss {loss:.4g}, radii {text} px")
                numbers.append(np.asarray(ravel_pytree(point)[0]))
                # At the bound, what a radius is made of goes on to infinity.
                is_at_bound = _is_at_bound(problem.estimator(point)).any()
                if _have_settled(radii) and (is_at_bound or _have_settled(numbers)):
                    is_converged = True
                    stop_reason = f"the radii had settled after {step + 1} steps"
                    break
                gradient = unravel(jnp.asarray(gradient, flat.dtype))
                updates, state = optimizer.update(
                    gradient, state, point, value=loss, grad=gradient, value_fn=problem.mean
                )
                point = eqx.apply_updates(point, updates)
    except KeyboardInterrupt:
        if not points:
            raise
        stop_reason = f"interrupted after {len(points)} steps"
    except Exception as error:
        if not points:
            raise
        (said, *_) = [*str(error).splitlines(), ""]
        stop_reason = f"at step {len(points)}: {said}"
        warnings.warn(
            f"Calibration stopped {stop_reason}; the best radii before it are kept.",
            stacklevel=3,
        )
    return _Path(points, losses, radii, is_converged, stop_reason)


def _check_start(loss: float, gradients: np.ndarray, found: str) -> None:
    if not np.isfinite([loss, *gradients.ravel()]).all():
        raise ValueError(f"At the first radii {found}; they must be finite.")
    if not gradients.any():
        raise ValueError(
            "There is nothing to learn, since the objective does not depend on the radii: "
            "are they frozen, or is the movie constant?"
        )


def _have_settled(numbers: list[np.ndarray]) -> bool:
    recent = np.stack(numbers[-_SETTLED_POINTS:])
    moved = np.ptp(recent, axis=0)
    return len(recent) == _SETTLED_POINTS and bool(
        np.all(moved <= _SETTLED * np.abs(recent[-1]))
    )


def _standard_deviations(
    problem: _Problem, point: PyTree
) -> Float[np.ndarray, "channels axes"]:
    """What the scatter of gradients between blocks of frames means for the radii.

    The parameters that a mean of independent losses is minimal at have the covariance
    `H^-1 S H^-1`, where `S` is that of the mean's gradient and `H` its second derivative
    (Huber, Proc. 5th Berkeley Symp. 1, 221, 1967).
    """
    flat, unravel = ravel_pytree(point)

    def radii(flat):
        return _traced_radii(problem.estimator(unravel(flat)))

    unknown = np.full(np.shape(radii(flat)), np.nan)
    if flat.size > _MOST_NUMBERS:
        return unknown
    gradients = problem.independent_gradients(point)
    if len(gradients) < _LEAST_GRADIENTS:
        return unknown
    jacobian = np.asarray(jax.jacobian(radii)(flat), np.float64)
    scatter = np.atleast_2d(np.cov(gradients, rowvar=False)) / len(gradients)

    def mean_gradient(flat):
        return problem.window_values_and_gradients(unravel(flat))[1].mean(axis=0)

    steps = _CURVATURE_STEP * np.eye(flat.size, dtype=flat.dtype)
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
    # What is frozen has no gradient, and nothing that is learned depends on it.
    is_learned = jacobian[..., ~is_frozen].any(axis=-1)
    return np.where(is_learned, np.where(is_flat, np.inf, np.sqrt(variances)), np.nan)

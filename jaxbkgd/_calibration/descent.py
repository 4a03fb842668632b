"""The way to the minimum: steps of an optimizer, by default of the secant method."""

import itertools as it
import warnings
from operator import itemgetter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from .._estimators.base import AbstractEstimator
from .._estimators.radii_estimator import RadiiEstimator
from .._workers import core_count, on_threads, Report, run_interruptibly
from .objectives import FramePairLoss, Objective
from .sample import Window


# Radii have settled if they agree within so much, relatively, at so many successive steps.
_SETTLED, _SETTLED_STEPS = 2e-3, 4
_FIRST_STEP, _LONGEST_STEP, _LARGEST_GROWTH = 0.3, 1.0, 2.0
# A radius above this share of its bound is at its bound.
_AT_BOUND = 0.98
# The step in a parameter, nearly relative in the radius, for the second derivative.
_CURVATURE_STEP = 0.05
# Fewer gradients do not show how they scatter; more parameters cost too much.
_FEWEST_GRADIENTS, _MOST_PARAMETERS = 8, 32

# All that is learned of an estimator, as one vector.
Point = Float[Array, " numbers"]


class Problem:
    """The loss of each window as a function of a point."""

    def __init__(
        self, estimator: AbstractEstimator, objective: Objective, windows: list[Window]
    ):
        # Other threads may have another configuration of JAX, and would convert NumPy
        # arrays to other dtypes.
        estimator, objective = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf,
            (estimator, objective),
        )
        self._estimator, self.objective, self.windows = estimator, objective, windows
        self.start, _ = ravel_pytree(eqx.filter(estimator, eqx.is_inexact_array))
        has_radii = isinstance(estimator, RadiiEstimator)
        self.units = estimator.radius_units if has_radii else ("",)
        self.bounds = estimator.max_radii if has_radii else (np.inf,)
        self.mean_loss = eqx.Partial(_mean_loss, estimator, objective, windows)
        # With the configuration of this thread. Without jax.jit, loops would be unrolled.
        with jax.disable_jit(False):
            compilable: Any = eqx.filter_jit(_value_and_gradient)
            lowered = compilable.lower(self.start, estimator, objective, windows[0])
        self._program = run_interruptibly(lowered.compile)

    def estimator_at(self, point: Point) -> Any:
        return _estimator_at(point, self._estimator)

    def losses_and_gradients(self, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each window, `(windows,)`, and its gradient, `(windows, numbers)`;
        Ctrl-C raises `KeyboardInterrupt` at once, and windows in flight are dropped."""

        def evaluate(index: int) -> tuple[int, float, np.ndarray]:
            window = self.windows[index]
            loss, gradient = self._program(point, self._estimator, self.objective, window)
            return index, float(loss), np.asarray(gradient, np.float64)

        indices = range(len(self.windows))
        done = sorted(on_threads(evaluate, indices, core_count()), key=itemgetter(0))
        _, losses, gradients = zip(*done, strict=True)
        return np.array(losses), np.stack(gradients)

    def radii_at(self, point: Point) -> Float[Array, "channels axes"]:
        """The radii, or for an estimator without radii its parameters in one row."""
        estimator = self.estimator_at(point)
        return estimator.radii if isinstance(estimator, RadiiEstimator) else point[None]

    def is_at_bound(self, point: Point) -> Bool[np.ndarray, "channels axes"]:
        return np.asarray(self.radii_at(point)) > _AT_BOUND * np.array(self.bounds)

    def standard_deviations(self, point: Point) -> Float[np.ndarray, "channels axes"]:
        """The uncertainty of the radii. The parameters at which a mean of independent
        losses is minimal have the covariance `H^-1 S H^-1`, where `S` is that of the mean's
        gradient, from the scatter of the losses' gradients, and `H` its derivative (Huber,
        Proc. 5th Berkeley Symp. 1, 221, 1967)."""
        jacobian = np.asarray(jax.jacobian(self.radii_at)(point), np.float64)
        unknown = np.full(jacobian.shape[:-1], np.nan)
        if point.size > _MOST_PARAMETERS:
            return unknown
        gradients = self._independent_gradients(point)
        if len(gradients) < _FEWEST_GRADIENTS:
            return unknown
        scatter = np.atleast_2d(np.cov(gradients, rowvar=False)) / len(gradients)
        steps = _CURVATURE_STEP * jnp.eye(point.size, dtype=point.dtype)
        curvature = np.stack(
            [self._mean_gradient(point + s) - self._mean_gradient(point - s) for s in steps]
        )
        curvature = (curvature + curvature.T) / (4 * _CURVATURE_STEP)
        # A frozen parameter has no gradient, and no learned radius depends on it.
        is_learned = jacobian[..., gradients.any(axis=0)].any(axis=-1)
        is_curved = np.diag(curvature) > 0
        slopes, kept = jacobian[..., is_curved], np.ix_(is_curved, is_curved)
        slopes = slopes @ np.linalg.pinv(curvature[kept])
        stds = np.sqrt(np.einsum("cai,ij,caj->ca", slopes, scatter[kept], slopes))
        is_flat = jacobian[..., ~is_curved].any(axis=-1)
        return np.where(is_learned, np.where(is_flat, np.inf, stds), np.nan)

    def _mean_gradient(self, point: Point) -> np.ndarray:
        return self.losses_and_gradients(point)[1].mean(axis=0)

    def _independent_gradients(self, point: Point) -> np.ndarray:
        """Gradients whose scatter is that of their mean, `(blocks, numbers)`: of the blocks
        of a FramePairLoss, else of the windows."""
        if not isinstance(self.objective, FramePairLoss):
            return self.losses_and_gradients(point)[1]
        arguments = _block_gradients, point, self._estimator, self.objective
        gradients = [run_interruptibly(*arguments, window) for window in self.windows]
        return np.concatenate(gradients).astype(np.float64)


def _estimator_at(point: Point, estimator: AbstractEstimator) -> AbstractEstimator:
    learned, rest = eqx.partition(estimator, eqx.is_inexact_array)
    return eqx.combine(ravel_pytree(learned)[1](point), rest)


@eqx.filter_jit
def _block_gradients(
    point: Point, estimator: AbstractEstimator, objective: FramePairLoss, window: Window
) -> Float[Array, "blocks numbers"]:
    def losses(point: Point) -> Array:
        return objective.independent_losses(_estimator_at(point, estimator), *window)

    return jax.jacfwd(losses)(point)


def _value_and_gradient(
    point: Point, estimator: AbstractEstimator, objective: Objective, window: Window
) -> tuple[Array, Point]:
    def loss(point: Point) -> Any:
        return objective(_estimator_at(point, estimator), *window)

    return jax.value_and_grad(loss)(point)


def _mean_loss(
    estimator: AbstractEstimator, objective: Objective, windows: list[Window], point: Point
) -> Float[Array, ""]:
    """The loss of all windows in one program, for optimizers that search along a line."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *windows)
    moved = _estimator_at(point, estimator)
    return jnp.mean(lax.map(lambda window: objective(moved, *window), stacked))


def secant_descent() -> optax.GradientTransformation:
    """Newton's steps along each number, with the curvature from the last two gradients.

    Where the loss does not curve upwards, or where Newton's step would be long, it follows
    the sign of the gradient, with steps that grow until they have passed a minimum.
    """

    def init(params: Any) -> tuple[Array, Array, Array]:
        # The length of the last step, the gradient before it, and whether that has turned.
        return jnp.full_like(params, _FIRST_STEP), 0 * params, jnp.zeros_like(params, bool)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradient, (length, before, has_turned) = updates, state
        has_turned |= gradient * before < 0
        is_first = before == 0
        # The last step went against the sign of the gradient before.
        curvature = (gradient - before) / jnp.where(is_first, 1, -jnp.sign(before) * length)
        is_curved = ~is_first & (curvature > 0)
        growth = jnp.where(is_first | (has_turned & ~is_curved), 1.0, _LARGEST_GROWTH)
        limit = jnp.minimum(growth * length, _LONGEST_STEP)
        newton = jnp.abs(gradient) / jnp.where(is_curved, curvature, 1)
        step = jnp.where(is_curved, jnp.minimum(newton, limit), limit)
        length = jnp.where(gradient == 0, length, step)
        return -jnp.sign(gradient) * length, (length, gradient, has_turned)

    return optax.GradientTransformation(init, update)


class Visit(NamedTuple):
    """A point, its loss and radii, and all its numbers but those that go to infinity."""

    point: Point
    loss: float
    radii: Float[np.ndarray, "channels axes"]
    numbers: Float[np.ndarray, " numbers"]


def descend(
    problem: Problem, optimizer: optax.GradientTransformation, steps: int, report: Report
) -> tuple[list[Visit], bool, str]:
    """What the optimizer visits, whether its radii have settled, and why it ended."""
    visits: list[Visit] = []
    try:
        point, state = problem.start, optimizer.init(problem.start)
        update = eqx.filter_jit(optax.with_extra_args_support(optimizer).update)
        while True:
            losses, gradients = problem.losses_and_gradients(point)
            loss, gradient = float(losses.mean()), gradients.mean(axis=0)
            entries = gradient if visits else gradients.ravel()
            if not np.isfinite([loss, *entries]).all():
                place = "" if visits else "At the first radii "
                found = f"the loss is {loss:g}, its gradient {gradient.tolist()}"
                raise ValueError(f"{place}{found}; they must be finite.")
            if not (visits or gradients.any()):
                raise ValueError(
                    "There is nothing to learn: the loss does not depend on the radii; "
                    "are they frozen, or is the movie constant?"
                )
            radii = np.asarray(problem.radii_at(point))
            # At its bound, the parameter of a radius goes on to infinity.
            moving = 0 * point if problem.is_at_bound(point).any() else point
            visits.append(Visit(point, loss, radii, np.append(radii, moving)))
            pairs = zip(radii.ravel(), it.cycle(problem.units), strict=False)
            texts = [f"{radius:.3g} {unit}".strip() for radius, unit in pairs]
            report(len(visits), f"loss {loss:.4g}, radii {', '.join(texts)}")
            recent = np.stack([visit.numbers for visit in visits[-_SETTLED_STEPS:]])
            has_moved = np.ptp(recent, axis=0) > _SETTLED * np.abs(recent[-1])
            if len(recent) == _SETTLED_STEPS and not has_moved.any():
                return visits, True, f"the radii had settled after {len(visits)} steps"
            if len(visits) == steps:
                return visits, False, f"all {steps} steps were used up"
            gradient = jnp.asarray(gradient, point.dtype)
            # Optimizers that search along a line take the value and the function, too.
            extra = {"value": jnp.asarray(loss, point.dtype), "value_fn": problem.mean_loss}
            updates, state = update(gradient, state, point, grad=gradient, **extra)
            point = eqx.apply_updates(point, updates)
    except (KeyboardInterrupt, Exception) as error:
        if not visits:
            raise
        if isinstance(error, KeyboardInterrupt):
            return visits, False, f"interrupted after {len(visits)} steps"
        reason = f"at step {len(visits)}: {str(error).partition(chr(10))[0]}"
        text = f"Calibration stopped {reason}; the best radii before it are kept."
        warnings.warn(text, stacklevel=3)
        return visits, False, reason

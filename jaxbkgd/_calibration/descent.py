"""The way to the minimum: steps of an optimizer, by default of the secant method."""

import itertools as it
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._workers import Report
from .problem import MeanLoss, Problem


# Radii have settled if they agree within so much, relatively, at so many successive steps.
_SETTLED, _SETTLED_STEPS = 1e-3, 4
_FIRST_STEP, _LONGEST_STEP, _LARGEST_GROWTH = 0.3, 1.0, 2.0


class _SecantState(NamedTuple):
    """For each number: the length of the last step, the gradient before it, and whether
    the gradient has changed its sign so far."""

    length: PyTree
    gradient: PyTree
    has_turned: PyTree


def secant_descent() -> optax.GradientTransformation:
    """Newton's steps along each number, with the curvature from the last two gradients.

    Where the loss does not curve upwards, or where Newton's step would be long, it follows
    the sign of the gradient, with steps that grow until they have passed a minimum. It is
    for few numbers that hardly depend on each other, such as the logarithms of radii, and
    for gradients without noise.
    """

    def init(params: PyTree) -> _SecantState:
        return _SecantState(
            length=jax.tree.map(lambda number: jnp.full_like(number, _FIRST_STEP), params),
            gradient=jax.tree.map(jnp.zeros_like, params),
            has_turned=jax.tree.map(lambda number: jnp.zeros_like(number, bool), params),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, _SecantState]:
        del params
        has_turned = jax.tree.map(
            lambda gradient, before, has_turned: has_turned | (gradient * before < 0),
            updates,
            state.gradient,
            state.has_turned,
        )
        lengths = jax.tree.map(
            _next_length, updates, state.gradient, state.length, has_turned
        )
        steps = jax.tree.map(
            lambda gradient, length: -jnp.sign(gradient) * length, updates, lengths
        )
        return steps, _SecantState(lengths, updates, has_turned)

    return optax.GradientTransformation(init, update)


def _next_length(gradient: Array, before: Array, length: Array, has_turned: Array) -> Array:
    """The length of the next step, from this gradient and the one before, between which
    the last step went."""
    is_first = before == 0
    # The last step went against the sign of the gradient before.
    curvature = (gradient - before) / jnp.where(is_first, 1, -jnp.sign(before) * length)
    is_curved = ~is_first & (curvature > 0)
    growth = jnp.where(is_first | (has_turned & ~is_curved), 1.0, _LARGEST_GROWTH)
    limit = jnp.minimum(growth * length, _LONGEST_STEP)
    newton = jnp.abs(gradient) / jnp.where(is_curved, curvature, 1)
    step = jnp.where(is_curved, jnp.minimum(newton, limit), limit)
    return jnp.where(gradient == 0, length, step)


class Visit(NamedTuple):
    """A point, its loss and radii, and all its numbers."""

    point: PyTree
    loss: float
    radii: Float[np.ndarray, "channels axes"]
    numbers: Float[np.ndarray, " numbers"]


class Path(NamedTuple):
    visits: list[Visit]
    is_converged: bool
    stop_reason: str


def descend(
    problem: Problem, optimizer: optax.GradientTransformation, steps: int, report: Report
) -> Path:
    """Follows the optimizer until the radii have settled or something stops it."""
    visits: list[Visit] = []
    try:
        for visit in it.islice(_visits(problem, optimizer), steps):
            visits.append(visit)
            units = it.cycle(problem.units)
            radii = [f"{r:.3g} {next(units)}".strip() for r in visit.radii.ravel()]
            report(len(visits), f"loss {visit.loss:.4g}, radii {', '.join(radii)}")
            if _have_settled([visit.radii for visit in visits]) and (
                # At its bound, the parameter of a radius goes on to infinity.
                problem.is_at_bound(visit.point).any()
                or _have_settled([visit.numbers for visit in visits])
            ):
                return Path(
                    visits, True, f"the radii had settled after {len(visits)} steps"
                )
        return Path(visits, False, f"all {steps} steps were used up")
    except KeyboardInterrupt:
        if not visits:
            raise
        return Path(visits, False, f"interrupted after {len(visits)} steps")
    except Exception as error:
        if not visits:
            raise
        first_line, *_ = [*str(error).splitlines(), ""]
        stop_reason = f"at step {len(visits)}: {first_line}"
        warnings.warn(
            f"Calibration stopped {stop_reason}; the best radii before it are kept.",
            stacklevel=3,
        )
        return Path(visits, False, stop_reason)


def _visits(problem: Problem, optimizer: optax.GradientTransformation) -> Iterator[Visit]:
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
        radii = np.asarray(problem.radii_at(point))
        yield Visit(point, loss, radii, np.asarray(ravel_pytree(point)[0]))
        point, state = _next_point(
            optimizer,
            unravel(jnp.asarray(gradient, flat.dtype)),
            state,
            point,
            jnp.asarray(loss, flat.dtype),
            problem.mean_loss,
        )


@eqx.filter_jit
def _next_point(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    point: PyTree,
    loss: Array,
    mean_loss: MeanLoss,
) -> tuple[PyTree, PyTree]:
    # The arguments of optimizers that search along a line, beside those of all.
    updates, state = optax.with_extra_args_support(optimizer).update(
        gradient, state, point, value=loss, grad=gradient, value_fn=mean_loss
    )
    return eqx.apply_updates(point, updates), state


def _have_settled(numbers: list[np.ndarray]) -> bool:
    recent = np.stack(numbers[-_SETTLED_STEPS:])
    moved = np.ptp(recent, axis=0)
    return len(recent) == _SETTLED_STEPS and bool(
        np.all(moved <= _SETTLED * np.abs(recent[-1]))
    )

"""The default optimizer of calibration: the secant method along each number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree


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
        updates: PyTree, state: _SecantState, params: PyTree = None
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

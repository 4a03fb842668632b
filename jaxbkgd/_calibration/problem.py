"""The loss of a movie as a function of what is learned, and its uncertainty."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._estimators.base import AbstractEstimator
from .._estimators.radii_estimator import RadiiEstimator
from .._workers import core_count, on_threads, run_interruptibly
from .objectives import block_losses, FramePairLoss, Objective
from .windows import Window


# A radius above this share of its bound is at its bound.
_AT_BOUND = 0.98
# The step in a parameter, nearly relative in the radius, for the second derivative.
_CURVATURE_STEP = 0.05
# Fewer gradients do not show how they scatter; more parameters cost too much.
_FEWEST_GRADIENTS, _MOST_PARAMETERS = 8, 32


class MeanLoss(eqx.Module):
    """The loss, averaged over windows, as a function of what is learned of an estimator."""

    rest: AbstractEstimator
    objective: Objective
    windows: list[Window]

    def __call__(self, point: PyTree) -> Float[Array, ""]:
        windows = jax.tree.map(lambda *parts: jnp.stack(parts), *self.windows)
        estimator = eqx.combine(point, self.rest)
        return jnp.mean(lax.map(lambda window: self.objective(estimator, *window), windows))


class Problem:
    """The loss of each window as a function of a point, what is learned of an estimator."""

    def __init__(
        self, estimator: AbstractEstimator, objective: Objective, windows: list[Window]
    ):
        self.objective = objective
        has_radii = isinstance(estimator, RadiiEstimator)
        # The unit of each column of the radii; none for an estimator without radii.
        self.units = estimator.radius_units if has_radii else ("",)
        self._windows = windows
        start, self._rest = eqx.partition(estimator, eqx.is_inexact_array)
        # Other threads may have another configuration of JAX, and convert NumPy arrays to
        # other dtypes.
        self.start, rest, objective = jax.tree.map(
            lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf,
            (start, self._rest, objective),
        )
        self._arguments = rest, objective
        self._value_and_gradient = _compile(
            _value_and_gradient, self.start, *self._arguments, windows[0]
        )
        self.mean_loss = MeanLoss(rest, objective, windows)

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

    def block_gradients(self, point: PyTree) -> Float[np.ndarray, "blocks numbers"]:
        """Gradients of blocks of frames that count as independent: in general of the
        windows."""
        if not isinstance(self.objective, FramePairLoss):
            return self.losses_and_gradients(point)[1]
        gradients = _compile(_block_gradients, point, *self._arguments, self._windows[0])

        def evaluate() -> list[np.ndarray]:
            return [
                np.asarray(gradients(point, *self._arguments, window), np.float64)
                for window in self._windows
            ]

        return np.concatenate(run_interruptibly(evaluate))

    def radii_at(self, point: PyTree) -> Float[Array, "channels axes"]:
        """The radii, or for an estimator without radii its parameters in one row."""
        estimator = self.estimator_at(point)
        if isinstance(estimator, RadiiEstimator):
            return estimator.radii
        return ravel_pytree(point)[0][None]

    def is_at_bound(self, point: PyTree) -> Bool[np.ndarray, "channels axes"]:
        estimator = self.estimator_at(point)
        bounds = estimator.max_radii if isinstance(estimator, RadiiEstimator) else np.inf
        return np.asarray(self.radii_at(point)) > _AT_BOUND * np.array(bounds)


def _compile(function: Any, *arguments: Any) -> Callable[..., Any]:
    """A program of what `eqx.filter_jit` gave, for arguments of these shapes and this
    thread's configuration of JAX. There is one for all calibrations that are alike."""
    # Without jax.jit, loops would be unrolled into the program.
    with jax.disable_jit(False):
        lowered = function.lower(*arguments)
    return run_interruptibly(lowered.compile)


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
    point: PyTree, rest: AbstractEstimator, objective: FramePairLoss, window: Window
) -> Float[Array, "blocks numbers"]:
    flat, unravel = ravel_pytree(point)

    def losses(flat: Array) -> Array:
        return block_losses(objective, eqx.combine(unravel(flat), rest), *window)

    return jax.jacfwd(losses)(flat)


def standard_deviations(
    problem: Problem, point: PyTree
) -> Float[np.ndarray, "channels axes"]:
    """The uncertainty of the radii, from the scatter of gradients between blocks of frames.

    The parameters at which a mean of independent losses is minimal have the covariance
    `H^-1 S H^-1`, where `S` is that of the mean's gradient and `H` its second derivative
    (Huber, Proc. 5th Berkeley Symp. 1, 221, 1967).
    """
    flat, unravel = ravel_pytree(point)

    def radii(flat: Array) -> Array:
        return problem.radii_at(unravel(flat))

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

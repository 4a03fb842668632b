"""The base of estimators that learn averaging radii: SpatialMean and LocalMean."""

import abc
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .background import Background
from .base import AbstractEstimator
from .checks import is_traced
from .radii import bounded_radii, rows_of_channels
from .saved import with_fields


_Estimator = TypeVar("_Estimator", bound="RadiiEstimator")


class RadiiEstimator(AbstractEstimator):
    """An estimator whose radii are learned, one row a channel or one for all, and stored as
    `logit(radius / bound)`. The bound sets the number of taps where the radii are traced;
    elsewhere the radii do."""

    radius_units: ClassVar[tuple[str, ...]] = ("px", "px")

    unbounded_radii: Float[Array, "channels axes"]
    frozen: tuple[tuple[bool, ...], ...] = eqx.field(static=True)
    # Those of the radii, a tuple for each row, if they are fixed for inference.
    kernels: tuple[Any, ...] | None = eqx.field(static=True)

    @property
    @abc.abstractmethod
    def max_radii(self) -> tuple[float, ...]:
        """The bound of the radius along each axis."""

    @abc.abstractmethod
    def _kernels_for(self, radii: Sequence[float], *, is_bound: bool) -> Any:
        """The kernels of one channel for such radii, or for all that are smaller."""

    @abc.abstractmethod
    def _estimate_channel(self, *arguments: Any, **options: Any) -> Background:
        """The background of one stack, with `radii=` (axes,) and `kernels=` for them."""

    @property
    def radii(self) -> Float[Array, "channels axes"]:
        """The averaging radii, a row a channel; one row serves all."""
        frozen = self.frozen if self.kernels is None else True
        return bounded_radii(self.unbounded_radii, self.max_radii, frozen)

    def for_inference(self: _Estimator) -> _Estimator:
        """The same with fixed radii: it has taps for these and no others, also where it is
        compiled. `ValueError` where the radii are traced."""
        if not is_traced(self.unbounded_radii):
            return with_fields(self, kernels=self._concrete_kernels())
        if self.kernels is not None:
            return self
        raise ValueError(
            "for_inference() needs known radii, but they are traced; call it outside of "
            "jax.jit and jax.grad, or use the estimator itself."
        )

    def estimate_stack(self, frames: Any, **options: Any) -> Background:
        """The background of one stack; see `__call__`."""
        (estimate,) = self._stack_functions(1)
        return estimate(frames, **options)

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        return [
            ft.partial(self._estimate_channel, radii=row, kernels=of_row)
            for row, of_row in self._rows(count)
        ]

    def _rows(self, count: int) -> list[tuple[Float[Array, " axes"], Any]]:
        """The radii and kernels of each channel."""
        # Folded into constants as XLA compiles, the radii would be rounded differently.
        radii = rows_of_channels(lax.optimization_barrier(self.radii), count)
        kernels = rows_of_channels(self._kernels_in_use(), count)
        return list(zip(radii, kernels, strict=True))

    def _kernels_in_use(self) -> tuple[Any, ...]:
        if self.kernels is not None:
            return self.kernels
        is_learned = is_traced(self.unbounded_radii)
        return self._bounded_kernels() if is_learned else self._concrete_kernels()

    def _bounded_kernels(self) -> tuple[Any, ...]:
        return (self._kernels_for(self.max_radii, is_bound=True),)

    def _concrete_kernels(self) -> tuple[Any, ...]:
        with jax.ensure_compile_time_eval():
            rows = np.asarray(self.radii, np.float64)
        if not np.all(np.isfinite(rows)):
            return self._bounded_kernels()
        return tuple(self._kernels_for(row, is_bound=False) for row in rows.tolist())

    def _saved_fields(self) -> dict[str, Any]:
        fields = super()._saved_fields()
        # Where y and x share a radius, one number is saved for both.
        pix_axes = 2 - (len(self.max_radii) - self.unbounded_radii.shape[1])
        fields["radii_pix"] = tuple(row[:pix_axes] for row in fields["radii_pix"])
        return fields

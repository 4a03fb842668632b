"""Estimators one after another: the pipeline of `smlmlp.bkgd_combination`."""

import functools as ft
import operator
from typing import Any

import jax

from .background import Background
from .base import AbstractEstimator
from .channels import Channels
from .local_mean import LocalMean


class Chained(AbstractEstimator):
    """Estimators one after another, each of what those before it have left.

    Their backgrounds add up, and their noise corrections are multiplied. The product is
    exact where each but the last leaves noise that is independent from pixel to pixel, as
    [`jaxbkgd.TemporalMedian`][] does.

    smlmlp's default pipeline, `bkgd_combination`:

    !!! example

        ```python
        >>> import jax.numpy as jnp
        >>> import jaxbkgd
        >>> estimator = jaxbkgd.Chained(
        ...     jaxbkgd.TemporalMedian(25, noise="unit"),
        ...     jaxbkgd.SpatialMean(7.0, truncation="hard", noise="separable"),
        ... )
        >>> background = estimator(jnp.full((60, 64, 64), 100.0))
        >>> background.bkgds.shape, round(float(background.noise_corrections), 3)
        ((60, 64, 64), 0.853)

        ```

    **Attributes:**

    - `estimators`: in their order.
    """

    estimators: tuple[AbstractEstimator, ...]

    def __init__(self, *estimators: AbstractEstimator):
        """**Arguments:**

        - `estimators`: one or more, the first of which sees the frames themselves.

        **Raises:**

        `ValueError` for none, or for a [`jaxbkgd.LocalMean`][] with an illumination after
        another estimator: what that has left is not proportional to the light.
        `TypeError` for one that is no estimator.
        """
        if not estimators:
            raise ValueError("There is no estimator to chain; give one or more.")
        for estimator in estimators:
            if not isinstance(estimator, AbstractEstimator):
                raise TypeError(
                    f"An estimator must be an AbstractEstimator, but is {estimator!r}; "
                    "give each as an argument of its own."
                )
        for estimator in estimators[1:]:
            if isinstance(estimator, LocalMean) and estimator.illumination_rank:
                raise ValueError(
                    f"LocalMean has illumination_rank={estimator.illumination_rank}, but "
                    "what an estimator before it has left is not proportional to the "
                    "light; give illumination_rank=0."
                )
        self.estimators = estimators

    @property
    def halo_frames(self) -> int:
        """The sum of theirs: what one leaves must be known as far as the next one sees."""
        return sum(estimator.halo_frames for estimator in self.estimators)

    def __call__(
        self, channels: Channels, weights: Any = None, *, donated: Any = None
    ) -> Background:
        """See [`jaxbkgd.AbstractEstimator`][]; a chain takes no weights."""
        if weights is not None or donated is not None:
            raise TypeError("Chained takes no weights, and no donated backgrounds.")
        backgrounds = []
        for estimator in self.estimators:
            backgrounds.append(estimator(channels))
            channels = backgrounds[-1].residuals(channels)
        bkgds = [background.bkgds for background in backgrounds]
        factors = [background.noise_corrections for background in backgrounds]
        return Background(
            jax.tree.map(lambda *terms: ft.reduce(operator.add, terms), *bkgds),
            jax.tree.map(lambda *terms: ft.reduce(operator.mul, terms), *factors),
        )

    def for_inference(self) -> "Chained":
        """The chain of its estimators' forms for inference."""
        return Chained(*(estimator.for_inference() for estimator in self.estimators))

    @classmethod
    def _restored(cls, fields: dict[str, Any]) -> "Chained":
        return cls(*fields["estimators"])

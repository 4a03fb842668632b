"""Estimators one after another: the pipeline of `smlmlp.bkgd_combination`."""

import functools as ft
import math
from collections.abc import Callable, Sequence

import equinox as eqx
from jaxtyping import Array, Shaped

from .background import Background
from .base import AbstractEstimator
from .local_mean import LocalMean


class Chained(AbstractEstimator):
    """Estimators one after another, each on the residuals of those before it.

    Their backgrounds are added and their noise corrections multiplied. This is exact if
    each but the last leaves noise that is independent from pixel to pixel, as
    [`jaxbkgd.TemporalMedian`][] does. smlmlp's default pipeline, `bkgd_combination`, is

    ```python
    >>> from jaxbkgd import Chained, SpatialMean, TemporalMedian
    >>> mean = SpatialMean(7.0, truncation="hard", noise="separable")
    >>> estimator = Chained(TemporalMedian(25, noise="unit"), mean)

    ```
    """

    estimators: tuple[AbstractEstimator, ...]

    def __init__(self, *estimators: AbstractEstimator):
        """**Arguments:**

        - `estimators`: one or more, the first of which sees the frames themselves.

        **Raises:** `TypeError` for anything but estimators, and `ValueError` for a
        [`jaxbkgd.LocalMean`][] with an illumination after another estimator, whose
        residuals are not proportional to the light.
        """
        if not (estimators and all(isinstance(e, AbstractEstimator) for e in estimators)):
            rule = "Chained needs one AbstractEstimator or more, each as an argument"
            raise TypeError(f"{rule}, but was given {estimators!r}.")
        for estimator in estimators[1:]:
            if isinstance(estimator, LocalMean) and estimator.illumination_rank:
                raise ValueError(
                    f"LocalMean has illumination_rank={estimator.illumination_rank}, but "
                    "what an estimator before it has left is not proportional to the "
                    "light; give illumination_rank=0."
                )
        self.estimators = estimators

    @property
    def learns_patterns(self) -> bool:
        return any(estimator.learns_patterns for estimator in self.estimators)

    @property
    def aligned_frames(self) -> int:
        """A common multiple of those of all."""
        return math.lcm(*(estimator.aligned_frames for estimator in self.estimators))

    @property
    def halo_frames(self) -> int:
        """The sum of theirs, since each needs the residuals of the previous one."""
        return sum(estimator.halo_frames for estimator in self.estimators)

    def estimate_stack(self, frames: Shaped[Array, "*batch height width"]) -> Background:
        """The background of one stack; see `__call__`."""
        (estimate,) = self._stack_functions(1)
        return estimate(frames)

    def _stack_functions(self, count: int) -> list[Callable[..., Background]]:
        steps = [estimator._stack_functions(count) for estimator in self.estimators]
        return [
            ft.partial(_estimate_chained, of_one) for of_one in zip(*steps, strict=True)
        ]

    def for_inference(self) -> "Chained":
        """The chain of its estimators' forms for inference."""
        return Chained(*(estimator.for_inference() for estimator in self.estimators))


def _estimate_chained(
    steps: Sequence[Callable[..., Background]], frames: Shaped[Array, "..."]
) -> Background:
    backgrounds = []
    for estimate in steps:
        backgrounds.append(estimate(frames))
        frames = backgrounds[-1].residuals(frames)
    bkgds = sum(background.bkgds for background in backgrounds)
    *before, correction = (background.noise_corrections for background in backgrounds)
    before = math.prod(before)
    noise = backgrounds[-1].noise
    if noise is not None:
        noise = eqx.tree_at(lambda n: n.deviation, noise, before * noise.deviation)
    return Background(bkgds, before * correction, noise=noise)

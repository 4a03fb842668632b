"""What an estimator does to frames, in one compiled program for all of its radii."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._estimators.base import AbstractEstimator
from .._estimators.residual_noise import ResidualNoise
from .._estimators.smoothing import ratio
from .prediction_error import prediction_errors, REGION_PIX, region_sums


# Molecules leave more of the pixels of a region; where less is left, the light has changed.
_LEAST_LEFT = 0.2
# Twice the standard deviation of the image of a molecule, where the estimator has none.
_MOLECULE_RADIUS_PIX = 2.6


class Evaluation(NamedTuple):
    """Of one channel.

    **Attributes:**

    - `squares`, `variance`: the squared error in each block of frames, and the variance of
        the noise of a frame; see `prediction_errors`.
    - `level`: the mean background.
    - `bkgds`, `light`: of each frame.
    - `excess`, `counts`: what frames have above the background on average in regions of
        the field, and how many pixels this is the mean of.
    - `clipped_share`: of all pixels.
    - `bkgd_noise`: how the background averages noise, where that is known.
    """

    squares: Float[Array, " blocks"]
    variance: Float[Array, ""]
    level: Float[Array, ""]
    bkgds: Float[Array, "frames height width"]
    light: Float[Array, " frames"]
    excess: Float[Array, "frames rows columns"]
    counts: Float[Array, "frames rows columns"]
    clipped_share: Float[Array, ""]
    bkgd_noise: ResidualNoise | None

    @property
    def noise_share(self) -> float:
        """The variance of the background over that of the noise of frames, or 0."""
        if self.bkgd_noise is None:
            return 0.0
        return float(self.bkgd_noise.bkgd_variance(self.bkgds.shape))


@eqx.filter_jit
def evaluate(
    estimator: AbstractEstimator,
    channels: Sequence[Shaped[Array, "frames height width"]],
    lag: int,
) -> list[Evaluation]:
    """Pixels that are not finite do not count, if the estimator leaves them out."""
    radius_pix = estimator.molecule_radius_pix or _MOLECULE_RADIUS_PIX
    errors, background = prediction_errors(estimator, list(channels), lag, radius_pix)
    noises = background.noise or [None] * len(channels)
    images = channels, errors, background.bkgds, background.illumination, noises
    evaluations = []
    for frames, error, bkgds, light, noise in zip(*images, strict=True):
        is_number = jnp.isfinite(frames)
        residuals = jnp.where(is_number, frames - bkgds, 0)
        shares = region_sums(error.weights) / region_sums(is_number + 1e-9)
        is_changed = jnp.repeat(
            jnp.repeat(shares < _LEAST_LEFT, REGION_PIX, 1), REGION_PIX, 2
        )
        height, width = frames.shape[1:]
        weights = jnp.where(is_changed[:, :height, :width], is_number, error.weights)
        counts = region_sums(weights)
        # Dark frames, in which nothing counts, are not covered by molecules.
        is_lit = is_number & (error.weights > 0).any((1, 2), keepdims=True)
        evaluation = Evaluation(
            error.squares,
            error.variance,
            jnp.nanmean(bkgds),
            bkgds,
            light,
            ratio(region_sums(weights * residuals), counts),
            counts,
            1 - jnp.sum(error.weights) / jnp.sum(is_lit),
            noise,
        )
        evaluations.append(evaluation)
    return evaluations

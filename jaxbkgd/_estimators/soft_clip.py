"""Soft weights that leave molecules out of a mean."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._filter.correlation import pad
from .._filter.kernels import Image
from .checks import checked_count, checked_number, is_traced


# No pixel weighs less, so that a mean always has something to be the mean of.
_LEAST_WEIGHT = 1e-3

# A threshold or a softness in deviations; beyond these limits weights say nothing.
_SMALLEST, _LARGEST = 0.01, 100.0


class SoftClip(eqx.Module):
    """Weights from 0 to 1 that leave molecules out of [`jaxbkgd.LocalMean`][].

    A pixel's weight is `sigmoid((threshold - z) / softness)`. Here z is the mean of its
    surroundings above the background, in standard deviations of the noise, under a Gaussian
    as wide as the image of a molecule (the matched filter). The pixel itself is left out.
    Its weight therefore does not depend on its own noise, and the mean of pure noise is not
    shifted.

    The noise is first measured in the frames (Immerkaer, Comput. Vis. Image Underst. 64,
    300, 1996), and then, in each round, by the pixels below the background. Neither gain
    nor offset matters, and noise may be correlated from pixel to pixel.

    Threshold and softness are learnable: they are one inexact array, `log_parameters`.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> estimator = jaxbkgd.LocalMean(7.0, clip=jaxbkgd.SoftClip(2.5))
        >>> round(float(estimator.clip.threshold), 3)
        2.5

        ```
    """

    log_parameters: Float[Array, "2"]
    rounds: int = eqx.field(static=True)
    molecule_radius_pix: float = eqx.field(static=True)

    def __init__(
        self,
        threshold: Any = 3.0,
        softness: Any = 0.3,
        *,
        rounds: int = 3,
        molecule_radius_pix: float = 2.6,
    ):
        """**Arguments:**

        - `threshold`: where a weight is one half, in standard deviations of the noise.
        - `softness`: over how many deviations weights fall off.
        - `rounds`: how often weights are computed from the background of the previous
            round. All but the last round use pixels of twice the size, at a quarter of the
            cost.
        - `molecule_radius_pix`: twice the standard deviation of the image of a molecule,
            in pixels.

        **Raises:**

        `TypeError` or `ValueError` for anything else than positive, finite numbers, a
        threshold or softness outside of 0.01 to 100, and rounds that are not whole.
        """
        self.rounds = checked_count(
            "rounds", rounds, remedy="to clip nothing, give LocalMean clip=None"
        )
        limits = {"minimum": _SMALLEST, "includes_minimum": True, "maximum": _LARGEST}
        unit = "deviations of the noise"
        for name, value in (("threshold", threshold), ("softness", softness)):
            if not is_traced(value):
                checked_number(name, value, unit=unit, **limits)
        self.log_parameters = jnp.log(
            jnp.stack([jnp.asarray(threshold, float), jnp.asarray(softness, float)])
        )
        self.molecule_radius_pix = checked_number(
            "molecule_radius_pix", molecule_radius_pix
        )

    @property
    def threshold(self) -> Float[Array, ""]:
        """Where a weight is one half, in standard deviations of the noise."""
        return self._parameters[0]

    @property
    def softness(self) -> Float[Array, ""]:
        """Over how many deviations weights fall off."""
        return self._parameters[1]

    @property
    def _parameters(self) -> Float[Array, "2"]:
        logs = jnp.clip(self.log_parameters, math.log(_SMALLEST), math.log(_LARGEST))
        # Again, since what was rounded may be beyond.
        return jnp.clip(jnp.exp(logs), _SMALLEST, _LARGEST)

    def weights(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """The weights of pixels, from 0 to 1, with surroundings of z deviations."""
        share = jax.nn.sigmoid((self.threshold - z) / self.softness)
        return _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * share


def squared_noise(frames: Image) -> Image:
    """The squared noise in each pixel of frames of 3 x 3 pixels or more, whose mean is its
    variance: the second difference along y of that along x, which is blind to what is
    smooth, and nearly so to molecules (Immerkaer; see `SoftClip`)."""
    for axis in (-2, -1):
        # An edge pixel has that of the one next to it.
        frames = pad(jnp.diff(frames, 2, axis), (1, 1), axis, "edge")
    return frames**2 / 36

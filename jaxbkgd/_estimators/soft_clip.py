"""Soft weights that leave molecules out of a mean."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._filter.kernels import GaussianKernel, half_width
from .._filter.primitive import separable_filter
from .checks import checked_count, checked_number, checked_numbers, is_known, is_traced


# No pixel weighs less, so that a mean always has something to be the mean of.
_LEAST_WEIGHT = 1e-3

# A threshold or a softness in deviations; beyond these limits weights say nothing.
_SMALLEST, _LARGEST = 0.01, 100.0

# Where a normal deviation is integrated over: the weights are smooth on this scale for
# all softnesses above 0.02.
_DEVIATIONS = np.linspace(-9.0, 9.0, 1801)
_DENSITY = np.exp(-(_DEVIATIONS**2) / 2)


class SoftClip(eqx.Module):
    """Weights from 0 to 1 that leave molecules out of [`jaxbkgd.LocalMean`][].

    A pixel's weight is `sigmoid((threshold - z) / softness)`, in which z is what its
    surroundings have above the background, in standard deviations of the noise expected
    there: frames are first averaged under a Gaussian as wide as the image of a molecule,
    which is what shows molecules best (the matched filter).

    Weights that depend on the noise shift the mean, on pure noise too. By how much is
    known: z and a pixel's own noise are normal and correlated, so that the mean is off by
    `E[w z] / E[w]` deviations times the correlation. It is subtracted.

    Threshold and softness are learnable: they are one inexact array, `log_parameters`.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> clip = jaxbkgd.SoftClip(2.5, gains=0.46, read_noise_electrons=1.5)
        >>> estimator = jaxbkgd.LocalMean(7.0, 10.0, clip=clip)
        >>> round(float(estimator.clip.threshold), 3)
        2.5

        ```
    """

    log_parameters: Float[Array, "2"]
    rounds: int = eqx.field(static=True)
    molecule_radius_pix: float = eqx.field(static=True)
    gains: tuple[float, ...] | None = eqx.field(static=True)
    read_noise_electrons: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        threshold: Any = 3.0,
        softness: Any = 0.3,
        *,
        rounds: int = 2,
        molecule_radius_pix: float = 2.6,
        gains: Any = None,
        read_noise_electrons: Any = 0.0,
    ):
        """**Arguments:**

        - `threshold`: where a weight is one half, in standard deviations of the noise.
        - `softness`: over how many deviations weights fall off.
        - `rounds`: how often weights are worked out from the background of the round
            before. All but the last round are done with pixels of twice the size, which
            costs a quarter.
        - `molecule_radius_pix`: twice the standard deviation of the image of a molecule,
            in pixels.
        - `gains`: electrons per ADU, a number for all channels or one for each. Then the
            noise is the photon noise of the background, which needs frames above the
            camera's offset. By default it is measured in the frames (Immerkaer, Comput.
            Vis. Image Underst. 64, 300, 1996), and neither gain nor offset matter.
        - `read_noise_electrons`: of the camera, a standard deviation, beside `gains`; a
            number for all channels or one for each.

        **Raises:**

        `TypeError` or `ValueError` for anything else than positive, finite numbers
        (`read_noise_electrons` may be zero), a threshold or softness outside of 0.01 to
        100, rounds that are not whole, and a read noise without gains.
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
        self.gains = None if gains is None else checked_numbers("gains", gains)
        self.read_noise_electrons = checked_numbers(
            "read_noise_electrons", read_noise_electrons, includes_minimum=True
        )
        if gains is None and any(self.read_noise_electrons):
            raise ValueError(
                f"read_noise_electrons is {read_noise_electrons!r}, and needs gains; "
                "without these, all noise is measured in the frames."
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

    def cameras(self, count: int) -> Sequence[tuple[float, float] | None]:
        """Gain in electrons per ADU and read noise in electrons of each of `count`
        channels, or `None` for each if the noise is measured."""
        if self.gains is None:
            return [None] * count
        columns = {"gains": self.gains, "read_noise_electrons": self.read_noise_electrons}
        for name, numbers in columns.items():
            if len(numbers) not in (1, count):
                raise ValueError(
                    f"There are {count} channels, but {len(numbers)} {name}; give a number "
                    "for all, or one for each."
                )
            columns[name] = numbers * (count // len(numbers))
        return list(zip(*columns.values(), strict=True))

    def molecule_average(
        self, frames: Float[Array, "*batch height width"]
    ) -> Float[Array, "*batch height width"]:
        """The mean of the surroundings of each pixel, under a Gaussian as wide as the image
        of a molecule."""
        kernel = GaussianKernel(half_width(self.molecule_radius_pix, "smooth"), "smooth")
        radius = jnp.asarray(self.molecule_radius_pix, frames.dtype)
        return separable_filter(frames, [radius, radius], (kernel, kernel), is_finite=True)

    def average_response(
        self, height: Any, width: Any
    ) -> tuple[
        Float[np.ndarray | Array, "height width"], Float[np.ndarray | Array, "height width"]
    ]:
        """What `molecule_average` makes of white noise of deviation 1 in frames of a size:
        its correlation with a pixel's own noise, and its deviation. Both are larger at the
        edges, which are repeated."""
        kernel = GaussianKernel(half_width(self.molecule_radius_pix, "smooth"), "smooth")
        with jax.ensure_compile_time_eval():
            taps = np.asarray(kernel.taps(jnp.asarray(self.molecule_radius_pix)), float)
        lags = np.arange(-kernel.half_width, kernel.half_width + 1)
        taps = taps[abs(lags)]
        correlations, deviations = [], []
        for size in (height, width):
            xp = np if is_known(size) else jnp
            pixels = xp.arange(size)
            read = pixels[:, None] + lags
            inside = xp.where((read > 0) & (read < size - 1), taps, 0)
            # An edge pixel stands for all that would be beyond; a single pixel is both.
            first = xp.where((read <= 0) | (size == 1), taps, 0).sum(1)
            last = xp.where((read >= size - 1) & (size != 1), taps, 0).sum(1)
            deviation = xp.sqrt((inside**2).sum(1) + first**2 + last**2)
            own = xp.where((pixels > 0) & (pixels < size - 1), taps.max(), first)
            own = xp.where((pixels > 0) & (pixels == size - 1), last, own)
            correlations.append(own / deviation)
            deviations.append(deviation)
        correlation, deviation = (y[:, None] * x for y, x in (correlations, deviations))
        return correlation, deviation

    def weights(
        self,
        average: Float[Array, "*batch height width"],
        bkgd: Float[Array, "*batch height width"],
        variance: Float[Array, "..."],
        deviations: Float[Array | np.ndarray, "..."],
    ) -> Float[Array, "*batch height width"]:
        """The weights of pixels, from 0 to 1.

        **Arguments:**

        - `average`: frames, from `molecule_average`.
        - `bkgd`: their background.
        - `variance`: of the noise of a pixel.
        - `deviations`: of the average of white noise, from `average_response`.
        """
        return self._weights_of((average - bkgd) / (deviations * jnp.sqrt(variance)))

    def noise_bias(self) -> Float[Array, ""]:
        """The shift of the weighted mean of pure noise, in deviations of a pixel, if a
        pixel's weight depends on that pixel alone."""
        dtype = self.log_parameters.dtype
        deviations = jnp.asarray(_DEVIATIONS, dtype)
        weights = self._weights_of(deviations) * jnp.asarray(_DENSITY, dtype)
        return jnp.sum(weights * deviations) / jnp.sum(weights)

    def _weights_of(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        share = jax.nn.sigmoid((self.threshold - z) / self.softness)
        return _LEAST_WEIGHT + (1 - _LEAST_WEIGHT) * share


def photon_variance(
    bkgd: Float[Array, "*batch height width"], camera: tuple[Any, Any]
) -> Float[Array, "*batch height width"]:
    """The variance in ADU² of a background in ADU, of photons and of reading out."""
    gain, read_noise_electrons = camera
    return jnp.maximum(bkgd, 0) / gain + (read_noise_electrons / gain) ** 2


def squared_noise(
    frames: Float[Array, "*batch height width"],
) -> Float[Array, "*batch height width"]:
    """The squared noise in each pixel, whose mean is its variance.

    The second difference along y of that along x, which is blind to what is smooth, and to
    molecules nearly so (Immerkaer, Comput. Vis. Image Underst. 64, 300, 1996). Frames must
    have 3 pixels or more in height and width.
    """
    for axis in (-2, -1):
        widths = [(0, 0)] * frames.ndim
        widths[axis] = (1, 1)
        # An edge pixel has that of the one next to it.
        frames = jnp.pad(jnp.diff(frames, 2, axis), widths, "edge")
    return frames**2 / 36

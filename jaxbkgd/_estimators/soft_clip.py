"""Soft weights that leave molecules out of a mean."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .._filter.kernels import GaussianKernel, half_width
from .._filter.primitive import separable_filter


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
        is_count = isinstance(rounds, int | np.integer) and not isinstance(rounds, bool)
        if not is_count or rounds < 1:
            raise ValueError(
                f"rounds must be a whole number from 1 on, but is {rounds!r}; to clip "
                "nothing, give LocalMean clip=None."
            )
        for name, value in (("threshold", threshold), ("softness", softness)):
            if isinstance(value, Tracer):
                continue
            number = _number(name, value)
            if not _SMALLEST <= number <= _LARGEST:
                raise ValueError(
                    f"{name} must be from {_SMALLEST} to {_LARGEST} deviations of the "
                    f"noise, but is {value!r}; 3 is usual for a threshold, 0.3 for a "
                    "softness."
                )
        radius = _number("molecule_radius_pix", molecule_radius_pix)
        self.log_parameters = jnp.log(jnp.stack([jnp.asarray(threshold, float), softness]))
        self.rounds = int(rounds)
        self.molecule_radius_pix = radius
        self.gains = None if gains is None else _numbers("gains", gains)
        self.read_noise_electrons = _numbers(
            "read_noise_electrons", read_noise_electrons, is_zero_allowed=True
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
        """Gain and read noise of each channel, if they are known."""
        if self.gains is None:
            return [None] * count
        values = []
        for name in ("gains", "read_noise_electrons"):
            numbers = getattr(self, name)
            if len(numbers) not in (1, count):
                raise ValueError(
                    f"There are {count} channels, but {len(numbers)} {name}; give a number "
                    "for all, or one for each."
                )
            values.append(numbers * (count // len(numbers)))
        return list(zip(*values, strict=True))

    def averaged(
        self, frames: Float[Array, "*batch height width"]
    ) -> Float[Array, "*batch height width"]:
        """The mean of each pixel's surroundings, as wide as a molecule."""
        kernel = GaussianKernel(half_width(self.molecule_radius_pix, "smooth"), "smooth")
        radius = jnp.asarray(self.molecule_radius_pix, frames.dtype)
        return separable_filter(frames, [radius, radius], (kernel, kernel), is_finite=True)

    def weights(
        self,
        averaged: Float[Array, "*batch height width"],
        bkgd: Float[Array, "*batch height width"],
        variance: Float[Array, "*#batch #height #width"],
        norms: Float[Array | np.ndarray, "height width"],
    ) -> Float[Array, "*batch height width"]:
        """**Arguments:**

        - `averaged`: frames averaged over the surroundings of each pixel.
        - `bkgd`: of the same frames.
        - `variance`: of the noise of a pixel.
        - `norms`: the deviation that averaging leaves of white noise, see `averaging`.
        """
        return self._weights_of((averaged - bkgd) / (norms * jnp.sqrt(variance)))

    def noise_bias(self) -> Float[Array, ""]:
        """By how much weights move the mean of pure noise, in deviations of a pixel, if
        what the weights are made from is that pixel alone."""
        dtype = self.log_parameters.dtype
        deviations = jnp.asarray(_DEVIATIONS, dtype)
        weights = self._weights_of(deviations) * jnp.asarray(_DENSITY, dtype)
        return jnp.sum(weights * deviations) / jnp.sum(weights)

    def averaging(
        self, height: int, width: int
    ) -> tuple[Float[np.ndarray, "height width"], Float[np.ndarray, "height width"]]:
        """Of averaging frames of a size: the share of each pixel's own noise in what it
        leaves, a correlation, and the deviation of that for noise of deviation 1. Both are
        larger at the edges, which are repeated."""
        kernel = GaussianKernel(half_width(self.molecule_radius_pix, "smooth"), "smooth")
        with jax.ensure_compile_time_eval():
            taps = np.asarray(kernel.taps(jnp.asarray(self.molecule_radius_pix)))
        reach = kernel.half_width
        row = np.concatenate([taps[:0:-1], taps]).astype(float)
        shares, norms = [], []
        for size in (height, width):
            # An axis that is longer has more of what lies in the middle.
            short = min(size, 2 * reach + 1)
            read = np.arange(short)[:, None] + np.arange(-reach, reach + 1)
            matrix = np.zeros((short, short))
            np.add.at(matrix, (np.arange(short)[:, None], read.clip(0, short - 1)), row)
            middle = np.array([short // 2] * (size - short), int)
            places = np.concatenate(
                [np.arange(short // 2), middle, np.arange(short // 2, short)]
            )
            norm = np.linalg.norm(matrix, axis=1)
            norms.append(norm[places])
            shares.append((np.diag(matrix) / norm)[places])
        return np.outer(*shares), np.outer(*norms)

    def _weights_of(self, z):
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


def _number(name: str, value: Any) -> float:
    if np.ndim(value):
        raise TypeError(f"{name} must be one number, not {value!r}.")
    (number,) = _numbers(name, value)
    return number


def _numbers(name: str, value: Any, is_zero_allowed: bool = False) -> tuple[float, ...]:
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" or numbers.ndim > 1 or not numbers.size:
        raise TypeError(f"{name} must be a number, or one for each channel, not {value!r}.")
    is_valid = np.isfinite(numbers) & ((numbers >= 0) if is_zero_allowed else (numbers > 0))
    if not is_valid.all():
        rule = "zero or positive" if is_zero_allowed else "positive"
        raise ValueError(f"{name} must be {rule} and finite, but is {value!r}.")
    return tuple(np.atleast_1d(numbers).astype(float).tolist())

"""The signal-to-noise ratio of a molecule: the signal under a point-spread function."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Real

from .._filter.correlation import pad
from .._filter.kernels import Image
from .checks import checked_number, is_traced
from .residual_noise import psf_taps


# The image of a molecule that is far out of focus; a wider one is a slip of the unit.
_LARGEST_PSF_PIX = 50.0
# Below this, the functions of `_normal_score` are computed by their series.
_NEAR_ZERO = 0.1
# The deviance, less its leading term, and the logarithm of the ratio of the Wald statistic
# to its root, as power series.
_DEVIANCE = [(-1) ** k * 2 / (k * (k - 1)) for k in range(2, 10)]
_CORRECTION = [1 / 6, -7 / 72, 227 / 3240, -1433 / 25920, 12493 / 272160, -0.0393785]
# A pixel has no fewer photoelectrons than none; the score is continued linearly there.
_LEAST = -0.9


def matched_snr(
    signal: Real[ArrayLike, "*batch height width"],
    bkgd: Real[ArrayLike, "..."],
    *,
    noise_correction: Real[ArrayLike, "..."],
    gain: Real[ArrayLike, "..."],
    read_noise_electrons: Real[ArrayLike, "..."] = 0.0,
    psf_sigma_pix: float = 1.3,
    skewness_correction: Real[ArrayLike, "..."] = 1.0,
) -> Float[Array, "*batch height width"]:
    """The signal-to-noise ratio of a molecule at each pixel: the signal under a Gaussian
    point-spread function, in units of the noise expected where there is no molecule.

    Photoelectrons have a skewed distribution, so the ratio itself exceeds 4.5 more often
    than a normal variable does. The result is the normal score, which exceeds every
    threshold as often as a standard normal variable. With many photoelectrons the two are
    the same. See [Detection](detection.md).

    Beyond the borders of the frame there is neither signal nor noise. A pixel that is not
    finite, or has no noise, reaches the pixels whose point-spread function covers it. Those
    have no gradient.

    **Arguments:** (those after the first broadcast to it)

    - `signal`: frames less their background, in ADU.
    - `bkgd`: the background above the camera's offset, in ADU.
    - `noise_correction`: the standard deviation of the noise under the point-spread
        function, over that in the frames: `deviation` of
        [`jaxbkgd.Background.matched_noise`][], which is not that of single pixels.
    - `gain`: electrons per ADU, a positive number or a map.
    - `read_noise_electrons`: the standard deviation in the dark, a number or a map.
    - `psf_sigma_pix`: the standard deviation of the image of a molecule, in pixels.
    - `skewness_correction`: `skewness` of [`jaxbkgd.Background.matched_noise`][].

    **Raises:** `TypeError` or `ValueError` for a gain or a `psf_sigma_pix` that is not
    positive and finite, and for a signal that has no height and width.

    ```python
    >>> import jax.numpy as jnp
    >>> import jaxbkgd
    >>> signal = jnp.zeros((9, 9)).at[4, 4].set(50.0)
    >>> snr = jaxbkgd.matched_snr(signal, 100.0, noise_correction=1.0, gain=4.0)
    >>> round(float(snr[4, 4]), 2)
    4.2

    ```
    """
    if not is_traced(gain) and np.ndim(gain) == 0:
        checked_number("gain", gain, unit="electrons per ADU")
    psf_sigma_pix = checked_psf_sigma(psf_sigma_pix)
    given = signal, bkgd, noise_correction, gain, read_noise_electrons, skewness_correction
    with jax.transfer_guard("allow"):
        arrays = [jnp.asarray(a, jnp.result_type(a, jnp.float32)) for a in given]
        if arrays[0].ndim < 2:
            raise ValueError(
                "signal must have the shape (..., height, width), but has "
                f"{arrays[0].shape}."
            )
        return _matched_snr(arrays, psf_sigma_pix)


@ft.partial(jax.jit, static_argnames="psf_sigma_pix")
def _matched_snr(arrays: Sequence[Float[Array, "..."]], psf_sigma_pix: float) -> Image:
    """Of the arguments in the order of `given` above."""
    shape = arrays[0].shape
    arrays = [jnp.broadcast_to(a, shape) for a in arrays]
    _, _, factor, gain, *_ = arrays
    is_usable = (factor > 0) & (gain > 0)
    for array in arrays:
        is_usable &= jnp.isfinite(array)
    # Derivatives that are not finite would pass a `where` at the end, as NaN.
    arrays = [jnp.where(is_usable, a, 1) for a in arrays]
    signal, bkgd, factor, gain, read_noise, skewness = arrays
    psf = psf_taps(psf_sigma_pix)
    light = jnp.maximum(bkgd * gain, 0)
    variance = _under_psf(light + read_noise**2, psf**2)
    is_noisy = variance > 0
    variance = jnp.where(is_noisy, variance, 1)
    deviation = jnp.sqrt(variance)
    z = _under_psf(signal * gain, psf) / (factor * deviation)
    skewness = skewness * _under_psf(light, psf**3) / (variance * deviation)
    is_bad = _under_psf(jnp.where(is_usable, 0.0, 1.0), psf) > 0
    return jnp.where(is_bad | ~is_noisy, jnp.nan, _normal_score(z, skewness))


def checked_psf_sigma(psf_sigma_pix: Any) -> float:
    """A positive number of pixels, which sets the number of taps."""
    if is_traced(psf_sigma_pix):
        raise TypeError(
            "psf_sigma_pix must be a number, since it sets the number of taps, but is "
            "traced; give it outside of jax.jit and jax.grad."
        )
    return checked_number(
        "psf_sigma_pix", psf_sigma_pix, maximum=_LARGEST_PSF_PIX, unit="px"
    )


def _under_psf(images: Image, taps: Float[np.ndarray, " taps"]) -> Image:
    """The sums under the taps along y and x, beyond the borders of which is nothing."""
    reach = taps.size // 2
    for axis in (-2, -1):
        size = images.shape[axis]
        padded = pad(images, (reach, reach), axis)
        shifted = (
            float(tap) * lax.slice_in_dim(padded, shift, shift + size, axis=axis)
            for shift, tap in enumerate(taps)
        )
        images = ft.reduce(jnp.add, shifted)
    return images


def _normal_score(
    z: Float[Array, "..."], skewness: Float[Array, "..."]
) -> Float[Array, "..."]:
    """What a standard normal variable exceeds as often as one of this skewness exceeds z.

    That is a Poisson variable, shifted and scaled: its tail is that of the signed root of
    its deviance, with the correction of Barndorff-Nielsen (Biometrika 73, 307, 1986).
    """
    y = jnp.maximum(z * skewness, _LEAST)
    is_small = jnp.abs(y) < _NEAR_ZERO
    near = jnp.where(is_small, y, 0)
    far = jnp.where(is_small, 1, y)
    log = jnp.log1p(far)
    deviance = 2 * ((1 + far) * log - far) / far**2
    correction = (log / 2 + jnp.log(log / far) - jnp.log(deviance) / 2) / far
    deviance = jnp.where(is_small, jnp.polyval(jnp.array(_DEVIANCE[::-1]), near), deviance)
    correction = jnp.where(
        is_small, jnp.polyval(jnp.array(_CORRECTION[::-1]), near), correction
    )
    root = jnp.sqrt(deviance)
    return z * root + skewness * correction / root

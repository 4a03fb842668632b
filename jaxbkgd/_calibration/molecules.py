"""The molecules of a movie: their light, their number, and the width of their image."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .blinking import molecule_residuals
from .spikes import fitted_light, Spikes


# A molecule is brighter than so many deviations of the noise once it is filtered, and the
# brightest pixel within so many.
_THRESHOLD, _REACH_PIX = 6.0, 4
# Molecules that must be seen for their mean image to be known, and the most that are used.
_FEWEST, _MOST = 20, 2000
# Without any, those that could just be localized well: so many deviations of the noise.
_FAINT = 10.0
_USUAL_SIGMA_PIX, _SIGMAS_PIX = 1.3, np.linspace(0.6, 4.0, 171)


@dataclass(frozen=True)
class Molecules:
    """Of one channel.

    **Attributes:**

    - `count`: of molecules seen, `per_frame` of them in a frame.
    - `light`: the median of one in one frame, in the unit of the frames.
    - `psf_sigma_pix`: the standard deviation of their mean image.
    - `spots`, `fits`: where those are that were looked at, and the light of each.
    """

    count: int
    per_frame: float
    light: float
    psf_sigma_pix: float
    spots: Spikes
    fits: Float[np.ndarray, " spots"]

    @property
    def is_measured(self) -> bool:
        """Whether enough were seen to measure their light."""
        return self.fits.size >= _FEWEST


def find_molecules(
    residuals: Float[Array, "frames height width"],
    variance: float,
    psf_sigma_pix: float | None = None,
) -> Molecules:
    """Those in frames less their background, with this variance of the noise."""
    deviation, sigma_pix = math.sqrt(variance), psf_sigma_pix or _USUAL_SIGMA_PIX
    peaks = np.argwhere(np.asarray(_is_peak(residuals, deviation)))
    seen = len(peaks)
    # With room for a box, and not too many.
    size = np.array(residuals.shape[1:])
    is_inner = (peaks[:, 1:] >= _REACH_PIX) & (peaks[:, 1:] < size - _REACH_PIX)
    peaks = peaks[is_inner.all(axis=1)]
    frame, y, x = peaks[:: max(1, len(peaks) // _MOST)].T
    spots = Spikes(frame, y, x, np.ones(len(frame)))
    if len(frame) >= _FEWEST and psf_sigma_pix is None:
        steps = np.arange(-_REACH_PIX, _REACH_PIX + 1)
        rows, columns = (y[:, None] + steps)[:, :, None], (x[:, None] + steps)[:, None]
        boxes = np.asarray(residuals)[frame[:, None, None], rows, columns]
        sigma_pix = _width(np.median(boxes / boxes.sum((1, 2), keepdims=True), 0))
    fits = np.asarray(fitted_light(residuals, spots, sigma_pix))
    light = _FAINT * deviation * 2 * math.sqrt(math.pi) * sigma_pix
    if len(frame) >= _FEWEST:
        light = float(np.median(fits))
    return Molecules(seen, seen / len(residuals), light, sigma_pix, spots, fits)


@jax.jit
def _is_peak(
    residuals: Float[Array, "frames height width"], deviation: Float[Array, ""]
) -> Bool[Array, "frames height width"]:
    filtered = molecule_residuals(residuals, 1)
    size = 2 * _REACH_PIX + 1
    pixel = jnp.zeros((1, 41, 41)).at[0, 20, 20].set(1)
    norm = jnp.sqrt(jnp.sum(jnp.square(molecule_residuals(pixel, 1))))
    snr = filtered / (norm * deviation)
    largest = lax.reduce_window(snr, -jnp.inf, lax.max, (1, size, size), (1, 1, 1), "SAME")
    return (snr == largest) & (snr > _THRESHOLD)


def _width(image: Float[np.ndarray, "pixels pixels"]) -> float:
    """The standard deviation of the Gaussian that fits an image over an even background
    best. The middles of molecules are anywhere in their pixel, which widens the image."""
    steps = np.arange(len(image)) - len(image) // 2
    profiles = np.exp(-(steps**2) / (2 * _SIGMAS_PIX[:, None] ** 2))
    gaussians = np.einsum("si,sj->sij", profiles, profiles).reshape(len(_SIGMAS_PIX), -1)
    gaussians -= gaussians.mean(axis=1, keepdims=True)
    explained = (gaussians @ image.ravel()) ** 2 / np.sum(gaussians**2, axis=1)
    widest = _SIGMAS_PIX[np.argmax(explained)]
    return float(np.sqrt(max(widest**2 - 1 / 12, _SIGMAS_PIX[0] ** 2)))

"""The molecules of a movie: their light, their number, and the width of their image."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from .._estimators.block_sums import around_pixels, sum_around
from .spikes import fitted_light, Spikes


# A molecule is brighter than so many deviations of the noise under a matched filter, and
# the brightest pixel within so many.
_THRESHOLD, _REACH_PIX = 6.0, 4
# Molecules that must be seen for their mean image to be known, and the most that are used.
_FEWEST, _MOST = 20, 2000
# Without any, those that could just be localized well: so many deviations of the noise.
_FAINT = 10.0
_USUAL_SIGMA_PIX, _SIGMAS_PIX = 1.3, np.linspace(0.6, 4.0, 171)


@dataclass(frozen=True)
class Molecules:
    """**Attributes:**

    - `count`: of molecules seen, `per_frame` of them in a frame.
    - `light`: the median of one in one frame, in the unit of the frames.
    - `psf_sigma_pix`: the standard deviation of their mean image.
    """

    count: int
    per_frame: float
    light: float
    psf_sigma_pix: float

    @property
    def is_measured(self) -> bool:
        """Whether enough were seen to measure their light."""
        return self.count >= _FEWEST


def find_molecules(
    residuals: Float[Array, "frames height width"],
    variance: float,
    psf_sigma_pix: float | None = None,
) -> Molecules:
    """Those in frames less their background, with this variance of the noise."""
    deviation = float(np.sqrt(variance))
    sigma_pix = psf_sigma_pix or _USUAL_SIGMA_PIX
    peaks = np.argwhere(np.asarray(_is_peak(residuals, deviation)))
    height, width = residuals.shape[1:]
    inner = (peaks[:, 1:] >= _REACH_PIX) & (
        peaks[:, 1:] < np.array([height, width]) - _REACH_PIX
    )
    seen = len(peaks)
    peaks = peaks[inner.all(axis=1)]
    peaks = peaks[:: max(1, len(peaks) // _MOST)]
    if len(peaks) < _FEWEST:
        light = _FAINT * deviation * 2 * np.sqrt(np.pi) * sigma_pix
        return Molecules(seen, seen / len(residuals), float(light), sigma_pix)
    steps = np.arange(-_REACH_PIX, _REACH_PIX + 1)
    frame, y, x = peaks.T
    values = np.asarray(residuals)
    boxes = values[
        frame[:, None, None],
        (y[:, None] + steps)[:, :, None],
        (x[:, None] + steps)[:, None],
    ]
    if psf_sigma_pix is None:
        sigma_pix = _width(np.median(boxes / boxes.sum((1, 2), keepdims=True), 0))
    spikes = Spikes(frame, y, x, np.ones(len(peaks)))
    light = float(np.median(fitted_light(residuals, spikes, sigma_pix)))
    return Molecules(seen, seen / len(residuals), light, sigma_pix)


@jax.jit
def _is_peak(
    residuals: Float[Array, "frames height width"], deviation: Float[Array, ""]
) -> Bool[Array, "frames height width"]:
    radius_pix = 2 * _USUAL_SIGMA_PIX
    around = around_pixels(radius_pix, jnp.ones((1, *residuals.shape[1:])))
    snr = sum_around(residuals, radius_pix) / (around.norms * deviation)
    size = 2 * _REACH_PIX + 1
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

"""The molecules of a movie: their light, their number, and the width of their image."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .blinking import molecule_residuals
from .spikes import fitted_light, Spikes


# A molecule is brighter than so many deviations of the noise once it is filtered, and the
# brightest pixel within so many.
_THRESHOLD, _REACH_PIX = 6.0, 4
# The share of its light that a molecule has in the mean over time if it never goes off.
_STATIC_SHARE = 0.5
# By how much its image may be wider than that of the others, and what a Gaussian must
# explain of it, so that it is not a part of the background.
_WIDEST, _LEAST_EXPLAINED = 1.4, 0.8
# What the border of a box may have of the light in its middle.
_LARGEST_BORDER = 0.3
# Molecules that must be seen for their mean image to be known, and the most that are used.
_FEWEST, _MOST = 20, 2000
# They are fitted in arrays of a multiple of this number.
_FILLED = 1000
# Without any, those that could just be localized well: so many deviations of the noise.
_FAINT = 10.0
_USUAL_SIGMA_PIX, _SIGMAS_PIX = 1.3, np.linspace(0.6, 4.0, 171)

_Frames = Float[Array, "frames height width"]
_Places = Int[np.ndarray, " spots"]
_Boxes = Float[np.ndarray, "spots pixels pixels"]


@dataclass(frozen=True)
class Molecules:
    """The molecules of one channel, as far as they stand out of their background.

    **Attributes:**

    - `count`: the number of molecules seen, and `per_frame` that in a frame.
    - `light`: the median light of a molecule in one frame, in the unit of the frames.
    - `psf_sigma_pix`: the standard deviation of their mean image.
    - `measured`: how many of them were measured.
    - `static`, `static_light`: the places (y, x) of molecules that never go off, once for
        each time that they are seen, and their light in the mean over time.
    """

    count: int
    per_frame: float
    light: float
    psf_sigma_pix: float
    measured: int
    static: tuple[_Places, _Places]
    static_light: Float[np.ndarray, " spots"]

    @property
    def is_measured(self) -> bool:
        """Whether enough were seen to measure their light."""
        return self.measured >= _FEWEST


def find_molecules(
    residuals: _Frames, variance: float, psf_sigma_pix: float | None = None
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
    boxes = _boxes(residuals, frame, y, x)
    is_sharp = _is_sharp(boxes)
    frame, y, x, boxes = frame[is_sharp], y[is_sharp], x[is_sharp], boxes[is_sharp]
    if len(frame) >= _FEWEST and psf_sigma_pix is None:
        image = np.median(boxes / boxes.sum((1, 2), keepdims=True), axis=0)
        sigma_pix = float(_widths(image[None])[0][0])
    fits = _fits(residuals, frame, y, x, sigma_pix)
    light = _FAINT * deviation * 2 * math.sqrt(math.pi) * sigma_pix
    if len(frame) >= _FEWEST:
        light = float(np.median(fits))
    # Those that are there in the mean over time, too.
    mean, first = jnp.mean(residuals, 0)[None], np.zeros_like(frame)
    mean_fits = _fits(mean, first, y, x, sigma_pix)
    is_static = mean_fits > _STATIC_SHARE * fits
    widths, explained = _widths(_boxes(mean, first, y, x))
    is_static &= (widths < _WIDEST * sigma_pix) & (explained > _LEAST_EXPLAINED)
    static, per_frame = (y[is_static], x[is_static]), seen / len(residuals)
    static_fits = mean_fits[is_static]
    return Molecules(seen, per_frame, light, sigma_pix, len(frame), static, static_fits)


def static_light(residuals: _Frames, molecules: Molecules) -> Float[np.ndarray, " spots"]:
    """The light of molecules that never go off, in other frames less their background."""
    mean, (y, x) = jnp.mean(residuals, 0)[None], molecules.static
    return _fits(mean, np.zeros_like(y), y, x, molecules.psf_sigma_pix)


def _fits(
    residuals: _Frames, frame: _Places, y: _Places, x: _Places, psf_sigma_pix: float
) -> Float[np.ndarray, " spots"]:
    # Filled up, since each number of spots would be compiled for.
    more = 0, -len(frame) % _FILLED
    frames, rows, columns = (np.pad(places, more) for places in (frame, y, x))
    spots = Spikes(frames, rows, columns, np.ones(len(frames)))
    return np.asarray(fitted_light(residuals, spots, psf_sigma_pix))[: len(frame)]


def _boxes(residuals: _Frames, frame: _Places, y: _Places, x: _Places) -> _Boxes:
    steps = np.arange(-_REACH_PIX, _REACH_PIX + 1)
    rows, columns = (y[:, None] + steps)[:, :, None], (x[:, None] + steps)[:, None]
    return np.asarray(residuals)[frame[:, None, None], rows, columns]


@jax.jit
def _is_peak(
    residuals: _Frames, deviation: Float[Array, ""]
) -> Bool[Array, "frames height width"]:
    filtered = molecule_residuals(residuals, 1)
    size = 2 * _REACH_PIX + 1
    pixel = jnp.zeros((1, 41, 41)).at[0, 20, 20].set(1)
    norm = jnp.sqrt(jnp.sum(jnp.square(molecule_residuals(pixel, 1))))
    snr = filtered / (norm * deviation)
    largest = lax.reduce_window(snr, -jnp.inf, lax.max, (1, size, size), (1, 1, 1), "SAME")
    return (snr == largest) & (snr > _THRESHOLD)


def _is_sharp(boxes: _Boxes) -> Bool[np.ndarray, " spots"]:
    """Whether a box is dark at its border, unlike where a background is uneven."""
    middle, inner = boxes[:, 3:-3, 3:-3].mean((1, 2)), boxes[:, 1:-1, 1:-1]
    area = math.prod(boxes.shape[1:]) - math.prod(inner.shape[1:])
    border = (boxes.sum((1, 2)) - inner.sum((1, 2))) / area
    return border < _LARGEST_BORDER * middle


def _widths(
    images: _Boxes,
) -> tuple[Float[np.ndarray, " spots"], Float[np.ndarray, " spots"]]:
    """The standard deviation of the Gaussian that fits an image over an even background
    best, and the share of the image's variance that it explains. The middles of molecules
    are anywhere in their pixel, which widens the image."""
    steps = np.arange(images.shape[1]) - images.shape[1] // 2
    profiles = np.exp(-(steps**2) / (2 * _SIGMAS_PIX[:, None] ** 2))
    gaussians = np.einsum("si,sj->sij", profiles, profiles).reshape(len(_SIGMAS_PIX), -1)
    gaussians -= gaussians.mean(axis=1, keepdims=True)
    gaussians /= np.linalg.norm(gaussians, axis=1, keepdims=True)
    values = images.reshape(len(images), math.prod(images.shape[1:]))
    values = values - values.mean(axis=1, keepdims=True)
    explained = np.square(values @ gaussians.T) / np.sum(values**2, 1, keepdims=True)
    variances = _SIGMAS_PIX[np.argmax(explained, axis=1)] ** 2 - 1 / 12
    return np.sqrt(np.maximum(variances, _SIGMAS_PIX[0] ** 2)), explained.max(axis=1)

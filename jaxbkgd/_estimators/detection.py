"""How high a matched SNR must be to be that of a molecule."""

import functools as ft
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from .checks import checked_count, is_traced, real_array
from .matched import checked_psf_sigma
from .residual_noise import psf_rows, psf_taps


# Thresholds, between which those that are asked for are interpolated.
_THRESHOLDS = np.linspace(-4, 15, 4097)
# Draws of the neighbours of a pixel, by which rates are known to 0.3 %, and near borders.
_DRAWS, _BORDER_DRAWS = 2**17, 2**13

_Correlation = Float[np.ndarray, "pixels pixels"]


def detection_threshold(
    false_positives_per_frame: Real[Array | np.ndarray, "..."] | float,
    shape: tuple[int, int],
    psf_sigma_pix: float = 1.3,
) -> Float[Array, "..."]:
    """The matched SNR that a given number of local maxima exceed in a frame without
    molecules.

    A local maximum is a pixel that is higher than its neighbours inside of the frame, up to
    eight. If noise is independent from pixel to pixel, the map of [`jaxbkgd.matched_snr`][]
    is a normal field with the correlations of the point-spread function. The expected
    number is the integral over z > threshold of the density of a pixel, times the
    probability that its neighbours are below z. It is computed for the pixel grid, with its
    borders and corners.

    [`jaxbkgd.Background.detection_threshold`][] includes the effect of a background that is
    the mean of few pixels, after which there are up to a quarter more maxima.

    **Arguments:**

    - `false_positives_per_frame`: a positive number, or an array of them. The threshold is
        differentiable in it.
    - `shape`: the height and the width of the frame, in pixels.
    - `psf_sigma_pix`: the standard deviation of the image of a molecule, in pixels.

    **Raises:** `TypeError` or `ValueError` for other arguments, and for more false
    positives than a frame has local maxima.

    ```python
    >>> import jaxbkgd
    >>> round(float(jaxbkgd.detection_threshold(1.0, (128, 128))), 2)
    3.66

    ```
    """
    psf_sigma_pix = checked_psf_sigma(psf_sigma_pix)
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"shape must be (height, width) in pixels, but is {shape!r}.")
    height, width = (checked_count("shape", size) for size in shape)
    return threshold(false_positives_per_frame, (height, width), psf_sigma_pix)


def threshold(
    false_positives_per_frame: Real[Array | np.ndarray, "..."] | float,
    shape: tuple[int, int],
    psf_sigma_pix: float,
    correlation: _Correlation | None = None,
) -> Float[Array, "..."]:
    """The same with the correlation of a pixel, the fifth, with its neighbours."""
    given = None if correlation is None else tuple(correlation.ravel().tolist())
    expected = _expected_maxima(shape, psf_sigma_pix, given)
    if not is_traced(false_positives_per_frame):
        name = "false_positives_per_frame"
        numbers = real_array(name, false_positives_per_frame)
        if np.any(numbers >= expected[0]) or np.any(numbers <= expected[-1]):
            raise ValueError(
                f"{name} must be from {expected[-1]:.1g} to {expected[0]:.3g}, the number "
                f"of local maxima in a frame of {shape[0]} x {shape[1]} px, but is "
                f"{false_positives_per_frame!r}."
            )
    logs = jnp.log(jnp.asarray(false_positives_per_frame, float))
    return jnp.interp(logs, np.log(expected[::-1]), _THRESHOLDS[-2::-1].copy())


@ft.lru_cache(maxsize=64)
def _expected_maxima(
    shape: tuple[int, int], psf_sigma_pix: float, correlation: tuple[float, ...] | None
) -> Float[np.ndarray, " thresholds"]:
    """The local maxima above each threshold that a frame has on average."""
    lines, columns = (_neighbourhoods(psf_sigma_pix, size) for size in shape)
    is_peak = np.zeros_like(_THRESHOLDS)
    for y, x in itertools.product(lines, columns):
        both = np.kron(y.correlation, x.correlation)
        centre = y.centre * len(x.correlation) + x.centre
        draws = _BORDER_DRAWS
        if y.is_inner and x.is_inner:
            draws = _DRAWS
            if correlation is not None:
                both = np.reshape(correlation, both.shape)
        is_peak += y.positions * x.positions * _are_neighbours_below(both, centre, draws)
    density = np.exp(-(_THRESHOLDS**2) / 2) / math.sqrt(2 * math.pi) * is_peak
    slabs = np.diff(_THRESHOLDS) * (density[1:] + density[:-1]) / 2
    return np.cumsum(slabs[::-1])[::-1]


class _Neighbourhood(NamedTuple):
    """Of so many positions along one axis: the correlations of the pixel before, the one
    at `centre`, and the one after it, as far as they are inside of the frame."""

    correlation: _Correlation
    centre: int
    positions: int
    is_inner: bool


def _neighbourhoods(psf_sigma_pix: float, size: int) -> list[_Neighbourhood]:
    taps = psf_taps(psf_sigma_pix)
    # Next to a border, a point-spread function is cut off.
    reach = taps.size // 2 + 1
    few = min(size, 2 * reach + 1)
    rows = psf_rows(taps, few)
    found = []
    # Both borders are alike.
    for position in range((few + 1) // 2):
        first = max(position - 1, 0)
        near = rows[first : position + 2]
        is_middle = 2 * position + 1 == few
        count = 1 + size - few if is_middle else 2
        is_inner = is_middle and position == reach
        found.append(_Neighbourhood(near @ near.T, position - first, count, is_inner))
    return found


def _are_neighbours_below(
    correlation: _Correlation, centre: int, draws: int
) -> Float[np.ndarray, " thresholds"]:
    """The probability that all neighbours of a pixel are below it, where it is at each
    threshold. A neighbour of correlation r is at r z plus what does not depend on z; so
    they are below z if the largest of these parts over 1 - r is."""
    others = np.delete(np.arange(len(correlation)), centre)
    if not others.size:
        return np.ones_like(_THRESHOLDS)
    with_centre = correlation[others, centre]
    covariance = correlation[np.ix_(others, others)] - np.outer(with_centre, with_centre)
    values, vectors = np.linalg.eigh(covariance)
    normal = np.random.default_rng(0).standard_normal((draws, others.size))
    parts = normal @ (vectors * np.sqrt(np.maximum(values, 0))).T
    highest = np.sort(np.max(parts / (1 - with_centre), axis=1))
    return np.searchsorted(highest, _THRESHOLDS) / draws

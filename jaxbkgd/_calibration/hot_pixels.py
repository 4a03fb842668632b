"""Pixels of the camera that are far off in every frame."""

import contextlib
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from .._movies.movie import Channel, Movie, movie_of_array
from .._movies.open import open_channels


# Frames, evenly spaced, whose median is looked at, and pixels that are sorted at a time.
_FRAMES, _PIXELS = 25, 2**22
# A pixel is off if it differs from those around it by so many of their usual deviations,
# and all next neighbours but one by a smaller share than the image of a molecule has there
# (0.46 for a standard deviation of 0.8 px).
_DEVIATIONS, _LARGEST_SHARE, _PASSES = 10.0, 0.35, 4
# A larger share of the pixels is no fault of a camera.
_MOST_HOT = 0.03
_AROUND = [(y, x) for y in (-2, 0, 2) for x in (-2, 0, 2) if (y, x) != (0, 0)]
_NEXT = [(-1, 0), (1, 0), (0, -1), (0, 1)]


def find_hot_pixels(source: Any) -> Bool[np.ndarray, "height width"]:
    """The pixels that are far brighter or darker than those around them in all frames.

    The median over 25 frames is compared with that of the 8 pixels around. A spot as wide
    as the image of a molecule is not a hot pixel, and a movie of fewer frames shows none.
    Give an estimator the other pixels as `weights`; `calibrate` and `estimate_movie` do so
    where they find the estimator.

    **Arguments:**

    - `source`: a movie of one channel, as [`jaxbkgd.estimate_movie`][] takes it.

    **Raises:** [`jaxbkgd.MovieError`][] for a movie that cannot be read, `ValueError` for
    several channels.

    ```python
    >>> import jax
    >>> import jaxbkgd
    >>> frames, _ = jaxbkgd.simulate_movie(jax.random.key(0), frame_count=30)
    >>> is_hot = jaxbkgd.find_hot_pixels(frames.at[:, 30, 40].add(500))
    >>> is_hot.sum(), is_hot[30, 40]
    (np.int64(1), np.True_)

    ```
    """
    with contextlib.ExitStack() as files:
        channels = open_channels(source, files=files)
        if len(channels) != 1:
            raise ValueError(f"There are {len(channels)} channels; give one at a time.")
        return hot_pixels_of(channels[0])


def hot_pixels_of(channel: Channel) -> Bool[np.ndarray, "height width"]:
    """Those of a channel; see `find_hot_pixels`."""
    count, height, width = channel.shape
    if count < _FRAMES:
        return np.zeros((height, width), bool)
    numbers = np.unique(np.linspace(0, count - 1, _FRAMES).round().astype(int)).tolist()
    frames = np.stack([channel[number] for number in numbers])
    step = max(1, _PIXELS // (len(numbers) * width))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        # A pixel may be NaN in all frames.
        lines = [
            np.nanmedian(frames[:, y : y + step].astype(np.float32), axis=0)
            for y in range(0, height, step)
        ]
        level = np.concatenate(lines)
        is_hot = np.zeros(level.shape, bool)
        # Hot pixels side by side are found from the outside.
        for _ in range(_PASSES):
            found = _far_off(np.where(is_hot, np.nan, level))
            if not found.any():
                break
            is_hot |= found
    return is_hot & (is_hot.mean() < _MOST_HOT)


def _far_off(level: Float[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Pixels beyond those around them, of which one may be off, too, that have one such
    neighbour at most."""
    around = np.sort(_shift(level, _AROUND), axis=0)
    middle = np.nanmedian(around, axis=0)
    scale = 1.4826 * np.nanmedian(np.abs(level - middle))
    # Sorted, what is beyond the frame comes last.
    count = np.isfinite(around).sum(axis=0)
    high = np.take_along_axis(around, np.maximum(count - 2, 0)[None], axis=0)[0]
    beyond = np.maximum(level - high, around[1] - level)
    excess = level - middle
    beside = (_shift(level, _NEXT) - middle) * np.sign(excess)
    second = np.sort(np.where(np.isnan(beside), -np.inf, beside), axis=0)[-2]
    # Numbers of few electrons are whole, and most may be equal.
    is_off = beyond > _DEVIATIONS * max(float(scale), math.sqrt(1 / 12))
    return is_off & (second < _LARGEST_SHARE * np.abs(excess))


def without_pixels(
    weights: Channel | None, is_hot: Bool[np.ndarray, "height width"]
) -> Channel | None:
    """Weights of a channel that leave these pixels out, too."""
    if not is_hot.any():
        return weights
    counts = ~is_hot[None]
    if weights is None:
        return movie_of_array(counts, "the weights").channels[0]
    pixels, source = _WeightsOfEachFrame(weights, counts), weights.movie
    movie = Movie(pixels, name=source.name, format=source.format, paths=source.paths)
    return movie.channels[0]


class _WeightsOfEachFrame:
    """Weights that are read as they are sliced, without some pixels."""

    def __init__(self, weights: Channel, counts: Bool[np.ndarray, "1 height width"]):
        frames, height, width = weights.shape
        self.shape, self.dtype = (frames, 1, height, width), weights.dtype
        self._weights, self._counts = weights, counts

    def __getitem__(self, index: tuple[slice, int]) -> Any:
        return self._weights[index[0]] * self._counts


def _shift(
    image: Float[np.ndarray, "height width"], shifts: list[tuple[int, int]]
) -> Float[np.ndarray, "shifts height width"]:
    """What each pixel has at these places beside it, NaN beyond the frame."""
    height, width = image.shape
    padded = np.pad(image, 2, constant_values=np.nan)
    return np.stack(
        [padded[2 + y : 2 + y + height, 2 + x : 2 + x + width] for y, x in shifts]
    )

"""Movies as layers of napari, whose frames are read when they are shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .._movies.movie import Channel
from .._movies.open import open_movie


LayerData = tuple[Any, dict[str, Any], str]

# The share of pixels, in percent, that are darker and brighter than what is shown.
_DARKER, _BRIGHTER = 0.5, 99.9


def reader_of(path: str | list[str]) -> Callable[[str | list[str]], list[LayerData]] | None:
    """What napari calls to ask for a reader: one of single movies."""
    return layers_of if isinstance(path, str) or len(path) == 1 else None


def layers_of(path: str | list[str]) -> list[LayerData]:
    """A layer for each channel, in micrometres where the size of a pixel is known. Raises
    `MovieError` for what is no movie."""
    movie = open_movie(path if isinstance(path, str) else path[0])
    name, scale = Path(movie.name).name, (1.0, *(movie.pixel_size_um or (1.0, 1.0)))
    layers: list[LayerData] = []
    for channel in movie.channels:
        number = f" [{channel.index + 1}]" if len(movie.channels) > 1 else ""
        options: dict[str, Any] = {"name": name + number, "scale": scale}
        options["axis_labels"] = ("frame", "y", "x")
        options["contrast_limits"] = contrast_limits(channel[len(channel) // 2])
        layers.append((channel, options, "image"))
    return layers


def channel_of(data: Any) -> Channel:
    """The channel that a layer shows: one that was read here, or any array (frames, height,
    width). Raises `MovieError` for other layers."""
    if isinstance(data, Channel):
        return data
    return open_movie(data).channels[0]


def contrast_limits(image: np.ndarray) -> tuple[float, float]:
    """From the dark to the bright pixels of an image."""
    seen = image[np.isfinite(image)]
    if not seen.size:
        return 0.0, 1.0
    low, high = map(float, np.percentile(seen, [_DARKER, _BRIGHTER]))
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))

"""What a user gives as a source, as channels: the same for estimates and calibration."""

import contextlib
from collections.abc import Sequence
from typing import Any

from .movie import Box, Channel, Movie, MovieError
from .open import open_movie


def is_split(source: Any, boxes: Sequence[Box] | None = None) -> bool:
    """Whether a source stands for a list of channels with one result each."""
    return isinstance(source, list | tuple) or boxes is not None


def open_channels(
    source: Any, boxes: Sequence[Box] | None = None, *, files: contextlib.ExitStack
) -> list[Channel]:
    """The channels of a source as that of [`jaxbkgd.estimate_movie`][], all of one length.
    Movies that are opened here are closed by `files`."""
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise ValueError("There is no source; give a path or an array, or a list of them.")
    opened = [_open_source(entry, files) for entry in sources]
    if not is_split(source, boxes):
        return opened[0]
    for channels in opened:
        if len(channels) > 1:
            raise MovieError(
                f"{channels[0].movie.name}: holds {len(channels)} channels; estimate it by "
                "itself, without a list of sources or boxes"
            )
    channels = [channel for (channel,) in opened]
    if boxes is not None:
        if isinstance(source, list | tuple | Channel) or not boxes:
            raise ValueError(
                f"boxes are {boxes} of {len(sources)} sources; give at least one, of the "
                "frames of one movie or array."
            )
        return [Channel(channels[0].movie, 0, box) for box in boxes]
    lengths = [len(channel) for channel in channels]
    if len(set(lengths)) > 1:
        raise MovieError(
            f"{channels[0].movie.name}: the channels have {', '.join(map(str, lengths))} "
            "frames; give movies of the same length"
        )
    return channels


def _open_source(source: Any, files: contextlib.ExitStack) -> list[Channel]:
    if isinstance(source, Channel):
        return [source]
    movie = open_movie(source)
    if not isinstance(source, Movie):
        files.enter_context(contextlib.closing(movie))
    return movie.channels

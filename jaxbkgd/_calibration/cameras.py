"""The camera of each channel of a movie."""

from collections.abc import Sequence
from typing import Any

from .._estimators.camera import Camera, camera_of_each
from .._movies.movie import Channel


def cameras_of(camera: Any, channels: Sequence[Channel]) -> list[Camera]:
    """One for each channel, cut as the channel is, from one for all or one for each, whose
    maps are of the whole frame. `TypeError` or `ValueError` for cameras that do not fit."""
    cameras, of_each = [], camera_of_each(camera, list(channels))
    for channel, whole in zip(channels, of_each, strict=True):
        whole.check_shape(*channel.movie.shape[2:])
        x0, y0, x1, y1 = channel.box
        if whole.is_gain_known != of_each[0].is_gain_known:
            raise ValueError("Some cameras have a gain, others none; give it for all.")
        cameras.append(whole.cropped(slice(y0, y1), slice(x0, x1)))
    return cameras

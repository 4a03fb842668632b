"""Patterns of light of a whole movie, learned from a part of its frames."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.channels import as_frames
from .._estimators.coarse_patterns import chosen_patterns, square_levels
from .._estimators.local_mean import LocalMean
from .._estimators.saved import with_fields
from .._movies.movie import Channel
from .sample import Sample


_Estimator = TypeVar("_Estimator", bound=AbstractEstimator)

# The frames of a run in which what changes fast is told from what is slow, the most runs,
# and the pixels that are read at a time.
_RUN_FRAMES, _MOST_RUNS, _STEP_PIXELS = 300, 3, 2**24


def with_movie_patterns(
    estimator: _Estimator,
    channels: Sequence[Channel],
    masks: Sequence[Channel | None],
    cameras: Sequence[Camera],
) -> _Estimator:
    """The estimator with patterns that all parts of a movie share, if it has still to learn
    these, from runs of frames spread over the movie."""
    if not estimator.learns_patterns:
        return estimator
    if not isinstance(estimator, LocalMean):
        raise ValueError(
            f"{type(estimator).__name__} has patterns of light to learn; make it of a "
            "LocalMean with patterns, as with_patterns(frames) gives it."
        )
    rank, skips_nan = estimator.illumination_rank, estimator.skips_nan
    patterns = [
        chosen_patterns(_squares_of(*of_one, skips_nan), rank)
        for of_one in zip(channels, masks, cameras, strict=True)
    ]
    return with_fields(estimator, patterns=tuple(patterns))


def sample_rank(sample: Sample, skips_nan: bool) -> Any:
    """The number of patterns that a sample shows, the largest one of all channels."""
    ranks = [1]
    for of_channel in zip(*sample.runs, strict=True):
        squares = [square_levels(frames, None, skips_nan) for frames in of_channel]
        ranks.append(len(chosen_patterns(jnp.stack(squares), "auto")))
    return max(ranks)


def _squares_of(
    channel: Channel, mask: Channel | None, camera: Camera, skips_nan: bool
) -> Float[Array, "runs frames rows columns"]:
    count = len(channel)
    length = min(count, _RUN_FRAMES)
    runs = min(-(-count // length), _MOST_RUNS)
    step = max(1, _STEP_PIXELS // math.prod(channel.shape[1:]))

    def levels(start: int) -> Float[Array, "frames rows columns"]:
        parts = []
        for first in range(start, start + length, step):
            part = slice(first, min(first + step, start + length))
            frames = camera.even_light(as_frames(channel[part]))
            of_frames: Any = None
            if mask is not None:
                of_frames = mask[part if len(mask) > 1 else slice(1)]
            weights = camera.weights(frames, of_frames)
            weights = None if weights is None else jnp.asarray(weights)
            parts.append(square_levels(frames, weights, skips_nan))
        return jnp.concatenate(parts)

    starts = np.linspace(0, count - length, runs).round().astype(int)
    return jnp.stack([levels(int(start)) for start in starts])

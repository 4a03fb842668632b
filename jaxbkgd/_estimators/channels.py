"""Channels: their frames and weights as JAX arrays, checked."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Shaped

from .checks import is_real_dtype, is_traced


# One stack of frames (..., height, width), or one a channel.
Channels = ArrayLike | Sequence[ArrayLike]


def as_frames(channel: Any) -> Shaped[Array, "*batch height width"]:
    """The frames of one channel as a JAX array of a real dtype that can hold them."""
    return jnp.asarray(checked_frames(channel))


def checked_frames(channel: Any) -> Shaped[Array | np.ndarray, "*batch height width"]:
    """Frames as `as_frames` takes them. Those of NumPy stay there, for a compiled function
    to read them in place, and must not be written to before it is done."""
    if isinstance(channel, np.ma.MaskedArray):
        raise TypeError(
            "frames must not be a masked array, whose mask would be lost; fill it, for "
            "example with `frames.astype(float).filled(numpy.nan)`."
        )
    frames = channel if isinstance(channel, jax.Array) else np.asarray(channel)
    if not is_real_dtype(frames.dtype, allows_bool=True):
        raise TypeError(
            f"frames must be real numbers, but their dtype is {frames.dtype}; convert "
            "them, or take the real part, first. Those of a file are "
            "`jaxbkgd.open_movie(path).channels[0][:]`."
        )
    if frames.ndim < 2 or 0 in frames.shape[-2:]:
        raise ValueError(
            "frames must have shape (..., height, width) with at least one pixel, but "
            f"their shape is {frames.shape}."
        )
    if isinstance(frames, np.ndarray):
        frames = frames.astype(_holding_dtype(frames.dtype), copy=False)
    return frames


def working_dtype(frames: Shaped[Array, "..."]) -> Any:
    """The dtype of estimates: float64 for float64 frames, and float32 for all others."""
    return jnp.float64 if frames.dtype == jnp.float64 else jnp.float32


def checked_weights(
    frames: Shaped[Array, "*batch height width"], weights: Any
) -> Shaped[Array, "..."] | None:
    """Weights of one channel as a JAX array that broadcasts to its frames."""
    if weights is None:
        return None
    is_masked = isinstance(weights, np.ma.MaskedArray)
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    if is_masked or not is_real_dtype(weights.dtype, allows_bool=True):
        raise TypeError(
            "weights must be an array of real numbers or booleans, as numpy.load reads it "
            f"from a file, but are {'a masked one' if is_masked else weights.dtype}."
        )
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "iu":
        # JAX would wrap 64-bit integers to 32 bits.
        weights = weights.astype(np.float64)
    weights = jnp.asarray(weights)
    try:
        fits = jnp.broadcast_shapes(weights.shape, frames.shape) == frames.shape
    except ValueError:
        fits = False
    # One for each frame would be taken for one for each column.
    if not fits or weights.ndim == 1:
        raise ValueError(
            f"weights have shape {weights.shape}, and must be one for each pixel, (height, "
            "width), for each frame, (frames, 1, 1), or for both, to go with frames of "
            f"shape {frames.shape}."
        )
    # In NumPy: within a trace, JAX would trace the comparison of known weights, too.
    known_weights = np.ones(1) if is_traced(weights) else np.asarray(weights)
    if not np.all((known_weights >= 0) & (known_weights < np.inf)):
        raise ValueError(
            "weights must be zero or positive, and finite, but some are not; give 0 for "
            "what is to be left out."
        )
    return weights


def map_channels(function: Callable, channels: Any, *others: Any) -> Any:
    """Applies `function` to each channel and what belongs to it, in the same structure:
    to one stack itself, or to the entries of a list or tuple."""
    if not is_sequence(channels):
        if any(map(is_sequence, others)):
            raise ValueError(
                "There is one stack of frames, but a list of channels to go with it; give "
                "a list of stacks."
            )
        return function(channels, *others)
    if not channels:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    for other in others:
        if not is_sequence(other) or len(other) != len(channels):
            entries = f"{len(other)} entries" if is_sequence(other) else "no sequence"
            raise ValueError(
                f"There are {len(channels)} channels, but {entries} to go with them; give "
                "a list with one entry for each channel."
            )
    answers = [function(*entries) for entries in zip(channels, *others, strict=True)]
    return tuple(answers) if isinstance(channels, tuple) else answers


def is_sequence(channels: Any) -> bool:
    """Whether these are channels, rather than one stack."""
    return isinstance(channels, list | tuple)


def check_stacks(frames: Any) -> None:
    """Refuses a list of frames, which would be that many channels. (Within `jax.vmap`,
    stacks look like frames.)"""
    if not is_sequence(frames) or len(frames) < 2:
        return
    if all(frame.ndim == 2 and not is_traced(frame) for frame in frames):
        raise ValueError(
            f"A list of {len(frames)} images would be {len(frames)} channels of one frame; "
            "give frames of one channel as one stack, numpy.stack(frames), and single "
            "frames of several channels as [frame[None], ...]."
        )


def _holding_dtype(dtype: np.dtype) -> np.dtype:
    """A dtype that JAX has, in the machine's byte order, for numbers of `dtype`. Left to
    itself, JAX would wrap 64-bit integers to 32 bits."""
    if dtype.itemsize < 8:
        return dtype.newbyteorder("=")
    if not jax.config.read("jax_enable_x64"):
        return np.dtype(np.float32)
    return np.dtype(np.float64) if dtype.kind == "f" else dtype.newbyteorder("=")

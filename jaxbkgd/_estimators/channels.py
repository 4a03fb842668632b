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
    frames = checked_frames(channel)
    # The difference of counts and a number, as `movie - 100.0`, has a weak dtype, for which
    # JAX would compile programs anew.
    return jnp.asarray(frames, frames.dtype)


def checked_frames(channel: Any) -> Shaped[Array | np.ndarray, "*batch height width"]:
    """Frames as `as_frames` takes them. Those of NumPy stay there, for a compiled function
    to read them in place, and must not be written to before it is done."""
    frames = _checked_array("frames", channel)
    if frames.ndim < 2 or 0 in frames.shape[-2:]:
        raise ValueError(
            "frames must have shape (..., height, width) with at least one pixel, but "
            f"their shape is {frames.shape}."
        )
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
    weights = jnp.asarray(_checked_array("weights", weights))
    # One for each frame would be taken for one for each column.
    fits = weights.ndim != 1 and weights.ndim <= frames.ndim
    sizes = zip(weights.shape[::-1], frames.shape[::-1], strict=False)
    if not fits or any(size not in (1, frame_size) for size, frame_size in sizes):
        raise ValueError(
            f"weights have shape {weights.shape}, and must be one for each pixel, (height, "
            "width), for each frame, (frames, 1, 1), or for both, to go with frames of "
            f"shape {frames.shape}."
        )
    # In NumPy: within a trace, JAX would trace the comparison of known weights, too.
    known_weights = np.ones(1) if is_traced(weights) else np.asarray(weights)
    if not np.all((known_weights >= 0) & (known_weights < np.inf)):
        raise ValueError("weights must be zero or positive, and finite; 0 leaves out.")
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
            count = len(other) if is_sequence(other) else "no list of"
            raise ValueError(
                f"There are {len(channels)} channels, but {count} entries to go with them; "
                "give a list with one entry for each channel."
            )
    answers = [function(*entries) for entries in zip(channels, *others, strict=True)]
    return tuple(answers) if isinstance(channels, tuple) else answers


def is_sequence(channels: Any) -> bool:
    """Whether these are channels, rather than one stack."""
    return isinstance(channels, list | tuple)


def _checked_array(name: str, values: Any) -> Shaped[Array | np.ndarray, "..."]:
    """Real numbers or booleans, of a dtype that JAX has."""
    is_masked = isinstance(values, np.ma.MaskedArray)
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if is_masked or not is_real_dtype(array.dtype, allows_bool=True):
        raise TypeError(
            f"{name} must be real numbers or booleans in an array, as numpy.load reads it "
            f"from a file, but are {'a masked one' if is_masked else array.dtype}; convert "
            "their dtype, or fill what is masked, first."
        )
    if isinstance(array, jax.Array):
        return array
    dtype = array.dtype.newbyteorder("=")
    # Left to itself, JAX would wrap 64-bit integers to 32 bits.
    if dtype.itemsize >= 8 and not jax.config.read("jax_enable_x64"):
        dtype = np.dtype(np.float32)
    elif dtype == np.longdouble:
        dtype = np.dtype(np.float64)
    return array.astype(dtype, copy=False)

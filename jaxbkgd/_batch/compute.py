"""What is made of the frames of one window: one compiled program, its memory and errors."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any, cast, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real, Shaped

from .._estimators.base import AbstractEstimator, as_frames, checked_frames
from .._estimators.checks import check_choice
from .._filter.nonfinite import zeros_of
from .._movies.movie import MovieError, one_line
from .plan import Window


# What is written of each frame.
Quantity = Literal["background", "residual", "snr"]

# As uint16, a background is rounded to the nearest number, to the even one of two.
Dtype = Literal["float32", "uint16"]

# JAX reads a NumPy array in place if it begins at a multiple of this, and else copies it to
# new memory.
_ALIGNMENT_BYTES = 64

# XLA on CPU defaults to vectors of 256 bits even where there are 512. Results do not depend
# on it.
_WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


class Output(NamedTuple):
    """What is made of the frames; offsets and gains are those of each channel, gains only
    where they are given. `is_one_stack`: whether the estimator is called with one stack of
    frames, or with a list of them."""

    quantity: Quantity
    dtype: Dtype
    offsets: tuple[float, ...]
    gains: tuple[float, ...]
    is_one_stack: bool


class Counts(NamedTuple):
    """Frames with a pixel that is not finite, and with one that uint16 cannot hold."""

    nonfinite_frames: int
    clipped_frames: int


def make_output(
    quantity: Quantity,
    dtype: Dtype,
    offsets: Any,
    gains: Any,
    *,
    channel_count: int,
    is_one_stack: bool,
) -> Output:
    """Checks what a user has given.

    **Raises:**

    `ValueError` for an unknown quantity or dtype, for those that do not fit each other, and
    for offsets or gains that are not finite or not as many as the channels.
    """
    check_choice("quantity", quantity, Quantity)
    check_choice("dtype", dtype, Dtype)
    if quantity == "snr" and gains is None:
        raise ValueError("An SNR needs gains, in electrons per ADU.")
    if quantity != "background" and dtype == "uint16":
        raise ValueError(
            f"A {quantity} is negative in places, and uint16 is not; write float32."
        )
    offset_of_each = _one_for_each("offsets", offsets, channel_count)
    gain_of_each = () if gains is None else _one_for_each("gains", gains, channel_count)
    if not all(map(math.isfinite, offset_of_each)):
        raise ValueError(f"offsets must be finite, but they are {offset_of_each}.")
    if not all(0 < gain < math.inf for gain in gain_of_each):
        raise ValueError(f"gains must be positive and finite, but they are {gain_of_each}.")
    return Output(quantity, dtype, offset_of_each, gain_of_each, is_one_stack)


def _one_for_each(name: str, value: Any, channel_count: int) -> tuple[float, ...]:
    values = [value] * channel_count if np.ndim(value) == 0 else list(value)
    if len(values) != channel_count:
        raise ValueError(
            f"There are {channel_count} channels, but {len(values)} {name}; give a number "
            "for all, or one for each."
        )
    return tuple(float(number) for number in values)


def check_takes_weights(estimator: AbstractEstimator) -> None:
    if not estimator.takes_weights:
        raise TypeError(
            f"{type(estimator).__name__} takes no weights; leave them out, or use an "
            "estimator that does, as LocalMean."
        )


def check_weights(name: str, values: Shaped[np.ndarray, "..."]) -> None:
    if not np.all((values >= 0) & (values < np.inf)):
        raise MovieError(
            f"{name}: a weight is negative or not finite; give booleans, or numbers from 0"
        )


# Images, one a channel, and which frames are finite, and which are clipped, in any of them,
# where either can happen.
Estimates = tuple[
    list[Shaped[Array, "frames _height _width"]],
    Bool[Array, " frames"] | None,
    Bool[Array, " frames"] | None,
]


def estimate_window(
    estimator: AbstractEstimator,
    channels: Sequence[Any],
    output: Output,
    weights: Sequence[Any] = (),
    donated: Sequence[Float[Array, "frames _height _width"]] | None = None,
) -> Estimates:
    """Estimates the frames (frames, height, width) of each channel, as JAX traces it."""
    stacks = [
        as_frames(channel) - np.float32(offset) if offset else as_frames(channel)
        for channel, offset in zip(channels, output.offsets, strict=True)
    ]

    def as_called(of_each: Sequence[Any]) -> Any:
        return of_each[0] if output.is_one_stack else list(of_each)

    options = {}
    is_weighted = any(mask is not None for mask in weights)
    if is_weighted:
        options["weights"] = as_called(weights)
    if donated is not None:
        options["donated"] = as_called(donated)
    frames = as_called(stacks)
    background = estimator(frames, **options)
    match output.quantity:
        case "background":
            images = background.bkgds
        case "residual":
            images = background.residuals(frames)
        case "snr":
            images = background.snr(frames, as_called(output.gains))
    images = [images] if output.is_one_stack else list(images)
    # Where no pixel counts, there is no background.
    may_be_nonfinite = (
        is_weighted
        or output.quantity == "snr"
        or any(jnp.issubdtype(stack.dtype, jnp.floating) for stack in stacks)
    )
    is_finite = _finite_frames(images) if may_be_nonfinite else None
    if output.dtype == "uint16":
        images, is_clipped = _rounded_to_uint16(images)
        return images, is_finite, is_clipped
    return [image.astype(output.dtype) for image in images], is_finite, None


def _finite_frames(
    images: Sequence[Real[Array, "frames _height _width"]],
) -> Bool[Array, " frames"]:
    return jnp.stack([jnp.isfinite(zeros_of(x)).all((-2, -1)) for x in images]).all(0)


def _rounded_to_uint16(
    images: Sequence[Real[Array, "frames _height _width"]],
) -> tuple[list[Shaped[Array, "frames _height _width"]], Bool[Array, " frames"]]:
    """And the frames in which one of the images was clipped."""
    rounded = [jnp.round(image) for image in images]
    clipped = [jnp.clip(image, 0, 2**16 - 1) for image in rounded]
    differences = [(a != b).any((-2, -1)) for a, b in zip(rounded, clipped, strict=True)]
    return [image.astype(jnp.uint16) for image in clipped], jnp.stack(differences).any(0)


def compile_estimate(
    estimator: AbstractEstimator, output: Output
) -> Callable[..., Estimates]:
    """`estimate_window` as a function of channels, weights and `donated`, whose memory it
    takes.

    As `eqx.filter_jit`, but looks at the estimator now and not in each call, which would
    take as long as to filter some 10^5 pixels.
    """
    arrays, rest = eqx.partition(estimator, eqx.is_array)
    return ft.partial(_compiled(rest, output), arrays)


@ft.lru_cache
def _compiled(rest: AbstractEstimator, output: Output) -> Callable[..., Estimates]:
    def estimate(arrays, channels, weights, donated):
        estimator = eqx.combine(arrays, rest)
        return estimate_window(estimator, channels, output, weights, donated)

    options = _compiler_options()
    return jax.jit(estimate, donate_argnames="donated", compiler_options=options)


@ft.cache
def _compiler_options() -> dict[str, int] | None:
    """The option for wide vectors, where XLA has it."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=_WIDE_VECTORS)()
    except RuntimeError:
        return None
    return _WIDE_VECTORS


class Buffers:
    """Memory that is used for chunk after chunk of one shape and dtype, by one thread at a
    time: on CPU, the first use of each new page costs a fault.

    **Attributes:**

    - `donated`: if results can be reused, those of the chunk before, one for each channel,
        over which the next ones may be written.
    """

    def __init__(self, is_on_cpu: bool, can_reuse: bool) -> None:
        self.donated: list[Float[Array, "frames _height _width"]] | None = None
        self._is_on_cpu = is_on_cpu
        self._can_reuse = can_reuse
        self._frames: list[np.ndarray] | None = None

    def place(self, chunks: Sequence[Any]) -> Sequence[Any]:
        """The chunks of each channel where JAX reads them in place, until the next call."""
        if not self._is_on_cpu:
            return chunks
        if self._frames is None:
            self._frames = [_aligned_empty(chunk.shape, chunk.dtype) for chunk in chunks]
            if self._can_reuse:
                self.donated = [_blank(chunk.shape) for chunk in chunks]
        return list(map(_placed, self._frames, chunks))

    def as_numpy(
        self, images: list[Shaped[Array, "frames _height _width"]]
    ) -> list[Shaped[np.ndarray, "frames _height _width"]]:
        """Results without a copy on CPU, to be donated to the next chunk.

        While one of these arrays is in use, JAX does not write over its image, but makes a
        new one. What `np.asarray` gives would be in use as long as there is the image.
        """
        if not self._is_on_cpu:
            return [np.asarray(image) for image in images]
        if self._can_reuse:
            self.donated = images
        return [np.from_dlpack(cast(Any, image)) for image in images]


@ft.partial(jax.jit, static_argnums=0)
def _blank(shape: tuple[int, ...]) -> Float[Array, "frames _height _width"]:
    return jnp.zeros(shape, jnp.float32)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def _placed(buffer: np.ndarray, chunk: np.ndarray) -> Shaped[np.ndarray, "..."]:
    is_aligned = chunk.ctypes.data % _ALIGNMENT_BYTES == 0
    if is_aligned and chunk.flags.c_contiguous:
        return chunk
    np.copyto(buffer, chunk)
    return buffer


def run_window(
    name: str,
    estimate: Callable[..., Estimates],
    chunks: Sequence[np.ndarray],
    window: Window,
    weights: Sequence[np.ndarray | None] = (),
    buffers: Buffers | None = None,
) -> tuple[list[Shaped[Array, "frames _height _width"]], Counts]:
    """Estimates the frames `low` to `high` of a window, which the chunks hold, with weights
    if there are any. The counts are of the frames that are kept.

    **Raises:**

    `MovieError` with the movie's name and the frames, whatever goes wrong.
    """
    try:
        frames = [checked_frames(chunk) for chunk in chunks]
        masks = [None if mask is None else checked_frames(mask) for mask in weights]
        donated = None
        if buffers is not None:
            frames = buffers.place(frames)
            donated = buffers.donated
        images, *flags = estimate(frames, masks, donated)
        # Surfaces errors of JAX here, where they are named.
        jax.block_until_ready(images)
        is_finite, is_clipped = (
            None if flag is None else np.asarray(flag)[window.kept] for flag in flags
        )
    except Exception as error:
        raise MovieError(
            f"{name}: frames {window.start} to {window.stop - 1} cannot be estimated "
            f"({one_line(error)})"
        ) from error
    nonfinite = [] if is_finite is None else np.flatnonzero(~is_finite)
    if len(nonfinite) and images[0].dtype == np.uint16:
        raise MovieError(
            f"{name}: the background of frame {window.start + nonfinite[0]} is not finite, "
            "and uint16 has no number for that; write float32"
        )
    clipped_frames = 0 if is_clipped is None else int(is_clipped.sum())
    return images, Counts(len(nonfinite), clipped_frames)

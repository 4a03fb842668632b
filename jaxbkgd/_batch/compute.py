"""What is made of the frames of one window: one compiled program, its memory and errors."""

import contextlib
import functools as ft
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.errors import JaxRuntimeError
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._estimators.background import Background
from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._estimators.channels import as_frames, checked_frames
from .._estimators.checks import check_choice, checked_count, checked_number
from .._estimators.spatial_mean import SpatialMean
from .._filter.nonfinite import zeros_of
from .._filter.vectors import compiler_options
from .._movies.movie import MovieError, one_line
from .._workers import run_interruptibly
from .plan import Window


_Tree = TypeVar("_Tree")

Quantity = Literal["background", "residual", "snr"]
# As uint16, a background is rounded to the nearest number, to the even one of two.
Dtype = Literal["float32", "uint16"]

# JAX reads a NumPy array in place if it begins at a multiple of this, and else copies it.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Output:
    """What is made of the frames; `pedestal` is added in the end."""

    quantity: Quantity
    dtype: Dtype
    pedestal: float = 0.0


def check_estimator(estimator: Any, weights: Any) -> None:
    """Refuses what is no estimator, or takes no weights where there are some."""
    if not isinstance(estimator, AbstractEstimator):
        rule = "An estimator is needed, as jaxbkgd.SpatialMean(7.0)"
        raise TypeError(f"{rule}, but got {estimator!r}.")
    if weights is not None and not estimator.takes_weights:
        kind = type(estimator).__name__
        raise TypeError(f"{kind} takes no weights; leave them out, or use LocalMean.")
    checked_count(f"{type(estimator).__name__}.halo_frames", estimator.halo_frames, 0)


def on_one_device(arrays: _Tree) -> _Tree:
    """Parameters and maps for threads that work on a device each. Training, and what is
    made within `jax.set_mesh`, leaves them on several."""

    def moved(leaf: Any) -> Any:
        is_on_several = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return jnp.asarray(np.asarray(leaf)) if is_on_several else leaf

    # Another thread is outside of the mesh.
    return run_interruptibly(jax.tree.map, moved, arrays)


def make_output(
    quantity: Quantity,
    dtype: Dtype,
    cameras: Sequence[Camera],
    pedestal: int | float = 0.0,
) -> Output:
    """Checks what a user has given."""
    check_choice("quantity", quantity, Quantity)
    check_choice("dtype", dtype, Dtype)
    if quantity == "snr":
        for camera in cameras:
            camera.known_gain("An SNR")
    pedestal = checked_number("pedestal", pedestal, minimum=-math.inf, unit="ADU")
    is_signed = quantity == "snr" or (quantity == "residual" and pedestal <= 0)
    if is_signed and dtype == "uint16":
        remedy = (
            "give a pedestal, the offset plus the mean background, or "
            if quantity == "residual"
            else ""
        )
        rule = f"is negative in places, and uint16 is not; {remedy}write float32."
        raise ValueError(f"A {quantity} {rule}")
    return Output(quantity, dtype, pedestal)


def check_fit(
    estimator: AbstractEstimator,
    output: Output,
    cameras: Sequence[Camera],
    frames: Sequence[tuple[tuple[int, ...], Any]],
    weights: Sequence[tuple[int, ...] | None],
) -> None:
    """Raises now what `estimate_window` would raise in the middle of the work: of frames
    (shape, dtype) and weights (shape) of each channel."""
    stacks = [
        jax.ShapeDtypeStruct(shape, as_frames(np.zeros((1, 1, 1), dtype)).dtype)
        for shape, dtype in frames
    ]
    masks = [
        None if shape is None else jax.ShapeDtypeStruct(shape, np.float32)
        for shape in weights
    ]
    eqx.filter_eval_shape(estimate_window, estimator, stacks, output, cameras, masks)


# Images of each channel; the light of each where the estimator measures it; and the frames
# with a pixel that is not finite, or is clipped, in any channel, where that can happen.
_Flags = Bool[Array, " frames"] | None
_Lights = list[Float[Array, "*rank frames"] | None]
Estimates = tuple[list[Shaped[Array, "frames _height _width"]], _Lights, _Flags, _Flags]


def estimate_window(
    estimator: AbstractEstimator,
    channels: Sequence[Any],
    output: Output,
    cameras: Sequence[Camera],
    weights: Sequence[Any] = (),
    donated: list[Float[Array, "frames _height _width"]] | None = None,
) -> Estimates:
    """Estimates the frames (frames, height, width) of each channel in JAX."""
    masks = list(weights) or [None] * len(channels)
    of_each = zip(cameras, map(as_frames, channels), masks, strict=True)
    prepared = [prepared_by(*of_one, estimator.takes_weights) for of_one in of_each]
    stacks, weights = map(list, zip(*prepared, strict=True))
    is_weighted = any(mask is not None for mask in weights)
    background = estimator(stacks, weights if is_weighted else None, donated=donated)
    return make_estimates(background, stacks, output, cameras, is_weighted=is_weighted)


def prepared_by(
    camera: Camera, frames: Array, mask: Any, takes_weights: bool = True
) -> tuple[Array, Any]:
    """Frames as they are estimated, and their weights."""
    frames = camera.even_light(frames)
    if camera.shape:
        # Made by themselves, and so rounded alike in every program.
        frames = lax.optimization_barrier(frames)
    if not takes_weights:
        return frames, mask
    weights = camera.weights(frames, mask)
    return frames, lax.optimization_barrier(weights) if camera.shape else weights


def make_estimates(
    background: Background,
    stacks: list[Shaped[Array, "frames _height _width"]],
    output: Output,
    cameras: Sequence[Camera],
    *,
    is_weighted: bool,
) -> Estimates:
    """What is made of the background of a list of frames that cameras have prepared."""
    if output.quantity != "background" or output.pedestal:
        # Otherwise a product could be added before it is rounded, in some programs alone.
        background, stacks = lax.optimization_barrier((background, stacks))
    images = background.bkgds
    if output.quantity == "residual":
        images = background.residuals(stacks)
    elif output.quantity == "snr":
        images = background.snr(
            stacks, [c if c.is_even else c.of_electrons for c in cameras]
        )
    if output.quantity != "snr":
        images = [c.in_adu(image) for c, image in zip(cameras, images, strict=True)]
    if output.pedestal:
        images = [image + np.float32(output.pedestal) for image in images]
    is_nonfinite = is_clipped = None
    has_floats = any(jnp.issubdtype(stack.dtype, jnp.floating) for stack in stacks)
    # Where no pixel counts, there is no background.
    if is_weighted or has_floats or output.quantity == "snr":
        is_nonfinite = _in_any([~jnp.isfinite(zeros_of(image)) for image in images])
    if output.dtype == "uint16":
        rounded = [jnp.round(image) for image in images]
        images = [jnp.clip(image, 0, 2**16 - 1) for image in rounded]
        is_clipped = _in_any([a != b for a, b in zip(rounded, images, strict=True)])
    images = [image.astype(output.dtype) for image in images]
    return images, background.illumination, is_nonfinite, is_clipped


def _in_any(pixels: list[Bool[Array, "frames _height _width"]]) -> Bool[Array, " frames"]:
    return jnp.stack([of_channel.any((-2, -1)) for of_channel in pixels]).any(0)


def compile_estimate(
    estimator: AbstractEstimator, output: Output, cameras: Sequence[Camera]
) -> Callable[..., Estimates]:
    """`estimate_window` of channels, weights and `donated`, whose memory it takes. Unlike
    `eqx.filter_jit`, it looks at the estimator now and not in each call."""
    arrays, rest = eqx.partition((estimator, tuple(cameras)), eqx.is_array)
    return ft.partial(_compile(rest, output), arrays)


@ft.lru_cache
def _compile(rest: Any, output: Output) -> Callable[..., Estimates]:
    def estimate(arrays, channels, weights, donated):
        estimator, cameras = eqx.combine(arrays, rest)
        return estimate_window(estimator, channels, output, cameras, weights, donated)

    # Sums over narrow frames are rounded by the width of vectors, which plain calls leave
    # to XLA but in the filter.
    is_filter = isinstance(rest[0], SpatialMean)
    options = compiler_options() if is_filter else None
    return jax.jit(estimate, donate_argnames="donated", compiler_options=options)


def can_donate(
    estimator: AbstractEstimator, output: Output, cameras: Sequence[Camera]
) -> bool:
    """Whether on a CPU results may be written over those of the chunk before."""
    is_plain = (output.quantity, output.dtype) == ("background", "float32")
    is_plain &= not any(camera.shape for camera in cameras)
    return is_plain and not output.pedestal and estimator.takes_donated


class Estimated(NamedTuple):
    """What there is of the frames kept of a window: images and light of each channel, and
    how many of the frames have a pixel that is not finite, or is clipped."""

    images: list[np.ndarray]
    lights: list[Float[np.ndarray, "*rank frames"] | None]
    counts: Int[np.ndarray, "2"]


class Buffers:
    """Memory of a CPU that is used for chunk after chunk of one dtype, by one thread at a
    time: the first use of each new page costs a fault."""

    def __init__(self, can_donate: bool) -> None:
        self._can_donate = can_donate
        self._frames: list[np.ndarray] = []
        self.donated: list[Array] | None = None

    def place(self, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The chunks of each channel where JAX reads them in place, until the next call."""
        # The last chunks of a movie that has grown may be longer.
        if [f.shape for f in self._frames] != [chunk.shape for chunk in chunks]:
            self._frames = list(map(_aligned_empty, chunks))
            if self._can_donate:
                self.donated = [jnp.zeros(chunk.shape, jnp.float32) for chunk in chunks]
        for frames, chunk in zip(self._frames, chunks, strict=True):
            np.copyto(frames, chunk)
        return self._frames

    def as_numpy(self, images: list[Array]) -> list[np.ndarray]:
        """Results without a copy, to be donated to the next chunk. (Those of `np.asarray`
        would be in use, and not written over, as long as there is the image.)"""
        if self._can_donate:
            self.donated = images
        return [np.from_dlpack(cast(Any, image)) for image in images]


def _aligned_empty(chunk: np.ndarray) -> np.ndarray:
    memory = np.empty(chunk.nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + chunk.nbytes].view(chunk.dtype).reshape(chunk.shape)


def run_window(
    name: str,
    estimate: Callable[..., Estimates],
    chunks: Sequence[np.ndarray],
    window: Window,
    weights: Sequence[np.ndarray | None] = (),
    buffers: Buffers | None = None,
) -> Estimated:
    """Estimates a window, of which the chunks hold the frames seen."""
    with naming_errors(name, window):
        frames = [np.asarray(checked_frames(chunk)) for chunk in chunks]
        masks = [None if mask is None else checked_mask(mask) for mask in weights]
        if buffers is not None:
            frames = buffers.place(frames)
        images, lights, *flags = estimate(frames, masks, buffers and buffers.donated)
        # Surfaces errors of JAX here, where they are named.
        jax.block_until_ready(images)
        arrays = buffers.as_numpy(images) if buffers else list(map(np.asarray, images))
    return as_estimated(name, window, arrays, lights, flags)


class OutOfMemory(MovieError):
    """A device has no memory for a chunk."""


@contextlib.contextmanager
def naming_errors(name: str, window: Window) -> Iterator[None]:
    """Errors within this are of the window's frames, unless they say it themselves."""
    try:
        yield
    except MovieError:
        raise
    except Exception as error:
        what = f"frames {window.start} to {window.stop - 1} cannot be estimated"
        text = f"{name}: {what} ({one_line(error)})"
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(text) from error
        raise MovieError(text) from error


def as_estimated(
    name: str,
    window: Window,
    images: Sequence[Shaped[np.ndarray, "frames _height _width"]],
    lights: Sequence[Any],
    flags: Sequence[Any],
) -> Estimated:
    """What is kept of a window's estimates."""
    nonfinite, clipped = (
        np.flatnonzero([] if flag is None else np.asarray(flag)[window.kept])
        for flag in flags
    )
    if len(nonfinite) and images[0].dtype == np.uint16:
        what = f"the result of frame {window.start + nonfinite[0]} is not finite"
        raise MovieError(f"{name}: {what}, as uint16 has to be; write float32")
    return Estimated(
        [image[window.kept] for image in images],
        [
            None if light is None else np.asarray(light)[..., window.kept]
            for light in lights
        ],
        np.array([len(nonfinite), len(clipped)]),
    )


def checked_mask(mask: Any) -> Shaped[np.ndarray, "frames height width"]:
    """Weights as a movie has them; `ValueError` for those that are no weights."""
    weights = np.asarray(checked_frames(mask))
    if not np.all((weights >= 0) & (weights < np.inf)):
        raise ValueError("weights are negative or not finite; give booleans, or 0 and more")
    return weights

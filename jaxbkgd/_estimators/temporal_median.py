"""The median of each pixel over time: the background of `smlmlp.bkgd_temporal_median`."""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Shaped

from .._filter.kernels import Image
from .background import Background
from .base import AbstractEstimator
from .channels import working_dtype
from .checks import check_choice, checked_count, is_known


MedianNoise = Literal["exact", "unit"]
_Stack = Float[Array, "frames height width"]


class TemporalMedian(AbstractEstimator):
    """The background of each pixel: its median over the frames at most `half_window_frames`
    away, which is that of `smlmlp.bkgd_temporal_median`.

    At either end of the movie there are fewer frames; if their number is even, the two
    middle values are averaged. A NaN reaches the frames whose window covers it, and no
    others. Nothing is learned; frames that are equal share their gradient.
    """

    half_window_frames: int = eqx.field(static=True)
    noise: MedianNoise = eqx.field(static=True)

    _saved_names = ("half_window_frames", "noise")

    def __init__(self, half_window_frames: int = 25, *, noise: MedianNoise = "exact"):
        """**Arguments:**

        - `half_window_frames`: the frames on either side of one, so that the window has
            `2 * half_window_frames + 1`; smlmlp's `median_window_fr`.
        - `noise`: `"exact"` for the noise factor of white Gaussian noise, away from the
            movie's ends; `"unit"` for 1, which smlmlp gives.

        **Raises:** `ValueError` for a number that is not whole or below 0, and for an
        unknown `noise`.
        """
        self.half_window_frames = checked_count(
            "half_window_frames", half_window_frames, 0, "a window of 51 frames has 25"
        )
        check_choice("noise", noise, MedianNoise)
        self.noise = noise

    @property
    def halo_frames(self) -> int:
        """`half_window_frames`."""
        return self.half_window_frames

    def estimate_stack(self, frames: Shaped[Array, "*batch height width"]) -> Background:
        """The background of one stack; a single frame is its own median."""
        noise = 1.0 if self.noise == "unit" else _exact_noise(self.half_window_frames)
        bkgds = frames = frames.astype(working_dtype(frames))
        if frames.ndim > 2 and frames.size:
            reach, count = self.half_window_frames, frames.shape[-3]
            # No window reaches farther than a movie whose length is known.
            bkgds = _medians(frames, min(reach, count - 1) if is_known(count) else reach)
        return Background(bkgds, jnp.asarray(noise, bkgds.dtype))


@ft.partial(jax.jit, static_argnames="reach")
def _medians(frames: Image, reach: int) -> Image:
    median = jnp.vectorize(ft.partial(_median, reach), signature="(t,y,x)->(t,y,x)")
    return median(frames)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _median(reach: int, frames: _Stack) -> _Stack:
    return _of_middles(lambda lower, upper: (lower + upper) / 2, reach, frames)


@_median.defjvp
def _median_jvp(reach, primals, tangents):
    """The frames are compared with the middle values one shift after another, so that no
    more than a few stacks are held, in the reverse direction too."""
    (frames,), (changes,) = primals, tangents
    middles = jnp.stack(_of_middles(lambda *middles: middles, reach, frames))
    around = ((reach, reach), (0, 0), (0, 0))
    frames = jnp.pad(frames, around, constant_values=jnp.nan)
    changes = jnp.pad(changes, around)

    @jax.checkpoint
    def add(sums, shift):
        total, count = sums
        near, change = (
            lax.dynamic_slice_in_dim(stack, shift, middles.shape[1])
            for stack in (frames, changes)
        )
        is_middle = near[None] == middles
        return (total + jnp.where(is_middle, change[None], 0), count + is_middle), None

    zeros = jnp.zeros_like(middles)
    (total, count), _ = lax.scan(add, (zeros, zeros), jnp.arange(2 * reach + 1))
    return middles.mean(0), (total / jnp.maximum(count, 1)).mean(0)


def _of_middles(function: Callable[[Array, Array], Any], reach: int, frames: _Stack) -> Any:
    """A function of the two middle values of each window, which are the same if it is odd.

    The window stays sorted as it slides: the frame that leaves closes a gap, and the one
    that enters opens one. Beyond the movie's ends, and for NaN, there is infinity.
    """
    length = frames.shape[0]
    window = 2 * reach + 1

    def frame_at(time):
        is_inside = (time >= 0) & (time < length)
        return jnp.where(is_inside, frames[jnp.clip(time, 0, length - 1)], jnp.inf)

    def slide(state, time):
        values, nan_count = state
        entering, leaving = frame_at(time), frame_at(time - window)
        nan_count += jnp.isnan(entering).astype(int) - jnp.isnan(leaving).astype(int)
        entering, leaving = (
            jnp.where(jnp.isnan(frame), jnp.inf, frame) for frame in (entering, leaving)
        )
        others = jnp.where(values[:-1] < leaving[None], values[:-1], values[1:])
        # Padded once: concatenated, it would run at an eighth of the speed in jax 0.10.
        padded = jnp.pad(others, ((1, 1), (0, 0), (0, 0)), constant_values=jnp.inf)
        below, above = padded[:-1].at[0].set(-jnp.inf), padded[1:]
        values = jnp.maximum(below, jnp.minimum(above, entering[None]))
        count = jnp.minimum(time + 1, length) - jnp.maximum(time + 1 - window, 0)
        middles = (
            jnp.where(nan_count > 0, jnp.nan, values[rank])
            for rank in ((count - 1) // 2, count // 2)
        )
        return (values, nan_count), function(*middles)

    empty = jnp.full((window, *frames.shape[1:]), jnp.inf, frames.dtype)
    none = jnp.zeros(frames.shape[1:], int)
    # A frame's window is full once the last one that it reaches has entered.
    _, answers = lax.scan(slide, (empty, none), jnp.arange(length + reach))
    return jax.tree.map(lambda answer: answer[reach:], answers)


@ft.lru_cache(maxsize=64)
def _exact_noise(radius: int) -> float:
    """`sqrt(1 - 2 / n + v)`, with the variance v of the median of n normal numbers, whose
    covariance with each of these is `1 / n` (Basu's theorem)."""
    with jax.ensure_compile_time_eval():
        x = jnp.linspace(-8, 8, 4001)
        # Of the middle one of sorted values, with `radius` on either side.
        log_density = -(x**2) / 2 + radius * (log_ndtr(x) + log_ndtr(-x))
        variance = float(jnp.sum(x**2 * jax.nn.softmax(log_density)))
    return float(np.sqrt(max(0, 1 - 2 / (2 * radius + 1) + variance)))

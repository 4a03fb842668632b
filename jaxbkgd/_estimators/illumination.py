"""The light of each frame: one number a frame, where nothing else is known of it."""

import functools as ft

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._filter.kernels import GaussianKernel
from .._filter.primitive import temporal_filter
from .smoothing import ratio


# Light that scatters by more than so many times its own noise is not steady.
_STEADY_VARIANCES = 1.5


def average_steady_light(
    light: Float[Array, " frames"],
    variance: Float[Array, " frames"],
    is_seen: Bool[Array, " frames"],
    radius_frames: Float[Array, ""],
    kernel: GaussianKernel,
) -> Float[Array, " frames"]:
    """The light, moved towards its mean over time by as much as its noise explains its
    scatter about that mean: where it flickers or pulses not at all, where it is steady
    altogether (James and Stein, Proc. 4th Berkeley Symp. 1, 361, 1961).

    **Arguments:**

    - `light`: as measured; not positive where the frame does not count.
    - `variance`: of its noise.
    - `is_seen`: whether any pixel of a frame counts; the others have the mean.
    - `radius_frames`, `kernel`: of the Gaussian that it is averaged with.
    """
    is_lit = (light > 0).astype(light.dtype)
    means = ft.partial(means_over_time, is_lit, radius_frames, kernel)
    smooth, own_variance = means(light, variance)
    (scatter,) = means(jnp.square(light - smooth))
    own = jnp.maximum(1 - ratio(_STEADY_VARIANCES * own_variance, scatter), 0)
    own = jnp.where(is_seen, jnp.where(light > 0, own, 1), 0)
    return smooth + own * (light - smooth)


def means_over_time(
    counts: Float[Array, " frames"],
    radius_frames: Float[Array, ""],
    kernel: GaussianKernel,
    *values: Float[Array, " frames"],
) -> list[Float[Array, " frames"]]:
    """The means of values of frames that count so much, zero where none does."""
    rows = jnp.stack([*(v * counts for v in values), counts])[..., None, None]
    sums = temporal_filter(rows, radius_frames, kernel, "empty", is_finite=True)
    *of_values, total = sums[..., 0, 0]
    return [ratio(of_one, total) for of_one in of_values]

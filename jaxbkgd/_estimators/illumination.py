"""The light of each frame: one number a frame, where nothing else is known of it."""

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

    def means(*values: Float[Array, " frames"]) -> list[Float[Array, " frames"]]:
        both = jnp.stack([*(v * is_lit for v in values), is_lit])[..., None, None]
        sums = temporal_filter(both, radius_frames, kernel, "empty", is_finite=True)
        *of_values, lit = sums[..., 0, 0]
        return [ratio(of_one, lit) for of_one in of_values]

    is_lit = (light > 0).astype(light.dtype)
    smooth, own_variance = means(light, variance)
    (scatter,) = means(jnp.square(light - smooth))
    own = jnp.maximum(1 - ratio(_STEADY_VARIANCES * own_variance, scatter), 0)
    own = jnp.where(is_seen, jnp.where(light > 0, own, 1), 0)
    return smooth + own * (light - smooth)

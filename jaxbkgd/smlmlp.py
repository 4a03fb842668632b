"""`bkgd_spatial_mean` with the contract of smlmlp's, for those who come from there."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._estimators.base import as_frames
from ._estimators.checks import is_traced
from ._estimators.radii import channel_radii
from ._estimators.spatial_mean import filter_frames, KernelPair
from ._filter.kernels import GaussianKernel, half_width, noise_factor


def bkgd_spatial_mean(
    channels: Sequence[Any],
    /,
    channels_mean_radii_pix: Any = 7.0,
    bkgds: Sequence[Any] | None = None,
    noise_corrections: Any = None,
    *,
    cuda: bool = False,
    parallel: bool = False,
) -> tuple[list[Any], Any, dict[str, list]]:
    """A drop-in for `smlmlp.bkgd_spatial_mean` (0.1.20) that runs in JAX.

    The numbers are the reference's, its "separable" noise factor included, which is too
    small; see [`jaxbkgd.noise_correction`][] for the exact one. Unlike in the reference's
    code, but as in its documentation, two channels may share a (y, x) pair.

    **Arguments:**

    - `channels`: stacks `(frames, height, width)`, NumPy or JAX arrays of any real dtype,
        each of its own shape.
    - `channels_mean_radii_pix`: the averaging radius in pixels: a number for all, a
        `(y, x)` pair for all, or a sequence with one of these for each channel. Two
        numbers are a pair.
    - `bkgds`: float32 NumPy arrays to write the backgrounds to, one a channel, with as many
        frames or more, of which the first ones are used.
    - `noise_corrections`: noise factors so far, one a channel, into which the new ones are
        multiplied in place. By default 1.
    - `cuda`: compute on the GPU. By default on JAX's default device.
    - `parallel`: accepted for compatibility; it changes nothing.

    **Returns:**

    `(bkgds, noise_corrections, info)`: the backgrounds in float32, JAX arrays for JAX
    channels without `bkgds` and NumPy arrays otherwise; the noise factors; and a dictionary
    with a list for each of `channels_mean_radii_pix`, `spatial_mean_sigmas`, and
    `spatial_mean_kernels_y` and `_x`, which are those of the residual, `delta - g`.

    **Raises:**

    `TypeError` or `ValueError` for input that does not fit together, before anything is
    written; `RuntimeError` for `cuda=True` where JAX has no GPU.

    !!! example

        ```python
        >>> import numpy as np
        >>> from jaxbkgd.smlmlp import bkgd_spatial_mean
        >>> channels = [np.ones((4, 16, 16), np.uint16), np.ones((4, 20, 12), np.uint16)]
        >>> bkgds, noise_corrections, info = bkgd_spatial_mean(channels, (6.0, 10.0))
        >>> bkgds[1].shape
        (4, 20, 12)
        >>> info["channels_mean_radii_pix"]
        [(6.0, 10.0), (6.0, 10.0)]

        ```
    """
    channels = _require_count("channels", channels)
    stacks = [_as_stack(index, channel) for index, channel in enumerate(channels)]
    if not stacks:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    radii = _pairs(channels_mean_radii_pix, len(stacks))
    outputs = None if bkgds is None else _checked_outputs(bkgds, stacks)
    factors = _checked_corrections(noise_corrections, len(stacks))
    device = _gpu() if cuda else None

    kernels = [(_kernel(y), _kernel(x)) for y, x in radii]
    with jax.ensure_compile_time_eval():
        # Concrete even where the channels are traced.
        rows = [jnp.asarray(pair, jnp.float32) for pair in radii]
        taps = [_taps_and_noise(*entry) for entry in zip(rows, kernels, strict=True)]
    estimates = [
        filter_frames(jax.device_put(stack, device), row, pair)
        for stack, row, pair in zip(stacks, rows, kernels, strict=True)
    ]
    if outputs is None:
        outputs = [
            estimate if isinstance(channel, jax.Array) else np.array(estimate)
            for channel, estimate in zip(channels, estimates, strict=True)
        ]
    else:
        # Only now, since an output may lie in the memory of a channel.
        for output, estimate in zip(outputs, jax.block_until_ready(estimates), strict=True):
            output[...] = estimate
    for index, (_, _, factor) in enumerate(taps):
        factors[index] *= np.float32(factor)
    info = {
        "channels_mean_radii_pix": radii,
        "spatial_mean_sigmas": [(y / 2, x / 2) for y, x in radii],
        "spatial_mean_kernels_y": [_residual_kernel(y) for y, _, _ in taps],
        "spatial_mean_kernels_x": [_residual_kernel(x) for _, x, _ in taps],
    }
    return outputs, factors, info


def _as_stack(index: int, channel: Any) -> Shaped[Array, "frames height width"]:
    frames = as_frames(channel)
    if frames.ndim != 3:
        raise ValueError(
            "Each channel must be a stack (frames, height, width), but channel "
            f"{index} has shape {frames.shape}; give a list of stacks, one a channel."
        )
    return frames.astype(jnp.float32) if frames.dtype == jnp.float64 else frames


def _pairs(radii_pix: Any, count: int) -> list[tuple[float, float]]:
    radii = channel_radii(radii_pix)
    is_number = not isinstance(radii_pix, list | tuple) and np.ndim(radii_pix) == 0
    is_pair = not is_number and radii.shape == (1, 2) and len(radii_pix) == 2
    if not (is_number or is_pair or radii.shape[0] == count):
        raise ValueError(
            f"There are radii for {radii.shape[0]} channels, but {count} channels; give "
            "a number, a (y, x) pair, or one of these for each channel."
        )
    if is_traced(radii):
        raise ValueError(
            "The radii must be known, but are traced; `jaxbkgd.SpatialMean` is the "
            "estimator whose radii are differentiated."
        )
    return [(float(y), float(x)) for y, x in np.broadcast_to(radii, (count, 2))]


def _checked_outputs(bkgds: Any, stacks: list[Array]) -> list[np.ndarray]:
    _require_count("bkgds", bkgds, len(stacks))
    for index, (bkgd, stack) in enumerate(zip(bkgds, stacks, strict=True)):
        kind = bkgd.dtype if isinstance(bkgd, np.ndarray) else type(bkgd).__name__
        if not isinstance(bkgd, np.ndarray) or bkgd.dtype != np.float32:
            raise TypeError(
                f"bkgds[{index}] must be a NumPy array of float32, but is {kind}."
            )
        is_fitting = bkgd.shape[1:] == stack.shape[1:] and len(bkgd) >= len(stack)
        if not is_fitting or not bkgd.flags.writeable:
            raise ValueError(
                f"bkgds[{index}] must be writable and have the shape {stack.shape} of its "
                f"channel, or more frames, but {bkgd.shape} is its shape"
                f"{'' if bkgd.flags.writeable else ', and it is read-only'}."
            )
    return [bkgd[: len(stack)] for bkgd, stack in zip(bkgds, stacks, strict=True)]


def _checked_corrections(noise_corrections: Any, count: int) -> Any:
    if noise_corrections is None:
        return [np.float32(1)] * count
    is_array = (
        isinstance(noise_corrections, np.ndarray) and noise_corrections.flags.writeable
    )
    numbers = np.asarray(noise_corrections)
    # An array of integers would round what is multiplied into it.
    is_number = not numbers.size or numbers.dtype.kind in ("f" if is_array else "iuf")
    if not (is_array or isinstance(noise_corrections, list)) or not is_number:
        raise TypeError(
            "noise_corrections are updated in place and must be a list of numbers or a "
            f"writable array of floating-point numbers, but are {noise_corrections!r}."
        )
    if numbers.shape != (count,):
        raise ValueError(
            f"There are {count} channels, but noise_corrections of shape "
            f"{numbers.shape}; give one number for each channel."
        )
    return noise_corrections


def _require_count(name: str, values: Any, count: int | None = None) -> list[Any]:
    if not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a list, one entry a channel, but is {values!r}.")
    if len(values) != (len(values) if count is None else count):
        raise ValueError(
            f"There are {count} channels, but {len(values)} arrays in {name}; give one for "
            "each channel."
        )
    return list(values)


def _gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise RuntimeError(
            "cuda=True asks for a GPU, but JAX has none here; install `jax[cuda]` on a "
            "machine with one, or leave cuda=False."
        ) from error


def _kernel(radius_pix: float) -> GaussianKernel:
    # The reference has more taps, which are zero, but spread what is not finite.
    support = half_width(radius_pix, "hard")
    count = math.ceil(6 * (radius_pix / 2)) // 2
    return GaussianKernel(support, "hard", zero_taps=count - support)


@ft.partial(jax.jit, static_argnums=1)
def _taps_and_noise(
    radii: Float[Array, "2"], kernels: KernelPair
) -> tuple[Float[Array, " y"], Float[Array, " x"], Float[Array, ""]]:
    y, x = (kernel.taps(radius) for kernel, radius in zip(kernels, radii, strict=True))
    return y, x, noise_factor([y, x], "separable")


def _residual_kernel(taps: Float[Array, " taps"]) -> Float[np.ndarray, " lags"]:
    """`delta - g`, whose taps are given from the centre outwards."""
    kernel = -np.concatenate([np.asarray(taps)[:0:-1], taps])
    kernel[taps.size - 1] += 1
    return kernel

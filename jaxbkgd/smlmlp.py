"""`bkgd_spatial_mean` with the contract of smlmlp's, for those who come from there."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._estimators.base import as_frames
from ._estimators.radii import channel_radii
from ._estimators.spatial_mean import filtered
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

    The numbers are the reference's, its noise factor "separable" included, which is too
    small; see [`jaxbkgd.noise_correction`][] for the exact one. One thing differs: two
    channels may share a (y, x) pair, as the reference's documentation says and its code
    does not do.

    **Arguments:**

    - `channels`: a sequence of stacks `(frames, height, width)`, NumPy or JAX arrays of
        any real dtype, each of its own shape.
    - `channels_mean_radii_pix`: the averaging radius in pixels: a number for all, a
        `(y, x)` pair for all, or a sequence with one number or pair for each channel.
        Two numbers are a pair.
    - `bkgds`: float32 NumPy arrays to write the backgrounds to, one a channel. One with
        more frames than its channel is cut to the channel's.
    - `noise_corrections`: noise factors so far, one a channel; the new factors are
        multiplied into them in place. By default 1.
    - `cuda`: compute on the GPU. By default on JAX's default device.
    - `parallel`: accepted for compatibility; it changes nothing, and one core does most of
        the work either way.

    **Returns:**

    `(bkgds, noise_corrections, info)`: the backgrounds in float32, NumPy arrays for
    NumPy channels or where `bkgds` were given and JAX arrays for JAX channels; the noise
    factors; and a dictionary with a list for each of `channels_mean_radii_pix`,
    `spatial_mean_sigmas`, `spatial_mean_kernels_y` and `spatial_mean_kernels_x`, the
    kernels being those of the residual, `delta - g`.

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
    channels = list(_checked_sequence("channels", channels))
    stacks = [_as_stack(channel, index) for index, channel in enumerate(channels)]
    if not stacks:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    radii = _pairs(channels_mean_radii_pix, len(stacks))
    outputs = _checked_outputs(bkgds, stacks)
    factors = _checked_corrections(noise_corrections, len(stacks))
    device = _gpu() if cuda else None

    kernels = [tuple(_kernel(radius) for radius in pair) for pair in radii]
    with jax.ensure_compile_time_eval():
        # Known even where the channels are traced.
        rows = [jnp.asarray(pair, jnp.float32) for pair in radii]
        taps_y, taps_x, noise = zip(
            *(_taps_and_noise(row, pair) for row, pair in zip(rows, kernels, strict=True)),
            strict=True,
        )
    estimates = [
        filtered(jax.device_put(stack, device), row, pair)
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
    for index, factor in enumerate(noise):
        factors[index] *= np.float32(factor)
    info = {
        "channels_mean_radii_pix": radii,
        "spatial_mean_sigmas": [(y / 2, x / 2) for y, x in radii],
        "spatial_mean_kernels_y": [_residual_kernel(row) for row in taps_y],
        "spatial_mean_kernels_x": [_residual_kernel(row) for row in taps_x],
    }
    return outputs, factors, info


def _as_stack(channel, index):
    frames = as_frames(channel)
    if frames.ndim != 3:
        raise ValueError(
            "Each channel must be a stack (frames, height, width), but channel "
            f"{index} has shape {frames.shape}; give a list of stacks, one a channel."
        )
    return frames.astype(jnp.float32) if frames.dtype == jnp.float64 else frames


def _pairs(channels_mean_radii_pix, count) -> list[tuple[float, float]]:
    radii = channel_radii(channels_mean_radii_pix)
    shape = getattr(channels_mean_radii_pix, "shape", None)
    is_number = shape == () or not hasattr(channels_mean_radii_pix, "__len__")
    is_pair = not is_number and radii.shape == (1, 2) and len(channels_mean_radii_pix) == 2
    if not (is_number or is_pair or radii.shape[0] == count):
        raise ValueError(
            f"There are radii for {radii.shape[0]} channels, but {count} channels; give "
            "a number, a (y, x) pair, or one of these for each channel."
        )
    if not isinstance(radii, np.ndarray):
        raise ValueError(
            "The radii must be known, but are traced; `jaxbkgd.SpatialMean` is the "
            "estimator whose radii are differentiated."
        )
    return [(float(y), float(x)) for y, x in np.broadcast_to(radii, (count, 2))]


def _checked_outputs(bkgds, stacks) -> list[np.ndarray] | None:
    if bkgds is None:
        return None
    if len(_checked_sequence("bkgds", bkgds)) != len(stacks):
        raise ValueError(
            f"There are {len(stacks)} channels, but {len(bkgds)} arrays in bkgds; give "
            "one for each channel."
        )
    for index, (bkgd, stack) in enumerate(zip(bkgds, stacks, strict=True)):
        name = f"bkgds[{index}]"
        if not isinstance(bkgd, np.ndarray) or bkgd.dtype != np.float32:
            kind = getattr(bkgd, "dtype", type(bkgd).__name__)
            raise TypeError(f"{name} must be a NumPy array of float32, but is {kind}.")
        if not bkgd.flags.writeable:
            raise ValueError(f"{name} is read-only; give an array that can be written.")
        if bkgd.shape[1:] != stack.shape[1:] or len(bkgd) < len(stack):
            raise ValueError(
                f"{name} must have the shape {stack.shape} of its channel, or more "
                f"frames, but its shape is {bkgd.shape}."
            )
    return [bkgd[: len(stack)] for bkgd, stack in zip(bkgds, stacks, strict=True)]


def _checked_corrections(noise_corrections, count) -> Any:
    if noise_corrections is None:
        return [np.float32(1)] * count
    if isinstance(noise_corrections, np.ndarray):
        # An array of integers would round what is multiplied into it.
        is_mutable, kinds = noise_corrections.flags.writeable, "f"
    else:
        is_mutable, kinds = isinstance(noise_corrections, list), "iuf"
    if not is_mutable:
        raise TypeError(
            "noise_corrections are updated in place and must be a list or a writable "
            f"NumPy array, but are {noise_corrections!r}."
        )
    numbers = np.asarray(noise_corrections)
    if numbers.dtype.kind not in kinds and numbers.size:
        raise TypeError(
            f"noise_corrections must be floating-point numbers, but are "
            f"{noise_corrections!r}."
        )
    if numbers.shape != (count,):
        raise ValueError(
            f"There are {count} channels, but noise_corrections of shape "
            f"{numbers.shape}; give one number for each channel."
        )
    return noise_corrections


def _checked_sequence(name: str, value: Any) -> Any:
    if not hasattr(value, "__len__"):
        raise TypeError(
            f"{name} must be a list with one entry a channel, but is {value!r}."
        )
    return value


def _gpu():
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        raise RuntimeError(
            "cuda=True asks for a GPU, but JAX has none here; install `jax[cuda]` on a "
            "machine with one, or leave cuda=False."
        ) from error


def _kernel(radius_pix: float) -> GaussianKernel:
    # The reference has more taps. They are zero, but what is not finite spreads under
    # them too.
    support = half_width(radius_pix, "hard")
    count = math.ceil(6 * (radius_pix / 2)) // 2
    return GaussianKernel(support, "hard", zero_taps=count - support)


@ft.partial(jax.jit, static_argnums=1)
def _taps_and_noise(radii, kernels):
    taps = [kernel.taps(radius) for kernel, radius in zip(kernels, radii, strict=True)]
    return *taps, noise_factor(taps, kind="separable")


def _residual_kernel(taps) -> np.ndarray:
    taps = np.asarray(taps)
    kernel = -np.concatenate([taps[:0:-1], taps])
    kernel[taps.size - 1] += 1
    return kernel

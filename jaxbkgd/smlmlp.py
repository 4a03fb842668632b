"""A drop-in for `bkgd_spatial_mean` of smlmlp, with its contract."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._estimators.channels import as_frames
from ._estimators.radii import channel_radii, rows_of_channels
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

    - `channels`: NumPy or JAX arrays `(frames, height, width)` of any real dtype.
    - `channels_mean_radii_pix`: the averaging radius in pixels: a number for all, a
        `(y, x)` pair for all, or one of these for each channel. Two numbers are a pair.
    - `bkgds`: float32 NumPy arrays to write to, one a channel, of as many frames or more.
    - `noise_corrections`: noise factors so far, one a channel, into which the new ones are
        multiplied in place. By default 1.
    - `cuda`: compute on the GPU. `parallel` changes nothing.

    **Returns:**

    `(bkgds, noise_corrections, info)`: the backgrounds in float32, JAX arrays for JAX
    channels without `bkgds` and NumPy arrays otherwise; the noise factors; and a dictionary
    of lists: `channels_mean_radii_pix`, `spatial_mean_sigmas`, and the kernels of the
    residual, `delta - g`: `spatial_mean_kernels_y` and `spatial_mean_kernels_x`.

    **Raises:**

    `TypeError` or `ValueError` for input that does not fit together, before anything is
    written; `RuntimeError` for `cuda=True` where JAX has no GPU.

    !!! example

        ```python
        >>> import numpy as np
        >>> from jaxbkgd.smlmlp import bkgd_spatial_mean
        >>> channels = [np.ones((4, 16, 16), np.uint16), np.ones((4, 20, 12), np.uint16)]
        >>> bkgds, noise_corrections, info = bkgd_spatial_mean(channels, (6.0, 10.0))
        >>> bkgds[1].shape, info["channels_mean_radii_pix"]
        ((4, 20, 12), [(6.0, 10.0), (6.0, 10.0)])

        ```
    """
    stacks = [_as_stack(index, channel) for index, channel in enumerate(channels)]
    if not stacks:
        raise ValueError("channels is empty; it must hold at least one stack of frames.")
    rows = rows_of_channels(channel_radii(channels_mean_radii_pix), len(stacks))
    radii = [(float(row[0]), float(row[-1])) for row in rows]
    outputs = None if bkgds is None else _checked_outputs(bkgds, stacks)
    factors = _checked_corrections(noise_corrections, len(stacks))
    device = _gpu() if cuda else None

    estimates, residuals = [], []
    for stack, pair in zip(stacks, radii, strict=True):
        kernels = _kernel(pair[0]), _kernel(pair[1])
        with jax.ensure_compile_time_eval():  # concrete where the channels are traced
            row = jnp.asarray(pair, jnp.float32)
            residuals.append(_residual(row, kernels))
        estimates.append(filter_frames(jax.device_put(stack, device), row, kernels))
    if outputs is None:
        outputs = [
            estimate if isinstance(channel, jax.Array) else np.array(estimate)
            for channel, estimate in zip(channels, estimates, strict=True)
        ]
    else:
        # Only now, since an output may lie in the memory of a channel.
        for output, estimate in zip(outputs, jax.block_until_ready(estimates), strict=True):
            output[...] = estimate
    for index, (_, _, factor) in enumerate(residuals):
        factors[index] *= np.float32(factor)
    info = {
        "channels_mean_radii_pix": radii,
        "spatial_mean_sigmas": [(y / 2, x / 2) for y, x in radii],
        "spatial_mean_kernels_y": [np.asarray(y) for y, _, _ in residuals],
        "spatial_mean_kernels_x": [np.asarray(x) for _, x, _ in residuals],
    }
    return outputs, factors, info


def _as_stack(index: int, channel: Any) -> Shaped[Array, "frames height width"]:
    frames = as_frames(channel)
    if frames.ndim != 3:
        shape = f"(frames, height, width), but is {frames.shape}"
        raise ValueError(f"The shape of channels[{index}] must be {shape}; give stacks.")
    return frames.astype(jnp.float32) if frames.dtype == jnp.float64 else frames


def _checked_outputs(bkgds: Sequence[Any], stacks: list[Array]) -> list[np.ndarray]:
    if len(bkgds) != len(stacks):
        counts = f"{len(stacks)} channels, but {len(bkgds)} arrays in bkgds"
        raise ValueError(f"There are {counts}; give one for each channel.")
    for index, (bkgd, stack) in enumerate(zip(bkgds, stacks, strict=True)):
        is_array = isinstance(bkgd, np.ndarray) and bkgd.dtype == np.float32
        is_writable = is_array and bkgd.flags.writeable
        if not is_writable or bkgd.shape[1:] != stack.shape[1:] or len(bkgd) < len(stack):
            kind = f"{getattr(bkgd, 'dtype', type(bkgd))} of shape {np.shape(bkgd)}"
            access = "read-only " if is_array and not is_writable else ""
            raise ValueError(
                f"bkgds[{index}] must be a writable NumPy array of float32 of the shape "
                f"{stack.shape}, or with more frames, but is {access}{kind}."
            )
    return [bkgd[: len(stack)] for bkgd, stack in zip(bkgds, stacks, strict=True)]


def _checked_corrections(noise_corrections: Any, count: int) -> Any:
    if noise_corrections is None:
        return [np.float32(1)] * count
    numbers = np.asarray(noise_corrections)
    is_array = isinstance(noise_corrections, np.ndarray) and numbers.flags.writeable
    # An array of integers would round what is multiplied into it.
    is_list = is_array or isinstance(noise_corrections, list)
    is_number = numbers.dtype.kind in ("f" if is_array else "iuf")
    if not (is_list and is_number and numbers.shape == (count,)):
        raise ValueError(
            "noise_corrections are updated in place and must be a list, or a writable "
            f"floating-point array, of {count} numbers, but are {noise_corrections!r}."
        )
    return noise_corrections


def _gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        remedy = "install `jax[cuda]` on a machine with one, or leave cuda=False"
        raise RuntimeError(f"cuda=True, but JAX has no GPU here; {remedy}.") from error


def _kernel(radius_pix: float) -> GaussianKernel:
    # The reference has more taps, which are zero, but spread what is not finite.
    width = half_width(radius_pix, "hard")
    zeros = math.ceil(3 * radius_pix) // 2 - width
    return GaussianKernel(width, "hard", zero_taps=zeros)


@ft.partial(jax.jit, static_argnums=1)
def _residual(
    radii: Float[Array, "2"], kernels: KernelPair
) -> tuple[Float[Array, " y"], Float[Array, " x"], Float[Array, ""]]:
    """The kernels (y, x) of the residual, `delta - g`, and the noise factor."""
    taps_y, taps_x = (kernel.taps(r) for kernel, r in zip(kernels, radii, strict=True))
    whole = [jnp.concatenate([row[:0:-1], row]) for row in (taps_y, taps_x)]
    y, x = ((-row).at[row.size // 2].add(1) for row in whole)
    return y, x, noise_factor(taps_y, taps_x, "separable")

"""The local mean of each frame by itself: the background of `smlmlp.bkgd_spatial_mean`."""

import functools as ft
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._filter.kernels import (
    Frames,
    GaussianKernel,
    half_width,
    Image,
    noise_factor,
    NoiseKind,
    Truncation,
)
from .._filter.primitive import separable_filter
from .background import Background
from .channels import as_frames, working_dtype
from .checks import check_choice
from .radii import bound_of, channel_radii, check_below, frozen_mask, unbounded_radii
from .radii_estimator import RadiiEstimator
from .residual_noise import ResidualNoise


# The static halves of one channel's kernels, (y, x).
KernelPair = tuple[GaussianKernel, ...]


def spatial_mean(
    frames: Any,
    radius_pix: Any,
    *,
    max_radius_pix: int | float | None = None,
    truncation: Truncation = "hard",
) -> Float[Array, "*batch height width"]:
    """The background of each frame: its mean under a Gaussian of `sigma = radius / 2`.

    Borders repeat the edge pixel. A NaN or an infinity reaches the pixels whose kernel
    covers it, and no others.

    **Arguments:**

    - `frames`: `(..., height, width)`, of any real dtype.
    - `radius_pix`: the averaging radius in pixels, a number or a `(y, x)` pair.
    - `max_radius_pix`: a static bound, which sets the number of taps; required if the
        radius is traced (under `jax.jit` or `jax.grad`).
    - `truncation`: `"hard"`, which is `smlmlp.bkgd_spatial_mean`, or `"smooth"`, which is
        continuous in the radius, for learning.

    **Returns:** the background, of the shape of the frames and in their unit, float64 for
    float64 frames, and float32 for all others.

    **Raises:** `TypeError` or `ValueError` for frames or radii that are not as above.
    """
    frames = as_frames(frames)
    radii, kernels = _radii_and_kernels(radius_pix, max_radius_pix, truncation)
    return filter_frames(frames, radii, kernels)


def noise_correction(
    radius_pix: Any,
    *,
    max_radius_pix: int | float | None = None,
    truncation: Truncation = "hard",
    noise: NoiseKind = "exact",
) -> Float[Array, ""]:
    """The standard deviation of `frame - spatial_mean(frame)` over that of the frame, for
    noise that is independent from pixel to pixel, away from the borders
    ([derivation](how-it-works.md#the-noise-factor)); differentiable in the radius.

    **Arguments** and errors are those of [`jaxbkgd.spatial_mean`][], and

    - `noise`: `"exact"` is the norm of the residual's kernel, `||delta - g_y (x) g_x||`.
        `"separable"`, `||delta - g_y|| ||delta - g_x||`, is what
        `smlmlp.bkgd_spatial_mean` gives; it is too small (0.85 for 0.99 at 7 px).
    """
    check_choice("noise", noise, NoiseKind)
    radii, kernels = _radii_and_kernels(radius_pix, max_radius_pix, truncation)
    return _noise_correction(radii, kernels, noise)[0]


class SpatialMean(RadiiEstimator):
    """[`jaxbkgd.spatial_mean`][] as a module whose radii are learned.

    The radii are its only inexact array, `unbounded_radii`: `logit(radius /
    max_radius_pix)`, so that no step of an optimizer leaves the open interval from 0 to
    `max_radius_pix`. Below 0.39 px a smooth kernel has one tap, and no gradient leads out
    of there: start above 1 px.

    ```python
    >>> import jax.numpy as jnp
    >>> import jaxbkgd
    >>> jaxbkgd.SpatialMean(7.0)(jnp.full((10, 64, 64), 100.0)).bkgds.shape
    (10, 64, 64)

    ```
    """

    max_radius_pix: float = eqx.field(static=True)
    truncation: Truncation = eqx.field(static=True)
    noise: NoiseKind = eqx.field(static=True)

    takes_donated: ClassVar[bool] = True
    _saved_names = ("radii_pix", "max_radius_pix", "truncation", "noise", "frozen")

    def __init__(
        self,
        radii_pix: Any = 7.0,
        *,
        max_radius_pix: int | float | None = None,
        truncation: Truncation = "smooth",
        noise: NoiseKind = "exact",
        frozen: Any = False,
    ):
        """**Arguments:**

        - `radii_pix`: the initial averaging radii in pixels: a number for all channels
            and both axes, which stay equal as they are learned; a `(y, x)` pair for all
            channels; or a sequence with one number or pair for each channel. Two
            numbers are a pair, never two channels.
        - `max_radius_pix`: a static bound above all radii, by default four times the
            largest, which sets the number of taps where the radii are traced.
        - `truncation`: `"smooth"`, or `"hard"` for the taps of smlmlp, whose gradient
            misses the jumps where a tap enters.
        - `noise`: the kind of noise factor; see [`jaxbkgd.noise_correction`][].
        - `frozen`: the radii that are not learned, whose gradient is zero: a boolean for
            all, a pair of them beside a pair of radii, or one or a pair for each channel.
            Weight decay [moves them all the same](faq.md#how-do-i-freeze-radii).

        **Raises:** `TypeError` or `ValueError` for what is not as above.
        """
        check_choice("truncation", truncation, Truncation)
        check_choice("noise", noise, NoiseKind)
        radii = channel_radii(radii_pix)
        self.max_radius_pix = bound_of(radii, max_radius_pix)
        check_below(np.nextafter(self.max_radius_pix, 0), radii_pix)
        self.unbounded_radii = unbounded_radii(radii, self.max_radius_pix)
        self.truncation = truncation
        self.noise = noise
        self.frozen = frozen_mask(frozen, radii.shape)
        self.kernels = None

    @property
    def halo_frames(self) -> int:
        """0, since each frame is estimated by itself."""
        return 0

    @property
    def max_radii(self) -> tuple[float, float]:
        """The bounds of the radii (y, x)."""
        return self.max_radius_pix, self.max_radius_pix

    @property
    def radii_pix(self) -> Float[Array, "channels 2"]:
        """The averaging radii (y, x) in pixels, a row a channel; one row serves all."""
        return self.radii

    def _kernels_for(self, radii: Sequence[float], *, is_bound: bool) -> KernelPair:
        return _kernels(radii, self.truncation, is_bound=is_bound)

    def _estimate_channel(
        self, frames: Any, *, radii: Any, kernels: KernelPair, donated: Any = None
    ) -> Background:
        bkgds = filter_frames(frames, radii, kernels, donated)
        correction, taps = _noise_correction(radii, kernels, self.noise)
        return Background(bkgds, correction, noise=ResidualNoise(taps))


def filter_frames(
    frames: Frames,
    radii: Float[Array, "2"],
    kernels: KernelPair,
    donated: Image | None = None,
) -> Image:
    """The frames filtered with the kernels (y, x) at the radii (y, x)."""
    dtype = working_dtype(frames)
    if not jnp.issubdtype(frames.dtype, jnp.integer):
        # Integers are converted in the filter, a frame at a time.
        frames = frames.astype(dtype)
    if donated is not None and donated.dtype != dtype:
        donated = None
    return separable_filter(frames, _axis_radii(radii, dtype), kernels, donated=donated)


@ft.partial(jax.jit, static_argnames="dtype")
def _axis_radii(radii: Float[Array, "2"], dtype: Any) -> list[Float[Array, ""]]:
    # Compiled, since a call of the filter may take no longer than these few operations.
    return list(radii.astype(dtype))


@ft.partial(jax.jit, static_argnames=("kernels", "noise"))
def _noise_correction(
    radii: Float[Array, "2"], kernels: KernelPair, noise: NoiseKind
) -> tuple[Float[Array, ""], tuple[Float[Array, " _"], ...]]:
    """The noise factor, and the taps that it is made of."""
    taps_y, taps_x = (kernel.taps(r) for kernel, r in zip(kernels, radii, strict=True))
    return noise_factor(taps_y, taps_x, noise), (taps_y, taps_x)


def _radii_and_kernels(
    radius_pix: Any, max_radius_pix: Any, truncation: Truncation
) -> tuple[Float[Array, "2"], KernelPair]:
    """The radii (y, x) of one channel, and the static halves of their kernels."""
    check_choice("truncation", truncation, Truncation)
    radii = channel_radii(radius_pix)
    if radii.shape[0] != 1:
        rule = "radius_pix must be a number or a (y, x) pair; SpatialMean takes more"
        raise ValueError(f"{rule}, but got {radius_pix!r}.")
    bound = bound_of(radii, max_radius_pix)
    check_below(bound, radius_pix)
    is_bound = max_radius_pix is not None
    largest = np.broadcast_to(bound if is_bound else radii[0], 2).tolist()
    kernels = _kernels(largest, truncation, is_bound=is_bound)
    return jnp.broadcast_to(jnp.asarray(radii[0], float), 2), kernels


def _kernels(
    radii: Sequence[float], truncation: Truncation, *, is_bound: bool
) -> KernelPair:
    """For the radii (y, x), or for all below them."""
    widths = [half_width(radius, truncation) for radius in radii]
    return tuple(GaussianKernel(w, truncation, is_bound=is_bound) for w in widths)

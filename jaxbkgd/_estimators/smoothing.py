"""The kernel of LocalMean over blocks of frames, y and x, and half-size frames."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._filter.correlation import pad
from .._filter.kernels import GaussianKernel, half_width, Image
from .._filter.primitive import separable_filter, temporal_filter
from .checks import is_known


# Below this total weight under a kernel, there is nothing to be the mean of.
LEAST_TOTAL_WEIGHT = 1e-6

_Images = Float[Array, "*batch blocks height width"]
_Blocks = Float[Array, "blocks height width"]


class SmoothingKernels(NamedTuple):
    """The static halves of the Gaussians of one channel: over blocks of frames, if there
    is more than one frame to average, and along y and x, at full and at half size."""

    time: GaussianKernel | None
    y: GaussianKernel
    x: GaussianKernel
    halved_y: GaussianKernel
    halved_x: GaussianKernel


def smoothing_kernels(
    radii: Sequence[float], block_frames: int, *, is_bound: bool
) -> SmoothingKernels:
    """The kernels for radii (frames, y, x), or for all below them."""

    def kernel(radius: float) -> GaussianKernel:
        return GaussianKernel(half_width(radius, "smooth"), "smooth", is_bound=is_bound)

    frames, y, x = radii
    time = None if frames == 0 else kernel(radius_in_blocks(frames, block_frames))
    return SmoothingKernels(time, kernel(y), kernel(x), kernel(y / 2), kernel(x / 2))


def usual_block_frames(radius_frames: float) -> int:
    """The power of two that is nearest to a quarter of the radius, up to 16."""
    return 2 ** round(math.log2(min(max(radius_frames / 4, 1), 16)))


def radius_in_blocks(radius_frames: Any, block_frames: int) -> Any:
    """The radius in blocks that has, with the variance of a block, that in frames."""
    variance = (radius_frames / 2) ** 2 - (block_frames**2 - 1) / 12
    if isinstance(variance, float):
        return 2 * math.sqrt(max(variance, 0.01)) / block_frames
    return 2 * jnp.sqrt(jnp.maximum(variance, 0.01)) / block_frames


class Smoothing(eqx.Module):
    """The kernel of one channel, with the radii (blocks, y, x) of its Gaussian G: G itself
    for order 2, and for order 4 `2G - G∘G`, in which nothing of second order is left."""

    radii: Float[Array, "3"]
    kernels: SmoothingKernels = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def with_order(self, order: int) -> "Smoothing":
        return Smoothing(self.radii, self.kernels, order)

    def widened(self) -> "Smoothing":
        """That of G∘G, a Gaussian of twice the variance."""

        def wide(kernel: GaussianKernel) -> GaussianKernel:
            width = math.ceil(math.sqrt(2) * (kernel.half_width + 0.5))
            return dataclasses.replace(kernel, half_width=width)

        time, *space = self.kernels
        kernels = SmoothingKernels(time and wide(time), *map(wide, space))
        return Smoothing(math.sqrt(2) * self.radii, kernels, self.order)

    def halved(self) -> "Smoothing":
        """The same for frames of half the size."""
        time, _, _, y, x = self.kernels
        kernels = SmoothingKernels(time, y, x, y, x)
        factors = np.array([1, 0.5, 0.5], self.radii.dtype)
        return Smoothing(self.radii * factors, kernels, self.order)

    def sums(self, images: _Images) -> _Images:
        """The sums under G. Edge pixels are repeated, and beyond the first and last block
        is none."""
        return self.sums_in_time(self.sums_in_space(images))

    def sums_in_space(self, images: _Images) -> _Images:
        """The sums along y and x alone."""
        kernels = self.kernels.y, self.kernels.x
        return separable_filter(images, list(self.radii[1:]), kernels, is_finite=True)

    def sums_in_time(self, images: _Images) -> _Images:
        """The sums over time alone."""
        time = self.kernels.time
        if time is None:
            return images
        return temporal_filter(images, self.radii[0], time, "empty", is_finite=True)

    def with_gap(self, sums: _Images, images: _Images, gap: int) -> _Images:
        """`sums`, which `sums_in_time` gives of `images`, where for each block those that
        are nearer than `gap` are replaced by the two at that distance."""
        time = self.kernels.time
        if time is None or not gap:
            return sums
        count = images.shape[-3]
        padded = pad(images, (gap, gap), -3)

        def beside(distance: int) -> _Images:
            before, after = (
                lax.slice_in_dim(padded, start, start + count, axis=-3)
                for start in (gap - distance, gap + distance)
            )
            return before + after

        taps = time.taps(self.radii[0])
        weight = taps[0] / 2 + jnp.sum(taps[1:gap])
        sums = sums + weight * beside(gap) - taps[0] * images
        return sums - sum(taps[n] * beside(n) for n in range(1, min(gap, taps.size)))

    def completed(
        self, sums: _Blocks, totals: _Blocks, smooth_sums: _Blocks, smooth_totals: _Blocks
    ) -> _Blocks:
        """The means, from sums and totals that are smoothed already; for order 4, with the
        mean of what they leave added ("twicing": Tukey, Exploratory Data Analysis, 1977,
        16); 1 where there is none, so that a frame without light around it has its own mean
        as its background."""
        means = jnp.where(smooth_totals > 0, ratio(smooth_sums, smooth_totals), 1)
        if self.order == 4:
            means = means + ratio(self.sums(sums - means * totals), smooth_totals)
        return means

    def taps(self) -> tuple[Float[Array, " _"], ...]:
        """Those of G along each of its axes, from the centre outwards."""
        kernels = zip(self.kernels[:3], self.radii, strict=True)
        return tuple(kernel.taps(radius) for kernel, radius in kernels if kernel)

    def noise_correction(self, block_frames: int | float) -> Float[Array, ""]:
        """The deviation of `frame - background` for white noise of unit deviation: the norm
        of `delta - k`, with the composed taps k of all axes."""
        gaussians = [jnp.concatenate([taps[:0:-1], taps]) for taps in self.taps()]
        # The composed kernel is a sum of products of rows.
        terms = [(1.0, gaussians)]
        if self.order == 4:
            terms = [(2.0, gaussians), (-1.0, [jnp.convolve(t, t) for t in gaussians])]
        # Each tap of a block is shared by its frames.
        centre = sum(c * math.prod(t[t.size // 2] for t in rows) for c, rows in terms)
        energy = sum(
            c * d * math.prod(map(_inner, rows, others))
            for c, rows in terms
            for d, others in terms
        )
        return root(jnp.asarray(1 + (energy - 2 * centre) / block_frames))


def _inner(taps: Float[Array, " _"], others: Float[Array, " _"]) -> Float[Array, ""]:
    """The inner product of two rows about their centres."""
    short, long = sorted((taps, others), key=jnp.size)
    edge = (long.size - short.size) // 2
    return jnp.sum(short * long[edge : edge + short.size])


def ratio(sums: Float[Array, "..."], totals: Float[Array, "..."]) -> Float[Array, "..."]:
    """The means, zero where the totals of weights are."""
    is_empty = totals <= 0
    return jnp.where(is_empty, 0, sums / jnp.where(is_empty, 1, totals))


def root(squares: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, which has a derivative at zero, too: zero."""
    is_zero = squares <= 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def halve_size(images: Image) -> Float[Array, "*batch half_height half_width"]:
    """The means of blocks of 2 x 2 pixels. An odd last line or column counts twice."""
    *batch, height, width = images.shape
    # Not a mean over axes, whose order XLA chooses by the number of frames.
    if is_known(height) and is_known(width):
        padding = [*[(0, 0)] * len(batch), (0, height % 2), (0, width % 2)]
        images = jnp.pad(images, padding, mode="edge")
        lines = images[..., ::2, :] + images[..., 1::2, :]
        return (lines[..., ::2] + lines[..., 1::2]) / 4
    for axis, size in ((-2, height), (-1, width)):
        first = lax.slice_in_dim(images, 0, size, 2, axis)
        places = jnp.minimum(2 * jnp.arange(first.shape[axis]) + 1, size - 1)
        images = first + jnp.take(images, places, axis)
    return images / 4


def double_size(
    images: Float[Array, "*batch half_height half_width"], shape: tuple[Any, ...]
) -> Image:
    """Images in which each pixel has become a block of 2 x 2, cut to `shape`."""
    images = jnp.repeat(jnp.repeat(images, 2, axis=-2), 2, axis=-1)
    return images[..., : shape[-2], : shape[-1]]

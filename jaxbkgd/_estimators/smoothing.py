"""The Gaussian over time, y and x that LocalMean averages with, and half-size frames."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from .._filter.kernels import GapKernel, GaussianKernel, half_width, noise_factor
from .._filter.primitive import separable_filter, temporal_filter
from .checks import is_known


EdgeFrames = Literal["renormalised", "repeated"]


class SmoothingKernels(NamedTuple):
    """The static halves of one channel's kernels, and of those along y and x for frames
    of half the size."""

    time: GaussianKernel
    y: GaussianKernel
    x: GaussianKernel
    halved_y: GaussianKernel
    halved_x: GaussianKernel


def smoothing_kernels(radii: Sequence[float], *, is_bound: bool) -> SmoothingKernels:
    """The kernels for radii (frames, y, x), or for all below them."""

    def kernel(radius: float) -> GaussianKernel:
        return GaussianKernel(half_width(radius, "smooth"), "smooth", is_bound=is_bound)

    frames, y, x = radii
    return SmoothingKernels(
        kernel(frames), kernel(y), kernel(x), kernel(y / 2), kernel(x / 2)
    )


class Smoothing(eqx.Module):
    """The Gaussian over time, y and x, of one channel, with the radii (frames, y, x)."""

    radii: Float[Array, "3"]
    kernels: SmoothingKernels = eqx.field(static=True)
    edge_frames: EdgeFrames = eqx.field(static=True)

    def halved(self) -> "Smoothing":
        """The same for frames of half the size."""
        radii = self.radii / np.array([1, 2, 2], self.radii.dtype)
        time, _, _, y, x = self.kernels
        return Smoothing(radii, SmoothingKernels(time, y, x, y, x), self.edge_frames)

    def __call__(
        self, images: Shaped[Array, "*batch frames height width"]
    ) -> Float[Array, "*batch frames height width"]:
        """The sum under the kernels, which is the mean away from the movie's ends."""
        return self.over_time(self._over_space(images))

    def mean(
        self,
        images: Shaped[Array, "*batch frames height width"],
        weights: Float[Array, "*batch frames height width"] | None,
    ) -> Float[Array, "*batch frames height width"]:
        """The weighted mean, which is zero where the weights are."""
        (mean,) = self.means(images, weights, (0,))
        return mean

    def means(
        self,
        images: Shaped[Array, "*batch frames height width"],
        weights: Float[Array, "*batch frames height width"] | None,
        gaps: tuple[int, ...],
        is_finite: bool = True,
    ) -> list[Float[Array, "*batch frames height width"]]:
        """For each gap the weighted mean in which the frames nearer than the gap are
        replaced by those at that distance."""
        if weights is None:
            sums = self._over_space(images, is_finite)
            shape = (*[1] * (images.ndim - 3), images.shape[-3], 1, 1)
            totals = jnp.ones(shape, self.radii.dtype)
            return [
                ratio(self.over_time(sums, gap, is_finite), self.over_time(totals, gap))
                for gap in gaps
            ]
        # In one stack, so that there is one program to compile.
        both = self._over_space(jnp.stack([images * weights, weights]))
        return [ratio(*self.over_time(both, gap)) for gap in gaps]

    def over_time(
        self, images: Shaped[Array, "..."], gap: int = 0, is_finite: bool = True
    ) -> Float[Array, "..."]:
        """The sum under the kernel along time alone."""
        time = self.kernels.time
        # A repeated frame could be the one that is to be predicted.
        is_repeated = self.edge_frames == "repeated" and not gap
        edges = "repeated" if is_repeated else "empty"
        kernel = GapKernel(time, gap) if gap else time
        return temporal_filter(images, self.radii[0], kernel, edges, is_finite=is_finite)

    def noise_correction(self) -> Float[Array, ""]:
        kernels = self.kernels[:3]
        taps = [k.taps(radius) for k, radius in zip(kernels, self.radii, strict=True)]
        return noise_factor(taps, "exact")

    def _over_space(self, images: Any, is_finite: bool = True) -> Float[Array, "..."]:
        radii, kernels = list(self.radii[1:]), self.kernels[1:3]
        return separable_filter(images, radii, kernels, is_finite=is_finite)


def ratio(sums: Float[Array, "..."], totals: Float[Array, "..."]) -> Float[Array, "..."]:
    """The means, zero where the totals of weights are."""
    is_empty = totals <= 0
    return jnp.where(is_empty, 0, sums / jnp.where(is_empty, 1, totals))


def halved(
    images: Float[Array, "*batch height width"],
) -> Float[Array, "*batch half_height half_width"]:
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


def doubled(
    images: Float[Array, "*batch half_height half_width"], shape: tuple[Any, ...]
) -> Float[Array, "*batch height width"]:
    """Images in which each pixel has become a block of 2 x 2, cut to `shape`."""
    images = jnp.repeat(jnp.repeat(images, 2, axis=-2), 2, axis=-1)
    return images[..., : shape[-2], : shape[-1]]

"""The noise of frames less a smooth background, as it is seen through a point-spread
function: that of the background is correlated from pixel to pixel."""

import functools as ft
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._filter.kernels import CUT_SIGMAS
from .smoothing import root
from .soft_clip import SoftClip


# Peaks of this SNR decide how much of a peak a clip leaves out of its own background.
# Thresholds for 0.01 to 10 false positives a frame are around it.
_PEAK_SNR = 4.0
# The share of a peak that a clip sees in pixels of twice the size, by Monte Carlo.
_SEEN_SHARE = 0.8


def psf_taps(psf_sigma_pix: float) -> Float[np.ndarray, " taps"]:
    """A Gaussian, integrated over pixels and cut off at 2.576 sigma, of unit norm."""
    cut = CUT_SIGMAS * psf_sigma_pix
    reach = max(math.ceil(cut - 0.5), 0)
    edges = np.clip(np.arange(-reach - 0.5, reach + 1), -cut, cut)
    taps = np.diff([math.erf(e / (math.sqrt(2) * psf_sigma_pix)) for e in edges])
    return taps / np.linalg.norm(taps)


def psf_rows(taps: Float[np.ndarray, " taps"], size: int) -> Float[np.ndarray, "size size"]:
    """The taps about each pixel of an axis: those inside of it, of unit norm."""
    reach = taps.size // 2
    shift = np.arange(size) - np.arange(size)[:, None]
    inside = np.abs(shift) <= reach
    rows = np.where(inside, taps[np.clip(shift + reach, 0, taps.size - 1)], 0.0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class MatchedNoise(eqx.Module):
    """What the subtraction of the background changes in the noise under a point-spread
    function, `(height, width)` or `(frames, height, width)`: its standard deviation and
    its skewness, as shares of those in the frames."""

    deviation: Float[Array, "..."]
    skewness: Float[Array, "..."]


class _Moments(NamedTuple):
    """Sums along one axis, at each of its positions, of products of rows: of the
    point-spread function g, and of g under the kernel once or more.

    `squares` are of g**2 under the kernel, instead of g, and the rows; `cubes` of g**3.
    """

    pairs: Float[Array, "rows rows positions"]
    triples: Float[Array, "rows rows rows positions"]
    squares: Float[Array, "rows rows positions"]
    cubes: Float[Array, " positions"]


class ResidualNoise(eqx.Module):
    """What is known of the noise of `frames - bkgds` where the background is a linear mean
    of the frames: a Gaussian G, or `2G - G∘G` of order 4.

    **Attributes:**

    - `taps`: of G along (y, x) or (blocks of frames, y, x), from the centre outwards.
    - `deviation`: of the noise in what is smoothed, over that in the frames.
    - `clip`: what leaves molecules out of the mean, and peaks of the noise with them.
    """

    taps: tuple[Float[Array, " _"], ...]
    deviation: Any = 1.0
    clip: SoftClip | None = None
    order: int = eqx.field(static=True, default=2)
    block_frames: int = eqx.field(static=True, default=1)

    @eqx.filter_jit
    def matched(self, psf_sigma_pix: float, shape: tuple[int, ...]) -> MatchedNoise:
        """Under a point-spread function about each pixel of frames of this shape, without
        what is beyond their borders."""
        psf = psf_taps(psf_sigma_pix)
        axes = self._moments(psf, shape)
        pairs, triples, squares, cubes = zip(*axes, strict=True)
        kernel = self._kernel
        smooth = range(1, len(kernel) + 1)
        own: Any = sum(kernel[k - 1] * _product(pairs, 0, k) for k in smooth)
        # Of a peak, what is clipped is not in its own background: if it is all, the
        # background has nothing along g.
        clipped = 1 - self._own_share(psf, own)
        kept = [1 + clipped * own, *(-c for c in kernel)]
        variance = _moment_of_sum(pairs, kept, power=2)
        along = _moment_of_sum(pairs, kept, 0)
        # The variance is estimated by the background, which follows the noise itself.
        followed = sum(
            kernel[k - 1]
            * (_moment_of_sum(squares, kept, k) - clipped * along * _product(squares, k, 0))
            for k in smooth
        )
        skewness = _moment_of_sum(triples, kept, power=3) / variance**1.5
        skewness = skewness - 3 * followed / root(variance)
        deviation = self.deviation * root(variance)
        matched = MatchedNoise(deviation, skewness / _product(cubes))
        if len(shape) < len(axes):
            return MatchedNoise(matched.deviation[0], matched.skewness[0])
        return matched

    @eqx.filter_jit
    def bkgd_variance(self, shape: tuple[int, ...]) -> Float[Array, ""]:
        """The variance of the background of frames of this shape, on average, over that of
        their noise: the sum of the squared weights of its mean."""
        pairs = [axis.pairs for axis in self._moments(np.ones(1), shape)]
        shares = _moment_of_sum(pairs, [0.0, *self._kernel], power=2)
        return jnp.square(self.deviation) * jnp.mean(shares)

    def _moments(
        self, psf: Float[np.ndarray, " taps"], shape: tuple[int, ...]
    ) -> list[_Moments]:
        """Along each axis, of a point-spread function and what the kernel makes of it."""
        space = [
            _along_pixels(taps, psf, size, self.order)
            for taps, size in zip(self.taps[-2:], shape[-2:], strict=True)
        ]
        if len(self.taps) == 2:
            return space
        count = shape[-3] if len(shape) > 2 else 1
        return [_along_time(self.taps[0], self.block_frames, count, self.order), *space]

    def correlation(self, psf_sigma_pix: float) -> Float[np.ndarray, "pixels pixels"]:
        """The correlations of a pixel and its eight neighbours under a point-spread
        function, line by line, away from the borders. Known taps are needed."""
        psf = psf_taps(psf_sigma_pix)
        kept = [1.0, *(-c for c in self._kernel)]
        covariances = []
        for taps in self.taps[-2:]:
            half = np.asarray(taps, np.float64)
            whole = np.concatenate([half[:0:-1], half])
            # Wide enough for all kernels, and for a shift of two pixels.
            rows = [np.pad(psf, len(self._kernel) * (half.size - 1) + 2)]
            for _ in self._kernel:
                rows.append(np.convolve(rows[-1], whole, "same"))
            shifted = np.array([[np.roll(row, s) for row in rows] for s in range(3)])
            covariances.append(np.einsum("san,tbn->abst", shifted, shifted))
        y, x = covariances
        time = np.ones((len(kept), len(kept)))
        if len(self.taps) == 3:
            half = np.asarray(self.taps[0], np.float64)
            reach = half.size * self.order
            moments = _along_time(
                jnp.asarray(half), self.block_frames, self.block_frames * reach, self.order
            )
            time = np.asarray(moments.pairs[..., self.block_frames * (reach // 2)])
        if self.clip is not None:
            shares = time[0] * y[0, :, 1, 1] * x[0, :, 1, 1]
            own = -np.dot(kept[1:], shares[1:])
            kept[0] += (1 - float(self._own_share(psf, jnp.asarray(own)))) * own
        covariance = np.einsum("a,b,ab,abst,abuv->sutv", kept, kept, time, y, x)
        covariance = covariance.reshape(9, 9)
        deviations = np.sqrt(np.diag(covariance))
        return covariance / np.multiply.outer(deviations, deviations)

    @property
    def _kernel(self) -> tuple[float, ...]:
        """The coefficients of G and `G∘G`."""
        return (1.0,) if self.order == 2 else (2.0, -1.0)

    def _own_share(
        self, psf: Float[np.ndarray, " taps"], own: Float[Array, "..."]
    ) -> Float[Array, ""] | float:
        """The share of a peak that counts in its own background, as it is clipped, where
        `own` of it is subtracted if it is not."""
        if self.clip is None:
            return 1.0
        image = np.multiply.outer(psf, psf)
        # What the surroundings of each pixel, without itself, have of a peak near it.
        seen = np.multiply.outer(*2 * [np.convolve(psf, psf, "same")])
        least = np.max(image)
        seen = (seen - least * image) / math.sqrt(max(1 - least**2, 1e-6))
        seen = _SEEN_SHARE * seen * (1 - jnp.min(own))
        # The mean of a logistic function of what is normal around that.
        softness = jnp.sqrt(self.clip.softness**2 + math.pi / 8 * (1 - seen**2))
        shares = jax.nn.sigmoid((self.clip.threshold - _PEAK_SNR * seen) / softness)
        return jnp.sum(image**2 * shares)


def _product(moments: Sequence[Array], *rows: int) -> Float[Array, "..."]:
    """Of the moments of these rows along all axes, at each pixel."""
    return ft.reduce(jnp.multiply.outer, [of_axis[rows] for of_axis in moments])


def _moment_of_sum(
    moments: Sequence[Array], kept: Sequence[Any], *first: int, power: int = 1
) -> Float[Array, "..."]:
    """The moments of the first rows and so many factors, each the sum of all rows with the
    coefficients `kept`."""
    terms = (
        math.prod((kept[row] for row in rows), start=1.0) * _product(moments, *first, *rows)
        for rows in itertools.product(range(len(kept)), repeat=power)
    )
    total: Any = sum(terms)
    return total


def _along_pixels(
    taps: Float[Array, " _"], psf: Float[np.ndarray, " taps"], size: int, order: int
) -> _Moments:
    """Where edge pixels are repeated."""
    reach = psf.size // 2 + (taps.size - 1) * order // 2
    position, few = _positions(size, reach)
    # The mean at each pixel, as weights of all.
    distance = np.arange(-taps.size + 1, taps.size)
    seen = np.clip(np.arange(few)[:, None] + distance, 0, few - 1)
    kernel = jnp.zeros((few, few), taps.dtype)
    kernel = kernel.at[np.arange(few)[:, None], seen].add(taps[np.abs(distance)])
    rows = psf_rows(psf, few)
    return _moments(
        _under(kernel, jnp.asarray(rows, taps.dtype), order),
        _under(kernel, jnp.asarray(rows**2, taps.dtype), order),
        position,
    )


def _along_time(
    taps: Float[Array, " _"], block_frames: int, count: int, order: int
) -> _Moments:
    """Where each frame of a block is smoothed alike, and beyond the ends is nothing."""
    reach = (taps.size - 1) * order // 2
    position, few = _positions(-(-count // block_frames), reach)
    distance = np.abs(np.arange(few) - np.arange(few)[:, None])
    kernel = jnp.where(distance < taps.size, taps[np.minimum(distance, taps.size - 1)], 0.0)
    kernel = kernel / jnp.sum(kernel, 1, keepdims=True)
    blocks = _under(kernel, jnp.eye(few, dtype=taps.dtype), order) / block_frames
    # The frame itself, and the others of its block and of all blocks.
    itself = jnp.diagonal(blocks, axis1=1, axis2=2).at[0].set(1)[..., None]
    rows = jnp.concatenate([itself, blocks.at[0].set(0)], 2)
    others = block_frames - jnp.eye(few, dtype=taps.dtype)
    frames = jnp.concatenate([jnp.ones((few, 1), taps.dtype), others], 1)
    return _moments(rows, rows, np.repeat(position, block_frames)[:count], frames)


def _positions(size: int, reach: int) -> tuple[Int[np.ndarray, " size"], int]:
    """Those farther than `reach` from both ends are alike: which each one is of a shorter
    axis, and its length."""
    few = min(size, 2 * reach + 1)
    position = np.arange(size)
    return np.maximum(position - (size - few), np.minimum(position, reach)), few


def _under(
    kernel: Float[Array, "few few"], rows: Float[Array, "few few"], order: int
) -> Float[Array, "rows few few"]:
    """The rows, and under the transposed kernel once or twice."""
    once = rows @ kernel
    return jnp.stack([rows, once] if order == 2 else [rows, once, once @ kernel])


def _moments(
    rows: Float[Array, "rows few places"],
    squares: Float[Array, "rows few places"],
    position: Int[np.ndarray, " positions"],
    counts: Float[Array, "few places"] | float = 1.0,
) -> _Moments:
    """Of rows at each position, with so many equal entries."""
    counted = rows * counts
    return _Moments(
        jnp.einsum("apn,bpn->abp", counted, rows)[..., position],
        jnp.einsum("apn,bpn,cpn->abcp", counted, rows, rows)[..., position],
        jnp.einsum("apn,bpn->abp", squares, counted)[..., position],
        jnp.einsum("pn,pn,pn->p", counted[0], rows[0], rows[0])[position],
    )

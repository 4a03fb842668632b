"""LocalMean against its definition in float64: dense matrices along blocks, y and x."""

from typing import Any

import numpy as np
import pytest
from reference import mean_matrix
from scipy.special import expit

from jaxbkgd import LocalMean, SoftClip


# Photo-electrons: an uneven background in a flickering light, and some molecules.
SHAPE = (22, 13, 12)
Y, X = np.mgrid[:13, :12]
LEVEL = 60 + 2 * Y - 3 * X
FLICKER = np.random.default_rng(5).uniform(0.7, 1.4, SHAPE[0])
MOLECULES = np.zeros(SHAPE)
for frame, y, x in [(2, 3, 8), (3, 3, 8), (9, 10, 2), (15, 6, 6)]:
    MOLECULES[frame] += 90 * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / 3.4)
TRUTH = FLICKER[:, None, None] * LEVEL
_RNG = np.random.default_rng(7)
FRAMES = (_RNG.poisson(TRUTH + MOLECULES) + _RNG.normal(0, 1, SHAPE)).astype(np.float32)

# Pixels to leave out: a block that is a whole pixel of the halved frames, an odd pixel, a
# corner, and a lost frame.
MASK = np.ones(SHAPE, bool)
MASK[:, 4:6, 2:4] = MASK[:, 8, 5] = MASK[:, 0, 0] = MASK[5] = False
WEIGHTS = np.random.default_rng(8).uniform(0.2, 3.0, SHAPE)

CLIP = {"threshold": 2.0, "softness": 0.4, "rounds": 2, "molecule_radius_pix": 2.0}


def local_mean(**options: Any) -> LocalMean:
    """Few taps, so that little is compiled."""
    options = {"clip": SoftClip(**CLIP), "block_frames": 2} | options
    return LocalMean((1.8, 1.3), 5.0, **options)


def ratio(sums, totals):
    return np.divide(sums, totals, out=np.zeros(np.shape(sums)), where=totals > 0)


def halved(images):
    images = np.pad(
        images,
        [*[(0, 0)] * (images.ndim - 2), *((0, n % 2) for n in images.shape[-2:])],
        "edge",
    )
    lines = images[..., ::2, :] + images[..., 1::2, :]
    return (lines[..., ::2] + lines[..., 1::2]) / 4


def doubled(images, shape):
    return images.repeat(2, -2).repeat(2, -1)[..., : shape[-2], : shape[-1]]


class Reference:
    """What LocalMean is, written for blocks of 2 frames and a bound of the light's radius."""

    def __init__(self, *, clip=CLIP, rank=1, order=4, radii=(5.0, 1.8, 1.3)):
        self.clip, self.rank, self.order, self.radii, self.length = (
            clip,
            rank,
            order,
            radii,
            2,
        )

    def __call__(self, frames, weights=None):
        is_weighted = weights is not None
        frames = np.asarray(frames, float)
        weights = np.broadcast_to(1.0 if weights is None else weights, frames.shape) * 1.0
        frames = np.where(weights > 0, frames, 0)
        self.blocks = np.arange(len(frames)) // self.length
        small_weights = halved(weights)
        small = ratio(halved(frames * weights), small_weights)
        light = self.light(small, small_weights, np.ones(small.shape[1:]))
        rates = self.rates(small, small_weights, light, order=2, scale=2)
        noise = self.first_noise(small, weights, light)
        if self.rank:
            light = self.median_light(small, small_weights, rates)
        rounds = self.clip["rounds"] if self.clip else 1
        for _ in range(rounds - 1):
            z = self.deviations(small, small_weights, light, rates, noise)
            clipped = small_weights * self.share(z)
            is_below = (z < 0) & (small_weights > 0) & (light > 0)[:, None, None]
            light = self.light(small, clipped, rates[self.blocks])
            noise = noise * np.sqrt(self.mean(z**2 * is_below, is_below * 1.0, scale=2))
            rates = self.rates(small, clipped, light, scale=2)
        clipped = weights
        if self.clip:
            z = self.deviations(small, small_weights, light, rates, noise, frames, weights)
            clipped = weights * self.share(z)
        full_rates = doubled(rates, frames.shape)
        variance = (noise**2).sum((1, 2)) / rates.sum((1, 2)) ** 2
        light = self.light(frames, clipped, full_rates[self.blocks])
        rates = self.rates(frames, clipped, light, scale=1)
        if self.rank:
            light = self.steadied(light, light * variance[self.blocks], weights)
        bkgds = light[:, None, None] * rates[self.blocks]
        if is_weighted:
            shares = self.smooth(self.added(weights), 1)
            bkgds[(shares <= 2e-6)[self.blocks]] = np.nan
        return bkgds, light

    def added(self, images):
        return np.add.reduceat(images, np.arange(0, len(images), self.length))

    def smooth(self, images, scale):
        variance = (self.radii[0] / 2) ** 2 - (self.length**2 - 1) / 12
        time = mean_matrix(
            2 * np.sqrt(variance) / self.length, len(images), "smooth", "empty"
        )
        y, x = (
            mean_matrix(radius / scale, size, "smooth")
            for radius, size in zip(self.radii[1:], images.shape[1:], strict=True)
        )
        return np.einsum("at,tyx->ayx", time, y @ images @ x.T)

    def mean(self, sums, totals, scale):
        return ratio(*(self.smooth(self.added(i), scale) for i in (sums, totals)))

    def rates(self, frames, weights, light, *, scale, order=None):
        is_lit = (light > 0)[:, None, None]
        sums = self.added(np.where(is_lit, weights * frames, 0))
        totals = self.added(weights * np.maximum(light, 0)[:, None, None])
        smooth_totals = self.smooth(totals, scale)
        means = ratio(self.smooth(sums, scale), smooth_totals)
        if (order or self.order) == 4:
            means += ratio(self.smooth(sums - means * totals, scale), smooth_totals)
        return means

    def light(self, frames, weights, rates):
        if not self.rank:
            return np.ones(len(frames))
        return ratio((weights * frames).sum((1, 2)), (weights * rates).sum((1, 2)))

    def median_light(self, small, weights, rates):
        def squares(images):
            # A frame this small has squares of one pixel.
            return images.reshape(len(images), -1)

        light = []
        for frame, weight, rate in zip(
            squares(small), squares(weights), squares(rates[self.blocks]), strict=True
        ):
            fill = [ratio((v * weight).sum(), weight.sum()) for v in (frame, rate)]
            values = [
                np.median(np.where(weight > 0, v, whole))
                for v, whole in zip((frame, rate), fill, strict=True)
            ]
            light.append(ratio(*map(np.array, values)))
        return np.array(light)

    def first_noise(self, small, weights, light):
        first = small[:: self.length]
        laplacian = np.pad(
            np.diff(np.diff(first, 2, 1), 2, 2), [(0, 0), (1, 1), (1, 1)], "edge"
        )
        is_whole = halved((weights[:: self.length] > 0) * 1.0) == 1
        padded = np.pad(is_whole, [(0, 0), (1, 1), (1, 1)], constant_values=True)
        is_noise = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).all(
            (3, 4)
        )
        totals = is_noise * np.maximum(light[:: self.length], 0)[:, None, None]
        squares = np.where(totals > 0, laplacian**2 / 36, 0)
        near = [self.smooth(images, 2) for images in (squares, totals)]
        whole = [images.sum((1, 2), keepdims=True) for images in (squares, totals)]
        return np.sqrt(np.where(near[1] > 0, ratio(*near), ratio(*whole)))

    def deviations(
        self, small, weights, light, rates, noise, frames=None, full_weights=None
    ):
        """What is around a pixel, in units of its noise; for `frames` of full size, without
        that quarter of the pixel of half the size which the pixel itself is."""
        radius = self.clip["molecule_radius_pix"] / 2
        taps = [mean_matrix(radius, size, "smooth", "empty") for size in small.shape[1:]]
        own = taps[0].max() * taps[1].max()
        mean_light = np.abs(light).reshape(-1, 1)
        padded = np.pad(mean_light[:, 0], (0, -len(light) % self.length))
        mean_light = padded.reshape(-1, self.length).mean(1)[self.blocks]
        growth = np.sqrt(np.maximum(light, mean_light / 10))[:, None, None]
        bkgds = light[:, None, None] * rates[self.blocks]

        def around(images, taps, own):
            return taps[0] @ images @ taps[1].T - own * images

        excess = around(weights * small, taps, own) - bkgds * around(weights, taps, own)
        squares = around(weights**2, [t**2 for t in taps], own**2)
        if frames is not None:
            excess = doubled(excess + own * weights * (small - bkgds), frames.shape)
            excess -= own / 4 * full_weights * (frames - doubled(bkgds, frames.shape))
            squares = doubled(squares + 3 / 4 * (own * weights) ** 2, frames.shape)
            noise = doubled(noise, frames.shape)
        return ratio(excess, np.sqrt(squares) * noise[self.blocks] * growth)

    def share(self, z):
        return 1e-3 + 0.999 * expit((self.clip["threshold"] - z) / self.clip["softness"])

    def steadied(self, light, variance, weights):
        is_lit = light > 0
        matrix = mean_matrix(10.0, len(light), "smooth", "empty")

        def mean(values):
            return ratio(matrix @ (values * is_lit), matrix @ is_lit)

        smooth = mean(light)
        own = np.maximum(1 - ratio(1.5 * mean(variance), mean((light - smooth) ** 2)), 0)
        own[~is_lit] = 1
        own[~(weights > 0).any((1, 2))] = 0
        return smooth + own * (light - smooth)


def close(actual, expected, atol=2e-3):
    """In float32, and 60 to 100 e-: a few times the rounding of the frames' sums."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("options", "reference", "weights"),
    [
        ({}, {}, None),
        ({}, {}, MASK),
        ({}, {}, WEIGHTS * MASK),
        ({"illumination_rank": 0}, {"rank": 0}, WEIGHTS),
        ({"kernel_order": 2}, {"order": 2}, None),
        ({"clip": SoftClip(**CLIP | {"rounds": 3})}, {"clip": CLIP | {"rounds": 3}}, None),
        ({"clip": None}, {"clip": None}, MASK),
        ({"clip": None, "illumination_rank": 0}, {"clip": None, "rank": 0}, None),
    ],
)
def test_it_is_what_it_is_defined_to_be(options, reference, weights):
    background = local_mean(**options)(FRAMES, weights)
    bkgds, light = Reference(**reference)(FRAMES, weights)
    close(background.bkgds, bkgds)
    np.testing.assert_allclose(background.illumination, light, rtol=1e-5)

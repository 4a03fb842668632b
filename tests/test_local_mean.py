"""LocalMean against its definition in float64: dense matrices along blocks, y and x."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import central_difference
from reference import axis_matrix, mean_matrix, reference_kernel
from scipy.special import expit

from jaxbkgd import Camera, LocalMean, SoftClip, SpatialMean
from jaxbkgd._estimators.smoothing import Smoothing, smoothing_kernels


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
# As floats, for which programs are those of weights.
MASK = np.ones(SHAPE)
MASK[:, 4:6, 2:4] = MASK[:, 8, 5] = MASK[:, 0, 0] = MASK[5] = 0
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
    """What LocalMean is, written for blocks of 2 frames."""

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
        unclipped = self.rates(small, small_weights, light, scale=2)
        totals = self.totals(small_weights, light)
        noise = self.first_noise(small, weights, light)
        rounds = self.clip["rounds"] if self.clip else 1
        for _ in range(rounds - 1):
            z = self.deviations(small, small_weights, light, rates, noise)
            clipped = small_weights * self.share(z)
            below = (z < 0) & (small_weights > 0)
            below = below * np.maximum(light, 0)[:, None, None]
            light = self.light(small, clipped, rates[self.blocks])
            noise = noise * np.sqrt(self.mean(z**2 * below, below, scale=2))
            rates = self.rates(small, clipped, light, scale=2)
            share = ratio(self.totals(clipped, light), totals)
            scale = rates.mean((1, 2), keepdims=True) / unclipped.mean(
                (1, 2), keepdims=True
            )
            structure = np.clip((0.6 - share) / 0.25, 0, 1)
            rates = rates + structure * (scale * unclipped - rates)
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

    def totals(self, weights, light):
        lit = np.maximum(light, 0)[:, None, None]
        return self.smooth(self.added(weights * lit), 2)

    def light(self, frames, weights, rates):
        if not self.rank:
            return np.ones(len(frames))
        return ratio((weights * frames).sum((1, 2)), (weights * rates).sum((1, 2)))

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


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("options", "reference", "weights"),
    [
        ({}, {}, None),
        ({}, {}, MASK),
        ({}, {}, WEIGHTS * MASK),
        (
            {
                "illumination_rank": 0,
                "kernel_order": 2,
                "clip": SoftClip(**CLIP | {"rounds": 3}),
            },
            {"rank": 0, "order": 2, "clip": CLIP | {"rounds": 3}},
            None,
        ),
        ({"clip": None}, {"clip": None}, MASK),
        ({"clip": None, "illumination_rank": 0}, {"clip": None, "rank": 0}, None),
    ],
)
def test_it_is_what_it_is_defined_to_be(options, reference, weights):
    background = local_mean(**options)(FRAMES, weights)
    bkgds, light = Reference(**reference)(FRAMES, weights)
    close(background.bkgds, bkgds)
    np.testing.assert_allclose(background.illumination, light, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_without_a_radius_in_frames_each_frame_is_by_itself():
    module = LocalMean((1.8, 1.3), 0, clip=None, illumination_rank=0)
    assert (module.halo_frames, module.block_frames) == (0, 1)
    y, x = (mean_matrix(r, n, "smooth") for r, n in zip((1.8, 1.3), SHAPE[1:], strict=True))
    once = y @ FRAMES @ x.T
    close(module(FRAMES).bkgds, once + y @ (FRAMES - once) @ x.T)
    close(module(FRAMES[3]).bkgds, module(FRAMES).bkgds[3])


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize(("radius", "length"), [(5.0, 2), (0, 1), (6.0, 1)])
def test_the_noise_factor_is_that_of_what_is_left_of_a_single_bright_pixel(
    order, radius, length
):
    module = LocalMean(
        (1.8, 1.3),
        radius,
        kernel_order=order,
        block_frames=length,
        clip=None,
        illumination_rank=0,
    )
    frames = np.zeros((42, 27, 27), np.float32)
    frames[20, 13, 13] = 1
    background = module(frames)
    # By the symmetry of the kernel, what one pixel leaves everywhere is what is left of all
    # in one pixel.
    residual = np.linalg.norm(frames - np.asarray(background.bkgds))
    np.testing.assert_allclose(background.noise_corrections, residual, rtol=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_signal_to_noise_ratio_has_unit_variance_in_a_pulsed_light(rng):
    light = np.where(np.arange(96) % 4 == 0, 1.35, 1.0)[:, None, None]
    frames = rng.poisson(60 * light, (96, 48, 48)).astype(np.float32)
    snr = np.asarray(LocalMean(4.0, 12.0)(frames).snr(frames, Camera(0.0, 1.0)))
    # 221 184 pixels: the deviation of a deviation is 0.15 %.
    np.testing.assert_allclose(snr.std(), 1, atol=0.01)


@pytest.fixture(scope="module")
def gradients():
    """In 64-bit mode, a loss of all that is learned, of the frames and of their weights,
    with its gradients in the first two in one compiled program."""
    with jax.enable_x64(True):
        frames = jnp.asarray(FRAMES, float)
        module = local_mean(max_radius_pix=4.0, max_radius_frames=8.0)
        cotangent = jnp.asarray(np.random.default_rng(4).normal(size=SHAPE))
        arrays, rest = eqx.partition(module, eqx.is_inexact_array)
        flat, unravel = jax.flatten_util.ravel_pytree(arrays)

        def loss(parameters, frames, weights):
            bkgds = eqx.combine(unravel(parameters), rest)(frames, weights).bkgds
            # Where nothing counts, there is no background.
            return jnp.nansum(cotangent * bkgds)

        return jax.jit(jax.value_and_grad(loss, (0, 1))), flat, frames


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_derivatives_are_those_of_finite_differences(gradients, x64):
    value_and_gradient, parameters, frames = gradients
    _, (of_parameters, of_frames) = value_and_gradient(parameters, frames, WEIGHTS)

    def loss(*at):
        return value_and_gradient(*at, WEIGHTS)[0]

    # Radii in frames, y and x, threshold, softness, and the radius of the light.
    assert len(parameters) == 6
    for index, derivative in enumerate(of_parameters):
        step = np.eye(len(parameters))[index]
        difference = central_difference(
            lambda x, step=step: loss(parameters + x * step, frames), 0.0, 1e-6
        )
        np.testing.assert_allclose(derivative, difference, rtol=1e-5, atol=1e-6)
    direction = np.random.default_rng(6).normal(size=SHAPE)
    difference = central_difference(
        lambda x: loss(parameters, frames + x * direction), 0.0, 1e-6
    )
    np.testing.assert_allclose(jnp.vdot(of_frames, direction), difference, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [1, 3, 12])
def test_blocks_in_a_gap_are_replaced_by_those_at_its_edges(gap, rng, x64):
    sums = rng.normal(100, 10, (2, 30, 4, 5))
    kernels = smoothing_kernels((6.0, 1.0, 1.0), 1, is_bound=False)
    smoothing = Smoothing(jnp.array([6.0, 1.0, 1.0]), kernels, 4)
    in_time = smoothing.sums_in_time(jnp.asarray(sums))
    got = smoothing.with_gap(in_time, jnp.asarray(sums), gap)
    row = reference_kernel(6.0, "smooth")
    taps = np.pad(row[row.size // 2 :], (0, 5))
    weight = taps[0] / 2 + taps[1:gap].sum()
    taps[:gap] = 0
    taps[gap] += weight
    expected = np.einsum("ij,bjyx->biyx", axis_matrix(taps, 30, "empty"), sums)
    # Roundings of 64 bits of some thirty numbers.
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def errors(frames, truth, module=None):
    """Of the background, in the unit of the frames."""
    return np.asarray((module or LocalMean(4.0, 12.0))(frames).bkgds) - truth


# Of one size, for which each estimator is compiled once.
SCENES = {
    "pulses": np.where(np.arange(96) % 4 == 0, 1.35, 1.0),
    "alternating": np.where(np.arange(96) % 2 == 0, 1.0, 0.3),
    "a step": np.where(np.arange(96) < 48, 1.0, 1.5),
    "a flash": np.where(np.arange(96) == 40, 20.0, 1.0),
    "bleaching": 0.1 ** (np.arange(96) / 96),
    "dark frames": np.where(np.arange(96) % 4 == 3, 0.0, 1.0),
}


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", SCENES)
def test_it_follows_the_light_whatever_it_does(name, rng):
    y, x = np.mgrid[:48, :48]
    level = 60 + 20 * np.sin(y / 15) * np.cos(x / 13)
    truth = SCENES[name][:, None, None] * level
    frames = (rng.poisson(truth) + rng.normal(0, 1.6, truth.shape)).astype(np.float32)
    rms = np.sqrt(np.mean(errors(frames, truth) ** 2, (1, 2)))
    plain = np.sqrt(np.mean(errors(frames, truth, SpatialMean(7.0)) ** 2, (1, 2)))
    # In no frame worse than the mean of that frame, and much better in all together.
    assert np.all(rms < np.maximum(plain, 0.25))
    assert rms.mean() < 0.6 * plain.mean()


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_lost_frames_saved_as_zeros_do_not_pull_their_neighbours(rng):
    truth = np.full((96, 48, 48), 60.0)
    frames = rng.poisson(truth).astype(np.float32)
    lost = np.isin(np.arange(96), [31, 32, 60])
    spoiled = frames - 100.0 * lost[:, None, None] - frames * lost[:, None, None]
    near = ~lost & np.isin(np.arange(96), [29, 30, 33, 34, 59, 61])
    with_lost, without = (errors(f, truth)[near].std() for f in (spoiled, frames))
    assert with_lost < 1.1 * without


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("rank", [1, 2])
def test_molecules_are_clipped_beside_dark_frames_that_have_noise(rank, rng):
    y, x = np.mgrid[:48, :48]
    places = rng.uniform(0, 48, (96, 3, 2))[..., None, None]
    spots = np.exp(-((places[:, :, 0] - y) ** 2 + (places[:, :, 1] - x) ** 2) / 3.4)
    molecules = 70 * spots.sum(1)
    is_dark = np.arange(96) // 8 % 2 == 1
    lit = rng.poisson(60 + molecules * ~is_dark[:, None, None])
    noise = rng.normal(0, 1.6, lit.shape)
    frames = (lit * ~is_dark[:, None, None] + noise).astype(np.float32)
    estimator = LocalMean(7.0, 30.0, illumination_rank=rank)
    bias = errors(frames, 60.0, estimator)[~is_dark].mean()
    # Nothing is so bright. The program is that of any threshold.
    without = errors(frames, 60.0, LocalMean(7.0, 30.0, clip=100.0))[~is_dark].mean()
    assert abs(bias) < 0.3 * without


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("photons", [0.03, 0.3])
@pytest.mark.parametrize("gain", [1, 300], ids=["counts", "EMCCD"])
def test_few_photons_are_not_mistaken_for_molecules(photons, gain, rng):
    counts = rng.poisson(photons, (7, 96, 48, 48))
    # The gain of an electron multiplier is exponential for each electron.
    movies = (counts if gain == 1 else rng.gamma(counts, gain)).astype(np.float32)
    # Of the same frames without a clip, so that the noise of their mean is in neither.
    linear = [errors(frames, 0, LocalMean(clip=None)) for frames in movies]
    differences = [
        errors(frames, mean, LocalMean())
        for frames, mean in zip(movies, linear, strict=True)
    ]
    assert abs(np.mean(differences)) < 0.01 * movies.mean()


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_noise_that_is_correlated_does_not_shift_the_mean(rng):
    frames = rng.poisson(60, (96, 49, 49)).astype(np.float32)
    # Registered by half a pixel along both axes.
    frames = (frames[:, 1:] + frames[:, :-1]) / 2
    frames = (frames[..., 1:] + frames[..., :-1]) / 2
    assert abs(errors(frames, 60.0).mean()) < 0.01 * 60


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_fine_structure_is_background(rng):
    x = np.arange(48)
    truth = np.broadcast_to(60 + 18 * np.sin(2 * np.pi * x / 20), (96, 48, 48))
    frames = rng.poisson(truth).astype(np.float32)
    plain = errors(frames, truth, SpatialMean(7.0)).std()
    assert errors(frames, truth, LocalMean()).std() < 0.6 * plain


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("name", ["pulses", "a step", "bleaching"])
def test_molecules_keep_their_light(name, rng):
    truth = np.broadcast_to(60 * SCENES[name][:, None, None], (96, 48, 48))
    frames = rng.poisson(truth).astype(np.float32)
    y, x = np.mgrid[-6:7, -6:7]
    spot = np.exp(-(y**2 + x**2) / (2 * 1.3**2))
    spot *= 700 / spot.sum()
    # On for 8 frames each. Without a clip, 2 to 3 % of their light would be taken.
    places = [(t, *rng.integers(8, 40, 2)) for t in range(4, 88, 4)]
    with_molecules = frames.copy()
    for t, row, column in places:
        with_molecules[t : t + 8, row - 6 : row + 7, column - 6 : column + 7] += spot
    taken = errors(with_molecules, errors(frames, 0, LocalMean()), LocalMean())
    # What a fit of spot and constant in 7 x 7 px finds of that.
    weights = spot[3:10, 3:10] - spot[3:10, 3:10].mean()
    shares = [
        (taken[t + 4, row - 3 : row + 4, column - 3 : column + 4] * weights).sum()
        / (spot[3:10, 3:10] * weights).sum()
        for t, row, column in places
    ]
    assert abs(np.median(shares)) < 0.01


@pytest.mark.long
# The light adds to the halo, in which what the clip needs of it would not show.
@pytest.mark.parametrize("options", [{"illumination_rank": 0}, {"clip": None}])
def test_a_part_that_begins_at_whole_blocks_gives_the_same_bits(options):
    module = local_mean(block_frames=4, **options).for_inference()
    frames = np.random.default_rng(2).poisson(60, (400, 13, 12)).astype(np.uint16)
    whole = np.asarray(module(frames).bkgds)
    halo, length = module.halo_frames, 200
    assert 2 * halo < length - 8
    # At the start, in the middle and at the end, in parts of one length that begin at whole
    # blocks, with frames that do not.
    for low in (0, 100, 200):
        start = low + halo + 3 if low else 0
        stop = low + length - (halo if low < 200 else 0)
        assert low == max(0, start - halo) // 4 * 4
        part = np.asarray(module(frames[low : low + length]).bkgds)
        np.testing.assert_array_equal(part[start - low : stop - low], whole[start:stop])


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_stacks_of_stacks_and_lists_of_channels_are_each_estimated_alone():
    module = local_mean(clip=None)
    alone = np.asarray(module(FRAMES).bkgds)
    background = module(np.stack([FRAMES, FRAMES[::-1]]))
    assert background.illumination.shape == (2, SHAPE[0])
    close(background.bkgds[0], alone, 1e-4)
    listed = module([FRAMES, FRAMES[::-1]])
    np.testing.assert_array_equal(listed.bkgds[0], alone)
    close(listed.bkgds[1], background.bkgds[1], 1e-4)
    assert module([FRAMES, FRAMES[:8]]).illumination[1].shape == (8,)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_pixel_that_is_no_number_spoils_what_sees_it_or_is_left_out():
    spoiled = np.array(FRAMES)
    spoiled[3, 4, 4] = np.nan
    assert np.isnan(local_mean()(spoiled).bkgds).all((1, 2))[:8].all()
    mask = np.isfinite(spoiled).astype(float)
    skipped = local_mean(skips_nan=True)(spoiled).bkgds
    close(skipped, local_mean()(spoiled, mask).bkgds, 1e-4)
    assert np.isfinite(skipped).all()


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_pixel_that_never_counts_far_from_those_that_do_has_no_background():
    mask = np.zeros(SHAPE)
    mask[:, :5, :5] = 1
    bkgds = np.asarray(local_mean()(FRAMES, mask).bkgds)
    assert np.isfinite(bkgds[:, :5, :5]).all()
    assert np.isnan(bkgds[:, -1, -1]).all()


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_light_that_is_not_positive_leaves_the_mean_of_each_frame():
    frames = np.random.default_rng(1).normal(-7, 1, SHAPE).astype(np.float32)
    module = local_mean()
    # Four deviations of the mean of 156 px, of which some are clipped.
    close(module(frames).bkgds.mean((1, 2)), frames.mean((1, 2)), 0.32)
    np.testing.assert_array_equal(module(np.zeros_like(frames)).bkgds, 0)
    assert module(frames[:0]).bkgds.shape == (0, *SHAPE[1:])


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_gradients_are_finite_beside_what_is_left_out_and_on_a_dark_movie(gradients, x64):
    value_and_gradient, parameters, frames = gradients
    mask = np.zeros(SHAPE)
    mask[:, :5, :5] = 1
    for movie in (frames, jnp.zeros_like(frames)):
        for gradient in value_and_gradient(parameters, movie, mask)[1]:
            assert np.isfinite(gradient).all()


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_prediction_has_not_seen_its_frame():
    # Of second order, a rounding of what was seen and is taken back.
    for order, most in ((2, 1e-6), (4, 0.05)):
        options: Any = {"illumination_rank": 0, "block_frames": 2, "kernel_order": order}
        module = LocalMean(1.3, 4.0, clip=None, **options)
        for time in (0, 9, 27):
            frames = np.zeros((28, 6, 6), np.float32)
            frames[time] = 1
            background, near, far, *_ = module.predict(frames, 3)
            own = np.abs(np.asarray(background.bkgds[time])).max()
            for prediction, gap in ((near, 3), (far, 11)):
                seen = np.abs(np.asarray(prediction)).max((1, 2))
                within = slice(max(time - gap + 1, 0), time + gap)
                # Of fourth order, what is smoothed twice at the ends of a movie differs
                # from the difference of two Gaussians, which sees nothing.
                assert seen[within].max() <= most * own
                assert seen.max() > 0.05 * own


@pytest.mark.long
def test_a_prediction_is_of_the_background_of_a_call_also_beside_a_mask(rng):
    frames = np.full((60, 20, 20), 50.0, np.float32)
    frames += 5 * np.sin(np.arange(20) / 2)
    frames[:, 8:12, 8:12] = np.nan
    module = LocalMean(3.0, 8.0, clip=None, skips_nan=True)
    called = np.asarray(module(frames).bkgds)
    background, near, far, *_ = module.predict(frames, 2)
    np.testing.assert_array_equal(background.bkgds, called)
    # The movie is steady, so that blocks farther away show the same.
    for prediction in (near, far):
        np.testing.assert_allclose(prediction, called, rtol=1e-5)


def test_predictions_need_frames_beyond_the_gap():
    for gap_frames, count in ((0, 12), (-3, 12), (3, 7)):
        with pytest.raises(ValueError, match=rf"gap of {gap_frames} frames .* are {count}"):
            LocalMean(1.3, 2.0).predict(np.ones((count, 6, 6)), gap_frames)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radii_pix": 0.0}, ValueError, "must be positive"),
        ({"radius_frames": -1.0}, ValueError, "must be positive and at most 100000 frames"),
        ({"radius_frames": "10"}, TypeError, "must be a number of frames"),
        (
            {"radii_pix": [(1, 2)] * 3, "radius_frames": [1, 2]},
            ValueError,
            "for 3 channels, but in frames for 2",
        ),
        (
            {"radius_frames": 10.0, "max_radius_frames": 10.0},
            ValueError,
            "raise max_radius_frames",
        ),
        ({"radii_pix": 7.0, "max_radius_pix": 5.0}, ValueError, "raise max_radius_pix"),
        ({"max_radius_frames": "many"}, TypeError, "max_radius_frames must be a number"),
        ({"clip": 0.0}, ValueError, "threshold must be at least 0.01 and at most 100"),
        ({"clip": "on"}, TypeError, "threshold must be a number"),
        ({"frozen": [True] * 5}, ValueError, "frozen must be"),
        ({"radius_frames": np.array([[10.0, 5.0]])}, ValueError, "one for each channel"),
        ({"skips_nan": "no"}, TypeError, "skips_nan must be True or False"),
        ({"illumination_rank": 5}, ValueError, "illumination_rank must be one of"),
        ({"kernel_order": 3}, ValueError, "kernel_order must be one of"),
        ({"block_frames": 0}, ValueError, "block_frames must be a whole number from 1"),
        (
            {"illumination_radius_frames": 0},
            ValueError,
            "illumination_radius_frames must be at least 0.1 and at most 20 frames",
        ),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_settings_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LocalMean(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "weights", "error", "message"),
    [
        (FRAMES[0, 0], None, ValueError, "must have shape"),
        (FRAMES.astype(complex), None, TypeError, "must be real"),
        (FRAMES, np.ones((9, 11)), ValueError, "for each frame, (frames, 1, 1)"),
        # Of one for each frame, were there as many columns.
        (FRAMES, np.ones(SHAPE[-1]), ValueError, "for each frame, (frames, 1, 1)"),
        (FRAMES, np.ma.ones(SHAPE), TypeError, "but are a masked one"),
        (FRAMES, np.full(SHAPE, -1.0), ValueError, "zero or positive, and finite"),
        (FRAMES, [MASK], ValueError, "give a list of stacks"),
        (FRAMES[:, :4], None, ValueError, "or more, but these have the shape (22, 4, 12)"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_frames_and_weights_that_do_not_fit_are_refused(channels, weights, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LocalMean(1.3, 1.2)(channels, weights)


@pytest.mark.usefixtures("as_installed")
def test_a_traced_radius_needs_a_bound():
    for options in ({"max_radius_pix": 9.0}, {"max_radius_frames": 9.0}):
        radii = jax.jit(lambda r, options=options: LocalMean(r, r, **options).radii)
        with pytest.raises(ValueError, match="A traced radius needs"):
            radii(2.0)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_frame_without_a_number_has_the_light_of_its_neighbours():
    frames = np.random.default_rng(0).poisson(60, SHAPE).astype(np.float32)
    frames[7] = np.nan
    background = local_mean(skips_nan=True)(frames)
    # Of 156 pixels and 22 frames, some 0.6 photons.
    np.testing.assert_allclose(background.bkgds[7].mean(), 60, atol=2)
    assert background.illumination[7] > 0

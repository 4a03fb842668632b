"""LocalMean against its definition in float64: dense matrices along time, y and x."""

import functools as ft
import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import central_difference
from hypothesis import given, settings, strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from reference import mean_matrix
from scipy.integrate import quad
from scipy.special import expit

from jaxbkgd import LocalMean, simulate_movie, SoftClip, SpatialMean


# (frames, y, x). Few taps, so that little is compiled.
RADII = (1.2, 1.8, 1.3)

# Photo-electrons: an uneven background, and a molecule in every other frame.
SHAPE = (8, 11, 9)
Y, X = np.mgrid[:11, :9]
LEVEL = 60 + 2 * Y - 3 * X
EVENTS = [(frame, 2 + frame, 7 - frame % 5) for frame in range(0, 8, 2)]
LIGHT = np.zeros(SHAPE)
for frame, y, x in EVENTS:
    LIGHT[frame] += 90 * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / 3.4)
FRAMES = np.random.default_rng(7).poisson(LEVEL + LIGHT).astype(np.float32)

# Pixels to leave out: a block that is a whole pixel of the halved frames, one two pixels
# from the edge, a corner, and a lost frame.
MASK = np.ones(SHAPE, bool)
MASK[:, 4:6, 2:4] = MASK[:, 8, 5] = MASK[:, 0, 0] = MASK[5] = False
WEIGHTS = np.random.default_rng(8).uniform(0.2, 3.0, SHAPE)


# Below a third of a molecule, 90 e- high, and above four deviations of the noise, 8 e-, of
# the mean of as few pixels as there may be.
ERROR = 30


class Clip(NamedTuple):
    """What a SoftClip is made of."""

    threshold: float = 2.0
    softness: float = 0.4
    rounds: int = 2
    gain: float | None = None
    read_noise: float = 0.0
    molecule_radius_pix: float = 1.6

    def module(self) -> SoftClip:
        return SoftClip(
            self.threshold,
            self.softness,
            rounds=self.rounds,
            gains=self.gain,
            read_noise_electrons=self.read_noise,
            molecule_radius_pix=self.molecule_radius_pix,
        )


def local_mean(radii=RADII, clip: Clip | None = None, **options: Any) -> LocalMean:
    soft_clip = None if clip is None else clip.module()
    return LocalMean(tuple(radii[1:]), radii[0], clip=soft_clip, **options)


matrix = ft.partial(mean_matrix, truncation="smooth")


def smoothed(images, radii, edge_frames):
    """`edge_frames` of either kind: what is renormalised is a ratio of two of these."""
    edges = "repeated" if edge_frames == "repeated" else "empty"
    time, y, x = (
        matrix(float(radius), size, edges=edges)
        for radius, size, edges in zip(
            radii, images.shape[-3:], (edges, "repeated", "repeated"), strict=True
        )
    )
    return np.einsum("at,...tyx->...ayx", time, y @ images @ x.T)


def ratio(sums, totals):
    return np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)


def halved(images):
    *batch, height, width = images.shape
    widths = [*[(0, 0)] * len(batch), (0, height % 2), (0, width % 2)]
    images = np.pad(images, widths, "edge")
    images = images[..., ::2, :] + images[..., 1::2, :]
    return (images[..., ::2] + images[..., 1::2]) / 4


def doubled(images, shape):
    return images.repeat(2, axis=-2).repeat(2, axis=-1)[..., : shape[-2], : shape[-1]]


def with_edge(images):
    return np.pad(images, [*[(0, 0)] * (images.ndim - 2), (1, 1), (1, 1)], "edge")


def reference_bias(clip: Clip) -> float:
    """The mean of a normal deviation under the weights, by adaptive quadrature."""

    def integral(function):
        return quad(
            lambda z: function(z) * np.exp(-(z**2) / 2), -9, 9, points=[clip.threshold]
        )[0]

    def weight(z):
        return 1e-3 + 0.999 * expit((clip.threshold - z) / clip.softness)

    return integral(lambda z: z * weight(z)) / integral(weight)


def reference_local_mean(
    frames, radii=RADII, clip: Clip | None = None, weights=None, edge_frames="renormalised"
):
    shape = np.shape(frames)
    frames = np.asarray(frames, np.float64).reshape((-1, *shape)[-max(3, len(shape)) :])
    weights = np.broadcast_to(1.0 if weights is None else weights, frames.shape) * 1.0
    frames = np.where(weights > 0, frames, 0)
    smooth = ft.partial(smoothed, radii=radii, edge_frames=edge_frames)
    if clip is None:
        bkgd = ratio(smooth(frames * weights), smooth(weights))
    else:
        bkgd = reference_clipped(frames, weights, np.array(radii), clip, edge_frames)
    return np.where(smooth(weights) <= 1e-6, np.nan, bkgd).reshape(shape)


def reference_clipped(frames, weights, radii, clip: Clip, edge_frames):
    bias = reference_bias(clip)
    averaging = [matrix(clip.molecule_radius_pix, size) for size in frames.shape[-2:]]
    norms = np.outer(*(np.linalg.norm(row, axis=1) for row in averaging))
    own_shares = np.outer(*map(np.diag, averaging)) / norms
    # A radius of 0.1 frames is one tap.
    molecule_radii = (0.1, clip.molecule_radius_pix, clip.molecule_radius_pix)
    average = ft.partial(smoothed, radii=molecule_radii, edge_frames="repeated")
    full = ft.partial(smoothed, radii=radii, edge_frames=edge_frames)
    small = ft.partial(smoothed, radii=radii * (1, 0.5, 0.5), edge_frames=edge_frames)
    averaged = ratio(average(frames * weights), average(weights))
    small_weights = halved(weights)
    small_frames = ratio(halved(frames * weights), small_weights)
    noise = None
    if clip.gain is None:
        squares = with_edge(np.diff(np.diff(frames, 2, -1), 2, -2)) ** 2 / 36
        windows = sliding_window_view(weights > 0, (3, 3), (-2, -1))
        is_noise = with_edge(windows.all((-2, -1)).astype(float))
        noise = ratio(small(halved(is_noise * squares)), small(halved(is_noise)))

    def mean_of(frames, weights, averaged, own_shares, norms, bkgd, noise, smooth):
        if clip.gain is not None:
            noise = np.maximum(bkgd, 0) / clip.gain + (clip.read_noise / clip.gain) ** 2
        # Not zero, where there is nothing.
        deviation = np.maximum(np.sqrt(noise), 1e-5 * np.abs(bkgd) + 1e-150)
        z = (averaged - bkgd) / (norms * deviation)
        shares = 1e-3 + 0.999 * expit((clip.threshold - z) / clip.softness)
        means = ratio(smooth(frames * weights * shares), smooth(weights * shares))
        return means - bias * own_shares * deviation

    bkgd = ratio(small(small_frames * small_weights), small(small_weights))
    for _ in range(clip.rounds - 1):
        small_averaged, small_shares, small_norms = map(
            halved, (averaged, own_shares, norms)
        )
        bkgd = mean_of(
            small_frames,
            small_weights,
            small_averaged,
            small_shares,
            small_norms,
            bkgd,
            noise,
            small,
        )
    bkgd = doubled(bkgd, frames.shape)
    noise = None if noise is None else doubled(noise, frames.shape)
    return mean_of(frames, weights, averaged, own_shares, norms, bkgd, noise, full)


# Roundings of some hundred terms, in float32 and in float64.
close = ft.partial(np.testing.assert_allclose, rtol=3e-6)
close_x64 = ft.partial(np.testing.assert_allclose, rtol=1e-11)


class TestWithoutClipping:
    @pytest.mark.parametrize("dtype", ["u2", "f4", "i8"])
    @pytest.mark.parametrize("edge_frames", ["renormalised", "repeated"])
    def test_is_the_mean_under_a_gaussian_over_time_y_and_x(self, dtype, edge_frames):
        frames = FRAMES.astype(dtype)
        background = local_mean(edge_frames=edge_frames)(frames)
        assert background.bkgds.dtype == jnp.float32
        close(background.bkgds, reference_local_mean(frames, edge_frames=edge_frames))

    def test_is_float64_for_float64_frames(self, x64):
        frames = FRAMES.astype(float)
        bkgds = local_mean()(frames).bkgds
        assert bkgds.dtype == jnp.float64
        close_x64(bkgds, reference_local_mean(frames))

    @pytest.mark.parametrize("shape", [(11, 9), (1, 11, 9), (1, 1, 1), (2, 1, 4, 11, 9)])
    def test_stacks_of_any_shape_have_one(self, shape):
        frames = FRAMES.ravel()[: np.prod(shape)].reshape(shape)
        bkgds = local_mean()(frames).bkgds
        assert bkgds.shape == shape
        close(bkgds, reference_local_mean(frames))

    def test_a_kernel_may_be_wider_than_the_movie(self):
        radii = (9.0, 2.0, 14.0)
        for edge_frames in ("renormalised", "repeated"):
            bkgds = local_mean(radii, edge_frames=edge_frames)(FRAMES[:3]).bkgds
            close(bkgds, reference_local_mean(FRAMES[:3], radii, edge_frames=edge_frames))

    def test_each_channel_has_its_radii_and_its_shape(self):
        channels = [FRAMES, FRAMES[:3, :6]]
        module = LocalMean([(1.8, 1.3), (1.0, 2.0)], [1.2, 2.5], clip=None)
        background = module(channels)
        for bkgd, frames, radii in zip(
            background.bkgds, channels, [RADII, (2.5, 1.0, 2.0)], strict=True
        ):
            close(bkgd, reference_local_mean(frames, radii))
        assert isinstance(module(tuple(channels)).bkgds, tuple)
        close(module.radii, [RADII, (2.5, 1.0, 2.0)])

    def test_without_time_it_is_the_spatial_mean(self):
        module = LocalMean((1.8, 1.3), 0.1, clip=None)
        background, expected = module(FRAMES), SpatialMean((1.8, 1.3))(FRAMES)
        close(background.bkgds, expected.bkgds)
        close(background.noise_corrections, expected.noise_corrections)

    def test_its_noise_is_the_norm_of_what_it_makes_of_a_single_pixel(self, x64):
        frames = np.zeros((9, 11, 11))
        frames[4, 5, 5] = 1
        radii = (1.5, 2.0, 2.7)
        background = local_mean(radii)(frames)
        # Sums of some hundred terms of 64 bits.
        close_x64(background.noise_corrections, np.linalg.norm(frames - background.bkgds))


CLIPPED_CASES = [
    (Clip(rounds=1), None, "renormalised"),
    (Clip(rounds=2, gain=0.5, read_noise=1.5), None, "repeated"),
    (Clip(rounds=3), MASK, "renormalised"),
    (Clip(rounds=2, gain=2.0), WEIGHTS * MASK, "renormalised"),
    (Clip(rounds=2), WEIGHTS, "repeated"),
]


class TestClipped:
    @pytest.mark.parametrize(("clip", "weights", "edge_frames"), CLIPPED_CASES)
    def test_is_the_mean_under_soft_weights(self, clip, weights, edge_frames, x64):
        frames = FRAMES.astype(float)
        got = local_mean(clip=clip, edge_frames=edge_frames)(frames, weights).bkgds
        expected = reference_local_mean(frames, RADII, clip, weights, edge_frames)
        # Some hundred roundings of 64 bits, a few times larger for the slope of a weight.
        np.testing.assert_allclose(got, expected, rtol=1e-10)
        linear = reference_local_mean(frames, RADII, None, weights, edge_frames)
        assert np.nanmax(np.abs(linear - expected)) > 1

    def test_is_that_in_float32_too(self):
        clip, frames = Clip(), FRAMES.astype(np.uint16)
        got = local_mean(clip=clip)(frames).bkgds
        assert got.dtype == jnp.float32
        # A weight's slope, and differences of frames from their mean, make the roundings
        # of float32 some ten times larger.
        close(got, reference_local_mean(frames, RADII, clip), rtol=3e-5)

    def test_float32_frames_stay_float32_in_64_bit_mode(self, x64):
        background = local_mean(clip=Clip())(FRAMES)
        assert background.bkgds.dtype == jnp.float32
        assert background.noise_corrections.dtype == jnp.float32

    def test_each_channel_has_its_camera(self):
        clips = [Clip(gain=0.5, read_noise=1.0), Clip(gain=2.0, read_noise=4.0)]
        clip = SoftClip(
            2.0,
            0.4,
            gains=[0.5, 2.0],
            read_noise_electrons=[1.0, 4.0],
            molecule_radius_pix=1.6,
        )
        module = LocalMean((1.8, 1.3), 1.2, clip=clip)
        for got, one in zip(module([FRAMES, FRAMES]).bkgds, clips, strict=True):
            close(got, reference_local_mean(FRAMES, RADII, one), rtol=3e-5)


# With the same settings, so that they are compiled once for each shape of weights.
MODULES = {"linear": local_mean(), "clipped": local_mean(clip=Clip())}


@pytest.fixture(params=list(MODULES))
def module(request):
    return MODULES[request.param]


class TestWeights:
    @pytest.mark.parametrize("shape", [(11, 9), (8, 1, 1), (1, 9), (8, 11, 9)])
    def test_broadcast_to_the_frames(self, shape, rng):
        weights = rng.uniform(0.5, 2, shape)
        for values in (weights, weights > 0.8):
            close(
                local_mean()(FRAMES, values).bkgds,
                reference_local_mean(FRAMES, RADII, None, values),
            )

    def test_that_are_known_may_be_used_in_a_function_that_is_traced(self):
        weights = jnp.asarray(MASK)
        got = jax.jit(lambda frames: MODULES["linear"](frames, weights).bkgds)(FRAMES)
        close(got, MODULES["linear"](FRAMES, MASK).bkgds)

    def test_are_given_for_each_channel(self):
        lost = np.ones((8, 1, 1), bool)
        lost[3] = False
        got = local_mean()([FRAMES, FRAMES], [MASK, lost]).bkgds
        for bkgd, weights in zip(got, [MASK, lost], strict=True):
            close(bkgd, reference_local_mean(FRAMES, RADII, None, weights))

    def test_of_one_half_for_all_are_no_weights(self, module):
        got = module(FRAMES, np.full(SHAPE, 0.5, np.float32)).bkgds
        # Roundings, as above.
        close(got, module(FRAMES).bkgds, rtol=3e-5)

    def test_what_is_masked_has_no_influence_and_a_background(self, module):
        others = np.where(MASK, FRAMES, 6e4).astype(np.float32)
        others[~MASK & (LIGHT > 0)] = np.nan
        got = module(FRAMES, MASK).bkgds
        np.testing.assert_array_equal(got, module(others, MASK).bkgds)
        assert np.all(np.isfinite(got))
        assert FRAMES[MASK].min() < np.min(got) < np.max(got) < FRAMES[MASK].max()

    def test_a_lost_frame_is_filled_from_those_around_it(self, module):
        weights = np.ones(SHAPE, bool)
        weights[3] = False
        flat = np.full(SHAPE, 50, np.float32)
        close(module(flat, weights).bkgds, flat)

    def test_skipping_nan_is_masking(self, module):
        is_nan = np.array([np.nan, np.inf, -np.inf], np.float32)[np.arange(MASK.size) % 3]
        frames = np.where(MASK, FRAMES, is_nan.reshape(SHAPE))
        skips = eqx.tree_at(
            lambda m: m.clip,
            local_mean(skips_nan=True),
            module.clip,
            is_leaf=lambda x: x is None,
        )
        expected = module(FRAMES, MASK).bkgds
        # The same arithmetic, compiled anew.
        close(skips(frames).bkgds, expected, rtol=1e-5)
        close(skips(frames, np.ones(SHAPE, bool)).bkgds, expected, rtol=1e-5)

    def test_nan_gives_nan_and_no_wrong_number(self, module):
        frames = FRAMES.copy()
        frames[0, 10, 8] = np.nan
        got, clean = np.asarray(module(frames).bkgds), np.asarray(module(FRAMES).bkgds)
        is_nan = np.isnan(got)
        assert is_nan[0, 10, 8]
        assert not is_nan.all()
        np.testing.assert_array_equal(got[~is_nan], clean[~is_nan])

    @pytest.mark.parametrize("gain", [None, 1.0])
    def test_where_there_is_no_weight_there_is_nan_and_nowhere_else(self, gain):
        weights = np.ones(SHAPE, bool)
        weights[:, :, :6] = False
        for clip in (None, Clip(gain=gain)):
            got = np.asarray(local_mean(clip=clip)(FRAMES, weights).bkgds)
            # A kernel of 1.3 px reaches 2 px.
            np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(X < 4, SHAPE))

    def test_where_noise_cannot_be_measured_it_must_be_given(self):
        """All pixels are next to one that is left out."""
        weights = np.broadcast_to((Y + X) % 2 == 0, SHAPE)
        assert np.all(np.isnan(MODULES["clipped"](FRAMES, weights).bkgds))
        got = np.asarray(local_mean(clip=Clip(gain=1.0))(FRAMES, weights).bkgds)
        assert np.abs(got - LEVEL).max() < ERROR

    def test_frames_without_noise_to_measure_leave_others_alone(self):
        weights = np.ones(SHAPE, bool)
        weights[:3] = (Y + X) % 2 == 0
        got = np.asarray(MODULES["clipped"](FRAMES, weights).bkgds)
        # Their own background comes from those around them.
        assert np.abs(got - LEVEL).max() < ERROR

    def test_whole_numbers_beyond_32_bits_do_not_wrap(self):
        weights = np.full(SHAPE, 2**40)
        # Some float32 roundings of sums and their quotient.
        np.testing.assert_allclose(
            local_mean()(FRAMES, weights).bkgds, local_mean()(FRAMES).bkgds, rtol=1e-5
        )

    def test_beside_holes_without_noise_it_is_that_of_the_frame(self):
        weights = np.ones(SHAPE, bool)
        weights[:, 4:, ::2] = False
        got = np.asarray(MODULES["clipped"](FRAMES, weights).bkgds)
        assert np.abs(got - LEVEL).max() < ERROR


class TestEdgeFrames:
    @pytest.mark.parametrize(
        ("change", "better", "worse"),
        [(0.0, "renormalised", "repeated"), (1.0, "repeated", "renormalised")],
    )
    def test_are_less_noisy_renormalised_and_follow_a_slope_repeated(
        self, change, better, worse
    ):
        """A background of 100 that is steady, or rises by so much in a frame."""
        bkgds = 100 + change * np.arange(60)[:, None, None]
        frames = np.random.default_rng(0).poisson(bkgds, (60, 24, 24))

        def error(edge_frames):
            module = LocalMean(3.0, 10.0, clip=None, edge_frames=edge_frames)
            missed = (module(frames).bkgds - bkgds)[np.array([0, 1, 2, -3, -2, -1])]
            return float(np.sqrt(np.mean(missed**2)))

        assert error(better) < 0.95 * error(worse)


class TestScales:
    @pytest.mark.parametrize("level", [0.0, 1e-3, 100.0, 6e4])
    def test_a_constant_movie_comes_back(self, module, level):
        frames = np.full(SHAPE, level, np.float32)
        # Roundings of float32; a deviation has a floor, far below a count.
        close(module(frames).bkgds, frames, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("scale", [1e-5, 0.37, 1e3])
    def test_a_scaled_movie_has_a_scaled_background(self, module, scale):
        got = module(np.float32(scale) * FRAMES).bkgds
        # As above, in the comparison with float64.
        close(got, scale * module(FRAMES).bkgds, rtol=3e-5)

    def test_an_offset_moves_the_background_and_nothing_else(self, module):
        got = module(FRAMES + np.float32(1000)).bkgds
        # Roundings of float32 at 1000, and the slope of a weight.
        close(got - 1000, module(FRAMES).bkgds, rtol=0, atol=1e-2)


def counts_of(level, read_noise=0.0, shape=(100, 64, 64)):
    """Frames without molecules, in electrons."""
    rng = np.random.default_rng(int(level))
    frames = rng.poisson(level, shape) + rng.normal(0, read_noise, shape)
    return frames.astype(np.float32)


@ft.cache
def changes_by_clipping(camera, level, threshold):
    """What clipping changes in the linear mean, which has the same noise and no bias: the
    standard error of its mean is below 1e-4 of the level."""
    gains, read_noise = camera or (None, 0.0)
    clip = SoftClip(threshold, gains=gains, read_noise_electrons=read_noise)
    frames = counts_of(level, read_noise=1.5)
    change = LocalMean(clip=clip)(frames).bkgds - LocalMean(clip=None)(frames).bkgds
    own_share = clip.average_response(*frames.shape[1:])[0][32, 32]
    return np.asarray(change), float(own_share * clip.noise_bias())


class TestNoise:
    """On frames without molecules, at the default radii."""

    @pytest.mark.parametrize("camera", [None, (1.0, 1.5)])
    @pytest.mark.parametrize("is_at_an_edge", [False, True])
    def test_clipping_has_no_bias_on_pure_noise(self, camera, is_at_an_edge):
        for level in (5, 20, 60, 200):
            for threshold in (3.0, 2.0):
                change, noise_bias = changes_by_clipping(camera, level, threshold)
                edge = np.concatenate([change[:, 0].ravel(), change[:, :, 0].ravel()])
                bias = np.mean(edge if is_at_an_edge else change[:, 14:-14, 14:-14])
                # At an edge, few pixels stand for many, in a weight as well.
                assert abs(bias) < (4e-3 if is_at_an_edge else 1e-3) * level
                removed = noise_bias * np.sqrt(level + 1.5**2)
                assert threshold == 3 or abs(bias + removed) > 1e-3 * level

    def test_there_is_little_bias_at_the_ordinary_density_of_molecules(self):
        frames, truth = simulate_movie(
            jax.random.key(3), height_pix=64, width_pix=64, molecules_per_frame=5.0
        )
        errors = LocalMean()(frames.astype(jnp.float32) - 100).bkgds - truth.bkgds_adu
        assert abs(jnp.mean(errors)) < 0.005 * jnp.mean(truth.bkgds_adu)

    @pytest.mark.parametrize("radii", [(10.0, 7.0, 7.0), (1.5, 2.0, 2.0)])
    @pytest.mark.parametrize("gains", [None, 1.0])
    def test_snr_has_unit_variance_and_the_noise_is_that_of_residuals(self, radii, gains):
        frames = counts_of(60)
        inside = np.s_[15:-15, 10:-10, 10:-10]
        for clip in (None, SoftClip(gains=gains)):
            background = LocalMean(radii[1:], radii[0], clip=clip)(frames)
            measured = np.std(background.residuals(frames)[inside]) / np.sqrt(60)
            # The deviation of 135 000 pixels has a standard error of 0.2 %.
            np.testing.assert_allclose(background.noise_corrections, measured, rtol=1e-2)
            assert abs(np.var(background.snr(frames, 1.0)[inside]) - 1) < 0.02


# Gradients are compared with differences of the reference, in what is learned:
# unbounded radii, and the logarithms of threshold and softness.
BOUNDS = np.array([1.5, 2.5, 2.5])
LOSS_WEIGHTS = np.random.default_rng(9).uniform(0.5, 1.5, SHAPE)
PARAMETERS = np.log(np.array(RADII) / (BOUNDS - RADII)), np.log([2.0, 0.4])
STEP = 1e-5


def loss_of(bkgds, xp):
    return xp.mean(LOSS_WEIGHTS * xp.sin(xp.where(xp.isnan(bkgds), 0, bkgds) / 20))


# Static bounds, of as few taps.
BOUNDED = {"max_radius_frames": BOUNDS[0], "max_radius_pix": BOUNDS[1]}


def with_parameters(module, parameters):
    return eqx.tree_at(
        lambda module: (module.unbounded_radii, module.clip.log_parameters),
        module,
        (parameters[0][None], parameters[1]),
    )


def clipped_loss(parameters, frames, weights):
    module = with_parameters(local_mean(clip=Clip(), **BOUNDED), parameters)
    return loss_of(module(frames, weights).bkgds, jnp)


def reference_loss(parameters, frames, weights=None, clip=None, **options):
    unbounded, log_parameters = parameters
    radii = BOUNDS * expit(np.resize(unbounded[[0, 1, -1]], 3))
    if clip is not None:
        clip = clip._replace(
            threshold=np.exp(log_parameters[0]), softness=np.exp(log_parameters[1])
        )
    return loss_of(reference_local_mean(frames, radii, clip, weights, **options), np)


def differences(function, parameters, frames):
    """The central differences in each of the parameters."""
    flat, unflatten = jax.flatten_util.ravel_pytree(parameters)

    def moved(t, direction):
        return jax.tree.map(np.asarray, unflatten(flat + t * direction))

    return unflatten(
        jnp.array(
            [
                central_difference(
                    lambda t, direction=direction: function(moved(t, direction), frames),
                    0.0,
                    STEP,
                )
                for direction in np.eye(flat.size)
            ]
        )
    )


# The step squared and roundings over the step, both below 1e-9; slopes are about 1e-2.
close_slopes = ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)


class TestGradients:
    def test_agree_with_differences_whatever_is_masked(self, rng, x64):
        """In reverse, under jit and vmap: with weights, with some of them zero, with none
        in a part of the frames, and with frames that are constant."""
        everywhere = np.ones(SHAPE)
        frames = np.stack([FRAMES, FRAMES, FRAMES, np.full(SHAPE, 70)]).astype(float)
        weights = np.stack([WEIGHTS, everywhere * MASK, everywhere * (X > 5), everywhere])
        function = jax.value_and_grad(clipped_loss, (0, 1))
        values, (slopes, d_frames) = jax.jit(jax.vmap(function, (None, 0, 0)))(
            PARAMETERS, frames, weights
        )
        direction = rng.normal(size=SHAPE)

        def check(value, slope, d_frames, frames, weights):
            function = ft.partial(reference_loss, weights=weights, clip=Clip())
            close_x64(value, function(PARAMETERS, frames), rtol=1e-9)
            jax.tree.map(close_slopes, slope, differences(function, PARAMETERS, frames))
            along = central_difference(
                lambda t: function(PARAMETERS, frames + t * direction), 0.0, 1e-3
            )
            close_slopes(np.vdot(d_frames, direction), along)

        every = values, slopes, d_frames, frames, weights
        for index in range(3):
            check(*jax.tree.map(lambda leaf, index=index: leaf[index], every))
        for slope in jax.tree.leaves((slopes, d_frames)):
            assert np.all(np.isfinite(slope))

    def test_agree_forward_where_y_and_x_share_a_radius(self, x64):
        clip, frames = Clip(gain=0.5, read_noise=1.5), FRAMES.astype(float)
        at = (PARAMETERS[0][:2], PARAMETERS[1])

        def function(parameters):
            module = LocalMean(
                1.8,
                1.2,
                clip=clip.module(),
                **BOUNDED,
                edge_frames="repeated",
            )
            module = with_parameters(module, parameters)
            return loss_of(module(frames).bkgds, jnp)

        got = jax.jit(jax.jacfwd(function))(at)
        expected = differences(
            ft.partial(reference_loss, clip=clip, edge_frames="repeated"), at, frames
        )
        jax.tree.map(close_slopes, got, expected)

    def test_of_frozen_radii_are_zero_and_others_are_each_channels_own(self, x64):
        channels = [FRAMES.astype(float), FRAMES[:, ::-1].astype(float)]
        frozen = [(True, False, False), (False, False, True)]
        rows = np.stack([PARAMETERS[0], PARAMETERS[0] + 0.3])

        @jax.jit
        @jax.grad
        def slopes(rows):
            module = LocalMean(
                [(1.8, 1.3)] * 2,
                1.2,
                clip=None,
                frozen=frozen,
                **BOUNDED,
            )
            module = eqx.tree_at(lambda m: m.unbounded_radii, module, rows)
            return sum(loss_of(bkgds, jnp) for bkgds in module(channels).bkgds)

        expected = [
            differences(reference_loss, (row, PARAMETERS[1]), frames)[0]
            for row, frames in zip(rows, channels, strict=True)
        ]
        close_slopes(slopes(rows), np.where(frozen, 0, expected))


class TestHalos:
    @pytest.mark.parametrize(("radius_frames", "rounds"), [(5.0, 0), (1.0, 2), (3.0, 1)])
    def test_a_window_with_its_halo_gives_the_bits_of_the_movie(
        self, radius_frames, rounds, rng
    ):
        frames = rng.poisson(60, (60, 9, 14)).astype(np.float32)
        clip = SoftClip(2.0, rounds=rounds, molecule_radius_pix=0.8) if rounds else None
        module = LocalMean(1.3, radius_frames, clip=clip)
        inference = module.for_inference()
        halo = inference.halo_frames
        assert halo == (1 + rounds) * {1.0: 1, 3.0: 4, 5.0: 6}[radius_frames]
        # The halo of a module that learns is that of its bounds, four times the radii.
        assert module.halo_frames > halo
        whole = np.asarray(module(frames).bkgds)
        compiled = eqx.filter_jit(inference)
        np.testing.assert_array_equal(compiled(frames).bkgds, whole)
        # Windows of one length, so that they are compiled once: at either end, within.
        first, last = 60 // 2 - 5, 60 // 2 + 5
        for kept in (slice(0, 10 + halo), slice(first, last), slice(50 - halo, 60)):
            start, stop = max(0, kept.start - halo), min(60, kept.stop + halo)
            window = np.asarray(compiled(frames[start:stop]).bkgds)
            np.testing.assert_array_equal(
                window[kept.start - start : kept.stop - start], whole[kept]
            )


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
        (
            {"max_radius_frames": "many"},
            TypeError,
            "max_radius_frames must be a number, but is 'many'",
        ),
        ({"edge_frames": "folded"}, ValueError, "edge_frames must be one of"),
        (
            {"clip": 0.0},
            ValueError,
            "threshold must be at least 0.01 and at most 100 deviations",
        ),
        ({"clip": 1e3}, ValueError, "at most 100 deviations of the noise, but is 1000.0"),
        ({"clip": "on"}, TypeError, "threshold must be a number"),
        ({"clip": (3.0, 0.3)}, TypeError, "threshold must be one number"),
        ({"frozen": [True] * 5}, ValueError, "frozen must be"),
        ({"radius_frames": np.array([[10.0, 5.0]])}, ValueError, "one for each channel"),
        ({"skips_nan": "no"}, TypeError, "skips_nan must be True or False"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_settings_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LocalMean(**options)


@pytest.mark.parametrize(
    ("clip", "channels", "weights", "error", "message"),
    [
        (None, FRAMES[0, 0], None, ValueError, "must have shape"),
        (None, FRAMES.astype(complex), None, TypeError, "must be real"),
        (None, FRAMES, np.ones((9, 11)), ValueError, "for each frame, (frames, 1, 1)"),
        (None, FRAMES, np.ones((2, *SHAPE)), ValueError, "go with frames of shape"),
        # Of one for each frame, were there as many columns.
        (None, FRAMES, np.ones(SHAPE[-1]), ValueError, "for each frame, (frames, 1, 1)"),
        (None, FRAMES, "mask.npy", TypeError, "as numpy.load reads it from a file"),
        (None, FRAMES, np.ones(SHAPE, complex), TypeError, "but are complex128"),
        (None, FRAMES, np.ma.ones(SHAPE), TypeError, "but are a masked one"),
        (None, FRAMES, np.full(SHAPE, -1.0), ValueError, "zero or positive, and finite"),
        (None, FRAMES, [MASK], ValueError, "give a list of stacks"),
        (None, [FRAMES, FRAMES], MASK, ValueError, "give a list with one entry"),
        (3.0, FRAMES[:, :2], None, ValueError, "or clip=None"),
        (SoftClip(gains=[1.0, 2.0]), FRAMES, None, ValueError, "but 2 gains"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_frames_and_weights_that_do_not_fit_are_refused(
    clip, channels, weights, error, message
):
    with pytest.raises(error, match=re.escape(message)):
        LocalMean(1.3, 1.2, clip=clip)(channels, weights)


def test_read_noise_without_a_gain_is_refused():
    with pytest.raises(ValueError, match=r"read_noise_electrons is 1\.5, and needs gains"):
        SoftClip(read_noise_electrons=1.5)


@pytest.mark.parametrize("edge_frames", ["renormalised", "repeated"])
def test_a_prediction_has_not_seen_its_frame(edge_frames):
    module = LocalMean(1.3, 2.0, clip=None, edge_frames=edge_frames)
    for time in (0, 4, 11):
        frames = np.zeros((12, 6, 6), np.float32)
        frames[time] = 1
        _, *predictions = module.predict(frames, 3)
        # The second one has not seen those at the gap either.
        for gap, prediction in zip((3, 4), predictions, strict=True):
            near = slice(max(time - gap + 1, 0), time + gap)
            np.testing.assert_array_equal(prediction[near], 0)
            assert np.any(np.asarray(prediction) > 0)


def test_predictions_need_frames_beyond_the_gap():
    for gap_frames, count in ((0, 12), (-3, 12), (3, 7)):
        with pytest.raises(ValueError, match=rf"gap of {gap_frames} frames .* are {count}"):
            LocalMean(1.3, 2.0).predict(np.ones((count, 6, 6)), gap_frames)


@pytest.mark.usefixtures("as_installed")
def test_as_many_channels_as_radii_are_needed():
    with pytest.raises(ValueError, match="radii for 2 channels, but was given 1"):
        LocalMean(1.3, [1.2, 2.0])(FRAMES)


@pytest.mark.usefixtures("as_installed")
def test_a_traced_radius_needs_a_bound():
    for options in ({"max_radius_pix": 9.0}, {"max_radius_frames": 9.0}):
        radii = jax.jit(lambda r, options=options: LocalMean(r, r, **options).radii)
        with pytest.raises(ValueError, match="A traced radius needs"):
            radii(2.0)


@ft.cache
def bounded_mean():
    """Radii are traced, so that it is compiled for each shape once."""

    @jax.jit
    def mean(frames, radii):
        module = LocalMean(
            (radii[1], radii[2]),
            radii[0],
            clip=None,
            max_radius_pix=8.0,
            max_radius_frames=8.0,
        )
        return module(frames).bkgds

    return mean


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    shape=st.sampled_from([(4, 6, 5), (1, 1, 9), (7, 3, 2)]),
    radii=st.tuples(*3 * [st.floats(0.125, 7.875, width=32)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_mean_of_frames_lies_between_them(shape, radii, seed):
    frames = np.random.default_rng(seed).normal(100, 50, shape).astype(np.float32)
    bkgds = np.asarray(bounded_mean()(frames, np.array(radii, np.float32)))
    # float32, of some hundred terms whose weights sum to one.
    rounding = 1e-6 * np.abs(frames).max()
    assert frames.min() - rounding <= bkgds.min()
    assert bkgds.max() <= frames.max() + rounding

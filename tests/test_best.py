"""`calibrate` without an estimator, what it says of itself, and spikes."""

import itertools
import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from jaxbkgd import (
    AbstractEstimator,
    Background,
    calibrate,
    Camera,
    FramePairLoss,
    LocalMean,
    open_movie,
    SpatialMean,
    SpikeInLoss,
)
from jaxbkgd._calibration.evaluation import evaluate
from jaxbkgd._calibration.molecules import find_molecules
from jaxbkgd._calibration.prediction_error import second_of_four
from jaxbkgd._calibration.sample import draw_sample, lit_frames
from jaxbkgd._calibration.search import ChannelSearch, structures, Trial
from jaxbkgd._calibration.spikes import add_spikes, fitted_light, spread_spikes


# Compilation is what takes time: all movies have one size, and molecules that are on for
# so short that all have one lag, for which programs are compiled once.
FRAME_COUNT, SIZE_PIX, PSF_SIGMA_PIX = 160, 96, 1.3
Y, X = np.mgrid[:SIZE_PIX, :SIZE_PIX]
LEVEL = 60 * (1 + 0.3 * np.sin(2 * np.pi * Y / 50) * np.cos(2 * np.pi * X / 60))


def blinking(rng, per_frame=9.0, photons=700.0, on_frames=1.0):
    """Photons of molecules that go on and off at any time."""
    images = np.zeros((FRAME_COUNT, SIZE_PIX, SIZE_PIX))
    for _ in range(rng.poisson(per_frame * FRAME_COUNT / on_frames)):
        start, y, x = rng.uniform((-on_frames, 0, 0), images.shape)
        stop = start + rng.exponential(on_frames)
        spot = np.exp(-((Y - y) ** 2 + (X - x) ** 2) / (2 * PSF_SIGMA_PIX**2))
        for frame in range(max(0, int(start)), min(FRAME_COUNT, int(stop) + 1)):
            share = max(0.0, min(stop, frame + 1) - max(start, frame))
            images[frame] += share * photons * spot / (2 * np.pi * PSF_SIGMA_PIX**2)
    return images


def found(light, level=LEVEL):
    """What `calibrate` makes of a movie in this light, and the truth."""
    rng = np.random.default_rng(1)
    truth = level * light[:, None, None]
    frames = rng.poisson(truth + light[:, None, None] * blinking(rng)) + 100.0
    frames = frames.astype(np.float32)
    estimator, history = calibrate(frames, camera=Camera(100.0), progress=False)
    return estimator, history, frames - 100, truth


def rms(bkgds, truth):
    return float(np.sqrt(np.mean((np.asarray(bkgds) - truth) ** 2)))


def rms_over_time(frames, truth, lag, radii_pix, radius_frames):
    """That of `LocalMean`, in the program of the search."""
    bounds: Any = {"max_radius_pix": 29.0, "max_radius_frames": 121.0}
    radii_pix = np.broadcast_to(radii_pix, (1, 2))
    estimator = LocalMean(radii_pix, radius_frames, block_frames=8, **bounds)
    (evaluation,) = evaluate(estimator, [jnp.asarray(frames)], lag)
    return rms(evaluation.bkgds, truth)


STEADY = np.ones(FRAME_COUNT)
# A part, for searches that have programs of their own in any case.
PART = np.s_[:96, 16:80, 16:80]


@pytest.mark.long
@pytest.mark.parametrize(
    "light", [STEADY, np.resize([1.35, 1, 1, 1], FRAME_COUNT)], ids=["steady", "pulses"]
)
def test_the_best_is_found_and_its_error_is_known(light):
    estimator, history, frames, truth = found(light)
    assert isinstance(estimator, LocalMean)
    assert estimator.max_radius_frames > 15
    assert estimator.block_frames == 8
    lag = history.lag
    radii: Any = estimator.radii_pix, estimator.radius_frames
    error, usual = (rms_over_time(frames, truth, lag, *of) for of in (radii, (7.0, 30.0)))
    assert error < usual < rms(SpatialMean(7.0)(frames).bkgds, truth)
    (findings,) = history.findings
    # Of 1.5 megapixels, the squared error is known to two thirds of itself.
    low, high = findings.error_interval
    assert max(0, low) < error < high
    np.testing.assert_allclose(findings.error, error, rtol=0.35)
    np.testing.assert_allclose(findings.noise, math.sqrt(np.mean(light) * 60), rtol=0.05)
    assert findings.kept > 0.98
    np.testing.assert_allclose(findings.molecules.psf_sigma_pix, PSF_SIGMA_PIX, rtol=0.1)
    # Their light in a frame is at most that of one that is on all the time.
    assert 400 < findings.molecules.light < 1000
    # By chance, as molecules add to the noise.
    assert findings.unexplained_frames.size <= 0.02 * FRAME_COUNT
    assert history.lag is not None
    assert history.lag < 20
    assert history.radii.shape == (len(history.losses), 1, 3)
    rows = history.rows()
    assert rows["error"].startswith(f"{findings.error:.2g} ADU (")
    assert set(rows) == {"error", "molecules", "they keep", "not explained", "believe it"}


@pytest.mark.slow
def test_dark_frames_are_not_looked_at():
    rng = np.random.default_rng(0)
    is_lit = np.arange(FRAME_COUNT) // 8 % 2 == 0
    steady = rng.poisson(60.0, (FRAME_COUNT, 16, 16)).astype(np.float32)
    dark = rng.normal(0, 1, steady.shape).astype(np.float32)
    alternating = np.where(is_lit[:, None, None], steady, dark)
    with open_movie(np.stack([steady, alternating], 1)) as movie:
        sample = draw_sample(movie.channels, [None] * 2, [Camera()] * 2)
    assert sample.lit_shares == [1, 0.5]
    assert sample.dark_frames == 80
    np.testing.assert_array_equal(sample.frame_indices[0][1], np.flatnonzero(is_lit))
    np.testing.assert_array_equal(sample.runs[0][1], alternating[is_lit])
    # Where every other frame is dark, frames follow each other twice as fast.
    search = ChannelSearch(sample.of_channel(1), False, lambda: None)
    (slow, *_) = structures(math.inf)
    np.testing.assert_allclose(search.estimator(slow, slow.usual).radii, [[15, 7, 7]])
    # Radii that the usual bound does not allow have a larger one.
    for x_pix, bound in ((7.0, 29), (40.0, 81)):
        estimator = search.estimator(slow, (30.0, 7.0, x_pix))
        assert isinstance(estimator, LocalMean)
        assert estimator.max_radius_pix == bound


def test_frames_that_bleach_or_lie_beside_a_flash_are_not_dark():
    times = np.arange(100)
    bleaching = 1 + 1000 * np.exp(-times / 5)
    flashes = np.where(times % 50 == 20, 100.0, 1.0)
    for levels in (bleaching, flashes):
        frames = levels[:, None, None] * np.ones((1, 4, 4))
        lit = lit_frames(jnp.asarray(frames, jnp.float32))
        assert len(lit) == 100


@pytest.mark.slow
def test_a_run_that_is_mostly_dark_is_not_looked_at():
    level = np.full((1000, 1, 1), 60.0)
    # Most of the last of two runs of 300 frames.
    level[720:980] = 0.5
    frames = np.random.default_rng(0).poisson(level, (1000, 16, 16)).astype(np.uint16)
    with open_movie(frames) as movie:
        sample = draw_sample(movie.channels, [None], [Camera()])
    assert [len(of_channel) for (of_channel,) in sample.runs] == [300]
    assert sample.dark_frames == 260
    with open_movie(frames) as movie:
        given = draw_sample(movie.channels, [None], [Camera()], keeps_dark=True)
    assert [len(of_channel) for (of_channel,) in given.runs] == [300, 300]


def test_the_second_of_four_is_that_of_a_sort():
    numbers = jnp.array(list(itertools.permutations([1.0, 2.0, 2.5, 4.0])))
    numbers = numbers.T[:, :, None, None]
    np.testing.assert_array_equal(second_of_four(*numbers), jnp.sort(numbers, axis=0)[1])


@pytest.mark.slow
def test_light_that_alternates_does_not_pass_for_blinking():
    light = np.resize([1.0, 0.3], FRAME_COUNT)[:, None, None]
    rng = np.random.default_rng(0)
    frames = rng.poisson(light * (LEVEL + blinking(rng, on_frames=2.0)))
    with open_movie(frames.astype(np.uint16)) as movie:
        sample = draw_sample(movie.channels, [None], [Camera()])
    assert sample.lag > 2
    assert 1.3 < sample.blinking[0].on_frames < 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("camera", "is_wrong"),
    [(Camera(100.0, 1.0), False), (Camera(100.0, 4.0), True), (Camera(0.0, 1.0), True)],
    ids=["right", "wrong gain", "no offset"],
)
def test_a_gain_or_offset_that_the_noise_contradicts_is_named(camera, is_wrong):
    rng = np.random.default_rng(2)
    light = np.broadcast_to(LEVEL, (FRAME_COUNT, SIZE_PIX, SIZE_PIX))
    frames = rng.poisson(light).astype(np.float32) + 100
    _, history = calibrate(frames, camera=camera, progress=False)
    said = [doubt for doubt in history.doubts if "or the read noise is wrong" in doubt]
    assert bool(said) == is_wrong
    (findings,) = history.findings
    above = (60 + 100 - float(camera.offset_adu)) * float(camera.gain_electrons_per_adu)
    assert findings.level == pytest.approx(above, rel=0.01)
    # There are no molecules.
    assert findings.clipped_share < 0.01


@pytest.mark.long
def test_filaments_as_thin_as_molecules_have_radii_of_a_pixel():
    level = np.full((SIZE_PIX, SIZE_PIX), 30.0)
    for angle, place in np.random.default_rng(0).uniform((0, -40), (np.pi, 40), (4, 2)):
        distance = (Y - 48) * np.cos(angle) + (X - 48) * np.sin(angle) - place
        level += 60 * np.exp(-(distance**2) / (2 * PSF_SIGMA_PIX**2))
    estimator, history, frames, truth = found(STEADY, level)
    assert isinstance(estimator, LocalMean)
    assert estimator.radii_pix.max() < 1.5
    assert estimator.block_frames == 8
    error, wider = (
        rms_over_time(frames, truth, history.lag, radii_pix, estimator.radius_frames)
        for radii_pix in (estimator.radii_pix, 1.75)
    )
    assert error < 0.6 * wider
    (findings,) = history.findings
    assert findings.kept > 0.98


@pytest.mark.long
def test_what_the_light_does_not_explain_and_saturation_are_named():
    rng = np.random.default_rng(3)
    y, x = SIZE_PIX * rng.random((2, FRAME_COUNT, 1, 1))
    pulses = np.resize([40.0, 0, 0, 0], FRAME_COUNT)[:, None, None]
    # A beam in every fourth frame, each time somewhere else.
    beam = pulses * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / (2 * 8**2))
    frames = rng.poisson(LEVEL + beam + blinking(rng)).astype(np.float32)
    largest = np.quantile(frames, 0.97).round()
    frames = np.minimum(frames, largest)
    _, history = calibrate(frames, progress=False)
    (findings,) = history.findings
    assert np.isin(np.arange(0, FRAME_COUNT, 4), findings.unexplained_frames).all()
    assert any("of the frames is not explained" in doubt for doubt in history.doubts)
    share = np.mean(frames == largest)
    assert share > 0.03
    text = f"{share:.0%} of the pixels have the largest value, {largest:.0f} ADU"
    assert any(text in doubt for doubt in history.doubts)
    assert history.rows()["believe it"] != "yes"


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_second_pattern_of_light_is_found():
    rng = np.random.default_rng(3)
    pulses = np.resize([40.0, 0, 0, 0], FRAME_COUNT)[:, None, None]
    truth = LEVEL + pulses * (X > SIZE_PIX / 2)
    frames = rng.poisson(truth + blinking(rng))[PART].astype(np.float32)
    truth = truth[PART]
    estimator, history = calibrate(frames, progress=False)
    assert isinstance(estimator, LocalMean)
    assert estimator.patterns is not None
    assert [len(patterns) for patterns in estimator.patterns] == [2]
    # With one pattern, it is 14.
    assert np.sqrt(np.mean((estimator(frames).bkgds - truth) ** 2)) < 1.5
    assert any("several patterns" in doubt for doubt in history.doubts)
    assert history.rows()["believe it"] != "yes"


def test_no_error_is_below_that_of_noise_by_chance():
    # Measured with an error that is larger than they are.
    by_chance = [
        Trial((30.0, pix, pix), np.array([-3.0, 1.0]), 60.0, least=least)
        for pix, least in ((0.6, 2.0), (7.0, 0.1))
    ]
    assert min(by_chance, key=lambda trial: trial.loss).radii == (30.0, 7.0, 7.0)
    assert by_chance[1].loss == 0.1
    # Too low for all radii, which are compared all the same.
    assert Trial((30.0, 7.0, 7.0), np.array([-3.1, -2.9]), 60.0, least=0.1).loss == -3.0


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_mask_leaves_pixels_out():
    rng = np.random.default_rng(5)
    frames = rng.poisson(LEVEL + blinking(rng))[PART].astype(np.float32)
    mask = np.ones(frames.shape[1:], bool)
    mask[:20, :20] = False
    frames[:, ~mask] = 1e5 * rng.random((len(frames), 1))
    _, history = calibrate(frames, weights=mask, progress=False)
    (findings,) = history.findings
    assert findings.unexplained_frames.size <= 0.02 * len(frames)
    assert findings.kept > 0.98
    np.testing.assert_allclose(findings.noise, math.sqrt(60), rtol=0.05)


@pytest.mark.slow
def test_the_part_that_is_looked_at_lies_within_a_mask():
    frames = np.random.default_rng(0).poisson(60, (40, 300, 500))
    mask = np.zeros(frames.shape[1:], bool)
    mask[250:290, 430:470] = True
    with open_movie(frames) as movie, open_movie(mask[None].astype(np.uint8)) as weights:
        sample = draw_sample(movie.channels, weights.channels, [Camera()])
    ((tile,),) = sample.runs
    # From a region of 16 px on.
    assert tile.shape == (40, 290 - 240, 470 - 416)
    assert sample.places == [[(15, 26)]]
    assert sample.regions == [(19, 32)]
    assert np.isfinite(tile).sum() == 40 * mask.sum()


@pytest.mark.slow
def test_boxes_frames_and_offsets_are_those_of_the_movie_itself():
    frames = np.random.default_rng(1).poisson(160, (20, 24, 40)).astype(np.uint16)
    options: Any = {"objective": FramePairLoss(1), "steps": 2, "progress": False}
    start = Taking(jnp.array(0.3))
    cut = frames[2:18, 4:20, 10:34].astype(np.float32) - 100
    expected, _ = calibrate([cut], start, **options)
    part: Any = {
        "boxes": [(10, 4, 34, 20)],
        "frames": slice(2, 18),
        "camera": Camera(100.0),
    }
    estimator, _ = calibrate(frames, start, **part, **options)
    np.testing.assert_array_equal(estimator.share, expected.share)
    assert estimator.share != start.share


@pytest.mark.long
def test_each_channel_has_its_radii():
    # Of molecules that have the lag of the others.
    rng = np.random.default_rng(7)
    rough = LEVEL + 20 * np.sin(2 * np.pi * X / 16)
    channels = [rng.poisson(level + blinking(rng)) for level in (rough, LEVEL)]
    channels = [channel.astype(np.float32) for channel in channels]
    estimator, history = calibrate(channels, progress=False)
    assert estimator.radii.shape == (2, 3)
    # Along x, it is the finer of the two.
    assert estimator.radii[0, 2] < 0.8 * estimator.radii[1, 2]
    assert len(history.findings) == 2
    assert history.rows()["they keep"].count("of their light") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "doubt"),
    [
        (np.ones((5, 64, 64)), "has 5 frames, .* give 30 or more; until then, LocalMean"),
        (np.ones((1, 64, 64)), "has 1 frames"),
        (np.ones((40, 64, 64)), "nothing changes"),
        (np.ones((40, 9, 64)), "9 x 64 px have no room"),
        (np.full((40, 16, 16), np.nan), "only 0% of the pixels count"),
        (np.arange(40.0)[:, None, None] * np.eye(16) - 50, "zero on average or below"),
        (1 + np.eye(16) * (np.arange(40) % 2)[:, None, None], "50% of the frames are b"),
        (np.eye(16) * (np.arange(40) % 2)[:, None, None], "only 20 of 40 frames are not d"),
    ],
)
def test_where_nothing_can_be_learned_the_defaults_are_taken(frames, doubt):
    estimator, history = calibrate(frames, progress=False)
    assert estimator.to_json() == LocalMean().to_json()
    (said,) = history.doubts
    assert re.search(doubt, said)
    assert not history.is_converged
    assert not history.findings
    assert history.rows() == {"believe it": "not all, see above"}


def test_frames_too_small_for_the_default_have_the_mean_of_each_frame():
    for shape in ((40, 4, 4), (40, 3, 64)):
        frames = np.random.default_rng(0).poisson(60, shape).astype(np.float32)
        estimator, history = calibrate(frames, progress=False)
        assert isinstance(estimator, SpatialMean)
        assert "until then, SpatialMean(7.0) is used" in history.doubts[0]
        assert estimator(frames).bkgds.shape == shape


def test_what_goes_with_an_estimator_alone_is_refused():
    frames = np.ones((40, 16, 16))
    with pytest.raises(TypeError, match="objective and optimizer are for an estimator"):
        calibrate(frames, objective=SpikeInLoss(100.0))
    with pytest.raises(TypeError, match="weights are for a search without an estimator"):
        calibrate(frames, SpatialMean(3.0), weights=frames[0])
    with pytest.raises(ValueError, match="1 channels, but 2 cameras"):
        calibrate(frames, camera=[Camera()] * 2)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_radii_that_take_molecules_are_not_kept():
    rng = np.random.default_rng(2)
    # Fiducials never go off, and look like background.
    beads = np.zeros((SIZE_PIX, SIZE_PIX))
    beads[[22, 40, 50, 70], [30, 75, 48, 30]] = 8000
    beads = gaussian_filter(beads, PSF_SIGMA_PIX)
    frames = rng.poisson(LEVEL + beads + blinking(rng))[PART].astype(np.float32)
    start = SpatialMean(7.0, max_radius_pix=20.0)
    with pytest.warns(UserWarning, match="molecules are background; .* cut them off"):
        estimator, history = calibrate(frames, start, progress=False)
    assert history.findings[0].kept >= 0.5
    assert estimator.radii_pix[0, 0] > 2 * PSF_SIGMA_PIX
    # What is described is what is kept, and not the lowest loss.
    assert history.losses.min() < history.losses[0]
    assert any("never go off" in doubt for doubt in history.doubts)


class Taking(AbstractEstimator):
    """A background that takes this share of the light in each pixel."""

    share: jax.Array

    @property
    def halo_frames(self):
        return 0

    def estimate_stack(self, frames):
        return Background(self.share * frames.astype(float), jnp.ones(()))


class TestSpikes:
    frames = np.random.default_rng(0).normal(100, 5, (24, 64, 64)).astype(np.float32)

    @pytest.mark.slow
    @pytest.mark.parametrize("on_frames", [1.0, 6.0])
    def test_the_loss_is_the_squared_share_that_is_taken(self, on_frames):
        loss = SpikeInLoss(300.0, on_frames=on_frames)
        gradient_of = eqx.filter_jit(eqx.filter_value_and_grad(loss))
        value, gradient = gradient_of(Taking(jnp.array(0.2)), self.frames)
        # float32.
        np.testing.assert_allclose(value, 0.04, rtol=1e-4)
        np.testing.assert_allclose(gradient.share, 0.4, rtol=1e-4)
        channels = [self.frames, self.frames[:, :40]]
        both = eqx.filter_jit(loss)(Taking(jnp.array(0.2)), channels)
        np.testing.assert_allclose(both, 0.04, rtol=1e-4)

    @pytest.mark.slow
    def test_it_is_minimised_by_calibrate(self):
        estimator, _ = calibrate(
            self.frames,
            Taking(jnp.array(0.3)),
            objective=SpikeInLoss(300.0),
            steps=20,
            progress=False,
        )
        np.testing.assert_allclose(estimator.share, 0, atol=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [(24, 64, 64), (3, 9, 40), (1, 5, 5)])
    @pytest.mark.parametrize("on_frames", [0.5, 4.0, 1000.0])
    def test_spikes_are_in_the_movie_and_of_the_light_they_are_said_to_have(
        self, shape, on_frames
    ):
        spikes = spread_spikes(shape, on_frames)
        for places, size in zip((spikes.frames, spikes.y, spikes.x), shape, strict=True):
            assert np.all((places >= 0) & (places < size))
        assert np.all((spikes.shares > 0) & (spikes.shares <= 1))
        added = eqx.filter_jit(add_spikes)(jnp.zeros(shape), spikes, 50.0, 1.0)
        found = eqx.filter_jit(fitted_light)(added, spikes, 1.0)
        # Next to the edge of a small frame, another one is nearer.
        if shape == self.frames.shape:
            np.testing.assert_allclose(found, 50 * spikes.shares, rtol=1e-3)
            np.testing.assert_allclose(added.sum(), 50 * spikes.shares.sum(), rtol=1e-3)

    @pytest.mark.slow
    def test_light_and_width_of_molecules_are_measured(self):
        rng = np.random.default_rng(1)
        residuals = rng.normal(0, 5, (48, 64, 64)).astype(np.float32)
        places = rng.uniform(8, 56, (48, 2))
        for frame, (y, x) in zip(residuals, places, strict=True):
            squares = (Y[:64, :64] - y) ** 2 + (X[:64, :64] - x) ** 2
            frame += 800 * np.exp(-squares / (2 * 1.6**2)) / (2 * np.pi * 1.6**2)
        molecules = find_molecules(jnp.asarray(residuals), 25.0)
        assert abs(molecules.count - 48) <= 2
        assert molecules.is_measured
        # Between pixels, a fit in the middle of one finds a little less.
        np.testing.assert_allclose(molecules.light, 800, rtol=0.05)
        np.testing.assert_allclose(molecules.psf_sigma_pix, 1.6, rtol=0.05)
        given = find_molecules(jnp.asarray(residuals), 25.0, 2.0)
        assert given.psf_sigma_pix == 2.0
        residuals[5:] = 0
        assert not find_molecules(jnp.asarray(residuals), 25.0).is_measured

    @pytest.mark.slow
    def test_numbers_that_are_none_are_refused(self):
        cases: list[Any] = [
            {"light": -1.0},
            {"on_frames": 0.0},
            {"psf_sigma_pix": math.nan},
        ]
        for options in cases:
            with pytest.raises(ValueError, match=f"{next(iter(options))} must be positive"):
                SpikeInLoss(**({"light": 1.0} | options))

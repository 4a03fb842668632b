"""Simulated movies against the analytic statistics of what they claim to be."""

import inspect
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxbkgd import simulate_movie
from jaxbkgd._simulation import blinking_molecules, render_molecules, uneven_field


pytestmark = pytest.mark.usefixtures("quickly_compiled")

# Every size is a program of its own to compile, so tests share one.
SMALL: dict[str, Any] = {"frame_count": 100, "height_pix": 20, "width_pix": 30}
EMPTY: dict[str, Any] = {**SMALL, "photons_per_frame": 0, "bkgd_contrast": 0}


def events_of(truth):
    """The events that are real, as NumPy arrays."""
    is_on = np.asarray(truth.is_on)
    fields = truth.frame, truth.y_pix, truth.x_pix, truth.photons
    return tuple(np.asarray(field)[is_on] for field in fields)


@pytest.mark.long
@pytest.mark.parametrize(
    ("bkgd_photons", "gain", "offset", "read_noise"),
    [(3.0, 0.8, 50.0, 2.0), (4000.0, 2.0, 0.0, 0.0)],
)
def test_a_movie_without_molecules_has_the_mean_and_variance_of_its_camera(
    bkgd_photons, gain, offset, read_noise
):
    movies = [
        simulate_movie(
            key,
            bkgd_photons=bkgd_photons,
            gain_electrons_per_adu=gain,
            offset_adu=offset,
            read_noise_electrons=read_noise,
            **EMPTY,
        )[0]
        for key in jax.random.split(jax.random.key(1), 4)
    ]
    values = np.array(movies, np.float64)
    # The last term is rounding to whole ADU.
    variance = (bkgd_photons + read_noise**2) / gain**2 + 1 / 12
    mean_error = math.sqrt(variance / values.size)
    # The fourth cumulant of a Poisson count is its mean.
    variance_error = math.sqrt((2 * variance**2 + bkgd_photons / gain**4) / values.size)
    # Four standard errors: a fair movie fails once in 16 000 keys, and this key is fixed.
    assert abs(values.mean() - (bkgd_photons / gain + offset)) < 4 * mean_error
    assert abs(values.var() - variance) < 4 * variance_error


@pytest.mark.long
def test_the_camera_clips_to_its_sixteen_bits():
    key = jax.random.key(2)
    bright, _ = simulate_movie(key, bkgd_photons=1e6, **EMPTY)
    endless, _ = simulate_movie(key, bkgd_photons=3e38, **EMPTY)
    dark, _ = simulate_movie(key, bkgd_photons=0, offset_adu=0, **EMPTY)
    assert bright.dtype == jnp.uint16
    assert bright.min() == bright.max() == endless.min() == 65535
    # Read noise below half an ADU: 1/2 + erf(0.46 / (2 sqrt(2) 1.5)) / 2 = 0.561; the
    # standard error is 0.002.
    assert abs(np.mean(np.asarray(dark) == 0) - 0.561) < 0.01


def spot(y_pix, x_pix, height, width):
    """The light of a molecule in each pixel, by SciPy."""
    profiles = [
        np.diff(special.erf((np.arange(size + 1) - 0.5 - centre) / (2**0.5 * 1.3))) / 2
        for centre, size in ((y_pix, height), (x_pix, width))
    ]
    return np.outer(*profiles)


def test_a_molecule_in_the_middle_keeps_all_its_photons_and_matches_scipy():
    molecule = jnp.array([[14.3], [18.8], [700.0]])
    size = {"height_pix": 32, "width_pix": 40}
    image = np.asarray(render_molecules(*molecule, psf_sigma_pix=1.3, **size))
    # The rounding of float32 erf, about 1e-7, times the photons.
    np.testing.assert_allclose(image, 700 * spot(14.3, 18.8, 32, 40), atol=1e-4)
    np.testing.assert_allclose(image.sum(), 700.0, rtol=1e-6)


def draw_molecules(key, **options):
    """Whether there is a molecule in each place, its y, x and photons."""
    draw = jax.jit(partial(blinking_molecules, height_pix=4, width_pix=6, **options))
    return tuple(map(np.asarray, draw(jax.random.key(key))))


@pytest.mark.slow
def test_molecules_are_as_many_as_bright_and_on_as_long_as_asked():
    frame_count, molecules, on_time = 2000, 15.0, 3.0
    options = {"frame_count": frame_count, "molecules_per_frame": molecules}
    is_on, *fields = draw_molecules(
        4, photons_per_frame=500.0, on_time_frames=on_time, **options
    )
    frame = np.nonzero(is_on)[0]
    y_pix, x_pix, photons = (field[is_on] for field in fields)
    lives = molecules * frame_count / on_time
    # A life is exponential, so the summed on-time has a relative error of sqrt(2 / lives).
    relative_error = math.sqrt(2 / lives)
    on_instants = photons.sum() / 500.0 / frame_count
    assert abs(on_instants / molecules - 1) < 4 * relative_error
    # A life touches on_time + 1 frames on average.
    events = molecules * frame_count * (1 + 1 / on_time)
    assert abs(frame.size / events - 1) < 4 * relative_error

    # Positions are unique, so they tell the molecules apart.
    inner = (frame > 0) & (frame < frame_count - 1)
    _, molecule = np.unique(np.stack([y_pix, x_pix]), axis=1, return_inverse=True)
    lifetimes = np.bincount(molecule, weights=photons) / 500.0
    is_cut = np.bincount(molecule, weights=~inner) > 0
    lifetimes = lifetimes[~is_cut]
    # Few lives are cut by the ends of the movie, about one in 400: a test of the mean,
    # and of the whole distribution, which a fair simulation fails once in 10 000 keys.
    assert abs(lifetimes.mean() / on_time - 1) < 4 / math.sqrt(lives) + 1 / 400
    assert stats.kstest(lifetimes, "expon", args=(0, on_time)).pvalue > 1e-4
    for position, size in (y_pix, 4), (x_pix, 6):
        test = stats.kstest(np.unique(position), "uniform", args=(-0.5, size))
        assert test.pvalue > 1e-4


@pytest.mark.long
def test_the_first_frame_has_as_many_molecules_as_any_other():
    keys = jax.random.split(jax.random.key(5), 2000)
    options = {"frame_count": 6, "height_pix": 1, "width_pix": 1, "on_time_frames": 2.0}
    draw = partial(
        blinking_molecules, molecules_per_frame=20.0, photons_per_frame=1.0, **options
    )
    *_, photons = jax.jit(jax.vmap(draw))(keys)
    photons = np.asarray(photons).sum(axis=-1)
    # 20 molecules are on at an instant, a Poisson number, averaged over 2000 movies.
    assert np.all(np.abs(photons.mean(axis=0) - 20.0) < 4 * math.sqrt(20 / 2000))


@pytest.mark.slow
def test_molecules_differ_in_brightness_as_asked_and_keep_it_for_life():
    spread, photons = 0.5, 300.0
    options = {"frame_count": 2, "molecules_per_frame": 20000.0, "on_time_frames": 1e30}
    is_on, *_, brightness = draw_molecules(
        16, photons_per_frame=photons, photons_spread=spread, **options
    )
    first, second = brightness[0][is_on[0]], brightness[1][is_on[1]]
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert abs(first.mean() / photons - 1) < 4 * spread / math.sqrt(first.size)
    # The excess kurtosis of a log-normal number with this spread is 5.4; the error of a
    # standard deviation is half of that of the variance.
    error = math.sqrt((5.4 + 2) / first.size) / 2
    assert abs(first.std() / photons / spread - 1) < 4 * error
    log_spread = math.sqrt(math.log1p(spread**2))
    logs = np.log(first / photons)
    # SciPy 1.18 no longer passes on a mean and a deviation.
    assert stats.kstest(logs / log_spread + log_spread / 2, "norm").pvalue > 1e-4


def test_molecules_outside_make_the_border_as_bright_as_the_middle():
    movies = [
        simulate_movie(key, bkgd_photons=0, **SMALL)
        for key in jax.random.split(jax.random.key(17), 10)
    ]
    frames = np.array([frames for frames, _ in movies], np.float64)
    light = 0.46 * np.mean(frames - 100.0, axis=(0, 1))
    _, y_pix, x_pix, _ = events_of(movies[0][1])
    # Of 5 sigmas of 1.3 px, rounded up.
    for position, size in (y_pix, 20), (x_pix, 30):
        assert -7.5 <= position.min() < -6
        assert size + 5 < position.max() <= size + 6.5
    expected = 20 * 700 / (20 * 30)
    is_middle = np.zeros((20, 30), bool)
    is_middle[1:-1, 1:-1] = True
    for part in is_middle, ~is_middle:
        # Molecules that shine at least on one pixel of the part, for 2 frames on average;
        # an exponential on-time has a relative variance of 1. Without molecules outside,
        # the outermost pixels would lack a third of their light.
        lives = len(movies) * 100 * 20 / 2 * part.mean()
        assert abs(light[part].mean() / expected - 1) < 4 * math.sqrt(2 / lives)


@pytest.mark.slow
def test_the_background_has_its_mean_contrast_and_length_scale():
    size, scale, contrast = 64, 6.0, 0.4
    keys = jax.random.split(jax.random.key(8), 200)
    draw = jax.vmap(
        partial(
            uneven_field,
            height_pix=size,
            width_pix=size,
            contrast=contrast,
            length_scale_pix=scale,
        )
    )
    fields = np.asarray(jax.jit(draw)(keys), np.float64)
    # Each image has about (size / (sqrt(2 pi) scale))^2 = 18 independent areas.
    areas = 18 * len(keys)
    assert fields.min() > 0
    assert abs(fields.mean() - 1) < 4 * contrast / math.sqrt(areas)
    # A log-normal field's variance has a relative error of sqrt((kurtosis + 2) / n), with
    # a kurtosis of 2.9 at this contrast; its root has half of that.
    error = 4 * math.sqrt((2.9 + 2) / areas) / 2
    assert abs(fields.std() / contrast - 1) < error

    variance = math.log1p(contrast**2)
    field = (np.log(fields) + variance / 2) / math.sqrt(variance)
    for lag in 0, 3, 6, 12, 30:
        expected = math.exp(-(lag**2) / (2 * scale**2))
        along_y = np.mean(field[:, lag:, :] * field[:, : size - lag, :])
        along_x = np.mean(field[:, :, lag:] * field[:, :, : size - lag])
        # The product of two normals has a variance of at most 2; the longest lag sees
        # half of the image.
        assert abs(along_y - expected) < 4 * math.sqrt(2 / (areas / 2))
        assert abs(along_x - expected) < 4 * math.sqrt(2 / (areas / 2))


def test_a_background_bleaches_exponentially_to_its_remaining_share():
    key = jax.random.key(18)
    _, steady = simulate_movie(key, **SMALL)
    _, truth = simulate_movie(key, bkgd_remaining=0.4, **SMALL)
    remaining = 0.4 ** (np.arange(100) / 99)
    np.testing.assert_allclose(
        truth.bkgds_adu,
        steady.bkgds_adu * remaining[:, None, None],
        rtol=1e-5,  # a power in float32
    )
    np.testing.assert_array_equal(truth.photons, steady.photons)


@pytest.mark.slow
def test_other_numbers_are_not_compiled_again():
    def simulate(step):
        simulate_movie(
            jax.random.key(step),
            **SMALL,
            photons_per_frame=700.0 + step,
            photons_spread=0.3 * step,
            psf_sigma_pix=1.3 + 0.01 * step,
            bkgd_photons=60 - step,
            bkgd_contrast=0.2 * step,
            bkgd_length_scale_pix=10.0 + step,
            bkgd_remaining=1.0 - 0.1 * step,
            gain_electrons_per_adu=0.46 + step,
            offset_adu=100 + step,
            read_noise_electrons=1.5 * step,
        )

    simulate(0)
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: names.append(event)
    )
    simulate(1)
    simulate(2)
    assert "/jax/core/compile/backend_compile_duration" not in names


def test_frames_are_the_truth_seen_through_the_camera():
    gain = 0.46
    frames, truth = simulate_movie(
        jax.random.key(9),
        photons_spread=0.5,
        bkgd_length_scale_pix=5.0,
        bkgd_remaining=0.6,
        gain_electrons_per_adu=gain,
        **SMALL,
    )
    frame_count, height, width = frames.shape
    signal = np.zeros(frames.shape)
    for frame, y_pix, x_pix, photons in zip(*events_of(truth), strict=True):
        signal[frame] += photons * spot(y_pix, x_pix, height, width)
    expected = np.asarray(truth.bkgds_adu, np.float64) + signal / gain
    variance = expected / gain + 1.5**2 / gain**2 + 1 / 12
    scores = (np.asarray(frames, np.float64) - 100.0 - expected) / np.sqrt(variance)
    # Standard scores: mean 0 and variance 1 everywhere, within 4 or, for the largest of
    # many, 5.5 standard errors; the excess kurtosis, below 0.1, widens the last a little.
    assert abs(scores.mean()) < 4 / math.sqrt(scores.size)
    assert abs(scores.var() - 1) < 4 * math.sqrt(2.1 / scores.size)
    assert np.max(np.abs(scores.mean(axis=0))) < 5.5 / math.sqrt(frame_count)
    assert np.max(np.abs(scores.mean(axis=(1, 2)))) < 5.5 / math.sqrt(height * width)
    is_bright = signal > 30
    assert abs(scores[is_bright].mean()) < 4 / math.sqrt(is_bright.sum())
    # The molecules are there: without them the bright pixels are far off.
    assert is_bright.sum() > 1000


def test_the_same_key_gives_the_same_movie_and_another_key_another():
    frames, truth = simulate_movie(jax.random.key(10), **SMALL)
    again, truth_again = simulate_movie(jax.random.PRNGKey(10), **SMALL)
    other, other_truth = simulate_movie(jax.random.key(11), **SMALL)
    np.testing.assert_array_equal(frames, again)
    jax.tree.map(np.testing.assert_array_equal, truth, truth_again)
    assert np.mean(np.asarray(frames) == np.asarray(other)) < 0.2
    assert not np.array_equal(truth.bkgds_adu, other_truth.bkgds_adu)
    # Places without a molecule add nothing.
    is_off = ~np.asarray(truth.is_on)
    assert is_off.any()
    for field in truth.photons, truth.y_pix, truth.x_pix:
        assert np.all(np.asarray(field)[is_off] == 0)
    assert np.all(np.diff(truth.frame) >= 0)
    assert np.all(np.asarray(truth.photons)[~is_off] > 0)


@pytest.mark.long
def test_movies_can_be_made_under_jit_and_vmap_over_keys():
    keys = jax.random.split(jax.random.key(12), 3)
    frames, truth = jax.jit(jax.vmap(lambda key: simulate_movie(key, **SMALL)))(keys)
    single, single_truth = simulate_movie(keys[1], **SMALL)
    # One program may round differently from the other: one count on one pixel in
    # thousands may fall to the other side, and no more.
    assert frames.shape == (3, 100, 20, 30)
    assert np.mean(np.asarray(frames[1]) != np.asarray(single)) <= 0.01
    np.testing.assert_allclose(truth.bkgds_adu[1], single_truth.bkgds_adu, rtol=1e-5)
    np.testing.assert_allclose(truth.photons[1], single_truth.photons, rtol=1e-5)


def test_other_kinds_of_keys_work():
    frames, truth = simulate_movie(jax.random.key(13, impl="rbg"), **EMPTY)
    # Four standard errors of the pixels' photon and read noise.
    mean = np.mean(truth.bkgds_adu)
    error = math.sqrt((mean * 0.46 + 1.5**2) / 0.46**2 / frames.size)
    assert abs(np.mean(frames) - 100.0 - mean) < 4 * error


@pytest.mark.long
def test_strict_modes_of_jax_change_neither_types_nor_movie():
    frames, truth = simulate_movie(jax.random.key(14), **SMALL)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        frames_in_mode, truth_in_mode = simulate_movie(jax.random.key(14), **SMALL)
    assert frames_in_mode.dtype == jnp.uint16
    fields = zip(jax.tree.leaves(truth), jax.tree.leaves(truth_in_mode), strict=True)
    for field, field_in_mode in fields:
        assert field.dtype == field_in_mode.dtype
        # Constants may round once more in one program than in the other.
        np.testing.assert_allclose(field, field_in_mode, rtol=1e-5, atol=1e-5)
    # One count on one pixel in thousands may fall to the other side.
    assert np.mean(np.asarray(frames) != np.asarray(frames_in_mode)) <= 1e-3


def simulate_with(name: str, value: Any) -> None:
    simulate_movie(jax.random.key(0), **{name: value})


NUMBERS_ABOVE_ZERO = {
    *("on_time_frames", "psf_sigma_pix", "bkgd_length_scale_pix", "bkgd_remaining"),
    "gain_electrons_per_adu",
}
# Those that are numbers, not sizes.
NUMBERS = [
    name
    for name, parameter in inspect.signature(simulate_movie).parameters.items()
    if isinstance(parameter.default, float)
]


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_or_out_of_range_is_named(name):
    for value in (-1.0, math.nan, math.inf, -math.inf, 1e39):
        text = re.escape(f"but is {value!r}.")
        with pytest.raises(ValueError, match=rf"{name} must be .*, {text}"):
            simulate_with(name, value)
    # Whatever divides must not vanish in float32.
    for value in (0, 1e-60) if name in NUMBERS_ABOVE_ZERO else ():
        with pytest.raises(ValueError, match=rf"{name} must be at least .* is {value}"):
            simulate_with(name, value)
    for value in ("3", None, True, 1j):
        with pytest.raises(
            TypeError, match=rf"{name} must be a number, but is {re.escape(repr(value))}"
        ):
            simulate_with(name, value)
    with pytest.raises(TypeError, match=rf"{name} must be known before jax.jit"):
        jax.jit(partial(simulate_with, name))(0.5)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("bkgd_remaining", 1.1, ValueError, "remaining must be .* at most 1, but is 1.1"),
        *(
            (
                size,
                value,
                ValueError,
                rf"{size} must be a whole .* from 1 on, but is {value!r}",
            )
            for size in ("frame_count", "height_pix", "width_pix")
            for value in (0, 2.0, True)
        ),
        ("molecules_per_frame", 1e9, ValueError, "needs places for .*Simulate fewer"),
        ("on_time_frames", 1e-30, ValueError, "needs places for .* events.*Simulate fewer"),
    ],
)
def test_what_is_no_share_size_or_crowd_is_refused(name, value, error, message):
    with pytest.raises(error, match=message):
        simulate_with(name, value)


@pytest.mark.usefixtures("as_installed")
def test_what_is_not_one_key_is_refused_with_the_remedy():
    no_keys: list[Any] = [0, None, "key", np.zeros(2), jnp.zeros(2, jnp.int32)]
    for key in no_keys:
        with pytest.raises(
            TypeError, match=r"must be a JAX random key, but is .*jax\.random\.key"
        ):
            simulate_movie(key)
    for keys in (jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 2), jnp.uint32)):
        with pytest.raises(ValueError, match=r"must be one key.* has shape \(3.*vmap"):
            simulate_movie(keys)

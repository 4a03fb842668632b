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

from jaxbkgd._simulate import (
    blinking_molecules,
    render_molecules,
    simulate_movie,
    uneven_field,
)


# Every size is a program of its own to compile, so tests share what they can.
SMALL: dict[str, Any] = {"frame_count": 100, "height_pix": 20, "width_pix": 30}
EMPTY: dict[str, Any] = {**SMALL, "photons_per_frame": 0, "bkgd_contrast": 0}
# The door's own checks, without those of the annotations, which run first in tests.
unannotated_simulate_movie = inspect.unwrap(simulate_movie)


def events_of(truth):
    """The events that are real, as NumPy arrays."""
    is_on = np.asarray(truth.is_on)
    fields = truth.frame, truth.y_pix, truth.x_pix, truth.photons
    return tuple(np.asarray(field)[is_on] for field in fields)


@pytest.mark.parametrize(
    ("bkgd_photons", "gain", "offset", "read_noise"),
    [(60.0, 0.46, 100.0, 1.5), (3.0, 0.8, 50.0, 2.0), (4000.0, 2.0, 0.0, 0.0)],
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
        for key in jax.random.split(jax.random.key(1), 10)
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


def test_a_molecule_in_the_middle_keeps_all_its_photons_and_matches_scipy():
    y_pix, x_pix, photons = 14.3, 18.8, 700.0
    image = np.asarray(
        render_molecules(
            jnp.array([y_pix]),
            jnp.array([x_pix]),
            jnp.array([photons]),
            psf_sigma_pix=1.3,
            height_pix=32,
            width_pix=40,
        )
    )

    def integrals(centre, size):
        edges = (np.arange(size + 1) - 0.5 - centre) / (math.sqrt(2) * 1.3)
        return np.diff(special.erf(edges)) / 2

    expected = photons * np.outer(integrals(y_pix, 32), integrals(x_pix, 40))
    # The rounding of float32 erf, about 1e-7, times the photons.
    np.testing.assert_allclose(image, expected, atol=1e-4)
    np.testing.assert_allclose(image.sum(), photons, rtol=1e-6)


def test_molecules_are_as_many_as_bright_and_on_as_long_as_asked():
    frame_count, molecules, on_time = 2000, 15.0, 3.0
    draw = partial(
        blinking_molecules,
        frame_count=frame_count,
        height_pix=4,
        width_pix=6,
        molecules_per_frame=molecules,
        photons_per_frame=500.0,
        on_time_frames=on_time,
    )
    is_on, *fields = (np.asarray(x) for x in jax.jit(draw)(jax.random.key(4)))
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


def test_the_first_frame_has_as_many_molecules_as_any_other():
    draw = partial(
        blinking_molecules,
        frame_count=6,
        height_pix=1,
        width_pix=1,
        molecules_per_frame=20.0,
        photons_per_frame=1.0,
        on_time_frames=2.0,
    )
    keys = jax.random.split(jax.random.key(5), 2000)
    *_, photons = jax.jit(jax.vmap(draw))(keys)
    photons = np.asarray(photons).sum(axis=-1)
    # 20 molecules are on at an instant, a Poisson number, averaged over 2000 movies.
    assert np.all(np.abs(photons.mean(axis=0) - 20.0) < 4 * math.sqrt(20 / 2000))


def test_molecules_with_an_endless_on_time_stay_even_in_a_movie_of_one_pixel():
    frames, truth = simulate_movie(
        jax.random.key(6),
        frame_count=3,
        height_pix=1,
        width_pix=1,
        on_time_frames=1e30,
    )
    frame, _, _, photons = events_of(truth)
    assert frames.shape == truth.bkgds_adu.shape == (3, 1, 1)
    np.testing.assert_array_equal(photons, np.float32(700.0))
    assert np.unique(np.bincount(frame, minlength=3)).size == 1


def test_places_without_a_molecule_add_nothing():
    _, truth = simulate_movie(jax.random.key(7), **SMALL)
    is_off = ~np.asarray(truth.is_on)
    assert is_off.any()
    for field in truth.photons, truth.y_pix, truth.x_pix:
        assert np.all(np.asarray(field)[is_off] == 0)
    assert np.all(np.diff(truth.frame) >= 0)
    assert np.all(np.asarray(truth.photons)[~is_off] > 0)


def test_the_background_has_its_mean_contrast_and_length_scale():
    size, scale, contrast = 64, 6.0, 0.4
    keys = jax.random.split(jax.random.key(8), 200)
    draw = jax.vmap(
        lambda key: uneven_field(
            key,
            height_pix=size,
            width_pix=size,
            contrast=contrast,
            length_scale_pix=scale,
        )
    )
    fields = np.asarray(draw(keys), np.float64)
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


def test_frames_are_the_truth_seen_through_the_camera():
    gain = 0.46
    frames, truth = simulate_movie(
        jax.random.key(9), bkgd_length_scale_pix=5.0, gain_electrons_per_adu=gain, **SMALL
    )
    frame_count, height, width = frames.shape
    signal = np.zeros(frames.shape)
    for frame, y_pix, x_pix, photons in zip(*events_of(truth), strict=True):
        edges_y = (np.arange(height + 1) - 0.5 - y_pix) / (math.sqrt(2) * 1.3)
        edges_x = (np.arange(width + 1) - 0.5 - x_pix) / (math.sqrt(2) * 1.3)
        profile_y = np.diff(special.erf(edges_y)) / 2
        profile_x = np.diff(special.erf(edges_x)) / 2
        signal[frame] += photons * np.outer(profile_y, profile_x)
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
    for field, field_again in zip(
        jax.tree.leaves(truth), jax.tree.leaves(truth_again), strict=True
    ):
        np.testing.assert_array_equal(field, field_again)
    assert np.mean(np.asarray(frames) == np.asarray(other)) < 0.2
    assert not np.array_equal(truth.bkgds_adu, other_truth.bkgds_adu)
    assert not np.array_equal(truth.y_pix, other_truth.y_pix)


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
    key = jax.random.key(13, impl="rbg")
    frames, truth = simulate_movie(key, **EMPTY)
    # Four standard errors of the pixels' photon and read noise.
    mean = np.mean(truth.bkgds_adu)
    error = math.sqrt((mean * 0.46 + 1.5**2) / 0.46**2 / frames.size)
    assert abs(np.mean(frames) - 100.0 - mean) < 4 * error


def test_x64_changes_neither_types_nor_movie():
    frames, truth = simulate_movie(jax.random.key(14), **SMALL)
    with jax.enable_x64(True):
        frames_x64, truth_x64 = simulate_movie(jax.random.key(14), **SMALL)
    assert frames_x64.dtype == jnp.uint16
    for field, field_x64 in zip(
        jax.tree.leaves(truth), jax.tree.leaves(truth_x64), strict=True
    ):
        assert field.dtype == field_x64.dtype
        # Constants may round once more in one program than in the other.
        np.testing.assert_allclose(field, field_x64, rtol=1e-5, atol=1e-5)
    assert np.mean(np.asarray(frames) != np.asarray(frames_x64)) <= 0.01


NUMBERS_ABOVE_ZERO = (
    "on_time_frames",
    "psf_sigma_pix",
    "bkgd_length_scale_pix",
    "gain_electrons_per_adu",
)
NUMBERS_FROM_ZERO = (
    "molecules_per_frame",
    "photons_per_frame",
    "bkgd_photons",
    "bkgd_contrast",
    "offset_adu",
    "read_noise_electrons",
)


@pytest.mark.parametrize("name", NUMBERS_ABOVE_ZERO + NUMBERS_FROM_ZERO)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf, 1e39, 2**130])
def test_a_number_out_of_range_is_named(name, value):
    with pytest.raises(
        ValueError, match=rf"{name} is {re.escape(str(value))}, and must be .*: give"
    ):
        simulate_movie(jax.random.key(0), **{name: value})


@pytest.mark.parametrize("name", NUMBERS_ABOVE_ZERO)
@pytest.mark.parametrize("value", [0, 1e-60])
def test_a_number_that_divides_must_not_vanish(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}, and must be positive"):
        simulate_movie(jax.random.key(0), **{name: value})


@pytest.mark.parametrize("name", ["frame_count", "height_pix", "width_pix"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_movie_of_no_pixels_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, and must be 1 or more"):
        simulate_movie(jax.random.key(0), **{name: value})


@pytest.mark.parametrize("name", ["frame_count", "height_pix", "width_pix"])
@pytest.mark.parametrize("value", [2.0, "3", None, True])
def test_a_size_that_is_no_integer_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} is {value!r}, and must be an integer"):
        unannotated_simulate_movie(jax.random.key(0), **{name: value})


@pytest.mark.parametrize("name", NUMBERS_ABOVE_ZERO + NUMBERS_FROM_ZERO)
@pytest.mark.parametrize("value", ["3", None, True, 1j])
def test_a_parameter_that_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} is .*, and must be a real number"):
        unannotated_simulate_movie(jax.random.key(0), **{name: value})


def test_a_traced_parameter_is_refused():
    with pytest.raises(TypeError, match="must be a real number that is known"):
        jax.jit(
            lambda gain: unannotated_simulate_movie(
                jax.random.key(0), gain_electrons_per_adu=gain
            )
        )(0.5)


@pytest.mark.parametrize("key", [0, None, "key", np.zeros(2), jnp.zeros(2, jnp.int32)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match=r"must be a JAX random key.*jax\.random\.key"):
        unannotated_simulate_movie(key)


@pytest.mark.parametrize(
    "keys", [jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 2), jnp.uint32)]
)
def test_a_batch_of_keys_is_refused_with_the_remedy(keys):
    with pytest.raises(ValueError, match=r"key has shape \(3.*must be one key.*vmap"):
        unannotated_simulate_movie(keys)


@pytest.mark.parametrize("crowd", [{"molecules_per_frame": 1e9}, {"on_time_frames": 1e-30}])
def test_more_events_than_indices_are_refused(crowd):
    with pytest.raises(ValueError, match=r"needs places for .* events.*Simulate fewer"):
        simulate_movie(jax.random.key(0), **crowd)

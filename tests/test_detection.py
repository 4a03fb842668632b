"""The matched SNR is a standard normal variable where there is no molecule, and thresholds
are exceeded as often as they say."""

import runpy
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import central_difference
from scipy.ndimage import convolve1d, maximum_filter
from scipy.stats import norm

import jaxbkgd
from jaxbkgd import (
    Camera,
    Chained,
    detection_threshold,
    LocalMean,
    matched_snr,
    SpatialMean,
    TemporalMedian,
)
from jaxbkgd._estimators.matched import _normal_score
from jaxbkgd._estimators.residual_noise import psf_taps


pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).parents[1]
PSF = psf_taps(1.3)
FRAMES, SIZE = 24, 20

STEADY = {"clip": None, "illumination_rank": 0}
LINEAR = {
    "SpatialMean": SpatialMean((5.0, 9.0)),
    "order 2": LocalMean(6.0, 8.0, kernel_order=2, block_frames=2, **STEADY),
    "order 4": LocalMean((6.0, 5.0), 6.0, block_frames=3, **STEADY),
    "one frame": LocalMean(6.0, 0, **STEADY),
}


def image_of(place: tuple[int, int], size: int = SIZE) -> np.ndarray:
    """The point-spread function about a pixel, of unit norm in the frame."""
    rows = []
    for pixel in place:
        row = np.zeros(size + PSF.size)
        row[pixel : pixel + PSF.size] = PSF
        row = row[PSF.size // 2 :][:size]
        rows.append(row / np.linalg.norm(row))
    return np.outer(*rows)


def peak_count(snr: Any, threshold: Any) -> int:
    snr = np.asarray(snr)
    return int(((snr == maximum_filter(snr, (1, 3, 3))) & (snr > threshold)).sum())


@pytest.mark.long
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("place", [(0, 0, 0), (13, 9, 10), (4, 1, 12), (23, 19, 2)])
def test_the_closed_form_is_that_of_the_weights_of_the_residual(name, place):
    estimator, (frame, y, x) = LINEAR[name], place
    image = image_of((y, x))
    steady = jnp.full((FRAMES, SIZE, SIZE), 100.0)

    in_frame = np.zeros((FRAMES, SIZE, SIZE), np.float32)

    @eqx.filter_jit
    def estimated(frames):
        background = estimator(frames)
        return background.bkgds, background

    _, transposed, background = jax.vjp(estimated, steady, has_aux=True)

    def under_transpose(image):
        in_frame[frame] = image
        return np.asarray(transposed(jnp.asarray(in_frame))[0], float)

    of_background = under_transpose(image)
    # The variance is estimated by the background, which has weights of its own.
    of_variance = under_transpose(image**2)
    weights = -of_background
    weights[frame] += image
    variance = np.sum(weights**2)
    skewness = np.sum(weights**3) / variance**1.5
    skewness -= 3 * np.sum(of_variance * weights) / variance**0.5
    matched = background.matched_noise(1.3)
    at = (frame, y, x)[-matched.deviation.ndim :]
    # In float32, with sums of hundreds of taps.
    np.testing.assert_allclose(matched.deviation[at], np.sqrt(variance), rtol=2e-5)
    expected = skewness / np.sum(image**3)
    np.testing.assert_allclose(matched.skewness[at], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", LINEAR)
def test_the_closed_form_is_within_a_percent_of_monte_carlo(name, rng):
    # So bright that the noise of the variance does not matter.
    frames = (1e4 + rng.normal(0, 100, (400, 40, 40))).astype(np.float32)
    background = LINEAR[name](frames)
    snr = np.asarray(background.matched_snr(frames, Camera(0.0, 1.0)))
    # 400 frames of 76 independent places: the standard error is 0.4 %.
    assert np.std(snr) == pytest.approx(1, abs=0.012)
    # The background has some 400 independent places, of which the variance is known to 7 %.
    share = np.var(np.asarray(background.bkgds, float)) / 1e4
    assert background.noise.bkgd_variance(frames.shape) == pytest.approx(share, rel=0.2)
    borders = [snr[:, 0], snr[:, -1], snr[:, :, 0], snr[:, :, -1]]
    # 400 frames of 35 places on the borders: 0.6 %.
    assert np.std(borders) == pytest.approx(1, abs=0.025)


@pytest.mark.long
@pytest.mark.parametrize(
    "estimator",
    [SpatialMean(7.0), LocalMean(7.0, 15.0)],
)
def test_false_positives_are_as_promised(estimator, rng):
    frames = rng.poisson(20.0, (300, 64, 64)).astype(np.float32)
    background = estimator(frames)
    snr = background.matched_snr(frames, Camera(0.0, 1.0))
    count = peak_count(snr, background.detection_threshold(2.0))
    # Of 600 events, the standard error is 4 %.
    assert count == pytest.approx(600, rel=0.14)


@pytest.mark.parametrize("mean_electrons", [1.0, 60.0])
def test_the_score_is_normal_for_poisson_noise(mean_electrons):
    """The tails of the weighted sum, from its characteristic function."""
    weights = np.outer(PSF, PSF).ravel()
    deviation, count, span = np.sqrt(mean_electrons), 2**13, 40.0
    step = span / count
    z = (np.arange(count) - count // 2) * step
    phase = 1j * np.outer(2 * np.pi * np.fft.fftfreq(count, step), weights / deviation)
    transform = np.exp(mean_electrons * (np.exp(phase) - 1 - phase).sum(1))
    density = np.fft.fftshift(np.fft.fft(transform)).real / span
    tail = (np.cumsum(density[::-1])[::-1] - density / 2) * step
    skewness = np.sum(weights**3) / deviation
    score = np.asarray(_normal_score(jnp.asarray(z), jnp.asarray(skewness)))
    for probability, tolerance in ((0.5, 0.01), (1e-2, 0.01), (1e-4, 0.04), (1e-6, 0.09)):
        place = np.argmin(np.abs(np.where(z > -8, tail, 1) - probability))
        if mean_electrons == 60:
            # A fourth cumulant, which is not matched, is small.
            tolerance = 0.01
        assert norm.sf(score[place]) == pytest.approx(tail[place], rel=tolerance)


def test_a_molecule_is_as_bright_as_its_matched_filter_says():
    # The Cauchy-Schwarz inequality is an equality for a signal of the same shape.
    for place in ((0, 0), (0, 9), (10, 11)):
        signal = 50 * image_of(place)
        snr = matched_snr(
            signal, 100.0, noise_correction=0.5, gain=2.0, skewness_correction=0.0
        )
        noise = 0.5 * np.sqrt(100.0 / 2.0)
        np.testing.assert_allclose(snr[place], 50 / noise, rtol=1e-5)
        assert snr[place] == snr.max()


def test_the_noise_of_each_pixel_of_a_camera_counts(rng):
    gain = rng.uniform(0.4, 0.5, (SIZE, SIZE))
    read_noise = rng.uniform(1, 20, (SIZE, SIZE))
    signal = rng.normal(0, 3, (SIZE, SIZE))
    snr = matched_snr(
        signal,
        10.0,
        noise_correction=1.0,
        gain=gain,
        read_noise_electrons=read_noise,
        skewness_correction=0.0,
    )
    image = image_of((7, 3))
    variance = np.sum(image**2 * (10 * gain + read_noise**2))
    expected = np.sum(image * gain * signal) / np.sqrt(variance)
    np.testing.assert_allclose(snr[7, 3], expected, rtol=1e-5)


@pytest.mark.slow
def test_each_pixel_of_an_scmos_camera_has_noise_of_one(rng):
    read_noise = rng.uniform(1, 9, (40, 40)).astype(np.float32)
    noise = rng.normal(0, 1, (300, 40, 40)) * np.sqrt(50 + read_noise**2)
    electrons = (50 + noise).astype(np.float32)
    camera = Camera(0.0, 1.0, read_noise)
    background = SpatialMean(9.0)(electrons)
    snr = np.asarray(background.matched_snr(electrons, camera))
    # In each pixel from 300 frames; the mean of all is known to a percent.
    assert np.std(snr, 0).mean() == pytest.approx(1, abs=0.02)
    assert np.std(snr, 0).std() < 0.06


@pytest.mark.long
def test_the_gradient_is_that_of_finite_differences(rng, x64):
    shape = (9, 9)
    # A skewed sum on either side of where the series take over.
    point = {
        "signal": rng.normal(0, 4, shape),
        "bkgd": rng.uniform(1, 9, shape),
        "noise_correction": np.array(0.9),
        "gain": rng.uniform(0.4, 0.6, shape),
        "read_noise_electrons": rng.uniform(0.5, 2, shape),
        "skewness_correction": np.array(1.1),
    }
    cotangent = rng.normal(size=shape)

    def total(arguments):
        return jnp.sum(cotangent * matched_snr(**arguments))

    # One program, also for the differences.
    value_and_gradient = jax.jit(jax.value_and_grad(total))
    gradient = value_and_gradient(point)[1]
    for name, value in point.items():
        direction = rng.normal(size=np.shape(value))

        def along(step, name=name, value=value, direction=direction):
            return value_and_gradient(point | {name: value + step * direction})[0]

        slope = np.sum(gradient[name] * direction)
        # The error is of second order in a step of 1e-5, and rounding of 1e-11.
        assert slope == pytest.approx(float(central_difference(along, 0, 1e-5)), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "estimator",
    [
        SpatialMean(4.0, max_radius_pix=4.5),
        LocalMean(4.0, 6.0, max_radius_pix=4.5, max_radius_frames=7.0, **STEADY),
    ],
)
def test_radii_learn_from_the_matched_snr(estimator, rng):
    frames = jnp.asarray(rng.poisson(60.0, (12, 16, 16)), jnp.float32)
    camera = Camera(0.0, 1.0, 1.5)

    def loss(estimator):
        return jnp.mean(estimator(frames).matched_snr(frames, camera) ** 4)

    slope = eqx.filter_jit(jax.grad(loss))(estimator).unbounded_radii
    assert bool(jnp.isfinite(slope).all())
    assert bool((slope != 0).all())


@pytest.mark.long
def test_what_is_not_finite_reaches_the_pixels_that_see_it_and_no_gradient():
    signal = jnp.ones((SIZE, SIZE)).at[4, 5].set(jnp.nan)

    def snr(signal):
        return matched_snr(signal, 100.0, noise_correction=1.0, gain=1.0)

    reached = ~jnp.isfinite(snr(signal))
    assert int(reached.sum()) == PSF.size**2
    assert bool(reached[4, 5])
    gradient = jax.grad(lambda signal: jnp.nansum(snr(signal)))(signal)
    assert bool(jnp.isfinite(gradient).all())
    # Where there is no light and no read noise, there is no noise.
    assert bool(jnp.isnan(matched_snr(signal, 0.0, noise_correction=1.0, gain=1.0)).all())


@pytest.mark.long
def test_a_list_of_channels_has_a_map_and_a_threshold_each(rng):
    channels = [rng.poisson(60.0, (6, 12, size)).astype(np.float32) for size in (12, 16)]
    estimator, camera = SpatialMean(5.0), Camera(0.0, 1.0)
    background = estimator(channels)
    maps = background.matched_snr(channels, camera)
    assert [m.shape for m in maps] == [(6, 12, 12), (6, 12, 16)]
    low, high = background.detection_threshold(0.1)
    assert low < high
    alone = estimator(channels[0]).matched_snr(channels[0], camera)
    np.testing.assert_allclose(maps[0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_median_leaves_noise_that_is_white_in_space(rng):
    frames = rng.normal(1e4, 100, (60, 24, 24)).astype(np.float32)
    median, mean = TemporalMedian(10), SpatialMean(6.0)
    background = median(frames)
    assert background.noise is None
    snr = background.matched_snr(frames, Camera(0.0, 1.0))
    # 40 frames of 27 places: 2 %.
    assert np.std(snr[10:-10]) == pytest.approx(1, abs=0.06)
    # What follows smooths white noise of that deviation.
    chained = Chained(median, mean)(frames).matched_noise()
    expected = background.noise_corrections * mean(frames).matched_noise().deviation
    np.testing.assert_allclose(chained.deviation, expected, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.7, 1.3, 2.4])
def test_thresholds_are_exceeded_so_often_in_white_noise(sigma, rng):
    taps = psf_taps(sigma)
    frames = rng.normal(size=(60, 100, 160))
    for axis in (1, 2):
        frames = convolve1d(frames, taps, axis, mode="constant")
        norms = convolve1d(np.ones(frames.shape[axis]), taps**2, mode="constant")
        frames /= np.sqrt(norms).reshape([-1 if i == axis else 1 for i in range(3)])
    thresholds = detection_threshold(np.array([5.0, 20.0]), (100, 160), sigma)
    counts = np.array([peak_count(frames, t) for t in np.asarray(thresholds)]) / 60
    # Of 300 and 1200 events, the standard errors are 6 and 3 %.
    assert counts[0] == pytest.approx(5, rel=0.2)
    assert counts[1] == pytest.approx(20, rel=0.1)


def test_borders_have_fewer_neighbours(rng):
    # In so small a frame, most pixels are at a border.
    noise = rng.normal(size=(200_000, 3, 2))
    snr = matched_snr(noise, 1e12, noise_correction=1e-6, gain=1.0, psf_sigma_pix=0.8)
    count = peak_count(snr, detection_threshold(0.01, (3, 2), 0.8))
    # Of 2000 events: 2.2 %.
    assert count == pytest.approx(2000, rel=0.08)


def test_the_slope_of_a_threshold_is_that_of_finite_differences():
    def threshold(rate):
        return detection_threshold(rate, (128, 128), 1.3)

    for rate in (0.02, 1.0, 8.0):
        slope = float(jax.grad(threshold)(rate))
        # Steps as wide as those of the table, in float32.
        expected = float(central_difference(threshold, rate, 0.1 * rate))
        assert slope == pytest.approx(expected, rel=0.02)
    assert jax.jit(threshold)(1.0) == threshold(1.0)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0.0, (64, 64)), ValueError, "false_positives_per_frame must be positive"),
        (("1", (64, 64)), TypeError, "false_positives_per_frame must be a number"),
        ((300.0, (64, 64)), ValueError, "number of local maxima in a frame of 64 x 64 px"),
        ((1.0, 64), ValueError, r"shape must be \(height, width\) in pixels, but is 64"),
        ((1.0, (3, 64, 64)), ValueError, r"shape must be \(height, width\)"),
        ((1.0, (64, 0)), ValueError, "shape must be a whole number from 1 on"),
        ((1.0, (64, 64), 0.0), ValueError, "psf_sigma_pix must be positive"),
        ((1.0, (64, 64), "wide"), TypeError, "psf_sigma_pix must be a number of px"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        detection_threshold(*arguments)


@pytest.mark.usefixtures("as_installed")
def test_an_snr_that_cannot_be_is_refused():
    frame = np.ones((8, 8), np.float32)

    def snr(signal=frame, **options):
        return matched_snr(signal, 1.0, **{"noise_correction": 1.0, "gain": 1.0} | options)

    with pytest.raises(ValueError, match=r"shape \(..., height, width\), but has \(8,\)"):
        snr(frame[0])
    with pytest.raises(ValueError, match="gain must be positive"):
        snr(gain=-1.0)
    with pytest.raises(ValueError, match="psf_sigma_pix must be positive"):
        snr(psf_sigma_pix=-1.0)
    with pytest.raises(ValueError, match=r"psf_sigma_pix must be .* 50"):
        snr(psf_sigma_pix=51.0)
    with pytest.raises(TypeError, match="psf_sigma_pix must be a number, since"):
        jax.jit(lambda sigma: snr(psf_sigma_pix=sigma))(1.3)
    background = SpatialMean(3.0)(frame)
    with pytest.raises(ValueError, match="needs the gain"):
        background.matched_snr(frame, Camera())


@pytest.mark.long
def test_the_example_writes_its_tables_between_its_markers(tmp_path, monkeypatch):
    begin, end = (
        f"<!-- {text} false_positives.py -->" for text in ("begin: written by", "end:")
    )
    assert begin in (ROOT / "docs/pages/detection.md").read_text("utf-8")
    (tmp_path / "detection.md").write_text(f"before\n{begin}\nold\n{end}\nafter")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    simulate = jaxbkgd.simulate_movie
    # Of the size and density of movies of the docs, whose programs are compiled already.
    small: Any = {"molecules_per_frame": 5.0, "on_time_frames": 2.0}

    def simulate_small(key, **options):
        return simulate(key, **options | small)

    monkeypatch.setattr(jaxbkgd, "simulate_movie", simulate_small)
    script = str(ROOT / "examples" / "false_positives.py")
    monkeypatch.setattr(sys, "argv", [script, "--smoke", "--out", str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    text = (tmp_path / "detection.md").read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    # A scene, and three rates for molecules of one brightness, each under a header.
    assert len(rows) == (2 + 1) + (2 + 3)


def test_the_example_makes_its_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples" / "false_positives.py"))
    names = example["main"].__globals__
    monkeypatch.setitem(names, "scene_table", lambda _: "scenes\n")
    monkeypatch.setitem(names, "recall_table", lambda _: "recall\n")
    example["main"](example["SMOKE"], tmp_path / "some" / "folder")
    text = (tmp_path / "some" / "folder" / "detection.md").read_text("utf-8")
    assert "scenes\n\nrecall" in text

"""Cameras: what a number of ADU is in electrons, and maps of pixels that differ."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any, cast

import dask.array as da
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from jaxbkgd import (
    calibrate,
    Camera,
    estimate_dask,
    estimate_movie,
    LocalMean,
    measure_camera,
    measure_gain,
    simulate_movie,
    SpatialMean,
    TruthLoss,
)


SHAPE = 32, 48
RNG = np.random.default_rng(20261130)
LIGHT = 60 + 18 * np.sin(np.mgrid[: SHAPE[0], : SHAPE[1]][0] / 12)
OFFSET = 100 + RNG.standard_normal(SHAPE)
GAIN = 0.46 * np.exp(0.1 * RNG.standard_normal(SHAPE))
# Of less than an ADU, rounding to whole numbers would shift the mean.
READ_NOISE = np.maximum(1.5 * np.exp(0.7 * RNG.standard_normal(SHAPE)), 0.5)
MAPS = Camera(OFFSET, GAIN, READ_NOISE)
# Without a clip, less is compiled.
OVER_TIME = LocalMean(4.0, 2.0, clip=None)


def exposed(light: np.ndarray, frame_count: int) -> np.ndarray:
    """What the camera of the maps writes, rounded, in float32; the same each time."""
    rng = np.random.default_rng(frame_count)
    electrons = rng.poisson(light, (frame_count, *light.shape))
    electrons = electrons + READ_NOISE * rng.standard_normal(electrons.shape)
    return np.round(electrons / GAIN + OFFSET).astype(np.float32)


def written(frames: Any, estimator: Any, **options: Any) -> np.ndarray:
    sink = np.empty(np.shape(frames), np.float32)
    estimate_movie(frames, estimator, sink, progress=False, **options)
    return sink


def test_light_and_adu_are_each_others_inverse():
    frames = exposed(LIGHT, 2)
    electrons = (frames - OFFSET.astype(np.float32)) * GAIN.astype(np.float32)
    np.testing.assert_array_equal(MAPS.electrons(frames), electrons)
    np.testing.assert_array_equal(MAPS.even_light(frames), electrons)
    np.testing.assert_allclose(MAPS.in_adu(electrons), frames - OFFSET, rtol=1e-5)
    plain = Camera(100.0, 0.5)
    np.testing.assert_array_equal(plain.even_light(frames), frames - 100)
    np.testing.assert_array_equal(plain.electrons(frames), (frames - 100) / 2)
    assert Camera().above_offset(frames) is frames


def test_a_camera_is_a_part_of_a_differentiable_program():
    def level(gain):
        return Camera(100.0, gain).electrons(jnp.full((2, 2), 110.0)).mean()

    assert jax.grad(level)(2.0) == 10.0
    np.testing.assert_allclose(
        eqx.filter_jit(lambda camera: camera.electrons(120.0))(MAPS),
        (120 - OFFSET) * GAIN,
        rtol=1e-5,
    )


@pytest.mark.long
@pytest.mark.parametrize("estimator", [SpatialMean(5.0), OVER_TIME])
def test_pixels_that_differ_are_estimated_in_electrons(estimator):
    """Without maps, the mean over time is off by the gain, which scatters by a tenth."""
    frames = exposed(LIGHT, 24)
    bkgds = written(frames, estimator, camera=MAPS) * GAIN
    # As maps, too, for which programs are compiled already.
    even = Camera(np.full(SHAPE, 100.0), np.full(SHAPE, 0.46), READ_NOISE)
    plain = written(frames, estimator, camera=even) * 0.46
    error, plain_error = (
        float(np.sqrt(np.mean((estimate.mean(axis=0) - LIGHT) ** 2)))
        for estimate in (bkgds, plain)
    )
    # What is left is the noise of the mean over 24 frames, half of the scatter of the gain.
    assert error < 0.6 * plain_error


@pytest.mark.slow
def test_residuals_are_in_adu_above_the_map_of_the_offset():
    frames, estimator = exposed(LIGHT, 24), SpatialMean(5.0)
    bkgds = written(frames, estimator, camera=MAPS) * GAIN
    residuals = written(frames, estimator, camera=MAPS, quantity="residual")
    np.testing.assert_allclose(residuals, frames - OFFSET - bkgds / GAIN, atol=0.02)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_an_snr_map_has_unit_noise_in_pixels_of_any_gain_and_read_noise():
    frames = exposed(np.full(SHAPE, 20.0), 300)
    ratios = written(frames, LocalMean(10.0, 60.0, clip=None), camera=MAPS, quantity="snr")
    squares = np.mean(ratios.astype(np.float64) ** 2, axis=0)
    for values in (GAIN, READ_NOISE):
        quarters = np.digitize(values, np.quantile(values, [0.25, 0.5, 0.75]))
        for quarter in range(4):
            # 384 pixels of 300 frames: a standard error of 0.4 %.
            assert abs(np.mean(squares[quarters == quarter]) - 1) < 0.02


@pytest.mark.slow
def test_noisy_pixels_count_less():
    """As the inverse of their variance in a light of 20 e-, beside a quiet pixel."""
    noise = np.where(np.arange(48) == 7, 20.0, 1.0) * np.ones(SHAPE)
    camera = Camera(0.0, 1.0, noise)
    weights = np.asarray(camera.weights(jnp.full((2, *SHAPE), 20.0)))
    np.testing.assert_allclose(weights[0, 3, 7] / weights[0, 3, 8], 21 / 420, rtol=1e-4)
    mask = jnp.asarray(np.arange(48) > 3)[None, None]
    assert np.all(
        np.asarray(camera.weights(jnp.full((2, *SHAPE), 20.0), mask))[..., :3] == 0
    )
    assert Camera(0.0, 1.0, 2.0).weights(jnp.ones(SHAPE), None) is None
    # A light of zero and below, and pixels that are not finite, have finite weights.
    dark = jnp.full((1, *SHAPE), -3.0).at[0, 0, 0].set(jnp.nan)
    assert np.isfinite(camera.weights(dark)).all()


@pytest.mark.long
def test_chunks_boxes_and_dask_have_the_same_bits():
    frames, estimator = exposed(LIGHT, 24), OVER_TIME
    whole = written(frames, estimator, camera=MAPS)
    chunked = written(frames, estimator, camera=MAPS, chunk_frames=5)
    np.testing.assert_array_equal(chunked, whole)
    array = da.from_array(frames, chunks=cast(Any, (7, -1, -1)))
    lazy = estimate_dask(array, estimator, camera=MAPS)
    np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), whole)
    x0, y0, x1, y1 = box = (8, 0, 40, 32)
    part = np.empty((24, 32, 32), np.float32)
    estimate_movie(frames, estimator, [part], camera=MAPS, boxes=[box], progress=False)
    cut = MAPS.cropped(slice(y0, y1), slice(x0, x1))
    expected = written(frames[:, y0:y1, x0:x1], estimator, camera=cut)
    np.testing.assert_array_equal(part, expected)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_calibration_sees_even_light_and_says_electrons():
    frames = exposed(LIGHT, 40)
    _, history = calibrate(frames, camera=MAPS, progress=False)
    (findings,) = history.findings
    assert findings.unit == "e-"
    # The noise is measured by differences between pixels, of which few are the noisiest.
    assert abs(findings.noise / np.sqrt(np.mean(LIGHT + READ_NOISE**2)) - 1) < 0.1
    assert "e- (" in history.rows()["error"]
    truth = TruthLoss(jnp.asarray(LIGHT / GAIN, jnp.float32))
    start = SpatialMean(3.0, max_radius_pix=12.0)
    options: dict[str, Any] = {"objective": truth, "steps": 1, "progress": False}
    _, history = calibrate(frames, start, camera=MAPS, **options)
    # In squared electrons: the mean under 3 px leaves about 8.1 / sqrt(pi 9).
    assert history.losses[0] < 5


def test_files_keep_a_camera(tmp_path):
    for name, camera in (
        ("camera.json", Camera(100.0, 0.46, 1.6)),
        ("unknown.json", Camera(100.0)),
        ("maps.npz", MAPS),
        ("offset.npz", Camera(OFFSET)),
        ("maps.tif", MAPS),
    ):
        camera.save(tmp_path / name)
        back = Camera.load(tmp_path / name)
        assert jax.tree.structure(back) == jax.tree.structure(camera)
        for got, expected in zip(*map(jax.tree.leaves, (back, camera)), strict=True):
            np.testing.assert_array_equal(got, expected)
    for name, camera in (("x.json", MAPS), ("x.tif", Camera(OFFSET)), ("x.csv", MAPS)):
        with pytest.raises(ValueError, match=r"is written as \.npz"):
            camera.save(tmp_path / name)


def test_numbers_in_a_tiff_are_numbers_again(tmp_path):
    """And so are given to frames of any size."""
    Camera(100.0, 0.5, 1.5).save(tmp_path / "numbers.tif")
    back = Camera.load(tmp_path / "numbers.tif")
    assert (back.shape, back.gain_electrons_per_adu) == ((), 0.5)


def test_pages_that_were_written_one_by_one_are_maps(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as tiff:
        for page in jax.tree.leaves(MAPS):
            tiff.write(page, photometric="minisblack", contiguous=False)
    back = Camera.load(tmp_path / "pages.tif")
    np.testing.assert_array_equal(back.read_noise_electrons, MAPS.read_noise_electrons)


def test_a_suffix_in_capitals_is_kept(tmp_path):
    MAPS.save(tmp_path / "MAPS.NPZ")
    assert Camera.load(tmp_path / "MAPS.NPZ").shape == SHAPE


def test_settings_of_picasso_are_a_camera(tmp_path):
    path = tmp_path / "config.yaml"
    for text, expected in (
        ("Baseline: 100\nSensitivity: 0.46\n---\nBox Size: 7\n", (100.0, 0.46)),
        ("Baseline: 200\nSensitivity: 12.0\nGain: 300\n", (200.0, 0.02)),
        (
            "Cameras:\n  Zyla:\n    Baseline: 90\n    Sensitivity: {540 MHz: [0.5]}\n",
            (90.0, 0.5),
        ),
    ):
        path.write_text(text)
        camera = Camera.load(path)
        got = [camera.offset_adu, camera.known_gain("A test")]
        np.testing.assert_allclose(np.array(got, float), expected, rtol=1e-6)
    path.write_text(
        "Cameras:\n  A: {Baseline: 9, Sensitivity: {slow: 0.4, fast: [0.5, 7]}}\n"
    )
    message = r"3 cameras or modes.*Cameras A slow: 0\.4; Cameras A fast 1: 0\.5"
    with pytest.raises(ValueError, match=message):
        Camera.load(path)
    path.write_text("Frames: 5000\n")
    with pytest.raises(ValueError, match="holds the settings of 0 cameras"):
        Camera.load(path)


@pytest.mark.slow
def test_files_that_hold_no_camera_are_named(tmp_path):
    MAPS.save(tmp_path / "short.npz")
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:100])
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, OFFSET)
    np.savez(tmp_path / "objects.npz", offset_adu=np.array([None]))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "text.tif").write_bytes(b"hello")
    for name in ("short.npz", "array.npz", "objects.npz", "bytes.json", "text.tif"):
        with pytest.raises(ValueError, match=f"{name}: "):
            Camera.load(tmp_path / name)
    (tmp_path / "other.json").write_text(json.dumps({"gain": 1}))
    (tmp_path / "zero.json").write_text(json.dumps({"gain_electrons_per_adu": 0}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.yaml").write_text("{: [")
    (tmp_path / "deep.yaml").write_text(3000 * "[")
    (tmp_path / "none.csv").write_text("")
    tifffile.imwrite(tmp_path / "two.tif", np.ones((2, 8, 8), np.float32))
    for name, message in {
        "broken.yaml": "is no YAML",
        "deep.yaml": "is no YAML",
        "other.json": "is no camera; one has offset_adu",
        "zero.json": "gain_electrons_per_adu must be positive",
        "broken.json": "Expecting",
        "none.csv": "a camera is a .json, .npz, .tif, or a .yaml of Picasso",
        "two.tif": "has 2 pages; give three: offset, gain and read noise",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            Camera.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.nan,), "offset_adu must be finite"),
        ((0.0, 0.0), "gain_electrons_per_adu must be positive and finite"),
        ((0.0, np.where(OFFSET > 100, 1.0, 0.0)), "gain_electrons_per_adu must be posit"),
        ((0.0, np.full(SHAPE, np.nan)), "gain_electrons_per_adu must be positive and fin"),
        ((0.0, 1.0, -1.0), "read_noise_electrons must be zero or positive"),
        ((np.zeros((2, 8, 8)),), r"number or a map \(height, width\).*\(2, 8, 8\)"),
        ((np.zeros((8, 8)), np.ones((8, 9))), r"shapes \(8, 8\) and \(8, 9\)"),
        ((0.0, None, 1.6), "read noise in electrons needs gain_electrons_per_adu"),
        ((None, 1.0), "offset_adu must be a number"),
    ],
)
def test_bad_maps_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Camera(*arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            np.where(np.indices(SHAPE)[0] == 31, np.nan, OFFSET),
            r"nan at \(31, 0\), the first of 48",
        ),
        (np.ma.masked_less(OFFSET, 99), "a MaskedArray of float64"),
    ],
)
def test_a_bad_map_is_named_in_one_line(bad, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        Camera(bad)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_frames_that_maps_do_not_fit_are_refused():
    frames = jnp.ones((2, 8, 48))
    for make in (MAPS.electrons, MAPS.above_offset, MAPS.weights):
        with pytest.raises(ValueError, match=r"maps have the shape \(32, 48\)"):
            make(frames)
    background = SpatialMean(3.0)(frames)
    for ratio in (background.snr, background.matched_snr):
        with pytest.raises(ValueError, match=r"maps have the shape \(32, 48\)"):
            ratio(frames, MAPS)


@pytest.mark.slow
def test_the_noise_of_a_pixel_is_that_of_its_light_and_its_reading():
    background = SpatialMean(5.0)(jnp.full((1, 16, 16), 200.0))
    ratio = background.snr(jnp.full((1, 16, 16), 210.0), Camera(0.0, 0.5, 3.0))
    noise_adu = math.sqrt(200 * 0.5 + 9) / 0.5
    factor = background.noise_corrections
    np.testing.assert_allclose(ratio, 10 / (factor * noise_adu), rtol=1e-4)


def camera_stacks(levels: list[float], frame_count: int = 200) -> list[np.ndarray]:
    """Frames of uneven light that flickers by 2 %, by a camera of the maps."""
    profile = np.linspace(1, 0.6, SHAPE[0])[:, None] * np.ones(SHAPE)
    stacks, rng = [], np.random.default_rng(frame_count)
    for level in levels:
        lamp = 1 + 0.02 * rng.standard_normal((frame_count, 1, 1))
        electrons = rng.poisson(level * profile * lamp)
        noise = READ_NOISE * rng.standard_normal(electrons.shape)
        counts = np.clip(np.round((electrons + noise) / GAIN + OFFSET), 0, 65535)
        stacks.append(counts.astype(np.uint16))
    return stacks


def test_maps_from_dark_and_bright_frames_are_within_their_stated_error():
    dark, *bright = camera_stacks([0, 50, 400, 3000])
    report = measure_camera(dark, bright)
    truth = OFFSET, GAIN, READ_NOISE
    for found, true, std in zip(report[:3], truth, report[3:6], strict=True):
        deviations = (found - true) / std
        # 1 536 pixels: the root mean square is known to 2 %.
        assert 0.9 < np.sqrt(np.mean(deviations**2)) < 1.15
        assert abs(np.mean(deviations)) < 0.2
    assert report.doubts == ()
    camera = Camera.from_dark_and_bright(dark, bright)
    np.testing.assert_array_equal(camera.offset_adu, np.float32(report.offset_adu))


def test_pixels_that_are_alike_are_given_one_gain():
    """Its scatter from noise alone, 9 % a pixel, is not taken for that of the pixels."""
    light = [
        100 + 2 * np.random.default_rng(level).poisson(level, (250, *SHAPE))
        for level in (0, 30, 300)
    ]
    report = measure_camera(light[0], light[1:])
    assert np.std(report.gain_electrons_per_adu) < 0.005
    assert abs(np.mean(report.gain_electrons_per_adu) - 0.5) < 0.005


@pytest.mark.slow
def test_a_dead_pixel_and_a_saturated_light_are_named():
    dark, *bright = camera_stacks([0, 400, 3000], 100)
    for stack in (dark, *bright):
        stack[:, 3, 4] = 130
    report = measure_camera(dark, [bright[0], np.minimum(bright[1], 5000)])
    assert any("1 pixels do not respond to light" in doubt for doubt in report.doubts)
    assert any("off the line: it is saturated" in doubt for doubt in report.doubts)
    camera = Camera(*report[:3])
    weights = np.asarray(camera.weights(jnp.full((1, *SHAPE), 60.0)))
    assert weights[0, 3, 4] < 1e-4 * weights.max()


def test_a_frame_before_the_shutter_opens_does_not_count():
    light = [
        100 + 2 * np.random.default_rng(level).poisson(level, (200, *SHAPE))
        for level in (0, 30, 300)
    ]
    light[1][0] = light[2][:2] = 100
    report = measure_camera(light[0], light[1:])
    assert report.doubts == ()
    assert abs(np.mean(report.gain_electrons_per_adu) - 0.5) < 0.005


def test_dark_frames_and_a_gain_make_maps():
    (dark,) = camera_stacks([0])
    report = measure_camera(dark, gain=0.46)
    assert report.gain_electrons_per_adu == 0.46
    assert np.corrcoef(np.ravel(report.offset_adu), OFFSET.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(
        np.mean(report.read_noise_electrons * GAIN / 0.46), np.mean(READ_NOISE), rtol=0.02
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda dark: (dark[:5],), r"dark: has the shape \(5, 32, 48\)"),
        (lambda dark: (dark,), "Dark frames do not tell the gain"),
        (lambda dark: (dark, [dark[:, :8]]), r"bright 1: has the shape \(20, 8, 48\)"),
        (lambda dark: (dark, [dark]), "which is no light"),
        (lambda dark: (dark, [9 * dark, dark * 0 + 999]), "bright 2: at 899 .* saturated"),
        (lambda dark: (dark, [9 * dark, dark / 2]), "bright 2: is darker than the dark"),
        (lambda dark: (dark * np.nan, [dark]), "dark: has pixels that are not finite"),
        (
            lambda dark: (dark, [np.where(dark > 109, np.inf, dark + 50)]),
            "bright 1: has pixels that are not finite",
        ),
    ],
)
def test_frames_that_tell_no_camera_are_refused(make, message):
    dark = np.random.default_rng(0).normal(100, 3, (20, *SHAPE))
    with pytest.raises(ValueError, match=message):
        measure_camera(*make(dark))


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_movie_alone_tells_gain_and_offset():
    frames, _ = simulate_movie(
        jax.random.key(0), frame_count=60, gain_electrons_per_adu=0.46, offset_adu=100.0
    )
    frames = np.asarray(frames)
    report = measure_gain(frames, read_noise_electrons=1.6)
    assert abs(report.gain_electrons_per_adu - 0.46) < max(4 * report.gain_std, 0.02)
    assert abs(report.offset_adu - 100) < 4 * report.offset_std_adu
    known = measure_gain(frames, offset_adu=100.0, read_noise_electrons=1.6)
    assert abs(known.gain_electrons_per_adu / 0.46 - 1) < 0.03
    assert known.gain_std < report.gain_std
    unknown = measure_gain(frames, offset_adu=100.0)
    assert any("gain is too low: by 5 %" in doubt for doubt in unknown.doubts)
    with pytest.raises(ValueError, match="offset_adu must be finite"):
        measure_gain(frames, offset_adu=math.nan)
    # Of such movies, the variance rises by chance in two of three.
    even = np.random.default_rng(3).poisson(60, (60, 64, 64)) / 0.46 + 100
    assert any("are about as bright" in doubt for doubt in measure_gain(even).doubts)
    with pytest.raises(ValueError, match="No two successive frames are there"):
        measure_gain(np.zeros((20, 64, 64)))
    with pytest.raises(ValueError, match="or its read noise is not 50 electrons"):
        measure_gain(frames, read_noise_electrons=50.0)
    lost = np.where((np.arange(60) % 5 == 0)[:, None, None], 0, frames)
    without = measure_gain(lost, read_noise_electrons=1.6)
    assert abs(without.offset_adu - 100) < 4 * without.offset_std_adu
    smoothed = measure_gain(gaussian_filter(frames.astype(float), (0, 1, 1)))
    assert any("neighbouring pixels is alike" in doubt for doubt in smoothed.doubts)


def test_dark_frames_that_are_cut_at_zero_are_named():
    rng = np.random.default_rng(0)
    dark, bright = (
        np.maximum(rng.poisson(level, (50, 32, 32)) / 0.5 + rng.normal(0, 3, (32, 32)), 0)
        for level in (0, 60)
    )
    (doubt,) = measure_camera(np.round(dark), [np.round(bright)]).doubts
    assert "of the dark pixels are 0, at which the camera cuts" in doubt


def test_pixels_that_are_not_finite_leave_the_gain_of_the_others():
    light = 60 + 40 * np.sin(np.arange(96) / 15) * np.ones((60, 64, 96))
    frames = np.random.default_rng(7).poisson(light) / 0.46 + 100
    frames[:, 3, 4] = np.nan
    report = measure_gain(frames, offset_adu=100.0)
    assert abs(report.gain_electrons_per_adu / 0.46 - 1) < 0.03


def test_a_gain_that_differs_within_the_field_is_not_believed():
    """Light that flickers from pixel to pixel in a quarter of the field, as of molecules,
    which adds 15 % to the variance there."""
    rng = np.random.default_rng(4)
    light = np.broadcast_to(np.linspace(40, 120, 96)[:, None], (60, 96, 96)).copy()
    light[:, :48, :48] *= 1 + 0.05 * rng.standard_normal((60, 48, 48))
    report = measure_gain(rng.poisson(light) / 0.5 + 100, read_noise_electrons=0.1)
    assert any("quarters of the field have gains from" in d for d in report.doubts)
    even = np.linspace(40, 120, 96)[:, None] * np.ones((60, 96, 96))
    plain = measure_gain(rng.poisson(even) / 0.5 + 100, read_noise_electrons=0.1)
    assert plain.doubts == ()
    assert report.gain_std > 2 * plain.gain_std


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_the_example_measures_cameras_and_hot_pixels(monkeypatch):
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    example = runpy.run_path(str(folder / "camera_accuracy.py"))
    for ratio in example["print_maps"](frame_count=100, size_pix=48):
        assert 0.85 < ratio < 1.2
    scenes = [scene for scene in example["SCENES"] if scene.name == "scale-20"]
    # Of one size, for which the simulation is compiled once.
    size = {"frame_count": 60, "size_pix": 64}
    (ratio,) = example["print_gains"](scenes, **size)
    assert abs(ratio - 1) < 0.1
    seen, left_out = example["print_hot_pixels"](scenes[0], **size)
    assert left_out < 0.7 * seen

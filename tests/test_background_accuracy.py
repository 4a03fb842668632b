"""The example that compares estimators measures what it says, and its scenes are what
their fields say. The scenes here are small; the estimators are stand-ins, but for one
test of those of other packages, where these are installed."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import jaxbkgd


EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE_PIX, FRAME_COUNT = 24, 40
TIME = np.linspace(0, 1, FRAME_COUNT)


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("background_accuracy")


@pytest.fixture(scope="module")
def movies(example: ModuleType) -> dict[str, SimpleNamespace]:
    """Frames and background, in electrons, of each moving scene over an even background,
    with one molecule in every frame, half a pixel outside of it: at -1, 10."""

    def one_molecule(key, *, photons_per_frame, height_pix, **_):
        beyond = (height_pix - SIZE_PIX) / 2
        place = np.ones((FRAME_COUNT, 1), np.float32)
        return place, (beyond - 1) * place, (beyond + 10) * place, photons_per_frame * place

    movies = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenes.blinking_molecules", one_molecule)
        for scene in (*example.MOVING_SCENES, *example.OTHER_SCENES):
            plain = replace(scene, shape="gradient" if scene.name == "drift" else "uniform")
            (movie,) = example.simulated(plain, size_pix=SIZE_PIX, frame_count=FRAME_COUNT)
            gain, offset = movie.gain_electrons_per_adu, movie.offset_adu
            movies[scene.name] = SimpleNamespace(
                frames=gain * (movie.frames - offset),
                bkgds=gain * (movie.bkgds_adu - offset),
            )
    return movies


@pytest.mark.slow
def test_frames_have_the_mean_of_their_background(movies: dict[str, SimpleNamespace]):
    for name, movie in movies.items():
        # Without the rows that the molecule reaches: 6 px are more than 5 sigmas.
        frames, bkgds = movie.frames[:, 6:], movie.bkgds[:, 6:]
        # Photon noise, and a read noise of 1.5 electrons.
        std = np.sqrt((bkgds + 1.5**2).mean((1, 2)) / bkgds[0].size)
        errors = (frames - bkgds).mean((1, 2)) / std
        # Of 320 frames, one is beyond 4.5 standard errors in 500 seeds; these are fixed.
        assert np.abs(errors).max() < 4.5, name


def test_a_step_dims_the_frame_or_its_right_half(movies: dict[str, SimpleNamespace]):
    half = FRAME_COUNT // 2
    light = np.where(TIME < 0.5, 1, 0.7)
    step, in_half = movies["step"].bkgds, movies["step-in-half"].bkgds
    np.testing.assert_allclose(step, np.broadcast_to(60 * light[:, None, None], step.shape))
    # A quarter of 24 px from the edge, tanh is within 0.5 % of its limit.
    np.testing.assert_allclose(in_half[:, :, :6], 60, rtol=2e-3)
    np.testing.assert_allclose(in_half[half:, :, -6:], 42, rtol=2e-3)
    np.testing.assert_allclose(in_half[:half], 60)


def test_a_tenth_is_left_of_a_bleached_background(movies: dict[str, SimpleNamespace]):
    np.testing.assert_allclose(movies["fast-bleaching"].bkgds[:, 3, 4], 60 * 0.1**TIME)


def test_light_flickers_by_three_percent(movies: dict[str, SimpleNamespace]):
    flicker = movies["flicker"].bkgds[:, 0, 0]
    # Of 40 frames, the standard deviation is known to 11 %: four times that.
    assert np.std(flicker / 60) == pytest.approx(0.03, rel=0.45)


def test_light_pulses_flashes_and_goes_out(movies: dict[str, SimpleNamespace]):
    sine, dark = (movies[name].bkgds[:, 0, 0] / 60 for name in ("sine", "dark-frames"))
    np.testing.assert_allclose(sine[:4], [1, 1.15, 1 + 0.3 * np.sqrt(0.75), 1.3])
    np.testing.assert_allclose(sine[12:], sine[:-12])
    np.testing.assert_array_equal(np.flatnonzero(dark == 0), [19, 39])


def test_a_second_pattern_is_in_every_fourth_frame(movies: dict[str, SimpleNamespace]):
    second = movies["second-pattern"].bkgds / 60 - 1
    np.testing.assert_allclose(second[::4].mean((1, 2)), 0.35)
    np.testing.assert_allclose(second[1::4], 0, atol=1e-12)
    # Brightest at the left edge.
    assert np.all(second[0].argmax(1) == 0)


def test_a_drifting_background_is_the_first_one_elsewhere(
    movies: dict[str, SimpleNamespace],
):
    bkgds = movies["drift"].bkgds
    # Of a frame with 6 px of room on each side, 0.8 of the mean from top to bottom.
    slope_y, slope_x = np.array([0.8, 0.4]) * 60 / (SIZE_PIX + 12)
    lost = (6 * slope_y - 4 * slope_x) * TIME
    np.testing.assert_allclose(bkgds, bkgds[0] - lost[:, None, None])
    np.testing.assert_allclose(np.diff(bkgds[0], axis=0), slope_y)


def test_a_blob_keeps_its_light_and_crosses_the_frame(movies: dict[str, SimpleNamespace]):
    blob = movies["blob"].bkgds - 60
    light = blob.sum((1, 2))
    # Its centre is three of its sigmas or more from all edges: 0.14 % lies beyond one.
    np.testing.assert_allclose(light, 60 * 2 * np.pi * (0.1 * SIZE_PIX) ** 2, rtol=5e-3)
    pixels = (np.arange(SIZE_PIX) + 0.5) / SIZE_PIX
    np.testing.assert_allclose(blob.sum(2) @ pixels / light, 0.35 + 0.3 * TIME, atol=2e-3)
    np.testing.assert_allclose(blob.sum(1) @ pixels / light, 0.3 + 0.4 * TIME, atol=2e-3)


def test_molecules_outside_the_frame_shine_into_it(movies: dict[str, SimpleNamespace]):
    scene = movies["on-20-frames"]
    light = (scene.frames - scene.bkgds)[:, :6].sum((1, 2)).mean()
    # What of 700 photons lies beyond y = -1/2, as the PSF's sigma is 1.3 px.
    inside = 700 * NormalDist(-1, 1.3).cdf(-0.5)
    # Of 40 frames, the noise of 144 px with 62 e- each is 15 e-, and of the light 3 e-.
    assert light == pytest.approx(700 - inside, abs=4 * 16)


def flat_movie(example: ModuleType, *, frame_count: int):
    """5 e-, or 10 ADU, of background in every pixel."""
    return example.Movie(
        np.full((frame_count, 8, 8), 110, np.uint16),
        np.full((frame_count, 8, 8), 110.0),
        jaxbkgd.Camera(100.0, 0.5),
    )


def test_an_estimator_counts_with_its_best_setting_in_electrons(example: ModuleType):
    def offsets(frames):
        assert frames.shape == (2, 8, 8)
        assert frames.dtype == np.float32
        yield "two too many", frames + 2
        yield "one too many", frames + 1

    movie = flat_movie(example, frame_count=3)
    estimator = example.Estimator("offsets", "numpy", offsets, "ok", every=2)
    result, bkgds = example.measured("flat", movie, estimator)
    assert (result.scene, result.estimator) == ("flat", "offsets")
    assert result.setting == "one too many"
    assert result.rms_electrons == 0.5
    assert result.bias_percent == pytest.approx(10)  # of 5 e-, rounded
    np.testing.assert_array_equal(bkgds, 5.5)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_all_that_are_here_are_beyond_the_limit(example: ModuleType, tmp_path: Path):
    example.show_smoke(tmp_path)
    kept = json.loads((tmp_path / "background_accuracy.json").read_text())
    found = [result["estimator"] for result in kept["results"]]
    slow = (example.LEARNED, example.LEARNED_MEAN)
    assert found == [e.name for e in example.installed() if e.name not in slow]
    least = kept["limits"]["scale-20"]["rms_electrons"]
    assert all(result["rms_electrons"] > least for result in kept["results"])


def above(adu: float):
    def estimate(frames):
        yield "as it is", frames + adu

    return estimate


@pytest.fixture
def small(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example with two estimators, and one that is not installed, on flat movies."""
    estimators = [
        example.Estimator(example.MEDIAN, "numpy", above(4), "sk"),
        example.Estimator(example.LEARNED, "numpy", above(1), "ok"),
        example.Estimator("missing", "no_such_package", above(0), "ok"),
    ]
    monkeypatch.setattr(example, "ESTIMATORS", estimators)
    monkeypatch.setattr(
        example,
        "simulated",
        lambda scene, *, size_pix, frame_count: [
            flat_movie(example, frame_count=frame_count)
        ],
    )
    return example


def found_in(folder: Path) -> list[tuple[str, str, float]]:
    kept = json.loads((folder / "background_accuracy.json").read_text())
    return [(r["scene"], r["estimator"], r["rms_electrons"]) for r in kept["results"]]


@pytest.mark.slow
def test_the_example_writes_results_table_and_figures(small: ModuleType, tmp_path: Path):
    small.show_accuracy(["dense", "step"], tmp_path, size_pix=8, frame_count=3)
    assert found_in(tmp_path) == [
        *(("dense", small.MEDIAN, 2.0), ("dense", small.LEARNED, 0.5)),
        *(("step", small.MEDIAN, 2.0), ("step", small.LEARNED, 0.5)),
    ]
    page = (tmp_path / "background_accuracy.md").read_text()
    assert "3 frames of 8 x 8 px" in page
    # Field and molecules are of length scale 20 in both.
    limit = small.bound(small.SCENES_BY_NAME["step"], flat_movie(small, frame_count=3))
    in_table = f"{limit.rms_electrons:.3f} | {limit.rms_electrons / 0.5:.2f}"
    assert (
        f"| scene | {small.LEARNED} | limit | efficiency | {small.MEDIAN} |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| dense | **0.50** | {in_table} | 2.00 |\n"
        f"| step | **0.50** | {in_table} | 2.00 |\n"
    ) in page
    assert f"| mean ratio to {small.LEARNED} | 1.00 |" in page
    assert f"`{small.LEARNED}` is the closest to the truth in all of 2 scenes." in page
    assert f"{small.MEDIAN}, has 4.0 times its error" in page
    assert "| dense | +10.00 | +40.00 |\n| step | +10.00 | +40.00 |\n" in page
    for name in ("background_accuracy.png", "background_maps.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_missing(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(scene_names, *estimator_names, frame_count=3):
        small.show_accuracy(
            scene_names,
            tmp_path,
            size_pix=8,
            frame_count=frame_count,
            estimator_names=estimator_names,
        )

    run(["step"], small.LEARNED)
    run(["blob"], small.MEDIAN)
    assert found_in(tmp_path) == [("blob", small.MEDIAN, 2.0), ("step", small.LEARNED, 0.5)]
    table = (tmp_path / "background_accuracy.md").read_text()
    assert "| blob | - | - | - | **2.00** |" in table
    # What is measured from here on has an error of its own.
    median, usual, _ = small.ESTIMATORS
    others = [replace(median, estimate=above(2)), replace(usual, estimate=above(2))]
    monkeypatch.setattr(small, "ESTIMATORS", others)
    run(["blob", "step"])
    assert found_in(tmp_path) == [
        *(("blob", small.MEDIAN, 2.0), ("blob", small.LEARNED, 1.0)),
        *(("step", small.MEDIAN, 1.0), ("step", small.LEARNED, 0.5)),
    ]
    with pytest.raises(SystemExit, match=r"of \[3, 8, 8\], not of \[4, 8, 8\]"):
        run(["step"], frame_count=4)


@pytest.mark.slow
def test_other_kernels_average_noise(example, monkeypatch):
    kernels = importlib.import_module("kernels_tried")
    monkeypatch.setattr(kernels, "FRAME_COUNT", 20)
    (scene,) = (scene for scene in example.SCENES if scene.name == "scale-20")
    errors = kernels.errors_of(scene, seed=0)
    # Of the mean of 20 frames of 60 photons, with a read noise of 1.5 electrons.
    unsmoothed = np.sqrt((60 + 1.5**2) / 20)
    # Over 20 px that vary together, many more than 3 x 3 pixels are averaged.
    assert all(error < unsmoothed / 3 for error in errors.values())
    assert errors["order 6"] < errors["order 4"] < errors["G"]

"""The limit of the background's error is attained by who knows what it knows, and no
result on the page is below it."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def limit() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("accuracy_bound")


@pytest.fixture(scope="module")
def scenes(limit: ModuleType) -> ModuleType:
    return importlib.import_module("scenes")


@pytest.mark.slow
def test_wiener_s_filter_attains_it(limit: ModuleType):
    """Newton's method to the most probable field, whose steps are Wiener's filters, in
    simulated frames without molecules."""
    size_pix, frame_count, length, variance, brightness = 16, 10, 5.0, 0.08, 60.0
    rng = np.random.default_rng(0)
    distances = np.subtract.outer(np.arange(size_pix), np.arange(size_pix))
    along = np.exp(-((distances / length) ** 2) / 2)
    covariance = variance * np.kron(along, along)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    squares = []
    for _ in range(100):
        field = root @ rng.standard_normal(size_pix**2) - variance / 2
        truth = brightness * np.exp(field)
        mean = rng.poisson(frame_count * truth) / frame_count
        # The level is not known: its variance is one.
        prior, estimate = covariance + 1.0, np.zeros(size_pix**2)
        for _ in range(5):
            level = brightness * np.exp(estimate)
            noise = np.diag(1 / (frame_count * level))
            seen = estimate + mean / level - 1
            estimate = prior @ np.linalg.solve(prior + noise, seen)
        squares.append(np.mean((brightness * np.exp(estimate) - truth) ** 2))
    least = brightness**2 * limit.mean_variance(
        limit.covariance_eigenvalues([(variance, length, length)], size_pix),
        frame_count * brightness,
        size_pix,
    )
    # The mean of 100 movies is known to 3 %: twice that.
    assert np.mean(squares) == pytest.approx(least, rel=0.06)


@pytest.fixture(scope="module")
def uniform(scenes: ModuleType) -> Any:
    """A scene and its movie."""
    scene = replace(scenes.SCENES[0], molecules_per_frame=0.0)
    return scene, *scenes.simulated(scene, size_pix=32, frame_count=20)


@pytest.mark.slow
def test_an_even_background_is_one_number(limit: ModuleType, uniform: Any):
    found = limit.bound(*uniform)
    # The noise of 60 photons and 1.5 e-, in all pixels of all frames.
    assert found.rms_electrons == pytest.approx(np.sqrt(62.25 / (20 * 32**2)), rel=1e-3)
    assert found.kind == "estimators"


@pytest.mark.slow
def test_the_light_of_frames_costs_as_much_as_it_is_unknown(
    limit: ModuleType, scenes: ModuleType
):
    flickering = next(scene for scene in scenes.MOVING_SCENES if scene.name == "flicker")
    flickering = replace(flickering, molecules_per_frame=0.0)
    (movie,) = scenes.simulated(flickering, size_pix=32, frame_count=20)
    steady, unknown = (
        limit.bound(replace(flickering, flicker=share), movie).rms_electrons
        for share in (0.0, 0.03)
    )
    # A frame's light is known to the noise of its 1024 px, but for their common mean.
    of_light = np.sqrt(62.25 / 1024 * 19 / 20)
    assert np.hypot(steady, of_light) == pytest.approx(unknown, rel=0.05)


def test_multiplied_electrons_tell_half_of_what_photons_do(limit: ModuleType):
    few, many = limit.multiplied_information(np.array([0.5, 200.0]))
    # Without noise, it is the mean's inverse; of many photons, their variance doubles.
    assert many == pytest.approx(0.5 / 200, rel=0.02)
    assert 0.5 / 0.5 < few < 1 / 0.5


@pytest.mark.slow
def test_there_is_none_where_the_shape_of_the_background_changes(
    limit: ModuleType, scenes: ModuleType, uniform: Any
):
    _, movie = uniform
    for scene in (*scenes.MOVING_SCENES, *scenes.OTHER_SCENES):
        if scene.name in ("blob", "drift", "second-pattern"):
            assert limit.bound(scene, movie) is None


def test_no_result_on_the_page_is_below_it():
    kept = json.loads((ROOT / "docs" / "pages" / "background_accuracy.json").read_text())
    for result in kept["results"]:
        least = kept["limits"][result["scene"]]
        if least and least["kind"] == "estimators":
            assert result["rms_electrons"] > least["rms_electrons"], result

"""The other estimators of the background find what they should where the answer is known:
those that are written by their papers, and those whose packages are installed."""

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import jaxbkgd


EXAMPLES = Path(__file__).parents[1] / "examples"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def rivals() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("rivals")


@pytest.mark.slow
def test_those_that_are_here_know_an_even_background(rivals: ModuleType):
    frames = np.full((3, 32, 32), 100, np.float32)
    for estimator in rivals.RIVALS:
        # That one needs photon noise.
        if find_spec(estimator.package) and not estimator.knows_cameras:
            for setting, bkgds in estimator.estimate(frames):
                # Sums of float32, of which some lose a digit.
                name = f"{estimator.name}, {setting}"
                np.testing.assert_allclose(bkgds, frames, 1e-4, err_msg=name)


def test_picasso_takes_the_median_of_each_pixel(rivals: ModuleType):
    pytest.importorskip("picasso")
    frames = RNG.poisson(60, (9, 8, 8)).astype(np.float32)
    *_, (setting, bkgds) = rivals.with_picasso(frames)
    assert setting == "± 100 frames"
    np.testing.assert_array_equal(bkgds, np.broadcast_to(np.median(frames, 0), (9, 8, 8)))


def test_the_lower_quartile_is_shifted_to_the_median(rivals: ModuleType):
    # All pixels have the same values, in an order of their own.
    values = np.arange(41, dtype=np.float32) ** 2
    frames = RNG.permuted(np.broadcast_to(values[:, None], (41, 64)), axis=0)
    *_, (_, bkgds) = rivals.with_percentile(frames.reshape(41, 8, 8))
    np.testing.assert_array_equal(bkgds, np.full((41, 8, 8), 20.0**2))


def test_the_lowest_of_two_fair_coins_is_known(rivals: ModuleType):
    # Of Poisson counts of mean one, the sum over k of the squared chance of more than k.
    minimum = rivals.expected_minimum(np.array([1.0]), np.ones(2), 0.0)
    counts = RNG.poisson(1.0, (2, 10**6)).min(0)
    # Six standard errors.
    np.testing.assert_allclose(minimum, counts.mean(), atol=6 * counts.std() / 1e3)


@pytest.mark.parametrize("cycle", [(1.35, 1.0, 1.0, 1.0), (1.0, 0.3)])
def test_ever_finds_the_level_and_the_light_of_each_frame(
    rivals: ModuleType, cycle: tuple[float, ...]
):
    light = np.resize(cycle, 100)
    bkgds = np.broadcast_to(60 * light[:, None, None], (100, 24, 24))
    electrons = RNG.poisson(bkgds) + 1.5 * RNG.standard_normal(bkgds.shape)
    camera = jaxbkgd.Camera(100.0, 0.5, 1.5)
    found = dict(rivals.with_ever(electrons / 0.5 + 100.0, camera))
    errors = 0.5 * found["± 8 px"] - bkgds
    # A minimum of 100 frames scatters by 3 e-, and means of it over 81 to 289 px by 0.3 e-;
    # a frame's light, of 576 px, by 0.4 e-.
    assert np.sqrt(np.mean(errors**2)) < 0.8


def test_wavelets_leave_nothing_of_a_checkerboard(rivals: ModuleType):
    y, x = np.mgrid[:32, :32]
    frames = (50 + (-1.0) ** (y + x)).astype(np.float32)[None]
    for estimate in (rivals.with_iterated_wavelets, rivals.with_wbns):
        for setting, bkgds in estimate(frames):
            np.testing.assert_allclose(bkgds, 50, rtol=1e-5, err_msg=setting)


def test_basic_finds_baselines_and_image_below_outliers(rivals: ModuleType):
    waves = np.cos(np.pi * (np.arange(32) + 0.5) / 32)
    image = 1 + 0.3 * waves[:, None] + 0.2 * waves
    baselines = np.linspace(80, 40, 60)
    bkgds = baselines[:, None, None] * image
    frames = bkgds + RNG.standard_normal(bkgds.shape)
    frames += 100 * (RNG.random(bkgds.shape) < 0.05)
    names = [
        f"softness {softness:g}, shrinkage {shrinkage:g}"
        for softness, shrinkage in product(rivals.SOFTNESSES, rivals.SHRINKAGES)
    ]
    found = dict(rivals.with_basic(np.float32(frames)))
    assert list(found) == names
    for name, estimated in found.items():
        # The noise of a mean of 60 frames is 0.13; outliers of 100 would add 5 to it.
        assert np.sqrt(np.mean((estimated - bkgds) ** 2)) < 0.4, name

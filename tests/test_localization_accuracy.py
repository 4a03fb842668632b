"""The example in nanometres and photons: its fit attains the bound, its bound is that of
autodiff, and it fits the molecules that it says. Backgrounds are stand-ins."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quickly_compiled")]

EXAMPLES = Path(__file__).parents[1] / "examples"
# y, x, photons, z, and the free background.
PARAMETERS = [3.2, 2.7, 3000.0, -150.0, 60.0]
KINDS = {
    "2D": ([0, 1, 2], {}),
    "3D": ([0, 1, 2, 3], {"is_astigmatic": True}),
    "free": ([0, 1, 2, 4], {"has_free_bkgd": True}),
}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("localization_accuracy")


@pytest.fixture(scope="module")
def fitting(example: ModuleType) -> ModuleType:
    """Of the same folder, and so of the same scenes."""
    return importlib.import_module("gaussian_fit")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, fitting: ModuleType) -> tuple[Any, Any]:
    """A fit, and its true parameters."""
    columns, options = KINDS[request.param]
    return fitting.Fit(**options), jnp.array(PARAMETERS)[jnp.array(columns)]


def uneven_box() -> np.ndarray:
    y, x = np.mgrid[:7, :7]
    return (60 + 2.0 * y - x).astype(np.float32)


def test_the_information_is_the_curvature_where_frames_are_as_expected(
    kind: tuple[Any, Any],
):
    fit, true = kind
    box = fit.expected(true, uneven_box())
    # Of half of the deviance, of frames without noise: Fisher's information, exactly.
    curvature = jax.jit(jax.hessian(fit.deviance))(true, uneven_box(), box) / 2
    # Without a free background, what is expected of the background is the background.
    information = jax.jit(fit.information)(true, uneven_box())
    scale = np.sqrt(np.outer(jnp.diagonal(information), jnp.diagonal(information)))
    # Of second derivatives in float32.
    np.testing.assert_allclose(curvature / scale, information / scale, atol=2e-4)


def test_a_fit_with_the_true_background_attains_the_bound(kind: tuple[Any, Any]):
    fit, true = kind
    count, rng = 3000, np.random.default_rng(0)
    bkgd = uneven_box()
    if fit.has_free_bkgd:
        bkgd = np.full_like(bkgd, 60)
    expected = np.asarray(fit.expected(true, bkgd))
    boxes = rng.poisson(expected, (count, 7, 7))
    boxes = boxes + fit.read_noise * rng.standard_normal(boxes.shape)
    start, bkgds = np.tile(true, (count, 1)), np.tile(bkgd, (count, 1, 1))
    found = fit.fitted(start, bkgds, boxes.astype(np.float32))
    ratios = (found - start) / fit.bounds(start[:1], bkgds[:1])
    # Four standard errors. The fit's own bias and excess are of order 1 / photons.
    assert np.abs(ratios.mean(0)).max() < 4 / np.sqrt(count) + 0.02
    np.testing.assert_allclose(ratios.std(0), 1, atol=4 / np.sqrt(2 * count))


def test_a_background_that_is_too_high_takes_photons_and_moves_nothing(
    fitting: ModuleType,
):
    fit, true = fitting.Fit(), jnp.array([3.0, 3.0, 700.0])
    bkgd = np.full((1, 7, 7), 60, np.float32)
    box = fit.expected(true, bkgd[0])[None]
    found = fit.fitted(true[None], bkgd + 0.1, box)[0]
    # By linear theory: 0.1 photons over the matched area of some 4 pi sigma^2 = 21 px.
    assert found[2] - true[2] == pytest.approx(-2.1, rel=0.2)
    # Some roundings of float32.
    np.testing.assert_allclose(found[:2], true[:2], atol=1e-4)


def test_scenes_in_depth_have_the_images_that_are_fitted(fitting: ModuleType):
    scenes = importlib.import_module("scenes")
    y_pix, x_pix, z_nm, photons = jnp.array([[9.2], [10.7], [-250.0], [500.0]])
    image = scenes.astigmatic_image(
        y_pix, x_pix, z_nm, photons, height_pix=24, width_pix=20
    )
    # The box begins at row 6 and column 8.
    parameters = jnp.array([3.2, 2.7, 500.0, -250.0])
    fit = fitting.Fit(is_astigmatic=True)
    box = fit.expected(parameters, jnp.zeros((7, 7)))
    np.testing.assert_allclose(image[6:13, 8:15], box, atol=1e-4)
    # Wider along x below the focus.
    profiles = box.sum(1), box.sum(0)
    assert profiles[0].max() > 1.2 * profiles[1].max()


@pytest.fixture(scope="module")
def scene_and_movie(example: ModuleType) -> tuple[Any, Any]:
    # Many of them are on for all of a frame.
    scene = replace(example.SCENES_2D[0], molecules_per_frame=120.0, on_time_frames=4.0)
    return scene, example.simulated(scene, size_pix=64, frame_count=60)[0]


@pytest.mark.long
def test_spots_are_bright_alone_and_far_from_the_border(
    example: ModuleType, scene_and_movie: tuple[Any, Any]
):
    scene, movie = scene_and_movie
    spots = example.spots_of(movie.molecules, scene, 64)
    assert len(spots.frame) > 30
    assert spots.parameters[:, 2].min() >= 0.8 * 700
    y_pix, x_pix = spots.parameters[:, 0] + spots.y, spots.parameters[:, 1] + spots.x
    assert np.abs(spots.parameters[:, :2] - 3).max() <= 0.5
    assert min(y_pix.min(), x_pix.min()) > 10
    assert max(y_pix.max(), x_pix.max()) < 53
    for frame, y, x in zip(spots.frame, y_pix, x_pix, strict=True):
        others_y, others_x = movie.molecules.y_pix[frame], movie.molecules.x_pix[frame]
        is_near = (np.abs(others_y - y) < 10) & (np.abs(others_x - x) < 10)
        assert (is_near & (movie.molecules.photons[frame] > 0)).sum() == 1
    # Their boxes have their light: 49 px of 60 e- scatter by 60 e- in all.
    bkgds = np.broadcast_to(movie.bkgds_adu, movie.frames.shape)
    light = 0.46 * (spots.boxes(movie.frames) - spots.boxes(bkgds)).sum((1, 2))
    shares = light / spots.parameters[:, 2]
    # Of a Gaussian of 1.3 px, 98 % lie in the box.
    assert shares.mean() == pytest.approx(0.98, abs=4 * 0.1 / np.sqrt(len(shares)))


@pytest.fixture
def stand_ins(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the movie in the place of all backgrounds."""

    def of_mean(frames, camera=None):
        level = np.float32(frames).mean() - (0 if camera is None else camera.offset_adu)
        yield "the mean", np.full(frames.shape, level, np.float32)

    estimators = [
        example.Estimator(example.LEARNED, "numpy", of_mean, "ok", knows_cameras=True),
        example.Estimator(example.MEDIAN, "numpy", of_mean, "sk"),
        example.Estimator("not shown", "numpy", of_mean, "sk"),
    ]
    monkeypatch.setattr(example, "installed", lambda: estimators)


@pytest.mark.long
@pytest.mark.usefixtures("stand_ins")
def test_the_example_writes_its_page_and_goes_on(
    example: ModuleType, tmp_path: Path, scene_and_movie: tuple[Any, Any]
):
    scene, _ = scene_and_movie
    flat = replace(scene, shape="uniform")
    in_depth = replace(flat, name="in depth", depth_nm=300.0, photons_per_frame=2000.0)
    size = {"size_pix": 64, "frame_count": 60, "movie_count": 2}
    found = example.show_accuracy([flat], tmp_path, **size)
    assert [result.bkgd for result in found] == [
        *(example.TRUE, example.LEARNED, example.MEDIAN, example.FREE)
    ]
    truth, mean, median, free = found
    assert truth.bkgd_electrons == 0
    assert truth.molecules == mean.molecules > 60
    # The mean has the light of all molecules in it, and takes it from some 21 px of each.
    assert mean.bkgd_electrons == pytest.approx(median.bkgd_electrons, rel=0.01)
    taken = 100 * 21 * mean.bkgd_electrons / 670
    assert truth.photons.bias - mean.photons.bias == pytest.approx(taken, rel=0.25)
    # The errors of some 100 molecules, which are those of one standard deviation.
    for error in (truth.position, truth.photons, free.position):
        assert error.of_bound == pytest.approx(1, abs=5 * error.of_bound_std)
        assert 0 < error.of_bound_std < 0.1
    assert truth.position.of_true == 1
    assert truth.height is None
    text = (tmp_path / "localization_accuracy.md").read_text()
    assert "2 movies of 60 frames of 64 x 64 px" in text
    assert "| ordinary | a free constant |  |" in text
    picture = tmp_path / "figures" / "localization_accuracy.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # What is measured is read again, and only the new scene is made.
    again = example.show_accuracy([flat, in_depth], tmp_path, **size)
    assert [r.position for r in again[:4]] == [r.position for r in found]
    assert again[4].height.of_bound == pytest.approx(1, abs=0.3)
    with pytest.raises(SystemExit, match="of 2 movies of 60 frames"):
        example.show_accuracy([flat], tmp_path, **size | {"movie_count": 1})

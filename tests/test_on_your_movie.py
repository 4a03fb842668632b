"""The page of a user's movie says what is so of a simulated one, and one line of a movie of
which nothing can be learned; and errors beside the truth of others are what they are."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import jaxbkgd


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quickly_compiled")]

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def imported() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


@pytest.fixture(scope="module")
def example(imported: Callable[[str], ModuleType]) -> ModuleType:
    return imported("on_your_movie")


@pytest.fixture(scope="module")
def movie() -> np.ndarray:
    """That of calibration.md."""
    frames, _ = jaxbkgd.simulate_movie(
        jax.random.key(0),
        frame_count=40,
        height_pix=64,
        width_pix=64,
        molecules_per_frame=5.0,
        bkgd_length_scale_pix=8.0,
    )
    return np.asarray(frames)


@pytest.mark.long
def test_the_page_has_what_is_found_and_what_each_background_costs(
    example: ModuleType, movie: np.ndarray, tmp_path: Path
):
    np.save(tmp_path / "movie.npy", movie)
    camera = ["--offset", "100", "--gain", "0.46"]
    path = example.main([str(tmp_path / "movie.npy"), str(tmp_path), *camera])
    text = path.read_text()
    assert text.startswith("# movie.npy\n\nNumPy file; frames: 40, channels: 1, 64 x 64 px")
    rows = {
        cells[1].strip(): [float(cell.split()[0].rstrip("%")) for cell in cells[4:7]]
        for line in text.splitlines()
        if len(cells := line.split("|")) == 8 and cells[5].strip().endswith("%")
    }
    assert len(rows) == 4
    assert rows[example.CALIBRATED][1] > 98
    # A plain mean takes a fifth or more of a molecule's light.
    assert rows["SpatialMean(7)"][1] < 85
    assert f"| {example.CALIBRATED} |" in text
    assert "**error**" in text
    picture = path.with_name("movie.npy-on-your-movie-1.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in text


@pytest.mark.long
def test_hidden_pixels_measure_the_error_of_a_background(example: ModuleType):
    """Of photons alone, with backgrounds whose errors are known."""
    rng = np.random.default_rng(0)
    frames = rng.poisson(50, (60, 48, 48)).astype(np.float32)

    class Level(jaxbkgd.AbstractEstimator):
        adu: float

        @property
        def halo_frames(self):
            return 0

        def estimate_stack(self, frames):
            return jaxbkgd.Background(0 * frames + self.adu, 1.0)

    estimators = {"true": Level(50.0), "too high": Level(52.0)}
    true, high = example.scores(frames, estimators, 500.0, 1.0, 1.3)
    # The noise of some 1000 pixels, to four standard errors.
    assert true.hidden == pytest.approx(50**0.5, rel=4 / 2000**0.5)
    assert true.above_best == 0
    assert high.mean == pytest.approx(true.mean - 2)
    # To four standard errors of the mean of 1000, which is 0.22.
    assert high.above_best == pytest.approx(2, abs=1)
    for score in (true, high):
        assert score.kept == pytest.approx(1, abs=1e-4)


def test_hidden_pixels_have_the_mean_of_their_neighbours(example: ModuleType):
    frames = np.random.default_rng(0).random((5, 40, 40), np.float32)
    hidden, is_hidden = example.hide_pixels(frames)
    assert 0.005 < is_hidden.mean() < 0.015
    np.testing.assert_array_equal(hidden[~is_hidden], frames[~is_hidden])
    t, y, x = np.argwhere(is_hidden)[7]
    around = [frames[t, y + i, x + j] for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    assert hidden[t, y, x] == pytest.approx(np.mean(around))


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "says"),
    [((5, 20, 24), "the movie has 5 frames"), ((40, 8, 9), "frames of 8 x 9 px have no")],
)
def test_a_movie_that_is_too_small_gets_one_line_and_a_picture(
    example: ModuleType, tmp_path: Path, shape: tuple[int, int, int], says: str
):
    frames = np.random.default_rng(0).poisson(60, shape).astype(np.uint16)
    np.save(tmp_path / "small.npy", frames)
    text = example.main([str(tmp_path / "small.npy"), str(tmp_path)]).read_text()
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 4
    assert lines[2].startswith(f"**{says}")
    assert (tmp_path / "small.npy-on-your-movie-1.png").exists()


def test_what_is_no_movie_ends_with_one_line(example: ModuleType, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"missing\.tif: no such file"):
        example.main([str(tmp_path / "missing.tif"), str(tmp_path)])


def test_errors_beside_the_truth_of_another_simulator(
    imported: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example = imported("other_simulators")
    frames = np.full((6, 16, 16), 110, np.uint16)
    np.savez(
        tmp_path / "flat.npz",
        frames=frames,
        bkgds=np.full((16, 16), 108, np.float32),
        offset_adu=100.0,
        gain_electrons_per_adu=0.5,
        read_noise_electrons=1.0,
    )

    def as_it_is(frames, camera):
        yield "as it is", frames.astype(np.float32) - camera.offset_adu

    given = imported("rivals").Estimator(
        example.LEARNED, "numpy", as_it_is, "ok", knows_cameras=True
    )
    monkeypatch.setattr(example, "installed", lambda: [given])
    (result,) = example.main(tmp_path)
    # 2 ADU too many, of 4 e-.
    assert result.rms_electrons == pytest.approx(1)
    assert result.bias_percent == pytest.approx(25)
    text = (tmp_path / "other_simulators.md").read_text()
    assert "| flat | 1.00 (+25.0 %) |" in text
    assert (tmp_path / "other_simulators.png").exists()


def test_movies_of_picasso_have_the_background_that_is_written_beside_them(
    imported: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    # Picasso is large, and no part of what the tests install.
    pytest.importorskip("picasso")
    example = imported("simulator_movies")
    monkeypatch.setattr(example, "FRAME_COUNT", 40)
    movie = example.picasso_paint()
    assert movie["frames"].shape == (40, 128, 128)
    above = movie["frames"].mean(0) - movie["bkgds"]
    # Most of the field has outskirts of the 400 sites alone, and 0.2 e- of noise.
    assert np.median(above) == pytest.approx(0.4, abs=0.6)
    # A site is on for a twentieth of the time, with 65 photons in its middle.
    assert above.max() > 10

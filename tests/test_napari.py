"""The napari plugin: movies are layers, a window calibrates them, and its images follow the
sliders."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tifffile
import yaml
from typer.testing import CliRunner

from jaxbkgd import Camera, LocalMean, open_movie, simulate_movie, SpatialMean
from jaxbkgd._calibration import best as _best
from jaxbkgd._cli import view as _view
from jaxbkgd._cli.app import app
from jaxbkgd._movies import open as _open
from jaxbkgd._napari import session as _session
from jaxbkgd._napari.reader import channel_of, contrast_limits, layers_of, reader_of
from jaxbkgd._napari.session import Session, Settings
from jaxbkgd._workers import Job, on_threads, progress_bar


CAMERA = Camera(100.0, 0.46)
MANIFEST = Path(_session.__file__).with_name("napari.yaml")


@pytest.fixture(scope="module")
def simulated() -> tuple[np.ndarray, np.ndarray]:
    """A movie, and its true background in ADU above the offset."""
    frames, truth = simulate_movie(
        jax.random.key(0),
        frame_count=40,
        height_pix=48,
        width_pix=56,
        molecules_per_frame=4,
    )
    return np.asarray(frames), np.asarray(truth.bkgds_adu)


@pytest.fixture
def session(simulated: tuple[np.ndarray, np.ndarray]) -> Session:
    return Session(open_movie(simulated[0]).channels[0], CAMERA)


def _wait_for(is_done: Callable[[], bool]) -> None:
    # A program is compiled on a machine that does other work, too.
    end = time.monotonic() + 240
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_manifest_has_every_suffix_that_is_read():
    contributions = yaml.safe_load(MANIFEST.read_text())["contributions"]
    (reader,) = contributions["readers"]
    suffixes = {*_open._TIFF, *_open._ALONE, *_open._EXTRAS, ".zarr", ".lsm"}
    assert sorted(f"*{suffix}" for suffix in suffixes) == sorted(
        reader["filename_patterns"]
    )


def test_channels_are_layers_whose_frames_are_read_when_they_are_shown(tmp_path):
    frames = np.arange(6 * 2 * 5 * 7, dtype=np.uint16).reshape(6, 2, 5, 7)
    path = tmp_path / "movie.ome.tif"
    size = {"PhysicalSizeX": 0.1, "PhysicalSizeY": 0.2, "axes": "TCYX"}
    tifffile.imwrite(path, frames, metadata=size)
    read = reader_of(str(path))
    assert read is not None
    for number, (data, options, kind) in enumerate(read(str(path))):
        assert kind == "image"
        assert options["name"] == f"movie.ome.tif [{number + 1}]"
        assert options["scale"] == pytest.approx((1, 0.2, 0.1))
        assert data.shape == (6, 5, 7)
        # As napari slices what it shows.
        for index in ((3, slice(None), slice(None)), (slice(1, 4), 2), (5, 4, 6), (-1,)):
            np.testing.assert_array_equal(data[index], frames[:, number][index])
        assert channel_of(data) is data
    assert reader_of([str(path), str(path)]) is None
    np.testing.assert_array_equal(channel_of(frames[:, 0])[2], frames[2, 0])
    # One movie in a list.
    (_, *_), (second, *_) = layers_of([str(path)])
    assert Session(second).path_beside("snr") == tmp_path / "movie-snr-2.tif"


def test_contrast_limits_are_those_of_what_is_finite():
    image = np.linspace(0, 100, 1001)
    image[500] = np.nan
    assert contrast_limits(image) == pytest.approx((0.5, 99.9), abs=0.1)
    low, high = contrast_limits(np.full(3, 7.0))
    assert low == 7.0 < high
    assert contrast_limits(np.full(3, np.nan)) == (0.0, 1.0)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_images_follow_the_sliders_by_one_compiled_program(session, simulated, monkeypatch):
    traced = []

    def counted(frames: Any) -> Any:
        traced.append(np.shape(frames))
        return as_frames(frames)

    as_frames = _session.as_frames
    monkeypatch.setattr(_session, "as_frames", counted)
    frames, truth = simulated
    found = {}
    for settings, frame in (
        (Settings(), 20),
        (Settings(5.0, 6.0, 12.0, 4.0), 0),
        (Settings(9.0, 9.0, 20.0, 2.5), 39),
        (Settings(3.0, 3.0, 2.0, 3.0), 11),
    ):
        session.settings = settings
        images = session.live_images(frame)
        assert list(images) == ["background", "residual", "snr"]
        found[settings] = images["background"]
        light = frames[frame] - 100.0
        # In float32, of a few hundred ADU.
        np.testing.assert_allclose(
            images["residual"], light - images["background"], atol=1e-3
        )
        error = np.sqrt(np.mean((images["background"] - truth[frame]) ** 2))
        # Seven frames have an error of about 3 ADU in a background of 130.
        assert error < 8.0
        # Molecules are few, and noise is even about zero.
        assert abs(np.median(images["snr"])) < 0.2
    assert len(traced) == 1
    assert np.ptp(found[Settings()]) < np.ptp(found[Settings(3.0, 3.0, 2.0, 3.0)])


@pytest.mark.long
def test_every_frame_is_estimated_from_frames_of_the_movie(session):
    for radius_frames in (1.0, 8.0, 13.0, 60.0, 120.0):
        session.settings = Settings(radius_frames=radius_frames)
        for frame in range(0, 40, 3):
            images = session.live_images(frame)
            sums = images["residual"] + images["background"]
            light = session.channel[frame] - 100.0
            np.testing.assert_allclose(sums, light, atol=1e-3)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_without_time_and_clip_it_is_the_mean_over_the_frame(session, simulated):
    session.settings = Settings(5.0, 6.0, 0.0, 0.0)
    assert isinstance(session.estimator(), SpatialMean)
    expected = SpatialMean((5.0, 6.0))(simulated[0][17] - np.float32(100)).bkgds
    # Bounds of radii add taps of nearly nothing.
    live = session.live_images(17)["background"]
    np.testing.assert_allclose(live, expected, rtol=1e-4)
    np.testing.assert_allclose(session.lazy("background")[17], expected, rtol=1e-6)
    session.camera = Camera(100.0)
    assert list(session.live_images(17)) == ["background", "residual"]


@pytest.mark.parametrize(
    "estimator", [LocalMean((4.123, 5.0), 12.345), LocalMean(3.0, 0), SpatialMean(6.0)]
)
def test_settings_are_those_of_an_estimator(estimator):
    settings = Settings.of_estimator(estimator)
    assert Settings.of_estimator(settings.estimator()) == settings
    assert type(settings.estimator()) is type(estimator)


def test_work_says_how_far_it_is_and_ends_when_it_is_cancelled():
    has_reported = []

    def work() -> None:
        with progress_bar(10, False) as report:
            for number, _ in enumerate(
                on_threads(lambda _: time.sleep(0.01), range(10**4), 1)
            ):
                report(min(number, 9), "at it")
                has_reported.append(number)

    job = Job(work)
    _wait_for(lambda: len(has_reported) > 3)
    assert not job.is_done
    assert job.total == 10
    assert "at it" in job.text
    job.cancel()
    _wait_for(lambda: job.is_done)
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert Job(lambda: 7).result() == 7
    with pytest.raises(ValueError, match="no"):
        Job(lambda: int("no")).result()


class _Impatient(Job):
    """Cancels work once some of it is done."""

    def check(self) -> None:
        self.is_cancelled = self.done > 0
        super().check()


@pytest.mark.long
def test_a_cancelled_calibration_leaves_what_was(session, monkeypatch):
    # The search itself would go on to compile in its thread.
    may_end = threading.Event()
    monkeypatch.setattr(_best, "_search", lambda *_: may_end.wait(60))
    session.settings = before = Settings(4.0, 4.0, 9.0, 3.0)
    job = Job(session.calibrate)
    job.cancel()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    may_end.set()
    assert (session.settings, session.calibrated) == (before, None)


@pytest.mark.slow
def test_a_cancelled_movie_keeps_what_is_done_and_goes_on(tmp_path):
    # Nine chunks of a megapixel.
    frames = np.random.default_rng(0).poisson(300, (2100, 64, 64)).astype(np.uint16)
    session = Session(open_movie(frames).channels[0], CAMERA)
    session.settings = Settings(5.0, 5.0, 0.0, 0.0)
    path = tmp_path / "bkgd.tif"
    with pytest.raises(KeyboardInterrupt):
        _Impatient(lambda: session.save(path)).result()
    assert not path.exists()
    assert path.with_name("bkgd.tif.part").exists()
    summary = session.save(path)
    assert 0 < summary.resumed_frames < 2100
    written = tifffile.imread(path)
    np.testing.assert_array_equal(written[650], session.lazy("background")[650])


@pytest.mark.parametrize(
    ("stderr", "viewers", "message"),
    [
        ("", [], "neither napari nor ndv is installed; install napari with: pip install"),
        (
            "qtpy.QtBindingsNotFoundError: No Qt",
            ["ndv"],
            "ndv needs Qt, which is not installed",
        ),
        ("could not connect to display", ["napari"], "Qt finds no screen to open a window"),
    ],
)
def test_a_viewer_that_cannot_be_opened_is_one_line(
    stderr, viewers, message, tmp_path, monkeypatch
):
    np.save(tmp_path / "movie.npy", np.zeros((3, 4, 4), np.uint16))
    ended = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(_view.subprocess, "run", lambda *_, **__: ended)
    monkeypatch.setattr(_view.importlib.util, "find_spec", lambda name: name in viewers)
    result = CliRunner().invoke(app, ["view", str(tmp_path / "movie.npy")])
    assert result.exit_code == 2
    assert f"jaxbkgd: view: {message}" in result.stderr
    assert result.stderr.count("\n") == 1


# napari and Qt are large, and no part of what the tests install. Where they are installed,
# this shows that the window does what the session can; it needs no screen.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_window_calibrates_shows_and_writes(simulated, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "QT_QPA_PLATFORM", "offscreen")
    components: Any = pytest.importorskip("napari.components")
    qt: Any = pytest.importorskip("qtpy.QtWidgets")
    from jaxbkgd._napari.widget import BackgroundWidget

    application = qt.QApplication.instance() or qt.QApplication([])

    def wait_for(is_done: Callable[[], bool]) -> None:
        def has_worked() -> bool:
            application.processEvents()
            return is_done()

        _wait_for(has_worked)

    np.save(tmp_path / "movie.npy", simulated[0])
    # The viewer without its canvas, which needs OpenGL.
    viewer: Any = components.ViewerModel()
    window: Any = BackgroundWidget(viewer)
    assert not window["calibrate"].enabled
    for data, options, _ in layers_of(str(tmp_path / "movie.npy")):
        viewer.add_image(data, **options)
    window["offset"].value, window["gain"].value = 100, 0.46
    window["show"].changed.emit(True)
    wait_for(lambda: len(viewer.layers) == 4)
    background, snr = viewer.layers["background of this frame"], viewer.layers[-1]
    assert window["movie"].value is viewer.layers["movie.npy"]
    for change in (
        lambda: setattr(window["radius_y_pix"], "value", 3.0),
        lambda: setattr(window["radius_frames"], "value", 12.0),
        lambda: setattr(window["clip"], "value", 5.0),
        lambda: viewer.dims.set_current_step(0, 7),
    ):
        images = background.data, snr.data
        change()
        wait_for(
            lambda old=images: background.data is not old[0] and snr.data is not old[1]
        )
    settings = window.session.settings
    assert settings == Settings(3.0, 7.0, 12.0, 5.0)

    def is_idle() -> bool:
        return window["calibrate"].enabled

    window["calibrate"].changed.emit(True)
    window["cancel"].changed.emit(True)
    wait_for(is_idle)
    assert (window.session.settings, window.session.calibrated) == (settings, None)
    window["calibrate"].changed.emit(True)
    wait_for(is_idle)
    assert window.session.settings != settings
    assert window["radius_y_pix"].value == window.session.settings.radius_y_pix
    window["add"].changed.emit(True)
    wait_for(is_idle)
    window["save"].changed.emit(True)
    wait_for(is_idle)
    written = tifffile.imread(tmp_path / "movie-background.tif")
    added = viewer.layers["background of movie.npy"].data
    np.testing.assert_array_equal(np.asarray(added), written)
    window.native.close()

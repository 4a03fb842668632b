"""The command line does a movie from disk, and says in one line what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import quick_compilation, reference_mean
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner, Result

from jaxbkgd import (
    _movies,
    _workers,
    Channel,
    estimate_movie,
    FramePairLoss,
    LocalMean,
    MovieError,
    noise_correction,
    open_movie,
    SpatialMean,
)
from jaxbkgd._batch.results import Results
from jaxbkgd._calibration import calibrate as _calibrate
from jaxbkgd._calibration.descent import Problem
from jaxbkgd._cli import (
    arguments,
    calibrate as _cli_calibrate,
    camera as _camera,
    demo as _demo,
    estimate as _estimate,
    kept as _kept,
    programs as _programs,
)
from jaxbkgd._cli.app import app
from jaxbkgd._cli.kept import lock_output
from jaxbkgd._cli.report import UsageError, write_whole


CALIBRATED = "estimate movie.npy --out bkgd.tif"
ESTIMATE = f"{CALIBRATED} --radius 7"


@pytest.fixture(autouse=True, scope="module")
def no_lines() -> Iterator[None]:
    """No lines about progress, however slow the machine is."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(_workers, "_LINE_SECONDS", 3600.0)
        yield


@pytest.fixture(autouse=True)
def pools(monkeypatch) -> list[str]:
    """Notes what would set JAX up for the rest of this process."""
    noted = []
    for module in (_estimate, _demo):
        monkeypatch.setattr(module, "one_thread_a_call", lambda: noted.append("one"))
    return noted


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _frames(count: int = 10, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(2).integers(0, 200, (count, 21, 34)).astype(dtype)


def _write(path: str | Path, frames: np.ndarray, **options: Any) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", **options)


def _assert_is_background_of(
    bkgds: np.ndarray, frames: np.ndarray, radii_pix: tuple[float, float]
) -> None:
    assert bkgds.dtype == np.float32
    # The project's parity: 2e-6 of the largest input, some ten float32 roundings.
    tolerance = 2e-6 * np.abs(frames).max()
    expected = reference_mean(frames, radii_pix, "smooth")
    np.testing.assert_allclose(bkgds, expected, 0, tolerance)


def _estimated(frames: np.ndarray, estimator: LocalMean, **options: Any) -> np.ndarray:
    """In chunks of 4 frames, by the program that a command with these has compiled."""
    bkgds = np.empty(frames.shape, np.float32)
    options = {"chunk_frames": 4, "progress": False} | options
    estimate_movie(frames, estimator, bkgds, **options)
    return bkgds


def _run(command: str, *more: str) -> Result:
    return CliRunner().invoke(app, [*command.split(), *more])


def _done(command: str, *more: str) -> Result:
    result = _run(command, *more)
    assert result.exit_code == 0, result.output
    return result


def _rows(text: str) -> dict[str, str]:
    """Lines of a name, some blanks, and a value."""
    pairs = (re.split("  +", line, maxsplit=1) for line in text.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _read(path: str, channel: int = 0) -> np.ndarray:
    with open_movie(path) as movie:
        return movie.channels[channel][:]


@pytest.mark.slow
def test_a_movie_gets_its_background(folder):
    frames, radii_pix = _frames(), (5, 8)
    np.save("movie.npy", frames)
    command = f"{CALIBRATED} --chunk-frames 2 --workers 2"
    result = _done(command, "--radius", " 5 , 8 ")
    _assert_is_background_of(_read("bkgd.tif"), frames, radii_pix)
    assert result.stderr == ""
    rows = _rows(result.stdout)
    assert result.stdout.startswith("wrote bkgd.tif\n")
    assert rows["frames"] == "10 of 21 x 34 px"
    assert rows["written"] == "background, float32, the camera's offset included"
    assert rows["radius"] == "5 px in y, 8 px in x"
    factor = noise_correction(tuple(map(float, radii_pix)), truncation="smooth")
    assert rows["noise factor"] == f"{factor:.4f}"
    assert re.fullmatch(r"[0-9.]+ s, [0-9.]+ Mpx/s", rows["time"])
    assert not {"resumed", "not finite"} & rows.keys()


@pytest.mark.long
def test_a_movie_gets_its_mean_over_time(folder):
    frames = _frames()
    np.save("movie.npy", frames)
    mask = np.ones((21, 34), np.uint8)
    mask[3, 4] = 0
    np.save("mask.npy", mask)
    estimator = LocalMean((3.0, 4.0), 1.0, clip=None)
    command = "--radius 3,4 --radius-frames 1 --clip none --mask mask.npy --chunk-frames 4"
    rows = _rows(_done(f"{CALIBRATED} {command}").stdout)
    assert (rows["radius"], rows["clip"]) == ("3 px in y, 4 px in x, 1 frames", "none")
    expected = _estimated(frames, estimator, weights=mask)
    np.testing.assert_array_equal(_read("bkgd.tif"), expected)
    Path("c.json").write_text(estimator.to_json())
    _write("mask.tif", mask)
    _done(f"{CALIBRATED} --overwrite --calibration c.json --mask mask.tif --chunk-frames 4")
    np.testing.assert_array_equal(_read("bkgd.tif"), expected)


def test_a_channel_of_a_mean_over_time_has_its_radii(folder):
    module = LocalMean([(3.0, 3.0), (4.0, 5.0)], [1.0, 2.0], frozen=[True, False])
    Path("c.json").write_text(module.to_json())
    chosen = arguments.read_calibration(Path("c.json"), 2, 1)
    assert isinstance(chosen, LocalMean)
    np.testing.assert_allclose(chosen.radii, [(2.0, 4.0, 5.0)], rtol=1e-6)
    assert chosen.frozen == ((False, False, False),)


@pytest.mark.slow
def test_the_suffix_is_the_format(folder):
    frames, movie, out = _frames(), "movie.ome.tif", "bkgd.zarr"
    tifffile.imwrite(movie, frames, ome=True, metadata={"axes": "TYX"})
    assert _done(f"estimate {movie} --out {out} --radius 7").stderr == ""
    _assert_is_background_of(_read(out), frames, (7, 7))
    for path, dtype in ((movie, "uint16"), (out, "float32")):
        rows = _rows(_done(f"info {path}").stdout)
        assert (rows["movie"], rows["frames"]) == (path, "10 of 21 x 34 px")
        assert (rows["channels"], rows["pixels"]) == ("1", dtype)


def test_what_a_file_says_of_itself_is_told(folder):
    options: Any = {"metadata": {"axes": "TCYX", "unit": "um", "finterval": 0.05}}
    frames = _frames().reshape(5, 2, 21, 34)
    tifffile.imwrite("two.tif", frames, imagej=True, resolution=(10, 8), **options)
    np.save("movie.npy", _frames())
    result = _done("info two.tif movie.npy")
    two, movie = result.stdout.split("\n\n")
    assert _rows(two) == {
        "movie": "two.tif",
        "format": "ImageJ TIFF",
        "frames": "5 of 21 x 34 px",
        "channels": "2",
        "pixels": "uint16",
        "pixel size": "0.125 um in y, 0.1 um in x",
        "frame interval": "0.05 s",
    }
    assert _rows(movie)["pixel size"] == _rows(movie)["frame interval"] == "unknown"
    _assert_one_line(_run("info none.tif"), "none.tif: no such file")


class TestSeveralChannels:
    """Of different sizes, with radii of their own."""

    @pytest.mark.slow
    def test_a_file_for_each_gives_a_file_for_each(self, folder):
        movies = _frames(), _frames()[:, :15]
        for name, frames in zip("ab", movies, strict=True):
            np.save(name, frames)
        result = _done("estimate a.npy b.npy --out bkgd.ome.tif --radius 7 --radius 5,8")
        for number, frames, radii in zip((1, 2), movies, [(7, 7), (5, 8)], strict=True):
            bkgds = _read(f"bkgd-{number}.ome.tif")
            _assert_is_background_of(bkgds, frames, radii)
            assert f"wrote bkgd-{number}.ome.tif\n" in result.stdout
        rows = _rows(result.stdout)
        assert rows["frames"] == "10 of 21 x 34 px; 15 x 34 px"
        assert rows["radius"] == "7 px; 5 px in y, 8 px in x"
        assert len(rows["noise factor"].split("; ")) == 2

    @pytest.mark.slow
    def test_one_file_gives_one_file(self, folder):
        frames = _frames().reshape(5, 2, 21, 34)
        np.save("movie.npy", frames)
        _done(f"{ESTIMATE} --radius 5,8")
        assert {path.name for path in folder.iterdir()} == {"movie.npy", "bkgd.tif"}
        for channel, radii in enumerate([(7, 7), (5, 8)]):
            _assert_is_background_of(_read("bkgd.tif", channel), frames[:, channel], radii)

    @pytest.mark.slow
    def test_boxes_of_a_camera_give_a_file_for_each(self, folder):
        frames = _frames()
        np.save("movie.npy", frames)
        _done(ESTIMATE, "--channels", "0,0,20,21;20,5,34,21")
        _assert_is_background_of(_read("bkgd-1.tif"), frames[:, :, :20], (7, 7))
        _assert_is_background_of(_read("bkgd-2.tif"), frames[:, 5:, 20:], (7, 7))
        _done(ESTIMATE, "--channels", "0,0,20,21")
        np.testing.assert_array_equal(_read("bkgd.tif"), _read("bkgd-1.tif"))

    @pytest.mark.parametrize(
        ("options", "pattern"),
        [
            ("movie.npy --radius 7 --radius 5", "given 2 times for 1 channels"),
            ("movie.npy two.npy", "two.npy: holds 2 channels.*by itself"),
            ("movie.npy short.npy", "10, 3 frames"),
            ("movie.npy --channels 0,0,20,x", "--channels 0,0,20,x: must be boxes"),
            ("movie.npy --channels 0,0,35,21", r"movie.npy: the box \(0, 0, 35, 21\)"),
            (
                "movie.npy movie.npy --channels 0,0,2,2",
                "--channels 0,0,2,2: boxes .* one movie",
            ),
            (
                "two.npy --offset 1 --offset 2 --offset 3",
                "--offset: is given 3 times for 2",
            ),
        ],
    )
    def test_what_does_not_fit_together_is_one_line(self, options, pattern, folder):
        np.save("movie.npy", _frames())
        np.save("short.npy", _frames(3))
        np.save("two.npy", _frames().reshape(5, 2, 21, 34))
        before = sorted(folder.iterdir())
        _assert_one_line(_run(f"estimate {options} --out bkgd.tif"), pattern)
        assert sorted(folder.iterdir()) == before


def _no_history(
    estimator: Any, stop_reason: str, is_converged: bool = False
) -> _calibrate.CalibrationHistory:
    """That of a calibration that stays where it begins."""
    axes = estimator.radii.shape
    return _calibrate.CalibrationHistory(
        losses=np.zeros(1),
        radii=np.asarray(estimator.radii)[None],
        radii_std=np.full(axes, np.nan),
        is_at_bound=np.zeros(axes, bool),
        is_converged=is_converged,
        stop_reason=stop_reason,
        objective=FramePairLoss(1),
    )


class TestTheOneCommand:
    """Calibrates, estimates and keeps what it has found."""

    # From its JSON, it comes back with another last digit.
    estimator = LocalMean((3.3, 4.7), 1.0, clip=None, max_radius_pix=17.3)

    @pytest.fixture
    def made(self, folder, monkeypatch) -> list[dict[str, Any]]:
        """Notes how calibrations were made, which take no time."""
        noted = []

        def calibrate(source, **options):
            noted.append(options)
            return self.estimator, _no_history(self.estimator, "settled", True)

        monkeypatch.setattr(_kept, "calibrate", calibrate)
        np.save("movie.npy", _frames())
        return noted

    @pytest.mark.long
    def test_a_movie_is_all_that_it_needs(self, folder, made):
        result = _done("estimate movie.npy --chunk-frames 4")
        kinds = [".json", ".png", ".tif"]
        names = [f"movie-background{kind}" for kind in kinds]
        assert sorted(path.name for path in folder.iterdir()) == [*names, "movie.npy"]
        restored = LocalMean.from_json(self.estimator.to_json())
        expected = _estimated(_frames(), restored)
        np.testing.assert_array_equal(_read(names[2]), expected)
        with Image.open(names[1]) as image:
            assert image.size[0] == 900
        assert made[0]["frames"] is None
        assert result.stderr == ""
        rows = _rows(result.stdout)
        assert rows["wrote"].endswith(f" s: {', '.join([names[2], *names[:2]])}")
        assert re.match("steady|flickers by .*%, ends at .*% of it.*", rows["light"])
        command = f"{CALIBRATED} --calibration {names[0]} --chunk-frames 4"
        assert _done(command).stderr == ""
        np.testing.assert_array_equal(_read("bkgd.tif"), expected)

    @pytest.mark.long
    @pytest.mark.parametrize("kind", ["tif", "json", "png"])
    def test_nothing_is_replaced_that_was_there(self, kind, made):
        path = Path(f"movie-background.{kind}")
        path.write_text("precious")
        _assert_one_line(_run("estimate movie.npy"), f"{path}: exists already.*--overwrite")
        assert (path.read_text(), made) == ("precious", [])
        _done("estimate movie.npy --overwrite --chunk-frames 4")
        assert path.read_bytes() != b"precious"

    @pytest.mark.slow
    def test_after_ctrl_c_it_goes_on_and_does_not_calibrate_again(self, made, monkeypatch):
        def interrupt(results, window, *arguments):
            if window.number == 1:
                _press_ctrl_c()
            return write(results, window, *arguments)

        write, command = Results.write, "estimate movie.npy --chunk-frames 4 --workers 1"
        with monkeypatch.context() as patches:
            patches.setattr(Results, "write", interrupt)
            kept = (
                "the finished part is kept in .*part; .*; the calibration is kept in .*json"
            )
            _assert_interrupted(_run(command), kept)
        # Another job has another calibration, masks of another content included.
        _assert_one_line(_run(f"{command} --offset 3"), "background.json: exists already")
        np.save("mask.npy", np.ones(_frames().shape[1:]))
        again = _run(f"{command} --mask mask.npy")
        _assert_one_line(again, "background.json: exists already")
        again = _run(f"{command} --offset 3 --overwrite")
        _assert_one_line(again, "background.json: was begun with other settings, .*--fresh")
        with lock_output(Path("movie-background.json")):
            _assert_one_line(
                _run(command), "background.json: is in use; wait for the other"
            )
        assert _rows(_done(command).stdout)["resumed"] == "4 frames were already done"
        assert len(made) == 1
        _done(f"{command} --overwrite")
        assert len(made) == 2

    @pytest.mark.long
    def test_channels_of_files_and_of_boxes_share_one_calibration(
        self, folder, made, monkeypatch
    ):
        # Which costs less compilation.
        monkeypatch.setattr(TestTheOneCommand, "estimator", SpatialMean(3.3))
        np.save("other.npy", _frames())
        _done("estimate movie.npy other.npy --quantity residual --gain 2 --offset 1")
        names = ["movie-residual.tif", "other-residual.tif", "movie-residual.json"]
        _done("estimate movie.npy --channels 0,0,17,21;17,0,34,21")
        names += [f"movie-background{end}" for end in ("-1.tif", "-2.tif", ".png")]
        assert {*names} <= {path.name for path in folder.iterdir()}
        assert [options["boxes"] for options in made] == [
            None,
            [(0, 0, 17, 21), (17, 0, 34, 21)],
        ]


@pytest.mark.slow
def test_residuals_of_some_frames_are_written_for_other_programs(folder):
    np.save("movie.npy", _frames())
    command = f"{ESTIMATE} --quantity residual --dtype uint16 --pedestal 300"
    rows = _rows(_done(f"{command} --frames 3:9 --every 4:2").stdout)
    assert rows["frames"] == "1 of 21 x 34 px"
    assert rows["written"] == "residual, uint16, with a pedestal of 300"
    frame = _frames()[6:7]
    expected = frame - reference_mean(frame, (7, 7), "smooth") + 300
    # Rounded to a number.
    np.testing.assert_allclose(_read("bkgd.tif"), expected, rtol=0, atol=0.51)


@pytest.mark.parametrize(
    ("frames", "every", "chosen"),
    [
        (None, None, None),
        ("1000:5000", None, slice(1000, 5000, 1)),
        ("7:", "4:1", slice(9, None, 4)),
        (None, "4:1", slice(1, None, 4)),
        (":90", "4", slice(0, 90, 4)),
        (None, "4:101", slice(101, None, 4)),
    ],
)
def test_frames_are_chosen_by_a_range_and_a_step(frames, every, chosen):
    assert arguments.parsed_frames(frames, every) == chosen


def test_programs_are_kept_where_the_user_keeps_caches(tmp_path, monkeypatch):
    settings, config = {}, SimpleNamespace(update=lambda *pair: settings.update([pair]))
    monkeypatch.setattr(_programs, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _programs.keep_programs()
    # That of these tests stays.
    assert settings == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    _programs.keep_programs()
    folder = Path(settings.pop("jax_compilation_cache_dir"))
    assert folder.parent == tmp_path / "cache" / "jaxbkgd"
    assert folder.is_dir()
    settings.clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _programs.keep_programs()
    assert settings == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dtype", "written"),
    [
        ("--quantity residual", "float32", "residual, float32"),
        (
            "--dtype uint16 --offset 5",
            "uint16",
            "background, uint16, above the offset of 5 ADU",
        ),
    ],
)
def test_what_is_written_is_told(options, dtype, written, folder):
    np.save("movie.npy", _frames())
    Path("bkgd.tif").write_text("old")
    rows = _rows(_done(f"{ESTIMATE} {options} --overwrite").stdout)
    assert rows["written"] == written
    assert _read("bkgd.tif").dtype == dtype


@pytest.mark.slow
def test_an_snr_needs_the_camera(folder):
    frames = _frames()
    np.save("movie.npy", frames)
    for options, pattern in (
        ("--quantity snr", "--quantity snr.*needs the gain of the camera"),
        (
            "--quantity snr --gain -2",
            "gain_electrons_per_adu must be positive and finite.*-2",
        ),
    ):
        _assert_one_line(_run(f"{ESTIMATE} {options}"), pattern)
    result = _done(f"{ESTIMATE} --quantity snr --gain 2")
    assert "the camera's offset counts as light; give --offset" in result.stderr
    result = _done(f"{ESTIMATE} --quantity snr --gain 2 --offset 20 --overwrite")
    assert result.stderr == ""
    assert _rows(result.stdout)["written"] == "snr, float32, above the offset of 20 ADU"
    noise = float(noise_correction(7.0, truncation="smooth"))
    above = frames - 20.0
    bkgds = reference_mean(above, 7.0, "smooth")
    # The background's tolerance, 2e-6 of 200, over a noise of 6.
    expected = (above - bkgds) / (noise * np.sqrt(bkgds / 2))
    np.testing.assert_allclose(_read("bkgd.tif"), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_camera_is_measured_and_taken_by_estimate(folder):
    rng = np.random.default_rng(0)
    for name, level in {"dark": 4, "bright": 400}.items():
        _write(f"{name}.tif", (20 + rng.poisson(level, (20, 21, 34))).astype("uint16"))
    result = _done("camera dark.tif bright.tif")
    # Of 20 frames: a standard error of 6 % in each pixel, which are found to be alike.
    assert abs(float(_rows(result.stdout)["gain"].split()[0]) - 1) < 0.06
    assert Path("camera.png").is_file()
    np.save("movie.npy", _frames())
    _done(f"{ESTIMATE} --camera camera.npz")
    for out in ("maps", "maps.json", "maps.png"):
        result = _run(f"camera dark.tif none.tif --out {out}")
        _assert_one_line(result, f"--out {out}: give a name that ends in .npz, .tif")
    movie = Path("dark.tif").read_bytes()
    result = _run("camera dark.tif bright.tif --out dark.tif --overwrite")
    _assert_one_line(result, "--out dark.tif: is one of the movies")
    assert Path("dark.tif").read_bytes() == movie
    Path("short.npz").write_bytes(Path("camera.npz").read_bytes()[:99])
    _assert_one_line(_run(f"{ESTIMATE} --camera short.npz"), "short.npz: is no .npz")


@pytest.mark.slow
def test_frames_that_are_not_finite_are_counted(folder):
    frames = _frames(dtype="float32")
    frames[[3, 7], 4, 5] = np.nan
    np.save("movie.npy", frames)
    rows = _rows(_done(ESTIMATE).stdout)
    assert rows["not finite"] == "NaN or infinity in 2 frames"


def _a_corrupt_page(folder: Path, page: int = 6) -> None:
    _write(folder / "movie.tif", _frames(), compression="zlib")
    with tifffile.TiffFile(folder / "movie.tif") as tiff:
        offset = tiff.pages[page].dataoffsets[0]
    with (folder / "movie.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)


def _assert_one_line(result, pattern: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.fullmatch(f"jaxbkgd: .*{pattern}.*\n", result.stderr), result.stderr
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("--out bkgd.tif --channel 2", "--channel 2: needs --calibration"),
        ("--out there.tif", "there.tif: exists already.*--overwrite"),
        ("--out folder", "folder: is written as TIFF, Zarr or Picasso raw"),
        ("--out movie.tif --overwrite", "movie.tif: is the movie itself"),
        ("--out link.tif --overwrite", "movie.tif: is the movie itself"),
        ("--out dir.tif --overwrite", "dir.tif: is no movie of this format"),
        ("--out none/bkgd.tif", "none/bkgd.tif: .*there is no folder .*none; make"),
        ("--out there.tif/bkgd.tif", "there.tif/bkgd.tif"),
        (f"--out {'long' * 100}.tif", "name too long"),
        ("--out bkgd.tif --quantity residual --dtype uint16", "--dtype uint16: .*negative"),
        ("--out bkgd.tif --frames 5", "--frames 5: must be a range START:STOP"),
        ("--out bkgd.tif --frames 2:", "movie.tif: frames 2::1 .*hold none"),
        ("--out bkgd.tif --every 0", "--every 0: must be STEP"),
        ("--out bkgd.tif --offset nan", "offset_adu must be finite.*nan"),
        (
            "--out bkgd.tif --radius 7 --mask movie.tif",
            "--mask movie.tif: .*--radius-frames",
        ),
        ("--out bkgd.tif --radius-frames 2 --clip x", "--clip x: is neither none nor"),
        ("--out bkgd.tif --radius-frames -2", r"--radius-frames \[-2.0\]: .*positive"),
        *(
            (f"--out bkgd.tif --radius {radius}", f"--radius {radius}: .*{rule}")
            for rule, radii in {
                "positive": ("nan", "6,-1"),
                "at most": ("1e9",),
                "nor a pair": ("seven", "1,2,3"),
            }.items()
            for radius in radii
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_nothing(options, pattern, folder):
    _write("movie.tif", _frames(2))
    movie = Path("movie.tif").read_bytes()
    Path("there.tif").write_text("precious")
    Path("folder").mkdir()
    Path("link.tif").symlink_to("movie.tif")
    Path("dir.tif").mkdir()
    before = sorted(folder.rglob("*"))
    _assert_one_line(_run(f"estimate movie.tif {options}"), pattern)
    assert sorted(folder.rglob("*")) == before
    assert Path("movie.tif").read_bytes() == movie
    assert Path("there.tif").read_text() == "precious"


@pytest.mark.parametrize("kind", [MovieError, UsageError, ValueError])
def test_an_error_is_one_line_and_its_traceback_is_shown_when_asked(
    kind, folder, monkeypatch
):
    def fail(*arguments, **options):
        error = kind("movie.npy: frame 3\nis broken")
        error.add_note("begin anew")
        raise error

    np.save("movie.npy", _frames())
    monkeypatch.setattr(_estimate, "estimate_movie", fail)
    monkeypatch.delenv("JAXBKGD_DEBUG", raising=False)
    is_users = kind in (MovieError, UsageError)
    line = "movie.npy: frame 3 is broken; begin anew"
    if not is_users:
        line = f"internal error: {kind.__name__}: {line}"
    remedy = "" if is_users else "; run again with --debug for the traceback"
    result = _run(ESTIMATE)
    assert (result.exit_code, result.stdout) == (2 if is_users else 1, "")
    assert result.stderr == f"jaxbkgd: {line}{remedy}\n"
    for before, after, variable in (
        ("", "--debug", ""),
        ("--debug", "", ""),
        ("", "", "1"),
    ):
        monkeypatch.setenv("JAXBKGD_DEBUG", variable)
        result = _run(f"{before} {ESTIMATE} {after}")
        assert result.exit_code == (2 if is_users else 1)
        assert result.stderr.startswith("Traceback (most recent call last):\n")
        assert ", in fail\n" in result.stderr
        assert result.stderr.endswith(f"jaxbkgd: {line}\n")


@pytest.mark.slow
def test_what_is_done_before_a_fault_is_kept_and_said_to_be(folder):
    _a_corrupt_page(folder, 7)
    result = _run(
        "estimate movie.tif --out bkgd.tif --radius 7 --chunk-frames 2 --workers 1"
    )
    _assert_one_line(
        result, "frame 7 of 10 cannot be read.*; the finished part is kept .*again"
    )
    journal = "bkgd.tif.part.journal"
    left = {"movie.tif", "bkgd.tif.part", journal, f"{journal}.lock"}
    assert {path.name for path in folder.iterdir()} == left


KEPT = "the finished part is kept in .*bkgd.tif.part; run the same again to resume"
NOTHING = "nothing has been written"
NO_FIGURE = "the radii are in calibration.json, and there is no figure"


def _press_ctrl_c(*arguments: object, **options: object) -> None:
    # The second time changes nothing.
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.3)


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Where the tests themselves run in the background of a shell, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _assert_interrupted(result: Result, kept: str) -> None:
    assert result.exit_code == 130, result.output
    assert re.search(f"^jaxbkgd: interrupted; {kept}\n\\Z", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_the_same_command_goes_on_after_ctrl_c(folder, monkeypatch):
    def interrupt(channel, frames):
        if frames.start == 4:
            _press_ctrl_c()
        return read(channel, frames)

    read = Channel.__getitem__
    np.save("movie.npy", _frames())
    command = f"{ESTIMATE} --chunk-frames 2 --workers 1"
    with monkeypatch.context() as patches:
        patches.setattr(Channel, "__getitem__", interrupt)
        _assert_interrupted(_run(command), KEPT)
    assert not Path("bkgd.tif").exists()
    assert _rows(_done(command).stdout)["resumed"] == "4 frames were already done"
    assert {path.name for path in folder.iterdir()} == {"movie.npy", "bkgd.tif"}
    _done("estimate movie.npy --out whole.tif --radius 7 --chunk-frames 2")
    assert Path("bkgd.tif").read_bytes() == Path("whole.tif").read_bytes()


def test_an_interruption_before_anything_is_written_says_so(folder, monkeypatch):
    np.save("movie.npy", _frames())
    monkeypatch.setattr(_estimate, "open_channels", _press_ctrl_c)
    _assert_interrupted(_run(ESTIMATE), NOTHING)
    assert [path.name for path in folder.iterdir()] == ["movie.npy"]


@pytest.mark.parametrize(
    "command",
    [
        "estimate",
        "estimate movie.tif --out bkgd.tif --quantity nothing",
        "nothing",
        "demo --seed -1",
    ],
)
def test_a_wrong_usage_is_short(command):
    result = _run(command)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) <= 4
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("--help", ["calibrate", "estimate", "info", "demo", "--version"]),
        ("calibrate --help", ["movies", "--lag", "--debug", "--offset", "[x>=1]"]),
        ("estimate --help", ["movies", "--radius", "--out", "--fresh", "snr"]),
        ("--version", ["jaxbkgd "]),
    ],
)
def test_help_and_version_are_answered(command, texts):
    output = _done(command).stdout
    assert all(text in output for text in texts)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for name in ("series", "tiff", "tiff_pages", "tiff_sink", "zarr"):
        monkeypatch.delitem(sys.modules, f"jaxbkgd._movies.{name}", raising=False)
        monkeypatch.delattr(_movies, name, raising=False)
    np.save("movie.npy", _frames())
    _write("movie.tif", _frames())
    for movie in ("movie.tif", "movie.npy"):
        result = _run(f"estimate {movie} --out bkgd.tif")
        _assert_one_line(result, r"tifffile.*pip install 'jaxbkgd.(movies|cli).'")


RUN = [sys.executable, "-m", "jaxbkgd"]


def test_without_its_packages_the_command_alone_names_the_extra():
    code = (
        "import sys; sys.modules['typer'] = None; import jaxbkgd._cli.main as m; m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True
    )
    line = "the command line needs the Python package typer; install it with"
    assert done.stderr == f"jaxbkgd: {line}: pip install 'jaxbkgd[cli]'\n"
    assert (done.returncode, done.stdout) == (2, "")


def test_calls_have_a_thread_each_where_they_run_side_by_side(folder, pools):
    Path("file").touch()
    _assert_one_line(_run("estimate none.npy --out bkgd.tif"), "none.npy: no such file")
    assert pools == ["one"]
    _assert_one_line(
        _run("demo --out file"), "file: is not a folder, and cannot be made one"
    )
    assert pools == ["one", "one"]


@pytest.mark.long
def test_ctrl_c_ends_the_real_command(tmp_path):
    movie, out = tmp_path / "movie.npy", tmp_path / "bkgd.tif"
    # 130 Mpx in 1000 chunks.
    np.save(movie, np.zeros((2000, 256, 256), np.uint8))
    process = subprocess.Popen(
        [*RUN, "estimate", movie, "--out", out, "--radius", "7", "--chunk-frames", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "bkgd.tif.part.journal"
    # Its first line are the settings.
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 2
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    # Of the settings and all the chunks, it was not waited for.
    assert journal.read_bytes().count(b"\n") < 1001
    assert (process.returncode, stdout) == (130, "")
    assert re.fullmatch(f"jaxbkgd: interrupted; {KEPT}\n", stderr)
    assert not out.exists()


INTERRUPTED_IMPORT = "import signal, time; signal.raise_signal(2); time.sleep(60)"
# Matplotlib draws on while the process ends.
INTERRUPTED_FIGURE = """if True:
    import signal
    from matplotlib.figure import Figure

    def savefig(figure, *arguments, **options):
        signal.raise_signal(2)
        while True:
            draw(figure, *arguments, **options)

    draw, Figure.savefig = Figure.savefig, savefig
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "before", "kept", "left"),
    [
        ("jax.py", INTERRUPTED_IMPORT, NOTHING, set()),
        ("sitecustomize.py", INTERRUPTED_FIGURE, NO_FIGURE, {"calibration.json"}),
    ],
)
def test_ctrl_c_ends_the_process_whatever_goes_on(name, before, kept, left, folder):
    Path(name).write_text(before)
    np.save("movie.npy", _frames(12))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = "calibrate movie.npy --radius 7,7 --lag 1 --steps 2 --max-radius 9"
    done = subprocess.run(
        [*RUN, *options.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 130, done.stderr
    assert re.search(f"^jaxbkgd: interrupted; {kept}\n\\Z", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} - {name, "__pycache__"} == {
        "movie.npy",
        *left,
    }


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    Path("there.json").write_text("precious")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match=r"there\.json: cannot be written: No space left"):
        write_whole(Path("there.json"), b"new")
    assert [path.name for path in folder.iterdir()] == ["there.json"]
    assert Path("there.json").read_text() == "precious"


def _table(text: str) -> dict[str, list[str]]:
    """The rows of a printed table with two channels."""
    rows = (re.split("   +", line.rstrip()) for line in text.splitlines())
    return {row[0].strip(): row[1:] for row in rows if len(row) == 3}


@pytest.mark.long
def test_the_demo_shows_what_it_measured(folder, pools):
    result = _done("demo --out figures")
    assert result.stderr == ""
    table = _table(result.stdout)
    assert table["radius"] == ["7 px", "5 px"]
    errors_adu = [cell.split()[0] for cell in table["RMS error of the background"]]
    # Of backgrounds of 157 and 54 ADU.
    assert np.all(np.array(errors_adu, float) < 10)
    assert pools == ["one"]
    paths = sorted((folder / "figures").iterdir())
    assert [path.name for path in paths] == ["channel-1.png", "channel-2.png"]
    for path in paths:
        assert f"wrote {Path('figures', path.name)}" in result.stdout
        assert path.stat().st_size < 100_000
        with Image.open(path) as image:
            assert image.size[0] == 900


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The folder in which two channels were calibrated, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:48, :48]
    waves = 100 + 20 * np.sin(2 * np.pi * y / 30) + 20 * np.sin(2 * np.pi * x / 20)
    # Shot noise without molecules. The other channel is even.
    first, second = (
        rng.poisson(bkgd, (24, *bkgd.shape)).astype(np.uint16)
        for bkgd in (waves, np.full_like(waves, 60))
    )
    _write(folder / "first.tif", first)
    _write(folder / "second.tif", second)
    movies = [str(folder / name) for name in ("first.tif", "second.tif")]
    options = ["--out", str(folder / "radii.json"), "--radius", "7,7"]
    options += ["--max-radius", "12", "--lag", "2"]
    with quick_compilation():
        result = _done("calibrate", *movies, *options)
    return folder, result, (first, second)


@pytest.mark.long
def test_a_calibration_is_written_as_it_is_printed(calibrated):
    folder, result, _ = calibrated
    names = {"first.tif", "second.tif", "radii.json", "radii.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "radii.png").stat().st_size < 100_000
    with Image.open(folder / "radii.png") as image:
        assert image.size[0] == 900
    text = (folder / "radii.json").read_text()
    # Nothing that JSON does not know, as NaN.
    fields = json.loads(text, parse_constant=pytest.fail)["calibration"]
    module = SpatialMean.from_json(text)
    rows = _rows(result.stdout)
    (y, x), even = module.radii_pix[0].tolist(), module.radii_pix[1, 0]
    stds, no_std = fields["radii_std"]
    assert rows["radius"].startswith(f"{y:.4g} px in y, {x:.4g} px in x (+- {stds[0]:.2f}")
    assert f"; {even:.4g} px" in rows["radius"]
    assert no_std == [None, None]
    assert fields["movies"] == ["first.tif", "second.tif"]
    assert rows["movie"] == "first.tif; second.tif"
    assert fields["is_at_bound"] == [[False, False], [True, True]]
    assert fields["is_converged"]
    assert rows["lag"] == "2 frames"
    assert rows["search"] == fields["stop_reason"]
    assert f"after {fields['steps']} steps" in fields["stop_reason"]
    assert result.stdout.count("wrote ") == 2
    assert "jaxbkgd: 2 of 4 radii went to their bound: " in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("channel", [1, 2])
def test_an_estimate_takes_the_radii_of_its_channel(channel, calibrated, folder):
    source, _, movies = calibrated
    module = SpatialMean.from_json((source / "radii.json").read_text())
    movie = str(source / f"{('first', 'second')[channel - 1]}.tif")
    options = ("--calibration", str(source / "radii.json"), "--channel", str(channel))
    result = _done("estimate --out bkgd.tif", movie, *options)
    background = module(list(movies))
    # Some ten float32 roundings.
    np.testing.assert_allclose(
        tifffile.imread("bkgd.tif"), background.bkgds[channel - 1], rtol=2e-6
    )
    y, x = module.radii_pix[channel - 1]
    rows = _rows(result.stdout)
    assert rows["radius"] == f"{y:.4g} px in y, {x:.4g} px in x"
    assert rows["noise factor"] == f"{background.noise_corrections[channel - 1]:.4f}"
    # Of the even channel alone, the radii went to the bound.
    said = "jaxbkgd: .*radii.json: a radius is at its bound; .*\n" if channel == 2 else ""
    assert re.fullmatch(said, result.stderr)


@pytest.mark.slow
def test_a_calibration_is_for_as_many_channels_as_it_has(folder):
    frames = _frames().reshape(5, 2, 21, 34)
    np.save("movie.npy", frames)
    module = SpatialMean([(7.0, 7.0), (5.0, 8.0)])
    fields = json.loads(module.to_json())
    about = {"is_converged": False, "is_at_bound": [[False, True], [False, False]]}
    Path("radii.json").write_text(json.dumps(fields | {"calibration": about}))
    result = _done(f"{CALIBRATED} --calibration radii.json")
    for fault in ("the search for these radii had not ended", "a radius is at its bound"):
        assert f"radii.json: {fault}; the background may be off\n" in result.stderr
    assert _rows(result.stdout)["radius"] == "7 px; 5 px in y, 8 px in x"
    for channel, radii in enumerate([(7, 7), (5, 8)]):
        _assert_is_background_of(_read("bkgd.tif", channel), frames[:, channel], radii)
    result = _run(f"{CALIBRATED} --calibration radii.json --channel 1 --overwrite")
    _assert_one_line(result, "--channel 1: needs a movie of one channel")
    three = SpatialMean([(3.0, 5.0), (7.0, 7.0), (4.0, 4.0)])
    Path("radii.json").write_text(three.to_json())
    result = _run(f"{CALIBRATED} --calibration radii.json --overwrite")
    _assert_one_line(result, "radii.json: has 3 channels, not 2")


def test_a_radius_in_time_at_its_bound_is_no_fault(folder, capsys):
    fields = json.loads(LocalMean(2.0, 1.0, clip=None).to_json())
    for is_at_bound, fault in (([True, False, False], False), ([False, True, True], True)):
        about = {"is_converged": True, "is_at_bound": [is_at_bound]}
        Path("radii.json").write_text(json.dumps(fields | {"calibration": about}))
        arguments.read_calibration(Path("radii.json"), None, 1)
        assert ("a radius is at its bound" in capsys.readouterr().err) == fault


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("two.json", "two.json: has 2 channels.*--channel"),
        ("two.json --channel 3", "--channel 3: .* a channel from 1 to 2 of two.json"),
        ("two.json --channel 1 --radius 7", "--radius: is in --calibration"),
        ("none.json", "none.json: cannot be read: No such file"),
        ("movie.tif", "movie.tif: cannot be read: .*decode"),
        ("text.json", "text.json: is not a calibration: .*no JSON"),
        ("other.json", "other.json: is not a calibration: .*must be a JSON object with"),
        ("words.json", "words.json: is not a calibration: .*radius must be a number"),
        ("bound.json", "bound.json: is not a calibration: "),
    ],
)
def test_a_calibration_that_does_not_fit_is_one_line(options, pattern, folder):
    _write("movie.tif", _frames(2))
    two = SpatialMean([[7.0, 7.0], [5.0, 5.0]]).to_json()
    Path("two.json").write_text(two)
    Path("text.json").write_text("radius 7\nradius 5")
    Path("other.json").write_text('{"radius": 7}')
    Path("words.json").write_text(json.dumps(json.loads(two) | {"radii_pix": [["a", "b"]]}))
    ragged = {"calibration": {"is_converged": True, "is_at_bound": [[True], [[], 1]]}}
    Path("bound.json").write_text(json.dumps(json.loads(two) | ragged))
    Path("folder").mkdir()
    before = sorted(folder.iterdir())
    result = _run(f"estimate movie.tif --out bkgd.tif --calibration {options}")
    _assert_one_line(result, pattern)
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
def test_files_that_were_a_pattern_are_named(folder):
    names = [f"part{number}.tif" for number in range(9)]
    for name in names:
        _write(name, _frames(dtype="float32")[:1])
    result = _done(f"estimate {' '.join(names)} --radius 2 --out bkgd.tif")
    assert "9 files are as many channels; " in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("movie.tif short.tif", "movie.tif: .*10, 2 frames"),
        ("movie.tif --radius 7 --lag 10", "movie.tif: .*10 frames.*lag of 10"),
        ("movie.tif --lag 3", "--lag 3: needs --radius"),
        ("movie.tif --offset 9 --offset 8", "--offset: is given 2 times for 1"),
        ("nan.tif --radius 7", "nan.tif: Frame 3 holds nan at y = 4, x = 5"),
        ("still.tif --radius 7", "still.tif: .*nothing changes"),
        ("none.tif", "none.tif: no such file"),
        ("movie.tif --clip 3", "--clip 3: .*give --radius-frames"),
        ("movie.tif --radius-frames 0 --clip 200", "--clip 200: is neither none nor"),
        (
            "movie.tif --radius 7,7 --max-radius 5",
            "--radius 7,7, --max-radius 5: .*raise max_radius_pix",
        ),
        ("movie.tif --radius 7 --max-radius nan", "--max-radius nan: .*must be positive"),
        ("movie.tif --out movie.tif --overwrite", "ends in .json"),
        ("movie.tif --out there.json", "there.json: exists.*--overwrite"),
        ("movie.tif --out drawn.json", "drawn.png: exists.*--overwrite"),
        ("movie.tif --out folder.json --overwrite", "not a regular file"),
        ("movie.tif --out none/radii.json", "no folder none.*make"),
        (f"movie.tif --out {'long' * 100}.json", "name too long"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(options, pattern, folder):
    frames = _frames(dtype="float32")
    _write("movie.tif", frames)
    _write("short.tif", frames[:2])
    _write("still.tif", np.ones_like(frames))
    blemished = frames.copy()
    blemished[3, 4, 5] = np.nan
    _write("nan.tif", blemished)
    for name in ("there.json", "drawn.png"):
        Path(name).write_text("precious")
    Path("folder.json").mkdir()
    before = sorted(folder.iterdir())
    _assert_one_line(_run(f"calibrate {options}"), pattern)
    assert sorted(folder.iterdir()) == before
    assert Path("there.json").read_text() == Path("drawn.png").read_text() == "precious"


@pytest.fixture
def quick_calibration(monkeypatch) -> list[Any]:
    """Takes the first radii, with a warning; gives the channels."""
    seen = []

    def calibrate(channels, *, estimator, steps, **options):
        seen.extend(channels)
        warnings.warn("Molecules stay on\nfor long.", stacklevel=2)
        return estimator, _no_history(estimator, f"all {steps} steps were used up")

    monkeypatch.setattr(_calibrate, "calibrate", calibrate)
    return seen


@pytest.mark.slow
def test_a_search_that_has_not_ended_and_its_warnings_are_told(folder, quick_calibration):
    _write("movie.tif", _frames())
    Path("calibration.json").write_text("old")
    Path("calibration.png").write_text("old")
    result = _done("calibrate movie.tif --radius 3 --steps 1 --overwrite")
    assert result.stderr == "jaxbkgd: Molecules stay on for long.\n"
    rows = _rows(result.stdout)
    assert rows["radius"] == "3 px"
    assert rows["search"] == "all 1 steps were used up"
    fields = json.loads(Path("calibration.json").read_text())
    # One number is one radius for both axes.
    assert fields["radii_pix"] == [[3.0]]
    assert fields["calibration"]["radii_std"] == [[None, None]]
    with Image.open("calibration.png") as image:
        image.load()


def test_a_movie_of_several_channels_is_calibrated_by_channel(
    folder, quick_calibration, monkeypatch
):
    monkeypatch.setattr(_cli_calibrate, "save_calibration_figure", lambda *drawn: None)
    frames = _frames()
    options: Any = {"imagej": True, "metadata": {"axes": "TCYX"}}
    tifffile.imwrite("two.tif", frames.reshape(5, 2, 21, 34), **options)
    np.save("one.npy", frames[:5])
    _done("calibrate two.tif one.npy --radius 7")
    expected = [(0, "two.tif"), (1, "two.tif"), (0, "one.npy")]
    assert [(seen.index, seen.movie.name) for seen in quick_calibration] == expected
    fields = json.loads(Path("calibration.json").read_text())
    names = ["two.tif, channel 1", "two.tif, channel 2", "one.npy"]
    assert fields["calibration"]["movies"] == names
    assert len(fields["radii_pix"]) == 3


class TestAnInterruptedCalibration:
    """Keeps the best radii that it has, and leaves nothing half."""

    best = (
        "the best radii so far are in calibration.json; the same command with --overwrite "
        "starts over"
    )

    @pytest.fixture
    def kept(self, folder):
        """Calibrates; gives the file that is left, after a look at what is told."""

        def kept(text: str, options: str = "") -> dict[str, Any]:
            command = f"calibrate movie.tif --overwrite {options}"
            _assert_interrupted(_run(command), text)
            left = {path.name for path in folder.iterdir()} - {"movie.tif"}
            # Never a new calibration beside an old figure.
            assert left in ({"calibration.json"}, {"calibration.png"})
            path = Path("calibration.json")
            return json.loads(path.read_text() if path.exists() else "{}")

        _write("movie.tif", _frames())
        Path("calibration.png").write_text("of other radii")
        return kept

    def test_before_the_first_step_has_nothing_to_keep(self, kept, monkeypatch):
        monkeypatch.setattr(_calibrate, "calibrate", _press_ctrl_c)
        assert kept(NOTHING) == {}

    @pytest.mark.slow
    def test_in_the_search_keeps_the_best_radii(self, kept, monkeypatch):
        def press(*arguments, **options):
            if len(losses) == 1:
                _press_ctrl_c()
            losses.append(evaluate(*arguments, **options))
            return losses[-1]

        losses, evaluate = [], Problem.losses_and_gradients
        monkeypatch.setattr(Problem, "losses_and_gradients", press)
        fields = kept(self.best, "--radius 3,4 --max-radius 9 --lag 2")
        assert fields["calibration"]["stop_reason"] == "interrupted after 1 steps"
        np.testing.assert_allclose(fields["radii_pix"], [[3, 4]], rtol=1e-6)
        result = _done(f"{CALIBRATED.replace('npy', 'tif')} --calibration calibration.json")
        assert "the search for these radii had not ended" in result.stderr

    @pytest.mark.slow
    def test_after_the_search_keeps_its_radii(self, kept, quick_calibration, monkeypatch):
        monkeypatch.setattr(Figure, "savefig", _press_ctrl_c)
        fields = kept(NO_FIGURE, "--radius 7")
        assert fields["calibration"]["stop_reason"] == "all 200 steps were used up"


def test_an_interrupted_camera_keeps_its_numbers_and_no_old_figure(folder, monkeypatch):
    rng = np.random.default_rng(0)
    for name, level in {"dark.tif": 4, "bright.tif": 400}.items():
        _write(name, (20 + rng.poisson(level, (20, 21, 34))).astype("uint16"))
    command = "camera dark.tif bright.tif --overwrite"
    Path("camera.png").write_text("of other numbers")
    with monkeypatch.context() as patches:
        patches.setattr(_camera, "measure_camera", _press_ctrl_c)
        _assert_interrupted(_run(command), NOTHING)
        assert not Path("camera.npz").exists()
    monkeypatch.setattr(Figure, "savefig", _press_ctrl_c)
    kept = "the numbers are in camera.npz, and there is no figure"
    _assert_interrupted(_run(command), kept)
    left = {path.name for path in folder.iterdir()}
    assert left == {"dark.tif", "bright.tif", "camera.npz"}


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_demo_says_which_figures_it_has_written(number, folder, monkeypatch):
    def draw(path, **drawn):
        if path.name == f"channel-{number}.png":
            _press_ctrl_c()
        path.write_text("new")

    movie = np.zeros((3, 21, 34), np.float32)
    truth = SimpleNamespace(bkgds_adu=movie)
    monkeypatch.setattr(_demo, "simulate_movie", lambda *key, **options: (movie, truth))
    monkeypatch.setattr(_demo, "save_channel_figure", draw)
    paths = [Path("channel-1.png"), Path("channel-2.png")]
    for path in paths:
        path.write_text("of another seed")
    kept = NOTHING if number == 1 else "the demo has written channel-1.png"
    _assert_interrupted(_run("demo --out ."), kept)

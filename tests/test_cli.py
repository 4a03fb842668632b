"""The command line does a movie from disk, and says in one line what is wrong."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import correlate1d
from scipy.special import ndtr, ndtri
from typer.testing import CliRunner

from jaxbkgd import _calibrate, _cli, _figures, FramePairLoss, SpatialMean
from jaxbkgd._cli import app


RUN = "from jaxbkgd._cli import app; app(prog_name='jaxbkgd')"

Fault = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _frames(count: int = 10, dtype: str = "uint16") -> np.ndarray:
    return np.random.default_rng(2).integers(0, 200, (count, 21, 34)).astype(dtype)


def _write(path: str | Path, frames: np.ndarray, **options: Any) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", **options)


def _reference(frames: np.ndarray, radii_pix: tuple[float, float]) -> np.ndarray:
    """The definition of `bkgd_spatial_mean`, in float64."""
    result = frames.astype(np.float64)
    for axis, radius_pix in zip((1, 2), radii_pix, strict=True):
        sigma = radius_pix / 2
        half_width = math.ceil(6 * sigma) // 2
        x = np.arange(-half_width, half_width + 1)
        taps = ndtr((x + 0.5) / sigma) - ndtr((x - 0.5) / sigma)
        taps[np.abs(x) > ndtri(0.995) * sigma] = 0
        result = correlate1d(result, taps / taps.sum(), axis, mode="nearest")
    return result


def _assert_is_background_of(
    bkgds: np.ndarray, frames: np.ndarray, radii_pix: tuple[float, float]
) -> None:
    assert bkgds.dtype == np.float32
    # The project's parity: 2e-6 of the largest input, some ten float32 roundings.
    tolerance = 2e-6 * np.abs(frames).max()
    np.testing.assert_allclose(bkgds, _reference(frames, radii_pix), 0, tolerance)


@pytest.mark.parametrize(
    ("radius", "radii_pix"), [("7", (7, 7)), ("3.5,10", (3.5, 10)), (" 2 , 1 ", (2, 1))]
)
def test_a_movie_in_several_chunks_gets_its_background(
    radius, radii_pix, folder, monkeypatch
):
    # Four blocks of three frames, the last of them with one frame.
    monkeypatch.setattr(_cli, "_BLOCK_PIXELS", 3 * 21 * 34 + 5)
    shapes = []

    def spatial_mean(frames, radius_pix, **options):
        shapes.append(frames.shape)
        return real_spatial_mean(frames, radius_pix, **options)

    real_spatial_mean = _cli.spatial_mean
    monkeypatch.setattr(_cli, "spatial_mean", spatial_mean)
    frames = _frames()
    _write("movie.tif", frames)
    result = CliRunner().invoke(
        app, ["estimate", "movie.tif", "--radius", radius, "--out", "bkgd.tif"]
    )
    assert result.exit_code == 0, result.output
    _assert_is_background_of(tifffile.imread("bkgd.tif"), frames, radii_pix)
    # Another shape would be compiled again.
    assert len(shapes) == 1
    assert result.stderr == ""
    for text in ("bkgd.tif", "10 of 21 x 34 px", "float32", "noise factor", "Mpx/s"):
        assert text in result.stdout


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "u8", "f2", "f4", "f8"])
def test_every_real_dtype_gets_its_background(dtype, folder):
    frames = _frames(2, "i2").astype(dtype)
    _write("movie.tif", frames)
    result = CliRunner().invoke(app, ["estimate", "movie.tif", "--out", "bkgd.tif"])
    assert result.exit_code == 0, result.output
    _assert_is_background_of(tifffile.imread("bkgd.tif"), frames, (7, 7))


def test_a_bigtiff_hyperstack_and_an_ome_tiff_are_read(folder):
    frames = _frames(6)
    tifffile.imwrite(
        "ome.tif", frames.reshape(3, 2, 21, 34), ome=True, metadata={"axes": "TCYX"}
    )
    tifffile.imwrite(
        "imagej.tif", frames.reshape(3, 2, 21, 34), imagej=True, metadata={"axes": "TZYX"}
    )
    _write("big.tif", frames, bigtiff=True)
    for movie in ("ome.tif", "imagej.tif", "big.tif"):
        result = CliRunner().invoke(
            app, ["estimate", movie, "--out", "bkgd.tif", "--overwrite"]
        )
        assert result.exit_code == 0, result.output
        _assert_is_background_of(tifffile.imread("bkgd.tif"), frames, (7, 7))


def _no_such_file(folder: Path) -> None:
    pass


def _a_folder(folder: Path) -> None:
    (folder / "movie.tif").mkdir()


def _an_empty_file(folder: Path) -> None:
    (folder / "movie.tif").touch()


def _not_a_tiff(folder: Path) -> None:
    (folder / "movie.tif").write_text("frame,x,y\n1,2,3\n")


def _a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "movie.tif")


def _a_cut_movie(folder: Path) -> None:
    _write(folder / "movie.tif", _frames())
    content = (folder / "movie.tif").read_bytes()
    (folder / "movie.tif").write_bytes(content[: len(content) * 6 // 10])


def _a_movie_cut_page_by_page(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "movie.tif") as writer:
        for frame in _frames():
            writer.write(frame, photometric="minisblack")
    content = (folder / "movie.tif").read_bytes()
    (folder / "movie.tif").write_bytes(content[: len(content) * 6 // 10])


def _a_movie_cut_within_its_last_frame(folder: Path) -> None:
    path, axes = folder / "movie.tif", {"axes": "TYX"}
    tifffile.imwrite(path, _frames(), imagej=True, metadata=axes, truncate=True)
    content = (folder / "movie.tif").read_bytes()
    (folder / "movie.tif").write_bytes(content[:-100])


def _a_corrupt_page(folder: Path) -> None:
    _write(folder / "movie.tif", _frames(), compression="zlib")
    with tifffile.TiffFile(folder / "movie.tif") as tiff:
        offset = tiff.pages[6].dataoffsets[0]
    with (folder / "movie.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)


def _pages_that_repeat(folder: Path) -> None:
    _write(folder / "movie.tif", _frames())
    with tifffile.TiffFile(folder / "movie.tif") as tiff:
        first, end = tiff.pages[0].offset, tiff.pages.next_page_offset
    assert end is not None
    with (folder / "movie.tif").open("r+b") as file:
        file.seek(end)
        file.write(first.to_bytes(4, sys.byteorder))


def _a_single_page(folder: Path) -> None:
    _write(folder / "movie.tif", _frames()[0])


def _colour(folder: Path) -> None:
    frames = np.zeros((4, 21, 34, 3), np.uint8)
    tifffile.imwrite(folder / "movie.tif", frames, photometric="rgb")


def _planar_colour(folder: Path) -> None:
    frames = np.zeros((4, 3, 21, 34), np.uint8)
    tifffile.imwrite(
        folder / "movie.tif", frames, photometric="rgb", planarconfig="separate"
    )


def _complex(folder: Path) -> None:
    _write(folder / "movie.tif", _frames(dtype="complex64"))


def _bits(folder: Path) -> None:
    _write(folder / "movie.tif", _frames() > 100)


def _pages_of_two_sizes(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "movie.tif") as writer:
        writer.write(_frames(2), photometric="minisblack")
        writer.write(_frames(2)[:, :, :30], photometric="minisblack")


def _pages_of_two_types(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "movie.tif") as writer:
        writer.write(_frames(2), photometric="minisblack")
        writer.write(_frames(2, "float32"), photometric="minisblack")


def _a_header_that_lies(folder: Path) -> None:
    _write(folder / "movie.tif", _frames(), compression="zlib")
    with tifffile.TiffFile(folder / "movie.tif", mode="r+") as tiff:
        for side in ("ImageWidth", "ImageLength"):
            tiff.pages.first.tags[side].overwrite(65_535)


BROKEN_MOVIES = [
    (_no_such_file, "no such file"),
    (_a_folder, "is a folder"),
    (_an_empty_file, "is empty"),
    (_not_a_tiff, "not a TIFF"),
    (_a_pipe, "not a regular file"),
    (_a_cut_movie, "truncated"),
    (_a_movie_cut_page_by_page, "truncated.* frame 6"),
    (_a_movie_cut_within_its_last_frame, "truncated"),
    (_a_corrupt_page, "frame 6 of 10 cannot be read"),
    (_pages_that_repeat, "its pages repeat"),
    (_a_single_page, "single image.*two or more frames"),
    (_colour, "colour.*convert"),
    (_planar_colour, "colour.*convert"),
    (_complex, "complex64.*convert"),
    (_bits, "bool.*convert"),
    (_pages_of_two_sizes, "frame 3 is 21 x 30 px.*split"),
    (_pages_of_two_types, "frame 3 is .*float32.*split"),
    (_a_header_that_lies, "header says"),
]


def _assert_one_line(result, pattern: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.fullmatch(f"jaxbkgd: .*{pattern}.*\n", result.stderr), result.stderr
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(("make", "pattern"), BROKEN_MOVIES)
def test_a_broken_movie_is_one_line_and_leaves_nothing(
    make: Fault, pattern, folder, monkeypatch
):
    # Chunks of two frames, so that a fault in the middle meets a half-written output.
    monkeypatch.setattr(_cli, "_BLOCK_PIXELS", 2 * 21 * 34)
    make(folder)
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(app, ["estimate", "movie.tif", "--out", "bkgd.tif"])
    _assert_one_line(result, f"movie.tif: .*{pattern}")
    assert sorted(folder.iterdir()) == before


def test_the_same_output_after_a_fault_is_still_there(folder):
    _a_corrupt_page(folder)
    (folder / "bkgd.tif").write_text("precious")
    result = CliRunner().invoke(
        app, ["estimate", "movie.tif", "--out", "bkgd.tif", "--overwrite"]
    )
    _assert_one_line(result, "frame 6 of 10")
    assert (folder / "bkgd.tif").read_text() == "precious"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--out", "bkgd.tif", "--channel", "2"], "--channel 2: .*give --calibration"),
        (["--out", "there.tif"], "there.tif: exists already.*--overwrite"),
        (["--out", "folder"], "folder: is a folder"),
        (["--out", "folder", "--overwrite"], "folder: is a folder"),
        (["--out", "movie.tif"], "movie.tif: is the movie itself"),
        (["--out", "movie.tif", "--overwrite"], "movie.tif: is the movie itself"),
        (["--out", "link.tif", "--overwrite"], "link.tif: is the movie itself"),
        (["--out", "pipe.tif", "--overwrite"], "pipe.tif: is not a regular file"),
        (["--out", "none/bkgd.tif"], "there is no folder none.*make"),
        (["--out", "there.tif/bkgd.tif"], "there is no folder there.tif.*make"),
        (["--out", f"{'long' * 100}.tif"], "name too long"),
        (["--out", "bkgd.npy"], "bkgd.npy: .*ends in .tif"),
        (["--out", "bkgd.tif", "--radius", "0"], "--radius 0: .*positive"),
        (["--out", "bkgd.tif", "--radius", "-3"], "--radius -3: .*positive"),
        (["--out", "bkgd.tif", "--radius", "nan"], "--radius nan: .*positive"),
        (["--out", "bkgd.tif", "--radius", "inf"], "--radius inf: .*positive"),
        (["--out", "bkgd.tif", "--radius", "1e9"], "--radius 1e9: .*at most"),
        (["--out", "bkgd.tif", "--radius", "6,-1"], "--radius 6,-1: .*positive"),
        (["--out", "bkgd.tif", "--radius", "seven"], "seven: .*nor a pair"),
        (["--out", "bkgd.tif", "--radius", ""], "--radius : .*nor a pair"),
        (["--out", "bkgd.tif", "--radius", "1,2,3"], "1,2,3: .*nor a pair"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_nothing(arguments, pattern, folder):
    _write("movie.tif", _frames(2))
    movie = Path("movie.tif").read_bytes()
    Path("there.tif").write_text("precious")
    Path("folder").mkdir()
    Path("link.tif").symlink_to("movie.tif")
    os.mkfifo("pipe.tif")
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, ["estimate", "movie.tif", *arguments])
    _assert_one_line(result, pattern)
    assert sorted(folder.rglob("*")) == before
    assert Path("movie.tif").read_bytes() == movie
    assert Path("there.tif").read_text() == "precious"


def test_a_folder_that_refuses_files_is_one_line(folder, monkeypatch):
    real_open = Path.open

    def refuse(path, mode="r", *arguments, **options):
        if "x" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, mode, *arguments, **options)

    _write("movie.tif", _frames(2))
    monkeypatch.setattr(Path, "open", refuse)
    result = CliRunner().invoke(app, ["estimate", "movie.tif", "--out", "bkgd.tif"])
    _assert_one_line(result, "bkgd.tif: cannot be written .Permission denied")


def test_an_interruption_leaves_nothing(folder, monkeypatch):
    def interrupt(function, frames):
        if next(calls):
            raise KeyboardInterrupt
        return np.zeros(frames.shape, np.float32)

    calls = iter([False, False, True])
    monkeypatch.setattr(_cli, "_BLOCK_PIXELS", 2 * 21 * 34)
    monkeypatch.setattr(_cli, "map_frames", interrupt)
    _write("movie.tif", _frames())
    result = CliRunner().invoke(app, ["estimate", "movie.tif", "--out", "bkgd.tif"])
    assert result.exit_code == 130
    assert result.stderr == "jaxbkgd: interrupted\n"
    assert [path.name for path in folder.iterdir()] == ["movie.tif"]


def test_progress_is_shown_on_a_terminal_only(folder):
    _write("movie.tif", _frames(2))
    arguments = ["estimate", "movie.tif", "--out", "bkgd.tif", "--overwrite"]
    quiet = CliRunner().invoke(app, arguments)
    assert quiet.stderr == ""
    shown = CliRunner().invoke(app, arguments, env={"FORCE_COLOR": "1"})
    assert "estimating" in shown.stderr
    assert "estimating" not in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [["estimate"], ["estimate", "movie.tif"], ["nothing"], ["demo", "--seed", "-1"]],
)
def test_a_wrong_usage_is_short(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) <= 4
    assert "Error: " in result.stderr


def test_help_and_version_are_answered():
    for arguments, texts in (
        (["--help"], ["calibrate", "estimate", "demo", "--version"]),
        (["calibrate", "--help"], ["MOVIE.tif", "--lag", "--figure", "7,7"]),
        (["estimate", "--help"], ["MOVIE.tif", "--radius", "--out", "--overwrite"]),
        (["demo", "--help"], ["--out", "--seed"]),
        (["--version"], ["jaxbkgd "]),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert all(text in result.stdout for text in texts)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.delitem(sys.modules, "jaxbkgd._movies", raising=False)
    result = CliRunner().invoke(app, ["estimate", "movie.tif", "--out", "bkgd.tif"])
    _assert_one_line(result, r"tifffile.*pip install 'jaxbkgd\[cli\]'")


def test_the_command_line_without_its_packages_names_the_extra():
    run = f"import sys; sys.modules['typer'] = None; {RUN}"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"jaxbkgd: .*typer.*pip install 'jaxbkgd\[cli\]'\n", done.stderr)


def test_the_real_command_does_a_movie_and_refuses_a_broken_one(tmp_path):
    frames = _frames()
    _write(tmp_path / "movie.tif", frames)
    command = [sys.executable, "-c", RUN, "estimate"]
    done = subprocess.run(
        [*command, tmp_path / "movie.tif", "--out", tmp_path / "bkgd.tif"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    _assert_is_background_of(tifffile.imread(tmp_path / "bkgd.tif"), frames, (7, 7))
    (tmp_path / "bkgd.tif").unlink()
    _a_corrupt_page(tmp_path)
    done = subprocess.run(
        [*command, tmp_path / "movie.tif", "--out", tmp_path / "bkgd.tif"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"jaxbkgd: .*movie\.tif: frame 6 of 10 .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["movie.tif"]


def test_ctrl_c_ends_the_real_command_and_leaves_nothing(tmp_path):
    movie = tmp_path / "movie.tif"
    # Small on disk, but long: 250 Mpx in 30 chunks.
    _write(movie, np.zeros((1000, 512, 512), np.uint8), compression="zlib")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "estimate", movie, "--out", tmp_path / "bkgd.tif"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob(".*.part")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "jaxbkgd: interrupted\n"
    assert list(tmp_path.iterdir()) == [movie]


def _table(text: str) -> dict[str, list[str]]:
    """The rows of a printed table with two channels."""
    return {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in text.splitlines()
        if len(cells := re.split("[│┃|]", line)[1:-1]) == 3
    }


def test_the_demo_shows_what_it_measured(folder):
    result = CliRunner().invoke(app, ["demo", "--out", "figures"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    table = _table(result.stdout)
    separable, exact, measured = (
        np.array(table[name], float)
        for name in ("separable, as smlmlp has it", "exact", "measured")
    )
    # The noise of 100 frames of at least 76 x 108 px is known to 1 part in 1 200.
    np.testing.assert_allclose(measured, exact, rtol=0.003)
    assert np.all(separable < 0.9 * exact)
    errors_adu = np.array(
        [cell.split()[0] for cell in table["RMS error of the background"]]
    )
    assert np.all(errors_adu.astype(float) < 10)
    paths = sorted((folder / "figures").iterdir())
    assert [path.name for path in paths] == ["channel-1.png", "channel-2.png"]
    for path in paths:
        assert f"wrote figures/{path.name}" in result.stdout
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            assert image.size[0] == 900


def test_a_demo_that_cannot_be_written_is_one_line(folder):
    (folder / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--out", "file"])
    _assert_one_line(result, "file: cannot be made a folder")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The folder in which two channels were calibrated, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:48, :48]
    waves = 100 + 20 * np.sin(2 * np.pi * y / 30) + 20 * np.sin(2 * np.pi * x / 20)
    # Shot noise without molecules. The other channel has smaller frames, and is even.
    first, second = (
        rng.poisson(bkgd, (24, *bkgd.shape)).astype(np.uint16)
        for bkgd in (waves, np.full((48, 40), 60))
    )
    _write(folder / "first.tif", first)
    _write(folder / "second.tif", second)
    movies = [str(folder / name) for name in ("first.tif", "second.tif")]
    options = ["--out", str(folder / "radii.json"), "--max-radius", "12", "--lag", "2"]
    result = CliRunner().invoke(app, ["calibrate", *movies, *options])
    assert result.exit_code == 0, result.output
    return folder, result, (first, second)


def test_a_calibration_is_written_as_it_is_printed(calibrated):
    folder, result, _ = calibrated
    names = {"first.tif", "second.tif", "radii.json", "radii.png"}
    assert {path.name for path in folder.iterdir()} == names
    text = (folder / "radii.json").read_text()
    # Nothing that JSON does not know, as NaN.
    fields = json.loads(text, parse_constant=pytest.fail)["calibration"]
    module = SpatialMean.from_json(text)
    table = _table(result.stdout)
    for axis, name in enumerate(["radius in y", "radius in x"]):
        radius, even = module.radii_pix[:, axis]
        std, no_std = np.array(fields["radii_std_pix"])[:, axis]
        assert table[name] == [
            f"{radius:.2f} +- {std:.2f} px",
            f"{even:.2f} px, at its bound",
        ]
        assert no_std is None
    assert table["movie"] == fields["movies"] == ["first.tif", "second.tif"]
    assert fields["is_at_bound"] == [[False, False], [True, True]]
    assert fields["is_converged"]
    assert "lag        2 frames" in result.stdout
    assert f"converged  yes: {fields['stop_reason']}" in result.stdout
    assert f"after {fields['steps']} steps" in fields["stop_reason"]
    assert result.stdout.count("wrote ") == 2
    assert re.fullmatch("jaxbkgd: 2 of 4 radii went to the bound, .*\n", result.stderr)


def test_interrupted_before_the_figure_the_radii_are_kept(
    calibrated, tmp_path, monkeypatch
):
    folder, _, _ = calibrated

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_calibrate, "losses_at", interrupt)
    options = ["--out", str(tmp_path / "radii.json"), "--max-radius", "12", "--lag", "2"]
    result = CliRunner().invoke(app, ["calibrate", str(folder / "first.tif"), *options])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["radii.json"]
    text = (tmp_path / "radii.json").read_text()
    expected = json.loads((folder / "radii.json").read_text())["radii_pix"][0]
    # Learned together with another channel, on the same windows: to how radii settle.
    np.testing.assert_allclose(
        SpatialMean.from_json(text).radii_pix[0], expected, rtol=2e-3
    )
    assert json.loads(text)["calibration"]["loss"] == [None]
    assert "not measured" in result.stdout


def test_the_errors_printed_are_those_of_the_loss(calibrated):
    folder, result, movies = calibrated
    text = (folder / "radii.json").read_text()
    fields = json.loads(text)["calibration"]
    table = _table(result.stdout)
    for number, frames in enumerate(movies):
        radii_pix = SpatialMean.from_json(text).radii_pix[number].tolist()
        learned, usual = _calibrate.losses_at(
            [
                SpatialMean(tuple(pair), max_radius_pix=14)
                for pair in (radii_pix, (7.0, 7.0))
            ],
            frames,
            FramePairLoss(2),
        )
        # Four digits are kept.
        np.testing.assert_allclose(fields["loss"][number], learned, rtol=1e-3)
        np.testing.assert_allclose(fields["loss_at_7_pix"][number], usual, rtol=1e-3)
        assert table["RMS error, learned"][number] == f"{learned**0.5:.3f} of the noise"
        assert table["RMS error at r = 7"][number] == f"{usual**0.5:.3f} of the noise"
        change = 100 * ((learned / usual) ** 0.5 - 1)
        assert change < 0
        assert table["change"][number] == f"{change:+.0f} %"


def test_an_error_that_is_too_small_to_measure_is_said_to_be():
    assert _cli._described_error(0.04) == "0.200 of the noise"
    assert _cli._described_error(-1e-4) == "below what can be measured"


def test_the_figure_is_small(calibrated):
    folder, _, _ = calibrated
    assert (folder / "radii.png").stat().st_size < 100_000
    with Image.open(folder / "radii.png") as image:
        assert image.size[0] == 1050


@pytest.mark.parametrize("channel", [1, 2])
def test_an_estimate_takes_the_radii_of_its_channel(channel, calibrated, folder):
    source, _, movies = calibrated
    module = SpatialMean.from_json((source / "radii.json").read_text())
    movie = str(source / f"{('first', 'second')[channel - 1]}.tif")
    arguments = ["estimate", movie, "--calibration", str(source / "radii.json")]
    result = CliRunner().invoke(
        app, [*arguments, "--channel", str(channel), "--out", "bkgd.tif"]
    )
    assert result.exit_code == 0, result.output
    background = module(list(movies))
    # Some ten float32 roundings.
    np.testing.assert_allclose(
        tifffile.imread("bkgd.tif"), background.bkgds[channel - 1], rtol=2e-6
    )
    y, x = module.radii_pix[channel - 1]
    assert f"{y:g} px in y, {x:g} px in x" in result.stdout
    assert f"{background.noise_corrections[channel - 1]:.4f} (exact)" in result.stdout


def test_a_module_with_one_row_of_radii_needs_no_channel(folder):
    module = SpatialMean((3.0, 5.0), truncation="hard")
    Path("radii.json").write_text(module.to_json())
    frames = _frames()
    _write("movie.tif", frames)
    result = CliRunner().invoke(
        app, ["estimate", "movie.tif", "--calibration", "radii.json", "--out", "bkgd.tif"]
    )
    assert result.exit_code == 0, result.output
    _assert_is_background_of(tifffile.imread("bkgd.tif"), frames, (3, 5))


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["two.json"], "two.json: has 2 channels.*--channel"),
        (["two.json", "--channel", "3"], "--channel 3: two.json has 2"),
        (["two.json", "--channel", "1", "--radius", "7"], "leave one of them out"),
        (["none.json"], "none.json: cannot be read .No such file"),
        (["folder"], "folder: cannot be read .Is a directory"),
        (["movie.tif"], "movie.tif: is no calibration, and no text"),
        (["text.json"], "text.json: is no calibration: .*no JSON"),
        (["other.json"], "other.json: is no calibration: .*jaxbkgd.SpatialMean"),
        (["words.json"], "words.json: is no calibration: .*radius must be a number"),
    ],
)
def test_a_calibration_that_does_not_fit_is_one_line(arguments, pattern, folder):
    _write("movie.tif", _frames(2))
    two = SpatialMean([[7.0, 7.0], [5.0, 5.0]]).to_json()
    Path("two.json").write_text(two)
    Path("text.json").write_text("radius 7\nradius 5")
    Path("other.json").write_text('{"radius": 7}')
    Path("words.json").write_text(json.dumps(json.loads(two) | {"radii_pix": [["a", "b"]]}))
    Path("folder").mkdir()
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(
        app, ["estimate", "movie.tif", "--out", "bkgd.tif", "--calibration", *arguments]
    )
    _assert_one_line(result, pattern)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["movie.tif", "short.tif"], "movie.tif, short.tif: .*10, 2 frames"),
        (["short.tif"], "short.tif: .*2 frames"),
        (["movie.tif", "--lag", "10"], "movie.tif: .*10 frames.*lag of 10"),
        (["nan.tif"], "nan.tif: Frame 3 holds nan at y = 4, x = 5"),
        (["still.tif"], "still.tif: .*nothing changes"),
        (["none.tif"], "none.tif: no such file"),
        (["text.tif"], "text.tif: .*not a TIFF"),
        (["two.tif"], "two.tif: holds 2 channels; save each as a file"),
        (["movie.tif", "--radius", "seven"], "--radius seven: .*nor a pair"),
        (
            ["movie.tif", "--max-radius", "5"],
            "--max-radius 5: must be more than --radius 7,7",
        ),
        (["movie.tif", "--max-radius", "nan"], "--max-radius nan: .*must be positive"),
        (["movie.tif", "--out", "movie.tif", "--overwrite"], "ends in .json"),
        (["movie.tif", "--figure", "movie.tif", "--overwrite"], "ends in .png"),
        (["movie.tif", "--out", "there.json"], "there.json: exists.*--overwrite"),
        (["movie.tif", "--figure", "there.png"], "there.png: exists.*--overwrite"),
        (["movie.tif", "--out", "pipe.json", "--overwrite"], "not a regular file"),
        (["movie.tif", "--out", "none/radii.json"], "no folder none.*make"),
        (["movie.tif", "--out", f"{'long' * 100}.json"], "name too long"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(arguments, pattern, folder):
    frames = _frames(dtype="float32")
    _write("movie.tif", frames)
    _write("short.tif", frames[:2])
    _write("still.tif", np.ones_like(frames))
    both = np.stack([frames, frames], axis=1)
    tifffile.imwrite("two.tif", both, imagej=True, metadata={"axes": "TCYX"})
    blemished = frames.copy()
    blemished[3, 4, 5] = np.nan
    _write("nan.tif", blemished)
    for name in ("text.tif", "there.json", "there.png"):
        Path(name).write_text("precious")
    os.mkfifo("pipe.json")
    before = sorted(folder.iterdir())
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    _assert_one_line(result, pattern)
    assert sorted(folder.iterdir()) == before
    assert Path("there.json").read_text() == Path("there.png").read_text() == "precious"


def _instead_of_calibrating(estimator, channels, *, steps, **options):
    """Warns, and takes the first radii."""
    warnings.warn("Molecules stay on\nfor long.", stacklevel=2)
    axes = (1, *estimator.radii_pix.shape)
    return estimator, _calibrate.History(
        losses=np.zeros(1),
        radii_pix=np.asarray(estimator.radii_pix).reshape(axes),
        radii_std_pix=np.full(axes[1:], np.nan),
        is_at_bound=np.zeros(axes[1:], bool),
        is_converged=False,
        stop_reason=f"all {steps} steps were used up",
        objective=FramePairLoss(1),
    )


def test_a_search_that_has_not_ended_and_its_warnings_are_told(folder, monkeypatch):
    monkeypatch.setattr(_calibrate, "calibrate", _instead_of_calibrating)
    _write("movie.tif", _frames())
    Path("calibration.json").write_text("old")
    Path("calibration.png").write_text("old")
    arguments = ["calibrate", "movie.tif", "--radius", "3", "--steps", "1", "--overwrite"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == "jaxbkgd: Molecules stay on for long.\n"
    for text in ("3.00 px, uncertainty unknown", "1 frame\n", "no: all 1 steps"):
        assert text in result.stdout
    fields = json.loads(Path("calibration.json").read_text())
    # One number is one radius for both axes.
    assert fields["radii_pix"] == [[3.0]]
    assert fields["calibration"]["radii_std_pix"] == [[None, None]]
    with Image.open("calibration.png") as image:
        image.load()


@pytest.mark.parametrize("broken", ["save_calibration_figure", "calibrate"])
def test_an_interruption_of_a_calibration_leaves_nothing_half(broken, folder, monkeypatch):
    def interrupt(*arguments, **options):
        if broken == "save_calibration_figure":
            arguments[0].write_text("half")
        raise KeyboardInterrupt

    module = _calibrate if broken == "calibrate" else _figures
    monkeypatch.setattr(_calibrate, "calibrate", _instead_of_calibrating)
    monkeypatch.setattr(module, broken, interrupt)
    _write("movie.tif", _frames())
    result = CliRunner().invoke(app, ["calibrate", "movie.tif"])
    assert result.exit_code == 130
    left = {"movie.tif"} | ({"calibration.json"} if broken != "calibrate" else set())
    assert {path.name for path in folder.iterdir()} == left

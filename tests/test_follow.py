"""Movies are estimated while they are written: the clock is that of the writer, which goes
on with each look at its movie."""

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
import zarr
from conftest import MovingSum
from typer.testing import CliRunner

import jaxbkgd
from jaxbkgd import Background, MovieError
from jaxbkgd._batch import follow, run
from jaxbkgd._cli.app import app


CHUNK, REACH, SILENCE = 4, 2, 1.0
FRAMES = np.random.default_rng(3).integers(1, 1000, (38, 12, 16)).astype("<u2")

# A writer goes on until its next `yield`, of the number of frames that are complete.
Writer = Iterator[int]


class Clock:
    """In place of the module `time`: while the follower sleeps, the writer writes."""

    def __init__(self, writer: Writer, on_sleep: Callable[[int], None] = lambda _: None):
        self.now, self.complete = 0.0, 0
        self._writer, self._on_sleep = writer, on_sleep

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._on_sleep(self.complete)
        self.complete = next(self._writer, self.complete)


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., jaxbkgd.MovieSummary]:
    """Follows what a writer writes."""

    def estimate(path: Path, writer: Writer, sink: Any, on_sleep=None, **options: Any):
        monkeypatch.setattr(follow, "time", Clock(writer, on_sleep or (lambda _: None)))
        options = {"chunk_frames": CHUNK, "follow": SILENCE, "workers": 1} | options
        estimator = options.pop("estimator", MovingSum(REACH))
        return jaxbkgd.estimate_movie(path, estimator, sink, progress=False, **options)

    return estimate


def expected(frames: np.ndarray = FRAMES) -> np.ndarray:
    return np.asarray(MovingSum(REACH)(frames).bkgds)


def read(path: Path) -> np.ndarray:
    with jaxbkgd.open_movie(path) as movie:
        return np.asarray(movie)[:, 0]


def in_halves(file: Any, content: bytes) -> Iterator[None]:
    for half in (content[: len(content) // 2], content[len(content) // 2 :]):
        file.write(half)
        file.flush()
        yield


def write_dax(path: Path, frames: np.ndarray = FRAMES) -> Writer:
    header = f"frame dimensions = {frames.shape[2]} x {frames.shape[1]}\n"
    header += "data type = 16 bit integers (binary, little endian)\nnumber of frames = "
    yield 0
    path.with_suffix(".inf").write_text(f"{header}1\n")
    with path.open("wb") as file:
        for number, frame in enumerate(frames):
            yield from (number for _ in in_halves(file, frame.tobytes()))
    path.with_suffix(".inf").write_text(f"{header}{len(frames)}\n")
    yield len(frames)


def write_tiff(path: Path, frames: np.ndarray = FRAMES, **options: Any) -> Writer:
    """Page after page, each in two parts."""
    with tifffile.TiffWriter(path) as writer:
        for frame in frames:
            writer.write(frame, photometric="minisblack", metadata=None, **options)
    with tifffile.TiffFile(path) as tiff:
        ends = [page.dataoffsets[-1] + page.databytecounts[-1] for page in tiff.pages]
    whole, start = path.read_bytes(), 0
    with path.open("wb") as file:
        for number, end in enumerate(ends):
            yield from (number for _ in in_halves(file, whole[start:end]))
            start = end
        file.write(whole[start:])
    yield len(frames)


def write_series(path: Path) -> Writer:
    path.mkdir()
    for start in range(0, len(FRAMES), 10):
        part = FRAMES[start : start + 10]
        name = path / f"movie_part{start // 10 + 1}.tif"
        yield from (start + count for count in write_tiff(name, part))


def write_zarr(path: Path) -> Writer:
    """With its shape before its chunks, of which a frame is a part."""
    options = {"chunks": (3, *FRAMES.shape[1:]), "dtype": "u2", "compressors": None}
    array = zarr.create_array(path, shape=(2, *FRAMES.shape[1:]), **options)
    array[:] = FRAMES[:2]
    for start in range(2, len(FRAMES), 4):
        stop = min(start + 4, len(FRAMES))
        array.resize((stop, *FRAMES.shape[1:]))
        yield start
        array[start:stop] = FRAMES[start:stop]
        yield start
    yield len(FRAMES)


def write_full_zarr(path: Path) -> Writer:
    options = {"chunks": (3, *FRAMES.shape[1:]), "dtype": "u2", "compressors": None}
    array = zarr.create_array(path, shape=FRAMES.shape, **options)
    for number, frame in enumerate(FRAMES):
        array[number] = frame
        yield number // 3 * 3
    yield len(FRAMES)


def write_ndtiff(path: Path) -> Writer:
    """As its library does: files of their full size, and an index that is written late."""
    path.mkdir()
    size, last = FRAMES[0].nbytes, 0
    summary = json.dumps({"PixelSize_um": 0.1, "Interval_ms": 10}).encode()
    with (path / "NDTiff.index").open("wb") as index:
        for start in range(0, len(FRAMES), 20):
            name = f"NDTiffStack{f'_{start // 20}' * (start > 0)}.tif"
            with (path / name).open("wb", buffering=0) as file:
                file.truncate(21 * (size + 400))
                place = 28 + len(summary) + len(summary) % 2
                head = struct.pack("<2sHI", b"II", 42, place)
                head += struct.pack("<5I", 483729, 3, 3, 2355492, len(summary))
                file.write(head + summary)
                for number in range(start, min(start + 20, len(FRAMES))):
                    about = json.dumps({"number": number}).encode()
                    file.seek(place)
                    pixels = place + 2 + 13 * 12 + 4 + 16
                    following = pixels + size + len(about) + (size + len(about)) % 2
                    pages = page_directory(place, pixels, about, following)
                    axes = json.dumps({"time": number}).encode()
                    entry = struct.pack("<I", len(axes)) + axes
                    entry += struct.pack("<I", len(name)) + name.encode()
                    numbers = (pixels, 16, 12, 1, 0, pixels + size, len(about), 0)
                    entry += struct.pack("<8I", *numbers)
                    yield from (number for _ in in_halves(index, entry))
                    content = pages + FRAMES[number].tobytes() + about
                    yield from (number for _ in in_halves(file, content))
                    last, place = place + 2 + 13 * 12, following
                file.seek(last)
                file.write(bytes(4))
                file.truncate(place)
    yield len(FRAMES)


def page_directory(place: int, pixels: int, about: bytes, following: int) -> bytes:
    """One of Micro-Manager's, with the place of the next one before that is there."""
    height, width = FRAMES.shape[1:]
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 1), (273, 4, 1, pixels), (277, 3, 1, 1), (278, 3, 1, height)]
    tags += [(279, 4, 1, FRAMES[0].nbytes), (282, 5, 1, pixels - 16)]
    tags += [(283, 5, 1, pixels - 8), (296, 3, 1, 3)]
    tags += [(51123, 2, len(about), pixels + FRAMES[0].nbytes)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    ends = struct.pack("<I4I", following, 100_000, 1, 100_000, 1)
    return struct.pack("<H", len(tags)) + directory + ends


def write_micromanager(path: Path) -> Writer:
    """Files of their full size, where only the next page says that one is there."""
    size, names = FRAMES[0].nbytes, [path, path.with_name("x_MMStack_Pos0_1.ome.tif")]
    summary, last = json.dumps({"Channels": 1, "Positions": 1}).encode(), 0
    for name, start, stop in zip(names, (0, 20), (20, len(FRAMES)), strict=True):
        with name.open("wb", buffering=0) as file:
            file.truncate(21 * (size + 400))
            place = 40 + len(summary) + len(summary) % 2
            head = struct.pack("<2sHI8I", b"II", 42, place, 54773648, *[0] * 5, 2355492, 0)
            file.write(head)
            for number in range(start, stop):
                about = json.dumps({"number": number}).encode()
                file.seek(place)
                pixels = place + 2 + 13 * 12 + 4 + 16
                following = pixels + size + len(about) + (size + len(about)) % 2
                content = page_directory(place, pixels, about, following)
                content += FRAMES[number].tobytes() + about
                yield from (number for _ in in_halves(file, content))
                last, place = place + 2 + 13 * 12, following
            file.seek(last)
            file.write(bytes(4))
            file.truncate(place)
    yield len(FRAMES)


WRITERS: dict[str, tuple[str, Callable[[Path], Writer]]] = {
    "DAX": ("movie.dax", write_dax),
    "TIFF": ("movie.tif", write_tiff),
    "compressed TIFF": ("movie.tif", lambda p: write_tiff(p, compression="zlib")),
    "series": ("movie", write_series),
    "Zarr": ("movie.zarr", write_zarr),
    "full Zarr": ("movie.zarr", write_full_zarr),
    "NDTiff": ("movie", write_ndtiff),
    "Micro-Manager": ("x_MMStack_Pos0.ome.tif", write_micromanager),
}


def count_done(sink: Path) -> int:
    journal = sink.with_name(f"{sink.name}.part.journal")
    return len(journal.read_bytes().splitlines()) - 1 if journal.exists() else 0


# What of the frames that are complete a format shows only later.
LATE = {"Zarr": 4, "full Zarr": 3, "NDTiff": 0, "DAX": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*was not finished:UserWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_windows_are_estimated_as_their_frames_come(kind, run_with, tmp_path):
    name, write = WRITERS[kind]
    sink, path, behind = tmp_path / "out.tif", tmp_path / name, []
    seen: list[int] = []

    def note(complete: int) -> None:
        shown = complete - LATE.get(kind, 1)
        # Windows see as many frames, and so the first ones those behind their halo.
        ready = max(0, (shown - CHUNK - 2 * REACH) // CHUNK + 1) if shown >= 0 else 0
        seen.append(ready)
        behind.append(ready - count_done(sink))

    summary = run_with(path, write(path), sink, note)
    count = len(FRAMES)
    # Without OME-XML, the second file of Micro-Manager is no part of what is read later.
    assert summary.frames == (count - 1 if kind == "Micro-Manager" else count)
    np.testing.assert_array_equal(read(sink), expected(FRAMES[: summary.frames]))
    assert max(behind) <= 0
    assert max(seen) > 5
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.tif"]


@pytest.mark.parametrize("suffix", ["tif", "ome.tif", "zarr", "ome.zarr", "raw"])
def test_a_follower_that_was_killed_goes_on(suffix, run_with, tmp_path):
    """In each kind of file, whose content is that of a movie that is estimated later."""
    path, sink = tmp_path / "movie.dax", tmp_path / f"out.{suffix}"
    writer = write_dax(path)

    def kill(complete: int) -> None:
        if complete == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as killed:
        run_with(path, writer, sink, kill)
    assert "the finished part is kept" in killed.value.__notes__[0]
    assert not sink.exists()
    summary = run_with(path, writer, sink)
    assert summary.resumed_frames >= 12
    assert summary.frames == len(FRAMES)
    np.testing.assert_array_equal(read(sink), expected())
    later = tmp_path / f"later.{suffix}"
    jaxbkgd.estimate_movie(path, MovingSum(REACH), later, progress=False)
    with jaxbkgd.open_movie(sink) as one, jaxbkgd.open_movie(later) as other:
        assert one.format == other.format
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.filterwarnings("ignore:.*was not finished:UserWarning")
def test_a_movie_that_went_on_after_its_end_is_not_taken_for_done(
    run_with, tmp_path, monkeypatch
):
    path, sink = tmp_path / "movie.dax", tmp_path / "out.tif"
    writer = write_dax(path)
    stopped = itertools.takewhile(lambda complete: complete < 20, writer)

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jaxbkgd._movies.sinks.Sink.give_name", refuse)
        with pytest.raises(KeyboardInterrupt):
            run_with(path, stopped, sink)
    assert count_done(sink) == 5
    summary = run_with(path, writer, sink)
    assert summary.frames == len(FRAMES)
    np.testing.assert_array_equal(read(sink), expected())


@pytest.mark.filterwarnings("ignore:.*was not finished:UserWarning")
@pytest.mark.parametrize(("pauses", "frames"), [(15, 38), (25, 10)])
def test_silence_ends_a_movie(pauses, frames, run_with, tmp_path):
    def paused(writer: Writer) -> Writer:
        for complete in writer:
            yield complete
            yield from [complete] * (pauses * (complete == 10))

    path, sink = tmp_path / "movie.dax", tmp_path / "out.tif"
    assert frames == run_with(path, paused(write_dax(path)), sink).frames
    np.testing.assert_array_equal(read(sink), expected(FRAMES[:frames]))


@pytest.mark.parametrize("kind", ["DAX", "TIFF", "compressed TIFF", "Zarr", "NDTiff"])
@pytest.mark.parametrize("is_removed", [True, False])
def test_a_movie_that_is_cut_or_removed_is_named(kind, is_removed, run_with, tmp_path):
    name, write = WRITERS[kind]
    path, sink = tmp_path / name, tmp_path / "out.tif"

    def stopped() -> Writer:
        yield from itertools.takewhile(lambda complete: complete < 30, write(path))
        if is_removed:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.suffix == ".zarr":
            zarr.open_array(path).resize((4, *FRAMES.shape[1:]))
        else:
            file = path / "NDTiffStack.tif" if path.is_dir() else path
            os.truncate(file, 4 * FRAMES[0].nbytes)

    with pytest.raises(MovieError, match=name) as raised:
        run_with(path, stopped(), sink)
    assert "the finished part is kept" in raised.value.__notes__[0]
    assert not sink.exists()


def test_frames_that_were_written_again_are_refused(run_with, tmp_path):
    """As those of a file that has its size before its frames."""
    path, sink = tmp_path / "movie.tif", tmp_path / "out.tif"

    def fill() -> Writer:
        pixels = tifffile.memmap(path, shape=FRAMES.shape, dtype="u2")
        for number, frame in enumerate(FRAMES):
            pixels[number] = frame
            pixels.flush()
            yield number + 1

    with pytest.raises(MovieError, match="frame 36 was written again after it had been"):
        run_with(path, fill(), sink)


@pytest.mark.filterwarnings("ignore:.*was not finished:UserWarning")
def test_frames_that_were_written_again_are_not_resumed(run_with, tmp_path):
    path, sink, other = tmp_path / "movie.dax", tmp_path / "out.tif", FRAMES.copy()
    other[10:] += 1

    def replace() -> Writer:
        yield from itertools.takewhile(lambda complete: complete < 20, write_dax(path))
        path.write_bytes(other.tobytes())

    with pytest.raises(MovieError, match="was written again") as raised:
        run_with(path, replace(), sink)
    assert not hasattr(raised.value, "__notes__")
    assert run_with(path, iter(()), sink).resumed_frames == 0
    np.testing.assert_array_equal(read(sink), expected(other))


@pytest.mark.slow
def test_channels_that_only_the_end_of_a_movie_tells_are_refused(run_with, tmp_path):
    """As those of an OME-TIFF, whose header is written last."""
    path, sink = tmp_path / "movie.ome.tif", tmp_path / "out.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"photometric": "minisblack", "contiguous": False}
        writer.write(FRAMES.reshape(19, 2, 12, 16), metadata={"axes": "TCYX"}, **options)
    whole = path.read_bytes()
    start, end = whole.index(b"<?xml"), whole.index(b"</OME>") + len(b"</OME>")

    def finish() -> Writer:
        path.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
        yield 37
        path.write_bytes(whole)

    text = r"as \(2, 12, 16\) .* now, but as \(1, 12, 16\) before"
    with pytest.raises(MovieError, match=text):
        run_with(path, finish(), sink)
    run_with(path, iter(()), sink)
    with jaxbkgd.open_movie(sink) as movie:
        np.testing.assert_array_equal(movie.channels[1][:], expected(FRAMES[1::2]))


def test_a_writer_that_is_killed_within_a_frame_leaves_the_frames_before_it(
    run_with, tmp_path
):
    path, sink = tmp_path / "movie.tif", tmp_path / "out.tif"
    half = itertools.islice(write_tiff(path), 41)
    with pytest.warns(UserWarning, match=r"page 20 is truncated.*not finished, and 19"):
        assert run_with(path, half, sink).frames == 19
    np.testing.assert_array_equal(read(sink), expected(FRAMES[:19]))


def test_a_tiff_that_has_its_directories_in_the_end_is_estimated_then(run_with, tmp_path):
    path, sink = tmp_path / "movie.tif", tmp_path / "out.tif"

    def write() -> Writer:
        with tifffile.TiffWriter(path) as writer:
            for frame in FRAMES:
                writer.write(frame, photometric="minisblack", contiguous=True)
                yield 0

    assert run_with(path, write(), sink).frames == len(FRAMES)
    np.testing.assert_array_equal(read(sink), expected())


@pytest.mark.slow
def test_look_ahead_frames_are_seen_behind_a_chunk(run_with, tmp_path):
    path, sink, done = tmp_path / "movie.dax", tmp_path / "out.tif", {}

    def note(complete: int) -> None:
        done.setdefault(complete, count_done(sink))

    options = {"look_ahead_frames": 1, "chunk_frames": 1, "estimator": MovingSum(3)}
    run_with(path, write_dax(path), sink, note, **options)
    found = read(sink)
    for number in range(3, len(FRAMES) - 4):
        seen = FRAMES[number - 3 : number + 2]
        np.testing.assert_array_equal(found[number], seen.astype(np.float32).sum(axis=0))
    # Frame 18 is written once frame 19 is there.
    assert done[20] == 19


class BlockSum(MovingSum):
    """The sum over a block of four frames, of the pixels that count."""

    takes_weights: ClassVar[bool] = True

    @property
    def aligned_frames(self) -> int:
        return 4

    def estimate_stack(self, frames: Any, weights: Any = None) -> Background:
        counted = jnp.asarray(frames, float) * (1 if weights is None else weights)
        padded = jnp.pad(counted, [(0, -len(frames) % 4), (0, 0), (0, 0)])
        sums = padded.reshape(-1, 4, *frames.shape[1:]).sum(axis=1)
        return Background(jnp.repeat(sums, 4, axis=0)[: len(frames)], jnp.ones(()))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(4))
def test_blocks_of_frames_weights_and_boxes_are_followed(start, run_with, tmp_path):
    path, sinks = tmp_path / "movie.dax", [tmp_path / "a.tif", tmp_path / "b.tif"]
    is_good = np.ones((12, 16), bool)
    is_good[3, 4] = False
    boxes = [(0, 0, 8, 12), (8, 0, 16, 12)]
    options = {"boxes": boxes, "weights": is_good, "frames": slice(start, None)}
    estimator = BlockSum(3)
    run_with(path, write_dax(path), sinks, estimator=estimator, chunk_frames=5, **options)
    frames = (FRAMES * is_good)[start:].astype(np.float32)
    whole = np.asarray(estimator(frames).bkgds)
    np.testing.assert_array_equal(read(sinks[0]), whole[..., :8])
    np.testing.assert_array_equal(read(sinks[1]), whole[..., 8:])


@pytest.mark.slow
def test_a_calibration_sees_the_first_frames(run_with, tmp_path, monkeypatch):
    path, lengths = tmp_path / "movie.dax", []
    estimator = jaxbkgd.SpatialMean(1.5)

    def calibrate(movie: jaxbkgd.Movie, **_: Any):
        lengths.append(movie.shape[0])
        return estimator, None

    monkeypatch.setattr(run, "calibrate", calibrate)
    monkeypatch.setattr(run, "CALIBRATION_FRAMES", 20)
    run_with(path, write_dax(path), None, estimator=None)
    assert lengths == [20]
    written = read(tmp_path / "movie-background.tif")
    np.testing.assert_array_equal(written, estimator(FRAMES.astype(np.float32)).bkgds)


def test_what_cannot_be_followed_is_refused(run_with, tmp_path):
    path = tmp_path / "movie.dax"
    with pytest.raises(MovieError, match=r"no such file"):
        run_with(path, iter(()), tmp_path / "out.tif")
    with pytest.raises(MovieError, match=r"length is not known; give a path"):
        run_with(path, write_dax(path), np.zeros(FRAMES.shape, np.float32))
    estimator = jaxbkgd.LocalMean(1.5, 1.5, clip=None)
    path = tmp_path / "other.dax"
    weights = np.ones((4, *FRAMES.shape[1:]))
    stopped = itertools.takewhile(lambda complete: complete < 5, write_dax(path))
    with pytest.raises(ValueError, match=r"Weights of each frame are not followed"):
        run_with(
            path, stopped, None, weights=weights, estimator=estimator, frames=slice(3, None)
        )
    with pytest.raises(ValueError, match=r"follow must be .*0"):
        run_with(path, iter(()), tmp_path / "out.tif", follow=0.0)
    with pytest.raises(ValueError, match="is for a movie with follow=True"):
        run_with(path, iter(()), None, follow=False, look_ahead_frames=1)


@pytest.mark.slow
def test_the_command_follows(tmp_path):
    path = tmp_path / "movie.dax"
    for _ in write_dax(path):
        pass
    arguments = ["estimate", str(path), "--follow", "--silence", "0.01", "--radius", "2"]
    result = CliRunner().invoke(app, [*arguments, "--look-ahead-frames", "0"])
    assert result.exit_code == 0, result.output
    assert "38 of 12 x 16 px" in result.stdout
    result = CliRunner().invoke(app, ["estimate", str(path), "--look-ahead-frames", "0"])
    assert "--look-ahead-frames 0: needs --follow" in result.stderr
    later = np.asarray(jaxbkgd.SpatialMean(2.0)(FRAMES).bkgds)
    np.testing.assert_array_equal(read(tmp_path / "movie-background.tif"), later)

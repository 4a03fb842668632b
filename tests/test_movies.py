"""Movies are read lazily by frame, and written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from jaxbkgd import _movies
from jaxbkgd._movies import MovieError, open_movie, TiffWriter


SHAPE = (7, 12, 10)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def _write_pages(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack")


def _write_page_by_page(path: Path, frames: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as writer:
        for frame in frames:
            writer.write(frame, photometric="minisblack")


def _write_bigtiff(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", bigtiff=True)


def _write_big_endian(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", byteorder=">")


def _write_deflated_tiles(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(
        path, frames, photometric="minisblack", compression="zlib", tile=(16, 16)
    )


def _write_imagej(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, imagej=True, metadata={"axes": "TYX"})


def _write_imagej_with_one_page(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, imagej=True, metadata={"axes": "TYX"}, truncate=True)


def _write_one_big_endian_page(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", truncate=True, byteorder=">")


def _write_ome(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(
        path, frames, ome=True, photometric="minisblack", metadata={"axes": "TYX"}
    )


@pytest.mark.parametrize(
    "write",
    [
        _write_pages,
        _write_page_by_page,
        _write_bigtiff,
        _write_big_endian,
        _write_deflated_tiles,
        _write_imagej,
        _write_imagej_with_one_page,
        _write_one_big_endian_page,
        _write_ome,
    ],
)
def test_any_tiff_stack_reads_the_same_frames(write, frames, tmp_path):
    path = tmp_path / "movie.tif"
    write(path, frames)
    with open_movie(path) as movie:
        assert movie.shape == SHAPE
        assert len(movie) == SHAPE[0]
        assert movie.dtype == np.uint16
        assert movie.dtype.isnative
        for part in (slice(None), slice(0, 3), slice(3, 7), slice(6, 99), slice(5, 2)):
            np.testing.assert_array_equal(movie[part], frames[part])
            assert movie[part].dtype == np.uint16


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_real_dtype_is_read_as_it_was_stored(dtype, byteorder, tmp_path):
    frames = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "movie.tif"
    tifffile.imwrite(path, frames, photometric="minisblack", byteorder=byteorder)
    with open_movie(path) as movie:
        assert movie.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(movie[:], frames)


def test_hyperstack_axes_become_frames_in_their_order(tmp_path):
    frames = np.arange(3 * 2 * 4 * 5 * 6).reshape(3, 2, 4, 5, 6).astype(np.uint16)
    path = tmp_path / "movie.tif"
    tifffile.imwrite(path, frames, imagej=True, metadata={"axes": "TZCYX"})
    with open_movie(path) as movie:
        np.testing.assert_array_equal(movie[:], frames.reshape(24, 5, 6))


def test_steps_are_refused(frames, tmp_path):
    path = tmp_path / "movie.tif"
    _write_pages(path, frames)
    with open_movie(path) as movie, pytest.raises(ValueError, match="step 2"):
        movie[::2]


def _read_or_error(path: Path) -> np.ndarray | str:
    try:
        with open_movie(path) as movie:
            return movie[:]
    except MovieError as error:
        return str(error)


def test_a_file_cut_anywhere_is_never_read_as_a_whole_movie(frames, tmp_path):
    for write in (
        _write_pages,
        _write_page_by_page,
        _write_deflated_tiles,
        _write_imagej,
        _write_imagej_with_one_page,
        _write_ome,
    ):
        whole, cut = tmp_path / "whole.tif", tmp_path / "cut.tif"
        write(whole, frames)
        content = whole.read_bytes()
        # Every length would take long; a prime step meets every kind of place.
        for length in range(1, len(content), 53):
            cut.write_bytes(content[:length])
            result = _read_or_error(cut)
            if isinstance(result, str):
                assert result.startswith(f"{cut}: ")
                assert "\n" not in result
            else:
                # Only what lies behind the last page and pixel can be missed.
                np.testing.assert_array_equal(result, frames)


def test_random_damage_gives_frames_or_one_clear_error(frames, tmp_path):
    random = np.random.default_rng(1)
    path = tmp_path / "movie.tif"
    for write in (_write_page_by_page, _write_deflated_tiles, _write_imagej):
        write(path, frames)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(100):
            damaged = content.copy()
            damaged[random.integers(0, 600, 4)] = random.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            result = _read_or_error(path)
            if isinstance(result, str):
                assert result.startswith(f"{path}: ")
                assert "\n" not in result
            else:
                assert result.ndim == 3


def test_a_movie_cut_while_it_is_read_names_the_frame(tmp_path):
    # Larger than the buffer of an open file, which would hide the cut.
    frames = np.ones((7, 120, 100), np.uint16)
    path = tmp_path / "movie.tif"
    for write in (_write_pages, _write_imagej_with_one_page):
        write(path, frames)
        with open_movie(path) as movie:
            movie[0:2]
            path.write_bytes(path.read_bytes()[: frames[:4].nbytes])
            with pytest.raises(MovieError, match=r"frame [23] of 7"):
                movie[2:7]


def test_a_committed_movie_is_read_by_others(frames, tmp_path):
    path = tmp_path / "bkgd.tif"
    with TiffWriter(path, SHAPE) as writer:
        writer.append(frames[:4].astype(np.float32))
        writer.append(frames[4:].astype(np.float32))
        assert not path.exists()
    written = tifffile.imread(path)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, frames)
    assert list(tmp_path.iterdir()) == [path]


def test_a_movie_beyond_classic_tiff_is_written_as_bigtiff(frames, tmp_path, monkeypatch):
    path = tmp_path / "bkgd.tif"
    for limit, is_bigtiff in ((10**6, False), (1000, True)):
        monkeypatch.setattr(_movies, "_CLASSIC_TIFF_MAX_BYTES", limit)
        with TiffWriter(path, SHAPE, overwrite=True) as writer:
            writer.append(frames.astype(np.float32))
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_bigtiff == is_bigtiff
            np.testing.assert_array_equal(tiff.asarray(), frames)


def _write_then_raise(path: Path, error: type[BaseException]) -> None:
    with TiffWriter(path, SHAPE, overwrite=True) as writer:
        writer.append(np.zeros((3, 12, 10), np.float32))
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(error, tmp_path):
    with pytest.raises(error):
        _write_then_raise(tmp_path / "bkgd.tif", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_file_that_was_to_be_overwritten(tmp_path):
    path = tmp_path / "bkgd.tif"
    path.write_text("precious")
    with pytest.raises(RuntimeError):
        _write_then_raise(path, RuntimeError)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_frames_are_not_committed(frames, tmp_path):
    with (
        pytest.raises(MovieError, match="only 3 of 7"),
        TiffWriter(tmp_path / "bkgd.tif", SHAPE) as writer,
    ):
        writer.append(frames[:3].astype(np.float32))
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="do not fit"),
        TiffWriter(tmp_path / "bkgd.tif", SHAPE) as writer,
    ):
        writer.append(np.zeros((1, 10, 12), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_overwritten(frames, tmp_path):
    path = tmp_path / "bkgd.tif"
    writer = TiffWriter(path, SHAPE)
    writer.append(frames.astype(np.float32))
    path.write_text("precious")
    with pytest.raises(MovieError, match="exists already"):
        writer.commit()
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_through_a_link_replaces_the_file_behind_it(frames, tmp_path):
    behind, link = tmp_path / "behind.tif", tmp_path / "link.tif"
    behind.write_text("old")
    link.symlink_to(behind)
    with TiffWriter(link, SHAPE, overwrite=True) as writer:
        writer.append(frames.astype(np.float32))
    assert link.is_symlink()
    np.testing.assert_array_equal(tifffile.imread(behind), frames)


def test_an_error_of_the_disk_is_one_line_and_leaves_nothing(frames, tmp_path, monkeypatch):
    def fail(self, frames):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TiffWriter, "_write", fail)
    with (
        pytest.raises(MovieError, match=r"bkgd\.tif: .*No space left on device"),
        TiffWriter(tmp_path / "bkgd.tif", SHAPE) as writer,
    ):
        writer.append(frames.astype(np.float32))
    assert list(tmp_path.iterdir()) == []

"""Movies on disk: lazily sliced by frame when read, whole or absent when written."""

import abc
import contextlib
import logging
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import tifffile


# What tifffile logs about a broken file is said once, and better, by a MovieError.
# Without a handler Python would print it to stderr; with this one, only those who
# set logging up see it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# No camera has frames of 2^28 pixels (16384 x 16384): a header that says so lies, and
# believing it would cost gigabytes before the first pixel is read.
_MAX_FRAME_PIXELS = 2**28

# Offsets in classic TIFF have 32 bits; the margin is for the header.
_CLASSIC_TIFF_MAX_BYTES = 2**32 - 2**16
_TIFF_DIRECTORY_BYTES = 512


class MovieError(ValueError):
    """A movie that cannot be read or written; one line says what is wrong, and where.

    The line starts with the path of the file, and ends with the remedy where there is
    one.
    """


class MovieReader(contextlib.AbstractContextManager):
    """A movie of shape `(frames, height, width)` that is read as it is sliced.

    `movie[start:stop]` gives these frames as an array, and keeps none. Those of several
    channels follow each other as they do in the file. A reader is a context manager that
    closes its file; it is not thread-safe.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice) -> np.ndarray:
        start, stop, step = frames.indices(len(self))
        if step != 1:
            raise ValueError(
                f"a movie is read by consecutive frames, not with step {step}; "
                "slice the array that was read instead"
            )
        return self._read(start, max(start, stop))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def count_channels(self) -> int:
        """Channels whose frames follow each other in the file, as its axes say."""

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray:
        """Frames `start` to `stop`, in native byte order."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file."""


class MovieWriter(contextlib.AbstractContextManager):
    """Writes float32 frames to a file that appears only when it is complete.

    Frames go to a temporary file in the folder of `path`. `commit` checks that all
    `shape[0]` frames came and gives the file its name; `abort` removes it. As a context
    manager it commits, or aborts on any exception, a KeyboardInterrupt included.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.shape = shape
        self._frames_written = 0
        self._overwrite = overwrite
        # Through a symbolic link, it is the file behind that is written.
        self._destination = Path(os.path.realpath(path))
        self._check_destination()
        # Short, so that a name that fits the file system does not outgrow it here.
        self._temporary = self._destination.with_name(f".{secrets.token_hex(6)}.part")
        try:
            self._file: BinaryIO = self._temporary.open("x+b")
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._begin()
        except OSError as error:
            self.abort()
            raise self._failure(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def append(self, frames: np.ndarray) -> None:
        """Write the next `frames`, of shape `(any, height, width)`."""
        if frames.ndim != 3 or frames.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"frames of shape {frames.shape} do not fit a movie of shape "
                f"{self.shape}; pass (any, {self.shape[1]}, {self.shape[2]})"
            )
        try:
            self._write(np.ascontiguousarray(frames, dtype=np.float32))
        except OSError as error:
            raise self._failure(error) from error
        self._frames_written += len(frames)

    def commit(self) -> None:
        """Complete the file and give it its name; abort if that fails."""
        try:
            if self._frames_written != self.shape[0]:
                raise MovieError(
                    f"{self.path}: not written, because only {self._frames_written} "
                    f"of {self.shape[0]} frames came"
                )
            self._finish()
            self._file.close()
            self._check_destination()
            self._temporary.replace(self._destination)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written, unless it has been committed."""
        try:
            self._file.close()
        except OSError:
            # Closing flushes, which fails on a full disk; the file goes all the same.
            pass
        finally:
            self._temporary.unlink(missing_ok=True)

    def _check_destination(self) -> None:
        folder = self.path.parent
        if not self._destination.parent.is_dir():
            raise MovieError(
                f"{self.path}: cannot be written, because there is no folder {folder}; "
                "make it first, or choose another place"
            )
        if self._destination.is_dir():
            raise MovieError(
                f"{self.path}: is a folder; give the name of a file in it instead"
            )
        if not os.path.lexists(self._destination):
            return
        if not self._overwrite:
            raise MovieError(
                f"{self.path}: exists already; choose another name, or overwrite it "
                "(in the command line: --overwrite)"
            )
        if not self._destination.is_file():
            raise MovieError(
                f"{self.path}: is not a regular file, so it is not overwritten; choose "
                "another name"
            )

    def _failure(self, error: OSError) -> MovieError:
        # NumPy does not say why it wrote less than it was given.
        reason = error.strerror or f"{_one_line(error)}; is the disk full?"
        return MovieError(f"{self.path}: cannot be written ({reason})")

    @abc.abstractmethod
    def _begin(self) -> None:
        """Write what the format wants before the first frame."""

    @abc.abstractmethod
    def _write(self, frames: np.ndarray) -> None:
        """Write contiguous float32 `frames`."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """Write what the format wants after the last frame."""


def open_movie(path: Path) -> MovieReader:
    """Open the movie at `path`: a TIFF or BigTIFF stack.

    **Raises:** MovieError if it is missing, broken, or not a stack of two or more
    single-channel frames of real numbers.
    """
    try:
        if path.is_dir():
            raise MovieError(f"{path}: is a folder; give the movie's file in it")
        if not path.exists():
            raise MovieError(f"{path}: no such file")
        if not path.is_file():
            raise MovieError(f"{path}: is not a regular file; copy the movie to one")
        if path.stat().st_size == 0:
            raise MovieError(f"{path}: is empty")
        return TiffReader(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MovieError(f"{path}: cannot be read ({reason})") from error


class TiffReader(MovieReader):
    """A TIFF or BigTIFF stack: every page a frame, in the order of the file.

    Files that describe a whole stack in their first page alone (ImageJ's above 4 GB,
    MetaMorph's) are read as well. Axes such as time, depth and channel are flattened
    in that order into frames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self._open()
        except (MovieError, OSError):
            self._file.close()
            raise
        except Exception as error:
            # tifffile has no one exception for what a broken file can provoke in it.
            self._file.close()
            raise MovieError(
                f"{path}: its description is broken ({_one_line(error)})"
            ) from error

    def _open(self) -> None:
        self._file_bytes = os.fstat(self._file.fileno()).st_size
        try:
            self._tiff = tifffile.TiffFile(self._file)
        except tifffile.TiffFileError as error:
            raise MovieError(
                f"{self.path}: is not a TIFF file ({_one_line(error)})"
            ) from error
        page = self._tiff.pages.first
        self._check_pixels(page)
        pages = self._count_pages()
        self._stack_offset: int | None = None
        if pages == 1:
            pages = self._count_frames_behind_one_page(page)
        height, width = page.shape
        self.shape = pages, height, width
        self.dtype = np.dtype(page.dtype).newbyteorder("=")
        # A missing codec or a cut end shows before anything is computed.
        self[:1]
        if self._stack_offset is None:
            with self._naming(pages - 1):
                self._page(pages - 1)

    def count_channels(self) -> int:
        # Of its own, since tifffile reads pages in another way once it has looked at axes.
        with tifffile.TiffFile(self.path) as tiff:
            series = tiff.series[0]
            return dict(zip(series.axes, series.shape, strict=True)).get("C", 1)

    def close(self) -> None:
        self._tiff.close()
        self._file.close()

    def _read(self, start: int, stop: int) -> np.ndarray:
        if self._stack_offset is not None:
            return self._read_contiguous(self._stack_offset, start, stop)
        frames = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for index in range(start, stop):
            with self._naming(index):
                frames[index - start] = self._page(index).asarray(maxworkers=1)
        return frames

    def _read_contiguous(self, offset: int, start: int, stop: int) -> np.ndarray:
        stored = self.dtype.newbyteorder(self._tiff.byteorder)
        _, height, width = self.shape
        pixels = height * width
        with self._naming(start):
            frames = np.fromfile(
                self._file,
                stored,
                count=(stop - start) * pixels,
                offset=offset + start * pixels * stored.itemsize - self._file.tell(),
            )
        if frames.size < (stop - start) * pixels:
            raise MovieError(
                f"{self.path}: truncated: the file ends in frame "
                f"{start + frames.size // pixels} of {len(self)}"
            )
        return frames.reshape(-1, height, width).astype(self.dtype, copy=False)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Say which frame it was, whatever goes wrong with it."""
        try:
            yield
        except MovieError:
            raise
        except Exception as error:
            raise MovieError(
                f"{self.path}: frame {index} of {len(self)} cannot be read "
                f"({_one_line(error)})"
            ) from error

    def _page(self, index: int) -> tifffile.TiffPage:
        """The description of a frame, checked against the first one and the file."""
        page = self._tiff.pages[index]
        assert isinstance(page, tifffile.TiffPage)
        height, width = self.shape[1:]
        if page.shape != (height, width) or page.dtype != self.dtype:
            shape = " x ".join(str(length) for length in page.shape)
            raise MovieError(
                f"{self.path}: frame {index} is {shape} px of {page.dtype}, the first "
                f"is {height} x {width} px of {self.dtype}; split the file"
            )
        offsets, counts = page.dataoffsets, page.databytecounts
        is_whole = 0 < len(offsets) == len(counts)
        if is_whole:
            is_whole = max(map(sum, zip(offsets, counts, strict=True))) <= (
                self._file_bytes
            )
        if is_whole and page.compression == 1:
            is_whole = 8 * sum(counts) >= page.bitspersample * page.size
        if not is_whole:
            raise MovieError(
                f"{self.path}: truncated: the pixels of frame {index} of {len(self)} "
                "are not all in the file"
            )
        return page

    def _check_pixels(self, page: tifffile.TiffPage) -> None:
        if page.samplesperpixel > 1:
            raise MovieError(
                f"{self.path}: has {page.samplesperpixel} samples a pixel (colour); "
                "convert it to one grey-scale movie per channel"
            )
        if page.dtype is None or page.dtype.kind not in "uif":
            kind = "an unknown type" if page.dtype is None else page.dtype
            raise MovieError(
                f"{self.path}: has pixels of {kind}; convert them to integers or "
                "floating-point numbers"
            )
        if page.ndim != 2:
            raise MovieError(
                f"{self.path}: has pages of {page.ndim} dimensions; save every frame "
                "as a page of its own"
            )
        height, width = page.shape
        if not 0 < height * width <= _MAX_FRAME_PIXELS:
            raise MovieError(
                f"{self.path}: broken: its header says frames of {height} x {width} px"
            )

    def _count_pages(self) -> int:
        """Follow the chain of pages, which tifffile would cut short without a word."""
        tiff = self._tiff.tiff
        self._file.seek(4 if tiff.offsetsize == 4 else 8)
        seen: set[int] = set()
        while True:
            count = len(seen)
            try:
                (offset,) = struct.unpack(
                    tiff.offsetformat, self._file.read(tiff.offsetsize)
                )
                if offset == 0:
                    return count
                self._file.seek(offset)
                (tags,) = struct.unpack(tiff.tagnoformat, self._file.read(tiff.tagnosize))
            except (struct.error, OverflowError, OSError) as error:
                raise MovieError(
                    f"{self.path}: truncated: the file ends before frame {count}"
                ) from error
            if offset in seen:
                raise MovieError(
                    f"{self.path}: broken: after frame {count - 1} its pages repeat"
                )
            seen.add(offset)
            self._file.seek(tags * tiff.tagsize, os.SEEK_CUR)

    def _count_frames_behind_one_page(self, page: tifffile.TiffPage) -> int:
        series = self._tiff.series[0]
        frames = series.size // page.size
        offset = series.dataoffset
        declared = int((self._tiff.imagej_metadata or {}).get("images", 1))
        if frames == 1 and declared > 1:
            raise MovieError(
                f"{self.path}: truncated: its header says {declared} frames, but they "
                "are not all in the file"
            )
        if frames == 1:
            raise MovieError(
                f"{self.path}: holds a single image, not a movie; give a stack of two "
                "or more frames"
            )
        if offset is None:
            raise MovieError(
                f"{self.path}: holds {frames} frames in one page, in a way that "
                "cannot be read; save every frame as a page of its own"
            )
        if offset + frames * page.nbytes > self._file_bytes:
            whole = max(0, self._file_bytes - offset) // page.nbytes
            raise MovieError(
                f"{self.path}: truncated: the file ends in frame {whole} of {frames}"
            )
        self._stack_offset = offset
        return frames


class TiffWriter(MovieWriter):
    """A TIFF stack of float32, a page per frame; BigTIFF where 4 GB do not hold it."""

    def _begin(self) -> None:
        frames, height, width = self.shape
        size = frames * (4 * height * width + _TIFF_DIRECTORY_BYTES)
        is_bigtiff = size > _CLASSIC_TIFF_MAX_BYTES
        self._tiff = tifffile.TiffWriter(self._file, bigtiff=is_bigtiff)

    def _write(self, frames: np.ndarray) -> None:
        for frame in frames:
            self._tiff.write(frame, contiguous=True, photometric="minisblack")

    def _finish(self) -> None:
        self._tiff.close()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"

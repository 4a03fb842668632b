"""Movies, lazily sliced by frame, whatever holds them."""

import abc
import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


# No camera has frames of 2^28 pixels (16384 x 16384): a header that says so lies, and
# believing it would cost gigabytes before the first pixel is read.
_MAX_FRAME_PIXELS = 2**28

# As many frames, evenly over the movie, tell one movie from another.
_FINGERPRINT_FRAMES = 8

# A part of the camera's frame in pixels, (x0, y0, x1, y1), as smlmlp gives it: from the
# corner (x0, y0) up to (x1, y1), which is outside.
Box = tuple[int, int, int, int]


class MovieError(ValueError):
    """A movie that cannot be read or written; one line says what is wrong, and where.

    The line starts with the name of the movie, and ends with the remedy where there is
    one.
    """


class Movie(contextlib.AbstractContextManager):
    """Frames of one or more channels that are read as they are asked for.

    A movie is a context manager that closes its file. Any number of threads may read it.

    **Attributes:**

    - `name`: what messages call it, a path where it has one.
    - `paths`: the files and folders that it is read from.
    - `format`: what it is, for people.
    - `shape`: (frames, channels, height, width).
    - `dtype`: of the pixels, in native byte order.
    - `pixel_size_um`: (y, x), where the movie says so.
    - `frame_interval_s`: from one frame to the next, where the movie says so.
    """

    name: str
    paths: Sequence[Path] = ()
    format: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None
    # That of its files when it was opened.
    opened_state: Any = None

    @property
    def chunk_frames(self) -> int:
        """Frames that are decoded together, so that reading them apart costs more."""
        return 1

    @abc.abstractmethod
    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        """Frames `start` to `stop`, from 0 and without `stop`, of a channel.

        **Returns:**

        An array (stop - start, height, width) of the movie's `dtype`.

        **Raises:**

        [`jaxbkgd.MovieError`][] where a file is truncated or broken.
        """

    def close(self) -> None:
        """Close what is open."""

    def state(self) -> Any:
        """What changes when the movie is written to, in terms of JSON."""
        return None

    @property
    def channels(self) -> "list[Channel]":
        """The channels, each of the shape (frames, height, width), which are read as they
        are sliced: `movie.channels[0][10:20]` is an array (10, height, width).

        **Raises:**

        When sliced, `TypeError` for what is no slice, `ValueError` for one with a step, and
        what `read` raises.
        """
        return [Channel(self, index) for index in range(self.shape[1])]

    def includes(self, path: Path) -> bool:
        """Whether what is written to this real path would be a part of the movie, or what
        has the name now is."""
        sources = [source.resolve() for source in self.paths]
        return any(
            source == path or source in path.parents or path in source.parents
            for source in sources
        )

    def fingerprint(self) -> str:
        """What tells this movie from another, without reading all of it."""
        about = (self.shape, self.dtype.str, self.opened_state)
        digest = hashlib.sha256(repr(about).encode())
        last = self.shape[0] - 1
        for index in sorted({round(x) for x in np.linspace(0, last, _FINGERPRINT_FRAMES)}):
            for channel in range(self.shape[1]):
                digest.update(self.read(index, index + 1, channel).tobytes())
        return digest.hexdigest()

    def __exit__(self, *error: object) -> None:
        self.close()


class Channel:
    """One channel of a movie, or a box of it: `channel[start:stop]` reads these frames as
    an array (frames, height, width), and keeps none."""

    def __init__(self, movie: Movie, index: int, box: Box | None = None) -> None:
        frames, _, height, width = movie.shape
        x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise MovieError(
                f"{movie.name}: the box {box} is not inside its frames; give x0, y0, x1, "
                f"y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
            )
        self.movie = movie
        self.shape = (frames, y1 - y0, x1 - x0)
        self.dtype = movie.dtype
        self.ndim = 3
        self.index = index
        self.box = x0, y0, x1, y1
        self._inside = (slice(None), slice(y0, y1), slice(x0, x1))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice) -> np.ndarray:
        if not isinstance(frames, slice):
            raise TypeError(
                f"a movie is sliced by frame, as channel[10:20], not by {frames!r}; index "
                "the array that this gives"
            )
        start, stop, step = frames.indices(len(self))
        if step != 1:
            raise ValueError(
                f"a movie is read by consecutive frames, not with step {step}; "
                "slice the array that was read instead"
            )
        read = self.movie.read(start, max(start, stop), self.index)
        return np.ascontiguousarray(read[self._inside])


class ArrayMovie(Movie):
    """An array (frames, height, width) or (frames, channels, height, width) of NumPy, JAX,
    dask or Zarr, sliced as it is read."""

    def __init__(self, array: Any, name: str = "the array") -> None:
        self.name = name
        self.format = f"{type(array).__module__.partition('.')[0]} array"
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise MovieError(
                f"{name}: is a {type(array).__name__}; give a path, or an array of NumPy, "
                "JAX, dask or Zarr"
            )
        if isinstance(array, np.ma.MaskedArray):
            raise MovieError(
                f"{name}: is masked, and its mask would be lost; fill it, or give the mask "
                "as weights"
            )
        if len(array.shape) not in (3, 4):
            raise MovieError(
                f"{name}: has shape {tuple(array.shape)}; give frames of shape (frames, "
                "height, width) or (frames, channels, height, width)"
            )
        self._array = array
        frames, *several, height, width = array.shape
        self.shape = frames, several[0] if several else 1, height, width
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        check_pixels(self)

    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        # A Zarr or dask array reads and computes no more than it is asked for.
        several = len(self._array.shape) == 4
        frames = self._array[start:stop, channel] if several else self._array[start:stop]
        return np.asarray(frames, self.dtype)

    def fingerprint(self) -> str:
        if isinstance(self._array, np.ndarray):
            # Nothing else would tell that it is another one.
            digest = hashlib.sha256(repr((self.shape, self.dtype.str)).encode())
            for frame in self._array:
                digest.update(np.ascontiguousarray(frame).data)
            return digest.hexdigest()
        # The name of a dask array says what it is computed from.
        return super().fingerprint() + str(getattr(self._array, "name", ""))

    def shares_memory(self, other: np.ndarray) -> bool:
        """Whether `other` may be changed by what is written to it."""
        return isinstance(self._array, np.ndarray) and np.may_share_memory(
            self._array, other
        )


class SourceFile:
    """A file that is read from any thread, at any place, and watched for changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self.byte_count = os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()

    def fill(self, array: np.ndarray, offset: int) -> int:
        """Read bytes from `offset` into a contiguous array; gives how many there were."""
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = self._read_into(view[done:], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _read_into(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)

    def state(self) -> list[int]:
        """Of the file that has the name now, which may be another than the open one."""
        status = os.stat(self.path)
        return [status.st_size, status.st_mtime_ns]

    def close(self) -> None:
        self._file.close()


class FramesInFile(Movie):
    """Frames that lie one after the other in a file, from `offset` on; of several channels,
    a frame of each, then the next frame of each."""

    def __init__(
        self,
        file: SourceFile,
        format: str,
        shape: tuple[int, int, int],
        stored: np.dtype,
        offset: int = 0,
        channels: int = 1,
    ) -> None:
        frames, height, width = shape
        self.name = str(file.path)
        self.paths = [file.path]
        self.format = format
        self.shape = frames, channels, height, width
        self.dtype = stored.newbyteorder("=")
        self._file = file
        self._stored = stored
        self._offset = offset
        check_pixels(self)
        whole = max(0, file.byte_count - offset) // (channels * self._plane_bytes)
        if whole < frames:
            raise MovieError(
                f"{self.name}: truncated: the file ends in frame {whole} of {frames} "
                f"({height} x {width} px of {self.dtype}); copy it again, or correct its "
                "header"
            )

    @property
    def _plane_bytes(self) -> int:
        return self._stored.itemsize * self.shape[2] * self.shape[3]

    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        frames = np.empty((stop - start, *self.shape[2:]), self._stored)
        channels = self.shape[1]
        # What lies together is read at once; of several channels, that is one plane.
        for index, run in enumerate([frames] if channels == 1 else frames, start):
            plane = index * channels + channel
            count = self._file.fill(run, self._offset + plane * self._plane_bytes)
            if count < run.nbytes:
                raise MovieError(
                    f"{self.name}: truncated: the file ends in frame "
                    f"{index + count // self._plane_bytes} of {self.shape[0]}"
                )
        return frames.astype(self.dtype, copy=False)

    def state(self) -> Any:
        return self._file.state()

    def close(self) -> None:
        self._file.close()


def check_pixels(movie: Movie) -> None:
    """Refuse what has no background, and headers that lie."""
    if movie.dtype.kind not in "buif" or movie.dtype.itemsize > 8:
        raise MovieError(
            f"{movie.name}: has pixels of {movie.dtype.name}; convert them to integers or "
            "floating-point numbers of at most 64 bits"
        )
    frames, channels, height, width = movie.shape
    if min(movie.shape) < 1 or height * width > _MAX_FRAME_PIXELS:
        raise MovieError(
            f"{movie.name}: broken: it says {frames} frames of {channels} channels of "
            f"{height} x {width} px"
        )


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"

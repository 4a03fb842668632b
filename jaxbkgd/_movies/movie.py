"""Movies: frames of one or several channels that are read as they are sliced."""

import concurrent.futures
import contextlib
import hashlib
import operator
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable, SupportsIndex

import numpy as np
from jaxtyping import Shaped


# No camera has frames of 2^28 pixels (16384 x 16384). A damaged header may say so, and
# would cost gigabytes before the first pixel is read.
_MAX_FRAME_PIXELS = 2**28
_MAX_PIXELS = 2**60

# Frames, evenly spaced over the movie, that tell one movie from another.
_FINGERPRINT_FRAMES = 8

# Arrays in memory are hashed in blocks, on several cores.
_HASHED_BYTES = 2**26

# A part of the camera's frame in pixels, (x0, y0, x1, y1), as smlmlp gives it: the corner
# (x1, y1) is outside.
Box = tuple[int, int, int, int]


class MovieError(ValueError):
    """A movie that cannot be read or written.

    The message is one line: the movie's name, what is wrong and, where there is one, the
    remedy.
    """


@runtime_checkable
class Pixels(Protocol):
    """An array (frames, channels, height, width) that is sliced by frame, in one channel.

    `pixels[start:stop, channel]` gives frames (stop - start, height, width). `chunk_frames`
    is the number of frames that are decoded together, 1 where there is no such attribute.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Movie(contextlib.AbstractContextManager["Movie"]):
    """Frames of one or several channels that are read as they are sliced.

    [`jaxbkgd.open_movie`][] makes one of a file or an array. A reader of another format
    gives `pixels` to this class, or is a subclass that sets `shape` and `dtype` and
    overrides `read`. Any number of threads may read a movie. It is a context manager that
    closes its file. `numpy.asarray(movie)` reads all of it into an array (frames, channels,
    height, width).

    **Arguments:**

    - `pixels`: anything with a `shape` (frames, channels, height, width), a `dtype` of
        booleans, integers or floats of at most 64 bits, and `pixels[start:stop, channel]`.
    - `name`: the name in messages; a path where there is one.
    - `format`: the name of the format, for people.
    - `paths`: the files and folders that the movie is read from.
    - `pixel_size_um`: (y, x), where the movie says so.
    - `frame_interval_s`: from one frame to the next, where the movie says so.
    - `close`: called when the movie is closed.

    **Attributes:**

    `pixels`, `name`, `format`, `paths`, `pixel_size_um` and `frame_interval_s` as above,
    and

    - `shape`: (frames, channels, height, width).
    - `dtype`: of the pixels, in native byte order.

    **Raises:**

    [`jaxbkgd.MovieError`][] for pixels of another kind, and for a shape without pixels.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> import numpy as np
        >>> frames = np.zeros((20, 2, 8, 8), np.uint16)
        >>> with jaxbkgd.Movie(frames, name="demo", format="array") as movie:
        ...     movie.channels[1][5:8].shape
        (3, 8, 8)

        ```
    """

    # Also the values of a subclass that does not set them.
    name: str = "the movie"
    format: str = "movie"
    paths: Sequence[Path] = ()
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    pixels: Any = None
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None
    chunk_frames: int = 1
    opened_state: Any = None
    _close: Callable[[], object] | None = None
    # Beyond the pixels, what tells this movie from another.
    _identity: str = ""

    def __init__(
        self,
        pixels: Pixels,
        *,
        name: str,
        format: str,
        paths: Sequence[Path] = (),
        pixel_size_um: tuple[float, float] | None = None,
        frame_interval_s: float | None = None,
        close: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self.format = format
        self.paths = tuple(paths)
        self.pixel_size_um = pixel_size_um
        self.frame_interval_s = frame_interval_s
        self.dtype = np.dtype(pixels.dtype).newbyteorder("=")
        self.shape = check_pixels(name, pixels.shape, self.dtype)
        self.chunk_frames = getattr(pixels, "chunk_frames", 1)
        self.pixels = pixels
        self._close = close
        self.opened_state = self.state()

    def __repr__(self) -> str:
        size = self.pixel_size_um
        about = f", pixel_size_um={size}" if size is not None else ""
        return (
            f"{type(self).__name__}({self.name!r}, format={self.format!r}, "
            f"shape={self.shape}, dtype={self.dtype}{about})"
        )

    def read(
        self, start: int, stop: int, channel: int = 0
    ) -> Shaped[np.ndarray, "frames height width"]:
        """Reads frames `start` up to, but not including, `stop` of a channel, all counted
        from 0.

        **Returns:**

        An array (stop - start, height, width) of the movie's `dtype`.

        **Raises:**

        [`jaxbkgd.MovieError`][] if the movie is closed, or its file is truncated or broken.
        """
        pixels = self.pixels
        if pixels is None:
            raise MovieError(f"{self.name}: is closed; open it again to read it")
        try:
            return np.asarray(pixels[start:stop, channel], self.dtype)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise MovieError(f"{self.name}: cannot be read ({reason})") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All frames, (frames, channels, height, width)."""
        _refuse_no_copy(self.name, copy)
        try:
            frames = np.empty(self.shape, self.dtype if dtype is None else dtype)
        except MemoryError as error:
            raise MovieError(
                f"{self.name}: {one_line(error)}; read some frames, as "
                "movie.channels[0][:100]"
            ) from error
        for index, channel in enumerate(self.channels):
            frames[:, index] = channel[:]
        return frames

    def close(self) -> None:
        """Closes the file. What is read later is an error."""
        close, self._close, self.pixels = self._close, None, None
        if close is not None:
            close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    @property
    def channels(self) -> "list[Channel]":
        """The channels, a list of [`jaxbkgd.Channel`][]: `movie.channels[0][10:20]` reads
        an array (10, height, width)."""
        return [Channel(self, index) for index in range(self.shape[1])]

    def state(self) -> Any:
        """The sizes and times of the files, in terms of JSON. It changes when the movie is
        written to."""
        return _state(self.paths) if self.paths else None

    def fingerprint(self) -> str:
        """A hash that tells this movie from another.

        Arrays in memory are hashed whole, on all cores, about a second for a gigabyte and
        core. Files, memory maps and all else are hashed by shape, type and
        eight frames.
        """
        about = (self.shape, self.dtype.str, self._identity)
        digest = hashlib.sha256(repr(about).encode())
        if isinstance(self.pixels, np.ndarray) and not self.paths:
            step = max(1, _HASHED_BYTES // max(1, self.pixels[0].nbytes))
            blocks = (self.pixels[i : i + step] for i in range(0, self.shape[0], step))
            with concurrent.futures.ThreadPoolExecutor() as threads:
                for block in threads.map(_hash, blocks):
                    digest.update(block)
            return digest.hexdigest()
        last = self.shape[0] - 1
        for index in sorted({round(x) for x in np.linspace(0, last, _FINGERPRINT_FRAMES)}):
            for channel in range(self.shape[1]):
                digest.update(_hash(self.read(index, index + 1, channel)))
        return digest.hexdigest()

    def includes(self, path: Path) -> bool:
        """Whether a file at this real path is, or would be, a part of the movie, or holds
        it."""
        sources = [source.resolve() for source in self.paths]
        return any(
            source == path or source in path.parents or path in source.parents
            for source in sources
        )

    def shares_memory(self, array: np.ndarray) -> bool:
        """Whether writing to `array` might change the movie."""
        return isinstance(self.pixels, np.ndarray) and np.may_share_memory(
            self.pixels, array
        )


class Channel:
    """One channel of a movie, or a box of it, that is read as it is sliced.

    `channel[10:20]` reads an array (10, height, width), `channel[10:20:2]` every second of
    these frames, `channel[10]` one frame (height, width), and `numpy.asarray(channel)` all.
    No frames are kept in memory. `movie.channels` gives the channels of a movie.

    **Arguments:**

    - `movie`: a [`jaxbkgd.Movie`][].
    - `index`: the number of the channel, from 0.
    - `box`: (x0, y0, x1, y1) in pixels, to read a part of the frames; x1 and y1 are not
        included. By default the whole frame.

    **Attributes:**

    - `movie`, `index`, `box`: as above.
    - `shape`: (frames, height, width) of the channel, or of its box.
    - `dtype`: of the pixels.

    **Raises:**

    [`jaxbkgd.MovieError`][] for a box that is not inside the frames. When sliced,
    `TypeError` for an index that is no integer and no slice, `IndexError` for a frame
    beyond the last one, and `MovieError` if the movie cannot be read.
    """

    ndim = 3

    def __init__(self, movie: Movie, index: int, box: Box | None = None) -> None:
        frames, _, height, width = movie.shape
        x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise MovieError(
                f"{movie.name}: the box {box} is not inside its frames; give x0, y0, x1, "
                f"y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
            )
        self.movie = movie
        self.index = index
        self.box = x0, y0, x1, y1
        self.shape = frames, y1 - y0, x1 - x0
        self.dtype = movie.dtype

    def __repr__(self) -> str:
        return (
            f"Channel({self.movie.name!r}, index={self.index}, box={self.box}, "
            f"shape={self.shape}, dtype={self.dtype})"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice | SupportsIndex) -> Shaped[np.ndarray, "..."]:
        if isinstance(frames, slice):
            start, stop, step = frames.indices(len(self))
            if step == 1:
                return self._read(start, max(start, stop))
            chosen = range(start, stop, step)
            read = np.empty((len(chosen), *self.shape[1:]), self.dtype)
            for place, frame in enumerate(chosen):
                read[place] = self._read(frame, frame + 1)[0]
            return read
        try:
            frame = operator.index(frames)
        except TypeError as error:
            raise TypeError(
                f"a channel is indexed by frame, as channel[10] or channel[10:20], not by "
                f"{frames!r}; index the array that this gives"
            ) from error
        if not -len(self) <= frame < len(self):
            raise IndexError(f"there is no frame {frame}; the channel has {len(self)}")
        return self._read(frame % len(self), frame % len(self) + 1)[0]

    def _read(self, start: int, stop: int) -> np.ndarray:
        x0, y0, x1, y1 = self.box
        read = self.movie.read(start, stop, self.index)
        return np.ascontiguousarray(read[:, y0:y1, x0:x1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All frames, (frames, height, width)."""
        _refuse_no_copy(self.movie.name, copy)
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)


class _OneChannel:
    """Frames (frames, height, width) of any library, as those of a movie's only channel."""

    def __init__(self, array: Any) -> None:
        frames, height, width = array.shape
        self.shape = frames, 1, height, width
        self.dtype = array.dtype
        self._array = array

    def __getitem__(self, index: tuple[slice, int]) -> Any:
        return self._array[index[0]]


def movie_of_array(array: Any, name: str = "the array") -> Movie:
    """An array (frames, height, width) or (frames, channels, height, width) of NumPy, JAX,
    dask, Zarr or the like as a movie. Of a memory map, the file is its path."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise MovieError(
            f"{name}: is a {type(array).__name__}; give a path, or an array of NumPy, "
            "JAX, dask or Zarr"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise MovieError(
            f"{name}: is masked, and its mask would be lost; fill it, or give the mask as "
            "weights"
        )
    if len(array.shape) not in (3, 4):
        raise MovieError(
            f"{name}: has shape {tuple(array.shape)}; give frames of shape (frames, "
            "height, width) or (frames, channels, height, width)"
        )
    library = type(array).__module__.partition(".")[0]
    pixels = array if len(array.shape) == 4 else _OneChannel(array)
    paths: list[Path] = []
    identity = ""
    if isinstance(array, np.ndarray):
        pixels = array if array.ndim == 4 else array[:, None]
        mapped = _memory_map_behind(array)
        if mapped is not None:
            # Else the file's time might change when the system writes to it later.
            mapped.flush()
            paths = [Path(str(mapped.filename))]
            offset = mapped.offset + array.ctypes.data - mapped.ctypes.data
            identity = repr((offset, array.strides))
    elif library == "dask":
        # The name says from what the array is computed.
        identity = array.name
    movie = Movie(pixels, name=name, format=f"{library} array", paths=paths)
    movie._identity = identity
    return movie


def _memory_map_behind(array: np.ndarray) -> np.memmap | None:
    """The memory map of a file that still exists and that `array` is a view of."""
    mapped = None
    base: Any = array
    while isinstance(base, np.ndarray):
        mapped = base if isinstance(base, np.memmap) else mapped
        base = base.base
    if mapped is None or mapped.filename is None or not os.path.isfile(mapped.filename):
        return None
    return mapped


def check_pixels(
    name: str, shape: Sequence[int], dtype: np.dtype
) -> tuple[int, int, int, int]:
    """Refuses pixels that have no background, and shapes that no movie has."""
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise MovieError(
            f"{name}: has pixels of {dtype.name}; convert them to integers or "
            "floating-point numbers of at most 64 bits"
        )
    if len(shape) != 4:
        raise MovieError(
            f"{name}: has pixels of shape {tuple(shape)}; give (frames, channels, height, "
            "width)"
        )
    frames, channels, height, width = map(int, shape)
    if frames == 0:
        raise MovieError(f"{name}: has no frames")
    if (
        min(frames, channels, height, width) < 1
        or height * width > _MAX_FRAME_PIXELS
        or frames * channels * height * width > _MAX_PIXELS
    ):
        raise MovieError(
            f"{name}: broken: it says {frames} frames of {channels} channels of "
            f"{height} x {width} px"
        )
    return frames, channels, height, width


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def _refuse_no_copy(name: str, copy: bool | None) -> None:
    if copy is False:
        raise ValueError(f"{name}: cannot be an array without a copy; leave out copy=False")


def _hash(frames: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(frames).data).digest()


def _state(paths: Sequence[Path]) -> str:
    """A hash of the sizes and times of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path]
        if path.is_dir():
            walk = sorted(os.walk(path))
            files = [
                Path(folder, name) for folder, _, names in walk for name in sorted(names)
            ]
        for file in files:
            status = os.stat(file)
            about = (str(file.relative_to(path)), status.st_size, status.st_mtime_ns)
            digest.update(repr(about).encode())
    return digest.hexdigest()

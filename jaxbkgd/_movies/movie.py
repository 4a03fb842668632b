"""Movies: frames of one or several channels that are read as they are sliced."""

import contextlib
import hashlib
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped


# No camera has frames of 2^28 pixels, but a damaged header may say so.
_MAX_FRAME_PIXELS, _MAX_PIXELS = 2**28, 2**60

# Frames, evenly spaced over a movie on disk, that tell it from another.
_FINGERPRINT_FRAMES = 8

# Of lengths in micrometres and of times in seconds.
UNITS = {
    "pm": 1e-6, "picometer": 1e-6, "Å": 1e-4, "angstrom": 1e-4, "nm": 1e-3,
    "nanometer": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "micrometre": 1.0, "mm": 1e3, "millimeter": 1e3, "cm": 1e4, "centimeter": 1e4,
    "m": 1e6, "meter": 1e6, "in": 2.54e4, "inch": 2.54e4, "ns": 1e-9, "nanosecond": 1e-9,
    "us": 1e-6, "microsecond": 1e-6, "ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3,
    "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "min": 60.0, "minute": 60.0,
    "h": 3600.0, "hour": 3600.0,
}  # fmt: skip

# A part of the camera's frame in pixels, (x0, y0, x1, y1), without x1 and y1.
Box = tuple[int, int, int, int]


class MovieError(ValueError):
    """A movie that cannot be read or written, in one line: its name, what is wrong and the
    remedy."""


class ChangedSource(MovieError):
    """A movie has changed since it was opened."""


@runtime_checkable
class Pixels(Protocol):
    """What `Movie` slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Movie(contextlib.AbstractContextManager["Movie"]):
    """Frames of one or several channels that are read as they are sliced.

    [`jaxbkgd.open_movie`][] makes one from a file or an array. For a format of your own,
    give it `pixels`. Any number of threads may read it. As a context manager it closes its
    file. `numpy.asarray(movie)` reads all, (frames, channels, height, width).

    **Arguments**, which are attributes too:

    - `pixels`: anything with a `shape` (frames, channels, height, width), a `dtype` of
        booleans, integers or floats of at most 64 bits, and `pixels[start:stop, channel]`
        that gives frames (stop - start, height, width).
    - `name`, `format`: for messages; the name is a path where there is one.
    - `paths`: the files and folders that the movie is read from.
    - `pixel_size_um`: (y, x), and `frame_interval_s`, where they are known.
    - `chunk_frames`: how many frames the file decodes together.
    - `close`: called when the movie is closed.

    **Raises:**

    [`jaxbkgd.MovieError`][] for other pixels, and for a shape without pixels.

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

    def __init__(
        self,
        pixels: Pixels,
        *,
        name: str,
        format: str,
        paths: Sequence[Path] = (),
        pixel_size_um: tuple[float, float] | None = None,
        frame_interval_s: float | None = None,
        chunk_frames: int = 1,
        close: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self.format = format
        self.paths = tuple(paths)
        self.pixel_size_um = pixel_size_um
        self.frame_interval_s = frame_interval_s
        self.chunk_frames = chunk_frames
        self.dtype = np.dtype(pixels.dtype).newbyteorder("=")
        self.shape = check_pixels(name, pixels.shape, self.dtype)
        self.pixels: Any = pixels
        self._close = close
        self.opened_state = self.state()

    def __repr__(self) -> str:
        about = f"{self.name!r}, format={self.format!r}, shape={self.shape}"
        return f"{type(self).__name__}({about}, dtype={self.dtype})"

    def read(
        self, start: int, stop: int, channel: int = 0
    ) -> Shaped[np.ndarray, "frames height width"]:
        """Frames `start` up to, but not including, `stop` of a channel, counted from 0.
        Raises `MovieError` if the movie is closed, or its file is truncated or broken."""
        pixels = self.pixels
        if pixels is None:
            raise MovieError(f"{self.name}: is closed; open it again to read it")
        with named_errors(f"{self.name}: cannot be read"):
            return np.asarray(pixels[start:stop, channel], self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        frames = np.stack([np.asarray(c, copy=copy) for c in self.channels], axis=1)
        return frames if dtype is None else frames.astype(dtype, copy=False)

    def close(self) -> None:
        """Closes the file. Later reads raise an error."""
        close, self._close, self.pixels = self._close, None, None
        if close is not None:
            close()

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def channels(self) -> "list[Channel]":
        """The channels: `movie.channels[0][10:20]` reads an array (10, height, width)."""
        return [Channel(self, index) for index in range(self.shape[1])]

    def state(self) -> Any:
        """A hash of the sizes and times of the files, or None for an array."""
        return _hash_of_sizes_and_times(self.paths) if self.paths else None

    def fingerprint(self) -> str:
        """A hash of shape, type and frames: all frames of an array in memory (about a
        second for a gigabyte), or eight frames of a file."""
        is_in_memory = isinstance(self.pixels, np.ndarray) and not self.paths
        count = self.shape[0] if is_in_memory else _FINGERPRINT_FRAMES
        frames = np.unique(np.linspace(0, self.shape[0] - 1, count).round().astype(int))
        return self._hash_of(self.shape, frames.tolist())

    def _hash_of(self, shape: tuple[int, ...], frames: Sequence[int]) -> str:
        """A hash of a shape, the type and these frames."""
        digest = hashlib.blake2b(repr((shape, self.dtype.str)).encode(), digest_size=32)
        for frame in frames:
            for channel in range(self.shape[1]):
                read = self.read(frame, frame + 1, channel)
                digest.update(np.ascontiguousarray(read).data)
        return digest.hexdigest()

    def includes(self, path: Path) -> bool:
        """Whether this resolved path is, would be part of, or contains the movie."""
        sources = [source.resolve() for source in self.paths]
        return any(s == path or s in path.parents or path in s.parents for s in sources)

    def shares_memory(self, array: np.ndarray) -> bool:
        """Whether writing to `array` might change the movie."""
        is_array = isinstance(self.pixels, np.ndarray)
        return is_array and np.may_share_memory(self.pixels, array)


class Channel:
    """One channel of a movie, or a part of it, that is read as it is sliced.

    `channel[10:20]` reads an array (10, height, width), `channel[10]` one frame (height,
    width), `channel[10, 5:50]` a part of it, and `numpy.asarray(channel)` all.

    **Arguments**, which are attributes too, as are `shape`, (frames, height, width), and
    `dtype`:

    - `movie`: a [`jaxbkgd.Movie`][], whose `channels` are such objects.
    - `index`: the number of the channel, from 0.
    - `box`: (x0, y0, x1, y1) in pixels, to read a part of the frames, without x1 and y1. By
        default the whole frame.
    - `frames`: a slice of the frames, to read only these; by default all. The attribute is
        the `range` of their numbers.

    **Raises:**

    [`jaxbkgd.MovieError`][] for a box outside the frames, for a slice that is negative or
    holds no frame, and if the movie cannot be read.
    """

    ndim = 3

    def __init__(
        self,
        movie: Movie,
        index: int,
        box: Box | None = None,
        frames: slice | None = None,
    ) -> None:
        count, channel_count, height, width = movie.shape
        if not 0 <= operator.index(index) < channel_count:
            rule = f"has the channels 0 to {channel_count - 1}, and none of the number"
            raise MovieError(f"{movie.name}: {rule} {index}")
        x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            rule = f"0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
            fault = f"the box {box} is not inside its frames; give x0, y0, x1, y1 with"
            raise MovieError(f"{movie.name}: {fault} {rule}")
        self.movie = movie
        self.index = index
        self.box = x0, y0, x1, y1
        chosen = slice(None) if frames is None else frames
        self.frames = chosen_frames(movie.name, range(count), chosen)
        self.shape = len(self.frames), y1 - y0, x1 - x0
        self.dtype = movie.dtype

    def __repr__(self) -> str:
        about = f"index={self.index}, box={self.box}, shape={self.shape}"
        about += f", frames={self.frames}"
        return f"Channel({self.movie.name!r}, {about}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Shaped[np.ndarray, "height width"]]:
        return (self[frame] for frame in range(len(self)))

    def __getitem__(self, frames: Any) -> Shaped[np.ndarray, "..."]:
        if isinstance(frames, tuple):
            # As viewers read: frames, and then lines and columns of these.
            frames, *within = frames
            read = self[frames]
            return np.asarray(read[(*[slice(None)] * (read.ndim - 2), *within)])
        if isinstance(frames, slice):
            chosen = self.frames[frames]
            if chosen.step != 1:
                images = [self._read(frame, frame + 1)[0] for frame in chosen]
                return np.array(images, self.dtype).reshape(-1, *self.shape[1:])
            return self._read(chosen.start, max(chosen.start, chosen.stop))
        frame = operator.index(frames)
        if not -len(self) <= frame < len(self):
            raise IndexError(f"there is no frame {frame}; the channel has {len(self)}")
        return self._read(self.frames[frame], self.frames[frame] + 1)[0]

    def _read(self, start: int, stop: int) -> Shaped[np.ndarray, "frames height width"]:
        x0, y0, x1, y1 = self.box
        read = self.movie.read(start, stop, self.index)
        return np.ascontiguousarray(read[:, y0:y1, x0:x1])

    def part(self, frames: slice) -> "Channel":
        """The channel with some of its frames, as a slice of them. Raises `MovieError` for
        a slice that is negative or holds no frame."""
        chosen = chosen_frames(self.movie.name, self.frames, frames)
        numbers = slice(chosen.start, chosen.stop, chosen.step)
        return Channel(self.movie, self.index, self.box, numbers)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.movie.name}: is no array without a copy")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)


def chosen_frames(name: str, frames: range, chosen: Any) -> range:
    """Those of the frames that a slice chooses; `MovieError` for none."""
    if not isinstance(chosen, slice):
        rule = "must be a slice, as slice(1000, 5000)"
        raise TypeError(f"{name}: frames {rule}, but are {chosen!r}.")
    numbers = chosen.start, chosen.stop, chosen.step
    is_usable = all(n is None or operator.index(n) >= 0 for n in numbers)
    if not is_usable or chosen.step == 0 or not frames[chosen]:
        given = ":".join("" if number is None else f"{number}" for number in numbers)
        fault = f"frames {given} (start:stop:step) are negative, or hold none of it"
        rule = f"give a slice with 0 <= start < stop, start < {len(frames)} and step >= 1"
        raise MovieError(f"{name}: {fault}; {rule}")
    return frames[chosen]


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
        kind = type(array).__name__
        raise MovieError(f"{name}: is a {kind}; give a path, or an array such as NumPy's")
    if isinstance(array, np.ma.MaskedArray):
        raise MovieError(f"{name}: is masked; fill it, and give its mask as weights")
    library = type(array).__module__.partition(".")[0]
    pixels, paths = array if len(array.shape) != 3 else _OneChannel(array), []
    if isinstance(array, np.ndarray):
        pixels = base = array if array.ndim != 3 else array[:, None]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        if isinstance(base, np.memmap) and base.filename and os.path.isfile(base.filename):
            # Else the file's time might change when the system writes to it later.
            base.flush()
            paths = [Path(str(base.filename))]
    return Movie(pixels, name=name, format=f"{library} array", paths=paths)


def check_pixels(
    name: str, shape: Sequence[int], dtype: np.dtype
) -> tuple[int, int, int, int]:
    """Refuses pixels that have no background, and shapes that no movie has."""
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        rule = "convert them to integers or floats of at most 64 bits"
        raise MovieError(f"{name}: has pixels of {dtype.name}; {rule}")
    if len(shape) != 4:
        rule = "give (frames, height, width) or (frames, channels, height, width)"
        raise MovieError(f"{name}: has shape {tuple(shape)}; {rule}")
    frames, channels, height, width = map(int, shape)
    if frames == 0:
        raise MovieError(f"{name}: has no frames")
    pixels = height * width
    is_broken = min(frames, channels, height, width) < 1 or pixels > _MAX_FRAME_PIXELS
    if is_broken or frames * channels * pixels > _MAX_PIXELS:
        says = f"{frames} frames of {channels} channels of {height} x {width} px"
        raise MovieError(f"{name}: broken: it says {says}")
    return frames, channels, height, width


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters."""
    message = (isinstance(error, OSError) and error.strerror) or str(error)
    text = " ".join(message.split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


@contextlib.contextmanager
def named_errors(says: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Errors of this kind become a `MovieError` that `says` what could not be done."""
    try:
        yield
    except (MovieError, ImportError):
        raise
    except kind as error:
        raise MovieError(f"{says} ({one_line(error)})") from error


def _hash_of_sizes_and_times(paths: Sequence[Path]) -> str:
    """Of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            status = file.stat()
            about = str(file.relative_to(path)), status.st_size, status.st_mtime_ns
            digest.update(repr(about).encode())
    return digest.hexdigest()

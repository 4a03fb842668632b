"""Movies of planes that a library reads one by one.

Depths are frames as times are, positions are never frames, and one thread at a time calls
a library.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .movie import check_pixels, Movie, MovieError, named_errors


@dataclass(frozen=True)
class PlaneImage:
    """An image of a file: the lengths of its axes by their letters, Y and X among them, and
    `read_plane(time, depth, channel)`, which gives (height, width)."""

    sizes: Mapping[str, int]
    dtype: np.dtype
    read_plane: Callable[[int, int, int], Any]
    pixel_size_um: tuple[Any, Any] = (None, None)
    frame_interval_s: float | None = None


# Opens one image of a file, by its number if there are several. `files` close it.
PlaneReader = Callable[[Path, int | None, ExitStack], PlaneImage]


def open_planes(
    path: Path, position: int | None, format: str, says: str, reader: PlaneReader
) -> Movie:
    """The movie of an image that a reader opens, or an error that `says` it cannot."""
    name = str(path) if position is None else f"{path}/{position}"
    files = ExitStack()
    # On damage, libraries raise errors of any type.
    with named_errors(f"{name}: {says}", Exception):
        try:
            image = reader(path, position, files)
            pixels = PlanePixels(name, image, files)
            is_sized = all(map(_is_positive, image.pixel_size_um))
            # Times alone are equally spaced in time.
            is_timed = pixels.depths == 1 and _is_positive(image.frame_interval_s)
            return Movie(
                pixels,
                name=name,
                format=format,
                paths=[path],
                pixel_size_um=image.pixel_size_um if is_sized else None,
                frame_interval_s=image.frame_interval_s if is_timed else None,
                close=pixels.close,
            )
        except BaseException:
            files.close()
            raise


def _is_positive(number: float | None) -> bool:
    return number is not None and 0 < number < math.inf


class PlanePixels:
    """The frames of an image, (frames, channels, height, width): all depths of the first
    time, before those of the second."""

    def __init__(self, name: str, image: PlaneImage, files: ExitStack) -> None:
        sizes = image.sizes
        more = [f"{n} {axis}" for axis, n in sizes.items() if axis not in "TZCYX" and n > 1]
        if more:
            what = f"axes ({', '.join(more)}) that are no frames, depths or channels"
            raise MovieError(f"{name}: has {what}; save a grey-scale movie without them")
        times, self.depths, channels = (int(sizes.get(axis, 1)) for axis in "TZC")
        frame = int(sizes.get("Y", 1)), int(sizes.get("X", 1))
        self.dtype = np.dtype(image.dtype)
        self.shape = check_pixels(name, (times * self.depths, channels, *frame), self.dtype)
        self._name = name
        self._read_plane = image.read_plane
        self._files = files
        self._lock = threading.Lock()
        for index in {0, self.shape[0] - 1}:
            for channel in range(channels):
                self[index : index + 1, channel]

    def __getitem__(
        self, index: tuple[slice, int]
    ) -> Shaped[np.ndarray, "frames height width"]:
        frames, channel = index
        start, stop, _ = frames.indices(self.shape[0])
        read = np.empty((max(0, stop - start), *self.shape[2:]), self.dtype)
        for frame in range(start, stop):
            says = f"{self._name}: frame {frame} of {self.shape[0]} cannot be read"
            with self._lock, named_errors(f"{says}; copy the file again", Exception):
                plane = np.asarray(self._read_plane(*divmod(frame, self.depths), channel))
                if plane.shape != self.shape[2:]:
                    raise ValueError(f"it has the shape {plane.shape}")
                np.copyto(read[frame - start], plane, casting="safe")
        return read

    def close(self) -> None:
        with self._lock:
            self._files.close()


def choose_image(path: Path, names: Sequence[str], position: int | None) -> int:
    """The number of the image that is asked for among these."""
    if position is None and len(names) > 1:
        listed = ", ".join(f"{number}: {name}" for number, name in enumerate(names[:20]))
        what = f"holds {len(names)} images, which are no frames ({listed})"
        raise MovieError(f"{path}: {what}; open one by its number, as {path}/0")
    if not 0 <= (position or 0) < len(names):
        what = f"{len(names)} images, which are numbered from 0"
        raise MovieError(f"{path}/{position}: is not there; the file holds {what}")
    return position or 0


def number_in_loops(loops: Mapping[str, int], place: Mapping[str, int]) -> int:
    """The number of the image at a place in nested loops, the outermost first."""
    places = [place.get(axis, 0) for axis in loops]
    return int(np.ravel_multi_index(places, list(loops.values()))) if loops else 0


class WholeFile:
    """A file, open to be read, that raises an error where it ends too early: some libraries
    read on forever there, or give zeros. `reads` counts what was read.

    Libraries do not map it into memory, as they do with a path, so that its pages are not
    counted as memory of the program.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.reads = 0
        self._file = path.open("rb")
        self.seek, self.tell = self._file.seek, self._file.tell
        self.close, self.fileno = self._file.close, self._file.fileno

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        content = self._file.read(size)
        if size is not None and len(content) < size:
            raise EOFError("the file ends too early")
        return content

    def readline(self) -> bytes:
        content = self._file.readline()
        if not content:
            raise EOFError("the file ends too early")
        return content

"""How many frames of a movie that is being written are complete, for each format."""

import functools as ft
import itertools
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .growing import GrowingMovie
from .movie import Movie, MovieError, named_errors
from .open import open_movie
from .raw import FileFrames, open_dax
from .series import arrange_names, find_files, is_in_series
from .sinks import is_zarr
from .tiff import find_index, ndtiff_movie, open_tiff
from .tiff_pages import find_pages, Pages, TiffPixels
from .zarr import open_zarr


# By the number in NDTiff's index.
_NDTIFF_TYPES = {0: "u1", 1: "u2", 3: "u2", 4: "u2", 5: "u2", 6: "u2"}


def open_growing(path: Path) -> GrowingMovie:
    """Opens a TIFF file, a folder or a pattern of them, an NDTiff, Zarr or DAX movie that
    is being written. Raises `MovieError` as long as it has no frame, and for others."""
    with named_errors(f"{path}: cannot be followed", Exception):
        if is_zarr(path):
            return _GrowingZarr(path)
        if path.suffix.lower() in (".dax", ".inf"):
            return _GrowingDax(path)
        index = path if path.suffix.lower() == ".index" else find_index(path)
        return _GrowingNDTiff(path, index) if index else _GrowingTiff(path)


class _GrowingDax(GrowingMovie):
    def __init__(self, path: Path) -> None:
        opened = open_dax(path, is_growing=True)
        self._stored = opened.pixels.dtype
        super().__init__(path, opened)

    def _complete_frames(self) -> int:
        frame_bytes = self._stored.itemsize * self.shape[2] * self.shape[3]
        return self._sources[0].stat().st_size // frame_bytes

    def _read_pixels(self, count: int) -> Any:
        return FileFrames(self._sources[0], (count, *self.shape[1:]), self._stored, 0)


class _GrowingZarr(GrowingMovie):
    """An array that grows by its shape, whose frames are complete once it has grown again;
    or one that has its shape from the beginning, and whose chunks are complete once the
    next one is there."""

    def __init__(self, path: Path) -> None:
        self._open = ft.partial(open_zarr, path, is_growing=True)
        self._array = self._open()
        self._step = self._array.pixels.stored_frames
        self._settled, self._rows = -1, 0
        super().__init__(path, self._array)
        self._sources = (path,)

    def _complete_frames(self) -> int:
        before, self._array = self._array.shape[0], self._open()
        total, pixels = self._array.shape[0], self._array.pixels
        if total != before:
            self._settled = before
        if self._settled >= 0:
            return min(self._settled, total)
        while self._rows * self._step < total and pixels.has_chunks(self._rows):
            self._rows += 1
        return min(total, max(0, self._rows - 1) * self._step)

    def _read_pixels(self, count: int) -> Any:
        # Otherwise they are kept until Python looks for cycles.
        self.pixels.forget()
        return self._array.pixels

    def _open_finished(self) -> Movie:
        finished = open_movie(self._path)
        if not finished.pixels.has_chunks(-(-finished.shape[0] // self._step) - 1):
            what = f"says {finished.shape[0]} frames, but lacks the last chunk"
            raise MovieError(f"{self.name}: {what}")
        return finished

    def state(self) -> Any:
        return self._array.shape, self._rows


class _Entry(NamedTuple):
    """An entry of NDTiff's index, which ends at `end`. `kind` is what all frames share:
    width, height, type and axes other than time."""

    time: Any
    kind: tuple[Any, ...]
    path: Path
    place: int
    metadata_end: int
    end: int

    @property
    def is_complete(self) -> bool:
        """Whether the metadata, which are written behind the pixels, are in the file."""
        with self.path.open("rb") as file:
            file.seek(max(0, self.metadata_end - 1))
            return file.read(1) not in (b"", b"\0")


class _GrowingNDTiff(GrowingMovie):
    def __init__(self, path: Path, index: Path) -> None:
        self._index, self._entries = index, list[_Entry]()
        if not self._complete_frames():
            raise MovieError(f"{index}: has no frame yet")
        first = self._entries[0]
        width, height, kind, _ = first.kind
        with first.path.open("rb") as file:
            order = "<" if file.read(2) == b"II" else ">"
        self._page = (height, width), np.dtype(order + _NDTIFF_TYPES[kind])
        opened = ndtiff_movie(index, self._read_pixels(1), first.path, [])
        super().__init__(path, opened)
        self._sources = self._index, first.path

    def _new_entries(self) -> Iterator[_Entry]:
        with self._index.open("rb") as file:
            file.seek(self._entries[-1].end if self._entries else 0)
            while True:
                try:
                    axes = json.loads(_read_text(file))
                    path = self._index.parent / _read_text(file)
                    numbers = struct.unpack("<8I", file.read(32))
                # Behind the last entry there may be a part of one, or zeros.
                except (ValueError, struct.error):
                    return
                place, width, height, kind, _, metadata, length, _ = numbers
                time = axes.pop("time", None)
                alike = width, height, kind, axes
                yield _Entry(time, alike, path, place, metadata + length, file.tell())

    def _complete_frames(self) -> int:
        if self._entries and not self._entries[-1].is_complete:
            raise MovieError(f"{self._entries[-1].path}: was cut while it was followed")
        for entry in itertools.takewhile(lambda e: e.is_complete, self._new_entries()):
            number = len(self._entries)
            if entry.time != number or entry.kind != (self._entries or [entry])[0].kind:
                what = f"frame {number} is time {entry.time} of {entry.kind}"
                raise MovieError(f"{self._index}: {what}; open it when it is complete")
            self._entries.append(entry)
            self._sources = self._index, entry.path
        return len(self._entries)

    def _read_pixels(self, count: int) -> Any:
        files = []
        for path, group in itertools.groupby(self._entries[:count], lambda e: e.path):
            places = np.array([entry.place for entry in group])
            files.append(Pages(path, *self._page, places, places, {}))
        return TiffPixels(str(self._index.parent), files, np.arange(count)[:, None])


def _read_text(file: BinaryIO) -> str:
    (size,) = struct.unpack("<I", file.read(4))
    return file.read(size).decode()


class _GrowingTiff(GrowingMovie):
    """Pages of one file, or of several that follow each other. A page is complete once the
    next one is there, which is written behind its pixels."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_series = path.is_dir() or re.search(r"[*?[]", path.name) is not None
        first = self._paths()[0]
        opened = open_tiff(first, is_growing=True)
        self._files = [find_pages(first, is_growing=True)]
        self._scale = opened.pixels.scale
        super().__init__(path, opened)
        is_simple = not self._is_series and [*self._files[0].axes][-1:] == ["C"]
        if self.shape[1] > 1 and not is_simple:
            raise MovieError(f"{path}: has several channels; open it when it is complete")

    def _paths(self) -> list[Path]:
        """The files that there are, in their order."""
        if self._is_series:
            paths = find_files(self._path)
            names = arrange_names(str(self._path), [path.name for path in paths])
            return [paths[0].with_name(name) for name in names]
        if "MMStack" not in self._path.name:
            return [self._path]
        # Micro-Manager begins the file NAME_1.ome.tif after 4 GB.
        suffix = r"((\.ome)?\.[^.]*)$"
        names = (re.sub(suffix, rf"_{n}\1", self._path.name) for n in itertools.count(1))
        paths = (self._path.with_name(name) for name in names)
        return [self._path, *itertools.takewhile(Path.is_file, paths)]

    def _complete_frames(self) -> int:
        paths = self._paths()
        self._extend_last()
        for path in paths[len(self._files) :]:
            found = find_pages(path, self._files[0], is_growing=True)
            if not len(found):
                break
            # What was the last file is complete now.
            self._extend_last()
            self._files.append(found)
        self._sources = tuple(pages.path for pages in self._files)
        if [*self._sources] != paths[: len(self._files)]:
            raise MovieError(f"{self.name}: files have come or gone before the last one")
        return (sum(map(len, self._files)) - 1) // self.shape[1]

    def _extend_last(self) -> None:
        """Looks for more pages in the last file, from the last one that is known."""
        old = self._files[-1]
        last = int(old.directories[-1])
        # One directory may describe all pages.
        is_alone = last == old.directories[0]
        start = None if is_alone else last
        new = find_pages(old.path, old, start=start, is_growing=True)
        if not len(new):
            raise MovieError(f"{old.path}: was cut while it was followed")
        if not is_alone:
            directories = np.append(old.directories[:-1], new.directories)
            places = np.append(old.places[:-1], new.places)
            new = Pages(old.path, old.shape, old.dtype, directories, places, old.axes)
        self._files[-1] = new

    def _read_pixels(self, count: int) -> Any:
        channels = self.shape[1]
        order = np.arange(count * channels).reshape(-1, channels)
        return TiffPixels(self.name, self._files, order, self._scale)

    def includes(self, path: Path) -> bool:
        is_in = self._is_series and is_in_series(self._path, path)
        return is_in or super().includes(path)

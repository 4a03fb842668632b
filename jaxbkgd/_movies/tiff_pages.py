"""The pages of a TIFF file: what they hold, and where their pixels are.

tifffile needs minutes for 10^5 pages that were written one by one, ends at a broken
directory without an error, and does not notice a page of another height. So the chain of
directories is followed here, and tifffile says what the different kinds of pages are.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import tifffile
from jaxtyping import Int

from .movie import MovieError, one_line


# Tags that say what the pixels are. Pages of equal tags are described once.
_KIND_TAGS = (254, 256, 257, 258, 259, 266, 277, 284, 317, 322, 323, 339)
_STRIP_OFFSETS, _STRIP_BYTES = 273, 279

# Letters of the module struct.
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

# A directory has some 15 tags. A larger number than this is damage.
_MAX_TAGS = 4096

# Directories are read in blocks, since the next is often near.
_BLOCK_BYTES = 4096


class Kind(NamedTuple):
    """The pixels of a page. They are plain if the file holds them as an array does."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    frame_bytes: int
    is_plain: bool
    is_small_copy: bool

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))} px of {self.dtype}"


# The kinds of pages that were met, by their tags. The first is that of the movie.
Kinds = dict[tuple, Kind]


@dataclass(frozen=True)
class Pages:
    """The pages of a file, in the order of its chain of directories.

    **Attributes:**

    - `path`: the file.
    - `kind`: of the movie's frames.
    - `byteorder`: `"<"` or `">"`.
    - `directories`: offsets of the directories in the file.
    - `places`: offsets of the pixels, or -1 where they have to be decoded.
    - `file_bytes`: the size of the file.
    """

    path: Path
    kind: Kind
    byteorder: Literal["<", ">"]
    directories: Int[np.ndarray, " pages"]
    places: Int[np.ndarray, " pages"]
    file_bytes: int

    def __len__(self) -> int:
        return len(self.directories)


class _Reader:
    """Reads the directories of an open file."""

    def __init__(self, path: Path, file: BinaryIO, kinds: Kinds) -> None:
        self._path = path
        self._file = file
        self._kinds = kinds
        self.file_bytes = file.seek(0, 2)
        magic = self._read(0, 8) if self.file_bytes >= 8 else bytes(8)
        self.byteorder: Literal["<", ">"] = "<" if magic[:2] == b"II" else ">"
        version = struct.unpack_from(f"{self.byteorder}H", magic, 2)[0]
        if magic[:2] not in (b"II", b"MM") or version not in (42, 43):
            raise MovieError(f"{path}: is not a TIFF file")
        self._is_big = version == 43
        head, tag = ("Q", "HHQ8s") if self._is_big else ("H", "HHI4s")
        self._head = struct.Struct(self.byteorder + head)
        self._offset = struct.Struct(self.byteorder + ("Q" if self._is_big else "I"))
        self._tag = struct.Struct(self.byteorder + tag)

    def _read(self, offset: int, count: int) -> bytes:
        if offset + count > self.file_bytes:
            raise EOFError
        self._file.seek(offset)
        return self._file.read(count)

    def directories(self) -> Iterator[tuple[int, bytes]]:
        """The offset and the tags of each directory."""
        count, milestone = 0, -1
        try:
            place = 8 if self._is_big else 4
            (offset,) = self._offset.unpack(self._read(place, self._offset.size))
            while offset:
                (tags,) = self._head.unpack(self._read(offset, self._head.size))
                if not 0 < tags <= _MAX_TAGS:
                    raise MovieError(f"{self._path}: broken: page {count} has {tags} tags")
                size = tags * self._tag.size
                content = self._read(offset + self._head.size, size + self._offset.size)
                # A cycle meets a milestone again, wherever it starts (Brent, 1980).
                if offset == milestone:
                    raise MovieError(f"{self._path}: broken: its pages repeat")
                yield offset, content[:size]
                count += 1
                if count & (count - 1) == 0:
                    milestone = offset
                (offset,) = self._offset.unpack_from(content, size)
        except (EOFError, OverflowError, struct.error) as error:
            raise MovieError(
                f"{self._path}: truncated: the file ends before frame {count}; copy it "
                "again"
            ) from error

    def describe(self, directory: int, tags: bytes) -> tuple[Kind, int]:
        """The kind of a page, and the offset of its pixels or -1."""
        entries = {entry[0]: entry for entry in self._tag.iter_unpack(tags)}
        key = (self.byteorder, *map(entries.get, _KIND_TAGS))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._ask_tifffile(directory)
        if not kind.is_plain or _STRIP_OFFSETS not in entries:
            return kind, -1
        starts = self._integers(entries[_STRIP_OFFSETS])
        sizes: Sequence[int] = (kind.frame_bytes,)
        if _STRIP_BYTES in entries:
            sizes = self._integers(entries[_STRIP_BYTES])
        if len(starts) > 1:
            ends = map(int.__add__, starts[:-1], sizes)
            if len(starts) != len(sizes) or any(map(int.__ne__, starts[1:], ends)):
                return kind, -1
        end = starts[0] + kind.frame_bytes
        if sum(sizes) < kind.frame_bytes or starts[0] < 8 or end > self.file_bytes:
            raise EOFError
        return kind, starts[0]

    def _ask_tifffile(self, directory: int) -> Kind:
        with tifffile.TiffFile(self._path) as tiff:
            tiff.filehandle.seek(directory)
            page = tifffile.TiffPage(tiff, 0)
            is_plain = (
                page.compression == page.predictor == page.fillorder == 1
                and page.ndim == 2
                and page.dtype is not None
                and page.dtype.itemsize * 8 == page.bitspersample
                and not page.is_tiled
            )
            return Kind(
                page.shape, page.dtype, page.nbytes, is_plain, bool(page.subfiletype & 1)
            )

    def _integers(self, entry: tuple[int, int, int, bytes]) -> Sequence[int]:
        """The values of a tag, which are elsewhere if they are longer than its entry."""
        code, type_, count, value = entry
        letter = _INTEGERS.get(type_)
        if letter is None or count == 0:
            raise ValueError(f"tag {code} has {count} values of type {type_}")
        size = count * struct.calcsize(f"={letter}")
        if size > len(value):
            value = self._read(self._offset.unpack(value)[0], size)
        return struct.unpack_from(f"{self.byteorder}{count}{letter}", value)


def find_pages(path: Path, kinds: Kinds | None = None) -> Pages:
    """The pages of a file that belong to a movie of the first of these kinds, by default
    that of the file's first page. Small copies of pages, for viewers, are left out.

    **Raises:**

    [`jaxbkgd.MovieError`][] for a page that cannot be a frame.
    """
    kinds = {} if kinds is None else kinds
    directories, places, first = array("q"), array("q"), None
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        reader = _Reader(path, file, kinds)
        for directory, tags in reader.directories():
            place, reason = -1, ""
            try:
                kind, place = reader.describe(directory, tags)
                first = next(iter(kinds.values()))
                if kind[:2] != first[:2]:
                    if kind.is_small_copy:
                        continue
                    reason = f"is {kind}, the first is {first}; split the movie"
            except EOFError:
                reason = "is truncated: its pixels are not all in the file; copy it again"
            except Exception as error:
                # tifffile raises errors of many types on damage.
                reason = f"has a broken description ({one_line(error)})"
            if reason:
                raise MovieError(f"{path}: page {len(places)} {reason}")
            directories.append(directory)
            places.append(place)
    if first is None:
        raise MovieError(f"{path}: broken: it has no pages")
    return Pages(
        path,
        first,
        reader.byteorder,
        np.array(directories, np.int64),
        np.array(places, np.int64),
        reader.file_bytes,
    )

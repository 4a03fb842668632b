"""The pages of a TIFF file: what they hold, and where their pixels are.

tifffile needs a minute for 10^5 pages that were written one by one, ends at a broken
directory without an error, and does not notice a page of another height. So the directories
are read here, and tifffile decodes what is compressed.
"""

import os
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int

from .movie import MovieError


# Tags of TIFF 6.0 that say what the pixels are, and their defaults.
_KIND_TAGS = {
    254: ("subfile", 0),
    256: ("width", 0),
    257: ("height", 0),
    258: ("bits", 1),
    259: ("compression", 1),
    266: ("fill_order", 1),
    277: ("samples", 1),
    317: ("predictor", 1),
    322: ("tile_width", 0),
    339: ("sample_format", 1),
}
_STRIP_OFFSETS, _STRIP_BYTES = 273, 279
_SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float"}
# Letters of the module struct.
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

# Directories are read in blocks, since the next is often near.
_BLOCK_BYTES = 4096


# A directory has some 15 tags. A larger number than this is damage.
_MAX_TAGS = 4096


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


class Kind(NamedTuple):
    """What a directory says about the pixels of its page."""

    subfile: int
    width: int
    height: int
    bits: int
    compression: int
    fill_order: int
    samples: int
    predictor: int
    tile_width: int
    sample_format: int

    @property
    def pixels(self) -> tuple[int, ...]:
        """What must be equal in all frames of a movie."""
        return (self.height, self.width, self.bits, self.sample_format, self.samples)

    @property
    def frame_bytes(self) -> int:
        return self.height * self.width * self.bits // 8

    @property
    def is_plain(self) -> bool:
        """Whether the file holds the pixels as an array does, if its strips touch."""
        return (
            self.compression == self.predictor == self.fill_order == self.samples == 1
            and self.bits in (8, 16, 32, 64)
            and self.sample_format in _SAMPLE_FORMATS
            and self.tile_width == 0
        )

    def __str__(self) -> str:
        kind = _SAMPLE_FORMATS.get(self.sample_format, "unknown")
        samples = f" x {self.samples}" if self.samples > 1 else ""
        return f"{self.height} x {self.width}{samples} px of {kind}{self.bits}"


@dataclass(frozen=True)
class Pages:
    """The pages of a file, in the order of its chain of directories.

    **Attributes:**

    - `path`: the file.
    - `kind`: of the frames.
    - `byteorder`: `"<"` or `">"`.
    - `directories`: offsets of the directories in the file.
    - `places`: offsets of the pixels, or -1 where they have to be decoded.
    - `fault`: the number of the first page that cannot be a frame and the reason, if any.
    """

    path: Path
    kind: Kind
    byteorder: str
    directories: Int[np.ndarray, " pages"]
    places: Int[np.ndarray, " pages"]
    fault: tuple[int, str] | None

    def __len__(self) -> int:
        return len(self.directories)


class _Reader:
    """Reads the directories of an open file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self.byte_count = file.seek(0, 2)
        magic = self.read(0, 8) if self.byte_count >= 8 else bytes(8)
        self.byteorder = {b"II": "<", b"MM": ">"}.get(magic[:2], "")
        version = struct.unpack_from(f"{self.byteorder}H", magic, 2)[0]
        if not self.byteorder or version not in (42, 43):
            raise MovieError(f"{path}: is not a TIFF file")
        self._is_big = version == 43
        value = "8s" if self._is_big else "4s"
        self._head = struct.Struct(self.byteorder + ("Q" if self._is_big else "H"))
        self._offset = struct.Struct(self.byteorder + ("Q" if self._is_big else "I"))
        self._tag = struct.Struct(self.byteorder + ("HHQ" if self._is_big else "HHI") + value)

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self.byte_count:
            raise EOFError
        self._file.seek(offset)
        content = self._file.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def directories(self) -> Iterator[tuple[int, bytes]]:
        """The offset and the tags of each directory."""
        count, milestone = 0, -1
        try:
            place = 8 if self._is_big else 4
            (offset,) = self._offset.unpack(self.read(place, self._offset.size))
            while offset:
                (tags,) = self._head.unpack(self.read(offset, self._head.size))
                if not 0 < tags <= _MAX_TAGS:
                    raise MovieError(f"{self._path}: broken: page {count} has {tags} tags")
                size = tags * self._tag.size
                content = self.read(offset + self._head.size, size + self._offset.size)
                # A cycle meets a milestone again, wherever it starts (Brent, 1980).
                if offset == milestone:
                    raise MovieError(f"{self._path}: broken: its pages repeat")
                yield offset, content[:size]
                count += 1
                if count & (count - 1) == 0:
                    milestone = offset
                (offset,) = self._offset.unpack_from(content, size)
        except (EOFError, OverflowError) as error:
            raise MovieError(
                f"{self._path}: truncated: the file ends before frame {count}; copy it again"
            ) from error

    def describe(self, tags: bytes) -> tuple[Kind, int]:
        """The kind of a page, and the offset of its pixels, or -1."""
        entries = {}
        for code, type_, count, value in self._tag.iter_unpack(tags):
            entries.setdefault(code, (type_, count, value))
        values = [
            self._integers(code, *entries[code])[0] if code in entries else default
            for code, (_, default) in _KIND_TAGS.items()
        ]
        kind = Kind(*values)
        if not kind.is_plain or _STRIP_OFFSETS not in entries:
            return kind, -1
        starts = self._integers(_STRIP_OFFSETS, *entries[_STRIP_OFFSETS])
        sizes: Sequence[int] = [kind.frame_bytes]
        if _STRIP_BYTES in entries:
            sizes = self._integers(_STRIP_BYTES, *entries[_STRIP_BYTES])
        if len(starts) > 1:
            ends = map(int.__add__, starts[:-1], sizes)
            if len(starts) != len(sizes) or any(map(int.__ne__, starts[1:], ends)):
                return kind, -1
        end = starts[0] + kind.frame_bytes
        if sum(sizes) < kind.frame_bytes or starts[0] < 8 or end > self.byte_count:
            raise EOFError
        return kind, starts[0]

    def _integers(self, code: int, type_: int, count: int, value: bytes) -> Sequence[int]:
        """The values of a tag, which are elsewhere if they are longer than `value`."""
        letter = _INTEGERS.get(type_)
        if letter is None or count == 0:
            raise ValueError(f"tag {code} has {count} values of type {type_}")
        size = count * struct.calcsize(f"={letter}")
        if size > len(value):
            value = self.read(self._offset.unpack(value)[0], size)
        return struct.unpack_from(f"{self.byteorder}{count}{letter}", value)


def find_pages(path: Path, first: Kind | None = None) -> Pages:
    """The pages of a file whose pixels are of the kind of `first`, by default its own first
    page. Small copies of pages, for viewers, are left out."""
    directories, places, fault = array("q"), array("q"), None
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        reader = _Reader(path, file)
        for directory, tags in reader.directories():
            kind, place, reason = None, -1, None
            try:
                kind, place = reader.describe(tags)
            except EOFError:
                reason = "is truncated: its pixels are not all in the file"
            except ValueError as error:
                reason = f"has a broken description ({error})"
            if kind is not None:
                first = first or kind
                if kind.pixels != first.pixels:
                    if kind.subfile & 1:
                        continue
                    reason = f"is {kind}, the first is {first}; split the movie"
            if reason and fault is None:
                fault = len(places), reason
            directories.append(directory)
            places.append(place)
    if first is None or not places:
        reason = f"its first frame {fault[1]}" if fault else "it has no pages"
        raise MovieError(f"{path}: broken: {reason}")
    return Pages(
        path, first, reader.byteorder, np.array(directories), np.array(places), fault
    )

"""The pages of a TIFF file: what they are, and where their pixels lie."""

import os
import struct
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .movie import MovieError


# What a page's directory says of its pixels, by the tags of TIFF 6.0, and what it means
# where it does not say.
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
_TAGS = {*_KIND_TAGS, _STRIP_OFFSETS, _STRIP_BYTES}
_SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float"}

# Of the types of integers, the bytes and the struct's letter.
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

# Directories are read with what follows them, and often the next one does.
_BLOCK_BYTES = 4096
# A directory has some 15 tags; one with more than this lies.
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
    """What a page's directory says of its pixels."""

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
        """What must be the same in all frames of a movie."""
        return (self.height, self.width, self.bits, self.sample_format, self.samples)

    @property
    def frame_bytes(self) -> int:
        return self.height * self.width * self.bits // 8

    @property
    def is_stored_plainly(self) -> bool:
        """Whether, in strips, its pixels lie in the file as they lie in an array."""
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


@dataclass
class Pages:
    """The pages of a file, in the order of its chain.

    `directories` are the offsets of their descriptions, `places` those of their pixels,
    or -1 where they have to be decoded. `fault` is the first page that cannot be a frame,
    and why.
    """

    path: Path
    kind: Kind
    order: str
    directories: np.ndarray
    places: np.ndarray
    fault: tuple[int, str] | None

    def __len__(self) -> int:
        return len(self.directories)


class _Walk:
    """Follows a file's chain of directories, in a few microseconds for each.

    tifffile would take much longer, and cut a broken chain short without a word.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._block, self._start = b"", 0
        try:
            magic = self._at(0, 8)
        except EOFError:
            magic = bytes(8)
        self.order = {b"II": "<", b"MM": ">"}.get(magic[:2], "")
        version = struct.unpack_from(f"{self.order}H", magic, 2)[0]
        if not self.order or version not in (42, 43):
            raise MovieError(f"{file.path}: is not a TIFF file")
        self._is_big = version == 43
        self._head = struct.Struct(self.order + ("Q" if self._is_big else "H"))
        self._offset = struct.Struct(self.order + ("Q" if self._is_big else "I"))
        # Code, type, count, and the value or, where it is longer, its offset.
        self._tag = struct.Struct(self.order + ("HHQ8s" if self._is_big else "HHI4s"))
        self._positions: dict[bytes, dict[int, int]] = {}
        self._kinds: dict[tuple[bytes, ...], Kind] = {}

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """The offset and the tags of each directory."""
        path, count, milestone = self._file.path, 0, -1
        try:
            place = 8 if self._is_big else 4
            (offset,) = self._offset.unpack(self._at(place, self._offset.size))
            while offset:
                (tags,) = self._head.unpack(self._at(offset, self._head.size))
                if not 0 < tags <= _MAX_TAGS:
                    raise MovieError(
                        f"{path}: broken: page {count} says that it has {tags} tags"
                    )
                size = tags * self._tag.size
                content = self._at(offset + self._head.size, size + self._offset.size)
                # A cycle meets a milestone again, wherever it starts (Brent, 1980).
                if offset == milestone:
                    raise MovieError(f"{path}: broken: its pages repeat")
                yield offset, content[:size]
                count += 1
                if count & (count - 1) == 0:
                    milestone = offset
                (offset,) = self._offset.unpack_from(content, size)
        except (EOFError, OverflowError) as error:
            raise MovieError(
                f"{path}: truncated: the file ends before frame {count}"
            ) from error

    def describe(self, tags: bytes) -> tuple[Kind, int]:
        """What a page is, and where its pixels lie, or -1 if they have to be decoded."""
        size = self._tag.size
        codes = tags[0::size] + tags[1::size]
        positions = self._positions.get(codes)
        if positions is None:
            every = range(0, len(tags), size)
            found = {self._tag.unpack_from(tags, at)[0]: at for at in every}
            positions = {code: found[code] for code in _TAGS if code in found}
            self._positions[codes] = positions
        said = (
            *(tags[at : at + size] for code, at in positions.items() if code in _KIND_TAGS),
        )
        kind = self._kinds.get(said)
        if kind is None:
            values = {code: default for code, (_, default) in _KIND_TAGS.items()}
            for code in values.keys() & positions.keys():
                values[code] = self._integers(tags, positions[code])[0]
            kind = self._kinds[said] = Kind(*values.values())
        if not kind.is_stored_plainly or _STRIP_OFFSETS not in positions:
            return kind, -1
        starts = self._integers(tags, positions[_STRIP_OFFSETS])
        sizes = (kind.frame_bytes,)
        if _STRIP_BYTES in positions:
            sizes = self._integers(tags, positions[_STRIP_BYTES])
        if len(starts) > 1:
            ends = map(int.__add__, starts[:-1], sizes)
            if len(starts) != len(sizes) or any(map(int.__ne__, starts[1:], ends)):
                return kind, -1
        place = min(starts)
        end = place + kind.frame_bytes
        if sum(sizes) < kind.frame_bytes or place < 8 or end > self._file.byte_count:
            raise EOFError
        return kind, place

    def _integers(self, tags: bytes, at: int) -> tuple[int, ...]:
        """The values of the tag that is `at` bytes into the tags."""
        code, type_, count, value = self._tag.unpack_from(tags, at)
        letter = _INTEGERS.get(type_)
        if letter is None or count == 0:
            raise ValueError(f"tag {code} has {count} values of type {type_}")
        form = f"{self.order}{count}{letter}"
        if count > self._file.byte_count:
            raise EOFError
        size = struct.calcsize(form)
        if size > len(value):
            value = self._at(self._offset.unpack(value)[0], size)
        return struct.unpack_from(form, value)

    def _at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        if offset + count > self._file.byte_count:
            raise EOFError
        if not self._start <= offset <= offset + count <= self._start + len(self._block):
            block = np.empty(max(count, _BLOCK_BYTES), np.uint8)
            filled = self._file.fill(block, offset)
            self._start, self._block = offset, block[:filled].tobytes()
        first = offset - self._start
        read = self._block[first : first + count]
        if len(read) < count:
            raise EOFError
        return read


def find_pages(path: Path, first: Kind | None = None) -> Pages:
    """The pages of a file, whose pixels are like those of its first page, or of `first`."""
    directories, places, fault = array("q"), array("q"), None
    file = SourceFile(path)
    try:
        walk = _Walk(file)
        for directory, tags in walk:
            kind, place, reason = None, -1, None
            try:
                kind, place = walk.describe(tags)
            except EOFError:
                reason = "is truncated: its pixels are not all in the file"
            except ValueError as error:
                reason = f"has a broken description ({error})"
            if kind is not None:
                first = first or kind
                if kind.pixels != first.pixels:
                    # A small copy of a page, for viewers.
                    if kind.subfile & 1:
                        continue
                    reason = f"is {kind}, the first is {first}; split the movie"
            if reason and fault is None:
                fault = len(places), reason
            directories.append(directory)
            places.append(place)
    finally:
        file.close()
    if first is None:
        reason = f"its first frame {fault[1]}" if fault else "it has no pages"
        raise MovieError(f"{path}: broken: {reason}")
    return Pages(
        path,
        first,
        walk.order,
        np.array(directories, np.int64),
        np.array(places, np.int64),
        fault,
    )

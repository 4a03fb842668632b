"""Arrays of Zarr v2 and v3: what their metadata say, and their chunks.

Chunks are decoded here, one by one, and not by zarr-python: it takes the word of a chunk's
header for what the chunk holds, so that a damaged one can end the process, fill the memory,
or pass for another.

Formats: Zarr v2 and v3 (zarr-specs.readthedocs.io).
"""

import bz2
import collections
import functools
import gzip
import io
import json
import lzma
import math
import re
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numcodecs
import numpy as np


_METADATA_FILES = "zarr.json", ".zarray", ".zgroup"

# What no writer exceeds, and believing it would cost memory or time.
_MAX_METADATA_BYTES = 2**22
_MAX_CHUNK_BYTES = 2**30
_MAX_CHUNKS_IN_SHARD = 2**20
_MAX_LENGTH = 2**40


# In a shard's index, the offset and the length of a chunk that is not there.
_NO_CHUNK = 2**64 - 1


def is_zarr(path: Path) -> bool:
    """Whether a folder holds an array or a group of Zarr v2 or v3."""
    return any((path / file).is_file() for file in _METADATA_FILES)


class Node(NamedTuple):
    """An array or a group, and the files that say what it is."""

    folder: Path
    is_array: bool
    metadata: Mapping[str, Any]
    attributes: Mapping[str, Any]
    files: Sequence[Path]

    def child(self, path: str) -> "Node":
        inside = PurePosixPath(path)
        if inside.is_absolute() or ".." in inside.parts or re.search(r"[:\\]", path):
            raise ValueError(f"the path {path!r} leads out of it")
        return open_node(self.folder / inside)


def open_node(folder: Path) -> Node:
    version_3 = folder / "zarr.json"
    if version_3.is_file():
        metadata = _load_json(version_3)
        require(metadata["zarr_format"] == 3, "zarr.json is not of Zarr v3")
        is_array = {"array": True, "group": False}[metadata["node_type"]]
        return Node(folder, is_array, metadata, metadata.get("attributes", {}), [version_3])
    is_array = (folder / ".zarray").is_file()
    file, beside = folder / (".zarray" if is_array else ".zgroup"), folder / ".zattrs"
    metadata = _load_json(file)
    require(metadata["zarr_format"] == 2, f"{file.name} is not of Zarr v2")
    if not beside.is_file():
        return Node(folder, is_array, metadata, {}, [file])
    return Node(folder, is_array, metadata, _load_json(beside), [file, beside])


def _load_json(file: Path) -> dict[str, Any]:
    byte_count = file.stat().st_size
    require(byte_count <= _MAX_METADATA_BYTES, f"{file.name} has {byte_count / 1e6:.0f} MB")
    loaded = json.loads(file.read_bytes())
    require(isinstance(loaded, dict), f"{file.name} is no JSON object")
    return loaded


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@dataclass(frozen=True)
class ZarrArray:
    """How an array lies in its folder.

    **Attributes:**

    - `chunks`: the shape of what is decoded at once.
    - `shards`: the shape of what a file holds, where that is more than a chunk.
    - `stored`: the type of the pixels, with their byte order.
    - `order`: that of the axes within a chunk.
    - `codecs`: what packed a chunk, first to last, as (name, settings).
    - `file`: gives the name of a chunk's file, by its indices.
    - `fill`: the value of the pixels whose chunk was never written, where there is one.
    - `names`: of the axes, where the array says so.
    """

    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    stored: np.dtype
    order: tuple[int, ...]
    codecs: Sequence[tuple[str, Mapping[str, Any]]]
    file: Callable[[Sequence[int]], str]
    fill: Any
    names: Sequence[str | None] | None
    shards: tuple[int, ...] | None = None
    index_first: bool = False
    index_has_checksum: bool = False

    def __post_init__(self) -> None:
        require(
            len(self.shape) == len(self.chunks) == len(self.order),
            f"shape {self.shape} in chunks {self.chunks}",
        )
        require(
            sorted(self.order) == list(range(len(self.shape))),
            f"the axes' order {self.order}",
        )
        require(
            math.prod(self.chunks) * self.stored.itemsize <= _MAX_CHUNK_BYTES,
            f"chunks of {self.chunks} {self.stored} are too large to be read",
        )
        if self.shards is not None:
            require(
                len(self.shards) == len(self.chunks)
                and all(s % c == 0 for s, c in zip(self.shards, self.chunks, strict=True))
                and math.prod(self._chunks_in_shard) <= _MAX_CHUNKS_IN_SHARD,
                f"shards {self.shards} of chunks {self.chunks}",
            )
        # Looks at the settings of all codecs.
        _ = self._packed_bytes

    @functools.cached_property
    def _chunks_in_shard(self) -> tuple[int, ...]:
        shards = self.shards or self.chunks
        return tuple(s // c for s, c in zip(shards, self.chunks, strict=True))

    @functools.cached_property
    def _packed_bytes(self) -> list[int | None]:
        """The length of a chunk before the first codec, after it, and so on; None after a
        compressor."""
        pixels = math.prod(self.chunks)
        lengths: list[int | None] = [pixels * self.stored.itemsize]
        for name, settings in self.codecs:
            length = lengths[-1]
            if name in _FILTERS:
                _v2_type(settings["dtype"])
                length = (
                    pixels * _v2_type(settings.get("astype", settings["dtype"])).itemsize
                )
            elif name == "crc32c":
                length = None if length is None else length + 4
            elif name in _COMPRESSORS:
                require(length is not None, "it is compressed twice")
                length = None
            lengths.append(length)
        return lengths

    def path(self, index: Sequence[int]) -> Path:
        """The file of a chunk."""
        return self.folder / self.file(
            [i // n for i, n in zip(index, self._chunks_in_shard, strict=True)]
        )

    def load(self, index: Sequence[int]) -> np.ndarray | None:
        """A chunk, or None if it was never written."""
        packed = self._load_packed(index)
        if packed is None:
            return None
        view = memoryview(packed)
        steps = list(zip(self.codecs, self._packed_bytes, strict=False))
        for (name, settings), length in reversed(steps):
            view = memoryview(_CODECS[name](view, settings, length)).cast("B")
            require(length in (None, len(view)), f"{name} gives {len(view)} bytes")
        require(len(view) == self._packed_bytes[0], f"it has {len(view)} bytes")
        lengths = [self.chunks[axis] for axis in self.order]
        pixels = np.frombuffer(view, self.stored).reshape(lengths)
        return pixels.transpose(np.argsort(self.order))

    def _load_packed(self, index: Sequence[int]) -> bytes | None:
        path = self.path(index)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        require(stat.S_ISREG(status.st_mode), "it is not a file")
        with path.open("rb") as file:
            offset, length = 0, status.st_size
            if self.shards is not None:
                offset, length = self._find_in_shard(file, length, index)
                if offset == length == _NO_CHUNK:
                    return None
            # What can't be packed grows a little.
            most = self._packed_bytes[-1] or 2 * (self._packed_bytes[0] or 0) + 2**16
            require(
                offset + length <= status.st_size and length <= most,
                f"it has {length} bytes of {status.st_size}",
            )
            file.seek(offset)
            return file.read(length)

    def _find_in_shard(
        self, file: io.BufferedReader, byte_count: int, index: Sequence[int]
    ) -> tuple[int, int]:
        counts = self._chunks_in_shard
        index_bytes = 16 * math.prod(counts) + 4 * self.index_has_checksum
        require(index_bytes <= byte_count, "it ends in its index")
        file.seek(0 if self.index_first else byte_count - index_bytes)
        table = memoryview(file.read(index_bytes))
        if self.index_has_checksum:
            table = _check_crc32c(table, {}, None)
        entries = np.frombuffer(table, "<u8").reshape(*counts, 2)
        offset, length = entries[tuple(i % n for i, n in zip(index, counts, strict=True))]
        return int(offset), int(length)


def _lengths(value: Any) -> tuple[int, ...]:
    require(
        isinstance(value, list)
        and all(type(x) is int and 1 <= x <= _MAX_LENGTH for x in value),
        f"lengths {value!r:.60}",
    )
    return tuple(value)


def _v2_type(value: Any) -> np.dtype:
    require(
        isinstance(value, str) and re.fullmatch(r"[<>|][buif][1248]", value) is not None,
        f"pixels of {value!r:.60}",
    )
    return np.dtype(value)


def _v3_type(value: Any) -> np.dtype:
    require(
        isinstance(value, str)
        and re.fullmatch(r"bool|u?int(8|16|32|64)|float(16|32|64)", value) is not None,
        f"pixels of {value!r:.60}",
    )
    return np.dtype(value)


def _fill_value(value: Any, dtype: np.dtype) -> Any:
    if isinstance(value, str) and value.startswith("0x"):
        return np.frombuffer(bytes.fromhex(value[2:]), dtype.newbyteorder(">"))[0]
    if isinstance(value, str):
        value = float(value)
    require(value is None or isinstance(value, bool | int | float), "the fill value")
    return value if value is None else dtype.type(value)


def read_array(node: Node) -> ZarrArray:
    """What the metadata of an array say of it."""
    return (_read_v2 if node.files[0].name == ".zarray" else _read_v3)(node)


def _read_v2(node: Node) -> ZarrArray:
    about = node.metadata
    shape, stored = _lengths(about["shape"]), _v2_type(about["dtype"])
    axes = tuple(range(len(shape)))
    separator = {".": ".", "/": "/"}[about.get("dimension_separator", ".")]
    packers = [*(about.get("filters") or []), about.get("compressor")]
    return ZarrArray(
        folder=node.folder,
        shape=shape,
        chunks=_lengths(about["chunks"]),
        stored=stored,
        order={"C": axes, "F": axes[::-1]}[about["order"]],
        codecs=[(_known(x["id"], _CODECS), x) for x in packers if x is not None],
        file=lambda index: separator.join(map(str, index)),
        fill=_fill_value(about["fill_value"], stored),
        names=node.attributes.get("_ARRAY_DIMENSIONS"),
    )


def _read_v3(node: Node) -> ZarrArray:
    about = node.metadata
    shape, pixels = _lengths(about["shape"]), _v3_type(about["data_type"])
    require(not about.get("storage_transformers"), "storage transformers")
    _known(about["chunk_grid"]["name"], ["regular"])
    chunks = _lengths(about["chunk_grid"]["configuration"]["chunk_shape"])
    keys = about["chunk_key_encoding"]
    prefix, separator = {"default": (["c"], "/"), "v2": ([], ".")}[keys["name"]]
    separator = _settings(keys).get("separator", separator)
    separator = {".": ".", "/": "/"}[separator]
    codecs, sharding = about["codecs"], {}
    if codecs[0]["name"] == "sharding_indexed":
        require(len(codecs) == 1, "shards that are packed again")
        settings = _settings(codecs[0])
        index = settings["index_codecs"]
        names = [codec["name"] for codec in index]
        require(
            names in (["bytes"], ["bytes", "crc32c"])
            and _settings(index[0])["endian"] == "little",
            f"a shard's index packed by {names}",
        )
        sharding = {
            "shards": chunks,
            "index_first": {"start": True, "end": False}[
                settings.get("index_location", "end")
            ],
            "index_has_checksum": len(index) == 2,
        }
        chunks, codecs = _lengths(settings["chunk_shape"]), settings["codecs"]
    order = tuple(range(len(shape)))
    codecs = collections.deque(codecs)
    while codecs[0]["name"] == "transpose":
        order = tuple(order[axis] for axis in _settings(codecs.popleft())["order"])
    as_bytes = codecs.popleft()
    _known(as_bytes["name"], ["bytes"])
    is_little = {"little": True, "big": False}[_settings(as_bytes).get("endian", "little")]
    return ZarrArray(
        folder=node.folder,
        shape=shape,
        chunks=chunks,
        stored=pixels.newbyteorder("<" if is_little else ">"),
        order=order,
        codecs=[
            (
                _known(codec["name"].removeprefix("numcodecs."), _CODECS.keys() - _FILTERS),
                _settings(codec),
            )
            for codec in codecs
        ],
        file=lambda index: separator.join([*prefix, *map(str, index)]),
        fill=_fill_value(about["fill_value"], pixels),
        names=about.get("dimension_names"),
        **sharding,
    )


def _settings(named: Mapping[str, Any]) -> Mapping[str, Any]:
    return named.get("configuration", {})


def _known(name: str, among: Any) -> str:
    require(name in among, f"{name!r:.60} is not one of {', '.join(sorted(among))}")
    return name


# A codec takes what it packed, its settings, and the length of what that was. What says to
# be of another length is refused before there is memory for it.


def _gunzip(packed: memoryview, settings: Mapping[str, Any], length: int) -> bytes:
    return gzip.GzipFile(fileobj=io.BytesIO(packed)).read(length + 1)


def _inflate(packed: memoryview, settings: Mapping[str, Any], length: int) -> bytes:
    decoder = zlib.decompressobj()
    unpacked = decoder.decompress(packed, length + 1)
    require(decoder.eof, "it has no end")
    return unpacked


def _unpack_bz2(packed: memoryview, settings: Mapping[str, Any], length: int) -> bytes:
    return bz2.BZ2File(io.BytesIO(packed)).read(length + 1)


def _unpack_lzma(packed: memoryview, settings: Mapping[str, Any], length: int) -> bytes:
    return lzma.LZMAFile(io.BytesIO(packed)).read(length + 1)


def _unpack_lz4(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    require(int.from_bytes(packed[:4], "little") == length, "its header lies")
    return numcodecs.LZ4().decode(packed)


def _unpack_blosc(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    # Blosc reads as far as its header says, which may be beyond the end.
    lengths = np.frombuffer(packed[4:16], "<u4")
    require(list(lengths[[0, 2]]) == [length, len(packed)], "its header lies")
    return numcodecs.Blosc().decode(packed)


def _unpack_zstd(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    # RFC 8878, 3.1.1.1: where a frame says its length, it is after the window and the
    # dictionary. Decoding into `out` checks that of frames that do not, and its end.
    has_window, size = packed[4] >> 5 & 1 == 0, packed[4] >> 6
    if size or not has_window:
        at = 5 + has_window + (0, 1, 2, 4)[packed[4] & 3]
        said = int.from_bytes(packed[at : at + 2**size], "little") + 256 * (size == 1)
        require(said == length, "its header lies")
    out = np.empty(length, np.uint8)
    numcodecs.Zstd().decode(packed, out)
    return out


def _unshuffle(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    size = settings.get("elementsize", 4)
    require(type(size) is int and size >= 1 and len(packed) % size == 0, "its shuffle")
    return numcodecs.Shuffle(size).decode(packed)


def _check_crc32c(packed: memoryview, settings: Mapping[str, Any], length: Any) -> Any:
    require(settings.get("location", "end") == "end", "its checksum is not at the end")
    return numcodecs.get_codec({"id": "crc32c", "location": "end"}).decode(packed)


def _add_up(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    filter = numcodecs.Delta(settings["dtype"], settings.get("astype"))
    return filter.decode(packed).tobytes()


def _scale(packed: memoryview, settings: Mapping[str, Any], length: int) -> Any:
    filter = numcodecs.FixedScaleOffset(
        float(settings["offset"]),
        float(settings["scale"]),
        settings["dtype"],
        settings.get("astype"),
    )
    return filter.decode(packed).tobytes()


_COMPRESSORS: dict[str, Callable[..., Any]] = {
    "blosc": _unpack_blosc,
    "bz2": _unpack_bz2,
    "gzip": _gunzip,
    "lz4": _unpack_lz4,
    "lzma": _unpack_lzma,
    "zlib": _inflate,
    "zstd": _unpack_zstd,
}
_FILTERS: dict[str, Callable[..., Any]] = {"delta": _add_up, "fixedscaleoffset": _scale}
_CODECS = _COMPRESSORS | _FILTERS | {"crc32c": _check_crc32c, "shuffle": _unshuffle}

"""Zarr and OME-Zarr, read and written by zarr-python.

Formats: Zarr v2 and v3 (zarr-specs.readthedocs.io), OME-Zarr 0.4 and 0.5
(ngff.openmicroscopy.org).
"""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numcodecs
import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import ZipStore

from .movie import check_pixels, Movie, MovieError, one_line
from .sinks import Layout, Sink


# A frame in more chunks would take minutes to read.
_MAX_CHUNKS_IN_FRAME = 2**16

# Decoded frames are kept, since the next frames to be read are often in the same chunks.
_CACHE_BYTES = 2**27

# Small chunks are read together: a call of zarr-python takes about a millisecond, and a
# remote store many more.
_RUN_BYTES = 2**24

_METADATA_FILES = "zarr.json", ".zarray", ".zgroup"

_AXES = {
    "t": "t", "time": "t", "frame": "t", "frames": "t",
    "c": "c", "channel": "c", "channels": "c",
    "z": "z", "depth": "z",
    "y": "y", "height": "y", "x": "x", "width": "x",
}  # fmt: skip
_UNNAMED_AXES = {2: "yx", 3: "tyx", 4: "tcyx"}

# OME-Zarr names units as UDUNITS-2 does.
_LENGTHS_UM = {
    "picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0,
    "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6,
}  # fmt: skip
_TIMES_S = {
    "nanosecond": 1e-9, "microsecond": 1e-6, "millisecond": 1e-3, "second": 1.0,
    "minute": 60.0, "hour": 3600.0,
}  # fmt: skip

# Large enough for a disk to be fast, small enough to be read in part.
_TARGET_CHUNK_BYTES = 2**22

# Frames of one channel that are decoded together.
_Block = tuple[range, concurrent.futures.Future[np.ndarray]]


def is_zarr(path: Path) -> bool:
    """Whether a folder holds an array or a group of Zarr v2 or v3."""
    return any((path / file).is_file() for file in _METADATA_FILES)


def open_zarr(source: Path | str) -> Movie:
    """Opens a Zarr v2 or v3 array, or the image of an OME-Zarr, in full resolution.

    `source` is a folder, a .zip of it, or a URL. Frames are the times; depths are frames
    too, all those of the first time before those of the second.

    A chunk that was never written holds the fill value, as the format has it. The first
    such chunk that is read is warned of, since a lost chunk looks the same.

    **Raises:**

    `MovieError` if the metadata are broken or describe several images and, when frames are
    read, if a chunk is damaged.
    """
    name = str(source)
    with _one_line_errors(f"{name}: cannot be read"), contextlib.ExitStack() as files:
        store: Any = source
        top = None
        if isinstance(source, Path) and source.is_file():
            with zipfile.ZipFile(source) as archive:
                tops = {file.partition("/")[0] for file in archive.namelist()}
            if len(tops) == 1:
                top = tops.pop()
            store = files.enter_context(ZipStore(source, mode="r"))
        node = zarr.open(store, mode="r", path=top)
        array, multiscale = (
            (node, None) if isinstance(node, zarr.Array) else _image(name, node)
        )
        format = f"Zarr v{array.metadata.zarr_format}"
        if multiscale is None:
            axes, scales = _plain_axes(array), _plain_scales(node.attrs.asdict())
        else:
            format = f"OME-{format}"
            axes = _ome_axes(multiscale)
            scales = _ome_scales(multiscale, axes)
        pixels = _ZarrPixels(name, array, axes)
        movie = Movie(
            pixels,
            name=name,
            format=format,
            paths=[source] if isinstance(source, Path) else (),
            close=files.pop_all().close,
        )
    if "y" in scales and "x" in scales:
        movie.pixel_size_um = scales["y"], scales["x"]
    if pixels.depths == 1:
        movie.frame_interval_s = scales.get("t")
    return movie


def _image(name: str, group: zarr.Group) -> tuple[zarr.Array, Mapping[str, Any] | None]:
    """The array of a group, and what OME-Zarr says of it."""
    attributes = group.attrs.asdict()
    about: Any = attributes.get("ome", attributes)
    multiscale = None
    if "plate" in about or "well" in about:
        raise MovieError(
            f"{name}: is a plate of several images; open one, such as {name}/A/1/0"
        )
    if "multiscales" in about:
        multiscale = about["multiscales"][0]
        path = multiscale["datasets"][0]["path"]
    elif "bioformats2raw.layout" in about:
        if "1" in group:
            raise MovieError(f"{name}: holds several images; open one, such as {name}/0")
        path = "0"
    else:
        names = sorted(group.array_keys())
        if len(names) != 1:
            held = f"the arrays {', '.join(names[:20])}" if names else "no array"
            raise MovieError(
                f"{name}: is a Zarr group that holds {held} and no image of OME-Zarr; open "
                f"one array: {name}/{names[0] if names else 'NAME'}"
            )
        (path,) = names
    node = group[path]
    return (node, multiscale) if isinstance(node, zarr.Array) else _image(name, node)


class _ZarrPixels:
    """The frames of an array, (frames, channels, height, width), with a cache.

    A block is all chunks that hold the same times, or the same depths of one time.
    """

    def __init__(self, name: str, array: zarr.Array, axes: str) -> None:
        _require(len(axes) == array.ndim, f"axes {axes} of an array of {array.shape}")
        # To unpickle is to run code.
        codecs = *array.filters, *array.compressors
        is_pickled = any(isinstance(codec, numcodecs.Pickle) for codec in codecs)
        _require(not is_pickled, "its pixels are pickled")
        self._name = name
        self._array = array
        self._axes = axes
        self._length = dict.fromkeys("tzcyx", 1)
        self._chunk = self._length | dict(zip(axes, array.chunks, strict=True))
        self._length |= dict(zip(axes, array.shape, strict=True))
        times, self.depths, channels, height, width = self._length.values()
        shape = times * self.depths, channels, height, width
        self.dtype = array.dtype
        self.shape = check_pixels(name, shape, self.dtype)
        tiles = math.prod(-(-self._length[axis] // self._chunk[axis]) for axis in "yx")
        _require(tiles <= _MAX_CHUNKS_IN_FRAME, f"its frames are in {tiles} chunks")
        # Frames that are decoded together, and after which the blocks begin anew.
        is_split_in_depth = self._chunk["t"] == 1 and self._chunk["z"] < self.depths
        self.chunk_frames = self._chunk["z" if is_split_in_depth else "t"]
        self._period = self.depths
        if not is_split_in_depth:
            self.chunk_frames = min(self.chunk_frames, times) * self.depths
            self._period = self.shape[0]
        self._block_bytes = self.chunk_frames * height * width * self.dtype.itemsize
        # Blosc reads beyond the end of a truncated chunk.
        self._is_blosc = array.shards is None and any(
            isinstance(codec, numcodecs.Blosc | zarr.codecs.BloscCodec)
            for codec in array.compressors[-1:]
        )
        self._is_warned = False
        self._lock = threading.Lock()
        self._kept = collections.OrderedDict[tuple[int, int], Any]()

    def __getitem__(self, index: tuple[slice, int]) -> np.ndarray:
        frames, channel = index
        start, stop, _ = frames.indices(self.shape[0])
        blocks = list(self._blocks(start, stop))
        if not blocks:
            return np.empty((0, *self.shape[2:]), self.dtype)
        runs: list[list[_Block]] = []
        with self._lock:
            for block in blocks:
                key = block.start, channel
                if key not in self._kept:
                    self._kept[key] = concurrent.futures.Future()
                    if not runs or not self._is_continued(runs[-1], block):
                        runs.append([])
                    runs[-1].append((block, self._kept[key]))
                self._kept.move_to_end(key)
            futures = [self._kept[block.start, channel] for block in blocks]
            while len(self._kept) > max(1, _CACHE_BYTES // self._block_bytes):
                self._kept.popitem(last=False)
        for run in runs:
            self._decode_run(run, channel)
        # Another thread may be decoding some of them.
        read = np.concatenate([future.result() for future in futures])
        first = blocks[0].start
        return read[start - first : stop - first]

    def _blocks(self, start: int, stop: int) -> Iterator[range]:
        """The frames of each block that holds some of frames `start` to `stop`."""
        while start < stop:
            periods, frame = divmod(start, self._period)
            first = start - frame % self.chunk_frames
            start = min(first + self.chunk_frames, (periods + 1) * self._period)
            yield range(first, start)

    def _is_continued(self, run: list[_Block], block: range) -> bool:
        """Whether a block can be read together with those before it."""
        return (
            self._period == self.shape[0]
            and run[-1][0].stop == block.start
            and (len(run) + 1) * self._block_bytes <= _RUN_BYTES
        )

    def _decode_run(self, run: list[_Block], channel: int) -> None:
        first, last = run[0][0], run[-1][0]
        try:
            frames = self._decode(range(first.start, last.stop), channel)
            for block, future in run:
                future.set_result(frames[block.start - first.start :][: len(block)])
        except BaseException as error:
            if len(run) > 1 and isinstance(error, Exception):
                # Some of the blocks may be whole.
                for block in run:
                    self._decode_run([block], channel)
                return
            for block, future in run:
                with self._lock:
                    self._kept.pop((block.start, channel), None)
                future.set_exception(error)

    def _decode(self, frames: range, channel: int) -> np.ndarray:
        t, z = divmod(frames[0], self.depths)
        last_t, last_z = divmod(frames[-1], self.depths)
        window = {axis: range(self._length[axis]) for axis in self._axes}
        window |= {"t": range(t, last_t + 1), "z": range(z, last_z + 1)}
        window |= {"c": range(channel, channel + 1)}
        where = (
            f"frames {frames[0]} to {frames[-1]}"
            if len(frames) > 1
            else f"frame {frames[0]}"
        )
        says = f"{self._name}: {where} cannot be read; copy the movie again"
        with _one_line_errors(says):
            if self._is_blosc:
                for index, _ in self._chunks_in(window):
                    self._refuse_truncated(index)
            selection = tuple(slice(w.start, w.stop) for w in self._in_order(window))
            read = np.asarray(self._array[selection])
            for index, inside in self._chunks_in(window):
                if self._is_missing(index, read[inside]):
                    self._warn_of_missing(index, where)
        order = [self._axes.index(axis) for axis in "tzcyx" if axis in self._axes]
        return read.transpose(order).reshape(len(frames), *self.shape[2:])

    def _in_order(self, window: Mapping[str, range]) -> list[range]:
        return [window[axis] for axis in self._axes]

    def _chunks_in(
        self, window: Mapping[str, range]
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """The index of each chunk, and its place in the array that is read."""
        along = []
        for axis, w in zip(self._axes, self._in_order(window), strict=True):
            step = self._chunk[axis]
            indices = range(w.start // step, (w.stop - 1) // step + 1)
            edges = [(i, max(i * step - w.start, 0), (i + 1) * step) for i in indices]
            along.append([(i, slice(low, high - w.start)) for i, low, high in edges])
        for places in itertools.product(*along):
            yield tuple(i for i, _ in places), tuple(inside for _, inside in places)

    def _stored(self, index: Sequence[int]) -> Any:
        """Where the store has the file of a chunk, or of its shard."""
        array = self._array
        chunks, files = array.chunks, array.shards or array.chunks
        key = [i * c // f for i, c, f in zip(index, chunks, files, strict=True)]
        return array.store_path / array.metadata.encode_chunk_key(tuple(key))

    def _refuse_truncated(self, index: Sequence[int]) -> None:
        stored = self._stored(index)
        header = sync(stored.get(byte_range=RangeByteRequest(0, 16)))
        if header is not None:
            byte_count = sync(stored.store.getsize(stored.path))
            named = int.from_bytes(header.to_bytes()[12:], "little")
            _require(named == byte_count, f"a chunk has {byte_count} of {named} bytes")

    def _is_missing(self, index: Sequence[int], pixels: np.ndarray) -> bool:
        # zarr-python takes no fill value for 0.
        fill = self.dtype.type(self._array.fill_value or 0)
        if not (np.isnan(pixels) if fill != fill else pixels == fill).all():
            return False
        # Within a shard, writers leave out the chunks that they have not written.
        return self._array.shards is not None or not sync(self._stored(index).exists())

    def _warn_of_missing(self, index: Sequence[int], where: str) -> None:
        fill = self._array.fill_value
        missing = f"{where}: chunk {self._stored(index).path} is missing"
        if fill is None:
            raise ValueError(f"{missing}, and the array has no fill value")
        with self._lock:
            is_first, self._is_warned = not self._is_warned, True
        if not is_first:
            return
        if self._array.shards is None and not self._array.nchunks_initialized:
            raise ValueError("not one chunk was written")
        warnings.warn(
            f"{self._name}: {missing}, which in Zarr means that all its pixels are {fill}; "
            "if they should not be, copy the movie again",
            stacklevel=6,
        )


def _plain_axes(array: zarr.Array) -> str:
    if isinstance(array.metadata, ArrayV3Metadata):
        names = array.metadata.dimension_names
    else:
        names = array.attrs.get("_ARRAY_DIMENSIONS")
    axes = [_AXES.get(str(name).lower(), "?") for name in names or "?"]
    if "?" not in axes:
        return _checked_axes(axes)
    _require(
        array.ndim in _UNNAMED_AXES,
        f"an array of shape {array.shape} whose axes have no names; give (frames, height, "
        "width) or (frames, channels, height, width)",
    )
    return _UNNAMED_AXES[array.ndim]


def _ome_axes(multiscale: Mapping[str, Any]) -> str:
    # Before OME-Zarr 0.4 axes had no types, and before 0.3 no names.
    _require("coordinateSystems" not in multiscale, "OME-Zarr 0.6 or later is not read")
    axes = multiscale.get("axes", list("tczyx"))
    names = [axis if isinstance(axis, str) else axis["name"] for axis in axes]
    return _checked_axes([_AXES.get(name.lower(), "?") for name in names], names)


def _checked_axes(axes: Sequence[str], names: Sequence[str] | None = None) -> str:
    _require(
        len(set(axes)) == len(axes) and "?" not in axes and list(axes[-2:]) == ["y", "x"],
        f"axes {', '.join(names or axes)!r:.60}; they must be of t, c, z, and then y, x",
    )
    return "".join(axes)


def _plain_scales(attributes: Mapping[str, Any]) -> dict[str, float]:
    """The scales that `ZarrSink` notes."""
    y, x = attributes.get("pixel_size_um") or (None, None)
    scales = {"y": y, "x": x, "t": attributes.get("frame_interval_s")}
    return {axis: float(scale) for axis, scale in scales.items() if _is_length(scale)}


def _ome_scales(multiscale: Mapping[str, Any], axes: str) -> dict[str, float]:
    """The size of a pixel in um, and of a frame in s, along the axes that have units."""
    scales = {}
    for place, axis in enumerate(axes):
        entry = multiscale.get("axes", axes)[place]
        unit = entry.get("unit", "") if isinstance(entry, dict) else ""
        scale = (_TIMES_S if axis == "t" else _LENGTHS_UM).get(unit)
        for level in (multiscale["datasets"][0], multiscale):
            for transformation in level.get("coordinateTransformations") or ():
                if transformation["type"] == "scale" and scale is not None:
                    scale *= transformation["scale"][place]
        if _is_length(scale):
            scales[axis] = scale
    return scales


def _is_length(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@contextlib.contextmanager
def _one_line_errors(says: str) -> Iterator[None]:
    # Broken files raise errors of any type in zarr-python and its codecs.
    try:
        yield
    except (MovieError, ModuleNotFoundError):
        raise
    except Exception as error:
        kind = f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
        raise MovieError(f"{says} ({kind}{one_line(error)})") from error


class ZarrSink(Sink):
    """An array (time, channel, y, x), or (time, y, x) of one channel, of Zarr v3; under the
    name `.ome.zarr` in an OME-Zarr 0.5 image of one resolution."""

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        super().__init__(path, layout, overwrite=overwrite)
        frames, channels, *frame = layout.shape
        self._is_ome = self._destination.name.lower().endswith(".ome.zarr")
        self._axes = "tcyx" if channels > 1 else "tyx"
        self._shape = (frames, *([channels] if channels > 1 else []), *frame)
        self._array: Any = None

    def _begin(self) -> None:
        about = self._ome_attributes() if self._is_ome else self._plain_attributes()
        if self._is_ome:
            zarr.create_group(self.draft, zarr_format=3, attributes={"ome": about})
        zarr.create_array(
            self.draft,
            name="0" if self._is_ome else None,
            shape=self._shape,
            chunks=(self._chunk_frames(), *[1] * (len(self._axes) - 3), *self._shape[-2:]),
            dtype=self.layout.dtype,
            filters=None,
            compressors=None,
            fill_value=0,
            zarr_format=3,
            dimension_names=list(self._axes),
            attributes=None if self._is_ome else about,
        )
        self._resume()

    def _resume(self) -> None:
        # A process that is killed leaves parts of files beside those of chunks.
        for part in self.draft.rglob("*.partial"):
            part.unlink()
        folder = self.draft / "0" if self._is_ome else self.draft
        os.stat(folder / "zarr.json")
        # All chunks are written, so that none looks like a lost one.
        array = zarr.open_array(folder, mode="r+").with_config({"write_empty_chunks": True})
        if array.shape != self._shape or array.dtype != self.layout.dtype:
            raise MovieError(f"{self.draft}: is not the beginning of this movie")
        self._array = array

    def _write(self, start: int, frames: np.ndarray) -> None:
        stored = frames.reshape(len(frames), *self._shape[1:])
        self._array[start : start + len(frames)] = stored

    def _complete(self) -> None:
        os.stat(self.draft / "zarr.json")

    def _close(self) -> None:
        self._array = None

    def _is_replaceable(self) -> bool:
        return is_zarr(self._destination)

    def _chunk_frames(self) -> int:
        """The divisor of the layout's chunk that is nearest to 4 MiB: no two threads then
        write to the same chunk."""
        _, _, height, width = self.layout.shape
        target = _TARGET_CHUNK_BYTES / (height * width * self.layout.dtype.itemsize)
        most = min(self.layout.chunk_frames, self.layout.shape[0])
        divisors = [x for x in range(1, most + 1) if most % x == 0]
        return min(divisors, key=lambda x: abs(math.log(x / target)))

    def _plain_attributes(self) -> dict[str, Any]:
        about = {
            "pixel_size_um": self.layout.pixel_size_um,
            "frame_interval_s": self.layout.frame_interval_s,
        }
        return {name: value for name, value in about.items() if value is not None}

    def _ome_attributes(self) -> dict[str, Any]:
        y, x = self.layout.pixel_size_um or (None, None)
        scales = {"t": self.layout.frame_interval_s, "c": None, "y": y, "x": x}
        kinds = {"t": "time", "c": "channel", "y": "space", "x": "space"}
        units = {"time": "second", "space": "micrometer"}
        axes: list[dict[str, str]] = []
        for axis in self._axes:
            axes.append({"name": axis, "type": kinds[axis]})
            if scales[axis] is not None:
                axes[-1]["unit"] = units[kinds[axis]]
        scale = {"type": "scale", "scale": [scales[axis] or 1.0 for axis in self._axes]}
        dataset = {"path": "0", "coordinateTransformations": [scale]}
        return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}

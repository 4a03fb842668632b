"""Zarr v2 and v3, and OME-Zarr (ngff.openmicroscopy.org), by zarr-python."""

import functools as ft
import itertools
import math
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import WrapperStore, ZipStore

from .movie import check_pixels, Movie, MovieError, named_errors, UNITS
from .series import POSITIONS
from .sinks import Layout, Sink


# Chunks that were read in part are kept, since the next frames are in them too.
_CACHE_BYTES = 2**27

_AXES = {
    "t": "t", "time": "t", "frame": "t", "frames": "t", "c": "c", "channel": "c", "z": "z",
    "channels": "c", "depth": "z", "y": "y", "height": "y", "x": "x", "width": "x",
    "row": "y", "rows": "y", "h": "y", "col": "x", "column": "x", "columns": "x", "w": "x",
}  # fmt: skip


def open_zarr(source: Path | str, *, is_growing: bool = False) -> Movie:
    """Opens a Zarr v2 or v3 array, or the image of an OME-Zarr, in full resolution.

    `source` is a folder, a .zip of it, or a URL. Frames are times and depths, all depths of
    the first time before those of the second. The first missing chunk that is read, which
    holds the fill value, is warned of. The files of one that is growing are not listed.
    """
    # Broken files raise errors of any type in zarr-python and its codecs.
    with named_errors(f"{source}: cannot be read", Exception):
        store, root = source, None
        if isinstance(source, Path) and source.is_file():
            with zipfile.ZipFile(source) as archive:
                roots = {file.partition("/")[0] for file in archive.namelist()}
            # macOS puts what only it reads beside a folder.
            roots.discard("__MACOSX")
            root = roots.pop() if len(roots) == 1 else None
            store = ZipStore(source, mode="r")
        node = zarr.open(store, mode="r", path=root)
        array, multiscale = _find_image(str(source), node)
        axes, scales = _read_axes(array, multiscale)
        pixels = _ZarrPixels(str(source), array, axes)
        return Movie(
            pixels,
            name=str(source),
            format=f"{'OME-' if multiscale else ''}Zarr v{array.metadata.zarr_format}",
            paths=[source] if isinstance(source, Path) and not is_growing else (),
            pixel_size_um=(scales["y"], scales["x"]) if {"x", "y"} <= {*scales} else None,
            frame_interval_s=scales.get("t") if pixels.depths == 1 else None,
            chunk_frames=pixels.chunk_frames,
            close=array.store.close,
        )


def _find_image(name: str, node: Any) -> tuple[zarr.Array, Mapping[str, Any] | None]:
    """The array of a group, and what OME-Zarr says of it."""
    if isinstance(node, zarr.Array):
        return node, None
    about: Any = node.attrs.asdict()
    about = about.get("ome", about)
    if "multiscales" in about:
        multiscale = about["multiscales"][0]
        return node[multiscale["datasets"][0]["path"]], multiscale
    is_positions = "bioformats2raw.layout" in about
    if "plate" in about or "well" in about or (is_positions and "1" in node):
        image = "0" if is_positions else "A/1/0"
        raise MovieError(f"{name}: holds several images; open one, such as {name}/{image}")
    names = ["0"] if is_positions else sorted(node.array_keys())
    if len(names) != 1:
        raise MovieError(
            f"{name}: is a group of {len(names)} arrays ({', '.join(names[:20])}) and no "
            f"image of OME-Zarr; open one array: {name}/{[*names, 'NAME'][0]}"
        )
    return _find_image(name, node[names[0]])


def _read_axes(
    array: zarr.Array, multiscale: Mapping[str, Any] | None
) -> tuple[str, dict[str, float]]:
    """The axes of an array, as letters ("?" of an unknown one of length 1), and the size of
    a pixel in micrometres and of a frame in seconds along those that have units."""
    attributes: Any = array.attrs.asdict()
    about: Any = array.metadata.to_dict()
    if multiscale is None:
        names = about.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS") or []
        usual = {2: "yx", 3: "tyx", 4: "tcyx"}.get(array.ndim, "")
        if not any(str(name).lower() in _AXES.keys() | POSITIONS for name in names):
            names = usual
        # xarray names an axis without a name by its number.
        pairs = itertools.zip_longest(names, usual[: len(names)])
        names = [u if re.fullmatch(r"(dim_)?\d*", str(n or "")) else n for n, u in pairs]
        # As `ZarrSink` notes them.
        y, x = attributes.get("pixel_size_um") or (None, None)
        scales = {"t": attributes.get("frame_interval_s"), "y": y, "x": x}
    else:
        entries: Any = multiscale["axes"]
        names = [entry["name"] for entry in entries]
        sizes = np.array([UNITS.get(str(entry.get("unit")), math.nan) for entry in entries])
        for level in (multiscale["datasets"][0], multiscale):
            for transformation in level.get("coordinateTransformations") or ():
                if transformation["type"] == "scale":
                    sizes *= transformation["scale"]
        scales = dict(
            zip((_AXES.get(n.lower()) for n in names), sizes.tolist(), strict=True)
        )
    axes = "".join(_AXES.get(str(name).lower(), "?") for name in names)
    lengths = dict(zip(axes, array.shape, strict=False))
    _require(
        len(axes) == len(lengths) == array.ndim
        and axes.endswith("yx")
        and lengths.get("?", 1) == 1,
        f"axes {', '.join(map(str, names))!r:.60} of shape {array.shape}; they must be of "
        "t, c, z, and then y, x; save each position as an array of its own",
    )
    numbers = {a: s for a, s in scales.items() if a and isinstance(s, int | float)}
    return axes, {a: float(s) for a, s in numbers.items() if 0 < s < math.inf}


class _CheckedStore(WrapperStore[Any]):
    """A store that notes a missing chunk and refuses truncated chunks of Blosc, whose
    decoder reads beyond their end."""

    is_blosc = False
    missing: str | None = None

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await super().get(key, prototype, byte_range)
        if value is None:
            self.missing = key
        elif self.is_blosc and byte_range is None:
            says = int.from_bytes(value.as_numpy_array()[12:16].tobytes(), "little")
            _require(16 <= says == len(value), f"{key} is truncated")
        return value


class _ZarrPixels:
    """The frames of an array, (frames, channels, height, width)."""

    def __init__(self, name: str, array: zarr.Array, axes: str) -> None:
        # To unpickle is to run code.
        codecs = *array.filters, *array.compressors
        is_pickled = any(isinstance(codec, numcodecs.Pickle) for codec in codecs)
        _require(not is_pickled, "its pixels are pickled")
        self._name = name
        self._axes = axes
        self._is_warned = False
        lengths = dict(zip(axes, array.shape, strict=True))
        times, self.depths, *frame = (lengths.get(axis, 1) for axis in "tzcyx")
        self.dtype = array.dtype
        self.shape = check_pixels(name, (times * self.depths, *frame), self.dtype)
        step = dict(zip(axes, array.chunks, strict=True)).get("t", 1)
        stored = dict(zip(axes, array.shards or array.chunks, strict=True))
        self.stored_frames = stored.get("t", 1) * self.depths
        self.chunk_frames = min(step, times) * self.depths
        block_bytes = self.chunk_frames * frame[1] * frame[2] * self.dtype.itemsize
        self._decode_block = ft.lru_cache(max(1, _CACHE_BYTES // block_bytes))(self._decode)
        self._lock = threading.Lock()
        self._store = _CheckedStore(array.store)
        self._array = zarr.open_array(self._store, path=array.path, mode="r")
        self._store.missing = None
        is_blosc = any(isinstance(c, numcodecs.Blosc | BloscCodec) for c in codecs[-1:])
        self._store.is_blosc = is_blosc and array.shards is None

    def __getitem__(self, index: tuple[slice, int]) -> np.ndarray:
        frames, channel = index
        start, stop, _ = frames.indices(self.shape[0])
        read = np.empty((max(0, stop - start), *self.shape[2:]), self.dtype)
        low = start
        while low < stop:
            first = low - low % self.chunk_frames
            high = end = min(first + self.chunk_frames, self.shape[0])
            if first == low and end <= stop:
                # All whole chunks at once: zarr-python reads them concurrently.
                high = stop if stop == self.shape[0] else stop - stop % self.chunk_frames
                block = self._decode(low, high, channel)
            else:
                with self._lock:
                    block = self._decode_block(first, end, channel)[low - first :]
            high = min(high, stop)
            read[low - start : high - start] = block[: high - low]
            low = high
        return read

    def forget(self) -> None:
        """Lets go of the chunks that are kept."""
        self._decode_block.cache_clear()

    def has_chunks(self, number: int) -> bool:
        """Whether all chunks of these times, by the number of the chunk, are in the
        folder; or their shards, where chunks are in these."""
        array = self._array
        sizes = zip(self._axes, array.shape, array.shards or array.chunks, strict=True)
        numbers = {axis: range(-(-length // step)) for axis, length, step in sizes}
        numbers["t"] = range(number, number + 1)
        folder = Path(self._name) / array.path
        places = itertools.product(*numbers.values())
        return all((folder / array.metadata.encode_chunk_key(p)).is_file() for p in places)

    def _decode(self, start: int, stop: int, channel: int) -> np.ndarray:
        """Whole chunks, or all that there is of the last one."""
        chosen = {"t": slice(start // self.depths, stop // self.depths)}
        chosen["c"] = slice(channel, channel + 1)
        selection = tuple(chosen.get(axis, slice(None)) for axis in self._axes)
        says = f"{self._name}: frames {start} to {stop - 1} cannot be read; copy it again"
        with named_errors(says, Exception):
            read = np.asarray(self._array[selection])
            missing = None if self._is_warned else self._find_missing(read, start)
            if missing is not None:
                self._warn_of_missing(missing)
        order = [self._axes.index(axis) for axis in "?tzcyx" if axis in self._axes]
        return read.transpose(order).reshape(stop - start, *self.shape[2:])

    def _find_missing(self, read: np.ndarray, start: int) -> str | None:
        """A missing chunk, by its key. One in a shard, of which zarr-python tells nothing,
        is told by its pixels, which all have the fill value, and named by its frame."""
        array = self._array
        if self._store.missing is not None or array.shards is None:
            return self._store.missing
        corners = read[tuple(slice(None, None, step) for step in array.chunks)]
        for place in np.argwhere(_equals(corners, array.fill_value)):
            first = dict(zip(self._axes, place * array.chunks, strict=True))
            chunk = read[tuple(map(slice, first.values(), (place + 1) * array.chunks))]
            if _equals(chunk, array.fill_value).all():
                return f"one of frame {start + first.get('t', 0) * self.depths}"
        return None

    def _warn_of_missing(self, key: str) -> None:
        fill = self._array.fill_value
        _require(fill is not None, f"chunk {key} is missing, and there is no fill value")
        self._is_warned = True
        what = f"chunks are missing, such as {key}, whose pixels are all {fill}"
        remedy = "if they should not be, copy it again"
        warnings.warn(f"{self._name}: {what}; {remedy}", stacklevel=6)


def _equals(pixels: np.ndarray, value: Any) -> np.ndarray:
    return np.isnan(pixels) if value != value else pixels == value


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


class ZarrSink(Sink):
    """An array (time, channel, y, x), or (time, y, x) of one channel, of Zarr v3; under the
    name `.ome.zarr` in an OME-Zarr 0.5 image of one resolution."""

    _array: Any = None

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        super().__init__(path, layout, overwrite=overwrite)
        frames, channels, *frame = layout.shape
        self._is_ome = self._destination.name.lower().endswith(".ome.zarr")
        self._axes = "tcyx" if channels > 1 else "tyx"
        self._shape = (frames, *([channels] if channels > 1 else []), *frame)

    def _begin(self) -> None:
        layout = self.layout
        attributes: dict[str, Any] = {"jaxbkgd": {**layout.about}} if layout.about else {}
        if self._is_ome:
            of_group = {"ome": self._ome_attributes(), **attributes}
            zarr.create_group(self.draft, zarr_format=3, attributes=of_group)
            attributes = {}
        else:
            if layout.pixel_size_um is not None:
                attributes["pixel_size_um"] = layout.pixel_size_um
            if layout.frame_interval_s is not None:
                attributes["frame_interval_s"] = layout.frame_interval_s
        zarr.create_array(
            self.draft,
            name="0" if self._is_ome else None,
            shape=self._shape,
            chunks=(self._chunk_frames(), *[1] * (len(self._axes) - 3), *self._shape[-2:]),
            dtype=layout.dtype,
            filters=None,
            compressors=None,
            fill_value=0,
            zarr_format=3,
            dimension_names=list(self._axes),
            attributes=attributes,
        )
        self._resume()

    def _resume(self) -> None:
        # A process that is killed leaves parts of files beside those of chunks.
        for part in self.draft.rglob("*.partial"):
            part.unlink()
        # All chunks are written, so that none looks like a lost one.
        array = self._open_draft().with_config({"write_empty_chunks": True})
        if array.shape != self._shape or array.dtype != self.layout.dtype:
            raise MovieError(f"{self.draft}: is not the beginning of this movie")
        self._array = array

    def _open_draft(self) -> zarr.Array:
        folder = self.draft / "0" if self._is_ome else self.draft
        os.stat(folder / "zarr.json")
        return zarr.open_array(folder, mode="r+")

    def _write(self, start: int, frames: np.ndarray) -> None:
        stored = frames.reshape(len(frames), *self._shape[1:])
        self._array[start : start + len(frames)] = stored

    def _complete(self) -> None:
        os.stat(self.draft / "zarr.json")

    def _chunk_frames(self) -> int:
        """The divisor of the layout's chunk that is nearest to 4 MiB: no two threads then
        write to the same chunk."""
        frame_bytes = math.prod(self._shape[-2:]) * self.layout.dtype.itemsize
        most = min(self.layout.chunk_frames, self._shape[0])
        divisors = [x for x in range(1, most + 1) if most % x == 0]
        return min(divisors, key=lambda x: abs(math.log(x * frame_bytes / 2**22)))

    def _ome_attributes(self) -> dict[str, Any]:
        y, x = self.layout.pixel_size_um or (None, None)
        scales = {"t": self.layout.frame_interval_s, "c": None, "y": y, "x": x}
        kinds = {"t": ("time", "second"), "c": ("channel", "")}
        axes: list[dict[str, str]] = []
        for axis in self._axes:
            kind, unit = kinds.get(axis, ("space", "micrometer"))
            axes.append({"name": axis, "type": kind})
            axes[-1] |= {} if scales[axis] is None else {"unit": unit}
        scale = {"type": "scale", "scale": [scales[axis] or 1.0 for axis in self._axes]}
        dataset = {"path": "0", "coordinateTransformations": [scale]}
        return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}

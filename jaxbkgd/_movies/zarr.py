"""Zarr and OME-Zarr: movies in folders of chunks.

They are read by `_zarr_arrays`; what is written is described by zarr-python. Formats:
Zarr v2 and v3 (zarr-specs.readthedocs.io), OME-Zarr 0.4 and 0.5 (ngff.openmicroscopy.org).
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from .movie import check_pixels, Movie, MovieError, one_line
from .sinks import Layout, Sink
from .zarr_arrays import is_zarr, Node, open_node, read_array, require, ZarrArray


# A frame in more pieces would take long to read.
_MAX_CHUNKS_IN_FRAME = 2**16

# Of decoded chunks that are kept, since the next frames are often in the same.
_CACHE_BYTES = 2**27

# What the axes of arrays are called.
_AXES = {
    "t": "t", "time": "t", "frame": "t", "frames": "t",
    "c": "c", "channel": "c", "channels": "c",
    "z": "z", "depth": "z",
    "y": "y", "height": "y", "x": "x", "width": "x",
}  # fmt: skip
# And what they are where they have no such names.
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


class ZarrMovie(Movie):
    """The frames of a Zarr v2 or v3 array, or of the first image of an OME-Zarr 0.4 or 0.5,
    in full resolution.

    Frames are the times; where there are depths, they are frames too, all those of the
    first time before those of the second. A chunk that was never written holds the array's
    fill value, as the format has it, and the first such chunk that is read is warned of,
    since a chunk that was lost looks the same.

    **Raises:**

    `MovieError`, if its metadata are broken, if it is packed by what is not a plain codec
    of numbers, or, when it is read, if a chunk is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with self._errors("cannot be read, because of its metadata"):
            node = open_node(path)
            self.format = f"Zarr v{node.metadata['zarr_format']}"
            multiscale = None
            if not node.is_array:
                node, multiscale = self._find_image(node)
            self._array = read_array(node)
            self._files = node.files
            if multiscale is None:
                self._axes = _plain_axes(self._array)
                scales = _plain_scales(node.attributes)
            else:
                self.format = f"OME-{self.format}"
                self._axes = _ome_axes(multiscale)
                scales = _ome_scales(multiscale, self._axes)
            self._set_shape()
        if "y" in scales and "x" in scales:
            self.pixel_size_um = scales["y"], scales["x"]
        if self._shape["z"] == 1:
            self.frame_interval_s = scales.get("t")
        self.dtype = self._array.stored.newbyteorder("=")
        # The store that an array is in, too: to write there would be to lose it.
        stores = [folder for folder in path.resolve().parents if is_zarr(folder)]
        self.paths = [path, node.folder, *stores]
        self._kept: collections.OrderedDict[Any, concurrent.futures.Future[Any]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        self._is_warned = False
        check_pixels(self.name, self.shape, self.dtype)
        self._check_files()

    def _find_image(self, group: Node) -> tuple[Node, Mapping[str, Any] | None]:
        """The array of a group, and what OME-Zarr says of it."""
        about = group.attributes.get("ome", group.attributes)
        if "bioformats2raw.layout" in about and "multiscales" not in about:
            group = group.child("0")
            about = group.attributes.get("ome", group.attributes)
        if "multiscales" in about:
            multiscale = about["multiscales"][0]
            return group.child(multiscale["datasets"][0]["path"]), multiscale
        names = sorted(
            folder.name
            for folder in group.folder.iterdir()
            if is_zarr(folder) and open_node(folder).is_array
        )
        if len(names) != 1:
            held = f"the arrays {', '.join(names[:20])}" if names else "no array"
            raise MovieError(
                f"{self.name}: is a Zarr group that holds {held} and no image of OME-Zarr; "
                f"open one array: {self.name}/{names[0] if names else 'NAME'}"
            )
        return group.child(names[0]), None

    def _set_shape(self) -> None:
        array = self._array
        require(
            len(self._axes) == len(array.shape),
            f"axes {self._axes} of an array of shape {array.shape}",
        )
        # Of all axes, where those that are missing have a length of one.
        self._shape = {axis: 1 for axis in "tzcyx"} | dict(
            zip(self._axes, array.shape, strict=True)
        )
        self._chunk = {axis: 1 for axis in "tzcyx"} | dict(
            zip(self._axes, array.chunks, strict=True)
        )
        tiles = math.prod(-(-self._shape[axis] // self._chunk[axis]) for axis in "yx")
        require(tiles <= _MAX_CHUNKS_IN_FRAME, f"frames in {tiles} chunks")
        times, depths, channels, height, width = (self._shape[axis] for axis in "tzcyx")
        self.shape = times * depths, channels, height, width

    def _check_files(self) -> None:
        names = {entry.name for entry in os.scandir(self._array.folder)}
        if all(name == "zarr.json" or name.startswith(".") for name in names):
            raise MovieError(f"{self.name}: holds no frames: not one chunk was written")

    @property
    def chunk_frames(self) -> int:
        times, depths = self._chunk["t"], self._chunk["z"]
        return times * self._shape["z"] if times > 1 else min(depths, self._shape["z"])

    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        chunk, depths = self._chunk, self._shape["z"]
        read = np.empty((stop - start, *self.shape[2:]), self.dtype)
        # By chunk, so that each is decoded once.
        blocks = collections.defaultdict(list)
        for frame in range(start, stop):
            time, depth = divmod(frame, depths)
            blocks[time // chunk["t"], depth // chunk["z"]].append((frame, time, depth))
        corners = itertools.product(
            blocks.items(),
            range(0, self.shape[2], chunk["y"]),
            range(0, self.shape[3], chunk["x"]),
        )
        for ((block_t, block_z), frames), y, x in corners:
            block_c, inside_c = divmod(channel, chunk["c"])
            pixels = self._pixels(
                (block_t, block_z, block_c, y // chunk["y"], x // chunk["x"])
            )
            for frame, time, depth in frames:
                target = read[frame - start, y : y + chunk["y"], x : x + chunk["x"]]
                height, width = target.shape
                target[...] = pixels[
                    time % chunk["t"], depth % chunk["z"], inside_c, :height, :width
                ]
        return read

    def _pixels(self, block: tuple[int, ...]) -> np.ndarray:
        """A chunk (times, depths, channels, y, x), decoded by the first that asks."""
        with self._lock:
            kept = self._kept.get(block)
            is_first = kept is None
            if kept is None:
                kept = self._kept[block] = concurrent.futures.Future()
            self._kept.move_to_end(block)
            chunk_bytes = math.prod(self._array.chunks) * self.dtype.itemsize
            while len(self._kept) > max(1, _CACHE_BYTES // chunk_bytes):
                self._kept.popitem(last=False)
        if is_first:
            try:
                kept.set_result(self._decode(block))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(block, None)
                kept.set_exception(error)
        return kept.result()

    def _decode(self, block: tuple[int, ...]) -> np.ndarray:
        index = self._index(block)
        where = f"{self._frames_of(block)}, chunk {self._array.file(index)}"
        with self._errors(f"{where}: is damaged; copy the movie again"):
            pixels = self._array.load(index)
        shape = tuple(self._chunk[axis] for axis in "tzcyx")
        if pixels is None:
            return np.broadcast_to(self._fill(where), shape)
        order = [self._axes.index(axis) for axis in "tzcyx" if axis in self._axes]
        return pixels.transpose(order).reshape(shape)

    def _index(self, block: tuple[int, ...]) -> list[int]:
        return [block["tzcyx".index(axis)] for axis in self._axes]

    def _frames_of(self, block: tuple[int, ...]) -> str:
        (t, times), (z, depths) = (
            (i * self._chunk[axis], min((i + 1) * self._chunk[axis], self._shape[axis]) - 1)
            for i, axis in zip(block[:2], "tz", strict=True)
        )
        first, last = t * self._shape["z"] + z, times * self._shape["z"] + depths
        return f"frame {first}" if first == last else f"frames {first} to {last}"

    def _fill(self, where: str) -> Any:
        fill = self._array.fill
        if fill is None:
            raise MovieError(f"{self.name}: {where}: is missing; copy the movie again")
        with self._lock:
            is_first, self._is_warned = not self._is_warned, True
        if is_first:
            warnings.warn(
                f"{self.name}: {where}: is missing, which in Zarr means that all its "
                f"pixels are {fill}; if they should not be, copy the movie again",
                stacklevel=6,
            )
        return fill

    def state(self) -> Any:
        """Of all files: where frames lie in many, some may change."""
        digest = hashlib.sha256()
        for folder, folders, names in os.walk(self._array.folder):
            folders.sort()
            for name in sorted(names):
                status = os.stat(os.path.join(folder, name))
                said = (folder, name, status.st_size, status.st_mtime_ns)
                digest.update(repr(said).encode())
        return digest.hexdigest()

    def close(self) -> None:
        with self._lock:
            self._kept.clear()

    @contextlib.contextmanager
    def _errors(self, says: str) -> Iterator[None]:
        # What is broken, and how, has no end: so have the errors that it raises.
        try:
            yield
        except MovieError:
            raise
        except KeyError as error:
            raise MovieError(
                f"{self.name}: {says} (no or unknown {one_line(error)})"
            ) from error
        except Exception as error:
            raise MovieError(f"{self.name}: {says} ({one_line(error)})") from error


def _plain_axes(array: ZarrArray) -> str:
    axes = [_AXES.get(str(name).lower(), "?") for name in array.names or "?"]
    if "?" in axes:
        require(
            len(array.shape) in _UNNAMED_AXES,
            f"an array of shape {array.shape} whose axes have no names; give (frames, "
            "height, width) or (frames, channels, height, width)",
        )
        return _UNNAMED_AXES[len(array.shape)]
    return _checked_axes(axes)


def _ome_axes(multiscale: Mapping[str, Any]) -> str:
    # Before OME-Zarr 0.3, all axes were there and had no names; in it, they had no types.
    require("coordinateSystems" not in multiscale, "OME-Zarr 0.6 or later is not read")
    axes = multiscale.get("axes", list("tczyx"))
    names = [axis if isinstance(axis, str) else axis["name"] for axis in axes]
    return _checked_axes([_AXES.get(name.lower(), "?") for name in names], names)


def _checked_axes(axes: Sequence[str], names: Sequence[str] | None = None) -> str:
    require(
        len(set(axes)) == len(axes) and "?" not in axes and list(axes[-2:]) == ["y", "x"],
        f"axes {', '.join(names or axes)!r:.60}; they must be of t, c, z, and then y, x",
    )
    return "".join(axes)


def _plain_scales(attributes: Mapping[str, Any]) -> dict[str, float]:
    """What `ZarrSink` notes."""
    y, x = attributes.get("pixel_size_um") or (None, None)
    scales = {"y": y, "x": x, "t": attributes.get("frame_interval_s")}
    return {axis: float(scale) for axis, scale in scales.items() if _is_length(scale)}


def _ome_scales(multiscale: Mapping[str, Any], axes: str) -> dict[str, float]:
    """The size of a pixel in um, and of a frame in s, along the axes that have units."""
    scales = {}
    for place, axis in enumerate(axes):
        said = multiscale.get("axes", axes)[place]
        unit = said.get("unit", "") if isinstance(said, dict) else ""
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


class ZarrSink(Sink):
    """An array (time, channel, y, x), or (time, y, x) of one channel, of Zarr v3; under the
    name `.ome.zarr` in an OME-Zarr 0.5 image of one resolution."""

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        super().__init__(path, layout, overwrite=overwrite)
        self._is_ome = self._destination.name.lower().endswith(".ome.zarr")
        frames, channels, *frame = layout.shape
        self._shape = (frames, *([channels] if channels > 1 else []), *frame)
        self._axes = "tcyx" if channels > 1 else "tyx"

    @property
    def _array_path(self) -> str:
        return "0" if self._is_ome else ""

    @property
    def _array_folder(self) -> Path:
        return self.draft / self._array_path

    def _begin(self) -> None:
        import zarr

        if self._is_ome:
            zarr.create_group(
                self.draft, zarr_format=3, attributes={"ome": self._ome_attributes()}
            )
        channels = [1] if "c" in self._axes else []
        zarr.create_array(
            self.draft,
            name=self._array_path or None,
            shape=self._shape,
            chunks=(self._chunk_frames(), *channels, *self.layout.shape[2:]),
            dtype=self.layout.dtype,
            filters=None,
            compressors=None,
            fill_value=0,
            zarr_format=3,
            dimension_names=list(self._axes),
            attributes=None if self._is_ome else self._plain_attributes(),
        )

    def _resume(self) -> None:
        os.stat(self._array_folder / "zarr.json")

    def _write(self, start: int, frames: np.ndarray) -> None:
        # The file of a chunk that is not packed holds its pixels and no more, and is
        # written sooner than through zarr-python's event loop.
        step = self._chunk_frames()
        stored = self.layout.dtype.newbyteorder("<")
        for first in range(0, len(frames), step):
            for channel in range(frames.shape[1]):
                pixels = frames[first : first + step, channel].astype(stored, copy=False)
                if len(pixels) < step:
                    pixels = np.pad(pixels, ((0, step - len(pixels)), (0, 0), (0, 0)))
                index = (start + first) // step, *([channel] if "c" in self._axes else [])
                folder = self._array_folder.joinpath("c", *map(str, index), "0")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "0").write_bytes(np.ascontiguousarray(pixels).data)

    def _complete(self) -> None:
        os.stat(self._array_folder / "zarr.json")

    def _close(self) -> None:
        pass

    def _is_replaceable(self) -> bool:
        return is_zarr(self._destination)

    def _chunk_frames(self) -> int:
        """Of the numbers that divide a chunk of the layout, that nearest to 4 MiB: no two
        threads then write to the same chunk."""
        _, _, height, width = self.layout.shape
        target = _TARGET_CHUNK_BYTES / (height * width * self.layout.dtype.itemsize)
        most = min(self.layout.chunk_frames, self.layout.shape[0])
        divisors = [x for x in range(1, most + 1) if most % x == 0]
        return min(divisors, key=lambda x: abs(math.log(x / target)))

    def _plain_attributes(self) -> dict[str, Any]:
        noted = {
            "pixel_size_um": self.layout.pixel_size_um,
            "frame_interval_s": self.layout.frame_interval_s,
        }
        return {name: value for name, value in noted.items() if value is not None}

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
        dataset = {"path": self._array_path, "coordinateTransformations": [scale]}
        return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}

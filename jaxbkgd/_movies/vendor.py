"""Microscopes' files, read plane by plane through the libraries that know their formats.

Each reader says how long the axes of an image are and how one plane is read. What all have
in common is here: depths are frames as times are, positions are never frames, and one
thread at a time calls a library.
"""

import contextlib
import datetime as dt
import importlib
import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .movie import check_pixels, Movie, MovieError, named_errors, UNITS
from .whole_file import WholeFile


# What libraries log of a broken file, a MovieError says.
for _name in ("czifile", "liffile", "bioio", "bioio_base", "bioio_czi"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

# Of decoded chunks of Imaris's files, each of which may hold several depths.
_CACHE_BYTES = 2**26


@dataclass(frozen=True)
class _Image:
    """An image of a file: the lengths of its axes by their letters, Y and X among them, and
    `read_plane(time, depth, channel)`, which gives (height, width)."""

    sizes: Mapping[str, int]
    dtype: np.dtype
    read_plane: Callable[[int, int, int], Any]
    pixel_size_um: tuple[Any, Any] = (None, None)
    frame_interval_s: float | None = None


# Opens one image of a file, by its number if there are several. `files` close it.
_Reader = Callable[[Path, int | None, contextlib.ExitStack], _Image]


def open_vendor(path: Path, position: int | None = None) -> Movie:
    """Opens a file whose suffix has a library. `position` is the number, from 0, of one of
    several images, which are positions of the stage or scenes."""
    return _open(path, position, *_READERS[path.suffix.lower()])


def open_bioio(path: Path, position: int | None = None) -> Movie:
    """Opens a file that bioio has a reader for."""
    return _open(path, position, "image of bioio", "bioio", _read_bioio)


def _open(
    path: Path, position: int | None, format: str, library: str, reader: _Reader
) -> Movie:
    name = str(path) if position is None else f"{path}/{position}"
    files = contextlib.ExitStack()
    # On damage, libraries raise errors of any type.
    with named_errors(f"{name}: cannot be read by {library}; copy it again", Exception):
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

    def __init__(self, name: str, image: _Image, files: contextlib.ExitStack) -> None:
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


def _choose(path: Path, names: Sequence[str], position: int | None) -> int:
    """The number of the image that is asked for among these."""
    if position is None and len(names) > 1:
        listed = ", ".join(f"{number}: {name}" for number, name in enumerate(names[:20]))
        what = f"holds {len(names)} images, which are no frames ({listed})"
        raise MovieError(f"{path}: {what}; open one by its number, as {path}/0")
    if not 0 <= (position or 0) < len(names):
        what = f"{len(names)} images, which are numbered from 0"
        raise MovieError(f"{path}/{position}: is not there; the file holds {what}")
    return position or 0


def _number(loops: Mapping[str, int], place: Mapping[str, int]) -> int:
    """The number of the image at a place in nested loops, the outermost first."""
    number = 0
    for axis, length in loops.items():
        number = number * length + place.get(axis, 0)
    return number


def _read_nd2(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    nd2 = importlib.import_module("nd2")

    source = WholeFile(path)
    files.callback(source.close)
    file = nd2.ND2File(source)
    files.callback(file.close)
    sizes = dict(file.sizes)
    channels, height, width = (sizes.get(axis, 1) for axis in "CYX")
    loops = {axis: n for axis, n in sizes.items() if axis not in "CYXS"}
    places = [f"position {number}" for number in range(sizes.pop("P", 1))]
    chosen = _choose(path, places, position)
    said, there = math.prod(loops.values()), file.attributes.sequenceCount
    if said != there:
        # Of a stopped acquisition, or without a description of its loops.
        is_counted = "T" not in loops or next(iter(loops)) == "T"
        times = there * loops.get("T", 1) // said if is_counted else 0
        what = f"it says {said} images ({loops}), but holds {there}"
        if not times:
            raise MovieError(f"{path}: is truncated: {what}; copy it again")
        warnings.warn(f"{path}: {what}; was it stopped?", stacklevel=5)
        loops = {"T": times} | loops | {"T": times}
        sizes["T"] = times

    def read_plane(time: int, depth: int, channel: int) -> Any:
        reads = source.reads
        image = file.read_frame(_number(loops, {"T": time, "Z": depth, "P": chosen}))
        # nd2 gives zeros for an image that is missing.
        if source.reads == reads and not image.any():
            raise ValueError("it is missing from the file")
        return image.reshape(channels, height, width)[channel]

    size = file.voxel_size()
    # It says 1 where it knows none.
    is_known = (size.y, size.x) != (1, 1)
    pixel_size_um = (size.y, size.x) if is_known else (None, None)
    interval_s = _interval_of_loops(file.experiment)
    return _Image(sizes, file.dtype, read_plane, pixel_size_um, interval_s)


def _interval_of_loops(loops: Sequence[Any]) -> float | None:
    """The interval that nd2 measured, and else what was asked for."""
    timings = [loop.parameters for loop in loops if loop.type == "TimeLoop"]
    for loop in loops:
        if loop.type == "NETimeLoop":
            timings += loop.parameters.periods
    if len(timings) != 1:
        return None
    measured = timings[0].periodDiff
    return ((measured.avg if measured else 0) or timings[0].periodMs) / 1000


def _read_czi(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    czifile = importlib.import_module("czifile")

    file = files.enter_context(czifile.CziFile(path))
    scenes = file.scenes
    keys = sorted(scenes)
    image = scenes[keys[_choose(path, [f"scene {key}" for key in keys], position)]]
    starts = dict(zip(image.dims, image.start, strict=True))
    # czifile gives zeros for what no block covers, and looks through all blocks each time.
    blocks: dict[tuple[int, ...], Any] = {}
    for block in image.directory_entries:
        begin = dict(zip(block.dims, block.start, strict=True))
        place = tuple(begin.get(axis, 0) - starts.get(axis, 0) for axis in "TZC")
        if place in blocks:
            rule = "stitch its tiles and save it as a movie"
            raise MovieError(f"{path}: has several blocks at T, Z, C {place}; {rule}")
        blocks[place] = block
    shape = tuple(image.sizes.get(axis, 1) for axis in "YX")

    def read_plane(time: int, depth: int, channel: int) -> Any:
        place = time, depth, channel
        if place not in blocks:
            raise ValueError(f"it has no block at T, Z, C {place}")
        pixels = blocks[place].read_segment_data(file).data()
        return pixels.reshape(shape) if pixels.size == math.prod(shape) else pixels

    x, y = image.mpp or (None, None)
    return _Image(image.sizes, image.dtype, read_plane, (y, x), image.coord_scales.get("T"))


def _read_lif(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    liffile = importlib.import_module("liffile")

    file = files.enter_context(liffile.LifFile(path))
    images = file.images
    image = images[_choose(path, [each.name for each in images], position)]
    if image.is_flim:
        raise MovieError(f"{path}: holds lifetimes; save their intensity as a movie")

    def read_plane(time: int, depth: int, channel: int) -> Any:
        place = {"T": time, "Z": depth, "C": channel}
        return image.frame(**{axis: n for axis, n in place.items() if axis in image.sizes})

    def step(axis: str) -> float | None:
        # In metres and seconds.
        points = image.coords.get(axis, ())
        ends = float(points[-1] - points[0]) if len(points) > 1 else 0
        return ends / (len(points) - 1) if ends else None

    y, x = (size and size * 1e6 for size in (step("Y"), step("X")))
    return _Image(image.sizes, image.dtype, read_plane, (y, x), step("T"))


def _read_ims(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    h5py = importlib.import_module("h5py")

    _choose(path, ["image"], position)
    file = files.enter_context(h5py.File(path, rdcc_nbytes=_CACHE_BYTES))
    times = file["DataSet/ResolutionLevel 0"]
    about = {name: _text(value) for name, value in file["DataSetInfo/Image"].attrs.items()}
    sizes = {axis: int(about[axis]) for axis in "XYZ"}
    sizes |= {"T": len(times), "C": len(times["TimePoint 0"])}

    def read_plane(time: int, depth: int, channel: int) -> Any:
        data = times[f"TimePoint {time}/Channel {channel}/Data"]
        # HDF5 gives zeros for what was never written.
        if data.chunks is None:
            is_whole = data.id.get_storage_size() >= data.nbytes
        else:
            counts = zip(data.shape, data.chunks, strict=True)
            chunks = math.prod(-(-size // chunk) for size, chunk in counts)
            is_whole = data.id.get_num_chunks() == chunks
        if not is_whole:
            raise ValueError("its pixels were not all written")
        # Imaris fills its chunks up.
        return data[depth, : sizes["Y"], : sizes["X"]]

    unit = UNITS.get(about.get("Unit", "um"), math.nan)
    x, y = (
        unit * (float(about[f"ExtMax{number}"]) - float(about[f"ExtMin{number}"])) / length
        for number, length in enumerate((sizes["X"], sizes["Y"]))
    )
    interval_s = None
    if "TimeInfo" in file["DataSetInfo"] and len(times) > 1:
        told = file["DataSetInfo/TimeInfo"].attrs
        first, last = (
            dt.datetime.fromisoformat(_text(told[f"TimePoint{number}"]))
            for number in (1, len(times))
        )
        interval_s = (last - first).total_seconds() / (len(times) - 1)
    dtype = times["TimePoint 0/Channel 0/Data"].dtype
    return _Image(sizes, dtype, read_plane, (y, x), interval_s)


def _text(value: Any) -> str:
    """Of an attribute of Imaris, which is an array of single letters."""
    return b"".join(np.atleast_1d(value).astype("S")).decode("latin1").strip()


def _read_lsm(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    import tifffile

    _choose(path, ["image"], position)
    tiff = files.enter_context(tifffile.TiffFile(path))
    series, about = tiff.series[0], tiff.lsm_metadata
    if about is None:
        raise MovieError(f"{path}: is no LSM file; rename it to .tif if it is TIFF")
    sizes = dict(zip(series.axes, series.shape, strict=True))
    of_page = series.axes[-series.keyframe.ndim :]
    loops = {axis: n for axis, n in sizes.items() if axis not in of_page}

    def read_plane(time: int, depth: int, channel: int) -> Any:
        page = series.pages[_number(loops, {"T": time, "Z": depth})]
        # tifffile gives zeros for what has no place.
        if page is None or min(page.dataoffsets + page.databytecounts) < 1:
            raise ValueError("its pixels are not in the file")
        pixels = page.asarray(maxworkers=1)
        if "C" not in of_page:
            return pixels
        return np.moveaxis(pixels, of_page.index("C"), 0)[channel]

    y, x = (1e6 * about.get(f"VoxelSize{axis}", 0) for axis in "YX")
    return _Image(sizes, series.dtype, read_plane, (y, x), about.get("TimeIntervall"))


def _read_bioio(path: Path, position: int | None, files: contextlib.ExitStack) -> _Image:
    bioio = importlib.import_module("bioio")

    image = bioio.BioImage(path)
    image.set_scene(_choose(path, image.scenes, position))
    sizes = dict(zip(image.dims.order, image.dims.shape, strict=True))

    def read_plane(time: int, depth: int, channel: int) -> Any:
        plane = image.get_image_dask_data("YX", T=time, Z=depth, C=channel)
        return plane.compute(scheduler="synchronous")

    size, interval = image.physical_pixel_sizes, image.time_interval
    interval_s = interval.total_seconds() if isinstance(interval, dt.timedelta) else None
    return _Image(sizes, image.dtype, read_plane, (size.Y, size.X), interval_s)


_READERS: dict[str, tuple[str, str, _Reader]] = {
    ".nd2": ("ND2", "nd2", _read_nd2),
    ".czi": ("CZI", "czifile", _read_czi),
    ".lif": ("LIF", "liffile", _read_lif),
    ".ims": ("Imaris IMS", "h5py", _read_ims),
    ".lsm": ("LSM", "tifffile", _read_lsm),
}

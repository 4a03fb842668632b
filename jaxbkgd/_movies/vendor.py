"""Microscopes' files, through the libraries that know their formats.

Each reader says how long the axes of an image are and how one plane is read.
"""

import contextlib
import datetime as dt
import importlib
import itertools
import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .movie import Movie, MovieError, UNITS
from .planes import (
    choose_image,
    number_in_loops,
    open_planes,
    PlaneImage,
    PlaneReader,
    WholeFile,
)


# What libraries log of a broken file, a MovieError says.
for _name in ("czifile", "liffile", "tifffile", "bioio", "bioio_base", "bioio_czi"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

# Of decoded chunks of Imaris's files, each of which may hold several depths.
_CACHE_BYTES = 2**26


def open_vendor(path: Path, position: int | None = None) -> Movie:
    """Opens a file whose suffix has a library. `position` is the number, from 0, of one of
    several images, which are positions of the stage or scenes."""
    format, library, reader = _READERS[path.suffix.lower()]
    says = f"cannot be read by {library}; copy it again"
    return open_planes(path, position, format, says, reader)


def open_bioio(path: Path, position: int | None, says: str) -> Movie:
    """Opens a file that bioio may have a reader for, and `says` if it does not."""
    return open_planes(path, position, "image of bioio", says, _read_bioio)


def _read_nd2(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    nd2 = importlib.import_module("nd2")

    source = WholeFile(path)
    files.callback(source.close)
    file = nd2.ND2File(source)
    files.callback(file.close)
    sizes = dict(file.sizes)
    channels, height, width = (sizes.get(axis, 1) for axis in "CYX")
    loops = {axis: n for axis, n in sizes.items() if axis not in "CYXS"}
    places = [f"position {number}" for number in range(sizes.pop("P", 1))]
    chosen = choose_image(path, places, position)
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
        image = file.read_frame(
            number_in_loops(loops, {"T": time, "Z": depth, "P": chosen})
        )
        # nd2 gives zeros for an image that is missing.
        if source.reads == reads and not image.any():
            raise ValueError("it is missing from the file")
        return image.reshape(channels, height, width)[channel]

    size = file.voxel_size()
    # It says 1 where it knows none.
    is_known = (size.y, size.x) != (1, 1)
    pixel_size_um = (size.y, size.x) if is_known else (None, None)
    interval_s = _interval_of_loops(file.experiment)
    return PlaneImage(sizes, file.dtype, read_plane, pixel_size_um, interval_s)


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


def _read_czi(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    czifile = importlib.import_module("czifile")

    file = files.enter_context(czifile.CziFile(path))
    scenes = file.scenes
    keys = sorted(scenes)
    image = scenes[keys[choose_image(path, [f"scene {key}" for key in keys], position)]]
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
    return PlaneImage(
        image.sizes, image.dtype, read_plane, (y, x), image.coord_scales.get("T")
    )


def _read_lif(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    liffile = importlib.import_module("liffile")

    file = files.enter_context(liffile.LifFile(path))
    images = file.images
    image = images[choose_image(path, [each.name for each in images], position)]
    if image.is_flim:
        raise MovieError(f"{path}: holds lifetimes; save their intensity as a movie")
    there = image.memory_block.size
    if there < image.nbytes:
        what = f"it says {image.nbytes} bytes of pixels, but has {there}"
        raise MovieError(f"{path}: is truncated: {what}; copy it again")

    def read_plane(time: int, depth: int, channel: int) -> Any:
        place = {"T": time, "Z": depth, "C": channel}
        return image.frame(**{axis: n for axis, n in place.items() if axis in image.sizes})

    def step(axis: str) -> float | None:
        # In metres and seconds.
        points = image.coords.get(axis, ())
        ends = float(points[-1] - points[0]) if len(points) > 1 else 0
        return ends / (len(points) - 1) if ends else None

    y, x = (size and size * 1e6 for size in (step("Y"), step("X")))
    return PlaneImage(image.sizes, image.dtype, read_plane, (y, x), step("T"))


def _read_ims(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    h5py = importlib.import_module("h5py")

    choose_image(path, ["image"], position)
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
            deep, high, wide = data.chunks
            rows, columns = range(0, sizes["Y"], high), range(0, sizes["X"], wide)
            chunks = itertools.product([depth - depth % deep], rows, columns)
            stored = map(data.id.get_chunk_info_by_coord, chunks)
            is_whole = all(chunk.byte_offset is not None for chunk in stored)
        if not is_whole:
            raise ValueError("its pixels were not all written")
        # Imaris fills its chunks up.
        return data[depth, : sizes["Y"], : sizes["X"]]

    dtype = times["TimePoint 0/Channel 0/Data"].dtype
    told = file.get("DataSetInfo/TimeInfo")
    pixel_size_um, interval_s = (None, None), None
    # Pixels do not depend on these.
    with contextlib.suppress(KeyError, ValueError):
        y, x = (float(about[f"ExtMax{i}"]) - float(about[f"ExtMin{i}"]) for i in (1, 0))
        unit = UNITS[about.get("Unit", "um")]
        pixel_size_um = y * unit / sizes["Y"], x * unit / sizes["X"]
    with contextlib.suppress(KeyError, ValueError):
        if told is not None and len(times) > 1:
            ends = (_text(told.attrs[f"TimePoint{number}"]) for number in (1, len(times)))
            first, last = map(dt.datetime.fromisoformat, ends)
            interval_s = (last - first).total_seconds() / (len(times) - 1)
    return PlaneImage(sizes, dtype, read_plane, pixel_size_um, interval_s)


def _text(value: Any) -> str:
    """Of an attribute of Imaris, which is an array of single letters."""
    return b"".join(np.atleast_1d(value).astype("S")).decode("latin1").strip()


def _read_lsm(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    import tifffile

    choose_image(path, ["image"], position)
    tiff = files.enter_context(tifffile.TiffFile(path))
    series, about = tiff.series[0], tiff.lsm_metadata
    if about is None:
        raise MovieError(f"{path}: is no LSM file; rename it to .tif if it is TIFF")
    sizes = dict(zip(series.axes, series.shape, strict=True))
    of_page = series.axes[-series.keyframe.ndim :]
    loops = {axis: n for axis, n in sizes.items() if axis not in of_page}
    shape = tuple(sizes[axis] for axis in of_page)

    def read_plane(time: int, depth: int, channel: int) -> Any:
        page = series.pages[number_in_loops(loops, {"T": time, "Z": depth})]
        # tifffile gives zeros for what has no place.
        if page is None or min(page.dataoffsets + page.databytecounts) < 1:
            raise ValueError("its pixels are not in the file")
        if page.shape != shape:
            raise ValueError(f"its page has the shape {page.shape}, not {shape}")
        pixels = page.asarray(maxworkers=1)
        if "C" not in of_page:
            return pixels
        return np.moveaxis(pixels, of_page.index("C"), 0)[channel]

    y, x = (1e6 * about.get(f"VoxelSize{axis}", 0) for axis in "YX")
    return PlaneImage(sizes, series.dtype, read_plane, (y, x), about.get("TimeIntervall"))


def _read_bioio(path: Path, position: int | None, files: ExitStack) -> PlaneImage:
    bioio = importlib.import_module("bioio")

    image = bioio.BioImage(path)
    image.set_scene(choose_image(path, image.scenes, position))
    sizes = dict(zip(image.dims.order, image.dims.shape, strict=True))

    def read_plane(time: int, depth: int, channel: int) -> Any:
        plane = image.get_image_dask_data("YX", T=time, Z=depth, C=channel)
        return plane.compute(scheduler="synchronous")

    size, interval = image.physical_pixel_sizes, image.time_interval
    interval_s = interval.total_seconds() if isinstance(interval, dt.timedelta) else None
    return PlaneImage(sizes, image.dtype, read_plane, (size.Y, size.X), interval_s)


_READERS: dict[str, tuple[str, str, PlaneReader]] = {
    ".nd2": ("ND2", "nd2", _read_nd2),
    ".czi": ("CZI", "czifile", _read_czi),
    ".lif": ("LIF", "liffile", _read_lif),
    ".ims": ("Imaris IMS", "h5py", _read_ims),
    ".lsm": ("LSM", "tifffile", _read_lsm),
}

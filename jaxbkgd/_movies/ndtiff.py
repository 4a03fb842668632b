"""NDTiff, the format of Micro-Manager 2 and Pycro-Manager: TIFF files with an index.

It is defined at github.com/micro-manager/NDStorage. tifffile reads the index, but takes
positions for frames and what is missing for zeros.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from .movie import Movie, MovieError
from .ome import LENGTHS_UM, positive_in, TIMES_S
from .tiff_pages import find_pages, Kinds
from .tiff_pixels import arrange_planes, TiffPixels


INDEX_NAME = "NDTiff.index"
# Names of axes in the index, the slowest first; channels come last.
_AXES = ("time", "z", "channel")


def find_index(folder: Path) -> Path | None:
    """The index of a data set, which is in the folder or in its full resolution."""
    for place in (folder, folder / "Full resolution"):
        if (place / INDEX_NAME).is_file():
            return place / INDEX_NAME
    return None


def open_ndtiff(index: Path) -> Movie:
    """The movie that an index describes. Times and depths are frames.

    **Raises:**

    [`jaxbkgd.MovieError`][] for several positions, for frames or files that are missing and
    for an index that does not fit the files.
    """
    entries = {
        tuple(sorted(axes.items())): (file_name, offset)
        for axes, file_name, offset, *_ in tifffile.read_ndtiff_index(index)
    }
    if not entries:
        raise MovieError(f"{index}: names no frame; open its TIFF file without the index")
    planes = [dict(axes) for axes in entries]
    coordinates, counts = {}, {}
    for name in dict.fromkeys((*_AXES, *(name for axes in planes for name in axes))):
        coordinates[name], counts[name] = _number([axes.get(name, 0) for axes in planes])
        if name not in _AXES and counts[name] > 1:
            raise MovieError(
                f"{index}: has {counts[name]} values of {name!r}, and only time, z and "
                f"channel may differ in a movie; save each {name} as a movie of its own"
            )
    kinds: Kinds = {}
    names = dict.fromkeys(file_name for file_name, _ in entries.values())
    files = {}
    for name in names:
        path = index.parent / Path(name).name
        if not path.is_file():
            raise MovieError(
                f"{index}: names {path.name}, which is not beside it; put all files of the "
                "movie in one folder"
            )
        files[name] = find_pages(path, kinds)
    page_of, before = {}, 0
    for name, pages in files.items():
        page_of |= {(name, int(at)): before + i for i, at in enumerate(pages.places)}
        before += len(pages)
    unknown = entries.values() - page_of.keys()
    if unknown:
        name, offset = min(unknown)
        raise MovieError(
            f"{index}: says that {name} has a frame at byte {offset}, where it has none; "
            "copy both again"
        )
    order = arrange_planes(
        str(index),
        coordinates["time"] * counts["z"] + coordinates["z"],
        coordinates["channel"],
        np.array([page_of[entry] for entry in entries.values()]),
        counts["channel"],
    )
    parts = list(files.values())
    with tifffile.TiffFile(parts[0].path) as tiff:
        summary = (tiff.micromanager_metadata or {}).get("Summary", {})
        dtype = tiff.pages.first.dtype
    size = positive_in(summary.get("PixelSize_um"), "um", LENGTHS_UM, "um")
    return Movie(
        TiffPixels(str(index.parent), parts, order, np.dtype(dtype)),
        name=str(index.parent),
        format="NDTiff",
        paths=[index, *(pages.path for pages in parts)],
        pixel_size_um=None if size is None else (size, size),
        frame_interval_s=positive_in(summary.get("Interval_ms"), "ms", TIMES_S, "ms"),
    )


def _number(values: list[Any]) -> tuple[np.ndarray, int]:
    """Values as numbers from 0, and how many there are. Texts are numbered as they come,
    whereas integers keep their gaps."""
    if all(isinstance(value, int) for value in values):
        numbers = np.array(values) - min(values)
    else:
        known = {value: number for number, value in enumerate(dict.fromkeys(values))}
        numbers = np.array([known[value] for value in values])
    return numbers, int(numbers.max()) + 1

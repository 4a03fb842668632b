"""TIFF files: the channels and the order of frames, and the units of their pixels."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Int

from .movie import Movie, MovieError, one_line
from .ndtiff import find_index, open_ndtiff
from .ome import LENGTHS_UM, open_ome, positive_in, TIMES_S
from .tiff_pages import find_pages, Pages
from .tiff_pixels import TiffPixels


# tifffile logs what it finds in a broken file, and a MovieError says it. Without a handler
# Python would print the log to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# Resolution tags without other metadata are mostly those of a printer (72 dpi is 353 um).
# No microscope has camera pixels larger than this in its sample.
_MAX_PLAUSIBLE_PIXEL_UM = 10.0

# Axes of tifffile: tile, mosaic and phase, which is how it reads a P for position.
_POSITION_AXES = "RMP"

# The calibration functions of ImageJ (ij.measure.Calibration): a straight line, and none.
_STRAIGHT_LINE, _NO_FUNCTION = 0, 20


def open_tiff(path: Path, *, is_part: bool = False) -> Movie:
    """A TIFF, BigTIFF, OME-TIFF, NDTiff, ImageJ, MetaMorph, Zeiss LSM or ScanImage file.

    Every page is a frame of a channel. Channels are those that OME-XML, ImageJ,
    Micro-Manager or tifffile say; times and depths become frames, in the order of the file.
    The other files of an OME-TIFF are read from the same folder. Pixel sizes are those of
    OME-XML, of ImageJ or else of the resolution tags if these are at most 10 um, as those
    of a printer are not. A part of a movie may say how many frames the whole has.
    """
    try:
        return _open(path, is_part)
    except (MovieError, OSError, ModuleNotFoundError):
        raise
    except tifffile.TiffFileError as error:
        raise MovieError(f"{path}: is not a TIFF file ({one_line(error)})") from error
    except Exception as error:
        # tifffile raises errors of many types on damage.
        raise MovieError(
            f"{path}: its description is broken ({one_line(error)})"
        ) from error


def _open(path: Path, is_part: bool) -> Movie:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        dtype = _pixel_type(path, page)
        index = find_index(path.parent) if tiff.is_micromanager else None
        if index is not None and path.parent == index.parent and not tiff.is_ome:
            return open_ndtiff(index)
        if tiff.is_ome:
            movie = open_ome(path, page.description, dtype)
            movie.pixel_size_um = movie.pixel_size_um or _plain_pixel_size(page)
            return movie
        pages = find_pages(path)
        if tiff.is_lsm and path.stat().st_size >= 2**32:
            raise MovieError(
                f"{path}: is an LSM file above 4 GB, whose offsets are not read; save it "
                "as OME-TIFF"
            )
        metadata, axes = read_axes(tiff)
        if tiff.is_micromanager:
            _refuse_unfinished(path, tiff)
        pages = find_frames_behind_one_page(pages, axes, is_part=is_part)
        order = _arrange(path, len(pages), axes, is_part)
        format = "BigTIFF" if tiff.is_bigtiff else "TIFF"
        size, scale = _plain_pixel_size(page), (0.0, 1.0)
        if tiff.is_stk:
            format = "MetaMorph STK"
        if tiff.is_imagej:
            format = "ImageJ TIFF"
            size = _imagej_pixel_size(page, metadata) or size
            scale = _imagej_scale(path, metadata, dtype)
    return Movie(
        TiffPixels(str(path), [pages], order, dtype, scale),
        name=str(path),
        format=format,
        paths=[path],
        pixel_size_um=size,
        frame_interval_s=positive_in(
            metadata.get("finterval"), metadata.get("tunit"), TIMES_S, "s"
        ),
    )


def _pixel_type(path: Path, page: tifffile.TiffPage) -> np.dtype:
    if page.samplesperpixel > 1:
        raise MovieError(
            f"{path}: has {page.samplesperpixel} samples a pixel (colour); convert it to "
            "a grey-scale movie for each channel"
        )
    if page.dtype is None or page.ndim != 2:
        raise MovieError(
            f"{path}: has pages of {page.ndim} dimensions and pixels of type {page.dtype}; "
            "save every frame as a page of integers or floating-point numbers"
        )
    return np.dtype(page.dtype)


def _refuse_unfinished(path: Path, tiff: tifffile.TiffFile) -> None:
    """Micro-Manager writes the OME-XML when it finishes a file."""
    summary = (tiff.micromanager_metadata or {}).get("Summary", {})
    channels, positions = (int(summary.get(k) or 1) for k in ("Channels", "Positions"))
    if max(channels, positions) > 1:
        raise MovieError(
            f"{path}: Micro-Manager says {channels} channels and {positions} positions, "
            "but its OME-XML or index is missing; open it in Micro-Manager, and save each "
            "position anew"
        )


# ---- Channels, and the order of frames ----

Axes = list[tuple[str, int]]


def read_axes(tiff: tifffile.TiffFile) -> tuple[dict[str, Any], Axes]:
    """The metadata of ImageJ or tifffile, and the axes of the pages, slowest first."""
    metadata: dict[str, Any] = {}
    description = tiff.pages.first.description
    if tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        keys = (("T", "frames"), ("Z", "slices"), ("C", "channels"))
        axes = [(axis, int(metadata.get(key, 1))) for axis, key in keys]
        images = int(metadata.get("images", 1))
        is_whole = math.prod(length for _, length in axes) >= images
        return metadata, axes if is_whole else [("T", images)]
    if description.startswith('{"shape":'):
        metadata = json.loads(description)
        shape = metadata["shape"]
        names = metadata.get("axes", "T" * (len(shape) - 2) + "YX")
        if names.endswith("YX") and len(names) == len(shape):
            return metadata, list(zip(names[:-2], map(int, shape[:-2]), strict=True))
    if tiff.is_stk or tiff.is_scanimage or tiff.is_fluoview or tiff.is_lsm:
        series = tiff.series[0]
        if series.axes.endswith("YX"):
            return metadata, list(zip(series.axes[:-2], series.shape[:-2], strict=True))
    return metadata, []


def find_frames_behind_one_page(pages: Pages, axes: Axes, *, is_part: bool) -> Pages:
    """ImageJ (above 4 GB) and MetaMorph describe a whole stack in its first page."""
    frames = math.prod(length for _, length in axes)
    if len(pages) > 1 or frames == 1:
        return pages
    place, size = int(pages.places[0]), pages.kind.frame_bytes
    whole = (pages.file_bytes - place) // size if place > 0 else 1
    if is_part:
        frames = min(frames, whole)
    if whole < frames:
        raise MovieError(
            f"{pages.path}: truncated: its header says {frames} frames, but the file "
            f"ends in frame {whole}; copy it again, or, if it is a part of a movie, open "
            "the folder"
        )
    return dataclasses.replace(
        pages,
        directories=np.repeat(pages.directories, frames),
        places=place + size * np.arange(frames),
    )


def _arrange(
    path: Path, pages: int, axes: Axes, is_part: bool
) -> Int[np.ndarray, "frames channels"]:
    names, lengths = [axis for axis, _ in axes], [length for _, length in axes]
    numbers = np.arange(pages)
    for axis, length in axes:
        if axis in _POSITION_AXES and length > 1:
            raise MovieError(
                f"{path}: has {length} positions or tiles (axis {axis}), which are no "
                "frames; save each as a movie of its own"
            )
    if dict(axes).get("C", 1) == 1:
        if pages < math.prod(lengths) and not is_part:
            raise MovieError(
                f"{path}: truncated: it says {math.prod(lengths)} frames, but has {pages}; "
                "copy it again, or, if it is a part of a movie, open the folder"
            )
        return numbers[:, None]
    channels = dict(axes)["C"]
    if pages % math.prod(lengths) and names[-1] == "C":
        names, lengths = ["C"], [channels]
    if min(lengths) < 1 or pages % math.prod(lengths):
        raise MovieError(
            f"{path}: broken: it says {' x '.join(f'{n} {a}' for a, n in axes)}, but has "
            f"{pages} pages; save it anew, so that both agree"
        )
    # Where more was appended, the axes come again.
    numbers = numbers.reshape(-1, *lengths)
    return np.moveaxis(numbers, 1 + names.index("C"), -1).reshape(-1, channels)


# ---- Units ----


def _resolution(page: tifffile.TiffPage) -> tuple[list[float], int]:
    """Pixels per unit, (y, x), and the unit: 2 is an inch, 3 a centimetre."""
    unit = page.tags.valueof(296, 2)
    rationals = [page.tags.valueof(code, (0, 1)) for code in (283, 282)]
    return [n / d if n and d else math.inf for n, d in rationals], int(unit)


def _plain_pixel_size(page: tifffile.TiffPage) -> tuple[float, float] | None:
    resolution, unit = _resolution(page)
    name = {2: "inch", 3: "cm"}.get(unit)
    y, x = (positive_in(1 / per_unit, name, LENGTHS_UM, "none") for per_unit in resolution)
    return (y, x) if y and x and max(y, x) <= _MAX_PLAUSIBLE_PIXEL_UM else None


def _imagej_pixel_size(
    page: tifffile.TiffPage, metadata: dict[str, Any]
) -> tuple[float, float] | None:
    resolution, unit = _resolution(page)
    # With "um", ImageJ itself takes a resolution per cm as that.
    name = "cm" if unit == 3 else metadata.get("unit", "pixel")
    y, x = (positive_in(1 / per_unit, str(name), LENGTHS_UM, "") for per_unit in resolution)
    return (y, x) if y and x else None


def _imagej_scale(
    path: Path, metadata: dict[str, Any], dtype: np.dtype
) -> tuple[float, float]:
    """Offset and slope from the stored pixels to the values that ImageJ shows.

    ImageJ stores signed 16-bit pixels with 32768 added, and calibrates no floats.
    """
    function = metadata.get("cf", _NO_FUNCTION)
    if function == _NO_FUNCTION or dtype.kind == "f":
        return 0.0, 1.0
    offset, slope = (metadata.get(key, default) for key, default in (("c0", 0), ("c1", 1)))
    is_number = all(isinstance(number, int | float) for number in (offset, slope))
    if (
        function != _STRAIGHT_LINE
        or not is_number
        or not math.isfinite(offset)
        or not slope
    ):
        raise MovieError(
            f"{path}: ImageJ calibrates its pixels by a function (cf={function}, "
            f"c0={offset}, c1={slope}) that is not read; convert it to 32-bit in ImageJ"
        )
    return float(offset), float(slope)

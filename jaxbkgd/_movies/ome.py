"""OME-TIFF: the files of a movie, and the frame and channel of each page.

It is defined at docs.openmicroscopy.org/ome-model/latest/ome-tiff/specification.html.
tifffile reads missing files and pages as zeros, and opens files in other folders if the XML
names them, so the pages are arranged here.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from jaxtyping import Int

from .movie import Movie, MovieError
from .tiff_pages import find_pages, Kinds, Pages
from .tiff_pixels import arrange_planes, TiffPixels


LENGTHS_UM = {
    "pm": 1e-6, "Å": 1e-4, "angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3,
    "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 2.54e4, "inch": 2.54e4,
}  # fmt: skip
TIMES_S = {
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "msec": 1e-3,
    "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "min": 60.0, "h": 3600.0,
}  # fmt: skip


class _Planes(NamedTuple):
    """Consecutive pages of a file and the place of the first: a TiffData element."""

    uuid: str
    file_name: str
    page: int | None
    pages: int | None
    first: dict[str, int]


_Image = tuple[ElementTree.Element, ElementTree.Element, list[_Planes]]


def open_ome(path: Path, xml: str, dtype: np.dtype) -> Movie:
    """The movie that a file of these pixels is a part of. The file has OME-XML that
    describes the movie or names the file that does.

    **Raises:**

    [`jaxbkgd.MovieError`][] where files or pages are missing, come twice or are not
    described, and for several positions in the same files.
    """
    describing, root = path, _parse(path, xml)
    refers = root.find("{*}BinaryOnly")
    if refers is not None:
        describing = path.parent / _file_name(refers.get("MetadataFile", ""))
        if not describing.is_file():
            raise MovieError(
                f"{path}: is a part of a movie that {describing.name} describes, which is "
                "not beside it; put all files of the movie in one folder, under their own "
                "names"
            )
        root = _parse(describing, _read_xml(describing))
    pixels, parts, times = _find_image(describing, root, path)
    lengths = {axis: int(pixels.get(f"Size{axis}", 1)) for axis in "CZT"}
    lengths["T"] = max(lengths["T"], times)
    axes = pixels.get("DimensionOrder", "XYCZT")[2:]
    if sorted(axes) != ["C", "T", "Z"] or min(lengths.values()) < 1:
        raise MovieError(
            f"{describing}: its OME-XML is broken (dimensions {axes} of {lengths})"
        )
    paths = _find_files(describing, root.get("UUID", ""), parts, path)
    kinds: Kinds = {}
    files = {
        each: find_pages(each, kinds) for each in dict.fromkeys([path, *paths.values()])
    }
    places, pages = _list_planes(describing, parts, paths, files, axes, lengths)
    # The axes are given fastest first.
    frames, channels, stride = np.zeros_like(places), places, 1
    for axis in axes:
        places, along = np.divmod(places, lengths[axis])
        if axis == "C":
            channels = along
        else:
            frames += stride * along
            stride *= lengths[axis]
    frames += stride * places
    order = arrange_planes(str(describing), frames, channels, pages, lengths["C"])
    y, x = (
        positive_in(pixels.get(name), pixels.get(f"{name}Unit"), LENGTHS_UM, "um")
        for name in ("PhysicalSizeY", "PhysicalSizeX")
    )
    interval, unit = (pixels.get(name) for name in ("TimeIncrement", "TimeIncrementUnit"))
    return Movie(
        TiffPixels(str(describing), list(files.values()), order, dtype),
        name=str(describing),
        format="OME-TIFF",
        paths=list(files),
        pixel_size_um=(y, x) if x and y else None,
        frame_interval_s=positive_in(interval, unit, TIMES_S, "s"),
    )


def _read_xml(path: Path) -> str:
    if path.suffix.lower() in (".ome", ".xml"):
        return path.read_text("utf-8")
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first.description


def _parse(path: Path, xml: str) -> ElementTree.Element:
    # Entities can grow without bound, and OME-XML has none.
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise MovieError(f"{path}: its OME-XML defines entities, which are not read")
    try:
        return ElementTree.fromstring(xml.encode())
    except ElementTree.ParseError as error:
        raise MovieError(f"{path}: its OME-XML is broken ({error})") from error


def _find_image(
    path: Path, root: ElementTree.Element, asked: Path
) -> tuple[ElementTree.Element, list[_Planes], int]:
    """The pixels and planes of the image that the file `asked` belongs to, and the number
    of images that are its frames, as programs write them that write frames one by one."""
    images: list[_Image] = [
        (image, pixels, [_read_planes(data) for data in pixels.iterfind("{*}TiffData")])
        for image in root.iterfind("{*}Image")
        for pixels in image.iterfind("{*}Pixels")
    ]
    if not images:
        raise MovieError(f"{path}: its OME-XML describes no image")
    if len(images) > 1:
        # Other positions have files of their own.
        uuid = root.get("UUID", "") if asked == path else ""
        names = {("", ""), (uuid, ""), ("", asked.name)}
        images = [
            image
            for image in images
            if any({(part.uuid, ""), ("", part.file_name)} & names for part in image[2])
        ] or images
    _, pixels, parts = images[0]
    if len(images) == 1:
        return pixels, parts or [_Planes("", "", None, None, {})], 1
    for image, others, planes in images:
        is_frame = len(planes) == 1 and all(others.get(f"Size{a}") == "1" for a in "CZT")
        if not is_frame or image.find("{*}StageLabel") is not None:
            raise MovieError(
                f"{path}: holds {len(images)} images or positions; save each as a movie of "
                "its own"
            )
    frames = [planes[0]._replace(first={"T": t}) for t, (_, _, planes) in enumerate(images)]
    return pixels, frames, len(frames)


def _read_planes(data: ElementTree.Element) -> _Planes:
    file = data.find("{*}UUID")
    page, pages = (int(n) if (n := data.get(k)) else None for k in ("IFD", "PlaneCount"))
    return _Planes(
        "" if file is None else (file.text or "").strip(),
        "" if file is None else _file_name(file.get("FileName", "")),
        page,
        pages,
        {axis: int(data.get(f"First{axis}", 0)) for axis in "CZT"},
    )


def _file_name(path: str) -> str:
    """Without folders, which are those of the computer that wrote the file."""
    return re.split(r"[/\\]", path)[-1]


def _find_files(
    path: Path, own_uuid: str, parts: Sequence[_Planes], asked: Path
) -> dict[tuple[str, str], Path]:
    """The files that the OME-XML of `path` names, by UUID and name."""
    keys = dict.fromkeys((part.uuid, part.file_name) for part in parts)
    files: dict[tuple[str, str], Path] = {}
    for uuid, file_name in keys:
        # The only file may have been renamed.
        is_only = (len(keys) == 1 and asked == path) or not (uuid or file_name)
        is_own = is_only or (uuid and uuid == own_uuid) or file_name == path.name
        file = path if is_own else path.parent / file_name
        if not (file_name or is_own) or not file.is_file():
            raise MovieError(
                f"{path}: is a part of a movie, and {file_name or uuid}, which its OME-XML "
                "names, is not beside it; put all files of the movie in one folder, under "
                "their own names"
            )
        files[uuid, file_name] = file
    if asked not in files.values():
        raise MovieError(
            f"{asked}: is not among the files that the OME-XML of {path} describes; put "
            "all files of the movie in one folder, under their own names"
        )
    return files


def _list_planes(
    path: Path,
    parts: Sequence[_Planes],
    paths: dict[tuple[str, str], Path],
    files: dict[Path, Pages],
    axes: str,
    lengths: dict[str, int],
) -> tuple[Int[np.ndarray, " planes"], Int[np.ndarray, " planes"]]:
    """The places of planes, counted along the axes, and their pages, over all files."""
    starts = np.cumsum([0, *map(len, files.values())]).tolist()
    total = starts.pop()
    start_of = dict(zip(files, starts, strict=True))
    strides = {axis: math.prod(lengths[a] for a in axes[:i]) for i, axis in enumerate(axes)}
    places: list[int] = []
    pages: list[int] = []
    missing = 0
    for part in parts:
        file = paths[part.uuid, part.file_name]
        first, count = part.page or 0, part.pages
        if count is None:
            count = len(files[file]) if part.page is None else 1
        there = max(0, min(count, len(files[file]) - first))
        missing += max(0, count - there)
        place = sum(strides[axis] * n for axis, n in part.first.items())
        places.extend(range(place, place + there))
        pages.extend(range(start_of[file] + first, start_of[file] + first + there))
        if len(places) > total:
            break
    if sorted(pages) != list(range(total)):
        raise MovieError(
            f"{path}: its OME-XML describes {len(set(pages))} of its {total} pages, and "
            f"{len(pages) - len(set(pages))} more than once; save it anew, so that both "
            "agree"
        )
    # In a single file, pages are missing since an acquisition was stopped.
    if missing and len(files) > 1:
        raise MovieError(
            f"{path}: its {len(files)} files lack {missing} of the pages that its OME-XML "
            "names; copy them again, all of them"
        )
    return np.array(places), np.array(pages)


def positive_in(
    value: Any, unit: str | None, units: dict[str, float], default: str
) -> float | None:
    """A positive value in micrometres or seconds, or None if it or its unit has no
    meaning."""
    # Unicode has two characters for the prefix, and ImageJ writes it as an escape.
    unit = str(unit or default).strip()
    for micro in ("\u00b5", "\u03bc", "\\u00B5"):
        unit = unit.replace(micro, "u")
    try:
        number = float(value) * units[unit]
    except (TypeError, ValueError, KeyError):
        return None
    # Resolutions are fractions, and add digits to a decimal number.
    return float(f"{number:.9g}") if 0 < number < math.inf else None

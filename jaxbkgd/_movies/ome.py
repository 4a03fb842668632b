"""OME-XML: what it says of a movie and of the files that hold it.

It is defined at docs.openmicroscopy.org/ome-model/latest/ome-tiff/specification.html.
"""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from .movie import MovieError
from .tiff_pages import find_pages, Pages


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
    """Consecutive pages of a file, and where they belong: a TiffData element."""

    uuid: str
    file_name: str
    page: int | None
    pages: int | None
    first: dict[str, int]


@dataclass
class Ome:
    """What OME-XML says of a movie."""

    uuid: str
    described_in: str
    dimensions: str
    lengths: dict[str, int]
    planes: list[_Planes]
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None


def read_ome(path: Path, xml: str, wanted: Path) -> Ome:
    """What the OME-XML of a file says of the movie that the file `wanted` is a part of."""
    # Entities can grow without bound, and OME-XML has none.
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise MovieError(f"{path}: its OME-XML defines entities, which are not read")
    own, described_in = "", ""
    images: list[tuple[dict[str, str], list[_Planes]]] = []
    planes: list[_Planes] = []
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(xml.encode())):
            match element.tag.rpartition("}")[2]:
                case "TiffData":
                    planes.append(_read_planes(element))
                    element.clear()
                case "Plane":
                    element.clear()
                case "Pixels":
                    images.append((element.attrib, planes))
                    planes = []
                case "BinaryOnly":
                    described_in = _file_name(element.get("MetadataFile", ""))
                case "OME":
                    own = element.get("UUID", "")
    except ElementTree.ParseError as error:
        raise MovieError(f"{path}: its OME-XML is broken ({error})") from error
    if described_in:
        return Ome(own, described_in, "", {}, [])
    if not images:
        raise MovieError(f"{path}: its OME-XML describes no image")
    if len(images) > 1:
        # Of other positions, that have files of their own, nothing is read.
        names = {("", ""), (own if wanted == path else "", ""), ("", wanted.name)}
        images = [
            image
            for image in images
            if any({(each.uuid, ""), ("", each.file_name)} & names for each in image[1])
        ] or images
    said, planes = images[0]
    lengths = {axis: int(said[f"Size{axis}"]) for axis in "CZT"}
    dimensions = said.get("DimensionOrder", "XYCZT")[2:]
    if sorted(dimensions) != ["C", "T", "Z"] or min(lengths.values()) < 1:
        raise MovieError(
            f"{path}: its OME-XML is broken (dimensions {dimensions} of {lengths})"
        )
    if len(images) > 1:
        planes = _join_images(path, images)
        lengths["T"] = len(images)
    x, y = (
        positive_in(
            said.get(f"PhysicalSize{axis}"),
            said.get(f"PhysicalSize{axis}Unit"),
            LENGTHS_UM,
            "um",
        )
        for axis in "XY"
    )
    interval = positive_in(
        said.get("TimeIncrement"), said.get("TimeIncrementUnit"), TIMES_S, "s"
    )
    size = (y, x) if x and y else None
    whole = planes or [_Planes("", "", None, None, {})]
    return Ome(own, "", dimensions, lengths, whole, size, interval)


def _read_planes(element: ElementTree.Element) -> _Planes:
    def integer(name: str) -> int | None:
        return None if name not in element.attrib else int(element.attrib[name])

    file = element.find("{*}UUID")
    return _Planes(
        "" if file is None else (file.text or "").strip(),
        "" if file is None else _file_name(file.get("FileName", "")),
        integer("IFD"),
        integer("PlaneCount"),
        {axis: integer(f"First{axis}") or 0 for axis in "CZT"},
    )


def _file_name(path: str) -> str:
    """Without folders: those of the computer that wrote it are no longer there."""
    return re.split(r"[/\\]", path)[-1]


def _join_images(
    path: Path, images: list[tuple[dict[str, str], list[_Planes]]]
) -> list[_Planes]:
    """Frames that were written one by one, each as an image of its own."""
    if any(said[f"Size{axis}"] != "1" for said, _ in images for axis in "CZT") or any(
        len(planes) != 1 for _, planes in images
    ):
        raise MovieError(
            f"{path}: holds {len(images)} images or positions; save each as a movie of "
            "its own"
        )
    return [
        planes[0]._replace(first={"C": 0, "Z": 0, "T": time})
        for time, (_, planes) in enumerate(images)
    ]


def _find_ome_files(path: Path, ome: Ome, wanted: Path) -> dict[tuple[str, str], Path]:
    """The files that OME-XML names, by UUID and name."""
    keys = dict.fromkeys((planes.uuid, planes.file_name) for planes in ome.planes)
    files: dict[tuple[str, str], Path] = {}
    for key in keys:
        uuid, file_name = key
        # One that was renamed is still the only one.
        is_this = (len(keys) == 1 and wanted == path) or not (uuid or file_name)
        if is_this or (uuid and uuid == ome.uuid) or file_name == path.name:
            files[key] = path
            continue
        files[key] = path.parent / file_name
        if not file_name or not files[key].is_file():
            raise MovieError(
                f"{path}: is a part of a movie, and {file_name or uuid}, which its OME-XML "
                "names, is not beside it; put all files of the movie in one folder, under "
                "their own names"
            )
    return files


def arrange_ome(
    path: Path, ome: Ome, pages: Pages, wanted: Path
) -> tuple[list[Pages], np.ndarray]:
    """The files of a movie, and the numbers of their pages, (frames, channels)."""
    paths = _find_ome_files(path, ome, wanted)
    files = {
        each: pages if each == path else find_pages(each, pages.kind)
        for each in dict.fromkeys(paths.values())
    }
    total = sum(map(len, files.values()))
    starts = dict(
        zip(files, np.cumsum([0, *map(len, files.values())]).tolist(), strict=False)
    )
    strides, stride = {}, 1
    for axis in ome.dimensions:
        strides[axis] = stride
        stride *= ome.lengths[axis]
    # Of planes, in the order of the dimensions, and of pages.
    places: list[int] = []
    numbers: list[int] = []
    missing = 0
    for planes in ome.planes:
        file = paths[planes.uuid, planes.file_name]
        first = planes.page or 0
        count = planes.pages
        if count is None:
            count = len(files[file]) if planes.page is None else 1
        named, count = count, max(0, min(count, len(files[file]) - first))
        missing += max(0, named - count)
        place = sum(strides[axis] * n for axis, n in planes.first.items())
        places.extend(range(place, place + count))
        numbers.extend(range(starts[file] + first, starts[file] + first + count))
        if len(places) > total:
            break
    if sorted(numbers) != list(range(total)):
        raise MovieError(
            f"{path}: its OME-XML describes {len(set(numbers))} of its {total} pages, and "
            f"{len(numbers) - len(set(numbers))} more than once; save it anew, so that "
            "both agree"
        )
    # In one file, that is an acquisition that was stopped.
    if missing and len(files) > 1:
        raise MovieError(
            f"{path}: its {len(files)} files lack {missing} of the pages that its OME-XML "
            "names; copy them again, all of them"
        )
    order = _order_of_planes(path, ome, np.array(places), np.array(numbers))
    return list(files.values()), order


def _order_of_planes(
    path: Path, ome: Ome, places: np.ndarray, pages: np.ndarray
) -> np.ndarray:
    frames, channel, stride = np.zeros_like(places), places, 1
    for axis in ome.dimensions:
        places, along = np.divmod(places, ome.lengths[axis])
        if axis == "C":
            channel = along
        else:
            frames += stride * along
            stride *= ome.lengths[axis]
    count, channels = int(frames.max()) + 1, ome.lengths["C"]
    # The last frame may lack channels, where an acquisition was stopped.
    if places.any() or not (count - 1) * channels < len(pages) <= count * channels:
        raise MovieError(
            f"{path}: its OME-XML says {count} frames of {channels} channels, but it has "
            f"{len(pages)} pages; save it anew, so that both agree"
        )
    order = np.full((count, channels), -1)
    order[frames, channel] = pages
    if count > 1 and (order[-1] < 0).any():
        order = order[:-1]
    if (order < 0).any():
        missing = int((order < 0).any(axis=1).argmax())
        raise MovieError(f"{path}: its OME-XML lacks frame {missing} of {count}")
    return order


def positive_in(
    value: Any, unit: str | None, units: dict[str, float], default: str
) -> float | None:
    """A positive value in micrometres or seconds, where it and its unit make sense."""
    # Both characters for the prefix, and ImageJ's way to write it.
    unit = str(unit or default).strip()
    for micro in ("\u00b5", "\u03bc", "\\u00B5"):
        unit = unit.replace(micro, "u")
    try:
        number = float(value) * units[unit]
    except (TypeError, ValueError, KeyError):
        return None
    # What resolutions, which are fractions, add to a decimal number is taken off.
    return float(f"{number:.9g}") if 0 < number < math.inf else None

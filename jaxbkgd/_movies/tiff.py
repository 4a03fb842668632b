"""TIFF files: the channels and the order of their frames, and the units of their pixels.

tifffile arranges the pages of OME-TIFF and NDTiff, but reads missing files and pages as
zeros, and positions as frames, so these are refused here.
"""

import logging
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from jaxtyping import Int

from .movie import Movie, MovieError, UNITS
from .tiff_pages import clear_errors, find_pages, Pages, read_metadata, TiffPixels


# What tifffile logs of a broken file, a MovieError says.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# Resolution tags without other metadata are mostly those of a printer (72 dpi is 353 um).
_MAX_PLAUSIBLE_PIXEL_UM = 10.0

# Axes of tifffile: tile, mosaic and phase (for position).
_POSITION_AXES = "RMP"

# A damaged description may say that there are more, and would fill the memory.
_MAX_PLANES = 10_000_000


def open_tiff(path: Path, *, is_part: bool = False, is_growing: bool = False) -> Movie:
    """A TIFF, BigTIFF, OME-TIFF, NDTiff, ImageJ, MetaMorph or ScanImage file. Times and
    depths become frames. A part of a movie may say how many frames the whole has, and so
    may a file that is growing."""
    with clear_errors(path), tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        size = _pixel_size(page)
        xml = page.tags.valueof(270)
        # tifffile leaves bytes that it cannot decode.
        xml = xml.decode("latin1") if isinstance(xml, bytes) else page.description
        if tiff.is_ome or _is_damaged_ome(path, xml):
            movie = _open_ome(path, xml)
            movie.pixel_size_um = movie.pixel_size_um or size
            return movie
        index = find_index(path.parent) if tiff.is_micromanager else None
        if index is not None and path.parent == index.parent:
            return open_ndtiff(index, path)
        header = tiff.micromanager_metadata or {}
        if header.get("MajorVersion", 0) >= 2:
            what = "is NDTiff without its NDTiff.index, which tells times from channels"
            raise MovieError(f"{path}: {what}; copy that into the same folder, too")
        pages = find_pages(path, is_growing=is_growing)
        order = _arrange(pages, is_part or is_growing)
        metadata, scale = read_metadata(tiff), (0.0, 1.0)
        format = "BigTIFF" if tiff.is_bigtiff else "TIFF"
        if tiff.is_micromanager:
            # It writes the OME-XML when it finishes a file.
            summary = header.get("Summary", {})
            said = [int(summary.get(key) or 1) for key in ("Channels", "Positions")]
            if max(said) > 1:
                what = f"{said[0]} channels and {said[1]} positions without OME-XML"
                raise MovieError(f"{path}: says {what}; save each position by itself")
        if tiff.is_imagej:
            format = "ImageJ TIFF"
            size = _pixel_size(page, str(metadata.get("unit", "pixel"))) or size
            scale = _imagej_scale(pages, metadata)
        interval = metadata.get("finterval") if pages.axes.get("Z", 1) == 1 else None
        return Movie(
            TiffPixels(str(path), [pages], order, scale),
            name=str(path),
            format=format,
            paths=[path],
            pixel_size_um=size,
            frame_interval_s=_positive_in(interval, metadata.get("tunit"), "s"),
        )


def _is_damaged_ome(path: Path, xml: str) -> bool:
    """Whether OME-XML was here, which tifffile knows by its end alone. As a plain TIFF, the
    movie would have its channels as frames."""
    is_named = re.search(r"\.ome\.[^.]*$", path.name.lower()) is not None
    return "<OME" in xml or (is_named and "<" in xml)


def _arrange(pages: Pages, is_part: bool) -> Int[np.ndarray, "frames channels"]:
    """The pages of frames and channels, by the axes that the file says."""
    axes, frames, count = dict(pages.axes), pages.said_frames, len(pages)
    said = " x ".join(f"{length} {axis}" for axis, length in axes.items())
    if any(axis in _POSITION_AXES and length > 1 for axis, length in axes.items()):
        raise MovieError(f"{pages.path}: holds positions ({said}); save each as a movie")
    channels = axes.get("C", 1)
    if channels == 1 and (count >= frames or is_part):
        return np.arange(count)[:, None]
    if 1 < channels <= count < frames and not count % channels and list(axes)[-1] == "C":
        what = f"says {said}, but has {count} pages; was it stopped, or cut short?"
        warnings.warn(f"{pages.path}: {what}", stacklevel=2)
        return np.arange(count).reshape(-1, channels)
    if channels == 1 or frames < 1 or count % frames:
        what = f"truncated: it says {frames} frames ({said}), but has {count}"
        raise MovieError(f"{pages.path}: {what}; copy it again, or open its folder")
    # Where more was appended, the axes come again.
    numbers = np.arange(count).reshape(-1, *axes.values())
    return np.moveaxis(numbers, 1 + list(axes).index("C"), -1).reshape(-1, channels)


def _pixel_size(
    page: tifffile.TiffPage, imagej_unit: str = ""
) -> tuple[float, float] | None:
    """The size (y, x) by the resolution tags, whose unit ImageJ says elsewhere."""
    # With "um", ImageJ itself takes a resolution per cm as that.
    units = {2: imagej_unit or "inch", 3: "cm"}
    unit = units.get(int(page.tags.valueof(296, 2)), imagej_unit)
    rationals = [page.tags.valueof(code, (0, 1)) for code in (283, 282)]
    y, x = (_positive_in(d / n if n else 0, unit, "") for n, d in rationals)
    is_plausible = y and x and (imagej_unit or max(y, x) <= _MAX_PLAUSIBLE_PIXEL_UM)
    return (y, x) if y and x and is_plausible else None


def _imagej_scale(pages: Pages, metadata: dict[str, Any]) -> tuple[float, float]:
    """Offset and slope from stored pixels, unless they are floats, to those of ImageJ."""
    # Of the functions of ij.measure.Calibration, 0 is a straight line and 20 none.
    function, offset, slope = map(metadata.get, ("cf", "c0", "c1"), (20, 0, 1))
    if function == 20 or pages.dtype.kind == "f":
        return 0.0, 1.0
    # Comparisons with a number that is none are false.
    largest = abs(offset) + abs(slope) * 2.0 ** (8 * pages.dtype.itemsize)
    if function == 0 and slope and largest <= float(np.finfo(np.float32).max):
        return float(offset), float(slope)
    what = f"by a function (cf={function}, c0={offset}, c1={slope}) that is not read"
    raise MovieError(f"{pages.path}: ImageJ calibrates it {what}; convert it to 32-bit")


def find_index(folder: Path) -> Path | None:
    """The index of NDTiff, which is in the folder or in its full resolution."""
    places = (folder / "NDTiff.index", folder / "Full resolution" / "NDTiff.index")
    return next((place for place in places if place.is_file()), None)


def open_ndtiff(index: Path, asked: Path | None = None) -> Movie:
    """The movie that an index of NDTiff describes, which the file `asked` has to be a part
    of. Times and depths are frames."""
    entries = list(tifffile.read_ndtiff_index(index))
    names = sorted({Path(name).name for _, name, *_ in entries})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        what = f"{', '.join(missing)}, which is not beside it" if missing else "no frame"
        raise MovieError(f"{index}: names {what}; put all files of the movie in one folder")
    if len({frozenset(axes) for axes, *_ in entries}) > 1:
        raise MovieError(f"{index}: gives its pages different axes; save them as movies")
    first = index.parent / names[0]
    with clear_errors(index), tifffile.TiffFile(first, is_ndtiff=True) as tiff:
        order, files = _arrange_series(index, list(tiff.series), asked or first)
    # Files after the first are numbered from 1.
    following = first.with_name(f"{first.stem}_{len(names)}{first.suffix}")
    total = sum(map(len, files))
    if len(entries) != total or following.is_file():
        what = f"describes {len(entries)} pages, but its files hold {total}"
        if following.is_file():
            what = f"does not name {following.name}, which is beside it"
        raise MovieError(f"{index}: {what}; was it cut short? copy it again")
    return ndtiff_movie(index, TiffPixels(str(index.parent), files, order), first, files)


def ndtiff_movie(
    index: Path, pixels: TiffPixels, first: Path, files: Sequence[Pages]
) -> Movie:
    """A movie of these files, whose units the first one says."""
    with clear_errors(first), tifffile.TiffFile(first, is_ndtiff=True) as tiff:
        summary = (tiff.micromanager_metadata or {}).get("Summary", {})
    size = _positive_in(summary.get("PixelSize_um"), "um", "um")
    return Movie(
        pixels,
        name=str(index.parent),
        format="NDTiff",
        paths=[index, *(pages.path for pages in files)],
        pixel_size_um=None if size is None else (size, size),
        frame_interval_s=_positive_in(summary.get("Interval_ms"), "ms", "ms"),
    )


def _open_ome(path: Path, xml: str) -> Movie:
    """The movie that a file with this OME-XML is a part of."""
    describing, opened, root = path, path, _parse(path, xml)
    refers = root.find("{*}BinaryOnly")
    if refers is not None:
        describing = path.parent / PureWindowsPath(refers.get("MetadataFile", "")).name
        if not describing.is_file():
            what = f"a part of a movie that {describing.name} describes"
            raise MovieError(f"{path}: is {what}; put all of its files in one folder")
        if describing.suffix.lower() in (".ome", ".xml"):
            root = _parse(describing, describing.read_text("utf-8"))
        else:
            opened, said = describing, str(tifffile.tiffcomment(describing))
            root = _parse(describing, said)
    images = root.findall("{*}Image/{*}Pixels")
    if not images:
        raise MovieError(f"{describing}: its OME-XML describes no image")
    named = [[f.get("FileName") for f in each.iterfind(".//{*}UUID")] for each in images]
    pixels = images[max(range(len(images)), key=lambda i: path.name in named[i])]
    uuids = {root.get("UUID"), *(f.text for f in pixels.iterfind(".//{*}UUID"))} - {None}
    xml = ElementTree.tostring(root, "unicode")
    with tifffile.TiffFile(opened, omexml=xml, is_ome=True, is_mmstack=False) as tiff:
        series = [each for each in tiff.series if each.kind == "ome"]
        is_joined = root.find(".//{*}StageLabel") is None
        order, files = _arrange_series(describing, series, path, uuids, is_joined)
    _require_uuids(describing, root, opened, files)
    y, x, interval = (
        _positive_in(pixels.get(name), pixels.get(f"{name}Unit"), default)
        for name, default in (
            ("PhysicalSizeY", "um"),
            ("PhysicalSizeX", "um"),
            ("TimeIncrement", "s"),
        )
    )
    return Movie(
        TiffPixels(str(describing), files, order),
        name=str(describing),
        format="OME-TIFF",
        paths=[pages.path for pages in files],
        pixel_size_um=(y, x) if y and x else None,
        frame_interval_s=interval if pixels.get("SizeZ", "1") == "1" else None,
    )


def _require_uuids(
    describing: Path, root: ElementTree.Element, opened: Path, files: Sequence[Pages]
) -> None:
    """Refuses files of other acquisitions, which may have the names that OME-XML gives to
    its own. It calls the file that it was opened with by its UUID, whatever its name."""
    whole, used = _uuid(root.get("UUID")), {pages.path.resolve() for pages in files}
    elements = root.iterfind(".//{*}UUID")
    named = {(each.get("FileName", ""), _uuid(each.text)) for each in elements}
    for name, uuid in sorted(named):
        path = describing.parent / name
        is_own = uuid == whole or (len(named) == 1 and name == opened.name)
        if is_own or path.resolve() not in used:
            continue
        with tifffile.TiffFile(path) as tiff:
            try:
                other = ElementTree.fromstring(tiff.pages.first.description)
            except ElementTree.ParseError:
                other = ElementTree.Element("OME")
        own = {_uuid(other.get("UUID"))} - {""}
        if not own:
            # It may describe itself, or say which file describes it.
            own = {_uuid(each.text) for each in other.iterfind(".//{*}UUID")}
            refers = other.find("{*}BinaryOnly")
            if refers is not None and _uuid(refers.get("UUID")) in ("", whole):
                own.add(uuid)
        if uuid not in own:
            what = f"is another file than {uuid}, which {describing.name} names so"
            raise MovieError(f"{path}: {what}; put the files of each movie in one folder")


def _uuid(text: str | None) -> str:
    return (text or "").strip().lower()


def _parse(path: Path, xml: str) -> ElementTree.Element:
    """OME-XML with files that are beside `path`, as tifffile reads it."""
    try:
        root = ElementTree.fromstring(xml.encode())
    except ElementTree.ParseError as error:
        what = f"its OME-XML is broken ({error}), which tells times from channels"
        raise MovieError(f"{path}: {what}; copy it again, or save it as TIFF") from None
    for file in root.iterfind(".//{*}UUID"):
        # Folders are those of the computer that wrote the file.
        file.set("FileName", PureWindowsPath(file.get("FileName", "")).name)
    for pixels in root.iterfind(".//{*}Pixels"):
        planes = math.prod(int(pixels.get(f"Size{axis}", 1)) for axis in "CZT")
        counts = [int(d.get("PlaneCount", 1)) for d in pixels.iterfind("{*}TiffData")]
        if not 0 < planes <= _MAX_PLANES or max(counts, default=0) > _MAX_PLANES:
            raise MovieError(f"{path}: its OME-XML is broken: it says {planes} planes")
    return root


def _arrange_series(
    describing: Path,
    series: list[tifffile.TiffPageSeries],
    asked: Path,
    uuids: set[str | None] | None = None,
    is_joined: bool = False,
) -> tuple[Int[np.ndarray, "frames channels"], list[Pages]]:
    """The pages of frames and channels in the series that the file `asked` belongs to,
    counted over its files, and the files. Series of a page each may be joined. `uuids` are
    those of files in OME-XML. Of a stopped acquisition, an incomplete last frame is left
    out."""
    there = asked.resolve().name
    found = [
        each
        for each in series
        if any(page and page.parent.filehandle.name == there for page in each.pages)
    ]
    if not found:
        raise MovieError(f"{asked}: is not described by {describing}; save it again")
    axes = found[0].axes
    lengths = dict(zip(axes[: axes.index("Y")], found[0].shape, strict=False))
    others = math.prod(length for axis, length in lengths.items() if axis not in "TZC")
    if len(found) > 1 and is_joined and all(len(each.pages) == 1 for each in found):
        lengths = {"T": len(found)}
    elif others * len(found) > 1:
        what = f"{others * len(found)} images or positions"
        raise MovieError(f"{describing}: holds {what}; save each as a movie of its own")
    planes = [
        page and (page.parent.filehandle.path, page.offset or page.dataoffsets[0])
        for each in found
        for page in each.pages
    ]
    files: list[Pages] = []
    numbers: dict[Any, int] = {}
    for path in dict.fromkeys(plane[0] for plane in planes if plane):
        start = sum(map(len, files))
        files.append(find_pages(Path(path), files[0] if files else None))
        for offsets in (files[-1].places.tolist(), files[-1].directories.tolist()):
            numbers |= {(path, offset): start + i for i, offset in enumerate(offsets)}
    order = np.array([numbers.get(plane, -1) for plane in planes])
    channels = lengths.setdefault("C", 1)
    order = order.reshape(*lengths.values())
    order = np.moveaxis(order, list(lengths).index("C"), -1).reshape(-1, channels)
    described, total = np.unique(order[order >= 0]).size, sum(map(len, files))
    is_full = order.min(axis=1) >= 0
    count = int(is_full.sum())
    is_stopped = count and is_full[:count].all() and (order[count + 1 :] < 0).all()
    if uuids is not None and described < total:
        problem = f"describes {described} of its {total} pages"
    elif count < len(order) and (len(uuids or files) > 1 or not is_stopped):
        problem = f"lacks {np.sum(order < 0)} pages, from frame {np.argmin(is_full)} on"
    else:
        return order[:count], files
    raise MovieError(f"{describing}: {problem}; put all of its files in one folder")


def _positive_in(value: Any, unit: str | None, default: str) -> float | None:
    """A positive number in micrometres or seconds, or None if it has no meaning."""
    # Unicode has two characters for the prefix, and ImageJ writes it as an escape.
    unit = str(unit or default).strip()
    for micro in ("\u00b5", "\u03bc", "\\u00B5"):
        unit = unit.replace(micro, "u")
    try:
        number = float(value) * UNITS[unit]
    except (TypeError, ValueError, KeyError):
        return None
    # Resolutions are fractions, and add digits to a decimal number.
    return float(f"{number:.9g}") if 0 < number < math.inf else None

"""TIFF: movies in one file or many, read at memory speed, and written in any order."""

import dataclasses
import fnmatch
import glob
import hashlib
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from .movie import check_pixels, Movie, MovieError, one_line
from .ome import arrange_ome, LENGTHS_UM, positive_in, read_ome, TIMES_S
from .sinks import Sink
from .tiff_pages import find_pages, Kind, Pages, SourceFile


# What tifffile logs about a broken file is said once, and better, by a MovieError.
# Without a handler Python would print it to stderr; with this one, only those who
# set logging up see it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".stk", ".lsm")

# Offsets in classic TIFF have 32 bits; the margin is for the header.
_CLASSIC_TIFF_MAX_BYTES = 2**32 - 2**16
_TIFF_DIRECTORY_BYTES = 512

# Tiles hold a part of a frame, and cannot be much larger than one.
_MAX_TILE_PIXELS = 2**28

# What a codec may add to a page.
_CODEC_BYTES = 4096

# Resolution tags without other metadata are mostly those of a printer (72 dpi is 353 um);
# no microscope has camera pixels larger than this in its sample.
_MAX_PLAUSIBLE_PIXEL_UM = 10.0


class TiffMovie(Movie):
    """Pages of one file or many: `order` (frames, channels) has their numbers, counted
    over all files.

    Files are open only while they are read, so that there may be any number of them, and
    threads share nothing.
    """

    def __init__(
        self,
        name: str,
        format: str,
        files: Sequence[Pages],
        order: np.ndarray,
        dtype: np.dtype,
    ) -> None:
        self.name = name
        self.format = format
        self.shape = (*order.shape, files[0].kind.height, files[0].kind.width)
        self.dtype = dtype.newbyteorder("=")
        check_pixels(self.name, self.shape, self.dtype)
        self.paths = [file.path for file in files]
        self._stored = dtype.newbyteorder(">" if files[0].order == ">" else "<")
        self._order = order
        self._files = np.repeat(np.arange(len(files)), [len(file) for file in files])
        self._directories = np.concatenate([file.directories for file in files])
        self._places = np.concatenate(
            [
                file.places if file.order == files[0].order else np.full(len(file), -1)
                for file in files
            ]
        )
        self._refuse_faults(files)
        # A missing codec or a cut end shows before anything is computed.
        for frame in {0, len(order) - 1}:
            self.read(frame, frame + 1)

    def _refuse_faults(self, files: Sequence[Pages]) -> None:
        before = 0
        for file in files:
            if file.fault is not None:
                page, reason = file.fault
                frame = int((self._order == before + page).any(axis=1).argmax())
                raise MovieError(f"{file.path}: frame {frame} of {self.shape[0]} {reason}")
            before += len(file)

    def read(self, start: int, stop: int, channel: int = 0) -> np.ndarray:
        pages = self._order[start:stop, channel]
        frames = np.empty((len(pages), *self.shape[2:]), self._stored)
        files = self._files[pages]
        for first, last in _runs(files[1:] == files[:-1], len(files)):
            path = self.paths[int(files[first])]
            try:
                self._fill(path, frames[first:last], pages[first:last], start + first)
            except OSError as error:
                reason = error.strerror or one_line(error)
                raise MovieError(f"{path}: cannot be read ({reason})") from error
        return frames.astype(self.dtype, copy=False)

    def _fill(self, path: Path, frames: np.ndarray, pages: np.ndarray, start: int) -> None:
        """Read pages of one file; `start` is the number of the first one's frame."""
        places = self._places[pages]
        if (places < 0).any():
            self._decode(path, frames, pages, start)
            return
        file = SourceFile(path)
        frame_bytes = frames[:1].nbytes
        try:
            follows = places[1:] == places[:-1] + frame_bytes
            for first, last in _runs(follows, len(places)):
                count = file.fill(frames[first:last], int(places[first]))
                if count < (last - first) * frame_bytes:
                    raise MovieError(
                        f"{path}: truncated: the file ends in frame "
                        f"{start + first + count // frame_bytes} of {self.shape[0]}"
                    )
        finally:
            file.close()

    def _decode(
        self, path: Path, frames: np.ndarray, pages: np.ndarray, start: int
    ) -> None:
        index = 0
        try:
            with tifffile.TiffFile(path) as tiff:
                for index, page in enumerate(pages):
                    tiff.filehandle.seek(int(self._directories[page]))
                    frames[index] = self._decoded(tifffile.TiffPage(tiff, int(page)))
        except Exception as error:
            # tifffile has no one exception for what a broken file can provoke in it.
            raise MovieError(
                f"{path}: frame {start + index} of {self.shape[0]} cannot be read "
                f"({one_line(error)})"
            ) from error

    def _decoded(self, page: tifffile.TiffPage) -> np.ndarray:
        if page.shape != self.shape[2:] or page.dtype != self.dtype:
            raise ValueError(f"it has become {page.shape} px of {page.dtype}")
        tile = max(page.tilewidth, 1) * max(page.tilelength, 1)
        if tile > _MAX_TILE_PIXELS:
            raise ValueError(f"it has tiles of {tile} px")
        offsets, counts = page.dataoffsets, page.databytecounts
        end = max(map(int.__add__, offsets, counts), default=0)
        if len(offsets) != len(counts) or not 0 < end <= page.parent.filehandle.size:
            raise ValueError("truncated: its pixels are not all in the file")
        plain = max(math.prod(self.shape[2:]), len(counts) * tile) * self.dtype.itemsize
        # No codec makes pixels larger than they were, but what decodes to gigabytes is.
        if sum(counts) > 2 * plain + _CODEC_BYTES:
            raise ValueError(f"its {plain} bytes take {sum(counts)} in the file")
        return page.asarray(maxworkers=1)

    def contiguous_offset(self) -> int | None:
        """Where the frames begin, if all of them lie one after the other in one file."""
        places = self._places[self._order].reshape(-1)
        step = math.prod(self.shape[2:]) * self.dtype.itemsize
        if len(self.paths) > 1 or (places[1:] != places[:-1] + step).any():
            return None
        return int(places[0]) if places[0] >= 0 else None

    def state(self) -> Any:
        status = [os.stat(path) for path in self.paths]
        said = repr([(each.st_size, each.st_mtime_ns) for each in status])
        return hashlib.sha256(said.encode()).hexdigest()


def _runs(follows: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """Where runs begin and end; `follows` says which of all but the first go on."""
    breaks = (np.flatnonzero(~follows) + 1).tolist()
    return zip([0, *breaks], [*breaks, count], strict=True) if count else iter(())


def open_tiff(path: Path) -> TiffMovie:
    """A TIFF, BigTIFF, OME-TIFF, ImageJ or MetaMorph stack.

    Every page is a frame of a channel. Channels are those that OME-XML, ImageJ or tifffile
    say; time and depth become frames, in the order of the file. The other files of an
    OME-TIFF are read from the same folder. Pixel sizes are those of OME-XML, of ImageJ
    or else of the resolution tags, if these are not a printer's: at most 10 um.
    """
    try:
        return _open(path)
    except (MovieError, OSError):
        raise
    except tifffile.TiffFileError as error:
        raise MovieError(f"{path}: is not a TIFF file ({one_line(error)})") from error
    except Exception as error:
        # tifffile has no one exception for what a broken file can provoke in it.
        raise MovieError(
            f"{path}: its description is broken ({one_line(error)})"
        ) from error


def _open(path: Path, asked: Path | None = None) -> TiffMovie:
    """`asked` is the file that names this one as the one that describes it."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        dtype = _pixel_type(path, page)
        pages = find_pages(path)
        size = _plain_pixel_size(page)
        interval = None
        if tiff.is_ome:
            ome = read_ome(path, page.description, asked or path)
            if ome.described_in:
                return _open_described(path, ome.described_in, asked)
            files, order = arrange_ome(path, ome, pages, asked or path)
            if (asked or path) not in [file.path for file in files]:
                raise MovieError(
                    f"{asked or path}: is not among the files that the OME-XML of {path} "
                    "describes; put all files of the movie in one folder, under their own "
                    "names"
                )
            format = "OME-TIFF"
            size = ome.pixel_size_um or size
            interval = ome.frame_interval_s
        else:
            said, axes = _axes(tiff, page)
            pages = _find_frames_behind_one_page(pages, axes)
            files, order = [pages], _arrange(path, len(pages), axes)
            format = "BigTIFF" if tiff.is_bigtiff else "TIFF"
            if tiff.is_stk:
                format = "MetaMorph STK"
            if tiff.is_imagej:
                format = "ImageJ TIFF"
                size = _imagej_pixel_size(page, said) or size
            interval = positive_in(said.get("finterval"), said.get("tunit"), TIMES_S, "s")
    movie = TiffMovie(str(path), format, files, order, np.dtype(dtype))
    movie.pixel_size_um, movie.frame_interval_s = size, interval
    return movie


def _open_described(path: Path, file_name: str, asked: Path | None) -> TiffMovie:
    """Open a part of a movie by the file that describes the whole."""
    described_in = path.parent / file_name
    if asked is not None or not described_in.is_file():
        raise MovieError(
            f"{path}: is a part of a movie that {file_name} describes, which is not "
            "beside it; put all files of the movie in one folder, under their own names"
        )
    return _open(described_in, path)


def _pixel_type(path: Path, page: tifffile.TiffPage) -> np.dtype:
    if page.samplesperpixel > 1:
        raise MovieError(
            f"{path}: has {page.samplesperpixel} samples a pixel (colour); convert it to "
            "one grey-scale movie per channel"
        )
    if page.dtype is None:
        raise MovieError(
            f"{path}: has pixels of an unknown type; convert them to integers or "
            "floating-point numbers"
        )
    if page.ndim != 2:
        raise MovieError(
            f"{path}: has pages of {page.ndim} dimensions; save every frame as a page of "
            "its own"
        )
    return page.dtype


# ---- Channels, and the order of frames ----


def _axes(
    tiff: tifffile.TiffFile, page: tifffile.TiffPage
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """What ImageJ or tifffile say, and the axes of the pages, slowest first."""
    said: dict[str, Any] = {}
    if tiff.is_imagej:
        said = tiff.imagej_metadata or {}
        keys = (("T", "frames"), ("Z", "slices"), ("C", "channels"))
        axes = [(axis, int(said.get(key, 1))) for axis, key in keys]
        images = int(said.get("images", 1))
        return said, axes if math.prod(n for _, n in axes) >= images else [("T", images)]
    if page.description.startswith('{"shape":'):
        said = json.loads(page.description)
        shape = said["shape"]
        names = said.get("axes", "T" * (len(shape) - 2) + "YX")
        if names.endswith("YX") and len(names) == len(shape):
            return said, list(zip(names[:-2], map(int, shape[:-2]), strict=True))
    if tiff.flags & {"stk", "scanimage", "fluoview", "lsm"}:
        series = tiff.series[0]
        if series.axes.endswith("YX"):
            return said, list(zip(series.axes[:-2], series.shape[:-2], strict=True))
    return said, []


def _find_frames_behind_one_page(pages: Pages, axes: list[tuple[str, int]]) -> Pages:
    """ImageJ (above 4 GB) and MetaMorph describe a whole stack in its first page."""
    frames = math.prod(length for _, length in axes)
    if len(pages) > 1 or frames == 1:
        return pages
    place, size = int(pages.places[0]), pages.kind.frame_bytes
    whole = (pages.path.stat().st_size - place) // size if place > 0 else 1
    if whole < frames:
        raise MovieError(
            f"{pages.path}: truncated: its header says {frames} frames, but the file "
            f"ends in frame {whole}"
        )
    return dataclasses.replace(
        pages,
        directories=np.repeat(pages.directories, frames),
        places=place + size * np.arange(frames),
    )


def _arrange(path: Path, pages: int, axes: list[tuple[str, int]]) -> np.ndarray:
    """The numbers of the pages, (frames, channels)."""
    names, lengths = [axis for axis, _ in axes], [length for _, length in axes]
    numbers = np.arange(pages)
    if dict(axes).get("C", 1) == 1:
        if pages < math.prod(lengths):
            raise MovieError(
                f"{path}: truncated: it says {math.prod(lengths)} frames, but has {pages}; "
                "copy it again, or save what there is anew"
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


# ---- Pixel sizes ----


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
    page: tifffile.TiffPage, said: dict[str, Any]
) -> tuple[float, float] | None:
    resolution, unit = _resolution(page)
    # With "um", ImageJ itself takes a resolution per cm as that.
    name = "cm" if unit == 3 else said.get("unit", "pixel")
    y, x = (positive_in(1 / per_unit, str(name), LENGTHS_UM, "") for per_unit in resolution)
    return (y, x) if y and x else None


# ---- Files in a row ----


def open_series(path: Path) -> TiffMovie:
    """The TIFF files of a folder, or those that a pattern (movie_*.tif) matches, as one
    movie: img_2 comes before img_10, and every page is a frame."""
    if path.is_dir():
        # A name that begins with a dot is of what the system keeps about a file.
        visible = (each for each in path.iterdir() if not each.name.startswith("."))
        found = [each for each in visible if each.suffix.lower() in _SUFFIXES]
    else:
        found = [Path(each) for each in glob.glob(str(path))]
    paths = sorted(filter(Path.is_file, found), key=_natural_order)
    if not paths:
        raise MovieError(f"{path}: holds no TIFF file (.tif, .tiff); give those of a movie")
    movie = open_tiff(paths[0])
    if len(paths) == 1 or set(movie.paths) == set(paths):
        return movie
    if len(movie.paths) > 1 or movie.shape[1] > 1:
        raise MovieError(
            f"{path}: {paths[0].name} is a movie of several channels or files by itself; "
            "open it alone"
        )
    kind = find_pages(paths[0]).kind
    files = [_find_part(each, kind) for each in paths]
    order = np.arange(sum(map(len, files)))[:, None]
    format = f"series of {len(files)} TIFF files"
    series = _TiffSeries(str(path), format, files, order, movie.dtype)
    series.pixel_size_um = movie.pixel_size_um
    series.frame_interval_s = movie.frame_interval_s
    return series


class _TiffSeries(TiffMovie):
    """All TIFF files of a folder, or that a pattern matches."""

    def includes(self, path: Path) -> bool:
        asked = Path(self.name).absolute()
        if asked.is_dir():
            return asked.resolve() in path.parents
        return fnmatch.fnmatch(str(path), str(asked)) or super().includes(path)


def _find_part(path: Path, kind: Kind) -> Pages:
    pages = find_pages(path, kind)
    room = path.stat().st_size - int(pages.places[0])
    if len(pages) == 1 and pages.places[0] > 0 and room >= 2 * kind.frame_bytes:
        with tifffile.TiffFile(path) as tiff:
            _, axes = _axes(tiff, tiff.pages.first)
            return _find_frames_behind_one_page(pages, axes)
    return pages


def _natural_order(path: Path) -> list[str | int]:
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


class TiffSink(Sink):
    """A TIFF whose frames lie one after the other; BigTIFF where 4 GB do not hold it.

    OME-TIFF if its name ends in .ome.tif. Otherwise with ImageJ's metadata, or in BigTIFF,
    which ImageJ does not write, tifffile's. The resolution is in pixels per cm.
    """

    _file: BinaryIO | None = None

    def _begin(self) -> None:
        layout = self.layout
        frames, channels, height, width = layout.shape
        size = frames * (layout.frame_bytes + channels * _TIFF_DIRECTORY_BYTES)
        is_big = size > _CLASSIC_TIFF_MAX_BYTES
        is_ome = self._destination.name.lower().endswith((".ome.tif", ".ome.tiff"))
        is_imagej = not (is_ome or is_big) and layout.dtype.str[1:] in ("u1", "u2", "f4")
        metadata = self._ome_metadata() if is_ome else self._imagej_metadata()
        resolution = {}
        if layout.pixel_size_um is not None:
            y, x = layout.pixel_size_um
            resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(
            self.draft, bigtiff=is_big, ome=is_ome, imagej=is_imagej, byteorder="<"
        ) as writer:
            # Without data, it leaves a hole in the file for them.
            writer.write(
                None,
                shape=(frames, *([channels] if channels > 1 else []), height, width),
                dtype=layout.dtype,
                photometric="minisblack",
                metadata={"axes": "TCYX" if channels > 1 else "TYX", **metadata},
                software=False,
                **resolution,
            )
        self._resume()

    def _ome_metadata(self) -> dict[str, Any]:
        layout = self.layout
        said = repr((layout.shape, layout.dtype.str, layout.pixel_size_um))
        # The same movie has the same name wherever and whenever it is written.
        metadata: dict[str, Any] = {
            "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, said)),
            "Creator": "jaxbkgd",
        }
        if layout.pixel_size_um is not None:
            y, x = layout.pixel_size_um
            metadata |= {"PhysicalSizeX": x, "PhysicalSizeXUnit": "\u00b5m"}
            metadata |= {"PhysicalSizeY": y, "PhysicalSizeYUnit": "\u00b5m"}
        if layout.frame_interval_s is not None:
            metadata |= {"TimeIncrement": layout.frame_interval_s}
            metadata |= {"TimeIncrementUnit": "s"}
        return metadata

    def _imagej_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if self.layout.pixel_size_um is not None:
            # With a resolution per cm, ImageJ takes this to be in micrometres.
            metadata["unit"] = "um"
        if self.layout.frame_interval_s is not None:
            metadata["finterval"] = self.layout.frame_interval_s
        return metadata

    def _resume(self) -> None:
        """Open the draft, if it is complete but for its pixels."""
        with open_tiff(self.draft) as movie:
            offset = movie.contiguous_offset()
            if movie.shape != self.layout.shape or movie.dtype != self.layout.dtype:
                offset = None
        if offset is None:
            raise MovieError(
                f"{self.draft}: is not the beginning of this movie; remove it, and start "
                "anew"
            )
        self._offset = offset
        self._lock = threading.Lock()
        self._file = self.draft.open("r+b", buffering=0)

    def _write(self, start: int, frames: np.ndarray) -> None:
        assert self._file is not None
        stored = np.asarray(frames, self.layout.dtype.newbyteorder("<"))
        view = stored.reshape(-1).view(np.uint8).data
        offset = self._offset + start * self.layout.frame_bytes
        while view:
            count = self._write_at(view, offset)
            view, offset = view[count:], offset + count

    def _write_at(self, view: memoryview, offset: int) -> int:
        assert self._file is not None
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), view, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.write(view)

    def _complete(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_replaceable(self) -> bool:
        return self._destination.is_file()

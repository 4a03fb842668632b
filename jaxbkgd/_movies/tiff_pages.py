"""The pages of TIFF files, which are read as they are sliced, or written in any order."""

import contextlib
import itertools
import json
import math
import struct
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Int, Shaped

from .movie import check_pixels, MovieError, named_errors, one_line
from .sinks import Sink


# Offsets in classic TIFF have 32 bits; the margin is for the header.
_CLASSIC_TIFF_MAX_BYTES = 2**32 - 2**16
_TIFF_DIRECTORY_BYTES = 512

# Tags that describe pixels. tifffile describes pages of equal tags once.
_KIND_TAGS = (254, 255, 256, 257, 258, 259, 266, 277, 284, 317, 322, 323, 339)

# A damaged header may say that a tile has more pixels.
_MAX_TILE_PIXELS = 2**28

# What programs that know no axes call channels are frames, if there are more.
MAX_CHANNELS = 8


@dataclass(frozen=True)
class Pages:
    """The pages of a file, of this shape and type (in the byte order of the file).

    Of each page, `directories` has the offset of its directory in the file, and `places`
    that of its pixels, or -1 where they have to be decoded. `axes` are the lengths of the
    axes that the file says, the slowest first, of `said_frames` together.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    directories: Int[np.ndarray, " pages"]
    places: Int[np.ndarray, " pages"]
    axes: dict[str, int]

    def __len__(self) -> int:
        return len(self.directories)

    @property
    def said_frames(self) -> int:
        return math.prod(self.axes.values())


def find_pages(
    path: Path,
    like: Pages | None = None,
    *,
    start: int | None = None,
    is_growing: bool = False,
) -> Pages:
    """The pages of a file, which have to be like others, by default the first. `start` is
    the place of the first directory, and a file that is growing may end in an incomplete
    page, which is left out.

    tifffile stops at a broken directory without an error, and takes all pages to be like
    the first, so the chain of directories is followed here.
    """
    directories, places, used = [], [], 0
    is_plain: dict[tuple[bytes, ...], bool] = {}
    with tifffile.TiffFile(path) as tiff:
        file, first = tiff.filehandle, tiff.pages.first
        if first.samplesperpixel > 1 or first.dtype is None or first.ndim != 2:
            what = f"{first.samplesperpixel} samples a pixel (colour) of {first.dtype}"
            raise MovieError(f"{path}: has {what}; convert it to grey-scale movies")
        dtype = np.dtype(first.dtype).newbyteorder(tiff.byteorder)
        shape, size = first.shape, first.nbytes
        alike = (like.shape, like.dtype.newbyteorder("=")) if like else (shape, first.dtype)
        codes = {struct.pack(f"{tiff.byteorder}H", code) for code in _KIND_TAGS}
        following = first.offset if start is None else start
        while following:
            directory, number = following, len(places)
            try:
                tags, following = _read_directory(tiff, directory)
                kind = tuple(tag for tag in tags if tag[:2] in codes)
                if kind not in is_plain:
                    file.seek(directory)
                    is_plain[kind] = _is_plain(tifffile.TiffPage(tiff, number), alike)
                frame = tifffile.TiffFrame(tiff, number, offset=directory)
                place, length = _find_pixels(frame, size, file.size, is_plain[kind])
            except Exception as error:
                if is_growing:
                    break
                is_cut = isinstance(error, struct.error)
                reason = "is truncated: the file ends" if is_cut else one_line(error)
                raise MovieError(f"{path}: page {number} {reason}") from error
            used += length
            if used > file.size:
                raise MovieError(f"{path}: broken: its pages repeat")
            directories.append(directory)
            places.append(place)
        axes = {} if tiff.is_ome else _read_axes(tiff)
        if len(places) == 1 and places[0] > 0 and start is None:
            # ImageJ (above 4 GB) and MetaMorph describe a whole stack in its first page.
            frames = min(math.prod(axes.values()), (file.size - places[0]) // size)
            places = [places[0] + size * i for i in range(frames)]
            directories *= frames
        return Pages(path, shape, dtype, np.array(directories), np.array(places), axes)


def _read_directory(tiff: tifffile.TiffFile, offset: int) -> tuple[list[bytes], int]:
    """The tags of a page, undecoded, and the offset of the next directory, or 0."""
    file, form = tiff.filehandle, tiff.tiff
    file.seek(offset)
    (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    end = count * form.tagsize
    content = file.read(end + form.offsetsize)
    (following,) = struct.unpack(form.offsetformat, content[end:])
    starts = range(0, end, form.tagsize)
    return [content[start : start + form.tagsize] for start in starts], following


def _find_pixels(
    frame: tifffile.TiffFrame, size: int, file_size: int, is_plain: bool
) -> tuple[int, int]:
    """Where the pixels of a page are, or -1 if they have to be decoded, and how many bytes
    of the file they take. Plain pixels take `size` bytes."""
    offsets, counts = frame.dataoffsets, frame.databytecounts or (size,)
    if is_plain and len(counts) == 1:
        counts = (min(counts[0], size),)
    ends = list(map(int.__add__, offsets, counts))
    length = sum(counts)
    is_there = 0 < len(offsets) == len(counts) and min(*offsets, *counts) > 0
    if not is_there or max(ends) > file_size or (is_plain and length < size):
        raise ValueError("is truncated: its pixels are not all in the file")
    is_array = is_plain and all(map(int.__eq__, ends, offsets[1:]))
    return (offsets[0] if is_array else -1), length


def _is_plain(page: tifffile.TiffPage, alike: tuple[tuple[int, ...], np.dtype]) -> bool:
    """Whether a page, which must have this shape and type, holds its pixels as an array."""
    shape, dtype = alike
    if page.is_reduced and not page.parent.pages.first.is_reduced:
        raise ValueError("is a reduced image of another; save the movie without it")
    if (page.shape, page.dtype) != alike:
        raise ValueError(f"is {page.shape} px of {page.dtype}, not {shape} px of {dtype}")
    if page.tilewidth * page.tilelength > _MAX_TILE_PIXELS:
        raise ValueError(f"has tiles of {page.tilewidth} x {page.tilelength} px")
    is_raw = page.compression == page.predictor == page.fillorder == 1
    return is_raw and dtype.itemsize * 8 == page.bitspersample and not page.is_tiled


def read_metadata(tiff: tifffile.TiffFile) -> dict[str, Any]:
    """What ImageJ or tifffile say in the first page."""
    if tiff.is_imagej:
        return tiff.imagej_metadata or {}
    text = tiff.pages.first.description
    return json.loads(text) if text.startswith("{") and '"shape":' in text else {}


def _read_axes(tiff: tifffile.TiffFile) -> dict[str, int]:
    metadata = read_metadata(tiff)
    names, shape = "", metadata.get("shape", ())
    if tiff.is_imagej:
        counts = [metadata.get(key, 1) for key in ("frames", "slices", "channels")]
        is_whole = math.prod(counts) >= metadata.get("images", 1)
        counts = counts if is_whole else [metadata["images"], 1, 1]
        names, shape = "TZCYX", [*counts, 1, 1]
    elif shape:
        names = metadata.get("axes", "T" * (len(shape) - 2) + "YX")
    elif tiff.is_stk or tiff.is_scanimage or tiff.is_fluoview:
        names, shape = tiff.series[0].axes, tiff.series[0].shape
    is_paged = names.endswith("YX") and len(names) == len(shape)
    return dict(zip(names[:-2], map(int, shape), strict=False)) if is_paged else {}


def clear_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """Raises errors of tifffile, which are of many types on damage, as MovieError."""
    return named_errors(f"{path}: is not a TIFF file, or broken", Exception)


class TiffPixels:
    """Frames (frames, channels, height, width) from the pages of TIFF files.

    Files are open only while they are read. `order` has the page of each frame and channel,
    counted over all files. The value of a pixel is `scale[0] + scale[1] * stored`.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Pages],
        order: Int[np.ndarray, "frames channels"],
        scale: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if order.shape[0] == 1 and order.shape[1] > MAX_CHANNELS:
            what = f"its 1 frame of {order.shape[1]} channels is read as frames"
            warnings.warn(f"{name}: {what}", stacklevel=2)
            order = order.reshape(-1, 1)
        self.scale = scale
        self.dtype = stored = files[0].dtype.newbyteorder("=")
        if scale == (-32768, 1) and stored == np.uint16:
            self.dtype = np.dtype(np.int16)  # ImageJ stores signed pixels so.
        elif scale != (0, 1):
            self.dtype = np.dtype(np.float32 if stored.itemsize < 4 else np.float64)
        self.shape = check_pixels(name, (*order.shape, *files[0].shape), self.dtype)
        self._order = order
        self._paths = [file.path for file in files]
        self._stored = [file.dtype for file in files]
        self._files = [i for i, file in enumerate(files) for _ in range(len(file))]
        self._directories = np.concatenate([file.directories for file in files]).tolist()
        self._places = np.concatenate([file.places for file in files]).tolist()
        for frame in {0, len(order) - 1}:
            for channel in range(order.shape[1]):
                self[frame : frame + 1, channel]

    def __getitem__(
        self, index: tuple[slice, int]
    ) -> Shaped[np.ndarray, "frames height width"]:
        frames, channel = index
        start = frames.indices(len(self._order))[0]
        pages = self._order[frames, channel]
        read = np.empty((len(pages), *self.shape[2:]), self.dtype)
        numbered = enumerate(pages.tolist(), start)
        for file, group in itertools.groupby(numbered, lambda item: self._files[item[1]]):
            self._fill(file, read, dict(group), start)
        if self.scale != (0, 1):
            read *= self.dtype.type(self.scale[1])
            read += self.dtype.type(self.scale[0])
        return read

    def _fill(
        self,
        number: int,
        read: Shaped[np.ndarray, "..."],
        pages: dict[int, int],
        start: int,
    ) -> None:
        """Reads frames from pages of one file. The first of `read` is frame `start`."""
        path, dtype, tiff, frame = self._paths[number], self._stored[number], None, start
        shape = read.shape[1:]
        try:
            with path.open("rb") as file:
                for frame, page in pages.items():
                    if self._places[page] >= 0:
                        file.seek(self._places[page])
                        stored = np.fromfile(file, dtype, math.prod(shape))
                        if stored.size < math.prod(shape):
                            raise ValueError("truncated: the file ends in it")
                    else:
                        tiff = tiff or tifffile.TiffFile(file)
                        tiff.filehandle.seek(self._directories[page])
                        stored = tifffile.TiffPage(tiff, 0).asarray(maxworkers=1)
                    read[frame - start] = stored.reshape(shape)
        except Exception as error:
            what = f"frame {frame} of {self.shape[0]} cannot be read ({one_line(error)})"
            raise MovieError(f"{path}: {what}") from error


class TiffSink(Sink):
    """A TIFF file whose frames follow one another, or a BigTIFF file above 4 GB.

    A name that ends in .ome.tif makes it OME-TIFF. Else it has metadata of ImageJ or, as
    BigTIFF or with frames one pixel wide, of tifffile. What the numbers are is in OME's
    `Description`, or in `Info`, which ImageJ shows.
    """

    # That of the first frame in the draft, and a number that divides it.
    _offset: int
    _align = 16

    def _begin(self) -> None:
        layout = self.layout
        frames, channels, height, width = layout.shape
        size = frames * (layout.frame_bytes + channels * _TIFF_DIRECTORY_BYTES)
        is_big = size > _CLASSIC_TIFF_MAX_BYTES
        is_ome = self._destination.name.lower().endswith((".ome.tif", ".ome.tiff"))
        is_imagej = not (is_ome or is_big) and layout.dtype.str[1:] in ("u1", "u2", "f4")
        shape = (frames, *([channels] if channels > 1 else []), height, width)
        metadata = {"axes": "TCYX" if channels > 1 else "TYX", **self._metadata(is_ome)}
        description, resolution = None, {}
        if width == 1 and not is_ome:
            # tifffile would leave out this axis, and make rows of the frames.
            description = json.dumps({"shape": shape, **metadata})
            is_imagej, metadata = False, None
        if layout.pixel_size_um is not None:
            y, x = layout.pixel_size_um
            resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(
            self.draft, bigtiff=is_big, ome=is_ome, imagej=is_imagej, byteorder="<"
        ) as writer:
            # Without pixels, it leaves a hole in the file for them.
            writer.write(
                None,
                shape=shape,
                dtype=layout.dtype,
                photometric="minisblack",
                description=description,
                metadata=metadata,
                software=False,
                align=self._align,
                **resolution,
            )
        self._resume()

    def _metadata(self, is_ome: bool) -> dict[str, Any]:
        layout, metadata = self.layout, {}
        interval = layout.frame_interval_s
        if not is_ome:
            # With a resolution per cm, ImageJ takes this unit to be micrometres.
            metadata = {"unit": "um"} if layout.pixel_size_um is not None else {}
            metadata |= {"Info": layout.about_lines} if layout.about else {}
            return metadata if interval is None else metadata | {"finterval": interval}
        # The same movie has the same UUID wherever and whenever it is written.
        about = repr((layout.shape, layout.dtype.str, layout.pixel_size_um, layout.about))
        metadata["UUID"] = str(uuid.uuid5(uuid.NAMESPACE_OID, about))
        metadata["Creator"] = "jaxbkgd"
        metadata |= {"Description": layout.about_lines} if layout.about else {}
        for axis, size in zip("YX", layout.pixel_size_um or (), strict=False):
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "\u00b5m"}
        if interval is not None:
            metadata |= {"TimeIncrement": interval, "TimeIncrementUnit": "s"}
        return metadata

    def _resume(self) -> None:
        """Opens the draft if it is complete but for its pixels."""
        frames, channels, *shape = self.layout.shape
        try:
            pages = find_pages(self.draft)
        except (struct.error, tifffile.TiffFileError) as error:
            raise MovieError(f"{self.draft}: is no TIFF file ({error})") from error
        place, size = pages.places[0], self.layout.frame_bytes // channels
        follow = place + size * np.arange(frames * channels)
        is_alike = (pages.shape, pages.dtype) == (tuple(shape), self.layout.dtype)
        if not is_alike or place < 0 or not np.array_equal(pages.places, follow):
            what = "is truncated, or not the beginning of this movie"
            raise MovieError(f"{self.draft}: {what}; remove it, and start over")
        self._offset = int(place)

    def _write(self, start: int, frames: np.ndarray) -> None:
        self._write_at(self._offset + start * self.layout.frame_bytes, frames)

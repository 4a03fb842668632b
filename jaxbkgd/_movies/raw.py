"""Formats whose pixels lie uncompressed in one file: DAX, Picasso, NumPy, SPE and SIF."""

import importlib
import io
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Shaped

from .movie import check_pixels, Movie, MovieError, named_errors
from .planes import WholeFile
from .sinks import draft_of, Layout, Sink


# Picasso's simulations write a line for each molecule. PyYAML reads about 1 MB/s.
_MAX_TEXT_BYTES = 2**22
# A damaged header may say that it is 4 GiB long.
_MAX_NPY_HEADER_BYTES = 2**16

_SIZE = "[1-9][0-9]{0,18}"
_DAX_TYPE = r"16 bit integers \(binary, (big|little) endian\)"
_PICASSO_TYPE = "u?int(8|16|32|64)|float(16|32|64)|[ui][1248]|f[248]"

_SPE_HEADER_BYTES = 4100
# By the number in SPE's header, and by the name in the XML of version 3.
_SPE_TYPES = {0: "<f4", 1: "<i4", 2: "<i2", 3: "<u2", 5: "<f8", 6: "u1", 8: "<u4"}
_SPE_TYPES_3 = {
    "MonochromeUnsigned16": "<u2",
    "MonochromeUnsigned32": "<u4",
    "MonochromeFloating32": "<f4",
}


def open_dax(path: Path, *, is_growing: bool = False) -> Movie:
    """Opens a DAX movie of the Zhuang lab: `NAME.dax`, and `NAME.inf` beside it; `path` is
    either. One that is growing has as many frames as its file holds."""
    header = _Header(path, ".dax", ".inf", _parse_inf)
    size = header.require("frame dimensions", f"{_SIZE} x {_SIZE}", "such as 256 x 256")
    width, height = map(int, size.split(" x "))
    rule = "16 bit integers (binary, big endian), or (binary, little endian)"
    stored = header.require("data type", _DAX_TYPE, rule)
    dtype = np.dtype(">u2" if "big" in stored else "<u2")
    if is_growing:
        frames = header.movie.stat().st_size // (width * height * dtype.itemsize)
        pixels = FileFrames(header.movie, (frames, 1, height, width), dtype, 0)
        movie = Movie(pixels, name=str(header.movie), format="DAX", paths=[header.movie])
    else:
        shape = header.size("number of frames"), 1, height, width
        movie = _open_frames(header.movie, "DAX", shape, dtype, header.name)
    rate_hz = header.number("Frames Per Second")
    movie.frame_interval_s = 1 / rate_hz if rate_hz else None
    return movie


def open_picasso(path: Path) -> Movie:
    """Opens a Picasso movie of the Jungmann lab: `NAME.raw`, and `NAME.yaml` beside it;
    `path` is either."""
    header = _Header(path, ".raw", ".yaml", _parse_yaml)
    frames, height, width = map(header.size, ("Frames", "Height", "Width"))
    dtype = np.dtype(header.require("Data Type", _PICASSO_TYPE, "such as uint16"))
    is_little = header.require("Byte Order", "[<>]", "'<' or '>'") == "<"
    dtype = dtype.newbyteorder("<" if is_little else ">")
    shape = frames, 1, height, width
    movie = _open_frames(header.movie, "Picasso raw", shape, dtype, header.name)
    size_um = (header.number("Pixelsize") or header.number("Camera.Pixelsize") or 0) / 1000
    movie.pixel_size_um = (size_um, size_um) if size_um else None
    return movie


def open_npy(path: Path) -> Movie:
    """Opens an array (frames, height, width) or (frames, channels, height, width) that
    `numpy.save` has written, in C order and without pickles."""
    with path.open("rb") as file:
        start = io.BytesIO(file.read(_MAX_NPY_HEADER_BYTES))
    # NumPy parses the header as a Python literal, which raises errors of many types.
    with named_errors(f"{path}: broken NumPy header", Exception):
        if np.lib.format.read_magic(start) == (1, 0):
            header = np.lib.format.read_array_header_1_0(start)
        else:
            header = np.lib.format.read_array_header_2_0(start)
    shape, is_fortran, dtype = header
    if is_fortran:
        remedy = "save numpy.ascontiguousarray(frames)"
        raise MovieError(f"{path}: is in Fortran order; {remedy}")
    shape = shape if len(shape) != 3 else (shape[0], 1, *shape[1:])
    return _open_frames(path, "NumPy file", shape, dtype, "header", start.tell())


def open_spe(path: Path) -> Movie:
    """Opens an SPE movie of Princeton Instruments: of version 2 (WinView, WinSpec), or of
    version 3 (LightField) with one region of interest."""
    with path.open("rb") as file:
        head = file.read(_SPE_HEADER_BYTES)
    if len(head) < _SPE_HEADER_BYTES:
        raise MovieError(f"{path}: is truncated in its header; copy it again")
    width, kind, height, footer, frames, version = (
        struct.unpack_from(f"<{code}", head, offset)[0]
        for code, offset in zip("HhHQif", (42, 108, 656, 678, 1446, 1992), strict=True)
    )
    if version >= 3:
        with named_errors(f"{path}: is truncated, or its XML is broken", Exception):
            return _open_spe_3(path, footer)
    if kind not in _SPE_TYPES:
        raise MovieError(f"{path}: broken: its header says pixels of type {kind}")
    shape, dtype = (frames, 1, height, width), np.dtype(_SPE_TYPES[kind])
    return _open_frames(path, "SPE 2", shape, dtype, "header", _SPE_HEADER_BYTES)


def _open_spe_3(path: Path, footer: int) -> Movie:
    """Frames with the metadata of each behind it, as the XML at `footer` says."""
    with path.open("rb") as file:
        file.seek(footer)
        root = ElementTree.fromstring(file.read())
    blocks = root.findall("{*}DataFormat/{*}DataBlock")
    regions = root.findall("{*}DataFormat/{*}DataBlock/{*}DataBlock")
    if len(blocks) != 1 or len(regions) != 1 or regions[0].get("count", "1") != "1":
        what = f"{len(regions)} regions of interest in a frame"
        raise MovieError(f"{path}: has {what}; save one region as a movie")
    frame, region = blocks[0], regions[0]
    size = int(region.attrib["height"]), int(region.attrib["width"])
    dtype = np.dtype(_SPE_TYPES_3[frame.attrib["pixelFormat"]])
    shape, stride = (int(frame.attrib["count"]), 1, *size), int(frame.attrib["stride"])
    pixels = FileFrames(path, shape, dtype, _SPE_HEADER_BYTES, stride)
    return Movie(pixels, name=str(path), format="SPE 3", paths=[path])


def open_sif(path: Path) -> Movie:
    """Opens an Andor SIF movie, whose header sif-parser reads."""
    sif_parser = importlib.import_module("sif_parser")

    # Without the end of the file as an error, a truncated header is read for ever.
    file = WholeFile(path)
    # It raises errors of many types.
    with named_errors(f"{path}: is not a SIF file, or broken", Exception):
        try:
            mapped, about = sif_parser.np_open(file, lazy="memmap")
        finally:
            file.close()
    frames, height, width = mapped.shape
    if about["TotalLength"] != mapped.size:
        what = f"{frames} frames of {height} x {width} px and {about['TotalLength']} pixels"
        raise MovieError(f"{path}: broken: its header says {what}; copy it again")
    shape, interval_s = (frames, 1, height, width), about["CycleTime"]
    return Movie(
        FileFrames(path, shape, np.dtype("<f4"), mapped.offset),
        name=str(path),
        format="Andor SIF",
        paths=[path],
        frame_interval_s=interval_s if interval_s > 0 else None,
    )


def _parse_inf(content: bytes) -> dict[str, Any]:
    fields = (line.partition("=") for line in content.decode("latin1").splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _parse_yaml(content: bytes) -> dict[str, Any]:
    import yaml

    class Loader(yaml.CSafeLoader):
        """Makes None of objects of Python, which Picasso may write."""

    Loader.add_multi_constructor("", lambda *_: None)
    return dict(next(yaml.load_all(content, Loader)))


class _Header:
    """The fields of a text file beside a movie, of which `path` is either."""

    def __init__(
        self, path: Path, of_movie: str, of_text: str, parse: Callable[[bytes], Any]
    ) -> None:
        self.movie, text = _file_beside(path, of_movie), _file_beside(path, of_text)
        self.name = text.name
        self._start = f"{self.movie}: its {text.name}"
        if text.stat().st_size > _MAX_TEXT_BYTES:
            raise MovieError(f"{self._start} has more than 4 MiB; shorten it")
        # Also of dates and numbers in YAML that there cannot be.
        with named_errors(f"{self._start} is broken", Exception):
            # A list may hold itself many times, and be too long to write.
            self._fields = {
                name: str(value) if isinstance(value, str | int | float) else "…"
                for name, value in parse(text.read_bytes()).items()
            }

    def require(self, name: str, pattern: str, rule: str) -> str:
        """The text of a field that matches the pattern; `rule` says how to write it."""
        text = self._fields.get(name)
        if text is None:
            raise MovieError(f"{self._start} lacks {name!r}; write {rule}")
        if not re.fullmatch(pattern, text):
            raise MovieError(f"{self._start} says {name!r} is {text[:40]!r}; write {rule}")
        return text

    def size(self, name: str) -> int:
        return int(self.require(name, _SIZE, "a whole number above 0, such as 256"))

    def number(self, name: str) -> float | None:
        """A field that the frames do not depend on: None where it is no sensible number."""
        text = self._fields.get(name, "")
        is_number = re.fullmatch(r"[0-9]+\.?[0-9]*([eE][-+]?[0-9]+)?", text)
        return float(text) if is_number and 1e-6 < float(text) < 1e6 else None


def _file_beside(path: Path, suffix: str) -> Path:
    """The file of the same name with this suffix, in small or capital letters."""
    for beside in (path, path.with_suffix(suffix), path.with_suffix(suffix.upper())):
        if beside.suffix.lower() == suffix and beside.is_file():
            return beside
    name = path.with_suffix(suffix).name
    raise MovieError(f"{path}: its {name} is missing; copy it there too")


def _open_frames(
    path: Path, format: str, shape: tuple, dtype: np.dtype, header: str, offset: int = 0
) -> Movie:
    """Frames that fill the file from `offset` to its end; `header` names what gave their
    shape. Writers write it last, so a file of another size is refused."""
    pixels = FileFrames(path, shape, dtype, offset)
    more = path.stat().st_size - offset - math.prod(shape) * dtype.itemsize
    if more:
        fault = f"has {more} bytes more than its {header} says ({shape[0]} frames)"
        raise MovieError(f"{path}: {fault}; correct the one that is wrong")
    return Movie(pixels, name=str(path), format=format, paths=[path])


class FileFrames:
    """Frames of a file, (frames, channels, height, width), from the byte `offset` on, each
    `stride` bytes behind the one before it, by default without a gap."""

    def __init__(
        self,
        path: Path,
        shape: tuple,
        dtype: np.dtype,
        offset: int,
        stride: int | None = None,
    ) -> None:
        self.shape = check_pixels(str(path), shape, dtype)
        self.dtype = dtype
        self._path = path
        self._offset = offset
        self._frame_bytes = stride or math.prod(shape[1:]) * dtype.itemsize
        # A frame may have metadata behind its pixels.
        pixels: Any = {"names": ["pixels"], "formats": [(dtype, shape[1:])]}
        self._frame = np.dtype(pixels | {"itemsize": self._frame_bytes})
        self._refuse_end_before(shape[0])

    def __getitem__(self, index: tuple[slice, int]) -> Shaped[np.ndarray, "..."]:
        start, stop, _ = index[0].indices(self.shape[0])
        self._refuse_end_before(stop)
        place = self._offset + start * self._frame_bytes
        read = np.fromfile(self._path, self._frame, max(0, stop - start), offset=place)
        return read["pixels"][:, index[1]]

    def _refuse_end_before(self, stop: int) -> None:
        whole = (self._path.stat().st_size - self._offset) // self._frame_bytes
        if whole < stop:
            frames, _, height, width = self.shape
            size = f"{frames} ({height} x {width} px of {self.dtype.name})"
            fault = f"truncated: the file ends in frame {max(0, whole)} of {size}"
            raise MovieError(f"{self._path}: {fault}; copy it again, or correct its header")


class PicassoSink(Sink):
    """Frames of one channel in `NAME.raw`, without a header, and `NAME.yaml` beside it, as
    Picasso writes them."""

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        super().__init__(path, layout, overwrite=overwrite)
        if layout.shape[1] > 1:
            what = f"a Picasso movie has one channel, and this one {layout.shape[1]}"
            raise MovieError(f"{path}: {what}; write a .tif, or each channel by itself")
        self._header = self._destination.with_suffix(".yaml")
        self._bytes = layout.shape[0] * layout.frame_bytes

    def check(self) -> None:
        super().check()
        is_there = os.path.lexists(self._header) and not self._overwrite
        # It may be that of a run that ended before the frames had their name.
        if is_there and self._header.read_bytes() != self._header_text().encode():
            remedy = "overwrite it (overwrite=True, in the command line --overwrite)"
            fault = f"{self._header} exists already; choose another name, or {remedy}"
            raise MovieError(f"{self.path}: its {fault}")

    def _header_text(self) -> str:
        import yaml

        layout = self.layout
        frames, _, height, width = layout.shape
        fields: dict[str, Any] = {
            "Byte Order": "<",
            "Data Type": layout.dtype.name,
            "Frames": frames,
            "Height": height,
            "Width": width,
        }
        if layout.pixel_size_um is not None:
            fields["Pixelsize"] = round(1000 * layout.pixel_size_um[1], 6)
        fields |= {"jaxbkgd": {**layout.about}} if layout.about else {}
        return yaml.safe_dump(fields, sort_keys=False)

    def _begin(self) -> None:
        with self.draft.open("wb") as file:
            file.truncate(self._bytes)

    def _resume(self) -> None:
        if self.draft.stat().st_size != self._bytes:
            what = "is truncated, or not the beginning of this movie"
            raise MovieError(f"{self.draft}: {what}; remove it, and start over")

    def _write(self, start: int, frames: np.ndarray) -> None:
        self._write_at(start * self.layout.frame_bytes, frames)

    def _complete(self) -> None:
        self._resume()
        draft = draft_of(self._header)
        draft.write_bytes(self._header_text().encode())
        draft.replace(self._header)

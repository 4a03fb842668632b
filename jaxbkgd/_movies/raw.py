"""Formats whose pixels lie uncompressed in one file: DAX, Picasso and NumPy."""

import io
import math
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from .movie import check_pixels, Movie, MovieError, one_line


# Picasso's simulations write a line for each molecule. PyYAML reads about 1 MB/s.
_MAX_TEXT_BYTES = 2**22

# A damaged header may say that it is 4 GiB long.
_MAX_NPY_HEADER_BYTES = 2**16

_DAX_TYPES = {
    f"16 bit integers (binary, {name} endian)": f"{order}u2"
    for name, order in (("big", ">"), ("little", "<"))
}
_PICASSO_TYPES = {
    name: np.dtype(short)
    for short in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
    for name in (np.dtype(short).name, short)
}
_SIZE = "[1-9][0-9]{0,18}"
_SIZE_RULE = "a whole number above 0, such as 256"


def open_dax(path: Path) -> Movie:
    """Opens a DAX movie: `NAME.dax`, and `NAME.inf` beside it; `path` is either.

    The .inf has lines `name = value`. Read are `frame dimensions` (width x height, x
    varying fastest, after binning), `number of frames`, `data type` and, where it is there,
    `Frames Per Second`. Writers write the .inf last, so a .dax of another size than the
    .inf says is refused.

    The format is defined by its reader and writer in storm-analysis, and by the .inf that
    HAL of storm-control writes, both of the Zhuang lab.
    """
    dax, inf = _file_beside(path, ".dax"), _file_beside(path, ".inf")
    text = _read_beside(dax, inf).decode("utf-8", "replace")
    lines = (line.partition("=") for line in text.splitlines())
    header = _Header(dax, inf, [(a.strip(), b.strip()) for a, equals, b in lines if equals])
    size = header.require(
        "frame dimensions", f"{_SIZE} x {_SIZE}", "whole numbers above 0, such as 256 x 256"
    )
    width, height = map(int, size.split(" x "))
    frames = int(header.require("number of frames", _SIZE, _SIZE_RULE))
    dtype = np.dtype(_DAX_TYPES[header.require_one_of("data type", _DAX_TYPES)])
    rate_hz = header.number("Frames Per Second")
    movie = _open_frames(dax, "DAX", (frames, 1, height, width), dtype, inf.name)
    movie.frame_interval_s = None if rate_hz is None else 1 / rate_hz
    return movie


def open_picasso(path: Path) -> Movie:
    """Opens a Picasso movie: `NAME.raw`, and `NAME.yaml` beside it; `path` is either.

    Of the first document of the .yaml, `Frames`, `Height`, `Width`, `Data Type`, `Byte
    Order` and, where it is there, `Pixelsize` or `Camera.Pixelsize` in nm are read. No
    object is constructed from it, and its tags are ignored. A .raw of another size than the
    .yaml says is refused.

    The format is defined by `picasso/io.py` of the Jungmann lab.
    """
    raw, yaml = _file_beside(path, ".raw"), _file_beside(path, ".yaml")
    header = _Header(raw, yaml, _yaml_fields(raw, yaml))
    frames, height, width = (
        int(header.require(name, _SIZE, _SIZE_RULE))
        for name in ("Frames", "Height", "Width")
    )
    dtype = _PICASSO_TYPES[header.require_one_of("Data Type", _PICASSO_TYPES)]
    dtype = dtype.newbyteorder(header.require_one_of("Byte Order", ("<", ">")))
    size_nm = header.number("Pixelsize") or header.number("Camera.Pixelsize")
    movie = _open_frames(raw, "Picasso raw", (frames, 1, height, width), dtype, yaml.name)
    movie.pixel_size_um = None if size_nm is None else (size_nm / 1000, size_nm / 1000)
    return movie


def open_npy(path: Path) -> Movie:
    """Opens an array (frames, height, width) or (frames, channels, height, width) that
    `numpy.save` has written, in C order and without pickles, in a file that ends with it.

    The format is defined by `numpy.lib.format`.
    """
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with path.open("rb") as file:
        start = io.BytesIO(file.read(_MAX_NPY_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        # Version 3 is for fields whose names are not ASCII.
        if version not in read_header:
            raise ValueError(f"version {version} is not for plain numbers")
        shape, is_fortran, dtype = read_header[version](start)
        if not all(abs(length) < 2**63 for length in shape):
            raise ValueError("an axis is longer than 2^63")
    # NumPy parses the header as a Python literal, which raises errors of many types.
    except Exception as error:
        raise MovieError(f"{path}: broken NumPy header ({one_line(error)})") from error
    if is_fortran:
        raise MovieError(
            f"{path}: is in Fortran order, where frames are not contiguous; save "
            "numpy.ascontiguousarray(frames)"
        )
    if len(shape) not in (3, 4):
        raise MovieError(
            f"{path}: has {len(shape)} axes; save frames of shape (frames, height, width) "
            "or (frames, channels, height, width)"
        )
    frames, *channels, height, width = map(int, shape)
    shape = frames, channels[0] if channels else 1, height, width
    return _open_frames(path, "NumPy file", shape, dtype, "header", start.tell())


def _open_frames(
    path: Path,
    format: str,
    shape: tuple[int, int, int, int],
    dtype: np.dtype,
    header: str,
    offset: int = 0,
) -> Movie:
    """Frames that fill the file from `offset` to its end; `header` names what gave their
    shape."""
    pixels = _MappedFrames(path, shape, dtype, offset)
    more = path.stat().st_size - offset - math.prod(shape) * dtype.itemsize
    if more:
        frames, _, height, width = shape
        raise MovieError(
            f"{path}: has {more} bytes more than its {header} says ({frames} frames of "
            f"{height} x {width} px of {dtype.name}); correct the one that is wrong"
        )
    return Movie(pixels, name=str(path), format=format, paths=[path])


def _file_beside(path: Path, suffix: str) -> Path:
    """The file of the same name with this suffix, in small or capital letters."""
    if path.suffix.lower() == suffix:
        return path
    for beside in (path.with_suffix(suffix), path.with_suffix(suffix.upper())):
        if beside.is_file():
            return beside
    name = path.with_suffix(suffix).name
    raise MovieError(f"{path}: its {name} is missing; copy it there too")


def _read_beside(movie: Path, path: Path) -> bytes:
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise MovieError(
            f"{movie}: its {path.name} has more than {_MAX_TEXT_BYTES >> 20} MiB; delete "
            "from it what does not describe the frames"
        )
    return path.read_bytes()


def _yaml_fields(movie: Path, path: Path) -> list[tuple[str, str]]:
    """The names and the text of the values at the top of the first document."""
    import yaml

    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    content = _read_beside(movie, path)
    try:
        # The nodes are text. No object is constructed.
        top = next(yaml.compose_all(content, Loader=loader), None)
    except (yaml.YAMLError, RecursionError) as error:
        raise MovieError(
            f"{movie}: its {path.name} is broken: {one_line(error)}"
        ) from error
    if not isinstance(top, yaml.MappingNode):
        raise MovieError(f"{movie}: its {path.name} does not start with 'name: value'")
    return [
        (name.value, value.value if isinstance(value, yaml.ScalarNode) else "…")
        for name, value in top.value
        if isinstance(name, yaml.ScalarNode)
    ]


class _Header:
    """The fields, (name, text), of the file `path` beside a movie."""

    def __init__(self, movie: Path, path: Path, fields: list[tuple[str, str]]) -> None:
        self._start = f"{movie}: its {path.name}"
        self._fields = fields

    def _text(self, name: str) -> str | None:
        values = list(dict.fromkeys(text for field, text in self._fields if field == name))
        if len(values) > 1:
            raise MovieError(
                f"{self._start} says {name!r} is {values[0][:40]!r} and "
                f"{values[1][:40]!r}; delete the wrong one"
            )
        return values[0] if values else None

    def require(self, name: str, pattern: str, rule: str) -> str:
        """The text of a field that matches the pattern; `rule` says how to write it."""
        text = self._text(name)
        if text is None:
            raise MovieError(f"{self._start} lacks {name!r}; write {rule}")
        if not re.fullmatch(pattern, text):
            raise MovieError(f"{self._start} says {name!r} is {text[:40]!r}; write {rule}")
        return text

    def require_one_of(self, name: str, choices: Collection[str]) -> str:
        pattern = "|".join(map(re.escape, choices))
        return self.require(name, pattern, f"one of: {', '.join(choices)}")

    def number(self, name: str) -> float | None:
        """A field that the frames do not depend on: None where it is no sensible number."""
        try:
            value = float(self._text(name) or "nan")
        except ValueError:
            return None
        return value if 1e-6 < value < 1e6 else None


class _MappedFrames:
    """Frames of a file that is mapped into memory, (frames, channels, height, width).

    Each read copies its frames. First the size of the file is compared with the end of
    these frames: to touch a mapped file beyond its end ends the process.

    **Raises:**

    `MovieError` where the file is shorter than the frames, also when they are read.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        dtype: np.dtype,
        offset: int = 0,
    ) -> None:
        self.shape = check_pixels(str(path), shape, dtype)
        self.dtype = dtype
        self._path = path
        self._offset = offset
        self._frame_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._refuse_end_before(shape[0])
        self._frames = np.memmap(path, dtype, "r", offset, self.shape)

    def __getitem__(self, index: tuple[slice, int]) -> np.ndarray:
        self._refuse_end_before(min(index[0].stop, self.shape[0]))
        return np.array(self._frames[index])

    def _refuse_end_before(self, stop: int) -> None:
        whole = (self._path.stat().st_size - self._offset) // self._frame_bytes
        if whole < stop:
            frames, _, height, width = self.shape
            raise MovieError(
                f"{self._path}: truncated: the file ends in frame {max(0, whole)} of "
                f"{frames} ({height} x {width} px of {self.dtype.name}); copy it again, or "
                "correct its header"
            )

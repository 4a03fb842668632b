"""The formats of SMLM tools whose pixels lie in a file as they are: DAX, Picasso, NumPy."""

import io
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from .movie import MappedFrames, Movie, MovieError, one_line


# Of .inf files; real ones have less than 2 kB.
_MAX_INF_BYTES = 2**20

# Picasso's simulations write a line of numbers for each molecule. libyaml reads 150 MB/s,
# PyYAML itself 1 MB/s.
_MAX_YAML_BYTES = 2**24
_MAX_YAML_BYTES_WITHOUT_LIBYAML = 2**20
_MAX_YAML_EVENTS = 50_000
_MAX_YAML_DEPTH = 64

# A header may say that it is 4 GiB long; NumPy believes it, then parses up to 10 kB.
_MAX_NPY_HEADER_BYTES = 2**16

_DAX_PIXELS = {
    f"16 bit integers (binary, {name} endian)": np.dtype(f"{order}u2")
    for name, order in (("big", ">"), ("little", "<"))
}

# NumPy's names of them, long as Picasso writes them, and short.
_PICASSO_PIXELS = {
    name: short
    for short in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
    for name in (np.dtype(short).name, short)
}


def open_dax(path: Path) -> Movie:
    """Opens a DAX movie: `NAME.dax`, and `NAME.inf` beside it; `path` is either.

    The .inf has lines `name = value`. Read are `frame dimensions` (width x height, x
    varying fastest), `number of frames`, `data type` and, where it is there,
    `Frames Per Second`. The dimensions are those of the frames as they are stored, after
    binning. All known writers write the .inf when the movie is complete, so a .dax of any
    other size than the .inf says is refused: one of the two is wrong.

    The format's definition is its reader and writer in storm-analysis, and the .inf that
    HAL of storm-control writes, both of the Zhuang lab.
    """
    dax, inf = _both(path, ".dax", ".inf")
    header = _Header(dax, inf, _inf_fields(dax, inf))
    width, height = header.sizes("frame dimensions", "256 x 256")
    (frames,) = header.sizes("number of frames", "1000")
    stored = _DAX_PIXELS[header.choice("data type", _DAX_PIXELS)]
    rate_hz = header.number("Frames Per Second")
    movie = _open_frames(dax, "DAX", (frames, height, width), stored, said_by=inf.name)
    movie.frame_interval_s = None if rate_hz is None else 1 / rate_hz
    return movie


def open_picasso(path: Path) -> Movie:
    """Opens a Picasso movie: `NAME.raw`, and `NAME.yaml` beside it; `path` is either.

    Of the .yaml, the first document is read: `Frames`, `Height`, `Width`, `Data Type`,
    `Byte Order` and, where it is there, `Pixelsize` or `Camera.Pixelsize` in nm. Nothing
    in it is constructed: tags and aliases are passed over. A .raw of any other size than
    the .yaml says is refused, as with DAX.

    The format's definition is `picasso/io.py` of the Jungmann lab.
    """
    raw, yaml = _both(path, ".raw", ".yaml")
    header = _Header(raw, yaml, _yaml_fields(raw, yaml))
    (frames,) = header.sizes("Frames", "1000")
    (height,) = header.sizes("Height", "256")
    (width,) = header.sizes("Width", "256")
    pixels = _PICASSO_PIXELS[header.choice("Data Type", _PICASSO_PIXELS)]
    stored = np.dtype(header.choice("Byte Order", ("<", ">")) + pixels)
    size_nm = header.number("Pixelsize") or header.number("Camera.Pixelsize")
    shape = frames, height, width
    movie = _open_frames(raw, "Picasso raw", shape, stored, said_by=yaml.name)
    movie.pixel_size_um = None if size_nm is None else (size_nm / 1000, size_nm / 1000)
    return movie


def open_npy(path: Path) -> Movie:
    """Opens an array (frames, height, width) or (frames, channels, height, width) that
    `numpy.save` has written, in C order and without pickles; the file must end with it.

    The format's definition is `numpy.lib.format`.
    """
    shape, stored, offset = _npy_header(path)
    if len(shape) not in (3, 4):
        raise MovieError(
            f"{path}: has {len(shape)} axes; save frames of shape (frames, height, width) "
            "or (frames, channels, height, width)"
        )
    frames, *several, height, width = shape
    channels = several[0] if several else 1
    shape = frames, height, width
    return _open_frames(path, "NumPy file", shape, stored, offset, channels)


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with path.open("rb") as file:
        start = io.BytesIO(file.read(_MAX_NPY_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        # Version 3 is for names of fields, which pixels have not.
        if version not in read:
            raise ValueError(f"version {version} is not for plain numbers")
        shape, is_fortran, stored = read[version](start)
        # Else their digits alone could fill a page.
        if not all(abs(size) < 2**63 for size in shape):
            raise ValueError("an axis is longer than 2^63")
    # The header is a Python literal: a damaged one raises whatever its parser raises.
    except Exception as error:
        raise MovieError(f"{path}: broken NumPy header ({one_line(error)})") from error
    if is_fortran:
        raise MovieError(
            f"{path}: is in Fortran order, where no frame lies in one piece; save "
            "numpy.ascontiguousarray(frames)"
        )
    return tuple(map(int, shape)), stored, start.tell()


def _open_frames(
    path: Path,
    format: str,
    shape: tuple[int, int, int],
    stored: np.dtype,
    offset: int = 0,
    channels: int = 1,
    *,
    said_by: str = "header",
) -> Movie:
    """Frames that fill the rest of the file; `said_by` names what gave their shape."""
    frames, height, width = shape
    pixels = MappedFrames(path, (frames, channels, height, width), stored, offset)
    more = path.stat().st_size - offset - math.prod(pixels.shape) * stored.itemsize
    if more:
        raise MovieError(
            f"{path}: has {more} bytes more than its {said_by} says ({frames} frames "
            f"of {height} x {width} px of {stored.name}); correct the one that is wrong"
        )
    return Movie(pixels, name=str(path), format=format, paths=[path])


def _both(path: Path, *suffixes: str) -> Iterator[Path]:
    """The files of a movie, of which `path` is one: the same name with each suffix."""
    for suffix in suffixes:
        if path.suffix.lower() == suffix:
            yield path
            continue
        wanted = path.with_suffix(suffix)
        found = [p for p in (wanted, path.with_suffix(suffix.upper())) if p.is_file()]
        if not found:
            raise MovieError(f"{path}: its {wanted.name} is missing; copy it there too")
        yield found[0]


def _read_beside(movie: Path, path: Path, max_bytes: int) -> bytes:
    if path.stat().st_size > max_bytes:
        raise MovieError(
            f"{movie}: its {path.name} has more than {max_bytes >> 20} MiB; leave out of "
            "it what does not describe the frames"
        )
    return path.read_bytes()


def _inf_fields(movie: Path, inf: Path) -> list[tuple[str, str]]:
    text = _read_beside(movie, inf, _MAX_INF_BYTES).decode("utf-8", "replace")
    parts = (line.partition("=") for line in text.splitlines())
    return [(name.strip(), value.strip()) for name, equals, value in parts if equals]


def _yaml_fields(movie: Path, path: Path) -> list[tuple[str, str]]:
    """The names at the top of the first document, and the text of their values.

    Events of the parser are all that is looked at: no object is made, no alias followed,
    and what is nested is only skipped, so that a hostile file costs no more than its size.
    """
    import yaml

    content = _read_beside(
        movie,
        path,
        _MAX_YAML_BYTES if yaml.__with_libyaml__ else _MAX_YAML_BYTES_WITHOUT_LIBYAML,
    )
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    nodes: list[yaml.NodeEvent] = []
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(content, Loader=loader)):
            if isinstance(event, yaml.DocumentEndEvent):
                break
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.NodeEvent):
                if depth < 2:
                    nodes.append(event)
                depth += isinstance(event, yaml.CollectionStartEvent)
            if depth > _MAX_YAML_DEPTH or count > _MAX_YAML_EVENTS:
                raise MovieError(
                    f"{movie}: its {path.name} is too complex; leave out of it what does "
                    "not describe the frames"
                )
    except yaml.YAMLError as error:
        raise MovieError(
            f"{movie}: its {path.name} is broken: {one_line(error)}"
        ) from error
    if not (nodes and isinstance(nodes[0], yaml.MappingStartEvent)):
        raise MovieError(f"{movie}: its {path.name} does not start with 'name: value'")
    return [
        (name.value, value.value if isinstance(value, yaml.ScalarEvent) else "…")
        for name, value in zip(nodes[1::2], nodes[2::2], strict=True)
        if isinstance(name, yaml.ScalarEvent)
    ]


class _Header:
    """Fields, as text, that the file `beside` gives of a movie."""

    def __init__(self, movie: Path, beside: Path, fields: list[tuple[str, str]]) -> None:
        self._start = f"{movie}: its {beside.name}"
        self._fields = fields

    def text(self, name: str) -> str | None:
        values = list(dict.fromkeys(v for field, v in self._fields if field == name))
        if len(values) > 1:
            raise MovieError(
                f"{self._start} says {name!r} is {_short(values[0])} and "
                f"{_short(values[1])}; leave the right one"
            )
        return values[0] if values else None

    def _refuse(self, name: str, value: str | None, rule: str) -> NoReturn:
        said = f"lacks {name!r}" if value is None else f"says {name!r} is {_short(value)}"
        raise MovieError(f"{self._start} {said}; write {rule}")

    def choice(self, name: str, choices: Collection[str]) -> str:
        value = self.text(name)
        if value is None or value not in choices:
            self._refuse(name, value, f"one of: {', '.join(choices)}")
        return value

    def sizes(self, name: str, example: str) -> list[int]:
        """As many whole numbers above zero as the example has, with an x between."""
        value = self.text(name)
        one = "[1-9][0-9]{0,18}"
        if value is None or not re.fullmatch(re.sub("[0-9]+", one, example), value):
            self._refuse(name, value, f"whole numbers above 0, such as {example}")
        return [int(size) for size in value.split(" x ")]

    def number(self, name: str) -> float | None:
        """Of what frames can be read without: nothing, where it is no sensible number."""
        try:
            value = float(self.text(name) or "nan")
        except ValueError:
            return None
        return value if 1e-6 < value < 1e6 else None


def _short(value: str) -> str:
    return repr(value if len(value) <= 40 else f"{value[:40]}…")

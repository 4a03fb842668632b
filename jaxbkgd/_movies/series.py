"""Movies in many TIFF files, whose names are those of their frames and channels."""

import contextlib
import fnmatch
import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .movie import Movie, MovieError
from .tiff import find_index, open_ndtiff, open_tiff
from .tiff_pages import clear_errors, find_pages, Pages, TiffPixels


_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".stk")

# Words before a number. A single letter that begins the names is their own.
_POSITIONS = {"pos", "position", "xy", "stage", "site", "fov", "field", "well", "scene"}
_POSITIONS |= {"tile", "roi", "point", "row", "col", "column", "series", "p", "s"}
_CHANNELS = {"c", "ch", "chan", "channel", "w", "wave", "wavelength", "color", "colour"}
_CHANNELS |= {"cy"}

# A number, and a number that is not a part of a word, as in Cy5.
_NUMBERS = (r"(\d+)", r"(?<![a-z\d])(\d+)")


def open_series(path: Path) -> Movie:
    """The TIFF files of a folder, or those that a pattern matches, as one movie. NDTiff is
    read by its index.

    **Raises:**

    [`jaxbkgd.MovieError`][] for files that are missing, and for names that are not those of
    frames and channels.
    """
    index = find_index(path) if path.is_dir() else None
    if index is not None:
        return open_ndtiff(index)
    paths = _find_files(path)
    first = min(paths, key=lambda file: (len(_stem(file.name)), file.name))
    movie = open_tiff(first, is_part=len(paths) > 1)
    if set(movie.paths) >= set(paths):
        return movie
    if len(movie.paths) > 1 or movie.shape[1] > 1:
        what = f"{first.name} has several channels or files by itself"
        raise MovieError(f"{path}: {what}; open it alone")
    rows = _arrange_names(str(path), [file.name for file in paths])
    if movie.format == "OME-TIFF" and movie.shape[0] > 1:
        warnings.warn(
            f"{path}: its files are movies by themselves, read one after another; "
            "if they are positions, open each alone",
            stacklevel=2,
        )
    parts: list[Pages] = []
    for name in itertools.chain(*rows):
        with clear_errors(first.with_name(name)):
            parts.append(find_pages(first.with_name(name), parts[0] if parts else None))
    total = sum(map(len, parts))
    for part in parts:
        # A part may say how many frames all parts have together.
        if part.said_frames > len(part) and part.said_frames != total:
            what = f"{part.said_frames} frames, but all files of {path} have {total}"
            raise MovieError(f"{part.path}: truncated: it says {what}; copy them again")
    numbers = np.split(np.arange(total), np.cumsum(list(map(len, parts)))[:-1])
    columns = [np.concatenate(numbers[i :: len(rows[0])]) for i in range(len(rows[0]))]
    if len({len(column) for column in columns}) > 1:
        what = ", ".join(str(len(column)) for column in columns)
        raise MovieError(f"{path}: its channels have {what} frames; open each by a pattern")
    return _Series(
        TiffPixels(str(path), parts, np.stack(columns, axis=1), movie.pixels.scale),
        name=str(path),
        format=f"series of {len(paths)} TIFF files",
        paths=paths,
        pixel_size_um=movie.pixel_size_um,
        frame_interval_s=movie.frame_interval_s,
    )


class _Series(Movie):
    def includes(self, path: Path) -> bool:
        folder, pattern = _split(Path(self.name))
        is_beside = folder.resolve() == path.parent and fnmatch.fnmatch(path.name, pattern)
        return is_beside or super().includes(path)


def _split(path: Path) -> tuple[Path, str]:
    return (path, "*") if path.is_dir() else (path.parent, path.name)


def _find_files(path: Path) -> list[Path]:
    """The files in a folder, or those that the last part of a path matches."""
    folder, pattern = _split(path)
    names = [
        name
        for name in sorted(os.listdir(folder))
        if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
    ]
    # Brackets may be a part of the name.
    for each in (pattern, pattern.replace("[", "[[]")):
        found = fnmatch.filter(names, each)
        if found:
            return [folder / name for name in found]
    where = ", ".join(sorted({each.parent.name for each in folder.glob("*/*.tif*")})[:4])
    remedy = f"open one of its folders ({where})" if where else "give those of a movie"
    raise MovieError(f"{path}: holds no TIFF file (.tif, .tiff); {remedy}")


def _arrange_names(source: str, names: Sequence[str]) -> list[list[str]]:
    """The names of the files of `source` in rows of a frame, or of consecutive frames, with
    a file for each channel. `img_2` comes before `img_10`."""
    first = min(names, key=lambda name: (len(_stem(name)), name))
    others = [name for name in names if name != first]
    # As movie_X2, movie-1, movie (3), movie@0001 and movie_part2 behind movie.
    behind = re.escape(_stem(first)) + r"(?!(?<=\d)\d)[\W_]*([a-z]*)[\W_]*\d+[)\]]?"
    found = [re.fullmatch(behind, _stem(name)) for name in others]
    words = {match[1] if match else "" for match in found}
    try:
        if all(found) and len(words) == 1 and not words & (_POSITIONS | _CHANNELS):
            return [[first], *_order(source, others)]
        return _order(source, names)
    except ValueError as error:
        raise MovieError(f"{source}: {error}; open {_fewer(names)}") from error


def _stem(name: str) -> str:
    """A name in small letters without the suffixes of TIFF and OME-TIFF."""
    return re.sub(r"(\.ome)?\.[^.]*$", "", name.lower())


def _order(source: str, names: Sequence[str]) -> list[list[str]]:
    two = f"({names[0]}, {names[-1]})"
    for number in _NUMBERS:
        split = [re.split(number, _stem(name)) for name in names]
        if len({len(parts) for parts in split}) == 1:
            break
    else:
        raise ValueError(f"its files have names of different kinds {two}")
    columns = list(zip(*split, strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    labels = {i: _label(split[0], i) for i in varying if i % 2}
    for i, label in labels.items():
        if label in _POSITIONS:
            count = len(set(columns[i]))
            raise ValueError(f"holds {count} positions ({label}), which are no frames")
    if not labels and len(names) > 1:
        raise ValueError(f"its files differ in a word, not in a number {two}")
    times = [i for i in labels if labels[i] not in _CHANNELS]
    channels = [i for i in varying if i not in times]
    places: dict[tuple, str] = {}
    for name, parts in zip(names, split, strict=True):
        values = [int(part) if i % 2 else part for i, part in enumerate(parts)]
        place = tuple(tuple(values[i] for i in group) for group in (times, channels))
        if places.setdefault(place, name) != name:
            raise ValueError(f"has two files of one number ({places[place]}, {name})")
    moments, colours = (sorted(set(group)) for group in zip(*places, strict=True))
    # Several numbers may count the same frames, as a time stamp does.
    if any(list(column) != sorted(column) for column in zip(*moments, strict=True)):
        raise ValueError(f"its files differ in more than one number {two}")
    if len(colours) > 8:
        raise ValueError(f"its files differ in {len(colours)} channels {two}")
    missing = len(moments) * len(colours) - len(places)
    if missing:
        raise ValueError(f"lacks {missing} files of its frames and channels")
    rows = [[places[moment, colour] for colour in colours] for moment in moments]
    steps = np.diff([moment[0] for moment in moments]) if len(times) == 1 else np.zeros(1)
    jumps = np.flatnonzero(steps != np.median(steps)) if len(steps) else steps
    if 0 < 2 * len(jumps) < len(steps):
        before, after = rows[jumps[0]][0], rows[jumps[0] + 1][0]
        warnings.warn(
            f"{source}: {after} follows {before}; frames between them may be missing",
            stacklevel=4,
        )
    return rows


def _label(parts: Sequence[str], number: int) -> str:
    """The last word before a number."""
    # Micro-Manager numbers the positions of a grid as 1-Pos_000_001.
    if parts[number - 1] == "_" and parts[max(0, number - 3)].endswith(("-pos_", "-pos")):
        return "pos"
    words = re.findall(r"([a-z]+)[\W_]*$", parts[number - 1])
    is_name = number == 1 and re.fullmatch(r"[ps][\W_]*", parts[0])
    return "" if not words or is_name else words[0]


def _fewer(names: Sequence[str]) -> str:
    """The pattern of the longest movie among the files, or the name of a file."""
    patterns = {}
    for name in (names[0], names[-1]):
        parts = re.split(r"(\d+)", name)
        for index in range(len(parts) - 2, 0, -2):
            pattern = "".join([*parts[:index], "*", *parts[index + 1 :]])
            matched = fnmatch.filter(names, pattern)
            if 1 < len(matched) < len(names):
                with contextlib.suppress(ValueError):
                    _order("", matched)
                    patterns.setdefault(pattern, len(matched))
    if patterns:
        return f"some of them by a pattern, as {max(patterns, key=patterns.__getitem__)}"
    return f"a file alone, as {names[0]}"

"""Movies of one channel in many TIFF files, whose names have the numbers of frames."""

import contextlib
import fnmatch
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

# Words before a number, or behind it.
POSITIONS = {"pos", "position", "xy", "stage", "site", "fov", "field", "fld", "well", "m"}
POSITIONS |= {"tile", "roi", "point", "row", "col", "column", "series", "p", "s", "r"}
POSITIONS |= {"scene", "mosaic", "region", "location"}
_CHANNELS = {"c", "ch", "chan", "channel", "w", "wave", "wavelength", "color", "colour"}
_CHANNELS |= {"cy", "nm", "laser", "filter", "ex", "em", "excitation", "emission"}
_CHANNELS |= {"cam", "camera"}
# With a number of four digits or more, these count frames.
_VAGUE = {"m", "r", "ex", "em", "cam", "camera"}
_PARTS = {"t", "time", "frame", "z", "part", "file", "x", "of"}
_OTHERS = {"dark", "background", "bkgd"}
_WELL = re.compile(r"(?<=[\W_])[A-P]\d\d(?![A-Za-z\d])|^[A-P]\d\d(?=[-_ ])")


def open_series(path: Path) -> Movie:
    """The TIFF files of a folder, or those that a pattern matches, as one movie. NDTiff is
    read by its index."""
    index = find_index(path) if path.is_dir() else None
    if index is not None:
        return open_ndtiff(index)
    paths = find_files(path)
    first = min(paths, key=lambda file: (len(_stem(file.name)), file.name))
    movie = open_tiff(first, is_part=len(paths) > 1)
    if set(movie.paths) >= set(paths):
        return movie
    if len(movie.paths) > 1 or movie.shape[1] > 1:
        what = f"{first.name} has several channels or files by itself"
        raise MovieError(f"{path}: {what}; open it alone")
    names = arrange_names(str(path), [file.name for file in paths])
    parts: list[Pages] = []
    for name in names:
        with clear_errors(first.with_name(name)):
            parts.append(find_pages(first.with_name(name), parts[0] if parts else None))
    total = sum(map(len, parts))
    for part in parts:
        # A part may say how many frames all parts have together.
        if part.said_frames > len(part) and part.said_frames != total:
            what = f"{part.said_frames} frames, but all files of {path} have {total}"
            raise MovieError(f"{part.path}: truncated: it says {what}; copy them again")
    if total > len(parts):
        _warn_of_movies(path, names, parts, is_ome=movie.format == "OME-TIFF")
    return _Series(
        TiffPixels(str(path), parts, np.arange(total)[:, None], movie.pixels.scale),
        name=str(path),
        format=f"series of {len(paths)} TIFF files",
        paths=paths,
        pixel_size_um=movie.pixel_size_um,
        frame_interval_s=movie.frame_interval_s,
    )


def _warn_of_movies(
    path: Path, names: Sequence[str], parts: Sequence[Pages], *, is_ome: bool
) -> None:
    """Says which files are joined if neither they nor their names say that they are parts
    of one movie."""
    total = sum(map(len, parts))
    is_told = all(part.said_frames == total for part in parts) or _are_parts(names)
    if is_ome or not is_told:
        listed = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
        what = f"{listed} are read one after another, as one movie"
        remedy = f"if they are several, open each alone, as {names[0]}"
        warnings.warn(f"{path}: {what}; {remedy}", stacklevel=3)


class _Series(Movie):
    def includes(self, path: Path) -> bool:
        return is_in_series(Path(self.name), path) or super().includes(path)


def is_in_series(series: Path, path: Path) -> bool:
    """Whether a real path is in a folder, or matches a pattern."""
    folder, pattern = _split(series)
    return folder.resolve() == path.parent and fnmatch.fnmatch(path.name, pattern)


def _split(path: Path) -> tuple[Path, str]:
    return (path, "*") if path.is_dir() else (path.parent, path.name)


def find_files(path: Path) -> list[Path]:
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
    if path.suffix.lower() == ".zarr" and path.is_dir():
        what = "is no Zarr, as it holds no zarr.json, .zarray or .zgroup"
        raise MovieError(f"{path}: {what}; copy it again")
    where = ", ".join(sorted({each.parent.name for each in folder.glob("*/*.tif*")})[:4])
    remedy = f"open one of its folders ({where})" if where else "give those of a movie"
    raise MovieError(f"{path}: holds no TIFF file (.tif, .tiff); {remedy}")


def arrange_names(source: str, names: Sequence[str]) -> list[str]:
    """The names of the files of `source` by their number: `img_2` before `img_10`."""
    first, others = _split_first(names)
    try:
        ordered, steps = _order(others)
    except ValueError as error:
        raise MovieError(f"{source}: {error}; open {_fewer(names)}") from error
    if first:
        # Those behind a file without number count from 1 or 2.
        number = int(re.findall(r"\d+", _stem(ordered[0]))[-1])
        steps = np.array([1, max(1, number - 1), *steps.ravel()])[:, None]
    # Where several numbers count the frames, each of them jumps.
    is_jump = (steps > 1.5 * steps.min(axis=0, initial=2**62)).all(axis=1)
    ordered = [*first, *ordered]
    for number in np.flatnonzero(is_jump)[:1] - len(first):
        what = f"{ordered[number + 1]} follows {ordered[number]}"
        rule = "frames between them may be missing"
        warnings.warn(f"{source}: {what}; {rule}", stacklevel=3)
    return ordered


def _split_first(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The file without a number that all others continue, if there is one, and these: as
    movie_X2, movie-1, movie (3), movie@0001 and movie_part2 continue movie."""
    first = min(names, key=lambda name: (len(_stem(name)), name))
    others = [name for name in names if name != first]
    behind = re.escape(_stem(first)) + r"(?!(?<=\d)\d)[\W_]*([a-z]*)[\W_]*\d+[)\]]?"
    found = [re.fullmatch(behind, _stem(name)) for name in others]
    words = {match[1] if match else "" for match in found}
    is_first = all(found) and len(words) == 1
    if is_first and not words & (POSITIONS | _CHANNELS | _OTHERS):
        return [first], others
    return [], [*names]


def _are_parts(names: Sequence[str]) -> bool:
    """Whether the names say that the files are parts of one movie."""
    first, others = _split_first(names)
    start = len(_stem(first[0])) if first else 0
    split = [re.split(r"(\d+)", _stem(name)[start:]) for name in others]
    varying = [i for i, column in enumerate(zip(*split, strict=True)) if len({*column}) > 1]
    words = {_label(split[0], i) for i in ([1] if first else varying)}
    return not words.isdisjoint(_PARTS | {""} if first else _PARTS)


def _stem(name: str) -> str:
    """A name in small letters without the suffixes of TIFF and OME-TIFF."""
    return re.sub(r"(\.ome)?\.[^.]*$", "", name.lower())


def _order(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The names by their numbers, and the steps between these, (files - 1, numbers)."""
    two = f"({names[0]}, {names[-1]})"
    split = [re.split(r"(\d+)", _stem(name)) for name in names]
    if len({len(parts) for parts in split}) > 1:
        raise ValueError(f"its files have names of different kinds {two}")
    varying = []
    for i, column in enumerate(zip(*split, strict=True)):
        label, count = _label(split[0], i), len(set(column))
        if count > 1 and label in POSITIONS | _CHANNELS:
            kind = "positions" if label in POSITIONS else "channels"
            raise ValueError(f"holds {count} {kind} ({label}), which are no frames")
        if count > 1 and i % 2 == 0:
            raise ValueError(f"its files differ in a word, not in a number {two}")
        varying += [i] * (count > 1)
    wells = sorted({" ".join(_WELL.findall(name)) for name in names})
    if len(wells) > 1:
        what = f"{len(wells)} positions ({wells[0]}, {wells[1]})"
        raise ValueError(f"holds {what}, which are no frames")
    numbers = {n: [int(s[i]) for i in varying] for n, s in zip(names, split, strict=True)}
    ordered = sorted(names, key=numbers.__getitem__)
    steps = np.diff([numbers[name] for name in ordered], axis=0)
    if len(steps) and not steps.any(axis=1).all():
        same = int(np.argmin(steps.any(axis=1)))
        pair = ", ".join(ordered[same : same + 2])
        raise ValueError(f"has two files of one number ({pair})")
    # Several numbers may count the same frames, as a time stamp does.
    if (steps < 0).any():
        raise ValueError(f"its files differ in more than one number {two}")
    return ordered, steps


def _label(parts: Sequence[str], number: int) -> str:
    """The last word before a number, or its unit. A letter that begins the names is their
    own."""
    if number % 2 == 0:
        return ""
    unit = re.match(r"[\W_]*(nm|of)(?![a-z])", parts[number + 1])
    if unit:
        return unit[1]
    # Elsewhere f may count frames, but Opera names a field r01c01f02.
    if number > 1 and parts[number - 1] == "f":
        return "field"
    # Micro-Manager numbers the positions of a grid as 1-Pos_000_001.
    if parts[number - 1] == "_" and parts[max(0, number - 3)].endswith(("-pos_", "-pos")):
        return "pos"
    words = re.findall(r"([a-z]+)[\W_]*$", parts[number - 1])
    # As in 488nm_1, where nm belongs to the number before.
    is_unit = words == ["nm"]
    is_name = number == 1 and re.fullmatch(r"[mprs][\W_]*", parts[0]) and parts[2] != "c"
    is_frame = len(parts[number]) > 3 and not _VAGUE.isdisjoint(words)
    return "" if not words or is_unit or is_name or is_frame else words[0]


def _fewer(names: Sequence[str]) -> str:
    """The pattern of the longest movie among the files, or the name of a file."""
    found = (1, f"a file alone, as {names[0]}")
    for name in (names[0], names[-1]):
        parts = re.split(r"(\d+)", name)
        for index in range(len(parts) - 2, 0, -2):
            pattern = "".join([*parts[:index], "*", *parts[index + 1 :]])
            matched = fnmatch.filter(names, pattern)
            if found[0] < len(matched) < len(names):
                with contextlib.suppress(ValueError):
                    _order(matched)
                    found = len(matched), f"some of them by a pattern, as {pattern}"
    return found[1]

"""Movies in many TIFF files: the files of a folder, or those that a pattern matches."""

import fnmatch
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Int

from .file_names import arrange_names, stem
from .movie import Movie, MovieError
from .ndtiff import find_index, open_ndtiff
from .tiff import find_frames_behind_one_page, open_tiff, read_axes
from .tiff_pages import find_pages, Kinds, Pages
from .tiff_pixels import TiffPixels


_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".stk", ".lsm")


def open_series(path: Path) -> Movie:
    """The TIFF files of a folder, or those that a pattern matches, as one movie.

    Files follow their numbers, `img_2` before `img_10`, and a file without a number is the
    first. Files that also differ in a channel, as `c0` or `DAPI`, are split into channels.
    A folder of NDTiff is read by its index.

    **Raises:**

    [`jaxbkgd.MovieError`][] for several positions and for files that differ in anything
    else, with a pattern that matches fewer, and for files that are missing.
    """
    index = find_index(path) if path.is_dir() else None
    if index is not None:
        return open_ndtiff(index)
    paths = _find_files(path)
    first = min(paths, key=lambda file: (len(stem(file.name)), file.name))
    movie = open_tiff(first, is_part=len(paths) > 1)
    if set(movie.paths) >= set(paths):
        return movie
    if len(movie.paths) > 1 or movie.shape[1] > 1:
        raise MovieError(
            f"{path}: {first.name} is a movie of several channels or files by itself; open "
            "it alone"
        )
    rows = arrange_names(str(path), [file.name for file in paths])
    if movie.format == "OME-TIFF" and movie.shape[0] > 1:
        warnings.warn(
            f"{path}: its {len(paths)} files say that they are movies by themselves, and "
            "are read one after the other; if they are positions, open each alone",
            stacklevel=2,
        )
    folder = paths[0].parent
    parts = _find_parts(path, [folder / name for name in itertools.chain(*rows)])
    starts = np.cumsum([0, *map(len, parts.values())])
    pages = {
        file.name: start + np.arange(len(part))
        for (file, part), start in zip(parts.items(), starts, strict=False)
    }
    columns = [np.concatenate([pages[name] for name in c]) for c in zip(*rows, strict=True)]
    if len({len(column) for column in columns}) > 1:
        raise MovieError(
            f"{path}: its channels have {', '.join(str(len(c)) for c in columns)} frames; "
            "copy it again, or open a channel alone by a pattern"
        )
    order: Int[np.ndarray, "frames channels"] = np.stack(columns, axis=1)
    pixels = movie.pixels
    return _Series(
        TiffPixels(str(path), list(parts.values()), order, pixels.page_dtype, pixels.scale),
        name=str(path),
        format=f"series of {len(paths)} TIFF files",
        paths=paths,
        pixel_size_um=movie.pixel_size_um,
        frame_interval_s=movie.frame_interval_s,
    )


class _Series(Movie):
    """All TIFF files of a folder, or those that a pattern matches."""

    def includes(self, path: Path) -> bool:
        asked = Path(self.name).absolute()
        if asked.is_dir():
            return asked.resolve() in path.parents or super().includes(path)
        is_beside = asked.parent.resolve() == path.parent
        return (is_beside and fnmatch.fnmatch(path.name, asked.name)) or super().includes(
            path
        )


def _find_files(path: Path) -> list[Path]:
    """The files in a folder, or those that the last part of a path matches."""
    folder, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir():
        raise MovieError(f"{path}: there is no folder {folder}; only a name has patterns")
    # A name that begins with a dot belongs to the system.
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    names = [
        entry.name
        for entry in visible
        if entry.name.lower().endswith(_SUFFIXES) and entry.is_file()
    ]
    # Brackets may be a part of the name.
    for each in (pattern, pattern.replace("[", "[[]")):
        found = fnmatch.filter(names, each)
        if found:
            return [folder / name for name in sorted(found)]
    folders = [folder / entry.name for entry in visible if entry.is_dir()]
    where = ", ".join(sorted(each.name for each in folders if any(each.glob("*.tif*")))[:4])
    raise MovieError(
        f"{path}: holds no TIFF file (.tif, .tiff); "
        + (f"open one of its folders ({where})" if where else "give those of a movie")
    )


def _find_parts(path: Path, files: Sequence[Path]) -> dict[Path, Pages]:
    """The pages of files. A part may say how many frames all parts have together."""
    kinds: Kinds = {}
    parts, totals = {}, {}
    for file in files:
        part = find_pages(file, kinds)
        room = part.file_bytes - int(part.places[0])
        is_whole_stack = part.places[0] > 0 and room >= 2 * part.kind.frame_bytes
        if len(part) > 1 or is_whole_stack:
            with tifffile.TiffFile(file) as tiff:
                _, axes = read_axes(tiff)
            part = find_frames_behind_one_page(part, axes, is_part=True)
            total = int(np.prod([length for _, length in axes], dtype=object))
            if total > len(part):
                totals[file] = total
        parts[file] = part
    frames = sum(map(len, parts.values()))
    for file, total in totals.items():
        if total != frames:
            raise MovieError(
                f"{file}: truncated: it says {total} frames, but has {len(parts[file])}, "
                f"and all {len(files)} files of {path} have {frames}; copy them again"
            )
    return parts

"""The names of results beside their movie."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._movies.movie import Box, MovieError
from .._movies.sinks import is_zarr
from .compute import Quantity


_SUFFIX = re.compile(r"(\.ome)?\.[^.]+$", re.IGNORECASE)


def paths_beside(
    source: Any, quantity: Quantity, boxes: Sequence[Box] | None = None
) -> list[Path]:
    """A name beside each movie, as `movie-background.tif` for `movie.ome.tif`; with a
    number for each of several boxes."""
    sources = list(source) if isinstance(source, list | tuple) else [source]
    paths = [_path_beside(entry, quantity) for entry in sources]
    if boxes is None or len(boxes) == 1:
        return paths
    return number_paths(paths[0], len(boxes))


def _path_beside(source: Any, quantity: Quantity) -> Path:
    is_path = isinstance(source, str | os.PathLike)
    if not is_path or "://" in str(source):
        name = source if is_path else f"a source of type {type(source).__name__}"
        remedy = "give a sink, as 'background.tif' or a NumPy array"
        raise MovieError(f"{name}: a result has a name beside a file only; {remedy}")
    path = (
        Path(os.path.abspath(source)) if Path(source).name in ("", "..") else Path(source)
    )
    number = ""
    if path.parent.is_file():
        # One of several images of a file.
        path, number = path.parent, f"-{path.name}"
    is_folder = path.is_dir() and not is_zarr(path)
    stem = path.name if is_folder else without_suffix(path).name
    if not path.exists():
        # Of a pattern, what comes before the first wildcard.
        stem, *wildcards = re.split(r"[*?[]", stem)
        stem = stem.rstrip("-_. ") if wildcards else stem
    stem = f"{stem or path.absolute().parent.name}{number}"
    return path.with_name(f"{stem}-{quantity}.tif")


def without_suffix(path: Path) -> Path:
    """`movie` for `movie.ome.tif`."""
    return path.with_name(_SUFFIX.sub("", path.name) or path.name)


def number_paths(path: Path, count: int) -> list[Path]:
    """A name for each of several channels, as bkgd-1.ome.tif for bkgd.ome.tif."""
    if count == 1:
        return [path]
    stem = without_suffix(path).name
    suffix = path.name.removeprefix(stem)
    return [path.with_name(f"{stem}-{number}{suffix}") for number in range(1, count + 1)]

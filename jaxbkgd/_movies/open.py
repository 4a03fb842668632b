"""Which reader or writer a path has: the only file that knows all formats."""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .movie import Box, Channel, Movie, movie_of_array, MovieError, named_errors, one_line
from .raw import open_dax, open_npy, open_picasso, open_sif, open_spe, PicassoSink
from .sinks import ArraySink, is_zarr, Layout, Sink
from .vendor import open_bioio, open_vendor


FORMATS = (
    "TIFF (.tif, .tiff), a folder or pattern of them (movie_*.tif), Zarr (.zarr, a .zip of "
    "it, or a URL), DAX (.dax with .inf), Picasso (.raw with .yaml), NumPy (.npy), ND2, "
    "CZI, LIF, SIF, SPE, IMS and LSM, and what bioio reads where it is installed"
)

_TIFF = (".tif", ".tiff", ".btf", ".tf8", ".stk")
# Their files hold one image.
_ALONE = (*_TIFF, ".index", ".dax", ".inf", ".raw", ".yaml", ".npy", ".spe", ".sif", ".zip")

# What has an extra of its own; all others are in `movies`.
_EXTRAS = {suffix: suffix[1:] for suffix in (".nd2", ".czi", ".lif", ".sif", ".ims")}


def open_movie(source: Any) -> Movie:
    """Opens a movie that is read as it is sliced.

    **Arguments:**

    - `source`: a path (see the page on formats), which may end in the number of one of
        several images in a file (`movie.lif/2`). It may also be the URL of a Zarr
        (`https://`, `s3://`), or an array of NumPy, JAX, dask or Zarr. Arrays are (frames,
        height, width) or (frames, channels, height, width), of integers, booleans, or
        floats of at most 64 bits. A [`jaxbkgd.Movie`][] is returned as it is.

    **Raises:**

    [`jaxbkgd.MovieError`][], a `ValueError`, if it is missing, broken, or of no format that
    is read.

    !!! example

        ```python
        >>> import jaxbkgd
        >>> import numpy as np
        >>> with jaxbkgd.open_movie(np.zeros((20, 8, 8), np.uint16)) as movie:
        ...     movie.shape, movie.channels[0][10:14].shape
        ((20, 1, 8, 8), (4, 8, 8))

        ```
    """
    if isinstance(source, Movie):
        return source
    if not isinstance(source, str | os.PathLike):
        return movie_of_array(source)
    path, position = _split_position(Path(source))
    extra = _EXTRAS.get(path.suffix.lower(), "movies")
    with _named_packages(source, extra), named_errors(f"{source}: cannot be read"):
        is_url = re.match("[A-Za-z][A-Za-z0-9+.-]+://", str(source)) is not None
        if is_url or is_zarr(path) or (path.suffix.lower() == ".zip" and path.is_file()):
            from .zarr import open_zarr

            return open_zarr(str(source) if is_url else path)
        if path.is_dir() or (re.search(r"[*?[]", path.name) and not path.exists()):
            from .series import open_series

            return open_series(path)
        if not path.exists():
            raise MovieError(f"{path}: no such file")
        if not path.is_file() or path.stat().st_size == 0:
            raise MovieError(f"{path}: is empty, or not a regular file")
        match path.suffix.lower():
            case ".tif" | ".tiff" | ".btf" | ".tf8" | ".stk" | ".index" as suffix:
                from . import tiff

                is_index = suffix == ".index"
                return tiff.open_ndtiff(path) if is_index else tiff.open_tiff(path)
            case ".dax" | ".inf":
                return open_dax(path)
            case ".raw" | ".yaml":
                return open_picasso(path)
            case ".npy":
                return open_npy(path)
            case ".spe":
                return open_spe(path)
            case ".sif":
                return open_sif(path)
            # czifile needs a later Python.
            case ".czi" if sys.version_info < (3, 12):
                return open_bioio(path, position, "cannot be read by bioio; copy it again")
            case ".nd2" | ".czi" | ".lif" | ".ims" | ".lsm":
                return open_vendor(path, position)
        unknown = f"is of no format that is read; those are {FORMATS}"
        try:
            importlib.import_module("bioio")
        except ModuleNotFoundError:
            raise MovieError(f"{path}: {unknown}") from None
        return open_bioio(path, position, f"cannot be read by bioio, and {unknown}")


def _split_position(path: Path) -> tuple[Path, int | None]:
    """The file, and the number of one of its images, as of `movie.lif/2`."""
    file = path.parent
    is_inside = path.name.isdecimal() and not path.exists() and file.is_file()
    if is_inside and file.suffix.lower() not in _ALONE:
        return file, int(path.name)
    return path, None


def open_sink(
    sink: Any, layout: Layout, *, overwrite: bool = False, is_growing: bool = False
) -> Sink | ArraySink:
    """The sink at a path, by its suffix, or an array to fill. One that is growing does not
    have its length yet."""
    if isinstance(sink, np.ndarray):
        if is_growing:
            rule = "cannot take a movie whose length is not known; give a path"
            raise MovieError(f"an array to fill {rule}")
        return ArraySink(sink, layout)
    if not isinstance(sink, str | os.PathLike):
        kind = type(sink).__name__
        raise MovieError(f"{kind} cannot be written to; give a path or a NumPy array")
    path = Path(sink)
    with _named_packages(path), named_errors(f"{path}: cannot be written"):
        # The journal needs it, later.
        importlib.import_module("filelock")
        if is_growing and path.suffix.lower() in (".tif", ".tiff", ".zarr", ".raw"):
            from .growing_sinks import open_growing_sink

            return open_growing_sink(path, layout, overwrite=overwrite)
        match path.suffix.lower():
            case ".tif" | ".tiff":
                from .tiff_pages import TiffSink

                return TiffSink(path, layout, overwrite=overwrite)
            case ".zarr":
                from .zarr import ZarrSink

                return ZarrSink(path, layout, overwrite=overwrite)
            case ".raw":
                return PicassoSink(path, layout, overwrite=overwrite)
    rule = "give a name that ends in .tif, .ome.tif, .zarr, .ome.zarr or .raw"
    raise MovieError(f"{path}: is written as TIFF, Zarr or Picasso raw; {rule}")


@contextlib.contextmanager
def _named_packages(path: str | os.PathLike[str], extra: str = "movies") -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        what = f"'jaxbkgd[{'remote' if '://' in str(path) else extra}]'"
        fault = f"needs a Python package ({one_line(error)})"
        raise MovieError(f"{path}: {fault}; install it with: pip install {what}") from error


def is_split(source: Any, boxes: Sequence[Box] | None = None) -> bool:
    """Whether a source stands for a list of channels with one result each."""
    return isinstance(source, list | tuple) or boxes is not None


def open_channels(
    source: Any,
    boxes: Sequence[Box] | None = None,
    frames: slice | None = None,
    *,
    files: contextlib.ExitStack,
) -> list[Channel]:
    """The channels of a source as that of [`jaxbkgd.estimate_movie`][], all of one length.
    Movies that are opened here are closed by `files`."""
    channels = _open_whole(source, boxes, files)
    return channels if frames is None else [channel.part(frames) for channel in channels]


def open_sources(source: Any, files: contextlib.ExitStack) -> Any:
    """The source with its paths and arrays opened as movies, which `files` closes."""
    is_list = isinstance(source, list | tuple)
    opened = [
        s if isinstance(s, Movie | Channel) else files.enter_context(open_movie(s))
        for s in (source if is_list else [source])
    ]
    return opened if is_list else opened[0]


def _open_whole(
    source: Any, boxes: Sequence[Box] | None, files: contextlib.ExitStack
) -> list[Channel]:
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise ValueError("There is no source; give a path or an array, or a list of them.")
    movies = open_sources(sources, files)
    opened = [[m] if isinstance(m, Channel) else m.channels for m in movies]
    if not is_split(source, boxes):
        return opened[0]
    for channels in opened:
        if len(channels) > 1:
            what = f"{channels[0].movie.name}: holds {len(channels)} channels"
            raise MovieError(f"{what}; estimate it by itself, in no list and without boxes")
    channels = [channel for (channel,) in opened]
    if boxes is not None:
        if isinstance(source, list | tuple | Channel) or not boxes:
            what = f"boxes are {boxes} of {len(sources)} sources"
            raise ValueError(f"{what}; give at least one, of one movie or array.")
        return [Channel(channels[0].movie, 0, box) for box in boxes]
    lengths = [str(len(channel)) for channel in channels]
    if len(set(lengths)) > 1:
        what = f"the channels have {', '.join(lengths)} frames"
        raise MovieError(
            f"{channels[0].movie.name}: {what}; give movies of the same length"
        )
    return channels


def open_weights(
    weights: Any, channels: Sequence[Channel], files: contextlib.ExitStack
) -> list[Channel | None]:
    """The weights of each channel, as [`jaxbkgd.estimate_movie`][] takes them, cut as the
    channel is. Movies that are opened here are closed by `files`."""
    is_list = isinstance(weights, list | tuple)
    listed = list(weights) if is_list else [weights] * len(channels)
    if len(listed) != len(channels):
        what = f"There are {len(channels)} channels, but weights for {len(listed)}"
        raise ValueError(f"{what}; give one for all, or a list with one for each.")
    opened: list[Channel | None] = []
    for mask, channel in zip(listed, channels, strict=True):
        if mask is None:
            opened.append(None)
            continue
        if isinstance(mask, str | os.PathLike):
            mask = files.enter_context(open_movie(mask))
        elif not isinstance(mask, Movie):
            frames = np.asarray(mask)[None] if np.ndim(mask) == 2 else mask
            mask = movie_of_array(frames, "the weights")
        count, _, height, width = channel.movie.shape
        if mask.shape not in [(1, 1, height, width), (count, 1, height, width)]:
            rule = f"1 or {count} frames, one channel, and {height} x {width} pixels"
            what = f"has the shape (frames, channels, height, width) {mask.shape}"
            raise MovieError(f"{mask.name}: {what}; as weights it must have {rule}")
        frames = channel.frames if mask.shape[0] > 1 else range(1)
        chosen = slice(frames.start, frames.stop, frames.step)
        opened.append(Channel(mask, 0, channel.box, chosen))
    return opened

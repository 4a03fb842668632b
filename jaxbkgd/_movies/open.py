"""Which reader or writer a path has: the only file that knows all formats."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .movie import Movie, movie_of_array, MovieError, one_line
from .raw import open_dax, open_npy, open_picasso
from .sinks import ArraySink, Layout, Sink


FORMATS = (
    "TIFF, BigTIFF, OME-TIFF and ImageJ stacks (.tif, .tiff), a folder or pattern of them "
    "(movie_*.tif), Zarr and OME-Zarr (.zarr, a .zip of it, or a URL), DAX (.dax with "
    ".inf), Picasso (.raw with .yaml) and NumPy (.npy)"
)


def open_movie(source: Any) -> Movie:
    """Opens a movie that is read as it is sliced.

    **Arguments:**

    - `source`: a path (see the page on formats), the URL of a Zarr (`https://`, `s3://`),
        or an array (frames, height, width) or (frames, channels, height, width) of NumPy,
        JAX, dask or Zarr. Pixels are integers, booleans, or floats of at most 64 bits. A
        [`jaxbkgd.Movie`][] is returned as it is.

    **Returns:**

    A [`jaxbkgd.Movie`][], whose `channels` are sliced by frame, as
    `movie.channels[0][10:20]`. It is a context manager.

    **Raises:**

    [`jaxbkgd.MovieError`][], a `ValueError`, if it is missing, broken, of no format that is
    read, or no array as above; `TypeError` for an array whose dtype NumPy does not know.

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
    with _named_errors(source, "read"):
        if isinstance(source, str) and re.match("[A-Za-z][A-Za-z0-9+.-]+://", source):
            from . import zarr

            return zarr.open_zarr(source)
        return _open_path(Path(source))


def _open_path(path: Path) -> Movie:
    if path.is_dir():
        if any((path / file).is_file() for file in ("zarr.json", ".zarray", ".zgroup")):
            from . import zarr

            return zarr.open_zarr(path)
        from . import series

        return series.open_series(path)
    if not path.exists():
        if any(sign in path.name for sign in "*?["):
            from . import series

            return series.open_series(path)
        raise MovieError(f"{path}: no such file")
    if not path.is_file():
        raise MovieError(f"{path}: is not a regular file; copy the movie to one")
    if path.stat().st_size == 0:
        raise MovieError(f"{path}: is empty")
    match path.suffix.lower():
        case ".tif" | ".tiff" | ".btf" | ".tf8" | ".stk":
            from . import tiff

            return tiff.open_tiff(path)
        case ".zip":
            from . import zarr

            return zarr.open_zarr(path)
        case ".index":
            from . import tiff

            return tiff.open_ndtiff(path)
        case ".dax" | ".inf":
            return open_dax(path)
        case ".raw" | ".yaml":
            return open_picasso(path)
        case ".npy":
            return open_npy(path)
    raise MovieError(f"{path}: is of no format that is read; those are {FORMATS}")


def open_sink(sink: Any, layout: Layout, *, overwrite: bool = False) -> Sink | ArraySink:
    """The sink at a path, by its suffix, or an array to fill."""
    if isinstance(sink, np.ndarray):
        return ArraySink(sink, layout)
    if not isinstance(sink, str | os.PathLike):
        raise MovieError(
            f"{type(sink).__name__} cannot be written to; give a path or a NumPy array"
        )
    path = Path(sink)
    with _named_errors(path, "written"):
        match path.suffix.lower():
            case ".tif" | ".tiff":
                from . import tiff_sink

                return tiff_sink.TiffSink(path, layout, overwrite=overwrite)
            case ".zarr":
                from . import zarr

                return zarr.ZarrSink(path, layout, overwrite=overwrite)
    raise MovieError(
        f"{path}: is written as TIFF or Zarr; give a name that ends in .tif, .ome.tif, "
        ".zarr or .ome.zarr"
    )


@contextlib.contextmanager
def _named_errors(path: str | os.PathLike[str], verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MovieError(f"{path}: cannot be {verb} ({reason})") from error
    except ImportError as error:
        packages = (
            "'zarr[remote]' aiohttp s3fs" if "://" in str(path) else "'jaxbkgd[movies]'"
        )
        raise MovieError(
            f"{path}: needs a Python package ({one_line(error)}); install it with: "
            f"pip install {packages}"
        ) from error

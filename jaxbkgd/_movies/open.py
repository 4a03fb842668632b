"""Which reader or writer a path has: the only file that knows all formats."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .movie import Movie, movie_of_array, MovieError
from .sinks import ArraySink, Layout, Sink


FORMATS = (
    "TIFF, BigTIFF, OME-TIFF and ImageJ stacks (.tif, .tiff), a folder or pattern of them "
    "(movie_*.tif), Zarr and OME-Zarr (.zarr), DAX (.dax with .inf), Picasso (.raw with "
    ".yaml) and NumPy (.npy)"
)


def open_movie(source: Any) -> Movie:
    """Opens a movie that is read as it is sliced.

    **Arguments:**

    - `source`: a path (see the page on formats), or an array (frames, height, width) or
        (frames, channels, height, width) of NumPy, JAX, dask or Zarr. Pixels are integers,
        booleans, or floats of at most 64 bits.

    **Returns:**

    A movie whose `channels` are sliced by frame, as `movie.channels[0][10:20]`. It is a
    context manager.

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
    path = Path(source)
    try:
        movie = _open_path(path)
        movie.opened_state = movie.state()
        return movie
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MovieError(f"{path}: cannot be read ({reason})") from error
    except ModuleNotFoundError as error:
        raise MovieError(
            f"{path}: needs the Python package {error.name}; install it with: "
            "pip install 'jaxbkgd[movies]'"
        ) from error


def _open_path(path: Path) -> Movie:
    # A reader, with the packages that it needs, is imported where it is asked for.
    if path.is_dir():
        from . import tiff, zarr

        if zarr.is_zarr(path):
            return zarr.ZarrMovie(path)
        return tiff.open_series(path)
    if not path.exists():
        if any(sign in path.name for sign in "*?["):
            from . import tiff

            return tiff.open_series(path)
        raise MovieError(f"{path}: no such file")
    if not path.is_file():
        raise MovieError(f"{path}: is not a regular file; copy the movie to one")
    if path.stat().st_size == 0:
        raise MovieError(f"{path}: is empty")
    from . import raw

    match path.suffix.lower():
        case ".tif" | ".tiff" | ".btf" | ".tf8" | ".stk" | ".lsm":
            from . import tiff

            return tiff.open_tiff(path)
        case ".dax" | ".inf":
            return raw.open_dax(path)
        case ".raw" | ".yaml":
            return raw.open_picasso(path)
        case ".npy":
            return raw.open_npy(path)
    raise MovieError(f"{path}: is of no format that is read; those are {FORMATS}")


def open_sink(sink: Any, layout: Layout, *, overwrite: bool = False) -> Sink | ArraySink:
    """The sink at a path, by its suffix, or an array to fill."""
    if isinstance(sink, np.ndarray):
        return ArraySink(sink, layout)
    if not isinstance(sink, str | os.PathLike):
        raise MovieError(
            f"{type(sink).__name__} cannot be written to; give a path or a NumPy array"
        )
    # Each writer imports what it needs, when it is needed.
    from . import tiff, zarr

    path = Path(sink)
    match path.suffix.lower():
        case ".tif" | ".tiff":
            return tiff.TiffSink(path, layout, overwrite=overwrite)
        case ".zarr":
            return zarr.ZarrSink(path, layout, overwrite=overwrite)
    raise MovieError(
        f"{path}: is written as TIFF or Zarr; give a name that ends in .tif, .ome.tif, "
        ".zarr or .ome.zarr"
    )

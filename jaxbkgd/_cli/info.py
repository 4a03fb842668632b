"""`jaxbkgd info`: what a movie's file says of it."""

import sys
from pathlib import Path

from rich.filesize import decimal

from .._movies.movie import Movie, MovieError
from .._movies.open import open_movie
from .report import print_rows, say, yx_text


OPTIONS = "movies MOVIE: Files, folders or quoted patterns."


def info(movies: list[Path]) -> None:
    """Print the format, the size and the pixel size of movies."""
    code = 0
    for number, path in enumerate(movies):
        if number:
            print()
        try:
            with open_movie(path) as movie:
                print_rows(_rows(movie))
        except MovieError as error:
            say(str(error))
            code = 2
    sys.exit(code)


def _rows(movie: Movie) -> dict[str, str]:
    frames, channels, height, width = movie.shape
    size_um, interval_s = movie.pixel_size_um, movie.frame_interval_s
    # Some of the files and folders may be inside others.
    roots = {path.resolve() for path in movie.paths}
    files = roots.union(*(root.rglob("*") for root in roots))
    return {
        "movie": movie.name,
        "format": movie.format,
        "frames": f"{frames} of {height} x {width} px",
        "channels": f"{channels}",
        "pixels": movie.dtype.name,
        "pixel size": "unknown" if size_um is None else yx_text(*size_um, "um"),
        "frame interval": "unknown" if interval_s is None else f"{interval_s:g} s",
        "size on disk": decimal(sum(f.stat().st_size for f in files if f.is_file())),
    }

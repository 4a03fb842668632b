"""`jaxbkgd info`: what a movie's file says of it."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from .._movies.open import open_movie
from .arguments import DEBUG
from .report import print_rows, yx_text


_MOVIES = Argument(help="Files, folders or quoted patterns.")


def info(
    movies: Annotated[list[Path], _MOVIES], debug: Annotated[bool, DEBUG] = False
) -> None:
    """Print the format, the size and the pixel size of movies."""
    for number, path in enumerate(movies):
        with open_movie(path) as movie:
            frames, channels, height, width = movie.shape
            size_um, interval_s = movie.pixel_size_um, movie.frame_interval_s
            rows = {
                "movie": movie.name,
                "format": movie.format,
                "frames": f"{frames} of {height} x {width} px",
                "channels": f"{channels}",
                "pixels": movie.dtype.name,
                "pixel size": "unknown" if size_um is None else yx_text(*size_um, "um"),
                "frame interval": "unknown" if interval_s is None else f"{interval_s:g} s",
            }
        if number:
            print()
        print_rows(rows)

"""`jaxbkgd view`: a movie in napari, with the window for its background, or in ndv."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from .._batch.lazy import lazy_estimate
from .._estimators.local_mean import LocalMean
from .._movies.movie import Movie
from .._movies.open import open_movie
from .arguments import DEBUG
from .programs import keep_programs
from .report import UsageError


_MOVIE = Argument(help="A file, a folder or a quoted pattern.")
_INSTALL = "install napari with: pip install 'jaxbkgd[napari]'"
# Without a screen, Qt ends the process that asks for one.
_OPEN_QT = "from qtpy.QtWidgets import QApplication; QApplication([])"


def view(movie: Annotated[Path, _MOVIE], debug: Annotated[bool, DEBUG] = False) -> None:
    """Look at a movie in napari and see its background follow the sliders.

    Where only ndv is installed, the movie and its background are shown there.
    """
    viewers = [name for name in ("napari", "ndv") if importlib.util.find_spec(name)]
    if not viewers:
        raise UsageError(f"view: neither napari nor ndv is installed; {_INSTALL}")
    _check_screen(viewers[0])
    keep_programs()
    with open_movie(movie) as opened:
        if viewers[0] == "napari":
            _show_in_napari(movie)
        else:
            _show_in_ndv(opened)


def _check_screen(viewer: str) -> None:
    """Refuses what would end in the middle, without Qt or without a screen."""
    probe = [sys.executable, "-c", _OPEN_QT]
    ended = subprocess.run(probe, capture_output=True, text=True, env=os.environ)
    if ended.returncode == 0:
        return
    if "ModuleNotFoundError" in ended.stderr or "QtBindings" in ended.stderr:
        raise UsageError(f"view: {viewer} needs Qt, which is not installed; {_INSTALL}")
    remedy = "log in with one, as by ssh -X, or write a file: jaxbkgd estimate MOVIE"
    raise UsageError(f"view: Qt finds no screen to open a window on; {remedy}")


def _show_in_napari(path: Path) -> None:
    napari: Any = importlib.import_module("napari")
    viewer = napari.Viewer(title=f"jaxbkgd: {path.name}")
    viewer.open(str(path), plugin="jaxbkgd")
    viewer.window.add_plugin_dock_widget("jaxbkgd", "Background")
    napari.run()


def _show_in_ndv(movie: Movie) -> None:
    ndv: Any = importlib.import_module("ndv")
    # A window each, for the movie and its background.
    windows = [ndv.ArrayViewer(channel) for channel in movie.channels]
    windows.append(ndv.ArrayViewer(lazy_estimate(movie, LocalMean())))
    for window in windows:
        window.show()
    ndv.run_app()

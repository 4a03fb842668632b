"""Makes the pictures of napari in the docs, in its dark and its light theme.

    python docs/make_napari_figures.py [FOLDER]

It opens napari on the screen that there is, as a virtual one (`xvfb-run`), with a simulated
movie, calibrates it, and writes napari-dark.png and napari-light.png to FOLDER, by default
docs/pages/figures. It takes some two minutes and needs the extra `napari`.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import napari
import numpy as np
import tifffile
from napari.settings import get_settings
from PIL import Image
from qtpy.QtWidgets import QApplication

import jaxbkgd


DOCS = Path(__file__).parent
# Pixels of the window, and the colours of a picture, of which each takes a byte a pixel.
WINDOW, COLOURS = (980, 800), 192


def wait_for(is_done: Callable[[], bool]) -> None:
    """Lets the window work until then."""
    while not is_done():
        QApplication.processEvents()
        time.sleep(0.02)


def movie() -> np.ndarray:
    """Molecules on an uneven background under a laser that flickers."""
    frames, _ = jaxbkgd.simulate_movie(
        jax.random.key(3), frame_count=200, height_pix=128, width_pix=128
    )
    time_frames = np.arange(200)[:, None, None]
    light = 1 - 0.001 * time_frames + 0.04 * np.sin(time_frames / 9)
    return np.asarray(100 + (np.asarray(frames) - 100) * light, np.uint16)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "movie.tif"
        tifffile.imwrite(path, movie(), photometric="minisblack")
        viewer = napari.Viewer(show=True)
        viewer.window._qt_window.resize(*WINDOW)
        viewer.open(str(path), plugin="jaxbkgd")
        _, widget = viewer.window.add_plugin_dock_widget("jaxbkgd", "Background")
        widget["offset"].value, widget["gain"].value = 100, 0.46
        viewer.dims.set_current_step(0, 100)
        widget["calibrate"].changed.emit(True)
        wait_for(lambda: len(viewer.layers) == 4)
        viewer.canvas.grid.enabled = True
        viewer.reset_view()
        for theme in ("dark", "light"):
            get_settings().appearance.theme = theme
            end = time.monotonic() + 2
            wait_for(lambda end=end: time.monotonic() > end)
            picture = Image.fromarray(viewer.screenshot(canvas_only=False, flash=False))
            # Few pixels are yellow, and no other method keeps a colour for them.
            spread = Image.Quantize.MAXCOVERAGE
            picture = picture.convert("RGB").quantize(COLOURS, spread)
            picture.save(folder / f"napari-{theme}.png", optimize=True)
        viewer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "pages" / "figures")

"""The figure that `jaxbkgd demo` draws of a channel."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image


_WIDTH_INCHES = 9.0
_PANEL_INCHES = 2.2
# Noise hardly compresses. All colours drawn are in one palette of 256, so that a pixel
# is one byte: three maps of 64 colours, and greys for text and lines.
_INTENSITY, _LEVEL, _SIGNED = (
    colormaps[name].resampled(64) for name in ("magma", "viridis", "RdBu_r")
)


def save_channel_figure(
    path: Path,
    *,
    frame: np.ndarray,
    true_bkgd: np.ndarray,
    bkgd: np.ndarray,
    snr: np.ndarray,
    title: str,
) -> None:
    """Draw a frame, its true and its estimated background, and what follows from them.

    All images are `(height, width)`, in ADU above the camera's offset, but for `snr`,
    which has no unit. The file is a PNG, 900 pixels wide.
    """
    residual, error = frame - bkgd, bkgd - true_bkgd
    level = _range(np.stack([true_bkgd, bkgd]))
    bound = _range(np.abs(error))[1]
    panels = (
        ("frame", frame, "ADU", _INTENSITY, _range(frame)),
        ("true background", true_bkgd, "ADU", _LEVEL, level),
        ("estimated background", bkgd, "ADU", _LEVEL, level),
        ("residual = frame - estimate", residual, "ADU", _INTENSITY, _range(residual)),
        ("SNR of the residual", snr, "noise s.d.", _INTENSITY, (0.0, _range(snr)[1])),
        ("error = estimate - truth", error, "ADU", _SIGNED, (-bound, bound)),
    )
    height, width = frame.shape
    rows_inches = 2 * (_PANEL_INCHES * height / width + 0.35)
    figure = Figure((_WIDTH_INCHES, rows_inches + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(2, 3)
    for axes, (name, image, unit, colours, (low, high)) in zip(
        grid.flat, panels, strict=True
    ):
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
        shown = axes.imshow(
            image, cmap=colours, vmin=low, vmax=high, interpolation="nearest"
        )
        beside = axes.inset_axes((1.03, 0, 0.05, 1))
        bar = figure.colorbar(shown, cax=beside, ticks=MaxNLocator(5))
        bar.set_label(unit, fontsize=9)
        beside.tick_params(labelsize=8)
        _draw_scale_bar(axes, image.shape)
    _save_with_palette(figure, path)


def _range(image: np.ndarray) -> tuple[float, float]:
    """The colours' limits: molecules and noise reach beyond, and saturate."""
    low, high = np.percentile(image, [0.5, 99.8])
    return float(low), float(high)


def _draw_scale_bar(axes: Axes, shape: tuple[int, ...]) -> None:
    """A bar of about a fifth of the width, in a round number of pixels."""
    height, width = shape
    length = 10 * max(1, round(width / 50))
    left, thickness = 0.05 * width, 0.02 * width
    top = height - left - thickness
    axes.add_patch(
        Rectangle((left, top), length, thickness, color="white", ec="black", lw=0.5)
    )
    axes.text(
        left + length / 2,
        top - thickness,
        f"{length} px",
        color="white",
        fontsize=8,
        ha="center",
        va="bottom",
        path_effects=[withStroke(linewidth=1.5, foreground="black")],
    )


def _save_with_palette(figure: Figure, path: Path) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]
    greys = np.repeat(np.linspace(0, 255, 64).round()[:, None], 3, axis=1)
    maps = [
        colours(range(64), bytes=True)[:, :3] for colours in (_INTENSITY, _LEVEL, _SIGNED)
    ]
    palette = np.concatenate([greys, *maps]).astype(int)
    red, green, blue = np.moveaxis(drawn.astype(np.int32), -1, 0)
    packed, indices = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
    colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    distances = np.square(colours[:, None] - palette).sum(-1)
    indexed = Image.fromarray(distances.argmin(1).astype(np.uint8)[indices])
    indexed.putpalette(palette.astype(np.uint8).tobytes())
    indexed.save(path, "PNG", optimize=True)

"""The figures that `jaxbkgd demo` and `jaxbkgd calibrate` draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image


_WIDTH_INCHES = 9.0
_PANEL_INCHES = 2.2
# Noise hardly compresses. All colours drawn are in one palette of 256, so that a pixel
# is one byte: three maps of 64 colours, and greys for text and lines.
_INTENSITY, _LEVEL, _SIGNED = (
    colormaps[name].resampled(64) for name in ("magma", "viridis", "RdBu_r")
)

# y and x, told apart where their lines meet.
_AXES = ("y", "x")
_AXIS_LINES = (
    {"color": _SIGNED(6), "linestyle": "-"},
    {"color": _SIGNED(57), "linestyle": "--"},
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


class CalibratedChannel(NamedTuple):
    """How the radii (y, x) of a channel were learned, and what they do to a frame.

    `path_pix` has the radii step by step, `(steps, 2)`. The losses over the grid are at
    equal radii in y and x. `bkgds` are at half, once and twice the radii,
    `(3, height, width)`.
    """

    title: str
    radii_pix: np.ndarray
    radii_std_pix: np.ndarray
    path_pix: np.ndarray
    grid_pix: np.ndarray
    grid_losses: np.ndarray
    frame: np.ndarray
    bkgds: np.ndarray


def save_calibration_figure(path: Path, channels: Sequence[CalibratedChannel]) -> None:
    """Draw, a row a channel, the loss, the way to its minimum, and a frame's background.

    The file is a PNG, 1050 pixels wide.
    """
    figure = Figure((10.5, 2.4 * len(channels)), dpi=100, layout="constrained")
    rows = figure.subfigures(len(channels), 1, squeeze=False)[:, 0]
    for row, channel in zip(rows, channels, strict=True):
        row.suptitle(channel.title, fontsize=11)
        grid = row.subplots(1, 6, width_ratios=(1.7, 1.4, 1, 1, 1, 1))
        _draw_loss(grid[0], channel)
        _draw_path(grid[1], channel)
        images = (channel.frame, *channel.bkgds)
        level = _range(channel.bkgds)
        names = ("frame", "background at r/2", "at r", "at 2 r")
        for axes, image, name in zip(grid[2:], images, names, strict=True):
            is_frame = name == "frame"
            colours = _INTENSITY if is_frame else _LEVEL
            low, high = _range(image) if is_frame else level
            axes.set_title(name, fontsize=10)
            axes.set_axis_off()
            axes.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            _draw_scale_bar(axes, image.shape)
    _save_with_palette(figure, path)


def _draw_loss(axes: Axes, channel: CalibratedChannel) -> None:
    axes.loglog(
        channel.grid_pix, channel.grid_losses, "o-", color="0.4", ms=3, nonpositive="clip"
    )
    for name, radius, std, line in zip(
        _AXES, channel.radii_pix, channel.radii_std_pix, _AXIS_LINES, strict=True
    ):
        uncertainty = f" ± {std:.2f}" if np.isfinite(std) else ""
        axes.axvline(radius, label=f"{name}: {radius:.2f}{uncertainty} px", **line)
        if uncertainty:
            axes.axvspan(radius - std, radius + std, color=line["color"], alpha=0.3, lw=0)
    # Room for the legend.
    axes.set_ylim(top=8 * axes.get_ylim()[1])
    axes.set_title("loss over a common radius", fontsize=10)
    axes.set_xlabel("radius (px)", fontsize=9)
    axes.set_ylabel("mean square error\n/ noise variance", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="upper center")


def _draw_path(axes: Axes, channel: CalibratedChannel) -> None:
    for name, radii, line in zip(_AXES, channel.path_pix.T, _AXIS_LINES, strict=True):
        axes.plot(radii, label=name, marker="o", ms=3, **line)
    axes.set_title("path of the optimizer", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("radius (px)", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)


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

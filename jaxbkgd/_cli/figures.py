"""The figures that `jaxbkgd demo` and `jaxbkgd calibrate` draw, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from .report import write_whole


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_WIDTH_INCHES, _PANEL_INCHES = 9.0, 2.2
_INTENSITY, _LEVEL, _SIGNED = "magma", "viridis", "RdBu_r"

# y and x, told apart where their lines meet.
_AXIS_LINES = (("y", "#1b5fa5", "-"), ("x", "#b8443f", "--"))


def save_channel_figure(
    path: Path,
    *,
    frame: Float[np.ndarray, "height width"],
    true_bkgd: Float[np.ndarray, "height width"],
    bkgd: Float[np.ndarray, "height width"],
    snr: Float[np.ndarray, "height width"],
    title: str,
) -> None:
    """Draw a frame, its true and its estimated background, and what follows from them.

    Images are in ADU above the camera's offset, `snr` in standard deviations of the noise.
    The file is a PNG, 900 pixels wide.
    """
    from matplotlib.figure import Figure

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
    for axes, (name, image, unit, colours, limits) in zip(grid.flat, panels, strict=True):
        _show(axes, name, image, colours, limits)
        beside = axes.inset_axes((1.03, 0, 0.05, 1))
        bar = figure.colorbar(axes.images[0], cax=beside)
        bar.set_label(unit, fontsize=9)
        beside.locator_params(nbins=5)
        beside.tick_params(labelsize=8)
    _save(figure, path)


class CalibratedChannel(NamedTuple):
    """How the radii (y, x) of a channel were learned, and their background of a frame.

    The losses over the grid are at equal radii in y and x. `bkgds` are at half, once and
    twice the radii.
    """

    title: str
    radii_pix: Float[np.ndarray, " axes"]
    radii_std_pix: Float[np.ndarray, " axes"]
    path_pix: Float[np.ndarray, "steps axes"]
    grid_pix: Float[np.ndarray, " radii"]
    grid_losses: Float[np.ndarray, " radii"]
    frame: Float[np.ndarray, "height width"]
    bkgds: Float[np.ndarray, "3 height width"]


def save_calibration_figure(path: Path, channels: Sequence[CalibratedChannel]) -> None:
    """Draw the loss, the path of the radii and a frame's background, a row a channel.

    The file is a PNG, 1050 pixels wide.
    """
    from matplotlib.figure import Figure

    figure = Figure((10.5, 2.4 * len(channels)), dpi=100, layout="constrained")
    rows = figure.subfigures(len(channels), 1, squeeze=False)[:, 0]
    for row, channel in zip(rows, channels, strict=True):
        row.suptitle(channel.title, fontsize=11)
        loss, path_axes, *images = row.subplots(1, 6, width_ratios=(1.7, 1.4, 1, 1, 1, 1))
        _draw_loss(loss, channel)
        _draw_path(path_axes, channel)
        _show(images[0], "frame", channel.frame, _INTENSITY, _range(channel.frame))
        level = _range(channel.bkgds)
        names = ("background at r/2", "at r", "at 2 r")
        for axes, name, bkgd in zip(images[1:], names, channel.bkgds, strict=True):
            _show(axes, name, bkgd, _LEVEL, level)
    _save(figure, path)


def _draw_loss(axes: Axes, channel: CalibratedChannel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.loglog(
        channel.grid_pix, channel.grid_losses, "o-", color="0.4", ms=3, nonpositive="clip"
    )
    radii = zip(_AXIS_LINES, channel.radii_pix, channel.radii_std_pix, strict=True)
    for (name, colour, style), radius, std in radii:
        uncertainty = f" ± {std:.2f}" if np.isfinite(std) else ""
        label = f"{name}: {radius:.2f}{uncertainty} px"
        axes.axvline(radius, label=label, color=colour, linestyle=style)
        if uncertainty:
            axes.axvspan(radius - std, radius + std, color=colour, alpha=0.3, lw=0)
    # Room for the legend.
    axes.set_ylim(top=8 * axes.get_ylim()[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    _label(
        axes,
        "loss over a common radius",
        "radius (px)",
        "mean square error\n/ noise variance",
    )


def _draw_path(axes: Axes, channel: CalibratedChannel) -> None:
    for (name, colour, style), radii in zip(_AXIS_LINES, channel.path_pix.T, strict=True):
        axes.plot(radii, label=name, marker="o", ms=3, color=colour, linestyle=style)
    axes.locator_params("x", nbins=5, integer=True)
    _label(axes, "path of the optimizer", "step", "radius (px)")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="upper center" if axes.get_xscale() == "log" else "best")


def _range(image: np.ndarray) -> tuple[float, float]:
    """The limits of the colours; molecules and noise beyond them saturate."""
    low, high = np.percentile(image, [0.5, 99.8])
    return float(low), float(high)


def _show(
    axes: Axes, title: str, image: np.ndarray, colours: str, limits: tuple[float, float]
) -> None:
    """Show an image with a scale bar of a fifth of its width, in tens of pixels."""
    low, high = limits
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    axes.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    height, width = image.shape
    length = 10 * max(1, round(width / 50))
    left, bottom = 0.05 * width, height - 0.06 * width
    bar = axes.hlines(bottom, left, left + length, color="white", lw=2)
    text = axes.text(
        left + length / 2,
        bottom - 0.02 * width,
        f"{length} px",
        color="white",
        fontsize=8,
        ha="center",
        va="bottom",
    )
    from matplotlib.patheffects import withStroke

    for drawn in (bar, text):
        drawn.set_path_effects(
            [withStroke(linewidth=3 if drawn is bar else 1.5, foreground="black")]
        )


def _save(figure: Figure, path: Path) -> None:
    """Save in 256 colours: noise hardly compresses, and a pixel is one byte then."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # Rare colours, as those of the largest errors, count as much as frequent ones.
    method = Image.Quantize.MAXCOVERAGE
    colours = Image.open(drawn).convert("RGB").quantize(256, method)
    colours.save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())

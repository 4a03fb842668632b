"""The figures that `jaxbkgd demo` and `jaxbkgd calibrate` draw, with matplotlib."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import PIL.Image
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

from .._calibration.calibrate import CalibrationHistory
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .arguments import one_channel
from .report import write_whole


Image = Real[np.ndarray, "height width"]

# y and x, told apart where their lines meet.
_AXIS_LINES = (("y", "#1b5fa5", "-"), ("x", "#b8443f", "--"))


@mpl.rc_context({"font.size": 8})
def save_channel_figure(
    path: Path, *, frame: Image, true_bkgd: Image, bkgd: Image, snr: Image, title: str
) -> None:
    """Draw a frame, its true and its estimated background, and what follows from them.

    Images are in ADU above the camera's offset, `snr` in standard deviations of the noise.
    The file is a PNG, 900 pixels wide.
    """
    residual, error = frame - bkgd, bkgd - true_bkgd
    level = _range(np.stack([true_bkgd, bkgd]))
    bound = _range(np.abs(error))[1]
    panels = (
        ("frame", frame, "ADU", "magma", _range(frame)),
        ("true background", true_bkgd, "ADU", "viridis", level),
        ("estimated background", bkgd, "ADU", "viridis", level),
        ("residual = frame - estimate", residual, "ADU", "magma", _range(residual)),
        ("SNR of the residual", snr, "noise s.d.", "magma", (0.0, _range(snr)[1])),
        ("error = estimate - truth", error, "ADU", "RdBu_r", (-bound, bound)),
    )
    height, width = frame.shape
    figure = Figure((9.0, 4.4 * height / width + 1.2), dpi=100, layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        name, image, unit, colours, limits = panel
        _show(axes, name, image, colours, limits)
        beside = axes.inset_axes((1.03, 0, 0.05, 1))
        figure.colorbar(axes.images[0], cax=beside, label=unit).ax.locator_params(nbins=5)
    _save(figure, path)


@mpl.rc_context({"font.size": 8})
def save_calibration_figure(
    path: Path,
    names: Sequence[str],
    channels: Sequence[Channel],
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
    grid_pix: Float[np.ndarray, " radii"],
    losses: Float[np.ndarray, "channels radii"],
) -> None:
    """Draw the losses over the grid, where y and x have the same radius, the path of the
    radii, and a frame and its background: a row for each channel.

    The file is a PNG, 1050 pixels wide.
    """
    figure = Figure((10.5, 2.4 * len(channels)), dpi=100, layout="constrained")
    rows = figure.subfigures(len(channels), 1, squeeze=False)[:, 0]
    for number, (row, channel) in enumerate(zip(rows, channels, strict=True)):
        middle = len(channel) // 2
        row.suptitle(f"Channel {number + 1}: {names[number]}, frame {middle}")
        loss, steps, *images = row.subplots(1, 4, width_ratios=(1.7, 1.4, 1, 1))
        loss.loglog(grid_pix, losses[number], "o-", color="0.4", ms=3, nonpositive="clip")
        for axis, (label, colour, style) in enumerate(_AXIS_LINES, -2):
            path_pix = history.radii[:, number, axis]
            steps.plot(path_pix, "o", ls=style, color=colour, ms=3, label=label)
            radius, std = module.radii[number, axis], history.radii_std[number, axis]
            error = f" ± {std:.2f}" if np.isfinite(std) else ""
            label = f"{label}: {radius:.2f}{error} px"
            loss.axvline(radius, color=colour, ls=style, label=label)
            if error:
                loss.axvspan(radius - std, radius + std, color=colour, alpha=0.3, lw=0)
        # Room for the legend.
        loss.set(ylim=(None, 8 * loss.get_ylim()[1]), title="loss over a common radius")
        loss.set(xlabel="radius (px)", ylabel="mean square error\n/ noise variance")
        loss.legend(loc="upper center")
        steps.set(title="path of the optimizer", xlabel="step", ylabel="radius (px)")
        steps.locator_params("x", nbins=5, integer=True)
        steps.legend()
        # Of frames that do not fit in memory, fewer make no difference to the eye.
        most = 2**24 // math.prod(channel.shape[1:])
        first = max(0, middle - min(module.halo_frames, most))
        frames = channel[first : 2 * middle - first + 1]
        background = one_channel(module, number).for_inference()(frames)
        bkgd = np.asarray(background.bkgds[middle - first])
        _show(images[0], "frame", channel[middle], "magma", _range(channel[middle]))
        _show(images[1], "background", bkgd, "viridis", _range(bkgd))
    _save(figure, path)


def _range(image: Real[np.ndarray, "..."]) -> tuple[float, float]:
    """The limits of the colours; molecules and noise beyond them saturate."""
    low, high = np.percentile(image, [0.5, 99.8])
    return float(low), float(high)


def _show(
    axes: Axes, title: str, image: Image, colours: str, limits: tuple[float, float]
) -> None:
    """Show an image with a scale bar of a fifth of its width, in tens of pixels."""
    axes.set_title(title)
    axes.set_axis_off()
    axes.imshow(image, colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    length = 10 * max(1, round(image.shape[1] / 50))
    place = axes.transData, length, f"{length} px", "lower left"
    bar = AnchoredSizeBar(*place, color="white", label_top=True)
    bar.patch.set(facecolor="black", alpha=0.5, linewidth=0)
    axes.add_artist(bar)


def _save(figure: Figure, path: Path) -> None:
    """Save in 256 colours: noise hardly compresses, and a pixel is one byte then."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # Rare colours, as those of the largest errors, count as much as frequent ones.
    method = PIL.Image.Quantize.MAXCOVERAGE
    colours = PIL.Image.open(drawn).convert("RGB").quantize(256, method)
    colours.save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())

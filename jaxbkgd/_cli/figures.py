"""The figures that the commands draw, with matplotlib."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._calibration.calibrate import CalibrationHistory
from .._estimators.local_mean import LocalMean
from .._estimators.photon_transfer import CameraReport
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .arguments import one_channel
from .report import write_whole


Image = Real[np.ndarray, "height width"]
Limits = tuple[float, float]


def save_channel_figure(
    path: Path, *, frame: Image, true_bkgd: Image, bkgd: Image, snr: Image, title: str
) -> None:
    """Draw a frame, its true and its estimated background, and what follows from them, in
    ADU above the camera's offset, and `snr`, as a PNG of 900 pixels in width."""
    residual, error = frame - bkgd, bkgd - true_bkgd
    level = _limits(np.stack([true_bkgd, bkgd]))
    bound = _limits(np.abs(error))[1]
    height, width = frame.shape
    figure = Figure((9.0, 4.4 * height / width + 1.2), dpi=100, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3).ravel()
    _show(panels[0], "frame (ADU)", frame, "magma", _limits(frame))
    _show(panels[1], "true background (ADU)", true_bkgd, "viridis", level)
    _show(panels[2], "estimated background (ADU)", bkgd, "viridis", level)
    _show(panels[3], "frame - estimate (ADU)", residual, "magma", _limits(residual))
    _show(panels[4], "SNR of that", snr, "magma", (0.0, _limits(snr)[1]))
    _show(panels[5], "estimate - truth (ADU)", error, "RdBu_r", (-bound, bound))
    _save(figure, path)


# A title, an image and the name of its colours.
Panel = tuple[str, Image, str]


def save_movie_figure(
    path: Path,
    channels: Sequence[Channel],
    panels: Sequence[Sequence[Panel]],
    lights: Sequence[Float[np.ndarray, "*rank frames"] | None],
    unexplained: Sequence[Sequence] | None,
) -> None:
    """Draw up to three images of each channel, and below them its light, and the share of
    frames in which a region is not as the model says, as a PNG of 900 pixels in width."""
    ratios = [channel.shape[1] / channel.shape[2] for channel in channels]
    height_inches = sum(min(4.0 * ratio, 8.0) + 1.2 for ratio in ratios)
    figure = Figure((9.0, height_inches), dpi=100, layout="constrained")
    parts = figure.subfigures(len(channels), 1, squeeze=False)[:, 0]
    for number, (channel, part) in enumerate(zip(channels, parts, strict=True)):
        axes = part.subplot_mosaic([[0, 1, 2], [3, 3, 4]], height_ratios=(3, 2))
        for place, (title, image, colours) in enumerate(panels[number]):
            _show(axes[place], title, image, colours, _limits(image))
        light = lights[number]
        # A movie without light has none to show.
        if light is not None and np.any(light > 0):
            # Of several patterns, beside the mean of the first one.
            of_each = np.atleast_2d(light)
            relative = of_each / np.nanmean(of_each[0])
            axes[3].plot(channel.frames, relative.T, lw=1)
            limits = 1.2 * min(0, np.nanmin(relative)), 1.2 * np.nanmax(relative)
            axes[3].set(title="light, of its mean", xlabel="frame", ylim=limits)
        if unexplained is not None:
            share = np.array(unexplained[number], float)
            _show(axes[4], "not explained (noise)", share, "magma", (0.0, 0.3))
            _, height, width = channel.shape
            # Regions, in the pixels of the frame.
            axes[4].images[0].set_extent((-0.5, width - 0.5, height - 0.5, -0.5))
        for empty in [panel for panel in axes.values() if not panel.has_data()]:
            empty.remove()
    _save(figure, path)


def save_calibration_figure(
    path: Path,
    names: Sequence[str],
    channels: Sequence[Channel],
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
) -> None:
    """Draw the radii at each step, a frame and its background, a row for each channel, as a
    PNG of 900 pixels in width."""
    figure = Figure((9.0, 2.6 * len(channels)), dpi=100, layout="constrained")
    rows = figure.subplots(len(channels), 3, squeeze=False)
    for number, (channel, row) in enumerate(zip(channels, rows, strict=True)):
        steps, left, right = row
        steps.plot(history.radii[:, number, -2:], "o-", ms=3, label=("y", "x"))
        steps.set(title=names[number], xlabel="step", ylabel="radius (px)")
        steps.legend()
        middle = len(channel) // 2
        # Of frames that do not fit in memory, fewer make no difference to the eye.
        most = 2**24 // math.prod(channel.shape[1:])
        first = max(0, middle - min(module.halo_frames, most))
        frames = channel[first : 2 * middle - first + 1]
        bkgds = one_channel(module, number).for_inference()(frames).bkgds
        frame, bkgd = frames[middle - first], np.asarray(bkgds[middle - first])
        _show(left, f"frame {middle}", frame, "magma", _limits(frame))
        _show(right, "background", bkgd, "viridis", _limits(bkgd))
    _save(figure, path)


def save_camera_figure(path: Path, report: CameraReport) -> None:
    """Draw the maps of a camera, and the line of variance over brightness, as a PNG of 900
    pixels in width."""
    names = "offset (ADU)", "gain (e-/ADU)", "read noise (e-)"
    maps = zip(names, map(np.asarray, report[:3]), strict=True)
    shown = {name: values for name, values in maps if values.ndim}
    has_line = len(report.levels_adu) > 0
    figure = Figure((9.0, 2.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(shown) + has_line, squeeze=False)[0]
    for axes, (name, image) in zip(panels, shown.items(), strict=False):
        _show(axes, name, image, "viridis", _limits(image))
    if has_line:
        slope = 1 / float(np.median(report.gain_electrons_per_adu))
        top = float(report.levels_adu.max())
        panels[-1].plot(report.levels_adu, report.variances_adu2, "o", ms=3)
        panels[-1].plot([0, top], [0, slope * top], "k-", lw=1)
        panels[-1].set(title="variance (ADU²)", xlabel="light (ADU)")
    _save(figure, path)


def _limits(image: Real[np.ndarray, "..."]) -> Limits:
    """The limits of the colours; molecules and noise beyond them saturate."""
    if not np.isfinite(image).any():
        return 0.0, 1.0
    low, high = np.percentile(image[np.isfinite(image)], [0.5, 99.8])
    return float(low), float(high)


def _show(axes: Axes, title: str, image: Image, colours: str, limits: Limits) -> None:
    axes.set_title(title)
    shown = axes.imshow(image, colours, clim=limits, interpolation="nearest")
    axes.figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.05, 1)))


def _save(figure: Figure, path: Path) -> None:
    """Save in 256 colours: noise hardly compresses, and a pixel is one byte then."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    image = PIL.Image.open(drawn).convert("RGB")
    image.quantize(256, PIL.Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())

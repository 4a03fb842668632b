"""`jaxbkgd calibrate`: the averaging radii of a movie, learned from the movie itself."""

import contextlib
import functools as ft
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from .._calibration import calibrate as calibration
from .._calibration.calibrate import CalibrationHistory
from .._calibration.objectives import FramePairLoss
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .._movies.open import open_movie
from .._workers import progress_bar, run_interruptibly
from . import arguments
from .arguments import CLIP_HELP, one_channel, USUAL_RADIUS
from .figures import save_calibration_figure
from .report import check_output, clip_rows, print_table, printable, refusing, write_whole


OPTIONS = f"""
movies MOVIE: Movies of the same length, of one channel or more each.
out CALIBRATION.json: The file to write.
figure FIGURE.png: The figure to draw, by default beside CALIBRATION.json.
radius PIXELS: The radii to start from: y,x to learn two, or a number for one.
max_radius PIXELS: The largest radius allowed.
radius_frames FRAMES: Average over time too, and learn its radius from here.
max_radius_frames FRAMES: The largest radius in time allowed, by default 60.
clip DEVIATIONS: {CLIP_HELP}
lag FRAMES>=1: The distance of the two frames of a pair, longer than molecules stay on; by
  default found from the movie.
steps COUNT>=1: The most steps to take.
overwrite --overwrite: Replace CALIBRATION.json and FIGURE.png if they exist.
"""

_Module = SpatialMean | LocalMean


def calibrate(
    movies: list[Path],
    out: Path = Path("calibration.json"),
    figure: Path | None = None,
    radius: str = "7,7",
    max_radius: float = 60.0,
    radius_frames: float | None = None,
    max_radius_frames: float | None = None,
    clip: str | None = None,
    lag: int | None = None,
    steps: int = 200,
    overwrite: bool = False,
) -> None:
    """Learn the averaging radii of a movie from the movie itself.

    Prints the radii and the error that they save, and writes them for
    `jaxbkgd estimate --calibration`. Ctrl-C keeps the best radii so far.
    """
    png = out.with_suffix(".png") if figure is None else figure
    check_output(out, ".json", overwrite=overwrite)
    check_output(png, ".png", overwrite=overwrite)
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        channels = [channel for movie in opened for channel in movie.channels]
        if radius_frames is not None and max_radius_frames is None:
            max_radius_frames = 60.0
        start = arguments.chosen_estimator(
            f"--radius {radius}, --max-radius {max_radius:g}",
            len(channels) * [arguments.parsed_radius(radius)],
            radius_frames,
            clip,
            max_radius_pix=max_radius,
            max_radius_frames=max_radius_frames,
        )
        with refusing(", ".join(map(str, movies))):
            module, history = calibration.calibrate(
                channels, start, objective=FramePairLoss(lag), steps=steps
            )
        names = []
        for channel in channels:
            number = f", channel {channel.index + 1}" if channel.movie.shape[1] > 1 else ""
            names.append(printable(Path(channel.movie.name).name) + number)
        _write(out, names, module, history, None)
        kept = f"the radii are in {out}, and there is no figure"
        try:
            if history.stop_reason.startswith("interrupted"):
                remedy = "the same command with --overwrite starts over"
                kept = f"the best radii so far are in {out}; {remedy}"
                raise KeyboardInterrupt
            bound = module.max_radius_pix
            grid_pix = np.geomspace(min(1, bound / 10), 0.99 * bound, 15)
            losses = _channel_losses(module, history, channels, grid_pix)
            _print_calibration(names, module, history, losses)
            _write(out, names, module, history, losses)
            print(f"wrote {printable(out)}")
            draw = ft.partial(save_calibration_figure, png, names, channels)
            run_interruptibly(draw, module, history, grid_pix, losses[:, 2:])
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(kept)
            raise
        print(f"wrote {printable(png)}")


def _write(
    path: Path, names: list[str], module: _Module, history: CalibrationHistory, losses: Any
) -> None:
    about: dict[str, Any] = {
        "movies": names,
        "lag": history.lag,
        "radii_std": _json_numbers(history.radii_std),
        "is_at_bound": history.is_at_bound.tolist(),
        "is_converged": history.is_converged,
        "stop_reason": history.stop_reason,
        "steps": len(history.losses),
    }
    if losses is not None:
        about["loss"] = _json_numbers(losses[:, 0])
        about[f"loss_at_{USUAL_RADIUS}_pix"] = _json_numbers(losses[:, 1])
    fields = json.loads(module.to_json()) | {"calibration": about}
    write_whole(path, json.dumps(fields, indent=2, allow_nan=False).encode())


def _json_numbers(values: Any) -> Any:
    """Lists of numbers to 4 digits, with None for those that are not finite."""
    if np.ndim(values):
        return [_json_numbers(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def _channel_losses(
    module: _Module,
    history: CalibrationHistory,
    channels: Sequence[Channel],
    grid_pix: Float[np.ndarray, " radii"],
) -> Float[np.ndarray, "channels losses"]:
    """The loss of each channel at its radii, at the usual radius, and over the grid."""
    others = [[radius, radius] for radius in (float(USUAL_RADIUS), *grid_pix.tolist())]
    bound = max(module.max_radius_pix, 2 * float(USUAL_RADIUS))
    losses = []
    with progress_bar(len(channels)) as report:
        for number, channel in enumerate(channels):
            report(number, f"channel {number + 1}: drawing the loss")
            rows = [module.radii_pix[number].tolist(), *others]
            alone = ft.partial(one_channel, module, number, max_radius_pix=bound)
            estimators = [alone(radii_pix=[row]) for row in rows]
            losses.append(calibration.losses_at(estimators, [channel], history.objective))
    return np.stack(losses)


def _print_calibration(
    names: list[str], module: _Module, history: CalibrationHistory, losses: np.ndarray
) -> None:
    columns = []
    for number, name in enumerate(names):
        column = {"movie": name}
        for axis in range(-len(module.radius_units), 0):
            radius, std = module.radii[number, axis], history.radii_std[number, axis]
            unit, is_at_bound = module.radius_units[axis], history.is_at_bound[number, axis]
            rest = f" {unit}, {'at its bound' if is_at_bound else 'uncertainty unknown'}"
            if np.isfinite(std):
                # The uncertainty is not below the last digit.
                rest = f" +- {max(std, 0.01):.2f} {unit}"
            column[f"radius in {('time', 'y', 'x')[axis]}"] = f"{radius:.2f}{rest}"
        learned, usual = losses[number, :2].tolist()
        column |= clip_rows(module)
        column["RMS error, learned"] = _error_text(learned)
        column[f"RMS error at r = {USUAL_RADIUS}"] = _error_text(usual)
        is_measured = min(learned, usual) > 0
        change = f"{100 * (math.sqrt(learned / usual) - 1):+.0f} %" if is_measured else ""
        columns.append(column | {"  change": change})
    print_table("Radii learned from the movie itself", columns)
    print(f"lag        {history.lag} frame{'s' if history.lag != 1 else ''}")
    print(f"converged  {'yes' if history.is_converged else 'no'}: {history.stop_reason}")


def _error_text(loss: float) -> str:
    """The root of the loss, a mean square error over the variance of the noise."""
    return f"{loss**0.5:.3f} of the noise" if loss > 0 else "below what can be measured"

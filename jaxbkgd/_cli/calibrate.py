"""`jaxbkgd calibrate`: the averaging radii of a movie, learned from the movie itself."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Argument, Option

from .._calibration import calibrate as calibration
from .._calibration.calibrate import CalibrationHistory
from .._calibration.objectives import FramePairLoss
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Channel
from .._movies.open import open_movie
from .._workers import progress_lines, run_interruptibly
from . import arguments
from .arguments import CLIP, one_channel, OVERWRITE, USUAL_RADIUS
from .figures import save_calibration_figure
from .programs import keep_programs
from .report import check_output, clip_rows, print_table, printable, refusing, write_whole


_Module = SpatialMean | LocalMean

_MOVIES = Argument(help="Movies of the same length, of one channel or more each.")
_OUT = Option(help="The .json file to write; a figure, .png, is drawn beside it.")
_RADIUS = Option(help="In pixels, to start from: y,x to learn two, or a number for one.")
_BOUND = Option(help="The largest radius allowed, in pixels.")
_TIME = Option(help="Average over time too, from this radius in frames on, up to 60.")
_LAG = Option(min=1, help="Longer than molecules stay on, in frames; else it is found.")
_STEPS = Option(min=1, help="The most steps to take.")


def calibrate(
    movies: Annotated[list[Path], _MOVIES],
    out: Annotated[Path, _OUT] = Path("calibration.json"),
    radius: Annotated[str, _RADIUS] = "7,7",
    max_radius: Annotated[float, _BOUND] = 60.0,
    radius_frames: Annotated[float | None, _TIME] = None,
    clip: Annotated[str | None, CLIP] = None,
    lag: Annotated[int | None, _LAG] = None,
    steps: Annotated[int, _STEPS] = 200,
    overwrite: Annotated[bool, OVERWRITE] = False,
) -> None:
    """Learn the averaging radii of a movie from the movie itself.

    Prints the radii and the error that they save, and writes them for
    `jaxbkgd estimate --calibration`. Ctrl-C keeps the best radii so far.
    """
    keep_programs()
    png = out.with_suffix(".png")
    check_output(out, ".json", overwrite=overwrite)
    check_output(png, ".png", overwrite=overwrite)
    with contextlib.ExitStack() as files:
        files.enter_context(progress_lines())
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        channels = [channel for movie in opened for channel in movie.channels]
        bounds = {"max_radius_pix": max_radius}
        if radius_frames is not None:
            bounds["max_radius_frames"] = 60.0
        given = f"--radius {radius}, --max-radius {max_radius:g}"
        rows = len(channels) * [arguments.parsed_radius(radius)]
        start = arguments.chosen_estimator(given, rows, radius_frames, clip, **bounds)
        with refusing(", ".join(map(str, movies))):
            module, history = calibration.calibrate(
                channels, start, objective=FramePairLoss(lag), steps=steps
            )
        names = [_name(channel) for channel in channels]
        _write(out, names, module, history)
        # What is there is of other radii.
        png.unlink(missing_ok=True)
        kept = f"the radii are in {out}, and there is no figure"
        try:
            if history.stop_reason.startswith("interrupted"):
                remedy = "the same command with --overwrite starts over"
                kept = f"the best radii so far are in {out}; {remedy}"
                raise KeyboardInterrupt
            columns = [
                {"movie": name} | _rows(module, history, number, channel)
                for number, (name, channel) in enumerate(zip(names, channels, strict=True))
            ]
            print_table("Radii learned from the movie itself", columns)
            print(f"lag        {history.lag} frame{'s' if history.lag != 1 else ''}")
            state = "converged" if history.is_converged else "not converged"
            print(f"{state}: {history.stop_reason}")
            print(f"wrote {printable(out)}")
            run_interruptibly(
                save_calibration_figure, png, names, channels, module, history
            )
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(kept)
            raise
        print(f"wrote {printable(png)}")


def _name(channel: Channel) -> str:
    number = f", channel {channel.index + 1}" if channel.movie.shape[1] > 1 else ""
    return printable(Path(channel.movie.name).name) + number


def _write(
    path: Path, names: list[str], module: _Module, history: CalibrationHistory
) -> None:
    # JSON has no NaN, which an unknown deviation is.
    rows = history.radii_std.tolist()
    about = {
        "movies": names,
        "lag": history.lag,
        "radii_std": [[std if np.isfinite(std) else None for std in row] for row in rows],
        "is_at_bound": history.is_at_bound.tolist(),
        "is_converged": history.is_converged,
        "stop_reason": history.stop_reason,
        "steps": len(history.losses),
    }
    fields = json.loads(module.to_json()) | {"calibration": about}
    write_whole(path, json.dumps(fields, indent=2, allow_nan=False).encode())


def _rows(
    module: _Module, history: CalibrationHistory, number: int, channel: Channel
) -> dict[str, str]:
    """What is printed of a channel."""
    rows = {}
    for axis in range(-len(module.radius_units), 0):
        radius, std = module.radii[number, axis], history.radii_std[number, axis]
        unit, is_at_bound = module.radius_units[axis], history.is_at_bound[number, axis]
        rest = f" {unit}, {'at its bound' if is_at_bound else 'uncertainty unknown'}"
        if np.isfinite(std):
            rest = f" +- {max(std, 0.01):.2f} {unit}"
        rows[f"radius in {('time', 'y', 'x')[axis]}"] = f"{radius:.2f}{rest}"
    usual_pix = float(USUAL_RADIUS)
    bound_pix = max(module.max_radius_pix, 2 * usual_pix)
    estimators = [
        one_channel(module, number, max_radius_pix=bound_pix, radii_pix=[pair])
        for pair in (module.radii_pix[number].tolist(), [usual_pix, usual_pix])
    ]
    losses = calibration.losses_at(estimators, [channel], history.objective)
    for name, loss in zip(("learned", f"at r = {USUAL_RADIUS}"), losses, strict=True):
        # The loss is a mean square error over the variance of the noise.
        text = f"{loss**0.5:.3f} of the noise" if loss > 0 else "below what can be measured"
        rows[f"RMS error, {name}"] = text
    return rows | clip_rows(module)

"""`jaxbkgd calibrate`: the averaging radii of a movie, learned from the movie itself."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import optax

from .._calibration import calibrate as calibration
from .._calibration.calibrate import CalibrationHistory
from .._calibration.objectives import FramePairLoss
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import MovieError
from .._movies.open import open_movie
from .figures import save_calibration_figure
from .learned import channel_losses, channel_name, drawn_channel, print_calibration
from .main import at_ctrl_c
from .options import check_needs_time, CLIP_HELP, parsed_clip, parsed_radius, USUAL_RADIUS
from .report import check_output, printable, require, UsageError, write_whole


# The loss is drawn at so many radii.
_GRID_RADII = 15

OPTIONS = {
    "movies": ("MOVIE", "Movies of the same length, of one channel or more each."),
    "out": ("CALIBRATION.json", "The file to write."),
    "figure": ("FIGURE.png", "The figure to draw, by default beside CALIBRATION.json."),
    "radius": ("PIXELS", "The radii to start from: y,x to learn two, or a number for one."),
    "max_radius": ("PIXELS", "The largest radius allowed."),
    "radius_frames": ("FRAMES", "Average over time too, and learn its radius from here."),
    "max_radius_frames": ("FRAMES", "The largest radius in time allowed, by default 60."),
    "clip": ("DEVIATIONS", CLIP_HELP),
    "lag": (
        "FRAMES",
        "The distance of the two frames of a pair, longer than molecules stay on; by "
        "default found from the movie.",
        1,
    ),
    "steps": ("COUNT", "The most steps to take.", 1),
    "overwrite": ("--overwrite", "Replace CALIBRATION.json and FIGURE.png if they exist."),
}


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
    require("matplotlib", "PIL")
    png = out.with_suffix(".png") if figure is None else figure
    check_output(out, ".json", overwrite=overwrite)
    check_output(png, ".png", overwrite=overwrite)
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        channels = [channel for movie in opened for channel in movie.channels]
        rows = len(channels) * [parsed_radius(radius)]
        start = _start(rows, max_radius, radius_frames, max_radius_frames, clip)
        found = _Found(out, [channel_name(channel) for channel in channels])
        files.enter_context(at_ctrl_c(found.keep))
        try:
            module, history = calibration.calibrate(
                channels,
                start,
                objective=FramePairLoss(lag),
                optimizer=_noting(calibration.secant_descent(), start, found),
                steps=steps,
            )
        except MovieError:
            raise
        # The movies and options do not fit a calibration.
        except ValueError as error:
            raise UsageError(f"{', '.join(map(str, movies))}: {error}") from error
        found.note(module, history)
        bound = module.max_radius_pix
        grid_pix = np.geomspace(min(1, bound / 10), 0.99 * bound, _GRID_RADII)
        losses = channel_losses(module, history.objective, channels, grid_pix)
        print_calibration(found.names, module, history, losses)
        found.note(module, history, losses)
        found.write()
        print(f"wrote {printable(out)}")
        drawn = [
            drawn_channel(number, module, history, channel, grid_pix, losses[number, 2:])
            for number, channel in enumerate(channels)
        ]
        save_calibration_figure(png, drawn)
        print(f"wrote {printable(png)}")


class _Found:
    """The best radii so far, as the text of the file `out`, which Ctrl-C leaves too."""

    def __init__(self, out: Path, names: list[str]) -> None:
        self.names = names
        self.loss = math.inf
        self._out = out
        self._text = ""
        self._is_written = False

    def note(
        self,
        module: SpatialMean | LocalMean,
        history: CalibrationHistory | None = None,
        losses: np.ndarray | None = None,
    ) -> None:
        about: dict[str, Any] = {"movies": self.names, "is_converged": False}
        if history is not None:
            about |= {
                "lag": history.objective.lag,
                "radii_std_pix": _json_numbers(history.radii_std_pix),
                "is_at_bound": history.is_at_bound.tolist(),
                "is_converged": history.is_converged,
                "stop_reason": history.stop_reason,
                "steps": len(history.losses),
            }
        if losses is not None:
            about["loss"] = _json_numbers(losses[:, 0])
            about[f"loss_at_{USUAL_RADIUS}_pix"] = _json_numbers(losses[:, 1])
        fields = json.loads(module.to_json()) | {"calibration": about}
        self._text = json.dumps(fields, indent=2, allow_nan=False) + "\n"

    def write(self) -> None:
        write_whole(self._out, self._text.encode())
        self._is_written = True

    def keep(self) -> str | None:
        if self._is_written:
            return f"the radii are in {self._out}, and there is no figure"
        if not self._text:
            return None
        self.write()
        remedy = "the same command with --overwrite starts over"
        return f"the best radii so far are in {self._out}; {remedy}"


def _noting(
    optimizer: optax.GradientTransformation, start: SpatialMean | LocalMean, found: _Found
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which notes the best radii that it is shown."""
    optimizer = optax.with_extra_args_support(optimizer)
    _, rest = eqx.partition(start, eqx.is_inexact_array)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if extra["value"] < found.loss:
            found.loss = float(extra["value"])
            found.note(eqx.combine(params, rest))
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _start(
    rows: list[tuple[float, ...]],
    max_radius: float,
    radius_frames: float | None,
    max_radius_frames: float | None,
    clip: str | None,
) -> SpatialMean | LocalMean:
    """The estimator to start from, with a row of one radius or two for each channel."""
    given = f"--radius {','.join(f'{radius:g}' for radius in rows[0])}"
    given += f", --max-radius {max_radius:g}"
    try:
        if radius_frames is None:
            check_needs_time("--clip", clip)
            if max_radius_frames is not None:
                check_needs_time("--max-radius-frames", f"{max_radius_frames:g}")
            return SpatialMean(rows, max_radius_pix=max_radius)
        bound = 60.0 if max_radius_frames is None else max_radius_frames
        given += f", --radius-frames {radius_frames:g}, --max-radius-frames {bound:g}"
        return LocalMean(
            rows,
            radius_frames,
            clip=parsed_clip(clip),
            max_radius_pix=max_radius,
            max_radius_frames=bound,
        )
    except ValueError as error:
        raise UsageError(f"{given}: {error}") from error


def _json_numbers(values: Any) -> Any:
    """Lists of numbers to 4 digits, with None for those that are not finite."""
    if np.ndim(values):
        return [_json_numbers(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None

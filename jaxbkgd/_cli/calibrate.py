"""`jaxbkgd calibrate`: the averaging radii of a movie, learned from the movie itself."""

import contextlib
import json
import math
from collections.abc import Sequence
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
from .._movies.movie import Channel, MovieError
from .._movies.open import open_movie
from .._workers import progress_bar
from .figures import CalibratedChannel, save_calibration_figure
from .main import at_ctrl_c
from .options import check_needs_time, CLIP_HELP, parsed_clip, parsed_radius, USUAL_RADIUS
from .report import (
    check_output,
    clip_rows,
    print_table,
    printable,
    require,
    UsageError,
    write_whole,
)


_USUAL_RADIUS_PIX = float(USUAL_RADIUS)
# The loss is drawn at so many radii, and a frame with at most so many pixels around it.
_GRID_RADII, _FIGURE_PIXELS = 15, 2**25

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
        found = _Found(out, [_channel_name(channel) for channel in channels])
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
        losses = _channel_losses(module, history.objective, channels, grid_pix)
        _print_calibration(found.names, module, history, losses)
        found.note(module, history, losses)
        found.write()
        print(f"wrote {printable(out)}")
        drawn = [
            _drawn_channel(number, module, history, channel, grid_pix, losses[number, 2:])
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


def _with_radii_pix(
    module: SpatialMean | LocalMean,
    number: int,
    radii_pix: tuple[float, float],
    bound: float | None,
) -> SpatialMean | LocalMean:
    """The module for the channel of this number alone, with other radii in space."""
    if isinstance(module, SpatialMean):
        return SpatialMean(radii_pix, max_radius_pix=bound)
    return LocalMean(
        radii_pix,
        float(module.radius_frames[number]),
        clip=module.clip,
        max_radius_pix=bound,
        max_radius_frames=module.max_radius_frames,
    )


def _channel_name(channel: Channel) -> str:
    """The name of its file, and its number where the file holds several."""
    movie = channel.movie
    number = f", channel {channel.index + 1}" if movie.shape[1] > 1 else ""
    return printable(Path(movie.name).name) + number


def _channel_losses(
    module: SpatialMean | LocalMean,
    objective: FramePairLoss,
    channels: Sequence[Channel],
    grid_pix: np.ndarray,
) -> np.ndarray:
    """The loss of each channel at its radii, at the usual radius, and over the grid."""
    others = [(radius, radius) for radius in (_USUAL_RADIUS_PIX, *grid_pix.tolist())]
    bound = max(module.max_radius_pix, 2 * _USUAL_RADIUS_PIX)
    losses = []
    with progress_bar(len(channels)) as report:
        for number, channel in enumerate(channels):
            report(number, f"channel {number + 1}: drawing the loss")
            y, x = module.radii_pix[number].tolist()
            pairs = [(y, x), *others]
            estimators = [_with_radii_pix(module, number, pair, bound) for pair in pairs]
            losses.append(calibration.losses_at(estimators, [channel], objective))
    return np.stack(losses)


def _drawn_channel(
    number: int,
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
    channel: Channel,
    grid_pix: np.ndarray,
    grid_losses: np.ndarray,
) -> CalibratedChannel:
    middle = len(channel) // 2
    y, x = module.radii_pix[number].tolist()
    estimators = [
        _with_radii_pix(module, number, (share * y, share * x), None).for_inference()
        for share in (0.5, 1, 2)
    ]
    # Of frames that do not fit in memory, fewer make no difference to the eye.
    most = _FIGURE_PIXELS // (2 * math.prod(channel.shape[1:]))
    reach = min(estimators[0].halo_frames, most)
    first = max(0, middle - reach)
    frames = channel[first : middle + reach + 1]
    bkgds = [estimator(frames).bkgds[middle - first] for estimator in estimators]
    return CalibratedChannel(
        f"Channel {number + 1}: {_channel_name(channel)}, frame {middle}",
        radii_pix=np.array([y, x]),
        # The figure shows no radius in time.
        radii_std_pix=history.radii_std_pix[number, -2:],
        path_pix=history.radii_pix[:, number, -2:],
        grid_pix=grid_pix,
        grid_losses=grid_losses,
        frame=frames[middle - first],
        bkgds=np.stack(bkgds),
    )


def _print_calibration(
    names: Sequence[str],
    module: SpatialMean | LocalMean,
    history: CalibrationHistory,
    losses: np.ndarray,
) -> None:
    units = {"radius in y": "px", "radius in x": "px"}
    if isinstance(module, LocalMean):
        units = {"radius in time": "frames", **units}
    columns = []
    for number, name in enumerate(names):
        learned, usual = losses[number, :2].tolist()
        radii = zip(
            units.items(),
            calibration.radii_of(module)[number].tolist(),
            history.radii_std_pix[number].tolist(),
            history.is_at_bound[number].tolist(),
            strict=True,
        )
        change = 100 * (np.sqrt(learned / usual) - 1) if min(learned, usual) > 0 else np.nan
        columns.append(
            {"movie": name}
            | {axis: _radius_text(*values, unit) for (axis, unit), *values in radii}
            | clip_rows(module)
            | {
                "RMS error, learned": _error_text(learned),
                f"RMS error at r = {USUAL_RADIUS}": _error_text(usual),
                "  change": f"{change:+.0f} %" if np.isfinite(change) else "",
            }
        )
    print_table("Radii learned from the movie itself", columns)
    lag = history.objective.lag
    print(f"lag        {lag} frame{'s' if lag > 1 else ''}")
    print(f"converged  {'yes' if history.is_converged else 'no'}: {history.stop_reason}")


def _radius_text(radius: float, std: float, is_at_bound: bool, unit: str) -> str:
    if is_at_bound:
        return f"{radius:.2f} {unit}, at its bound"
    if not np.isfinite(std):
        return f"{radius:.2f} {unit}, uncertainty unknown"
    # The uncertainty is not below the last digit.
    return f"{radius:.2f} +- {max(std, 0.01):.2f} {unit}"


def _error_text(loss: float) -> str:
    """The root of the loss, a mean square error over the variance of the noise."""
    return f"{np.sqrt(loss):.3f} of the noise" if loss > 0 else "below what can be measured"


def _json_numbers(values: Any) -> Any:
    """Lists of numbers to 4 digits, with None for those that are not finite."""
    if np.ndim(values):
        return [_json_numbers(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None

"""`jaxbkgd calibrate`: the averaging radii of a movie, learned from the movie itself."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from .._calibration import calibrate as calibration
from .._calibration.history import CalibrationHistory
from .._calibration.objectives import FramePairLoss
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel
from .._movies.open import open_movie
from .._workers import progress_lines, run_interruptibly
from . import arguments, report
from .figures import save_calibration_figure
from .programs import keep_programs
from .report import refusing, UsageError


_MOVIES = Argument(help="Movies of the same length, of one channel or more each.")
_OUT = Option(help="The .json file to write; a figure, .png, is drawn beside it.")
_RADIUS = Option(
    help="Learn the plain mean, starting from this radius in pixels: a number, or y,x for "
    "two radii. By default, the best estimator is found."
)
_BOUND = Option(help="With --radius: the largest radius allowed, 60 px by default.")
_TIME = Option(
    help="Learn a mean over time, starting from this radius in frames, up to 60."
)
_LAG = Option(min=1, help="With --radius: more frames than molecules stay on.")
_STEPS = Option(min=1, help="With --radius: the largest number of steps.")


def calibrate(
    movies: Annotated[list[Path], _MOVIES],
    out: Annotated[Path, _OUT] = Path("calibration.json"),
    radius: Annotated[str | None, _RADIUS] = None,
    max_radius: Annotated[float | None, _BOUND] = None,
    radius_frames: Annotated[float | None, _TIME] = None,
    clip: Annotated[str | None, arguments.CLIP] = None,
    lag: Annotated[int | None, _LAG] = None,
    steps: Annotated[int | None, _STEPS] = None,
    camera: Annotated[list[Path] | None, arguments.CAMERA] = None,
    offset: Annotated[list[float] | None, arguments.OFFSET] = None,
    gain: Annotated[list[float] | None, arguments.GAIN] = None,
    read_noise: Annotated[list[float] | None, arguments.READ_NOISE] = None,
    overwrite: Annotated[bool, arguments.OVERWRITE] = False,
    debug: Annotated[bool, arguments.DEBUG] = False,
) -> None:
    """Find the best estimator of a movie, as `jaxbkgd estimate` does before it estimates.

    Prints radii, errors and doubts, and writes them for `jaxbkgd estimate --calibration`.
    With --radius, Ctrl-C keeps the best radii so far.
    """
    keep_programs()
    png = out.with_suffix(".png")
    report.check_output(out, ".json", overwrite=overwrite)
    report.check_output(png, ".png", overwrite=overwrite)
    is_given = radius is not None or radius_frames is not None
    for name, value in {"max-radius": max_radius, "lag": lag, "steps": steps}.items():
        if value is not None and not is_given:
            raise UsageError(f"--{name} {value}: needs --radius or --radius-frames")
    with contextlib.ExitStack() as files:
        files.enter_context(progress_lines())
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        channels = [channel for movie in opened for channel in movie.channels]
        numbers = {"offset": offset, "gain": gain, "read-noise": read_noise}
        cameras = arguments.chosen_cameras(camera, numbers, len(channels))
        options: dict[str, Any] = {"camera": cameras}
        if is_given or clip is not None:
            usual = arguments.USUAL_RADIUS
            text = f"{usual},{usual}" if radius is None else radius
            bound = 60.0 if max_radius is None else max_radius
            bounds = {"max_radius_pix": bound}
            if radius_frames:
                bounds["max_radius_frames"] = 60.0
            given = f"--radius {text}, --max-radius {bound:g}"
            rows = len(channels) * [arguments.parsed_radius(text)]
            start = arguments.chosen_estimator(given, rows, radius_frames, clip, **bounds)
            options |= {"estimator": start, "objective": FramePairLoss(lag)}
            options["steps"] = 200 if steps is None else steps
        with refusing(", ".join(map(str, movies))):
            estimator, history = calibration.calibrate(channels, **options)
        names = [_name(channel) for channel in channels]
        about = {"movies": names} | history.about() | {"rows": history.rows()}
        report.write_calibration(out, estimator, about)
        kept = f"the radii are in {out}, and there is no figure"
        try:
            if history.stop_reason.startswith("interrupted"):
                remedy = "the same command with --overwrite starts over"
                kept = f"the best radii so far are in {out}; {remedy}"
                raise KeyboardInterrupt
            for doubt in history.doubts:
                report.say(doubt)
            report.print_rows(_rows(names, estimator, history))
            print(f"wrote {report.printable(out)}")
            if len(history.losses):
                run_interruptibly(
                    save_calibration_figure, png, names, channels, estimator, history
                )
                print(f"wrote {report.printable(png)}")
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(kept)
            raise


def _name(channel: Channel) -> str:
    number = f", channel {channel.index + 1}" if channel.movie.shape[1] > 1 else ""
    return report.printable(Path(channel.movie.name).name) + number


def _rows(
    names: list[str], estimator: RadiiEstimator, history: CalibrationHistory
) -> dict[str, str]:
    """What is printed, the channels one after the other."""
    return {
        "movie": "; ".join(names),
        "radius": report.radii_text(estimator, history.radii_std),
        **report.clip_rows(estimator),
        **history.rows(),
        "lag": "not found" if history.lag is None else f"{history.lag} frames",
        "search": history.stop_reason,
    }

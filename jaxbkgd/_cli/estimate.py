"""`jaxbkgd estimate`: the background of a movie, from a file to a file."""

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from typer import Argument, Option

from .._batch.compute import Dtype, make_output, Quantity
from .._batch.follow import CALIBRATION_FRAMES, DEFAULT_SILENCE, open_followed
from .._batch.names import number_paths, paths_beside, without_suffix
from .._batch.results import check_targets, group_targets
from .._batch.run import estimate_movie
from .._calibration.cameras import cameras_of
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.open import is_split, open_channels, open_sources
from .._workers import one_thread_a_call, progress_lines, run_interruptibly
from . import arguments, outcome, report
from .figures import save_movie_figure
from .kept import kept_calibration, lock_output
from .programs import keep_programs
from .report import refusing, UsageError


_MOVIES = Argument(
    help="A file, a folder or a quoted pattern; several, one for each channel."
)
_OUT = Option(
    help="A .tif, .ome.tif, .zarr, .ome.zarr or, for Picasso, .raw, by default "
    "MOVIE-background.tif; for several results OUT-1, OUT-2."
)
_RADIUS = Option(
    help="Use the plain mean with this radius in pixels, without a calibration: a number, "
    f"such as {arguments.USUAL_RADIUS}, or y,x. {arguments.SHARED}"
)
_TIME = Option(
    help=f"Average over time too, with this radius in frames. {arguments.SHARED}"
)
_MASK = Option(
    help="A .npy or .tif that is 0 in pixels to leave out; not with --radius alone."
)
_CALIBRATION = Option(help="Use this .json of an earlier run or of `jaxbkgd calibrate`.")
_CHANNEL = Option(min=1, help="The channel of the calibration to use, from 1 on.")
_BOXES = Option(
    help="Parts of the frame to use as channels, in pixels: 'x0,y0,x1,y1;x0,y0,x1,y1'."
)
_FRAMES = Option(help="Frames START:STOP, counted from 0, without STOP, such as 1000:5000.")
_EVERY = Option(help="STEP or STEP:FIRST, such as 4:1 for every 4th frame from frame 1.")
_QUANTITY = Option(help="residual is frames minus background; snr needs --gain, --offset.")
_DTYPE = Option(help="uint16 rounds, and needs --pedestal for residuals.")
_PEDESTAL = Option(
    help="A number to add to the result; for residuals in uint16, the offset plus the mean "
    "background."
)
_WORKERS = Option(min=1, help="The number of threads, by default one for each core.")
_CHUNK = Option(
    min=1, help="The number of frames in a chunk, by default of about a megapixel."
)
_FOLLOW = Option("--follow", help="The movie is still being written: keep up with it.")
_SILENCE = Option(
    help="With --follow: stop after this many seconds without new frames.",
    show_default="10 s",
)
_AHEAD = Option(
    min=0,
    help="With --follow: frames to wait for after each chunk, by default all that it "
    "depends on.",
)
# More files than this are hardly channels, but a pattern that the shell has expanded.
_MANY_CHANNELS = 8
_RESUME = Option("--resume/--fresh", help="Resume an interrupted run, or start over.")


def estimate(
    movies: Annotated[list[Path], _MOVIES],
    out: Annotated[Path | None, _OUT] = None,
    radius: Annotated[list[str] | None, _RADIUS] = None,
    radius_frames: Annotated[list[float] | None, _TIME] = None,
    clip: Annotated[str | None, arguments.CLIP] = None,
    mask: Annotated[Path | None, _MASK] = None,
    calibration: Annotated[Path | None, _CALIBRATION] = None,
    channel: Annotated[int | None, _CHANNEL] = None,
    channels: Annotated[str | None, _BOXES] = None,
    frames: Annotated[str | None, _FRAMES] = None,
    every: Annotated[str | None, _EVERY] = None,
    quantity: Annotated[Quantity, _QUANTITY] = "background",
    dtype: Annotated[Dtype, _DTYPE] = "float32",
    pedestal: Annotated[float, _PEDESTAL] = 0.0,
    camera: Annotated[list[Path] | None, arguments.CAMERA] = None,
    offset: Annotated[list[float] | None, arguments.OFFSET] = None,
    gain: Annotated[list[float] | None, arguments.GAIN] = None,
    read_noise: Annotated[list[float] | None, arguments.READ_NOISE] = None,
    workers: Annotated[int | None, _WORKERS] = None,
    chunk_frames: Annotated[int | None, _CHUNK] = None,
    follow: Annotated[bool, _FOLLOW] = False,
    silence: Annotated[float | None, _SILENCE] = None,
    look_ahead_frames: Annotated[int | None, _AHEAD] = None,
    resume: Annotated[bool, _RESUME] = True,
    overwrite: Annotated[bool, arguments.OVERWRITE] = False,
    debug: Annotated[bool, arguments.DEBUG] = False,
) -> None:
    """Estimate the background of a movie.

    The best estimator is found from the movie itself, unless --radius, --radius-frames or
    --calibration gives one. What is found is written beside the result,
    MOVIE-background.tif, as a .json, with a figure as a .png. After Ctrl-C or a crash, the
    same command resumes.
    """
    start = time.monotonic()
    one_thread_a_call()
    keep_programs()
    paths = movies if len(movies) > 1 else movies[0]
    if len(movies) > _MANY_CHANNELS:
        what = f"{len(movies)} files are as many channels; for one movie of all of them"
        report.say(f"{what}, give their folder, or a pattern in quotes")
    boxes = None if channels is None else arguments.parsed_boxes(channels)
    chosen = arguments.parsed_frames(frames, every)
    is_list = is_split(paths, boxes)
    if boxes is not None and len(movies) > 1:
        raise UsageError(f"--channels {channels}: boxes are parts of one movie; give one")
    if channel is not None and calibration is None:
        raise UsageError(f"--channel {channel}: needs --calibration")
    if look_ahead_frames is not None and not follow:
        raise UsageError(f"--look-ahead-frames {look_ahead_frames}: needs --follow")
    if silence is not None and not follow:
        raise UsageError(f"--silence {silence:g}: needs --follow")
    silence = DEFAULT_SILENCE if silence is None else silence
    is_given = bool(radius or radius_frames or calibration)
    with contextlib.ExitStack() as files:
        files.enter_context(progress_lines())
        if follow:
            least = 1 if is_given else CALIBRATION_FRAMES
            with refusing(f"--silence {silence:g}"):
                source, _ = open_followed(paths, silence, files, least, chosen)
        else:
            source = open_sources(paths, files)
        opened = open_channels(source, boxes, chosen, files=files)
        count = len(opened)
        shared = {"radius": radius, "radius-frames": radius_frames}
        arguments.check_counts(count, shared)
        numbers = {"offset": offset, "gain": gain, "read-noise": read_noise}
        cameras = arguments.chosen_cameras(camera, numbers, count)
        weights: Any = mask
        if mask is not None and mask.suffix.lower() == ".npy":
            with refusing(f"--mask {mask}"):
                weights = np.load(mask, mmap_mode="r")
        with refusing("--camera"):
            cut = cameras_of(cameras, opened)
        with refusing(f"--quantity {quantity}, --dtype {dtype}"):
            output = make_output(quantity, dtype, cut, pedestal)
        if quantity == "snr" and not (offset or camera):
            report.say("--quantity snr: the camera's offset counts as light; give --offset")
        sinks = paths_beside(paths, quantity, boxes)
        if out is not None:
            sinks = number_paths(out, count) if is_list else [out]
        for sink in sinks:
            report.check_name(sink)
        sink: Any = sinks if is_list else sinks[0]
        of_movie: dict[str, Any] = {"boxes": boxes, "frames": chosen, "weights": weights}
        of_movie["camera"] = cameras if is_list or count > 1 else cameras[0]
        base = without_suffix(out or paths_beside(movies[0], quantity)[0])
        json_path, png = (base.with_name(base.name + end) for end in (".json", ".png"))
        if clip is not None and not is_given:
            raise UsageError(f"--clip {clip}: {arguments.NEEDS_TIME}")
        kept = None
        if is_given:
            estimator = _given_estimator(shared, clip, calibration, channel, count)
        else:
            targets = group_targets(sink, count, is_list, [c.movie for c in opened])
            check_targets(targets, opened, dtype, overwrite=overwrite)
            files.enter_context(lock_output(json_path))
            kept = kept_calibration(
                json_path,
                sinks,
                source,
                opened,
                of_movie,
                resume=resume,
                overwrite=overwrite,
            )
            estimator = kept.estimator
        if mask is not None and not estimator.takes_weights:
            raise UsageError(f"--mask {mask}: {arguments.NEEDS_TIME}")
        try:
            summary = estimate_movie(
                source,
                estimator,
                sink,
                quantity=quantity,
                dtype=dtype,
                pedestal=pedestal,
                chunk_frames=chunk_frames,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                skips_hot_pixels=True,
                follow=silence if follow else False,
                look_ahead_frames=look_ahead_frames,
                **of_movie,
            )
            if follow:
                # All frames that have come.
                opened = open_channels(source, boxes, chosen, files=files)
            if kept is not None:
                panels = outcome.channel_panels(opened, sinks, output, cut, summary)
                lights, unexplained = summary.lights, kept.about["unexplained"]
                run_interruptibly(
                    save_movie_figure, png, opened, panels, lights, unexplained
                )
        except KeyboardInterrupt as interrupt:
            if kept is not None:
                interrupt.add_note(f"the calibration is kept in {json_path}")
            raise
        written = outcome.written_texts(summary, opened, output, cut)
    if kept is None:
        for sink in sinks:
            print(f"wrote {report.printable(sink)}")
        report.print_rows(outcome.given_rows(estimator, summary, written))
    else:
        names = ", ".join(map(str, [*sinks, json_path, png]))
        findings = kept.about["rows"]
        seconds = time.monotonic() - start
        rows = outcome.found_rows(estimator, summary, findings, written, names, seconds)
        report.print_rows(rows)


def _given_estimator(
    shared: dict[str, Any],
    clip: str | None,
    calibration: Path | None,
    channel: int | None,
    count: int,
) -> RadiiEstimator:
    """The estimator that options or a calibration describe."""
    if calibration is None:
        texts = shared["radius"] or [arguments.USUAL_RADIUS]
        rows = [(radii[0], radii[-1]) for radii in map(arguments.parsed_radius, texts)]
        given = f"--radius {'; '.join(texts)}"
        frames = shared["radius-frames"] or None
        return arguments.chosen_estimator(given, rows, frames, clip)
    for name, value in (shared | {"clip": clip}).items():
        if value:
            raise UsageError(f"--{name}: is in --calibration, too; leave one out")
    return arguments.read_calibration(calibration, channel, count)

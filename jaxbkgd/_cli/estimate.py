"""`jaxbkgd estimate`: the background of a movie, from a file to a file."""

import contextlib
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from typer import Argument, Option

from .._batch.compute import Dtype, make_output, Quantity
from .._batch.run import estimate_movie, MovieSummary
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.open import is_split, open_channels
from .._workers import one_thread_a_call
from . import arguments, report
from .arguments import CLIP, NEEDS_TIME, OVERWRITE, USUAL_RADIUS
from .report import refusing, UsageError


_SHARED = "Give it once for all channels, or once for each."
_MOVIES = Argument(
    help="A file, a folder or a quoted pattern; several, one for each channel."
)
_OUT = Option(
    help="A .tif, .ome.tif, .zarr or .ome.zarr; for several results OUT-1, OUT-2."
)
_RADIUS = Option(help=f"In pixels, {USUAL_RADIUS} by default: a number, or y,x. {_SHARED}")
_TIME = Option(help=f"Average over time too, with this radius in frames. {_SHARED}")
_MASK = Option(help="With --radius-frames: a .npy or .tif, 0 in pixels to leave out.")
_CALIBRATION = Option(help="A file of `jaxbkgd calibrate`, instead of radii and --clip.")
_CHANNEL = Option(min=1, help="The channel of the calibration to use, from 1 on.")
_BOXES = Option(help="Parts of frames that are channels: 'x0,y0,x1,y1;x0,y0,x1,y1', in px.")
_QUANTITY = Option(help="residual: frames minus background; snr needs --gain, --offset.")
_OFFSET = Option(help=f"The camera's offset in ADU, which is subtracted first. {_SHARED}")
_GAIN = Option(help=f"Electrons per ADU, for --quantity snr. {_SHARED}")
_WORKERS = Option(min=1, help="Threads, by default the cores.")
_CHUNK = Option(min=1, help="Frames in a chunk, by default a megapixel.")
_RESUME = Option("--resume/--fresh", help="Resume an interrupted run, or start over.")


def estimate(
    movies: Annotated[list[Path], _MOVIES],
    out: Annotated[Path, _OUT],
    radius: Annotated[list[str] | None, _RADIUS] = None,
    radius_frames: Annotated[list[float] | None, _TIME] = None,
    clip: Annotated[str | None, CLIP] = None,
    mask: Annotated[Path | None, _MASK] = None,
    calibration: Annotated[Path | None, _CALIBRATION] = None,
    channel: Annotated[int | None, _CHANNEL] = None,
    channels: Annotated[str | None, _BOXES] = None,
    quantity: Annotated[Quantity, _QUANTITY] = "background",
    dtype: Annotated[Dtype, Option(help="uint16 rounds a background.")] = "float32",
    offset: Annotated[list[float] | None, _OFFSET] = None,
    gain: Annotated[list[float] | None, _GAIN] = None,
    workers: Annotated[int | None, _WORKERS] = None,
    chunk_frames: Annotated[int | None, _CHUNK] = None,
    resume: Annotated[bool, _RESUME] = True,
    overwrite: Annotated[bool, OVERWRITE] = False,
) -> None:
    """Estimate the background of a movie, from each frame alone or over time too.

    It has the unit of the movie. After Ctrl-C or a crash, the same command resumes.
    """
    one_thread_a_call()
    source = movies if len(movies) > 1 else movies[0]
    boxes = None if channels is None else arguments.parsed_boxes(channels)
    is_list = is_split(source, boxes)
    if boxes is not None and len(movies) > 1:
        raise UsageError(f"--channels {channels}: boxes are parts of one movie; give one")
    with contextlib.ExitStack() as files:
        opened = open_channels(source, boxes, files=files)
        count = len(opened)
        shared = {"radius": radius, "radius-frames": radius_frames}
        for name, values in (shared | {"offset": offset, "gain": gain}).items():
            if values and len(values) not in (1, count):
                given = f"--{name}: is given {len(values)} times for {count} channels"
                raise UsageError(f"{given}; give it once for all, or once for each")
        if channel is not None and calibration is None:
            raise UsageError(f"--channel {channel}: is for --calibration; give that")
        if calibration is None:
            texts = radius or [USUAL_RADIUS]
            rows = [(radii[0], radii[-1]) for radii in map(arguments.parsed_radius, texts)]
            given = f"--radius {'; '.join(texts)}"
            estimator = arguments.chosen_estimator(given, rows, radius_frames, clip)
        else:
            for name, value in (shared | {"clip": clip}).items():
                if value:
                    raise UsageError(f"--{name}: is in --calibration, too; leave one out")
            estimator = arguments.read_calibration(calibration, channel, count)
        if mask is not None and not estimator.takes_weights:
            raise UsageError(f"--mask {mask}: {NEEDS_TIME}")
        weights: Any = mask
        if mask is not None and mask.suffix.lower() == ".npy":
            with refusing(f"--mask {mask}"):
                weights = np.load(mask, mmap_mode="r")
        if quantity != "snr" and gain:
            raise UsageError("--gain: is for --quantity snr; leave it out, or give that")
        camera = np.resize(offset or 0.0, count), np.resize(gain, count) if gain else None
        with refusing(f"--quantity {quantity}, --dtype {dtype}"):
            make_output(estimator, quantity, dtype, *camera, weights, count, False)
        if quantity == "snr" and not offset:
            report.say("--quantity snr: takes the camera's offset for light; give --offset")
        sinks = _numbered(out, count) if is_list else [out]
        for sink in sinks:
            report.check_name(sink)
        summary = estimate_movie(
            opened if is_list else opened[0].movie,
            estimator,
            sinks if is_list else out,
            quantity=quantity,
            dtype=dtype,
            offsets=camera[0],
            gains=camera[1],
            weights=weights,
            chunk_frames=chunk_frames,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
        )
    for sink in sinks:
        print(f"wrote {report.printable(sink)}")
    adu = "; ".join(f"{value:g}" for value in offset or [])
    rest = f", above the offset of {adu} ADU" if adu else ", the camera's offset included"
    written = f"{quantity}, {dtype}{'' if quantity == 'residual' else rest}"
    sizes = "; ".join(f"{c.shape[1]} x {c.shape[2]} px" for c in opened)
    about = {"frames": f"{summary.frames} of {sizes}", "written": written}
    report.print_rows(about | _rows(estimator, summary))


def _numbered(out: Path, count: int) -> list[Path]:
    """A name for each of several channels, as bkgd-1.ome.tif for bkgd.ome.tif."""
    numbers = [rf"-{number}\1" for number in range(1, count + 1)] if count > 1 else [r"\1"]
    suffix = re.compile(r"((\.ome)?\.[^.]+)?$", re.IGNORECASE)
    return [out.with_name(suffix.sub(number, out.name, count=1)) for number in numbers]


def _rows(estimator: RadiiEstimator, summary: MovieSummary) -> dict[str, str]:
    radii = [
        ", ".join([report.yx_text(y, x, "px"), *(f"{count:g} frames" for count in frames)])
        for *frames, y, x in estimator.radii.tolist()
    ]
    rows = {
        "radius": "; ".join(radii),
        **report.clip_rows(estimator),
        "noise factor": "; ".join(f"{f:.4f}" for f in summary.noise_corrections),
        "time": f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s",
    }
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames had been done before"
    if summary.clipped_frames:
        rows["clipped"] = f"to uint16, in {summary.clipped_frames} frames"
    if summary.nonfinite_frames:
        rows["not finite"] = f"NaN or infinity in {summary.nonfinite_frames} frames"
    return rows

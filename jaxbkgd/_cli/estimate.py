"""`jaxbkgd estimate`: the background of a movie, from a file to a file."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from .._batch.compute import Dtype, make_output, Quantity
from .._batch.run import estimate_movie, MovieSummary
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.open import is_split, open_channels
from .._workers import one_thread_a_call
from . import arguments, report
from .arguments import CLIP_HELP, USUAL_RADIUS
from .report import refusing, UsageError


_SHARED = "Give it once for all channels, or once for each."
OPTIONS = f"""
movies MOVIE: A file, a folder or a quoted pattern such as 'movie_*.tif'; several, where
  each channel has a file of its own.
out OUT: The file to write: .tif, .ome.tif, .zarr or .ome.zarr. Several movies or boxes are
  written to OUT-1, OUT-2 and so on.
radius PIXELS: The averaging radius, {USUAL_RADIUS} by default: a number, or y,x as in 6,10.
  {_SHARED}
radius_frames FRAMES: Average over time too, with this radius. {_SHARED}
clip DEVIATIONS: {CLIP_HELP}
mask MASK: With --radius-frames: a .npy or .tif file of one frame, or of as many as the
  movie has, that is 0 in pixels to leave out and 1 in others.
calibration CALIBRATION.json: A file of `jaxbkgd calibrate`, instead of radii and --clip.
channel NUMBER>=1: The channel of CALIBRATION.json to use, from 1 on.
channels BOXES: Parts of the frames that are channels: x0,y0,x1,y1 in pixels, without x1 and
  y1, with a semicolon between two, all in quotes.
quantity: Write the background, the frames minus the background, or their signal-to-noise
  ratio, which needs --gain and --offset.
dtype: The type to write; uint16 rounds a background.
offset ADU: The camera's offset, which is subtracted first. {_SHARED}
gain E-/ADU: Electrons per ADU, for --quantity snr. {_SHARED}
workers COUNT>=1: Threads, by default the cores.
chunk_frames COUNT>=1: Frames in a chunk, by default a megapixel.
resume --resume/--fresh: Resume an interrupted run, or start over.
overwrite --overwrite: Replace OUT if it exists.
"""


def estimate(
    movies: list[Path],
    out: Path,
    radius: list[str] | None = None,
    radius_frames: list[float] | None = None,
    clip: str | None = None,
    mask: Path | None = None,
    calibration: Path | None = None,
    channel: int | None = None,
    channels: str | None = None,
    quantity: Quantity = "background",
    dtype: Dtype = "float32",
    offset: list[float] | None = None,
    gain: list[float] | None = None,
    workers: int | None = None,
    chunk_frames: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """Estimate the background of a movie, from each frame alone or over time too.

    The background has the unit of the movie. Memory does not grow with the number of
    frames. After Ctrl-C or a crash, the same command resumes the run.
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
        if not estimator.takes_weights:
            arguments.check_needs_time(mask=mask)
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
    rest = f"above the offset of {adu} ADU" if adu else "the camera's offset included"
    written = {
        "background": f"background, {dtype}, {rest}",
        "residual": f"residual, {dtype}",
        "snr": f"SNR, {dtype}, {rest}",
    }
    sizes = "; ".join(f"{c.shape[1]} x {c.shape[2]} px" for c in opened)
    about = {"frames": f"{summary.frames} of {sizes}", "written": written[quantity]}
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
        "chunks": f"of {summary.chunk_frames} frames, on {summary.workers} threads",
        "time": f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s",
    }
    of_all = f"of {summary.frames} frames"
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames had been done before"
    if summary.clipped_frames:
        rows["clipped"] = f"to uint16, in {summary.clipped_frames} {of_all}"
    if summary.nonfinite_frames:
        rows["not finite"] = f"NaN or infinity in {summary.nonfinite_frames} {of_all}"
    return rows

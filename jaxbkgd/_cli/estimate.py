"""`jaxbkgd estimate`: the background of a movie, from a file to a file."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from .._batch.compute import Dtype, make_output, Quantity
from .._batch.run import estimate_movie, MovieSummary
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.sources import is_split, open_channels
from .._workers import one_thread_a_call
from .options import (
    chosen_estimator,
    CLIP_HELP,
    counted,
    parsed_boxes,
    parsed_radius,
    read_calibration,
    USUAL_RADIUS,
)
from .report import (
    check_name,
    clip_rows,
    print_rows,
    printable,
    refusing,
    say,
    UsageError,
    yx_text,
)


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
    boxes = None if channels is None else parsed_boxes(channels)
    with contextlib.ExitStack() as files:
        with refusing(f"--channels {channels}", "boxes are parts of one movie; give one"):
            opened = open_channels(source, boxes, files=files)
        is_list = is_split(source, boxes)
        shared = {"radius": radius, "radius-frames": radius_frames}
        _check_counts(shared | {"offset": offset, "gain": gain}, len(opened))
        if calibration is not None:
            for name, value in (shared | {"clip": clip}).items():
                if value:
                    raise UsageError(
                        f"--{name}: cannot be combined with --calibration; leave one out"
                    )
            estimator = read_calibration(calibration, channel, len(opened))
        elif channel is not None:
            raise UsageError(f"--channel {channel}: is for --calibration; give that too")
        else:
            rows = [parsed_radius(text) for text in radius or [USUAL_RADIUS]]
            options = shared | {"radius": "; ".join(radius or []), "clip": clip}
            estimator = chosen_estimator([(row[0], row[-1]) for row in rows], options)
        if mask is not None and not estimator.takes_weights:
            raise UsageError(
                f"--mask {mask}: is for averages over time; give --radius-frames"
            )
        weights: Any = mask
        if mask is not None and mask.suffix.lower() == ".npy":
            with refusing(f"--mask {mask}"):
                weights = np.load(mask, mmap_mode="r")
        if quantity != "snr" and gain:
            raise UsageError("--gain: is for --quantity snr; leave it out, or give that")
        if quantity == "snr" and not offset:
            say("--quantity snr: takes the camera's offset for light, unless it is given")
        camera = _shared_or_each(offset) or 0.0, _shared_or_each(gain)
        with refusing(f"--quantity {quantity}, --dtype {dtype}"):
            make_output(
                quantity, dtype, *camera, channel_count=len(opened), is_one_stack=False
            )
        sinks = _numbered(out, len(opened)) if is_list else [out]
        for sink in sinks:
            check_name(sink)
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
        print(f"wrote {printable(sink)}")
    written = f"{'SNR' if quantity == 'snr' else quantity}, {dtype}"
    if quantity != "residual":
        adu = "; ".join(f"{value:g}" for value in offset or [])
        rest = f"above the offset of {adu} ADU" if adu else "the camera's offset included"
        written += f", {rest}"
    sizes = "; ".join(f"{c.shape[1]} x {c.shape[2]} px" for c in opened)
    rows = {"frames": f"{summary.frames} of {sizes}", "written": written}
    print_rows(rows | _estimator_rows(estimator) | _summary_rows(summary))


def _check_counts(options: dict[str, Any], channel_count: int) -> None:
    for name, values in options.items():
        if values and len(values) not in (1, channel_count):
            raise UsageError(
                f"--{name}: is given {len(values)} times, but there "
                f"{counted(channel_count)}; give it once for all, or once for each"
            )


def _shared_or_each(values: list[float] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


def _numbered(out: Path, count: int) -> list[Path]:
    """A name for each channel, as bkgd-1.ome.tif for bkgd.ome.tif."""
    if count == 1:
        return [out]
    pattern = re.compile(r"((\.ome)?\.[^.]+)?$", re.IGNORECASE)
    names = [pattern.sub(rf"-{index + 1}\1", out.name, count=1) for index in range(count)]
    return [out.with_name(name) for name in names]


def _estimator_rows(estimator: RadiiEstimator) -> dict[str, str]:
    radii = [
        ", ".join([yx_text(y, x, "px"), *(f"{count:g} frames" for count in frames)])
        for *frames, y, x in estimator.radii.tolist()
    ]
    return {"radius": "; ".join(radii), **clip_rows(estimator)}


def _summary_rows(summary: MovieSummary) -> dict[str, str]:
    rows = {
        "noise factor": "; ".join(f"{f:.4f}" for f in summary.noise_corrections),
        "chunks": f"of {summary.chunk_frames} frames, on {summary.workers} threads",
        "time": f"{summary.seconds:.2f} s, {summary.megapixels_per_second:.1f} Mpx/s",
    }
    if summary.resumed_frames:
        rows["resumed"] = f"{summary.resumed_frames} frames had been done before"
    of_all = f"of {summary.frames} frames"
    if summary.clipped_frames:
        rows["clipped"] = f"to uint16, in {summary.clipped_frames} {of_all}"
    if summary.nonfinite_frames:
        rows["not finite"] = f"NaN or infinity in {summary.nonfinite_frames} {of_all}"
    return rows

"""`jaxbkgd estimate`: the background of a movie, from a file to a file."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._batch.run import Dtype, estimate_movie, MovieSummary, Quantity
from .._estimators.local_mean import LocalMean
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Box, Movie
from .._movies.open import open_movie
from .._movies.sinks import draft_of
from .._workers import one_thread_a_call
from .main import at_ctrl_c
from .options import (
    check_camera,
    check_needs_time,
    chosen_estimator,
    CLIP_HELP,
    parsed_boxes,
    read_calibration,
    read_mask,
    USUAL_RADIUS,
)
from .report import (
    check_name,
    clip_rows,
    listed,
    print_rows,
    printable,
    UsageError,
    yx_text,
)


_SHARED = "Give it once for all channels, or once for each."
OPTIONS = {
    "movies": (
        "MOVIE",
        "A file, a folder or a quoted pattern such as 'movie_*.tif'; several, where each "
        "channel has a file of its own.",
    ),
    "out": (
        "OUT",
        "The file to write: .tif, .ome.tif, .zarr or .ome.zarr. Several movies or boxes "
        "are written to OUT-1, OUT-2 and so on.",
    ),
    "radius": (
        "PIXELS",
        f"The averaging radius, {USUAL_RADIUS} by default: a number, or y,x as in 6,10. "
        f"{_SHARED}",
    ),
    "radius_frames": ("FRAMES", f"Average over time too, with this radius. {_SHARED}"),
    "clip": ("DEVIATIONS", CLIP_HELP),
    "mask": (
        "MASK",
        "With --radius-frames: a .npy or .tif file of one frame, or of as many as the "
        "movie has, that is 0 in pixels to leave out and 1 in others.",
    ),
    "calibration": (
        "CALIBRATION.json",
        "A file of `jaxbkgd calibrate`, instead of radii and --clip.",
    ),
    "channel": ("NUMBER", "The channel of CALIBRATION.json to use, from 1 on.", 1),
    "channels": (
        "BOXES",
        "Parts of the frames that are channels: x0,y0,x1,y1 in pixels, without x1 and y1, "
        "with a semicolon between two, all in quotes.",
    ),
    "quantity": (
        "",
        "Write the background, the frames minus the background, or their signal-to-noise "
        "ratio, which needs --gain and --offset.",
    ),
    "dtype": ("", "The type to write; uint16 rounds a background."),
    "offset": ("ADU", f"The camera's offset, which is subtracted first. {_SHARED}"),
    "gain": ("E-/ADU", f"Electrons per ADU, for --quantity snr. {_SHARED}"),
    "workers": ("COUNT", "Threads, by default the cores.", 1),
    "chunk_frames": ("COUNT", "Frames in a chunk, by default a megapixel.", 1),
    "resume": ("--resume/--fresh", "Resume an interrupted run, or start over."),
    "overwrite": ("--overwrite", "Replace OUT if it exists."),
}


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
    boxes = None if channels is None else parsed_boxes(channels)
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(open_movie(movie)) for movie in movies]
        sizes = _channel_sizes(opened, boxes)
        if calibration is None:
            if channel is not None:
                raise UsageError(
                    f"--channel {channel}: is for --calibration; give that too"
                )
            estimator = chosen_estimator(radius, radius_frames, clip, len(sizes))
        else:
            given = {"radius": radius, "radius-frames": radius_frames, "clip": clip}
            if names := [f"--{name}" for name, value in given.items() if value]:
                raise UsageError(
                    f"{names[0]}: cannot be combined with --calibration; leave one out"
                )
            estimator = read_calibration(calibration, channel, len(sizes))
        if not isinstance(estimator, LocalMean):
            check_needs_time("--mask", mask)
        check_camera(quantity, dtype, offset, gain, len(sizes))
        is_split = len(opened) > 1 or boxes is not None
        sinks = _numbered(out, len(sizes)) if is_split else [out]
        for sink in sinks:
            check_name(sink)
        files.enter_context(at_ctrl_c(lambda: _kept(sinks)))
        summary = estimate_movie(
            opened if len(opened) > 1 else opened[0],
            estimator,
            sinks if is_split else out,
            quantity=quantity,
            dtype=dtype,
            boxes=boxes,
            offsets=_shared_or_each(offset) or 0.0,
            gains=_shared_or_each(gain),
            weights=None if mask is None else read_mask(mask),
            chunk_frames=chunk_frames,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
        )
    for sink in sinks:
        print(f"wrote {printable(sink)}")
    print_rows(
        {
            "frames": f"{summary.frames} of {listed(sizes)}",
            "written": _described_quantity(quantity, dtype, offset),
            "radius": listed(_radius_texts(estimator)),
            **clip_rows(estimator),
            **_summary_rows(summary),
        }
    )


def _kept(sinks: Sequence[Path]) -> str | None:
    if not any(draft_of(sink).exists() for sink in sinks):
        return None
    return (
        "what is done is kept; run the same command again to go on, or with --fresh to "
        "start over"
    )


def _channel_sizes(movies: Sequence[Movie], boxes: Sequence[Box] | None) -> list[str]:
    """The size of each channel that is estimated, as text."""
    if boxes is not None and len(movies) > 1:
        raise UsageError("--channels: boxes are parts of one movie; give one movie")
    if boxes is not None:
        sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes]
    elif len(movies) > 1:
        sizes = [movie.shape[2:] for movie in movies]
    else:
        sizes = movies[0].shape[1] * [movies[0].shape[2:]]
    return [f"{height} x {width} px" for height, width in sizes]


def _shared_or_each(values: list[float] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


def _numbered(out: Path, count: int) -> list[Path]:
    """A name for each channel, as bkgd-1.ome.tif for bkgd.ome.tif."""
    if count == 1:
        return [out]
    pattern = re.compile(r"((\.ome)?\.[^.]+)?$", re.IGNORECASE)
    names = [pattern.sub(rf"-{index + 1}\1", out.name, count=1) for index in range(count)]
    return [out.with_name(name) for name in names]


def _described_quantity(
    quantity: Quantity, dtype: Dtype, offset: list[float] | None
) -> str:
    if quantity == "residual":
        return f"residual, {dtype}"
    adu = listed(f"{value:g}" for value in offset or [])
    rest = f"above the offset of {adu} ADU" if adu else "the camera's offset included"
    return f"{'SNR' if quantity == 'snr' else quantity}, {dtype}, {rest}"


def _radius_texts(estimator: SpatialMean | LocalMean) -> list[str]:
    texts = [yx_text(y, x, "px") for y, x in estimator.radii_pix.tolist()]
    if isinstance(estimator, SpatialMean):
        return texts
    rows = zip(texts, estimator.radius_frames.tolist(), strict=True)
    return [f"{text}, {count:g} frames" for text, count in rows]


def _summary_rows(summary: MovieSummary) -> dict[str, str]:
    rows = {
        "noise factor": listed(f"{factor:.4f}" for factor in summary.noise_corrections),
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

"""Options that are texts or files, and the estimators that they ask for."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import typer

from .._estimators.camera import Camera
from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.soft_clip import SoftClip
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Box
from .report import refusing, say, UsageError


# The radius that smlmlp takes for every movie, and the threshold of LocalMean's clip.
USUAL_RADIUS, USUAL_CLIP = "7", "3"

SHARED = "Give it once for all channels, or once for each."
NEEDS_TIME = "needs an average over time; give --radius-frames"

CLIP = typer.Option(
    help="With --radius-frames: leave out molecules above this many standard deviations of "
    f"the noise, {USUAL_CLIP} by default; none keeps them."
)
CAMERA = typer.Option(
    help="A .json, .npz or .tif written by `jaxbkgd camera`, instead of --offset, --gain "
    f"and --read-noise. {SHARED}"
)
OFFSET = typer.Option(
    help=f"The camera's offset in ADU, which is subtracted first. {SHARED}"
)
GAIN = typer.Option(
    help="Electrons per ADU (0.5 for 2 ADU per electron), for SNRs and errors in "
    f"electrons. {SHARED}"
)
READ_NOISE = typer.Option(help=f"The camera's read noise in electrons. {SHARED}")
OVERWRITE = typer.Option("--overwrite", help="Replace existing files.")
DEBUG_VARIABLE = "JAXBKGD_DEBUG"
DEBUG = typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show tracebacks.")

# Fields of a saved estimator that may have an entry for each channel.
_CHANNEL_FIELDS = {"radii_pix", "radius_frames", "frozen"}


def chosen_cameras(
    files: list[Path] | None, numbers: dict[str, list[float] | None], count: int
) -> list[Camera]:
    """A camera for each channel, from files, or from the numbers of these options."""
    check_counts(count, {"camera": files} | numbers)
    if files is None:
        given = {name: v for name, v in numbers.items() if v}
        text = ", ".join(f"--{name}" for name in given) or "--offset"
        rows = [np.resize(given.get(name, [0.0]), count).tolist() for name in numbers]
        gains = rows[1] if "gain" in given else [None] * count
        with refusing(text):
            return [Camera(*row) for row in zip(rows[0], gains, rows[2], strict=True)]
    for name, values in numbers.items():
        if values:
            raise UsageError(f"--{name}: is in --camera, too; leave one out")
    cameras = []
    for file in files:
        # The error of a file that holds no camera begins with its name.
        given = "--camera" if file.is_file() else f"--camera {file}"
        with refusing(given):
            cameras.append(Camera.load(file))
    return cameras if len(cameras) == count else cameras * count


def check_counts(count: int, shared: dict[str, Any]) -> None:
    """Refuses options that are given neither once nor once for each channel."""
    for name, values in shared.items():
        if values and len(values) not in (1, count):
            given = f"--{name}: is given {len(values)} times for {count} channels"
            raise UsageError(f"{given}; give it once for all, or once for each")


def parsed_radius(text: str) -> tuple[float, ...]:
    """One radius in pixels, or (y, x)."""
    with refusing(
        f"--radius {text}", "is neither a number of pixels nor a pair such as 6,10"
    ):
        radii = tuple(map(float, text.split(",")))
        if len(radii) > 2:
            raise ValueError
    return radii


def parsed_boxes(text: str) -> list[Box]:
    rule = "must be boxes x0,y0,x1,y1 in whole pixels, as in '0,0,256,512;256,0,512,512'"
    with refusing(f"--channels {text}", rule):
        boxes = (map(int, box.split(",")) for box in text.split(";"))
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]


def parsed_frames(frames: str | None, every: str | None) -> slice | None:
    """START:STOP and STEP:FIRST as one slice of the movie's frames, counted from 0."""
    if frames is None and every is None:
        return None
    given = re.fullmatch(r"(\d*):(\d*)", frames or ":")
    if given is None:
        rule = "must be a range START:STOP of frames, counted from 0, such as 1000:5000"
        raise UsageError(f"--frames {frames}: {rule}")
    steps = re.fullmatch(r"([1-9]\d*)(?::(\d+))?", every or "1")
    if steps is None:
        rule = "must be STEP or STEP:FIRST, such as 4:1 for every 4th frame from frame 1"
        raise UsageError(f"--every {every}: {rule}")
    start, stop = int(given[1] or 0), int(given[2]) if given[2] else None
    step, first = int(steps[1]), int(steps[2] or 0)
    # The first frame of the range that is a whole number of steps from `first`.
    start = max(start + (first - start) % step, first)
    return slice(start, stop, step)


def chosen_estimator(
    given: str, rows: Any, radius_frames: Any, clip: str | None, **bounds: Any
) -> SpatialMean | LocalMean:
    """The mean of each frame under these radii, a row a channel, or over time too."""
    if radius_frames is None:
        if clip is not None:
            raise UsageError(f"--clip {clip}: {NEEDS_TIME}")
        with refusing(given):
            return SpatialMean(rows, **bounds)
    with refusing(f"--clip {clip}", "is neither none nor a threshold from 0.01 to 100"):
        soft_clip = None if clip == "none" else SoftClip(float(clip or USUAL_CLIP))
    with refusing(f"{given}, --radius-frames {radius_frames}"):
        return LocalMean(rows, radius_frames, clip=soft_clip, **bounds)


def read_calibration(path: Path, channel: int | None, needed: int) -> RadiiEstimator:
    """The estimator that `jaxbkgd calibrate` wrote, for one of its channels or for all."""
    with refusing(f"{path}: cannot be read"):
        text = path.read_text("utf-8")
    with refusing(f"{path}: is not a calibration"):
        estimator = RadiiEstimator.from_json(text)
        about = dict(json.loads(text).get("calibration", {}))
        # In time, the radius of a steady background has no upper limit.
        bounds = [row[-2:] for row in about.get("is_at_bound", [])]
        is_at_bound = np.any(bounds if channel is None else bounds[channel - 1 : channel])
    count = len(estimator.radii)
    if channel is not None and (needed > 1 or channel > count):
        fault = f"needs a movie of one channel, and a channel from 1 to {count} of {path}"
        raise UsageError(f"--channel {channel}: {fault}")
    if channel is None and count not in (1, needed):
        raise UsageError(f"{path}: has {count} channels, not {needed}; see --channel")
    if not about.get("is_converged", True):
        say(f"{path}: the search for these radii had not ended; the background may be off")
    for doubt in about.get("doubts", []):
        say(f"{path}: {doubt}")
    if is_at_bound:
        say(f"{path}: a radius is at its bound; the background may be off")
    return estimator if channel is None else one_channel(estimator, channel - 1)


def one_channel(estimator: RadiiEstimator, index: int) -> RadiiEstimator:
    """The estimator for one of its channels."""
    saved = json.loads(estimator.to_json())
    for name in _CHANNEL_FIELDS & saved.keys():
        if len(saved[name]) > 1:
            saved[name] = [saved[name][index]]
    return type(estimator).from_json(json.dumps(saved))

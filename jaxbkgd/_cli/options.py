"""Options that are texts or files, and the estimators that they ask for."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._batch.run import Dtype, Quantity
from .._estimators.local_mean import LocalMean
from .._estimators.saved import saved_kind
from .._estimators.soft_clip import SoftClip
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Box
from .report import listed, say, UsageError


# The radius that smlmlp takes for every movie, and the threshold of LocalMean's clip.
USUAL_RADIUS, USUAL_CLIP = "7", "3"

CLIP_HELP = (
    "With --radius-frames: leave out molecules above so many standard deviations of the "
    f"noise, {USUAL_CLIP} by default, or none."
)

# The fields of a calibration that have an entry for each channel.
_CHANNEL_FIELDS = {"radii_pix", "radius_frames", "frozen", "gains", "read_noise_electrons"}


def parsed_radius(text: str) -> tuple[float, ...]:
    """One radius in pixels, or (y, x)."""
    try:
        radii = tuple(float(part) for part in text.split(","))
    except ValueError:
        radii = ()
    if len(radii) not in (1, 2):
        raise UsageError(
            f"--radius {text}: is neither a number of pixels nor a pair as 6,10"
        )
    try:
        SpatialMean([radii])
    except ValueError as error:
        raise UsageError(f"--radius {text}: {error}") from error
    return radii


def parsed_clip(text: str | None) -> SoftClip | None:
    if text == "none":
        return None
    try:
        return SoftClip(float(text or USUAL_CLIP))
    except ValueError as error:
        raise UsageError(
            f"--clip {text}: is neither none nor a threshold from 0.01 to 100 deviations"
        ) from error


def parsed_boxes(text: str) -> list[Box]:
    try:
        boxes = [tuple(map(int, box.split(","))) for box in text.split(";")]
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]
    except ValueError as error:
        raise UsageError(
            f"--channels {text}: are no boxes x0,y0,x1,y1 of whole pixels, as in "
            "'0,0,256,512;256,0,512,512'"
        ) from error


def check_needs_time(option: str, value: object) -> None:
    """Refuse an option of averages over time where there is none."""
    if value is not None:
        raise UsageError(
            f"{option} {value}: is for averages over time; give --radius-frames"
        )


def _check_count(option: str, values: Sequence[object] | None, channel_count: int) -> None:
    if values and len(values) not in (1, channel_count):
        raise UsageError(
            f"{option}: is given {len(values)} times, but there {_counted(channel_count)}; "
            "give it once for all channels, or once for each"
        )


def _counted(channel_count: int) -> str:
    return "is 1 channel" if channel_count == 1 else f"are {channel_count} channels"


def chosen_estimator(
    radii: list[str] | None,
    radii_frames: list[float] | None,
    clip: str | None,
    channel_count: int,
) -> SpatialMean | LocalMean:
    _check_count("--radius", radii, channel_count)
    _check_count("--radius-frames", radii_frames, channel_count)
    parsed = [parsed_radius(text) for text in radii or [USUAL_RADIUS]]
    rows = [(row[0], row[-1]) for row in parsed]
    if not radii_frames:
        check_needs_time("--clip", clip)
        return SpatialMean(rows)
    soft_clip = parsed_clip(clip)
    try:
        return LocalMean(rows, radii_frames, clip=soft_clip)
    except ValueError as error:
        text = listed(f"{value:g}" for value in radii_frames)
        raise UsageError(f"--radius-frames {text}: {error}") from error


def read_mask(path: Path) -> Any:
    """The weights that `estimate_movie` takes: an array of one frame, or the file."""
    array = None
    if path.suffix.lower() == ".npy":
        # A broken file is refused where it is opened as a movie.
        with contextlib.suppress(OSError, ValueError):
            array = np.load(path, mmap_mode="r")
    return path if array is None or array.ndim != 2 else array


def check_camera(
    quantity: Quantity,
    dtype: Dtype,
    offsets: list[float] | None,
    gains: list[float] | None,
    channel_count: int,
) -> None:
    _check_count("--offset", offsets, channel_count)
    _check_count("--gain", gains, channel_count)
    if quantity != "snr" and gains:
        raise UsageError("--gain: is for --quantity snr; leave it out, or give that")
    if quantity == "snr" and not gains:
        raise UsageError("--quantity snr: needs --gain, in electrons per ADU")
    if quantity != "background" and dtype == "uint16":
        raise UsageError(
            f"--dtype uint16: cannot hold a negative {quantity}; write float32"
        )
    for value in offsets or []:
        if not math.isfinite(value):
            raise UsageError(f"--offset {value:g}: must be finite")
    for value in gains or []:
        if not 0 < value < math.inf:
            raise UsageError(f"--gain {value:g}: must be positive and finite")
    if quantity == "snr" and not offsets:
        say("--quantity snr: takes the camera's offset for light, unless --offset is given")


def read_calibration(
    path: Path, channel: int | None, channel_count: int
) -> SpatialMean | LocalMean:
    """The estimator that `jaxbkgd calibrate` wrote, for one of its channels or for all."""
    if channel is not None and channel_count > 1:
        raise UsageError(
            f"--channel {channel}: is for a single channel, but there "
            f"{_counted(channel_count)}"
        )
    try:
        text = path.read_text("utf-8")
        kind = LocalMean if saved_kind(text) == "LocalMean" else SpatialMean
        estimator = kind.from_json(text)
        fields = json.loads(text)
        faults = _faults(fields.get("calibration", {}), channel)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no calibration, and no text at all") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: is no calibration: {error}") from error
    count = len(estimator.radii_pix)
    if channel is not None and channel > count:
        raise UsageError(f"--channel {channel}: {path} has {count} of them")
    if channel is not None and count > 1:
        for part in (fields, fields.get("clip") or {}):
            for name in _CHANNEL_FIELDS & part.keys():
                # A camera may have one number for all channels.
                if part[name] is not None and len(part[name]) == count:
                    part[name] = [part[name][channel - 1]]
        estimator = kind.from_json(json.dumps(fields))
    elif count not in (1, channel_count):
        remedy = "; say which one with --channel" if channel_count == 1 else ""
        raise UsageError(
            f"{path}: has {count} channels, but there {_counted(channel_count)}{remedy}"
        )
    if faults:
        say(f"{path}: {' and '.join(faults)}; the background may be off")
    return estimator


def _faults(calibration: dict[str, Any], channel: int | None) -> list[str]:
    """The reasons to doubt the radii that the calibration itself gives."""
    faults = []
    if not calibration.get("is_converged", True):
        faults.append("the search for these radii had not ended")
    rows = calibration.get("is_at_bound", [])
    # In time, the radius of a steady background has no upper limit.
    if np.any([row[-2:] for row in (rows if channel is None else rows[channel - 1 :][:1])]):
        faults.append("a radius is at its bound")
    return faults

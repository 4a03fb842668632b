"""Options that are texts or files, and the estimators that they ask for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .._estimators.base import estimator_from_json
from .._estimators.local_mean import LocalMean
from .._estimators.radii_estimator import RadiiEstimator
from .._estimators.soft_clip import SoftClip
from .._estimators.spatial_mean import SpatialMean
from .._movies.movie import Box
from .report import refusing, say, UsageError


# The radius that smlmlp takes for every movie, and the threshold of LocalMean's clip.
USUAL_RADIUS, USUAL_CLIP = "7", "3"

CLIP_HELP = (
    "With --radius-frames: leave out molecules above so many standard deviations of the "
    f"noise, {USUAL_CLIP} by default, or none."
)

# Fields of a saved estimator or clip that may have an entry for each channel.
_CHANNEL_FIELDS = {"radii_pix", "radius_frames", "frozen", "gains", "read_noise_electrons"}

_Estimator = TypeVar("_Estimator", bound=RadiiEstimator)


def parsed_radius(text: str) -> tuple[float, ...]:
    """One radius in pixels, or (y, x)."""
    with refusing(f"--radius {text}", "is neither a number of pixels nor a pair as 6,10"):
        radii = tuple(map(float, text.split(",")))
        if len(radii) > 2:
            raise ValueError
        return radii


def parsed_boxes(text: str) -> list[Box]:
    rule = "are no boxes x0,y0,x1,y1 of whole pixels, as in '0,0,256,512;256,0,512,512'"
    with refusing(f"--channels {text}", rule):
        boxes = [tuple(map(int, box.split(","))) for box in text.split(";")]
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]


def chosen_estimator(
    rows: Sequence[Sequence[float]], options: Mapping[str, Any], **bounds: Any
) -> SpatialMean | LocalMean:
    """The estimator of these radii in pixels, over time too with `--radius-frames`."""
    radius_frames, clip = options["radius-frames"], options["clip"]
    texts = [f"--{name} {value}" for name, value in options.items() if value is not None]
    if not radius_frames:
        for option in ("clip", "max-radius-frames"):
            if options.get(option) is not None:
                raise UsageError(
                    f"--{option} {options[option]}: is for averages over time; give "
                    "--radius-frames"
                )
        with refusing(", ".join(texts)):
            return SpatialMean(rows, max_radius_pix=bounds.get("max_radius_pix"))
    with refusing(f"--clip {clip}", "is neither none nor a threshold from 0.01 to 100"):
        soft_clip = None if clip == "none" else SoftClip(float(clip or USUAL_CLIP))
    with refusing(", ".join(texts)):
        return LocalMean(rows, radius_frames, clip=soft_clip, **bounds)


def read_calibration(path: Path, channel: int | None, channel_count: int) -> RadiiEstimator:
    """The estimator that `jaxbkgd calibrate` wrote, for one of its channels or for all."""
    try:
        text = path.read_text("utf-8")
        estimator = estimator_from_json(text)
        if not isinstance(estimator, RadiiEstimator):
            raise ValueError(f"{type(estimator).__name__} has no radii")
        faults = _faults(json.loads(text).get("calibration", {}), channel)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: is no calibration: {error}") from error
    count = len(estimator.radii)
    if channel is not None and (channel > count or channel_count > 1):
        raise UsageError(
            f"--channel {channel}: is for a movie of 1 channel, and is one of those in "
            f"{path}; there {counted(channel_count)}, and {count} in the file"
        )
    if channel is None and count not in (1, channel_count):
        remedy = "; say which one with --channel" if channel_count == 1 else ""
        raise UsageError(
            f"{path}: has {count} channels, but there {counted(channel_count)}{remedy}"
        )
    if faults:
        say(f"{path}: {' and '.join(faults)}; the background may be off")
    return estimator if channel is None else one_channel(estimator, channel - 1)


def counted(channel_count: int) -> str:
    return "is 1 channel" if channel_count == 1 else f"are {channel_count} channels"


def one_channel(estimator: _Estimator, index: int, **fields: Any) -> _Estimator:
    """The estimator for one of its channels, with these fields in place of its own."""
    saved = json.loads(estimator.to_json())
    for part in (saved, saved.get("clip") or {}):
        for name in _CHANNEL_FIELDS & part.keys():
            if part[name] and len(part[name]) > 1:
                part[name] = [part[name][index]]
    return type(estimator).from_json(json.dumps(saved | fields))


def _faults(calibration: dict[str, Any], channel: int | None) -> list[str]:
    """The reasons to doubt the radii that the calibration itself gives."""
    is_converged = calibration.get("is_converged", True)
    faults = [] if is_converged else ["the search for these radii had not ended"]
    rows = calibration.get("is_at_bound", [])
    # In time, the radius of a steady background has no upper limit.
    if np.any([row[-2:] for row in (rows if channel is None else rows[channel - 1 :][:1])]):
        faults.append("a radius is at its bound")
    return faults

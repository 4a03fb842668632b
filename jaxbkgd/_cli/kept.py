"""The calibration that `jaxbkgd estimate` makes of a movie and keeps with the result."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._batch.automatic import calibrated
from .._batch.compute import Dtype
from .._batch.results import check_targets, content_of, Target
from .._calibration.calibrate import CalibrationHistory
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel
from .._movies.sinks import draft_of, JOURNAL_SUFFIX
from .._version import __version__
from . import report


class Kept(NamedTuple):
    """An estimator, and what the calibration has to say in terms of JSON: `lines`,
    `doubts`, `unexplained`, and the `settings` that it was made with."""

    estimator: RadiiEstimator
    about: dict[str, Any]


def kept_calibration(
    path: Path,
    targets: Sequence[Target],
    channels: Sequence[Channel],
    source: Any,
    *,
    dtype: Dtype,
    resume: bool,
    overwrite: bool,
    mask: Path | None,
    **options: Any,
) -> Kept:
    """What an interrupted run has kept as `path` for this job, or else a new calibration,
    which is written there. Refuses before that what could not be written."""
    check_targets(targets, channels, dtype, overwrite=overwrite)
    png = path.with_suffix(".png")
    settings = _settings(channels, mask, options)
    kept = _read(path, settings)
    report.check_output(path, ".json", overwrite=overwrite or kept is not None)
    report.check_output(png, ".png", overwrite=overwrite)
    if kept is None or not resume or not any(_is_unfinished(path) for path, _ in targets):
        names = ", ".join(dict.fromkeys(channel.movie.name for channel in channels))
        with report.refusing(names):
            estimator, history = calibrated(source, **options)
        kept = Kept(estimator, _about(history) | {"settings": settings})
        fields = json.loads(estimator.to_json()) | {"calibration": kept.about}
        text = json.dumps(fields, indent=2, allow_nan=False)
        report.write_whole(path, text.encode())
        # What is there is of another calibration.
        png.unlink(missing_ok=True)
    for doubt in kept.about["doubts"]:
        report.say(doubt)
    return kept


def _is_unfinished(path: Path) -> bool:
    """Whether a run that is to write this movie has not come to its end."""
    return not path.exists() or draft_of(path, JOURNAL_SUFFIX).exists()


def _settings(
    channels: Sequence[Channel], mask: Path | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What a calibration depends on, as JSON gives it back."""
    frames = channels[0].frames
    status = None if mask is None else mask.stat()
    about = {
        "movies": [channel.movie.name for channel in channels],
        "content": [content_of(channel.movie) for channel in channels],
        "boxes": [channel.box for channel in channels],
        "frames": [frames.start, frames.stop, frames.step],
        "offsets": np.asarray(options["offsets"]).tolist(),
        "gains": None
        if options["gains"] is None
        else np.asarray(options["gains"]).tolist(),
        "mask": status and [str(mask), status.st_size, status.st_mtime_ns],
        "version": __version__,
    }
    return json.loads(json.dumps(about))


def _read(path: Path, settings: dict[str, Any]) -> Kept | None:
    """What was kept with these settings."""
    try:
        text = path.read_text("utf-8")
        about = json.loads(text)["calibration"]
        is_same = about["settings"] == settings
        return Kept(RadiiEstimator.from_json(text), about) if is_same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _about(history: CalibrationHistory) -> dict[str, Any]:
    """The findings of a calibration in terms of JSON, which has no NaN."""
    radii = history.radii[-1].tolist()
    return {
        "is_converged": history.is_converged,
        "stop_reason": history.stop_reason,
        "lines": [f"radii       {'; '.join(f'{r:.1f}' for r in row)}" for row in radii],
        "doubts": [],
        "unexplained": None,
    }

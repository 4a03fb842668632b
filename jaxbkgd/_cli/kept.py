"""The calibration that `jaxbkgd estimate` makes of a movie and keeps with the result."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._batch.results import content_of
from .._calibration.calibrate import calibrate
from .._estimators.camera import Camera
from .._estimators.radii_estimator import RadiiEstimator
from .._movies.movie import Channel
from .._movies.sinks import draft_of, hold_lock, JOURNAL_SUFFIX
from .._version import __version__
from . import report


class Kept(NamedTuple):
    """An estimator, and what its calibration has to say in terms of JSON: `rows`,
    `doubts`, `unexplained`, and the `settings` that it was made with."""

    estimator: RadiiEstimator
    about: dict[str, Any]


@contextlib.contextmanager
def lock_output(path: Path) -> Iterator[None]:
    """`MovieError` where another run is about to write this file."""
    lock = hold_lock(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def kept_calibration(
    path: Path,
    sinks: Sequence[Path],
    source: Any,
    channels: Sequence[Channel],
    options: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> Kept:
    """What an interrupted run of this job has kept as `path`, or else a new calibration,
    which is written there."""
    settings = _settings(channels, options)
    kept = _read(path, settings)
    report.check_output(path, ".json", overwrite=overwrite or kept is not None)
    report.check_output(path.with_suffix(".png"), ".png", overwrite=overwrite)
    if kept is None and resume and path.exists() and any(map(_journal_exists, sinks)):
        raise report.UsageError(
            f"{path}: was begun with other settings, another movie or another version; "
            "give those, or --fresh to start over"
        )
    if kept is None or not resume or not any(map(_is_unfinished, sinks)):
        with report.refusing(", ".join(settings["content"])):
            estimator, history = calibrate(source, **options)
        about = history.about() | {"rows": history.rows(), "settings": settings}
        text = report.write_calibration(path, estimator, about)
        # Numbers in a text may differ in the last digit; a later run has those, too.
        kept = Kept(RadiiEstimator.from_json(text), about)
    for doubt in kept.about["doubts"]:
        report.say(doubt)
    return kept


def _is_unfinished(sink: Path) -> bool:
    """Whether a run that is to write this movie has not come to its end."""
    return not sink.exists() or _journal_exists(sink)


def _journal_exists(sink: Path) -> bool:
    return draft_of(sink, JOURNAL_SUFFIX).exists()


def _settings(channels: Sequence[Channel], options: dict[str, Any]) -> dict[str, Any]:
    """What a calibration depends on, as JSON gives it back."""
    movies = dict.fromkeys(channel.movie for channel in channels)
    content = {report.printable(movie.name): content_of(movie) for movie in movies}
    texts = {name: _text(value) for name, value in options.items()}
    return {"content": content, "version": __version__} | texts


def _text(option: Any) -> str:
    """What tells an option from others: of arrays and files, their content."""
    if isinstance(option, list | Camera):
        return "; ".join(map(_text, jax.tree.leaves(option)))
    if isinstance(option, np.ndarray):
        return f"{option.shape} {hashlib.sha256(option.tobytes()).hexdigest()}"
    if isinstance(option, Path):
        return hashlib.sha256(option.read_bytes()).hexdigest()
    return str(option)


def _read(path: Path, settings: dict[str, Any]) -> Kept | None:
    """What was kept with these settings."""
    try:
        text = path.read_text("utf-8")
        about = json.loads(text)["calibration"]
        is_same = about["settings"] == settings
        return Kept(RadiiEstimator.from_json(text), about) if is_same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None

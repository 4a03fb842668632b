"""The files and arrays that a call writes, started or resumed."""

import contextlib
import functools as ft
import hashlib
import io
import json
import math
import pickle
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._estimators.base import AbstractEstimator
from .._estimators.camera import Camera
from .._movies.growing import GrowingMovie
from .._movies.movie import ChangedSource, Channel, Movie, MovieError
from .._movies.open import open_sink
from .._movies.sinks import (
    ArraySink,
    draft_of,
    DRAFT_SUFFIXES,
    GrowingSink,
    Journal,
    JOURNAL_SUFFIX,
    Layout,
    Sink,
)
from .._version import __version__
from .compute import Output
from .plan import Window


# A path or an array, and the numbers of the channels that go there.
Target = tuple[Any, list[int]]


class Results(NamedTuple):
    """Sinks with the numbers of their channels: to be written, and named already."""

    unnamed: list[tuple[Sink | ArraySink, list[int]]]
    named: list[tuple[Sink | ArraySink, list[int]]]

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that a sink lacks."""
        done = [sink.journal.done for sink, _ in self.unnamed]
        return [w for w in windows if not all(w.number in numbers for numbers in done)]

    def write(self, window: Window, images: Sequence[np.ndarray]) -> None:
        """Writes frames (frames, height, width) of each channel, and notes that."""
        for sink, indices in self.unnamed:
            parts = [images[index][:, None] for index in indices]
            frames = parts[0] if len(parts) == 1 else np.hstack(parts)
            sink.write(window.start, frames)
            sink.note(window.number)

    def set_length(self, frames: int) -> None:
        """That of drafts that grow; see `GrowingSink`."""
        for sink, _ in self.unnamed:
            if isinstance(sink, GrowingSink):
                sink.set_length(frames)

    def commit(self) -> None:
        """Gives the drafts their names."""
        for sink, _ in self.unnamed:
            sink.give_name()
        # Until all have their names, a later run must know the first ones for its own.
        for sink, _ in self.named + self.unnamed:
            sink.finish()


@contextlib.contextmanager
def open_results(
    job: "Job", targets: Sequence[Target], *, resume: bool, overwrite: bool
) -> Iterator[Results]:
    """Opens what an earlier run has left, or begins anew. After an error, drafts with
    anything in them stay for a later run."""
    results, begun = Results([], []), []

    def close() -> None:
        for sink, _ in results.named + results.unnamed:
            is_empty = sink in begun and not sink.journal.done
            (sink.discard if is_empty else sink.close)()

    try:
        for target, indices in targets:
            about = _about(job.estimator, job.output)
            layout = _layout(
                job.channels, indices, job.output.dtype, job.chunk_frames, about
            )
            sink = open_sink(target, layout, overwrite=overwrite, is_growing=job.is_growing)
            is_named = resume and sink.is_committed
            (results.named if is_named else results.unnamed).append((sink, indices))
            if is_named or (resume and sink.is_begun):
                _check_settings(sink.journal, job.settings | {"channels": indices})
        for sink, _ in results.unnamed:
            sink.check()
        for sink, indices in results.unnamed:
            if resume and sink.is_begun:
                sink.resume()
            else:
                begun.append(sink)
                is_file = isinstance(sink, Sink)
                sink.begin(job.settings | {"channels": indices} if is_file else None)
        try:
            yield results
        except BaseException as error:
            if job.is_growing and isinstance(error, ChangedSource):
                # A later run could not tell the movie from what it was.
                for sink, _ in results.unnamed:
                    sink.journal.clear()
            files = [sink for sink, _ in results.unnamed if isinstance(sink, Sink)]
            kept = [str(s.draft) for s in files if s.journal.done and s.draft.exists()]
            if kept and not isinstance(error, ChangedSource):
                what = f"the finished part is kept in {', '.join(kept)}"
                error.add_note(f"{what}; run the same again to resume")
            raise
    finally:
        # In a thread, which hears no second Ctrl-C.
        closing = threading.Thread(target=close)
        closing.start()
        while closing.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                closing.join()


@dataclass(eq=False)
class Job:
    """All that a result depends on. The content of files is that of now: their sizes, and
    some frames, whatever their times of modification. `calibration` is the JSON text of an
    estimator that was found, of which a later run makes the same one."""

    channels: Sequence[Channel]
    weights: Sequence[Channel | None]
    cameras: Sequence[Camera]
    estimator: AbstractEstimator
    output: Output
    chunk_frames: int
    look_ahead_frames: int | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        self.files = {movie: content_of(movie) for movie in self._movies() if movie.paths}

    def _movies(self) -> list[Movie]:
        """Those that frames and weights are read from."""
        return [*dict.fromkeys(c.movie for c in (*self.channels, *self.weights) if c)]

    @property
    def is_growing(self) -> bool:
        return any(isinstance(c.movie, GrowingMovie) for c in self.channels)

    @property
    def frame_megapixels(self) -> float:
        """Of all channels."""
        return sum(math.prod(channel.shape[1:]) for channel in self.channels) / 1e6

    @ft.cached_property
    def settings(self) -> dict[str, Any]:
        """In terms of JSON. It takes long for frames in memory, which are all hashed."""
        arrays = [movie for movie in self._movies() if not movie.paths]
        contents = self.files | {array: content_of(array) for array in arrays}
        return {
            "source": [
                [contents[c.movie], c.index, *map(int, c.box)] for c in self.channels
            ],
            "frames": [
                [c.frames.start, None if self.is_growing else c.frames.stop, c.frames.step]
                for c in self.channels
            ],
            "look_ahead_frames": self.look_ahead_frames,
            "weights": [None if w is None else contents[w.movie] for w in self.weights],
            "estimator": _hash(self.estimator),
            "calibration": self.calibration,
            "camera": _hash(self.cameras),
            "quantity": self.output.quantity,
            "dtype": self.output.dtype,
            "pedestal": self.output.pedestal,
            "chunk_frames": self.chunk_frames,
            "versions of jaxbkgd and jax": [__version__, jax.__version__],
            "device": jax.local_devices()[0].device_kind,
            "64-bit mode": jax.config.read("jax_enable_x64"),
        }

    def check_sources(self) -> None:
        """Refuses a movie that has changed, and warns of one whose time has."""
        for movie, content in self.files.items():
            if content_of(movie) != content:
                what = f"{movie.name}: has changed since it was opened; start over once it"
                rule = "is whole (resume=False, in the command line --fresh)"
                raise ChangedSource(f"{what} {rule}")
            if movie.state() != movie.opened_state:
                what = f"{movie.name}: its time of modification has changed, but not its"
                rule = "size nor the frames that were compared; the result is kept"
                warnings.warn(f"{what} {rule}", stacklevel=3)


def content_of(movie: Movie) -> list[Any]:
    """What tells a movie from another one, in terms of JSON."""
    return [movie.fingerprint(), *[p.stat().st_size for p in movie.paths if p.is_file()]]


def _check_settings(journal: Journal, now: dict[str, Any]) -> None:
    before = journal.settings or {}
    hashed = "source", "weights", "estimator", "calibration", "camera"
    changes = [
        name if name in hashed else f"{name} {before.get(name)}, not {value}"
        for name, value in sorted(now.items())
        if before.get(name) != value
    ]
    if changes:
        raise MovieError(
            f"{journal.path}: was begun with other settings ({'; '.join(changes)}); give "
            "them again, or start over (resume=False, in the command line --fresh)"
        )


def _hash(estimator: Any) -> str:
    """A hash of all that it holds, which is the same in every process."""
    pickled = io.BytesIO()
    try:
        _Pickler(pickled).dump(estimator)
    except Exception as error:
        raise TypeError(
            f"{type(estimator).__name__} holds what another run could not recognise "
            f"({error}), so that it could not be resumed; let it hold functions of a "
            "module and what can be pickled, or write to an array"
        ) from error
    return hashlib.sha256(pickled.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes the name of a class, and of a function of a module, in place of it, also where
    JAX has wrapped the function."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, type):
            return obj.__module__, obj.__qualname__
        is_function = hasattr(obj, "__qualname__") and not hasattr(obj, "__self__")
        # A lambda, or a function within another one, has no name that others know.
        if is_function and "<" not in obj.__qualname__:
            return obj.__module__, obj.__qualname__
        # What is pickled as usual.
        return None


def group_targets(
    sink: Any, channel_count: int, is_list: bool, movies: Iterable[Movie]
) -> list[Target]:
    """Each path or array to write to, with the numbers of its channels. Nothing that is
    read may be written to, or removed, and nothing written twice."""
    places = list(sink) if is_list and isinstance(sink, list | tuple) else [sink]
    if is_list and len(places) != channel_count:
        what = f"There are {channel_count} channels, but {len(places)} sinks"
        raise ValueError(f"{what}; give a list with a sink for each channel.")
    arrays = [place for place in places if isinstance(place, np.ndarray)]
    for number, array in enumerate(arrays):
        others = [np.may_share_memory(array, other) for other in arrays[:number]]
        if any([movie.shares_memory(array) for movie in movies] + others):
            what = "An array to fill shares memory with the movie or with another one"
            raise ValueError(f"{what}; give an array of its own.")
    paths = [path.resolve() for place in places if (path := as_path(place))]
    for path in paths:
        if paths.count(path) > 1:
            raise MovieError(f"{path}: is given for two channels; give each a name")
        touched = [path, *(draft_of(path, suffix) for suffix in DRAFT_SUFFIXES)]
        if any(movie.includes(name) for movie in movies for name in touched):
            what = "is the movie itself, or would be a part of it when it is read again"
            raise MovieError(f"{path}: {what}; give a name elsewhere")
    if is_list:
        return [(place, [index]) for index, place in enumerate(places)]
    return [(sink, list(range(channel_count)))]


def check_targets(
    targets: Sequence[Target], channels: Sequence[Channel], dtype: str, *, overwrite: bool
) -> None:
    """Refuses before a long work what could not be written in the end. What an earlier run
    has begun is looked at later."""
    for target, indices in targets:
        layout = _layout(channels, indices, dtype, chunk_frames=1)
        with contextlib.closing(open_sink(target, layout, overwrite=overwrite)) as sink:
            if not (sink.is_begun or sink.is_committed):
                sink.check()


def _layout(
    channels: Sequence[Channel],
    indices: Sequence[int],
    dtype: str,
    chunk_frames: int,
    about: Mapping[str, Any] | None = None,
) -> Layout:
    first = channels[indices[0]]
    frames, height, width = first.shape
    interval_s = first.movie.frame_interval_s
    return Layout(
        (frames, len(indices), height, width),
        np.dtype(dtype),
        chunk_frames,
        first.movie.pixel_size_um,
        None if interval_s is None else first.frames.step * interval_s,
        about or {},
    )


def _about(estimator: AbstractEstimator, output: Output) -> dict[str, Any]:
    """What the numbers are, for the metadata of a file."""
    unit = "standard deviations of noise" if output.quantity == "snr" else "ADU"
    added = f" + pedestal of {output.pedestal:g} {unit}" if output.pedestal else ""
    try:
        of_estimator = json.loads(estimator.to_json())
    except (TypeError, ValueError):
        # It holds what JSON cannot.
        of_estimator = type(estimator).__name__
    return {
        "content": output.quantity + added,
        "pedestal": output.pedestal,
        "unit": unit,
        "estimator": of_estimator,
        "program": f"jaxbkgd {__version__}",
    }


def begun_settings(targets: Sequence[Target]) -> dict[str, Any]:
    """Those of an earlier run that has left a draft, or none."""
    for target, _ in targets:
        if path := as_path(target):
            journal = Journal(draft_of(path, JOURNAL_SUFFIX))
            journal.close()
            if journal.settings is not None:
                return journal.settings
    return {}


def as_path(target: Any) -> Path | None:
    return Path(target) if isinstance(target, str | PathLike) else None

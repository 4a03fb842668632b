"""The files and arrays that a call writes: begun, gone on with if all that they depend on
is the same, and given their names."""

import contextlib
import functools as ft
import hashlib
import io
import pickle
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._estimators.base import AbstractEstimator
from .._movies.journal import Journal
from .._movies.movie import Channel, Movie, MovieError
from .._movies.open import open_sink
from .._movies.sinks import (
    ArraySink,
    draft_of,
    DRAFT_SUFFIXES,
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
    """Sinks with the numbers of their channels: those to be written, and those to which an
    earlier run has given their names."""

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

    def commit(self) -> None:
        """Gives the drafts their names."""
        for sink, _ in self.unnamed:
            sink.give_name()
        # Not before all have their names: of a job that ends earlier, a later run would not
        # know the first ones for its own. (One that ends here is whole.)
        for sink, _ in self.named + self.unnamed:
            sink.finish()


@contextlib.contextmanager
def open_results(
    targets: Sequence[Target],
    channels: Sequence[Channel],
    dtype: str,
    chunk_frames: int,
    settings: Callable[[], dict[str, Any]],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Results]:
    """Opens what an earlier run with these settings has left, or begins anew. After an
    error, drafts with anything in them stay for a later run. When it is left, nothing is
    written any more."""
    results, begun, is_whole = Results([], []), [], False

    def close() -> None:
        for sink, _ in results.named + results.unnamed:
            is_empty = sink in begun and not sink.journal.done
            (sink.discard if is_empty and not is_whole else sink.close)()

    try:
        for target, indices in targets:
            frames, height, width = channels[indices[0]].shape
            movie = channels[indices[0]].movie
            shape, scale = (frames, len(indices), height, width), movie.pixel_size_um
            layout = Layout(
                shape, np.dtype(dtype), chunk_frames, scale, movie.frame_interval_s
            )
            sink = open_sink(target, layout, overwrite=overwrite)
            is_named = resume and sink.is_committed
            (results.named if is_named else results.unnamed).append((sink, indices))
            if is_named or (resume and sink.is_begun):
                _check_settings(sink.journal, settings() | {"channels": indices})
        for sink, _ in results.unnamed:
            sink.check()
        for sink, indices in results.unnamed:
            if resume and sink.is_begun:
                sink.resume()
            else:
                begun.append(sink)
                is_file = isinstance(sink, Sink)
                sink.begin(settings() | {"channels": indices} if is_file else None)
        try:
            yield results
        except BaseException as error:
            sinks = [sink for sink, _ in results.unnamed if isinstance(sink, Sink)]
            kept = [str(s.draft) for s in sinks if s.journal.done and s.draft.exists()]
            if kept and not isinstance(error, ChangedSource):
                drafts = ", ".join(kept)
                error.add_note(
                    f"what is done is kept in {drafts}; run the same again to go on"
                )
            raise
        is_whole = True
    finally:
        # In a thread, which hears no second Ctrl-C.
        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(close)
            while not closing.done():
                with contextlib.suppress(KeyboardInterrupt):
                    closing.exception()
        closing.result()


class ChangedSource(MovieError):
    """A movie has changed since it was opened."""


class Sources:
    """The content of the files that a call reads, as it is when this is made: sizes, and
    frames from all of them. Their times of modification do not count."""

    def __init__(self, movies: Iterable[Movie]) -> None:
        self.states = {m: m.opened_state or m.state() for m in movies if m.paths}
        # Memory is hashed only where settings are needed.
        self.content = ft.cache(_content)
        for movie in self.states:
            self.content(movie)

    def check(self) -> None:
        """Refuses a movie that has changed, and warns of one whose time has."""
        for movie, before in self.states.items():
            with contextlib.suppress(OSError):
                if movie.state() == before:
                    continue
            if _content(movie) != self.content(movie):
                raise ChangedSource(
                    f"{movie.name}: has changed since it was opened; begin anew once it is "
                    "whole (resume=False, in the command line --fresh)"
                )
            warnings.warn(
                f"{movie.name}: its time of modification has changed, but not its size nor "
                "the frames that were compared; the result is kept",
                stacklevel=3,
            )


def _content(movie: Movie) -> list[Any]:
    return [movie.fingerprint(), *[p.stat().st_size for p in movie.paths if p.is_file()]]


def settings_of(
    sources: Sources,
    channels: Sequence[Channel],
    weights: Sequence[Channel | None],
    estimator: AbstractEstimator,
    output: Output,
    chunk_frames: int,
) -> dict[str, Any]:
    """All that a result depends on, in terms of JSON."""
    content = sources.content
    return {
        "source": [[content(c.movie), c.index, list(map(int, c.box))] for c in channels],
        "weights": [None if w is None else content(w.movie) for w in weights],
        "estimator": _hash(estimator),
        "quantity": output.quantity,
        "dtype": output.dtype,
        "offsets": list(output.offsets),
        "gains": list(output.gains),
        "chunk_frames": chunk_frames,
        "version of jaxbkgd": __version__,
        "version of jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
        "64-bit mode": jax.config.read("jax_enable_x64"),
    }


def _check_settings(journal: Journal, now: dict[str, Any]) -> None:
    before = journal.settings or {}
    changes = [
        f"{name} {before.get(name)}, not {value}"
        if name not in ("source", "weights", "estimator")
        else name
        for name, value in sorted(now.items())
        if before.get(name) != value
    ]
    if changes:
        raise MovieError(
            f"{journal.path}: was begun with other settings ({'; '.join(changes)}); give "
            "them again, or begin anew (resume=False, in the command line --fresh)"
        )


def _hash(estimator: AbstractEstimator) -> str:
    """A hash of all that it holds, which is the same in every process."""
    pickled = io.BytesIO()
    refusals = TypeError, ValueError, AttributeError, pickle.PicklingError, RecursionError
    try:
        _Pickler(pickled).dump(estimator)
    except refusals as error:
        raise TypeError(
            f"{type(estimator).__name__} holds something that another run could not "
            f"recognise ({error}), so that it could not be resumed; let it hold arrays, "
            "numbers, functions and what can be pickled, or write to an array"
        ) from error
    return hashlib.sha256(pickled.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Describes what pickle refuses, or orders by chance."""

    def persistent_id(self, obj: Any) -> Any:
        match obj:
            case type():
                return obj.__module__, obj.__qualname__
            case set() | frozenset():
                return type(obj), sorted(map(pickle.dumps, obj))
            case types.CodeType():
                return obj.co_code, obj.co_consts, obj.co_names
            case types.FunctionType():
                name = obj.__module__, obj.__qualname__
                # A function of a module may hold what changes as it runs.
                is_local = "<locals>" in obj.__qualname__ or obj.__name__ == "<lambda>"
                cells = obj.__closure__ or () if is_local else ()
                held = [cell.cell_contents for cell in cells]
                return name, obj.__code__, obj.__defaults__, obj.__kwdefaults__, held
        # A function that JAX has compiled, with what it remembers of its calls.
        wrapped = getattr(obj, "__wrapped__", None) if callable(obj) else None
        return wrapped and (type(obj).__qualname__, wrapped)


def group_targets(sink: Any, channel_count: int, is_list: bool) -> list[Target]:
    """Each path or array to write to, with the numbers of its channels."""
    if not is_list:
        return [(sink, list(range(channel_count)))]
    sinks = list(sink) if isinstance(sink, list | tuple) else [sink]
    if len(sinks) != channel_count:
        raise ValueError(
            f"There are {channel_count} channels, but {len(sinks)} sinks; give a list "
            "with a sink for each channel."
        )
    return [(sink, [index]) for index, sink in enumerate(sinks)]


def check_targets(targets: Sequence[Target], movies: Iterable[Movie]) -> None:
    """Nothing that is read may be written to, or removed, and nothing written twice."""
    arrays = [target for target, _ in targets if isinstance(target, np.ndarray)]
    for number, array in enumerate(arrays):
        others = [np.may_share_memory(array, other) for other in arrays[:number]]
        if any([movie.shares_memory(array) for movie in movies] + others):
            raise ValueError(
                "An array to fill shares memory with the movie or with another one; give "
                "an array of its own."
            )
    paths = [path.resolve() for target, _ in targets if (path := as_path(target))]
    for path in paths:
        if paths.count(path) > 1:
            raise MovieError(f"{path}: is given for two channels; give each a name")
        touched = [path, *(draft_of(path, suffix) for suffix in DRAFT_SUFFIXES)]
        if any(movie.includes(name) for movie in movies for name in touched):
            raise MovieError(
                f"{path}: is the movie itself, or would be a part of it when it is read "
                "again; give a name elsewhere"
            )


def begun_chunk_frames(targets: Sequence[Target]) -> int | None:
    """The chunks of an earlier run's drafts."""
    for target, _ in targets:
        if path := as_path(target):
            journal = Journal(draft_of(path, JOURNAL_SUFFIX))
            journal.close()
            if journal.settings is not None and "chunk_frames" in journal.settings:
                return journal.settings["chunk_frames"]
    return None


def as_path(target: Any) -> Path | None:
    return Path(target) if isinstance(target, str | PathLike) else None

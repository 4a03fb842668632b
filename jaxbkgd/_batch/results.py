"""The files and arrays that a call writes: begun, gone on with, and given their names."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

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
from .._workers import Gate
from .plan import Window
from .settings import difference, warn_of_new_time


# A path or an array, and the numbers of the channels that go there.
Target = tuple[Any, list[int]]


@dataclass(eq=False)
class _Result:
    """`is_named`: an earlier run has given it its name. `is_new`: this run has begun it."""

    sink: Sink | ArraySink
    channels: list[int]
    is_named: bool
    is_new: bool = False


class Results(contextlib.AbstractContextManager):
    """The sinks of a call, each for some of its channels.

    When it ends early, drafts that have anything in them stay for a later run.
    """

    def __init__(self, gate: Gate) -> None:
        self._results: list[_Result] = []
        self._gate = gate
        self._can_go_on = False

    def open(
        self,
        targets: Sequence[Target],
        channels: Sequence[Channel],
        dtype: str,
        chunk_frames: int,
        settings: Callable[[], dict[str, Any]],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """Opens what an earlier run with these settings has left, or begins anew."""
        for target, indices in targets:
            frames, height, width = channels[indices[0]].shape
            movie = channels[indices[0]].movie
            layout = Layout(
                (frames, len(indices), height, width),
                np.dtype(dtype),
                chunk_frames,
                movie.pixel_size_um,
                movie.frame_interval_s,
            )
            sink = open_sink(target, layout, overwrite=overwrite)
            self._results.append(_Result(sink, indices, resume and sink.is_committed))
        for result in self._results:
            if result.is_named or (resume and result.sink.is_begun):
                now = settings() | {"channels": result.channels}
                _check_settings(
                    result.sink, now, [channels[i].movie for i in result.channels]
                )
            if not result.is_named:
                result.sink.check()
        for result in self._unnamed():
            if resume and result.sink.is_begun:
                result.sink.resume()
                continue
            result.is_new = True
            if isinstance(result.sink, Sink):
                result.sink.begin(settings() | {"channels": result.channels})
        self._can_go_on = True

    def _unnamed(self) -> Iterator[_Result]:
        return (result for result in self._results if not result.is_named)

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that a sink lacks."""
        done = [result.sink.journal.done for result in self._unnamed()]
        return [
            window
            for window in windows
            if not all(window.number in numbers for numbers in done)
        ]

    def write(
        self, window: Window, strip: Window | None, images: Sequence[np.ndarray]
    ) -> None:
        """Writes frames (frames, height, width) of each channel, or a strip of them."""
        with self._gate:
            for result in self._unnamed():
                parts = [images[index][window.kept, None] for index in result.channels]
                frames = parts[0] if len(parts) == 1 else np.hstack(parts)
                if strip is None:
                    result.sink.write(window.start, frames)
                else:
                    assert isinstance(result.sink, ArraySink)
                    result.sink.write(window.start, frames[..., strip.kept, :], strip.start)

    def note(self, window: Window) -> None:
        """Notes that a window is written."""
        with self._gate:
            for result in self._unnamed():
                result.sink.note(window.number)

    def forbid_resuming(self) -> None:
        """For a source that has changed meanwhile."""
        self._can_go_on = False

    def commit(self) -> None:
        """Gives the drafts their names."""
        for result in self._unnamed():
            result.sink.give_name()
        # Not before all have their names: of a job that ends earlier, a later run would not
        # know the first ones for its own. (One that ends here is whole.)
        for result in self._results:
            result.sink.finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._gate.close()
        finally:
            kept = [name for result in self._results if (name := _close(result, error))]
            if error is not None and kept and self._can_go_on:
                drafts = ", ".join(kept)
                error.add_note(
                    f"what is done is kept in {drafts}; run the same again to go on"
                )


def _close(result: _Result, error: BaseException | None) -> str | None:
    """The name of the draft, if there is anything in it."""
    sink = result.sink
    if error is not None and result.is_new and not sink.journal.done:
        sink.discard()
        return None
    sink.close()
    if isinstance(sink, Sink) and sink.journal.done and not result.is_named:
        return str(sink.draft) if sink.draft.exists() else None
    return None


def _check_settings(
    sink: Sink | ArraySink, now: dict[str, Any], movies: Sequence[Movie]
) -> None:
    before = sink.journal.settings or {}
    if names := difference(before, now):
        raise MovieError(
            f"{sink.journal.path}: was begun with other settings ({names}); give the same "
            "again, or begin anew (resume=False, in the command line --fresh)"
        )
    if before.get("states") != now["states"]:
        for movie in dict.fromkeys(movies):
            warn_of_new_time(movie)


def group_targets(sink: Any, channel_count: int, is_list: bool) -> list[Target]:
    """Each path or array to write to, with the numbers of its channels."""
    indices = list(range(channel_count))
    groups = [[index] for index in indices] if is_list else [indices]
    targets = list(sink) if is_list and isinstance(sink, list | tuple) else [sink]
    if len(targets) != len(groups):
        raise ValueError(
            f"There are {channel_count} channels, but {len(targets)} sinks; give a list "
            "with a sink for each channel."
        )
    return list(zip(targets, groups, strict=True))


def check_targets(targets: Sequence[Target], movies: Sequence[Movie]) -> None:
    """Nothing that is read may be written to, or removed, and nothing written twice."""
    arrays = [target for target, _ in targets if isinstance(target, np.ndarray)]
    for number, array in enumerate(arrays):
        if any(movie.shares_memory(array) for movie in movies) or any(
            np.may_share_memory(array, other) for other in arrays[:number]
        ):
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
            with contextlib.closing(journal):
                if journal.settings is not None and "chunk_frames" in journal.settings:
                    return journal.settings["chunk_frames"]
    return None


def as_path(target: Any) -> Path | None:
    return Path(target) if isinstance(target, str | PathLike) else None

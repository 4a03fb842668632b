"""A movie that is estimated while it is written: windows come as their frames do."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._estimators.base import AbstractEstimator
from .._estimators.checks import checked_number
from .._movies.growing import GrowingMovie
from .._movies.movie import Channel, chosen_frames, Movie, MovieError
from .._movies.open import open_sources
from .plan import Window, windows
from .results import Job, Results


# Seconds without anything new after which a movie is complete, between looks at it, and for
# which it may be unreadable, as where its index is replaced.
DEFAULT_SILENCE, _LOOK, _PATIENCE = 10.0, 0.05, 1.0

# Frames that a calibration waits for, and sees.
CALIBRATION_FRAMES = 300

# Windows that depend on the end of the movie have numbers of their own for each length.
_LENGTHS = 2**32


def open_followed(
    source: Any,
    follow: bool | float,
    files: contextlib.ExitStack,
    least: int,
    frames: slice | None,
) -> tuple[Any, "Follower | None"]:
    """A source with open movies that show at least so many of the chosen frames, or all,
    and what follows them; none where nothing grows."""
    follower = Follower(source, follow, files)
    follower.wait(least, frames)
    return follower.source, follower if follower.movies else None


class Follower:
    """Movies that are being written, and what is to be done of them by now.

    `source` has the structure of that of `estimate_movie`, with open movies, all of which
    show as many frames. A path that cannot be followed is opened once nothing is written.
    """

    def __init__(
        self, source: Any, follow: bool | float, files: contextlib.ExitStack
    ) -> None:
        self.silence = DEFAULT_SILENCE if follow is True else follow
        if follow is None or isinstance(follow, str):
            raise TypeError(f"follow must be True, False or seconds, but is {follow!r}.")
        checked_number("follow", self.silence, unit="seconds")
        self._changed = time.monotonic()
        self._failed: float | None = None
        self._state: Any = None
        entries = source if isinstance(source, list | tuple) else [source]
        movies = [self._open(entry, files) for entry in entries]
        self.movies = [movie for movie in movies if isinstance(movie, GrowingMovie)]
        self.source = movies if isinstance(source, list | tuple) else movies[0]

    def _open(self, source: Any, files: contextlib.ExitStack) -> Movie | Channel:
        if not isinstance(source, str | os.PathLike):
            return open_sources(source, files)
        from .._movies.growing_formats import open_growing

        path = Path(source)
        while True:
            try:
                movie = open_growing(path)
            except MovieError:
                status = path.stat() if path.exists() else None
                if self._is_silent(status and (status.st_size, status.st_mtime_ns)):
                    return open_sources(source, files)
                time.sleep(_LOOK)
            else:
                return files.enter_context(contextlib.closing(movie))

    def _is_silent(self, state: Any) -> bool:
        if state != self._state:
            self._state, self._changed = state, time.monotonic()
        return time.monotonic() - self._changed > self.silence

    @property
    def is_over(self) -> bool:
        return all(movie.has_ended for movie in self.movies)

    def look(self, most: int | None = None) -> int:
        """Shows the frames that are complete by now, or so many of them, and all that
        there are in the end. Returns how many."""
        try:
            counts = [movie.complete_frames() for movie in self.movies]
            state = counts, [movie.state() for movie in self.movies]
            self._failed = None
        except (MovieError, OSError):
            self._failed = self._failed or time.monotonic()
            if time.monotonic() - self._failed > _PATIENCE:
                raise
            return 0
        if self._is_silent(state):
            for movie in self.movies:
                movie.end()
            return min(movie.shape[0] for movie in self.movies)
        count = min(counts) if most is None else min(*counts, most)
        if count:
            for movie in self.movies:
                movie.grow(count)
        return count

    def wait(self, count: int, frames: slice | None) -> None:
        """Shows so many of the frames that are chosen, once they are complete."""
        chosen = slice(None) if frames is None else frames
        numbers = chosen_frames("the movie", range(sys.maxsize), chosen)
        last = numbers[min(count, len(numbers)) - 1]
        while not self.is_over and self.look(last + 1) <= last:
            time.sleep(_LOOK)

    def batches(
        self,
        job: Job,
        results: Results,
        estimator: AbstractEstimator,
        open_channels: Callable[[], list[Channel]],
    ) -> Iterator[list[Window]]:
        """The windows whose frames are complete, until nothing more comes. The channels of
        the job grow with them. All but the last windows are the same at whatever time it is
        looked."""
        begun, number = max(_done_windows(results), default=-1) + 1, 0
        while True:
            if not self.is_over:
                self.look()
            is_over, job.channels = self.is_over, open_channels()
            length = len(job.channels[0])
            batch = list(_ready_windows(job, estimator, length, number))
            number += len(batch)
            if is_over:
                if number < begun:
                    what = f"has {length} frames, but more were estimated; start over"
                    raise MovieError(f"{job.channels[0].movie.name}: {what}")
                options = estimator.halo_frames, estimator.aligned_frames
                rest = [*windows(length, job.chunk_frames, *options)][number:]
                shift = _LENGTHS * length
                batch += [w._replace(number=shift + w.number) for w in rest]
            results.set_length(length if is_over else max(length, begun * job.chunk_frames))
            if todo := results.missing(batch):
                yield todo
            elif not is_over:
                time.sleep(_LOOK)
            if is_over:
                return


def begun_frames(job: Job, results: Results) -> int:
    """Frames that earlier runs have done, without those of the last windows."""
    return len(_done_windows(results)) * job.chunk_frames


def _done_windows(results: Results) -> set[int]:
    """The windows that all sinks have and that do not depend on the end of the movie."""
    done = [sink.journal.done for sink, _ in results.unnamed] or [set[int]()]
    return {number for number in set.intersection(*done) if number < _LENGTHS}


def _ready_windows(
    job: Job, estimator: AbstractEstimator, length: int, number: int
) -> Iterator[Window]:
    """The windows from this number on whose frames are there. All see as many frames."""
    halo, aligned, chunk = estimator.halo_frames, estimator.aligned_frames, job.chunk_frames
    ahead = halo if job.look_ahead_frames is None else min(halo, job.look_ahead_frames)
    count = halo + chunk + ahead + aligned - 1
    for start in itertools.count(number * chunk, chunk):
        low = max(0, start - halo) // aligned * aligned
        if low + count > length:
            return
        kept = slice(start - low, start - low + chunk)
        yield Window(start // chunk, start, start + chunk, slice(low, low + count), kept)

"""Movies that are still being written: how many of their frames are complete by now."""

import abc
import warnings
from pathlib import Path
from typing import Any

from .movie import ChangedSource, Movie, MovieError, named_errors
from .open import open_movie


# Of the frames that were newest when they were read, so many are compared in the end.
_MOST_COMPARED = 100


class GrowingMovie(Movie, abc.ABC):
    """A movie of which `grow` shows frames that are complete, and `end` the whole movie
    once nothing is written any more."""

    shown_frames = 0
    has_ended = False

    def __init__(self, path: Path, opened: Movie) -> None:
        self._path, self._sources = path, opened.paths
        # Hashes of the newest frame of each time.
        self._seen: dict[int, str] = {}
        super().__init__(
            opened.pixels,
            name=opened.name,
            format=opened.format,
            pixel_size_um=opened.pixel_size_um,
            frame_interval_s=opened.frame_interval_s,
            close=opened.close,
        )

    @abc.abstractmethod
    def _complete_frames(self) -> int: ...
    @abc.abstractmethod
    def _read_pixels(self, count: int) -> Any:
        """Pixels of so many frames, and perhaps of more."""

    def complete_frames(self) -> int:
        """How many frames are complete by now. Raises `MovieError` where there are fewer
        than before."""
        for source in self._sources:
            if not source.exists():
                raise MovieError(f"{source}: was removed while it was followed")
        with named_errors(f"{self.name}: cannot be followed", Exception):
            count = self._complete_frames()
        if count < self.shown_frames:
            what = f"was cut from {self.shown_frames} frames to {count} as it was followed"
            raise MovieError(f"{self.name}: {what}; start over with a whole movie")
        return count

    def grow(self, count: int) -> None:
        """Shows so many of the complete frames. No thread may read meanwhile."""
        if count != self.shown_frames:
            self.pixels, self.shape = self._read_pixels(count), (count, *self.shape[1:])
            self.shown_frames = count
            self._seen[count - 1] = self._hash_of_frame(count - 1)

    def end(self) -> None:
        """Shows the movie as it is read now or, if its writer has not finished it, what is
        complete of it, and refuses frames that were written after they had been read, or
        that have another shape in the end."""
        count = self.complete_frames()
        try:
            finished = self._open_finished()
            if finished.shape[1:] != self.shape[1:]:
                what = f"is read as {finished.shape[1:]} (channels, height, width) now, but"
                rule = f"as {self.shape[1:]} before; start over with the whole movie"
                raise ChangedSource(f"{self.name}: {what} {rule}")
            if finished.shape[0] < count:
                raise MovieError(f"{self.name}: is read with the shape {finished.shape}")
        except ChangedSource:
            raise
        except MovieError as error:
            if not count:
                raise
            self.grow(count)
            self._finish()
            what = f"it was not finished, and {count} frames are taken, which are complete"
            warnings.warn(f"{error}; {what}", stacklevel=2)
        else:
            self.pixels, self.shape = finished.pixels, finished.shape
            self._finish()

    def _open_finished(self) -> Movie:
        return open_movie(self._path)

    def _finish(self) -> None:
        self.has_ended, self.shown_frames = True, self.shape[0]
        for frame in [*self._seen][:: 1 + len(self._seen) // _MOST_COMPARED]:
            if self._hash_of_frame(frame) != self._seen[frame]:
                what = f"frame {frame} was written again after it had been read"
                raise ChangedSource(f"{self.name}: {what}; start over with the whole movie")

    def state(self) -> Any:
        """What changes as long as something is written."""
        statuses = [source.stat() for source in self._sources if source.is_file()]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        """That of the first frame, however far the movie has grown."""
        return self._hash_of_frame(0)

    def _hash_of_frame(self, frame: int) -> str:
        return self._hash_of(self.shape[1:], [frame])

    def includes(self, path: Path) -> bool:
        sources = [source.resolve() for source in self._sources]
        return any(source in (path, *path.parents) for source in sources)

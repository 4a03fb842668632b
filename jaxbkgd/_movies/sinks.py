"""Movies that are written: by chunks, in any order, whole or absent under their name."""

import abc
import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .journal import Journal
from .movie import MovieError, one_line


JOURNAL_SUFFIX = ".part.journal"
_ASIDE_SUFFIX = ".part.old"
# Of what lies beside a movie while it is written.
DRAFT_SUFFIXES = (".part", JOURNAL_SUFFIX, _ASIDE_SUFFIX)


@dataclass(frozen=True)
class Layout:
    """What is written.

    **Attributes:**

    - `shape`: (frames, channels, height, width).
    - `dtype`: of the pixels.
    - `chunk_frames`: frames come in chunks of so many, each at a multiple of it; the last
        one may be shorter.
    - `pixel_size_um`: (y, x), where known.
    - `frame_interval_s`: from one frame to the next, where known.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    chunk_frames: int
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None

    @property
    def frame_bytes(self) -> int:
        """Of all channels."""
        _, channels, height, width = self.shape
        return self.dtype.itemsize * channels * height * width


class Sink(abc.ABC):
    """A movie that is written to a draft, `NAME.part`, and gets its name when complete.

    `begin` makes the draft, or `resume` opens one that was left. `write` may be called by
    any number of threads, in any order of chunks. Then `commit` gives the movie its name;
    `close` leaves the draft for a later `resume`; `discard` removes it. The journal,
    `NAME.part.journal`, says what the draft is, and is locked meanwhile.
    """

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        self.path = path
        self.layout = layout
        self._overwrite = overwrite
        # Through a symbolic link, it is the file behind that is written.
        self._destination = Path(os.path.realpath(path))
        self.draft = draft_of(self._destination)
        self.journal = Journal(draft_of(self._destination, JOURNAL_SUFFIX))

    def __getstate__(self) -> dict[str, Any]:
        # In another process, which writes but does not note it, there is no lock to hold.
        return {name: value for name, value in vars(self).items() if name != "journal"}

    @abc.abstractmethod
    def _begin(self) -> None:
        """Make the draft, where there is none."""

    @abc.abstractmethod
    def _resume(self) -> None:
        """Open the draft that is there."""

    @abc.abstractmethod
    def _write(self, start: int, frames: np.ndarray) -> None:
        """Write contiguous (any, channels, height, width) frames of the right dtype."""

    @abc.abstractmethod
    def _complete(self) -> None:
        """Write what the format wants at the end, and close the draft."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Close the draft and leave it where it is."""

    @abc.abstractmethod
    def _is_replaceable(self) -> bool:
        """Whether what has the name now is of the kind that this sink writes."""

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has left a draft."""
        return self.journal.settings is not None and self.draft.exists()

    @property
    def is_committed(self) -> bool:
        """Whether an earlier run ended as it gave the draft its name."""
        has_name = self._destination.exists() and not self.draft.exists()
        return self.journal.is_committing and has_name

    def check(self) -> None:
        """Refuse now what could not be written in the end."""
        check_destination(self.path, overwrite=self._overwrite)
        if os.path.lexists(self._destination) and not self._is_replaceable():
            raise MovieError(
                f"{self.path}: is no movie of this format, so it is not overwritten; "
                "choose another name"
            )

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        """`settings` are what the draft depends on, in terms of JSON."""
        self.check()
        with self._one_line_errors():
            # A new draft may not pass for the one that an old journal speaks of.
            self.journal.clear()
            _remove(self.draft)
            self._check_space()
            self._begin()
            self.journal.begin(dict(settings or {}))

    def resume(self) -> None:
        self.check()
        try:
            with self._one_line_errors():
                self._resume()
        except MovieError as error:
            raise MovieError(
                f"{self.path}: what an earlier run has left is broken; begin anew "
                f"(resume=False, in the command line --fresh) ({error})"
            ) from error

    def write(self, start: int, frames: np.ndarray) -> None:
        """Write frames (any, channels, height, width) from frame `start` on."""
        with self._one_line_errors():
            # An open file that has been removed takes what is written, and loses it.
            os.stat(self.draft)
            self._write(start, np.ascontiguousarray(frames, self.layout.dtype))

    def note(self, chunk: int) -> None:
        """Note that the chunk of this number has been written."""
        with self._one_line_errors():
            self.journal.add(chunk)

    def commit(self) -> None:
        """Give the draft its name, where no other result belongs to it."""
        self.give_name()
        self.finish()

    def give_name(self) -> None:
        """Give the draft its name. Until `finish`, a later run knows it for its own."""
        with self._one_line_errors():
            self._complete()
            self.check()
            self.journal.commit()
            if self._destination.is_dir():
                # A folder can't be replaced in one step.
                aside = draft_of(self._destination, _ASIDE_SUFFIX)
                _remove(aside)
                self._destination.rename(aside)
            self.draft.replace(self._destination)

    def finish(self) -> None:
        """Remove what is left beside a movie that has its name."""
        with self._one_line_errors():
            _remove(draft_of(self._destination, _ASIDE_SUFFIX))
        self.journal.remove()

    def close(self) -> None:
        """Leave the draft for a later run."""
        self._close()
        self.journal.close()

    def discard(self) -> None:
        """Remove the draft."""
        self._close()
        with contextlib.suppress(OSError):
            _remove(self.draft)
        self.journal.remove()

    def _check_space(self) -> None:
        needed = self.layout.shape[0] * self.layout.frame_bytes
        free = shutil.disk_usage(self._destination.parent).free
        if needed > free:
            raise MovieError(
                f"{self.path}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
                "free there; make room, or choose another place"
            )

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MovieError(
                f"{self.path}: cannot be written, because {self.draft} has been removed"
            ) from error
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise MovieError(f"{self.path}: cannot be written ({reason})") from error


class ArraySink:
    """An array (frames, height, width) or (frames, channels, height, width) to fill."""

    def __init__(self, array: np.ndarray, layout: Layout) -> None:
        frames, channels, height, width = layout.shape
        shapes = [layout.shape] + ([(frames, height, width)] if channels == 1 else [])
        if array.shape not in shapes or array.dtype != layout.dtype:
            raise MovieError(
                f"the array to fill has shape {array.shape} and dtype {array.dtype}; give "
                f"one of shape {' or '.join(map(str, shapes))} and dtype {layout.dtype}"
            )
        if not array.flags.writeable:
            raise MovieError("the array to fill can't be written to; give a copy of it")
        self.layout = layout
        # It goes with its process, so that nothing can be resumed.
        self.journal = Journal(None)
        self._array = array

    is_begun = is_committed = False

    def check(self) -> None:
        pass

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        pass

    def resume(self) -> None:
        pass

    def write(self, start: int, frames: np.ndarray, first_line: int = 0) -> None:
        """As a sink of files, or lines of these frames alone, from the first one on."""
        lines = slice(first_line, first_line + frames.shape[-2])
        part = self._array[start : start + len(frames), ..., lines, :]
        part[...] = frames.reshape(part.shape)

    def note(self, chunk: int) -> None:
        self.journal.add(chunk)

    def commit(self) -> None:
        pass

    def give_name(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse now what could not be written in the end."""
    destination = Path(os.path.realpath(path))
    folder = destination.parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise MovieError(
            f"{path}: cannot be written, because there is no folder {folder}; make it "
            "first, or choose another place"
        )
    if not os.access(folder, os.W_OK):
        raise MovieError(f"{path}: cannot be written, because {folder} refuses files")
    if os.path.lexists(destination) and not overwrite:
        raise MovieError(
            f"{path}: exists already; choose another name, or overwrite it "
            "(overwrite=True, in the command line --overwrite)"
        )


def draft_of(path: Path, suffix: str = ".part") -> Path:
    """Beside the file or folder that has the name `path`, or the one behind a link."""
    destination = Path(os.path.realpath(path))
    return destination.with_name(destination.name + suffix)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Movies that are written by chunks, in any order, and have their name when complete."""

import abc
import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .journal import Journal, LOCK_SUFFIX
from .movie import MovieError, one_line


JOURNAL_SUFFIX = ".part.journal"
_ASIDE_SUFFIX = ".part.old"
# Suffixes of the files beside a movie while it is written.
DRAFT_SUFFIXES = (".part", JOURNAL_SUFFIX, JOURNAL_SUFFIX + LOCK_SUFFIX, _ASIDE_SUFFIX)


@dataclass(frozen=True)
class Layout:
    """The frames to be written.

    **Attributes:**

    - `shape`: (frames, channels, height, width).
    - `dtype`: of the pixels.
    - `chunk_frames`: frames come in chunks of this length, each at a multiple of it; the
        last chunk may be shorter.
    - `pixel_size_um`: (y, x), or None.
    - `frame_interval_s`: from one frame to the next, or None.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    chunk_frames: int
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None

    @property
    def frame_bytes(self) -> int:
        """The bytes of a frame of all channels."""
        _, channels, height, width = self.shape
        return self.dtype.itemsize * channels * height * width


class Target:
    """A movie to be written.

    `begin` starts it, or `resume` goes on with what an earlier run has left. Any number of
    threads may `write` chunks, in any order. `commit`, or `give_name` and then `finish`,
    completes it; `close` leaves it for a later `resume`; `discard` removes it. None of
    these returns before the writes that are under way, and later writes are refused.
    """

    is_begun = False
    is_committed = False

    def __init__(self, name: str, layout: Layout, journal: Journal) -> None:
        self.layout = layout
        self.journal = journal
        self._name = name
        self._is_closed = False
        self._writers = 0
        self._changed = threading.Condition()

    def check(self) -> None:
        """Refuses now what could not be written in the end."""

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        """`settings` are what the result depends on, in terms of JSON."""
        self._is_closed = False

    def resume(self) -> None:
        """Goes on with the draft of an earlier run."""
        self._is_closed = False

    def write(self, start: int, frames: np.ndarray) -> None:
        """Writes frames (any, channels, height, width) from frame `start` on."""
        raise NotImplementedError

    def note(self, chunk: int) -> None:
        """Notes that the chunk of this number has been written."""
        self.journal.add(chunk)

    def commit(self) -> None:
        """Completes a movie that is written alone."""
        self.give_name()
        self.finish()

    def give_name(self) -> None:
        """Completes the movie. Until `finish`, a later run knows it for its own."""
        self._refuse_writes()

    def finish(self) -> None:
        """Removes what is left beside a complete movie."""

    def close(self) -> None:
        """Leaves the draft for a later run."""
        self._refuse_writes()

    def discard(self) -> None:
        """Removes the draft."""
        self._refuse_writes()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._changed:
            if self._is_closed:
                raise MovieError(f"{self._name}: is closed, and takes no more frames")
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def _refuse_writes(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._writers)


class Sink(Target, abc.ABC):
    """A file or folder that is written as a draft, `NAME.part`, and renamed when complete.

    The journal, `NAME.part.journal`, describes the draft, and is locked meanwhile.
    """

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        self.path = path
        self._overwrite = overwrite
        # A symbolic link stays; the file that it points to is written.
        self._destination = Path(os.path.realpath(path))
        self.draft = draft_of(self._destination)
        journal = Journal(draft_of(self._destination, JOURNAL_SUFFIX))
        super().__init__(str(path), layout, journal)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process writes, and leaves notes and lock to this process.
        return vars(self) | {"journal": None, "_changed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            state, journal=Journal(None), _changed=threading.Condition(), _writers=0
        )

    @abc.abstractmethod
    def _begin(self) -> None:
        """Makes the draft, where there is none."""

    @abc.abstractmethod
    def _resume(self) -> None:
        """Opens the draft that is there."""

    @abc.abstractmethod
    def _write(self, start: int, frames: np.ndarray) -> None:
        """Writes contiguous frames (any, channels, height, width) of the layout's dtype."""

    @abc.abstractmethod
    def _complete(self) -> None:
        """Writes what the format wants at the end, and closes the draft."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Closes the draft and leaves it where it is."""

    @abc.abstractmethod
    def _is_replaceable(self) -> bool:
        """Whether the file or folder that has the name now is of this sink's format."""

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has left a draft."""
        return self.journal.settings is not None and self.draft.exists()

    @property
    def is_committed(self) -> bool:
        """Whether an earlier run ended just after it gave the draft its name."""
        has_name = self._destination.exists() and not self.draft.exists()
        return self.journal.is_committing and has_name

    def check(self) -> None:
        check_destination(self.path, overwrite=self._overwrite)
        if os.path.lexists(self._destination) and not self._is_replaceable():
            raise MovieError(
                f"{self.path}: is no movie of this format, so it is not overwritten; "
                "choose another name"
            )

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        self.check()
        super().begin(settings)
        with self._one_line_errors():
            # First the old journal, which must not describe the new draft.
            self.journal.clear()
            _remove(self.draft)
            self._check_space()
            self._begin()
            self.journal.begin(dict(settings or {}))

    def resume(self) -> None:
        self.check()
        super().resume()
        try:
            with self._one_line_errors():
                self._resume()
        except MovieError as error:
            raise MovieError(
                f"{self.path}: the draft of an earlier run is broken; begin anew "
                f"(resume=False, in the command line --fresh) ({error})"
            ) from error

    def write(self, start: int, frames: np.ndarray) -> None:
        with self._writing(), self._one_line_errors():
            # A file that was removed while it is open takes frames, and loses them.
            os.stat(self.draft)
            self._write(start, np.ascontiguousarray(frames, self.layout.dtype))

    def note(self, chunk: int) -> None:
        with self._writing(), self._one_line_errors():
            super().note(chunk)

    def give_name(self) -> None:
        super().give_name()
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
        with self._one_line_errors():
            _remove(draft_of(self._destination, _ASIDE_SUFFIX))
        self.journal.remove()

    def close(self) -> None:
        super().close()
        self._close()
        self.journal.close()

    def discard(self) -> None:
        super().discard()
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


class ArraySink(Target):
    """An array (frames, height, width) or (frames, channels, height, width) to fill.

    It ends with its process, so nothing is left to resume.
    """

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
        super().__init__("the array to fill", layout, Journal(None))
        self._array = array

    def write(self, start: int, frames: np.ndarray, first_line: int = 0) -> None:
        """Writes frames, or lines of them from `first_line` on."""
        lines = slice(first_line, first_line + frames.shape[-2])
        with self._writing():
            part = self._array[start : start + len(frames), ..., lines, :]
            part[...] = frames.reshape(part.shape)


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuses now what could not be written in the end."""
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
    """The draft beside `path`, or beside the file that this symbolic link points to."""
    destination = Path(os.path.realpath(path))
    return destination.with_name(destination.name + suffix)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

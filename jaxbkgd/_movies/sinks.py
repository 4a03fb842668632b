"""Movies that are written by chunks, in any order, and have their name when complete."""

import abc
import contextlib
import errno
import json
import math
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .movie import MovieError, named_errors, one_line


JOURNAL_SUFFIX = ".part.journal"
_LOCK_SUFFIX = ".lock"
_ASIDE_SUFFIX = ".part.old"
# Suffixes of the files beside a movie while it is written.
DRAFT_SUFFIXES = (".part", JOURNAL_SUFFIX, JOURNAL_SUFFIX + _LOCK_SUFFIX, _ASIDE_SUFFIX)

# The line that is added before the draft gets its name.
_COMMITTING = "committing"


def hold_lock(path: Path) -> Any:
    """A lock on a file beside this one, which the system gives back when the process ends.
    `MovieError` where another run has it."""
    import filelock

    # A fallback takes the file itself for a lock, which a killed run leaves.
    lock = filelock.FileLock(
        path.with_name(path.name + _LOCK_SUFFIX),
        timeout=0,
        thread_local=False,
        fallback_to_soft=False,
    )
    try:
        lock.acquire()
    except filelock.Timeout as error:
        remedy = "wait for the other run to end, or write elsewhere"
        raise MovieError(f"{path}: is in use; {remedy}") from error
    except (OSError, NotImplementedError) as error:
        what = f"cannot be locked there ({one_line(error)})"
        rule = "start no other run that writes to the same name"
        warnings.warn(f"{path}: {what}; {rule}", stacklevel=2)
    return lock


class Journal:
    """The settings of a draft, and the numbers of its finished chunks, one on a line.

    A line is added in one write, so the process may be killed at any instant. One process
    at a time holds a journal, by a lock on a file beside it that the system gives back when
    the process ends. A journal without a path is kept in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.settings: dict[str, Any] | None = None
        self.done: set[int] = set()
        self.is_committing = False
        self._file: BinaryIO | None = None
        self._lock: Any = None
        self._adding = threading.Lock()
        if path is not None and path.exists():
            self._read(self._open(path))

    def _read(self, file: BinaryIO) -> None:
        content = file.read()
        # The process may have ended as it wrote a line.
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
        # A journal that cannot be read counts as none: the job starts over.
        with contextlib.suppress(ValueError, TypeError):
            settings, *lines = map(json.loads, whole.splitlines())
            done = {int(line) for line in lines if line != _COMMITTING}
            self.settings, self.done = dict(settings), done
            self.is_committing = _COMMITTING in lines

    def clear(self) -> None:
        if self.path is not None:
            (self._file or self._open(self.path)).truncate(0)
        self.settings, self.done, self.is_committing = None, set(), False

    def begin(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._add_line(settings)

    def add(self, chunk: int) -> None:
        self._add_line(chunk)
        self.done.add(chunk)

    def commit(self) -> None:
        self._add_line(_COMMITTING)

    def remove(self) -> None:
        """Removes the journal. Where its file cannot be removed, an empty one is left."""
        if self.path is not None and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            # Windows refuses to remove open files.
            self._file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
            # With the draft gone, nobody waits for the lock.
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        self.close()

    def close(self) -> None:
        """Leaves the journal for a later run."""
        file, lock, self._file, self._lock = self._file, self._lock, None, None
        if file is not None:
            file.close()
        if lock is not None:
            lock.release()

    def _open(self, path: Path) -> BinaryIO:
        self._lock = hold_lock(path)
        # Unbuffered, so that a line is one write; all writes go to the end.
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        return self._file

    def _add_line(self, content: Any) -> None:
        if self._file is None:
            return
        line = json.dumps(content).encode() + b"\n"
        with self._adding:
            end = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) < len(line):
                # Else the next line would continue this part.
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Layout:
    """The frames to be written: their `shape` (frames, channels, height, width), and the
    length of the chunks that they come in. `pixel_size_um` is (y, x). `about` says in terms
    of JSON what the numbers are."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    chunk_frames: int
    pixel_size_um: tuple[float, float] | None = None
    frame_interval_s: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about_lines(self) -> str:
        """A line `name: value` for each, as ImageJ's `Property.get` reads them."""
        texts = {
            n: v if isinstance(v, str) else json.dumps(v) for n, v in self.about.items()
        }
        return "\n".join(f"{name}: {text}" for name, text in texts.items())

    @property
    def frame_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class Target:
    """What any number of threads write to, by chunks in any order, until it is closed.

    `begin` starts it, or `resume` goes on with what an earlier run has left. `give_name`
    and then `finish` complete it, `close` leaves it for a later run, and `discard` removes
    it. These wait for threads that write, and refuse later writes.
    """

    is_begun = is_committed = False

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
        """Starts over. `settings`, in terms of JSON, are what the result depends on."""

    def resume(self) -> None:
        """Goes on with the draft of an earlier run."""

    def note(self, chunk: int) -> None:
        """Notes that the chunk of this number has been written."""
        with self._writing():
            self.journal.add(chunk)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._writers)

    # Until `finish`, a later run knows the movie for its own.
    give_name = finish = discard = close

    def commit(self) -> None:
        """Completes a movie that is written alone."""
        self.give_name()
        self.finish()

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


class ArraySink(Target):
    """An array (frames, height, width) or (frames, channels, height, width) to fill."""

    def __init__(self, array: np.ndarray, layout: Layout) -> None:
        frames, channels, *frame = layout.shape
        shapes = [layout.shape] + ([(frames, *frame)] if channels == 1 else [])
        if array.shape not in shapes or array.dtype != layout.dtype:
            rule = f"shape {' or '.join(map(str, shapes))} and dtype {layout.dtype}"
            fault = f"has shape {array.shape} and dtype {array.dtype}; give one of {rule}"
            raise MovieError(f"the array to fill {fault}")
        if not array.flags.writeable:
            raise MovieError("the array to fill can't be written to; give a copy of it")
        super().__init__("the array to fill", layout, Journal(None))
        self._array = array

    def write(self, start: int, frames: np.ndarray) -> None:
        """Writes frames (any, channels, height, width) from frame `start` on."""
        with self._writing():
            part = self._array[start : start + len(frames)]
            part[...] = frames.reshape(part.shape)


class Sink(Target, abc.ABC):
    """A file or folder that is written as a draft, `NAME.part`, and renamed when complete.

    `NAME.part.journal` describes the draft. A format makes the draft in `_begin`, or opens
    it in `_resume`; `_write` gets contiguous frames (any, channels, height, width) of the
    layout's dtype; `_complete` checks the draft.
    """

    def __init__(self, path: Path, layout: Layout, *, overwrite: bool = False) -> None:
        self.path = path
        self._overwrite = overwrite
        # A symbolic link stays; the file that it points to is written.
        self._destination = Path(os.path.realpath(path))
        self.draft = draft_of(path)
        super().__init__(str(path), layout, Journal(draft_of(path, JOURNAL_SUFFIX)))

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process writes, and leaves notes and lock to this process.
        return vars(self) | {"journal": None, "_changed": None, "_writers": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, journal=Journal(None), _changed=threading.Condition())

    @abc.abstractmethod
    def _begin(self) -> None: ...
    @abc.abstractmethod
    def _resume(self) -> None: ...
    @abc.abstractmethod
    def _write(self, start: int, frames: np.ndarray) -> None: ...
    def _complete(self) -> None: ...

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has left a draft."""
        return self.journal.settings is not None and self.draft.exists()

    @property
    def is_committed(self) -> bool:
        """Whether an earlier run ended just after it gave the draft its name."""
        is_renamed = self._destination.exists() and not self.draft.exists()
        return self.journal.is_committing and is_renamed

    def check(self) -> None:
        check_destination(self.path, overwrite=self._overwrite)
        place, wants_zarr = self._destination, self._destination.suffix.lower() == ".zarr"
        # A folder that is no Zarr may hold anything.
        is_of_format = is_zarr(place) if wants_zarr else place.is_file()
        if os.path.lexists(place) and not is_of_format:
            fault = "is no movie of this format, so it is not overwritten"
            raise MovieError(f"{self.path}: {fault}; choose another name")

    def begin(self, settings: Mapping[str, Any] | None = None) -> None:
        self.check()
        with self._named_errors():
            # First the old journal, which must not describe the new draft.
            self.journal.clear()
            _remove(self.draft)
            needed = self.layout.shape[0] * self.layout.frame_bytes
            free = shutil.disk_usage(self.draft.parent).free
            if needed > free:
                fault = f"needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free"
                raise MovieError(f"{self.path}: {fault}; choose another place")
            self._begin()
            self.journal.begin(dict(settings or {}))
        self._is_closed = False

    def resume(self) -> None:
        self.check()
        try:
            with self._named_errors():
                self._resume()
        except MovieError as error:
            remedy = "start over (resume=False, in the command line --fresh)"
            fault = f"the draft of an earlier run is broken; {remedy} ({error})"
            raise MovieError(f"{self.path}: {fault}") from error
        self._is_closed = False

    def write(self, start: int, frames: np.ndarray) -> None:
        """Writes frames (any, channels, height, width) from frame `start` on."""
        with self._writing(), self._named_errors():
            # A file that was removed while it is open takes frames, and loses them.
            os.stat(self.draft)
            self._write(start, np.ascontiguousarray(frames, self.layout.dtype))

    def _write_at(self, place: int, frames: np.ndarray) -> None:
        """Writes frames to the draft, a file, from this byte on, in little endian."""
        stored = np.asarray(frames, self.layout.dtype.newbyteorder("<"))
        # Every thread has a file of its own, which no other thread closes.
        with self.draft.open("r+b") as file:
            file.seek(place)
            file.write(stored.reshape(-1).view(np.uint8).data)

    def note(self, chunk: int) -> None:
        with self._named_errors():
            super().note(chunk)

    def give_name(self) -> None:
        super().close()
        with self._named_errors():
            self._complete()
            self.check()
            self.journal.commit()
            if self._destination.is_dir():
                # A folder can't be replaced in one step.
                aside = draft_of(self.path, _ASIDE_SUFFIX)
                _remove(aside)
                self._destination.rename(aside)
            self.draft.replace(self._destination)

    def finish(self) -> None:
        with self._named_errors():
            _remove(draft_of(self.path, _ASIDE_SUFFIX))
        self.journal.remove()

    def close(self) -> None:
        super().close()
        self.journal.close()

    def discard(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            _remove(self.draft)
        self.journal.remove()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        with named_errors(f"{self.path}: cannot be written"):
            try:
                yield
            except FileNotFoundError as error:
                fault = f"cannot be written, because {self.draft} has been removed"
                raise MovieError(f"{self.path}: {fault}") from error


class GrowingSink(Sink):
    """A sink whose layout says at first how many frames there are so far."""

    def set_length(self, frames: int) -> None:
        """Makes room for so many frames, and in the end for no more. No thread may write
        meanwhile."""
        with self._named_errors():
            shape = (frames, *self.layout.shape[1:])
            self.layout = replace(self.layout, shape=shape)
            self._set_length()

    def _set_length(self) -> None: ...

    def _begin(self) -> None:
        self.draft.touch()

    def _resume(self) -> None:
        os.stat(self.draft)


def is_zarr(path: Path) -> bool:
    """Whether a folder holds an array or a group of Zarr v2 or v3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuses now what could not be written in the end."""
    destination = Path(os.path.realpath(path))
    folder = destination.parent if path.is_symlink() else path.parent
    fault = None
    if not folder.is_dir():
        fault = f"there is no folder {folder}; make it first, or choose another place"
    elif not os.access(folder, os.W_OK):
        fault = f"{folder} refuses files; choose another place"
    if fault is not None:
        raise MovieError(f"{path}: cannot be written, because {fault}")
    if os.path.lexists(destination) and not overwrite:
        remedy = "overwrite it (overwrite=True, in the command line --overwrite)"
        raise MovieError(f"{path}: exists already; choose another name, or {remedy}")


def draft_of(path: Path, suffix: str = ".part") -> Path:
    """The draft beside `path`, or beside the file that this symbolic link points to."""
    destination = Path(os.path.realpath(path))
    return destination.with_name(destination.name + suffix)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

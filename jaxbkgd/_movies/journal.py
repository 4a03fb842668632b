"""The journal of a job: a file that says, after the end of the process, what was done."""

import contextlib
import errno
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from .movie import MovieError, one_line


LOCK_SUFFIX = ".lock"

# The line before the draft gets its name.
_COMMITTING = "committing"


class Journal:
    """The settings of a draft, and the numbers of its finished chunks, one on a line.

    A line is added in one write when a chunk is done, so the process may be killed at any
    instant. One process at a time holds a journal, by a lock on a file beside it that the
    system gives back when the process ends. A journal without a path is kept in memory.

    **Raises:**

    `MovieError` when another process holds the journal.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.settings: dict[str, Any] | None = None
        self.done: set[int] = set()
        self.is_committing = False
        self._file: BinaryIO | None = None
        self._lock = None if path is None else _Lock(path)
        self._adding = threading.Lock()
        if path is None or not path.exists():
            return
        file = self._open()
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        # The process ended as it wrote a line without an end.
        file.truncate(len(whole))
        # A journal that cannot be read counts as none: the job begins anew.
        with contextlib.suppress(ValueError, TypeError):
            settings, *lines = map(json.loads, whole.splitlines())
            is_committing = _COMMITTING in lines
            done = {int(line) for line in lines if line != _COMMITTING}
            self.settings = dict(settings)
            self.done, self.is_committing = done, is_committing

    def clear(self) -> None:
        """Deletes all entries."""
        if self._file is None and self._lock is not None:
            self._open()
        if self._file is not None:
            self._file.truncate(0)
        self.settings, self.done, self.is_committing = None, set(), False

    def begin(self, settings: dict[str, Any]) -> None:
        """Notes the settings of a new draft."""
        self.settings = settings
        self._add_line(settings)

    def add(self, chunk: int) -> None:
        """Notes that a chunk is done."""
        self._add_line(chunk)
        self.done.add(chunk)

    def commit(self) -> None:
        """Notes that the draft, which is complete, is about to get its name."""
        self._add_line(_COMMITTING)

    def remove(self) -> None:
        """Removes the journal. Where its file cannot be removed, an empty one is left."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.truncate(0)
        self._close_file()
        if self._lock is not None and self._lock.is_held and self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leaves the journal for a later run."""
        self._close_file()
        if self._lock is not None:
            self._lock.release()

    def _open(self) -> BinaryIO:
        assert self.path is not None
        assert self._lock is not None
        self._lock.acquire()
        # Unbuffered, so that a line is one write; all writes go to the end.
        self._file = self.path.open("a+b", buffering=0)
        self._file.seek(0, os.SEEK_SET)
        return self._file

    def _close_file(self) -> None:
        # Before the file is removed, which Windows refuses for open files.
        if self._file is not None:
            self._file.close()
            self._file = None

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


class _Lock:
    """The lock of a journal. Where the file system has none, that is only warned of."""

    def __init__(self, journal: Path) -> None:
        import filelock

        self._journal = journal
        self._path = journal.with_name(journal.name + LOCK_SUFFIX)
        self.is_held = False
        options: dict[str, Any] = {"timeout": 0, "thread_local": False}
        try:
            # A fallback takes the file itself for a lock, which a killed run leaves.
            self._lock = filelock.FileLock(self._path, **options, fallback_to_soft=False)
        except TypeError:
            # Before filelock 4 there was no such fallback.
            self._lock = filelock.FileLock(self._path, **options)
        self._held_elsewhere = filelock.Timeout

    def acquire(self) -> None:
        try:
            self._lock.acquire()
        except self._held_elsewhere as error:
            raise MovieError(
                f"{self._journal}: is in use; wait for the other run to end, or write "
                "elsewhere"
            ) from error
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"{self._journal}: cannot be locked there ({one_line(error)}); start no "
                "other run that writes to the same name",
                stacklevel=2,
            )
        self.is_held = True

    def release(self) -> None:
        if self.is_held:
            # Windows refuses to remove an open file; filelock removes it there.
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._lock.release()
            self.is_held = False

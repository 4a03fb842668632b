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

# The line that is added before the draft gets its name.
_COMMITTING = "committing"


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
        # A journal that cannot be read counts as none: the job begins anew.
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
        import filelock

        # A fallback takes the file itself for a lock, which a killed run leaves.
        lock = filelock.FileLock(
            path.with_name(path.name + LOCK_SUFFIX),
            timeout=0,
            thread_local=False,
            fallback_to_soft=False,
        )
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise MovieError(
                f"{path}: is in use; wait for the other run to end, or write elsewhere"
            ) from error
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"{path}: cannot be locked there ({one_line(error)}); start no other run "
                "that writes to the same name",
                stacklevel=2,
            )
        # Unbuffered, so that a line is one write; all writes go to the end.
        self._lock, self._file = lock, path.open("a+b", buffering=0)
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

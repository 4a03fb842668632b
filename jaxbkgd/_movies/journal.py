"""What is done of a job, kept in a file that survives the end of its process."""

import contextlib
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

from .movie import MovieError


# The line that says that the draft is about to get its name.
_COMMITTING = "committing"


class Journal:
    """The settings of what is written to a draft, and the numbers of its finished chunks, a
    line each.

    A line is added in one write once a chunk is done, so that a process may be killed at
    any instant. Only one process at a time holds a journal. One without a path is kept in
    memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.settings: dict[str, Any] | None = None
        self.done: set[int] = set()
        self.is_committing = False
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        if path is None or not os.path.exists(path):
            return
        self._file = _open_and_lock(path)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        # A line without an end was being written when the process ended.
        self._file.truncate(len(whole))
        # What cannot be read is as good as none: the job begins anew.
        with contextlib.suppress(ValueError, TypeError):
            settings, *lines = map(json.loads, whole.splitlines())
            is_committing = _COMMITTING in lines
            done = {int(line) for line in lines if line != _COMMITTING}
            self.settings = dict(settings)
            self.done, self.is_committing = done, is_committing

    def clear(self) -> None:
        """Forget what was: until the next `begin`, there is nothing to go on with."""
        if self._file is None and self.path is not None:
            self._file = _open_and_lock(self.path)
        if self._file is not None:
            self._file.truncate(0)
        self.settings, self.done, self.is_committing = None, set(), False

    def begin(self, settings: dict[str, Any]) -> None:
        """Note the settings of a draft that is there."""
        self.settings = settings
        self._add_line(settings)

    def add(self, chunk: int) -> None:
        """Note that a chunk is done."""
        self._add_line(chunk)
        self.done.add(chunk)

    def commit(self) -> None:
        """Note that the draft, which is complete, is about to get its name."""
        self._add_line(_COMMITTING)

    def remove(self) -> None:
        """The draft is no more."""
        if self._file is not None and self.path is not None:
            # Where it can't be, there is none.
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the journal for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add_line(self, content: Any) -> None:
        if self._file is None:
            return
        line = json.dumps(content).encode() + b"\n"
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) < len(line):
                # The next line would go on with this one.
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_and_lock(path: Path) -> BinaryIO:
    while True:
        # Unbuffered, so that a line is one write; they all go to the end.
        file = path.open("a+b", buffering=0)
        with contextlib.suppress(ModuleNotFoundError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise MovieError(
                    f"{path}: is in use; wait for the other run to end, or write elsewhere"
                ) from error
        file.seek(0, os.SEEK_SET)
        # Another run may have removed it between the two.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()

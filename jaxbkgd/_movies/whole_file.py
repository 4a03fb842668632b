"""Files for other libraries to read."""

from pathlib import Path


class WholeFile:
    """A file, open to be read, that raises an error where it ends too early: some libraries
    read on forever there, or give zeros. `reads` counts what was read.

    Libraries do not map it into memory, as they do with a path, so that its pages are not
    counted as memory of the program.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.reads = 0
        self._file = path.open("rb")
        self.seek, self.tell = self._file.seek, self._file.tell
        self.close, self.fileno = self._file.close, self._file.fileno

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        content = self._file.read(size)
        if size is not None and len(content) < size:
            raise EOFError("the file ends too early")
        return content

    def readline(self) -> bytes:
        content = self._file.readline()
        if not content:
            raise EOFError("the file ends too early")
        return content

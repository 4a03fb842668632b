"""Movies that are written while their length is not known, and have it in the end."""

import os
import shutil
from pathlib import Path

from .raw import PicassoSink
from .sinks import draft_of, GrowingSink, Layout
from .tiff_pages import TiffSink
from .zarr import ZarrSink


class _GrowingPicasso(GrowingSink, PicassoSink):
    def _complete(self) -> None:
        self._bytes = self.layout.shape[0] * self.layout.frame_bytes
        os.truncate(self.draft, self._bytes)
        super()._complete()


class _GrowingTiff(GrowingSink, TiffSink):
    """Frames alone, around which the directories of their pages are written in the end."""

    # Room for the first directory, whose longest text describes the estimator.
    _offset = _align = 2**18

    def _complete(self) -> None:
        draft, pages = self.draft, draft_of(self.path, ".part.pages")
        try:
            # With a hole in place of the frames.
            self.draft = pages
            TiffSink._begin(self)
            end = self._offset + self.layout.shape[0] * self.layout.frame_bytes
            with pages.open("rb") as around, draft.open("r+b") as file:
                file.write(around.read(self._offset))
                file.truncate(end)
                around.seek(end)
                file.seek(end)
                shutil.copyfileobj(around, file)
        finally:
            self.draft = draft
            pages.unlink(missing_ok=True)
        # Refuses pages that are elsewhere.
        TiffSink._resume(self)


class _GrowingZarr(GrowingSink, ZarrSink):
    def _begin(self) -> None:
        self._shape = (max(self.layout.chunk_frames, self._shape[0]), *self._shape[1:])
        ZarrSink._begin(self)

    def _resume(self) -> None:
        self._shape = (self._open_draft().shape[0], *self._shape[1:])
        ZarrSink._resume(self)

    def _set_length(self) -> None:
        self._shape = (self.layout.shape[0], *self._shape[1:])
        self._array.resize(self._shape)


def open_growing_sink(path: Path, layout: Layout, *, overwrite: bool) -> GrowingSink:
    """The sink of a name that ends in .tif, .tiff, .zarr or .raw."""
    kinds = {".zarr": _GrowingZarr, ".raw": _GrowingPicasso}
    kind = kinds.get(path.suffix.lower(), _GrowingTiff)
    return kind(path, layout, overwrite=overwrite)

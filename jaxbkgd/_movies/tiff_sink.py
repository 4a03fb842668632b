"""TIFF files that are written by any number of threads, in any order of frames."""

import os
import threading
import uuid
from typing import Any, BinaryIO

import numpy as np
import tifffile

from .movie import MovieError
from .sinks import Sink
from .tiff import open_tiff


# Offsets in classic TIFF have 32 bits; the margin is for the header.
_CLASSIC_TIFF_MAX_BYTES = 2**32 - 2**16
_TIFF_DIRECTORY_BYTES = 512


class TiffSink(Sink):
    """A TIFF whose frames lie one after the other; BigTIFF where 4 GB do not hold it.

    OME-TIFF if its name ends in .ome.tif. Otherwise with ImageJ's metadata, or in BigTIFF,
    which ImageJ does not write, tifffile's. The resolution is in pixels per cm.
    """

    _file: BinaryIO | None = None

    def _begin(self) -> None:
        layout = self.layout
        frames, channels, height, width = layout.shape
        size = frames * (layout.frame_bytes + channels * _TIFF_DIRECTORY_BYTES)
        is_big = size > _CLASSIC_TIFF_MAX_BYTES
        is_ome = self._destination.name.lower().endswith((".ome.tif", ".ome.tiff"))
        is_imagej = not (is_ome or is_big) and layout.dtype.str[1:] in ("u1", "u2", "f4")
        metadata = self._ome_metadata() if is_ome else self._imagej_metadata()
        resolution = {}
        if layout.pixel_size_um is not None:
            y, x = layout.pixel_size_um
            resolution = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(
            self.draft, bigtiff=is_big, ome=is_ome, imagej=is_imagej, byteorder="<"
        ) as writer:
            # Without data, it leaves a hole in the file for them.
            writer.write(
                None,
                shape=(frames, *([channels] if channels > 1 else []), height, width),
                dtype=layout.dtype,
                photometric="minisblack",
                metadata={"axes": "TCYX" if channels > 1 else "TYX", **metadata},
                software=False,
                **resolution,
            )
        self._resume()

    def _ome_metadata(self) -> dict[str, Any]:
        layout = self.layout
        said = repr((layout.shape, layout.dtype.str, layout.pixel_size_um))
        # The same movie has the same name wherever and whenever it is written.
        metadata: dict[str, Any] = {
            "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, said)),
            "Creator": "jaxbkgd",
        }
        if layout.pixel_size_um is not None:
            y, x = layout.pixel_size_um
            metadata |= {"PhysicalSizeX": x, "PhysicalSizeXUnit": "\u00b5m"}
            metadata |= {"PhysicalSizeY": y, "PhysicalSizeYUnit": "\u00b5m"}
        if layout.frame_interval_s is not None:
            metadata |= {"TimeIncrement": layout.frame_interval_s}
            metadata |= {"TimeIncrementUnit": "s"}
        return metadata

    def _imagej_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if self.layout.pixel_size_um is not None:
            # With a resolution per cm, ImageJ takes this to be in micrometres.
            metadata["unit"] = "um"
        if self.layout.frame_interval_s is not None:
            metadata["finterval"] = self.layout.frame_interval_s
        return metadata

    def _resume(self) -> None:
        """Open the draft, if it is complete but for its pixels."""
        with open_tiff(self.draft) as movie:
            offset = movie.pixels.contiguous_offset()
            if movie.shape != self.layout.shape or movie.dtype != self.layout.dtype:
                offset = None
        if offset is None:
            raise MovieError(
                f"{self.draft}: is not the beginning of this movie; remove it, and start "
                "anew"
            )
        self._offset = offset
        self._lock = threading.Lock()
        self._file = self.draft.open("r+b", buffering=0)

    def _write(self, start: int, frames: np.ndarray) -> None:
        assert self._file is not None
        stored = np.asarray(frames, self.layout.dtype.newbyteorder("<"))
        view = stored.reshape(-1).view(np.uint8).data
        offset = self._offset + start * self.layout.frame_bytes
        while view:
            count = self._write_at(view, offset)
            view, offset = view[count:], offset + count

    def _write_at(self, view: memoryview, offset: int) -> int:
        assert self._file is not None
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), view, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.write(view)

    def _complete(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_replaceable(self) -> bool:
        return self._destination.is_file()

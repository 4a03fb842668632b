"""TIFF files that are written by any number of threads, in any order of frames."""

import uuid
from typing import Any

import numpy as np
import tifffile

from .movie import MovieError
from .sinks import Sink
from .tiff_pages import find_pages


# Offsets in classic TIFF have 32 bits; the margin is for the header.
_CLASSIC_TIFF_MAX_BYTES = 2**32 - 2**16
_TIFF_DIRECTORY_BYTES = 512


class TiffSink(Sink):
    """A TIFF file whose frames follow one another, or a BigTIFF file above 4 GB.

    A name that ends in .ome.tif makes it OME-TIFF. Else it has the metadata of ImageJ, or
    those of tifffile as BigTIFF, which ImageJ does not write. The resolution is in pixels
    per cm.
    """

    # That of the first frame in the draft, while it is open.
    _offset: int | None = None

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
            # Without pixels, it leaves a hole in the file for them.
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
        about = repr((layout.shape, layout.dtype.str, layout.pixel_size_um))
        # The same movie has the same UUID wherever and whenever it is written.
        metadata: dict[str, Any] = {
            "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, about)),
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
        """Opens the draft if it is complete but for its pixels."""
        frames, channels, *shape = self.layout.shape
        pages = find_pages(self.draft)
        kind, places = pages.kind, pages.places
        follow = places[0] + kind.frame_bytes * np.arange(frames * channels)
        is_alike = kind[:2] == (tuple(shape), self.layout.dtype) and places[0] > 0
        if not is_alike or not np.array_equal(places, follow):
            raise MovieError(
                f"{self.draft}: is truncated, or not the beginning of this movie; remove "
                "it, and start anew"
            )
        self._offset = int(places[0])

    def _write(self, start: int, frames: np.ndarray) -> None:
        if self._offset is None:
            raise MovieError(f"{self.path}: is closed; resume it to write more frames")
        stored = np.asarray(frames, self.layout.dtype.newbyteorder("<"))
        # Every thread has a file of its own, which no other thread closes.
        with self.draft.open("r+b") as file:
            file.seek(self._offset + start * self.layout.frame_bytes)
            file.write(stored.reshape(-1).view(np.uint8).data)

    def _complete(self) -> None:
        self._close()

    def _close(self) -> None:
        self._offset = None

    def _is_replaceable(self) -> bool:
        return self._destination.is_file()

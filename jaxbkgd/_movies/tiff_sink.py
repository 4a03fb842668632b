"""TIFF files that are written by any number of threads, in any order of frames."""

import struct
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

    A name that ends in .ome.tif makes it OME-TIFF. Else it has metadata of ImageJ or, as
    BigTIFF, of tifffile.
    """

    # That of the first frame in the draft.
    _offset: int

    def _begin(self) -> None:
        layout = self.layout
        frames, channels, height, width = layout.shape
        size = frames * (layout.frame_bytes + channels * _TIFF_DIRECTORY_BYTES)
        is_big = size > _CLASSIC_TIFF_MAX_BYTES
        is_ome = self._destination.name.lower().endswith((".ome.tif", ".ome.tiff"))
        is_imagej = not (is_ome or is_big) and layout.dtype.str[1:] in ("u1", "u2", "f4")
        metadata = self._metadata(is_ome)
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

    def _metadata(self, is_ome: bool) -> dict[str, Any]:
        layout, metadata = self.layout, {}
        interval = layout.frame_interval_s
        if not is_ome:
            # With a resolution per cm, ImageJ takes this unit to be micrometres.
            metadata = {"unit": "um"} if layout.pixel_size_um is not None else {}
            return metadata if interval is None else metadata | {"finterval": interval}
        # The same movie has the same UUID wherever and whenever it is written.
        about = repr((layout.shape, layout.dtype.str, layout.pixel_size_um))
        metadata["UUID"] = str(uuid.uuid5(uuid.NAMESPACE_OID, about))
        metadata["Creator"] = "jaxbkgd"
        for axis, size in zip("YX", layout.pixel_size_um or (), strict=False):
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "\u00b5m"}
        if interval is not None:
            metadata |= {"TimeIncrement": interval, "TimeIncrementUnit": "s"}
        return metadata

    def _resume(self) -> None:
        """Opens the draft if it is complete but for its pixels."""
        frames, channels, *shape = self.layout.shape
        try:
            pages = find_pages(self.draft)
        except (struct.error, tifffile.TiffFileError) as error:
            raise MovieError(f"{self.draft}: is no TIFF file ({error})") from error
        place, size = pages.places[0], self.layout.frame_bytes // channels
        follow = place + size * np.arange(frames * channels)
        is_alike = (pages.shape, pages.dtype) == (tuple(shape), self.layout.dtype)
        if not is_alike or place < 0 or not np.array_equal(pages.places, follow):
            what = "is truncated, or not the beginning of this movie"
            raise MovieError(f"{self.draft}: {what}; remove it, and start anew")
        self._offset = int(place)

    def _write(self, start: int, frames: np.ndarray) -> None:
        stored = np.asarray(frames, self.layout.dtype.newbyteorder("<"))
        # Every thread has a file of its own, which no other thread closes.
        with self.draft.open("r+b") as file:
            file.seek(self._offset + start * self.layout.frame_bytes)
            file.write(stored.reshape(-1).view(np.uint8).data)

"""Frames from the pages of TIFF files, read as they are sliced."""

import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Bool, Int, Shaped

from .movie import check_pixels, MovieError, one_line
from .tiff_pages import Pages


# Tiles hold a part of a frame, and are not much larger than a frame.
_MAX_TILE_PIXELS = 2**28

# What a codec may add to a page.
_CODEC_BYTES = 4096

# More channels than this in a movie of one frame are frames: programs that know no axes
# call them channels.
_MAX_CHANNELS_OF_ONE_FRAME = 8


class TiffPixels:
    """Frames (frames, channels, height, width) from the pages of TIFF files.

    Files are open only while they are read, so there may be any number of them, and threads
    share nothing.

    **Arguments:**

    - `name`: the movie's name in messages.
    - `files`: the pages of each file.
    - `order`: (frames, channels), the page of each frame, counted over all files.
    - `dtype`: of the pages.
    - `scale`: the value of a pixel is `scale[0] + scale[1] * stored`.

    **Raises:**

    [`jaxbkgd.MovieError`][] if the first or the last frame cannot be read: a missing codec
    or a truncated file shows at once.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Pages],
        order: Int[np.ndarray, "frames channels"],
        dtype: np.dtype,
        scale: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if order.shape[0] == 1 and order.shape[1] > _MAX_CHANNELS_OF_ONE_FRAME:
            warnings.warn(
                f"{name}: says 1 frame of {order.shape[1]} channels; they are read as "
                "frames. If they are channels, save each as a movie of its own",
                stacklevel=2,
            )
            order = order.reshape(-1, 1)
        kind = files[0].kind
        self._name = name
        self.page_dtype = dtype.newbyteorder("=")
        self.scale = scale
        self.dtype = _scaled_type(self.page_dtype, scale)
        self.shape = check_pixels(name, (*order.shape, *kind.shape), self.dtype)
        self._stored = dtype.newbyteorder(files[0].byteorder)
        self._order = order
        self._paths = [file.path for file in files]
        self._files = np.repeat(np.arange(len(files)), [len(file) for file in files])
        self._directories = np.concatenate([file.directories for file in files])
        self._places = np.concatenate(
            [
                file.places
                if file.byteorder == files[0].byteorder
                else np.full(len(file), -1)
                for file in files
            ]
        )
        for frame in {0, len(order) - 1}:
            for channel in range(order.shape[1]):
                self[frame : frame + 1, channel]

    def __getitem__(
        self, index: tuple[slice, int]
    ) -> Shaped[np.ndarray, "frames height width"]:
        frames, channel = index
        pages = self._order[frames, channel]
        start = frames.indices(len(self._order))[0]
        read = np.empty((len(pages), *self.shape[2:]), self._stored)
        files = self._files[pages]
        for first, last in _runs(files[1:] == files[:-1], len(files)):
            path = self._paths[int(files[first])]
            try:
                self._fill(path, read[first:last], pages[first:last], start + first)
            except OSError as error:
                reason = error.strerror or one_line(error)
                raise MovieError(f"{path}: cannot be read ({reason})") from error
        if self.scale != (0, 1):
            offset, slope = (self.dtype.type(number) for number in self.scale)
            return read.astype(self.dtype) * slope + offset
        return read.astype(self.dtype, copy=False)

    def _fill(
        self, path: Path, read: np.ndarray, pages: Int[np.ndarray, " frames"], start: int
    ) -> None:
        """Reads pages of one file, of which the first is frame `start`."""
        places = self._places[pages]
        if (places < 0).any():
            self._decode(path, read, pages, start)
            return
        frame_bytes = read[:1].nbytes
        with path.open("rb") as file:
            follows = places[1:] == places[:-1] + frame_bytes
            for first, last in _runs(follows, len(places)):
                file.seek(int(places[first]))
                count = file.readinto(read[first:last].reshape(-1).view(np.uint8).data)
                if count < (last - first) * frame_bytes:
                    raise MovieError(
                        f"{path}: truncated: the file ends in frame "
                        f"{start + first + count // frame_bytes} of {self.shape[0]}; copy "
                        "it again"
                    )

    def _decode(
        self, path: Path, read: np.ndarray, pages: Int[np.ndarray, " frames"], start: int
    ) -> None:
        frame = start
        try:
            with tifffile.TiffFile(path) as tiff:
                for frame, page in enumerate(pages, start):
                    tiff.filehandle.seek(int(self._directories[page]))
                    read[frame - start] = self._decoded(tifffile.TiffPage(tiff, int(page)))
        except Exception as error:
            # tifffile and its codecs raise errors of many types on damage.
            needs_codecs = "imagecodecs" in str(error)
            if needs_codecs and importlib.util.find_spec("imagecodecs") is None:
                raise ModuleNotFoundError("No module named 'imagecodecs'") from error
            raise MovieError(
                f"{path}: frame {frame} of {self.shape[0]} cannot be read "
                f"({one_line(error)})"
            ) from error

    def _decoded(self, page: tifffile.TiffPage) -> Shaped[np.ndarray, "height width"]:
        if page.shape != self.shape[2:] or page.dtype != self.page_dtype:
            raise ValueError(f"it has become {page.shape} px of {page.dtype}")
        tile = max(page.tilewidth, 1) * max(page.tilelength, 1)
        if tile > _MAX_TILE_PIXELS:
            raise ValueError(f"it has tiles of {tile} px")
        offsets, counts = page.dataoffsets, page.databytecounts
        end = max(map(int.__add__, offsets, counts), default=0)
        if len(offsets) != len(counts) or not 0 < end <= page.parent.filehandle.size:
            raise ValueError("truncated: its pixels are not all in the file")
        plain = max(math.prod(self.shape[2:]), len(counts) * tile) * self.dtype.itemsize
        # Codecs add little to the pixels. A page that decodes to gigabytes is damaged.
        if sum(counts) > 2 * plain + _CODEC_BYTES:
            raise ValueError(f"its {plain} bytes take {sum(counts)} in the file")
        return page.asarray(maxworkers=1)


def _runs(follows: Bool[np.ndarray, " n"], count: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run. `follows` says which but the first belong to the run
    before."""
    breaks = (np.flatnonzero(~follows) + 1).tolist()
    return zip([0, *breaks], [*breaks, count], strict=True) if count else iter(())


def _scaled_type(dtype: np.dtype, scale: tuple[float, float]) -> np.dtype:
    """The smallest type that holds all values of `scale[0] + scale[1] * stored`."""
    offset, slope = scale
    if scale == (0, 1):
        return dtype
    if slope == 1 and offset == int(offset):
        limits = np.iinfo(dtype)
        for name in ("u2", "i2", "i4", "i8"):
            held = np.iinfo(name)
            if (
                held.min <= limits.min + int(offset)
                and limits.max + int(offset) <= held.max
            ):
                return np.dtype(name)
    return np.dtype("f4" if dtype.itemsize < 4 else "f8")


def arrange_planes(
    name: str,
    frames: Int[np.ndarray, " planes"],
    channels: Int[np.ndarray, " planes"],
    pages: Int[np.ndarray, " planes"],
    channel_count: int,
) -> Int[np.ndarray, "frames channels"]:
    """The page of each frame and channel, from the frame and channel of each plane.

    An acquisition that was stopped lacks channels of its last frame, which is left out.
    Anything else that is missing is an error, as is a plane that comes twice.
    """
    count = int(frames.max(initial=-1)) + 1
    is_full = (count - 1) * channel_count < len(pages) <= count * channel_count
    if not is_full or min(frames.min(), channels.min()) < 0:
        raise MovieError(
            f"{name}: says {count} frames of {channel_count} channels, but has "
            f"{len(pages)} pages; save it anew, or give it as single files"
        )
    order = np.full((count, channel_count), -1)
    order[frames, channels] = pages
    if count > 1 and (order[-1] < 0).any():
        order = order[:-1]
    if (order < 0).any():
        frame, channel = np.argwhere(order < 0)[0].tolist()
        raise MovieError(
            f"{name}: lacks frame {frame} of {count} in channel {channel}; copy it again, "
            "with all of its files"
        )
    return order

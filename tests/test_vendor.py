"""Microscopes' files are read through their libraries, plane by plane, or refused."""

import datetime
import itertools
import math
import re
import struct
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace as Namespace
from typing import Any

import h5py
import nd2
import numpy as np
import pytest
import tifffile

import jaxbkgd
from jaxbkgd import Movie, MovieError, open_movie
from jaxbkgd._batch.names import paths_beside


DATA = Path(__file__).parents[2] / "shared" / "data"

# Times, depths, channels, height, width.
PLANES = np.random.default_rng(0).integers(1, 4000, (3, 2, 2, 5, 6)).astype(np.uint16)
# As frames: all depths of the first time, before those of the second.
FRAMES = PLANES.reshape(6, 2, 5, 6)


def _read(path: Path | str) -> np.ndarray:
    with open_movie(path) as movie:
        return np.asarray(movie)


# ---- ND2, as nd2 gives it ----


class _ND2File:
    """The interface of nd2, with the images of a class attribute, (..., C, Y, X)."""

    images: Any = PLANES
    axes = "TZCYX"
    experiment: tuple[Any, ...] = ()
    voxel = Namespace(x=0.11, y=0.12, z=0.5)
    count: int | None = None

    def __init__(self, source: Any) -> None:
        self._source = source
        self.dtype = self.images.dtype
        self.sizes = dict(zip(self.axes, self.images.shape, strict=True))
        said = math.prod(self.images.shape[:-3])
        self.attributes = Namespace(
            sequenceCount=said if self.count is None else self.count
        )
        self.calls: list[int] = []

    def voxel_size(self) -> Any:
        return self.voxel

    def read_frame(self, number: int) -> np.ndarray:
        self._source.seek(0)
        self._source.read(1)
        return self.images.reshape(-1, *self.images.shape[-3:])[number].squeeze()

    def close(self) -> None:
        pass


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def _nd2(monkeypatch, tmp_path: Path, **members: Any) -> Path:
    _install(monkeypatch, "nd2", ND2File=type("ND2File", (_ND2File,), members))
    (tmp_path / "movie.nd2").write_bytes(b"0")
    return tmp_path / "movie.nd2"


def _loop(kind: str, **timing: Any) -> Namespace:
    return Namespace(type=kind, parameters=Namespace(**timing))


def test_depths_are_frames_as_times_are(monkeypatch, tmp_path):
    path = _nd2(monkeypatch, tmp_path)
    with open_movie(path) as movie:
        assert (movie.format, movie.name) == ("ND2", str(path))
        assert (movie.shape, movie.dtype) == (FRAMES.shape, np.uint16)
        assert movie.pixel_size_um == (0.12, 0.11)
        np.testing.assert_array_equal(np.asarray(movie), FRAMES)
        np.testing.assert_array_equal(movie.channels[1][2:5], FRAMES[2:5, 1])
        assert movie.read(4, 4).shape == (0, 5, 6)
    with pytest.raises(MovieError, match="is closed"):
        movie.read(0, 1)
    # In the order of the loops, whatever it is.
    swapped = PLANES.swapaxes(0, 1)
    path = _nd2(monkeypatch, tmp_path, images=swapped, axes="ZTCYX")
    np.testing.assert_array_equal(_read(path), FRAMES)
    path = _nd2(monkeypatch, tmp_path, images=PLANES[0, :, :1], axes="ZCYX")
    np.testing.assert_array_equal(_read(path), PLANES[0, :, :1])


@pytest.mark.parametrize(
    ("loops", "interval_s"),
    [
        ([_loop("TimeLoop", periodMs=20.0, periodDiff=Namespace(avg=20.5))], 0.0205),
        ([_loop("TimeLoop", periodMs=20.0, periodDiff=None)], 0.02),
        ([_loop("TimeLoop", periodMs=0.0, periodDiff=Namespace(avg=0.0))], None),
        (
            [_loop("NETimeLoop", periods=[Namespace(periodMs=30.0, periodDiff=None)])],
            0.03,
        ),
        ([], None),
    ],
)
def test_the_interval_of_nd2_is_what_was_measured_or_asked_for(
    loops, interval_s, monkeypatch, tmp_path
):
    single = {"images": PLANES[:, 0], "axes": "TCYX", "experiment": loops}
    with open_movie(_nd2(monkeypatch, tmp_path, **single)) as movie:
        assert movie.frame_interval_s == (interval_s and pytest.approx(interval_s))
    # Frames that are depths as well are not equally spaced in time.
    with open_movie(_nd2(monkeypatch, tmp_path, experiment=loops)) as movie:
        assert movie.frame_interval_s is None


def test_a_pixel_size_that_nd2_does_not_know_is_unknown(monkeypatch, tmp_path):
    path = _nd2(monkeypatch, tmp_path, voxel=Namespace(x=1.0, y=1.0, z=1.0))
    with open_movie(path) as movie:
        assert movie.pixel_size_um is None


def test_positions_are_opened_by_their_numbers(monkeypatch, tmp_path):
    images = PLANES.swapaxes(0, 1)
    path = _nd2(monkeypatch, tmp_path, images=images, axes="PTCYX")
    with pytest.raises(MovieError) as caught:
        open_movie(path)
    listed = "2 images, which are no frames (0: position 0, 1: position 1)"
    assert (
        str(caught.value) == f"{path}: holds {listed}; open one by its number, as {path}/0"
    )
    for number in range(2):
        with open_movie(f"{path}/{number}") as movie:
            assert (movie.name, movie.paths) == (f"{path}/{number}", (path,))
            np.testing.assert_array_equal(np.asarray(movie), images[number])
    with pytest.raises(MovieError, match=r"nd2/2: is not there; the file holds 2 images"):
        open_movie(path / "2")
    assert paths_beside(path / "1", "snr") == [tmp_path / "movie-1-snr.tif"]
    # Other formats hold one image.
    np.save(tmp_path / "movie.npy", FRAMES)
    with pytest.raises(MovieError, match="npy/0: no such file"):
        open_movie(tmp_path / "movie.npy" / "0")


def test_a_stopped_nd2_is_read_as_far_as_it_goes(monkeypatch, tmp_path):
    path = _nd2(monkeypatch, tmp_path, count=5)
    with pytest.warns(UserWarning, match=r"says 6 images .* holds 5; was it stopped"):
        np.testing.assert_array_equal(_read(path), FRAMES[:4])
    path = _nd2(monkeypatch, tmp_path, count=5, axes="ZTCYX")
    with pytest.raises(MovieError, match="is truncated: it says 6 images"):
        open_movie(path)


def test_an_image_that_nd2_lacks_is_an_error_and_a_dark_one_is_not(monkeypatch, tmp_path):
    images = PLANES[:, 0].copy()
    images[1] = 0
    path = _nd2(monkeypatch, tmp_path, images=images, axes="TCYX")
    np.testing.assert_array_equal(_read(path), images)

    def read_frame(self: Any, number: int) -> np.ndarray:
        return self.images[number]

    path = _nd2(monkeypatch, tmp_path, images=images, axes="TCYX", read_frame=read_frame)
    with (
        open_movie(path) as movie,
        pytest.raises(MovieError, match=r"frame 1 of 3 cannot be read.* is missing from"),
    ):
        movie.read(0, 3)


@pytest.mark.parametrize(("axes", "more"), [("TUCYX", "2 U"), ("TCYXS", "6 S")])
def test_other_axes_are_refused(axes, more, monkeypatch, tmp_path):
    images = PLANES if "U" in axes else PLANES[:, :, 0, None]
    count = 6 if "U" in axes else 3
    path = _nd2(monkeypatch, tmp_path, images=images, axes=axes, count=count)
    with pytest.raises(MovieError, match=rf"has axes \({more}\) that are no frames"):
        open_movie(path)


def test_one_thread_at_a_time_calls_a_library(monkeypatch, tmp_path):
    inside = threading.Lock()

    def read_frame(self: Any, number: int) -> np.ndarray:
        assert inside.acquire(blocking=False)
        try:
            threading.Event().wait(0.001)
            return _ND2File.read_frame(self, number)
        finally:
            inside.release()

    path = _nd2(monkeypatch, tmp_path, read_frame=read_frame)
    with open_movie(path) as movie, ThreadPoolExecutor(8) as threads:
        frames = [0, 5, 3, 1, 4, 2] * 4
        reads = list(threads.map(lambda frame: movie.read(frame, frame + 1, 1)[0], frames))
    np.testing.assert_array_equal(reads, FRAMES[frames, 1])


@pytest.mark.slow
def test_an_estimate_asks_for_each_frame_once_and_keeps_a_chunk(monkeypatch, tmp_path):
    asked = []

    def read_frame(self: Any, number: int) -> np.ndarray:
        asked.append(number)
        # Made here, as the frames of a long movie would be.
        self._source.read(0)
        return np.full((64, 64), number % 4000 + 1, np.uint16)

    # No more memory than for a number.
    images = np.broadcast_to(np.uint16(0), (400, 1, 64, 64))
    path = _nd2(monkeypatch, tmp_path, images=images, axes="TCYX", read_frame=read_frame)
    most = 0
    read = Movie.read

    def watched(self: Movie, start: int, stop: int, channel: int = 0) -> np.ndarray:
        nonlocal most
        most = max(most, stop - start)
        return read(self, start, stop, channel)

    monkeypatch.setattr(Movie, "read", watched)
    estimator = jaxbkgd.SpatialMean((3.0, 3.0))
    sink = tmp_path / "out.tif"
    jaxbkgd.estimate_movie(path, estimator, sink, chunk_frames=16)
    assert most <= 16
    # The first and the last are read when it is opened, and eight for its fingerprint.
    assert set(asked) == set(range(400))
    assert len(asked) <= 400 + 2 * 2 + 2 * 8
    means = tifffile.imread(sink).mean(axis=(1, 2))
    np.testing.assert_allclose(means, np.arange(400) + 1, rtol=1e-5)


# ---- CZI, as czifile gives it ----


def _czi(monkeypatch, tmp_path: Path, blocks: Any, images: int = 1, **members: Any) -> Path:
    """`blocks` are those of each plane, by (time, depth, channel)."""
    entries = []
    for (time, depth, channel), pixels in blocks:
        data = Namespace(data=lambda pixels=pixels: pixels[None, :, :, None])
        entries.append(
            Namespace(
                dims=tuple("TZCYXS"),
                start=(time + 5, depth, channel, 0, 0, 0),
                read_segment_data=lambda file, data=data: data,
            )
        )
    image = Namespace(
        sizes={"T": 3, "Z": 2, "C": 2, "Y": 5, "X": 6},
        dims=tuple("TZCYX"),
        start=(5, 0, 0, 0, 0),
        dtype=np.dtype(np.uint16),
        directory_entries=entries,
        mpp=(0.11, 0.12),
        coord_scales={"T": 0.05},
    )
    vars(image).update(members)

    class CziFile:
        def __init__(self, path: Path) -> None:
            self.scenes = {2 * number: image for number in range(images)}

        def __enter__(self) -> "CziFile":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    _install(monkeypatch, "czifile", CziFile=CziFile)
    # Earlier versions of Python have no such czifile.
    monkeypatch.setattr(sys, "version_info", max(sys.version_info, (3, 12)))
    (tmp_path / "movie.czi").write_bytes(b"0")
    return tmp_path / "movie.czi"


ALL_BLOCKS = [(place, PLANES[place]) for place in itertools.product(*map(range, (3, 2, 2)))]


def test_czi_is_read_block_by_block(monkeypatch, tmp_path):
    with open_movie(_czi(monkeypatch, tmp_path, ALL_BLOCKS[::-1])) as movie:
        assert (movie.format, movie.pixel_size_um) == ("CZI", (0.12, 0.11))
        assert movie.frame_interval_s is None
        np.testing.assert_array_equal(np.asarray(movie), FRAMES)
    sizes = {"T": 3, "C": 2, "Y": 5, "X": 6}
    single = [block for block in ALL_BLOCKS if block[0][1] == 0]
    path = _czi(monkeypatch, tmp_path, single, sizes=sizes, mpp=None)
    with open_movie(path) as movie:
        assert (movie.frame_interval_s, movie.pixel_size_um) == (0.05, None)
        np.testing.assert_array_equal(np.asarray(movie), PLANES[:, 0])


def test_czi_without_a_block_or_with_tiles_or_scenes_is_refused(monkeypatch, tmp_path):
    for lacking in (0, 5, len(ALL_BLOCKS) - 1):
        blocks = [block for i, block in enumerate(ALL_BLOCKS) if i != lacking]
        path = _czi(monkeypatch, tmp_path, blocks)
        with pytest.raises(MovieError, match=r"cannot be read; .* no block at T, Z, C \("):
            _read(path)
    path = _czi(monkeypatch, tmp_path, [*ALL_BLOCKS, ALL_BLOCKS[3]])
    with pytest.raises(MovieError, match=r"several blocks at T, Z, C \(0, 1, 1\); stitch"):
        open_movie(path)
    blocks = [(place, pixels[:4]) for place, pixels in ALL_BLOCKS]
    with pytest.raises(MovieError, match=r"frame \d of 6 cannot be read.*the shape"):
        open_movie(_czi(monkeypatch, tmp_path, blocks))
    path = _czi(monkeypatch, tmp_path, ALL_BLOCKS, images=2)
    with pytest.raises(MovieError, match=r"2 images.* \(0: scene 0, 1: scene 2\)"):
        open_movie(path)
    np.testing.assert_array_equal(_read(path / "1"), FRAMES)


# ---- LIF ----


def _lif_block(content: bytes) -> bytes:
    return struct.pack("<IIBI", 0x70, len(content) + 5, 0x2A, len(content) // 2) + content


def _write_lif(path: Path, images: int = 1, lacking: int = 0) -> None:
    """Images with the axes X, Y, C, Z, T, from the fastest, as LAS X writes them."""
    step, places = 2, {"X": 1, "Y": 2, "C": 5, "Z": 3, "T": 4}
    lengths = {
        "X": (6, 0.5e-6),
        "Y": (5, 0.48e-6),
        "C": (2, 0),
        "Z": (2, 1),
        "T": (3, 0.04),
    }
    dimensions = channels = ""
    for axis, (count, length) in lengths.items():
        if axis == "C":
            channels = "".join(
                '<ChannelDescription DataType="0" ChannelTag="0" Resolution="16" '
                'NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" '
                f'IsLUTInverted="0" BytesInc="{step * i}" BitInc="0"/>'
                for i in range(count)
            )
        else:
            dimensions += (
                f'<DimensionDescription DimID="{places[axis]}" NumberOfElements="{count}" '
                f'Origin="0" Length="{length}" Unit="m" BitInc="0" BytesInc="{step}"/>'
            )
        step *= count
    elements = "".join(
        f'<Element Name="Series{i}" UniqueID="{i}"><Data><Image><ImageDescription>'
        f"<Channels>{channels}</Channels><Dimensions>{dimensions}</Dimensions>"
        f"</ImageDescription></Image></Data>"
        f'<Memory Size="{step}" MemoryBlockID="MemBlock_{i}"/></Element>'
        for i in range(images)
    )
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="project"><Children>'
        f"{elements}</Children></Element></LMSDataContainerHeader>"
    )
    content = _lif_block(xml.encode("utf-16-le"))
    for i in range(images):
        name, pixels = f"MemBlock_{i}", (PLANES + np.uint16(i)).tobytes()[lacking:]
        head = (0x70, 14 + 2 * len(name), 0x2A, len(pixels), 0x2A, len(name))
        content += struct.pack("<IIBQBI", *head) + name.encode("utf-16-le") + pixels
    path.write_bytes(content)


def test_lif_is_read_frame_by_frame_and_image_by_image(tmp_path):
    path = tmp_path / "movie.lif"
    _write_lif(path)
    with open_movie(path) as movie:
        assert (movie.format, movie.frame_interval_s) == ("LIF", None)
        assert movie.pixel_size_um == pytest.approx((0.12, 0.1))
        np.testing.assert_array_equal(np.asarray(movie), FRAMES)
    _write_lif(path, 3)
    with pytest.raises(
        MovieError, match=r"3 images.* \(0: Series0, 1: Series1, 2: Series2\)"
    ):
        open_movie(path)
    for number in range(3):
        np.testing.assert_array_equal(_read(path / f"{number}"), FRAMES + number)


def test_a_lif_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "movie.lif"
    _write_lif(path)
    whole = path.read_bytes()
    for size in (1, 12, 100, len(whole) - PLANES.nbytes - 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match=r"movie\.lif: .*cannot be read"):
            open_movie(path)
    _write_lif(path, 2, 2)
    with pytest.raises(MovieError, match="says 720 bytes of pixels, but has 718"):
        open_movie(path / "0")


# ---- IMS ----


def _write_ims(path: Path, chunks: tuple[int, int, int] | None = (2, 8, 8)) -> None:
    def letters(text: Any) -> np.ndarray:
        return np.array(list(str(text)), "S1")

    about = {"X": 6, "Y": 5, "Z": 2, "ExtMin0": 10, "ExtMax0": 10.66, "ExtMin1": 0}
    about |= {"ExtMax1": 0.6, "Unit": "um"}
    with h5py.File(path, "w") as file:
        image = file.create_group("DataSetInfo/Image")
        for name, value in about.items():
            image.attrs[name] = letters(value)
        times = file.create_group("DataSetInfo/TimeInfo")
        begin = datetime.datetime(2024, 5, 3, 10)
        for time, channels in enumerate(PLANES.swapaxes(1, 2)):
            now = begin + datetime.timedelta(milliseconds=25 * time)
            told = now.isoformat(" ", "milliseconds")
            times.attrs[f"TimePoint{time + 1}"] = letters(told)
            for channel, depths in enumerate(channels):
                # Imaris fills its chunks up.
                padded = np.pad(depths, ((0, 2), (0, 3), (0, 2)))
                place = f"DataSet/ResolutionLevel 0/TimePoint {time}/Channel {channel}/Data"
                file.create_dataset(
                    place, data=padded, chunks=chunks, compression=chunks and "gzip"
                )


@pytest.mark.parametrize("chunks", [(2, 8, 8), None])
def test_ims_is_read_without_the_padding_of_its_chunks(chunks, tmp_path):
    path = tmp_path / "movie.ims"
    _write_ims(path, chunks)
    with open_movie(path) as movie:
        assert (movie.format, movie.frame_interval_s) == ("Imaris IMS", None)
        assert movie.pixel_size_um == pytest.approx((0.12, 0.11))
        np.testing.assert_array_equal(np.asarray(movie), FRAMES)
    with h5py.File(path, "r+") as file:
        file["DataSetInfo/Image"].attrs["Z"] = np.array([b"1"])
    with open_movie(path) as movie:
        assert movie.frame_interval_s == pytest.approx(0.025)
        np.testing.assert_array_equal(np.asarray(movie), PLANES[:, 0])
    # Pixels are read without what is not known of them.
    with h5py.File(path, "r+") as file:
        del file["DataSetInfo/Image"].attrs["ExtMax0"]
        file["DataSetInfo/TimeInfo"].attrs["TimePoint1"] = "yesterday"
    with open_movie(path) as movie:
        assert (movie.pixel_size_um, movie.frame_interval_s) == (None, None)
        np.testing.assert_array_equal(np.asarray(movie), PLANES[:, 0])


def test_ims_whose_pixels_were_not_written_or_are_cut_off_is_refused(tmp_path):
    path = tmp_path / "movie.ims"
    _write_ims(path)
    whole = path.read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match=r"movie\.ims: cannot be read by h5py"):
            open_movie(path)
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        place = "DataSet/ResolutionLevel 0/TimePoint 1/Channel 1/Data"
        del file[place]
        written = file.create_dataset(place, (4, 8, 8), np.uint16, chunks=(2, 8, 8))
        written[2:] = 1
    with (
        open_movie(path) as movie,
        pytest.raises(MovieError, match=r"frame 2 of 6 .*its pixels were not all written"),
    ):
        movie.read(0, 6, 1)


# ---- LSM and STK ----


THREE_CHANNELS = np.concatenate([FRAMES, FRAMES[:, :1] + 1], axis=1)


def _write_lsm(path: Path, **options: Any) -> None:
    """Each page holds the channels of a plane, and is followed by its thumbnail."""
    fields = {"MagicNumber": 67127628, "DimensionX": 6, "DimensionY": 5, "DimensionZ": 2}
    fields |= {"DimensionChannels": 3, "DimensionTime": 3, "ScanType": 6}
    fields |= {"VoxelSizeX": 1.1e-7, "VoxelSizeY": 1.2e-7, "TimeIntervall": 0.5}
    names = [(n or f"reserved{i}", t) for i, (n, t) in enumerate(tifffile.TIFF.CZ_LSMINFO)]
    about = np.zeros(1, np.dtype(names).newbyteorder("<"))
    about["StructureSize"] = about.nbytes
    for name, value in fields.items():
        about[name] = value
    tag = (34412, "B", about.nbytes, about.tobytes(), True)
    options = {"photometric": "minisblack", "metadata": None, **options}
    with tifffile.TiffWriter(path, byteorder="<") as writer:
        for number, page in enumerate(THREE_CHANNELS):
            extra = [tag] if number == 0 else []
            writer.write(page, planarconfig="separate", extratags=extra, **options)
            small = np.zeros((3, 2, 2), np.uint8)
            writer.write(small, planarconfig="separate", subfiletype=1, **options)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_lsm_is_read_without_its_thumbnails(compression, tmp_path):
    path = tmp_path / "movie.lsm"
    _write_lsm(path, compression=compression)
    with open_movie(path) as movie:
        assert (movie.format, movie.frame_interval_s) == ("LSM", None)
        assert movie.pixel_size_um == pytest.approx((0.12, 0.11))
        np.testing.assert_array_equal(np.asarray(movie), THREE_CHANNELS)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_lsm_that_is_cut_short_is_refused(compression, tmp_path):
    path = tmp_path / "movie.lsm"
    _write_lsm(path, compression=compression)
    whole = path.read_bytes()
    for size in (1, 100, len(whole) // 2, 4 * len(whole) // 5):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match=r"movie\.lsm: .*cannot be read"):
            _read(path)
    tifffile.imwrite(path, FRAMES[:, 0])
    with pytest.raises(MovieError, match="is no LSM file; rename it"):
        open_movie(path)


# ---- SPE and SIF ----


def _spe_header(version: float, frames: int = 0, kind: int = 0, footer: int = 0) -> bytes:
    head = bytearray(4100)
    fields = {42: ("H", 6), 108: ("h", kind), 656: ("H", 5), 678: ("Q", footer)}
    fields |= {1446: ("i", frames), 1992: ("f", version)}
    for offset, (code, value) in fields.items():
        struct.pack_into(f"<{code}", head, offset, value)
    return bytes(head)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(0, "f4"), (1, "i4"), (2, "i2"), (3, "u2"), (5, "f8"), (6, "u1"), (8, "u4")],
)
def test_spe_of_winview_is_read(kind, dtype, tmp_path):
    frames = (FRAMES[:, 0] % 200).astype(f"<{dtype}")
    path = tmp_path / "movie.spe"
    path.write_bytes(_spe_header(2.5, 6, kind) + frames.tobytes())
    with open_movie(path) as movie:
        assert (movie.format, movie.dtype) == ("SPE 2", frames.dtype)
        np.testing.assert_array_equal(np.asarray(movie)[:, 0], frames)
    whole = path.read_bytes()
    for size in (1, 4099, 4100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match="truncated"):
            open_movie(path)
    path.write_bytes(_spe_header(2.5, 6, 77))
    with pytest.raises(MovieError, match="broken: its header says pixels of type 77"):
        open_movie(path)


def _write_spe_3(path: Path, regions: int = 1) -> None:
    frames = FRAMES[:, 0].astype("<u2")
    # A time stamp is behind each frame.
    pixels = b"".join(frame.tobytes() + struct.pack("<q", 7) for frame in frames)
    region = (
        '<DataBlock type="Region" count="1" width="6" height="5" size="60" stride="60"/>'
    )
    xml = (
        '<SpeFormat version="3.0" xmlns="http://www.princetoninstruments.com/spe/2009">'
        '<DataFormat><DataBlock type="Frame" count="6" pixelFormat="MonochromeUnsigned16" '
        f'size="60" stride="68">{region * regions}</DataBlock></DataFormat></SpeFormat>'
    )
    path.write_bytes(_spe_header(3.0, footer=4100 + len(pixels)) + pixels + xml.encode())


def test_spe_of_lightfield_is_read_without_what_is_behind_each_frame(tmp_path):
    path = tmp_path / "movie.spe"
    _write_spe_3(path)
    with open_movie(path) as movie:
        assert movie.format == "SPE 3"
        np.testing.assert_array_equal(np.asarray(movie), FRAMES[:, :1])
        np.testing.assert_array_equal(movie.read(2, 4), FRAMES[2:4, 0])
    whole = path.read_bytes()
    for size in (4100, 4200, 4100 + 6 * 68, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match="is truncated, or its XML is broken"):
            open_movie(path)
    _write_spe_3(path, 2)
    with pytest.raises(MovieError, match="2 regions of interest in a frame; save one"):
        open_movie(path)


def _write_sif(path: Path, pixels: int = 180) -> None:
    frames = FRAMES[:, 0].astype("<f4")
    lines = [
        "Andor Technology Multi-Channel File",
        "65538 1",
        f"65564 0 0 1 1700000000 -80 {' ' * 10}0 0.01 0.03 0.03 1 \0 0.03 1e-07 0 1 1 0 0 "
        f"1e-08 {'0 ' * 16}1 0",
        "DU897_BV",
        "512 512 9",
        "movie.sif ",
        "65538 4",
        "text",
        f"65538 {' ' * 8}0 0",
        *["0"] * 8,
        "17 Spectrograph_None",
        "65539 0",
        *["0 1 0 0"] * 2,
        *["0"] * 4,
        f"12\nPixel number6\nCounts12\nPixel number65541 1 6 5 1 6 1 {pixels} 30",
        "65538 1 5 6 1 1 1 0",
        *["0"] * 6,
        "0",
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n" + frames.tobytes() + b"more")


def test_sif_is_read(tmp_path):
    path = tmp_path / "movie.sif"
    _write_sif(path)
    with open_movie(path) as movie:
        assert (movie.format, movie.frame_interval_s) == ("Andor SIF", 0.03)
        np.testing.assert_array_equal(np.asarray(movie), FRAMES[:, :1].astype(np.float32))
    whole = path.read_bytes()
    # Also where sif-parser alone would read on for ever.
    for size in range(1, len(whole) - 5, 13):
        path.write_bytes(whole[:size])
        with pytest.raises(MovieError, match=r"is not a SIF file, or broken|truncated"):
            open_movie(path)
    _write_sif(path, 150)
    with pytest.raises(MovieError, match=r"header says 6 frames .* and 150 pixels"):
        open_movie(path)


# ---- What bioio reads ----


class _BioImage:
    scenes = ("first", "second")
    dims = Namespace(order="TCZYX", shape=(3, 2, 2, 5, 6))
    dtype = np.dtype(np.uint16)
    physical_pixel_sizes = Namespace(Z=None, Y=0.12, X=0.11)
    time_interval = datetime.timedelta(milliseconds=40)

    def __init__(self, path: Path) -> None:
        if path.read_bytes() != b"0":
            raise OSError("bioio found no reader")

    def set_scene(self, scene: int) -> None:
        self.scene = scene

    def get_image_dask_data(self, order: str, **place: int) -> Any:
        assert order == "YX"
        plane = PLANES[place["T"], place["Z"], place["C"]] + self.scene
        return Namespace(compute=lambda scheduler: plane)


def test_what_no_reader_knows_is_opened_by_bioio(monkeypatch, tmp_path):
    path = tmp_path / "movie.vsi"
    path.write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "bioio", None)
    with pytest.raises(MovieError, match=r"of no format that is read; .* and what bioio"):
        open_movie(path)
    _install(monkeypatch, "bioio", BioImage=_BioImage)
    with pytest.raises(MovieError, match=r"2 images.* \(0: first, 1: second\)"):
        open_movie(path)
    with open_movie(path / "1") as movie:
        assert (movie.format, movie.pixel_size_um) == ("image of bioio", (0.12, 0.11))
        np.testing.assert_array_equal(np.asarray(movie), FRAMES + 1)
    path.write_bytes(b"1")
    with pytest.raises(MovieError, match=r"cannot be read by bioio.*found no reader"):
        open_movie(path)


# ---- Missing libraries, and real files ----


@pytest.mark.parametrize(
    ("suffix", "module", "extra"),
    [
        ("nd2", "nd2", "nd2"),
        ("czi", "czifile" if sys.version_info >= (3, 12) else "bioio", "czi"),
        ("lif", "liffile", "lif"),
        ("sif", "sif_parser", "sif"),
        ("ims", "h5py", "ims"),
        ("lsm", "tifffile", "movies"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_remedy(
    suffix, module, extra, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"movie.{suffix}"
    path.write_bytes(b"0")
    message = rf"{re.escape(str(path))}: needs a Python package \(.*{module}.*\); "
    with pytest.raises(MovieError, match=message) as caught:
        open_movie(path)
    assert str(caught.value).endswith(f"install it with: pip install 'jaxbkgd[{extra}]'")


REAL = {
    "nikon.nd2": ((30, 2, 31, 38), np.uint16, (0.168, 0.168), None),
    "zeiss.czi": ((15, 2, 170, 240), np.uint16, None, None),
    "andor.sif": ((1, 1, 256, 256), np.float32, None, 0.02963),
    "princeton.spe": ((5, 1, 128, 128), np.uint16, None, None),
}

real_files = pytest.mark.parametrize("name", REAL)


def _real(name: str) -> Path:
    if not DATA.is_dir():
        pytest.skip("needs the shared data")
    return DATA / name


@pytest.mark.slow
@real_files
def test_real_files_are_read(name):
    shape, dtype, size, interval = REAL[name]
    with open_movie(_real(name)) as movie:
        assert (movie.shape, movie.dtype) == (shape, dtype)
        assert movie.pixel_size_um == (size and pytest.approx(size, abs=5e-4))
        assert movie.frame_interval_s == (interval and pytest.approx(interval))
        frames = np.asarray(movie)
    assert np.isfinite(frames).all()
    assert frames.any(axis=(0, 2, 3)).all()


def test_the_frames_of_a_real_nd2_are_those_that_nd2_gives():
    expected = nd2.imread(_real("nikon.nd2"))
    assert expected.shape == (3, 10, 2, 31, 38)
    frames = expected.reshape(-1, *expected.shape[2:])
    np.testing.assert_array_equal(_read(DATA / "nikon.nd2"), frames)


@pytest.mark.slow
@real_files
@pytest.mark.parametrize("part", [0.0001, 0.002, 0.01, 0.25, 0.5, 0.99])
def test_real_files_that_are_cut_short_are_refused_in_one_line(name, part, tmp_path):
    whole = _real(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: max(1, int(part * len(whole)))])
    with warnings.catch_warnings(), pytest.raises(MovieError) as caught:
        _read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)

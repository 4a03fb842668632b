"""Zarr and OME-Zarr are read whoever wrote them, and written for whoever reads them."""

import functools as ft
import json
import os
import pickle
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask.array
import fsspec
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.core.metadata import ArrayV3Metadata

from jaxbkgd import MovieError, open_movie
from jaxbkgd._movies.sinks import Layout
from jaxbkgd._movies.zarr import ZarrSink


SHAPE = (11, 12, 10)
# Neither divides the shape.
CHUNKS = (4, 8, 10)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def _write(path: Path, frames: np.ndarray, **settings: Any) -> Path:
    settings = {"chunks": CHUNKS, "compressors": None, **settings}
    array = zarr.create_array(path, shape=frames.shape, dtype=frames.dtype, **settings)
    array[...] = frames
    return path


def _write_ome(
    path: Path,
    array: np.ndarray,
    axes: str,
    version: str = "0.5",
    transformations: Any = None,
    **settings: Any,
) -> Path:
    units = {"t": "millisecond", "z": "nanometer", "y": "nanometer", "x": "micrometer"}
    kinds = {"t": "time", "c": "channel"}
    scales = {"t": 20.0, "c": 1.0, "z": 300.0, "y": 50.0, "x": 0.06}
    multiscale = {
        "axes": [
            {"name": axis, "type": kinds.get(axis, "space")}
            | ({"unit": units[axis]} if axis in units else {})
            for axis in axes
        ],
        "datasets": [
            {
                "path": "full/0",
                "coordinateTransformations": [
                    {"type": "scale", "scale": [scales[axis] for axis in axes]},
                    {"type": "translation", "translation": [7.0] * len(axes)},
                ],
            },
            {"path": "a level that is not read"},
        ],
    } | (transformations or {})
    if version == "0.5":
        about = {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    else:
        about = {"multiscales": [multiscale | {"version": version}]}
    zarr_format = 3 if version == "0.5" else 2
    zarr.create_group(path, zarr_format=zarr_format, attributes=about)
    chunks = tuple(-(-length // 2) for length in array.shape)
    _write(path / "full/0", array, chunks=chunks, zarr_format=zarr_format, **settings)
    return path


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _assert_reads(path: Path, expected: np.ndarray) -> None:
    """The movie is `expected`, (frames, channels, height, width), and in its type."""
    with open_movie(path) as movie:
        assert movie.shape == expected.shape
        assert movie.dtype == expected.dtype.newbyteorder("=")
        for index, channel in enumerate(movie.channels):
            np.testing.assert_array_equal(channel[:], expected[:, index])
            np.testing.assert_array_equal(channel[3:6], expected[3:6, index])


V2_PACKINGS: list[dict[str, Any]] = [
    {"compressors": numcodecs.Zstd(), "order": "F"},
    {"filters": [numcodecs.Delta("<u2", "<i4"), numcodecs.Shuffle(4)]},
    {"filters": [numcodecs.FixedScaleOffset(2, 1, "<u2", "<i4")]},
    {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
] + [
    {"compressors": codec}
    for codec in (
        None, numcodecs.Blosc("lz4"), numcodecs.GZip(), numcodecs.Zlib(), numcodecs.LZ4(),
        numcodecs.BZ2(), numcodecs.LZMA(),
    )
]  # fmt: skip
INNER = ShardingCodec(
    chunk_shape=CHUNKS, index_location="start", index_codecs=[BytesCodec()]
)
V3_PACKINGS: list[dict[str, Any]] = [
    {},
    {"serializer": BytesCodec(endian="big")},
    {"compressors": BloscCodec(cname="zstd", shuffle="bitshuffle")},
    {"compressors": GzipCodec()},
    {"compressors": [ZstdCodec(), Crc32cCodec()]},
    {"filters": TransposeCodec(order=(2, 0, 1))},
    {"compressors": ZstdCodec(), "shards": (8, 16, 10)},
    {"chunks": (8, 16, 10), "serializer": INNER},
    {"chunk_key_encoding": {"name": "v2", "separator": "."}},
]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_is_read_however_it_is_packed(zarr_format, frames, tmp_path):
    packings = V2_PACKINGS if zarr_format == 2 else V3_PACKINGS
    for number, packing in enumerate(packings):
        path = tmp_path / f"{number}.zarr"
        _write(path, frames, zarr_format=zarr_format, **packing)
        _assert_reads(path, frames[:, None])


@pytest.mark.parametrize("dtype", ["|b1", "|u1", ">i2", "<i8", "<f2", ">f4", "<f8"])
def test_pixels_of_all_types_are_read(dtype, frames, tmp_path):
    frames = (frames % 2).astype(dtype)
    path = _write(tmp_path / "m.zarr", frames, zarr_format=2)
    _assert_reads(path, frames[:, None])


@pytest.mark.parametrize(
    ("axes", "version"),
    [
        *[("yx", "0.4"), ("tyx", "0.5"), ("cyx", "0.4"), ("zyx", "0.5"), ("ctyx", "0.4")],
        *[("czyx", "0.5"), ("tczyx", "0.4"), ("tczyx", "0.5")],
    ],
)
def test_the_axes_of_ome_zarr_are_frames_and_channels(axes, version, tmp_path):
    lengths = {"t": 3, "c": 2, "z": 4, "y": 6, "x": 5}
    shape = tuple(lengths[axis] for axis in axes)
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = _write_ome(tmp_path / "m.zarr", array, axes, version)
    order = [axes.index(axis) for axis in "tzcyx" if axis in axes]
    whole = [lengths[axis] if axis in axes else 1 for axis in "tzcyx"]
    expected = array.transpose(order).reshape(whole[0] * whole[1], *whole[2:])
    _assert_reads(path, expected)
    with open_movie(path) as movie:
        assert movie.pixel_size_um == pytest.approx((0.05, 0.06), rel=1e-12)
        # Between depths there is no time that one could tell.
        is_timed = "t" in axes and "z" not in axes
        assert movie.frame_interval_s == (0.02 if is_timed else None)


def test_the_scale_of_all_levels_multiplies_that_of_the_first(frames, tmp_path):
    twice = {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 3.0, 4.0]}]}
    path = _write_ome(tmp_path / "m.zarr", frames, "tyx", transformations=twice)
    with open_movie(path) as movie:
        assert movie.pixel_size_um == pytest.approx((0.15, 0.24), rel=1e-12)
        assert movie.frame_interval_s == pytest.approx(0.04, rel=1e-12)


def test_a_group_of_many_arrays_names_them_and_each_can_be_opened(frames, tmp_path):
    path = tmp_path / "m.zarr"
    zarr.create_group(path)
    _write(path / "green", frames)
    # A group of one array is that array.
    _assert_reads(path, frames[:, None])
    _write(path / "red", frames)
    with pytest.raises(MovieError, match=r"arrays .green, red. .*m\.zarr/green$"):
        open_movie(path)
    _assert_reads(path / "red", frames[:, None])


def test_four_axes_are_frames_then_channels_unless_they_are_named(tmp_path):
    array = np.arange(3 * 2 * 6 * 5, dtype=np.uint16).reshape(3, 2, 6, 5)
    chunks = (2, 1, 6, 5)
    _assert_reads(_write(tmp_path / "a.zarr", array, chunks=chunks), array)
    named = _write(
        tmp_path / "b.zarr",
        array,
        chunks=chunks,
        dimension_names=["channel", "z", "y", "x"],
    )
    _assert_reads(named, array.transpose(1, 0, 2, 3))
    with pytest.raises(MovieError, match="must be of t, c, z, and then y, x"):
        open_movie(
            _write(tmp_path / "c.zarr", array, chunks=chunks, dimension_names=list("yxtc"))
        )


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "names",
    [
        *[["position", "t", "y", "x"], ["p", "c", "y", "x"], ["fov", "c", "row", "col"]],
        *[["s", "Time", "y", "x"], ["t", "laser", "y", "x"], ["site", "dim_1", "i", "j"]],
        *[["position", "y", "x"], ["P", "y", "x"], ["row", "y", "x"]],
    ],
)
def test_positions_and_unknown_axes_are_neither_frames_nor_channels(
    names, zarr_format, tmp_path
):
    about: Any = {"dimension_names": names}
    if zarr_format == 2:
        about = {"zarr_format": 2, "attributes": {"_ARRAY_DIMENSIONS": names}}
    frames = np.ones((3, 2, 6, 5)[-len(names) :], np.uint16)
    path = _write(tmp_path / "m.zarr", frames, chunks=frames.shape, **about)
    with pytest.raises(MovieError, match=f"'{names[0]}, .* each position as an array"):
        open_movie(path)


@pytest.mark.parametrize(
    ("names", "axes"),
    [
        *[(["dim_0", "dim_1", "y", "x"], "tcyx"), (["a", "b", "i", "j"], "tcyx")],
        *[([None, "z", "row", "col"], "tzyx"), (["time", None, "h", "w"], "tcyx")],
        *[(["c", "t", "dim_2", None], "ctyx"), (["position", "t", "y", "x"], "ptyx")],
        *[(["c", "fov", "y", "x"], "cpyx"), (["p", "c", "y", "x"], "pcyx")],
    ],
)
def test_axes_without_names_have_the_usual_order_and_one_position_is_left_out(
    names, axes, tmp_path
):
    lengths = {"p": 1, "t": 3, "c": 2, "z": 4, "y": 6, "x": 5}
    shape = [lengths[axis] for axis in axes]
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    path = _write(tmp_path / "m.zarr", array, chunks=(1, 1, 6, 5), dimension_names=names)
    sizes = dict(zip(axes, shape, strict=True))
    order = [axes.index(axis) for axis in "ptzcyx" if axis in axes]
    frames = sizes.get("t", 1) * sizes.get("z", 1)
    expected = array.transpose(order).reshape(frames, sizes.get("c", 1), 6, 5)
    _assert_reads(path, expected)


def test_the_frames_of_a_damaged_chunk_are_named(frames, tmp_path):
    codecs = [None, *map(numcodecs.Blosc, ("zstd", "blosclz", "lz4"))]
    codecs += [numcodecs.Zstd(), numcodecs.GZip(), numcodecs.LZ4(), numcodecs.LZMA()]
    for number, codec in enumerate(codecs):
        path = tmp_path / f"{number}.zarr"
        _write(path, frames, zarr_format=2, compressors=codec)
        chunk = path / "1.0.0"
        whole = chunk.read_bytes()
        for damaged in (b"", whole[:3], whole[:20], whole[:-1], whole[:16] + whole[40:]):
            chunk.write_bytes(damaged)
            with open_movie(path) as movie:
                with pytest.raises(MovieError, match="zarr: frames 4 to 7 cannot be read"):
                    movie.read(3, 6)
                # The others are as good as before.
                np.testing.assert_array_equal(movie.read(0, 4), frames[:4])


@pytest.mark.parametrize("compressor", [None, ZstdCodec()])
def test_chunks_that_are_read_in_parts_are_read_once(compressor, frames, tmp_path):
    path = _write(tmp_path / "m.zarr", frames, compressors=compressor)
    with open_movie(path) as movie, ThreadPoolExecutor(3) as threads:
        assert movie.chunk_frames == CHUNKS[0]
        for chunk_is_there in (True, False):
            reads = threads.map(lambda start: movie.read(start, start + 3), range(8))
            for start, read in enumerate(reads):
                np.testing.assert_array_equal(read, frames[start : start + 3])
                read[:] = 0
            if chunk_is_there:
                shutil.rmtree(path / "c")


def test_missing_chunks_are_filled_and_warned_of_once_or_refused(frames, tmp_path):
    # Zeros that were written are not missing.
    frames[:4] = 0
    config: Any = {"write_empty_chunks": True}
    path = _write(tmp_path / "m.zarr", frames, zarr_format=2, fill_value=0, config=config)
    with open_movie(path) as movie:
        np.testing.assert_array_equal(movie.read(0, 11), frames)
        (path / "1.1.0").unlink()
        frames[4:8, 8:] = 0
        with pytest.warns(UserWarning, match=r"chunks are missing, such as 1\.1\.0"):
            np.testing.assert_array_equal(movie.read(0, 11), frames)
        movie.read(0, 11)
    _edit(path / ".zarray", fill_value=None)
    with (
        open_movie(path) as movie,
        pytest.raises(MovieError, match=r"4 to 7 .*no fill value"),
    ):
        movie.read(4, 8)


@pytest.mark.parametrize(
    ("axes", "chunks", "fill"),
    [("tyx", (2, 12, 10), 0), ("tyx", (2, 6, 5), 7), ("ctyx", (1, 2, 12, 5), np.nan)],
)
def test_a_missing_chunk_in_a_shard_is_warned_of_as_one_without(
    axes, chunks, fill, tmp_path
):
    shape = (2, 12, 12, 10)[-len(axes) :]
    whole = np.random.default_rng(0).integers(10, 99, shape).astype(np.float32)
    # A pixel, or a part of a chunk, that has the fill value is no missing chunk.
    whole[..., 0, 0] = whole[..., 2, :, :] = fill
    packing = {"chunks": chunks, "dimension_names": list(axes), "fill_value": fill}
    shards = (*[1] * (len(axes) - 3), 6, 12, 10)
    path = _write(tmp_path / "m.zarr", whole, shards=shards, **packing)
    with open_movie(path) as movie:
        movie.read(0, 12)
    whole[..., 8:10, : chunks[-2], : chunks[-1]] = fill
    path = _write(tmp_path / "n.zarr", whole, shards=shards, **packing)
    with open_movie(path) as movie:
        with pytest.warns(UserWarning, match=rf"such as one of frame 8, .* all {fill}"):
            read = movie.read(3, 12)
        np.testing.assert_array_equal(read, whole.reshape(-1, *shape[-3:])[0, 3:])
        movie.read(0, 12)


def test_a_damaged_shard_is_an_error(frames, tmp_path):
    packing = {"compressors": ZstdCodec(), "shards": (8, 16, 10)}
    path = _write(tmp_path / "m.zarr", frames, **packing)
    chunk = path / "c/0/0/0"
    whole = chunk.read_bytes()
    for damaged in (b"", whole[:9], whole[:-1], whole[100:], whole[:-30] + whole[-29:]):
        chunk.write_bytes(damaged)
        with open_movie(path) as movie, pytest.raises(MovieError, match="frames 0 to 3"):
            movie.read(0, 1)


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_pickle_is_not_opened(frames, tmp_path):
    path = _write(tmp_path / "m.zarr", frames, zarr_format=2)
    for chunk in path.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    metadata = json.loads((path / ".zarray").read_text())
    for change in (
        {"filters": [{"id": "pickle", "protocol": 5}]},
        {"compressor": {"id": "pickle", "protocol": 5}},
        {"filters": [{"id": "pickle"}], "dtype": "|O"},
        {"filters": [{"id": "json2"}]},
        {"filters": [{"id": "msgpack2"}]},
        {"filters": [{"id": "delta", "dtype": "|O"}]},
        {"filters": [{"id": "fixedscaleoffset", "offset": 0, "scale": 1, "dtype": "|O"}]},
    ):
        (path / ".zarray").write_text(json.dumps(metadata | change))
        with pytest.raises(MovieError, match=r"m\.zarr: "), open_movie(path) as movie:
            movie.read(0, 11)
    assert not (tmp_path / "ran").exists()


LIES: list[dict[str, Any]] = [
    {"shape": [1, 2**20, 2**20]}, {"shape": [2**80, 12, 10]}, {"shape": [-1, 12, 10]},
    {"shape": [0, 12, 10]}, {"shape": [11.0, 12, 10]}, {"shape": [11, 12]}, {"shape": None},
    {"dtype": "<c8"},
    {"dtype": [["a", "<u2"], ["b", "<u2"]]}, {"dtype": "<M8[s]"}, {"order": "Z"},
    {"fill_value": 2**70}, {"zarr_format": 4}, {"dimension_separator": "/../"},
    {"filters": 7},
]  # fmt: skip


def test_metadata_that_lie_are_refused_at_the_door(frames, tmp_path):
    path = _write(tmp_path / "m.zarr", frames, zarr_format=2)
    whole = (path / ".zarray").read_text()
    for lie in LIES:
        _edit(path / ".zarray", **lie)
        with pytest.raises(MovieError, match=r"m\.zarr: (cannot be read|broken|has )"):
            open_movie(path)
        (path / ".zarray").write_text(whole)
    (path / ".zarray").write_text("[" * 1_000_000)
    with pytest.raises(MovieError, match=r"m\.zarr: cannot be read"):
        open_movie(path)


@pytest.mark.parametrize(
    "inside", ["../b.zarr", "/etc", "file:///etc", "a/../../b.zarr", "..\\b"]
)
def test_an_image_is_not_looked_for_outside(inside, frames, tmp_path):
    _write(tmp_path / "b.zarr", frames)
    path = _write_ome(tmp_path / "a.zarr", frames, "tyx", "0.4")
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["datasets"][0]["path"] = inside
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(MovieError, match=r"a\.zarr: cannot be read"):
        open_movie(path)


def test_damaged_metadata_give_an_error_or_frames(frames, tmp_path):
    rng = np.random.default_rng(1)
    sharded = {"compressors": BloscCodec(cname="lz4"), "shards": (8, 16, 10)}
    files = [
        (_write_ome(tmp_path / "a.zarr", frames, "tyx", "0.4"), ".zattrs"),
        (_write_ome(tmp_path / "b.zarr", frames, "tyx"), "zarr.json"),
        (_write(tmp_path / "c.zarr", frames, **sharded), "zarr.json"),
        (
            _write(tmp_path / "d.zarr", frames, zarr_format=2, **V2_PACKINGS[1]),
            ".zarray",
        ),
    ]
    outcomes = set()
    for path, name in files:
        whole = (path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                replacement = rng.choice(list(b'0129"[]{},:-ex\x00'), 1).astype(np.uint8)
                damaged[place : place + rng.integers(3)] = replacement.tobytes()
            (path / name).write_bytes(damaged)
            outcomes.add(_outcome(path))
    assert outcomes == {"frames", "error"}


def _outcome(path: Path) -> str:
    with warnings.catch_warnings():
        # A length that grew has chunks that were never written.
        warnings.filterwarnings("ignore", "(?s).* chunks are missing, such as")
        try:
            with open_movie(path) as movie:
                movie.read(0, min(movie.shape[0], 12))
        except MovieError:
            return "error"
    return "frames"


def test_a_movie_includes_the_store_around_it_and_the_files_in_it(frames, tmp_path):
    path = _write_ome(tmp_path / "m.zarr", frames, "tyx")
    with open_movie(path / "full/0") as movie:
        for inside in (path, path / "full/0", path / "full/0/c/0/0/0"):
            assert movie.includes(inside.resolve())
        assert not movie.includes(tmp_path.resolve() / "other.zarr")


# Beyond folders.


@pytest.mark.parametrize("root", ["", "m.zarr"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_zipped_zarr_is_read(zarr_format, root, frames, tmp_path):
    _write(tmp_path / "a" / root / "", frames, zarr_format=zarr_format)
    path = Path(shutil.make_archive(str(tmp_path / "m.zarr"), "zip", tmp_path / "a"))
    _assert_reads(path, frames[:, None])
    with open_movie(path) as movie:
        assert movie.paths == (path,)
        assert movie.state() == movie.opened_state is not None
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MovieError, match=r"m\.zarr\.zip: cannot be read \(.*\)$"):
        open_movie(path)


def test_a_zip_of_macos_is_read(frames, tmp_path):
    _write(tmp_path / "a" / "m.zarr", frames)
    aside = tmp_path / "a" / "__MACOSX" / "m.zarr"
    aside.mkdir(parents=True)
    (aside / "._zarr.json").write_bytes(b"of macOS")
    packed = shutil.make_archive(str(tmp_path / "m.zarr"), "zip", tmp_path / "a")
    _assert_reads(Path(packed), frames[:, None])


def test_a_folder_that_lacks_the_metadata_of_zarr_is_refused(frames, tmp_path):
    path = _write(tmp_path / "m.zarr", frames)
    (path / "zarr.json").unlink()
    with pytest.raises(MovieError, match=r"m\.zarr: is no Zarr, .* zarr\.json.*copy it"):
        open_movie(path)


def test_a_zarr_is_read_by_its_address(frames, tmp_path):
    path = _write(tmp_path / "m.zarr", frames)
    fsspec.filesystem("memory").put(str(path), "/m.zarr", recursive=True)
    for address in ("memory://m.zarr", path.as_uri()):
        with open_movie(address) as movie:
            assert (movie.name, movie.paths, movie.state()) == (address, (), None)
            np.testing.assert_array_equal(movie.channels[0][:], frames)
    with pytest.raises(MovieError, match=r"memory://n\.zarr: cannot be read"):
        open_movie("memory://n.zarr")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_a_zarr_is_read_from_a_server(frames, tmp_path):
    _write(tmp_path / "movie.zarr", frames)
    handler = ft.partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            with open_movie(f"{address}/movie.zarr") as movie:
                np.testing.assert_array_equal(movie.read(2, 7), frames[2:7])
            with pytest.raises(MovieError, match=r"/other\.zarr: cannot be read"):
                open_movie(f"{address}/other.zarr")
        finally:
            server.shutdown()
            thread.join()


def test_several_images_are_refused_and_one_is_named(frames, tmp_path):
    plate, positions = tmp_path / "plate.zarr", tmp_path / "positions.zarr"
    zarr.create_group(plate, attributes={"ome": {"version": "0.5", "plate": {}}})
    zarr.create_group(positions, attributes={"ome": {"bioformats2raw.layout": 3}})
    for position in "01":
        _write_ome(positions / position, frames, "tyx")
        if position == "0":
            _assert_reads(positions, frames[:, None])
    for path, image in ((plate, "A/1/0"), (positions, "0")):
        with pytest.raises(MovieError, match=rf"several images.*{path.name}/{image}$"):
            open_movie(path)
    _assert_reads(positions / "1", frames[:, None])


# Writing.


def _sink(path: Path, frames: np.ndarray, chunk_frames: int = 4, **about: Any) -> ZarrSink:
    return ZarrSink(path, Layout(frames.shape, frames.dtype, chunk_frames), **about)


def _save(path: Path, frames: np.ndarray, starts: Any = None, **about: Any) -> Path:
    sink = _sink(path, frames, **about)
    sink.begin()
    with ThreadPoolExecutor(2) as threads:
        starts = range(0, len(frames), 4) if starts is None else starts
        list(
            threads.map(lambda start: sink.write(start, frames[start : start + 4]), starts)
        )
    sink.commit()
    return path


def _files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


@pytest.fixture(params=[(1, np.float32), (2, np.uint16)], ids=["one-channel", "two"])
def output(request: pytest.FixtureRequest) -> np.ndarray:
    channels, dtype = request.param
    pixels = np.random.default_rng(0).normal(100, 9, (11, channels, 12, 10))
    # The last frames are zero, which writers of Zarr like to leave out.
    pixels[8:] = 0
    return pixels.astype(dtype)


def test_a_movie_is_read_back_by_zarr_dask_and_ourselves(output, tmp_path):
    path = _save(tmp_path / "m.zarr", output)
    expected = output if output.shape[1] > 1 else output[:, 0]
    array = zarr.open_array(path, mode="r")
    assert isinstance(array.metadata, ArrayV3Metadata)
    assert array.metadata.dimension_names == tuple("tcyx" if output.shape[1] > 1 else "tyx")
    assert array.nchunks_initialized == array.nchunks
    np.testing.assert_array_equal(array[...], expected)
    np.testing.assert_array_equal(dask.array.from_zarr(path).compute(), expected)
    _assert_reads(path, output)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("name", ["m.zarr", "m.ome.zarr"])
def test_the_pixel_size_and_the_interval_are_read_back(name, is_known, output, tmp_path):
    sizes: Any = ((0.1, 0.11), 0.03) if is_known else (None, None)
    sink = ZarrSink(tmp_path / name, Layout(output.shape, output.dtype, 4, *sizes))
    sink.begin()
    sink.write(0, output)
    sink.commit()
    with open_movie(tmp_path / name) as movie:
        assert (movie.pixel_size_um, movie.frame_interval_s) == sizes


def test_an_ome_zarr_is_valid_and_read_back_by_others(output, tmp_path):
    # These take long to import.
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    from ome_zarr_models.v05.image import Image

    path = _save(tmp_path / "m.ome.zarr", output)
    expected = output if output.shape[1] > 1 else output[:, 0]
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    multiscale = image.ome_attributes.multiscales[0]
    axes = [(axis.name, axis.type) for axis in multiscale.axes]
    channel = [("c", "channel")] if output.shape[1] > 1 else []
    assert axes == [("t", "time"), *channel, ("y", "space"), ("x", "space")]
    location = parse_url(path)
    assert location is not None
    nodes = list(Reader(location)())
    np.testing.assert_array_equal(np.asarray(nodes[0].data[0]), expected)
    _assert_reads(path, output)


@pytest.mark.parametrize("name", ["m.zarr", "m.ome.zarr"])
def test_the_same_files_are_written_in_any_order_and_after_a_kill(name, output, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = _files(_save(tmp_path / "a" / name, output))
    killed = _sink(tmp_path / "b" / name, output)
    killed.begin()
    killed.write(8, output[8:])
    killed.write(4, output[4:8])
    # Of a chunk that was being written, there is a part.
    chunks = killed.draft / ("0/c/1" if "ome" in name else "c/1")
    for file in filter(Path.is_file, chunks.rglob("*")):
        file.write_bytes(file.read_bytes()[:100])
    killed.close()
    again = _sink(tmp_path / "b" / name, output)
    again.resume()
    again.write(4, output[4:8])
    again.write(0, output[:4])
    again.commit()
    assert _files(tmp_path / "b" / name) == whole
    assert os.listdir(tmp_path / "b") == [name]


def test_a_zarr_is_replaced_when_asked_and_nothing_else_is(output, tmp_path):
    path = _save(tmp_path / "m.zarr", output)
    (path / "left").touch()
    with pytest.raises(MovieError, match="exists already"):
        _sink(path, output).begin()
    _save(path, output + 1, overwrite=True)
    _assert_reads(path, output + 1)
    assert os.listdir(tmp_path) == ["m.zarr"]
    assert not (path / "left").exists()
    for other in ("folder.zarr", "file.zarr"):
        (tmp_path / other).mkdir() if other[1] == "o" else (tmp_path / other).touch()
        with pytest.raises(MovieError, match="is no movie of this format"):
            _sink(tmp_path / other, output, overwrite=True).begin()


def test_a_draft_that_was_removed_is_not_committed(output, tmp_path):
    sink = _sink(tmp_path / "m.zarr", output)
    sink.begin()
    shutil.rmtree(sink.draft)
    with pytest.raises(MovieError, match="has been removed"):
        sink.write(0, output)
    sink.draft.mkdir()
    with pytest.raises(MovieError, match="has been removed"):
        sink.commit()
    with pytest.raises(MovieError, match="has been removed"):
        sink.resume()
    sink.close()
    assert not (tmp_path / "m.zarr").exists()

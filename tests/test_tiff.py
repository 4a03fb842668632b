"""TIFF of any kind is read as it was meant, or refused; others read what is written."""

import contextlib
import json
import os
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask_image.imread
import numpy as np
import pytest
import tifffile
from PIL import Image

from jaxbkgd import MovieError, open_movie
from jaxbkgd._movies import tiff_pages as _tiff
from jaxbkgd._movies.sinks import Layout
from jaxbkgd._movies.tiff_pages import TiffSink


SHAPE = (7, 12, 10)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def _read(path: Path) -> np.ndarray:
    """All of a movie, (frames, channels, height, width)."""
    with open_movie(path) as movie:
        return np.stack([channel[:] for channel in movie.channels], axis=1)


def _write(path: Path, frames: np.ndarray, **options) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", **options)


def _page(tiff: tifffile.TiffFile, index: int) -> tifffile.TiffPage:
    page = tiff.pages[index]
    assert isinstance(page, tifffile.TiffPage)
    return page


def _write_with_pillow(path: Path, frames: np.ndarray) -> None:
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others)


def _write_page_by_page(path: Path, frames: np.ndarray, ome: bool = False) -> None:
    with tifffile.TiffWriter(path, ome=ome) as writer:
        for frame in frames:
            writer.write(frame, photometric="minisblack")


IMAGEJ = {"imagej": True, "metadata": {"axes": "TYX"}}

# Each way to store the same frames, and whether their pixels lie in the file as they are.
# libtiff likes small strips: here, of 4 rows.
WRITERS = {
    "pages": (_write, True),
    "page by page": (_write_page_by_page, True),
    "strips": (lambda *to: _write(*to, rowsperstrip=4, metadata=None), True),
    "Pillow": (_write_with_pillow, True),
    "BigTIFF": (lambda *to: _write(*to, bigtiff=True), True),
    "big-endian": (lambda *to: _write(*to, byteorder=">"), True),
    "ImageJ": (lambda *to: _write(*to, **IMAGEJ), True),
    "ImageJ, one page": (lambda *to: _write(*to, **IMAGEJ, truncate=True), True),
    "one page": (lambda *to: _write(*to, truncate=True, byteorder=">"), True),
    "OME": (lambda *to: _write(*to, ome=True, metadata={"axes": "TYX"}), True),
    "OME page by page": (lambda *to: _write_page_by_page(*to, ome=True), True),
    "deflated": (lambda *to: _write(*to, compression="zlib", predictor=True), False),
    "LZW": (lambda *to: _write(*to, compression="lzw"), False),
    "zstd": (lambda *to: _write(*to, compression="zstd"), False),
    "tiles": (lambda *to: _write(*to, tile=(16, 16)), False),
}


@pytest.mark.parametrize("way", WRITERS)
def test_any_tiff_stack_reads_the_same_frames(way, frames, tmp_path, monkeypatch):
    path = tmp_path / "movie.tif"
    write, is_plain = WRITERS[way]
    write(path, frames)
    with open_movie(path) as movie:
        if is_plain:
            # What needs no decoding goes the fast way, without tifffile.
            monkeypatch.delattr(tifffile, "TiffPage")
        assert movie.shape == (7, 1, 12, 10)
        assert movie.dtype == np.uint16
        assert movie.dtype.isnative
        for part in (slice(None), slice(0, 3), slice(3, 7), slice(6, 99), slice(5, 2)):
            read = movie.channels[0][part]
            assert read.dtype == np.uint16
            np.testing.assert_array_equal(read, frames[part])


def test_a_metamorph_stack_is_read_from_its_one_page(frames, tmp_path):
    path = tmp_path / "movie.stk"
    # UIC1 and UIC2 tags of 7 planes, and ones for what UIC2 has more than TIFF lets it.
    tags = [(33628, 4, 7, [0] * 7, True), (33629, 5, 7, [1] * 14, True)]
    _write(path, np.ones_like(frames[0]), metadata=None, extratags=tags, software=False)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        _page(tiff, 0).tags["StripOffsets"].overwrite(path.stat().st_size)
    with path.open("ab") as file:
        file.write(frames.tobytes())
    np.testing.assert_array_equal(_read(path)[:, 0], frames)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MovieError, match=r"truncated: it says 7 frames .* but has 6"):
        open_movie(path)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "?"]
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_real_dtype_is_read_as_it_was_stored(dtype, byteorder, tmp_path):
    frames = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "movie.tif"
    _write(path, frames, byteorder=byteorder)
    read = _read(path)
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read[:, 0], frames)


def _expected(stack: np.ndarray, axes: str) -> np.ndarray:
    """Channels behind the frames, which are all other axes in their order."""
    stack = np.moveaxis(stack, axes.index("C"), -3)
    return stack.reshape(-1, *stack.shape[-3:])


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ("TCYX", {}),
        ("CTYX", {}),
        ("TZCYX", {"imagej": True}),
        ("TCYX", {"imagej": True, "truncate": True}),
        *((axes, {"ome": True}) for axes in ("TCYX", "CTYX", "TZCYX", "TCZYX", "CZTYX")),
    ],
)
def test_a_channel_axis_becomes_channels_and_others_become_frames(axes, options, tmp_path):
    lengths = {"T": 3, "Z": 2, "C": 4, "Y": 5, "X": 6}
    shape = [lengths[axis] for axis in axes]
    stack = np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)
    path = tmp_path / "movie.tif"
    _write(path, stack, metadata={"axes": axes}, **options)
    np.testing.assert_array_equal(_read(path), _expected(stack, axes))


def test_channels_that_were_appended_in_blocks_are_told_apart(tmp_path):
    stack = np.arange(6 * 2 * 3 * 4).reshape(6, 2, 3, 4).astype(np.uint16)
    path = tmp_path / "movie.tif"
    for block in (stack[:2], stack[2:4], stack[4:]):
        _write(path, block, metadata={"axes": "TCYX"}, append=path.exists())
    np.testing.assert_array_equal(_read(path), stack)
    # Older versions of tifffile write the axes first.
    said = json.dumps({"axes": "TCYX", "shape": stack.shape})
    _write_described(path, stack.reshape(12, 3, 4), said)
    np.testing.assert_array_equal(_read(path), stack)


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}])
def test_frames_that_a_program_calls_channels_are_read_as_frames(options, tmp_path):
    # tifffile calls the first axis channels if it is told none.
    frames = np.arange(12 * 4 * 5).reshape(12, 4, 5).astype(np.uint16)
    path = tmp_path / "movie.tif"
    _write(path, frames, **options)
    with pytest.warns(UserWarning, match="1 frame of 12 channels is read as frames"):
        np.testing.assert_array_equal(_read(path)[:, 0], frames)


def test_an_imagej_stack_above_4_gb_is_read_behind_its_one_page(tmp_path):
    frames, height, width = 8800, 500, 500
    text = f"ImageJ=1.53t\nimages={frames}\nframes={frames}\n".encode() + b"\0"
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16 << 16),
        (259, 3, 1, 1 << 16), (262, 3, 1, 1 << 16), (270, 2, len(text), 200),
        (273, 4, 1, 1024), (277, 3, 1, 1 << 16), (278, 3, 1, height << 16),
        (279, 4, 1, 2 * height * width),
    ]  # fmt: skip
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags))
    head += b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    path = tmp_path / "movie.tif"
    with path.open("wb") as file:
        file.write(head.ljust(200, b"\0") + text)
        # The pixels between are a hole.
        file.truncate(1024 + 2 * frames * height * width)
        for frame in (0, frames - 1):
            file.seek(1024 + 2 * frame * height * width)
            file.write(np.full(height * width, 100 + frame, ">u2").tobytes())
    with open_movie(path) as movie:
        assert movie.shape == (frames, 1, height, width)
        for frame, value in ((0, 100), (4000, 0), (frames - 1, 99 + frames)):
            assert set(np.unique(movie.read(frame, frame + 1))) == {value}


@pytest.mark.parametrize(
    ("stored", "calibration", "dtype", "expected"),
    [
        ("u2", "cf=0\nc0=-32768\nc1=1\n", "i2", [-32768, 0, 32767]),
        ("u2", "cf=0\nc0=-32768.0\nc1=1.0\nvunit=gray value\n", "i2", [-32768, 0, 32767]),
        ("u2", "cf=0\nc0=-100\nc1=1\n", "f4", [-100, 32668, 65435]),
        ("u2", "cf=0\nc0=10\nc1=0.5\n", "f4", [10, 16394, 32777.5]),
        ("u1", "cf=0\nc0=0\nc1=2\n", "f4", [0, 256, 510]),
        ("u2", "cf=20\nc0=3\n", "u2", [0, 32768, 65535]),
        ("u2", "", "u2", [0, 32768, 65535]),
        ("f4", "cf=0\nc0=-32768\nc1=1\n", "f4", [0, 32768, 65535]),
    ],
)
def test_pixels_have_the_values_that_imagej_shows(
    stored, calibration, dtype, expected, tmp_path
):
    limits = [0, 128, 255] if stored == "u1" else [0, 32768, 65535]
    frames = np.repeat(np.array(limits, stored), 20).reshape(3, 4, 5)
    text = f"ImageJ=1.53t\nimages=3\nframes=3\n{calibration}"
    for path in (tmp_path / "m_part1.tif", tmp_path / "m_part2.tif"):
        _write_described(path, frames, text)
    read = _read(tmp_path / "m_part1.tif")
    assert read.dtype == np.dtype(dtype)
    assert read[:, 0, 0, 0].tolist() == expected
    assert _read(tmp_path)[:, 0, 0, 0].tolist() == expected * 2


@pytest.mark.parametrize(
    "calibration",
    [
        "cf=1\nc0=1\nc1=2\nc2=3\n",
        *(f"cf=0\nc0={offset}\nc1=1\n" for offset in ("nan", "inf", "-inf", "1e39")),
        *(f"cf=0\nc0=0\nc1={slope}\n" for slope in ("nan", "inf", "-inf", "1e36", "0")),
    ],
)
def test_calibrations_of_imagej_that_are_no_straight_line_are_refused(
    calibration, frames, tmp_path
):
    path = tmp_path / "movie.tif"
    _write_described(path, frames, f"ImageJ=1.53t\nimages=7\nframes=7\n{calibration}")
    with pytest.raises(MovieError, match="not read; convert it to 32-bit"):
        open_movie(path)


def test_an_unfinished_micromanager_file_of_several_channels_is_refused(frames, tmp_path):
    path = tmp_path / "acq_MMStack_Pos0.ome.tif"
    tags = [
        (256, 4, 1, 10), (257, 4, 1, 12), (258, 3, 1, 16), (273, 4, 1, 1024),
        (279, 4, 1, 240), (51123, 2, 8, 900),
    ]  # fmt: skip
    page = struct.pack("<H", 6) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    for channels in (1, 2):
        summary = json.dumps({"Channels": channels, "Positions": 1}).encode()
        head = b"II*\0" + struct.pack("<I", 512)
        # Micro-Manager's own header, where the index, settings and comments are missing.
        head += struct.pack(
            "<8I", 54773648, 0, 483765892, 0, 99384722, 0, 2355492, len(summary)
        )
        content = (head + summary).ljust(512, b"\0") + page
        content = content.ljust(900, b"\0") + b'{"a":0}\0'
        path.write_bytes(content.ljust(1024, b"\0") + frames[0].tobytes())
        if channels == 1:
            np.testing.assert_array_equal(_read(path)[:, 0], frames[:1])
        else:
            with pytest.raises(MovieError, match="2 channels and 1 positions without OME"):
                open_movie(path)


def _resolution(y: float, x: float, unit: str) -> dict[str, Any]:
    return {"resolution": (x, y), "resolutionunit": unit}


SIZES = {"PhysicalSizeX": 100.0, "PhysicalSizeXUnit": "nm"}
SIZES |= {"PhysicalSizeY": 2e-7, "PhysicalSizeYUnit": "m"}
TIMES = {"TimeIncrement": 50.0, "TimeIncrementUnit": "ms"}
NO_SIZES = {"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel", "TimeIncrement": -1.0}
CALIBRATIONS = [
    (_resolution(5e4, 1e5, "CENTIMETER"), {}, (0.2, 0.1), None),
    (_resolution(127000, 254000, "INCH"), {}, (0.2, 0.1), None),
    # Of a printer, of nothing, and of no unit.
    *((_resolution(dpi, dpi, "INCH"), {}, None, None) for dpi in (72, 300)),
    (_resolution(10, 10, "NONE"), {}, None, None),
    (_resolution(0, 0, "CENTIMETER"), {}, None, None),
    *(
        ({"resolution": (x, x / 2), "imagej": True}, {"unit": unit}, (0.2, 0.1), None)
        for unit, x in (
            *(("um", 10), ("micron", 10), ("\\u00B5m", 10)),
            *(("nm", 0.01), ("mm", 10000), ("inch", 254000)),
        )
    ),
    ({"resolution": (10, 10), "imagej": True}, {"unit": "pixel"}, None, None),
    ({"imagej": True}, {"finterval": 0.05}, None, 0.05),
    ({"imagej": True}, {"finterval": 50.0, "tunit": "ms"}, None, 0.05),
    ({"ome": True}, {"PhysicalSizeX": 0.1, "PhysicalSizeY": 0.2}, (0.2, 0.1), None),
    ({"ome": True}, SIZES | TIMES, (0.2, 0.1), 0.05),
    ({"ome": True}, NO_SIZES, None, None),
]


@pytest.mark.parametrize(("options", "metadata", "size", "interval"), CALIBRATIONS)
def test_pixel_size_and_frame_interval_are_what_the_file_says(
    options, metadata, size, interval, frames, tmp_path
):
    path = tmp_path / "movie.tif"
    _write(path, frames, **options, metadata={"axes": "TYX", **metadata})
    with open_movie(path) as movie:
        assert movie.pixel_size_um == size
        assert movie.frame_interval_s == interval


# ---- OME-TIFF of several files ----


def _ome_xml(uuid: str, planes: str, frames: int, channels: int = 1) -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}">'
        f'<Image><Pixels DimensionOrder="XYCZT" SizeX="10" SizeY="12" SizeZ="1" '
        f'SizeC="{channels}" SizeT="{frames}" Type="uint16">{planes}</Pixels></Image></OME>'
    )


def _tiff_data(uuid: str, name: str, page: int, time: int, channel: int = 0) -> str:
    return (
        f'<TiffData IFD="{page}" FirstT="{time}" FirstC="{channel}" PlaneCount="1">'
        f'<UUID FileName="{name}">{uuid}</UUID></TiffData>'
    )


def _write_described(path: Path, frames: np.ndarray, xml: str | bytes | None) -> None:
    _write(path, frames, description=xml, metadata=None, ome=False)


def _write_two_files(folder: Path, frames: np.ndarray, last: str | None = None) -> None:
    """As Micro-Manager does: the first describes both, the second refers to the first."""
    names = ("m_MMStack.ome.tif", "m_MMStack_1.ome.tif")
    planes = "".join(
        _tiff_data(f"urn:{int(t >= 4)}", names[int(t >= 4)], t % 4, t) for t in range(7)
    )
    _write_described(folder / names[0], frames[:4], _ome_xml("urn:0", planes, 7))
    refers = f'<OME UUID="urn:1"><BinaryOnly MetadataFile="{names[0]}" UUID="urn:0"/></OME>'
    _write_described(folder / names[1], frames[4:], refers if last is None else last)


def test_an_ome_tiff_of_two_files_is_one_movie_whichever_is_opened(frames, tmp_path):
    _write_two_files(tmp_path, frames)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(_read(path)[:, 0], frames)
    np.testing.assert_array_equal(_read(tmp_path)[:, 0], frames)
    with open_movie(tmp_path) as movie:
        assert sorted(movie.paths) == sorted(tmp_path.iterdir())
        before = movie.state()
        os.utime(tmp_path / "m_MMStack_1.ome.tif", (1, 1))
        assert movie.state() != before


@pytest.mark.parametrize("lengths", [(7,), (3, 4)])
def test_of_several_positions_each_is_read_from_its_own_files(lengths, frames, tmp_path):
    images, parts = "", np.split(frames, np.cumsum(lengths)[:-1])
    for position in range(2):
        planes = "".join(
            _tiff_data(
                f"urn:{position}{part}", f"p{position}_{part}.ome.tif", t, t + 3 * part
            )
            for part, length in enumerate(lengths)
            for t in range(length)
        )
        xml = _ome_xml("urn:00", planes, 7)
        images += xml[xml.index("<Image") : xml.index("</OME>")]
    whole = f'<OME UUID="urn:00">{images}</OME>'
    refers = '<OME><BinaryOnly MetadataFile="p0_0.ome.tif" UUID="urn:00"/></OME>'
    for position in range(2):
        for part, pages in enumerate(parts):
            path = tmp_path / f"p{position}_{part}.ome.tif"
            xml = refers if position or part else whole
            _write_described(path, pages + position, xml)
    for position in range(2):
        for part in range(len(parts)):
            read = _read(tmp_path / f"p{position}_{part}.ome.tif")
            np.testing.assert_array_equal(read[:, 0], frames + position)


def test_ome_xml_in_a_companion_file_is_read(frames, tmp_path):
    names = ("a.ome.tif", "b.ome.tif")
    refers = '<OME><BinaryOnly MetadataFile="m.companion.ome" UUID="urn:m"/></OME>'
    planes = "".join(_tiff_data(f"urn:{t % 2}", names[t % 2], t // 2, t) for t in range(6))
    (tmp_path / "m.companion.ome").write_text(_ome_xml("urn:m", planes, 6), "utf-8")
    for index, name in enumerate(names):
        _write_described(tmp_path / name, frames[index:6:2], refers)
    for name in names:
        np.testing.assert_array_equal(_read(tmp_path / name)[:, 0], frames[:6])


def test_a_part_of_a_movie_is_never_taken_for_the_whole(frames, tmp_path):
    _write_two_files(tmp_path, frames)
    first, second = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    renamed = first.rename(tmp_path / "first.ome.tif")
    with pytest.raises(MovieError, match=r"MMStack\.ome\.tif describes.*one folder"):
        open_movie(second)
    # It is known by its UUID.
    np.testing.assert_array_equal(_read(renamed)[:, 0], frames)
    _write_described(second, frames[4:6], None)
    with pytest.raises(MovieError, match=r"lacks 1 pages, from frame 6 on.*one folder"):
        open_movie(renamed)
    other = tmp_path / "other.ome.tif"
    _write_described(other, frames, '<OME><BinaryOnly MetadataFile="first.ome.tif"/></OME>')
    with pytest.raises(MovieError, match=r"other\.ome\.tif: is not described by"):
        open_movie(other)
    second.unlink()
    with pytest.raises(MovieError, match=r"lacks 3 pages, from frame 4 on.*one folder"):
        open_movie(renamed)


def _write_three_files(folder: Path, frames: np.ndarray, acquisition: int) -> list[Path]:
    paths = [folder / f"a_{part}.ome.tif" for part in range(3)]
    uuids = [f"urn:uuid:{acquisition}{part}" for part in range(3)]
    planes = "".join(
        _tiff_data(uuids[t % 3], paths[t % 3].name, t // 3, t) for t in range(6)
    )
    for part, path in enumerate(paths):
        xml = f'<BinaryOnly MetadataFile="{paths[0].name}" UUID="{uuids[0]}"/>'
        xml = f'<OME UUID="{uuids[part].upper()}">{xml}</OME>'
        xml = xml if part else _ome_xml(uuids[0], planes, 6)
        _write_described(path, frames[part:6:3], xml)
    return paths


def test_files_of_another_ome_tiff_are_refused(frames, tmp_path):
    (tmp_path / "other").mkdir()
    others = _write_three_files(tmp_path / "other", frames[::-1], 2)
    ome = _ome_xml("urn:uuid:21", "<TiffData/>", 2)
    foreign = {text: (frames[:2], text) for text in (None, "a text", "<OME></OME>", ome)}
    for content in (others[1], *foreign.values()):
        paths = _write_three_files(tmp_path, frames, 1)
        np.testing.assert_array_equal(_read(paths[1])[:, 0], frames[:6])
        if isinstance(content, Path):
            paths[1].write_bytes(content.read_bytes())
        else:
            _write_described(paths[1], *content)
        for source in (paths[0], paths[2], tmp_path):
            with pytest.raises(
                MovieError,
                match=r"a_1\.ome\.tif: is another file than urn:uuid:11, which a_0",
            ):
                open_movie(source)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (0, 1)])
def test_files_of_an_ome_tiff_that_have_each_others_names_are_refused(
    one, other, frames, tmp_path
):
    paths = _write_three_files(tmp_path, frames, 1)
    aside = paths[one].rename(tmp_path / "aside")
    paths[other].rename(paths[one])
    aside.rename(paths[other])
    for path in paths:
        with pytest.raises(MovieError, match=r"is another file than|describes no image"):
            open_movie(path)


def test_ome_xml_that_gives_no_uuid_to_its_own_file_is_read(frames, tmp_path):
    paths = [tmp_path / f"a_{part}.ome.tif" for part in range(2)]
    planes = "".join(
        _tiff_data(f"urn:{t % 2}", paths[t % 2].name, t // 2, t) for t in range(6)
    )
    xml = _ome_xml("", planes, 6).replace(' UUID=""', "")
    for part, path in enumerate(paths):
        _write_described(path, frames[part:6:2], xml)
    for path in paths:
        np.testing.assert_array_equal(_read(path)[:, 0], frames[:6])
    # A file alone may have another UUID than it gives itself.
    planes = "".join(_tiff_data("urn:1", paths[0].name, t, t) for t in range(7))
    _write_described(paths[0], frames, _ome_xml("urn:2", planes, 7))
    np.testing.assert_array_equal(_read(paths[0])[:, 0], frames)


def test_an_aborted_acquisition_is_read_as_the_pages_it_has(frames, tmp_path):
    path = tmp_path / "renamed.ome.tif"
    planes = "".join(_tiff_data("urn:0", "was.ome.tif", t, t) for t in range(100))
    for said in (planes, "<TiffData/>"):
        _write_described(path, frames, _ome_xml("urn:0", said, 100))
        np.testing.assert_array_equal(_read(path)[:, 0], frames)
    # The last of 7 pages is a frame that lacks its second channel.
    _write_described(path, frames, _ome_xml("urn:0", "<TiffData/>", 100, channels=2))
    np.testing.assert_array_equal(_read(path), frames[:6].reshape(3, 2, 12, 10))


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ('<TiffData IFD="0" PlaneCount="5"/>', "describes 5 of its 7 pages"),
        ('<TiffData FirstT="1"/>', "lacks 93 pages, from frame 0"),
        ('<TiffData PlaneCount="3"/><TiffData IFD="3" FirstT="9" PlaneCount="4"/>', "from"),
        ('<TiffData IFD="-1"/>', "describes"),
        ('<TiffData IFD="many"/>', "many"),
        ('<TiffData PlaneCount="1099511627776" FirstT="-9"/>', "broken"),
        ("<TiffData>", "broken"),
        ("", "is not described"),
        ('</Pixels><Pixels SizeC="1" SizeZ="1" SizeT="3">', "broken"),
    ],
)
def test_ome_xml_that_does_not_fit_the_pages_is_refused(planes, message, frames, tmp_path):
    path = tmp_path / "movie.ome.tif"
    _write_described(path, frames, _ome_xml("urn:0", planes, 100))
    with pytest.raises(MovieError, match=message) as caught:
        open_movie(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["movie.ome.tif", "movie.OME.TIFF", "movie.tif"])
def test_ome_xml_that_is_damaged_is_refused(name, frames, tmp_path):
    path = tmp_path / name
    xml = _ome_xml("urn:0", "<TiffData/>", 3, channels=2)
    _write_described(path, frames[:6], xml + " " * 20)
    np.testing.assert_array_equal(_read(path), frames[:6].reshape(3, 2, 12, 10))
    damages = [xml.replace("</OME>", ""), xml[:200], xml[:-1], xml.replace("<Pixels", "")]
    damages += [xml.replace("</OME>", "\0" * 6), xml.replace("<OME", "<"), xml[60:]]
    damages += [xml[:50]] * ("ome" in name.lower())
    # 0x81 is no character of the usual encodings.
    for damaged in (*damages, xml.replace("<Pixels", "<Pix\x81ls").encode("latin1")):
        _write_described(path, frames[:6], damaged)
        with pytest.raises(MovieError, match="its OME-XML is broken"):
            open_movie(path)


def test_a_plain_tiff_may_have_the_name_of_an_ome_tiff(frames, tmp_path):
    path = tmp_path / "movie.ome.tif"
    for text in (None, "a text", "ImageJ=1.53t\nimages=7\nframes=7\n"):
        _write_described(path, frames, text)
        np.testing.assert_array_equal(_read(path)[:, 0], frames)
    text = '<?xml version="1.0"?><MetaData><prop id="a" type="int"/></MetaData>'
    _write_described(path.with_name("other.tif"), frames, text)
    np.testing.assert_array_equal(_read(path.with_name("other.tif"))[:, 0], frames)


def test_names_in_ome_xml_lead_to_no_other_folder(frames, tmp_path):
    (tmp_path / "in").mkdir()
    _write_described(tmp_path / "other.tif", frames, None)
    path = tmp_path / "in" / "movie.ome.tif"
    planes = '<TiffData IFD="0"/>' + _tiff_data("urn:1", "../other.tif", 0, 1)
    _write_described(path, frames[:1], _ome_xml("urn:0", planes, 2))
    with pytest.raises(MovieError, match="lacks 1 pages"):
        open_movie(path)


# ---- What cannot be read ----


def test_colour_is_refused(tmp_path):
    path = tmp_path / "movie.tif"
    tifffile.imwrite(path, np.zeros((2, 12, 10, 3), np.uint8), photometric="rgb")
    with pytest.raises(MovieError, match=r"3 samples a pixel \(colour\)"):
        open_movie(path)


@pytest.mark.parametrize(
    "said",
    [
        "ImageJ=1.11a\nimages=1099511627776\n",
        json.dumps({"shape": [2**40, 12, 10], "axes": "TYX"}),
        json.dumps({"shape": [2, 4, 12, 10], "axes": "CTYX"}),
    ],
)
def test_axes_that_do_not_fit_the_pages_are_refused(said, frames, tmp_path):
    path = tmp_path / "movie.tif"
    for count in (1, 7):
        _write_described(path, frames[:count], said)
        with pytest.raises(
            MovieError, match=r"truncated: it says (1099511627776|8) frames"
        ):
            open_movie(path)


def test_a_stack_of_two_channels_that_was_cut_short_is_warned_of(tmp_path):
    path, frames = tmp_path / "movie.tif", np.zeros((10, 4, 5), np.uint16)
    said = "ImageJ=1.53t\nimages=12\nframes=6\nchannels=2\n"
    _write_described(path, frames, said)
    with pytest.warns(UserWarning, match="says 6 T x 1 Z x 2 C, but has 10 pages"):
        assert _read(path).shape == (5, 2, 4, 5)
    _write_described(path, frames[:9], said)
    with pytest.raises(MovieError, match=r"says 12 frames \(6 T x 1 Z x 2 C\), but has 9"):
        open_movie(path)


def test_a_page_of_another_size_or_type_is_named(frames, tmp_path):
    path = tmp_path / "movie.tif"
    for other in (frames[0, :5], frames[0].astype(np.int16), frames[0].astype(np.uint8)):
        with tifffile.TiffWriter(path) as writer:
            for frame in (*frames[:4], other, *frames[5:]):
                writer.write(frame, photometric="minisblack", metadata=None)
        with pytest.raises(MovieError, match=r"page 4 is .* not \(12, 10\) px of uint16"):
            open_movie(path)


@pytest.mark.parametrize("tag", [(254, 4, 1, 1, True), (255, 3, 1, 2, True)])
def test_reduced_images_are_no_frames(tag, frames, tmp_path):
    path = tmp_path / "movie.tif"
    with tifffile.TiffWriter(path) as writer:
        for number, frame in enumerate(frames):
            tags = [tag] * (number == 5)
            options = {"extratags": tags, "metadata": None}
            writer.write(frame, photometric="minisblack", **options)
    with pytest.raises(MovieError, match="page 5 is a reduced image of another; save"):
        open_movie(path)
    # Where all pages say so, none is another one's.
    _write(path, frames, extratags=[tag], metadata=None)
    np.testing.assert_array_equal(_read(path)[:, 0], frames)


def test_a_corrupt_page_is_named(frames, tmp_path):
    path = tmp_path / "movie.tif"
    _write(path, frames, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[4].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    with open_movie(path) as movie:
        np.testing.assert_array_equal(movie.read(0, 4), frames[:4])
        with pytest.raises(MovieError, match="frame 4 of 7 cannot be read"):
            movie.read(2, 7)


def test_pixels_behind_the_end_are_named_when_the_movie_is_opened(frames, tmp_path):
    path = tmp_path / "movie.tif"
    for way in ("page by page", "strips"):
        WRITERS[way][0](path, frames)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = _page(tiff, 5).tags["StripOffsets"]
            tag.overwrite([offset + 10**6 for offset in tag.value])
        with pytest.raises(MovieError, match="page 5 is truncated"):
            open_movie(path)


def test_a_chain_of_pages_that_comes_back_is_refused(frames, tmp_path):
    path = tmp_path / "movie.tif"
    _write_page_by_page(path, frames)
    with tifffile.TiffFile(path) as tiff:
        offsets = [page.offset for page in tiff.pages]
    for back in range(7):
        content = bytearray(path.read_bytes())
        tags = int.from_bytes(content[offsets[6] : offsets[6] + 2], "little")
        at = offsets[6] + 2 + 12 * tags
        content[at : at + 4] = offsets[back].to_bytes(4, "little")
        path.write_bytes(content)
        with pytest.raises(MovieError, match="its pages repeat"):
            open_movie(path)


def _read_or_error(path: Path) -> np.ndarray | str:
    try:
        return _read(path)
    except MovieError as error:
        return str(error)


def _is_clear(result: np.ndarray | str, path: Path) -> bool:
    return isinstance(result, str) and result.startswith(f"{path}: ") and "\n" not in result


@pytest.mark.parametrize(
    "way",
    ["pages", "page by page", "strips", "deflated", "ImageJ", "ImageJ, one page", "OME"],
)
def test_a_file_cut_anywhere_is_never_read_as_a_whole_movie(way, frames, tmp_path):
    whole, cut = tmp_path / "whole.tif", tmp_path / "cut.tif"
    WRITERS[way][0](whole, frames)
    content = whole.read_bytes()
    # Every length would take long; a prime step meets every kind of place.
    for length in range(1, len(content), 101):
        cut.write_bytes(content[:length])
        result = _read_or_error(cut)
        if not _is_clear(result, cut):
            # Only what lies behind the last page and pixel can be missed.
            np.testing.assert_array_equal(result, frames[:, None])


@pytest.mark.parametrize("way", ["page by page", "strips", "deflated", "ImageJ", "OME"])
def test_random_damage_gives_frames_or_one_clear_error(way, frames, tmp_path):
    random = np.random.default_rng(1)
    path = tmp_path / "movie.tif"
    WRITERS[way][0](path, frames)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for turn in range(60):
        damaged = content.copy()
        reach = 600 if turn % 2 else content.size
        damaged[random.integers(0, reach, 4)] = random.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        result = _read_or_error(path)
        assert _is_clear(result, path) or np.ndim(result) == 4


LIES = ("ImageWidth", "StripByteCounts", "StripOffsets", "BitsPerSample", "SamplesPerPixel")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_take_no_memory(name, compression, frames, tmp_path):
    path = tmp_path / "movie.tif"
    _write(path, frames, metadata=None, compression=compression)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength") if "Image" in name else (name,):
            lie = 2**20 if "Image" in tag else 60000 if "Sample" in tag else 2**31
            _page(tiff, 0).tags[tag].overwrite(lie)
    tracemalloc.start()
    result = _read_or_error(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert _is_clear(result, path) or name == "StripByteCounts"
    # The pages have 2 kB. tifffile allocates a megabyte for its own tables when it is first
    # used, and a page of 2^40 pixels would have a terabyte.
    assert peak_bytes < 20e6


@pytest.mark.parametrize("way", ["page by page", "deflated"])
def test_many_threads_read_one_movie(way, tmp_path):
    frames = np.arange(40 * 12 * 10).reshape(40, 12, 10).astype(np.uint16)
    path = tmp_path / "movie.tif"
    WRITERS[way][0](path, frames)
    starts = np.random.default_rng(0).integers(0, 35, 40).tolist()
    with open_movie(path) as movie, ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: movie.read(start, start + 5), starts)
        for start, part in zip(starts, parts, strict=True):
            np.testing.assert_array_equal(part, frames[start : start + 5])


# ---- Writing ----


def _layout(channels: int = 1, dtype: str = "f4", **options) -> Layout:
    return Layout((7, channels, 12, 10), np.dtype(dtype), 3, **options)


CALIBRATED = {"pixel_size_um": (0.12, 0.1), "frame_interval_s": 0.05}


def _stack(layout: Layout) -> np.ndarray:
    return np.arange(np.prod(layout.shape)).reshape(layout.shape).astype(layout.dtype)


def _fill(sink: TiffSink, starts: tuple[int, ...] = (6, 0, 3)) -> None:
    frames = _stack(sink.layout)
    for start in starts:
        sink.write(start, frames[start : start + 3])


def _write_movie(path: Path, layout: Layout, **options) -> None:
    sink = TiffSink(path, layout, **options)
    sink.begin()
    _fill(sink)
    assert not path.exists() or options
    sink.commit()


@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.ome.tif", "big.tif", "big.ome.tif"])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "f4"), (2, "u2")])
def test_a_committed_movie_is_read_by_others(name, channels, dtype, tmp_path, monkeypatch):
    if name.startswith("big"):
        monkeypatch.setattr(_tiff, "_CLASSIC_TIFF_MAX_BYTES", 1000)
    path = tmp_path / name
    layout = _layout(channels, dtype, **CALIBRATED)
    _write_movie(path, layout)
    assert list(tmp_path.iterdir()) == [path]
    expected = _stack(layout) if channels > 1 else _stack(layout)[:, 0]
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff == name.startswith("big")
        assert tiff.is_ome == (".ome." in name)
        assert tiff.series[0].axes == ("TCYX" if channels > 1 else "TYX")
        np.testing.assert_array_equal(tiff.asarray(), expected)
        page = _page(tiff, 0)
        assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
        assert page.get_resolution("micrometer") == pytest.approx((10, 1 / 0.12))
    others = dask_image.imread.imread(str(path))
    np.testing.assert_array_equal(others.compute().reshape(expected.shape), expected)
    np.testing.assert_array_equal(_read(path), _stack(layout))
    with open_movie(path) as movie:
        assert movie.dtype == layout.dtype
        assert movie.pixel_size_um == (0.12, 0.1)
        assert movie.frame_interval_s == 0.05


@pytest.mark.parametrize(
    "shape", [(1, 1, 5, 4), (1, 3, 5, 4), (4, 1, 5, 3), (2, 2, 3, 4), (3, 4, 1, 7)]
)
@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.ome.tif"])
def test_movies_of_odd_shapes_are_read_as_they_were_written(shape, name, tmp_path):
    layout = Layout(shape, np.dtype("f8" if shape[0] == 3 else "f4"), 3)
    path = tmp_path / name
    _write_movie(path, layout)
    np.testing.assert_array_equal(_read(path), _stack(layout))


@pytest.mark.parametrize("shape", [(4, 1, 5, 1), (3, 2, 5, 1), (1, 2, 5, 1), (4, 1, 1, 1)])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.ome.tif", "big.tif"])
def test_frames_one_pixel_wide_are_read_as_they_were_written(
    name, dtype, shape, tmp_path, monkeypatch
):
    if name == "big.tif":
        monkeypatch.setattr(_tiff, "_CLASSIC_TIFF_MAX_BYTES", 100)
    path, layout = tmp_path / name, Layout(shape, np.dtype(dtype), 3, **CALIBRATED)
    _write_movie(path, layout)
    expected = _stack(layout)
    np.testing.assert_array_equal(_read(path), expected)
    with open_movie(path) as movie:
        assert movie.pixel_size_um == (0.12, 0.1)
    with tifffile.TiffFile(path) as tiff:
        pages = np.stack([page.asarray() for page in tiff.pages])
    np.testing.assert_array_equal(pages, expected.reshape(-1, *shape[2:]))


@pytest.mark.parametrize("name", ["bkgd.tif", "bkgd.ome.tif"])
def test_a_resumed_movie_is_identical_to_an_uninterrupted_one(name, tmp_path):
    layout = _layout(2, **CALIBRATED)
    (tmp_path / "a").mkdir()
    _write_movie(tmp_path / "a" / name, layout)
    interrupted = TiffSink(tmp_path / name, layout)
    interrupted.begin()
    _fill(interrupted, (3,))
    interrupted.close()
    resumed = TiffSink(tmp_path / name, layout)
    resumed.resume()
    _fill(resumed, (0, 6))
    resumed.commit()
    assert (tmp_path / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_draft_of_another_movie_is_not_resumed(tmp_path):
    path = tmp_path / "bkgd.tif"
    sink = TiffSink(path, _layout())
    sink.begin()
    sink.close()
    for other in (_layout(2), _layout(dtype="u2")):
        with (
            contextlib.closing(TiffSink(path, other)) as wrong,
            pytest.raises(MovieError, match="not the beginning of this movie"),
        ):
            wrong.resume()
    sink.draft.write_bytes(sink.draft.read_bytes()[:-1000])
    with (
        contextlib.closing(TiffSink(path, _layout())) as cut,
        pytest.raises(MovieError, match="truncated"),
    ):
        cut.resume()


@pytest.mark.skipif(not hasattr(os.stat_result, "st_blocks"), reason="no sparse files")
def test_a_long_movie_takes_no_room_when_it_is_begun(tmp_path):
    layout = Layout((5_000, 1, 64, 64), np.dtype("f4"), 64)
    sink = TiffSink(tmp_path / "bkgd.tif", layout)
    sink.begin()
    # The directories alone, of some 180 bytes a page.
    assert sink.draft.stat().st_blocks * 512 < 250 * 5_000
    sink.discard()
    assert list(tmp_path.iterdir()) == []

"""Movies in many TIFF files: their order, channels and positions, and NDTiff's index."""

import itertools
import json
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile

from jaxbkgd import MovieError, open_movie


def _read(source: Path) -> np.ndarray:
    """All of a movie, (frames, channels, height, width)."""
    with open_movie(source) as movie:
        return np.asarray(movie)


def _write(path: Path, frames: np.ndarray, **options) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack", **options)


def _write_numbered(folder: Path, names: list[str]) -> None:
    """A frame in each file, whose pixels are the number of the name."""
    for number, name in enumerate(names):
        _write(folder / name, np.full((3, 4), number, np.uint16))


def _numbers(source: Path) -> list[list[int]]:
    return _read(source)[:, :, 0, 0].tolist()


# ---- Order ----


@pytest.mark.parametrize(
    "names",
    [
        ("movie.tif", "movie-1.tif", "movie-2.tif", "movie-10.tif"),
        ("movie.tif", "movie (2).tif", "movie (10).tif"),
        ("movie.tif", "movie [2].tif", "movie [3].tif"),
        ("movie.tif", "movie_X2.tif", "movie_X3.tif"),
        ("m.tif", "m@0001.tif", "m@0002.tif"),
        ("movie.tif", "movie_001.tif", "movie_002.tif"),
        ("movie.tif", "movie_part2.tif", "movie_part3.tif"),
        ("movie.tif", "movie-file002.tif", "movie-file003.tif"),
        ("movie_1.tif", "movie_1_X2.tif", "movie_1_X3.tif"),
        ("img_0.tif", "img_1.tif", "img_2.TIF", "img_3.tiff", "img_10.tif", "img_11.tif"),
        ("Image9.tif", "Image10.tif", "image11.tif"),
        ("a_0_1200.tif", "a_1_1310.tif", "a_2_1400.tif"),
        ("2024-05-03_1.tif", "2024-05-03_2.tif"),
        ("m_1of3.tif", "m_2of3.tif", "m_3of3.tif"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*may be missing")
def test_files_follow_their_numbers_and_one_without_number_is_the_first(names, tmp_path):
    _write_numbered(tmp_path, list(names))
    for source in (tmp_path, tmp_path / "*.[Tt][Ii][Ff]*"):
        assert _numbers(source) == [[number] for number in range(len(names))]


def test_files_of_several_frames_are_read_with_any_compression_and_byte_order(tmp_path):
    frames = np.arange(24 * 3 * 4).reshape(24, 3, 4).astype(np.uint16)
    for index in range(12):
        options = {2: {"byteorder": ">"}, 3: {"compression": "zlib"}, 4: {"truncate": True}}
        part = frames[2 * index : 2 * index + 2]
        _write(tmp_path / f"img_t{index}.tif", part, **options.get(index, {}))
    (tmp_path / "notes.txt").write_text("no movie")
    (tmp_path / "._img_t0.tif").write_text("macOS writes these")
    for source in (tmp_path, tmp_path / "img_t*.tif"):
        with open_movie(source) as movie:
            assert movie.shape == (24, 1, 3, 4)
            np.testing.assert_array_equal(movie.read(0, 24), frames)
            np.testing.assert_array_equal(movie.read(3, 9), frames[3:9])


def test_a_number_that_is_left_out_is_warned_of(tmp_path):
    _write_numbered(tmp_path, [f"img_{number}.tif" for number in (0, 1, 2, 4, 5)])
    with pytest.warns(UserWarning, match=r"img_4\.tif follows img_2\.tif; .* missing"):
        assert len(_numbers(tmp_path)) == 5


def test_a_folder_may_have_the_signs_of_a_pattern_in_its_name(tmp_path):
    folder = tmp_path / "2024-05-03 [cell 2] *"
    folder.mkdir()
    _write_numbered(folder, [f"img [a]_{number}.tif" for number in range(3)])
    for source in (folder, folder / "img*.tif", folder / "img [[]a]_?.tif"):
        assert _numbers(source) == [[0], [1], [2]]
    assert _numbers(folder / "img [a]_*.tif") == [[0], [1], [2]]
    assert _numbers(folder / "img [a]_1.tif") == [[1]]


def test_what_holds_no_movie_is_refused_with_the_folders_that_do(tmp_path):
    (tmp_path / "Pos0").mkdir()
    _write_numbered(tmp_path / "Pos0", ["img_0.tif"])
    with pytest.raises(MovieError, match=r"holds no TIFF file .*folders \(Pos0\)"):
        open_movie(tmp_path)
    with pytest.raises(MovieError, match="holds no TIFF file"):
        open_movie(tmp_path / "Pos0" / "movie_*.tif")
    with pytest.raises(MovieError, match="No such file or directory"):
        open_movie(tmp_path / "Pos*" / "*.tif")


# ---- Channels and positions ----


def _grid(pattern: str, *values: Sequence) -> list[str]:
    return [pattern.format(*each) for each in itertools.product(*values)]


MICROMANAGER = "img_channel{:03d}_position{:03d}_time{:09d}_z{:03d}.tif"


@pytest.mark.parametrize(
    ("names", "message", "pattern"),
    [
        (_grid(MICROMANAGER, [0], [0, 1], [0, 1], [0]), "2 positions", MICROMANAGER),
        (_grid("x_s{}_t{}.tif", [1, 2], [1, 2]), "2 positions", "x_s1_t*.tif"),
        (_grid("XY{:02d}_t{}.tif", [1, 2], [1, 2]), "2 positions", "XY01_t*.tif"),
        (_grid("img_{}_{:02d}.tif", [0, 1], range(3)), "one number", "img_0_*.tif"),
        (_grid("t{}_{}.tif", range(3), [488, 561]), "one number", "t*_488.tif"),
        (_grid("c{}_t{}.tif", [0, 1], range(3)), "2 channels", "c0_t*.tif"),
        (_grid("t{}_{}.tif", range(2), ["DAPI", "GFP"]), "differ in a word", "t*_DAPI.tif"),
        (_grid("img_{}_{}.tif", ["Cy3", "Cy5"], range(2)), "2 channels", "img_Cy3_*.tif"),
        (_grid("x_w{}_t{}.TIF", ["1DAPI", "2GFP"], [1, 2]), "2 chan", "x_w1DAPI_t*.TIF"),
        (["C1-movie.tif", "C2-movie.tif"], "2 channels", "C1-movie.tif"),
        (_grid("z{}_t{}.tif", [0, 1], range(3)), "one number", "z0_t*.tif"),
        (["cell_p1.tif", "cell_p2.tif"], "2 positions", "cell_p1.tif"),
        (["dark.tif", "m_1.tif", "m_2.tif"], "different kinds", "m_*.tif"),
        (["m_DAPI.tif", "m_GFP.tif"], "differ in a word", "m_DAPI.tif"),
        (["movie.tif", "movie copy.tif"], "differ in a word", "movie copy.tif"),
        (["a_MMStack_Pos0.tif", "a_MMStack_Pos1.tif"], "2 positions", "a_MMStack_Pos0.tif"),
        (["1-Pos_000_000.tif", "1-Pos_001_000.tif"], "2 positions", "1-Pos_000_000.tif"),
        (["1-Pos_000_000.tif", "1-Pos_000_001.tif"], "2 positions", "1-Pos_000_000.tif"),
        (["img_1.tif", "img_01.tif", "img_2.tif"], "two files of one number", "img_01.tif"),
    ],
)
def test_other_differences_are_refused_with_a_pattern_that_will_do(
    names, message, pattern, tmp_path
):
    _write_numbered(tmp_path, names)
    with pytest.raises(MovieError, match=message) as caught:
        open_movie(tmp_path)
    if pattern == MICROMANAGER:
        pattern = "img_channel000_position000_time*_z000.tif"
    text = str(caught.value)
    assert text.endswith(f" as {pattern}")
    assert text.startswith(f"{tmp_path}: ")
    assert len(_numbers(tmp_path / pattern)) >= 1


@pytest.mark.parametrize(
    "name", ["acq_MMStack_Pos{}.ome.tif", "acq_MMStack_cell{}.ome.tif"]
)
def test_ome_tiffs_that_describe_themselves_are_refused_or_warned_of(name, tmp_path):
    for index in range(2):
        frames = np.full((3, 4, 5), index, np.uint16)
        _write(tmp_path / name.format(index), frames, metadata={"axes": "TYX"})
    if "Pos" in name:
        with pytest.raises(MovieError, match="2 positions"):
            open_movie(tmp_path)
        assert _numbers(tmp_path / name.format(1)) == [[1]] * 3
    else:
        with pytest.warns(UserWarning, match="if they are several, open each alone"):
            assert _numbers(tmp_path) == [[0]] * 3 + [[1]] * 3


def test_positions_of_one_ome_xml_in_a_folder_are_refused(tmp_path):
    names = [f"acq_MMStack_Pos{position}.ome.tif" for position in range(2)]
    planes = "".join(
        '<Image><Pixels DimensionOrder="XYCZT" SizeX="5" SizeY="4" '
        'SizeC="1" SizeZ="1" SizeT="2"><TiffData '
        f'PlaneCount="2"><UUID FileName="{name}">urn:{i}</UUID></TiffData></Pixels></Image>'
        for i, name in enumerate(names)
    )
    for position, name in enumerate(names):
        xml = f'<OME UUID="urn:{position}">{planes}</OME>'
        frames = np.full((2, 4, 5), position, np.uint16)
        _write(tmp_path / name, frames, description=xml, metadata=None)
    with pytest.raises(MovieError, match="2 positions"):
        open_movie(tmp_path)
    assert _numbers(tmp_path / names[1]) == [[1], [1]]


# ---- Parts that say how long the whole is ----


@pytest.mark.parametrize("truncate", [False, True])
def test_parts_may_say_how_many_frames_all_have_together(truncate, tmp_path):
    frames = np.arange(12 * 3 * 4).reshape(12, 3, 4).astype(np.uint16)
    text = "ImageJ=1.53t\nimages=12\nframes=12\n"
    for index, part in enumerate((frames[:7], frames[7:])):
        path = tmp_path / f"m_{index}.tif"
        if truncate:
            # All frames of a file are behind its one page.
            _write(path, part[:1], description=text, metadata=None)
            with tifffile.TiffFile(path, mode="r+") as tiff:
                tiff.pages.first.tags["StripOffsets"].overwrite(path.stat().st_size)
            with path.open("ab") as file:
                file.write(part.tobytes())
        else:
            _write(path, part, description=text, metadata=None)
    np.testing.assert_array_equal(_read(tmp_path)[:, 0], frames)
    with pytest.raises(MovieError, match=r"12 frames.* open its folder"):
        open_movie(tmp_path / "m_0.tif")
    _write(tmp_path / "m_1.tif", frames[7:11], description=text, metadata=None)
    with pytest.raises(MovieError, match=r"truncated: it says 12 frames.* have 11; copy"):
        open_movie(tmp_path)


# ---- Files that do not fit, and what the series is ----


def test_a_series_keeps_no_file_open(tmp_path):
    _write_numbered(tmp_path, [f"img_{index}.tif" for index in range(20)])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with open_movie(tmp_path) as movie:
        np.testing.assert_array_equal(movie.read(0, 20)[:, 0, 0], np.arange(20))
        if before:
            assert len(os.listdir("/proc/self/fd")) == before
        (tmp_path / "img_7.tif").unlink()
        with pytest.raises(
            MovieError, match=r"img_7\.tif: frame 5 of 20 cannot be read \(No such"
        ):
            movie.read(5, 9)


def test_a_file_of_a_series_that_does_not_fit_is_named(tmp_path):
    frames = np.zeros((3, 12, 10), np.uint16)
    for index in range(3):
        _write(tmp_path / f"img_{index}.tif", frames[index])
    for other in (frames[0, :5], frames[0].astype(np.float32)):
        _write(tmp_path / "img_1.tif", other)
        with pytest.raises(MovieError, match=r"img_1\.tif: page 0 is .* not \(12, 10\) px"):
            open_movie(tmp_path)
    (tmp_path / "img_1.tif").write_text("no TIFF")
    with pytest.raises(MovieError, match=r"img_1\.tif: is not a TIFF file"):
        open_movie(tmp_path)
    _write(tmp_path / "img_1.tif", frames[1])
    _write(tmp_path / "img_0.tif", frames[:2], imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(MovieError, match="several channels"):
        open_movie(tmp_path)


def test_a_series_includes_what_would_be_written_among_its_files(tmp_path):
    _write_numbered(tmp_path, ["img_0.tif", "img_1.tif"])
    real = tmp_path.resolve()
    with open_movie(tmp_path) as movie:
        assert movie.includes(real / "bkgd.tif")
    with open_movie(tmp_path / "img_*.tif") as movie:
        assert movie.includes(real / "img_2.tif")
        assert not movie.includes(real / "bkgd.tif")


# ---- NDTiff ----


def _write_ndtiff(folder: Path, planes: list[dict], file_pages: int = 99) -> np.ndarray:
    """A data set with a page for each plane, in files of so many; gives the pages."""
    pages, index = np.arange(len(planes) * 12).reshape(-1, 3, 4).astype("<u2"), b""
    for start in range(0, len(planes), file_pages):
        path = folder / f"m_NDTiffStack{f'_{start // file_pages}' * (start > 0)}.tif"
        content = struct.pack("<2sHI5I2s2x", b"II", 42, 32, 483729, 3, 3, 2355492, 2, b"{}")
        stop = min(start + file_pages, len(planes))
        for number in range(start, stop):
            pixels = len(content) + 2 + 8 * 12 + 4
            tags = [(256, 4, 1, 4), (257, 4, 1, 3), (258, 3, 1, 16), (259, 3, 1, 1)]
            tags += [(262, 3, 1, 1), (273, 4, 1, pixels), (279, 4, 1, 24)]
            tags += [(51123, 2, 2, 28)]
            directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
            following = struct.pack("<I", (pixels + 24) * (number < stop - 1))
            content += struct.pack("<H", len(tags)) + directory + following
            content += pages[number].tobytes()
            for text in (json.dumps(planes[number]), path.name):
                index += struct.pack("<I", len(text)) + text.encode()
            index += struct.pack("<IiiiiIii", pixels, 4, 3, 1, 0, 0, 0, 0)
        path.write_bytes(content)
    (folder / "NDTiff.index").write_bytes(index)
    return pages


def _planes(**axes) -> list[dict]:
    return [
        dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())
    ]


@pytest.mark.parametrize("axes", [("time", "z", "channel"), ("channel", "time", "z")])
def test_ndtiff_is_read_by_its_index(axes, tmp_path):
    values = {"time": [3, 4, 5], "z": [-1, 0], "channel": ["GFP", "DAPI"]}
    planes = _planes(**{axis: values[axis] for axis in axes}, position=[2])
    folder = tmp_path / "Full resolution"
    folder.mkdir()
    pages = _write_ndtiff(folder, planes)
    expected = pages.reshape(6, 2, 3, 4)
    if axes[0] == "channel":
        expected = pages.reshape(2, 6, 3, 4).swapaxes(0, 1)
    for source in (tmp_path, folder, folder / "NDTiff.index"):
        np.testing.assert_array_equal(_read(source), expected)
    # An acquisition that was stopped lacks a channel of its last frame.
    if axes[-1] == "channel":
        pages = _write_ndtiff(folder, planes[:-1])
        np.testing.assert_array_equal(_read(folder), pages[:10].reshape(5, 2, 3, 4))


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        (_planes(time=[0, 1], position=[0, 1]), "2 images or positions.* of its own"),
        (_planes(time=[0, 1], row=[0, 1]), "2 images or positions"),
        (_planes(time=[0, 2, 3]), "lacks 1 pages, from frame 1"),
        (
            [{"time": t, "channel": c} for t, c in ((0, 0), (1, 0), (1, 1))],
            "lacks 1 pages, from frame 0",
        ),
    ],
)
def test_ndtiff_with_positions_or_missing_frames_is_refused(planes, message, tmp_path):
    _write_ndtiff(tmp_path, planes)
    with pytest.raises(MovieError, match=message):
        open_movie(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    _write_ndtiff(tmp_path, _planes(time=[0, 1]))
    path = tmp_path / "m_NDTiffStack.tif"
    path.rename(tmp_path / "other.tif")
    with pytest.raises(MovieError, match=r"names m_NDTiffStack\.tif, which is not beside"):
        open_movie(tmp_path)
    _write(path, np.zeros((2, 30, 4), np.uint16), metadata=None)
    with pytest.raises(MovieError, match="does not match TIFF shape"):
        open_movie(tmp_path)
    (tmp_path / "NDTiff.index").write_bytes(b"\0\0")
    with pytest.raises(MovieError, match="names no frame"):
        open_movie(tmp_path)


def test_ndtiff_without_its_index_is_refused(tmp_path):
    _write_ndtiff(tmp_path, _planes(time=[0, 1, 2], channel=[0, 1]))
    (tmp_path / "NDTiff.index").unlink()
    for source in (tmp_path, tmp_path / "m_NDTiffStack.tif", tmp_path / "*.tif"):
        with pytest.raises(MovieError, match=r"NDTiff without its NDTiff\.index.* copy"):
            open_movie(source)


@pytest.mark.parametrize("file_pages", [99, 2])
def test_an_index_that_was_cut_anywhere_is_refused(file_pages, tmp_path):
    pages = _write_ndtiff(tmp_path, _planes(time=[0, 1, 2], channel=[0, 1]), file_pages)
    index = tmp_path / "NDTiff.index"
    content = index.read_bytes()
    for source in (tmp_path, *tmp_path.glob("*.tif")):
        np.testing.assert_array_equal(_read(source), pages.reshape(3, 2, 3, 4))
    # Ends of entries, and places within them.
    for length in range(0, len(content), len(content) // 12):
        index.write_bytes(content[:length])
        for source in (tmp_path, *tmp_path.glob("*.tif")):
            with pytest.raises(MovieError, match=r"names no|pages|describe|does not name"):
                open_movie(source)


def test_a_file_that_the_index_does_not_name_is_no_part_of_its_movie(tmp_path):
    _write_ndtiff(tmp_path, _planes(time=[0, 1]))
    path = tmp_path / "m_NDTiffStack.tif"
    (tmp_path / "other.tif").write_bytes(path.read_bytes())
    assert _read(path).shape == (2, 1, 3, 4)
    with pytest.raises(MovieError, match=r"other\.tif: is not described by .*\.index"):
        open_movie(tmp_path / "other.tif")


def test_a_frame_of_ndtiff_that_was_written_again_is_read_as_it_was_last(tmp_path):
    pages = _write_ndtiff(tmp_path, [{"time": time} for time in (0, 1, 1, 2)])
    np.testing.assert_array_equal(_read(tmp_path)[:, 0], pages[[0, 2, 3]])
    _write_ndtiff(tmp_path, [{"time": 0}, {"time": 1}, {"z": 0}])
    with pytest.raises(MovieError, match="gives its pages different axes"):
        open_movie(tmp_path)


def test_real_ndtiff_of_two_channels_is_read():
    folder = Path(__file__).parents[2] / "shared" / "data" / "ndtiff_12bit"
    if not folder.is_dir():
        pytest.skip("needs the shared data")
    expected = tifffile.imread(next(folder.glob("*.tif")))
    for source in (folder, next(folder.glob("*.tif"))):
        with open_movie(source) as movie:
            assert (movie.shape, movie.format) == ((4, 2, 64, 64), "NDTiff")
            np.testing.assert_array_equal(np.asarray(movie), expected)


def test_real_ndtiff_with_a_lost_or_cut_index_is_refused(tmp_path):
    folder = Path(__file__).parents[2] / "shared" / "data" / "ndtiff_12bit"
    if not folder.is_dir():
        pytest.skip("needs the shared data")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (folder / "NDTiff.index").read_bytes()
    for length in (len(content) - 1, len(content) // 2):
        (tmp_path / "NDTiff.index").write_bytes(content[:length])
        with pytest.raises(MovieError, match=r"describes . pages, but its files hold 8"):
            open_movie(tmp_path)
    (tmp_path / "NDTiff.index").unlink()
    with pytest.raises(MovieError, match="without its NDTiff"):
        open_movie(tmp_path)


# ---- Movies that are no parts of one ----


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["img_488nm.tif", "img_561nm.tif"], "2 channels (nm)"),
        (["img_488 nm_1.tif", "img_561 nm_1.tif"], "2 channels (nm)"),
        (["x_laser488.tif", "x_laser561.tif"], "2 channels (laser)"),
        (["cam1.tif", "cam2.tif"], "2 channels (cam)"),
        (["a_Camera-1_t1.tif", "a_Camera-2_t1.tif"], "2 channels (camera)"),
        (["x_ex1_em1.tif", "x_ex1_em2.tif"], "2 channels (em)"),
        (["img_m1.tif", "img_m2.tif"], "2 positions (m)"),
        (["exp_A01_s1.tif", "exp_A02_s1.tif"], "2 positions (A01, A02)"),
        (["A01_s1.tif", "A02_s1.tif"], "2 positions (A01, A02)"),
        (["r01c01f01p01-ch1.tif", "r01c01f02p01-ch1.tif"], "2 positions (field)"),
        (["r01c01f01p01-ch1.tif", "r02c01f01p01-ch1.tif"], "2 positions (r)"),
        (["x_A01_T0001F001L01.tif", "x_A01_T0001F002L01.tif"], "2 positions (field)"),
        (["img.tif", "img_dark1.tif"], "different kinds"),
        (["img.tif", "img_cam2.tif"], "different kinds"),
    ],
)
def test_channels_positions_and_dark_frames_are_refused_by_their_names(
    names, message, tmp_path
):
    _write_numbered(tmp_path, names)
    with pytest.raises(MovieError, match=re.escape(message)):
        open_movie(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *["m_{}.tif", "r{}.tif", "A{:02}.tif", "cam_{:04}.tif", "x_f{:03}.tif"],
        *["cell_A01_{}.tif", "488nm_{}.tif", "Camera 1_{:05}.tif", "dark_{}.tif"],
        *["cam1_m3_t{}.tif", "farm{}.tif"],
    ],
)
def test_frames_of_one_channel_and_position_are_joined(name, tmp_path):
    _write_numbered(tmp_path, [name.format(number) for number in range(12)])
    assert _numbers(tmp_path) == [[number] for number in range(12)]


@pytest.mark.parametrize(
    "names",
    [
        *[("bkgd-1.tif", "bkgd-2.tif"), ("movie_488.tif", "movie_561.tif")],
        *[("cell1.tif", "cell2.tif"), ("1.tif", "2.tif"), ("m.tif", "m_bead1.tif")],
    ],
)
def test_movies_that_only_a_number_tells_apart_are_joined_with_a_warning(names, tmp_path):
    for number, name in enumerate(names):
        _write(tmp_path / name, np.full((3, 4, 5), number, np.uint16))
    message = rf": {', '.join(names)} are read one after .* open each alone, as {names[0]}$"
    with pytest.warns(UserWarning, match=message):
        assert _numbers(tmp_path) == [[0]] * 3 + [[1]] * 3
    assert _numbers(tmp_path / names[1]) == [[1]] * 3


@pytest.mark.parametrize(
    "names",
    [
        *[("m.tif", "m_1.tif", "m_2.tif"), ("m.tif", "m_X2.tif", "m_X3.tif")],
        *[("m_part1.tif", "m_part2.tif"), ("m_1of2.tif", "m_2of2.tif")],
        *[("m_t1.tif", "m_t2.tif"), ("m-file001_488nm.tif", "m-file002_488nm.tif")],
    ],
)
def test_parts_of_one_movie_are_joined_without_a_warning(names, tmp_path):
    for number, name in enumerate(names):
        _write(tmp_path / name, np.full((2, 4, 5), number, np.uint16))
    expected = [[number] for number in range(len(names)) for _ in range(2)]
    assert _numbers(tmp_path) == expected


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (["img_0000.tif", "img_0001.tif", "img_0003.tif"], "0003.tif follows img_0001"),
        (["i_0.tif", "i_2.tif", "i_6.tif", "i_10.tif"], "i_6.tif follows i_2.tif"),
        (["a_0_100.tif", "a_1_190.tif", "a_3_390.tif"], "a_3_390.tif follows a_1_190.tif"),
        (["m.tif", "m_1.tif", "m_3.tif"], "m_3.tif follows m_1.tif"),
        (["m.tif", "m_X3.tif"], "m_X3.tif follows m.tif"),
    ],
)
def test_a_gap_is_warned_of_however_few_files_there_are(names, gap, tmp_path):
    _write_numbered(tmp_path, names)
    with pytest.warns(UserWarning, match=f"{gap}.* may be missing"):
        assert _numbers(tmp_path) == [[number] for number in range(len(names))]

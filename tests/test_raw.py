"""DAX, Picasso and NumPy files are read as they were written, or refused in one line."""

import os
import re
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxbkgd._movies import raw as _raw
from jaxbkgd._movies.movie import Movie, MovieError


FRAMES = np.random.default_rng(0).integers(0, 65536, (7, 12, 10)).astype(np.uint16)

INF = {
    "binning": "1 x 1",
    "data type": "16 bit integers (binary, big endian)",
    "frame dimensions": "10 x 12",
    "number of frames": "7",
    "Lock Target": "0.0",
    "Frames Per Second": "20.0",
}

YAML = {
    "Byte Order": "'<'",
    "Camera": "Simulation",
    "Camera.Pixelsize": "160",
    "Data Type": "uint16",
    "Frames": "7",
    "Height": "12",
    "Structure.CX": "\n- 3.2e-17\n- -2.2e-14",
    "Width": "10",
}


def _write_dax(
    folder: Path, fields: dict[str, str] = INF, frames: np.ndarray = FRAMES
) -> Path:
    is_big = "big" in fields.get("data type", "")
    path = folder / "movie.dax"
    frames.astype(">u2" if is_big else "<u2").tofile(path)
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
    (folder / "movie.inf").write_text(f"information file for\nC:\\movie.dax\n{lines}")
    return path


def _write_picasso(folder: Path, fields: dict[str, str] = YAML) -> Path:
    path = folder / "movie.raw"
    pixels = FRAMES.astype(fields.get("Data Type", "uint16"))
    is_big = ">" in fields.get("Byte Order", "")
    (pixels.byteswap() if is_big else pixels).tofile(path)
    lines = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (folder / "movie.yaml").write_text(lines)
    return path


def _write_npy(folder: Path, frames: np.ndarray = FRAMES) -> Path:
    path = folder / "movie.npy"
    np.save(path, frames)
    return path


WRITERS_AND_READERS = [
    (_write_dax, _raw.open_dax),
    (_write_picasso, _raw.open_picasso),
    (_write_npy, _raw.open_npy),
]
every_format = pytest.mark.parametrize(("write", "read"), WRITERS_AND_READERS)


@every_format
def test_frames_are_read_as_they_were_written(write, read, tmp_path):
    with read(write(tmp_path)) as movie:
        assert movie.shape == (7, 1, 12, 10)
        assert movie.dtype == np.uint16
        assert movie.dtype.isnative
        for part in (slice(None), slice(0, 3), slice(3, 7), slice(6, 99), slice(5, 2)):
            np.testing.assert_array_equal(movie.channels[0][part], FRAMES[part])


@every_format
def test_threads_read_the_same_movie_at_once(write, read, tmp_path):
    with read(write(tmp_path)) as movie, ThreadPoolExecutor(4) as threads:
        parts = threads.map(lambda index: movie.read(index % 7, index % 7 + 1), range(70))
        np.testing.assert_array_equal(
            np.concatenate(list(parts)), np.tile(FRAMES, (10, 1, 1))
        )


def test_a_dax_may_be_little_endian_and_named_by_either_file(tmp_path):
    little = INF | {"data type": "16 bit integers (binary, little endian)"}
    path = _write_dax(tmp_path, little)
    for name in (path, path.with_suffix(".inf")):
        with _raw.open_dax(name) as movie:
            assert movie.name == str(path)
            assert movie.frame_interval_s == 0.05
            np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


def test_a_picasso_movie_may_be_named_by_either_file(tmp_path):
    path = _write_picasso(tmp_path)
    with _raw.open_picasso(path.with_suffix(".yaml")) as movie:
        assert movie.name == str(path)
        assert movie.pixel_size_um == (0.16, 0.16)


def test_suffixes_may_be_in_capitals(tmp_path):
    path = _write_dax(tmp_path)
    capitals = path.rename(tmp_path / "movie.DAX")
    (tmp_path / "movie.inf").rename(tmp_path / "movie.INF")
    with _raw.open_dax(capitals) as movie:
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("pixels", ["uint16", "int32", "float32", "float64", "u4"])
def test_picasso_pixels_of_every_type_and_order(pixels, order, tmp_path):
    path = _write_picasso(
        tmp_path, YAML | {"Data Type": pixels, "Byte Order": f"'{order}'"}
    )
    with _raw.open_picasso(path) as movie:
        assert movie.dtype == np.dtype(pixels)
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


def test_only_the_first_document_of_a_yaml_is_read(tmp_path):
    path = _write_picasso(tmp_path)
    with path.with_suffix(".yaml").open("a") as file:
        file.write("---\nBox Size: 7\nFrames: 99\n--- !!python/object/apply:os.abort []\n")
    with _raw.open_picasso(path) as movie:
        assert movie.shape[0] == 7


def test_nothing_in_a_yaml_is_constructed(tmp_path):
    made = tmp_path / "made"
    fields = {
        "ROI": "!!python/tuple [1, 2]",
        "Micro-Manager Metadata": f"!!python/object/apply:os.mkdir ['{made}']",
        "Frames": "7",
    }
    with _raw.open_picasso(_write_picasso(tmp_path, YAML | fields)) as movie:
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)
    assert not made.exists()


def test_a_yaml_is_read_the_same_without_libyaml(tmp_path, monkeypatch):
    monkeypatch.setattr("yaml.__with_libyaml__", False)
    with _raw.open_picasso(_write_picasso(tmp_path)) as movie:
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


def test_an_array_of_several_channels_is_read_by_channel(tmp_path):
    frames = np.arange(5 * 3 * 4 * 6, dtype=">f4").reshape(5, 3, 4, 6)
    with _raw.open_npy(_write_npy(tmp_path, frames)) as movie:
        assert movie.shape == frames.shape
        assert movie.dtype.isnative
        for index, channel in enumerate(movie.channels):
            np.testing.assert_array_equal(channel[:], frames[:, index])
            np.testing.assert_array_equal(channel[2:4], frames[2:4, index])
            assert channel[3:3].shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((12, 10)), "has 2 axes; save frames"),
        (np.asfortranarray(np.zeros((7, 12, 10))), "is in Fortran order"),
        (np.zeros((0, 12, 10)), "has no frames"),
        (np.zeros((7, 12, 10), complex), "has pixels of complex128"),
        (np.zeros((7, 12, 10), [("x", "f4"), ("λ", "f4")]), "version .* is not for plain"),
        (np.zeros((7, 12, 10), [("x", "f4")]), "has pixels of void32"),
        (np.zeros((7, 12, 10), object), "has pixels of object"),
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
def test_arrays_that_are_no_frames_are_refused(frames, message, tmp_path):
    path = _write_npy(tmp_path, frames)
    with pytest.raises(MovieError, match=rf"movie\.npy: .*{message}"):
        _raw.open_npy(path)


def _without(fields: dict[str, str], name: str) -> dict[str, str]:
    return {field: value for field, value in fields.items() if field != name}


@pytest.mark.parametrize("name", ["data type", "frame dimensions", "number of frames"])
def test_a_field_that_an_inf_lacks_is_named(name, tmp_path):
    path = _write_dax(tmp_path, _without(INF, name))
    with pytest.raises(
        MovieError, match=rf"movie\.dax: its movie\.inf lacks '{name}'; write"
    ):
        _raw.open_dax(path)


@pytest.mark.parametrize("name", ["Byte Order", "Data Type", "Frames", "Height", "Width"])
def test_a_field_that_a_yaml_lacks_is_named(name, tmp_path):
    path = _write_picasso(tmp_path, _without(YAML, name))
    with pytest.raises(
        MovieError, match=rf"movie\.raw: its movie\.yaml lacks '{name}'; write"
    ):
        _raw.open_picasso(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number of frames", "0"),
        ("number of frames", "-3"),
        ("number of frames", "7.0"),
        ("number of frames", "many"),
        ("number of frames", ""),
        ("number of frames", "9" * 5000),
        ("frame dimensions", "10"),
        ("frame dimensions", "10 x 12 x 3"),
        ("frame dimensions", "-10 x -12"),
        ("frame dimensions", "0 x 12"),
        ("data type", "32 bit integers (binary, big endian)"),
    ],
)
def test_a_wrong_value_in_an_inf_is_named(name, value, tmp_path):
    path = _write_dax(tmp_path, INF | {name: value})
    with pytest.raises(
        MovieError, match=f"says '{name}' is '{re.escape(value[:40])}.*; write"
    ) as caught:
        _raw.open_dax(path)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Frames", "-7"),
        ("Frames", "null"),
        ("Frames", "[7]"),
        ("Frames", "'*frames'"),
        ("Height", "1e3"),
        ("Width", "0x10"),
        ("Data Type", "object"),
        ("Data Type", "(10000,10000)f4"),
        ("Byte Order", "''"),
        ("Byte Order", "'<>'"),
    ],
)
def test_a_wrong_value_in_a_yaml_is_named(name, value, tmp_path):
    path = _write_picasso(tmp_path)
    lines = "".join(f"{n}: {v}\n" for n, v in (YAML | {name: value}).items())
    path.with_suffix(".yaml").write_text(lines)
    with pytest.raises(MovieError, match=f"its movie.yaml says '{name}' is .*; write"):
        _raw.open_picasso(path)


def test_a_field_that_is_repeated_with_another_value_is_refused(tmp_path):
    path = _write_dax(tmp_path)
    with path.with_suffix(".inf").open("a") as file:
        file.write("number of frames = 7\nnumber of frames = 5\n")
    with pytest.raises(MovieError, match="says 'number of frames' is '7' and '5'; delete"):
        _raw.open_dax(path)
    path = _write_picasso(tmp_path)
    with path.with_suffix(".yaml").open("a") as file:
        file.write("Width: 5\n")
    with pytest.raises(MovieError, match="says 'Width' is '10' and '5'; delete"):
        _raw.open_picasso(path)


@pytest.mark.parametrize("value", ["NA", "nan", "-1", "1e300", "[1, 2]"])
def test_frames_are_read_where_what_they_do_not_need_is_no_number(value, tmp_path):
    with _raw.open_dax(_write_dax(tmp_path, INF | {"Frames Per Second": value})) as movie:
        assert movie.frame_interval_s is None
    with _raw.open_picasso(
        _write_picasso(tmp_path, YAML | {"Camera.Pixelsize": value})
    ) as movie:
        assert movie.pixel_size_um is None


@pytest.mark.parametrize("missing", [".inf", ".dax"])
def test_a_file_that_is_missing_beside_the_other_is_named(missing, tmp_path):
    path = _write_dax(tmp_path)
    path.with_suffix(missing).unlink()
    other = path.with_suffix({".inf": ".dax", ".dax": ".inf"}[missing])
    with pytest.raises(MovieError, match=rf"{other.name}: its movie\{missing} is missing"):
        _raw.open_dax(other)


@every_format
def test_a_file_of_another_size_than_its_header_says_is_refused(write, read, tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    # The header of a .npy ends before byte 128 + 1.
    for length in range(len(content) - FRAMES.nbytes + 1, len(content), 53):
        path.write_bytes(content[:length])
        frame = (length - (len(content) - FRAMES.nbytes)) // FRAMES[0].nbytes
        with pytest.raises(MovieError, match=rf"truncated: .* ends in frame {frame} of 7"):
            read(path)
    path.write_bytes(content + FRAMES[0].tobytes())
    with pytest.raises(MovieError, match=r"has 240 bytes more than its .* says \(7 frames"):
        read(path)


def test_a_movie_cut_while_it_is_read_names_the_frame(tmp_path):
    path = _write_npy(tmp_path, np.zeros((5, 2, 4, 6), np.float32))
    with _raw.open_npy(path) as movie:
        before = movie.state()
        # Behind the header, three frames of two channels of 96 bytes.
        os.truncate(path, 128 + 3 * 2 * 96)
        assert movie.state() != before
        np.testing.assert_array_equal(movie.read(0, 3, 1), 0)
        with pytest.raises(MovieError, match="frame 3 of 5"):
            movie.read(0, 5, 1)


@pytest.mark.parametrize("size", [2**20, 2**40, 2**62])
@pytest.mark.parametrize("axis", range(3))
def test_sizes_that_lie_ask_for_no_memory(axis, size, tmp_path):
    shape = [7, 12, 10]
    shape[axis] = size
    frames, height, width = map(str, shape)
    dax = INF | {"number of frames": frames, "frame dimensions": f"{width} x {height}"}
    raw = YAML | {"Frames": frames, "Height": height, "Width": width}
    npy = _write_npy(tmp_path)
    with npy.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(FRAMES.tobytes())
    for read, path in (
        (_raw.open_dax, _write_dax(tmp_path, dax)),
        (_raw.open_picasso, _write_picasso(tmp_path, raw)),
        (_raw.open_npy, npy),
    ):
        tracemalloc.start()
        with pytest.raises(MovieError, match=rf"{path.name}: (truncated|broken).*{size}"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The least of these frames says 24 MiB; what is imported and raised, 2 MiB.
        assert peak < 2**23


def test_a_numpy_header_that_is_gigabytes_long_is_not_read(tmp_path):
    path = tmp_path / "movie.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    # Sparse: it takes no space on disk.
    os.truncate(path, 2**25)
    tracemalloc.start()
    with pytest.raises(MovieError, match=r"movie\.npy: broken NumPy header"):
        _raw.open_npy(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


MIB = 2**20


@pytest.mark.parametrize(
    "content",
    [
        b"[" * MIB,
        b"{" * MIB,
        b"- " * MIB,
        b"? " * MIB,
        b"- a\n" * 2**12,
        b"[" + b"a," * 2**12,
        b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(60_000)),
        b'a: "' + b"\\n" * 2**14,
        b"Frames: " + b"1 " * 2**14,
        b"#" * (5 * MIB),
        b"\n" * 2**12,
        b"\0" * MIB,
        b"\xff\xfe" * MIB,
        b"",
        b"7",
        b"- Frames: 7",
        b"a: b: c",
        b"!!python/object/apply:os.abort []",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_hostile_yaml_is_refused_in_one_line(content, tmp_path):
    path = _write_picasso(tmp_path)
    path.with_suffix(".yaml").write_bytes(content)
    with pytest.raises(MovieError, match=r"movie\.raw: its movie\.yaml ") as caught:
        _raw.open_picasso(path)
    assert "\n" not in str(caught.value)


def _damage(content: bytes, random: np.random.Generator) -> bytes:
    """Some bytes changed, and sometimes a part repeated or left out."""
    damaged = np.frombuffer(content, np.uint8).copy()
    places = random.integers(0, damaged.size, random.integers(1, 4))
    damaged[places] = random.choice(
        np.frombuffer(b"0123456789-:= x<>[]'{}\n\0\xff", np.uint8)
    )
    start, stop, again = sorted(random.integers(0, damaged.size, 3))
    match random.integers(0, 4):
        case 0:
            return np.delete(damaged, slice(start, stop)).tobytes()
        case 1:
            return np.insert(damaged, again, damaged[start:stop]).tobytes()
    return damaged.tobytes()


def _assert_frames_end(movie: Movie, content: bytes) -> None:
    """Whatever a damaged header came to say, the frames are the bytes that the file ends
    with, in one byte order or the other."""
    frames = np.stack([channel[:] for channel in movie.channels], axis=1)
    assert content.endswith((frames.tobytes(), frames.byteswap().tobytes()))


def _open_damaged(read: Callable[[Path], Movie], path: Path) -> Movie | str:
    try:
        return read(path)
    except MovieError as error:
        return str(error)


@pytest.mark.parametrize(
    ("write", "read", "damaged_name", "header_bytes"),
    [
        (_write_dax, _raw.open_dax, "movie.inf", None),
        (_write_picasso, _raw.open_picasso, "movie.yaml", None),
        (_write_npy, _raw.open_npy, "movie.npy", 128),
    ],
)
# Of a damaged Python literal, in the header of NumPy.
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::UserWarning")
def test_random_damage_to_a_header_gives_frames_or_one_clear_error(
    write, read, damaged_name, header_bytes, tmp_path
):
    random = np.random.default_rng(2)
    path, damaged = write(tmp_path), tmp_path / damaged_name
    content = damaged.read_bytes()
    opened = 0
    for _ in range(150):
        header = _damage(content[:header_bytes], random)
        damaged.write_bytes(header + (content[header_bytes:] if header_bytes else b""))
        movie = _open_damaged(read, path)
        if isinstance(movie, str):
            assert movie.startswith(f"{path}: ")
            assert "\n" not in movie
        else:
            opened += 1
            with movie:
                _assert_frames_end(movie, path.read_bytes())
    # Some damage is in what is not needed: that both happen shows the test at work.
    assert 0 < opened < 150

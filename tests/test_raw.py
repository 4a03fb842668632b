"""DAX, Picasso and NumPy files are read as they were written, or refused in one line."""

import dataclasses
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxbkgd import Movie, MovieError
from jaxbkgd._movies import raw as _raw
from jaxbkgd._movies.sinks import Layout


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


def test_a_dax_may_be_little_endian_in_capitals_and_named_by_either_file(tmp_path):
    path = _write_dax(
        tmp_path, INF | {"data type": "16 bit integers (binary, little endian)"}
    )
    inf = path.with_suffix(".inf").rename(tmp_path / "movie.INF")
    for name in (path, inf):
        with _raw.open_dax(name) as movie:
            assert (movie.name, movie.frame_interval_s) == (str(path), 0.05)
            np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


def test_of_a_yaml_the_first_document_is_read_and_nothing_constructed(tmp_path):
    made = tmp_path / "made"
    fields = {
        "ROI": "!!python/tuple [1, 2]",
        "Micro-Manager Metadata": f"!!python/object/apply:os.mkdir ['{made}']",
        "Frames": "7",
    }
    path = _write_picasso(tmp_path, YAML | fields)
    with path.with_suffix(".yaml").open("a") as file:
        file.write("---\nFrames: 99\n--- !!python/object/apply:os.abort []\n")
    with _raw.open_picasso(path.with_suffix(".yaml")) as movie:
        assert (movie.name, movie.pixel_size_um) == (str(path), (0.16, 0.16))
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)
    assert not made.exists()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("pixels", ["uint16", "int32", "float32", "float64", "u4"])
def test_picasso_pixels_of_every_type_and_order(pixels, order, tmp_path):
    path = _write_picasso(
        tmp_path, YAML | {"Data Type": pixels, "Byte Order": f"'{order}'"}
    )
    with _raw.open_picasso(path) as movie:
        assert movie.dtype == np.dtype(pixels)
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((12, 10)), "has shape .12, 10.; give"),
        (np.asfortranarray(np.zeros((7, 12, 10))), "is in Fortran order"),
        (np.zeros((0, 12, 10)), "has no frames"),
        (np.zeros((7, 12, 10), complex), "has pixels of complex128"),
        (np.zeros((7, 12, 10), [("x", "f4")]), "has pixels of void32"),
        (np.zeros((7, 12, 10), object), "has pixels of object"),
    ],
)
def test_arrays_that_are_no_frames_are_refused(frames, message, tmp_path):
    path = _write_npy(tmp_path, frames)
    with pytest.raises(MovieError, match=rf"movie\.npy: .*{message}"):
        _raw.open_npy(path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("number of frames", [None, "0", "-3", "7.0", "many", "", "9" * 5000]),
        ("frame dimensions", [None, "10", "10 x 12 x 3", "-10 x -12", "0 x 12"]),
        ("data type", [None, "32 bit integers (binary, big endian)"]),
        ("Frames", [None, "-7", "null", "[7]", "'*frames'", "true"]),
        ("Height", [None, "1e3"]),
        ("Width", [None, "0"]),
        ("Data Type", [None, "object", "(10000,10000)f4"]),
        ("Byte Order", [None, "''", "'<>'"]),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(name, values, tmp_path):
    write, read, fields = (
        (_write_dax, _raw.open_dax, INF)
        if name in INF
        else (_write_picasso, _raw.open_picasso, YAML)
    )
    for value in values:
        path = write(tmp_path)
        header = path.with_suffix(".inf" if name in INF else ".yaml")
        changed = {n: v for n, v in (fields | {name: value}).items() if v is not None}
        mark = " = " if name in INF else ": "
        header.write_text("".join(f"{n}{mark}{v}\n" for n, v in changed.items()))
        fault = f"lacks '{name}'" if value is None else f"says '{name}' is "
        message = rf"{path.name}: its {header.name} {re.escape(fault)}.*; write"
        with pytest.raises(MovieError, match=message) as caught:
            read(path)
        assert len(str(caught.value)) < len(str(path)) + 300


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
    for length in range(len(content) - FRAMES.nbytes + 1, len(content), 253):
        path.write_bytes(content[:length])
        frame = (length - (len(content) - FRAMES.nbytes)) // FRAMES[0].nbytes
        with pytest.raises(MovieError, match=rf"truncated: .* ends in frame {frame} of 7"):
            read(path)
    path.write_bytes(content + FRAMES[0].tobytes())
    with pytest.raises(
        MovieError, match=r"has 240 bytes more than its .* says \(7 frames\)"
    ):
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


@pytest.mark.parametrize("size", [2**20, 2**62])
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


MIB = 2**20


@pytest.mark.parametrize(
    "content",
    [
        b"[" * MIB,
        b"- " * MIB,
        b"- a\n" * 2**12,
        b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i + 1, i + 1, i, i) for i in range(60_000)),
        b"Frames: 0x" + b"f" * 2**14,
        b"#" * (5 * MIB),
        b"\0" * MIB,
        b"",
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
    opened, messages = 0, []
    for _ in range(100):
        header = _damage(content[:header_bytes], random)
        damaged.write_bytes(header + (content[header_bytes:] if header_bytes else b""))
        try:
            with read(path) as movie:
                opened += 1
                _assert_frames_end(movie, path.read_bytes())
        except MovieError as error:
            messages.append(str(error))
    assert all(m.startswith(f"{path}: ") and "\n" not in m for m in messages)
    # Some damage is in what is not needed: that both happen shows the test at work.
    assert 0 < opened < 100


LAYOUT = Layout((7, 1, 12, 10), np.dtype(np.uint16), 3, (0.108, 0.108))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_what_is_written_for_picasso_is_read_as_it_was(dtype, tmp_path):
    frames = FRAMES[:, None].astype(dtype)
    about = {"content": "residual + pedestal of 100 ADU", "pedestal": 100.0}
    layout = dataclasses.replace(LAYOUT, dtype=frames.dtype, about=about)
    sink = _raw.PicassoSink(tmp_path / "movie.raw", layout)
    sink.begin()
    sink.write(3, frames[3:])
    sink.write(0, frames[:3])
    assert not (tmp_path / "movie.yaml").exists()
    sink.commit()
    with _raw.open_picasso(tmp_path / "movie.raw") as movie:
        np.testing.assert_array_equal(movie.read(0, 7), frames[:, 0])
        assert movie.pixel_size_um == (0.108, 0.108)
    fields = yaml.safe_load((tmp_path / "movie.yaml").read_text())
    shape = {"Frames": 7, "Height": 12, "Width": 10}
    others = {"Pixelsize": 108.0, "jaxbkgd": about}
    assert fields == {"Byte Order": "<", "Data Type": dtype} | shape | others
    io = pytest.importorskip("picasso.io", exc_type=ImportError)
    movie, _ = io.load_movie(str(tmp_path / "movie.raw"))
    np.testing.assert_array_equal(movie, frames[:, 0])


def test_a_run_for_picasso_goes_on_after_it_has_ended_anywhere(tmp_path):
    path, frames = tmp_path / "movie.raw", FRAMES[:, None]
    sink = _raw.PicassoSink(path, LAYOUT)
    sink.begin()
    sink.write(0, frames[:3])
    sink.close()
    assert not {"movie.raw", "movie.yaml"} & {*os.listdir(tmp_path)}
    sink = _raw.PicassoSink(path, LAYOUT)
    assert sink.is_begun
    sink.resume()
    sink.write(3, frames[3:])
    # It ends when the header has its name, and the frames have not.
    sink._complete()
    sink.close()
    sink = _raw.PicassoSink(path, LAYOUT)
    sink.resume()
    sink.commit()
    with _raw.open_picasso(path) as movie:
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)
    assert sorted(os.listdir(tmp_path)) == ["movie.raw", "movie.yaml"]


def test_a_header_of_another_movie_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "movie.raw"
    path.with_suffix(".yaml").write_text("Frames: 9\n")
    message = r"movie\.raw: its .*movie\.yaml exists already; choose another name"
    with pytest.raises(MovieError, match=message):
        _raw.PicassoSink(path, LAYOUT).begin()
    sink = _raw.PicassoSink(path, LAYOUT, overwrite=True)
    sink.begin()
    sink.write(0, FRAMES[:, None])
    sink.commit()
    with _raw.open_picasso(path) as movie:
        np.testing.assert_array_equal(movie.read(0, 7), FRAMES)


def test_a_draft_for_picasso_that_was_cut_is_refused(tmp_path):
    sink = _raw.PicassoSink(tmp_path / "movie.raw", LAYOUT)
    sink.begin()
    sink.close()
    os.truncate(tmp_path / "movie.raw.part", 100)
    sink = _raw.PicassoSink(tmp_path / "movie.raw", LAYOUT)
    with pytest.raises(MovieError, match=r"movie\.raw\.part: is truncated.*over"):
        sink.resume()
    sink.close()


def test_several_channels_are_no_movie_of_picasso(tmp_path):
    layout = dataclasses.replace(LAYOUT, shape=(7, 2, 12, 10))
    with pytest.raises(MovieError, match="has one channel, and this one 2; write"):
        _raw.PicassoSink(tmp_path / "movie.raw", layout)

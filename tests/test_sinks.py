"""A movie is written whole under its name, by one run at a time, and not after its end."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
import zarr
from conftest import MovingSum

import jaxbkgd
from jaxbkgd import estimate_movie, MovieError, open_movie, SpatialMean
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import ArraySink, Journal, Layout, Sink
from jaxbkgd._movies.tiff_pages import read_metadata


FRAMES = np.random.default_rng(0).normal(100, 9, (8, 1, 12, 10)).astype(np.float32)
LAYOUT = Layout(FRAMES.shape, FRAMES.dtype, 4)


def _open(path: Path) -> Sink:
    sink = open_sink(path, LAYOUT)
    assert isinstance(sink, Sink)
    return sink


every_file = pytest.mark.parametrize(
    "name", ["m.tif", "m.ome.tif", "m.zarr", "m.ome.zarr", "m.raw"]
)


@every_file
def test_a_sink_that_was_sent_elsewhere_writes_to_the_same_draft(name, tmp_path):
    sink = _open(tmp_path / name)
    sink.begin({"a": 1})
    elsewhere = pickle.loads(pickle.dumps(sink))
    elsewhere.write(4, FRAMES[4:])
    sink.write(0, FRAMES[:4])
    sink.commit()
    np.testing.assert_array_equal(np.asarray(open_movie(tmp_path / name)), FRAMES)
    assert sorted(os.listdir(tmp_path)) == ([name] if name != "m.raw" else [name, "m.yaml"])


@every_file
def test_frames_after_the_end_of_a_sink_are_refused(name, tmp_path):
    for end in ("commit", "close", "discard"):
        sink = _open(tmp_path / end / name)
        (tmp_path / end).mkdir()
        sink.begin()
        sink.write(0, FRAMES)
        getattr(sink, end)()
        with pytest.raises(MovieError, match=r"m\..*: is closed, and takes no more frames"):
            sink.write(0, FRAMES)
    np.testing.assert_array_equal(
        np.asarray(open_movie(tmp_path / "commit" / name)), FRAMES
    )


class _SlowFrames(np.ndarray):
    """Frames whose copy to a sink begins, and ends when it is let."""

    begun, may_end = threading.Event(), threading.Event()

    def reshape(self, *shape: Any, **options: Any) -> Any:
        self.begun.set()
        assert self.may_end.wait(60)
        return np.asarray(self).reshape(*shape)


def test_an_array_is_not_written_to_after_the_end():
    array = np.zeros((8, 12, 10), np.float32)
    sink = ArraySink(array, LAYOUT)
    writer = threading.Thread(target=sink.write, args=(0, FRAMES.view(_SlowFrames)))
    writer.start()
    assert _SlowFrames.begun.wait(60)
    closer = threading.Thread(target=sink.close)
    closer.start()
    closer.join(0.05)
    # It waits for the frames that are being written.
    assert closer.is_alive()
    _SlowFrames.may_end.set()
    closer.join()
    np.testing.assert_array_equal(array, FRAMES[:, 0])
    with pytest.raises(MovieError, match="the array to fill: is closed"):
        sink.write(0, FRAMES)
    writer.join()


def _refuse_to_remove_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith(".journal"):
            raise PermissionError(errno.EACCES, "it is open elsewhere")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)


@pytest.mark.slow
def test_a_journal_that_cannot_be_removed_claims_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out.tif"
    with monkeypatch.context() as refusing:
        _refuse_to_remove_journals(refusing)
        estimate_movie(FRAMES[:, 0], SpatialMean(1.0), out, progress=False)
    assert (tmp_path / "out.tif.part.journal").exists()
    with pytest.raises(MovieError, match="exists already"):
        estimate_movie(FRAMES[:, 0], SpatialMean(1.0), out, progress=False)
    estimate_movie(FRAMES[:, 0], SpatialMean(1.0), out, progress=False, overwrite=True)
    assert os.listdir(tmp_path) == ["out.tif"]


def test_a_journal_is_closed_before_it_is_removed(tmp_path, monkeypatch):
    """Since Windows removes no open files."""
    journal = Journal(tmp_path / "journal")
    journal.clear()
    file = journal._file
    assert file is not None
    was_closed = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda self, **options: (
            was_closed.append((self.name, file.closed)),
            unlink(self, **options),
        ),
    )
    journal.remove()
    assert ("journal", True) in was_closed
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_there_are_no_locks_that_is_a_warning(code, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file: Any, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    sink = _open(tmp_path / "m.zarr")
    with pytest.warns(
        UserWarning, match=r"journal: cannot be locked there \(.*\); start no"
    ):
        sink.begin()
    sink.write(0, FRAMES)
    sink.commit()
    assert os.listdir(tmp_path) == ["m.zarr"]


ABOUT = {"content": "residual + pedestal of 100 ADU", "pedestal": 100.0, "unit": "ADU"}


def _described(path: Path) -> dict[str, Any]:
    """What the metadata of a file say of its numbers, to those who know its format."""
    if "zarr" in path.suffix:
        about: Any = zarr.open(path, mode="r").attrs["jaxbkgd"]
        return about
    if path.suffix == ".raw":
        return yaml.safe_load(path.with_suffix(".yaml").read_text())["jaxbkgd"]
    with tifffile.TiffFile(path) as tiff:
        if tiff.is_ome:
            xml = tiff.ome_metadata or ""
            (text,) = re.findall("<Description>(.*?)</Description>", xml, re.S)
        else:
            text = read_metadata(tiff)["Info"]
    return dict(line.split(": ", 1) for line in unescape(text).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@every_file
def test_a_file_says_what_its_numbers_are(name, dtype, tmp_path):
    options = {"pedestal": 100, "dtype": dtype, "progress": False}
    frames, estimator = FRAMES[:, 0], SpatialMean(1.0)
    estimate_movie(frames, estimator, tmp_path / name, quantity="residual", **options)
    described = _described(tmp_path / name)
    assert list(described) == ["content", "pedestal", "unit", "estimator", "program"]
    assert {key: described[key] for key in ("content", "unit")} == {
        "content": "residual + pedestal of 100 ADU",
        "unit": "ADU",
    }
    assert float(described["pedestal"]) == 100
    of_estimator = described["estimator"]
    text = of_estimator if isinstance(of_estimator, str) else json.dumps(of_estimator)
    np.testing.assert_allclose(SpatialMean.from_json(text).radii_pix, 1.0)


def test_of_a_large_tiff_tifffile_tells_what_its_numbers_are(tmp_path):
    layout = Layout((2**11, 1, 1024, 1024), FRAMES.dtype, 4, about=ABOUT)
    sink = open_sink(tmp_path / "m.tif", layout)
    # Its pixels are a hole in the file.
    sink.begin()
    sink.commit()
    assert _described(tmp_path / "m.tif")["content"] == ABOUT["content"]


def test_an_estimator_that_is_no_json_is_described_by_its_name(tmp_path):
    class Even(MovingSum):
        of: Any = complex(1, 2)

    estimate_movie(FRAMES[:, 0], Even(1), tmp_path / "m.tif", progress=False)
    assert _described(tmp_path / "m.tif")["estimator"] == "Even"


def test_a_killed_run_gives_its_lock_back(tmp_path):
    path = tmp_path / "journal"
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(jaxbkgd.__file__).parent)!r})
from _movies.sinks import Journal
journal = Journal(Path({str(path)!r}))
journal.clear()
journal.begin({{"a": 1}})
journal.add(3)
print("begun", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline().strip() == b"begun"
        with pytest.raises(MovieError, match="journal: is in use; wait for the other run"):
            Journal(path)
        run.kill()
    journal = Journal(path)
    assert (journal.settings, journal.done) == ({"a": 1}, {3})
    journal.remove()
    assert not os.listdir(tmp_path)

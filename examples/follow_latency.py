"""Benchmark: how far behind the microscope `estimate_movie(..., follow=True)` is.

    python examples/follow_latency.py [FOLDER] [--seconds S]

A process of its own writes frames of 256 px, 100 a second, as TIFF, Zarr or DAX to FOLDER,
by default a temporary one, and notes when each is written. Meanwhile the movie is followed,
and its result is looked at every 10 ms. Given are, over the frames that are estimated while
the writer writes, the median and the longest time from a frame to its background, and, for
comparison, how long the frames take that the longest one has to wait for: its chunk, and
the halo behind it. Programs were compiled before, in a movie that was followed for a fifth
of the time and does not count.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr

import jaxbkgd


RATE, SIZE_PIX, SILENCE = 100, 256, 5.0
SUFFIXES = (".tif", ".zarr", ".dax")


# The writer.


def write(path: Path, count: int) -> None:
    """Prints the time after each frame."""
    frames = np.random.default_rng(0).poisson(200, (20, SIZE_PIX, SIZE_PIX))
    frames = frames.astype("<u2")
    kinds = {".tif": write_tiff, ".zarr": write_zarr, ".dax": write_dax}
    begin, times = time.time(), []
    steps = kinds[path.suffix](path, frames[np.arange(count) % len(frames)])
    for number, _ in enumerate(steps, 1):
        times.append(time.time())
        time.sleep(max(0.0, begin + number / RATE - times[-1]))
    print(*times)


def write_tiff(path: Path, frames: np.ndarray) -> Iterator[None]:
    with tifffile.TiffWriter(path) as writer:
        for frame in frames:
            writer.write(frame, photometric="minisblack", metadata=None)
            yield


def write_zarr(path: Path, frames: np.ndarray) -> Iterator[None]:
    shape = (0, SIZE_PIX, SIZE_PIX)
    array = zarr.create_array(path, shape=shape, chunks=(1, *shape[1:]), dtype="u2")
    for frame in frames:
        array.append(frame[None])
        yield


def write_dax(path: Path, frames: np.ndarray) -> Iterator[None]:
    """With the number of frames in the .inf at the end, as programs write it."""
    header = (
        f"frame dimensions = {SIZE_PIX} x {SIZE_PIX}\n"
        "data type = 16 bit integers (binary, little endian)\nnumber of frames = "
    )
    path.with_suffix(".inf").write_text(f"{header}1\n")
    with path.open("wb", buffering=0) as file:
        for number, frame in enumerate(frames, 1):
            if number == len(frames):
                path.with_suffix(".inf").write_text(f"{header}{number}\n")
            file.write(frame.tobytes())
            yield


# What follows it.


def delays(
    path: Path, estimator: jaxbkgd.AbstractEstimator, count: int, **options: Any
) -> tuple[np.ndarray, int]:
    """From each frame to its background, in seconds, and the frames in a chunk."""
    command = [sys.executable, __file__, "--write", str(path), str(count)]
    seen = np.full(count, np.inf)
    result, is_over = path.with_suffix(".raw"), threading.Event()

    def look() -> None:
        draft, done = result.with_name(f"{result.name}.part"), 0
        while not is_over.wait(0.01):
            length = draft.stat().st_size // (4 * SIZE_PIX**2) if draft.exists() else 0
            if length > done:
                shape = (length, SIZE_PIX, SIZE_PIX)
                # What is not written yet reads as 0.
                values = np.memmap(draft, "<f4", "r", shape=shape)[done:, -1, -1]
                new = int(np.argmax(np.append(values == 0, True)))
                seen[done : done + new] = time.time()
                done += new

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        watch = threading.Thread(target=look)
        watch.start()
        try:
            summary = jaxbkgd.estimate_movie(
                path, estimator, result, follow=SILENCE, progress=False, **options
            )
        finally:
            is_over.set()
            watch.join()
        written = np.array(writer.communicate()[0].split(), float)
    during = seen < written[-1]
    return (seen - written)[during], summary.chunk_frames


def main(folder: Path, seconds: float) -> None:
    # Which reaches as far as its radii, and not as far as they might be learned.
    local_mean = jaxbkgd.LocalMean().for_inference()
    halo = local_mean.halo_frames
    ways: list[tuple[str, jaxbkgd.AbstractEstimator, dict[str, Any]]] = [
        ("`SpatialMean()`", jaxbkgd.SpatialMean(), {}),
        ("`LocalMean(radius_frames=0)`", jaxbkgd.LocalMean(radius_frames=0.0), {}),
        ("`LocalMean()`", local_mean, {}),
        (
            f"`LocalMean()`, chunks of {halo} frames, 20 ahead",
            local_mean,
            {"chunk_frames": halo, "look_ahead_frames": 20},
        ),
    ]
    print("| format | estimator | waits for | median | longest |")
    print("| --- | --- | --: | --: | --: |")
    for number, (name, estimator, options) in enumerate(ways):
        for suffix in SUFFIXES:
            count, path = int(seconds * RATE), folder / f"{suffix[1:]}-{number}{suffix}"
            first = path.with_stem(f"{path.stem}-first")
            delays(first, estimator, count // 5, **options)
            found, chunk = delays(path, estimator, count, **options)
            frames = chunk + options.get("look_ahead_frames", estimator.halo_frames)
            cells = "none in this time | give more --seconds"
            if found.size:
                cells = f"{np.median(found):.2f} s | {np.max(found):.2f} s"
            print(f"| {suffix} | {name} | {frames / RATE:.2f} s | {cells} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(Path(arguments.write[0]), int(arguments.write[1]))
    else:
        jaxbkgd.one_thread_a_call()
        with tempfile.TemporaryDirectory() as scratch:
            main(arguments.folder or Path(scratch), arguments.seconds)

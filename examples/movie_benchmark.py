"""Benchmark: whole movies, from a file to a file.

    python examples/movie_benchmark.py [FOLDER]

A uint16 TIFF movie is written to FOLDER (by default the folder it runs in), where 15 GB
must be free. From there its background goes to float32 TIFF and Zarr, beside the same
frames copied as float32 without any computing: by the same readers and writers, in the same
chunks, on as many threads. It also goes to an array in memory. Where smlmlp is installed,
its `load_data` with `bkgd_spatial_mean` computes the background too, and writes nothing.
They take turns, each when what was written before is on the disk; given are medians over
the rounds, after one that does not count. JAX has a thread for each call, as in
`jaxbkgd estimate`.

The last line is the most memory that a process needed above the interpreter with JAX
loaded, for a movie of a quarter of the frames and for all of them.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tifffile

import jaxbkgd
from jaxbkgd._batch.plan import windows
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import Layout
from jaxbkgd._workers import core_count


RADIUS_PIX = 7.0
SUFFIXES = (".tif", ".zarr")


def main(
    folder: Path, frame_count: int = 4000, size_pix: int = 512, rounds: int = 3
) -> dict[str, float]:
    """The rate of each way in Mpx/s."""
    movie = folder / "benchmark-movie.tif"
    write_movie(movie, frame_count, size_pix)
    estimator = jaxbkgd.SpatialMean(RADIUS_PIX)
    chunk_frames = max(1, 2**20 // size_pix**2)
    ways: dict[str, Callable[[], object]] = {}
    for suffix in SUFFIXES:
        sink = folder / f"benchmark-bkgd{suffix}"
        ways |= {
            f"copied to {suffix}": lambda sink=sink: copy(movie, sink, chunk_frames),
            f"estimated to {suffix}": lambda sink=sink: jaxbkgd.estimate_movie(
                movie, estimator, sink, chunk_frames=chunk_frames, overwrite=True
            ),
        }
    out = np.zeros((frame_count, size_pix, size_pix), np.float32)
    ways["estimated, not written"] = lambda: jaxbkgd.estimate_movie(
        movie, estimator, out, chunk_frames=chunk_frames
    )
    with contextlib.suppress(ModuleNotFoundError):
        smlmlp = importlib.import_module("smlmlp")

        def estimate_with_smlmlp() -> None:
            for channels, _ in smlmlp.load_data(str(movie), chunk=100, parallel=True):
                smlmlp.bkgd_spatial_mean(channels, RADIUS_PIX, parallel=True)

        ways["smlmlp, not written"] = estimate_with_smlmlp

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            for suffix in SUFFIXES:
                remove(folder / f"benchmark-bkgd{suffix}")
            # Or one way would wait for the disk on behalf of the one before.
            os.sync()
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    megapixels = frame_count * size_pix**2 / 1e6
    rates = {
        name: megapixels / statistics.median(times[1:]) for name, times in seconds.items()
    }
    for name, rate in rates.items():
        base = "copied to" + name.removeprefix("estimated to")
        shares = [f"{rate / rates[base]:.2f} of the copy"] if base in rates else []
        if "smlmlp, not written" in rates:
            shares.append(f"{rate / rates['smlmlp, not written']:.1f} times smlmlp")
        print(f"{name:22}  {rate:5.0f} Mpx/s  {', '.join(shares)}")

    for count in (frame_count // 4, frame_count):
        write_movie(movie, count, size_pix)
        remove(folder / "benchmark-bkgd.tif")
        megabytes = memory_megabytes(movie, folder / "benchmark-bkgd.tif")
        movie_megabytes = count * size_pix**2 * 2 / 1e6
        print(f"memory for {movie_megabytes:.0f} MB of movie: {megabytes:.0f} MB")
    for path in (movie, *(folder / f"benchmark-bkgd{suffix}" for suffix in SUFFIXES)):
        remove(path)
    return rates


def write_movie(path: Path, frame_count: int, size_pix: int) -> None:
    """Frames that repeat, so that simulating them takes no time."""
    shape = (min(20, frame_count), size_pix, size_pix)
    frames = np.random.default_rng(0).poisson(200, shape).astype(np.uint16)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for index in range(frame_count):
            writer.write(
                frames[index % len(frames)], contiguous=True, photometric="minisblack"
            )


def copy(movie: Path, path: Path, chunk_frames: int) -> None:
    with jaxbkgd.open_movie(movie) as source:
        channel = source.channels[0]
        sink = open_sink(path, Layout(source.shape, np.dtype(np.float32), chunk_frames))
        sink.begin()

        def copy_chunk(start: int, stop: int) -> None:
            sink.write(start, channel[start:stop].astype(np.float32)[:, None])

        with ThreadPoolExecutor(core_count()) as pool:
            chunks = windows(len(channel), chunk_frames, halo_frames=0)
            for future in [pool.submit(copy_chunk, w.start, w.stop) for w in chunks]:
                future.result()
        sink.commit()


def memory_megabytes(movie: Path, sink: Path) -> float:
    """The most that a process of its own needs, above what it has with JAX loaded."""
    command = [sys.executable, __file__, "--memory", movie, sink]
    # One thread a call has two settings; the other one is in the environment.
    environment = os.environ | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}
    run = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    )
    return float(run.stdout)


def measure_memory(movie: Path, sink: Path) -> None:
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = peak_megabytes()
    estimator = jaxbkgd.SpatialMean(RADIUS_PIX)
    jaxbkgd.estimate_movie(movie, estimator, sink, progress=False)
    print(peak_megabytes() - before)


def peak_megabytes() -> float:
    # getrusage would count what the process was before it became this program.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(*arguments.memory)
    else:
        # Set on some machines, where they slow NumPy and SciPy down.
        for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
            os.environ.pop(name, None)
        jaxbkgd.one_thread_a_call()
        main(arguments.folder, arguments.frames, arguments.size, arguments.rounds)

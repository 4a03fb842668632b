"""The package needs nothing that Windows and macOS have not."""

import subprocess
import sys

import pytest


# What other packages need of the system is theirs: they are imported before.
CODE = """
import importlib, os, sys
from pathlib import Path

for package in sys.argv[2:]:
    importlib.import_module(package)
for module in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[module] = None
for name in (
    "fork", "getuid", "geteuid", "mkfifo", "posix_fallocate", "posix_fadvise", "pread",
    "preadv", "pwrite", "pwritev", "sched_getaffinity", "sysconf",
):
    if hasattr(os, name):
        delattr(os, name)
# As Python itself defines it there.
os.process_cpu_count = os.cpu_count

import numpy as np
import jaxbkgd

os.chdir(sys.argv[1])
frames = np.random.default_rng(0).poisson(100, (12, 16, 16)).astype(np.uint16)
np.save("movie.npy", frames)
estimator = jaxbkgd.SpatialMean(2.0)
expected = np.asarray(estimator(frames).bkgds)


class Interrupted(Exception):
    pass


class Failing(jaxbkgd.Movie):
    is_failing = True

    def read(self, start, stop, channel=0):
        if self.is_failing and start <= 9 < stop and stop - start > 1:
            raise Interrupted
        return super().read(start, stop, channel)


def estimate(source, sink):
    return jaxbkgd.estimate_movie(source, estimator, sink, chunk_frames=3, workers=2)


for sink in ("a.tif", "b.ome.tif", "c.zarr", "d.ome.zarr"):
    pixels = np.load("movie.npy", mmap_mode="r")[:, None]
    paths = [Path("movie.npy")]
    with Failing(pixels, name="movie.npy", format="NumPy file", paths=paths) as movie:
        try:
            estimate(movie, sink)
            raise AssertionError("it was not interrupted")
        except Interrupted:
            pass
        movie.is_failing = False
        assert estimate(movie, sink).resumed_frames > 0
    with jaxbkgd.open_movie(sink) as movie:
        np.testing.assert_array_equal(np.asarray(movie)[:, 0], expected)
    # From the file that was written, to another.
    estimate(sink, "again" + sink)
assert sorted(os.listdir()) == [
    "a.tif", "againa.tif", "againb.ome.tif", "againc.zarr", "againd.ome.zarr", "b.ome.tif",
    "c.zarr", "d.ome.zarr", "movie.npy",
]
"""

PACKAGES = [
    "jax", "equinox", "jaxtyping", "numpy", "optax", "rich", "filelock", "psutil",
    "tqdm.auto", "tifffile", "imagecodecs", "zarr", "yaml", "dask.array", "cloudpickle",
]  # fmt: skip


@pytest.mark.long
def test_movies_are_estimated_and_resumed_without_what_only_posix_has(tmp_path):
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path), *PACKAGES], check=True)

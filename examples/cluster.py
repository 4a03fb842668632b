"""The background of a movie on a cluster: read, estimated and written by dask's workers.

    python examples/cluster.py
    python examples/cluster.py MOVIE.ome.zarr BKGDS.ome.zarr --radius 7
    python examples/cluster.py MOVIE.ome.zarr BKGDS.ome.zarr --scheduler tcp://node1:8786

The first simulates a small movie, and the first two start workers on this machine. The
third uses those of a scheduler that is running; they must see the same files by the same
names, as on a shared file system, and have the same version of jaxbkgd. The movie is of any
format that `jaxbkgd.open_movie` reads, the result an OME-Zarr or plain Zarr. It has its
name only when it is complete: until then it is NAME.part, which the next run begins anew.
It needs the extra `cluster`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import dask.array as da
import jax
import numpy as np
from dask.array.core import normalize_chunks
from distributed import Client, LocalCluster

import jaxbkgd
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import Layout, Sink


# Of all channels, in a task, which so takes longer than what the scheduler does for it, a
# millisecond.
CHUNK_PIXELS = 2**24


def main(arguments: list[str] | None = None) -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", help="the movie, by default a simulated one")
    parser.add_argument("sink", nargs="?", default="cluster-bkgds.ome.zarr")
    parser.add_argument("--radius", type=float, default=7.0, help="in pixels")
    parser.add_argument("--scheduler", help="address, by default one on this machine")
    parser.add_argument("--workers", type=int, default=2, help="where there is no address")
    given = parser.parse_args(arguments)
    estimator = jaxbkgd.SpatialMean(given.radius)
    try:
        source = given.source or simulated("cluster-movie.ome.zarr")
        if given.scheduler:
            with Client(given.scheduler) as client:
                estimate(client, source, given.sink, estimator)
            return
        # A process for each: a worker that dies takes no other with it.
        with (
            LocalCluster(
                n_workers=given.workers,
                threads_per_worker=1,
                # Reached from this machine alone, at a port that is free.
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
            ) as cluster,
            Client(cluster) as client,
        ):
            estimate(client, source, given.sink, estimator)
    except jaxbkgd.MovieError as error:
        parser.error(str(error))


def simulated(name: str) -> str:
    """Writes a movie, if there is none of the name."""
    if not Path(name).exists():
        frames, _ = jaxbkgd.simulate_movie(jax.random.key(0))
        sink = zarr_sink(name, Layout((100, 1, 128, 128), np.dtype(np.uint16), 20))
        sink.begin()
        sink.write(0, np.asarray(frames, np.uint16)[:, None])
        sink.commit()
        print(f"simulated {name}")
    return name


def estimate(
    client: Client,
    source: str,
    name: str,
    estimator: jaxbkgd.AbstractEstimator,
    chunk_frames: int | None = None,
) -> None:
    """Writes the background of the movie `source` to `name`."""
    path = Path(source).resolve()
    with jaxbkgd.open_movie(path) as movie:
        frame_count = movie.shape[0]
        workers = len(client.scheduler_info()["workers"])
        chunk_frames = chunk_frames or default_chunk_frames(movie, workers)
        layout = Layout(
            movie.shape,
            np.dtype(np.float32),
            chunk_frames,
            movie.pixel_size_um,
            movie.frame_interval_s,
        )
        frames = da.map_blocks(
            read,
            path,
            chunks=normalize_chunks((chunk_frames, -1, -1, -1), movie.shape),
            meta=np.empty((0, 0, 0, 0), movie.dtype),
        )
    # Raises what does not fit, before anything is written.
    bkgds = jaxbkgd.estimate_dask(frames, estimator)
    sink = zarr_sink(name, layout)
    sink.begin()
    # Each task writes whole chunks of the file, so that none waits for another, and one
    # that is done twice, since a worker died, writes the same again.
    written = bkgds.map_blocks(
        write,
        sink,
        chunks=((1,) * frames.numblocks[0], (1,), (1,), (1,)),
        meta=np.empty((0, 0, 0, 0), np.int64),
    )
    print(
        f"{path.name}: {frame_count} frames in {frames.numblocks[0]} chunks "
        f"of {chunk_frames}, on {workers} workers"
    )
    count = client.compute(written.sum(), sync=True)
    sink.commit()
    print(f"wrote {count} frames to {name}")


def default_chunk_frames(movie: jaxbkgd.Movie, workers: int) -> int:
    """Of whole chunks of the file, so that none is read twice, and some for each worker."""
    step, frame_count = movie.chunk_frames, movie.shape[0]
    most = min(CHUNK_PIXELS // math.prod(movie.shape[1:]), frame_count // (2 * workers))
    return min(step * max(1, most // step), frame_count)


def read(path: Path, block_info: Any = None) -> np.ndarray:
    """The frames of a chunk, (frames, channels, height, width)."""
    start, stop = block_info[None]["array-location"][0]
    with jaxbkgd.open_movie(path) as movie:
        channels = [channel[start:stop] for channel in movie.channels]
    return np.stack(channels, axis=1)


def write(chunk: np.ndarray, sink: Sink, block_info: Any = None) -> np.ndarray:
    """How many frames it has written, as an array of one number."""
    sink.write(block_info[0]["array-location"][0][0], chunk)
    return np.full((1, 1, 1, 1), len(chunk))


def zarr_sink(name: str, layout: Layout) -> Sink:
    if Path(name).suffix.lower() != ".zarr":
        raise jaxbkgd.MovieError(
            f"{name}: many write to it; give a name that ends in .ome.zarr or .zarr"
        )
    sink = open_sink(name, layout)
    assert isinstance(sink, Sink)
    return sink


if __name__ == "__main__":
    main()

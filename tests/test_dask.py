"""Movies that are dask arrays: lazy, on every scheduler, the estimator sent once."""

import functools as ft
import os
import pickle
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import dask.array as da
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from conftest import MovingSum
from dask.base import optimize
from distributed import Client, LocalCluster

import jaxbkgd
from jaxbkgd import (
    AbstractEstimator,
    Background,
    Camera,
    estimate_dask,
    MovieError,
    SpatialMean,
)
from jaxbkgd._movies.open import open_sink
from jaxbkgd._movies.sinks import Layout


FRAMES = np.random.default_rng(0).integers(0, 65536, (23, 10, 11)).astype(np.uint16)
TWO_CHANNELS = np.stack([FRAMES, FRAMES[::-1]], axis=1)
ROOT = Path(__file__).parents[1]
# Few taps, which are compiled fast.
MEAN = SpatialMean(1.0, max_radius_pix=1.1)


class Half(AbstractEstimator):
    """Half of each frame."""

    @property
    def halo_frames(self) -> int:
        return 0

    def estimate_stack(self, frames: Any) -> Background:
        return Background(frames * 0.5, jnp.ones(()))


class Weighted(MovingSum):
    """The sum of frames that are each multiplied by their weights."""

    takes_weights: ClassVar[bool] = True

    def estimate_stack(self, frames: Any, weights: Any = None) -> Background:
        factors = 1 if weights is None else weights
        return super().estimate_stack(frames.astype(jnp.float32) * factors)


class Marked(Half):
    """Half, which notes in a file where it is unpickled and where it is compiled."""

    log: str = eqx.field(static=True, default="")
    # Of no two objects equal, as a function that was sent.
    mark: object = eqx.field(static=True, default_factory=object)

    def __reduce__(self) -> Any:
        return unpickled, (type(self), self.log)

    def estimate_stack(self, frames: Any) -> Background:
        note(self.log, "compiled")
        return super().estimate_stack(frames)


class Deadly(Marked):
    """It ends the process that is first to see the number 65535."""

    def estimate_stack(self, frames: Any) -> Background:
        jax.debug.callback(ft.partial(die_once, self.log), jnp.max(frames))
        return super().estimate_stack(frames)


def die_once(log: str, largest: Any) -> None:
    dead = Path(f"{log}.dead")
    if largest == 65535 and not dead.exists():
        dead.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def unpickled(kind: type[Marked], log: str) -> Marked:
    note(log, "unpickled")
    return kind(log=log)


def note(log: str, event: str) -> None:
    with open(log, "a") as file:
        file.write(f"{event} in {os.getpid()}\n")


def background(frames: Any, estimator: AbstractEstimator = MEAN) -> Any:
    """Of the whole movie, in memory."""
    return jax.jit(lambda frames: estimator(frames).bkgds)(frames)


def in_chunks(frames: np.ndarray, chunk_frames: Any = 5) -> da.Array:
    return da.from_array(frames).rechunk({0: chunk_frames})


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [5, (3, 0, 9, 11)])
def test_the_result_is_the_same_to_the_bit_whatever_the_chunks(chunk_frames):
    array = in_chunks(FRAMES, chunk_frames)
    result = estimate_dask(array, MEAN)
    assert (result.shape, result.chunks) == (array.shape, array.chunks)
    assert (result.dtype, type(result._meta)) == (np.float32, np.ndarray)
    np.testing.assert_array_equal(result.compute(), background(FRAMES))


@pytest.mark.slow
def test_channels_are_estimated_each_with_its_radii():
    estimator = SpatialMean([(1.0, 0.5), (0.8, 0.8)], max_radius_pix=1.1)
    result = estimate_dask(in_chunks(TWO_CHANNELS), estimator)
    expected = np.stack(background([FRAMES, FRAMES[::-1]], estimator), axis=1)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.slow
def test_residual_and_snr_are_of_frames_above_the_offset():
    array = in_chunks(np.maximum(FRAMES, 200))
    frames = np.maximum(FRAMES, 200) - 100.0
    residuals = estimate_dask(array, Half(), quantity="residual", camera=Camera(100))
    np.testing.assert_array_equal(residuals, frames / 2)
    snr = estimate_dask(array, Half(), quantity="snr", camera=Camera(100, 0.5))
    # In float32.
    np.testing.assert_allclose(snr, np.sqrt(frames / 4), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_frames", "halo_frames"), [(1, 1), (6, 4), (23, 50), ((12, 1, 10), 22)]
)
def test_an_estimator_with_a_halo_sees_the_true_ends_of_the_movie(
    halo_frames, chunk_frames
):
    # Whole numbers, whose sums are exact.
    frames, estimator = FRAMES[:, :2, :3], MovingSum(halo_frames)
    array = in_chunks(frames, chunk_frames)
    result = estimate_dask(array, estimator)
    expected = [
        frames[max(0, t - halo_frames) : t + halo_frames + 1].sum(0) for t in range(23)
    ]
    np.testing.assert_array_equal(result.compute(scheduler="synchronous"), expected)
    if (chunk_frames, halo_frames) == (6, 4):
        assert result.chunks == array.chunks


@pytest.mark.slow
def test_weights_are_cut_as_the_frames_are():
    mask = np.random.default_rng(3).integers(0, 3, FRAMES.shape).astype(np.uint8)
    for weights in (mask[0], mask, da.from_array(mask).rechunk((9, 5, 5))):
        result = estimate_dask(in_chunks(FRAMES, 5), Weighted(2), weights=weights)
        frames = FRAMES * np.asarray(weights).astype(float)
        expected = [frames[max(0, t - 2) : t + 3].sum(0) for t in range(23)]
        np.testing.assert_array_equal(result.compute(scheduler="synchronous"), expected)
    both = np.stack([mask, mask[::-1]], axis=1)
    result = estimate_dask(in_chunks(TWO_CHANNELS, 5), Weighted(0), weights=both)
    np.testing.assert_array_equal(result, TWO_CHANNELS * both.astype(np.float32))


def test_weights_that_do_not_fit_are_refused():
    array = in_chunks(FRAMES)
    with pytest.raises(TypeError, match="SpatialMean takes no weights"):
        estimate_dask(array, MEAN, weights=np.ones((10, 11)))
    with pytest.raises(ValueError, match="broadcast"):
        estimate_dask(array, Weighted(0), weights=np.ones((10, 10)))
    result = estimate_dask(array, Weighted(0), weights=-np.ones((10, 11)))
    with pytest.raises(MovieError, match="weights are negative"):
        result.compute(scheduler="synchronous")


def test_chunks_that_cut_a_frame_are_joined():
    array = da.from_array(TWO_CHANNELS).rechunk((5, 1, 10, 4))
    result = estimate_dask(array[:, 0], Half())
    np.testing.assert_array_equal(result, FRAMES / 2)


def test_nothing_is_read_before_it_is_computed():
    def read(block_id):
        raise AssertionError(f"chunk {block_id} was read")

    array = da.map_blocks(
        read, chunks=((4, 4), (5,), (6,)), meta=np.empty((0, 0, 0), np.uint16)
    )
    result = estimate_dask(array, Half())
    with pytest.raises(AssertionError, match="was read"):
        result.compute(scheduler="synchronous")


def test_the_estimator_has_one_key_in_the_graph():
    (result,) = optimize(estimate_dask(in_chunks(FRAMES), MEAN))
    nodes = [pickle.dumps(node) for node in dict(result.__dask_graph__()).values()]
    assert len(nodes) > 5
    assert sum(b"SpatialMean" in node for node in nodes) == 1


def test_names_depend_on_what_the_estimator_holds_and_on_the_settings():
    array = in_chunks(FRAMES)
    names = [
        result.name
        for result in (
            estimate_dask(array, MEAN),
            estimate_dask(array, SpatialMean(1.0, max_radius_pix=1.1)),
            estimate_dask(array, SpatialMean(1.01, max_radius_pix=1.1)),
            estimate_dask(array, SpatialMean(1.0, max_radius_pix=1.1, truncation="hard")),
            estimate_dask(array, MEAN, camera=Camera(1.0)),
            estimate_dask(array, MEAN, dtype="uint16"),
        )
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 5


def test_it_is_unpickled_and_compiled_once_for_many_threads(tmp_path):
    log = tmp_path / "log"
    result = estimate_dask(in_chunks(np.zeros((40, 6, 7)), 3), Marked(log=str(log)))
    log.unlink()
    result.compute(scheduler="threads", num_workers=8)
    events = log.read_text().splitlines()
    # Once for each length of chunks.
    names = sorted(event.split()[0] for event in events)
    assert names == ["compiled", "compiled", "unpickled"]


def test_uint16_is_rounded_to_even_and_clipped():
    frames = np.array([1, 3, 4, -8, 2e5], np.float32).reshape(-1, 1, 1)
    result = estimate_dask(in_chunks(frames, 2), Half(), dtype="uint16")
    assert result.dtype == np.uint16
    assert result.compute().ravel().tolist() == [0, 2, 2, 0, 65535]


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_frame_and_is_refused_as_uint16():
    frames = FRAMES.astype(np.float32)
    frames[13, 4, 4] = np.nan
    array = in_chunks(frames)
    np.testing.assert_array_equal(estimate_dask(array, Half()), frames / 2)
    for estimator in (Half(), MovingSum(1)):
        result = estimate_dask(array, estimator, dtype="uint16")
        frame = 13 - estimator.halo_frames
        with pytest.raises(jaxbkgd.MovieError, match=rf"frame {frame} .*float32"):
            result.compute(scheduler="synchronous")


def test_frames_that_cannot_be_estimated_are_named():
    array = in_chunks(FRAMES).map_blocks(np.ma.array, meta=np.empty((0, 0, 0), np.uint16))
    with pytest.raises(jaxbkgd.MovieError, match=r"frames 5 to 9 .*masked"):
        estimate_dask(array, Half())[7].compute()


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("array", "settings", "error", "message"),
    [
        (FRAMES, {}, TypeError, r"ndarray.*from_array"),
        (da.zeros((4, 5)), {}, ValueError, r"\(4, 5\).*\(frames, height, width\)"),
        (da.zeros((4, 1, 1, 5, 6)), {}, ValueError, r"\(4, 1, 1, 5, 6\)"),
        (da.zeros((4, 0, 5)), {}, ValueError, "0 x 5"),
        (da.zeros((0, 4, 5)), {}, ValueError, "has no frames"),
        (da.zeros((4, 5, 6), dtype=complex), {}, ValueError, "complex128"),
        (da.zeros((4, 5, 6)).map_blocks(np.ma.array), {}, TypeError, "masked"),
        (da.zeros((4, 5, 6))[da.ones(4) > 0], {}, ValueError, "compute_chunk_sizes"),
        (da.zeros((4, 5, 6)), {"quantity": "mean"}, ValueError, "mean"),
        (da.zeros((4, 5, 6)), {"dtype": "int8"}, ValueError, "int8"),
        (da.zeros((4, 5, 6)), {"quantity": "snr"}, ValueError, "gain"),
        (da.zeros((4, 2, 5, 6)), {"camera": 3 * [Camera()]}, ValueError, "2 channels.*3"),
        (da.zeros((4, 3, 5, 6)), {}, ValueError, "radii for 2 channels.*3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    array, settings, error, message
):
    estimator = SpatialMean([(1.0, 1.0), (2.0, 2.0)]) if array.ndim == 4 else MEAN
    with pytest.raises(error, match=message):
        estimate_dask(array, estimator, **settings)


def test_without_dask_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(
        ImportError, match=r"dask\.array; .*pip install 'jaxbkgd\[cluster\]'"
    ):
        estimate_dask(FRAMES, MEAN)


def local_cluster(**settings: Any) -> LocalCluster:
    """Reached from this machine alone, at ports that are free."""
    return LocalCluster(
        host="127.0.0.1",
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        **settings,
    )


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "cluster.py"))


@pytest.mark.slow
def test_the_example_writes_what_an_estimate_in_memory_is(
    tmp_path, monkeypatch, capsys, example
):
    monkeypatch.chdir(tmp_path)
    # In place of the simulated one, which takes long to compile.
    frames = np.random.default_rng(0).poisson(100, (20, 1, 16, 18)).astype(np.uint16)
    sink = open_sink("cluster-movie.ome.zarr", Layout(frames.shape, frames.dtype, 5))
    sink.begin()
    sink.write(0, frames)
    sink.commit()
    cluster = local_cluster(n_workers=1, threads_per_worker=2, processes=False)
    with cluster:
        scheduler = ["--scheduler", cluster.scheduler_address]
        example["main"](["--radius", "1", *scheduler])
        assert "wrote 20 frames to cluster-bkgds.ome.zarr" in capsys.readouterr().out
        for arguments, message in (
            (["missing.zarr"], "missing.zarr: no such file"),
            (["cluster-movie.ome.zarr", "bkgds.tif"], "bkgds.tif: .*.ome.zarr"),
        ):
            with pytest.raises(SystemExit):
                example["main"]([*arguments, *scheduler])
            assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cluster-bkgds.ome.zarr",
        "cluster-movie.ome.zarr",
    ]
    bkgds = zarr.open_array("cluster-bkgds.ome.zarr", path="0", mode="r")
    np.testing.assert_array_equal(bkgds, background(frames[:, 0], SpatialMean(1.0)))


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_and_the_result_is_the_same(tmp_path, example):
    frames = np.random.default_rng(0).integers(0, 65535, (60, 1, 8, 9)).astype(np.uint16)
    frames[40] = 65535
    source, sink, log = (str(tmp_path / name) for name in ("m.zarr", "b.ome.zarr", "log"))
    zarr.create_array(source, data=frames)
    cluster = local_cluster(n_workers=2, threads_per_worker=1)
    with cluster, Client(cluster) as client:
        example["estimate"](client, source, sink, Deadly(log=log), chunk_frames=2)
    assert Path(f"{log}.dead").exists()
    bkgds = zarr.open_array(sink, path="0", mode="r")
    np.testing.assert_array_equal(bkgds, frames[:, 0] / 2)
    # This process compiled nothing, but looked whether the estimator fits.
    events = [line.split(" in ") for line in Path(log).read_text().splitlines()]
    in_workers = [event for event in events if event[1] != str(os.getpid())]
    workers = {process for _, process in in_workers}
    assert len(workers) >= 2
    assert sorted(in_workers) == sorted(
        [event, process] for event in ("unpickled", "compiled") for process in workers
    )

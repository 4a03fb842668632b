"""Benchmark: the mean over time, with and without a clip, beside that of each frame and
smlmlp's pipeline.

    python examples/local_mean_benchmark.py

It prints pixel rates, and ratios to `SpatialMean`. All see the same simulated frames, as
float32 in memory, and take turns; given are medians over rounds, after one that does not
count. Radii are the defaults, 7 px and 10 frames. smlmlp, where it is installed, has
parallel=True.
"""

import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import equinox as eqx
import jax
import numpy as np

import jaxbkgd


SHAPES = ((200, 128, 128), (200, 256, 256), (100, 512, 512))
BASE = "SpatialMean"


def ways(frames: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Ways to the background of the frames."""

    def jitted(estimator: jaxbkgd.AbstractEstimator) -> Callable[[], Any]:
        call = eqx.filter_jit(estimator.for_inference())
        on_device = jax.numpy.asarray(frames)
        return lambda: jax.block_until_ready(call(on_device))

    found = {
        BASE: jitted(jaxbkgd.SpatialMean()),
        "LocalMean, clip=None": jitted(jaxbkgd.LocalMean(clip=None)),
        "LocalMean": jitted(jaxbkgd.LocalMean()),
        "LocalMean, 10 frames": jitted(jaxbkgd.LocalMean(radius_frames=10.0)),
        "LocalMean, 60 frames": jitted(jaxbkgd.LocalMean(radius_frames=60.0)),
    }
    if find_spec("smlmlp") is not None:
        # smlmlp 0.1.20 takes from stacklp what stacklp 0.1.9 does not have.
        stacklp, arrlp = map(import_module, ("stacklp", "arrlp"))
        vars(stacklp).setdefault("get_xp", arrlp.get_xp)
        pipeline = import_module("smlmlp").bkgd_combination
        found["smlmlp's pipeline"] = lambda: pipeline([frames.copy()], parallel=True)
    return found


def rates(shape: tuple[int, int, int], rounds: int = 7) -> dict[str, float]:
    """Of each way, in Mpx/s."""
    frame_count, height_pix, width_pix = shape
    movie, _ = jaxbkgd.simulate_movie(
        jax.random.key(0),
        frame_count=frame_count,
        height_pix=height_pix,
        width_pix=width_pix,
    )
    found = ways(np.asarray(movie, np.float32) - 100)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + rounds):
        for name, way in found.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    megapixels = np.prod(shape) / 1e6
    return {
        name: float(megapixels / statistics.median(times[1:]))
        for name, times in seconds.items()
    }


def main() -> None:
    for shape in SHAPES:
        found = rates(shape)
        print("x".join(map(str, shape)))
        for name, rate in found.items():
            print(f"  {name:22} {rate:6.1f} Mpx/s  {rate / found[BASE]:.2f} of {BASE}")


if __name__ == "__main__":
    # Set on some machines, where they slow NumPy and SciPy down.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    main()

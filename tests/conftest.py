"""What all tests share: fixtures, a cache of compiled programs, and an estimator."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from reference import CUT_SIGMAS, dense_mean, reference_kernel
from xdist.scheduler import WorkStealingScheduling

from jaxbkgd import AbstractEstimator, Background


# JAX reads this when it first looks for its devices; sharding needs two.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in a folder, from which later tests, other workers,
    subprocesses and the next run load them, and lets Ctrl-C through, which a shell has
    processes ignore that it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = {
        "jax_compilation_cache_dir": str(config.rootpath / ".pytest_cache" / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        text = os.environ.setdefault(name.upper(), str(value))
        jax.config.update(name, type(value)(text))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m fast` selects tests that are not marked as slow or long, and no docstrings."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("slow")
        elif not any(map(item.get_closest_marker, ("slow", "long"))):
            item.add_marker("fast")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker has tests that follow one another, which share programs and fixtures, and
    takes some of another's when it has none left."""
    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Programs are let go after each file, and loaded from the folder where another file
    needs them: of thousands in one process, a system may run out of mappings of memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def one_device() -> Iterator[None]:
    """Movies are estimated on one device, as on the machine of most users. Programs are
    compiled for each device."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Where `QUICK_COMPILATION` is set, as in `.ci/run`, what is compiled within is
    optimised little, and takes half as long to compile: for derivatives, searches and
    pages, which compile much and compute little."""
    if not os.environ.get("QUICK_COMPILATION"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quickly_compiled() -> Iterator[None]:
    """Not for programs that are compared with others to the bit, nor for such as these
    share with tests that do so."""
    with quick_compilation():
        yield


@pytest.fixture
def both_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Movies are estimated on both devices that there are."""
    monkeypatch.setattr(jax, "local_devices", jax.devices)


# What others call the mean of each frame by itself.
reference_mean = dense_mean


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX in 64-bit mode."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_installed() -> Iterator[None]:
    """The package without the type checker of these tests, which would answer before the
    package's own checks do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in each run."""
    return np.random.default_rng(20241122)


def reference_noise(
    radius_pix: float | tuple[float, float],
    truncation: str = "hard",
    kind: str = "exact",
) -> float:
    """The norm of the residual's kernel, from the two-dimensional kernel itself."""
    rows = [
        reference_kernel(float(radius), truncation)
        for radius in np.broadcast_to(radius_pix, 2)
    ]
    deltas = [np.arange(row.size) == row.size // 2 for row in rows]
    if kind == "separable":
        residuals = [delta - row for delta, row in zip(deltas, rows, strict=True)]
        return float(np.linalg.norm(np.outer(*residuals)))
    return float(np.linalg.norm(np.outer(*deltas) - np.outer(*rows)))


def entries_of_smooth_taps(low_pix: float, high_pix: float) -> np.ndarray:
    """The radii at which a tap enters a smooth kernel: the cut meets a pixel's edge."""
    distances = np.arange(1, int(CUT_SIGMAS * high_pix / 2) + 2)
    radii = 2 * (distances - 0.5) / CUT_SIGMAS
    return radii[(radii >= low_pix) & (radii <= high_pix)]


def central_difference(function, point, step):
    """The derivative of `function` at `point`, to second order in `step`."""
    return (function(point + step) - function(point - step)) / (2 * step)


class MovingSum(AbstractEstimator):
    """The sum of the frames that there are, up to `reach` before and behind."""

    reach: int = eqx.field(static=True)

    @property
    def halo_frames(self) -> int:
        return self.reach

    def estimate_stack(self, frames: Any) -> Background:
        total = frames = frames.astype(jnp.float32)
        for shift in range(1, min(self.halo_frames, len(frames) - 1) + 1):
            total = total.at[shift:].add(frames[:-shift]).at[:-shift].add(frames[shift:])
        return Background(total, jnp.ones(()))

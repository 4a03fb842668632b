"""What all tests share: the definition of the estimator in float64, written with NumPy
and SciPy alone, and JAX's 64-bit mode."""

import os
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.special import erfinv, ndtr

from jaxbkgd import AbstractEstimator, Background


# JAX reads this when it first looks for its devices; sharding needs two.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in a folder, from which later tests, other workers,
    subprocesses and the next run load them."""
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
    """`-m fast` selects the tests that are not marked as slow."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")


# Half of the central interval that holds 99 % of a normal density, in sigmas.
CUT_SIGMAS = float(np.sqrt(2) * erfinv(0.99))


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


def reference_kernel(radius_pix: float, truncation: str = "hard") -> np.ndarray:
    """All taps along one axis, centre in the middle; those beyond the cut are zero."""
    sigma = radius_pix / 2
    # n = ceil(6 sigma) taps, and one more if n is even: n // 2 on either side.
    half = int(np.ceil(6 * sigma)) // 2
    distance = np.abs(np.arange(-half, half + 1))
    inner, outer = distance - 0.5, distance + 0.5
    if truncation == "smooth":
        cut = CUT_SIGMAS * sigma
        inner, outer = np.clip(inner, -cut, cut), np.clip(outer, -cut, cut)
    # Of the tail, whose differences cancel least.
    taps = ndtr(-inner / sigma) - ndtr(-outer / sigma)
    if truncation == "hard":
        taps[distance > CUT_SIGMAS * sigma] = 0
    return taps / taps.sum()


def reference_mean(
    frames: np.ndarray,
    radius_pix: float | tuple[float, float],
    truncation: str = "hard",
) -> np.ndarray:
    """The background in float64: a sum over the taps that are not zero, so that what is
    not finite goes where IEEE arithmetic takes it, and nowhere else."""
    image = np.asarray(frames, np.float64)
    for axis, radius in zip((-2, -1), np.broadcast_to(radius_pix, 2), strict=True):
        taps = reference_kernel(float(radius), truncation)
        pixels = np.arange(image.shape[axis])
        total = np.zeros_like(image)
        for offset, tap in enumerate(taps, start=-(taps.size // 2)):
            if tap != 0:
                inside = np.clip(pixels + offset, 0, pixels[-1])
                total += tap * np.take(image, inside, axis=axis)
        image = total
    return image


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

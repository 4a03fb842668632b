import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    central_difference,
    CUT_SIGMAS,
    entries_of_smooth_taps,
    reference_kernel,
    reference_noise,
)

from jaxbkgd._filter.kernels import (
    GaussianKernel,
    half_width,
    noise_factor,
    NoiseKind,
    Truncation,
)


TRUNCATIONS: tuple[Truncation, ...] = ("hard", "smooth")
KINDS: tuple[NoiseKind, ...] = ("exact", "separable")

# From kernels of one tap to those wider than most frames; none where a tap enters.
RADII = np.round(np.geomspace(0.3, 100, 80), 4)
LARGEST = 100.0
STEP = 1e-5


def outwards(radius_pix, truncation, half_width):
    """The reference's taps from the centre outwards, `half_width` on a side."""
    taps = reference_kernel(radius_pix, truncation)
    taps = taps[taps.size // 2 :][: half_width + 1]
    return np.pad(taps, (0, half_width + 1 - taps.size))


@ft.cache
def bounded_taps(truncation, order=0):
    """A jitted function from many radii to their taps, under one bound for all."""
    count = half_width(LARGEST, truncation)
    kernel = GaussianKernel(count, truncation, order, is_bound=True)
    return jax.jit(jax.vmap(kernel.taps))


def rounding_of_the_last_tap(radius_pix, dtype):
    """How much the last smooth tap moves as the cut moves by its own rounding: the tap
    is as wide as what the cut leaves of its pixel, however little that is."""
    sigma = radius_pix / 2
    density = np.exp(-(CUT_SIGMAS**2) / 2) / (np.sqrt(2 * np.pi) * sigma * 0.99)
    return np.spacing(dtype(CUT_SIGMAS * sigma)) * density


def check_taps(truncation, dtype, rtol):
    radii = RADII.astype(dtype)
    expected = np.stack(
        [outwards(float(r), truncation, half_width(LARGEST, truncation)) for r in radii]
    )
    taps = np.asarray(bounded_taps(truncation)(radii))
    assert taps.dtype == dtype
    assert np.array_equal(taps == 0, expected == 0)
    allowed = rtol * expected
    if truncation == "smooth":
        for row, radius in zip(allowed, radii, strict=True):
            last = half_width(float(radius), truncation)
            row[last] += rounding_of_the_last_tap(float(radius), dtype)
    assert np.all(np.abs(taps - expected) <= allowed)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_each_tap_is_within_rounding_of_its_float64_value(truncation):
    check_taps(truncation, np.float32, rtol=1e-6)
    with jax.enable_x64(True):
        check_taps(truncation, np.float64, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_bound_changes_no_tap(truncation):
    radii = RADII.astype(np.float32)
    bounded_rows = np.asarray(bounded_taps(truncation)(radii))
    for radius, bounded in zip(radii[::20], bounded_rows[::20], strict=True):
        kernel = GaussianKernel(half_width(float(radius), truncation), truncation)
        taps = np.asarray(jax.jit(kernel.taps)(radius))
        assert np.all(bounded[taps.size :] == 0)
        # The sum of the taps may be taken in another order: one or two roundings.
        np.testing.assert_allclose(bounded[: taps.size], taps, rtol=3e-7)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_half_width_is_the_distance_of_the_last_tap(truncation, x64):
    enters = (
        entries_of_smooth_taps(0.1, LARGEST)
        if truncation == "smooth"
        else 2 * np.arange(1, 128) / CUT_SIGMAS
    )
    radii = np.concatenate(
        [np.linspace(0.01, 99.9, 1999), enters * (1 - 1e-9), enters * (1 + 1e-9)]
    )
    taps = np.asarray(bounded_taps(truncation)(radii))
    last = [np.flatnonzero(row)[-1] for row in taps]
    assert last == [half_width(float(radius), truncation) for radius in radii]
    for radius, index in zip(radii[::40], last[::40], strict=True):
        reference = reference_kernel(radius, truncation)
        assert np.flatnonzero(reference)[-1] == reference.size // 2 + index


@pytest.mark.slow
def test_smooth_taps_are_continuous_where_a_tap_enters(x64):
    enters = entries_of_smooth_taps(0.3, 99)
    taps = bounded_taps("smooth")
    # The slope of a tap is at most about 1 / radius, so 2e-9 px move it by less than
    # 1e-8; a hard cut moves it by more than 1e-5, and so this test would see one.
    jumps = np.abs(taps(enters + 1e-9) - taps(enters - 1e-9)).max(axis=1)
    assert np.all(jumps < 1e-8)
    enters = 2 * np.arange(1, 128) / CUT_SIGMAS
    taps = bounded_taps("hard")
    jumps = np.abs(taps(enters + 1e-9) - taps(enters - 1e-9)).max(axis=1)
    assert np.all(jumps > 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_derived_kernel_has_the_slopes_of_the_taps(truncation, x64):
    count = half_width(LARGEST, truncation)
    slopes = np.asarray(bounded_taps(truncation, order=1)(RADII))
    expected = np.stack(
        [
            central_difference(lambda r: outwards(r, truncation, count), radius, STEP)
            for radius in RADII
        ]
    )
    # Rounding of the taps over the step, 1e-16 / 1e-5, and the step squared.
    np.testing.assert_allclose(slopes, expected, rtol=1e-7, atol=1e-10)

    kernel = GaussianKernel(count, truncation, is_bound=True)
    forward = jax.jit(jax.vmap(jax.jacfwd(kernel.taps)))(RADII)
    # The same derivative by another way; roundings only.
    np.testing.assert_allclose(slopes, forward, rtol=1e-12, atol=1e-15)

    assert kernel.derivative() == GaussianKernel(count, truncation, order=1, is_bound=True)
    curvatures = bounded_taps(truncation, order=2)(RADII)
    expected = central_difference(bounded_taps(truncation, order=1), RADII, STEP)
    # Rounding of the slopes over the step, and the step squared.
    np.testing.assert_allclose(curvatures, expected, rtol=1e-6, atol=1e-8)


@ft.cache
def noise_and_slopes(truncation):
    """A jitted function from many radii (y, x) to their noise factors of both kinds, and
    the slopes of these in both radii."""
    kernel = GaussianKernel(half_width(40.0, truncation), truncation, is_bound=True)

    def factors(pair):
        taps_y, taps_x = (kernel.taps(radius) for radius in pair)
        factors = jnp.stack([noise_factor(taps_y, taps_x, kind) for kind in KINDS])
        return factors, factors

    def function(pair):
        slopes, factors_of_both = jax.jacfwd(factors, has_aux=True)(pair)
        return factors_of_both, slopes

    return jax.jit(jax.vmap(function))


# Pairs (y, x). The last two have one tap along an axis, and with it no "separable"
# noise; the three after them have one tap along both axes, and no noise at all.
PAIRS = np.array(
    [(r, r) for r in (0.8, 1.0, 2.0, 3.0, 5.0, 7.0, 10.5, 20.0, 40.0)]
    + [(1.0, 30.0), (12.0, 2.5), (0.3, 5.0), (5.0, 0.3)]
)
ONE_TAP_PAIRS = np.array([(0.3, 0.3), (0.1, 0.38), (1e-3, 0.2)])
ALL_PAIRS = np.concatenate([PAIRS, ONE_TAP_PAIRS])


@pytest.mark.long
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_noise_factors_are_norms_of_two_dimensional_kernels(truncation):
    expected = [
        [reference_noise(pair, truncation, kind) for kind in KINDS] for pair in ALL_PAIRS
    ]
    # A few roundings.
    for dtype, rtol in ((np.float32, 1e-6), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            factors, slopes = noise_and_slopes(truncation)(ALL_PAIRS.astype(dtype))
            np.testing.assert_allclose(factors, expected, rtol=rtol)
            # One tap leaves no noise and no gradient.
            assert np.all(factors[len(PAIRS) :] == 0)
            assert np.all(slopes[len(PAIRS) :] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_gradients_of_noise_factors_agree_with_differences(truncation, x64):
    _, slopes = noise_and_slopes(truncation)(ALL_PAIRS)

    def factor_along(axis, pair, kind):
        return lambda r: reference_noise(
            np.where(np.arange(2) == axis, r, pair), truncation, kind
        )

    expected = [
        [
            [
                central_difference(factor_along(axis, pair, kind), pair[axis], STEP)
                for axis in (0, 1)
            ]
            for kind in KINDS
        ]
        for pair in PAIRS
    ]
    # Rounding of the factor over the step, and the step squared.
    np.testing.assert_allclose(slopes[: len(PAIRS)], expected, rtol=1e-6, atol=1e-10)

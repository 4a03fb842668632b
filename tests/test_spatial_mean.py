import functools as ft
import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    central_difference,
    CUT_SIGMAS,
    entries_of_smooth_taps,
    reference_noise,
)
from reference import dense_mean

from jaxbkgd import noise_correction, spatial_mean, SpatialMean


FRAMES = np.random.default_rng(3).uniform(50, 150, (2, 14, 17)).astype(np.float32)

# A loss that is linear neither in the frames nor in the radii, of order one.
WEIGHTS = np.random.default_rng(4).uniform(0.5, 1.5, (14, 17)).astype(np.float32)


def loss_of(background, xp):
    return xp.mean(WEIGHTS * xp.sin(background / 40))


def reference_loss(frames, radii, truncation="smooth"):
    return loss_of(dense_mean(frames, tuple(radii), truncation), np)


BOUND = 14.0


def loss(frames, radii, truncation: Any = "smooth"):
    image = spatial_mean(frames, radii, max_radius_pix=BOUND, truncation=truncation)
    return loss_of(image, jnp)


@ft.partial(jax.jit, static_argnames="truncation")
def losses_at(radii, truncation):
    return jax.lax.map(lambda pair: loss(FRAMES.astype(float), pair, truncation), radii)


@jax.jit
def losses_and_gradients(radii):
    """For each of 80 pairs of radii: the loss and its gradients in frames and radii."""
    function = jax.value_and_grad(loss, (0, 1))
    return jax.lax.map(lambda pair: function(FRAMES.astype(float), pair), radii)


@pytest.fixture(scope="module")
def radii_and_step():
    """80 pairs of radii between 0.5 and 12 px, among them both sides of each place where
    a tap enters, and a step that does not cross such a place."""
    step = 1e-4
    enters = entries_of_smooth_taps(0.5 + 2 * step, 12 - 2 * step)
    sides = np.concatenate([enters - 2 * step, enters + 2 * step])
    between = np.linspace(0.503, 11.97, 80 - sides.size)
    radii = np.sort(np.concatenate([sides, between]))
    distances = np.abs(radii[:, None] - entries_of_smooth_taps(0.3, 13)).min(axis=1)
    assert radii.size == 80
    assert distances.min() > step
    # Each radius once along y and once along x, beside another.
    return np.stack([radii, np.roll(radii, 31)], axis=1), step


@pytest.mark.usefixtures("quickly_compiled")
class TestDerivatives:
    @pytest.mark.long
    def test_gradients_agree_with_differences(self, radii_and_step, rng, x64):
        radii, step = radii_and_step
        losses, (d_frames, d_radii) = losses_and_gradients(radii)
        frames = FRAMES.astype(float)
        expected = [reference_loss(frames, pair) for pair in radii]
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        for axis in (0, 1):
            along = np.eye(2)[axis]
            differences = [
                central_difference(
                    lambda t, pair=pair, along=along: reference_loss(
                        frames, pair + t * along
                    ),
                    0.0,
                    step,
                )
                for pair in radii
            ]
            # The step squared, 1e-8, and roundings over the step, 1e-12, of order one.
            np.testing.assert_allclose(d_radii[:, axis], differences, rtol=1e-6)
        direction = rng.normal(size=frames.shape)
        differences = [
            central_difference(
                lambda t, pair=pair: reference_loss(frames + t * direction, pair),
                0.0,
                1e-2,
            )
            for pair in radii
        ]
        slopes = np.tensordot(d_frames, direction, axes=3)
        # The step over 40, squared.
        np.testing.assert_allclose(slopes, differences, rtol=1e-6)

    @pytest.mark.long
    def test_the_loss_is_continuous_where_a_tap_enters(self, x64):
        for truncation, enters in [
            ("smooth", entries_of_smooth_taps(0.5, 12)),
            ("hard", 2 * np.arange(1, 16) / CUT_SIGMAS),
        ]:
            pairs = np.repeat(enters[:, None], 2, axis=1)
            sides = losses_at(np.concatenate([pairs - 1e-9, pairs + 1e-9]), truncation)
            jumps = np.abs(sides[: len(pairs)] - sides[len(pairs) :])
            # The slope is at most of order one. "hard" shows that a jump would be seen.
            assert np.all(jumps < 1e-8) == (truncation == "smooth")
            assert np.all(jumps > 1e-7) == (truncation == "hard")

    @pytest.mark.long
    def test_the_hessian_agrees_with_differences(self, x64):
        pairs = np.array([(0.9, 4.0), (2.0, 2.1), (7.0, 7.1), (11.3, 3.0), (9.0, 11.5)])
        step = 1e-5
        gradient = jax.grad(ft.partial(loss, FRAMES.astype(float)))

        @jax.jit
        def column(pair, direction):
            return jax.jvp(gradient, (pair,), (direction,))[1]

        hessians = np.array([[column(pair, axis) for axis in np.eye(2)] for pair in pairs])
        shifts = step * np.concatenate([np.eye(2), -np.eye(2)])[:, None]
        shifted = np.pad((pairs + shifts).reshape(-1, 2), ((0, 60), (0, 0)), "edge")
        _, (_, gradients) = losses_and_gradients(shifted)
        up_y, up_x, down_y, down_x = np.split(np.asarray(gradients[:20]), 4)
        expected = np.stack([up_y - down_y, up_x - down_x], axis=1) / (2 * step)
        scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
        assert np.all(np.abs(hessians - expected) <= 1e-4 * scale)


NOISE_RADII = [2.0, 3.0, 5.0, 7.0, 10.0, 20.0, (2.0, 7.0), (12.0, 1.5)]


class TestNoise:
    @pytest.mark.slow
    @pytest.mark.parametrize("truncation", ["hard", "smooth"])
    def test_exact_is_what_monte_carlo_measures(self, truncation):
        rng = np.random.default_rng(20241122)
        frames = rng.standard_normal((48, 128, 128), np.float32)
        bound = {"max_radius_pix": 20.0, "truncation": truncation}

        @jax.jit
        def measure(pair):
            # Away from the borders; the half-width at 20 px is 26.
            residuals = (frames - spatial_mean(frames, pair, **bound))[:, 26:-26, 26:-26]
            return jnp.mean(residuals**2, (1, 2)), noise_correction(pair, **bound)

        for radius_pix in NOISE_RADII:
            variances, factor = measure(np.broadcast_to(np.float32(radius_pix), 2))
            variances = np.asarray(variances, np.float64)
            standard_error = variances.std(ddof=1) / np.sqrt(variances.size)
            assert abs(variances.mean() - factor**2) < 4 * standard_error

    @pytest.mark.parametrize(
        ("kind", "expected", "rounding"),
        [
            # What smlmlp 0.1.20 gives, and what its residuals were measured to have.
            ("separable", [0.502, 0.659, 0.794, 0.853, 0.896, 0.948], 5e-4),
            ("exact", [0.881, 0.946, 0.980, 0.990, 0.995, 0.999], 1e-3),
        ],
    )
    def test_the_factors_are_those_published(self, kind, expected, rounding):
        bounded = ft.partial(noise_correction, max_radius_pix=20.0, noise=kind)
        factors = jax.jit(jax.vmap(bounded))(np.array(NOISE_RADII[:6], np.float32))
        np.testing.assert_allclose(factors, expected, atol=rounding)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["exact", "separable"])
    def test_a_bound_changes_no_factor(self, kind):
        for bound in (None, 40.0):
            factor = noise_correction((2.0, 7.0), max_radius_pix=bound, noise=kind)
            # float32.
            expected = reference_noise((2.0, 7.0), kind=kind)
            np.testing.assert_allclose(factor, expected, rtol=1e-6)


def set_parameters(module, value):
    return eqx.tree_at(
        lambda m: m.unbounded_radii, module, jnp.full_like(module.unbounded_radii, value)
    )


@eqx.filter_jit
def module_loss_and_gradient(module, frames, target):
    def loss(module):
        background = module(frames)
        error = jnp.mean((background.bkgds - target) ** 2)
        return error + background.noise_corrections

    return eqx.filter_value_and_grad(loss)(module)


class TestModule:
    def test_its_radii_are_its_only_leaves(self):
        for radii_pix, shape in [
            (7.0, (1, 1)),
            ((6.0, 10.0), (1, 2)),
            ([(6.0, 10.0), (3.0, 4.0)], (2, 2)),
            ([3.0, 4.0, 5.0], (3, 1)),
            ([3.0, (4.0, 5.0)], (2, 2)),
        ]:
            module = SpatialMean(radii_pix)
            (leaf,) = jax.tree.leaves(module)
            assert eqx.is_inexact_array(leaf)
            assert leaf.shape == shape
            assert module.radii_pix.shape == (shape[0], 2)

    def test_it_is_saved_and_loaded(self, tmp_path):
        saved = SpatialMean([(2.0, 5.0), (3.0, 4.0)], max_radius_pix=20.0)
        eqx.tree_serialise_leaves(tmp_path / "module.eqx", saved)
        blank = SpatialMean([(1.0, 1.0), (1.0, 1.0)], max_radius_pix=20.0)
        loaded = eqx.tree_deserialise_leaves(tmp_path / "module.eqx", blank)
        assert eqx.tree_equal(loaded, saved)

    def test_radii_come_back(self):
        for bound in (0.01, 1.0, 30.0, 1e5):
            for fraction in [1e-6, 1e-3, 0.1, 0.25, 0.5, 0.9, 0.999, 0.999999]:
                radius = bound * fraction
                module = SpatialMean(radius, max_radius_pix=bound)
                np.testing.assert_allclose(module.radii_pix, radius, rtol=1e-6)
        radii = [(6.0, 10.0), (0.5, 4.0)]
        np.testing.assert_allclose(SpatialMean(radii).radii_pix, radii, rtol=1e-6)

    def test_the_bound_is_four_times_the_largest_radius(self):
        assert SpatialMean().max_radius_pix == 28.0
        assert SpatialMean().halo_frames == 0
        assert SpatialMean([(1.0, 10.0), 3.0]).max_radius_pix == 40.0
        assert SpatialMean(7.0, max_radius_pix=9.5).max_radius_pix == 9.5

    @pytest.mark.long
    def test_with_known_radii_it_has_no_more_taps_than_they_need(self):
        module = SpatialMean([(2.0, 3.0), (4.0, 1.0)])
        channels = [FRAMES, FRAMES[:, 1:]]
        known = module(channels)
        # Of a radius of 4 px: 1.29 times as many pixels, to the nearest.
        fixed = eqx.filter_jit(module.for_inference())(channels)
        closed_over = jax.jit(lambda channels: module(channels))(channels)
        jax.tree.map(np.testing.assert_array_equal, closed_over, known)
        bounded = eqx.filter_jit(module)(channels)
        for bkgd, same, close in zip(known.bkgds, fixed.bkgds, bounded.bkgds, strict=True):
            np.testing.assert_array_equal(bkgd, same)
            # Of the largest input: what the order of a sum in float32 makes.
            np.testing.assert_allclose(bkgd, close, atol=2e-6 * FRAMES.max())
        np.testing.assert_array_equal(fixed.noise_corrections, known.noise_corrections)

    @pytest.mark.slow
    def test_radii_that_training_has_lost_give_no_background(self):
        lost = set_parameters(SpatialMean(3.0), np.nan)
        assert np.isnan(lost(FRAMES).bkgds).all()

    @pytest.mark.long
    @pytest.mark.usefixtures("quickly_compiled")
    def test_no_step_leads_out_of_the_bound(self):
        module, target = SpatialMean(3.0), FRAMES.mean()
        for parameter in [-1e6, -1e3, -100.0, -90.0, -60.0, -45.0, -20.0]:
            moved = set_parameters(module, parameter)
            assert np.all(moved.radii_pix > 0)
            value, gradient = module_loss_and_gradient(moved, FRAMES, target)
            # A kernel of one tap gives the frame itself, and no noise.
            expected = np.mean((FRAMES.astype(float) - target) ** 2)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            assert np.all(np.isfinite(gradient.unbounded_radii))
        for parameter in [16.0, 20.0, 100.0, 1e6]:
            moved = set_parameters(module, parameter)
            assert np.all(moved.radii_pix < module.max_radius_pix)
            value, gradient = module_loss_and_gradient(moved, FRAMES, target)
            widest = dense_mean(FRAMES, 12.0, "smooth")
            expected = np.mean((widest - target) ** 2) + reference_noise(12.0, "smooth")
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            assert np.all(np.isfinite(gradient.unbounded_radii))

    def test_radii_stay_below_any_bound(self):
        for bound in (1e-3, 1.0000001, 1.9999999, 77.7, 1e5):
            module = set_parameters(SpatialMean(bound / 3, max_radius_pix=bound), 1e6)
            assert np.all(np.asarray(module.radii_pix, float) < bound)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("noise", "truncation"), [("exact", "smooth"), ("separable", "hard")]
    )
    def test_it_is_the_function(self, noise, truncation):
        module = SpatialMean((2.0, 5.0), truncation=truncation, noise=noise)
        background = module(FRAMES)
        expected = spatial_mean(FRAMES, (2.0, 5.0), truncation=truncation)
        # float32, and radii that come back to 1e-6.
        np.testing.assert_allclose(background.bkgds, expected, rtol=1e-6)
        np.testing.assert_allclose(
            background.noise_corrections,
            noise_correction((2.0, 5.0), truncation=truncation, noise=noise),
            rtol=3e-6,
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("radii", [[2.0, (3.0, 1.0), 5.0], (3.0, 1.0)], ids=str)
    def test_each_channel_has_its_own_radii_or_one_entry_serves_all(self, radii):
        channels = [FRAMES, FRAMES[:1, :9], np.round(FRAMES[0]).astype(np.uint16)]
        background = SpatialMean(radii)(channels)
        for bkgd, factor, channel, radius in zip(
            background.bkgds,
            background.noise_corrections,
            channels,
            radii if len(radii) == 3 else 3 * [radii],
            strict=True,
        ):
            expected = dense_mean(channel, radius, "smooth")
            np.testing.assert_allclose(bkgd, expected, rtol=2e-6)
            expected = reference_noise(radius, "smooth")
            np.testing.assert_allclose(factor, expected, rtol=2e-6)

    @pytest.mark.long
    @pytest.mark.usefixtures("quickly_compiled")
    def test_its_gradients_are_those_of_the_function(self, x64):
        module = SpatialMean([(2.0, 5.0), 3.0], max_radius_pix=BOUND)
        channels = [FRAMES.astype(float), FRAMES[:1].astype(float)]

        @eqx.filter_jit
        @eqx.filter_grad
        def gradient(module):
            background = module(channels)
            return sum(
                loss_of(bkgd, jnp) + factor
                for bkgd, factor in zip(
                    background.bkgds, background.noise_corrections, strict=True
                )
            )

        slopes = gradient(module).unbounded_radii
        assert slopes.shape == (2, 2)
        for channel, radii in enumerate(np.asarray(module.radii_pix)):
            for axis in (0, 1):

                def function(radius, channel=channel, axis=axis, radii=radii):
                    pair = tuple(np.where(np.arange(2) == axis, radius, radii))
                    noise = reference_noise(pair, "smooth")
                    return reference_loss(channels[channel], pair) + noise

                slope = central_difference(function, radii[axis], 1e-5)
                # The derivative of the bounded radius in its parameter.
                slope *= radii[axis] * (1 - radii[axis] / BOUND)
                np.testing.assert_allclose(slopes[channel, axis], slope, rtol=1e-6)

    def test_it_prints_what_it_was_made_of(self):
        module = SpatialMean((6.0, 16.0), max_radius_pix=32.0, noise="separable")
        expected = (
            r"SpatialMean\(radii_pix=\(\((6\.0|5\.9)\d*, 16\.0\d*\),\), max_radius_pix=32.0"
            r", truncation='smooth', noise='separable', frozen=\(\(False, False\),\)\)"
        )
        assert re.fullmatch(expected, repr(module))
        traced = []
        jax.jit(lambda module: traced.append(repr(module)))(module)
        assert "SpatialMean(" in traced[0]

    def test_radii_can_be_replaced(self):
        module = SpatialMean(3.0)
        other = SpatialMean(5.0, max_radius_pix=module.max_radius_pix)
        replaced = eqx.tree_at(lambda m: m.unbounded_radii, module, other.unbounded_radii)
        np.testing.assert_allclose(replaced.radii_pix, [(5.0, 5.0)], rtol=1e-6)
        assert eqx.tree_equal(replaced, other)

    @pytest.mark.parametrize(
        ("radii_pix", "frozen", "mask"),
        [
            (3.0, True, [[True]]),
            (3.0, False, [[False]]),
            ((3.0, 4.0), (True, False), [[True, False]]),
            ((3.0, 4.0), [[False, True]], [[False, True]]),
            ([3.0, 4.0, 5.0], [False, True, False], [[False], [True], [False]]),
            ([(3.0, 4.0), 5.0], [True, False], [[True, True], [False, False]]),
            ([(3.0, 4.0), 5.0], [(True, False), True], [[True, False], [True, True]]),
            ([(3.0, 4.0), 5.0], np.eye(2, dtype=bool), [[True, False], [False, True]]),
        ],
    )
    def test_frozen_radii_have_no_gradient(self, radii_pix, frozen, mask):
        module = SpatialMean(radii_pix, frozen=frozen)
        np.testing.assert_array_equal(module.radii_pix, SpatialMean(radii_pix).radii_pix)
        gradient = eqx.filter_grad(lambda module: module.radii_pix.sum())(module)
        np.testing.assert_array_equal(gradient.unbounded_radii == 0, mask)
        moved = eqx.apply_updates(module, gradient)
        both = np.broadcast_to(mask, module.radii_pix.shape)
        np.testing.assert_array_equal(moved.radii_pix == module.radii_pix, both)

    def test_traced_radii_make_a_module_where_a_bound_is_given(self):
        def radii_of(radius):
            return SpatialMean(radius, max_radius_pix=10.0).radii_pix

        radii, slope = jax.jit(lambda r: jax.jvp(radii_of, (r,), (jnp.ones(()),)))(3.0)
        # There and back again: roundings of float32.
        np.testing.assert_allclose(radii, [(3.0, 3.0)], rtol=1e-6)
        np.testing.assert_allclose(slope, [(1.0, 1.0)], rtol=1e-6)


class Value:
    """What no number is, with a name that an error must repeat."""

    def __repr__(self):
        return "<a value>"


# Each with what the message must name.
NOT_NUMBERS = [
    (True, "True"),
    ("7", "'7'"),
    (1j, "1j"),
    (None, "None"),
    (b"7", "b'7'"),
    (Value(), "<a v"),
]
NOT_RADII = [
    (0, "0"),
    (0.0, "0.0"),
    (-1.0, "-1.0"),
    (math.nan, "nan"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    ((3.0, 0.0), "0.0"),
    ((3.0, math.nan), "nan"),
    (np.float32(-2.5), "-2.5"),
    ([], r"\[\]"),
    ((1.0, 2.0, 3.5), "3.5"),
    (np.ones((2, 2, 2)), "1."),
    (1e300, "1e\\+300"),
]


@pytest.mark.usefixtures("as_installed")
class TestBadInput:
    """Each value that cannot be right is refused at the door, with its name."""

    @pytest.mark.parametrize("bound", [None, 9.0])
    @pytest.mark.parametrize(("radius_pix", "name"), [*NOT_NUMBERS, *NOT_RADII])
    def test_a_radius(self, radius_pix, name, bound):
        for call in (
            lambda: spatial_mean(FRAMES, radius_pix, max_radius_pix=bound),
            lambda: noise_correction(radius_pix, max_radius_pix=bound),
        ):
            with pytest.raises((TypeError, ValueError), match=name):
                call()
            with pytest.raises((TypeError, ValueError), match=name):
                jax.jit(call)()

    @pytest.mark.parametrize(
        ("radii_pix", "name"),
        [
            *NOT_NUMBERS,
            *(entry for entry in NOT_RADII if entry[1] != "3.5"),
            ([(1.0, 2.0), (3.0, -4.0)], "-4.0"),
            ([(1.0, 2.0, 3.5)], "3.5"),
            ([3.0, (1.0, 2.0, 3.5)], "3.5"),
            ((True, 2.0), "radi"),
            ((2.0, "3"), "radi"),
            ((2.0, None), "radi"),
            (((True, 2.0), (3.0, 3.0)), "radi"),
        ],
    )
    def test_radii_of_a_module(self, radii_pix, name):
        for bound in (None, 100.0):
            with pytest.raises((TypeError, ValueError), match=name):
                SpatialMean(radii_pix, max_radius_pix=bound)

    def test_radii_without_their_mask(self):
        radii = np.ma.masked_array([3.0, 4.0], [True, False])
        with pytest.raises((TypeError, ValueError), match="mask"):
            spatial_mean(FRAMES, radii)

    @pytest.mark.slow
    @pytest.mark.parametrize("function", [ft.partial(spatial_mean, FRAMES), SpatialMean])
    def test_a_radius_above_its_bound(self, function):
        for radius_pix in [9.5, (2.0, 9.5)]:
            with pytest.raises(ValueError, match=r"9\.5"):
                function(radius_pix, max_radius_pix=9.0)
        # A module's radii must lie below their bound, not on it.
        with pytest.raises(ValueError, match=r"9\.0"):
            SpatialMean(9.0, max_radius_pix=9.0)
        assert spatial_mean(FRAMES, 9.0, max_radius_pix=9.0).shape == FRAMES.shape

    @pytest.mark.parametrize("function", [ft.partial(spatial_mean, FRAMES), SpatialMean])
    @pytest.mark.parametrize(
        ("bound", "name"),
        [entry for entry in (*NOT_NUMBERS, *NOT_RADII) if entry[0] is not None],
    )
    def test_a_bound(self, function, bound, name):
        with pytest.raises((TypeError, ValueError), match=name):
            function(1e-3, max_radius_pix=bound)

    @pytest.mark.parametrize(
        "function", [ft.partial(spatial_mean, FRAMES), noise_correction, SpatialMean]
    )
    def test_a_traced_radius_without_a_bound_and_a_traced_bound(self, function):
        with pytest.raises(ValueError, match="max_radius_pix"):
            jax.jit(function)(3.0)
        with pytest.raises(ValueError, match="max_radius_pix"):
            jax.jit(lambda radius: function((3.0, radius)))(3.0)
        with pytest.raises(TypeError, match="max_radius_pix"):
            jax.jit(lambda bound: function(3.0, max_radius_pix=bound))(9.0)

    @pytest.mark.parametrize("radius", [1j, True])
    def test_a_traced_radius_that_is_no_real_number(self, radius):
        with pytest.raises(TypeError, match=r"complex64|bool"):
            jax.jit(lambda r: spatial_mean(FRAMES, r, max_radius_pix=9.0))(radius)

    @pytest.mark.parametrize("known", [-2.0, 0.0, math.nan, 9.5])
    def test_a_known_radius_beside_a_traced_one(self, known):
        with pytest.raises(ValueError, match=f"{known}"):
            jax.jit(lambda r: spatial_mean(FRAMES, (r, known), max_radius_pix=9.0))(3.0)

    @pytest.mark.parametrize(
        ("frames", "name"),
        [
            (FRAMES + 1j, "complex"),
            (np.full((3, 4), "a"), "<U1"),
            ("frames", "<U6"),
            (None, "object"),
            (FRAMES.astype(object), "object"),
            (np.zeros((3, 4), "M8[s]"), "datetime"),
            (np.zeros((3, 4), "m8[s]"), "timedelta"),
            (np.zeros((3, 4), "f4,f4"), "f0"),
            (np.ma.masked_array(FRAMES), "masked"),
            (FRAMES[0, 0], r"\(17,\)"),
            (3.0, r"\(\)"),
            (FRAMES[:, :0], r"\(2, 0, 17\)"),
            (FRAMES[:, :, :0], r"\(2, 14, 0\)"),
            (np.zeros((0, 0)), r"\(0, 0\)"),
            ([], r"\(0,\)"),
        ],
    )
    def test_frames(self, frames, name):
        with pytest.raises((TypeError, ValueError), match=name):
            spatial_mean(frames, 3.0)
        with pytest.raises((TypeError, ValueError), match=name):
            SpatialMean(3.0)((frames,))
        if isinstance(frames, np.ndarray) and frames.dtype.kind in "fc":
            array = jnp.asarray(np.asarray(frames))
            if not isinstance(frames, np.ma.MaskedArray):
                with pytest.raises((TypeError, ValueError), match=name):
                    jax.jit(lambda f: spatial_mean(f, 3.0))(array)

    @pytest.mark.parametrize(
        ("radii_pix", "frozen"),
        [
            (3.0, (True, False)),
            (3.0, 1),
            (3.0, None),
            (3.0, "True"),
            (3.0, []),
            ((3.0, 4.0), (True, False, True)),
            ((3.0, 4.0), (True, None)),
            ((3.0, 4.0), (1, 0)),
            ([3.0, 4.0, 5.0], (True, False)),
            ([3.0, 4.0, 5.0], [(True, False)] * 3),
            ([(3.0, 4.0), 5.0], [(True, False, True), True]),
        ],
    )
    def test_what_is_frozen(self, radii_pix, frozen):
        with pytest.raises(ValueError, match=r"frozen must be .*\(channels, axes\)"):
            SpatialMean(radii_pix, frozen=frozen)

    @pytest.mark.parametrize("choice", ["soft", "", None, 1, ["hard"]])
    def test_a_choice_that_is_none(self, choice):
        for name, call in [
            ("truncation", lambda: spatial_mean(FRAMES, 3.0, truncation=choice)),
            ("truncation", lambda: noise_correction(3.0, truncation=choice)),
            ("truncation", lambda: SpatialMean(3.0, truncation=choice)),
            ("noise", lambda: noise_correction(3.0, noise=choice)),
            ("noise", lambda: SpatialMean(3.0, noise=choice)),
        ]:
            with pytest.raises((TypeError, ValueError), match=name):
                call()


@pytest.mark.parametrize("radius_pix", [1e-3, 1e-12, 1e-30, 1e-50, 5e-324])
@pytest.mark.parametrize("truncation", ["hard", "smooth"])
def test_a_radius_much_below_a_pixel_gives_the_frame_itself(radius_pix, truncation):
    image = spatial_mean(FRAMES, radius_pix, truncation=truncation)
    assert np.array_equal(image, FRAMES)
    assert noise_correction(radius_pix, truncation=truncation) == 0

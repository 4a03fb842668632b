"""LocalMean with several patterns of light."""

import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import central_difference

import jaxbkgd
from jaxbkgd import (
    Chained,
    estimate_movie,
    lazy_estimate,
    LocalMean,
    SoftClip,
)


# Photo-electrons: an even light that falls off to one side, and in every third frame one
# that rises there, with some molecules.
SHAPE = (48, 40, 40)
Y, X = np.mgrid[:40, :40]
FIRST, SECOND = 60 + Y - X, 5 + 0.8 * X
_RNG = np.random.default_rng(3)
FLICKER = _RNG.uniform(0.9, 1.1, SHAPE[0])
PULSE = (np.arange(SHAPE[0]) % 3 == 0) * _RNG.uniform(0.8, 1.2, SHAPE[0])
TRUTH = FLICKER[:, None, None] * FIRST + PULSE[:, None, None] * SECOND
MOLECULES = np.zeros(SHAPE)
for frame, y, x in _RNG.integers([0, 3, 3], [48, 37, 37], (40, 3)):
    MOLECULES[frame] += 60 * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / 3.4)
FRAMES = _RNG.poisson(TRUTH + MOLECULES).astype(np.float32)
# With the first pattern alone; and several times as long as estimators of it see.
ONE_PATTERN = _RNG.poisson(FLICKER[:, None, None] * FIRST + MOLECULES).astype(np.float32)
LONG = np.concatenate([FRAMES, FRAMES[::-1], FRAMES])
LIGHT = np.stack([FLICKER, PULSE])


def local_mean(**options: Any) -> LocalMean:
    # Few rounds, so that less is compiled.
    clip = SoftClip(rounds=2)
    options = {"illumination_rank": 2, "block_frames": 2, "clip": clip} | options
    return LocalMean(options.pop("radii_pix", 6.0), options.pop("radius", 6.0), **options)


def seeing_few_frames(**options: Any) -> LocalMean:
    module = local_mean(radius=1.5, radii_pix=2.0, block_frames=1, **options)
    return module.with_patterns(FRAMES).for_inference()


def error(estimator: Any, frames=FRAMES, **options: Any) -> float:
    return float(np.sqrt(np.mean((estimator(frames, **options).bkgds - TRUTH) ** 2)))


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_a_second_pattern_is_followed_from_frame_to_frame():
    assert error(local_mean(illumination_rank=1)) > 3.0
    learned = local_mean().with_patterns(FRAMES)
    # The noise of a mean under such small radii, of two patterns.
    assert error(learned) < 0.9
    # Nothing is so bright. The program is that of any threshold.
    unclipped = local_mean(clip=SoftClip(100.0, rounds=2), patterns=learned.patterns)
    assert error(unclipped) > 1.2 * error(learned)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_auto_counts_the_patterns():
    learned = local_mean(illumination_rank="auto").with_patterns(FRAMES)
    assert learned.patterns is not None
    assert [len(of_one) for of_one in learned.patterns] == [2]
    np.testing.assert_array_equal(
        learned(FRAMES).bkgds, local_mean(illumination_rank="auto")(FRAMES).bkgds
    )
    steady = local_mean(illumination_rank="auto").with_patterns(ONE_PATTERN)
    assert steady.patterns is not None
    assert len(steady.patterns[0]) == 1
    one = local_mean(illumination_rank=1)(ONE_PATTERN)
    np.testing.assert_array_equal(steady(ONE_PATTERN).bkgds, one.bkgds)
    assert steady(ONE_PATTERN).illumination.shape == SHAPE[:1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 17])
def test_auto_takes_no_more_patterns_than_squares_can_tell(width):
    noise = np.random.default_rng(0).poisson(100, (40, 16, width))
    learned = local_mean(illumination_rank="auto").with_patterns(noise)
    assert learned.patterns is not None
    assert learned.patterns[0].shape == (1, 1, width - 15)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_what_is_learned_before_and_in_a_call_is_nearly_the_same():
    learned = local_mean().with_patterns(FRAMES)
    np.testing.assert_allclose(learned(FRAMES).bkgds, local_mean()(FRAMES).bkgds, atol=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_a_known_illumination_gives_the_patterns():
    known = local_mean().with_patterns(FRAMES, illumination=LIGHT)
    assert error(known) < 0.9
    background = known(FRAMES)
    assert background.illumination.shape == (2, *SHAPE[:1])
    # The light is found anew, in a unit of its own.
    found = np.corrcoef(background.illumination[1], PULSE)[0, 1]
    assert found > 0.99


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"clip": None, "kernel_order": 2}])
def test_chunks_give_the_bits_of_the_whole(options):
    learned = seeing_few_frames(**options)
    assert learned.halo_frames < 48
    whole, sink = learned(LONG), np.zeros(LONG.shape, np.float32)
    summary = estimate_movie(LONG, learned, sink, chunk_frames=48, progress=False)
    np.testing.assert_array_equal(sink, whole.bkgds)
    np.testing.assert_array_equal(summary.lights[0], whole.illumination)


@pytest.mark.long
def test_a_movie_is_estimated_with_patterns_of_its_own():
    # In the programs of the test above.
    few: Any = {"radius": 1.5, "radii_pix": 2.0, "block_frames": 1}
    module, sink = local_mean(illumination_rank="auto", **few), np.zeros_like(LONG)
    summary = estimate_movie(LONG, module, sink, chunk_frames=48, progress=False)
    learned = module.with_patterns(LONG)
    assert isinstance(summary.estimator, LocalMean)
    np.testing.assert_array_equal(summary.estimator.patterns, learned.patterns)
    np.testing.assert_array_equal(sink, learned.for_inference()(LONG).bkgds)
    with lazy_estimate(LONG, module, chunk_frames=48) as lazy:
        np.testing.assert_array_equal(lazy[3:5], sink[3:5])


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_the_patterns_are_saved():
    learned = local_mean().with_patterns([FRAMES, FRAMES[:, ::2]])
    restored = LocalMean.from_json(learned.to_json())
    assert restored.patterns is not None
    assert learned.patterns is not None
    for found, kept in zip(restored.patterns, learned.patterns, strict=True):
        assert found.dtype == kept.dtype
        np.testing.assert_array_equal(found, kept)
    assert restored.illumination_rank == 2


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        frames = jnp.asarray(FRAMES[:12, :34, :34], jnp.float64)
        module = local_mean(radii_pix=(2.0, 1.5), radius=2.0, max_radius_pix=3.0)
        module = module.with_patterns(frames)
        learned, rest = eqx.partition(module, eqx.is_inexact_array)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=frames.shape))
        point, as_module = jax.flatten_util.ravel_pytree((learned, 1.0))
        direction = jnp.asarray(np.random.default_rng(2).normal(size=frames.shape))

        def loss(point):
            learned, step = as_module(point)
            background = eqx.combine(learned, rest)(frames + step * direction)
            return jnp.sum(weights * background.bkgds) / 100

        # One program, also for the differences.
        value_and_gradient = jax.jit(jax.value_and_grad(loss))
        gradient = np.asarray(value_and_gradient(point)[1])
        # But for the radius over which steady light is averaged: all frames are seen.
        assert np.count_nonzero(gradient) == point.size - 1
        for value, axis in zip(gradient, np.eye(point.size), strict=True):
            expected = central_difference(
                lambda x, axis=axis: value_and_gradient(point + x * axis)[0], 0.0, 1e-6
            )
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_masked_pixels_and_frames_have_no_influence():
    mask = np.ones(SHAPE, bool)
    mask[:, 4:9, 7] = mask[:, 20:36, 16:32] = mask[7] = False
    spoilt = np.where(mask, FRAMES, 1e6).astype(np.float32)
    learned = local_mean().with_patterns(spoilt, mask)
    background = learned(spoilt, mask)
    assert np.isfinite(background.bkgds).all()
    is_near = np.abs(background.bkgds - TRUTH)[mask]
    assert np.sqrt(np.mean(is_near**2)) < 1.1
    filled = np.where(mask, FRAMES, 0).astype(np.float32)
    np.testing.assert_array_equal(background.bkgds, learned(filled, mask).bkgds)
    # A frame that is not seen has the light around it.
    assert background.bkgds[7].mean() == pytest.approx(TRUTH[5:10].mean(), rel=0.1)
    lost = np.where(mask, FRAMES, np.nan).astype(np.float32)
    skipping = local_mean(skips_nan=True, patterns=learned.patterns)
    np.testing.assert_allclose(skipping(lost).bkgds, background.bkgds, rtol=1e-5)


@pytest.mark.long
def test_a_nan_reaches_the_frames_that_see_it():
    module, spoilt = seeing_few_frames(), LONG.copy()
    spoilt[0, 3, 3] = np.nan
    background = module(spoilt)
    reach = module.halo_frames
    assert np.isnan(background.bkgds[0]).all()
    np.testing.assert_array_equal(
        background.bkgds[reach + 1 :], module(LONG).bkgds[reach + 1 :]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_dark_frames_are_dark():
    dark = FRAMES.copy()
    dark[10] = 0
    learned = local_mean().with_patterns(FRAMES)
    background = learned(dark).bkgds
    np.testing.assert_allclose(background[10], 0, atol=1e-3)
    others = np.delete(background - TRUTH, 10, 0)
    assert np.sqrt(np.mean(others**2)) < 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_compiled")
def test_dark_frames_are_no_pattern(rng):
    frames = rng.poisson(60, SHAPE).astype(np.float32)
    # The noise of a camera, of which a little light is left by chance.
    frames[5::10] = rng.normal(0.02, 1.5, frames[5::10].shape)
    learned = local_mean(illumination_rank="auto").with_patterns(frames)
    assert learned.patterns is not None
    assert len(learned.patterns[0]) == 1


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("rank", [2, 3])
def test_the_noise_correction_is_that_of_noise(rank):
    # Patterns that are there all the time, mixed anew in each frame.
    rng = np.random.default_rng(0)
    light = rng.uniform(0.5, 1.5, (rank, 256))
    fields = [FIRST, SECOND * 3, 80 - Y][:rank]
    truth = np.tensordot(light.T, np.stack(fields), 1)
    frames = (truth + rng.normal(0, 1, truth.shape)).astype(np.float32)
    module = LocalMean(2.0, 8.0, illumination_rank=rank, clip=None, block_frames=1)
    learned = module.with_patterns(frames, illumination=light)
    background = learned(frames)
    left = np.asarray(background.residuals(frames))[32:-32, 8:-8, 8:-8]
    factor = background.noise_corrections
    # Of no frames, for which nothing is compiled.
    one = LocalMean(2.0, 8.0, clip=None, block_frames=1)(frames[:0]).noise_corrections
    assert float(1 - factor**2) == pytest.approx(float(rank * (1 - one**2)), rel=1e-4)
    assert left.std() == pytest.approx(float(factor), rel=0.03)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_batches_single_frames_and_no_frames_have_their_shapes():
    learned = local_mean().with_patterns(FRAMES)
    both = learned(np.stack([FRAMES, FRAMES[::-1]]))
    assert both.bkgds.shape == (2, *SHAPE)
    assert both.illumination.shape == (2, 2, SHAPE[0])
    np.testing.assert_allclose(both.bkgds[0], learned(FRAMES).bkgds, rtol=1e-5)
    # Without a clip, less is compiled.
    plain = local_mean(clip=None, kernel_order=2, patterns=learned.patterns)
    assert plain(FRAMES[0]).illumination.shape == (2,)
    assert learned(FRAMES[:0]).illumination.shape == (2, 0)


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_channels_have_patterns_of_their_own():
    flickering = FRAMES[1::3]
    module = local_mean(illumination_rank="auto").with_patterns([FRAMES, flickering])
    assert module.patterns is not None
    assert [len(of_one) for of_one in module.patterns] == [2, 1]
    background = module([FRAMES, flickering])
    assert [light.shape for light in background.illumination] == [(2, 48), (16,)]
    with pytest.raises(ValueError, match="patterns for 2 channels"):
        module([FRAMES] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: local_mean(illumination_rank=5), "illumination_rank must be one of"),
        (lambda: local_mean(radius=0, block_frames=1), "give radius_frames above 0"),
        (lambda: local_mean(patterns=np.ones((2, 3, 3))), "must be whole numbers"),
        (lambda: local_mean(patterns=np.ones((3, 3, 3), int)), "of shape (3, 3, 3)"),
        (lambda: local_mean()(FRAMES[:, :16, :16]), "give larger frames"),
        (
            lambda: local_mean().with_patterns(FRAMES)(FRAMES[:, :32]),
            "learn them from such frames",
        ),
        (
            lambda: jax.jit(local_mean(illumination_rank="auto"))(FRAMES),
            "call estimator.with_patterns(frames) outside of jax.jit",
        ),
        (
            lambda: local_mean().with_patterns(FRAMES, illumination=LIGHT[:1]),
            "illumination has 1 patterns, but illumination_rank is 2",
        ),
        (
            lambda: local_mean().with_patterns(FRAMES, illumination=LIGHT[:, :5]),
            "with 48 frames, but has (2, 5)",
        ),
        (
            lambda: estimate_movie(FRAMES, Chained(local_mean()), np.zeros(SHAPE)),
            "Chained has patterns of light to learn",
        ),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.long
@pytest.mark.usefixtures("quickly_compiled")
def test_the_example_compares_ranks(monkeypatch):
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(folder)
    example = runpy.run_path(str(folder / "pattern_accuracy.py"))
    # The radii and rounds of these tests.
    few_rounds = partial(jaxbkgd.LocalMean, clip=SoftClip(rounds=2))
    monkeypatch.setattr(jaxbkgd, "LocalMean", few_rounds)
    small = {"RANKS": (1, 2), "RADII": ((6.0, 6.0),)}
    example["main"].__globals__.update(small)
    errors = example["main"](frame_count=48, size_pix=40)
    second = errors.pop("a second pattern in every 4th frame")
    assert second[1] < second[0] / 3
    # Without a second pattern, it is noise that a second one follows.
    assert all(one < two for one, two in errors.values())

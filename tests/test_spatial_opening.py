from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.ndimage import grey_opening

from jaxbkgd import SpatialOpening


RNG = np.random.default_rng(8)
FRAMES = RNG.poisson(60, (3, 12, 17)).astype(np.uint16)


def _by_definition(frames: np.ndarray, y_pix: float, x_pix: float) -> np.ndarray:
    y, x = np.ogrid[-int(y_pix) : int(y_pix) + 1, -int(x_pix) : int(x_pix) + 1]
    ellipse = (y / (2 * y_pix)) ** 2 + (x / (2 * x_pix)) ** 2 <= 1 / 4
    return np.stack(
        [grey_opening(frame, footprint=ellipse, mode="nearest") for frame in frames]
    )


# The 5 has pixels on the circle itself; the last ellipse is larger than the frame.
@pytest.mark.slow
@pytest.mark.parametrize(
    "radii", [(0.5, 0.9), (3.0, 3.0), (5.0, 5.0), (2.6, 60.0)], ids=str
)
def test_frames_are_opened_by_an_ellipse_as_in_scipy(radii):
    bkgds = SpatialOpening(radii)(FRAMES).bkgds
    assert bkgds.dtype == jnp.float32
    np.testing.assert_array_equal(bkgds, _by_definition(FRAMES, *radii))


@pytest.mark.slow
def test_channels_have_their_own_radii_or_share_one():
    channels = (FRAMES, FRAMES[:, :7], FRAMES[0])
    alone = SpatialOpening([2.0, (1.0, 3.0), 1.5])
    background = jax.jit(lambda stacks: alone(stacks))(channels)
    expected = [
        _by_definition(FRAMES, 2, 2),
        _by_definition(FRAMES[:, :7], 1, 3),
        _by_definition(FRAMES[:1], 1.5, 1.5)[0],
    ]
    for bkgd, one in zip(background.bkgds, expected, strict=True):
        np.testing.assert_array_equal(bkgd, one)
    assert len({float(factor) for factor in background.noise_corrections}) == 3
    shared = SpatialOpening((1.0, 3.0), noise="unit")([FRAMES, FRAMES])
    for bkgd in shared.bkgds:
        np.testing.assert_array_equal(bkgd, _by_definition(FRAMES, 1, 3))
    assert shared.noise_corrections == [1, 1]
    np.testing.assert_array_equal(alone.radii_pix, [(2, 2), (1, 3), (1.5, 1.5)])


@pytest.mark.slow
def test_a_nan_reaches_the_pixels_whose_ellipses_cover_it():
    frames = FRAMES[:2].astype(np.float32)
    frames[0, 5, 8] = np.nan
    is_nan = np.isnan(SpatialOpening(1.0)(frames).bkgds)
    # A cross of 5 pixels around each pixel of such a cross.
    y, x = np.mgrid[:12, :17]
    np.testing.assert_array_equal(is_nan[0], np.abs(y - 5) + np.abs(x - 8) <= 2)
    assert not is_nan[1].any()


@pytest.mark.slow
def test_its_derivatives_are_those_of_finite_differences(x64):
    # All values differ, by more than the step, so that their order stays.
    frames = jnp.asarray(RNG.permutation(2 * 5 * 6).reshape(2, 5, 6) / 10)
    check_grads(lambda f: SpatialOpening(1.0)(f).bkgds, (frames,), 1, modes=("fwd", "rev"))


@pytest.mark.slow
@pytest.mark.parametrize("radii", [(1.0, 1.0), (3.0, 3.0), (2.0, 9.0)], ids=str)
def test_the_noise_factor_is_that_of_simulated_noise(radii):
    noise = RNG.standard_normal((4, 256, 256))
    residual = noise - _by_definition(noise, *radii)
    # Two simulations of 2.6e5 pixels, in patches of some ten that go together.
    expected = pytest.approx(np.std(residual), rel=0.01)
    assert SpatialOpening(radii)(FRAMES).noise_corrections == expected


@pytest.mark.parametrize(
    ("radii", "message"), [(0, "positive"), (np.inf, "at most"), ("3", "must be a number")]
)
def test_radii_that_are_no_length_are_refused(radii: Any, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        SpatialOpening(radii)


def test_traced_radii_and_radii_for_other_channels_are_refused():
    with pytest.raises(TypeError, match="must be static"):
        jax.jit(lambda radius: SpatialOpening(radius)(FRAMES))(3.0)
    with pytest.raises(ValueError, match="radii for 3 channels, but was given 2"):
        SpatialOpening([1.0, 2.0, 3.0])([FRAMES, FRAMES])


def test_an_unknown_noise_is_refused(as_installed):
    with pytest.raises(ValueError, match=r"'simulated', 'unit'.*'exact'"):
        SpatialOpening(noise=cast(Any, "exact"))

"""Estimators as JSON texts: what each class saves, and what it reads."""

import json
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbkgd import (
    AbstractEstimator,
    Background,
    Chained,
    LocalMean,
    SoftClip,
    SpatialMean,
    SpatialOpening,
    TemporalMedian,
)


class Tilt(AbstractEstimator):
    """An estimator of a user: numbers that are learned, arrays, and things that are not."""

    factor: jax.Array
    counts: jax.Array
    inner: SpatialMean
    shape: tuple = eqx.field(static=True)
    name: Any = eqx.field(static=True)

    def __init__(self, factor, name=None):
        self.factor = jnp.asarray(factor, jnp.bfloat16)
        self.counts = jnp.array([[1, 2], [3, 4]], jnp.int16)
        self.inner = SpatialMean(3.0)
        self.shape, self.name = (1, ("a", True)), name

    @property
    def halo_frames(self) -> int:
        return 0

    def estimate_stack(self, frames):
        return Background(self.factor * frames, jnp.ones(()))


MODULES = [
    LocalMean(),
    LocalMean((6.0, 10.0), 4.0, clip=None, max_radius_pix=50.0, skips_nan=True),
    LocalMean(5.0, 0, illumination_radius_frames=3.0),
    LocalMean(
        [(2.0, 5.0), (math.pi, 4.0)], [3.0, 8.0], frozen=[(True, False, False), False]
    ),
    LocalMean(
        [5.0, 1 / 3],
        2.0,
        max_radius_frames=9.5,
        illumination_rank=0,
        kernel_order=2,
        block_frames=3,
        clip=SoftClip(2.0, 0.5, rounds=1),
    ),
    # Two channels, which must not become a pair, and radii that stay equal.
    SpatialMean([(3.0, 3.0), (4.0, 4.0)], noise="separable", frozen=[(True, False), False]),
    SpatialMean([3.0, 4.0], max_radius_pix=9.5, truncation="hard", frozen=[True, False]),
    SpatialMean(1e-3, max_radius_pix=1e5),
    TemporalMedian(7, noise="unit"),
    SpatialOpening([1.5, (2.0, 1 / 3)]),
    Chained(TemporalMedian(3), Chained(SpatialOpening(2.0), SpatialMean([3.0, 4.0]))),
    Tilt(1 / 3),
    Tilt([[2.0]], "b"),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_an_estimator_comes_back(module):
    text = module.to_json()
    for loaded in (type(module).from_json(text), AbstractEstimator.from_json(text)):
        # There and back again: roundings of float32.
        assert eqx.tree_equal(loaded, module, rtol=1e-5, atol=1e-6)
        assert loaded.to_json() == text
        assert repr(loaded) == repr(module)
    assert module.for_inference().to_json() == text


def test_a_radius_comes_back_in_64_bit_mode(x64):
    module = SpatialMean((math.pi, 10.0))
    loaded = SpatialMean.from_json(module.to_json())
    np.testing.assert_allclose(loaded.radii_pix, module.radii_pix, rtol=1e-14)


def test_what_is_learned_comes_back_from_beside_its_bounds():
    start = LocalMean(3.0, 4.0)
    learned = [lambda m: m.unbounded_radii, lambda m: m.clip.log_parameters]
    for where, far in zip(learned * 2, (1e6, 1e6, -1e6, -1e6), strict=True):
        module = eqx.tree_at(where, start, where(start) + far)
        loaded: Any = LocalMean.from_json(module.to_json())
        np.testing.assert_allclose(loaded.radii, module.radii, rtol=1e-6)
        np.testing.assert_allclose(loaded.clip.threshold, module.clip.threshold, rtol=1e-6)


# As the first version that saved estimators wrote them, with an unknown name.
CLIP = {"threshold": 2.5, "softness": 0.3, "rounds": 2, "molecule_radius_pix": 2.6}
OVER_TIME = {"format": "jaxbkgd.LocalMean", "version": 1, "radius_frames": [8.0]}
OVER_TIME |= {"radii_pix": [[5.0]], "clip": CLIP, "max_radius_pix": 20.0, "fov": "left"}
OVER_TIME |= {"max_radius_frames": 32.0, "block_frames": 4, "kernel_order": 2}
OVER_TIME |= {"illumination_rank": 0, "illumination_radius_frames": 5.0}
OVER_TIME |= {"skips_nan": False, "frozen": [[False, True]]}
IN_SPACE = {"format": "jaxbkgd.SpatialMean", "version": 1, "radii_pix": [[6.0]]}
IN_SPACE |= {"max_radius_pix": 50.0, "truncation": "smooth", "noise": "exact"}
IN_SPACE |= {"frozen": [[False]], "comment": "a calibration of May"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            OVER_TIME,
            LocalMean(
                5.0,
                8.0,
                clip=SoftClip(2.5, rounds=2),
                illumination_rank=0,
                kernel_order=2,
                illumination_radius_frames=5.0,
                block_frames=4,
                frozen=(False, True),
            ),
        ),
        (IN_SPACE, SpatialMean(6.0, max_radius_pix=50.0)),
    ],
    ids=["LocalMean", "SpatialMean"],
)
def test_texts_of_earlier_versions_are_read(fields, expected):
    assert eqx.tree_equal(AbstractEstimator.from_json(json.dumps(fields)), expected)
    saved = json.loads(expected.to_json())
    for name, value in saved.items():
        if name.startswith("radi"):
            # float32.
            np.testing.assert_allclose(value, fields[name], rtol=1e-6)
        else:
            assert value == fields[name]
    assert fields.keys() - saved.keys() <= {"fov", "comment"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("radii_pix = 3", "no JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("{}", "must be a JSON object"),
        (LocalMean().to_json(), r"jaxbkgd\.SpatialMean.*but has.*LocalMean"),
        (json.dumps(IN_SPACE | {"version": 2}), "update jaxbkgd if the version is a later"),
        (
            json.dumps({"format": "jaxbkgd.SpatialMean", "version": 1}),
            "radii_pix, max_radius_pix, truncation, noise, frozen",
        ),
    ],
)
def test_what_is_no_such_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        SpatialMean.from_json(text)


def test_a_class_that_is_not_there_is_named():
    text = Tilt(1.0).to_json().replace("test_json.Tilt", "elsewhere.Tilt")
    with pytest.raises(ValueError, match=r"'elsewhere\.Tilt'.*import the module"):
        AbstractEstimator.from_json(text)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match=r"JSON cannot hold <object.*tree_serialise_leaves"):
        Tilt(1.0, name=object()).to_json()
    with pytest.raises(ValueError, match=r"is traced; save outside of jax\.jit"):
        jax.jit(lambda factor: Tilt(factor).to_json())(1.0)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("fields", "name", "value", "message"),
    [
        (OVER_TIME, "radius_frames", [-1.0], "must be positive and at most 100000 frames"),
        (OVER_TIME, "radius_frames", None, "must be a number of frames"),
        (OVER_TIME, "radii_pix", [["3"]], "must be a number of pixels"),
        (OVER_TIME, "max_radius_frames", 1.0, "raise max_radius_frames"),
        (OVER_TIME, "illumination_rank", 5, "illumination_rank must be one of"),
        (OVER_TIME, "kernel_order", "4", "kernel_order must be one of"),
        (OVER_TIME, "clip", "3", "A JSON object is needed, but there is '3'"),
        (OVER_TIME, "clip", {"threshold": 3.0}, "There is no softness, rounds"),
        (OVER_TIME, "clip", CLIP | {"rounds": 0}, "rounds must be a whole number from 1"),
        (OVER_TIME, "clip", CLIP | {"threshold": "3"}, "threshold must be a number"),
        (IN_SPACE, "radii_pix", [[math.nan]], "must be positive"),
        (IN_SPACE, "radii_pix", [[3.0], [4.0, 5.0]], "Each channel needs one radius"),
        (IN_SPACE, "radii_pix", [[60.0]], "raise max_radius_pix"),
        (IN_SPACE, "radii_pix", {}, "A radius must be a number"),
        (IN_SPACE, "max_radius_pix", "60", "max_radius_pix must be a number"),
        (IN_SPACE, "max_radius_pix", [60.0], "max_radius_pix must be one number"),
        (IN_SPACE, "truncation", ["hard"], "truncation must be one of"),
        (IN_SPACE, "noise", None, "noise must be one of"),
        (IN_SPACE, "frozen", "no", "frozen must be True or False"),
        (IN_SPACE, "frozen", [[0.0]], "frozen must be True or False"),
    ],
)
def test_a_field_that_cannot_be_right_is_refused(fields, name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AbstractEstimator.from_json(json.dumps(fields | {name: value}))

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


MODULES = [
    LocalMean(),
    LocalMean((6.0, 10.0), 4.0, clip=None, max_radius_pix=50.0, skips_nan=True),
    LocalMean([3.0, 4.0, 1 / 3], 2.0, clip=2.5, edge_frames="repeated"),
    LocalMean(
        [(2.0, 5.0), (math.pi, 4.0)], [3.0, 8.0], frozen=[(True, False, False), False]
    ),
    LocalMean(
        5.0,
        [3.0, 8.0],
        max_radius_frames=9.5,
        clip=SoftClip(
            2.0,
            0.5,
            rounds=1,
            molecule_radius_pix=3.0,
            gains=[0.5, 2.0],
            read_noise_electrons=1.5,
        ),
    ),
    SpatialMean([(2.0, 5.0), (math.pi, 4.0)], noise="separable", frozen=[True, False]),
    TemporalMedian(7, noise="unit"),
    SpatialOpening([1.5, (2.0, 1 / 3)]),
    Chained(TemporalMedian(3), Chained(SpatialOpening(2.0), SpatialMean([3.0, 4.0]))),
]


class Tilt(AbstractEstimator):
    """An estimator of a user: numbers that are learned, arrays, and things that are not."""

    factor: jax.Array
    offsets: list
    counts: jax.Array
    inner: SpatialMean
    shape: tuple = eqx.field(static=True)
    name: str | None = eqx.field(static=True)
    names: dict = eqx.field(static=True)

    def __init__(self, factor, name=None):
        self.factor = jnp.asarray(factor, jnp.float32)
        self.offsets = [1.5, jnp.zeros((0, 3), jnp.bfloat16)]
        self.counts = jnp.array([[1, 2], [3, 4]], jnp.int16)
        self.inner = SpatialMean(3.0)
        self.shape, self.name, self.names = (1, ("a", True)), name, {"list": (2,)}

    @property
    def halo_frames(self) -> int:
        return 0

    def estimate_stack(self, frames):
        return Background(self.factor * frames, jnp.ones(()))


@pytest.mark.parametrize(
    "module", [*MODULES, Tilt(1 / 3), Tilt([[2.0]], "b")], ids=lambda m: type(m).__name__
)
def test_an_estimator_comes_back(module):
    text = module.to_json()
    for loaded in (type(module).from_json(text), AbstractEstimator.from_json(text)):
        # There and back again: roundings of float32.
        assert eqx.tree_equal(loaded, module, rtol=1e-5, atol=1e-6)
        assert loaded.to_json() == text
        assert repr(loaded) == repr(module)


def test_what_is_learned_comes_back_from_beside_its_bounds():
    start = LocalMean(3.0, 4.0)
    learned = [lambda m: m.unbounded_radii, lambda m: m.clip.log_parameters]
    for where, far in zip(learned * 2, (1e6, 1e6, -1e6, -1e6), strict=True):
        module = eqx.tree_at(where, start, where(start) + far)
        loaded: Any = LocalMean.from_json(module.to_json())
        np.testing.assert_allclose(loaded.radii, module.radii, rtol=1e-6)
        np.testing.assert_allclose(loaded.clip.threshold, module.clip.threshold, rtol=1e-6)


def test_texts_of_earlier_versions_are_read():
    """As the first version that saved estimators wrote them, with an unknown name."""
    clip = {"threshold": 2.5, "softness": 0.3, "rounds": 2, "molecule_radius_pix": 2.6}
    clip |= {"gains": [0.5], "read_noise_electrons": [1.5]}
    text = json.dumps(
        {"format": "jaxbkgd.LocalMean", "version": 1, "radius_frames": [8.0]}
        | {"radii_pix": [[5.0]], "clip": clip, "max_radius_pix": 20.0, "fov": "left"}
        | {"max_radius_frames": 32.0, "edge_frames": "renormalised", "skips_nan": False}
        | {"frozen": [[False, True]]}
    )
    expected = LocalMean(
        5.0,
        8.0,
        clip=SoftClip(2.5, gains=0.5, read_noise_electrons=1.5),
        frozen=(False, True),
    )
    assert eqx.tree_equal(AbstractEstimator.from_json(text), expected)
    saved = json.loads(expected.to_json())
    # Radii in float32.
    saved |= {"radius_frames": [8.0], "radii_pix": [[5.0]], "fov": "left"}
    assert saved == json.loads(text)


def test_the_form_for_inference_is_saved_as_the_estimator_itself():
    module = LocalMean(3.0, 2.0)
    assert module.for_inference().to_json() == module.to_json()


def test_a_text_is_read_by_the_class_that_wrote_it():
    with pytest.raises(ValueError, match=r"jaxbkgd\.LocalMean.*but has.*SpatialMean"):
        LocalMean.from_json(SpatialMean().to_json())
    with pytest.raises(ValueError, match=r"jaxbkgd\.SpatialMean.*but has.*LocalMean"):
        SpatialMean.from_json(LocalMean().to_json())
    text = Tilt(1.0).to_json().replace("test_json.Tilt", "elsewhere.Tilt")
    with pytest.raises(ValueError, match=r"'elsewhere\.Tilt'.*import the module"):
        AbstractEstimator.from_json(text)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match=r"name is .*object.*tree_serialise_leaves"):
        Tilt(1.0, name=object()).to_json()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"factor is traced; save outside of jax\.jit"):
        jax.jit(lambda factor: Tilt(factor).to_json())(1.0)


CLIP = json.loads(MODULES[0].to_json())["clip"]


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("radius_frames", [-1.0], "must be positive and at most 100000 frames"),
        ("radius_frames", None, "must be a number of frames"),
        ("radius_frames", [1.0, 2.0, 3.0], "for 2 channels, but in frames for 3"),
        ("radii_pix", [["3"]], "must be a number of pixels"),
        ("max_radius_frames", None, "max_radius_frames must be a number"),
        ("max_radius_frames", 1.0, "raise max_radius_frames"),
        ("edge_frames", "soft", "edge_frames must be one of"),
        ("frozen", "no", "frozen must be True or False"),
        ("clip", 3, "A JSON object is needed, but there is 3"),
        ("clip", "3", "A JSON object is needed, but there is '3'"),
        ("clip", {"threshold": 3.0}, "There is no softness, rounds"),
        ("clip", CLIP | {"rounds": 0}, "rounds must be a whole number from 1 on"),
        ("clip", CLIP | {"threshold": "3"}, "threshold must be a number"),
    ],
)
def test_a_field_that_cannot_be_right_is_refused(name, value, message):
    fields = json.loads(LocalMean([(3.0, 3.0), (4.0, 4.0)]).to_json())
    with pytest.raises(ValueError, match=message):
        LocalMean.from_json(json.dumps(fields | {name: value}))

"""Means over time as JSON texts."""

import json
import math
from typing import Any

import equinox as eqx
import numpy as np
import pytest

from jaxbkgd import LocalMean, SoftClip, SpatialMean


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
]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_comes_back(module):
    loaded = LocalMean.from_json(module.to_json())
    assert loaded.unbounded_radii.shape == module.unbounded_radii.shape
    # There and back again: roundings of float32.
    assert eqx.tree_equal(loaded, module, rtol=1e-5, atol=1e-6)
    assert repr(loaded).startswith("LocalMean(radii=[[")


def test_what_is_learned_comes_back_from_beside_its_bounds():
    start = LocalMean(3.0, 4.0)
    learned = [lambda m: m.unbounded_radii, lambda m: m.clip.log_parameters]
    for where, far in zip(learned * 2, (1e6, 1e6, -1e6, -1e6), strict=True):
        module = eqx.tree_at(where, start, where(start) + far)
        loaded: Any = LocalMean.from_json(module.to_json())
        np.testing.assert_allclose(loaded.radii, module.radii, rtol=1e-6)
        np.testing.assert_allclose(loaded.clip.threshold, module.clip.threshold, rtol=1e-6)


def test_a_text_is_read_by_the_class_that_wrote_it():
    with pytest.raises(ValueError, match=r"LocalMean.*but has.*SpatialMean"):
        LocalMean.from_json(SpatialMean().to_json())
    with pytest.raises(ValueError, match=r"SpatialMean.*but has.*LocalMean"):
        SpatialMean.from_json(LocalMean().to_json())


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("radius_frames", [-1.0]),
        ("radius_frames", None),
        ("radius_frames", [1.0, 2.0, 3.0]),
        ("radii_pix", [["3"]]),
        ("max_radius_frames", None),
        ("max_radius_frames", 1.0),
        ("edge_frames", "soft"),
        ("frozen", "no"),
        ("clip", 3),
        ("clip", "3"),
        ("clip", {"threshold": 3.0}),
        ("clip", json.loads(MODULES[0].to_json())["clip"] | {"rounds": 0}),
        ("clip", json.loads(MODULES[0].to_json())["clip"] | {"threshold": "3"}),
    ],
)
def test_a_field_that_cannot_be_right_is_refused(name, value):
    fields = json.loads(LocalMean([(3.0, 3.0), (4.0, 4.0)]).to_json())
    with pytest.raises(ValueError, match=r"."):
        LocalMean.from_json(json.dumps(fields | {name: value}))

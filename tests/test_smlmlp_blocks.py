"""smlmlp's other blocks and pipeline, by golden values and beside smlmlp itself."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.block_cases import BLOCKS, CHANNELS
from golden.cases import Case

from jaxbkgd import Background, Chained, SpatialMean, SpatialOpening, TemporalMedian


# Of the largest absolute input: a few roundings of 2^-24 in float32, at other places.
TOLERANCE = 1e-6
# As in test_smlmlp.py: both round their taps, and then one minus the centre's, to float32.
FACTOR_TOLERANCE = 1e-6

GOLDEN = np.load(Path(__file__).parent / "golden" / "blocks.npz", allow_pickle=False)


def _mean(radii_pix: Any = 7.0) -> SpatialMean:
    return SpatialMean(radii_pix, truncation="hard", noise="separable")


ESTIMATORS = {
    "median": TemporalMedian(noise="unit"),
    "median of one": TemporalMedian(0, noise="unit"),
    "median of nine": TemporalMedian(4, noise="unit"),
    "opening": SpatialOpening(noise="unit"),
    "opening by a dot": SpatialOpening(0.5, noise="unit"),
    "opening by two ellipses": SpatialOpening([(1.5, 4.0), (20.0, 2.6)], noise="unit"),
    "pipeline": Chained(TemporalMedian(noise="unit"), _mean()),
    "pipeline of three": Chained(
        SpatialOpening([(2.0, 2.0), (1.0, 5.0)], noise="unit"),
        TemporalMedian(2, noise="unit"),
        _mean([(3.0, 3.0), (2.0, 4.0)]),
    ),
}


@pytest.fixture(scope="module")
def smlmlp() -> Any:
    if importlib.util.find_spec("smlmlp") is None:
        pytest.skip("smlmlp is not installed; the golden values stand for it.")
    # smlmlp 0.1.20 takes from stacklp what stacklp 0.1.9 does not have.
    stacklp, arrlp = map(importlib.import_module, ("stacklp", "arrlp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacklp, "get_xp", arrlp.get_xp, raising=False)
        yield importlib.import_module("smlmlp")


def _assert_equal(
    name: str, background: Background, bkgds: Any, factors: Any, channels: Any
) -> None:
    for bkgd, expected, frames in zip(background.bkgds, bkgds, channels, strict=True):
        assert bkgd.dtype == expected.dtype == np.float32
        # Medians and openings are values of the frames, or the mean of two.
        is_exact = not name.startswith("pipeline")
        tolerance = 0 if is_exact else TOLERANCE * np.abs(frames.astype(float)).max()
        np.testing.assert_allclose(bkgd, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(background.noise_corrections, factors, rtol=FACTOR_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_the_golden_values(name: str):
    channels = [Case(shape, dtype, (1.0, 1.0)).frames() for shape, dtype in CHANNELS]
    bkgds = [GOLDEN[f"{name}: bkgd {index}"] for index in range(len(channels))]
    factors = GOLDEN[f"{name}: factors"]
    _assert_equal(name, ESTIMATORS[name](channels), bkgds, factors, channels)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_those_of_smlmlp(smlmlp: Any, name: str):
    channels = [
        Case((60, 10, 12), "float32", (1.0, 1.0)).frames(),
        # Low counts, of which many are equal.
        Case((17, 15, 14), "uint16", (1.0, 1.0)).frames() // 6000,
    ]
    block, options = BLOCKS[name]
    bkgds, factors, _ = getattr(smlmlp, block)(channels, **options)
    _assert_equal(name, ESTIMATORS[name](channels), bkgds, factors, channels)

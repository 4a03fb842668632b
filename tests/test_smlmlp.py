"""The drop-in gives the numbers of smlmlp's `bkgd_spatial_mean` and keeps its contract.

Numbers are compared with golden values, with smlmlp itself where it is installed, and
with the estimator's definition evaluated in float64.
"""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import (
    Case,
    CASES,
    not_finite_frames,
    NOT_FINITE_RADII_PIX,
    RADII_PIX,
    subset,
)
from hypothesis import given, settings, strategies as st
from scipy.special import erf, erfinv

from jaxbkgd.smlmlp import bkgd_spatial_mean


# Of the largest absolute input: seven roundings of 2^-23 over two passes in float32,
# of which the reference, which sums in float64, has one a pass.
TOLERANCE = 2e-6
# Both round their taps, and then one minus the centre's, to float32.
KERNEL_TOLERANCE = 1e-6

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz", allow_pickle=False)


def _every_other(frames: np.ndarray) -> np.ndarray:
    twice = np.ones([2 * size for size in frames.shape], frames.dtype)
    twice[1::2, ::2, 1::2] = frames
    return twice[1::2, ::2, 1::2]


def _read_only(frames: np.ndarray) -> np.ndarray:
    frames = frames.copy()
    frames.flags.writeable = False
    return frames


LAYOUTS: tuple[Callable, ...] = (
    lambda frames: frames[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    np.asfortranarray,
    _every_other,
    _read_only,
    lambda frames: frames.astype(frames.dtype.newbyteorder(">")),
)


def _assert_close_to(bkgd: Any, expected: np.ndarray, frames: np.ndarray) -> None:
    # Where all input is subnormal, float32 has no more to give than its least normal.
    largest = np.max(np.abs(frames.astype(np.float64)), initial=0)
    tolerance = TOLERANCE * largest + np.finfo(np.float32).tiny
    np.testing.assert_allclose(np.asarray(bkgd), expected, rtol=0, atol=tolerance)


def _kernel_by_definition(radius_pix: float) -> np.ndarray:
    sigma = radius_pix / 2
    half_width = math.ceil(6 * sigma) // 2
    x = np.arange(-half_width, half_width + 1)
    scale = np.sqrt(2) * sigma
    taps = (erf((x + 0.5) / scale) - erf((x - 0.5) / scale)) / 2
    taps[np.abs(x) > np.sqrt(2) * erfinv(0.99) * sigma] = 0
    return taps / np.sum(taps)


def _bkgd_by_definition(frames: np.ndarray, radii_pix: tuple[float, float]) -> np.ndarray:
    bkgd = frames.astype(np.float64)
    for axis, radius in zip((1, 2), radii_pix, strict=True):
        taps, size = _kernel_by_definition(radius), bkgd.shape[axis]
        indices = np.arange(size)[:, None] + np.arange(taps.size) - taps.size // 2
        neighbours = np.take(bkgd, np.clip(indices, 0, size - 1), axis=axis)
        bkgd = np.sum(
            neighbours * np.expand_dims(taps, tuple(range(1, 3 - axis))), axis=axis + 1
        )
    return bkgd


# Golden values


@pytest.mark.long
@pytest.mark.parametrize("first", range(len(RADII_PIX)))
def test_channels_in_any_layout_have_the_golden_bkgds_kernels_and_factors(first: int):
    cases = CASES[first :: len(RADII_PIX)]
    channels = [case.frames() for case in cases]
    layouts = LAYOUTS[first % 5 :] + LAYOUTS[: first % 5]
    bkgds, factors, info = bkgd_spatial_mean(
        [layout(frames) for layout, frames in zip(layouts, channels, strict=True)],
        [case.radii_pix for case in cases],
    )
    for index, (case, frames) in enumerate(zip(cases, channels, strict=True)):
        assert bkgds[index].shape == frames.shape
        _assert_close_to(subset(bkgds[index]), GOLDEN[f"bkgd {case}"], frames)
        expected = GOLDEN[f"factor {case}"]
        assert factors[index] == pytest.approx(expected, rel=KERNEL_TOLERANCE)
        for axis, radius in zip("yx", case.radii_pix, strict=True):
            kernel, expected = (
                info[f"spatial_mean_kernels_{axis}"][index],
                f"kernel {radius}",
            )
            assert kernel.dtype == np.float32
            np.testing.assert_allclose(kernel, GOLDEN[expected], rtol=KERNEL_TOLERANCE)


@pytest.mark.long
def test_jax_arrays_give_the_bkgds_of_the_same_numpy_arrays():
    # In 32-bit mode, JAX has no float64.
    cases = [c for c in CASES if c.shape[1:] == (5, 7) and c.dtype != "float64"]
    channels = [case.frames() for case in cases]
    bkgds, factors, _ = bkgd_spatial_mean(
        list(map(jnp.asarray, channels)), [case.radii_pix for case in cases]
    )
    for case, frames, bkgd, factor in zip(cases, channels, bkgds, factors, strict=True):
        assert isinstance(bkgd, jax.Array)
        assert bkgd.dtype == jnp.float32
        _assert_close_to(bkgd, _bkgd_by_definition(frames, case.radii_pix), frames)
        assert factor == pytest.approx(GOLDEN[f"factor {case}"], rel=KERNEL_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("radii", NOT_FINITE_RADII_PIX, ids=str)
def test_nan_and_infinity_reach_the_pixels_that_they_reach_in_smlmlp(
    radii: tuple[float, float],
):
    frames = not_finite_frames()
    bkgds, _, _ = bkgd_spatial_mean([frames], radii)
    expected = GOLDEN[f"not finite {radii[0]} {radii[1]}"]
    np.testing.assert_array_equal(np.isnan(bkgds[0]), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(bkgds[0]), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(bkgds[0]), np.isneginf(expected))
    is_finite = np.isfinite(expected)
    _assert_close_to(bkgds[0][is_finite], expected[is_finite], frames[np.isfinite(frames)])


# The definition

REAL_DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]
REAL_DTYPES += ["uint64", "float16", "float32", "float64"]


# Each example is compiled.
@pytest.mark.long
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_frames_have_the_bkgd_of_the_definition(data: st.DataObject):
    dtype = np.dtype(data.draw(st.sampled_from(REAL_DTYPES)))
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12))
    elements: dict[str, Any] = {}
    if dtype.kind == "f":
        # Far from the largest, whose sums overflow in float32.
        largest = 2.0**13 if dtype.itemsize == 2 else 2.0**50
        elements = {"min_value": -largest, "max_value": largest}
        elements |= {"allow_nan": False, "allow_infinity": False}
    frames = data.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **elements)))
    radius = st.floats(0.2, 12.0)
    radii = data.draw(st.tuples(radius, radius))
    bkgds, factors, info = bkgd_spatial_mean([frames], [radii])
    _assert_close_to(bkgds[0], _bkgd_by_definition(frames, radii), frames)
    norms = []
    for axis, radius in zip("yx", radii, strict=True):
        residual = -_kernel_by_definition(radius)
        residual[residual.size // 2] += 1
        norms.append(np.linalg.norm(residual))
        # One minus the centre's tap is rounded at the size of the tap.
        np.testing.assert_allclose(
            info[f"spatial_mean_kernels_{axis}"][0], residual, rtol=0, atol=2e-7
        )
    assert factors[0] == pytest.approx(math.prod(norms), rel=KERNEL_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [1, 9])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_tap_enters_at_the_same_radius_as_in_the_definition(distance: int, side: int):
    # One part in 1e9 beside it, which float32 could not tell.
    radius = 2 * distance / (math.sqrt(2) * float(erfinv(0.99))) * (1 + side * 1e-9)
    frames = CASES[20].frames()
    bkgds, _, _ = bkgd_spatial_mean([frames], radius)
    _assert_close_to(bkgds[0], _bkgd_by_definition(frames, (radius, radius)), frames)


# The contract


def _two_channels() -> list[np.ndarray]:
    return [
        Case((3, 5, 7), "float32", (6.0, 10.0)).frames(),
        Case((2, 4, 6), "float32", (6.0, 10.0)).frames(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("radii", "pairs"),
    [
        (7, [(7, 7), (7, 7), (7, 7)]),
        ([3.0, 5.0], [(3, 5), (3, 5), (3, 5)]),
        ([1.0, 2.0, 3.0], [(1, 1), (2, 2), (3, 3)]),
        (np.array([[1.0, 2.0], [3.0, 5.0], [7.0, 2.0]]), [(1, 2), (3, 5), (7, 2)]),
        ([(1.0, 2.0), 3.0, (7.0, 2.0)], [(1, 2), (3, 3), (7, 2)]),
    ],
    ids=str,
)
def test_radii_are_one_for_all_a_pair_for_all_or_one_a_channel(radii, pairs):
    channels = [np.ones((1, 1, 1), np.uint16)] * 3
    _, _, info = bkgd_spatial_mean(channels, radii)
    assert info["channels_mean_radii_pix"] == pairs
    assert info["spatial_mean_sigmas"] == [(y / 2, x / 2) for y, x in pairs]
    for axis, radius_of in zip("yx", zip(*pairs, strict=True), strict=True):
        sizes = [kernel.size for kernel in info[f"spatial_mean_kernels_{axis}"]]
        assert sizes == [_kernel_by_definition(radius).size for radius in radius_of]


@pytest.mark.slow
def test_the_answer_is_two_lists_and_a_dictionary_of_lists():
    first, second = _two_channels()
    # JAX and NumPy channels may be mixed, and the radius is 7 px by default.
    bkgds, factors, info = bkgd_spatial_mean([jnp.asarray(first), second])
    assert (type(bkgds), type(factors)) == (list, list)
    assert [type(factor) for factor in factors] == [np.float32, np.float32]
    assert list(info) == [
        "channels_mean_radii_pix",
        "spatial_mean_sigmas",
        "spatial_mean_kernels_y",
        "spatial_mean_kernels_x",
    ]
    assert [type(entry) for entry in info.values()] == [list] * 4
    assert info["channels_mean_radii_pix"] == [(7, 7), (7, 7)]
    assert isinstance(bkgds[0], jax.Array)
    assert type(bkgds[1]) is np.ndarray
    assert bkgds[1].dtype == np.float32
    assert bkgds[1].flags.writeable
    # One tap: nothing is computed, but the answer is an array of its own.
    (bkgd,), _, _ = bkgd_spatial_mean([second], 0.3)
    assert not np.shares_memory(bkgd, second)


@pytest.mark.slow
def test_a_stack_without_frames_has_a_bkgd_without_frames():
    shape = (0, 5, 7)
    for frames in (np.zeros(shape, np.uint16), jnp.zeros(shape)):
        bkgds, factors, _ = bkgd_spatial_mean([frames], 5.0)
        assert bkgds[0].shape == shape
        assert bkgds[0].dtype == np.float32
        assert factors[0] == pytest.approx(GOLDEN["factor 5.0"], rel=KERNEL_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [np.asfortranarray, _every_other])
@pytest.mark.parametrize("as_channel", [np.asarray, jnp.asarray])
def test_output_arrays_are_filled_and_cut_to_the_frames_of_their_channel(
    layout: Callable, as_channel: Callable
):
    channels = _two_channels()
    outputs = [
        layout(np.full((3, 5, 7), -1, np.float32)),
        layout(np.full((4, 4, 6), -1, np.float32)),
    ]
    bkgds, _, _ = bkgd_spatial_mean(
        [as_channel(frames) for frames in channels], (6.0, 10.0), outputs
    )
    for bkgd, output, frames in zip(bkgds, outputs, channels, strict=True):
        assert bkgd.shape == frames.shape
        assert np.shares_memory(bkgd, output)
        expected = _bkgd_by_definition(frames, (6.0, 10.0))
        _assert_close_to(output[: len(frames)], expected, frames)
        np.testing.assert_array_equal(output[len(frames) :], -1)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.3, 3.0])
def test_bkgds_are_right_where_outputs_lie_in_the_memory_of_the_channels(radius: float):
    memory = np.concatenate(2 * [Case((5, 5, 7), "float32", (1, 1)).frames()])
    copy = memory.copy()
    channels = [memory[:4], memory[5:9]]
    # A frame further on, and in the other channel.
    bkgds, _, _ = bkgd_spatial_mean(channels, radius, [memory[6:10], memory[:4]])
    for bkgd, frames in zip(bkgds, [copy[:4], copy[5:9]], strict=True):
        _assert_close_to(bkgd, _bkgd_by_definition(frames, (radius, radius)), frames)
    frames = memory.copy()
    bkgd_spatial_mean([memory], radius, [memory])
    _assert_close_to(memory, _bkgd_by_definition(frames, (radius, radius)), frames)


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrections",
    [
        [np.float32(0.5), np.float32(3.0)],
        [0.5, 3],
        np.array([0.5, 3.0]),
    ],
    ids=["float32", "numbers", "float64 array"],
)
def test_noise_corrections_are_multiplied_in_place(corrections):
    radii = [(3.0, 3.0), (5.0, 5.0)]
    before = list(corrections)
    _, answer, _ = bkgd_spatial_mean(_two_channels(), radii, noise_corrections=corrections)
    assert answer is corrections
    expected = [
        before[0] * GOLDEN["factor 3.0"],
        before[1] * GOLDEN["factor 5.0"],
    ]
    np.testing.assert_allclose(corrections, expected, rtol=KERNEL_TOLERANCE)


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


@pytest.mark.skipif(not _has_gpu(), reason="JAX has no GPU here")
def test_cuda_computes_on_the_gpu():
    frames = jnp.asarray(CASES[20].frames(), jnp.float32)
    bkgds, _, _ = bkgd_spatial_mean([frames], 3.0, cuda=True)
    assert {device.platform for device in bkgds[0].devices()} == {"gpu"}
    expected = _bkgd_by_definition(np.asarray(frames), (3.0, 3.0))
    _assert_close_to(bkgds[0], expected, np.asarray(frames))


@pytest.mark.skipif(_has_gpu(), reason="JAX has a GPU here")
def test_cuda_without_a_gpu_is_an_error_and_writes_nothing():
    output, corrections = np.full((3, 5, 7), -1, np.float32), [1.0]
    with pytest.raises(RuntimeError, match="cuda=True, but JAX has no GPU here; install"):
        bkgd_spatial_mean(
            _two_channels()[:1], 7.0, [output], noise_corrections=corrections, cuda=True
        )
    np.testing.assert_array_equal(output, -1)
    assert corrections == [1.0]


# Bad input: what replaces a good argument, and what the error says of it.

FIRST, SECOND = np.ones((3, 5, 7), np.float32), np.ones((2, 4, 6), np.float32)


def _output(shape: tuple[int, ...] = SECOND.shape, dtype: Any = np.float32) -> Any:
    return np.full(shape, -1, dtype)


BAD_INPUT = {
    "no channels": ({"channels": []}, "channels is empty"),
    "one channel too many": ({"channels": [FIRST, SECOND, SECOND]}, "2"),
    "complex frames": ({"channels": [FIRST, SECOND.astype(complex)]}, "complex"),
    "frames of strings": ({"channels": [FIRST, SECOND.astype(str)]}, "dtype"),
    "masked frames": ({"channels": [FIRST, np.ma.array(SECOND)]}, "masked"),
    "a single frame": ({"channels": [FIRST, SECOND[0]]}, "(4, 6)"),
    "frames without pixels": ({"channels": [FIRST, SECOND[:, :0]]}, "(2, 0, 6)"),
    "a radius of zero": ({"radii": 0.0}, "0.0"),
    "corrections of bytes": ({"corrections": bytearray(b"12")}, "bytearray"),
    "a negative radius in a pair": ({"radii": (6.0, -1.0)}, "-1.0"),
    "a radius that is not a number": ({"radii": [(1.0, 2.0), (3.0, np.nan)]}, "nan"),
    "three radii": ({"radii": [1.0, 2.0, 3.0]}, "3 channels, but was given 2"),
    "no radii": ({"radii": []}, "[]"),
    "one output too few": ({"last_outputs": []}, "1 arrays"),
    "one output too many": ({"last_outputs": [_output(), _output()]}, "3 arrays"),
    "an output with other pixels": ({"last_outputs": [_output((2, 6, 4))]}, "(2, 6, 4)"),
    "an output too short": ({"last_outputs": [_output((1, 4, 6))]}, "(1, 4, 6)"),
    "an output of float64": ({"last_outputs": [_output(dtype=float)]}, "float64"),
    "a big-endian output": ({"last_outputs": [_output(dtype=">f4")]}, "f4"),
    "a read-only output": ({"last_outputs": [_read_only(SECOND)]}, "read-only"),
    "a JAX output": ({"last_outputs": [jnp.ones(SECOND.shape)]}, "NumPy"),
    "a list as output": ({"last_outputs": [SECOND.tolist()]}, "list"),
    "one correction too few": ({"corrections": [1.0]}, "of 2 numbers, but are [1.0]"),
    "corrections in a tuple": ({"corrections": (1.0, 1.0)}, "(1.0, 1.0)"),
    "one number as correction": ({"corrections": 1.0}, "1.0"),
    "a read-only array of corrections": (
        {"corrections": _read_only(np.ones(2))},
        "in place",
    ),
    "an array of whole corrections": ({"corrections": np.ones(2, int)}, "floating"),
    "a correction that is missing": ({"corrections": [1.0, None]}, "None"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_an_error_and_nothing_is_written(bad: dict, message: str):
    outputs = [_output(FIRST.shape), *bad.get("last_outputs", [_output()])]
    corrections = bad.get("corrections", [1.0, 1.0])
    outputs_before = [np.array(output) for output in outputs]
    corrections_before = np.array(corrections)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        bkgd_spatial_mean(
            bad.get("channels", [FIRST, SECOND]),
            bad.get("radii", 7.0),
            outputs,
            noise_corrections=corrections,
        )
    for output, before in zip(outputs, outputs_before, strict=True):
        np.testing.assert_array_equal(output, before)
    np.testing.assert_array_equal(np.array(corrections), corrections_before)


# Beside smlmlp itself


@pytest.fixture(scope="session")
def smlmlp() -> Any:
    # Not importorskip: where smlmlp is installed but broken, the tests shall fail.
    if importlib.util.find_spec("smlmlp") is None:
        pytest.skip("smlmlp is not installed; the golden values stand for it.")
    return importlib.import_module("smlmlp")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(len(RADII_PIX)))
def test_every_pixel_kernel_and_factor_equals_those_of_smlmlp(smlmlp: Any, first: int):
    cases = CASES[first :: len(RADII_PIX)]
    channels = [case.frames() for case in cases]
    radii = [case.radii_pix for case in cases]
    corrections = [
        [np.float32(0.5), 2.0, 1, np.float64(3.0), np.float32(1)] for _ in range(2)
    ]
    expected = smlmlp.bkgd_spatial_mean(channels, radii, noise_corrections=corrections[0])
    bkgds, factors, info = bkgd_spatial_mean(
        channels, radii, noise_corrections=corrections[1]
    )
    for bkgd, same, frames in zip(bkgds, expected[0], channels, strict=True):
        assert bkgd.dtype == same.dtype
        _assert_close_to(bkgd, same, frames)
    np.testing.assert_allclose(factors, expected[1], rtol=KERNEL_TOLERANCE)
    assert list(map(type, factors)) == list(map(type, expected[1]))
    _assert_same_info(info, expected[2])


def _assert_same_info(info: dict[str, list], expected: dict[str, list]) -> None:
    assert list(info) == list(expected)
    for key in ("channels_mean_radii_pix", "spatial_mean_sigmas"):
        assert info[key] == expected[key]
    for key in ("spatial_mean_kernels_y", "spatial_mean_kernels_x"):
        for kernel, same in zip(info[key], expected[key], strict=True):
            assert type(kernel) is type(same)
            assert kernel.dtype == same.dtype
            np.testing.assert_allclose(kernel, same, rtol=KERNEL_TOLERANCE)


@pytest.mark.parametrize("radii", [7, (6.0, 10.0), [(6.0, 10.0)]], ids=str)
def test_one_channel_takes_the_radii_that_it_takes_in_smlmlp(smlmlp: Any, radii: Any):
    frames = _two_channels()[0]
    bkgds, _, info = bkgd_spatial_mean([frames], radii)
    expected, _, expected_info = smlmlp.bkgd_spatial_mean([frames], radii)
    _assert_close_to(bkgds[0], expected[0], frames)
    _assert_same_info(info, expected_info)


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("bool", False),
        ("int8", True),
        ("int64", False),
        ("uint64", False),
        ("float16", True),
    ],
)
def test_other_dtypes_have_the_bkgds_of_smlmlp(smlmlp: Any, dtype: str, parallel: bool):
    frames = Case((2, 5, 7), "int32", (3.0, 3.0)).frames()
    frames = (frames // 2**16 if dtype == "float16" else frames).astype(dtype)
    bkgds, _, _ = bkgd_spatial_mean([frames], 3.0, parallel=parallel)
    expected, _, _ = smlmlp.bkgd_spatial_mean([frames], 3.0, parallel=parallel)
    _assert_close_to(bkgds[0], expected[0], frames)


@pytest.mark.parametrize("frames", [0, 3])
def test_outputs_are_filled_as_smlmlp_fills_them(smlmlp: Any, frames: int):
    channels = [stack[:frames] for stack in _two_channels()]
    ours, theirs = (
        [np.full((5, *stack.shape[1:]), -1, np.float32) for stack in channels]
        for _ in range(2)
    )
    bkgds, _, _ = bkgd_spatial_mean(channels, 3.0, ours)
    expected, _, _ = smlmlp.bkgd_spatial_mean(channels, 3.0, theirs)
    for index, stack in enumerate(channels):
        assert bkgds[index].shape == expected[index].shape
        _assert_close_to(ours[index], theirs[index], np.append(stack, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "has_outputs"),
    [
        ({}, True),
        ({"do_temporal_median": False, "channels_mean_radii_pix": 3.0}, False),
    ],
    ids=str,
)
def test_the_pipeline_of_smlmlp_gives_the_same_with_this_spatial_mean(
    smlmlp: Any, monkeypatch: pytest.MonkeyPatch, options: dict, has_outputs: bool
):
    # smlmlp 0.1.20 takes from stacklp what stacklp 0.1.9 does not have.
    stacklp, arrlp = map(importlib.import_module, ("stacklp", "arrlp"))
    monkeypatch.setattr(stacklp, "get_xp", arrlp.get_xp, raising=False)
    pipeline = smlmlp.bkgd_combination
    channels = [
        Case((17, 24, 20), "float32", (7.0, 7.0)).frames(),
        Case((9, 16, 28), "uint16", (7.0, 7.0)).frames().astype(np.float32),
    ]

    def run() -> tuple[list[np.ndarray], list[np.float32], dict]:
        outputs = [np.full_like(frames, -1) for frames in channels]
        return pipeline(
            [frames.copy() for frames in channels],
            outputs if has_outputs else None,
            [np.float32(2), np.float32(3)],
            **options,
        )

    expected, expected_factors, expected_info = run()
    ours = Mock(side_effect=bkgd_spatial_mean)
    monkeypatch.setattr(sys.modules[pipeline.__module__], "bkgd_spatial_mean", ours)
    bkgds, factors, info = run()
    ours.assert_called_once()
    for bkgd, same, frames in zip(bkgds, expected, channels, strict=True):
        _assert_close_to(bkgd, same, frames)
    np.testing.assert_allclose(factors, expected_factors, rtol=KERNEL_TOLERANCE)
    assert list(info) == list(expected_info)

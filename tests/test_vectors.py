"""Compiler options for vectors of 512 bits, given where XLA knows them and they pay."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbkgd import spatial_mean
from jaxbkgd._filter import vectors as _vectors


# XLA refuses it.
NO_OPTION = {"no_such_option": 1}


@pytest.fixture
def processor_flags(monkeypatch):
    flags = {"avx512f", "avx512_vbmi2"}
    monkeypatch.setattr(_vectors, "_processor_flags", lambda: flags)
    _vectors.compiler_options.cache_clear()
    yield flags
    _vectors.compiler_options.cache_clear()


@pytest.mark.usefixtures("processor_flags")
@pytest.mark.parametrize("options", [_vectors.WIDE_VECTORS, NO_OPTION])
def test_an_option_that_xla_does_not_know_is_not_given(options, monkeypatch):
    monkeypatch.setattr(_vectors, "WIDE_VECTORS", options)
    is_known = options != NO_OPTION
    assert _vectors.compiler_options() == (options if is_known else None)


def test_gpus_and_processors_that_slow_down_get_no_options(processor_flags, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _vectors.compiler_options() is None
    monkeypatch.undo()
    monkeypatch.setattr(_vectors, "_processor_flags", lambda: {"avx512f"})
    _vectors.compiler_options.cache_clear()
    assert _vectors.compiler_options() is None


@pytest.mark.slow
@pytest.mark.parametrize("radius_pix", [3.0, 15.0])
def test_a_program_around_the_filter_gives_the_same_to_the_bit(radius_pix, rng):
    # Lines that end within a vector of either width.
    frames = rng.normal(100, 10, (2, 60, 141)).astype(np.float32)
    mean = ft.partial(spatial_mean, max_radius_pix=radius_pix)
    # An argument: of constants, XLA would make the taps as it compiles.
    radius = jnp.asarray(radius_pix, jnp.float32)
    np.testing.assert_array_equal(jax.jit(mean)(frames, radius), mean(frames, radius))

"""Compiler options that JAX takes outside of any other program only."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbkgd import spatial_mean
from jaxbkgd._filter import vectors as _vectors


# XLA refuses it, and so tells of every program that it is given for.
NO_OPTION = {"no_such_option": 1}


def doubled(x):
    return 2 * x


def test_options_are_given_outside_of_all_programs_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(_vectors, "compiler_options", lambda: NO_OPTION)
    in_full_width = _vectors.jit_in_full_width(doubled)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        in_full_width(1.0)
    inside = (jax.jit, jax.vmap, jax.grad, lambda f: jax.jit(jax.grad(f)))
    for transform in inside:
        x = jnp.ones(3) if transform is jax.vmap else jnp.ones(())
        np.testing.assert_array_equal(transform(in_full_width)(x), 2.0)
    # Where JAX evaluates what is known in a program, it is outside of that.
    with jax.ensure_compile_time_eval(), pytest.raises(jax.errors.JaxRuntimeError):
        in_full_width(1.0)


@pytest.mark.bits
@pytest.mark.parametrize("radius_pix", [3.0, 15.0, 40.0])
def test_a_program_around_it_gives_the_same_to_the_bit(radius_pix, rng):
    # Lines that end within a vector of either width.
    frames = rng.normal(100, 10, (2, 90, 141)).astype(np.float32)
    mean = ft.partial(spatial_mean, max_radius_pix=radius_pix)
    radius = jnp.asarray(radius_pix, jnp.float32)
    np.testing.assert_array_equal(jax.jit(mean)(frames, radius), mean(frames, radius))


@pytest.fixture
def asked_anew():
    _vectors.compiler_options.cache_clear()
    yield
    _vectors.compiler_options.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_there_are_options_for_cpu_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _vectors.compiler_options() is None


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("options", [_vectors.WIDE_VECTORS, NO_OPTION])
def test_an_option_that_xla_does_not_know_is_not_given(options, monkeypatch):
    monkeypatch.setattr(_vectors, "WIDE_VECTORS", options)
    is_known = options != NO_OPTION
    assert _vectors.compiler_options() == (options if is_known else None)
